//! Which pages of RAM were written, for each of those who ask.
//!
//! The engine and the devices forget what they are asked for, so one place asks them and passes the pages on to
//! everyone who keeps a list: the digest and the way back to a branch point. Snapshots compare digests.

/// A set of page numbers (guest-physical address / 4096) that costs what is in it: adding is constant, taking is
/// proportional to what was added, and an empty set of any range allocates no memory that is touched.
#[derive(Debug, Default)]
pub struct PageSet {
    /// One bit per page, allocated zeroed so that the host provides only what is used.
    bits: Vec<u64>,
    pages: Vec<u64>,
}

impl PageSet {
    /// An empty set of pages below `end`.
    pub fn new(end: u64) -> PageSet {
        PageSet { bits: vec![0; end.div_ceil(64) as usize], pages: Vec::new() }
    }

    /// Adds a page; pages beyond the end are ignored.
    pub fn insert(&mut self, page: u64) {
        let Some(word) = self.bits.get_mut((page / 64) as usize) else { return };
        let bit = 1 << (page % 64);
        if *word & bit == 0 {
            *word |= bit;
            self.pages.push(page);
        }
    }

    /// True if the page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.bits.get((page / 64) as usize).is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    /// How many pages are in the set.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The pages, in the order in which they came.
    pub fn pages(&self) -> &[u64] {
        &self.pages
    }

    /// Empties the set; the pages come in ascending order.
    pub fn take(&mut self) -> Vec<u64> {
        let mut pages = std::mem::take(&mut self.pages);
        for page in &pages {
            self.bits[(page / 64) as usize] = 0;
        }
        pages.sort_unstable();
        pages
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_there_once_and_ascending() {
        let mut set = PageSet::new(256);
        for page in [199, 3, 64, 3, 63, 256, u64::MAX] {
            set.insert(page);
        }
        assert_eq!(set.pages(), [199, 3, 64, 63]);
        assert!(set.contains(64) && !set.contains(65) && !set.contains(u64::MAX));
        assert_eq!(set.take(), [3, 63, 64, 199]);
        assert!(set.is_empty() && !set.contains(64));
        set.insert(64);
        assert_eq!(set.take(), [64]);
    }
}
