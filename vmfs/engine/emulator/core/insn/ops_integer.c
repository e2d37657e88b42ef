/* The integer instructions that belong to no larger family: decimal arithmetic, flags, CMPXCHG8B, BOUND, random numbers. */
#include <sys/random.h>

#include "atomic.h"
#include "forms.h"

/* ---- Decimal (Intel SDM 2A AAA, AAD, AAM, AAS, DAA, DAS) ----------------------------------------------------------------------- */

#define AL_OF(c) ((u8)(c)->gpr[RAX])

static void decimal_adjust(struct vcpu *c, bool subtract)
{
    u8 before = AL_OF(c), al = before;
    bool low = (before & 15) > 9 || flag_af(c), high = before > 0x99 || flag_cf(c), cf = high;
    u8 correction = (low ? 6 : 0) + (high ? 0x60 : 0);
    al = subtract ? al - correction : al + correction;
    if (subtract && low && before < 6)
        cf = true; /* the borrow of the first step */
    set_reg(c, RAX * 8, 8, al);
    set_result(c, al, 8);
    set_carries(c, cf, 0, low);
}
OP(op_daa) { decimal_adjust(c, false); NEXT(); }
OP(op_das) { decimal_adjust(c, true); NEXT(); }
HANDLER(daa);
HANDLER(das);

static void ascii_adjust(struct vcpu *c, bool subtract)
{
    bool adjust = (c->gpr[RAX] & 15) > 9 || flag_af(c);
    u16 ax = (u16)c->gpr[RAX];
    if (adjust)
        ax = subtract ? ax - 0x106 : ax + 0x106;
    ax &= 0xff0f;
    set_reg(c, RAX * 8, 16, ax);
    set_result(c, ax, 8);
    set_carries(c, adjust, 0, adjust);
}
OP(op_aaa) { ascii_adjust(c, false); NEXT(); }
OP(op_aas) { ascii_adjust(c, true); NEXT(); }
HANDLER(aaa);
HANDLER(aas);

OP(op_aam)
{
    u8 base = (u8)r->imm, al = AL_OF(c);
    if (!base)
        raise_fault(c, r, VECTOR_DE);
    set_reg(c, RAX * 8, 16, (u64)(al / base) << 8 | al % base);
    flags_logic(c, al % base, 8);
    NEXT();
}
OP(op_aad)
{
    u8 al = (u8)(AL_OF(c) + (u8)(c->gpr[RAX] >> 8) * (u8)r->imm);
    set_reg(c, RAX * 8, 16, al);
    flags_logic(c, al, 8);
    NEXT();
}
HANDLER(aam);
HANDLER(aad);

/* Undocumented by Intel until 2023, in every processor: AL = CF ? FF : 0. */
OP(op_salc) { set_reg(c, RAX * 8, 8, flag_cf(c) ? 0xff : 0); NEXT(); }
HANDLER(salc);

/* ---- Flags ------------------------------------------------------------------------------------------------------------------------ */

enum { AH_FLAGS = FLAG_SF | FLAG_ZF | FLAG_AF | FLAG_PF | FLAG_CF };
OP(op_lahf) { R8(c, RAX * 8 + 1) = (u8)((get_arithmetic_flags(c) & AH_FLAGS) | 2); NEXT(); }
OP(op_sahf)
{
    set_arithmetic_flags(c, (R8(c, RAX * 8 + 1) & AH_FLAGS) | flag_of(c) * FLAG_OF);
    NEXT();
}
OP(op_cmc) { set_cf(c, !flag_cf(c)); NEXT(); }
OP(op_clc) { set_cf(c, 0); NEXT(); }
OP(op_stc) { set_cf(c, 1); NEXT(); }
OP(op_cld) { c->rflags &= ~(u64)FLAG_DF; NEXT(); }
OP(op_std) { c->rflags |= FLAG_DF; NEXT(); }
HANDLER(lahf);
HANDLER(sahf);
HANDLER(cmc);
HANDLER(clc);
HANDLER(stc);
HANDLER(cld);
HANDLER(std);

/* ---- CMPXCHG8B, CMPXCHG16B (Intel SDM 2A): the memory is written in any case; only ZF changes ------------------------------------------- */

OP(cmpxchg8b)
{
    u64 at, e = rmw_load(c, r, 8, &at), a = (u64)R32(c, RDX * 8) << 32 | R32(c, RAX * 8);
    bool equal = a == e;
    linear_store(c, at, 8, equal ? (u64)R32(c, RCX * 8) << 32 | R32(c, RBX * 8) : e);
    if (!equal) {
        set_reg(c, RAX * 8, 32, e);
        set_reg(c, RDX * 8, 32, e >> 32);
    }
    c->zf = !equal;
    NEXT();
}
OP(cmpxchg8b_lock)
{
    struct locked l = lock_operand(c, r, 8);
    u64 a = (u64)R32(c, RDX * 8) << 32 | R32(c, RAX * 8), b = (u64)R32(c, RCX * 8) << 32 | R32(c, RBX * 8), e;
    do
        e = locked_load(c, &l, 8);
    while (!locked_store(c, &l, 8, e, a == e ? b : e));
    unlock_operand(c, &l);
    if (a != e) {
        set_reg(c, RAX * 8, 32, e);
        set_reg(c, RDX * 8, 32, e >> 32);
    }
    c->zf = a != e;
    NEXT();
}
static void __attribute__((noinline)) compare_exchange_16(struct vcpu *c, const struct record *r)
{
    if (!has_feature(c, FEATURE_CX16))
        raise_fault(c, r, VECTOR_UD);
    u64 at = mem_linear(c, r, 16, ACCESS_READ | ACCESS_WRITE), e[2];
    if (at & 15)
        raise_error(c, r, VECTOR_GP, 0);
    struct locked l = {.at = at};
    if (r->prefix & PREFIX_LOCK && c->key & KEY_SHARED)
        l = lock_at(c, at, 16);
    else if (!fast_linear_write(c, at, 16))
        mmu_check_write(c, at, 16, ACCESS_WRITE);
    bool equal;
    if (l.p) {
        e[0] = c->gpr[RAX], e[1] = c->gpr[RDX];
        equal = compare_and_swap_16(l.p, e, (u64[2]){c->gpr[RBX], c->gpr[RCX]});
    } else {
        mmu_read(c, at, e, 16, ACCESS_READ);
        equal = e[0] == c->gpr[RAX] && e[1] == c->gpr[RDX];
        u64 value[2] = {equal ? c->gpr[RBX] : e[0], equal ? c->gpr[RCX] : e[1]};
        mmu_write(c, at, value, 16, ACCESS_WRITE);
    }
    unlock_operand(c, &l);
    if (!equal) {
        c->gpr[RAX] = e[0];
        c->gpr[RDX] = e[1];
    }
    c->zf = !equal;
}
OP(cmpxchg16b) { compare_exchange_16(c, r); NEXT(); }
const struct handlers H_cmpxchg8b = {.fast = {NULL, NULL, cmpxchg8b, cmpxchg16b}, .mem = {NULL, NULL, cmpxchg8b, cmpxchg16b},
                                     .lock = {NULL, NULL, cmpxchg8b_lock, cmpxchg16b}};

/* ---- BOUND: #BR unless the signed index is within the two bounds, inclusive ------------------------------------------------------------- */

#define BOUND_SIZE(bits) \
    OP(bound_##bits) \
    { \
        u64 at = mem_linear(c, r, bits / 4, ACCESS_READ); \
        i64 low = sign_extend(linear_load(c, at, bits / 8), bits); \
        i64 high = sign_extend(linear_load(c, (at + bits / 8) & c->linear_mask, bits / 8), bits); \
        i64 index = sign_extend(get_reg(c, r->reg, bits), bits); \
        if (index < low || index > high) \
            raise_fault(c, r, VECTOR_BR); \
        NEXT(); \
    }
BOUND_SIZE(16)
BOUND_SIZE(32)
const struct handlers H_bound = {.mem = {NULL, bound_16, bound_32}};

/* ---- RDRAND, RDSEED ------------------------------------------------------------------------------------------------------------------------ */

/* With the host's time: the host's random numbers. In deterministic mode: a hash of the guest's TSC, which differs at each
 * instruction and is part of the state that snapshots carry, so the same run gives the same numbers. */
static u64 random_number(struct vcpu *c, const struct record *r)
{
    u64 x;
    if (c->vm->time == TIME_HOST && getrandom(&x, sizeof x, 0) == sizeof x)
        return x;
    x = read_tsc(c, r) * 0x9e3779b97f4a7c15 + c->index; /* the 64-bit golden ratio; then an invertible mixer */
    for (unsigned i = 0; i < 3; i++) {
        x ^= x >> 32;
        x *= 0xd6e8feb86659fd93;
    }
    return x ^ x >> 32;
}
#define RDRAND_SIZE(bits) \
    OP(rdrand_##bits) \
    { \
        set_reg(c, r->rm, bits, random_number(c, r)); \
        set_arithmetic_flags(c, FLAG_CF); /* always ready */ \
        NEXT(); \
    }
RDRAND_SIZE(16)
RDRAND_SIZE(32)
RDRAND_SIZE(64)
const struct handlers H_rdrand = {.reg = {NULL, rdrand_16, rdrand_32, rdrand_64}};
