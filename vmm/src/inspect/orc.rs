//! Unwinding the kernel's stack by its ORC tables (Documentation/arch/x86/orc-unwinder.rst), read where the kernel
//! keeps them. Each entry says how the caller's stack pointer and frame pointer follow from the present ones.

use super::kernel::{Kernel, Module};
use super::layout::OrcPlaces;
use super::memory::AddressSpace;
use super::unwind::Registers;

/// Bytes of `struct pt_regs` on x86-64: fifteen registers, the error code, and the five words of an interrupt frame.
const PT_REGS_IP: u64 = 128;
const PT_REGS_CS: u64 = 136;
const PT_REGS_SP: u64 = 152;

/// What an entry says a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Undefined,
    End,
    Call,
    Registers,
    PartialRegisters,
}

/// Where ORC entries begin and how many there are.
#[derive(Clone, Copy, Debug)]
struct Tables {
    ips: u64,
    entries: u64,
    count: u64,
}

/// One step up the kernel's stack.
#[allow(clippy::large_enum_variant)] // made and taken apart at once, and never kept
pub(super) enum OrcStep {
    /// The caller's registers, and whether the address is one to return to (not an interrupted one).
    Caller(Registers, bool),
    /// The registers with which user mode was left.
    User(u64),
    /// The outermost frame.
    End,
}

/// Reads ORC tables.
pub(super) struct Orc<'a> {
    pub space: &'a AddressSpace<'a>,
    pub kernel: &'a Kernel,
    pub modules: &'a [Module],
}

impl Orc<'_> {
    fn tables(&self, ip: u64) -> Option<(Tables, OrcPlaces)> {
        let places = self.kernel.layout.as_ref().ok()?.orc?;
        if let Some(module) = self.modules.iter().find(|module| module.ranges.iter().any(|range| range.contains(&ip))) {
            let (ips, entries, count) = module.orc?;
            return Some((Tables { ips, entries, count }, places));
        }
        let (ips, end, entries) = self.kernel.orc?;
        Some((Tables { ips, entries, count: end.checked_sub(ips)? / 4 }, places))
    }

    /// Finds the entry for an address: instruction pointers are relative to where they stand, and ascend.
    fn entry(&self, ip: u64) -> Option<(i64, i64, u64, u64, Kind)> {
        let (tables, places) = self.tables(ip)?;
        let at = |number: u64| {
            let place = tables.ips.wrapping_add(4 * number);
            Some(place.wrapping_add(self.space.u32(place).ok()? as i32 as u64))
        };
        let (mut low, mut high) = (0, tables.count.min(1 << 28));
        while low < high {
            let middle = low + (high - low) / 2;
            if at(middle)? <= ip { low = middle + 1 } else { high = middle }
        }
        let number = low.checked_sub(1)?;
        let raw = self.space.unsigned(tables.entries.wrapping_add(number * places.size), places.size as usize).ok()?;
        let bits = |(start, len): (u32, u32)| raw.checked_shr(start).unwrap_or(0) & ((1 << len) - 1);
        let kind = match (places.end, bits(places.kind)) {
            (Some(end), _) if bits((end, 1)) != 0 => Kind::End,
            (Some(_), 0) if bits((32, 4)) == 0 => Kind::Undefined,
            (Some(_), 0) => Kind::Call,
            (Some(_), 1) => Kind::Registers,
            (Some(_), 2) => Kind::PartialRegisters,
            (None, 1) => Kind::End,
            (None, 2) => Kind::Call,
            (None, 3) => Kind::Registers,
            (None, 4) => Kind::PartialRegisters,
            _ => Kind::Undefined,
        };
        Some((i64::from(raw as i16), i64::from((raw >> 16) as i16), bits((32, 4)), bits((36, 4)), kind))
    }

    /// The caller of the frame with these registers. `returning`: RIP is a return address, so the call is before it.
    pub fn step(&self, registers: &Registers, returning: bool) -> Option<OrcStep> {
        use orrery_cpu::state::gpr;
        let ip = registers.rip;
        let (sp_offset, bp_offset, sp_register, bp_register, kind) =
            self.entry(ip.wrapping_sub(u64::from(returning)))?;
        match kind {
            Kind::End => return Some(OrcStep::End),
            Kind::Undefined => return None,
            _ => {}
        }
        let read = |address: u64| self.space.u64(address).ok();
        let (sp, bp) = (registers.gpr[gpr::RSP]?, registers.gpr[gpr::RBP]);
        // Numbers of registers as in arch/x86/include/asm/orc_types.h.
        let base = match sp_register {
            2 => registers.gpr[gpr::RDX]?,
            3 => registers.gpr[gpr::RDI]?,
            4 => bp?,
            5 => sp,
            6 => registers.gpr[gpr::R10]?,
            7 => registers.gpr[gpr::R13]?,
            8 => read(bp?.wrapping_add_signed(sp_offset))?,
            9 => read(sp)?,
            _ => return None,
        };
        let cfa = match sp_register {
            8 => base,
            _ => base.wrapping_add_signed(sp_offset),
        };
        let mut caller = *registers;
        match kind {
            Kind::Call => {
                caller.rip = read(cfa.wrapping_sub(8))?;
                caller.gpr[gpr::RSP] = Some(cfa);
                for scratch in [gpr::RAX, gpr::RCX, gpr::RDX, gpr::RSI, gpr::RDI, gpr::R8, gpr::R9, gpr::R10, gpr::R11]
                {
                    caller.gpr[scratch] = None;
                }
            }
            Kind::Registers | Kind::PartialRegisters => {
                // Partial registers are the five words that the processor pushes: the same places, counted from the end.
                let frame = if kind == Kind::Registers { cfa } else { cfa.wrapping_sub(PT_REGS_IP) };
                if read(frame.wrapping_add(PT_REGS_CS))? & 3 == 3 {
                    return Some(OrcStep::User(frame));
                }
                if kind == Kind::Registers {
                    caller = Registers::from_pt_regs(self.space, frame)?;
                } else {
                    caller.rip = read(frame.wrapping_add(PT_REGS_IP))?;
                    caller.gpr[gpr::RSP] = Some(read(frame.wrapping_add(PT_REGS_SP))?);
                }
            }
            Kind::Undefined | Kind::End => {}
        }
        caller.gpr[gpr::RBP] = match bp_register {
            0 => caller.gpr[gpr::RBP],
            1 => read(cfa.wrapping_add_signed(bp_offset)),
            4 => bp.and_then(|bp| read(bp.wrapping_add_signed(bp_offset))),
            _ => None,
        };
        Some(OrcStep::Caller(caller, kind == Kind::Call))
    }
}
