/* The part of a virtio device's PCI transport that a driver uses all the time. */
#ifndef VMFS_CHIPS_VIRTIO_H
#define VMFS_CHIPS_VIRTIO_H

#include "pci.h"

enum { QUEUES = 64, VECTOR_OF_CONFIG = QUEUES };

struct disk;

struct virtio {
    struct chip chip;
    struct function *function;  /* a reference */
    u64 isr_at, notify_at;      /* in BAR 0; BAR 1 is MSI-X's */
    unsigned queues;
    u8 isr;
    uint16_t vectors[QUEUES + 1]; /* of the queues, and of changes of the configuration */
    u64 notifications;          /* that were answered */
    struct disk *disk;          /* that is told of them; NULL: Python */
};

/* Tell the driver of used buffers of a queue, or of a change of the configuration (VECTOR_OF_CONFIG). */
void virtio_interrupt(struct virtio *v, unsigned of);

#endif
