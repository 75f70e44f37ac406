// Floating point where the architecture fixes every bit: rounding modes, denormals, NaNs, conversions, exceptions.
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <string.h>

#include "check.h"

static uint64_t bits(double value) {
    uint64_t word;
    memcpy(&word, &value, 8);
    return word;
}

static void fold_extended(long double value) {
    uint64_t words[2] = {0, 0};
    memcpy(words, &value, 10);
    fold(words[0]);
    fold(words[1]);
}

static double values[] = {0.0, -0.0, 1.0, -1.5, 1e-310, -4.9e-324, 1e308, -1e308, 3.0, 1.0 / 3, 2147483647.5,
                          -2147483648.5, 9.3e18, 1e19, INFINITY, -INFINITY, NAN, 0.1, 123456789.123};

__attribute__((noinline)) static void pairs(void) {
    int count = sizeof values / sizeof *values;
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < count; j++) {
            volatile double a = values[i], b = values[j];
            volatile float c = (float)a, d = (float)b;
            volatile long double e = a, f = b;
            fold(bits(a + b));
            fold(bits(a - b));
            fold(bits(a * b));
            fold(bits(a / b));
            fold(bits((double)(c * d)));
            fold(bits((double)(c / d)));
            fold_extended(e * f);
            fold_extended(e / f);
            fold_extended(e - f);
            fold((a < b) | (a == b) << 1 | (a > b) << 2 | (c <= d) << 3 | (e >= f) << 4);
            double least = a, most = a;
            __asm__("minsd %1, %0" : "+x"(least) : "x"(b));
            __asm__("maxsd %1, %0" : "+x"(most) : "x"(b));
            fold(bits(least));
            fold(bits(most));
        }
    }
}

__attribute__((noinline)) static void singles(void) {
    for (unsigned i = 0; i < sizeof values / sizeof *values; i++) {
        double a = values[i];
        double root = a;
        __asm__("sqrtsd %0, %0" : "+x"(root));
        fold(bits(root));
        int32_t narrow, truncated;
        int64_t wide;
        __asm__("cvtsd2si %1, %0" : "=r"(narrow) : "x"(a));
        __asm__("cvttsd2si %1, %0" : "=r"(truncated) : "x"(a));
        __asm__("cvtsd2si %1, %0" : "=r"(wide) : "x"(a));
        fold((uint32_t)narrow);
        fold((uint32_t)truncated);
        fold(wide);
        long double extended = a;
        int64_t stored;
        __asm__("fistpll %0" : "=m"(stored) : "t"(extended) : "st");
        fold(stored);
        long double rounded = a;
        __asm__("frndint" : "+t"(rounded));
        fold_extended(rounded);
        __asm__("fsqrt" : "+t"(extended));
        fold_extended(extended);
        unsigned short status;
        long double examined = a;
        __asm__("fxam\n\tfnstsw %0" : "=a"(status) : "t"(examined));
        fold(status & 0x4500);
    }
}

int main(void) {
    static const int modes[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
    for (int i = 0; i < 4; i++) {
        CHECK(fesetround(modes[i]) == 0);
        feclearexcept(FE_ALL_EXCEPT);
        pairs();
        singles();
        fold(fetestexcept(FE_ALL_EXCEPT));
    }
    return result("floats");
}
