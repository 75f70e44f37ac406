//! The blocks: found by where they begin, killed, led past, counted.

use super::*;
use crate::engine::translate::Placed;

impl Translations {
    /// The block with this start and purpose.
    pub fn find(&self, start: u64, purpose: Purpose) -> Option<u32> {
        for list in [self.recent.head(start), self.block_lists[hash(start, BLOCK_LISTS)]] {
            let mut next = list;
            while next != 0 {
                let block = &self.blocks[next - 1];
                if block.start() == start && block.purpose == purpose {
                    return Some(next - 1);
                }
                next = block.next;
            }
        }
        None
    }

    /// The block is valid, with this start and purpose.
    pub fn is_valid(&self, index: u32, start: u64, purpose: Purpose) -> bool {
        let block = self.blocks.get(index as usize);
        block.is_some_and(|block| block.valid && block.start() == start && block.purpose == purpose)
    }

    /// Adds a block, to be found from now on. Its `next` is set here.
    pub fn add_block(
        &mut self,
        rip: u64,
        identity: u32,
        second: Option<(u64, u32)>,
        purpose: Purpose,
        placed: &Placed,
    ) {
        let index = self.blocks.len() as u32;
        if self.recent.is_full(index) {
            self.settle_recent();
        }
        let list = self.list_of(index, start(identity, rip));
        let next = std::mem::replace(list, index + 1);
        self.blocks.push(Block {
            rip,
            identity,
            second,
            checked: placed.checked,
            entry: placed.entry,
            inner: placed.inner,
            window: placed.window,
            lookup_stub: placed.lookup_stub,
            spreads: placed.spreads,
            next,
            valid: true,
            superseded: false,
            purpose,
        });
    }

    /// The list to which the block belongs that has this index and start.
    fn list_of(&mut self, index: u32, start: u64) -> &mut u32 {
        if index < self.recent.first() {
            return &mut self.block_lists[hash(start, BLOCK_LISTS)];
        }
        self.recent.list(start)
    }

    /// Moves recent blocks to the lists that all have.
    pub(super) fn settle_recent(&mut self) {
        let first = std::mem::replace(&mut self.recent, Recent::none()).first();
        for index in first..self.blocks.len() as u32 {
            let block = &mut self.blocks[index];
            if block.valid {
                let list = &mut self.block_lists[hash(block.start(), BLOCK_LISTS)];
                block.next = std::mem::replace(list, index + 1);
            }
        }
    }

    /// Makes a block unreachable: whoever enters it looks it up again. False if it was so already.
    pub fn kill(&mut self, index: u32) -> bool {
        let superseded = std::mem::take(&mut self.blocks[index].superseded);
        let valid = self.unlink(index);
        if valid || superseded {
            self.note_killed(index);
        }
        valid
    }

    /// The block at this start is to be translated again, hot. What branches have of it stays right.
    pub fn supersede(&mut self, index: u32) {
        let start = self.blocks[index].start();
        self.hot.remember(start);
        if self.unlink(index) {
            self.blocks[index].superseded = true;
        }
    }

    /// The block at `start` has run often, as far as is remembered.
    pub fn is_hot(&self, start: u64) -> bool {
        self.hot.knows(start)
    }

    /// Where a branch from one block to another enters it. `depth`: where RSP is then, from where it was when `from` began.
    fn way(&self, from: u32, depth: Option<i16>, to: u32) -> u32 {
        let (from, to) = (&self.blocks[from], &self.blocks[to]);
        let near = from.identity == to.identity && from.second.is_none() && to.second.is_none();
        let covered = covers(from.window, depth, to.window);
        match (near, covered) {
            (false, _) => to.checked,
            (true, false) => to.entry,
            (true, true) => to.inner,
        }
    }

    /// Leads a branch to a block, as [`Translations::link`] does.
    pub fn link_to(&mut self, branch: Branch, block: u32) {
        let way = self.way(branch.source, branch.depth, block);
        self.link(branch.patch, way);
        self.branches.note(block, branch);
    }

    /// Leads branches to a superseded block, whose entries go on to `better`, there at once, as far as they are known.
    pub fn lead_past(&mut self, old: u32, better: u32) {
        let superseded = self.blocks[old];
        if !superseded.superseded {
            return;
        }
        let entries = [superseded.checked, superseded.entry, superseded.inner];
        for branch in self.branches.to(old) {
            if entries.contains(&self.target_of(branch.patch)) {
                self.link_to(branch, better);
            }
        }
    }

    /// Offset to which the rel32 at offset `at` leads.
    fn target_of(&self, at: u32) -> u32 {
        let bytes = self.region.bytes(self.offsets.code + at as usize, 4);
        let displacement = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        displacement.wrapping_add(at + 4)
    }

    /// Leads the block's entries to where it is looked up, and takes it out of its list. False if it was so already.
    fn unlink(&mut self, index: u32) -> bool {
        let block = self.blocks[index];
        if !block.valid {
            return false;
        }
        self.blocks[index].valid = false;
        self.patch_jmp(block.checked, block.lookup_stub);
        self.patch_jmp(block.entry, block.lookup_stub);
        if block.inner != block.entry {
            self.patch_jmp(block.inner, block.lookup_stub);
        }
        let list = self.list_of(index, block.start());
        let mut at = *list;
        if at == index + 1 {
            *list = block.next;
            return true;
        }
        while at != 0 {
            let next = self.blocks[at - 1].next;
            if next == index + 1 {
                self.blocks[at - 1].next = block.next;
                break;
            }
            at = next;
        }
        true
    }

    /// A group of accesses of the block had no one translation, at this icount: true if that was often.
    pub fn crossing(&mut self, index: u32, now: u64) -> bool {
        self.crossings.count(index, now)
    }

    /// The block at `start` is better translated without groups.
    pub fn remember_ungrouped(&mut self, start: u64) {
        self.ungrouped.remember(start);
    }

    /// What `remember_ungrouped` was told, perhaps forgotten since.
    pub fn is_ungrouped(&self, start: u64) -> bool {
        self.ungrouped.knows(start)
    }

    /// Identity of a page of code, new if need be.
    pub fn identity(&mut self, vpage: u64, page: u32, mode: Mode) -> u32 {
        let list = page_hash(vpage, page, mode);
        let mut next = self.page_lists[list];
        while next != 0 {
            let code_page = &self.code_pages[next - 1];
            if code_page.vpage == vpage && code_page.page == page && code_page.mode == mode {
                return next - 1;
            }
            next = code_page.next;
        }
        let index = self.code_pages.len() as u32;
        self.code_pages.push(CodePage { vpage, page, mode, next: self.page_lists[list] });
        self.page_lists[list] = index + 1;
        index
    }
}

/// Reach of a block from where RSP is when it begins: lowest offset, one past the highest.
type Reach = Option<(i16, i16)>;

/// A check of the stack window for a block that reaches `checked` serves another, which begins `depth` from there.
fn covers(checked: Reach, depth: Option<i16>, reached: Reach) -> bool {
    let (Some((low, high)), Some(depth), Some((min, max))) = (checked, depth, reached) else { return false };
    let [low, high, depth, min, max] = [low, high, depth, min, max].map(i32::from);
    low <= depth + min && depth + max <= high
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_of_the_window_serves_who_reaches_no_further() {
        let checked = Some((-64, 64));
        for (depth, reached, served) in [
            (0, (-64, 64), true),
            (0, (-65, 0), false),
            (0, (0, 65), false),
            (-56, (-8, 120), true),
            (-56, (-16, 0), false),
            (56, (-120, 8), true),
            (56, (0, 16), false),
            (i16::MAX, (1, 2), false),
        ] {
            assert_eq!(covers(checked, Some(depth), Some(reached)), served, "{depth} {reached:?}");
        }
        assert!(!covers(checked, None, checked) && !covers(None, Some(0), checked) && !covers(checked, Some(0), None));
    }
}
