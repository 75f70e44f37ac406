//! `orrery snapshot`, and what all commands about moments share.

use std::io::IsTerminal;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use orrery_cpu::Icount;

use super::args::{PlaceArgs, SnapshotCommandArgs};
use super::exit::{self, Failure};
use crate::machine::MachineError;
use crate::moment::{Moment, MomentError, MomentName, MomentOptions};
use crate::store::log::{self, SnapshotLog};
use crate::store::{Capture, SnapshotError, Store, StoreWriter, Timeline};

/// A progress bar on standard error, if that is a terminal.
pub(super) fn spinner() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {msg}").expect("the template is constant");
    ProgressBar::new_spinner().with_style(style)
}

/// Brings a machine to a moment, with progress, and says which snapshots turned out damaged.
pub(super) fn open_moment(places: &PlaceArgs, name: &MomentName, options: MomentOptions) -> Result<Moment, Failure> {
    let bar = spinner();
    let options = MomentOptions { image: places.image.clone(), ..options };
    let moment = Moment::open(&places.runs, name, &options, &mut |icount: Icount| {
        bar.set_message(format!("going to {name}: icount {}", icount.0));
        bar.tick();
    });
    bar.finish_and_clear();
    let moment = moment.map_err(moment_failure)?;
    for error in &moment.damage {
        eprintln!("orrery: {error}; going on from an earlier moment");
    }
    Ok(moment)
}

/// The exit code of a moment that cannot be reached.
pub(super) fn moment_failure(error: MomentError) -> Failure {
    let code = match &error {
        MomentError::Name(_) => exit::USAGE,
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

/// The exit code of a store that cannot be used.
pub(super) fn store_failure(error: SnapshotError) -> Failure {
    let code = match &error {
        SnapshotError::Io { .. } | SnapshotError::Busy { .. } => exit::STORE,
        SnapshotError::NotAMoment(_) => exit::MOMENT,
        SnapshotError::Machine(_) => exit::HOST,
        _ => exit::DAMAGED,
    };
    Failure::new(code, error)
}

pub(super) fn snapshot(arguments: SnapshotCommandArgs) -> Result<u8, Failure> {
    let mut moment = open_moment(&arguments.places, &arguments.moment, MomentOptions::default())?;
    let runs = moment.run.path.parent().unwrap_or(Path::new(".")).to_owned();
    let line = moment.console.partial_line();
    let (base, mut timeline) = match moment.base.take() {
        Some((base, timeline)) => (Some(base), timeline),
        None => (None, Timeline::default()),
    };
    let written = || -> Result<_, SnapshotError> {
        let (capture, _) = Capture::take(&mut moment.machine, base.as_ref())?;
        let mut writer = StoreWriter::new(Store::open(&runs)?);
        let mut record = writer.write(&mut timeline, &capture, true)?;
        record.console_line = line;
        let mut list = log::read(&moment.run.path)?;
        match list.records.iter_mut().find(|other| other.icount == record.icount) {
            // An automatic one at the same moment becomes one that is kept.
            Some(other) => {
                *other = record.clone();
                log::replace(&moment.run.path, &list.records)?;
            }
            None => SnapshotLog::open(&moment.run.path)?.append(&record)?,
        }
        Ok(record)
    };
    let record = written().map_err(store_failure)?;
    if arguments.json {
        let pages: u64 = record.layers.iter().map(|layer| layer.pages).sum();
        say!(
            "{}",
            serde_json::json!({
                "run": moment.run.id(),
                "icount": record.icount,
                "virtual_ns": record.virtual_ns,
                "state_hash": record.state_hash,
                "pages": pages,
            })
        );
    } else {
        say!("{}@{} state {}", moment.run.id(), record.icount, record.state_hash);
    }
    Ok(0)
}
