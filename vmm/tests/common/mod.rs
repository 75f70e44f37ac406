//! Tiny guests: flat 64-bit code in an ELF file, entered as the Linux boot protocol enters a kernel.
#![allow(dead_code, missing_docs)]

pub mod user;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use orrery_guest_image::{Content, Image, ImageParts};
use orrery_vmm::{MachineConfig, Seed};

/// Where the code is loaded and entered.
pub const LOAD: u64 = 0x20_0000;
/// Memory that a guest may use for its data.
pub const DATA: u64 = 0x30_0000;
pub const SERIAL: u32 = 0x3F8;
pub const EXIT_PORT: u32 = 0x604;

/// An ELF executable of one segment.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    file.extend(LOAD.to_le_bytes()); // entry
    file.extend(64u64.to_le_bytes()); // program headers
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // PT_LOAD
    file.extend(7u32.to_le_bytes());
    let bytes = code.len() as u64;
    for word in [120, LOAD, LOAD, bytes, bytes.next_multiple_of(4096), 8] {
        file.extend(u64::to_le_bytes(word));
    }
    file.extend(code);
    file
}

pub fn image_of(code: &[u8]) -> Image {
    let parts = ImageParts { kernel: Content::from(elf(code)), command_line: "test".into(), ..Default::default() };
    Image::from_parts(parts).expect("the guest is a kernel")
}

/// Assembles a guest.
pub fn guest(write: impl FnOnce(&mut CodeAssembler)) -> Image {
    let mut a = CodeAssembler::new(64).expect("64 is a bitness");
    write(&mut a);
    image_of(&a.assemble(LOAD).expect("the guest assembles"))
}

pub fn image_file(directory: &Path, name: &str, image: &Image) -> PathBuf {
    let path = directory.join(name);
    image.write(&path).expect("the image is written");
    path
}

/// Waits until a run's list of snapshots has that many, however slow the host is.
pub fn wait_for_snapshots(list: &Path, count: usize) {
    let patience = Instant::now() + Duration::from_secs(60);
    while std::fs::read_to_string(list).unwrap_or_default().matches('\n').count() <= count {
        assert!(Instant::now() < patience, "no {count} snapshots in {}", list.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Writes text to the serial port, without looking at its status.
pub fn print(a: &mut CodeAssembler, text: &str) {
    a.mov(dx, SERIAL).unwrap();
    for byte in text.bytes() {
        a.mov(al, u32::from(byte)).unwrap();
        a.out(dx, al).unwrap();
    }
}

/// Powers off with a code.
pub fn exit(a: &mut CodeAssembler, code: u8) {
    a.mov(al, u32::from(code)).unwrap();
    exit_al(a);
}

/// Powers off with the code in AL.
pub fn exit_al(a: &mut CodeAssembler) {
    a.mov(dx, EXIT_PORT).unwrap();
    a.out(dx, al).unwrap();
    let mut here = a.create_label();
    a.set_label(&mut here).unwrap();
    a.jmp(here).unwrap();
}

/// A machine description small enough to be quick.
pub fn small() -> MachineConfig {
    MachineConfig { memory_mib: 32, ..Default::default() }
}

pub const SEED: Seed = Seed(1);

/// A guest that computes for a while: writes to memory, reads time and random numbers, then prints and exits.
pub fn busy(iterations: u32) -> Image {
    guest(|a| {
        a.mov(ecx, iterations).unwrap();
        a.mov(rdi, DATA).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.rdtsc().unwrap();
        a.mov(dword_ptr(rdi), eax).unwrap();
        a.rdrand(rax).unwrap();
        a.xor(qword_ptr(rdi + 8), rax).unwrap();
        a.add(rdi, 64).unwrap();
        a.and(edi, 0x0F_FFFF).unwrap();
        a.add(rdi, DATA as i32).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        print(a, "done\n");
        exit(a, 0);
    })
}

/// Each round of the loop writes the time and a random number into another page and adds what a routine returns. Now
/// and then it prints a character and rewrites that routine. 16 instructions a round and more.
pub fn wanderer(rounds: u32, pages: u32) -> Image {
    guest(|a| {
        let mut routine = a.create_label();
        let mut again = a.create_label();
        let mut quiet = a.create_label();
        let mut over = a.create_label();
        a.mov(rsp, DATA).unwrap();
        a.mov(ebp, rounds).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.rdtsc().unwrap();
        a.rdrand(rcx).unwrap();
        a.mov(rdi, rbx).unwrap();
        a.shl(rdi, 12).unwrap();
        a.add(qword_ptr(rdi + DATA as i32), rax).unwrap();
        a.xor(qword_ptr(rdi + DATA as i32 + 8), rcx).unwrap();
        a.call(routine).unwrap();
        a.add(qword_ptr(rdi + DATA as i32 + 16), rax).unwrap();
        a.test(ecx, 0x3F).unwrap();
        a.jne(quiet).unwrap();
        a.lea(rsi, qword_ptr(routine)).unwrap();
        a.mov(dword_ptr(rsi + 1), ecx).unwrap();
        a.mov(edx, SERIAL).unwrap();
        a.mov(eax, ecx).unwrap();
        a.shr(eax, 8).unwrap();
        a.and(al, 15).unwrap();
        a.add(al, 'a' as i32).unwrap();
        a.out(dx, al).unwrap();
        a.set_label(&mut quiet).unwrap();
        a.inc(ebx).unwrap();
        a.cmp(ebx, pages).unwrap();
        let mut below = a.create_label();
        a.jb(below).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut below).unwrap();
        a.dec(ebp).unwrap();
        a.jne(again).unwrap();
        a.jmp(over).unwrap();
        a.set_label(&mut routine).unwrap();
        a.mov(eax, 0x1234_5678).unwrap();
        a.ret().unwrap();
        a.set_label(&mut over).unwrap();
        print(a, "over\n");
        exit(a, 0);
    })
}
