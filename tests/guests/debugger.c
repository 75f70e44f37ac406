// A debugger and what it debugs: single steps, breakpoints and watchpoints in the debug registers, as gdb uses them.
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

// DR7: what makes a breakpoint of a slot, and how long the place is.
enum { EXECUTE = 0, WRITE = 1, ACCESS = 3 };
enum { BYTE = 0, WORD = 1, DOUBLE = 3, QUAD = 2 };

// The assembly code knows these by their names and offsets.
volatile struct {
    uint8_t bytes[64];
    uint64_t quad, other;
} __attribute__((aligned(64))) watched;
uint8_t copy[64];

extern char debuggee[], debuggee_loop[], debuggee_middle[], debuggee_end[];

// What is debugged. Each kind of instruction that a step must count once, or for a string once per round.
__attribute__((noinline, naked)) static void run_debuggee(void) {
    __asm__ volatile(
        "pushq %%rbx\n\t"
        ".globl debuggee, debuggee_loop, debuggee_middle, debuggee_end\n"
        "debuggee:\n\t"
        "movl $5, %%ebx\n"
        "debuggee_loop:\n\t"
        "leaq (%%rbx,%%rbx,2), %%rax\n\t"
        "movq %%rax, watched+64(%%rip)\n\t"
        "movb %%bl, watched+3(%%rip)\n\t"
        "decl %%ebx\n\t"
        "jnz debuggee_loop\n\t"
        "movl watched(%%rip), %%eax\n"
        "debuggee_middle:\n\t"
        "pushq %%rax\n\t"
        "popq %%rdx\n\t"
        "movl %%ss, %%eax\n\t"
        "movl %%eax, %%ss\n\t"          // inhibits the trap behind it
        "incq watched+72(%%rip)\n\t"
        "leaq watched(%%rip), %%rsi\n\t"
        "leaq copy(%%rip), %%rdi\n\t"
        "movl $17, %%ecx\n\t"
        "cld\n\t"
        "rep movsb\n\t"
        "xorl %%ecx, %%ecx\n\t"
        "rep stosb\n\t"
        "movl $110, %%eax\n\t"          // getppid
        "syscall\n\t"
        "cpuid\n\t"                     // whose answers differ
        "xorl %%eax, %%eax\n\t"
        "xorl %%ecx, %%ecx\n\t"
        "lock; xaddq %%rax, watched+64(%%rip)\n\t"
        "movups watched(%%rip), %%xmm0\n\t"
        "movups %%xmm0, watched+16(%%rip)\n\t"
        "pushfq\n\t"
        "addq $8, %%rsp\n\t"
        "call 1f\n"
        "1:\taddq $8, %%rsp\n\t"
        "nop\n"
        "debuggee_end:\n\t"
        "popq %%rbx\n\t"
        "ret" ::);
}

// A child that stops and then runs the debuggee.
static pid_t start(void) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0) _exit(90);
        raise(SIGSTOP);
        run_debuggee();
        _exit(watched.other == 1 ? 33 : 34);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
    return child;
}

static uint64_t peek(pid_t child, size_t offset) {
    return ptrace(PTRACE_PEEKUSER, child, offset, NULL);
}

static void set_debug(pid_t child, int number, uint64_t value) {
    CHECK(ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[number]), value) == 0);
}

static void watch(pid_t child, int slot, const volatile void *place, int kind, int length) {
    set_debug(child, slot, (uintptr_t)place);
    uint64_t control = peek(child, offsetof(struct user, u_debugreg[7]));
    control |= 1ull << (2 * slot) | (uint64_t)(kind | length << 2) << (16 + 4 * slot);
    set_debug(child, 7, control);
}

// Goes on until the next stop; false if the child has exited, as it must, with 33.
static int proceed(pid_t child, int how) {
    int status = 0;
    CHECK(ptrace(how, child, NULL, NULL) == 0);
    CHECK(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status)) {
        CHECK(WEXITSTATUS(status) == 33);
        return 0;
    }
    CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP);
    return 1;
}

static uint64_t position(pid_t child) {
    return peek(child, offsetof(struct user, regs.rip)) - (uintptr_t)debuggee;
}

static int inside(uint64_t at) { return at < (uint64_t)(debuggee_end - debuggee); }

// Where the child is, how it got there, and what it has done.
static void fold_stop(pid_t child) {
    siginfo_t info;
    CHECK(ptrace(PTRACE_GETSIGINFO, child, NULL, &info) == 0);
    fold(info.si_code);
    fold(position(child));
    fold(peek(child, offsetof(struct user, u_debugreg[6])) & 0x400f);
    fold(peek(child, offsetof(struct user, regs.rcx)) & 0xff);
    fold(ptrace(PTRACE_PEEKDATA, child, &watched.quad, NULL) & 0xff);
    set_debug(child, 6, 0);
}

// Steps through the debuggee from a breakpoint at its beginning.
static void single_steps(void) {
    pid_t child = start();
    watch(child, 0, debuggee, EXECUTE, BYTE);
    CHECK(proceed(child, PTRACE_CONT));
    CHECK(position(child) == 0);
    int count = 0;
    while (inside(position(child))) {
        CHECK(proceed(child, PTRACE_SINGLESTEP));
        fold(position(child));
        count++;
    }
    printf("%d steps\n", count);
    CHECK(!proceed(child, PTRACE_CONT));
}

static void watchpoints(void) {
    pid_t child = start();
    watch(child, 0, &watched.quad, WRITE, QUAD);
    watch(child, 1, &watched.bytes[2], WRITE, WORD);
    watch(child, 2, &watched.other, ACCESS, DOUBLE);
    watch(child, 3, debuggee_middle, EXECUTE, BYTE);
    int count = 0;
    while (proceed(child, PTRACE_CONT)) {
        fold_stop(child);
        count++;
    }
    printf("%d stops\n", count);
}

// A breakpoint in a loop, hit while stepping and while running; and one that is taken away.
static void breakpoints(void) {
    pid_t child = start();
    watch(child, 0, debuggee_loop, EXECUTE, BYTE);
    watch(child, 1, &watched.bytes[16], ACCESS, BYTE);
    int count = 0;
    while (proceed(child, count % 3 == 1 ? PTRACE_SINGLESTEP : PTRACE_CONT)) {
        fold_stop(child);
        if (++count == 6) set_debug(child, 7, 0x00010004 | 3 << 20);
    }
    printf("%d breaks\n", count);
}

int main(void) {
    single_steps();
    watchpoints();
    breakpoints();
    return result("debugger");
}
