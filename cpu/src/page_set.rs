//! Sets of pages, for noting which were written.

/// Words of one piece of the bits.
const WORDS: usize = 64;
/// Pages of one piece.
const PAGES: u64 = WORDS as u64 * 64;

/// A set of page numbers (guest-physical address / 4096) that costs what is in it: adding is constant, taking is
/// proportional to what was added, and an empty set of any range has next to no memory.
#[derive(Debug, Default)]
pub struct PageSet {
    /// One bit per page, in pieces that are there once something was added, up to the last of these.
    bits: Vec<Option<Box<[u64; WORDS]>>>,
    pages: Vec<u64>,
    end: u64,
}

impl PageSet {
    /// An empty set of pages below `end`.
    pub fn new(end: u64) -> PageSet {
        PageSet { bits: Vec::new(), pages: Vec::new(), end }
    }

    /// Adds a page; true if it was not there. Pages at the end and beyond are ignored.
    #[inline]
    pub fn insert(&mut self, page: u64) -> bool {
        if page >= self.end {
            return false;
        }
        let at = (page / PAGES) as usize;
        if at >= self.bits.len() {
            self.bits.resize(at + 1, None);
        }
        let piece = self.bits[at].get_or_insert_with(|| Box::new([0; WORDS]));
        let word = &mut piece[(page % PAGES / 64) as usize];
        let bit = 1 << (page % 64);
        let fresh = *word & bit == 0;
        if fresh {
            *word |= bit;
            self.pages.push(page);
        }
        fresh
    }

    /// True if the page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        let piece = self.bits.get((page / PAGES) as usize).and_then(Option::as_ref);
        piece.is_some_and(|piece| piece[(page % PAGES / 64) as usize] & 1 << (page % 64) != 0)
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
            if let Some(piece) = &mut self.bits[(page / PAGES) as usize] {
                piece[(page % PAGES / 64) as usize] = 0;
            }
        }
        pages.sort_unstable();
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_there_once_and_ascending() {
        let mut set = PageSet::new(10_256);
        for page in [199, 3, 64, 3, 63, 10_255, 10_256, u64::MAX] {
            set.insert(page);
        }
        assert_eq!(set.pages(), [199, 3, 64, 63, 10_255]);
        assert!(set.contains(64) && set.contains(10_255) && !set.contains(65) && !set.contains(u64::MAX));
        assert_eq!(set.len(), 5);
        assert_eq!(set.take(), [3, 63, 64, 199, 10_255]);
        assert!(set.is_empty() && !set.contains(64) && !set.contains(10_255));
        set.insert(64);
        assert_eq!(set.take(), [64]);
    }
}
