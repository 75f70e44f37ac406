//! Far CALL and JMP through the call gates of long mode (Intel SDM volume 3, section 5.8.3.1; volume 2, CALL and JMP).
//!
//! The way back is an ordinary far RET. Outside long mode gates are not modelled.

use super::descriptors::{Descriptor, fetch, gp, is_null, np};
use super::interrupts::tss_stack;
use super::operand::{mode_rip, next_rip};
use super::transfers::is_usable_code;
use super::{ExecError, Executed, Outcome, Privilege, System};
use crate::exception::Exception;
use crate::paging::is_canonical;
use crate::state::{CpuState, Segment, gpr, seg};
use iced_x86::{Instruction, Mnemonic};

/// Type of a 64-bit call gate's descriptor. In long mode it is the only gate that far transfers may name.
pub(super) const CALL_GATE: u8 = 0xC;

/// Where a call gate leads.
struct Target {
    descriptor: Descriptor,
    segment: Segment,
    /// The privilege level that the code executes at.
    level: u8,
    rip: u64,
}

/// Reads the upper half of the gate whose lower half is `gate` and checks where it leads.
fn target(
    state: &mut CpuState,
    sys: &mut dyn System,
    selector: u16,
    gate: Descriptor,
    call: bool,
) -> Result<Target, Exception> {
    let (dpl, rpl) = ((gate.raw >> 45 & 3) as u8, (selector & 3) as u8);
    // The gate takes two entries of its table: the index of the second is checked as well.
    let upper = super::descriptors::upper_half(state, sys, selector)?;
    if upper >> 40 & 0x1F != 0 || dpl < state.cpl || dpl < rpl {
        return Err(gp(selector));
    }
    if gate.raw >> 47 & 1 == 0 {
        return Err(np(selector));
    }
    let code = (gate.raw >> 16) as u16;
    if is_null(code) {
        return Err(Exception::GP0);
    }
    let descriptor = fetch(state, sys, code)?;
    let segment = descriptor.segment(code);
    let conforming = segment.kind() & 4 != 0;
    let outer = if call || conforming { segment.dpl() > state.cpl } else { segment.dpl() != state.cpl };
    if !is_usable_code(state, &segment) || !segment.long() || outer {
        return Err(gp(code));
    }
    if !segment.present() {
        return Err(np(code));
    }
    let rip = gate.raw & 0xFFFF | gate.raw >> 32 & 0xFFFF_0000 | upper << 32;
    if !is_canonical(rip) {
        return Err(Exception::GP0);
    }
    let level = if conforming { state.cpl } else { segment.dpl() };
    Ok(Target { descriptor, segment, level, rip })
}

/// Far CALL or JMP whose selector names the call gate `gate`.
pub(super) fn through_call_gate(
    state: &mut CpuState,
    instr: &Instruction,
    sys: &mut dyn System,
    selector: u16,
    gate: Descriptor,
) -> Executed {
    let call = instr.mnemonic() == Mnemonic::Call;
    let target = target(state, sys, selector, gate, call).map_err(ExecError::Exception)?;
    let inward = target.level < state.cpl;
    if call {
        let top = if inward { tss_stack(state, usize::from(target.level), sys)? } else { state.gpr[gpr::RSP] };
        let old = [
            mode_rip(state, next_rip(state, instr)),
            u64::from(state.seg[seg::CS].selector),
            state.gpr[gpr::RSP],
            u64::from(state.seg[seg::SS].selector),
        ];
        let mut bytes = [0u8; 32];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(old) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        // Without a change of stack, its pointer is not pushed.
        let frame = if inward { &bytes[..] } else { &bytes[..16] };
        let pointer = top.wrapping_sub(frame.len() as u64);
        if !is_canonical(pointer) || !is_canonical(top.wrapping_sub(1)) {
            return Err(Exception::StackFault { error: 0 }.into());
        }
        let privilege = if target.level == 3 { Privilege::Current } else { Privilege::Supervisor };
        sys.write(state, pointer, frame, privilege)?;
        target.descriptor.mark_accessed(state, sys)?;
        state.gpr[gpr::RSP] = pointer;
        if inward {
            state.seg[seg::SS] = Segment { selector: u16::from(target.level), ..Segment::default() };
        }
    } else {
        target.descriptor.mark_accessed(state, sys)?;
    }
    let selector = target.segment.selector & !3 | u16::from(target.level);
    state.seg[seg::CS] = Segment { selector, attributes: target.segment.attributes | 1, ..target.segment };
    state.cpl = target.level;
    state.rip = target.rip;
    Ok(Outcome::Next)
}
