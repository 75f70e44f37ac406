//! The host processor as an oracle for the engine: random user-mode instructions and short programs run natively
//! and in the engine, and every register, flag, byte of memory and exception must agree.
//!
//! The count of cases is small by default; `ORACLE_COUNT` multiplies it, `ORACLE_SEED` moves to other cases,
//! `ORACLE_CODE` (part of an instruction's name) narrows them to some instructions, `ORACLE_REPORT` names a file for
//! the disagreements, and `ORACLE_TRACE` prints every case before it runs.

// The rules for the vCPU (clippy.toml) do not bind its tests.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod absent;
mod campaign;
mod case;
mod compare;
mod generate;
mod guest;
mod native;
mod rng;
mod values;

use campaign::Campaign;
use case::Executor;
use compare::Tolerance;
use generate::codes::{self, Class};
use guest::{Drive, Guest};
use iced_x86::{Code, OpCodeOperandKind};
use native::Native;
use orrery_cpu::engine::EngineConfig;

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn is_wanted(code: Code) -> bool {
    let part = std::env::var("ORACLE_CODE").unwrap_or_default().to_lowercase();
    format!("{code:?}").to_lowercase().contains(&part)
}

fn wanted_codes(class: Option<Class>) -> Vec<Code> {
    codes::all()
        .into_iter()
        .filter(|code| class.is_none_or(|c| codes::class(*code) == Some(c)))
        .filter(|code| is_wanted(*code))
        .collect()
}

fn config() -> EngineConfig {
    EngineConfig { code_cache_bytes: 16 << 20, ..EngineConfig::default() }
}

/// Runs `singles` cases of one instruction and `programs` short programs; fails if any disagrees.
fn compare_with_host(config: EngineConfig, drive: Drive, supervisor: bool, singles: u64, programs: u64) {
    let make_guest = Box::new(move || Guest::new(config.clone(), supervisor, drive));
    let mut campaign = Campaign::new(make_guest, supervisor);
    let mut codes = wanted_codes(supervisor.then_some(Class::Ordinary));
    if supervisor {
        // CS and SS are others there.
        codes.retain(|code| !code.op_code().op_kinds().contains(&OpCodeOperandKind::seg_reg));
    }
    let scale = environment("ORACLE_COUNT", 1);
    let first = environment("ORACLE_SEED", 0) << 32;
    for seed in first..first + singles * scale {
        let code = codes[(seed % codes.len() as u64) as usize];
        if let Some(case) = generate::single(seed, code) {
            campaign.check(&case);
        }
    }
    for seed in first..first + programs * scale {
        if let Some(case) = generate::sequence::sequence(seed, &codes) {
            campaign.check(&case);
        }
    }
    conclude(&campaign);
}

/// Prints what ran and fails if there was a disagreement.
fn conclude(campaign: &Campaign) {
    eprintln!("{}", campaign.summary());
    let report = campaign.report();
    if let Some(path) = std::env::var_os("ORACLE_REPORT") {
        std::fs::write(path, &report).expect("the report can be written");
    }
    let shown: String = report.chars().take(20_000).collect();
    assert!(report.is_empty(), "{shown}\n{}", campaign.summary());
}

#[test]
fn engine_agrees_with_host() {
    compare_with_host(config(), Drive::Whole, false, 20_000, 2_000);
}

#[test]
fn engine_agrees_with_host_at_cpl0() {
    compare_with_host(config(), Drive::Whole, true, 8_000, 1_000);
}

#[test]
fn engine_agrees_with_host_step_by_step() {
    compare_with_host(config(), Drive::Steps, false, 8_000, 1_000);
}

#[test]
fn engine_agrees_with_host_in_chaos() {
    let chaotic = EngineConfig { tlb_bits: 1, chaining: false, chaos_seed: Some(1), ..config() };
    compare_with_host(chaotic, Drive::Strides(3), false, 8_000, 1_000);
}

/// 32-bit code under a 64-bit system.
#[test]
fn engine_agrees_with_host_in_compatibility_mode() {
    let make_guest = Box::new(|| Guest::new(config(), false, Drive::Whole));
    let mut campaign = Campaign::new(make_guest, false);
    let codes: Vec<_> = codes::all_32().into_iter().filter(|code| is_wanted(*code)).collect();
    let first = environment("ORACLE_SEED", 0) << 32;
    for seed in first..first + 10_000 * environment("ORACLE_COUNT", 1) {
        let code = codes[(seed % codes.len() as u64) as usize];
        if let Some(case) = generate::single_32(seed, code) {
            campaign.check(&case);
        }
    }
    conclude(&campaign);
}

#[test]
fn absent_features_are_undefined() {
    let (count, report) = absent::check(&mut Guest::new(config(), false, Drive::Whole));
    assert!(count > 500, "only {count} instructions tried");
    assert!(report.is_empty(), "{}", report.chars().take(10_000).collect::<String>());
}

#[test]
fn engine_agrees_with_host_in_chained_chaos() {
    let chaotic = EngineConfig { tlb_bits: 2, chaos_seed: Some(2), ..config() };
    compare_with_host(chaotic, Drive::Strides(50), false, 2_000, 4_000);
}

/// The processor must agree with itself: the harness loads and captures everything, and lets nothing else in.
#[test]
fn host_agrees_with_itself() {
    let mut native = Native::new();
    let codes = codes::all();
    let mut check = |case: case::Case| {
        let first = native.run(&case).expect("the host runs everything");
        let second = native.run(&case).expect("the host runs everything");
        let differences = compare::outcomes(&case, &first, &second, Tolerance::default());
        assert!(differences.is_empty(), "{}{differences:#?}", compare::describe(&case));
    };
    for seed in 0..4_000 {
        if let Some(case) = generate::single(seed, codes[(seed % codes.len() as u64) as usize]) {
            check(case);
        }
    }
    (0..400).filter_map(|seed| generate::sequence::sequence(seed, &codes)).for_each(check);
}
