//! Binary floating point with 128 significant bits and a range that nothing here leaves. Operations truncate: each
//! is off by at most two units of its last place.

use std::cmp::Ordering;

/// The fixed-point one with 127 fraction bits.
pub(super) const ONE: u128 = 1 << 127;

/// `mantissa` · 2^(`exponent` - 127), negated if `negative`. The mantissa's highest bit is set unless it is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wide {
    pub(super) negative: bool,
    pub(super) exponent: i32,
    pub(super) mantissa: u128,
}

/// The upper and lower half of a product.
pub(super) fn multiply(a: u128, b: u128) -> (u128, u128) {
    let low_half = u128::from(u64::MAX);
    let (a1, a0, b1, b0) = (a >> 64, a & low_half, b >> 64, b & low_half);
    let (high, low, cross, other) = (a1 * b1, a0 * b0, a1 * b0, a0 * b1);
    let middle = (low >> 64) + (cross & low_half) + (other & low_half);
    (high + (cross >> 64) + (other >> 64) + (middle >> 64), (middle << 64) | (low & low_half))
}

/// The upper half of a product: for one factor with 128 fraction bits, the product has as many as the other.
pub(super) fn upper(a: u128, b: u128) -> u128 {
    multiply(a, b).0
}

impl Wide {
    pub(super) const ZERO: Wide = Wide { negative: false, exponent: 0, mantissa: 0 };
    pub(super) const ONE: Wide = Wide { negative: false, exponent: 0, mantissa: ONE };

    /// `value` · 2^`scale`
    pub(super) fn new(negative: bool, value: u128, scale: i32) -> Wide {
        if value == 0 {
            return Wide { negative, ..Wide::ZERO };
        }
        let zeros = value.leading_zeros();
        Wide { negative, exponent: scale + 127 - zeros as i32, mantissa: value << zeros }
    }

    pub(super) fn integer(value: i64) -> Wide {
        Wide::new(value < 0, u128::from(value.unsigned_abs()), 0)
    }

    /// Of a value with 127 fraction bits.
    pub(super) fn fixed(value: u128) -> Wide {
        Wide::new(false, value, -127)
    }

    pub(super) fn is_zero(self) -> bool {
        self.mantissa == 0
    }

    /// Magnitude, below one, with 128 fraction bits.
    pub(super) fn fraction(self) -> u128 {
        debug_assert!(self.exponent < 0 || self.is_zero());
        let shift = -(self.exponent + 1);
        if (0..128).contains(&shift) { self.mantissa >> shift } else { 0 }
    }

    pub(super) fn negated(self) -> Wide {
        Wide { negative: !self.negative, ..self }
    }

    pub(super) fn absolute(self) -> Wide {
        Wide { negative: false, ..self }
    }

    /// Times 2^`power`.
    pub(super) fn scaled(self, power: i32) -> Wide {
        Wide { exponent: self.exponent + power, ..self }
    }

    /// The next value towards zero. Not of zero.
    pub(super) fn smaller(self) -> Wide {
        if self.mantissa == ONE {
            Wide { exponent: self.exponent - 1, mantissa: u128::MAX, ..self }
        } else {
            Wide { mantissa: self.mantissa - 1, ..self }
        }
    }

    /// The next value away from zero. Not of zero.
    pub(super) fn larger(self) -> Wide {
        match self.mantissa.checked_add(1) {
            Some(mantissa) => Wide { mantissa, ..self },
            None => Wide { exponent: self.exponent + 1, mantissa: ONE, ..self },
        }
    }

    pub(super) fn times(self, other: Wide) -> Wide {
        let negative = self.negative != other.negative;
        if self.is_zero() || other.is_zero() {
            return Wide { negative, ..Wide::ZERO };
        }
        let exponent = self.exponent + other.exponent;
        let (high, low) = multiply(self.mantissa, other.mantissa);
        if high >> 127 != 0 {
            Wide { negative, exponent: exponent + 1, mantissa: high }
        } else {
            Wide { negative, exponent, mantissa: high << 1 | low >> 127 }
        }
    }

    /// The quotient; the divisor is not zero.
    pub(super) fn over(self, divisor: Wide) -> Wide {
        let negative = self.negative != divisor.negative;
        if self.is_zero() {
            return Wide { negative, ..Wide::ZERO };
        }
        let mut exponent = self.exponent - divisor.exponent;
        let mut rest = self.mantissa;
        let mut quotient = 0;
        let mut bits = 0;
        if rest >= divisor.mantissa {
            rest -= divisor.mantissa;
            quotient = 1;
            bits = 1;
        } else {
            exponent -= 1;
        }
        while bits < 128 {
            let carry = rest >> 127 != 0;
            rest <<= 1;
            quotient <<= 1;
            if carry || rest >= divisor.mantissa {
                rest = rest.wrapping_sub(divisor.mantissa);
                quotient |= 1;
            }
            bits += 1;
        }
        Wide { negative, exponent, mantissa: quotient }
    }

    /// Compares magnitudes.
    pub(super) fn compare(self, other: Wide) -> Ordering {
        match (self.is_zero(), other.is_zero()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            (false, false) => (self.exponent, self.mantissa).cmp(&(other.exponent, other.mantissa)),
        }
    }

    /// The sum: exact if all its bits, and those of the summands, lie within 127 places of the larger one's highest.
    pub(super) fn plus(self, other: Wide) -> Wide {
        let (large, small) = if self.compare(other) == Ordering::Less { (other, self) } else { (self, other) };
        if small.is_zero() {
            return large;
        }
        // One place is spared for the carry.
        let shift = i64::from(large.exponent) - i64::from(small.exponent) + 1;
        let aligned = if shift < 128 { small.mantissa >> shift } else { 0 };
        let kept = large.mantissa >> 1;
        let sum = if large.negative == small.negative { kept + aligned } else { kept - aligned };
        Wide::new(large.negative, sum, large.exponent + 1 - 127)
    }

    pub(super) fn minus(self, other: Wide) -> Wide {
        self.plus(other.negated())
    }
}
