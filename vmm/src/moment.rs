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
use crate::machine::{ForeignInputs, Limits, Machine, MachineError, Pause};
use crate::run::directory::{INPUTS, MANIFEST, StoreError, read_manifest};
use crate::run::manifest::{Ended, Manifest};

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
    /// The text names no moment.
    #[error(transparent)]
    Name(#[from] NameError),
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

    /// Opens its image and checks that it is the one. `other`: where it is, if not where the manifest says.
    pub fn image(&self, other: Option<&Path>) -> Result<Image, MomentError> {
        let reference = &self.manifest.image;
        let path = other.unwrap_or(Path::new(&reference.path));
        // A relative path was relative to where the run was made, most often beside the runs.
        let beside = self.path.parent().and_then(Path::parent).map(|parent| parent.join(path));
        let path = match beside {
            Some(beside) if other.is_none() && !path.exists() && beside.exists() => beside,
            _ => path.to_owned(),
        };
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
        let manifest = &run.manifest;
        let mut machine = Machine::new(&image, &manifest.machine, Seed(manifest.seed), options.engine.clone())?;
        machine.replay(run.inputs()?);
        advance(&mut machine, manifest, target, progress)?;
        Ok(Moment { run, image, machine })
    }

    /// Instructions retired.
    pub fn icount(&self) -> Icount {
        self.machine.icount()
    }
}

/// Brings a machine that is on the timeline of a run to a later moment of it: through the branch points on the way.
pub fn advance(
    machine: &mut Machine,
    manifest: &Manifest,
    target: Icount,
    progress: &mut dyn FnMut(Icount),
) -> Result<(), MomentError> {
    for point in &manifest.branches {
        if point.icount < machine.icount().0 || point.icount > target.0 {
            continue;
        }
        run_to(machine, Icount(point.icount), progress)?;
        // At the branch's first moment its streams have their new keys already.
        machine.rekey(Seed(point.seed));
    }
    run_to(machine, target, progress)
}

fn run_to(machine: &mut Machine, target: Icount, progress: &mut dyn FnMut(Icount)) -> Result<(), MomentError> {
    while machine.icount() < target {
        let next = Icount(machine.icount().0.saturating_add(REPORT_INSTRUCTIONS).min(target.0));
        let pause = machine.run(Limits::until(next))?;
        machine.take_output();
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
