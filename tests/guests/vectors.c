// Vector and x87 state across preemption and signals: threads compute in registers while others clobber them.
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>

#include "check.h"

enum { THREADS = 4, ROUNDS = 1500000 };

static volatile sig_atomic_t ticks;

// Clobbers every vector register and the x87 stack; the kernel must put them back.
__attribute__((target("avx2"))) static void on_tick(int number) {
    (void)number;
    ticks++;
    __asm__ volatile("vzeroall\n\tfninit\n\tfldpi\n\tfldpi" ::: "memory");
}

// A long dependence chain that lives in registers: integer and floating-point lanes, fused multiply-add, x87.
__attribute__((target("avx2,fma"))) static void *compute(void *argument) {
    uint64_t seed = (uintptr_t)argument;
    __m256i whole = _mm256_set_epi64x(seed, seed * 3, seed * 5, seed * 7);
    __m256d parts = _mm256_set_pd(0.1, 0.2, 0.3, 0.4 + seed);
    const __m256i odd = _mm256_set1_epi32((int)0x9e3779b1u);
    const __m256d almost = _mm256_set1_pd(0.999), small = _mm256_set1_pd(0.001);
    long double extended = 1.0L + seed;
    for (int i = 0; i < ROUNDS; i++) {
        whole = _mm256_add_epi64(_mm256_mullo_epi32(whole, odd), _mm256_srli_epi64(whole, 7));
        whole = _mm256_permute4x64_epi64(whole, 0x39);
        parts = _mm256_fmadd_pd(parts, almost, small);
        parts = _mm256_permute4x64_pd(parts, 0x93);
        extended = extended * 0.9999L + 0.25L / (i + 1);
    }
    uint64_t *out = calloc(16, 8);
    _mm256_storeu_si256((__m256i *)out, whole);
    _mm256_storeu_pd((double *)(out + 4), parts);
    memcpy(out + 8, &extended, 10);
    return out;
}

int main(void) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        puts("vectors: this CPU has no AVX2");
        return 2;
    }
    struct sigaction action = {.sa_handler = on_tick, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    struct itimerval every = {{0, 1000}, {0, 1000}};
    CHECK(setitimer(ITIMER_REAL, &every, NULL) == 0);
    pthread_t threads[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++) CHECK(pthread_create(&threads[i], NULL, compute, (void *)(i + 1)) == 0);
    for (int i = 0; i < THREADS; i++) {
        void *out;
        CHECK(pthread_join(threads[i], &out) == 0);
        for (int word = 0; word < 10; word++) fold(((uint64_t *)out)[word]);
    }
    CHECK(ticks > 0);
    return result("vectors");
}
