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
mod coverage;
mod generate;
mod guest;
mod native;
mod regressions;
mod rng;
mod values;

use campaign::Campaign;
use case::{Case, Executor};
use compare::Tolerance;
use coverage::Counts;
use generate::codes::{self, Class};
use guest::{Drive, Guest};
use iced_x86::{Code, Mnemonic, OpCodeOperandKind};
use native::Native;
use orrery_cpu::engine::{EngineConfig, EngineKind, Undefined};
use std::process::ExitCode;
use std::time::Instant;

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

/// What all parts together did.
#[derive(Default)]
struct Totals {
    instructions: u64,
    sequences: u64,
    differed: u64,
    covered: Counts,
}

impl Totals {
    /// Prints what ran and takes it in.
    fn add(&mut self, campaign: &Campaign) {
        println!("  {}", campaign.summary());
        let report = campaign.report();
        if let Some(path) = std::env::var_os("ORACLE_REPORT").filter(|_| !report.is_empty()) {
            std::fs::write(path, &report).expect("the report can be written");
        }
        print!("{}", report.chars().take(20_000).collect::<String>());
        self.instructions += campaign.cases[0];
        self.sequences += campaign.cases[1];
        self.differed += campaign.differed;
        for (code, counts) in &campaign.covered {
            let total = self.covered.entry(*code).or_default();
            total[0] += counts[0];
            total[1] += counts[1];
        }
    }
}

/// One way of comparing.
struct Part {
    name: &'static str,
    run: fn(&mut Totals),
}

const PARTS: [Part; 12] = [
    Part { name: "host_agrees_with_itself", run: host_agrees_with_itself },
    Part { name: "absent_features_are_undefined", run: absent_features_are_undefined },
    Part { name: "regressions", run: regressions },
    Part {
        name: "engine_agrees_with_host",
        run: |totals| compare_with_host(totals, config(), Drive::Whole, false, 20_000, 2_000),
    },
    Part {
        name: "engine_agrees_with_host_at_cpl0",
        run: |totals| {
            let config = EngineConfig { resident_uses: 1, ..config() };
            compare_with_host(totals, config, Drive::Whole, true, 8_000, 1_000);
        },
    },
    Part {
        name: "engine_agrees_with_host_step_by_step",
        run: |totals| compare_with_host(totals, config(), Drive::Steps, false, 8_000, 1_000),
    },
    Part {
        name: "engine_agrees_with_host_in_chaos",
        run: |totals| {
            let chaotic = EngineConfig { tlb_bits: 1, chaining: false, chaos_seed: Some(1), ..config() };
            compare_with_host(totals, chaotic, Drive::Strides(3), false, 8_000, 1_000);
        },
    },
    Part {
        name: "engine_agrees_with_host_in_chained_chaos",
        run: |totals| {
            let chaotic = EngineConfig { tlb_bits: 2, chaos_seed: Some(2), ..config() };
            compare_with_host(totals, chaotic, Drive::Strides(50), false, 2_000, 4_000);
        },
    },
    Part {
        name: "engine_agrees_with_host_in_a_virtual_machine",
        run: |totals| virtual_machine(totals, EngineKind::Kvm),
    },
    Part {
        name: "engine_agrees_with_host_in_and_out_of_a_virtual_machine",
        run: |totals| virtual_machine(totals, EngineKind::Random),
    },
    Part { name: "engine_agrees_with_host_in_compatibility_mode", run: compatibility_mode },
    Part { name: "undefined_flags_are_those_of_the_model", run: undefined_flags },
];

/// With user code in a virtual machine of KVM.
fn virtual_machine(totals: &mut Totals, engine: EngineKind) {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        assert!(std::env::var_os("ORRERY_REQUIRE_KVM").is_none(), "/dev/kvm: {error}");
        println!("  left out: /dev/kvm: {error}");
        return;
    }
    let config = EngineConfig { engine, ..config() };
    compare_with_host(totals, config, Drive::Whole, false, 10_000, 4_000);
}

/// Runs `singles` cases of one instruction and `programs` short programs.
fn compare_with_host(
    totals: &mut Totals,
    config: EngineConfig,
    drive: Drive,
    supervisor: bool,
    singles: u64,
    programs: u64,
) {
    let mut codes = wanted_codes(supervisor.then_some(Class::Ordinary));
    if supervisor {
        // CS and SS are others there.
        codes.retain(|code| !code.op_code().op_kinds().contains(&OpCodeOperandKind::seg_reg));
    }
    compare(totals, config, drive, supervisor, (&codes, singles), (&codes, programs));
}

/// The same, with instructions drawn from some, programs made of others.
fn compare(
    totals: &mut Totals,
    config: EngineConfig,
    drive: Drive,
    supervisor: bool,
    (codes, singles): (&[Code], u64),
    (all, programs): (&[Code], u64),
) {
    let make_guest = Box::new(move || Guest::new(config.clone(), supervisor, drive));
    let mut campaign = Campaign::new(make_guest, supervisor);
    let scale = environment("ORACLE_COUNT", 1);
    let first = environment("ORACLE_SEED", 0) << 32;
    for seed in (first..first + singles * scale).filter(|_| !codes.is_empty()) {
        let code = codes[(seed % codes.len() as u64) as usize];
        if let Some(case) = generate::single(seed, code) {
            campaign.check(&for_level(case, supervisor));
        }
    }
    for seed in (first..first + programs * scale).filter(|_| !all.is_empty()) {
        if let Some(case) = generate::sequence::sequence(seed, all) {
            campaign.check(&for_level(case, supervisor));
        }
    }
    totals.add(&campaign);
}

/// The model has undefined flags and results of its own, which must be the same whoever computes them: each kind of
/// instruction in turn is not left to the host.
fn undefined_flags(totals: &mut Totals) {
    println!("  the host's own are not the model's: {:?}", Undefined::measured());
    for (name, kind) in Undefined::ALL.kinds() {
        let is_of_kind = |code: &Code| match code.mnemonic() {
            Mnemonic::Bsf | Mnemonic::Bsr if name == "scan of zero" => true,
            Mnemonic::Sal => name == "Shl",
            mnemonic => name == format!("{mnemonic:?}"),
        };
        let everything = wanted_codes(None);
        let codes: Vec<Code> = everything.iter().copied().filter(is_of_kind).collect();
        assert!(!codes.is_empty() || std::env::var_os("ORACLE_CODE").is_some(), "{name} has no instructions");
        // Every third instruction of the programs is of the kind.
        let often = codes.iter().cycle().take(if codes.is_empty() { 0 } else { everything.len() / 2 });
        let mixed: Vec<Code> = everything.iter().chain(often).copied().collect();
        println!("  {name}");
        let config = EngineConfig { undefined: Undefined::measured().and(kind), ..config() };
        compare(totals, config, Drive::Whole, false, (&codes, 300), (&mixed, 150));
    }
    let config = EngineConfig { undefined: Undefined::ALL, ..config() };
    compare_with_host(totals, config, Drive::Whole, false, 0, 1_000);
}

/// Alignment is checked in user mode only.
fn for_level(mut case: Case, supervisor: bool) -> Case {
    if supervisor {
        case.registers.rflags &= !generate::ALIGNMENT_CHECK;
    }
    case
}

fn regressions(totals: &mut Totals) {
    let mut campaign = Campaign::new(Box::new(|| Guest::new(config(), false, Drive::Whole)), false);
    regressions::check(&mut campaign);
    totals.add(&campaign);
}

/// 32-bit code under a 64-bit system.
fn compatibility_mode(totals: &mut Totals) {
    let make_guest = Box::new(|| Guest::new(config(), false, Drive::Whole));
    let mut campaign = Campaign::new(make_guest, false);
    let codes: Vec<_> = codes::all_32().into_iter().filter(|code| is_wanted(*code)).collect();
    let first = environment("ORACLE_SEED", 0) << 32;
    for seed in (first..first + 10_000 * environment("ORACLE_COUNT", 1)).filter(|_| !codes.is_empty()) {
        let code = codes[(seed % codes.len() as u64) as usize];
        if let Some(case) = generate::single_32(seed, code) {
            campaign.check(&case);
        }
    }
    totals.add(&campaign);
}

fn absent_features_are_undefined(totals: &mut Totals) {
    let (count, report) = absent::check(&mut Guest::new(config(), false, Drive::Whole));
    println!("  {count} instructions");
    assert!(count > 500, "only {count} instructions tried");
    print!("{}", report.chars().take(10_000).collect::<String>());
    totals.differed += u64::from(!report.is_empty());
}

/// The processor must agree with itself: the harness loads and captures everything, and lets nothing else in.
fn host_agrees_with_itself(totals: &mut Totals) {
    let mut native = Native::new();
    let codes = codes::all();
    let mut check = |case: Case| {
        let first = native.run(&case).expect("the host runs everything");
        let second = native.run(&case).expect("the host runs everything");
        let differences = compare::outcomes(&case, &first, &second, Tolerance::default());
        if !differences.is_empty() {
            println!("{}{differences:#?}", compare::describe(&case));
            totals.differed += 1;
        }
    };
    for seed in 0..4_000 {
        if let Some(case) = generate::single(seed, codes[(seed % codes.len() as u64) as usize]) {
            check(case);
        }
    }
    (0..400).filter_map(|seed| generate::sequence::sequence(seed, &codes)).for_each(check);
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        for part in &PARTS {
            println!("{}: test", part.name);
        }
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let mut totals = Totals::default();
    let start = Instant::now();
    for part in &PARTS {
        if filters.is_empty() || filters.iter().any(|filter| part.name.contains(filter.as_str())) {
            println!("{}", part.name);
            (part.run)(&mut totals);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let mut missing = Vec::new();
    if filters.is_empty() && std::env::var_os("ORACLE_CODE").is_none() {
        missing = coverage::print(&totals.covered);
        for code in &missing {
            println!("advertised, but not covered: {code:?}");
        }
    }
    println!(
        "host oracle: {} instructions and {} sequences compared in {seconds:.0} s ({:.0} a second), {} opcodes not covered, {} differences",
        totals.instructions,
        totals.sequences,
        (totals.instructions + totals.sequences) as f64 / seconds,
        missing.len(),
        totals.differed
    );
    if totals.differed == 0 && missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
