//! Instructions that store or load whole images of processor state: their images are made valid (mostly), and what
//! the host stores of its own addresses is left out of the comparison.

use iced_x86::{Instruction, Mnemonic};

use super::implicit::mxcsr;
use super::operands::Setup;
use super::x87_state;
use crate::values::{interesting_f80, interesting_vector};

/// RFLAGS bits that POPF may be given: all but TF, NT, VM and the reserved ones.
const POPPED: u64 = 0x0025_3ED5;

impl Setup<'_> {
    /// Prepares the instruction if it is one of these; `linear` is its memory operand.
    pub fn state_image(&mut self, instruction: &Instruction, linear: Option<u64>) -> bool {
        use Mnemonic::*;
        let Some(linear) = linear else {
            if matches!(instruction.mnemonic(), Popf | Popfd | Popfq) {
                let flags = self.rng.next() & POPPED;
                self.pokes.push((self.registers.gpr[4], flags.to_le_bytes().to_vec()));
                return true;
            }
            return false;
        };
        let narrow = matches!(instruction.memory_size().size(), 14 | 94);
        match instruction.mnemonic() {
            // FIP, FCS and FOP, FDP, FDS.
            Fnstenv | Fnsave if narrow => self.ignored_memory.push((linear.wrapping_add(6), 8)),
            Fnstenv | Fnsave => self.ignored_memory.push((linear.wrapping_add(12), 16)),
            Fldenv | Frstor => self.environment(linear, narrow, instruction.mnemonic() == Frstor),
            Fxsave | Fxsave64 => {
                // Reserved byte, FOP, FIP, FDP; MXCSR_MASK.
                self.ignored_memory.extend([(linear.wrapping_add(5), 19), (linear.wrapping_add(28), 4)]);
            }
            Xsave | Xsave64 => {
                self.ignored_memory.extend([(linear.wrapping_add(5), 19), (linear.wrapping_add(28), 4)]);
                self.components();
            }
            Fxrstor | Fxrstor64 => {
                let image = self.image(false);
                self.pokes.push((linear, image));
            }
            Xrstor | Xrstor64 => {
                let image = self.image(true);
                self.pokes.push((linear, image));
                self.components();
            }
            _ => return false,
        }
        true
    }

    /// EDX:EAX asks for components that both sides have.
    fn components(&mut self) {
        let mask = if self.rng.one_in(2) { 7 } else { self.rng.below(8) };
        let above = self.rng.next() << 32;
        self.set(0, mask | above);
        let garbage = self.rng.next() << 32;
        self.set(2, garbage);
    }

    fn image(&mut self, extended: bool) -> Vec<u8> {
        let mut image = vec![0; if extended { 832 } else { 512 }];
        x87_state(self.rng, &mut image);
        let control = if self.rng.one_in(10) { self.rng.next() as u32 } else { mxcsr(self.rng) };
        image[24..28].copy_from_slice(&control.to_le_bytes());
        for chunk in image[160..416].chunks_exact_mut(32) {
            chunk.copy_from_slice(&interesting_vector(self.rng));
        }
        if extended {
            image[512] = if self.rng.one_in(2) { 7 } else { self.rng.below(8) as u8 };
            if self.rng.one_in(12) {
                // Not an image: reserved bits of the header.
                let at = 513 + self.rng.below(40) as usize;
                image[at] = 0x80;
            }
            for chunk in image[576..832].chunks_exact_mut(32) {
                chunk.copy_from_slice(&interesting_vector(self.rng));
            }
        }
        image
    }

    fn environment(&mut self, linear: u64, narrow: bool, registers: bool) {
        let mut state = vec![0; 160];
        x87_state(self.rng, &mut state);
        let tags = if self.rng.one_in(2) { 0xFFFF } else { self.rng.next() as u16 };
        let step = if narrow { 2 } else { 4 };
        let mut image = vec![0; 7 * step];
        image[0..2].copy_from_slice(&state[0..2]);
        image[step..step + 2].copy_from_slice(&state[2..4]);
        image[2 * step..2 * step + 2].copy_from_slice(&tags.to_le_bytes());
        if registers {
            for _ in 0..8 {
                image.extend(interesting_f80(self.rng));
            }
        }
        self.pokes.push((linear, image));
    }
}
