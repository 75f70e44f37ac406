//! What the engine remembers about each page of guest RAM: whether code was translated from it, whether it
//! serves as a page table, whether it was written.

use super::region::Array;
use crate::PageSet;
use crate::memory::PAGE_SIZE;

/// Code was translated from this page: writes take the slow path.
pub const HAS_CODE: u8 = 1;
/// A cached translation was derived from this page: writes take the slow path.
pub const IS_TABLE: u8 = 2;

/// Bytes of one line of the code map.
const LINE: u32 = 64;
/// The table maps more than one linear range.
pub const MANY_BASES: u64 = u64::MAX;

/// What is known of one page.
#[derive(Clone, Copy, Default, PartialEq)]
pub struct PageRecord {
    pub flags: u8,
    /// For tables: slow writes since the page was last walked through.
    pub table_writes: u16,
    /// For pages with code: index + 1 of its first cover.
    first_cover: u32,
    /// For tables: linear address of what the first entry maps, with the level (1 = page table) in the low bits.
    pub table_base: u64,
    /// For tables: how often everything had been forgotten when the page was last walked through.
    pub table_used: u64,
    /// For pages with code: one bit for each line that some block covers.
    lines: u64,
}

/// A block covers a part of a page.
#[derive(Clone, Copy)]
pub struct Cover {
    block: u32,
    /// Index + 1 of the page's next cover.
    next: u32,
    first: u16,
    len: u16,
}

/// Per-page records, indexed by guest-physical page number.
pub struct Pages {
    pub records: Array<PageRecord>,
    covers: Array<Cover>,
    dirty: PageSet,
}

fn line_bits(first: u32, len: u32) -> u64 {
    let low = first / LINE;
    let high = (first + len.max(1) - 1).min(PAGE_SIZE as u32 - 1) / LINE;
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

impl Pages {
    /// Records and covers in their arrays.
    pub fn new(records: Array<PageRecord>, covers: Array<Cover>) -> Pages {
        let dirty = PageSet::new(records.len() as u64);
        Pages { records, covers, dirty }
    }

    /// Remembers that the guest may write to the page, see [`Core::mark_dirty`](super::core::Core::mark_dirty).
    #[inline]
    pub fn mark_dirty(&mut self, page: u64) -> bool {
        self.dirty.insert(page)
    }

    /// How many pages were written since they were taken last.
    pub fn dirty_count(&self) -> usize {
        self.dirty.len()
    }

    /// Pages written since the last call, ascending.
    pub fn take_dirty(&mut self) -> Vec<u64> {
        self.dirty.take()
    }

    /// True if another block can be registered.
    pub fn has_room(&self) -> bool {
        self.covers.has_room(super::translate::PARTS_MAX)
    }

    /// Registers a block that was translated from `len` bytes at `first` of `page`. True if the page had no code.
    pub fn add_block(&mut self, page: u32, block: u32, first: u32, len: u32) -> bool {
        let record = &mut self.records[page];
        record.lines |= line_bits(first, len);
        self.covers.push(Cover { block, next: record.first_cover, first: first as u16, len: len as u16 });
        record.first_cover = self.covers.len() as u32;
        let fresh = record.flags & HAS_CODE == 0;
        record.flags |= HAS_CODE;
        fresh
    }

    /// True if a write of `len` bytes at `first` hits a line that holds code.
    pub fn hits_code(&self, page: u32, first: u32, len: u32) -> bool {
        self.records[page].lines & line_bits(first, len) != 0
    }

    /// Takes out the blocks that overlap the lines written, for the caller to invalidate.
    pub fn remove_blocks(&mut self, page: u32, first: u32, len: u32) -> Vec<u32> {
        let written = line_bits(first, len);
        let mut removed = Vec::new();
        let (mut left, mut kept) = (0, 0);
        let mut at = self.records[page].first_cover;
        while at != 0 {
            let cover = &mut self.covers[at - 1];
            let next = cover.next;
            let bits = line_bits(cover.first as u32, cover.len as u32);
            if bits & written != 0 {
                removed.push(cover.block);
            } else {
                left |= bits;
                cover.next = kept;
                kept = at;
            }
            at = next;
        }
        let record = &mut self.records[page];
        record.first_cover = kept;
        record.lines = left;
        if left == 0 {
            record.flags &= !HAS_CODE;
        }
        removed
    }

    /// Forgets the code of one page.
    pub fn forget_code(&mut self, page: u32) {
        if let Some(record) = self.records.get_mut(page as usize) {
            record.flags &= !HAS_CODE;
            record.first_cover = 0;
            record.lines = 0;
        }
    }

    /// Gives back the room of all covers, after `forget_code` of every page that has code.
    pub fn clear_covers(&mut self) {
        self.covers.clear();
    }

    /// Where the covers are in their region: offset and length in bytes.
    pub fn covers_extent(&self) -> (usize, usize) {
        self.covers.extent()
    }

    /// Where the records are in their region: offset and length in bytes.
    pub fn records_extent(&self) -> (usize, usize) {
        self.records.extent()
    }
}

#[cfg(test)]
mod tests {
    use super::super::region::{Layout, Region};
    use super::*;

    #[test]
    fn lines_cover_the_bytes_and_nothing_else() {
        assert_eq!(line_bits(0, 1), 1);
        assert_eq!(line_bits(63, 2), 3);
        assert_eq!(line_bits(4095, 1), 1 << 63);
        assert_eq!(line_bits(0, 4096), u64::MAX);
    }

    #[test]
    fn a_write_removes_only_the_blocks_it_touches() {
        let region = Region::new(8192, None).unwrap();
        let mut pages = Pages::new(Layout::array(&region, 0, 16, 16), Layout::array(&region, 4096, 16, 0));
        pages.add_block(3, 7, 0, 10);
        pages.add_block(3, 8, 100, 200);
        pages.add_block(3, 9, 0, 20);
        assert!(pages.hits_code(3, 5, 1) && pages.hits_code(3, 70, 8) && !pages.hits_code(3, 400, 8));
        assert_eq!(pages.remove_blocks(3, 128, 1), vec![8]);
        assert!(pages.hits_code(3, 5, 1));
        let mut rest = pages.remove_blocks(3, 0, 4096);
        rest.sort_unstable();
        assert_eq!(rest, vec![7, 9]);
        assert_eq!(pages.records[3u32].flags & HAS_CODE, 0);
    }
}
