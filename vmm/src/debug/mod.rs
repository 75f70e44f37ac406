//! Going to any moment of a run, forwards and backwards, and asking what happened on the way.
//!
//! A [`Session`] stands at a moment of a run. It goes to another one by running again from the nearest moment that is
//! kept, with the same result as the first time, because State(N) depends on image, machine, seed and inputs alone.
//! Going backwards is running again and stopping earlier; what a breakpoint or watchpoint hit *last* is found by
//! running pieces of the past with observation, the latest piece first.
//!
//! [`subject`] opens runs, [`session`] moves, [`watch`] says what stops a movement, [`search`] answers questions about
//! a whole run, [`stub`] is gdb's view of a session. This room may use machines, runs and `inspect`; it never
//! writes to a run's files, and knows nothing of the command line.

pub mod memory;
pub mod place;
pub mod search;
pub mod session;
pub mod stub;
pub mod subject;
pub mod watch;

pub use session::{Direction, Position, Session, StopReason};
pub use subject::Subject;
pub use watch::{Wanted, WatchKind, Watched};

use crate::machine::{BranchError, ForeignInputs, MachineError};
use crate::moment::MomentError;
use crate::run::{Ended, StoreError};

/// What keeps a session from going where it is asked to.
#[derive(Debug, thiserror::Error)]
pub enum DebugError {
    /// The run cannot be opened.
    #[error(transparent)]
    Moment(#[from] MomentError),
    /// The run's files cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log of inputs is of another run.
    #[error(transparent)]
    Foreign(#[from] ForeignInputs),
    /// No machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A moment cannot be kept.
    #[error(transparent)]
    Branch(#[from] BranchError),
    /// The target lies behind the run's end.
    #[error("icount {target} lies behind the end of the run: {ended} at icount {end}")]
    BeyondEnd {
        /// What was asked for.
        target: u64,
        /// The last moment.
        end: u64,
        /// How it ended.
        ended: Ended,
    },
    /// The target lies before what can be reached on a branch.
    #[error(
        "icount {target} lies before the last change on this branch, at {floor}; `monitor return` leaves the branch"
    )]
    BeforeChange {
        /// What was asked for.
        target: u64,
        /// First moment that can be reached.
        floor: u64,
    },
    /// The run did not go the way it went the first time.
    #[error(
        "the run is not repeated: it {now} at icount {icount}, but {recorded} was recorded; \
         was it made by another version of Orrery, or on a processor of another vendor?"
    )]
    NotRepeated {
        /// How it ended now.
        now: Ended,
        /// Where.
        icount: u64,
        /// What the manifest says.
        recorded: String,
    },
    /// Stopped from outside.
    #[error("interrupted at icount {icount}")]
    Interrupted {
        /// Where.
        icount: u64,
    },
    /// Memory that is not mapped.
    #[error("nothing is mapped at {address:#x} at icount {icount}")]
    NotMapped {
        /// The linear address.
        address: u64,
        /// The moment.
        icount: u64,
    },
    /// A symbol that nobody knows.
    #[error(
        "no symbol {name:?} is known at the moments looked at; give its address, or with --at a moment at which the program runs"
    )]
    NoSymbol {
        /// Its name.
        name: String,
    },
    /// A name or number that makes no sense.
    #[error("{text:?} is neither a number nor a symbol's name")]
    BadPlace {
        /// What was given.
        text: String,
    },
    /// The guest cannot be looked into.
    #[error(transparent)]
    Inspect(#[from] crate::inspect::InspectError),
    /// The network.
    #[error("cannot {action}: {source}")]
    Network {
        /// What was tried.
        action: String,
        /// The system's answer.
        source: std::io::Error,
    },
}
