//! Names of moments, and the machines that stand there.
#![allow(missing_docs)]

mod common;

use common::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_guest_image::Image;
use orrery_vmm::chain::Hash;
use orrery_vmm::moment::{Moment, MomentError, MomentName, MomentOptions};
use orrery_vmm::run::RunDirectory;
use orrery_vmm::run::manifest::{ImageReference, Outcome};
use orrery_vmm::run::recorder::{NoHost, Origin, Recorder, RecorderOptions};
use orrery_vmm::{Limits, Machine};
use std::path::Path;

/// Records a run of a guest in `directory`, its image beside it.
fn record(directory: &Path, image: &Image) -> (String, Outcome) {
    let path = image_file(directory, "guest.img", image);
    let machine = Machine::new(image, &small(), SEED, EngineConfig::default()).unwrap();
    let origin = Origin {
        image: ImageReference { path: path.display().to_string(), hash: Hash(image.hash()) },
        machine: small(),
        seed: SEED,
        branches: Vec::new(),
        replayed_inputs: None,
        host_cpu_vendor: String::new(),
    };
    let options = RecorderOptions { epoch_instructions: 1000, until: None, until_time: None, snapshots: None };
    let run = RunDirectory::create(&directory.join("runs"), "guest", 1).unwrap();
    let id = run.id().to_owned();
    let summary = Recorder::new(machine, origin, options, Some(run)).unwrap().run(&mut NoHost).unwrap();
    let outcome = Outcome {
        ended: summary.ended,
        icount: summary.icount,
        virtual_ns: summary.virtual_ns,
        state_hash: summary.state_hash,
        chain: summary.chain,
    };
    (id, outcome)
}

fn open(directory: &Path, name: &str) -> Result<Moment, MomentError> {
    let name: MomentName = name.parse().expect("a name of a moment");
    Moment::open(&directory.join("runs"), &name, &MomentOptions::default(), &mut |_| {})
}

#[test]
fn a_moment_is_exactly_there_and_has_the_runs_future() {
    let directory = tempfile::tempdir().unwrap();
    let image = busy(2000);
    let (id, outcome) = record(directory.path(), &image);
    let mut straight = Machine::new(&image, &small(), SEED, EngineConfig::default()).unwrap();
    for icount in [0, 1, 999, 1000, 5001, outcome.icount - 1] {
        let mut moment = open(directory.path(), &format!("{}@{icount}", &id[..7])).unwrap();
        straight.run(Limits::until(Icount(icount))).unwrap();
        assert_eq!(moment.icount(), Icount(icount));
        assert_eq!(moment.machine.state_hash(), straight.state_hash());
        moment.machine.run(Limits::NONE).unwrap();
        assert_eq!(moment.machine.state_hash(), outcome.state_hash);
    }
    let mut end = open(directory.path(), &id).unwrap();
    assert_eq!(end.machine.state_hash(), outcome.state_hash);
}

#[test]
fn what_cannot_be_opened_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let (id, outcome) = record(directory.path(), &busy(50));
    record(directory.path(), &busy(50));
    let error = |name: &str| open(directory.path(), name).err().expect("it cannot be opened");
    assert!(matches!(error("other@5"), MomentError::NoSuchRun { .. }));
    assert!(matches!(error("guest@5"), MomentError::Ambiguous { .. }));
    assert!(matches!(error("../runs@5"), MomentError::NoSuchRun { .. }));
    let late = format!("{id}@{}", outcome.icount + 1);
    assert!(matches!(error(&late), MomentError::BeyondEnd { end, .. } if end == outcome.icount));
    image_file(directory.path(), "guest.img", &busy(51));
    assert!(matches!(error(&id), MomentError::OtherImage { .. }));
    std::fs::remove_file(directory.path().join("guest.img")).unwrap();
    assert!(matches!(error(&id), MomentError::Image(_)));
}
