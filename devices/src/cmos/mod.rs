//! The CMOS clock: an MC146818 (Motorola datasheet) with 128 bytes, at ports 0x70 and 0x71.
//!
//! Its time is a fixed start date plus virtual time. The clock always steps on whole seconds of virtual time since
//! power-on; `calendar` converts. The update-in-progress bit is set during the last 244 microseconds of each second.
//! Flags of register C are computed when they are read or an enabled interrupt is due, so that an idle clock costs
//! no events.

mod calendar;

use serde::{Deserialize, Serialize};

use crate::{Context, Device, Effect, VirtualNs, answer_byte, layout};
use calendar::DateTime;

const SECOND_NS: u64 = 1_000_000_000;
/// The time before each update during which the guest must not read, in nanoseconds.
const UPDATE_NS: u64 = 244_000;
/// The token of the next interrupt.
const INTERRUPT_TOKEN: u32 = 0;

mod register {
    pub const SECONDS: u8 = 0x00;
    pub const SECONDS_ALARM: u8 = 0x01;
    pub const MINUTES: u8 = 0x02;
    pub const MINUTES_ALARM: u8 = 0x03;
    pub const HOURS: u8 = 0x04;
    pub const HOURS_ALARM: u8 = 0x05;
    pub const DAY_OF_WEEK: u8 = 0x06;
    pub const DAY_OF_MONTH: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const A: u8 = 0x0A;
    pub const B: u8 = 0x0B;
    pub const C: u8 = 0x0C;
    pub const D: u8 = 0x0D;
    pub const CENTURY: u8 = super::CENTURY_REGISTER;
}

/// Where the century is kept; the FADT says so.
pub const CENTURY_REGISTER: u8 = 0x32;

mod a {
    pub const UPDATE_IN_PROGRESS: u8 = 0x80;
    pub const DIVIDER: u8 = 0x70;
    pub const DIVIDER_32768: u8 = 0x20;
    pub const RATE: u8 = 0x0F;
}

mod b {
    pub const SET: u8 = 0x80;
    pub const PERIODIC: u8 = 0x40;
    pub const ALARM: u8 = 0x20;
    pub const UPDATE_ENDED: u8 = 0x10;
    pub const BINARY: u8 = 0x04;
    pub const HOURS_24: u8 = 0x02;
    /// The enable bits, in the places of their flags in register C.
    pub const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATE_ENDED;
}

const C_INTERRUPT: u8 = 0x80;
const D_VALID: u8 = 0x80;
const HOUR_PM: u8 = 0x80;
/// Alarm fields from here on match any value.
const ALARM_ANY: u8 = 0xC0;

/// The CMOS clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cmos {
    index: u8,
    /// Seconds since 1970 when virtual time is zero.
    epoch: i64,
    /// The time while register B's SET bit stops it.
    stopped: Option<i64>,
    a: u8,
    b: u8,
    c: u8,
    /// Seconds, minutes, hours of the alarm, as the guest wrote them.
    alarm: [u8; 3],
    /// The rest of the 128 bytes, with the century at its place unused.
    #[serde(with = "serde_bytes_128")]
    memory: [u8; 128],
    /// Up to when the flags of register C account for.
    flags_until_ns: u64,
    line: bool,
}

impl Cmos {
    /// A clock that shows `start_date` (seconds since 1970-01-01 00:00:00 UTC) at power-on. Dates after the year
    /// 9999 show as its end.
    pub fn new(start_date: u64) -> Cmos {
        Cmos {
            index: 0,
            epoch: i64::try_from(start_date).unwrap_or(i64::MAX).min(calendar::LAST_SECOND),
            stopped: None,
            a: 0x26,
            b: b::HOURS_24,
            c: 0,
            alarm: [0; 3],
            memory: [0; 128],
            flags_until_ns: 0,
            line: false,
        }
    }

    fn seconds(&self, now: VirtualNs) -> i64 {
        self.stopped.unwrap_or_else(|| self.epoch.saturating_add((now.0 / SECOND_NS) as i64))
    }

    fn running(&self) -> bool {
        self.stopped.is_none() && self.a & a::DIVIDER == a::DIVIDER_32768
    }

    /// The period of the periodic interrupt, in nanoseconds times 32768.
    fn period_scaled(&self) -> Option<u128> {
        let rate = match self.a & a::RATE {
            0 => return None,
            // With the 32768 Hz crystal the two fastest rates are those of 8 and 9.
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some(u128::from(SECOND_NS) << (rate - 1))
    }

    /// Number of periodic ticks up to a time.
    fn periods(&self, ns: u64) -> u128 {
        self.period_scaled().map_or(0, |period| (u128::from(ns) << 15) / period)
    }

    /// The flags that events in `(from, to]` set.
    fn flags_between(&self, from_ns: u64, to_ns: u64) -> u8 {
        if !self.running() {
            return 0;
        }
        let mut flags = 0;
        if self.periods(to_ns) > self.periods(from_ns) {
            flags |= b::PERIODIC;
        }
        if to_ns / SECOND_NS > from_ns / SECOND_NS {
            flags |= b::UPDATE_ENDED;
            if self.next_alarm_ns(from_ns).is_some_and(|at| at <= to_ns) {
                flags |= b::ALARM;
            }
        }
        flags
    }

    /// The first alarm after a time.
    fn next_alarm_ns(&self, after_ns: u64) -> Option<u64> {
        let second = after_ns / SECOND_NS + 1;
        let field = |index: usize| (self.alarm[index] < ALARM_ANY).then(|| self.alarm[index]);
        let wanted = [
            field(0).map(|value| self.decode(value)),
            field(1).map(|value| self.decode(value)),
            field(2).map(|value| self.decode_hour(value)),
        ];
        let wait = calendar::seconds_until(self.epoch.saturating_add(second as i64), wanted)?;
        second.checked_add(wait)?.checked_mul(SECOND_NS)
    }

    /// Brings register C up to date.
    fn update_flags(&mut self, now: VirtualNs) {
        self.c |= self.flags_between(self.flags_until_ns, now.0);
        self.flags_until_ns = self.flags_until_ns.max(now.0);
        if self.c & self.b & b::INTERRUPTS != 0 {
            self.c |= C_INTERRUPT;
        } else {
            self.c &= !C_INTERRUPT;
        }
    }

    fn update_line(&mut self, ctx: &mut Context) {
        let level = self.c & C_INTERRUPT != 0;
        if level != self.line {
            self.line = level;
            ctx.effects.push(Effect::Line { gsi: layout::CMOS_GSI, level });
        }
    }

    /// Asks for a wake-up at the next event that would interrupt, unless an interrupt is already pending.
    fn schedule(&mut self, ctx: &mut Context) {
        let now = ctx.now.0;
        let enabled = |bit| self.b & bit != 0 && self.c & bit == 0;
        let mut due: Option<u64> = None;
        let mut consider = |at: Option<u64>| due = due.into_iter().chain(at).min();
        if self.running() && self.c & C_INTERRUPT == 0 {
            if enabled(b::PERIODIC)
                && let Some(period) = self.period_scaled()
            {
                let at = ((self.periods(now) + 1) * period).div_ceil(1 << 15);
                consider(u64::try_from(at).ok());
            }
            if enabled(b::UPDATE_ENDED) {
                consider((now / SECOND_NS + 1).checked_mul(SECOND_NS));
            }
            if enabled(b::ALARM) {
                consider(self.next_alarm_ns(now));
            }
        }
        ctx.effects.push(match due {
            Some(at) => Effect::Wake { token: INTERRUPT_TOKEN, at: VirtualNs(at) },
            None => Effect::Cancel { token: INTERRUPT_TOKEN },
        });
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b & b::BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b & b::BINARY != 0 { value } else { (value >> 4).wrapping_mul(10).wrapping_add(value & 0xF) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b & b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.b & b::HOURS_24 != 0 {
            return self.decode(value);
        }
        let hour = self.decode(value & !HOUR_PM) % 12;
        hour + if value & HOUR_PM != 0 { 12 } else { 0 }
    }

    fn read_register(&mut self, ctx: &mut Context) -> u8 {
        let date = || DateTime::from_unix(self.seconds(ctx.now));
        match self.index {
            register::SECONDS => self.encode(date().second),
            register::MINUTES => self.encode(date().minute),
            register::HOURS => self.encode_hour(date().hour),
            register::DAY_OF_WEEK => self.encode(date().day_of_week),
            register::DAY_OF_MONTH => self.encode(date().day),
            register::MONTH => self.encode(date().month),
            register::YEAR => self.encode((date().year % 100) as u8),
            register::CENTURY => self.encode((date().year / 100) as u8),
            register::SECONDS_ALARM => self.alarm[0],
            register::MINUTES_ALARM => self.alarm[1],
            register::HOURS_ALARM => self.alarm[2],
            register::A => {
                let updating = self.running() && ctx.now.0 % SECOND_NS >= SECOND_NS - UPDATE_NS;
                self.a | if updating { a::UPDATE_IN_PROGRESS } else { 0 }
            }
            register::B => self.b,
            register::C => {
                self.update_flags(ctx.now);
                let flags = std::mem::take(&mut self.c);
                self.update_line(ctx);
                self.schedule(ctx);
                flags
            }
            register::D => D_VALID,
            index => self.memory[usize::from(index & 0x7F)],
        }
    }

    fn write_register(&mut self, ctx: &mut Context, value: u8) {
        match self.index {
            register::A => {
                self.update_flags(ctx.now);
                self.a = value & !a::UPDATE_IN_PROGRESS;
            }
            register::B => self.write_b(ctx, value),
            register::SECONDS_ALARM | register::MINUTES_ALARM | register::HOURS_ALARM => {
                self.update_flags(ctx.now);
                self.alarm[usize::from(self.index / 2)] = value;
            }
            // The day of the week follows from the date.
            register::C | register::D | register::DAY_OF_WEEK => return,
            register::SECONDS
            | register::MINUTES
            | register::HOURS
            | register::DAY_OF_MONTH
            | register::MONTH
            | register::YEAR
            | register::CENTURY => self.write_date(ctx, value),
            index => {
                self.memory[usize::from(index & 0x7F)] = value;
                return;
            }
        }
        self.update_line(ctx);
        self.schedule(ctx);
    }

    fn write_b(&mut self, ctx: &mut Context, value: u8) {
        self.update_flags(ctx.now);
        let seconds = self.seconds(ctx.now);
        if value & b::SET != 0 {
            self.stopped = Some(seconds);
        } else if let Some(seconds) = self.stopped.take() {
            self.epoch = seconds.saturating_sub((ctx.now.0 / SECOND_NS) as i64);
        }
        self.b = value;
        if value & b::SET != 0 {
            self.b &= !b::UPDATE_ENDED;
        }
        self.update_flags(ctx.now);
    }

    /// Sets one field of the date. Fields out of range carry over into the next, as a calendar does.
    fn write_date(&mut self, ctx: &mut Context, value: u8) {
        self.update_flags(ctx.now);
        let before = self.seconds(ctx.now);
        let mut date = DateTime::from_unix(before);
        match self.index {
            register::SECONDS => date.second = self.decode(value),
            register::MINUTES => date.minute = self.decode(value),
            register::HOURS => date.hour = self.decode_hour(value),
            register::DAY_OF_MONTH => date.day = self.decode(value),
            register::MONTH => date.month = self.decode(value),
            register::YEAR => date.year = date.year / 100 * 100 + i64::from(self.decode(value)),
            _ => date.year = i64::from(self.decode(value)) * 100 + date.year % 100,
        }
        let after = date.to_unix();
        match &mut self.stopped {
            Some(seconds) => *seconds = after,
            None => self.epoch = self.epoch.saturating_add(after.saturating_sub(before)),
        }
    }
}

impl Device for Cmos {
    fn read(&mut self, ctx: &mut Context, offset: u64, data: &mut [u8]) {
        let value = if offset == 1 { self.read_register(ctx) } else { 0xFF };
        answer_byte(data, value);
    }

    fn write(&mut self, ctx: &mut Context, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match offset {
            // Bit 7 masks NMIs, of which there are none.
            0 => self.index = value & 0x7F,
            1 => self.write_register(ctx, value),
            _ => {}
        }
    }

    fn event(&mut self, ctx: &mut Context, token: u32) {
        if token == INTERRUPT_TOKEN {
            self.update_flags(ctx.now);
            self.update_line(ctx);
            self.schedule(ctx);
        }
    }
}

/// Serde for an array that is too long for the derive.
mod serde_bytes_128 {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8; 128], serializer: S) -> Result<S::Ok, S::Error> {
        bytes.as_slice().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 128], D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        let len = bytes.len();
        bytes.try_into().map_err(|_| D::Error::invalid_length(len, &"128 bytes of CMOS memory"))
    }
}

#[cfg(test)]
mod tests;
