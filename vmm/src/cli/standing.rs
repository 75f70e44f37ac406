//! `RUN@ICOUNT` on the command line: the machine of that run, standing exactly there.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_guest_image::Image;

use super::args::MomentArgs;
use super::exit::{self, Failure};
use crate::chain::Hash;
use crate::config::Seed;
use crate::inputs;
use crate::machine::{Limits, Machine, Pause};
use crate::run::directory::{INPUTS, read_manifest};
use crate::run::manifest::Manifest;

/// Instructions between two looks at the progress bar.
const SLICE_INSTRUCTIONS: u64 = 1 << 24;

/// A run that is opened again, at its power-on.
pub(super) struct Opened {
    #[allow(dead_code)]
    pub manifest: Manifest,
    pub machine: Machine,
}

/// Finds a run by its name or by a part of it that begins only one name.
fn find_run(runs: &Path, name: &str) -> Result<PathBuf, Failure> {
    let direct = runs.join(name);
    if direct.is_dir() {
        return Ok(direct);
    }
    let names = std::fs::read_dir(runs)
        .map_err(|error| Failure::new(exit::STORE, format!("cannot read {}: {error}; give --runs", runs.display())))?;
    let mut found: Vec<PathBuf> = names
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)) && path.is_dir())
        .collect();
    found.sort();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(Failure::new(exit::STORE, format!("there is no run {name} in {}", runs.display()))),
        count => Err(Failure::new(exit::STORE, format!("{name} begins the names of {count} runs; give more of it"))),
    }
}

/// Splits `RUN@ICOUNT`.
fn split(text: &str) -> Result<(&str, u64), Failure> {
    let wrong =
        || Failure::new(exit::USAGE, format!("{text} is not a moment; write RUN@ICOUNT, such as hello-1-001@1000000"));
    let (run, icount) = text.rsplit_once('@').ok_or_else(wrong)?;
    let icount = icount.replace('_', "").parse().map_err(|_| wrong())?;
    Ok((run, icount)).and_then(|found| if run.is_empty() { Err(wrong()) } else { Ok(found) })
}

/// Opens a run at power-on.
pub(super) fn open_run(runs: &Path, name: &str) -> Result<Opened, Failure> {
    let directory = find_run(runs, name)?;
    let manifest = read_manifest(&directory).map_err(|error| Failure::new(exit::STORE, error))?;
    let image = Image::open(&manifest.image.path).map_err(|error| Failure::new(exit::IMAGE, error))?;
    if Hash(image.hash()) != manifest.image.hash {
        let text = format!(
            "{} is not the image of run {}: its hash is {}, the run's image had {}",
            manifest.image.path,
            manifest.id,
            Hash(image.hash()),
            manifest.image.hash
        );
        return Err(Failure::new(exit::IMAGE, text));
    }
    let log = inputs::read(&directory.join(INPUTS)).map_err(|error| Failure::new(exit::INPUTS, error))?;
    let mut machine = Machine::new(&image, &manifest.machine, Seed(manifest.seed), EngineConfig::default())
        .map_err(|error| Failure::new(exit::HOST, error))?;
    machine.replay(log);
    Ok(Opened { manifest, machine })
}

/// Runs to an icount exactly, with a progress bar.
pub(super) fn run_to(machine: &mut Machine, icount: u64) -> Result<(), Failure> {
    let bar = bar(icount);
    while machine.icount().0 < icount {
        let next = machine.icount().0.saturating_add(SLICE_INSTRUCTIONS).min(icount);
        let pause = machine.run(Limits::until(Icount(next))).map_err(|error| Failure::new(exit::INPUTS, error))?;
        machine.take_output();
        if let Pause::Ended(ended) = pause {
            bar.finish_and_clear();
            let text = format!("the run ended at icount {}, before {icount}: {ended}", machine.icount().0);
            return Err(Failure::new(exit::STORE, text));
        }
        bar.set_position(machine.icount().0);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Opens the machine at the moment asked for.
pub(super) fn open(arguments: &MomentArgs) -> Result<Machine, Failure> {
    let (run, icount) = split(&arguments.moment)?;
    let mut opened = open_run(&arguments.runs, run)?;
    run_to(&mut opened.machine, icount)?;
    Ok(opened.machine)
}

fn bar(length: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} icount {pos} of {len}, {eta} left");
    ProgressBar::new(length).with_style(style.expect("the template is constant"))
}
