//! The host's own instructions, for comparison: not of bits, but of errors and of what the manual fixes.

use super::{CpuState, Extended, NEAREST, flag, load, register, run, set_word, vcpu, word, x};
use iced_x86::Code;
use std::arch::asm;
use std::arch::x86_64::{_mm_cvtss_f32, _mm_rcp_ss, _mm_rsqrt_ss, _mm_set_ss};

const CODES: [Code; 8] =
    [Code::F2xm1, Code::Fyl2x, Code::Fptan, Code::Fpatan, Code::Fyl2xp1, Code::Fsincos, Code::Fsin, Code::Fcos];

/// 512 bytes for FXSAVE.
#[repr(C, align(16))]
struct Image([u8; 512]);

/// Executes one instruction on the host, with the x87 registers of `state`.
fn native(code: Code, state: &CpuState) -> CpuState {
    let mut image = Image([0; 512]);
    image.0[..160].copy_from_slice(&state.fpu.0[..160]);
    image.0[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
    macro_rules! host {
        ($instruction:literal) => {
            // SAFETY: the image is 512 aligned bytes with a valid MXCSR. FXSAVE does not wait for an error that the
            // instruction left pending, and FNINIT removes it. The registers are declared as changed.
            unsafe {
                asm!("fxrstor64 [{0}]", $instruction, "fxsave64 [{0}]", "fninit", in(reg) image.0.as_mut_ptr(),
                     out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                     out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                     out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _, out("st(0)") _, out("st(1)") _,
                     out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _)
            }
        };
    }
    match code {
        Code::F2xm1 => host!("f2xm1"),
        Code::Fyl2x => host!("fyl2x"),
        Code::Fptan => host!("fptan"),
        Code::Fpatan => host!("fpatan"),
        Code::Fyl2xp1 => host!("fyl2xp1"),
        Code::Fsincos => host!("fsincos"),
        Code::Fsin => host!("fsin"),
        Code::Fcos => host!("fcos"),
        other => panic!("{other:?}"),
    }
    let mut after = state.clone();
    after.fpu.0[..5].copy_from_slice(&image.0[..5]);
    after.fpu.0[32..160].copy_from_slice(&image.0[32..160]);
    after
}

const SPECIAL: [Extended; 39] = [
    x(0, 0),
    x(0x8000, 0),
    x(0, 1),
    x(0x8000, 1 << 62),
    x(0, 1 << 63),
    x(0, 1 << 63 | 5),
    x(1, 1 << 63),
    x(0x8001, 1 << 63 | 77),
    x(0x3FFF, 1 << 63),
    x(0xBFFF, 1 << 63),
    x(0x3FFE, 1 << 63),
    x(0xBFFE, 1 << 63),
    x(0x3FFE, 3 << 62),
    x(0x4000, 1 << 63),
    x(0xC000, 1 << 63),
    x(0xBFFF, 3 << 62),
    x(0x3FFF, 3 << 62),
    x(0x3FC0, 1 << 63),
    x(0xBFC0, 1 << 63),
    x(0x3F80, 0xABCD_EF00_0000_0001),
    x(0x4005, 0xABCD_EF00_0000_0001),
    x(0x403E, 1 << 63),
    x(0xC03E, 1 << 63),
    x(0x403D, u64::MAX),
    x(0x4100, 1 << 63),
    x(0x7FFE, u64::MAX),
    x(0xFFFE, u64::MAX),
    x(0x7FFF, 1 << 63),
    x(0xFFFF, 1 << 63),
    x(0x7FFF, 1 << 63 | 1),
    x(0xFFFF, 1 << 63 | 7),
    x(0x7FFF, 3 << 62 | 9),
    x(0xFFFF, 3 << 62),
    x(0x7FFF, 3 << 62 | 0x55),
    x(0xFFFF, 3 << 62 | 0x55),
    x(0x3FFF, 1),
    x(0x7FFF, 0),
    x(0x7FFF, 0x1234),
    x(0xBFFF, 1 << 62),
];

fn distance(a: Extended, b: Extended) -> u128 {
    let place = |x: Extended| u128::from(x.head & 0x7FFF) << 63 | u128::from(x.significand & !(1 << 63));
    if a.head >> 15 == b.head >> 15 { place(a).abs_diff(place(b)) } else { u128::MAX }
}

/// The manual says nothing about the result.
fn is_undefined(code: Code, top: Extended) -> bool {
    let exponent = top.head & 0x7FFF;
    let finite = exponent != 0x7FFF && (top.significand >> 63 != 0 || exponent == 0);
    match code {
        Code::F2xm1 => (0x3FFF..0x7FFF).contains(&exponent) && top.significand << 1 != 0 || finite && exponent > 0x3FFF,
        Code::Fyl2xp1 => finite && exponent >= 0x3FFD || top.head == 0xFFFF && top.significand == 1 << 63,
        _ => false,
    }
}

/// Operands from every class, with every exception unmasked in turn, and stacks that are too empty or too full.
#[test]
fn special_cases_are_the_hosts() {
    let mut count = 0;
    for code in CODES {
        for mask in [0x37F, 0x37E, 0x37D, 0x37B] {
            for (top, second) in SPECIAL.iter().flat_map(|top| SPECIAL.map(|second| (*top, second))) {
                for tags in [0xC0, 0x80, 0x40, 0xE0] {
                    if is_undefined(code, top) || tags != 0xC0 && second != SPECIAL[0] {
                        continue;
                    }
                    let mut state = vcpu();
                    load(&mut state, &[top, second]);
                    set_word(&mut state, 0, mask);
                    state.fpu.0[3] |= 0x06; // C1, C2
                    state.fpu.0[4] = tags;
                    let host = native(code, &state);
                    run(&mut state, code).expect("no exception");
                    let case = format!("{code:?} {mask:x} {tags:x} {top:x?} {second:x?}");
                    for i in 0..8 {
                        let (ours, theirs) = (register(&state, i), register(&host, i));
                        assert!(distance(ours, theirs) <= 4, "{case}: st({i}) {ours:x?} {theirs:x?}");
                    }
                    assert_eq!(state.fpu.0[4], host.fpu.0[4], "{case}");
                    // Processors call exact results inexact, and C0 and C3 are undefined. C1 is rounding, but for
                    // stack faults.
                    let mut defined = !0x4100 & !(flag::UNDERFLOW | flag::PRECISION);
                    if word(&host, 2) & flag::STACK == 0 {
                        defined &= !0x200;
                    }
                    assert_eq!(word(&state, 2) & defined, word(&host, 2) & defined, "{case}");
                    count += 1;
                }
            }
        }
    }
    assert!(count > 10_000);
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 ^ self.0 >> 29
    }

    /// A number whose exponent lies in a range.
    fn number(&mut self, lowest: i32, highest: i32) -> Extended {
        let exponent = lowest + (self.next() >> 40) as i32 % (highest - lowest + 1);
        let sign = (self.next() >> 13) as u16 & 0x8000;
        x(sign | (exponent + 16383) as u16, self.next() | 1 << 63)
    }
}

/// Processors promise an error below one unit of the last place, and the model is off by half of one.
#[test]
fn host_is_within_its_error_bound() {
    let mut random = Random(7);
    let mut worst = 0;
    for round in 0..4000 {
        let code = CODES[round % CODES.len()];
        let top = match code {
            Code::F2xm1 => random.number(-70, -1),
            Code::Fyl2x => x(random.number(-200, 200).head & 0x7FFF, random.next() | 1 << 63),
            Code::Fyl2xp1 => random.number(-70, -3),
            Code::Fpatan => random.number(-40, 40),
            _ => random.number(-70, 62),
        };
        let mut state = vcpu();
        load(&mut state, &[top, random.number(-40, 40)]);
        if matches!(code, Code::Fptan | Code::Fsincos) {
            state.fpu.0[4] &= !(1 << 5);
        }
        let host = native(code, &state);
        run(&mut state, code).expect("no exception");
        for i in 0..2 {
            let apart = distance(register(&state, i), register(&host, i));
            assert!(apart <= 2, "{code:?} {top:x?}: {:x?} {:x?}", register(&state, i), register(&host, i));
            worst = worst.max(apart);
        }
        assert_eq!(word(&state, 0), NEAREST);
    }
    println!("the host is off by at most {worst} units of the last place");
}

#[test]
fn host_reciprocals_are_within_the_bound_of_the_exact_value() {
    let mut random = Random(9);
    for _ in 0..100_000 {
        let value = f32::from_bits((random.next() as u32 & 0x3FFF_FFFF) + 0x2000_0000);
        // SAFETY: SSE is part of x86-64.
        let results = unsafe {
            [_mm_rcp_ss(_mm_set_ss(value)), _mm_rsqrt_ss(_mm_set_ss(value))].map(|result| _mm_cvtss_f32(result))
        };
        let exact = [1.0 / f64::from(value), 1.0 / f64::from(value).sqrt()];
        let ours = [super::super::reciprocal::reciprocal, super::super::reciprocal::reciprocal_root]
            .map(|model| f32::from_bits(model(value.to_bits())));
        for i in 0..2 {
            let error = |result: f32| (f64::from(result) / exact[i] - 1.0).abs();
            assert!(error(results[i]) < 1.5 / 4096.0 && error(ours[i]) <= 1.0 / 8192.0, "{value}");
        }
    }
}
