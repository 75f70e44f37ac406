//! The benchmark's command line: see `docs/benchmarks.md`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use orrery_tests::bench::platform::{Hypervisors, Platform};
use orrery_tests::bench::schedule::{self, Schedule};
use orrery_tests::bench::table::{self, Style};
use orrery_tests::bench::{lines, prepare};
use orrery_tests::workshop;

/// Times the same programs natively, in QEMU and in Orrery.
///
/// Exit code 0: every session came to its end and all results are equal. 1: some did not.
#[derive(Parser, Debug)]
#[command(
    name = "bench",
    max_term_width = 100,
    after_help = "Examples:
  bench                              everything, three rounds
  bench --only go-fib --rounds 1     one line, once
  bench --only jvm- --skip qemu      all lines of the JVM, natively and in Orrery
  bench --list                       what the lines measure"
)]
struct Arguments {
    /// Run only this line, or the lines that start so (repeatable)
    #[arg(long, value_name = "LINE")]
    only: Vec<String>,
    /// How often everything runs; the table shows medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Leave out a platform: native, qemu, soft or auto (repeatable)
    #[arg(long, value_name = "PLATFORM")]
    skip: Vec<Platform>,
    /// Longest time of one program on one platform, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// The orrery command [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    orrery: Option<PathBuf>,
    /// The QEMU command
    #[arg(long, value_name = "FILE", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Where programs, images and transcripts are kept [default: target/bench]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Where the figures go [default: target/bench.json]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Build programs and images, and stop
    #[arg(long)]
    prepare: bool,
    /// Show the lines, and stop
    #[arg(long)]
    list: bool,
}

/// Cargo puts both commands into the same directory, wherever that is.
fn orrery_beside_this() -> Result<PathBuf> {
    Ok(std::env::current_exe().context("this program's place is unknown; give --orrery")?.with_file_name("orrery"))
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let lines = lines::select(&arguments.only)?;
    if arguments.list {
        lines.iter().for_each(|line| println!("{:<18} {}", line.name, line.about));
        return Ok(ExitCode::SUCCESS);
    }
    let directory = arguments.directory.unwrap_or_else(|| workshop::target().join("bench"));
    let output = arguments.output.unwrap_or_else(|| workshop::target().join("bench.json"));
    let prepared = prepare::prepare(&lines, &directory)?;
    if arguments.prepare {
        return Ok(ExitCode::SUCCESS);
    }
    let orrery = arguments.orrery.map_or_else(orrery_beside_this, Ok)?;
    let hypervisors = Hypervisors::new(arguments.qemu, orrery, &directory);
    let mut skip = arguments.skip;
    if !hypervisors.has_engines && !skip.contains(&Platform::Auto) {
        eprintln!("bench: no column auto: this orrery has one engine alone (run has no --engine)");
        skip.push(Platform::Auto);
    }
    let skipped = |platform: &Platform| skip.contains(platform);
    let schedule = Schedule {
        lines,
        platforms: Platform::ALL.into_iter().filter(|platform| !skipped(platform)).collect(),
        rounds: arguments.rounds,
        limit: Duration::from_secs(arguments.timeout),
    };
    hypervisors.check(&schedule.platforms)?;
    let figures = schedule::run(&schedule, &prepared, &hypervisors, &directory, &|figures| figures.write(&output))?;
    print!("{}", table::table(&figures, Style::Plain));
    if let Some(pace) = figures.host.pace {
        println!(
            "pace of the host: {:.0} % of its best; below 90 % others were at work on the same cores",
            100.0 * pace
        );
    }
    println!("raw figures: {}", output.display());
    for failure in &figures.failures {
        eprintln!("bench: {failure}");
    }
    Ok(if figures.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
