/* Large tables: zeros of the host's, which are given memory as they are written to. (calloc would clear what was used before, and so
 * touch all of a table of which a short run uses little.) */
#pragma once
#include <stddef.h>
#include <sys/mman.h>

static inline void *zeros_create(size_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static inline void zeros_destroy(volatile void *at, size_t size)
{
    if (at)
        munmap((void *)at, size);
}
