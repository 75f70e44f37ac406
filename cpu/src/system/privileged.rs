//! Instructions about the processor itself: flags, MSRs, CPUID, time, random numbers, segment bases, HLT, caches.

use super::operand::{self, Stack, read_register, write_gpr, write_register};
use super::{Executed, Flush, GP0, Outcome, Privilege, System, UD, retire};
use crate::model::{self, MsrEffect};
use crate::paging::is_canonical;
use crate::state::{CpuState, control, gpr, rflags, seg};
use iced_x86::{Instruction, Mnemonic};

/// Flags that POPF, IRET and SYSRET can load at all; IRET loads RF besides.
pub(super) const LOADABLE_FLAGS: u64 =
    rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;

/// I/O privilege level.
pub(super) fn iopl(state: &CpuState) -> u8 {
    (state.rflags >> 12 & 3) as u8
}

/// RFLAGS after loading `value` from a `size`-byte image with the rights of the current CPL. RF is clear.
pub(super) fn loaded_flags(state: &CpuState, value: u64, size: usize) -> u64 {
    let mut writable = LOADABLE_FLAGS & operand::mask(size);
    if state.cpl != 0 {
        writable &= !rflags::IOPL;
    }
    if state.cpl > iopl(state) {
        writable &= !rflags::IF;
    }
    state.rflags & !(writable | rflags::RF) | value & writable | rflags::FIXED
}

pub(super) fn require_cpl0(state: &CpuState) -> Result<(), super::ExecError> {
    if state.cpl == 0 { Ok(()) } else { Err(GP0) }
}

/// EDX:EAX
fn edx_eax(state: &CpuState) -> u64 {
    state.gpr[gpr::RDX] << 32 | state.gpr[gpr::RAX] & 0xFFFF_FFFF
}

fn set_edx_eax(state: &mut CpuState, value: u64) {
    state.gpr[gpr::RAX] = value & 0xFFFF_FFFF;
    state.gpr[gpr::RDX] = value >> 32;
}

pub(super) fn swapgs(state: &mut CpuState, instr: &Instruction) -> Executed {
    if !state.is_64bit() {
        return Err(UD);
    }
    require_cpl0(state)?;
    std::mem::swap(&mut state.seg[seg::GS].base, &mut state.kernel_gs_base);
    retire(state, instr)
}

pub(super) fn cli(state: &mut CpuState, instr: &Instruction) -> Executed {
    if state.cpl > iopl(state) {
        return Err(GP0);
    }
    state.rflags &= !rflags::IF;
    retire(state, instr)
}

pub(super) fn sti(state: &mut CpuState, instr: &Instruction) -> Executed {
    if state.cpl > iopl(state) {
        return Err(GP0);
    }
    state.interrupt_shadow = state.rflags & rflags::IF == 0;
    state.rflags |= rflags::IF;
    retire(state, instr)
}

/// CLAC, STAC
pub(super) fn access_flag(state: &mut CpuState, instr: &Instruction, set: bool) -> Executed {
    if state.cpl != 0 {
        return Err(UD);
    }
    state.rflags = state.rflags & !rflags::AC | if set { rflags::AC } else { 0 };
    retire(state, instr)
}

fn flags_size(instr: &Instruction) -> usize {
    match instr.mnemonic() {
        Mnemonic::Pushfq | Mnemonic::Popfq => 8,
        Mnemonic::Pushfd | Mnemonic::Popfd => 4,
        _ => 2,
    }
}

pub(super) fn pushf(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let mut stack = Stack::of(state);
    let image = state.rflags & !(rflags::RF | rflags::VM);
    stack.push(state, sys, flags_size(instr), image)?;
    stack.commit(state);
    retire(state, instr)
}

pub(super) fn popf(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let size = flags_size(instr);
    let mut stack = Stack::of(state);
    let value = stack.pop(state, sys, size)?;
    state.rflags = loaded_flags(state, value, size);
    stack.commit(state);
    retire(state, instr)
}

pub(super) fn rdtsc(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    if state.cpl != 0 && state.cr4 & control::CR4_TSD != 0 {
        return Err(GP0);
    }
    let now = sys.now();
    let tsc = model::guest_tsc(state, sys.bus(), now);
    set_edx_eax(state, tsc);
    retire(state, instr)
}

pub(super) fn rdtscp(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let executed = rdtsc(state, instr, sys)?;
    state.gpr[gpr::RCX] = state.tsc_aux;
    Ok(executed)
}

pub(super) fn rdmsr(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_cpl0(state)?;
    let now = sys.now();
    let value = model::read_msr(state, sys.bus(), now, state.gpr[gpr::RCX] as u32)?;
    set_edx_eax(state, value);
    retire(state, instr)
}

pub(super) fn wrmsr(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    require_cpl0(state)?;
    let now = sys.now();
    let (index, value) = (state.gpr[gpr::RCX] as u32, edx_eax(state));
    if model::write_msr(state, sys.bus(), now, index, value)? == MsrEffect::FlushTranslations {
        sys.flush(Flush::All);
    }
    retire(state, instr)
}

pub(super) fn cpuid(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let (leaf, subleaf) = (state.gpr[gpr::RAX] as u32, state.gpr[gpr::RCX] as u32);
    let mut result = model::cpuid(leaf, subleaf, sys.features(), &model::CpuidContext::of(state));
    if leaf == 1 {
        // The APIC flag follows the enable bit of IA32_APIC_BASE (SDM volume 3, section 11.4.3).
        const APIC_BASE: u32 = 0x1B;
        let now = sys.now();
        if matches!(sys.bus().msr_read(now, APIC_BASE), Ok(base) if base >> 11 & 1 == 0) {
            result.edx &= !(1 << 9);
        }
    }
    state.gpr[gpr::RAX] = u64::from(result.eax);
    state.gpr[gpr::RBX] = u64::from(result.ebx);
    state.gpr[gpr::RCX] = u64::from(result.ecx);
    state.gpr[gpr::RDX] = u64::from(result.edx);
    retire(state, instr)
}

/// RDRAND, RDSEED: 64 bits are drawn whatever the operand's size. They never run dry: CF is set.
pub(super) fn random(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let value = sys.bus().random();
    write_register(state, instr.op0_register(), value);
    state.rflags = state.rflags & !rflags::STATUS | rflags::CF;
    retire(state, instr)
}

/// There are no performance counters, so that every index is invalid.
pub(super) fn rdpmc(_state: &CpuState) -> Executed {
    Err(GP0)
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE
pub(super) fn segment_base(state: &mut CpuState, instr: &Instruction) -> Executed {
    if !state.is_64bit() || state.cr4 & control::CR4_FSGSBASE == 0 {
        return Err(UD);
    }
    let register = instr.op0_register();
    let segment = match instr.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => seg::FS,
        _ => seg::GS,
    };
    if matches!(instr.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        write_gpr(state, operand::gpr_index(register), register.size(), state.seg[segment].base);
    } else {
        let base = read_register(state, register);
        if !is_canonical(base) {
            return Err(GP0);
        }
        state.seg[segment].base = base;
    }
    retire(state, instr)
}

pub(super) fn hlt(state: &mut CpuState, instr: &Instruction) -> Executed {
    require_cpl0(state)?;
    retire(state, instr)?;
    state.halted = true;
    Ok(Outcome::Halt)
}

/// INVD, WBINVD: there are no caches between the vCPU and memory, so that nothing is lost or written back.
pub(super) fn cache_control(state: &mut CpuState, instr: &Instruction) -> Executed {
    require_cpl0(state)?;
    retire(state, instr)
}

/// CLFLUSH, CLFLUSHOPT, CLWB: the checks of a one-byte read, and nothing else.
pub(super) fn cache_line(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let at = operand::address(state, instr, 1, false)?;
    sys.page_pointer(state, at, 1, false, Privilege::Current)?;
    retire(state, instr)
}
