//! Executes cases in the engine, in a guest that looks like the host's user mode: 64-bit code at CPL 3 (or at CPL 0,
//! to test the other half of the memory-management unit), Linux's selectors, and an IDT whose handlers are HLT, so
//! that the exception that ends a case can be read from its stack frame.

use orrery_cpu::engine::{Engine, EngineConfig, Stop};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::state::{CpuState, Segment, TableRegister, control, seg};
use orrery_cpu::{Bus, Icount, bus::MsrRefused};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::case::{Case, Ending, Executor, Outcome, PAGE, Refusal, Registers, Rights, pages};

const RAM_BYTES: u64 = 4 << 20;
/// Guest-physical addresses of the system's own pages; they are mapped at HIGH + the same, where no case reaches.
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
const STACK_TOP: u64 = 0x8000;
const TABLES: u64 = 0x10000;
const HIGH: u64 = 0xFFFF_A5A5_0000_0000;
const HANDLER_BYTES: u64 = 16;
/// Most instructions a case may take; more means that the engine went astray.
const BUDGET: u64 = 100_000;

const KERNEL_CS: u16 = 0x10;
const KERNEL_SS: u16 = 0x18;
const USER_SS: u16 = 0x2B;
const USER_CS: u16 = 0x33;
const USER_CS_32: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x40;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// A bus with nothing on it.
struct EmptyBus;

impl Bus for EmptyBus {
    fn port_read(&mut self, _now: Icount, _port: u16, size: usize) -> u32 {
        (1u64 << (8 * size)).wrapping_sub(1) as u32
    }
    fn port_write(&mut self, _now: Icount, _port: u16, _size: usize, _value: u32) {}
    fn mmio_read(&mut self, _now: Icount, _gpa: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&mut self, _now: Icount, _gpa: u64, _data: &[u8]) {}
    fn msr_read(&mut self, _now: Icount, _msr: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn msr_write(&mut self, _now: Icount, _msr: u32, _value: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn task_priority(&mut self, _now: Icount) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _now: Icount, _value: u8) {}
    fn tsc(&mut self, now: Icount) -> u64 {
        now.0
    }
    fn random(&mut self) -> u64 {
        0x5EED
    }
    fn attention(&self) -> bool {
        false
    }
}

/// How the engine is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drive {
    /// One call runs the whole case.
    Whole,
    /// One call per instruction.
    Steps,
    /// One call per this many instructions.
    Strides(u64),
}

/// The engine as an executor.
pub struct Guest {
    engine: Engine,
    memory: GuestMemory,
    template: CpuState,
    pristine: Vec<u8>,
    drive: Drive,
}

/// Guest-physical page of the n-th test page: neighbours in linear memory are not neighbours here.
fn physical(n: usize) -> u64 {
    0x10_0000 + ((n as u64 * 7) % 13) * 3 * PAGE
}

struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    fn entry(&mut self, table: u64, index: u64) -> u64 {
        let at = table + index * 8;
        let old = read_u64(self.memory, at);
        if old & PRESENT != 0 {
            return old & 0x000F_FFFF_FFFF_F000;
        }
        self.next += PAGE;
        write_u64(self.memory, at, self.next | PRESENT | WRITABLE | USER);
        self.next
    }

    fn map(&mut self, linear: u64, physical: u64, flags: u64) {
        let mut table = TABLES;
        for level in [39, 30, 21] {
            table = self.entry(table, linear >> level & 511);
        }
        write_u64(self.memory, table + (linear >> 12 & 511) * 8, physical | flags | PRESENT);
    }
}

fn host(memory: &GuestMemory, gpa: u64) -> *mut u8 {
    memory.get_host_address(GuestAddress(gpa)).expect("inside RAM")
}

fn read_u64(memory: &GuestMemory, gpa: u64) -> u64 {
    // SAFETY: RAM is mapped for as long as `memory` lives, and whole pages of it.
    unsafe { host(memory, gpa).cast::<u64>().read_unaligned() }
}

fn write_u64(memory: &GuestMemory, gpa: u64, value: u64) {
    // SAFETY: as above.
    unsafe { host(memory, gpa).cast::<u64>().write_unaligned(value) }
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { base: 0, limit: 0xFFFF_FFFF, selector, attributes }
}

fn descriptor(attributes: u16) -> u64 {
    let a = u64::from(attributes);
    0x000F_0000_0000_FFFF | (a & 0xFF) << 40 | (a >> 8 & 0xF) << 52
}

impl Guest {
    /// A guest with its own RAM. `supervisor` runs the cases at CPL 0.
    pub fn new(config: EngineConfig, supervisor: bool, drive: Drive) -> Guest {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).expect("RAM for the guest");
        let mut tables = Tables { memory: &memory, next: TABLES };
        for page in 0..16 {
            tables.map(HIGH + page * PAGE, page * PAGE, WRITABLE);
        }
        for (n, (linear, rights)) in pages().enumerate() {
            let flags = match rights {
                Rights::Code => WRITABLE | USER,
                Rights::Data => WRITABLE | USER | NO_EXECUTE,
                Rights::ReadOnly => USER | NO_EXECUTE,
            };
            tables.map(linear, physical(n), flags);
        }
        for (selector, attributes) in
            [(KERNEL_CS, 0xA9B), (KERNEL_SS, 0xC93), (USER_CS_32, 0xCFB), (USER_SS, 0xCF3), (USER_CS, 0xAFB)]
        {
            write_u64(&memory, GDT + u64::from(selector & !7), descriptor(attributes));
        }
        let tss = HIGH + TSS;
        let tss_low = 0x67 | (tss & 0xFF_FFFF) << 16 | 0x8B << 40 | (tss >> 24 & 0xFF) << 56;
        write_u64(&memory, GDT + u64::from(TSS_SELECTOR), tss_low);
        write_u64(&memory, GDT + u64::from(TSS_SELECTOR) + 8, tss >> 32);
        for rsp_or_ist in [4, 0x24] {
            write_u64(&memory, TSS + rsp_or_ist, HIGH + STACK_TOP);
        }
        // No I/O permission bitmap.
        write_u64(&memory, TSS + 0x60, 0x68 << 48);
        for vector in 0..256 {
            let handler = HIGH + HANDLERS + vector * HANDLER_BYTES;
            let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
            let gate: u64 = 0x8E00_0000_0000 | dpl << 45 | 1 << 32;
            let low = handler & 0xFFFF | u64::from(KERNEL_CS) << 16 | gate | (handler >> 16 & 0xFFFF) << 48;
            write_u64(&memory, IDT + vector * 16, low);
            write_u64(&memory, IDT + vector * 16 + 8, handler >> 32);
            // SAFETY: the handlers' page is RAM.
            unsafe { host(&memory, HANDLERS + vector * HANDLER_BYTES).write(0xF4) };
        }
        let engine = Engine::new(memory.clone(), ModelFeatures::default(), config).expect("an engine on this host");
        let mut template = engine.state().clone();
        template.cr0 = control::CR0_PE
            | control::CR0_MP
            | control::CR0_ET
            | control::CR0_NE
            | control::CR0_WP
            | control::CR0_AM
            | control::CR0_PG;
        template.cr3 = TABLES;
        template.cr4 = control::CR4_PAE
            | control::CR4_PGE
            | control::CR4_OSFXSR
            | control::CR4_OSXMMEXCPT
            | control::CR4_OSXSAVE
            | control::CR4_FSGSBASE
            | control::CR4_UMIP;
        template.efer = control::EFER_SCE | control::EFER_LME | control::EFER_LMA | control::EFER_NXE;
        template.xcr0 = 7;
        template.dr[6] = 0xFFFF_0FF0;
        template.dr[7] = 0x400;
        template.gdtr = TableRegister { base: HIGH + GDT, limit: 0x4F };
        template.idtr = TableRegister { base: HIGH + IDT, limit: 0xFFF };
        template.tr = Segment { base: tss, limit: 0x67, selector: TSS_SELECTOR, attributes: 0x8B };
        if supervisor {
            template.seg[seg::CS] = segment(KERNEL_CS, 0xA9B);
            template.seg[seg::SS] = segment(KERNEL_SS, 0xC93);
            template.cpl = 0;
        } else {
            template.seg[seg::CS] = segment(USER_CS, 0xAFB);
            template.seg[seg::SS] = segment(USER_SS, 0xCF3);
            template.cpl = 3;
        }
        let pristine = crate::case::pristine_memory();
        let mut guest = Guest { engine, memory, template, pristine, drive };
        guest.restore(true);
        *guest.engine.state_mut() = guest.template.clone();
        guest.engine.state_replaced();
        guest
    }

    fn restore(&mut self, read_only_too: bool) {
        for (n, (_, rights)) in pages().enumerate() {
            if rights == Rights::ReadOnly && !read_only_too {
                continue;
            }
            let source = &self.pristine[n * PAGE as usize..][..PAGE as usize];
            // SAFETY: a page of RAM, while the guest does not run.
            unsafe {
                std::ptr::copy_nonoverlapping(source.as_ptr(), host(&self.memory, physical(n)), PAGE as usize);
            }
        }
    }

    fn poke(&mut self, linear: u64, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate() {
            let at = linear.wrapping_add(offset as u64);
            let found = pages().enumerate().find(|(_, (page, _))| at.wrapping_sub(*page) < PAGE);
            if let Some((n, (page, rights))) = found
                && rights != Rights::ReadOnly
            {
                // SAFETY: inside a page of RAM.
                unsafe { host(&self.memory, physical(n) + (at - page)).write(*byte) };
            }
        }
    }

    fn read_stack(&self, below_top: u64) -> u64 {
        read_u64(&self.memory, STACK_TOP - below_top)
    }
}

impl Executor for Guest {
    fn run(&mut self, case: &Case) -> Result<Outcome, Refusal> {
        self.restore(false);
        for (address, bytes) in &case.pokes {
            self.poke(*address, bytes);
        }
        self.poke(case.registers.rip, &case.code);
        for (n, (_, rights)) in pages().enumerate() {
            if rights == Rights::Code {
                self.engine.memory_written(physical(n), PAGE);
            }
        }
        let r = &case.registers;
        let mut state = self.template.clone();
        state.gpr = r.gpr;
        state.rip = r.rip;
        state.rflags = r.rflags;
        state.seg[seg::FS].base = r.fs_gs_base[0];
        state.seg[seg::GS].base = r.fs_gs_base[1];
        state.fpu = r.fpu;
        if case.bits == 32 {
            state.seg[seg::CS] = segment(USER_CS_32, 0xCFB);
            state.seg[seg::DS] = segment(USER_SS, 0xCF3);
            state.seg[seg::ES] = segment(USER_SS, 0xCF3);
        }
        *self.engine.state_mut() = state;

        let start = self.engine.icount().0;
        let stride = match self.drive {
            Drive::Whole => BUDGET,
            Drive::Steps => 1,
            Drive::Strides(n) => n,
        };
        let mut bus = EmptyBus;
        let stop = loop {
            let limit = self.engine.icount().0 + stride;
            let stop = self.engine.run(Icount(limit), &mut bus);
            if stop != Stop::Limit || self.engine.icount().0 - start > BUDGET {
                break stop;
            }
            if self.engine.icount().0 != limit {
                return Err(Refusal::Lacks(format!("stopped at icount {} for limit {limit}", self.engine.icount().0)));
            }
        };
        match stop {
            Stop::Halted => {}
            Stop::Unsupported { what, .. } => {
                return Err(Refusal::Lacks(format!("unsupported: {what}")));
            }
            other => {
                return Err(Refusal::Lacks(format!("{other:?} at rip {:#x}", self.engine.state().rip)));
            }
        }
        let state = self.engine.state();
        let vector = state.rip.wrapping_sub(HIGH + HANDLERS) / HANDLER_BYTES;
        if vector > 255 {
            return Err(Refusal::Lacks(format!("HLT at {:#x}", state.rip)));
        }
        let vector = vector as u8;
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let mut gpr = state.gpr;
        gpr[4] = self.read_stack(16);
        Ok(Outcome {
            registers: Registers {
                gpr,
                rip: self.read_stack(40),
                rflags: self.read_stack(24),
                fs_gs_base: [state.seg[seg::FS].base, state.seg[seg::GS].base],
                fpu: state.fpu,
            },
            ending: Ending {
                vector,
                error_code: if has_error { self.read_stack(48) as u32 } else { 0 },
                address: if vector == 14 { state.cr2 } else { 0 },
            },
            // The HLT of the handler has retired as well.
            retired: Some(self.engine.icount().0 - start - 1),
        })
    }

    fn page(&self, linear: u64) -> &[u8] {
        let (n, _) =
            pages().enumerate().find(|(_, (page, _))| *page == linear & !(PAGE - 1)).expect("one of the test pages");
        // SAFETY: a page of RAM; the guest runs only through `&mut self`.
        unsafe { std::slice::from_raw_parts(host(&self.memory, physical(n)), PAGE as usize) }
    }
}
