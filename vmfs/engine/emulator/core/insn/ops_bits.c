/* Bit tests, scans, counts; byte order; BMI1 and BMI2; carries apart (ADX). */
#include "atomic.h"
#include "forms.h"

/* ---- BT, BTS, BTR, BTC: CF is the bit; processors leave the undefined flags as they were ------------------------------------------ */

#define BTS_CHANGE(a, mask) ((a) | (mask))
#define BTR_CHANGE(a, mask) ((a) & ~(mask))
#define BTC_CHANGE(a, mask) ((a) ^ (mask))

/* Index in an immediate, or of a register operand: modulo the size. */
#define BIT_CHANGE(op, OPERATION, form, index, bits) \
    OP(op##_##form##_reg_##bits) \
    { \
        u64 n = (index) & (bits - 1), a = get_reg(c, r->rm, bits); \
        set_reg(c, r->rm, bits, OPERATION##_CHANGE(a, 1ull << n)); \
        set_cf(c, a >> n & 1); \
        NEXT(); \
    }
#define BIT_READ(op, form, index, bits, offset) \
    OP(op##_##form##_reg_##bits) { set_cf(c, get_reg(c, r->rm, bits) >> ((index) & (bits - 1)) & 1); NEXT(); } \
    OP(op##_##form##_mem_##bits) \
    { \
        u64 n = (index) & (bits - 1); \
        c->now = r; \
        u64 a = linear_load(c, linear_of(c, r, r->seg, offset, bits / 8, ACCESS_READ), bits / 8); \
        set_cf(c, a >> n & 1); \
        NEXT(); \
    }
#define BIT_MODIFY(op, OPERATION, form, index, bits, offset) \
    OP(op##_##form##_mem_##bits) \
    { \
        u64 n = (index) & (bits - 1); \
        c->now = r; \
        u64 at = linear_of(c, r, r->seg, offset, bits / 8, ACCESS_READ | ACCESS_WRITE), a; \
        if (unlikely(!fast_linear_write(c, at, bits / 8))) \
            mmu_check_write(c, at, bits / 8, ACCESS_WRITE); \
        a = linear_load(c, at, bits / 8); \
        linear_store(c, at, bits / 8, OPERATION##_CHANGE(a, 1ull << n)); \
        set_cf(c, a >> n & 1); \
        NEXT(); \
    } \
    OP(op##_##form##_lock_##bits) \
    { \
        u64 n = (index) & (bits - 1), a; \
        c->now = r; \
        struct locked l = lock_at(c, linear_of(c, r, r->seg, offset, bits / 8, ACCESS_READ | ACCESS_WRITE), bits / 8); \
        do \
            a = locked_load(c, &l, bits / 8); \
        while (!locked_store(c, &l, bits / 8, a, OPERATION##_CHANGE(a, 1ull << n))); \
        unlock_operand(c, &l); \
        set_cf(c, a >> n & 1); \
        NEXT(); \
    }
/* A register indexes a bit string: signed, beyond the operand, wrapping with the address size (Intel SDM 1 3.1.1.9). */
ALWAYS_INLINE u64 string_offset(const struct vcpu *c, const struct record *r, unsigned bits)
{
    i64 index = sign_extend(get_reg(c, r->reg, bits), bits);
    u64 bytes = (u64)(index >> (bits == 16 ? 4 : bits == 32 ? 5 : 6)) * (bits / 8);
    return (offset_of(c, r) + bytes) & address_masks[r->prefix & PREFIX_ADDRESS];
}
#define INDEX_G(bits) get_reg(c, r->reg, bits)
#define INDEX_I(bits) (u64)(unsigned)r->imm
#define BT_SIZE(bits) \
    BIT_READ(bt, E_G, INDEX_G(bits), bits, string_offset(c, r, bits)) BIT_READ(bt, E_I, INDEX_I(bits), bits, offset_of(c, r))
#define BT_OTHER_SIZE(op, OPERATION, bits) \
    BIT_CHANGE(op, OPERATION, E_G, INDEX_G(bits), bits) BIT_CHANGE(op, OPERATION, E_I, INDEX_I(bits), bits) \
    BIT_MODIFY(op, OPERATION, E_G, INDEX_G(bits), bits, string_offset(c, r, bits)) \
    BIT_MODIFY(op, OPERATION, E_I, INDEX_I(bits), bits, offset_of(c, r))
#define SLOW_TABLE(name) \
    const struct handlers H_##name = {{NULL, name##_reg_16, name##_reg_32, name##_reg_64}, \
        {NULL, name##_mem_16, name##_mem_32, name##_mem_64}, {NULL, name##_mem_16, name##_mem_32, name##_mem_64}}
#define BT_TABLES(op) SLOW_TABLE(op##_E_G); SLOW_TABLE(op##_E_I);
#define BIT_TABLE(name) \
    const struct handlers H_##name = {{NULL, name##_reg_16, name##_reg_32, name##_reg_64}, \
        {NULL, name##_mem_16, name##_mem_32, name##_mem_64}, {NULL, name##_mem_16, name##_mem_32, name##_mem_64}, \
        {NULL, name##_lock_16, name##_lock_32, name##_lock_64}}
#define BT_OTHER(op, OPERATION) \
    BT_OTHER_SIZE(op, OPERATION, 16) BT_OTHER_SIZE(op, OPERATION, 32) BT_OTHER_SIZE(op, OPERATION, 64) \
    BIT_TABLE(op##_E_G); BIT_TABLE(op##_E_I);
BT_SIZE(16)
BT_SIZE(32)
BT_SIZE(64)
BT_TABLES(bt)
BT_OTHER(bts, BTS)
BT_OTHER(btr, BTR)
BT_OTHER(btc, BTC)

/* ---- Scans and counts ----------------------------------------------------------------------------------------------------------------- */

/* A source of zero leaves the destination as it was, high half and all: AMD's manual says so, and Intel's processors do. ZF
 * is all that is defined; on Intel's processors PF follows the result, and the others are 0. */
#define SCAN(name, expression) \
    ALWAYS_INLINE void name(struct vcpu *c, const struct record *r, u64 e, unsigned bits) \
    { \
        if (e) \
            set_reg(c, r->reg, bits, (u64)(expression)); \
        c->carries = 0; \
        c->sf = e ? (u64)(expression) : 0; \
        c->zf = e; \
    } \
    READ_FORMS_V(name)
SCAN(bsf, __builtin_ctzll(e))
SCAN(bsr, 63 - __builtin_clzll(e))

ALWAYS_INLINE void popcnt(struct vcpu *c, const struct record *r, u64 e, unsigned bits)
{
    set_reg(c, r->reg, bits, (u64)__builtin_popcountll(e));
    c->carries = 0;
    c->zf = e;
    c->sf = 1; /* SF and PF are 0 */
}
READ_FORMS_V(popcnt)

/* CF: the source is 0; ZF: the count is. The others are undefined: 0. */
#define COUNT_ZEROS(name, expression) \
    ALWAYS_INLINE void name(struct vcpu *c, const struct record *r, u64 e, unsigned bits) \
    { \
        u64 count = e ? (u64)(expression) : bits; \
        set_reg(c, r->reg, bits, count); \
        c->carries = e ? 0 : CARRY_TOP | CARRY_TOP >> 1; \
        c->sf = 1; \
        c->zf = count; \
    } \
    READ_FORMS_V(name)
COUNT_ZEROS(tzcnt, __builtin_ctzll(e))
COUNT_ZEROS(lzcnt, __builtin_clzll(e) - (64 - (int)bits))

/* ---- Byte order ------------------------------------------------------------------------------------------------------------------------- */

ALWAYS_INLINE u64 swap_bytes(u64 value, unsigned bits)
{
    return bits == 16 ? __builtin_bswap16((u16)value) : bits == 32 ? __builtin_bswap32((u32)value) : __builtin_bswap64(value);
}
/* BSWAP of 16 bits is undefined; processors clear the register's low half. */
OP(bswap_16) { set_reg(c, r->rm, 16, 0); NEXT(); }
OP(bswap_32) { set_reg(c, r->rm, 32, swap_bytes(get_reg(c, r->rm, 32), 32)); NEXT(); }
OP(bswap_64) { set_reg(c, r->rm, 64, swap_bytes(get_reg(c, r->rm, 64), 64)); NEXT(); }
const struct handlers H_bswap = {.reg = {NULL, bswap_16, bswap_32, bswap_64}};

#define MOVBE_SIZE(bits) \
    OP(movbe_G_M_##bits) { set_reg(c, r->reg, bits, swap_bytes(mem_load(c, r, bits / 8), bits)); NEXT(); } \
    OP(movbe_M_G_##bits) { mem_store(c, r, bits / 8, swap_bytes(get_reg(c, r->reg, bits), bits)); NEXT(); }
MOVBE_SIZE(16)
MOVBE_SIZE(32)
MOVBE_SIZE(64)
#define MEMORY_TABLE(name) {.fast = {NULL, name##_16, name##_32, name##_64}, .mem = {NULL, name##_16, name##_32, name##_64}}
const struct handlers H_movbe_G_M = MEMORY_TABLE(movbe_G_M);
const struct handlers H_movbe_M_G = MEMORY_TABLE(movbe_M_G);

/* ---- ADX: an addition whose carry in and out is CF only, or OF only -------------------------------------------------------------------- */

#define ADD_CARRY(name, flag) \
    ALWAYS_INLINE void name(struct vcpu *c, const struct record *r, u64 e, unsigned bits) \
    { \
        unsigned __int128 sum = (unsigned __int128)get_reg(c, r->reg, bits) + e + flag_##flag(c); \
        set_reg(c, r->reg, bits, truncate_to((u64)sum, bits)); \
        set_##flag(c, (u64)(sum >> bits)); \
    } \
    READ_FORMS_Y(name)
ADD_CARRY(adcx, cf)
ADD_CARRY(adox, of)

/* ---- BMI1, BMI2. `v` is the register in VEX.vvvv -------------------------------------------------------------------------------- */

/* AF and PF are undefined: 0, as on Intel's processors; so is SF of BEXTR. On AMD's, PF is that of the result, and AF of BEXTR is 1. */
#define BMI(name, destination, value, carry, sign) \
    ALWAYS_INLINE void name##_for(struct vcpu *c, const struct record *r, u64 e, unsigned bits, bool amd) \
    { \
        u64 v = get_reg(c, r->vvvv * 8u, bits), result = truncate_to(value, bits); \
        (void)v; \
        set_reg(c, destination, bits, result); \
        set_carries(c, carry, 0, !(sign) && amd); \
        set_result(c, result, bits); \
        c->sf = (c->sf & (sign)) | (amd ? (u8)result : 1); \
    } \
    READ_BY_MAKER(READ_FORMS_Y, name)
BMI(andn, r->reg, ~v & e, 0, CARRY_TOP)
BMI(blsr, r->vvvv * 8u, e & (e - 1), !e, CARRY_TOP)
BMI(blsmsk, r->vvvv * 8u, e ^ (e - 1), !e, CARRY_TOP)
BMI(blsi, r->vvvv * 8u, e & (0 - e), !!e, CARRY_TOP)
BMI(bextr, r->reg, ((v & 0xff) < bits ? e >> (v & 63) : 0) & ((v >> 8 & 0xff) < 64 ? (1ull << (v >> 8 & 63)) - 1 : ~0ull), 0, 0)
BMI(bzhi, r->reg, (v & 0xff) < bits ? e & ((1ull << (v & 63)) - 1) : e, (v & 0xff) >= bits, CARRY_TOP)

static u64 deposit(u64 source, u64 mask)
{
    u64 result = 0;
    for (; mask; mask &= mask - 1, source >>= 1)
        if (source & 1)
            result |= mask & (0 - mask);
    return result;
}
static u64 extract(u64 source, u64 mask)
{
    u64 result = 0;
    for (unsigned n = 0; mask; mask &= mask - 1, n++)
        result |= (u64)!!(source & mask & (0 - mask)) << n;
    return result;
}
#define BY_MASK(name, function) \
    ALWAYS_INLINE void name(struct vcpu *c, const struct record *r, u64 e, unsigned bits) \
    { \
        set_reg(c, r->reg, bits, function(get_reg(c, r->vvvv * 8u, bits), e)); \
    } \
    READ_FORMS_Y(name)
BY_MASK(pdep, deposit)
BY_MASK(pext, extract)
