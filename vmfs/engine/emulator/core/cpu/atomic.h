/* Guest memory that several CPUs use at the same time: one access of the host for one of the guest.
 *
 * A plain access is one host instruction (peek, poke), and the host's memory order is the guest's. A locked one is a compare and
 * swap at the host's address, which the host allows anywhere. memcpy is neither: it may write a byte twice, and what another CPU has
 * written between is lost. */
#ifndef VMFS_ATOMIC_H
#define VMFS_ATOMIC_H

#include "memory.h"

#define SWAP_IF(type, suffix) do { \
        type before_ = (type)old; \
        __asm__ volatile("lock cmpxchg" suffix " %3, %1" \
                         : "=@ccz"(done), "+m"(*(unaligned_##type *)p), "+a"(before_) : "q"((type)value) : "memory"); \
    } while (0)
typedef u8 unaligned_u8;

/* If `bytes` bytes at p are `old`, they become `value`: as LOCK CMPXCHG does it. */
ALWAYS_INLINE bool compare_and_swap(u8 *p, unsigned bytes, u64 old, u64 value)
{
    bool done;
    if (bytes == 1)
        SWAP_IF(u8, "b");
    else if (bytes == 2)
        SWAP_IF(u16, "w");
    else if (bytes == 4)
        SWAP_IF(u32, "l");
    else
        SWAP_IF(u64, "q");
    return done;
}

/* The same of 16 bytes at a multiple of 16; *old becomes what was there. */
ALWAYS_INLINE bool compare_and_swap_16(u8 *p, u64 old[2], const u64 value[2])
{
    bool done;
    __asm__ volatile("lock cmpxchg16b %1"
                     : "=@ccz"(done), "+m"(*(u8(*)[16])p), "+a"(old[0]), "+d"(old[1]) : "b"(value[0]), "c"(value[1]) : "memory");
    return done;
}

/* Up to 64 bytes to guest memory, each written once; from there. Those of a size that an instruction has are one access. */
static inline void copy_in(u8 *to, const u8 *from, unsigned bytes)
{
    if (bytes == 16 || bytes == 32) {
        for (unsigned i = 0; i < bytes; i += 16) {
            typedef u64 pair __attribute__((vector_size(16), aligned(1), may_alias));
            *(pair *)(to + i) = *(const pair *)(from + i);
        }
    } else if (bytes && bytes <= 8 && !(bytes & (bytes - 1))) {
        poke(to, bytes, peek(from, bytes));
    } else {
        for (unsigned i = 0; i < bytes; i++)
            *(volatile u8 *)(to + i) = from[i];
    }
}

/* `count` elements, upwards: as REP MOVS and REP STOS write them. */
static inline void copy_elements_in(u8 *to, const u8 *from, u64 count, unsigned bytes)
{
    switch (bytes) {
    case 1: __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory"); break;
    case 2: __asm__ volatile("rep movsw" : "+D"(to), "+S"(from), "+c"(count) : : "memory"); break;
    case 4: __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(count) : : "memory"); break;
    default: __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(count) : : "memory"); break;
    }
}
static inline void fill_elements_in(u8 *to, u64 count, unsigned bytes, u64 value)
{
    switch (bytes) {
    case 1: __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory"); break;
    case 2: __asm__ volatile("rep stosw" : "+D"(to), "+c"(count) : "a"(value) : "memory"); break;
    case 4: __asm__ volatile("rep stosl" : "+D"(to), "+c"(count) : "a"(value) : "memory"); break;
    default: __asm__ volatile("rep stosq" : "+D"(to), "+c"(count) : "a"(value) : "memory"); break;
    }
}

/* ---- Locked instructions ----------------------------------------------------------------------------------------------- */

/* An operand that is read, changed and written without another CPU's access between:
 *
 *     struct locked l = lock_operand(c, r, bytes);
 *     do { a = locked_load(c, &l, bytes); ... } while (!locked_store(c, &l, bytes, a, result));
 *     unlock_operand(c, &l);
 *
 * It faults before anything has changed. Where its bytes are on one page of RAM they are compared and swapped; where they are not,
 * and an instruction of one CPU is all that can be done about it, the other CPUs stand meanwhile (world.c). */
struct locked {
    u64 at;                   /* linear */
    u8 *p;                    /* NULL: by the general path */
    bool stood;               /* unlock_operand has something to do */
    struct slot *slot;        /* p is on a page that has code, of which this is: */
    u64 physical;
    unsigned bytes;
};
/* mmu.c. The operand of `bytes` bytes at l->at, for which the TLB has no entry. */
COLD void mmu_lock(struct vcpu *c, struct locked *l, unsigned bytes);
COLD void mmu_unlock(struct vcpu *c, struct locked *l);

ALWAYS_INLINE struct locked lock_at(struct vcpu *c, u64 at, unsigned bytes)
{
    struct locked l = {.at = at, .p = fast_linear_write(c, at, bytes)};
    if (unlikely(!l.p))
        mmu_lock(c, &l, bytes);
    return l;
}
ALWAYS_INLINE struct locked lock_operand(struct vcpu *c, const struct record *r, unsigned bytes)
{
    return lock_at(c, mem_linear(c, r, bytes, ACCESS_READ | ACCESS_WRITE), bytes);
}
ALWAYS_INLINE u64 locked_load(struct vcpu *c, const struct locked *l, unsigned bytes)
{
    return likely(l->p) ? peek(l->p, bytes) : linear_load(c, l->at, bytes);
}
ALWAYS_INLINE bool locked_store(struct vcpu *c, const struct locked *l, unsigned bytes, u64 old, u64 value)
{
    if (likely(l->p))
        return compare_and_swap(l->p, bytes, old, value);
    linear_store(c, l->at, bytes, value);
    return true;
}
ALWAYS_INLINE void unlock_operand(struct vcpu *c, struct locked *l)
{
    if (unlikely(l->stood))
        mmu_unlock(c, l);
}

#endif
