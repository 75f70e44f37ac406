//! MOVS, STOS, LODS, CMPS and SCAS, with and without REP (Intel SDM volume 1, section 7.3.9).
//!
//! A repeated instruction works through runs of elements that lie in one page at the source and one at the
//! destination, on host memory. RCX, RSI and RDI are written back after every run, so that a fault leaves them as
//! the manual says. What is copied is what copying element by element would: overlapping operands repeat.

use super::operand::{linear, mask, read_memory, write_gpr, write_memory};
use super::{Executed, Outcome, Privilege, System, retire};
use super::{alignment, arithmetic};
use crate::exception::Exception;
use crate::memory::{PAGE_MASK, PAGE_SIZE};
use crate::state::{CpuState, gpr, rflags, seg};
use iced_x86::{Instruction, Mnemonic, OpKind};

/// How long a repeated instruction still works before it comes back, done or not: a count in RCX may keep it busy for
/// years, and the host must be able to end that.
pub(super) struct Patience {
    runs: u32,
}

impl Patience {
    pub(super) fn new(sys: &dyn System) -> Patience {
        Patience { runs: sys.patience() }
    }

    /// A run of elements has been done; true if it was the last for now.
    pub(super) fn ends(&mut self) -> bool {
        self.runs -= 1;
        self.runs == 0
    }
}

/// The parts that all string instructions have in common.
#[derive(Clone, Copy)]
pub(super) struct StringOp {
    /// Bytes of an element.
    pub(super) size: usize,
    /// Address size in bytes: the width of RCX, RSI and RDI.
    pub(super) width: usize,
    /// Segment of the source.
    pub(super) source: usize,
    /// With REP, REPE or REPNE.
    pub(super) repeated: bool,
    /// Repeated with RFLAGS.TF set: every element but the last ends in a single-step trap.
    stepping: bool,
    backward: bool,
}

impl StringOp {
    pub(super) fn new(state: &CpuState, instr: &Instruction, size: usize) -> StringOp {
        let mut width = 8;
        for operand in 0..instr.op_count() {
            width = match instr.op_kind(operand) {
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 2,
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 4,
                OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 8,
                _ => continue,
            };
        }
        let repeated = instr.has_rep_prefix() || instr.has_repne_prefix();
        StringOp {
            size,
            width,
            source: super::operand::memory_segment(instr),
            repeated,
            stepping: repeated && state.rflags & rflags::TF != 0,
            backward: state.rflags & rflags::DF != 0,
        }
    }

    /// Elements left to do.
    pub(super) fn count(&self, state: &CpuState) -> u64 {
        if self.repeated { state.gpr[gpr::RCX] & mask(self.width) } else { 1 }
    }

    /// Offset of the current element in its segment.
    pub(super) fn offset(&self, state: &CpuState, register: usize) -> u64 {
        state.gpr[register] & mask(self.width)
    }

    /// Moves an index register past `elements` elements.
    pub(super) fn advance(&self, state: &mut CpuState, register: usize, elements: u64) {
        let bytes = elements.wrapping_mul(self.size as u64);
        let offset = self.offset(state, register);
        let moved = if self.backward { offset.wrapping_sub(bytes) } else { offset.wrapping_add(bytes) };
        write_gpr(state, register, self.width, moved & mask(self.width));
    }

    /// Takes `elements` off the count.
    pub(super) fn consume(&self, state: &mut CpuState, elements: u64) {
        if self.repeated {
            let left = self.count(state) - elements;
            write_gpr(state, gpr::RCX, self.width, left);
        }
    }

    /// Linear address of the current element, and how many elements from there lie in its page and segment. Zero
    /// if the first one crosses into another page.
    fn run(&self, state: &CpuState, segment: usize, register: usize, write: bool) -> Result<(u64, u64), Exception> {
        let size = self.size as u64;
        let offset = self.offset(state, register);
        let at = linear(state, segment, offset, self.size, write)?;
        alignment::check(state, at, self.size)?;
        let in_page = at & PAGE_MASK;
        // The second case: the element itself reaches over the end of the address size.
        if in_page + size > PAGE_SIZE || mask(self.width) - offset < size - 1 {
            return Ok((at, 0));
        }
        if !state.is_64bit() {
            let s = &state.seg[segment];
            if s.limit != u32::MAX || (s.kind() & 0xC) == 4 {
                return Ok((at, 1));
            }
        }
        let (page_room, wrap_room) = if self.backward {
            (in_page / size + 1, (offset / size).saturating_add(1))
        } else {
            ((PAGE_SIZE - in_page) / size, ((mask(self.width) - offset - (size - 1)) / size).saturating_add(1))
        };
        let step = if self.stepping { 1 } else { u64::MAX };
        Ok((at, page_room.min(wrap_room).min(step)))
    }

    /// The single-step trap between two elements (Intel SDM volume 3, section 18.3.1.4): RIP stays at the
    /// instruction, which has not retired.
    pub(super) fn step(&self, state: &CpuState) -> Result<(), Exception> {
        if self.stepping && self.count(state) > 0 { Err(Exception::Debug { dr6: 1 << 14 }) } else { Ok(()) }
    }

    /// Host pointer to the lowest byte of a run of `elements` elements, the first of which is at `at`. A page fault
    /// is that of the first element.
    fn pointer(
        &self,
        state: &mut CpuState,
        sys: &mut dyn System,
        at: u64,
        elements: u64,
        write: bool,
    ) -> Result<Option<*mut u8>, Exception> {
        let bytes = elements as usize * self.size;
        sys.page_pointer(state, self.lowest(at, elements), bytes, write, Privilege::Current).map_err(|exception| {
            match exception {
                Exception::PageFault { error, .. } => Exception::PageFault { address: at, error },
                other => other,
            }
        })
    }

    /// Lowest address of a run of `elements` whose first element is at `at`.
    fn lowest(&self, at: u64, elements: u64) -> u64 {
        if self.backward { at - (elements - 1) * self.size as u64 } else { at }
    }
}

fn element_size(instr: &Instruction) -> usize {
    use Mnemonic::*;
    match instr.mnemonic() {
        Movsb | Stosb | Lodsb | Cmpsb | Scasb => 1,
        Movsw | Stosw | Lodsw | Cmpsw | Scasw => 2,
        Movsd | Stosd | Lodsd | Cmpsd | Scasd => 4,
        _ => 8,
    }
}

pub(super) fn execute(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    use Mnemonic::*;
    let op = StringOp::new(state, instr, element_size(instr));
    let mut patience = Patience::new(sys);
    match instr.mnemonic() {
        Movsb | Movsw | Movsd | Movsq => {
            while op.count(state) > 0 {
                let done = move_run(state, &op, sys)?;
                op.advance(state, gpr::RSI, done);
                op.advance(state, gpr::RDI, done);
                op.consume(state, done);
                op.step(state)?;
                if !op.repeated {
                    break;
                }
                if patience.ends() && op.count(state) > 0 {
                    return Ok(Outcome::Unfinished);
                }
            }
        }
        Stosb | Stosw | Stosd | Stosq => {
            while op.count(state) > 0 {
                let done = store_run(state, &op, sys)?;
                op.advance(state, gpr::RDI, done);
                op.consume(state, done);
                op.step(state)?;
                if !op.repeated {
                    break;
                }
                if patience.ends() && op.count(state) > 0 {
                    return Ok(Outcome::Unfinished);
                }
            }
        }
        Lodsb | Lodsw | Lodsd | Lodsq => {
            while op.count(state) > 0 {
                let at = linear(state, op.source, op.offset(state, gpr::RSI), op.size, false)?;
                let value = read_memory(state, sys, at, op.size, Privilege::Current)?;
                write_gpr(state, gpr::RAX, op.size, value);
                op.advance(state, gpr::RSI, 1);
                op.consume(state, 1);
                op.step(state)?;
                if !op.repeated {
                    break;
                }
                if patience.ends() && op.count(state) > 0 {
                    return Ok(Outcome::Unfinished);
                }
            }
        }
        mnemonic => {
            let two = matches!(mnemonic, Cmpsb | Cmpsw | Cmpsd | Cmpsq);
            // REPNE goes on while unequal, REPE while equal.
            let wanted = !instr.has_repne_prefix();
            let mut flags = None;
            while op.count(state) > 0 {
                let (done, pair) = compare_run(state, &op, two, wanted, sys)?;
                if two {
                    op.advance(state, gpr::RSI, done);
                }
                op.advance(state, gpr::RDI, done);
                op.consume(state, done);
                flags = Some(arithmetic::sub(pair.0, pair.1, false, op.size).1);
                if !op.repeated || op.stepping || (pair.0 == pair.1) != wanted {
                    break;
                }
                // The flags are those of the last pair, which is still to come.
                if patience.ends() && op.count(state) > 0 {
                    return Ok(Outcome::Unfinished);
                }
            }
            if let Some(flags) = flags {
                state.rflags = state.rflags & !rflags::STATUS | flags;
                let zero = state.rflags & rflags::ZF != 0;
                if zero == wanted {
                    op.step(state)?;
                }
            }
        }
    }
    retire(state, instr)
}

/// Copies at least one element; how many.
fn move_run(state: &mut CpuState, op: &StringOp, sys: &mut dyn System) -> Result<u64, Exception> {
    let (from, from_room) = op.run(state, op.source, gpr::RSI, false)?;
    let (to, to_room) = match op.run(state, seg::ES, gpr::RDI, true) {
        Ok(run) => run,
        Err(exception) => {
            // The source is read before the destination is looked at.
            read_memory(state, sys, from, op.size, Privilege::Current)?;
            return Err(exception);
        }
    };
    let elements = op.count(state).min(from_room).min(to_room);
    if elements > 0 {
        let bytes = elements as usize * op.size;
        if let Some(source) = op.pointer(state, sys, from, elements, false)? {
            let target = op.pointer(state, sys, to, elements, true)?;
            if let Some(target) = target {
                // SAFETY: `System::page_pointer` promises both pointers valid to the end of their pages, for
                // reading and writing; `run` has kept `bytes` inside both pages. Alignment is not assumed.
                unsafe {
                    if op.backward {
                        copy_backward(source, target, bytes, op.size);
                    } else {
                        copy_forward(source, target, bytes, op.size);
                    }
                }
                return Ok(elements);
            }
        }
    }
    let value = read_memory(state, sys, from, op.size, Privilege::Current)?;
    write_memory(state, sys, to, op.size, value, Privilege::Current)?;
    Ok(1)
}

/// Copies `bytes` bytes as ascending copies of `size`-byte elements would.
///
/// # Safety
/// `source` and `target` must be valid for reading and writing `bytes` bytes, a multiple of `size`, and `size` must
/// be 1, 2, 4 or 8. They may overlap.
unsafe fn copy_forward(source: *mut u8, target: *mut u8, bytes: usize, size: usize) {
    let distance = (target as usize).wrapping_sub(source as usize);
    if distance >= bytes {
        // No element reads what an earlier one wrote.
        // SAFETY: the caller's promise; `copy` allows overlap.
        unsafe { std::ptr::copy(source, target, bytes) };
    } else if distance >= size {
        // Each byte is read after it was written: the first `distance` bytes repeat.
        // SAFETY: all ranges lie in the first `distance + bytes` bytes from `source`, which the caller promises,
        // and none overlaps its own copy: `filled` bytes are copied at most behind the `filled` ones.
        unsafe {
            std::ptr::copy_nonoverlapping(source, target, distance);
            let mut filled = distance;
            while filled < bytes {
                let length = filled.min(bytes - filled);
                std::ptr::copy_nonoverlapping(target, target.add(filled), length);
                filled += length;
            }
        }
    } else if distance > 0 {
        for offset in (0..bytes).step_by(size) {
            // SAFETY: offset + size <= bytes, which the caller promises.
            unsafe { copy_element(source.add(offset), target.add(offset), size) };
        }
    }
}

/// Copies `bytes` bytes as descending copies of `size`-byte elements would; both pointers are to the lowest byte.
///
/// # Safety
/// As for [`copy_forward`].
unsafe fn copy_backward(source: *mut u8, target: *mut u8, bytes: usize, size: usize) {
    let distance = (source as usize).wrapping_sub(target as usize);
    if distance >= bytes {
        // SAFETY: the caller's promise; `copy` allows overlap, and no element reads what a later one wrote.
        unsafe { std::ptr::copy(source, target, bytes) };
    } else if distance > 0 {
        for offset in (0..bytes).step_by(size).rev() {
            // SAFETY: offset + size <= bytes, which the caller promises.
            unsafe { copy_element(source.add(offset), target.add(offset), size) };
        }
    }
}

/// Reads one element whole, then writes it.
///
/// # Safety
/// Both pointers must be valid for `size` bytes; `size` must be 1, 2, 4 or 8.
unsafe fn copy_element(source: *mut u8, target: *mut u8, size: usize) {
    // SAFETY: the caller's promise.
    unsafe { store_element(target, size, load_element(source, size)) };
}

/// # Safety
/// `pointer` must be valid for reading `size` bytes; `size` must be 1, 2, 4 or 8.
unsafe fn load_element(pointer: *const u8, size: usize) -> u64 {
    // SAFETY: the caller's promise; unaligned reads are allowed.
    unsafe {
        match size {
            1 => u64::from(pointer.read()),
            2 => u64::from(pointer.cast::<u16>().read_unaligned()),
            4 => u64::from(pointer.cast::<u32>().read_unaligned()),
            _ => pointer.cast::<u64>().read_unaligned(),
        }
    }
}

/// # Safety
/// `pointer` must be valid for writing `size` bytes; `size` must be 1, 2, 4 or 8.
unsafe fn store_element(pointer: *mut u8, size: usize, value: u64) {
    // SAFETY: the caller's promise; unaligned writes are allowed.
    unsafe {
        match size {
            1 => pointer.write(value as u8),
            2 => pointer.cast::<u16>().write_unaligned(value as u16),
            4 => pointer.cast::<u32>().write_unaligned(value as u32),
            _ => pointer.cast::<u64>().write_unaligned(value),
        }
    }
}

/// Stores at least one element; how many.
fn store_run(state: &mut CpuState, op: &StringOp, sys: &mut dyn System) -> Result<u64, Exception> {
    let (to, room) = op.run(state, seg::ES, gpr::RDI, true)?;
    let value = state.gpr[gpr::RAX] & mask(op.size);
    let elements = op.count(state).min(room);
    if elements > 0 {
        let bytes = elements as usize * op.size;
        let target = op.pointer(state, sys, to, elements, true)?;
        if let Some(target) = target {
            let first = value as u8;
            let uniform = value.to_le_bytes()[..op.size].iter().all(|byte| *byte == first);
            // SAFETY: `System::page_pointer` promises the pointer valid for writing to the end of its page, and
            // `run` has kept `bytes` inside it.
            unsafe {
                if uniform {
                    std::ptr::write_bytes(target, first, bytes);
                } else {
                    for offset in (0..bytes).step_by(op.size) {
                        store_element(target.add(offset), op.size, value);
                    }
                }
            }
            return Ok(elements);
        }
    }
    write_memory(state, sys, to, op.size, value, Privilege::Current)?;
    Ok(1)
}

/// Compares elements of two strings, or RAX with those of one, until one pair's equality is not `wanted` or the run
/// ends. Returns how many were compared and the last pair.
fn compare_run(
    state: &mut CpuState,
    op: &StringOp,
    two: bool,
    wanted: bool,
    sys: &mut dyn System,
) -> Result<(u64, (u64, u64)), Exception> {
    let accumulator = state.gpr[gpr::RAX] & mask(op.size);
    let (left, left_room) = if two { op.run(state, op.source, gpr::RSI, false)? } else { (0, u64::MAX) };
    let (right, right_room) = op.run(state, seg::ES, gpr::RDI, false)?;
    let elements = op.count(state).min(left_room).min(right_room);
    if elements > 0 {
        let mut page = |state: &mut CpuState, at| op.pointer(state, sys, at, elements, false);
        let left_page = if two { page(state, left)? } else { None };
        let right_page = if two && left_page.is_none() { None } else { page(state, right)? };
        if let Some(right_page) = right_page {
            let mut pair = (accumulator, 0);
            for done in 1..=elements {
                let index = if op.backward { elements - done } else { done - 1 };
                let offset = index as usize * op.size;
                // SAFETY: `System::page_pointer` promises the pointers valid to the end of their pages, and `run`
                // has kept all elements inside them.
                unsafe {
                    if let Some(left_page) = left_page {
                        pair.0 = load_element(left_page.add(offset), op.size);
                    }
                    pair.1 = load_element(right_page.add(offset), op.size);
                }
                if (pair.0 == pair.1) != wanted || done == elements {
                    return Ok((done, pair));
                }
            }
        }
    }
    let first = if two { read_memory(state, sys, left, op.size, Privilege::Current)? } else { accumulator };
    let second = read_memory(state, sys, right, op.size, Privilege::Current)?;
    Ok((1, (first, second)))
}

#[cfg(test)]
mod copy_tests {
    use super::*;

    #[test]
    fn overlapping_copies_are_those_of_single_elements() {
        for size in [1usize, 2, 4, 8] {
            for distance in -40isize..=40 {
                let start: Vec<u8> = (0..256).map(|i| (i * 7 + 3) as u8).collect();
                for backward in [false, true] {
                    let (mut fast, mut slow) = (start.clone(), start.clone());
                    let (from, to, elements) = (100usize, (100 + distance) as usize, 64 / size);
                    // SAFETY: both ranges of 64 bytes lie inside the 256-byte vector.
                    unsafe {
                        let base = fast.as_mut_ptr();
                        if backward {
                            copy_backward(base.add(from), base.add(to), 64, size);
                        } else {
                            copy_forward(base.add(from), base.add(to), 64, size);
                        }
                    }
                    for i in 0..elements {
                        let at = if backward { elements - 1 - i } else { i } * size;
                        let element: Vec<u8> = slow[from + at..from + at + size].to_vec();
                        slow[to + at..to + at + size].copy_from_slice(&element);
                    }
                    assert_eq!(fast, slow, "size {size} distance {distance} backward {backward}");
                }
            }
        }
    }
}
