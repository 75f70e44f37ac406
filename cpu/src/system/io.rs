//! IN, OUT, INS, OUTS and the permission to use ports (Intel SDM volume 1, chapter 19).

use super::operand::{linear, read_memory, write_gpr, write_memory};
use super::privileged::iopl;
use super::strings::{Patience, StringOp};
use super::{ExecError, Executed, GP0, Outcome, Privilege, System, retire};
use crate::state::{CpuState, control, gpr, seg};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Offset of the I/O map base in the TSS.
const TSS_IO_MAP_BASE: u64 = 102;

/// #GP(0) unless the current code may access `size` ports from `port`: CPL <= IOPL, or clear bits in the TSS.
fn check_permission(state: &mut CpuState, sys: &mut dyn System, port: u16, size: usize) -> Result<(), ExecError> {
    if state.cr0 & control::CR0_PE == 0 || state.cpl <= iopl(state) {
        return Ok(());
    }
    let limit = u64::from(state.tr.limit);
    if !state.tr.present() || limit < TSS_IO_MAP_BASE + 1 {
        return Err(GP0);
    }
    let base = state.tr.base;
    let map = read_memory(state, sys, base.wrapping_add(TSS_IO_MAP_BASE), 2, Privilege::Supervisor)?;
    let byte = map + u64::from(port / 8);
    // Two bytes are read, and both must be inside the TSS.
    if byte + 1 > limit {
        return Err(GP0);
    }
    let bits = read_memory(state, sys, base.wrapping_add(byte), 2, Privilege::Supervisor)?;
    let wanted = (1u64 << size) - 1;
    if bits >> (port % 8) & wanted != 0 { Err(GP0) } else { Ok(()) }
}

/// IN, OUT
pub(super) fn port(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let input = instr.mnemonic() == Mnemonic::In;
    let (data, address) = if input { (0, 1) } else { (1, 0) };
    let size = match instr.op_register(data) {
        Register::AL => 1,
        Register::AX => 2,
        _ => 4,
    };
    let port = match instr.op_kind(address) {
        OpKind::Immediate8 => u16::from(instr.immediate8()),
        _ => state.gpr[gpr::RDX] as u16,
    };
    check_permission(state, sys, port, size)?;
    let now = sys.now();
    if input {
        let value = sys.bus().port_read(now, port, size);
        write_gpr(state, gpr::RAX, size, u64::from(value));
    } else {
        let value = state.gpr[gpr::RAX] & super::operand::mask(size);
        sys.bus().port_write(now, port, size, value as u32);
    }
    retire(state, instr)
}

/// INS, OUTS. The memory operand is checked before the port is touched, so that no datum is lost by a fault.
pub(super) fn string(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let (input, size) = match instr.mnemonic() {
        Mnemonic::Insb => (true, 1),
        Mnemonic::Insw => (true, 2),
        Mnemonic::Insd => (true, 4),
        Mnemonic::Outsb => (false, 1),
        Mnemonic::Outsw => (false, 2),
        _ => (false, 4),
    };
    let op = StringOp::new(state, instr, size);
    let port = state.gpr[gpr::RDX] as u16;
    check_permission(state, sys, port, size)?;
    let now = sys.now();
    let mut patience = Patience::new(sys);
    while op.count(state) > 0 {
        if input {
            let at = linear(state, seg::ES, op.offset(state, gpr::RDI), size, true)?;
            let last = at.wrapping_add(size as u64 - 1);
            // A write that would fault does so here, before the port is read.
            sys.page_pointer(state, at, 1, true, Privilege::Current)?;
            sys.page_pointer(state, last, 1, true, Privilege::Current)?;
            let value = sys.bus().port_read(now, port, size);
            write_memory(state, sys, at, size, u64::from(value), Privilege::Current)?;
            op.advance(state, gpr::RDI, 1);
        } else {
            let at = linear(state, op.source, op.offset(state, gpr::RSI), size, false)?;
            let value = read_memory(state, sys, at, size, Privilege::Current)?;
            sys.bus().port_write(now, port, size, value as u32);
            op.advance(state, gpr::RSI, 1);
        }
        op.consume(state, 1);
        op.step(state)?;
        if !op.repeated {
            break;
        }
        if patience.ends() && op.count(state) > 0 {
            return Ok(Outcome::Unfinished);
        }
    }
    retire(state, instr)
}
