//! Guests that nobody writes by accident, found by fuzzing: they must neither stop the engine nor show how it works.

use orrery_cpu::bus::MsrRefused;
use orrery_cpu::engine::{Engine, EngineConfig, Stop};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::state::{CpuState, Segment, TableRegister, control, gpr, rflags};
use orrery_cpu::{Bus, Icount};
use vm_memory::{Bytes, GuestAddress};

/// A machine whose every register reads as `answer`, and which wants attention after each access.
struct Eager {
    answer: u64,
    written: Vec<u64>,
    attention: bool,
}

impl Eager {
    fn new(answer: u64) -> Eager {
        Eager { answer, written: Vec::new(), attention: false }
    }
}

impl Bus for Eager {
    fn port_read(&mut self, _: Icount, _: u16, _: usize) -> u32 {
        self.attention = true;
        0
    }
    fn port_write(&mut self, _: Icount, _: u16, _: usize, _: u32) {
        self.attention = true;
    }
    fn mmio_read(&mut self, _: Icount, _: u64, data: &mut [u8]) {
        self.attention = true;
        data.iter_mut().zip(self.answer.to_le_bytes().iter().cycle()).for_each(|(to, from)| *to = *from);
    }
    fn mmio_write(&mut self, _: Icount, gpa: u64, _: &[u8]) {
        self.attention = true;
        self.written.push(gpa);
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

const CODE: u64 = 0x40_1000;
/// Where instructions for the test itself are.
const PEEK: u64 = CODE + 0x800;
const POKE: u64 = CODE + 0x810;
const STACK: u64 = 0x58_0000;
const IDT: u64 = 0x7000;
const GDT: u64 = 0x6000;
/// Handler of vector n: HLT at this address + n.
const HANDLERS: u64 = 0x50_0000;
const LEAVES: u64 = 0x5000;
/// What `LEAVES` maps.
const MAPPED: u64 = 0x4000_0000;
/// Beyond RAM, and mapped.
const DEVICE: u64 = 0x100_0000;

/// Supervisor code in 64-bit mode over 16 MiB of RAM, with a handler that halts for every vector.
fn guest(code: &[u8]) -> Engine {
    guest_with(code, EngineConfig::default().patience)
}

/// The same, with an engine of this much patience.
fn guest_with(code: &[u8], patience: u32) -> Engine {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("16 MiB of memory");
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("inside RAM");
    write(0x1000, 0x2003);
    write(0x2000, 0x3003);
    write(0x2008, 0x4003);
    for page in 0..9 {
        write(0x3000 + 8 * page, page << 21 | 0x83);
    }
    write(0x4000, LEAVES | 3);
    write(GDT + 0x10, 0x00AF_9B00_0000_FFFF);
    write(GDT + 0x18, 0x00CF_9300_0000_FFFF);
    for vector in 0..32 {
        let handler = HANDLERS + vector;
        write(IDT + vector * 16, handler & 0xFFFF | 0x10 << 16 | 0x8E << 40 | (handler >> 16) << 48);
        memory.write_obj(0xF4u8, GuestAddress(handler)).expect("inside RAM");
    }
    memory.write_slice(code, GuestAddress(CODE)).expect("inside RAM");
    memory.write_slice(&[0x48, 0x8B, 0x07], GuestAddress(PEEK)).expect("inside RAM"); // mov rax, [rdi]
    memory.write_slice(&[0x88, 0x07], GuestAddress(POKE)).expect("inside RAM"); // mov [rdi], al
    let config = EngineConfig { code_cache_bytes: 1 << 20, patience, ..EngineConfig::default() };
    let mut engine = Engine::new(memory, ModelFeatures::default(), config).expect("an engine");
    let mut state = CpuState::long_mode_boot(CODE, 0, STACK, 0x1000, GDT, 0x1F);
    state.idtr = TableRegister { base: IDT, limit: 0x1FF };
    state.tr = Segment { base: 0x8000, limit: 0x67, selector: 0x20, attributes: 0x8B };
    state.cr0 |= control::CR0_MP;
    state.cr4 |= control::CR4_OSFXSR | control::CR4_OSXMMEXCPT | control::CR4_OSXSAVE;
    state.xcr0 = 7;
    *engine.state_mut() = state;
    engine.state_replaced();
    engine
}

/// Runs until the guest halts, through every stop for attention; gives the vector whose handler it halted in.
fn vector(engine: &mut Engine, bus: &mut Eager) -> u64 {
    for _ in 0..100 {
        bus.attention = false;
        match engine.run(Icount(1000), bus) {
            Stop::Attention => {}
            Stop::Halted => return engine.state().rip - 1 - HANDLERS,
            other => panic!("{other:?}"),
        }
    }
    panic!("no progress");
}

#[test]
fn control_flow_enforcement_is_not_there() {
    #[rustfmt::skip]
    let instructions: [&[u8]; 5] = [
        &[0x48, 0x0F, 0x38, 0xF6, 0x01], // wrssq [rcx], rax
        &[0xF3, 0x48, 0x0F, 0xAE, 0xE8], // incsspq rax
        &[0xF3, 0x0F, 0x01, 0x29], // rstorssp [rcx]
        &[0xF3, 0x0F, 0x01, 0xE8], // setssbsy
        &[0xF3, 0x0F, 0x01, 0xEA], // saveprevssp
    ];
    for code in instructions {
        assert_eq!(vector(&mut guest(code), &mut Eager::new(0)), 6, "{code:02x?}");
    }
    // What reads the shadow stack's pointer is a no-operation.
    let mut engine = guest(&[0xF3, 0x48, 0x0F, 0x1E, 0xC8, 0x0F, 0x0B]); // rdsspq rax; ud2
    assert_eq!(vector(&mut engine, &mut Eager::new(0)), 6);
    assert_eq!(engine.icount(), Icount(2));
}

#[test]
fn attention_does_not_swallow_the_single_step_trap() {
    for code in [&[0xEE, 0x90][..], &[0x8A, 0x07, 0x90], &[0xF4, 0x90]] {
        // out dx, al; mov al, [rdi]; hlt
        let mut engine = guest(code);
        engine.state_mut().rflags |= rflags::TF;
        engine.state_mut().gpr[gpr::RDI] = DEVICE;
        assert_eq!(vector(&mut engine, &mut Eager::new(0)), 1, "{code:02x?}");
        assert_eq!(engine.icount(), Icount(2), "{code:02x?}");
        assert_eq!(engine.state().dr[6] & 1 << 14, 1 << 14);
    }
}

#[test]
fn repeated_accesses_to_ports_are_stepped_through() {
    for code in [&[0xF3, 0x6F, 0x90][..], &[0xF3, 0x6C, 0x90]] {
        // rep outsd; rep insb
        for patience in [1, 1 << 16] {
            let mut engine = guest_with(code, patience);
            let state = engine.state_mut();
            state.rflags |= rflags::TF;
            (state.gpr[gpr::RSI], state.gpr[gpr::RDI]) = (STACK + 0x1000, STACK + 0x1000);
            for left in [2, 1, 0] {
                let state = engine.state_mut();
                (state.rip, state.halted, state.gpr[gpr::RSP]) = (CODE, false, STACK);
                (state.rflags, state.gpr[gpr::RCX]) = (state.rflags | rflags::TF, left + 1);
                let before = engine.icount().0;
                assert_eq!(vector(&mut engine, &mut Eager::new(0)), 1, "{code:02x?}");
                assert_eq!(engine.state().gpr[gpr::RCX], left, "{code:02x?}");
                // The handler's HLT, and the instruction once it is done.
                assert_eq!(engine.icount().0 - before, 1 + u64::from(left == 0), "{code:02x?}");
                let returns_to = peek(&mut engine, STACK - 40);
                assert_eq!(returns_to, if left == 0 { CODE + 2 } else { CODE }, "{code:02x?}");
            }
        }
    }
}

#[test]
fn a_jump_to_nowhere_read_from_a_device_faults_itself() {
    let mut engine = guest(&[0xFF, 0x27]); // jmp [rdi]
    engine.state_mut().gpr[gpr::RDI] = DEVICE;
    assert_eq!(vector(&mut engine, &mut Eager::new(0x1234_5678_9ABC_DEF0)), 13);
    assert_eq!(engine.icount(), Icount(1), "the handler's HLT alone");
    // The frame: error code, RIP.
    let pushed = STACK - 48;
    assert_eq!(engine.state().gpr[gpr::RSP], pushed);
    assert_eq!([peek(&mut engine, pushed), peek(&mut engine, pushed + 8)], [0, CODE]);
}

/// Reads RAM as the guest sees it.
fn peek(engine: &mut Engine, at: u64) -> u64 {
    let state = engine.state_mut();
    (state.rip, state.halted) = (PEEK, false);
    state.gpr[gpr::RDI] = at;
    let next = engine.icount().0 + 1;
    assert_eq!(engine.run(Icount(next), &mut Eager::new(0)), Stop::Limit);
    engine.state().gpr[gpr::RAX]
}

#[test]
fn a_floating_point_exception_about_a_devices_value_is_delivered() {
    let mut engine = guest(&[0xF3, 0x0F, 0x5E, 0x07]); // divss xmm0, [rdi]
    engine.state_mut().gpr[gpr::RDI] = DEVICE;
    engine.state_mut().fpu.0[24..28].copy_from_slice(&[0, 0, 0, 0]); // MXCSR: all unmasked
    engine.state_mut().fpu.0[160..164].copy_from_slice(&1f32.to_le_bytes());
    assert_eq!(vector(&mut engine, &mut Eager::new(0)), 19);
}

#[test]
fn accessed_flags_change_code_too() {
    // The code lies in the page table that it uses. Reading through entry 0x21 sets that entry's accessed flag, and
    // the entry's first bytes are the next instruction: ADD ECX, EAX before, AND ECX, EAX after.
    let code = [0x48, 0x8B, 0x1F, 0x03, 0xC8, 0xF4]; // mov rbx, [rdi]; add ecx, eax; hlt
    let start = LEAVES + 0x108 - 3;
    for limit in [1000, 1] {
        let mut engine = guest(&[]);
        let mut bus = Eager::new(0);
        poke(&mut engine, start, &code);
        let state = engine.state_mut();
        state.rip = start;
        state.gpr[gpr::RDI] = MAPPED + 0x21 * 4096;
        (state.gpr[gpr::RAX], state.gpr[gpr::RCX]) = (1, 2);
        let first = engine.icount().0 + limit;
        engine.run(Icount(first), &mut bus);
        engine.run(Icount(first + 1000), &mut bus);
        assert!(engine.state().halted);
        assert_eq!(engine.state().gpr[gpr::RCX], 0, "the AND was executed, in runs of {limit}");
    }
}

/// Writes RAM as the guest does.
fn poke(engine: &mut Engine, at: u64, bytes: &[u8]) {
    for (byte, at) in bytes.iter().zip(at..) {
        let state = engine.state_mut();
        state.rip = POKE;
        (state.gpr[gpr::RDI], state.gpr[gpr::RAX]) = (at, u64::from(*byte));
        let next = engine.icount().0 + 1;
        assert_eq!(engine.run(Icount(next), &mut Eager::new(0)), Stop::Limit);
    }
}

#[test]
fn nothing_but_the_state_remembers_a_breakpoint() {
    // A data breakpoint on the stack is hit by the frame of an exception. If the engine kept that for later, whether
    // the handler's first instruction traps would depend on where the run was stopped and saved.
    let mut engine = guest(&[0x0F, 0x0B]); // ud2
    poke(&mut engine, HANDLERS + 6, &[0x90]); // nop, and then the HLT of vector 7
    let state = engine.state_mut();
    state.rip = CODE;
    state.dr[0] = STACK - 8;
    state.dr[7] = 0x400 | 0xD << 16 | 1;
    assert_eq!(vector(&mut engine, &mut Eager::new(0)), 7);
    assert_eq!(engine.state().dr[6] & 0xF, 0);
}

#[test]
fn a_stack_in_page_0_is_written_like_any_other() {
    // Two stacks in turn: again: push rax; pop rax; xchg rsp, rbx; jmp again
    let mut engine = guest(&[0x50, 0x58, 0x48, 0x87, 0xDC, 0xEB, 0xF9]);
    let mut bus = Eager::new(0);
    engine.state_mut().gpr[gpr::RSP] = 0x800;
    engine.state_mut().gpr[gpr::RBX] = STACK + 0x5800;
    for round in 1..4 {
        assert_eq!(engine.run(Icount(1004 * round), &mut bus), Stop::Limit);
        let dirty = engine.take_dirty();

        assert!(dirty.contains(&0) && dirty.contains(&(STACK / 4096 + 5)), "round {round}: {dirty:x?}");
    }
}

/// Runs to the end of the string instruction in front, however often it is left; gives how often that was, and the
/// first other stop.
fn finish(engine: &mut Engine, bus: &mut Eager) -> (u32, Stop) {
    let mut parts = 0;
    loop {
        match engine.run(Icount(1000), bus) {
            Stop::Unfinished => parts += 1,
            stop => return (parts, stop),
        }
        assert!(engine.is_unfinished() && !engine.can_interrupt());
        assert_eq!(engine.icount(), Icount(0));
    }
}

#[test]
fn a_string_instruction_without_end_gives_the_host_its_turn() {
    // rep stosb, rep insb, rep outsb, rep lodsb, rep movsb, repe cmpsb, repe scasb
    for code in [[0xF3, 0xAA], [0xF3, 0x6C], [0xF3, 0x6E], [0xF3, 0xAC], [0xF3, 0xA4], [0xF3, 0xA6], [0xF3, 0xAE]] {
        let mut engine = guest(&code);
        let state = engine.state_mut();
        state.gpr[gpr::RCX] = u64::MAX;
        (state.gpr[gpr::RSI], state.gpr[gpr::RDI]) = (DEVICE, DEVICE);
        state.rflags |= rflags::IF;
        let mut bus = Eager::new(0);
        assert_eq!(engine.run(Icount(1000), &mut bus), Stop::Unfinished, "{code:02x?}");
        let runs = u64::from(EngineConfig::default().patience);
        assert_eq!(engine.state().gpr[gpr::RCX], u64::MAX - runs, "{code:02x?}");
        assert_eq!((engine.state().rip, engine.icount()), (CODE, Icount(0)));
        assert!(!engine.can_interrupt());
    }
}

/// A guest whose handler of #PF lies where nothing is mapped, and that jumps there. Each #PF begins on the stack that
/// the last one has left, or with `again` on the same one.
fn without_handler(patience: u32, again: bool) -> Engine {
    let mut engine = guest_with(&[], patience);
    let gate = |at: u64, stack: u64| at & 0xFFFF | 0x10 << 16 | stack << 32 | 0x8F << 40 | (at >> 16) << 48;
    let nowhere = MAPPED + 0x2000;
    for (at, value) in [
        (LEAVES + 8, 0x9003),
        (IDT + 14 * 16, gate(nowhere, again.into())),
        (IDT + 8 * 16, gate(HANDLERS + 8, 2)),
        (0x8000 + 0x24, STACK),
        (0x8000 + 0x2C, STACK),
    ] {
        poke(&mut engine, at, &value.to_le_bytes());
    }
    engine.set_icount(Icount(0));
    let state = engine.state_mut();
    (state.rip, state.gpr[gpr::RSP]) = (nowhere, MAPPED + 0x2000);
    state.rflags |= rflags::IF;
    engine
}

#[test]
fn exceptions_without_end_give_the_host_its_turn() {
    for patience in [1, 7, EngineConfig::default().patience] {
        let mut engine = without_handler(patience, true);
        for _ in 0..3 {
            assert_eq!(engine.run(Icount(1000), &mut Eager::new(0)), Stop::Unfinished);
            assert_eq!(engine.icount(), Icount(0));
            assert!(engine.is_unfinished() && !engine.can_interrupt());
            assert_eq!((engine.state().rip, engine.state().gpr[gpr::RSP]), (MAPPED + 0x2000, STACK - 48));
        }
    }
}

#[test]
fn the_parts_of_exceptions_in_a_row_are_one() {
    // Until the page of the stack is full, and the double fault's handler halts.
    let [whole, parts] = [u32::MAX, 1].map(|patience| {
        let mut engine = without_handler(patience, false);
        let (parts, stop) = finish(&mut engine, &mut Eager::new(0));
        assert_eq!((stop, engine.state().rip - 1 - HANDLERS), (Stop::Halted, 8));
        (parts, engine.icount(), engine.state().clone())
    });
    assert!(whole.1 == parts.1 && whole.2 == parts.2, "the engine's patience does not show");
    assert_eq!(whole.0, 0);
    assert!(parts.0 > 40);
}

#[test]
fn the_parts_of_a_string_instruction_are_one() {
    // Two runs, in two pages each. The second of these takes away what the code itself was fetched through.
    let tables = |state: &mut CpuState| (state.gpr[gpr::RDI], state.gpr[gpr::RCX]) = (0x3000 - 16, 16 + 9 * 8);
    let own_bytes = |state: &mut CpuState| {
        state.gpr[gpr::RAX] = 0xF4;
        (state.gpr[gpr::RDI], state.gpr[gpr::RCX]) = (CODE - 20, 40);
    };
    let to_a_device = |state: &mut CpuState| {
        (state.gpr[gpr::RAX], state.gpr[gpr::RCX]) = (0x88, 50);
        (state.gpr[gpr::RSI], state.gpr[gpr::RDI]) = (CODE, DEVICE);
    };
    // The last page that is mapped ends 18 MiB from the start.
    let to_a_fault = |state: &mut CpuState| {
        (state.gpr[gpr::RSI], state.gpr[gpr::RDI], state.gpr[gpr::RCX]) = (DEVICE, (18 << 20) - 30, 50);
    };
    let past_a_breakpoint = |state: &mut CpuState| {
        (state.gpr[gpr::RSI], state.gpr[gpr::RDI], state.gpr[gpr::RCX]) = (DEVICE, 0x60_0000, 50);
        (state.dr[0], state.dr[7]) = (0x60_0007, 1 | 1 << 16);
    };
    type Start<'a> = &'a dyn Fn(&mut CpuState);
    let cases: [(&[u8], Start); 10] = [
        (&[0xF3, 0xAA], &tables),
        (&[0xF3, 0xAA], &own_bytes),
        (&[0xF3, 0xAA], &to_a_device),
        (&[0xF3, 0xA4, 0xF4], &to_a_device),
        (&[0xF3, 0xA6, 0xF4], &to_a_fault),
        (&[0xF3, 0xAE, 0xF4], &to_a_device),
        (&[0xF3, 0x6C, 0xF4], &to_a_fault),
        (&[0xF3, 0x6E, 0xF4], &to_a_device),
        (&[0xF3, 0xA4, 0xF4], &to_a_fault),
        (&[0xF3, 0xA4, 0xF4], &past_a_breakpoint),
    ];
    for (index, (code, start)) in cases.into_iter().enumerate() {
        let [whole, parts] = [u32::MAX, 1].map(|patience| {
            let mut engine = guest_with(code, patience);
            start(engine.state_mut());
            let mut bus = Eager::new(0x1122_3344_5566_7788);
            let (parts, stop) = finish(&mut engine, &mut bus);
            (parts, stop, engine.state().clone(), engine.icount(), bus.written)
        });
        assert_eq!(whole.0, 0);
        assert!(parts.0 > 0, "case {index}");
        assert_eq!((&whole.1, whole.3, &whole.4), (&parts.1, parts.3, &parts.4), "case {index}");
        assert!(whole.2 == parts.2, "case {index}");
    }
}
