//! What people call a place in a guest: a number, or a symbol's name.

use super::session::{Session, Watcher};
use super::{DebugError, memory};
use crate::inspect::Inspector;

/// Moments at which a name is looked for, as parts of 64 of the run, likeliest first.
const LOOKED_AT: [u64; 7] = [60, 48, 32, 40, 56, 24, 62];

/// A number: hexadecimal with 0x, or decimal.
pub fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The addresses that a number or a name stands for in the guest as it is now. Empty if the name is not known.
pub fn addresses(session: &Session, text: &str) -> Result<Vec<u64>, DebugError> {
    if let Some(address) = number(text) {
        return Ok(vec![address]);
    }
    if text.is_empty() || text.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(DebugError::BadPlace { text: text.to_owned() });
    }
    let mut addresses: Vec<u64> = session.inspector().lookup(text).into_iter().map(|place| place.address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// The addresses that a number or a name stands for now, or else at other moments of the run: a program's names are
/// known only while it runs. The session may stand at another moment afterwards.
pub fn addresses_sometime(session: &mut Session, text: &str, watcher: Watcher) -> Result<Vec<u64>, DebugError> {
    let found = addresses(session, text)?;
    if !found.is_empty() {
        return Ok(found);
    }
    if let Some((end, _)) = session.end() {
        for part in LOOKED_AT {
            session.go_to(end / 64 * part, watcher)?;
            let found = addresses(session, text)?;
            if !found.is_empty() {
                return Ok(found);
            }
        }
    }
    Err(DebugError::NoSymbol { name: text.to_owned() })
}

/// `NAME+0x12 [object]` for an address, or the bare address.
pub fn describe(inspector: &Inspector, address: u64) -> String {
    match inspector.symbolize(address) {
        Some(symbol) => format!("{address:#x} {symbol}"),
        None => format!("{address:#x}"),
    }
}

/// The instruction at a linear address as text, and its length; "(not mapped)" if it cannot be read.
pub fn disassemble(machine: &crate::Machine, address: u64) -> (String, usize) {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
    let cpu = machine.cpu();
    let mut bytes = [0; 15];
    let read = memory::read(&machine.board().memory, cpu, address, &mut bytes);
    if read == 0 {
        return ("(not mapped)".to_owned(), 0);
    }
    let bitness = if cpu.is_64bit() { 64 } else { 32 };
    let instruction = Decoder::with_ip(bitness, &bytes[..read], address, DecoderOptions::NONE).decode();
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    (text, instruction.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("0x1F"), Some(31));
        assert_eq!(number("31"), Some(31));
        assert_eq!(number("0xffffffffffffffff"), Some(u64::MAX));
        assert_eq!(number("main"), None);
        assert_eq!(number(""), None);
        assert_eq!(number("0x1ffffffffffffffff"), None);
    }
}
