//! What the engine remembers about each page of guest RAM: whether code was translated from it, whether it
//! serves as a page table, whether it was written.

use super::hash::FastMap;
use crate::memory::PAGE_SIZE;

/// Code was translated from this page: writes take the slow path.
pub const HAS_CODE: u8 = 1;
/// A cached translation was derived from this page: writes take the slow path.
pub const IS_TABLE: u8 = 2;

/// Bytes of one line of the code map.
const LINE: u32 = 64;
/// The table maps more than one linear range.
pub const MANY_BASES: u64 = u64::MAX;

/// Per-page records, indexed by guest-physical page number.
pub struct Pages {
    pub flags: Vec<u8>,
    /// For tables: linear address of what the first entry maps, with the level (1 = page table) in the low bits.
    pub table_base: Vec<u64>,
    /// For tables: slow writes since the page was last walked through.
    pub table_writes: Vec<u16>,
    /// For pages with code: one bit for each line that some block covers.
    lines: FastMap<u32, CodeLines>,
    dirty: Vec<u64>,
}

#[derive(Default)]
struct CodeLines {
    bits: u64,
    /// Blocks in the page: index, first byte, length.
    blocks: Vec<(u32, u16, u16)>,
}

fn line_bits(first: u32, len: u32) -> u64 {
    let low = first / LINE;
    let high = (first + len.max(1) - 1).min(PAGE_SIZE as u32 - 1) / LINE;
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

impl Pages {
    /// Records for RAM that ends at `end`.
    pub fn new(end: u64) -> Pages {
        let count = (end / PAGE_SIZE) as usize;
        Pages {
            flags: vec![0; count],
            table_base: vec![0; count],
            table_writes: vec![0; count],
            lines: FastMap::default(),
            dirty: vec![0; count.div_ceil(64)],
        }
    }

    /// Remembers that the guest may have written to the page.
    #[inline]
    pub fn mark_dirty(&mut self, page: u64) {
        self.dirty[(page / 64) as usize] |= 1 << (page % 64);
    }

    /// Pages written since the last call, ascending.
    pub fn take_dirty(&mut self) -> Vec<u64> {
        let mut pages = Vec::new();
        for (i, word) in self.dirty.iter_mut().enumerate() {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                pages.push(i as u64 * 64 + bits.trailing_zeros() as u64);
                bits &= bits - 1;
            }
        }
        pages
    }

    /// Registers a block that was translated from `len` bytes at `first` of `page`. True if the page had no code.
    pub fn add_block(&mut self, page: u32, block: u32, first: u32, len: u32) -> bool {
        let lines = self.lines.entry(page).or_default();
        lines.bits |= line_bits(first, len);
        lines.blocks.push((block, first as u16, len as u16));
        let fresh = self.flags[page as usize] & HAS_CODE == 0;
        self.flags[page as usize] |= HAS_CODE;
        fresh
    }

    /// True if a write of `len` bytes at `first` hits a line that holds code.
    pub fn hits_code(&self, page: u32, first: u32, len: u32) -> bool {
        self.lines.get(&page).is_some_and(|l| l.bits & line_bits(first, len) != 0)
    }

    /// Takes out the blocks that overlap the lines written, for the caller to invalidate.
    pub fn remove_blocks(&mut self, page: u32, first: u32, len: u32) -> Vec<u32> {
        let Some(lines) = self.lines.get_mut(&page) else { return Vec::new() };
        let written = line_bits(first, len);
        let mut removed = Vec::new();
        let mut left = 0;
        lines.blocks.retain(|&(block, first, len)| {
            let bits = line_bits(first as u32, len as u32);
            if bits & written != 0 {
                removed.push(block);
                false
            } else {
                left |= bits;
                true
            }
        });
        lines.bits = left;
        if left == 0 {
            self.lines.remove(&page);
            self.flags[page as usize] &= !HAS_CODE;
        }
        removed
    }

    /// Forgets all code.
    pub fn clear_code(&mut self) {
        for page in self.lines.keys() {
            self.flags[*page as usize] &= !HAS_CODE;
        }
        self.lines.clear();
    }
}

#[cfg(test)]
mod tests {
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
        let mut pages = Pages::new(16 * PAGE_SIZE);
        pages.add_block(3, 7, 0, 10);
        pages.add_block(3, 8, 100, 200);
        assert!(pages.hits_code(3, 5, 1) && pages.hits_code(3, 70, 8) && !pages.hits_code(3, 400, 8));
        assert_eq!(pages.remove_blocks(3, 128, 1), vec![8]);
        assert!(pages.hits_code(3, 5, 1));
        assert_eq!(pages.remove_blocks(3, 0, 4096), vec![7]);
        assert_eq!(pages.flags[3] & HAS_CODE, 0);
    }
}
