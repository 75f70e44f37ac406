//! Cases in which the engine once differed from the host.

use iced_x86::Decoder;

use crate::campaign::Campaign;
use crate::case::{CODE, Case, DATA, Registers, STACK};
use crate::generate::ALIGNMENT_CHECK;

/// A case: bits, what it is about, machine code, and the registers it needs.
type Entry = (u32, &'static str, &'static [u8], fn(&mut Registers));

const RCX: usize = 1;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

/// Unmapped behind it.
const END: u64 = 0x2000_6000;

fn checked(r: &mut Registers) {
    r.rflags |= ALIGNMENT_CHECK;
}

const CASES: &[Entry] = &[
    (64, "XSAVE of nothing but its header, which lies in an absent page, is a write", b"\x48\x0f\xae\x26", |r| {
        r.gpr[RSI] = END - 512;
    }),
    (64, "XSAVE from a read-only page into one that is not", b"\x48\x0f\xae\x26", |r| {
        r.gpr[0] = 7;
        r.gpr[RSI] = 0x2000_4E00;
    }),
    (
        64,
        "AMD's mask of misaligned exceptions, loaded and gone again, is no difference",
        b"\x68\x80\x1f\x02\0\x0f\xae\x14\x24\x68\x80\x1f\0\0\x0f\xae\x14\x24",
        |_| {},
    ),
    (64, "elements at 4 GiB with a 32-bit address, of which processors differ", b"\x67\xc4\xe2\x6d\x8e\x16", |r| {
        r.gpr[RSI] = 0xFFFF_FFF8;
        r.fpu.0[576 + 2 * 16..][..16].fill(0x80);
    }),
    (64, "MASKMOVDQU that selects nothing, where nothing is", b"\x66\x0f\xf7\xc1", |r| r.gpr[RDI] = END),
    (64, "MASKMOVQ likewise", b"\x0f\xf7\xc1", |r| r.gpr[RDI] = END),
    (64, "an image there", b"\x67\x0f\xae\x0e", |r| r.gpr[RSI] = 0xFFFF_FE10),
    (64, "an offset that is not canonical, of FS, with alignment checks", b"\x64\x4f\x0f\xb3\x54\xfa\x55", |r| {
        checked(r);
        r.gpr[10] = 0xFFFF_89B1_91BC_5E06;
        r.gpr[15] = 0x199;
        r.fs_gs_base[0] = 0x764E_8E43_A4DB;
    }),
    (64, "a branch to itself retires every time", b"\xe8\0\0\0\0\xc2\0\0", |_| {}),
    (64, "a shift count beyond 16 of a 16-bit double shift", b"\x66\x0f\xa4\xf7\x13", |r| {
        r.gpr[RSI] = 0x1234_5678;
        r.gpr[RDI] = 0x9ABC_DEF0;
    }),
    (64, "the same to the right, by CL", b"\x66\x0f\xad\xf7", |r| {
        r.gpr[RCX] = 29;
        r.gpr[RSI] = 0x1234_5678;
        r.gpr[RDI] = 0x9ABC_DEF0;
    }),
    (64, "#AC: a doubleword", b"\x8b\x46\x02", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "#AC by POPFQ, then a push", b"\x9d\x50\x9c\x66\x50\x50", |r| r.gpr[RSP] = STACK.start + 0x800),
    (64, "16 bytes are enough for 32", b"\xc5\xfc\x10\x4e\x10", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "#AC: not 16", b"\xc5\xfc\x10\x4e\x08", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "#GP of MOVAPS comes before #AC", b"\x0f\x28\x46\x08", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "#AC comes before #PF", b"\x8b\x06", |r| {
        checked(r);
        r.gpr[RSI] = END + 1;
    }),
    (64, "#GP of an address comes before #AC", b"\x8b\x06", |r| {
        checked(r);
        r.gpr[RSI] = (1 << 47) - 1;
    }),
    (64, "#GP of FXSAVE", b"\x0f\xae\x46\x0c", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "MASKMOVDQU stores two quadwords", b"\x66\x0f\xf7\xc1", |r| {
        checked(r);
        r.gpr[RDI] = DATA.start + 8;
    }),
    (64, "#AC of FXSAVE", b"\x0f\xae\x46\x0a", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "#AC of words in the x87 environment", b"\x66\xd9\x76\x01", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "#AC of an extended real", b"\xdb\x6e\x04", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "#AC of ENTER's last stack pointer", b"\xc8\x41\0\0", |r| {
        checked(r);
        r.gpr[RSP] = STACK.start + 0x800;
    }),
    (64, "gathers and VMASKMOV are not checked", b"\xc4\xe2\x71\x2e\x56\x02", |r| {
        checked(r);
        r.gpr[RSI] = DATA.start;
    }),
    (64, "#AC of strings, in the middle of a page", b"\xf3\xa5", |r| {
        checked(r);
        r.gpr[RCX] = 4;
        r.gpr[RSI] = DATA.start;
        r.gpr[RDI] = DATA.start + 0x102;
    }),
    (32, "a pending x87 error comes before a write to CS", b"\x2e\xdf\x1e", |r| {
        r.gpr[RSI] = DATA.start;
        r.fpu.0[0..4].copy_from_slice(&[0x5C, 0x03, 0xA4, 0x95]);
    }),
    (32, "FNSAVE does not wait before a write to CS", b"\x2e\xdd\x36", |r| {
        r.gpr[RSI] = DATA.start;
        r.fpu.0[0..4].copy_from_slice(&[0x65, 0x03, 0xBD, 0xE2]);
    }),
    (32, "POP to where a segment ends", b"\x8f\x06", |r| r.gpr[RSI] = 0xFFFF_FFFF),
    (32, "POP from nowhere to nowhere", b"\x36\x8f\x44\x1c\x06", |r| {
        r.gpr[RSP] = 0x169;
        r.gpr[3] = 0xFFFF_FE8E;
    }),
    (32, "a bit beyond the end of a segment", b"\x36\x0f\xbb\x1e", |r| {
        (r.gpr[RSI], r.gpr[RBX]) = (0xFFFF_FFF1, 96);
    }),
    (32, "BOUND reads one bound after the other", b"\x62\x16", |r| r.gpr[RSI] = 0xFFFF_FFFB),
    (32, "VMASKMOV that selects nothing may name CS", b"\x2e\xc4\xe2\x71\x2e\x16", |r| r.gpr[RSI] = DATA.start),
    (32, "ARPL that adjusts nothing may name CS", b"\x2e\x63\x0e", |r| {
        r.gpr[RSI] = DATA.start + 0x40;
        r.gpr[RCX] = 0;
    }),
];

/// Compares all of them.
pub fn check(campaign: &mut Campaign) {
    for (bits, about, code, prepare) in CASES {
        let mut registers = Registers { rip: CODE.start + 0x100, ..Registers::default() };
        registers.gpr[RSP] = STACK.start + 0x800;
        prepare(&mut registers);
        let mut code = code.to_vec();
        code.push(0xCC);
        let instructions: Vec<_> =
            Decoder::with_ip(*bits, &code[..code.len() - 1], registers.rip, 0).into_iter().collect();
        assert!(instructions.iter().all(|i| !i.is_invalid()), "{about}");
        // POPFQ finds AC on the stack; a comparison of undefined flags is not what these are about.
        let pokes = vec![(STACK.start + 0x800, 0x4_0202u64.to_le_bytes().to_vec())];
        // FIP, FDP and FOP of the host.
        let ignored_memory =
            vec![(DATA.start + 1 + 6, 8), (DATA.start + 8 + 5, 19), (DATA.start + 8 + 28, 4), (0x2000_4E05, 19)];
        campaign.check(&Case {
            seed: 0,
            bits: *bits,
            registers,
            code,
            pokes,
            instructions,
            ignored_memory,
            undefined_flags: 0,
        });
    }
}
