//! Draws the figures of the benchmark, and writes them as a table for a document.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use orrery_tests::bench::chart;
use orrery_tests::bench::figures::Figures;
use orrery_tests::bench::table::{self, Style};

/// Draws the figures of the benchmark as an SVG, and prints their table as Markdown.
#[derive(Parser, Debug)]
#[command(name = "bench-chart", max_term_width = 100)]
struct Arguments {
    /// The figures, such as target/bench.json
    figures: PathBuf,
    /// Where the drawing goes
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Title of the drawing: where and when it was measured
    #[arg(long, value_name = "TEXT", default_value = "Orrery and QEMU compared with a native run")]
    title: String,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let figures = Figures::read(&arguments.figures)?;
    let drawing = chart::chart(&figures, &arguments.title);
    fs::write(&arguments.output, drawing).with_context(|| format!("cannot write {}", arguments.output.display()))?;
    print!("{}", table::table(&figures, Style::Markdown));
    Ok(())
}
