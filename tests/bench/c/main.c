// Runs lines one after the other and says on standard output when each begins and ends. It measures nothing itself: a
// guest's clock shows virtual time, so whoever reads the markers keeps the time.
//
//     @@ start               the program is running
//     @@ begin c-alu         the line's work starts
//     @@ end c-alu RESULT    it is done
//     @@ done                all lines are done
//
// Arguments are the names of the lines to run, each with an optional factor for its length (`c-alu-x4`); without any,
// all are run.
#include "bench.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct line {
    const char *name;
    uint64_t (*work)(unsigned length);
};

static const struct line lines[] = {
    {"c-alu", alu},
    {"c-chase", chase},
    {"c-calls", calls},
    {"c-interp", interpreter},
    {"c-qsort", sorting},
    {"c-sieve", sieve},
    {"c-nbody", nbody},
    {"c-sse-float", sse_float},
    {"c-sse-int", sse_int},
    {"c-avx2", avx2},
    {"c-repmovsb", rep_movsb},
    {"c-syscall", system_calls},
    {"c-fault", page_faults},
    {"c-exec", fork_exec},
    {"c-switch", switches},
    {"c-pipe", pipes},
    {"c-spin", spinning},
};

const char *program_path;

void *allocate(uint64_t bytes)
{
    void *memory = malloc(bytes);
    check(memory != NULL, "malloc");
    return memory;
}

void check(int fine, const char *call)
{
    if (!fine) {
        perror(call);
        exit(1);
    }
}

// The line that `name` means, and how many times its length.
static const struct line *find(const char *name, unsigned *factor)
{
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        size_t length = strlen(lines[i].name);
        if (strncmp(name, lines[i].name, length) != 0)
            continue;
        *factor = 1;
        if (name[length] == 0)
            return &lines[i];
        char *end;
        if (strncmp(name + length, "-x", 2) == 0) {
            unsigned long value = strtoul(name + length + 2, &end, 10);
            *factor = (unsigned)value;
            if (*end == 0 && value >= 1 && value <= 1000)
                return &lines[i];
        }
    }
    return NULL;
}

static void run(const char *name, const struct line *line, unsigned factor)
{
    printf("@@ begin %s\n", name);
    fflush(stdout);
    uint64_t result = line->work(factor);
    printf("@@ end %s %016" PRIx64 "\n", name, result);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    program_path = argv[0];
    if (argc == 2 && strcmp(argv[1], EXIT_AT_ONCE) == 0)
        return EXIT_CODE;
    unsigned factor;
    for (int i = 1; i < argc; i++) {
        if (!find(argv[i], &factor)) {
            fprintf(stderr, "bench: there is no line %s\n", argv[i]);
            return 2;
        }
    }
    printf("@@ start\n");
    fflush(stdout);
    if (argc == 1)
        for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++)
            run(lines[i].name, &lines[i], 1);
    for (int i = 1; i < argc; i++) {
        const struct line *line = find(argv[i], &factor);
        run(argv[i], line, factor);
    }
    printf("@@ done\n");
    return 0;
}
