// Threads that lose each other's updates: how many depends on where they are preempted, which the seed decides.
#include <pthread.h>
#include <stdio.h>

enum { THREADS = 4, ROUNDS = 1000000 };

static volatile unsigned long counter;

static void *count(void *unused) {
    for (int i = 0; i < ROUNDS; i++) {
        unsigned long value = counter;
        // The window between reading and writing.
        for (volatile int wait = 0; wait < 8; wait++) {}
        counter = value + 1;
    }
    return unused;
}

int main(void) {
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, count, NULL);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    printf("race: %lu of %d\n", counter, THREADS * ROUNDS);
    return 0;
}
