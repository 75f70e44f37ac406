//! What KVM does otherwise than a processor, each as narrow as it can be told: a guest that meets one is left there,
//! and counted under its name. `docs/oracles.md` has the reasons.

use iced_x86::{Code, EncodingKind, Instruction, MemorySize, Mnemonic, OpKind, Register};
use orrery_cpu::paging::is_canonical;
use orrery_cpu::state::{CpuState, gpr, rflags, seg};

use crate::machine::vector_at;

/// The instruction after which both sides differ.
pub struct Meeting<'a> {
    /// It, if its bytes could be read.
    pub instruction: Option<Instruction>,
    /// The state before it.
    pub before: &'a CpuState,
    /// The vector that it made the engine take.
    pub engine_vector: Option<u64>,
    /// KVM has no help of the processor (PVM): it emulates kernel mode.
    pub emulates_kernel: bool,
    /// The processor below KVM is one that QEMU emulates.
    pub emulated_processor: bool,
    /// What the engine has executed since then.
    pub mnemonics: &'a [Mnemonic],
    /// A REX prefix that the manuals ignore, for it does not stand before the opcode (SDM volume 2, 2.2.1).
    pub rex_is_followed_by_prefix: bool,
    /// The engine has met a WRMSR that would load a segment base that is not canonical.
    pub refused_base: bool,
    /// The engine has met a branch to an address that is not canonical, and refused it.
    pub refused_target: bool,
    /// The instruction is a gather, or would be one if it named other registers.
    pub is_gather: bool,
    /// The guest writes its code through another address than it is fetched from.
    pub writes_code: bool,
    /// MXCSR in the image that the instruction's memory operand is, if it can be read.
    pub image_mxcsr: Option<u32>,
    /// KVM's state behind it.
    pub kvm: &'a CpuState,
    /// The engine's, at the same place if it got there.
    pub engine: &'a CpuState,
}

/// Bits of MXCSR that are not reserved.
const MXCSR_BITS: u32 = 0xFFFF;

/// Linear address of an instruction's memory operand, if it has one that registers give.
pub fn operand_address(instruction: &Instruction, state: &CpuState) -> Option<u64> {
    let operand = (0..instruction.op_count()).find(|n| instruction.op_kind(*n) == OpKind::Memory)?;
    instruction.virtual_address(operand, 0, |register: Register, _, _| match register {
        segment if segment.is_segment_register() => Some(state.seg[segment.number()].base),
        register => Some(state.gpr[register.full_register().number()]),
    })
}

/// Where a near branch, or a far return of 64-bit code, is about to go. `read` reads eight bytes of data.
pub fn branch_target(
    instruction: &Instruction,
    state: &CpuState,
    read: impl FnOnce(u64) -> Option<u64>,
) -> Option<u64> {
    use Code::{Iretq, Retfq, Retfq_imm16, Retnq, Retnq_imm16, Sysretq};
    match instruction.code() {
        Retnq | Retnq_imm16 | Retfq | Retfq_imm16 | Iretq => return read(state.gpr[gpr::RSP]),
        Sysretq => return Some(state.gpr[gpr::RCX]),
        _ if !matches!(instruction.mnemonic(), Mnemonic::Jmp | Mnemonic::Call) => return None,
        _ => {}
    }
    match instruction.op0_kind() {
        OpKind::NearBranch64 => Some(instruction.near_branch64()),
        OpKind::Register => Some(state.gpr[instruction.op0_register().full_register().number()]),
        OpKind::Memory => read(operand_address(instruction, state)?),
        _ => None,
    }
}

impl Meeting<'_> {
    fn mnemonic(&self) -> Mnemonic {
        self.instruction.map_or(Mnemonic::INVALID, |i| i.mnemonic())
    }

    /// The name of KVM's way, if this is one.
    pub fn explain(&self) -> Option<&'static str> {
        use Mnemonic::*;
        let (kvm, engine) = (vector_at(self.kvm.rip), self.engine_vector);
        let mnemonic = self.mnemonic();
        let misaligned = self.operand().is_some_and(|at| at % 16 != 0);
        if matches!(mnemonic, Fxsave | Fxsave64 | Fxrstor | Fxrstor64)
            && misaligned
            && engine == Some(13)
            && kvm != engine
        {
            return Some("no #GP of a misaligned FXSAVE or FXRSTOR");
        }
        let compares = self.instruction.is_some_and(|i| i.is_string_instruction() && i.rflags_written() != 0);
        let flags = self.kvm.rflags ^ self.engine.rflags;
        if compares && kvm.is_some() && kvm == engine && flags != 0 && flags & !rflags::STATUS == 0 {
            return Some("flags of a repeated comparison that faults");
        }
        if kvm == engine && matches!(kvm, Some(8 | 14)) && self.only_the_address_differs() && self.is_in_any_order() {
            return Some("CR2 of an operand that is gone through in any order");
        }
        match (self.emulates_kernel, self.before.cpl) {
            (true, 3) => self.explain_user(kvm, engine),
            (true, _) => self.explain_kernel(kvm, engine),
            _ if self.emulated_processor => self.explain_qemu(kvm, engine),
            _ => None,
        }
    }

    /// Linear address of the memory operand.
    fn operand(&self) -> Option<u64> {
        operand_address(&self.instruction?, self.before)
    }

    /// Microcode goes through images of processor state, and through selected elements, in an order of its own.
    fn is_in_any_order(&self) -> bool {
        use Mnemonic::*;
        matches!(
            self.mnemonic(),
            Fldenv
                | Fnstenv
                | Frstor
                | Fnsave
                | Fxsave
                | Fxsave64
                | Fxrstor
                | Fxrstor64
                | Xsave
                | Xsave64
                | Xrstor
                | Xrstor64
                | Maskmovq
                | Maskmovdqu
                | Vmaskmovdqu
                | Vmaskmovps
                | Vmaskmovpd
                | Vpmaskmovd
                | Vpmaskmovq
        )
    }

    /// KVM's page fault is at the end of what is canonical.
    fn crosses_the_end(&self) -> bool {
        (1u64 << 47).wrapping_sub(self.kvm.cr2) <= 64
    }

    /// What was read from a page table differs in the accessed flag.
    fn only_accessed_differs(&self) -> bool {
        let mut differences = self.kvm.gpr.iter().zip(&self.engine.gpr).map(|(kvm, engine)| kvm ^ engine);
        differences.clone().filter(|d| *d != 0).count() == 1 && differences.any(|d| d == 0x20)
    }

    /// General-purpose registers differ in their upper halves alone.
    fn only_upper_halves_differ(&self) -> bool {
        self.kvm.gpr != self.engine.gpr
            && self.kvm.gpr.iter().zip(&self.engine.gpr).all(|(k, e)| *k as u32 == *e as u32)
    }

    /// All x87 registers are in use for KVM, as MMX instructions leave them, and TOP is 0.
    fn only_x87_tags_differ(&self) -> bool {
        let (kvm, engine) = (&self.kvm.fpu.0, &self.engine.fpu.0);
        let top = (kvm[3] ^ engine[3]) & !0x38 == 0 && kvm[3] & 0x38 == 0;
        top && kvm[..3] == engine[..3] && kvm[4] == 0xFF && kvm[5..] == engine[5..] && kvm[3..5] != engine[3..5]
    }

    /// Of all general-purpose registers, only one differs, and in these bits alone.
    fn only_differs_in(&self, register: usize, bits: u64) -> bool {
        (0..16).all(|n| match self.kvm.gpr[n] ^ self.engine.gpr[n] {
            0 => n != register,
            difference => n == register && difference & !bits == 0,
        })
    }

    /// An operand of 16 bytes of an instruction without VEX prefix, which must be aligned, is not.
    fn has_misaligned_operand(&self) -> bool {
        self.instruction.is_some_and(|i| i.encoding() == EncodingKind::Legacy && i.memory_size().size() == 16)
            && self.operand().is_some_and(|address| address % 16 != 0)
    }

    /// Both faulted, within a page of each other.
    fn only_the_address_differs(&self) -> bool {
        self.kvm.cr2 != self.engine.cr2 && self.kvm.cr2.abs_diff(self.engine.cr2) < 4096
    }

    fn explain_user(&self, kvm: Option<u64>, engine: Option<u64>) -> Option<&'static str> {
        use Mnemonic::*;
        let mnemonic = self.mnemonic();
        let moves_selector = self.instruction.is_some_and(|i| {
            matches!(mnemonic, Mov | Pop | Push | Lds | Les | Lfs | Lgs | Lss)
                && (0..i.op_count()).any(|n| i.op_register(n).is_segment_register())
                || matches!(mnemonic, Lds | Les | Lfs | Lgs | Lss)
        });
        match mnemonic {
            _ if kvm == Some(6) && matches!(engine, Some(12 | 13)) => {
                Some("#UD for #GP and #SS of user mode on an instruction that KVM does not emulate")
            }
            _ if !is_canonical(self.before.gpr[gpr::RSP]) => {
                Some("user mode is emulated while its stack pointer is not canonical")
            }
            _ if kvm == Some(12) && engine == Some(13) => Some("#SS for #GP"),
            Int | Int3 | Into if kvm == Some(6) => Some("#UD for INT n of user mode"),
            Syscall if kvm == Some(14) => Some("SYSCALL fetches from the kernel as a user"),
            Xgetbv => Some("XGETBV of user mode reads the host's XCR0"),
            _ if kvm == Some(14) && engine == kvm && self.kvm.cr2 >> 47 != 0 => {
                Some("user mode's access to the kernel's half finds no page")
            }
            _ if kvm == Some(14) && matches!(engine, Some(12 | 13)) && self.crosses_the_end() => {
                Some("#PF for #GP across the end of the lower half")
            }
            _ if kvm.is_some() && kvm == engine && (self.kvm.rflags ^ self.engine.rflags) == rflags::AC => {
                Some("an exception of user mode clears AC")
            }
            _ if moves_selector => Some("selectors of user mode are the host's"),
            _ => None,
        }
    }

    fn explain_kernel(&self, kvm: Option<u64>, engine: Option<u64>) -> Option<&'static str> {
        use Mnemonic::*;
        match self.mnemonic() {
            Iretq if self.returns_with_kernel_data() => Some("IRET keeps data segments of the kernel"),
            _ if kvm == Some(8) && engine == kvm && self.kvm.cr2 != self.engine.cr2 => {
                Some("a page fault while one is delivered leaves CR2 alone")
            }
            Mov if self.only_accessed_differs() => Some("a refused read-modify-write has read, and set accessed flags"),
            Movd | Movq | Movntq if engine == Some(14) && kvm == engine && self.only_x87_tags_differ() => {
                Some("an MMX store that faults has made MMX registers of the x87 registers")
            }
            Cmpxchg if kvm.is_none() && engine.is_none() => {
                Some("CMPXCHG clears the upper half of what it leaves alone")
            }
            _ if kvm == Some(12) && engine == Some(13) => Some("#SS for #GP"),
            _ if kvm == Some(14) && matches!(engine, Some(12 | 13)) && self.crosses_the_end() => {
                Some("#PF for #GP across the end of the lower half")
            }
            Iretq if engine.is_some() => Some("IRET does not check its frame"),
            Wrmsr if self.before.gpr[gpr::RCX] == 0x277 && engine == Some(13) => Some("reserved types in PAT"),
            Wrmsr if self.before.gpr[gpr::RCX] == 0xC000_0103 && kvm == Some(13) => Some("#GP for TSC_AUX"),
            _ => None,
        }
    }

    /// What QEMU 7.2's emulation of a processor does otherwise than the manuals say; `docs/svm.md` has the sources.
    fn explain_qemu(&self, kvm: Option<u64>, engine: Option<u64>) -> Option<&'static str> {
        use Mnemonic::*;
        let mnemonic = self.mnemonic();
        let flags = self.kvm.rflags ^ self.engine.rflags;
        let passes = |wanted: &[Mnemonic]| self.mnemonics.iter().any(|m| wanted.contains(m));
        let frame_bytes = self.kvm.cr2.wrapping_sub(self.engine.cr2);
        if engine == Some(17) && kvm != engine {
            return Some("no alignment checks");
        }
        if self.refused_target {
            return Some("a branch to an address that is not canonical faults at its target");
        }
        if engine == Some(8) && kvm != engine {
            return Some("no double fault behind a #GP that an address raises");
        }
        if kvm == Some(13) && engine == Some(12) {
            return Some("#GP for #SS of an address that is not canonical");
        }
        let delivers = kvm == engine && matches!(kvm, Some(8 | 14)) || self.mnemonics.len() > 1;
        if delivers && matches!(frame_bytes, 8 | 16 | 24 | 32 | 40) {
            return Some("a frame that cannot be pushed faults word by word");
        }
        if self.rex_is_followed_by_prefix {
            return Some("REX counts although a prefix follows it");
        }
        if kvm == Some(14) && matches!(engine, Some(12 | 13)) && self.crosses_the_end() {
            return Some("#PF for #GP across the end of the lower half");
        }
        if matches!(mnemonic, Nop | Reservednop) && kvm == Some(6) {
            return Some("no NOPs with reserved encodings");
        }
        if engine == Some(13) && passes(&[Ldmxcsr, Vldmxcsr]) {
            return Some("LDMXCSR takes reserved bits");
        }
        if self.refused_base || matches!(mnemonic, Wrfsbase | Wrgsbase) && engine == Some(13) {
            return Some("WRMSR and WRFSBASE take segment bases that are not canonical");
        }
        if matches!(mnemonic, Shld | Shrd)
            && self.instruction.is_some_and(|i| i.is_ip_rel_memory_operand() && i.op2_kind() == OpKind::Immediate8)
        {
            return Some("SHLD and SHRD by a constant forget it in addresses relative to RIP");
        }
        if passes(&[Blsi]) && flags & rflags::CF != 0 {
            return Some("BLSI clears CF where it sets it");
        }
        if self.is_gather && engine == Some(6) && kvm != engine {
            return Some("gathers may name a register twice");
        }
        if self.instruction.is_some_and(|i| i.is_vsib() && i.memory_index().number() == 4) {
            return Some("gathers take index register 4 for none");
        }
        if self.instruction.is_some_and(|i| i.is_vsib() && i.memory_base().size() == 4) {
            return Some("gathers do not truncate addresses to 32 bits");
        }
        if engine == Some(16) && kvm != engine {
            return Some("a pending x87 error does not come first");
        }
        if engine == Some(14) && kvm == engine && self.only_x87_tags_differ() {
            return Some("an MMX instruction that faults has made MMX registers of the x87 registers");
        }
        let reserved = self.image_mxcsr.is_some_and(|mxcsr| mxcsr & !MXCSR_BITS != 0);
        if matches!(mnemonic, Fxrstor | Fxrstor64 | Xrstor | Xrstor64)
            && reserved
            && engine == Some(13)
            && kvm != engine
        {
            return Some("an image with reserved bits of MXCSR is loaded");
        }
        if self
            .instruction
            .is_some_and(|i| matches!(mnemonic, Ret | Retf) && i.op_count() == 1 && i.immediate16() >> 15 != 0)
        {
            return Some("RET takes its constant for signed");
        }
        if mnemonic == Invpcid && kvm == Some(6) {
            return Some("no INVPCID");
        }
        if engine == Some(13) && kvm != engine && self.has_misaligned_operand() {
            return Some("an SSE operand need not be aligned");
        }
        // Sums of the immediate operands that the pieces write, which are all in AL.
        let follows = self.mnemonics.len() > 1 && self.kvm.rip == self.engine.rip && self.kvm.cr2 == self.engine.cr2;
        if self.writes_code && follows && flags & !rflags::STATUS == 0 && self.only_differs_in(gpr::RAX, 0xFF) {
            return Some("code that is written through another address is executed as it was, until it is serialised");
        }
        if passes(&[Pushf, Pushfd, Pushfq]) && (0..16).any(|n| self.only_differs_in(n, rflags::TF)) {
            return Some("TF shows in flags that are pushed where KVM does not stop");
        }
        if matches!(mnemonic, Bsf | Bsr) && self.only_upper_halves_differ() {
            return Some("BSF and BSR of zero clear the upper half");
        }
        if matches!(mnemonic, Shld | Shrd)
            && self.instruction.is_some_and(|i| i.memory_size() == MemorySize::UInt16 || i.op0_register().size() == 2)
        {
            return Some("SHLD and SHRD of 16 bits by more than 16 have another undefined result");
        }
        if mnemonic == Mov && self.only_accessed_differs() {
            return Some("accessed flags are set ahead of the access, as SDM volume 3, 4.8 permits");
        }
        if passes(&[Cmpxchg8b, Cmpxchg16b]) && self.kvm.rip == self.engine.rip && self.kvm.rflags != self.engine.rflags
        {
            return Some("CMPXCHG8B keeps flags of before, on the engine's side");
        }
        if passes(&[Lar]) {
            return Some("LAR clears the upper bits of the limit");
        }
        if passes(&[Fnstenv, Fnsave, Fldenv, Frstor, Fxsave, Fxsave64, Fxrstor, Fxrstor64, Xsave, Xsave64]) {
            return Some("images of x87 state have addresses of instructions, and keep what is reserved");
        }
        if engine == Some(14) && kvm == engine {
            if self.kvm.fpu.0[2..4] != self.engine.fpu.0[2..4] {
                return Some("a store of x87 that faults has set its status");
            }
            if matches!(mnemonic, Rcl | Rcr | Rol | Ror | Shl | Shr | Sal | Sar | Shld | Shrd) {
                return Some("a rotate or shift that faults has set flags");
            }
        }
        if kvm == engine && kvm.is_some() && self.kvm.seg[seg::SS].selector == 0 && self.engine.cpl == 0 {
            return Some("an exception on another stack of its own level makes SS null");
        }
        None
    }

    /// IRET to user mode makes data segments null that user mode may not have (Intel SDM volume 2, IRET).
    fn returns_with_kernel_data(&self) -> bool {
        let kept = |n: usize| {
            let (kvm, engine) = (&self.kvm.seg[n], &self.engine.seg[n]);
            kvm.selector & 3 == 0 && kvm.selector != 0 && kvm.dpl() == 0 && engine.selector == 0
        };
        [seg::ES, seg::DS, seg::FS, seg::GS].into_iter().any(kept)
    }
}
