// What every guest needs: a checksum, a way to say the result, a way to fail.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t checksum = 0xcbf29ce484222325;

// Folds a value into the checksum.
static inline void fold(uint64_t value) { checksum = (checksum ^ value) * 0x100000001b3; }

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            printf("FAILED at %s:%d: %s\n", __FILE_NAME__, __LINE__, #condition);         \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

// Prints the line that must be the same on every machine that executes correctly.
static inline int result(const char *name) {
    printf("%s: %016llx\n", name, (unsigned long long)checksum);
    return 0;
}
