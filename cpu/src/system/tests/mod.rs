//! The emulation on a small machine: 8 MiB of RAM, 4-level page tables, a GDT, an IDT and a TSS.

mod data;
mod gates;
mod hostile;
mod paging;
mod privileged;
mod real;

use super::*;
use crate::memory::{GuestMemory, PhysMemory};
use crate::paging::{entry, walk};
use crate::state::{control, gpr, seg};
use iced_x86::{Decoder, DecoderOptions};
use vm_memory::GuestAddress;

const RAM: usize = 8 << 20;
const PML4: u64 = 0x1000;
const GDT: u64 = 0x8000;
const IDT: u64 = 0x9000;
const TSS: u64 = 0xA000;
/// Identity-mapped pages that user mode may use start here.
const USER: u64 = 0x20_0000;
/// The one page that is not present.
const HOLE: u64 = 0x30_0000;
/// A read-only user page.
const READ_ONLY: u64 = 0x30_2000;
const HANDLER: u64 = 0x10_0000;
const KERNEL_STACK: u64 = 0x11_0000;

struct Ports {
    written: Vec<(u16, u32)>,
    random: u64,
    /// What every MSR of the machine reads as.
    apic_base: u64,
}

impl Bus for Ports {
    fn port_read(&mut self, _: Icount, port: u16, _: usize) -> u32 {
        u32::from(port) | 0xAB00_0000
    }
    fn port_write(&mut self, _: Icount, port: u16, _: usize, value: u32) {
        self.written.push((port, value));
    }
    fn mmio_read(&mut self, _: Icount, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&mut self, _: Icount, _: u64, _: &[u8]) {}
    fn msr_read(&mut self, _: Icount, _: u32) -> Result<u64, MsrRefused> {
        Ok(self.apic_base)
    }
    fn msr_write(&mut self, _: Icount, _: u32, _: u64) -> Result<(), MsrRefused> {
        Ok(())
    }
    fn task_priority(&mut self, _: Icount) -> u8 {
        5
    }
    fn set_task_priority(&mut self, _: Icount, _: u8) {}
    fn tsc(&mut self, now: Icount) -> u64 {
        now.0 * 3
    }
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1);
        self.random
    }
    fn attention(&self) -> bool {
        false
    }
}

struct Flat {
    memory: PhysMemory,
    ports: Ports,
    features: ModelFeatures,
    flushes: Vec<Flush>,
    /// Offers no host pointers, as if all memory were devices: the slow paths.
    slow: bool,
}

impl Flat {
    fn copy(
        &mut self,
        state: &CpuState,
        linear: u64,
        len: usize,
        write: bool,
        privilege: Privilege,
    ) -> Result<Vec<*mut u8>, Exception> {
        let mut bytes = Vec::new();
        for i in 0..len as u64 {
            let at = walk(state, &self.memory, linear + i, privilege.data(state, write))?;
            bytes.push(self.memory.host(at.gpa, 1).expect("RAM"));
        }
        Ok(bytes)
    }
}

impl System for Flat {
    fn read(&mut self, state: &mut CpuState, at: u64, data: &mut [u8], p: Privilege) -> Result<(), Exception> {
        let hosts = self.copy(state, at, data.len(), false, p)?;
        for (byte, host) in data.iter_mut().zip(hosts) {
            // SAFETY: `host` is one byte of RAM.
            *byte = unsafe { host.read() };
        }
        Ok(())
    }
    fn write(&mut self, state: &mut CpuState, at: u64, data: &[u8], p: Privilege) -> Result<(), Exception> {
        for (byte, host) in data.iter().zip(self.copy(state, at, data.len(), true, p)?) {
            // SAFETY: `host` is one byte of RAM.
            unsafe { host.write(*byte) };
        }
        Ok(())
    }
    fn page_pointer(
        &mut self,
        state: &mut CpuState,
        at: u64,
        len: usize,
        write: bool,
        p: Privilege,
    ) -> Result<Option<*mut u8>, Exception> {
        assert!(len >= 1 && (at & 0xFFF) as usize + len <= 4096);
        let first = self.copy(state, at, 1, write, p)?[0];
        Ok((!self.slow).then_some(first))
    }
    fn flush(&mut self, what: Flush) {
        self.flushes.push(what);
    }
    fn bus(&mut self) -> &mut dyn Bus {
        &mut self.ports
    }
    fn now(&self) -> Icount {
        Icount(1000)
    }
    fn features(&self) -> &ModelFeatures {
        &self.features
    }
}

/// A vCPU in 64-bit kernel mode.
struct Machine {
    state: CpuState,
    sys: Flat,
}

impl Machine {
    fn new() -> Machine {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM)]).expect("RAM");
        let memory = PhysMemory::new(memory);
        let poke = |at: u64, value: u64| memory.write_u64(at, value).expect("RAM");
        let table = entry::PRESENT | entry::WRITE | entry::USER;
        poke(PML4, 0x2000 | table);
        poke(0x2000, 0x3000 | table);
        for large in 0..4u64 {
            poke(0x3000 + large * 8, (0x4000 + large * 0x1000) | table);
            for page in 0..512u64 {
                let gpa = large << 21 | page << 12;
                let mut value = gpa | entry::PRESENT | entry::WRITE;
                if gpa >= USER {
                    value |= entry::USER;
                }
                if gpa == HOLE {
                    value = 0;
                } else if gpa == READ_ONLY {
                    value &= !entry::WRITE;
                }
                poke(0x4000 + large * 0x1000 + page * 8, value);
            }
        }
        // Kernel code 0x10 and data 0x18, user code32 0x20, data 0x28, code64 0x30; TSS 0x40; call gate 0x50.
        let descriptors = [
            (0x10, 0x00AF_9B00_0000_FFFF),
            (0x18, 0x00CF_9300_0000_FFFF),
            (0x20, 0x00CF_FB00_0000_FFFF),
            (0x28, 0x00CF_F300_0000_FFFF),
            (0x30, 0x00AF_FA00_0000_FFFF),
            (0x40, 0x0000_8900_0000_0067 | TSS << 16),
            (0x48, 0),
            (0x58, 0x00CF_1300_0000_FFFF),
        ];
        for (selector, value) in descriptors {
            poke(GDT + selector, value);
        }
        for vector in 0..256u64 {
            let target = HANDLER + vector * 16;
            let dpl = if vector == 0x80 || vector == 3 { 3 } else { 0 };
            let ist = if vector == 8 { 1 } else { 0 };
            let low = target & 0xFFFF | 0x10 << 16 | ist << 32 | (0x8E | dpl << 5) << 40 | (target >> 16) << 48;
            poke(IDT + vector * 16, low);
            poke(IDT + vector * 16 + 8, 0);
        }
        poke(TSS + 4, KERNEL_STACK);
        poke(TSS + 36, KERNEL_STACK + 0x8000);
        let mut state = CpuState::long_mode_boot(USER, 0, 0x12_0000, PML4, GDT, 0xFF);
        state.idtr = crate::state::TableRegister { base: IDT, limit: 0xFFF };
        state.efer |= control::EFER_NXE | control::EFER_SCE;
        let sys = Flat {
            memory,
            ports: Ports { written: Vec::new(), random: 1, apic_base: 0xFEE0_0900 },
            features: ModelFeatures::default(),
            flushes: Vec::new(),
            slow: false,
        };
        let mut machine = Machine { state, sys };
        machine.state.gpr[gpr::RAX] = 0x40;
        machine.run(&[0x0F, 0x00, 0xD8]).expect("LTR");
        machine.state.rip = USER;
        machine
    }

    /// Moves to user mode, 64-bit.
    fn user(mut self) -> Machine {
        self.state.cpl = 3;
        self.state.seg[seg::CS] = crate::state::Segment { base: 0, limit: u32::MAX, selector: 0x33, attributes: 0xAFB };
        self.state.seg[seg::SS] = crate::state::Segment { base: 0, limit: u32::MAX, selector: 0x2B, attributes: 0xCF3 };
        self.state.gpr[gpr::RSP] = USER + 0x8000;
        self
    }

    /// Executes the instruction in `code` at RIP. It is decoded at another address on purpose.
    fn run(&mut self, code: &[u8]) -> Executed {
        let bitness = if self.state.is_64bit() { 64 } else { 32 };
        let mut decoder = Decoder::with_ip(bitness, code, 0x1234_5000, DecoderOptions::NONE);
        let instr = decoder.decode();
        assert_eq!(instr.len(), code.len(), "one whole instruction");
        let before = self.state.clone();
        let result = execute(&mut self.state, &instr, &mut self.sys);
        if let Err(ExecError::Exception(_)) = result {
            assert_eq!(self.state.rip, before.rip);
            assert_eq!(self.state.rflags, before.rflags);
        }
        result
    }

    fn peek(&self, at: u64) -> u64 {
        self.sys.memory.read_u64(at).expect("RAM")
    }

    fn poke(&self, at: u64, value: u64) {
        self.sys.memory.write_u64(at, value).expect("RAM");
    }

    fn fill(&self, at: u64, bytes: &[u8]) {
        let host = self.sys.memory.host(at, bytes.len() as u64).expect("RAM");
        // SAFETY: `host` has checked the range.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let host = self.sys.memory.host(at, len as u64).expect("RAM");
        // SAFETY: `host` has checked the range.
        unsafe { std::slice::from_raw_parts(host, len).to_vec() }
    }
}

fn raised(result: Executed) -> Exception {
    match result {
        Err(ExecError::Exception(exception)) => exception,
        other => panic!("{other:?} is not an exception"),
    }
}
