//! Code in segments with a base and a limit, executed by the engine; and when traps are taken.

use orrery_cpu::bus::MsrRefused;
use orrery_cpu::engine::{Engine, EngineConfig, Stop};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::state::{CpuState, Segment, TableRegister, control, gpr, rflags, seg};
use orrery_cpu::{Bus, Icount};
use vm_memory::{Bytes, GuestAddress};

/// A machine that wants attention after each port access.
#[derive(Default)]
struct Ports {
    attention: bool,
    mmio_writes: u32,
}

impl Bus for Ports {
    fn port_read(&mut self, _: Icount, _: u16, _: usize) -> u32 {
        0
    }
    fn port_write(&mut self, _: Icount, _: u16, _: usize, _: u32) {
        self.attention = true;
    }
    fn mmio_read(&mut self, _: Icount, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&mut self, _: Icount, _: u64, _: &[u8]) {
        self.mmio_writes += 1;
    }
    fn msr_read(&mut self, _: Icount, _: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn msr_write(&mut self, _: Icount, _: u32, _: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn task_priority(&mut self, _: Icount) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: Icount, _: u8) {}
    fn tsc(&mut self, now: Icount) -> u64 {
        now.0
    }
    fn random(&mut self) -> u64 {
        1
    }
    fn attention(&self) -> bool {
        self.attention
    }
}

const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
/// Handlers of vector n at `HANDLERS + 16 * n`: each a HLT.
const HANDLERS: u64 = 0x1_0000;
const STACK: u64 = 0x2_0000;
/// Base of the code segment under test: no multiple of anything.
const BASE: u64 = 0x40_0FF3;
/// Offset of the code in it: four bytes before the end of a page.
const START: u64 = 9;

/// An engine in 64-bit kernel mode with the first gibibyte mapped as it is, and its memory.
fn engine(base: u64, code: &[u8]) -> (Engine, GuestMemory) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("16 MiB of memory");
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("inside RAM");
    write(0x1000, 0x2003);
    write(0x2000, 0x83);
    for (selector, descriptor) in [(0x10, 0x00AF_9B00_0000_FFFF), (0x18, 0x00CF_9300_0000_FFFFu64)] {
        write(GDT + selector, descriptor);
    }
    for vector in 0..32 {
        let at = HANDLERS + 16 * vector;
        write(IDT + 16 * vector, at & 0xFFFF | 0x10 << 16 | 0x8E << 40 | at >> 16 << 48);
        write(at, 0xF4);
    }
    memory.write_slice(code, GuestAddress(base)).expect("inside RAM");
    let mut engine = Engine::new(memory.clone(), ModelFeatures::default(), EngineConfig::default()).expect("an engine");
    let mut state = CpuState::long_mode_boot(base, 0, STACK, 0x1000, GDT, 0x1F);
    state.idtr = TableRegister { base: IDT, limit: 0x1FF };
    *engine.state_mut() = state;
    engine.state_replaced();
    (engine, memory)
}

/// The same in a compatibility-mode code segment of this limit, 32-bit or 16-bit.
fn segmented(code: &[u8], limit: u32, big: bool) -> (Engine, GuestMemory) {
    let (mut engine, memory) = engine(BASE + START, code);
    let state = engine.state_mut();
    let attributes = if big { 0x49B } else { 0x09B };
    state.seg[seg::CS] = Segment { base: BASE, limit, selector: 0x20, attributes };
    state.rip = START;
    (engine, memory)
}

/// MOV EAX, 5; again: INC EBX; DEC EAX; JNZ again; HLT
const LOOP: [u8; 10] = [0xB8, 5, 0, 0, 0, 0x43, 0x48, 0x75, 0xFC, 0xF4];

#[test]
fn offsets_in_a_segment_are_relative_to_its_base() {
    let (mut engine, _) = segmented(&LOOP, 0xFFF, true);
    assert_eq!(engine.run(Icount(1000), &mut Ports::default()), Stop::Halted);
    assert_eq!((engine.state().rip, engine.state().gpr[gpr::RBX]), (START + 10, 5));
    assert_eq!(engine.icount(), Icount(1 + 3 * 5 + 1));
    // It stops anywhere, and goes on as if it had not.
    let (mut stepped, _) = segmented(&LOOP, 0xFFF, true);
    for icount in 1..17 {
        assert_eq!(stepped.run(Icount(icount), &mut Ports::default()), Stop::Limit);
        assert!(stepped.state().rip < START + 10);
    }
    assert_eq!(stepped.run(Icount(1000), &mut Ports::default()), Stop::Halted);
    assert!(stepped.state() == engine.state());
}

/// A store that the host refuses to execute must not happen with the next instruction that is executed alone.
#[test]
fn a_store_that_faults_in_the_host_is_forgotten() {
    let control_word = ((BASE + START) as u32 + 20).to_le_bytes();
    // FNINIT; FLDCW [control word]; FLD1; FLDZ; FDIVP; FSTP DWORD [0x30000000]
    let mut code = vec![0xDB, 0xE3, 0xD9, 0x2D];
    code.extend(control_word);
    code.extend([0xD9, 0xE8, 0xD9, 0xEE, 0xDE, 0xF9, 0xD9, 0x1D, 0, 0, 0, 0x30]);
    // Division by zero is not masked.
    code.extend([0x7B, 0x03]);
    let (mut engine, memory) = segmented(&code, 0xFFF, true);
    let state = engine.state_mut();
    state.cr0 |= 1 << 5; // NE: errors are exceptions
    engine.state_replaced();
    // The handler: MOV EAX, [0x30000000]; HLT
    let handler = [0x8B, 0x04, 0x25, 0, 0, 0, 0x30, 0xF4];
    memory.write_slice(&handler, GuestAddress(HANDLERS + 16 * 16)).expect("inside RAM");
    let mut ports = Ports::default();
    assert_eq!(engine.run(Icount(100), &mut ports), Stop::Halted);
    assert_eq!(engine.state().rip, HANDLERS + 16 * 16 + 8, "the x87 error is reported");
    assert_eq!((engine.icount(), ports.mmio_writes), (Icount(5 + 2), 0));
}

#[test]
fn a_16_bit_segment_wraps_its_pushes_and_branches() {
    // MOV AX, 0x1234; CALL +1; HLT; POP BX; JMP -3 (to HLT)
    let code = [0xB8, 0x34, 0x12, 0xE8, 1, 0, 0xF4, 0x5B, 0xEB, 0xFC];
    let (mut engine, _) = segmented(&code, 0xFFFF, false);
    assert_eq!(engine.run(Icount(100), &mut Ports::default()), Stop::Halted);
    let state = engine.state();
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RAX] & 0xFFFF), (START + 6, 0x1234));
    assert_eq!((state.rip, state.gpr[gpr::RSP]), (START + 7, STACK));
}

#[test]
fn fetching_beyond_the_limit_is_a_protection_fault() {
    // The last byte of DEC EAX's JNZ is outside, and then the instruction behind it.
    for (limit, retired, rip) in [(START + 7, 3, START + 7), (START + 4, 1, START + 5), (START + 3, 0, START)] {
        let (mut engine, memory) = segmented(&LOOP, limit as u32, true);
        assert_eq!(engine.run(Icount(100), &mut Ports::default()), Stop::Halted);
        assert_eq!(engine.state().rip, HANDLERS + 16 * 13 + 1, "limit {limit:#x}");
        assert_eq!(engine.icount(), Icount(retired + 1), "limit {limit:#x}");
        let frame = engine.state().gpr[gpr::RSP];
        assert_eq!(frame, STACK - 48);
        let pushed = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).expect("inside RAM");
        assert_eq!((pushed(frame), pushed(frame + 8), pushed(frame + 16)), (0, rip, 0x20), "limit {limit:#x}");
    }
}

#[test]
fn a_trap_is_taken_behind_an_instruction_that_stops_the_engine() {
    // OUT 0x80, AL; NOP
    for code in [&[0xE6u8, 0x80, 0x90][..], &[0xF4, 0x90]] {
        let (mut engine, _) = engine(BASE, code);
        engine.state_mut().rflags |= rflags::TF;
        let stop = engine.run(Icount(1), &mut Ports::default());
        assert!(matches!(stop, Stop::Attention | Stop::Limit), "{stop:?}");
        assert_eq!(engine.state().rip, HANDLERS + 16);
        assert_eq!((engine.state().dr[6] >> 14 & 1, engine.state().halted), (1, false));
        assert_eq!(engine.icount(), Icount(1));
    }
}

/// Runs until a handler halts; the vector of that handler and the RIP that it would return to. `error` if the
/// exception pushes an error code.
fn handled(engine: &mut Engine, memory: &GuestMemory, error: bool) -> (u64, u64) {
    assert_eq!(engine.run(Icount(100), &mut Ports::default()), Stop::Halted);
    let at = engine.state().gpr[gpr::RSP] + if error { 8 } else { 0 };
    let pushed: u64 = memory.read_obj(GuestAddress(at)).expect("inside RAM");
    ((engine.state().rip - HANDLERS) / 16, pushed)
}

#[test]
fn selectors_and_bases_are_read_and_written() {
    const DATA: u64 = 0x50_0000;
    // MOV [RSI+RCX+2], DS; MOV AX, SS; MOV R11W, DS; MOV R12D, DS; WRFSBASE RBX; RDFSBASE RDX; WRGSBASE R13; RDGSBASE R14;
    // HLT; WRGSBASE RDI
    let code = [
        &[0x8C, 0x5C, 0x0E, 0x02, 0x66, 0x8C, 0xD0, 0x66, 0x41, 0x8C, 0xDB, 0x41, 0x8C, 0xDC][..],
        &[0xF3, 0x48, 0x0F, 0xAE, 0xD3, 0xF3, 0x48, 0x0F, 0xAE, 0xC2],
        &[0xF3, 0x49, 0x0F, 0xAE, 0xDD, 0xF3, 0x49, 0x0F, 0xAE, 0xCE],
        &[0xF4, 0xF3, 0x48, 0x0F, 0xAE, 0xDF],
    ]
    .concat();
    let (mut machine, memory) = engine(BASE, &code);
    memory.write_obj(u64::MAX, GuestAddress(DATA)).expect("inside RAM");
    let state = machine.state_mut();
    state.cr4 |= control::CR4_FSGSBASE;
    state.gpr = std::array::from_fn(|i| 0x1111_2222_3333_0000 | i as u64);
    (state.gpr[gpr::RSI], state.gpr[gpr::RCX]) = (DATA - 0x123, 0x123);
    state.gpr[gpr::RSP] = STACK;
    (state.gpr[gpr::RBX], state.gpr[gpr::R13]) = (0x7FFF_1234_5678, 0xFFFF_8000_0000_0008);
    state.rflags |= rflags::STATUS;
    machine.state_replaced();
    assert_eq!(machine.run(Icount(9), &mut Ports::default()), Stop::Halted);
    let state = machine.state();
    assert_eq!(memory.read_obj::<u64>(GuestAddress(DATA)).expect("inside RAM"), 0xFFFF_FFFF_0018_FFFF);
    assert_eq!(state.gpr[gpr::RAX], 0x1111_2222_3333_0018);
    assert_eq!((state.gpr[gpr::R11], state.gpr[gpr::R12]), (0x1111_2222_3333_0018, 0x18));
    assert_eq!((state.seg[seg::FS].base, state.gpr[gpr::RDX]), (0x7FFF_1234_5678, 0x7FFF_1234_5678));
    assert_eq!((state.seg[seg::GS].base, state.gpr[gpr::R14]), (0xFFFF_8000_0000_0008, 0xFFFF_8000_0000_0008));
    assert_eq!(state.rflags & rflags::STATUS, rflags::STATUS);

    // What is not canonical is refused, and so are all when CR4 says so.
    for (cr4, base, error, vector) in [(control::CR4_FSGSBASE, 1 << 47, true, 13), (0, 0x1000, false, 6)] {
        let at = BASE + code.len() as u64 - 5;
        let state = machine.state_mut();
        (state.rip, state.halted) = (at, false);
        state.gpr[gpr::RDI] = base;
        state.cr4 = state.cr4 & !control::CR4_FSGSBASE | cr4;
        machine.state_replaced();
        let (found, pushed) = handled(&mut machine, &memory, error);
        assert_eq!((found, pushed), (vector, at));
        assert_eq!(machine.state().seg[seg::GS].base, 0xFFFF_8000_0000_0008);
    }
}

#[test]
fn entering_a_handler_by_an_instruction_is_not_stepped() {
    for (code, vector) in [(&[0xCDu8, 0x10][..], 0x10), (&[0xCC], 3), (&[0xF1], 1)] {
        let (mut engine, memory) = engine(BASE, code);
        engine.state_mut().rflags |= rflags::TF;
        assert_eq!(handled(&mut engine, &memory, false), (vector, BASE + code.len() as u64));
        assert_eq!(engine.state().dr[6] >> 14 & 1, 0);
        assert_eq!(engine.icount(), Icount(2));
    }
}

#[test]
fn syscall_and_sysret_are_stepped_by_the_flag_behind_them() {
    const TARGET: u64 = HANDLERS + 16 * 0x1F;
    for (mask, expected) in [(rflags::TF, (0x1F, None)), (0, (1, Some(TARGET)))] {
        let (mut engine, memory) = engine(BASE, &[0x0F, 0x05]);
        let state = engine.state_mut();
        state.efer |= 1;
        (state.star, state.lstar, state.sfmask) = (0x10 << 32, TARGET, mask);
        state.rflags |= rflags::TF;
        let (vector, pushed) = handled(&mut engine, &memory, false);
        assert_eq!(vector, expected.0);
        assert!(expected.1.is_none_or(|rip| rip == pushed));
    }
    let (mut engine, memory) = engine(BASE, &[0x48, 0x0F, 0x07]);
    // The user's code is not mapped for users: it must not get that far.
    memory.write_obj(0x87u64, GuestAddress(0x2000)).expect("inside RAM");
    memory.write_obj(0x2007u64, GuestAddress(0x1000)).expect("inside RAM");
    memory.write_obj(GDT | 0x67 << 16 | 0x89 << 40, GuestAddress(GDT + 0x20)).expect("inside RAM");
    let state = engine.state_mut();
    state.efer |= 1;
    state.star = 0x23 << 48;
    (state.gpr[gpr::RCX], state.gpr[gpr::R11]) = (BASE + 0x100, rflags::TF | 2);
    // RSP0 is what stands in the TSS at 4.
    state.tr = Segment { base: 0x3000, limit: 0x67, selector: 0x20, attributes: 0x8B };
    memory.write_obj(STACK, GuestAddress(0x3004)).expect("inside RAM");
    engine.state_replaced();
    assert_eq!(handled(&mut engine, &memory, false), (1, BASE + 0x100));
    assert_eq!(engine.icount(), Icount(2));
}

#[test]
fn what_a_load_of_ss_has_met_is_reported_behind_the_next_instruction() {
    const WATCHED: u64 = 0x3000;
    // MOV SS, [RDI], then NOP; or INT 0x10, whose handler is entered first.
    for (next, rip) in [(&[0x90u8][..], BASE + 3), (&[0xCD, 0x10], HANDLERS + 0x100)] {
        let code = [&[0x8E, 0x17][..], next].concat();
        for step in [1, 100] {
            let (mut engine, memory) = engine(BASE, &code);
            memory.write_obj(0x18u64, GuestAddress(WATCHED)).expect("inside RAM");
            let state = engine.state_mut();
            state.gpr[gpr::RDI] = WATCHED;
            // DR1: two bytes, read or written.
            state.dr[1] = WATCHED;
            state.dr[7] = 0x400 | 1 << 3 | 7 << 20;
            while engine.icount() < Icount(2) {
                let limit = Icount(engine.icount().0 + step);
                engine.run(limit.min(Icount(2)), &mut Ports::default());
            }
            engine.run(Icount(100), &mut Ports::default());
            assert_eq!(engine.state().rip, HANDLERS + 16 + 1);
            let pushed: u64 = memory.read_obj(GuestAddress(engine.state().gpr[gpr::RSP])).expect("inside RAM");
            assert_eq!((pushed, engine.state().dr[6] & 0xF), (rip, 2));
        }
    }
}

#[test]
fn a_breakpoint_at_the_instruction_behind_a_load_of_ss_is_not_met() {
    // MOV SS, AX; NOP; HLT. With STI in its place, the breakpoint is met.
    for (code, met) in [([0x8Eu8, 0xD0, 0x90, 0xF4], false), ([0x90, 0xFB, 0x90, 0xF4], true)] {
        let (mut engine, _) = engine(BASE, &code);
        let state = engine.state_mut();
        state.gpr[gpr::RAX] = 0x18;
        state.dr[0] = BASE + 2;
        state.dr[7] = 0x402;
        assert_eq!(engine.run(Icount(100), &mut Ports::default()), Stop::Halted);
        assert_eq!(engine.state().rip, if met { HANDLERS + 17 } else { BASE + 4 });
    }
}

#[test]
fn what_the_emulation_lacks_is_executed_on_the_host_with_the_segments_address() {
    // FLD DWORD [BX]; FADD ST, ST; FSTP DWORD [BX+4]; MOVUPS XMM0, [BX]; ADDPS XMM0, XMM0; MOVUPS [BX+0x10], XMM0;
    // POPCNT EAX, [BX+8]; HLT
    let code: Vec<u8> = [
        &[0xD9u8, 0x07][..],
        &[0xDC, 0xC0],
        &[0xD9, 0x5F, 0x04],
        &[0x0F, 0x10, 0x07],
        &[0x0F, 0x58, 0xC0],
        &[0x0F, 0x11, 0x47, 0x10],
        &[0x66, 0xF3, 0x0F, 0xB8, 0x47, 0x08],
        &[0xF4],
    ]
    .concat();
    const DATA: u64 = 0x30_0FF9;
    for (limit, retired, vector) in [(0x11F, 8, None), (0x11E, 6, Some(13)), (0x106, 3, Some(13))] {
        let (mut engine, memory) = segmented(&code, 0xFFFF, false);
        let at = GuestAddress(DATA + 0x100);
        memory.write_obj(1.5f32.to_bits(), at).expect("inside RAM");
        memory.write_obj(0xFFu64, GuestAddress(at.0 + 8)).expect("inside RAM");
        let state = engine.state_mut();
        state.cr0 &= !0xC;
        state.cr4 |= 0x600;
        state.gpr[gpr::RBX] = 0x100;
        state.seg[seg::DS] = Segment { base: DATA, limit, selector: 0x28, attributes: 0x93 };
        assert_eq!(engine.run(Icount(100), &mut Ports::default()), Stop::Halted);
        match vector {
            None => assert_eq!(engine.state().rip, START + code.len() as u64),
            Some(vector) => assert_eq!(engine.state().rip, HANDLERS + 16 * vector + 1),
        }
        assert_eq!(engine.icount(), Icount(retired), "limit {limit:#x}");
        if vector.is_none() {
            let read = |offset: u64| memory.read_obj::<u32>(GuestAddress(at.0 + offset)).expect("inside RAM");
            assert_eq!([read(4), read(0x10), read(0x14)], [3.0f32, 3.0, 6.0].map(f32::to_bits));
            assert_eq!(engine.state().gpr[gpr::RAX], 8);
        }
    }
}

#[test]
fn the_second_encoding_of_arithmetic_on_bytes_is_executed() {
    // CMP AL, 5 (82 /7); MOV [EDI], EBX; JNE to HLT; ADD AH, 0x7F; SUB BYTE [EDI], 1; HLT
    let code = [0x82, 0xF8, 5, 0x89, 0x1F, 0x75, 0x06, 0x82, 0xC4, 0x7F, 0x82, 0x2F, 1, 0xF4];
    let (at, data) = (0x40_2000, 0x40_3000);
    let (mut engine, memory) = engine(at, &code);
    let state = engine.state_mut();
    state.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, selector: 0x20, attributes: 0xC9B };
    (state.gpr[gpr::RAX], state.gpr[gpr::RBX], state.gpr[gpr::RDI]) = (5, 7, data);
    assert_eq!(engine.run(Icount(100), &mut Ports::default()), Stop::Halted);
    assert_eq!((engine.state().rip, engine.icount()), (at + code.len() as u64, Icount(6)));
    assert_eq!(engine.state().gpr[gpr::RAX], 0x7F05);
    assert_eq!(memory.read_obj::<u32>(GuestAddress(data)).expect("inside RAM"), 6);
}
