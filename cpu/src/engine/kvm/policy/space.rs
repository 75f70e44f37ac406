//! One address space: what its tails have cost lately in both engines, and where the next one goes.

/// What is measured counts half as much after so many instructions.
const MEMORY: u64 = 8_000_000;
/// What the soft engine must have run for a measurement, in tails and instructions.
const SOFT_TAILS: u32 = 2;
const SOFT_INSTRUCTIONS: u64 = 1_000_000;
/// Tails of a trial. The first ones, in the VM, make the translations. Of the others one in three is left to the soft
/// engine; they are measured.
pub const TRIAL_TAILS: u32 = 15;
const TRIAL_MEASURED: u32 = 9;
/// Instructions after which the soft engine is measured again where the VM is not used.
const REST: u64 = 20_000_000;
/// Instructions between a trial that has failed and the next, doubled with each failure; and so many times as many as long
/// as the soft engine's costs stay what they were. If they have become twice as much or half, that is other code, and
/// there is a trial at once.
const PATIENCE_MIN: u64 = 20_000_000;
const PATIENCE_MAX: u64 = 320_000_000;
const REFUSALS: u64 = 16;
/// While the VM is faster, every so many tails one is left to the soft engine, to see how it does; more at first.
const SOFT_EVERY: u32 = 64;
/// The VM must be faster by one part in so many: what it costs the soft engine later is not measured.
const MARGIN: u64 = 16;

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

    /// Nanoseconds that both would take for as many instructions.
    fn beside(&self, other: &Rate) -> (u128, u128) {
        let both = |ns: u64, instructions: u64| u128::from(ns) * u128::from(instructions);
        (both(self.ns, other.instructions), both(other.ns, self.instructions))
    }

    /// Clearly less for the same than `other`.
    fn is_below(&self, other: &Rate) -> bool {
        let (mine, others) = self.beside(other);
        self.instructions > 0 && mine + mine / u128::from(MARGIN) < others
    }

    /// A quarter more for the same than `other`, in more than one tail.
    fn is_hopeless(&self, other: &Rate) -> bool {
        let (mine, others) = self.beside(other);
        self.tails > 1000 && mine * 4 > others * 5
    }

    /// Between `low` and `high` percent of what `other` costs for the same.
    fn is_within(&self, low: u128, high: u128, other: &Rate) -> bool {
        let (mine, others) = self.beside(other);
        others * low < mine * 100 && mine * 100 < others * high
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
pub enum Choice {
    Soft,
    Vm,
}

/// One address space.
#[derive(Clone, Copy)]
pub struct Space {
    soft: Rate,
    vm: Rate,
    phase: Phase,
    /// What the soft engine cost when the last trial failed, when that was, and how long there is to be no other.
    refused: Rate,
    refused_at: u64,
    patience: u64,
}

impl Default for Space {
    fn default() -> Space {
        let (soft, vm) = (Rate::default(), Rate::default());
        let phase = Phase::Soft { tails: 0 };
        Space { soft, vm, phase, refused: Rate::default(), refused_at: 0, patience: 0 }
    }
}

impl Space {
    /// Who executes the next tail; None if it is left to the soft engine and is not measured.
    pub fn choose(&mut self, icount: u64) -> Option<Choice> {
        // A machine that goes back to an earlier state has an earlier icount.
        if let Phase::Rest { until } = self.phase
            && (icount >= until || until - icount > REST)
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

    /// What so many instructions would take in the soft engine; None if nothing is known.
    pub fn soft_ns(&self, instructions: u64) -> Option<u64> {
        self.soft.cost(instructions)
    }

    /// There are no visits for a while.
    pub fn rests(&self) -> bool {
        matches!(self.phase, Phase::Rest { .. })
    }

    /// A tail has ended in one of the engines, at that icount. In the VM one costs `visit_ns` at the least.
    pub fn ran(&mut self, choice: Choice, instructions: u64, ns: u64, icount: u64, visit_ns: u64) {
        let rate = if choice == Choice::Vm { &mut self.vm } else { &mut self.soft };
        rate.add(instructions.max(1), ns);
        match &mut self.phase {
            Phase::Rest { .. } => {}
            Phase::Soft { tails } => {
                *tails += 1;
                if *tails >= SOFT_TAILS && self.soft.instructions >= SOFT_INSTRUCTIONS {
                    if self.soft.tail_ns() <= visit_ns * 3 / 2 || self.is_refused(icount) {
                        self.rest(icount);
                    } else {
                        self.phase = Phase::Trial { left: TRIAL_TAILS };
                    }
                }
            }
            Phase::Trial { left } => {
                *left -= 1;
                match *left {
                    TRIAL_MEASURED => (self.soft, self.vm) = Default::default(),
                    0 => self.judge(icount),
                    left if left < TRIAL_MEASURED && self.vm.is_hopeless(&self.soft) => self.judge(icount),
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

    /// The trial is over, or the VM does not do better any more.
    fn judge(&mut self, icount: u64) {
        if self.vm.is_below(&self.soft) {
            self.patience = 0;
            self.phase = Phase::Vm { tails: 3 };
        } else {
            self.refuse(icount);
        }
    }

    /// The VM has cost more.
    fn refuse(&mut self, icount: u64) {
        (self.refused, self.refused_at) = (self.soft, icount);
        self.patience = (self.patience * 2).clamp(PATIENCE_MIN, PATIENCE_MAX);
        self.rest(icount);
    }

    /// A trial has failed not long ago. A machine that has gone back knows of none.
    fn is_refused(&self, icount: u64) -> bool {
        let patience = if self.soft.is_within(80, 125, &self.refused) {
            self.patience * REFUSALS
        } else if self.soft.is_within(50, 200, &self.refused) {
            self.patience
        } else {
            0
        };
        icount.checked_sub(self.refused_at).is_some_and(|since| since < patience)
    }

    /// No visits for a while.
    fn rest(&mut self, icount: u64) {
        self.phase = Phase::Rest { until: icount.saturating_add(REST) };
    }
}
