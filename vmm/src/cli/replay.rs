//! `orrery replay`.

use serde::Serialize;

use super::args::ReplayArgs;
use super::exit::{self, Failure};
use super::place::{Place, debug_failure};
use super::ps::printable;
use crate::chain::Hash;
use crate::debug::{Session, place};
use crate::run::directory::read_console;

#[derive(Serialize)]
struct There {
    run: String,
    icount: u64,
    /// Last icount of the run, if it is known.
    end: Option<u64>,
    virtual_ns: u64,
    rip: u64,
    symbol: Option<String>,
    instruction: String,
    cpl: u8,
    halted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Process>,
    /// The console before this moment: icount and text.
    console: Vec<(u64, String)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    state_hash: Option<Hash>,
}

#[derive(Serialize)]
struct Process {
    pid: i32,
    tid: i32,
    name: String,
}

pub(super) fn replay(arguments: ReplayArgs) -> Result<u8, Failure> {
    let place = Place::find(&arguments.run.run, &arguments.reach)?;
    let console = match &arguments.to_console {
        Some(_) => read_console(&place.run.path).map_err(|error| debug_failure(error.into()))?,
        None => Vec::new(),
    };
    let target = match (&arguments.to_console, arguments.to.or(arguments.run.icount.map(|icount| icount.0))) {
        (Some(text), _) => match console.iter().find(|line| line.text.contains(text)) {
            Some(line) => line.icount,
            None => {
                let message = format!("the console of run {} never shows {text:?}", place.run.id());
                return Err(Failure::new(exit::INSPECT, message));
            }
        },
        (None, Some(icount)) if !arguments.to_end => icount,
        _ => place.icount(None)?,
    };
    let mut session = place.session(target)?;
    if arguments.to_console.is_some() {
        // The log has the moment of the line's first byte.
        session.next_console_line().map_err(debug_failure)?;
    }
    let state_hash = arguments.hash.then(|| session.state_hash());
    let there = look(&session, arguments.lines, state_hash);
    if arguments.json {
        super::say(serde_json::to_string(&there).expect("plain data"));
    } else {
        print(&there);
    }
    Ok(0)
}

fn look(session: &Session, lines: usize, state_hash: Option<Hash>) -> There {
    let machine = session.machine();
    let cpu = machine.cpu();
    let inspector = session.inspector();
    let process = inspector.current_process().ok();
    There {
        run: session.subject().manifest().id.clone(),
        icount: machine.icount().0,
        end: session.end().map(|(end, _)| end),
        virtual_ns: machine.time().0,
        rip: cpu.rip,
        symbol: inspector.symbolize(cpu.rip).map(|symbol| symbol.to_string()),
        instruction: place::disassemble(machine, cpu.rip).0,
        cpl: cpu.cpl,
        halted: cpu.halted,
        process: process.map(|task| Process { pid: task.pid, tid: task.tid, name: task.name }),
        console: session.subject().console_until(machine.icount().0, lines),
        state_hash,
    }
}

fn print(there: &There) {
    let end = there.end.map_or(String::new(), |end| format!(" of {end}"));
    say!("run       {}", there.run);
    say!("icount    {}{end}", there.icount);
    say!("virtual   {:.9} s", there.virtual_ns as f64 / 1e9);
    let symbol = there.symbol.as_deref().map_or(String::new(), |symbol| format!(" {symbol}"));
    say!("rip       {:#x}{}", there.rip, printable(&symbol));
    let mode = if there.cpl == 3 { "user" } else { "kernel" };
    let halted = if there.halted { ", halted" } else { "" };
    say!("next      {} ({mode} mode{halted})", there.instruction);
    if let Some(process) = &there.process {
        say!("process   {} {} (thread {})", process.pid, printable(&process.name), process.tid);
    }
    if let Some(hash) = &there.state_hash {
        say!("state     {hash}");
    }
    for (icount, line) in &there.console {
        say!("console   {icount:>12} {line}");
    }
}
