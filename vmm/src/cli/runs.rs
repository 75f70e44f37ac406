//! `orrery runs`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::args::RunsArgs;
use super::exit::Failure;
use crate::run::directory::{ConsoleLine, MANIFEST, read_console, read_manifest};
use crate::run::manifest::Manifest;
use crate::store::log;

/// What is shown of a run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RunLine {
    pub run: String,
    pub image: String,
    /// The seed that it had last.
    pub seed: u64,
    /// The run that it branched off, and where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub branched_at: Option<u64>,
    /// None for a run that goes on, or did not end in order.
    pub icount: Option<u64>,
    pub ended: String,
    pub snapshots: usize,
    pub last_line: String,
}

/// Directories of runs, by name.
pub(super) fn directories(runs: &Path, name: Option<&str>) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(runs).into_iter().flatten().flatten();
    let mut found: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .filter(|(id, path)| name.is_none_or(|name| id.starts_with(name)) && path.join(MANIFEST).is_file())
        .collect();
    found.sort();
    found
}

/// Describes a run; its manifest is None if that is damaged.
pub(super) fn describe(id: &str, path: &Path) -> (RunLine, Option<Manifest>) {
    let lines = read_console(path).unwrap_or_default();
    let last_line = lines.iter().rev().map(readable).find(|text| !text.is_empty());
    let snapshots = log::read(path).map_or(0, |list| list.records.len());
    let mut line = RunLine {
        run: id.to_owned(),
        image: String::new(),
        seed: 0,
        parent: None,
        branched_at: None,
        icount: None,
        ended: String::new(),
        snapshots,
        last_line: last_line.unwrap_or_default(),
    };
    let manifest = match read_manifest(path) {
        Ok(manifest) => manifest,
        Err(error) => {
            line.ended = error.to_string();
            return (line, None);
        }
    };
    line.image = manifest.image.path.clone();
    line.seed = manifest.last_seed();
    if let Some(point) = manifest.branches.last() {
        line.parent = Some(point.run.clone());
        line.branched_at = Some(point.icount);
    }
    match &manifest.outcome {
        Some(outcome) => {
            line.icount = Some(outcome.icount);
            line.ended = outcome.ended.to_string();
        }
        None => line.ended = "goes on, or did not end in order".into(),
    }
    (line, Some(manifest))
}

/// A line of the console log, short enough for a list.
pub(super) fn readable(line: &ConsoleLine) -> String {
    line.content().trim().chars().take(100).collect()
}

/// Says so where there are no runs: most often the directory is another one.
pub(super) fn note_none(count: usize, arguments: &RunsArgs) {
    if count == 0 {
        let such = arguments.name.as_ref().map_or(String::new(), |name| format!(" that begin with {name:?}"));
        eprintln!(
            "orrery: there are no runs{such} in {}; --runs names another directory",
            arguments.kept.runs.display()
        );
    }
}

pub(super) fn runs(arguments: &RunsArgs) -> Result<u8, Failure> {
    let found = directories(&arguments.kept.runs, arguments.name.as_deref());
    note_none(found.len(), arguments);
    for (id, path) in found {
        let (line, _) = describe(&id, &path);
        if arguments.json {
            say!("{}", serde_json::to_string(&line).expect("a line is plain data"));
            continue;
        }
        let icount = line.icount.map_or("?".to_owned(), |icount| icount.to_string());
        say!(
            "{:<24} seed {:<6} icount {:>14}  {:>3} snapshots  {}  {}",
            line.run,
            line.seed,
            icount,
            line.snapshots,
            line.ended,
            line.last_line
        );
    }
    Ok(0)
}
