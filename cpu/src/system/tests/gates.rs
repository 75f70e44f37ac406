//! Call gates, and the way back to an outer privilege level.

use super::*;
use crate::state::{Segment, gpr, rflags, seg};

const GATE: u64 = 0x60;
/// What the gate leads to.
const TARGET: u64 = 0xFFFF_8000_1234_5678;

/// Writes a 64-bit call gate to kernel code with this descriptor privilege level.
fn set_gate(m: &Machine, code: u64, dpl: u64, present: u64) {
    let attributes = present << 47 | dpl << 45 | 0xC << 40;
    m.poke(GDT + GATE, TARGET & 0xFFFF | code << 16 | attributes | (TARGET >> 16 & 0xFFFF) << 48);
    m.poke(GDT + GATE + 8, TARGET >> 32);
}

/// CALL FAR [RDI] with REX.W, JMP FAR [RDI] with REX.W.
const CALL: [u8; 3] = [0x48, 0xFF, 0x1F];
const JMP: [u8; 3] = [0x48, 0xFF, 0x2F];
const RETFQ: [u8; 2] = [0x48, 0xCB];

/// A machine whose RDI points at a far pointer to the gate with this RPL.
fn through(m: Machine, rpl: u64) -> Machine {
    let mut m = m;
    m.poke(USER + 0x1000, 0x77);
    m.poke(USER + 0x1008, GATE | rpl);
    m.state.gpr[gpr::RDI] = USER + 0x1000;
    m
}

#[test]
fn a_call_gate_leads_inward_and_a_far_return_back() {
    let mut m = through(Machine::new().user(), 3);
    set_gate(&m, 0x10, 3, 1);
    let before = m.state.clone();
    m.run(&CALL).unwrap();
    assert_eq!((m.state.rip, m.state.cpl), (TARGET, 0));
    assert_eq!(m.state.seg[seg::CS].selector, 0x10);
    assert_eq!((m.state.seg[seg::SS].selector, m.state.seg[seg::SS].attributes), (0, 0));
    assert_eq!(m.state.gpr[gpr::RSP], KERNEL_STACK - 32);
    let words: Vec<u64> = (0..4).map(|i| m.peek(KERNEL_STACK - 32 + i * 8)).collect();
    assert_eq!(words, [USER + 3, 0x33, USER + 0x8000, 0x2B]);
    assert_eq!(m.state.rflags, before.rflags);
    m.run(&RETFQ).unwrap();
    assert_eq!((m.state.rip, m.state.cpl, m.state.gpr[gpr::RSP]), (USER + 3, 3, USER + 0x8000));
    assert_eq!((m.state.seg[seg::CS].selector, m.state.seg[seg::SS].selector), (0x33, 0x2B));
}

#[test]
fn without_a_change_of_level_two_words_are_pushed_and_a_jump_pushes_none() {
    let mut m = through(Machine::new(), 0);
    set_gate(&m, 0x10, 0, 1);
    let top = m.state.gpr[gpr::RSP];
    m.run(&CALL).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RSP]), (TARGET, top - 16));
    assert_eq!((m.peek(top - 16), m.peek(top - 8)), (USER + 3, 0x10));
    m.state.rip = USER;
    m.run(&JMP).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RSP]), (TARGET, top - 16));
    // A jump changes no privilege level.
    let mut m = through(Machine::new().user(), 3);
    set_gate(&m, 0x10, 3, 1);
    assert_eq!(raised(m.run(&JMP)), Exception::GeneralProtection { error: 0x10 });
}

#[test]
fn a_32_bit_caller_arrives_in_64_bit_code() {
    let mut m = through(Machine::new().user(), 3);
    set_gate(&m, 0x10, 3, 1);
    m.state.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, selector: 0x23, attributes: 0xCFB };
    m.state.seg[seg::DS] = Segment { base: 0, limit: u32::MAX, selector: 0x2B, attributes: 0xCF3 };
    // CALL FAR 0x63:0
    m.run(&[0x9A, 0, 0, 0, 0, 0x63, 0]).unwrap();
    assert!(m.state.is_64bit());
    assert_eq!((m.state.rip, m.peek(KERNEL_STACK - 32)), (TARGET, USER + 7));
}

#[test]
fn gates_are_checked() {
    let gp = |error| Exception::GeneralProtection { error };
    let attempt = |rpl, set: &dyn Fn(&Machine)| {
        let mut m = through(Machine::new().user(), rpl);
        set_gate(&m, 0x10, 3, 1);
        set(&m);
        let before = m.state.clone();
        let exception = raised(m.run(&CALL));
        assert!(m.state == before);
        exception
    };
    assert_eq!(attempt(0, &|m| set_gate(m, 0x10, 2, 1)), gp(0x60));
    assert_eq!(attempt(3, &|m| set_gate(m, 0x10, 3, 0)), Exception::SegmentNotPresent { error: 0x60 });
    assert_eq!(attempt(3, &|m| m.poke(GDT + GATE + 8, TARGET >> 32 | 1 << 40)), gp(0x60));
    assert_eq!(attempt(3, &|m| m.poke(GDT + GATE + 8, 0x8000)), gp(0));
    assert_eq!(attempt(3, &|m| set_gate(m, 0, 3, 1)), gp(0));
    // Data, and 32-bit code.
    assert_eq!(attempt(3, &|m| set_gate(m, 0x18, 3, 1)), gp(0x18));
    assert_eq!(attempt(3, &|m| set_gate(m, 0x20, 3, 1)), gp(0x20));
    // The stack of the TSS is not there.
    assert_eq!(attempt(3, &|m| m.poke(TSS + 4, 1 << 63)), Exception::StackFault { error: 0 });
    assert!(matches!(attempt(3, &|m| m.poke(TSS + 4, HOLE + 8)), Exception::PageFault { .. }));
    // A 32-bit call gate is none in long mode, and neither is a task gate or a TSS.
    for kind in [4, 5, 9, 0xB] {
        let set = |m: &Machine| m.poke(GDT + GATE, 0x8000_6000_0000_0000 | kind << 40 | 0x10 << 16);
        assert_eq!(attempt(3, &set), gp(0x60), "type {kind}");
    }
}

#[test]
fn segments_on_the_way_out() {
    let null = |selector, base| Segment { base, selector, ..Segment::default() };
    let mut m = Machine::new().user();
    m.state.rflags = rflags::FIXED;
    m.run(&[0xCD, 0x80]).unwrap();
    for which in [seg::ES, seg::DS, seg::FS, seg::GS] {
        m.state.seg[which] = null(3, 0);
    }
    m.state.seg[seg::GS].base = 0x7000_1234_5678;
    m.run(&[0x48, 0xCF]).unwrap();
    assert_eq!(m.state.cpl, 3);
    for which in [seg::ES, seg::DS, seg::FS] {
        assert_eq!(m.state.seg[which], null(0, 0));
    }
    assert_eq!(m.state.seg[seg::GS], null(0, 0x7000_1234_5678));
    // What the outer level may not use becomes null, but for the base of FS and GS.
    m.run(&[0xCD, 0x80]).unwrap();
    let kernel = Segment { base: 0x1234, limit: u32::MAX, selector: 0x18, attributes: 0xC93 };
    (m.state.seg[seg::DS], m.state.seg[seg::GS]) = (kernel, kernel);
    m.run(&[0x48, 0xCF]).unwrap();
    assert_eq!((m.state.seg[seg::DS], m.state.seg[seg::GS]), (null(0, 0), null(0, 0x1234)));
    // Without a change of level nothing is dropped.
    m.state.seg[seg::DS] = null(2, 0);
    m.state.gpr[gpr::RSP] -= 40;
    let frame = m.state.gpr[gpr::RSP];
    for (i, word) in [USER, 0x33, 0x202, USER + 0x8000, 0x2B].into_iter().enumerate() {
        m.poke(frame + i as u64 * 8, word);
    }
    m.run(&[0x48, 0xCF]).unwrap();
    assert_eq!(m.state.seg[seg::DS], null(2, 0));
}
