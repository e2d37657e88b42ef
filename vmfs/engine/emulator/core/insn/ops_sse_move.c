/* SSE to SSE4.1: moves between XMM registers, memory and general registers. */
#include "sse.h"

/* Loads that replace the whole register, and the register form of the same. */
#define LOAD_WHOLE(name, address, fast, general) \
    GENERAL_OP(op_##name##_mem) \
    { \
        set_xmm(c, r->reg, general); \
        NEXT(); \
    } \
    OP(op_##name##_fast) \
    { \
        const u8 *p = address; \
        if (unlikely(!p)) { \
            op_##name##_mem(c, r); \
            return; \
        } \
        set_xmm(c, r->reg, fast); \
        NEXT(); \
    }
/* Stores of the register, or of a part. `fast` stores to p. */
#define STORE(name, address, fast, general) \
    GENERAL_OP(op_##name##_mem) \
    { \
        general; \
        NEXT(); \
    } \
    OP(op_##name##_fast) \
    { \
        u8 *p = address; \
        if (unlikely(!p)) { \
            op_##name##_mem(c, r); \
            return; \
        } \
        fast; \
        NEXT(); \
    }

ALWAYS_INLINE u64 low_of(const struct vcpu *c, unsigned n) { return c->xmm[n].q[0]; }
ALWAYS_INLINE void set_low(struct vcpu *c, unsigned n, u64 value) { set_xmm(c, n, from64(value)); }

/* Registers are written whole: the host forwards a narrow store to a wide load only slowly. */
ALWAYS_INLINE xmm merge_single(xmm d, xmm s) { return (xmm)_mm_move_ss((__m128)d, (__m128)s); }
ALWAYS_INLINE xmm merge_low(xmm d, xmm s) { return (xmm)_mm_move_sd((__m128d)d, (__m128d)s); }
ALWAYS_INLINE xmm merge_high(xmm d, xmm s) { return _mm_unpacklo_epi64(d, s); } /* the low half of s */

/* ---- 16 bytes: MOVAPS, MOVUPS and their like ----------------------------------------------------------- */

OP(op_mov_V_Wa_reg)
{
    set_xmm(c, r->reg, get_xmm(c, r->rm));
    NEXT();
}
LOAD_WHOLE(mov_V_Wa, fast_read16_aligned(c, r), load16(p), mem_load16_aligned(c, r))
HANDLER_FAST(mov_V_Wa);

#define op_mov_V_Wu_reg op_mov_V_Wa_reg
LOAD_WHOLE(mov_V_Wu, fast_read(c, r, 16), load16(p), mem_load16(c, r))
HANDLER_FAST(mov_V_Wu);

OP(op_mov_Wa_V_reg)
{
    set_xmm(c, r->rm, get_xmm(c, r->reg));
    NEXT();
}
STORE(mov_Wa_V, fast_write16_aligned(c, r), _mm_storeu_si128((xmm *)p, get_xmm(c, r->reg)),
      mem_store16_aligned(c, r, get_xmm(c, r->reg)))
HANDLER_FAST(mov_Wa_V);

#define op_mov_Wu_V_reg op_mov_Wa_V_reg
STORE(mov_Wu_V, fast_write(c, r, 16), _mm_storeu_si128((xmm *)p, get_xmm(c, r->reg)),
      mem_store16(c, r, get_xmm(c, r->reg)))
HANDLER_FAST(mov_Wu_V);

/* ---- 4 and 8 bytes ------------------------------------------------------------------------------------- */

/* MOVSS, MOVSD: a load clears the rest of the register, a move between registers keeps it. */
OP(op_movss_V_W_reg)
{
    set_xmm(c, r->reg, merge_single(get_xmm(c, r->reg), get_xmm(c, r->rm)));
    NEXT();
}
LOAD_WHOLE(movss_V_W, fast_read(c, r, 4), from64(peek(p, 4)), from64(mem_load(c, r, 4)))
HANDLER_FAST(movss_V_W);
OP(op_movss_W_V_reg)
{
    set_xmm(c, r->rm, merge_single(get_xmm(c, r->rm), get_xmm(c, r->reg)));
    NEXT();
}
STORE(movss_W_V, fast_write(c, r, 4), poke(p, 4, c->xmm[r->reg].d[0]),
      mem_store(c, r, 4, c->xmm[r->reg].d[0]))
HANDLER_FAST(movss_W_V);

OP(op_movsd_V_W_reg)
{
    set_xmm(c, r->reg, merge_low(get_xmm(c, r->reg), get_xmm(c, r->rm)));
    NEXT();
}
LOAD_WHOLE(movsd_V_W, fast_read(c, r, 8), load8(p), from64(mem_load(c, r, 8)))
HANDLER_FAST(movsd_V_W);
OP(op_movsd_W_V_reg)
{
    set_xmm(c, r->rm, merge_low(get_xmm(c, r->rm), get_xmm(c, r->reg)));
    NEXT();
}
STORE(movsd_W_V, fast_write(c, r, 8), poke(p, 8, low_of(c, r->reg)), mem_store(c, r, 8, low_of(c, r->reg)))
HANDLER_FAST(movsd_W_V);

/* MOVQ: the rest is cleared in the register form too. */
OP(op_movq_V_W_reg)
{
    set_low(c, r->reg, low_of(c, r->rm));
    NEXT();
}
const struct handlers H_movq_V_W = {
    SAME4(op_movq_V_W_reg), SAME4(op_movsd_V_W_fast), SAME4(op_movsd_V_W_mem),
};
OP(op_movq_W_V_reg)
{
    set_low(c, r->rm, low_of(c, r->reg));
    NEXT();
}
const struct handlers H_movq_W_V = {
    SAME4(op_movq_W_V_reg), SAME4(op_movsd_W_V_fast), SAME4(op_movsd_W_V_mem),
};

/* MOVLPS, MOVHPS, MOVLPD, MOVHPD; and between registers MOVHLPS, MOVLHPS. */
#define HALF(name, to, merge, register_half) \
    OP(op_##name##_V_M_reg) \
    { \
        set_xmm(c, r->reg, merge(get_xmm(c, r->reg), register_half)); \
        NEXT(); \
    } \
    GENERAL_OP(op_##name##_V_M_mem) \
    { \
        xmm s = from64(mem_load(c, r, 8)); \
        set_xmm(c, r->reg, merge(get_xmm(c, r->reg), s)); \
        NEXT(); \
    } \
    OP(op_##name##_V_M_fast) \
    { \
        const u8 *p = fast_read(c, r, 8); \
        if (unlikely(!p)) { \
            op_##name##_V_M_mem(c, r); \
            return; \
        } \
        set_xmm(c, r->reg, merge(get_xmm(c, r->reg), load8(p))); \
        NEXT(); \
    } \
    HANDLER_FAST(name##_V_M); \
    STORE(name##_M_V, fast_write(c, r, 8), poke(p, 8, c->xmm[r->reg].q[to]), \
          mem_store(c, r, 8, c->xmm[r->reg].q[to])) \
    const struct handlers H_##name##_M_V = {{NULL}, SAME4(op_##name##_M_V_fast), SAME4(op_##name##_M_V_mem)};
HALF(movl, 0, merge_low, load8(&c->xmm[r->rm].q[1]))
HALF(movh, 1, merge_high, get_xmm(c, r->rm))

/* MOVD, MOVQ with a general register or memory. */
#define MOVD(bits) \
    OP(op_movd_V_E##bits##_reg) \
    { \
        set_low(c, r->reg, get_reg(c, r->rm, bits)); \
        NEXT(); \
    } \
    OP(op_movd_E##bits##_V_reg) \
    { \
        set_reg(c, r->rm, bits, low_of(c, r->reg)); \
        NEXT(); \
    }
MOVD(32)
MOVD(64)
const struct handlers H_movd_V_E = {
    {NULL, NULL, op_movd_V_E32_reg, op_movd_V_E64_reg},
    {NULL, NULL, op_movss_V_W_fast, op_movsd_V_W_fast},
    {NULL, NULL, op_movss_V_W_mem, op_movsd_V_W_mem},
};
const struct handlers H_movd_E_V = {
    {NULL, NULL, op_movd_E32_V_reg, op_movd_E64_V_reg},
    {NULL, NULL, op_movss_W_V_fast, op_movsd_W_V_fast},
    {NULL, NULL, op_movss_W_V_mem, op_movsd_W_V_mem},
};

/* MOVNTI: the hint means nothing here. */
OP(op_movnti_mem)
{
    mem_store(c, r, 1u << r->size, R64(c, r->reg));
    NEXT();
}
const struct handlers H_movnti = {{NULL}, SAME4(op_movnti_mem), SAME4(op_movnti_mem)};

/* ---- Bytes by a mask ----------------------------------------------------------------------------------- */

/* For what checks an address without an access: the others have it from the page walk. */
static void check_canonical(struct vcpu *c, const struct record *r, u64 linear)
{
    unsigned unused = c->cr4 & CR4_LA57 ? 64 - 57 : 64 - 48;
    if (c->key & KEY_CODE64 && linear != (u64)((i64)(linear << unused) >> unused))
        raise_error(c, r, r->seg == SEG_SS ? VECTOR_SS : VECTOR_GP, 0);
}

/* MASKMOVDQU: to DS:rDI (or another segment), the bytes whose mask has its top bit set. The address is
 * checked for all sixteen, pages only for those that are written, before the first is (the manual leaves open
 * what else may fault). */
OP(op_maskmovdqu)
{
    const union vector *mask = &c->xmm[r->rm], *data = &c->xmm[r->reg];
    u64 limit = address_masks[r->prefix & PREFIX_ADDRESS], offset = c->gpr[RDI] & limit;
    c->now = r;
    check_canonical(c, r, linear_of(c, r, r->seg, offset, 16, ACCESS_WRITE));
    for (unsigned i = 0; i < 16; i++)
        if (mask->b[i] & 0x80) {
            u64 at = linear_of(c, r, r->seg, (offset + i) & limit, 1, ACCESS_WRITE);
            if (!fast_linear_write(c, at, 1))
                mmu_check_write(c, at, 1, ACCESS_WRITE);
        }
    for (unsigned i = 0; i < 16; i++)
        if (mask->b[i] & 0x80)
            linear_store(c, linear_of(c, r, r->seg, (offset + i) & limit, 1, ACCESS_WRITE), 1, data->b[i]);
    NEXT();
}
HANDLER(maskmovdqu);

/* ---- Elements to and from general registers ------------------------------------------------------------ */

/* d with the element at byte `at` replaced by that of `all`. */
ALWAYS_INLINE xmm insert(xmm d, xmm all, unsigned bytes, unsigned at)
{
    static const u64 ones[4][5] = {{0, 0, 0xff}, {0, 0, 0xffff}, {0, 0, 0xffffffff}, {0, 0, ~0ull}};
    xmm mask = load16((const u8 *)ones[__builtin_ctz(bytes)] + 16 - at);
    return _mm_or_si128(_mm_and_si128(mask, all), _mm_andnot_si128(mask, d));
}
typedef int8_t i8;
typedef int16_t i16;
#define INSERT(name, bits, set1) \
    OP(op_##name##_reg) \
    { \
        unsigned at = (unsigned)r->imm * (bits / 8) & 15; \
        xmm value = set1((i##bits)get_reg(c, r->rm, bits)); \
        set_xmm(c, r->reg, insert(get_xmm(c, r->reg), value, bits / 8, at)); \
        NEXT(); \
    } \
    OP(op_##name##_mem) \
    { \
        unsigned at = (unsigned)r->imm * (bits / 8) & 15; \
        xmm value = set1((i##bits)mem_load(c, r, bits / 8)); \
        set_xmm(c, r->reg, insert(get_xmm(c, r->reg), value, bits / 8, at)); \
        NEXT(); \
    }
INSERT(pinsrb, 8, _mm_set1_epi8)
INSERT(pinsrw, 16, _mm_set1_epi16)
INSERT(pinsrd, 32, _mm_set1_epi32)
INSERT(pinsrq, 64, _mm_set1_epi64x)
HANDLER_REG_MEM(pinsrb);
HANDLER_REG_MEM(pinsrw);
const struct handlers H_pinsr = {
    {NULL, NULL, op_pinsrd_reg, op_pinsrq_reg},
    {NULL, NULL, op_pinsrd_mem, op_pinsrq_mem},
    {NULL, NULL, op_pinsrd_mem, op_pinsrq_mem},
};

OP(op_pextrw)
{
    R64(c, r->reg) = c->xmm[r->rm].w[r->imm & 7];
    NEXT();
}
HANDLER(pextrw);

/* PEXTRB, PEXTRW (SSE4.1 form), PEXTRD/Q, EXTRACTPS: an element to a register, zero-extended, or to
 * memory. */
#define EXTRACT(name, value, bytes) \
    OP(op_##name##_reg) \
    { \
        R64(c, r->rm) = value; \
        NEXT(); \
    } \
    OP(op_##name##_mem) \
    { \
        mem_store(c, r, bytes, value); \
        NEXT(); \
    } \
    HANDLER_REG_MEM(name);
EXTRACT(pextrb_E, c->xmm[r->reg].b[r->imm & 15], 1)
EXTRACT(pextrw_E, c->xmm[r->reg].w[r->imm & 7], 2)
EXTRACT(pextrd_E, c->xmm[r->reg].d[r->imm & 3], 4)
EXTRACT(pextrq_E, c->xmm[r->reg].q[r->imm & 1], 8)
const struct handlers H_pextr_E = {
    {NULL, NULL, op_pextrd_E_reg, op_pextrq_E_reg},
    {NULL, NULL, op_pextrd_E_mem, op_pextrq_E_mem},
    {NULL, NULL, op_pextrd_E_mem, op_pextrq_E_mem},
};

/* The sign bits of all elements. */
#define SIGNS(name) \
    OP(op_##name) \
    { \
        u32 mask; \
        __asm__(#name " %1, %0" : "=r"(mask) : "x"(get_xmm(c, r->rm))); \
        R64(c, r->reg) = mask; \
        NEXT(); \
    } \
    HANDLER(name);
SIGNS(movmskps)
SIGNS(movmskpd)
SIGNS(pmovmskb)

/* ---- Duplicating moves --------------------------------------------------------------------------------- */

COMPUTE(movddup)
{
    (void)c, (void)r, (void)d;
    return _mm_unpacklo_epi64(s, s);
}
FORMS_8(movddup)
COMPUTE(movsldup)
{
    (void)c, (void)r, (void)d;
    return _mm_shuffle_epi32(s, 0xa0);
}
FORMS_16(movsldup)
COMPUTE(movshdup)
{
    (void)c, (void)r, (void)d;
    return _mm_shuffle_epi32(s, 0xf5);
}
FORMS_16(movshdup)

/* ---- MXCSR, caches ------------------------------------------------------------------------------------- */

OP(op_ldmxcsr)
{
    u32 value = (u32)mem_load(c, r, 4);
    if (value & ~(u32)MXCSR_VALID)
        raise_error(c, r, VECTOR_GP, 0);
    mxcsr_write(c, value);
    NEXT();
}
HANDLER(ldmxcsr);
OP(op_stmxcsr)
{
    mem_store(c, r, 4, mxcsr_read(c));
    NEXT();
}
HANDLER(stmxcsr);

/* LFENCE, MFENCE, SFENCE. Where CPUs take turns, each sees all stores in order. */
OP(op_fence)
{
    if (c->key & KEY_SHARED)
        __asm__ volatile("mfence" : : : "memory");
    NEXT();
}
HANDLER(fence);
/* CLFLUSH, CLFLUSHOPT, CLWB: access checks of a byte load, but that the segment may be execute-only (Intel SDM 2A CLFLUSH);
 * no data. */
OP(op_clflush)
{
    u32 a = c->seg[r->seg].attributes;
    bool code = !(a & ATTR_UNUSABLE) && a & ATTR_CODE;
    u64 at = mem_linear(c, r, 1, code ? 0 : ACCESS_READ);
    if (unlikely(!fast_linear_read(c, at, 1))) {
        check_canonical(c, r, at);
        mmu_translate(c, at, ACCESS_READ);
    }
    NEXT();
}
HANDLER(clflush);
