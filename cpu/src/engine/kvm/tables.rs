//! Page tables of the virtual machine: a cache of the guest's user mappings, one tree for each of its address spaces,
//! and above them, in the upper half, what translated code needs itself.
//!
//! A KVM without nested paging keeps copies of these tables and looks at them again only where it found nothing. So a
//! page of them that the VM may have seen is never changed but by filling it: to take something away, the pages on the
//! way to it are copied, and the VM gets another root (`fresh` pages are those that it has not seen yet).

use super::super::block::VcpuBlock;
use super::super::hash::FastMap;
use super::super::region::Region;
use super::vm::{CODE, EXIT, RAM};
use super::{EXIT_DISTANCE, KvmError};
use crate::memory::PAGE_SIZE;
use std::mem::offset_of;

/// Bytes of guest-physical memory for the VM's own tables. Behind them is the vCPU block that translated code in the VM
/// reaches through GS, but for its software TLBs.
const ARENA_BYTES: u64 = 64 << 20;
const BLOCK_BYTES: u64 = (offset_of!(VcpuBlock, tlb) as u64).next_multiple_of(PAGE_SIZE);
/// What of the arena is memory of the VM.
pub const SLOT_BYTES: u64 = ARENA_BYTES + BLOCK_BYTES;
/// Where things are in the arena.
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const STUBS: u64 = 0x4000;
pub const EXCEPTION_STACK_TOP: u64 = 0x6000;
const SYSTEM_PAGES: u64 = 6;
const FIRST_TABLE: u64 = 0x10;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const LARGE_BYTES: u64 = 2 << 20;

/// Linear addresses of what is in the upper half, the same for all roots.
#[derive(Clone, Copy)]
struct Places {
    system: u64,
    block: u64,
    code: u64,
}

impl Places {
    /// Addresses that no program can guess: they differ from engine to engine. None of them ever reaches a register
    /// that the guest can see, so what they are cannot reach State(N).
    fn draw() -> Places {
        let mut random = [0u64; 6];
        #[allow(clippy::disallowed_methods)] // see above: they cannot reach State(N)
        // SAFETY: writes at most that many bytes to the array.
        let got = unsafe { libc::getrandom(random.as_mut_ptr().cast(), size_of_val(&random), 0) };
        if got != size_of_val(&random) as isize {
            // As good as any for correctness.
            random = [0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB, 1 << 20, 2 << 20, 3 << 20];
        }
        // Three entries of the top-level table out of 257..=508.
        let slot = |n: u64| 257 + 84 * n + random[n as usize] % 84;
        let base = |n: u64| 0xFFFF_0000_0000_0000 | slot(n) << 39;
        let within = |n: usize, align: u64| random[3 + n] % ((500 << 30) / align) * align;
        Places {
            system: base(0) + within(0, PAGE_SIZE),
            block: base(1) + within(1, PAGE_SIZE),
            // One page in front of it is the way out.
            code: base(2) + LARGE_BYTES + within(2, LARGE_BYTES),
        }
    }
}

/// Where a page of RAM is mapped for writing. All zero: nowhere.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Writable {
    address_space: u64,
    /// Linear address, and one.
    linear: u64,
}

impl Writable {
    fn new(address_space: u64, linear: u64) -> Writable {
        Writable { address_space, linear: linear | 1 }
    }

    fn is_none(self) -> bool {
        self.linear == 0
    }

    fn at(self) -> u64 {
        self.linear & !1
    }
}

/// See the module's text.
pub struct Arena {
    region: Region,
    places: Places,
    /// A top-level table with nothing in the lower half.
    empty_root: u64,
    /// First table page that the VM has not seen.
    fresh: u64,
    next: u64,
    /// First page behind what all roots share.
    first: u64,
    /// Top-level tables by the guest's CR3.
    roots: FastMap<u64, u64>,
    /// By page number in guest RAM, the first place of each; where there are more, the others; and the pages that have
    /// had any.
    writable: Vec<Writable>,
    writable_too: FastMap<u32, Vec<Writable>>,
    writable_pages: Vec<u32>,
    /// The last table of pages that was filled: address space, linear address shifted by 21, where it is.
    last: Option<(u64, u64, u64)>,
}

fn index(linear: u64, level: u32) -> u64 {
    (linear >> (12 + 9 * level) & 511) * 8
}

impl Arena {
    /// Tables for a VM with `code_bytes` of code and so many pages of RAM.
    pub fn new(code_bytes: u64, page_count: usize) -> Result<Arena, KvmError> {
        let bytes = ARENA_BYTES as usize + size_of::<VcpuBlock>();
        let region = Region::new(bytes, None).map_err(|error| KvmError::Memory(error.to_string()))?;
        let mut arena = Arena {
            region,
            places: Places::draw(),
            empty_root: 0,
            fresh: 0,
            next: FIRST_TABLE,
            first: 0,
            roots: FastMap::default(),
            writable: vec![Writable::default(); page_count],
            writable_too: FastMap::default(),
            writable_pages: Vec::new(),
            last: None,
        };
        arena.empty_root = arena.allocate();
        let root = arena.empty_root;
        let rights = PRESENT | WRITE | ACCESSED | DIRTY;
        for page in 0..SYSTEM_PAGES {
            let at = page * PAGE_SIZE;
            let no_execute = if at == STUBS { 0 } else { NO_EXECUTE };
            arena.map(root, arena.places.system + at, at | rights | no_execute, 0);
        }
        for at in (0..BLOCK_BYTES).step_by(PAGE_SIZE as usize) {
            arena.map(root, arena.places.block + at, (ARENA_BYTES + at) | rights | USER | NO_EXECUTE, 0);
        }
        let way_out = arena.places.code - EXIT_DISTANCE as u64;
        arena.map(root, way_out, EXIT | rights | USER | NO_EXECUTE, 0);
        for at in (0..code_bytes).step_by(LARGE_BYTES as usize) {
            // Read-only: translated code is changed from outside only.
            arena.map(root, arena.places.code + at, (CODE + at) | PRESENT | USER | ACCESSED | LARGE, 1);
        }
        arena.first = arena.next;
        arena.fresh = arena.next;
        Ok(arena)
    }

    /// Host address of the arena.
    pub fn host(&self) -> u64 {
        self.region.at(0) as u64
    }

    /// Where the arena's first pages are in the VM.
    pub fn linear(&self, at: u64) -> u64 {
        self.places.system + at
    }

    /// The vCPU block, zeroed at first. It has no host address in it.
    pub fn block(&self) -> *mut VcpuBlock {
        self.region.at(ARENA_BYTES as usize).cast()
    }

    /// Where the vCPU block is in the VM.
    pub fn block_linear(&self) -> u64 {
        self.places.block
    }

    /// Where the code memory is in the VM.
    pub fn code_linear(&self) -> u64 {
        self.places.code
    }

    /// A root to begin with.
    pub fn root(&self) -> u64 {
        self.empty_root * PAGE_SIZE
    }

    fn pointer(&self, at: u64) -> *mut u64 {
        assert!(at + 8 <= ARENA_BYTES, "inside the arena");
        self.region.at(at as usize).cast()
    }

    pub fn read(&self, at: u64) -> u64 {
        // SAFETY: inside the arena, which only the VM's vCPU writes otherwise, and it does not run now.
        unsafe { self.pointer(at).read_volatile() }
    }

    pub fn write(&self, at: u64, value: u64) {
        // SAFETY: as above.
        unsafe { self.pointer(at).write_volatile(value) }
    }

    pub fn write32(&self, at: u64, value: u32) {
        // SAFETY: as above.
        unsafe { self.pointer(at).cast::<u32>().write_unaligned(value) }
    }

    /// Number of a zeroed page. Room is checked by `has_room`.
    fn allocate(&mut self) -> u64 {
        let page = self.next;
        self.next += 1;
        // SAFETY: inside the arena: `pointer` has checked the last word.
        unsafe {
            self.pointer((page + 1) * PAGE_SIZE - 8);
            self.pointer(page * PAGE_SIZE).cast::<u8>().write_bytes(0, PAGE_SIZE as usize);
        }
        page
    }

    fn copy(&mut self, page: u64) -> u64 {
        let copy = self.allocate();
        // SAFETY: two different pages of the arena.
        unsafe {
            let from = self.pointer(page * PAGE_SIZE).cast::<u8>();
            std::ptr::copy_nonoverlapping(from, self.pointer(copy * PAGE_SIZE).cast(), PAGE_SIZE as usize);
        }
        copy
    }

    /// Enough pages are left for any one change.
    pub fn has_room(&self) -> bool {
        self.next + 16 < ARENA_BYTES / PAGE_SIZE
    }

    /// Forgets all roots and begins anew. The VM must forget all it knows of the arena before it runs again.
    pub fn reset(&mut self) {
        self.forget_all();
        self.next = self.first;
        self.fresh = self.first;
    }

    /// The VM is about to run: it may see all there is.
    pub fn seal(&mut self) {
        self.fresh = self.next;
    }

    /// Maps at `level` (0 for a page), where nothing is mapped; makes the tables on the way.
    fn map(&mut self, root: u64, linear: u64, entry: u64, level: u32) {
        let at = self.table(root, linear, level);
        self.write(at, entry);
    }

    /// Where the entry for `linear` at `level` is; makes the tables on the way.
    fn table(&mut self, root: u64, linear: u64, level: u32) -> u64 {
        let mut table = root;
        for l in (level + 1..4).rev() {
            let at = table * PAGE_SIZE + index(linear, l);
            let entry = self.read(at);
            table = if entry & PRESENT != 0 {
                (entry & ADDRESS) / PAGE_SIZE
            } else {
                let new = self.allocate();
                self.write(at, (new * PAGE_SIZE) | PRESENT | WRITE | USER | ACCESSED);
                new
            };
        }
        table * PAGE_SIZE + index(linear, level)
    }

    /// Where the entry of a page is, if there is a table for it.
    fn find(&self, root: u64, linear: u64) -> Option<u64> {
        let mut table = root;
        for l in (1..4).rev() {
            let entry = self.read(table * PAGE_SIZE + index(linear, l));
            if entry & PRESENT == 0 {
                return None;
            }
            table = (entry & ADDRESS) / PAGE_SIZE;
        }
        Some(table * PAGE_SIZE + index(linear, 0))
    }

    // Address spaces -------------------------------------------------------------------------------------------

    /// CR3 of the VM for an address space of the guest.
    pub fn root_of(&mut self, address_space: u64) -> u64 {
        if let Some(root) = self.roots.get(&address_space) {
            return root * PAGE_SIZE;
        }
        let root = self.copy(self.empty_root);
        self.roots.insert(address_space, root);
        root * PAGE_SIZE
    }

    /// Forgets all address spaces.
    pub fn forget_all(&mut self) {
        self.roots.clear();
        for page in self.writable_pages.drain(..) {
            self.writable[page as usize] = Writable::default();
        }
        self.writable_too.clear();
        self.last = None;
    }

    /// Forgets an address space.
    pub fn forget_space(&mut self, address_space: u64) {
        self.roots.remove(&address_space);
        self.last = None;
    }

    /// Maps a page of RAM. False if it was mapped like that already.
    pub fn fill(&mut self, address_space: u64, linear: u64, page: u32, write: bool) -> bool {
        let mut at = match self.last {
            Some((space, high, table)) if (space, high) == (address_space, linear >> 21) => table + index(linear, 0),
            _ => {
                let Some(&root) = self.roots.get(&address_space) else { return false };
                if linear >> 47 != 0 || !self.has_room() {
                    return false;
                }
                let at = self.table(root, linear, 0);
                self.last = Some((address_space, linear >> 21, at - index(linear, 0)));
                at
            }
        };
        let entry = (RAM + u64::from(page) * PAGE_SIZE) | PRESENT | USER | ACCESSED | DIRTY | NO_EXECUTE;
        let entry = entry | if write { WRITE } else { 0 };
        let old = self.read(at);
        if old & PRESENT != 0 {
            let same_page = (old ^ entry) & ADDRESS == 0;
            if same_page && (old & WRITE != 0 || !write) {
                return false;
            }
            if !same_page {
                if !self.has_room() {
                    return false;
                }
                at = self.own_path(address_space, linear);
            }
        }
        self.write(at, entry);
        if write {
            self.note_writable(page, Writable::new(address_space, linear));
        }
        true
    }

    fn note_writable(&mut self, page: u32, place: Writable) {
        let first = self.writable[page as usize];
        if first == place {
            return;
        }
        if first.is_none() {
            self.writable[page as usize] = place;
            self.writable_pages.push(page);
            return;
        }
        let others = self.writable_too.entry(page).or_default();
        if !others.contains(&place) {
            others.push(place);
        }
    }

    /// Makes the tables on the way to a page that is mapped fresh ones; returns where its entry is then.
    fn own_path(&mut self, address_space: u64, linear: u64) -> u64 {
        self.last = None;
        let mut table = self.roots[&address_space];
        if table < self.fresh {
            table = self.copy(table);
            self.roots.insert(address_space, table);
        }
        for l in (1..4).rev() {
            let at = table * PAGE_SIZE + index(linear, l);
            let entry = self.read(at);
            let mut next = (entry & ADDRESS) / PAGE_SIZE;
            if next < self.fresh {
                next = self.copy(next);
                self.write(at, entry & !ADDRESS | (next * PAGE_SIZE));
            }
            table = next;
        }
        table * PAGE_SIZE + index(linear, 0)
    }

    /// Forgets a linear page in every address space.
    pub fn forget_page(&mut self, linear: u64) {
        if linear >> 47 != 0 || self.roots.is_empty() {
            return;
        }
        let spaces: Vec<(u64, u64)> = self.roots.iter().map(|(space, root)| (*space, *root)).collect();
        for (space, root) in spaces {
            let Some(at) = self.find(root, linear) else { continue };
            if self.read(at) & PRESENT == 0 {
                continue;
            }
            if !self.has_room() {
                self.forget_all();
                return;
            }
            let at = self.own_path(space, linear);
            self.write(at, 0);
        }
    }

    /// Where the entry is that maps the page for writing at that place, if it still does.
    fn writable_entry(&self, page: u32, place: Writable) -> Option<u64> {
        let at = self.find(*self.roots.get(&place.address_space)?, place.at())?;
        let entry = self.read(at);
        let maps = entry & (PRESENT | WRITE) == PRESENT | WRITE;
        (maps && entry & ADDRESS == RAM + u64::from(page) * PAGE_SIZE).then_some(at)
    }

    /// The page of RAM is not to be written any more.
    pub fn protect(&mut self, page: u32) {
        let first = std::mem::take(&mut self.writable[page as usize]);
        if first.is_none() {
            return;
        }
        let others = self.writable_too.remove(&page).unwrap_or_default();
        for place in std::iter::once(first).chain(others) {
            let Some(at) = self.writable_entry(page, place) else { continue };
            if !self.has_room() {
                self.forget_all();
                return;
            }
            let entry = self.read(at);
            let at = self.own_path(place.address_space, place.at());
            self.write(at, entry & !WRITE);
        }
    }

    /// Pages of RAM that the VM can write.
    pub fn writable(&mut self) -> Vec<u64> {
        let mut pages = std::mem::take(&mut self.writable_pages);
        pages.sort_unstable();
        pages.dedup();
        pages.retain(|page| {
            let others = self.writable_too.remove(page).unwrap_or_default();
            let places = std::iter::once(self.writable[*page as usize]).chain(others);
            let mut still: Vec<Writable> =
                places.filter(|place| !place.is_none() && self.writable_entry(*page, *place).is_some()).collect();
            self.writable[*page as usize] = still.pop().unwrap_or_default();
            let any = !self.writable[*page as usize].is_none();
            if !still.is_empty() {
                self.writable_too.insert(*page, still);
            }
            any
        });
        self.writable_pages = pages;
        self.writable_pages.iter().map(|page| u64::from(*page)).collect()
    }
}
