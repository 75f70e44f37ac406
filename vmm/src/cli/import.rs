//! `orrery import`.

use super::args::ImportArgs;
use super::exit::Failure;
use super::export::archive_failure;
use crate::run::archive;

pub(super) fn import(arguments: &ImportArgs) -> Result<u8, Failure> {
    let place = &arguments.place;
    let run = archive::import(&arguments.file, &place.kept.runs, place.image.as_deref()).map_err(archive_failure)?;
    let vendor = crate::host::cpu_vendor();
    if run.host_cpu_vendor != vendor {
        eprintln!(
            "orrery: the run was made on a processor of {}, this one is of {vendor}: results that the architecture leaves \
             undefined may differ; `orrery diff` and the hash chain show whether they do",
            run.host_cpu_vendor
        );
    }
    if arguments.json {
        say!("{}", serde_json::json!({ "run": run.id, "image": run.image.path }));
    } else {
        say!("{}", run.id);
    }
    Ok(0)
}
