/* The page that the server and a machine's process share: what loops read and ask for, so that neither Python has to run
 * for it. The server makes it (a memfd that can neither shrink nor grow) and trusts nothing in it: it copies bytes of fixed
 * places, and follows no number that it finds there but sizes, which it checks. The machine trusts its server.
 *
 * What stands still (files up to LANE_FILES_STILL) is written under a sequence lock: `sequence` is odd while it is written.
 * `valid` says what of it holds: LANE_VALID bits.
 *
 * An order is a read of a file of runs, or a write of one of the others: the server writes `handle`, `file`, `offset`, `size`
 * and `input`, and then `order`, a number and LANE_POSTED, and rings. Each step on is a compare and swap, so that only one
 * side makes it:
 *   POSTED -> TAKEN   the machine does it;   POSTED -> NONE   it does not (the server asks in the usual way), by either
 *   TAKEN -> DONE     it is done: the server answers, a read with `output`
 *   TAKEN -> LEFT     it is for Python: the server asks in the usual way. A run may have begun then, and the machine's Python answers
 *                     with it; a write has changed nothing. By either; by the server, a write is interrupted, and not asked for again.
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

enum {
    LANE_SIZE = 4096,
    LANE_REGS_SIZE = 144,
    LANE_SREGS_SIZE = 312,
    LANE_EXIT_SIZE = 64,        /* struct vmfs_exit */
    LANE_DATA_MOST = 64,
    LANE_STATE_MOST = 16,
    LANE_LINE_MOST = 512,
};
enum lane_file {
    LANE_REGS, LANE_SREGS, LANE_DATA,           /* each read samples them anew */
    LANE_EXIT, LANE_STATE, LANE_FILES_STILL,    /* a read from offset 0 takes what others go on in, and what polls have seen */
    LANE_RUN = LANE_FILES_STILL, LANE_RUN_LINE, LANE_IRQ,
    LANE_TRACE, LANE_TRACE_BIN,                 /* by ring.h */
    LANE_RESTORE,               /* the machine's Python does it, but neither channel is used */
};
#define LANE_VALID(file) (1u << (file))
#define LANE_SNAPSHOTS (LANE_VALID(LANE_EXIT) | LANE_VALID(LANE_STATE))

enum lane_step { LANE_NONE, LANE_POSTED, LANE_TAKEN, LANE_LEFT, LANE_DONE };
enum { LANE_STEP_BITS = 3, LANE_STEP_MASK = 7 };

struct lane_page {
    /* the machine's */
    uint32_t sequence, valid;
    uint32_t is_open;       /* an order would be taken: a hint */
    uint32_t sleeps;        /* the thread that would take it sleeps on `bell` */
    uint32_t sizes[LANE_FILES_STILL];
    uint32_t spare;
    uint64_t news[2];       /* of LANE_EXIT and LANE_STATE: another, greater number when a poll should return */
    uint8_t regs[LANE_REGS_SIZE];
    uint8_t sregs[LANE_SREGS_SIZE];
    uint8_t data[LANE_DATA_MOST];
    uint8_t exit[LANE_EXIT_SIZE];
    uint8_t state[LANE_STATE_MOST];
    /* both sides' */
    uint32_t order __attribute__((aligned(64)));
    /* the server's */
    uint32_t bell;          /* a futex: another number whenever there is something to look at */
    uint64_t handle;        /* whose order it is: the number of the machine's open file */
    uint32_t file, offset, size;
    uint8_t input[LANE_SREGS_SIZE];
    /* the machine's */
    uint32_t ended __attribute__((aligned(64)));    /* a futex: another number whenever an order has ended */
    uint32_t server_sleeps; /* the thread that waits for its end sleeps on `ended`; the server's */
    uint32_t output_size;
    uint8_t output[LANE_LINE_MOST];
};
_Static_assert(sizeof(struct lane_page) <= LANE_SIZE, "a page");

/* Where what stands still is, and how much of it there may be. */
static const struct lane_place { size_t at, most; } lane_places[LANE_FILES_STILL] = {
    [LANE_REGS] = {offsetof(struct lane_page, regs), LANE_REGS_SIZE},
    [LANE_SREGS] = {offsetof(struct lane_page, sregs), LANE_SREGS_SIZE},
    [LANE_DATA] = {offsetof(struct lane_page, data), LANE_DATA_MOST},
    [LANE_EXIT] = {offsetof(struct lane_page, exit), LANE_EXIT_SIZE},
    [LANE_STATE] = {offsetof(struct lane_page, state), LANE_STATE_MOST},
};

/* What a C thread of the machine's process runs a CPU by: an engine gives a capsule of it, named LANE_CPU. Called without
 * the GIL, by one thread at a time, while nobody else uses the CPU. */
#define LANE_CPU "vmfs.lane_cpu"
struct lane_cpu {
    void *cpu;
    void (*clear_kick)(void *cpu);
    /* Run to the next exit. The index of an access or a halt in LANE_EXITS, with the exit as struct vmfs_exit; -1 for all
     * others, which are the engine's Python to tell. */
    int (*run)(void *cpu, uint8_t exit[LANE_EXIT_SIZE]);
    /* The last run counts: its exit is the one that `left_exit` tells (vmfs.engine.base). */
    void (*keep)(void *cpu);
    /* LANE_VALID of those of the two that it had at hand. */
    unsigned (*state)(void *cpu, uint8_t regs[LANE_REGS_SIZE], uint8_t sregs[LANE_SREGS_SIZE]);
    /* The bytes of the pending access, as they are in exit.data; how many there are. */
    size_t (*data)(void *cpu, uint8_t data[LANE_DATA_MOST]);
    /* Set LANE_REGS, LANE_SREGS or LANE_DATA, whole. 0, or it is Python's and nothing has changed. NULL: it always is. */
    int (*set)(void *cpu, unsigned file, const uint8_t *data, size_t size);
    int (*interrupt)(void *cpu, unsigned vector);       /* as `set` */
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

/* Change the futex `word`, and wake the thread that says by `sleeps` that it sleeps on it. */
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
