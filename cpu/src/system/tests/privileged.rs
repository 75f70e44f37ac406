//! Privilege: system calls, interrupts, control registers, segments, the model's own instructions.

use super::*;
use crate::state::{control, gpr, rflags, seg};

#[test]
fn syscall_and_sysret() {
    let mut m = Machine::new().user();
    m.state.star = 0x0023_0010 << 32;
    m.state.lstar = HANDLER;
    m.state.sfmask = rflags::IF | rflags::TF;
    m.state.rflags = rflags::FIXED | rflags::IF | rflags::CF;
    m.run(&[0x0F, 0x05]).unwrap();
    assert_eq!((m.state.rip, m.state.cpl, m.state.gpr[gpr::RCX]), (HANDLER, 0, USER + 2));
    assert_eq!(m.state.rflags, rflags::FIXED | rflags::CF);
    assert_eq!((m.state.seg[seg::CS].selector, m.state.seg[seg::SS].selector), (0x10, 0x18));
    m.run(&[0x48, 0x0F, 0x07]).unwrap();
    assert_eq!((m.state.rip, m.state.cpl), (USER + 2, 3));
    assert_eq!((m.state.seg[seg::CS].selector, m.state.seg[seg::SS].selector), (0x33, 0x2B));
    assert_eq!(m.state.rflags, rflags::FIXED | rflags::IF | rflags::CF);
    m.state.efer &= !control::EFER_SCE;
    assert_eq!(raised(m.run(&[0x0F, 0x05])), Exception::InvalidOpcode);
}

#[test]
fn exception_from_user_mode_and_iret() {
    let mut m = Machine::new().user();
    m.state.rflags |= rflags::IF | rflags::TF;
    let before = m.state.clone();
    let fault = Exception::PageFault { address: HOLE + 8, error: 6 };
    deliver_exception(&mut m.state, fault, &mut m.sys).unwrap();
    assert_eq!((m.state.rip, m.state.cpl, m.state.cr2), (HANDLER + 14 * 16, 0, HOLE + 8));
    assert_eq!(m.state.rflags & (rflags::IF | rflags::TF), 0);
    let frame = KERNEL_STACK - 48;
    assert_eq!(m.state.gpr[gpr::RSP], frame);
    let words: Vec<u64> = (0..6).map(|i| m.peek(frame + i * 8)).collect();
    assert_eq!(words, [6, USER, 0x33, before.rflags | rflags::RF, USER + 0x8000, 0x2B]);
    m.state.gpr[gpr::RSP] += 8;
    m.run(&[0x48, 0xCF]).unwrap();
    assert_eq!(m.state.rflags, before.rflags | rflags::RF);
    m.state.rflags = before.rflags;
    m.state.cr2 = before.cr2;
    let mut expected = before;
    // The code segment's descriptor has become accessed; DS and ES of the kernel are gone.
    expected.seg[seg::CS].limit = u32::MAX;
    for which in [seg::ES, seg::DS, seg::FS, seg::GS] {
        expected.seg[which] = crate::state::Segment::default();
    }
    assert!(m.state == expected);
}

#[test]
fn interrupts_and_software_interrupts() {
    let mut m = Machine::new().user();
    deliver_interrupt(&mut m.state, 0x41, &mut m.sys).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RSP]), (HANDLER + 0x410, KERNEL_STACK - 40));
    assert_eq!(m.peek(KERNEL_STACK - 24) & rflags::RF, 0);

    let mut m = Machine::new().user();
    assert_eq!(raised(m.run(&[0xCD, 0x41])), Exception::GeneralProtection { error: 0x41 * 8 + 2 });
    m.run(&[0xCD, 0x80]).unwrap();
    assert_eq!(m.state.rip, HANDLER + 0x800);
    assert_eq!(m.peek(KERNEL_STACK - 40), USER + 2);
}

#[test]
fn double_and_triple_faults() {
    let mut m = Machine::new().user();
    // No stack for #PF; #DF has one of its own.
    m.poke(TSS + 4, HOLE + 0x1000);
    let fault = Exception::PageFault { address: 0x77, error: 4 };
    deliver_exception(&mut m.state, fault, &mut m.sys).unwrap();
    assert_eq!(m.state.rip, HANDLER + 8 * 16);
    assert_eq!(m.state.gpr[gpr::RSP], KERNEL_STACK + 0x8000 - 48);
    assert_eq!(m.peek(m.state.gpr[gpr::RSP]), 0);
    assert_eq!(m.state.cr2, HOLE + 0x1000 - 48);

    let mut m = Machine::new();
    m.state.idtr.limit = 0;
    assert_eq!(deliver_exception(&mut m.state, Exception::InvalidOpcode, &mut m.sys), Err(TripleFault));
}

#[test]
fn interrupt_flag_and_shadow() {
    let mut m = Machine::new();
    m.run(&[0xFB]).unwrap();
    assert!(m.state.interrupt_shadow && m.state.rflags & rflags::IF != 0);
    m.run(&[0xFB]).unwrap();
    assert!(!m.state.interrupt_shadow);
    m.state.gpr[gpr::RAX] = 0x18;
    m.run(&[0x8E, 0xD0]).unwrap();
    assert!(m.state.interrupt_shadow);
    m.run(&[0xFA]).unwrap();
    assert!(!m.state.interrupt_shadow && m.state.rflags & rflags::IF == 0);
    let mut m = Machine::new().user();
    assert_eq!(raised(m.run(&[0xFA])), Exception::GP0);
    assert_eq!(raised(m.run(&[0xF4])), Exception::GP0);
    // POPF in user mode changes neither IF nor IOPL.
    m.state.gpr[gpr::RSP] = USER + 0x100;
    m.poke(USER + 0x100, u64::MAX);
    m.run(&[0x9D]).unwrap();
    assert_eq!(m.state.rflags & (rflags::IF | rflags::IOPL | rflags::VM | rflags::RF), 0);
    assert_eq!(m.state.rflags & rflags::AC, rflags::AC);
}

#[test]
fn control_registers() {
    let mut m = Machine::new();
    let set = |m: &mut Machine, value: u64| m.state.gpr[gpr::RAX] = value;
    set(&mut m, PML4);
    m.run(&[0x0F, 0x22, 0xD8]).unwrap();
    assert_eq!(m.sys.flushes, [Flush::AddressSpace { pcid: 0, keep: false }]);
    let cr4 = m.state.cr4 | control::CR4_PCIDE;
    set(&mut m, cr4);
    m.run(&[0x0F, 0x22, 0xE0]).unwrap();
    set(&mut m, 1 << 63 | PML4 | 7);
    m.run(&[0x0F, 0x22, 0xD8]).unwrap();
    assert_eq!(m.sys.flushes.last(), Some(&Flush::AddressSpace { pcid: 7, keep: true }));
    assert_eq!(m.state.cr3, PML4 | 7);
    // Paging cannot be left from 64-bit mode, nor PAE from long mode; unknown bits are refused.
    set(&mut m, control::CR0_PE);
    assert_eq!(raised(m.run(&[0x0F, 0x22, 0xC0])), Exception::GP0);
    set(&mut m, cr4 & !control::CR4_PAE);
    assert_eq!(raised(m.run(&[0x0F, 0x22, 0xE0])), Exception::GP0);
    set(&mut m, cr4 | 1 << 12);
    assert_eq!(raised(m.run(&[0x0F, 0x22, 0xE0])), Exception::GP0);
    let mut m = m.user();
    assert_eq!(raised(m.run(&[0x0F, 0x20, 0xC0])), Exception::GP0);
}

#[test]
fn leaves_and_enters_long_mode_through_32_bit_code() {
    let mut m = Machine::new();
    m.poke(GDT + 0x60, 0x00CF_9B00_0000_FFFF);
    // Far return into 32-bit code.
    m.state.gpr[gpr::RSP] = 0x12_0000;
    m.poke(0x12_0000, 0x13_0000);
    m.poke(0x12_0008, 0x60);
    m.run(&[0x48, 0xCB]).unwrap();
    assert!(!m.state.is_64bit() && m.state.rip == 0x13_0000 && m.state.gpr[gpr::RSP] == 0x12_0010);
    // Paging off, EFER.LME again, paging on.
    m.state.gpr[gpr::RAX] = m.state.cr0 & !control::CR0_PG;
    m.run(&[0x0F, 0x22, 0xC0]).unwrap();
    assert_eq!(m.state.efer & control::EFER_LMA, 0);
    m.state.gpr[gpr::RCX] = 0xC000_0080;
    m.run(&[0x0F, 0x32]).unwrap();
    m.state.gpr[gpr::RAX] |= control::EFER_LME;
    m.run(&[0x0F, 0x30]).unwrap();
    m.state.gpr[gpr::RAX] = m.state.cr0 | control::CR0_PG;
    m.run(&[0x0F, 0x22, 0xC0]).unwrap();
    assert!(m.state.efer & control::EFER_LMA != 0 && !m.state.is_64bit());
    // Back by a far return of 32-bit operand size.
    m.poke(0x12_0010, 0x10 << 32 | 0x14_0000);
    m.run(&[0xCB]).unwrap();
    assert!(m.state.is_64bit() && m.state.rip == 0x14_0000);
    assert_eq!(m.state.gpr[gpr::RSP], 0x12_0018);
}

#[test]
fn segment_loads() {
    let mut m = Machine::new();
    let load = |m: &mut Machine, selector: u64, code: &[u8]| {
        m.state.gpr[gpr::RAX] = selector;
        m.run(code)
    };
    let (ds, ss, fs) = ([0x8E, 0xD8], [0x8E, 0xD0], [0x8E, 0xE0]);
    load(&mut m, 0x28, &ds).unwrap();
    assert_eq!(m.state.seg[seg::DS].attributes, 0xCF3);
    assert_eq!(raised(load(&mut m, 0x28, &ss)), Exception::GeneralProtection { error: 0x28 });
    assert_eq!(raised(load(&mut m, 0x100, &ds)), Exception::GeneralProtection { error: 0x100 });
    assert_eq!(raised(load(&mut m, 0x58, &ds)), Exception::SegmentNotPresent { error: 0x58 });
    assert_eq!(raised(load(&mut m, 0x58, &ss)), Exception::StackFault { error: 0x58 });
    assert_eq!(raised(load(&mut m, 0x40, &ds)), Exception::GeneralProtection { error: 0x40 });
    m.state.seg[seg::FS].base = 0x1234;
    load(&mut m, 0, &fs).unwrap();
    assert_eq!(m.state.seg[seg::FS], crate::state::Segment::default());
    load(&mut m, 0, &ss).unwrap();
    // The descriptor of the 64-bit user code segment becomes accessed when it is loaded.
    load(&mut m, 0x30, &ds).unwrap();
    assert_eq!(m.peek(GDT + 0x30) >> 40 & 1, 1);
    // The busy TSS cannot be loaded twice.
    assert_eq!(raised(load(&mut m, 0x40, &[0x0F, 0x00, 0xD8])), Exception::GeneralProtection { error: 0x40 });
    let mut m = m.user();
    assert_eq!(raised(load(&mut m, 0x18, &ds)), Exception::GeneralProtection { error: 0x18 });
    // LAR and LSL report instead of faulting.
    m.state.gpr[gpr::RCX] = 0x28;
    m.run(&[0x0F, 0x02, 0xC1]).unwrap();
    assert_eq!((m.state.gpr[gpr::RAX], m.state.rflags & rflags::ZF), (0x00CF_F300, rflags::ZF));
    m.run(&[0x0F, 0x03, 0xC1]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 0xFFFF_FFFF);
    m.state.gpr[gpr::RCX] = 0x18;
    m.run(&[0x0F, 0x02, 0xC1]).unwrap();
    assert_eq!(m.state.rflags & rflags::ZF, 0);
}

#[test]
fn model_instructions() {
    let mut m = Machine::new();
    m.state.gpr[gpr::RAX] = 1;
    m.run(&[0x0F, 0xA2]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 0xF_0601);
    m.run(&[0x0F, 0x31]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 3000);
    // WRMSR to the TSC moves TSC_ADJUST too.
    (m.state.gpr[gpr::RCX], m.state.gpr[gpr::RAX], m.state.gpr[gpr::RDX]) = (0x10, 5000, 0);
    m.run(&[0x0F, 0x30]).unwrap();
    m.state.gpr[gpr::RCX] = 0x3B;
    m.run(&[0x0F, 0x32]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 2000);
    m.state.gpr[gpr::RCX] = 0xC001_0015;
    assert_eq!(raised(m.run(&[0x0F, 0x32])), Exception::GP0);
    m.run(&[0x48, 0x0F, 0xC7, 0xF0]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 6364136223846793006);
    assert_eq!(m.state.rflags & rflags::STATUS, rflags::CF);
    assert_eq!(raised(m.run(&[0x0F, 0x01, 0xC8])), Exception::InvalidOpcode);
    assert_eq!(raised(m.run(&[0x0F, 0x0B])), Exception::InvalidOpcode);
}

#[test]
fn debug_exceptions_replace_the_breakpoint_bits_and_add_to_the_others() {
    let mut m = Machine::new();
    m.state.dr[6] = 0xFFFF_4FF2;
    deliver_exception(&mut m.state, Exception::Debug { dr6: 4 }, &mut m.sys).unwrap();
    assert_eq!(m.state.dr[6], 0xFFFF_4FF4);
}

#[test]
fn an_nmi_blocks_others_until_iret() {
    let mut m = Machine::new();
    let rsp = m.state.gpr[gpr::RSP];
    deliver_nmi(&mut m.state, &mut m.sys).unwrap();
    assert_eq!((m.state.rip, m.state.nmi_blocked), (HANDLER + 2 * 16, true));
    m.run(&[0x48, 0xCF]).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RSP], m.state.nmi_blocked), (USER, rsp, false));
}

#[test]
fn cpuid_has_an_apic_while_it_is_enabled() {
    for (base, flag) in [(0xFEE0_0900, 1), (0xFEE0_0100, 0)] {
        let mut m = Machine::new();
        m.sys.ports.apic_base = base;
        m.state.gpr[gpr::RAX] = 1;
        m.run(&[0x0F, 0xA2]).unwrap();
        assert_eq!(m.state.gpr[gpr::RDX] >> 9 & 1, flag);
    }
}
