//! Says which lines of the benchmark moved between two files of figures.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use orrery_tests::bench::compare::{self, Verdict};
use orrery_tests::bench::figures::Figures;
use orrery_tests::bench::platform::Platform;

/// Says which lines of the benchmark moved beyond noise between two files of figures.
///
/// A line has moved if all rounds of one file are on one side of all rounds of the other, and the medians differ by
/// more than the threshold. Exit code 1: a line became slower.
#[derive(Parser, Debug)]
#[command(name = "bench-compare", max_term_width = 100)]
struct Arguments {
    /// Figures before
    before: PathBuf,
    /// Figures after
    after: PathBuf,
    /// Columns to compare: native, qemu, soft, auto (repeatable); the native column shows how equal the hosts were
    #[arg(long, value_name = "PLATFORM", default_values = ["native", "soft", "auto"])]
    platform: Vec<Platform>,
    /// Smallest change that counts, in per cent
    #[arg(long, value_name = "PERCENT", default_value_t = 3.0)]
    threshold: f64,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let (before, after) = (Figures::read(&arguments.before)?, Figures::read(&arguments.after)?);
    if before.host != after.host {
        eprintln!("bench-compare: the hosts differ: {:?} and {:?}", before.host, after.host);
    }
    let changes = compare::compare(&before, &after, &arguments.platform, arguments.threshold / 100.0);
    println!("{:<18} {:<7} {:>9} {:>9} {:>10}", "line", "", "before s", "after s", "change");
    changes.iter().for_each(|change| println!("{change}"));
    let moved = |verdict| changes.iter().filter(|change| change.verdict == verdict).count();
    let (faster, slower) = (moved(Verdict::Faster), moved(Verdict::Slower));
    println!("{faster} faster, {slower} slower, {} unchanged", moved(Verdict::Same));
    Ok(if slower == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
