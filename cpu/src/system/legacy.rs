//! Instructions that compilers do not use any more, or that access memory twice: ENTER, BOUND, XLAT, PUSHA, POPA,
//! decimal arithmetic, CMPXCHG8B and CMPXCHG16B.

use super::arithmetic::result_flags;
use super::operand::{self, Stack, linear, mask, read_memory, sign_extend, write_gpr, write_memory};
use super::{Executed, GP0, Privilege, System, UD, alignment, retire};
use crate::exception::Exception;
use crate::state::{CpuState, gpr, rflags, seg};
use iced_x86::{Code, Instruction, Mnemonic};

pub(super) fn enter(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let size = match instr.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let (allocated, level) = (u64::from(instr.immediate16()), instr.immediate8_2nd() % 32);
    let mut stack = Stack::of(state);
    let width = if state.is_64bit() { u64::MAX } else { mask(if state.seg[seg::SS].default_big() { 4 } else { 2 }) };
    let mut base = state.gpr[gpr::RBP];
    stack.push(state, sys, size, base)?;
    let frame = stack.pointer();
    if level > 0 {
        for _ in 1..level {
            base = base.wrapping_sub(size as u64);
            let at = linear(state, seg::SS, base & width, size, false)?;
            let value = read_memory(state, sys, at, size, Privilege::Current)?;
            stack.push(state, sys, size, value)?;
        }
        stack.push(state, sys, size, frame)?;
    }
    stack.reserve(allocated);
    // The manual: it faults if a write at the final stack pointer would.
    let at = linear(state, seg::SS, stack.pointer(), 1, true)?;
    alignment::check(state, at, size)?;
    sys.page_pointer(state, at, 1, true, Privilege::Current)?;
    write_gpr(state, gpr::RBP, size, frame);
    stack.commit(state);
    retire(state, instr)
}

pub(super) fn bound(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    if state.is_64bit() {
        return Err(UD);
    }
    let size = instr.op0_register().size();
    // One bound after the other.
    let (segment, offset) = (operand::memory_segment(instr), operand::effective_offset(state, instr));
    let mut bounds = [0; 2];
    for (n, bound) in bounds.iter_mut().enumerate() {
        let offset = offset.wrapping_add((n * size) as u64) & mask(operand::address_size(instr));
        let at = linear(state, segment, offset, size, false)?;
        *bound = read_memory(state, sys, at, size, Privilege::Current)?;
    }
    let signed = |value: u64| sign_extend(value, size) as i64;
    let index = signed(operand::read_register(state, instr.op0_register()));
    if index < signed(bounds[0]) || index > signed(bounds[1]) {
        return Err(Exception::BoundRange.into());
    }
    retire(state, instr)
}

/// AL = byte at [RBX + AL]
pub(super) fn xlat(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let at = operand::address(state, instr, 1, false)?;
    let value = read_memory(state, sys, at, 1, Privilege::Current)?;
    write_gpr(state, gpr::RAX, 1, value);
    retire(state, instr)
}

pub(super) fn pusha(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let size = if instr.mnemonic() == Mnemonic::Pushad { 4 } else { 2 };
    let mut stack = Stack::of(state);
    for register in 0..8 {
        let value = state.gpr[register];
        stack.push(state, sys, size, value)?;
    }
    stack.commit(state);
    retire(state, instr)
}

pub(super) fn popa(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let size = if instr.mnemonic() == Mnemonic::Popad { 4 } else { 2 };
    let mut stack = Stack::of(state);
    let mut values = [0; 8];
    for register in (0..8).rev() {
        values[register] = stack.pop(state, sys, size)?;
    }
    for (register, value) in values.into_iter().enumerate().filter(|(register, _)| *register != gpr::RSP) {
        write_gpr(state, register, size, value);
    }
    stack.commit(state);
    retire(state, instr)
}

/// AAA, AAS, AAM, AAD, DAA, DAS, SALC
pub(super) fn decimal(state: &mut CpuState, instr: &Instruction) -> Executed {
    if state.is_64bit() {
        return Err(UD);
    }
    let ax = state.gpr[gpr::RAX] as u16;
    let (al, ah) = (ax as u8, (ax >> 8) as u8);
    let (af, cf) = (state.rflags & rflags::AF != 0, state.rflags & rflags::CF != 0);
    let flag = |condition: bool, bit: u64| if condition { bit } else { 0 };
    let (ax, flags) = match instr.mnemonic() {
        Mnemonic::Salc => {
            write_gpr(state, gpr::RAX, 1, if cf { 0xFF } else { 0 });
            return retire(state, instr);
        }
        Mnemonic::Aaa | Mnemonic::Aas => {
            let adjusts = al & 0xF > 9 || af;
            let value = match (adjusts, instr.mnemonic()) {
                (true, Mnemonic::Aaa) => ax.wrapping_add(0x106),
                (true, _) => ax.wrapping_sub(6).wrapping_sub(0x100),
                _ => ax,
            };
            (value & 0xFF0F, flag(adjusts, rflags::AF | rflags::CF))
        }
        Mnemonic::Aam => {
            let divisor = instr.immediate8();
            if divisor == 0 {
                return Err(Exception::DivideError.into());
            }
            let low = al % divisor;
            (u16::from(al / divisor) << 8 | u16::from(low), result_flags(u64::from(low), 1))
        }
        Mnemonic::Aad => {
            let low = al.wrapping_add(ah.wrapping_mul(instr.immediate8()));
            (u16::from(low), result_flags(u64::from(low), 1))
        }
        mnemonic => {
            let add = mnemonic == Mnemonic::Daa;
            let low_adjust = al & 0xF > 9 || af;
            let high_adjust = al > 0x99 || cf;
            let mut value = al;
            let mut carry = false;
            if low_adjust {
                carry = cf || if add { al > 0xF9 } else { al < 6 };
                value = if add { value.wrapping_add(6) } else { value.wrapping_sub(6) };
            }
            if high_adjust {
                value = if add { value.wrapping_add(0x60) } else { value.wrapping_sub(0x60) };
                carry = true;
            } else if add {
                carry = false;
            }
            let flags = result_flags(u64::from(value), 1) | flag(low_adjust, rflags::AF) | flag(carry, rflags::CF);
            (ax & 0xFF00 | u16::from(value), flags)
        }
    };
    write_gpr(state, gpr::RAX, 2, u64::from(ax));
    state.rflags = state.rflags & !rflags::STATUS | flags;
    retire(state, instr)
}

/// CMPXCHG8B, CMPXCHG16B. Memory is written in either case, as the processor does.
pub(super) fn compare_exchange_wide(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let half = if instr.mnemonic() == Mnemonic::Cmpxchg16b { 8 } else { 4 };
    let at = operand::address(state, instr, half * 2, true)?;
    if half == 8 && at % 16 != 0 {
        return Err(GP0);
    }
    let mut bytes = [0; 16];
    sys.read(state, at, &mut bytes[..half * 2], Privilege::Current)?;
    let found = u128::from_le_bytes(bytes);
    let join = |low: u64, high: u64| u128::from(low & mask(half)) | u128::from(high & mask(half)) << (half * 8);
    let equal = found == join(state.gpr[gpr::RAX], state.gpr[gpr::RDX]);
    let value = if equal { join(state.gpr[gpr::RBX], state.gpr[gpr::RCX]) } else { found };
    if half == 4 {
        write_memory(state, sys, at, 8, value as u64, Privilege::Current)?;
    } else {
        sys.write(state, at, &value.to_le_bytes(), Privilege::Current)?;
    }
    if !equal {
        write_gpr(state, gpr::RAX, half, found as u64 & mask(half));
        write_gpr(state, gpr::RDX, half, (found >> (half * 8)) as u64 & mask(half));
    }
    state.rflags = state.rflags & !rflags::ZF | if equal { rflags::ZF } else { 0 };
    retire(state, instr)
}
