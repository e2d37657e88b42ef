/* AVX, F16C, FMA: floating-point arithmetic, comparison, conversion. */
#include "avx.h"

/* ---- While an exception is unmasked: what would be raised, before anything changes (mxcsr.c) ---------------- */

static void split(union vector *to, ymm from) { _mm256_storeu_si256((ymm *)to, from); }
ALWAYS_INLINE unsigned lanes_of(const struct record *r, unsigned bytes) { return vector_bytes(r) / bytes; }

static COLD void check_arithmetic(struct vcpu *c, const struct record *r, enum arithmetic op, unsigned bytes,
                                  unsigned lanes, ymm v, ymm s)
{
    union vector a, b;
    split(&a, v);
    split(&b, s);
    mxcsr_lanes(c, r, op, bytes, lanes, &a, &b, NULL);
}

/* Pairs of neighbours: in each half of 128 bits those of v, then those of s. */
static COLD void check_horizontal(struct vcpu *c, const struct record *r, enum arithmetic op, unsigned bytes, ymm v, ymm s)
{
    union vector first, second, even, odd;
    unsigned in_half = 16 / bytes;
    split(&first, v);
    split(&second, s);
    for (unsigned i = 0; i < lanes_of(r, bytes); i++) {
        const union vector *from = i % in_half < in_half / 2 ? &first : &second;
        unsigned pair = i / in_half * in_half + i % (in_half / 2) * 2;
        if (bytes == 4)
            even.d[i] = from->d[pair], odd.d[i] = from->d[pair + 1];
        else
            even.q[i] = from->q[pair], odd.q[i] = from->q[pair + 1];
    }
    mxcsr_lanes(c, r, op, bytes, lanes_of(r, bytes), &even, &odd, NULL);
}

static void negate(union vector *v, unsigned bytes, unsigned lane)
{
    v->b[lane * bytes + bytes - 1] ^= 0x80;
}

/* Even elements are subtracted: added with the other sign. */
static COLD void check_add_sub(struct vcpu *c, const struct record *r, unsigned bytes, ymm v, ymm s)
{
    union vector a, b;
    split(&a, v);
    split(&b, s);
    for (unsigned i = 0; i < lanes_of(r, bytes); i += 2)
        negate(&b, bytes, i);
    mxcsr_lanes(c, r, FLOAT_ADD, bytes, lanes_of(r, bytes), &a, &b, NULL);
}

/* Signs of a fused multiplication: of the product, of the addend in even and in odd elements. */
enum { MINUS_PRODUCT = 1, MINUS_EVEN = 2, MINUS_ODD = 4 };
static COLD void check_fma(struct vcpu *c, const struct record *r, unsigned bytes, unsigned lanes, unsigned signs, ymm x,
                           ymm y, ymm z)
{
    union vector a, b, addend;
    split(&a, x);
    split(&b, y);
    split(&addend, z);
    for (unsigned i = 0; i < lanes; i++) {
        if (signs & MINUS_PRODUCT)
            negate(&a, bytes, i);
        if (signs & (i & 1 ? MINUS_ODD : MINUS_EVEN))
            negate(&addend, bytes, i);
    }
    mxcsr_lanes(c, r, FLOAT_FMA, bytes, lanes, &a, &b, &addend);
}

/* The steps of a dot product (ops_sse_float.c), both halves at once. */
static COLD void check_dot_product(struct vcpu *c, const struct record *r, unsigned bytes, ymm v, ymm s)
{
    union vector a, b, sum = {0}, next = {0};
    unsigned lanes = lanes_of(r, bytes), in_half = 16 / bytes;
    ymm d;
    split(&a, v);
    split(&b, s);
    for (unsigned i = 0; i < 32; i++)
        if (!(r->imm >> (4 + i % 16 / bytes) & 1))
            a.b[i] = b.b[i] = 0;
    mxcsr_lanes(c, r, FLOAT_MUL, bytes, lanes, &a, &b, NULL);
    v = load32(&a);
    s = load32(&b);
    if (bytes == 8)
        HOST_3("vmulpd");
    else
        HOST_3("vmulps");
    split(&a, d);
    for (unsigned left = lanes; left > lanes / in_half; left /= 2) {
        for (unsigned i = 0; i < left / 2; i++)
            if (bytes == 4)
                sum.d[i] = a.d[2 * i], next.d[i] = a.d[2 * i + 1];
            else
                sum.q[i] = a.q[2 * i], next.q[i] = a.q[2 * i + 1];
        mxcsr_lanes(c, r, FLOAT_ADD, bytes, left / 2, &sum, &next, NULL);
        v = load32(&sum);
        s = load32(&next);
        if (bytes == 8)
            HOST_3("vaddpd");
        else
            HOST_3("vaddps");
        split(&a, d);
    }
}

/* ---- Arithmetic that can overflow and underflow ------------------------------------------------------------ */

#define VEX_ARITHMETIC(name, check, host, form) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        if (mxcsr_unmasked(c)) \
            check; \
        host(#name); \
        return d; \
    } \
    form(name)
#define VEX_ARITHMETIC_ALL(name, op) \
    VEX_ARITHMETIC(name##ps, check_arithmetic(c, r, op, 4, lanes_of(r, 4), v, s), HOST_3, VEX_X) \
    VEX_ARITHMETIC(name##pd, check_arithmetic(c, r, op, 8, lanes_of(r, 8), v, s), HOST_3, VEX_X) \
    VEX_ARITHMETIC(name##ss, check_arithmetic(c, r, op, 4, 1, v, s), HOST_3_128, VEX_4) \
    VEX_ARITHMETIC(name##sd, check_arithmetic(c, r, op, 8, 1, v, s), HOST_3_128, VEX_8)
VEX_ARITHMETIC_ALL(vadd, FLOAT_ADD)
VEX_ARITHMETIC_ALL(vsub, FLOAT_SUB)
VEX_ARITHMETIC_ALL(vmul, FLOAT_MUL)
VEX_ARITHMETIC_ALL(vdiv, FLOAT_DIV)
VEX_ARITHMETIC(vhaddps, check_horizontal(c, r, FLOAT_ADD, 4, v, s), HOST_3, VEX_X)
VEX_ARITHMETIC(vhaddpd, check_horizontal(c, r, FLOAT_ADD, 8, v, s), HOST_3, VEX_X)
VEX_ARITHMETIC(vhsubps, check_horizontal(c, r, FLOAT_SUB, 4, v, s), HOST_3, VEX_X)
VEX_ARITHMETIC(vhsubpd, check_horizontal(c, r, FLOAT_SUB, 8, v, s), HOST_3, VEX_X)
VEX_ARITHMETIC(vaddsubps, check_add_sub(c, r, 4, v, s), HOST_3, VEX_X)
VEX_ARITHMETIC(vaddsubpd, check_add_sub(c, r, 8, v, s), HOST_3, VEX_X)
VEX_ARITHMETIC(vcvtsd2ss, check_arithmetic(c, r, FLOAT_TO_SINGLE, 8, 1, v, s), HOST_3_128, VEX_8)
VEX_ARITHMETIC(vcvtpd2ps, check_arithmetic(c, r, FLOAT_TO_SINGLE, 8, lanes_of(r, 8), s, s), HOST_NARROW, VEX_X)

#define CHECK_DOT_PS(statement) \
    do { \
        if (mxcsr_unmasked(c)) \
            check_dot_product(c, r, 4, v, s); \
        statement; \
    } while (0)
#define CHECK_DOT_PD(statement) \
    do { \
        if (mxcsr_unmasked(c)) \
            check_dot_product(c, r, 8, v, s); \
        statement; \
    } while (0)
VEX_IMMEDIATE(vdpps, VEX_X, "%xmm1, %xmm0, %xmm0", "%ymm1, %ymm0, %ymm0", CHECK_DOT_PS)
VEX_IMMEDIATE_128(vdppd, VEX_16, "%xmm1, %xmm0, %xmm0", CHECK_DOT_PD)

/* ---- FMA: the digits say which operands are multiplied and which is added; 1 is the destination -------------- */

#define VEX_FMA_ONE(name, signs, bytes, lanes, x, y, z, host, form) \
    VEX_COMPUTE(name) \
    { \
        ymm d = get_ymm(c, r->reg); \
        if (mxcsr_unmasked(c)) \
            check_fma(c, r, bytes, lanes, signs, x, y, z); \
        host(#name); \
        return d; \
    } \
    form(name)
#define HOST_FMA(name) \
    do { \
        if (is_256(r)) \
            __asm__ volatile(name " %t2, %t1, %t0" : "+x"(d) : "x"(v), "x"(s)); \
        else \
            __asm__ volatile(name " %x2, %x1, %x0" : "+x"(d) : "x"(v), "x"(s)); \
    } while (0)
#define HOST_FMA_128(name) __asm__ volatile(name " %x2, %x1, %x0" : "+x"(d) : "x"(v), "x"(s))
#define VEX_FMA_PACKED(name, signs) \
    VEX_FMA_ONE(name##132ps, signs, 4, lanes_of(r, 4), d, s, v, HOST_FMA, VEX_X) \
    VEX_FMA_ONE(name##213ps, signs, 4, lanes_of(r, 4), v, d, s, HOST_FMA, VEX_X) \
    VEX_FMA_ONE(name##231ps, signs, 4, lanes_of(r, 4), v, s, d, HOST_FMA, VEX_X) \
    VEX_FMA_ONE(name##132pd, signs, 8, lanes_of(r, 8), d, s, v, HOST_FMA, VEX_X) \
    VEX_FMA_ONE(name##213pd, signs, 8, lanes_of(r, 8), v, d, s, HOST_FMA, VEX_X) \
    VEX_FMA_ONE(name##231pd, signs, 8, lanes_of(r, 8), v, s, d, HOST_FMA, VEX_X)
#define VEX_FMA_SCALAR(name, signs) \
    VEX_FMA_ONE(name##132ss, signs, 4, 1, d, s, v, HOST_FMA_128, VEX_4) \
    VEX_FMA_ONE(name##213ss, signs, 4, 1, v, d, s, HOST_FMA_128, VEX_4) \
    VEX_FMA_ONE(name##231ss, signs, 4, 1, v, s, d, HOST_FMA_128, VEX_4) \
    VEX_FMA_ONE(name##132sd, signs, 8, 1, d, s, v, HOST_FMA_128, VEX_8) \
    VEX_FMA_ONE(name##213sd, signs, 8, 1, v, d, s, HOST_FMA_128, VEX_8) \
    VEX_FMA_ONE(name##231sd, signs, 8, 1, v, s, d, HOST_FMA_128, VEX_8)
VEX_FMA_PACKED(vfmadd, 0)
VEX_FMA_SCALAR(vfmadd, 0)
VEX_FMA_PACKED(vfmsub, MINUS_EVEN | MINUS_ODD)
VEX_FMA_SCALAR(vfmsub, MINUS_EVEN | MINUS_ODD)
VEX_FMA_PACKED(vfnmadd, MINUS_PRODUCT)
VEX_FMA_SCALAR(vfnmadd, MINUS_PRODUCT)
VEX_FMA_PACKED(vfnmsub, MINUS_PRODUCT | MINUS_EVEN | MINUS_ODD)
VEX_FMA_SCALAR(vfnmsub, MINUS_PRODUCT | MINUS_EVEN | MINUS_ODD)
VEX_FMA_PACKED(vfmaddsub, MINUS_EVEN)
VEX_FMA_PACKED(vfmsubadd, MINUS_ODD)

/* ---- The rest of arithmetic -------------------------------------------------------------------------------- */

#define VEX_FLOAT(name, host, form) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        CHECKED(host(#name)); \
        return d; \
    } \
    form(name)
VEX_FLOAT(vminps, HOST_3, VEX_X)
VEX_FLOAT(vminpd, HOST_3, VEX_X)
VEX_FLOAT(vminss, HOST_3_128, VEX_4)
VEX_FLOAT(vminsd, HOST_3_128, VEX_8)
VEX_FLOAT(vmaxps, HOST_3, VEX_X)
VEX_FLOAT(vmaxpd, HOST_3, VEX_X)
VEX_FLOAT(vmaxss, HOST_3_128, VEX_4)
VEX_FLOAT(vmaxsd, HOST_3_128, VEX_8)
VEX_FLOAT(vsqrtps, HOST_2, VEX_X)
VEX_FLOAT(vsqrtpd, HOST_2, VEX_X)
VEX_FLOAT(vsqrtss, HOST_3_128, VEX_4)
VEX_FLOAT(vsqrtsd, HOST_3_128, VEX_8)
/* Approximations raise nothing; their bits are the host's. */
VEX_FLOAT(vrcpps, HOST_2, VEX_X)
VEX_FLOAT(vrcpss, HOST_3_128, VEX_4)
VEX_FLOAT(vrsqrtps, HOST_2, VEX_X)
VEX_FLOAT(vrsqrtss, HOST_3_128, VEX_4)

/* 32 predicates, in imm 4:0. */
VEX_IMMEDIATE(vcmpps, VEX_X, "%xmm1, %xmm0, %xmm0", "%ymm1, %ymm0, %ymm0", CHECKED)
VEX_IMMEDIATE(vcmppd, VEX_X, "%xmm1, %xmm0, %xmm0", "%ymm1, %ymm0, %ymm0", CHECKED)
VEX_IMMEDIATE_128(vcmpss, VEX_4, "%xmm1, %xmm0, %xmm0", CHECKED)
VEX_IMMEDIATE_128(vcmpsd, VEX_8, "%xmm1, %xmm0, %xmm0", CHECKED)

VEX_IMMEDIATE(vroundps, VEX_X, "%xmm1, %xmm0", "%ymm1, %ymm0", CHECKED)
VEX_IMMEDIATE(vroundpd, VEX_X, "%xmm1, %xmm0", "%ymm1, %ymm0", CHECKED)
VEX_IMMEDIATE_128(vroundss, VEX_4, "%xmm1, %xmm0, %xmm0", CHECKED)
VEX_IMMEDIATE_128(vroundsd, VEX_8, "%xmm1, %xmm0, %xmm0", CHECKED)

/* ---- Conversion between vectors ---------------------------------------------------------------------------- */

VEX_FLOAT(vcvtdq2ps, HOST_2, VEX_X)
VEX_FLOAT(vcvtps2dq, HOST_2, VEX_X)
VEX_FLOAT(vcvttps2dq, HOST_2, VEX_X)
VEX_FLOAT(vcvtdq2pd, HOST_WIDEN, VEX_HALF)
VEX_FLOAT(vcvtps2pd, HOST_WIDEN, VEX_HALF)
VEX_FLOAT(vcvtpd2dq, HOST_NARROW, VEX_X)
VEX_FLOAT(vcvttpd2dq, HOST_NARROW, VEX_X)
VEX_FLOAT(vcvtss2sd, HOST_3_128, VEX_4)
VEX_FLOAT(vcvtph2ps, HOST_WIDEN, VEX_HALF)

/* Into a register, whose rest is cleared, or to memory. imm 1:0 rounding, 2 MXCSR's instead. */
HOST_TABLE(host_vcvtps2ph_128, "vcvtps2ph $vmfs_imm, %xmm1, %xmm0")
HOST_TABLE(host_vcvtps2ph_256, "vcvtps2ph $vmfs_imm, %ymm1, %xmm0")
static NOINLINE ymm to_half(struct vcpu *c, const struct record *r)
{
    ymm s = get_ymm(c, r->reg);
    if (mxcsr_unmasked(c))
        check_arithmetic(c, r, FLOAT_TO_HALF, 4, lanes_of(r, 4), s, s);
    return HOST_IMMEDIATE(is_256(r) ? host_vcvtps2ph_256 : host_vcvtps2ph_128, r, s, s);
}
OP(op_vcvtps2ph_reg)
{
    set_ymm(c, r->rm, to_half(c, r));
    NEXT();
}
/* A store that faults has set the flags in MXCSR, as on Intel's processors. */
OP(op_vcvtps2ph_mem)
{
    mem_store_ymm(c, r, to_half(c, r), vector_bytes(r) / 2, false);
    NEXT();
}
HANDLER_REG_MEM(vcvtps2ph);

/* ---- Conversion from general registers; the other direction has no vector result: SSE's handlers ------------ */

#define VEX_FROM_INTEGER(name, bits, suffix) \
    ALWAYS_INLINE void name##bits(struct vcpu *c, const struct record *r, u64 value) \
    { \
        xmm d, v = get_xmm(c, r->vvvv); \
        CHECKED(__asm__ volatile(#name suffix " %2, %1, %0" : "=x"(d) : "x"(v), "r"((u##bits)value))); \
        set_ymm(c, r->reg, wide(d)); \
    }
#define VEX_FROM_INTEGER_BOTH(name) \
    VEX_FROM_INTEGER(name, 32, "l") \
    VEX_FROM_INTEGER(name, 64, "q") \
    FROM_GENERAL(name)
VEX_FROM_INTEGER_BOTH(vcvtsi2ss)
VEX_FROM_INTEGER_BOTH(vcvtsi2sd)
