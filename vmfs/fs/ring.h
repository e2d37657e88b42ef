/* The server's end of the memory by which a machine hands on a stream (vmfs/words/ring.h). From any thread. */
#ifndef VMFS_FS_RING_H
#define VMFS_FS_RING_H

#include <stddef.h>
#include <stdint.h>

struct ring;

struct ring *ring_map(int fd);          /* NULL: errno */
void ring_hold(struct ring *ring);
void ring_drop(struct ring *ring);      /* as often as it was held, and once for its maker */

/* The machine has it now. 0, or -EPROTO where what it says cannot be. */
int ring_begin(struct ring *ring);

/* Answer the read `unique` of the mount's `device` with the bytes from `offset` on, as many as there are, up to `size`. They were read
 * only if the reader got them: one that was killed has left them to the next. 0: none are here, and nothing is answered. */
int ring_answer(struct ring *ring, int device, uint64_t unique, uint64_t offset, size_t size);
/* Copy them out, and they were read: how many there were. */
size_t ring_read(struct ring *ring, uint64_t offset, void *to, size_t size);

#endif
