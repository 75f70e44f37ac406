//! Vector accesses with a mask: MASKMOVQ, (V)MASKMOVDQU, VMASKMOV, VPMASKMOV, and gathers. Elements that are masked
//! out are not accessed and cannot fault.

use super::availability::{avx_refused, refused};
use super::operand::{address_size, linear, mask, memory_segment, read_register, sign_extend};
use super::{ExecError, Executed, Privilege, System, UD, alignment, retire, x87};
use crate::exception::Exception;
use crate::memory::PAGE_SIZE;
use crate::state::{CpuState, gpr, seg};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

const ST_BEGIN: usize = 32;
const XMM_BEGIN: usize = 160;
const YMM_HIGH: usize = 576;
const LANE: usize = 16;
type Vector = [u8; 32];

pub(super) fn vector_number(register: Register) -> usize {
    register.number() & 15
}

pub(super) fn read_vector(state: &CpuState, number: usize) -> Vector {
    let mut value = [0; 32];
    value[..LANE].copy_from_slice(&state.fpu.0[XMM_BEGIN + number * LANE..][..LANE]);
    value[LANE..].copy_from_slice(&state.fpu.0[YMM_HIGH + number * LANE..][..LANE]);
    value
}

pub(super) fn write_vector(state: &mut CpuState, number: usize, value: &Vector) {
    state.fpu.0[XMM_BEGIN + number * LANE..][..LANE].copy_from_slice(&value[..LANE]);
    state.fpu.0[YMM_HIGH + number * LANE..][..LANE].copy_from_slice(&value[LANE..]);
}

fn element(vector: &[u8], index: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&vector[index * size..(index + 1) * size]);
    u64::from_le_bytes(bytes)
}

fn set_element(vector: &mut [u8], index: usize, size: usize, value: u64) {
    vector[index * size..(index + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
}

fn selected(vector: &[u8], index: usize, size: usize) -> bool {
    vector[(index + 1) * size - 1] & 0x80 != 0
}

/// One element of a masked access: whether it is aligned is never checked.
fn read_element(state: &mut CpuState, sys: &mut dyn System, at: u64, size: usize) -> Result<u64, Exception> {
    let mut bytes = [0; 8];
    sys.read(state, at, &mut bytes[..size], Privilege::Current)?;
    Ok(u64::from_le_bytes(bytes))
}

/// MASKMOVQ, MASKMOVDQU, VMASKMOVDQU: bytes whose mask byte is negative go to DS:RDI.
pub(super) fn maskmov_bytes(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    if let Some(exception) = refused(state, instr) {
        return Err(exception.into());
    }
    let mmx = instr.mnemonic() == Mnemonic::Maskmovq;
    if mmx {
        x87::check_waiting(state)?;
    }
    let width = match instr.op0_kind() {
        OpKind::MemorySegDI => 2,
        OpKind::MemorySegEDI => 4,
        _ => 8,
    };
    let (source, mask_bytes, length) = if mmx {
        (read_mmx(state, instr.op1_register()), read_mmx(state, instr.op2_register()), 8)
    } else {
        let number = |operand| vector_number(instr.op_register(operand));
        (read_vector(state, number(1)), read_vector(state, number(2)), LANE)
    };
    let offset = state.gpr[gpr::RDI] & mask(width);
    let at = linear(state, memory_segment(instr), offset, length, true)?;
    alignment::check(state, at, 8)?;
    store_selected(state, sys, at, &source[..length], |byte| mask_bytes[byte] & 0x80 != 0)?;
    if mmx {
        // Like every MMX instruction: TOP becomes 0 and all registers valid.
        let top = x87::top(state);
        x87::rotate_to_top_zero(state, top);
        state.fpu.0[3] &= !0x38;
        state.fpu.0[4] = 0xFF;
    }
    retire(state, instr)
}

/// Stores the selected bytes of `source` at `at`. Nothing is stored unless all of them can be, and pages without
/// one are not touched.
fn store_selected(
    state: &mut CpuState,
    sys: &mut dyn System,
    at: u64,
    source: &[u8],
    selected: impl Fn(usize) -> bool,
) -> Result<(), Exception> {
    let Some(first) = (0..source.len()).find(|byte| selected(*byte)) else { return Ok(()) };
    let last = (first..source.len()).rev().find(|byte| selected(*byte)).unwrap_or(first);
    let start = at.wrapping_add(first as u64);
    let crosses = start % PAGE_SIZE + (last - first) as u64 >= PAGE_SIZE;
    if crosses {
        // There is one vCPU: writing back what lies between the selected bytes is not seen by anyone.
        let mut bytes = [0; 32];
        let bytes = &mut bytes[..=last - first];
        sys.read(state, start, bytes, Privilege::Current).map_err(|exception| match exception {
            // The page that cannot be read cannot be written either: say that it was a write.
            Exception::PageFault { address, error } => Exception::PageFault { address, error: error | 2 },
            other => other,
        })?;
        for byte in (first..=last).filter(|byte| selected(*byte)) {
            bytes[byte - first] = source[byte];
        }
        return sys.write(state, start, bytes, Privilege::Current);
    }
    let mut byte = first;
    while byte <= last {
        if !selected(byte) {
            byte += 1;
            continue;
        }
        let run = (byte..=last).take_while(|byte| selected(*byte)).count();
        sys.write(state, at.wrapping_add(byte as u64), &source[byte..byte + run], Privilege::Current)?;
        byte += run;
    }
    Ok(())
}

/// The image holds x87 registers in stack order, and MMX names physical ones.
fn read_mmx(state: &CpuState, register: Register) -> Vector {
    let index = (register.number() + 8 - x87::top(state)) % 8;
    let mut value = [0; 32];
    value[..8].copy_from_slice(&state.fpu.0[ST_BEGIN + index * 16..][..8]);
    value
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ, both directions.
pub(super) fn vmaskmov(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    if let Some(exception) = avx_refused(state) {
        return Err(exception.into());
    }
    let size = match instr.mnemonic() {
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => 4,
        _ => 8,
    };
    let length = instr.op1_register().size();
    let mask_bytes = read_vector(state, vector_number(instr.op1_register()));
    let store = instr.op0_kind() == OpKind::Memory;
    let (segment, offset) = (memory_segment(instr), super::operand::effective_offset(state, instr));
    let wrap = mask(address_size(instr));
    let wraps = offset > wrap - (length as u64 - 1);
    if store
        && !wraps
        && let Ok(at) = linear(state, segment, offset, length, true)
    {
        let source = read_vector(state, vector_number(instr.op2_register()));
        store_selected(state, sys, at, &source[..length], |byte| selected(&mask_bytes, byte / size, size))?;
        return retire(state, instr);
    }
    let source = if store { read_vector(state, vector_number(instr.op2_register())) } else { [0; 32] };
    let mut loaded = [0; 32];
    for index in (0..length / size).filter(|index| selected(&mask_bytes, *index, size)) {
        let offset = offset.wrapping_add((index * size) as u64) & wrap;
        let at = linear(state, segment, offset, size, store)?;
        if store {
            sys.write(state, at, &element(&source, index, size).to_le_bytes()[..size], Privilege::Current)?;
        } else {
            set_element(&mut loaded, index, size, read_element(state, sys, at, size)?);
        }
    }
    if !store {
        write_vector(state, vector_number(instr.op0_register()), &loaded);
    }
    retire(state, instr)
}

/// VGATHER*, VPGATHER*. On a fault the elements below the faulting one are done and their mask is clear.
pub(super) fn gather(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    use Mnemonic::*;
    if let Some(exception) = avx_refused(state) {
        return Err(exception.into());
    }
    let (index_size, size) = match instr.mnemonic() {
        Vgatherdps | Vpgatherdd => (4, 4),
        Vgatherdpd | Vpgatherdq => (4, 8),
        Vgatherqps | Vpgatherqd => (8, 4),
        _ => (8, 8),
    };
    let (target, mask_register) = (instr.op0_register(), instr.op2_register());
    let index_register = instr.memory_index();
    let numbers = [target, mask_register, index_register].map(vector_number);
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(UD);
    }
    let count = (target.size() / size).min(index_register.size() / index_size);
    let indices = read_vector(state, numbers[2]);
    let mut mask_bytes = read_vector(state, numbers[1]);
    let mut values = read_vector(state, numbers[0]);
    let address = Address::of(state, instr);
    for index in 0..count {
        if selected(&mask_bytes, index, size) {
            let scaled = sign_extend(element(&indices, index, index_size), index_size);
            match address.load(state, scaled, size, sys) {
                Ok(value) => set_element(&mut values, index, size, value),
                Err(exception) => {
                    if index > 0 {
                        // What came before stays done, also the elements that were masked out.
                        write_vector(state, numbers[0], &values);
                        write_vector(state, numbers[1], &mask_bytes);
                    }
                    return Err(ExecError::Exception(exception));
                }
            }
        }
        set_element(&mut mask_bytes, index, size, 0);
    }
    values[count * size..].fill(0);
    write_vector(state, numbers[0], &values);
    write_vector(state, numbers[1], &[0; 32]);
    retire(state, instr)
}

/// The parts of a gather's address that all elements share.
struct Address {
    segment: usize,
    base: u64,
    scale: u64,
    wrap: u64,
}

impl Address {
    fn of(state: &CpuState, instr: &Instruction) -> Address {
        let base = match instr.memory_base() {
            Register::None => 0,
            register => read_register(state, register),
        };
        Address {
            segment: memory_segment(instr).min(seg::GS),
            base: base.wrapping_add(instr.memory_displacement64()),
            scale: u64::from(instr.memory_index_scale()),
            wrap: mask(address_size(instr)),
        }
    }

    fn load(&self, state: &mut CpuState, index: u64, size: usize, sys: &mut dyn System) -> Result<u64, Exception> {
        let offset = self.base.wrapping_add(index.wrapping_mul(self.scale)) & self.wrap;
        let at = linear(state, self.segment, offset, size, false)?;
        read_element(state, sys, at, size)
    }
}
