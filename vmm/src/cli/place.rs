//! Runs and moments named on the command line, and the machines that stand there.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use orrery_cpu::Icount;

use super::args::{MomentArgs, ReachArgs, RunsDirectoryArgs};
use super::engine::WarmEngine;
use super::exit::{self, Failure};
use crate::debug::{DebugError, Session, Subject};
use crate::machine::MachineError;
use crate::moment::{Moment, MomentError, MomentOptions, RunReference};

/// A run, and how its moments are reached. To be kept while machines of it run.
pub(super) struct Place {
    /// The run.
    pub run: RunReference,
    /// How machines of it are made.
    pub options: MomentOptions,
    _engine: WarmEngine,
}

/// Finds a run by its name or the beginning of it.
pub(super) fn find_run(kept: &RunsDirectoryArgs, name: &str) -> Result<RunReference, Failure> {
    RunReference::find(&kept.runs, name).map_err(moment_failure)
}

impl Place {
    /// Finds a run by its name or the beginning of it.
    pub fn find(name: &str, arguments: &ReachArgs) -> Result<Place, Failure> {
        Place::of(find_run(&arguments.place.kept, name)?, arguments)
    }

    /// A run that has been found.
    pub fn of(run: RunReference, arguments: &ReachArgs) -> Result<Place, Failure> {
        let engine = WarmEngine::new(&arguments.engine, &run.manifest.image.hash.0)?;
        let options = MomentOptions {
            image: arguments.place.image.clone(),
            engine: engine.config.clone(),
            from_power_on: arguments.from_power_on,
        };
        Ok(Place { run, options, _engine: engine })
    }

    /// The machine at an icount, or at the run's end. Says which snapshots turned out damaged.
    pub fn moment(&self, icount: Option<Icount>) -> Result<Moment, Failure> {
        let progress = Progress::new("going there", self.icount(icount.map(|icount| icount.0)).unwrap_or(0));
        let bar = &progress.0;
        let moment = Moment::of(self.run.clone(), icount, &self.options, &mut |icount| bar.set_position(icount.0));
        progress.finish();
        let moment = moment.map_err(moment_failure)?;
        for error in &moment.damage {
            eprintln!("orrery: {error}; going on from an earlier moment");
        }
        Ok(moment)
    }

    /// The icount meant: what was given, or the run's end.
    pub fn icount(&self, icount: Option<u64>) -> Result<u64, Failure> {
        let manifest = &self.run.manifest;
        icount
            .or(manifest.outcome.as_ref().map(|outcome| outcome.icount))
            .ok_or_else(|| moment_failure(MomentError::NoEnd { run: manifest.id.clone() }))
    }

    /// The run, to move about in.
    pub fn subject(&self) -> Result<Subject, Failure> {
        Subject::open(self.run.clone(), self.options.clone()).map_err(debug_failure)
    }

    /// A session at a moment.
    pub fn session(&self, icount: u64) -> Result<Session, Failure> {
        let subject = self.subject()?;
        let progress = Progress::new("going there", icount);
        let session = Session::open(subject, icount, &mut progress.watcher()).map_err(debug_failure);
        progress.finish();
        session
    }
}

/// The moment that a command is about. To be kept while its machine runs.
pub(super) fn open(arguments: &MomentArgs) -> Result<(Place, Moment), Failure> {
    let place = Place::find(&arguments.moment.run, &arguments.reach)?;
    let moment = place.moment(arguments.moment.icount)?;
    Ok((place, moment))
}

/// A progress bar over icounts, on a terminal.
pub(super) struct Progress(ProgressBar);

impl Progress {
    pub fn new(what: &'static str, end: u64) -> Progress {
        if !std::io::stderr().is_terminal() {
            return Progress(ProgressBar::hidden());
        }
        let style = ProgressStyle::with_template("{msg} {bar:40} icount {pos} of {len}, {eta} left");
        let bar = ProgressBar::new(end).with_style(style.expect("the template is constant"));
        Progress(bar.with_message(what))
    }

    /// To be told how far it has come; never asks to stop.
    pub fn watcher(&self) -> impl FnMut(u64) -> bool {
        let bar = self.0.clone();
        move |icount| {
            bar.set_position(icount);
            false
        }
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// A sign of life on standard error, if that is a terminal.
pub(super) fn spinner() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {msg}").expect("the template is constant");
    ProgressBar::new_spinner().with_style(style)
}

/// The exit code of a moment that cannot be reached.
pub(super) fn moment_failure(error: MomentError) -> Failure {
    let code = match &error {
        MomentError::NoSuchRun { .. }
        | MomentError::Ambiguous { .. }
        | MomentError::BeyondEnd { .. }
        | MomentError::NoEnd { .. } => exit::MOMENT,
        MomentError::Run(_) => exit::DAMAGED,
        MomentError::Inputs(_) | MomentError::ForeignInputs(_) => exit::INPUTS,
        MomentError::Image(_) | MomentError::OtherImage { .. } => exit::IMAGE,
        MomentError::Machine(MachineError::Ram(_) | MachineError::Engine(_)) => exit::HOST,
        MomentError::Machine(_) => exit::MACHINE,
    };
    Failure::new(code, error)
}

/// The exit code of what keeps a session from going where it should.
pub(super) fn debug_failure(error: DebugError) -> Failure {
    let code = match error {
        DebugError::Moment(error) => return moment_failure(error),
        DebugError::Store(_) => exit::STORE,
        DebugError::Foreign(_) => exit::INPUTS,
        DebugError::Machine(error) => return moment_failure(MomentError::Machine(error)),
        DebugError::Branch(_) | DebugError::Network { .. } => exit::HOST,
        DebugError::NotRepeated { .. } => exit::DIVERGED,
        DebugError::BadPlace { .. } => exit::USAGE,
        DebugError::BeyondEnd { .. } | DebugError::BeforeChange { .. } => exit::MOMENT,
        DebugError::Interrupted { .. }
        | DebugError::NotMapped { .. }
        | DebugError::NoSymbol { .. }
        | DebugError::Inspect(_) => exit::INSPECT,
    };
    Failure::new(code, error)
}
