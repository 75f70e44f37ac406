//! The log of inputs: everything from outside that enters the guest, stamped with the moment at which it did.
//!
//! The file is JSON Lines: a header `{"format":"orrery-inputs","version":1}`, then one object per input, in
//! order, with its bytes in hexadecimal.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use orrery_cpu::Icount;
use orrery_devices::VirtualNs;
use serde::{Deserialize, Serialize};

/// Largest inputs file that is read, in bytes.
pub const INPUTS_FILE_MAX: u64 = 64 << 20;
/// First line of the file.
pub const HEADER: &str = r#"{"format":"orrery-inputs","version":1}"#;

/// Where an input goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputChannel {
    /// The serial console.
    Console,
    /// The guest agent's channel.
    Agent,
}

/// Bytes that entered the guest at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Instructions retired before it.
    pub icount: u64,
    /// Virtual time at which it entered. While the vCPU is halted, this alone moves on.
    pub virtual_ns: u64,
    /// Where it went.
    pub channel: InputChannel,
    /// What entered.
    #[serde(with = "hex")]
    pub data: Vec<u8>,
}

impl Input {
    /// The moment as the machine counts it.
    pub fn moment(&self) -> (VirtualNs, Icount) {
        (VirtualNs(self.virtual_ns), Icount(self.icount))
    }
}

/// A file of inputs that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InputsError {
    /// The file cannot be read.
    #[error("cannot read inputs {path}: {source}")]
    Read {
        /// Which file.
        path: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// See [`INPUTS_FILE_MAX`].
    #[error("inputs {path} has more than {INPUTS_FILE_MAX} bytes")]
    TooLarge {
        /// Which file.
        path: String,
    },
    /// The first line is not the header.
    #[error("{path} is not a log of inputs: its first line must be {HEADER}")]
    Header {
        /// Which file.
        path: String,
    },
    /// A line that is not an input.
    #[error("{path}, line {line}: {reason}")]
    Line {
        /// Which file.
        path: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads a log of inputs, checking that moments do not go backwards.
pub fn read(path: &Path) -> Result<Vec<Input>, InputsError> {
    let (text, name) = load(path)?;
    parse(&text, &name)
}

fn load(path: &Path) -> Result<(String, String), InputsError> {
    let name = || path.display().to_string();
    let failed = |source| InputsError::Read { path: name(), source };
    let mut text = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(INPUTS_FILE_MAX + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > INPUTS_FILE_MAX {
        return Err(InputsError::TooLarge { path: name() });
    }
    let text = String::from_utf8(text).map_err(|_| InputsError::Header { path: name() })?;
    Ok((text, name()))
}

/// Reads the log of a run, which a crash may have cut in the middle of its last line: that input was not acknowledged.
pub fn read_log(path: &Path) -> Result<Vec<Input>, InputsError> {
    let (mut text, name) = load(path)?;
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    text.truncate(whole);
    if text.is_empty() { Ok(Vec::new()) } else { parse(&text, &name) }
}

fn parse(text: &str, path: &str) -> Result<Vec<Input>, InputsError> {
    let mut lines = text.lines().enumerate();
    if lines.next().map(|(_, line)| line.trim()) != Some(HEADER) {
        return Err(InputsError::Header { path: path.to_owned() });
    }
    let mut inputs: Vec<Input> = Vec::new();
    for (index, line) in lines {
        if line.trim().is_empty() {
            continue;
        }
        let failed = |reason: String| InputsError::Line { path: path.to_owned(), line: index + 1, reason };
        let input: Input = serde_json::from_str(line).map_err(|e| failed(e.to_string()))?;
        if inputs.last().is_some_and(|last| input.icount < last.icount || input.virtual_ns < last.virtual_ns) {
            return Err(failed(format!("moment {} comes before the moment of the line above", input.icount)));
        }
        inputs.push(input);
    }
    Ok(inputs)
}

mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.len() % 2 != 0 || !text.is_ascii() {
            return Err(D::Error::custom("data must be pairs of hexadecimal digits"));
        }
        text.as_bytes()
            .chunks_exact(2)
            .map(|pair| {
                let pair = std::str::from_utf8(pair).map_err(D::Error::custom)?;
                u8::from_str_radix(pair, 16).map_err(|_| D::Error::custom(format!("{pair:?} is not hexadecimal")))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn written_inputs_read_back() {
        let input = Input { icount: 5, virtual_ns: 9, channel: InputChannel::Console, data: b"ls\n\xFF".to_vec() };
        let text = format!("{HEADER}\n{}\n", serde_json::to_string(&input).unwrap());
        assert_eq!(parse(&text, "x").unwrap(), vec![input]);
    }

    #[test]
    fn moments_may_not_go_back() {
        let line = |icount: u64| format!(r#"{{"icount":{icount},"virtual_ns":9,"channel":"console","data":"00"}}"#);
        let text = format!("{HEADER}\n{}\n{}\n", line(2), line(1));
        assert!(matches!(parse(&text, "x"), Err(InputsError::Line { line: 3, .. })));
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in ".*") {
            let _ = parse(&text, "x");
            let _ = parse(&format!("{HEADER}\n{text}"), "x");
        }
    }
}
