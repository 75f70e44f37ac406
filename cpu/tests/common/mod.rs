//! What several tests of the vCPU share.

use orrery_cpu::bus::MsrRefused;
use orrery_cpu::{Bus, Icount};

/// A machine with nothing around the vCPU.
pub struct Empty;

impl Bus for Empty {
    fn port_read(&mut self, _: Icount, _: u16, _: usize) -> u32 {
        0
    }
    fn port_write(&mut self, _: Icount, _: u16, _: usize, _: u32) {}
    fn mmio_read(&mut self, _: Icount, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&mut self, _: Icount, _: u64, _: &[u8]) {}
    fn msr_read(&mut self, _: Icount, _: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn msr_write(&mut self, _: Icount, _: u32, _: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn task_priority(&mut self, _: Icount) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: Icount, _: u8) {}
    fn tsc(&mut self, now: Icount) -> u64 {
        now.0
    }
    fn random(&mut self) -> u64 {
        1
    }
    fn attention(&self) -> bool {
        false
    }
}
