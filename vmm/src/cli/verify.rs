//! `orrery verify`.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_devices::VirtualNs;
use orrery_guest_image::Image;
use serde::Serialize;

use super::args::VerifyArgs;
use super::engine::WarmEngine;
use super::exit::{self, Failure};
use super::run::{build_machine, open_image};
use super::say;
use crate::chain::Hash;
use crate::config::Seed;
use crate::inputs::{self, Input};
use crate::machine::{ForeignInputs, Machine, MachineError};
use crate::perturb::{Course, CourseError, Plan};
use crate::verify::{Divergence, Sample, Sampler, Until, VerifyError, locate, perturbed};

/// Perturbations shown before a difference, the last ones.
const STAGES_SHOWN: usize = 12;

#[derive(Serialize)]
struct Report {
    equal: bool,
    image_hash: Hash,
    seed: u64,
    runs: u32,
    epochs: usize,
    last: Option<Sample>,
    /// Instructions of all runs that were compared.
    instructions: u64,
    /// What the second run's perturbations derive from; each later run's from one more.
    #[serde(skip_serializing_if = "Option::is_none")]
    perturb_seed: Option<u64>,
    /// Stages of perturbation that the runs have gone through.
    stages: usize,
    /// The first run that differs from run 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    differing_run: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    divergence: Option<Divergence>,
}

/// The first samples that differ: (equal at, differs at).
struct Difference {
    equal_at: u64,
    differs_at: u64,
}

pub(super) fn verify(arguments: VerifyArgs) -> Result<u8, Failure> {
    let image = open_image(&arguments.image)?;
    let replayed = match &arguments.inputs {
        Some(path) => inputs::read(path).map_err(|e| Failure::new(exit::INPUTS, e))?,
        None => Vec::new(),
    };
    let perturb_seed = arguments.perturb_seed.or_else(|| arguments.perturb.then(any_seed));
    let warm = WarmEngine::new(&arguments.engine, &image.hash())?;
    let session =
        Session { arguments: &arguments, image: &image, replayed: &replayed, perturb_seed, warm: &warm.config };
    let mut report = Report {
        equal: true,
        image_hash: Hash(image.hash()),
        seed: arguments.seed,
        runs: arguments.times,
        epochs: 0,
        last: None,
        instructions: 0,
        perturb_seed,
        stages: 0,
        differing_run: None,
        divergence: None,
    };
    let reference = session.reference()?;
    report.epochs = reference.len();
    report.last = reference.last().cloned();
    let icount = report.last.as_ref().map_or(0, |sample| sample.icount);
    report.instructions = icount;
    for run in 1..arguments.times {
        let compared = session.compare(run, &reference)?;
        report.stages += compared.stages;
        report.instructions += compared.difference.as_ref().map_or(icount, |difference| difference.equal_at);
        if let Some(difference) = compared.difference {
            report.equal = false;
            report.differing_run = Some(run);
            report.divergence = session.locate(run, &difference)?;
            break;
        }
    }
    print(&report, &arguments);
    Ok(if report.equal { 0 } else { exit::DIVERGED })
}

/// A number that nobody has chosen. It decides what must not matter, and nothing else.
fn any_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |time| u64::from(time.subsec_nanos()) << 20 ^ time.as_secs()) & 0xFFFF_FFFF
}

/// What came of comparing a run.
struct Compared {
    difference: Option<Difference>,
    stages: usize,
}

struct Session<'a> {
    arguments: &'a VerifyArgs,
    image: &'a Image,
    replayed: &'a [Input],
    perturb_seed: Option<u64>,
    /// The engine of the first run.
    warm: &'a EngineConfig,
}

impl Session<'_> {
    fn engine(&self, run: u32) -> EngineConfig {
        // Later runs make their translations themselves: kept ones must not matter either.
        let cold = || EngineConfig { archive: None, ..self.warm.clone() };
        match self.arguments.perturbation {
            _ if run == 0 => self.warm.clone(),
            Some(number) => perturbed(&cold(), number),
            None => cold(),
        }
    }

    /// What a run's perturbations derive from.
    fn plan_seed(&self, run: u32) -> Option<u64> {
        self.perturb_seed.filter(|_| run > 0).map(|seed| seed.wrapping_add(u64::from(run - 1)))
    }

    /// The way that a machine at power-on takes through a run.
    fn course(&self, run: u32, mut machine: Machine) -> Course {
        let inputs = self.replayed.to_vec();
        match self.plan_seed(run) {
            Some(seed) => Course::perturbed(self.image, machine, inputs, Plan::new(seed, &self.engine(run))),
            None => {
                machine.replay(inputs);
                machine.into()
            }
        }
    }

    fn sampler(&self, run: u32) -> Result<Sampler, Failure> {
        let machine = build_machine(self.image, &self.arguments.machine, Seed(self.arguments.seed), self.engine(run))?;
        let until = Until {
            icount: self.arguments.limit.until.map(Icount),
            time: self.arguments.limit.until_virtual.map(VirtualNs),
        };
        Ok(Sampler::new(self.course(run, machine), self.arguments.epoch, until))
    }

    fn reference(&self) -> Result<Vec<Sample>, Failure> {
        let bar = self.bar(None);
        let mut sampler = self.sampler(0)?;
        let mut samples = Vec::new();
        while let Some(sample) = sampler.next_sample().map_err(course_failure)? {
            bar.set_message(format!("run 1 of {}, icount {}", self.arguments.times, sample.icount));
            bar.inc(1);
            samples.push(sample);
        }
        bar.finish_and_clear();
        Ok(samples)
    }

    fn compare(&self, run: u32, reference: &[Sample]) -> Result<Compared, Failure> {
        let bar = self.bar(Some(reference.len() as u64));
        let mut sampler = self.sampler(run)?;
        let mut equal_at = 0;
        for expected in reference {
            let sample = sampler.next_sample().map_err(course_failure)?;
            if sample.as_ref() != Some(expected) {
                bar.finish_and_clear();
                let differs_at = sample.map_or(expected.icount, |sample| sample.icount.max(expected.icount));
                let stages = sampler.course().stages().len();
                return Ok(Compared { difference: Some(Difference { equal_at, differs_at }), stages });
            }
            equal_at = expected.icount;
            bar.set_message(format!("run {} of {}, icount {}", run + 1, self.arguments.times, expected.icount));
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(Compared { difference: None, stages: sampler.course().stages().len() })
    }

    fn locate(&self, run: u32, difference: &Difference) -> Result<Option<Divergence>, Failure> {
        if !self.arguments.quiet {
            eprintln!(
                "orrery: run {} differs between icount {} and {}; looking for the first differing instruction",
                run + 1,
                difference.equal_at,
                difference.differs_at
            );
        }
        let mut build = |which: usize| -> Result<Course, MachineError> {
            let run = if which == 0 { 0 } else { run };
            let config = self.arguments.machine.config();
            let machine = Machine::new(self.image, &config, Seed(self.arguments.seed), self.engine(run))?;
            Ok(self.course(run, machine))
        };
        locate(&mut build, difference.equal_at, difference.differs_at).map_err(|error| match error {
            VerifyError::Machine(error) => Failure::new(exit::HOST, error),
            VerifyError::Inputs(error) => inputs_failure(error),
            VerifyError::Course(error) => course_failure(error),
        })
    }

    fn bar(&self, length: Option<u64>) -> ProgressBar {
        if self.arguments.quiet || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        match length {
            Some(length) => {
                let style = ProgressStyle::with_template("{bar:40} {pos}/{len} epochs {msg}");
                ProgressBar::new(length).with_style(style.expect("the template is constant"))
            }
            None => {
                let style = ProgressStyle::with_template("{spinner} {pos} epochs {msg}");
                ProgressBar::new_spinner().with_style(style.expect("the template is constant"))
            }
        }
    }
}

fn course_failure(error: CourseError) -> Failure {
    match error {
        CourseError::Inputs(error) => inputs_failure(error),
        other => Failure::new(exit::HOST, other),
    }
}

fn inputs_failure(error: ForeignInputs) -> Failure {
    Failure::new(exit::INPUTS, error)
}

fn print(report: &Report, arguments: &VerifyArgs) {
    if arguments.json {
        say(serde_json::to_string(report).expect("a report is plain data"));
        return;
    }
    if report.equal {
        if let (false, Some(last)) = (arguments.quiet, &report.last) {
            let end = last.ended.as_ref().map(ToString::to_string).unwrap_or_default();
            say!(
                "equal: {} runs, {} epochs, icount {}, state {} ({end})",
                report.runs,
                report.epochs,
                last.icount,
                last.state
            );
            if let Some(seed) = report.perturb_seed {
                say!(
                    "perturbed from seed {seed} on: {} stages, {} instructions compared in all runs",
                    report.stages,
                    report.instructions
                );
            }
        }
        return;
    }
    let run = report.differing_run.unwrap_or(0);
    say!("different: run 1 and run {}", run + 1);
    if let Some(seed) = report.perturb_seed {
        let again = seed.wrapping_add(u64::from(run).saturating_sub(1));
        say!("the same two runs again: --perturb-seed {again} --times 2");
    }
    match &report.divergence {
        Some(found) => {
            say!("equal after {} instructions, different after {}", found.equal_at, found.differs_at);
            say!("instruction: {}", found.instructions[0]);
            if found.instructions[0] != found.instructions[1] {
                say!("        and: {}", found.instructions[1]);
            }
            found.differences.iter().for_each(|difference| say!("  {difference}"));
            if !found.stages.is_empty() {
                say!("how run {} had been perturbed until then:", run + 1);
            }
            let hidden = found.stages.len().saturating_sub(STAGES_SHOWN);
            if hidden > 0 {
                say!("  ({hidden} earlier stages)");
            }
            found.stages[hidden..].iter().for_each(|stage| say!("  {stage}"));
        }
        None => say!("the difference did not come again when the runs were repeated"),
    }
}
