//! The I/O APIC: 24 pins, one redirection entry each (Intel 82093AA datasheet; version 0x20 adds the EOI register).
//!
//! Devices drive the pins with [`Effect::Line`], which the machine hands to [`IoApic::set_line`]; messages leave as
//! [`Effect::Interrupt`]. Only fixed and lowest-priority delivery to the one local APIC exists: entries with other
//! delivery modes or destinations send nothing.

use serde::{Deserialize, Serialize};

use crate::{Context, Device, Effect, answer, layout, value_of};

/// Number of pins, that is, of global system interrupts.
pub const PINS: usize = 24;

const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

mod register {
    pub const SELECT: u64 = 0x00;
    pub const WINDOW: u64 = 0x10;
    pub const EOI: u64 = 0x40;
    pub const ID: u8 = 0x00;
    pub const VERSION: u8 = 0x01;
    pub const ARBITRATION: u8 = 0x02;
    pub const REDIRECTION: u8 = 0x10;
}

mod entry {
    pub const LOGICAL: u64 = 1 << 11;
    pub const DELIVERY_STATUS: u64 = 1 << 12;
    pub const ACTIVE_LOW: u64 = 1 << 13;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const WRITABLE: u64 = 0xFF00_0000_0001_AFFF;
}

/// The I/O APIC.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IoApic {
    select: u8,
    id: u8,
    entries: [u64; PINS],
    /// Levels that the devices drive, one bit per pin.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> IoApic {
        IoApic::new()
    }
}

impl IoApic {
    /// An I/O APIC at power-on: every pin masked.
    pub fn new() -> IoApic {
        IoApic { select: 0, id: layout::IOAPIC_ID, entries: [entry::MASKED; PINS], lines: 0 }
    }

    /// A device drives its line. Lines beyond the last pin are not connected.
    pub fn set_line(&mut self, ctx: &mut Context, gsi: u8, level: bool) {
        let pin = usize::from(gsi);
        if pin >= PINS {
            return;
        }
        let was_active = self.active(pin);
        self.lines = self.lines & !(1 << pin) | u32::from(level) << pin;
        if self.entries[pin] & entry::LEVEL != 0 {
            self.service_level(ctx, pin);
        } else if self.active(pin) && !was_active && self.entries[pin] & entry::MASKED == 0 {
            // An edge at a masked pin is lost.
            self.send(ctx, pin);
        }
    }

    /// The local APIC has ended a level-triggered interrupt. Pins that are still active send again.
    pub fn end_of_interrupt(&mut self, ctx: &mut Context, vector: u8) {
        for pin in 0..PINS {
            let word = self.entries[pin];
            if word as u8 == vector && word & entry::LEVEL != 0 && word & entry::REMOTE_IRR != 0 {
                self.entries[pin] &= !entry::REMOTE_IRR;
                self.service_level(ctx, pin);
            }
        }
    }

    fn active(&self, pin: usize) -> bool {
        let high = self.lines >> pin & 1 == 1;
        high != (self.entries[pin] & entry::ACTIVE_LOW != 0)
    }

    fn service_level(&mut self, ctx: &mut Context, pin: usize) {
        let ready = self.entries[pin] & (entry::LEVEL | entry::MASKED | entry::REMOTE_IRR) == entry::LEVEL;
        if ready && self.active(pin) && self.send(ctx, pin) {
            self.entries[pin] |= entry::REMOTE_IRR;
        }
    }

    fn send(&mut self, ctx: &mut Context, pin: usize) -> bool {
        let word = self.entries[pin];
        let destination = (word >> 56) as u8;
        let delivered = if word & entry::LOGICAL != 0 { destination != 0 } else { matches!(destination, 0 | 0xFF) };
        let fixed = matches!(word >> 8 & 7, 0 | 1);
        if fixed && delivered {
            let level_triggered = word & entry::LEVEL != 0;
            ctx.effects.push(Effect::Interrupt { vector: word as u8, level_triggered });
        }
        fixed && delivered
    }

    fn read_register(&self, number: u8) -> u32 {
        match number {
            register::ID | register::ARBITRATION => u32::from(self.id) << 24,
            register::VERSION => VERSION,
            _ => match self.entry_of(number) {
                Some((pin, shift)) => (self.entries[pin] >> shift) as u32,
                None => u32::MAX,
            },
        }
    }

    fn write_register(&mut self, ctx: &mut Context, number: u8, value: u32) {
        if number == register::ID {
            self.id = (value >> 24) as u8 & 0xF;
        }
        let Some((pin, shift)) = self.entry_of(number) else { return };
        let mask = 0xFFFF_FFFF << shift & entry::WRITABLE;
        self.entries[pin] = self.entries[pin] & !mask | u64::from(value) << shift & mask;
        self.entries[pin] &= !entry::DELIVERY_STATUS;
        if self.entries[pin] & entry::LEVEL == 0 {
            self.entries[pin] &= !entry::REMOTE_IRR;
        } else {
            self.service_level(ctx, pin);
        }
    }

    /// The pin and the bit offset behind a redirection register.
    fn entry_of(&self, number: u8) -> Option<(usize, u32)> {
        let index = usize::from(number.checked_sub(register::REDIRECTION)?);
        (index < 2 * PINS).then_some((index / 2, 32 * (index as u32 % 2)))
    }
}

impl Device for IoApic {
    fn read(&mut self, _ctx: &mut Context, offset: u64, data: &mut [u8]) {
        let value = match offset {
            register::SELECT => u32::from(self.select),
            register::WINDOW => self.read_register(self.select),
            _ => u32::MAX,
        };
        answer(data, u64::from(value));
    }

    fn write(&mut self, ctx: &mut Context, offset: u64, data: &[u8]) {
        let value = value_of(data) as u32;
        match offset {
            register::SELECT => self.select = value as u8,
            register::WINDOW if data.len() == 4 => self.write_register(ctx, self.select, value),
            register::EOI => self.end_of_interrupt(ctx, value as u8),
            _ => {}
        }
    }

    fn event(&mut self, _ctx: &mut Context, _token: u32) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bench, assert_round_trip, fuzz, steps};
    use proptest::prelude::*;

    fn program(bench: &mut Bench, ioapic: &mut IoApic, pin: u8, word: u64) {
        for (half, value) in [(1, word >> 32), (0, word & 0xFFFF_FFFF)] {
            bench.write(ioapic, 0x00, 4, u64::from(0x10 + 2 * pin + half));
            bench.write(ioapic, 0x10, 4, value);
        }
    }

    fn interrupt(vector: u8, level_triggered: bool) -> Effect {
        Effect::Interrupt { vector, level_triggered }
    }

    #[test]
    fn an_edge_sends_once() {
        let (mut bench, mut ioapic) = (Bench::new(), IoApic::new());
        program(&mut bench, &mut ioapic, 4, 0x31);
        for level in [true, true, false, true] {
            ioapic.set_line(&mut bench.context(), 4, level);
        }
        assert_eq!(bench.take(), vec![interrupt(0x31, false); 2]);
    }

    #[test]
    fn a_level_sends_again_until_it_falls() {
        let (mut bench, mut ioapic) = (Bench::new(), IoApic::new());
        program(&mut bench, &mut ioapic, 5, 0x8000 | 0x41);
        ioapic.set_line(&mut bench.context(), 5, true);
        ioapic.set_line(&mut bench.context(), 5, true);
        assert_eq!(bench.take(), vec![interrupt(0x41, true)]);
        bench.write(&mut ioapic, 0x00, 4, 0x1A);
        assert_eq!(bench.read(&mut ioapic, 0x10, 4) & 0x4000, 0x4000);
        ioapic.end_of_interrupt(&mut bench.context(), 0x41);
        assert_eq!(bench.take(), vec![interrupt(0x41, true)]);
        ioapic.set_line(&mut bench.context(), 5, false);
        ioapic.end_of_interrupt(&mut bench.context(), 0x41);
        assert_eq!(bench.take(), vec![]);
    }

    #[test]
    fn unmasking_an_active_level_sends_it() {
        let (mut bench, mut ioapic) = (Bench::new(), IoApic::new());
        ioapic.set_line(&mut bench.context(), 5, true);
        program(&mut bench, &mut ioapic, 5, 0x1_8041);
        assert_eq!(bench.take(), vec![]);
        program(&mut bench, &mut ioapic, 5, 0x8041);
        assert_eq!(bench.take(), vec![interrupt(0x41, true)]);
    }

    #[test]
    fn an_active_low_pin_is_active_when_low() {
        let (mut bench, mut ioapic) = (Bench::new(), IoApic::new());
        ioapic.set_line(&mut bench.context(), 5, true);
        program(&mut bench, &mut ioapic, 5, 0xA041);
        assert_eq!(bench.take(), vec![]);
        ioapic.set_line(&mut bench.context(), 5, false);
        assert_eq!(bench.take(), vec![interrupt(0x41, true)]);
    }

    #[test]
    fn the_version_names_the_pins() {
        let (mut bench, mut ioapic) = (Bench::new(), IoApic::new());
        bench.write(&mut ioapic, 0, 4, 1);
        assert_eq!(bench.read(&mut ioapic, 0x10, 4), 0x0017_0020);
    }

    proptest! {
        #[test]
        fn nothing_panics(steps in steps(0x100), lines in proptest::collection::vec(any::<(u8, bool)>(), 0..20)) {
            let (mut bench, mut ioapic) = (Bench::new(), IoApic::new());
            fuzz(&mut ioapic, &steps);
            for (gsi, level) in lines {
                ioapic.set_line(&mut bench.context(), gsi, level);
                ioapic.end_of_interrupt(&mut bench.context(), gsi);
            }
            assert_round_trip(&ioapic);
        }
    }
}
