//! The kvm engine: long stretches of translated user-mode code in a virtual machine, where the processor translates the
//! guest's addresses and the software MMU is not needed.
//!
//! `emit` is what the translator does otherwise for such code, `tables` the VM's page tables, `vm` the VM itself, and
//! this file goes in and out. What runs in the VM is counted like all translated code, so nothing that happens here can
//! change a state or a hash. Everything but plain user-mode code comes back and goes on in the soft engine, with the
//! state that lies before the instruction that could not go on.

mod emit;
mod faults;
mod measure;
mod policy;
mod tables;
mod vm;

pub use emit::emit_exit;
pub use measure::{KvmCosts, available, measure};
pub use policy::Policy;
use policy::thread_ns;
pub use vm::KvmError;

use super::Stop;
use super::block::{Class, ITLB_ENTRIES, JUMP_ENTRIES, JumpEntry, VcpuBlock, flags_from_slot, flags_to_slot};
use super::core::Core;
use super::mode::Mode;
use super::region::Region;
use super::registers::HOME;
use super::residents::return_registers;
use super::translate::SiteKind;
use super::translations::{Purpose, start};
use crate::memory::PAGE_SIZE;
use crate::paging::is_canonical;
use crate::state::{gpr, rflags};
use kvm_bindings::kvm_regs;
use tables::Arena;
use vm::{Exit, PageFault, Vm};

/// From the page that is the way out of the VM to the code behind it.
pub const EXIT_DISTANCE: i32 = 4096;
/// The address bits of CR3.
const ROOT_MASK: u64 = 0x000F_FFFF_FFFF_F000;
/// Most instructions of a block: a budget is never overdrawn by more.
const OVERDRAFT: i64 = super::translate::MAX_INSTRUCTIONS as i64;

/// The engine's part of a VM. Dropped in this order: the VM goes before the memory that it uses.
pub struct Direct {
    vm: Vm,
    tables: Arena,
    /// What translated code in the VM reaches through GS. It is a vCPU block without a host address in it.
    block: *mut VcpuBlock,
    _room: Region,
    /// The mode that the entries of its instruction TLB stand for, and which of them are in use.
    mode: Mode,
    pages_used: Vec<u16>,
    /// All pages that the VM can write are marked as written.
    marked: bool,
}

// SAFETY: the block is in the region that this value owns.
unsafe impl Send for Direct {}

/// Where a stretch in the VM goes on.
enum Next {
    /// At this offset in the code memory.
    At(u32),
    /// In the VM, as it left.
    Again,
    /// In the soft engine, here.
    Soft(Place),
    /// In the soft engine, with the instruction that could not go on in the VM.
    Fault,
}

/// What is left to do when registers have been unloaded. It names no site: those may be forgotten meanwhile.
#[derive(Clone, Copy)]
struct Place {
    rip: u64,
    /// Instructions that were counted and have not retired.
    unretired: u32,
    /// What was added to RSP by an instruction that is to be executed again.
    popped: i32,
}

/// What was found in the VM cannot be: the guest has found the engine's part of it and written to it, or KVM is broken.
struct Spoiled(String);

impl Place {
    /// Where an instruction begins that nothing has been counted of.
    fn at(rip: u64) -> Place {
        Place { rip, unretired: 0, popped: 0 }
    }
}

impl Direct {
    fn new(core: &Core) -> Result<Direct, KvmError> {
        let room = Region::new(size_of::<VcpuBlock>(), None).map_err(|error| KvmError::Memory(error.to_string()))?;
        let code = (core.t.code_start(), core.t.code_end());
        let tables = Arena::new(code.1 - code.0, (core.memory.end() / PAGE_SIZE) as usize)?;
        let vm = Vm::new(&core.memory, &tables, &room, code, core.config.kvm_fails)?;
        let block: *mut VcpuBlock = room.at(0).cast();
        let mut direct =
            Direct { vm, tables, block, _room: room, mode: Mode(0), pages_used: Vec::new(), marked: false };
        direct.forget_jumps();
        Ok(direct)
    }

    fn block(&mut self) -> &mut VcpuBlock {
        // SAFETY: zeroed memory is a valid block, it is in `_room`, and the VM does not run while the reference lives.
        unsafe { &mut *self.block }
    }

    fn forget_jumps(&mut self) {
        let jumps = &mut self.block().jumps;
        jumps.fill(JumpEntry { rip: 0, host: 0 });
        // RIP 0 looks at entry 0: make it miss.
        jumps[0].rip = 1;
    }

    fn forget_pages(&mut self) {
        for slot in std::mem::take(&mut self.pages_used) {
            self.block().itlb[Class::User as usize][slot as usize] = 0;
        }
    }
}

/// Host registers in encoding order.
fn register(regs: &mut kvm_regs, number: u8) -> &mut u64 {
    match number {
        0 => &mut regs.rax,
        1 => &mut regs.rcx,
        2 => &mut regs.rdx,
        3 => &mut regs.rbx,
        4 => &mut regs.rsp,
        5 => &mut regs.rbp,
        6 => &mut regs.rsi,
        7 => &mut regs.rdi,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        _ => &mut regs.r15,
    }
}

impl Core {
    // What the rest of the engine tells ------------------------------------------------------------------------

    /// All address translations are void, or those of this address space that are not global.
    pub fn direct_flush(&mut self, all: bool) {
        if let Some(direct) = &mut self.direct {
            direct.forget_pages();
            if all {
                direct.tables.forget_all();
            }
        }
    }

    /// The translation of one linear page is void, in whatever address space.
    pub fn direct_flush_page(&mut self, linear: u64) {
        if let Some(direct) = &mut self.direct {
            direct.tables.forget_page(linear);
            direct.block().itlb[Class::User as usize][(linear >> 12) as usize % ITLB_ENTRIES] = 0;
        }
    }

    /// Writes to the page of RAM are watched from now on.
    pub fn direct_watch(&mut self, page: u64) {
        if let Some(direct) = &mut self.direct {
            direct.tables.protect(page as u32);
        }
    }

    /// Nothing of this address space is worth keeping.
    fn direct_forget_space(&mut self, space: u64) {
        if let Some(direct) = &mut self.direct {
            direct.tables.forget_space(space);
        }
    }

    /// All code is forgotten.
    pub fn direct_clear_code(&mut self) {
        if let Some(direct) = &mut self.direct {
            direct.forget_pages();
            direct.forget_jumps();
        }
    }

    /// No page is marked as written any more.
    pub fn direct_forget_marks(&mut self) {
        if let Some(direct) = &mut self.direct {
            direct.marked = false;
        }
    }

    /// Marks the pages that code in the VM can write, before it runs: it may write them all.
    fn direct_mark_dirty(&mut self) {
        let direct = self.direct();
        if std::mem::replace(&mut direct.marked, true) {
            return;
        }
        let writable = direct.tables.writable();
        for page in &writable {
            self.mark_dirty(*page);
        }
        self.policy_marked(writable.len() as u64);
    }

    /// The soft engine may write to the page, or read it, at this linear address.
    pub fn direct_fill(&mut self, linear: u64, page: u64, write: bool) {
        let space = self.state().cr3 & ROOT_MASK;
        if let Some(direct) = &mut self.direct
            && direct.tables.fill(space, linear & !0xFFF, page as u32, write)
            && write
        {
            self.mark_dirty(page);
        }
    }

    // Whether --------------------------------------------------------------------------------------------------

    /// The state at hand can go on in the VM, and should.
    pub fn direct_wanted(&mut self) -> bool {
        if self.direct_failed || !self.policy_wants() {
            return false;
        }
        let state = self.state();
        let fits = state.cpl == 3
            && state.is_64bit()
            && is_canonical(state.gpr[gpr::RSP])
            && state.rip >> 47 == 0
            && state.rflags & (rflags::TF | rflags::AC) == 0;
        // Blocks that the budget does not cover are cut short by the soft engine.
        fits && self.budget() >= OVERDRAFT && !self.observed.is_active()
    }

    fn direct_ready(&mut self) -> bool {
        if self.direct.is_none() {
            let start = thread_ns();
            match Direct::new(self) {
                Ok(direct) => self.direct = Some(Box::new(direct)),
                Err(error) => self.direct_fails(error),
            }
            self.policy.excuse(thread_ns() - start);
        }
        self.direct.is_some()
    }

    /// From now on all code runs in the soft engine.
    fn direct_fails(&mut self, error: KvmError) {
        self.direct_failed = true;
        if let Some(failure) = &self.config.kvm_failure {
            // The first one is told.
            let _ = failure.set(error);
        }
    }

    pub(super) fn direct(&mut self) -> &mut Direct {
        self.direct.as_mut().expect("the VM is there: `direct_ready`")
    }

    // Blocks ---------------------------------------------------------------------------------------------------

    /// Identity of the code page at `vpage`, entered in the VM's instruction TLB; None if the soft engine should look.
    pub fn direct_page(&mut self, vpage: u64, mode: Mode) -> Option<u32> {
        let slot = vpage as usize % ITLB_ENTRIES;
        if self.direct().mode != mode {
            self.direct().forget_pages();
            self.direct().mode = mode;
        }
        let cached = self.direct().block().itlb[Class::User as usize][slot];
        if cached != 0
            && let Some(page) = self.t.code_pages.get(cached as usize)
            && page.vpage == vpage
            && page.mode == mode
        {
            return Some(cached);
        }
        let page = match self.soft_page(vpage) {
            Some(known) => self.t.code_pages[known].page,
            None => {
                let translation = self.walk(vpage << 12, false, true, Class::User).ok()?;
                self.memory.host(translation.gpa & !(PAGE_SIZE - 1), PAGE_SIZE)?;
                (translation.gpa / PAGE_SIZE) as u32
            }
        };
        let identity = self.t.identity(vpage, page, mode);
        self.direct().block().itlb[Class::User as usize][slot] = identity;
        self.direct().pages_used.push(slot as u16);
        Some(identity)
    }

    /// The soft engine's identity of the code page at `vpage`, if it has it in its instruction TLB.
    fn soft_page(&self, vpage: u64) -> Option<u32> {
        // SAFETY: translated code is not running.
        let cached = unsafe { (*self.block).itlb[Class::User as usize][vpage as usize % ITLB_ENTRIES] };
        let page = self.t.code_pages.get(cached as usize)?;
        (cached != 0 && page.vpage == vpage && page.mode == Mode::of(self.state())).then_some(cached)
    }

    /// The block for the VM at RIP, translated if need be; None if there can be none.
    fn direct_find(&mut self) -> Option<u32> {
        let rip = self.state().rip;
        if rip >> 47 != 0 {
            return None;
        }
        let mode = Mode::of(self.state()).direct();
        let identity = self.direct_page(rip >> 12, mode)?;
        if let Some(index) = self.t.find(start(identity, rip), Purpose::Ordinary) {
            let second = self.t.blocks[index].second;
            match second {
                None => return Some(index),
                Some((vpage, second)) if self.direct_page(vpage, mode)? == second => return Some(index),
                Some(_) => self.kill(index),
            }
        }
        if !self.has_room_for_block() {
            self.clear_code();
            return None;
        }
        let first_site = self.t.sites.len() as u32;
        match self.translate(identity, mode, Purpose::Ordinary) {
            Ok(Ok(index)) => {
                self.direct_ahead(first_site, index);
                Some(index)
            }
            _ => None,
        }
    }

    /// Translates what a new block leads to, as far as the soft engine has met it: an exit for each link would cost
    /// more. Touches no page tables: nothing of this is executed yet. The sites of the block are those from
    /// `first_site` on.
    fn direct_ahead(&mut self, first_site: u32, block: u32) {
        const BLOCKS_MAX: u32 = 256;
        let (rip, mode) = (self.state().rip, Mode::of(self.state()));
        self.direct_seed_jump(block);
        let mut made = 0;
        let mut at = first_site;
        // The sites of blocks that are translated here are appended, and looked at in turn.
        while (at as usize) < self.t.sites.len() {
            let site = self.t.sites[at];
            at += 1;
            let SiteKind::Link { target, patch, .. } = site.kind else { continue };
            let Some(soft) = self.soft_page(target >> 12).filter(|_| target >> 47 == 0) else { continue };
            let known = self.t.find(start(soft, target), Purpose::Ordinary);
            if known.is_none_or(|known| self.t.blocks[known].second.is_some()) || !self.has_room_for_block() {
                continue;
            }
            let identity = self.t.identity(target >> 12, self.t.code_pages[soft].page, mode.direct());
            let found = match self.t.find(start(identity, target), Purpose::Ordinary) {
                Some(index) if self.t.blocks[index].second.is_none() => index,
                None if made < BLOCKS_MAX => {
                    made += 1;
                    self.state_mut().rip = target;
                    let translated = self.translate(identity, mode.direct(), Purpose::Ordinary);
                    self.state_mut().rip = rip;
                    let Ok(Ok(index)) = translated else { continue };
                    self.direct_seed_jump(index);
                    index
                }
                _ => continue,
            };
            if self.config.chaining {
                self.direct_link(site.block, patch, found);
            }
        }
    }

    /// Leads a branch of `source` to a block.
    fn direct_link(&mut self, source: u32, patch: u32, target: u32) {
        let (source, block) = (&self.t.blocks[source], &self.t.blocks[target]);
        let near = block.identity == source.identity && block.second.is_none() && source.second.is_none();
        let to = if near { block.entry } else { block.checked };
        self.t.patch_rel32(patch, to);
    }

    /// Enters a new block in the VM's jump cache, if the soft engine has it in its own.
    fn direct_seed_jump(&mut self, index: u32) {
        let (rip, checked) = (self.t.blocks[index].rip, self.t.blocks[index].checked);
        // SAFETY: translated code is not running.
        let known = unsafe { (*self.block).jumps[rip as usize % JUMP_ENTRIES].rip };
        if known == rip && rip != 0 {
            self.direct_jump(rip, checked);
        }
    }

    // Running --------------------------------------------------------------------------------------------------

    /// Goes on in the VM as long as that is possible. The state is complete before and after.
    pub fn run_direct(&mut self) -> Option<Stop> {
        if !self.direct_ready() {
            return None;
        }
        let index = self.direct_find()?;
        let entry = self.t.blocks[index].entry;
        if let Err(error) = self.load_direct() {
            self.direct_fails(error);
            return None;
        }
        self.statistics.kvm_visits += 1;
        self.direct_mark_dirty();
        let Spoiled(what) = self.stay_direct(entry).err()?;
        self.load_fpu();
        Some(Stop::Unsupported { rip: self.state().rip, bytes: Vec::new(), what })
    }

    /// Registers to the VM.
    fn load_direct(&mut self) -> Result<(), KvmError> {
        self.store_fpu();
        let state = self.state().clone();
        let budget = self.budget();
        // SAFETY: translated code is not running.
        let soft = unsafe { &*self.block };
        let tsc = (soft.tsc_known, soft.tsc_at_limit, soft.tsc_per_instruction);
        let direct = self.direct();
        let mut image = state.fpu;
        if !image.upper_in_use() {
            // Absent from XSTATE_BV, the upper halves are not in use for the processor either.
            image.0[512] &= !4;
        }
        direct.vm.set_fpu(&image.0)?;
        let regs = direct.vm.regs();
        *regs = kvm_regs { rflags: 0x202, ..Default::default() };
        for (guest, home) in HOME.iter().enumerate() {
            if let Some(home) = home {
                *register(regs, *home) = state.gpr[guest];
            }
        }
        regs.r15 = budget as u64;
        let block = direct.block();
        block.state.gpr = state.gpr;
        block.state.seg = state.seg;
        block.state.rflags = state.rflags;
        block.flags = flags_to_slot(state.rflags);
        (block.tsc_known, block.tsc_at_limit, block.tsc_per_instruction) = tsc;
        (block.state.tsc_offset, block.state.tsc_aux) = (state.tsc_offset, state.tsc_aux);
        Ok(())
    }

    /// General registers from the VM; flags from the slot.
    fn unload_direct(&mut self) {
        let direct = self.direct();
        let mut regs = *direct.vm.regs();
        let block = direct.block();
        let (homeless, flags, system) = (block.state.gpr, block.flags, block.state.rflags);
        let state = self.state_mut();
        for (guest, home) in HOME.iter().enumerate() {
            state.gpr[guest] = match home {
                Some(home) => *register(&mut regs, *home),
                None => homeless[guest],
            };
        }
        state.rflags = flags_from_slot(state.rflags & !rflags::DF | system & rflags::DF, flags);
    }

    fn stay_direct(&mut self, entry: u32) -> Result<(), Spoiled> {
        let most = self.budget();
        let code = self.direct().tables.code_linear();
        self.direct().vm.regs().rip = code + u64::from(entry);
        let mut before = self.direct().vm.regs().rip;
        let mut left = None;
        loop {
            let space = self.state().cr3 & ROOT_MASK;
            let direct = self.direct.as_mut().expect("it is there");
            if !direct.tables.has_room() {
                direct.tables.reset();
                if let Err(error) = direct.vm.forget_arena(&direct.tables) {
                    self.direct_fails(error);
                    break;
                }
            }
            let direct = self.direct();
            let root = direct.tables.root_of(space);
            direct.tables.seal();
            direct.vm.set_root(root);
            let exit = direct.vm.run(&direct.tables);
            self.statistics.kvm_exits += 1;
            let exit = match exit {
                Ok(exit) => exit,
                Err(error) => {
                    // The state is that before an instruction that is known, or it is lost.
                    let untouched = self.direct().vm.regs().rip == before;
                    left = (!untouched).then_some(Next::Fault);
                    self.direct_fails(error);
                    break;
                }
            };
            let budget = self.direct().vm.regs().r15 as i64;
            if budget > most || budget < -OVERDRAFT {
                return Err(Spoiled("a budget that was written to in the virtual machine".to_string()));
            }
            self.set_budget(budget);
            match self.direct_exit(exit)? {
                Next::At(offset) => self.direct().vm.regs().rip = code + u64::from(offset),
                Next::Again => {}
                next @ (Next::Soft(_) | Next::Fault) => {
                    left = Some(next);
                    break;
                }
            }
            before = self.direct().vm.regs().rip;
        }
        let fpu = self.direct().vm.fpu();
        match fpu {
            Ok(image) => super::fpu::normalise(&mut self.state_mut().fpu, &image),
            Err(error) => return Err(Spoiled(format!("no floating-point registers from KVM: {error}"))),
        }
        self.unload_direct();
        self.load_fpu();
        match left {
            Some(Next::Soft(place)) => {
                let state = self.state_mut();
                state.rip = place.rip;
                state.gpr[gpr::RSP] = state.gpr[gpr::RSP].wrapping_sub(place.popped as u64);
                let budget = self.budget() + i64::from(place.unretired);
                self.set_budget(budget);
            }
            Some(_) => self.direct_fault()?,
            None => self.set_rip_of_entry(before - code)?,
        }
        if self.budget() < 0 {
            return Err(Spoiled("a budget that was written to in the virtual machine".to_string()));
        }
        Ok(())
    }

    /// KVM failed before the VM did anything: RIP is that of the block or the site that was to be entered.
    fn set_rip_of_entry(&mut self, offset: u64) -> Result<(), Spoiled> {
        let block = self.t.blocks.iter().find(|b| u64::from(b.entry) == offset || u64::from(b.checked) == offset);
        match block.map(|block| block.rip) {
            Some(rip) => {
                self.state_mut().rip = rip;
                Ok(())
            }
            None => self.direct_fault(),
        }
    }

    /// What to do about an exit while the registers are still in the VM.
    fn direct_exit(&mut self, exit: Exit) -> Result<Next, Spoiled> {
        let number = match exit {
            Exit::Site(number) => number,
            Exit::Exception { page_fault: Some(PageFault { linear, write }) } => {
                self.statistics.kvm_faults += 1;
                return Ok(if self.direct_page_fault(linear, write) { Next::Again } else { Next::Fault });
            }
            Exit::Exception { page_fault: None } => return Ok(Next::Fault),
        };
        let site = self.direct_site(number)?;
        let clears = self.t.clears;
        match site.kind {
            SiteKind::Link { target, patch, .. } => {
                self.state_mut().rip = target;
                let Some(index) = self.direct_next() else { return Ok(Next::Soft(Place::at(target))) };
                if clears == self.t.clears && self.config.chaining {
                    self.direct_link(site.block, patch, index);
                }
                Ok(Next::At(self.t.blocks[index].entry))
            }
            SiteKind::Indirect { popped } => {
                let target = self.direct().block().state.rip;
                if !is_canonical(target) {
                    // The branch itself raises it: it is executed again.
                    return Ok(Next::Soft(Place { rip: site.rip, unretired: site.unretired, popped }));
                }
                self.state_mut().rip = target;
                let Some(index) = self.direct_next() else { return Ok(Next::Soft(Place::at(target))) };
                self.direct_jump(target, self.t.blocks[index].checked);
                Ok(Next::At(self.t.blocks[index].entry))
            }
            SiteKind::Lookup => {
                let place = Place { rip: site.rip, unretired: site.unretired, popped: 0 };
                if !is_canonical(self.direct().vm.regs().rsp) {
                    return Ok(Next::Soft(place));
                }
                self.state_mut().rip = site.rip;
                let budget = self.budget() + i64::from(site.unretired);
                let Some(index) = self.direct_next() else { return Ok(Next::Soft(place)) };
                self.set_budget(budget);
                self.direct().vm.regs().r15 = budget as u64;
                if clears == self.t.clears {
                    self.direct_forward(site.block, index);
                }
                Ok(Next::At(self.t.blocks[index].entry))
            }
            _ => Ok(Next::Soft(Place { rip: site.rip, unretired: site.unretired, popped: 0 })),
        }
    }

    /// The block at RIP, if the budget is not used up.
    fn direct_next(&mut self) -> Option<u32> {
        if self.budget() <= 0 || self.policy_regrets() {
            return None;
        }
        self.direct_find()
    }

    fn direct_jump(&mut self, target: u64, checked: u32) {
        let direct = self.direct();
        let host = direct.tables.code_linear() + u64::from(checked);
        direct.block().jumps[target as usize % JUMP_ENTRIES] = JumpEntry { rip: target, host };
    }

    /// Leads what leads to a block that is not valid any more to the one that took its place.
    fn direct_forward(&mut self, old: u32, index: u32) {
        let (target, invalid) = (self.t.blocks[index], self.t.blocks[old]);
        let entry = self.direct().block().jumps[target.rip as usize % JUMP_ENTRIES];
        if entry.rip == target.rip && target.rip != 0 {
            self.direct_jump(target.rip, target.checked);
        }
        if !invalid.valid && invalid.identity == target.identity && invalid.rip == target.rip {
            self.t.patch_jmp(invalid.checked, target.checked);
            self.t.patch_jmp(invalid.entry, target.entry);
        }
    }

    /// The site that code in the VM has named.
    fn direct_site(&self, number: u32) -> Result<super::translate::Site, Spoiled> {
        let spoiled = || Spoiled("an exit of the virtual machine that translated code does not have".to_string());
        let site = *self.t.sites.get(number as usize).ok_or_else(spoiled)?;
        let block = self.t.blocks.get(site.block as usize).ok_or_else(spoiled)?;
        let page = self.t.code_pages.get(block.identity as usize).ok_or_else(spoiled)?;
        let leaves = !matches!(site.kind, SiteKind::Memory { .. } | SiteKind::Fault { .. } | SiteKind::Window { .. });
        if page.mode.is_direct() && leaves { Ok(site) } else { Err(spoiled()) }
    }

    /// An instruction could not go on in the VM: the state is that before it.
    fn direct_fault(&mut self) -> Result<(), Spoiled> {
        let direct = self.direct();
        let mut regs = *direct.vm.regs();
        let offset = regs.rip.wrapping_sub(direct.tables.code_linear());
        let (temporaries, evicted) = (direct.block().temporary, direct.block().evicted);
        let found = u32::try_from(offset).ok().and_then(|o| self.t.faults.binary_search_by_key(&o, |f| f.0).ok());
        let Some(at) = found else {
            return Err(Spoiled("an exception of the virtual machine that translated code does not raise".to_string()));
        };
        let number = self.t.faults[at as u32].1;
        let SiteKind::Fault { flags_in_host, borrowed, residents } = self.t.sites[number].kind else {
            return Err(Spoiled("an exception at a place that has none".to_string()));
        };
        let state = self.state_mut();
        if flags_in_host {
            state.rflags = state.rflags & !rflags::STATUS | regs.rflags & rflags::STATUS;
        }
        let elsewhere = |host, _| *register(&mut regs, host);
        return_registers(&mut state.gpr, (borrowed, &temporaries), (residents, &evicted), elsewhere);
        self.rewind(number);
        Ok(())
    }
}
