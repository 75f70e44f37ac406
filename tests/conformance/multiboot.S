# Boots a 32-bit multiboot ELF file (the Multiboot Specification, version 0.6.96) on a machine that enters kernels in
# 64-bit mode: an ELF "kernel" that carries the file, leaves long mode, puts the file's segments where they belong and
# enters it as a boot loader would. Assembled with
#
#   -DPAYLOAD=   the file              -DCOMMAND_LINE=  its command line, the file's name first
#   -DMODULE=    a file, the one boot module     -DMEMORY_KIB=    memory of the machine, in KiB
#
# and linked where nothing else wants to be (see kvm-unit-tests.sh).

        .set    INFORMATION, 0x80000            # what the payload may keep: below 1 MiB, away from its segments
        .set    BOOT_MAGIC, 0x2BADB002

        .section .text
        .code64
        .globl  _start
_start:
        cli
        lgdt    gdt_pointer(%rip)
        movl    $stack_top, %esp
        pushq   $0x08
        pushq   $protected
        lretq

        .code32
protected:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %fs
        movw    %ax, %gs
        movw    %ax, %ss
        movl    %cr0, %eax                      # leave long mode: CR0.PG, then EFER.LME
        andl    $0x7FFFFFFF, %eax
        movl    %eax, %cr0
        movl    $0xC0000080, %ecx
        rdmsr
        andl    $~0x100, %eax
        wrmsr
        xorl    %eax, %eax
        movl    %eax, %cr4

        movl    payload + 28, %ebx              # e_phoff
        addl    $payload, %ebx
        movzwl  payload + 44, %ebp              # e_phnum
segment:
        cmpl    $1, (%ebx)                      # PT_LOAD
        jne     next
        movl    4(%ebx), %esi                   # p_offset
        addl    $payload, %esi
        movl    12(%ebx), %edi                  # p_paddr
        movl    16(%ebx), %ecx                  # p_filesz
        movl    20(%ebx), %edx                  # p_memsz
        subl    %ecx, %edx
        cld
        rep movsb
        movl    %edx, %ecx
        xorl    %eax, %eax
        rep stosb
next:
        movzwl  payload + 42, %eax              # e_phentsize
        addl    %eax, %ebx
        decl    %ebp
        jnz     segment

        movl    $information, %esi
        movl    $INFORMATION, %edi
        movl    $information_end - information, %ecx
        rep movsb
        movl    $BOOT_MAGIC, %eax
        movl    $INFORMATION, %ebx
        jmp     *payload + 24                   # e_entry

        .section .data
        .balign 8
gdt:
        .quad   0
        .quad   0x00CF9B000000FFFF              # 0x08: 32-bit code
        .quad   0x00CF93000000FFFF              # 0x10: data
gdt_pointer:
        .word   . - gdt - 1
        .quad   gdt

        .macro  there label                     # the address that a label has after copying
        .long   INFORMATION + \label - information
        .endm
        .balign 8
information:
        .long   1 << 0 | 1 << 2 | 1 << 3 | 1 << 6        # memory, command line, modules, memory map
        .long   639, MEMORY_KIB - 1024
        .long   0
        there   command_line
        .long   1
        there   modules
        .fill   4, 4, 0
        .long   map_end - map
        there   map
        .fill   9, 4, 0
modules:
        there   module
        there   module_end
        there   command_line
        .long   0
map:
        .long   20
        .quad   0, 639 * 1024
        .long   1
        .long   20
        .quad   0x100000, (MEMORY_KIB - 1024) * 1024
        .long   1
map_end:
command_line:
        .asciz  COMMAND_LINE
module:
        .incbin MODULE
module_end:
information_end:

        .balign 16
payload:
        .incbin PAYLOAD

        .section .bss
        .balign 16
        .skip   4096
stack_top:
