/* The translator: hot decoded blocks become host code (docs/emulator.md, "How an instruction becomes host code").
 *
 * A region is a set of blocks of one page, entered at any of them, with the jumps between them. Its code keeps what the
 * interpreter keeps: a block's length is subtracted from the budget at its entry, code that leaves early gives `left` back, and
 * what it cannot do it leaves to the interpreter at a record. So counts are exact, and every fault, exit and event is made by
 * the handlers alone. */
#ifndef VMFS_TRANSLATE_H
#define VMFS_TRANSLATE_H

#include "state.h"

struct translator;
struct region;

/* NULL: no translator (VMFS_NO_JIT, or the host gives no executable memory). */
struct translator *translator_create(struct vm *vm);
int translators_own(const struct vm *vm); /* after a fork: 0 where the processes share no host code, or -EBUSY */
void translator_destroy(struct vcpu *c);
void translator_flush(struct vcpu *c);                        /* forget all regions: their blocks are gone */
void translator_share(struct vcpu *c);                        /* drop a part of what is more than its share, for another CPU */
void region_kill(struct vcpu *c, struct region *region);      /* a block of it dies: its other blocks are interpreted again */

/* What a block's `enter` is: it counts, and in the end translates; or it runs host code. */
handler block_count, block_translated;

#endif
