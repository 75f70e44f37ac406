//! Arguments that several commands have.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use orrery_cpu::engine::{EngineConfig, EngineKind};

use crate::config::MachineConfig;
use crate::moment::MomentName;
use crate::run::SnapshotOptions;
use crate::run::snapshots::{DIRTY_BYTES, MOST};

// Headings of the help, below the command's own options.
const MACHINE: &str = "The machine";
const SNAPSHOTS: &str = "Automatic snapshots";
const REACH: &str = "Places and caches";

/// The machine's description.
#[derive(Args, Debug, Clone)]
pub struct MachineArgs {
    /// Memory of the machine, in MiB
    #[arg(long, help_heading = MACHINE, value_name = "MIB", default_value_t = MachineConfig::default().memory_mib)]
    pub memory: u64,
    /// Virtual nanoseconds that pass with each instruction
    #[arg(long, help_heading = MACHINE, value_name = "NS", default_value_t = 1)]
    pub ns_per_instruction: u64,
    /// The guest's wall clock at power-on, in seconds since 1970 (UTC)
    #[arg(long, help_heading = MACHINE, value_name = "SECONDS", default_value_t = MachineConfig::default().start_date)]
    pub start_date: u64,
    /// Upper bound of the seeded delay of timer interrupts, in virtual nanoseconds
    #[arg(long, help_heading = MACHINE, value_name = "NS", default_value_t = MachineConfig::default().timer_jitter_ns)]
    pub timer_jitter: u64,
    /// A machine without AES, PCLMULQDQ and SHA instructions, for hosts that lack them
    #[arg(long, help_heading = MACHINE)]
    pub no_crypto_extensions: bool,
}

impl MachineArgs {
    /// The description that these flags give.
    pub fn config(&self) -> MachineConfig {
        MachineConfig {
            memory_mib: self.memory,
            ns_per_instruction: self.ns_per_instruction,
            start_date: self.start_date,
            timer_jitter_ns: self.timer_jitter,
            crypto_extensions: !self.no_crypto_extensions,
        }
    }
}

/// Where the guest's user-mode code runs.
#[derive(ValueEnum, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// Whichever is faster at the time, as measured
    Auto,
    /// Translated code with a software MMU: works everywhere
    #[default]
    Soft,
    /// A KVM virtual machine wherever that is possible
    Kvm,
    /// Here and there by turns, for tests
    #[value(hide = true)]
    Random,
}

impl From<EngineChoice> for EngineKind {
    fn from(choice: EngineChoice) -> EngineKind {
        match choice {
            EngineChoice::Auto => EngineKind::Auto,
            EngineChoice::Soft => EngineKind::Soft,
            EngineChoice::Kvm => EngineKind::Kvm,
            EngineChoice::Random => EngineKind::Random,
        }
    }
}

/// How the engine works inside. Results never depend on these.
#[derive(Args, Debug, Clone, Default)]
pub struct EngineArgs {
    /// Where the guest's user-mode code runs. Results are the same, speed is not
    #[arg(long, help_heading = MACHINE, value_name = "ENGINE", default_value = "soft")]
    pub engine: EngineChoice,
    /// Make this call to KVM fail
    #[arg(long, hide = true, value_name = "N")]
    pub engine_kvm_fails: Option<u32>,
    /// Randomise everything that must not matter, from this seed
    #[arg(long, hide = true, value_name = "SEED")]
    pub engine_chaos: Option<u64>,
    /// Size of the software TLBs, as a power of two
    #[arg(long, hide = true, value_name = "BITS")]
    pub engine_tlb_bits: Option<u32>,
    /// Do not chain blocks
    #[arg(long, hide = true)]
    pub engine_no_chaining: bool,
    /// Do not share address translations inside a block
    #[arg(long, hide = true)]
    pub engine_no_grouping: bool,
    /// Longest block, in instructions
    #[arg(long, hide = true, value_name = "N")]
    pub engine_block: Option<u32>,
    /// Code cache, in MiB
    #[arg(long, hide = true, value_name = "MIB")]
    pub engine_cache: Option<usize>,
    /// Say at the end what the engine did, on standard error
    #[arg(long, hide = true)]
    pub engine_statistics: bool,
    /// Begin without translations that earlier runs of the image left, and leave none: a slower start, nothing else
    #[arg(long, help_heading = REACH)]
    pub no_translation_cache: bool,
}

impl EngineArgs {
    /// What these flags ask for, without translations of earlier runs.
    pub fn config(&self) -> EngineConfig {
        let plain = EngineConfig::default();
        EngineConfig {
            tlb_bits: self.engine_tlb_bits.unwrap_or(plain.tlb_bits),
            chaining: plain.chaining && !self.engine_no_chaining,
            max_block_instructions: self.engine_block.unwrap_or(plain.max_block_instructions),
            code_cache_bytes: self.engine_cache.map_or(plain.code_cache_bytes, |mib| mib << 20),
            chaos_seed: self.engine_chaos,
            engine: self.engine.into(),
            kvm_fails: self.engine_kvm_fails,
            grouping: plain.grouping && !self.engine_no_grouping,
            ..plain
        }
    }
}

/// When automatic snapshots are taken. They change nothing in the guest.
#[derive(Args, Debug, Clone)]
pub struct SnapshotArgs {
    /// Take no automatic snapshots
    #[arg(long, help_heading = SNAPSHOTS)]
    pub no_snapshots: bool,
    /// Instructions between automatic snapshots; by default 268435456, and up to four times as many where writing one
    /// takes long
    #[arg(long, help_heading = SNAPSHOTS, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub snapshot_every: Option<u64>,
    /// Take a snapshot early when so much memory has been written, in MiB
    #[arg(long, help_heading = SNAPSHOTS, value_name = "MIB", default_value_t = DIRTY_BYTES >> 20, value_parser = clap::value_parser!(u64).range(1..1 << 24))]
    pub snapshot_dirty: u64,
    /// Keep so many automatic snapshots: beyond, every second one goes and the distance doubles
    #[arg(long, help_heading = SNAPSHOTS, value_name = "N", default_value_t = MOST as u64, value_parser = clap::value_parser!(u64).range(2..1 << 20))]
    pub snapshot_most: u64,
}

impl SnapshotArgs {
    /// What these flags ask for.
    pub fn options(&self) -> Option<SnapshotOptions> {
        let plain = SnapshotOptions::default();
        (!self.no_snapshots).then_some(SnapshotOptions {
            every_instructions: self.snapshot_every.unwrap_or(plain.every_instructions),
            stretch: self.snapshot_every.map_or(plain.stretch, |_| 1),
            dirty_bytes: self.snapshot_dirty << 20,
            most: self.snapshot_most as usize,
        })
    }
}

/// Where a run ends, if it does not end by itself.
#[derive(Args, Debug, Clone)]
pub struct LimitArgs {
    /// Stop after exactly this many instructions since power-on
    #[arg(long, value_name = "ICOUNT")]
    pub until: Option<u64>,
    /// Stop at this virtual time: a number with ns, us, ms, s or min
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub until_virtual: Option<u64>,
}

/// The directory of runs.
#[derive(Args, Debug, Clone)]
pub struct RunsDirectoryArgs {
    /// Where runs are kept
    #[arg(long, help_heading = REACH, value_name = "DIR", env = "ORRERY_RUNS", default_value = "runs")]
    pub runs: PathBuf,
}

/// Where a run and its image are.
#[derive(Args, Debug, Clone)]
pub struct PlaceArgs {
    /// The directory of runs.
    #[command(flatten)]
    pub kept: RunsDirectoryArgs,
    /// The run's image, if it is not where it was when the run was made
    #[arg(long, help_heading = REACH, value_name = "FILE")]
    pub image: Option<PathBuf>,
}

/// How moments of a run are reached.
#[derive(Args, Debug, Clone)]
pub struct ReachArgs {
    /// Where the run is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Use no snapshots: run again from power-on
    #[arg(long, help_heading = REACH)]
    pub from_power_on: bool,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// A moment of a run.
#[derive(Args, Debug, Clone)]
pub struct MomentArgs {
    /// The moment: a run, or the beginning of its name, and the number of instructions since its power-on, or `end`
    #[arg(value_name = "RUN@ICOUNT")]
    pub moment: MomentName,
    /// How it is reached.
    #[command(flatten)]
    pub reach: ReachArgs,
}

/// Parses a virtual time such as `250ms` into nanoseconds.
fn parse_time(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim() {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "min" => 60_000_000_000,
        _ => return Err("expected a number with ns, us, ms, s or min, such as 250ms".into()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| format!("{number:?} is not a number"))?;
    let mut nanoseconds = whole.checked_mul(scale);
    let mut place = scale;
    for digit in fraction.chars() {
        let value = digit.to_digit(10).ok_or_else(|| format!("{number:?} is not a number"))?;
        place /= 10;
        nanoseconds = nanoseconds.and_then(|sum| sum.checked_add(u64::from(value) * place));
    }
    nanoseconds.ok_or_else(|| "the time is too long".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(parse_time("250ms"), Ok(250_000_000));
        assert_eq!(parse_time("1.5s"), Ok(1_500_000_000));
        assert_eq!(parse_time("2min"), Ok(120_000_000_000));
        assert!(parse_time("3").is_err());
        assert!(parse_time("x s").is_err());
        assert!(parse_time("99999999999999min").is_err());
    }
}
