//! Whole-system tests, the guests they boot, and the benchmark.
