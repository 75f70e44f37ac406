//! `orrery branch`.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use orrery_cpu::Icount;
use orrery_devices::VirtualNs;

use super::args::BranchArgs;
use super::console::Console;
use super::exit::{self, Failure};
use super::place::{self, moment_failure, spinner};
use super::run::{absolute, record_failure, report};
use crate::config::Seed;
use crate::inputs::{self, Input};
use crate::machine::Machine;
use crate::moment::Moment;
use crate::run::RunDirectory;
use crate::run::directory::{ConsoleLine, Past, StoreError, read_console, read_links};
use crate::run::manifest::{BranchPoint, ImageReference};
use crate::run::recorder::{Host, NoHost, Origin, Recorder, RecorderOptions, Summary};

pub(super) fn branch(arguments: &BranchArgs) -> Result<u8, Failure> {
    let inputs = match &arguments.inputs {
        Some(path) => Some(inputs::read(path).map_err(|error| Failure::new(exit::INPUTS, error))?),
        None => None,
    };
    if arguments.count == 1 {
        let (_place, moment) = place::open(&arguments.at)?;
        let seed = arguments.seed.unwrap_or(moment.machine.seed().0);
        let mut console = Console::connect(!arguments.quiet, false).map_err(|e| Failure::new(exit::HOST, e))?;
        let summary = run_branch(arguments, moment, seed, inputs.as_deref(), &mut console);
        console.finish();
        drop(console);
        let (summary, _) = summary?;
        report(&summary, arguments.quiet, arguments.json);
        return Ok(exit::code_of(&summary.ended));
    }
    many(arguments, inputs.as_deref())
}

/// Runs several branches, each with its own seed, on some threads. All leave the one machine that stands at the moment.
fn many(arguments: &BranchArgs, inputs: Option<&[Input]>) -> Result<u8, Failure> {
    let (_place, mut first) = place::open(&arguments.at)?;
    let start = arguments.seed.unwrap_or(first.machine.seed().0.wrapping_add(1));
    let template = first.machine.freeze().map_err(|error| Failure::new(exit::HOST, error))?;
    let (run, image) = (first.run.clone(), first.image.clone());
    let line = first.console.partial_line();
    drop(first);
    let next = AtomicU64::new(0);
    let failure: Mutex<Option<Failure>> = Mutex::new(None);
    let printing = Mutex::new(());
    let bar = spinner();
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= arguments.count || failure.lock().is_ok_and(|failure| failure.is_some()) {
                return;
            }
            let machine = match template.branch(template.seed(), None) {
                Ok(machine) => machine,
                Err(error) => return keep(&failure, Failure::new(exit::HOST, error)),
            };
            let mut console = crate::run::directory::ConsoleLog::new(Vec::new());
            if let Some(line) = &line {
                console.begin_with(line);
            }
            let moment = Moment {
                run: run.clone(),
                image: image.clone(),
                start: None,
                base: None,
                console,
                damage: Vec::new(),
                machine,
            };
            match run_branch(arguments, moment, start.wrapping_add(index), inputs, &mut NoHost) {
                Ok((summary, machine)) => {
                    drop(machine);
                    let _one_at_a_time = printing.lock();
                    bar.set_message(format!("{} of {} branches", index + 1, arguments.count));
                    bar.tick();
                    report(&summary, arguments.quiet, arguments.json);
                }
                Err(error) => return keep(&failure, error),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..arguments.jobs.min(arguments.count) {
            scope.spawn(work);
        }
        work();
    });
    bar.finish_and_clear();
    let failure = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    failure.map_or(Ok(0), Err)
}

fn keep(place: &Mutex<Option<Failure>>, failure: Failure) {
    place.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(failure);
}

/// Records one branch to its end.
fn run_branch(
    arguments: &BranchArgs,
    mut moment: Moment,
    seed: u64,
    inputs: Option<&[Input]>,
    host: &mut dyn Host,
) -> Result<(Summary, Machine), Failure> {
    let store = |error: StoreError| Failure::new(exit::STORE, error);
    let icount = moment.icount().0;
    let manifest = &moment.run.manifest;
    let past = past(&moment)?;
    let entered = past.inputs.len();
    if let Some(inputs) = inputs {
        // A file may begin with the past: what has entered already must then be the same.
        let rest = inputs.strip_prefix(&past.inputs[..]).unwrap_or(inputs);
        let now = moment.machine.time().0;
        if let Some(early) = rest.iter().find(|input| input.icount < icount || input.virtual_ns < now) {
            let message = format!(
                "the inputs have one at icount {} that the parent did not have; a branch at {icount} can only have others after that",
                early.icount
            );
            return Err(Failure::new(exit::INPUTS, message));
        }
        moment.machine.forget_inputs();
        moment.machine.schedule(rest.to_vec());
    }
    debug_assert_eq!(entered as u64, moment.machine.inputs_entered());
    moment.machine.rekey(Seed(seed));
    let runs = moment.run.path.parent().unwrap_or(Path::new(".")).to_owned();
    let directory = RunDirectory::create_branch(&runs, manifest.stem(), seed, &past).map_err(store)?;
    let mut branches = manifest.branches.clone();
    branches.retain(|point| point.icount <= icount);
    branches.push(BranchPoint { run: manifest.id.clone(), icount, seed });
    let image = match &arguments.at.reach.place.image {
        Some(path) => ImageReference { path: absolute(path), hash: manifest.image.hash },
        None => manifest.image.clone(),
    };
    let origin = Origin {
        image,
        machine: manifest.machine.clone(),
        seed: Seed(manifest.seed),
        branches,
        replayed_inputs: arguments.inputs.as_ref().map(|path| path.display().to_string()),
        host_cpu_vendor: crate::host::cpu_vendor(),
    };
    let options = RecorderOptions {
        epoch_instructions: manifest.epoch_instructions,
        until: arguments.limit.until.map(Icount),
        until_time: arguments.limit.until_virtual.map(VirtualNs),
        snapshots: arguments.snapshots.options(),
    };
    let base = moment.base.take();
    let machine = moment.machine;
    let mut recorder =
        Recorder::resume(machine, origin, options, Some(directory), &past.links).map_err(record_failure)?;
    if let Some((base, timeline)) = base {
        recorder.build_on(base, timeline);
    }
    let summary = recorder.run(host).map_err(record_failure)?;
    Ok((summary, recorder.into_machine()))
}

/// What the branch takes over: everything of the parent's files that comes before the moment.
fn past(moment: &Moment) -> Result<Past, Failure> {
    let damaged = |error: StoreError| Failure::new(exit::DAMAGED, error);
    let icount = moment.icount().0;
    let epoch = moment.run.manifest.epoch_instructions.max(1);
    let mut links = read_links(&moment.run.path).map_err(damaged)?;
    links.retain(|link| link.icount <= icount && link.icount.is_multiple_of(epoch));
    if links.len() as u64 != icount / epoch {
        let message = format!(
            "the hash chain of {} has {} links before icount {icount} instead of {}: it is damaged",
            moment.run.id(),
            links.len(),
            icount / epoch
        );
        return Err(Failure::new(exit::DAMAGED, message));
    }
    let mut inputs = moment.run.inputs().map_err(moment_failure)?;
    inputs.truncate(moment.machine.inputs_entered() as usize);
    let line = moment.console.partial_line();
    let end = line.as_ref().map_or(icount, |line| line.icount);
    let lines = read_console(&moment.run.path).map_err(damaged)?;
    let whole = lines.iter().filter(|line| line.icount < end);
    let text = |line: &ConsoleLine| format!("{} {} {}\n", line.icount, line.virtual_ns, line.text);
    Ok(Past { links, inputs, console: whole.map(text).collect(), line })
}
