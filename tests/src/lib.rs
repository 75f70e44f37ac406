//! Whole-system tests, the guests they boot, and the benchmark.
//!
//! `bench/` holds the programs that the benchmark runs, `guests/` one small program per behaviour for the tests in
//! `tests/`. [`bench`] is the benchmark's harness, [`guests`] builds the small programs into images,
//! [`svm`] runs programs on a second flavour of KVM.
//!
//! This room may use every other one, and none uses it. The host's clock is read here: measuring is its purpose.

pub mod bench;
pub mod guests;
pub mod svm;
pub mod workshop;
