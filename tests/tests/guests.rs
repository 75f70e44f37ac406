//! The small guests: what they compute is what the host computes, and what depends on chance follows the seed.

mod common;

use common::{Outcome, assert_equal, guests, run};
use orrery_cpu::engine::EngineConfig;
use orrery_tests::guests::{DETERMINATE, SEEDED, native, section};
use orrery_vmm::run::Ended;
use orrery_vmm::verify::perturbed;

/// Checks one program's section against a native run; says what is wrong.
fn judge(outcome: &Outcome, name: &str) -> Result<(), String> {
    let expected = native(name).map_err(|error| format!("{name} fails natively: {error:#}"))?;
    match section(&outcome.console, name) {
        Some((words, "exit 0")) if words == expected => Ok(()),
        Some((words, "exit 0")) => Err(format!("{name} printed {words:?}, natively {expected:?}")),
        Some((words, how)) => Err(format!("{name} ended with {how} after {words:?}")),
        None => Err(format!("{name} did not end; the run did with {:?}", outcome.ended)),
    }
}

/// Boots one program alone, so that a failure names it.
fn check(name: &str) {
    let Some(image) = guests(&[name]) else { return };
    let outcome = run(&image, 1, EngineConfig::default());
    if let Err(reason) = judge(&outcome, name) {
        panic!("{reason}\nthe console:\n{}", outcome.console);
    }
}

#[test]
fn code_that_modifies_itself() {
    check("selfmod");
}

#[test]
fn exceptions_signals_and_timers() {
    check("signals");
}

#[test]
fn every_exception_a_program_can_provoke() {
    check("faults");
}

#[test]
fn steps_breakpoints_and_watchpoints() {
    check("debugger");
}

#[test]
fn mappings_forks_and_executions() {
    check("memory");
}

#[test]
fn vector_state_across_preemption() {
    check("vectors");
}

#[test]
fn floating_point_to_the_last_bit() {
    check("floats");
}

#[test]
fn time_passes() {
    check("clock");
}

#[test]
fn a_32_bit_program() {
    check("i386");
}

#[test]
fn results_do_not_depend_on_how_the_engine_works() {
    let Some(image) = guests(&DETERMINATE) else { return };
    let plain = run(&image, 5, EngineConfig::default());
    for index in [1, 2, 3] {
        let config = perturbed(&EngineConfig::default(), index);
        assert_equal(&run(&image, 5, config.clone()), &plain, &format!("{config:?}"));
    }
    let wrong: Vec<String> = DETERMINATE.iter().filter_map(|name| judge(&plain, name).err()).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn chance_follows_the_seed() {
    let Some(image) = guests(&SEEDED) else { return };
    let first = run(&image, 1, EngineConfig::default());
    assert_eq!(first.ended, Some(Ended::PowerOff { code: 0 }), "the console:\n{}", first.console);
    assert_equal(&run(&image, 1, EngineConfig::default()), &first, "the same seed");
    let others: Vec<Outcome> = [2, 3].map(|seed| run(&image, seed, EngineConfig::default())).into();
    for name in SEEDED {
        let words = |outcome: &Outcome| section(&outcome.console, name).map(|(words, _)| words);
        assert!(words(&first).is_some(), "{name} did not run:\n{}", first.console);
        let differ = others.iter().any(|other| words(other) != words(&first));
        assert!(differ, "three seeds, and {name} always says {:?}", words(&first));
    }
}
