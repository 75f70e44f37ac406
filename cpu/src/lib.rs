//! The vCPU: its architectural state, the one CPU model every guest sees, and the engine that executes it.
//!
//! This room knows guest memory and nothing else of the machine: no device, no file, no host clock. What it
//! needs from outside (ports, memory-mapped I/O, interrupt-controller MSRs, virtual time, random numbers) it
//! asks of a [`Bus`]. Everything here is a pure function of the state, the memory and the answers of the bus.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod bus;
pub mod engine;
pub mod exception;
pub mod memory;
pub mod model;
mod page_set;
pub mod paging;
mod past;
pub mod state;
pub mod system;

pub use bus::Bus;
pub use exception::Exception;
pub use memory::PhysMemory;
pub use page_set::PageSet;
pub use past::Past;
pub use state::CpuState;

/// Instructions the vCPU has retired since power-on: the only clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Icount(pub u64);
