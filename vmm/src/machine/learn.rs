//! What a template's branches do first, learned once: a branch that nobody sees goes ahead, and goes back.
//!
//! Its translations are those with which all other branches begin, and itself it waits for the first of them, with the
//! memory that the host has mapped for it. Nothing else of it is left: it has no console, no inputs come to it, and what it
//! has found out about the future says only what to translate.

use std::time::{Duration, Instant};

use orrery_cpu::Icount;

use super::branch::{BranchError, Template};
use super::{Limits, Machine, Pause};

/// How far it goes.
const INSTRUCTIONS: u64 = 1_000_000;
/// It stops early if it takes longer, at the end of a stretch.
const TIME: Duration = Duration::from_millis(100);
/// It goes in stretches: one instruction, which is how far callers often let a branch go first, and then twice as many each
/// time as long as that takes little time.
const STRETCHES: std::ops::RangeInclusive<u64> = 1_000..=64_000;
const STRETCH_TIME: Duration = Duration::from_millis(1);
/// So often it stops for idle time, which is skipped.
const IDLE_MAX: usize = 16;

impl Template {
    /// Makes all branches fast from their first instruction on: goes through what comes next in the template's own future,
    /// a million instructions or 100 ms, and keeps its translations. The future stays as it is. Without effect if it has
    /// been done, as it is by [`Machine::freeze`].
    pub fn learn(&self) {
        if !self.has_learned() {
            // Whatever fails: branches are as right without it.
            let _ = self.go_ahead();
        }
    }

    fn go_ahead(&self) -> Result<(), BranchError> {
        let mut scout = self.scout()?;
        scout.engine.look_ahead(true);
        scout.go_ahead();
        scout.reset()?;
        self.keep_learned(scout.engine.freeze_all()?);
        scout.engine.look_ahead(false);
        scout.engine.forget_statistics();
        Ok(())
    }
}

impl Machine {
    /// Runs for a while, however long that is.
    fn go_ahead(&mut self) {
        self.forget_inputs();
        let begin = Instant::now();
        let end = Icount(self.icount().0.saturating_add(INSTRUCTIONS));
        let (mut stretch, mut idle, mut time) = (1, 0, Limits::NONE.time);
        while self.icount() < end && begin.elapsed() < TIME {
            let from = Instant::now();
            let icount = end.min(Icount(self.icount().0.saturating_add(stretch)));
            // Where it idles it first stops, and then is let go to the end of that: what may come there without an
            // instruction has no bound.
            let pause_when_idle = time == Limits::NONE.time;
            let limits = Limits { time, pause_when_idle, pause_when_long: true, ..Limits::until(icount) };
            time = match self.run(limits) {
                Ok(Pause::Limit) => Limits::NONE.time,
                Ok(Pause::Idle { until: Some(until) }) if idle < IDLE_MAX => {
                    idle += 1;
                    until
                }
                _ => return,
            };
            let quick = from.elapsed() < STRETCH_TIME;
            stretch = if quick { stretch * 2 } else { stretch / 2 }.clamp(*STRETCHES.start(), *STRETCHES.end());
        }
    }
}
