/* FXSAVE, FXRSTOR, XSAVE and its variants, XCR0 (Intel SDM 1 chapter 13, 10.5).
 *
 * An area is read whole, and its writing checked whole, before anything changes. XINUSE is exact: a component
 * is in use when it is not in its initial state; there is no modified optimization. IA32_XSS has no
 * components. */
#include "sse.h"
#include "x87.h"

#define COMPACTED (1ull << 63)
enum {
    AREA_MXCSR = 24, AREA_ST = 32, AREA_XMM = 160, AREA_HEADER = 512, AREA_EXTENDED = 576, AREA_SIZE = 2816,
};

/* The components of the extended region, and their offsets in the standard form: as the xsave state of the
 * API. */
static const struct component {
    unsigned bit;
    u16 offset, size;
} components[] = {{2, 576, 256}, {9, 2688, 8}};
enum { COMPONENTS = sizeof components / sizeof *components };

struct area { u8 bytes[AREA_SIZE]; };

/* ---- The area in guest memory -------------------------------------------------------------------------- */

static u64 area_linear(struct vcpu *c, const struct record *r, unsigned from, unsigned bytes, unsigned access)
{
    c->now = r;
    u64 offset = (offset_of(c, r) + from) & address_masks[r->prefix & PREFIX_ADDRESS];
    return linear_of(c, r, r->seg, offset, bytes, access);
}
static void check_aligned(struct vcpu *c, const struct record *r, unsigned bytes)
{
    if (area_linear(c, r, 0, 1, 0) & (bytes - 1))
        raise_error(c, r, VECTOR_GP, 0);
}
static unsigned piece_of(u64 at, unsigned bytes) /* up to the next multiple of 64 */
{
    unsigned piece = 64 - (at & 63);
    return piece < bytes ? piece : bytes;
}
static void area_read(struct vcpu *c, const struct record *r, struct area *a, unsigned from, unsigned bytes)
{
    u64 at = area_linear(c, r, from, bytes, ACCESS_READ);
    const u8 *p = fast_linear_read(c, at, bytes);
    if (likely(p)) {
        memcpy(a->bytes + from, p, bytes);
        return;
    }
    for (unsigned piece; bytes; bytes -= piece, from += piece, at += piece) {
        piece = piece_of(at, bytes);
        mmu_read(c, at & c->linear_mask, a->bytes + from, piece, ACCESS_READ);
    }
}
static void area_check_write(struct vcpu *c, const struct record *r, unsigned from, unsigned bytes)
{
    u64 at = area_linear(c, r, from, bytes, ACCESS_WRITE);
    if (likely(fast_linear_write(c, at, bytes)))
        return;
    for (unsigned piece; bytes; bytes -= piece, at += piece) {
        piece = piece_of(at, bytes);
        mmu_check_write(c, at & c->linear_mask, piece, ACCESS_WRITE);
    }
}
static void area_write(struct vcpu *c, const struct record *r, const struct area *a, unsigned from,
                       unsigned bytes)
{
    u64 at = area_linear(c, r, from, bytes, ACCESS_WRITE);
    u8 *p = fast_linear_write(c, at, bytes);
    if (likely(p)) {
        memcpy(p, a->bytes + from, bytes);
        return;
    }
    for (unsigned piece; bytes; bytes -= piece, from += piece, at += piece) {
        piece = piece_of(at, bytes);
        mmu_write(c, at & c->linear_mask, a->bytes + from, piece, ACCESS_WRITE);
    }
}

static u64 area_get(const struct area *a, unsigned at, unsigned bytes) { return peek(a->bytes + at, bytes); }
static void area_put(struct area *a, unsigned at, unsigned bytes, u64 value)
{
    poke(a->bytes + at, bytes, value);
}

/* ---- Components, in and out ---------------------------------------------------------------------------- */

static unsigned xmm_count(const struct vcpu *c) { return c->key & KEY_CODE64 ? 16 : 8; }
static unsigned xmm_end(const struct vcpu *c) { return AREA_XMM + 16 * xmm_count(c); }
static struct x87_register *stack_register(struct vcpu *c, unsigned i)
{
    return &c->fpr[((c->fsw >> 11) + i) & 7];
}

/* With REX.W, 64-bit pointers; without, a selector and 32 bits. */
static bool wide_pointers(const struct vcpu *c, const struct record *r)
{
    return r->prefix & PREFIX_REX_W;
}

static void put_x87(struct vcpu *c, const struct record *r, struct area *a)
{
    x87_sync(c);
    memset(a->bytes, 0, AREA_MXCSR);
    area_put(a, 0, 2, c->fcw);
    area_put(a, 2, 2, c->fsw);
    area_put(a, 4, 1, c->ftw);
    area_put(a, 6, 2, c->fop);
    if (wide_pointers(c, r)) {
        area_put(a, 8, 8, c->fip);
        area_put(a, 16, 8, c->fdp);
    } else {
        area_put(a, 8, 4, c->fip);
        area_put(a, 12, 2, c->fcs);
        area_put(a, 16, 4, c->fdp);
        area_put(a, 20, 2, c->fds);
    }
    memset(a->bytes + AREA_ST, 0, AREA_XMM - AREA_ST);
    for (unsigned i = 0; i < 8; i++) {
        const struct x87_register *st = stack_register(c, i);
        area_put(a, AREA_ST + 16 * i, 8, st->mantissa);
        area_put(a, AREA_ST + 16 * i + 8, 2, st->exponent);
    }
}
static void take_x87(struct vcpu *c, const struct record *r, const struct area *a)
{
    x87_unload(c);
    c->fcw = ((u16)area_get(a, 0, 2) & 0x1f3f) | 0x40; /* bit 6 is always set, the other reserved ones never */
    c->fsw = (u16)area_get(a, 2, 2);
    c->ftw = (u8)area_get(a, 4, 1);
    c->fop = (u16)area_get(a, 6, 2) & 0x7ff;
    bool wide = wide_pointers(c, r);
    c->fip = area_get(a, 8, wide ? 8 : 4);
    c->fcs = wide ? 0 : (u16)area_get(a, 12, 2);
    c->fdp = area_get(a, 16, wide ? 8 : 4);
    c->fds = wide ? 0 : (u16)area_get(a, 20, 2);
    /* ES and B follow from flags and masks (SDM 1 8.1.3.3). */
    c->fsw = c->fsw & ~c->fcw & 0x3f ? c->fsw | 0x8080 : c->fsw & 0x7f7f;
    for (unsigned i = 0; i < 8; i++) {
        struct x87_register *st = stack_register(c, i);
        st->mantissa = area_get(a, AREA_ST + 16 * i, 8);
        st->exponent = (u16)area_get(a, AREA_ST + 16 * i + 8, 2);
    }
}
static void initialize_x87(struct vcpu *c)
{
    x87_unload(c);
    c->fcw = 0x37f;
    c->fsw = c->ftw = c->fop = c->fcs = c->fds = 0;
    c->fip = c->fdp = 0;
    memset(c->fpr, 0, sizeof c->fpr);
}

static void put_mxcsr(struct vcpu *c, struct area *a)
{
    area_put(a, AREA_MXCSR, 4, mxcsr_read(c));
    area_put(a, AREA_MXCSR + 4, 4, MXCSR_VALID);
}
static u32 take_mxcsr(struct vcpu *c, const struct record *r, const struct area *a)
{
    u32 value = (u32)area_get(a, AREA_MXCSR, 4);
    if (value & ~(u32)MXCSR_VALID)
        raise_error(c, r, VECTOR_GP, 0);
    return value;
}

static void put_sse(struct vcpu *c, struct area *a)
{
    for (unsigned i = 0; i < xmm_count(c); i++)
        memcpy(a->bytes + AREA_XMM + 16 * i, &c->xmm[i], 16);
}
/* NULL: the initial state. */
static void take_sse(struct vcpu *c, const struct area *a)
{
    for (unsigned i = 0; i < xmm_count(c); i++)
        set_xmm(c, i, a ? load16(a->bytes + AREA_XMM + 16 * i) : _mm_setzero_si128());
}

static void put_extended(struct vcpu *c, unsigned bit, u8 *out)
{
    if (bit == 2)
        for (unsigned i = 0; i < xmm_count(c); i++)
            memcpy(out + 16 * i, c->xmm[i].b + 16, 16);
    else
        poke(out, 8, c->pkru);
}
static void take_extended(struct vcpu *c, unsigned bit, const u8 *in)
{
    if (bit == 2) {
        for (unsigned i = 0; i < xmm_count(c); i++)
            if (in)
                memcpy(c->xmm[i].b + 16, in + 16 * i, 16);
            else
                memset(c->xmm[i].b + 16, 0, 16);
    } else {
        c->pkru = in ? (u32)peek(in, 4) : 0;
        tlb_flush(c);
    }
}

/* The components that are not in their initial state. */
static u64 in_use(struct vcpu *c)
{
    x87_sync(c);
    u64 used = c->pkru ? STATE_PKRU : 0;
    u64 x87 = c->fcw ^ 0x37f;
    x87 |= c->fsw | c->ftw | c->fop | c->fip | c->fdp | c->fcs | c->fds;
    for (unsigned i = 0; i < 8; i++)
        x87 |= c->fpr[i].mantissa | c->fpr[i].exponent;
    if (x87)
        used |= STATE_X87;
    for (unsigned i = 0; i < xmm_count(c); i++) {
        const union vector *v = &c->xmm[i];
        used |= v->q[0] | v->q[1] ? STATE_SSE : 0;
        used |= v->q[2] | v->q[3] ? STATE_AVX : 0;
    }
    return used;
}

/* ---- FXSAVE, FXRSTOR ----------------------------------------------------------------------------------- */

static NOINLINE void fxsave(struct vcpu *c, const struct record *r)
{
    struct area a;
    check_aligned(c, r, 16);
    area_check_write(c, r, 0, 512);
    put_x87(c, r, &a);
    put_mxcsr(c, &a);
    put_sse(c, &a);
    area_write(c, r, &a, 0, xmm_end(c));
}
OP(op_fxsave)
{
    fxsave(c, r);
    NEXT();
}
HANDLER(fxsave);

static NOINLINE void fxrstor(struct vcpu *c, const struct record *r)
{
    struct area a;
    check_aligned(c, r, 16);
    area_read(c, r, &a, 0, 512);
    mxcsr_write(c, take_mxcsr(c, r, &a));
    take_x87(c, r, &a);
    take_sse(c, &a);
}
OP(op_fxrstor)
{
    fxrstor(c, r);
    NEXT();
}
HANDLER(fxrstor);

/* ---- XSAVE, XSAVEOPT, XSAVEC, XSAVES ------------------------------------------------------------------- */

static void check_xsave(struct vcpu *c, const struct record *r)
{
    if (!(c->cr4 & CR4_OSXSAVE))
        raise_fault(c, r, VECTOR_UD);
    if (c->cr0 & CR0_TS)
        raise_fault(c, r, VECTOR_NM);
}
static u64 requested(const struct vcpu *c)
{
    return (c->gpr[RDX] << 32 | (u32)c->gpr[RAX]) & c->xcr0;
}
/* Where a component lies: at its offset, or, compacted, after those of `packed` before it (SDM 1 13.4.3). */
static unsigned component_offset(unsigned n, u64 packed)
{
    if (!(packed & COMPACTED))
        return components[n].offset;
    unsigned at = AREA_EXTENDED;
    for (unsigned i = 0; i < n; i++)
        if (packed >> components[i].bit & 1)
            at += components[i].size;
    return at;
}

u32 xsave_size(u64 mask, bool compact)
{
    unsigned end = AREA_EXTENDED;
    for (unsigned i = 0; i < COMPONENTS; i++)
        if (mask >> components[i].bit & 1)
            end = component_offset(i, compact ? mask | COMPACTED : 0) + components[i].size;
    return end;
}

static NOINLINE void xsave(struct vcpu *c, const struct record *r, bool compact, bool optimize)
{
    struct area a;
    struct { u16 from, bytes; } pieces[4 + COMPONENTS];
    unsigned count = 0;
#define PIECE(first, end) (pieces[count].from = (u16)(first), pieces[count++].bytes = (u16)((end) - (first)))
    check_xsave(c, r);
    check_aligned(c, r, 64);
    u64 mask = requested(c), used = in_use(c), packed = compact ? mask | COMPACTED : 0, write = mask;
    if (compact && mxcsr_read(c) != MXCSR_RESET)
        used |= STATE_SSE;
    if (optimize || compact)
        write &= used;
    if (write & STATE_X87) {
        put_x87(c, r, &a);
        PIECE(0, AREA_MXCSR);
        PIECE(AREA_ST, AREA_XMM);
    }
    if (compact ? write & STATE_SSE : mask & (STATE_SSE | STATE_AVX)) {
        put_mxcsr(c, &a);
        PIECE(AREA_MXCSR, AREA_ST);
    }
    if (write & STATE_SSE) {
        put_sse(c, &a);
        PIECE(AREA_XMM, xmm_end(c));
    }
    for (unsigned i = 0; i < COMPONENTS; i++)
        if (write >> components[i].bit & 1) {
            unsigned at = component_offset(i, packed);
            put_extended(c, components[i].bit, a.bytes + at);
            PIECE(at, at + (components[i].bit == 2 ? 16 * xmm_count(c) : components[i].size));
        }
#undef PIECE
    area_check_write(c, r, 0, AREA_EXTENDED);
    for (unsigned i = 0; i < count; i++)
        area_check_write(c, r, pieces[i].from, pieces[i].bytes);
    u64 present = used & mask;
    if (!compact) {
        area_read(c, r, &a, AREA_HEADER, 8);
        present |= area_get(&a, AREA_HEADER, 8) & ~mask;
    }
    area_put(&a, AREA_HEADER, 8, present);
    area_put(&a, AREA_HEADER + 8, 8, packed);
    for (unsigned i = 0; i < count; i++)
        area_write(c, r, &a, pieces[i].from, pieces[i].bytes);
    area_write(c, r, &a, AREA_HEADER, compact ? 16 : 8);
}

#define SAVE(name, compact, optimize) \
    OP(op_##name) \
    { \
        xsave(c, r, compact, optimize); \
        NEXT(); \
    } \
    HANDLER(name);
SAVE(xsave, false, false)
SAVE(xsaveopt, false, true)
SAVE(xsavec, true, true)
SAVE(xsaves, true, true)

/* ---- XRSTOR, XRSTORS ----------------------------------------------------------------------------------- */

static NOINLINE void xrstor(struct vcpu *c, const struct record *r, bool supervisor)
{
    struct area a;
    check_xsave(c, r);
    check_aligned(c, r, 64);
    area_read(c, r, &a, 0, AREA_EXTENDED);
    u64 present = area_get(&a, AREA_HEADER, 8), packed = area_get(&a, AREA_HEADER + 8, 8), reserved = 0;
    bool compact = packed & COMPACTED;
    for (unsigned i = 16; i < (compact ? 64 : 24); i += 8)
        reserved |= area_get(&a, AREA_HEADER + i, 8);
    bool valid = compact
        ? !(packed & ~COMPACTED & ~c->xcr0) && !(present & ~packed) && has_feature(c, FEATURE_XSAVEC)
        : !packed && !(present & ~c->xcr0) && !supervisor;
    if (!valid || reserved)
        raise_error(c, r, VECTOR_GP, 0);

    u64 mask = requested(c), load = mask & present;
    u32 mxcsr = mxcsr_read(c);
    if (compact ? load & STATE_SSE : mask & (STATE_SSE | STATE_AVX))
        mxcsr = take_mxcsr(c, r, &a);
    else if (mask & STATE_SSE)
        mxcsr = MXCSR_RESET;
    for (unsigned i = 0; i < COMPONENTS; i++)
        if (load >> components[i].bit & 1)
            area_read(c, r, &a, component_offset(i, packed), components[i].size);

    mxcsr_write(c, mxcsr);
    if (load & STATE_X87)
        take_x87(c, r, &a);
    else if (mask & STATE_X87)
        initialize_x87(c);
    if (mask & STATE_SSE)
        take_sse(c, load & STATE_SSE ? &a : NULL);
    for (unsigned i = 0; i < COMPONENTS; i++)
        if (mask >> components[i].bit & 1)
            take_extended(c, components[i].bit,
                          load >> components[i].bit & 1 ? a.bytes + component_offset(i, packed) : NULL);
}
OP(op_xrstor)
{
    xrstor(c, r, false);
    NEXT();
}
HANDLER(xrstor);
OP(op_xrstors)
{
    xrstor(c, r, true);
    NEXT();
}
HANDLER(xrstors);

/* ---- XCR0 ---------------------------------------------------------------------------------------------- */

OP(op_xgetbv)
{
    if (!(c->cr4 & CR4_OSXSAVE))
        raise_fault(c, r, VECTOR_UD);
    u32 number = (u32)c->gpr[RCX];
    if (number > (has_feature(c, FEATURE_XGETBV1) ? 1 : 0))
        raise_error(c, r, VECTOR_GP, 0);
    u64 value = c->xcr0;
    if (number) /* XINUSE (Intel SDM 1 13.2, 13.6), and MXCSR counts as SSE's, as it does to XSAVEC */
        value &= in_use(c) | (mxcsr_read(c) != MXCSR_RESET ? STATE_SSE : 0);
    c->gpr[RAX] = (u32)value;
    c->gpr[RDX] = value >> 32;
    NEXT();
}
HANDLER(xgetbv);

OP(op_xsetbv)
{
    if (!(c->cr4 & CR4_OSXSAVE))
        raise_fault(c, r, VECTOR_UD);
    u64 value = c->gpr[RDX] << 32 | (u32)c->gpr[RAX];
    if ((u32)c->gpr[RCX] != 0 || !xcr0_is_valid(c, value))
        raise_error(c, r, VECTOR_GP, 0);
    c->xcr0 = value;
    mode_changed(c);
    leave(c, r);
}
HANDLER(xsetbv);
