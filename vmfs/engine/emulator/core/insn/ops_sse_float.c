/* SSE, SSE2, SSE3, SSE4.1: floating-point arithmetic, comparison, conversion. */
#include "sse.h"

#define HOST(name) __asm__ volatile(#name " %1, %0" : "+x"(d) : "x"(s))

/* ---- Arithmetic that can overflow and underflow -------------------------------------------------------- */

#define ARITHMETIC(name, op, bytes, lanes, memory) \
    COMPUTE(name) \
    { \
        if (mxcsr_unmasked(c)) \
            mxcsr_arithmetic(c, r, op, bytes, lanes, d, s); \
        HOST(name); \
        return d; \
    } \
    FORMS_##memory(name)
#define ARITHMETIC_ALL(name, op) \
    ARITHMETIC(name##ps, op, 4, 4, 16) \
    ARITHMETIC(name##pd, op, 8, 2, 16) \
    ARITHMETIC(name##ss, op, 4, 1, 4) \
    ARITHMETIC(name##sd, op, 8, 1, 8)
ARITHMETIC_ALL(add, FLOAT_ADD)
ARITHMETIC_ALL(sub, FLOAT_SUB)
ARITHMETIC_ALL(mul, FLOAT_MUL)
ARITHMETIC_ALL(div, FLOAT_DIV)

/* Horizontal: pairs of neighbours, d's and then s's. `even` and `odd` are the pairs' first and second
 * elements. */
#define HORIZONTAL(name, op, bytes, lanes, even, odd) \
    COMPUTE(name) \
    { \
        if (mxcsr_unmasked(c)) \
            mxcsr_arithmetic(c, r, op, bytes, lanes, even, odd); \
        HOST(name); \
        return d; \
    } \
    FORMS_16(name)
#define SINGLES(mask) (xmm)_mm_shuffle_ps((__m128)d, (__m128)s, mask)
HORIZONTAL(haddps, FLOAT_ADD, 4, 4, SINGLES(0x88), SINGLES(0xdd))
HORIZONTAL(hsubps, FLOAT_SUB, 4, 4, SINGLES(0x88), SINGLES(0xdd))
HORIZONTAL(haddpd, FLOAT_ADD, 8, 2, _mm_unpacklo_epi64(d, s), _mm_unpackhi_epi64(d, s))
HORIZONTAL(hsubpd, FLOAT_SUB, 8, 2, _mm_unpacklo_epi64(d, s), _mm_unpackhi_epi64(d, s))
/* Even elements are subtracted: added with the other sign. */
HORIZONTAL(addsubps, FLOAT_ADD, 4, 4, d, _mm_xor_si128(s, _mm_set1_epi64x(0x80000000)))
HORIZONTAL(addsubpd, FLOAT_ADD, 8, 2, d, _mm_xor_si128(s, _mm_set_epi64x(0, (i64)(1ull << 63))))

/* ---- The rest of arithmetic ---------------------------------------------------------------------------- */

#define FLOAT(name, memory) \
    COMPUTE(name) \
    { \
        CHECKED(HOST(name)); \
        return d; \
    } \
    FORMS_##memory(name)
#define FLOAT_ALL(name) FLOAT(name##ps, 16) FLOAT(name##pd, 16) FLOAT(name##ss, 4) FLOAT(name##sd, 8)
FLOAT_ALL(sqrt)
FLOAT_ALL(min)
FLOAT_ALL(max)

/* Approximations raise nothing; their bits are the host's (Intel SDM 2B RCPPS bounds the error only). */
FLOAT(rcpps, 16)
FLOAT(rcpss, 4)
FLOAT(rsqrtps, 16)
FLOAT(rsqrtss, 4)

/* ---- Comparison ---------------------------------------------------------------------------------------- */

/* The predicate is imm 2:0. */
#define COMPARE(name, memory) \
    COMPUTE(name) \
    { \
        if (mxcsr_unmasked(c)) \
            mxcsr_begin(c); \
        switch (r->imm & 7) { \
            CASES_4(COMPARE_CASE_##name, 0) CASES_4(COMPARE_CASE_##name, 4) \
        } \
        if (mxcsr_unmasked(c)) \
            mxcsr_end(c, r); \
        return d; \
    } \
    FORMS_##memory(name)
#define COMPARE_CASE(name, n) case n: __asm__ volatile(name " %2, %1, %0" : "+x"(d) : "x"(s), "i"(n)); break;
#define COMPARE_CASE_cmpps(n) COMPARE_CASE("cmpps", n)
#define COMPARE_CASE_cmppd(n) COMPARE_CASE("cmppd", n)
#define COMPARE_CASE_cmpss(n) COMPARE_CASE("cmpss", n)
#define COMPARE_CASE_cmpsd(n) COMPARE_CASE("cmpsd", n)
COMPARE(cmpps, 16)
COMPARE(cmppd, 16)
COMPARE(cmpss, 4)
COMPARE(cmpsd, 8)

/* COMISS and its like: ZF, PF, CF; the others are cleared. */
#define COMPARE_FLAGS(name, bytes) \
    ALWAYS_INLINE void compare_##name(struct vcpu *c, const struct record *r, xmm s) \
    { \
        u64 nonzero, odd, carry; /* of whole registers: no widening */ \
        CHECKED(__asm__ volatile(#name " %4, %3" : "=@ccnz"(nonzero), "=@ccnp"(odd), "=@ccc"(carry) \
                                 : "x"(get_xmm(c, r->reg)), "x"(s))); \
        c->zf = nonzero; \
        c->sf = odd; \
        c->carries = (0 - carry) << 62; /* CF, no OF */ \
    } \
    OP(op_##name##_reg) \
    { \
        compare_##name(c, r, get_xmm(c, r->rm)); \
        NEXT(); \
    } \
    GENERAL_OP(op_##name##_mem) \
    { \
        compare_##name(c, r, from64(mem_load(c, r, bytes))); \
        NEXT(); \
    } \
    OP(op_##name##_fast) \
    { \
        const u8 *p = fast_read(c, r, bytes); \
        if (unlikely(!p)) { \
            op_##name##_mem(c, r); \
            return; \
        } \
        compare_##name(c, r, from64(peek(p, bytes))); \
        NEXT(); \
    } \
    HANDLER_FAST(name);
COMPARE_FLAGS(comiss, 4)
COMPARE_FLAGS(comisd, 8)
COMPARE_FLAGS(ucomiss, 4)
COMPARE_FLAGS(ucomisd, 8)

/* ---- Conversion between vectors ------------------------------------------------------------------------ */

#define CONVERT(name, memory) \
    COMPUTE(name) \
    { \
        CHECKED(HOST(name)); \
        return d; \
    } \
    FORMS_##memory(name)
CONVERT(cvtss2sd, 4)
CONVERT(cvtps2pd, 8)
CONVERT(cvtdq2pd, 8)
CONVERT(cvtdq2ps, 16)
CONVERT(cvtps2dq, 16)
CONVERT(cvttps2dq, 16)
CONVERT(cvtpd2dq, 16)
CONVERT(cvttpd2dq, 16)
ARITHMETIC(cvtsd2ss, FLOAT_TO_SINGLE, 8, 1, 8)
ARITHMETIC(cvtpd2ps, FLOAT_TO_SINGLE, 8, 2, 16)

/* ---- Conversion from and to general registers ---------------------------------------------------------- */

#define FROM_INTEGER(name, bits, suffix) \
    ALWAYS_INLINE void name##bits(struct vcpu *c, const struct record *r, u64 value) \
    { \
        xmm d = get_xmm(c, r->reg); \
        CHECKED(__asm__ volatile(#name suffix " %1, %0" : "+x"(d) : "r"((u##bits)value))); \
        set_xmm(c, r->reg, d); \
    }
#define FROM_INTEGER_BOTH(name) \
    FROM_INTEGER(name, 32, "l") \
    FROM_INTEGER(name, 64, "q") \
    FROM_GENERAL(name)
FROM_INTEGER_BOTH(cvtsi2ss)
FROM_INTEGER_BOTH(cvtsi2sd)

#define TO_INTEGER(name, bits, bytes) \
    ALWAYS_INLINE void name##bits(struct vcpu *c, const struct record *r, xmm s) \
    { \
        u##bits value; \
        CHECKED(__asm__ volatile(#name " %1, %0" : "=r"(value) : "x"(s))); \
        set_reg(c, r->reg, bits, value); \
    } \
    OP(op_##name##bits##_reg) \
    { \
        name##bits(c, r, get_xmm(c, r->rm)); \
        NEXT(); \
    } \
    OP(op_##name##bits##_mem) \
    { \
        name##bits(c, r, from64(mem_load(c, r, bytes))); \
        NEXT(); \
    }
#define TO_INTEGER_BOTH(name, bytes) \
    TO_INTEGER(name, 32, bytes) \
    TO_INTEGER(name, 64, bytes) \
    const struct handlers H_##name = { \
        {NULL, NULL, op_##name##32_reg, op_##name##64_reg}, \
        {NULL, NULL, op_##name##32_mem, op_##name##64_mem}, \
        {NULL, NULL, op_##name##32_mem, op_##name##64_mem}, \
    };
TO_INTEGER_BOTH(cvtss2si, 4)
TO_INTEGER_BOTH(cvtsd2si, 8)
TO_INTEGER_BOTH(cvttss2si, 4)
TO_INTEGER_BOTH(cvttsd2si, 8)

/* ---- SSE4.1: rounding to integers, dot products -------------------------------------------------------- */

/* imm 1:0 rounding, 2 MXCSR's instead, 3 no precision exception. */
#define ROUND(name, memory) \
    COMPUTE(name) \
    { \
        if (mxcsr_unmasked(c)) \
            mxcsr_begin(c); \
        switch (r->imm & 15) { \
            CASES_16(ROUND_CASE_##name, 0) \
        } \
        if (mxcsr_unmasked(c)) \
            mxcsr_end(c, r); \
        return d; \
    } \
    FORMS_##memory(name)
#define ROUND_CASE_roundps(n) COMPARE_CASE("roundps", n)
#define ROUND_CASE_roundpd(n) COMPARE_CASE("roundpd", n)
#define ROUND_CASE_roundss(n) COMPARE_CASE("roundss", n)
#define ROUND_CASE_roundsd(n) COMPARE_CASE("roundsd", n)
ROUND(roundps, 16)
ROUND(roundpd, 16)
ROUND(roundss, 4)
ROUND(roundsd, 8)

/* The steps of a dot product, each with its exceptions (Intel SDM 2A DPPS): products of the elements chosen
 * by imm 7:4, zeros for the others; their sums in pairs; the sum of those. */
static COLD void dot_product_steps(struct vcpu *c, const struct record *r, unsigned bytes, xmm d, xmm s)
{
    union vector chosen = {0};
    for (unsigned i = 0; i < 16; i++)
        chosen.b[i] = r->imm >> (4 + i / bytes) & 1 ? 0xff : 0;
    xmm mask = load16(&chosen);
    d = _mm_and_si128(d, mask);
    s = _mm_and_si128(s, mask);
    mxcsr_arithmetic(c, r, FLOAT_MUL, bytes, 16 / bytes, d, s);
    if (bytes == 8) {
        HOST(mulpd);
        mxcsr_arithmetic(c, r, FLOAT_ADD, 8, 1, d, _mm_unpackhi_epi64(d, d));
        return;
    }
    HOST(mulps);
    /* The other lanes are zeros, which raise nothing. */
    xmm even = _mm_move_epi64(_mm_shuffle_epi32(d, 0x08)), odd = _mm_move_epi64(_mm_shuffle_epi32(d, 0x0d));
    mxcsr_arithmetic(c, r, FLOAT_ADD, 4, 2, even, odd);
    s = odd;
    d = even;
    HOST(addps);
    mxcsr_arithmetic(c, r, FLOAT_ADD, 4, 1, d, _mm_shuffle_epi32(d, 1));
}
static xmm __attribute__((noinline)) host_dpps(xmm d, xmm s, u32 imm)
{
    switch (imm) {
#define X(n) COMPARE_CASE("dpps", n)
        CASES_256(X)
#undef X
    }
    return d;
}
static xmm __attribute__((noinline)) host_dppd(xmm d, xmm s, u32 imm)
{
    switch (imm & 0x33) {
#define X(n) COMPARE_CASE("dppd", n)
        CASES_4(X, 0) CASES_4(X, 16) CASES_4(X, 32) CASES_4(X, 48)
#undef X
    }
    return d;
}
#define DOT_PRODUCT(name, bytes) \
    COMPUTE(name) \
    { \
        if (mxcsr_unmasked(c)) \
            dot_product_steps(c, r, bytes, d, s); \
        return host_##name(d, s, (u8)r->imm); \
    } \
    FORMS_16(name)
DOT_PRODUCT(dpps, 4)
DOT_PRODUCT(dppd, 8)
