// Two threads add to one counter without a lock. Each also counts for itself, so that a lost update shows soon after
// it has happened: there the program stops.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { THREADS = 2, ROUNDS = 3000000 };

volatile long counter;
volatile long tally[THREADS];
unsigned long noise[THREADS];

__attribute__((noinline)) void lost(long sum) {
    printf("lost update: %ld counted, the counter says %ld\n", sum, counter);
    exit(1);
}

__attribute__((noinline)) void increment(int thread) {
    long value = counter;
    counter = value + 1;
    tally[thread]++;
    // The other thread may stand between its two updates: one is no loss.
    long sum = tally[0] + tally[1];
    if (sum > counter + 1) lost(sum);
}

static void *count(void *argument) {
    int thread = (int)(long)argument;
    for (int i = 0; i < ROUNDS; i++) {
        // Something else to do, so that the window is small.
        for (int j = 0; j < 8; j++) noise[thread] = noise[thread] * 6364136223846793005ul + 1;
        increment(thread);
    }
    return NULL;
}

int main(void) {
    pthread_t threads[THREADS];
    for (long i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, count, (void *)i);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    printf("no update lost: %ld\n", counter);
    return 0;
}
