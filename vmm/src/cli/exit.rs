//! Exit codes of the `orrery` command; `docs/exit-codes.md` explains them to users.

use crate::run::Ended;

/// The command line is wrong.
pub const USAGE: u8 = 220;
/// The image cannot be read, is damaged, or could not be built.
pub const IMAGE: u8 = 221;
/// No machine can be built from the image and the description: memory too small, kernel not bootable.
pub const MACHINE: u8 = 222;
/// The run cannot be written to disk.
pub const STORE: u8 = 223;
/// The log of inputs is unreadable, damaged or of another run.
pub const INPUTS: u8 = 224;
/// The guest ended in a triple fault.
pub const TRIPLE_FAULT: u8 = 225;
/// The engine met an instruction that it cannot execute.
pub const UNSUPPORTED: u8 = 226;
/// The guest asked for a reset.
pub const RESET: u8 = 227;
/// The guest halted with interrupts off.
pub const HALTED: u8 = 228;
/// The guest is idle and nothing is left to wake it.
pub const IDLE: u8 = 229;
/// Standard output was closed while the guest ran.
pub const CONSOLE_CLOSED: u8 = 230;
/// The host lacks what Orrery needs: processor features, memory.
pub const HOST: u8 = 231;
/// `verify` found runs that differ.
pub const DIVERGED: u8 = 232;
/// What was asked for cannot be seen in the guest at that moment.
pub const INSPECT: u8 = 236;
/// There is no such run, or the moment is not in it.
pub const MOMENT: u8 = 233;
/// The store or a run on disk is damaged.
pub const DAMAGED: u8 = 234;
/// The guest has no agent at that moment, or it does not answer.
pub const AGENT: u8 = 237;
/// A defect of Orrery.
pub const INTERNAL: u8 = 239;

/// The exit code that says how a run ended.
pub fn code_of(ended: &Ended) -> u8 {
    match ended {
        Ended::PowerOff { code } => *code,
        Ended::Limit => 0,
        Ended::Reset => RESET,
        Ended::TripleFault { .. } => TRIPLE_FAULT,
        Ended::Unsupported { .. } => UNSUPPORTED,
        Ended::HaltedForever { .. } => HALTED,
        Ended::IdleForever { .. } => IDLE,
        Ended::ConsoleClosed => CONSOLE_CLOSED,
        // As shells do: 128 + the number of the signal.
        Ended::Interrupted { signal, .. } => 128u8.saturating_add(u8::try_from(*signal).unwrap_or(127)),
    }
}

/// An error with the exit code it ends the command with.
#[derive(Debug)]
pub struct Failure {
    /// Exit code.
    pub code: u8,
    /// What, where, and what to do.
    pub message: String,
}

impl Failure {
    /// Wraps an error's own words.
    pub fn new(code: u8, error: impl std::fmt::Display) -> Failure {
        Failure { code, message: error.to_string() }
    }
}
