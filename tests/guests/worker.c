/* Works for more than ten billion instructions, as programs do: sorts, fills a hash table, sends bytes through a pipe,
 * computes. After each stage it says so, and writes `stage`, which nothing else does. For measuring how long it takes
 * to go to a moment of a long run, and back from there. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STAGES = 10, ROUNDS = 34, NUMBERS = 1 << 15, SLOTS = 1 << 20, BODIES = 1 << 14, BYTES = 1 << 16 };

volatile uint64_t stage;

static uint64_t state = 88172645463325252u;
static uint64_t numbers[NUMBERS], slots[SLOTS];
static double bodies[BODIES];
static char sent[BYTES], received[BYTES];

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static int compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static uint64_t round_of_work(int in, int out) {
    for (int i = 0; i < NUMBERS; i++)
        numbers[i] = next();
    qsort(numbers, NUMBERS, sizeof(numbers[0]), compare);
    uint64_t sum = 0;
    for (int i = 0; i < NUMBERS * 8; i++) {
        uint64_t value = numbers[i % NUMBERS] * 0x9E3779B97F4A7C15u + (uint64_t)i, at = value >> 44;
        for (int probes = 0; probes < 4 && slots[at] != 0 && slots[at] != value; probes++)
            at = (at + 1) % SLOTS;
        slots[at] = value;
        sum += at;
    }
    for (int pass = 0; pass < 20; pass++)
        for (int i = 1; i < BODIES; i++)
            bodies[i] = bodies[i] * 0.5 + bodies[i - 1] * 0.25 + (double)(i ^ pass);
    for (int i = 0; i < 16; i++) {
        memset(sent, (int)sum + i, BYTES);
        if (write(out, sent, BYTES) != BYTES)
            abort();
        for (ssize_t got = 0, n; got < BYTES; got += n)
            if ((n = read(in, received + got, (size_t)(BYTES - got))) <= 0)
                abort();
        sum += (uint64_t)(unsigned char)received[i * 7];
    }
    return sum + (uint64_t)bodies[BODIES - 1];
}

int main(void) {
    int ends[2];
    if (pipe(ends) != 0)
        return 1;
    for (uint64_t sum = 0; stage < STAGES; stage = stage + 1) {
        for (int i = 0; i < ROUNDS; i++)
            sum += round_of_work(ends[0], ends[1]);
        printf("stage %llu %llu\n", (unsigned long long)stage, (unsigned long long)sum);
        fflush(stdout);
    }
    return 0;
}
