//! A hostile guest and the whole machine: every port, register, MSR and descriptor through the vCPU to the devices and
//! back as interrupts, with virtual time and the event queue in between.
//!
//! The oracle is the promise: one machine runs in one piece, another is stopped wherever the input says, saved and
//! restored on the way; the hashes of their states, their output and the way they end must be equal.

mod guest;
mod program;

use std::cell::RefCell;

use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_devices::VirtualNs;
use orrery_guest_image::{Content, Image, ImageParts};
use orrery_vmm::inputs::InputChannel;
use orrery_vmm::machine::state::MachineState;
use orrery_vmm::{Limits, Machine, MachineConfig, Pause, Seed};

use crate::bytes::Bytes;

/// Instructions of a run: enough for every table, unless the guest goes astray.
const INSTRUCTIONS: u64 = 60_000;
/// Virtual time that a run may take.
const TIME_NS: u64 = 30_000_000_000;
/// Stops of the sliced run.
const SLICES_MAX: u32 = 24;

struct Bench {
    image: Image,
    whole: Machine,
    sliced: Machine,
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

/// Runs one input. Panics if a promise is broken.
pub fn execute(data: &[u8]) {
    let _running = crate::watch::input(data, true);
    BENCH.with_borrow_mut(|bench| bench.get_or_insert_with(Bench::new).execute(data));
}

/// How a run ended, for comparison.
#[derive(Debug, PartialEq, Eq)]
struct Ending {
    hash: String,
    icount: u64,
    time_ns: u64,
    ended: String,
    output: Vec<(String, Vec<u8>)>,
}

fn machine(image: &Image, tlb_bits: u32) -> Machine {
    let config = MachineConfig { memory_mib: 16, ..MachineConfig::default() };
    let engine = EngineConfig { code_cache_bytes: 4 << 20, tlb_bits, ..EngineConfig::default() };
    let mut machine = Machine::new(image, &config, Seed(1), engine).expect("a machine");
    machine.freeze().expect("a branch point");
    machine
}

impl Bench {
    fn new() -> Bench {
        let disk = |fill: u8| Content::from((0..64 * 1024).map(|n| (n >> 9) as u8 ^ fill).collect::<Vec<u8>>());
        let parts = ImageParts {
            kernel: Content::from(guest::kernel()),
            command_line: "fuzz".into(),
            disks: vec![disk(0), disk(0x55)],
            ..ImageParts::default()
        };
        let image = Image::from_parts(parts).expect("the guest is a kernel");
        Bench { whole: machine(&image, 12), sliced: machine(&image, 4), image }
    }

    fn execute(&mut self, data: &[u8]) {
        let mut bytes = Bytes::new(data);
        let slices = bytes.u16();
        let how = bytes.u8();
        let inputs: Vec<(InputChannel, Vec<u8>)> = (0..how & 3)
            .map(|n| {
                let channel = if how >> (2 + n) & 1 == 0 { InputChannel::Console } else { InputChannel::Agent };
                let len = bytes.below(40);
                (channel, bytes.take(len).to_vec())
            })
            .collect();
        let table: Vec<u8> = program::table(&mut bytes).iter().flat_map(|operation| operation.encode()).collect();
        if std::env::var_os("FUZZ_TRACE").is_some() {
            let mut bytes = Bytes::new(data);
            bytes.take(3 + inputs.iter().map(|(_, data)| data.len() + 1).sum::<usize>());
            program::table(&mut bytes).iter().for_each(|operation| eprintln!("{operation:x?}"));
        }
        for machine in [&mut self.whole, &mut self.sliced] {
            machine.reset().expect("back to the branch point");
            assert!(machine.poke_memory(guest::TABLE, &table));
            for (channel, data) in &inputs {
                machine.input(*channel, data.clone());
            }
        }
        let first = run(&mut self.whole, 0, false);
        let restore = how >> 4 == 1;
        let second = if restore {
            let saved = self.sliced.save();
            let mut restored = Machine::restore(&self.image, &saved, EngineConfig::default()).expect("what was saved");
            run(&mut restored, slices, true)
        } else {
            run(&mut self.sliced, slices, how & 0x80 != 0)
        };
        assert_eq!(first, second, "in pieces ({slices:#x}, restored: {restore}) it is another run");
    }
}

/// Runs to the end of the input, in pieces if `slices` is not 0; `encode` has the state go through its stored form.
fn run(machine: &mut Machine, slices: u16, encode: bool) -> Ending {
    let end = Limits { icount: Icount(INSTRUCTIONS), time: VirtualNs(TIME_NS), ..Limits::NONE };
    let mut output: Vec<(String, Vec<u8>)> = Vec::new();
    let mut done = 0;
    loop {
        done += 1;
        let mut limits = end;
        if slices != 0 && done < SLICES_MAX {
            let step = 1 + u64::from(slices).wrapping_mul(u64::from(done).wrapping_mul(0x9E37)) % 700;
            limits.icount = Icount((machine.icount().0 + step).min(INSTRUCTIONS));
            limits.pause_on_output = slices & 1 != 0;
            limits.pause_when_idle = slices & 2 != 0;
        }
        let pause = machine.run(limits).expect("no inputs are replayed");
        for piece in machine.take_output() {
            match output.last_mut() {
                Some((channel, bytes)) if *channel == piece.channel => bytes.extend(piece.bytes),
                _ => output.push((piece.channel.to_owned(), piece.bytes)),
            }
        }
        if encode && done % 4 == 1 {
            let stored = machine.state().encode();
            let again = MachineState::decode(&stored).expect("what was encoded");
            assert!(again.encode() == stored, "a state changes when it is stored");
        }
        assert!(machine.icount().0 <= INSTRUCTIONS);
        let over = match pause {
            Pause::Ended(_) => true,
            Pause::Limit => machine.icount().0 >= INSTRUCTIONS || machine.time().0 >= TIME_NS,
            Pause::Output | Pause::Idle { .. } | Pause::Observed | Pause::Unfinished => false,
        };
        if over {
            return Ending {
                hash: machine.state_hash().to_string(),
                icount: machine.icount().0,
                time_ns: machine.time().0,
                ended: format!("{:?}", machine.ended()),
                output,
            };
        }
    }
}
