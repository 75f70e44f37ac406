//! Every flag of the command line, once.

mod debug;
mod image;
mod inspect;
mod run;
mod runs;
mod shared;

use clap::{Args, Parser, Subcommand};

pub use debug::{DebugArgs, LastWriteArgs, ReplayArgs, TraceArgs, WhenArgs};
pub use image::{ImageArgs, ImageBuildArgs, ImageCommand, ImageExtractArgs, ImageInspectArgs};
pub use inspect::{BacktraceArgs, CatArgs, DisassembleArgs, MemoryArgs, ProfileArgs, PsArgs, RegistersArgs, ShellArgs};
pub use run::{BranchArgs, RunArgs, VerifyArgs};
pub use runs::{
    DiffArgs, ExportArgs, ImportArgs, RunsArgs, SnapshotCommandArgs, StoreArgs, StoreCheckArgs, StoreCommand,
    StoreGcArgs,
};
pub use shared::{
    EngineArgs, EngineChoice, LimitArgs, MachineArgs, MomentArgs, PlaceArgs, ReachArgs, RunsDirectoryArgs, SnapshotArgs,
};

/// A deterministic x86-64 hypervisor: State(N) = f(image, machine, seed, inputs).
#[derive(Parser, Debug)]
#[command(name = "orrery", version, max_term_width = 100, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "Examples:
  orrery run hello.img --seed 1              boot an image; its console comes to standard output
  orrery verify hello.img --seed 1 --times 3 prove that three runs go through equal states
  orrery replay hello-1 --to 500000000       stand at a moment of a run and say what is there
  orrery debug hello-1@end --gdb             debug a run with gdb, forwards and backwards
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

/// Arguments of `orrery doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// Which shell
    pub shell: clap_complete::Shell,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
