/* What a machine hands on of a stream, and how much of it was read (vmfs/words/ring.h). The machine may write anything into the
 * memory at any time: of its numbers each is read once, and used after it was checked. */
#include "ring.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include <linux/fuse.h>

#include "../words/ring.h"

struct ring {
    unsigned references;
    pthread_mutex_t lock;       /* of a read: the machine overwrites nothing before `taken` is another */
    struct ring_page *page;
    int has_begun;
    uint64_t first, taken;      /* as in the page, which the machine might change */
};

struct ring *ring_map(int fd)
{
    struct ring *ring = calloc(1, sizeof *ring);
    if (!ring)
        return NULL;
    ring->page = mmap(NULL, RING_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ring->page == MAP_FAILED) {
        int error = errno;
        free(ring);
        errno = error;
        return NULL;
    }
    pthread_mutex_init(&ring->lock, NULL);
    ring->references = 1;
    return ring;
}

void ring_hold(struct ring *ring) { __atomic_add_fetch(&ring->references, 1, __ATOMIC_RELAXED); }

void ring_drop(struct ring *ring)
{
    if (__atomic_sub_fetch(&ring->references, 1, __ATOMIC_ACQ_REL))
        return;
    munmap(ring->page, RING_SIZE);
    pthread_mutex_destroy(&ring->lock);
    free(ring);
}

int ring_begin(struct ring *ring)
{
    uint64_t first = __atomic_load_n(&ring->page->first, __ATOMIC_ACQUIRE);
    uint64_t taken = __atomic_load_n(&ring->page->taken, __ATOMIC_ACQUIRE);
    if (first > taken || taken - first > RING_AGAIN || taken > INT64_MAX)
        return -EPROTO;
    pthread_mutex_lock(&ring->lock);
    ring->first = first;
    ring->taken = taken;
    ring->has_begun = 1;
    pthread_mutex_unlock(&ring->lock);
    return 0;
}

/* With the lock: the bytes from `offset` on, up to `size`, in one or two parts; how many there are. */
static size_t find(struct ring *ring, uint64_t offset, size_t size, struct iovec parts[2])
{
    uint64_t put = __atomic_load_n(&ring->page->put, __ATOMIC_ACQUIRE), taken = ring->taken;
    uint64_t first = taken - ring->first > RING_AGAIN ? taken - RING_AGAIN : ring->first;
    if (!ring->has_begun || put < taken || put - taken > RING_AHEAD || offset < first || offset > taken)
        return 0;
    size = size < put - offset ? size : (size_t)(put - offset);
    uint8_t *bytes = (uint8_t *)ring->page + RING_HEAD;
    size_t place = offset % RING_ROOM, to_end = RING_ROOM - place, before_end = size < to_end ? size : to_end;
    parts[0] = (struct iovec){bytes + place, before_end};
    parts[1] = (struct iovec){bytes, size - before_end};
    return size;
}

/* With the lock. */
static void was_read(struct ring *ring, uint64_t to)
{
    if (to > ring->taken) {
        ring->taken = to;
        __atomic_store_n(&ring->page->taken, to, __ATOMIC_RELEASE);
    }
}

int ring_answer(struct ring *ring, int device, uint64_t unique, uint64_t offset, size_t size)
{
    struct fuse_out_header header = {.unique = unique};
    struct iovec parts[3] = {{&header, sizeof header}};
    ssize_t done;

    pthread_mutex_lock(&ring->lock);
    size = find(ring, offset, size, parts + 1);
    if (size) {
        header.len = (uint32_t)(sizeof header + size);
        while ((done = writev(device, parts, 3)) < 0 && errno == EINTR)
            ;
        if (done >= 0)
            was_read(ring, offset + size);
    }
    pthread_mutex_unlock(&ring->lock);
    return size > 0;
}

size_t ring_read(struct ring *ring, uint64_t offset, void *to, size_t size)
{
    struct iovec parts[2];

    pthread_mutex_lock(&ring->lock);
    size = find(ring, offset, size, parts);
    if (size) {
        memcpy(to, parts[0].iov_base, parts[0].iov_len);
        memcpy((uint8_t *)to + parts[0].iov_len, parts[1].iov_base, parts[1].iov_len);
        was_read(ring, offset + size);
    }
    pthread_mutex_unlock(&ring->lock);
    return size;
}
