//! The host processor as an oracle for the engine: random user-mode instructions and short programs run natively
//! and in the engine, and every register, flag, byte of memory and exception must agree.
//!
//! The count of cases is small by default; `ORACLE_COUNT` multiplies it, `ORACLE_SEED` moves to other cases,
//! `ORACLE_CODE` (part of an instruction's name) narrows them to some instructions.

mod case;
mod compare;
mod generate;
mod native;
mod rng;
mod values;

use case::{Case, Executor};
use compare::Tolerance;
use generate::codes;
use native::Native;

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// The processor must agree with itself: the harness loads and captures everything, and lets nothing else in.
#[test]
fn host_is_deterministic() {
    let mut native = Native::new();
    let codes = codes::all();
    let mut endings = [0u64; 32];
    let mut refused = 0;
    let total = 20_000 * environment("ORACLE_COUNT", 1);
    for seed in 0..total {
        let code = codes[(seed % codes.len() as u64) as usize];
        let Some(case) = generate::single(seed, code) else {
            refused += 1;
            continue;
        };
        check_self(&mut native, &case, &mut endings);
    }
    eprintln!(
        "{} codes, {total} draws, {refused} without encoding, endings {endings:?}",
        codes.len()
    );
    let mut endings = [0u64; 32];
    for seed in 0..total / 10 {
        if let Some(case) = generate::sequence::sequence(seed, &codes) {
            check_self(&mut native, &case, &mut endings);
        }
    }
    eprintln!("sequences: endings {endings:?}");
}

fn check_self(native: &mut Native, case: &Case, endings: &mut [u64; 32]) {
    if std::env::var("ORACLE_TRACE").is_ok() {
        eprintln!("{}", compare::describe(case));
    }
    let first = native.run(case).expect("the host runs everything");
    let second = native.run(case).expect("the host runs everything");
    endings[usize::from(first.ending.vector & 31)] += 1;
    let differences = compare::outcomes(case, &first, &second, Tolerance::default());
    assert!(
        differences.is_empty(),
        "{}{differences:#?}",
        compare::describe(case)
    );
}
