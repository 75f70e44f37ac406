//! Arguments of the commands that run guests: `run`, `branch`, `verify`.

use std::path::PathBuf;

use clap::Args;

use super::shared::{EngineArgs, LimitArgs, MachineArgs, MomentArgs, RunsDirectoryArgs, SnapshotArgs};
use crate::chain::EPOCH_INSTRUCTIONS;

/// Arguments of `orrery run`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery run hello.img --seed 1
  orrery run hello.img --seed 1 --until 1000000000 --json
  echo 'uname -a' | orrery run shell.img --seed 1
  orrery run shell.img --seed 1 --inputs runs/shell-1-001/inputs.jsonl

Console input is taken from standard input (a terminal or a pipe), stamped with the moment at which \
it enters and logged in the run's directory. A run with the same image, machine, seed and \
--inputs goes through the same states.")]
pub struct RunArgs {
    /// The image, as made by `orrery image build`
    pub image: PathBuf,
    /// The number that every random choice derives from
    #[arg(long, value_name = "N")]
    pub seed: u64,
    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Where it ends.
    #[command(flatten)]
    pub limit: LimitArgs,
    /// Where the run is kept.
    #[command(flatten)]
    pub kept: RunsDirectoryArgs,
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
    /// Its automatic snapshots.
    #[command(flatten)]
    pub snapshots: SnapshotArgs,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// Arguments of `orrery branch`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery branch hello-1-001@400000000                  the same future again
  orrery branch hello-1-001@400000000 --seed 7         another future
  orrery branch hello-1-001@400000000 --seed 7 --count 20 --jobs 2
  orrery branch shell-1-001@900000000 --inputs other.jsonl

With the parent's seed and inputs a branch is bit for bit the parent's future. With another seed every \
random stream starts anew at the moment; inputs that the parent had later come at the same virtual \
time. With --inputs the parent's later inputs are replaced by those of the file.
Exit code 0: all branches ran to their end, whatever that was; with one branch, the guest's own.")]
pub struct BranchArgs {
    /// Where it branches off.
    #[command(flatten)]
    pub at: MomentArgs,
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
    /// Where it ends.
    #[command(flatten)]
    pub limit: LimitArgs,
    /// Do not show the console and the summary
    #[arg(long, short)]
    pub quiet: bool,
    /// Print the summaries as JSON, one line per branch
    #[arg(long)]
    pub json: bool,
    /// Its automatic snapshots.
    #[command(flatten)]
    pub snapshots: SnapshotArgs,
}

/// Arguments of `orrery verify`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery verify hello.img --seed 1 --times 3
  orrery verify hello.img --seed 1 --times 5 --perturb --until 2000000000

With --perturb every run after the first is disturbed in ways that must not matter, drawn from a \
number that is printed: the engine's caches and blocks, random flushes, where the machine is stopped, \
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
    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Where it ends.
    #[command(flatten)]
    pub limit: LimitArgs,
    /// Replay a log of inputs in every run
    #[arg(long, value_name = "FILE")]
    pub inputs: Option<PathBuf>,
    /// Instructions per compared epoch
    #[arg(long, value_name = "N", default_value_t = 1 << 28, value_parser = clap::value_parser!(u64).range(1..))]
    pub epoch: u64,
    /// Show nothing but errors
    #[arg(long, short)]
    pub quiet: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}
