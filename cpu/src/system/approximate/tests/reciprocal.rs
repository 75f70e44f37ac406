//! RCP and RSQRT: every significand, the special cases, the forms of the instructions.

use super::super::reciprocal::{reciprocal, reciprocal_root};
use super::{CpuState, Exception, MEMORY, Small, control, vcpu};
use crate::state::gpr;
use crate::system::{Executed, execute};
use iced_x86::{Decoder, DecoderOptions};

/// Significand, and binary exponent of its lowest bit.
fn parts(x: u32) -> (u128, i32) {
    (u128::from(x & 0x7F_FFFF | 0x80_0000), (x >> 23) as i32 - 150)
}

/// |a · 2^scale - 1| · 2^13, rounded up, is at most `bound`.
fn near_one(a: u128, scale: i32, bound: u128) -> bool {
    let one = 1u128 << -scale;
    a.abs_diff(one) << 13 <= bound * one
}

#[test]
fn errors_are_below_one_part_in_8192() {
    for significand in 0..1 << 23 {
        for exponent in [127, 128] {
            let x = exponent << 23 | significand;
            let ((a, scale), (b, result_scale)) = (parts(x), parts(reciprocal(x)));
            assert!(near_one(a * b, scale + result_scale, 1), "{x:x}");
            // Twice the error and its square.
            let (c, root_scale) = parts(reciprocal_root(x));
            assert!(near_one((a * c * c) >> 1, scale + 2 * root_scale + 1, 2), "{x:x}");
        }
    }
}

#[test]
fn results_scale_with_the_exponent() {
    for significand in (0..1 << 23).step_by(65_521) {
        for exponent in 1..253u32 {
            let x = exponent << 23 | significand;
            let of_one = reciprocal(127 << 23 | significand);
            assert_eq!(reciprocal(x), of_one + (127 << 23) - (exponent << 23), "{x:x}");
            assert_eq!(reciprocal(x | 1 << 31), reciprocal(x) | 1 << 31);
            let of_near = reciprocal_root((127 + (exponent + 1) % 2) << 23 | significand);
            let half = (exponent as i32 - 127).div_euclid(2);
            assert_eq!(reciprocal_root(x), of_near.wrapping_add_signed(-half << 23), "{x:x}");
        }
    }
}

#[test]
fn special_cases() {
    let cases = [
        // x, 1/x, 1/√x
        (0, 0x7F80_0000, 0x7F80_0000),
        (0x8000_0000, 0xFF80_0000, 0xFF80_0000),
        (1, 0x7F80_0000, 0x7F80_0000),
        (0x807F_FFFF, 0xFF80_0000, 0xFF80_0000),
        (0x0080_0000, 0x7E80_0000, 0x5F00_0000),
        (0x7F80_0000, 0, 0),
        (0xFF80_0000, 0x8000_0000, 0xFFC0_0000),
        (0xBF80_0000, 0xBF80_0000, 0xFFC0_0000),
        (0x7F80_0001, 0x7FC0_0001, 0x7FC0_0001),
        (0xFFC1_2345, 0xFFC1_2345, 0xFFC1_2345),
        // 2^126 is the last whose reciprocal is normal.
        (0x7E80_0000, 0x0080_0000, 0x2000_0000),
        (0x7E80_0C01, 0, 0x1FFF_F000),
        (0xFF00_0000, 0x8000_0000, 0xFFC0_0000),
        (0x7F7F_FFFF, 0, 0x1F80_0000),
    ];
    for (x, one_over, root) in cases {
        assert_eq!((reciprocal(x), reciprocal_root(x)), (one_over, root), "{x:x}");
    }
}

/// The model may not change: results of a million arguments.
#[test]
fn results_are_pinned() {
    let digest = |model: fn(u32) -> u32| {
        (0..1u32 << 20).fold(0xCBF2_9CE4_8422_2325u64, |digest, i| {
            (digest ^ u64::from(model(i.wrapping_mul(0x9E37_79B9)))).wrapping_mul(0x100_0000_01B3)
        })
    };
    assert_eq!((digest(reciprocal), digest(reciprocal_root)), (4348523347573885204, 6988416603411781908));
    assert_eq!([0x3FC0_0000, 0x4040_0000, 0x4049_0FDB].map(reciprocal), [0x3F2A_A800, 0x3EAA_A800, 0x3EA2_F800]);
    assert_eq!([0x4000_0000, 0x4040_0000, 0x4049_0FDB].map(reciprocal_root), [0x3F35_0800, 0x3F13_D000, 0x3F10_7000]);
}

fn run(state: &mut CpuState, code: &[u8]) -> Executed {
    let mut memory = Small([0; 64]);
    for (i, bytes) in memory.0.chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(&(2f32 + i as f32).to_bits().to_le_bytes());
    }
    execute(state, &Decoder::new(64, code, DecoderOptions::NONE).decode(), &mut memory)
}

fn lanes(state: &CpuState, number: usize) -> [u32; 8] {
    std::array::from_fn(|i| {
        let at = if i < 4 { 160 + number * 16 + i * 4 } else { 576 + number * 16 + (i - 4) * 4 };
        u32::from_le_bytes([0, 1, 2, 3].map(|byte| state.fpu.0[at + byte]))
    })
}

fn filled() -> CpuState {
    let mut state = vcpu();
    for number in 0..4 {
        for i in 0..8 {
            let at = if i < 4 { 160 + number * 16 + i * 4 } else { 576 + number * 16 + (i - 4) * 4 };
            let value = (((number + 1) << (i % 4)) as f32).to_bits();
            state.fpu.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
    state.gpr[gpr::RAX] = MEMORY;
    state
}

#[test]
fn forms() {
    let before = filled();
    let (zero, one, two) = (lanes(&before, 0), lanes(&before, 1), lanes(&before, 2));
    let inverse = |values: [u32; 8]| values.map(reciprocal);
    let memory: [u32; 8] = std::array::from_fn(|i| reciprocal((2f32 + i as f32).to_bits()));
    let after = |code: &[u8]| {
        let mut state = filled();
        run(&mut state, code).expect("no exception");
        assert_eq!(state.rip, code.len() as u64);
        assert_eq!(state.fpu.0[..32], before.fpu.0[..32]);
        lanes(&state, 0)
    };
    let join = |low: &[u32], high: &[u32]| [low, high].concat();
    // RCPSS xmm0, xmm1; RCPSS xmm0, [rax+4]
    assert_eq!(after(&[0xF3, 0x0F, 0x53, 0xC1])[..], join(&inverse(one)[..1], &zero[1..]));
    assert_eq!(after(&[0xF3, 0x0F, 0x53, 0x40, 0x04])[..], join(&memory[1..2], &zero[1..]));
    // RCPPS xmm0, xmm1; RCPPS xmm0, [rax]
    assert_eq!(after(&[0x0F, 0x53, 0xC1])[..], join(&inverse(one)[..4], &zero[4..]));
    assert_eq!(after(&[0x0F, 0x53, 0x00])[..], join(&memory[..4], &zero[4..]));
    // VRCPSS xmm0, xmm1, xmm2
    let expected = [&inverse(two)[..1], &one[1..4], &[0; 4]].concat();
    assert_eq!(after(&[0xC5, 0xF2, 0x53, 0xC2])[..], expected);
    // VRCPPS xmm0, [rax+4]; VRCPPS ymm0, ymm1; VRCPPS ymm0, [rax]
    assert_eq!(after(&[0xC5, 0xF8, 0x53, 0x40, 0x04])[..], join(&memory[1..5], &[0; 4]));
    assert_eq!(after(&[0xC5, 0xFC, 0x53, 0xC1]), inverse(one));
    assert_eq!(after(&[0xC5, 0xFC, 0x53, 0x00]), memory);
    // RSQRTPS xmm0, xmm1; VRSQRTSS xmm0, xmm1, xmm2
    assert_eq!(after(&[0x0F, 0x52, 0xC1])[..], join(&one.map(reciprocal_root)[..4], &zero[4..]));
    assert_eq!(after(&[0xC5, 0xF2, 0x52, 0xC2])[0], reciprocal_root(two[0]));
}

#[test]
fn faults() {
    let fault = |prepare: fn(&mut CpuState), code: &[u8]| {
        let mut state = filled();
        prepare(&mut state);
        let before = state.clone();
        let result = run(&mut state, code);
        assert_eq!(state.fpu.0, before.fpu.0);
        super::raised(result)
    };
    // Misaligned, which comes before the stack's #SS; RCPPS xmm0, [rsp].
    assert_eq!(fault(|state| state.gpr[gpr::RSP] = 1 << 63 | 8, &[0x0F, 0x53, 0x04, 0x24]), Exception::GP0);
    let stack = Exception::StackFault { error: 0 };
    assert_eq!(fault(|state| state.gpr[gpr::RSP] = 1 << 63, &[0x0F, 0x53, 0x04, 0x24]), stack);
    assert_eq!(fault(|_| {}, &[0x0F, 0x53, 0x40, 0x04]), Exception::GP0);
    assert_eq!(fault(|state| state.cr4 &= !control::CR4_OSFXSR, &[0x0F, 0x53, 0xC1]), Exception::InvalidOpcode);
    assert_eq!(fault(|state| state.cr0 |= control::CR0_TS, &[0x0F, 0x53, 0xC1]), Exception::DeviceNotAvailable);
    assert_eq!(fault(|state| state.xcr0 = 3, &[0xC5, 0xFC, 0x53, 0xC1]), Exception::InvalidOpcode);
    assert_eq!(fault(|state| state.cr0 |= control::CR0_EM, &[0xD9, 0xFE]), Exception::DeviceNotAvailable);
}
