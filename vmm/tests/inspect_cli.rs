//! The commands that look at a guest, on one that is no Linux: what can be seen is shown, and the rest is said.
#![allow(missing_docs)]

mod common;

use assert_cmd::Command;
use common::*;
use predicates::prelude::*;
use predicates::str::contains;

fn orrery(directory: &tempfile::TempDir, arguments: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = Command::cargo_bin("orrery").expect("the command is built");
    command.env_remove("ORRERY_RUNS").timeout(std::time::Duration::from_secs(120));
    command.current_dir(directory.path()).args(arguments).assert()
}

/// A run of 800,000 instructions and more.
fn recorded() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    image_file(directory.path(), "guest.img", &busy(100_000));
    orrery(&directory, &["run", "guest.img", "--seed", "1", "--memory", "32"]).code(0);
    directory
}

#[test]
fn a_guest_without_a_kernel_is_shown_as_far_as_it_goes() {
    let run = recorded();
    let json = |arguments: &[&str]| -> serde_json::Value {
        let output = orrery(&run, arguments).code(0).get_output().stdout.clone();
        serde_json::from_slice(&output).expect("it is JSON")
    };
    let registers = json(&["registers", "guest-1@5000", "--json"]);
    assert_eq!(registers["icount"], 5000);
    assert_eq!(registers["cpl"], 0);
    let rip = registers["rip"].as_str().unwrap().to_owned();
    assert!(rip.starts_with("0x2000"), "the code begins at 0x200000: {rip}");
    orrery(&run, &["registers", "guest-1@5000"]).code(0).stdout(contains("rflags").and(contains("ymm15")));

    // The first instruction loads ECX with 100,000.
    let code = json(&["memory", "guest-1@0", "0x200000", "-n", "5", "--json"]);
    assert_eq!(code["bytes"], "b9a0860100");
    orrery(&run, &["memory", "guest-1@0", "200000", "-n", "5", "--physical"]).stdout(contains("b9 a0 86 01 00"));
    orrery(&run, &["disassemble", "guest-1@0", "-n", "1"]).stdout(contains("mov ecx").and(contains("=>")));
    orrery(&run, &["memory", "guest-1@0", "0xffffffff81000000"]).code(236).stderr(contains("not mapped"));
    orrery(&run, &["memory", "guest-1@0", "main.main"]).code(236).stderr(contains("neither an address nor a symbol"));

    orrery(&run, &["ps", "guest-1@5000"]).code(236).stderr(contains("no Linux kernel"));
    let stacks = json(&["backtrace", "guest-1@5000", "--json"]);
    assert_eq!(stacks[0]["frames"][0]["how"], "exact");
    orrery(&run, &["shell", "guest-1@5000"]).code(237).stderr(contains("no agent"));
    orrery(&run, &["cat", "guest-1@5000", "/etc/passwd"]).code(237);
    orrery(&run, &["cat", "guest-1@5000", "/etc/passwd", "--disk"]).code(236);
}

#[test]
fn profiles_come_out_equal_and_bad_moments_are_refused() {
    let run = recorded();
    let profile = |arguments: &[&str]| {
        let all = [&["profile", "guest-1"], arguments].concat();
        orrery(&run, &all).code(0).get_output().stdout.clone()
    };
    let folded = profile(&["--every", "1000", "--folded"]);
    assert_eq!(folded, profile(&["--every", "1000", "--folded"]));
    assert!(String::from_utf8(folded).unwrap().starts_with("[no process];[unknown]_[k] "));
    let json: serde_json::Value =
        serde_json::from_slice(&profile(&["--from", "10", "--to", "1010", "--every", "7", "--json"])).unwrap();
    assert_eq!(json["samples"], 142);
    profile(&["--svg", "graph.svg"]);
    assert!(std::fs::read_to_string(run.path().join("graph.svg")).unwrap().contains("</svg>"));

    for (arguments, code) in [
        (&["profile", "guest-1", "--from", "10", "--to", "10"][..], 220),
        (&["ps", "nothing@5"], 233),
        (&["ps", "guest-1@x"], 220),
        (&["registers", "guest-1@99999999999"], 233),
        (&["registers", "guest-1@5", "--image", "missing.img"], 221),
        (&["memory", "guest-1@5", "0x0", "-n", "0"], 220),
    ] {
        orrery(&run, arguments).code(code).stderr(predicates::str::is_empty().not());
    }
}
