/* The lane: reads of hot files that are answered by a C thread, without the GIL (lane.c). */
#ifndef VMFS_FS_LANE_H
#define VMFS_FS_LANE_H

#include <stddef.h>
#include <stdint.h>

#include "ring.h"

struct lane_machine;                    /* a machine's shared page, mapped */

/* Begin to read `device`, the mount's /dev/fuse. Returns a descriptor that is readable while messages wait for
 * lane_receive, or a negative errno; then nothing has begun. */
int lane_start(int device);
/* End the threads. What waits stays to be received. */
void lane_stop(void);
/* Whether the thread reads the device, or has left messages. */
int lane_serves(void);
/* The next message that is not the lane's: a buffer of malloc, for the caller to free, and its size. 0: none now. -1: the
 * lane has ended, and the device is the caller's to read. */
long lane_receive(void **message);

struct lane_machine *lane_map(int fd);  /* NULL: errno */
/* Nothing is answered from it any more. */
void lane_close(struct lane_machine *machine);
void lane_release(struct lane_machine *machine);

/* The open file `fh` is hot: file `file` (enum lane_file) of a machine, where it has the number `handle`; it is open to
 * be `written`. -ENOMEM, or -EAGAIN
 * where no thread can be had. This and lane_forget: by one thread. */
int lane_add(uint64_t fh, struct lane_machine *machine, unsigned file, uint64_t handle, int written);
/* The open file `fh` is a stream, file `file` of a machine, whose bytes come by `ring`. 0, or -ENOMEM. As lane_add. */
int lane_add_stream(uint64_t fh, struct lane_machine *machine, unsigned file, struct ring *ring);
void lane_forget(uint64_t fh);

/* What is asked again and again, and has the same answer until it is kept anew or dropped: `opcode` (FUSE_GETATTR, FUSE_FLUSH) of
 * an inode or an open file. One that is longer than LANE_KEPT_MOST, or that there is no memory for, is not kept. */
enum { LANE_KEPT_MOST = 128 };
void lane_keep(uint32_t opcode, uint64_t of, const void *answer, size_t size);
void lane_drop(uint32_t opcode, uint64_t of);

/* What a read of that open file by the lane has seen of its news; 0: nothing. */
uint64_t lane_seen(uint64_t fh);
/* A number that is the same while the CPU stands still; -1 where the page does not say that it does. */
int64_t lane_still(struct lane_machine *machine);
/* Leave reads and writes of these files (LANE_VALID) to Python until further notice. */
void lane_leave(struct lane_machine *machine, uint32_t reads, uint32_t writes);

struct lane_counts {
    uint64_t reads, runs, writes, left;     /* answered from the page; orders; those that were left to Python */
    uint64_t written_ns;                    /* when the last write was, CLOCK_REALTIME */
};
struct lane_counts lane_counts(struct lane_machine *machine);

#endif
