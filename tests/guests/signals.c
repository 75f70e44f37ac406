// Exceptions as signals, and timers: what arrives, where, and that the interrupted code goes on unharmed.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "check.h"

enum { PAGE = 4096 };

static volatile uint8_t *guarded;
static volatile sig_atomic_t faults, traps, steps, ticks;
static volatile uintptr_t fault_address;
static char alternate_stack[64 << 10];

static void handle(int number, void (*handler)(int, siginfo_t *, void *), int flags) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    CHECK(sigaction(number, &action, NULL) == 0);
}

// Opens the page that was touched; the access is made again.
static void on_segv(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    faults++;
    fault_address = (uintptr_t)info->si_addr;
    char here;
    // The handler runs on the alternate stack.
    if (&here < alternate_stack || &here >= alternate_stack + sizeof alternate_stack) _exit(3);
    if (mprotect((void *)guarded, PAGE, PROT_READ | PROT_WRITE) != 0) _exit(4);
}

static void page_faults(void) {
    stack_t stack = {.ss_sp = alternate_stack, .ss_size = sizeof alternate_stack};
    CHECK(sigaltstack(&stack, NULL) == 0);
    handle(SIGSEGV, on_segv, SA_ONSTACK);
    guarded = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(guarded != MAP_FAILED);
    for (int round = 0; round < 100; round++) {
        CHECK(mprotect((void *)guarded, PAGE, round % 2 ? PROT_READ : PROT_NONE) == 0);
        guarded[round * 8] = (uint8_t)round;
        CHECK(fault_address == (uintptr_t)&guarded[round * 8]);
        fold(guarded[round * 8]);
    }
    CHECK(faults == 100);
}

// The instruction's length, by its first bytes: enough for those provoked below.
static void on_skip(int number, siginfo_t *info, void *context) {
    ucontext_t *where = context;
    uint8_t *code = (uint8_t *)where->uc_mcontext.gregs[REG_RIP];
    fold(number * 1000 + info->si_code);
    if (number == SIGILL || number == SIGFPE) {
        CHECK(info->si_addr == (void *)code);
        where->uc_mcontext.gregs[REG_RIP] += 2;
    }
    traps++;
}

static void exceptions(void) {
    handle(SIGILL, on_skip, 0);
    handle(SIGFPE, on_skip, 0);
    handle(SIGTRAP, on_skip, 0);
    for (int round = 0; round < 50; round++) {
        __asm__ volatile("ud2");
        __asm__ volatile("int3");
        uint32_t quotient = 5, rest = 0, zero = 0;
        // div ecx: two bytes.
        __asm__ volatile("divl %%ecx" : "+a"(quotient), "+d"(rest) : "c"(zero) : "cc");
        CHECK(quotient == 5);
    }
    CHECK(traps == 150);
}

static void on_step(int number, siginfo_t *info, void *context) {
    (void)number, (void)info, (void)context;
    steps++;
}

// The trap flag: one SIGTRAP per instruction.
static void single_steps(void) {
    handle(SIGTRAP, on_step, 0);
    uint64_t value = 1;
    __asm__ volatile(
        "pushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\t"
        "imul $3, %0, %0\n\tadd $1, %0\n\tnop\n\tshl $2, %0\n\t"
        "pushfq\n\tandq $~0x100, (%%rsp)\n\tpopfq\n\tnop"
        : "+r"(value)
        :
        : "cc", "memory");
    CHECK(value == 16);
    fold(steps);
}

static void on_tick(int number, siginfo_t *info, void *context) {
    (void)number, (void)info, (void)context;
    ticks++;
}

// A timer interrupts a computation, which must come to the same result.
static void timers(void) {
    handle(SIGALRM, on_tick, SA_RESTART);
    struct itimerval every = {{0, 2000}, {0, 2000}};
    CHECK(setitimer(ITIMER_REAL, &every, NULL) == 0);
    uint64_t value = 1;
    for (int i = 0; i < 40000000 || ticks < 3; i++) {
        if (i < 40000000) value = value * 6364136223846793005u + 1442695040888963407u;
    }
    fold(value);
    struct itimerval never = {{0, 0}, {0, 0}};
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
    CHECK(ticks >= 3);

    // Sleep is interrupted by a one-shot timer.
    int before = ticks;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    timer_t timer;
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
    struct itimerspec once = {.it_value = {0, 5000000}};
    CHECK(timer_settime(timer, 0, &once, NULL) == 0);
    struct timespec long_time = {5, 0};
    CHECK(nanosleep(&long_time, NULL) == -1 && errno == EINTR);
    CHECK(ticks == before + 1);
    timer_delete(timer);
}

static int order[16], arrived;

static void on_queued(int number, siginfo_t *info, void *context) {
    (void)context;
    order[arrived++] = number * 100 + info->si_value.sival_int;
}

// Queued real-time signals: lowest number first, equal numbers in order.
static void queues(void) {
    sigset_t blocked, old;
    sigemptyset(&blocked);
    for (int i = 0; i < 3; i++) {
        handle(SIGRTMIN + i, on_queued, 0);
        sigaddset(&blocked, SIGRTMIN + i);
    }
    CHECK(sigprocmask(SIG_BLOCK, &blocked, &old) == 0);
    for (int i = 0; i < 12; i++) {
        union sigval value = {.sival_int = i};
        CHECK(sigqueue(getpid(), SIGRTMIN + (i * 7) % 3, value) == 0);
    }
    CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
    CHECK(arrived == 12);
    // Signals nest: the handler of a later one starts before that of an earlier one goes on.
    for (int i = 0; i < arrived; i++) fold(order[i]);
}

int main(void) {
    page_faults();
    exceptions();
    single_steps();
    timers();
    queues();
    return result("signals");
}
