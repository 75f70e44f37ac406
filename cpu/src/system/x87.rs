//! FNSAVE, FRSTOR, FNSTENV and FLDENV: the x87 environment in its old formats (Intel SDM volume 1, section 8.1.10).
//! The instruction and operand pointers and the opcode are always zero.

use super::availability::x87_refused;
use super::operand::{address, unchecked_address};
use super::xsave::normalise_x87;
use super::{ExecError, Executed, Privilege, System, alignment, retire};
use crate::exception::Exception;
use crate::state::CpuState;
use iced_x86::{Code, Instruction};

const ST_BEGIN: usize = 32;

/// True for the 14-byte environment of 16-bit operand size.
fn is_narrow(instr: &Instruction) -> bool {
    matches!(
        instr.code(),
        Code::Fldenv_m14byte
            | Code::Fstenv_m14byte
            | Code::Fnstenv_m14byte
            | Code::Frstor_m94byte
            | Code::Fsave_m94byte
            | Code::Fnsave_m94byte
    )
}

fn word(state: &CpuState, offset: usize) -> u16 {
    u16::from_le_bytes([state.fpu.0[offset], state.fpu.0[offset + 1]])
}

/// The two-bit tag of one non-empty register (Intel SDM volume 1, figure 8-7): 0 valid, 1 zero, 2 special.
fn tag(register: &[u8]) -> u16 {
    let mut significand = [0; 8];
    significand.copy_from_slice(&register[..8]);
    let significand = u64::from_le_bytes(significand);
    let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7FFF;
    match (exponent, significand) {
        (0, 0) => 1,
        (0 | 0x7FFF, _) => 2,
        (_, significand) if significand >> 63 == 0 => 2,
        _ => 0,
    }
}

/// The full tag word of the abridged one.
fn full_tags(state: &CpuState) -> u16 {
    let top = top(state);
    let abridged = state.fpu.0[4];
    (0..8).fold(0, |tags, physical| {
        let stack_index = (physical + 8 - top) % 8;
        let at = ST_BEGIN + stack_index * 16;
        let value = if abridged >> physical & 1 == 0 { 3 } else { tag(&state.fpu.0[at..at + 10]) };
        tags | value << (physical * 2)
    })
}

/// The environment and its size.
fn environment(state: &CpuState, narrow: bool) -> ([u8; 28], usize) {
    let words = [word(state, 0), word(state, 2), full_tags(state)];
    let mut bytes = [0; 28];
    if narrow {
        for (at, word) in words.into_iter().enumerate() {
            bytes[at * 2..at * 2 + 2].copy_from_slice(&word.to_le_bytes());
        }
        return (bytes, 14);
    }
    for (at, word) in words.into_iter().enumerate() {
        // Reserved halves read as ones.
        bytes[at * 4..at * 4 + 4].copy_from_slice(&(u32::from(word) | 0xFFFF_0000).to_le_bytes());
    }
    bytes[24..28].copy_from_slice(&0xFFFF_0000u32.to_le_bytes());
    (bytes, 28)
}

fn load_environment(state: &mut CpuState, bytes: &[u8], narrow: bool) {
    let step = if narrow { 2 } else { 4 };
    let tags = u16::from_le_bytes([bytes[step * 2], bytes[step * 2 + 1]]);
    let abridged = (0..8).fold(0u8, |set, i| set | u8::from(tags >> (i * 2) & 3 != 3) << i);
    state.fpu.0[0..2].copy_from_slice(&bytes[..2]);
    state.fpu.0[2..4].copy_from_slice(&bytes[step..step + 2]);
    state.fpu.0[4] = abridged;
    normalise_x87(state);
}

fn check(state: &CpuState) -> Result<(), ExecError> {
    x87_refused(state).map_or(Ok(()), |exception| Err(exception.into()))
}

/// As [`check`], for instructions that wait: an unmasked error that is pending (FSW.ES) is raised first.
pub(super) fn check_waiting(state: &CpuState) -> Result<(), ExecError> {
    check(state)?;
    if word(state, 2) & 0x80 != 0 { Err(Exception::FloatingPoint.into()) } else { Ok(()) }
}

/// The images are made of words or doublewords.
fn check_alignment(state: &CpuState, instr: &Instruction) -> Result<(), Exception> {
    alignment::check_first(state, unchecked_address(state, instr), if is_narrow(instr) { 2 } else { 4 })
}

pub(super) fn fnstenv(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    check(state)?;
    let (bytes, size) = environment(state, is_narrow(instr));
    check_alignment(state, instr)?;
    let at = address(state, instr, size, true)?;
    sys.write(state, at, &bytes[..size], Privilege::Current)?;
    // All exceptions are masked afterwards.
    state.fpu.0[0] |= 0x3F;
    normalise_x87(state);
    retire(state, instr)
}

pub(super) fn fldenv(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    check_waiting(state)?;
    let narrow = is_narrow(instr);
    let size = if narrow { 14 } else { 28 };
    check_alignment(state, instr)?;
    let at = address(state, instr, size, false)?;
    let mut bytes = [0; 28];
    sys.read(state, at, &mut bytes[..size], Privilege::Current)?;
    let before = top(state);
    load_environment(state, &bytes, narrow);
    // The image holds registers in stack order; the physical registers have not moved.
    let turn = (top(state) + 8 - before) % 8;
    state.fpu.0[ST_BEGIN..ST_BEGIN + 128].rotate_left(turn * 16);
    retire(state, instr)
}

pub(super) fn fnsave(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    check(state)?;
    let (head, size) = environment(state, is_narrow(instr));
    let mut bytes = [0u8; 108];
    bytes[..size].copy_from_slice(&head[..size]);
    for i in 0..8 {
        let from = ST_BEGIN + i * 16;
        bytes[size + i * 10..size + i * 10 + 10].copy_from_slice(&state.fpu.0[from..from + 10]);
    }
    check_alignment(state, instr)?;
    let at = address(state, instr, size + 80, true)?;
    sys.write(state, at, &bytes[..size + 80], Privilege::Current)?;
    // FNINIT: the registers keep their contents and become empty.
    let before = top(state);
    state.fpu.0[..24].fill(0);
    state.fpu.0[..2].copy_from_slice(&0x37Fu16.to_le_bytes());
    rotate_to_top_zero(state, before);
    retire(state, instr)
}

/// TOP, the physical register that is ST(0).
pub(super) fn top(state: &CpuState) -> usize {
    usize::from(word(state, 2) >> 11 & 7)
}

/// The image holds registers in stack order: when TOP becomes 0, ST(i) are the physical registers again.
pub(super) fn rotate_to_top_zero(state: &mut CpuState, top: usize) {
    let registers = &mut state.fpu.0[ST_BEGIN..ST_BEGIN + 128];
    registers.rotate_right(top * 16);
}

pub(super) fn frstor(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    check_waiting(state)?;
    let narrow = is_narrow(instr);
    let size = if narrow { 14 } else { 28 };
    check_alignment(state, instr)?;
    let at = address(state, instr, size + 80, false)?;
    let mut bytes = [0u8; 108];
    sys.read(state, at, &mut bytes[..size + 80], Privilege::Current)?;
    for i in 0..8 {
        let to = ST_BEGIN + i * 16;
        state.fpu.0[to..to + 10].copy_from_slice(&bytes[size + i * 10..size + i * 10 + 10]);
    }
    load_environment(state, &bytes, narrow);
    retire(state, instr)
}
