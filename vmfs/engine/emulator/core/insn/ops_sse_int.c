/* SSE2, SSSE3, SSE4.1: packed integers and logic. One host instruction each; memory operands are 16 bytes,
 * aligned. */
#include "sse.h"

/* ---- Logic. The float forms (ANDPS, ANDPD, ...) are the same operation --------------------------------- */

SSE_INTEGER(pand)
SSE_INTEGER(pandn)
SSE_INTEGER(por)
SSE_INTEGER(pxor)

/* ---- Arithmetic ---------------------------------------------------------------------------------------- */

SSE_INTEGER(paddb)
SSE_INTEGER(paddw)
SSE_INTEGER(paddd)
SSE_INTEGER(paddq)
SSE_INTEGER(paddsb)
SSE_INTEGER(paddsw)
SSE_INTEGER(paddusb)
SSE_INTEGER(paddusw)
SSE_INTEGER(psubb)
SSE_INTEGER(psubw)
SSE_INTEGER(psubd)
SSE_INTEGER(psubq)
SSE_INTEGER(psubsb)
SSE_INTEGER(psubsw)
SSE_INTEGER(psubusb)
SSE_INTEGER(psubusw)
SSE_INTEGER(pmullw)
SSE_INTEGER(pmulhw)
SSE_INTEGER(pmulhuw)
SSE_INTEGER(pmuludq)
SSE_INTEGER(pmaddwd)
SSE_INTEGER(psadbw)
SSE_INTEGER(pavgb)
SSE_INTEGER(pavgw)
SSE_INTEGER(pminub)
SSE_INTEGER(pminsw)
SSE_INTEGER(pmaxub)
SSE_INTEGER(pmaxsw)
SSE_INTEGER(pcmpeqb)
SSE_INTEGER(pcmpeqw)
SSE_INTEGER(pcmpeqd)
SSE_INTEGER(pcmpgtb)
SSE_INTEGER(pcmpgtw)
SSE_INTEGER(pcmpgtd)

/* ---- Pack, unpack -------------------------------------------------------------------------------------- */

SSE_INTEGER(packsswb)
SSE_INTEGER(packssdw)
SSE_INTEGER(packuswb)
SSE_INTEGER(punpcklbw)
SSE_INTEGER(punpcklwd)
SSE_INTEGER(punpckldq)
SSE_INTEGER(punpcklqdq)
SSE_INTEGER(punpckhbw)
SSE_INTEGER(punpckhwd)
SSE_INTEGER(punpckhdq)
SSE_INTEGER(punpckhqdq)

/* ---- Shifts: by the low 64 bits of the source, or by an immediate -------------------------------------- */

#define SHIFT(name) \
    SSE_INTEGER(name) \
    OP(op_##name##_I) \
    { \
        xmm d = get_xmm(c, r->rm); \
        __asm__(#name " %1, %0" : "+x"(d) : "x"(from64((u8)r->imm))); \
        set_xmm(c, r->rm, d); \
        NEXT(); \
    } \
    HANDLER(name##_I);
SHIFT(psllw)
SHIFT(pslld)
SHIFT(psllq)
SHIFT(psrlw)
SHIFT(psrld)
SHIFT(psrlq)
SHIFT(psraw)
SHIFT(psrad)

/* By bytes; 16 or more clear the register. */
#define SHIFT_BYTES(name) \
    OP(op_##name##_I) \
    { \
        xmm d = get_xmm(c, r->rm); \
        switch (r->imm) { \
            CASES_16(SHIFT_BYTES_CASE_##name, 0) \
        default: d = _mm_setzero_si128(); \
        } \
        set_xmm(c, r->rm, d); \
        NEXT(); \
    } \
    HANDLER(name##_I);
#define SHIFT_BYTES_CASE_pslldq(n) case n: __asm__("pslldq %1, %0" : "+x"(d) : "i"(n)); break;
#define SHIFT_BYTES_CASE_psrldq(n) case n: __asm__("psrldq %1, %0" : "+x"(d) : "i"(n)); break;
SHIFT_BYTES(pslldq)
SHIFT_BYTES(psrldq)

/* ---- Shuffles by an immediate -------------------------------------------------------------------------- */

COMPUTE(pshufd)
{
    (void)c, (void)d;
    u32 imm = (u8)r->imm;
    union vector from;
    _mm_storeu_si128((xmm *)&from, s);
    return _mm_setr_epi32((i32)from.d[imm & 3], (i32)from.d[imm >> 2 & 3], (i32)from.d[imm >> 4 & 3],
                          (i32)from.d[imm >> 6]);
}
FORMS_16(pshufd)

ALWAYS_INLINE u64 shuffle_words(u64 words, u32 imm)
{
    return (words >> (imm & 3) * 16 & 0xffff) | (words >> (imm >> 2 & 3) * 16 & 0xffff) << 16 |
           (words >> (imm >> 4 & 3) * 16 & 0xffff) << 32 | (words >> (imm >> 6 & 3) * 16) << 48;
}
ALWAYS_INLINE u64 high64(xmm v) { return low64(_mm_unpackhi_epi64(v, v)); }
ALWAYS_INLINE xmm from_halves(u64 low, u64 high) { return _mm_unpacklo_epi64(from64(low), from64(high)); }

COMPUTE(pshuflw)
{
    (void)c, (void)d;
    return from_halves(shuffle_words(low64(s), (u8)r->imm), high64(s));
}
FORMS_16(pshuflw)
COMPUTE(pshufhw)
{
    (void)c, (void)d;
    return from_halves(low64(s), shuffle_words(high64(s), (u8)r->imm));
}
FORMS_16(pshufhw)

static NOINLINE xmm host_shufps(xmm d, xmm s, u32 imm)
{
    switch (imm) {
#define X(n) case n: __asm__("shufps %2, %1, %0" : "+x"(d) : "x"(s), "i"(n)); break;
        CASES_256(X)
#undef X
    }
    return d;
}
COMPUTE(shufps)
{
    (void)c;
    return host_shufps(d, s, (u8)r->imm);
}
FORMS_16(shufps)
COMPUTE(shufpd)
{
    (void)c;
    return from_halves(r->imm & 1 ? high64(d) : low64(d), r->imm & 2 ? high64(s) : low64(s));
}
FORMS_16(shufpd)

/* ---- SSSE3 --------------------------------------------------------------------------------------------- */

SSE_INTEGER(pshufb)
SSE_INTEGER(phaddw)
SSE_INTEGER(phaddd)
SSE_INTEGER(phaddsw)
SSE_INTEGER(phsubw)
SSE_INTEGER(phsubd)
SSE_INTEGER(phsubsw)
SSE_INTEGER(pmaddubsw)
SSE_INTEGER(pmulhrsw)
SSE_INTEGER(psignb)
SSE_INTEGER(psignw)
SSE_INTEGER(psignd)
SSE_INTEGER(pabsb)
SSE_INTEGER(pabsw)
SSE_INTEGER(pabsd)

/* The 16 bytes at `imm` of s, d, and zeros after them. The control bytes of PSHUFB for either are a window into:
 * sixteen that clear, 0 to 15, and again some that clear. */
COMPUTE(palignr)
{
#define CLEAR 0x8080808080808080
    static const u64 control[8] = {CLEAR, CLEAR, 0x0706050403020100, 0x0f0e0d0c0b0a0908, CLEAR, CLEAR, CLEAR, CLEAR};
#undef CLEAR
    (void)c;
    u32 n = (u8)r->imm < 32 ? (u8)r->imm : 32;
    __asm__("pshufb %1, %0" : "+x"(s) : "x"(load16((const u8 *)control + 16 + n)));
    __asm__("pshufb %1, %0" : "+x"(d) : "x"(load16((const u8 *)control + n)));
    return _mm_or_si128(d, s);
}
FORMS_16(palignr)

/* ---- SSE4.1, SSE4.2 ------------------------------------------------------------------------------------ */

SSE_INTEGER(pmuldq)
SSE_INTEGER(pmulld)
SSE_INTEGER(pcmpeqq)
SSE_INTEGER(pcmpgtq)
SSE_INTEGER(packusdw)
SSE_INTEGER(pminsb)
SSE_INTEGER(pminsd)
SSE_INTEGER(pminuw)
SSE_INTEGER(pminud)
SSE_INTEGER(pmaxsb)
SSE_INTEGER(pmaxsd)
SSE_INTEGER(pmaxuw)
SSE_INTEGER(pmaxud)
SSE_INTEGER(phminposuw)

/* Extensions read as many bytes of memory as they need, at any address. */
#define EXTEND(name, bytes) \
    COMPUTE(name) \
    { \
        (void)c, (void)r, (void)d; \
        __asm__(#name " %1, %0" : "=x"(d) : "x"(s)); \
        return d; \
    } \
    FORMS_##bytes(name)
EXTEND(pmovsxbw, 8)
EXTEND(pmovsxbd, 4)
EXTEND(pmovsxbq, 2)
EXTEND(pmovsxwd, 8)
EXTEND(pmovsxwq, 4)
EXTEND(pmovsxdq, 8)
EXTEND(pmovzxbw, 8)
EXTEND(pmovzxbd, 4)
EXTEND(pmovzxbq, 2)
EXTEND(pmovzxwd, 8)
EXTEND(pmovzxwq, 4)
EXTEND(pmovzxdq, 8)

/* Blends by the top bits of XMM0, which the host's take from its own XMM0. */
#define BLEND_BY_XMM0(name) \
    COMPUTE(name) \
    { \
        (void)r; \
        register xmm mask __asm__("xmm0") = get_xmm(c, 0); \
        __asm__(#name " %%xmm0, %1, %0" : "+x"(d) : "x"(s), "x"(mask)); \
        return d; \
    } \
    FORMS_16(name)
BLEND_BY_XMM0(pblendvb)
BLEND_BY_XMM0(blendvps)
BLEND_BY_XMM0(blendvpd)

/* Blends by an immediate: all ones where its bit is set choose the source. */
ALWAYS_INLINE xmm choose(xmm mask, xmm d, xmm s)
{
    return _mm_or_si128(_mm_and_si128(mask, s), _mm_andnot_si128(mask, d));
}
COMPUTE(pblendw)
{
    (void)c;
    xmm bits = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
    return choose(_mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16((short)r->imm), bits), bits), d, s);
}
FORMS_16(pblendw)
COMPUTE(blendps)
{
    (void)c;
    xmm bits = _mm_setr_epi32(1, 2, 4, 8);
    return choose(_mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(r->imm), bits), bits), d, s);
}
FORMS_16(blendps)
COMPUTE(blendpd)
{
    (void)c;
    return from_halves(low64(r->imm & 1 ? s : d), high64(r->imm & 2 ? s : d));
}
FORMS_16(blendpd)

/* INSERTPS: imm 7:6 the source element (memory: the only one), 5:4 where it goes, 3:0 elements to clear. */
ALWAYS_INLINE void insertps(struct vcpu *c, const struct record *r, u32 value)
{
    union vector *d = &c->xmm[r->reg];
    d->d[r->imm >> 4 & 3] = value;
    for (unsigned i = 0; i < 4; i++)
        if (r->imm >> i & 1)
            d->d[i] = 0;
}
OP(op_insertps_reg)
{
    insertps(c, r, c->xmm[r->rm].d[r->imm >> 6 & 3]);
    NEXT();
}
OP(op_insertps_mem)
{
    insertps(c, r, (u32)mem_load(c, r, 4));
    NEXT();
}
HANDLER_REG_MEM(insertps);

/* MPSADBW: eight sums of absolute differences of 4 bytes of s against 4 each of d. */
COMPUTE(mpsadbw)
{
    (void)c;
    switch (r->imm & 7) {
#define X(n) case n: __asm__("mpsadbw %2, %1, %0" : "+x"(d) : "x"(s), "i"(n)); break;
    CASES_4(X, 0) CASES_4(X, 4)
#undef X
    }
    return d;
}
FORMS_16(mpsadbw)

/* PTEST: ZF of s AND d, CF of s AND NOT d; the other flags are cleared. */
ALWAYS_INLINE void ptest(struct vcpu *c, const struct record *r, xmm s)
{
    bool zero, carry;
    __asm__("ptest %3, %2" : "=@ccz"(zero), "=@ccc"(carry) : "x"(get_xmm(c, r->reg)), "x"(s));
    c->zf = !zero;
    c->sf = 1; /* odd parity: PF 0 */
    set_carries(c, carry, 0, 0);
}
OP(op_ptest_reg)
{
    ptest(c, r, get_xmm(c, r->rm));
    NEXT();
}
OP(op_ptest_mem)
{
    ptest(c, r, mem_load16_aligned(c, r));
    NEXT();
}
HANDLER_REG_MEM(ptest);
