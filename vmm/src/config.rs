//! The machine description: the second of the four things a run is a function of.

use serde::{Deserialize, Serialize};

/// The seed: the 64-bit number every random choice of a run derives from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Seed(pub u64);

/// Smallest memory a machine may have, in MiB.
pub const MEMORY_MIB_MIN: u64 = 16;
/// Largest memory a machine may have, in MiB (256 GiB).
pub const MEMORY_MIB_MAX: u64 = 256 * 1024;
/// Largest rate of virtual time, in nanoseconds per instruction.
pub const NS_PER_INSTRUCTION_MAX: u64 = 1_000_000;
/// Largest bound of a seeded delay, in nanoseconds.
pub const JITTER_NS_MAX: u64 = 1_000_000_000;

/// What the simulated computer is made of. Two machines with equal descriptions, images, seeds and inputs go
/// through equal states.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// RAM, in MiB.
    pub memory_mib: u64,
    /// Virtual nanoseconds that pass with each retired instruction.
    pub ns_per_instruction: u64,
    /// Wall-clock time at power-on, in seconds since 1970-01-01 00:00:00 UTC.
    pub start_date: u64,
    /// Upper bound of the seeded delay of timer interrupts, in nanoseconds. Zero turns the delay off.
    pub timer_jitter_ns: u64,
    /// Whether the CPU has AES-NI, PCLMULQDQ and the SHA extensions, see `orrery_cpu::model`.
    pub crypto_extensions: bool,
}

impl Default for MachineConfig {
    /// 1 GiB, one nanosecond per instruction, 2026-01-01 00:00:00 UTC.
    fn default() -> MachineConfig {
        MachineConfig {
            memory_mib: 1024,
            ns_per_instruction: 1,
            start_date: 1_767_225_600,
            timer_jitter_ns: 2_000,
            crypto_extensions: true,
        }
    }
}

/// A machine description that no machine can be built from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// See [`MEMORY_MIB_MIN`] and [`MEMORY_MIB_MAX`].
    #[error("memory of {memory_mib} MiB is outside {MEMORY_MIB_MIN}..={MEMORY_MIB_MAX} MiB; choose another --memory")]
    Memory {
        /// What was asked for.
        memory_mib: u64,
    },
    /// See [`NS_PER_INSTRUCTION_MAX`].
    #[error("{ns_per_instruction} ns per instruction is outside 1..={NS_PER_INSTRUCTION_MAX}")]
    NsPerInstruction {
        /// What was asked for.
        ns_per_instruction: u64,
    },
    /// See [`JITTER_NS_MAX`].
    #[error("a timer jitter of {timer_jitter_ns} ns is above {JITTER_NS_MAX}")]
    Jitter {
        /// What was asked for.
        timer_jitter_ns: u64,
    },
}

impl MachineConfig {
    /// Checks every field against its bounds.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&self.memory_mib) {
            return Err(ConfigError::Memory { memory_mib: self.memory_mib });
        }
        if !(1..=NS_PER_INSTRUCTION_MAX).contains(&self.ns_per_instruction) {
            return Err(ConfigError::NsPerInstruction { ns_per_instruction: self.ns_per_instruction });
        }
        if self.timer_jitter_ns > JITTER_NS_MAX {
            return Err(ConfigError::Jitter { timer_jitter_ns: self.timer_jitter_ns });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_checked() {
        assert!(MachineConfig::default().validate().is_ok());
        for memory_mib in [0, 15, MEMORY_MIB_MAX + 1, u64::MAX] {
            let config = MachineConfig { memory_mib, ..Default::default() };
            assert_eq!(config.validate(), Err(ConfigError::Memory { memory_mib }));
        }
        assert!(MachineConfig { ns_per_instruction: 0, ..Default::default() }.validate().is_err());
    }
}
