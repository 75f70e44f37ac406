//! What the unit tests of this room share.

use vm_memory::GuestAddress;

use crate::{Context, Device, Effect, GuestMemory, VirtualNs};

/// RAM of the test machine, in bytes.
pub const RAM_BYTES: usize = 1 << 20;

/// Memory and effects around a device under test.
pub struct Bench {
    pub memory: GuestMemory,
    pub effects: Vec<Effect>,
    pub now: u64,
}

impl Bench {
    pub fn new() -> Bench {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap();
        Bench { memory, effects: Vec::new(), now: 0 }
    }

    pub fn context(&mut self) -> Context<'_> {
        Context { now: VirtualNs(self.now), memory: &self.memory, effects: &mut self.effects }
    }

    pub fn read(&mut self, device: &mut dyn Device, offset: u64, size: usize) -> u64 {
        let mut data = [0; 8];
        device.read(&mut self.context(), offset, &mut data[..size]);
        u64::from_le_bytes(data)
    }

    pub fn write(&mut self, device: &mut dyn Device, offset: u64, size: usize, value: u64) {
        device.write(&mut self.context(), offset, &value.to_le_bytes()[..size]);
    }

    pub fn event(&mut self, device: &mut dyn Device, token: u32) {
        device.event(&mut self.context(), token);
    }

    pub fn take(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// The last wake-up asked for `token`, if it was not taken back.
    pub fn wake(&self, token: u32) -> Option<u64> {
        self.effects.iter().rev().find_map(|effect| match effect {
            Effect::Wake { token: t, at } if *t == token => Some(Some(at.0)),
            Effect::Cancel { token: t } if *t == token => Some(None),
            _ => None,
        })?
    }
}

/// A round trip through the stored form must change nothing.
pub fn assert_round_trip<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
    let bytes = postcard::to_allocvec(value).unwrap();
    let back: T = postcard::from_bytes(&bytes).unwrap();
    assert_eq!(postcard::to_allocvec(&back).unwrap(), bytes);
    back
}

/// One step of a register fuzz.
#[derive(Clone, Debug)]
pub enum Step {
    Read { offset: u64, size: usize },
    Write { offset: u64, size: usize, value: u64 },
    Event { token: u32 },
    Pass { ns: u64 },
}

/// Steps over a window of `len` bytes.
pub fn steps(len: u64) -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    use proptest::prelude::*;
    let size = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let offset = prop_oneof![4 => (0..len).prop_map(|o| o & !3), 2 => 0..len, 1 => any::<u64>()];
    let value = prop_oneof![any::<u64>(), 0..256u64, any::<u32>().prop_map(u64::from), Just(u64::MAX)];
    let step = prop_oneof![
        3 => (offset.clone(), size.clone()).prop_map(|(offset, size)| Step::Read { offset, size }),
        6 => (offset, size, value).prop_map(|(offset, size, value)| Step::Write { offset, size, value }),
        2 => (0..4u32).prop_map(|token| Step::Event { token }),
        2 => prop_oneof![0..2_000u64, 0..4_000_000_000u64, any::<u64>()].prop_map(|ns| Step::Pass { ns }),
    ];
    proptest::collection::vec(step, 0..60)
}

/// Runs the steps on a device; it must not panic, and equal steps must have equal effects.
pub fn fuzz<D: Device>(device: &mut D, steps: &[Step]) -> Vec<Effect> {
    let mut bench = Bench::new();
    for step in steps {
        match *step {
            Step::Read { offset, size } => {
                bench.read(device, offset, size);
            }
            Step::Write { offset, size, value } => bench.write(device, offset, size, value),
            Step::Event { token } => bench.event(device, token),
            Step::Pass { ns } => bench.now = bench.now.saturating_add(ns),
        }
    }
    bench.take()
}
