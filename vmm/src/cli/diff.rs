//! `orrery diff`: where two runs part.

use orrery_cpu::Icount;
use serde::Serialize;

use super::args::DiffArgs;
use super::exit::{self, Failure};
use super::place::{Place, find_run, moment_failure, spinner};
use super::runs::readable;
use crate::chain::{Hash, hash_cpu};
use crate::machine::{ForeignInputs, Machine, MachineError, SavedMachine};
use crate::moment::{Moment, RunReference, advance};
use crate::run::directory::{read_console, read_links};
use crate::verify::{differences, disassemble};

/// Instructions between two comparisons, before the difference is narrowed down.
const STEP_INSTRUCTIONS: u64 = 1 << 26;
/// Parts that an interval is divided into at each pass.
const PARTS: u64 = 64;

#[derive(Serialize)]
struct Report {
    differ: bool,
    /// The last icount up to which nothing differs.
    equal_at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    differs_at: Option<u64>,
    /// End of the epoch in which the hash chains differ first.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_epoch: Option<u64>,
    instructions: Vec<String>,
    differences: Vec<String>,
    console: [Vec<String>; 2],
}

pub(super) fn diff(arguments: &DiffArgs) -> Result<u8, Failure> {
    let find = |name: &str| find_run(&arguments.reach.place.kept, name);
    let runs = [find(&arguments.first)?, find(&arguments.second)?];
    let [first, second] = [&runs[0].manifest, &runs[1].manifest];
    if first.image.hash != second.image.hash || first.machine != second.machine {
        let message = format!("{} and {} are runs of different images or machines from power-on", first.id, second.id);
        return Err(Failure::new(exit::MOMENT, message));
    }
    // One image, so one place will do for both.
    let pair = Pair { place: Place::of(runs[0].clone(), &arguments.reach)?, runs, arguments };
    let report = pair.compare()?;
    if arguments.json {
        say!("{}", serde_json::to_string(&report).expect("a report is plain data"));
    } else {
        print(&report, &pair.runs);
    }
    Ok(if report.differ { exit::DIVERGED } else { 0 })
}

struct Pair<'a> {
    place: Place,
    runs: [RunReference; 2],
    arguments: &'a DiffArgs,
}

/// What is compared: everything that the guest can see at once. Random streams show when they are used.
fn visible(machine: &mut Machine) -> Hash {
    machine.update_digest();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&machine.icount().0.to_le_bytes());
    hasher.update(&machine.time().0.to_le_bytes());
    hash_cpu(&mut hasher, machine.cpu());
    machine.memory_digest().value().iter().for_each(|lane| {
        hasher.update(&lane.to_le_bytes());
    });
    Hash(*hasher.finalize().as_bytes())
}

impl Pair<'_> {
    /// The last moment up to which the two have the same past by their manifests and hash chains, and the first epoch
    /// at which their chains differ.
    fn common(&self) -> Result<(u64, Option<u64>), Failure> {
        let damaged = |error| Failure::new(exit::DAMAGED, error);
        let [a, b] = [&self.runs[0], &self.runs[1]];
        let (first, second) = (read_links(&a.path).map_err(damaged)?, read_links(&b.path).map_err(damaged)?);
        let (mut equal, mut differs) = (0, None);
        for (mine, theirs) in first.iter().zip(&second) {
            if mine != theirs {
                differs = Some(mine.icount.min(theirs.icount));
                break;
            }
            equal = mine.icount;
        }
        // A branch shares its parent's past up to where it left.
        for (run, other) in [(a, b), (b, a)] {
            let point = run.manifest.branches.iter().find(|point| point.run == other.manifest.id);
            equal = equal.max(point.map_or(0, |point| point.icount));
        }
        Ok((equal, differs))
    }

    fn open(&self, which: usize, icount: u64) -> Result<Moment, Failure> {
        let run = self.runs[which].clone();
        let bar = spinner();
        let moment = Moment::of(run, Some(Icount(icount)), &self.place.options, &mut |icount| {
            bar.set_message(format!("going to icount {}", icount.0));
            bar.tick();
        });
        bar.finish_and_clear();
        moment.map_err(moment_failure)
    }

    fn compare(&self) -> Result<Report, Failure> {
        let (mut equal_at, first_epoch) = self.common()?;
        let ends = [0, 1].map(|which| self.runs[which].manifest.outcome.as_ref().map(|outcome| outcome.icount));
        // Where both are known to have been.
        let end = ends.into_iter().flatten().min();
        if let Some(end) = end {
            equal_at = equal_at.min(end);
        }
        let mut moments = [self.open(0, equal_at)?, self.open(1, equal_at)?];
        let mut report = Report {
            differ: false,
            equal_at,
            differs_at: None,
            first_epoch,
            instructions: Vec::new(),
            differences: Vec::new(),
            console: Default::default(),
        };
        if visible(&mut moments[0].machine) != visible(&mut moments[1].machine) {
            // The chains agree there, or the branch begins there: only damage makes this so.
            report.differ = true;
            report.differs_at = Some(equal_at);
            report.differences = differences(&moments[0].machine, &moments[1].machine);
            return Ok(report);
        }
        let bar = spinner();
        loop {
            let at = moments[0].icount().0;
            if moments.iter().any(|moment| moment.machine.ended().is_some()) || end.is_some_and(|end| at >= end) {
                report.equal_at = at;
                report.differ = ends[0] != ends[1];
                if report.differ {
                    report.differences.push("one of the runs ends here".into());
                    report.differs_at = Some(at);
                }
                break;
            }
            bar.set_message(format!("equal up to icount {at}"));
            bar.tick();
            let next = at.saturating_add(STEP_INSTRUCTIONS).min(end.unwrap_or(u64::MAX));
            let saved = moments.each_mut().map(|moment| moment.machine.save());
            for (moment, run) in moments.iter_mut().zip(&self.runs) {
                go(&mut moment.machine, run, next)?;
            }
            if visible(&mut moments[0].machine) != visible(&mut moments[1].machine) {
                let (low, high) = self.narrow(&moments, saved, at, next)?;
                self.describe(&mut report, low, high)?;
                break;
            }
        }
        bar.finish_and_clear();
        Ok(report)
    }

    /// Narrows down to one instruction: equal at the first number, different at the second.
    fn narrow(
        &self,
        moments: &[Moment; 2],
        mut saved: [SavedMachine; 2],
        mut low: u64,
        mut high: u64,
    ) -> Result<(u64, u64), Failure> {
        while high - low > 1 {
            let step = (high - low).div_ceil(PARTS).max(1);
            let mut machines = self.restore(moments, &saved)?;
            let mut at = low;
            while at < high {
                let next = at.saturating_add(step).min(high);
                let before = machines.each_mut().map(Machine::save);
                for (machine, run) in machines.iter_mut().zip(&self.runs) {
                    go(machine, run, next)?;
                }
                if visible(&mut machines[0]) != visible(&mut machines[1]) {
                    saved = before;
                    break;
                }
                at = next;
            }
            if at >= high {
                let message = "the difference did not come again when the runs were repeated: please report this";
                return Err(Failure::new(exit::INTERNAL, message));
            }
            (low, high) = (at, at.saturating_add(step).min(high));
        }
        Ok((low, high))
    }

    fn restore(&self, moments: &[Moment; 2], saved: &[SavedMachine; 2]) -> Result<[Machine; 2], Failure> {
        let restore = |which: usize| {
            Machine::restore(&moments[which].image, &saved[which], self.place.options.engine.clone())
                .map_err(|error: MachineError| Failure::new(exit::HOST, error))
        };
        Ok([restore(0)?, restore(1)?])
    }

    fn describe(&self, report: &mut Report, low: u64, high: u64) -> Result<(), Failure> {
        let mut moments = [self.open(0, low)?, self.open(1, low)?];
        report.instructions = moments.iter().map(|moment| disassemble(&moment.machine)).collect();
        for (moment, run) in moments.iter_mut().zip(&self.runs) {
            go(&mut moment.machine, run, high)?;
            moment.machine.state_hash();
        }
        report.differ = true;
        report.equal_at = low;
        report.differs_at = Some(high);
        report.differences = differences(&moments[0].machine, &moments[1].machine);
        for (which, run) in self.runs.iter().enumerate() {
            report.console[which] = self.console_around(run, high);
        }
        Ok(())
    }

    fn console_around(&self, run: &RunReference, icount: u64) -> Vec<String> {
        let lines = read_console(&run.path).unwrap_or_default();
        let middle = lines.partition_point(|line| line.icount < icount);
        let from = middle.saturating_sub(self.arguments.lines);
        let to = middle.saturating_add(self.arguments.lines).min(lines.len());
        lines[from..to].iter().map(|line| format!("{} {}", line.icount, readable(line))).collect()
    }
}

/// Runs a machine on along its timeline, or to its end.
fn go(machine: &mut Machine, run: &RunReference, icount: u64) -> Result<(), Failure> {
    match advance(machine, &run.manifest, Icount(icount), &mut |_| {}) {
        Ok(()) | Err(crate::moment::MomentError::BeyondEnd { .. }) => Ok(()),
        Err(crate::moment::MomentError::ForeignInputs(error)) => Err(inputs_failure(error)),
        Err(error) => Err(moment_failure(error)),
    }
}

fn inputs_failure(error: ForeignInputs) -> Failure {
    Failure::new(exit::INPUTS, error)
}

fn print(report: &Report, runs: &[RunReference; 2]) {
    if !report.differ {
        say!("no difference up to icount {}", report.equal_at);
        return;
    }
    if let Some(epoch) = report.first_epoch {
        say!("the hash chains differ first at icount {epoch}");
    }
    say!(
        "equal after {} instructions, different after {}",
        report.equal_at,
        report.differs_at.unwrap_or(report.equal_at)
    );
    if let [first, second] = &report.instructions[..] {
        say!("instruction: {first}");
        if first != second {
            say!("        and: {second}");
        }
    }
    report.differences.iter().for_each(|difference| say!("  {difference}"));
    for (run, lines) in runs.iter().zip(&report.console) {
        say!("console of {}:", run.id());
        lines.iter().for_each(|line| say!("  {line}"));
    }
}
