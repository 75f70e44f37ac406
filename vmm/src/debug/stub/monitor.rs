//! `monitor` commands: what gdb has no words for.

use std::fmt::Write;

use crate::config::Seed;
use crate::debug::session::Session;
use crate::debug::{DebugError, place};

const HELP: &str = "\
help                this list
icount              where the session stands
hash                hash of the state
goto ICOUNT|end     go to State(ICOUNT); then `maintenance flush register-cache`
snapshot            keep this moment in memory, to come back to it quickly
branch [SEED]       leave the run: memory and registers may be changed from here on
return              leave the branch, back to the run
timeline            the run, where it ends, which moments are kept
processes           the guest's processes
console [LINES]     the last lines of the console before this moment
symbol NAME|ADDRESS what an address is, or where a name is
backtrace           the stack of the running task, without debug information";

/// Lines of the console that are shown by default, and at most.
const LINES: usize = 10;
const LINES_MAX: usize = 1000;

/// Carries a command out and gives the answer. What goes wrong is part of the answer: it is for people.
pub fn execute(session: &mut Session, command: &str) -> String {
    answer(session, command).unwrap_or_else(|error| format!("error: {error}"))
}

fn answer(session: &mut Session, command: &str) -> Result<String, DebugError> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let number = |text: &str| place::number(text).ok_or(DebugError::BadPlace { text: text.to_owned() });
    Ok(match words[..] {
        [] | ["help"] => HELP.to_owned(),
        ["icount"] => position(session),
        ["hash"] => session.state_hash().to_string(),
        ["goto", "end"] => match session.end().map(|(end, _)| end) {
            Some(end) => go_to(session, end)?,
            None => "the end of the run is not known: it has not been recorded".to_owned(),
        },
        ["goto", target] => go_to(session, number(target)?)?,
        ["snapshot"] => {
            session.keep();
            let (count, bytes) = session.kept();
            format!("{} is kept; {count} moments, {} MiB", session.position().icount, bytes >> 20)
        }
        ["branch"] => branch(session, None)?,
        ["branch", seed] => branch(session, Some(Seed(number(seed)?)))?,
        ["return"] => {
            session.return_to_run(&mut |_| false)?;
            position(session)
        }
        ["timeline"] => timeline(session),
        ["processes"] => processes(session)?,
        ["console"] => console(session, LINES),
        ["console", lines] => console(session, number(lines)?.min(LINES_MAX as u64) as usize),
        ["symbol", what] => symbol(session, what)?,
        ["backtrace"] => backtrace(session),
        _ => format!("there is no such command: {command:?}; `monitor help` lists them"),
    })
}

fn position(session: &Session) -> String {
    let position = session.position();
    let machine = session.machine();
    let mut text = format!("icount {} virtual {:.9} s", position.icount, machine.time().0 as f64 / 1e9);
    let rip = place::describe(&session.inspector(), machine.cpu().rip);
    let _ = write!(text, " rip {rip}");
    if let Some(floor) = session.floor() {
        let _ = write!(text, " (on a branch that left the run or was changed at {floor})");
    }
    text
}

fn go_to(session: &mut Session, target: u64) -> Result<String, DebugError> {
    session.go_to(target, &mut |_| false)?;
    Ok(position(session))
}

fn branch(session: &mut Session, seed: Option<Seed>) -> Result<String, DebugError> {
    session.branch(seed)?;
    Ok(format!("{}\nmemory and registers may be written; `monitor return` leads back to the run", position(session)))
}

fn timeline(session: &Session) -> String {
    let manifest = session.subject().manifest();
    let mut text =
        format!("run {} seed {} image {:.16}\n", manifest.id, manifest.seed, manifest.image.hash.to_string());
    let _ = match session.end() {
        Some((end, ended)) => writeln!(text, "end: {ended} at icount {end}"),
        None => writeln!(text, "end: not known"),
    };
    let (count, bytes) = session.kept();
    let _ = writeln!(text, "kept in memory: {count} moments, {} MiB", bytes >> 20);
    let _ = write!(text, "here: {}", position(session));
    text
}

fn processes(session: &Session) -> Result<String, DebugError> {
    let mut text = format!("{:>7} {:>7} S {:<16} {}\n", "PID", "PARENT", "NAME", "PAGE TABLES");
    for task in session.inspector().processes()? {
        let root = task.root.map_or("-".to_owned(), |root| format!("{root:#x}"));
        let mark = if task.current { " *" } else { "" };
        let _ =
            writeln!(text, "{:>7} {:>7} {} {:<16} {root}{mark}", task.pid, task.parent, task.state.letter(), task.name);
    }
    Ok(text)
}

fn console(session: &Session, lines: usize) -> String {
    let lines = session.subject().console_until(session.position().icount, lines);
    if lines.is_empty() {
        return "nothing has been written to the console before this moment".to_owned();
    }
    lines.iter().fold(String::new(), |text, (icount, line)| text + &format!("{icount:>12} {line}\n"))
}

fn symbol(session: &Session, what: &str) -> Result<String, DebugError> {
    if let Some(address) = place::number(what) {
        return Ok(place::describe(&session.inspector(), address));
    }
    let places = session.inspector().lookup(what);
    if places.is_empty() {
        return Err(DebugError::NoSymbol { name: what.to_owned() });
    }
    Ok(places.iter().fold(String::new(), |mut text, place| {
        let _ = write!(text, "{:#x} {what}", place.address);
        let _ = match (&place.object, place.pid) {
            (Some(object), Some(pid)) => writeln!(text, " [{object}] in process {pid}"),
            (Some(object), None) => writeln!(text, " [{object}]"),
            _ => writeln!(text),
        };
        text
    }))
}

fn backtrace(session: &Session) -> String {
    let inspector = session.inspector();
    let mut text = String::new();
    for (number, frame) in inspector.backtrace().iter().enumerate() {
        let name = frame.symbol.as_ref().map_or("?".to_owned(), ToString::to_string);
        let _ = writeln!(text, "#{number:<3} {:#018x} {name}", frame.address);
    }
    text
}
