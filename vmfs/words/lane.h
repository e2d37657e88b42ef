/* The page that the server and a machine's process share: what loops read and ask for, so that neither Python has to run
 * for it. The server makes it (a memfd that can neither shrink nor grow) and trusts nothing in it: it copies bytes of fixed
 * places, and follows no number that it finds there. The machine trusts its server.
 *
 * What stands still (regs, sregs, the bytes of the pending access) is written under a sequence lock: `sequence` is odd
 * while it is written. `valid` says what of it holds: LANE_VALID bits.
 *
 * A run: the server writes `handle` and then `order`, a number and LANE_POSTED, and rings. Each step on is a compare and
 * swap, so that only one side makes it:
 *   POSTED -> TAKEN   the machine runs the guest;   POSTED -> NONE   it does not (the server asks in the usual way), by either
 *   TAKEN -> DONE     the exit is in `exit`, and the server answers with it
 *   TAKEN -> LEFT     it takes too long, or is more than an exit of the guest: the server asks in the usual way, and
 *                     the machine's Python answers with this run. By either.
 * Each waits for the other on a futex of its own, which the other changes: `bell` and `ended`. */
#ifndef VMFS_LANE_H
#define VMFS_LANE_H

#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { LANE_SIZE = 4096, LANE_REGS_SIZE = 144, LANE_SREGS_SIZE = 312, LANE_EXIT_SIZE = 64, LANE_DATA_MOST = 64 };
enum lane_file { LANE_REGS, LANE_SREGS, LANE_DATA, LANE_FILES_STILL, LANE_RUN = LANE_FILES_STILL };
#define LANE_VALID(file) (1u << (file))

enum lane_step { LANE_NONE, LANE_POSTED, LANE_TAKEN, LANE_LEFT, LANE_DONE };
enum { LANE_STEP_BITS = 3, LANE_STEP_MASK = 7 };

struct lane_page {
    /* the machine's */
    uint32_t sequence, valid;
    uint32_t data_size;
    uint32_t is_open;       /* a run would be taken: a hint */
    uint32_t sleeps;        /* who would take it sleeps on `bell` */
    uint32_t spare[3];
    uint8_t regs[LANE_REGS_SIZE];
    uint8_t sregs[LANE_SREGS_SIZE];
    uint8_t data[LANE_DATA_MOST];
    uint8_t exit[LANE_EXIT_SIZE];   /* struct vmfs_exit of the run that is DONE */
    /* both sides' */
    uint32_t order __attribute__((aligned(64)));
    uint32_t bell;          /* a futex: another number whenever there is something to look at */
    uint64_t handle;        /* whose run it is: the number of the machine's open file */
    uint32_t ended __attribute__((aligned(64)));    /* a futex: another number whenever an order has ended */
    uint32_t server_sleeps; /* who would answer it sleeps on `ended` */
};
_Static_assert(sizeof(struct lane_page) <= LANE_SIZE, "a page");

/* What a C thread of the machine's process runs a CPU by: an engine gives a capsule of it, named LANE_CPU. Called without
 * the GIL, by one thread at a time, while nobody else uses the CPU. */
#define LANE_CPU "vmfs.lane_cpu"
struct lane_cpu {
    void *cpu;
    void (*clear_kick)(void *cpu);
    /* Run to the next exit. The index of an access or a halt in LANE_EXITS, with the exit as struct vmfs_exit; -1 for all
     * others, which are the engine's Python to tell. */
    int (*run)(void *cpu, uint8_t exit[LANE_EXIT_SIZE]);
    void (*state)(void *cpu, uint8_t regs[LANE_REGS_SIZE], uint8_t sregs[LANE_SREGS_SIZE]);
    /* The bytes of the pending access, as they are in exit.data; how many there are. */
    size_t (*data)(void *cpu, uint8_t data[LANE_DATA_MOST]);
};
enum { LANE_EXIT_IO, LANE_EXIT_MMIO, LANE_EXIT_HLT, LANE_EXITS };

static inline uint64_t lane_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline int lane_step_on(uint32_t *order, uint32_t number, enum lane_step from, enum lane_step to)
{
    uint32_t expected = number << LANE_STEP_BITS | from;
    return __atomic_compare_exchange_n(order, &expected, number << LANE_STEP_BITS | to, 0, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}

/* Change the futex `word`, and wake who says by `sleeps` that it sleeps on it. */
static inline void lane_signal(uint32_t *word, const uint32_t *sleeps)
{
    __atomic_add_fetch(word, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(sleeps, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Sleep until `word`, a futex, is signalled; not when it is not `seen` any more. May wake up for nothing. */
static inline void lane_sleep(uint32_t *word, uint32_t *sleeps, uint32_t seen)
{
    __atomic_store_n(sleeps, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(word, __ATOMIC_SEQ_CST) == seen)
        syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
    __atomic_store_n(sleeps, 0, __ATOMIC_SEQ_CST);
}

#endif
