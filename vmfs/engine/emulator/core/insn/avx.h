/* VEX-encoded vector instructions, for their families (Intel SDM 2A 2.3): 32-byte registers, memory operands, forms.
 *
 * As in sse.h an instruction is executed by the host's own. The core is built for any x86-64 host, so only the files that
 * include this one are compiled for AVX, and what is above AVX is in inline assembly: a row whose feature the host lacks is
 * never executed, because CPUID does not offer it (cpuid.c). Include this after all else.
 *
 * One operation serves both vector lengths. A host's instruction of 128 bits clears bits 255:128 of its destination
 * (SDM 1 14.1.2), so that handlers always write 32 bytes. */
#ifndef VMFS_AVX_H
#define VMFS_AVX_H

#include "sse.h"

#pragma GCC target("avx")
#include <immintrin.h>

typedef __m256i ymm;

ALWAYS_INLINE ymm load32(const void *p) { return _mm256_loadu_si256(p); }
ALWAYS_INLINE ymm wide(xmm low) { return _mm256_zextsi128_si256(low); }
ALWAYS_INLINE xmm low_half(ymm v) { return _mm256_castsi256_si128(v); }
ALWAYS_INLINE ymm get_ymm(const struct vcpu *c, unsigned n) { return load32(&c->xmm[n]); }
ALWAYS_INLINE void set_ymm(struct vcpu *c, unsigned n, ymm value) { _mm256_storeu_si256((ymm *)&c->xmm[n], value); }
ALWAYS_INLINE bool is_256(const struct record *r) { return r->vector == 5; }
ALWAYS_INLINE unsigned vector_bytes(const struct record *r) { return 1u << r->vector; }

/* ---- Memory operands: 32 or 16 bytes by VEX.L, at any address (SDM 1 14.9) --------------------------------- */

ALWAYS_INLINE ymm load_vector_at(const u8 *p, const struct record *r) { return is_256(r) ? load32(p) : wide(load16(p)); }
ALWAYS_INLINE void store_vector_at(u8 *p, const struct record *r, ymm value)
{
    if (is_256(r))
        _mm256_storeu_si256((ymm *)p, value);
    else
        _mm_storeu_si128((xmm *)p, low_half(value));
}
/* Out of line, so that handlers have no locals in memory; aligned: #GP(0) off a boundary of the operand's size. */
static __attribute__((noinline, unused)) ymm mem_load_ymm(struct vcpu *c, const struct record *r, unsigned bytes, bool aligned)
{
    union vector value = {0};
    mem_load_vector(c, r, &value, bytes, aligned);
    return load32(&value);
}
static __attribute__((noinline, unused)) void mem_store_ymm(struct vcpu *c, const struct record *r, ymm value, unsigned bytes, bool aligned)
{
    union vector all;
    _mm256_storeu_si256((ymm *)&all, value);
    mem_store_vector(c, r, &all, bytes, aligned);
}

/* ---- Forms of an instruction V <- do_NAME(c, r, H, W) ------------------------------------------------------ */

/* H is the register in vvvv; an instruction without one ignores it. W is a register, or so many bytes of memory, zero-extended:
 * VEX_X the vector length; VEX_HALF, VEX_QUARTER, VEX_EIGHTH a part of it; VEX_16, VEX_8, VEX_4, VEX_2, VEX_1 a number. */
#define VEX_FORMS(name, address, fast, general) \
    VECTOR_FORMS(name, ymm, set_ymm, get_ymm, r->vvvv, address, fast, general)
#define VEX_X(name) \
    VEX_FORMS(name, fast_read(c, r, vector_bytes(r)), load_vector_at(p, r), mem_load_ymm(c, r, vector_bytes(r), false))
#define VEX_16(name) VEX_FORMS(name, fast_read(c, r, 16), wide(load16(p)), mem_load_ymm(c, r, 16, false))
#define VEX_8(name) VEX_FORMS(name, fast_read(c, r, 8), wide(load8(p)), wide(from64(mem_load(c, r, 8))))
#define VEX_SMALL(name, bytes) \
    VEX_FORMS(name, fast_read(c, r, bytes), wide(from64(peek(p, bytes))), wide(from64(mem_load(c, r, bytes))))
#define VEX_4(name) VEX_SMALL(name, 4)
#define VEX_2(name) VEX_SMALL(name, 2)
#define VEX_1(name) VEX_SMALL(name, 1)
#define VEX_HALF(name) \
    VEX_FORMS(name, fast_read(c, r, vector_bytes(r) / 2), is_256(r) ? wide(load16(p)) : wide(load8(p)), \
              mem_load_ymm(c, r, vector_bytes(r) / 2, false))
#define VEX_QUARTER(name) \
    VEX_FORMS(name, fast_read(c, r, vector_bytes(r) / 4), wide(is_256(r) ? load8(p) : from64(peek(p, 4))), \
              mem_load_ymm(c, r, vector_bytes(r) / 4, false))
#define VEX_EIGHTH(name) \
    VEX_FORMS(name, fast_read(c, r, vector_bytes(r) / 8), wide(from64(is_256(r) ? peek(p, 4) : peek(p, 2))), \
              mem_load_ymm(c, r, vector_bytes(r) / 8, false))

#define VEX_COMPUTE(name) ALWAYS_INLINE ymm do_##name(struct vcpu *c, const struct record *r, ymm v, ymm s)

/* The host's instruction in the record's length: `d` from v and s, from s, from v, s and `old`. %x is the name of the
 * register as XMM, %t as YMM. Volatile, as float instructions have to be (sse.h). */
#define HOST_3(name) \
    do { \
        if (is_256(r)) \
            __asm__ volatile(name " %t2, %t1, %t0" : "=x"(d) : "x"(v), "x"(s)); \
        else \
            __asm__ volatile(name " %x2, %x1, %x0" : "=x"(d) : "x"(v), "x"(s)); \
    } while (0)
#define HOST_2(name) \
    do { \
        if (is_256(r)) \
            __asm__ volatile(name " %t1, %t0" : "=x"(d) : "x"(s)); \
        else \
            __asm__ volatile(name " %x1, %x0" : "=x"(d) : "x"(s)); \
    } while (0)

/* The same of instructions that have no form of 256 bits. */
#define HOST_3_128(name) __asm__ volatile(name " %x2, %x1, %x0" : "=x"(d) : "x"(v), "x"(s))
#define HOST_2_128(name) __asm__ volatile(name " %x1, %x0" : "=x"(d) : "x"(s))
/* From an XMM register to one of the vector length; and from one of the vector length to an XMM register. */
#define HOST_WIDEN(name) \
    do { \
        if (is_256(r)) \
            __asm__ volatile(name " %x1, %t0" : "=x"(d) : "x"(s)); \
        else \
            __asm__ volatile(name " %x1, %x0" : "=x"(d) : "x"(s)); \
    } while (0)
#define HOST_NARROW(name) \
    do { \
        if (is_256(r)) \
            __asm__ volatile(name "y %t1, %x0" : "=x"(d) : "x"(s)); \
        else \
            __asm__ volatile(name "x %x1, %x0" : "=x"(d) : "x"(s)); \
    } while (0)

/* Instructions that neither raise nor read MXCSR. */
#define VEX_PLAIN_3(name, form) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        HOST_3(#name); \
        return d; \
    } \
    form(name)
#define VEX_PLAIN_2(name, form) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        HOST_2(#name); \
        return d; \
    } \
    form(name)

/* ---- Immediates -------------------------------------------------------------------------------------------- */

/* The immediate of a host's instruction is part of it, so there is one for each of 256 values: a function of (v, s), which
 * takes and gives vectors in YMM0 and YMM1 (System V ABI). 16 bytes each, in a row. */
typedef ymm host_function(ymm v, ymm s);
#define HOST_TABLE(label, instruction) \
    extern const u8 label[256][16] __attribute__((visibility("hidden"))); \
    __asm__(".pushsection .text\n .p2align 4\n" #label ":\n .set vmfs_imm, 0\n .rept 256\n .p2align 4, 0xcc\n " \
            instruction "\n ret\n .set vmfs_imm, vmfs_imm + 1\n .endr\n .p2align 4, 0xcc\n .popsection\n");
static __attribute__((noinline, unused)) ymm call_host(const u8 (*table)[16], unsigned imm, ymm v, ymm s)
{
    return ((host_function *)(uintptr_t)table[imm])(v, s);
}
#define HOST_IMMEDIATE(table, r, v, s) call_host((table), (u8)(r)->imm, (v), (s))

/* d from v, s and the immediate; d from s and the immediate; and those of 128 bits only. */
#define VEX_IMMEDIATE(name, form, short_operands, long_operands, around) \
    HOST_TABLE(host_##name##_128, #name " $vmfs_imm, " short_operands) \
    HOST_TABLE(host_##name##_256, #name " $vmfs_imm, " long_operands) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        around(d = HOST_IMMEDIATE(is_256(r) ? host_##name##_256 : host_##name##_128, r, v, s)); \
        return d; \
    } \
    form(name)
#define VEX_IMMEDIATE_128(name, form, operands, around) \
    HOST_TABLE(host_##name##_128, #name " $vmfs_imm, " operands) \
    VEX_COMPUTE(name) \
    { \
        ymm d; \
        around(d = HOST_IMMEDIATE(host_##name##_128, r, v, s)); \
        return d; \
    } \
    form(name)
#define UNCHECKED(statement) statement
#define VEX_IMM_3(name, form) VEX_IMMEDIATE(name, form, "%xmm1, %xmm0, %xmm0", "%ymm1, %ymm0, %ymm0", UNCHECKED)
#define VEX_IMM_2(name, form) VEX_IMMEDIATE(name, form, "%xmm1, %xmm0", "%ymm1, %ymm0", UNCHECKED)

#endif
