//! The benchmark of replay and debugging: how long it takes to go to any moment of a long run, and back from there.
//!
//! The run is of `guests/worker.c`, recorded by the `orrery` command with its own defaults. `replay` is the command
//! too; the other lines are sessions in this process, as gdb's stub has them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use orrery_cpu::engine::EngineConfig;
use orrery_vmm::debug::session::Position;
use orrery_vmm::debug::{Direction, Session, StopReason, Subject, Wanted, WatchKind, Watched, place};
use orrery_vmm::moment::{MomentOptions, RunReference};
use orrery_vmm::translation_cache::TranslationCache;

use super::percentiles::{Line, micros_since};
use crate::workshop;

/// Fewest instructions of the run.
const RUN_INSTRUCTIONS: u64 = 10_000_000_000;
/// How far a reverse-continue goes back, at least.
const BACK_INSTRUCTIONS: u64 = 1_000_000_000;
/// Steps back from each moment.
const STEPS: usize = 20;
/// Moments of the sessions.
const SESSIONS: u64 = 12;

/// What can be measured.
pub const NAMES: [(&str, &str); 4] = [
    ("replay", "`orrery replay RUN --to ICOUNT`, random moments"),
    ("reverse-step", "one instruction back, 20 times from each of some random moments"),
    ("reverse-continue", "back over 1e9 instructions to the last write of a variable"),
    ("reverse-continue-again", "and on to the write before that, 1e9 instructions more"),
];

/// A recorded run.
pub struct Recorded {
    orrery: PathBuf,
    runs: PathBuf,
    run: RunReference,
    options: MomentOptions,
    instructions: u64,
}

impl Recorded {
    /// Records a run of the image below `directory`, where earlier ones are removed.
    pub fn record(orrery: &Path, image: &Path, directory: &Path) -> Result<Recorded> {
        let runs = directory.join("runs-debug");
        workshop::empty_directory(&runs)?;
        let before = Instant::now();
        let mut command = Command::new(orrery);
        command.arg("run").arg(image).args(["--seed", "1", "--quiet", "--no-input", "--runs"]).arg(&runs);
        workshop::tool(&mut command, "orrery")?;
        let seconds = before.elapsed().as_secs_f64();
        let run = RunReference::find(&runs, "worker")?;
        let outcome = run.manifest.outcome.as_ref().context("the run has no end")?;
        let instructions = outcome.icount;
        ensure!(instructions >= RUN_INSTRUCTIONS, "the run has {instructions} instructions only: {}", outcome.ended);
        let archive = TranslationCache::open(&run.manifest.image.hash.0).archive();
        let engine = EngineConfig { archive: Some(archive), ..EngineConfig::default() };
        let options = MomentOptions { engine, ..MomentOptions::default() };
        eprintln!("{instructions} instructions recorded in {seconds:.1} s");
        Ok(Recorded { orrery: orrery.to_owned(), runs, run, options, instructions })
    }

    /// Measures the lines that `wanted` names.
    pub fn measure(&self, wanted: &dyn Fn(&str) -> bool, rounds: u64) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        if wanted("replay") {
            lines.push(self.replay(rounds)?);
        }
        if wanted("reverse-step") {
            lines.push(self.reverse_step()?);
        }
        if wanted("reverse-continue") || wanted("reverse-continue-again") {
            lines.extend(self.reverse_continue()?);
        }
        Ok(lines)
    }

    /// A moment of the run that is as good as random: multiples of the golden ratio.
    fn moment(&self, round: u64) -> u64 {
        let share = (round + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((u128::from(share) * u128::from(self.instructions)) >> 64) as u64
    }

    fn replay(&self, rounds: u64) -> Result<Line> {
        let mut micros = Vec::new();
        for round in 0..rounds {
            let target = self.moment(round).to_string();
            let mut command = Command::new(&self.orrery);
            command.args(["replay", self.run.id(), "--to", &target, "--json", "--runs"]).arg(&self.runs);
            let before = Instant::now();
            let said = workshop::tool(&mut command, "orrery")?;
            micros.push(micros_since(before));
            ensure!(said.contains(&format!("\"icount\":{target},")), "replay stands elsewhere: {said}");
        }
        Ok(Line::of("replay", micros).with("instructions", self.instructions as f64))
    }

    fn session(&self, icount: u64) -> Result<Session> {
        let subject = Subject::open(self.run.clone(), self.options.clone())?;
        Ok(Session::open(subject, icount, &mut |_| false)?)
    }

    fn reverse_step(&self) -> Result<Line> {
        let (mut micros, mut opened, mut first) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..SESSIONS {
            let target = self.moment(round);
            let before = Instant::now();
            let mut session = self.session(target)?;
            opened.push(micros_since(before));
            for step in 1..=STEPS {
                let before = Instant::now();
                session.step_back(&mut |_| false)?;
                let took = micros_since(before);
                micros.push(took);
                if step == 1 {
                    first.push(took);
                }
            }
            ensure!(session.position().icount <= target - STEPS as u64 / 2, "the steps lead nowhere");
        }
        let line = Line::of("reverse-step", micros);
        Ok(line.with("session_p50_us", Line::of("", opened).p50_us).with("first_p50_us", Line::of("", first).p50_us))
    }

    fn reverse_continue(&self) -> Result<[Line; 2]> {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let (mut instructions, mut forward) = (0, 0.0);
        // The variable is written about every 1.2 billion instructions.
        for round in [2, 5] {
            let mut session = self.session(self.instructions / 12 * (round + 2))?;
            let address = *place::addresses(&session, "worker:stage")?.first().context("no symbol stage")?;
            let watched = Watched::linear(session.machine(), address, 8, WatchKind::Write);
            let wanted = Wanted { watched: vec![watched], ..Wanted::default() };
            let back = |session: &mut Session| -> Result<(u64, f64)> {
                let before = Instant::now();
                let found = session.resume(Direction::Backward, &wanted, &mut |_| false)?;
                let took = micros_since(before);
                match found {
                    StopReason::Event(event) => Ok((event.icount, took)),
                    other => bail!("no write was found: {other:?}"),
                }
            };
            let (write, _) = back(&mut session)?;
            let (before_that, _) = back(&mut session)?;
            let stretch = write - before_that;
            ensure!(stretch >= BACK_INSTRUCTIONS, "the writes are {stretch} instructions apart");
            // The stretch forward once, by a machine that is there already.
            let mut session = self.session(before_that + 1)?;
            let before = Instant::now();
            session.go_to(write, &mut |_| false)?;
            forward += micros_since(before);
            instructions += stretch;
            // A fresh session, whose past is on disk alone.
            let mut session = self.session(write)?;
            let (found, took) = back(&mut session)?;
            ensure!(found == before_that, "another write");
            first.push(took);
            let Position { icount, .. } = session.position();
            ensure!(icount == before_that, "the session stands elsewhere");
            second.push(back(&mut session)?.1);
        }
        let count = first.len() as f64;
        let (each, forward) = (instructions as f64 / count, forward / count);
        let line = |name, micros: Vec<f64>| {
            let line = Line::of(name, micros).with("instructions", each).with("forward_us", forward);
            let times = line.p50_us / forward;
            line.with("times_forward", times)
        };
        Ok([line("reverse-continue", first), line("reverse-continue-again", second)])
    }
}
