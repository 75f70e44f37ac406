//! What the guest does to the devices: single accesses to every register, whole drivers' openings, and descriptors
//! that are nearly right.

use orrery_devices::layout;

use super::guest::{Kind, OPERATIONS_MAX, Operation};
use crate::bytes::Bytes;

/// Rings and buffers of the virtqueues.
const RINGS: u64 = 0x40_0000;
const RING_STRIDE: u64 = 0x4000;
const BUFFERS: u64 = 0x50_0000;
/// Virtio devices of the machine: entropy, console, network, two disks.
const SLOTS: usize = 5;
const END: Operation = Operation { kind: Kind::End, port: 0, address: 0, value: 0 };

/// Registers of virtio's memory-mapped transport that can be written.
const REGISTERS: [u64; 18] =
    [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0xAC, 0x100, 0x108];

struct Program {
    operations: Vec<Operation>,
    /// Next index of each queue's available ring.
    available: [[u16; 4]; SLOTS],
}

/// A number that some device may take for a size, an index or an address.
fn number(bytes: &mut Bytes) -> u64 {
    match bytes.u8() {
        small @ 0..=31 => small.into(),
        power @ 32..=95 => 1 << (power - 32),
        less @ 96..=127 => (1u64 << (less - 95)) - 1,
        128..=159 => RINGS + RING_STRIDE * u64::from(bytes.u8() % 20) + 16 * u64::from(bytes.u8()),
        160..=191 => BUFFERS + u64::from(bytes.u16()),
        192..=207 => u64::MAX - u64::from(bytes.u8()),
        208..=223 => bytes.u32().into(),
        224..=231 => layout::VIRTIO_START + u64::from(bytes.u16()),
        232..=239 => 0xFF_F000 + u64::from(bytes.u16()),
        _ => bytes.u64(),
    }
}

fn ring(slot: usize, queue: u64) -> u64 {
    RINGS + RING_STRIDE * (slot as u64 * 4 + queue % 4)
}

impl Program {
    fn push(&mut self, kind: Kind, port: u16, address: u64, value: u64) {
        self.operations.push(Operation { kind, port, address: address as u32, value });
    }

    fn store(&mut self, kind: Kind, address: u64, value: u64) {
        self.push(kind, 0, address, value);
    }

    fn register(&mut self, slot: usize, register: u64, value: u64) {
        self.store(Kind::Store32, layout::virtio_window(slot as u8) + register, value);
    }

    /// A driver's opening (virtio 1.2, 3.1.1), with one thing out of order if `broken` says so.
    fn open(&mut self, slot: usize, queues: u64, size: u64, broken: u8) {
        let skip = |step: u8| broken == step;
        for status in [0, 1, 3] {
            self.register(slot, 0x70, status);
        }
        for (select, features) in [(0, if skip(1) { u64::MAX } else { 1 << 28 | 0xFFFF & !0x20 }), (1, 1)] {
            self.register(slot, 0x24, select);
            if !skip(2) {
                self.register(slot, 0x20, if broken & 0x40 != 0 { 0 } else { features });
            }
        }
        if !skip(3) {
            self.register(slot, 0x70, 11);
        }
        for queue in 0..queues {
            let base = ring(slot, queue);
            self.register(slot, 0x30, queue);
            self.register(slot, 0x38, size);
            let stride = if skip(4) { 0 } else { 0x1000 };
            for (n, register) in [0x80, 0x90, 0xA0].into_iter().enumerate() {
                self.register(slot, register, base + stride * n as u64);
                self.register(slot, register + 4, u64::from(skip(5)));
            }
            self.register(slot, 0x44, 1);
            self.available[slot][queue as usize % 4] = 0;
            self.store(Kind::Store64, base + 0x1000, 0);
            self.store(Kind::Store64, base + 0x2000, 0);
        }
        self.register(slot, 0x70, if skip(6) { 7 } else { 15 });
    }

    /// A chain of descriptors, made available and announced.
    fn chain(&mut self, bytes: &mut Bytes, slot: usize, queue: u64) {
        let base = ring(slot, queue);
        let head = u64::from(bytes.u8() & 15);
        let count = 1 + bytes.below(4) as u64;
        for n in 0..count {
            let shape = bytes.u8();
            let address = if shape & 1 == 0 { BUFFERS + 0x1000 * n } else { number(bytes) };
            let len = match shape >> 1 & 7 {
                0 => 16,
                1 => 512,
                2 => 1,
                3 => 4096,
                4 => 32,
                _ => number(bytes) & 0xFFFF_FFFF,
            };
            let last = u64::from(n + 1 < count);
            let flags = match shape >> 4 & 7 {
                0 => last,
                1 | 2 => last | 2,
                3 => last | 4,
                4 => 3,
                5 => 4,
                6 => u64::from(bytes.u8()),
                _ => last | 2,
            };
            let next = if shape & 0x80 == 0 { head + n + 1 } else { u64::from(bytes.u16()) };
            self.descriptor(base + 16 * (head + n), address, len, flags, next);
        }
        self.publish(slot, queue, head);
    }

    fn descriptor(&mut self, at: u64, address: u64, len: u64, flags: u64, next: u64) {
        self.store(Kind::Store64, at, address);
        self.store(Kind::Store64, at + 8, len & 0xFFFF_FFFF | (flags & 0xFFFF) << 32 | next << 48);
    }

    fn publish(&mut self, slot: usize, queue: u64, head: u64) {
        let base = ring(slot, queue) + 0x1000;
        let index = &mut self.available[slot][queue as usize % 4];
        let at = base + 4 + 2 * u64::from(*index % 16);
        *index = index.wrapping_add(1);
        let now = u64::from(*index);
        self.store(Kind::Store16, at, head);
        self.store(Kind::Store16, base + 2, now);
        self.register(slot, 0x50, queue);
    }

    /// A request to a disk: header, data, status (virtio 1.2, 5.2.6).
    fn disk(&mut self, bytes: &mut Bytes) {
        let slot = 3 + bytes.below(2);
        let base = ring(slot, 0);
        let kind = bytes.pick(&[0u64, 1, 4, 8, 11, 13, 2, 0xFFFF_FFFF]);
        let sector = match bytes.u8() {
            small @ 0..200 => small.into(),
            _ => number(bytes),
        };
        let len = match bytes.u8() {
            blocks @ 0..200 => 512 * u64::from(blocks % 12),
            _ => number(bytes),
        };
        let header = BUFFERS + 0x8000;
        self.store(Kind::Store64, header, kind);
        self.store(Kind::Store64, header + 8, sector);
        if matches!(kind, 11 | 13) {
            self.store(Kind::Store64, BUFFERS, number(bytes));
            self.store(Kind::Store64, BUFFERS + 8, number(bytes));
        }
        let write = if matches!(kind, 0 | 8) { 2 } else { 0 };
        self.descriptor(base, header, 16, 1, 1);
        self.descriptor(base + 16, BUFFERS, len, 1 | write, 2);
        self.descriptor(base + 32, BUFFERS + 0x9000, 1, 2, 0);
        self.publish(slot, 0, 0);
    }

    fn interrupt_controllers(&mut self, bytes: &mut Bytes) {
        match bytes.u8() & 7 {
            0..=2 => {
                let at = layout::LAPIC_START + 16 * u64::from(bytes.u8() & 0x3F);
                self.store(Kind::Store32, at, number(bytes));
            }
            3 => {
                let at = layout::LAPIC_START + u64::from(bytes.u16() & 0x3FF);
                self.push(Kind::Load32, 0, at, 0);
            }
            4 | 5 => {
                // A redirection entry, or another register.
                self.store(Kind::Store32, layout::IOAPIC_START, u64::from(bytes.u8() & 0x3F));
                self.store(Kind::Store32, layout::IOAPIC_START + 0x10, number(bytes));
            }
            6 => {
                let msr = bytes.pick(&[0x1B, 0x6E0, 0x808, 0x80B, 0x80F, 0x830, 0x832, 0x838, 0x83E, 0x83F, 0x80D]);
                self.push(Kind::WriteMsr, 0, msr, number(bytes));
            }
            _ => {
                let msr = 0x800 + u64::from(bytes.u8() & 0x3F);
                self.push(Kind::ReadMsr, 0, msr, 0);
            }
        }
    }

    /// The timer at short notice, the serial port's interrupt, and everything let through.
    fn interrupts(&mut self, bytes: &mut Bytes) {
        self.store(Kind::Store32, layout::LAPIC_START + 0xF0, 0x1FF);
        self.store(Kind::Store32, layout::LAPIC_START + 0x80, 0);
        let mode = u64::from(bytes.u8() & 3) << 17;
        self.store(Kind::Store32, layout::LAPIC_START + 0x320, 0x40 | mode);
        self.store(Kind::Store32, layout::LAPIC_START + 0x3E0, u64::from(bytes.u8() & 0xB));
        self.store(Kind::Store32, layout::LAPIC_START + 0x380, u64::from(bytes.u16()));
        for pin in 4..12u64 {
            self.store(Kind::Store32, layout::IOAPIC_START, 0x10 + 2 * pin);
            let level = u64::from(bytes.u8() & 1) << 15;
            self.store(Kind::Store32, layout::IOAPIC_START + 0x10, 0x50 + pin | level);
        }
        self.push(Kind::Out8, 0x3F9, 0, 0xF);
    }

    fn port(bytes: &mut Bytes) -> u16 {
        match bytes.u8() {
            serial @ 0..=95 => layout::SERIAL_PORT + u16::from(serial & 7),
            96..=127 => 0x70,
            128..=159 => 0x71,
            160..=175 => 0x60,
            176..=191 => 0x64,
            power @ 192..=223 => layout::POWER_PORT + u16::from(power % 5),
            _ => bytes.u16(),
        }
    }

    fn step(&mut self, bytes: &mut Bytes) {
        let slot = |bytes: &mut Bytes| bytes.below(SLOTS);
        match bytes.u8() {
            0..=23 => {
                let kind = bytes.pick(&[Kind::Out8, Kind::Out8, Kind::Out16, Kind::Out32]);
                let port = Program::port(bytes);
                self.push(kind, port, 0, number(bytes));
            }
            24..=39 => {
                let kind = bytes.pick(&[Kind::In8, Kind::In8, Kind::In16, Kind::In32]);
                self.push(kind, Program::port(bytes), 0, 0);
            }
            40..=71 => {
                let (slot, register) = (slot(bytes), bytes.pick(&REGISTERS));
                self.register(slot, register, number(bytes));
            }
            72..=87 => {
                let kind = bytes.pick(&[Kind::Load8, Kind::Load32, Kind::Load64, Kind::LoadString]);
                let at = layout::virtio_window(bytes.u8() % 8) + u64::from(bytes.u16() & 0x1FF);
                self.push(kind, 0, at, 5);
            }
            88..=95 => {
                let kind = bytes.pick(&[Kind::Store8, Kind::Store16, Kind::Store64]);
                let at = layout::virtio_window(bytes.u8() % 20) + u64::from(bytes.u16() & 0x1FF);
                self.push(kind, 0, at, number(bytes));
            }
            96..=111 => {
                let slot = slot(bytes);
                let size = bytes.pick(&[16u64, 1, 2, 64, 256, 8, 32768, 7]);
                let broken = bytes.u8();
                let queues = 1 + u64::from(broken >> 7) + u64::from(matches!(slot, 1 | 2));
                self.open(slot, queues, size, broken & 0x7F);
            }
            112..=143 => {
                let slot = slot(bytes);
                let queue = u64::from(bytes.u8() & 1);
                self.chain(bytes, slot, queue);
            }
            144..=167 => self.disk(bytes),
            168..=191 => self.interrupt_controllers(bytes),
            192..=199 => self.interrupts(bytes),
            200..=207 => self.push(Kind::Wait, 0, 0, 0),
            208..=215 => {
                let rounds = u64::from(bytes.u16());
                self.push(Kind::Spin, 0, 0, rounds);
            }
            216..=223 => self.push(bytes.pick(&[Kind::Mask, Kind::Unmask]), 0, 0, 0),
            224..=231 => {
                let kind = bytes.pick(&[Kind::OutString, Kind::InString]);
                let port = Program::port(bytes);
                self.push(kind, port, BUFFERS, u64::from(bytes.u8()));
            }
            232..=247 => {
                // Into the rings, behind the driver's back.
                let at = RINGS + u64::from(bytes.u8() % 20) * RING_STRIDE + u64::from(bytes.u16() & 0x2FFF);
                let kind = bytes.pick(&[Kind::Store16, Kind::Store32, Kind::Store64]);
                self.push(kind, 0, at, number(bytes));
            }
            _ => {
                let (address, value) = (number(bytes), number(bytes));
                self.push(bytes.pick(&[Kind::Store64, Kind::Load64]), 0, address, value);
            }
        }
    }
}

/// The table for an input.
pub fn table(bytes: &mut Bytes) -> Vec<Operation> {
    let mut program = Program { operations: Vec::new(), available: [[0; 4]; SLOTS] };
    while !bytes.is_empty() && program.operations.len() < OPERATIONS_MAX - 64 {
        program.step(bytes);
    }
    program.operations.truncate(OPERATIONS_MAX - 1);
    program.operations.push(END);
    program.operations
}
