//! What can go wrong before the workload runs, and the exit code each failure powers off with.

use std::fmt;
use std::io;

/// A step of the boot that did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// The configuration is missing or malformed.
    Config {
        /// What is wrong with it.
        reason: String,
    },
    /// A kernel module could not be loaded.
    Module {
        /// The module's file name.
        name: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// The root disk did not appear.
    RootDisk {
        /// The device that was waited for.
        device: String,
    },
    /// A file system could not be mounted.
    Mount {
        /// What was to be mounted.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// The root file system could not become `/`.
    SwitchRoot {
        /// The system call that failed.
        step: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// The host name or the loopback interface could not be set up.
    Network {
        /// The system call that failed.
        step: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// The entry command could not be started.
    Exec {
        /// The command.
        command: String,
        /// What the kernel said.
        error: io::Error,
    },
}

impl Failure {
    /// The exit code of the machine: 240 and up for init's own failures, and the shell's 126 and 127 for an entry
    /// command that cannot be executed or does not exist.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Config { .. } => 240,
            Failure::Module { .. } => 241,
            Failure::RootDisk { .. } => 242,
            Failure::Mount { .. } => 243,
            Failure::SwitchRoot { .. } => 244,
            Failure::Network { .. } => 245,
            Failure::Exec { error, .. } if error.kind() == io::ErrorKind::NotFound => 127,
            Failure::Exec { .. } => 126,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Config { reason } => {
                write!(f, "the image's init configuration is unusable: {reason}")
            }
            Failure::Module { name, error } => {
                write!(f, "kernel module {name} does not load: {error}")
            }
            Failure::RootDisk { device } => {
                write!(f, "no root disk: {device} did not appear (does the machine have a virtio block device?)")
            }
            Failure::Mount { what, error } => write!(f, "cannot mount {what}: {error}"),
            Failure::SwitchRoot { step, error } => {
                write!(f, "cannot switch to the root disk: {step}: {error}")
            }
            Failure::Network { step, error } => {
                write!(f, "cannot set up the network: {step}: {error}")
            }
            Failure::Exec { command, error } => {
                write!(f, "cannot run the entry command {command}: {error}")
            }
        }
    }
}
