//! The small guests of `guests/`: one program per behaviour, all in one root, chosen by the image's entry command.
//!
//! [`DETERMINATE`] programs print a result that every correct machine gives, so a native run is the oracle.
//! [`SEEDED`] programs print what depends on chance: equal seeds must give equal words, and different seeds others.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::workshop;

/// Programs with one right result.
pub const DETERMINATE: [&str; 9] =
    ["selfmod", "signals", "faults", "debugger", "memory", "vectors", "floats", "clock", "i386"];
/// Programs whose words the seed decides.
pub const SEEDED: [&str; 3] = ["race", "random", "gorace"];

/// Programs in C, static, with threads.
const C_PROGRAMS: [&str; 13] = [
    "runner", "selfmod", "signals", "faults", "debugger", "memory", "vectors", "floats", "clock", "race", "random",
    "filler", "worker",
];

/// Below the root: where the programs are.
const PLACE: &str = "guests";

/// An image that runs these programs one after the other. Each one's output stands between the lines `== NAME` and
/// `== NAME exit CODE` (or `== NAME signal NUMBER`).
pub fn image(names: &[&str]) -> Result<PathBuf> {
    let _lock = lock()?;
    let root = programs()?;
    let kernel = workshop::kernel_package()?;
    let output = directory().join(format!("{}.img", names.join("-")));
    if !workshop::is_fresh(&output, &[&stamp(), &kernel]) {
        let entry: Vec<String> =
            std::iter::once("/guests/runner").chain(names.iter().copied()).map(str::to_owned).collect();
        workshop::build_image(&kernel, &root, &entry, &output)?;
    }
    Ok(output)
}

/// What a program prints natively.
pub fn native(name: &str) -> Result<String> {
    let root = {
        let _lock = lock()?;
        programs()?
    };
    workshop::tool(&mut Command::new(root.join(PLACE).join(name)), name)
}

/// What a program printed between its lines of the console, and its last line; None if it did not begin or end.
pub fn section<'a>(console: &'a str, name: &str) -> Option<(String, &'a str)> {
    let begin = format!("== {name}");
    let end = format!("== {name} ");
    let mut lines = console.lines().map(str::trim_end).skip_while(|line| *line != begin).skip(1);
    let mut words = String::new();
    loop {
        let line = lines.next()?;
        if let Some(how) = line.strip_prefix(&end) {
            return Some((words, how));
        }
        words += line;
        words.push('\n');
    }
}

fn directory() -> PathBuf {
    workshop::target().join("guests")
}

fn stamp() -> PathBuf {
    directory().join("root.made")
}

/// Tests run in several threads and processes; one of them builds.
fn lock() -> Result<File> {
    fs::create_dir_all(directory()).with_context(|| format!("cannot make {}", directory().display()))?;
    let file = File::create(directory().join("lock"))?;
    file.lock().context("cannot lock the directory of the guests")?;
    Ok(file)
}

/// Compiles what is older than its source and returns the root.
fn programs() -> Result<PathBuf> {
    let sources = workshop::workspace().join("tests/guests");
    let root = directory().join("root");
    if workshop::is_fresh(&stamp(), &[&sources]) {
        return Ok(root);
    }
    workshop::empty_directory(&root)?;
    let place = root.join(PLACE);
    fs::create_dir_all(&place)?;
    for name in C_PROGRAMS {
        let mut gcc = Command::new("gcc");
        gcc.args(["-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o"]);
        gcc.arg(place.join(name)).arg(sources.join(format!("{name}.c"))).arg("-lm");
        workshop::tool(&mut gcc, "gcc libc6-dev")?;
    }
    assemble(&sources, &place)?;
    let mut go = Command::new("go");
    go.args(["build", "-trimpath", "-ldflags=-buildid=", "-o"]).arg(place.join("gorace")).arg(".");
    go.env("CGO_ENABLED", "0").current_dir(sources.join("gorace"));
    workshop::tool(&mut go, "golang-go")?;
    fs::write(stamp(), b"")?;
    Ok(root)
}

/// The 32-bit program: no library, so the 64-bit toolchain is enough.
fn assemble(sources: &Path, place: &Path) -> Result<()> {
    let object = directory().join("i386.o");
    workshop::tool(Command::new("as").args(["--32", "-o"]).arg(&object).arg(sources.join("i386.S")), "binutils")?;
    let mut link = Command::new("ld");
    link.args(["-m", "elf_i386", "-static", "-o"]).arg(place.join("i386")).arg(&object);
    workshop::tool(&mut link, "binutils")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_found() {
        let console = "boot\r\n== a\r\nx\r\n== a exit 0\r\n== ab\r\n== ab signal 11\r\n== c\r\ncut";
        assert_eq!(section(console, "a"), Some(("x\n".into(), "exit 0")));
        assert_eq!(section(console, "ab"), Some((String::new(), "signal 11")));
        assert_eq!(section(console, "b"), None);
        assert_eq!(section(console, "c"), None);
    }
}
