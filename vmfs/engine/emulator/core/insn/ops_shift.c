/* Shifts and rotates (Intel SDM 2B "RCL/RCR/ROL/ROR", "SAL/SAR/SHL/SHR", "SHLD", "SHRD"; SARX, SHLX, SHRX, RORX).
 *
 * The count is masked to 5 bits, 6 for 64-bit operands. A count of zero writes the operand back and keeps all flags.
 * Where OF is undefined (counts other than 1) it is what the host's processor makes it, whose own instruction host code is
 * (translate/). Each operation has a form for either maker, of which the decoder takes one; `amd` is a constant in it.
 * Intel's: that of a shift by one, of the operand as it was before; ROL and ROR of a register by a constant, and
 * RCL and RCR by the whole width, keep it. AMD's: that of the last of so many shifts by one. AF after a shift is 0 on Intel's, 1 on AMD's. */
#include "forms.h"

/* The new `carries` (flags.h): bit 63 is CF, bit 62 is CF xor OF. */
struct shift { u64 carries; bool none, keeps; };

ALWAYS_INLINE u64 top_bit(u64 value, unsigned bits) { return value >> (bits - 1) & 1; }

/* OF of a shift or rotation to the left by one: the top bit changes. */
ALWAYS_INLINE u64 first_overflow(u64 a, unsigned bits) { return (a >> (bits - 1) ^ a >> (bits - 2)) & 1; }

/* OF after it, where `value` is the result: that of a shift or rotation to the left; to the right. */
ALWAYS_INLINE u64 last_overflow(u64 value, u64 cf, unsigned bits) { return (value >> (bits - 1) ^ cf) & 1; }
ALWAYS_INLINE u64 last_right_overflow(u64 value, unsigned bits) { return first_overflow(value, bits); }
/* By one they are the same, and the latter is less to do. */
#define OVERFLOW(n, first, last) (amd || (__builtin_constant_p(n) && (n) == 1) ? (last) : (first))
ALWAYS_INLINE u64 shift_carries(u64 cf, u64 of, bool amd) { return cf << 63 | (cf ^ of) << 62 | (u64)amd << 3; }

/* n modulo bits. The wide ones are written so that gcc knows them as one instruction. */
ALWAYS_INLINE u64 rotate_right(u64 a, unsigned n, unsigned bits)
{
    n %= bits;
    if (bits == 64)
        return a >> n | a << (-n & 63);
    if (bits == 32)
        return (u32)a >> n | (u32)a << (-n & 31);
    return truncate_to(a >> n | a << (bits - n), bits);
}

/* Each: a is zero-extended, n from 1 to 31 (63). For SHL, the two bits over the result's rest are CF and, of AMD's form, CF xor OF. */
ALWAYS_INLINE u64 shl(const struct vcpu *c, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    u64 value = truncate_to(a << n, bits), top = (a << (64 - bits)) << (n - 1);
    (void)c;
    if (amd)
        s->carries = (top & 3ull << 62) | 8;
    else
        s->carries = shift_carries(top >> 63, first_overflow(a, bits), false);
    return value;
}
ALWAYS_INLINE u64 shr(const struct vcpu *c, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    u64 before = a >> (n - 1);
    (void)c;
    if (amd) { /* CF and OF in bits 63 and 62 */
        u64 both = bits == 64 ? rotate_right(before, 1, 64) : before << 63 | before >> (bits - 1) << 62;
        s->carries = ((both ^ both >> 1) & 3ull << 62) | 8;
    } else {
        s->carries = shift_carries(before & 1, top_bit(a, bits), false);
    }
    return a >> n;
}
ALWAYS_INLINE u64 sar(const struct vcpu *c, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    i64 before = sign_extend(a, bits) >> (n - 1);
    (void)c;
    s->carries = shift_carries((u64)before & 1, 0, amd);
    return truncate_to((u64)(before >> 1), bits);
}
ALWAYS_INLINE u64 rol(const struct vcpu *c, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    u64 value = rotate_right(a, bits - n % bits, bits);
    u64 of = OVERFLOW(n, s->keeps ? flag_of(c) : first_overflow(a, bits), last_overflow(value, value, bits));
    s->carries = value << 63 | ((value ^ of) & 1) << 62 | (c->carries & 8);
    return value;
}
ALWAYS_INLINE u64 ror(const struct vcpu *c, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    u64 value = rotate_right(a, n, bits);
    u64 cf = top_bit(value, bits);
    u64 of = OVERFLOW(n, s->keeps ? flag_of(c) : top_bit(a, bits) ^ (a & 1), last_right_overflow(value, bits));
    s->carries = cf << 63 | (cf ^ of) << 62 | (c->carries & 8);
    return value;
}
/* Through CF: of bits + 1 bits; for 8 and 16 bits the count is taken modulo 9 and 17. */
ALWAYS_INLINE u64 rcl(const struct vcpu *c, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    if (bits < 32)
        n %= bits + 1;
    if (!n) {
        u64 cf = flag_cf(c);
        s->carries = !amd ? c->carries : cf << 63 | (cf ^ last_overflow(a, cf, bits)) << 62 | (c->carries & 8);
        return a;
    }
    u64 value = truncate_to(a << n | flag_cf(c) << (n - 1) | (n > 1 ? a >> (bits + 1 - n) : 0), bits);
    u64 cf = a >> (bits - n) & 1;
    u64 of = OVERFLOW(n, first_overflow(a, bits), last_overflow(value, cf, bits));
    s->carries = cf << 63 | (cf ^ of) << 62 | (c->carries & 8);
    return value;
}
ALWAYS_INLINE u64 rcr(const struct vcpu *c, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    if (bits < 32)
        n %= bits + 1;
    u64 value = a, cf = flag_cf(c);
    if (!n) {
        s->carries = !amd ? c->carries : cf << 63 | (cf ^ last_right_overflow(a, bits)) << 62 | (c->carries & 8);
    } else {
        value = truncate_to(a >> n | cf << (bits - n) | (n > 1 ? a << (bits + 1 - n) : 0), bits);
        u64 of = OVERFLOW(n, top_bit(a, bits) ^ cf, last_right_overflow(value, bits));
        cf = a >> (n - 1) & 1;
        s->carries = cf << 63 | (cf ^ of) << 62 | (c->carries & 8);
    }
    return value;
}

#define KEEPS_1 false
#define KEEPS_I (r->prefix & PREFIX_REGISTER)
#define KEEPS_CL false
#define COUNT_1(bits) 1u
#define COUNT_I(bits) ((unsigned)r->imm & ((bits) == 64 ? 63 : 31))
#define COUNT_CL(bits) (R8(c, RCX * 8) & ((bits) == 64 ? 63u : 31u))

#define SHIFT_FORM(name, op, count, amd, finish) \
    struct name##_state { struct shift shift; }; \
    ALWAYS_INLINE u64 name(const struct vcpu *c, const struct record *r, u64 a, unsigned bits, struct name##_state *state) \
    { \
        unsigned n = COUNT_##count(bits); \
        (void)r; \
        state->shift = (struct shift){.none = !n, .keeps = KEEPS_##count && n != 1}; \
        return n ? op(c, a, n, bits, amd, &state->shift) : a; \
    } \
    ALWAYS_INLINE void name##_done(struct vcpu *c, const struct name##_state *state, u64 value, unsigned bits) \
    { \
        (void)value, (void)bits; \
        if (unlikely(state->shift.none)) \
            return; \
        c->carries = state->shift.carries; \
        finish; \
    }
#define SHIFT(op, count, finish) \
    SHIFT_FORM(op##_##count##_amd, op, count, true, finish) \
    CHANGE_FORMS(op##_##count##_amd) \
    SHIFT_FORM(op##_##count, op, count, false, finish) \
    CHANGE_FORMS(op##_##count, .amd = &H_##op##_##count##_amd)
#define SHIFT_COUNTS(op, finish) SHIFT(op, 1, finish) SHIFT(op, I, finish) SHIFT(op, CL, finish)

SHIFT_COUNTS(rol, )
SHIFT_COUNTS(ror, )
SHIFT_COUNTS(rcl, )
SHIFT_COUNTS(rcr, )
SHIFT_COUNTS(shl, set_result(c, value, bits))
SHIFT_COUNTS(shr, set_result(c, value, bits))
SHIFT_COUNTS(sar, set_result(c, value, bits))

/* ---- SHLD, SHRD -------------------------------------------------------------------------------------------------------- */

/* With 16 bits and a count over 16 the result is undefined; here as processors do it: the bits that follow those of the
 * second operand are the first operand again. */
ALWAYS_INLINE u64 shld(const struct vcpu *c, const struct record *r, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    u64 b = get_reg(c, r->reg, bits), value, cf;
    if (bits == 16) {
        u64 all = a << 32 | b << 16 | a;
        value = all << n >> 32 & 0xffff;
        cf = all >> (48 - n) & 1;
    } else {
        value = truncate_to(a << n | b >> (bits - n), bits);
        cf = a >> (bits - n) & 1;
    }
    s->carries = shift_carries(cf, OVERFLOW(n, first_overflow(a, bits), last_overflow(value, cf, bits)), amd);
    return value;
}
ALWAYS_INLINE u64 shrd(const struct vcpu *c, const struct record *r, u64 a, unsigned n, unsigned bits, bool amd, struct shift *s)
{
    u64 b = get_reg(c, r->reg, bits), value, cf;
    if (bits == 16) {
        u64 all = a << 32 | b << 16 | a;
        value = all >> n & 0xffff;
        cf = all >> (n - 1) & 1;
    } else {
        value = truncate_to(a >> n | b << (bits - n), bits);
        cf = a >> (n - 1) & 1;
    }
    s->carries = shift_carries(cf, OVERFLOW(n, top_bit(a, bits) ^ (b & 1), last_right_overflow(value, bits)), amd);
    return value;
}
#define DOUBLE_SHIFT_FORM(name, op, count, amd) \
    struct name##_state { struct shift shift; }; \
    ALWAYS_INLINE u64 name(const struct vcpu *c, const struct record *r, u64 a, unsigned bits, struct name##_state *state) \
    { \
        unsigned n = COUNT_##count(bits); \
        state->shift.none = !n; \
        return n ? op(c, r, a, n, bits, amd, &state->shift) : a; \
    } \
    ALWAYS_INLINE void name##_done(struct vcpu *c, const struct name##_state *state, u64 value, unsigned bits) \
    { \
        if (unlikely(state->shift.none)) \
            return; \
        c->carries = state->shift.carries; \
        set_result(c, value, bits); \
    }
#define DOUBLE_SHIFT(op, count) \
    DOUBLE_SHIFT_FORM(op##_##count##_amd, op, count, true) \
    CHANGE_FORMS_V(op##_##count##_amd) \
    DOUBLE_SHIFT_FORM(op##_##count, op, count, false) \
    CHANGE_FORMS_V(op##_##count, .amd = &H_##op##_##count##_amd)
DOUBLE_SHIFT(shld, I)
DOUBLE_SHIFT(shld, CL)
DOUBLE_SHIFT(shrd, I)
DOUBLE_SHIFT(shrd, CL)

/* ---- BMI2: no flags ---------------------------------------------------------------- */

#define SHIFT_X(name, expression) \
    ALWAYS_INLINE void name(struct vcpu *c, const struct record *r, u64 e, unsigned bits) \
    { \
        unsigned n = (unsigned)get_reg(c, r->vvvv * 8u, 8) & (bits - 1); \
        set_reg(c, r->reg, bits, truncate_to(expression, bits)); \
    } \
    READ_FORMS_Y(name)
SHIFT_X(shlx, e << n)
SHIFT_X(shrx, e >> n)
SHIFT_X(sarx, (u64)(sign_extend(e, bits) >> n))

ALWAYS_INLINE void rorx(struct vcpu *c, const struct record *r, u64 e, unsigned bits)
{
    set_reg(c, r->reg, bits, rotate_right(e, (unsigned)r->imm, bits));
}
READ_FORMS_Y(rorx)
