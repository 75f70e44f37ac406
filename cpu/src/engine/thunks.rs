//! The doors between Rust and translated code: one in, a few out.
//!
//! Outside, every guest register is in the vCPU block. Inside, they are where `registers` says, RSP included, so
//! nothing inside may touch the stack, and every call into Rust switches to the host's stack first.

use super::assembler::{Assembler, cc, host, op};
use super::block::{SPARE_WINDOWS, SpareWindow, StackWindow, field};
use super::registers::HOME;
use super::threads;
use std::mem::offset_of;

/// What `exit_argument` holds besides a site index.
pub mod exit {
    /// A signal arrived inside translated code.
    pub const FAULT: u32 = u32::MAX - 1;
    /// The slow path of a memory access gave up; it has left its reason.
    pub const ABORTED: u32 = u32::MAX - 2;
}

/// The doors, as offsets in the code memory.
#[derive(Clone, Copy, Default)]
pub struct Thunks {
    /// `extern "sysv64" fn(target, block + BLOCK_BIAS) -> exit_argument`: enters translated code.
    pub enter: u64,
    /// Leaves with EAX as exit argument.
    pub exit_site: u64,
    /// Leaves the virtual machine (`kvm`) with EAX as exit argument.
    pub exit_direct: u64,
    /// Leaves after a signal.
    pub exit_fault: u64,
    /// Slow path of a memory access: linear address in RCX, site in EAX; host address back in RCX.
    pub memory: u64,
    /// The stack window of supervisor or user code does not cover a block, which goes on at RCX: with the carry flag
    /// set if there was another window for RSP, which is now in force. Uses RAX.
    pub window: [u64; 2],
    /// A piece of a thread window is not known for reading, or for writing, as the block goes on at RCX: with the carry flag
    /// set unless it is now, and the host address of what the register points at is in RCX. Uses RAX.
    pub threads: [[u64; 2]; 2 * threads::PIECES],
}

/// Registers that the System V calling convention preserves.
const CALLEE_SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

fn save_guest(a: &mut Assembler) {
    for (guest, home) in HOME.iter().enumerate() {
        if let Some(home) = home {
            a.store_field(*home, field::gpr(guest as u8));
        }
    }
    for guest in homeless() {
        a.load_field(host::RAX, field::homeless(guest));
        a.store_field(host::RAX, field::gpr(guest));
    }
    a.store_field(host::BUDGET, field::BUDGET);
    for ymm in 0..16 {
        a.vmovdqu_field(true, true, ymm, field::ymm(ymm));
    }
    (1..16).for_each(|ymm| a.vorps_ymm0(ymm));
    a.upper_half_in_eax();
    a.field_op(false, op::STORE, host::RAX, field::UPPER_IN_USE);
    a.put(&VZEROUPPER); // the Rust side uses SSE encodings
}

/// Guest registers that have no home.
fn homeless() -> impl Iterator<Item = u8> {
    (0..16).filter(|guest| HOME[*guest as usize].is_none())
}

const VZEROUPPER: [u8; 3] = [0xC5, 0xF8, 0x77];

/// Processors execute SSE instructions on registers whose upper halves are in use several times as slowly, since they
/// keep those halves; and a half that was loaded with zeros is in use. RCX stays what it is.
fn load_guest(a: &mut Assembler) {
    a.cmp_field_imm32(field::UPPER_IN_USE, 0);
    let unused = a.jcc(cc::E, 0);
    (0..16).for_each(|ymm| a.vmovdqu_field(false, true, ymm, field::ymm(ymm)));
    let loaded = a.jmp(0);
    a.land(unused);
    a.put(&VZEROUPPER);
    (0..16).for_each(|ymm| a.vmovdqu_field(false, false, ymm, field::ymm(ymm)));
    a.land(loaded);
    for guest in homeless() {
        a.load_field(host::RAX, field::gpr(guest));
        a.store_field(host::RAX, field::homeless(guest));
    }
    for register in 0..2 {
        a.clear_field8(field::threads_known(register));
    }
    a.load_field(host::BUDGET, field::BUDGET);
    a.load_field(host::DISTANCE, field::WINDOW_DISTANCE);
    for (guest, home) in HOME.iter().enumerate() {
        if let Some(home) = home {
            a.load_field(*home, field::gpr(guest as u8));
        }
    }
}

/// Emits the doors at the assembler's position.
pub fn emit(a: &mut Assembler, tlb_mask: u32) -> Thunks {
    let mut thunks = Thunks { enter: a.here(), ..Thunks::default() };
    for reg in CALLEE_SAVED {
        a.push(reg);
    }
    a.lea(true, host::RSP, Some(host::RSP), None, -8);
    a.mov(host::BLOCK, host::RSI);
    a.store_field(host::RSP, field::HOST_RSP);
    a.store_field(host::RDI, field::temporary(0));
    load_guest(a);
    a.jmp_field(field::temporary(0));

    let leave = a.here();
    save_guest(a);
    let leave_saved = a.here();
    a.load_field(host::RSP, field::HOST_RSP);
    a.lea(true, host::RSP, Some(host::RSP), None, 8);
    for reg in CALLEE_SAVED.iter().rev() {
        a.pop(*reg);
    }
    a.field_op(false, op::LOAD, host::RAX, field::EXIT_ARGUMENT);
    a.put(&[0xC3]);

    thunks.exit_site = a.here();
    a.field_op(false, op::STORE, host::RAX, field::EXIT_ARGUMENT);
    a.jmp(leave);

    thunks.exit_direct = a.here();
    super::kvm::emit_exit(a);

    thunks.exit_fault = a.here();
    a.store_field(host::DISTANCE, field::FAULT_DISTANCE);
    a.store_field_imm32(field::EXIT_ARGUMENT, exit::FAULT);
    a.jmp(leave);

    thunks.memory = a.here();
    a.store_field(host::RCX, field::SLOW_ADDRESS);
    a.field_op(false, op::STORE, host::RAX, field::SLOW_SITE);
    save_guest(a);
    a.load_field(host::RSP, field::HOST_RSP);
    a.load_field(host::RDI, field::CORE);
    a.mov(host::RSI, host::RCX);
    a.field_op(false, op::LOAD, host::RDX, field::SLOW_SITE);
    // RBX is in its place in the block already; functions preserve it.
    a.mov(host::RBX, host::BLOCK);
    a.call_field(field::MEMORY_SLOW);
    a.mov(host::BLOCK, host::RBX);
    a.put(&[0x48, 0x85, 0xC0]); // test rax, rax
    a.put(&[0x75, 0x00]); // jnz over the exit
    let skip = a.offset();
    a.store_field_imm32(field::EXIT_ARGUMENT, exit::ABORTED);
    a.jmp(leave_saved);
    let distance = a.offset() - skip;
    a.bytes[skip as usize - 1] = u8::try_from(distance).expect("the exit is short");
    a.mov(host::RCX, host::RAX);
    load_guest(a);
    a.jmp_field(field::SLOW_RESUME);

    for which in 0..2 {
        thunks.window[which] = a.here();
        emit_window(a, which);
    }
    threads::emit(a, &mut thunks, tlb_mask);
    thunks
}

/// Puts the spare window for RSP in force, if there is one that is not in force already.
fn emit_window(a: &mut Assembler, which: usize) {
    let (current, spare) = (field::window(which), field::spare_window(which));
    a.store_field(host::RCX, field::temporary(2));
    a.mov(host::RCX, host::RSP);
    a.put(&[0x48, 0xC1, 0xE9, 12]); // shr rcx, 12
    a.mov32(host::RAX, host::RCX);
    a.and32(host::RAX, SPARE_WINDOWS as u32 - 1);
    a.put(&[0xC1, 0xE0, size_of::<SpareWindow>().trailing_zeros() as u8]); // shl eax, log2(size)
    a.field_index_op(op::CMP, host::RCX, host::RAX, 1, field::spare_page(which));
    let none = a.jcc(cc::NE, 0);
    let (low, distance) = (offset_of!(StackWindow, low) as u32, offset_of!(StackWindow, distance) as u32);
    a.field_index_op(op::LOAD, host::RCX, host::RAX, 1, spare + low);
    a.field_op(true, op::CMP, host::RCX, current + low);
    let same = a.jcc(cc::E, 0);
    for word in (0..size_of::<StackWindow>() as u32).step_by(8) {
        a.field_index_op(op::LOAD, host::RCX, host::RAX, 1, spare + word);
        a.store_field(host::RCX, current + word);
    }
    a.field_index_op(op::LOAD, host::DISTANCE, host::RAX, 1, spare + distance);
    a.store_field(host::DISTANCE, field::WINDOW_DISTANCE);
    a.bytes.push(0xF9); // stc
    a.jmp_field(field::temporary(2));
    a.land(none);
    a.land(same);
    a.bytes.push(0xF8); // clc
    a.jmp_field(field::temporary(2));
}
