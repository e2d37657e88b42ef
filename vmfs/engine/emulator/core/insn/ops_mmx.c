/* MMX, and the 64-bit forms of SSE, SSE2 and SSSE3: packed integers in the registers of the x87.
 *
 * The registers are those in struct vcpu (x87.h); operations are the host's XMM ones on the low half. Every
 * one of these instructions sets TOP to 0 and, EMMS apart, all tags to valid, and what it writes gets an
 * exponent of ones (Intel SDM 3A 13.2). A pending x87 exception comes before all of it; after a fault of the
 * operand nothing of it has happened. */
#include "x87.h"

static COLD void mmx_prepare(struct vcpu *c, const struct record *r)
{
    x87_wait(c, r);
    x87_unload(c);
}
static COLD void mmx_enter(struct vcpu *c)
{
    c->fsw &= ~FSW_TOP;
    c->ftw = 0xff;
    c->x87_place = X87_MMX;
}
/* First in a handler. */
ALWAYS_INLINE void mmx_start(struct vcpu *c, const struct record *r)
{
    if (unlikely(c->x87_place != X87_MMX))
        mmx_prepare(c, r);
}
/* When nothing can fault any more, before registers are written. */
ALWAYS_INLINE void mmx_commit(struct vcpu *c)
{
    if (unlikely(c->x87_place != X87_MMX))
        mmx_enter(c);
}
ALWAYS_INLINE u64 get_mm(const struct vcpu *c, unsigned n) { return c->fpr[n].mantissa; }
ALWAYS_INLINE void set_mm(struct vcpu *c, unsigned n, u64 value)
{
    mmx_commit(c);
    c->fpr[n].mantissa = value;
    c->fpr[n].exponent = 0xffff;
}

/* ---- Forms of P <- do_NAME(c, r, P, Q); so many bytes of memory ---------------------------------------- */

#define MMX_COMPUTE(name) ALWAYS_INLINE u64 do_mm_##name(struct vcpu *c, const struct record *r, u64 d, u64 s)

#define MMX_FORMS_OF(name, bytes) \
    OP(op_mm_##name##_reg) \
    { \
        mmx_start(c, r); \
        set_mm(c, r->reg, do_mm_##name(c, r, get_mm(c, r->reg), get_mm(c, r->rm))); \
        NEXT(); \
    } \
    GENERAL_OP(op_mm_##name##_mem) \
    { \
        mmx_start(c, r); \
        u64 s = mem_load(c, r, bytes); \
        set_mm(c, r->reg, do_mm_##name(c, r, get_mm(c, r->reg), s)); \
        NEXT(); \
    } \
    OP(op_mm_##name##_fast) \
    { \
        const u8 *p = fast_read(c, r, bytes); \
        if (unlikely(!p || c->x87_place != X87_MMX)) { \
            op_mm_##name##_mem(c, r); \
            return; \
        } \
        set_mm(c, r->reg, do_mm_##name(c, r, get_mm(c, r->reg), peek(p, bytes))); \
        NEXT(); \
    } \
    HANDLER_FAST(mm_##name);
#define MMX_FORMS(name) MMX_FORMS_OF(name, 8)

/* Element by element: the low half of the host's. */
#define MMX_ELEMENTS(name) \
    MMX_COMPUTE(name) \
    { \
        (void)c, (void)r; \
        xmm a = from64(d); \
        __asm__(#name " %1, %0" : "+x"(a) : "x"(from64(s))); \
        return low64(a); \
    } \
    MMX_FORMS(name)
/* Elements of d, then those of s, to one of each pair or of half the size: both in one register. */
#define MMX_HORIZONTAL(name) \
    MMX_COMPUTE(name) \
    { \
        (void)c, (void)r; \
        xmm a = _mm_unpacklo_epi64(from64(d), from64(s)); \
        __asm__(#name " %0, %0" : "+x"(a)); \
        return low64(a); \
    } \
    MMX_FORMS(name)

/* ---- Arithmetic, logic, comparison --------------------------------------------------------------------- */

MMX_ELEMENTS(paddb)
MMX_ELEMENTS(paddw)
MMX_ELEMENTS(paddd)
MMX_ELEMENTS(paddq)
MMX_ELEMENTS(paddsb)
MMX_ELEMENTS(paddsw)
MMX_ELEMENTS(paddusb)
MMX_ELEMENTS(paddusw)
MMX_ELEMENTS(psubb)
MMX_ELEMENTS(psubw)
MMX_ELEMENTS(psubd)
MMX_ELEMENTS(psubq)
MMX_ELEMENTS(psubsb)
MMX_ELEMENTS(psubsw)
MMX_ELEMENTS(psubusb)
MMX_ELEMENTS(psubusw)
MMX_ELEMENTS(pmullw)
MMX_ELEMENTS(pmulhw)
MMX_ELEMENTS(pmulhuw)
MMX_ELEMENTS(pmuludq)
MMX_ELEMENTS(pmaddwd)
MMX_ELEMENTS(psadbw)
MMX_ELEMENTS(pavgb)
MMX_ELEMENTS(pavgw)
MMX_ELEMENTS(pminub)
MMX_ELEMENTS(pminsw)
MMX_ELEMENTS(pmaxub)
MMX_ELEMENTS(pmaxsw)
MMX_ELEMENTS(pcmpeqb)
MMX_ELEMENTS(pcmpeqw)
MMX_ELEMENTS(pcmpeqd)
MMX_ELEMENTS(pcmpgtb)
MMX_ELEMENTS(pcmpgtw)
MMX_ELEMENTS(pcmpgtd)
MMX_ELEMENTS(pand)
MMX_ELEMENTS(pandn)
MMX_ELEMENTS(por)
MMX_ELEMENTS(pxor)

/* ---- Shifts: by the source, or by an immediate --------------------------------------------------------- */

#define MMX_SHIFT(name) \
    MMX_ELEMENTS(name) \
    OP(op_mm_##name##_I) \
    { \
        mmx_start(c, r); \
        set_mm(c, r->rm, do_mm_##name(c, r, get_mm(c, r->rm), (u8)r->imm)); \
        NEXT(); \
    } \
    HANDLER(mm_##name##_I);
MMX_SHIFT(psllw)
MMX_SHIFT(pslld)
MMX_SHIFT(psllq)
MMX_SHIFT(psrlw)
MMX_SHIFT(psrld)
MMX_SHIFT(psrlq)
MMX_SHIFT(psraw)
MMX_SHIFT(psrad)

/* ---- Pack, unpack, shuffle ----------------------------------------------------------------------------- */

MMX_HORIZONTAL(packsswb)
MMX_HORIZONTAL(packssdw)
MMX_HORIZONTAL(packuswb)

/* The low halves interleave to the low half of the host's result, the high halves to its high half. */
#define MMX_UNPACK(element) \
    MMX_COMPUTE(punpckl##element) \
    { \
        (void)c, (void)r; \
        xmm a = from64(d); \
        __asm__("punpckl" #element " %1, %0" : "+x"(a) : "x"(from64(s))); \
        return low64(a); \
    } \
    MMX_FORMS_OF(punpckl##element, 4) \
    MMX_COMPUTE(punpckh##element) \
    { \
        (void)c, (void)r; \
        xmm a = from64(d); \
        __asm__("punpckl" #element " %1, %0" : "+x"(a) : "x"(from64(s))); \
        return low64(_mm_unpackhi_epi64(a, a)); \
    } \
    MMX_FORMS(punpckh##element)
MMX_UNPACK(bw)
MMX_UNPACK(wd)
MMX_UNPACK(dq)

MMX_COMPUTE(pshufw)
{
    (void)c, (void)d;
    u32 imm = (u8)r->imm;
    return (s >> (imm & 3) * 16 & 0xffff) | (s >> (imm >> 2 & 3) * 16 & 0xffff) << 16 |
           (s >> (imm >> 4 & 3) * 16 & 0xffff) << 32 | s >> (imm >> 6) * 16 << 48;
}
MMX_FORMS(pshufw)

/* ---- SSSE3 --------------------------------------------------------------------------------------------- */

MMX_COMPUTE(pshufb) /* of an index, bits 7 and 2:0 count */
{
    (void)c, (void)r;
    xmm a = from64(d);
    __asm__("pshufb %1, %0" : "+x"(a) : "x"(from64(s & 0x8787878787878787)));
    return low64(a);
}
MMX_FORMS(pshufb)
MMX_HORIZONTAL(phaddw)
MMX_HORIZONTAL(phaddd)
MMX_HORIZONTAL(phaddsw)
MMX_HORIZONTAL(phsubw)
MMX_HORIZONTAL(phsubd)
MMX_HORIZONTAL(phsubsw)
MMX_ELEMENTS(pmaddubsw)
MMX_ELEMENTS(pmulhrsw)
MMX_ELEMENTS(psignb)
MMX_ELEMENTS(psignw)
MMX_ELEMENTS(psignd)
MMX_ELEMENTS(pabsb)
MMX_ELEMENTS(pabsw)
MMX_ELEMENTS(pabsd)

/* The 8 bytes at `imm` of s, d, and zeros after them. */
MMX_COMPUTE(palignr)
{
    (void)c;
    u32 shift = (u8)r->imm * 8;
    if (shift >= 128)
        return 0;
    if (shift >= 64)
        return d >> (shift - 64);
    return shift ? s >> shift | d << (64 - shift) : s;
}
MMX_FORMS(palignr)

/* ---- Moves --------------------------------------------------------------------------------------------- */

MMX_COMPUTE(mov)
{
    (void)c, (void)r, (void)d;
    return s;
}
MMX_FORMS(mov)

/* To memory, or, MOVQ, to a register. */
OP(op_mm_store_reg)
{
    mmx_start(c, r);
    set_mm(c, r->rm, get_mm(c, r->reg));
    NEXT();
}
GENERAL_OP(op_mm_store_mem)
{
    mmx_start(c, r);
    mem_store(c, r, 8, get_mm(c, r->reg));
    mmx_commit(c);
    NEXT();
}
OP(op_mm_store_fast)
{
    u8 *p = fast_write(c, r, 8);
    if (unlikely(!p || c->x87_place != X87_MMX)) {
        op_mm_store_mem(c, r);
        return;
    }
    poke(p, 8, get_mm(c, r->reg));
    NEXT();
}
HANDLER_FAST(mm_store);

/* MOVD, MOVQ between MM and general registers or memory. */
#define MMX_MOVD(bits) \
    OP(op_mm_from##bits##_reg) \
    { \
        mmx_start(c, r); \
        set_mm(c, r->reg, get_reg(c, r->rm, bits)); \
        NEXT(); \
    } \
    OP(op_mm_from##bits##_mem) \
    { \
        mmx_start(c, r); \
        u64 value = mem_load(c, r, bits / 8); \
        set_mm(c, r->reg, value); \
        NEXT(); \
    } \
    OP(op_mm_to##bits##_reg) \
    { \
        mmx_start(c, r); \
        mmx_commit(c); \
        R64(c, r->rm) = truncate_to(get_mm(c, r->reg), bits); \
        NEXT(); \
    } \
    OP(op_mm_to##bits##_mem) \
    { \
        mmx_start(c, r); \
        mem_store(c, r, bits / 8, get_mm(c, r->reg)); \
        mmx_commit(c); \
        NEXT(); \
    }
MMX_MOVD(32)
MMX_MOVD(64)
#define MMX_MOVD_TABLE(name) \
    const struct handlers H_mm_##name = { \
        {NULL, NULL, op_mm_##name##32_reg, op_mm_##name##64_reg}, \
        {NULL, NULL, op_mm_##name##32_mem, op_mm_##name##64_mem}, \
        {NULL, NULL, op_mm_##name##32_mem, op_mm_##name##64_mem}};
MMX_MOVD_TABLE(from)
MMX_MOVD_TABLE(to)

OP(op_movq2dq)
{
    mmx_start(c, r);
    mmx_commit(c);
    set_xmm(c, r->reg, from64(get_mm(c, r->rm)));
    NEXT();
}
HANDLER(movq2dq);
OP(op_movdq2q)
{
    mmx_start(c, r);
    set_mm(c, r->reg, c->xmm[r->rm].q[0]);
    NEXT();
}
HANDLER(movdq2q);

/* ---- Elements to and from general registers ------------------------------------------------------------ */

ALWAYS_INLINE u64 insert_word(u64 d, u64 value, i32 imm)
{
    unsigned shift = (imm & 3) * 16;
    return (d & ~(0xffffull << shift)) | (value & 0xffff) << shift;
}
OP(op_mm_pinsrw_reg)
{
    mmx_start(c, r);
    set_mm(c, r->reg, insert_word(get_mm(c, r->reg), get_reg(c, r->rm, 16), r->imm));
    NEXT();
}
OP(op_mm_pinsrw_mem)
{
    mmx_start(c, r);
    u64 value = mem_load(c, r, 2);
    set_mm(c, r->reg, insert_word(get_mm(c, r->reg), value, r->imm));
    NEXT();
}
HANDLER_REG_MEM(mm_pinsrw);

OP(op_mm_pextrw)
{
    mmx_start(c, r);
    mmx_commit(c);
    R64(c, r->reg) = get_mm(c, r->rm) >> (r->imm & 3) * 16 & 0xffff;
    NEXT();
}
HANDLER(mm_pextrw);

OP(op_mm_pmovmskb)
{
    mmx_start(c, r);
    mmx_commit(c);
    R64(c, r->reg) = (u32)_mm_movemask_epi8(from64(get_mm(c, r->rm)));
    NEXT();
}
HANDLER(mm_pmovmskb);

/* To DS:rDI (or another segment), the bytes whose mask has its top bit set. */
OP(op_maskmovq)
{
    mmx_start(c, r);
    u64 mask = get_mm(c, r->rm), data = get_mm(c, r->reg);
    u64 limit = address_masks[r->prefix & PREFIX_ADDRESS], offset = c->gpr[RDI] & limit;
    c->now = r;
    for (unsigned i = 0; i < 8; i++)
        if (mask >> 8 * i & 0x80) {
            u64 at = linear_of(c, r, r->seg, (offset + i) & limit, 1, ACCESS_WRITE);
            if (!fast_linear_write(c, at, 1))
                mmu_check_write(c, at, 1, ACCESS_WRITE);
        }
    for (unsigned i = 0; i < 8; i++)
        if (mask >> 8 * i & 0x80) {
            u64 at = linear_of(c, r, r->seg, (offset + i) & limit, 1, ACCESS_WRITE);
            linear_store(c, at, 1, data >> 8 * i & 0xff);
        }
    mmx_commit(c);
    NEXT();
}
HANDLER(maskmovq);

/* ---- Conversion between MM and XMM registers ----------------------------------------------------------
 *
 * Processors (at least AMD's) go over to the MMX state before the conversion raises an unmasked exception. */

/* To two singles, which replace the low half; to two doubles. From memory, they do not touch the MM
 * registers. */
ALWAYS_INLINE void cvtpi2ps(struct vcpu *c, const struct record *r, u64 value)
{
    xmm d = from64(value);
    CHECKED(__asm__ volatile("cvtdq2ps %0, %0" : "+x"(d)));
    set_xmm(c, r->reg, (xmm)_mm_move_sd((__m128d)get_xmm(c, r->reg), (__m128d)d));
}
ALWAYS_INLINE void cvtpi2pd(struct vcpu *c, const struct record *r, u64 value)
{
    xmm d = from64(value);
    __asm__("cvtdq2pd %0, %0" : "+x"(d));
    set_xmm(c, r->reg, d);
}
#define FROM_MMX(name) \
    OP(op_##name##_reg) \
    { \
        mmx_start(c, r); \
        mmx_commit(c); \
        name(c, r, get_mm(c, r->rm)); \
        NEXT(); \
    } \
    OP(op_##name##_mem) \
    { \
        name(c, r, mem_load(c, r, 8)); \
        NEXT(); \
    } \
    HANDLER_REG_MEM(name);
FROM_MMX(cvtpi2ps)
FROM_MMX(cvtpi2pd)

/* From two singles or doubles; `host` converts four or two, the upper ones of which are zeros. */
#define TO_MMX(name, host, load) \
    ALWAYS_INLINE void name(struct vcpu *c, const struct record *r, xmm s) \
    { \
        mmx_commit(c); \
        CHECKED(__asm__ volatile(#host " %0, %0" : "+x"(s))); \
        set_mm(c, r->reg, low64(s)); \
    } \
    OP(op_##name##_reg) \
    { \
        mmx_start(c, r); \
        name(c, r, load(r->rm)); \
        NEXT(); \
    }
#define LOW_HALF(n) from64(c->xmm[n].q[0])
#define WHOLE(n) get_xmm(c, n)
#define TO_MMX_MEM(name, load) \
    OP(op_##name##_mem) \
    { \
        mmx_start(c, r); \
        xmm s = load; \
        name(c, r, s); \
        NEXT(); \
    } \
    HANDLER_REG_MEM(name);
TO_MMX(cvtps2pi, cvtps2dq, LOW_HALF)
TO_MMX_MEM(cvtps2pi, from64(mem_load(c, r, 8)))
TO_MMX(cvttps2pi, cvttps2dq, LOW_HALF)
TO_MMX_MEM(cvttps2pi, from64(mem_load(c, r, 8)))
TO_MMX(cvtpd2pi, cvtpd2dq, WHOLE)
TO_MMX_MEM(cvtpd2pi, mem_load16_aligned(c, r))
TO_MMX(cvttpd2pi, cvttpd2dq, WHOLE)
TO_MMX_MEM(cvttpd2pi, mem_load16_aligned(c, r))

/* ---- EMMS ---------------------------------------------------------------------------------------------- */

OP(op_emms)
{
    mmx_start(c, r);
    c->fsw &= ~FSW_TOP;
    c->ftw = 0;
    c->x87_place = X87_MEMORY;
    NEXT();
}
HANDLER(emms);
