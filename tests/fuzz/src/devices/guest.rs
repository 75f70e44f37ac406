//! A guest that does what a table of operations tells it: port and register accesses, stores to its own RAM, HLT.
//!
//! It is translated once; an input only writes another table. Exceptions lead to the next operation, interrupts are
//! acknowledged and counted.

use std::arch::global_asm;

/// Where the guest is loaded and entered.
pub const LOAD: u64 = 0x20_0000;
/// The table of operations.
pub const TABLE: u64 = 0x30_0000;
/// Most operations, with the one that ends.
pub const OPERATIONS_MAX: usize = 1024;
/// Offset of the IDT in what is loaded.
const IDT: u64 = 0x1000;

/// What an operation does. The numbers are those of the jump table below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// CLI, HLT.
    End = 0,
    /// OUT of a byte.
    Out8,
    /// OUT of two bytes.
    Out16,
    /// OUT of four bytes.
    Out32,
    /// IN of a byte; what was read replaces `value`, as for all that read.
    In8,
    /// IN of two bytes.
    In16,
    /// IN of four bytes.
    In32,
    /// Store of a byte.
    Store8,
    /// Store of two bytes.
    Store16,
    /// Store of four bytes.
    Store32,
    /// Store of eight bytes.
    Store64,
    /// Load of a byte.
    Load8,
    /// Load of four bytes.
    Load32,
    /// Load of eight bytes.
    Load64,
    /// WRMSR to the MSR `address`.
    WriteMsr,
    /// RDMSR.
    ReadMsr,
    /// STI, HLT.
    Wait,
    /// A loop of `value` & 0x3FF rounds.
    Spin,
    /// CLI.
    Mask,
    /// STI.
    Unmask,
    /// REP OUTSB of `value` & 0x3F bytes at `address`.
    OutString,
    /// REP INSB.
    InString,
    /// REP MOVSD of `value` & 0x3F words from `address` to the table's end.
    LoadString,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What.
    pub kind: Kind,
    /// I/O port.
    pub port: u16,
    /// Linear address, or number of an MSR.
    pub address: u32,
    /// What is written.
    pub value: u64,
}

impl Operation {
    /// As the guest reads it.
    pub fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0] = self.kind as u8;
        bytes[2..4].copy_from_slice(&self.port.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..].copy_from_slice(&self.value.to_le_bytes());
        bytes
    }
}

global_asm!(
    ".pushsection .rodata.orrery_fuzz_guest, \"a\"",
    ".globl orrery_fuzz_guest",
    ".globl orrery_fuzz_guest_exception",
    ".globl orrery_fuzz_guest_interrupt",
    ".globl orrery_fuzz_guest_end",
    "orrery_fuzz_guest:",
    "    mov esp, 0x2F0000",
    "    mov ebx, 0x300000",
    "    lidt [rip + 900f]",
    "    sti",
    "100:",
    "    movzx eax, byte ptr [rbx]",
    "    movzx edx, word ptr [rbx + 2]",
    "    mov r8d, [rbx + 4]",
    "    mov r9, [rbx + 8]",
    "    add rbx, 16",
    "    and eax, 31",
    "    lea r11, [rip + 800f]",
    "    movsxd rax, dword ptr [r11 + rax * 4]",
    "    add rax, r11",
    "    xchg rax, r9",
    "    mov r10, rax",
    "    jmp r9",
    "orrery_fuzz_guest_exception:",
    "    inc dword ptr [0x2FF008]",
    "    mov esp, 0x2F0000",
    "    sti",
    "    jmp 100b",
    "orrery_fuzz_guest_interrupt:",
    "    push rax",
    "    push rcx",
    "    push rdx",
    "    inc dword ptr [0x2FF000]",
    "    mov ecx, 0x1B",
    "    rdmsr",
    "    test eax, 0x400",
    "    jz 200f",
    "    mov ecx, 0x80B",
    "    xor eax, eax",
    "    xor edx, edx",
    "    wrmsr",
    "    jmp 201f",
    "200:",
    "    mov ecx, 0xFEE000B0",
    "    mov dword ptr [rcx], 0",
    "201:",
    "    pop rdx",
    "    pop rcx",
    "    pop rax",
    "    iretq",
    // RAX and R10 hold the value, R8 the address, DX the port.
    "300: cli",
    "    hlt",
    "    jmp 300b",
    "301: out dx, al",
    "    jmp 100b",
    "302: out dx, ax",
    "    jmp 100b",
    "303: out dx, eax",
    "    jmp 100b",
    "304: in al, dx",
    "    jmp 399f",
    "305: in ax, dx",
    "    jmp 399f",
    "306: in eax, dx",
    "    jmp 399f",
    "307: mov [r8], al",
    "    jmp 100b",
    "308: mov [r8], ax",
    "    jmp 100b",
    "309: mov [r8], eax",
    "    jmp 100b",
    "310: mov [r8], rax",
    "    jmp 100b",
    "311: mov al, [r8]",
    "    jmp 399f",
    "312: mov eax, [r8]",
    "    jmp 399f",
    "313: mov rax, [r8]",
    "    jmp 399f",
    "314: mov ecx, r8d",
    "    mov rdx, rax",
    "    shr rdx, 32",
    "    wrmsr",
    "    jmp 100b",
    "315: mov ecx, r8d",
    "    rdmsr",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    jmp 399f",
    "316: sti",
    "    hlt",
    "    jmp 100b",
    "317: and eax, 0x3FF",
    "    inc eax",
    "398: dec eax",
    "    jnz 398b",
    "    jmp 100b",
    "318: cli",
    "    jmp 100b",
    "319: sti",
    "    jmp 100b",
    "320: mov rsi, r8",
    "    mov ecx, eax",
    "    and ecx, 0x3F",
    "    cld",
    "    rep outsb",
    "    jmp 100b",
    "321: mov rdi, r8",
    "    mov ecx, eax",
    "    and ecx, 0x3F",
    "    cld",
    "    rep insb",
    "    jmp 100b",
    "322: mov rsi, r8",
    "    mov edi, 0x308000",
    "    mov ecx, eax",
    "    and ecx, 0x3F",
    "    cld",
    "    rep movsd",
    "    jmp 100b",
    "399: mov [rbx - 8], rax",
    "    jmp 100b",
    ".balign 4",
    "800:",
    ".long 300b - 800b, 301b - 800b, 302b - 800b, 303b - 800b, 304b - 800b, 305b - 800b, 306b - 800b, 307b - 800b",
    ".long 308b - 800b, 309b - 800b, 310b - 800b, 311b - 800b, 312b - 800b, 313b - 800b, 314b - 800b, 315b - 800b",
    ".long 316b - 800b, 317b - 800b, 318b - 800b, 319b - 800b, 320b - 800b, 321b - 800b, 322b - 800b, 300b - 800b",
    ".rept 8",
    ".long 300b - 800b",
    ".endr",
    "900: .word 0xFFF",
    "    .quad 0x201000",
    "orrery_fuzz_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    safe static orrery_fuzz_guest: u8;
    safe static orrery_fuzz_guest_exception: u8;
    safe static orrery_fuzz_guest_interrupt: u8;
    safe static orrery_fuzz_guest_end: u8;
}

/// The guest as an ELF executable, IDT included.
pub fn kernel() -> Vec<u8> {
    let start = &raw const orrery_fuzz_guest;
    let offset = |symbol: *const u8| symbol as usize - start as usize;
    let len = offset(&raw const orrery_fuzz_guest_end);
    assert!(len <= IDT as usize);
    // SAFETY: the two symbols are the ends of one piece of read-only data.
    let code = unsafe { std::slice::from_raw_parts(start, len) };
    let mut blob = vec![0; IDT as usize + 4096];
    blob[..len].copy_from_slice(code);
    for vector in 0..256usize {
        let handler =
            if vector < 32 { &raw const orrery_fuzz_guest_exception } else { &raw const orrery_fuzz_guest_interrupt };
        let target = LOAD + offset(handler) as u64;
        let low = target & 0xFFFF | 0x10 << 16 | 0x8E << 40 | (target >> 16 & 0xFFFF) << 48;
        let at = IDT as usize + vector * 16;
        blob[at..at + 8].copy_from_slice(&low.to_le_bytes());
        blob[at + 8..at + 16].copy_from_slice(&(target >> 32).to_le_bytes());
    }
    crate::elf::executable(LOAD, &blob)
}
