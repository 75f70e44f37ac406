//! The commands around snapshots: runs with automatic snapshots, moments, branches, trees, differences, the store.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use common::*;
use iced_x86::code_asm::*;
use orrery_guest_image::Image;
use predicates::str::contains;
use serde_json::Value;

/// Random numbers decide what it writes where, and what it prints; it prints now and then, some of it without an end
/// of line. About 40,000 instructions in 300 pages.
fn wanderer() -> Image {
    guest(|a| {
        let mut again = a.create_label();
        let mut quiet = a.create_label();
        a.mov(ebp, 3000).unwrap();
        a.set_label(&mut again).unwrap();
        a.rdrand(rcx).unwrap();
        a.mov(rdi, rcx).unwrap();
        a.and(edi, 0x0F_FFF8).unwrap();
        a.add(rdi, DATA as i32).unwrap();
        a.add(qword_ptr(rdi), rcx).unwrap();
        a.test(ebp, 127).unwrap();
        a.jne(quiet).unwrap();
        a.mov(eax, ecx).unwrap();
        a.and(eax, 15).unwrap();
        a.add(eax, i32::from(b'A')).unwrap();
        a.mov(dx, SERIAL).unwrap();
        a.out(dx, al).unwrap();
        a.test(ebp, 511).unwrap();
        a.jne(quiet).unwrap();
        a.mov(al, u32::from(b'\n')).unwrap();
        a.out(dx, al).unwrap();
        a.set_label(&mut quiet).unwrap();
        a.dec(ebp).unwrap();
        a.jne(again).unwrap();
        exit(a, 0);
    })
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        image_file(directory.path(), "guest.img", &wanderer());
        Place(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_orrery"));
        command.current_dir(self.path()).args(arguments);
        command
    }

    /// The last line of standard output, as JSON.
    fn json(&self, arguments: &[&str]) -> Value {
        self.all_json(arguments).pop().expect("there is a line")
    }

    fn all_json(&self, arguments: &[&str]) -> Vec<Value> {
        let output = self.command(arguments).output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {:?} {stdout} {stderr}", output.status);
        stdout.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Records a run with snapshots; its summary.
    fn record(&self, seed: &str, extra: &[&str]) -> Value {
        let plain = [
            "run",
            "guest.img",
            "--seed",
            seed,
            "--memory",
            "32",
            "--epoch",
            "5000",
            "--no-input",
            "--json",
            "--quiet",
        ];
        self.json(&[&plain[..], extra].concat())
    }

    fn read(&self, run: u32, file: &str) -> String {
        fs::read_to_string(self.path().join(format!("runs/guest-1-{run:03}/{file}"))).unwrap()
    }

    fn snapshots(&self, run: &str) -> usize {
        let line = self.all_json(&["runs", "--json", run]).pop().unwrap();
        line["snapshots"].as_u64().unwrap() as usize
    }
}

const SNAPSHOTS: [&str; 2] = ["--snapshot-every", "2000"];

#[test]
fn snapshots_change_nothing_and_make_branches_of_any_moment() {
    let place = Place::new();
    let plain = place.record("1", &["--no-snapshots"]);
    assert!(!place.path().join("runs/store").exists());
    let taken = place.record("1", &SNAPSHOTS);
    for field in ["state_hash", "icount", "chain"] {
        assert_eq!(plain[field], taken[field]);
    }
    assert_eq!(place.read(1, "console.log"), place.read(2, "console.log"));
    assert_eq!(place.read(1, "chain.jsonl"), place.read(2, "chain.jsonl"));
    assert!(place.snapshots("guest-1-002") >= 1);
    let end = taken["icount"].as_u64().unwrap();
    // Kept snapshots at moments in the middle of lines and elsewhere.
    for moment in [1, end / 3, end / 2 + 1, end - 1] {
        place.json(&["snapshot", &format!("guest-1-002@{moment}"), "--json"]);
    }
    place.command(&["store", "check"]).assert().success();
    // When there are more than wanted, some go.
    let thinned = place.record("4", &["--snapshot-every", "1", "--snapshot-most", "2"]);
    let listed = place.snapshots("guest-4-001");
    assert!((1..=2).contains(&listed), "{listed} snapshots of {thinned}");
    // A branch with the parent's seed is the parent's future, file by file: with snapshots and without.
    let mut number = 2;
    for parent in ["guest-1-001", "guest-1-002"] {
        for moment in [0, 1, 4999, 5000, 5001, end / 2 + 1, end / 2 + 700, end - 1] {
            let branch = place.json(&["branch", &format!("{parent}@{moment}"), "--json", "--quiet"]);
            number += 1;
            assert_eq!(branch["state_hash"], plain["state_hash"], "{parent}@{moment}");
            assert_eq!(branch["chain"], plain["chain"]);
            assert_eq!(place.read(number, "console.log"), place.read(1, "console.log"), "{parent}@{moment}");
            assert_eq!(place.read(number, "chain.jsonl"), place.read(1, "chain.jsonl"), "{parent}@{moment}");
        }
    }
}

#[test]
fn other_seeds_are_other_futures_which_repeat() {
    let place = Place::new();
    let parent = place.record("1", &SNAPSHOTS);
    let half = format!("guest-1-001@{}", parent["icount"].as_u64().unwrap() / 2);
    let branches = |jobs: &str| {
        let found =
            place.all_json(&["branch", &half, "--seed", "50", "--count", "8", "--jobs", jobs, "--json", "--quiet"]);
        let mut found: Vec<_> = found.iter().map(|line| (line["run"].to_string(), line["chain"].to_string())).collect();
        found.sort();
        found.into_iter().map(|(_, chain)| chain).collect::<Vec<String>>()
    };
    let first = branches("2");
    assert_eq!(first.len(), 8);
    let parent_chain = parent["chain"].to_string();
    for (index, chain) in first.iter().enumerate() {
        assert!(!first[..index].contains(chain) && *chain != parent_chain);
    }
    assert_eq!(branches("1"), first);
    // A branch of a branch, with and without the snapshots behind it.
    let child = place.json(&["branch", "guest-52-001@end", "--until", "1", "--json", "--quiet"]);
    assert_eq!(child["ended"]["kind"], "power-off");
    let later = parent["icount"].as_u64().unwrap() / 2 + 3000;
    let name = format!("guest-52-001@{later}");
    let again = place.json(&["branch", &name, "--json", "--quiet"]);
    assert_eq!(again["chain"].to_string(), first[2]);
    fs::remove_dir_all(place.path().join("runs/store")).unwrap();
    let again = place.json(&["branch", &name, "--json", "--quiet"]);
    assert_eq!(again["chain"].to_string(), first[2], "from the manifest alone");
    place.command(&["tree"]).assert().success().stdout(contains("`- @").and(contains("powered off")));
    place.command(&["diff", "guest-1-001", "guest-50-001"]).assert().code(232).stdout(contains("rdrand"));
    place.command(&["diff", "guest-50-001", "guest-50-002"]).assert().code(0);
}

use predicates::prelude::PredicateBooleanExt;

#[test]
fn a_damaged_store_costs_time_only() {
    let place = Place::new();
    let parent = place.record("1", &SNAPSHOTS);
    let middle = parent["icount"].as_u64().unwrap() / 2;
    place.json(&["snapshot", &format!("guest-1-001@{middle}"), "--json"]);
    let pack = fs::read_dir(place.path().join("runs/store/packs")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&pack).unwrap();
    for at in (100..bytes.len()).step_by(1000) {
        bytes[at] ^= 4;
    }
    fs::write(&pack, bytes).unwrap();
    let report = place.command(&["store", "check", "--json"]).output().unwrap();
    assert_eq!(report.status.code(), Some(234));
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert!(!report["lost"].as_array().unwrap().is_empty());
    let branch = ["branch", &format!("guest-1-001@{}", middle + 5), "--json", "--quiet"];
    place.command(&branch).assert().success().stderr(contains("going on from an earlier moment"));
    let removed = place.json(&["store", "gc", "--json"]);
    assert!(!removed["damaged"].as_array().unwrap().is_empty());
    place.command(&["store", "check"]).assert().success();
    assert_eq!(place.json(&branch)["chain"], parent["chain"]);
}

#[test]
fn gc_keeps_what_is_needed_and_no_more() {
    let place = Place::new();
    place.record("1", &SNAPSHOTS);
    let parent = place.record("2", &SNAPSHOTS);
    let middle = parent["icount"].as_u64().unwrap() / 2;
    let moment = format!("guest-2-001@{middle}");
    place.json(&["snapshot", &moment, "--json"]);
    fs::remove_dir_all(place.path().join("runs/guest-1-001")).unwrap();
    let dry = place.json(&["store", "gc", "--dry-run", "--max-size", "0", "--json"]);
    let before = dry["bytes_before"].as_u64().unwrap();
    assert!(dry["bytes_after"].as_u64().unwrap() < before);
    assert_eq!(place.json(&["store", "check", "--json"])["bytes"].as_u64(), Some(before), "nothing was removed");
    let done = place.json(&["store", "gc", "--max-size", "0", "--json"]);
    assert!(done["bytes_after"].as_u64().unwrap() < before);
    let check = place.json(&["store", "check", "--json"]);
    assert_eq!(check["snapshots"].as_u64(), Some(1), "the one that was asked for");
    let branch = place.json(&["branch", &moment, "--json", "--quiet"]);
    assert_eq!(branch["chain"], parent["chain"]);
}

#[test]
fn an_exported_run_replays_elsewhere() {
    let place = Place::new();
    let parent = place.record("1", &SNAPSHOTS);
    let middle = parent["icount"].as_u64().unwrap() / 2;
    let child = place.json(&["branch", &format!("guest-1@{middle}"), "--seed", "9", "--json", "--quiet"]);
    place.command(&["export", "guest-9-001", "-o", "run.orrery"]).assert().success();
    let other = tempfile::tempdir().unwrap();
    let file = place.path().join("run.orrery");
    let at = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_orrery"));
        command.current_dir(other.path()).args(arguments);
        command
    };
    let import = ["import", file.to_str().unwrap()];
    at(&import).assert().success().stdout(contains("guest-9-001"));
    let moment = format!("guest-9-001@{}", middle + 1000);
    let output = at(&["branch", &moment, "--json", "--quiet"]).output().unwrap();
    let again: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(again["chain"], child["chain"]);
    // Anything that is not what was exported is refused, and leaves nothing behind.
    let whole = fs::read(&file).unwrap();
    for at_byte in [0, 20, whole.len() / 2, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at_byte] ^= 1;
        fs::write(&file, &bytes).unwrap();
        at(&import).assert().code(234);
        fs::write(&file, &whole[..at_byte]).unwrap();
        at(&import).assert().code(234);
    }
    let entries = fs::read_dir(other.path().join("runs")).unwrap();
    let names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.starts_with(".import")), "{names:?}");
    assert_eq!(names.iter().filter(|name| name.starts_with("guest-")).count(), 2, "{names:?}");
}

/// kill -9 while snapshots are written: whatever was acknowledged is whole. ORRERY_KILLS says how often.
#[test]
fn killed_runs_lose_nothing_that_was_acknowledged() {
    let place = Place::new();
    let endless = guest(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.rdrand(rcx).unwrap();
        a.mov(rdi, rcx).unwrap();
        a.and(edi, 0x0F_FFF8).unwrap();
        a.add(rdi, DATA as i32).unwrap();
        a.add(qword_ptr(rdi), rcx).unwrap();
        a.jmp(again).unwrap();
    });
    image_file(place.path(), "guest.img", &endless);
    let kills = std::env::var("ORRERY_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(6u64);
    let mut acknowledged = 0;
    for kill in 0..kills {
        let arguments = ["run", "guest.img", "--seed", "1", "--memory", "32", "--no-input", "--quiet"];
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_orrery"))
            .current_dir(place.path())
            .args(arguments)
            .args(["--snapshot-every", "50000", "--snapshot-most", "1000"])
            .spawn()
            .unwrap();
        let nap = 150 + u64::from(blake3::hash(&kill.to_le_bytes()).as_bytes()[0]) * 2;
        // The first one lives until it has a snapshot, however slow the host is.
        if kill == 0 {
            wait_for_snapshots(&place.path().join("runs/guest-1-001/snapshots.jsonl"), 1);
        }
        std::thread::sleep(std::time::Duration::from_millis(nap));
        child.kill().unwrap();
        child.wait().unwrap();
        let report = place.json(&["store", "check", "--json"]);
        assert!(report["lost"].as_array().unwrap().is_empty(), "{report}");
        let whole = report["snapshots"].as_u64().unwrap();
        assert!(whole >= acknowledged, "{whole} of {acknowledged}");
        acknowledged = whole;
    }
    assert!(acknowledged > 0, "no run lived long enough to take a snapshot");
    // The last moment of the last run that has one can be stood at, and gone on from.
    let runs = place.all_json(&["runs", "--json"]);
    let run = runs.iter().rev().find(|run| run["snapshots"].as_u64() > Some(0)).unwrap()["run"].as_str().unwrap();
    let list = fs::read_to_string(place.path().join("runs").join(run).join("snapshots.jsonl")).unwrap();
    let line = list.lines().last().unwrap();
    let last: Value = serde_json::from_str(&line[..line.rfind(' ').unwrap()]).unwrap();
    let icount = last["icount"].as_u64().unwrap();
    let moment = format!("{run}@{icount}");
    let again = place.json(&["snapshot", &moment, "--json"]);
    assert_eq!(again["state_hash"], last["state_hash"]);
}

#[test]
fn what_does_not_exist_has_its_code() {
    let place = Place::new();
    let parent = place.record("1", &[]);
    let late = format!("guest@{}", parent["icount"].as_u64().unwrap() + 1);
    place.command(&["snapshot", &late]).assert().code(233).stderr(contains("ends at"));
    place.command(&["snapshot", "nobody@1"]).assert().code(233);
    place.command(&["snapshot", "guest@x"]).assert().code(220);
    place.command(&["branch", "guest@1", "--inputs", "none"]).assert().code(224);
    place.command(&["export", "nobody", "-o", "x"]).assert().code(233);
    fs::write(place.path().join("guest.img"), "changed").unwrap();
    place.command(&["snapshot", "guest@5"]).assert().code(221);
}

#[test]
fn inputs_go_on_in_branches_or_are_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let echo = guest(|a| {
        let mut again = a.create_label();
        let mut done = a.create_label();
        a.mov(dx, SERIAL + 4).unwrap();
        a.mov(al, 3).unwrap();
        a.out(dx, al).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dx, SERIAL + 5).unwrap();
        a.in_(al, dx).unwrap();
        a.test(al, 1).unwrap();
        a.je(again).unwrap();
        a.mov(dx, SERIAL).unwrap();
        a.in_(al, dx).unwrap();
        a.cmp(al, i32::from(b'q')).unwrap();
        a.je(done).unwrap();
        a.out(dx, al).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut done).unwrap();
        exit(a, 0);
    });
    image_file(directory.path(), "guest.img", &echo);
    let place = Place(directory);
    let run = ["run", "guest.img", "--seed", "1", "--memory", "32", "--json", "--quiet", "--snapshot-every", "1000"];
    let output = place.command(&run).write_stdin("some text\nq").output().unwrap();
    let parent: Value = serde_json::from_slice(&output.stdout).unwrap();
    let log = place.read(1, "inputs.jsonl");
    let entered = serde_json::from_str::<Value>(log.lines().nth(1).unwrap()).unwrap()["icount"].as_u64().unwrap();
    for moment in [0, entered, entered + 1, entered + 30] {
        let same = place.json(&["branch", &format!("guest-1-001@{moment}"), "--json", "--quiet"]);
        assert_eq!(same["chain"], parent["chain"], "at {moment}");
        place.json(&["branch", &format!("guest-1-001@{moment}"), "--seed", "3", "--json", "--quiet"]);
    }
    let other = log.replace("736f6d65", "4f4f4f4f");
    fs::write(place.path().join("other.jsonl"), other).unwrap();
    let start = format!("guest-1-001@{}", entered / 2);
    place.command(&["branch", &start, "--inputs", "other.jsonl"]).assert().code(0).stdout(contains("OOOO text"));
    place.command(&["branch", "guest-1-001@end", "--inputs", "other.jsonl"]).assert().code(224);
}
