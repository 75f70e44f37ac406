//! Segment descriptors, descriptor tables and the instructions on selectors (Intel SDM volume 3, chapter 3 and
//! sections 5.2 to 5.10).

use super::control::umip;
use super::operand::{
    self, Stack, mask, operand_size, read_memory, read_operand, segment_index, write_gpr, write_memory, write_operand,
    write_register,
};
use super::privileged::require_cpl0;
use super::{ExecError, Executed, GP0, Privilege, System, UD, alignment, retire};
use crate::exception::Exception;
use crate::paging::is_canonical;
use crate::state::{CpuState, Segment, TableRegister, control, rflags, seg};
use iced_x86::{Instruction, Mnemonic, OpKind};

/// An 8-byte descriptor and where it lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) raw: u64,
    /// Linear address.
    pub(super) at: u64,
}

impl Descriptor {
    /// The segment register's contents after loading this descriptor through `selector`.
    pub(super) fn segment(self, selector: u16) -> Segment {
        let raw = self.raw;
        let base = raw >> 16 & 0xFF_FFFF | raw >> 56 << 24;
        let limit = (raw & 0xFFFF | raw >> 32 & 0xF_0000) as u32;
        let scaled = if raw >> 55 & 1 != 0 { limit << 12 | 0xFFF } else { limit };
        let attributes = (raw >> 40 & 0xFF | raw >> 44 & 0xF00) as u16;
        Segment { base, limit: scaled, selector, attributes }
    }

    /// Sets the accessed flag in memory, if it is clear.
    pub(super) fn mark_accessed(self, state: &mut CpuState, sys: &mut dyn System) -> Result<(), Exception> {
        self.set_type_bit(state, sys, 1)
    }

    /// Sets bits of the type field in memory.
    fn set_type_bit(self, state: &mut CpuState, sys: &mut dyn System, bit: u64) -> Result<(), Exception> {
        if self.raw >> 40 & bit != 0 {
            return Ok(());
        }
        let byte = self.raw >> 40 & 0xFF | bit;
        write_memory(state, sys, self.at.wrapping_add(5), 1, byte, Privilege::Supervisor)
    }
}

/// #GP(selector)
pub(super) fn gp(selector: u16) -> Exception {
    Exception::GeneralProtection { error: u32::from(selector & !3) }
}

/// #NP(selector)
pub(super) fn np(selector: u16) -> Exception {
    Exception::SegmentNotPresent { error: u32::from(selector & !3) }
}

/// #SS(selector)
pub(super) fn ss(selector: u16) -> Exception {
    Exception::StackFault { error: u32::from(selector & !3) }
}

/// True for selectors 0 to 3.
pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Address of `bytes` bytes of the descriptor that a selector names; None beyond the table's limit.
fn locate(state: &CpuState, selector: u16, bytes: u64) -> Option<u64> {
    let (base, limit) = if selector & 4 == 0 {
        (state.gdtr.base, u64::from(state.gdtr.limit))
    } else if state.ldtr.present() {
        (state.ldtr.base, u64::from(state.ldtr.limit))
    } else {
        return None;
    };
    let offset = u64::from(selector & !7);
    (offset + bytes - 1 <= limit).then(|| base.wrapping_add(offset))
}

/// Reads the descriptor of a selector; None beyond the table's limit.
pub(super) fn find(state: &mut CpuState, sys: &mut dyn System, selector: u16) -> Result<Option<Descriptor>, Exception> {
    let Some(at) = locate(state, selector, 8) else { return Ok(None) };
    let raw = read_memory(state, sys, at, 8, Privilege::Supervisor)?;
    Ok(Some(Descriptor { raw, at }))
}

/// Reads the descriptor of a selector; #GP(selector) beyond the table's limit.
pub(super) fn fetch(state: &mut CpuState, sys: &mut dyn System, selector: u16) -> Result<Descriptor, Exception> {
    find(state, sys, selector)?.ok_or(gp(selector))
}

/// Loads ES, SS, DS, FS or GS with all checks. Nothing changes on an error.
pub(super) fn load_segment(
    state: &mut CpuState,
    sys: &mut dyn System,
    which: usize,
    selector: u16,
) -> Result<(), Exception> {
    if state.cr0 & control::CR0_PE == 0 {
        state.seg[which].selector = selector;
        state.seg[which].base = u64::from(selector) << 4;
        return Ok(());
    }
    state.seg[which] = checked_segment(state, sys, which, selector)?;
    Ok(())
}

fn checked_segment(
    state: &mut CpuState,
    sys: &mut dyn System,
    which: usize,
    selector: u16,
) -> Result<Segment, Exception> {
    let rpl = (selector & 3) as u8;
    if is_null(selector) {
        if which == seg::SS && !(state.is_64bit() && state.cpl < 3 && rpl == state.cpl) {
            return Err(Exception::GP0);
        }
        return Ok(Segment { selector, ..Segment::default() });
    }
    if which == seg::SS {
        return stack_segment(state, sys, selector, state.cpl);
    }
    let descriptor = fetch(state, sys, selector)?;
    let segment = descriptor.segment(selector);
    let code = segment.kind() & 8 != 0;
    if !segment.is_code_or_data() || (code && segment.kind() & 2 == 0) {
        return Err(gp(selector));
    }
    let conforming = code && segment.kind() & 4 != 0;
    if !conforming && (rpl > segment.dpl() || state.cpl > segment.dpl()) {
        return Err(gp(selector));
    }
    if !segment.present() {
        return Err(np(selector));
    }
    descriptor.mark_accessed(state, sys)?;
    Ok(Segment { attributes: segment.attributes | 1, ..segment })
}

/// A non-null stack segment for code at privilege level `cpl`.
pub(super) fn stack_segment(
    state: &mut CpuState,
    sys: &mut dyn System,
    selector: u16,
    cpl: u8,
) -> Result<Segment, Exception> {
    let descriptor = fetch(state, sys, selector)?;
    let segment = descriptor.segment(selector);
    let writable_data = segment.is_code_or_data() && segment.kind() & 0xA == 2;
    if (selector & 3) as u8 != cpl || !writable_data || segment.dpl() != cpl {
        return Err(gp(selector));
    }
    if !segment.present() {
        return Err(ss(selector));
    }
    descriptor.mark_accessed(state, sys)?;
    Ok(Segment { attributes: segment.attributes | 1, ..segment })
}

pub(super) fn mov_segment(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    if instr.op1_register().is_segment_register() {
        let selector = state.seg[segment_index(instr.op1_register())].selector;
        let size = if instr.op0_kind() == OpKind::Register { operand_size(instr, 0) } else { 2 };
        write_operand(state, instr, 0, size, u64::from(selector), sys)?;
        return retire(state, instr);
    }
    let which = segment_index(instr.op0_register());
    if which == seg::CS {
        return Err(UD);
    }
    let selector = read_operand(state, instr, 1, 2, sys)? as u16;
    load_segment(state, sys, which, selector)?;
    state.interrupt_shadow = which == seg::SS;
    retire(state, instr)
}

fn stack_operand_size(instr: &Instruction) -> usize {
    instr.stack_pointer_increment().unsigned_abs() as usize
}

pub(super) fn push_segment(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let size = stack_operand_size(instr);
    let selector = state.seg[segment_index(instr.op0_register())].selector;
    let mut stack = Stack::of(state);
    stack.push(state, sys, size, u64::from(selector))?;
    stack.commit(state);
    retire(state, instr)
}

pub(super) fn pop_segment(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let size = stack_operand_size(instr);
    let which = segment_index(instr.op0_register());
    let mut stack = Stack::of(state);
    let selector = stack.pop(state, sys, size)? as u16;
    load_segment(state, sys, which, selector)?;
    stack.commit(state);
    state.interrupt_shadow = which == seg::SS;
    retire(state, instr)
}

/// LDS, LES, LFS, LGS, LSS: offset, then selector.
pub(super) fn load_far_pointer(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let which = match instr.mnemonic() {
        Mnemonic::Lds => seg::DS,
        Mnemonic::Les => seg::ES,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        _ => seg::SS,
    };
    let size = instr.op0_register().size();
    let at = operand::address(state, instr, size + 2, false)?;
    let mut bytes = [0; 10];
    alignment::check(state, at, size)?;
    sys.read(state, at, &mut bytes[..size + 2], Privilege::Current)?;
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&bytes[..size]);
    load_segment(state, sys, which, selector)?;
    write_register(state, instr.op0_register(), u64::from_le_bytes(offset));
    retire(state, instr)
}

/// LGDT, LIDT
pub(super) fn load_table(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_cpl0(state)?;
    let wide = state.is_64bit();
    let size = if wide { 10 } else { 6 };
    let at = operand::address(state, instr, size, false)?;
    let mut bytes = [0; 10];
    sys.read(state, at, &mut bytes[..size], Privilege::Current)?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = [0; 8];
    base.copy_from_slice(&bytes[2..]);
    let mut base = u64::from_le_bytes(base);
    if matches!(instr.code(), iced_x86::Code::Lgdt_m1632_16 | iced_x86::Code::Lidt_m1632_16) {
        base &= 0xFF_FFFF;
    }
    if !is_canonical(base) {
        return Err(GP0);
    }
    let table = TableRegister { base, limit };
    if instr.mnemonic() == Mnemonic::Lgdt {
        state.gdtr = table;
    } else {
        state.idtr = table;
    }
    retire(state, instr)
}

/// SGDT, SIDT
pub(super) fn store_table(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    umip(state)?;
    let table = if instr.mnemonic() == Mnemonic::Sgdt { state.gdtr } else { state.idtr };
    let size = if state.is_64bit() { 10 } else { 6 };
    let at = operand::address(state, instr, size, true)?;
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    sys.write(state, at, &bytes[..size], Privilege::Current)?;
    retire(state, instr)
}

/// The upper half of a 16-byte descriptor; #GP(selector) if the table ends before it.
pub(super) fn upper_half(state: &mut CpuState, sys: &mut dyn System, selector: u16) -> Result<u64, Exception> {
    let at = locate(state, selector, 16).ok_or(gp(selector))?;
    read_memory(state, sys, at.wrapping_add(8), 8, Privilege::Supervisor)
}

/// Reads the descriptor of an LDT or TSS in the GDT: 16 bytes in long mode, 8 otherwise.
fn system_segment(
    state: &mut CpuState,
    sys: &mut dyn System,
    selector: u16,
    kinds: &[u8],
) -> Result<(Descriptor, Segment), Exception> {
    let long = state.efer & control::EFER_LMA != 0;
    if selector & 4 != 0 || (long && locate(state, selector, 16).is_none()) {
        return Err(gp(selector));
    }
    let descriptor = fetch(state, sys, selector)?;
    let mut segment = descriptor.segment(selector);
    if segment.is_code_or_data() || !kinds.contains(&segment.kind()) {
        return Err(gp(selector));
    }
    if !segment.present() {
        return Err(np(selector));
    }
    if long {
        let upper = read_memory(state, sys, descriptor.at.wrapping_add(8), 8, Privilege::Supervisor)?;
        segment.base |= upper << 32;
        if upper >> 40 & 0x1F != 0 || !is_canonical(segment.base) {
            return Err(gp(selector));
        }
    }
    Ok((descriptor, segment))
}

fn require_protected(state: &CpuState) -> Result<(), ExecError> {
    if state.cr0 & control::CR0_PE == 0 { Err(UD) } else { Ok(()) }
}

pub(super) fn lldt(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_protected(state)?;
    require_cpl0(state)?;
    let selector = read_operand(state, instr, 0, 2, sys)? as u16;
    state.ldtr = if is_null(selector) {
        Segment { selector, ..Segment::default() }
    } else {
        system_segment(state, sys, selector, &[2])?.1
    };
    retire(state, instr)
}

pub(super) fn ltr(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_protected(state)?;
    require_cpl0(state)?;
    let selector = read_operand(state, instr, 0, 2, sys)? as u16;
    if is_null(selector) {
        return Err(GP0);
    }
    let (descriptor, segment) = system_segment(state, sys, selector, &[9])?;
    descriptor.set_type_bit(state, sys, 2)?;
    state.tr = Segment { attributes: segment.attributes | 2, ..segment };
    retire(state, instr)
}

/// SLDT, STR
pub(super) fn store_selector(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_protected(state)?;
    umip(state)?;
    let selector = if instr.mnemonic() == Mnemonic::Str { state.tr.selector } else { state.ldtr.selector };
    let size = if instr.op0_kind() == OpKind::Register { operand_size(instr, 0) } else { 2 };
    write_operand(state, instr, 0, size, u64::from(selector), sys)?;
    retire(state, instr)
}

fn set_zero_flag(state: &mut CpuState, zero: bool) {
    state.rflags = state.rflags & !rflags::ZF | if zero { rflags::ZF } else { 0 };
}

/// The descriptor that LAR, LSL, VERR or VERW is about, if the current code may see it.
fn visible(
    state: &mut CpuState,
    sys: &mut dyn System,
    selector: u16,
) -> Result<Option<(Descriptor, Segment)>, Exception> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(descriptor) = find(state, sys, selector)? else { return Ok(None) };
    let segment = descriptor.segment(selector);
    let conforming = segment.is_code_or_data() && segment.kind() & 0xC == 0xC;
    let hidden = !conforming && (state.cpl > segment.dpl() || (selector & 3) as u8 > segment.dpl());
    Ok((!hidden).then_some((descriptor, segment)))
}

pub(super) fn lar_lsl(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_protected(state)?;
    let selector = read_operand(state, instr, 1, 2, sys)? as u16;
    let lar = instr.mnemonic() == Mnemonic::Lar;
    let long = state.efer & control::EFER_LMA != 0;
    let found = visible(state, sys, selector)?.filter(|(_, segment)| {
        segment.is_code_or_data()
            || match segment.kind() {
                2 | 9 | 0xB => true,
                0xC => lar,
                1 | 3 => !long,
                4 | 5 => lar && !long,
                _ => false,
            }
    });
    if let Some((descriptor, segment)) = found {
        // The manual leaves bits 19:16 undefined; processors show the descriptor's: the limit's upper four.
        let value = if lar { descriptor.raw >> 32 & 0x00FF_FF00 } else { u64::from(segment.limit) };
        write_register(state, instr.op0_register(), value & mask(instr.op0_register().size()));
    }
    set_zero_flag(state, found.is_some());
    retire(state, instr)
}

/// VERR, VERW
pub(super) fn verify(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_protected(state)?;
    let selector = read_operand(state, instr, 0, 2, sys)? as u16;
    let write = instr.mnemonic() == Mnemonic::Verw;
    let accessible = visible(state, sys, selector)?.is_some_and(|(_, segment)| {
        let (code, second) = (segment.kind() & 8 != 0, segment.kind() & 2 != 0);
        segment.is_code_or_data() && if write { !code && second } else { !code || second }
    });
    set_zero_flag(state, accessible);
    retire(state, instr)
}

pub(super) fn arpl(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_protected(state)?;
    let destination = read_operand(state, instr, 0, 2, sys)?;
    let source = read_operand(state, instr, 1, 2, sys)?;
    let adjusts = destination & 3 < source & 3;
    if adjusts {
        let adjusted = destination & !3 | source & 3;
        // Only the selector changes, whatever the operand size.
        match instr.op0_kind() {
            OpKind::Register => write_gpr(state, instr.op0_register().number() & 15, 2, adjusted),
            _ => write_operand(state, instr, 0, 2, adjusted, sys)?,
        }
    }
    set_zero_flag(state, adjusts);
    retire(state, instr)
}
