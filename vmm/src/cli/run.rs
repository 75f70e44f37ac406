//! `orrery run`.

use std::path::Path;

use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_devices::VirtualNs;
use orrery_guest_image::Image;

use super::args::{MachineArgs, RunArgs};
use super::console::Console;
use super::engine::WarmEngine;
use super::exit::{self, Failure};
use crate::chain::Hash;
use crate::config::Seed;
use crate::inputs;
use crate::machine::{Machine, MachineError};
use crate::run::RunDirectory;
use crate::run::manifest::{Ended, ImageReference};
use crate::run::recorder::{Origin, RecordError, Recorder, RecorderOptions, Summary};

pub(super) fn run(arguments: RunArgs) -> Result<u8, Failure> {
    let image = open_image(&arguments.image)?;
    let replayed = match &arguments.inputs {
        Some(path) => inputs::read(path).map_err(|e| Failure::new(exit::INPUTS, e))?,
        None => Vec::new(),
    };
    let seed = Seed(arguments.seed);
    let engine = WarmEngine::new(&arguments.engine, &image.hash())?;
    let mut machine = build_machine(&image, &arguments.machine, seed, engine.config.clone())?;
    machine.replay(replayed);
    let stem = arguments.image.file_stem().map_or("run".into(), |stem| stem.to_string_lossy().into_owned());
    let directory = RunDirectory::create(&arguments.kept.runs, &stem, arguments.seed)
        .map_err(|e| Failure::new(exit::STORE, format!("{e}; choose another directory with --runs")))?;
    let origin = Origin {
        image: ImageReference { path: absolute(&arguments.image), hash: Hash(image.hash()) },
        machine: arguments.machine.config(),
        seed,
        branches: Vec::new(),
        replayed_inputs: arguments.inputs.as_ref().map(|path| path.display().to_string()),
        host_cpu_vendor: crate::host::cpu_vendor(),
    };
    drop(image);
    let options = RecorderOptions {
        epoch_instructions: arguments.epoch,
        until: arguments.limit.until.map(Icount),
        until_time: arguments.limit.until_virtual.map(VirtualNs),
        snapshots: arguments.snapshots.options(),
    };
    let take_input = !arguments.no_input && arguments.inputs.is_none();
    let mut console = Console::connect(!arguments.quiet, take_input).map_err(|e| Failure::new(exit::HOST, e))?;
    let mut recorder = Recorder::new(machine, origin, options, Some(directory)).map_err(record_failure)?;
    let summary = recorder.run(&mut console);
    console.finish();
    drop(console);
    let summary = summary.map_err(record_failure)?;
    report(&summary, arguments.quiet, arguments.json);
    if arguments.engine.engine_statistics {
        eprintln!("{}", recorder.machine().engine_statistics());
    }
    Ok(exit::code_of(&summary.ended))
}

/// The path as it can be used from anywhere.
pub(super) fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

/// Opens an image, or says what to do.
pub(super) fn open_image(path: &Path) -> Result<Image, Failure> {
    Image::open(path).map_err(|e| Failure::new(exit::IMAGE, e))
}

/// Builds a machine, or says what to do.
pub(super) fn build_machine(
    image: &Image,
    machine: &MachineArgs,
    seed: Seed,
    engine: EngineConfig,
) -> Result<Machine, Failure> {
    Machine::new(image, &machine.config(), seed, engine).map_err(|error| {
        let code = match error {
            MachineError::Ram(_) | MachineError::Engine(_) => exit::HOST,
            MachineError::Config(_) | MachineError::Boot(_) | MachineError::Devices { .. } | MachineError::State(_) => {
                exit::MACHINE
            }
        };
        Failure::new(code, error)
    })
}

pub(super) fn record_failure(error: RecordError) -> Failure {
    match error {
        RecordError::Store(error) => {
            Failure::new(exit::STORE, format!("{error}; the run stopped, and its manifest does not call it complete"))
        }
        RecordError::Snapshots(error) => {
            let advice = "the run stopped, and its manifest does not call it complete; --no-snapshots needs no store";
            Failure::new(exit::STORE, format!("{error}; {advice}"))
        }
        RecordError::Inputs(error) => Failure::new(exit::INPUTS, error),
    }
}

pub(super) fn report(summary: &Summary, quiet: bool, json: bool) {
    if json {
        use std::io::Write;
        let text = serde_json::to_string(summary).expect("a summary is plain data");
        // A closed standard output has been noticed before; there is nobody left to tell.
        let _ = writeln!(std::io::stdout(), "{text}");
        return;
    }
    if let Ended::TripleFault { registers } = &summary.ended {
        eprintln!("orrery: triple fault at icount {}\n{registers}", summary.icount);
    }
    if quiet {
        return;
    }
    eprintln!(
        "orrery: {} | image {:.16} seed {} | icount {} virtual {:.6} s | state {} | {:.1} s on the host, {:.1} MIPS | {}",
        summary.ended,
        summary.image_hash.to_string(),
        summary.seed,
        summary.icount,
        summary.virtual_ns as f64 / 1e9,
        summary.state_hash,
        summary.host_seconds,
        summary.instructions_per_second / 1e6,
        summary.run.as_deref().unwrap_or("not recorded"),
    );
}
