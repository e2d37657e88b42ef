/* AVX, AVX2, VAES, VPCLMULQDQ, GFNI: packed integers, logic, shuffles. One host instruction each. */
#include "avx.h"

#define VEX_INTEGER(name) VEX_PLAIN_3(name, VEX_X)

#define VEX_PLAIN_2_128(name) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        HOST_2_128(#name); \
        return d; \
    } \
    VEX_16(name)

/* ---- Logic. The float forms are the same operation --------------------------------------------------------- */

/* VPAND of 256 bits is AVX2, VANDPS is AVX: this is the one for all. */
VEX_INTEGER(vandps)
VEX_INTEGER(vandnps)
VEX_INTEGER(vorps)
VEX_INTEGER(vxorps)

/* ---- Arithmetic -------------------------------------------------------------------------------------------- */

VEX_INTEGER(vpaddb)
VEX_INTEGER(vpaddw)
VEX_INTEGER(vpaddd)
VEX_INTEGER(vpaddq)
VEX_INTEGER(vpaddsb)
VEX_INTEGER(vpaddsw)
VEX_INTEGER(vpaddusb)
VEX_INTEGER(vpaddusw)
VEX_INTEGER(vpsubb)
VEX_INTEGER(vpsubw)
VEX_INTEGER(vpsubd)
VEX_INTEGER(vpsubq)
VEX_INTEGER(vpsubsb)
VEX_INTEGER(vpsubsw)
VEX_INTEGER(vpsubusb)
VEX_INTEGER(vpsubusw)
VEX_INTEGER(vpmullw)
VEX_INTEGER(vpmulld)
VEX_INTEGER(vpmulhw)
VEX_INTEGER(vpmulhuw)
VEX_INTEGER(vpmulhrsw)
VEX_INTEGER(vpmuludq)
VEX_INTEGER(vpmuldq)
VEX_INTEGER(vpmaddwd)
VEX_INTEGER(vpmaddubsw)
VEX_INTEGER(vpsadbw)
VEX_INTEGER(vpavgb)
VEX_INTEGER(vpavgw)
VEX_INTEGER(vpminub)
VEX_INTEGER(vpminuw)
VEX_INTEGER(vpminud)
VEX_INTEGER(vpminsb)
VEX_INTEGER(vpminsw)
VEX_INTEGER(vpminsd)
VEX_INTEGER(vpmaxub)
VEX_INTEGER(vpmaxuw)
VEX_INTEGER(vpmaxud)
VEX_INTEGER(vpmaxsb)
VEX_INTEGER(vpmaxsw)
VEX_INTEGER(vpmaxsd)
VEX_INTEGER(vpcmpeqb)
VEX_INTEGER(vpcmpeqw)
VEX_INTEGER(vpcmpeqd)
VEX_INTEGER(vpcmpeqq)
VEX_INTEGER(vpcmpgtb)
VEX_INTEGER(vpcmpgtw)
VEX_INTEGER(vpcmpgtd)
VEX_INTEGER(vpcmpgtq)
VEX_INTEGER(vphaddw)
VEX_INTEGER(vphaddd)
VEX_INTEGER(vphaddsw)
VEX_INTEGER(vphsubw)
VEX_INTEGER(vphsubd)
VEX_INTEGER(vphsubsw)
VEX_INTEGER(vpsignb)
VEX_INTEGER(vpsignw)
VEX_INTEGER(vpsignd)
VEX_PLAIN_2(vpabsb, VEX_X)
VEX_PLAIN_2(vpabsw, VEX_X)
VEX_PLAIN_2(vpabsd, VEX_X)
VEX_PLAIN_2_128(vphminposuw)
VEX_IMM_3(vmpsadbw, VEX_X)

/* ---- Pack, unpack, extend ---------------------------------------------------------------------------------- */

VEX_INTEGER(vpacksswb)
VEX_INTEGER(vpackssdw)
VEX_INTEGER(vpackuswb)
VEX_INTEGER(vpackusdw)
VEX_INTEGER(vpunpcklbw)
VEX_INTEGER(vpunpcklwd)
VEX_INTEGER(vpunpckldq)
VEX_INTEGER(vpunpcklqdq)
VEX_INTEGER(vpunpckhbw)
VEX_INTEGER(vpunpckhwd)
VEX_INTEGER(vpunpckhdq)
VEX_INTEGER(vpunpckhqdq)
VEX_INTEGER(vunpcklps)
VEX_INTEGER(vunpcklpd)
VEX_INTEGER(vunpckhps)
VEX_INTEGER(vunpckhpd)

/* The source is narrower than the destination: always an XMM register. */
#define VEX_EXTEND(name, form) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        HOST_WIDEN(#name); \
        return d; \
    } \
    form(name)
VEX_EXTEND(vpmovsxbw, VEX_HALF)
VEX_EXTEND(vpmovsxbd, VEX_QUARTER)
VEX_EXTEND(vpmovsxbq, VEX_EIGHTH)
VEX_EXTEND(vpmovsxwd, VEX_HALF)
VEX_EXTEND(vpmovsxwq, VEX_QUARTER)
VEX_EXTEND(vpmovsxdq, VEX_HALF)
VEX_EXTEND(vpmovzxbw, VEX_HALF)
VEX_EXTEND(vpmovzxbd, VEX_QUARTER)
VEX_EXTEND(vpmovzxbq, VEX_EIGHTH)
VEX_EXTEND(vpmovzxwd, VEX_HALF)
VEX_EXTEND(vpmovzxwq, VEX_QUARTER)
VEX_EXTEND(vpmovzxdq, VEX_HALF)
VEX_EXTEND(vpbroadcastb, VEX_1)
VEX_EXTEND(vpbroadcastw, VEX_2)
VEX_EXTEND(vpbroadcastd, VEX_4)
VEX_EXTEND(vpbroadcastq, VEX_8)

/* ---- Shifts ------------------------------------------------------------------------------------------------ */

/* All elements by the low 64 bits of an XMM register or 16 bytes of memory; or by an immediate, into the register in vvvv. */
#define VEX_SHIFT(name) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        if (is_256(r)) \
            __asm__(#name " %x2, %t1, %t0" : "=x"(d) : "x"(v), "x"(s)); \
        else \
            __asm__(#name " %x2, %x1, %x0" : "=x"(d) : "x"(v), "x"(s)); \
        return d; \
    } \
    VEX_16(name) \
    OP(op_##name##_I) \
    { \
        set_ymm(c, r->vvvv, do_##name(c, r, get_ymm(c, r->rm), wide(from64((u8)r->imm)))); \
        NEXT(); \
    } \
    HANDLER(name##_I);
VEX_SHIFT(vpsllw)
VEX_SHIFT(vpslld)
VEX_SHIFT(vpsllq)
VEX_SHIFT(vpsrlw)
VEX_SHIFT(vpsrld)
VEX_SHIFT(vpsrlq)
VEX_SHIFT(vpsraw)
VEX_SHIFT(vpsrad)

#define VEX_SHIFT_BYTES(name) \
    HOST_TABLE(host_##name##_128, #name " $vmfs_imm, %xmm0, %xmm0") \
    HOST_TABLE(host_##name##_256, #name " $vmfs_imm, %ymm0, %ymm0") \
    OP(op_##name##_I) \
    { \
        ymm s = get_ymm(c, r->rm); \
        set_ymm(c, r->vvvv, HOST_IMMEDIATE(is_256(r) ? host_##name##_256 : host_##name##_128, r, s, s)); \
        NEXT(); \
    } \
    HANDLER(name##_I);
VEX_SHIFT_BYTES(vpslldq)
VEX_SHIFT_BYTES(vpsrldq)

/* Each element by its own count. */
VEX_INTEGER(vpsllvd)
VEX_INTEGER(vpsllvq)
VEX_INTEGER(vpsrlvd)
VEX_INTEGER(vpsrlvq)
VEX_INTEGER(vpsravd)

/* ---- Shuffles ---------------------------------------------------------------------------------------------- */

VEX_INTEGER(vpshufb)
VEX_IMM_2(vpshufd, VEX_X)
VEX_IMM_2(vpshufhw, VEX_X)
VEX_IMM_2(vpshuflw, VEX_X)
VEX_IMM_3(vshufps, VEX_X)
VEX_IMM_3(vshufpd, VEX_X)
VEX_IMM_3(vpalignr, VEX_X)
VEX_INTEGER(vpermilps)
VEX_INTEGER(vpermilpd)
#define NAMED_IMM_2(name, instruction) \
    HOST_TABLE(host_##name##_128, instruction " $vmfs_imm, %xmm1, %xmm0") \
    HOST_TABLE(host_##name##_256, instruction " $vmfs_imm, %ymm1, %ymm0") \
    VEX_COMPUTE(name) { return HOST_IMMEDIATE(is_256(r) ? host_##name##_256 : host_##name##_128, r, v, s); } \
    VEX_X(name)
NAMED_IMM_2(vpermilps_I, "vpermilps")
NAMED_IMM_2(vpermilpd_I, "vpermilpd")

/* Over both halves: of 256 bits only. */
#define VEX_256_IMM(name, operands) \
    HOST_TABLE(host_##name, #name " $vmfs_imm, " operands) \
    VEX_COMPUTE(name) { return HOST_IMMEDIATE(host_##name, r, v, s); } \
    VEX_X(name)
VEX_256_IMM(vperm2f128, "%ymm1, %ymm0, %ymm0")
VEX_256_IMM(vpermq, "%ymm1, %ymm0")
#define VEX_256(name) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        __asm__(#name " %t2, %t1, %t0" : "=x"(d) : "x"(v), "x"(s)); \
        return d; \
    } \
    VEX_X(name)
VEX_256(vpermd)

/* ---- Blends ------------------------------------------------------------------------------------------------ */

VEX_IMM_3(vpblendw, VEX_X)
VEX_IMM_3(vblendps, VEX_X)
VEX_IMM_3(vblendpd, VEX_X)

/* By the top bits of the register in bits 7:4 of the immediate. */
#define VEX_BLEND(name) \
    VEX_COMPUTE(name) \
    { \
        ymm d, mask = get_ymm(c, r->imm >> 4 & 15); \
        if (is_256(r)) \
            __asm__(#name " %t3, %t2, %t1, %t0" : "=x"(d) : "x"(v), "x"(s), "x"(mask)); \
        else \
            __asm__(#name " %x3, %x2, %x1, %x0" : "=x"(d) : "x"(v), "x"(s), "x"(mask)); \
        return d; \
    } \
    VEX_X(name)
VEX_BLEND(vpblendvb)
VEX_BLEND(vblendvps)
VEX_BLEND(vblendvpd)

/* ---- Tests: ZF of s AND d, CF of s AND NOT d (VTESTPS, VTESTPD: of the sign bits); the others are cleared -------- */

#define VEX_TEST(name) \
    ALWAYS_INLINE void test_##name(struct vcpu *c, const struct record *r, ymm s) \
    { \
        bool zero, carry; \
        ymm d = get_ymm(c, r->reg); \
        if (is_256(r)) \
            __asm__(#name " %t3, %t2" : "=@ccz"(zero), "=@ccc"(carry) : "x"(d), "x"(s)); \
        else \
            __asm__(#name " %x3, %x2" : "=@ccz"(zero), "=@ccc"(carry) : "x"(d), "x"(s)); \
        c->zf = !zero; \
        c->sf = 1; /* odd parity: PF 0 */ \
        set_carries(c, carry, 0, 0); \
    } \
    OP(op_##name##_reg) \
    { \
        test_##name(c, r, get_ymm(c, r->rm)); \
        NEXT(); \
    } \
    OP(op_##name##_mem) \
    { \
        test_##name(c, r, mem_load_ymm(c, r, vector_bytes(r), false)); \
        NEXT(); \
    } \
    HANDLER_REG_MEM(name);
VEX_TEST(vptest)
VEX_TEST(vtestps)
VEX_TEST(vtestpd)

/* ---- AES, carry-less multiplication, Galois fields --------------------------------------------------------- */

VEX_INTEGER(vaesenc)
VEX_INTEGER(vaesenclast)
VEX_INTEGER(vaesdec)
VEX_INTEGER(vaesdeclast)
VEX_PLAIN_2_128(vaesimc)
VEX_IMMEDIATE_128(vaeskeygenassist, VEX_16, "%xmm1, %xmm0", UNCHECKED)
VEX_IMM_3(vpclmulqdq, VEX_X)
VEX_INTEGER(vgf2p8mulb)
VEX_IMM_3(vgf2p8affineqb, VEX_X)
VEX_IMM_3(vgf2p8affineinvqb, VEX_X)

/* GFNI's form without VEX: the tables are of functions on XMM0 and XMM1, too. */
SSE_INTEGER(gf2p8mulb)
#define GALOIS_AFFINE(name) \
    HOST_TABLE(host_##name, #name " $vmfs_imm, %xmm1, %xmm0") \
    COMPUTE(name) \
    { \
        (void)c; \
        return low_half(HOST_IMMEDIATE(host_##name, r, wide(d), wide(s))); \
    } \
    FORMS_16(name)
GALOIS_AFFINE(gf2p8affineqb)
GALOIS_AFFINE(gf2p8affineinvqb)
