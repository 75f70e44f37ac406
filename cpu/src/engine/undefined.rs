//! Flags and results that the manual leaves undefined. The CPU model says what they are, and the emulation computes
//! them. Processors differ, from vendor to vendor and from one generation to the next, so the engine keeps to what was
//! measured: kinds of instructions that the host executes as the model says are left to it, the others are not,
//! unless nobody can see the difference.

use super::classify::{self, Treatment};
use super::flags::{STATUS, overwritten};
use super::measure;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Kinds of instructions that leave flags undefined about which processors differ. Bit tests are not among them:
/// vendors agree that they change CF alone.
const KINDS: [Mnemonic; 23] = {
    use Mnemonic::*;
    [
        Bsf, Bsr, Rol, Ror, Rcl, Rcr, Shl, Shr, Sar, Shld, Shrd, Mul, Imul, Div, Idiv, Lzcnt, Tzcnt, Andn, Blsi, Blsr,
        Blsmsk, Bextr, Bzhi,
    ]
};
/// BSF and BSR: the translator puts the model's flags together around the host's instruction.
const SCANS: u32 = 0b11;
/// One more kind: what BSF and BSR leave in the destination if the source is zero.
const ZERO_SCAN: u32 = 1 << KINDS.len();

/// A set of kinds of instructions that leave flags or results undefined.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Undefined(u32);

impl Undefined {
    /// No kind.
    pub const NONE: Undefined = Undefined(0);
    /// Every kind.
    pub const ALL: Undefined = Undefined(ZERO_SCAN * 2 - 1);

    /// The kinds that this host executes otherwise than the model says, as measured at first use. It decides who
    /// computes flags and results, never what they are.
    pub fn measured() -> Undefined {
        measure::unlike_the_model()
    }

    /// Each kind of the set by itself, with its name.
    pub fn kinds(self) -> impl Iterator<Item = (String, Undefined)> {
        let scans = KINDS.iter().map(|mnemonic| format!("{mnemonic:?}")).chain(["scan of zero".to_string()]);
        scans.enumerate().map(|(bit, name)| (name, Undefined(1 << bit))).filter(move |(_, kind)| self.meets(*kind))
    }

    /// The kinds that an instruction is of.
    pub fn of(ins: &Instruction) -> Undefined {
        let mnemonic = if ins.mnemonic() == Mnemonic::Sal { Mnemonic::Shl } else { ins.mnemonic() };
        let Some(kind) = KINDS.iter().position(|kind| *kind == mnemonic) else { return Undefined::NONE };
        let by_constant = ins.op_count() > 1 && ins.op_kind(ins.op_count() - 1) == OpKind::Immediate8;
        let count = if by_constant { ins.immediate8() & 0x3F } else { 2 };
        use Mnemonic::*;
        match mnemonic {
            Rol | Ror | Rcl | Rcr if count <= 1 => Undefined::NONE,
            Shl | Shr | Sar | Shld | Shrd if count == 0 => Undefined::NONE,
            Bsf | Bsr => Undefined(1 << kind | ZERO_SCAN),
            _ => Undefined(1 << kind),
        }
    }

    /// The sets have a kind in common.
    pub fn meets(self, other: Undefined) -> bool {
        self.0 & other.0 != 0
    }

    /// Both sets together.
    pub fn and(self, other: Undefined) -> Undefined {
        Undefined(self.0 | other.0)
    }

    /// The kinds of this set that are not in the other.
    pub fn without(self, other: Undefined) -> Undefined {
        Undefined(self.0 & !other.0)
    }

    /// A number for the set.
    pub(super) fn number(self) -> u32 {
        self.0
    }

    /// The instruction goes to the emulation, if the difference can be seen.
    pub(super) fn emulates(self, ins: &Instruction) -> bool {
        self != Undefined::NONE && self.meets(Undefined(Undefined::of(ins).0 & !SCANS))
    }

    /// The instruction is a bit scan whose flags are not the model's but for ZF.
    pub(super) fn mends(self, ins: &Instruction) -> bool {
        self.0 & SCANS != 0 && self.meets(Undefined(Undefined::of(ins).0 & SCANS))
    }
}

impl fmt::Debug for Undefined {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_set().entries(self.kinds().map(|(name, _)| name)).finish()
    }
}

/// All flags are overwritten by this instruction before anything can look at them. It must not leave the block.
pub(super) fn hides(ins: &Instruction, treatment: Treatment) -> bool {
    treatment == Treatment::Plain && overwritten(ins) == STATUS && ins.rflags_read() & STATUS == 0 && stays_inside(ins)
}

/// The instruction cannot leave the block, but by retiring.
fn stays_inside(ins: &Instruction) -> bool {
    !classify::may_fault(ins) && (ins.mnemonic() == Mnemonic::Lea || !ins.op_kinds().any(|kind| kind == OpKind::Memory))
}

/// The result itself is undefined: 16-bit double shifts by more than 16.
pub(super) fn has_undefined_result(ins: &Instruction) -> bool {
    match ins.code() {
        Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8 => ins.immediate8() & 31 > 16,
        Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL => true,
        _ => false,
    }
}
