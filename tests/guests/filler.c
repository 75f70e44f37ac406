/* Fills most of memory, says so, and from then on writes a page here and there for ever: about one page in two
 * thousand instructions. For measuring what a branch of a large guest costs. */

#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), RESERVE = 40 << 20, SPIN = 282 };

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

int main(void) {
    struct sysinfo info;
    if (sysinfo(&info) != 0 || info.freeram < 2 * (uint64_t)RESERVE) {
        puts("too little memory");
        return 1;
    }
    /* The kernel keeps the more for itself the more there is. */
    uint64_t pages = (info.freeram - RESERVE - info.freeram / 24) / PAGE;
    volatile uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        puts("no memory");
        return 1;
    }
    uint64_t state = 88172645463325252u;
    for (uint64_t page = 0; page < pages; page++)
        for (uint64_t word = 0; word < WORDS; word += WORDS / 4)
            memory[page * WORDS + word] = next(&state);
    printf("filled %llu MiB\n", (unsigned long long)(pages * PAGE >> 20));
    fflush(stdout);
    for (uint64_t sum = 0;;) {
        for (int i = 0; i < SPIN; i++)
            sum = (sum ^ (sum >> 29)) * 0x9E3779B97F4A7C15u + (uint64_t)i;
        uint64_t at = next(&state) % pages * WORDS;
        memory[at] += sum;
    }
}
