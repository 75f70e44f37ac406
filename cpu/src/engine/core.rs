//! What the soft engine consists of, and where its parts meet.

use super::assembler::Assembler;
use super::block::{CLASSES, Class, InUse, JumpCache, VcpuBlock};
use super::coherence::Used;
use super::deliveries::Deliveries;
use super::mmu::Commit;
use super::mode::Mode;
use super::region::{Region, Reused};
use super::signals;
use super::thunks::{self, Thunks};
use super::translate::{SiteKind, Translator};
use super::translations::{Start, Translations};
use super::{Chaos, EngineConfig, EngineError};
use crate::Icount;
use crate::bus::{Bus, TscLine};
use crate::exception::Exception;
use crate::memory::{PAGE_SIZE, PhysMemory};
use crate::model::ModelFeatures;
use crate::state::{CpuState, rflags};
use iced_x86::Instruction;
use std::mem::offset_of;

/// What the slow path of a memory access left for the dispatcher.
pub enum Pending {
    None,
    /// The instruction must be executed by itself, with every access through Rust.
    Careful,
    /// The block must go on without groups.
    Groupless,
    /// The access raises this.
    Exception(Exception),
}

/// See the module's text. Lives in a box: translated code holds its address.
pub struct Core {
    /// The virtual machine, once it is wanted. Before the memory that it uses: it is dropped first.
    pub direct: Option<Box<super::kvm::Direct>>,
    /// There can be none, or it has failed.
    pub direct_failed: bool,
    pub policy: super::kvm::Policy,
    pub block: *mut VcpuBlock,
    /// Where the block stands.
    _room: Reused,
    pub memory: PhysMemory,
    pub translator: Translator,
    /// Everything that translation leaves behind.
    pub t: Translations,
    pub pending: Pending,
    pub commit: Option<Commit>,
    /// DR6 bits of data breakpoints that the current instruction has hit.
    pub debug_hits: u64,
    /// Pages that began to be watched; blocks must not keep translations across a change.
    pub watched: u64,
    /// Page tables were walked since all address translations were forgotten.
    pub walked: bool,
    pub statistics: super::Statistics,
    pub observed: super::observe::Observed,
    pub used: [[Used; 2]; CLASSES],
    pub itlb_used: [Used; CLASSES],
    pub jumps_used: [InUse; CLASSES],
    /// There are spare stack windows.
    pub spares_used: [bool; 2],
    /// Supervisor code has stack windows in the lower half of the address space.
    pub low_windows: bool,
    /// Guest-physical address of the top-level table that the cached translations come from.
    pub root: u64,
    /// Translations that came from other ones.
    pub parked: super::parked::Parked,
    /// The jump cache gets only what is looked for, see [`super::Engine::look_ahead`].
    pub exact_jumps: bool,
    /// What was seen ahead is in the jump cache.
    pub foreseen: bool,
    pub tlb_mask: u32,
    pub thunks: Thunks,
    pub last_mode: [Mode; CLASSES],
    pub limit: u64,
    pub tsc_line: Option<TscLine>,
    /// Instructions of the running block that are counted in the budget but have not retired.
    pub unretired_now: u64,
    /// A string instruction that has not retired yet, see [`Stop::Unfinished`]. It is kept decoded: what it has
    /// written so far may be its own bytes, or the page tables that it was fetched through.
    pub unfinished: Option<Instruction>,
    /// Exceptions one after another, see [`Stop::Unfinished`].
    pub deliveries: Deliveries,
    pub bus: Option<*mut (dyn Bus + 'static)>,
    pub config: EngineConfig,
    pub chaos: Option<Chaos>,
    pub features: ModelFeatures,
}

// SAFETY: the block and all pointers into code memory are owned by this value; `bus` is set only inside `run`.
unsafe impl Send for Core {}

impl Core {
    pub fn new(memory: PhysMemory, features: ModelFeatures, config: EngineConfig) -> Result<Box<Core>, EngineError> {
        signals::install();
        let page_count = (memory.end() / PAGE_SIZE) as usize;
        let t = Translations::new(config.code_cache_bytes, page_count).map_err(EngineError::CodeMemory)?;
        let mut core = Core::over(memory, features, config, t)?;
        core.t.place(&core.translator.a.bytes);
        core.t.keep_code();
        core.t.clear();
        Ok(core)
    }

    /// A core that begins with translations that another one has frozen, over memory with the same content.
    pub fn branch(
        memory: PhysMemory,
        features: ModelFeatures,
        config: EngineConfig,
        start: &Start,
    ) -> Result<Box<Core>, EngineError> {
        signals::install();
        let page_count = (memory.end() / PAGE_SIZE) as usize;
        let t = Translations::branch(start, config.code_cache_bytes, page_count).map_err(EngineError::CodeMemory)?;
        let Some(t) = t else { return Core::new(memory, features, config) };
        Core::over(memory, features, config, t)
    }

    /// The translator's buffer holds the doors afterwards.
    fn over(
        memory: PhysMemory,
        features: ModelFeatures,
        config: EngineConfig,
        t: Translations,
    ) -> Result<Box<Core>, EngineError> {
        let room = Region::reused(size_of::<VcpuBlock>()).map_err(EngineError::CodeMemory)?;
        let mut a = Assembler::default();
        a.start(0);
        let tlb_mask = (1 << config.tlb_bits.clamp(1, super::block::TLB_BITS_MAX)) - 1;
        let thunks = thunks::emit(&mut a, tlb_mask);
        let mut translator = Translator::new(thunks);
        translator.a = a;
        let chaos = config.chaos_seed.map(Chaos::new);
        let mut core = Box::new(Core {
            direct: None,
            direct_failed: false,
            policy: Default::default(),
            // Zeroed memory is a valid block (integers, bools and arrays of them), and its TLBs are almost empty.
            block: room.region().at(0).cast(),
            _room: room,
            memory,
            translator,
            t,
            pending: Pending::None,
            commit: None,
            debug_hits: 0,
            watched: 0,
            walked: false,
            statistics: Default::default(),
            observed: Default::default(),
            used: Default::default(),
            itlb_used: Default::default(),
            parked: Default::default(),
            low_windows: false,
            jumps_used: Default::default(),
            spares_used: [false; 2],
            root: 0,
            exact_jumps: false,
            foreseen: false,
            tlb_mask,
            thunks,
            last_mode: [Mode(0); CLASSES],
            limit: 0,
            tsc_line: None,
            unretired_now: 0,
            unfinished: None,
            deliveries: Deliveries::default(),
            bus: None,
            config,
            chaos,
            features,
        });
        let address = &raw mut *core as u64;
        // SAFETY: the block was just allocated and nothing else refers to it.
        unsafe {
            let block = &mut *core.block;
            block.core = address;
            block.memory_slow = memory_slow as *const () as u64;
            block.code_start = core.t.code_start();
            block.code_end = core.t.code_end();
            block.fault_exit = core.t.address(thunks.exit_fault as u32);
            for tlb in &mut block.tlb {
                for write in [false, true] {
                    tlb.forget(0, write);
                }
            }
            block.jumps.iter_mut().for_each(JumpCache::seal);
        }
        Ok(core)
    }

    pub fn state(&self) -> &CpuState {
        // SAFETY: translated code is not running while a reference to the core exists.
        unsafe { &(*self.block).state }
    }

    pub fn state_mut(&mut self) -> &mut CpuState {
        // SAFETY: as above.
        unsafe { &mut (*self.block).state }
    }

    pub fn budget(&self) -> i64 {
        // SAFETY: as above.
        unsafe { (*self.block).budget }
    }

    pub fn set_budget(&mut self, budget: i64) {
        // SAFETY: as above.
        unsafe { (*self.block).budget = budget };
    }

    /// The instructions retired before the current one.
    pub fn now(&self) -> Icount {
        Icount(self.limit.wrapping_sub(self.budget() as u64).wrapping_sub(self.unretired_now))
    }

    pub fn set_now(&mut self, now: Icount) {
        self.limit = now.0;
        self.set_budget(0);
        self.observed.forget_moment();
    }

    /// Puts the limit nearer by so many instructions.
    pub fn shorten(&mut self, instructions: i64) {
        self.limit = self.limit.wrapping_sub(instructions as u64);
        let budget = self.budget() - instructions;
        self.set_budget(budget);
        if let Some(line) = &mut self.tsc_line {
            line.at_limit = line.at_limit.wrapping_sub((instructions as u64).wrapping_mul(line.per_instruction));
        }
    }

    /// The bus of the current run.
    pub fn bus(&mut self) -> &mut dyn Bus {
        let bus = self.bus.expect("the bus is used only while the engine runs");
        // SAFETY: `run` was given a reference that outlives it and does not use it itself meanwhile.
        unsafe { &mut *bus }
    }

    pub fn can_interrupt(&self) -> bool {
        let state = self.state();
        state.rflags & rflags::IF != 0 && !state.interrupt_shadow && !self.is_unfinished()
    }

    /// The run has stopped where nothing may happen to the guest, see [`Stop::Unfinished`].
    pub fn is_unfinished(&self) -> bool {
        self.unfinished.is_some() || self.deliveries.is_left()
    }

    /// Goes on with another state.
    pub fn forget_unfinished(&mut self) {
        self.unfinished = None;
        self.deliveries = Deliveries::default();
    }

    pub fn request_interrupt_window(&mut self, wanted: bool) {
        // SAFETY: translated code is not running.
        unsafe { (*self.block).window_wanted = wanted as u32 };
    }
}

/// The slow path of translated memory accesses: a host address, or null with `pending` set.
unsafe extern "sysv64" fn memory_slow(core: *mut Core, linear: u64, site: u32) -> *mut u8 {
    // SAFETY: the address was put into the block by `new`, the core is boxed and alive while its code runs, and
    // `enter` holds no reference meanwhile.
    let core = unsafe { &mut *core };
    let record = core.t.sites[site];
    core.unretired_now = record.unretired as u64;
    if let SiteKind::Memory { resume, .. } = record.kind {
        // SAFETY: translated code is suspended in the thunk that will read this.
        unsafe { (*core.block).slow_resume = core.t.address(resume) };
    }
    core.statistics.slow_accesses += 1;
    let pointer = core.slow_access(linear, site);
    core.unretired_now = 0;
    pointer.unwrap_or(std::ptr::null_mut())
}

const _: () = assert!(offset_of!(VcpuBlock, state) == 0 && CLASSES == Class::KernelAc as usize + 1);
