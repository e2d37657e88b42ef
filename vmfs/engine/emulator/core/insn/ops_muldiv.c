/* Multiplication and division (Intel SDM 2: MUL, IMUL, DIV, IDIV, MULX), and the sign extensions of the accumulator. */
#include "forms.h"

typedef unsigned __int128 u128;
typedef __int128 i128;

/* CF and OF tell that the high half matters. The others are undefined. On Intel's processors SF and PF follow the low half, and
 * ZF and AF are 0. AMD's keep all four: host code sets PF before and clears the others (`clear_kept`). */
ALWAYS_INLINE void product_flags(struct vcpu *c, u64 low, bool wide, unsigned bits, bool amd)
{
    c->carries = (u64)wide << 63;
    set_result(c, amd ? 0 : low, bits);
    c->zf = 1;
}
/* AX for bytes, rDX:rAX else. */
ALWAYS_INLINE void set_product(struct vcpu *c, u64 low, u64 high, unsigned bits)
{
    if (bits == 8) {
        set_reg(c, RAX * 8, 16, (low & 0xff) | high << 8);
    } else {
        set_reg(c, RAX * 8, bits, low);
        set_reg(c, RDX * 8, bits, high);
    }
}

ALWAYS_INLINE void mul_for(struct vcpu *c, const struct record *r, u64 e, unsigned bits, bool amd)
{
    u64 a = get_reg(c, RAX * 8, bits), low, high;
    (void)r;
    if (bits == 64) {
        u128 product = (u128)a * e;
        low = (u64)product, high = (u64)(product >> 64);
    } else {
        low = a * e;
        high = truncate_to(low >> (bits & 63), bits);
    }
    set_product(c, low, high, bits);
    product_flags(c, low, high != 0, bits, amd);
}
READ_BY_MAKER(READ_FORMS, mul)

/* The signed product; *wide: it does not fit in the low half. */
ALWAYS_INLINE u64 signed_product(u64 a, u64 b, unsigned bits, u64 *high, bool *wide)
{
    if (bits == 64) {
        i128 product = (i128)(i64)a * (i64)b;
        *high = (u64)((u128)product >> 64);
        *wide = product != (i64)product;
        return (u64)product;
    }
    i64 product = sign_extend(a, bits) * sign_extend(b, bits);
    *high = truncate_to((u64)product >> (bits & 63), bits);
    *wide = product != sign_extend((u64)product, bits);
    return truncate_to((u64)product, bits);
}
ALWAYS_INLINE void imul_for(struct vcpu *c, const struct record *r, u64 e, unsigned bits, bool amd)
{
    u64 high, low;
    bool wide;
    (void)r;
    low = signed_product(get_reg(c, RAX * 8, bits), e, bits, &high, &wide);
    set_product(c, low, high, bits);
    product_flags(c, low, wide, bits, amd);
}
READ_BY_MAKER(READ_FORMS, imul)

#define IMUL_G(name, other) \
    ALWAYS_INLINE void name##_for(struct vcpu *c, const struct record *r, u64 e, unsigned bits, bool amd) \
    { \
        u64 high, low; \
        bool wide; \
        low = signed_product(e, other, bits, &high, &wide); \
        set_reg(c, r->reg, bits, low); \
        product_flags(c, low, wide, bits, amd); \
    } \
    READ_BY_MAKER(READ_FORMS_V, name)
IMUL_G(imul_G_E, get_reg(c, r->reg, bits))
IMUL_G(imul_G_E_I, (u64)(i64)r->imm)

/* rDX times E, to two registers; the high half wins where they are the same. */
ALWAYS_INLINE void mulx(struct vcpu *c, const struct record *r, u64 e, unsigned bits)
{
    u128 product = (u128)get_reg(c, RDX * 8, bits) * e;
    set_reg(c, r->vvvv * 8u, bits, truncate_to((u64)product, bits));
    set_reg(c, r->reg, bits, truncate_to((u64)(product >> bits), bits));
}
READ_FORMS_Y(mulx)

/* ---- Division: #DE where the quotient does not fit. Flags are undefined; they stay ------------------------------------------------- */

ALWAYS_INLINE void set_quotient(struct vcpu *c, u64 quotient, u64 rest, unsigned bits)
{
    set_product(c, quotient, truncate_to(rest, bits == 8 ? 8 : bits), bits);
}

ALWAYS_INLINE void div(struct vcpu *c, const struct record *r, u64 e, unsigned bits)
{
    if (bits == 64) {
        u64 high = c->gpr[RDX];
        if (unlikely(high >= e)) /* also: e is 0 */
            raise_fault(c, r, VECTOR_DE);
        if (!high) {
            u64 a = c->gpr[RAX];
            set_quotient(c, a / e, a % e, 64);
        } else {
            u128 a = (u128)high << 64 | c->gpr[RAX];
            set_quotient(c, (u64)(a / e), (u64)(a % e), 64);
        }
        return;
    }
    u64 a = bits == 8 ? get_reg(c, RAX * 8, 16) : get_reg(c, RDX * 8, bits) << bits | get_reg(c, RAX * 8, bits);
    if (unlikely(a >> bits >= e))
        raise_fault(c, r, VECTOR_DE);
    set_quotient(c, a / e, a % e, bits);
}
READ_FORMS(div)

ALWAYS_INLINE void idiv(struct vcpu *c, const struct record *r, u64 e, unsigned bits)
{
    if (unlikely(!e))
        raise_fault(c, r, VECTOR_DE);
    if (bits == 64) {
        i128 a = (i128)((u128)c->gpr[RDX] << 64 | c->gpr[RAX]);
        i64 b = (i64)e;
        /* The one quotient that C leaves undefined does not fit either. */
        if (unlikely(b == -1 && a == (i128)((u128)1 << 127)))
            raise_fault(c, r, VECTOR_DE);
        i128 quotient = a / b;
        if (unlikely(quotient != (i64)quotient))
            raise_fault(c, r, VECTOR_DE);
        set_quotient(c, (u64)quotient, (u64)(a % b), 64);
        return;
    }
    i64 a = bits == 8 ? sign_extend(get_reg(c, RAX * 8, 16), 16)
                      : sign_extend(get_reg(c, RDX * 8, bits) << bits | get_reg(c, RAX * 8, bits), 2 * bits);
    i64 b = sign_extend(e, bits);
    if (unlikely(b == -1 && a == INT64_MIN))
        raise_fault(c, r, VECTOR_DE);
    i64 quotient = a / b;
    if (unlikely(quotient != sign_extend((u64)quotient, bits)))
        raise_fault(c, r, VECTOR_DE);
    set_quotient(c, truncate_to((u64)quotient, bits), (u64)(a % b), bits);
}
READ_FORMS(idiv)

/* ---- CBW CWDE CDQE, CWD CDQ CQO ------------------------------------------------------------------------------------------------------ */

#define ACCUMULATOR(bits) \
    OP(cbw_##bits) { set_reg(c, RAX * 8, bits, (u64)sign_extend(c->gpr[RAX], bits / 2)); NEXT(); } \
    OP(cwd_##bits) { set_reg(c, RDX * 8, bits, (u64)(sign_extend(c->gpr[RAX], bits) >> 63)); NEXT(); }
ACCUMULATOR(16)
ACCUMULATOR(32)
ACCUMULATOR(64)
const struct handlers H_cbw = {.reg = {NULL, cbw_16, cbw_32, cbw_64}};
const struct handlers H_cwd = {.reg = {NULL, cwd_16, cwd_32, cwd_64}};
