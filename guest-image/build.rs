//! Compiles `/init` for the guest, so that the finished `orrery` command carries it.
//!
//! Init is a static program with its own code generation flags, so it cannot be an ordinary dependency: a second
//! cargo, with its own target directory inside `OUT_DIR`, builds it from the same lock file.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let crate_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let workspace = crate_dir.parent().expect("the crate lies in the workspace");
    for watched in ["build.rs", "init/src", "init/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", crate_dir.join(watched).display());
    }

    // Paths of this machine must not reach the binary: it is part of every image's hash.
    let flags = [
        "-Ctarget-feature=+crt-static".to_string(),
        "-Crelocation-model=static".to_string(),
        format!("--remap-path-prefix={}=orrery", workspace.display()),
        format!("--remap-path-prefix={}=cargo", cargo_home().display()),
    ];
    let target_dir = out_dir.join("init");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    cargo
        .args(["build", "--quiet", "--release", "--target", TARGET, "--package", "orrery-init", "--manifest-path"])
        .arg(workspace.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    // What the outer build was wrapped or steered with (clippy, coverage) is not for the guest.
    for variable in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_MAKEFLAGS"] {
        cargo.env_remove(variable);
    }
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("building orrery-init for {TARGET} failed ({status}); its errors are above")),
        Err(error) => fail(&format!("cannot start cargo for orrery-init: {error}")),
    }
    let init = target_dir.join(TARGET).join("release/orrery-init");
    println!("cargo::rustc-env=ORRERY_INIT={}", init.display());
}

fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .unwrap_or_else(|| PathBuf::from("/nonexistent"))
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
