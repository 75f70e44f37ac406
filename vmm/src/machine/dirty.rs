//! Which pages of RAM were written, for each of those who ask.
//!
//! The engine and the devices forget what they are asked for, so one place asks them and passes the pages on to
//! everyone who keeps a list: the digest and the way back to a branch point. Snapshots compare digests.

use orrery_cpu::PageSet;

/// The lists of one machine.
#[derive(Debug, Default)]
pub(super) struct DirtyPages {
    /// Written since the digest was brought up to date.
    pub digest: PageSet,
    /// Written since the machine left its template, or power-on.
    pub branch: PageSet,
    /// Ever written by this machine.
    pub owned: PageSet,
    /// Written since the last of the moments that are kept in memory, see [`super::checkpoints`].
    pub history: PageSet,
}

impl DirtyPages {
    /// Nothing written yet; RAM has no page at `end` or above.
    pub fn new(end: u64) -> DirtyPages {
        let none = || PageSet::new(end);
        DirtyPages { digest: none(), branch: none(), owned: none(), history: none() }
    }

    /// A page was written.
    pub fn insert(&mut self, page: u64) {
        self.digest.insert(page);
        self.branch.insert(page);
        self.owned.insert(page);
        self.history.insert(page);
    }
}
