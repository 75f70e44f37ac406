//! Device models as pure state machines: a guest access or a due event goes in, effects come out.
//!
//! This room knows guest memory (`vm-memory`) and virtual time. It knows no CPU, no host clock, no thread, no
//! file: what a device wants done outside it pushes as an [`Effect`], which the machine applies in order.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// The machine's RAM; the bitmap records the pages that devices write.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;

/// Nanoseconds of virtual time since power-on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct VirtualNs(pub u64);

/// What a device asks of the machine. Collected during one call, applied in order right after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Sets the level of a global system interrupt line.
    Line {
        /// Global system interrupt, an input of the I/O APIC.
        gsi: u8,
        /// The level the device drives.
        level: bool,
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
