//! The machine put together: its time, its runs, and the `orrery` command.
//!
//! [`machine`] joins the vCPU's engine with the devices; [`time`], [`queue`], [`ram`], [`boot`], [`digest`] and
//! [`chain`] are its parts, and are pure; [`inspect`] looks at it from outside. Host effects (files, threads, signals, the host's clock for speed and
//! progress) live in [`run`], [`host`] and [`cli`] alone. Dependencies point one way: from here to `orrery-cpu`,
//! `orrery-devices` and the image format.
//!
//! To run a machine from a program:
//!
//! ```no_run
//! use orrery_vmm::{Limits, Machine, MachineConfig, Seed};
//! use orrery_cpu::Icount;
//!
//! let image = orrery_guest_image::Image::open("hello.img")?;
//! let mut machine = Machine::new(&image, &MachineConfig::default(), Seed(1), Default::default())?;
//! machine.run(Limits::until(Icount(1_000_000)))?;
//! println!("{}", machine.state_hash());
//! machine.run(Limits::until(Icount(2_000_000)))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod boot;
pub mod chain;
pub mod cli;
pub mod config;
pub mod debug;
pub mod digest;
pub mod guest_agent;
pub mod host;
pub mod inputs;
pub mod inspect;
pub mod machine;
pub mod moment;
pub mod page_hash;
pub mod perturb;
pub mod queue;
pub mod ram;
pub mod run;
pub mod store;
pub mod time;
pub mod translation_cache;
pub mod verify;

pub use config::{MachineConfig, Seed};
pub use machine::{BranchError, Limits, Machine, MachineError, Pause, SPARES_MAX, Template};
