//! Which status flags are undefined while the engine catches up with KVM: followed through handlers, the frames that
//! they return by, and what comes behind.

use std::collections::BTreeMap;

use iced_x86::{Instruction, Mnemonic};
use orrery_cpu::state::rflags;

use crate::generate::{rflags_of, undefined_flags};

/// RFLAGS in a frame that an exception has pushed.
struct PushedFlags {
    rflags: u64,
    undefined: u64,
}

/// The flags that may differ, now and in frames.
#[derive(Default)]
pub struct UndefinedFlags {
    now: u64,
    /// By the guest-physical address of RFLAGS.
    frames: BTreeMap<u64, PushedFlags>,
}

/// True if the instruction may leave all flags as they were, by its count.
fn may_do_nothing(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let shifts = matches!(instruction.mnemonic(), Rcl | Rcr | Rol | Ror | Shl | Shr | Sal | Sar | Shld | Shrd);
    shifts || instruction.has_rep_prefix() || instruction.has_repne_prefix()
}

impl UndefinedFlags {
    /// Those of the registers, behind what has been executed since both sides agreed.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Both sides agree, and have the same flags.
    pub fn agree(&mut self) {
        self.now = 0;
    }

    /// No frame has been pushed yet.
    pub fn start(&mut self) {
        *self = UndefinedFlags::default();
    }

    /// `executed` has retired. `emulated_processor`: it is QEMU's on the other side.
    pub fn retire(&mut self, executed: &Instruction, emulated_processor: bool) {
        use Mnemonic::{Fcomi, Fcomip, Fucomi, Fucomip};
        let mut undefined = undefined_flags(executed);
        if emulated_processor && matches!(executed.mnemonic(), Fcomi | Fcomip | Fucomi | Fucomip) {
            // QEMU keeps them, where SDM volume 2, FCOMI, has them cleared.
            undefined |= rflags::OF | rflags::SF | rflags::AF;
        }
        let defined = if may_do_nothing(executed) { 0 } else { rflags_of(executed.rflags_modified()) };
        self.now = self.now & !defined | undefined;
    }

    /// An exception has pushed RFLAGS to this guest-physical address. What faulted has changed no flags.
    pub fn push(&mut self, gpa: u64, rflags: u64) {
        self.frames.insert(gpa, PushedFlags { rflags, undefined: self.now });
    }

    /// A handler has returned by the frame that has RFLAGS at this guest-physical address.
    pub fn pop(&mut self, gpa: u64) {
        self.now = self.frames.get(&gpa).map_or(0, |frame| frame.undefined);
    }

    /// The flags that may differ in this word of memory, if it is still what an exception has pushed there.
    pub fn of_frame(&self, gpa: u64, word: u64) -> Option<u64> {
        self.frames.get(&gpa).filter(|frame| frame.rflags == word).map(|frame| frame.undefined)
    }
}
