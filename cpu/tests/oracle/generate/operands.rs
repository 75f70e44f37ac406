//! Fills in the operands of an instruction: random registers, immediates and addressing modes, with register
//! values that make the effective address fall where it was meant to.

use iced_x86::{Code, Instruction, MemoryOperand, MemorySize, Mnemonic, OpCodeOperandKind, OpKind, Register};

use orrery_cpu::state::XSAVE_SIZE;

use crate::case::{CODE, DATA, PAGE, READ_ONLY, Registers, TAIL};
use crate::rng::Rng;
use crate::values::interesting_integer;

/// The pointers that every instruction of a sequence may count on.
#[derive(Clone, Debug, Default)]
pub struct Pointers {
    /// Registers with addresses in [`DATA`], as (number, value).
    pub bases: Vec<(usize, u64)>,
    /// A register with a small number.
    pub index: Option<(usize, u64)>,
    /// Where many operands of the program are, so that they share translations, pages and cache lines.
    pub focus: u64,
}

impl Pointers {
    /// True if the register must keep its value.
    pub fn protects(&self, register: usize) -> bool {
        self.bases.iter().any(|(r, _)| *r == register) || self.index.is_some_and(|(r, _)| r == register)
    }
}

/// What is being set up: the state before the first instruction.
pub struct Setup<'a> {
    /// The stream of this case.
    pub rng: &'a mut Rng,
    /// Registers before.
    pub registers: Registers,
    /// Memory before.
    pub pokes: Vec<(u64, Vec<u8>)>,
    /// See [`crate::case::Case::ignored_memory`].
    pub ignored_memory: Vec<(u64, u64)>,
    /// 64, or 32 for compatibility mode.
    pub bits: u32,
    /// None for a single instruction, whose addressing registers may be set at will.
    pub pointers: Option<Pointers>,
}

/// A 64-bit register by number.
pub fn gpr64(number: usize) -> Register {
    Register::RAX + number as u32
}

/// The number of the 64-bit register that contains `register`, if it is a general-purpose one.
pub fn gpr_number(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register().number())
}

/// An address for an operand of `size` bytes, usually one that works.
pub fn target(rng: &mut Rng, size: u64, faults_wanted: bool) -> u64 {
    let size = size.max(1);
    let span = DATA.pages * PAGE - size.max(64);
    if !faults_wanted || !rng.one_in(8) {
        let offset = rng.below(span);
        return DATA.start
            + match rng.below(8) {
                0..=3 => offset & !31,
                4 => offset & !63,
                5 => {
                    // Straddles two pages of DATA.
                    let page = 1 + rng.below(DATA.pages - 1);
                    page * PAGE - rng.below(size.max(2))
                }
                _ => offset,
            };
    }
    match rng.below(9) {
        // At an end of what is canonical, or of everything.
        8 => rng.pick(&[1 << 47, u64::MAX << 47, 0]).wrapping_sub(1 + rng.below(size)),
        0 | 1 => READ_ONLY.start + rng.below(PAGE),
        2 => READ_ONLY.start - rng.below(size.max(2)),
        3 => TAIL.start + PAGE - rng.below(size.max(2)),
        4 => TAIL.start + PAGE + rng.below(0x10000),
        5 => rng.next() >> 17,
        6 => rng.next() | 0xFFFF_8000_0000_0000,
        _ => rng.next() ^ 0x0123_0000_0000_0000,
    }
}

impl Setup<'_> {
    fn gpr_count(&self) -> u64 {
        if self.bits == 64 { 16 } else { 8 }
    }

    fn number(&mut self, from: usize) -> usize {
        loop {
            let n = from + self.rng.below(self.gpr_count() - from as u64) as usize;
            if let Some(pointers) = &self.pointers
                && (pointers.protects(n) || n == 4)
                && !self.rng.one_in(8)
            {
                continue;
            }
            return n;
        }
    }

    fn gpr8(&mut self) -> Register {
        // AL, CL, DL, BL, AH, CH, DH, BH, SPL, BPL, SIL, DIL, R8L..R15L
        loop {
            let register = Register::AL + self.rng.below(if self.bits == 64 { 20 } else { 8 }) as u32;
            let n = register.full_register().number();
            if let Some(pointers) = &self.pointers
                && (pointers.protects(n) || n == 4)
            {
                continue;
            }
            return register;
        }
    }

    fn vector(&mut self, first: Register) -> Register {
        // Few registers, so that operands coincide and sequences depend on each other.
        let n = if self.rng.one_in(3) { self.rng.below(self.gpr_count()) } else { self.rng.below(4) };
        first + n as u32
    }

    /// Gives `register` (if it may be chosen) a value.
    pub fn set(&mut self, number: usize, value: u64) {
        self.registers.gpr[number] = if self.bits == 64 { value } else { value & 0xFFFF_FFFF };
    }

    /// Attaches a memory operand of `size` bytes to `instruction` and returns its linear address.
    fn memory(&mut self, instruction: &mut Instruction, operand: u32, size: u64, vsib: Option<Register>) -> u64 {
        let (gprs, wide) = (self.gpr_count(), self.bits == 64);
        let rng = &mut *self.rng;
        let mut segment_base = 0;
        let mut segment = Register::None;
        match rng.below(24) {
            0 | 1 if wide => {
                segment = Register::FS;
                segment_base = self.registers.fs_gs_base[0];
            }
            2 | 3 if wide => {
                segment = Register::GS;
                segment_base = self.registers.fs_gs_base[1];
            }
            4 => segment = rng.pick(&[Register::ES, Register::CS, Register::SS, Register::DS]),
            _ => {}
        }
        let faults_wanted = self.pointers.is_none() || rng.one_in(6);
        let mut linear = target(rng, size, faults_wanted);
        if let Some(pointers) = &self.pointers
            && size <= 32
            && !rng.one_in(3)
        {
            linear = (pointers.focus + rng.below(0x100)) & if rng.one_in(2) { !0 } else { !31 };
        }

        // Processors may refuse an offset that is not canonical even if the sum with the base is.
        if !is_canonical(linear.wrapping_sub(segment_base)) {
            segment_base = 0;
            segment = Register::None;
        }
        let mut offset = linear.wrapping_sub(segment_base);
        let narrow = !wide || rng.one_in(12) && offset >> 32 == 0;
        let scale = 1u32 << rng.below(4);
        let displacement: i64 = match rng.below(5) {
            0 => 0,
            1 | 2 => i64::from(rng.next() as i8),
            3 => rng.below(0x2000) as i64 - 0x1000,
            _ => i64::from(rng.next() as i32),
        };
        let mut operand_ = MemoryOperand {
            base: Register::None,
            index: Register::None,
            scale,
            displacement,
            displ_size: if displacement == 0 { 0 } else { 1 },
            is_broadcast: false,
            segment_prefix: segment,
        };
        let truncate = |value: u64| {
            if narrow { u64::from(value as u32) } else { value }
        };
        let register = |n: usize| {
            if narrow { Register::EAX + n as u32 } else { gpr64(n) }
        };

        if let Some(index) = vsib {
            // Elements are small; the base does the rest.
            operand_.index = index;
            operand_.displacement = i64::from(rng.next() as i8);
            operand_.displ_size = 1;
            operand_.segment_prefix = Register::None;
            let (base, value) = match &self.pointers {
                Some(pointers) => rng.pick(&pointers.bases),
                None => (rng.below(gprs) as usize, DATA.start + 2 * PAGE),
            };
            operand_.base = register(base);
            self.registers.gpr[base] = value;
            attach(instruction, operand, &operand_);
            return value;
        }

        if let Some(pointers) = &self.pointers {
            let favourite = if rng.one_in(3) { rng.pick(&pointers.bases) } else { pointers.bases[0] };
            let (base, value) = favourite;
            operand_.base = register(base);
            let mut rest = offset.wrapping_sub(value) as i64;
            if rng.one_in(3)
                && let Some((index, count)) = pointers.index
            {
                operand_.index = register(index);
                rest = rest.wrapping_sub(count.wrapping_mul(u64::from(scale)) as i64);
            }
            if segment_base != 0 || i32::try_from(rest).is_err() {
                operand_.segment_prefix = Register::None;
                rest = (rng.below(0x400)) as i64;
            }
            if rng.one_in(10) && operand_.segment_prefix == Register::None {
                operand_ = absolute(rng, linear, operand_.segment_prefix);
            } else {
                operand_.displacement = rest;
                operand_.displ_size = if rest == 0 { 0 } else { 1 };
            }
            attach(instruction, operand, &operand_);
            return linear;
        }

        match rng.below(12) {
            0..=4 => {
                let base = rng.below(gprs) as usize;
                operand_.base = register(base);
                let upper = if narrow { rng.next() << 32 } else { 0 };
                let value = truncate(offset.wrapping_sub(displacement as u64)) | upper;
                self.set(base, value);
            }
            5..=8 => {
                let base = rng.below(gprs) as usize;
                let index = loop {
                    let n = rng.below(gprs) as usize;
                    if n != 4 {
                        break n;
                    }
                };
                operand_.base = register(base);
                operand_.index = register(index);
                if base == index {
                    let value = offset.wrapping_sub(displacement as u64) / u64::from(scale + 1);
                    self.set(base, value);
                    offset = value.wrapping_mul(u64::from(scale) + 1).wrapping_add(displacement as u64);
                } else {
                    let count = if rng.one_in(4) { rng.next() } else { rng.below(0x1000).wrapping_sub(0x800) };
                    let upper = if narrow { rng.next() << 32 } else { 0 };
                    let scaled = truncate(count).wrapping_mul(u64::from(scale));
                    self.set(index, count);
                    self.set(base, truncate(offset.wrapping_sub(displacement as u64).wrapping_sub(scaled)) | upper);
                }
            }
            9 => {
                let index = 5 + rng.below(gprs - 5) as usize;
                operand_.index = register(index);
                operand_.displ_size = if narrow { 4 } else { 8 };
                let value = truncate(offset.wrapping_sub(displacement as u64)) / u64::from(scale);
                self.set(index, value);
                offset = value.wrapping_mul(u64::from(scale)).wrapping_add(displacement as u64);
            }
            _ if !wide => {
                operand_ = MemoryOperand::with_displ(offset & 0xFFFF_FFFF, 4);
                operand_.segment_prefix = segment;
            }
            _ => operand_ = absolute(rng, offset, segment),
        }
        attach(instruction, operand, &operand_);
        segment_base.wrapping_add(truncate(offset))
    }

    fn near_target(&mut self) -> u64 {
        let after = self.registers.rip + 20 + self.rng.below(90);
        if self.rng.one_in(3) { self.registers.rip.wrapping_sub(16 + self.rng.below(80)) } else { after }
    }

    /// An indirect branch's target: code (INT3 wherever nothing else was put), seldom elsewhere.
    pub fn code_address(&mut self) -> u64 {
        match self.rng.below(16) {
            0 => DATA.start + self.rng.below(PAGE),
            1 => self.rng.next() >> 17,
            _ => {
                let at = CODE.start + self.rng.below(CODE.pages * PAGE);
                if at.wrapping_sub(self.registers.rip) < 20 { self.registers.rip + 20 } else { at }
            }
        }
    }

    /// An instance of `code`. Registers and memory of the setup are adapted to it. None if this draw has no encoding.
    pub fn build(&mut self, code: Code) -> Option<Instruction> {
        use OpCodeOperandKind as K;
        let op = code.op_code();
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        let mut linear = None;
        let mut immediates = 0;
        let narrow_strings = self.bits == 32 || self.rng.one_in(10);
        for i in 0..op.op_count() {
            let kind = op.op_kind(i);
            let size = memory_size(code);
            let memory_wins = match kind {
                K::mem
                | K::mem_offs
                | K::mem_vsib32x
                | K::mem_vsib64x
                | K::mem_vsib32y
                | K::mem_vsib64y
                | K::sibmem => true,
                K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::mm_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem => self.rng.below(5) < 3,
                _ => false,
            };
            if memory_wins {
                let vsib = match kind {
                    K::mem_vsib32x | K::mem_vsib64x => Some(self.vector(Register::XMM0)),
                    K::mem_vsib32y | K::mem_vsib64y => Some(self.vector(Register::YMM0)),
                    _ => None,
                };
                if kind == K::mem_offs {
                    let linear_ = target(self.rng, size, true);
                    linear = Some(linear_);
                    let size = if self.bits == 32 || self.rng.one_in(4) { 4 } else { 8 };
                    let operand = MemoryOperand::with_displ(linear_, size);
                    attach(&mut instruction, i, &operand);
                    continue;
                }
                linear = Some(self.memory(&mut instruction, i, size, vsib));
                continue;
            }
            let register = match kind {
                K::r8_or_mem | K::r8_reg | K::r8_opcode => self.gpr8(),
                K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                    Register::AX + self.number(0) as u32
                }
                K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_reg_mem | K::r32_vvvv => {
                    Register::EAX + self.number(0) as u32
                }
                K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_reg_mem | K::r64_vvvv => {
                    gpr64(self.number(0))
                }
                K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + self.rng.below(8) as u32,
                K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                    self.vector(Register::XMM0)
                }
                K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                    self.vector(Register::YMM0)
                }
                K::seg_reg => Register::ES + self.rng.below(6) as u32,
                K::cr_reg => {
                    self.rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4, Register::CR8])
                }
                K::dr_reg => Register::DR0 + self.rng.below(8) as u32,
                K::es => Register::ES,
                K::cs => Register::CS,
                K::ss => Register::SS,
                K::ds => Register::DS,
                K::fs => Register::FS,
                K::gs => Register::GS,
                K::al => Register::AL,
                K::cl => Register::CL,
                K::ax => Register::AX,
                K::dx => Register::DX,
                K::eax => Register::EAX,
                K::rax => Register::RAX,
                K::st0 => Register::ST0,
                K::sti_opcode => Register::ST0 + self.rng.below(8) as u32,
                _ => Register::None,
            };
            if register != Register::None {
                instruction.set_op_kind(i, OpKind::Register);
                instruction.set_op_register(i, register);
                continue;
            }
            let value = interesting_integer(self.rng);
            match kind {
                K::imm8 | K::imm4_m2z => {
                    let kind = if immediates == 0 { OpKind::Immediate8 } else { OpKind::Immediate8_2nd };
                    instruction.set_op_kind(i, kind);
                    if immediates == 0 {
                        instruction.set_immediate8(value as u8);
                    } else {
                        instruction.set_immediate8_2nd(value as u8);
                    }
                    immediates += 1;
                }
                K::imm8_const_1 => {
                    instruction.set_op_kind(i, OpKind::Immediate8);
                    instruction.set_immediate8(1);
                }
                K::imm8sex16 => {
                    instruction.set_op_kind(i, OpKind::Immediate8to16);
                    instruction.set_immediate8to16(i16::from(value as i8));
                }
                K::imm8sex32 => {
                    instruction.set_op_kind(i, OpKind::Immediate8to32);
                    instruction.set_immediate8to32(i32::from(value as i8));
                }
                K::imm8sex64 => {
                    instruction.set_op_kind(i, OpKind::Immediate8to64);
                    instruction.set_immediate8to64(i64::from(value as i8));
                }
                K::imm16 => {
                    instruction.set_op_kind(i, OpKind::Immediate16);
                    instruction.set_immediate16(value as u16);
                    immediates += 1;
                }
                K::imm32 => {
                    instruction.set_op_kind(i, OpKind::Immediate32);
                    instruction.set_immediate32(value as u32);
                }
                K::imm32sex64 => {
                    instruction.set_op_kind(i, OpKind::Immediate32to64);
                    instruction.set_immediate32to64(i64::from(value as i32));
                }
                K::imm64 => {
                    instruction.set_op_kind(i, OpKind::Immediate64);
                    instruction.set_immediate64(value);
                }
                K::seg_rSI => {
                    instruction
                        .set_op_kind(i, if narrow_strings { OpKind::MemorySegESI } else { OpKind::MemorySegRSI });
                }
                K::es_rDI => {
                    instruction.set_op_kind(i, if narrow_strings { OpKind::MemoryESEDI } else { OpKind::MemoryESRDI });
                }
                K::seg_rDI => {
                    instruction
                        .set_op_kind(i, if narrow_strings { OpKind::MemorySegEDI } else { OpKind::MemorySegRDI });
                }
                K::seg_rBX_al => {
                    let base = if narrow_strings { Register::EBX } else { Register::RBX };
                    attach(&mut instruction, i, &MemoryOperand::with_base_index(base, Register::AL));
                }
                K::br32_1 | K::br32_4 => {
                    instruction.set_op_kind(i, OpKind::NearBranch32);
                    let target = self.near_target();
                    instruction.set_near_branch32(target as u32);
                }
                K::br64_1 | K::br64_4 => {
                    instruction.set_op_kind(i, OpKind::NearBranch64);
                    let target = self.near_target();
                    instruction.set_near_branch64(target);
                }
                _ => return None,
            }
        }
        // AMD reads 32 bits, Intel 16: that shows in what must be aligned, and where it faults.
        if code == Code::Movsxd_r16_rm16 && linear.is_some() {
            return None;
        }
        // These want the components in EDX:EAX, so no address can be there.
        let wants_components = matches!(
            instruction.mnemonic(),
            Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xrstor | Mnemonic::Xrstor64
        );
        let addresses = [instruction.memory_base(), instruction.memory_index()];
        if wants_components && addresses.iter().any(|r| matches!(gpr_number(*r), Some(0 | 2))) {
            return None;
        }
        if op.can_use_lock_prefix()
            && linear.is_some()
            && instruction.op0_kind() == OpKind::Memory
            && self.rng.one_in(3)
        {
            instruction.set_has_lock_prefix(true);
        }
        let mut repeats = false;
        if instruction.is_string_instruction() {
            match self.rng.below(4) {
                0 => {}
                1 if op.can_use_repne_prefix() => {
                    instruction.set_has_repne_prefix(true);
                    repeats = true;
                }
                _ if op.can_use_rep_prefix() => {
                    instruction.set_has_rep_prefix(true);
                    repeats = true;
                }
                _ => {}
            }
        }
        if self.pointers.is_none() {
            self.adapt(&mut instruction, linear, repeats, narrow_strings);
        }
        Some(instruction)
    }
}

/// Writes YMM`number`.
pub fn set_vector(registers: &mut Registers, number: usize, bytes: &[u8; 32]) {
    registers.fpu.0[160 + number * 16..][..16].copy_from_slice(&bytes[..16]);
    registers.fpu.0[576 + number * 16..][..16].copy_from_slice(&bytes[16..]);
}

/// Bytes of the memory operand.
pub fn memory_size(code: Code) -> u64 {
    let size = code.op_code().memory_size();
    if matches!(size, MemorySize::Xsave | MemorySize::Xsave64) { XSAVE_SIZE as u64 } else { size.size() as u64 }
}

/// Bits 63 to 47 are all the same.
pub fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// A memory operand without registers, or relative to RIP.
fn absolute(rng: &mut Rng, offset: u64, segment: Register) -> MemoryOperand {
    let base = if rng.one_in(3) { Register::None } else { Register::RIP };
    MemoryOperand {
        base,
        index: Register::None,
        scale: 1,
        displacement: offset as i64,
        displ_size: 8,
        is_broadcast: false,
        segment_prefix: segment,
    }
}

fn attach(instruction: &mut Instruction, operand: u32, memory: &MemoryOperand) {
    instruction.set_op_kind(operand, OpKind::Memory);
    instruction.set_memory_base(memory.base);
    instruction.set_memory_index(memory.index);
    instruction.set_memory_index_scale(memory.scale);
    instruction.set_memory_displacement64(memory.displacement as u64);
    instruction.set_memory_displ_size(memory.displ_size);
    instruction.set_segment_prefix(memory.segment_prefix);
}
