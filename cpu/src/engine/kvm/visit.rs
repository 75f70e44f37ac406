//! A visit to the virtual machine: registers go in, translated code runs, exits are answered, registers come out.

use super::super::Stop;
use super::super::block::{BLOCK_BIAS, HOMELESS_FIRST, flags_from_slot, flags_to_slot};
use super::super::core::Core;
use super::super::fpu;
use super::super::registers::HOME;
use super::super::residents::return_registers;
use super::super::translate::{Site, SiteKind};
use super::vm::{Exit, PageFault};
use super::{KvmError, OVERDRAFT, ROOT_MASK};
use crate::paging::is_canonical;
use crate::state::{gpr, rflags};
use kvm_bindings::kvm_regs;

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
        let block_linear = direct.tables.block_linear();
        let regs = direct.vm.regs();
        *regs = kvm_regs { rflags: 0x202, ..Default::default() };
        for (guest, home) in HOME.iter().enumerate() {
            if let Some(home) = home {
                *register(regs, *home) = state.gpr[guest];
            }
        }
        regs.r15 = budget as u64;
        regs.r11 = block_linear + u64::from(BLOCK_BIAS);
        let block = direct.block();
        block.near.homeless.copy_from_slice(&state.gpr[HOMELESS_FIRST..]);
        block.state.seg = state.seg;
        block.state.rflags = state.rflags;
        block.near.flags = flags_to_slot(state.rflags);
        (block.tsc_known, block.tsc_at_limit, block.tsc_per_instruction) = tsc;
        (block.state.tsc_offset, block.state.tsc_aux) = (state.tsc_offset, state.tsc_aux);
        Ok(())
    }

    /// General registers from the VM; flags from the slot.
    fn unload_direct(&mut self) {
        let direct = self.direct();
        let mut regs = *direct.vm.regs();
        let block = direct.block();
        let (homeless, flags, system) = (block.near.homeless, block.near.flags, block.state.rflags);
        let state = self.state_mut();
        for (guest, home) in HOME.iter().enumerate() {
            state.gpr[guest] = match home {
                Some(home) => *register(&mut regs, *home),
                None => homeless[guest - HOMELESS_FIRST],
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
            Ok(image) => fpu::normalise(&mut self.state_mut().fpu, &image),
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

    /// The site that code in the VM has named.
    fn direct_site(&self, number: u32) -> Result<Site, Spoiled> {
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
        let (temporaries, evicted) = (direct.block().temporary, direct.block().near.evicted);
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
