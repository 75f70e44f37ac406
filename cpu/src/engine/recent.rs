//! What an engine keeps beside its translations so that it seldom writes into them. A branch shares the pages of its
//! translations with others, and the first write to each costs a fault of the host: some microseconds.

use super::translations::hash;

/// Lists of recent blocks with the same hash; a power of two.
const LISTS: usize = 1 << 12;
/// Recent blocks that these lists hold at most.
const BLOCKS_MAX: u32 = 1 << 13;
/// Size of the host's pages.
const PAGE: usize = 4096;
/// How often branches in a shared page of code leave by their exits before they are led to their targets.
const PATIENCE: u8 = 16;
/// Blocks whose crossings are counted at a time; a power of two.
const CROSSINGS: usize = 512;
/// Places for branches to blocks; a power of two.
const BRANCHES: usize = 1 << 9;
/// Branches that are known in each.
const BRANCHES_EACH: usize = 4;

/// The lists of the blocks that a branch has made itself.
#[derive(Clone)]
pub struct Recent {
    /// Index of the first of these blocks; above all if there are none and never will be.
    first: u32,
    /// Empty until there is one.
    lists: Vec<u32>,
}

impl Recent {
    /// For a branch that begins with so many blocks.
    pub fn new(blocks: usize) -> Recent {
        if blocks == 0 { Recent::none() } else { Recent { first: blocks as u32, lists: Vec::new() } }
    }

    /// No blocks are recent.
    pub fn none() -> Recent {
        Recent { first: u32::MAX, lists: Vec::new() }
    }

    /// Index of the first recent block.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// The lists cannot hold the block with this index.
    pub fn is_full(&self, index: u32) -> bool {
        index.checked_sub(self.first).is_some_and(|count| count >= BLOCKS_MAX)
    }

    /// Index + 1 of the first recent block in the list of those that start there; 0 if there is none.
    pub fn head(&self, start: u64) -> u32 {
        if self.lists.is_empty() { 0 } else { self.lists[hash(start, LISTS) as usize] }
    }

    /// The list of recent blocks that start there.
    pub fn list(&mut self, start: u64) -> &mut u32 {
        if self.lists.is_empty() {
            self.lists = vec![0; LISTS];
        }
        &mut self.lists[hash(start, LISTS) as usize]
    }
}

/// How often exits have served instead of branches, for each page of the code that a branch shares.
pub struct Patience {
    pages: usize,
    /// Empty until one has.
    served: Vec<u8>,
}

impl Patience {
    /// For a branch that begins with so many bytes of code.
    pub fn new(code: usize) -> Patience {
        Patience { pages: code.div_ceil(PAGE), served: Vec::new() }
    }

    /// A branch at this offset in the code could be led to its target: true if it is to wait.
    pub fn waits(&mut self, at: u32) -> bool {
        let served = self.page(at).filter(|served| **served < PATIENCE);
        served.map(|served| *served += 1).is_some()
    }

    /// The page with this offset has been written.
    pub fn written(&mut self, at: u32) {
        if let Some(served) = self.page(at) {
            *served = PATIENCE;
        }
    }

    fn page(&mut self, at: u32) -> Option<&mut u8> {
        let page = at as usize / PAGE;
        if page < self.pages && self.served.is_empty() {
            self.served = vec![0; self.pages];
        }
        self.served.get_mut(page)
    }
}

/// How often groups of accesses have crossed a page lately, for some blocks. Empty until one has.
pub struct Crossings(Vec<(u32, u32, u64)>);

impl Crossings {
    /// Nothing counted yet.
    pub fn new() -> Crossings {
        Crossings(Vec::new())
    }

    /// It has happened in the block at this icount: true if that was often.
    pub fn count(&mut self, block: u32, now: u64) -> bool {
        const OFTEN: u32 = 32;
        const INSTRUCTIONS_BETWEEN: u64 = 2_000;
        if self.0.is_empty() {
            self.0 = vec![(0, 0, 0); CROSSINGS];
        }
        let (counted, count, since) = &mut self.0[block as usize % CROSSINGS];
        if *counted != block || *count == 0 {
            (*counted, *count, *since) = (block, 0, now);
        }
        *count += 1;
        if *count < OFTEN {
            return false;
        }
        *count = 0;
        // A machine that goes back to an earlier state has an earlier icount.
        now.wrapping_sub(*since) <= u64::from(OFTEN) * INSTRUCTIONS_BETWEEN
    }
}

/// A direct branch from a block.
#[derive(Clone, Copy)]
pub struct Branch {
    /// Offset of its rel32.
    pub patch: u32,
    pub source: u32,
    /// Where RSP is, from where it was when the source began.
    pub depth: Option<i16>,
}

/// Branches that were led to blocks lately: a few for each block, of so many. Each as the block's index + 1, or 0; the
/// rel32; the source; and the depth, with a bit above it if it is known. Numbers, so that the host need not provide what is
/// not used. Empty until there is one.
pub struct Branches(Vec<[[u32; 4]; BRANCHES_EACH]>);

/// A depth is known.
const KNOWN: u32 = 1 << 16;

impl Branches {
    /// None noted yet.
    pub fn new() -> Branches {
        Branches(Vec::new())
    }

    /// The branch has been led to the block.
    pub fn note(&mut self, block: u32, branch: Branch) {
        if self.0.is_empty() {
            self.0 = vec![[[0; 4]; BRANCHES_EACH]; BRANCHES];
        }
        let places = &mut self.0[block as usize % BRANCHES];
        places.rotate_right(1);
        let depth = branch.depth.map_or(0, |depth| KNOWN | u32::from(depth as u16));
        places[0] = [block + 1, branch.patch, branch.source, depth];
    }

    /// Those that are known to have been led to the block, perhaps elsewhere since.
    pub fn to(&self, block: u32) -> Vec<Branch> {
        let places = self.0.get(block as usize % BRANCHES).into_iter().flatten().filter(|place| place[0] == block + 1);
        let depth = |depth: u32| (depth & KNOWN != 0).then_some(depth as u16 as i16);
        places.map(|[_, patch, source, at]| Branch { patch: *patch, source: *source, depth: depth(*at) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_a_branch_began_with_are_not_recent() {
        let mut recent = Recent::new(7);
        assert_eq!((recent.first(), recent.head(0x1234)), (7, 0));
        *recent.list(0x1234) = 8;
        assert_eq!(recent.head(0x1234), 8);
        assert!(!recent.is_full(7 + BLOCKS_MAX - 1) && recent.is_full(7 + BLOCKS_MAX));
        let none = Recent::none();
        assert!(none.first() == u32::MAX && !none.is_full(u32::MAX - 1));
        assert_eq!(none.head(5), 0);
    }

    #[test]
    fn exits_serve_for_a_while_in_shared_code_alone() {
        let mut patience = Patience::new(PAGE + 1);
        for _ in 0..PATIENCE {
            assert!(patience.waits(PAGE as u32 - 1));
        }
        assert!(!patience.waits(0));
        assert!(patience.waits(PAGE as u32));
        patience.written(2 * PAGE as u32 - 1);
        assert!(!patience.waits(PAGE as u32) && !patience.waits(2 * PAGE as u32));
    }

    #[test]
    fn the_latest_branches_to_a_block_are_known() {
        let mut branches = Branches::new();
        let branch = |patch| Branch { patch, source: 1, depth: None };
        assert!(branches.to(0).is_empty());
        (0..6).for_each(|patch| branches.note(7, branch(patch)));
        assert_eq!(branches.to(7).iter().map(|branch| branch.patch).collect::<Vec<_>>(), [5, 4, 3, 2]);
        branches.note(7 + BRANCHES as u32, branch(9));
        assert_eq!(branches.to(7).len(), 3);
        assert_eq!(branches.to(7 + BRANCHES as u32)[0].patch, 9);
    }

    #[test]
    fn crossings_are_often_when_they_come_close() {
        let mut crossings = Crossings::new();
        assert!((0..31).all(|now| !crossings.count(3, now)));
        assert!(crossings.count(3, 31));
        assert!((0..100).all(|turn| !crossings.count(3, turn * 10_000)));
        // Another block in its place.
        assert!((0..31).all(|now| !crossings.count(3, now)));
        assert!(!crossings.count(3 + CROSSINGS as u32, 40) && !crossings.count(3, 41));
    }
}
