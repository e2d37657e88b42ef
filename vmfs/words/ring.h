/* Memory that a server and a machine's process share for one open file: a stream that the machine hands on, ahead of the reads.
 * The server makes it (a memfd that can neither shrink nor grow, so that an access is no SIGBUS). It follows no number of the
 * machine's before it has checked it against those that it keeps itself. The machine trusts its server.
 *
 * Byte n of the stream is at n % RING_ROOM. Those from `taken` to `put` wait to be read. Up to RING_AGAIN of those before can be
 * read again, by programs that read more than they use and seek back, so the machine keeps that much free. */
#ifndef VMFS_RING_H
#define VMFS_RING_H

#include <stdint.h>

enum {
    RING_HEAD = 4096,
    RING_ROOM = 2 << 20,
    RING_SIZE = RING_HEAD + RING_ROOM,
    RING_AGAIN = 256 << 10,
    RING_AHEAD = RING_ROOM - RING_AGAIN,
};

struct ring_page {
    uint64_t first;         /* the machine's: what comes before was never here; */
    uint64_t put;           /* up to here there are bytes */
    uint64_t taken __attribute__((aligned(64)));    /* the server's: up to here they were read */
};

#endif
