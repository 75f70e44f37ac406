//! Alignment checks (Intel SDM volume 3, section 6.15, interrupt 17; AMD APM volume 2, section 8.2.18): with CR0.AM
//! and RFLAGS.AC set, what user mode reads or writes must be aligned.
//!
//! The engine executes such code carefully, one instruction at a time, so nothing else pays for it.

use crate::exception::Exception;
use crate::paging::is_canonical;
use crate::state::{CpuState, control, rflags};

/// Accesses are checked.
#[inline]
pub(crate) fn is_checked(state: &CpuState) -> bool {
    state.rflags & rflags::AC != 0 && state.cpl == 3 && state.cr0 & control::CR0_AM != 0
}

/// #AC if accesses are checked and one of `size` bytes at `linear` is not aligned to what its size asks for. The model
/// is AMD's: 16 bytes are enough for 32, 8 for the 10 of an extended real.
#[inline]
pub(crate) fn check(state: &CpuState, linear: u64, size: usize) -> Result<(), Exception> {
    let alignment = match size {
        2 | 4 | 8 | 16 => size as u64,
        10 => 8,
        32 => 16,
        _ => 1,
    };
    if is_checked(state) && !linear.is_multiple_of(alignment) { Err(Exception::AlignmentCheck) } else { Ok(()) }
}

/// As [`check`], for an operand in several parts: only that the first one has an address comes before.
pub(crate) fn check_first(state: &CpuState, linear: u64, size: usize) -> Result<(), Exception> {
    if state.is_64bit() && !is_canonical(linear) { Ok(()) } else { check(state, linear, size) }
}
