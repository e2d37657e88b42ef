/* Entering blocks: the inline part that jumps need. */
#ifndef VMFS_CACHE_H
#define VMFS_CACHE_H

#include "state.h"

/* Run a block if the budget covers it and nobody wants attention; else back to the main loop. */
#define ENTER(c, b) ENTER_WITH((c), (b), (c)->budget)
/* ... where `before` is the budget, which is written once. */
#define ENTER_WITH(c, b, before) do { \
        const struct block *b_ = (b); \
        i64 rest_ = (before) - (i64)b_->count; \
        (c)->gpr[GPR_IP] = b_->ip; \
        if (unlikely(rest_ < 0 || atomic_load_explicit(&(c)->attention, memory_order_relaxed))) { \
            (c)->budget = rest_ + b_->count; \
            return; \
        } \
        (c)->budget = rest_; \
        CONTINUE_BY((c), b_->enter, b_->records); \
    } while (0)

ALWAYS_INLINE bool link_holds(const struct vcpu *c, const struct link *l) { return c->code_map->ids[l->at] == l->id; }

/* A direct near jump is taken. */
#define JUMP_LINK(c, r) do { \
        if (unlikely(!link_holds((c), LINK_OF(r)))) { \
            jump_slow((c), (r)); \
            return; \
        } \
        ENTER_LINK((c), (r)); \
    } while (0)
#define ENTER_LINK(c, r) ENTER_WITH((c), LINK_OF(r)->to, (c)->budget + (r)->left)

ALWAYS_INLINE struct jump_entry *jump_entry(struct vcpu *c, u64 ip) { return &c->jumps[(ip ^ ip >> 12) & (JUMP_CACHE - 1)]; }
ALWAYS_INLINE bool jump_holds(const struct vcpu *c, const struct jump_entry *e, u64 target)
{
    return e->ip == target && c->code_map->ids[e->at] == e->id;
}

/* An indirect near jump to `target`, which is masked and checked (check_target) unless it is in the jump cache. The block
 * ends with r. */
#define JUMP_TO(c, r, target) do { \
        u64 target_ = (target); \
        struct jump_entry *e_ = jump_entry((c), target_); \
        if (unlikely(!jump_holds((c), e_, target_))) { \
            (c)->scratch = target_; \
            jump_indirect_slow((c), (r)); \
            return; \
        } \
        ENTER(c, e_->block); \
    } while (0)

/* #GP(0) unless a near jump may go there: within the limit of CS, or canonical (Intel SDM 2A JMP). */
ALWAYS_INLINE bool target_valid(const struct vcpu *c, u64 target)
{
    return c->key & KEY_CODE64 ? (u64)((i64)(target << 16) >> 16) == target || (c->cr4 & CR4_LA57 &&
           (u64)((i64)(target << 7) >> 7) == target) : target <= c->seg[SEG_CS].limit;
}
ALWAYS_INLINE void check_target(struct vcpu *c, const struct record *r, u64 target)
{
    if (unlikely(!target_valid(c, target)))
        raise_error(c, r, VECTOR_GP, 0);
}
ALWAYS_INLINE u64 relative_target(const struct vcpu *c, const struct record *r)
{
    return truncate_to(c->gpr[GPR_IP] + r->at + r->length + (u64)(i64)r->imm, 8u << r->size);
}

#endif
