// Every exception a program can provoke: which signal, which code, which address, which error code of the processor.
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "check.h"

enum { PAGE = 4096 };
enum { DEFAULT_CONTROL = 0x37f, DEFAULT_MXCSR = 0x1f80 };

static uintptr_t start, resume;
static uint8_t *region;
static volatile int arrived;

// Folds what has arrived and goes on at `resume`. Addresses are folded as distances: mappings may be anywhere.
static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    uintptr_t address = (uintptr_t)info->si_addr;
    int in_region = address - (uintptr_t)region < 16 * PAGE;
    int in_code = address - start < 64;
    fold(number);
    fold(info->si_code);
    fold(in_region ? address - (uintptr_t)region : in_code ? address - start : address);
    uintptr_t at = registers[REG_RIP];
    fold(at - (uintptr_t)region < 16 * PAGE ? at - (uintptr_t)region : at - start);
    fold(registers[REG_ERR]);
    fold(registers[REG_TRAPNO]);
    registers[REG_RIP] = resume;
    arrived++;
}

// Executes `code`, which must fault; goes on with `after`. The operand is in RCX.
#define PROVOKE(code, after, operand)                                                                             \
    do {                                                                                                          \
        int before = arrived;                                                                                     \
        uint64_t value = (uint64_t)(operand);                                                                     \
        __asm__ volatile("leaq 1f(%%rip), %%rax\n\tmovq %%rax, %0\n\tleaq 2f(%%rip), %%rax\n\tmovq %%rax, %1\n\t" \
                         "movq %%rsp, %%r12\n\t"                                                                  \
                         "1: " code "\n\t2: movq %%r12, %%rsp\n\t" after                                          \
                         : "=m"(start), "=m"(resume), "+c"(value)                                                 \
                         :                                                                                        \
                         : "rax", "rbx", "rdx", "rsi", "rdi", "r8", "r9", "r12", "xmm0", "xmm1", "cc", "memory"); \
        if (arrived != before + 1) {                                                                              \
            printf("FAILED: no exception at %s:%d\n", __FILE_NAME__, __LINE__);                                   \
            exit(1);                                                                                              \
        }                                                                                                         \
    } while (0)

static void integers(void) {
    PROVOKE("xorl %%edx, %%edx\n\tmovl $5, %%eax\n\txorl %%ecx, %%ecx\n\tdivl %%ecx", "", 0);
    PROVOKE("movl $0x80000000, %%eax\n\tcltd\n\tmovl $-1, %%ecx\n\tidivl %%ecx", "", 0);
    PROVOKE("movq $1, %%rdx\n\txorl %%eax, %%eax\n\tmovl $1, %%ecx\n\tdivq %%rcx", "", 0);
    PROVOKE("movl $0x8000, %%eax\n\tmovb $2, %%cl\n\tidivb %%cl", "", 0);
}

struct operands {
    uint32_t control, masked;
    double left, right, result;
};

// One probe with an unmasked exception of the SSE unit: 0 is invalid, 1 denormal, 2 zero divide and so on.
#define VECTOR(bit, a, b, code)                                                                          \
    do {                                                                                                 \
        struct operands operands = {DEFAULT_MXCSR & ~(1u << (7 + (bit))), DEFAULT_MXCSR, a, b, 0};       \
        PROVOKE("ldmxcsr (%%rcx)\n\tmovsd 8(%%rcx), %%xmm0\n\tmovsd 16(%%rcx), %%xmm1\n\t" code,         \
                "ldmxcsr 4(%%rcx)", &operands);                                                          \
    } while (0)

static void vectors(void) {
    VECTOR(2, 1.0, 0.0, "divsd %%xmm1, %%xmm0");
    VECTOR(0, 0.0, 0.0, "divsd %%xmm1, %%xmm0");
    VECTOR(0, -1.0, -1.0, "sqrtpd %%xmm1, %%xmm0");
    VECTOR(3, 1e300, 1e300, "mulsd %%xmm1, %%xmm0");
    VECTOR(4, 1e-300, 1e-300, "mulpd %%xmm1, %%xmm0");
    VECTOR(5, 1.0, 3.0, "divsd %%xmm1, %%xmm0");
    VECTOR(1, 1.0, 4e-320, "addsd %%xmm1, %%xmm0");
    VECTOR(0, 1e300, 0.0, "cvttsd2si %%xmm0, %%eax");
    VECTOR(0, 1e300, 0.0, "cvtsd2si %%xmm0, %%rax");
    VECTOR(3, 1e300, 0.0, "cvtsd2ss %%xmm0, %%xmm0");
    VECTOR(0, __builtin_nan(""), 1.0, "comisd %%xmm1, %%xmm0");
    VECTOR(2, 1.0, 0.0, "divsd 16(%%rcx), %%xmm0");
}

// The same of the x87 unit: the exception waits for the next instruction that waits.
#define X87(bit, a, b, code)                                                                             \
    do {                                                                                                 \
        struct operands operands = {DEFAULT_CONTROL & ~(1u << (bit)), 0, a, b, 0};                       \
        PROVOKE("fninit\n\tfldcw (%%rcx)\n\tfldl 16(%%rcx)\n\tfldl 8(%%rcx)\n\t" code, "fninit", &operands); \
    } while (0)

static void x87(void) {
    X87(2, 1.0, 0.0, "fdivp\n\tnop\n\tfdivrp\n\tnop\n\tfwait");
    X87(2, 0.0, 1.0, "fdivr %%st, %%st(1)\n\tnop\n\tfwait");
    X87(0, 0.0, 0.0, "fdivp\n\tfld1");
    X87(0, -1.0, -1.0, "fsqrt\n\tfstpl 24(%%rcx)");
    X87(0, 1.0, 1.0, "fstp %%st\n\tfstp %%st\n\tfstp %%st\n\tnop\n\tfwait");
    X87(5, 1.0, 3.0, "fdivp\n\tnop\n\tfnstcw 24(%%rcx)\n\tfwait");
    X87(3, 1e300, 1e300, "fmul %%st, %%st\n\tfstpl 24(%%rcx)\n\tfwait");
    X87(1, 4e-320, 1.0, "fwait");
    X87(0, 1e300, 1.0, "fistpl 24(%%rcx)\n\tmovd %%eax, %%mm0");
}

static void pages(void) {
    // Of 16 pages: 0 readable, 1 absent, 2 writable, 3 readable, 4 executable, 5 absent, 6 writable, 7 executable.
    CHECK(mprotect(region, PAGE, PROT_READ) == 0);
    CHECK(mprotect(region + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE) == 0);
    CHECK(mprotect(region + 3 * PAGE, PAGE, PROT_READ) == 0);
    region[2 * PAGE] = 1;
    PROVOKE("movb (%%rcx), %%al", "", region + PAGE + 5);
    PROVOKE("movb $1, (%%rcx)", "", region + PAGE + 5);
    PROVOKE("movb $1, (%%rcx)", "", region + 5);
    PROVOKE("movb (%%rcx), %%al\n\taddl $1, (%%rcx)", "", region + 7);
    PROVOKE("movq (%%rcx), %%rax", "", region + PAGE - 3);
    PROVOKE("movq %%rax, (%%rcx)", "", region + 3 * PAGE - 3);
    PROVOKE("movups %%xmm0, (%%rcx)", "", region + 2 * PAGE - 5);
    PROVOKE("lock; xaddq %%rax, (%%rcx)", "", region + 3 * PAGE - 4);
    PROVOKE("movq (%%rcx), %%rax", "", 0);
    PROVOKE("movq %%rcx, %%rdi\n\tmovl $100, %%ecx\n\tcld\n\trep stosb", "", region + 3 * PAGE - 10);
    PROVOKE("movq %%rcx, %%rdi\n\tmovl $100, %%ecx\n\tstd\n\trep stosl", "cld", region + 2 * PAGE + 41);
    PROVOKE("movq %%rcx, %%rsp\n\tpushq %%rax", "", region + 2 * PAGE + 4);
    PROVOKE("movq %%rcx, %%rsp\n\tcall 2f", "", region + 2 * PAGE);
    fold(region[3 * PAGE - 1]);
    // Execution: of data, of nothing, and of an instruction that continues in an absent page.
    PROVOKE("jmp *%%rcx", "", region + 2 * PAGE);
    PROVOKE("jmp *%%rcx", "", region + 5 * PAGE + 77);
    uint8_t *code = region + 4 * PAGE;
    CHECK(mprotect(code, PAGE, PROT_READ | PROT_WRITE) == 0);
    memset(code, 0x90, PAGE);
    memcpy(code + PAGE - 3, (uint8_t[]){0x48, 0xb8, 1}, 3); // movabs $..., %rax
    CHECK(mprotect(code, PAGE, PROT_READ | PROT_EXEC) == 0);
    PROVOKE("jmp *%%rcx", "", code + PAGE - 40);
    // Into a file's mapping beyond the file's end.
    int fd = memfd_create("short", 0);
    CHECK(fd >= 0 && ftruncate(fd, PAGE) == 0);
    CHECK(mmap(region + 8 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED);
    region[8 * PAGE] = 1;
    PROVOKE("movb (%%rcx), %%al", "", region + 9 * PAGE + 8);
    PROVOKE("movb $2, (%%rcx)", "", region + 9 * PAGE + 8);
    close(fd);
}

static void protection(void) {
    const uint64_t hole = 0x0000800000000000;
    PROVOKE("movb (%%rcx), %%al", "", hole);
    PROVOKE("movq (%%rcx), %%rax", "", hole - 4);
    PROVOKE("movq %%rcx, %%rsp\n\tpushq %%rax", "", hole + 8);
    PROVOKE("movq %%rcx, %%rsp\n\tpopq %%rax", "", hole);
    PROVOKE("jmp *%%rcx", "", hole + 16);
    PROVOKE("movaps (%%rcx), %%xmm0", "", region + 2 * PAGE + 1);
    PROVOKE("cmpxchg16b (%%rcx)", "", region + 2 * PAGE + 8);
    PROVOKE("movl %%ecx, %%ds", "", 0xfff8);
    PROVOKE("pushq %%rcx\n\tpushq $0\n\tlretq", "", 0x28 + 0x1000);
    PROVOKE("hlt", "", 0);
    PROVOKE("cli", "", 0);
    PROVOKE("inb $0x60, %%al", "", 0);
    PROVOKE("movq %%cr0, %%rax", "", 0);
    PROVOKE("movq %%db7, %%rax", "", 0);
    PROVOKE("rdmsr", "", 0x10);
    PROVOKE("wrmsr", "", 0x10);
    PROVOKE("lgdt (%%rcx)", "", region + 2 * PAGE);
    PROVOKE("invlpg (%%rcx)", "", region);
    PROVOKE("swapgs", "", 0);
    PROVOKE("int $0x81", "", 0);
    PROVOKE(".fill 15, 1, 0x66\n\tnop", "", 0);
    PROVOKE("ud2", "", 0);
    PROVOKE(".byte 0xf0, 0x90", "", 0);
    PROVOKE(".byte 0x0e", "", 0);
    PROVOKE("sysretq", "", 0);
    PROVOKE("int3\n\tnop", "", 0);
    PROVOKE("xgetbv", "", 5);
    PROVOKE("xorl %%eax, %%eax\n\txorl %%edx, %%edx\n\txsetbv", "", 0);
}

int main(void) {
    static char stack[64 << 10];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    CHECK(sigaltstack(&alternate, NULL) == 0);
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    for (size_t i = 0; i < 5; i++) {
        CHECK(sigaction((int[]){SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}[i], &action, NULL) == 0);
    }
    region = mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(region != MAP_FAILED);
    void (*const parts[])(void) = {integers, vectors, x87, pages, protection};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        parts[i]();
        printf("%zu: %d %016llx\n", i, arrived, (unsigned long long)checksum);
    }
    return result("faults");
}
