// Preloaded, makes one call to mmap fail: the one whose number, from 0, is in MMAP_FAILS.
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static _Atomic int calls;

void *mmap(void *at, size_t size, int protection, int flags, int descriptor, off_t offset)
{
    const char *fails = getenv("MMAP_FAILS");
    if (fails && calls++ == atoi(fails)) {
        fprintf(stderr, "mmap of %zu bytes made to fail\n", size);
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, at, size, protection, flags, descriptor, offset);
}
