//! The command line of the benchmark of branches and snapshots: see `docs/benchmarks.md`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use orrery_guest_image::Image;
use orrery_tests::bench::percentiles::Figures;
use orrery_tests::bench::snapshots::{self, Guest, NAMES};
use orrery_tests::bench::warm::{self, Course};
use orrery_tests::{guests, workshop};

/// Times branches, going back, and snapshots.
#[derive(Parser, Debug)]
#[command(
    name = "bench-snapshots",
    max_term_width = 100,
    after_help = "Examples:
  bench-snapshots                      everything
  bench-snapshots --only branch-512    one line
  bench-snapshots --list               what the lines measure"
)]
struct Arguments {
    /// Measure only this line (repeatable)
    #[arg(long, value_name = "LINE")]
    only: Vec<String>,
    /// How often each thing is done
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    rounds: u32,
    /// Where the figures go [default: target/bench-snapshots.json]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Measure this image, run to --at with 512 MiB, instead of the usual guests
    #[arg(long, value_name = "IMAGE", requires = "at")]
    image: Option<PathBuf>,
    /// Where to branch off, in instructions; with --image
    #[arg(long, value_name = "ICOUNT")]
    at: Option<u64>,
    /// Show the lines, and stop
    #[arg(long)]
    list: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.list {
        NAMES.iter().for_each(|(name, about)| println!("{name:<20} {about}"));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = arguments.only.iter().find(|name| !NAMES.iter().any(|(known, _)| known == *name)) {
        anyhow::bail!("there is no line {unknown}; --list shows them");
    }
    let wanted = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    let output = arguments.output.clone().unwrap_or_else(|| workshop::target().join("bench-snapshots.json"));
    let rounds = arguments.rounds as usize;
    let mut figures = Figures { lines: Vec::new() };
    if let (Some(image), Some(at)) = (&arguments.image, arguments.at) {
        let image = Image::open(image)?;
        let named = !arguments.only.is_empty() && arguments.only.iter().all(|name| !name.starts_with("warm-"));
        let mut guests = [("branch-512", Guest::at(&image, 512, at)?)];
        if wanted("branch-512") {
            figures.lines = snapshots::branches(&mut guests, rounds)?;
        }
        figures.lines.extend(guests[0].1.measure(&wanted, rounds)?);
        if !named {
            figures.lines.push(warm::measure("warm", &image, &Course::new(at, 10_000_000, rounds))?);
        }
        figures.lines.iter().for_each(|line| println!("{}", line.text()));
        return Ok(ExitCode::SUCCESS);
    }
    let image = Image::open(guests::image(&["filler"])?)?;
    let mut guests = Vec::new();
    for (name, mib) in [("branch-512", 512), ("branch-4096", 4096)].into_iter().filter(|(name, _)| wanted(name)) {
        guests.push((name, Guest::boot(&image, mib)?));
    }
    let mut lines = snapshots::branches(&mut guests, rounds)?;
    drop(guests);
    let others = |name: &str| {
        !["branch-512", "branch-4096"].contains(&name) && !name.ends_with("-disk") && !name.starts_with("warm-")
    };
    if NAMES.iter().any(|(name, _)| wanted(name) && others(name)) {
        lines.extend(Guest::boot(&image, 512)?.measure(&wanted, rounds)?);
    }
    lines.iter().for_each(|line| println!("{}", line.text()));
    figures.lines.extend(lines);
    let built = |name: &str| {
        let path = workshop::target().join("images").join(name);
        Image::open(&path).with_context(|| format!("`make images` builds {}", path.display()))
    };
    let courses = [
        ("warm-go", Some("go.img"), Course::new(200_000_000, 10_000_000, rounds)),
        ("warm-jvm", Some("jvm.img"), Course::new(600_000_000, 20_000_000, rounds)),
        ("warm-filler", None, Course::new(2_000_000_000, 5_000_000, rounds)),
    ];
    for (name, demo, course) in courses.iter().filter(|(name, ..)| wanted(name)) {
        let image = demo.map_or_else(|| Ok(image.clone()), built)?;
        let line = warm::measure(name, &image, course)?;
        println!("{}", line.text());
        figures.lines.push(line);
    }
    if NAMES.iter().any(|(name, _)| wanted(name) && name.ends_with("-disk")) {
        let image = built("go.img")?;
        let lines = snapshots::disk(&image, &workshop::target().join("bench"), &wanted, rounds)?;
        lines.iter().for_each(|line| println!("{}", line.text()));
        figures.lines.extend(lines);
    }
    figures.write(&output)?;
    println!("figures: {}", output.display());
    Ok(ExitCode::SUCCESS)
}
