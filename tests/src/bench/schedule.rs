//! The rounds: every program on every platform in turn, so that a change of the host's mood falls on all columns.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::figures::{Figures, Host};
use super::lines::{BOOT, Line};
use super::platform::{Hypervisors, Platform};
use super::prepare::Prepared;
use super::session::{self, Session};
use crate::workshop;

/// How to measure.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// The lines wanted.
    pub lines: Vec<Line>,
    /// The columns wanted.
    pub platforms: Vec<Platform>,
    /// How often.
    pub rounds: u32,
    /// Longest time of one session.
    pub limit: Duration,
}

/// Runs all rounds. Sessions that fail are in [`Figures::failures`]; what they finished before counts.
pub fn run(schedule: &Schedule, prepared: &[Prepared], hypervisors: &Hypervisors, directory: &Path) -> Result<Figures> {
    let cpu = session::first_cpu()?;
    // The runs of the benchmark before this one are of no use to anyone.
    workshop::empty_directory(&hypervisors.runs)?;
    let mut figures = Figures::new(&schedule.lines, Host::look(hypervisors));
    let mut broken = Vec::new();
    for round in 1..=schedule.rounds {
        for prepared in prepared {
            for &platform in &schedule.platforms {
                // What failed once will fail again, and takes long to do so.
                if broken.contains(&(prepared.program, platform)) {
                    continue;
                }
                let place = format!("{} {}", platform.name(), prepared.program.name());
                eprint!("bench: round {round} of {}, {place}: ", schedule.rounds);
                let transcript = directory.join(format!("{}-{}.log", platform.name(), prepared.program.name()));
                let command = hypervisors.command(platform, prepared).with_context(|| place.clone())?;
                let pinned = platform.is_pinned().then_some(cpu);
                let session = session::run(command, pinned, schedule.limit, &transcript)?;
                eprintln!("{:.1} s in {} lines", total_seconds(&session), session.lines.len());
                if let Some(failure) = &session.failure {
                    eprintln!("bench: {place} failed: {failure}");
                    figures.failures.push(format!("{place}, round {round}: {failure}"));
                    broken.push((prepared.program, platform));
                }
                record(&mut figures, schedule, prepared, platform, &session);
            }
        }
    }
    Ok(figures)
}

fn record(figures: &mut Figures, schedule: &Schedule, prepared: &Prepared, platform: Platform, session: &Session) {
    for line in schedule.lines.iter().filter(|line| line.program == prepared.program) {
        if line.name == BOOT {
            if platform != Platform::Native
                && let Some(seconds) = session.start_seconds
            {
                figures.add(BOOT, platform, seconds, None);
            }
        } else if let Some(measured) = session.lines.get(line.name) {
            figures.add(line.name, platform, measured.seconds, Some(&measured.result));
        }
    }
}

fn total_seconds(session: &Session) -> f64 {
    session.lines.values().map(|measured| measured.seconds).sum()
}
