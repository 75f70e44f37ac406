//! The emulation on a small machine: 8 MiB of RAM, 4-level page tables, a GDT, an IDT and a TSS.

use super::*;
use crate::memory::{GuestMemory, PhysMemory};
use crate::paging::{entry, fault, walk};
use crate::state::{control, gpr, rflags, seg};
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
        Ok(0xFEE0_0900)
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
            ports: Ports { written: Vec::new(), random: 1 },
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
        self.state.seg[seg::CS] = crate::state::Segment {
            base: 0,
            limit: u32::MAX,
            selector: 0x33,
            attributes: 0xAFB,
        };
        self.state.seg[seg::SS] = crate::state::Segment {
            base: 0,
            limit: u32::MAX,
            selector: 0x2B,
            attributes: 0xCF3,
        };
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

mod paging_tests {
    use super::*;
    use crate::paging::Access;

    fn access(write: bool, fetch: bool, user: bool) -> Access {
        Access { write, fetch, user, smap_active: true }
    }

    fn error(result: Result<crate::paging::Translation, Exception>) -> u32 {
        match result {
            Err(Exception::PageFault { error, .. }) => error,
            other => panic!("{other:?} is not a page fault"),
        }
    }

    #[test]
    fn rights_and_error_codes() {
        let mut m = Machine::new();
        let walk = |m: &Machine, at, a| walk(&m.state, &m.sys.memory, at, a);
        assert_eq!(walk(&m, USER + 5, access(false, false, true)).unwrap().gpa, USER + 5);
        assert_eq!(error(walk(&m, HOLE, access(false, false, true))), fault::USER);
        assert_eq!(error(walk(&m, HANDLER, access(true, false, true))), fault::PRESENT | fault::WRITE | fault::USER);
        assert_eq!(error(walk(&m, READ_ONLY, access(true, false, true))), 7);
        // The kernel may write it, until CR0.WP is set.
        assert!(walk(&m, READ_ONLY, access(true, false, false)).is_ok());
        m.state.cr0 |= control::CR0_WP;
        assert_eq!(error(walk(&m, READ_ONLY, access(true, false, false))), 3);
        m.state.cr4 |= control::CR4_SMAP | control::CR4_SMEP;
        assert_eq!(error(walk(&m, USER, access(false, false, false))), fault::PRESENT);
        let suspended = Access { smap_active: false, ..access(false, false, false) };
        assert!(walk(&m, USER, suspended).is_ok());
        assert_eq!(error(walk(&m, USER, access(false, true, false))), fault::PRESENT | fault::FETCH);
        // No-execute.
        m.poke(0x5000 + 5 * 8, (USER + 0x5000) | 7 | entry::NO_EXECUTE);
        assert_eq!(error(walk(&m, USER + 0x5000, access(false, true, true))), 0x15);
        m.state.efer &= !control::EFER_NXE;
        assert_eq!(error(walk(&m, USER + 0x5000, access(false, false, true))), 0xD);
        // A physical address beyond the model's width.
        m.poke(0x5000 + 6 * 8, 1 << 50 | 7);
        assert_eq!(error(walk(&m, USER + 0x6000, access(false, false, true))), 0xD);
    }

    #[test]
    fn accessed_and_dirty_flags() {
        let m = Machine::new();
        let leaf = 0x5000 + 7 * 8;
        let at = USER + 0x7000;
        let refused = walk(&m.state, &m.sys.memory, READ_ONLY, access(true, false, true));
        assert!(refused.is_err() && m.peek(0x5000 + (0x102 * 8)) & entry::ACCESSED == 0);
        let first = walk(&m.state, &m.sys.memory, at, access(false, false, true)).unwrap();
        assert!(!first.dirty && first.updated & 8 != 0 && first.levels == 4 && first.table_entries[3] == leaf);
        assert_eq!(m.peek(leaf) & (entry::ACCESSED | entry::DIRTY), entry::ACCESSED);
        let second = walk(&m.state, &m.sys.memory, at, access(true, false, true)).unwrap();
        assert!(second.dirty && second.updated == 8);
        assert_eq!(walk(&m.state, &m.sys.memory, at, access(true, false, true)).unwrap().updated, 0);
    }

    #[test]
    fn large_pages() {
        let m = Machine::new();
        m.poke(0x3000 + 8 * 8, 0x20_0000 | 7 | entry::PAGE_SIZE);
        let at = (8 << 21) + 0x12345;
        let found = walk(&m.state, &m.sys.memory, at, access(false, false, true)).unwrap();
        assert_eq!((found.gpa, found.page_size, found.levels), (0x21_2345, 2 << 20, 3));
        m.poke(0x3000 + 9 * 8, 0x20_2000 | 7 | entry::PAGE_SIZE);
        assert_eq!(error(walk(&m.state, &m.sys.memory, 9 << 21, access(false, false, true))), 0xD);
        m.poke(0x2008, 7 | entry::PAGE_SIZE);
        let found = walk(&m.state, &m.sys.memory, (1 << 30) + 0x345678, access(false, false, true)).unwrap();
        assert_eq!((found.gpa, found.page_size, found.levels), (0x345678, 1 << 30, 2));
    }
}

#[test]
fn syscall_and_sysret() {
    let mut m = Machine::new().user();
    m.state.star = 0x0023_0010 << 32;
    m.state.lstar = HANDLER;
    m.state.sfmask = rflags::IF | rflags::TF;
    m.state.rflags = rflags::FIXED | rflags::IF | rflags::CF;
    m.run(&[0x0F, 0x05]).unwrap();
    assert_eq!((m.state.rip, m.state.cpl, m.state.gpr[gpr::RCX]), (HANDLER, 0, USER + 2));
    assert_eq!(m.state.rflags, rflags::FIXED | rflags::CF);
    assert_eq!((m.state.seg[seg::CS].selector, m.state.seg[seg::SS].selector), (0x10, 0x18));
    m.run(&[0x48, 0x0F, 0x07]).unwrap();
    assert_eq!((m.state.rip, m.state.cpl), (USER + 2, 3));
    assert_eq!((m.state.seg[seg::CS].selector, m.state.seg[seg::SS].selector), (0x33, 0x2B));
    assert_eq!(m.state.rflags, rflags::FIXED | rflags::IF | rflags::CF);
    m.state.efer &= !control::EFER_SCE;
    assert_eq!(raised(m.run(&[0x0F, 0x05])), Exception::InvalidOpcode);
}

#[test]
fn exception_from_user_mode_and_iret() {
    let mut m = Machine::new().user();
    m.state.rflags |= rflags::IF | rflags::TF;
    let before = m.state.clone();
    let fault = Exception::PageFault { address: HOLE + 8, error: 6 };
    deliver_exception(&mut m.state, fault, &mut m.sys).unwrap();
    assert_eq!((m.state.rip, m.state.cpl, m.state.cr2), (HANDLER + 14 * 16, 0, HOLE + 8));
    assert_eq!(m.state.rflags & (rflags::IF | rflags::TF), 0);
    let frame = KERNEL_STACK - 48;
    assert_eq!(m.state.gpr[gpr::RSP], frame);
    let words: Vec<u64> = (0..6).map(|i| m.peek(frame + i * 8)).collect();
    assert_eq!(words, [6, USER, 0x33, before.rflags | rflags::RF, USER + 0x8000, 0x2B]);
    m.state.gpr[gpr::RSP] += 8;
    m.run(&[0x48, 0xCF]).unwrap();
    assert_eq!(m.state.rflags, before.rflags | rflags::RF);
    m.state.rflags = before.rflags;
    m.state.cr2 = before.cr2;
    let mut expected = before;
    // The code segment's descriptor has become accessed; DS and ES of the kernel are gone.
    expected.seg[seg::CS].limit = u32::MAX;
    for which in [seg::ES, seg::DS, seg::FS, seg::GS] {
        expected.seg[which] = crate::state::Segment::default();
    }
    assert!(m.state == expected);
}

#[test]
fn interrupts_and_software_interrupts() {
    let mut m = Machine::new().user();
    deliver_interrupt(&mut m.state, 0x41, &mut m.sys).unwrap();
    assert_eq!((m.state.rip, m.state.gpr[gpr::RSP]), (HANDLER + 0x410, KERNEL_STACK - 40));
    assert_eq!(m.peek(KERNEL_STACK - 24) & rflags::RF, 0);

    let mut m = Machine::new().user();
    assert_eq!(raised(m.run(&[0xCD, 0x41])), Exception::GeneralProtection { error: 0x41 * 8 + 2 });
    m.run(&[0xCD, 0x80]).unwrap();
    assert_eq!(m.state.rip, HANDLER + 0x800);
    assert_eq!(m.peek(KERNEL_STACK - 40), USER + 2);
}

#[test]
fn double_and_triple_faults() {
    let mut m = Machine::new().user();
    // No stack for #PF; #DF has one of its own.
    m.poke(TSS + 4, HOLE + 0x1000);
    let fault = Exception::PageFault { address: 0x77, error: 4 };
    deliver_exception(&mut m.state, fault, &mut m.sys).unwrap();
    assert_eq!(m.state.rip, HANDLER + 8 * 16);
    assert_eq!(m.state.gpr[gpr::RSP], KERNEL_STACK + 0x8000 - 48);
    assert_eq!(m.peek(m.state.gpr[gpr::RSP]), 0);
    assert_eq!(m.state.cr2, HOLE + 0x1000 - 48);

    let mut m = Machine::new();
    m.state.idtr.limit = 0;
    assert_eq!(deliver_exception(&mut m.state, Exception::InvalidOpcode, &mut m.sys), Err(TripleFault));
}

#[test]
fn interrupt_flag_and_shadow() {
    let mut m = Machine::new();
    m.run(&[0xFB]).unwrap();
    assert!(m.state.interrupt_shadow && m.state.rflags & rflags::IF != 0);
    m.run(&[0xFB]).unwrap();
    assert!(!m.state.interrupt_shadow);
    m.state.gpr[gpr::RAX] = 0x18;
    m.run(&[0x8E, 0xD0]).unwrap();
    assert!(m.state.interrupt_shadow);
    m.run(&[0xFA]).unwrap();
    assert!(!m.state.interrupt_shadow && m.state.rflags & rflags::IF == 0);
    let mut m = Machine::new().user();
    assert_eq!(raised(m.run(&[0xFA])), Exception::GP0);
    assert_eq!(raised(m.run(&[0xF4])), Exception::GP0);
    // POPF in user mode changes neither IF nor IOPL.
    m.state.gpr[gpr::RSP] = USER + 0x100;
    m.poke(USER + 0x100, u64::MAX);
    m.run(&[0x9D]).unwrap();
    assert_eq!(m.state.rflags & (rflags::IF | rflags::IOPL | rflags::VM | rflags::RF), 0);
    assert_eq!(m.state.rflags & rflags::AC, rflags::AC);
}

#[test]
fn control_registers() {
    let mut m = Machine::new();
    let set = |m: &mut Machine, value: u64| m.state.gpr[gpr::RAX] = value;
    set(&mut m, PML4);
    m.run(&[0x0F, 0x22, 0xD8]).unwrap();
    assert_eq!(m.sys.flushes, [Flush::AddressSpace { pcid: 0, keep: false }]);
    let cr4 = m.state.cr4 | control::CR4_PCIDE;
    set(&mut m, cr4);
    m.run(&[0x0F, 0x22, 0xE0]).unwrap();
    set(&mut m, 1 << 63 | PML4 | 7);
    m.run(&[0x0F, 0x22, 0xD8]).unwrap();
    assert_eq!(m.sys.flushes.last(), Some(&Flush::AddressSpace { pcid: 7, keep: true }));
    assert_eq!(m.state.cr3, PML4 | 7);
    // Paging cannot be left from 64-bit mode, nor PAE from long mode; unknown bits are refused.
    set(&mut m, control::CR0_PE);
    assert_eq!(raised(m.run(&[0x0F, 0x22, 0xC0])), Exception::GP0);
    set(&mut m, cr4 & !control::CR4_PAE);
    assert_eq!(raised(m.run(&[0x0F, 0x22, 0xE0])), Exception::GP0);
    set(&mut m, cr4 | 1 << 12);
    assert_eq!(raised(m.run(&[0x0F, 0x22, 0xE0])), Exception::GP0);
    let mut m = m.user();
    assert_eq!(raised(m.run(&[0x0F, 0x20, 0xC0])), Exception::GP0);
}

#[test]
fn leaves_and_enters_long_mode_through_32_bit_code() {
    let mut m = Machine::new();
    m.poke(GDT + 0x60, 0x00CF_9B00_0000_FFFF);
    // Far return into 32-bit code.
    m.state.gpr[gpr::RSP] = 0x12_0000;
    m.poke(0x12_0000, 0x13_0000);
    m.poke(0x12_0008, 0x60);
    m.run(&[0x48, 0xCB]).unwrap();
    assert!(!m.state.is_64bit() && m.state.rip == 0x13_0000 && m.state.gpr[gpr::RSP] == 0x12_0010);
    // Paging off, EFER.LME again, paging on.
    m.state.gpr[gpr::RAX] = m.state.cr0 & !control::CR0_PG;
    m.run(&[0x0F, 0x22, 0xC0]).unwrap();
    assert_eq!(m.state.efer & control::EFER_LMA, 0);
    m.state.gpr[gpr::RCX] = 0xC000_0080;
    m.run(&[0x0F, 0x32]).unwrap();
    m.state.gpr[gpr::RAX] |= control::EFER_LME;
    m.run(&[0x0F, 0x30]).unwrap();
    m.state.gpr[gpr::RAX] = m.state.cr0 | control::CR0_PG;
    m.run(&[0x0F, 0x22, 0xC0]).unwrap();
    assert!(m.state.efer & control::EFER_LMA != 0 && !m.state.is_64bit());
    // Back by a far return of 32-bit operand size.
    m.poke(0x12_0010, 0x10 << 32 | 0x14_0000);
    m.run(&[0xCB]).unwrap();
    assert!(m.state.is_64bit() && m.state.rip == 0x14_0000);
    assert_eq!(m.state.gpr[gpr::RSP], 0x12_0018);
}

#[test]
fn segment_loads() {
    let mut m = Machine::new();
    let load = |m: &mut Machine, selector: u64, code: &[u8]| {
        m.state.gpr[gpr::RAX] = selector;
        m.run(code)
    };
    let (ds, ss, fs) = ([0x8E, 0xD8], [0x8E, 0xD0], [0x8E, 0xE0]);
    load(&mut m, 0x28, &ds).unwrap();
    assert_eq!(m.state.seg[seg::DS].attributes, 0xCF3);
    assert_eq!(raised(load(&mut m, 0x28, &ss)), Exception::GeneralProtection { error: 0x28 });
    assert_eq!(raised(load(&mut m, 0x100, &ds)), Exception::GeneralProtection { error: 0x100 });
    assert_eq!(raised(load(&mut m, 0x58, &ds)), Exception::SegmentNotPresent { error: 0x58 });
    assert_eq!(raised(load(&mut m, 0x58, &ss)), Exception::StackFault { error: 0x58 });
    assert_eq!(raised(load(&mut m, 0x40, &ds)), Exception::GeneralProtection { error: 0x40 });
    m.state.seg[seg::FS].base = 0x1234;
    load(&mut m, 0, &fs).unwrap();
    assert_eq!(m.state.seg[seg::FS], crate::state::Segment::default());
    load(&mut m, 0, &ss).unwrap();
    // The descriptor of the 64-bit user code segment becomes accessed when it is loaded.
    load(&mut m, 0x30, &ds).unwrap();
    assert_eq!(m.peek(GDT + 0x30) >> 40 & 1, 1);
    // The busy TSS cannot be loaded twice.
    assert_eq!(raised(load(&mut m, 0x40, &[0x0F, 0x00, 0xD8])), Exception::GeneralProtection { error: 0x40 });
    let mut m = m.user();
    assert_eq!(raised(load(&mut m, 0x18, &ds)), Exception::GeneralProtection { error: 0x18 });
    // LAR and LSL report instead of faulting.
    m.state.gpr[gpr::RCX] = 0x28;
    m.run(&[0x0F, 0x02, 0xC1]).unwrap();
    assert_eq!((m.state.gpr[gpr::RAX], m.state.rflags & rflags::ZF), (0x00C0_F300, rflags::ZF));
    m.run(&[0x0F, 0x03, 0xC1]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 0xFFFF_FFFF);
    m.state.gpr[gpr::RCX] = 0x18;
    m.run(&[0x0F, 0x02, 0xC1]).unwrap();
    assert_eq!(m.state.rflags & rflags::ZF, 0);
}

#[test]
fn rep_movs_and_stos() {
    for slow in [false, true] {
        let mut m = Machine::new().user();
        m.sys.slow = slow;
        let data: Vec<u8> = (0..10_000).map(|i| (i * 31 % 251) as u8).collect();
        m.fill(USER + 0x1_0001, &data);
        m.state.gpr[gpr::RSI] = USER + 0x1_0001;
        m.state.gpr[gpr::RDI] = USER + 0x2_0F03;
        m.state.gpr[gpr::RCX] = 1250;
        m.run(&[0xF3, 0x48, 0xA5]).unwrap();
        assert_eq!(m.bytes(USER + 0x2_0F03, 10_000), data);
        assert_eq!((m.state.gpr[gpr::RCX], m.state.gpr[gpr::RSI]), (0, USER + 0x1_0001 + 10_000));
        assert_eq!(m.state.rip, USER + 3);
        // Overlapping by one byte: fills.
        m.state.gpr[gpr::RSI] = USER + 0x1_0001;
        m.state.gpr[gpr::RDI] = USER + 0x1_0002;
        m.state.gpr[gpr::RCX] = 9_999;
        m.run(&[0xF3, 0xA4]).unwrap();
        assert!(m.bytes(USER + 0x1_0001, 10_000).iter().all(|byte| *byte == data[0]));
        // Backward.
        m.fill(USER + 0x1_0000, &data);
        m.state.rflags |= rflags::DF;
        m.state.gpr[gpr::RSI] = USER + 0x1_0000 + 9_996;
        m.state.gpr[gpr::RDI] = USER + 0x1_0000 + 9_998;
        m.state.gpr[gpr::RCX] = 2500;
        m.run(&[0xF3, 0xA5]).unwrap();
        let mut expected = data.clone();
        for i in (0..2500).rev() {
            let element = expected[i * 4..i * 4 + 4].to_vec();
            expected.resize(10_002, 0);
            expected[i * 4 + 2..i * 4 + 6].copy_from_slice(&element);
        }
        assert_eq!(m.bytes(USER + 0x1_0000, 9_998), expected[..9_998]);
        m.state.rflags &= !rflags::DF;
        // STOSW over page borders with an odd address.
        m.state.gpr[gpr::RAX] = 0x1234;
        m.state.gpr[gpr::RDI] = USER + 0x4_0FFF;
        m.state.gpr[gpr::RCX] = 3000;
        m.run(&[0xF3, 0x66, 0xAB]).unwrap();
        assert!(m.bytes(USER + 0x4_0FFF, 6000).chunks(2).all(|pair| pair == [0x34, 0x12]));
        assert_eq!(m.bytes(USER + 0x4_0FFF + 6000, 1), [0]);
    }
}

#[test]
fn rep_stops_at_a_fault_and_goes_on() {
    let mut m = Machine::new().user();
    m.state.gpr[gpr::RDI] = HOLE - 100;
    m.state.gpr[gpr::RCX] = 200;
    m.state.gpr[gpr::RAX] = 0x5A;
    let fault = Exception::PageFault { address: HOLE, error: fault::WRITE | fault::USER };
    assert_eq!(raised(m.run(&[0xF3, 0xAA])), fault);
    assert_eq!((m.state.gpr[gpr::RDI], m.state.gpr[gpr::RCX]), (HOLE, 100));
    m.poke(0x5000 + 0x100 * 8, HOLE | 7);
    m.run(&[0xF3, 0xAA]).unwrap();
    assert_eq!((m.state.gpr[gpr::RDI], m.state.gpr[gpr::RCX]), (HOLE + 100, 0));
    assert!(m.bytes(HOLE - 100, 200).iter().all(|byte| *byte == 0x5A));
}

#[test]
fn rep_compare_and_scan() {
    for slow in [false, true] {
        let mut m = Machine::new().user();
        m.sys.slow = slow;
        let mut text = vec![b'a'; 9000];
        m.fill(USER + 0x1_0000, &text);
        text[8500] = b'b';
        m.fill(USER + 0x2_0010, &text);
        m.state.gpr[gpr::RSI] = USER + 0x1_0000;
        m.state.gpr[gpr::RDI] = USER + 0x2_0010;
        m.state.gpr[gpr::RCX] = 9000;
        m.run(&[0xF3, 0xA6]).unwrap();
        assert_eq!(m.state.gpr[gpr::RCX], 9000 - 8501);
        assert_eq!(m.state.rflags & (rflags::ZF | rflags::CF), rflags::CF);
        // REPNE SCASB finds it too.
        m.state.gpr[gpr::RAX] = u64::from(b'b');
        m.state.gpr[gpr::RDI] = USER + 0x2_0010;
        m.state.gpr[gpr::RCX] = u64::MAX;
        m.run(&[0xF2, 0xAE]).unwrap();
        assert_eq!(m.state.gpr[gpr::RDI], USER + 0x2_0010 + 8501);
        assert_eq!(m.state.rflags & rflags::ZF, rflags::ZF);
        // A count of zero leaves the flags alone.
        m.state.gpr[gpr::RCX] = 0;
        m.run(&[0xF3, 0xA6]).unwrap();
        assert_eq!(m.state.rflags & rflags::ZF, rflags::ZF);
    }
}

#[test]
fn ports_and_permission() {
    let mut m = Machine::new();
    m.state.gpr[gpr::RAX] = 0x1122_3344;
    m.run(&[0xE6, 0x80]).unwrap();
    assert_eq!(m.sys.ports.written, [(0x80, 0x44)]);
    m.state.gpr[gpr::RDX] = 0x3F8;
    m.run(&[0xED]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 0xAB00_03F8);
    let mut m = m.user();
    assert_eq!(raised(m.run(&[0xEC])), Exception::GP0);
    m.state.rflags |= rflags::IOPL;
    m.run(&[0xEC]).unwrap();
}

#[test]
fn xsave_round_trip_and_checks() {
    let mut m = Machine::new().user();
    m.state.cr4 |= control::CR4_OSXSAVE | control::CR4_OSFXSR;
    m.state.xcr0 = 7;
    for (i, byte) in m.state.fpu.0[160..416].iter_mut().enumerate() {
        *byte = i as u8;
    }
    m.state.fpu.0[576..].fill(0x77);
    let saved = m.state.fpu;
    (m.state.gpr[gpr::RAX], m.state.gpr[gpr::RDX], m.state.gpr[gpr::RDI]) = (7, 0, USER + 0x1000);
    m.run(&[0x48, 0x0F, 0xAE, 0x27]).unwrap();
    assert_eq!(m.peek(USER + 0x1000 + 512), 7);
    m.state.fpu = crate::model::initial_fpu();
    m.run(&[0x48, 0x0F, 0xAE, 0x2F]).unwrap();
    assert!(m.state.fpu == saved);
    // Components that are not in XSTATE_BV are initialised.
    m.poke(USER + 0x1000 + 512, 3);
    m.run(&[0x48, 0x0F, 0xAE, 0x2F]).unwrap();
    assert!(m.state.fpu.0[576..].iter().all(|byte| *byte == 0));
    // Unknown components, the compacted format, reserved bits of MXCSR, alignment.
    m.poke(USER + 0x1000 + 512, 8);
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x2F])), Exception::GP0);
    m.poke(USER + 0x1000 + 512, 7);
    m.poke(USER + 0x1000 + 520, 1 << 63);
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x2F])), Exception::GP0);
    m.poke(USER + 0x1000 + 520, 0);
    m.poke(USER + 0x1000 + 24, 0xFFFF_0001_1F80);
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x2F])), Exception::GP0);
    m.state.gpr[gpr::RDI] += 16;
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x27])), Exception::GP0);
    m.state.cr0 |= control::CR0_TS;
    assert_eq!(raised(m.run(&[0x48, 0x0F, 0xAE, 0x27])), Exception::DeviceNotAvailable);
}

#[test]
fn x87_environment() {
    let mut m = Machine::new().user();
    // TOP = 6: ST0 = 1.0 and ST1 = 0.0 are physical 6 and 7.
    m.state.fpu.0[3] = 6 << 3;
    m.state.fpu.0[4] = 0xC0;
    m.state.fpu.0[39] = 0x80;
    m.state.fpu.0[40..42].copy_from_slice(&0x3FFFu16.to_le_bytes());
    m.state.gpr[gpr::RDI] = USER + 0x1000;
    let before = m.state.fpu;
    m.run(&[0xDD, 0x37]).unwrap();
    assert_eq!(m.peek(USER + 0x1008) as u16, 0x4FFF);
    assert!(m.state.fpu.0[4] == 0 && m.state.fpu.0[3] == 0);
    m.run(&[0xDD, 0x27]).unwrap();
    assert!(m.state.fpu == before);
}

#[test]
fn masked_accesses() {
    let mut m = Machine::new().user();
    m.state.cr4 |= control::CR4_OSXSAVE | control::CR4_OSFXSR;
    m.state.xcr0 = 7;
    // VPMASKMOVD xmm0, xmm1, [rdi]: element 1 lies in the hole and is masked out.
    m.state.gpr[gpr::RDI] = HOLE - 4;
    m.poke(HOLE - 8, 0x0BAD_CAFE_0000_0000);
    m.state.fpu.0[176..192].fill(0);
    m.state.fpu.0[179] = 0x80;
    m.state.fpu.0[576..592].fill(9);
    m.run(&[0xC4, 0xE2, 0x71, 0x8C, 0x07]).unwrap();
    assert_eq!(m.state.fpu.0[160..176], [0xFE, 0xCA, 0xAD, 0x0B, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(m.state.fpu.0[576..592], [0; 16]);
    // VPGATHERDD xmm0, [rdi + xmm2*4], xmm1: the second element faults, the first is done.
    m.state.fpu.0[176..192].fill(0xFF);
    m.state.fpu.0[192..208].fill(0);
    m.state.fpu.0[196] = 1;
    let fault = Exception::PageFault { address: HOLE, error: fault::USER };
    assert_eq!(raised(m.run(&[0xC4, 0xE2, 0x71, 0x90, 0x04, 0x97])), fault);
    assert_eq!(m.state.fpu.0[176..184], [0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF]);
    m.state.fpu.0[196] = 0;
    m.run(&[0xC4, 0xE2, 0x71, 0x90, 0x04, 0x97]).unwrap();
    assert_eq!(m.state.fpu.0[160..176], [0xFE, 0xCA, 0xAD, 0x0B].repeat(4)[..]);
    assert_eq!(m.state.fpu.0[176..192], [0; 16]);
}

#[test]
fn model_instructions() {
    let mut m = Machine::new();
    m.state.gpr[gpr::RAX] = 1;
    m.run(&[0x0F, 0xA2]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 0xF_0601);
    m.run(&[0x0F, 0x31]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 3000);
    // WRMSR to the TSC moves TSC_ADJUST too.
    (m.state.gpr[gpr::RCX], m.state.gpr[gpr::RAX], m.state.gpr[gpr::RDX]) = (0x10, 5000, 0);
    m.run(&[0x0F, 0x30]).unwrap();
    m.state.gpr[gpr::RCX] = 0x3B;
    m.run(&[0x0F, 0x32]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 2000);
    m.state.gpr[gpr::RCX] = 0xC001_0015;
    assert_eq!(raised(m.run(&[0x0F, 0x32])), Exception::GP0);
    m.run(&[0x48, 0x0F, 0xC7, 0xF0]).unwrap();
    assert_eq!(m.state.gpr[gpr::RAX], 6364136223846793006);
    assert_eq!(m.state.rflags & rflags::STATUS, rflags::CF);
    assert_eq!(raised(m.run(&[0x0F, 0x01, 0xC8])), Exception::InvalidOpcode);
    assert_eq!(raised(m.run(&[0x0F, 0x0B])), Exception::InvalidOpcode);
}

#[test]
fn addresses() {
    let mut m = Machine::new().user();
    // Stack-segment accesses to a non-canonical address are #SS, others #GP.
    m.state.gpr[gpr::RBP] = 1 << 47;
    assert_eq!(raised(m.run(&[0x0F, 0xAE, 0x5D, 0x00])), Exception::InvalidOpcode);
    m.state.cr4 |= control::CR4_OSFXSR;
    assert_eq!(raised(m.run(&[0x0F, 0xAE, 0x5D, 0x00])), Exception::StackFault { error: 0 });
    m.state.gpr[gpr::RDI] = (1 << 47) - 3;
    assert_eq!(raised(m.run(&[0x0F, 0xAE, 0x1F])), Exception::GP0);
    // RIP-relative operands are relative to where the instruction is, not to where it was decoded.
    m.run(&[0x0F, 0xAE, 0x1D, 0x10, 0, 0, 0]).unwrap();
    assert_eq!(m.peek(USER + 7 + 0x10) as u32, 0x1F80);
    // FS base, and a 32-bit address that wraps.
    m.state.rip = USER;
    m.state.seg[seg::FS].base = USER + 0x100;
    m.state.gpr[gpr::RDI] = 0xFFFF_FFFF_FFFF_FFF8;
    m.state.gpr[gpr::RSI] = 0x10;
    m.run(&[0x64, 0x67, 0x0F, 0xAE, 0x1C, 0x37]).unwrap();
    assert_eq!(m.peek(USER + 0x108) as u32, 0x1F80);
}
