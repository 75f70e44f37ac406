//! Exceptions one after another: a handler whose first instruction cannot be fetched raises the next one, and if that
//! finds its stack again, this has no end and counts nothing. The host must be able to end it.

use crate::Icount;

/// Exceptions that have been delivered since an instruction retired.
#[derive(Default)]
pub struct Deliveries {
    at: Icount,
    count: u32,
    /// The run was left among them.
    left: bool,
}

impl Deliveries {
    /// One more has been delivered.
    pub fn note(&mut self, now: Icount) {
        self.count = if self.at == now { self.count.saturating_add(1) } else { 1 };
        self.at = now;
    }

    /// True, once, if there were so many that the run is to be left.
    pub fn leave(&mut self, patience: u32) -> bool {
        if self.count < patience.max(2) {
            return false;
        }
        (self.count, self.left) = (0, true);
        true
    }

    /// The run was left, and not gone on with.
    pub fn is_left(&self) -> bool {
        self.left
    }

    /// The run goes on.
    pub fn go_on(&mut self) {
        self.left = false;
    }
}
