// Lines that compute with integers: registers, loads and stores, branches, calls.
#include "bench.h"

#include <stdlib.h>
#include <string.h>

// Arithmetic and logic in registers, without memory: shifts, rotations, products, sums, a comparison.
uint64_t alu(unsigned length)
{
    uint64_t a = 1, b = 2, c = 3, d = 4;
    uint64_t rounds = 130000000ull * length;
    for (uint64_t i = 0; i < rounds; i++) {
        a += b ^ (c >> 7);
        b = (b << 13 | b >> 51) - d;
        c = (c & ~a) + (b | i);
        d ^= c * 9 + (a < b);
    }
    return mix(mix(mix(mix(0, a), b), c), d);
}

// Loads that wait for each other: one cycle through all nodes in random order, each in a cache line of its own.
uint64_t chase(unsigned length)
{
    struct node {
        struct node *next;
        uint64_t value;
        char padding[48];
    };
    const unsigned count = 1 << 16;
    struct node *nodes = allocate(count * sizeof(struct node));
    unsigned *order = allocate(count * sizeof(unsigned));
    uint64_t state = 23;
    for (unsigned i = 0; i < count; i++)
        order[i] = i;
    for (unsigned i = count - 1; i > 0; i--) {
        unsigned k = next(&state) % (i + 1), other = order[k];
        order[k] = order[i];
        order[i] = other;
    }
    for (unsigned i = 0; i < count; i++) {
        nodes[order[i]].next = &nodes[order[(i + 1) % count]];
        nodes[order[i]].value = next(&state);
    }
    uint64_t steps = 25000000ull * length, result = 0;
    for (struct node *node = nodes; steps > 0; steps--, node = node->next)
        result += node->value ^ steps;
    free(order);
    free(nodes);
    return result;
}

// Hofstadter's female and male sequences: each calls the other, twice, and nothing can be a jump.
static NOINLINE unsigned male(unsigned n);

static NOINLINE unsigned female(unsigned n)
{
    return n == 0 ? 1 : n - male(female(n - 1));
}

static NOINLINE unsigned male(unsigned n)
{
    return n == 0 ? 0 : n - female(male(n - 1));
}

uint64_t calls(unsigned length)
{
    uint64_t result = 0;
    for (unsigned i = 0; i < 10 * length; i++)
        result = mix(result, female(130 + i % 8));
    return result;
}

// A virtual machine with registers and threaded code: one indirect jump for each of its instructions.
enum op { SET, ADD, ADD_CONSTANT, TRIPLE, HALVE, JUMP_ODD, JUMP_NOT_ONE, JUMP_LESS, JUMP, END };

struct instruction {
    unsigned char op, a, b;
    int operand;
};

// Sums the lengths of the Collatz sequences of 1 to register 3.
static const struct instruction collatz[] = {
    {SET, 0, 0, 0},           // r0: sum
    {SET, 1, 0, 1},           // r1: start
    {SET, 2, 0, 0},           // 2: r2 = r1
    {ADD, 2, 1, 0},           //
    {JUMP_ODD, 2, 0, 7},      // 4: odd?
    {HALVE, 2, 0, 0},         //
    {JUMP, 0, 0, 9},          //
    {TRIPLE, 2, 0, 0},        // 7: r2 = 3 r2 + 1
    {ADD_CONSTANT, 2, 0, 1},  //
    {ADD_CONSTANT, 0, 0, 1},  // 9: one step more
    {JUMP_NOT_ONE, 2, 0, 4},  //
    {ADD_CONSTANT, 1, 0, 1},  //
    {JUMP_LESS, 1, 3, 2},     //
    {END, 0, 0, 0},
};

uint64_t interpreter(unsigned length)
{
    static const void *const places[] = {
        [SET] = &&set,
        [ADD] = &&add,
        [ADD_CONSTANT] = &&add_constant,
        [TRIPLE] = &&triple,
        [HALVE] = &&halve,
        [JUMP_ODD] = &&jump_odd,
        [JUMP_NOT_ONE] = &&jump_not_one,
        [JUMP_LESS] = &&jump_less,
        [JUMP] = &&jump,
        [END] = &&end,
    };
    uint64_t registers[4] = {0, 0, 0, 220000ull * length};
    const struct instruction *at = collatz;
#define NEXT goto *places[at->op]
#define GO_IF(condition) at = (condition) ? collatz + at->operand : at + 1; NEXT
    NEXT;
set:
    registers[at->a] = at->operand;
    at++;
    NEXT;
add:
    registers[at->a] += registers[at->b];
    at++;
    NEXT;
add_constant:
    registers[at->a] += at->operand;
    at++;
    NEXT;
triple:
    registers[at->a] *= 3;
    at++;
    NEXT;
halve:
    registers[at->a] >>= 1;
    at++;
    NEXT;
jump_odd:
    GO_IF(registers[at->a] & 1);
jump_not_one:
    GO_IF(registers[at->a] != 1);
jump_less:
    GO_IF(registers[at->a] < registers[at->b]);
jump:
    at = collatz + at->operand;
    NEXT;
end:
    return registers[0];
#undef GO_IF
#undef NEXT
}

static int compare(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

// The C library's qsort: calls through a pointer, and branches that no predictor knows.
uint64_t sorting(unsigned length)
{
    const unsigned count = 300000;
    uint64_t *numbers = allocate(count * sizeof(uint64_t));
    uint64_t state = 29, result = 0;
    for (unsigned round = 0; round < 10 * length; round++) {
        for (unsigned i = 0; i < count; i++)
            numbers[i] = next(&state);
        qsort(numbers, count, sizeof(uint64_t), compare);
        for (unsigned i = 0; i < count; i += 1000)
            result = mix(result, numbers[i]);
    }
    free(numbers);
    return result;
}

// Eratosthenes: stores of single bytes at growing distances.
uint64_t sieve(unsigned length)
{
    const unsigned limit = 1 << 20;
    unsigned char *composite = allocate(limit);
    uint64_t result = 0;
    for (unsigned round = 0; round < 150 * length; round++) {
        unsigned count = 0;
        memset(composite, 0, limit);
        for (unsigned i = 2; i < limit; i++) {
            if (composite[i])
                continue;
            count++;
            for (uint64_t k = (uint64_t)i * i; k < limit; k += i)
                composite[k] = 1;
        }
        result = mix(result, count);
    }
    free(composite);
    return result;
}
