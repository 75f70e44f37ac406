//! The functions themselves, on [`Wide`]: series with at least 118 good bits for every argument.
//!
//! Where a result differs from a short number by less than that, it is put on the right side of it, so that
//! directed rounding is right too.

use super::wide::{ONE, Wide, upper};
use std::cmp::Ordering;

const LN_2: Wide = Wide { negative: false, exponent: -1, mantissa: 0xB172_17F7_D1CF_79AB_C9E3_B398_03F2_F6AF };
const LOG2_E: Wide = Wide { negative: false, exponent: 0, mantissa: 0xB8AA_3B29_5C17_F0BB_BE87_FED0_691D_3E88 };
/// π, to 128 bits.
pub(super) const PI: Wide = Wide { negative: false, exponent: 1, mantissa: 0xC90F_DAA2_2168_C234_C4C6_628B_80DC_1CD1 };

/// Half of the π that arguments are reduced by, in units of 2^-67. It is that of the manual: the first 66 bits (Intel
/// SDM volume 1, section 8.3.8).
const HALF_PI_66: u128 = 0xC_90FD_AA22_168C_234C;
const HALF_PI_66_SCALE: i32 = -67;

/// Below 2^this, x³ is less than the last bit of x that is computed with.
const TINY: i32 = -60;

/// atan(i / 16), with 127 fraction bits.
const ARC_TANGENTS: [u128; 17] = [
    0x0000_0000_0000_0000_0000_0000_0000_0000,
    0x07FD_56ED_CB3F_7A71_B659_3C96_E071_706A,
    0x0FEA_DD4D_5617_B6E3_2C89_7989_F3E8_88EF,
    0x17B9_7B4B_CE5B_0226_8F61_69F1_0393_8E90,
    0x1F5B_75F9_2C80_DD62_ADB8_F3DE_BEF4_42FC,
    0x26C4_EE6E_0FD7_979A_716A_ED26_349E_BCCA,
    0x2DEC_3283_C9BD_E11C_E2A8_C848_B73F_9120,
    0x34C9_DD87_9847_F96D_909F_257A_4007_9C4D,
    0x3B58_CE0A_C376_9ED1_5BF9_117B_2F0E_A340,
    0x4195_FA53_6CC3_3F15_25B5_04E5_B0D2_8AE0,
    0x4780_2EAF_7BFA_CFCD_AE41_AF0B_32E2_1BA3,
    0x4D17_C073_38DE_ED10_2113_7C71_1027_F9DE,
    0x525E_3E8C_9A7B_8492_0CD4_3F95_22BE_D64F,
    0x5756_261C_5A6C_6040_0A39_2F17_9F29_0385,
    0x5C02_9F15_E118_CF39_E596_D2A9_0852_221E,
    0x6067_42DC_5629_3320_44EE_B162_3749_7D12,
    0x6487_ED51_10B4_611A_6263_3145_C06E_0E68,
];

/// 1 / (2i + 1), with 127 fraction bits.
const ODD_RECIPROCALS: [u128; 32] = {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        table[i] = ONE / (2 * i as u128 + 1);
        i += 1;
    }
    table
};

/// sin of |r| < 0.79.
fn sine_series(r: Wide) -> Wide {
    if r.exponent < TINY {
        return r.smaller();
    }
    let square = r.times(r).fraction();
    // 1 - z/(2·3) (1 - z/(4·5) (1 - ...))
    let sum = (1..=18u128).rev().fold(ONE, |sum, k| ONE - upper(square, sum) / (2 * k * (2 * k + 1)));
    r.times(Wide::fixed(sum))
}

/// cos of |r| < 0.79.
fn cosine_series(r: Wide) -> Wide {
    if r.exponent < TINY {
        return Wide::ONE.smaller();
    }
    let square = r.times(r).fraction();
    let sum = (1..=18u128).rev().fold(ONE, |sum, k| ONE - upper(square, sum) / ((2 * k - 1) * 2 * k));
    Wide::fixed(sum)
}

/// An angle as a remainder of at most π/4 in magnitude and the number, modulo 4, of the right angles taken off.
struct Angle {
    rest: Wide,
    quadrant: u8,
}

/// Reduces |x| < 2^63, exactly for a π of 66 bits. `x` has at most 64 significant bits.
fn reduce(x: Wide) -> Angle {
    if x.exponent < -2 {
        return Angle { rest: x, quadrant: 0 };
    }
    // |x| = value · 2^-67 · 2^doublings
    let lowest = x.exponent - 63 - HALF_PI_66_SCALE;
    let mut rest = (x.mantissa >> 64) % HALF_PI_66;
    let mut quadrant = ((x.mantissa >> 64) / HALF_PI_66) as u8;
    debug_assert!((2..=66).contains(&lowest));
    for _ in 0..lowest {
        rest *= 2;
        quadrant = quadrant.wrapping_mul(2);
        if rest >= HALF_PI_66 {
            rest -= HALF_PI_66;
            quadrant = quadrant.wrapping_add(1);
        }
    }
    let beyond = rest > HALF_PI_66 / 2;
    let (rest, quadrant) = if beyond { (HALF_PI_66 - rest, quadrant.wrapping_add(1)) } else { (rest, quadrant) };
    let rest = Wide::new(beyond != x.negative, rest, HALF_PI_66_SCALE);
    let quadrant = if x.negative { quadrant.wrapping_neg() } else { quadrant };
    Angle { rest, quadrant: quadrant & 3 }
}

impl Angle {
    fn sine(&self) -> Wide {
        let value = if self.quadrant & 1 == 0 { sine_series(self.rest) } else { cosine_series(self.rest) };
        if self.quadrant & 2 == 0 { value } else { value.negated() }
    }

    fn cosine(&self) -> Wide {
        Angle { quadrant: (self.quadrant + 1) & 3, ..*self }.sine()
    }
}

/// sin and cos of |x| < 2^63 that is not zero, with at most 64 significant bits.
pub(super) fn sine_cosine(x: Wide) -> (Wide, Wide) {
    let angle = reduce(x);
    (angle.sine(), angle.cosine())
}

/// tan of |x| < 2^63 that is not zero, with at most 64 significant bits.
pub(super) fn tangent(x: Wide) -> Wide {
    let Angle { rest, quadrant } = reduce(x);
    let tangent = if rest.exponent < TINY { rest.larger() } else { sine_series(rest).over(cosine_series(rest)) };
    // The tangent is never a power of two's reciprocal: the argument is not zero.
    if quadrant & 1 == 0 { tangent } else { Wide::ONE.over(tangent).negated() }
}

/// The angle of the point (`x`, `y`), neither of which is zero, from -π to π.
pub(super) fn arc_tangent(y: Wide, x: Wide) -> Wide {
    let steep = y.compare(x) == Ordering::Greater;
    let (small, large) = if steep { (x.absolute(), y.absolute()) } else { (y.absolute(), x.absolute()) };
    let first = arc_tangent_of_ratio(small, large);
    let angle = match (steep, x.negative) {
        (false, false) => first,
        (false, true) => PI.minus(first),
        (true, false) => PI.scaled(-1).minus(first),
        (true, true) => PI.scaled(-1).plus(first),
    };
    Wide { negative: y.negative, ..angle }
}

/// atan(`small` / `large`), both positive, the ratio not above one.
fn arc_tangent_of_ratio(small: Wide, large: Wide) -> Wide {
    // The nearest sixteenth; (n - c d) / (d + c n) is the tangent of what remains. Its numerator is exact.
    let ratio = small.over(large);
    let sixteenths = if ratio.exponent >= 0 {
        16
    } else if ratio.exponent < -6 {
        0
    } else {
        ((ratio.fraction() >> 123) as i64 + 1) / 2
    };
    let step = Wide::integer(sixteenths).scaled(-4);
    let rest = small.minus(step.times(large)).over(large.plus(step.times(small)));
    let remaining = if rest.is_zero() {
        rest
    } else if rest.exponent < TINY {
        rest.smaller()
    } else {
        let square = rest.times(rest).fraction();
        let sum = (0..14).rev().fold(ODD_RECIPROCALS[14], |sum, k| ODD_RECIPROCALS[k] - upper(square, sum));
        rest.times(Wide::fixed(sum))
    };
    Wide::fixed(ARC_TANGENTS[sixteenths as usize]).plus(remaining)
}

/// 2^x - 1, and whether that is exact.
pub(super) fn exponential_minus_one(x: Wide) -> (Wide, bool) {
    if x.is_zero() {
        return (x, true);
    }
    // Beyond these, it is as good as -1 or overflows.
    if x.negative && x.exponent >= 7 {
        return (Wide::ONE.negated().smaller(), false);
    }
    if x.exponent >= 15 {
        return (Wide::ONE.scaled(1 << 15), false);
    }
    // The nearest integer.
    let whole = if x.exponent < -1 { 0 } else { ((x.mantissa >> (126 - x.exponent)) as i32 + 1) / 2 };
    let whole = if x.negative { -whole } else { whole };
    let part = x.minus(Wide::integer(i64::from(whole)));
    let power_minus_one = if part.is_zero() {
        part
    } else {
        let exponent = part.times(LN_2);
        let fraction = exponent.fraction();
        // 1 + u/2 (1 + u/3 (1 + ...))
        let sum = (2..=36u128).rev().fold(ONE, |sum, k| {
            let term = upper(fraction, sum) / k;
            if part.negative { ONE - term } else { ONE + term }
        });
        exponent.times(Wide::fixed(sum))
    };
    if whole == 0 {
        return (power_minus_one, false);
    }
    let value = Wide::ONE.plus(power_minus_one).scaled(whole).minus(Wide::ONE);
    (value, part.is_zero() && whole.abs() < 127)
}

/// log2 of (1 + `above`), for `above` between -0.3 and 0.42.
fn logarithm_above_one(above: Wide) -> Wide {
    // 2/ln 2 · atanh(a / (2 + a))
    let ratio = above.over(Wide::integer(2).plus(above));
    let square = ratio.times(ratio).fraction();
    let sum = (0..28).rev().fold(ODD_RECIPROCALS[28], |sum, k| ODD_RECIPROCALS[k] + upper(square, sum));
    LOG2_E.scaled(1).times(ratio).times(Wide::fixed(sum))
}

/// log2(x) of x > 0, and whether it is exact.
pub(super) fn logarithm(x: Wide) -> (Wide, bool) {
    // x = 2^power · m, m between the roots of 1/2 and 2.
    const ROOT_OF_TWO: u128 = 0xB504_F333_F9DE_6484 << 64;
    let power = if x.mantissa > ROOT_OF_TWO { x.exponent + 1 } else { x.exponent };
    let above = x.scaled(-power).minus(Wide::ONE);
    let whole = Wide::integer(i64::from(power));
    if above.is_zero() { (whole, true) } else { (whole.plus(logarithm_above_one(above)), false) }
}

/// log2(1 + x) of x > -1 that is not zero, and whether it is exact.
pub(super) fn logarithm_plus_one(x: Wide) -> (Wide, bool) {
    let near = x.exponent < -2 || (x.exponent == -2 && (!x.negative || x.mantissa < 0x95 << 120));
    if near {
        return (logarithm_above_one(x), false);
    }
    let sum = Wide::ONE.plus(x);
    let exact = x.exponent <= 63;
    let (value, power_of_two) = logarithm(sum);
    (value, exact && power_of_two)
}
