//! Moments: `RUN@ICOUNT` as text, and the machine that stands there.
//!
//! [`Moment::open`] is the one way from a name to a machine: it finds the run and its image, and brings a machine to
//! the first moment at which that many instructions have retired, going through the same past as the run did.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_guest_image::{Image, ImageError};

use crate::chain::Hash;
use crate::config::Seed;
use crate::inputs::{self, Input, InputsError};
use crate::machine::{ForeignInputs, Limits, Machine, MachineError, Output, Pause};
use crate::run::directory::{ConsoleLog, INPUTS, MANIFEST, StoreError, read_manifest};
use crate::run::manifest::{Ended, Manifest};
use crate::store::{CaptureBase, SnapshotError, SnapshotRecord, Store, Timeline, log};

/// Instructions between reports of progress.
const REPORT_INSTRUCTIONS: u64 = 1 << 24;

/// The name of a moment: a run, and how many instructions have retired in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MomentName {
    /// The run's name, the first characters of it, or a path to its directory.
    pub run: String,
    /// Instructions retired; None for the run's end.
    pub icount: Option<Icount>,
}

/// Text that names no moment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing before the `@`.
    #[error("{text:?} names no run; a moment is written RUN@ICOUNT, such as hello-1-001@1000000")]
    NoRun {
        /// What was given.
        text: String,
    },
    /// Not a number after the `@`.
    #[error("{text:?} is not a number of instructions; write RUN@ICOUNT, such as hello-1-001@1000000")]
    NoIcount {
        /// What was given after the `@`.
        text: String,
    },
}

impl FromStr for MomentName {
    type Err = NameError;

    /// `RUN@ICOUNT`, `RUN@end` or `RUN`; digits may be grouped by underscores.
    fn from_str(text: &str) -> Result<MomentName, NameError> {
        let (run, icount) = match text.rsplit_once('@') {
            Some((run, icount)) => (run, Some(icount).filter(|icount| *icount != "end")),
            None => (text, None),
        };
        if run.is_empty() {
            return Err(NameError::NoRun { text: text.to_owned() });
        }
        let icount = match icount {
            Some(digits) => {
                let wrong = || NameError::NoIcount { text: digits.to_owned() };
                if !digits.starts_with(|c: char| c.is_ascii_digit()) {
                    return Err(wrong());
                }
                Some(Icount(digits.replace('_', "").parse().map_err(|_| wrong())?))
            }
            None => None,
        };
        Ok(MomentName { run: run.to_owned(), icount })
    }
}

impl std::fmt::Display for MomentName {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self.icount {
            Some(icount) => write!(f, "{}@{}", self.run, icount.0),
            None => write!(f, "{}", self.run),
        }
    }
}

/// Why there is no machine at a moment. None of these changes the run.
#[derive(Debug, thiserror::Error)]
pub enum MomentError {
    /// No such run.
    #[error("there is no run {run:?} in {runs}; `orrery runs` lists them, --runs names another directory")]
    NoSuchRun {
        /// What was asked for.
        run: String,
        /// Where it was looked for.
        runs: String,
    },
    /// Several runs begin like this.
    #[error("{run:?} may be any of {candidates}; give more of the name")]
    Ambiguous {
        /// What was asked for.
        run: String,
        /// Some of the runs that it may be.
        candidates: String,
    },
    /// The run's files.
    #[error(transparent)]
    Run(#[from] StoreError),
    /// The run's inputs.
    #[error(transparent)]
    Inputs(#[from] InputsError),
    /// The image cannot be opened.
    #[error("the image of the run cannot be opened: {0}; put it back, or name it with --image")]
    Image(#[from] ImageError),
    /// The image is another one.
    #[error(
        "{path} is not the image of the run: its hash is {actual} instead of {expected}; name the right one with --image"
    )]
    OtherImage {
        /// What was opened.
        path: String,
        /// Hash in the manifest.
        expected: Hash,
        /// Hash of the file.
        actual: Hash,
    },
    /// The moment is after the run's end.
    #[error("the run ends at icount {end} ({ended}), before {icount}")]
    BeyondEnd {
        /// What was asked for.
        icount: u64,
        /// The last icount.
        end: u64,
        /// How it ended.
        ended: String,
    },
    /// A run that did not end in order has no known end.
    #[error("the run {run} did not end in order, so its end is not known; name a moment as {run}@ICOUNT")]
    NoEnd {
        /// Its name.
        run: String,
    },
    /// No machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The past is not the one that the inputs were logged in.
    #[error(transparent)]
    ForeignInputs(#[from] ForeignInputs),
}

/// Where to look, and how to run.
#[derive(Clone, Debug, Default)]
pub struct MomentOptions {
    /// The image, if it is not where the manifest says.
    pub image: Option<PathBuf>,
    /// How the engine works.
    pub engine: EngineConfig,
    /// Begin at power-on, whatever snapshots there are.
    pub from_power_on: bool,
}

/// A run on disk, found by its name.
#[derive(Clone, Debug)]
pub struct RunReference {
    /// Its directory.
    pub path: PathBuf,
    /// What it was a function of, and how it ended.
    pub manifest: Manifest,
}

impl RunReference {
    /// Finds a run by its name, the beginning of its name, or the path of its directory.
    pub fn find(runs: &Path, name: &str) -> Result<RunReference, MomentError> {
        let path = find_run(runs, name)?;
        let manifest = read_manifest(&path)?;
        Ok(RunReference { path, manifest })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.manifest.id
    }

    /// The inputs that entered it, from power-on.
    pub fn inputs(&self) -> Result<Vec<Input>, MomentError> {
        let path = self.path.join(INPUTS);
        Ok(if path.exists() { inputs::read_log(&path)? } else { Vec::new() })
    }

    /// Where its image is: `other`, or where the manifest says.
    pub fn image_path(&self, other: Option<&Path>) -> PathBuf {
        let reference = &self.manifest.image;
        let path = other.unwrap_or(Path::new(&reference.path));
        // A relative path was relative to where the run was made, most often beside the runs.
        let beside = self.path.parent().and_then(Path::parent).map(|parent| parent.join(path));
        match beside {
            Some(beside) if other.is_none() && !path.exists() && beside.exists() => beside,
            _ => path.to_owned(),
        }
    }

    /// Opens its image and checks that it is the one. `other`: where it is, if not where the manifest says.
    pub fn image(&self, other: Option<&Path>) -> Result<Image, MomentError> {
        let reference = &self.manifest.image;
        let path = self.image_path(other);
        let image = Image::open(&path)?;
        let actual = Hash(image.hash());
        if actual != reference.hash {
            let path = path.display().to_string();
            return Err(MomentError::OtherImage { path, expected: reference.hash, actual });
        }
        Ok(image)
    }
}

/// The directory of the run with this name, or the only one that begins with it.
pub fn find_run(runs: &Path, name: &str) -> Result<PathBuf, MomentError> {
    let is_run = |path: &Path| path.join(MANIFEST).is_file();
    let exact = runs.join(name);
    if !name.contains('/') && is_run(&exact) {
        return Ok(exact);
    }
    if name.contains('/') && is_run(Path::new(name)) {
        return Ok(PathBuf::from(name));
    }
    let mut found: Vec<String> = Vec::new();
    if !name.contains('/') {
        let entries = fs::read_dir(runs).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        found.extend(names.filter(|other| other.starts_with(name) && is_run(&runs.join(other))));
    }
    found.sort();
    match found.as_slice() {
        [] => Err(MomentError::NoSuchRun { run: name.to_owned(), runs: runs.display().to_string() }),
        [only] => Ok(runs.join(only)),
        several => {
            let shown = several.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
            let candidates = if several.len() > 5 { format!("{shown} and others") } else { shown };
            Err(MomentError::Ambiguous { run: name.to_owned(), candidates })
        }
    }
}

/// A machine that stands at a moment of a run.
pub struct Moment {
    /// The run.
    pub run: RunReference,
    /// Its image.
    pub image: Image,
    /// Where the machine began: a snapshot, or power-on.
    pub start: Option<SnapshotRecord>,
    /// What a further snapshot builds on, if it began at one.
    pub base: Option<(CaptureBase, Timeline)>,
    /// Console output since the start, in the form of the console log: whole lines, and what comes after them.
    pub console: ConsoleLog<Vec<u8>>,
    /// Snapshots that should have been used and are damaged.
    pub damage: Vec<SnapshotError>,
    /// The machine, exactly there. The run's later inputs wait in it, so running it on goes through the run's future.
    pub machine: Machine,
}

impl Moment {
    /// Opens `RUN@ICOUNT` among the runs in `runs`. `progress` is called now and then with where the machine is.
    pub fn open(
        runs: &Path,
        name: &MomentName,
        options: &MomentOptions,
        progress: &mut dyn FnMut(Icount),
    ) -> Result<Moment, MomentError> {
        let run = RunReference::find(runs, &name.run)?;
        Moment::of(run, name.icount, options, progress)
    }

    /// A moment of a run that has been found.
    pub fn of(
        run: RunReference,
        icount: Option<Icount>,
        options: &MomentOptions,
        progress: &mut dyn FnMut(Icount),
    ) -> Result<Moment, MomentError> {
        let target = match (&run.manifest.outcome, icount) {
            (Some(outcome), Some(icount)) if icount.0 > outcome.icount => {
                let ended = outcome.ended.to_string();
                return Err(MomentError::BeyondEnd { icount: icount.0, end: outcome.icount, ended });
            }
            (_, Some(icount)) => icount,
            (Some(outcome), None) => Icount(outcome.icount),
            (None, None) => return Err(MomentError::NoEnd { run: run.manifest.id.clone() }),
        };
        let image = run.image(options.image.as_deref())?;
        let inputs = run.inputs()?;
        let mut damage = Vec::new();
        let found = match options.from_power_on {
            true => None,
            false => nearest(&run, &inputs, target, &image, &options.engine, &mut damage),
        };
        let mut console = ConsoleLog::new(Vec::new());
        let (mut machine, start, base) = match found {
            Some(Start { machine, record, base }) => {
                if let Some(line) = &record.console_line {
                    console.begin_with(line);
                }
                (machine, Some(record), Some(base))
            }
            None => {
                let manifest = &run.manifest;
                let seed = Seed(manifest.seed);
                (Machine::new(&image, &manifest.machine, seed, options.engine.clone())?, None, None)
            }
        };
        machine.replay(inputs[machine.inputs_entered() as usize..].to_vec());
        let mut output = |outputs: Vec<Output>| {
            for output in outputs.iter().filter(|output| output.channel == "console") {
                console.append(output.icount, output.time, &output.bytes).expect("memory takes every byte");
            }
        };
        advance_with(&mut machine, &run.manifest, target, progress, &mut output)?;
        Ok(Moment { run, image, start, base, console, damage, machine })
    }

    /// Instructions retired.
    pub fn icount(&self) -> Icount {
        self.machine.icount()
    }
}

/// A machine at a snapshot.
pub(crate) struct Start {
    pub(crate) machine: Machine,
    record: SnapshotRecord,
    base: (CaptureBase, Timeline),
}

/// Snapshots of the run and of those behind it that are on its timeline, the last one first.
fn candidates(run: &RunReference, inputs: &[Input], target: Icount) -> Vec<SnapshotRecord> {
    let mut limit = target.0;
    let mut records = log::read(&run.path).unwrap_or_default().records;
    records.retain(|record| record.icount <= limit);
    let runs = run.path.parent().unwrap_or(Path::new("."));
    for (index, point) in run.manifest.branches.iter().enumerate().rev() {
        limit = limit.min(point.icount);
        let path = runs.join(&point.run);
        // A run of this name may be another one by now.
        let Ok(parent) = read_manifest(&path) else { continue };
        let mine = &run.manifest;
        let same = parent.image.hash == mine.image.hash
            && parent.machine == mine.machine
            && parent.seed == mine.seed
            && parent.branches == mine.branches[..index];
        let Ok(theirs) = inputs::read_log(&path.join(INPUTS)) else { continue };
        if !same
            || !theirs
                .iter()
                .take_while(|input| input.icount < limit)
                .eq(inputs.iter().take_while(|i| i.icount < limit))
        {
            continue;
        }
        let list = log::read(&path).unwrap_or_default().records;
        records.extend(list.into_iter().filter(|record| record.icount <= limit));
    }
    records.sort_by_key(|record| std::cmp::Reverse(record.icount));
    records
}

/// The machine of the last snapshot that is whole. Damaged ones cost time and nothing else.
pub(crate) fn nearest(
    run: &RunReference,
    inputs: &[Input],
    target: Icount,
    image: &Image,
    engine: &EngineConfig,
    damage: &mut Vec<SnapshotError>,
) -> Option<Start> {
    let runs = run.path.parent().unwrap_or(Path::new("."));
    let store = match Store::existing(runs) {
        Ok(store) => store?,
        Err(error) => {
            damage.push(error);
            return None;
        }
    };
    for record in candidates(run, inputs, target) {
        if record.inputs_entered > inputs.len() as u64 {
            let what = "more inputs had entered than the run's log has".to_owned();
            damage.push(SnapshotError::Inconsistent { icount: record.icount, what });
            continue;
        }
        let loaded = store.load(&record, image, engine.clone()).and_then(|mut machine| {
            let timeline = Timeline::of(&store, &record)?;
            let base = CaptureBase::of(&mut machine);
            Ok(Start { machine, record: record.clone(), base: (base, timeline) })
        });
        match loaded {
            Ok(start) if *start.machine.config() == run.manifest.machine => return Some(start),
            Ok(_) => {
                let what = "it is of another machine".to_owned();
                damage.push(SnapshotError::Inconsistent { icount: record.icount, what });
            }
            Err(error) => damage.push(error),
        }
    }
    None
}

/// Brings a machine that is on the timeline of a run to a later moment of it: through the branch points on the way.
pub fn advance(
    machine: &mut Machine,
    manifest: &Manifest,
    target: Icount,
    progress: &mut dyn FnMut(Icount),
) -> Result<(), MomentError> {
    advance_with(machine, manifest, target, progress, &mut |_| {})
}

fn advance_with(
    machine: &mut Machine,
    manifest: &Manifest,
    target: Icount,
    progress: &mut dyn FnMut(Icount),
    output: &mut dyn FnMut(Vec<Output>),
) -> Result<(), MomentError> {
    for point in &manifest.branches {
        if point.icount < machine.icount().0 || point.icount > target.0 {
            continue;
        }
        run_to(machine, Icount(point.icount), progress, output)?;
        // At the branch's first moment its streams have their new keys already.
        machine.rekey(Seed(point.seed));
    }
    run_to(machine, target, progress, output)
}

fn run_to(
    machine: &mut Machine,
    target: Icount,
    progress: &mut dyn FnMut(Icount),
    output: &mut dyn FnMut(Vec<Output>),
) -> Result<(), MomentError> {
    while machine.icount() < target {
        let next = Icount(machine.icount().0.saturating_add(REPORT_INSTRUCTIONS).min(target.0));
        let pause = machine.run(Limits::until(next))?;
        output(machine.take_output());
        machine.take_inputs();
        progress(machine.icount());
        match pause {
            Pause::Ended(ended) if machine.icount() < target => return Err(beyond(machine, target, &ended)),
            _ => {}
        }
    }
    Ok(())
}

fn beyond(machine: &Machine, target: Icount, ended: &Ended) -> MomentError {
    MomentError::BeyondEnd { icount: target.0, end: machine.icount().0, ended: ended.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        let read = |text: &str| text.parse::<MomentName>();
        let name = |run: &str, icount| MomentName { run: run.into(), icount };
        assert_eq!(read("a-1-001@5"), Ok(name("a-1-001", Some(Icount(5)))));
        assert_eq!(read("a@1_000"), Ok(name("a", Some(Icount(1000)))));
        assert_eq!(read("a@b@7"), Ok(name("a@b", Some(Icount(7)))));
        assert_eq!(read("a@end"), Ok(name("a", None)));
        assert_eq!(read("a"), Ok(name("a", None)));
        assert!(matches!(read("@5"), Err(NameError::NoRun { .. })));
        assert!(matches!(read(""), Err(NameError::NoRun { .. })));
        for wrong in ["a@", "a@x", "a@_", "a@-1", "a@99999999999999999999"] {
            assert!(matches!(read(wrong), Err(NameError::NoIcount { .. })), "{wrong}");
        }
    }
}
