//! Far transfers and interrupts in real-address mode (Intel SDM volume 3, sections 21.1.1 and 21.1.4).

use super::operand::{Stack, mode_rip, next_rip, read_memory};
use super::{Executed, Outcome, Privilege, System};
use crate::exception::Exception;
use crate::state::{CpuState, rflags, seg};
use iced_x86::{Instruction, Mnemonic};

/// Loads CS:RIP. Limit and attributes of CS stay what they were. #GP(0) beyond the limit.
pub(super) fn load_code(state: &mut CpuState, selector: u16, rip: u64) -> Result<(), Exception> {
    let code = &mut state.seg[seg::CS];
    if rip > u64::from(code.limit) {
        return Err(Exception::GP0);
    }
    code.selector = selector;
    code.base = u64::from(selector) << 4;
    state.rip = rip;
    Ok(())
}

/// Far JMP and CALL with operands of `size` bytes.
pub(super) fn far_branch(
    state: &mut CpuState,
    instr: &Instruction,
    sys: &mut dyn System,
    size: usize,
    selector: u16,
    offset: u64,
) -> Executed {
    let (cs, rip) = (state.seg[seg::CS].selector, next_rip(state, instr));
    let mut stack = Stack::of(state);
    if instr.mnemonic() == Mnemonic::Call {
        stack.push(state, sys, size, u64::from(cs))?;
        stack.push(state, sys, size, rip)?;
    }
    load_code(state, selector, offset)?;
    stack.commit(state);
    Ok(Outcome::Next)
}

/// Enters the handler of a vector through the interrupt vector table at the IDT's base.
pub(super) fn interrupt(
    state: &mut CpuState,
    vector: u8,
    return_rip: u64,
    sys: &mut dyn System,
) -> Result<(), Exception> {
    let offset = u64::from(vector) * 4;
    if offset + 3 > u64::from(state.idtr.limit) {
        return Err(Exception::GeneralProtection { error: u32::from(vector) * 8 + 2 });
    }
    let entry = read_memory(state, sys, state.idtr.base.wrapping_add(offset), 4, Privilege::Supervisor)?;
    let flags = state.rflags;
    let mut stack = Stack::of(state);
    for word in [flags, u64::from(state.seg[seg::CS].selector), mode_rip(state, return_rip)] {
        stack.push(state, sys, 2, word)?;
    }
    load_code(state, (entry >> 16) as u16, entry & 0xFFFF)?;
    stack.commit(state);
    state.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    state.halted = false;
    state.interrupt_shadow = false;
    Ok(())
}
