//! Saving and restoring machines: whatever is saved goes on as if nothing had happened.
#![allow(missing_docs)]

mod common;

use common::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_devices::disk::{Base, Disk};
use orrery_guest_image::Image;
use orrery_vmm::chain::Hash;
use orrery_vmm::machine::{MachineState, StateError};
use orrery_vmm::{Limits, Machine, Pause, Seed};
use proptest::prelude::*;

fn machine(image: &Image, seed: u64) -> Machine {
    Machine::new(image, &small(), Seed(seed), EngineConfig::default()).expect("the machine is built")
}

fn end(machine: &mut Machine) -> (Icount, Hash) {
    let pause = machine.run(Limits::until(Icount(1 << 32))).expect("no inputs");
    assert!(matches!(pause, Pause::Ended(_)), "{pause:?}");
    (machine.icount(), machine.state_hash())
}

fn at(machine: &mut Machine, icount: u64) {
    assert_eq!(machine.run(Limits::until(Icount(icount))).expect("no inputs"), Pause::Limit);
    assert!(machine.at_moment());
}

#[test]
fn a_restored_machine_goes_on_as_the_one_that_was_saved() {
    let image = busy(2000);
    let expected = end(&mut machine(&image, 1));
    let mut straight = machine(&image, 1);
    for moment in [0, 1, 7, 1000, 1001, 9_000, expected.0.0 - 2] {
        at(&mut straight, moment);
        let saved = straight.save();
        let mut restored = Machine::restore(&image, &saved, EngineConfig::default()).unwrap();
        assert_eq!(restored.icount(), Icount(moment));
        assert_eq!(restored.state_hash(), straight.state_hash(), "at {moment}");
        assert!(restored.at_moment());
        // A save of the restored machine is as good.
        at(&mut restored, moment + 1);
        let mut again = Machine::restore(&image, &restored.save(), EngineConfig::default()).unwrap();
        assert_eq!(end(&mut again), expected, "from {moment}, twice");
        assert_eq!(end(&mut restored), expected, "from {moment}");
    }
    assert_eq!(end(&mut straight), expected);
}

#[test]
fn an_ended_machine_stays_ended() {
    let image = busy(10);
    let mut first = machine(&image, 1);
    let expected = end(&mut first);
    let mut restored = Machine::restore(&image, &first.save(), EngineConfig::default()).unwrap();
    assert_eq!(end(&mut restored), expected);
    assert_eq!(restored.ended(), first.ended());
    // Its stored form as well.
    let stored = first.state().encode();
    let state = MachineState::decode(&stored).unwrap();
    assert_eq!((state.ended(), state.icount()), (first.ended(), expected.0));
    assert_eq!(state.encode(), stored);
}

#[test]
fn another_seed_is_another_future() {
    let image = busy(2000);
    let mut parent = machine(&image, 1);
    at(&mut parent, 5000);
    let saved = parent.save();
    let future = |seed: Option<u64>| {
        let mut branch = Machine::restore(&image, &saved, EngineConfig::default()).unwrap();
        if let Some(seed) = seed {
            branch.rekey(Seed(seed));
        }
        end(&mut branch)
    };
    let straight = end(&mut parent);
    assert_eq!(future(None), straight);
    let futures: Vec<_> = (2..10).map(|seed| future(Some(seed))).collect();
    for (index, one) in futures.iter().enumerate() {
        assert_eq!(*one, future(Some(index as u64 + 2)));
        assert_ne!(*one, straight);
        assert!(futures[..index].iter().all(|other| other.1 != one.1));
    }
}

#[test]
fn the_encoded_state_is_complete() {
    let image = busy(2000);
    let expected = end(&mut machine(&image, 1));
    let mut first = machine(&image, 1);
    at(&mut first, 7000);
    first.state_hash();
    let state = MachineState::decode(&first.state().encode()).unwrap();
    assert_eq!(state.inputs_entered(), 0);
    let memory = orrery_vmm::ram::create(32 << 20).unwrap();
    let mut page = [0; 4096];
    for (number, _) in first.memory_digest().pages() {
        use vm_memory::{Bytes, GuestAddress};
        assert!(orrery_vmm::digest::read_page(&first.board().memory, number, &mut page));
        memory.write_slice(&page, GuestAddress(number * 4096)).unwrap();
    }
    let digest = first.memory_digest().clone();
    let mut restored = Machine::assemble(memory, digest, state, EngineConfig::default()).unwrap();
    assert_eq!(restored.state_hash(), first.state_hash());
    assert_eq!(end(&mut restored), expected);
}

#[test]
fn an_encoded_state_of_another_version_is_refused() {
    let image = busy(10);
    let mut bytes = machine(&image, 1).state().encode();
    bytes[0] += 1;
    assert!(matches!(MachineState::decode(&bytes), Err(StateError::Version { .. })));
    assert!(matches!(MachineState::decode(&[]), Err(StateError::Encoding { .. })));
}

#[test]
fn an_encoded_state_takes_its_own_disks_only() {
    use orrery_guest_image::{Content, ImageParts};
    let disk = Content::from(vec![7u8; 8192]);
    let kernel = Content::from(busy(10).kernel().to_vec());
    let image = Image::from_parts(ImageParts { kernel, disks: vec![disk.clone()], ..Default::default() }).unwrap();
    let bytes = machine(&image, 1).state().encode();
    let mut state = MachineState::decode(&bytes).unwrap();
    assert!(matches!(state.attach_disks(vec![]), Err(StateError::Disks { expected: 1, actual: 0 })));
    let short: Base = std::sync::Arc::new(vec![0u8; 512]);
    assert!(matches!(state.attach_disks(vec![(short, Default::default())]), Err(StateError::Disk { index: 0, .. })));
    state.attach_disks(vec![(std::sync::Arc::new(disk), Default::default())]).unwrap();
    let mut byte = [0];
    state.disks().next().unwrap().read_at(8191, &mut byte).unwrap();
    assert_eq!(byte, [7]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// A damaged state is refused, or is a machine that runs; nothing panics.
    #[test]
    fn hostile_states_never_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let image = busy(50);
        let mut first = machine(&image, 1);
        at(&mut first, 100);
        let mut bytes = first.state().encode();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Ok(state) = MachineState::decode(&bytes) {
            let memory = orrery_vmm::ram::create(state.config().memory_mib.min(64) << 20).unwrap();
            let digest = orrery_vmm::digest::MemoryDigest::zeroed(&memory);
            let mut machine = Machine::assemble(memory, digest, state, EngineConfig::default()).unwrap();
            let until = Icount(machine.icount().0.saturating_add(10_000));
            let _ = machine.run(Limits { time: orrery_devices::VirtualNs(machine.time().0.saturating_add(1 << 30)), ..Limits::until(until) });
            machine.state_hash();
        }
    }
}
