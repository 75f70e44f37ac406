//! The init configuration: what the image builder tells init.
//!
//! A sequence of records `key=value`, each ended by a NUL byte, so that values may hold anything a command line or
//! an environment may hold. Keys: `version` (first, must be `1`), `module`, `root`, `hostname`, `workdir`, `env`,
//! `arg`. A module's value is `CONDITION PATH`; conditions are `always`, `pci:VENDOR` and `virtio:ID`
//! (hexadecimal), and modules load in the order given.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;

use crate::failure::Failure;

/// When a module is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// In every machine.
    Always,
    /// Where a PCI function of this vendor is present.
    PciVendor(u32),
    /// Where a virtio device of this type is present.
    VirtioDevice(u32),
}

/// One kernel module to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// When it is wanted.
    pub condition: Condition,
    /// Its path in the initramfs.
    pub path: String,
}

/// Everything the builder decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Modules in load order.
    pub modules: Vec<Module>,
    /// Block device of the ext4 root file system; without one the initramfs stays the root.
    pub root: Option<String>,
    /// The guest's host name.
    pub host_name: String,
    /// Working directory of the entry command.
    pub working_directory: OsString,
    /// The entry command's whole environment, in order.
    pub environment: Vec<(OsString, OsString)>,
    /// The entry command and its arguments; never empty.
    pub command: Vec<OsString>,
}

impl Config {
    /// Reads and checks the configuration.
    pub fn load(path: &str) -> Result<Config, Failure> {
        let bytes = fs::read(path).map_err(|error| Failure::Config { reason: format!("{path}: {error}") })?;
        Config::parse(&bytes).map_err(|reason| Failure::Config { reason })
    }

    /// Parses the record sequence.
    pub fn parse(bytes: &[u8]) -> Result<Config, String> {
        let mut config = Config { working_directory: "/".into(), host_name: "orrery".into(), ..Config::default() };
        let mut versioned = false;
        let Some(body) = bytes.strip_suffix(&[0]) else {
            return Err("it does not end with a complete record".into());
        };
        for record in body.split(|&byte| byte == 0) {
            let Some(equals) = record.iter().position(|&byte| byte == b'=') else {
                return Err(format!("record without '=': {}", String::from_utf8_lossy(record)));
            };
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if !versioned && key != b"version" {
                return Err("the first record is not its version".into());
            }
            match key {
                b"version" if value == b"1" => versioned = true,
                b"version" => {
                    return Err(format!("version {} is not 1", String::from_utf8_lossy(value)));
                }
                b"module" => config.modules.push(parse_module(&text(value)?)?),
                b"root" => config.root = Some(text(value)?),
                b"hostname" => config.host_name = text(value)?,
                b"workdir" => config.working_directory = OsString::from_vec(value.to_vec()),
                b"env" => config.environment.push(parse_variable(value)?),
                b"arg" => config.command.push(OsString::from_vec(value.to_vec())),
                other => return Err(format!("unknown key {}", String::from_utf8_lossy(other))),
            }
        }
        if config.command.is_empty() {
            return Err("it names no entry command".into());
        }
        Ok(config)
    }
}

fn text(value: &[u8]) -> Result<String, String> {
    String::from_utf8(value.to_vec()).map_err(|_| "a value that must be text is not UTF-8".to_string())
}

fn parse_variable(value: &[u8]) -> Result<(OsString, OsString), String> {
    match value.iter().position(|&byte| byte == b'=') {
        Some(equals) if equals > 0 => {
            Ok((OsString::from_vec(value[..equals].to_vec()), OsString::from_vec(value[equals + 1..].to_vec())))
        }
        _ => Err(format!("environment entry {} is not NAME=VALUE", String::from_utf8_lossy(value))),
    }
}

fn parse_module(value: &str) -> Result<Module, String> {
    let Some((condition, path)) = value.split_once(' ') else {
        return Err(format!("module record {value} is not CONDITION PATH"));
    };
    let number = |hex: &str| u32::from_str_radix(hex, 16).map_err(|_| format!("bad number in condition {condition}"));
    let condition = match condition.split_once(':') {
        None if condition == "always" => Condition::Always,
        Some(("pci", vendor)) => Condition::PciVendor(number(vendor)?),
        Some(("virtio", id)) => Condition::VirtioDevice(number(id)?),
        _ => return Err(format!("unknown module condition {condition}")),
    };
    Ok(Module { condition, path: path.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_configuration_parses() {
        let config = Config::parse(
            b"version=1\0module=always /m/virtio.ko\0module=virtio:2 /m/virtio_blk.ko\0root=/dev/vda\0\
              hostname=g\0workdir=/srv\0env=A=b=c\0arg=/bin/sh\0arg=-c\0arg=a b\0",
        )
        .unwrap();
        assert_eq!(config.modules[1].condition, Condition::VirtioDevice(2));
        assert_eq!(config.root.as_deref(), Some("/dev/vda"));
        assert_eq!(config.environment, vec![("A".into(), "b=c".into())]);
        assert_eq!(config.command.len(), 3);
    }

    #[test]
    fn broken_configurations_say_why() {
        for (bytes, part) in [
            (&b""[..], "complete record"),
            (b"version=1\0arg=x", "complete record"),
            (b"arg=x\0", "version"),
            (b"version=2\0arg=x\0", "not 1"),
            (b"version=1\0", "no entry"),
            (b"version=1\0what=x\0", "unknown key"),
            (b"version=1\0module=sometimes /x\0", "condition"),
            (b"version=1\0env=novalue\0arg=x\0", "NAME=VALUE"),
        ] {
            let reason = Config::parse(bytes).unwrap_err();
            assert!(reason.contains(part), "{reason} should mention {part}");
        }
    }
}
