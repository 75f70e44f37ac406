//! The small computer that the code runs in: 2 MiB of RAM with descriptor tables, handlers and page tables, and how
//! it is put back between two inputs.
//!
//! ```text
//! linear                  maps
//! 0, 0xFFFF_F000,         a page each at the edges of the address spaces (one shared page table)
//!   0x7FFF_FFFF_F000
//! 0x40_0000 + page        the test pages, see `test_page`
//! 0x60_0000               a large page: all of RAM, its page tables included
//! HIGH + address          all of RAM, for the supervisor
//! top page                the last frame
//! ```

use orrery_cpu::engine::{Engine, EngineConfig};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::paging::entry::{GLOBAL, NO_EXECUTE, PAGE_SIZE as LARGE, PRESENT, USER, WRITE};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of RAM. Everything beyond is memory-mapped I/O.
pub const RAM_BYTES: u64 = 2 << 20;
/// Where the supervisor sees guest-physical address 0.
pub const HIGH: u64 = 0xFFFF_8000_0000_0000;
/// The first test page.
pub const LOW: u64 = 0x40_0000;
/// The large page.
pub const LARGE_PAGE: u64 = 0x60_0000;

/// Guest-physical pages of the system.
#[allow(missing_docs)]
pub mod frame {
    pub const GDT: u64 = 1;
    pub const IDT: u64 = 2;
    pub const TSS: u64 = 3;
    pub const HANDLERS: u64 = 4;
    pub const STUBS: u64 = 5;
    /// And behind it that of the double fault.
    pub const KERNEL_STACK: u64 = 6;
    pub const ROOT: u64 = 8;
    pub const PDPT_LOW: u64 = 9;
    pub const PD_LOW: u64 = 10;
    pub const PT_LOW: u64 = 11;
    pub const PT_EDGE: u64 = 12;
    pub const PDPT_HIGH: u64 = 13;
    pub const PD_HIGH: u64 = 14;
    pub const PT_HIGH: u64 = 15;
    pub const SECOND_ROOT: u64 = 16;
    pub const SECOND_PDPT: u64 = 17;
    pub const SECOND_PD: u64 = 18;
    pub const SECOND_PT: u64 = 19;
    /// First frame of the test pages.
    pub const TEST: u64 = 32;
}

/// Selectors of the GDT.
#[allow(missing_docs)]
pub mod selector {
    pub const KERNEL_CS: u16 = 0x10;
    pub const KERNEL_SS: u16 = 0x18;
    pub const USER_CS32: u16 = 0x23;
    pub const USER_SS: u16 = 0x2B;
    pub const USER_CS: u16 = 0x33;
    pub const TSS: u16 = 0x40;
    pub const KERNEL_CS32: u16 = 0x50;
    pub const KERNEL_CS16: u16 = 0x58;
    pub const USER_CS16: u16 = 0x63;
    pub const USER_DATA_BASED: u16 = 0x6B;
    pub const USER_DATA_DOWN: u16 = 0x73;
    pub const LDT: u16 = 0x80;
    pub const CS1: u16 = 0xA1;
    pub const SS1: u16 = 0xA9;
}

/// Number of test pages.
pub const TEST_PAGES: u64 = 32;
/// Test page of the page table that maps the test pages.
pub const TABLE_PAGE: u64 = 13;

/// Guest-physical address and flags of a test page. `user` opens the pages to user mode.
pub fn test_page(index: u64, user: u64) -> u64 {
    let own = (frame::TEST + (index * 7) % 61) * PAGE;
    let open = PRESENT | WRITE | user;
    match index {
        // Code, data.
        0..=7 => own | open,
        8 => own | PRESENT | user,
        9 => own | WRITE | user,
        // Aliases of the first code page and of the first page of data.
        10 => test_page(0, user),
        11 => test_page(4, user),
        12 => 0x30_0000 | open,
        TABLE_PAGE => frame::PT_LOW * PAGE | open,
        14 => own | PRESENT | WRITE,
        15 => 0x30_1000 | open,
        18 => frame::PD_LOW * PAGE | open,
        // Neighbours in physical memory too.
        19 => 94 * PAGE | open,
        20 => 95 * PAGE | open,
        21 => frame::GDT * PAGE | open,
        22 => frame::IDT * PAGE | open,
        23 => own | open | NO_EXECUTE,
        24 => own | open | GLOBAL,
        // Beyond the physical addresses: a reserved bit.
        25 => own | open | 1 << 50,
        26 => frame::PT_HIGH * PAGE | open,
        27 => 1 << 45 | open,
        28 => frame::TSS * PAGE | open,
        _ => own | open,
    }
}

fn descriptor(base: u64, limit: u64, attributes: u64) -> u64 {
    limit & 0xFFFF
        | (base & 0xFF_FFFF) << 16
        | (attributes & 0xFF) << 40
        | (limit >> 16 & 0xF) << 48
        | (attributes >> 8 & 0xF) << 52
        | (base >> 24 & 0xFF) << 56
}

struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn put_u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    fn entry(&mut self, table: u64, index: u64, value: u64) {
        self.put_u64(table * PAGE + 8 * index, value);
    }

    fn tables(&mut self) {
        use frame::*;
        let open = PRESENT | WRITE | USER;
        let closed = PRESENT | WRITE;
        for (root, pdpt) in [(ROOT, PDPT_LOW), (SECOND_ROOT, SECOND_PDPT)] {
            for index in [0, 255] {
                self.entry(root, index, pdpt * PAGE | open);
            }
            for index in [256, 511] {
                self.entry(root, index, PDPT_HIGH * PAGE | closed);
            }
        }
        for (pdpt, pd, pt) in [(PDPT_LOW, PD_LOW, PT_LOW), (SECOND_PDPT, SECOND_PD, SECOND_PT)] {
            for index in [0, 3, 511] {
                self.entry(pdpt, index, pd * PAGE | open);
            }
            for index in [0, 511] {
                self.entry(pd, index, PT_EDGE * PAGE | open);
            }
            self.entry(pd, LOW >> 21, pt * PAGE | open);
            self.entry(pd, LARGE_PAGE >> 21, open | LARGE);
        }
        self.entry(PT_EDGE, 0, 97 * PAGE | open);
        self.entry(PT_EDGE, 511, 98 * PAGE | open);
        for index in [0, 511] {
            self.entry(PDPT_HIGH, index, PD_HIGH * PAGE | closed);
            self.entry(PD_HIGH, index, PT_HIGH * PAGE | closed);
        }
        for page in 0..512 {
            self.entry(PT_HIGH, page, page * PAGE | closed | if page % 3 == 0 { GLOBAL } else { 0 });
        }
    }

    fn descriptors(&mut self) {
        let gdt = frame::GDT * PAGE;
        let flat = 0xF_FFFF;
        for (selector, base, limit, attributes) in [
            (0x10, 0, flat, 0xA9B),
            (0x18, 0, flat, 0xC93),
            (0x20, 0, flat, 0xCFB),
            (0x28, 0, flat, 0xCF3),
            (0x30, 0, flat, 0xAFB),
            (0x40, HIGH + frame::TSS * PAGE, 0xFFF, 0x08B),
            (0x50, 0, flat, 0xC9B),
            (0x58, 0, flat, 0x89B),
            (0x60, 0, flat, 0x8FB),
            (0x68, LOW + 4 * PAGE, 0x1FFF, 0x4F3),
            (0x70, 0, 0x3FF, 0xCF7),
            (0x78, 0, flat, 0xC73),
            (0x80, HIGH + gdt + 0x800, 0x1F, 0x082),
            (0x90, 0, flat, 0xA9F),
            (0x98, 0, flat, 0xAF9),
            (0xA0, 0, flat, 0xABB),
            (0xA8, 0, flat, 0xCB3),
            (0xB0, 0x1000, flat, 0xCFB),
            (0x808, 0, flat, 0xCF2),
            (0x810, LOW, 0xFFF, 0x4F1),
        ] {
            self.put_u64(gdt + selector, descriptor(base, limit, attributes));
        }
        self.put_u64(gdt + 0x48, HIGH >> 32);
        self.put_u64(gdt + 0x88, HIGH >> 32);
        // A call gate to the supervisor's stubs.
        let stub = HIGH + frame::STUBS * PAGE;
        self.put_u64(gdt + 0xB8, stub & 0xFFFF | 0x10 << 16 | 0xEC << 40 | (stub >> 16 & 0xFFFF) << 48);
        self.put_u64(gdt + 0xC0, stub >> 32);
        let tss = frame::TSS * PAGE;
        for (offset, top) in [(4, 7), (12, 7), (20, 7), (0x24, 8), (0x2C, 8)] {
            self.put_u64(tss + offset, HIGH + top * PAGE);
        }
        // An I/O permission bitmap at 0x200 that opens every other group of eight ports.
        self.put(tss + 0x66, &0x200u16.to_le_bytes());
        for byte in 0..0xE00 {
            self.put(tss + 0x200 + byte, &[if byte % 2 == 0 { 0 } else { 0xFF }]);
        }
        for vector in 0..256 {
            let handler = HIGH + frame::HANDLERS * PAGE + vector * 16;
            let dpl = if vector % 4 == 3 { 3 } else { 0 };
            let kind = if vector % 8 == 5 { 0x8F } else { 0x8E };
            let ist = u64::from(vector == 8);
            let low =
                handler & 0xFFFF | 0x10 << 16 | ist << 32 | (kind | dpl << 5) << 40 | (handler >> 16 & 0xFFFF) << 48;
            self.put_u64(frame::IDT * PAGE + vector * 16, low);
            self.put_u64(frame::IDT * PAGE + vector * 16 + 8, handler >> 32);
        }
    }

    fn handlers(&mut self) {
        // Skip a byte of the code that faulted; return from everything else.
        let with_error: &[u8] = &[0x48, 0x83, 0xC4, 0x08, 0x48, 0xFF, 0x04, 0x24, 0x48, 0xCF];
        let fault: &[u8] = &[0x48, 0xFF, 0x04, 0x24, 0x48, 0xCF];
        let trap: &[u8] = &[0x48, 0xCF];
        for vector in 0..256u64 {
            let code = match vector {
                8 => &[0xF4],
                10..=14 | 17 => with_error,
                0 | 5..=7 | 16 | 19 => fault,
                _ => trap,
            };
            self.put(frame::HANDLERS * PAGE + vector * 16, code);
        }
        // SYSCALL: back with SYSRETQ; SYSENTER and the call gate: RETF.
        self.put(frame::STUBS * PAGE, &[0x48, 0x0F, 0x07]);
        self.put(frame::STUBS * PAGE + 0x40, &[0x0F, 0x07]);
        self.put(frame::STUBS * PAGE + 0x80, &[0x48, 0xCB]);
    }
}

/// RAM before an input's own changes.
pub fn pristine() -> Vec<u8> {
    let mut image = Image(vec![0; RAM_BYTES as usize]);
    for frame in frame::TEST..128 {
        for word in 0..PAGE / 8 {
            image.put_u64(frame * PAGE + word * 8, super::bus::mix(frame, word));
        }
    }
    image.tables();
    image.descriptors();
    image.handlers();
    image.0
}

/// RAM and the engine over it.
pub struct World {
    /// The engine.
    pub engine: Engine,
    memory: GuestMemory,
    /// Pages that may differ from the pristine ones.
    touched: Vec<u64>,
}

impl World {
    /// With pristine RAM.
    pub fn new(config: EngineConfig, pristine: &[u8]) -> World {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).expect("2 MiB of memory");
        let engine = Engine::new(memory.clone(), ModelFeatures::default(), config).expect("an engine on this host");
        let mut world = World { engine, memory, touched: Vec::new() };
        world.ram_mut().copy_from_slice(pristine);
        world
    }

    /// All of RAM.
    pub fn ram(&self) -> &[u8] {
        let start = self.memory.get_host_address(GuestAddress(0)).expect("RAM starts at 0");
        // SAFETY: one region of that length, which lives as long as `self`; the guest is not running.
        unsafe { std::slice::from_raw_parts(start, RAM_BYTES as usize) }
    }

    fn ram_mut(&mut self) -> &mut [u8] {
        let start = self.memory.get_host_address(GuestAddress(0)).expect("RAM starts at 0");
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(start, RAM_BYTES as usize) }
    }

    /// One page of RAM.
    pub fn page(&self, page: u64) -> &[u8] {
        &self.ram()[(page * PAGE) as usize..][..PAGE as usize]
    }

    /// Writes as a device does: the engine is told.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let start = gpa.min(RAM_BYTES);
        let end = (start + bytes.len() as u64).min(RAM_BYTES);
        if start == end {
            return;
        }
        // Before and not after: what is cached goes first.
        self.engine.memory_written(start, end - start);
        self.ram_mut()[start as usize..end as usize].copy_from_slice(&bytes[..(end - start) as usize]);
        self.engine.memory_written(start, end - start);
        self.touched.extend(start / PAGE..=(end - 1) / PAGE);
    }

    /// Takes the engine's list of written pages; true if `page` may have been written since the last `restore`.
    pub fn collect_dirty(&mut self) {
        let dirty = self.engine.take_dirty();
        self.touched.extend(dirty);
        self.touched.sort_unstable();
        self.touched.dedup();
    }

    /// Pages that may differ from the pristine ones, in ascending order after `collect_dirty`.
    pub fn touched(&self) -> &[u64] {
        &self.touched
    }

    /// Makes RAM pristine again.
    pub fn restore(&mut self, pristine: &[u8]) {
        self.collect_dirty();
        for page in std::mem::take(&mut self.touched) {
            let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            if self.ram()[range.clone()] != pristine[range.clone()] {
                self.engine.memory_written(page * PAGE, PAGE);
                self.ram_mut()[range.clone()].copy_from_slice(&pristine[range]);
                self.engine.memory_written(page * PAGE, PAGE);
            }
        }
        // The restoring itself is no news.
        self.engine.take_dirty();
    }
}
