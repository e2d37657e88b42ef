/* The vector unit, for its families: XMM registers, memory operands, MXCSR.
 *
 * An instruction is executed by the host's own: results, NaNs and MXCSR flags are the processor's. Float
 * instructions are `asm volatile`, so that the compiler neither swaps operands (the first one's NaN wins) nor
 * moves one across a change of MXCSR. Instructions whose operation the manual leaves open (RCPPS, RSQRTPS)
 * give the host's approximation.
 *
 * MXCSR: while a CPU runs, the host has the guest's rounding, DAZ and FTZ with all exceptions masked, and
 * collects the guest's sticky flags; vcpu.mxcsr has the rest. mxcsr_enter and mxcsr_leave stand around a run.
 * Only where the guest unmasks an exception (rare) does an instruction look at its flags: see mxcsr.c. */
#ifndef VMFS_SSE_H
#define VMFS_SSE_H

#ifndef __x86_64__
#error "SSE is executed by the host's SSE unit: this core builds for x86-64 hosts only"
#endif

#include <emmintrin.h>

#include "flags.h"
#include "memory.h"
#include "opcodes.h"

typedef __m128i xmm;

/* State components, their bits in XCR0 and XSTATE_BV (Intel SDM 1 13.1). */
enum { STATE_X87 = 1 << 0, STATE_SSE = 1 << 1, STATE_AVX = 1 << 2, STATE_PKRU = 1 << 9 };

#define NOINLINE __attribute__((noinline))

ALWAYS_INLINE xmm load16(const void *p) { return _mm_loadu_si128(p); }
ALWAYS_INLINE xmm load8(const void *p) { return _mm_loadl_epi64(p); }
ALWAYS_INLINE xmm from64(u64 value) { return _mm_cvtsi64_si128((i64)value); }
ALWAYS_INLINE u64 low64(xmm v) { return (u64)_mm_cvtsi128_si64(v); }
ALWAYS_INLINE xmm get_xmm(const struct vcpu *c, unsigned n) { return load16(&c->xmm[n]); }
/* Bits 255:128 stay: only VEX-encoded instructions clear them. */
ALWAYS_INLINE void set_xmm(struct vcpu *c, unsigned n, xmm value)
{
    _mm_storeu_si128((xmm *)&c->xmm[n], value);
}

/* ---- Memory operands ----------------------------------------------------------------------------------- */

/* 16 bytes, in any mode; aligned: #GP(0) off a 16-byte boundary (mxcsr.c). */
xmm mem_load16(struct vcpu *c, const struct record *r);
xmm mem_load16_aligned(struct vcpu *c, const struct record *r);
void mem_store16(struct vcpu *c, const struct record *r, xmm value);
void mem_store16_aligned(struct vcpu *c, const struct record *r, xmm value);

/* The fast form; NULL: the general one. One test sees to the page and to alignment. */
ALWAYS_INLINE const u8 *fast_read16_aligned(const struct vcpu *c, const struct record *r)
{
    u64 at = fast_address(c, r);
    const struct tlb_entry *e = &c->tlb->read[at >> 12 & (TLB_SIZE - 1)];
    u64 inside = at - e->page;
    return likely(!(inside & ~(u64)0xff0)) ? (const u8 *)(e->host + inside) : NULL;
}
ALWAYS_INLINE u8 *fast_write16_aligned(const struct vcpu *c, const struct record *r)
{
    u64 at = fast_address(c, r);
    const struct tlb_entry *e = &c->tlb->write[at >> 12 & (TLB_SIZE - 1)];
    u64 inside = at - e->page;
    return likely(!(inside & ~(u64)0xff0)) ? (u8 *)(e->host + inside) : NULL;
}

/* ---- MXCSR (Intel SDM 1 10.2.3) ------------------------------------------------------------------------ */

enum {
    MXCSR_IE = 1, MXCSR_DE = 2, MXCSR_ZE = 4, MXCSR_OE = 8, MXCSR_UE = 16, MXCSR_PE = 32, MXCSR_FLAGS = 63,
    MXCSR_DAZ = 1 << 6, MXCSR_MASKS_SHIFT = 7, MXCSR_MASKS = MXCSR_FLAGS << MXCSR_MASKS_SHIFT,
    MXCSR_ROUNDING_SHIFT = 13, MXCSR_FTZ = 1 << 15, MXCSR_RESET = 0x1f80, MXCSR_VALID = 0xffff,
};

u32 mxcsr_enter(struct vcpu *c);             /* before a run; what the host had, for mxcsr_leave */
void mxcsr_leave(struct vcpu *c, u32 host);
/* While the CPU runs: */
u32 mxcsr_read(struct vcpu *c);
void mxcsr_write(struct vcpu *c, u32 value); /* only bits of MXCSR_VALID */

ALWAYS_INLINE bool mxcsr_unmasked(const struct vcpu *c) { return unlikely(~c->mxcsr & MXCSR_MASKS); }

/* Around an instruction that neither overflows nor underflows, while an exception is unmasked: */
COLD void mxcsr_begin(struct vcpu *c);
COLD void mxcsr_end(struct vcpu *c, const struct record *r); /* raises */
/* Before one that does both: raises if it would. `lanes` elements of `bytes` (4 or 8), lane by lane d OP s;
 * TO_SINGLE converts doubles in s, TO_HALF singles, rounded as r->imm says (VCVTPS2PH); FMA is a * b + addend. */
enum arithmetic { FLOAT_ADD, FLOAT_SUB, FLOAT_MUL, FLOAT_DIV, FLOAT_TO_SINGLE, FLOAT_TO_HALF, FLOAT_FMA };
COLD void mxcsr_lanes(struct vcpu *c, const struct record *r, enum arithmetic op, unsigned bytes, unsigned lanes,
                      const union vector *a, const union vector *b, const union vector *addend);
COLD void mxcsr_arithmetic(struct vcpu *c, const struct record *r, enum arithmetic op, unsigned bytes,
                           unsigned lanes, xmm d, xmm s);

#define CHECKED(statement) \
    do { \
        if (mxcsr_unmasked(c)) \
            mxcsr_begin(c); \
        statement; \
        if (mxcsr_unmasked(c)) \
            mxcsr_end(c, r); \
    } while (0)

/* Bytes of the area of those components (ops_sse_state.c). */
u32 xsave_size(u64 components, bool compact);

/* ---- Handlers ------------------------------------------------------------------------------------------ */

/* A general form, which the fast form jumps to: inlined there, it would cost the fast path a stack frame. */
#define GENERAL_OP(name) static NOINLINE void name(struct vcpu *c, const struct record *r)

#define HANDLER_FAST(name) \
    const struct handlers H_##name = {SAME4(op_##name##_reg), SAME4(op_##name##_fast), SAME4(op_##name##_mem)}

/* Forms of an instruction V <- do_NAME(c, r, V, W). W_16: 16 bytes, aligned in memory; W_U16: unaligned; W_8,
 * W_4, W_2: so many bytes of memory, zero-extended, or the register. */
#define FORMS_16(name) FORMS_OF(name, fast_read16_aligned(c, r), load16(p), mem_load16_aligned(c, r))
#define FORMS_U16(name) FORMS_OF(name, fast_read(c, r, 16), load16(p), mem_load16(c, r))
#define FORMS_8(name) FORMS_OF(name, fast_read(c, r, 8), load8(p), from64(mem_load(c, r, 8)))
#define FORMS_4(name) FORMS_OF(name, fast_read(c, r, 4), from64(peek(p, 4)), from64(mem_load(c, r, 4)))
#define FORMS_2(name) FORMS_OF(name, fast_read(c, r, 2), from64(peek(p, 2)), from64(mem_load(c, r, 2)))
#define FORMS_OF(name, address, fast, general) \
    VECTOR_FORMS(name, xmm, set_xmm, get_xmm, r->reg, address, fast, general)

/* The register, general and fast form of V <- do_NAME(c, r, A, W), A the register of number `first`. */
#define VECTOR_FORMS(name, vector, set, get, first, address, fast, general) \
    OP(op_##name##_reg) \
    { \
        set(c, r->reg, do_##name(c, r, get(c, first), get(c, r->rm))); \
        NEXT(); \
    } \
    GENERAL_OP(op_##name##_mem) \
    { \
        vector s = general; \
        set(c, r->reg, do_##name(c, r, get(c, first), s)); \
        NEXT(); \
    } \
    OP(op_##name##_fast) \
    { \
        const u8 *p = address; \
        if (unlikely(!p)) { \
            op_##name##_mem(c, r); \
            return; \
        } \
        set(c, r->reg, do_##name(c, r, get(c, first), fast)); \
        NEXT(); \
    } \
    HANDLER_FAST(name);

/* The forms of an instruction whose source is a general register, or memory of its size: NAME32 and NAME64(c, r, value). */
#define FROM_GENERAL_SIZE(name, bits) \
    OP(op_##name##bits##_reg) \
    { \
        name##bits(c, r, get_reg(c, r->rm, bits)); \
        NEXT(); \
    } \
    OP(op_##name##bits##_mem) \
    { \
        name##bits(c, r, mem_load(c, r, bits / 8)); \
        NEXT(); \
    }
#define FROM_GENERAL(name) \
    FROM_GENERAL_SIZE(name, 32) \
    FROM_GENERAL_SIZE(name, 64) \
    const struct handlers H_##name = { \
        {NULL, NULL, op_##name##32_reg, op_##name##64_reg}, \
        {NULL, NULL, op_##name##32_mem, op_##name##64_mem}, \
        {NULL, NULL, op_##name##32_mem, op_##name##64_mem}, \
    };

#define COMPUTE(name) ALWAYS_INLINE xmm do_##name(struct vcpu *c, const struct record *r, xmm d, xmm s)

/* An integer instruction that the host has: d OP= s. */
#define SSE_INTEGER(name) \
    COMPUTE(name) \
    { \
        (void)c, (void)r; \
        __asm__(#name " %1, %0" : "+x"(d) : "x"(s)); \
        return d; \
    } \
    FORMS_16(name)

/* The immediate of a host's instruction must be a constant: a switch over all. X(n) is the case. */
#define CASES_4(X, n) X(n) X((n) + 1) X((n) + 2) X((n) + 3)
#define CASES_16(X, n) CASES_4(X, n) CASES_4(X, (n) + 4) CASES_4(X, (n) + 8) CASES_4(X, (n) + 12)
#define CASES_64(X, n) CASES_16(X, n) CASES_16(X, (n) + 16) CASES_16(X, (n) + 32) CASES_16(X, (n) + 48)
#define CASES_256(X) CASES_64(X, 0) CASES_64(X, 64) CASES_64(X, 128) CASES_64(X, 192)

#endif
