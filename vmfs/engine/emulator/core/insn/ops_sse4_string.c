/* SSE4.2: string comparison and CRC32. */
#include "sse.h"

/* ---- PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM -------------------------------------------------------- */

struct comparison {
    xmm mask;
    u32 index;
    bool carry, zero, sign, overflow;
};

/* The lengths of the explicit forms are EAX and EDX, or RAX and RDX with REX.W, saturated to the number of
 * elements: saturated here, so that one host instruction serves both. */
static i32 element_count(const struct vcpu *c, const struct record *r, unsigned reg)
{
    i64 length = r->prefix & PREFIX_REX_W ? (i64)c->gpr[reg] : (i32)c->gpr[reg];
    return length < -16 ? -16 : length > 16 ? 16 : (i32)length;
}

#define FLAG_OUTPUTS "=@ccc"(k.carry), "=@ccz"(k.zero), "=@ccs"(k.sign), "=@cco"(k.overflow)
#define EXPLICIT(name, result) \
    static NOINLINE struct comparison host_##name(xmm a, xmm b, u32 imm, i32 la, i32 lb) \
    { \
        struct comparison k = {0}; \
        switch (imm) { \
            CASES_64(CASE_##name, 0) CASES_64(CASE_##name, 64) \
        } \
        return k; \
    }
#define IMPLICIT(name, result) \
    static NOINLINE struct comparison host_##name(xmm a, xmm b, u32 imm) \
    { \
        struct comparison k = {0}; \
        switch (imm) { \
            CASES_64(CASE_##name, 0) CASES_64(CASE_##name, 64) \
        } \
        return k; \
    }
#define CASE_pcmpestri(n) \
    case n: \
        __asm__("pcmpestri %9, %8, %7" \
                : "=c"(k.index), FLAG_OUTPUTS : "a"(la), "d"(lb), "x"(a), "x"(b), "i"(n)); \
        break;
#define CASE_pcmpestrm(n) \
    case n: \
        __asm__("pcmpestrm %9, %8, %7" \
                : "=Yz"(k.mask), FLAG_OUTPUTS : "a"(la), "d"(lb), "x"(a), "x"(b), "i"(n)); \
        break;
#define CASE_pcmpistri(n) \
    case n: __asm__("pcmpistri %7, %6, %5" : "=c"(k.index), FLAG_OUTPUTS : "x"(a), "x"(b), "i"(n)); break;
#define CASE_pcmpistrm(n) \
    case n: __asm__("pcmpistrm %7, %6, %5" : "=Yz"(k.mask), FLAG_OUTPUTS : "x"(a), "x"(b), "i"(n)); break;
EXPLICIT(pcmpestri, index)
EXPLICIT(pcmpestrm, mask)
IMPLICIT(pcmpistri, index)
IMPLICIT(pcmpistrm, mask)

/* AF and PF are cleared. */
static void set_comparison_flags(struct vcpu *c, const struct comparison *k)
{
    c->zf = !k->zero;
    c->sf = (k->sign ? CARRY_TOP : 0) | 1;
    set_carries(c, k->carry, k->overflow, 0);
}

/* imm 6: the index of the last match instead of the first; a mask of bytes or words instead of bits. Bit 7 is
 * ignored. Memory operands need not be aligned. */
static NOINLINE void compare_index(struct vcpu *c, const struct record *r, xmm s, bool explicit)
{
    xmm a = get_xmm(c, r->reg);
    u32 imm = r->imm & 0x7f;
    struct comparison k = explicit
        ? host_pcmpestri(a, s, imm, element_count(c, r, RAX), element_count(c, r, RDX))
        : host_pcmpistri(a, s, imm);
    c->gpr[RCX] = k.index;
    set_comparison_flags(c, &k);
}
static NOINLINE void compare_mask(struct vcpu *c, const struct record *r, xmm s, bool explicit)
{
    xmm a = get_xmm(c, r->reg);
    u32 imm = r->imm & 0x7f;
    struct comparison k = explicit
        ? host_pcmpestrm(a, s, imm, element_count(c, r, RAX), element_count(c, r, RDX))
        : host_pcmpistrm(a, s, imm);
    set_xmm(c, 0, k.mask);
    if (opcodes[r->id].length != LNONE) /* VPCMPESTRM, VPCMPISTRM */
        memset(c->xmm[0].b + 16, 0, 16);
    set_comparison_flags(c, &k);
}

#define STRING_COMPARISON(name, compare, explicit) \
    OP(op_##name##_reg) \
    { \
        compare(c, r, get_xmm(c, r->rm), explicit); \
        NEXT(); \
    } \
    OP(op_##name##_mem) \
    { \
        compare(c, r, mem_load16(c, r), explicit); \
        NEXT(); \
    } \
    HANDLER_REG_MEM(name);
STRING_COMPARISON(pcmpestri, compare_index, true)
STRING_COMPARISON(pcmpestrm, compare_mask, true)
STRING_COMPARISON(pcmpistri, compare_index, false)
STRING_COMPARISON(pcmpistrm, compare_mask, false)

/* ---- CRC32: the Castagnoli polynomial, reflected ------------------------------------------------------- */

#define CRC32(bits, suffix, accumulator) \
    ALWAYS_INLINE void crc32_##bits(struct vcpu *c, const struct record *r, u64 data) \
    { \
        accumulator crc = (accumulator)(u32)R64(c, r->reg); \
        __asm__("crc32" suffix " %1, %0" : "+r"(crc) : "r"((u##bits)data)); \
        R64(c, r->reg) = (u32)crc; \
    } \
    OP(op_crc32_##bits##_reg) \
    { \
        crc32_##bits(c, r, get_reg(c, r->rm, bits)); \
        NEXT(); \
    } \
    OP(op_crc32_##bits##_mem) \
    { \
        crc32_##bits(c, r, mem_load(c, r, bits / 8)); \
        NEXT(); \
    }
CRC32(8, "b", u32)
CRC32(16, "w", u32)
CRC32(32, "l", u32)
CRC32(64, "q", u64)
const struct handlers H_crc32 = {
    {op_crc32_8_reg, op_crc32_16_reg, op_crc32_32_reg, op_crc32_64_reg},
    {op_crc32_8_mem, op_crc32_16_mem, op_crc32_32_mem, op_crc32_64_mem},
    {op_crc32_8_mem, op_crc32_16_mem, op_crc32_32_mem, op_crc32_64_mem},
};
