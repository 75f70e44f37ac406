//! Control transfers that change code segment or privilege level: SYSCALL, SYSENTER, IRET, far JMP, CALL and RET
//! (Intel SDM volume 2; volume 3, sections 5.8 and 6.14.3).

use super::control::nested_task;
use super::descriptors::{Descriptor, fetch, gp, is_null, np, stack_segment};
use super::operand::{self, Stack, linear, next_rip};
use super::privileged::{LOADABLE_FLAGS, loaded_flags, require_cpl0};
use super::{ExecError, Executed, GP0, Outcome, Privilege, System, UD, alignment, gates, real};
use crate::exception::Exception;
use crate::model::attributes;
use crate::paging::is_canonical;
use crate::state::{CpuState, Segment, control, gpr, rflags, seg};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

fn flat(selector: u16, attributes: u16, dpl: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attributes: attributes | dpl << 5 }
}

/// SYSCALL. As on every Intel processor, in 64-bit mode only.
pub(super) fn syscall(state: &mut CpuState, instr: &Instruction) -> Executed {
    if state.efer & control::EFER_SCE == 0 || !state.is_64bit() {
        return Err(UD);
    }
    state.gpr[gpr::RCX] = next_rip(state, instr);
    state.gpr[gpr::R11] = state.rflags & !rflags::RF;
    state.rflags = state.rflags & !(state.sfmask | rflags::RF) | rflags::FIXED;
    let selector = (state.star >> 32) as u16 & !3;
    state.seg[seg::CS] = flat(selector, attributes::CODE64, 0);
    state.seg[seg::SS] = flat(selector.wrapping_add(8), attributes::DATA, 0);
    state.cpl = 0;
    state.rip = state.lstar;
    Ok(Outcome::Next)
}

/// SYSRET; `wide` with REX.W, to 64-bit code.
pub(super) fn sysret(state: &mut CpuState, wide: bool) -> Executed {
    if state.efer & control::EFER_SCE == 0 || !state.is_64bit() {
        return Err(UD);
    }
    require_cpl0(state)?;
    let target = state.gpr[gpr::RCX];
    let selector = (state.star >> 48) as u16;
    if wide {
        if !is_canonical(target) {
            return Err(GP0);
        }
        state.seg[seg::CS] = flat(selector.wrapping_add(16) | 3, attributes::CODE64, 3);
        state.rip = target;
    } else {
        state.seg[seg::CS] = flat(selector | 3, attributes::CODE32, 3);
        state.rip = target & 0xFFFF_FFFF;
    }
    state.seg[seg::SS] = flat(selector.wrapping_add(8) | 3, attributes::DATA, 3);
    state.rflags = state.gpr[gpr::R11] & LOADABLE_FLAGS | rflags::FIXED;
    state.cpl = 3;
    Ok(Outcome::Next)
}

pub(super) fn sysenter(state: &mut CpuState) -> Executed {
    let selector = state.sysenter_cs as u16 & !3;
    if state.cr0 & control::CR0_PE == 0 || selector == 0 {
        return Err(GP0);
    }
    let long = state.efer & control::EFER_LMA != 0;
    state.rflags &= !(rflags::IF | rflags::VM | rflags::RF);
    state.seg[seg::CS] = flat(selector, if long { attributes::CODE64 } else { attributes::CODE32 }, 0);
    state.seg[seg::SS] = flat(selector.wrapping_add(8), attributes::DATA, 0);
    state.cpl = 0;
    let width = if long { u64::MAX } else { 0xFFFF_FFFF };
    state.gpr[gpr::RSP] = state.sysenter_esp & width;
    state.rip = state.sysenter_eip & width;
    Ok(Outcome::Next)
}

pub(super) fn sysexit(state: &mut CpuState, wide: bool) -> Executed {
    let selector = state.sysenter_cs as u16 & !3;
    if state.cr0 & control::CR0_PE == 0 || selector == 0 {
        return Err(GP0);
    }
    require_cpl0(state)?;
    let (stack, target) = (state.gpr[gpr::RCX], state.gpr[gpr::RDX]);
    if wide {
        if !is_canonical(stack) || !is_canonical(target) {
            return Err(GP0);
        }
        state.seg[seg::CS] = flat(selector.wrapping_add(32) | 3, attributes::CODE64, 3);
        state.seg[seg::SS] = flat(selector.wrapping_add(40) | 3, attributes::DATA, 3);
        (state.gpr[gpr::RSP], state.rip) = (stack, target);
    } else {
        state.seg[seg::CS] = flat(selector.wrapping_add(16) | 3, attributes::CODE32, 3);
        state.seg[seg::SS] = flat(selector.wrapping_add(24) | 3, attributes::DATA, 3);
        (state.gpr[gpr::RSP], state.rip) = (stack & 0xFFFF_FFFF, target & 0xFFFF_FFFF);
    }
    state.cpl = 3;
    Ok(Outcome::Next)
}

/// #GP(0) unless `rip` can be fetched from in a code segment.
pub(super) fn check_target(state: &CpuState, code: &Segment, rip: u64) -> Result<(), Exception> {
    let long = state.efer & control::EFER_LMA != 0 && code.long();
    let valid = if long { is_canonical(rip) } else { rip <= u64::from(code.limit) };
    if valid { Ok(()) } else { Err(Exception::GP0) }
}

/// True if a descriptor is a code segment whose L and D go together in the current mode.
pub(super) fn is_usable_code(state: &CpuState, segment: &Segment) -> bool {
    let long = state.efer & control::EFER_LMA != 0;
    segment.is_code_or_data() && segment.kind() & 8 != 0 && !(long && segment.long() && segment.default_big())
}

/// The code segment, with the privilege level it shall execute at, that a far JMP or CALL leads to.
fn branch_segment(state: &CpuState, descriptor: Descriptor, selector: u16) -> Result<Segment, ExecError> {
    let segment = descriptor.segment(selector & !3 | u16::from(state.cpl));
    if !segment.is_code_or_data() && state.efer & control::EFER_LMA == 0 {
        match segment.kind() {
            4 | 5 | 0xC => return Err(ExecError::Unsupported("far transfer through a gate outside long mode")),
            1 | 9 => return Err(ExecError::Unsupported("task switch")),
            _ => {}
        }
    }
    if !is_usable_code(state, &segment) {
        return Err(gp(selector).into());
    }
    let conforming = segment.kind() & 4 != 0;
    let permitted = if conforming {
        segment.dpl() <= state.cpl
    } else {
        (selector & 3) as u8 <= state.cpl && segment.dpl() == state.cpl
    };
    if !permitted {
        return Err(gp(selector).into());
    }
    if !segment.present() {
        return Err(np(selector).into());
    }
    Ok(segment)
}

/// Far JMP and CALL, to a code segment or through a call gate.
pub(super) fn far_branch(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let size = match instr.code() {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 | Code::Call_ptr1616 | Code::Call_m1616 => 2,
        Code::Jmp_m1664 | Code::Call_m1664 => 8,
        _ => 4,
    };
    let (selector, offset) = match instr.op0_kind() {
        OpKind::FarBranch16 => (instr.far_branch_selector(), u64::from(instr.far_branch16())),
        OpKind::FarBranch32 => (instr.far_branch_selector(), u64::from(instr.far_branch32())),
        _ => {
            let at = operand::address(state, instr, size + 2, false)?;
            let mut bytes = [0; 16];
            alignment::check(state, at, size)?;
            sys.read(state, at, &mut bytes[..size + 2], Privilege::Current)?;
            let word = u128::from_le_bytes(bytes);
            ((word >> (size * 8)) as u16, word as u64 & operand::mask(size))
        }
    };
    if state.cr0 & control::CR0_PE == 0 {
        return real::far_branch(state, instr, sys, size, selector, offset);
    }
    if is_null(selector) {
        return Err(GP0);
    }
    let descriptor = fetch(state, sys, selector)?;
    let named = descriptor.segment(selector);
    if !named.is_code_or_data() && named.kind() == gates::CALL_GATE && state.efer & control::EFER_LMA != 0 {
        return gates::through_call_gate(state, instr, sys, selector, descriptor);
    }
    let segment = branch_segment(state, descriptor, selector)?;
    check_target(state, &segment, offset)?;
    if instr.mnemonic() == Mnemonic::Call {
        let mut stack = Stack::of(state);
        let (cs, rip) = (state.seg[seg::CS].selector, next_rip(state, instr));
        stack.push(state, sys, size, u64::from(cs))?;
        stack.push(state, sys, size, rip)?;
        descriptor.mark_accessed(state, sys)?;
        stack.commit(state);
    } else {
        descriptor.mark_accessed(state, sys)?;
    }
    state.seg[seg::CS] = Segment { attributes: segment.attributes | 1, ..segment };
    state.rip = offset;
    Ok(Outcome::Next)
}

/// The code segment that a far RET or IRET returns to.
fn return_segment(state: &mut CpuState, sys: &mut dyn System, selector: u16) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let descriptor = fetch(state, sys, selector)?;
    let segment = descriptor.segment(selector);
    let rpl = (selector & 3) as u8;
    let conforming = segment.kind() & 4 != 0;
    let level_fits = if conforming { segment.dpl() <= rpl } else { segment.dpl() == rpl };
    if !is_usable_code(state, &segment) || rpl < state.cpl || !level_fits {
        return Err(gp(selector));
    }
    if !segment.present() {
        return Err(np(selector));
    }
    descriptor.mark_accessed(state, sys)?;
    Ok(Segment { attributes: segment.attributes | 1, ..segment })
}

/// The stack segment for a return to `code`.
fn return_stack(
    state: &mut CpuState,
    sys: &mut dyn System,
    selector: u16,
    code: &Segment,
) -> Result<Segment, Exception> {
    let level = (code.selector & 3) as u8;
    if is_null(selector) {
        let to_64bit = state.efer & control::EFER_LMA != 0 && code.long();
        if !to_64bit || level == 3 || (selector & 3) as u8 != level {
            return Err(Exception::GP0);
        }
        return Ok(Segment { selector, ..Segment::default() });
    }
    stack_segment(state, sys, selector, level)
}

/// After a return to an outer level: segments that the outer level may not use become null, and null selectors lose
/// their RPL.
fn drop_inner_segments(state: &mut CpuState) {
    for which in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let segment = &mut state.seg[which];
        let conforming = segment.kind() & 0xC == 0xC;
        if is_null(segment.selector) {
            segment.selector = 0;
        } else if segment.present() && segment.dpl() < state.cpl && !conforming {
            // The base of FS and GS stays: software in 64-bit mode relies on it.
            let base = if which >= seg::FS { segment.base } else { 0 };
            *segment = Segment { base, ..Segment::default() };
        }
    }
}

/// Commits a return: code segment, RIP, and for a return with stack, SS and RSP.
fn return_to(state: &mut CpuState, code: Segment, rip: u64, stack: Option<(Segment, u64)>) {
    let outer = (code.selector & 3) as u8 > state.cpl;
    state.seg[seg::CS] = code;
    state.cpl = (code.selector & 3) as u8;
    state.rip = rip;
    if let Some((segment, pointer)) = stack {
        state.seg[seg::SS] = segment;
        Stack::at(state, pointer).commit(state);
    }
    if outer {
        drop_inner_segments(state);
    }
}

/// Far RET.
pub(super) fn far_return(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let size = match instr.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let released = if instr.op_count() == 1 { u64::from(instr.immediate16()) } else { 0 };
    let mut stack = Stack::of(state);
    let rip = stack.pop(state, sys, size)?;
    let selector = stack.pop(state, sys, size)? as u16;
    if state.cr0 & control::CR0_PE == 0 {
        real::load_code(state, selector, rip)?;
        stack.release(released);
        stack.commit(state);
        return Ok(Outcome::Next);
    }
    let code = return_segment(state, sys, selector)?;
    check_target(state, &code, rip)?;
    stack.release(released);
    if (selector & 3) as u8 == state.cpl {
        stack.commit(state);
        return_to(state, code, rip, None);
    } else {
        let pointer = stack.pop(state, sys, size)?;
        let ss = stack.pop(state, sys, size)? as u16;
        let segment = return_stack(state, sys, ss, &code)?;
        return_to(state, code, rip, Some((segment, pointer)));
        let mut outer = Stack::of(state);
        outer.release(released);
        outer.commit(state);
    }
    Ok(Outcome::Next)
}

/// IRET, IRETD, IRETQ. In 64-bit mode SS:RSP are always popped.
pub(super) fn iret(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let long = state.efer & control::EFER_LMA != 0;
    if nested_task(state) {
        return Err(if long { GP0 } else { ExecError::Unsupported("IRET to a nested task") });
    }
    let size = match instr.mnemonic() {
        Mnemonic::Iretq => 8,
        Mnemonic::Iretd => 4,
        _ => 2,
    };
    let frame = Stack::of(state);
    let words = if state.is_64bit() { 5 } else { 3 };
    let mut bytes = [0u8; 40];
    let at = linear(state, seg::SS, frame.pointer(), size * words, false)?;
    alignment::check(state, at, size)?;
    sys.read(state, at, &mut bytes[..size * words], Privilege::Current)?;
    let word = |index: usize| {
        let mut value = [0; 8];
        value[..size].copy_from_slice(&bytes[index * size..(index + 1) * size]);
        u64::from_le_bytes(value)
    };
    let (rip, selector, flags) = (word(0), word(1) as u16, word(2));
    if !long && flags & rflags::VM != 0 && state.cpl == 0 {
        return Err(ExecError::Unsupported("IRET to virtual-8086 mode"));
    }
    if state.cr0 & control::CR0_PE == 0 {
        real::load_code(state, selector, rip)?;
        let mut stack = frame;
        stack.release((size * words) as u64);
        stack.commit(state);
        state.rflags = loaded_flags(state, flags, size) | flags & operand::mask(size) & rflags::RF;
        state.nmi_blocked = false;
        return Ok(Outcome::Next);
    }
    let code = return_segment(state, sys, selector)?;
    check_target(state, &code, rip)?;
    let outer = (selector & 3) as u8 > state.cpl;
    let mut stack = frame;
    stack.release((size * words) as u64);
    let new_stack = if state.is_64bit() {
        Some((return_stack(state, sys, word(4) as u16, &code)?, word(3)))
    } else if outer {
        let pointer = stack.pop(state, sys, size)?;
        let ss = stack.pop(state, sys, size)? as u16;
        Some((return_stack(state, sys, ss, &code)?, pointer))
    } else {
        None
    };
    state.rflags = loaded_flags(state, flags, size) | flags & operand::mask(size) & rflags::RF;
    if new_stack.is_none() {
        stack.commit(state);
    }
    return_to(state, code, rip, new_stack);
    state.nmi_blocked = false;
    Ok(Outcome::Next)
}
