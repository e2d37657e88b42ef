/* Guest memory for handlers.
 *
 * Three ways, from fast to general:
 *   fast_read, fast_write   64-bit mode without FS/GS: a host pointer, or NULL, and then the handler's general form runs
 *   mem_load, mem_store     any mode: an offset in a segment, checked; may escape with a fault, an exit, or to run alone
 *   linear_load, ...        a linear address: for descriptor tables, stacks of gates, string operations
 * A store that escapes has changed nothing: so store first, then set registers and flags. */
#ifndef VMFS_MEMORY_H
#define VMFS_MEMORY_H

#include "state.h"

typedef u16 __attribute__((may_alias, aligned(1))) unaligned_u16;
typedef u32 __attribute__((may_alias, aligned(1))) unaligned_u32;
typedef u64 __attribute__((may_alias, aligned(1))) unaligned_u64;

ALWAYS_INLINE u64 peek(const u8 *p, unsigned bytes)
{
    return bytes == 1 ? *p : bytes == 2 ? *(const unaligned_u16 *)p : bytes == 4 ? *(const unaligned_u32 *)p
                                                                     : *(const unaligned_u64 *)p;
}
ALWAYS_INLINE void poke(u8 *p, unsigned bytes, u64 value)
{
    if (bytes == 1)
        *p = (u8)value;
    else if (bytes == 2)
        *(unaligned_u16 *)p = (u16)value;
    else if (bytes == 4)
        *(unaligned_u32 *)p = (u32)value;
    else
        *(unaligned_u64 *)p = value;
}

/* ---- Slow paths (mmu.c). bytes: 1 to 64. `access` may add ACCESS_SUPERVISOR ----------------------------------------- */

void mmu_read(struct vcpu *c, u64 linear, void *data, unsigned bytes, unsigned access);
void mmu_write(struct vcpu *c, u64 linear, const void *data, unsigned bytes, unsigned access);
u64 mmu_load(struct vcpu *c, u64 linear, unsigned bytes);
void mmu_store(struct vcpu *c, u64 linear, unsigned bytes, u64 value);
/* Clear and set bits of a byte, which the CPU accesses by itself, as one locked access. Returns what it was. */
u8 mmu_change_byte(struct vcpu *c, u64 linear, u8 clear, u8 set);
/* Fault now if a write of those bytes would fault later. */
void mmu_check_write(struct vcpu *c, u64 linear, unsigned bytes, unsigned access);
/* Guest-physical address for an access of one byte; raises #PF at c->now. */
u64 mmu_translate(struct vcpu *c, u64 linear, unsigned access);
/* The same without side effects or faults; false: not mapped. */
bool mmu_probe(struct vcpu *c, u64 linear, u64 *physical);
/* Drop TLB entries: all, of a page, all write tags. */
void tlb_flush(struct vcpu *c);
void tlb_flush_local(struct vcpu *c);           /* all but global pages: the address space changed */
void tlb_flush_page(struct vcpu *c, u64 linear);
void tlb_flush_writes(struct vcpu *c, bool mark); /* mark: log their pages once more */
void tlb_clear(struct vcpu *c);
/* Whether a page that was just fetched from is known to be global. */
ALWAYS_INLINE bool tlb_is_global(const struct vcpu *c, u64 linear)
{
    unsigned at = linear >> 12 & (TLB_SIZE - 1);
    return c->map->execute[at].page == (linear & PAGE_MASK) && c->map->physical[TLB_EXECUTE][at] & TLB_GLOBAL;
}
void tlb_select(struct vcpu *c);
bool load_pdptrs(struct vcpu *c, u64 cr3); /* false: reserved bits set in a present one */
/* Guest-physical memory, by slots; what is not RAM reads as ones. For page tables and the like. */
u64 physical_read(struct vcpu *c, u64 physical, unsigned bytes);
_Noreturn COLD void segment_fault(struct vcpu *c, const struct record *r, unsigned seg);

/* ---- Linear --------------------------------------------------------------------------------------------------------------- */

/* How far it is into the page of the entry decides: an access that crosses a page misses. The host's address waits for the
 * distance alone, not for what decides, and is never NULL, which saves callers the second comparison. */
ALWAYS_INLINE u8 *fast_linear(const struct tlb_entry *e, const struct tlb_distance *d, u64 linear, unsigned bytes)
{
    if (unlikely(linear - e->page > 0x1000 - bytes))
        return NULL;
    u8 *host = (u8 *)(linear + d->distance);
    if (!host)
        __builtin_unreachable();
    return host;
}
ALWAYS_INLINE const u8 *fast_linear_read(const struct vcpu *c, u64 linear, unsigned bytes)
{
    unsigned at = linear >> 12 & (TLB_SIZE - 1);
    return fast_linear(&c->tlb->read[at], &c->tlb->distances[0][at], linear, bytes);
}
ALWAYS_INLINE u8 *fast_linear_write(const struct vcpu *c, u64 linear, unsigned bytes)
{
    unsigned at = linear >> 12 & (TLB_SIZE - 1);
    return fast_linear(&c->tlb->write[at], &c->tlb->distances[1][at], linear, bytes);
}
ALWAYS_INLINE u64 linear_load(struct vcpu *c, u64 linear, unsigned bytes)
{
    const u8 *p = fast_linear_read(c, linear, bytes);
    return likely(p) ? peek(p, bytes) : mmu_load(c, linear, bytes);
}
ALWAYS_INLINE void linear_store(struct vcpu *c, u64 linear, unsigned bytes, u64 value)
{
    u8 *p = fast_linear_write(c, linear, bytes);
    if (likely(p))
        poke(p, bytes, value);
    else
        mmu_store(c, linear, bytes, value);
}

/* ---- Segmented ---------------------------------------------------------------------------------------------------------------- */

/* For accesses, jumps and WRFSBASE. What other registers take: canonical_base. */
ALWAYS_INLINE bool canonical(const struct vcpu *c, u64 linear)
{
    unsigned shift = c->cr4 & CR4_LA57 ? 7 : 16;
    return (u64)((i64)(linear << shift) >> shift) == linear;
}

static const u64 address_masks[4] = {0xff, 0xffff, 0xffffffff, ~0ull};

/* The offset of the memory operand. */
ALWAYS_INLINE u64 offset_of(const struct vcpu *c, const struct record *r)
{
    return (R64(c, r->base) + (R64(c, r->index) << r->scale) + (u64)r->disp) & address_masks[r->prefix & PREFIX_ADDRESS];
}
/* The linear address of `bytes` bytes at an offset in a segment, checked (Intel SDM 3A 5.3, 5.5). */
ALWAYS_INLINE u64 linear_of(struct vcpu *c, const struct record *r, unsigned seg, u64 offset, unsigned bytes,
                            unsigned access)
{
    const struct segment_check *s = &c->check[seg];
    if (unlikely(offset < s->low || offset + (bytes - 1) > s->high || (s->access & access) != access))
        segment_fault(c, r, seg);
    return (s->base + offset) & c->linear_mask;
}

/* Of the memory operand of r. Narrow values are zero-extended. */
ALWAYS_INLINE u64 mem_linear(struct vcpu *c, const struct record *r, unsigned bytes, unsigned access)
{
    c->now = r;
    return linear_of(c, r, r->seg, offset_of(c, r), bytes, access);
}
ALWAYS_INLINE u64 mem_load(struct vcpu *c, const struct record *r, unsigned bytes)
{
    return linear_load(c, mem_linear(c, r, bytes, ACCESS_READ), bytes);
}
ALWAYS_INLINE void mem_store(struct vcpu *c, const struct record *r, unsigned bytes, u64 value)
{
    linear_store(c, mem_linear(c, r, bytes, ACCESS_WRITE), bytes, value);
}
/* Read, modify, write: `u64 at; v = rmw_load(c, r, bytes, &at); ...; linear_store(c, at, bytes, v);` The load faults as
 * a write would. */
ALWAYS_INLINE u64 rmw_load(struct vcpu *c, const struct record *r, unsigned bytes, u64 *at)
{
    *at = mem_linear(c, r, bytes, ACCESS_READ | ACCESS_WRITE);
    const u8 *p = fast_linear_write(c, *at, bytes);
    if (likely(p))
        return peek(p, bytes);
    mmu_check_write(c, *at, bytes, ACCESS_WRITE);
    return linear_load(c, *at, bytes);
}
/* 16 bytes and more. `aligned`: #GP(0) where the address is not a multiple of the size. */
static inline void mem_load_vector(struct vcpu *c, const struct record *r, void *data, unsigned bytes, bool aligned)
{
    u64 at = mem_linear(c, r, bytes, ACCESS_READ);
    if (aligned && unlikely(at & (bytes - 1)))
        raise_error(c, r, VECTOR_GP, 0);
    const u8 *p = fast_linear_read(c, at, bytes);
    if (likely(p))
        memcpy(data, p, bytes);
    else
        mmu_read(c, at, data, bytes, ACCESS_READ);
}
static inline void mem_store_vector(struct vcpu *c, const struct record *r, const void *data, unsigned bytes, bool aligned)
{
    u64 at = mem_linear(c, r, bytes, ACCESS_WRITE);
    if (aligned && unlikely(at & (bytes - 1)))
        raise_error(c, r, VECTOR_GP, 0);
    u8 *p = fast_linear_write(c, at, bytes);
    if (likely(p))
        memcpy(p, data, bytes);
    else
        mmu_write(c, at, data, bytes, ACCESS_WRITE);
}

/* ---- The fast form: 64-bit mode, 64-bit addresses, no FS or GS -------------------------------------------------------------- */

ALWAYS_INLINE u64 fast_address(const struct vcpu *c, const struct record *r)
{
    return R64(c, r->base) + (R64(c, r->index) << r->scale) + (u64)r->disp;
}
ALWAYS_INLINE const u8 *fast_read(const struct vcpu *c, const struct record *r, unsigned bytes)
{
    return fast_linear_read(c, fast_address(c, r), bytes);
}
ALWAYS_INLINE u8 *fast_write(const struct vcpu *c, const struct record *r, unsigned bytes)
{
    return fast_linear_write(c, fast_address(c, r), bytes);
}

/* ---- Stack ---------------------------------------------------------------------------------------------------------------------- */

/* The stack pointer moves only in its low 16, 32 or 64 bits, by SS.B. */
ALWAYS_INLINE void set_sp(struct vcpu *c, u64 sp)
{
    c->gpr[RSP] = c->stack_mask == 0xffffffff ? (u32)sp
                                              : (c->gpr[RSP] & ~c->stack_mask) | (sp & c->stack_mask);
}
ALWAYS_INLINE u64 stack_linear(struct vcpu *c, const struct record *r, u64 sp, unsigned bytes, unsigned access)
{
    c->now = r;
    if (unlikely(c->key & KEY_CODE64 && (!canonical(c, sp) || !canonical(c, sp + bytes - 1)))) /* elsewhere #GP */
        raise_error(c, r, VECTOR_SS, 0);
    return linear_of(c, r, SEG_SS, sp & c->stack_mask, bytes, access);
}
/* One value; commits RSP last. */
ALWAYS_INLINE void push(struct vcpu *c, const struct record *r, unsigned bytes, u64 value)
{
    u64 sp = c->gpr[RSP] - bytes;
    linear_store(c, stack_linear(c, r, sp, bytes, ACCESS_WRITE), bytes, value);
    set_sp(c, sp);
}
/* The value at rSP + offset; the caller moves rSP when nothing can fault any more. */
ALWAYS_INLINE u64 stack_load(struct vcpu *c, const struct record *r, u64 offset, unsigned bytes)
{
    return linear_load(c, stack_linear(c, r, c->gpr[RSP] + offset, bytes, ACCESS_READ), bytes);
}

#endif
