//! Repeated string instructions, which translated code executes by itself where their operands lie in known pages.

mod common;

use common::Empty;
use orrery_cpu::Icount;
use orrery_cpu::engine::{Engine, EngineConfig, Stop};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::state::{CpuState, gpr, rflags};
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x40_1000;
/// Three pages that the instructions work in, and their frames.
const DATA: u64 = 0x4000_0000;
const FRAMES: [u64; 3] = [0x60_4000, 0x60_1000, 0x60_2000];
const LEN: usize = FRAMES.len() * 4096;

/// Supervisor code in 64-bit mode; the first 16 MiB are mapped as they are, in pages of 2 MiB.
fn guest(code: &[u8]) -> (Engine, GuestMemory) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("16 MiB of memory");
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("inside RAM");
    write(0x1000, 0x2003);
    write(0x2000, 0x3003);
    write(0x2008, 0x4003);
    (0..8).for_each(|i| write(0x3000 + 8 * i, i << 21 | 0x83));
    write(0x4000, 0x5003);
    (0..3).for_each(|i| write(0x5000 + 8 * i, FRAMES[i as usize] | 3));
    memory.write_slice(code, GuestAddress(CODE)).expect("inside RAM");
    let config = EngineConfig { code_cache_bytes: 1 << 20, ..EngineConfig::default() };
    let mut engine = Engine::new(memory.clone(), ModelFeatures::default(), config).expect("an engine");
    *engine.state_mut() = CpuState::long_mode_boot(CODE, 0x50_0000, 0x58_0000, 0x1000, 0x7000, 23);
    engine.state_replaced();
    (engine, memory)
}

/// What a repeated instruction is to do: offsets in the data, elements.
#[derive(Clone, Copy, Debug)]
struct Work {
    size: usize,
    /// MOVS from here, or STOS.
    from: Option<usize>,
    to: usize,
    count: usize,
    down: bool,
}

const VALUE: u64 = 0x8877_6655_4433_2211;

impl Work {
    fn code(&self) -> Vec<u8> {
        let prefixes: &[u8] = match self.size {
            2 => &[0x66, 0xF3],
            8 => &[0xF3, 0x48],
            _ => &[0xF3],
        };
        let opcode = if self.from.is_some() { 0xA4 } else { 0xAA } | u8::from(self.size > 1);
        [prefixes, &[opcode, 0xF4]].concat()
    }

    /// One element after the other.
    fn done(&self, data: &mut [u8]) {
        for i in 0..self.count {
            let at = |start: usize| if self.down { start - i * self.size } else { start + i * self.size };
            let element = match self.from {
                Some(from) => data[at(from)..][..self.size].to_vec(),
                None => VALUE.to_le_bytes()[..self.size].to_vec(),
            };
            data[at(self.to)..][..self.size].copy_from_slice(&element);
        }
    }

    /// In an engine, three times: the first fills its TLBs.
    fn check(&self) {
        let (mut engine, memory) = guest(&self.code());
        for turn in 0..3u8 {
            let mut data: Vec<u8> = (0..LEN).map(|i| (i * 7 + i / 256) as u8 ^ turn).collect();
            for (page, frame) in data.chunks(4096).zip(FRAMES) {
                memory.write_slice(page, GuestAddress(frame)).expect("inside RAM");
            }
            let state = engine.state_mut();
            (state.rip, state.halted) = (CODE, false);
            state.rflags = state.rflags & !rflags::DF | if self.down { rflags::DF } else { 0 };
            let gpr = &mut state.gpr;
            (gpr[gpr::RAX], gpr[gpr::RCX]) = (VALUE, self.count as u64);
            (gpr[gpr::RDI], gpr[gpr::RSI]) = (DATA + self.to as u64, DATA + self.from.unwrap_or(0) as u64);
            let before = engine.state().clone();
            assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::Halted, "{self:?}");
            self.done(&mut data);
            let mut found = vec![0; LEN];
            for (page, frame) in found.chunks_mut(4096).zip(FRAMES) {
                memory.read_slice(page, GuestAddress(frame)).expect("inside RAM");
            }
            assert!(found == data, "{self:?}, turn {turn}");
            let moved = (self.count * self.size) as u64;
            let along = |at: u64| if self.down { at - moved } else { at + moved };
            let mut expected = before.gpr;
            expected[gpr::RCX] = 0;
            expected[gpr::RDI] = along(expected[gpr::RDI]);
            if self.from.is_some() {
                expected[gpr::RSI] = along(expected[gpr::RSI]);
            }
            assert_eq!(engine.state().gpr, expected, "{self:?}, turn {turn}");
            assert_eq!(engine.state().rflags, before.rflags, "{self:?}, turn {turn}");
            assert_eq!(engine.icount(), Icount(2 * (u64::from(turn) + 1)), "{self:?}, turn {turn}");
        }
    }
}

#[test]
fn repeated_strings_do_one_element_after_the_other() {
    for size in [1, 2, 4, 8] {
        let page = 4096 / size;
        for count in [0, 1, 2, 17, page - 1, page, page + 1] {
            for (to, from) in [(0, 4096), (4096, 0), (size, 0), (0, size), (3, 0), (4096 + 5, 4096), (2048, 4096)] {
                let work = Work { size, from: Some(from), to, count, down: false };
                work.check();
                Work { from: None, ..work }.check();
            }
        }
        // To the end of the page, and beyond.
        for count in [4, 5] {
            let work = Work { size, from: Some(64), to: 4096 - 4 * size, count, down: false };
            work.check();
            Work { from: None, ..work }.check();
            Work { from: Some(work.to), to: 64, ..work }.check();
        }
        let down = Work { size, from: Some(2000), to: 2000 + size, count: 20, down: true };
        down.check();
        Work { from: None, ..down }.check();
    }
}

#[test]
fn repeated_strings_stay_in_translated_code() {
    // mov rdi, r8; mov rsi, r9; mov ecx, 8; the instruction; dec rbx; jnz to the start
    for string in [[0xF3, 0x48, 0xAB], [0xF3, 0x48, 0xA5]] {
        let set = [0x4C, 0x89, 0xC7, 0x4C, 0x89, 0xCE, 0xB9, 8, 0, 0, 0];
        let code = [&set[..], &string, &[0x48, 0xFF, 0xCB, 0x75, -19i8 as u8, 0xF4]].concat();
        let (mut engine, _) = guest(&code);
        let gpr = &mut engine.state_mut().gpr;
        (gpr[gpr::R8], gpr[gpr::R9], gpr[gpr::RBX]) = (DATA, DATA + 4096, 1000);
        assert_eq!(engine.run(Icount(100_000), &mut Empty), Stop::Halted);
        assert!(engine.statistics().entries < 50, "{} entries", engine.statistics().entries);
    }
}

#[test]
fn a_repeated_string_changes_code() {
    // call r10; mov rdi, r8; mov ecx, 1; mov eax, r9d; rep stosd; call r10; hlt
    let code =
        [0x41, 0xFF, 0xD2, 0x4C, 0x89, 0xC7, 0xB9, 1, 0, 0, 0, 0x44, 0x89, 0xC8, 0xF3, 0xAB, 0x41, 0xFF, 0xD2, 0xF4];
    let (mut engine, memory) = guest(&code);
    let add = |value: u8| [0x83, 0xC5, value, 0xC3]; // add ebp, value; ret
    for turn in 0..2 {
        memory.write_slice(&add(0x10), GuestAddress(FRAMES[0])).expect("inside RAM");
        engine.memory_written(FRAMES[0], 4);
        let state = engine.state_mut();
        (state.rip, state.halted) = (CODE, false);
        (state.gpr[gpr::R8], state.gpr[gpr::R10], state.gpr[gpr::RBP]) = (DATA, DATA, 0);
        state.gpr[gpr::R9] = u32::from_le_bytes(add(1)).into();
        assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::Halted);
        assert_eq!(engine.state().gpr[gpr::RBP], 0x11, "turn {turn}");
    }
}
