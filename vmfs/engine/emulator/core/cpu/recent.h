/* What a CPU did last, for who asks after a shutdown: faults, and the last instructions. It is always kept, so it costs next to
 * nothing: where settled code goes, interpreted or translated, nothing is written down, and recent.c works it out afterwards. */
#ifndef VMFS_RECENT_H
#define VMFS_RECENT_H

#include "state.h"

/* Instructions done, each iteration of a repeated one but its first left out: records, so to speak. */
ALWAYS_INLINE u64 records_done(const struct vcpu *c) { return instructions_done(c) - c->recent.iterations; }

ALWAYS_INLINE struct place_note *note_place(struct vcpu *c, enum place_kind kind, u64 ip, u64 done)
{
    struct place_note *n = &c->recent.places[c->recent.count++ % RECENT_PLACES];
    n->kind = (u8)kind;
    n->how = LAST_UNKNOWN;
    n->key = c->key;
    n->ip = ip;
    n->base = c->key & KEY_CODE64 ? 0 : c->seg[SEG_CS].base;
    n->done = done;
    n->killed = c->counters.blocks_killed;
    return n;
}

/* A block is entered, which is not settled: its instructions are not counted as done yet. */
ALWAYS_INLINE void note_block(struct vcpu *c, const struct block *b, u64 done) { note_place(c, PLACE_BLOCK, b->ip, done)->block = b; }

/* The main loop comes next, after the record r (`done`), or before it. */
ALWAYS_INLINE void note_last(struct vcpu *c, const struct record *r, bool done)
{
    c->recent.last_how = done ? LAST_DONE : LAST_NOT_DONE;
    c->recent.last_ip = c->gpr[GPR_IP];
    c->recent.last_at = r->at;
}

/* The CPU stands between two instructions. */
void note_stand(struct vcpu *c);
/* A fault was raised, which `deliver_fault` delivers, or makes another of. */
void note_fault(struct vcpu *c, bool delivered, unsigned becomes);
/* A jump that was noted goes to b: not by a link. */
void note_jump(struct vcpu *c, const struct block *b);
void recent_forget_places(struct vcpu *c);

#endif
