//! Arguments of the commands about runs on disk: `runs`, `tree`, `diff`, `snapshot`, `store`, `export`, `import`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::shared::{MomentArgs, PlaceArgs, ReachArgs, RunsDirectoryArgs};

/// Arguments of `orrery runs` and `orrery tree`.
#[derive(Args, Debug)]
pub struct RunsArgs {
    /// Where the runs are.
    #[command(flatten)]
    pub kept: RunsDirectoryArgs,
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

Shows the first instruction after which the two runs differ in a register, in memory or in time, and \
the console around it. Exit code 0: they do not differ. 232: they do.")]
pub struct DiffArgs {
    /// A run
    pub first: String,
    /// Another run of the same image and machine
    pub second: String,
    /// How their moments are reached.
    #[command(flatten)]
    pub reach: ReachArgs,
    /// Lines of console output to show before and after
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub lines: usize,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery snapshot`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery snapshot hello-1-001@400000000

Runs to that moment from the nearest snapshot before it, and stores its complete state. The moment is \
reached at once from then on. `orrery store gc` never removes such a snapshot for its age or size.")]
pub struct SnapshotCommandArgs {
    /// The moment.
    #[command(flatten)]
    pub at: MomentArgs,
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
    after_help = "Exit code 0: no damage. 234: there is damage. A lost snapshot costs time only: its moment is reached \
from the one before it. `orrery store gc` removes what is damaged."
)]
pub struct StoreCheckArgs {
    /// Where the runs are.
    #[command(flatten)]
    pub kept: RunsDirectoryArgs,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery store gc`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery store gc --dry-run
  orrery store gc --max-size 2000 --older-than 30

Without flags only what no snapshot needs goes, such as that of runs that have been removed. Snapshots \
made by `orrery snapshot` stay. Runs can be reproduced without any snapshot.")]
pub struct StoreGcArgs {
    /// Where the runs are.
    #[command(flatten)]
    pub kept: RunsDirectoryArgs,
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

The file has the run's manifest, console, hash chain, inputs and image: all that is needed to go \
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
    /// Where the run and its image are.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// Arguments of `orrery import`.
#[derive(Args, Debug)]
pub struct ImportArgs {
    /// A file made by `orrery export`
    pub file: PathBuf,
    /// Where the run and its image are.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}
