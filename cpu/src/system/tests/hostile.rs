//! Random instructions with random registers: whatever a guest executes, the emulation returns.

use super::*;
use crate::state::{Segment, control, gpr, rflags, seg};

/// xorshift64*, seeded by the test.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Mostly addresses of RAM, sometimes borders and garbage.
    fn value(&mut self) -> u64 {
        let value = self.next();
        match value % 8 {
            0 => value,
            1 => (1 << 47) - value % 17,
            2 => u64::MAX - value % 33,
            3 => 0xFFFF_FFFF - value % 9,
            4 => value % 0x80,
            _ => USER + value % 0x18_0000,
        }
    }
}

fn random_state(m: &mut Machine, random: &mut Random) {
    for register in 0..16 {
        m.state.gpr[register] = random.value();
    }
    // Short enough that byte-wise test memory keeps up.
    m.state.gpr[gpr::RCX] %= 300;
    m.state.rflags = random.next() & 0x24_7FD5 & !rflags::NT | rflags::FIXED;
    m.state.cr4 |= control::CR4_OSFXSR | control::CR4_OSXSAVE | control::CR4_FSGSBASE;
    m.state.xcr0 = 7;
    m.state.seg[seg::FS].base = random.value();
    for byte in m.state.fpu.0[160..416].iter_mut() {
        *byte = random.next() as u8;
    }
}

fn compatibility(m: &mut Machine) {
    let dpl = u16::from(m.state.cpl) << 5;
    let flat = |selector, attributes| Segment { base: 0, limit: u32::MAX, selector, attributes: attributes | dpl };
    m.state.seg[seg::CS] = flat(0x20 | u16::from(m.state.cpl), 0xC9B);
    m.state.seg[seg::SS] = flat(0x28 | u16::from(m.state.cpl), 0xC93);
    m.state.seg[seg::DS] = Segment { base: USER, limit: 0xFFFF, selector: 0x28, attributes: 0x4F3 };
    m.state.seg[seg::ES] = Segment { base: 0, limit: 0xFFF, selector: 0x28, attributes: 0x4F7 };
}

#[test]
fn random_instructions_do_not_panic() {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let (mut retired, mut faulted) = (0, 0);
    for round in 0..60 {
        let mut m = Machine::new();
        if round % 3 != 0 {
            m = m.user();
        }
        for _ in 0..500 {
            let saved = (m.state.cr0, m.state.cr3, m.state.cr4, m.state.efer);
            random_state(&mut m, &mut random);
            if round % 2 == 1 {
                compatibility(&mut m);
            }
            m.sys.slow = random.next().is_multiple_of(4);
            let mut code = [0u8; 15];
            for byte in &mut code {
                *byte = random.next() as u8;
            }
            // Half of them from the two-byte map, where most of what is emulated lives.
            if random.next().is_multiple_of(2) {
                code[0] = 0x0F;
            }
            let bitness = if m.state.is_64bit() { 64 } else { 32 };
            let instr = Decoder::with_ip(bitness, &code, 0, DecoderOptions::NONE).decode();
            let state_before = (m.state.cpl, m.state.seg, m.state.idtr, m.state.gdtr, m.state.ldtr, m.state.tr);
            match execute(&mut m.state, &instr, &mut m.sys) {
                Ok(_) => retired += 1,
                Err(ExecError::Exception(exception)) => {
                    faulted += 1;
                    let _ = deliver_exception(&mut m.state, exception, &mut m.sys);
                }
                Err(ExecError::Unsupported(_)) => {}
            }
            (m.state.cr0, m.state.cr3, m.state.cr4, m.state.efer) = saved;
            (m.state.cpl, m.state.seg, m.state.idtr, m.state.gdtr, m.state.ldtr, m.state.tr) = state_before;
            m.state.rip = USER;
            m.state.halted = false;
        }
    }
    assert!(retired > 1000 && faulted > 1000, "{retired} retired, {faulted} faulted");
}
