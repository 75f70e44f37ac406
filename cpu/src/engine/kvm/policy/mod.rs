//! When to go into the virtual machine. Nothing that is decided here can change a state or a hash, so it may depend on
//! anything, the host's clock included.
//!
//! Going in and out costs as much as the soft engine needs for tens of thousands of instructions. So `auto` leaves the
//! first instructions of each stretch of user code, from one entry to the kernel to the next, to the soft engine. What is
//! behind them is a *tail*. For each address space it measures what an instruction of a tail costs in both engines,
//! everything counted that it took until the kernel was entered, and goes where it is less.

mod space;

use super::super::EngineKind;
use super::super::core::Core;
use super::super::hash::FastMap;
use super::ROOT_MASK;
use space::{Choice, Space};

/// Instructions of a stretch of user code that the soft engine executes anyhow: a shorter one is not worth a visit.
const HEAD: i64 = 50_000;
/// What a tail costs in the VM at the least, until one has cost less. Where tails take less than half as much again in the
/// soft engine, there is no trial.
const VISIT_NS: u64 = 60_000;
/// What tails in the VM may have cost more than they would have in software: if it is more, there are none until it is
/// half as much. One nanosecond of it is forgotten in so many.
const LOSS_MAX_NS: u64 = 3_000_000;
const LOSS_FORGOTTEN: u64 = 64;
/// What it takes to hash a page.
const HASH_NS: u64 = 1200;
/// Address spaces that are remembered.
const SPACES_MAX: usize = 512;

/// The tail that is under way.
#[derive(Clone, Copy)]
struct Tail {
    space: u64,
    choice: Choice,
    icount: u64,
    ns: u64,
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

    /// Pages were marked as written that may not have been: they will be hashed.
    pub fn marked(&mut self, pages: u64) {
        self.lost_ns = self.lost_ns.saturating_add(pages * HASH_NS);
    }

    /// A tail begins in this address space.
    fn begin(&mut self, space: u64, icount: u64, now_ns: u64) {
        if self.spaces.len() > SPACES_MAX {
            self.spaces.clear();
        }
        let Some(choice) = self.spaces.entry(space).or_default().choose(icount) else { return };
        if choice == Choice::Soft || self.affords(0, now_ns) {
            self.tail = Some(Tail { space, choice, icount, ns: now_ns });
        }
    }

    /// The tail is in the VM.
    fn is_in_vm(&self) -> bool {
        self.tail.is_some_and(|tail| tail.choice == Choice::Vm)
    }

    /// What a tail has cost so far, and what it would have cost in the soft engine: instructions, nanoseconds each.
    fn costs(&self, tail: &Tail, icount: u64, now_ns: u64) -> (u64, u64, u64) {
        let (ran, took) = (icount.saturating_sub(tail.icount), now_ns.saturating_sub(tail.ns));
        let soft = self.spaces.get(&tail.space).and_then(|space| space.soft_ns(ran)).unwrap_or(took);
        (ran, took, soft)
    }

    /// The tail, if there is one, ends. An address space that the VM need not remember any more.
    fn end(&mut self, icount: u64, now_ns: u64) -> Option<u64> {
        let tail = self.tail.take()?;
        let (ran, took, soft) = self.costs(&tail, icount, now_ns);
        if tail.choice == Choice::Vm {
            let lost = self.lost_ns.saturating_add(took.saturating_sub(soft));
            self.lost_ns = lost.saturating_sub(soft.saturating_sub(took));
            self.visit_ns = self.visit_ns.min(took);
        }
        let space = self.spaces.get_mut(&tail.space)?;
        space.ran(tail.choice, ran, took, icount, self.visit_ns);
        space.rests().then_some(tail.space)
    }

    /// The tail, which is in the VM, has cost so much there that it had better go on in software.
    fn regrets(&mut self, icount: u64, now_ns: u64) -> bool {
        let Some(tail) = self.tail else { return false };
        let (_, took, soft) = self.costs(&tail, icount, now_ns);
        !self.affords(took.saturating_sub(soft), now_ns)
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
            EngineKind::Auto => self.policy.is_in_vm() && !self.policy_regrets(),
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
        let (space, icount) = (self.state().cr3 & ROOT_MASK, self.now().0);
        self.policy.begin(space, icount, thread_ns());
    }

    /// User code has ended, or the engine is about to return.
    pub fn policy_leave(&mut self) {
        self.policy.user = false;
        self.policy_give_out();
        if self.policy.tail.is_some() {
            self.policy_end();
        }
    }

    fn policy_end(&mut self) {
        let icount = self.now().0;
        if let Some(space) = self.policy.end(icount, thread_ns()) {
            self.direct_forget_space(space);
        }
    }

    /// The tail has cost so much in the VM that it had better go on in software; then it does.
    pub(super) fn policy_regrets(&mut self) -> bool {
        let icount = self.now().0;
        let regrets = self.policy.is_in_vm() && self.policy.regrets(icount, thread_ns());
        if regrets {
            self.policy_end();
        }
        regrets
    }
}

#[cfg(test)]
mod tests {
    use super::space::TRIAL_TAILS;
    use super::*;

    const SPACE: u64 = 0x1000;
    /// What the soft engine needs for a thousand instructions in most of these tests.
    const SOFT_NS: u64 = 300;

    /// A machine whose costs are made up.
    #[derive(Default)]
    struct Course {
        /// What the soft engine needs for a thousand instructions, if it is not the constant.
        soft_ns: Option<u64>,
        policy: Policy,
        icount: u64,
        now_ns: u64,
        /// Time that all would have taken in the soft engine.
        software_ns: u64,
        vm_tails: u32,
        /// Longest time between two exits of the VM.
        slice_ns: u64,
    }

    impl Course {
        /// User code for so many instructions behind its head, which take so long in the VM.
        fn tail(&mut self, instructions: u64, vm_ns: u64) {
            const EXITS: u64 = 16;
            self.policy.begin(SPACE, self.icount, self.now_ns);
            self.vm_tails += u32::from(self.policy.is_in_vm());
            let soft_ns = instructions * self.soft_ns.unwrap_or(SOFT_NS) / 1000;
            for _ in 0..EXITS {
                if self.policy.is_in_vm() && self.policy.regrets(self.icount, self.now_ns) {
                    self.policy.end(self.icount, self.now_ns);
                }
                let took = if self.policy.is_in_vm() { vm_ns } else { soft_ns } / EXITS;
                self.slice_ns = self.slice_ns.max(took);
                self.now_ns += took;
                self.icount += instructions / EXITS;
            }
            self.software_ns += soft_ns;
            self.policy.end(self.icount, self.now_ns);
        }

        fn tails(&mut self, count: u32, instructions: u64, vm_ns: u64) -> &mut Course {
            (0..count).for_each(|_| self.tail(instructions, vm_ns));
            self
        }

        fn assert_loss_is_bounded(&self) {
            let most = LOSS_MAX_NS + self.now_ns / LOSS_FORGOTTEN + self.slice_ns;
            let lost = self.now_ns.saturating_sub(self.software_ns);
            assert!(lost <= most, "{lost} ns of {} lost, {most} allowed", self.now_ns);
        }
    }

    #[test]
    fn what_pays_is_kept() {
        let mut course = Course::default();
        course.tails(1000, 1 << 20, 150_000);
        assert!(course.vm_tails > 950, "{} tails of 1000 in the VM", course.vm_tails);
        assert!(course.now_ns < course.software_ns * 11 / 20, "{} of {}", course.now_ns, course.software_ns);
    }

    #[test]
    fn what_does_not_pay_is_given_up() {
        for vm_ns in [310_000, 400_000, 3_000_000, 300_000_000] {
            let mut course = Course::default();
            course.tails(4000, 1 << 20, vm_ns);
            // Trials become rare.
            assert!((1..=14 * 16).contains(&course.vm_tails), "{} tails at {vm_ns} ns", course.vm_tails);
            course.assert_loss_is_bounded();
        }
    }

    #[test]
    fn what_stays_the_same_is_not_tried_again_and_again() {
        let mut course = Course::default();
        course.tails(4000, 1 << 20, 350_000);
        let trials = course.vm_tails / (TRIAL_TAILS - 3);
        assert!((2..=7).contains(&trials), "{trials} trials in 4000 tails");
        // Other code, and the next trial is as near as one is after a failure.
        course.soft_ns = Some(2 * SOFT_NS);
        let before = course.vm_tails;
        course.tails(1000, 1 << 20, 350_000);
        assert!(course.vm_tails - before > 650, "{} tails in the VM", course.vm_tails - before);
    }

    #[test]
    fn a_hopeless_trial_is_short() {
        let mut course = Course::default();
        course.tails(20, 1 << 20, 420_000);
        assert!((6..=8).contains(&course.vm_tails), "{} tails in the VM", course.vm_tails);
    }

    #[test]
    fn a_gain_within_the_margin_is_none() {
        let mut course = Course::default();
        course.tails(2000, 1 << 20, (1 << 20) * SOFT_NS / 1000 * 97 / 100);
        assert!(course.vm_tails < 200, "{} tails of 2000 in the VM", course.vm_tails);
    }

    #[test]
    fn a_tail_that_costs_less_than_a_visit_is_not_tried() {
        let mut course = Course::default();
        course.tails(10_000, 250_000, 1);
        assert_eq!(course.vm_tails, 0);
    }

    #[test]
    fn what_has_changed_is_seen() {
        let mut course = Course::default();
        let paid = course.tails(200, 1 << 20, 100_000).vm_tails;
        // Now it costs ten times as much as software.
        let costly = course.tails(200, 1 << 20, 3_000_000).vm_tails - paid;
        assert!(costly < 16, "{costly} tails more");
        // And now it pays again: the next trial finds out.
        course.tails(400, 1 << 20, 100_000);
        let again = course.tails(200, 1 << 20, 100_000).vm_tails;
        assert!(again > paid + costly + 350, "{again} tails in the VM");
        course.assert_loss_is_bounded();
    }

    #[test]
    fn losses_are_bounded_whatever_the_costs() {
        for seed in 1..200u64 {
            let mut random = seed;
            let mut draw = |below: u64| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) % below
            };
            let mut course = Course::default();
            for _ in 0..500 {
                let instructions = 1 << (17 + draw(6));
                // From a tenth to twenty times of what it takes in software, in rows of some tails.
                let percent = if draw(3) == 0 { 10 + draw(2000) } else { 10 + draw(120) };
                course.tails(1 + draw(20) as u32, instructions, instructions * SOFT_NS / 1000 * percent / 100);
                course.assert_loss_is_bounded();
            }
        }
    }

    #[test]
    fn pages_to_hash_are_a_loss() {
        let mut course = Course::default();
        course.policy.marked(2 * LOSS_MAX_NS / HASH_NS);
        course.tails(100, 1 << 20, 100_000);
        // So much is not forgotten so soon.
        assert_eq!(course.vm_tails, 0);
    }

    #[test]
    fn a_rest_ends_when_the_machine_goes_back() {
        let mut course = Course { icount: 1 << 40, ..Course::default() };
        course.tails(100, 1 << 20, 600_000);
        let before = course.vm_tails;
        course.icount = 0;
        course.tails(2000, 1 << 20, 100_000);
        assert!(course.vm_tails > before + 1500, "{} tails in the VM", course.vm_tails - before);
    }

    #[test]
    fn many_address_spaces_are_forgotten() {
        let mut policy = Policy::default();
        for space in 0..3 * SPACES_MAX as u64 {
            policy.begin(space << 12, space, space);
            policy.end(space + 1, space + 1);
            assert!(policy.spaces.len() <= SPACES_MAX + 1);
        }
    }
}
