//! When to go into the virtual machine. Nothing that is decided here can change a state or a hash, so it may depend on
//! anything, the host's clock included.
//!
//! Going in and out costs as much as the soft engine needs for tens of thousands of instructions. So `auto` leaves the
//! first instructions of each stretch of user code, from one entry to the kernel to the next, to the soft engine. What is
//! behind them is a *tail*. For each address space it measures what an instruction of a tail costs in both engines,
//! everything counted that it took until the kernel was entered, and goes where it is less.

use super::super::EngineKind;
use super::super::core::Core;
use super::super::hash::FastMap;
use super::ROOT_MASK;

/// Instructions of a stretch of user code that the soft engine executes anyhow: a shorter one is not worth a visit.
const HEAD: i64 = 50_000;
/// What is measured counts half as much after so many instructions.
const MEMORY: u64 = 8_000_000;
/// What the soft engine must have run for a measurement, in tails and instructions.
const SOFT_TAILS: u32 = 2;
const SOFT_INSTRUCTIONS: u64 = 1_000_000;
/// What a tail costs in the VM at the least, until one has cost less. Where tails take less than half as much again in the
/// soft engine, there is no trial.
const VISIT_NS: u64 = 60_000;
/// Tails of a trial. The first ones, in the VM, make the translations. Of the others one in three is left to the soft
/// engine; they are measured.
const TRIAL_TAILS: u32 = 15;
const TRIAL_MEASURED: u32 = 9;
/// After a trial that has failed: instructions until the next one, doubled each time.
const PATIENCE_MIN: u64 = 20_000_000;
const PATIENCE_MAX: u64 = 320_000_000;
/// While the VM is faster, every so many tails one is left to the soft engine, to see how it does; more at first.
const SOFT_EVERY: u32 = 64;
/// The VM must be faster by one part in so many: what it costs the soft engine later is not measured.
const MARGIN: u64 = 16;
/// What tails in the VM may have cost more than they would have in software: if it is more, there are none until it is
/// half as much. One nanosecond of it is forgotten in so many.
const LOSS_MAX_NS: u64 = 3_000_000;
const LOSS_FORGOTTEN: u64 = 64;
/// What it takes to hash a page.
const HASH_NS: u64 = 1200;
/// Address spaces that are remembered.
const SPACES_MAX: usize = 512;

/// What instructions have cost lately.
#[derive(Clone, Copy, Default)]
struct Rate {
    /// In thousandths.
    tails: u64,
    instructions: u64,
    ns: u64,
}

impl Rate {
    fn add(&mut self, instructions: u64, ns: u64) {
        self.tails += 1000;
        self.instructions += instructions;
        self.ns += ns;
        while self.instructions > MEMORY {
            self.tails /= 2;
            self.instructions /= 2;
            self.ns /= 2;
        }
    }

    /// What a tail takes.
    fn tail_ns(&self) -> u64 {
        self.ns.saturating_mul(1000) / self.tails.max(1)
    }

    /// What so many instructions would take; None if nothing is known.
    fn cost(&self, instructions: u64) -> Option<u64> {
        let whole = u128::from(self.ns) * u128::from(instructions);
        (self.instructions > 0).then(|| (whole / u128::from(self.instructions)) as u64)
    }

    /// Clearly less for the same than `other`.
    fn is_below(&self, other: &Rate) -> bool {
        let both = |ns: u64, instructions: u64| u128::from(ns) * u128::from(instructions);
        let (mine, others) = (both(self.ns, other.instructions), both(other.ns, self.instructions));
        self.instructions > 0 && mine + mine / u128::from(MARGIN) < others
    }
}

/// What is done with the tails of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Left to the soft engine until this icount.
    Rest { until: u64 },
    /// In the soft engine, and measured; so many so far.
    Soft { tails: u32 },
    /// In the VM, to see how it does; so many are left.
    Trial { left: u32 },
    /// In the VM: it is faster; so many so far.
    Vm { tails: u32 },
}

/// Who executes a tail that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Soft,
    Vm,
}

/// One address space.
#[derive(Clone, Copy)]
struct Space {
    soft: Rate,
    vm: Rate,
    phase: Phase,
    /// How long to wait after the next trial, if it fails.
    patience: u64,
}

impl Default for Space {
    fn default() -> Space {
        let (soft, vm) = (Rate::default(), Rate::default());
        Space { soft, vm, phase: Phase::Soft { tails: 0 }, patience: PATIENCE_MIN }
    }
}

impl Space {
    /// Who executes the next tail; None if it is left to the soft engine and is not measured.
    fn choose(&mut self, icount: u64) -> Option<Choice> {
        // A machine that goes back to an earlier state has an earlier icount.
        if let Phase::Rest { until } = self.phase
            && (icount >= until || until - icount > PATIENCE_MAX)
        {
            self.soft = Rate::default();
            self.phase = Phase::Soft { tails: 0 };
        }
        let soft = match self.phase {
            Phase::Rest { .. } => return None,
            Phase::Soft { .. } => true,
            Phase::Trial { left } => left <= TRIAL_MEASURED && left.is_multiple_of(3),
            Phase::Vm { tails } => tails.is_power_of_two() || tails.is_multiple_of(SOFT_EVERY),
        };
        Some(if soft { Choice::Soft } else { Choice::Vm })
    }

    /// A tail has ended in one of the engines, at that icount. In the VM one costs `visit_ns` at the least.
    fn ran(&mut self, choice: Choice, instructions: u64, ns: u64, icount: u64, visit_ns: u64) {
        let rate = if choice == Choice::Vm { &mut self.vm } else { &mut self.soft };
        rate.add(instructions.max(1), ns);
        match &mut self.phase {
            Phase::Rest { .. } => {}
            Phase::Soft { tails } => {
                *tails += 1;
                if *tails >= SOFT_TAILS && self.soft.instructions >= SOFT_INSTRUCTIONS {
                    if self.soft.tail_ns() > visit_ns * 3 / 2 {
                        self.phase = Phase::Trial { left: TRIAL_TAILS };
                    } else {
                        self.give_up(icount);
                    }
                }
            }
            Phase::Trial { left } => {
                *left -= 1;
                match *left {
                    TRIAL_MEASURED => (self.soft, self.vm) = Default::default(),
                    0 => self.judge(icount),
                    _ => {}
                }
            }
            Phase::Vm { tails } => {
                *tails += 1;
                if !self.vm.is_below(&self.soft) {
                    self.judge(icount);
                }
            }
        }
    }

    fn judge(&mut self, icount: u64) {
        if self.vm.is_below(&self.soft) {
            self.patience = PATIENCE_MIN;
            self.phase = Phase::Vm { tails: 3 };
        } else {
            self.give_up(icount);
        }
    }

    /// No visits for a while.
    fn give_up(&mut self, icount: u64) {
        self.phase = Phase::Rest { until: icount.saturating_add(self.patience) };
        self.patience = (self.patience * 2).min(PATIENCE_MAX);
    }
}

/// The tail that is under way.
#[derive(Clone, Copy)]
struct Tail {
    space: u64,
    choice: Choice,
    icount: u64,
    ns: u64,
}

/// What a tail has cost.
#[derive(Clone, Copy)]
struct Costs {
    icount: u64,
    now_ns: u64,
    /// Instructions.
    ran: u64,
    /// Nanoseconds that it took, and that it would have taken in the soft engine.
    took: u64,
    soft: u64,
}

/// See the module's text.
pub struct Policy {
    random: u64,
    spaces: FastMap<u64, Space>,
    /// User code runs.
    user: bool,
    /// Of the budget, what is kept back while the head of a stretch runs.
    kept_back: i64,
    tail: Option<Tail>,
    /// Time that tails in the VM have cost more than they would have in software, less what they have gained, and when
    /// that was so.
    lost_ns: u64,
    lost_at_ns: u64,
    exhausted: bool,
    /// What a tail costs in the VM at the least.
    visit_ns: u64,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            random: 0,
            spaces: FastMap::default(),
            user: false,
            kept_back: 0,
            tail: None,
            lost_ns: 0,
            lost_at_ns: 0,
            exhausted: false,
            visit_ns: VISIT_NS,
        }
    }
}

/// Time that this thread has run. What others took from it is nobody's cost.
pub fn thread_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[allow(clippy::disallowed_methods)] // decides where code runs, never what it computes
    // SAFETY: writes the time to a variable of its own.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    // Without a clock everything costs nothing, and the VM is never faster.
    if failed == 0 { time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 } else { 0 }
}

impl Policy {
    /// Losing this as well, the VM has not cost too much.
    fn affords(&mut self, more_ns: u64, now_ns: u64) -> bool {
        let forgotten = now_ns.saturating_sub(self.lost_at_ns) / LOSS_FORGOTTEN;
        self.lost_at_ns += forgotten * LOSS_FORGOTTEN;
        self.lost_ns = self.lost_ns.saturating_sub(forgotten);
        let lost = self.lost_ns.saturating_add(more_ns);
        self.exhausted = lost >= if self.exhausted { LOSS_MAX_NS / 2 } else { LOSS_MAX_NS };
        !self.exhausted
    }

    /// Time that was needed once and for all is not the tail's.
    pub fn excuse(&mut self, ns: u64) {
        if let Some(tail) = &mut self.tail {
            tail.ns += ns;
        }
    }
}

impl Core {
    /// The engine that was asked for, or the one that promises more, is the VM.
    pub(super) fn policy_wants(&mut self) -> bool {
        match self.config.engine {
            EngineKind::Soft => false,
            EngineKind::Kvm => true,
            EngineKind::Random => {
                let random = &mut self.policy.random;
                *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *random >> 62 == 0
            }
            EngineKind::Auto => {
                self.policy.tail.is_some_and(|tail| tail.choice == Choice::Vm) && !self.policy_regrets()
            }
        }
    }

    /// Looks whether user code has begun or ended. May change the limit.
    #[inline]
    pub fn policy_look(&mut self) {
        if self.config.engine != EngineKind::Auto {
            return;
        }
        let state = self.state();
        let user = state.cpl == 3 && state.is_64bit();
        if user != self.policy.user {
            if user { self.policy_head() } else { self.policy_leave() }
        }
    }

    /// User code begins to run: it is called back behind the head.
    fn policy_head(&mut self) {
        if self.direct_failed {
            return;
        }
        self.policy.user = true;
        let rest = self.budget() - HEAD;
        if rest > 0 {
            self.policy.kept_back = rest;
            self.shorten(rest);
        }
    }

    /// Gives out the budget that was kept back, if any.
    fn policy_give_out(&mut self) {
        let rest = std::mem::take(&mut self.policy.kept_back);
        if rest > 0 {
            self.shorten(-rest);
        }
    }

    /// The budget is used up. True if there is more: the head of a stretch was all, and the tail begins.
    #[inline]
    pub fn policy_goes_on(&mut self) -> bool {
        if self.policy.kept_back == 0 {
            return false;
        }
        self.policy_give_out();
        self.policy_tail();
        true
    }

    #[cold]
    fn policy_tail(&mut self) {
        let icount = self.now().0;
        let key = self.state().cr3 & ROOT_MASK;
        if self.policy.spaces.len() > SPACES_MAX {
            self.policy.spaces.clear();
        }
        let Some(choice) = self.policy.spaces.entry(key).or_default().choose(icount) else { return };
        let ns = thread_ns();
        if choice == Choice::Soft || self.policy.affords(0, ns) {
            self.policy.tail = Some(Tail { space: key, choice, icount, ns });
        }
    }

    /// User code has ended, or the engine is about to return.
    pub fn policy_leave(&mut self) {
        self.policy.user = false;
        self.policy_give_out();
        if let Some(tail) = self.policy.tail.take() {
            self.policy_tail_ran(&tail, self.policy_costs(&tail));
        }
    }

    /// What a tail has cost so far.
    fn policy_costs(&self, tail: &Tail) -> Costs {
        let (icount, now_ns) = (self.now().0, thread_ns());
        let (ran, took) = (icount.saturating_sub(tail.icount), now_ns.saturating_sub(tail.ns));
        let soft = self.policy.spaces.get(&tail.space).and_then(|space| space.soft.cost(ran)).unwrap_or(took);
        Costs { icount, now_ns, ran, took, soft }
    }

    fn policy_tail_ran(&mut self, tail: &Tail, costs: Costs) {
        let Costs { icount, ran, took, soft, .. } = costs;
        let policy = &mut self.policy;
        if tail.choice == Choice::Vm {
            let lost = policy.lost_ns.saturating_add(took.saturating_sub(soft));
            policy.lost_ns = lost.saturating_sub(soft.saturating_sub(took));
            policy.visit_ns = policy.visit_ns.min(took);
        }
        let Some(space) = policy.spaces.get_mut(&tail.space) else { return };
        space.ran(tail.choice, ran, took, icount, policy.visit_ns);
        if matches!(space.phase, Phase::Rest { .. }) {
            self.direct_forget_space(tail.space);
        }
    }

    /// Pages were marked as written that may not have been: they will be hashed.
    pub(super) fn policy_marked(&mut self, pages: u64) {
        self.policy.lost_ns = self.policy.lost_ns.saturating_add(pages * HASH_NS);
    }

    /// The tail has cost so much in the VM that it had better go on in software; then it does.
    pub(super) fn policy_regrets(&mut self) -> bool {
        let Some(tail) = self.policy.tail.filter(|tail| tail.choice == Choice::Vm) else { return false };
        let costs = self.policy_costs(&tail);
        if self.policy.affords(costs.took.saturating_sub(costs.soft), costs.now_ns) {
            return false;
        }
        self.policy.tail = None;
        self.policy_tail_ran(&tail, costs);
        true
    }
}
