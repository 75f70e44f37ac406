//! What is measured: every line of the table, in its order.

use anyhow::{Result, bail};

use super::platform::Platform;

/// A session of the benchmark: a program that runs all its lines in one process, with an image of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// The demo image `hello`, without translations of earlier runs.
    HelloCold,
    /// The demo image `hello`, with the translations of earlier runs.
    HelloWarm,
    /// `bench/c`.
    C,
    /// `bench/c` again, with lines of a second and more.
    CLong,
    /// `bench/go`.
    Go,
    /// `bench/jvm`, without translations of earlier runs: only its start.
    JvmCold,
    /// `bench/jvm`.
    Jvm,
    /// `bench/jvm` again, with lines that begin when their work has been compiled.
    JvmSteady,
    /// `bench/etcd` with Debian's etcd.
    Etcd,
}

impl Program {
    /// All programs, in the order in which they run.
    pub const ALL: [Program; 9] = [
        Program::HelloCold,
        Program::HelloWarm,
        Program::C,
        Program::CLong,
        Program::Go,
        Program::JvmCold,
        Program::Jvm,
        Program::JvmSteady,
        Program::Etcd,
    ];

    /// Name in file names and messages.
    pub fn name(self) -> &'static str {
        match self {
            Program::HelloCold => "hello-cold",
            Program::HelloWarm => "hello-warm",
            Program::C => "c",
            Program::CLong => "c-long",
            Program::Go => "go",
            Program::JvmCold => "jvm-cold",
            Program::Jvm => "jvm",
            Program::JvmSteady => "jvm-steady",
            Program::Etcd => "etcd",
        }
    }

    /// True if Orrery runs it without the translations that earlier runs left.
    pub fn is_cold(self) -> bool {
        matches!(self, Program::HelloCold | Program::JvmCold)
    }

    /// Words of the console that tell that the program has begun, if it prints no markers.
    pub fn first_words(self) -> Option<&'static str> {
        matches!(self, Program::HelloCold | Program::HelloWarm).then_some("hello from ")
    }

    /// True if it says anything there. A boot has no native figure; QEMU keeps no translations, so that it has one
    /// figure for cold and warm; and the long and the steady lines would take it minutes, to say what the short ones say.
    pub fn runs_on(self, platform: Platform) -> bool {
        match self {
            Program::HelloCold => platform != Platform::Native,
            Program::HelloWarm => platform.is_orrery(),
            Program::JvmCold | Program::CLong | Program::JvmSteady => platform != Platform::Qemu,
            Program::C | Program::Go | Program::Jvm | Program::Etcd => true,
        }
    }
}

/// What a line's figure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// From the start of the VM's process to the first words of the guest's program.
    Boot,
    /// From the line's first marker to its last.
    Work,
}

/// Lines that have a mean of their own below the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Starts: of the machine, of the JVM.
    Start,
    /// A C program that computes with integers.
    Integer,
    /// A C program that computes with floating point, vectors and string instructions.
    Vector,
    /// A C program that lets the kernel work.
    Kernel,
    /// User-mode computing of a second and more.
    Long,
    /// Programs of runtimes with threads, collectors and compilers.
    Runtime,
    /// The JVM's programs when they have been compiled.
    Steady,
    /// A server under load.
    Server,
}

impl Group {
    /// All of them, in the table's order.
    pub const ALL: [Group; 8] = [
        Group::Start,
        Group::Integer,
        Group::Vector,
        Group::Kernel,
        Group::Long,
        Group::Runtime,
        Group::Steady,
        Group::Server,
    ];

    /// What the table calls it.
    pub fn title(self) -> &'static str {
        match self {
            Group::Start => "starts",
            Group::Integer => "C, integers",
            Group::Vector => "C, vectors",
            Group::Kernel => "C, kernel",
            Group::Long => "C, long",
            Group::Runtime => "Go and JVM",
            Group::Steady => "JVM, steady",
            Group::Server => "servers",
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
    /// What the figure is.
    pub span: Span,
    /// Whose mean it is part of.
    pub group: Group,
    /// What it measures, for the documentation of the table.
    pub about: &'static str,
}

impl Line {
    /// What the program is told to run it; None for a figure that comes before all lines.
    pub fn argument(&self) -> Option<&'static str> {
        (self.group != Group::Start).then_some(self.name)
    }

    /// What the program's markers call it.
    pub fn marker(&self) -> &'static str {
        match self.program {
            Program::JvmCold => JVM_START,
            _ => self.name,
        }
    }
}

/// The line that the JVM's launcher begins, whatever else is to run.
const JVM_START: &str = "jvm-start";

const fn boot(name: &'static str, program: Program, about: &'static str) -> Line {
    Line { name, program, span: Span::Boot, group: Group::Start, about }
}

const fn work(name: &'static str, program: Program, group: Group, about: &'static str) -> Line {
    Line { name, program, span: Span::Work, group, about }
}

const fn integer(name: &'static str, about: &'static str) -> Line {
    work(name, Program::C, Group::Integer, about)
}

const fn vector(name: &'static str, about: &'static str) -> Line {
    work(name, Program::C, Group::Vector, about)
}

const fn kernel(name: &'static str, about: &'static str) -> Line {
    work(name, Program::C, Group::Kernel, about)
}

const fn long(name: &'static str) -> Line {
    work(name, Program::CLong, Group::Long, "the same, longer; not in QEMU")
}

const fn go(name: &'static str, about: &'static str) -> Line {
    work(name, Program::Go, Group::Runtime, about)
}

const fn jvm(name: &'static str, about: &'static str) -> Line {
    work(name, Program::Jvm, Group::Runtime, about)
}

const fn steady(name: &'static str) -> Line {
    work(name, Program::JvmSteady, Group::Steady, "the same work, compiled before the line begins; not in QEMU")
}

/// All lines.
pub const LINES: &[Line] = &[
    boot("boot-cold", Program::HelloCold, "hello until its first program speaks, without translations of earlier runs"),
    boot("boot-warm", Program::HelloWarm, "with translations of earlier runs; QEMU keeps none"),
    boot("boot-to-init", Program::Go, "start of the VM's process until the Go program speaks"),
    work(
        "jvm-start-cold",
        Program::JvmCold,
        Group::Start,
        "JVM from exec to main, without translations of earlier runs",
    ),
    work(JVM_START, Program::Jvm, Group::Start, "JVM from exec to main"),
    integer("c-alu", "arithmetic and logic in registers"),
    integer("c-chase", "loads that wait for each other"),
    integer("c-calls", "recursion: calls and returns"),
    integer("c-interp", "an interpreter with threaded code: indirect jumps"),
    integer("c-qsort", "the C library's qsort: calls through a pointer, unpredictable branches"),
    integer("c-sieve", "Eratosthenes: stores of single bytes"),
    vector("c-nbody", "floating point, scalar double precision"),
    vector("c-sse-float", "SSE: four floats at a time"),
    vector("c-sse-int", "SSE2: sixteen bytes at a time"),
    vector("c-avx2", "AVX2 and FMA: 32 bytes at a time"),
    vector("c-repmovsb", "REP MOVSB of 16 bytes to 256 KiB"),
    kernel("c-syscall", "system calls that do nothing"),
    kernel("c-fault", "page faults: mmap, touch, munmap"),
    kernel("c-exec", "fork, exec, exit, wait"),
    kernel("c-switch", "two threads that take turns through a futex"),
    kernel("c-pipe", "two processes that pass a number to and fro"),
    kernel("c-spin", "two threads that spin and yield until it is their turn"),
    long("c-alu-x6"),
    long("c-chase-x4"),
    long("c-calls-x4"),
    long("c-interp-x8"),
    long("c-qsort-x4"),
    long("c-sieve-x5"),
    long("c-nbody-x4"),
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
    steady("jvm-fib-steady"),
    steady("jvm-hashmap-steady"),
    steady("jvm-stringbuilder-steady"),
    steady("jvm-doubles-steady"),
    steady("jvm-allocation-steady"),
    steady("jvm-locks-steady"),
    work("etcd-put-get", Program::Etcd, Group::Server, "etcd: puts and gets of four clients over loopback"),
];

/// The lines whose names are given, in the table's order; all if none is given. A name that is no line's is a prefix,
/// such as `go` or `jvm-`.
pub fn select(names: &[String]) -> Result<Vec<Line>> {
    let is_exact = |name: &str| LINES.iter().any(|line| line.name == name);
    let matches = |line: &Line, name: &str| line.name == name || !is_exact(name) && line.name.starts_with(name);
    for name in names {
        if !LINES.iter().any(|line| matches(line, name)) {
            let known: Vec<_> = LINES.iter().map(|line| line.name).collect();
            bail!("there is no line {name:?}; the lines are {}", known.join(", "));
        }
    }
    let wanted = |line: &Line| names.is_empty() || names.iter().any(|name| matches(line, name));
    Ok(LINES.iter().filter(|line| wanted(line)).copied().collect())
}

/// A line of the table; None for a line that is no more.
pub fn find(name: &str) -> Option<&'static Line> {
    LINES.iter().find(|line| line.name == name)
}

/// Its group.
pub fn group(name: &str) -> Option<Group> {
    find(name).map(|line| line.group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_prefixes_select() {
        assert_eq!(select(&[]).unwrap().len(), LINES.len());
        assert_eq!(select(&["go-fib".into(), "boot".into()]).unwrap().len(), 4);
        assert_eq!(select(&["c-alu".into()]).unwrap().len(), 1);
        assert!(select(&["jvm".into()]).unwrap().iter().all(|line| line.name.starts_with("jvm")));
        assert!(select(&["cobol".into()]).is_err());
    }

    #[test]
    fn the_programs_have_these_lines() {
        let c = include_str!("../../bench/c/main.c");
        let go = include_str!("../../bench/go/main.go");
        let jvm = concat!(include_str!("../../bench/jvm/Bench.java"), include_str!("../../bench/jvm/launch.c"));
        let etcd = include_str!("../../bench/etcd/main.go");
        for line in LINES.iter().filter(|line| line.span == Span::Work) {
            let (source, name) = match line.program {
                Program::C => (c, format!("\"{}\"", line.name)),
                Program::CLong => (c, format!("\"{}\"", line.name.rsplit_once("-x").unwrap().0)),
                Program::Go => (go, format!("\"{}\"", line.name)),
                Program::Jvm | Program::JvmCold if line.group == Group::Start => {
                    (jvm, format!("@@ begin {}", line.marker()))
                }
                Program::Jvm | Program::JvmCold => (jvm, format!("\"{}\"", line.name)),
                Program::JvmSteady => (jvm, format!("\"{}\"", line.name.strip_suffix("-steady").unwrap())),
                Program::Etcd => (etcd, format!("\"{}\"", line.name)),
                Program::HelloCold | Program::HelloWarm => panic!("{} has no markers", line.name),
            };
            assert!(source.contains(&name), "{} is in no program", line.name);
        }
    }
}
