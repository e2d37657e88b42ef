/* The six arithmetic flags, kept in a form that no operation needs to know of another:
 *
 *   zf       ZF is zf == 0
 *   sf       SF is bit 63; PF is the parity of bits 7:0
 *   carries  the carry out of each bit: CF is bit 63, OF is bit 63 xor bit 62, AF is bit 3
 *
 * Results are stored sign-extended to 64 bits in both zf and sf; the carry vector of an n-bit operation is
 * stored twice, shifted to the top for CF and OF, and in place for AF. */
#ifndef VMFS_FLAGS_H
#define VMFS_FLAGS_H

#include "state.h"

/* Undefined flags are the host's, since host code leaves them as its instructions do (translate/): AMD's, else Intel's. */
extern bool amd_flags;

/* The carry out of each bit of x + y (+ carry in) = z. For a difference x - y = z: carry_out(z, y, x). */
ALWAYS_INLINE u64 carry_out(u64 x, u64 y, u64 z) { return (x & y) | ((x | y) & ~z); }

ALWAYS_INLINE u64 spread_carries(u64 carries, unsigned bits)
{
    return bits == 64 ? carries : carries | carries << (64 - bits);
}

ALWAYS_INLINE void set_result(struct vcpu *c, u64 result, unsigned bits)
{
    u64 extended = (u64)sign_extend(result, bits);
    c->zf = extended;
    c->sf = extended;
}

/* Operands and result are zero-extended. */
ALWAYS_INLINE void flags_add(struct vcpu *c, u64 a, u64 b, u64 result, unsigned bits)
{
    c->carries = spread_carries(carry_out(a, b, result), bits);
    set_result(c, result, bits);
}
ALWAYS_INLINE void flags_sub(struct vcpu *c, u64 a, u64 b, u64 result, unsigned bits)
{
    c->carries = spread_carries(carry_out(result, b, a), bits);
    set_result(c, result, bits);
}
ALWAYS_INLINE void flags_logic(struct vcpu *c, u64 result, unsigned bits)
{
    c->carries = 0; /* AF is undefined; processors clear it */
    set_result(c, result, bits);
}

#define CARRY_TOP (1ull << 63)

/* New CF, OF, AF at once; each 0 or 1. */
ALWAYS_INLINE void set_carries(struct vcpu *c, u64 cf, u64 of, u64 af)
{
    c->carries = cf << 63 | (cf ^ of) << 62 | af << 3;
}
/* OF and AF from `carries`, CF as it was. */
ALWAYS_INLINE void flags_keep_cf(struct vcpu *c, u64 carries)
{
    u64 cf = c->carries & CARRY_TOP, of = (carries ^ carries << 1) & CARRY_TOP;
    c->carries = (carries & 8) | cf | (cf ^ of) >> 1;
}

ALWAYS_INLINE u64 flag_cf(const struct vcpu *c) { return c->carries >> 63; }
ALWAYS_INLINE u64 flag_of(const struct vcpu *c) { return (c->carries ^ c->carries << 1) >> 63; }
ALWAYS_INLINE u64 flag_af(const struct vcpu *c) { return c->carries >> 3 & 1; }
ALWAYS_INLINE u64 flag_zf(const struct vcpu *c) { return c->zf == 0; }
ALWAYS_INLINE u64 flag_sf(const struct vcpu *c) { return c->sf >> 63; }
ALWAYS_INLINE u64 flag_pf(const struct vcpu *c) { return !__builtin_parity((u8)c->sf); }

/* Condition n of Jcc, SETcc, CMOVcc (Intel SDM 1 appendix B). */
ALWAYS_INLINE bool condition(const struct vcpu *c, unsigned n)
{
    bool truth;
    switch (n >> 1) {
    case 0: truth = (i64)(c->carries ^ c->carries << 1) < 0; break;
    case 1: truth = (i64)c->carries < 0; break;
    case 2: truth = c->zf == 0; break;
    case 3: truth = (i64)c->carries < 0 || c->zf == 0; break;
    case 4: truth = (i64)c->sf < 0; break;
    case 5: truth = flag_pf(c); break;
    case 6: truth = (i64)(c->sf ^ c->carries ^ c->carries << 1) < 0; break;
    default: truth = (i64)(c->sf ^ c->carries ^ c->carries << 1) < 0 || c->zf == 0; break;
    }
    return truth ^ (n & 1);
}

ALWAYS_INLINE u64 get_arithmetic_flags(const struct vcpu *c)
{
    return flag_cf(c) * FLAG_CF | flag_pf(c) * FLAG_PF | flag_af(c) * FLAG_AF | flag_zf(c) * FLAG_ZF |
           flag_sf(c) * FLAG_SF | flag_of(c) * FLAG_OF;
}
ALWAYS_INLINE void set_arithmetic_flags(struct vcpu *c, u64 flags)
{
    c->zf = !(flags & FLAG_ZF);
    c->sf = (flags & FLAG_SF ? CARRY_TOP : 0) | !(flags & FLAG_PF);
    set_carries(c, !!(flags & FLAG_CF), !!(flags & FLAG_OF), !!(flags & FLAG_AF));
}
ALWAYS_INLINE u64 get_rflags(const struct vcpu *c) { return c->rflags | get_arithmetic_flags(c) | 2; }
/* All of RFLAGS. The caller sees to flags_changed. */
ALWAYS_INLINE void set_rflags(struct vcpu *c, u64 flags)
{
    set_arithmetic_flags(c, flags);
    c->rflags = (flags & ~(u64)FLAGS_ARITHMETIC) | 2;
}

#endif
