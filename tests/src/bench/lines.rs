//! What is measured: every line of the table, in its order.

use anyhow::{Result, bail};

/// A program of the benchmark. Each has an image of its own and runs all its lines in one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// `bench/go`.
    Go,
    /// `bench/jvm`.
    Jvm,
}

impl Program {
    /// All programs, in the order in which they run.
    pub const ALL: [Program; 2] = [Program::Go, Program::Jvm];

    /// Name in file names and messages.
    pub fn name(self) -> &'static str {
        match self {
            Program::Go => "go",
            Program::Jvm => "jvm",
        }
    }
}

/// A line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its name, as the program's markers say it.
    pub name: &'static str,
    /// The program that contains it.
    pub program: Program,
    /// What it measures, for the documentation of the table.
    pub about: &'static str,
}

/// The line that no program contains: from the start of the VM's process to the first words of the guest's program.
pub const BOOT: &str = "boot-to-init";

const fn go(name: &'static str, about: &'static str) -> Line {
    Line { name, program: Program::Go, about }
}

const fn jvm(name: &'static str, about: &'static str) -> Line {
    Line { name, program: Program::Jvm, about }
}

/// All lines.
pub const LINES: [Line; 16] = [
    go(BOOT, "start of the VM's process until the guest's program speaks"),
    go("go-fib", "recursion: calls and returns"),
    go("go-sha256", "SHA-256 of the standard library"),
    go("go-json", "encoding and decoding JSON"),
    go("go-sort", "sorting numbers and records"),
    go("go-map", "hash tables"),
    go("go-channels-1", "goroutines and channels, GOMAXPROCS=1"),
    go("go-channels-4", "goroutines and channels, GOMAXPROCS=4"),
    go("go-nbody", "floating point, scalar"),
    go("go-matmul", "floating point, arrays"),
    jvm("jvm-fib", "recursion: calls and returns"),
    jvm("jvm-hashmap", "HashMap with boxed and text keys"),
    jvm("jvm-stringbuilder", "StringBuilder and text search"),
    jvm("jvm-doubles", "double arrays: vector instructions"),
    jvm("jvm-allocation", "allocation and garbage collection"),
    jvm("jvm-locks", "contended monitors, wait and notify"),
];

/// The lines whose names are given, in the table's order; all if none is given. A name may also be a prefix, such as
/// `go` or `jvm-`.
pub fn select(names: &[String]) -> Result<Vec<Line>> {
    for name in names {
        if !LINES.iter().any(|line| line.name.starts_with(name.as_str())) {
            let known: Vec<_> = LINES.iter().map(|line| line.name).collect();
            bail!("there is no line {name:?}; the lines are {}", known.join(", "));
        }
    }
    let wanted = |line: &Line| names.is_empty() || names.iter().any(|name| line.name.starts_with(name.as_str()));
    Ok(LINES.into_iter().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_prefixes_select() {
        assert_eq!(select(&[]).unwrap().len(), LINES.len());
        assert_eq!(select(&["go-fib".into(), BOOT.into()]).unwrap().len(), 2);
        assert!(select(&["jvm".into()]).unwrap().iter().all(|line| line.program == Program::Jvm));
        assert!(select(&["cobol".into()]).is_err());
    }

    #[test]
    fn the_programs_have_these_lines() {
        let go = include_str!("../../bench/go/main.go");
        let jvm = include_str!("../../bench/jvm/Bench.java");
        for line in LINES.iter().filter(|line| line.name != BOOT) {
            let source = if line.program == Program::Go { go } else { jvm };
            assert!(source.contains(&format!("\"{}\"", line.name)), "{} is in no program", line.name);
        }
    }
}
