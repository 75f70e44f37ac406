//! Arbitrary page tables and accesses through them: the walk in `orrery_cpu::paging` and the engine with its TLBs
//! against a model without any cache.
//!
//! A small supervisor lives in the top entry of the root table, one page of user code below it; both are left alone.
//! Everything else is the input's: ten pages of tables, which may map each other, and forty of data. Tables change
//! between accesses, by stores of the guest itself or behind its back, and never with INVLPG: the engine promises that
//! a translation always says what the tables say.

mod model;

use std::cell::RefCell;

use orrery_cpu::bus::MsrRefused;
use orrery_cpu::engine::{Engine, EngineConfig, Stop};
use orrery_cpu::memory::{GuestMemory, PhysMemory};
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::paging::{self, Access};
use orrery_cpu::state::{Segment, TableRegister, control, gpr, rflags, seg};
use orrery_cpu::{Bus, CpuState, Exception, Icount};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::bytes::Bytes;
use model::{Kind, Ram, Rules};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
const RAM_BYTES: u64 = PAGES * PAGE;

const TABLES: u64 = 1;
const IDT: u64 = 2;
const KERNEL_CODE: u64 = 3;
const STACK: u64 = 4;
const USER_CODE: u64 = 11;
const ROOT: u64 = 12;
/// First page that the input may use.
const POOL: u64 = 14;
/// First page that holds no tables at the start.
const DATA: u64 = 24;

const HIGH: u64 = 0xFFFF_FF80_0000_0000;
const USER: u64 = 0xFFFF_FF00_0000_0000;
/// Where the stubs start in the pages of code, and how far they are apart.
const STUBS: u64 = 0x100;
const STUB_BYTES: u64 = 16;

/// What a stub does with the memory at RDI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Load(usize),
    Store(usize),
    /// ADD with a memory destination, of eight bytes.
    Add,
}

const OPERATIONS: [(Operation, &[u8]); 9] = [
    (Operation::Load(1), &[0x8A, 0x07]),
    (Operation::Load(8), &[0x48, 0x8B, 0x07]),
    (Operation::Load(16), &[0x0F, 0x10, 0x07]),
    (Operation::Load(32), &[0xC5, 0xFC, 0x10, 0x07]),
    (Operation::Store(1), &[0x88, 0x07]),
    (Operation::Store(8), &[0x48, 0x89, 0x07]),
    (Operation::Store(16), &[0x0F, 0x11, 0x07]),
    (Operation::Store(32), &[0xC5, 0xFC, 0x11, 0x07]),
    (Operation::Add, &[0x48, 0x01, 0x07]),
];

/// What a byte that is not RAM reads as.
fn device_byte(gpa: u64) -> u8 {
    (gpa ^ gpa >> 8 ^ gpa >> 16 ^ gpa >> 24 ^ gpa >> 40) as u8 ^ 0x5A
}

/// A bus where every address is a register that keeps its value.
struct Registers;

impl Bus for Registers {
    fn port_read(&mut self, _: Icount, _: u16, _: usize) -> u32 {
        0
    }
    fn port_write(&mut self, _: Icount, _: u16, _: usize, _: u32) {}
    fn mmio_read(&mut self, _: Icount, gpa: u64, data: &mut [u8]) {
        assert!(gpa >= RAM_BYTES, "{gpa:#x} is RAM");
        for (byte, at) in data.iter_mut().zip(gpa..) {
            *byte = device_byte(at);
        }
    }
    fn mmio_write(&mut self, _: Icount, gpa: u64, _: &[u8]) {
        assert!(gpa >= RAM_BYTES, "{gpa:#x} is RAM");
    }
    fn msr_read(&mut self, _: Icount, _: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn msr_write(&mut self, _: Icount, _: u32, _: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn task_priority(&mut self, _: Icount) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: Icount, _: u8) {}
    fn tsc(&mut self, now: Icount) -> u64 {
        now.0
    }
    fn random(&mut self) -> u64 {
        1
    }
    fn attention(&self) -> bool {
        false
    }
}

struct World {
    memory: GuestMemory,
    physical: PhysMemory,
    engine: Engine,
}

struct Bench {
    pristine: Ram,
    worlds: Vec<World>,
    template: CpuState,
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

/// Runs one input. Panics if the product and the model differ.
pub fn execute(data: &[u8]) {
    let _running = crate::watch::input(data, true);
    BENCH.with_borrow_mut(|bench| bench.get_or_insert_with(Bench::new).execute(data));
}

fn put(ram: &mut Ram, gpa: u64, bytes: &[u8]) {
    ram[gpa as usize..][..bytes.len()].copy_from_slice(bytes);
}

fn pristine() -> Ram {
    let mut ram = vec![0; RAM_BYTES as usize];
    let mut put = |gpa: u64, value: u64| put(&mut ram, gpa, &value.to_le_bytes());
    // Present, writable, user, accessed, dirty: nothing is left to be set in the supervisor's tables.
    let (open, closed) = (0x67, 0x63);
    put(ROOT * PAGE + 511 * 8, 5 * PAGE | closed);
    put(5 * PAGE, 6 * PAGE | closed);
    put(6 * PAGE, 7 * PAGE | closed);
    for page in 0..PAGES {
        put(7 * PAGE + 8 * page, page * PAGE | closed);
    }
    put(ROOT * PAGE + 510 * 8, 8 * PAGE | open);
    put(8 * PAGE, 9 * PAGE | open);
    put(9 * PAGE, 10 * PAGE | open);
    put(10 * PAGE, USER_CODE * PAGE | open);
    for (selector, descriptor) in [
        (0x10, 0x00AF_9B00_0000_FFFF),
        (0x18, 0x00CF_9300_0000_FFFF),
        (0x28, 0x00CF_F300_0000_FFFF),
        (0x30, 0x00AF_FB00_0000_FFFF),
    ] {
        put(TABLES * PAGE + selector, descriptor);
    }
    // The stack for exceptions, in the TSS.
    put(TABLES * PAGE + 0x804, HIGH + (STACK + 1) * PAGE);
    for vector in 0..32 {
        let handler = HIGH + KERNEL_CODE * PAGE + vector;
        let low = handler & 0xFFFF | 0x10 << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48;
        put(IDT * PAGE + vector * 16, low);
        put(IDT * PAGE + vector * 16 + 8, handler >> 32);
    }
    // Handlers: HLT, one byte for each vector.
    put(KERNEL_CODE * PAGE, u64::from_le_bytes([0xF4; 8]));
    put(KERNEL_CODE * PAGE + 8, u64::from_le_bytes([0xF4; 8]));
    for (n, (_, code)) in OPERATIONS.iter().enumerate() {
        let mut bytes = [0x90; 8];
        bytes[..code.len()].copy_from_slice(code);
        for page in [KERNEL_CODE, USER_CODE] {
            put(page * PAGE + STUBS + n as u64 * STUB_BYTES, u64::from_le_bytes(bytes));
        }
    }
    // Data: NOPs, which as entries of a table are not present.
    ram[(DATA * PAGE) as usize..].fill(0x90);
    ram
}

impl World {
    fn new(config: EngineConfig) -> World {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).expect("256 KiB of memory");
        let engine = Engine::new(memory.clone(), ModelFeatures::default(), config).expect("an engine on this host");
        World { physical: PhysMemory::new(memory.clone()), memory, engine }
    }

    fn ram(&self) -> &[u8] {
        let start = self.memory.get_host_address(GuestAddress(0)).expect("RAM starts at 0");
        // SAFETY: one region of that length, which lives as long as `self`; the guest is not running.
        unsafe { std::slice::from_raw_parts(start, RAM_BYTES as usize) }
    }

    /// Writes as a device does.
    fn write(&mut self, gpa: u64, bytes: &[u8]) {
        self.engine.memory_written(gpa, bytes.len() as u64);
        let start = self.memory.get_host_address(GuestAddress(gpa)).expect("inside RAM");
        assert!(gpa + bytes.len() as u64 <= RAM_BYTES);
        // SAFETY: inside the region, checked above; the guest is not running.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
        self.engine.memory_written(gpa, bytes.len() as u64);
    }

    /// Makes RAM equal to `wanted`.
    fn set(&mut self, wanted: &Ram) {
        for page in 0..PAGES {
            let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            if self.ram()[range.clone()] != wanted[range.clone()] {
                self.write(page * PAGE, &wanted[range]);
            }
        }
    }
}

/// An entry from two bytes: mostly a page of the pool or of data, with mostly harmless flags.
fn entry(what: u8, how: u8) -> u64 {
    let frame = POOL + u64::from(what) % (PAGES - POOL);
    let flags = match how & 7 {
        0 | 1 => 0x7,
        2 => 0x3,
        3 => 0x5,
        4 => 0x1,
        5 => 0x8000_0000_0000_0007,
        6 => 0x107,
        _ => 0x6,
    };
    let value = frame * PAGE | flags;
    match how >> 3 {
        // Large: all of RAM, or what lies behind it.
        1 => 0x87,
        2 => 0x83,
        3 => 0x4000_0087,
        4 => 0x20_0087 | u64::from(what) << 13,
        5 => value | 1 << (46 + u32::from(what) % 18),
        6 => value | 0x60,
        7 => value | 0x20,
        8 => 0x10_0000 | u64::from(what) << 12 | flags,
        9 => (1 << 45) | flags,
        10 => value | 0x80,
        11 => 0,
        12 => u64::from(what) << 3 & !7 | 0x2000,
        _ => value,
    }
}

/// An index in a table: few, so that walks meet.
fn index(byte: u8) -> u64 {
    [0, 1, 2, 255, 256, 511, 14, 30][usize::from(byte & 7)]
}

fn linear(bytes: &mut Bytes, last: u64) -> u64 {
    if last != 0 && bytes.u8() & 3 == 0 {
        return last;
    }
    let levels = bytes.u16();
    let offset = bytes.u8();
    // The root's two last entries belong to the supervisor.
    let top = [0, 1, 2, 255, 256, 509, 14, 30][usize::from(levels & 7)];
    let page = match levels >> 9 & 31 {
        small @ 0..8 => index(small as u8),
        other => POOL + u64::from(other) * 2 % (PAGES - POOL),
    };
    let value = top << 39 | index((levels >> 3) as u8) << 30 | index((levels >> 6) as u8) << 21 | page << 12;
    let value = value
        | u64::from(offset & 0xF0) << 4
        | if offset & 1 == 0 { u64::from(offset & 14) } else { 0xFE0 | u64::from(offset & 0x1E) };
    ((value << 16) as i64 >> 16) as u64
}

impl Bench {
    fn new() -> Bench {
        let base = EngineConfig { code_cache_bytes: 4 << 20, ..EngineConfig::default() };
        let configs = [
            base.clone(),
            EngineConfig { tlb_bits: 1, ..base.clone() },
            EngineConfig { tlb_bits: 3, chaos_seed: Some(3), ..base.clone() },
        ];
        let mut template = CpuState::long_mode_boot(0, 0, 0, ROOT * PAGE, HIGH + TABLES * PAGE, 0x37);
        template.idtr = TableRegister { base: HIGH + IDT * PAGE, limit: 0x1FF };
        template.tr = Segment { base: HIGH + TABLES * PAGE + 0x800, limit: 0x67, selector: 0x40, attributes: 0x8B };
        template.xcr0 = 7;
        template.cr4 |= control::CR4_OSFXSR | control::CR4_OSXSAVE | control::CR4_OSXMMEXCPT;
        Bench { pristine: pristine(), worlds: configs.map(World::new).into(), template }
    }

    fn execute(&mut self, data: &[u8]) {
        let mut bytes = Bytes::new(data);
        let which = bytes.below(self.worlds.len());
        let world = &mut self.worlds[which];
        let mut ram = self.pristine.clone();
        for _ in 0..bytes.below(32) {
            let (table, at, what, how) = (bytes.u8(), bytes.u8(), bytes.u8(), bytes.u8());
            put(&mut ram, slot(table, at), &entry(what, how).to_le_bytes());
        }
        world.set(&ram);
        let mut run = Run {
            template: &self.template,
            world,
            ram,
            rules: Rules { cr3: ROOT * PAGE, ..Rules::default() },
            ac: false,
            last: 0,
        };
        run.begin(bytes.u8());
        let mut accesses = 0;
        while !bytes.is_empty() && accesses < 64 {
            run.step(&mut bytes);
            accesses += 1;
        }
        run.finish();
    }
}

/// Address of an entry that the input may write.
fn slot(table: u8, at: u8) -> u64 {
    let index = match at >> 3 {
        0..16 => index(at),
        other => POOL + u64::from(other) % (PAGES - POOL),
    };
    if table & 7 == 0 {
        // In the root, but not in the supervisor's entries.
        return ROOT * PAGE + 8 * if index == 511 { 509 } else { index };
    }
    (POOL + u64::from(table >> 3) % (DATA - POOL)) * PAGE + 8 * index
}

struct Run<'a> {
    template: &'a CpuState,
    world: &'a mut World,
    /// What RAM must hold.
    ram: Ram,
    rules: Rules,
    ac: bool,
    last: u64,
}

impl Run<'_> {
    /// A new state, and with it new rules.
    fn begin(&mut self, how: u8) {
        let mut state = self.template.clone();
        let mut set = |n: u8, register: fn(&mut CpuState) -> &mut u64, bit: u64| {
            if how >> n & 1 == 1 {
                *register(&mut state) |= bit;
            }
            how >> n & 1 == 1
        };
        self.rules.write_protect = set(0, |s| &mut s.cr0, control::CR0_WP);
        self.rules.no_execute = set(1, |s| &mut s.efer, control::EFER_NXE);
        self.rules.smep = set(2, |s| &mut s.cr4, control::CR4_SMEP);
        let smap = set(3, |s| &mut s.cr4, control::CR4_SMAP);
        set(4, |s| &mut s.cr4, control::CR4_PGE);
        self.rules.smap = smap;
        *self.world.engine.state_mut() = state;
        self.world.engine.state_replaced();
    }

    fn step(&mut self, bytes: &mut Bytes) {
        match bytes.u8() {
            // A table changes behind the guest's back.
            0..16 => {
                let (at, value) = (slot(bytes.u8(), bytes.u8()), entry(bytes.u8(), bytes.u8()).to_le_bytes());
                put(&mut self.ram, at, &value);
                self.world.write(at, &value);
            }
            // The supervisor changes a table.
            16..64 => {
                let (at, value) = (slot(bytes.u8(), bytes.u8()), entry(bytes.u8(), bytes.u8()));
                self.access(5, HIGH + at, value, false);
            }
            64..72 => self.ac = !self.ac,
            72..80 => self.begin(bytes.u8()),
            80..112 => self.fetch(bytes),
            other => {
                let user = other & 1 == 1;
                let operation = bytes.below(OPERATIONS.len());
                self.last = linear(bytes, self.last);
                let value = entry(bytes.u8(), bytes.u8());
                self.access(operation, self.last, value, user);
            }
        }
    }

    /// The model's rules for the next access, and the vCPU's registers for it.
    fn prepare(&mut self, rip: u64, user: bool) -> Rules {
        let state = self.world.engine.state_mut();
        let flat = |selector, attributes| Segment { base: 0, limit: u32::MAX, selector, attributes };
        state.seg = [if user { flat(0x2B, 0xCF3) } else { flat(0x18, 0xC93) }; 6];
        state.seg[seg::CS] = if user { flat(0x33, 0xAFB) } else { flat(0x10, 0xA9B) };
        state.cpl = if user { 3 } else { 0 };
        state.rip = rip;
        state.halted = false;
        state.rflags = rflags::FIXED | if self.ac { rflags::AC } else { 0 };
        state.gpr[gpr::RSP] = HIGH + (STACK + 1) * PAGE;
        state.cr2 = 0;
        let smap = self.rules.smap && !self.ac;
        Rules { user, smap, ..self.rules }
    }

    /// The page fault that was delivered, if the instruction has not retired: address and error code.
    fn outcome(&mut self, next: u64) -> Result<(), (u8, u64, u64)> {
        let now = self.world.engine.icount();
        let stop = self.world.engine.run(Icount(now.0 + 1), &mut Registers);
        assert!(matches!(stop, Stop::Limit | Stop::Halted), "{stop:?}");
        assert_eq!(self.world.engine.icount().0, now.0 + 1);
        let state = self.world.engine.state();
        if state.rip == next {
            return Ok(());
        }
        // The handler's HLT has retired.
        let vector = state.rip.wrapping_sub(HIGH + KERNEL_CODE * PAGE + 1);
        assert!(vector < 32 && state.cpl == 0, "RIP is {:#x} and should be {next:#x}", state.rip);
        let at = state.gpr[gpr::RSP].wrapping_sub(HIGH);
        let mut code = [0; 8];
        code.copy_from_slice(&self.world.ram()[at as usize..][..8]);
        Err((vector as u8, state.cr2, u64::from_le_bytes(code)))
    }

    fn access(&mut self, operation: usize, linear: u64, value: u64, user: bool) {
        let (kind, size) = match OPERATIONS[operation].0 {
            Operation::Load(size) => (Kind::Read, size),
            Operation::Store(size) => (Kind::Write, size),
            Operation::Add => (Kind::Write, 8),
        };
        let page = if user { USER } else { HIGH + KERNEL_CODE * PAGE };
        let stub = page + STUBS + operation as u64 * STUB_BYTES;
        let rules = self.prepare(stub, user);

        // What should happen.
        let canonical = |address: u64| (address as i64) << 16 >> 16 == address as i64;
        let last = linear.wrapping_add(size as u64 - 1);
        let mut ram = self.ram.clone();
        let mut places = Vec::new();
        let expected = if !canonical(linear) || !canonical(last) {
            Err((13, 0, 0))
        } else {
            let mut pages = vec![linear];
            if last >> 12 != linear >> 12 {
                pages.push(last & !0xFFF);
            }
            pages.iter().try_for_each(|page| {
                if *page == linear {
                    walks_agree(&self.world.physical, self.world.engine.state(), &ram, rules, linear, kind, self.ac);
                }
                match model::translate(&mut ram, rules, *page, kind) {
                    Ok(gpa) => {
                        places.push(gpa);
                        Ok(())
                    }
                    Err(error) => Err((14, *page, u64::from(error))),
                }
            })
        };
        let bytes: Vec<u64> = (0..size as u64)
            .filter_map(|n| {
                let crossed = (linear & 0xFFF) + n >= PAGE;
                let base = places.get(usize::from(crossed))?;
                Some(if crossed { base + (linear & 0xFFF) + n - PAGE } else { base + n })
            })
            .collect();
        let kept = |gpa: &u64| *gpa < POOL * PAGE && !(ROOT * PAGE..ROOT * PAGE + 510 * 8).contains(gpa);
        if expected.is_ok() && linear >> 39 << 39 != HIGH && bytes.iter().any(kept) {
            // Into the supervisor: its pages are left alone.
            return;
        }

        let mut source = [0u8; 32];
        for (n, byte) in source.iter_mut().enumerate() {
            *byte = (value >> (8 * (n % 8))) as u8;
        }
        let state = self.world.engine.state_mut();
        state.gpr[gpr::RDI] = linear;
        state.gpr[gpr::RAX] = value;
        state.fpu.0[160..176].copy_from_slice(&source[..16]);
        state.fpu.0[576..592].copy_from_slice(&source[16..]);
        let got = self.outcome(stub + OPERATIONS[operation].1.len() as u64);
        let shown = format!("{:?} at {linear:#x} under {rules:x?}", OPERATIONS[operation].0);
        match (got, expected) {
            (Err((vector, _, code)), Err((13, _, error))) => assert_eq!((vector, code), (13, error), "{shown}"),
            _ => assert_eq!(got, expected, "{shown}"),
        }
        if got.is_ok() {
            let read = |gpa: u64| self.ram.get(gpa as usize).copied().unwrap_or_else(|| device_byte(gpa));
            let old: Vec<u8> =
                bytes.iter().map(|gpa| ram.get(*gpa as usize).copied().unwrap_or_else(|| read(*gpa))).collect();
            match OPERATIONS[operation].0 {
                Operation::Load(size) => {
                    let state = self.world.engine.state();
                    let mut got = [0u8; 32];
                    if size <= 8 {
                        got[..8].copy_from_slice(&state.gpr[gpr::RAX].to_le_bytes());
                    } else {
                        got[..16].copy_from_slice(&state.fpu.0[160..176]);
                        got[16..].copy_from_slice(&state.fpu.0[576..592]);
                    }
                    assert_eq!(got[..size], old, "{shown}: what was read");
                }
                Operation::Store(_) => bytes.iter().zip(source).for_each(|(gpa, byte)| store(&mut ram, *gpa, byte)),
                Operation::Add => {
                    let mut word = [0; 8];
                    word.copy_from_slice(&old);
                    let sum = u64::from_le_bytes(word).wrapping_add(value).to_le_bytes();
                    bytes.iter().zip(sum).for_each(|(gpa, byte)| store(&mut ram, *gpa, byte));
                }
            }
        }
        self.ram = ram;
    }

    /// Executes one NOP somewhere.
    fn fetch(&mut self, bytes: &mut Bytes) {
        let user = bytes.u8() & 1 == 1;
        self.last = linear(bytes, self.last);
        let rip = self.last;
        let rules = self.prepare(rip, user);
        let mut ram = self.ram.clone();
        walks_agree(&self.world.physical, self.world.engine.state(), &ram, rules, rip, Kind::Fetch, self.ac);
        let expected = match model::translate(&mut ram, rules, rip, Kind::Fetch) {
            Ok(gpa) if ram.get(gpa as usize) == Some(&0x90) && gpa >= POOL * PAGE => Ok(()),
            // Other code, or none: not for this target.
            Ok(_) => return,
            Err(error) => Err((14, rip, u64::from(error))),
        };
        let got = self.outcome(rip.wrapping_add(1));
        assert_eq!(got, expected, "fetch at {rip:#x} under {rules:x?}");
        self.ram = ram;
    }

    /// RAM must be what the model says, but for the stack.
    fn finish(&mut self) {
        for page in (0..PAGES).filter(|page| *page != STACK) {
            let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            let (got, wanted) = (&self.world.ram()[range.clone()], &self.ram[range]);
            if got != wanted {
                let at = (0..PAGE as usize).find(|at| got[*at] != wanted[*at]).unwrap_or(0);
                panic!("RAM at {:#x} is {:#x} and should be {:#x}", page * PAGE + at as u64, got[at], wanted[at]);
            }
        }
    }
}

fn store(ram: &mut Ram, gpa: u64, byte: u8) {
    if let Some(place) = ram.get_mut(gpa as usize) {
        *place = byte;
    }
}

/// The product's walk, on the engine's RAM, against the model, on a copy. The engine's flags are put back.
fn walks_agree(physical: &PhysMemory, state: &CpuState, ram: &Ram, rules: Rules, linear: u64, kind: Kind, ac: bool) {
    let access = match kind {
        Kind::Read => Access::data(state, false),
        Kind::Write => Access::data(state, true),
        Kind::Fetch => Access::fetch(state),
    };
    assert_eq!(access.user, rules.user);
    assert!(kind == Kind::Fetch || access.smap_active != ac);
    let mut after = ram.clone();
    let expected = model::translate(&mut after, rules, linear, kind);
    // The walk sets flags that the access itself is to find clear: remember what it changes.
    let got = paging::walk(state, physical, linear, access);
    match (&got, &expected) {
        (Ok(translation), Ok(gpa)) => {
            assert_eq!(translation.gpa, *gpa, "{linear:#x} {kind:?} {rules:x?}");
            let entries = &translation.table_entries[..translation.levels.into()];
            for address in entries {
                let at = *address as usize;
                let Some(before) = ram.get(at..at + 8) else { continue };
                let now = physical.read_u64(*address).expect("RAM").to_le_bytes();
                assert_eq!(now, after[at..at + 8], "flags of the entry at {address:#x}");
                // One entry may serve at several levels, which want different flags of it.
                let updated = (0..entries.len()).any(|n| entries[n] == *address && translation.updated >> n & 1 == 1);
                assert_eq!(updated, now != before, "entry at {address:#x} was updated");
            }
            for address in entries {
                let at = *address as usize;
                if let Some(before) = ram.get(at..at + 8) {
                    let mut word = [0; 8];
                    word.copy_from_slice(before);
                    physical.write_u64(*address, u64::from_le_bytes(word));
                }
            }
        }
        (Err(Exception::PageFault { address, error }), Err(wanted)) => {
            assert_eq!((*address, *error), (linear, *wanted), "{kind:?} {rules:x?}");
            assert!(*ram == after, "a fault sets no flags");
        }
        _ => panic!("{linear:#x} {kind:?} {rules:x?}: {got:x?}, and should be {expected:x?}"),
    }
}
