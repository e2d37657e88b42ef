/* MXCSR, SIMD floating-point exceptions, and 16-byte memory operands. */
#include <math.h>
#include <stdlib.h>

#include "sse.h"
#include "x87.h"

/* ---- Memory operands: out of line, so that handlers have no locals in memory and end in a jump --------- */

static xmm load_vector(struct vcpu *c, const struct record *r, bool aligned)
{
    xmm value;
    mem_load_vector(c, r, &value, sizeof value, aligned);
    return value;
}
xmm mem_load16(struct vcpu *c, const struct record *r) { return load_vector(c, r, false); }
xmm mem_load16_aligned(struct vcpu *c, const struct record *r) { return load_vector(c, r, true); }
void mem_store16(struct vcpu *c, const struct record *r, xmm value)
{
    mem_store_vector(c, r, &value, sizeof value, false);
}
void mem_store16_aligned(struct vcpu *c, const struct record *r, xmm value)
{
    mem_store_vector(c, r, &value, sizeof value, true);
}

/* ---- The register -------------------------------------------------------------------------------------- */

/* Flush-to-zero acts only while underflow is masked (Intel SDM 1 10.2.3.3), and on the host it always is. */
static u32 host_mxcsr(u32 guest)
{
    u32 host = (guest | MXCSR_MASKS) & MXCSR_VALID;
    return guest & MXCSR_UE << MXCSR_MASKS_SHIFT ? host : host & ~(u32)MXCSR_FTZ;
}

/* The key says whether an exception is unmasked, so that host code of other blocks need not look. */
static void note_masks(struct vcpu *c)
{
    if (!!(c->key & KEY_UNMASKED) == mxcsr_unmasked(c))
        return;
    c->key ^= KEY_UNMASKED;
    code_map_select(c);
}

u32 mxcsr_enter(struct vcpu *c)
{
    u32 host = _mm_getcsr();
    _mm_setcsr(host_mxcsr(c->mxcsr));
    note_masks(c);
    return host;
}

u32 mxcsr_read(struct vcpu *c)
{
    c->mxcsr |= _mm_getcsr() & MXCSR_FLAGS;
    return c->mxcsr;
}

void mxcsr_leave(struct vcpu *c, u32 host)
{
    mxcsr_read(c);
    _mm_setcsr(host);
}

void mxcsr_write(struct vcpu *c, u32 value)
{
    c->mxcsr = value;
    _mm_setcsr(host_mxcsr(value));
    note_masks(c);
}

/* ---- Unmasked exceptions -------------------------------------------------------------------------------------
 *
 * Intel SDM 1 11.5: invalid, denormal and division by zero are found before the computation; an unmasked one of
 * any element ends the instruction there, and the flags of overflow, underflow and inexact stay as they were. */

enum { BEFORE = MXCSR_IE | MXCSR_DE | MXCSR_ZE };

static void raise_unmasked(struct vcpu *c, const struct record *r, u32 flags)
{
    u32 unmasked = flags & ~(c->mxcsr >> MXCSR_MASKS_SHIFT);
    if (unmasked & BEFORE)
        flags &= BEFORE;
    mxcsr_write(c, c->mxcsr | flags);
    if (unmasked)
        raise_fault(c, r, c->cr4 & CR4_OSXMMEXCPT ? VECTOR_XM : VECTOR_UD);
}

void mxcsr_begin(struct vcpu *c)
{
    mxcsr_read(c);
    _mm_setcsr(host_mxcsr(c->mxcsr) & ~(u32)MXCSR_FLAGS);
}

void mxcsr_end(struct vcpu *c, const struct record *r) { raise_unmasked(c, r, _mm_getcsr() & MXCSR_FLAGS); }

/* One element by the host; its flags are in the host's MXCSR. `addend`: of FLOAT_FMA. */
static u64 lane_result(enum arithmetic op, unsigned bytes, u64 a, u64 b, u64 addend)
{
    xmm d = from64(a), s = from64(b);
#define RUN(name) __asm__ volatile(#name " %1, %0" : "+x"(d) : "x"(s))
    switch (op) {
    case FLOAT_ADD: if (bytes == 4) RUN(addss); else RUN(addsd); break;
    case FLOAT_SUB: if (bytes == 4) RUN(subss); else RUN(subsd); break;
    case FLOAT_MUL: if (bytes == 4) RUN(mulss); else RUN(mulsd); break;
    case FLOAT_DIV: if (bytes == 4) RUN(divss); else RUN(divsd); break;
    case FLOAT_TO_SINGLE: RUN(cvtsd2ss); break;
    case FLOAT_TO_HALF: __asm__ volatile("vcvtps2ph $4, %1, %0" : "=x"(d) : "x"(s)); break;
    case FLOAT_FMA:
        if (bytes == 4)
            __asm__ volatile("vfmadd213ss %2, %1, %0" : "+x"(d) : "x"(s), "x"(from64(addend)));
        else
            __asm__ volatile("vfmadd213sd %2, %1, %0" : "+x"(d) : "x"(s), "x"(from64(addend)));
        break;
    }
#undef RUN
    return low64(d);
}

/* The same for a fused multiplication. Of singles: as doubles nothing overflows, and what has more than 24 bits is inexact. Of
 * doubles: scaled, so that the result is in range. Addends that are 2^200 apart never give one of 53 bits. */
static bool fma_is_inexact(unsigned bytes, u64 a, u64 b, u64 addend)
{
    double x, y, z;
    if (bytes == 4) {
        float f[3];
        memcpy(&f[0], &a, 4), memcpy(&f[1], &b, 4), memcpy(&f[2], &addend, 4);
        x = (double)f[0], y = (double)f[1], z = (double)f[2];
    } else {
        int of_x, of_y, of_z;
        memcpy(&x, &a, 8), memcpy(&y, &b, 8), memcpy(&z, &addend, 8);
        if (x == 0 || y == 0)
            return false;
        x = frexp(x, &of_x), y = frexp(y, &of_y), z = frexp(z, &of_z);
        int product = of_x + of_y, most = z != 0 && of_z > product ? of_z : product;
        if (z != 0 && abs(of_z - product) > 200)
            return true;
        y = ldexp(y, product - most + 500), z = ldexp(z, of_z - most + 500);
    }
    __asm__ volatile("vfmadd213sd %2, %1, %0" : "+x"(x) : "x"(y), "x"(z));
    u64 result;
    memcpy(&result, &x, 8);
    return _mm_getcsr() & MXCSR_PE || (bytes == 4 && result & 0x1fffffff);
}

/* Whether the result is inexact with an unbounded exponent: the x87 rounds to the same precision and has 15
 * bits of exponent. */
static bool inexact_unbounded(enum arithmetic op, unsigned bytes, u64 a, u64 b, u64 addend, u32 mxcsr)
{
    if (op == FLOAT_TO_HALF) { /* of 11 bits; Intel's processors call every denormal inexact */
        u32 mantissa = ((u32)b & 0x7fffff) | 0x800000;
        return b & 0x7f800000 ? mantissa >> __builtin_ctz(mantissa) >> 11 != 0 : b & 0x7fffff;
    }
    if (op == FLOAT_FMA) {
        _mm_setcsr(MXCSR_RESET);
        return fma_is_inexact(bytes, a, b, addend);
    }
    bool single = bytes == 4 || op == FLOAT_TO_SINGLE;
    u16 saved, status;
    u16 control = (u16)(0x3f | (single ? 0 : 2) << 8 | (mxcsr >> MXCSR_ROUNDING_SHIFT & 3) << 10);
    long double x, y = 0, z;
    u32 a4 = (u32)a, b4 = (u32)b;
    if (bytes == 4)
        __asm__("flds %2\n\tflds %3" : "=t"(y), "=u"(x) : "m"(a4), "m"(b4));
    else
        __asm__("fldl %2\n\tfldl %3" : "=t"(y), "=u"(x) : "m"(a), "m"(b));
    __asm__ volatile("fnstcw %0" : "=m"(saved));
    __asm__ volatile("fnclex\n\tfldcw %0" : : "m"(control));
#define RUN(name, first, second) __asm__ volatile(name " %%st(1), %%st" : "=t"(z) : "0"(first), "u"(second))
    switch (op) {
    case FLOAT_ADD: RUN("fadd", x, y); break;
    case FLOAT_SUB: RUN("fsub", x, y); break;
    case FLOAT_MUL: RUN("fmul", x, y); break;
    case FLOAT_DIV: RUN("fdiv", x, y); break;
    case FLOAT_TO_SINGLE: RUN("fadd", y, 0.0L); break;
    case FLOAT_TO_HALF: case FLOAT_FMA: break;
    }
#undef RUN
    __asm__ volatile("fnstsw %0\n\tfnclex\n\tfldcw %1" : "=m"(status) : "m"(saved));
    return status & MXCSR_PE;
}

static bool is_denormal(u64 value, unsigned bytes)
{
    return bytes == 2   ? !(value & 0x7c00) && value & 0x3ff
           : bytes == 4 ? !(value & 0x7f800000) && value & 0x7fffff
                        : !(value & 0x7ff0000000000000) && value & 0xfffffffffffff;
}

/* Unlike the masked ones, an unmasked underflow needs no loss of precision, and the precision flag of an
 * unmasked overflow or underflow is that of the result with an unbounded exponent (SDM 1 4.9.1.5). */
static u32 lane_flags(enum arithmetic op, unsigned bytes, u64 a, u64 b, u64 addend, u32 mxcsr)
{
    unsigned result_bytes = op == FLOAT_TO_SINGLE ? 4 : op == FLOAT_TO_HALF ? 2 : bytes;
    u32 open = ~(mxcsr >> MXCSR_MASKS_SHIFT);
    _mm_setcsr(host_mxcsr(mxcsr) & ~(u32)MXCSR_FLAGS);
    u64 result = lane_result(op, bytes, a, b, addend);
    u32 flags = _mm_getcsr() & MXCSR_FLAGS;
    if (open & MXCSR_UE && is_denormal(result, result_bytes))
        flags |= MXCSR_UE;
    if (flags & open & (MXCSR_OE | MXCSR_UE)) {
        flags &= ~(u32)MXCSR_PE;
        if (mxcsr & MXCSR_DAZ) { /* then the host took them for zeros */
            a = is_denormal(a, bytes) ? 0 : a;
            b = is_denormal(b, bytes) ? 0 : b;
            addend = is_denormal(addend, bytes) ? 0 : addend;
        }
        if (inexact_unbounded(op, bytes, a, b, addend, mxcsr))
            flags |= MXCSR_PE;
    }
    return flags;
}

void mxcsr_lanes(struct vcpu *c, const struct record *r, enum arithmetic op, unsigned bytes, unsigned lanes,
                 const union vector *a, const union vector *b, const union vector *addend)
{
    static const union vector none;
    u32 mxcsr = mxcsr_read(c), with = mxcsr, flags = 0;
    x87_release(c); /* inexact_unbounded computes with it */
    if (!addend)
        addend = &none;
    if (op == FLOAT_TO_HALF && !(r->imm & 4))
        with = (mxcsr & ~(3u << MXCSR_ROUNDING_SHIFT)) | (u32)(r->imm & 3) << MXCSR_ROUNDING_SHIFT;
    for (unsigned i = 0; i < lanes; i++)
        flags |= bytes == 4 ? lane_flags(op, 4, a->d[i], b->d[i], addend->d[i], with)
                            : lane_flags(op, 8, a->q[i], b->q[i], addend->q[i], with);
    _mm_setcsr(host_mxcsr(mxcsr));
    raise_unmasked(c, r, flags);
}

void mxcsr_arithmetic(struct vcpu *c, const struct record *r, enum arithmetic op, unsigned bytes,
                      unsigned lanes, xmm d, xmm s)
{
    union vector a, b;
    _mm_storeu_si128((xmm *)&a, d);
    _mm_storeu_si128((xmm *)&b, s);
    mxcsr_lanes(c, r, op, bytes, lanes, &a, &b, NULL);
}
