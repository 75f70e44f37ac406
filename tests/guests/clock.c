// Time: it never goes back, sleeping takes as long as it should, and its sources agree.
#define _GNU_SOURCE
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "check.h"

static uint64_t now_ns(clockid_t clock) {
    struct timespec time;
    CHECK(clock_gettime(clock, &time) == 0);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

int main(void) {
    uint64_t last_tsc = __rdtsc(), last_ns = now_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < 200000; i++) {
        uint64_t tsc = __rdtsc(), ns = now_ns(CLOCK_MONOTONIC);
        CHECK(tsc >= last_tsc && ns >= last_ns);
        last_tsc = tsc;
        last_ns = ns;
    }
    for (int i = 1; i <= 5; i++) {
        uint64_t before = now_ns(CLOCK_MONOTONIC), before_real = now_ns(CLOCK_REALTIME);
        struct timespec pause = {0, i * 7000000};
        CHECK(nanosleep(&pause, NULL) == 0);
        uint64_t slept = now_ns(CLOCK_MONOTONIC) - before, slept_real = now_ns(CLOCK_REALTIME) - before_real;
        CHECK(slept >= i * 7000000ull && slept < 5000000000ull);
        CHECK(slept_real >= slept / 2 && slept_real < slept * 2 + 100000000);
        fold(i);
    }
    // CPU time passes with work.
    uint64_t cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    for (volatile int i = 0; i < 30000000; i++) {}
    CHECK(now_ns(CLOCK_PROCESS_CPUTIME_ID) > cpu);
    return result("clock");
}
