//! FXSAVE, FXRSTOR, XSAVE, XRSTOR, LDMXCSR and STMXCSR (Intel SDM volume 1, sections 10.5 and 13.6 to 13.8).
//!
//! The model: FIP, FDP, FOP, FCS and FDS are zero; every enabled component is always in use, so that XSAVE writes
//! XSTATE_BV = requested bits and never applies the init optimisation; reserved bytes of the legacy region from 416
//! on and of the header are not written.

use super::availability::{avx_refused, sse_refused, x87_refused, xsave_refused};
use super::operand::{address, unchecked_address, write_memory};
use super::{ExecError, Executed, GP0, Privilege, System, alignment, retire};
use crate::exception::Exception;
use crate::memory::{PAGE_MASK, PAGE_SIZE};
use crate::state::{CpuState, XSAVE_SIZE, control, gpr};
use iced_x86::{EncodingKind, Instruction};

const LEGACY: usize = 512;
const X87_HEAD: usize = 24;
const MXCSR: usize = 24;
const ST_BEGIN: usize = 32;
const XMM_BEGIN: usize = 160;
const XMM_END: usize = 416;
const YMM_HIGH: usize = 576;
/// Bits of MXCSR that exist.
const MXCSR_MASK: u32 = 0xFFFF;
const X87: u64 = control::XCR0_X87;
const SSE: u64 = control::XCR0_SSE;
const AVX: u64 = control::XCR0_AVX;

/// End of the XMM registers that the current mode can name: 16 in 64-bit mode, 8 otherwise.
fn xmm_end(state: &CpuState) -> usize {
    if state.is_64bit() { XMM_END } else { XMM_BEGIN + 128 }
}

fn ymm_end(state: &CpuState) -> usize {
    YMM_HIGH + if state.is_64bit() { 256 } else { 128 }
}

fn mxcsr_of(image: &[u8]) -> u32 {
    u32::from_le_bytes([image[MXCSR], image[MXCSR + 1], image[MXCSR + 2], image[MXCSR + 3]])
}

/// Brings the x87 part of the state into the form that a processor reports: reserved bits of FCW, the summary bits
/// of FSW, zero for the pointers and opcode of the last instruction and for the padding of the registers.
pub(super) fn normalise_x87(state: &mut CpuState) {
    let image = &mut state.fpu.0;
    let control = u16::from_le_bytes([image[0], image[1]]) & 0x1F7F | 0x40;
    let mut status = u16::from_le_bytes([image[2], image[3]]) & 0x7F7F;
    if status & !control & 0x3F != 0 {
        status |= 0x8080;
    }
    image[0..2].copy_from_slice(&control.to_le_bytes());
    image[2..4].copy_from_slice(&status.to_le_bytes());
    image[5..X87_HEAD].fill(0);
    for register in image[ST_BEGIN..XMM_BEGIN].chunks_exact_mut(16) {
        register[10..].fill(0);
    }
}

fn write_mxcsr(state: &mut CpuState, value: u32) {
    state.fpu.0[MXCSR..MXCSR + 4].copy_from_slice(&value.to_le_bytes());
}

/// FXSAVE and FXRSTOR begin with doublewords: where alignment is checked, that these are aligned is checked before the
/// rest of the operand's address, and that the image is, by #GP.
fn check_alignment(state: &CpuState, instr: &Instruction) -> Result<(), Exception> {
    alignment::check_first(state, unchecked_address(state, instr), 4)
}

/// FXSAVE, FXSAVE64
pub(super) fn fxsave(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    if let Some(exception) = x87_refused(state) {
        return Err(exception.into());
    }
    check_alignment(state, instr)?;
    let at = address(state, instr, LEGACY, true)?;
    if at % 16 != 0 {
        return Err(GP0);
    }
    let end = if state.cr4 & control::CR4_OSFXSR != 0 { xmm_end(state) } else { XMM_BEGIN };
    let image = state.fpu;
    require_writable(state, at, LEGACY, sys)?;
    sys.write(state, at, &image.0[..end], Privilege::Current)?;
    retire(state, instr)
}

/// FXRSTOR, FXRSTOR64
pub(super) fn fxrstor(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    if let Some(exception) = x87_refused(state) {
        return Err(exception.into());
    }
    check_alignment(state, instr)?;
    let at = address(state, instr, LEGACY, false)?;
    if at % 16 != 0 {
        return Err(GP0);
    }
    let mut image = [0u8; LEGACY];
    sys.read(state, at, &mut image, Privilege::Current)?;
    let mxcsr = mxcsr_of(&image);
    let with_sse = state.cr4 & control::CR4_OSFXSR != 0;
    if with_sse && mxcsr & !MXCSR_MASK != 0 {
        return Err(GP0);
    }
    load_x87(state, &image);
    if with_sse {
        write_mxcsr(state, mxcsr);
        let end = xmm_end(state);
        state.fpu.0[XMM_BEGIN..end].copy_from_slice(&image[XMM_BEGIN..end]);
    }
    retire(state, instr)
}

fn load_x87(state: &mut CpuState, image: &[u8]) {
    state.fpu.0[..X87_HEAD].copy_from_slice(&image[..X87_HEAD]);
    state.fpu.0[ST_BEGIN..XMM_BEGIN].copy_from_slice(&image[ST_BEGIN..XMM_BEGIN]);
    normalise_x87(state);
}

fn initialise_x87(state: &mut CpuState) {
    state.fpu.0[..X87_HEAD].fill(0);
    state.fpu.0[..2].copy_from_slice(&0x37Fu16.to_le_bytes());
    state.fpu.0[ST_BEGIN..XMM_BEGIN].fill(0);
}

fn requested(state: &CpuState) -> u64 {
    state.xcr0 & (state.gpr[gpr::RDX] << 32 | state.gpr[gpr::RAX] & 0xFFFF_FFFF)
}

fn area(state: &CpuState, instr: &Instruction, size: usize, write: bool) -> Result<u64, ExecError> {
    if let Some(exception) = xsave_refused(state) {
        return Err(exception.into());
    }
    // That it is not aligned is said before that it is no address.
    if !unchecked_address(state, instr).is_multiple_of(64) {
        return Err(GP0);
    }
    Ok(address(state, instr, size, write)?)
}

/// Errors unless the whole area can be written, its reserved parts too: an area is stored whole or not at all.
fn require_writable(state: &mut CpuState, at: u64, size: usize, sys: &mut dyn System) -> Result<(), ExecError> {
    let last = at.wrapping_add(size as u64 - 1);
    sys.page_pointer(state, at, 1, true, Privilege::Current)?;
    if last / PAGE_SIZE != at / PAGE_SIZE {
        sys.page_pointer(state, last & !PAGE_MASK, 1, true, Privilege::Current)?;
    }
    Ok(())
}

/// Bytes of the area that the requested components reach to, at least the header.
fn area_size(requested: u64) -> usize {
    if requested & AVX != 0 { XSAVE_SIZE } else { YMM_HIGH }
}

/// XSAVE, XSAVE64: standard format.
pub(super) fn xsave(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let requested = requested(state);
    let at = area(state, instr, area_size(requested), true)?;
    require_writable(state, at, area_size(requested), sys)?;
    let image = state.fpu;
    let mut write = |state: &mut CpuState, from: usize, to: usize| {
        sys.write(state, at.wrapping_add(from as u64), &image.0[from..to], Privilege::Current)
    };
    let end = xmm_end(state);
    if requested & (X87 | SSE) == X87 | SSE {
        write(state, 0, end)?;
    } else {
        if requested & X87 != 0 {
            write(state, 0, X87_HEAD)?;
            write(state, ST_BEGIN, XMM_BEGIN)?;
        }
        if requested & (SSE | AVX) != 0 {
            write(state, MXCSR, ST_BEGIN)?;
        }
        if requested & SSE != 0 {
            write(state, XMM_BEGIN, end)?;
        }
    }
    if requested & AVX != 0 {
        let end = ymm_end(state);
        write(state, YMM_HIGH, end)?;
    }
    let header = at.wrapping_add(LEGACY as u64);
    let before = super::operand::read_memory(state, sys, header, 8, Privilege::Current)?;
    write_memory(state, sys, header, 8, before | requested, Privilege::Current)?;
    retire(state, instr)
}

/// XRSTOR, XRSTOR64: standard format only.
pub(super) fn xrstor(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let requested = requested(state);
    let size = area_size(requested);
    let at = area(state, instr, size, false)?;
    let mut image = [0u8; XSAVE_SIZE];
    sys.read(state, at, &mut image[..size], Privilege::Current)?;
    let word = |offset: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&image[offset..offset + 8]);
        u64::from_le_bytes(bytes)
    };
    let present = word(LEGACY);
    // XCOMP_BV and the eight bytes behind it must be zero without the compacted format.
    if present & !state.xcr0 != 0 || word(LEGACY + 8) != 0 || word(LEGACY + 16) != 0 {
        return Err(GP0);
    }
    let mxcsr = mxcsr_of(&image);
    if requested & (SSE | AVX) != 0 {
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(GP0);
        }
        write_mxcsr(state, mxcsr);
    }
    if requested & X87 != 0 {
        if present & X87 != 0 {
            load_x87(state, &image);
        } else {
            initialise_x87(state);
        }
    }
    if requested & SSE != 0 {
        let range = XMM_BEGIN..xmm_end(state);
        if present & SSE != 0 {
            state.fpu.0[range.clone()].copy_from_slice(&image[range]);
        } else {
            state.fpu.0[range].fill(0);
        }
    }
    if requested & AVX != 0 {
        let range = YMM_HIGH..ymm_end(state);
        if present & AVX != 0 {
            state.fpu.0[range.clone()].copy_from_slice(&image[range]);
        } else {
            state.fpu.0[range].fill(0);
        }
    }
    retire(state, instr)
}

fn check_mxcsr_instruction(state: &CpuState, instr: &Instruction) -> Result<(), ExecError> {
    let refused = if instr.encoding() == EncodingKind::VEX { avx_refused(state) } else { sse_refused(state) };
    refused.map_or(Ok(()), |exception| Err(exception.into()))
}

/// LDMXCSR, VLDMXCSR
pub(super) fn ldmxcsr(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    check_mxcsr_instruction(state, instr)?;
    let value = super::operand::read_operand(state, instr, 0, 4, sys)? as u32;
    if value & !MXCSR_MASK != 0 {
        return Err(GP0);
    }
    write_mxcsr(state, value);
    retire(state, instr)
}

/// STMXCSR, VSTMXCSR
pub(super) fn stmxcsr(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    check_mxcsr_instruction(state, instr)?;
    let value = mxcsr_of(&state.fpu.0);
    super::operand::write_operand(state, instr, 0, 4, u64::from(value), sys)?;
    retire(state, instr)
}
