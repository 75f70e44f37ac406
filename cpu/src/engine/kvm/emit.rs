//! What the translator does otherwise for code that runs in the virtual machine, where guest addresses are addresses.
//!
//! Memory operands stay what they were, with renamed registers; every instruction that touches memory is a fault site,
//! so that whatever the processor does not like about it leaves with the state before it.

use super::super::assembler::{Assembler, Operand, POINTER, cc, host};
use super::super::block::field;
use super::super::classify::Treatment;
use super::super::registers::{HOME, gpr_number};
use super::super::residents::{Resident, Residents};
use super::super::translate::{Borrowed, Cold, Flags, SiteKind, Translator, set_memory};
use super::EXIT_DISTANCE;
use crate::state::{gpr, rflags};
use crate::system::availability::{Unit, unit};
use iced_x86::{Instruction, OpKind, Register};

/// Emits the way out: a store that KVM reports, to the page in front of the code.
pub fn emit_exit(a: &mut Assembler) {
    a.put(&[0x89, 0x05]); // mov [rip + distance], eax
    let distance = -EXIT_DISTANCE - (a.here() as i32 + 4);
    a.put(&distance.to_le_bytes());
    // Nothing returns here.
    a.put(&[0x0F, 0x0B]);
}

impl Translator {
    /// The next instruction emitted may fault on its memory operand.
    pub fn may_fault_here(&mut self) {
        if !self.mode.is_direct() {
            return;
        }
        let kind = SiteKind::Fault {
            flags_in_host: self.flags != Flags::Slot,
            borrowed: Borrowed::default(),
            residents: self.residents_here(),
        };
        let site = self.site(kind, self.unretired());
        self.faults.push((self.a.here() as u32, site));
    }

    /// The memory operand with renamed registers; may use RAX and RCX, and leaves the flags alone.
    pub fn direct_operand(&mut self, ins: &Instruction) -> Operand {
        self.biased_operand(ins, 0)
    }

    /// The same for an instruction that adds to RSP before it computes the address; only what is computed here, and
    /// not by the instruction itself, needs to know.
    fn biased_operand(&mut self, ins: &Instruction, rsp_bias: i32) -> Operand {
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let segment = matches!(ins.memory_segment(), Register::FS | Register::GS);
        let wide = |register: Register| register == Register::None || register.is_gpr64();
        if segment || ins.is_ip_rel_memory_operand() || base == Register::None || !wide(base) || !wide(index) {
            self.address(ins, rsp_bias);
            return POINTER;
        }
        let disp = ins.memory_displacement64() as i32;
        let scale = ins.memory_index_scale() as u8;
        let base = gpr_number(base).expect("a general register");
        let Some(index) = gpr_number(index) else {
            return Operand { base: self.held(base, host::RCX), disp, ..POINTER };
        };
        if self.home[base as usize].is_none() && self.home[index as usize].is_none() {
            self.address(ins, rsp_bias);
            return POINTER;
        }
        let base = self.held(base, host::RCX);
        Operand { base, index: Some(self.held(index, host::RCX)), scale, disp }
    }

    /// Touches the memory operand of an x87 or MMX instruction first: a KVM without help of the processor emulates what
    /// raises #GP, and touches x87 state when it does. Uses RAX.
    pub fn touch_first(&mut self, ins: &Instruction, at: Operand) {
        let mmx = (0..ins.op_count()).any(|i| ins.op_kind(i) == OpKind::Register && ins.op_register(i).is_mm());
        if !self.mode.is_direct() || !mmx && unit(ins) != Unit::X87 {
            return;
        }
        let last = ins.memory_size().size().saturating_sub(4) as i32;
        for disp in [at.disp, at.disp.wrapping_add(last)] {
            self.may_fault_here();
            self.a.load(4, host::RAX, Operand { disp, ..at });
        }
    }

    /// Instructions that use the stack by themselves; false if it is none of them.
    pub fn direct_stack(&mut self, ins: &Instruction, treatment: Treatment) -> bool {
        match treatment {
            Treatment::Push => self.direct_push(ins),
            Treatment::Pop => self.direct_pop(ins),
            Treatment::Leave => {
                self.may_fault_here();
                self.a.bytes.push(0xC9);
            }
            Treatment::Return => {
                self.may_fault_here();
                self.a.pop(host::RCX);
                let extra = if ins.op_count() == 1 { i32::from(ins.immediate16()) } else { 0 };
                if extra != 0 {
                    self.adjust_rsp(extra);
                }
                self.indirect(8 + extra);
            }
            _ => return false,
        }
        true
    }

    fn direct_push(&mut self, ins: &Instruction) {
        match ins.op0_kind() {
            OpKind::Register => {
                let guest = gpr_number(ins.op0_register()).expect("segment registers are emulated");
                self.may_fault_here();
                match self.home[guest as usize] {
                    Some(home) => self.a.push(home),
                    None => self.a.push_field(field::homeless(guest)),
                }
            }
            OpKind::Memory => {
                let at = self.direct_operand(ins);
                let mut out = *ins;
                set_memory(&mut out, at);
                self.may_fault_here();
                self.encode(ins, &out);
            }
            _ => self.direct_push_constant(ins.immediate(0)),
        }
    }

    /// PUSH of a constant of 64 bits.
    pub fn direct_push_constant(&mut self, value: u64) {
        if value as i64 == value as i32 as i64 {
            self.may_fault_here();
            self.a.push_imm(value as u32);
        } else {
            self.a.mov_imm(host::RAX, value);
            self.may_fault_here();
            self.a.push(host::RAX);
        }
    }

    fn direct_pop(&mut self, ins: &Instruction) {
        if ins.op0_kind() == OpKind::Register {
            let guest = gpr_number(ins.op0_register()).expect("segment registers are emulated");
            self.may_fault_here();
            match self.home[guest as usize] {
                Some(home) => self.a.pop(home),
                None => self.a.pop_field(field::homeless(guest)),
            }
            self.check_stack(ins);
        } else {
            let at = self.biased_operand(ins, 8);
            let mut out = *ins;
            set_memory(&mut out, at);
            self.may_fault_here();
            self.encode(ins, &out);
        }
    }

    /// REP MOVS or REP STOS. Where it faults, what it has done is done: it goes on from there.
    pub fn repeated_move(&mut self, ins: &Instruction) {
        self.put_flags_away();
        let unretired = self.unretired();
        self.a.test_field_imm32(field::RFLAGS, rflags::DF as u32);
        let site = self.emulation_site(ins, unretired);
        self.leave_if(cc::NE, site);
        self.fetch(host::RAX, gpr::RAX as u8);
        self.fetch(host::RCX, gpr::RCX as u8);
        let mut residents = Residents::default();
        residents[0] = Some(Resident { guest: gpr::RCX as u8, host: host::RCX });
        let kind = SiteKind::Fault { flags_in_host: false, borrowed: Borrowed::default(), residents };
        let site = self.site(kind, unretired);
        self.faults.push((self.a.here() as u32, site));
        self.encode(ins, ins);
        self.a.mov(HOME[gpr::RCX].expect("guest RCX has a home"), host::RCX);
        self.link(ins.next_ip());
    }

    /// Leaves behind an instruction that has put an address into RSP which is none: some KVMs emulate code with such a
    /// stack pointer.
    pub fn check_stack(&mut self, ins: &Instruction) {
        if !self.mode.is_direct() || !self.writes_stack_pointer(ins) {
            return;
        }
        let ip = std::mem::replace(&mut self.ip, ins.next_ip());
        let unretired = self.unretired() - 1;
        let site = self.site(SiteKind::Lookup, unretired);
        let flags_in_host = self.flags != Flags::Slot;
        let emulated = self.site(
            SiteKind::Fault { flags_in_host, borrowed: Borrowed::default(), residents: self.residents_here() },
            unretired,
        );
        self.ip = ip;
        // Without touching the flags: bits 63 to 47 are all zero, or all ones. KVM may fail to emulate this, too.
        self.faults.push((self.a.here() as u32, emulated));
        self.a.mov_imm(host::RAX, 47);
        self.faults.push((self.a.here() as u32, emulated));
        self.a.sarx_rcx_rsp_rax();
        self.faults.push((self.a.here() as u32, emulated));
        let low = self.a.jrcxz();
        self.faults.push((self.a.here() as u32, emulated));
        self.a.lea(true, host::RCX, Some(host::RCX), None, 1);
        self.faults.push((self.a.here() as u32, emulated));
        let high = self.a.jrcxz();
        if matches!(self.flags, Flags::Host(_)) {
            self.faults.push((self.a.here() as u32, emulated));
            self.a.save_flags(field::FLAGS);
        }
        let patch = self.a.jmp(0);
        self.cold.push(Cold::Leave { patch, site });
        self.a.land8(low);
        self.a.land8(high);
    }

    fn writes_stack_pointer(&mut self, ins: &Instruction) -> bool {
        use iced_x86::OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
        self.info.info(ins).used_registers().iter().any(|used| {
            used.register().full_register() == Register::RSP
                && matches!(used.access(), Write | ReadWrite | CondWrite | ReadCondWrite)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::profile::Ways;
    use crate::engine::translate::Request;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    #[test]
    fn whatever_touches_memory_is_a_fault_site() {
        // cmp rdx, [r10]; mov rdx, rbp; mov rax, [rsi]; add rbx, 1; cmp [rdi], ecx; mov rax, [rsi]; add rbx, [rdi]; hlt
        let code = [
            0x49, 0x3B, 0x12, 0x48, 0x89, 0xEA, 0x48, 0x8B, 0x06, 0x48, 0x83, 0xC3, 0x01, 0x39, 0x0F, 0x48, 0x8B, 0x06,
            0x48, 0x03, 0x1F, 0xF4,
        ];
        let mut translator = Translator::alone();
        for hot in [None, Some(Ways::Random(0))] {
            let ordinary = Request::ordinary(&code);
            let request = Request { mode: ordinary.mode.direct(), hot, heats: hot.is_none(), ..ordinary };
            const ORIGIN: u32 = 0x8000;
            translator.translate(&request, ORIGIN).expect("all that it wants");
            let block = Register::RAX + u32::from(host::BLOCK);
            let touches: Vec<u32> = Decoder::with_ip(64, &translator.a.bytes, ORIGIN.into(), DecoderOptions::NONE)
                .iter()
                .filter(|ins| ins.op_kinds().any(|kind| kind == OpKind::Memory) && ins.mnemonic() != Mnemonic::Lea)
                .filter(|ins| ins.memory_base() != block)
                .map(|ins| ins.ip() as u32)
                .collect();
            assert_eq!(touches, translator.faults.iter().map(|fault| fault.0).collect::<Vec<_>>());
            assert_eq!(touches.len(), 5);
        }
    }
}
