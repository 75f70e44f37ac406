//! The dispatcher: enters blocks, and acts on why they come back.

use super::Stop;
use super::block::{BLOCK_BIAS, flags_from_slot, flags_to_slot, window_of};
use super::core::{Core, Pending};
use super::debug::PENDING;
use super::fpu;
use super::mode::Mode;
use super::recent::Branch;
use super::segmented::is_segmented;
use super::signals::{self, SignalStack};
use super::thunks::exit;
use super::translate::{MAX_INSTRUCTIONS, Site, SiteKind};
use super::translations::Purpose;
use crate::Icount;
use crate::bus::{Bus, TscLine};
use crate::exception::Exception;
use crate::paging::is_canonical;
use crate::state::{XsaveImage, control, rflags};
use crate::system::alignment;

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

/// Instructions of a run for which it is worth while to be ready for what comes.
const LONG: u64 = 10_000;

impl Core {
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
        let previous = signals::watch(self.block);
        self.load_fpu();
        if self.unfinished.is_none() {
            self.debug_hits = 0;
        }
        if !self.foreseen && self.limit - now >= LONG {
            self.foresee_jumps();
            self.foreseen = true;
        }
        let limit = Icount(self.limit);
        self.tsc_line = self.bus().tsc_line(limit);
        let stop = self.finish_instruction().unwrap_or_else(|| self.dispatch());
        self.policy_leave();
        self.observe_retirement();
        self.store_fpu();
        fpu::reset_host();
        signals::watch(previous);
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
            (*block).near.flags = flags_to_slot((*block).state.rflags);
            (*block).window_distance = (*block).near.windows[window_of(self.current_class() as usize)].distance;
            let door = self.t.address(self.thunks.enter as u32);
            let enter: extern "sysv64" fn(u64, u64) -> u32 = std::mem::transmute(door);
            let argument = enter(self.t.address(target), block as u64 + u64::from(BLOCK_BIAS));
            (*block).state.rflags = flags_from_slot((*block).state.rflags, (*block).near.flags);
            argument
        }
    }

    /// Where to enter the translation at RIP, if the jump cache says so and nobody wants to be told of it.
    fn known_entry(&self) -> Option<u32> {
        let state = self.state();
        let mode = Mode::of(state);
        if self.observes_entries() || mode != self.last_mode[mode.class() as usize] {
            return None;
        }
        // SAFETY: translated code is not running.
        let jumps = unsafe { &(*self.block).jumps[mode.class() as usize] };
        jumps.get(state.rip).map(|checked| self.t.offset(checked))
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
            let known = match follow {
                Follow::Nothing | Follow::Jump if purpose == Purpose::Ordinary => self.known_entry(),
                _ => None,
            };
            let entry = if let Some(entry) = known {
                entry
            } else {
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
                self.t.blocks[index].entry
            };
            follow = Follow::Nothing;
            short = false;
            let was_careful = std::mem::take(&mut careful);
            let before = self.now();
            let mut traps = None;
            let mut stop = None;
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
                    SiteKind::Link { target, patch, depth } => {
                        self.statistics.link += 1;
                        let source = self.t.sites[site].block;
                        self.state_mut().rip = target;
                        if self.t.blocks[source].purpose.is_linked() {
                            follow = Follow::Link(Branch { patch, source, depth });
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
                        let Site { block: old, rip, .. } = self.t.sites[site];
                        // SAFETY: the vCPU block is owned by this core.
                        unsafe { (*self.block).profile.end(rip) };
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
                        if purpose.is_linked() {
                            follow = Follow::Jump;
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
                let (rip, checked, class) = (target.rip, target.checked, self.current_class() as usize);
                // SAFETY: translated code is not running.
                let jumps = unsafe { &mut (*self.block).jumps[class] };
                jumps.set(rip, self.t.address(checked), &mut self.jumps_used[class]);
                self.inherit_jumps(rip);
            }
            Follow::Without { patch, .. } => {
                let entry = target.entry;
                self.t.link(patch, entry);
            }
            Follow::Forward { old } => {
                // The jump cache may have led here: what is at this address now is another page or mode.
                let (rip, checked) = (target.rip, self.t.address(target.checked));
                let class = self.current_class() as usize;
                // SAFETY: translated code is not running.
                let jumps = unsafe { &mut (*self.block).jumps[class] };
                if jumps.get(rip).is_some() {
                    jumps.set(rip, checked, &mut self.jumps_used[class]);
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
}
