//! Arguments of the commands that look at a guest from outside, and of `shell` and `cat`.

use std::path::PathBuf;

use clap::Args;

use super::shared::{MomentArgs, ReachArgs};

/// Arguments of `orrery ps`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery ps go-1-001@850000000
  orrery ps go-1-001@850000000 --threads --json

The list is read from the kernel's memory; nothing runs in the guest. TIME is how long a thread has \
run, in seconds of virtual time, CR3 the root of its page tables, * marks the one on the vCPU.")]
pub struct PsArgs {
    /// The moment.
    #[command(flatten)]
    pub at: MomentArgs,
    /// Every thread, not only every process
    #[arg(long, short)]
    pub threads: bool,
    /// Print the list as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery backtrace`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery backtrace go-1-001@850000000
  orrery backtrace go-1-001@850000000 --pid 1
  orrery backtrace go-1-001@850000000 --all

Frames without a remark were found by the compiler's and the kernel's unwind tables. A frame marked \
as a guess is a word on the stack that looks like a return address; it may be wrong.")]
pub struct BacktraceArgs {
    /// The moment.
    #[command(flatten)]
    pub at: MomentArgs,
    /// A process or thread other than the running one
    #[arg(long, value_name = "PID", conflicts_with = "all")]
    pub pid: Option<i32>,
    /// Every thread
    #[arg(long)]
    pub all: bool,
    /// Print the frames as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery registers`.
#[derive(Args, Debug)]
pub struct RegistersArgs {
    /// The moment.
    #[command(flatten)]
    pub at: MomentArgs,
    /// Print the registers as JSON, numbers as hexadecimal text
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery memory`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery memory go-1-001@850000000 linux_banner
  orrery memory go-1-001@850000000 0x400000 --pid 1 --length 4096
  orrery memory go-1-001@850000000 0x20000 --physical

An address is a hexadecimal number or a symbol (NAME, OBJECT:NAME, NAME+OFFSET). It is translated by \
the page tables that the vCPU uses at the moment, or by those of the process given with --pid.")]
pub struct MemoryArgs {
    /// The moment.
    #[command(flatten)]
    pub at: MomentArgs,
    /// Where to begin
    pub address: String,
    /// How many bytes
    #[arg(long, short = 'n', value_name = "BYTES", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub length: u64,
    /// In the memory of this process
    #[arg(long, value_name = "PID", conflicts_with = "physical")]
    pub pid: Option<i32>,
    /// The address is guest-physical
    #[arg(long)]
    pub physical: bool,
    /// Write the bytes themselves to standard output
    #[arg(long, conflicts_with = "json")]
    pub raw: bool,
    /// Print the bytes as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery disassemble`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery disassemble go-1-001@850000000
  orrery disassemble go-1-001@850000000 do_sys_openat2 --count 40
  orrery disassemble go-1-001@850000000 main.main --pid 1")]
pub struct DisassembleArgs {
    /// The moment.
    #[command(flatten)]
    pub at: MomentArgs,
    /// Where to begin: an address or a symbol [default: where the vCPU is]
    pub address: Option<String>,
    /// How many instructions
    #[arg(long, short = 'n', value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub count: u32,
    /// In the memory of this process
    #[arg(long, value_name = "PID")]
    pub pid: Option<i32>,
    /// Print the instructions as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery profile`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery profile go-1-001
  orrery profile go-1-001 --from 600000000 --svg go.svg
  orrery profile go-1-001 --folded > go.folded

The run is run again and its stack is sampled every so many instructions: the same samples every \
time. Functions of the kernel end in _[k]. An idle guest executes nothing, so it is not seen here.")]
pub struct ProfileArgs {
    /// The run, or the beginning of its name
    pub run: String,
    /// How it is reached.
    #[command(flatten)]
    pub reach: ReachArgs,
    /// Where to begin
    #[arg(long, value_name = "ICOUNT", default_value_t = 0)]
    pub from: u64,
    /// Where to end [default: the run's end]
    #[arg(long, value_name = "ICOUNT")]
    pub to: Option<u64>,
    /// Instructions between samples [default: a prime that gives about 10000 samples]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub every: Option<u64>,
    /// Only the function that runs, not its callers: quicker
    #[arg(long)]
    pub flat: bool,
    /// Write a flame graph
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print the stacks as `process;outer;inner COUNT`, for other tools
    #[arg(long, conflicts_with = "json")]
    pub folded: bool,
    /// Print the profile as JSON
    #[arg(long)]
    pub json: bool,
    /// How many functions to show
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub top: usize,
}

/// Arguments of `orrery shell`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery shell go-1-001@850000000
  orrery shell go-1-001@850000000 -- ps -ef
  echo 'cat /proc/meminfo' | orrery shell go-1-001@850000000

The guest goes on from the moment in a branch of its own, with the shell in it; the branch ends with \
the shell and leaves nothing behind. The command's exit code becomes the shell's. The image must have \
been built by a version of Orrery with this command, and must have a shell (/bin/sh).")]
pub struct ShellArgs {
    /// The moment.
    #[command(flatten)]
    pub at: MomentArgs,
    /// A command to run instead of the shell
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// Arguments of `orrery cat`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery cat go-1-001@850000000 /proc/85/status
  orrery cat go-1-001@850000000 /var/log/app.log > app.log
  orrery cat go-1-001@850000000 /etc/passwd --disk

The guest's own kernel reads the file, in a branch that is thrown away: its agent stops every other \
process first, which takes it a few thousand instructions from the moment on. With --disk nothing \
runs: the file is read from the guest's disk, where what the guest has not written back is missing.")]
pub struct CatArgs {
    /// The moment.
    #[command(flatten)]
    pub at: MomentArgs,
    /// Path of the file in the guest
    pub path: String,
    /// Read from the guest's disk, without running the guest
    #[arg(long)]
    pub disk: bool,
    /// Say how far the guest had to run
    #[arg(long, short, conflicts_with = "disk")]
    pub verbose: bool,
}
