//! The command line of the benchmark of replay and debugging: see `docs/benchmarks.md`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use orrery_tests::bench::debug::{NAMES, Recorded};
use orrery_tests::bench::percentiles::Figures;
use orrery_tests::{guests, workshop};

/// Times going to the moments of a long run, and back from there.
#[derive(Parser, Debug)]
#[command(name = "bench-debug", max_term_width = 100)]
struct Arguments {
    /// Measure only this line (repeatable)
    #[arg(long, value_name = "LINE")]
    only: Vec<String>,
    /// How many moments are replayed to
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    rounds: u64,
    /// Where the figures go [default: target/bench-debug.json]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The orrery command [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    orrery: Option<PathBuf>,
    /// Show the lines, and stop
    #[arg(long)]
    list: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.list {
        NAMES.iter().for_each(|(name, about)| println!("{name:<24} {about}"));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = arguments.only.iter().find(|name| !NAMES.iter().any(|(known, _)| known == *name)) {
        anyhow::bail!("there is no line {unknown}; --list shows them");
    }
    let wanted = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    let beside = || Ok(std::env::current_exe()?.with_file_name("orrery"));
    let orrery: PathBuf = arguments.orrery.clone().map_or_else(beside, anyhow::Ok)?;
    let directory = workshop::target().join("bench");
    let recorded = Recorded::record(&orrery, &guests::image(&["worker"])?, &directory)
        .with_context(|| format!("cannot record a run with {}", orrery.display()))?;
    let mut figures = Figures { lines: Vec::new() };
    for line in recorded.measure(&wanted, arguments.rounds)? {
        println!("{}", line.text());
        figures.lines.push(line);
    }
    let output = arguments.output.unwrap_or_else(|| workshop::target().join("bench-debug.json"));
    figures.write(&output)?;
    println!("figures: {}", output.display());
    Ok(ExitCode::SUCCESS)
}
