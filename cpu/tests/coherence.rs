//! What must not matter: what the software TLBs happen to hold, and that an instruction was tried before.

mod common;

use common::Empty;
use orrery_cpu::bus::{MsrRefused, TscLine};
use orrery_cpu::engine::{Engine, EngineConfig, Stop};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::state::{CpuState, control, gpr};
use orrery_cpu::{Bus, Icount};
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x40_1000;
/// Linear page that the two trees map to different frames.
const SPLIT: u64 = 0x4000_0000;
/// Linear page that both trees map to the same frame; it shares TLB entries with `SPLIT` in a small TLB.
const OTHER: u64 = SPLIT + 0x2000;
/// Guest-physical address of the leaf table of the first tree.
const LEAVES: u64 = 0x5000;
const SECOND_ROOT: u64 = 0x8000;

/// Supervisor code in 64-bit mode with two trees of page tables: both map the first 18 MiB as they are, and `SPLIT`
/// as a global page to frames that hold 0xAAAA and 0xBBBB.
fn guest_memory(code: &[u8]) -> GuestMemory {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("16 MiB of memory");
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("inside RAM");
    for (root, frame) in [(0x1000u64, 0x60_0000u64), (SECOND_ROOT, 0x60_1000)] {
        write(root, (root + 0x1000) | 3);
        write(root + 0x1000, (root + 0x2000) | 3);
        write(root + 0x1008, (root + 0x3000) | 3);
        for i in 0..9 {
            write(root + 0x2000 + 8 * i, i << 21 | 0x83);
        }
        write(root + 0x3000, (root + 0x4000) | 3);
        write(root + 0x4000, frame | 0x103);
        write(root + 0x4010, 0x60_2000 | 3);
    }
    write(0x60_0000, 0xAAAA);
    write(0x60_1000, 0xBBBB);
    memory.write_slice(code, GuestAddress(CODE)).expect("inside RAM");
    memory
}

fn engine_over(memory: GuestMemory, tlb_bits: u32) -> Engine {
    let config = EngineConfig { tlb_bits, code_cache_bytes: 1 << 20, ..EngineConfig::default() };
    Engine::new(memory, ModelFeatures::default(), config).expect("an engine")
}

/// Such a guest in an engine with TLBs of `2^tlb_bits` entries.
fn guest(code: &[u8], tlb_bits: u32) -> Engine {
    let mut engine = engine_over(guest_memory(code), tlb_bits);
    *engine.state_mut() = CpuState::long_mode_boot(CODE, 0x50_0000, 0x58_0000, 0x1000, 0x7000, 23);
    engine.state_replaced();
    engine
}

#[test]
fn a_global_page_does_not_outlive_its_tables() {
    #[rustfmt::skip]
    let code = [
        0x0F, 0x20, 0xE0, 0x0C, 0x80, 0x0F, 0x22, 0xE0, // mov rax, cr4; or al, PGE; mov cr4, rax
        0x48, 0x8B, 0x1F, 0x0F, 0x20, 0xD8, 0x0F, 0x22, 0xD8, // mov rbx, [rdi]; mov rax, cr3; mov cr3, rax
        0x48, 0x8B, 0x1F, // mov rbx, [rdi]
        0x48, 0x8B, 0x06, // mov rax, [rsi]
        0xB8, 0x00, 0x80, 0x00, 0x00, 0x0F, 0x22, 0xD8, // mov eax, 0x8000; mov cr3, rax
        0x48, 0x8B, 0x17, 0xF4, // mov rdx, [rdi]; hlt
    ];
    for tlb_bits in [12, 1] {
        let mut engine = guest(&code, tlb_bits);
        engine.state_mut().gpr[gpr::RDI] = SPLIT;
        engine.state_mut().gpr[gpr::RSI] = OTHER;
        assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::Halted);
        assert_eq!(engine.state().gpr[gpr::RBX], 0xAAAA);
        assert_eq!(engine.state().gpr[gpr::RDX], 0xBBBB, "TLB of 2^{tlb_bits} entries");
    }
}

#[test]
fn a_changed_page_table_entry_is_seen_at_once() {
    #[rustfmt::skip]
    let code = [
        0x48, 0x8B, 0x1F, // mov rbx, [rdi]
        0x48, 0x89, 0x06, // mov [rsi], rax: another frame, and no INVLPG
        0x48, 0x8B, 0x17, 0xF4, // mov rdx, [rdi]; hlt
    ];
    for tlb_bits in [12, 1] {
        let mut engine = guest(&code, tlb_bits);
        let state = engine.state_mut();
        state.gpr[gpr::RDI] = SPLIT;
        state.gpr[gpr::RSI] = LEAVES;
        state.gpr[gpr::RAX] = 0x60_1003;
        assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::Halted);
        assert_eq!((engine.state().gpr[gpr::RBX], engine.state().gpr[gpr::RDX]), (0xAAAA, 0xBBBB));
    }
}

/// Registers of a guest that goes from one tree to the other and back: R8 and R9 are their roots, RDI is `SPLIT`, RSI is
/// where the first tree maps it, and R10 is the frame there.
fn visitor(code: &[u8], tlb_bits: u32) -> Engine {
    let mut engine = guest(code, tlb_bits);
    let gpr = &mut engine.state_mut().gpr;
    (gpr[gpr::R8], gpr[gpr::R9], gpr[gpr::RDI], gpr[gpr::RSI]) = (SECOND_ROOT, 0x1000, SPLIT, LEAVES);
    gpr[gpr::R10] = 0x60_0000;
    engine
}

const TO_SECOND: [u8; 4] = [0x41, 0x0F, 0x22, 0xD8]; // mov cr3, r8
const TO_FIRST: [u8; 4] = [0x41, 0x0F, 0x22, 0xD9]; // mov cr3, r9
const HLT: [u8; 1] = [0xF4];

#[test]
fn what_is_kept_of_an_address_space_follows_its_tables() {
    let change = [0x48, 0x89, 0x06]; // mov [rsi], rax: another frame, and no INVLPG
    let others = [0x41, 0x0F, 0x01, 0x3B].repeat(100); // invlpg [r11]
    for (tlb_bits, others) in [(12, &others[..]), (12, &[]), (1, &[])] {
        // mov rbx, [rdi]; to the second tree; mov rcx, [rdi]; change the first; back; mov rdx, [rdi]
        let read = [[0x48, 0x8B, 0x1F], [0x48, 0x8B, 0x0F], [0x48, 0x8B, 0x17]];
        let code = [&read[0][..], &TO_SECOND, &read[1], &change, others, &TO_FIRST, &read[2], &HLT].concat();
        let mut engine = visitor(&code, tlb_bits);
        engine.state_mut().gpr[gpr::RAX] = 0x60_1003;
        assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::Halted);
        let gpr = engine.state().gpr;
        assert_eq!([gpr[gpr::RBX], gpr[gpr::RCX], gpr[gpr::RDX]], [0xAAAA, 0xBBBB, 0xBBBB]);

        // The same with code: call rdi.
        let call = [0xFF, 0xD7];
        let code = [&call[..], &TO_SECOND, &call, &change, others, &TO_FIRST, &call, &HLT].concat();
        let memory = guest_memory(&code);
        for (frame, value) in [(0x60_0000, 0x10), (0x60_1000, 0x01)] {
            let code = [0x83, 0xC5, value, 0xC3]; // add ebp, value; ret
            memory.write_slice(&code, GuestAddress(frame)).expect("inside RAM");
        }
        let mut other = engine_over(memory, tlb_bits);
        *other.state_mut() = visitor(&code, tlb_bits).state().clone();
        other.state_replaced();
        other.state_mut().gpr[gpr::RAX] = 0x60_1003;
        assert_eq!(other.run(Icount(1000), &mut Empty), Stop::Halted);
        assert_eq!(other.state().gpr[gpr::RBP], 0x12);
    }
}

#[test]
fn what_is_kept_of_an_address_space_writes_nothing_unnoticed() {
    let write = [0x89, 0x47, 0x10]; // mov [rdi + 16], eax
    let call = [0x41, 0xFF, 0xD2]; // call r10
    let patch = [0xC6, 0x47, 0x02, 0x01]; // mov byte [rdi + 2], 1
    // Code from the frame runs while the first tree is away, and changes through it.
    let code = [&write[..], &TO_SECOND, &call, &TO_FIRST, &patch, &call, &HLT].concat();
    for tlb_bits in [12, 1] {
        let memory = guest_memory(&code);
        let add = [0x83, 0xC5, 0x10, 0xC3]; // add ebp, 16; ret
        memory.write_slice(&add, GuestAddress(0x60_0000)).expect("inside RAM");
        let mut engine = engine_over(memory, tlb_bits);
        *engine.state_mut() = visitor(&code, tlb_bits).state().clone();
        engine.state_replaced();
        assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::Halted);
        assert_eq!(engine.state().gpr[gpr::RBP], 0x11);
    }
    // Pages written are taken meanwhile.
    let code = [&write[..], &TO_SECOND, &TO_FIRST, &write, &HLT].concat();
    for tlb_bits in [12, 1] {
        let mut engine = visitor(&code, tlb_bits);
        assert_eq!(engine.run(Icount(2), &mut Empty), Stop::Limit);
        assert!(engine.take_dirty().contains(&0x600));
        assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::Halted);
        assert!(engine.take_dirty().contains(&0x600), "TLB of 2^{tlb_bits} entries");
    }
}

#[test]
fn an_address_space_is_found_as_it_was_left() {
    // mov rcx, [rdi]; mov rdx, [rdi]; dec rax; jnz to the start
    let turn = [&TO_SECOND[..], &[0x48, 0x8B, 0x0F], &TO_FIRST, &[0x48, 0x8B, 0x17, 0x48, 0xFF, 0xC8]].concat();
    let code = [&turn[..], &[0x75, -(turn.len() as i8 + 2) as u8], &HLT].concat();
    let mut engine = visitor(&code, 12);
    engine.state_mut().gpr[gpr::RAX] = 100;
    assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::Halted);
    assert_eq!((engine.state().gpr[gpr::RCX], engine.state().gpr[gpr::RDX]), (0xBBBB, 0xAAAA));
    assert!(engine.statistics().slow_accesses < 10, "{} misses", engine.statistics().slow_accesses);
}

#[test]
fn the_interrupt_shadow_covers_an_instruction_that_is_tried_twice() {
    let code = [0xFB, 0x89, 0x07, 0x90, 0x90, 0xF4]; // sti; mov [rdi], eax; nop; nop; hlt
    for (place, address) in [("RAM", 0x51_0000), ("memory-mapped", 0x100_0000)] {
        let mut engine = guest(&code, 12);
        engine.state_mut().gpr[gpr::RDI] = address;
        engine.request_interrupt_window(true);
        assert_eq!(engine.run(Icount(1000), &mut Empty), Stop::InterruptWindow);
        assert_eq!(engine.icount(), Icount(2), "{place}");
    }
}

#[test]
fn a_branch_begins_with_translations_and_keeps_its_changes_to_itself() {
    #[rustfmt::skip]
    let code = [
        0x48, 0xFF, 0xC3, 0xF4, // inc rbx; hlt
        0xC6, 0x07, 0xF4, 0xEB, 0xF7, // mov byte [rdi], 0xF4 (hlt); jmp to the start
    ];
    let again = |engine: &mut Engine, rip: u64| {
        let now = engine.icount();
        let state = engine.state_mut();
        (state.rip, state.halted) = (rip, false);
        assert_eq!(engine.run(Icount(now.0 + 100), &mut Empty), Stop::Halted);
        engine.state().gpr[gpr::RBX]
    };
    let mut parent = guest(&code, 12);
    parent.state_mut().gpr[gpr::RDI] = CODE;
    assert_eq!(again(&mut parent, CODE), 1);
    let frozen = parent.freeze().expect("memory for a copy");
    let mut children: Vec<Engine> = (0..2)
        .map(|_| {
            let memory = guest_memory(&code);
            let mut child = Engine::branch(&frozen, memory).expect("an engine");
            *child.state_mut() = parent.state().clone();
            child.state_replaced();
            child
        })
        .collect();
    assert_eq!(again(&mut children[0], CODE), 2);
    assert_eq!(children[0].statistics().translated, 0, "what the parent translated is found");
    // This child changes its code: neither the parent nor the other child sees it.
    assert_eq!(again(&mut children[0], CODE + 4), 2);
    assert_eq!(again(&mut children[1], CODE), 2);
    assert_eq!(again(&mut parent, CODE), 2);
    // What was forgotten after the copy was made is not found by later branches.
    assert_eq!(again(&mut parent, CODE + 4), 2);
    let frozen = parent.freeze().expect("memory for a copy");
    let memory = guest_memory(&code);
    memory.write_obj(0xF4u8, GuestAddress(CODE)).expect("inside RAM");
    let mut late = Engine::branch(&frozen, memory).expect("an engine");
    *late.state_mut() = parent.state().clone();
    late.state_replaced();
    assert_eq!(again(&mut late, CODE), 2);
}

/// However much the parent has translated since its translations went into a file: branches begin with what is right.
#[test]
fn branches_of_later_moments_begin_with_what_is_right() {
    const BLOCKS: u64 = 30_000;
    // inc rbx; jmp to what follows. A block each.
    let mut code = [0x48, 0xFF, 0xC3, 0xEB, 0x00].repeat(BLOCKS as usize);
    code.push(0xF4);
    let start = |engine: &mut Engine| {
        *engine.state_mut() = CpuState::long_mode_boot(CODE, 0x50_0000, 0x58_0000, 0x1000, 0x7000, 23);
        engine.state_replaced();
    };
    let memory = guest_memory(&code);
    let config = EngineConfig { code_cache_bytes: 64 << 20, ..EngineConfig::default() };
    let mut parent = Engine::new(memory.clone(), ModelFeatures::default(), config).expect("an engine");
    start(&mut parent);
    let run = |engine: &mut Engine, blocks: u64| {
        let before = engine.statistics().translated;
        let limit = Icount(engine.icount().0 + 2 * blocks);
        assert_eq!(engine.run(limit, &mut Empty), Stop::Limit);
        engine.statistics().translated - before
    };
    let child = |frozen: &_, code: &[u8], blocks: u64, rbx: u64| {
        let mut child = Engine::branch(frozen, guest_memory(code)).expect("an engine");
        start(&mut child);
        let translated = run(&mut child, blocks);
        assert_eq!(child.state().gpr[gpr::RBX], rbx);
        translated
    };
    assert!(run(&mut parent, 27_000) >= 27_000);
    let first = parent.freeze().expect("memory for a copy");
    assert!(child(&first, &code, 27_000, 27_000) < 10);
    // A little more: branches have it too.
    assert!(run(&mut parent, 200) >= 200);
    let second = parent.freeze().expect("memory for a copy");
    assert!(child(&second, &code, 27_200, 27_200) < 10);
    assert!((200..220).contains(&child(&first, &code, 27_200, 27_200)), "the earlier ones are what they were");
    // More: branches begin with what was there before, but for what is not right any more.
    assert!(run(&mut parent, 2_700) >= 2_700);
    code[2] = 0xCB;
    memory.write_obj(0xCBu8, GuestAddress(CODE + 2)).expect("inside RAM");
    parent.memory_written(CODE + 2, 1);
    let third = parent.freeze().expect("memory for a copy");
    let translated = child(&third, &code, 29_900, 29_898);
    assert!((2_000..3_000).contains(&translated), "{translated}");
    // Unless all are wanted.
    let all = parent.freeze_all().expect("memory for a copy");
    assert!(child(&all, &code, 29_900, 29_898) < 30);
    // A branch that is frozen itself, and its branch.
    let mut branch = Engine::branch(&second, guest_memory(&code)).expect("an engine");
    branch.memory_written(CODE + 2, 1);
    start(&mut branch);
    assert!((70..120).contains(&run(&mut branch, 27_260)));
    for all in [false, true] {
        let frozen = if all { branch.freeze_all() } else { branch.freeze() }.expect("memory for a copy");
        assert!(child(&frozen, &code, 27_260, 27_258) < 10);
    }
    assert_eq!(parent.state().gpr[gpr::RBX], 29_900);
}

/// A machine whose time-stamp counter starts at 1000 and counts 3 for each instruction, and which may say so.
struct Ticking {
    says_so: bool,
}

impl Bus for Ticking {
    fn port_read(&mut self, now: Icount, port: u16, size: usize) -> u32 {
        Empty.port_read(now, port, size)
    }
    fn port_write(&mut self, now: Icount, port: u16, size: usize, value: u32) {
        Empty.port_write(now, port, size, value);
    }
    fn mmio_read(&mut self, now: Icount, gpa: u64, data: &mut [u8]) {
        Empty.mmio_read(now, gpa, data);
    }
    fn mmio_write(&mut self, now: Icount, gpa: u64, data: &[u8]) {
        Empty.mmio_write(now, gpa, data);
    }
    fn msr_read(&mut self, now: Icount, msr: u32) -> Result<u64, MsrRefused> {
        Empty.msr_read(now, msr)
    }
    fn msr_write(&mut self, now: Icount, msr: u32, value: u64) -> Result<(), MsrRefused> {
        Empty.msr_write(now, msr, value)
    }
    fn task_priority(&mut self, now: Icount) -> u8 {
        Empty.task_priority(now)
    }
    fn set_task_priority(&mut self, now: Icount, value: u8) {
        Empty.set_task_priority(now, value);
    }
    fn tsc(&mut self, now: Icount) -> u64 {
        1000 + 3 * now.0
    }
    fn tsc_line(&self, limit: Icount) -> Option<TscLine> {
        self.says_so.then(|| TscLine { at_limit: 1000 + 3 * limit.0, per_instruction: 3 })
    }
    fn random(&mut self) -> u64 {
        Empty.random()
    }
    fn attention(&self) -> bool {
        Empty.attention()
    }
}

/// RDTSC in translated code counts what the emulation counts, wherever a run stops.
#[test]
fn the_counter_is_the_same_in_translated_code() {
    #[rustfmt::skip]
    let code = [
        0xB9, 0x10, 0x00, 0x00, 0x00, // mov ecx, 0x10: IA32_TIME_STAMP_COUNTER
        0xB8, 0x00, 0xFF, 0xFF, 0xFF, 0x31, 0xD2, 0x0F, 0x30, // mov eax, -256; xor edx, edx; wrmsr
        0xBE, 0x40, 0x00, 0x00, 0x00, // mov esi, 64
        0xF9, 0x0F, 0x31, // again: stc; rdtsc
        0x48, 0x11, 0xC7, 0x48, 0x01, 0xD3, // adc rdi, rax; add rbx, rdx
        0x0F, 0x01, 0xF9, // rdtscp
        0x48, 0x01, 0xC7, 0x48, 0x01, 0xD3, 0x49, 0x01, 0xC8, // add rdi, rax; add rbx, rdx; add r8, rcx
        0xFF, 0xCE, 0x75, 0xE7, 0xF4, // dec esi; jnz again; hlt
    ];
    let run = |says_so: bool, stride: u64, time_stamp_disabled: bool| {
        let mut engine = guest(&code, 12);
        engine.state_mut().tsc_aux = 5;
        // At CPL 0, CR4.TSD forbids nothing.
        engine.state_mut().cr4 |= if time_stamp_disabled { 4 } else { 0 };
        engine.state_replaced();
        let mut limit = 0;
        loop {
            limit += stride;
            match engine.run(Icount(limit), &mut Ticking { says_so }) {
                Stop::Limit => assert_eq!(engine.icount(), Icount(limit)),
                Stop::Halted => break,
                other => panic!("{other:?}"),
            }
        }
        (engine.icount(), engine.state().gpr, engine.state().rflags)
    };
    let expected = run(false, 10_000, false);
    assert_eq!(expected.1[gpr::R8], 64 * 5, "RDTSCP was executed");
    assert!((1..128).contains(&expected.1[gpr::RBX]), "the counter's upper half has changed on the way");
    for stride in [1, 2, 7, 23, 10_000] {
        assert_eq!(run(true, stride, false), expected, "in strides of {stride}");
        assert_eq!(run(true, stride, true), expected, "with CR4.TSD, in strides of {stride}");
    }
}

#[test]
fn a_branch_keeps_to_its_privileges() {
    const FUNCTION: u64 = CODE + 0x100;
    // stac; call r10; mov rbx, rax; clac; call r10; hlt
    let mut code = vec![0x0F, 0x01, 0xCB, 0x41, 0xFF, 0xD2, 0x48, 0x89, 0xC3, 0x0F, 0x01, 0xCA, 0x41, 0xFF, 0xD2, 0xF4];
    code.resize(0x100, 0x90);
    code.extend([0x48, 0x8B, 0x07, 0xC3]); // mov rax, [rdi]; ret
    let memory = guest_memory(&code);
    // `SPLIT` is a user page.
    for (entry, value) in [(0x1000u64, 0x2007u64), (0x2008, 0x4007), (0x4000, 0x5007), (LEAVES, 0x60_0007)] {
        memory.write_obj(value, GuestAddress(entry)).expect("inside RAM");
    }
    let mut engine = engine_over(memory, 12);
    *engine.state_mut() = CpuState::long_mode_boot(CODE, 0x50_0000, 0x58_0000, 0x1000, 0x7000, 23);
    engine.state_mut().cr4 |= control::CR4_SMAP;
    engine.state_replaced();
    let gpr = &mut engine.state_mut().gpr;
    (gpr[gpr::RDI], gpr[gpr::R10]) = (SPLIT, FUNCTION);
    assert_ne!(engine.run(Icount(1000), &mut Empty), Stop::Halted, "SMAP is in force again");
    assert_eq!((engine.state().gpr[gpr::RBX], engine.state().cr2), (0xAAAA, SPLIT));
}
