//! Control and debug registers, XCR0, and the translation caches they govern (Intel SDM volume 3, section 2.5;
//! volume 2, MOV to and from control and debug registers, INVPCID, XSETBV).

use super::operand::{self, operand_size, read_operand, read_register, write_operand, write_register};
use super::privileged::require_cpl0;
use super::{ExecError, Executed, Flush, GP0, Privilege, System, UD, retire};
use crate::exception::Exception;
use crate::paging::{PHYSICAL_ADDRESS_MASK, is_canonical};
use crate::state::{CpuState, control::*, gpr, rflags, seg};
use iced_x86::{Instruction, OpKind, Register};

const CR0_KNOWN: u64 = CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;
const CR4_KNOWN: u64 = CR4_TSD
    | CR4_DE
    | CR4_PSE
    | CR4_PAE
    | CR4_PGE
    | CR4_PCE
    | CR4_OSFXSR
    | CR4_OSXMMEXCPT
    | CR4_UMIP
    | CR4_FSGSBASE
    | CR4_PCIDE
    | CR4_OSXSAVE
    | CR4_SMEP
    | CR4_SMAP;
/// Changes of these bits void all cached translations.
const CR4_PAGING: u64 = CR4_PAE | CR4_PGE | CR4_PSE | CR4_PCIDE | CR4_SMEP | CR4_SMAP;
/// MOV to CR3: the new address space's translations are kept. Only with CR4.PCIDE.
const CR3_NO_FLUSH: u64 = 1 << 63;
const XCR0_KNOWN: u64 = XCR0_X87 | XCR0_SSE | XCR0_AVX;

pub(super) fn mov_control(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let (to, from) = (instr.op0_register(), instr.op1_register());
    let number = |register: Register| (register as usize).wrapping_sub(Register::CR0 as usize);
    if to.is_cr() {
        if !matches!(number(to), 0 | 2 | 3 | 4 | 8) {
            return Err(UD);
        }
        require_cpl0(state)?;
        let value = read_register(state, from);
        match number(to) {
            0 => write_cr0(state, value, sys)?,
            2 => state.cr2 = value,
            3 => write_cr3(state, value, sys)?,
            4 => write_cr4(state, value, sys)?,
            _ => {
                if value & !0xF != 0 {
                    return Err(GP0);
                }
                let now = sys.now();
                sys.bus().set_task_priority(now, value as u8);
            }
        }
    } else {
        let value = match number(from) {
            0 => state.cr0,
            2 => state.cr2,
            3 => state.cr3,
            4 => state.cr4,
            8 if state.cpl == 0 => {
                let now = sys.now();
                u64::from(sys.bus().task_priority(now))
            }
            8 => return Err(GP0),
            _ => return Err(UD),
        };
        require_cpl0(state)?;
        write_register(state, to, value);
    }
    retire(state, instr)
}

fn write_cr0(state: &mut CpuState, value: u64, sys: &mut dyn System) -> Result<(), ExecError> {
    if value >> 32 != 0 {
        return Err(GP0);
    }
    let value = value & CR0_KNOWN | CR0_ET;
    let paging = value & CR0_PG != 0;
    let was_paging = state.cr0 & CR0_PG != 0;
    if (paging && value & CR0_PE == 0) || (value & CR0_NW != 0 && value & CR0_CD == 0) {
        return Err(GP0);
    }
    if paging && !was_paging {
        if state.efer & EFER_LME == 0 {
            return Err(ExecError::Unsupported("paging outside long mode (CR0.PG set with EFER.LME clear)"));
        }
        if state.cr4 & CR4_PAE == 0 || state.seg[seg::CS].long() {
            return Err(GP0);
        }
        state.efer |= EFER_LMA;
    } else if !paging && was_paging {
        if state.is_64bit() || state.cr4 & CR4_PCIDE != 0 {
            return Err(GP0);
        }
        state.efer &= !EFER_LMA;
    }
    let changed = state.cr0 ^ value;
    state.cr0 = value;
    if changed & CR0_PE != 0 && value & CR0_PE == 0 {
        state.cpl = 0;
    }
    if changed & (CR0_PG | CR0_WP | CR0_PE) != 0 {
        sys.flush(Flush::All);
    }
    Ok(())
}

fn write_cr3(state: &mut CpuState, value: u64, sys: &mut dyn System) -> Result<(), ExecError> {
    let tagged = state.cr4 & CR4_PCIDE != 0;
    let keep = tagged && value & CR3_NO_FLUSH != 0;
    let value = if tagged { value & !CR3_NO_FLUSH } else { value };
    if value & !PHYSICAL_ADDRESS_MASK != 0 {
        return Err(GP0);
    }
    state.cr3 = value;
    let pcid = if tagged { (value & 0xFFF) as u16 } else { 0 };
    sys.flush(Flush::AddressSpace { pcid, keep });
    Ok(())
}

fn write_cr4(state: &mut CpuState, value: u64, sys: &mut dyn System) -> Result<(), ExecError> {
    let long = state.efer & EFER_LMA != 0;
    let sets_pcide = value & !state.cr4 & CR4_PCIDE != 0;
    if value & !CR4_KNOWN != 0 || (long && value & CR4_PAE == 0) || (sets_pcide && (!long || state.cr3 & 0xFFF != 0)) {
        return Err(GP0);
    }
    let changed = state.cr4 ^ value;
    state.cr4 = value;
    if changed & CR4_PAGING != 0 {
        sys.flush(Flush::All);
    }
    Ok(())
}

pub(super) fn clts(state: &mut CpuState, instr: &Instruction) -> Executed {
    require_cpl0(state)?;
    state.cr0 &= !CR0_TS;
    retire(state, instr)
}

/// LMSW: PE, MP, EM and TS from a 16-bit operand; PE cannot be cleared.
pub(super) fn lmsw(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_cpl0(state)?;
    let value = read_operand(state, instr, 0, 2, sys)?;
    let value = state.cr0 & !(CR0_MP | CR0_EM | CR0_TS) | value & (CR0_PE | CR0_MP | CR0_EM | CR0_TS);
    write_cr0(state, value, sys)?;
    retire(state, instr)
}

pub(super) fn smsw(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    umip(state)?;
    let size = match instr.op0_kind() {
        OpKind::Register => operand_size(instr, 0),
        _ => 2,
    };
    let cr0 = state.cr0;
    write_operand(state, instr, 0, size, cr0, sys)?;
    retire(state, instr)
}

/// User-mode instruction prevention: SGDT, SIDT, SLDT, SMSW and STR need CPL 0 when CR4.UMIP is set.
pub(super) fn umip(state: &CpuState) -> Result<(), ExecError> {
    if state.cpl != 0 && state.cr4 & CR4_UMIP != 0 { Err(GP0) } else { Ok(()) }
}

/// MOV to and from debug registers. The engine looks at them before each instruction.
pub(super) fn mov_debug(state: &mut CpuState, instr: &Instruction) -> Executed {
    const DR7_GD: u64 = 1 << 13;
    const DR6_BD: u64 = 1 << 13;
    let (to, from) = (instr.op0_register(), instr.op1_register());
    let (debug, other) = if to.is_dr() { (to, from) } else { (from, to) };
    let mut number = (debug as usize).wrapping_sub(Register::DR0 as usize);
    if matches!(number, 4 | 5) && state.cr4 & CR4_DE == 0 {
        number += 2;
    }
    if !matches!(number, 0..=3 | 6 | 7) {
        return Err(UD);
    }
    require_cpl0(state)?;
    if state.dr[7] & DR7_GD != 0 {
        return Err(Exception::Debug { dr6: DR6_BD }.into());
    }
    if to.is_dr() {
        let value = read_register(state, other);
        if number >= 6 && value >> 32 != 0 {
            return Err(GP0);
        }
        state.dr[number] = match number {
            6 => value & 0xE00F | 0xFFFF_0FF0,
            7 => value & 0xFFFF_2BFF | 0x400,
            _ => value,
        };
    } else {
        let value = state.dr[number];
        write_register(state, other, value);
    }
    retire(state, instr)
}

pub(super) fn invlpg(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_cpl0(state)?;
    let segment = operand::memory_segment(instr);
    let base = if !state.is_64bit() || segment >= seg::FS { state.seg[segment].base } else { 0 };
    let mut linear = base.wrapping_add(operand::effective_offset(state, instr));
    if !state.is_64bit() {
        linear &= 0xFFFF_FFFF;
    }
    // A non-canonical address has no translation: nothing to forget, no fault.
    if is_canonical(linear) {
        sys.flush(Flush::Page(linear));
    }
    retire(state, instr)
}

pub(super) fn invpcid(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_cpl0(state)?;
    let kind = read_register(state, instr.op0_register());
    if kind > 3 {
        return Err(GP0);
    }
    let at = operand::address(state, instr, 16, false)?;
    let mut descriptor = [0; 16];
    sys.read(state, at, &mut descriptor, Privilege::Current)?;
    let word = u128::from_le_bytes(descriptor);
    let (pcid_field, linear) = (word as u64, (word >> 64) as u64);
    if kind < 2 && (pcid_field >> 12 != 0 || (pcid_field != 0 && state.cr4 & CR4_PCIDE == 0)) {
        return Err(GP0);
    }
    let pcid = pcid_field as u16;
    match kind {
        0 if !is_canonical(linear) => return Err(GP0),
        0 => sys.flush(Flush::PcidPage(pcid, linear)),
        1 => sys.flush(Flush::Pcid(pcid)),
        2 => sys.flush(Flush::All),
        _ => sys.flush(Flush::NonGlobal),
    }
    retire(state, instr)
}

pub(super) fn xgetbv(state: &mut CpuState, instr: &Instruction) -> Executed {
    if state.cr4 & CR4_OSXSAVE == 0 {
        return Err(UD);
    }
    if state.gpr[gpr::RCX] as u32 != 0 {
        return Err(GP0);
    }
    state.gpr[gpr::RAX] = state.xcr0 & 0xFFFF_FFFF;
    state.gpr[gpr::RDX] = state.xcr0 >> 32;
    retire(state, instr)
}

pub(super) fn xsetbv(state: &mut CpuState, instr: &Instruction) -> Executed {
    if state.cr4 & CR4_OSXSAVE == 0 {
        return Err(UD);
    }
    require_cpl0(state)?;
    let value = state.gpr[gpr::RDX] << 32 | state.gpr[gpr::RAX] & 0xFFFF_FFFF;
    let avx_without_sse = value & (XCR0_AVX | XCR0_SSE) == XCR0_AVX;
    if state.gpr[gpr::RCX] as u32 != 0 || value & !XCR0_KNOWN != 0 || value & XCR0_X87 == 0 || avx_without_sse {
        return Err(GP0);
    }
    state.xcr0 = value;
    retire(state, instr)
}

/// True if RFLAGS.NT is set, which IRET refuses in long mode.
pub(super) fn nested_task(state: &CpuState) -> bool {
    state.rflags & rflags::NT != 0
}
