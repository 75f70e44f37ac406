//! `orrery when`.

use std::io::{BufWriter, Write};

use super::args::WhenArgs;
use super::exit::Failure;
use super::place::{Place, Progress, debug_failure};
use crate::debug::{DebugError, place, search};

pub(super) fn when(arguments: WhenArgs) -> Result<u8, Failure> {
    let located = Place::find(&arguments.run, &arguments.reach)?;
    let until = located.icount(arguments.to)?;
    // A number means the same everywhere; a name is looked for where it is known.
    let start = match place::number(&arguments.pc) {
        Some(_) => arguments.from,
        None => arguments.at.unwrap_or(until),
    };
    let mut session = located.session(start)?;
    let progress = Progress::new("looking for the symbol", until);
    let addresses = match arguments.at {
        Some(_) => place::addresses(&session, &arguments.pc),
        None => place::addresses_sometime(&mut session, &arguments.pc, &mut progress.watcher()),
    };
    progress.finish();
    let addresses = addresses.map_err(debug_failure)?;
    if addresses.is_empty() {
        return Err(debug_failure(DebugError::NoSymbol { name: arguments.pc }));
    }
    let progress = Progress::new("looking", until);
    let mut watcher = progress.watcher();
    session.go_to(arguments.from, &mut watcher).map_err(debug_failure)?;
    let limit = arguments.limit.unwrap_or(u64::MAX);
    let mut out = BufWriter::new(std::io::stdout());
    let (mut count, mut open) = (0, true);
    let searched = search::executions(&mut session, &addresses, until, &mut watcher, |execution| {
        if count == limit {
            return false;
        }
        count += 1;
        if !arguments.count {
            let written = match arguments.json {
                true => writeln!(out, "{}", serde_json::to_string(&execution).expect("plain data")),
                false => writeln!(out, "{} {:#x}", execution.icount, execution.rip),
            };
            open = written.is_ok();
        }
        open
    });
    progress.finish();
    let flushed = out.flush();
    searched.map_err(debug_failure)?;
    if arguments.count {
        match arguments.json {
            true => say!("{{\"count\":{count}}}"),
            false => say!("{count}"),
        }
    } else if flushed.is_ok() && open && !arguments.json {
        eprintln!("orrery: {count} executions from icount {} to {}", arguments.from, session.position().icount);
    }
    Ok(0)
}
