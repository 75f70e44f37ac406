//! `RUN@ICOUNT` on the command line: the machine of that run, standing exactly there.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use orrery_cpu::Icount;

use super::args::{MomentArgs, RunPlaceArgs};
use super::exit::{self, Failure};
use crate::machine::Machine;
use crate::moment::{self, Moment, MomentError, MomentName, MomentOptions};

/// A machine at a moment of a run.
pub(super) struct Standing {
    moment: Moment,
}

impl Standing {
    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.moment.machine
    }

    /// The machine alone, for futures that are not the run's.
    pub fn into_machine(self) -> Machine {
        self.moment.machine
    }

    /// The run's name.
    pub fn id(&self) -> &str {
        self.moment.run.id()
    }

    /// The run's last icount, if it ended in order.
    pub fn end(&self) -> Option<u64> {
        self.moment.run.manifest.outcome.as_ref().map(|outcome| outcome.icount)
    }

    /// Goes on to a later moment of the run. True if the run ends before it, or there.
    pub fn advance(&mut self, icount: u64) -> Result<bool, Failure> {
        let Moment { run, machine, .. } = &mut self.moment;
        match moment::advance(machine, &run.manifest, Icount(icount), &mut |_| {}) {
            Ok(()) => Ok(machine.ended().is_some()),
            Err(MomentError::BeyondEnd { .. }) => Ok(true),
            Err(error) => Err(failure(error)),
        }
    }
}

/// Opens the moment asked for.
pub(super) fn open(arguments: &MomentArgs) -> Result<Standing, Failure> {
    let name: MomentName = arguments.moment.parse().map_err(|error: moment::NameError| failure(error.into()))?;
    open_named(&arguments.place, &name)
}

/// Opens a run at an icount.
pub(super) fn open_run(place: &RunPlaceArgs, run: &str, icount: u64) -> Result<Standing, Failure> {
    open_named(place, &MomentName { run: run.to_owned(), icount: Some(Icount(icount)) })
}

fn open_named(place: &RunPlaceArgs, name: &MomentName) -> Result<Standing, Failure> {
    let options = MomentOptions { image: place.image.clone(), ..MomentOptions::default() };
    let bar = bar(name.icount.map_or(0, |icount| icount.0));
    let moment = Moment::open(&place.runs, name, &options, &mut |icount| bar.set_position(icount.0));
    bar.finish_and_clear();
    Ok(Standing { moment: moment.map_err(failure)? })
}

/// The exit code of a moment that cannot be opened.
pub(super) fn failure(error: MomentError) -> Failure {
    let code = match &error {
        MomentError::Name(_) | MomentError::NoSuchRun { .. } | MomentError::Ambiguous { .. } => exit::USAGE,
        MomentError::BeyondEnd { .. } | MomentError::NoEnd { .. } => exit::USAGE,
        MomentError::Inputs(_) | MomentError::ForeignInputs(_) => exit::INPUTS,
        MomentError::Image(_) | MomentError::OtherImage { .. } => exit::IMAGE,
        MomentError::Machine(_) => exit::HOST,
        _ => exit::STORE,
    };
    Failure::new(code, error)
}

/// A progress bar up to an icount, on a terminal.
pub(super) fn bar(length: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} icount {pos} of {len}, {eta} left");
    ProgressBar::new(length).with_style(style.expect("the template is constant"))
}
