//! When to go into the virtual machine. Nothing that is decided here can change a state or a hash, so it may depend on
//! anything, the host's clock included.
//!
//! Going in and out costs as much as the soft engine needs for tens of thousands of instructions. So `auto` looks at
//! user code that has run for long without coming back to Rust, and keeps for each address space what an instruction
//! has cost lately in both ways of working, everything counted that it took.

use super::super::EngineKind;
use super::super::core::Core;
use super::super::hash::FastMap;
use super::ROOT_MASK;

/// A stretch of user code shorter than this is never worth a visit to the VM, in instructions.
const STRETCH_MIN: u64 = 50_000;
/// What is measured counts half as much after so many instructions.
const MEMORY: u64 = 8_000_000;
/// Visits of one trial. The first ones translate.
const TRIAL_VISITS: u32 = 12;
/// After a trial that has failed: instructions until the next one, doubled each time.
const PATIENCE_MIN: u64 = 20_000_000;
const PATIENCE_MAX: u64 = 5_000_000_000;
/// While the VM is faster, every so many visits a stretch is left to the soft engine, to see how it does.
const SOFT_EVERY: u32 = 200;
/// What visits have cost more than software would have may be one in so many cycles, and this much besides.
const LOSS_SHARE: u64 = 64;
const LOSS_ALWAYS: u64 = 5_000_000;
/// What it takes to hash a page.
const HASH_CYCLES: u64 = 3000;
/// Address spaces that are remembered.
const SPACES_MAX: usize = 512;

/// What instructions have cost lately.
#[derive(Clone, Copy, Default)]
struct Rate {
    instructions: u64,
    cycles: u64,
}

impl Rate {
    fn add(&mut self, instructions: u64, cycles: u64) {
        self.instructions += instructions;
        self.cycles += cycles;
        while self.instructions > MEMORY {
            self.instructions /= 2;
            self.cycles /= 2;
        }
    }

    /// Cycles for a thousand instructions; None if nothing is known.
    fn cost(&self) -> Option<u64> {
        (self.instructions > 0).then(|| self.cycles.saturating_mul(1000) / self.instructions)
    }
}

/// One address space.
#[derive(Clone, Copy)]
struct Space {
    soft: Rate,
    kvm: Rate,
    /// Length of the last stretch of user code without an exit, in instructions.
    stretch: u64,
    /// Visits left of a trial.
    trial: u32,
    /// Of the next trial: when, and how long to wait after it fails.
    next: u64,
    patience: u64,
    visits: u32,
}

impl Default for Space {
    fn default() -> Space {
        Space {
            soft: Rate::default(),
            kvm: Rate::default(),
            stretch: 0,
            trial: 0,
            next: 0,
            patience: PATIENCE_MIN,
            visits: 0,
        }
    }
}

/// See the module's text.
#[derive(Default)]
pub struct Policy {
    random: u64,
    spaces: FastMap<u64, Space>,
    /// Cycles that visits have cost more than the soft engine would have taken, less what they have gained.
    lost: u64,
    /// When the visit to the VM that is under way began, in cycles and instructions.
    visit: Option<(u64, u64)>,
    /// When the first stretch began, in cycles.
    since: Option<u64>,
    /// When the stretch of user code that is about to run began, in cycles and instructions.
    began: Option<(u64, u64)>,
}

/// The host's time stamp counter.
fn cycles() -> u64 {
    #[allow(clippy::disallowed_methods)] // decides where code runs, never what it computes
    // SAFETY: reads a counter.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}

impl Policy {
    /// Losing this as well, visits have not cost more than may be noise.
    fn affords(&mut self, more: u64) -> bool {
        let now = cycles();
        let since = *self.since.get_or_insert(now);
        self.lost.saturating_add(more) < LOSS_ALWAYS + now.wrapping_sub(since) / LOSS_SHARE
    }
}

impl Space {
    fn wants(&mut self, now: u64) -> bool {
        if self.stretch < STRETCH_MIN {
            return false;
        }
        let Some(soft) = self.soft.cost() else { return false };
        if self.trial > 0 {
            self.trial -= 1;
            if self.trial > 0 {
                return true;
            }
            // Judged by the second half of it: the first has made the translations.
            if self.kvm.cost().is_none_or(|kvm| kvm >= soft) {
                self.next = now.saturating_add(self.patience);
                self.patience = (self.patience * 2).min(PATIENCE_MAX);
                return false;
            }
            self.patience = PATIENCE_MIN;
        }
        let faster = self.kvm.cost().is_some_and(|kvm| kvm < soft) && self.next <= now;
        if faster {
            self.visits = self.visits.wrapping_add(1);
            return !self.visits.is_multiple_of(SOFT_EVERY);
        }
        // A machine that goes back to an earlier state has an earlier icount.
        if now >= self.next || self.next - now > PATIENCE_MAX {
            self.kvm = Rate::default();
            self.trial = TRIAL_VISITS;
            return true;
        }
        false
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
                let now = self.now().0;
                let space = self.state().cr3 & ROOT_MASK;
                if self.policy.spaces.len() > SPACES_MAX {
                    self.policy.spaces.clear();
                }
                let wants = self.policy.affords(0) && self.policy.spaces.entry(space).or_default().wants(now);
                if !wants {
                    self.policy.began = Some((cycles(), now));
                }
                wants
            }
        }
    }

    /// Translated code has come back in the soft engine.
    #[inline]
    pub fn policy_soft_ran(&mut self) {
        if let Some((start, instructions)) = self.policy.began.take() {
            self.policy_soft_stretch(start, instructions);
        }
    }

    fn policy_soft_stretch(&mut self, start: u64, instructions: u64) {
        let ran = self.now().0.saturating_sub(instructions);
        let space = self.state().cr3 & ROOT_MASK;
        if let Some(space) = self.policy.spaces.get_mut(&space) {
            space.stretch = ran;
            if ran >= STRETCH_MIN {
                space.soft.add(ran, cycles().wrapping_sub(start));
            }
        }
    }

    /// A visit to the VM begins.
    pub(super) fn policy_visit(&mut self) {
        if self.config.engine == EngineKind::Auto {
            self.policy.visit = Some((cycles(), self.now().0));
        }
    }

    /// Cycles that the visit has taken so far, and those that the soft engine would have.
    fn policy_costs(&self, (start, instructions): (u64, u64)) -> (u64, u64) {
        let ran = self.now().0.saturating_sub(instructions);
        let took = cycles().wrapping_sub(start);
        let space = self.policy.spaces.get(&(self.state().cr3 & ROOT_MASK));
        (took, space.and_then(|space| space.soft.cost()).map_or(took, |cost| ran.saturating_mul(cost) / 1000))
    }

    /// Pages were marked as written that may not have been: they will be hashed.
    pub(super) fn policy_marked(&mut self, pages: u64) {
        self.policy.lost = self.policy.lost.saturating_add(pages * HASH_CYCLES);
    }

    /// The visit costs so much that it had better end.
    pub(super) fn policy_regrets(&mut self) -> bool {
        let Some(visit) = self.policy.visit else { return false };
        let (took, soft) = self.policy_costs(visit);
        !self.policy.affords(took.saturating_sub(soft))
    }

    /// A visit has ended.
    pub(super) fn policy_visited(&mut self) {
        let Some(visit) = self.policy.visit.take() else { return };
        let (took, soft) = self.policy_costs(visit);
        self.policy.lost = (self.policy.lost + took.saturating_sub(soft)).saturating_sub(soft.saturating_sub(took));
        let ran = self.now().0.saturating_sub(visit.1);
        let key = self.state().cr3 & ROOT_MASK;
        if let Some(space) = self.policy.spaces.get_mut(&key) {
            space.stretch = ran;
            if space.trial == TRIAL_VISITS / 2 {
                space.kvm = Rate::default();
            }
            space.kvm.add(ran.max(1), took);
        }
    }
}
