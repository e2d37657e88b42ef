/* The memory of host code: of a machine, bounded, in parts that its CPUs take, drop in turn, and give back. */
#ifndef VMFS_CODE_H
#define VMFS_CODE_H

#include "state.h"

/* A part for each CPU that there may be, at the least. */
enum { CODE_PARTS = 64, PART_SIZE = 1 << 20, SHARED_SIZE = 4096 };

struct region;
struct part { u8 *from, *at, *top; struct region *regions; }; /* code from below, sites from above */

/* Code that all regions share, as the writer sees it. */
struct shared { u8 *leave, *call, *stop, *way; void (*enter)(struct vcpu *, const u8 *); };

/* Two mappings of the same pages, one to write and one to execute. They are made for the first part that is taken. */
struct code_memory {
    u8 *writable;             /* SHARED_SIZE, then the parts; NULL: none was taken yet */
    i64 to_executable;        /* from an address there to that of the same byte to execute */
    void (*prepare)(struct code_memory *); /* writes what all regions share */
    struct shared shared;
    bool refused;             /* the host gives none that may be executed */
    pthread_mutex_t lock;     /* for all of it until the first part is taken; then for: */
    u64 free;                 /* parts, a bit each */
    unsigned users, without;  /* CPUs; those that have no part, for each of which one is kept */
};

struct code_memory *code_memory_create(void (*prepare)(struct code_memory *));
void code_memory_destroy(struct code_memory *m);
/* A CPU has come, with no part; or gone, which has given all back. */
void code_memory_join(struct code_memory *m);
void code_memory_leave(struct code_memory *m);
int part_take(struct code_memory *m, unsigned has); /* one more than it has, or -1 */
void part_give(struct code_memory *m, unsigned part, unsigned has); /* one of those that it has, to the host, too */
unsigned part_share(struct code_memory *m);         /* what each CPU may have where all want more */

#endif
