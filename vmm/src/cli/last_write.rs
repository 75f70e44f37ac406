//! `orrery last-write`.

use super::args::LastWriteArgs;
use super::exit::{self, Failure};
use super::place::{Place, Progress, debug_failure};
use super::ps::printable;
use crate::debug::{DebugError, place, search};

/// Bytes that are meant if none are given.
const SIZE: u64 = 8;

/// `ADDRESS[:SIZE]`: what is before a colon and a number, and the number.
fn split(text: &str) -> Result<(&str, u64), Failure> {
    match text.rsplit_once(':') {
        Some((place, size)) if size.starts_with(|first: char| first.is_ascii_digit()) => match place::number(size) {
            Some(size) if (1..=search::BYTES_MAX).contains(&size) => Ok((place, size)),
            _ => {
                let message = format!("{size} is not a number of bytes from 1 to {}", search::BYTES_MAX);
                Err(Failure::new(exit::USAGE, message))
            }
        },
        _ => Ok((text, SIZE)),
    }
}

pub(super) fn last_write(arguments: LastWriteArgs) -> Result<u8, Failure> {
    let (name, size) = split(&arguments.place)?;
    let located = Place::find(&arguments.moment.run, &arguments.reach)?;
    let icount = located.icount(arguments.moment.icount.map(|icount| icount.0))?;
    let mut session = located.session(icount)?;
    let addresses = place::addresses(&session, name).map_err(debug_failure)?;
    let Some(address) = addresses.first() else {
        return Err(debug_failure(DebugError::NoSymbol { name: name.to_owned() }));
    };
    let progress = Progress::new("looking back", icount);
    let found = search::last_write(&mut session, *address, size, &mut progress.watcher());
    progress.finish();
    let found = found.map_err(debug_failure)?;
    if arguments.json {
        super::say(serde_json::to_string(&found).expect("plain data"));
        return Ok(0);
    }
    let Some(write) = found else {
        say!("nothing has written {size} bytes at {address:#x} since power-on");
        return Ok(0);
    };
    let run = &session.subject().manifest().id;
    let symbol = write.symbol.as_deref().map_or(String::new(), |symbol| format!(" {}", printable(symbol)));
    say!("moment    {run}@{} (virtual {:.9} s)", write.icount, write.virtual_ns as f64 / 1e9);
    match write.by {
        "processor" => say!("by        {:#x}{symbol}: {}", write.rip, write.instruction),
        "page-walk" => say!("by        the page walk of {:#x}{symbol}: {}", write.rip, write.instruction),
        _ => say!("by        a device, before {:#x}{symbol}", write.rip),
    }
    if let Some((pid, name)) = &write.process {
        say!("process   {pid} {}", printable(name));
    }
    let linear = write.linear.map_or(String::new(), |linear| format!(" through {linear:#x}"));
    say!("where     physical {:#x}, {} bytes{linear}", write.gpa, write.size);
    say!("before    {}", write.before);
    say!("after     {}", write.after);
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_stand_behind_a_colon() {
        assert_eq!(split("0x1000:4").unwrap(), ("0x1000", 4));
        assert_eq!(split("main.counter").unwrap(), ("main.counter", 8));
        assert_eq!(split("prog:main").unwrap(), ("prog:main", 8));
        assert_eq!(split("prog:main:2").unwrap(), ("prog:main", 2));
        assert!(split("x:0").is_err() && split("x:99999999").is_err());
    }
}
