//! Decoding of the local APIC's registers: the same numbers serve the window (offset / 16) and the x2APIC MSRs
//! (MSR - 0x800) (Intel SDM volume 3, tables 11-1 and 11-6).

use super::{
    LVT_MASKED, LocalApic, Lvt, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC_FIRST, MSR_X2APIC_LAST,
    SVR_SOFTWARE_ENABLE, base,
};
use crate::{Context, VirtualNs};

/// An MSR access that raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsrError {
    /// No such register, or not in this mode, or not in this direction.
    #[error("MSR {msr:#x} cannot be accessed so in the local APIC's present mode")]
    Absent {
        /// The MSR.
        msr: u32,
    },
    /// The value sets reserved bits or asks for a forbidden transition.
    #[error("MSR {msr:#x} does not accept the value {value:#x}")]
    Value {
        /// The MSR.
        msr: u32,
        /// What was written.
        value: u64,
    },
}

mod register {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TASK_PRIORITY: u32 = 0x08;
    pub const ARBITRATION_PRIORITY: u32 = 0x09;
    pub const PROCESSOR_PRIORITY: u32 = 0x0A;
    pub const END_OF_INTERRUPT: u32 = 0x0B;
    pub const LOGICAL_DESTINATION: u32 = 0x0D;
    pub const DESTINATION_FORMAT: u32 = 0x0E;
    pub const SPURIOUS: u32 = 0x0F;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ERROR_STATUS: u32 = 0x28;
    pub const COMMAND: u32 = 0x30;
    pub const COMMAND_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_THERMAL: u32 = 0x33;
    pub const LVT_PERFORMANCE: u32 = 0x34;
    pub const LVT_LINT0: u32 = 0x35;
    pub const LVT_LINT1: u32 = 0x36;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3E;
    pub const SELF_IPI: u32 = 0x3F;
}

/// Version 0x14, six entries in the local vector table.
const VERSION: u32 = 0x0005_0014;
/// In x2APIC mode, of ID 0: cluster 0, member 0.
const X2APIC_LOGICAL_ID: u32 = 1;
/// Bits of an interrupt command that software may set.
const COMMAND_WRITABLE: u32 = 0x000C_CFFF;

/// The local vector table entry behind a register, and its writable bits.
fn lvt_of(number: u32) -> Option<(Lvt, u32)> {
    Some(match number {
        register::LVT_TIMER => (Lvt::Timer, 0x0007_00FF),
        register::LVT_THERMAL => (Lvt::Thermal, 0x0001_07FF),
        register::LVT_PERFORMANCE => (Lvt::Performance, 0x0001_07FF),
        register::LVT_LINT0 => (Lvt::Lint0, 0x0001_A7FF),
        register::LVT_LINT1 => (Lvt::Lint1, 0x0001_A7FF),
        register::LVT_ERROR => (Lvt::Error, 0x0001_00FF),
        _ => return None,
    })
}

impl LocalApic {
    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    pub fn msr_read(&mut self, now: VirtualNs, msr: u32) -> Result<u64, MsrError> {
        match msr {
            MSR_APIC_BASE => Ok(self.apic_base),
            MSR_TSC_DEADLINE => Ok(self.timer.deadline(self.lvt[Lvt::Timer as usize])),
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST if self.enabled() && self.x2apic() => match msr - MSR_X2APIC_FIRST {
                register::COMMAND => Ok(self.interrupt_command),
                register::ARBITRATION_PRIORITY
                | register::END_OF_INTERRUPT
                | register::DESTINATION_FORMAT
                | register::COMMAND_HIGH
                | register::SELF_IPI => Err(MsrError::Absent { msr }),
                number => self.read_register(number, now).map(u64::from).ok_or(MsrError::Absent { msr }),
            },
            _ => Err(MsrError::Absent { msr }),
        }
    }

    /// WRMSR to IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    pub fn msr_write(&mut self, ctx: &mut Context, msr: u32, value: u64) -> Result<(), MsrError> {
        match msr {
            MSR_APIC_BASE => self.write_base(ctx, value),
            MSR_TSC_DEADLINE => {
                self.timer.set_deadline(ctx, value, self.lvt[Lvt::Timer as usize]);
                Ok(())
            }
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST if self.enabled() && self.x2apic() => self.write_x2apic(ctx, msr, value),
            _ => Err(MsrError::Absent { msr }),
        }
    }

    /// Mode transitions (SDM 11.12.5). The window stays where it is: moving it is refused.
    fn write_base(&mut self, ctx: &mut Context, value: u64) -> Result<(), MsrError> {
        let refused = MsrError::Value { msr: MSR_APIC_BASE, value };
        let fixed = self.apic_base & !(base::BSP | base::EXTD | base::ENABLE);
        if value & !(base::BSP | base::EXTD | base::ENABLE) != fixed {
            return Err(refused);
        }
        let mode = |word: u64| (word & base::ENABLE != 0, word & base::EXTD != 0);
        match (mode(self.apic_base), mode(value)) {
            (_, (false, true)) | ((true, true), (true, false)) | ((false, _), (true, true)) => return Err(refused),
            (from, to) if from == to => {}
            (_, (false, false)) => self.reset(ctx),
            // xAPIC to x2APIC keeps everything but what only one of the modes has.
            (_, (true, true)) => {
                self.logical_destination = 0;
                self.destination_format = u32::MAX;
                self.interrupt_command &= 0xFFFF_FFFF;
            }
            (_, (true, false)) => {}
        }
        self.apic_base = fixed | base::BSP | value & (base::EXTD | base::ENABLE);
        Ok(())
    }

    fn write_x2apic(&mut self, ctx: &mut Context, msr: u32, value: u64) -> Result<(), MsrError> {
        let number = msr - MSR_X2APIC_FIRST;
        let allowed: u64 = match number {
            register::COMMAND => u64::from(COMMAND_WRITABLE) | 0xFFFF_FFFF_0000_0000,
            register::END_OF_INTERRUPT | register::ERROR_STATUS => 0,
            register::TASK_PRIORITY | register::SELF_IPI => 0xFF,
            register::SPURIOUS => 0x1FF,
            register::INITIAL_COUNT => 0xFFFF_FFFF,
            register::DIVIDE => 0xB,
            // Bit 12, the delivery status, is read-only but not reserved; bit 14 likewise for LINT0 and LINT1.
            _ => match lvt_of(number) {
                Some((_, writable)) => u64::from(writable) | 0x5000,
                None => return Err(MsrError::Absent { msr }),
            },
        };
        if value & !allowed != 0 {
            return Err(MsrError::Value { msr, value });
        }
        match number {
            register::COMMAND => {
                self.interrupt_command = value;
                self.send((value >> 32) as u32, value as u32);
            }
            register::SELF_IPI => self.send(0, 1 << 18 | value as u32),
            _ => self.write_register(ctx, number, value as u32),
        }
        Ok(())
    }

    /// Reads a 32-bit register; None if there is no such register.
    pub(super) fn read_register(&self, number: u32, now: VirtualNs) -> Option<u32> {
        let word = (number & 7) as usize;
        Some(match number {
            register::ID => 0,
            register::VERSION => VERSION,
            register::TASK_PRIORITY => u32::from(self.task_priority),
            register::PROCESSOR_PRIORITY => u32::from(self.processor_priority()),
            register::ARBITRATION_PRIORITY | register::END_OF_INTERRUPT => 0,
            register::LOGICAL_DESTINATION if self.x2apic() => X2APIC_LOGICAL_ID,
            register::LOGICAL_DESTINATION => self.logical_destination,
            register::DESTINATION_FORMAT => self.destination_format,
            register::SPURIOUS => self.spurious,
            register::ISR..register::TMR => self.isr.0[word],
            register::TMR..register::IRR => self.tmr.0[word],
            register::IRR..register::ERROR_STATUS => self.irr.0[word],
            register::ERROR_STATUS => self.error_status,
            register::COMMAND => self.interrupt_command as u32,
            register::COMMAND_HIGH => (self.interrupt_command >> 32) as u32,
            register::INITIAL_COUNT => self.timer.initial_count(),
            register::CURRENT_COUNT => self.timer.current_count(now, self.lvt[Lvt::Timer as usize]),
            register::DIVIDE => self.timer.divide_configuration(),
            _ => self.lvt[lvt_of(number)?.0 as usize],
        })
    }

    /// Writes a 32-bit register; read-only and absent ones ignore it.
    pub(super) fn write_register(&mut self, ctx: &mut Context, number: u32, value: u32) {
        match number {
            register::TASK_PRIORITY => self.task_priority = value as u8,
            register::END_OF_INTERRUPT => self.end_of_interrupt(ctx),
            register::LOGICAL_DESTINATION => self.logical_destination = value & 0xFF00_0000,
            register::DESTINATION_FORMAT => self.destination_format = value | 0x0FFF_FFFF,
            register::SPURIOUS => {
                self.spurious = value & 0x1FF;
                if value & SVR_SOFTWARE_ENABLE == 0 {
                    // Software-disabled: every entry is masked (SDM 11.4.7.2).
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            register::ERROR_STATUS => {
                self.error_status = std::mem::take(&mut self.error_pending);
            }
            register::COMMAND => {
                self.interrupt_command =
                    self.interrupt_command & 0xFFFF_FFFF_0000_0000 | u64::from(value & COMMAND_WRITABLE);
                self.send((self.interrupt_command >> 56) as u32, value & COMMAND_WRITABLE);
            }
            register::COMMAND_HIGH => {
                self.interrupt_command = self.interrupt_command & 0xFFFF_FFFF | u64::from(value & 0xFF00_0000) << 32;
            }
            register::INITIAL_COUNT => self.timer.set_initial_count(ctx, value, self.lvt[Lvt::Timer as usize]),
            register::DIVIDE => self.timer.set_divide_configuration(ctx, value, self.lvt[Lvt::Timer as usize]),
            _ => self.write_lvt(ctx, number, value),
        }
    }

    fn write_lvt(&mut self, ctx: &mut Context, number: u32, value: u32) {
        let Some((entry, writable)) = lvt_of(number) else { return };
        let mut value = value & writable;
        if !self.software_enabled() {
            value |= LVT_MASKED;
        }
        let before = std::mem::replace(&mut self.lvt[entry as usize], value);
        if entry == Lvt::Timer {
            self.timer.mode_changed(ctx, before, value);
        }
    }
}
