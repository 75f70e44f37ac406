//! `orrery memory`.

use std::io::Write;

use super::args::MemoryArgs;
use super::exit::{self, Failure};
use super::place;
use super::ps::failure;
use crate::inspect::{AddressSpace, Inspector};

/// Bytes of one line of a dump.
const LINE: u64 = 16;

pub(super) fn memory(arguments: MemoryArgs) -> Result<u8, Failure> {
    let (_place, moment) = place::open(&arguments.at)?;
    let machine = &moment.machine;
    let inspector = Inspector::new(machine);
    let space = space(&inspector, arguments.pid, arguments.physical)?;
    let address = resolve(&inspector, &arguments.address)?;
    let bytes = space.read_up_to(address, arguments.length as usize);
    if bytes.is_empty() {
        // Reading one byte says why.
        let error = space.read(address, &mut [0]).expect_err("nothing could be read");
        return Err(Failure::new(exit::INSPECT, error));
    }
    if arguments.raw {
        let _ = std::io::stdout().write_all(&bytes);
    } else if arguments.json {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let whole = bytes.len() as u64 == arguments.length;
        super::say(serde_json::json!({ "address": format!("{address:#x}"), "bytes": hex, "complete": whole }));
    } else {
        dump(address, &bytes);
    }
    if (bytes.len() as u64) < arguments.length {
        let end = address.wrapping_add(bytes.len() as u64);
        eprintln!("orrery: nothing is mapped at {end:#x}; {} of {} bytes read", bytes.len(), arguments.length);
    }
    Ok(0)
}

/// The memory that `--pid` and `--physical` ask for.
pub(super) fn space<'a>(
    inspector: &Inspector<'a>,
    pid: Option<i32>,
    physical: bool,
) -> Result<AddressSpace<'a>, Failure> {
    Ok(match pid {
        _ if physical => inspector.physical(),
        Some(pid) => inspector.space_of(&inspector.task(pid).map_err(failure)?),
        None => inspector.current_space(),
    })
}

/// An address: a number, hexadecimal with or without 0x, or a symbol with or without +OFFSET.
pub(super) fn resolve(inspector: &Inspector, text: &str) -> Result<u64, Failure> {
    let (base, offset) = match text.rsplit_once('+') {
        Some((base, offset)) => match number(offset) {
            Some(offset) => (base, offset),
            None => (text, 0),
        },
        None => (text, 0),
    };
    if let Some(address) = base.strip_prefix("0x").and_then(|hex| u64::from_str_radix(&hex.replace('_', ""), 16).ok()) {
        return Ok(address.wrapping_add(offset));
    }
    let mut places = inspector.lookup(base);
    places.dedup_by_key(|place| place.address);
    match places.as_slice() {
        [place] => Ok(place.address.wrapping_add(offset)),
        [] => match u64::from_str_radix(base, 16) {
            Ok(address) => Ok(address.wrapping_add(offset)),
            Err(_) => {
                Err(Failure::new(exit::INSPECT, format!("{base} is neither an address nor a symbol of the guest")))
            }
        },
        many => {
            let list: Vec<String> = many
                .iter()
                .take(8)
                .map(|place| format!("{:#x} ({})", place.address, place.object.as_deref().unwrap_or("kernel")))
                .collect();
            let text =
                format!("{base} has {} addresses: {}; give one of them, or OBJECT:{base}", many.len(), list.join(", "));
            Err(Failure::new(exit::INSPECT, text))
        }
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn dump(address: u64, bytes: &[u8]) {
    let mut at = address & !(LINE - 1);
    let end = address.wrapping_add(bytes.len() as u64 - 1);
    loop {
        let (mut hex, mut text) = (String::new(), String::new());
        for place in 0..LINE {
            let byte = at.wrapping_add(place).checked_sub(address).and_then(|index| bytes.get(index as usize));
            if place == LINE / 2 {
                hex.push(' ');
            }
            match byte {
                Some(byte) => {
                    hex += &format!("{byte:02x} ");
                    text.push(if (0x20..0x7F).contains(byte) { char::from(*byte) } else { '.' });
                }
                None => {
                    hex += "   ";
                    text.push(' ');
                }
            }
        }
        say!("{at:016x}  {hex} |{text}|");
        if end.wrapping_sub(at) < LINE {
            break;
        }
        at = at.wrapping_add(LINE);
    }
}
