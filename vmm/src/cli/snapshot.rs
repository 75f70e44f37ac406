//! `orrery snapshot`.

use std::path::Path;

use super::args::SnapshotCommandArgs;
use super::exit::{self, Failure};
use super::place;
use crate::store::log::{self, SnapshotLog};
use crate::store::{Capture, SnapshotError, Store, StoreWriter, Timeline};

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
    let (_place, mut moment) = place::open(&arguments.at)?;
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
