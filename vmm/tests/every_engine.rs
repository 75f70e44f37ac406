//! Branches, going back, saving, replay and the debugger give the same in every engine, and so do machines that are
//! disturbed, killed, or run out of memory.
#![allow(missing_docs)]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::user::{has_kvm, user};
use common::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::{EngineConfig, EngineKind};
use orrery_guest_image::Image;
use orrery_vmm::chain::Hash;
use orrery_vmm::debug::{Direction, Session, StopReason, Subject, Wanted, WatchKind, Watched};
use orrery_vmm::moment::{MomentOptions, RunReference};
use orrery_vmm::perturb::{Course, Plan};
use orrery_vmm::verify::{Sample, Sampler, Until};
use orrery_vmm::{Limits, Machine, Pause, Seed};
use serde_json::Value;

const OTHERS: [EngineKind; 3] = [EngineKind::Kvm, EngineKind::Auto, EngineKind::Random];

fn config(engine: EngineKind) -> EngineConfig {
    EngineConfig { engine, ..Default::default() }
}

fn machine(image: &Image, engine: EngineKind) -> Machine {
    Machine::new(image, &small(), SEED, config(engine)).unwrap()
}

/// Hash of the state at that icount, or at the guest's end before it.
fn hash_at(machine: &mut Machine, icount: u64) -> Hash {
    let pause = machine.run(Limits::until(Icount(icount))).unwrap();
    assert!(matches!(pause, Pause::Limit | Pause::Ended(_)), "{pause:?}");
    machine.state_hash()
}

/// States of a family of branches, and how often one of them was in a virtual machine.
fn family(image: &Image, engine: EngineKind) -> (Vec<Hash>, u64) {
    let mut parent = machine(image, engine);
    let mut hashes = vec![hash_at(&mut parent, 1_234_567)];
    let template = parent.freeze().unwrap();
    let mut visits = 0;
    for seed in [SEED, Seed(9), SEED] {
        // From the second one on in the place of the one before.
        let mut child = template.branch(seed, None).unwrap();
        hashes.push(hash_at(&mut child, 2_500_001));
        let mut grandchild = child.freeze().unwrap().branch(Seed(10), None).unwrap();
        hashes.push(hash_at(&mut grandchild, 3_700_003));
        child.reset().unwrap();
        hashes.push(child.state_hash());
        hashes.push(hash_at(&mut child, u64::MAX));
        visits += child.engine_statistics().kvm_visits;
    }
    hashes.push(hash_at(&mut parent, u64::MAX));
    (hashes, visits)
}

#[test]
fn branches_are_the_same_in_every_engine() {
    if !has_kvm() {
        return;
    }
    let image = user(12);
    let (expected, none) = family(&image, EngineKind::Soft);
    assert_eq!(none, 0);
    for engine in OTHERS {
        let (found, visits) = family(&image, engine);
        assert_eq!(found, expected, "{engine:?}");
        assert!(visits > 0 || engine == EngineKind::Auto, "{engine:?} was in a virtual machine");
    }
}

#[test]
fn a_state_moves_between_engines() {
    if !has_kvm() {
        return;
    }
    let image = user(12);
    let moments = [900_001, 1_700_017, 2_600_000, 4_000_123];
    let mut straight = machine(&image, EngineKind::Soft);
    let expected = moments.map(|moment| hash_at(&mut straight, moment));
    for first in OTHERS {
        let mut moving = machine(&image, first);
        for (index, moment) in moments.into_iter().enumerate() {
            assert_eq!(hash_at(&mut moving, moment), expected[index], "{first:?} first, {moment}");
            let next = [EngineKind::Soft, EngineKind::Kvm, EngineKind::Random][index % 3];
            if index % 2 == 0 {
                moving = Machine::restore(&image, &moving.save(), config(next)).unwrap();
            } else {
                moving.change_engine(config(next)).unwrap();
            }
        }
    }
}

fn samples(course: impl Into<Course>) -> Vec<Sample> {
    let until = Until { icount: Some(Icount(1_500_000)), time: None };
    let mut sampler = Sampler::new(course, 100_003, until);
    std::iter::from_fn(|| sampler.next_sample().unwrap()).collect()
}

#[test]
fn disturbed_machines_are_the_same_with_virtual_machines() {
    if !has_kvm() {
        return;
    }
    let image = user(8);
    let expected = samples(machine(&image, EngineKind::Soft));
    for seed in 0..4 {
        let plan = Plan::new(seed, &config(EngineKind::Kvm)).with_stage_ns((16, 23));
        let course = Course::perturbed(&image, machine(&image, EngineKind::Kvm), Vec::new(), plan);
        assert_eq!(samples(course), expected, "plan {seed}");
    }
}

fn orrery(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orrery"));
    command.current_dir(directory).env("XDG_CACHE_HOME", directory).stdin(Stdio::null());
    command
}

fn record(directory: &Path, engine: &str) -> Command {
    let mut command = orrery(directory);
    command.args([
        "run",
        "guest.img",
        "--seed",
        "1",
        "--memory",
        "32",
        "--epoch",
        "1000000",
        "--json",
        "--quiet",
        "--engine",
        engine,
    ]);
    command.args(["--runs", "runs", "--snapshot-every", "1000000"]);
    command
}

/// What a debugger finds: hashes at some moments, writes to a variable forwards and backwards, steps.
fn debugged(run: &RunReference, engine: EngineKind) -> Vec<(u64, String)> {
    let subject = Subject::open(run.clone(), MomentOptions { engine: config(engine), ..Default::default() }).unwrap();
    let mut session = Session::open(subject, 1_000_000, &mut |_| false).unwrap();
    let mut found = Vec::new();
    for icount in [3_000_001, 1_500_000, 2_222_222, 700_000] {
        session.go_to(icount, &mut |_| false).unwrap();
        found.push((icount, session.state_hash().to_string()));
    }
    let watched = vec![Watched::linear(session.machine(), DATA + 0x1238, 8, WatchKind::Write)];
    let wanted = Wanted { watched, ..Wanted::default() };
    for direction in [Direction::Forward, Direction::Forward, Direction::Backward] {
        let reason = session.resume(direction, &wanted, &mut |_| false).unwrap();
        assert!(matches!(reason, StopReason::Event(_)), "{reason:?}");
        found.push((session.position().icount, format!("{:?} {:x}", reason, session.machine().cpu().rip)));
    }
    for _ in 0..20 {
        session.step_back(&mut |_| false).unwrap();
        found.push((session.position().icount, format!("{:x}", session.machine().cpu().rip)));
    }
    found.push((session.position().icount, session.state_hash().to_string()));
    found
}

#[test]
fn replay_and_the_debugger_are_the_same_in_every_engine() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", &user(8));
    assert!(record(directory.path(), "kvm").output().unwrap().status.success());
    let run = RunReference::find(&directory.path().join("runs"), "guest").unwrap();
    let expected = debugged(&run, EngineKind::Soft);
    for engine in OTHERS {
        assert_eq!(debugged(&run, engine), expected, "{engine:?}");
    }
}

/// Last link of the chain that a run reports.
fn chain(output: &Output) -> Option<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    let value: Value = serde_json::from_str(&text[text.find('{')?..]).ok()?;
    value["chain"].as_str().map(str::to_owned)
}

#[test]
fn a_run_without_enough_memory_says_so_or_is_the_same() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", &user(4));
    let expected = chain(&record(directory.path(), "soft").output().unwrap());
    assert!(expected.is_some());
    let (mut same, mut refused) = (0, 0);
    for mib in (8..40).map(|step| step * 64) {
        let mut limited = Command::new("sh");
        let limit = format!("ulimit -v {} && exec \"$@\"", mib << 10);
        let run = record(directory.path(), "kvm");
        limited.args(["-c", &limit, "sh"]).arg(run.get_program()).args(run.get_args());
        let output = limited.current_dir(directory.path()).env("XDG_CACHE_HOME", directory.path()).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!errors.contains("panicked"), "{mib} MiB: {errors}");
        if output.status.success() {
            assert_eq!(chain(&output), expected, "{mib} MiB");
            same += 1;
        } else {
            assert_eq!(output.status.code(), Some(231), "{mib} MiB: {errors}");
            assert!(errors.starts_with("orrery: "), "{mib} MiB: {errors}");
            refused += 1;
        }
    }
    assert!(same > 0 && refused > 0, "{same} runs and {refused} refusals");
}

#[test]
fn one_mapping_that_fails_is_told_or_makes_no_difference() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", &user(4));
    let library = directory.path().join("mmap.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/mmap.c");
    // What links Rust programs compiles C.
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", source, "-o"]).arg(&library).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let expected = chain(&record(directory.path(), "soft").output().unwrap());
    assert!(expected.is_some());
    let (mut software, mut refused) = (0, 0);
    for call in 0.. {
        let mut run = record(directory.path(), "kvm");
        let output = run.env("LD_PRELOAD", &library).env("MMAP_FAILS", call.to_string()).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            assert_eq!(chain(&output), expected, "call {call}: {errors}");
            software += errors.matches("went on in software").count();
        } else {
            assert_eq!(output.status.code(), Some(231), "call {call}: {errors}");
            assert!(errors.lines().any(|line| line.starts_with("orrery: ")), "call {call}: {errors}");
            assert!(!errors.contains("panicked"), "call {call}: {errors}");
            refused += 1;
        }
        if !errors.contains("made to fail") {
            break;
        }
    }
    assert!(software > 0 && refused > 0, "{software} runs went on in software and {refused} were refused");
}

/// Icounts of the run's snapshots.
fn snapshots(run: &RunReference) -> Vec<u64> {
    let text = std::fs::read_to_string(run.path.join("snapshots.jsonl")).unwrap_or_default();
    let lines = text.split_inclusive('\n').skip(1).filter(|line| line.ends_with('\n'));
    lines
        .map(|line| {
            serde_json::from_str::<Value>(line.rsplit_once(' ').unwrap().0).unwrap()["icount"].as_u64().unwrap()
        })
        .collect()
}

#[test]
fn what_a_killed_run_has_left_is_right_in_every_engine() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    // It does not end by itself while a test can wait.
    let image = user(u32::MAX);
    image_file(directory.path(), "guest.img", &image);
    for round in 0..8 {
        let mut run = record(directory.path(), "kvm").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let list = directory.path().join(format!("runs/guest-1-{:03}/snapshots.jsonl", round + 1));
        wait_for_snapshots(&list, 1 + round);
        run.kill().unwrap();
        assert_eq!(run.wait().unwrap().signal(), Some(9));
    }
    let check = orrery(directory.path()).args(["store", "check", "--runs", "runs"]).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    let mut straight = machine(&image, EngineKind::Soft);
    let runs = directory.path().join("runs");
    let names = std::fs::read_dir(&runs).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut moments = Vec::new();
    for name in names.filter(|name| name.starts_with("guest-")) {
        let run = RunReference::find(&runs, &name).unwrap();
        moments.extend(snapshots(&run).into_iter().map(|at| (at, run.clone())));
    }
    moments.sort_by_key(|(at, _)| *at);
    assert!(moments.len() > 4, "{} snapshots", moments.len());
    for (at, run) in moments {
        let expected = hash_at(&mut straight, at + 5_000);
        for engine in [EngineKind::Soft, EngineKind::Kvm] {
            let subject = MomentOptions { engine: config(engine), ..Default::default() };
            let mut session = Session::open(Subject::open(run.clone(), subject).unwrap(), at, &mut |_| false).unwrap();
            session.go_to(at + 5_000, &mut |_| false).unwrap();
            assert_eq!(session.state_hash(), expected, "{at} in {engine:?}");
        }
    }
}
