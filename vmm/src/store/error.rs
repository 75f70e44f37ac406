//! What can go wrong with the store.

use std::io;
use std::path::Path;

use orrery_cpu::Icount;

use crate::chain::Hash;
use crate::machine::{MachineError, StateError};

/// A snapshot that could not be written or read. Nothing that was acknowledged before is lost by it.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} is damaged at byte {offset}: {what}; `orrery store check` says what that costs")]
    Damaged {
        /// Which file.
        path: String,
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// A pack ends in the middle of a record. After a crash of its writer this is as it should be: nobody refers to it.
    #[error("{path} ends in the middle of the record at byte {offset}")]
    Cut {
        /// Which pack.
        path: String,
        /// Where the record begins.
        offset: u64,
    },
    /// Another version.
    #[error("{path} has version {found}; this Orrery reads version {expected}")]
    Version {
        /// Which file.
        path: String,
        /// Its version.
        found: u32,
        /// The version that is read.
        expected: u32,
    },
    /// Something that a snapshot refers to is nowhere.
    #[error("the store has lost {what} {hash}; `orrery store check` says what that costs")]
    Missing {
        /// A page, a state, a page table.
        what: &'static str,
        /// Its content's hash.
        hash: Hash,
    },
    /// A snapshot's parts do not fit together.
    #[error("the snapshot at icount {icount} is inconsistent: {what}")]
    Inconsistent {
        /// Which snapshot.
        icount: u64,
        /// What does not fit.
        what: String,
    },
    /// Someone else works with the store.
    #[error("{path} is in use; try again when no run is being recorded")]
    Busy {
        /// The store.
        path: String,
    },
    /// The machine does not stand at a moment.
    #[error("the machine is between two moments at icount {0:?}; a snapshot is taken at the first moment of an icount")]
    NotAMoment(Icount),
    /// The state does not fit a machine.
    #[error(transparent)]
    State(#[from] StateError),
    /// No machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// For `map_err` on a file operation.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.display().to_string();
    move |source| SnapshotError::Io { action, path, source }
}
