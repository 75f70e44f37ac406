//! How the vCPU reaches the board: ports, memory-mapped registers, interrupt-controller MSRs, time, random numbers.

use orrery_cpu::bus::{MsrRefused, TscLine};
use orrery_cpu::{Bus, Icount};
use orrery_devices::layout;

use super::Board;
use super::devices::Devices;
use crate::queue::DeviceId;

const SERIAL_END: u16 = layout::SERIAL_PORT + layout::SERIAL_PORTS;
const CMOS_END: u16 = layout::CMOS_PORT + layout::CMOS_PORTS;
const POWER_END: u16 = layout::POWER_PORT + layout::POWER_PORTS;

/// The one register of a virtio device whose write makes it read and write RAM (virtio 1.2, 4.2.2).
const VIRTIO_QUEUE_NOTIFY: u64 = 0x050;

/// Whose port it is, and the offset in its window.
fn port_owner(port: u16) -> Option<(DeviceId, u64)> {
    let (id, start) = match port {
        layout::SERIAL_PORT..SERIAL_END => (Devices::SERIAL, layout::SERIAL_PORT),
        layout::CMOS_PORT..CMOS_END => (Devices::CMOS, layout::CMOS_PORT),
        layout::I8042_DATA_PORT | layout::I8042_COMMAND_PORT => (Devices::I8042, layout::I8042_DATA_PORT),
        layout::POWER_PORT..POWER_END => (Devices::POWER, layout::POWER_PORT),
        _ => return None,
    };
    Some((id, u64::from(port - start)))
}

impl Board {
    /// Whose memory-mapped register it is, and the offset in its window.
    fn mmio_owner(gpa: u64) -> Option<(DeviceId, u64)> {
        if (layout::LAPIC_START..layout::LAPIC_START + layout::LAPIC_LEN).contains(&gpa) {
            return Some((Devices::LAPIC, gpa - layout::LAPIC_START));
        }
        if (layout::IOAPIC_START..layout::IOAPIC_START + layout::IOAPIC_LEN).contains(&gpa) {
            return Some((Devices::IOAPIC, gpa - layout::IOAPIC_START));
        }
        let offset = gpa.checked_sub(layout::VIRTIO_START)?;
        let slot = offset / layout::VIRTIO_STRIDE;
        let id = Devices::virtio(u8::try_from(slot).ok().filter(|slot| *slot < layout::VIRTIO_SLOTS_MAX)?);
        Some((id, offset % layout::VIRTIO_STRIDE))
    }

    fn after_port_access(&mut self, id: DeviceId) {
        if id == Devices::SERIAL {
            self.offer_input();
        }
    }
}

impl Bus for Board {
    fn port_read(&mut self, now: Icount, port: u16, size: usize) -> u32 {
        let mut data = [0xFF; 4];
        if let Some((id, offset)) = port_owner(port) {
            let data = &mut data[..size.min(4)];
            self.access(now, id, |device, ctx| device.read(ctx, offset, data));
            self.after_port_access(id);
        }
        let value = u32::from_le_bytes(data);
        if size < 4 { value & ((1 << (8 * size)) - 1) } else { value }
    }

    fn port_write(&mut self, now: Icount, port: u16, size: usize, value: u32) {
        if let Some((id, offset)) = port_owner(port) {
            let data = value.to_le_bytes();
            self.access(now, id, |device, ctx| device.write(ctx, offset, &data[..size.min(4)]));
            self.after_port_access(id);
        }
    }

    fn mmio_read(&mut self, now: Icount, gpa: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some((id, offset)) = Board::mmio_owner(gpa) {
            self.access(now, id, |device, ctx| device.read(ctx, offset, data));
        }
    }

    fn mmio_write(&mut self, now: Icount, gpa: u64, data: &[u8]) {
        if let Some((id, offset)) = Board::mmio_owner(gpa) {
            let notifies = Devices::is_virtio(id) && offset == VIRTIO_QUEUE_NOTIFY;
            if notifies {
                self.before_memory_access();
            }
            self.access(now, id, |device, ctx| device.write(ctx, offset, data));
            if notifies {
                self.note_virtio_access();
                self.offer_agent_input();
            }
        }
    }

    fn msr_read(&mut self, now: Icount, msr: u32) -> Result<u64, MsrRefused> {
        let now = self.clock.now(now);
        self.devices.lapic.msr_read(now, msr).map_err(|_| MsrRefused)
    }

    fn msr_write(&mut self, now: Icount, msr: u32, value: u64) -> Result<(), MsrRefused> {
        self.write_lapic_msr(now, msr, value).map_err(|_| MsrRefused)
    }

    fn task_priority(&mut self, _now: Icount) -> u8 {
        self.devices.lapic.task_priority()
    }

    fn set_task_priority(&mut self, _now: Icount, value: u8) {
        self.devices.lapic.set_task_priority(value);
        self.note_interrupts();
    }

    fn tsc(&mut self, now: Icount) -> u64 {
        self.clock.now(now).0
    }

    fn tsc_line(&self, limit: Icount) -> Option<TscLine> {
        let per_instruction = self.clock.ns_per_instruction();
        // Beyond, time saturates.
        let at_limit = limit.0.checked_mul(per_instruction)?.checked_add(self.clock.skipped_ns())?;
        Some(TscLine { at_limit, per_instruction })
    }

    fn random(&mut self) -> u64 {
        self.devices.rdrand.next_u64()
    }

    fn attention(&self) -> bool {
        self.wants_attention()
    }
}
