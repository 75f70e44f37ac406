//! Operands: general-purpose registers by name, linear addresses of memory operands, the stack.

use super::{ExecError, Privilege, System, alignment};
use crate::exception::Exception;
use crate::paging::is_canonical;
use crate::state::{CpuState, gpr, seg};
use iced_x86::{Code, CodeSize, Instruction, OpKind, Register};

/// All ones in the low `size` bytes; `size` is 1, 2, 4 or 8.
#[inline]
pub(crate) fn mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 }
}

/// Sign-extends the low `size` bytes.
#[inline]
pub(crate) fn sign_extend(value: u64, size: usize) -> u64 {
    let shift = 64 - size.min(8) * 8;
    ((value << shift) as i64 >> shift) as u64
}

/// Index in [`CpuState::gpr`] and bit offset of a general-purpose register.
#[inline]
fn locate(register: Register) -> (usize, u32) {
    let number = register as usize;
    if register.is_gpr8() {
        let number = number - Register::AL as usize;
        match number {
            0..=3 => (number, 0),
            4..=7 => (number - 4, 8),
            _ => (number - 4, 0),
        }
    } else {
        (register.number() & 15, 0)
    }
}

/// Index in [`CpuState::gpr`] of the 64-bit register that `register` is part of.
#[inline]
pub(crate) fn gpr_index(register: Register) -> usize {
    locate(register).0
}

/// Value of a general-purpose register, zero-extended.
#[inline]
pub(crate) fn read_register(state: &CpuState, register: Register) -> u64 {
    let (index, shift) = locate(register);
    state.gpr[index] >> shift & mask(register.size())
}

/// Writes the low `size` bytes of register `index`: 4 bytes clear the upper half, fewer leave the rest.
#[inline]
pub(crate) fn write_gpr(state: &mut CpuState, index: usize, size: usize, value: u64) {
    state.gpr[index] = match size {
        8 => value,
        4 => value & 0xFFFF_FFFF,
        _ => state.gpr[index] & !mask(size) | value & mask(size),
    };
}

/// Writes a general-purpose register by name, with the rules of [`write_gpr`].
#[inline]
pub(crate) fn write_register(state: &mut CpuState, register: Register, value: u64) {
    let (index, shift) = locate(register);
    if shift == 8 {
        state.gpr[index] = state.gpr[index] & !0xFF00 | (value & 0xFF) << 8;
    } else {
        write_gpr(state, index, register.size(), value);
    }
}

/// Cuts a RIP to the width of the current mode.
#[inline]
pub(crate) fn mode_rip(state: &CpuState, rip: u64) -> u64 {
    if state.is_64bit() {
        rip
    } else if state.seg[seg::CS].default_big() {
        rip & 0xFFFF_FFFF
    } else {
        rip & 0xFFFF
    }
}

/// RIP of the instruction behind `instr`.
#[inline]
pub(crate) fn next_rip(state: &CpuState, instr: &Instruction) -> u64 {
    mode_rip(state, state.rip.wrapping_add(instr.len() as u64))
}

/// Index in [`CpuState::seg`] of a segment register.
#[inline]
pub(crate) fn segment_index(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::ES as usize).min(seg::GS)
}

/// The fault for a bad address in a segment: #SS(0) for the stack segment, #GP(0) for others.
pub(crate) fn address_fault(segment: usize) -> Exception {
    if segment == seg::SS { Exception::StackFault { error: 0 } } else { Exception::GP0 }
}

/// Linear address of `size` bytes at `offset` in a segment, with the checks of the current mode: canonical form in
/// 64-bit mode; presence, type and limit otherwise.
#[inline]
pub(crate) fn linear(
    state: &CpuState,
    segment: usize,
    offset: u64,
    size: usize,
    write: bool,
) -> Result<u64, Exception> {
    if state.is_64bit() {
        let base = if segment >= seg::FS { state.seg[segment].base } else { 0 };
        let first = base.wrapping_add(offset);
        if !is_canonical(first) || !is_canonical(first.wrapping_add(size as u64 - 1)) {
            return Err(address_fault(segment));
        }
        return Ok(first);
    }
    let descriptor = &state.seg[segment];
    let (code, second) = (descriptor.kind() & 8 != 0, descriptor.kind() & 2 != 0);
    // `second` is "readable" for code and "writable" for data.
    let type_refused = if write { code || !second } else { code && !second };
    if !descriptor.present() || (type_refused && state.cr0 & crate::state::control::CR0_PE != 0) {
        return Err(address_fault(segment));
    }
    let last = offset + (size as u64 - 1);
    let limit = u64::from(descriptor.limit);
    let in_limit = if !code && descriptor.kind() & 4 != 0 {
        let top = if descriptor.default_big() { 0xFFFF_FFFF } else { 0xFFFF };
        offset > limit && last <= top
    } else {
        last <= limit
    };
    if !in_limit {
        return Err(address_fault(segment));
    }
    Ok(descriptor.base.wrapping_add(offset) & 0xFFFF_FFFF)
}

/// Address size of an instruction's memory operand, in bytes.
pub(crate) fn address_size(instr: &Instruction) -> usize {
    let (base, index) = (instr.memory_base(), instr.memory_index());
    if base != Register::None {
        base.size()
    } else if index.is_gpr() {
        index.size()
    } else {
        match instr.memory_displ_size() {
            2 => 2,
            4 => 4,
            _ => 8,
        }
    }
}

/// Offset in its segment of the memory operand, without a vector index.
#[inline]
pub(crate) fn effective_offset(state: &CpuState, instr: &Instruction) -> u64 {
    let base = instr.memory_base();
    let displacement = instr.memory_displacement64();
    let mut offset = match base {
        Register::None => displacement,
        Register::RIP | Register::EIP => {
            // iced adds the address at which it decoded.
            state.rip.wrapping_add(displacement.wrapping_sub(instr.ip()))
        }
        _ => displacement.wrapping_add(read_register(state, base)),
    };
    let index = instr.memory_index();
    if index.is_gpr() {
        let scale = u64::from(instr.memory_index_scale());
        offset = offset.wrapping_add(read_register(state, index).wrapping_mul(scale));
    }
    offset & mask(address_size(instr))
}

/// Index in [`CpuState::seg`] of the segment that the memory operand is in.
#[inline]
pub(crate) fn memory_segment(instr: &Instruction) -> usize {
    let segment = segment_index(instr.memory_segment());
    if instr.code_size() != CodeSize::Code64 || segment >= seg::FS {
        return segment;
    }
    // 64-bit mode ignores the other prefixes.
    match instr.memory_base().full_register() {
        Register::RSP | Register::RBP => seg::SS,
        _ => seg::DS,
    }
}

/// Linear address of the memory operand `operand` of `instr`: segment base, address-size wrap, limit or canonical
/// check for its whole size. Errors: #GP(0), or #SS(0) in the stack segment.
///
/// The checks are those of a read; operands of unknown size are checked as one byte. For instructions without a
/// memory operand of the ordinary kind it is that of `[RAX]` and without meaning.
pub fn effective_address(state: &CpuState, instr: &Instruction, operand: u32) -> Result<u64, Exception> {
    debug_assert!(operand < instr.op_count() && instr.op_kind(operand) == OpKind::Memory);
    address(state, instr, instr.memory_size().size().max(1), false)
}

/// Linear address of the memory operand, whether or not there can be one.
pub(crate) fn unchecked_address(state: &CpuState, instr: &Instruction) -> u64 {
    let segment = memory_segment(instr);
    let base = if state.is_64bit() && segment < seg::FS { 0 } else { state.seg[segment].base };
    let linear = base.wrapping_add(effective_offset(state, instr));
    if state.is_64bit() { linear } else { linear & 0xFFFF_FFFF }
}

/// Linear address of `size` bytes at the memory operand of `instr`.
#[inline]
pub(crate) fn address(state: &CpuState, instr: &Instruction, size: usize, write: bool) -> Result<u64, Exception> {
    linear(state, memory_segment(instr), effective_offset(state, instr), size, write)
}

/// Reads `size` (1, 2, 4 or 8) bytes at a linear address. Errors: #PF, #AC.
#[inline]
pub(crate) fn read_memory(
    state: &mut CpuState,
    sys: &mut dyn System,
    linear: u64,
    size: usize,
    privilege: Privilege,
) -> Result<u64, Exception> {
    if privilege == Privilege::Current {
        alignment::check(state, linear, size)?;
    }
    let mut bytes = [0; 8];
    sys.read(state, linear, &mut bytes[..size], privilege)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes the low `size` (1, 2, 4 or 8) bytes of a value at a linear address. Errors: #PF, #AC.
#[inline]
pub(crate) fn write_memory(
    state: &mut CpuState,
    sys: &mut dyn System,
    linear: u64,
    size: usize,
    value: u64,
    privilege: Privilege,
) -> Result<(), Exception> {
    if privilege == Privilege::Current {
        alignment::check(state, linear, size)?;
    }
    sys.write(state, linear, &value.to_le_bytes()[..size], privilege)
}

/// Size in bytes of a register or memory operand.
pub(crate) fn operand_size(instr: &Instruction, operand: u32) -> usize {
    match instr.op_kind(operand) {
        OpKind::Register => instr.op_register(operand).size(),
        _ => instr.memory_size().size(),
    }
}

/// Value of operand `operand` (general-purpose register, memory, or immediate), zero-extended from `size` bytes.
pub(crate) fn read_operand(
    state: &mut CpuState,
    instr: &Instruction,
    operand: u32,
    size: usize,
    sys: &mut dyn System,
) -> Result<u64, ExecError> {
    match instr.op_kind(operand) {
        OpKind::Register => {
            let register = instr.op_register(operand);
            if !register.is_gpr() {
                return Err(ExecError::Unsupported("an operand is not a general-purpose register"));
            }
            Ok(read_register(state, register) & mask(size))
        }
        OpKind::Memory => {
            if !matches!(size, 1 | 2 | 4 | 8) {
                return Err(ExecError::Unsupported("a memory operand is not 1, 2, 4 or 8 bytes"));
            }
            let at = address(state, instr, size, false)?;
            Ok(read_memory(state, sys, at, size, Privilege::Current)?)
        }
        kind => match instr.try_immediate(operand) {
            Ok(value) => Ok(value & mask(size)),
            Err(_) => {
                debug_assert!(kind != OpKind::Memory);
                Err(ExecError::Unsupported("an operand is of an unexpected kind"))
            }
        },
    }
}

/// Writes the low `size` bytes of `value` to operand `operand` (general-purpose register or memory).
pub(crate) fn write_operand(
    state: &mut CpuState,
    instr: &Instruction,
    operand: u32,
    size: usize,
    value: u64,
    sys: &mut dyn System,
) -> Result<(), ExecError> {
    match instr.op_kind(operand) {
        OpKind::Register => {
            let register = instr.op_register(operand);
            if !register.is_gpr() {
                return Err(ExecError::Unsupported("an operand is not a general-purpose register"));
            }
            write_register(state, register, value);
            Ok(())
        }
        OpKind::Memory if matches!(size, 1 | 2 | 4 | 8) => {
            let at = address(state, instr, size, true)?;
            Ok(write_memory(state, sys, at, size, value, Privilege::Current)?)
        }
        _ => Err(ExecError::Unsupported("an operand is of an unexpected kind")),
    }
}

/// Absolute target of a near branch with an immediate operand, for the address the instruction is at.
pub(crate) fn branch_target(state: &CpuState, instr: &Instruction) -> u64 {
    let distance = instr.near_branch_target().wrapping_sub(instr.ip());
    let target = state.rip.wrapping_add(distance);
    match instr.op0_kind() {
        OpKind::NearBranch16 => target & 0xFFFF,
        OpKind::NearBranch32 => target & 0xFFFF_FFFF,
        _ => target,
    }
}

/// The stack of the current mode while an instruction pushes or pops: RSP is written back by [`Stack::commit`].
pub(crate) struct Stack {
    pointer: u64,
    /// Width of the stack pointer, in bytes.
    width: usize,
}

impl Stack {
    /// The stack as it is before the instruction.
    pub(crate) fn of(state: &CpuState) -> Stack {
        let width = if state.is_64bit() {
            8
        } else if state.seg[seg::SS].default_big() {
            4
        } else {
            2
        };
        Stack { pointer: state.gpr[gpr::RSP] & mask(width), width }
    }

    /// A stack that starts somewhere else.
    pub(crate) fn at(state: &CpuState, pointer: u64) -> Stack {
        let width = Stack::of(state).width;
        Stack { pointer: pointer & mask(width), width }
    }

    /// The stack pointer, cut to its width.
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Pushes the low `size` bytes of `value`.
    pub(crate) fn push(
        &mut self,
        state: &mut CpuState,
        sys: &mut dyn System,
        size: usize,
        value: u64,
    ) -> Result<(), Exception> {
        let pointer = self.pointer.wrapping_sub(size as u64) & mask(self.width);
        let at = linear(state, seg::SS, pointer, size, true)?;
        write_memory(state, sys, at, size, value, Privilege::Current)?;
        self.pointer = pointer;
        Ok(())
    }

    /// Moves the pointer down without writing.
    pub(crate) fn reserve(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_sub(bytes) & mask(self.width);
    }

    /// Pops `size` bytes.
    pub(crate) fn pop(&mut self, state: &mut CpuState, sys: &mut dyn System, size: usize) -> Result<u64, Exception> {
        let at = linear(state, seg::SS, self.pointer, size, false)?;
        let value = read_memory(state, sys, at, size, Privilege::Current)?;
        self.release(size as u64);
        Ok(value)
    }

    /// Moves the pointer up without reading.
    pub(crate) fn release(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes) & mask(self.width);
    }

    /// Writes the pointer back to RSP, ESP or SP.
    pub(crate) fn commit(&self, state: &mut CpuState) {
        write_gpr(state, gpr::RSP, self.width, self.pointer);
    }
}

/// MOV between general-purpose and other registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpecialMove {
    /// An ordinary MOV.
    None,
    /// To or from a segment register.
    Segment,
    /// To or from a control register.
    Control,
    /// To or from a debug register.
    Debug,
}

/// Which kind of MOV `instr` is.
pub(crate) fn special_move(instr: &Instruction) -> SpecialMove {
    match instr.code() {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => SpecialMove::Segment,
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => SpecialMove::Segment,
        Code::Mov_r32_cr | Code::Mov_r64_cr | Code::Mov_cr_r32 | Code::Mov_cr_r64 => SpecialMove::Control,
        Code::Mov_r32_dr | Code::Mov_r64_dr | Code::Mov_dr_r32 | Code::Mov_dr_r64 => SpecialMove::Debug,
        _ => SpecialMove::None,
    }
}

/// True for far JMP and CALL.
pub(crate) fn is_far(instr: &Instruction) -> bool {
    matches!(
        instr.code(),
        Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_ptr1616
            | Code::Call_ptr1632
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    )
}
