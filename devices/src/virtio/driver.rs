//! A minimal virtio driver for tests, and the hostile one.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::transport::VirtioDevice;
use super::{Block, Console, Entropy, Net, VirtioMmio};
use crate::disk::CowDisk;
use crate::testing::{Bench, Step, assert_round_trip, fuzz, steps};
use crate::{Device, Effect, Latency};

const QUEUE_SIZE: u16 = 64;
const QUEUE_STRIDE: u64 = 0x1000;
const INDIRECT: u64 = 0x6000;

impl Bench {
    pub fn store(&mut self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn load(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// Queue i has its rings at 0x1000 * (i + 1): descriptors, then available at 0x400, used at 0x800.
pub struct Driver {
    next_descriptor: [u16; 2],
    available: [u16; 2],
}

fn queue_base(queue: u16) -> u64 {
    QUEUE_STRIDE * u64::from(queue + 1)
}

impl Driver {
    /// Goes through the initialisation of virtio 1.2, 3.1.1.
    pub fn start(bench: &mut Bench, device: &mut dyn Device, queues: u16) -> Driver {
        assert_eq!(bench.read(device, 0, 4), u64::from(u32::from_le_bytes(*b"virt")));
        assert_eq!(bench.read(device, 4, 4), 2);
        for status in [0, 1, 3] {
            bench.write(device, 0x70, 4, status);
        }
        for select in 0..2 {
            bench.write(device, 0x14, 4, select);
            let features = bench.read(device, 0x10, 4);
            bench.write(device, 0x24, 4, select);
            bench.write(device, 0x20, 4, features);
        }
        bench.write(device, 0x70, 4, 11);
        assert_eq!(bench.read(device, 0x70, 4), 11);
        for queue in 0..queues {
            let base = queue_base(queue);
            bench.store(base, &[0; QUEUE_STRIDE as usize]);
            bench.write(device, 0x30, 4, u64::from(queue));
            assert_eq!(bench.read(device, 0x44, 4), 0);
            assert!(bench.read(device, 0x34, 4) >= u64::from(QUEUE_SIZE));
            bench.write(device, 0x38, 4, u64::from(QUEUE_SIZE));
            for (register, address) in [(0x80, base), (0x90, base + 0x400), (0xA0, base + 0x800)] {
                bench.write(device, register, 4, address);
                bench.write(device, register + 4, 4, 0);
            }
            bench.write(device, 0x44, 4, 1);
            assert_eq!(bench.read(device, 0x44, 4), 1);
        }
        bench.write(device, 0x70, 4, 15);
        Driver { next_descriptor: [0; 2], available: [0; 2] }
    }

    /// Makes a chain of (address, length, device writes) available.
    pub fn offer(&mut self, bench: &mut Bench, queue: u16, chain: &[(u64, u32, bool)]) {
        let base = queue_base(queue);
        let head = self.next_descriptor[usize::from(queue)];
        for (index, (address, len, write)) in chain.iter().enumerate() {
            let index = index as u16;
            let next = u16::from(usize::from(index) + 1 < chain.len());
            let flags = next | u16::from(*write) << 1;
            descriptor(bench, base + 16 * u64::from(head + index), *address, *len, flags, head + index + 1);
        }
        self.next_descriptor[usize::from(queue)] += chain.len() as u16;
        self.publish(bench, queue, head);
    }

    pub fn publish(&mut self, bench: &mut Bench, queue: u16, head: u16) {
        let ring = queue_base(queue) + 0x400;
        let available = &mut self.available[usize::from(queue)];
        bench.store(ring + 4 + 2 * u64::from(*available % QUEUE_SIZE), &head.to_le_bytes());
        *available = available.wrapping_add(1);
        bench.store(ring + 2, &available.to_le_bytes());
    }

    pub fn notify(&self, bench: &mut Bench, device: &mut dyn Device, queue: u16) {
        bench.write(device, 0x50, 4, u64::from(queue));
    }

    /// What the device has given back: (head, length).
    pub fn used(&self, bench: &Bench, queue: u16) -> Vec<(u16, u32)> {
        let ring = queue_base(queue) + 0x800;
        let word = |at: u64, len| crate::value_of(&bench.load(at, len));
        let count = word(ring + 2, 2);
        (0..count).map(|index| (word(ring + 4 + 8 * index, 4) as u16, word(ring + 8 + 8 * index, 4) as u32)).collect()
    }
}

fn descriptor(bench: &mut Bench, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    let bytes = [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
    bench.store(at, &bytes);
}

#[derive(Clone, Debug)]
struct Hostile {
    descriptors: Vec<(u64, u32, u16, u16)>,
    indirect: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    index: Option<u16>,
    steps: Vec<Step>,
}

fn hostile() -> impl Strategy<Value = Hostile> {
    let address = prop_oneof![
        4 => 0x8000..0x2_0000u64,
        1 => 0..0x10_0000u64,
        1 => any::<u64>(),
        1 => (u64::MAX - 64)..=u64::MAX,
        1 => Just(INDIRECT),
        1 => 0xF_FFF0..0x10_0010u64,
    ];
    let len =
        prop_oneof![4 => 0..64u32, 2 => Just(512u32), 1 => 0..0x10_0000u32, 1 => any::<u32>(), 1 => Just(u32::MAX)];
    let flags = prop_oneof![4 => 0..4u16, 1 => 0..8u16, 1 => any::<u16>()];
    let descriptor = (address, len, flags, prop_oneof![4 => 0..QUEUE_SIZE, 1 => any::<u16>()]);
    let many = |count| proptest::collection::vec(descriptor.clone(), count);
    let heads = proptest::collection::vec(prop_oneof![4 => 0..QUEUE_SIZE, 1 => any::<u16>()], 1..20);
    (many(1..64), many(0..64), heads, proptest::option::weighted(0.1, any::<u16>()), steps(0x200))
        .prop_map(|(descriptors, indirect, heads, index, steps)| Hostile { descriptors, indirect, heads, index, steps })
}

impl Hostile {
    fn attack<T>(&self, device: T) -> Vec<Effect>
    where
        T: VirtioDevice + serde::Serialize + serde::de::DeserializeOwned,
    {
        let mut bench = Bench::new();
        let mut device = VirtioMmio::new(0, device);
        let queues = device.device().queue_sizes().len() as u16;
        let mut driver = Driver::start(&mut bench, &mut device, queues);
        for queue in 0..queues {
            for (index, (address, len, flags, next)) in self.descriptors.iter().enumerate() {
                descriptor(&mut bench, queue_base(queue) + 16 * index as u64, *address, *len, *flags, *next);
            }
            for (index, (address, len, flags, next)) in self.indirect.iter().enumerate() {
                descriptor(&mut bench, INDIRECT + 16 * index as u64, *address, *len, *flags, *next);
            }
            for head in &self.heads {
                driver.publish(&mut bench, queue, *head);
            }
            if let Some(index) = self.index {
                bench.store(queue_base(queue) + 0x402, &index.to_le_bytes());
            }
            driver.notify(&mut bench, &mut device, queue);
            bench.now += 10_000;
            bench.event(&mut device, 0);
            driver.notify(&mut bench, &mut device, queue);
        }
        assert_round_trip(&device);
        let mut effects = bench.take();
        effects.extend(fuzz(&mut device, &self.steps));
        effects
    }
}

fn block() -> Block {
    let disk = CowDisk::new(std::sync::Arc::new(vec![0; 64 * 512]), false);
    Block::new(disk, "test", Latency { base_ns: 100, jitter_ns: 1_000 }, 1)
}

proptest! {
    #[test]
    fn no_driver_can_break_a_device(hostile in hostile()) {
        prop_assert_eq!(hostile.attack(block()), hostile.attack(block()));
        prop_assert_eq!(hostile.attack(Entropy::new(1)), hostile.attack(Entropy::new(1)));
        hostile.attack(Console::new());
        hostile.attack(Net::new([2, 0, 0, 0, 0, 1]));
    }

    #[test]
    fn no_sequence_of_accesses_can_break_a_device(steps in steps(0x200)) {
        fuzz(&mut VirtioMmio::new(0, block()), &steps);
        fuzz(&mut VirtioMmio::new(0, Net::new([2, 0, 0, 0, 0, 1])), &steps);
    }
}

/// A chain that is broken in one way each: the device must ask for a reset and touch nothing.
#[test]
fn each_broken_chain_needs_a_reset() {
    let ram_end = crate::testing::RAM_BYTES as u64;
    for (name, chain) in [
        ("loop", vec![(0x9000, 16, 1, 0)]),
        ("next outside the table", vec![(0x9000, 16, 1, QUEUE_SIZE)]),
        ("readable after writable", vec![(0x9000, 16, 3, 1), (0x9100, 16, 0, 0)]),
        ("beyond RAM", vec![(ram_end - 8, 16, 2, 0)]),
        ("address wraps", vec![(u64::MAX - 8, 16, 2, 0)]),
        ("length of 4 GiB", vec![(0x9000, u32::MAX, 2, 0)]),
        ("indirect table of odd length", vec![(INDIRECT, 17, 4, 0)]),
        ("empty indirect table", vec![(INDIRECT, 0, 4, 0)]),
        ("indirect table outside RAM", vec![(ram_end, 16, 4, 0)]),
    ] {
        let mut bench = Bench::new();
        let mut device = VirtioMmio::new(0, Entropy::new(1));
        let mut driver = Driver::start(&mut bench, &mut device, 1);
        for (index, (address, len, flags, next)) in chain.into_iter().enumerate() {
            descriptor(&mut bench, queue_base(0) + 16 * index as u64, address, len, flags, next);
        }
        driver.publish(&mut bench, 0, 0);
        driver.notify(&mut bench, &mut device, 0);
        assert_eq!(bench.read(&mut device, 0x70, 4) & 64, 64, "{name}");
        assert_eq!(driver.used(&bench, 0), vec![], "{name}");
    }
}

#[test]
fn an_indirect_table_is_followed() {
    let mut bench = Bench::new();
    let mut device = VirtioMmio::new(0, Entropy::new(1));
    let mut driver = Driver::start(&mut bench, &mut device, 1);
    descriptor(&mut bench, INDIRECT, 0x9000, 8, 3, 1);
    descriptor(&mut bench, INDIRECT + 16, 0x9100, 8, 2, 0);
    descriptor(&mut bench, queue_base(0), INDIRECT, 32, 4, 0);
    driver.publish(&mut bench, 0, 0);
    driver.notify(&mut bench, &mut device, 0);
    assert_eq!(driver.used(&bench, 0), vec![(0, 16)]);
}

#[test]
fn features_must_be_a_subset_and_modern() {
    let mut bench = Bench::new();
    let mut device = VirtioMmio::new(0, Entropy::new(1));
    for (low, high, accepted) in [(0, 0, false), (0, 1, true), (1 << 3, 1, false), (0, 3, false)] {
        bench.write(&mut device, 0x70, 4, 0);
        bench.write(&mut device, 0x70, 4, 3);
        for (select, word) in [(0, low), (1, high)] {
            bench.write(&mut device, 0x24, 4, select);
            bench.write(&mut device, 0x20, 4, word);
        }
        bench.write(&mut device, 0x70, 4, 11);
        assert_eq!(bench.read(&mut device, 0x70, 4) & 8 == 8, accepted);
    }
}
