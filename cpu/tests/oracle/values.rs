//! Numbers worth computing with: boundaries of integers, and the special values of every floating-point format.

use crate::rng::Rng;

const F64: [u64; 20] = [
    0x0000_0000_0000_0000,
    0x8000_0000_0000_0000,
    0x3FF0_0000_0000_0000,
    0xBFF0_0000_0000_0000,
    0x7FF0_0000_0000_0000,
    0xFFF0_0000_0000_0000,
    0x7FF8_0000_0000_0000,
    0xFFF8_0000_0000_0000,
    0x7FF0_0000_0000_0001,
    0xFFF4_0000_0000_1234,
    0x0000_0000_0000_0001,
    0x800F_FFFF_FFFF_FFFF,
    0x0010_0000_0000_0000,
    0x7FEF_FFFF_FFFF_FFFF,
    0x41DF_FFFF_FFC0_0000,
    0x41E0_0000_0000_0000,
    0xC1E0_0000_0020_0000,
    0x43E0_0000_0000_0000,
    0xC3E0_0000_0000_0000,
    0x3FE0_0000_0000_0000,
];

const F32: [u32; 18] = [
    0x0000_0000,
    0x8000_0000,
    0x3F80_0000,
    0xBF80_0000,
    0x7F80_0000,
    0xFF80_0000,
    0x7FC0_0000,
    0xFFC0_0000,
    0x7F80_0001,
    0xFFA0_1234,
    0x0000_0001,
    0x807F_FFFF,
    0x0080_0000,
    0x7F7F_FFFF,
    0x4F00_0000,
    0xCF00_0001,
    0x5F00_0000,
    0x3F00_0000,
];

/// A float of moderate size: arithmetic on two of them neither overflows nor vanishes.
fn moderate_f64(rng: &mut Rng) -> u64 {
    let exponent = 1023 - 20 + rng.below(60);
    (rng.next() & 0x800F_FFFF_FFFF_FFFF) | exponent << 52
}

fn moderate_f32(rng: &mut Rng) -> u32 {
    let exponent = 127 - 20 + rng.below(50) as u32;
    (rng.next() as u32 & 0x807F_FFFF) | exponent << 23
}

fn any_f32(rng: &mut Rng) -> u32 {
    if rng.one_in(3) { rng.pick(&F32) } else { moderate_f32(rng) }
}

/// An integer near a boundary, small, or a power of two.
pub fn interesting_integer(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => rng.below(20).wrapping_sub(5),
        1 => (1u64 << rng.below(64)).wrapping_sub(rng.below(3)),
        2 => rng.pick(&[0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63]),
        3 => rng.next() >> rng.below(64),
        4 => (rng.next() as i32) as i64 as u64,
        _ => rng.next(),
    }
}

/// Eight bytes that may be an integer, a double or two singles.
pub fn interesting_u64(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => rng.pick(&F64),
        1 | 2 => moderate_f64(rng),
        3 | 4 => u64::from(any_f32(rng)) | u64::from(any_f32(rng)) << 32,
        5 => rng.next(),
        _ => interesting_integer(rng),
    }
}

/// An 80-bit extended value, with its unnormals and pseudo-denormals.
pub fn interesting_f80(rng: &mut Rng) -> [u8; 10] {
    let (significand, sign_exponent): (u64, u16) = match rng.below(12) {
        0 => (0, rng.pick(&[0, 0x8000])),
        1 => (1 << 63, rng.pick(&[0x7FFF, 0xFFFF])),
        2 => (3 << 62 | rng.next() >> 8, rng.pick(&[0x7FFF, 0xFFFF])),
        3 => (1 << 63 | (rng.next() >> 3) | 1, rng.pick(&[0x7FFF, 0xFFFF])),
        4 => (rng.next() >> 1 >> rng.below(60), rng.pick(&[0, 0x8000])),
        5 => (1 << 63, 0x3FFF),
        6 => (rng.next(), rng.next() as u16),
        7 => (1 << 63 | rng.next(), rng.pick(&[1, 0x8001, 0x7FFE, 0xFFFE])),
        8 => (1 << 63 | (rng.next() >> 1 << rng.below(63)), 0x3FFF + rng.below(70) as u16),
        _ => (1 << 63 | rng.next(), (0x3FFF - 30 + rng.below(60) as u16) | (rng.below(2) as u16) << 15),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&sign_exponent.to_le_bytes());
    bytes
}

/// A 256-bit vector made for one element type.
pub fn interesting_vector(rng: &mut Rng) -> [u8; 32] {
    let mut bytes = [0; 32];
    let kind = rng.below(5);
    for chunk in bytes.chunks_exact_mut(8) {
        let value = match kind {
            0 => rng.next(),
            1 => {
                if rng.one_in(3) {
                    rng.pick(&F64)
                } else {
                    moderate_f64(rng)
                }
            }
            2 => u64::from(any_f32(rng)) | u64::from(any_f32(rng)) << 32,
            3 => interesting_u64(rng),
            _ => interesting_integer(rng),
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}
