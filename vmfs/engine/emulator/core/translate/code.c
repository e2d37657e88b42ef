#define _GNU_SOURCE
#include "code.h"

#include <stdlib.h>
#include <sys/mman.h>

_Static_assert((int)CODE_PARTS >= (int)CORE_VCPUS && CODE_PARTS == 64, "a part for each CPU, a bit for each part");

enum { CODE_SIZE = SHARED_SIZE + CODE_PARTS * PART_SIZE };

struct code_memory *code_memory_create(void (*prepare)(struct code_memory *))
{
    struct code_memory *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->prepare = prepare;
    m->free = ~0ull;
    pthread_mutex_init(&m->lock, NULL);
    return m;
}

/* Both mappings, once: what nobody keeps no code in costs none. It is not the mapping of a file with a name, whose length a
 * user's limit (RLIMIT_FSIZE) bounds. Where the host gives none that may be executed, there are no parts. */
static bool map_parts(struct code_memory *m)
{
    if (m->writable || m->refused)
        return !m->refused;
    void *writable = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *code = writable == MAP_FAILED ? MAP_FAILED : mremap(writable, 0, CODE_SIZE, MREMAP_MAYMOVE); /* 0: the same, twice */
    if (code == MAP_FAILED || mprotect(code, CODE_SIZE, PROT_READ | PROT_EXEC)) {
        if (writable != MAP_FAILED)
            munmap(writable, CODE_SIZE);
        if (code != MAP_FAILED)
            munmap(code, CODE_SIZE);
        m->refused = true;
        return false;
    }
    m->writable = writable;
    m->to_executable = (u8 *)code - (u8 *)writable;
    m->prepare(m);
    return true;
}

void code_memory_destroy(struct code_memory *m)
{
    if (!m)
        return;
    if (m->writable) {
        munmap(m->writable + m->to_executable, CODE_SIZE);
        munmap(m->writable, CODE_SIZE);
    }
    pthread_mutex_destroy(&m->lock);
    free(m);
}

void code_memory_join(struct code_memory *m)
{
    pthread_mutex_lock(&m->lock);
    m->users++;
    m->without++;
    pthread_mutex_unlock(&m->lock);
}

void code_memory_leave(struct code_memory *m)
{
    pthread_mutex_lock(&m->lock);
    m->users--;
    m->without--;
    pthread_mutex_unlock(&m->lock);
}

int part_take(struct code_memory *m, unsigned has)
{
    int part = -1;
    pthread_mutex_lock(&m->lock);
    unsigned kept = has ? m->without : m->without - 1;
    if ((unsigned)__builtin_popcountll(m->free) > kept && map_parts(m)) {
        part = __builtin_ctzll(m->free);
        m->free &= m->free - 1;
        m->without -= !has;
    }
    pthread_mutex_unlock(&m->lock);
    return part;
}

void part_give(struct code_memory *m, unsigned part, unsigned has)
{
    madvise(m->writable + SHARED_SIZE + (size_t)part * PART_SIZE, PART_SIZE, MADV_REMOVE);
    pthread_mutex_lock(&m->lock);
    m->free |= 1ull << part;
    m->without += has == 1;
    pthread_mutex_unlock(&m->lock);
}

unsigned part_share(struct code_memory *m)
{
    pthread_mutex_lock(&m->lock);
    unsigned share = CODE_PARTS / m->users;
    pthread_mutex_unlock(&m->lock);
    return share;
}
