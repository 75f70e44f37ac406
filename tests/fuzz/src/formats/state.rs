//! A machine's stored state, as a snapshot holds it: damaged at will, and if it is accepted, brought to life.

use std::cell::RefCell;

use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_devices::VirtualNs;
use orrery_guest_image::{Content, Image, ImageParts};
use orrery_vmm::digest::MemoryDigest;
use orrery_vmm::inputs::InputChannel;
use orrery_vmm::machine::state::MachineState;
use orrery_vmm::{Limits, Machine, MachineConfig, Seed, ram};

use crate::bytes::Bytes;

thread_local! {
    static BASE: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// The state of a machine after a few instructions of a guest that has used its devices a little.
fn base() -> Vec<u8> {
    // Store to the APIC and the serial port, then wait: mov edi, 0xFEE00380; mov [rdi], eax; out 0xF8..; jmp $
    let code =
        [0xBF, 0x80, 0x03, 0xE0, 0xFE, 0xC7, 0x07, 0, 1, 0, 0, 0x66, 0xBA, 0xF9, 0x03, 0xB0, 0x0F, 0xEE, 0xEB, 0xFE];
    let parts = ImageParts {
        kernel: Content::from(crate::elf::executable(0x20_0000, &code)),
        command_line: "fuzz".into(),
        ..ImageParts::default()
    };
    let image = Image::from_parts(parts).expect("the guest is a kernel");
    let config = MachineConfig { memory_mib: 16, ..MachineConfig::default() };
    let engine = EngineConfig { code_cache_bytes: 1 << 20, ..EngineConfig::default() };
    let mut machine = Machine::new(&image, &config, Seed(1), engine).expect("a machine");
    machine.input(InputChannel::Console, b"ls\n".to_vec());
    machine.run(Limits::until(Icount(100))).expect("no inputs are replayed");
    machine.state().encode()
}

/// The state, with bytes changed, put in and taken out where the input says.
pub fn machine_state(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let mut stored = BASE.with_borrow_mut(|slot| slot.get_or_insert_with(base).clone());
    while !bytes.is_empty() {
        let at = usize::from(bytes.u16()) % stored.len().max(1);
        match bytes.u8() {
            0..=15 => drop(stored.drain(at..(at + 1 + bytes.below(4)).min(stored.len()))),
            16..=31 => drop(stored.splice(at..at, bytes.array::<2>())),
            32..=47 => stored[at..].iter_mut().take(10).for_each(|byte| *byte = bytes.u8()),
            48..=55 => stored[at..].iter_mut().take(9).for_each(|byte| *byte = 0xFF),
            _ => stored[at] = bytes.u8(),
        }
        if stored.is_empty() {
            return;
        }
    }
    let Ok(state) = MachineState::decode(&stored) else { return };
    let again = state.encode();
    let twice = MachineState::decode(&again).expect("what was encoded").encode();
    assert!(again == twice, "a state changes when it is stored");
    if state.config().memory_mib > 64 || state.disks().count() > 0 {
        return;
    }
    let memory = ram::create(state.config().memory_mib << 20).expect("RAM");
    let digest = MemoryDigest::zeroed(&memory);
    let engine = EngineConfig { code_cache_bytes: 1 << 20, ..EngineConfig::default() };
    let (icount, time) = (state.icount(), state.time());
    let Ok(mut machine) = Machine::assemble(memory, digest, state, engine) else { return };
    machine.state_hash();
    for step in [1, 50, 500] {
        let limits = Limits {
            icount: Icount(icount.0.saturating_add(step)),
            time: VirtualNs(time.0.saturating_add(step << 20)),
            pause_when_long: true,
            ..Limits::NONE
        };
        if machine.run(limits).is_err() || machine.is_unfinished() {
            break;
        }
        machine.take_output();
        machine.input(InputChannel::Console, b"x".to_vec());
        machine.input(InputChannel::Agent, b"y".to_vec());
    }
    machine.state_hash();
}
