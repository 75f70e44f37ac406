//! `orrery export`.

use super::args::ExportArgs;
use super::exit::{self, Failure};
use super::place::{find_run, moment_failure};
use crate::run::archive::{self, ArchiveError};

pub(super) fn export(arguments: &ExportArgs) -> Result<u8, Failure> {
    let run = find_run(&arguments.place.kept, &arguments.run)?;
    let image = match arguments.no_image {
        true => None,
        // Opening it makes sure that it is the run's own.
        false => {
            run.image(arguments.place.image.as_deref()).map_err(moment_failure)?;
            Some(run.image_path(arguments.place.image.as_deref()))
        }
    };
    archive::export(&run.path, image.as_deref(), &arguments.output).map_err(archive_failure)?;
    Ok(0)
}

pub(super) fn archive_failure(error: ArchiveError) -> Failure {
    let code = match &error {
        ArchiveError::Io { .. } | ArchiveError::Store(_) => exit::STORE,
        ArchiveError::Damaged { .. } | ArchiveError::Manifest { .. } => exit::DAMAGED,
        ArchiveError::Inputs(_) => exit::INPUTS,
        ArchiveError::Image(_) | ArchiveError::OtherImage { .. } => exit::IMAGE,
    };
    Failure::new(code, error)
}
