//! Real-address mode.

use super::*;
use crate::state::{Segment, TableRegister, gpr, rflags, seg};

const STACK: u64 = 0x7000;

/// A vCPU in real-address mode at 0x200:0x10, its stack at 0:STACK.
fn real() -> Machine {
    let mut m = Machine::new();
    m.state.cr0 = control::CR0_ET;
    (m.state.efer, m.state.cr4) = (0, 0);
    m.state.rflags = rflags::FIXED | rflags::IF;
    for (which, selector) in [(seg::CS, 0x200), (seg::SS, 0), (seg::DS, 0x300), (seg::ES, 0)] {
        let attributes = if which == seg::CS { 0x9B } else { 0x93 };
        m.state.seg[which] = Segment { base: u64::from(selector) << 4, limit: 0xFFFF, selector, attributes };
    }
    m.state.gpr[gpr::RSP] = 0xABCD_0000 | STACK;
    m.state.rip = 0x10;
    m.state.idtr = TableRegister { base: 0, limit: 0x3FF };
    m
}

fn run(m: &mut Machine, code: &[u8]) -> Executed {
    let instr = Decoder::with_ip(16, code, 0, DecoderOptions::NONE).decode();
    assert_eq!(instr.len(), code.len(), "one whole instruction");
    execute(&mut m.state, &instr, &mut m.sys)
}

fn words(m: &Machine, count: u64) -> Vec<u16> {
    (0..count).map(|i| m.peek((m.state.gpr[gpr::RSP] & 0xFFFF) + 2 * i) as u16).collect()
}

fn place(m: &Machine) -> (u16, u64, u64) {
    (m.state.seg[seg::CS].selector, m.state.seg[seg::CS].base, m.state.rip)
}

#[test]
fn far_calls_and_returns() {
    let mut m = real();
    // CALL 0x1234:0x5678
    run(&mut m, &[0x9A, 0x78, 0x56, 0x34, 0x12]).unwrap();
    assert_eq!(place(&m), (0x1234, 0x1_2340, 0x5678));
    assert_eq!(m.state.gpr[gpr::RSP], 0xABCD_0000 | (STACK - 4));
    assert_eq!(words(&m, 2), [0x15, 0x200]);
    // RETF 2
    run(&mut m, &[0xCA, 2, 0]).unwrap();
    assert_eq!(place(&m), (0x200, 0x2000, 0x15));
    assert_eq!(m.state.gpr[gpr::RSP], 0xABCD_0000 | (STACK + 2));
    // JMP FAR [0x40], 32-bit operand: the offset is beyond the segment's limit.
    m.poke(0x3040, 0x0100_0001_0000);
    assert_eq!(raised(run(&mut m, &[0x66, 0xFF, 0x2E, 0x40, 0])), Exception::GP0);
    m.poke(0x3040, 0x0100_0000_FFFF);
    run(&mut m, &[0x66, 0xFF, 0x2E, 0x40, 0]).unwrap();
    assert_eq!(place(&m), (0x100, 0x1000, 0xFFFF));
}

#[test]
fn interrupts_go_through_the_vector_table() {
    let mut m = real();
    m.poke(0x21 * 4, 0x0400_0055);
    run(&mut m, &[0xCD, 0x21]).unwrap();
    assert_eq!(place(&m), (0x400, 0x4000, 0x55));
    assert_eq!(words(&m, 3), [0x12, 0x200, 0x202]);
    assert_eq!(m.state.rflags & rflags::IF, 0);
    // IRET
    run(&mut m, &[0xCF]).unwrap();
    assert_eq!((place(&m), m.state.gpr[gpr::RSP] & 0xFFFF), ((0x200, 0x2000, 0x12), STACK));
    assert_ne!(m.state.rflags & rflags::IF, 0);
    // Exceptions push no error code and come back to the instruction.
    m.poke(13 * 4, 0x0500_0066);
    deliver_exception(&mut m.state, Exception::GP0, &mut m.sys).unwrap();
    assert_eq!((place(&m), words(&m, 2)), ((0x500, 0x5000, 0x66), vec![0x12, 0x200]));
    // A table too short for #GP, but not for the double fault.
    m.state.idtr.limit = 13 * 4 + 2;
    m.poke(8 * 4, 0x0600_0077);
    deliver_exception(&mut m.state, Exception::GP0, &mut m.sys).unwrap();
    assert_eq!(place(&m), (0x600, 0x6000, 0x77));
    m.state.idtr.limit = 0;
    assert_eq!(deliver_interrupt(&mut m.state, 0x21, &mut m.sys), Err(TripleFault));
}
