//! Runs on disk: a directory per run with its manifest, console log, hash chain and log of inputs.
//!
//! Host effects live here: files are created, flushed and renamed so that a crash leaves either no manifest, a
//! manifest that says "running", or a complete one.

pub mod archive;
mod beside;
pub mod directory;
pub mod manifest;
pub mod recorder;
pub mod snapshots;

pub use directory::{RunDirectory, StoreError};
pub use manifest::{Ended, Manifest};
pub use recorder::{Recorder, Summary};
pub use snapshots::SnapshotOptions;
