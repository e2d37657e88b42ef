/* For emitters: what a row's operands are in the host. */
#ifndef VMFS_OPERANDS_H
#define VMFS_OPERANDS_H

#include "emit.h"

static inline unsigned bytes_of(const struct record *r, unsigned operand)
{
    unsigned width = operand_types[operand].width;
    return width == WIDTH_V || width == WIDTH_Y ? 1u << r->size : width == WIDTH_X ? 1u << r->vector : width;
}

/* A register operand: in the host's register, or moved to and from a scratch one. */
struct use { bool is; unsigned offset, host, scratch; bool reads, writes, high, byte; };

static inline struct use use_of(unsigned offset, unsigned bytes, unsigned scratch, bool reads, bool writes)
{
    struct use u = {.is = true, .offset = offset, .host = pinned(offset), .scratch = scratch, .reads = reads, .writes = writes};
    u.high = bytes == 1 && offset & 1;
    u.byte = bytes == 1;
    if (u.host == NO_REGISTER) {
        u.host = scratch;
        u.reads |= writes && bytes < 4; /* what it keeps */
    } else {
        u.scratch = NO_REGISTER;
    }
    if (u.high)
        u.host += 4; /* AH to BH */
    return u;
}
static inline void load_use(struct translation *t, const struct use *u)
{
    if (u->is && u->scratch != NO_REGISTER && u->reads)
        load64(&t->code, u->scratch, guest_place(u->offset));
}
static inline void store_use(struct translation *t, const struct use *u)
{
    if (!u->is || u->scratch == NO_REGISTER || !u->writes)
        return;
    store64(&t->code, guest_place(u->offset), u->scratch);
    t->held = (struct held){t->code.at, u->scratch, u->offset};
}
/* What the instruction before left in a scratch register need not be loaded: that one is the operand's. True: it is b's. */
static inline bool take_held(struct translation *t, struct use *a, struct use *b)
{
    if (t->held.at != t->code.at)
        return false;
    bool second = !(a->reads && a->scratch != NO_REGISTER && a->offset == t->held.offset);
    struct use *u = second ? b : a, *other = second ? a : b;
    if (!(u->is && u->reads && u->scratch != NO_REGISTER && u->offset == t->held.offset))
        return false;
    if (other->is && other->scratch == t->held.host)
        other->host = other->scratch = u->scratch;
    u->host = u->scratch = t->held.host;
    u->reads = false;
    return second;
}

enum { CHANGES = READS_FIRST | WRITES_FIRST };

#endif
