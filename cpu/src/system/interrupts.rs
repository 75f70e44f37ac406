//! Delivery of interrupts and exceptions through the IDT in long mode (Intel SDM volume 3, sections 6.8, 6.12 to
//! 6.15), and INT n, INT3, INT1, INTO.

use super::descriptors::{Descriptor, find, gp, is_null, np};
use super::operand::{mode_rip, next_rip, read_memory};
use super::transfers::is_usable_code;
use super::{ExecError, Executed, Outcome, Privilege, System, UD, real, retire};
use crate::exception::Exception;
use crate::paging::is_canonical;
use crate::state::{CpuState, Segment, control, gpr, rflags, seg};
use iced_x86::{Instruction, Mnemonic};

/// A fault while delivering a double fault, or any event without a usable IDT: the processor shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("triple fault")]
pub struct TripleFault;

const INTERRUPT_GATE: u64 = 0xE;
const TRAP_GATE: u64 = 0xF;

/// What is delivered.
#[derive(Clone, Copy)]
struct Event {
    vector: u8,
    error_code: Option<u32>,
    /// RIP that the handler returns to.
    return_rip: u64,
    /// INT n, INT3 or INTO: the gate's DPL is checked.
    software: bool,
    /// Not caused by an INT instruction: faults during delivery say so with EXT.
    external: bool,
    /// The pushed flags have RF set: a fault, whose instruction executes again.
    resume: bool,
}

/// How exceptions combine into a double fault (Intel SDM volume 3, table 6-5).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(exception: Exception) -> Class {
    match exception {
        Exception::DivideError
        | Exception::InvalidTss { .. }
        | Exception::SegmentNotPresent { .. }
        | Exception::StackFault { .. }
        | Exception::GeneralProtection { .. } => Class::Contributory,
        Exception::PageFault { .. } => Class::PageFault,
        Exception::DoubleFault => Class::DoubleFault,
        _ => Class::Benign,
    }
}

fn is_fault(exception: Exception) -> bool {
    !matches!(exception, Exception::Debug { .. } | Exception::Breakpoint | Exception::Overflow | Exception::DoubleFault)
}

/// Delivers an exception: pushes its frame and enters its handler, or that of the double fault it turns into.
/// `state.rip` is that of the faulting instruction, or for traps that of the next one. CR2 and DR6 are set here.
/// Retires nothing.
pub fn deliver_exception(state: &mut CpuState, exception: Exception, sys: &mut dyn System) -> Result<(), TripleFault> {
    let mut current = exception;
    loop {
        match current {
            Exception::PageFault { address, .. } => state.cr2 = address,
            Exception::Debug { dr6 } => {
                // B0 to B3 say what has just been met; the other bits add up until software clears them.
                state.dr[6] = state.dr[6] & !0xF | dr6;
                state.dr[7] &= !(1 << 13);
            }
            _ => {}
        }
        let event = Event {
            vector: current.vector(),
            error_code: current.error_code(),
            return_rip: state.rip,
            software: false,
            external: true,
            resume: is_fault(current),
        };
        let Err(second) = deliver(state, &event, sys) else { return Ok(()) };
        current = match (class(current), class(second)) {
            (Class::DoubleFault, _) => return Err(TripleFault),
            (Class::Contributory, Class::Contributory) => Exception::DoubleFault,
            (Class::PageFault, Class::Contributory | Class::PageFault) => {
                if let Exception::PageFault { address, .. } = second {
                    state.cr2 = address;
                }
                Exception::DoubleFault
            }
            _ => second,
        };
    }
}

/// Delivers an external interrupt. The caller has checked that the vCPU accepts one.
pub fn deliver_interrupt(state: &mut CpuState, vector: u8, sys: &mut dyn System) -> Result<(), TripleFault> {
    let event =
        Event { vector, error_code: None, return_rip: state.rip, software: false, external: true, resume: false };
    match deliver(state, &event, sys) {
        Ok(()) => Ok(()),
        Err(exception) => deliver_exception(state, exception, sys),
    }
}

/// Delivers a non-maskable interrupt; others wait until the next IRET. The caller has checked that none is blocked.
pub fn deliver_nmi(state: &mut CpuState, sys: &mut dyn System) -> Result<(), TripleFault> {
    deliver_interrupt(state, 2, sys)?;
    state.nmi_blocked = true;
    Ok(())
}

/// INT n, INT3, INT1, INTO
pub(super) fn software(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let (vector, software) = match instr.mnemonic() {
        Mnemonic::Int3 => (3, true),
        Mnemonic::Int1 => (1, false),
        Mnemonic::Into if state.is_64bit() => return Err(UD),
        Mnemonic::Into if state.rflags & rflags::OF == 0 => return retire(state, instr),
        Mnemonic::Into => (4, true),
        _ => (instr.immediate8(), true),
    };
    if state.efer & control::EFER_LMA == 0 && state.cr0 & control::CR0_PE != 0 {
        return Err(ExecError::Unsupported("INT in protected mode outside long mode"));
    }
    let return_rip = next_rip(state, instr);
    let event = Event { vector, error_code: None, return_rip, software, external: !software, resume: false };
    deliver(state, &event, sys)?;
    Ok(Outcome::Next)
}

/// Adds the EXT bit to the error code of a fault found while delivering an event.
fn with_ext(exception: Exception, external: bool) -> Exception {
    let ext = u32::from(external);
    match exception {
        Exception::InvalidTss { error } => Exception::InvalidTss { error: error | ext },
        Exception::SegmentNotPresent { error } => Exception::SegmentNotPresent { error: error | ext },
        Exception::StackFault { error } => Exception::StackFault { error: error | ext },
        Exception::GeneralProtection { error } => Exception::GeneralProtection { error: error | ext },
        other => other,
    }
}

fn deliver(state: &mut CpuState, event: &Event, sys: &mut dyn System) -> Result<(), Exception> {
    enter(state, event, sys).map_err(|exception| with_ext(exception, event.external))
}

/// A gate of the IDT.
struct Gate {
    kind: u64,
    ist: usize,
    selector: u16,
    offset: u64,
}

fn read_gate(state: &mut CpuState, event: &Event, sys: &mut dyn System) -> Result<Gate, Exception> {
    let offset = u64::from(event.vector) * 16;
    // Bit 1: the index is one of the IDT.
    let index = u32::from(event.vector) * 8 + 2;
    if offset + 15 > u64::from(state.idtr.limit) {
        return Err(Exception::GeneralProtection { error: index });
    }
    let mut bytes = [0; 16];
    sys.read(state, state.idtr.base.wrapping_add(offset), &mut bytes, Privilege::Supervisor)?;
    let word = u128::from_le_bytes(bytes);
    let (low, high) = (word as u64, (word >> 64) as u64);
    let kind = low >> 40 & 0x1F;
    let dpl = (low >> 45 & 3) as u8;
    if !matches!(kind, INTERRUPT_GATE | TRAP_GATE) || high >> 40 & 0x1F != 0 || (event.software && dpl < state.cpl) {
        return Err(Exception::GeneralProtection { error: index });
    }
    if low >> 47 & 1 == 0 {
        return Err(Exception::SegmentNotPresent { error: index });
    }
    let offset = low & 0xFFFF | low >> 32 & 0xFFFF_0000 | high << 32;
    Ok(Gate { kind, ist: (low >> 32 & 7) as usize, selector: (low >> 16) as u16, offset })
}

/// Stack pointer number `index` of the 64-bit TSS: 0..=2 are RSP0..RSP2, 4..=10 are IST1..IST7.
pub(super) fn tss_stack(state: &mut CpuState, index: usize, sys: &mut dyn System) -> Result<u64, Exception> {
    let offset = 4 + index as u64 * 8;
    if !state.tr.present() || offset + 7 > u64::from(state.tr.limit) {
        return Err(Exception::InvalidTss { error: u32::from(state.tr.selector & !3) });
    }
    let pointer = read_memory(state, sys, state.tr.base.wrapping_add(offset), 8, Privilege::Supervisor)?;
    if is_canonical(pointer) { Ok(pointer) } else { Err(Exception::StackFault { error: 0 }) }
}

/// The handler's code segment and the privilege level it executes at.
fn handler_segment(
    state: &mut CpuState,
    gate: &Gate,
    sys: &mut dyn System,
) -> Result<(Descriptor, Segment, u8), Exception> {
    if is_null(gate.selector) {
        return Err(Exception::GP0);
    }
    let descriptor = find(state, sys, gate.selector)?.ok_or(gp(gate.selector))?;
    let segment = descriptor.segment(gate.selector);
    if !is_usable_code(state, &segment) || !segment.long() || segment.dpl() > state.cpl {
        return Err(gp(gate.selector));
    }
    if !segment.present() {
        return Err(np(gate.selector));
    }
    let conforming = segment.kind() & 4 != 0;
    let level = if conforming { state.cpl } else { segment.dpl() };
    Ok((descriptor, segment, level))
}

fn enter(state: &mut CpuState, event: &Event, sys: &mut dyn System) -> Result<(), Exception> {
    if state.cr0 & control::CR0_PE == 0 {
        return real::interrupt(state, event.vector, event.return_rip, sys);
    }
    if state.efer & control::EFER_LMA == 0 {
        // No gate of this model fits outside long mode: the double fault that follows finds none either.
        return Err(Exception::GeneralProtection { error: u32::from(event.vector) * 8 + 2 });
    }
    let gate = read_gate(state, event, sys)?;
    let (descriptor, segment, level) = handler_segment(state, &gate, sys)?;
    let inward = level < state.cpl;
    let top = if gate.ist != 0 {
        tss_stack(state, gate.ist + 3, sys)?
    } else if inward {
        tss_stack(state, usize::from(level), sys)?
    } else {
        state.gpr[gpr::RSP]
    };
    if !is_canonical(gate.offset) {
        return Err(Exception::GP0);
    }

    let mut flags = state.rflags & !rflags::RF;
    if event.resume {
        flags |= rflags::RF;
    }
    let words = [
        u64::from(event.error_code.unwrap_or(0)),
        mode_rip(state, event.return_rip),
        u64::from(state.seg[seg::CS].selector),
        flags,
        state.gpr[gpr::RSP],
        u64::from(state.seg[seg::SS].selector),
    ];
    let skip = if event.error_code.is_some() { 0 } else { 1 };
    let mut bytes = [0u8; 48];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    let frame = &bytes[skip * 8..];
    let pointer = (top & !0xF).wrapping_sub(frame.len() as u64);
    if !is_canonical(pointer) || !is_canonical((top & !0xF).wrapping_sub(1)) {
        return Err(Exception::StackFault { error: 0 });
    }
    let privilege = if level == 3 { Privilege::Current } else { Privilege::Supervisor };
    sys.write(state, pointer, frame, privilege)?;
    descriptor.mark_accessed(state, sys)?;

    if inward {
        state.seg[seg::SS] = Segment { selector: u16::from(level), ..Segment::default() };
    }
    state.seg[seg::CS] =
        Segment { selector: gate.selector & !3 | u16::from(level), attributes: segment.attributes | 1, ..segment };
    state.cpl = level;
    state.gpr[gpr::RSP] = pointer;
    state.rip = gate.offset;
    let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
    if gate.kind == INTERRUPT_GATE {
        cleared |= rflags::IF;
    }
    state.rflags &= !cleared;
    state.halted = false;
    state.interrupt_shadow = false;
    Ok(())
}
