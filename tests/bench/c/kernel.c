// Lines in which the operating system works: system calls, page faults, processes, threads.
#include "bench.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

// System calls that do nothing.
uint64_t system_calls(unsigned length)
{
    uint64_t calls = 2000000ull * length, right = 0;
    long parent = syscall(SYS_getppid);
    for (uint64_t i = 0; i < calls; i++)
        right += syscall(SYS_getppid) == parent;
    return right;
}

// Fresh pages: mapped, touched one by one, given back.
uint64_t page_faults(unsigned length)
{
    const unsigned pages = 64;
    uint64_t result = 0;
    for (unsigned round = 0; round < 2000 * length; round++) {
        unsigned char *memory =
            mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(memory != MAP_FAILED, "mmap");
        for (unsigned i = 0; i < pages; i++) {
            result += memory[i * 4096]; // zero
            memory[i * 4096 + 1] = (unsigned char)round;
            result += memory[i * 4096 + 1];
        }
        check(munmap(memory, pages * 4096) == 0, "munmap");
    }
    return result;
}

// Processes: each is forked, becomes this program again, and ends.
uint64_t fork_exec(unsigned length)
{
    uint64_t result = 0;
    for (unsigned i = 0; i < 200 * length; i++) {
        pid_t child = fork();
        check(child >= 0, "fork");
        if (child == 0) {
            execl(program_path, program_path, EXIT_AT_ONCE, (char *)NULL);
            _exit(1);
        }
        int status;
        check(waitpid(child, &status, 0) == child, "waitpid");
        result = mix(result, WIFEXITED(status) ? WEXITSTATUS(status) : 255);
    }
    return result;
}

// Whose turn it is, in a word that both threads see.
struct table {
    _Atomic uint32_t turn;
    uint64_t rounds;
    uint64_t result;
    void (*wait)(_Atomic uint32_t *turn, uint32_t not);
    void (*wake)(_Atomic uint32_t *turn);
};

static void play(struct table *table, uint32_t side)
{
    for (uint64_t i = 0; i < table->rounds; i++) {
        while (atomic_load(&table->turn) != side)
            table->wait(&table->turn, 1 - side);
        table->result = mix(table->result, 2 * i + side);
        atomic_store(&table->turn, 1 - side);
        table->wake(&table->turn);
    }
}

static void *other_side(void *table)
{
    play(table, 1);
    return NULL;
}

// Two threads that take turns.
static uint64_t take_turns(struct table *table)
{
    pthread_t thread;
    check(pthread_create(&thread, NULL, other_side, table) == 0, "pthread_create");
    play(table, 0);
    check(pthread_join(thread, NULL) == 0, "pthread_join");
    return table->result;
}

static void sleep_until(_Atomic uint32_t *turn, uint32_t not)
{
    syscall(SYS_futex, turn, FUTEX_WAIT_PRIVATE, not, NULL, NULL, 0);
}

static void wake_other(_Atomic uint32_t *turn)
{
    syscall(SYS_futex, turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

// Context switches: threads that sleep until it is their turn.
uint64_t switches(unsigned length)
{
    struct table table = {.rounds = 60000ull * length, .wait = sleep_until, .wake = wake_other};
    return take_turns(&table);
}

// As mutexes spin: a while in hope, then after the others.
static void spin_until(_Atomic uint32_t *turn, uint32_t not)
{
    for (int i = 0; i < 200; i++) {
        if (atomic_load_explicit(turn, memory_order_relaxed) != not)
            return;
        __builtin_ia32_pause();
    }
    sched_yield();
}

static void wake_nobody(_Atomic uint32_t *turn)
{
    (void)turn;
}

// Spinning threads: on one CPU, waiting in a loop is only ever in vain.
uint64_t spinning(unsigned length)
{
    struct table table = {.rounds = 40000ull * length, .wait = spin_until, .wake = wake_nobody};
    return take_turns(&table);
}

// Two processes that pass a number to and fro.
uint64_t pipes(unsigned length)
{
    int there[2], back[2];
    check(pipe(there) == 0 && pipe(back) == 0, "pipe");
    pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
        close(there[1]);
        close(back[0]);
        uint64_t number;
        while (read(there[0], &number, sizeof number) == sizeof number) {
            number = mix(number, 41);
            if (write(back[1], &number, sizeof number) != sizeof number)
                _exit(1);
        }
        _exit(0);
    }
    close(there[0]);
    close(back[1]);
    uint64_t number = 0;
    for (uint64_t i = 0; i < 40000ull * length; i++) {
        number += i;
        check(write(there[1], &number, sizeof number) == sizeof number, "write");
        check(read(back[0], &number, sizeof number) == sizeof number, "read");
    }
    close(there[1]);
    close(back[0]);
    int status;
    check(waitpid(child, &status, 0) == child && status == 0, "waitpid");
    return number;
}
