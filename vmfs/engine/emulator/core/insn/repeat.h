/* Repeated string instructions, for ops_string.c and the INS and OUTS of the system family.
 *
 * An iteration is one instruction: for the budget, for the time, for a single step, as EFLAGS.TF shows it (Intel SDM 2B
 * "REP": traps and interrupts are taken between iterations, with rip at the instruction and rCX, rSI, rDI of what is left
 * to do). REP with a count of zero is one instruction too. The block paid for the first iteration at its entry. */
#ifndef VMFS_REPEAT_H
#define VMFS_REPEAT_H

#include "flags.h"
#include "memory.h"
#include "opcodes.h"
#include "tracer.h"

ALWAYS_INLINE bool repeats(const struct record *r) { return r->prefix & (PREFIX_REP | PREFIX_REPNE); }
ALWAYS_INLINE u64 address_mask(const struct record *r) { return address_masks[r->prefix & PREFIX_ADDRESS]; }
ALWAYS_INLINE u64 repeat_count(const struct vcpu *c, const struct record *r) { return c->gpr[RCX] & address_mask(r); }

/* rCX, rSI, rDI are as wide as addresses. */
ALWAYS_INLINE void set_address_register(struct vcpu *c, const struct record *r, unsigned number, u64 value)
{
    u64 mask = address_mask(r);
    c->gpr[number] = mask == 0xffff ? (c->gpr[number] & ~mask) | (value & mask) : value & mask;
}
/* Bytes from an element to the next. */
ALWAYS_INLINE u64 string_step(const struct vcpu *c, unsigned bytes) { return c->rflags & FLAG_DF ? -(u64)bytes : bytes; }

/* The next iteration is a new instruction. */
static inline void pause_repetition(struct vcpu *c, const struct record *r)
{
    c->repeating = true;
    leave_to(c, r, ip_mask(c, ip_of(c, r)));
}

/* The body of a handler. `work(c, r, most)` does 1 to `most` iterations, all of them or none where it escapes, moves
 * rSI and rDI, and returns how many; `go_on` is whether the repetition goes on while the count is not zero. */
#define REPEAT(work, go_on) do { \
        u64 count_ = repeat_count(c, r); \
        if (!count_) \
            NEXT(); \
        for (;;) { \
            u64 paid_ = (u64)c->budget + 1, n_ = work(c, r, count_ < paid_ ? count_ : paid_); \
            c->budget -= (i64)n_ - 1; \
            c->recent.iterations += n_ - 1; \
            if (unlikely(c->key & KEY_TRACED) && n_ > 1) \
                tracer_more(c, n_ - 1); \
            count_ -= n_; \
            set_address_register(c, r, RCX, count_); \
            if (!count_ || !(go_on)) \
                NEXT(); \
            if (c->budget <= 0 || atomic_load_explicit(&c->attention, memory_order_relaxed)) { \
                pause_repetition(c, r); \
                return; \
            } \
            c->budget--; \
            c->recent.iterations++; \
            if (unlikely(c->key & KEY_TRACED)) \
                tracer_iteration(c, r); \
        } \
    } while (0)

/* How many elements from `offset` on, at most `most`, lie in host memory that the fast path may touch: on one page, within
 * the segment, without wrapping. 0: not even one, take the general path. *host: the first. */
ALWAYS_INLINE u64 string_window(struct vcpu *c, const struct record *r, unsigned seg, u64 offset, unsigned bytes, u64 most,
                                unsigned access, u8 **host)
{
    const struct segment_check *s = &c->check[seg];
    u64 last = s->high < address_mask(r) ? s->high : address_mask(r);
    if (unlikely(offset < s->low || offset > last || last - offset < bytes - 1 || (s->access & access) != access))
        return 0;
    u64 linear = (s->base + offset) & c->linear_mask, room, in_segment;
    *host = access == ACCESS_WRITE ? fast_linear_write(c, linear, bytes) : (u8 *)fast_linear_read(c, linear, bytes);
    if (unlikely(!*host))
        return 0;
    if (c->rflags & FLAG_DF) {
        room = (linear & 0xfff) / bytes + 1;
        in_segment = (offset - s->low) / bytes + 1;
    } else {
        room = (0x1000 - (linear & 0xfff)) / bytes;
        in_segment = (last - offset) / bytes + ((last - offset) % bytes == bytes - 1);
    }
    if (room > in_segment)
        room = in_segment;
    return room < most ? room : most;
}

/* One element by the general path. */
ALWAYS_INLINE u64 string_load(struct vcpu *c, const struct record *r, unsigned seg, u64 offset, unsigned bytes)
{
    c->now = r;
    return linear_load(c, linear_of(c, r, seg, offset, bytes, ACCESS_READ), bytes);
}
ALWAYS_INLINE void string_store(struct vcpu *c, const struct record *r, u64 offset, unsigned bytes, u64 value)
{
    c->now = r;
    linear_store(c, linear_of(c, r, SEG_ES, offset, bytes, ACCESS_WRITE), bytes, value);
}

#endif
