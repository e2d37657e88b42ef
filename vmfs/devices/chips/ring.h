/* The device's side of a split virtqueue (VIRTIO 1.2, 2.7). The caller serialises all calls on one queue. */
#ifndef VMFS_CHIPS_RING_H
#define VMFS_CHIPS_RING_H

#include "ram.h"

/* The most of a chain that a driver may make of a queue of 256: what is before an indirect table, and the table. */
enum { CHAIN_MOST = 256 + 1024 };

struct queue { /* Python's Virtqueue has more, and says what is wrong with one */
    PyObject_HEAD
    uint16_t size, taken, used, told;
    u64 descriptors, driver, device;
    char enabled, event_index, indirect;
};

struct chain {
    uint16_t head;
    unsigned readable, writable; /* spans; those that the device may write follow the others */
    u64 readable_bytes, writable_bytes;
    struct span spans[CHAIN_MOST];
};

enum popped { QUEUE_WRONG = -1 /* Python says why */, QUEUE_EMPTY, QUEUE_POPPED };
enum popped queue_pop(struct queue *q, const struct ram *ram, struct chain *chain);
void queue_push(struct queue *q, struct ram *ram, uint16_t head, u32 written);
/* Have the driver notify of the next request; false: there are some already. */
bool queue_rests(struct queue *q, struct ram *ram);
/* Whether the driver wants to hear of what was pushed since this was last asked. */
bool queue_wants_interrupt(struct queue *q, const struct ram *ram);

/* The (address, length) of what may be read, and of what may be written. */
PyObject *chain_spans(const struct chain *chain);
PyObject *ring_chain(PyObject *module, PyObject *args);

#endif
