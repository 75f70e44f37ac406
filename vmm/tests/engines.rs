//! Every engine computes the same: hash chains of a guest with user code, whose calls to KVM fail one by one as well.
//! Without a usable /dev/kvm only what happens then is tested.
#![allow(missing_docs)]

mod common;

use std::path::Path;

use assert_cmd::Command;
use common::user::{has_kvm, user};
use common::*;
use predicates::str::contains;
use serde_json::Value;

fn run(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("orrery").unwrap();
    command.current_dir(directory).env("XDG_CACHE_HOME", directory);
    command.args(["run", "guest.img", "--memory", "32", "--epoch", "3000000", "--json"]).args(arguments);
    command
}

/// Chain and output of a run.
fn result(directory: &Path, arguments: &[&str]) -> (String, String) {
    let output = run(directory, arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{arguments:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
    let (console, report) = text.trim_end().rsplit_once('\n').unwrap_or(("", text.trim_end()));
    // The guest's letter may stand in front of the report.
    let at = report.find('{').unwrap();
    let value: Value = serde_json::from_str(&report[at..]).unwrap();
    (value["chain"].as_str().unwrap().to_owned(), format!("{console}{}", &report[..at]))
}

#[test]
fn every_engine_has_the_same_hash_chain() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", &user(40));
    for seed in ["1", "2", "3"] {
        let soft = result(directory.path(), &["--seed", seed, "--engine", "soft"]);
        for engine in ["kvm", "auto", "random"] {
            let other = result(directory.path(), &["--seed", seed, "--engine", engine]);
            assert_eq!(soft, other, "{engine} with seed {seed}");
        }
        let chaos = result(directory.path(), &["--seed", seed, "--engine", "kvm", "--engine-chaos", seed]);
        assert_eq!(soft, chaos, "kvm in chaos with seed {seed}");
        // Code is forgotten all the time.
        let cleared = result(directory.path(), &["--seed", seed, "--engine", "kvm", "--engine-cache", "1"]);
        assert_eq!(soft, cleared, "kvm with little room with seed {seed}");
    }
}

#[test]
fn snapshots_are_the_same_in_every_engine() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", &user(40));
    let soft = result(directory.path(), &["--seed", "1", "--engine", "soft", "--no-snapshots"]);
    let kvm = result(directory.path(), &["--seed", "1", "--engine", "kvm", "--snapshot-every", "2000000"]);
    assert_eq!(soft, kvm);
}

#[test]
fn a_call_to_kvm_that_fails_is_told_or_makes_no_difference() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", &user(40));
    let soft = result(directory.path(), &["--seed", "1", "--engine", "soft"]);
    let (mut told, mut software) = (0, 0);
    for call in 0..60 {
        let call = call.to_string();
        let arguments = ["--seed", "1", "--engine", "kvm", "--engine-kvm-fails", &call];
        let output = run(directory.path(), &arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        let times = errors.matches("went on in software: ").count();
        if output.status.success() {
            assert_eq!(soft, result(directory.path(), &arguments), "call {call}");
            assert!(times == usize::from(errors.contains("made to fail")), "call {call}: {errors}");
            software += times;
        } else {
            // The guest's registers were lost with it.
            assert_eq!(output.status.code(), Some(226), "call {call}");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("KVM_GET_XSAVE"), "call {call}: {text}");
            told += 1;
        }
    }
    assert!(told > 0, "KVM_GET_XSAVE is among the calls");
    assert!(software > 10, "the failure of {software} calls was told");
}

#[test]
fn without_kvm_the_engine_says_so() {
    if has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", &user(40));
    run(directory.path(), &["--seed", "1", "--engine", "kvm"]).assert().code(231).stderr(contains("--engine soft"));
    run(directory.path(), &["--seed", "1", "--engine", "auto"]).assert().success().stderr(contains("runs in software"));
}
