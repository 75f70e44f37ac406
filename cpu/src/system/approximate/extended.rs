//! The x87's 80-bit format: kinds of values, NaNs, and rounding to it (Intel SDM volume 1, sections 4.2, 4.8, 8.5).

use super::wide::Wide;

/// Flags of the status word; the masks of the control word have the same places.
pub(super) mod flag {
    /// Invalid operation.
    pub(in super::super) const INVALID: u16 = 1;
    /// Denormal operand.
    pub(in super::super) const DENORMAL: u16 = 2;
    /// Division by zero.
    pub(in super::super) const ZERO_DIVIDE: u16 = 4;
    /// Overflow.
    pub(in super::super) const OVERFLOW: u16 = 8;
    /// Underflow.
    pub(in super::super) const UNDERFLOW: u16 = 0x10;
    /// Inexact result.
    pub(in super::super) const PRECISION: u16 = 0x20;
    /// Stack fault.
    pub(in super::super) const STACK: u16 = 0x40;
}

const BIAS: i32 = 16383;
const INTEGER_BIT: u64 = 1 << 63;
const QUIET_BIT: u64 = 1 << 62;
/// What is added to or taken from the exponent of a result whose underflow or overflow is not masked.
const WRAP: i32 = 24576;

/// A register's 80 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extended {
    /// Sign and biased exponent.
    pub(super) head: u16,
    /// Significand with its explicit integer bit.
    pub(super) significand: u64,
}

/// What a register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Zero,
    /// Denormals, and those with the integer bit set.
    Denormal,
    Normal,
    Infinity,
    Quiet,
    Signalling,
    /// Unnormals, pseudo-infinities, pseudo-NaNs.
    Unsupported,
}

impl Extended {
    /// The default NaN, "real indefinite".
    pub(super) const INDEFINITE: Extended = Extended { head: 0xFFFF, significand: INTEGER_BIT | QUIET_BIT };
    pub(super) const ONE: Extended = Extended { head: BIAS as u16, significand: INTEGER_BIT };

    pub(super) fn zero(negative: bool) -> Extended {
        Extended { head: u16::from(negative) << 15, significand: 0 }
    }

    pub(super) fn infinity(negative: bool) -> Extended {
        Extended { head: u16::from(negative) << 15 | 0x7FFF, significand: INTEGER_BIT }
    }

    pub(super) fn negative(self) -> bool {
        self.head >> 15 != 0
    }

    pub(super) fn kind(self) -> Kind {
        match (self.head & 0x7FFF, self.significand) {
            (0, 0) => Kind::Zero,
            (0, _) => Kind::Denormal,
            (_, significand) if significand & INTEGER_BIT == 0 => Kind::Unsupported,
            (0x7FFF, INTEGER_BIT) => Kind::Infinity,
            (0x7FFF, significand) if significand & QUIET_BIT != 0 => Kind::Quiet,
            (0x7FFF, _) => Kind::Signalling,
            _ => Kind::Normal,
        }
    }

    pub(super) fn is_nan(self) -> bool {
        matches!(self.kind(), Kind::Quiet | Kind::Signalling)
    }

    /// The value of a finite number, exactly.
    pub(super) fn wide(self) -> Wide {
        let biased = i32::from(self.head & 0x7FFF).max(1);
        Wide::new(self.negative(), u128::from(self.significand), biased - BIAS - 63)
    }

    fn quieted(self) -> Extended {
        Extended { significand: self.significand | QUIET_BIT, ..self }
    }

    /// The NaN that comes of one or two operands of which at least one is a NaN: a quiet one rather than a
    /// signalling one, then the larger significand, then the positive one (Intel SDM volume 1, table 4-7).
    pub(super) fn nan_of(a: Extended, b: Extended) -> Extended {
        let rank = |x: Extended| (x.is_nan(), x.kind() == Kind::Quiet, x.significand, !x.negative());
        if rank(b) > rank(a) { b.quieted() } else { a.quieted() }
    }
}

/// A value rounded to the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rounded {
    pub(super) value: Extended,
    /// Those of [`flag`] that the rounding raises.
    pub(super) flags: u16,
    /// Its magnitude is above that of the exact value.
    pub(super) up: bool,
}

/// Rounds `value` as the control word says. `exact` is false if `value` stands for a number that has more bits.
pub(super) fn round(value: Wide, exact: bool, control: u16) -> Rounded {
    if value.is_zero() {
        return Rounded { value: Extended::zero(value.negative), flags: 0, up: false };
    }
    let inexact = |mantissa: u128| !exact || mantissa as u64 != 0;
    let direction = control >> 10 & 3;
    // 65 bits: the significand may be carried out of.
    let cut = |mantissa: u128| -> (u128, bool) {
        let (kept, rest) = (mantissa >> 64, mantissa as u64 | u64::from(!exact));
        let half = 1 << 63;
        let up = match direction {
            0 => rest > half || (rest == half && kept & 1 != 0),
            1 => value.negative && rest != 0,
            2 => !value.negative && rest != 0,
            _ => false,
        };
        (kept + u128::from(up), up)
    };
    let sign = u16::from(value.negative) << 15;
    let pack = |biased: i32, significand: u128| {
        let (biased, significand) = if significand >> 64 != 0 { (biased + 1, 1 << 63) } else { (biased, significand) };
        Extended { head: sign | biased as u16, significand: significand as u64 }
    };
    let (significand, up) = cut(value.mantissa);
    let biased = value.exponent + BIAS;
    let carried = biased + (significand >> 64) as i32;
    let mut flags = if inexact(value.mantissa) { flag::PRECISION } else { 0 };
    if carried >= 0x7FFF {
        flags |= flag::OVERFLOW;
        if control & flag::OVERFLOW == 0 {
            return Rounded { value: pack(biased - WRAP, significand), flags, up };
        }
        let to_infinity = match direction {
            0 => true,
            1 => value.negative,
            2 => !value.negative,
            _ => false,
        };
        let largest = Extended { head: sign | 0x7FFE, significand: u64::MAX };
        let value = if to_infinity { Extended::infinity(value.negative) } else { largest };
        return Rounded { value, flags: flags | flag::PRECISION, up: to_infinity };
    }
    if carried < 1 {
        if control & flag::UNDERFLOW == 0 {
            return Rounded { value: pack(biased + WRAP, significand), flags: flags | flag::UNDERFLOW, up };
        }
        let shift = (1 - biased).min(127) as u32;
        let lost = value.mantissa & ((1 << shift) - 1) != 0;
        let mantissa = value.mantissa >> shift | u128::from(lost);
        let (significand, up) = cut(mantissa);
        if inexact(mantissa) {
            flags |= flag::UNDERFLOW | flag::PRECISION;
        }
        // A carry into the integer bit makes it the smallest normal number.
        let head = sign | (significand >> 63) as u16;
        return Rounded { value: Extended { head, significand: significand as u64 }, flags, up };
    }
    Rounded { value: pack(biased, significand), flags, up }
}
