// Address spaces: mapping, unmapping, protecting, copying on write, forking and executing.
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { PAGE = 4096 };

static uint64_t random_state = 41;

static uint64_t next(void) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545f4914f6cdd1d;
}

static uint64_t *map(size_t page_count, int flags) {
    void *memory = mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

static uint64_t sum(const uint64_t *words, size_t count) {
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++) total = total * 31 + words[i];
    return total;
}

// Many mappings that come, grow, move and go.
static void mappings(void) {
    enum { SLOTS = 64 };
    uint64_t *slot[SLOTS] = {0};
    size_t size[SLOTS] = {0};
    for (int round = 0; round < 3000; round++) {
        int i = next() % SLOTS;
        if (!slot[i]) {
            size[i] = 1 + next() % 32;
            slot[i] = map(size[i], MAP_PRIVATE);
            for (size_t page = 0; page < size[i]; page++) slot[i][page * PAGE / 8] = round + page;
        } else if (next() % 3 == 0) {
            fold(sum(slot[i], size[i] * PAGE / 8));
            CHECK(munmap(slot[i], size[i] * PAGE) == 0);
            slot[i] = NULL;
        } else if (next() % 2) {
            size_t bigger = 1 + next() % 48;
            slot[i] = mremap(slot[i], size[i] * PAGE, bigger * PAGE, MREMAP_MAYMOVE);
            CHECK(slot[i] != MAP_FAILED);
            size[i] = bigger;
        } else {
            CHECK(madvise(slot[i], PAGE, MADV_DONTNEED) == 0);
            CHECK(slot[i][0] == 0);
        }
    }
}

// A child's writes stay its own in private memory and are seen in shared memory.
static void forks(void) {
    enum { WORDS = 64 * PAGE / 8 };
    uint64_t *private = map(64, MAP_PRIVATE), *shared = map(64, MAP_SHARED);
    for (int i = 0; i < WORDS; i++) private[i] = i;
    for (int round = 0; round < 40; round++) {
        int pipes[2];
        CHECK(pipe(pipes) == 0);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            for (int i = round; i < WORDS; i += 97) {
                private[i] ^= round;
                shared[i] += private[i];
            }
            uint64_t total = sum(private, WORDS);
            _exit(write(pipes[1], &total, sizeof total) != sizeof total);
        }
        uint64_t total = 0;
        int status = 1;
        CHECK(read(pipes[0], &total, sizeof total) == sizeof total);
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        close(pipes[0]);
        close(pipes[1]);
        fold(total);
        fold(sum(shared, WORDS));
        for (int i = 0; i < WORDS; i += 1021) CHECK(private[i] == (uint64_t)i);
    }
}

// The program executes itself; the child answers by its exit code.
static void executions(const char *self) {
    for (int round = 0; round < 12; round++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            char number[16];
            snprintf(number, sizeof number, "%d", round);
            char *argv[] = {"memory", number, NULL}, *envp[] = {"GUEST=1", NULL};
            execve(self, argv, envp);
            _exit(99);
        }
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
        CHECK(WEXITSTATUS(status) == round * 7 % 50);
        fold(status);
    }
}

int main(int argc, char **argv) {
    if (argc == 2) {
        return getenv("GUEST") ? atoi(argv[1]) * 7 % 50 : 98;
    }
    mappings();
    forks();
    executions("/proc/self/exe");
    return result("memory");
}
