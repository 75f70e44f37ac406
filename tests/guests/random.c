// Random numbers from every source a guest has. All of them must come from the seed.
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/random.h>

static void show(const char *source, uint64_t value) {
    printf("random: %s %016llx\n", source, (unsigned long long)value);
}

int main(void) {
    unsigned long long value = 0;
    uint64_t word = 0;
    if (getrandom(&word, sizeof word, 0) != sizeof word) return 1;
    show("getrandom", word);
    memcpy(&word, (void *)getauxval(AT_RANDOM), 8);
    show("auxiliary vector", word);
    int ok = 0;
    for (int i = 0; i < 100 && !ok; i++) __asm__ volatile("rdrand %0\n\tsetc %b1" : "=r"(value), "=q"(ok) : : "cc");
    if (!ok) return 2;
    show("rdrand", value);
    ok = 0;
    for (int i = 0; i < 100 && !ok; i++) __asm__ volatile("rdseed %0\n\tsetc %b1" : "=r"(value), "=q"(ok) : : "cc");
    if (!ok) return 3;
    show("rdseed", value);
    // Where the kernel puts things is random as well.
    int local;
    show("stack", (uintptr_t)&local);
    return 0;
}
