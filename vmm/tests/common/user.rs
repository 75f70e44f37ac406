//! A guest whose user-mode code can run in a virtual machine.

use iced_x86::code_asm::*;
use orrery_guest_image::Image;

use super::*;

const GDT: u64 = 0x2F_0000;
const USER_STACK: u64 = 0x2E_0000;

/// Goes to user mode, with I/O ports permitted, and computes there for about half a million instructions a round: memory
/// all over a megabyte, calls, x87, SSE, string instructions, and in each round something that the VM cannot do.
pub fn user(rounds: u32) -> Image {
    guest(|a| {
        enter_user_mode(a);
        let (mut outer, mut inner, mut function) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ebp, rounds).unwrap();
        a.set_label(&mut outer).unwrap();
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap();
        a.mov(ecx, 30_000).unwrap();
        a.mov(rdi, DATA).unwrap();
        a.set_label(&mut inner).unwrap();
        a.imul_3(rax, rax, 1_103_515_245).unwrap();
        a.add(rax, 12_345).unwrap();
        a.mov(rdx, rax).unwrap();
        a.and(edx, 0xF_FFF8).unwrap();
        a.add(qword_ptr(rdi + rdx), rax).unwrap();
        a.mov(r11, qword_ptr(rdi + rdx)).unwrap();
        a.xor(r12, r11).unwrap();
        a.push(r12).unwrap();
        a.pop(r13).unwrap();
        a.call(function).unwrap();
        a.cvtsi2sd(xmm0, rcx).unwrap();
        a.addsd(xmm1, xmm0).unwrap();
        a.dec(ecx).unwrap();
        a.jne(inner).unwrap();
        a.fild(qword_ptr(rdi)).unwrap();
        a.fistp(qword_ptr(rdi + 8)).unwrap();
        a.lea(rsi, qword_ptr(rdi + 0x100)).unwrap();
        a.mov(ecx, 100).unwrap();
        a.rep().movsq().unwrap();
        a.dec(ebp).unwrap();
        a.jne(outer).unwrap();
        a.mov(rax, r15).unwrap();
        a.xor(rax, r13).unwrap();
        a.and(al, 15).unwrap();
        a.add(al, i32::from(b'A')).unwrap();
        a.mov(dx, SERIAL).unwrap();
        a.out(dx, al).unwrap();
        exit(a, 0);
        a.set_label(&mut function).unwrap();
        a.lea(r15, qword_ptr(r15 + rax * 2 + 1)).unwrap();
        a.ret().unwrap();
    })
}

fn enter_user_mode(a: &mut CodeAssembler) {
    let (mut again, mut large, mut user) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(rax, cr4).unwrap();
    a.or(eax, 0x600).unwrap();
    a.mov(cr4, rax).unwrap();
    // The boot tables map low memory for the kernel only.
    a.mov(rax, cr3).unwrap();
    a.and(rax, -4096).unwrap();
    a.or(qword_ptr(rax), 4).unwrap();
    a.mov(rbx, qword_ptr(rax)).unwrap();
    a.and(rbx, -4096).unwrap();
    a.or(qword_ptr(rbx), 4).unwrap();
    a.mov(rcx, qword_ptr(rbx)).unwrap();
    a.test(cl, 0x80).unwrap();
    a.jne(large).unwrap();
    a.and(rcx, -4096).unwrap();
    a.mov(edx, 512).unwrap();
    a.set_label(&mut again).unwrap();
    a.or(qword_ptr(rcx), 4).unwrap();
    a.add(rcx, 8).unwrap();
    a.dec(edx).unwrap();
    a.jne(again).unwrap();
    a.set_label(&mut large).unwrap();
    a.mov(cr3, rax).unwrap();
    let descriptors: [u64; 5] =
        [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF];
    a.mov(rbx, GDT).unwrap();
    for (at, descriptor) in (0..).step_by(8).zip(descriptors) {
        a.mov(rax, descriptor).unwrap();
        a.mov(qword_ptr(rbx + at), rax).unwrap();
    }
    a.mov(word_ptr(rbx + 64), 39).unwrap();
    a.mov(qword_ptr(rbx + 66), rbx).unwrap();
    a.lgdt(ptr(rbx + 64)).unwrap();
    a.mov(rsp, USER_STACK).unwrap();
    a.push(0x1B).unwrap();
    a.mov(rax, USER_STACK).unwrap();
    a.push(rax).unwrap();
    a.push(0x3002).unwrap();
    a.push(0x23).unwrap();
    a.lea(rax, ptr(user)).unwrap();
    a.push(rax).unwrap();
    a.iretq().unwrap();
    a.set_label(&mut user).unwrap();
}

/// KVM can be used here. With `ORRERY_REQUIRE_KVM` it must be.
pub fn has_kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    assert!(there || std::env::var_os("ORRERY_REQUIRE_KVM").is_none(), "no /dev/kvm");
    there
}
