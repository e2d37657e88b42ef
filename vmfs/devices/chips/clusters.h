/* The files of a disk, and which clusters of it an overlay has. */
#ifndef VMFS_CHIPS_CLUSTERS_H
#define VMFS_CHIPS_CLUSTERS_H

#include "chips.h"

enum { CLUSTER = 4096, BLOCK_WORDS = 512, BLOCK_CLUSTERS = 64 * BLOCK_WORDS };

struct clusters {
    PyObject_HEAD
    u64 count, blocks;
    _Atomic(_Atomic u64 *) *block; /* a bit a cluster, in blocks of 4 KiB; NULL: none. Set with the GIL, read without any lock */
};

struct files { /* changed while nobody reads them */
    PyObject_HEAD
    int base;
    u64 base_bytes;
    unsigned count;
    struct layer { int fd; struct clusters *clusters; } *layers; /* over the base, the upper ones first; a reference each */
};

/* How many clusters from `first` on, below `end`, are as that is. */
u64 clusters_alike(const struct clusters *c, u64 first, u64 end, bool *has);

#endif
