//! Implicit operands: values for the registers and memory that an instruction uses without naming them, so that
//! a random draw gets somewhere (string pointers, divisors, branch targets, gathers).

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::operands::{Setup, gpr_number, is_canonical, memory_size, set_vector, target};
use crate::rng::Rng;
use crate::values::{interesting_f80, interesting_vector};

impl Setup<'_> {
    /// Gives the implicit operands of a single instruction values that let it get somewhere.
    pub fn adapt(&mut self, instruction: &mut Instruction, linear: Option<u64>, repeats: bool, narrow: bool) {
        let code = instruction.code();
        let mnemonic = instruction.mnemonic();
        let size = memory_size(code);
        if self.state_image(instruction, linear) {
            return;
        }
        if let Some(linear) = linear
            && self.rng.one_in(2)
        {
            let bytes = match mnemonic {
                Mnemonic::Fld | Mnemonic::Fbld if size == 10 => interesting_f80(self.rng).to_vec(),
                Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => {
                    let value = if self.rng.one_in(8) { self.rng.next() as u32 } else { mxcsr(self.rng) };
                    value.to_le_bytes().to_vec()
                }
                _ => interesting_vector(self.rng).to_vec(),
            };
            self.pokes.push((linear, bytes));
        }
        let uses_rsi = (0..instruction.op_count())
            .any(|i| matches!(instruction.op_kind(i), OpKind::MemorySegRSI | OpKind::MemorySegESI));
        let uses_rdi = (0..instruction.op_count()).any(|i| {
            matches!(
                instruction.op_kind(i),
                OpKind::MemoryESRDI | OpKind::MemoryESEDI | OpKind::MemorySegRDI | OpKind::MemorySegEDI
            )
        });
        let upper = if narrow { self.rng.next() << 32 } else { 0 };
        if uses_rsi {
            let at = target(self.rng, size, true) | upper;
            self.set(6, at);
            let segment = self.rng.pick(&[Register::FS, Register::GS]);
            let base = self.registers.fs_gs_base[(segment == Register::GS) as usize];
            let offset = (at & !upper).wrapping_sub(base);
            if self.rng.one_in(4) && is_canonical(offset) {
                instruction.set_segment_prefix(segment);
                self.set(6, offset);
            }
        }
        if uses_rdi {
            let at = if uses_rsi && self.rng.one_in(3) {
                // Overlapping source and destination.
                self.registers.gpr[6].wrapping_add(self.rng.below(40).wrapping_sub(20))
            } else {
                target(self.rng, size, true)
            };
            self.set(7, at | upper);
        }
        let compares = matches!(mnemonic, Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq);
        if compares && uses_rsi {
            // Processors differ about which of two faults comes first: one operand is there.
            let at = target(self.rng, 0x1000, false);
            let register = if instruction.segment_prefix() == Register::None && self.rng.one_in(2) { 6 } else { 7 };
            self.set(register, at | upper);
        }
        if uses_rsi && uses_rdi && self.rng.one_in(2) {
            // Equal beginnings for CMPS.
            let bytes = vec![self.rng.next() as u8; 48];
            self.pokes.push((self.registers.gpr[6] & !31, bytes.clone()));
            self.pokes.push((self.registers.gpr[7] & !31, bytes));
        }
        if repeats {
            let count = match self.rng.below(6) {
                0 => 0,
                1 => 1,
                2 => 500 + self.rng.below(1000),
                _ => self.rng.below(70),
            };
            self.set(1, count | upper);
            if self.rng.one_in(3) {
                self.registers.rflags ^= 1 << 10;
            }
        }
        match mnemonic {
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
                if linear.is_some() && instruction.op1_kind() == OpKind::Register =>
            {
                let register = instruction.op1_register();
                let n = register.full_register().number();
                let is_base =
                    [instruction.memory_base(), instruction.memory_index()].iter().any(|r| gpr_number(*r) == Some(n));
                if !is_base && !self.rng.one_in(8) {
                    let bit = self.rng.below(4000) as i64 - 2000;
                    self.set(n, bit as u64);
                }
            }
            Mnemonic::Div | Mnemonic::Idiv if !self.rng.one_in(4) => {
                let rax = self.registers.gpr[0];
                let small = self.rng.below(3);
                self.set(2, if mnemonic == Mnemonic::Idiv && rax >> 63 != 0 { u64::MAX } else { small });
                if self.rng.one_in(2) {
                    self.set(0, rax & 0x7F);
                }
            }
            Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b | Mnemonic::Cmpxchg => {
                if let Some(linear) = linear
                    && self.rng.one_in(2)
                {
                    let mut bytes = self.registers.gpr[0].to_le_bytes().to_vec();
                    if mnemonic == Mnemonic::Cmpxchg8b {
                        bytes.truncate(4);
                        bytes.extend_from_slice(&(self.registers.gpr[2] as u32).to_le_bytes());
                    } else {
                        bytes.extend_from_slice(&self.registers.gpr[2].to_le_bytes());
                    }
                    self.pokes.push((linear, bytes));
                }
            }
            Mnemonic::Bound => {
                // From the least to the greatest number.
                let bounds: &[u8] =
                    if size == 4 { &[0, 0x80, 0xFF, 0x7F] } else { &[0, 0, 0, 0x80, 0xFF, 0xFF, 0xFF, 0x7F] };
                if let Some(linear) = linear.filter(|_| !self.rng.one_in(4)) {
                    self.pokes.push((linear, bounds.to_vec()));
                }
            }
            Mnemonic::Xlatb => {
                let at = target(self.rng, 256, true);
                self.set(3, at | upper);
            }
            Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => {
                // Whether bytes that are not selected can fault depends on the processor.
                let at = target(self.rng, 16, false);
                self.set(7, at | if narrow { upper } else { 0 });
            }
            Mnemonic::Enter => {
                instruction.set_immediate16(self.rng.below(0x200) as u16);
                let levels = self.rng.below(40) as u8;
                instruction.set_immediate8_2nd(if self.rng.one_in(2) { levels } else { 0 });
                let frame = self.registers.gpr[4] + self.rng.below(64);
                self.set(5, frame);
            }
            Mnemonic::Leave => {
                let frame = self.registers.gpr[4] + self.rng.below(64);
                self.set(5, frame);
            }
            Mnemonic::Ret => {
                let back = self.code_address();
                self.pokes.push((self.registers.gpr[4], back.to_le_bytes()[..self.bits as usize / 8].to_vec()));
            }
            Mnemonic::Jmp | Mnemonic::Call if instruction.op0_kind() != OpKind::NearBranch64 => {
                let destination = self.code_address();
                match linear {
                    Some(linear) => self.pokes.push((linear, destination.to_le_bytes().to_vec())),
                    None => self.set(instruction.op0_register().number(), destination),
                }
            }
            Mnemonic::Loop
            | Mnemonic::Loope
            | Mnemonic::Loopne
            | Mnemonic::Jcxz
            | Mnemonic::Jecxz
            | Mnemonic::Jrcxz => {
                let count = self.rng.below(3) | if self.rng.one_in(3) { self.rng.next() << 32 } else { 0 };
                self.set(1, count);
            }
            Mnemonic::Wrfsbase | Mnemonic::Wrgsbase if !self.rng.one_in(4) => {
                let value = ((self.rng.next() << 16) as i64 >> 16) as u64;
                self.set(instruction.op0_register().number(), value);
            }
            _ => {}
        }
        if is_vsib(code) {
            self.small_vsib_elements(instruction);
        }
    }

    /// Makes the elements of a gather's index register small.
    fn small_vsib_elements(&mut self, instruction: &Instruction) {
        let register = instruction.memory_index().number();
        let wide_elements = instruction
            .code()
            .op_code()
            .op_kinds()
            .iter()
            .any(|k| matches!(k, OpCodeOperandKind::mem_vsib64x | OpCodeOperandKind::mem_vsib64y));
        let mut bytes = [0; 32];
        let step = if wide_elements { 8 } else { 4 };
        for chunk in bytes.chunks_exact_mut(step) {
            let mut value = self.rng.below(0x400) as i64 - 0x200;
            if self.rng.one_in(24) {
                value = i64::from(self.rng.next() as i32);
            }
            chunk.copy_from_slice(&value.to_le_bytes()[..step]);
        }
        set_vector(&mut self.registers, register, &bytes);
    }
}

/// A value for MXCSR without reserved bits.
pub fn mxcsr(rng: &mut Rng) -> u32 {
    if rng.one_in(2) {
        return 0x1F80;
    }
    let random = rng.next() as u32;
    let mut value = (random & 0x6000) | 0x1F80;
    if rng.one_in(4) {
        value |= 0x8000;
    }
    if rng.one_in(4) {
        value |= 0x40;
    }
    if rng.one_in(4) {
        value &= !(random >> 16 & 0x1F80);
    }
    if rng.one_in(2) {
        value |= random & 0x3F;
    }
    value
}

fn is_vsib(code: Code) -> bool {
    code.op_code().op_kinds().iter().any(|k| {
        use OpCodeOperandKind::*;
        matches!(k, mem_vsib32x | mem_vsib64x | mem_vsib32y | mem_vsib64y)
    })
}
