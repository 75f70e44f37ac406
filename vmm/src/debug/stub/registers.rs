//! Register values for gdb, in the order of [`super::description`].

use gdbstub::arch::{Arch, RegId, Registers};
use orrery_cpu::CpuState;
use orrery_cpu::state::rflags;

use super::description::{self, Register};
use crate::machine::Machine;

/// x86-64 with everything that the vCPU has.
pub enum OrreryX86 {}

impl Arch for OrreryX86 {
    type Usize = u64;
    type Registers = Values;
    type BreakpointKind = usize;
    type RegId = Number;

    fn target_description_xml() -> Option<&'static str> {
        Some(description::xml())
    }
}

/// All registers as they go over the wire.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Values {
    rip: u64,
    bytes: Vec<u8>,
}

impl Values {
    /// The registers of a machine.
    pub fn of(machine: &Machine) -> Values {
        let mut bytes = Vec::new();
        for register in description::registers() {
            bytes.extend(read(machine, *register));
        }
        Values { rip: machine.cpu().rip, bytes }
    }

    /// Puts all of them into a state; None if there are too few. Those that cannot be written are left as they are.
    pub fn apply(&self, cpu: &mut CpuState) -> Option<()> {
        let mut rest = &self.bytes[..];
        for register in description::registers() {
            let value = rest.split_off(..register.size())?;
            write(cpu, *register, value);
        }
        Some(())
    }
}

impl Registers for Values {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.bytes.iter().for_each(|byte| write_byte(Some(*byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.bytes = bytes.to_vec();
        Ok(())
    }
}

/// A register by gdb's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number(pub Register);

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Number, Option<std::num::NonZeroUsize>)> {
        let register = *description::registers().get(id)?;
        Some((Number(register), std::num::NonZeroUsize::new(register.size())))
    }
}

/// Places in the XSAVE image (Intel SDM volume 1, sections 10.5.1 and 13.4).
mod image {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const YMM_HIGH: usize = 576;
}

/// The bytes of a register.
pub fn read(machine: &Machine, register: Register) -> Vec<u8> {
    let cpu = machine.cpu();
    let fpu = &cpu.fpu.0;
    let half = |at: usize| u16::from_le_bytes([fpu[at], fpu[at + 1]]);
    let slice = |at: usize, len: usize| fpu[at..at + len].to_vec();
    match register {
        Register::Gpr(number) => cpu.gpr[number as usize].to_le_bytes().to_vec(),
        Register::Rip => cpu.rip.to_le_bytes().to_vec(),
        Register::Flags => (cpu.rflags as u32).to_le_bytes().to_vec(),
        Register::Selector(number) => u32::from(cpu.seg[number as usize].selector).to_le_bytes().to_vec(),
        Register::St(number) => slice(image::ST + 16 * number as usize, 10),
        Register::X87(number) => {
            let value = match number {
                0 => half(image::FCW),
                1 => half(image::FSW),
                2 => full_tags(fpu),
                7 => half(image::FOP),
                // Addresses of the last x87 instruction and operand: always zero.
                _ => 0,
            };
            u32::from(value).to_le_bytes().to_vec()
        }
        Register::Xmm(number) => slice(image::XMM + 16 * number as usize, 16),
        Register::Mxcsr => slice(image::MXCSR, 4),
        Register::YmmHigh(number) => slice(image::YMM_HIGH + 16 * number as usize, 16),
        Register::SegmentBase(number) => cpu.seg[number as usize].base.to_le_bytes().to_vec(),
        Register::System(number) => system(machine, number).to_le_bytes().to_vec(),
    }
}

/// The tag word in its full form, two bits per physical register, from the abridged one and the registers' contents
/// (Intel SDM volume 1, section 8.1.7).
fn full_tags(fpu: &[u8]) -> u16 {
    let top = usize::from(fpu[image::FSW + 1] >> 3 & 7);
    (0..8).fold(0, |tags, physical: usize| {
        let stack = (physical + 8 - top) % 8;
        let at = image::ST + 16 * stack;
        let mantissa = u64::from_le_bytes(fpu[at..at + 8].try_into().expect("eight bytes"));
        let exponent = u16::from_le_bytes([fpu[at + 8], fpu[at + 9]]) & 0x7FFF;
        let tag = if fpu[image::FTW] & 1 << physical == 0 {
            3
        } else if exponent == 0 && mantissa == 0 {
            1
        } else if exponent == 0 || exponent == 0x7FFF || mantissa >> 63 == 0 {
            2
        } else {
            0
        };
        tags | tag << (2 * physical)
    })
}

fn system(machine: &Machine, number: u8) -> u64 {
    let cpu = machine.cpu();
    match description::SYSTEM[number as usize] {
        "cr0" => cpu.cr0,
        "cr2" => cpu.cr2,
        "cr3" => cpu.cr3,
        "cr4" => cpu.cr4,
        "xcr0" => cpu.xcr0,
        "efer" => cpu.efer,
        "dr0" => cpu.dr[0],
        "dr1" => cpu.dr[1],
        "dr2" => cpu.dr[2],
        "dr3" => cpu.dr[3],
        "dr6" => cpu.dr[6],
        "dr7" => cpu.dr[7],
        "kernel_gs_base" => cpu.kernel_gs_base,
        "star" => cpu.star,
        "lstar" => cpu.lstar,
        "cstar" => cpu.cstar,
        "sfmask" => cpu.sfmask,
        "tsc_aux" => cpu.tsc_aux,
        "sysenter_cs" => cpu.sysenter_cs,
        "sysenter_esp" => cpu.sysenter_esp,
        "sysenter_eip" => cpu.sysenter_eip,
        "pat" => cpu.pat,
        "misc_enable" => cpu.misc_enable,
        "gdt_base" => cpu.gdtr.base,
        "idt_base" => cpu.idtr.base,
        "tr_base" => cpu.tr.base,
        "cpl" => u64::from(cpu.cpl),
        "icount" => machine.icount().0,
        _ => machine.time().0,
    }
}

/// Status and control flags that a debugger may change; the others would leave the model.
const FLAGS: u64 = rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;

/// Writes a register; false if it is one that cannot be written.
pub fn write(cpu: &mut CpuState, register: Register, value: &[u8]) -> bool {
    let mut wide = [0; 8];
    let len = value.len().min(8);
    wide[..len].copy_from_slice(&value[..len]);
    let number = u64::from_le_bytes(wide);
    if value.len() != register.size() {
        return false;
    }
    let place = match register {
        Register::Gpr(index) => {
            cpu.gpr[index as usize] = number;
            return true;
        }
        Register::Rip => {
            cpu.rip = number;
            return true;
        }
        Register::Flags => {
            cpu.rflags = cpu.rflags & !FLAGS | number & FLAGS;
            return true;
        }
        Register::SegmentBase(index) if orrery_cpu::paging::is_canonical(number) => {
            cpu.seg[index as usize].base = number;
            return true;
        }
        Register::St(index) => image::ST + 16 * index as usize,
        Register::Xmm(index) => image::XMM + 16 * index as usize,
        Register::YmmHigh(index) => image::YMM_HIGH + 16 * index as usize,
        _ => return false,
    };
    cpu.fpu.0[place..place + value.len()].copy_from_slice(value);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_spelled_out() {
        let mut fpu = vec![0u8; 832];
        assert_eq!(full_tags(&fpu), 0xFFFF);
        // One register in use, at the top, which is 7: it holds 1.0.
        fpu[image::FSW + 1] = 7 << 3;
        fpu[image::FTW] = 0x80;
        fpu[image::ST + 7] = 0x80;
        fpu[image::ST + 8..image::ST + 10].copy_from_slice(&[0xFF, 0x3F]);
        assert_eq!(full_tags(&fpu), 0x3FFF);
        fpu[image::ST..image::ST + 10].fill(0);
        assert_eq!(full_tags(&fpu), 0x7FFF);
    }

    #[test]
    fn what_leaves_the_model_is_not_written() {
        let mut cpu = CpuState::long_mode_boot(0, 0, 0, 0, 0, 0);
        assert!(write(&mut cpu, Register::Flags, &u32::MAX.to_le_bytes()));
        assert_eq!(cpu.rflags & rflags::VM, 0);
        assert!(!write(&mut cpu, Register::System(0), &[0; 8]));
        assert!(!write(&mut cpu, Register::Gpr(0), &[0; 4]));
        assert!(!write(&mut cpu, Register::SegmentBase(4), &(1u64 << 63).to_le_bytes()));
        assert!(write(&mut cpu, Register::Gpr(4), &7u64.to_le_bytes()));
        assert_eq!(cpu.gpr[4], 7);
    }
}
