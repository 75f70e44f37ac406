//! The rounds: every program on every platform in turn, so that a change of the host's mood falls on all columns.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::figures::{Figures, Host};
use super::lines::{Line, Span};
use super::pace::Pace;
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

/// Runs all rounds; `keep` is given the figures after each. Sessions that fail are in [`Figures::failures`]; what they
/// finished before counts.
pub fn run(
    schedule: &Schedule,
    prepared: &[Prepared],
    hypervisors: &Hypervisors,
    directory: &Path,
    keep: &dyn Fn(&Figures) -> Result<()>,
) -> Result<Figures> {
    let bench = Bench { schedule, hypervisors, directory, cpu: session::first_cpu()? };
    // The runs of the benchmark before this one are of no use to anyone.
    workshop::empty_directory(&hypervisors.runs)?;
    bench.warm(prepared)?;
    let mut figures = Figures::new(&schedule.lines, Host::look(hypervisors));
    let (mut broken, mut pace) = (Vec::new(), Pace::default());
    for round in 1..=schedule.rounds {
        for prepared in prepared {
            for &platform in &schedule.platforms {
                // What failed once will fail again, and takes long to do so.
                if broken.contains(&(prepared.program, platform)) || !prepared.program.runs_on(platform) {
                    continue;
                }
                pace.look();
                let session = bench.session(&format!("round {round} of {}", schedule.rounds), prepared, platform)?;
                if let Some(failure) = &session.failure {
                    let place = format!("{} {}", platform.name(), prepared.program.name());
                    figures.failures.push(format!("{place}, round {round}: {failure}"));
                    broken.push((prepared.program, platform));
                }
                record(&mut figures, schedule, prepared, platform, &session);
            }
        }
        figures.host.pace = pace.median();
        keep(&figures)?;
    }
    Ok(figures)
}

struct Bench<'a> {
    schedule: &'a Schedule,
    hypervisors: &'a Hypervisors,
    directory: &'a Path,
    cpu: usize,
}

impl Bench<'_> {
    /// Runs each program once that this build of Orrery has not run yet, so that every round finds its translations.
    fn warm(&self, prepared: &[Prepared]) -> Result<()> {
        let Some(&platform) = self.schedule.platforms.iter().find(|platform| platform.is_orrery()) else {
            return Ok(());
        };
        fs::create_dir_all(&self.hypervisors.cache)?;
        for prepared in prepared.iter().filter(|prepared| !prepared.program.is_cold()) {
            let name = prepared.image.file_name().context("an image has a name")?;
            let stamp = self.hypervisors.cache.join(name).with_extension("warm");
            if !workshop::is_fresh(&stamp, &[&prepared.image, &self.hypervisors.orrery])
                && self.session("for its translations", prepared, platform)?.failure.is_none()
            {
                fs::write(&stamp, b"")?;
            }
        }
        Ok(())
    }

    /// One program on one platform, with words for whoever waits.
    fn session(&self, occasion: &str, prepared: &Prepared, platform: Platform) -> Result<Session> {
        let (program, place) = (prepared.program, format!("{} {}", platform.name(), prepared.program.name()));
        eprint!("bench: {occasion}, {place}: ");
        let transcript = self.directory.join(format!("{}-{}.log", platform.name(), program.name()));
        let command = self.hypervisors.command(platform, prepared).with_context(|| place.clone())?;
        let cpu = platform.is_pinned().then_some(self.cpu);
        let session = session::run(command, program.first_words(), cpu, self.schedule.limit, &transcript)?;
        let start = session.start_seconds.unwrap_or_default();
        eprintln!("{start:.1} s to the start, {:.1} s in {} lines", total_seconds(&session), session.lines.len());
        if let Some(failure) = &session.failure {
            eprintln!("bench: {place} failed: {failure}");
        }
        Ok(session)
    }
}

fn record(figures: &mut Figures, schedule: &Schedule, prepared: &Prepared, platform: Platform, session: &Session) {
    for line in schedule.lines.iter().filter(|line| line.program == prepared.program) {
        match (line.span, session.start_seconds, session.lines.get(line.marker())) {
            // A native program has nothing to boot.
            (Span::Boot, Some(seconds), _) if platform != Platform::Native => {
                figures.add(line.name, platform, seconds, None);
            }
            (Span::Work, _, Some(measured)) => {
                figures.add(line.name, platform, measured.seconds, Some(&measured.result));
            }
            _ => {}
        }
    }
}

fn total_seconds(session: &Session) -> f64 {
    session.lines.values().fold(0.0, |sum, measured| sum + measured.seconds)
}
