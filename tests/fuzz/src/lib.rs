//! What the fuzz targets are made of: generators that turn a fuzzer's bytes into something structured, and oracles
//! that say whether the product did right. The targets in `targets/` only join the two to libFuzzer.
//!
//! Every module stands for one target; each has an `execute` that panics when a promise is broken. How to run
//! them is in `docs/fuzzing.md`.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod bytes;
pub mod code;
pub mod devices;
mod elf;
pub mod formats;
pub mod paging;
pub mod watch;
