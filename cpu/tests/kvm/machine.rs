//! The machine that both sides start from: RAM with page tables, a GDT, an IDT whose handlers skip what faulted, a
//! TSS, the test regions of the host oracle in user space, and all of RAM once more in kernel space.

use orrery_cpu::memory::{GuestMemory, PAGE_SIZE};
use orrery_cpu::state::{CpuState, Segment, TableRegister, control, gpr, seg};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::case::{self, CODE, DATA, PAGES, Registers, Rights, STACK, pages};

/// Bytes of RAM, from guest-physical address 0.
pub const RAM_BYTES: u64 = 0x3A000;
/// Where all of RAM is mapped for the kernel: linear = HIGH + physical.
pub const HIGH: u64 = 0xFFFF_8000_0000_0000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const STUBS: u64 = 0x4000;
const HANDLER: u64 = 0x5000;
const KERNEL_STACK_TOP: u64 = 0x8000;
const IST_STACK_TOP: u64 = 0xA000;
const LDT: u64 = 0xA000;
/// The stack of #DB, through which KVM steps user mode where it cannot do so itself: see [`crate::vm`].
const STEP_STACK_TOP: u64 = 0xC000;
/// The port that the handler of #DB writes to.
pub const STEP_PORT: u16 = 0x99;
/// Where the handler of #DB leaves its frame: RIP, CS, RFLAGS, RSP, SS.
pub const STEP_FRAME: u64 = STEP_STACK_TOP - 40;
const TABLES: u64 = 0x10000;
const TABLES_END: u64 = 0x1C000;
/// Where the pages of the test regions begin.
const USER_PAGES: u64 = 0x1C000;

/// Selectors. User code and data lie where SYSRET looks for them with STAR = 0x0023_0010 << 32.
pub const KERNEL_CS: u16 = 0x10;
const KERNEL_SS: u16 = 0x18;
const USER_CS_32: u16 = 0x23;
const USER_SS: u16 = 0x2B;
const USER_CS: u16 = 0x33;
const TSS_SELECTOR: u16 = 0x40;
/// The vector whose handler is HLT: how a program in user mode ends.
const END_VECTOR: u64 = 3;

/// Registers that programs use freely.
const FREE: [usize; 10] = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10];

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

// Goes to R12 if that is not zero (and clears it), else back to where the exception says. To an address of the
// kernel it goes in kernel mode, whatever it came from, with an empty stack.
std::arch::global_asm!(
    ".pushsection .rodata",
    "kvm_oracle_handler:",
    "test r12, r12",
    "jz 2f",
    "js 3f",
    "4:",
    "mov [rsp + 8], r12",
    "xor r12d, r12d",
    "2:",
    "add rsp, 8",
    "iretq",
    "3:",
    "test byte ptr [rsp + 16], 3",
    "jz 4b",
    "movabs rsp, 0xffff800000008000",
    "jmp r12",
    "kvm_oracle_handler_end:",
    ".popsection",
);

unsafe extern "C" {
    static kvm_oracle_handler: u8;
    static kvm_oracle_handler_end: u8;
}

// The symbols are those of this module's object file alone.
#[inline(never)]
fn handler() -> &'static [u8] {
    // SAFETY: the two symbols delimit constant bytes of this program.
    unsafe {
        let (start, end) = (&raw const kvm_oracle_handler, &raw const kvm_oracle_handler_end);
        std::slice::from_raw_parts(start, end as usize - start as usize)
    }
}

/// What runs in the machine.
#[derive(Clone)]
pub enum Guest {
    /// A program that starts at CPL 0 in the kernel's view of the code region, with these values in the registers
    /// that programs use freely.
    Kernel(Vec<u8>, [u64; 10]),
    /// A case of the host oracle, at CPL 3 or 0. The first exception ends it.
    Case(Box<case::Case>, bool),
}

/// Guest-physical page of the n-th test page. Code is contiguous, for the kernel runs it there; data is not.
fn physical(n: usize) -> u64 {
    let code_pages = CODE.pages as usize;
    if n < code_pages {
        USER_PAGES + n as u64 * PAGE_SIZE
    } else {
        USER_PAGES + (code_pages + 3 * (n - code_pages) % 25) as u64 * PAGE_SIZE
    }
}

/// True if the handler of some vector begins at `rip`.
pub fn is_handler(rip: u64) -> bool {
    let offset = rip.wrapping_sub(HIGH + STUBS);
    offset < 256 * 16 && offset.is_multiple_of(16)
}

/// The vector in whose stub `rip` lies.
pub fn vector_at(rip: u64) -> Option<u64> {
    let offset = rip.wrapping_sub(HIGH + STUBS);
    (offset < 256 * 16).then_some(offset / 16)
}

/// True if `rip` lies in what the handlers of programs have in common.
pub fn is_common_handler(rip: u64) -> bool {
    rip.wrapping_sub(HIGH + HANDLER) < handler().len() as u64
}

/// True if `gpa` is that of RFLAGS in the frame of a double fault.
pub fn is_double_fault_flags(gpa: u64) -> bool {
    gpa == IST_STACK_TOP - 24
}

/// True if `gpa` lies in the stacks that exceptions push their frames on.
pub fn is_kernel_stack(gpa: u64) -> bool {
    (HANDLER + PAGE_SIZE..IST_STACK_TOP).contains(&gpa)
}

/// True if `gpa` lies in the stack of #DB.
pub fn is_step_stack(gpa: u64) -> bool {
    (STEP_STACK_TOP - PAGE_SIZE..STEP_STACK_TOP).contains(&gpa)
}

/// True if `rip` lies in the handler of #DB.
pub fn is_step_handler(rip: u64) -> bool {
    rip.wrapping_sub(HIGH + STUBS + 16) < 16
}

/// True if `gpa` lies in the page tables.
pub fn is_table(gpa: u64) -> bool {
    (TABLES..TABLES_END).contains(&gpa)
}

struct Image {
    ram: Vec<u8>,
    next_table: u64,
}

impl Image {
    fn bytes(&mut self, at: u64, bytes: &[u8]) {
        self.ram[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn word(&mut self, at: u64, value: u64) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn entry(&mut self, at: u64) -> u64 {
        let old = u64::from_le_bytes(self.ram[at as usize..][..8].try_into().expect("eight bytes"));
        if old & PRESENT != 0 {
            return old & 0x000F_FFFF_FFFF_F000;
        }
        self.next_table += PAGE_SIZE;
        assert!(self.next_table < TABLES_END, "room for page tables");
        self.word(at, self.next_table | PRESENT | WRITABLE | USER);
        self.next_table
    }

    fn map(&mut self, linear: u64, physical: u64, flags: u64) {
        let mut table = TABLES;
        for level in [39, 30, 21] {
            table = self.entry(table + (linear >> level & 511) * 8);
        }
        self.word(table + (linear >> 12 & 511) * 8, physical | flags | PRESENT);
    }

    fn descriptor(&mut self, at: u64, attributes: u64) {
        self.word(at, 0x000F_0000_0000_FFFF | (attributes & 0xFF) << 40 | (attributes >> 8 & 0xF) << 52);
    }

    /// A 16-byte system descriptor.
    fn system(&mut self, selector: u16, base: u64, limit: u64, kind: u64) {
        let low = limit | (base & 0xFF_FFFF) << 16 | kind << 40 | (base >> 24 & 0xFF) << 56;
        self.word(GDT + u64::from(selector), low);
        self.word(GDT + u64::from(selector) + 8, base >> 32);
    }

    fn gate(&mut self, vector: u64, ends: bool) {
        let stub = HIGH + STUBS + vector * 16;
        let dpl = if matches!(vector, END_VECTOR | 4 | 0x80) { 3 } else { 0 };
        let ist = match vector {
            1 => 2,
            8 => 1,
            _ => 0,
        };
        // Odd vectors above the exceptions are trap gates.
        let kind = if vector >= 32 && vector & 1 == 1 { 0x8F } else { 0x8E };
        let gate = kind << 40 | dpl << 45 | ist << 32;
        self.word(IDT + vector * 16, stub & 0xFFFF | u64::from(KERNEL_CS) << 16 | gate | (stub >> 16 & 0xFFFF) << 48);
        self.word(IDT + vector * 16 + 8, stub >> 32);
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let mut code = if has_error { vec![0x66, 0x90] } else { vec![0x6A, 0] };
        let jump_end = STUBS + vector * 16 + 7;
        code.push(0xE9);
        code.extend(((HANDLER - jump_end) as u32).to_le_bytes());
        if vector == 1 {
            // OUT STEP_PORT, AL; IRETQ
            code = vec![0xE6, STEP_PORT as u8, 0x48, 0xCF];
        } else if ends || vector == END_VECTOR {
            code = vec![0xF4];
        }
        self.bytes(STUBS + vector * 16, &code);
    }
}

/// RAM before `guest` runs.
pub fn ram(guest: &Guest) -> Vec<u8> {
    let mut image = Image { ram: vec![0; RAM_BYTES as usize], next_table: TABLES };
    let is_case = matches!(guest, Guest::Case(..));
    for page in 0..RAM_BYTES / PAGE_SIZE {
        image.map(HIGH + page * PAGE_SIZE, page * PAGE_SIZE, WRITABLE);
    }
    let pristine = case::pristine_memory();
    for (n, (linear, rights)) in pages().enumerate() {
        let flags = match rights {
            Rights::Code => WRITABLE | USER,
            Rights::Data => WRITABLE | USER | NO_EXECUTE,
            Rights::ReadOnly => USER | NO_EXECUTE,
        };
        image.map(linear, physical(n), flags);
        image.bytes(physical(n), &pristine[n * PAGE_SIZE as usize..][..PAGE_SIZE as usize]);
    }
    for (selector, attributes) in
        [(KERNEL_CS, 0xA9B), (KERNEL_SS, 0xC93), (USER_CS_32, 0xCFB), (USER_SS, 0xCF3), (USER_CS, 0xAFB)]
    {
        image.descriptor(GDT + u64::from(selector & !7), attributes);
    }
    // 0x60: data that is not present; 0x68: 32-bit kernel code; 0x70: execute-only user code.
    for (at, attributes) in [(0x60, 0xC13), (0x68, 0xC9B), (0x70, 0xAF9)] {
        image.descriptor(GDT + at, attributes);
    }
    image.system(TSS_SELECTOR, HIGH + TSS, 0x67, 0x8B);
    image.system(0x50, HIGH + LDT, 0x1F, 0x82);
    image.descriptor(LDT + 8, 0xCF3);
    image.word(TSS + 4, HIGH + KERNEL_STACK_TOP);
    image.word(TSS + 0x24, HIGH + IST_STACK_TOP);
    image.word(TSS + 0x2C, HIGH + STEP_STACK_TOP);
    image.word(TSS + 0x60, 0x68 << 48);
    for vector in 0..256 {
        image.gate(vector, is_case);
    }
    image.bytes(HANDLER, handler());
    match guest {
        Guest::Kernel(code, _) => image.bytes(USER_PAGES, code),
        Guest::Case(case, _) => {
            for (address, bytes) in case.pokes.iter().map(|(a, b)| (*a, b)).chain([(case.registers.rip, &case.code)]) {
                poke(&mut image, address, bytes);
            }
        }
    }
    image.ram
}

fn poke(image: &mut Image, linear: u64, bytes: &[u8]) {
    for (offset, byte) in bytes.iter().enumerate() {
        let at = linear.wrapping_add(offset as u64);
        let found = pages().enumerate().find(|(_, (page, _))| at.wrapping_sub(*page) < PAGE_SIZE);
        if let Some((n, (page, rights))) = found
            && rights != Rights::ReadOnly
        {
            image.bytes(physical(n) + (at - page), &[*byte]);
        }
    }
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { base: 0, limit: 0xFFFF_FFFF, selector, attributes }
}

/// The processor before `guest` runs.
pub fn state(guest: &Guest) -> CpuState {
    let mut state = CpuState::power_on();
    state.cr0 = control::CR0_PE
        | control::CR0_MP
        | control::CR0_ET
        | control::CR0_NE
        | control::CR0_WP
        | control::CR0_AM
        | control::CR0_PG;
    state.cr3 = TABLES;
    state.cr4 = control::CR4_PAE
        | control::CR4_PGE
        | control::CR4_OSFXSR
        | control::CR4_OSXMMEXCPT
        | control::CR4_OSXSAVE
        | control::CR4_FSGSBASE;
    state.efer = control::EFER_SCE | control::EFER_LME | control::EFER_LMA | control::EFER_NXE;
    state.xcr0 = 7;
    state.gdtr = TableRegister { base: HIGH + GDT, limit: 0x7F };
    state.idtr = TableRegister { base: HIGH + IDT, limit: 0xFFF };
    state.ldtr = Segment::default();
    state.tr = Segment { base: HIGH + TSS, limit: 0x67, selector: TSS_SELECTOR, attributes: 0x8B };
    state.seg = [Segment::default(); 6];
    let supervisor = !matches!(guest, Guest::Case(_, false));
    if supervisor {
        state.seg[seg::CS] = flat(KERNEL_CS, 0xA9B);
        state.seg[seg::SS] = flat(KERNEL_SS, 0xC93);
    } else {
        state.seg[seg::CS] = flat(USER_CS, 0xAFB);
        state.seg[seg::SS] = flat(USER_SS, 0xCF3);
    }
    state.cpl = if supervisor { 0 } else { 3 };
    state.dr = [0, 0, 0, 0, 0, 0, 0xFFFF_0FF0, 0x400];
    state.fpu = Registers::default().fpu;
    match guest {
        Guest::Kernel(_, free) => {
            state.rip = HIGH + USER_PAGES;
            state.rflags = 2;
            state.gpr = [0; 16];
            for (register, value) in FREE.into_iter().zip(free) {
                state.gpr[register] = *value;
            }
            state.gpr[gpr::RSP] = HIGH + KERNEL_STACK_TOP;
            state.gpr[13] = DATA.start;
            state.gpr[14] = STACK.start + STACK.pages * PAGE_SIZE - 64;
            // From the kernel's view of the code to the user's.
            state.gpr[15] = (HIGH + USER_PAGES).wrapping_sub(CODE.start);
        }
        Guest::Case(case, _) => {
            let r = &case.registers;
            state.gpr = r.gpr;
            state.rip = r.rip;
            state.rflags = r.rflags;
            state.seg[seg::FS].base = r.fs_gs_base[0];
            state.seg[seg::GS].base = r.fs_gs_base[1];
            state.fpu = r.fpu;
            if case.bits == 32 {
                state.seg[seg::CS] = flat(USER_CS_32, 0xCFB);
                state.seg[seg::DS] = flat(USER_SS, 0xCF3);
                state.seg[seg::ES] = flat(USER_SS, 0xCF3);
            }
        }
    }
    state
}

/// The segment register that a selector of user mode stands for, with its hidden part.
pub fn user_segment(selector: u16) -> Segment {
    match selector {
        USER_CS => flat(selector, 0xAFB),
        USER_CS_32 => flat(selector, 0xCFB),
        USER_SS => flat(selector, 0xCF3),
        _ => Segment { selector, ..Segment::default() },
    }
}

/// A guest in user mode, of NOPs.
pub fn probe() -> (CpuState, Vec<u8>) {
    let registers = Registers { rip: CODE.start, ..Registers::default() };
    let case = case::Case {
        seed: 0,
        bits: 64,
        registers,
        code: vec![0x90, 0x90, 0x90, 0xCC],
        pokes: Vec::new(),
        instructions: Vec::new(),
        ignored_memory: Vec::new(),
        undefined_flags: 0,
    };
    let guest = Guest::Case(Box::new(case), false);
    (state(&guest), ram(&guest))
}

/// The processor at a HLT, in any guest.
pub fn halting_state() -> CpuState {
    let mut state = state(&Guest::Kernel(Vec::new(), [0; 10]));
    state.rip = HIGH + STUBS + END_VECTOR * 16;
    state
}

/// Fresh RAM.
pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).expect("RAM for the guest")
}

/// Copies an image into RAM.
pub fn load(memory: &GuestMemory, image: &[u8]) {
    memory.write_slice(image, GuestAddress(0)).expect("the image fits");
}

/// The contents of all RAM, while no guest runs.
pub fn contents(memory: &GuestMemory) -> &[u8] {
    let host = memory.get_host_address(GuestAddress(0)).expect("RAM begins at 0");
    // SAFETY: one mapping of RAM_BYTES bytes that lives as long as `memory`; guests run only while nobody looks.
    unsafe { std::slice::from_raw_parts(host, RAM_BYTES as usize) }
}

const _: () = assert!(PAGES == 12 && CODE.pages == 4);
