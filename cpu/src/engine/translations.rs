//! Everything that translation leaves behind: host code, and the records that find it, leave it and forget it.
//!
//! All of it lives in one region and refers to code by offset and to records by index, never by address. So what
//! one engine has translated can be frozen into a file in memory and mapped privately by others: a branch starts
//! with the translations of its parent, at a cost that does not depend on their number.

mod blocks;
mod sharing;

use super::mode::Mode;
use super::pages::{Cover, PageRecord, Pages};
use super::recent::{Branch, Branches, Crossings, Patience, Recent};
use super::region::{Array, Layout, Region};
use super::translate::{MAX_RECORDS, Site};
use iced_x86::Instruction;
use std::io;

pub use sharing::Start;

/// Lists of blocks with the same hash; a power of two.
const BLOCK_LISTS: usize = 1 << 17;
/// Lists of code pages with the same hash; a power of two.
const PAGE_LISTS: usize = 1 << 14;
/// Starts remembered as translated without groups; a power of two.
const UNGROUPED: usize = 1 << 12;
/// Starts remembered as hot; a power of two.
const HOT: usize = 1 << 13;
/// Bytes of code for which there is room for one block, one site, and so on. Less than any program was seen to need.
const CODE_PER_BLOCK: usize = 96;
const CODE_PER_SITE: usize = 20;
const CODE_PER_EMULATED: usize = 256;
const CODE_PER_FAULT: usize = 32;
const CODE_PER_CODE_PAGE: usize = 512;

/// What a block is made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Ordinary execution.
    Ordinary,
    /// Ordinary execution where the stack window does not reach.
    Windowless,
    /// Ordinary execution where accesses that would share a translation lie in two pages; without the window, too.
    Ungrouped,
    /// At most so many instructions, and then back to Rust.
    Short(u8),
    /// One instruction with every memory access through Rust.
    Careful,
}

impl Purpose {
    /// Others may be linked to the block and it to others.
    pub fn is_linked(self) -> bool {
        matches!(self, Purpose::Ordinary | Purpose::Windowless | Purpose::Ungrouped)
    }
}

/// A translated block.
#[derive(Clone, Copy)]
pub struct Block {
    pub rip: u64,
    /// Identity of its page.
    pub identity: u32,
    /// Linear page and identity of a second page, for an instruction that straddles two.
    pub second: Option<(u64, u32)>,
    /// Offsets in the code memory.
    pub checked: u32,
    pub entry: u32,
    pub inner: u32,
    pub lookup_stub: u32,
    /// Reach from RSP that the block's check of the stack window covers.
    pub window: Option<(i16, i16)>,
    /// Index + 1 of the next block with the same hash.
    next: u32,
    pub valid: bool,
    /// It consists of bytes of several pages.
    pub spreads: bool,
    /// It is invalid only because there is a better one.
    superseded: bool,
    pub purpose: Purpose,
}

impl Block {
    /// Identity of the page and offset in it.
    pub fn start(&self) -> u64 {
        start(self.identity, self.rip)
    }
}

/// Identity of a page and offset in it, as one number.
pub fn start(identity: u32, rip: u64) -> u64 {
    u64::from(identity) << 12 | rip & 0xFFF
}

/// A page of code at a linear address in a mode; blocks and instruction TLBs refer to it by index.
#[derive(Clone, Copy)]
pub struct CodePage {
    pub vpage: u64,
    pub page: u32,
    pub mode: Mode,
    /// Index + 1 of the next page with the same hash.
    next: u32,
}

/// How much of each array is in use.
#[derive(Clone, Copy, Default)]
struct Lengths {
    code: usize,
    blocks: usize,
    sites: usize,
    emulated: usize,
    faults: usize,
    code_pages: usize,
    covers: usize,
    flushes: u64,
}

/// Where each array is in the region.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Offsets {
    code: usize,
    code_capacity: usize,
    page_count: usize,
    page_records: usize,
    covers: usize,
    block_lists: usize,
    page_lists: usize,
    ungrouped: usize,
    hot: usize,
    code_pages: usize,
    blocks: usize,
    faults: usize,
    emulated: usize,
    sites: usize,
    size: usize,
}

impl Offsets {
    fn new(code_capacity: usize, page_count: usize) -> Offsets {
        let mut layout = Layout::default();
        Offsets {
            code: layout.room::<u8>(code_capacity),
            code_capacity,
            page_count,
            page_records: layout.room::<PageRecord>(page_count),
            covers: layout.room::<Cover>(2 * code_capacity / CODE_PER_BLOCK),
            block_lists: layout.room::<u32>(BLOCK_LISTS),
            page_lists: layout.room::<u32>(PAGE_LISTS),
            ungrouped: layout.room::<u64>(UNGROUPED),
            hot: layout.room::<u64>(HOT),
            code_pages: layout.room::<CodePage>(code_capacity / CODE_PER_CODE_PAGE),
            blocks: layout.room::<Block>(code_capacity / CODE_PER_BLOCK),
            faults: layout.room::<(u32, u32)>(code_capacity / CODE_PER_FAULT),
            emulated: layout.room::<Instruction>(code_capacity / CODE_PER_EMULATED),
            sites: layout.room::<Site>(code_capacity / CODE_PER_SITE),
            size: layout.size(),
        }
    }
}

/// Starts of blocks + 1, by hash. Some may be forgotten.
struct Starts(Array<u64>);

impl Starts {
    fn remember(&mut self, start: u64) {
        let place = hash(start, self.0.len());
        self.0[place] = start + 1;
    }

    fn knows(&self, start: u64) -> bool {
        self.0[hash(start, self.0.len())] == start + 1
    }
}

/// See the module's text.
pub struct Translations {
    pub blocks: Array<Block>,
    /// Places from which translated code can leave.
    pub sites: Array<Site>,
    /// Instructions for the emulation, by index.
    pub emulated: Array<Instruction>,
    /// Code offsets of instructions that may fault, with their sites, in ascending order.
    pub faults: Array<(u32, u32)>,
    pub code_pages: Array<CodePage>,
    pub pages: Pages,
    block_lists: Array<u32>,
    recent: Recent,
    patience: Patience,
    crossings: Crossings,
    branches: Branches,
    page_lists: Array<u32>,
    /// Blocks whose groups crossed pages too often.
    ungrouped: Starts,
    /// Blocks that have run often.
    hot: Starts,
    code_used: usize,
    /// Bytes of code at the bottom that clearing keeps: the thunks.
    code_kept: usize,
    /// Bytes of code with which it all began.
    code_begun: usize,
    offsets: Offsets,
    /// How often all code was forgotten: indexes of blocks and sites live no longer.
    pub clears: u64,
    /// How often all address translations were forgotten.
    pub flushes: u64,
    /// What is mapped below: all there was when this engine branched off, or when it was frozen itself.
    origin: Option<Start>,
    /// Blocks killed since then; a few more than [`Translations::freeze`] cares for.
    killed: Vec<u32>,
    // Last: the arrays point into it.
    region: Region,
}

/// One of `size` lists; `size` is a power of two.
pub fn hash(value: u64, size: usize) -> u32 {
    debug_assert!(size.is_power_of_two());
    (value.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - size.trailing_zeros())) as u32
}

fn page_hash(vpage: u64, page: u32, mode: Mode) -> u32 {
    hash(vpage ^ u64::from(page) << 20 ^ u64::from(mode.0) << 48, PAGE_LISTS)
}

impl Translations {
    /// No translations: room for `code_bytes` of code from RAM of `page_count` pages.
    pub fn new(code_bytes: usize, page_count: usize) -> io::Result<Translations> {
        // Offsets in code are 32 bits; a block's bound must fit in any case.
        let code_capacity = code_bytes.clamp(1 << 20, 1 << 31).next_multiple_of(4096);
        let offsets = Offsets::new(code_capacity, page_count);
        let region = Region::new(offsets.size, None)?;
        Translations::over(region, offsets, Lengths::default(), 0)
    }

    fn over(region: Region, offsets: Offsets, lengths: Lengths, kept: usize) -> io::Result<Translations> {
        region.make_executable(offsets.code, offsets.code_capacity)?;
        let o = &offsets;
        Ok(Translations {
            blocks: Layout::array(&region, o.blocks, o.code_capacity / CODE_PER_BLOCK, lengths.blocks),
            sites: Layout::array(&region, o.sites, o.code_capacity / CODE_PER_SITE, lengths.sites),
            emulated: Layout::array(&region, o.emulated, o.code_capacity / CODE_PER_EMULATED, lengths.emulated),
            faults: Layout::array(&region, o.faults, o.code_capacity / CODE_PER_FAULT, lengths.faults),
            code_pages: Layout::array(&region, o.code_pages, o.code_capacity / CODE_PER_CODE_PAGE, lengths.code_pages),
            pages: Pages::new(
                Layout::array(&region, o.page_records, o.page_count, o.page_count),
                Layout::array(&region, o.covers, 2 * o.code_capacity / CODE_PER_BLOCK, lengths.covers),
            ),
            block_lists: Layout::array(&region, o.block_lists, BLOCK_LISTS, BLOCK_LISTS),
            recent: Recent::new(lengths.blocks),
            patience: Patience::new(lengths.code),
            crossings: Crossings::new(),
            branches: Branches::new(),
            page_lists: Layout::array(&region, o.page_lists, PAGE_LISTS, PAGE_LISTS),
            ungrouped: Starts(Layout::array(&region, o.ungrouped, UNGROUPED, UNGROUPED)),
            hot: Starts(Layout::array(&region, o.hot, HOT, HOT)),
            code_used: lengths.code,
            code_kept: kept,
            code_begun: lengths.code,
            offsets,
            clears: 0,
            flushes: lengths.flushes,
            origin: None,
            killed: Vec::new(),
            region,
        })
    }

    /// Forgets everything but the code that is kept.
    pub fn clear(&mut self) {
        self.clears += 1;
        self.leave_origin();
        self.code_used = self.code_kept;
        for code_page in self.code_pages.iter() {
            self.pages.forget_code(code_page.page);
        }
        self.pages.clear_covers();
        self.blocks.clear();
        self.sites.clear();
        self.emulated.clear();
        self.faults.clear();
        self.code_pages.clear();
        self.recent = Recent::none();
        self.patience = Patience::new(0);
        self.branches = Branches::new();
        self.block_lists.fill(0);
        self.page_lists.fill(0);
        self.ungrouped.0.fill(0);
        self.hot.0.fill(0);
        // Identity 0 is no page.
        self.code_pages.push(CodePage { vpage: u64::MAX, page: u32::MAX, mode: Mode(0), next: 0 });
    }

    /// True if another block of at most `code` bytes fits.
    pub fn has_room(&self, code: usize) -> bool {
        self.offsets.code_capacity - self.code_used >= code
            && self.blocks.has_room(1)
            && self.sites.has_room(MAX_RECORDS)
            && self.emulated.has_room(MAX_RECORDS)
            && self.faults.has_room(MAX_RECORDS)
            && self.code_pages.has_room(2)
            && self.pages.has_room()
    }

    // Code -----------------------------------------------------------------------------------------------------

    /// Host address of the code at `offset`.
    pub fn address(&self, offset: u32) -> u64 {
        self.code_start() + u64::from(offset)
    }

    /// Offset of the code at host address `address`.
    pub fn offset(&self, address: u64) -> u32 {
        address.wrapping_sub(self.code_start()) as u32
    }

    /// Host address of the code memory.
    pub fn code_start(&self) -> u64 {
        self.region.at(self.offsets.code) as u64
    }

    /// One past the code memory.
    pub fn code_end(&self) -> u64 {
        self.code_start() + self.offsets.code_capacity as u64
    }

    /// Offset at which the next piece of code will stand.
    pub fn next_code(&self) -> u32 {
        self.code_used as u32
    }

    /// Bytes of code beside those that a branch began with; None if it has forgotten those.
    pub fn code_since_branch(&self) -> Option<usize> {
        (self.clears == 0).then(|| self.code_used - self.code_begun)
    }

    /// Places code that was assembled for `next_code()`.
    pub fn place(&mut self, code: &[u8]) {
        assert!(self.offsets.code_capacity - self.code_used >= code.len(), "room is checked before translating");
        let at = self.region.at(self.offsets.code + self.code_used);
        // SAFETY: the range is inside the mapping, checked above; nobody executes there yet.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), at, code.len()) };
        self.code_used = (self.code_used + code.len()).next_multiple_of(16).min(self.offsets.code_capacity);
    }

    /// Keeps the code that has been placed so far for good.
    pub fn keep_code(&mut self) {
        self.code_kept = self.code_used;
    }

    /// Leads the branch whose rel32 is at offset `at` to offset `target`, or does not yet: its exit does as well.
    pub fn link(&mut self, at: u32, target: u32) {
        if !self.patience.waits(at) {
            self.patch_rel32(at, target);
        }
    }

    /// Overwrites the rel32 at offset `at` so that it leads to offset `target`.
    pub fn patch_rel32(&mut self, at: u32, target: u32) {
        assert!(at as usize + 4 <= self.offsets.code_capacity, "patches stay inside the code memory");
        self.patience.written(at);
        let displacement = target.wrapping_sub(at + 4);
        // SAFETY: inside the mapping, checked above; this thread executes nothing there right now.
        unsafe { (self.address(at) as *mut u32).write_unaligned(displacement) };
    }

    /// Overwrites the instruction at offset `at` with `jmp target`.
    pub fn patch_jmp(&mut self, at: u32, target: u32) {
        assert!(at as usize + 5 <= self.offsets.code_capacity, "patches stay inside the code memory");
        // SAFETY: as above.
        unsafe { (self.address(at) as *mut u8).write(0xE9) };
        self.patch_rel32(at + 1, target);
    }
}
