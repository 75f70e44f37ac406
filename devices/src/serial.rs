//! The serial console: a 16550A (National Semiconductor PC16550D datasheet) at COM1.
//!
//! Transmission takes no virtual time: a byte written to the THR leaves at once as [`Effect::Output`] on channel
//! "console", and the transmitter is empty again.
//!
//! The peer loses no input: bytes wait in a bounded queue, and enter the receive FIFO of 16 bytes while there is room
//! and the driver listens. A driver listens with the receive interrupt enabled and, if it has ever written the modem
//! control register, RTS asserted. The first byte comes one character later, as from a wire: a driver that starts
//! empties the receiver and turns the FIFOs on in between, which would discard it.
//!
//! A driver that has never enabled the receive interrupt polls. It listens when it reads the line status twice in a
//! row: the transmitter is always empty, so there is nothing else to wait for.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::{Context, Device, Effect, VirtualNs, answer_byte, layout};

/// The channel of the bytes that the guest sends.
pub const CHANNEL: &str = "console";
/// Most bytes of input that wait to be read by the guest.
pub const INPUT_MAX: usize = 64 * 1024;
/// Size of the receive FIFO, in bytes.
const FIFO_LEN: usize = 16;
/// Four characters of ten bits at 115200 baud: when a partly filled FIFO raises its timeout interrupt.
const TIMEOUT_NS: u64 = 347_000;
/// The token of that timeout.
const TIMEOUT_TOKEN: u32 = 0;
/// One character of ten bits at 115200 baud, rounded up: from when a driver listens to the first byte.
const CHARACTER_NS: u64 = 87_000;
/// The token of the first byte.
const CHARACTER_TOKEN: u32 = 1;

mod ier {
    pub const RECEIVED: u8 = 1;
    pub const TRANSMITTER_EMPTY: u8 = 2;
    pub const MODEM_STATUS: u8 = 8;
    pub const WRITABLE: u8 = 0x0F;
}

mod iir {
    pub const NONE: u8 = 0x01;
    pub const MODEM_STATUS: u8 = 0x00;
    pub const TRANSMITTER_EMPTY: u8 = 0x02;
    pub const RECEIVED: u8 = 0x04;
    pub const TIMEOUT: u8 = 0x0C;
    pub const FIFO_ENABLED: u8 = 0xC0;
}

mod fcr {
    pub const ENABLE: u8 = 1;
    pub const CLEAR_RECEIVE: u8 = 2;
}

mod lcr {
    pub const DIVISOR_LATCH: u8 = 0x80;
}

/// Offset of the line status register.
const LINE_STATUS: u64 = 5;

mod lsr {
    pub const DATA_READY: u8 = 0x01;
    pub const TRANSMITTER_EMPTY: u8 = 0x60;
}

mod mcr {
    pub const DTR: u8 = 0x01;
    pub const RTS: u8 = 0x02;
    pub const OUT1: u8 = 0x04;
    pub const OUT2: u8 = 0x08;
    pub const LOOPBACK: u8 = 0x10;
    pub const WRITABLE: u8 = 0x1F;
}

mod msr {
    pub const CTS: u8 = 0x10;
    pub const DSR: u8 = 0x20;
    pub const RI: u8 = 0x40;
    pub const DCD: u8 = 0x80;
}

/// What the peer does with bytes that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Peer {
    /// The driver does not listen.
    Held,
    /// It has begun to listen; the first character is on its way.
    Starting,
    /// Bytes arrive as there is room.
    Sending,
}

/// The 16550A.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Serial {
    divisor: [u8; 2],
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    /// Modem lines and, in the low half, which of them changed since the last read.
    modem_status: u8,
    scratch: u8,
    /// The transmitter-empty interrupt is pending: set when the THR empties or the interrupt is enabled, cleared by
    /// reading it from the IIR.
    transmitter_interrupt: bool,
    timed_out: bool,
    /// The receive FIFO; one byte with FIFOs off.
    received: VecDeque<u8>,
    /// What the peer has yet to send.
    waiting: VecDeque<u8>,
    peer: Peer,
    /// The guest has written the modem control register.
    handshake: bool,
    /// The guest has enabled the receive interrupt, now or earlier.
    interrupts: bool,
    /// The last access read the line status.
    status_read: bool,
    line: bool,
}

impl Default for Serial {
    fn default() -> Serial {
        Serial::new()
    }
}

impl Serial {
    /// A serial port at power-on with a peer that is always ready.
    pub fn new() -> Serial {
        Serial {
            divisor: [12, 0],
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 3,
            modem_control: 0,
            modem_status: msr::CTS | msr::DSR | msr::DCD,
            scratch: 0,
            transmitter_interrupt: false,
            timed_out: false,
            received: VecDeque::new(),
            waiting: VecDeque::new(),
            peer: Peer::Held,
            handshake: false,
            interrupts: false,
            status_read: false,
            line: false,
        }
    }

    /// Bytes from outside arrive. Takes as many as fit into the queue and says how many.
    pub fn input(&mut self, ctx: &mut Context, bytes: &[u8]) -> usize {
        let count = bytes.len().min(INPUT_MAX.saturating_sub(self.waiting.len()));
        self.waiting.extend(&bytes[..count]);
        self.receive(ctx);
        self.update_line(ctx);
        count
    }

    /// The driver is ready for input, as far as its registers say.
    fn listens(&self) -> bool {
        self.connected() && self.interrupt_enable & ier::RECEIVED != 0
    }

    /// The peer may send: RTS is asserted, unless the driver does not know of it, and the receiver is not looped back.
    fn connected(&self) -> bool {
        (!self.handshake || self.modem_control & mcr::RTS != 0) && !self.loopback()
    }

    /// Starts or stops the peer after a register was written.
    fn update_peer(&mut self, ctx: &mut Context) {
        match (self.listens(), self.peer) {
            (true, Peer::Held) => {
                self.peer = Peer::Starting;
                let at = VirtualNs(ctx.now.0.saturating_add(CHARACTER_NS));
                ctx.effects.push(Effect::Wake { token: CHARACTER_TOKEN, at });
            }
            (false, Peer::Starting | Peer::Sending) => {
                if self.peer == Peer::Starting {
                    ctx.effects.push(Effect::Cancel { token: CHARACTER_TOKEN });
                }
                self.peer = Peer::Held;
            }
            _ => {}
        }
    }

    /// The line status is read: the second time in a row, a driver that polls is given what waits.
    fn poll(&mut self, ctx: &mut Context) {
        if self.status_read && !self.interrupts && self.connected() {
            self.fill(ctx);
        }
    }

    /// Lets the peer send, if it does.
    fn receive(&mut self, ctx: &mut Context) {
        if self.peer == Peer::Sending {
            self.fill(ctx);
        }
    }

    /// Moves what waits into the receive FIFO, as far as there is room.
    fn fill(&mut self, ctx: &mut Context) {
        let room = self.fifo_len().saturating_sub(self.received.len()).min(self.waiting.len());
        if room > 0 {
            self.received.extend(self.waiting.drain(..room));
            self.receive_changed(ctx);
        }
    }

    fn fifo_len(&self) -> usize {
        if self.fifo_enabled() { FIFO_LEN } else { 1 }
    }

    fn loopback(&self) -> bool {
        self.modem_control & mcr::LOOPBACK != 0
    }

    fn fifo_enabled(&self) -> bool {
        self.fifo_control & fcr::ENABLE != 0
    }

    fn divisor_latch(&self) -> bool {
        self.line_control & lcr::DIVISOR_LATCH != 0
    }

    /// Number of bytes in the FIFO that raise the received-data interrupt.
    fn trigger_level(&self) -> usize {
        match (self.fifo_enabled(), self.fifo_control >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    /// The receive FIFO was filled or drained: the timeout of a partly filled one starts over.
    fn receive_changed(&mut self, ctx: &mut Context) {
        self.timed_out = false;
        let partly = self.fifo_enabled() && !self.received.is_empty() && self.received.len() < self.trigger_level();
        ctx.effects.push(if partly {
            Effect::Wake { token: TIMEOUT_TOKEN, at: VirtualNs(ctx.now.0.saturating_add(TIMEOUT_NS)) }
        } else {
            Effect::Cancel { token: TIMEOUT_TOKEN }
        });
    }

    /// The pending interrupt of highest priority, as the IIR shows it (datasheet, table III).
    fn pending(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(ier::RECEIVED) && self.received.len() >= self.trigger_level() {
            iir::RECEIVED
        } else if enabled(ier::RECEIVED) && self.timed_out {
            iir::TIMEOUT
        } else if enabled(ier::TRANSMITTER_EMPTY) && self.transmitter_interrupt {
            iir::TRANSMITTER_EMPTY
        } else if enabled(ier::MODEM_STATUS) && self.modem_status & 0x0F != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    /// Drives the interrupt line. OUT2 gates it, as on every PC; in loopback mode it is disconnected.
    fn update_line(&mut self, ctx: &mut Context) {
        let gate = self.modem_control & mcr::OUT2 != 0 && !self.loopback();
        let level = gate && self.pending() != iir::NONE;
        if level != self.line {
            self.line = level;
            ctx.effects.push(Effect::Line { gsi: layout::SERIAL_GSI, level });
        }
    }

    /// The modem lines: the peer's, or in loopback mode our own.
    fn update_modem_lines(&mut self) {
        let lines = if self.loopback() {
            [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
                .iter()
                .filter(|(control, _)| self.modem_control & control != 0)
                .fold(0, |lines, (_, status)| lines | status)
        } else {
            msr::CTS | msr::DSR | msr::DCD
        };
        let changed = (lines ^ self.modem_status) & 0xF0;
        // The ring indicator's delta bit reports only its trailing edge.
        let rose = lines & msr::RI;
        self.modem_status = lines | self.modem_status & 0x0F | (changed & !rose) >> 4;
    }

    fn transmit(&mut self, ctx: &mut Context, byte: u8) {
        if self.loopback() {
            if self.received.len() < self.fifo_len() {
                self.received.push_back(byte);
                self.receive_changed(ctx);
            }
        } else {
            ctx.effects.push(Effect::Output { channel: CHANNEL, bytes: vec![byte] });
        }
        self.transmitter_interrupt = true;
    }

    fn read_register(&mut self, ctx: &mut Context, offset: u64) -> u8 {
        match offset {
            0 | 1 if self.divisor_latch() => self.divisor[offset as usize],
            0 => {
                let byte = self.received.pop_front().unwrap_or(0);
                self.receive_changed(ctx);
                byte
            }
            1 => self.interrupt_enable,
            2 => {
                let pending = self.pending();
                if pending == iir::TRANSMITTER_EMPTY {
                    self.transmitter_interrupt = false;
                }
                pending | if self.fifo_enabled() { iir::FIFO_ENABLED } else { 0 }
            }
            3 => self.line_control,
            4 => self.modem_control,
            LINE_STATUS => lsr::TRANSMITTER_EMPTY | if self.received.is_empty() { 0 } else { lsr::DATA_READY },
            6 => {
                let status = self.modem_status;
                self.modem_status &= 0xF0;
                status
            }
            7 => self.scratch,
            _ => 0xFF,
        }
    }

    fn write_register(&mut self, ctx: &mut Context, offset: u64, value: u8) {
        match offset {
            0 | 1 if self.divisor_latch() => self.divisor[offset as usize] = value,
            0 => self.transmit(ctx, value),
            1 => {
                let enabled = value & !self.interrupt_enable;
                self.interrupt_enable = value & ier::WRITABLE;
                self.interrupts |= value & ier::RECEIVED != 0;
                if enabled & ier::TRANSMITTER_EMPTY != 0 {
                    self.transmitter_interrupt = true;
                }
            }
            2 => {
                // Turning the FIFOs on or off clears them; so does the bit for it.
                let switched = (value ^ self.fifo_control) & fcr::ENABLE != 0;
                self.fifo_control = if value & fcr::ENABLE != 0 { value & 0xC9 } else { 0 };
                if value & fcr::CLEAR_RECEIVE != 0 || switched {
                    self.received.clear();
                }
                self.receive_changed(ctx);
            }
            3 => self.line_control = value,
            4 => {
                self.modem_control = value & mcr::WRITABLE;
                self.handshake = true;
                self.update_modem_lines();
            }
            7 => self.scratch = value,
            _ => {}
        }
    }
}

impl Device for Serial {
    fn read(&mut self, ctx: &mut Context, offset: u64, data: &mut [u8]) {
        if offset == LINE_STATUS {
            self.poll(ctx);
        }
        self.status_read = offset == LINE_STATUS;
        let value = self.read_register(ctx, offset);
        self.receive(ctx);
        self.update_line(ctx);
        answer_byte(data, value);
    }

    fn write(&mut self, ctx: &mut Context, offset: u64, data: &[u8]) {
        // A wider access reaches consecutive registers, as it does on an 8-bit bus.
        for (index, byte) in data.iter().enumerate() {
            self.write_register(ctx, offset.saturating_add(index as u64), *byte);
        }
        self.status_read = false;
        self.update_peer(ctx);
        self.receive(ctx);
        self.update_line(ctx);
    }

    fn event(&mut self, ctx: &mut Context, token: u32) {
        match token {
            TIMEOUT_TOKEN if self.fifo_enabled() && !self.received.is_empty() => self.timed_out = true,
            CHARACTER_TOKEN if self.peer == Peer::Starting => {
                self.peer = Peer::Sending;
                self.receive(ctx);
            }
            _ => return,
        }
        self.update_line(ctx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bench, assert_round_trip, fuzz, steps};
    use proptest::prelude::*;

    /// Lets the character's time pass that a driver waits for the first byte.
    fn pass_character(bench: &mut Bench, serial: &mut Serial) {
        bench.now = bench.wake(CHARACTER_TOKEN).expect("the driver has begun to listen");
        bench.event(serial, CHARACTER_TOKEN);
    }

    fn lines(effects: Vec<Effect>) -> Vec<bool> {
        let level = |effect| if let Effect::Line { level, .. } = effect { Some(level) } else { None };
        effects.into_iter().filter_map(level).collect()
    }

    #[test]
    fn bytes_leave_in_order() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        for byte in b"hi" {
            assert_eq!(bench.read(&mut serial, 5, 1) & 0x60, 0x60);
            bench.write(&mut serial, 0, 1, u64::from(*byte));
        }
        let output = |byte: u8| Effect::Output { channel: CHANNEL, bytes: vec![byte] };
        assert_eq!(bench.take(), vec![output(b'h'), output(b'i')]);
    }

    /// The steps of Linux's autoconfig that tell a 16550A from its ancestors.
    #[test]
    fn a_driver_finds_a_16550a() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        bench.write(&mut serial, 1, 1, 0);
        assert_eq!(bench.read(&mut serial, 1, 1) & 0x0F, 0);
        bench.write(&mut serial, 1, 1, 0x0F);
        assert_eq!(bench.read(&mut serial, 1, 1) & 0x0F, 0x0F);
        bench.write(&mut serial, 4, 1, 0x1A);
        assert_eq!(bench.read(&mut serial, 6, 1) & 0xF0, 0x90);
        bench.write(&mut serial, 4, 1, 0);
        bench.write(&mut serial, 2, 1, 1);
        assert_eq!(bench.read(&mut serial, 2, 1) >> 6, 3);
        bench.write(&mut serial, 2, 1, 0);
        assert_eq!(bench.read(&mut serial, 2, 1) >> 6, 0);
        bench.write(&mut serial, 7, 1, 0x5A);
        assert_eq!(bench.read(&mut serial, 7, 1), 0x5A);
    }

    #[test]
    fn the_transmitter_interrupt_comes_back_when_enabled_again() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        bench.write(&mut serial, 4, 1, 0x08);
        for _ in 0..2 {
            bench.write(&mut serial, 1, 1, 2);
            assert_eq!(bench.read(&mut serial, 2, 1), 2);
            assert_eq!(bench.read(&mut serial, 2, 1), 1);
            bench.write(&mut serial, 1, 1, 0);
        }
        assert_eq!(lines(bench.take()), vec![true, false, true, false]);
    }

    #[test]
    fn received_bytes_interrupt_at_the_trigger_level_or_after_a_while() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        bench.write(&mut serial, 4, 1, 0x0A);
        bench.write(&mut serial, 2, 1, 0x81);
        bench.write(&mut serial, 1, 1, 1);
        pass_character(&mut bench, &mut serial);
        assert_eq!(serial.input(&mut bench.context(), b"abc"), 3);
        assert_eq!(bench.read(&mut serial, 2, 1), 0xC1);
        bench.now = bench.wake(TIMEOUT_TOKEN).unwrap();
        bench.event(&mut serial, TIMEOUT_TOKEN);
        assert_eq!(bench.read(&mut serial, 2, 1), 0xCC);
        for byte in b"abc" {
            assert_eq!(bench.read(&mut serial, 5, 1), 0x61);
            assert_eq!(bench.read(&mut serial, 0, 1), u64::from(*byte));
        }
        assert_eq!(bench.read(&mut serial, 5, 1), 0x60);
        assert_eq!(serial.input(&mut bench.context(), b"12345678"), 8);
        assert_eq!(bench.read(&mut serial, 2, 1), 0xC4);
    }

    #[test]
    fn the_queue_of_input_is_bounded() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        assert_eq!(serial.input(&mut bench.context(), &vec![0; INPUT_MAX + 10]), INPUT_MAX);
        assert_eq!(serial.input(&mut bench.context(), b"x"), 0);
        bench.write(&mut serial, 1, 1, 1);
        pass_character(&mut bench, &mut serial);
        // One byte has gone on into the receiver.
        assert_eq!(serial.input(&mut bench.context(), b"xy"), 1);
        assert_eq!(serial.input(&mut bench.context(), b"z"), 0);
    }

    /// All that the receiver has, as a driver's interrupt handler reads it.
    fn drain(bench: &mut Bench, serial: &mut Serial) -> Vec<u8> {
        let mut read = Vec::new();
        while bench.read(serial, 5, 1) & 1 == 1 {
            read.push(bench.read(serial, 0, 1) as u8);
        }
        read
    }

    /// Linux: finds out the chip; starts up, which clears the FIFOs and reads what is left over; sets the line's speed,
    /// which enables the receive interrupt and then the FIFOs; and reads what is left over once more.
    #[test]
    fn input_waits_for_the_driver() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        let text: Vec<u8> = (0..100).collect();
        assert_eq!(serial.input(&mut bench.context(), &text), 100);
        for value in [0, 0x0F, 0] {
            bench.write(&mut serial, 1, 1, value);
        }
        bench.write(&mut serial, 4, 1, 0x08);
        for value in [1, 7, 0] {
            bench.write(&mut serial, 2, 1, value);
        }
        assert_eq!(bench.read(&mut serial, 5, 1), 0x60);
        assert_eq!(bench.read(&mut serial, 0, 1), 0);
        assert_eq!(bench.wake(CHARACTER_TOKEN), None);
        bench.write(&mut serial, 4, 1, 0x0B);
        bench.write(&mut serial, 1, 1, 5);
        for value in [1, 0x81] {
            bench.write(&mut serial, 2, 1, value);
        }
        bench.now += 10_000;
        assert_eq!(bench.read(&mut serial, 5, 1), 0x60);
        assert_eq!(bench.read(&mut serial, 0, 1), 0);
        assert_eq!(bench.wake(CHARACTER_TOKEN), Some(CHARACTER_NS));
        let mut serial = assert_round_trip(&serial);
        pass_character(&mut bench, &mut serial);
        assert_eq!(drain(&mut bench, &mut serial), text);
    }

    #[test]
    fn input_waits_while_the_driver_does_not_listen() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        bench.write(&mut serial, 4, 1, 0x0B);
        bench.write(&mut serial, 1, 1, 1);
        // It looks away before the first character has come: nothing comes, even if it looks twice.
        bench.write(&mut serial, 1, 1, 0);
        assert_eq!(bench.wake(CHARACTER_TOKEN), None);
        serial.input(&mut bench.context(), b"ab");
        bench.event(&mut serial, CHARACTER_TOKEN);
        assert_eq!(bench.read(&mut serial, 5, 1), 0x60);
        assert_eq!(bench.read(&mut serial, 5, 1), 0x60);
        bench.write(&mut serial, 1, 1, 1);
        pass_character(&mut bench, &mut serial);
        // RTS goes down: what is in the receiver stays, and nothing follows it.
        bench.write(&mut serial, 4, 1, 0x08);
        assert_eq!(drain(&mut bench, &mut serial), b"a");
        bench.write(&mut serial, 4, 1, 0x0A);
        assert_eq!(drain(&mut bench, &mut serial), b"");
        pass_character(&mut bench, &mut serial);
        assert_eq!(drain(&mut bench, &mut serial), b"b");
    }

    #[test]
    fn a_driver_that_polls_gets_input_when_it_waits_for_it() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        serial.input(&mut bench.context(), b"xyz");
        // The status before a transmission is not waiting.
        for byte in b"out" {
            assert_eq!(bench.read(&mut serial, 5, 1), 0x60);
            bench.write(&mut serial, 0, 1, u64::from(*byte));
        }
        for byte in b"xyz" {
            assert_eq!(bench.read(&mut serial, 5, 1), 0x60);
            assert_eq!(bench.read(&mut serial, 5, 1), 0x61);
            assert_eq!(bench.read(&mut serial, 0, 1), u64::from(*byte));
        }
    }

    #[test]
    fn loopback_does_not_mix_with_input() {
        let (mut bench, mut serial) = (Bench::new(), Serial::new());
        bench.write(&mut serial, 4, 1, 0x12);
        bench.write(&mut serial, 1, 1, 1);
        serial.input(&mut bench.context(), b"input");
        bench.write(&mut serial, 0, 1, u64::from(b'x'));
        assert_eq!(bench.read(&mut serial, 0, 1), u64::from(b'x'));
        bench.write(&mut serial, 4, 1, 0x02);
        pass_character(&mut bench, &mut serial);
        assert_eq!(bench.read(&mut serial, 0, 1), u64::from(b'i'));
    }

    proptest! {
        #[test]
        fn nothing_panics(steps in steps(10), bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let (mut bench, mut serial) = (Bench::new(), Serial::new());
            serial.input(&mut bench.context(), &bytes);
            let mut twin = assert_round_trip(&serial);
            prop_assert_eq!(fuzz(&mut serial, &steps), fuzz(&mut twin, &steps));
            assert_round_trip(&serial);
        }
    }
}
