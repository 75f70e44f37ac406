//! Branches of a whole Debian guest in one process: with the parent's seed its future, with others futures of their own.

mod common;

use common::{Choices, ICOUNT_MAX, Outcome, assert_equal, assert_success, demo, machine, run_until};
use orrery_cpu::engine::EngineConfig;
use orrery_vmm::{Machine, Seed, Template};

fn branch(template: &Template, seed: u64) -> Machine {
    template.branch(Seed(seed), None).expect("the branch is made")
}

fn finish(machine: &mut Machine) -> Outcome {
    let outcome = run_until(machine, ICOUNT_MAX);
    assert_success(&outcome);
    outcome
}

#[test]
fn a_branch_is_its_parents_future_or_its_own() {
    let Some(image) = demo("hello") else { return };
    let whole = finish(&mut machine(&image, 7, EngineConfig::default()));
    let rest = |console: &str| Outcome { console: whole.console[console.len()..].to_owned(), ..whole.clone() };

    let mut choices = Choices(0xb4a9c4);
    let mut parent = machine(&image, 7, EngineConfig::default());
    let mut console = String::new();
    let mut last: Option<Template> = None;
    for sixth in [3, 5] {
        let moment = whole.icount / 6 * sixth + 1 + choices.below(whole.icount / 6);
        console += &run_until(&mut parent, moment).console;
        let template = parent.freeze().expect("the machine can be frozen");
        // From now on the parent is a child of this template, so later templates are branches of a branch.
        parent = branch(&template, 7);
        let mut child = branch(&template, 7);
        assert_equal(&finish(&mut child), &rest(&console), &format!("a branch at {moment}"));
        if sixth == 5 {
            child.reset().expect("a branch has a branch point");
            assert_equal(&finish(&mut child), &rest(&console), &format!("the same again from {moment}"));
        }
        last = Some(template);
    }
    assert_equal(&finish(&mut parent), &rest(&console), "the last parent");

    // Other seeds on two threads at a time, each again in the machine of another.
    let template = last.expect("there were two");
    let future = |seed| {
        let mut child = branch(&template, seed);
        finish(&mut child)
    };
    let pair = |one, two| {
        std::thread::scope(|scope| {
            let one = scope.spawn(move || future(one));
            (future(two), one.join().expect("no panic"))
        })
    };
    let (two, one) = pair(8, 9);
    assert_ne!(one.state, two.state);
    assert_ne!(one.state, whole.state);
    let (one_again, two_again) = pair(9, 8);
    assert_equal(&one_again, &one, "seed 8 again");
    assert_equal(&two_again, &two, "seed 9 again");
    assert_equal(&future(7), &rest(&console), "the first seed, in the machine of another");
}
