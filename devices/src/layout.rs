//! Where everything is: the guest-physical map, the I/O ports and the global system interrupts.
//!
//! ```text
//! 0000_0000          low RAM
//!   000E_0000        ACPI tables, RSDP first (in RAM, reserved for the firmware)
//! C000_0000          end of low RAM
//! D000_0000          virtio-mmio windows, 4 KiB each
//! FEC0_0000          I/O APIC
//! FEE0_0000          local APIC (while in xAPIC mode)
//! 1_0000_0000        RAM beyond the first 3 GiB
//! ```

/// End of low RAM and start of the window for memory-mapped devices.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Where RAM beyond [`LOW_RAM_END`] continues.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Where the ACPI tables start; the RSDP is the first of them (ACPI 6.4, 5.2.5.1: below 1 MiB, 16-byte aligned).
pub const ACPI_START: u64 = 0xE_0000;
/// Bytes reserved for the ACPI tables.
pub const ACPI_LEN: u64 = 0x2_0000;

/// First virtio-mmio window.
pub const VIRTIO_START: u64 = 0xD000_0000;
/// Distance between two virtio-mmio windows, and the length of each, in bytes.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Most virtio devices a machine can have: one interrupt each.
pub const VIRTIO_SLOTS_MAX: u8 = 18;

/// The I/O APIC's window.
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// Length of the I/O APIC's window, in bytes.
pub const IOAPIC_LEN: u64 = 0x1000;
/// ID of the I/O APIC in the MADT.
pub const IOAPIC_ID: u8 = 1;
/// The local APIC's window in xAPIC mode (Intel SDM volume 3, 11.4.1).
pub const LAPIC_START: u64 = 0xFEE0_0000;
/// Length of the local APIC's window, in bytes.
pub const LAPIC_LEN: u64 = 0x1000;

/// CMOS clock: index port; the data port follows.
pub const CMOS_PORT: u16 = 0x70;
/// Number of ports of the CMOS clock.
pub const CMOS_PORTS: u16 = 2;
/// Keyboard controller: data port 0x60.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Keyboard controller: status and command port 0x64.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// First port of the serial console, COM1.
pub const SERIAL_PORT: u16 = 0x3F8;
/// Number of ports of the serial console.
pub const SERIAL_PORTS: u16 = 8;

/// First port of the power block; see [`crate::power`].
pub const POWER_PORT: u16 = 0x600;
/// Number of ports of the power block.
pub const POWER_PORTS: u16 = 5;
/// ACPI SLEEP_CONTROL_REG (ACPI 6.4, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = POWER_PORT;
/// ACPI SLEEP_STATUS_REG.
pub const SLEEP_STATUS_PORT: u16 = POWER_PORT + 1;
/// ACPI RESET_REG: the value is [`RESET_VALUE`].
pub const RESET_PORT: u16 = POWER_PORT + 2;
/// What the guest writes to [`RESET_PORT`] to ask for a reset.
pub const RESET_VALUE: u8 = 1;
/// A byte written here powers the machine off with that exit code.
pub const EXIT_PORT: u16 = POWER_PORT + 4;

/// Interrupt of the serial console.
pub const SERIAL_GSI: u8 = 4;
/// Interrupt of the CMOS clock.
pub const CMOS_GSI: u8 = 8;

/// Start of the window of the virtio device in `slot`.
pub const fn virtio_window(slot: u8) -> u64 {
    VIRTIO_START + slot as u64 * VIRTIO_STRIDE
}

/// Interrupt of the virtio device in `slot`: 5, 6, 7, then 9 and up, since 8 is the CMOS clock's.
pub const fn virtio_gsi(slot: u8) -> u8 {
    if slot < 3 { 5 + slot } else { slot.saturating_add(6) }
}

/// The (start, length) ranges of RAM of a machine with `bytes` of memory.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= LOW_RAM_END { vec![(0, bytes)] } else { vec![(0, LOW_RAM_END), (HIGH_RAM_START, bytes - LOW_RAM_END)] }
}

const _: () = assert!(virtio_window(VIRTIO_SLOTS_MAX) <= IOAPIC_START);
const _: () = assert!((virtio_gsi(VIRTIO_SLOTS_MAX - 1) as usize) < crate::ioapic::PINS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_not_shared() {
        let mut gsis: Vec<u8> = (0..VIRTIO_SLOTS_MAX).map(virtio_gsi).collect();
        gsis.extend([SERIAL_GSI, CMOS_GSI]);
        gsis.sort_unstable();
        let count = gsis.len();
        gsis.dedup();
        assert_eq!(gsis.len(), count);
    }

    #[test]
    fn ram_beyond_the_device_window_moves_up() {
        assert_eq!(ram_ranges(1 << 30), vec![(0, 1 << 30)]);
        assert_eq!(ram_ranges(4 << 30), vec![(0, LOW_RAM_END), (HIGH_RAM_START, 1 << 30)]);
    }
}
