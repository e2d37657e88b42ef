/* The guest's RAM, as devices use it without Python. */
#ifndef VMFS_CHIPS_RAM_H
#define VMFS_CHIPS_RAM_H

#include "chips.h"

enum { REGIONS = 8, PAGE = 4096, PART = 1 << 15 /* pages */ };

struct span { u64 address; u32 length; };

struct ram {
    PyObject_HEAD
    struct bus *bus;            /* a reference: its machine is told what is written */
    Py_buffer view;             /* while it is mapped; it is mapped, and regions change, while nothing uses it */
    u8 *data;
    u64 size;
    unsigned count;
    struct { u64 start, end; } regions[REGIONS];
    pthread_mutex_t lock;       /* of what follows */
    u8 **parts;                 /* a byte a page that devices have written, by parts of RAM; NULL: none of it */
    u64 part_count, writes;
};

/* Whether all of that is RAM of one region, and mapped. */
bool ram_has(const struct ram *ram, u64 address, u64 length);
/* Devices have written that: for the dirty log, and for the engine. */
void ram_wrote(struct ram *ram, const struct span *spans, unsigned count);

#endif
