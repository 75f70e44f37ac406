//! Bit scans and the instructions of BMI that set flags, with the flags that AMD's processors leave where the manual
//! leaves them undefined.

use super::arithmetic::result_flags;
use super::operand::{mask, read_operand, write_register};
use super::{ExecError, System};
use crate::state::{CpuState, rflags};
use iced_x86::{Instruction, Mnemonic};

fn flag(condition: bool, bit: u64) -> u64 {
    if condition { bit } else { 0 }
}

/// BSF, BSR, LZCNT, TZCNT. A scan of zero leaves the destination as it is.
pub(super) fn scan(
    state: &mut CpuState,
    instr: &Instruction,
    size: usize,
    sys: &mut dyn System,
) -> Result<(), ExecError> {
    let value = read_operand(state, instr, 1, size, sys)?;
    let width = (size * 8) as u32;
    let leading = (value << (64 - width)).leading_zeros().min(width);
    let trailing = value.trailing_zeros().min(width);
    let target = instr.op0_register();
    match instr.mnemonic() {
        Mnemonic::Bsf | Mnemonic::Bsr => {
            if value != 0 {
                let index = if instr.mnemonic() == Mnemonic::Bsf { trailing } else { width - 1 - leading };
                write_register(state, target, u64::from(index));
            }
            state.rflags = state.rflags & !rflags::ZF | flag(value == 0, rflags::ZF);
        }
        mnemonic => {
            let count = if mnemonic == Mnemonic::Lzcnt { leading } else { trailing };
            write_register(state, target, u64::from(count));
            // OF stays as it is; the others are clear.
            let flags = flag(value == 0, rflags::CF) | flag(count == 0, rflags::ZF);
            state.rflags = state.rflags & !rflags::STATUS | state.rflags & rflags::OF | flags;
        }
    }
    Ok(())
}

/// ANDN, BLSI, BLSR, BLSMSK, BEXTR, BZHI
pub(super) fn manipulate(
    state: &mut CpuState,
    instr: &Instruction,
    size: usize,
    sys: &mut dyn System,
) -> Result<(), ExecError> {
    let all = mask(size);
    let width = size as u64 * 8;
    let first = read_operand(state, instr, 1, size, sys)?;
    let second = if instr.op_count() == 3 { read_operand(state, instr, 2, size, sys)? } else { 0 };
    let (result, flags) = match instr.mnemonic() {
        Mnemonic::Andn => {
            let result = !first & second & all;
            (result, result_flags(result, size))
        }
        Mnemonic::Blsi => {
            let result = first.wrapping_neg() & first & all;
            (result, result_flags(result, size) | flag(first != 0, rflags::CF))
        }
        Mnemonic::Blsr => {
            let result = first.wrapping_sub(1) & first & all;
            (result, result_flags(result, size) | flag(first == 0, rflags::CF))
        }
        Mnemonic::Blsmsk => {
            let result = (first.wrapping_sub(1) ^ first) & all;
            (result, result_flags(result, size) & !rflags::ZF | flag(first == 0, rflags::CF))
        }
        Mnemonic::Bextr => {
            let (start, length) = (second & 0xFF, second >> 8 & 0xFF);
            let shifted = if start < width { first >> start } else { 0 };
            let result = if length < width { shifted & ((1 << length) - 1) } else { shifted };
            // SF is clear, AF is set.
            (result, result_flags(result, size) & !rflags::SF | rflags::AF)
        }
        _ => {
            let index = second & 0xFF;
            let result = if index < width { first & ((1 << index) - 1) } else { first };
            (result, result_flags(result, size) | flag(index >= width, rflags::CF))
        }
    };
    write_register(state, instr.op0_register(), result);
    state.rflags = state.rflags & !rflags::STATUS | flags;
    Ok(())
}
