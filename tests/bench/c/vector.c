// Lines that compute with floating point and vectors, and the string instruction that copies.
#include "bench.h"

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

// Five bodies under gravity: scalar double precision with square roots and divisions.
uint64_t nbody(unsigned length)
{
    struct body {
        double position[3], velocity[3], mass;
    } bodies[5];
    uint64_t state = 3, result = 0;
    for (int i = 0; i < 5; i++) {
        for (int k = 0; k < 3; k++) {
            bodies[i].position[k] = 10.0 * ((double)(next(&state) >> 11) / 9007199254740992.0 - 0.5);
            bodies[i].velocity[k] = (double)(next(&state) >> 11) / 9007199254740992.0 - 0.5;
        }
        bodies[i].mass = 1.0 + (double)(next(&state) >> 40) / 16777216.0;
    }
    const double step = 1.0 / 1024;
    for (uint64_t round = 0; round < 2600000ull * length; round++) {
        for (int i = 0; i < 5; i++) {
            for (int j = i + 1; j < 5; j++) {
                struct body *a = &bodies[i], *b = &bodies[j];
                double dx = a->position[0] - b->position[0];
                double dy = a->position[1] - b->position[1];
                double dz = a->position[2] - b->position[2];
                // Softened, so that close encounters stay finite.
                double square = dx * dx + dy * dy + dz * dz + 0.01;
                double pull = step / (square * sqrt(square));
                a->velocity[0] -= dx * b->mass * pull;
                a->velocity[1] -= dy * b->mass * pull;
                a->velocity[2] -= dz * b->mass * pull;
                b->velocity[0] += dx * a->mass * pull;
                b->velocity[1] += dy * a->mass * pull;
                b->velocity[2] += dz * a->mass * pull;
            }
        }
        for (int i = 0; i < 5; i++)
            for (int k = 0; k < 3; k++)
                bodies[i].position[k] += step * bodies[i].velocity[k];
    }
    for (int i = 0; i < 5; i++) {
        for (int k = 0; k < 3; k++) {
            uint64_t bits;
            memcpy(&bits, &bodies[i].position[k], sizeof bits);
            result = mix(result, bits);
        }
    }
    return result;
}

#define FLOATS 4096

// Arrays in the first-level cache, aligned for every vector.
static float left[FLOATS] __attribute__((aligned(64)));
static float right[FLOATS] __attribute__((aligned(64)));
static uint8_t bytes[4 * FLOATS] __attribute__((aligned(64)));

static void fill(void)
{
    uint64_t state = 31;
    for (int i = 0; i < FLOATS; i++) {
        left[i] = (float)(next(&state) >> 40) / 16777216.0f;
        right[i] = (float)(next(&state) >> 40) / 16777216.0f - 0.5f;
    }
    for (int i = 0; i < 4 * FLOATS; i++)
        bytes[i] = next(&state) >> 56;
}

// The result of arrays that a line has changed.
static uint64_t digest(const void *memory, unsigned size)
{
    uint64_t result = 0, word;
    for (unsigned i = 0; i < size; i += sizeof word) {
        memcpy(&word, (const char *)memory + i, sizeof word);
        result = mix(result, word);
    }
    return result;
}

// Four floats at a time: products, sums, square roots, comparisons, shuffles.
uint64_t sse_float(unsigned length)
{
    fill();
    for (unsigned round = 0; round < 60000 * length; round++) {
        __m128 decay = _mm_set1_ps(0.999f), carry = _mm_set1_ps(0.25f);
        for (int i = 0; i < FLOATS; i += 4) {
            __m128 a = _mm_load_ps(left + i), b = _mm_load_ps(right + i);
            __m128 c = _mm_add_ps(_mm_mul_ps(a, decay), _mm_mul_ps(b, carry));
            c = _mm_max_ps(_mm_min_ps(c, _mm_set1_ps(4.0f)), _mm_set1_ps(-4.0f));
            carry = _mm_mul_ps(_mm_shuffle_ps(a, c, _MM_SHUFFLE(0, 2, 1, 3)), _mm_set1_ps(0.125f));
            _mm_store_ps(left + i, c);
        }
    }
    return digest(left, sizeof left);
}

// Sixteen bytes or four numbers at a time: sums, products, differences, packing and unpacking.
uint64_t sse_int(unsigned length)
{
    fill();
    __m128i total = _mm_setzero_si128();
    for (unsigned round = 0; round < 200000 * length; round++) {
        __m128i before = _mm_set1_epi8((char)round);
        for (int i = 0; i < 4 * FLOATS; i += 16) {
            __m128i a = _mm_load_si128((const __m128i *)(bytes + i));
            __m128i low = _mm_unpacklo_epi8(a, _mm_setzero_si128());
            __m128i high = _mm_unpackhi_epi8(a, _mm_setzero_si128());
            __m128i product = _mm_madd_epi16(low, high);
            __m128i average = _mm_avg_epu8(a, before);
            total = _mm_add_epi32(total, product);
            total = _mm_xor_si128(total, _mm_sad_epu8(a, average));
            before = _mm_packus_epi16(_mm_srli_epi16(low, 1), _mm_adds_epu16(high, low));
            _mm_store_si128((__m128i *)(bytes + i), _mm_add_epi8(average, _mm_slli_epi16(before, 3)));
        }
    }
    return mix(digest(&total, sizeof total), digest(bytes, sizeof bytes));
}

// Eight floats or thirty-two bytes at a time: fused products, permutations, gathers left out, variable shifts.
__attribute__((target("avx2,fma"))) uint64_t avx2(unsigned length)
{
    fill();
    __m256i total = _mm256_setzero_si256();
    for (unsigned round = 0; round < 60000 * length; round++) {
        __m256 decay = _mm256_set1_ps(0.999f), carry = _mm256_set1_ps(0.25f);
        for (int i = 0; i < FLOATS; i += 8) {
            __m256 a = _mm256_load_ps(left + i), b = _mm256_load_ps(right + i);
            __m256 c = _mm256_fmadd_ps(a, decay, _mm256_mul_ps(b, carry));
            carry = _mm256_mul_ps(_mm256_permute2f128_ps(a, c, 0x21), _mm256_set1_ps(0.125f));
            _mm256_store_ps(left + i, c);
            __m256i words = _mm256_load_si256((const __m256i *)(bytes + 4 * i));
            words = _mm256_shuffle_epi8(words, _mm256_set1_epi64x(0x0001020304050607));
            total = _mm256_add_epi32(total, _mm256_sllv_epi32(words, _mm256_srli_epi32(words, 28)));
        }
    }
    return mix(digest(&total, sizeof total), digest(left, sizeof left));
}

static void copy(void *to, const void *from, uint64_t count)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

// Copies with REP MOVSB, as the kernel and the C library do: short ones, pages, and blocks across many pages.
uint64_t rep_movsb(unsigned length)
{
    const unsigned size = 1 << 18;
    unsigned char *from = allocate(size), *to = allocate(size);
    uint64_t state = 37, result = 0;
    for (unsigned i = 0; i < size; i++)
        from[i] = next(&state) >> 56;
    memset(to, 0, size);
    for (unsigned round = 0; round < 2400 * length; round++) {
        for (unsigned i = 0; i < 2048; i++) {
            uint64_t at = next(&state);
            copy(to + at % (size - 128), from + (at >> 32) % (size - 128), 16 + i % 112);
        }
        for (unsigned i = 0; i < 64; i++) {
            uint64_t at = next(&state);
            copy(to + at % (size - 4096), from + (at >> 32) % (size - 4096), 4096);
        }
        copy(to, from + round % 64, size - 64);
        from[next(&state) % size]++;
        result = mix(result, to[next(&state) % size]);
    }
    result = mix(result, digest(to, size));
    free(from);
    free(to);
    return result;
}
