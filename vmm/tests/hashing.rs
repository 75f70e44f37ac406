//! Hashing a moment while the guest goes on: what comes out is the past, whatever was written since.
#![allow(missing_docs)]

mod common;

use common::*;
use orrery_cpu::engine::EngineConfig;
use orrery_cpu::{Icount, Past};
use orrery_guest_image::Image;
use orrery_vmm::machine::hashing::Wanted;
use orrery_vmm::run::manifest::ImageReference;
use orrery_vmm::run::recorder::{NoHost, Origin, Recorder, RecorderOptions};
use orrery_vmm::{Limits, Machine};
use vm_memory::{Bytes, GuestAddress};

/// Moments are so far apart, in instructions.
const STEP: u64 = 1500;
const MOMENTS: u64 = 40;
const PAGE: usize = 4096;

fn machine(image: &Image) -> Machine {
    Machine::new(image, &small(), SEED, EngineConfig::default()).expect("the machine is built")
}

fn run_until(machine: &mut Machine, icount: u64) {
    machine.run(Limits::until(Icount(icount))).expect("no inputs");
}

/// RAM's pages that are not zeros.
fn pages(machine: &mut Machine) -> Vec<(u64, Vec<u8>)> {
    machine.state_hash();
    let filled: Vec<u64> = machine.memory_digest().pages().map(|(page, _)| page).collect();
    let read = |page: u64| {
        let mut content = vec![0; PAGE];
        machine.board().memory.read_slice(&mut content, GuestAddress(page * PAGE as u64)).expect("RAM");
        (page, content)
    };
    filled.into_iter().map(read).collect()
}

#[test]
fn the_hash_of_a_past_moment_is_that_of_the_moment() {
    let image = wanderer(20_000, 40);
    let (mut still, mut moving) = (machine(&image), machine(&image));
    for number in 1..=MOMENTS {
        let at = number * STEP;
        run_until(&mut still, at);
        run_until(&mut moving, at);
        let work = moving.begin_hash(None);
        // Begun before the guest goes on, beside it, by the machine when it needs it, or after the guest has gone on.
        let thread = match number % 4 {
            0 => Some(std::thread::spawn(move || work.run())),
            1 => {
                work.run();
                None
            }
            2 => None,
            _ => {
                run_until(&mut moving, at + STEP / 3);
                work.run();
                None
            }
        };
        run_until(&mut moving, at + STEP / 2);
        let hashed = moving.take_hashed(true).expect("it was begun");
        assert_eq!((hashed.icount, hashed.state_hash), (Icount(at), still.state_hash()), "moment {number}");
        assert!(moving.take_hashed(true).is_none(), "once");
        thread.into_iter().for_each(|thread| thread.join().expect("no panic"));
    }
    run_until(&mut still, MOMENTS * STEP + STEP / 2);
    assert_eq!(still.state_hash(), moving.state_hash());
}

#[test]
fn the_contents_are_those_of_the_moment() {
    let image = wanderer(20_000, 40);
    let (mut still, mut moving) = (machine(&image), machine(&image));
    let mut base = None;
    let mut ram = std::collections::BTreeMap::new();
    for number in 1..=MOMENTS {
        let at = number * STEP;
        run_until(&mut still, at);
        run_until(&mut moving, at);
        let work = moving.begin_hash(Some(Wanted { base: base.take(), contents: Vec::new() }));
        run_until(&mut moving, at + STEP / 2);
        if number % 5 == 0 {
            // Somebody else wants to know the present.
            moving.state_hash();
        }
        drop(work);
        let hashed = moving.take_hashed(true).expect("it was begun");
        let mut contents = hashed.contents.chunks_exact(PAGE);
        for (page, hash) in &hashed.changed {
            if *hash == orrery_vmm::page_hash::ZERO_PAGE {
                ram.remove(page);
            } else {
                ram.insert(*page, contents.next().expect("a content").to_vec());
            }
        }
        assert_eq!(contents.next(), None);
        let expected = pages(&mut still);
        assert_eq!(ram.len(), expected.len());
        assert!(expected.iter().all(|(page, content)| ram[page] == *content), "moment {number}");
        base = Some(hashed.digest);
    }
}

#[test]
fn what_happens_from_outside_waits_for_the_hash() {
    let image = wanderer(20_000, 40);
    let mut machine = machine(&image);
    run_until(&mut machine, STEP);
    let expected = machine.state_hash();
    let everything = || Some(Wanted { base: None, contents: Vec::new() });
    let check = |machine: &mut Machine, what: &str| {
        let hashed = machine.take_hashed(true).expect("it was begun");
        assert_eq!(hashed.state_hash, expected, "{what}");
    };
    let _ = machine.begin_hash(everything());
    machine.change_engine(EngineConfig::default()).unwrap();
    run_until(&mut machine, 2 * STEP);
    check(&mut machine, "another engine");

    let mut machine = self::machine(&image);
    run_until(&mut machine, STEP);
    let template = machine.freeze().unwrap();
    let mut branch = template.branch(SEED, None).unwrap();
    let _ = branch.begin_hash(everything());
    run_until(&mut branch, 2 * STEP);
    branch.reset().unwrap();
    check(&mut branch, "going back");
    let _ = branch.begin_hash(everything());
    assert!(branch.poke_memory(DATA, &[0xEE; 8192]));
    check(&mut branch, "a write from outside");
    branch.reset().unwrap();
    assert_eq!(branch.state_hash(), expected);
    // Nobody takes this one, and its memory goes to the next branch.
    let work = branch.begin_hash(everything());
    drop(branch);
    let mut next = template.branch(SEED, None).unwrap();
    run_until(&mut next, 2 * STEP);
    work.run();
    next.reset().unwrap();
    assert_eq!(next.state_hash(), expected);
}

#[test]
fn a_recorded_chain_is_that_of_the_moments() {
    let image = wanderer(3_000, 40);
    let options = RecorderOptions { epoch_instructions: STEP, until: None, until_time: None, snapshots: None };
    let origin = Origin {
        image: ImageReference { path: "none".into(), hash: Default::default() },
        machine: small(),
        seed: SEED,
        branches: Vec::new(),
        replayed_inputs: None,
        host_cpu_vendor: String::new(),
    };
    let mut recorder = Recorder::new(machine(&image), origin, options, None).expect("nothing is written");
    let summary = recorder.run(&mut NoHost).expect("it runs");
    let mut still = machine(&image);
    let mut last = 0;
    for link in recorder.links() {
        assert!(link.icount == last + STEP || link.icount == summary.icount, "each epoch once");
        run_until(&mut still, link.icount);
        assert_eq!(link.state, still.state_hash(), "after {} instructions", link.icount);
        last = link.icount;
    }
    assert_eq!(last, summary.icount);
    assert!(recorder.links().len() > 20);
}

#[test]
fn a_reader_beside_a_writer_sees_the_past() {
    const PAGES: u64 = 64;
    let memory = orrery_vmm::ram::create(PAGES << 12).expect("RAM");
    let fill = |page: u64, byte: u8| {
        memory.write_slice(&[byte; PAGE], GuestAddress(page * PAGE as u64)).expect("RAM");
    };
    for round in 0..200u8 {
        (0..PAGES).for_each(|page| fill(page, round));
        let past = Past::new(memory.clone(), (0..PAGES).collect());
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                for index in 0..PAGES as usize {
                    let mut content = [0; PAGE];
                    assert!(past.take(index, &mut content));
                    assert_eq!(content, [round; PAGE], "page {index}");
                }
            });
            for page in (0..PAGES).rev() {
                past.keep(page);
                fill(page, round.wrapping_add(1));
            }
            reader.join().expect("it saw the past");
        });
    }
}
