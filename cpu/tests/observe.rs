//! Breakpoints, watchpoints and records of executions: they find exactly what single-stepping finds, and the guest
//! cannot tell that they are there.

use std::collections::BTreeSet;

mod common;

use common::Empty;
use orrery_cpu::Icount;
use orrery_cpu::engine::{Accessor, Engine, EngineConfig, Hit, Observation, Place, Stop, Watchpoint};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::state::{CpuState, TableRegister};
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x40_1000;
const STACK: u64 = 0x58_0000;
/// Two pages of data, mapped as they are.
const DATA: u64 = 0x51_0000;
/// The first page of data once more.
const ALIAS: u64 = 0x4000_0000;
const IDT: u64 = 0x52_0000;
/// Rounds of the program's loop.
const ROUNDS: u64 = 6;

// Every access to DATA that writes leaves another value there than before. RDI: DATA, RSI: ALIAS, R15: ROUNDS.
std::arch::global_asm!(
    ".pushsection .rodata",
    "observe_program:",
    "xor ebx, ebx",
    "2:",
    "inc rbx",
    "mov [rdi], rbx",
    "mov rax, [rdi + 8]",
    "lea rax, [rax + rax*2 + 7]",
    "mov [rdi + 8], rax",
    "add dword ptr [rdi + 16], 3",
    "push rbx",
    "push rax",
    "call 5f",
    "pop rax",
    "pop rcx",
    "cmp rcx, rbx",
    "jne 4f",
    "mov [rdi + 0xffd], rax", // crosses a page
    "xor eax, [rdi + 0xffe]",
    "lock xadd [rsi + 64], rax",
    "mov rcx, rbx",
    "mov r8, rdi",
    "lea rdi, [r8 + 128]",
    "mov rax, rbx",
    "rep stosb",
    "mov rdi, r8",
    "mov r9, rsi",
    "lea rsi, [r8 + 1]",
    "lea rdi, [r8 + 0x200]",
    "mov ecx, 9",
    "rep movsb",
    "mov rdi, r8",
    "mov rsi, r9",
    "movd xmm0, ebx",
    "movdqu [rdi + 0x300], xmm0",
    "ud2",
    "cmp rbx, r15",
    "jb 2b",
    "4:",
    "hlt",
    "5:",
    "imul rax, rbx",
    "mov [rsi + 24], rax",
    "inc byte ptr [rsi + 32]",
    "ret",
    "observe_handler:",
    "add qword ptr [rsp], 2", // over UD2
    "iretq",
    "observe_program_end:",
    ".popsection",
);

unsafe extern "C" {
    static observe_program: u8;
    static observe_handler: u8;
    static observe_program_end: u8;
}

fn program() -> (Vec<u8>, u64) {
    let (start, handler, end) = (
        &raw const observe_program as usize,
        &raw const observe_handler as usize,
        &raw const observe_program_end as usize,
    );
    // SAFETY: the symbols delimit bytes of this executable's read-only data.
    let code = unsafe { std::slice::from_raw_parts(start as *const u8, end - start) };
    (code.to_vec(), CODE + (handler - start) as u64)
}

struct Guest {
    engine: Engine,
    memory: GuestMemory,
    handler: u64,
}

fn guest(config: EngineConfig) -> Guest {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("16 MiB of memory");
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("inside RAM");
    write(0x1000, 0x2003);
    write(0x2000, 0x3003);
    write(0x2008, 0x4003);
    for i in 0..8 {
        write(0x3000 + 8 * i, i << 21 | 0x83);
    }
    write(0x4000, 0x5003);
    write(0x5000, DATA | 3);
    let (code, handler) = program();
    memory.write_slice(&code, GuestAddress(CODE)).expect("inside RAM");
    // Flat 64-bit code at selector 0x10, data at 0x18; an interrupt gate for #UD.
    write(0x7010, 0x00AF_9B00_0000_FFFF);
    write(0x7018, 0x00CF_9300_0000_FFFF);
    write(IDT + 6 * 16, (handler & 0xFFFF) | 0x10 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48);
    write(IDT + 6 * 16 + 8, handler >> 32);
    let config = EngineConfig { code_cache_bytes: 4 << 20, ..config };
    let mut engine = Engine::new(memory.clone(), ModelFeatures::default(), config).expect("an engine");
    let state = engine.state_mut();
    *state = CpuState::long_mode_boot(CODE, ALIAS, STACK, 0x1000, 0x7000, 0x1F);
    state.idtr = TableRegister { base: IDT, limit: 0xFFF };
    state.cr4 |= 0x600; // SSE
    state.gpr[7] = DATA;
    state.gpr[15] = ROUNDS;
    engine.state_replaced();
    Guest { engine, memory, handler }
}

impl Guest {
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("inside RAM");
        bytes
    }

    /// Everything that the guest is: registers, count, memory.
    fn state(&self) -> (CpuState, u64, Vec<u8>) {
        (self.engine.state().clone(), self.engine.icount().0, self.bytes(0, 16 << 20))
    }

    /// Runs to HLT and gathers what is found.
    fn gather(&mut self, observation: &Observation) -> Vec<Hit> {
        self.engine.observe(observation);
        let mut hits = Vec::new();
        loop {
            let stop = self.engine.run(Icount(100_000), &mut Empty);
            hits.extend(self.engine.take_hits());
            match stop {
                Stop::Observed => {}
                Stop::Halted => return hits,
                other => panic!("{other:?}"),
            }
        }
    }
}

fn configurations() -> Vec<EngineConfig> {
    let plain = EngineConfig::default();
    vec![
        plain.clone(),
        EngineConfig { tlb_bits: 1, ..plain.clone() },
        EngineConfig { chaining: false, ..plain.clone() },
        EngineConfig { grouping: false, ..plain.clone() },
        EngineConfig { max_block_instructions: 1, ..plain.clone() },
        EngineConfig { chaos_seed: Some(3), ..plain },
    ]
}

/// RIP before each instruction, by icount.
fn trace() -> Vec<u64> {
    let mut guest = guest(EngineConfig::default());
    let mut rips = Vec::new();
    loop {
        rips.push(guest.engine.state().rip);
        let next = Icount(guest.engine.icount().0 + 1);
        if guest.engine.run(next, &mut Empty) == Stop::Halted || guest.engine.state().halted {
            return rips;
        }
    }
}

/// Icounts of the instructions that change bytes.
fn writers(place: u64, len: usize) -> Vec<u64> {
    let mut guest = guest(EngineConfig::default());
    let mut found = Vec::new();
    while !guest.engine.state().halted {
        let before = (guest.engine.icount().0, guest.bytes(place, len));
        guest.engine.run(Icount(before.0 + 1), &mut Empty);
        if guest.bytes(place, len) != before.1 {
            found.push(before.0);
        }
    }
    found
}

#[test]
fn the_guest_cannot_tell() {
    let mut plain = guest(EngineConfig::default());
    plain.gather(&Observation::default());
    let expected = plain.state();
    let everywhere: Vec<u64> = trace();
    let watch = |place, size| Watchpoint { place, size, read: true, write: true };
    let observation = Observation {
        breakpoints: everywhere.iter().copied().step_by(3).collect(),
        executions: everywhere,
        every_execution: false,
        watchpoints: vec![
            watch(Place::Linear { address: DATA, root: None }, 8),
            watch(Place::Physical { address: DATA }, 0x1000),
            watch(Place::Physical { address: STACK - 64 }, 64),
            watch(Place::Physical { address: 0x1000 }, 0x4000),
        ],
    };
    for config in configurations() {
        let mut guest = guest(config.clone());
        guest.gather(&observation);
        assert!(guest.state() == expected, "{config:?}");
    }
}

#[test]
fn breakpoints_stop_before_each_execution() {
    let rips = trace();
    let addresses: BTreeSet<u64> = rips.iter().copied().collect();
    for config in configurations() {
        for address in &addresses {
            let mut guest = guest(config.clone());
            let found = guest.gather(&Observation { breakpoints: vec![*address], ..Observation::default() });
            let expected: Vec<Hit> = (0..rips.len())
                .filter(|at| rips[*at] == *address)
                .map(|at| Hit::Breakpoint { icount: Icount(at as u64), rip: *address })
                .collect();
            assert_eq!(found, expected, "{address:#x} {config:?}");
        }
    }
}

#[test]
fn a_breakpoint_on_a_handler_stops_between_the_fault_and_its_first_instruction() {
    let mut guest = guest(EngineConfig::default());
    let handler = guest.handler;
    let rips = trace();
    let found = guest.gather(&Observation { breakpoints: vec![handler], ..Observation::default() });
    // The faulting instruction counts nothing, so that the handler's first has its icount.
    let faulted = rips.iter().enumerate().filter(|(at, _)| rips.get(at + 1) == Some(&(handler + 5)));
    let expected: Vec<Hit> =
        faulted.map(|(at, _)| Hit::Breakpoint { icount: Icount(at as u64), rip: handler }).collect();
    assert_eq!(expected.len() as u64, ROUNDS);
    assert_eq!(found, expected);
}

#[test]
fn passing_a_breakpoint_that_has_not_been_reported() {
    let mut guest = guest(EngineConfig::default());
    guest.engine.observe(&Observation { breakpoints: vec![CODE], ..Observation::default() });
    guest.engine.pass_breakpoint();
    assert_eq!(guest.engine.run(Icount(5), &mut Empty), Stop::Limit);
    assert!(guest.engine.take_hits().is_empty());
}

#[test]
fn executions_are_those_that_retired() {
    let rips = trace();
    let handler = guest(EngineConfig::default()).handler;
    let addresses: BTreeSet<u64> = rips.iter().copied().chain([handler]).collect();
    for config in configurations() {
        let executions = addresses.iter().copied().collect();
        let found = guest(config.clone()).gather(&Observation { executions, ..Observation::default() });
        // Where UD2 stands, the handler's first instruction is what retires.
        let expected: Vec<Hit> = (0..rips.len())
            .map(|at| {
                let faulted = rips.get(at + 1) == Some(&(handler + 5));
                Hit::Execution { icount: Icount(at as u64), rip: if faulted { handler } else { rips[at] } }
            })
            .collect();
        assert_eq!(found, expected, "{config:?}");
        let observation = Observation { every_execution: true, ..Observation::default() };
        assert_eq!(guest(config.clone()).gather(&observation), expected, "{config:?}");
    }
}

#[test]
fn every_write_is_found_and_nothing_else() {
    let places = [
        (DATA, 8),
        (DATA + 3, 1),
        (DATA + 8, 8),
        (DATA + 16, 4),
        (DATA + 24, 8),
        (DATA + 32, 1),
        (DATA + 64, 8),
        (DATA + 128, 1),
        (DATA + 130, 4),
        (DATA + 0x200, 9),
        (DATA + 0x300, 4),
        (DATA + 0xffd, 8),
        (DATA + 0x1000, 2),
    ];
    for config in configurations() {
        for (place, size) in places {
            let mut expected = writers(place, size);
            for physical in [true, false] {
                if place < DATA + 0x1000 && !physical && [24, 32, 64].contains(&(place - DATA)) {
                    // Only written through the alias.
                    expected.clear();
                }
                let at = match physical {
                    true => Place::Physical { address: place },
                    false => Place::Linear { address: place, root: Some(0x1018) },
                };
                let watchpoint = Watchpoint { place: at, size: size as u64, read: false, write: true };
                let mut guest = guest(config.clone());
                let hits = guest.gather(&Observation { watchpoints: vec![watchpoint], ..Observation::default() });
                let found: Vec<u64> = hits.iter().map(|hit| hit.icount().0).collect();
                // Bytes of an operand that stay zero are written all the same.
                let constant = [DATA + 3, DATA + 0x1000].contains(&place);
                let written = if constant { found.clone() } else { expected.clone() };
                assert_eq!(found, written, "{at:?} of {size} {config:?}");
                assert!(!constant || found.len() as u64 == ROUNDS, "{at:?}");
                assert!(expected.iter().all(|at| found.contains(at)));
            }
        }
    }
}

#[test]
fn accesses_of_each_kind() {
    let count = |place: Place, size: u64, read: bool, write: bool, config: &EngineConfig| {
        let watchpoints = vec![Watchpoint { place, size, read, write }];
        let mut guest = guest(config.clone());
        let hits = guest.gather(&Observation { watchpoints, ..Observation::default() });
        assert!(hits.iter().all(|hit| matches!(hit, Hit::Access { accessor: Accessor::Processor, .. })));
        hits.len() as u64
    };
    for config in configurations() {
        let physical = |offset| Place::Physical { address: DATA + offset };
        let linear = |address| Place::Linear { address, root: None };
        // MOV to, and MOVSB from its second byte on.
        assert_eq!(count(physical(0), 8, true, false, &config), ROUNDS, "{config:?}");
        assert_eq!(count(physical(0), 1, true, false, &config), 0);
        assert_eq!(count(physical(0), 8, true, true, &config), 2 * ROUNDS);
        // MOV from, MOV to, MOVSB from.
        assert_eq!(count(physical(8), 8, true, false, &config), 2 * ROUNDS);
        // A read and write is both.
        assert_eq!(count(physical(16), 4, true, false, &config), ROUNDS);
        assert_eq!(count(physical(16), 4, false, true, &config), ROUNDS);
        assert_eq!(count(physical(64), 8, true, true, &config), ROUNDS);
        assert_eq!(count(physical(0xffe), 2, true, false, &config), ROUNDS);
        assert_eq!(count(linear(ALIAS + 24), 8, false, true, &config), ROUNDS);
        assert_eq!(count(linear(DATA + 24), 8, true, true, &config), 0);
        assert_eq!(count(Place::Linear { address: DATA, root: Some(0x8000) }, 8, true, true, &config), 0);
        // PUSH and POP of RBX; the frame of #UD: SS lies where RBX was pushed.
        assert_eq!(count(linear(STACK - 8), 8, false, true, &config), 2 * ROUNDS);
        assert_eq!(count(linear(STACK - 8), 8, true, false, &config), 2 * ROUNDS);
        // CALL and RET; RFLAGS of the frame.
        assert_eq!(count(linear(STACK - 24), 8, false, true, &config), 2 * ROUNDS);
        // RIP of the frame: pushed, changed by the handler, popped.
        assert_eq!(count(linear(STACK - 40), 8, false, true, &config), 2 * ROUNDS);
        assert_eq!(count(linear(STACK - 40), 8, true, false, &config), 2 * ROUNDS);
    }
}

#[test]
fn page_walks_and_devices_write_too() {
    // The entry of ALIAS: accessed by the first read, dirty with the first write.
    let watch = |address, size| Watchpoint { place: Place::Physical { address }, size, read: false, write: true };
    let mut guest = guest(EngineConfig::default());
    let hits = guest.gather(&Observation { watchpoints: vec![watch(0x5000, 8)], ..Observation::default() });
    assert!(!hits.is_empty());
    assert!(hits.iter().all(|hit| matches!(hit, Hit::Access { accessor: Accessor::PageWalk, .. })), "{hits:?}");
    assert_eq!(
        writers(0x5000, 8).iter().copied().collect::<BTreeSet<_>>(),
        hits.iter().map(|h| h.icount().0).collect()
    );

    guest.engine.observe(&Observation { watchpoints: vec![watch(0x60_0010, 4)], ..Observation::default() });
    guest.engine.memory_written(0x60_0000, 4096);
    assert!(!guest.engine.has_hits(), "nothing has changed");
    guest.memory.write_obj(5u8, GuestAddress(0x60_0012)).unwrap();
    guest.engine.memory_written(0x60_0000, 4096);
    let hits = guest.engine.take_hits();
    assert!(matches!(hits[..], [Hit::Access { gpa: 0x60_0012, accessor: Accessor::Device, .. }]), "{hits:?}");
}

#[test]
fn an_observation_can_change_between_runs() {
    let mut guest = guest(EngineConfig::default());
    let rips = trace();
    // All code is translated and linked before the first breakpoint is set.
    assert_eq!(guest.engine.run(Icount(100), &mut Empty), Stop::Limit);
    let address = rips[110];
    guest.engine.observe(&Observation { breakpoints: vec![address], ..Observation::default() });
    assert_eq!(guest.engine.run(Icount(100_000), &mut Empty), Stop::Observed);
    let expected = (100..).find(|at| rips[*at] == address).unwrap() as u64;
    assert_eq!(guest.engine.icount(), Icount(expected));
    assert_eq!(guest.engine.take_hits(), vec![Hit::Breakpoint { icount: Icount(expected), rip: address }]);
    guest.engine.observe(&Observation::default());
    assert_eq!(guest.engine.run(Icount(100_000), &mut Empty), Stop::Halted);
    assert!(guest.engine.take_hits().is_empty());
}
