//! Integer arithmetic with status flags, for the instructions that the emulation executes itself.
//!
//! Flags that the manual leaves undefined are those of AMD's processors: `docs/cpu-model.md` lists them.

use super::operand::{mask, sign_extend};
use crate::state::rflags;

fn sign(value: u64, size: usize) -> bool {
    value >> (size * 8 - 1) & 1 != 0
}

/// SF, ZF and PF of a result.
pub(super) fn result_flags(value: u64, size: usize) -> u64 {
    let value = value & mask(size);
    let mut flags = 0;
    if value == 0 {
        flags |= rflags::ZF;
    }
    if sign(value, size) {
        flags |= rflags::SF;
    }
    if (value as u8).count_ones().is_multiple_of(2) {
        flags |= rflags::PF;
    }
    flags
}

fn flag(condition: bool, bit: u64) -> u64 {
    if condition { bit } else { 0 }
}

/// `a + b + carry`: result and all six status flags.
pub(super) fn add(a: u64, b: u64, carry: bool, size: usize) -> (u64, u64) {
    let wide = u128::from(a & mask(size)) + u128::from(b & mask(size)) + u128::from(carry);
    let result = wide as u64 & mask(size);
    let flags = result_flags(result, size)
        | flag(wide >> (size * 8) != 0, rflags::CF)
        | flag((a ^ b ^ result) & 0x10 != 0, rflags::AF)
        | flag(sign((a ^ result) & (b ^ result), size), rflags::OF);
    (result, flags)
}

/// `a - b - borrow`: result and all six status flags.
pub(super) fn sub(a: u64, b: u64, borrow: bool, size: usize) -> (u64, u64) {
    let (a, b) = (a & mask(size), b & mask(size));
    let result = a.wrapping_sub(b).wrapping_sub(u64::from(borrow)) & mask(size);
    let flags = result_flags(result, size)
        | flag(u128::from(a) < u128::from(b) + u128::from(borrow), rflags::CF)
        | flag((a ^ b ^ result) & 0x10 != 0, rflags::AF)
        | flag(sign((a ^ b) & (a ^ result), size), rflags::OF);
    (result, flags)
}

/// What shifts leave in AF.
const SHIFTED: u64 = rflags::AF;

/// Shifts and rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(super) enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// Shifts or rotates the low `size` bytes of `value`. The count is masked here. Returns the result and RFLAGS'
/// status bits, starting from `flags`.
pub(super) fn shift(kind: Shift, value: u64, count: u64, flags: u64, size: usize) -> (u64, u64) {
    let width = (size * 8) as u32;
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    let value = value & mask(size);
    if count == 0 {
        return (value, flags & rflags::STATUS);
    }
    let bit = |value: u64, index: u32| value >> index & 1 != 0;
    let top = width - 1;
    match kind {
        Shift::Rol | Shift::Ror => {
            let left = if kind == Shift::Rol { count % width } else { (width - count % width) % width };
            let wide = u128::from(value) << left;
            let result = (wide as u64 | (wide >> width) as u64) & mask(size);
            let (carry, overflow) = if kind == Shift::Rol {
                (bit(result, 0), bit(result, top) != bit(result, 0))
            } else {
                (bit(result, top), bit(result, top) != bit(result, top - 1))
            };
            let kept = flags & rflags::STATUS & !(rflags::CF | rflags::OF);
            (result, kept | flag(carry, rflags::CF) | flag(overflow, rflags::OF))
        }
        Shift::Rcl | Shift::Rcr => {
            let carry = flags & rflags::CF != 0;
            let turns = count % (width + 1);
            let left = if kind == Shift::Rcl { turns } else { (width + 1 - turns) % (width + 1) };
            let ring = u128::from(value) | u128::from(carry) << width;
            let ring_mask = (1u128 << (width + 1)) - 1;
            let turned = (ring << left | ring >> (width + 1 - left)) & ring_mask;
            let result = turned as u64 & mask(size);
            let carry = turned >> width & 1 != 0;
            let overflow =
                if kind == Shift::Rcl { bit(result, top) != carry } else { bit(result, top) != bit(result, top - 1) };
            let kept = flags & rflags::STATUS & !(rflags::CF | rflags::OF);
            (result, kept | flag(carry, rflags::CF) | flag(overflow, rflags::OF))
        }
        Shift::Shl => {
            let wide = u128::from(value) << count;
            let result = wide as u64 & mask(size);
            let carry = wide >> width & 1 != 0;
            let overflow = bit(result, top) != carry;
            (result, SHIFTED | result_flags(result, size) | flag(carry, rflags::CF) | flag(overflow, rflags::OF))
        }
        Shift::Shr => {
            let result = if count < 64 { value >> count } else { 0 };
            let carry = u128::from(value) >> (count - 1) & 1 != 0;
            let overflow = bit(result, top - 1);
            (result, SHIFTED | result_flags(result, size) | flag(carry, rflags::CF) | flag(overflow, rflags::OF))
        }
        Shift::Sar => {
            let signed = sign_extend(value, size) as i64;
            let result = (signed >> count.min(63)) as u64 & mask(size);
            let carry = signed >> (count - 1).min(63) & 1 != 0;
            (result, SHIFTED | result_flags(result, size) | flag(carry, rflags::CF))
        }
    }
}

/// SHLD (`left`) and SHRD: shifts the low `size` bytes of `value` and fills up with `source`. The count is masked
/// here. Returns the result and RFLAGS' status bits, starting from `flags`.
pub(super) fn double_shift(left: bool, value: u64, source: u64, count: u64, flags: u64, size: usize) -> (u64, u64) {
    let width = (size * 8) as u32;
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    let (value, source) = (value & mask(size), source & mask(size));
    if count == 0 {
        return (value, flags & rflags::STATUS);
    }
    let bit = |value: u64, index: u32| value >> index & 1 != 0;
    // Beyond 16 bits, the source follows once more.
    let (result, last) = if left {
        let wide = u128::from(value) << width | u128::from(source);
        let high = if count <= width { wide << count } else { (wide << width | u128::from(source)) << (count - width) };
        let result = (high >> width) as u64 & mask(size);
        (result, count <= width && bit(value, width - count.min(width)))
    } else {
        let wide = u128::from(source) << width | u128::from(value);
        let high = if count <= width { wide >> count } else { u128::from(source) << width | u128::from(source) };
        let high = if count <= width { high } else { high >> (count - width) };
        (high as u64 & mask(size), count <= width && bit(value, count.min(width) - 1))
    };
    let top = width - 1;
    let overflow = match (left, count < width) {
        (true, true) => bit(result, top) != last,
        (true, false) => last,
        (false, _) => bit(result, top) != bit(result, top - 1),
    };
    (result, SHIFTED | result_flags(result, size) | flag(last, rflags::CF) | flag(overflow, rflags::OF))
}
