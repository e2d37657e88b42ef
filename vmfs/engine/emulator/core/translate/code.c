#define _GNU_SOURCE
#include "code.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

_Static_assert((int)CODE_PARTS >= (int)CORE_VCPUS && CODE_PARTS == 64, "a part for each CPU, a bit for each part");

enum { CODE_SIZE = SHARED_SIZE + CODE_PARTS * PART_SIZE };

struct code_memory *code_memory_create(void)
{
    struct code_memory *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    int fd = memfd_create("vmfs-code", MFD_CLOEXEC);
    void *writable = MAP_FAILED, *code = MAP_FAILED;
    if (fd >= 0 && !ftruncate(fd, CODE_SIZE)) {
        writable = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
        code = mmap(NULL, CODE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_NORESERVE, fd, 0);
    }
    if (fd >= 0)
        close(fd);
    if (writable == MAP_FAILED || code == MAP_FAILED) {
        if (writable != MAP_FAILED)
            munmap(writable, CODE_SIZE);
        free(m);
        return NULL;
    }
    m->writable = writable;
    m->to_executable = (u8 *)code - (u8 *)writable;
    m->free = ~0ull;
    pthread_mutex_init(&m->lock, NULL);
    return m;
}

void code_memory_destroy(struct code_memory *m)
{
    if (!m)
        return;
    munmap(m->writable + m->to_executable, CODE_SIZE);
    munmap(m->writable, CODE_SIZE);
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
    if ((unsigned)__builtin_popcountll(m->free) > kept) {
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
