//! Device models as pure state machines: a guest access or a due event goes in, effects come out.
//!
//! This room knows guest memory (`vm-memory`) and virtual time. It knows no CPU, no host clock, no thread, no
//! file: what a device wants done outside it pushes as an [`Effect`], which the machine applies in order.
//!
//! Each device is a plain value whose serde form is its complete state; two devices with equal serde forms
//! answer every later access alike. Disks are the one exception: see [`disk`]. [`layout`] says where in the
//! guest-physical and port space each one is, [`acpi`] tells the guest.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

use vm_memory::GuestMemoryMmap;

pub mod acpi;
pub mod cmos;
pub mod disk;
pub mod i8042;
pub mod ioapic;
pub mod lapic;
pub mod layout;
pub mod power;
pub mod random;
pub mod serial;
pub mod virtio;
mod written;

pub use cmos::Cmos;
pub use disk::{CowDisk, Disk};
pub use i8042::I8042;
pub use ioapic::IoApic;
pub use lapic::{LocalApic, MsrError};
pub use power::Power;
pub use random::{Latency, RandomStream};
pub use serial::Serial;
pub use virtio::{Block, Console, Entropy, Net, VirtioMmio};
pub use written::WrittenPages;

/// The machine's RAM, which notes the pages that devices write.
pub type GuestMemory = GuestMemoryMmap<WrittenPages>;

/// Nanoseconds of virtual time since power-on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct VirtualNs(pub u64);

/// What a device asks of the machine. Collected during one call, applied in order right after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Sets the level of a global system interrupt line: for [`IoApic::set_line`].
    Line {
        /// Global system interrupt, an input of the I/O APIC.
        gsi: u8,
        /// The level the device drives.
        level: bool,
    },
    /// The I/O APIC sends an interrupt message to the local APIC: for [`LocalApic::set_irq`].
    Interrupt {
        /// Vector in the IDT.
        vector: u8,
        /// True if the pin is level triggered, so that the end of the interrupt must come back.
        level_triggered: bool,
    },
    /// The local APIC has ended a level-triggered interrupt: for [`IoApic::end_of_interrupt`].
    EndOfInterrupt {
        /// Vector in the IDT.
        vector: u8,
    },
    /// Asks for `event(token)` of the same device at this time; replaces an earlier request for the token.
    Wake {
        /// The device's own name for the event.
        token: u32,
        /// When it is due; a time in the past means at once.
        at: VirtualNs,
    },
    /// Takes back a request for `event(token)`.
    Cancel {
        /// The device's own name for the event.
        token: u32,
    },
    /// Bytes that leave the machine on a named channel ("console", "agent").
    Output {
        /// Which channel.
        channel: &'static str,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// The guest powers the machine off with this code.
    PowerOff {
        /// Exit code of the guest.
        code: u8,
    },
    /// The guest asks for a reset.
    Reset,
}

/// What surrounds a device during one call.
pub struct Context<'a> {
    /// Virtual time of the access or event.
    pub now: VirtualNs,
    /// Guest RAM, for devices that read and write it.
    pub memory: &'a GuestMemory,
    /// Where the device puts what it wants done.
    pub effects: &'a mut Vec<Effect>,
}

/// A device with registers on the bus.
pub trait Device {
    /// The guest reads `data.len()` bytes at `offset` in the device's window.
    fn read(&mut self, ctx: &mut Context, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` in the device's window.
    fn write(&mut self, ctx: &mut Context, offset: u64, data: &[u8]);
    /// A wake-up that the device asked for is due.
    fn event(&mut self, ctx: &mut Context, token: u32);
}

/// The little-endian value of an access of up to eight bytes.
pub(crate) fn value_of(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Answers a read with a little-endian value; bytes beyond the eighth are zero.
pub(crate) fn answer(data: &mut [u8], value: u64) {
    let bytes = value.to_le_bytes();
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(index).copied().unwrap_or(0);
    }
}

/// Answers a byte-wide read, whatever its width: a wider access sees only this register.
pub(crate) fn answer_byte(data: &mut [u8], value: u8) {
    data.fill(0xFF);
    if let Some(first) = data.first_mut() {
        *first = value;
    }
}

#[cfg(test)]
pub(crate) mod testing;
