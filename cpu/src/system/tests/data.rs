//! Strings, ports, vector state, masked accesses, addresses.

use super::*;
use crate::paging::fault;
use crate::state::{control, gpr, rflags, seg};

#[test]
fn rep_movs_and_stos() {
    for slow in [false, true] {
        let mut m = Machine::new().user();
        m.sys.slow = slow;
        let data: Vec<u8> = (0..10_000).map(|i| (i * 31 % 251) as u8).collect();
        m.fill(USER + 0x1_0001, &data);
        m.state.gpr[gpr::RSI] = USER + 0x1_0001;
        m.state.gpr[gpr::RDI] = USER + 0x2_0F03;
        m.state.gpr[gpr::RCX] = 1250;
        m.run(&[0xF3, 0x48, 0xA5]).unwrap();
        assert_eq!(m.bytes(USER + 0x2_0F03, 10_000), data);
        assert_eq!((m.state.gpr[gpr::RCX], m.state.gpr[gpr::RSI]), (0, USER + 0x1_0001 + 10_000));
        assert_eq!(m.state.rip, USER + 3);
        // Overlapping by one byte: fills.
        m.state.gpr[gpr::RSI] = USER + 0x1_0001;
        m.state.gpr[gpr::RDI] = USER + 0x1_0002;
        m.state.gpr[gpr::RCX] = 9_999;
        m.run(&[0xF3, 0xA4]).unwrap();
        assert!(m.bytes(USER + 0x1_0001, 10_000).iter().all(|byte| *byte == data[0]));
        // Backward.
        m.fill(USER + 0x1_0000, &data);
        m.state.rflags |= rflags::DF;
        m.state.gpr[gpr::RSI] = USER + 0x1_0000 + 9_996;
        m.state.gpr[gpr::RDI] = USER + 0x1_0000 + 9_998;
        m.state.gpr[gpr::RCX] = 2500;
        m.run(&[0xF3, 0xA5]).unwrap();
        let mut expected = data.clone();
        for i in (0..2500).rev() {
            let element = expected[i * 4..i * 4 + 4].to_vec();
            expected.resize(10_002, 0);
            expected[i * 4 + 2..i * 4 + 6].copy_from_slice(&element);
        }
        assert_eq!(m.bytes(USER + 0x1_0000, 9_998), expected[..9_998]);
        m.state.rflags &= !rflags::DF;
        // STOSW over page borders with an odd address.
        m.state.gpr[gpr::RAX] = 0x1234;
        m.state.gpr[gpr::RDI] = USER + 0x4_0FFF;
        m.state.gpr[gpr::RCX] = 3000;
        m.run(&[0xF3, 0x66, 0xAB]).unwrap();
        assert!(m.bytes(USER + 0x4_0FFF, 6000).chunks(2).all(|pair| pair == [0x34, 0x12]));
        assert_eq!(m.bytes(USER + 0x4_0FFF + 6000, 1), [0]);
    }
}

#[test]
fn rep_stops_at_a_fault_and_goes_on() {
    let mut m = Machine::new().user();
    m.state.gpr[gpr::RDI] = HOLE - 100;
    m.state.gpr[gpr::RCX] = 200;
    m.state.gpr[gpr::RAX] = 0x5A;
    let fault = Exception::PageFault { address: HOLE, error: fault::WRITE | fault::USER };
    assert_eq!(raised(m.run(&[0xF3, 0xAA])), fault);
    assert_eq!((m.state.gpr[gpr::RDI], m.state.gpr[gpr::RCX]), (HOLE, 100));
    m.poke(0x5000 + 0x100 * 8, HOLE | 7);
    m.run(&[0xF3, 0xAA]).unwrap();
    assert_eq!((m.state.gpr[gpr::RDI], m.state.gpr[gpr::RCX]), (HOLE + 100, 0));
    assert!(m.bytes(HOLE - 100, 200).iter().all(|byte| *byte == 0x5A));
}

#[test]
fn rep_compare_and_scan() {
    for slow in [false, true] {
        let mut m = Machine::new().user();
        m.sys.slow = slow;
        let mut text = vec![b'a'; 9000];
        m.fill(USER + 0x1_0000, &text);
        text[8500] = b'b';
        m.fill(USER + 0x2_0010, &text);
        m.state.gpr[gpr::RSI] = USER + 0x1_0000;
        m.state.gpr[gpr::RDI] = USER + 0x2_0010;
        m.state.gpr[gpr::RCX] = 9000;
        m.run(&[0xF3, 0xA6]).unwrap();
        assert_eq!(m.state.gpr[gpr::RCX], 9000 - 8501);
        assert_eq!(m.state.rflags & (rflags::ZF | rflags::CF), rflags::CF);
        // REPNE SCASB finds it too.
        m.state.gpr[gpr::RAX] = u64::from(b'b');
        m.state.gpr[gpr::RDI] = USER + 0x2_0010;
        m.state.gpr[gpr::RCX] = u64::MAX;
        m.run(&[0xF2, 0xAE]).unwrap();
        assert_eq!(m.state.gpr[gpr::RDI], USER + 0x2_0010 + 8501);
        assert_eq!(m.state.rflags & rflags::ZF, rflags::ZF);
        // A count of zero leaves the flags alone.
        m.state.gpr[gpr::RCX] = 0;
        m.run(&[0xF3, 0xA6]).unwrap();
        assert_eq!(m.state.rflags & rflags::ZF, rflags::ZF);
    }
}

#[test]
fn ports_and_permission() {
    let mut m = Machine::new();
    m.state.gpr[gpr::RAX] = 0x1122_3344;
    m.run(&[0xE6, 0x80]).unwrap();
    assert_eq!(m.sys.ports.written, [(0x80, 0x44)]);
    m.state.gpr[gpr::RDX] = 0x3F8;
    m.run(&[0xED]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 0xAB00_03F8);
    let mut m = m.user();
    assert_eq!(raised(m.run(&[0xEC])), Exception::GP0);
    m.state.rflags |= rflags::IOPL;
    m.run(&[0xEC]).unwrap();
}

#[test]
fn xsave_round_trip_and_checks() {
    let mut m = Machine::new().user();
    m.state.cr4 |= control::CR4_OSXSAVE | control::CR4_OSFXSR;
    m.state.xcr0 = 7;
    for (i, byte) in m.state.fpu.0[160..416].iter_mut().enumerate() {
        *byte = i as u8;
    }
    m.state.fpu.0[576..].fill(0x77);
    let saved = m.state.fpu;
    (m.state.gpr[gpr::RAX], m.state.gpr[gpr::RDX], m.state.gpr[gpr::RDI]) = (7, 0, USER + 0x1000);
    m.run(&[0x48, 0x0F, 0xAE, 0x27]).unwrap();
    assert_eq!(m.peek(USER + 0x1000 + 512), 7);
    m.state.fpu = crate::model::initial_fpu();
    m.run(&[0x48, 0x0F, 0xAE, 0x2F]).unwrap();
    assert!(m.state.fpu == saved);
    // Components that are not in XSTATE_BV are initialised.
    m.poke(USER + 0x1000 + 512, 3);
    m.run(&[0x48, 0x0F, 0xAE, 0x2F]).unwrap();
    assert!(m.state.fpu.0[576..].iter().all(|byte| *byte == 0));
    // Unknown components, the compacted format, reserved bits of MXCSR, alignment.
    m.poke(USER + 0x1000 + 512, 8);
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x2F])), Exception::GP0);
    m.poke(USER + 0x1000 + 512, 7);
    m.poke(USER + 0x1000 + 520, 1 << 63);
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x2F])), Exception::GP0);
    m.poke(USER + 0x1000 + 520, 0);
    m.poke(USER + 0x1000 + 24, 0xFFFF_0001_1F80);
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x2F])), Exception::GP0);
    m.state.gpr[gpr::RDI] += 16;
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x27])), Exception::GP0);
    m.state.cr0 |= control::CR0_TS;
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x27])), Exception::DeviceNotAvailable);
}

#[test]
fn x87_environment() {
    let mut m = Machine::new().user();
    // TOP = 6: ST0 = 1.0 and ST1 = 0.0 are physical 6 and 7.
    m.state.fpu.0[3] = 6 << 3;
    m.state.fpu.0[4] = 0xC0;
    m.state.fpu.0[39] = 0x80;
    m.state.fpu.0[40..42].copy_from_slice(&0x3FFFu16.to_le_bytes());
    m.state.gpr[gpr::RDI] = USER + 0x1000;
    let before = m.state.fpu;
    m.run(&[0xDD, 0x37]).unwrap();
    assert_eq!(m.peek(USER + 0x1008) as u16, 0x4FFF);
    assert!(m.state.fpu.0[4] == 0 && m.state.fpu.0[3] == 0);
    m.run(&[0xDD, 0x27]).unwrap();
    assert!(m.state.fpu == before);
}

#[test]
fn masked_accesses() {
    let mut m = Machine::new().user();
    m.state.cr4 |= control::CR4_OSXSAVE | control::CR4_OSFXSR;
    m.state.xcr0 = 7;
    // VPMASKMOVD xmm0, xmm1, [rdi]: element 1 lies in the hole and is masked out.
    m.state.gpr[gpr::RDI] = HOLE - 4;
    m.poke(HOLE - 8, 0x0BAD_CAFE_0000_0000);
    m.state.fpu.0[176..192].fill(0);
    m.state.fpu.0[179] = 0x80;
    m.state.fpu.0[576..592].fill(9);
    m.run(&[0xC4, 0xE2, 0x71, 0x8C, 0x07]).unwrap();
    assert_eq!(m.state.fpu.0[160..176], [0xFE, 0xCA, 0xAD, 0x0B, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(m.state.fpu.0[576..592], [0; 16]);
    // VPGATHERDD xmm0, [rdi + xmm2*4], xmm1: the second element faults, the first is done.
    m.state.fpu.0[176..192].fill(0xFF);
    m.state.fpu.0[192..208].fill(0);
    m.state.fpu.0[196] = 1;
    let fault = Exception::PageFault { address: HOLE, error: fault::USER };
    assert_eq!(raised(m.run(&[0xC4, 0xE2, 0x71, 0x90, 0x04, 0x97])), fault);
    assert_eq!(m.state.fpu.0[176..184], [0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF]);
    m.state.fpu.0[196] = 0;
    m.run(&[0xC4, 0xE2, 0x71, 0x90, 0x04, 0x97]).unwrap();
    assert_eq!(m.state.fpu.0[160..176], [0xFE, 0xCA, 0xAD, 0x0B].repeat(4)[..]);
    assert_eq!(m.state.fpu.0[176..192], [0; 16]);
}

#[test]
fn addresses() {
    let mut m = Machine::new().user();
    // Stack-segment accesses to a non-canonical address are #SS, others #GP.
    m.state.gpr[gpr::RBP] = 1 << 47;
    assert_eq!(raised(m.run(&[0x0F, 0xAE, 0x5D, 0x00])), Exception::InvalidOpcode);
    m.state.cr4 |= control::CR4_OSFXSR;
    assert_eq!(raised(m.run(&[0x0F, 0xAE, 0x5D, 0x00])), Exception::StackFault { error: 0 });
    m.state.gpr[gpr::RDI] = (1 << 47) - 3;
    assert_eq!(raised(m.run(&[0x0F, 0xAE, 0x1F])), Exception::GP0);
    // RIP-relative operands are relative to where the instruction is, not to where it was decoded.
    m.run(&[0x0F, 0xAE, 0x1D, 0x10, 0, 0, 0]).unwrap();
    assert_eq!(m.peek(USER + 7 + 0x10) as u32, 0x1F80);
    // FS base, and a 32-bit address that wraps.
    m.state.rip = USER;
    m.state.seg[seg::FS].base = USER + 0x100;
    m.state.gpr[gpr::RDI] = 0xFFFF_FFFF_FFFF_FFF8;
    m.state.gpr[gpr::RSI] = 0x10;
    m.run(&[0x64, 0x67, 0x0F, 0xAE, 0x1C, 0x37]).unwrap();
    assert_eq!(m.peek(USER + 0x108) as u32, 0x1F80);
}

#[test]
fn ordinary_instructions_in_segments_that_are_not_flat() {
    let mut m = Machine::new().user();
    m.state.seg[seg::CS] = crate::state::Segment { base: 0, limit: u32::MAX, selector: 0x23, attributes: 0xCFB };
    m.state.seg[seg::DS] =
        crate::state::Segment { base: USER + 0x1000, limit: 0xFF, selector: 0x2B, attributes: 0x4F3 };
    m.state.gpr[gpr::RBX] = 0x10;
    m.state.gpr[gpr::RAX] = 0xFFFF_FFFF_0000_0005;
    // ADD [EBX], EAX; then CALL, RET, LOOP.
    m.poke(USER + 0x1010, 0xFFFF_FFFE);
    m.run(&[0x01, 0x03]).unwrap();
    assert_eq!((m.peek(USER + 0x1010), m.state.rflags & rflags::STATUS), (3, rflags::CF | rflags::PF | rflags::AF));
    m.state.gpr[gpr::RBX] = 0xFD;
    assert_eq!(raised(m.run(&[0x01, 0x03])), Exception::GP0);
    m.state.gpr[gpr::RSP] = USER + 0x8000;
    m.run(&[0xE8, 0xFB, 0x0F, 0, 0]).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RSP]), (USER + 2 + 0x1000, USER + 0x7FFC));
    m.run(&[0xC3]).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RSP]), (USER + 7, USER + 0x8000));
    m.state.gpr[gpr::RCX] = 2;
    m.run(&[0xE2, 0xFE]).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RCX]), (USER + 7, 1));
    m.run(&[0xE2, 0xFE]).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RCX]), (USER + 9, 0));
    m.run(&[0x0F, 0xBA, 0xE8, 0x1F]).unwrap();
    assert_eq!((m.state.gpr[gpr::RAX], m.state.rflags & rflags::CF), (0x8000_0005, 0));
}
