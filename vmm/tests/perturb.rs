//! What must not matter does not: machines that are disturbed in every way go through the states of those left alone.
#![allow(missing_docs)]

mod common;

use common::*;
use iced_x86::code_asm::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_guest_image::Image;
use orrery_vmm::inputs::{Input, InputChannel};
use orrery_vmm::perturb::{Course, Entry, Plan};
use orrery_vmm::verify::{Sample, Sampler, Until, locate};
use orrery_vmm::{Limits, Machine, MachineError};

/// Stages of 1 to 250 microseconds: tens of them in a guest of some hundred thousand instructions.
const STAGE_NS: (u32, u32) = (10, 18);

fn machine(image: &Image) -> Result<Machine, MachineError> {
    Machine::new(image, &small(), SEED, EngineConfig::default())
}

fn plan(seed: u64) -> Plan {
    Plan::new(seed, &EngineConfig::default()).with_stage_ns(STAGE_NS)
}

fn samples(course: impl Into<Course>) -> (Vec<Sample>, Sampler) {
    let until = Until { icount: Some(Icount(3_000_000)), time: None };
    let mut sampler = Sampler::new(course, 70_001, until);
    let mut samples = Vec::new();
    while let Some(sample) = sampler.next_sample().expect("nothing is replayed") {
        samples.push(sample);
    }
    (samples, sampler)
}

/// Modifies its own code, copies strings across pages, and touches many pages.
fn restless(iterations: u32) -> Image {
    guest(|a| {
        a.mov(ebp, iterations).unwrap();
        let (mut again, mut patched) = (a.create_label(), a.create_label());
        a.set_label(&mut again).unwrap();
        a.lea(rbx, ptr(patched)).unwrap();
        a.mov(byte_ptr(rbx + 1), bpl).unwrap();
        a.set_label(&mut patched).unwrap();
        a.add(al, 0).unwrap();
        a.lea(rsi, ptr(DATA + 0xFF0)).unwrap();
        a.lea(rdi, ptr(DATA + 0x1FF3)).unwrap();
        a.mov(ecx, 40).unwrap();
        a.rep().movsb().unwrap();
        a.mov(qword_ptr(DATA + 0xFFC), rax).unwrap();
        a.imul_3(rdx, rbp, 0x1_1003).unwrap();
        a.and(edx, 0xF_FFF8).unwrap();
        a.add(qword_ptr(rdx + DATA as i32), rbp).unwrap();
        a.rdtsc().unwrap();
        a.dec(ebp).unwrap();
        a.jne(again).unwrap();
        print(a, "one line\n");
        exit(a, 0);
    })
}

#[test]
fn what_must_not_matter_does_not() {
    for (name, image) in [("busy", busy(20_000)), ("restless", restless(2_000))] {
        let (expected, _) = samples(machine(&image).unwrap());
        let mut entries = [0; 5];
        for seed in 0..20 {
            let course = Course::perturbed(&image, machine(&image).unwrap(), Vec::new(), plan(seed));
            let (found, sampler) = samples(course);
            let stages = sampler.course().stages();
            if let Some(at) = expected.iter().zip(&found).position(|(expected, found)| expected != found) {
                let stages: Vec<String> = stages.iter().map(ToString::to_string).collect();
                let (expected, found) = (&expected[at], &found[at]);
                panic!("{name}, plan {seed}: {found:?} instead of {expected:?}\n{}", stages.join("\n"));
            }
            assert_eq!(found.len(), expected.len(), "{name}, plan {seed}");
            for stage in stages {
                entries[match stage.entry {
                    Entry::NewEngine => 0,
                    Entry::Branch => 1,
                    Entry::Rewind { .. } => 2,
                    Entry::Restore => 3,
                    Entry::Continue => 4,
                }] += 1;
            }
        }
        assert!(entries.iter().all(|count| *count > 3), "every kind of stage was there: {entries:?}");
    }
}

/// The guest that idles for ever must end there, however often it is stopped in idle time.
#[test]
fn idle_guests_end_where_they_end() {
    let image = guest(|a| {
        a.sti().unwrap();
        a.mov(ecx, 5_000).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    let (expected, _) = samples(machine(&image).unwrap());
    for seed in 0..8 {
        let (found, sampler) = samples(Course::perturbed(&image, machine(&image).unwrap(), Vec::new(), plan(seed)));
        assert_eq!(found, expected, "{:?}", sampler.course().stages());
    }
}

#[test]
fn a_difference_under_perturbation_is_located() {
    let image = busy(20_000);
    let moment = 123_456;
    let mut build = |which: usize| {
        let machine = machine(&image)?;
        if which == 0 {
            return Ok(machine.into());
        }
        let data = b"z".to_vec();
        let input = Input { icount: moment, virtual_ns: moment, channel: InputChannel::Console, data };
        Ok(Course::perturbed(&image, machine, vec![input], plan(3)))
    };
    let found = locate(&mut build, 0, 150_000).unwrap().expect("an input makes a difference");
    assert_eq!((found.equal_at, found.differs_at), (moment, moment + 1));
    assert!(!found.stages.is_empty() && found.stages.iter().all(|stage| stage.from <= moment));
    assert!(found.differences.iter().any(|text| text.starts_with("serial port")), "{:?}", found.differences);
}

/// A machine moves to other engines in mid-run, with nothing hashed in between: what the old one knew of written
/// pages must not be lost.
#[test]
fn engines_can_be_exchanged() {
    let image = busy(20_000);
    let mut left_alone = machine(&image).unwrap();
    let mut moved = machine(&image).unwrap();
    for at in [1, 5_000, 77_777, 150_000] {
        let config = EngineConfig { tlb_bits: 3, ..EngineConfig::default() };
        moved.change_engine(config).unwrap();
        for machine in [&mut left_alone, &mut moved] {
            machine.run(Limits::until(Icount(at))).unwrap();
        }
    }
    moved.change_engine(EngineConfig::default()).unwrap();
    assert_eq!(moved.state_hash(), left_alone.state_hash());
}
