//! The promise itself, on a whole Debian guest: State(N) is a function of image, machine, seed and inputs.

mod common;

use common::{Choices, assert_equal, assert_success, demo, machine, run, run_until};
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_vmm::perturb::{Course, Plan};
use orrery_vmm::verify::{Sampler, Until, perturbed};

#[test]
fn equal_seeds_give_equal_runs_and_other_seeds_do_not() {
    let Some(image) = demo("hello") else { return };
    let first = run(&image, 1, EngineConfig::default());
    assert_success(&first);
    assert_equal(&run(&image, 1, EngineConfig::default()), &first, "the same seed");
    let other = run(&image, 2, EngineConfig::default());
    assert_success(&other);
    assert_ne!(other.state, first.state);
    assert_ne!(other.console, first.console, "the guest prints random bytes, which the seed decides");
}

#[test]
fn a_run_can_be_stopped_anywhere_and_goes_on_as_if_it_had_not_been() {
    let Some(image) = demo("hello") else { return };
    let whole = run(&image, 7, EngineConfig::default());
    let mut choices = Choices(0x5eed);
    let mut moments: Vec<u64> = (0..40).map(|_| 1 + choices.below(whole.icount - 1)).collect();
    // Neighbours as well: one instruction more, whatever it is.
    moments.extend([0, 1, 2, 3, moments[0] + 1, moments[1] + 1, moments[1] + 2, whole.icount - 1]);
    moments.retain(|moment| *moment < whole.icount);
    moments.sort_unstable();
    moments.dedup();

    let mut stopped = machine(&image, 7, EngineConfig::default());
    let mut console = String::new();
    let mut states = Vec::new();
    for &moment in &moments {
        let part = run_until(&mut stopped, moment);
        assert_eq!(part.ended, None);
        assert_eq!(part.icount, moment, "the machine must stop at exactly this instruction");
        console += &part.console;
        states.push(part.state);
    }
    let end = run_until(&mut stopped, common::ICOUNT_MAX);
    console += &end.console;
    assert_eq!((end.icount, end.virtual_ns, &end.ended), (whole.icount, whole.virtual_ns, &whole.ended));
    assert_eq!(end.state, whole.state);
    assert_eq!(console, whole.console);

    // A machine that stops only once has the same state there.
    for index in [0, moments.len() / 2, moments.len() - 1] {
        let mut direct = machine(&image, 7, EngineConfig::default());
        assert_eq!(run_until(&mut direct, moments[index]).state, states[index], "at icount {}", moments[index]);
    }
}

#[test]
fn how_the_engine_works_does_not_matter() {
    let Some(image) = demo("hello") else { return };
    // The slowest of these ways takes a second for some ten million instructions: the boot's first part must do.
    const WHOLE: [u32; 4] = [1, 2, 3, 4];
    const FIRST_INSTRUCTIONS: u64 = 150_000_000;
    let base = EngineConfig::default();
    let whole = run(&image, 3, base.clone());
    assert_success(&whole);
    for index in WHOLE {
        let config = perturbed(&base, index);
        assert_equal(&run(&image, 3, config.clone()), &whole, &format!("{config:?}"));
    }
    let first = run_until(&mut machine(&image, 3, base.clone()), FIRST_INSTRUCTIONS);
    let config = perturbed(&base, 5);
    let outcome = run_until(&mut machine(&image, 3, config.clone()), FIRST_INSTRUCTIONS);
    assert_equal(&outcome, &first, &format!("{config:?}"));
}

/// Everything that must not matter at once, changing in mid-run; `make metamorphic` does more of it.
#[test]
fn perturbed_boots_are_boots() {
    let Some(image) = demo("hello") else { return };
    const FIRST_INSTRUCTIONS: u64 = 300_000_000;
    let until = || Until { icount: Some(Icount(FIRST_INSTRUCTIONS)), time: None };
    let base = EngineConfig::default();
    let end = |mut sampler: Sampler| {
        let mut last = None;
        while let Some(sample) = sampler.next_sample().expect("nothing is replayed") {
            last = Some(sample);
        }
        let stages: Vec<String> = sampler.course().stages().iter().map(ToString::to_string).collect();
        (last, stages)
    };
    let (expected, _) = end(Sampler::new(machine(&image, 4, base.clone()), FIRST_INSTRUCTIONS, until()));
    let plan = Plan::new(1, &base).with_stage_ns((20, 27));
    let course = Course::perturbed(&image, machine(&image, 4, base), Vec::new(), plan);
    let (found, stages) = end(Sampler::new(course, FIRST_INSTRUCTIONS / 3, until()));
    assert!(stages.len() > 5, "{stages:?}");
    assert_eq!(found, expected, "{}", stages.join("\n"));
}
