// Code that changes under the CPU: every way in which a translator's cache could go stale.
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

enum { PAGE = 4096 };

typedef uint32_t (*function)(void);

// mov eax, imm32; ret
static const uint8_t TEMPLATE[] = {0xb8, 0, 0, 0, 0, 0xc3};

static void emit(uint8_t *at, uint32_t value) {
    memcpy(at, TEMPLATE, sizeof TEMPLATE);
    memcpy(at + 1, &value, 4);
}

static uint8_t *pages(int count, int protection, int fd) {
    uint8_t *memory = mmap(NULL, count * PAGE, protection, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

static void serialize(void) {
    uint32_t a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
}

// An operand patched again and again, in place and across a page boundary.
static void patched_operands(void) {
    uint8_t *code = pages(2, PROT_READ | PROT_WRITE | PROT_EXEC, -1);
    for (int at = PAGE - 8; at <= PAGE + 1; at++) {
        for (uint32_t value = 1; value <= 50; value++) {
            emit(code + at, value * 77);
            fold(((function)(code + at))());
        }
    }
    munmap(code, 2 * PAGE);
}

// A store into the instruction right behind it, in the same straight line of code.
static void next_instruction(void) {
    // mov byte [rip+1], imm8; mov eax, imm32; ret: the store hits the operand of the next instruction.
    static const uint8_t bytes[] = {0xc6, 0x05, 1, 0, 0, 0, 0x5a, 0xb8, 0, 0, 0, 0, 0xc3};
    uint8_t *code = pages(1, PROT_READ | PROT_WRITE | PROT_EXEC, -1);
    for (int round = 0; round < 20; round++) {
        memcpy(code, bytes, sizeof bytes);
        code[6] = (uint8_t)(round * 13);
        uint32_t value = ((function)code)();
        CHECK(value == (uint8_t)(round * 13));
        fold(value);
    }
    munmap(code, PAGE);
}

// A loop that rewrites its own step.
static void own_loop(void) {
    // xor eax, eax; mov ecx, 100; L: add eax, 1 (imm8 patched); inc byte [rip-7 -> imm8]; dec ecx; jnz L; ret
    static const uint8_t bytes[] = {0x31, 0xc0, 0xb9, 100,  0,    0,    0,    0x83, 0xc0, 1,   0xfe,
                                    0x05, 0xf9, 0xff, 0xff, 0xff, 0xff, 0xc9, 0x75, 0xf3, 0xc3};
    uint8_t *code = pages(1, PROT_READ | PROT_WRITE | PROT_EXEC, -1);
    memcpy(code, bytes, sizeof bytes);
    fold(((function)code)());
    fold(code[9]);
    munmap(code, PAGE);
}

// The same memory under two addresses: written through one, executed through the other.
static void aliases(void) {
    int fd = memfd_create("code", 0);
    CHECK(fd >= 0 && ftruncate(fd, PAGE) == 0);
    uint8_t *writable = pages(1, PROT_READ | PROT_WRITE, fd);
    uint8_t *executable = pages(1, PROT_READ | PROT_EXEC, fd);
    for (uint32_t value = 0; value < 50; value++) {
        emit(writable + 64, value * 1000003);
        serialize();
        fold(((function)(executable + 64))());
        // The kernel writes too.
        uint8_t bytes[sizeof TEMPLATE];
        emit(bytes, value ^ 0x5555);
        CHECK(pwrite(fd, bytes, sizeof bytes, 128) == sizeof bytes);
        serialize();
        fold(((function)(executable + 128))());
    }
    munmap(writable, PAGE);
    munmap(executable, PAGE);
    close(fd);
}

// As a JIT with W^X works: writable, then executable, then writable again.
static void protections(void) {
    uint8_t *code = pages(1, PROT_READ | PROT_WRITE, -1);
    for (uint32_t value = 0; value < 40; value++) {
        CHECK(mprotect(code, PAGE, PROT_READ | PROT_WRITE) == 0);
        emit(code, value * 31);
        CHECK(mprotect(code, PAGE, PROT_READ | PROT_EXEC) == 0);
        fold(((function)code)());
    }
    munmap(code, PAGE);
}

// Other memory at the same address.
static void remapping(void) {
    uint8_t *place = pages(1, PROT_NONE, -1);
    for (uint32_t value = 0; value < 40; value++) {
        uint8_t *code = mmap(place, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                             -1, 0);
        CHECK(code == place);
        emit(code, value * 17 + 3);
        fold(((function)code)());
    }
    munmap(place, PAGE);
}

// String instructions and vector stores over code.
static void bulk_stores(void) {
    uint8_t *code = pages(4, PROT_READ | PROT_WRITE | PROT_EXEC, -1);
    uint8_t *source = pages(4, PROT_READ | PROT_WRITE, -1);
    for (uint32_t round = 0; round < 20; round++) {
        for (int at = 0; at + 16 <= 4 * PAGE; at += 16) {
            emit(source + at, round * 4096 + at);
        }
        if (round % 2) {
            void *to = code, *from = source;
            size_t count = 4 * PAGE;
            __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
        } else {
            memcpy(code, source, 4 * PAGE);
        }
        for (int at = 0; at + 16 <= 4 * PAGE; at += 1008) {
            fold(((function)(code + at))());
        }
    }
    munmap(code, 4 * PAGE);
    munmap(source, 4 * PAGE);
}

int main(void) {
    patched_operands();
    next_instruction();
    own_loop();
    aliases();
    protections();
    remapping();
    bulk_stores();
    return result("selfmod");
}
