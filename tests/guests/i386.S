# A 32-bit program without any library: instructions that 64-bit code does not have, the kernel's two entries for
# 32-bit programs, and a visit to 64-bit code by far jumps.

        .code32
        .global _start
        .text
_start:
        mov     %esp, %ebp              # argc, argv, environment, auxiliary vector
        xor     %edi, %edi              # checksum
        cld

# Stack frames and registers in bulk.
        mov     $0x11223344, %eax
        mov     $0x55667788, %ebx
        mov     $7, %ecx
        mov     $9, %edx
        pusha
        xor     %eax, %eax
        xor     %ebx, %ebx
        popa
        call    fold
        mov     %ebx, %eax
        call    fold
        pushal
        enter   $32, $2
        leave
        popal

# Decimal and ASCII adjustment, with the flags they leave.
        mov     $0, %ecx
1:      mov     %cl, %al
        mov     $0x38, %dl
        add     %dl, %al
        daa
        call    fold_flags
        mov     %cl, %al
        sub     %dl, %al
        das
        call    fold_flags
        mov     %ecx, %eax
        and     $0xff, %eax
        aam
        call    fold
        aad
        call    fold
        mov     %cl, %al
        mov     $1, %ah
        add     $9, %al
        aaa
        call    fold_flags
        inc     %ecx
        cmp     $256, %ecx
        jne     1b

# Short forms of INC and DEC, segment registers on the stack, 16-bit addressing, borrow, table look-up.
        mov     $0x1000, %esi
        inc     %esi
        dec     %esi
        inc     %esi
        mov     %esi, %eax
        call    fold
        push    %ds
        pop     %es
        push    %es
        pop     %eax
        and     $0xffff, %eax
        call    fold
        movw    $0x1234, %bx            # 16-bit addressing: the offset wraps at 64 KiB
        addr16 lea 5(%bx,%si), %eax
        and     $0xffff, %eax
        call    fold
        stc
        sbb     %eax, %eax
        call    fold
        mov     $buffer, %ebx
        movl    $0, 4(%ebx)
        mov     $200, %ecx
2:      mov     %cl, 4(%ebx)
        mov     $4, %al
        xlatb
        movzbl  %al, %eax
        call    fold
        loop    2b

# 64-bit code and back.
        ljmp    $0x33, $long
        .code64
long:   mov     $0x123456789abcdef1, %rax
        mov     $0x0fedcba987654321, %r8
        mul     %r8
        xor     %rdx, %rax
        mov     %rax, %r9
        shr     $32, %r9
        xor     %r9d, %eax
        ljmp    *back(%rip)
        .code32
short:  call    fold

# The entry by interrupt.
        mov     %edi, result_value
        mov     $20, %eax               # getpid
        int     $0x80
        mov     %eax, %esi

# The entry that the kernel offers: AT_SYSINFO (32) of the auxiliary vector, SYSENTER or SYSCALL inside.
        mov     (%ebp), %ecx
        lea     8(%ebp,%ecx,4), %ebx    # the environment
3:      mov     (%ebx), %eax
        add     $4, %ebx
        test    %eax, %eax
        jnz     3b
4:      mov     (%ebx), %eax
        test    %eax, %eax
        jz      no_sysinfo
        cmp     $32, %eax
        je      5f
        add     $8, %ebx
        jmp     4b
5:      mov     4(%ebx), %ecx
        mov     $20, %eax
        call    *%ecx
        cmp     %esi, %eax              # the same process either way
        jne     wrong
no_sysinfo:

# The result in hexadecimal.
        mov     $digits, %ebx
        mov     $8, %ecx
6:      rol     $4, %edi
        mov     %edi, %eax
        and     $15, %eax
        cmp     $10, %al
        sbb     $0x69, %al
        das                             # the classic: a nibble to its digit
        mov     %al, (%ebx)
        inc     %ebx
        loop    6b
        mov     $4, %eax                # write
        mov     $1, %ebx
        mov     $message, %ecx
        mov     $message_end - message, %edx
        int     $0x80
        xor     %ebx, %ebx
exit:   mov     $1, %eax
        int     $0x80
wrong:  mov     $1, %ebx
        jmp     exit

# Folds AX and the flags that the adjustments define: CF and AF. (ZF, SF, PF are defined for DAA and DAS alone.)
fold_flags:
        pushf
        pop     %ebx
        and     $0x11, %ebx
        shl     $16, %ebx
        movzwl  %ax, %eax
        or      %ebx, %eax
# Folds EAX into EDI.
fold:   push    %eax
        xor     %eax, %edi
        rol     $5, %edi
        imul    $0x01000193, %edi, %edi
        pop     %eax
        ret

        .data
back:   .long   short
        .word   0x23
result_value:
        .long   0
buffer: .fill   16, 1, 0x5a
message:
        .ascii  "i386: "
digits: .ascii  "00000000\n"
message_end:
        .section .note.GNU-stack, "", @progbits
