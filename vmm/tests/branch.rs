//! Branches in one process: the parent's future again, isolation, going back, branches of branches, threads.
#![allow(missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::*;
use iced_x86::code_asm::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::{EngineConfig, Observation};
use orrery_guest_image::Image;
use orrery_vmm::chain::Hash;
use orrery_vmm::inputs::{Input, InputChannel};
use orrery_vmm::run::Ended;
use orrery_vmm::{BranchError, Limits, Machine, Pause, Seed, Template};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const OTHER: Seed = Seed(2);

fn machine(image: &Image) -> Machine {
    Machine::new(image, &small(), SEED, EngineConfig::default()).expect("the machine is built")
}

/// A machine that has run `icount` instructions.
fn machine_at(image: &Image, icount: u64) -> Machine {
    let mut machine = machine(image);
    run_until(&mut machine, icount);
    machine
}

fn run_until(machine: &mut Machine, icount: u64) {
    assert_eq!(machine.run(Limits::until(Icount(icount))).unwrap(), Pause::Limit);
    assert_eq!(machine.icount(), Icount(icount));
}

/// How it ends: the hash of the last state, and what was written meanwhile.
fn finish(machine: &mut Machine) -> (Hash, String) {
    let pause = machine.run(Limits::until(Icount(1 << 32))).unwrap();
    assert!(matches!(pause, Pause::Ended(Ended::PowerOff { .. })), "{pause:?}");
    let text = machine.take_output().iter().map(|o| String::from_utf8_lossy(&o.bytes).into_owned()).collect();
    (machine.state_hash(), text)
}

fn branch(template: &Template, seed: Seed) -> Machine {
    template.branch(seed, None).expect("the branch is made")
}

#[test]
fn with_the_parents_seed_a_branch_is_the_parents_future() {
    let image = wanderer(3_000, 500);
    let (expected, text) = finish(&mut machine(&image));
    for at in [1, 777, 20_000, 40_001] {
        let mut parent = machine_at(&image, at);
        let before: String =
            parent.take_output().iter().map(|o| String::from_utf8_lossy(&o.bytes).into_owned()).collect();
        let template = parent.freeze().unwrap();
        assert_eq!((template.icount(), template.seed()), (Icount(at), SEED));
        let mut first = branch(&template, SEED);
        assert_eq!(first.state_hash(), parent.state_hash(), "the first moment");
        let after = text.strip_prefix(&before).expect("what was printed before").to_owned();
        assert_eq!(finish(&mut first), (expected, after.clone()));
        assert_eq!(finish(&mut parent), (expected, after.clone()), "the parent goes on as before");
        assert_eq!(finish(&mut branch(&template, SEED)), (expected, after), "after parent and brother have ended");
    }
}

#[test]
fn seeds_part_at_the_branch_and_repeat() {
    let image = wanderer(2_000, 300);
    let mut parent = machine_at(&image, 12_345);
    let template = parent.freeze().unwrap();
    let mut futures: Vec<_> = (1..=20).map(|seed| finish(&mut branch(&template, Seed(seed)))).collect();
    for (index, future) in futures.iter().enumerate() {
        assert_eq!(*future, finish(&mut branch(&template, Seed(index as u64 + 1))));
    }
    // The same without any branch.
    let mut rekeyed = machine_at(&image, 12_345);
    rekeyed.rekey(Seed(3));
    rekeyed.take_output();
    assert_eq!(finish(&mut rekeyed), futures[2]);
    futures.sort();
    futures.dedup();
    assert_eq!(futures.len(), 20, "twenty seeds, twenty futures");
}

#[test]
fn relatives_do_not_disturb_each_other() {
    let image = wanderer(1_500, 200);
    let alone = |seed| finish(&mut branch(&machine_at(&image, 5_000).freeze().unwrap(), seed));
    let mut parent = machine_at(&image, 5_000);
    parent.take_output();
    let template = parent.freeze().unwrap();
    let mut children: Vec<_> = (1..=4).map(|seed| branch(&template, Seed(seed))).collect();
    for at in (6_000..20_000).step_by(1_000) {
        run_until(&mut parent, at);
        children.iter_mut().for_each(|child| run_until(child, at));
    }
    for (child, seed) in children.iter_mut().zip(1..) {
        assert_eq!(finish(child), alone(Seed(seed)), "seed {seed}");
    }
    assert_eq!(finish(&mut parent), alone(SEED));
    assert_eq!(finish(&mut branch(&template, OTHER)), alone(OTHER), "born after all others have ended");
}

#[test]
fn going_back_is_never_having_gone() {
    let image = wanderer(1_000, 150);
    let mut parent = machine_at(&image, 3_000);
    parent.take_output();
    let template = parent.freeze().unwrap();
    let at_start = template.branch(OTHER, None).unwrap().state_hash();
    let expected = finish(&mut branch(&template, OTHER));
    let mut child = branch(&template, OTHER);
    for round in 0..50 {
        match round % 3 {
            0 => assert_eq!(finish(&mut child), expected),
            1 => run_until(&mut child, 3_000 + round * 97),
            _ => {}
        }
        child.reset().unwrap();
        assert_eq!(child.icount(), Icount(3_000));
        assert_eq!(child.state_hash(), at_start, "round {round}");
    }
    assert_eq!(finish(&mut child), expected);
    child.reset_as(Seed(3), None).unwrap();
    assert_eq!(finish(&mut child), finish(&mut branch(&template, Seed(3))));
    child.reset().unwrap();
    assert_eq!(finish(&mut child), finish(&mut branch(&template, Seed(3))), "the seed stays the one given last");
    // The parent goes back to where it was frozen.
    let straight = finish(&mut parent);
    parent.reset().unwrap();
    assert_eq!(finish(&mut parent), straight);
}

#[test]
fn a_machine_that_never_branched_has_no_way_back() {
    let mut machine = machine(&wanderer(10, 10));
    assert!(matches!(machine.reset(), Err(BranchError::NoBranchPoint)));
}

#[test]
fn branches_branch() {
    // Ten pages become patches of the parent's file, five hundred a file of their own.
    for pages in [10, 500] {
        let image = wanderer(4_000, pages);
        let (expected, _) = finish(&mut machine(&image));
        let mut current = machine_at(&image, 1_000);
        let mut templates = vec![current.freeze().unwrap()];
        for generation in 1..6u64 {
            let mut child = branch(templates.last().unwrap(), SEED);
            run_until(&mut child, 1_000 + generation * 12_000);
            // Twice at different moments of one machine.
            if generation == 3 {
                templates.push(child.freeze().unwrap());
                run_until(&mut child, 1_000 + generation * 12_000 + 555);
            }
            templates.push(child.freeze().unwrap());
            current = child;
        }
        assert_eq!(finish(&mut current).0, expected);
        for template in &templates {
            let mut child = branch(template, SEED);
            assert_eq!(finish(&mut child).0, expected);
            child.reset().unwrap();
            assert_eq!(finish(&mut child).0, expected);
        }
        // Another seed, three generations down, against the same without branches.
        let mut straight = machine_at(&image, 1_000);
        straight.rekey(OTHER);
        run_until(&mut straight, 25_000);
        straight.rekey(Seed(7));
        let mut child = branch(&templates[0], OTHER);
        run_until(&mut child, 25_000);
        let mut grandchild = branch(&child.freeze().unwrap(), Seed(7));
        assert_eq!(finish(&mut grandchild).0, finish(&mut straight).0);
    }
}

#[test]
fn threads_branch_from_one_template() {
    let image = wanderer(1_500, 200);
    let template = machine_at(&image, 5_000).freeze().unwrap();
    let expected: Vec<_> = (0..8).map(|seed| finish(&mut branch(&template, Seed(seed)))).collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (template, expected) = (template.clone(), &expected);
            scope.spawn(move || {
                let mut kept = branch(&template, Seed(thread));
                for seed in 0..8 {
                    assert_eq!(finish(&mut branch(&template, Seed(seed))), expected[seed as usize]);
                    kept.reset_as(Seed(seed), None).unwrap();
                    assert_eq!(finish(&mut kept), expected[seed as usize]);
                    let mut other = branch(&template, Seed(seed));
                    assert_eq!(finish(&mut other), expected[seed as usize]);
                }
            });
        }
    });
}

#[test]
fn a_branch_in_the_place_of_another_is_a_new_one() {
    let image = wanderer(1_500, 200);
    let mut parent = machine_at(&image, 5_000);
    parent.take_output();
    let template = parent.freeze().unwrap();
    let expected = [SEED, OTHER].map(|seed| finish(&mut branch(&template, seed)));
    for round in 0..20 {
        let mut child = branch(&template, [SEED, OTHER][round % 2]);
        assert_eq!(child.icount(), Icount(5_000));
        if round % 3 == 0 {
            child.input(InputChannel::Console, b"x".to_vec());
            run_until(&mut child, 7_000);
        } else {
            assert_eq!(finish(&mut child), expected[round % 2], "round {round}");
        }
        // Hashed or not when it goes.
        if round % 4 == 0 {
            child.state_hash();
        }
    }
    // A machine from elsewhere is no spare of this template.
    run_until(&mut parent, 9_000);
    let elsewhere = parent.freeze().unwrap();
    drop(branch(&elsewhere, SEED));
    assert_eq!(branch(&template, SEED).icount(), Icount(5_000));
    // The parent itself may go: it was frozen here first.
    drop(parent);
    let mut children: Vec<_> = (0..4).map(|_| branch(&template, OTHER)).collect();
    children.iter_mut().for_each(|child| assert_eq!(finish(child), expected[1]));
}

/// Templates of one machine's moments have one stock: the branches of each go on in the memory that those of others left.
#[test]
fn a_branch_in_the_place_of_one_of_another_moment_is_a_new_one() {
    let image = wanderer(3_000, 300);
    let mut parent = machine_at(&image, 4_000);
    parent.take_output();
    let mut moments = Vec::new();
    for icount in [5_000, 9_000, 20_000] {
        run_until(&mut parent, icount);
        parent.take_output();
        let template = parent.freeze().unwrap();
        let expected = [SEED, OTHER].map(|seed| finish(&mut branch(&template, seed)));
        moments.push((template, icount, expected));
    }
    // Where the host has RAM: all of them are there in turn.
    let place = |machine: &Machine| machine.board().memory.get_host_address(GuestAddress(0)).unwrap() as usize;
    let expected_place = place(&branch(&moments[2].0, SEED));
    for round in 0..24 {
        // To and fro, so that RAM is put back to earlier moments as well.
        let (template, icount, expected) = &moments[[0, 1, 2, 0, 2, 1][round % 6]];
        let mut child = branch(template, [SEED, OTHER][round % 2]);
        assert_eq!((child.icount(), place(&child)), (Icount(*icount), expected_place));
        assert_eq!(finish(&mut child), expected[round % 2], "round {round}");
    }
    // The machine that was frozen keeps the stock for its next template.
    let (template, ..) = moments.pop().unwrap();
    moments.clear();
    drop(template);
    run_until(&mut parent, 25_000);
    let later = parent.freeze().unwrap();
    assert_eq!(place(&branch(&later, SEED)), expected_place);
}

#[test]
fn the_engine_of_a_dropped_branch_serves_the_next_unless_it_is_another_kind() {
    let image = wanderer(1_500, 200);
    let template = machine_at(&image, 5_000).freeze_only().unwrap();
    let entries = |machine: &Machine| machine.engine_statistics().entries;
    let mut child = branch(&template, SEED);
    assert_eq!(entries(&child), 0);
    child.observe(&Observation { breakpoints: vec![child.cpu().rip], ..Default::default() });
    assert_eq!(child.run(Limits::until(Icount(9_000))).unwrap(), Pause::Observed);
    drop(child);
    // Nothing of what the first one was asked to look for is left.
    let mut second = branch(&template, SEED);
    run_until(&mut second, 9_000);
    assert!(entries(&second) > 0);
    drop(second);
    let mut third = branch(&template, OTHER);
    assert!(entries(&third) > 0, "it is the engine of the second");
    third.change_engine(EngineConfig { tlb_bits: 2, ..Default::default() }).unwrap();
    run_until(&mut third, 9_000);
    drop(third);
    assert_eq!(entries(&branch(&template, SEED)), 0);
    // Whoever lives on when nobody can branch off any more keeps nothing for anybody.
    let mut last = branch(&template, SEED);
    drop(template);
    run_until(&mut last, 9_000);
    last.reset().unwrap();
    assert_eq!(last.icount(), Icount(5_000));
}

#[test]
fn prepared_branches_are_like_others() {
    let image = wanderer(1_500, 200);
    let template = machine_at(&image, 5_000).freeze().unwrap();
    let expected = [SEED, OTHER].map(|seed| finish(&mut branch(&template, seed)));
    // The second does not stop before the guest's end.
    for instructions in [3_000, 1 << 30] {
        template.prepare(3, instructions).unwrap();
        let mut children: Vec<_> = (0..5).map(|index| branch(&template, [SEED, OTHER][index % 2])).collect();
        for (index, child) in children.iter_mut().enumerate() {
            assert_eq!(child.take_inputs(), []);
            assert_eq!(finish(child), expected[index % 2]);
        }
    }
}

/// A template has gone ahead to learn what its branches translate. They are the same machines as without, whether they go
/// on in the memory of the one that did or in memory of their own.
#[test]
fn what_is_learned_changes_no_future() {
    let image = wanderer(3_000, 500);
    for at in [1, 777, 20_000, 40_001] {
        let mut parent = machine_at(&image, at);
        parent.take_output();
        let template = parent.freeze_only().unwrap();
        let hash = parent.state_hash();
        let expected = [SEED, OTHER].map(|seed| finish(&mut branch(&template, seed)));
        let mut learned = machine_at(&image, at);
        learned.take_output();
        let template = learned.freeze().unwrap();
        assert_eq!((learned.icount(), learned.pages_since_branch()), (Icount(at), 0));
        assert!(learned.take_output().is_empty() && learned.take_inputs().is_empty());
        assert_eq!(learned.state_hash(), hash);
        let mut children: Vec<_> = (0..6).map(|index| branch(&template, [SEED, OTHER][index % 2])).collect();
        for (index, child) in children.iter_mut().enumerate() {
            assert_eq!((child.icount(), child.pages_since_branch()), (Icount(at), 0));
            assert!(child.take_output().is_empty() && child.take_inputs().is_empty());
            assert_eq!(child.engine_statistics().entries, 0, "nothing has run");
            if index % 2 == 0 {
                assert_eq!(child.state_hash(), hash);
            }
            assert_eq!(finish(child), expected[index % 2], "child {index} at {at}");
            child.reset().unwrap();
            assert_eq!(finish(child), expected[index % 2], "child {index} at {at}, again");
        }
        // A template of a branch that began with what was learned, and knows more since.
        let mut child = branch(&template, SEED);
        run_until(&mut child, at + 10_000);
        child.take_output();
        let (template, later) = (child.freeze().unwrap(), finish(&mut child));
        assert_eq!(later.0, expected[0].0);
        (0..3).map(|_| branch(&template, SEED)).for_each(|mut child| assert_eq!(finish(&mut child), later));
        assert_eq!(finish(&mut learned), expected[0]);
    }
}

#[test]
fn branches_need_not_translate_what_was_learned() {
    let image = guest(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 1_000).unwrap();
        a.set_label(&mut again).unwrap();
        for _ in 0..100 {
            let mut next = a.create_label();
            a.add(eax, ecx).unwrap();
            a.jmp(next).unwrap();
            a.set_label(&mut next).unwrap();
        }
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        exit(a, 0);
    });
    let translated = |template: &Template| {
        // The first goes on in the memory of a machine that has been ahead.
        let mut children = [SEED, SEED].map(|seed| branch(template, seed));
        children.each_mut().map(|child| {
            run_until(child, 20_001);
            child.engine_statistics().translated
        })
    };
    let [cold, _] = translated(&machine_at(&image, 1).freeze_only().unwrap());
    let learned = translated(&machine_at(&image, 1).freeze().unwrap());
    // Blocks that end at a limit are left.
    assert!(learned.iter().all(|count| count * 4 < cold), "{learned:?} of {cold}");
}

/// Looking ahead has an end whatever the guest does, and leaves the guest where it was.
#[test]
fn a_guest_cannot_keep_the_one_that_looks_ahead() {
    let endless = |write: &dyn Fn(&mut CodeAssembler)| guest(|a| write(a));
    let long_string = endless(&|a| {
        // Four gigabytes, byte by byte.
        a.xor(esi, esi).unwrap();
        a.mov(rcx, -1i64).unwrap();
        a.rep().lodsb().unwrap();
    });
    let long_strings = endless(&|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(edi, DATA as u32).unwrap();
        a.mov(ecx, 0x40_0000).unwrap();
        a.rep().stosb().unwrap();
        a.jmp(again).unwrap();
    });
    let halted = endless(&|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
    });
    let faults = endless(&|a| {
        a.nop().unwrap();
        a.ud2().unwrap();
    });
    let output = endless(&|a| {
        let mut again = a.create_label();
        a.mov(dx, SERIAL).unwrap();
        a.set_label(&mut again).unwrap();
        a.out(dx, al).unwrap();
        a.jmp(again).unwrap();
    });
    for image in [long_string, long_strings, halted, faults, output] {
        let mut machine = machine_at(&image, 1);
        let hash = machine.state_hash();
        let begin = Instant::now();
        let template = machine.freeze().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        assert_eq!((machine.state_hash(), machine.icount(), machine.ended()), (hash, Icount(1), None));
        for mut child in [SEED, SEED].map(|seed| branch(&template, seed)) {
            assert_eq!((child.state_hash(), child.icount(), child.ended()), (hash, Icount(1), None));
            assert!(child.take_output().is_empty() && !child.is_unfinished());
        }
    }
}

/// A machine and how a machine without any branches comes to the same state: run to each icount, then take that seed.
struct Member {
    machine: Machine,
    /// At its branch point, and now: the keys taken so far.
    start: Vec<(u64, Seed)>,
    keys: Vec<(u64, Seed)>,
}

/// Random freezing, branching, going back, recycling and running, against machines that never branched.
#[test]
fn a_random_family_agrees_with_machines_that_never_branched() {
    let image = wanderer(1_200, 300);
    let odd = EngineConfig {
        tlb_bits: 2,
        chaining: false,
        max_block_instructions: 3,
        chaos_seed: Some(5),
        ..Default::default()
    };
    for (run, engine) in [EngineConfig::default(), odd, EngineConfig::default()].into_iter().enumerate() {
        let mut state = 0x5eed + run as u64;
        let mut below = move |bound: usize| {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            (state >> 33) as usize % bound
        };
        let first = Machine::new(&image, &small(), SEED, engine).unwrap();
        let mut family = vec![Member { machine: first, start: Vec::new(), keys: Vec::new() }];
        let mut templates: Vec<(Template, Vec<(u64, Seed)>)> = Vec::new();
        for _ in 0..60 {
            let size = family.len();
            let who = below(size);
            let seed = Seed(1 + below(3) as u64);
            let member = &mut family[who];
            match below(7) {
                0 => {
                    templates.push((member.machine.freeze().unwrap(), member.keys.clone()));
                }
                1 | 2 if !templates.is_empty() => {
                    let (template, keys) = &templates[below(templates.len())];
                    let mut keys = keys.clone();
                    keys.push((template.icount().0, seed));
                    family.push(Member { machine: branch(template, seed), start: keys.clone(), keys });
                }
                3 => {
                    if member.machine.reset().is_ok() {
                        member.keys.clone_from(&member.start);
                    }
                }
                4 if size > 6 => {
                    drop(family.swap_remove(who));
                }
                5 => drop(member.machine.state_hash()),
                _ => {
                    let until = (member.machine.icount().0 + below(4_000) as u64).min(15_000);
                    member.machine.run(Limits::until(Icount(until))).unwrap();
                }
            }
        }
        assert!(templates.len() > 3 && family.len() > 4, "{} templates, {} machines", templates.len(), family.len());
        for (index, member) in family.iter_mut().enumerate() {
            let mut straight = machine(&image);
            for (icount, seed) in &member.keys {
                run_until(&mut straight, *icount);
                straight.rekey(*seed);
            }
            run_until(&mut straight, member.machine.icount().0);
            assert_eq!(member.machine.state_hash(), straight.state_hash(), "run {run}, machine {index}");
            assert_eq!(finish(&mut member.machine).0, finish(&mut straight).0, "run {run}, machine {index}");
        }
    }
}

#[test]
fn hashes_wait_until_somebody_asks() {
    let image = wanderer(3_000, 500);
    let mut straight = machine(&image);
    let mut current = machine(&image);
    let mut templates = Vec::new();
    // No hash is asked for on the way down.
    for generation in 1..5 {
        run_until(&mut current, generation * 11_000);
        let template = current.freeze().unwrap();
        current = branch(&template, SEED);
        templates.push(template);
    }
    for (template, generation) in templates.iter().zip(1..) {
        run_until(&mut straight, generation * 11_000);
        assert_eq!(branch(template, SEED).state_hash(), straight.state_hash(), "generation {generation}");
    }
    assert_eq!(finish(&mut current).0, finish(&mut branch(&templates[0], SEED)).0);
}

/// Echoes what comes in on the serial port, until a `q`.
fn echo() -> Image {
    guest(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(edx, SERIAL + 5).unwrap();
        a.in_(al, dx).unwrap();
        a.test(al, 1).unwrap();
        a.je(again).unwrap();
        a.mov(edx, SERIAL).unwrap();
        a.in_(al, dx).unwrap();
        a.out(dx, al).unwrap();
        a.cmp(al, 'q' as i32).unwrap();
        a.jne(again).unwrap();
        exit(a, 0);
    })
}

#[test]
fn inputs_that_wait_are_inherited_and_new_ones_replace_them() {
    let image = echo();
    let mut recorded = machine_at(&image, 1_000);
    recorded.input(InputChannel::Console, b"one".to_vec());
    run_until(&mut recorded, 50_000);
    recorded.input(InputChannel::Console, b"twoq".to_vec());
    let (expected, text) = finish(&mut recorded);
    assert_eq!(text, "onetwoq");
    let log = recorded.take_inputs();

    let mut parent = machine(&image);
    parent.replay(log.clone());
    run_until(&mut parent, 30_000);
    parent.take_output();
    let template = parent.freeze().unwrap();
    let rest = (expected, "twoq".to_owned());
    assert_eq!(finish(&mut branch(&template, SEED)), rest, "inherited");
    assert_eq!(finish(&mut parent), rest);
    let given = Input { icount: 40_000, virtual_ns: 40_000, channel: InputChannel::Console, data: b"xq".to_vec() };
    let mut other = template.branch(SEED, Some(vec![given.clone()])).unwrap();
    assert_eq!(finish(&mut other).1, "xq");
    assert_eq!(other.take_inputs(), [given]);
    other.reset().unwrap();
    assert_eq!(finish(&mut other).1, "xq", "the way back keeps the inputs");
    // With the inputs that the parent had, given as a log.
    assert_eq!(finish(&mut template.branch(SEED, Some(log[1..].to_vec())).unwrap()), rest);
    // Inputs that belong elsewhere are refused, not bent.
    let late = Input { icount: 40_001, virtual_ns: 40_000, channel: InputChannel::Console, data: b"q".to_vec() };
    assert!(template.branch(SEED, Some(vec![late])).unwrap().run(Limits::until(Icount(1 << 20))).is_err());
}

#[test]
fn saves_of_a_child_hold_what_its_parent_wrote() {
    let image = wanderer(3_000, 40);
    let mut parent = machine_at(&image, 500);
    let booted = parent.save();
    run_until(&mut parent, 2_000);
    let expected = finish(&mut Machine::restore(&image, &booted, EngineConfig::default()).unwrap());
    let template = parent.freeze().unwrap();
    let mut child = branch(&template, SEED);
    let at_once = child.save();
    run_until(&mut child, 2_500);
    let later = child.save();
    // Going back changes RAM as well.
    child.reset().unwrap();
    let back = child.save();
    for saved in [booted, at_once, later, back] {
        let mut restored = Machine::restore(&image, &saved, EngineConfig::default()).unwrap();
        assert_eq!(finish(&mut restored).0, expected.0, "from {:?}", saved.state().icount());
    }
}
