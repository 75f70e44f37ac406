//! The doors between Rust and translated code: one in, a few out.
//!
//! Outside, every guest register is in the vCPU block. Inside, they are where `registers` says, RSP included, so
//! nothing inside may touch the stack, and every call into Rust switches to the host's stack first.

use super::assembler::{Assembler, host, op};
use super::block::field;
use super::registers::HOME;

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
    /// `extern "sysv64" fn(target) -> exit_argument`: enters translated code.
    pub enter: u64,
    /// Leaves with EAX as exit argument.
    pub exit_site: u64,
    /// Leaves after a signal.
    pub exit_fault: u64,
    /// Slow path of a memory access: linear address in RCX, site in EAX; host address back in RCX.
    pub memory: u64,
}

/// Registers that the System V calling convention preserves.
const CALLEE_SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

fn save_guest(a: &mut Assembler) {
    for (guest, home) in HOME.iter().enumerate() {
        if let Some(home) = home {
            a.store_gs(*home, field::gpr(guest as u8));
        }
    }
    a.store_gs(host::R15, field::BUDGET);
    for ymm in 0..16 {
        a.vmovdqu_gs(true, ymm, field::ymm(ymm));
    }
    a.put(&[0xC5, 0xF8, 0x77]); // vzeroupper: the Rust side uses SSE encodings
}

fn load_guest(a: &mut Assembler) {
    for ymm in 0..16 {
        a.vmovdqu_gs(false, ymm, field::ymm(ymm));
    }
    a.load_gs(host::R15, field::BUDGET);
    a.load_gs(host::R11, field::WINDOW_DISTANCE);
    for (guest, home) in HOME.iter().enumerate() {
        if let Some(home) = home {
            a.load_gs(*home, field::gpr(guest as u8));
        }
    }
}

/// Emits the doors at the assembler's position.
pub fn emit(a: &mut Assembler) -> Thunks {
    let mut thunks = Thunks { enter: a.here(), ..Thunks::default() };
    for reg in CALLEE_SAVED {
        a.push(reg);
    }
    a.lea(true, host::RSP, Some(host::RSP), None, -8);
    a.store_gs(host::RSP, field::HOST_RSP);
    a.store_gs(host::RDI, field::temporary(0));
    load_guest(a);
    a.jmp_gs(field::temporary(0));

    let leave = a.here();
    save_guest(a);
    let leave_saved = a.here();
    a.load_gs(host::RSP, field::HOST_RSP);
    a.lea(true, host::RSP, Some(host::RSP), None, 8);
    for reg in CALLEE_SAVED.iter().rev() {
        a.pop(*reg);
    }
    a.gs_op(false, op::LOAD, host::RAX, field::EXIT_ARGUMENT);
    a.put(&[0xC3]);

    thunks.exit_site = a.here();
    a.gs_op(false, op::STORE, host::RAX, field::EXIT_ARGUMENT);
    a.jmp(leave);

    thunks.exit_fault = a.here();
    a.store_gs_imm32(field::EXIT_ARGUMENT, exit::FAULT);
    a.jmp(leave);

    thunks.memory = a.here();
    a.store_gs(host::RCX, field::SLOW_ADDRESS);
    a.gs_op(false, op::STORE, host::RAX, field::SLOW_SITE);
    save_guest(a);
    a.load_gs(host::RSP, field::HOST_RSP);
    a.load_gs(host::RDI, field::CORE);
    a.mov(host::RSI, host::RCX);
    a.mov32(host::RDX, host::RAX);
    a.call_gs(field::MEMORY_SLOW);
    a.put(&[0x48, 0x85, 0xC0]); // test rax, rax
    a.put(&[0x75, 0x00]); // jnz over the exit
    let skip = a.offset();
    a.store_gs_imm32(field::EXIT_ARGUMENT, exit::ABORTED);
    a.jmp(leave_saved);
    let distance = a.offset() - skip;
    a.bytes[skip as usize - 1] = u8::try_from(distance).expect("the exit is short");
    a.mov(host::RCX, host::RAX);
    load_guest(a);
    a.jmp_gs(field::SLOW_RESUME);
    thunks
}
