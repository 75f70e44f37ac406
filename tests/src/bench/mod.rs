//! The benchmark: the same binaries natively, in QEMU and in Orrery, timed from outside.
//!
//! [`lines`] says what is measured, [`programs`] what each program is made of, [`prepare`] makes images of them,
//! [`platform`] knows how a program is started natively, in QEMU and in Orrery, [`session`] runs it once and keeps the
//! time, [`schedule`] interleaves the rounds, [`figures`] is the file, [`table`] and [`chart`] show it to people,
//! [`compare`] says which lines moved between two files, [`pace`] how busy the host was with other things.
//! [`snapshots`] and [`warm`] are a benchmark of their own, of branches and snapshots in one process; [`debug`] is another,
//! of going to the moments of a long run and back. All have [`percentiles`].
//! `docs/benchmarks.md` explains how to read the result.

pub mod chart;
pub mod compare;
pub mod debug;
pub mod figures;
pub mod lines;
pub mod pace;
pub mod percentiles;
pub mod platform;
pub mod prepare;
pub mod programs;
pub mod schedule;
pub mod session;
pub mod snapshots;
pub mod table;
pub mod warm;
