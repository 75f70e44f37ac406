//! The `orrery` command: output, exit codes, run directories, and every kind of bad input.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use common::*;
use orrery_vmm::run::directory::read_manifest;
use orrery_vmm::run::manifest::{Ended, Outcome};
use predicates::prelude::*;
use predicates::str::contains;

fn orrery() -> Command {
    let mut command = Command::cargo_bin("orrery").expect("the command is built");
    command.env_remove("ORRERY_RUNS").timeout(std::time::Duration::from_secs(120));
    command
}

/// A command that runs `guest.img` in a fresh directory with seed 1.
fn run(directory: &Path) -> Command {
    let mut command = orrery();
    command.current_dir(directory).args(["run", "guest.img", "--seed", "1", "--memory", "32"]);
    command
}

fn with_guest(image: &orrery_guest_image::Image) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", image);
    directory
}

fn hello() -> orrery_guest_image::Image {
    guest(|a| {
        print(a, "hello\n");
        exit(a, 3);
    })
}

#[test]
fn console_on_stdout_summary_on_stderr_and_the_guests_code() {
    let directory = with_guest(&hello());
    run(directory.path())
        .assert()
        .code(3)
        .stdout("hello\n")
        .stderr(contains("powered off with code 3").and(contains("seed 1")));
    let manifest = read_manifest(&directory.path().join("runs/guest-1-001")).unwrap();
    assert_eq!(manifest.outcome.unwrap().ended, Ended::PowerOff { code: 3 });
    let console = fs::read_to_string(directory.path().join("runs/guest-1-001/console.log")).unwrap();
    assert_eq!(console, "2 2 hello\\n\n");
}

#[test]
fn json_is_the_last_line_of_stdout() {
    let directory = with_guest(&hello());
    let output = run(directory.path()).arg("--json").output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let summary: serde_json::Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(summary["ended"]["kind"], "power-off");
    assert_eq!(summary["ended"]["code"], 3);
    assert_eq!(summary["icount"], 16);
    assert!(stdout.starts_with("hello\n"));
    run(directory.path()).args(["--json", "--quiet"]).assert().code(3).stdout(contains("hello").not());
}

#[test]
fn until_stops_exactly() {
    let directory = with_guest(&busy(100_000));
    let at = |until: &str| {
        let output = run(directory.path()).args(["--until", until, "--json"]).output().unwrap();
        assert!(output.status.success());
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let first = at("12345");
    assert_eq!(first["icount"], 12345);
    assert_eq!(first["ended"]["kind"], "limit");
    assert_eq!(first["state_hash"], at("12345")["state_hash"]);
    assert_ne!(first["state_hash"], at("12346")["state_hash"]);
    run(directory.path()).args(["--until-virtual", "10us", "--json"]).assert().success().stdout(contains("10000"));
}

#[test]
fn how_a_run_ends_has_its_own_code() {
    let cases: [(u8, &str, orrery_guest_image::Image); 4] = [
        (225, "triple fault", guest(|a| a.ud2().unwrap())),
        (228, "interrupts off", guest(|a| a.hlt().unwrap())),
        (
            229,
            "nothing left to wake it",
            guest(|a| {
                a.sti().unwrap();
                a.hlt().unwrap();
            }),
        ),
        (
            227,
            "reset",
            guest(|a| {
                use iced_x86::code_asm::*;
                a.mov(al, 0xFE).unwrap();
                a.out(0x64, al).unwrap();
                a.hlt().unwrap();
            }),
        ),
    ];
    for (code, words, image) in cases {
        let directory = with_guest(&image);
        run(directory.path()).assert().code(i32::from(code)).stderr(contains(words));
    }
}

#[test]
fn usage_errors_are_220() {
    orrery().assert().code(220);
    orrery().args(["run", "x.img"]).assert().code(220).stderr(contains("--seed"));
    orrery().args(["run", "x.img", "--seed", "minus"]).assert().code(220);
    orrery().args(["run", "x.img", "--seed", "1", "--until-virtual", "5"]).assert().code(220).stderr(contains("250ms"));
    orrery().args(["run", "x.img", "--seed", "1", "--epoch", "0"]).assert().code(220);
    orrery().arg("--help").assert().success().stdout(contains("orrery run hello.img --seed 1"));
    orrery().arg("--version").assert().success();
    orrery().args(["completions", "bash"]).assert().success().stdout(contains("complete -F _orrery"));
    orrery().args(["runs", "--runs", "/nonexistent"]).assert().success().stderr(contains("no runs in /nonexistent"));
}

#[test]
fn bad_images_are_221() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    run(path).assert().code(221).stderr(contains("guest.img"));
    fs::write(path.join("guest.img"), "not an image at all").unwrap();
    run(path).assert().code(221).stderr(contains("not an Orrery image"));
    let file = image_file(path, "guest.img", &hello());
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 5]).unwrap();
    run(path).assert().code(221).stderr(contains("truncated"));
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&file, damaged).unwrap();
    run(path).assert().code(221);
}

#[test]
fn absurd_machines_are_222() {
    let directory = with_guest(&hello());
    let with = |memory: &str| {
        let mut command = orrery();
        command.current_dir(directory.path()).args(["run", "guest.img", "--seed", "1", "--memory", memory]);
        command
    };
    for memory in ["0", "1", "99999999", "18446744073709551615"] {
        with(memory).assert().code(222).stderr(contains("--memory"));
    }
    let parts = orrery_guest_image::ImageParts {
        kernel: elf(&[0xF4]).into(),
        initramfs: vec![1u8; 40 << 20].into(),
        ..Default::default()
    };
    let image = orrery_guest_image::Image::from_parts(parts).unwrap();
    image_file(directory.path(), "guest.img", &image);
    with("32").assert().code(222).stderr(contains("initramfs").and(contains("--memory")));
}

#[test]
fn unwritable_runs_are_223() {
    let directory = with_guest(&hello());
    fs::write(directory.path().join("file"), "").unwrap();
    run(directory.path()).args(["--runs", "file/runs"]).assert().code(223).stderr(contains("--runs"));
    run(directory.path()).args(["--runs", "/proc/none"]).assert().code(223);
    run(directory.path()).env("ORRERY_RUNS", "elsewhere").assert().code(3);
    assert!(directory.path().join("elsewhere/guest-1-001/manifest.json").exists());
}

#[test]
fn a_full_disk_is_223() {
    let directory = with_guest(&hello());
    // A file system of two pages, in a mount namespace of the test's own.
    let script = "mkdir small && mount -t tmpfs -o size=8k none small && touch mounted \
        && \"$0\" run guest.img --seed 1 --memory 32 --runs small; code=$?; cat small/*/manifest.json; exit $code";
    let orrery = env!("CARGO_BIN_EXE_orrery");
    let output = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .arg(orrery)
        .current_dir(directory.path())
        .output();
    if !directory.path().join("mounted").exists() {
        eprintln!("skipped: this host permits no mounts in a user namespace: {output:?}");
        return;
    }
    let output = output.expect("it has run");
    assert_eq!(output.status.code(), Some(223), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"), "{output:?}");
    // What is there does not call the run complete.
    assert!(!String::from_utf8_lossy(&output.stdout).contains("power-off"), "{output:?}");
}

/// Prints what comes in until it reads 'q', then exits with 0.
fn echo() -> orrery_guest_image::Image {
    guest(|a| {
        use iced_x86::code_asm::*;
        let mut again = a.create_label();
        let mut done = a.create_label();
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
    })
}

#[test]
fn console_input_is_logged_and_replays() {
    let directory = with_guest(&echo());
    let json = |command: &mut Command| {
        let output = command.arg("--json").output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert!(stdout.starts_with("some text\n"), "{stdout}");
        serde_json::from_str::<serde_json::Value>(stdout.lines().last().unwrap()).unwrap()
    };
    let live = json(run(directory.path()).write_stdin("some text\nq"));
    let again = json(run(directory.path()).args(["--inputs", "runs/guest-1-001/inputs.jsonl"]));
    assert_eq!(live["state_hash"], again["state_hash"]);
    assert_eq!(live["icount"], again["icount"]);
    let logs = |number: u32| fs::read(directory.path().join(format!("runs/guest-1-{number:03}/inputs.jsonl"))).unwrap();
    assert_eq!(logs(1), logs(2));
}

#[test]
fn bad_inputs_are_224() {
    let directory = with_guest(&echo());
    let path = directory.path();
    run(path).args(["--inputs", "none"]).assert().code(224).stderr(contains("none"));
    fs::write(path.join("inputs"), "rubbish").unwrap();
    run(path).args(["--inputs", "inputs"]).assert().code(224).stderr(contains("orrery-inputs"));
    let header = r#"{"format":"orrery-inputs","version":1}"#;
    fs::write(path.join("inputs"), format!("{header}\n{{}}\n")).unwrap();
    run(path).args(["--inputs", "inputs"]).assert().code(224).stderr(contains("line 2"));
    let foreign = r#"{"icount":7,"virtual_ns":100000,"channel":"console","data":"71"}"#;
    fs::write(path.join("inputs"), format!("{header}\n{foreign}\n")).unwrap();
    run(path).args(["--inputs", "inputs"]).assert().code(224).stderr(contains("another run"));
}

#[test]
fn a_closed_stdout_ends_the_run() {
    use std::process::{Command, Stdio};
    let endless = guest(|a| {
        use iced_x86::code_asm::*;
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(dx, SERIAL).unwrap();
        a.mov(al, u32::from(b'\n')).unwrap();
        a.out(dx, al).unwrap();
        a.jmp(again).unwrap();
    });
    let directory = with_guest(&endless);
    let mut child = Command::new(env!("CARGO_BIN_EXE_orrery"))
        .current_dir(directory.path())
        .args(["run", "guest.img", "--seed", "1", "--memory", "32"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(230));
}

/// Runs `guest.img` in the directory, ends it by SIGTERM after a second, and gives what the manifest says of that.
fn ended_by_a_signal(directory: &Path) -> Outcome {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_orrery"))
        .current_dir(directory)
        .args(["run", "guest.img", "--seed", "1", "--memory", "32"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    // SAFETY: the child has not been waited for, so the process id is its own.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let ended = (0..100).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        child.try_wait().unwrap()
    });
    child.kill().unwrap();
    assert_eq!(ended.expect("a signal ends it").code(), Some(143));
    read_manifest(&directory.join("runs/guest-1-001")).unwrap().outcome.unwrap()
}

#[test]
fn a_signal_ends_the_run_in_order() {
    let endless = guest(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.jmp(again).unwrap();
    });
    let directory = with_guest(&endless);
    let outcome = ended_by_a_signal(directory.path());
    assert_eq!(outcome.ended, Ended::Interrupted { signal: libc::SIGTERM, unfinished: false });
}

#[test]
fn a_signal_ends_a_string_instruction_that_takes_long() {
    use iced_x86::code_asm::{esi, rcx};
    // The boot page tables map 4 GiB. That is minutes, byte by byte.
    let image = guest(|a| {
        a.xor(esi, esi).unwrap();
        a.mov(rcx, -1i64).unwrap();
        a.rep().lodsb().unwrap();
    });
    let directory = with_guest(&image);
    let outcome = ended_by_a_signal(directory.path());
    assert_eq!(outcome.ended, Ended::Interrupted { signal: libc::SIGTERM, unfinished: true });
    assert_eq!(outcome.icount, 2);
    // The moment that the run was at is the one before the instruction.
    let mut replay = orrery();
    replay.current_dir(directory.path()).args(["replay", "guest-1-001@2", "--hash"]).assert().success();
}

#[test]
fn verify_finds_equal_runs_equal() {
    let directory = with_guest(&busy(20_000));
    let mut command = orrery();
    command.current_dir(directory.path());
    command.args(["verify", "guest.img", "--seed", "1", "--memory", "32", "--epoch", "50000"]);
    command.args(["--times", "5", "--perturb", "--json"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["equal"], true);
    assert!(report["epochs"].as_u64().unwrap() > 3);
    let icount = report["last"]["icount"].as_u64().unwrap();
    assert_eq!(report["instructions"], 5 * icount);
    assert!(report["perturb_seed"].is_u64() && report["stages"].as_u64().unwrap() >= 4, "{report}");
}

#[test]
fn doctor_knows_this_host() {
    orrery().arg("doctor").assert().stdout(contains("processor").and(contains("kvm")));
    let output = orrery().args(["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["findings"].as_array().unwrap().len() >= 5);
}

#[test]
fn images_can_be_looked_into_and_taken_apart() {
    let directory = with_guest(&hello());
    let path = directory.path();
    orrery().current_dir(path).args(["image", "inspect", "guest.img"]).assert().success().stdout(contains("kernel"));
    orrery()
        .current_dir(path)
        .args(["image", "inspect", "guest.img", "--json"])
        .assert()
        .success()
        .stdout(contains("\"kernel_kind\":\"ELF\""));
    orrery().current_dir(path).args(["image", "extract", "guest.img", "parts"]).assert().success();
    assert!(path.join("parts/vmlinux").exists());
    orrery().args(["completions", "bash"]).assert().success().stdout(contains("orrery"));
}
