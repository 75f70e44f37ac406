//! Every flag of the command line, once.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::chain::EPOCH_INSTRUCTIONS;
use crate::config::MachineConfig;
use crate::moment::MomentName;
use crate::run::SnapshotOptions;
use crate::run::snapshots::{DIRTY_BYTES, EVERY_INSTRUCTIONS, MOST};

/// A deterministic x86-64 hypervisor: State(N) = f(image, machine, seed, inputs).
#[derive(Parser, Debug)]
#[command(name = "orrery", version, about, max_term_width = 100, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "Examples:
  orrery run hello.img --seed 1              boot an image; its console comes to standard output
  orrery verify hello.img --seed 1 --times 3 prove that three runs go through equal states
  orrery doctor                              check this host

A guest's exit code becomes the command's own. Codes from 220 up are Orrery's: see docs/exit-codes.md.";

/// What the command can do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run an image from power-on
    Run(RunArgs),
    /// Run an image several times and compare every epoch
    Verify(VerifyArgs),
    /// Store the complete state at a moment of a run
    Snapshot(SnapshotCommandArgs),
    /// Go on from a moment of a run, with another seed or other inputs
    Branch(Box<BranchArgs>),
    /// List the runs on disk
    Runs(RunsArgs),
    /// Show which runs branched off which
    Tree(RunsArgs),
    /// Find the first instruction after which two runs differ
    Diff(DiffArgs),
    /// Check and clean the store of snapshots
    Store(StoreArgs),
    /// Write a run to one file
    Export(ExportArgs),
    /// Take a run from such a file
    Import(ImportArgs),
    /// Say whether this host can run guests, and how
    Doctor(DoctorArgs),
    /// Build, look into and take apart images
    Image(ImageArgs),
    /// List the processes at a moment of a run
    Ps(PsArgs),
    /// Show where the running thread, or another, is, and how it got there
    Backtrace(BacktraceArgs),
    /// Show the vCPU's registers at a moment
    Registers(RegistersArgs),
    /// Show the guest's memory at a moment
    Memory(MemoryArgs),
    /// Show the guest's code at a moment
    Disassemble(DisassembleArgs),
    /// Show where a run spends its instructions
    Profile(ProfileArgs),
    /// Open a shell in the guest at a moment, in a branch that is thrown away
    Shell(ShellArgs),
    /// Show a file of the guest as it was at a moment
    Cat(CatArgs),
    /// Go to an exact moment of a run and say what is there
    Replay(ReplayArgs),
    /// Debug a run with gdb, forwards and backwards
    Debug(DebugArgs),
    /// Find who wrote some bytes of memory last before a moment
    LastWrite(LastWriteArgs),
    /// Find every moment at which an instruction was executed
    When(WhenArgs),
    /// List the instructions or calls between two moments
    Trace(TraceArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// The machine's description.
#[derive(Args, Debug, Clone)]
pub struct MachineArgs {
    /// Memory of the machine, in MiB
    #[arg(long, value_name = "MIB", default_value_t = MachineConfig::default().memory_mib)]
    pub memory: u64,
    /// Virtual nanoseconds that pass with each instruction
    #[arg(long, value_name = "NS", default_value_t = 1)]
    pub ns_per_instruction: u64,
    /// The guest's wall clock at power-on, in seconds since 1970 (UTC)
    #[arg(long, value_name = "SECONDS", default_value_t = MachineConfig::default().start_date)]
    pub start_date: u64,
    /// Upper bound of the seeded delay of timer interrupts, in virtual nanoseconds
    #[arg(long, value_name = "NS", default_value_t = MachineConfig::default().timer_jitter_ns)]
    pub timer_jitter: u64,
    /// A machine without AES, PCLMULQDQ and SHA instructions, for hosts that lack them
    #[arg(long)]
    pub no_crypto_extensions: bool,
}

impl MachineArgs {
    /// The description that these flags give.
    pub fn config(&self) -> MachineConfig {
        MachineConfig {
            memory_mib: self.memory,
            ns_per_instruction: self.ns_per_instruction,
            start_date: self.start_date,
            timer_jitter_ns: self.timer_jitter,
            crypto_extensions: !self.no_crypto_extensions,
        }
    }
}

/// How the engine works inside. Results never depend on these.
#[derive(Args, Debug, Clone, Default)]
pub struct EngineArgs {
    /// Randomise everything that must not matter, from this seed
    #[arg(long, hide = true, value_name = "SEED")]
    pub engine_chaos: Option<u64>,
    /// Size of the software TLBs, as a power of two
    #[arg(long, hide = true, value_name = "BITS")]
    pub engine_tlb_bits: Option<u32>,
    /// Do not chain blocks
    #[arg(long, hide = true)]
    pub engine_no_chaining: bool,
    /// Do not share address translations inside a block
    #[arg(long, hide = true)]
    pub engine_no_grouping: bool,
    /// Longest block, in instructions
    #[arg(long, hide = true, value_name = "N")]
    pub engine_block: Option<u32>,
    /// Code cache, in MiB
    #[arg(long, hide = true, value_name = "MIB")]
    pub engine_cache: Option<usize>,
    /// Start without the translations that earlier runs of this image left in the user's cache directory, and leave
    /// none there. They only make the start faster
    #[arg(long)]
    pub no_translation_cache: bool,
}

/// Arguments of `orrery run`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery run hello.img --seed 1
  orrery run hello.img --seed 1 --until 1000000000 --json
  echo 'uname -a' | orrery run shell.img --seed 1
  orrery run shell.img --seed 1 --inputs runs/shell-1-001/inputs.jsonl

Console input is taken from standard input (a terminal or a pipe), stamped with the moment at which
it enters and logged in the run's directory. A run with the same image, machine, seed and
--inputs goes through the same states.")]
pub struct RunArgs {
    /// The image, as made by `orrery image build`
    pub image: PathBuf,
    /// The number that every random choice derives from
    #[arg(long, value_name = "N")]
    pub seed: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub machine: MachineArgs,
    /// Stop after exactly this many instructions
    #[arg(long, value_name = "ICOUNT")]
    pub until: Option<u64>,
    /// Stop at this virtual time: a number with ns, us, ms, s or min
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub until_virtual: Option<u64>,
    /// Where runs are kept
    #[arg(long, value_name = "DIR", env = "ORRERY_RUNS", default_value = "runs")]
    pub runs: PathBuf,
    /// Replay a log of inputs; standard input is then ignored
    #[arg(long, value_name = "FILE")]
    pub inputs: Option<PathBuf>,
    /// Take no console input
    #[arg(long)]
    pub no_input: bool,
    /// Do not show the console and the summary
    #[arg(long, short)]
    pub quiet: bool,
    /// Print the summary as JSON, as the last line of standard output, instead of on standard error
    #[arg(long)]
    pub json: bool,
    /// Instructions per link of the hash chain
    #[arg(long, value_name = "N", default_value_t = EPOCH_INSTRUCTIONS, value_parser = clap::value_parser!(u64).range(1..))]
    pub epoch: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub snapshots: SnapshotArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: EngineArgs,
}

/// When automatic snapshots are taken. They change nothing in the guest.
#[derive(Args, Debug, Clone)]
pub struct SnapshotArgs {
    /// Take no automatic snapshots
    #[arg(long)]
    pub no_snapshots: bool,
    /// Instructions between automatic snapshots
    #[arg(long, value_name = "N", default_value_t = EVERY_INSTRUCTIONS, value_parser = clap::value_parser!(u64).range(1..))]
    pub snapshot_every: u64,
    /// Take a snapshot early when so much memory has been written, in MiB
    #[arg(long, value_name = "MIB", default_value_t = DIRTY_BYTES >> 20, value_parser = clap::value_parser!(u64).range(1..1 << 24))]
    pub snapshot_dirty: u64,
    /// Keep so many automatic snapshots: beyond, every second one goes and the distance doubles
    #[arg(long, value_name = "N", default_value_t = MOST as u64, value_parser = clap::value_parser!(u64).range(2..1 << 20))]
    pub snapshot_most: u64,
}

impl SnapshotArgs {
    /// What these flags ask for.
    pub fn options(&self) -> Option<SnapshotOptions> {
        (!self.no_snapshots).then_some(SnapshotOptions {
            every_instructions: self.snapshot_every,
            dirty_bytes: self.snapshot_dirty << 20,
            most: self.snapshot_most as usize,
        })
    }
}

/// Where runs are, for commands about moments.
#[derive(Args, Debug, Clone)]
pub struct PlaceArgs {
    /// Where runs are kept
    #[arg(long, value_name = "DIR", env = "ORRERY_RUNS", default_value = "runs")]
    pub runs: PathBuf,
    /// The run's image, if it is not where it was
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
}

/// Arguments of `orrery snapshot`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery snapshot hello-1-001@400000000

Runs to that moment from the nearest snapshot before it, and stores its complete state. The moment is
reached at once from then on. `orrery store gc` never removes such a snapshot for its age or size.")]
pub struct SnapshotCommandArgs {
    /// The moment, as RUN@ICOUNT; the beginning of the run's name is enough
    pub moment: MomentName,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub places: PlaceArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery branch`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery branch hello-1-001@400000000                  the same future again
  orrery branch hello-1-001@400000000 --seed 7         another future
  orrery branch hello-1-001@400000000 --seed 7 --count 20 --jobs 2
  orrery branch shell-1-001@900000000 --inputs other.jsonl

With the parent's seed and inputs a branch is bit for bit the parent's future. With another seed every
random stream starts anew at the moment; inputs that the parent had later come at the same virtual
time. With --inputs the parent's later inputs are replaced by those of the file.
Exit code 0: all branches ran to their end, whatever that was; with one branch, the guest's own.")]
pub struct BranchArgs {
    /// The moment, as RUN@ICOUNT; the beginning of the run's name is enough
    pub moment: MomentName,
    /// The seed from there on; by default the parent's
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Inputs from there on, instead of the parent's
    #[arg(long, value_name = "FILE")]
    pub inputs: Option<PathBuf>,
    /// How many branches, with seeds counted up from --seed (or from the parent's, plus one)
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub count: u64,
    /// How many run at once
    #[arg(long, value_name = "J", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub jobs: u64,
    /// Stop after exactly this many instructions since power-on
    #[arg(long, value_name = "ICOUNT")]
    pub until: Option<u64>,
    /// Stop at this virtual time: a number with ns, us, ms, s or min
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub until_virtual: Option<u64>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub places: PlaceArgs,
    /// Do not show the console and the summary
    #[arg(long, short)]
    pub quiet: bool,
    /// Print the summaries as JSON, one line per branch
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub snapshots: SnapshotArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: EngineArgs,
}

/// Arguments of `orrery runs` and `orrery tree`.
#[derive(Args, Debug)]
pub struct RunsArgs {
    /// Where runs are kept
    #[arg(long, value_name = "DIR", env = "ORRERY_RUNS", default_value = "runs")]
    pub runs: PathBuf,
    /// Only runs whose name begins like this
    pub name: Option<String>,
    /// Print one JSON object per run
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery diff`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery diff hello-1-001 hello-2-001

Shows the first instruction after which the two runs differ in a register, in memory or in time, and
the console around it. Exit code 0: they do not differ. 232: they do.")]
pub struct DiffArgs {
    /// A run
    pub first: String,
    /// Another run of the same image and machine
    pub second: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub places: PlaceArgs,
    /// Lines of console output to show before and after
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub lines: usize,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery store`.
#[derive(Args, Debug)]
pub struct StoreArgs {
    /// What to do with the store.
    #[command(subcommand)]
    pub command: StoreCommand,
}

/// What `orrery store` can do.
#[derive(Subcommand, Debug)]
pub enum StoreCommand {
    /// Verify everything in the store, and say which snapshots are lost
    Check(StoreCheckArgs),
    /// Remove snapshots by age and size, and what no snapshot needs
    Gc(StoreGcArgs),
}

/// Arguments of `orrery store check`.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit code 0: no damage. 234: there is damage. A lost snapshot costs time only: its moment is reached
from the one before it. `orrery store gc` removes what is damaged."
)]
pub struct StoreCheckArgs {
    /// Where runs are kept
    #[arg(long, value_name = "DIR", env = "ORRERY_RUNS", default_value = "runs")]
    pub runs: PathBuf,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery store gc`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery store gc --dry-run
  orrery store gc --max-size 2000 --older-than 30

Without flags only what no snapshot needs goes, such as that of runs that have been removed. Snapshots
made by `orrery snapshot` stay. Runs can be reproduced without any snapshot.")]
pub struct StoreGcArgs {
    /// Where runs are kept
    #[arg(long, value_name = "DIR", env = "ORRERY_RUNS", default_value = "runs")]
    pub runs: PathBuf,
    /// Remove automatic snapshots until the store has at most so many MiB, oldest runs first
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(..1 << 40))]
    pub max_size: Option<u64>,
    /// Remove automatic snapshots of runs that have not been written to for so many days
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u64).range(..1 << 24))]
    pub older_than: Option<u64>,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery export`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery export hello-1-001 -o hello.orrery
  orrery import hello.orrery

The file has the run's manifest, console, hash chain, inputs and image: all that is needed to go
through it again elsewhere. It has no snapshots.")]
pub struct ExportArgs {
    /// The run
    pub run: String,
    /// Where to write it
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Leave the image out: whoever imports the run has it
    #[arg(long)]
    pub no_image: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub places: PlaceArgs,
}

/// Arguments of `orrery import`.
#[derive(Args, Debug)]
pub struct ImportArgs {
    /// A file made by `orrery export`
    pub file: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub places: PlaceArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery verify`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery verify hello.img --seed 1 --times 3
  orrery verify hello.img --seed 1 --times 5 --perturb --until 2000000000

With --perturb every run after the first is disturbed in ways that must not matter, drawn from a
number that is printed: the engine's caches and blocks, random flushes, where the machine is stopped,
moving it to a new engine, branching and going back in mid-run. The states must be equal all the same.
Exit code 0: all runs are equal. 232: they differ; the first differing instruction is shown.")]
pub struct VerifyArgs {
    /// The image, as made by `orrery image build`
    pub image: PathBuf,
    /// The number that every random choice derives from
    #[arg(long, value_name = "N")]
    pub seed: u64,
    /// How many runs to compare
    #[arg(long, value_name = "K", default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub times: u32,
    /// Disturb every run after the first in ways that must not matter
    #[arg(long)]
    pub perturb: bool,
    /// The number that the disturbances of the second run derive from, for later runs one more each [default: random]
    #[arg(long, value_name = "N")]
    pub perturb_seed: Option<u64>,
    /// Use one perturbation, by number, in every run after the first
    #[arg(long, hide = true, value_name = "K")]
    pub perturbation: Option<u32>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub machine: MachineArgs,
    /// Compare the first so many instructions only
    #[arg(long, value_name = "ICOUNT")]
    pub until: Option<u64>,
    /// Compare up to this virtual time only: a number with ns, us, ms, s or min
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub until_virtual: Option<u64>,
    /// Replay a log of inputs in every run
    #[arg(long, value_name = "FILE")]
    pub inputs: Option<PathBuf>,
    /// Instructions per compared epoch
    #[arg(long, value_name = "N", default_value_t = 1 << 26, value_parser = clap::value_parser!(u64).range(1..))]
    pub epoch: u64,
    /// Show nothing but errors
    #[arg(long, short)]
    pub quiet: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: EngineArgs,
}

/// Arguments of `orrery doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery image`.
#[derive(Args, Debug)]
pub struct ImageArgs {
    /// What to do with images.
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// What `orrery image` can do.
#[derive(Subcommand, Debug)]
pub enum ImageCommand {
    /// Build an image from a kernel and a root file system
    Build(Box<ImageBuildArgs>),
    /// Show what is in an image
    Inspect(ImageInspectArgs),
    /// Write an image's kernel, initramfs and disks to files
    Extract(ImageExtractArgs),
}

/// Arguments of `orrery image build`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery image build --kernel linux-image-6.1.0-18-cloud-amd64_6.1.76-1_amd64.deb \\
      --root rootfs/ -o shell.img -- /bin/sh -l
  orrery image build --kernel vmlinuz --root root.tar --env TZ=UTC -o server.img -- /usr/bin/server")]
pub struct ImageBuildArgs {
    /// Kernel: a Debian package, a bzImage or a vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Root file system: a directory or a tar archive
    #[arg(long, value_name = "DIR|TAR")]
    pub root: PathBuf,
    /// Modules of a bare kernel, such as /lib/modules/VERSION; a package brings its own
    #[arg(long, value_name = "DIR")]
    pub modules: Option<PathBuf>,
    /// Command that the guest runs, with its arguments (also after --)
    #[arg(long, value_name = "CMD")]
    pub entry: Option<String>,
    /// A variable of the command's environment
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub env: Vec<(String, String)>,
    /// Additional kernel command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Working directory of the command [default: /]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<String>,
    /// Host name of the guest [default: orrery]
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Size of the root disk, in MiB; by default the contents and 256 MiB
    #[arg(long, value_name = "MIB")]
    pub disk_size: Option<u64>,
    /// Where to write the image
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Print the image's description as JSON
    #[arg(long)]
    pub json: bool,
    /// The command's arguments, or the command itself if there is no --entry
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// Arguments of `orrery image inspect`.
#[derive(Args, Debug)]
pub struct ImageInspectArgs {
    /// The image
    pub image: PathBuf,
    /// Print the description as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery image extract`.
#[derive(Args, Debug)]
pub struct ImageExtractArgs {
    /// The image
    pub image: PathBuf,
    /// Directory to write to; made if it is missing
    pub directory: PathBuf,
}

/// Where a run and its image are.
#[derive(Args, Debug, Clone)]
pub struct RunPlaceArgs {
    /// Where runs are kept
    #[arg(long, value_name = "DIR", env = "ORRERY_RUNS", default_value = "runs")]
    pub runs: PathBuf,
    /// The run's image, if it is not where it was
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
}

/// A moment of a run.
#[derive(Args, Debug, Clone)]
pub struct MomentArgs {
    /// The moment: a run, or the beginning of its name, and the number of instructions since its power-on, or `end`
    #[arg(value_name = "RUN@ICOUNT")]
    pub moment: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub place: RunPlaceArgs,
}

/// Arguments of `orrery ps`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery ps go-1-001@1800000000
  orrery ps go-1-001@1800000000 --threads --json

The list is read from the kernel's memory; nothing runs in the guest. TIME is how long a thread has
run, in seconds of virtual time, CR3 the root of its page tables, * marks the one on the vCPU.")]
pub struct PsArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moment: MomentArgs,
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
  orrery backtrace go-1-001@1800000000
  orrery backtrace go-1-001@1800000000 --pid 1
  orrery backtrace go-1-001@1800000000 --all

Frames without a remark were found by the compiler's and the kernel's unwind tables. A frame marked
as a guess is a word on the stack that looks like a return address; it may be wrong.")]
pub struct BacktraceArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moment: MomentArgs,
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
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moment: MomentArgs,
    /// Print the registers as JSON, numbers as hexadecimal text
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery memory`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery memory go-1-001@1800000000 linux_banner
  orrery memory go-1-001@1800000000 0x400000 --pid 1 --length 4096
  orrery memory go-1-001@1800000000 0x20000 --physical

An address is a hexadecimal number or a symbol (NAME, OBJECT:NAME, NAME+OFFSET). It is translated by
the page tables that the vCPU uses at the moment, or by those of the process given with --pid.")]
pub struct MemoryArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moment: MomentArgs,
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
  orrery disassemble go-1-001@1800000000
  orrery disassemble go-1-001@1800000000 do_sys_openat2 --count 40
  orrery disassemble go-1-001@1800000000 main.main --pid 1")]
pub struct DisassembleArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moment: MomentArgs,
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

The run is run again and its stack is sampled every so many instructions: the same samples every
time. Functions of the kernel end in _[k]. An idle guest executes nothing, so it is not seen here.")]
pub struct ProfileArgs {
    /// The run, or the beginning of its name
    pub run: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub place: RunPlaceArgs,
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

The guest goes on from the moment in a branch of its own, with the shell in it; the branch ends with
the shell and leaves nothing behind. The command's exit code becomes the shell's. The image must have
been built by a version of Orrery with this command, and must have a shell (/bin/sh).")]
pub struct ShellArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moment: MomentArgs,
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

The guest's own kernel reads the file, in a branch that is thrown away: its agent stops every other
process first, which takes it a few thousand instructions from the moment on. With --disk nothing
runs: the file is read from the guest's disk, where what the guest has not written back is missing.")]
pub struct CatArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moment: MomentArgs,
    /// Path of the file in the guest
    pub path: String,
    /// Read from the guest's disk, without running the guest
    #[arg(long)]
    pub disk: bool,
    /// Say how far the guest had to run
    #[arg(long, short, conflicts_with = "disk")]
    pub verbose: bool,
}

/// Where a run and its image are.
#[derive(Args, Debug, Clone)]
pub struct SubjectArgs {
    /// Where runs are kept
    #[arg(long, value_name = "DIR", env = "ORRERY_RUNS", default_value = "runs")]
    pub runs: PathBuf,
    /// The run's image, if it is not where it was when the run was made
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Use no snapshots: run again from power-on
    #[arg(long)]
    pub from_power_on: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: EngineArgs,
}

/// Arguments of `orrery replay`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery replay go-1-001 --to 1800000000
  orrery replay go-1-001 --to-console \"listening on\"
  orrery replay go-1-001 --to-end --hash --json

Runs again from the nearest moment that is stored and stops at exactly the one asked for. --to-console
stops when the first line that contains the text has left the machine. The run is not changed.")]
pub struct ReplayArgs {
    /// The run, or the beginning of its name; RUN@ICOUNT is the same as RUN --to ICOUNT
    #[arg(value_name = "RUN")]
    pub run: String,
    /// Stop after exactly this many instructions
    #[arg(long, value_name = "ICOUNT", group = "target")]
    pub to: Option<u64>,
    /// Stop when a line of the console that contains this text is complete
    #[arg(long, value_name = "TEXT", group = "target")]
    pub to_console: Option<String>,
    /// Stop where the run ended
    #[arg(long, group = "target")]
    pub to_end: bool,
    /// Show the hash of the state too
    #[arg(long)]
    pub hash: bool,
    /// How many of the last lines of the console to show
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub lines: usize,
    /// Print what is there as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub subject: SubjectArgs,
}

/// Arguments of `orrery debug`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery debug go-1-001@1800000000 --gdb
  orrery debug race-7-001 --gdb -- -ex \"symbol-file ./race\"
  orrery debug go-1-001@end --listen 127.0.0.1:1234     # then, in gdb: target remote :1234

In gdb everything works backwards too: reverse-stepi, reverse-continue, reverse-finish, and a
watchpoint with reverse-continue leads to the last write. `monitor help` lists what Orrery adds.
Memory and registers can be changed on a branch only (`monitor branch`); the run itself never is.
Without @ICOUNT the debugger starts at the end of the run. See docs/debugging.md.")]
pub struct DebugArgs {
    /// The run and the moment to start at
    #[arg(value_name = "RUN[@ICOUNT]")]
    pub moment: String,
    /// Address to wait for gdb at; one that others can reach gives them the guest
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:1234", conflicts_with = "gdb")]
    pub listen: String,
    /// End when the first connection ends, instead of waiting for another
    #[arg(long)]
    pub once: bool,
    /// Start gdb, connected
    #[arg(long)]
    pub gdb: bool,
    /// Arguments for gdb, after --
    #[arg(last = true, value_name = "ARG", requires = "gdb")]
    pub gdb_arguments: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub subject: SubjectArgs,
}

/// Arguments of `orrery last-write`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery last-write race-7-001@2000000000 0x4c7310:8
  orrery last-write go-1-001@end main.counter:8
  orrery last-write go-1-001@end jiffies:8 --json

ADDRESS is a number or a symbol's name, as the running process sees it at the moment. What is found is
the last write to the memory behind it, by whichever process, address or device.")]
pub struct LastWriteArgs {
    /// The moment before which to look
    #[arg(value_name = "RUN@ICOUNT")]
    pub moment: String,
    /// What to look for, and how many bytes of it (8 if not given)
    #[arg(value_name = "ADDRESS[:SIZE]")]
    pub place: String,
    /// Print what is found as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub subject: SubjectArgs,
}

/// Arguments of `orrery when`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery when go-1-001 --pc do_sys_openat2 --limit 20
  orrery when race-7-001 --pc 0x401a30 --from 1500000000 --json

Each line is the number of instructions before an execution: RUN@NUMBER stands right before it.
A symbol of a program is known only while the program runs: --at names such a moment.")]
pub struct WhenArgs {
    /// The run
    #[arg(value_name = "RUN")]
    pub run: String,
    /// The instruction: its address, or a symbol's name for its first instruction
    #[arg(long, value_name = "SYMBOL|ADDRESS")]
    pub pc: String,
    /// Look from this moment on
    #[arg(long, value_name = "ICOUNT", default_value_t = 0)]
    pub from: u64,
    /// Look up to this moment; the end of the run if not given
    #[arg(long, value_name = "ICOUNT")]
    pub to: Option<u64>,
    /// The moment at which the symbol is looked up; without it several are tried
    #[arg(long, value_name = "ICOUNT")]
    pub at: Option<u64>,
    /// Stop after so many executions
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    /// Print only how many there are
    #[arg(long)]
    pub count: bool,
    /// Print each as a line of JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub subject: SubjectArgs,
}

/// Arguments of `orrery trace`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery trace go-1-001@1800000000..1800000100
  orrery trace go-1-001@1800000000..1801000000 --calls

With --calls only calls, returns, system calls, and interrupts are shown, indented by their depth.")]
pub struct TraceArgs {
    /// The run and the two moments
    #[arg(value_name = "RUN@A..B")]
    pub span: String,
    /// Only calls and returns
    #[arg(long)]
    pub calls: bool,
    /// Print each instruction as a line of JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub subject: SubjectArgs,
}

/// Arguments of `orrery completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// Which shell
    pub shell: clap_complete::Shell,
}

/// Parses a virtual time such as `250ms` into nanoseconds.
fn parse_time(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim() {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "min" => 60_000_000_000,
        _ => return Err("expected a number with ns, us, ms, s or min, such as 250ms".into()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| format!("{number:?} is not a number"))?;
    let mut nanoseconds = whole.checked_mul(scale);
    let mut place = scale;
    for digit in fraction.chars() {
        let value = digit.to_digit(10).ok_or_else(|| format!("{number:?} is not a number"))?;
        place /= 10;
        nanoseconds = nanoseconds.and_then(|sum| sum.checked_add(u64::from(value) * place));
    }
    nanoseconds.ok_or_else(|| "the time is too long".into())
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    if name.is_empty() {
        return Err("the variable has no name".into());
    }
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_time("250ms"), Ok(250_000_000));
        assert_eq!(parse_time("1.5s"), Ok(1_500_000_000));
        assert_eq!(parse_time("2min"), Ok(120_000_000_000));
        assert!(parse_time("3").is_err());
        assert!(parse_time("x s").is_err());
        assert!(parse_time("99999999999999min").is_err());
    }
}
