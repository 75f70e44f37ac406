//! `orrery verify`.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_devices::VirtualNs;
use orrery_guest_image::Image;
use serde::Serialize;

use super::args::VerifyArgs;
use super::exit::{self, Failure};
use super::run::{build_machine, engine_config, open_image};
use super::say;
use crate::chain::Hash;
use crate::config::Seed;
use crate::inputs::{self, Input};
use crate::machine::{ForeignInputs, Machine, MachineError};
use crate::verify::{Divergence, Sample, Sampler, Until, VerifyError, locate, perturbed};

#[derive(Serialize)]
struct Report {
    equal: bool,
    image_hash: Hash,
    seed: u64,
    runs: u32,
    epochs: usize,
    last: Option<Sample>,
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
    let session = Session { arguments: &arguments, image: &image, replayed: &replayed };
    let mut report = Report {
        equal: true,
        image_hash: Hash(image.hash()),
        seed: arguments.seed,
        runs: arguments.times,
        epochs: 0,
        last: None,
        differing_run: None,
        divergence: None,
    };
    let reference = session.reference()?;
    report.epochs = reference.len();
    report.last = reference.last().cloned();
    for run in 1..arguments.times {
        if let Some(difference) = session.compare(run, &reference)? {
            report.equal = false;
            report.differing_run = Some(run);
            report.divergence = session.locate(run, &difference)?;
            break;
        }
    }
    print(&report, &arguments);
    Ok(if report.equal { 0 } else { exit::DIVERGED })
}

struct Session<'a> {
    arguments: &'a VerifyArgs,
    image: &'a Image,
    replayed: &'a [Input],
}

impl Session<'_> {
    fn engine(&self, run: u32) -> EngineConfig {
        let base = engine_config(&self.arguments.engine);
        match self.arguments.perturbation {
            Some(number) if run > 0 => perturbed(&base, number),
            _ if self.arguments.perturb => perturbed(&base, run),
            _ => base,
        }
    }

    fn sampler(&self, run: u32) -> Result<Sampler, Failure> {
        let mut machine =
            build_machine(self.image, &self.arguments.machine, Seed(self.arguments.seed), self.engine(run))?;
        machine.replay(self.replayed.to_vec());
        let until =
            Until { icount: self.arguments.until.map(Icount), time: self.arguments.until_virtual.map(VirtualNs) };
        Ok(Sampler::new(machine, self.arguments.epoch, until))
    }

    fn reference(&self) -> Result<Vec<Sample>, Failure> {
        let bar = self.bar(None);
        let mut sampler = self.sampler(0)?;
        let mut samples = Vec::new();
        while let Some(sample) = sampler.next_sample().map_err(inputs_failure)? {
            bar.set_message(format!("run 1 of {}, icount {}", self.arguments.times, sample.icount));
            bar.inc(1);
            samples.push(sample);
        }
        bar.finish_and_clear();
        Ok(samples)
    }

    fn compare(&self, run: u32, reference: &[Sample]) -> Result<Option<Difference>, Failure> {
        let bar = self.bar(Some(reference.len() as u64));
        let mut sampler = self.sampler(run)?;
        let mut equal_at = 0;
        for expected in reference {
            let sample = sampler.next_sample().map_err(inputs_failure)?;
            if sample.as_ref() != Some(expected) {
                bar.finish_and_clear();
                let differs_at = sample.map_or(expected.icount, |sample| sample.icount.max(expected.icount));
                return Ok(Some(Difference { equal_at, differs_at }));
            }
            equal_at = expected.icount;
            bar.set_message(format!("run {} of {}, icount {}", run + 1, self.arguments.times, expected.icount));
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(None)
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
        let mut build = |which: usize| -> Result<Machine, MachineError> {
            let engine = self.engine(if which == 0 { 0 } else { run });
            let config = self.arguments.machine.config();
            let mut machine = Machine::new(self.image, &config, Seed(self.arguments.seed), engine)?;
            machine.replay(self.replayed.to_vec());
            Ok(machine)
        };
        locate(&mut build, difference.equal_at, difference.differs_at).map_err(|error| match error {
            VerifyError::Machine(error) => Failure::new(exit::HOST, error),
            VerifyError::Inputs(error) => inputs_failure(error),
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
        }
        return;
    }
    say!("different: run 1 and run {}", report.differing_run.map_or(0, |run| run + 1));
    match &report.divergence {
        Some(found) => {
            say!("equal after {} instructions, different after {}", found.equal_at, found.differs_at);
            say!("instruction: {}", found.instructions[0]);
            if found.instructions[0] != found.instructions[1] {
                say!("        and: {}", found.instructions[1]);
            }
            found.differences.iter().for_each(|difference| say!("  {difference}"));
        }
        None => say!("the difference did not come again when the runs were repeated"),
    }
}
