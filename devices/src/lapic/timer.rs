//! The local APIC's timer (Intel SDM volume 3, 11.5.4): one-shot, periodic and TSC-deadline.
//!
//! The bus clock is 1 GHz: one tick is one nanosecond of virtual time before the divide configuration. What the
//! guest can read (current count, deadline) follows the programmed time exactly; the interrupt comes a small
//! seeded delay later, drawn once per arming. In periodic mode the delays do not add up.

use serde::{Deserialize, Serialize};

use super::LapicConfig;
use crate::{Context, Effect, Latency, RandomStream, VirtualNs};

/// The token of the timer's wake-up.
pub const TIMER_TOKEN: u32 = 0;

/// Shortest period of the periodic mode, in nanoseconds. Shorter ones, which no real guest could serve, expire
/// at multiples of the period that are at least this far apart.
const PERIOD_MIN_NS: u64 = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl Mode {
    fn of(lvt: u32) -> Mode {
        match lvt >> 17 & 3 {
            0 => Mode::OneShot,
            1 => Mode::Periodic,
            2 => Mode::TscDeadline,
            _ => Mode::Reserved,
        }
    }
}

/// A countdown in one-shot or periodic mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Countdown {
    started_ns: u64,
    /// The count at `started_ns`; it may differ from the initial count after a change of the divider.
    count: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Timer {
    tsc_khz: u64,
    latency: Latency,
    random: RandomStream,
    initial_count: u32,
    divide: u32,
    countdown: Option<Countdown>,
    /// IA32_TSC_DEADLINE: zero when disarmed.
    tsc_deadline: u64,
    /// When the wake-up is due: the programmed time and the drawn delay.
    due_ns: Option<u64>,
}

impl Timer {
    pub(super) fn new(config: LapicConfig, random: RandomStream) -> Timer {
        Timer {
            tsc_khz: config.tsc_khz,
            latency: config.timer_latency,
            random,
            initial_count: 0,
            divide: 0,
            countdown: None,
            tsc_deadline: 0,
            due_ns: None,
        }
    }

    pub(super) fn rekey(&mut self, seed: u64) {
        self.random.rekey(seed);
    }

    pub(super) fn due_ns(&self) -> Option<u64> {
        self.due_ns
    }

    pub(super) fn initial_count(&self) -> u32 {
        self.initial_count
    }

    pub(super) fn divide_configuration(&self) -> u32 {
        self.divide
    }

    /// Bus clock ticks per count: bits 3, 1 and 0 of the divide configuration.
    fn divisor(&self) -> u64 {
        match self.divide >> 1 & 4 | self.divide & 3 {
            7 => 1,
            power => 2 << power,
        }
    }

    /// When a countdown reaches zero.
    fn end_ns(&self, countdown: Countdown) -> u64 {
        countdown.started_ns.saturating_add(u64::from(countdown.count) * self.divisor())
    }

    pub(super) fn current_count(&self, now: VirtualNs, lvt: u32) -> u32 {
        let Some(countdown) = self.countdown else { return 0 };
        let elapsed = now.0.saturating_sub(countdown.started_ns) / self.divisor();
        match u64::from(countdown.count).checked_sub(elapsed) {
            Some(rest) if rest > 0 => rest as u32,
            _ if Mode::of(lvt) == Mode::Periodic && self.initial_count > 0 => {
                let over = elapsed - u64::from(countdown.count);
                self.initial_count - (over % u64::from(self.initial_count)) as u32
            }
            _ => 0,
        }
    }

    pub(super) fn set_initial_count(&mut self, ctx: &mut Context, value: u32, lvt: u32) {
        match Mode::of(lvt) {
            Mode::OneShot | Mode::Periodic => {}
            // Writes are ignored in TSC-deadline mode.
            Mode::TscDeadline | Mode::Reserved => return,
        }
        self.initial_count = value;
        self.disarm(ctx);
        if value != 0 {
            self.start(ctx, Countdown { started_ns: ctx.now.0, count: value });
        }
    }

    pub(super) fn set_divide_configuration(&mut self, ctx: &mut Context, value: u32, lvt: u32) {
        if self.countdown.is_none() {
            self.divide = value & 0xB;
            return;
        }
        let rest = self.current_count(ctx.now, lvt);
        self.divide = value & 0xB;
        if rest > 0 {
            self.start(ctx, Countdown { started_ns: ctx.now.0, count: rest });
        }
    }

    /// The local vector table entry of the timer has changed. A change between TSC-deadline mode and the others
    /// disarms the timer (SDM 11.5.4.1).
    pub(super) fn mode_changed(&mut self, ctx: &mut Context, before: u32, after: u32) {
        let deadline = |lvt| Mode::of(lvt) == Mode::TscDeadline;
        if deadline(before) != deadline(after) {
            self.disarm(ctx);
            self.initial_count = 0;
        }
    }

    /// IA32_TSC_DEADLINE as the guest reads it: zero outside the mode.
    pub(super) fn deadline(&self, lvt: u32) -> u64 {
        if Mode::of(lvt) == Mode::TscDeadline { self.tsc_deadline } else { 0 }
    }

    pub(super) fn set_deadline(&mut self, ctx: &mut Context, value: u64, lvt: u32) {
        if Mode::of(lvt) != Mode::TscDeadline {
            return;
        }
        self.disarm(ctx);
        if value == 0 {
            return;
        }
        self.tsc_deadline = value;
        let deadline_ns = (u128::from(value) * 1_000_000).div_ceil(u128::from(self.tsc_khz.max(1)));
        let deadline_ns = u64::try_from(deadline_ns).unwrap_or(u64::MAX);
        self.wake(ctx, deadline_ns.max(ctx.now.0));
    }

    fn start(&mut self, ctx: &mut Context, countdown: Countdown) {
        self.countdown = Some(countdown);
        self.wake(ctx, self.end_ns(countdown));
    }

    fn wake(&mut self, ctx: &mut Context, programmed_ns: u64) {
        let at = programmed_ns.saturating_add(self.latency.draw(&mut self.random));
        self.due_ns = Some(at);
        ctx.effects.push(Effect::Wake { token: TIMER_TOKEN, at: VirtualNs(at) });
    }

    fn disarm(&mut self, ctx: &mut Context) {
        self.countdown = None;
        self.tsc_deadline = 0;
        if self.due_ns.take().is_some() {
            ctx.effects.push(Effect::Cancel { token: TIMER_TOKEN });
        }
    }

    /// The wake-up has come. True if the timer has expired; in periodic mode it is armed again.
    pub(super) fn expire(&mut self, ctx: &mut Context, lvt: u32) -> bool {
        if self.due_ns.is_none_or(|due| due > ctx.now.0) {
            return false;
        }
        self.due_ns = None;
        let ended = self.countdown.take().map(|countdown| self.end_ns(countdown));
        match (Mode::of(lvt), ended) {
            (Mode::TscDeadline, _) => std::mem::take(&mut self.tsc_deadline) != 0,
            (Mode::Periodic, Some(ended_ns)) if self.initial_count > 0 => {
                let period_ns = u64::from(self.initial_count) * self.divisor();
                // Periods that went by unserved are lost, as they are on hardware that is late.
                let target_ns = ctx.now.0.saturating_add(1).max(ended_ns.saturating_add(PERIOD_MIN_NS));
                let periods = target_ns.saturating_sub(ended_ns).div_ceil(period_ns).max(1);
                let started_ns = ended_ns.saturating_add((periods - 1).saturating_mul(period_ns));
                self.start(ctx, Countdown { started_ns, count: self.initial_count });
                true
            }
            (_, ended) => ended.is_some(),
        }
    }

    /// Back to power-on.
    pub(super) fn reset(&mut self, ctx: &mut Context) {
        self.disarm(ctx);
        self.initial_count = 0;
        self.divide = 0;
    }
}
