//! Virtio 1.2 devices behind the modern memory-mapped transport.
//!
//! [`VirtioMmio`] is the transport: registers, status, interrupt line. What a device does is a [`VirtioDevice`], one
//! module each: [`block`], [`net`], [`entropy`], [`console`]. [`queue`] holds the virtqueues and turns what the guest
//! put into them into checked [`queue::Chain`]s.
//!
//! The guest is not trusted. A ring or chain that breaks the specification sets DEVICE_NEEDS_RESET, after which the
//! device does nothing until the driver resets it; work and memory per notification are bounded by the queue's size
//! and by each device's limit on the bytes of a chain.

pub mod block;
pub mod console;
pub mod entropy;
pub mod net;
pub mod queue;
mod transport;

#[cfg(test)]
pub(crate) mod driver;

pub use block::Block;
pub use console::Console;
pub use entropy::Entropy;
pub use net::Net;
pub use transport::{Queues, VirtioDevice, VirtioMmio};
