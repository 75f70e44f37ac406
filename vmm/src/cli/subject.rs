//! A run to look into, for the commands that move about in it.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

use super::args::SubjectArgs;
use super::exit::{self, Failure};
use super::run::engine_config;
use super::snapshot::moment_failure;
use crate::debug::{DebugError, Session, Subject};
use crate::moment::{MomentError, MomentName, MomentOptions, RunReference};

/// Opens the run that a moment's name begins with; the icount after the `@`, if there is one.
pub(super) fn open(name: &str, arguments: &SubjectArgs) -> Result<(Subject, MomentName), Failure> {
    let name: MomentName = name.parse().map_err(|error| Failure::new(exit::USAGE, error))?;
    let run = RunReference::find(&arguments.runs, &name.run).map_err(moment_failure)?;
    let options = MomentOptions {
        image: arguments.image.clone(),
        engine: engine_config(&arguments.engine),
        from_power_on: arguments.from_power_on,
    };
    let subject = Subject::open(run, options).map_err(failure)?;
    Ok((subject, name))
}

/// The icount meant: what was given, or the run's end.
pub(super) fn target(subject: &Subject, icount: Option<u64>) -> Result<u64, Failure> {
    let manifest = subject.manifest();
    icount
        .or(manifest.outcome.as_ref().map(|outcome| outcome.icount))
        .ok_or_else(|| moment_failure(MomentError::NoEnd { run: manifest.id.clone() }))
}

/// A session at a moment, with a progress bar on the way there.
pub(super) fn session(subject: Subject, icount: u64) -> Result<Session, Failure> {
    let progress = Progress::new("going there", icount);
    let session = Session::open(subject, icount, &mut progress.watcher()).map_err(failure);
    progress.finish();
    session
}

/// A progress bar over icounts, on a terminal.
pub(super) struct Progress(ProgressBar);

impl Progress {
    pub(super) fn new(what: &'static str, end: u64) -> Progress {
        if !std::io::stderr().is_terminal() {
            return Progress(ProgressBar::hidden());
        }
        let style = ProgressStyle::with_template("{msg} {bar:40} icount {pos} of {len}, {eta} left");
        let bar = ProgressBar::new(end).with_style(style.expect("the template is constant"));
        Progress(bar.with_message(what))
    }

    /// To be told how far it has come; never asks to stop.
    pub(super) fn watcher(&self) -> impl FnMut(u64) -> bool {
        let bar = self.0.clone();
        move |icount| {
            bar.set_position(icount);
            false
        }
    }

    pub(super) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// The exit code of what keeps a session from going where it should.
pub(super) fn failure(error: DebugError) -> Failure {
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
