//! What the vCPU asks of the machine around it.

use crate::Icount;

/// An MSR access that the machine refuses: the instruction raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrRefused;

/// A time-stamp counter that grows with the icount alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscLine {
    /// Ticks at the limit.
    pub at_limit: u64,
    /// Ticks for each instruction.
    pub per_instruction: u64,
}

/// The machine as the vCPU sees it. Every call is stamped with the icount of the instruction that makes it,
/// that is, the number of instructions that have retired before it.
pub trait Bus {
    /// IN: reads `size` (1, 2 or 4) bytes from an I/O port. Absent ports read as all ones.
    fn port_read(&mut self, now: Icount, port: u16, size: usize) -> u32;
    /// OUT: writes `size` (1, 2 or 4) bytes to an I/O port.
    fn port_write(&mut self, now: Icount, port: u16, size: usize, value: u32);
    /// Reads from a guest-physical address that is not RAM. Absent addresses read as all ones.
    fn mmio_read(&mut self, now: Icount, gpa: u64, data: &mut [u8]);
    /// Writes to a guest-physical address that is not RAM.
    fn mmio_write(&mut self, now: Icount, gpa: u64, data: &[u8]);
    /// RDMSR of an MSR that the vCPU does not own: IA32_APIC_BASE (0x1B), IA32_TSC_DEADLINE (0x6E0) and the
    /// x2APIC range 0x800..=0x8FF.
    fn msr_read(&mut self, now: Icount, msr: u32) -> Result<u64, MsrRefused>;
    /// WRMSR to one of the same MSRs.
    fn msr_write(&mut self, now: Icount, msr: u32, value: u64) -> Result<(), MsrRefused>;
    /// CR8: bits 7:4 of the local APIC's task-priority register.
    fn task_priority(&mut self, now: Icount) -> u8;
    /// MOV to CR8.
    fn set_task_priority(&mut self, now: Icount, value: u8);
    /// The time-stamp counter of the machine at `now`, in ticks, before the guest's own IA32_TSC offset.
    fn tsc(&mut self, now: Icount) -> u64;
    /// The same as a straight line, if it is one until `limit`: ticks at `limit`, and ticks for each instruction. The
    /// vCPU may then read the counter without asking, until it is at `limit` or the machine has been asked to run it
    /// anew.
    fn tsc_line(&self, _limit: Icount) -> Option<TscLine> {
        None
    }
    /// The next 64 bits of the stream behind RDRAND and RDSEED.
    fn random(&mut self) -> u64;
    /// True when something that a call above did (an event scheduled, an interrupt raised, power off) must be
    /// looked at by the machine before the next instruction. The engine asks after each instruction that used
    /// the bus, and returns from `run` if so.
    fn attention(&self) -> bool;
}
