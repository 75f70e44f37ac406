//! The hand-written guests. Each starts at CPL 0 with R13 the first address of user data, R14 the top of the user
//! stack, R15 the distance from the kernel's view of the code to the user's, and ends with HLT, or from user mode
//! with INT3. With R12 set, the next exception returns there; without, a trap returns behind itself.

/// Makes a program of lines of assembly: the bytes between two symbols.
macro_rules! programs {
    ($(#[$doc:meta])* $list:ident: $($name:ident: $($line:literal),+;)+) => {
        $(
            std::arch::global_asm!(
                ".pushsection .rodata",
                concat!("kvm_oracle_", stringify!($list), "_", stringify!($name), ":"),
                $($line,)+
                concat!("kvm_oracle_", stringify!($list), "_", stringify!($name), "_end:"),
                ".popsection",
            );
        )+
        $(#[$doc])*
        pub fn $list() -> Vec<(&'static str, &'static [u8])> {
            vec![$((stringify!($name), {
                unsafe extern "C" {
                    #[link_name = concat!("kvm_oracle_", stringify!($list), "_", stringify!($name))]
                    static START: u8;
                    #[link_name = concat!("kvm_oracle_", stringify!($list), "_", stringify!($name), "_end")]
                    static END: u8;
                }
                // SAFETY: the two symbols delimit constant bytes of this program.
                unsafe {
                    let (start, end) = (&raw const START, &raw const END);
                    std::slice::from_raw_parts(start, end as usize - start as usize)
                }
            })),+]
        }
    };
}

programs! {
    /// All programs, with their names.
    all:
    arithmetic:
        "mov eax, 5",
        "add rax, 7",
        "push rax",
        "pop rbx",
        "call 2f",
        "hlt",
        "2: imul rbx, rbx, 3",
        "ret";

    exceptions:
        "lea r12, [rip + 2f]", "xor eax, eax", "div eax", "2:",
        "lea r12, [rip + 2f]", "ud2", "2:",
        // Absent page: read, write, instruction fetch.
        "lea r12, [rip + 2f]", "mov rax, [r13 + 0x10000]", "2:",
        "lea r12, [rip + 2f]", "mov [r13 + 0x10008], rax", "2:",
        "lea r12, [rip + 2f]", "lea rax, [r13 + 0x10000]", "jmp rax", "2:",
        // Read-only page, across two pages, no-execute page.
        "lea r12, [rip + 2f]", "mov [r13 + 0x4000], eax", "2:",
        "lea r12, [rip + 2f]", "add [r13 + 0x3ffe], eax", "2:",
        "lea r12, [rip + 2f]", "jmp r13", "2:",
        // Addresses that are not canonical: data, stack, jump.
        "movabs rcx, 0x800000000000",
        "lea r12, [rip + 2f]", "mov eax, [rcx]", "2:",
        "mov rbx, rsp", "mov rsp, rcx", "mov rsp, rbx",
        "lea r12, [rip + 2f]", "jmp rcx", "2:",
        // Selectors: beyond the GDT, not present, of a TSS, privileged, null for SS.
        "mov eax, 0x100", "lea r12, [rip + 2f]", "mov ds, eax", "2:",
        "mov eax, 0x60", "lea r12, [rip + 2f]", "mov es, eax", "2:",
        "mov eax, 0x40", "lea r12, [rip + 2f]", "mov fs, eax", "2:",
        "mov eax, 0x10", "lea r12, [rip + 2f]", "mov ss, eax", "2:",
        "mov eax, 0x2b", "lea r12, [rip + 2f]", "mov ss, eax", "2:",
        "xor eax, eax", "lea r12, [rip + 2f]", "mov ss, eax", "2:",
        // Undefined bits of control registers and MSRs.
        "mov rax, cr4", "bts rax, 31", "lea r12, [rip + 2f]", "mov cr4, rax", "2:",
        "mov rax, cr0", "btr rax, 0", "lea r12, [rip + 2f]", "mov cr0, rax", "2:",
        "mov ecx, 0xc0000080", "mov eax, 0xffffffff", "lea r12, [rip + 2f]", "wrmsr", "2:",
        "mov ecx, 0x12345678", "lea r12, [rip + 2f]", "rdmsr", "2:",
        "hlt";

    software_interrupts:
        "int 0x40",
        "int 0x41",
        // INT through an IDT that ends before the gate.
        "sub rsp, 16", "sidt [rsp]", "mov word ptr [rsp], 0x3ff", "lidt [rsp]",
        "lea r12, [rip + 2f]", "int 0x40", "2:",
        "mov word ptr [rsp], 0xfff", "lidt [rsp]", "add rsp, 16",
        "hlt";

    user_exceptions:
        "lea rcx, [rip + 9f]", "sub rcx, r15",
        "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:",
        "lea r12, [rip + 2f]", "xor eax, eax", "div eax", "2:",
        "lea r12, [rip + 2f]", "ud2", "2:",
        "lea r12, [rip + 7f]", "ud2", "7:",
        "lea r12, [rip + 2f]", "int 0x40", "2:",
        "lea r12, [rip + 2f]", "hlt", "2:",
        "lea r12, [rip + 2f]", "mov rax, cr0", "2:",
        "lea r12, [rip + 2f]", "mov cr3, rax", "2:",
        "lea r12, [rip + 2f]", "rdmsr", "2:",
        "lea r12, [rip + 2f]", "lgdt [r13]", "2:",
        "lea r12, [rip + 2f]", "invlpg [r13]", "2:",
        "lea r12, [rip + 2f]", "swapgs", "2:",
        "lea r12, [rip + 2f]", "clts", "2:",
        "lea r12, [rip + 2f]", "iretq", "2:",
        "lea r12, [rip + 2f]", "mov rax, [r13 + 0x10000]", "2:",
        "lea r12, [rip + 2f]", "mov [r13 + 0x4000], rax", "2:",
        "lea r12, [rip + 2f]", "inc qword ptr [r13 + 0x3ffc]", "2:",
        "lea r12, [rip + 2f]", "jmp r13", "2:",
        "lea rbx, [rip + 2b]", "add rbx, r15", "lea r12, [rip + 2f]", "mov rax, [rbx]", "2:",
        "lea r12, [rip + 2f]", "mov [rbx], rax", "2:",
        "lea r12, [rip + 2f]", "jmp rbx", "2:",
        "movabs rcx, 0x800000000000",
        "lea r12, [rip + 2f]", "mov eax, [rcx]", "2:",
        "lea r12, [rip + 2f]", "mov rbp, rcx", "mov eax, [rbp]", "2:",
        "lea r12, [rip + 2f]", "push rcx", "ret", "2:", "pop rcx",
        "mov eax, 0x18", "lea r12, [rip + 2f]", "mov ds, eax", "2:",
        "mov eax, 0x63", "lea r12, [rip + 2f]", "mov es, eax", "2:",
        "mov eax, 0x2b", "mov ds, eax", "mov es, eax", "mov fs, eax", "mov gs, eax", "mov ss, eax",
        "pushfq", "pop rax", "or rax, 0x200001", "push rax", "popfq", "pushfq", "pop rbx",
        "std", "pushfq", "cld", "popfq", "cld",
        // Below the stack.
        "mov rbx, rsp", "lea rsp, [r14 - 0x1fc0]", "lea r12, [rip + 2f]", "push rax", "2: mov rsp, rbx",
        "sgdt [r13]", "sidt [r13 + 16]", "sldt eax", "str ebx", "smsw ecx",
        "int3";

    // Behind a frame that is forgotten, a processor that steps with TF goes on to the end. AF is undefined behind SAR,
    // in the first frame, behind the return by it and in the second frame.
    unstepped_frames:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d",
        "mov al, 15", "add al, 1", "sar byte ptr [r13 + 0x50], 3",
        "lea r12, [rip + 2f]", "ud2", "2:", "lea r12, [rip + 2f]", "ud2", "2:", "hlt";

    // The same, with an IRET to an address that is not canonical.
    unstepped_iret:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: mov rbx, rsp", "lea r12, [rip + 2f]",
        "push 0x18", "push rbx", "push 2", "push 0x10", "movabs rax, 0x800000000000", "push rax", "iretq", "2:", "hlt";

    syscalls:
        "mov ecx, 0xc0000081", "xor eax, eax", "mov edx, 0x00230010", "wrmsr",
        "mov ecx, 0xc0000082", "lea rax, [rip + 8f]", "mov rdx, rax", "shr rdx, 32", "wrmsr",
        "mov ecx, 0xc0000084", "mov eax, 0x47700", "xor edx, edx", "wrmsr",
        "mov ecx, 0xc0000102", "mov eax, 0x5000", "mov edx, 0xffff8000", "wrmsr", "rdmsr",
        "lea rcx, [rip + 9f]", "sub rcx, r15", "mov r11d, 0x2", "mov rbp, rsp", "mov rsp, r14", "sysretq",
        // The kernel's entry.
        "8: swapgs", "mov rbx, rsp", "mov rsp, rbp", "push r11", "push rcx", "mov rax, gs:[0x100]",
        "pop rcx", "pop r11", "mov rsp, rbx", "swapgs", "inc edi", "sysretq",
        "9:", "mov esi, 5", "2:", "std", "stc", "mov eax, 1", "syscall", "dec esi", "jnz 2b",
        "cld", "syscall",
        // A target that is not canonical, in R11 flags that SYSRET must not load.
        "int3";

    same_level_returns:
        "lea rax, [rip + 2f]", "mov rbx, rsp", "push 0x18", "lea rcx, [rbx - 0x100]", "push rcx", "push 0x2",
        "push 0x10", "push rax", "iretq", "2: mov rsp, rbx", "nop",
        "push 0x10", "lea rax, [rip + 2f]", "push rax", "retfq", "2:", "nop",
        "hlt";

    far_return_to_user:
        "lea rax, [rip + 3f]", "sub rax, r15", "mov ebx, 0x2b", "mov ds, ebx", "mov ebx, 0x18", "mov es, ebx",
        "push 0x2b", "push r14", "push 0x33", "push rax", "retfq",
        "3:", "mov ecx, 3", "2:", "int 0x80", "loop 2b", "int3";

    compatibility_mode:
        "lea rcx, [rip + 9f]", "sub rcx, r15",
        "mov ebx, 0x2b", "mov ds, ebx", "mov ebx, 0x18", "mov es, ebx",
        "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "mov eax, es", "mov ebx, ds", "lea r12, [rip + 7f]", "ud2", "7:",
        "sub rsp, 16", "lea rax, [rip + 4f]", "mov [rsp], eax", "mov dword ptr [rsp + 4], 0x23",
        "jmp fword ptr [rsp]",
        ".code32", "4:", "push eax", "mov eax, 0x12345678", "add esp, 4", "inc eax", "push es", "pop es",
        "daa", "aam", "into", "pushad", "popad", "int3",
        ".code64", "nop";

    iret_to_compatibility_mode:
        "lea rcx, [rip + 9f]", "sub rcx, r15",
        "push 0x2b", "push r14", "push 0x202", "push 0x23", "push rcx", "iretq",
        ".code32", "9:", "mov eax, 0x2b", "mov ds, eax", "mov eax, [esp - 8]", "dec eax", "int3",
        ".code64", "nop";

    segments:
        "mov eax, 0x50", "lldt ax", "sldt ebx", "mov eax, 0x0c", "mov fs, eax", "mov gs, eax",
        "mov eax, 0x2b", "mov ds, eax", "mov es, eax", "xor eax, eax", "mov ds, eax", "mov eax, 3", "mov es, eax",
        "str ecx", "push fs", "pop gs", "mov ax, fs",
        "mov ecx, 0xc0000100", "mov eax, 0x1000", "mov edx, 0x7fff", "wrmsr", "rdmsr",
        "mov ecx, 0xc0000101", "mov eax, 0x2000", "mov edx, 0xffff8000", "wrmsr", "mov rax, gs:[0x10]",
        "swapgs", "mov ecx, 0xc0000102", "rdmsr", "swapgs", "xor eax, eax", "lldt ax", "hlt";

    segment_bases:
        "rdfsbase rax", "wrgsbase rsp", "rdgsbase rbx", "mov ecx, 5", "wrfsbase ecx", "hlt";

    segment_checks:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "mov ecx, 0x2b", "lsl ebx, ecx", "verr cx", "verw cx", "int3";

    strings:
        "cld", "lea rsi, [r13 + 0xff8]", "lea rdi, [r13 + 0x1ffb]", "mov ecx, 0x20", "rep movsb",
        "lea rsi, [r13 + 0xffc]", "lea rdi, [r13 + 0x2ff9]", "mov ecx, 5", "rep movsq",
        "lea rdi, [r13 + 0x1fff]", "mov eax, 0x11223344", "mov ecx, 9", "rep stosd", "stosw", "lodsb",
        "std", "lea rsi, [r13 + 0x1003]", "lea rdi, [r13 + 0x2003]", "mov ecx, 3", "rep movsd", "cld",
        "lea rsi, [r13 + 0xffe]", "lea rdi, [r13 + 0x1ffe]", "mov ecx, 9", "repe cmpsb", "mov al, 0x55",
        "mov ecx, 30", "repne scasb", "xor ecx, ecx", "rep stosb", "repe scasw", "lodsq", "cmpsd", "scasq",
        // Into the read-only page and to the end of what is mapped.
        "lea rdi, [r13 + 0x3ff5]", "mov ecx, 40", "lea r12, [rip + 2f]", "rep stosb", "2:",
        "lea rsi, [r13 + 0x5fe1]", "lea rdi, [r13 + 0x800]", "mov ecx, 10", "lea r12, [rip + 2f]", "rep movsq", "2:",
        "lea rsi, [r13 + 0x5fff]", "lea r12, [rip + 2f]", "lodsw", "2:",
        "hlt";

    user_strings:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "lea rsi, [r13 + 0xff8]", "lea rdi, [r13 + 0x1ffb]", "mov ecx, 0x20", "rep movsb", "lea r12, [rip + 7f]", "ud2", "7:",
        "lea rdi, [r13 + 0x1fff]", "mov eax, 0x11223344", "mov ecx, 1000", "rep stosd", "lea r12, [rip + 7f]", "ud2", "7:",
        "std", "lea rsi, [r13 + 0x1003]", "lea rdi, [r13 + 0x2003]", "mov ecx, 300", "rep movsd", "cld", "lea r12, [rip + 7f]", "ud2", "7:",
        "lea rdi, [r13 + 0x3ff5]", "mov ecx, 40", "lea r12, [rip + 2f]", "rep stosb", "2:",
        "lea rsi, [r13 + 0x5fe1]", "lea rdi, [r13 + 0x800]", "mov ecx, 10", "lea r12, [rip + 2f]", "rep movsq", "2:",
        "lea rsi, [r13 + 0xffe]", "lea rdi, [r13 + 0x1ffe]", "mov ecx, 9", "repe cmpsb", "int3";

    self_modifying:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "mov ebx, 20", "xor eax, eax",
        // The very next instruction.
        "3: mov byte ptr [rip + 2f + 1], bl", "2: add al, 0", "dec ebx", "jnz 3b", "lea r12, [rip + 7f]", "ud2", "7:",
        // A function that is written anew on each call, and one in the neighbouring page.
        "mov ebx, 10", "lea rdi, [rip + 9b]", "add rdi, 0x1ff0",
        "4:", "mov byte ptr [rdi], 0xb8", "mov [rdi + 1], ebx", "mov byte ptr [rdi + 5], 0xc3", "call rdi",
        "add ebp, eax", "inc rdi", "lea r12, [rip + 7f]", "ud2", "7:", "dec ebx", "jnz 4b",
        "lea rdi, [rip + 5f]", "mov eax, 0x90909090", "stosd", "5:", "ud2", "ud2", "int3";

    kernel_self_modifying:
        "mov ebx, 6", "3: mov byte ptr [rip + 2f + 1], bl", "2: add al, 0", "dec ebx", "jnz 3b",
        // Through the user's view of the same page.
        "mov ebx, 6", "lea rdi, [rip + 2f + 1]", "sub rdi, r15", "3: mov [rdi], bl", "2: sub al, 0", "dec ebx",
        "jnz 3b", "hlt";

    floating_point:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "fninit", "fld1", "fldpi", "fadd st, st(1)", "lea r12, [rip + 7f]", "ud2", "7:", "fsqrt", "fst qword ptr [r13]", "lea r12, [rip + 7f]", "ud2", "7:",
        "fild word ptr [r13 + 8]", "fdivrp", "lea r12, [rip + 7f]", "ud2", "7:", "fxsave [r13 + 0x200]", "fninit", "lea r12, [rip + 7f]", "ud2", "7:",
        "fxrstor [r13 + 0x200]", "lea r12, [rip + 7f]", "ud2", "7:", "movups xmm0, [r13 + 0x40]", "mulps xmm0, xmm0", "lea r12, [rip + 7f]", "ud2", "7:",
        "vmovups ymm1, [r13 + 0x60]", "vaddpd ymm2, ymm1, ymm1", "lea r12, [rip + 7f]", "ud2", "7:",
        "vxorps ymm5, ymm5, ymm5", "vmovups [r13 + 0x600], ymm5", "vmovups [r13 + 0x620], ymm5",
        "mov eax, 7", "xor edx, edx", "xsave [r13 + 0x400]", "vzeroall", "lea r12, [rip + 7f]", "ud2", "7:", "xrstor [r13 + 0x400]",
        "lea r12, [rip + 7f]", "ud2", "7:", "mov eax, 2", "xrstor [r13 + 0x400]", "lea r12, [rip + 7f]", "ud2", "7:", "xor ecx, ecx", "xgetbv", "lea r12, [rip + 7f]", "ud2", "7:",
        // #XM, #MF.
        "mov dword ptr [r13], 0x1f00", "ldmxcsr [r13]", "xorps xmm3, xmm3",
        "lea r12, [rip + 2f]", "divps xmm3, xmm3", "2:", "mov dword ptr [r13], 0x1f80", "ldmxcsr [r13]",
        "fninit", "mov word ptr [r13], 0x37b", "fldcw [r13]", "fld1", "fldz", "fdivp",
        "lea r12, [rip + 2f]", "fwait", "2: fnclex", "fninit", "emms", "int3";

    control_registers:
        "mov rax, cr0", "mov rbx, cr4", "mov rcx, cr3", "mov cr3, rcx", "clts",
        "bts rax, 3", "mov cr0, rax", "clts", "smsw edx", "mov rax, cr0", "btr rax, 16", "mov cr0, rax",
        // Without WP the read-only page can be written.
        "mov [r13 + 0x4000], eax", "bts rax, 16", "mov cr0, rax",
        "lea r12, [rip + 2f]", "mov [r13 + 0x4000], eax", "2:",
        "mov rax, cr4", "btr rax, 7", "mov cr4, rax", "bts rax, 7", "mov cr4, rax", "mov cr2, rax", "mov rdx, cr2",
        "hlt";

    smap_smep:
        "mov rax, cr4", "bts rax, 21", "bts rax, 20", "mov cr4, rax",
        "lea r12, [rip + 2f]", "mov rax, [r13]", "2:", "lea r12, [rip + 2f]", "mov [r13], rax", "2:",
        "lea rax, [rip + 3f]", "sub rax, r15", "lea r12, [rip + 2f]", "jmp rax", "3: nop", "2:",
        "stac", "mov rax, [r13]", "clac", "lea r12, [rip + 2f]", "mov rax, [r13]", "2:", "hlt";

    smap_by_popf:
        "mov rax, cr4", "bts rax, 21", "bts rax, 20", "mov cr4, rax",
        "lea r12, [rip + 2f]", "mov rax, [r13]", "2:", "lea r12, [rip + 2f]", "mov [r13], rax", "2:",
        "pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov rax, [r13]", "mov [r13 + 0xffc], rax",
        "pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq",
        "lea r12, [rip + 2f]", "mov rax, [r13]", "2:", "hlt";

    page_tables:
        // Finds the entry that maps the first page of data: r8 points to it.
        "movabs r10, 0xffff800000000000", "movabs r11, 0xffffffffff000", "mov r8, cr3",
        "and r8, r11", "mov r8, [r8 + r10]",
        "and r8, r11", "mov r8, [r8 + r10]", "and r8, r11", "lea r8, [r8 + r10 + 0x800]", "mov r8, [r8]",
        "and r8, r11", "add r8, r10", "mov r9, [r8]", "mov rax, [r13]",
        // Not present, present again, read-only, no-execute off, reserved bit.
        "mov qword ptr [r8], 0", "invlpg [r13]", "lea r12, [rip + 2f]", "mov rax, [r13]", "2:",
        "mov [r8], r9", "mov rax, [r13]", "btr qword ptr [r8], 1", "invlpg [r13]", "mov rax, [r13 + 8]",
        "lea r12, [rip + 2f]", "mov [r13], rax", "2:", "mov [r8], r9", "invlpg [r13]", "mov [r13], rax",
        "bts qword ptr [r8], 50", "invlpg [r13]", "lea r12, [rip + 2f]", "mov rax, [r13]", "2:", "mov [r8], r9",
        // Two pages exchanged.
        "mov rbx, [r8 + 8]", "mov [r8], rbx", "mov [r8 + 8], r9", "mov rax, cr3", "mov cr3, rax",
        "mov rax, [r13 + 0xffc]", "mov [r13 + 0xffe], rax", "hlt";

    flags:
        "pushfq", "pop rax", "or eax, 0x245cd5", "push rax", "popfq", "pushfq", "lahf", "sahf", "cli",
        "push 2", "popfq", "cmc", "stc", "clc", "std", "cld", "hlt";

    double_fault:
        // The #GP handler's gate is not present: #NP while delivering #GP.
        "sub rsp, 16", "sidt [rsp]", "mov rax, [rsp + 2]", "btr dword ptr [rax + 13 * 16 + 4], 15",
        "lea r12, [rip + 2f]", "movabs rbx, 0x800000000000", "mov rbx, [rbx]", "2:", "hlt";

    triple_fault:
        "sub rsp, 16", "mov word ptr [rsp], 0", "lidt [rsp]", "mov rbx, [r13 + 0x10000]", "hlt";

    identification:
        "xor eax, eax", "cpuid", "mov eax, 0x80000001", "cpuid", "mov eax, 0x80000008", "cpuid",
        "mov eax, 0x40000000", "cpuid", "mov eax, 0x15", "cpuid", "hlt";
}

programs! {
    /// Pieces that may follow each other in any order: each begins and ends in kernel mode with the system as it was
    /// in the beginning, whatever is in RAX, RBX, RCX, RDX, RSI, RDI, RBP, R8 to R11.
    pieces:
    divide_error:
        "lea r12, [rip + 2f]", "xor ecx, ecx", "div ecx", "2:", "lea r12, [rip + 2f]", "mov edx, -1", "mov ecx, 2",
        "div rcx", "2:", "lea r12, [rip + 2f]", "mov eax, 0x80000000", "mov edx, -1", "mov ecx, -1", "idiv ecx", "2:";

    undefined_opcode:
        "lea r12, [rip + 2f]", "ud2", "2:", "lea r12, [rip + 2f]", "lock nop", "2:", "xor r12d, r12d";

    absent_reads:
        "lea r12, [rip + 2f]", "mov rax, [r13 + 0x10000]", "2:", "lea r12, [rip + 2f]", "add ebx, [r13 + 0x10ffe]",
        "2:", "lea r12, [rip + 2f]", "movzx edx, word ptr [r13 + 0x5fff]", "2:", "lea r12, [rip + 2f]",
        "push qword ptr [r13 + 0x6000]", "2:", "lea r12, [rip + 2f]", "cmp [r13 - 4], rsi", "2:";

    absent_writes:
        "lea r12, [rip + 2f]", "mov [r13 + 0x10008], rax", "2:", "lea r12, [rip + 2f]", "xchg [r13 + 0x7000], bl",
        "2:", "lea r12, [rip + 2f]",
        "pop qword ptr [r13 + 0x6010]", "2:", "mov rsp, 0xffff800000008000";

    read_only_writes:
        "lea r12, [rip + 2f]", "mov [r13 + 0x4000], eax", "2:", "lea r12, [rip + 2f]", "lock cmpxchg [r13 + 0x4010], rdx", "2:", "lea r12, [rip + 2f]",
        "bts dword ptr [r13 + 0x4004], 3", "2:", "lea r12, [rip + 2f]", "sete byte ptr [r13 + 0x4fff]", "2:";

    bad_fetches:
        "lea r12, [rip + 2f]", "lea rax, [r13 + 0x10000]", "jmp rax", "2:", "lea r12, [rip + 2f]", "jmp r13", "2:",
        "lea r12, [rip + 2f]", "lea rbx, [r13 + 0x2345]", "call rbx", "2:", "mov rsp, 0xffff800000008000";

    not_canonical:
        "movabs rcx, 0x800000000000", "lea r12, [rip + 2f]", "mov eax, [rcx]", "2:", "lea r12, [rip + 2f]", "jmp rcx", "2:", "mov rbx, rsp", "lea rsp, [rcx + 64]",
        "mov rsp, rbx", "lea r12, [rip + 2f]", "test [rcx + rcx], al", "2:";

    bad_selectors:
        "mov eax, 0x100", "lea r12, [rip + 2f]", "mov ds, eax", "2:", "mov eax, 0x60", "lea r12, [rip + 2f]",
        "mov es, eax", "2:", "mov eax, 0x40", "lea r12, [rip + 2f]", "mov fs, eax", "2:", "mov eax, 0x10",
        "lea r12, [rip + 2f]", "mov ss, eax", "2:", "mov eax, 0x2b", "lea r12, [rip + 2f]", "mov ss, eax", "2:",
        "mov eax, 0x0c", "lea r12, [rip + 2f]", "mov gs, eax", "2:";

    data_segments:
        "mov eax, 0x2b", "mov ds, eax", "mov es, eax", "mov fs, eax", "mov gs, eax", "mov ecx, es", "mov dx, fs",
        "xor eax, eax", "mov ds, eax", "mov eax, 2", "mov es, eax", "mov fs, eax", "mov gs, eax", "mov rcx, fs",
        "xor eax, eax", "mov es, eax", "mov fs, eax", "mov gs, eax";

    local_descriptors:
        "mov eax, 0x50", "lldt ax", "sldt ebx", "mov eax, 0x0c", "mov fs, eax", "mov gs, eax", "mov eax, 0x14",
        "lea r12, [rip + 2f]", "mov es, eax", "2:", "xor eax, eax", "mov fs, eax", "mov gs, eax", "lldt ax",
        "mov eax, 0x18", "lea r12, [rip + 2f]", "lldt ax", "2:", "str ecx";

    segment_bases:
        "mov ecx, 0xc0000100", "mov eax, 0x1000", "mov edx, 0x7fff", "wrmsr", "rdmsr", "mov ecx, 0xc0000101",
        "mov eax, 0x2000", "mov edx, 0xffff8000", "wrmsr", "mov rax, gs:[0x10]", "mov gs:[0x7ff0], ebx", "swapgs",
        "mov ecx, 0xc0000102", "rdmsr", "swapgs", "mov ecx, 0xc0000101", "xor eax, eax", "mov edx, 0x8000",
        "lea r12, [rip + 2f]", "wrmsr", "2:", "xor edx, edx", "wrmsr", "mov ecx, 0xc0000100", "wrmsr";

    model_specific_registers:
        "mov ecx, 0x174", "mov eax, 0x10", "xor edx, edx", "wrmsr", "rdmsr", "mov ecx, 0x175", "mov eax, 0x1234",
        "mov edx, 0xffff8000", "wrmsr", "rdmsr", "inc ecx", "wrmsr", "rdmsr", "mov ecx, 0xc0000082", "wrmsr", "rdmsr",
        "mov ecx, 0xc0000084", "mov eax, 0x47700", "xor edx, edx", "wrmsr", "mov ecx, 0x277", "rdmsr", "mov ecx, 0x12345678", "lea r12, [rip + 2f]", "rdmsr", "2:",
        "mov ecx, 0xc0000080", "mov eax, -1", "lea r12, [rip + 2f]", "wrmsr", "2:", "rdmsr", "mov ecx, 0xc0000081",
        "rdmsr";

    page_attributes:
        "mov ecx, 0x277", "rdmsr", "mov esi, eax", "mov edi, edx", "mov eax, 0x00070102", "lea r12, [rip + 2f]", "wrmsr",
        "2:", "mov eax, 0x00070106", "xor edx, edx", "wrmsr", "rdmsr", "mov edx, 0x08000000", "lea r12, [rip + 2f]",
        "wrmsr", "2:", "mov eax, esi", "mov edx, edi", "wrmsr";

    time_stamp_auxiliary:
        "mov ecx, 0xc0000103", "mov eax, 5", "xor edx, edx", "wrmsr", "rdmsr", "rdtscp", "xor eax, eax", "xor edx, edx";

    control_registers:
        "mov rax, cr0", "mov rbx, cr4", "mov rcx, cr3", "mov cr3, rcx", "bts rax, 3", "mov cr0, rax", "smsw edx", "clts",
        "mov rax, cr0", "btr rax, 16", "mov cr0, rax", "mov [r13 + 0x4000], eax", "bts rax, 16", "mov cr0, rax",
        "lea r12, [rip + 2f]", "mov [r13 + 0x4008], eax", "2:", "mov rax, cr4", "btr rax, 7", "mov cr4, rax",
        "bts rax, 7", "mov cr4, rax", "mov cr2, rsi", "mov rdx, cr2", "mov rax, cr4", "bts rax, 31",
        "lea r12, [rip + 2f]", "mov cr4, rax", "2:", "mov rax, cr0", "btr rax, 0", "lea r12, [rip + 2f]",
        "mov cr0, rax", "2:", "mov rax, cr4", "btr rax, 5", "lea r12, [rip + 2f]", "mov cr4, rax", "2:";

    debug_registers:
        "mov dr0, rsi", "mov rax, dr0", "mov dr1, rdi", "mov rbx, dr1", "mov dr2, rbx", "mov dr3, rbp", "mov rcx, dr3",
        "mov rdx, dr6", "mov rsi, dr7", "movabs rax, 0x100000000", "lea r12, [rip + 2f]", "mov dr7, rax", "2:",
        "xor eax, eax", "mov dr0, rax", "mov dr1, rax", "mov dr2, rax", "mov dr3, rax", "mov eax, 0x400", "mov dr7, rax";

    access_checks:
        "mov rax, cr4", "bts rax, 21", "bts rax, 20", "mov cr4, rax", "lea r12, [rip + 2f]", "mov rax, [r13]", "2:",
        "lea r12, [rip + 2f]", "mov [r13 + 8], rbx", "2:", "pushfq", "or dword ptr [rsp], 0x40000", "popfq",
        "mov rcx, [r13]", "mov [r13 + 0xffc], rdx", "pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq",
        "lea r12, [rip + 2f]", "mov rax, [r13]", "2:", "mov rax, cr4", "btr rax, 21", "btr rax, 20", "mov cr4, rax";

    flags:
        "pushfq", "pop rax", "or eax, 0x240cd5", "push rax", "popfq", "pushfq", "lahf", "sahf", "pop rcx", "cli",
        "push 2", "popfq", "cmc", "stc", "clc", "std", "cld", "pushfq", "btc dword ptr [rsp], 14", "popfq", "pushfq",
        "btr dword ptr [rsp], 14", "popfq", "push 2", "popfq";

    return_to_same_level:
        "lea rax, [rip + 2f]", "mov rbx, rsp", "push 0x18", "push rbx", "push 0x2", "push 0x10", "push rax", "iretq",
        "2:", "push 0x10", "lea rax, [rip + 2f]", "push rax", "retfq", "2:";

    bad_returns:
        "lea rax, [rip + 2f]", "mov r12, rax", "mov rbx, rsp", "push 0x18", "push rbx", "push 0x2", "push 0x18",
        "push rax", "iretq", "2:", "mov rsp, rbx", "lea r12, [rip + 2f]", "push 0x18", "push rbx", "push 2", "push 0",
        "push r12", "iretq", "2:", "mov rsp, rbx", "lea r12, [rip + 2f]", "push 0x2b", "push rbx", "push 2", "push 0x10",
        "push r12", "iretq", "2:", "mov rsp, rbx", "lea r12, [rip + 2f]", "push 0x18", "push rbx", "push 2",
        "push 0x10", "movabs rax, 0x800000000000", "push rax", "iretq", "2:", "mov rsp, 0xffff800000008000";

    strings_across_pages:
        "cld", "lea rsi, [r13 + 0xff8]", "lea rdi, [r13 + 0x1ffb]", "mov ecx, 0x20", "rep movsb",
        "lea rsi, [r13 + 0xffc]", "lea rdi, [r13 + 0x2ff9]", "mov ecx, 5", "rep movsq", "lea rdi, [r13 + 0x1fff]",
        "mov ecx, 9", "rep stosd", "stosw", "lodsb", "std", "lea rsi, [r13 + 0x1003]", "lea rdi, [r13 + 0x2003]",
        "mov ecx, 3", "rep movsd", "cld", "lea rsi, [r13 + 0xffe]", "lea rdi, [r13 + 0x1ffe]", "mov ecx, 9",
        "repe cmpsb", "mov ecx, 30", "repne scasb";

    strings_that_fault:
        "cld", "lea rdi, [r13 + 0x3ff5]", "mov ecx, 40", "lea r12, [rip + 2f]", "rep stosb", "2:",
        "lea rsi, [r13 + 0x5fe1]", "lea rdi, [r13 + 0x800]", "mov ecx, 10", "lea r12, [rip + 2f]", "rep movsq", "2:",
        "lea rsi, [r13 + 0x5fff]", "lea r12, [rip + 2f]", "lodsw", "2:", "lea rsi, [r13 + 0x100]",
        "lea rdi, [r13 + 0x3ffc]", "mov ecx, 3", "lea r12, [rip + 2f]", "rep movsd", "2:", "std",
        "lea rdi, [r13 + 0x5003]", "mov ecx, 9", "lea r12, [rip + 2f]", "rep stosd", "2:", "cld";

    changed_tables:
        // R8: the entry that maps the first page of data.
        "movabs r10, 0xffff800000000000", "movabs r11, 0xffffffffff000", "mov r8, cr3", "and r8, r11",
        "mov r8, [r8 + r10]", "and r8, r11", "mov r8, [r8 + r10]", "and r8, r11", "lea r8, [r8 + r10 + 0x800]",
        "mov r8, [r8]", "and r8, r11", "add r8, r10", "mov r9, [r8]", "mov rax, [r13]", "mov qword ptr [r8], 0",
        "invlpg [r13]", "lea r12, [rip + 2f]", "mov rax, [r13]", "2:", "mov [r8], r9", "mov rax, [r13]",
        "btr qword ptr [r8], 1", "invlpg [r13]", "mov rax, [r13 + 8]", "lea r12, [rip + 2f]", "mov [r13], rax", "2:",
        "mov [r8], r9", "invlpg [r13]", "mov [r13], rax", "bts qword ptr [r8], 50", "invlpg [r13]",
        "lea r12, [rip + 2f]", "mov rax, [r13]", "2:", "mov [r8], r9", "invlpg [r13]";

    accessed_and_dirty:
        "movabs r10, 0xffff800000000000", "movabs r11, 0xffffffffff000", "mov r8, cr3", "and r8, r11",
        "mov r8, [r8 + r10]", "and r8, r11", "mov r8, [r8 + r10]", "and r8, r11", "lea r8, [r8 + r10 + 0x800]",
        "mov r8, [r8]", "and r8, r11", "add r8, r10", "and qword ptr [r8 + 8], -97", "invlpg [r13 + 0x1000]",
        "mov rax, [r8 + 8]", "mov rbx, [r13 + 0x1008]", "mov rcx, [r8 + 8]", "mov [r13 + 0x1010], rbx", "mov rdx, [r8 + 8]",
        "and qword ptr [r8 + 16], -97", "invlpg [r13 + 0x2000]", "lock add [r13 + 0x2000], rax", "mov rsi, [r8 + 16]",
        "and qword ptr [r8 + 32], -97", "invlpg [r13 + 0x4000]", "lea r12, [rip + 2f]", "mov [r13 + 0x4000], al", "2:",
        "mov rdi, [r8 + 32]", "mov al, [r13 + 0x4000]", "mov rbp, [r8 + 32]";

    exchanged_pages:
        "movabs r10, 0xffff800000000000", "movabs r11, 0xffffffffff000", "mov r8, cr3", "and r8, r11",
        "mov r8, [r8 + r10]", "and r8, r11", "mov r8, [r8 + r10]", "and r8, r11", "lea r8, [r8 + r10 + 0x800]",
        "mov r8, [r8]", "and r8, r11", "add r8, r10", "mov rbx, [r8 + 8]", "mov r9, [r8]", "mov [r8], rbx",
        "mov [r8 + 8], r9", "mov rax, cr3", "mov cr3, rax", "mov rax, [r13 + 0xffc]", "mov [r13 + 0xffe], rax",
        "mov rdx, [r13 + 0x10]", "mov [r8], r9", "mov [r8 + 8], rbx", "mov rax, cr3", "mov cr3, rax",
        "mov rcx, [r13 + 0xff8]", "xor ebx, ebx";

    kernel_self_modifying:
        "mov ebx, 6", "3: mov byte ptr [rip + 2f + 1], bl", "2: add al, 0", "dec ebx", "jnz 3b",
        "mov ebx, 6", "lea rdi, [rip + 2f + 1]", "sub rdi, r15", "3: mov [rdi], bl", "2: sub al, 0", "dec ebx",
        "jnz 3b";

    bit_strings:
        "mov rax, -77", "bts [r13 + 0x100], rax", "mov ecx, 4093", "btc [r13 + 0x20], ecx", "btr [r13 + 0xfff], rax",
        "mov eax, 0x20000", "bt [r13 + 4], rax", "lea r12, [rip + 2f]", "mov eax, 0x20000", "bts [r13 + 4], rax", "2:",
        "shld [r13 + 0x40], rdx, 5", "shrd rbx, rsi, cl", "rcl qword ptr [r13 + 0x48], 1", "sar byte ptr [r13 + 0x50], 3";

    exchanges:
        "mov eax, [r13 + 0x80]", "lock cmpxchg [r13 + 0x80], ecx", "lock xadd [r13 + 0xffd], rdx", "xchg [r13 + 0x1ffe], rbx",
        "lock cmpxchg8b [r13 + 0x88]", "lock neg qword ptr [r13 + 0x90]", "lock btc dword ptr [r13 + 0x98], 7",
        "mov rsi, [r13 + 0xffd]", "lock dec byte ptr [r13 + 0x9c]", "xadd rbp, rdi";

    stack:
        "push rax", "push 0x12345678", "pop qword ptr [r13 + 0x30]", "pop rcx", "pushfq", "add rsp, 8", "mov rbx, rsp", "push rsp",
        "pop rsp", "call 2f", "jmp 3f", "2: lea rdx, [rip]", "ret 0", "3: lea rsp, [r13 + 0x7000]",
        "lea r12, [rip + 2f]", "push rax", "2:", "mov rsp, rbx", "push 7", "mov rbp, rsp", "leave";

    user_arithmetic:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "imul rax, rbx, 77", "mul rdx", "shld rsi, rdi, 9", "bsf rcx, rax", "popcnt r8, rsi", "tzcnt r9, rdi",
        "lzcnt r10d, eax", "andn r11, rax, rbx", "pdep rbx, rsi, rdi", "rorx rcx, rdx, 17", "adc rax, rbx", "sbb edx, esi",
        "cmovc rdi, rax", "seto al", "bswap rbp", "movbe [r13 + 0x70], rdi", "crc32 rax, qword ptr [r13 + 0x70]",
        "xor r12d, r12d", "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_faults:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "lea r12, [rip + 2f]", "xor ecx, ecx", "div ecx", "2:", "lea r12, [rip + 2f]", "mov rax, [r13 + 0x10000]",
        "2:", "lea r12, [rip + 2f]", "mov [r13 + 0x4000], rax", "2:", "lea r12, [rip + 2f]",
        "inc qword ptr [r13 + 0x3ffc]", "2:", "lea r12, [rip + 2f]", "jmp r13", "2:",
        "movabs rcx, 0x800000000000",
        "lea r12, [rip + 2f]", "mov eax, [rcx]", "2:", "lea r12, [rip + 2f]", "hlt", "2:", "lea r12, [rip + 2f]",
        "mov rax, cr0", "2:", "lea r12, [rip + 2f]", "clts", "2:", "lea r12, [rip + 2f]",
        "lock add rax, [rbx]", "2:", "mov rcx, [r13]", "lea r12, [rip + 2f]", "movaps xmm0, [r13 + 8]", "2:",
        "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_reaches_for_the_kernel:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "lea rbx, [rip + 9b]", "add rbx, r15", "lea r12, [rip + 2f]", "mov rax, [rbx]", "2:",
        "lea r12, [rip + 2f]", "mov [rbx], rax", "2:", "lea r12, [rip + 2f]", "jmp rbx", "2:", "lea r12, [rip + 2f]",
        "lock add [rbx], rax", "2:", "lea r12, [rip + 2f]", "mov eax, [rbx + 0x7ffff000]", "2:",
        "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_interrupts:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "nop", "int 0x80", "lea r12, [rip + 2f]", "int 0x40", "2:", "lea r12, [rip + 2f]", "int 13", "2:", "int 4",
        "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    interrupts:
        "int 0x41", "int 0x42", "int 0x80", "sub rsp, 16", "sidt [rsp]", "mov word ptr [rsp], 0x3ff", "lidt [rsp]",
        "lea r12, [rip + 2f]", "int 0x40", "2:", "mov word ptr [rsp], 0xfff", "lidt [rsp]", "add rsp, 16";

    user_alignment:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "nop", "pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov rax, [r13 + 8]", "lea r12, [rip + 2f]",
        "mov eax, [r13 + 2]", "2:", "lea r12, [rip + 2f]", "mov [r13 + 0xffd], ax", "2:", "lea r12, [rip + 2f]",
        "add qword ptr [r13 + 0x14], rax", "2:", "lea r12, [rip + 2f]", "movups xmm0, [r13 + 8]", "2:",
        "lea rsi, [r13 + 1]", "lea rdi, [r13 + 0x101]", "movsb", "lea r12, [rip + 2f]", "movsw", "2:",
        "movups xmm0, [r13 + 0x10]", "lea r12, [rip + 2f]", "fld tbyte ptr [r13 + 0x24]", "2:", "lea r12, [rip + 2f]",
        "mov rax, [r13 + 0x10001]", "2:", "pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq", "mov rcx, [r13 + 3]",
        "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_segments:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "mov eax, 0x2b", "mov ds, eax", "mov es, eax", "mov fs, eax", "mov gs, eax", "mov ss, eax", "nop",
        "mov eax, 0x18", "lea r12, [rip + 2f]", "mov ds, eax", "2:", "mov eax, 0x63", "lea r12, [rip + 2f]",
        "mov es, eax", "2:", "xor eax, eax", "mov ds, eax", "mov es, eax", "mov fs, eax", "mov gs, eax",
        "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_flags:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "nop", "pushfq", "pop rax", "or rax, 0x200001", "push rax", "popfq", "pushfq", "pop rbx", "std", "pushfq", "cld",
        "popfq", "cld", "lahf", "rdfsbase rcx", "shr rsi, 20", "wrgsbase rsi", "rdgsbase rdx",
        "mov ecx, 0x2b", "lsl ebx, ecx", "lar edx, ecx", "verr cx", "verw cx", "xor eax, eax", "wrgsbase rax", "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_strings:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "cld", "lea rsi, [r13 + 0xff8]", "lea rdi, [r13 + 0x1ffb]", "mov ecx, 0x20", "rep movsb",
        "lea rdi, [r13 + 0x3ff5]", "mov ecx, 40", "lea r12, [rip + 2f]", "rep stosb", "2:", "lea rsi, [r13 + 0x5fe1]",
        "lea rdi, [r13 + 0x800]", "mov ecx, 10", "lea r12, [rip + 2f]", "rep movsq", "2:", "std",
        "lea rsi, [r13 + 0x1003]", "lea rdi, [r13 + 0x2003]", "mov ecx, 9", "rep movsd", "cld",
        "lea rsi, [r13 + 0xffe]", "lea rdi, [r13 + 0x1ffe]", "mov ecx, 9", "repe cmpsb", "mov ecx, 30", "repne scasd",
        "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_self_modifying:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "mov ebx, 5", "3: mov byte ptr [rip + 2f + 1], bl", "2: add al, 0", "dec ebx", "jnz 3b", "mov ebx, 5",
        "4: mov [rip + 5f + 1], ebx", "call 5f", "dec ebx", "jnz 4b", "jmp 6f", "5: mov edi, 0x12345678", "add ebp, edi",
        "ret", "6: lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_x87:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "fninit", "fld1", "fldpi", "fadd st, st(1)", "fsqrt", "fst qword ptr [r13 + 0x8]", "fild word ptr [r13 + 8]",
        "fdivrp", "fxch", "fnstsw ax", "fprem", "fscale", "fxam", "fist dword ptr [r13 + 0x18]", "fbstp [r13 + 0x20]",
        "fnstcw [r13]", "mov word ptr [r13], 0x37b", "fldcw [r13]", "fld1", "fldz", "fdivp", "lea r12, [rip + 2f]",
        "fwait", "2: fnclex", "fninit", "emms", "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_vectors:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "movups xmm0, [r13 + 0x40]", "mulps xmm0, xmm0", "vmovups ymm1, [r13 + 0x60]", "vaddpd ymm2, ymm1, ymm1",
        "vpshufb ymm3, ymm2, ymm1", "vextracti128 [r13 + 0x80], ymm3, 1", "pcmpistri xmm0, [r13 + 0x90], 0x18",
        "aesenc xmm0, xmm1", "pclmulqdq xmm2, xmm0, 0x11", "sha256msg1 xmm1, xmm2", "vfmadd213pd ymm1, ymm2, ymm3",
        "vpmaskmovd [r13 + 0xff0], ymm1, ymm3", "vcvtpd2ps xmm4, ymm2", "lea rdi, [r13 + 0x700]", "maskmovdqu xmm0, xmm2", "stmxcsr [r13]",
        "mov dword ptr [r13 + 4], 0x1f00", "ldmxcsr [r13 + 4]", "xorps xmm3, xmm3", "lea r12, [rip + 2f]",
        "divps xmm3, xmm3", "2:", "mov dword ptr [r13 + 4], 0x1f80", "ldmxcsr [r13 + 4]", "vzeroupper",
        "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_images:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "vmovups ymm6, [r13 + 0x60]", "fninit", "fldpi", "fxsave [r13 + 0x200]", "mov dword ptr [r13 + 0x21c], 0xffff", "fninit", "movdqu xmm0, [r13 + 0x33]", "fxrstor [r13 + 0x200]",
        "vmovups ymm6, [r13 + 0x60]", "vxorps ymm5, ymm5, ymm5", "vmovups [r13 + 0x600], ymm5", "vmovups [r13 + 0x620], ymm5", "mov eax, 7",
        "xor edx, edx", "xsave [r13 + 0x400]", "mov dword ptr [r13 + 0x41c], 0xffff", "vzeroall", "mov eax, 2", "xrstor [r13 + 0x400]", "mov eax, 5",
        "xrstor [r13 + 0x400]", "fnsave [r13 + 0x800]", "frstor [r13 + 0x800]", "fnstenv [r13 + 0x900]",
        "fldenv [r13 + 0x900]", "fninit", "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";

    user_stack_faults:
        "lea rcx, [rip + 9f]", "sub rcx, r15", "push 0x2b", "push r14", "push 0x202", "push 0x33", "push rcx", "iretq",
        "9:", "mov rbx, rsp", "lea rsp, [r14 - 0x1fc0]", "lea r12, [rip + 2f]", "push rax", "2:",
        "lea r12, [rip + 2f]", "call 9b", "2:", "lea r12, [rip + 2f]", "enter 0x10, 3", "2:", "lea rsp, [r14 + 0x40]",
        "lea r12, [rip + 2f]", "pop rcx", "2:", "lea r12, [rip + 2f]", "ret", "2:", "movabs rsp, 0x800000000000",
        "lea r12, [rip + 2f]", "pop rdx", "2:", "mov rsp, rbx", "push rcx", "pop qword ptr [r13 + 0x30]",
        "lea r12, [rip + 2f]", "push qword ptr [r13 + 0x5ffc]", "2:", "lea r12, [rip + 2f]", "pop qword ptr [r13 + 0x4000]", "2:",
        "mov rsp, rbx", "lea r12, [rip + 2f]", "add r12, r15", "ud2", "2: xor r12d, r12d";
}
