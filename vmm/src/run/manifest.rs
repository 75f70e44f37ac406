//! The manifest: what a run was a function of, and how it ended.

use serde::{Deserialize, Serialize};

use crate::chain::Hash;
use crate::config::MachineConfig;

/// Name of the format, first field of the file.
pub const FORMAT: &str = "orrery-run";
/// Version of the format. Version 1 had no branches and is read as well.
pub const VERSION: u32 = 2;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Ended {
    /// The guest powered the machine off.
    PowerOff {
        /// The guest's exit code.
        code: u8,
    },
    /// The guest asked for a reset, which ends a run.
    Reset,
    /// The moment given with --until was reached.
    Limit,
    /// An exception could not be delivered, nor the double fault after it.
    TripleFault {
        /// Registers at the end.
        registers: String,
    },
    /// The engine met something that it cannot execute.
    Unsupported {
        /// Address of the instruction.
        rip: u64,
        /// Its bytes, in hexadecimal.
        bytes: String,
        /// What it is.
        what: String,
    },
    /// HLT with interrupts off: nothing can ever wake the vCPU.
    HaltedForever {
        /// Address after the HLT.
        rip: u64,
    },
    /// HLT with interrupts on, no event pending and no source of input.
    IdleForever {
        /// Address after the HLT.
        rip: u64,
    },
    /// Stopped from outside by a signal.
    Interrupted {
        /// Number of the signal.
        signal: i32,
        /// In the middle of a string instruction. Then the state is that of no moment, and has no link in the chain.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        unfinished: bool,
    },
    /// Nobody reads the console any more.
    ConsoleClosed,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Ended::PowerOff { code } => write!(f, "powered off with code {code}"),
            Ended::Reset => write!(f, "reset by the guest"),
            Ended::Limit => write!(f, "reached the moment asked for"),
            Ended::TripleFault { .. } => write!(f, "triple fault"),
            Ended::Unsupported { rip, bytes, what } => {
                write!(f, "cannot execute {what} at rip {rip:#x} (bytes {bytes})")
            }
            Ended::HaltedForever { rip } => write!(f, "halted with interrupts off before rip {rip:#x}"),
            Ended::IdleForever { rip } => write!(f, "idle with nothing left to wake it, before rip {rip:#x}"),
            Ended::Interrupted { signal, unfinished: false } => write!(f, "stopped by signal {signal}"),
            Ended::Interrupted { signal, unfinished: true } => {
                write!(f, "stopped by signal {signal} in the middle of a string instruction")
            }
            Ended::ConsoleClosed => write!(f, "stopped because standard output was closed"),
        }
    }
}

/// The image of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReference {
    /// Where it was found.
    pub path: String,
    /// What it was.
    pub hash: Hash,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it ended.
    pub ended: Ended,
    /// Instructions retired.
    pub icount: u64,
    /// Virtual time, in nanoseconds.
    pub virtual_ns: u64,
    /// Hash of the complete state.
    pub state_hash: Hash,
    /// Last link of the hash chain.
    pub chain: Hash,
}

/// Where a timeline left another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchPoint {
    /// Name of the run that it left.
    pub run: String,
    /// At the first moment at which so many instructions had retired.
    pub icount: u64,
    /// The seed from there on. If it is the one before, the random streams go on; otherwise they start anew.
    pub seed: u64,
}

/// Contents of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Name of the run: its directory.
    pub id: String,
    /// Version of Orrery that made it.
    pub orrery_version: String,
    /// First argument of the function.
    pub image: ImageReference,
    /// Second argument.
    pub machine: MachineConfig,
    /// Third argument, as of power-on; see `branches` for what it became.
    pub seed: u64,
    /// Where its timeline left the runs behind it, from power-on on. Empty for a run that began at power-on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub branches: Vec<BranchPoint>,
    /// Inputs that the run was told to replay; what entered is in `inputs.jsonl`.
    pub replayed_inputs: Option<String>,
    /// Length of an epoch of the hash chain, in instructions.
    pub epoch_instructions: u64,
    /// Vendor of the processor it ran on; results that the architecture leaves undefined may depend on it.
    pub host_cpu_vendor: String,
    /// None while the run goes on, and after a crash.
    pub outcome: Option<Outcome>,
    /// BLAKE3 of this file with this field empty.
    pub checksum: String,
}

/// A manifest that cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON of the right shape.
    #[error("the manifest is not readable: {reason}")]
    Syntax {
        /// The parser's words.
        reason: String,
    },
    /// Another format or version.
    #[error("the manifest is {format:?} version {version}; this Orrery reads {FORMAT:?} up to version {VERSION}")]
    Version {
        /// Its format.
        format: String,
        /// Its version.
        version: u32,
    },
    /// Changed or damaged after it was written.
    #[error("the manifest's checksum does not match its content")]
    Checksum,
}

impl Manifest {
    /// The seed that the run had at its end.
    pub fn last_seed(&self) -> u64 {
        self.branches.last().map_or(self.seed, |point| point.seed)
    }

    /// The run's name without its seed and number.
    pub fn stem(&self) -> &str {
        self.id.rsplitn(3, '-').nth(2).unwrap_or(&self.id)
    }

    fn with_checksum(&self) -> Manifest {
        let blank = Manifest { checksum: String::new(), ..self.clone() };
        let text = serde_json::to_string(&blank).expect("a manifest is plain data");
        Manifest { checksum: blake3::hash(text.as_bytes()).to_string(), ..blank }
    }

    /// The file's content, with its checksum.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(&self.with_checksum()).expect("a manifest is plain data");
        text.push('\n');
        text
    }

    /// Parses and checks a file's content.
    pub fn from_json(text: &str) -> Result<Manifest, ManifestError> {
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|e| ManifestError::Syntax { reason: e.to_string() })?;
        let format = value.get("format").and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        let version = value.get("version").and_then(|v| v.as_u64()).unwrap_or(0) as u32;
        if format != FORMAT || !(1..=VERSION).contains(&version) {
            return Err(ManifestError::Version { format, version });
        }
        let manifest: Manifest =
            serde_json::from_value(value).map_err(|e| ManifestError::Syntax { reason: e.to_string() })?;
        if manifest.with_checksum().checksum != manifest.checksum {
            return Err(ManifestError::Checksum);
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT.into(),
            version: VERSION,
            id: "hello-1-001".into(),
            orrery_version: "0.1.0".into(),
            image: ImageReference { path: "hello.img".into(), hash: Hash([7; 32]) },
            machine: MachineConfig::default(),
            seed: u64::MAX,
            branches: vec![BranchPoint { run: "hello-1-000".into(), icount: 5, seed: 6 }],
            replayed_inputs: None,
            epoch_instructions: 1 << 28,
            host_cpu_vendor: "AuthenticAMD".into(),
            outcome: Some(Outcome {
                ended: Ended::PowerOff { code: 3 },
                icount: 1,
                virtual_ns: 2,
                state_hash: Hash([1; 32]),
                chain: Hash([2; 32]),
            }),
            checksum: String::new(),
        }
    }

    #[test]
    fn written_manifests_read_back() {
        let text = manifest().to_json();
        let read = Manifest::from_json(&text).unwrap();
        assert_eq!(Manifest { checksum: String::new(), ..read }, manifest());
    }

    #[test]
    fn damage_is_noticed() {
        let text = manifest().to_json();
        assert_eq!(Manifest::from_json(&text.replace("\"code\": 3", "\"code\": 4")), Err(ManifestError::Checksum));
        assert!(matches!(Manifest::from_json(&text[..50]), Err(ManifestError::Syntax { .. })));
        assert!(matches!(Manifest::from_json("{}"), Err(ManifestError::Version { .. })));
    }
}
