//! Ordinary integer instructions, for where the engine cannot execute them natively: segments that are not flat,
//! 16-bit code, branches and stack accesses of unusual size.

use super::arithmetic::{self, Shift, result_flags};
use super::operand::{
    Stack, address_size, branch_target, effective_offset, linear, mask, memory_segment, mode_rip, next_rip,
    operand_size, read_memory, read_operand, read_register, sign_extend, write_gpr, write_memory, write_operand,
    write_register,
};
use super::transfers::check_target;
use super::{ExecError, Executed, Outcome, Privilege, System, bits, retire};
use crate::exception::Exception;
use crate::state::{CpuState, gpr, rflags, seg};
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

/// Executes one instruction. Those that are not here are reported as unsupported.
pub(super) fn execute(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    execute_inner(state, instr, sys).map_err(|error| match error {
        // What will be written is fetched as for writing.
        ExecError::Exception(Exception::PageFault { address, error }) if modifies_memory(instr) => {
            ExecError::Exception(Exception::PageFault { address, error: error | 2 })
        }
        other => other,
    })
}

/// The instruction reads its memory operand and then writes it.
fn modifies_memory(instr: &Instruction) -> bool {
    use Mnemonic::*;
    instr.op_count() > 0
        && instr.op_kind(0) == OpKind::Memory
        && matches!(
            instr.mnemonic(),
            Add | Adc
                | Sub
                | Sbb
                | And
                | Or
                | Xor
                | Inc
                | Dec
                | Neg
                | Not
                | Rol
                | Ror
                | Rcl
                | Rcr
                | Shl
                | Sal
                | Shr
                | Sar
                | Shld
                | Shrd
                | Bts
                | Btr
                | Btc
                | Xchg
                | Xadd
                | Cmpxchg
        )
}

fn execute_inner(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    use Mnemonic::*;
    if instr.is_jcc_short_or_near() {
        let taken = condition(state.rflags, instr.condition_code());
        return branch(state, instr, taken);
    }
    let size = if instr.op_count() > 0 { operand_size(instr, 0) } else { 0 };
    match instr.mnemonic() {
        Mov => {
            let value = read_operand(state, instr, 1, size, sys)?;
            write_operand(state, instr, 0, size, value, sys)?;
        }
        Movzx | Movsx | Movsxd => {
            let from = operand_size(instr, 1);
            let value = read_operand(state, instr, 1, from, sys)?;
            let value = if instr.mnemonic() == Movzx { value } else { sign_extend(value, from) };
            write_operand(state, instr, 0, size, value, sys)?;
        }
        Lea => {
            let offset = effective_offset(state, instr);
            write_register(state, instr.op0_register(), offset);
        }
        Add | Adc | Sub | Sbb | Cmp | And | Or | Xor | Test => binary(state, instr, size, sys)?,
        Inc | Dec | Neg | Not => unary(state, instr, size, sys)?,
        Rol | Ror | Rcl | Rcr | Shl | Sal | Shr | Sar => shift(state, instr, size, sys)?,
        Bt | Bts | Btr | Btc => bit_test(state, instr, size, sys)?,
        Xchg | Xadd => exchange(state, instr, size, sys)?,
        Cmpxchg => {
            let found = read_operand(state, instr, 0, size, sys)?;
            let accumulator = state.gpr[gpr::RAX] & mask(size);
            let flags = arithmetic::sub(accumulator, found, false, size).1;
            let value = if found == accumulator { read_operand(state, instr, 1, size, sys)? } else { found };
            // Memory is written in any case; a register that is left alone keeps its upper half.
            if found == accumulator || instr.op0_kind() == OpKind::Memory {
                write_operand(state, instr, 0, size, value, sys)?;
            }
            if found != accumulator {
                write_gpr(state, gpr::RAX, size, found);
            }
            set_status(state, flags);
        }
        Shld | Shrd => {
            let value = read_operand(state, instr, 0, size, sys)?;
            let source = read_operand(state, instr, 1, size, sys)?;
            let count = read_operand(state, instr, 2, 1, sys)?;
            let left = instr.mnemonic() == Shld;
            let (result, flags) = arithmetic::double_shift(left, value, source, count, state.rflags, size);
            write_operand(state, instr, 0, size, result, sys)?;
            set_status(state, flags);
        }
        Bsf | Bsr | Lzcnt | Tzcnt => bits::scan(state, instr, size, sys)?,
        Andn | Blsi | Blsr | Blsmsk | Bextr | Bzhi => bits::manipulate(state, instr, size, sys)?,
        Imul | Mul => multiply(state, instr, size, sys)?,
        Div | Idiv => divide(state, instr, size, sys)?,
        Push | Pop | Leave => stack(state, instr, sys)?,
        Jmp | Call | Ret => return near_transfer(state, instr, sys),
        Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => return count_branch(state, instr),
        Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo => widen(state, instr.mnemonic()),
        Clc => state.rflags &= !rflags::CF,
        Stc => state.rflags |= rflags::CF,
        Cmc => state.rflags ^= rflags::CF,
        Lahf => {
            let flags = state.rflags & 0xD7 | rflags::FIXED;
            write_register(state, Register::AH, flags);
        }
        Sahf => {
            let image = read_register(state, Register::AH) & 0xD5;
            state.rflags = state.rflags & !0xD5 | image;
        }
        Bswap => {
            let value = read_register(state, instr.op0_register());
            let swapped = if size == 8 { value.swap_bytes() } else { u64::from((value as u32).swap_bytes()) };
            write_register(state, instr.op0_register(), swapped);
        }
        _ if instr.condition_code() != ConditionCode::None => conditional(state, instr, size, sys)?,
        _ => return Err(ExecError::Unsupported("the emulation does not have this instruction")),
    }
    retire(state, instr)
}

fn set_status(state: &mut CpuState, flags: u64) {
    state.rflags = state.rflags & !rflags::STATUS | flags;
}

/// Jcc, SETcc, CMOVcc conditions.
pub(super) fn condition(flags: u64, code: ConditionCode) -> bool {
    let set = |bit: u64| flags & bit != 0;
    let less = set(rflags::SF) != set(rflags::OF);
    match code {
        ConditionCode::o => set(rflags::OF),
        ConditionCode::no => !set(rflags::OF),
        ConditionCode::b => set(rflags::CF),
        ConditionCode::ae => !set(rflags::CF),
        ConditionCode::e => set(rflags::ZF),
        ConditionCode::ne => !set(rflags::ZF),
        ConditionCode::be => set(rflags::CF | rflags::ZF),
        ConditionCode::a => !set(rflags::CF | rflags::ZF),
        ConditionCode::s => set(rflags::SF),
        ConditionCode::ns => !set(rflags::SF),
        ConditionCode::p => set(rflags::PF),
        ConditionCode::np => !set(rflags::PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || set(rflags::ZF),
        ConditionCode::g => !less && !set(rflags::ZF),
        ConditionCode::None => false,
    }
}

/// SETcc, CMOVcc. CMOV reads its source in any case.
fn conditional(state: &mut CpuState, instr: &Instruction, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    let taken = condition(state.rflags, instr.condition_code());
    if instr.op_count() == 1 {
        return write_operand(state, instr, 0, 1, u64::from(taken), sys);
    }
    let value = read_operand(state, instr, 1, size, sys)?;
    let old = read_register(state, instr.op0_register());
    write_register(state, instr.op0_register(), if taken { value } else { old });
    Ok(())
}

fn binary(state: &mut CpuState, instr: &Instruction, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    use Mnemonic::*;
    let a = read_operand(state, instr, 0, size, sys)?;
    let b = read_operand(state, instr, 1, size, sys)?;
    let carry = state.rflags & rflags::CF != 0;
    let logic = |value: u64| (value & mask(size), result_flags(value, size));
    let (result, flags) = match instr.mnemonic() {
        Add => arithmetic::add(a, b, false, size),
        Adc => arithmetic::add(a, b, carry, size),
        Sub | Cmp => arithmetic::sub(a, b, false, size),
        Sbb => arithmetic::sub(a, b, carry, size),
        And | Test => logic(a & b),
        Or => logic(a | b),
        _ => logic(a ^ b),
    };
    if !matches!(instr.mnemonic(), Cmp | Test) {
        write_operand(state, instr, 0, size, result, sys)?;
    }
    set_status(state, flags);
    Ok(())
}

fn unary(state: &mut CpuState, instr: &Instruction, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    let value = read_operand(state, instr, 0, size, sys)?;
    let carry = state.rflags & rflags::CF;
    let (result, flags) = match instr.mnemonic() {
        Mnemonic::Inc => {
            let (result, flags) = arithmetic::add(value, 1, false, size);
            (result, flags & !rflags::CF | carry)
        }
        Mnemonic::Dec => {
            let (result, flags) = arithmetic::sub(value, 1, false, size);
            (result, flags & !rflags::CF | carry)
        }
        Mnemonic::Neg => arithmetic::sub(0, value, false, size),
        _ => (!value & mask(size), state.rflags & rflags::STATUS),
    };
    write_operand(state, instr, 0, size, result, sys)?;
    set_status(state, flags);
    Ok(())
}

fn shift(state: &mut CpuState, instr: &Instruction, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    let kind = match instr.mnemonic() {
        Mnemonic::Rol => Shift::Rol,
        Mnemonic::Ror => Shift::Ror,
        Mnemonic::Rcl => Shift::Rcl,
        Mnemonic::Rcr => Shift::Rcr,
        Mnemonic::Shr => Shift::Shr,
        Mnemonic::Sar => Shift::Sar,
        _ => Shift::Shl,
    };
    let value = read_operand(state, instr, 0, size, sys)?;
    let count = read_operand(state, instr, 1, 1, sys)?;
    let (result, flags) = arithmetic::shift(kind, value, count, state.rflags, size);
    write_operand(state, instr, 0, size, result, sys)?;
    set_status(state, flags);
    Ok(())
}

/// Linear address of what BT, BTS, BTR or BTC with a register as bit offset reads. Errors: #GP, #SS.
pub fn bit_string_address(state: &CpuState, instr: &Instruction) -> Result<u64, Exception> {
    let size = instr.op1_register().size();
    let offset = sign_extend(read_register(state, instr.op1_register()), size) as i64;
    let displacement = (offset >> (size * 8).trailing_zeros()).wrapping_mul(size as i64) as u64;
    let operand = effective_offset(state, instr).wrapping_add(displacement) & mask(address_size(instr));
    linear(state, memory_segment(instr), operand, size, instr.mnemonic() != Mnemonic::Bt)
}

/// BT, BTS, BTR, BTC. A register offset into memory reaches outside the operand.
fn bit_test(state: &mut CpuState, instr: &Instruction, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    let bits = size as u64 * 8;
    let modifies = instr.mnemonic() != Mnemonic::Bt;
    let string = instr.op0_kind() == OpKind::Memory && instr.op1_kind() == OpKind::Register;
    let offset = read_operand(state, instr, 1, if string { size } else { 1 }, sys)?;
    let mut at = 0;
    let value = if string {
        at = bit_string_address(state, instr)?;
        read_memory(state, sys, at, size, Privilege::Current)?
    } else {
        read_operand(state, instr, 0, size, sys)?
    };
    let offset = offset % bits;
    let result = match instr.mnemonic() {
        Mnemonic::Bts => value | 1 << offset,
        Mnemonic::Btr => value & !(1 << offset),
        Mnemonic::Btc => value ^ 1 << offset,
        _ => value,
    };
    if modifies && string {
        write_memory(state, sys, at, size, result, Privilege::Current)?;
    } else if modifies {
        write_operand(state, instr, 0, size, result, sys)?;
    }
    state.rflags = state.rflags & !rflags::CF | value >> offset & 1;
    Ok(())
}

fn exchange(state: &mut CpuState, instr: &Instruction, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    let first = read_operand(state, instr, 0, size, sys)?;
    let second = read_operand(state, instr, 1, size, sys)?;
    if instr.mnemonic() == Mnemonic::Xchg {
        // One of the two may be memory: it is written first, as it may fault.
        let memory = if instr.op1_kind() == OpKind::Memory { 1 } else { 0 };
        let values = [second, first];
        write_operand(state, instr, memory, size, values[memory as usize], sys)?;
        return write_operand(state, instr, 1 - memory, size, values[1 - memory as usize], sys);
    }
    let (sum, flags) = arithmetic::add(first, second, false, size);
    if instr.op0_kind() == OpKind::Memory {
        write_operand(state, instr, 0, size, sum, sys)?;
        write_register(state, instr.op1_register(), first);
    } else {
        write_register(state, instr.op1_register(), first);
        write_register(state, instr.op0_register(), sum);
    }
    set_status(state, flags);
    Ok(())
}

fn multiply(state: &mut CpuState, instr: &Instruction, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    let signed = instr.mnemonic() == Mnemonic::Imul;
    let product = |a: u64, b: u64| {
        if signed {
            (i128::from(sign_extend(a, size) as i64) * i128::from(sign_extend(b, size) as i64)) as u128
        } else {
            u128::from(a) * u128::from(b)
        }
    };
    let wide = if instr.op_count() == 1 {
        let source = read_operand(state, instr, 0, size, sys)?;
        let wide = product(state.gpr[gpr::RAX] & mask(size), source);
        if size == 1 {
            write_gpr(state, gpr::RAX, 2, wide as u64);
        } else {
            write_gpr(state, gpr::RAX, size, wide as u64 & mask(size));
            write_gpr(state, gpr::RDX, size, (wide >> (size * 8)) as u64 & mask(size));
        }
        wide
    } else {
        let (a, b) = if instr.op_count() == 2 { (0, 1) } else { (1, 2) };
        let a = read_operand(state, instr, a, size, sys)?;
        let b = read_operand(state, instr, b, size, sys)?;
        let wide = product(a, b);
        write_register(state, instr.op0_register(), wide as u64 & mask(size));
        wide
    };
    // SF, ZF, AF and PF stay as they are.
    let low = wide as u64 & mask(size);
    let fits = if signed { wide as i128 == i128::from(sign_extend(low, size) as i64) } else { wide >> (size * 8) == 0 };
    let overflow = if fits { 0 } else { rflags::CF | rflags::OF };
    state.rflags = state.rflags & !(rflags::CF | rflags::OF) | overflow;
    Ok(())
}

fn divide(state: &mut CpuState, instr: &Instruction, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    let divisor = read_operand(state, instr, 0, size, sys)?;
    if divisor == 0 {
        return Err(Exception::DivideError.into());
    }
    let (rax, rdx) = (state.gpr[gpr::RAX], state.gpr[gpr::RDX]);
    let width = size * 8;
    let dividend = if size == 1 {
        u128::from(rax & 0xFFFF)
    } else {
        u128::from(rax & mask(size)) | u128::from(rdx & mask(size)) << width
    };
    let (quotient, remainder) = if instr.mnemonic() == Mnemonic::Div {
        let divisor = u128::from(divisor);
        if dividend / divisor > u128::from(mask(size)) {
            return Err(Exception::DivideError.into());
        }
        ((dividend / divisor) as u64, (dividend % divisor) as u64)
    } else {
        let unused = 128 - width * 2;
        let dividend = (dividend << unused) as i128 >> unused;
        let divisor = i128::from(sign_extend(divisor, size) as i64);
        let quotient = dividend.checked_div(divisor).ok_or(Exception::DivideError)?;
        let limit = 1i128 << (width - 1);
        if quotient < -limit || quotient >= limit {
            return Err(Exception::DivideError.into());
        }
        (quotient as u64, (dividend % divisor) as u64)
    };
    if size == 1 {
        write_gpr(state, gpr::RAX, 2, quotient & 0xFF | (remainder & 0xFF) << 8);
    } else {
        write_gpr(state, gpr::RAX, size, quotient & mask(size));
        write_gpr(state, gpr::RDX, size, remainder & mask(size));
    }
    // CF and OF stay as they are.
    state.rflags = state.rflags & !(rflags::SF | rflags::ZF | rflags::PF) | rflags::AF;
    Ok(())
}

fn widen(state: &mut CpuState, mnemonic: Mnemonic) {
    let rax = state.gpr[gpr::RAX];
    let copies = |size: usize| if sign_extend(rax, size) >> 63 != 0 { u64::MAX } else { 0 };
    match mnemonic {
        Mnemonic::Cbw => write_gpr(state, gpr::RAX, 2, sign_extend(rax, 1)),
        Mnemonic::Cwde => write_gpr(state, gpr::RAX, 4, sign_extend(rax, 2)),
        Mnemonic::Cdqe => write_gpr(state, gpr::RAX, 8, sign_extend(rax, 4)),
        Mnemonic::Cwd => write_gpr(state, gpr::RDX, 2, copies(2)),
        Mnemonic::Cdq => write_gpr(state, gpr::RDX, 4, copies(4)),
        _ => write_gpr(state, gpr::RDX, 8, copies(8)),
    }
}

/// PUSH, POP, LEAVE
fn stack(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Result<(), ExecError> {
    let moved = instr.stack_pointer_increment();
    let size = moved.unsigned_abs() as usize;
    let mut stack = Stack::of(state);
    match instr.mnemonic() {
        Mnemonic::Push => {
            let value = match instr.op0_kind() {
                OpKind::Register | OpKind::Memory => read_operand(state, instr, 0, size, sys)?,
                _ => read_operand(state, instr, 0, 8, sys)?,
            };
            stack.push(state, sys, size, value)?;
            stack.commit(state);
        }
        Mnemonic::Pop => {
            let value = stack.pop(state, sys, size)?;
            let before = state.gpr[gpr::RSP];
            // An address based on RSP is computed after the increment.
            stack.commit(state);
            if let Err(error) = write_operand(state, instr, 0, size, value, sys) {
                state.gpr[gpr::RSP] = before;
                return Err(error);
            }
        }
        _ => {
            let size = match instr.code() {
                iced_x86::Code::Leavew => 2,
                iced_x86::Code::Leaved => 4,
                _ => 8,
            };
            let mut stack = Stack::at(state, state.gpr[gpr::RBP]);
            let base = stack.pop(state, sys, size)?;
            stack.commit(state);
            write_gpr(state, gpr::RBP, size, base);
        }
    }
    Ok(())
}

/// Goes to `target` in the current code segment, or #GP(0).
fn go(state: &mut CpuState, target: u64) -> Executed {
    let code = state.seg[seg::CS];
    check_target(state, &code, target)?;
    state.rip = target;
    Ok(Outcome::Next)
}

fn branch(state: &mut CpuState, instr: &Instruction, taken: bool) -> Executed {
    if !taken {
        return retire(state, instr);
    }
    let target = branch_target(state, instr);
    go(state, target)
}

/// LOOP, LOOPE, LOOPNE, JCXZ, JECXZ, JRCXZ
fn count_branch(state: &mut CpuState, instr: &Instruction) -> Executed {
    use iced_x86::Code::*;
    let width = match instr.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 2,
        Loop_rel8_16_ECX | Loop_rel8_32_ECX | Loop_rel8_64_ECX | Loope_rel8_16_ECX | Loope_rel8_32_ECX
        | Loope_rel8_64_ECX | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX | Loopne_rel8_64_ECX | Jecxz_rel8_16
        | Jecxz_rel8_32 | Jecxz_rel8_64 => 4,
        _ => 8,
    };
    let count = state.gpr[gpr::RCX] & mask(width);
    if matches!(instr.mnemonic(), Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz) {
        return branch(state, instr, count == 0);
    }
    let count = count.wrapping_sub(1) & mask(width);
    let zero = state.rflags & rflags::ZF != 0;
    let taken = count != 0
        && match instr.mnemonic() {
            Mnemonic::Loope => zero,
            Mnemonic::Loopne => !zero,
            _ => true,
        };
    branch(state, instr, taken)?;
    write_gpr(state, gpr::RCX, width, count);
    Ok(Outcome::Next)
}

/// Near JMP, CALL and RET.
fn near_transfer(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    if instr.mnemonic() == Mnemonic::Ret {
        let size = match instr.code() {
            iced_x86::Code::Retnw | iced_x86::Code::Retnw_imm16 => 2,
            iced_x86::Code::Retnd | iced_x86::Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let mut stack = Stack::of(state);
        let target = stack.pop(state, sys, size)?;
        if instr.op_count() == 1 {
            stack.release(u64::from(instr.immediate16()));
        }
        go(state, target)?;
        stack.commit(state);
        return Ok(Outcome::Next);
    }
    let (target, size) = match instr.op0_kind() {
        OpKind::NearBranch16 => (branch_target(state, instr), 2),
        OpKind::NearBranch32 => (branch_target(state, instr), 4),
        OpKind::NearBranch64 => (branch_target(state, instr), 8),
        _ => {
            let size = operand_size(instr, 0);
            (read_operand(state, instr, 0, size, sys)?, size)
        }
    };
    if instr.mnemonic() == Mnemonic::Jmp {
        return go(state, target);
    }
    let code = state.seg[seg::CS];
    check_target(state, &code, target)?;
    let mut stack = Stack::of(state);
    let back = next_rip(state, instr);
    stack.push(state, sys, size, back)?;
    stack.commit(state);
    go(state, mode_rip(state, target))
}
