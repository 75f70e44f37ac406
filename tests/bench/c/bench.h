// The C program of the benchmark: lines of work with checkable results.
//
// Each line is a function that takes its length, so that the same work can be made longer: `c-alu-x4` is `c-alu` with
// four times the length. Results depend on the work and its length alone and must be equal everywhere.
#ifndef BENCH_H
#define BENCH_H

#include <stdint.h>

// Calls that must stay calls.
#define NOINLINE __attribute__((noinline, noipa))

// integer.c: general-purpose registers, memory, branches.
uint64_t alu(unsigned length);
uint64_t chase(unsigned length);
uint64_t calls(unsigned length);
uint64_t interpreter(unsigned length);
uint64_t sorting(unsigned length);
uint64_t sieve(unsigned length);

// vector.c: floating point, vectors, string instructions.
uint64_t nbody(unsigned length);
uint64_t sse_float(unsigned length);
uint64_t sse_int(unsigned length);
uint64_t avx2(unsigned length);
uint64_t rep_movsb(unsigned length);

// kernel.c: what the operating system does for a program.
uint64_t system_calls(unsigned length);
uint64_t page_faults(unsigned length);
uint64_t fork_exec(unsigned length);
uint64_t switches(unsigned length);
uint64_t pipes(unsigned length);
uint64_t spinning(unsigned length);

// What `fork_exec` runs: this program's path, with this as its only argument.
extern const char *program_path;
#define EXIT_AT_ONCE "--exit-at-once"
#define EXIT_CODE 7

// xorshift64*: the same numbers everywhere.
static inline uint64_t next(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545f4914f6cdd1d;
}

// Folds a value into a result.
static inline uint64_t mix(uint64_t result, uint64_t value)
{
    return (result ^ value) * 0x100000001b3;
}

// Memory, or the end of the program.
void *allocate(uint64_t bytes);
// Ends the program with a message if a system call has failed.
void check(int fine, const char *call);

#endif
