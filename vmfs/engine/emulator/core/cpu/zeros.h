/* Tables of zeros. Large ones are the host's, which are given memory as they are written to: calloc would clear what was used
 * before, and so touch all of a table of which a short run uses little. A small one is not worth a system call. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ZEROS_LARGE = 1 << 14 };

static inline void *zeros_create(size_t size)
{
    if (size < ZEROS_LARGE)
        return calloc(1, size);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static inline void zeros_destroy(volatile void *at, size_t size)
{
    if (at && size < ZEROS_LARGE)
        free((void *)at);
    else if (at)
        munmap((void *)at, size);
}

/* Zeros again, of a part of a large table: its pages go back to the host, so that it costs what was touched. */
static inline void zeros_clear(void *at, size_t size)
{
    uintptr_t begin = (uintptr_t)at, first = (begin + 0xfff) & ~(uintptr_t)0xfff, last = (begin + size) & ~(uintptr_t)0xfff;
    if (first >= last || madvise((void *)first, last - first, MADV_DONTNEED)) {
        memset(at, 0, size);
        return;
    }
    memset(at, 0, first - begin);
    memset((void *)last, 0, begin + size - last);
}
