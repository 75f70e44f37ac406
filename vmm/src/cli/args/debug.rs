//! Arguments of the commands that go back and forth in a run: `replay`, `debug`, `last-write`, `when`, `trace`.

use clap::Args;

use super::shared::ReachArgs;
use crate::moment::MomentName;

/// Arguments of `orrery replay`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery replay go-1-001 --to 850000000
  orrery replay go-1-001 --to-console \"listening on\"
  orrery replay go-1-001 --to-end --hash --json

Runs again from the nearest moment that is stored and stops at exactly the one asked for. --to-console \
stops when the first line that contains the text has left the machine. The run is not changed.")]
pub struct ReplayArgs {
    /// The run, or the beginning of its name; RUN@ICOUNT is the same as RUN --to ICOUNT
    #[arg(value_name = "RUN")]
    pub run: MomentName,
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
    /// How its moments are reached.
    #[command(flatten)]
    pub reach: ReachArgs,
}

/// Arguments of `orrery debug`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery debug go-1-001@850000000 --gdb
  orrery debug race-7-001 --gdb -- -ex \"symbol-file ./race\"
  orrery debug go-1-001@end --listen 127.0.0.1:1234     # then, in gdb: target remote :1234

In gdb everything works backwards too: reverse-stepi, reverse-continue, reverse-finish, and a \
watchpoint with reverse-continue leads to the last write. `monitor help` lists what Orrery adds. \
Memory and registers can be changed on a branch only (`monitor branch`); the run itself never is. \
Without @ICOUNT the debugger starts at the end of the run. See docs/debugging.md.")]
pub struct DebugArgs {
    /// The run and the moment to start at
    #[arg(value_name = "RUN[@ICOUNT]")]
    pub moment: MomentName,
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
    /// How its moments are reached.
    #[command(flatten)]
    pub reach: ReachArgs,
}

/// Arguments of `orrery last-write`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery last-write race-7-001@2000000000 0x4c7310:8
  orrery last-write go-1-001@end main.counter:8
  orrery last-write go-1-001@end jiffies:8 --json

ADDRESS is a number or a symbol's name, as the running process sees it at the moment. What is found is \
the last write to the memory behind it, by whichever process, address or device.")]
pub struct LastWriteArgs {
    /// The moment before which to look
    #[arg(value_name = "RUN@ICOUNT")]
    pub moment: MomentName,
    /// What to look for, and how many bytes of it (8 if not given)
    #[arg(value_name = "ADDRESS[:SIZE]")]
    pub place: String,
    /// Print what is found as JSON
    #[arg(long)]
    pub json: bool,
    /// How its moments are reached.
    #[command(flatten)]
    pub reach: ReachArgs,
}

/// Arguments of `orrery when`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery when go-1-001 --pc do_sys_openat2 --limit 20
  orrery when race-7-001 --pc 0x401a30 --from 1500000000 --json

Each line is the number of instructions before an execution: RUN@NUMBER stands right before it. \
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
    /// How its moments are reached.
    #[command(flatten)]
    pub reach: ReachArgs,
}

/// Arguments of `orrery trace`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery trace go-1-001@850000000..850000100
  orrery trace go-1-001@850000000..851000000 --calls

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
    /// How its moments are reached.
    #[command(flatten)]
    pub reach: ReachArgs,
}
