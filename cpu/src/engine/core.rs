//! The soft engine's heart: finds or makes translations, enters them, and acts on why they come back.

use super::assembler::{Assembler, host};
use super::block::{
    CLASSES, Class, ITLB_ENTRIES, JUMP_ENTRIES, JumpEntry, VcpuBlock, empty_tag, flags_from_slot, flags_to_slot,
    window_of,
};
use super::classify::{self, Treatment};
use super::debug::PENDING;
use super::deliveries::Deliveries;
use super::fpu;
use super::jumps::Jump;
use super::mmu::{Commit, Used};
use super::mode::Mode;
use super::recent::Branch;
use super::region::{Region, Reused};
use super::residents::return_registers;
use super::segmented::is_segmented;
use super::signals::{self, SignalStack};
use super::thunks::{self, Thunks, exit};
use super::translate::{MAX_BLOCK_BYTES, MAX_INSTRUCTIONS, Request, SiteKind, Translator};
use super::translations::{Purpose, Shared, Translations, start};
use super::{Chaos, EngineConfig, EngineError, Stop};
use crate::Icount;
use crate::bus::{Bus, TscLine};
use crate::exception::Exception;
use crate::memory::{PAGE_SIZE, PhysMemory};
use crate::model::ModelFeatures;
use crate::paging::is_canonical;
use crate::state::{CpuState, XsaveImage, control, rflags, seg};
use crate::system::availability::{self, Unit};
use crate::system::{self, ExecError, Outcome, alignment};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;
use std::sync::Arc;

/// More bytes than this raise #GP(0), whatever they say.
const LONGEST_INSTRUCTION: usize = 15;

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

/// What to do with the block found next.
enum Follow {
    Nothing,
    /// Lead this branch to it.
    Link(Branch),
    /// Lead this rel32 of a block that cannot go on here to it, which does without the stack window, or groups.
    Without {
        patch: u32,
        purpose: Purpose,
    },
    /// Enter it in the jump cache.
    Jump,
    /// Lead the entries of this invalid block to it.
    Forward {
        old: u32,
    },
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
    /// There are spare stack windows.
    pub spares_used: [bool; 2],
    /// Guest-physical address of the top-level table that the cached translations come from.
    pub root: u64,
    pub tlb_mask: u32,
    thunks: Thunks,
    last_mode: [Mode; CLASSES],
    limit: u64,
    tsc_line: Option<TscLine>,
    /// Instructions of the running block that are counted in the budget but have not retired.
    pub unretired_now: u64,
    /// A string instruction that has not retired yet, see [`Stop::Unfinished`]. It is kept decoded: what it has
    /// written so far may be its own bytes, or the page tables that it was fetched through.
    pub unfinished: Option<Instruction>,
    /// Exceptions one after another, see [`Stop::Unfinished`].
    deliveries: Deliveries,
    bus: Option<*mut (dyn Bus + 'static)>,
    pub config: EngineConfig,
    chaos: Option<Chaos>,
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
        shared: &Arc<Shared>,
        invalid: &[u32],
    ) -> Result<Box<Core>, EngineError> {
        signals::install();
        let page_count = (memory.end() / PAGE_SIZE) as usize;
        let t = Translations::branch(shared, config.code_cache_bytes, page_count).map_err(EngineError::CodeMemory)?;
        let Some(t) = t else { return Core::new(memory, features, config) };
        let mut core = Core::over(memory, features, config, t)?;
        for index in invalid {
            core.t.kill(*index);
        }
        Ok(core)
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
        let thunks = thunks::emit(&mut a);
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
            spares_used: [false; 2],
            root: 0,
            tlb_mask: (1 << config.tlb_bits.clamp(1, super::block::TLB_BITS_MAX)) - 1,
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
            for tlb in block.tlb.iter_mut().flatten() {
                tlb[0].tag = empty_tag(0);
            }
            // RIP 0 looks at entry 0: make it miss.
            block.jumps[0].rip = 1;
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

    // Code -----------------------------------------------------------------------------------------------------

    /// Forgets all translated code.
    pub fn clear_code(&mut self) {
        self.t.clear();
        for class in 0..CLASSES {
            self.flush_itlb(class, true);
        }
        self.forget_jumps();
        self.direct_clear_code();
        // SAFETY: translated code is not running.
        unsafe {
            (*self.block).itlb = [[0; ITLB_ENTRIES]; CLASSES];
        }
    }

    /// Empties the jump cache: no entry holds an address that looks at it.
    fn forget_jumps(&mut self) {
        // SAFETY: translated code is not running.
        unsafe {
            (*self.block).jumps = [JumpEntry { rip: 0, host: 0 }; JUMP_ENTRIES];
            // RIP 0 looks at entry 0: make it miss.
            (*self.block).jumps[0].rip = 1;
        }
    }

    /// Enters what is known of branches to the page of `rip` from the engine that this one branched off.
    fn inherit_jumps(&mut self, rip: u64) {
        // SAFETY: translated code is not running.
        let jumps = unsafe { &mut (*self.block).jumps };
        for &Jump { rip, checked } in self.t.inherited_jumps(rip) {
            let entry = &mut jumps[rip as usize % JUMP_ENTRIES];
            if entry.host == 0 {
                *entry = JumpEntry { rip, host: self.t.address(checked) };
            }
        }
    }

    /// Translations for engines that branch off, and the blocks of them that are not valid at present.
    pub fn freeze(&mut self) -> std::io::Result<(Arc<Shared>, Vec<u32>)> {
        // SAFETY: translated code is not running.
        let jumps = unsafe { &(*self.block).jumps };
        let known = jumps.iter().filter(|entry| entry.host != 0);
        self.t.freeze(|t| known.map(|entry| Jump { rip: entry.rip, checked: t.offset(entry.host) }).collect())
    }

    /// Makes a block unreachable: whoever enters it looks it up again.
    pub fn kill(&mut self, index: u32) {
        if self.t.kill(index) {
            self.statistics.killed += 1;
        }
    }

    /// A group of accesses of the block had no one translation: if that happens often, it is better translated without.
    pub fn crossing(&mut self, index: u32) {
        if self.t.crossing(index, self.now().0) {
            let start = self.t.blocks[index].start();
            self.t.remember_ungrouped(start);
            self.kill(index);
        }
    }

    /// RAM changed behind the vCPU's back.
    pub fn memory_written(&mut self, gpa: u64, len: u64) {
        let mut at = gpa;
        let end = gpa.saturating_add(len);
        while at < end {
            let page = at / PAGE_SIZE;
            let piece = (PAGE_SIZE - at % PAGE_SIZE).min(end - at);
            if let Some(flags) = self.t.pages.records.get(page as usize).map(|record| record.flags) {
                self.mark_dirty(page);
                self.observe_device(at, piece);
                if flags != 0 {
                    // What a table held before is gone: forget everything that may come from it.
                    if flags & super::pages::IS_TABLE != 0 {
                        self.flush_tlbs(true);
                    }
                    self.watched_write(page, at % PAGE_SIZE, piece, flags & super::pages::HAS_CODE);
                }
            }
            at += piece;
        }
    }

    /// Identity of the code page at `vpage`, entered in the instruction TLB.
    fn code_page(&mut self, vpage: u64, mode: Mode) -> Result<Result<u32, Stop>, Exception> {
        if mode.is_direct() {
            // The soft engine finds out what is wrong, when it gets there.
            return self.direct_page(vpage, mode).map(Ok).ok_or(Exception::GP0);
        }
        let class = mode.class();
        let slot = vpage as usize % ITLB_ENTRIES;
        // SAFETY: translated code is not running.
        let cached = unsafe { (*self.block).itlb[class as usize][slot] };
        let page = &self.t.code_pages[cached];
        if cached != 0 && page.vpage == vpage && page.mode == mode {
            return Ok(Ok(cached));
        }
        let translation = self.walk(vpage << 12, false, true, class)?;
        if self.memory.host(translation.gpa & !(PAGE_SIZE - 1), PAGE_SIZE).is_none() {
            return Ok(Err(self.unsupported("code outside RAM", &[])));
        }
        let page = (translation.gpa / PAGE_SIZE) as u32;
        let identity = self.t.identity(vpage, page, mode);
        // SAFETY: as above.
        unsafe { (*self.block).itlb[class as usize][slot] = identity };
        let kept = super::mmu::survives_address_space(vpage << 12, translation.global);
        self.itlb_used[class as usize].add(slot, kept);
        Ok(Ok(identity))
    }

    fn unsupported(&self, what: &str, bytes: &[u8]) -> Stop {
        Stop::Unsupported { rip: self.state().rip, bytes: bytes.to_vec(), what: what.to_string() }
    }

    /// The block at RIP, translated if need be. It may be `guess`: a block that was valid once.
    fn find(&mut self, purpose: Purpose, guess: Option<u32>) -> Result<Result<u32, Stop>, Exception> {
        let state = self.state();
        let rip = state.rip;
        let mode = Mode::of(state);
        let class = mode.class() as usize;
        if mode != self.last_mode[class] {
            // Entries of the instruction TLB stand for pages in a mode.
            self.flush_itlb(class, true);
            self.last_mode[class] = mode;
        }
        if mode.is_64bit() && !is_canonical(rip) {
            return Err(Exception::GP0);
        }
        let page = self.code_page(rip >> 12, mode).map_err(|exception| match exception {
            Exception::PageFault { error, .. } => Exception::PageFault { address: rip, error },
            other => other,
        })?;
        let identity = match page {
            Ok(identity) => identity,
            Err(stop) => return Ok(Err(stop)),
        };
        let start = start(identity, rip);
        let known = guess.filter(|index| self.t.is_valid(*index, start, purpose));
        if let Some(index) = known.or_else(|| self.t.find(start, purpose)) {
            match self.t.blocks[index].second {
                None => return Ok(Ok(index)),
                Some((vpage, second)) => match self.code_page(vpage, mode)? {
                    Ok(now) if now == second => return Ok(Ok(index)),
                    Ok(_) => self.kill(index),
                    Err(stop) => return Ok(Err(stop)),
                },
            }
        }
        self.translate(identity, mode, purpose)
    }

    /// Another block can be translated without forgetting any.
    pub fn has_room_for_block(&self) -> bool {
        self.t.has_room(MAX_BLOCK_BYTES)
    }

    pub fn translate(&mut self, identity: u32, mode: Mode, purpose: Purpose) -> Result<Result<u32, Stop>, Exception> {
        if !self.has_room_for_block() {
            self.clear_code();
            return self.find(purpose, None);
        }
        let rip = self.state().rip;
        let page = self.t.code_pages[identity].page;
        let offset = (rip & 0xFFF) as usize;
        let host = self.memory.host(u64::from(page) * PAGE_SIZE, PAGE_SIZE).expect("code pages are RAM");
        // SAFETY: the page is mapped RAM; the guest does not run while it is read.
        let code = unsafe { std::slice::from_raw_parts(host, PAGE_SIZE as usize) };
        let (longest, grouping, resident_uses, hot) = match &mut self.chaos {
            Some(chaos) => (
                chaos.below(self.config.max_block_instructions as u64) as u32 + 1,
                chaos.below(2) == 0,
                1 + chaos.below(8) as u8,
                chaos.below(4) == 0,
            ),
            None => (self.config.max_block_instructions, true, self.config.resident_uses, mode.is_direct()),
        };
        let index = self.t.blocks.len() as u32;
        let cuts = self.observed.cuts();
        let mut request = Request {
            rip,
            code,
            at: offset,
            mode,
            max_instructions: match purpose {
                Purpose::Ordinary | Purpose::Windowless | Purpose::Ungrouped => longest.clamp(1, MAX_INSTRUCTIONS),
                Purpose::Short(most) => most as u32,
                Purpose::Careful => 1,
            },
            careful: purpose == Purpose::Careful,
            window: purpose == Purpose::Ordinary && !mode.is_direct(),
            hot: hot || self.t.is_hot(start(identity, rip)),
            heats: purpose == Purpose::Ordinary && !mode.is_direct(),
            grouping: grouping
                && !mode.is_direct()
                && purpose != Purpose::Ungrouped
                && self.config.grouping
                && !self.t.is_ungrouped(start(identity, rip)),
            resident_uses,
            isolated: !purpose.is_linked(),
            undefined: self.config.undefined,
            block: index,
            first_site: self.t.sites.len() as u32,
            first_emulated: self.t.emulated.len() as u32,
            page_identity: identity,
            second_page: None,
            tlb_mask: self.tlb_mask,
            cuts: &cuts,
        };
        self.statistics.translated += 1;
        if purpose != Purpose::Ordinary {
            self.statistics.translated_special += 1;
        }
        let origin = self.t.next_code();
        let mut straddling = [0u8; 15];
        let mut second_physical = None;
        let archive = self.config.archive.as_deref();
        let archive = archive.filter(|_| purpose.is_linked() && self.chaos.is_none() && request.cuts.is_empty());
        let pasted = archive.and_then(|archive| archive.paste(&request, origin, &mut self.translator));
        self.statistics.pasted += u64::from(pasted.is_some());
        let translated = match pasted {
            Some(placed) => Ok(placed),
            None => self.translator.translate(&request, origin).inspect(|placed| {
                if let Some(archive) = archive {
                    archive.add(&request, origin, &self.translator, placed);
                }
            }),
        };
        let placed = match translated {
            Ok(placed) => placed,
            Err(_) => {
                // The instruction goes on in the next page.
                let vpage = (rip >> 12).wrapping_add(1);
                let next_linear = vpage << 12;
                if mode.is_64bit() && !is_canonical(next_linear) {
                    return Err(Exception::GP0);
                }
                let second = match self.code_page(vpage & (u64::MAX >> 12), mode)? {
                    Ok(second) => second,
                    Err(stop) => return Ok(Err(stop)),
                };
                let second_page = self.t.code_pages[second].page;
                second_physical = Some(second_page);
                let first = &code[offset.max(PAGE_SIZE as usize - 15)..];
                let first_len = first.len();
                straddling[..first_len].copy_from_slice(first);
                let host = self.memory.host(u64::from(second_page) * PAGE_SIZE, PAGE_SIZE).expect("RAM");
                // SAFETY: as above.
                let rest = unsafe { std::slice::from_raw_parts(host, 15) };
                straddling[first_len..].copy_from_slice(&rest[..15 - first_len]);
                (request.code, request.at) = (&straddling, 0);
                request.second_page = Some((vpage, second));
                self.translator.translate(&request, origin).expect("fifteen bytes hold any instruction")
            }
        };
        let second = request.second_page;
        self.keep_translation(rip, identity, second, purpose, &placed);
        let in_first = placed.guest_len.min((PAGE_SIZE as usize - offset) as u32);
        let before = placed.guest_before;
        if self.t.pages.add_block(page, index, offset as u32 - before, before + in_first) {
            self.begin_to_watch(page.into());
        }
        if let Some(second_page) = second_physical
            && self.t.pages.add_block(second_page, index, 0, placed.guest_len - in_first)
        {
            self.begin_to_watch(second_page.into());
        }
        Ok(Ok(index))
    }

    /// Puts what the translator has just made where it can be executed and found.
    pub fn keep_translation(
        &mut self,
        rip: u64,
        identity: u32,
        second: Option<(u64, u32)>,
        purpose: Purpose,
        placed: &super::translate::Placed,
    ) {
        assert!(self.translator.a.bytes.len() <= MAX_BLOCK_BYTES, "a block fits its bound");
        self.t.place(&self.translator.a.bytes);
        self.translator.sites.drain(..).for_each(|site| self.t.sites.push(site));
        self.translator.emulated.drain(..).for_each(|instruction| self.t.emulated.push(instruction));
        self.translator.faults.drain(..).for_each(|fault| self.t.faults.push(fault));
        self.t.add_block(rip, identity, second, purpose, placed);
    }

    // Running --------------------------------------------------------------------------------------------------

    /// Executes until the icount is `limit`, or another reason to stop.
    pub fn run(&mut self, limit: Icount, bus: &mut dyn Bus) -> Stop {
        let now = self.now().0;
        assert!(limit.0 >= now, "the limit is not in the past");
        self.limit = limit.0.min(now + (1 << 62));
        self.set_budget((self.limit - now) as i64);
        let bus: *mut (dyn Bus + '_) = bus;
        // SAFETY: only the lifetime is forgotten; `self.bus` is cleared before `run` returns.
        self.bus = Some(unsafe { std::mem::transmute::<*mut (dyn Bus + '_), *mut (dyn Bus + 'static)>(bus) });
        // SAFETY: the vCPU block is owned by this core, and only signal handlers use this part of it.
        let stack = SignalStack::install(unsafe { &mut (*self.block).signal_stack });
        let previous = signals::gs_base();
        signals::set_gs_base(self.block as u64);
        self.load_fpu();
        if self.unfinished.is_none() {
            self.debug_hits = 0;
        }
        let limit = Icount(self.limit);
        self.tsc_line = self.bus().tsc_line(limit);
        let stop = self.finish_instruction().unwrap_or_else(|| self.dispatch());
        self.policy_leave();
        self.observe_retirement();
        self.store_fpu();
        fpu::reset_host();
        signals::set_gs_base(previous);
        drop(stack);
        self.bus = None;
        stop
    }

    pub fn load_fpu(&mut self) {
        // SAFETY: translated code is not running; the fields are distinct.
        let (state, ymm, upper) =
            unsafe { (&(*self.block).state.fpu, &mut (*self.block).ymm, &mut (*self.block).upper_in_use) };
        fpu::load(state, ymm);
        *upper = state.upper_in_use().into();
    }

    pub fn store_fpu(&mut self) {
        // SAFETY: as above.
        let (state, ymm): (&mut XsaveImage, _) = unsafe { (&mut (*self.block).state.fpu, &(*self.block).ymm) };
        fpu::store(state, ymm);
    }

    pub fn enter(&mut self, target: u32) -> u32 {
        // SAFETY: the thunk follows the System V convention; every register that translated code uses is saved by
        // it or is caller-saved. `self` is only reached through the raw pointer in the block meanwhile.
        unsafe {
            let block = self.block;
            (*block).flags = flags_to_slot((*block).state.rflags);
            (*block).window_distance = (*block).windows[window_of(self.current_class() as usize)].distance;
            let door = self.t.address(self.thunks.enter as u32);
            let enter: extern "sysv64" fn(u64) -> u32 = std::mem::transmute(door);
            let argument = enter(self.t.address(target));
            (*block).state.rflags = flags_from_slot((*block).state.rflags, (*block).flags);
            argument
        }
    }

    /// Tells translated code whether it may read the time-stamp counter.
    fn offer_tsc(&mut self) {
        let state = self.state();
        let allowed = state.cpl == 0 || state.cr4 & control::CR4_TSD == 0;
        let line = self.tsc_line.filter(|_| allowed);
        // SAFETY: translated code is not running.
        let block = unsafe { &mut *self.block };
        block.tsc_known = line.is_some().into();
        if let Some(TscLine { at_limit, per_instruction }) = line {
            (block.tsc_at_limit, block.tsc_per_instruction) = (at_limit, per_instruction);
        }
    }

    fn dispatch(&mut self) -> Stop {
        let mut follow = Follow::Nothing;
        let mut careful = false;
        let mut short = false;
        let mut ungrouped = false;
        // One instruction that came back from the virtual machine.
        let mut single = false;
        let mut clears = self.t.clears;
        loop {
            self.policy_look();
            let budget = self.budget();
            debug_assert!(budget >= 0);
            self.observe_retirement();
            if self.observed.stops() {
                return Stop::Observed;
            }
            if budget == 0 && !self.policy_goes_on() {
                return Stop::Limit;
            }
            let budget = self.budget();
            self.deliveries.go_on();
            if self.state().halted {
                return Stop::Halted;
            }
            // SAFETY: translated code is not running.
            let window_wanted = unsafe { (*self.block).window_wanted != 0 };
            if window_wanted && self.can_interrupt() {
                return Stop::InterruptWindow;
            }
            if self.deliveries.leave(self.config.patience) {
                return Stop::Unfinished;
            }
            self.upset();
            if is_segmented(self.state()) {
                (follow, careful, short) = (Follow::Nothing, false, false);
                if let Some(stop) = self.step_segmented() {
                    return stop;
                }
                continue;
            }
            let debug = self.debug_active();
            let state = self.state_mut();
            let trap = state.rflags & rflags::TF != 0;
            // RF lasts until an instruction retires. A fault before that pushes it set whatever it was.
            let resume = state.rflags & rflags::RF != 0;
            state.rflags &= !rflags::RF;
            let shadow = std::mem::take(&mut state.interrupt_shadow);
            let held = std::mem::take(&mut state.dr[PENDING]);
            // Accesses that are compared with breakpoints or checked for alignment.
            let each = debug || alignment::is_checked(self.state());
            let alone = shadow || trap || careful || each || std::mem::take(&mut single) || self.records_execution();
            careful |= each;
            if debug && !resume {
                let hits = self.instruction_breakpoint(held);
                if hits != 0 {
                    if let Some(stop) = self.raise(Exception::Debug { dr6: hits }) {
                        return stop;
                    }
                    careful = false;
                    continue;
                }
            }
            let purpose = if careful {
                Purpose::Careful
            } else if alone {
                Purpose::Short(1)
            } else if short {
                // The largest power of two that the budget covers.
                let most = budget.min(MAX_INSTRUCTIONS as i64) as u64;
                Purpose::Short(1 << most.ilog2())
            } else if std::mem::take(&mut ungrouped) {
                Purpose::Ungrouped
            } else if let Follow::Without { purpose, .. } = follow {
                purpose
            } else {
                Purpose::Ordinary
            };
            self.offer_tsc();
            if purpose == Purpose::Ordinary && !resume && held == 0 && self.direct_wanted() {
                follow = Follow::Nothing;
                single = true;
                if let Some(stop) = self.run_direct() {
                    return stop;
                }
                continue;
            }
            // Most often only the instruction TLB did not know the page.
            let guess = if let Follow::Forward { old } = follow { Some(old) } else { None };
            let index = match self.find(purpose, guess) {
                Ok(Ok(index)) => index,
                Ok(Err(stop)) => return stop,
                Err(exception) => {
                    follow = Follow::Nothing;
                    careful = false;
                    short = false;
                    if let Some(stop) = self.raise(exception) {
                        return stop;
                    }
                    continue;
                }
            };
            if self.observe_entry() {
                let state = self.state_mut();
                state.interrupt_shadow = shadow;
                state.rflags |= if resume { rflags::RF } else { 0 };
                return Stop::Observed;
            }
            // Since `follow` was noted the code it is about may have been forgotten.
            let forgotten = std::mem::replace(&mut clears, self.t.clears) != self.t.clears;
            if purpose.is_linked() && !forgotten && self.config.chaining {
                self.follow(&follow, index);
            }
            follow = Follow::Nothing;
            short = false;
            let was_careful = std::mem::take(&mut careful);
            let before = self.now();
            let mut traps = None;
            let mut stop = None;
            let entry = self.t.blocks[index].entry;
            let argument = self.enter(entry);
            self.statistics.entries += 1;
            let mut attention = false;
            if was_careful {
                if matches!(argument, exit::ABORTED | exit::FAULT) {
                    self.commit = None;
                    self.observe_abort();
                } else {
                    self.commit();
                    attention = self.bus().attention();
                }
            }
            match argument {
                exit::FAULT => {
                    let exception = self.host_fault();
                    if let Some(stop) = self.raise(exception) {
                        return stop;
                    }
                    continue;
                }
                exit::ABORTED => {
                    // SAFETY: translated code is not running.
                    let site = unsafe { (*self.block).slow_site };
                    self.rewind(site);
                    match std::mem::replace(&mut self.pending, Pending::None) {
                        Pending::Careful => {
                            // It has not retired: a shadow that covers it still does.
                            self.hold(shadow, held);
                            self.statistics.careful += 1;
                            careful = true;
                        }
                        Pending::Groupless => {
                            self.hold(shadow, held);
                            // Who goes instruction by instruction has no other way to get past it.
                            ungrouped = purpose.is_linked();
                            careful = !ungrouped;
                        }
                        Pending::Exception(exception) => {
                            let exception = self.first_exception(exception);
                            if let Some(stop) = self.raise(exception) {
                                return stop;
                            }
                            continue;
                        }
                        Pending::None => unreachable!("the slow path leaves a reason"),
                    }
                }
                site => match self.t.sites[site].kind {
                    SiteKind::Link { target, patch, same_stack } => {
                        self.statistics.link += 1;
                        let source = self.t.sites[site].block;
                        self.state_mut().rip = target;
                        if self.t.blocks[source].purpose.is_linked() {
                            follow = Follow::Link(Branch { patch, source, same_stack });
                        }
                    }
                    SiteKind::Indirect { popped } => {
                        self.statistics.indirect += 1;
                        let target = self.state().rip;
                        if Mode::of(self.state()).is_64bit() && !is_canonical(target) {
                            // The branch itself raises it.
                            self.rewind(site);
                            let state = self.state_mut();
                            state.gpr[4] = state.gpr[4].wrapping_sub(popped as u64);
                            if let Some(stop) = self.raise(Exception::GP0) {
                                return stop;
                            }
                            continue;
                        }
                        if purpose.is_linked() {
                            follow = Follow::Jump;
                        }
                    }
                    SiteKind::Budget => {
                        self.statistics.budget += 1;
                        self.rewind(site);
                        short = !self.policy_goes_on();
                    }
                    SiteKind::Hot => {
                        self.statistics.hot += 1;
                        self.rewind(site);
                        self.hold(shadow, held);
                        let old = self.t.sites[site].block;
                        self.t.supersede(old);
                        follow = Follow::Forward { old };
                    }
                    SiteKind::Window { patch } => {
                        self.statistics.window += 1;
                        self.rewind(site);
                        self.hold(shadow, held);
                        if !self.move_window(self.t.sites[site].block) {
                            follow = Follow::Without { patch, purpose: Purpose::Windowless };
                        }
                    }
                    SiteKind::Crossing { patch } => {
                        self.statistics.crossing += 1;
                        self.rewind(site);
                        self.hold(shadow, held);
                        // Who goes instruction by instruction has no other way to get past it.
                        careful = !purpose.is_linked();
                        if !careful {
                            follow = Follow::Without { patch, purpose: Purpose::Ungrouped };
                        }
                    }
                    SiteKind::Lookup => {
                        self.statistics.lookup += 1;
                        self.rewind(site);
                        self.hold(shadow, held);
                        let old = self.t.sites[site].block;
                        // A block with groups may be where it came from: it would only lead here again.
                        ungrouped = self.t.blocks[old].purpose == Purpose::Ungrouped;
                        follow = Follow::Forward { old };
                    }
                    SiteKind::Emulate { instruction } => {
                        self.rewind(site);
                        if self.budget() == 0 && !self.policy_goes_on() {
                            return Stop::Limit;
                        }
                        let instruction = self.t.emulated[instruction];
                        self.statistics.emulate(instruction.mnemonic());
                        // The shadow covers the instruction just before this one, unless this is the first.
                        stop = self.emulate(&instruction);
                        if stop == Some(Stop::Unfinished) {
                            self.state_mut().dr[PENDING] = held;
                            return Stop::Unfinished;
                        }
                        if self.now() > before {
                            traps = Some(self.traps_behind(&instruction, trap, held));
                        }
                    }
                    SiteKind::Memory { .. } | SiteKind::Fault { .. } => unreachable!("these leave by other doors"),
                },
            }
            if (trap || debug || held != 0) && traps.is_none() && self.now() > before {
                traps = Some(self.plain_traps(trap, held));
            }
            let stop = stop.or(attention.then_some(Stop::Attention));
            if let Some(stop) = self.behind(stop, traps.unwrap_or(0)) {
                return stop;
            }
        }
    }

    /// Does the rest of an instruction that was left unfinished, or the next part of it; Some if the run stops there.
    fn finish_instruction(&mut self) -> Option<Stop> {
        let instruction = self.unfinished?;
        if self.budget() == 0 {
            return Some(Stop::Limit);
        }
        let before = self.now();
        let held = std::mem::take(&mut self.state_mut().dr[PENDING]);
        let stop = self.emulate(&instruction);
        if stop == Some(Stop::Unfinished) {
            self.state_mut().dr[PENDING] = held;
            return stop;
        }
        // With TF set it would have been left by a trap.
        let traps = if self.now() > before { self.traps_behind(&instruction, false, held) } else { 0 };
        self.behind(stop, traps)
    }

    /// The instruction has not retired: what covered it still does.
    fn hold(&mut self, shadow: bool, held: u64) {
        let state = self.state_mut();
        state.interrupt_shadow = shadow;
        state.dr[PENDING] = held;
    }

    /// Behind an instruction that left with `stop`: raises #DB with these bits of DR6, if any, and returns what is
    /// then left to say.
    pub fn behind(&mut self, stop: Option<Stop>, traps: u64) -> Option<Stop> {
        self.debug_hits = 0;
        if traps == 0 || matches!(stop, Some(Stop::TripleFault | Stop::Unsupported { .. })) {
            return stop;
        }
        let trapped = self.raise(Exception::Debug { dr6: traps });
        // The trap has woken a vCPU that has just halted.
        trapped.or(stop.filter(|stop| *stop != Stop::Halted))
    }

    /// Sets RIP and the budget to what they were at a site.
    pub fn rewind(&mut self, site: u32) {
        let site = self.t.sites[site];
        self.state_mut().rip = site.rip;
        let budget = self.budget() + site.unretired as i64;
        self.set_budget(budget);
    }

    fn follow(&mut self, follow: &Follow, index: u32) {
        let target = &self.t.blocks[index];
        if self.observed.is_cut(target.rip) {
            return;
        }
        match *follow {
            Follow::Nothing => {}
            Follow::Link(branch) => self.t.link_to(branch, index),
            Follow::Jump => {
                let (rip, checked) = (target.rip, target.checked);
                let entry = JumpEntry { rip, host: self.t.address(checked) };
                // SAFETY: translated code is not running.
                unsafe { (*self.block).jumps[rip as usize % JUMP_ENTRIES] = entry };
                self.inherit_jumps(rip);
            }
            Follow::Without { patch, .. } => {
                let entry = target.entry;
                self.t.link(patch, entry);
            }
            Follow::Forward { old } => {
                // The jump cache may have led here: what is at this address now is another page or mode.
                let (rip, checked) = (target.rip, self.t.address(target.checked));
                // SAFETY: translated code is not running.
                let entry = unsafe { &mut (*self.block).jumps[rip as usize % JUMP_ENTRIES] };
                if entry.rip == rip && rip != 0 {
                    entry.host = checked;
                }
                let invalid = &self.t.blocks[old];
                if !invalid.valid
                    && invalid.purpose.is_linked()
                    && (invalid.purpose == Purpose::Ungrouped) == (target.purpose == Purpose::Ungrouped)
                    && invalid.identity == target.identity
                    && invalid.rip == target.rip
                {
                    let (old_checked, old_entry, old_inner) = (invalid.checked, invalid.entry, invalid.inner);
                    let (checked, entry) = (target.checked, target.entry);
                    self.t.patch_jmp(old_checked, checked);
                    self.t.patch_jmp(old_entry, entry);
                    if old_inner != old_entry {
                        self.t.patch_jmp(old_inner, entry);
                    }
                    self.t.lead_past(old, index);
                }
            }
        }
    }

    /// In a randomised engine, now and then forgets something that must not matter.
    fn upset(&mut self) {
        let Some(chaos) = &mut self.chaos else { return };
        let draw = chaos.next();
        if draw % 61 == 0 {
            self.flush_tlbs(true);
        }
        if draw % 20011 == 7 {
            self.clear_code();
        }
        if draw % 127 == 3 {
            self.forget_jumps();
        }
        if draw % 31 == 5 {
            self.forget_windows();
        }
    }

    /// The exception that a host signal in translated code stands for; RIP and registers are the instruction's.
    pub fn host_fault(&mut self) -> Exception {
        // What the instruction would have stored is not to be stored with the next one.
        self.commit = None;
        // SAFETY: translated code is not running.
        let (vector, rip, flags, address) = unsafe {
            let b = &*self.block;
            (b.fault_vector, b.fault_rip, b.fault_flags, b.fault_address)
        };
        let faults = &self.t.faults;
        let found = faults.binary_search_by_key(&self.t.offset(rip), |f| f.0);
        let Ok(at) = found else {
            panic!("exception {vector} at {rip:#x} (address {address:#x}) in translated code without a fault site");
        };
        let index = faults[at as u32].1;
        let site = self.t.sites[index];
        let SiteKind::Fault { flags_in_host, borrowed, residents } = site.kind else { unreachable!("a fault site") };
        if flags_in_host {
            let state = self.state_mut();
            state.rflags = state.rflags & !rflags::STATUS | flags & rflags::STATUS;
        }
        // SAFETY: translated code is not running.
        let (temporary, evicted, r11) = unsafe {
            let b = &*self.block;
            (b.temporary, b.evicted, b.fault_r11)
        };
        let mut budget = self.budget();
        let elsewhere = |register, evicted: u64| match register {
            host::R15 => std::mem::replace(&mut budget, evicted as i64) as u64,
            _ => r11,
        };
        let gpr = &mut self.state_mut().gpr;
        return_registers(gpr, (borrowed, &temporary), (residents, &evicted), elsewhere);
        self.set_budget(budget);
        self.rewind(index);
        match vector {
            0 => Exception::DivideError,
            6 => Exception::InvalidOpcode,
            13 => Exception::GP0,
            16 => Exception::FloatingPoint,
            19 if self.state().cr4 & control::CR4_OSXMMEXCPT == 0 => Exception::InvalidOpcode,
            19 => Exception::Simd,
            _ => panic!("exception {vector} at {rip:#x}, address {address:#x}, in translated code"),
        }
    }

    /// The memory operand is refused for its alignment alone.
    fn is_misaligned(&self, instruction: &Instruction) -> bool {
        let state = self.state();
        let base = match instruction.memory_segment() {
            Register::FS => state.seg[seg::FS].base,
            Register::GS => state.seg[seg::GS].base,
            _ => 0,
        };
        let linear = base.wrapping_add(system::effective_offset(state, instruction));
        classify::must_be_aligned(instruction) && linear % instruction.memory_size().size() as u64 != 0
    }

    /// What a failed memory access of the instruction at RIP raises first: pending x87 errors come before the
    /// operand, its address before its alignment, and that before its page.
    fn first_exception(&mut self, exception: Exception) -> Exception {
        if !matches!(exception, Exception::PageFault { .. } | Exception::GP0 | Exception::AlignmentCheck) {
            return exception;
        }
        let Some(instruction) = self.instruction_at_rip() else { return exception };
        let waits = !matches!(instruction.mnemonic(), Mnemonic::Fnstcw | Mnemonic::Fnstsw);
        if availability::unit(&instruction) == Unit::X87 && waits && fpu::error_pending() {
            return Exception::FloatingPoint;
        }
        if exception == Exception::AlignmentCheck {
            return exception;
        }
        let operand = (0..instruction.op_count()).find(|i| instruction.op_kind(*i) == OpKind::Memory);
        if instruction.mnemonic() == Mnemonic::Pop && operand.is_some() {
            return self.first_of_pop(exception, &instruction);
        }
        let bit_string = classify::treatment(&instruction, Mode::of(self.state())) == Treatment::BitString;
        match operand.filter(|_| !bit_string).map(|i| system::effective_address(self.state(), &instruction, i)) {
            Some(Err(_)) if self.is_misaligned(&instruction) => Exception::GP0,
            Some(Err(address)) => address,
            Some(Ok(_)) => {
                if self.is_misaligned(&instruction) {
                    return Exception::GP0;
                }
                // Its own operand has an address: then it was the stack that had none.
                if exception == Exception::GP0 { Exception::StackFault { error: 0 } } else { exception }
            }
            None if exception == Exception::GP0
                && (instruction.is_stack_instruction() || bit_string && in_stack_segment(&instruction)) =>
            {
                Exception::StackFault { error: 0 }
            }
            None => exception,
        }
    }

    /// POP to memory reads the stack before it computes an address, from the new RSP.
    fn first_of_pop(&self, exception: Exception, instruction: &Instruction) -> Exception {
        let state = self.state();
        let bytes = instruction.stack_pointer_increment() as u64;
        let wide = state.is_64bit();
        let rsp = if wide { state.gpr[4] } else { state.gpr[4] & 0xFFFF_FFFF };
        if wide && !(is_canonical(rsp) && is_canonical(rsp.wrapping_add(bytes - 1))) {
            return Exception::StackFault { error: 0 };
        }
        if let Exception::PageFault { address, .. } = exception
            && address.wrapping_sub(rsp) < bytes
        {
            return exception;
        }
        let mut popped = state.clone();
        popped.gpr[4] = rsp.wrapping_add(bytes);
        system::effective_address(&popped, instruction, 0).err().unwrap_or(exception)
    }

    /// The instruction at RIP, decoded again; None if it cannot be read any more.
    pub fn instruction_at_rip(&mut self) -> Option<Instruction> {
        let mode = Mode::of(self.state());
        let (rip, class) = (self.state().rip, mode.class());
        let mut bytes = [0u8; 15];
        let in_page = (PAGE_SIZE - rip % PAGE_SIZE).min(15) as usize;
        self.read_linear(rip, &mut bytes[..in_page], class).ok()?;
        let mut len = in_page;
        if in_page < 15 && self.read_linear(rip.wrapping_add(in_page as u64), &mut bytes[in_page..], class).is_ok() {
            len = 15;
        }
        let instruction = Decoder::with_ip(mode.bitness(), &bytes[..len], rip, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Delivers an exception; Some if the run stops there.
    pub fn raise(&mut self, exception: Exception) -> Option<Stop> {
        self.statistics.exceptions += 1;
        self.state_mut().interrupt_shadow = false;
        let state: *mut CpuState = self.state_mut();
        // SAFETY: the state lives in the vCPU block, which the delivery reaches through this reference alone.
        let result = system::deliver_exception(unsafe { &mut *state }, exception, self);
        // What the delivery's own accesses hit is nobody's: it must not wait for whichever instruction is next.
        self.debug_hits = 0;
        if result.is_err() {
            return Some(Stop::TripleFault);
        }
        self.deliveries.note(self.now());
        // The instruction that raised it, or the delivery itself, may have used the bus.
        self.bus().attention().then_some(Stop::Attention)
    }

    pub fn can_nmi(&self) -> bool {
        let state = self.state();
        !state.nmi_blocked && !state.interrupt_shadow
    }

    /// Delivers an external interrupt between two instructions; without a vector, an NMI.
    pub fn interrupt(&mut self, vector: Option<u8>, bus: &mut dyn Bus) -> Result<(), Stop> {
        let accepted = if vector.is_some() { self.can_interrupt() } else { self.can_nmi() };
        assert!(accepted, "interrupts are delivered when the guest accepts them");
        let bus: *mut (dyn Bus + '_) = bus;
        // SAFETY: only the lifetime is forgotten; cleared below.
        self.bus = Some(unsafe { std::mem::transmute::<*mut (dyn Bus + '_), *mut (dyn Bus + 'static)>(bus) });
        let state: *mut CpuState = self.state_mut();
        // SAFETY: as in `raise`.
        let state = unsafe { &mut *state };
        state.halted = false;
        *self.statistics.interrupts.entry(vector.unwrap_or(2)).or_default() += 1;
        let result = match vector {
            Some(vector) => system::deliver_interrupt(state, vector, self),
            None => system::deliver_nmi(state, self),
        };
        self.debug_hits = 0;
        self.bus = None;
        result.map_err(|_| Stop::TripleFault)
    }

    /// Executes one instruction in Rust; Some if the run stops after it.
    pub fn emulate(&mut self, instruction: &Instruction) -> Option<Stop> {
        match self.permitted(instruction) {
            Ok(()) => {}
            Err(exception) => return self.raise(exception),
        }
        let touches_fpu = touches_fpu(instruction);
        if touches_fpu {
            self.store_fpu();
        }
        let nmi_blocked = self.state().nmi_blocked;
        let state: *mut CpuState = self.state_mut();
        self.unfinished = None;
        // SAFETY: as in `raise`.
        let result = system::execute(unsafe { &mut *state }, instruction, self);
        if touches_fpu {
            self.load_fpu();
        }
        let stop = match result {
            Ok(Outcome::Next) => {
                let budget = self.budget() - 1;
                self.set_budget(budget);
                None
            }
            Ok(Outcome::Halt) => {
                let budget = self.budget() - 1;
                self.set_budget(budget);
                self.state_mut().halted = true;
                Some(Stop::Halted)
            }
            Ok(Outcome::Unfinished) => {
                self.unfinished = Some(*instruction);
                Some(Stop::Unfinished)
            }
            Err(ExecError::Exception(exception)) => self.raise(exception),
            Err(ExecError::Unsupported(what)) => match self.execute_natively(instruction) {
                Some(Ok(())) => {
                    self.state_mut().interrupt_shadow = false;
                    let budget = self.budget() - 1;
                    self.set_budget(budget);
                    None
                }
                Some(Err(exception)) => self.raise(exception),
                None => Some(self.report_unsupported(what, instruction)),
            },
        };
        // Behind IRET an NMI may have been waiting.
        let unblocked = nmi_blocked && !self.state().nmi_blocked;
        if stop.is_none() && (unblocked || self.bus().attention()) {
            return Some(Stop::Attention);
        }
        stop
    }

    fn report_unsupported(&mut self, what: &str, instruction: &Instruction) -> Stop {
        let mut bytes = [0u8; 15];
        let len = instruction.len();
        let (rip, class) = (self.linear_rip(), self.current_class());
        let read = self.read_linear(rip, &mut bytes[..len], class).is_ok();
        self.unsupported(what, if read { &bytes[..len] } else { &[] })
    }

    /// The checks that do not depend on the operands: is the instruction in the model, is its unit switched on.
    fn permitted(&self, instruction: &Instruction) -> Result<(), Exception> {
        if instruction.is_invalid() && instruction.len() >= LONGEST_INSTRUCTION {
            return Err(Exception::GP0);
        }
        let state = self.state();
        if !state.is_64bit()
            && classify::writes_code_segment(instruction)
            && !classify::looks_at_code_segment_itself(instruction)
        {
            use Mnemonic::{Fnsave, Fnstcw, Fnstenv, Fnstsw};
            let waits = availability::unit(instruction) == Unit::X87
                && !matches!(instruction.mnemonic(), Fnsave | Fnstcw | Fnstenv | Fnstsw);
            return Err(if waits && fpu::error_pending() { Exception::FloatingPoint } else { Exception::GP0 });
        }
        availability::refused(state, instruction).map_or(Ok(()), Err)
    }
}

/// The memory operand belongs to the stack segment.
fn in_stack_segment(instruction: &Instruction) -> bool {
    let base = instruction.memory_base().full_register();
    matches!(base, Register::RSP | Register::RBP)
        && !matches!(instruction.segment_prefix(), Register::FS | Register::GS)
}

/// The emulation of this instruction reads or writes `CpuState::fpu`.
fn touches_fpu(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    availability::unit(instruction) != Unit::Integer
        || matches!(
            instruction.mnemonic(),
            Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xrstor | Xrstor64 | Ldmxcsr | Vldmxcsr | Xsetbv
        )
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

const _: () = assert!(offset_of!(VcpuBlock, state) == 0 && CLASSES == Class::User as usize + 1);
