//! RCPPS, RCPSS, RSQRTPS, RSQRTSS and their VEX forms (Intel SDM volume 2).
//!
//! The model: the exact value rounded to the nearest number of 12 fraction bits, which is off by less than 2^-13 of
//! it. The manual permits 1.5 · 2^-12.

use super::super::availability::{avx_refused, sse_refused};
use super::super::masked::{read_vector, vector_number, write_vector};
use super::super::operand::{address, effective_offset, memory_segment};
use super::super::{Executed, GP0, Privilege, System, retire};
use crate::state::{CpuState, seg};
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};

const SIGN: u32 = 1 << 31;
const INFINITY: u32 = 0x7F80_0000;
const QUIET_BIT: u32 = 1 << 22;
const DEFAULT_NAN: u32 = 0xFFC0_0000;
/// Fraction bits of the results.
const BITS: u32 = 12;

/// A positive number of `BITS` fraction bits, from the biased exponent and the significand with its leading one; a
/// carry out of the fraction goes to the exponent.
fn pack(exponent: u32, significand: u64) -> u32 {
    (exponent << 23) + (((significand - (1 << BITS)) as u32) << (23 - BITS))
}

/// The approximation of 1 / x.
pub(super) fn reciprocal(x: u32) -> u32 {
    let (sign, magnitude) = (x & SIGN, x & !SIGN);
    let (exponent, significand) = (magnitude >> 23, u64::from(magnitude & 0x7F_FFFF | 0x80_0000));
    match exponent {
        // Denormals count as zero.
        0 => sign | INFINITY,
        0xFF if magnitude > INFINITY => x | QUIET_BIT,
        0xFF => sign,
        _ if significand == 0x80_0000 => {
            // A power of two. 2^127's reciprocal is tiny.
            if exponent == 254 { sign } else { sign | (254 - exponent) << 23 }
        }
        _ => {
            // 1 / 1.f is between ½ and 1: twice that has a leading one.
            let doubled = (1 << (23 + BITS + 2)) / significand;
            let rounded = (doubled + 1) >> 1;
            if exponent == 254 {
                return sign;
            }
            let value = pack(253 - exponent, rounded);
            // Tiny results are flushed.
            if value < 0x80_0000 { sign } else { sign | value }
        }
    }
}

/// The approximation of 1 / √x.
pub(super) fn reciprocal_root(x: u32) -> u32 {
    let (sign, magnitude) = (x & SIGN, x & !SIGN);
    let (exponent, significand) = (magnitude >> 23, u64::from(magnitude & 0x7F_FFFF | 0x80_0000));
    match exponent {
        0 => return sign | INFINITY,
        0xFF if magnitude > INFINITY => return x | QUIET_BIT,
        _ if sign != 0 => return DEFAULT_NAN,
        0xFF => return 0,
        _ => {}
    }
    // x = v · 4^half, v = 1.f or 2 · 1.f.
    let odd = exponent & 1 == 0;
    let half = (exponent as i32 - 127 - i32::from(odd)) / 2;
    let v = significand << u32::from(odd);
    // 1/√v is between ½ and 1: the root of 4^(BITS + 2) / v has one bit more than the result.
    let root = ((1u64 << (23 + 2 * (BITS + 2))) / v).isqrt();
    let rounded = (root + 1) >> 1;
    pack((126 - half) as u32, rounded)
}

/// The memory operand is at a multiple of 16.
fn is_aligned(state: &CpuState, instr: &Instruction) -> bool {
    let segment = memory_segment(instr);
    let base = if state.is_64bit() && segment < seg::FS { 0 } else { state.seg[segment].base };
    base.wrapping_add(effective_offset(state, instr)).is_multiple_of(16)
}

/// Executes one of them.
pub(in super::super) fn execute(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    use Mnemonic::*;
    let vex = instr.encoding() == EncodingKind::VEX;
    if let Some(exception) = if vex { avx_refused(state) } else { sse_refused(state) } {
        return Err(exception.into());
    }
    let mnemonic = instr.mnemonic();
    let scalar = matches!(mnemonic, Rcpss | Rsqrtss | Vrcpss | Vrsqrtss);
    let model = if matches!(mnemonic, Rcpss | Rcpps | Vrcpss | Vrcpps) { reciprocal } else { reciprocal_root };
    let size = if scalar { 4 } else { instr.op0_register().size() };
    let last = instr.op_count() - 1;
    let mut source = [0; 32];
    if instr.op_kind(last) == OpKind::Register {
        source = read_vector(state, vector_number(instr.op_register(last)));
    } else {
        // That it is not aligned is said before that it is no address.
        if !vex && !scalar && !is_aligned(state, instr) {
            return Err(GP0);
        }
        let at = address(state, instr, size, false)?;
        sys.read(state, at, &mut source[..size], Privilege::Current)?;
    }
    let target = vector_number(instr.op0_register());
    // What is kept: of legacy forms all the rest, of VEX scalars the first source's rest of 128 bits.
    let mut result = match (vex, scalar) {
        (false, _) => read_vector(state, target),
        (true, true) => read_vector(state, vector_number(instr.op1_register())),
        (true, false) => [0; 32],
    };
    if vex && scalar {
        result[16..].fill(0);
    }
    for (from, to) in source[..size].chunks_exact(4).zip(result.chunks_exact_mut(4)) {
        let value = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
        to.copy_from_slice(&model(value).to_le_bytes());
    }
    write_vector(state, target, &result);
    retire(state, instr)
}
