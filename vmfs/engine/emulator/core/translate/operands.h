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
    if (u->is && u->scratch != NO_REGISTER && u->writes)
        store64(&t->code, guest_place(u->offset), u->scratch);
}

enum { CHANGES = READS_FIRST | WRITES_FIRST };

#endif
