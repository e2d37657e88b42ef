/* AVX, AVX2: moves, inserts, broadcasts, masked moves, gathers. */
#include <setjmp.h>

#include "repeat.h"

#include "avx.h"

/* ---- Whole registers --------------------------------------------------------------------------------------- */

ALWAYS_INLINE ymm truncate_vector(const struct record *r, ymm v) { return is_256(r) ? v : wide(low_half(v)); }

OP(op_vmov_V_Wa_reg)
{
    set_ymm(c, r->reg, truncate_vector(r, get_ymm(c, r->rm)));
    NEXT();
}
OP(op_vmov_Wa_V_reg)
{
    set_ymm(c, r->rm, truncate_vector(r, get_ymm(c, r->reg)));
    NEXT();
}
#define op_vmov_V_Wu_reg op_vmov_V_Wa_reg
#define op_vmov_Wu_V_reg op_vmov_Wa_V_reg

/* `aligned`: #GP(0) off a boundary of the operand's size, which the general form sees to. */
#define VEX_WHOLE(kind, aligned) \
    GENERAL_OP(op_vmov_V_##kind##_mem) \
    { \
        set_ymm(c, r->reg, mem_load_ymm(c, r, vector_bytes(r), aligned)); \
        NEXT(); \
    } \
    OP(op_vmov_V_##kind##_fast) \
    { \
        const u8 *p = fast_read(c, r, vector_bytes(r)); \
        if (unlikely(!p || (aligned && (uintptr_t)p & (vector_bytes(r) - 1)))) { \
            op_vmov_V_##kind##_mem(c, r); \
            return; \
        } \
        set_ymm(c, r->reg, load_vector_at(p, r)); \
        NEXT(); \
    } \
    HANDLER_FAST(vmov_V_##kind); \
    GENERAL_OP(op_vmov_##kind##_V_mem) \
    { \
        mem_store_ymm(c, r, get_ymm(c, r->reg), vector_bytes(r), aligned); \
        NEXT(); \
    } \
    OP(op_vmov_##kind##_V_fast) \
    { \
        u8 *p = fast_write(c, r, vector_bytes(r)); \
        if (unlikely(!p || (aligned && (uintptr_t)p & (vector_bytes(r) - 1)))) { \
            op_vmov_##kind##_V_mem(c, r); \
            return; \
        } \
        store_vector_at(p, r, get_ymm(c, r->reg)); \
        NEXT(); \
    } \
    HANDLER_FAST(vmov_##kind##_V);
VEX_WHOLE(Wa, true)
VEX_WHOLE(Wu, false)

/* ---- 4 and 8 bytes: stores to memory are SSE's ------------------------------------------------------------- */

/* Loads clear the rest. Between registers MOVSS and MOVSD take the rest from the one in vvvv, MOVQ clears it. */
#define VEX_LOAD(name, bytes) \
    GENERAL_OP(op_##name##_mem) \
    { \
        set_ymm(c, r->reg, wide(from64(mem_load(c, r, bytes)))); \
        NEXT(); \
    } \
    OP(op_##name##_fast) \
    { \
        const u8 *p = fast_read(c, r, bytes); \
        if (unlikely(!p)) { \
            op_##name##_mem(c, r); \
            return; \
        } \
        set_ymm(c, r->reg, wide(from64(peek(p, bytes)))); \
        NEXT(); \
    }
VEX_LOAD(vload_4, 4)
VEX_LOAD(vload_8, 8)
const struct handlers H_vload_4 = {{NULL}, SAME4(op_vload_4_fast), SAME4(op_vload_4_mem)};
const struct handlers H_vload_8 = {{NULL}, SAME4(op_vload_8_fast), SAME4(op_vload_8_mem)};

ALWAYS_INLINE xmm merge_single(xmm v, xmm s) { return (xmm)_mm_move_ss((__m128)v, (__m128)s); }
ALWAYS_INLINE xmm merge_low(xmm v, xmm s) { return (xmm)_mm_move_sd((__m128d)v, (__m128d)s); }
#define VEX_MERGE(name, to, from, merge) \
    OP(op_##name) \
    { \
        set_ymm(c, r->to, wide(merge(get_xmm(c, r->vvvv), get_xmm(c, r->from)))); \
        NEXT(); \
    } \
    HANDLER(name);
VEX_MERGE(vmovss_V_W, reg, rm, merge_single)
VEX_MERGE(vmovsd_V_W, reg, rm, merge_low)
VEX_MERGE(vmovss_W_V, rm, reg, merge_single)
VEX_MERGE(vmovsd_W_V, rm, reg, merge_low)
OP(op_vmovq_V_W_reg)
{
    set_ymm(c, r->reg, wide(from64(c->xmm[r->rm].q[0])));
    NEXT();
}
const struct handlers H_vmovq_V_W = {SAME4(op_vmovq_V_W_reg), SAME4(op_vload_8_fast), SAME4(op_vload_8_mem)};
OP(op_vmovq_W_V)
{
    set_ymm(c, r->rm, wide(from64(c->xmm[r->reg].q[0])));
    NEXT();
}
HANDLER(vmovq_W_V);

OP(op_vmovd_32_reg)
{
    set_ymm(c, r->reg, wide(from64(R32(c, r->rm))));
    NEXT();
}
OP(op_vmovd_64_reg)
{
    set_ymm(c, r->reg, wide(from64(R64(c, r->rm))));
    NEXT();
}
const struct handlers H_vmovd_V_E = {
    {NULL, NULL, op_vmovd_32_reg, op_vmovd_64_reg},
    {NULL, NULL, op_vload_4_fast, op_vload_8_fast},
    {NULL, NULL, op_vload_4_mem, op_vload_8_mem},
};

/* MOVLPS, MOVLPD, MOVHLPS; MOVHPS, MOVHPD, MOVLHPS. */
VEX_COMPUTE(vmovl)
{
    xmm from = r->prefix & PREFIX_REGISTER ? _mm_unpackhi_epi64(low_half(s), low_half(s)) : low_half(s);
    return wide(merge_low(low_half(v), from));
}
VEX_8(vmovl)
VEX_COMPUTE(vmovh) { return wide(_mm_unpacklo_epi64(low_half(v), low_half(s))); }
VEX_8(vmovh)

VEX_PLAIN_2(vmovsldup, VEX_X)
VEX_PLAIN_2(vmovshdup, VEX_X)
VEX_PLAIN_2(vmovddup, VEX_X) /* of 256 bits; of 128 the source has eight bytes */
VEX_COMPUTE(vmovddup_128) { return wide(_mm_unpacklo_epi64(low_half(s), low_half(s))); }
VEX_8(vmovddup_128)

/* ---- Halves, broadcasts ------------------------------------------------------------------------------------ */

VEX_COMPUTE(vinsert128)
{
    return r->imm & 1 ? _mm256_insertf128_si256(v, low_half(s), 1) : _mm256_insertf128_si256(v, low_half(s), 0);
}
VEX_16(vinsert128)

ALWAYS_INLINE xmm half_of(const struct vcpu *c, const struct record *r) { return load16(&c->xmm[r->reg].b[(r->imm & 1) * 16]); }
OP(op_vextract128_reg)
{
    set_ymm(c, r->rm, wide(half_of(c, r)));
    NEXT();
}
OP(op_vextract128_mem)
{
    mem_store_ymm(c, r, wide(half_of(c, r)), 16, false);
    NEXT();
}
HANDLER_REG_MEM(vextract128);

VEX_COMPUTE(vbroadcastss)
{
    xmm low = _mm_shuffle_epi32(low_half(s), 0);
    return is_256(r) ? _mm256_set_m128i(low, low) : wide(low);
}
VEX_4(vbroadcastss)
VEX_COMPUTE(vbroadcastsd)
{
    xmm low = _mm_unpacklo_epi64(low_half(s), low_half(s));
    return _mm256_set_m128i(low, low);
}
VEX_8(vbroadcastsd)
VEX_COMPUTE(vbroadcast128) { return _mm256_set_m128i(low_half(s), low_half(s)); }
VEX_16(vbroadcast128)

/* ---- Elements and general registers ------------------------------------------------------------------------ */

/* The register in vvvv with one element replaced. */
static NOINLINE void insert_element(struct vcpu *c, const struct record *r, unsigned bytes, unsigned at, u64 value,
                                    unsigned clear)
{
    union vector v = {0};
    memcpy(&v, &c->xmm[r->vvvv], 16);
    memcpy(v.b + at, &value, bytes);
    for (unsigned i = 0; i < 4; i++)
        if (clear >> i & 1)
            v.d[i] = 0;
    memcpy(&c->xmm[r->reg], &v, 32);
}
#define VEX_INSERT(name, bytes) \
    OP(op_##name##_reg) \
    { \
        insert_element(c, r, bytes, (unsigned)r->imm * bytes & 15, get_reg(c, r->rm, bytes * 8), 0); \
        NEXT(); \
    } \
    OP(op_##name##_mem) \
    { \
        insert_element(c, r, bytes, (unsigned)r->imm * bytes & 15, mem_load(c, r, bytes), 0); \
        NEXT(); \
    }
VEX_INSERT(vpinsrb, 1)
VEX_INSERT(vpinsrw, 2)
VEX_INSERT(vpinsrd, 4)
VEX_INSERT(vpinsrq, 8)
HANDLER_REG_MEM(vpinsrb);
HANDLER_REG_MEM(vpinsrw);
const struct handlers H_vpinsr = {
    {NULL, NULL, op_vpinsrd_reg, op_vpinsrq_reg},
    {NULL, NULL, op_vpinsrd_mem, op_vpinsrq_mem},
    {NULL, NULL, op_vpinsrd_mem, op_vpinsrq_mem},
};
OP(op_vinsertps_reg)
{
    insert_element(c, r, 4, (r->imm >> 4 & 3) * 4, c->xmm[r->rm].d[r->imm >> 6 & 3], r->imm & 15);
    NEXT();
}
OP(op_vinsertps_mem)
{
    insert_element(c, r, 4, (r->imm >> 4 & 3) * 4, mem_load(c, r, 4), r->imm & 15);
    NEXT();
}
HANDLER_REG_MEM(vinsertps);

#define VEX_SIGNS(name) \
    OP(op_##name) \
    { \
        u32 mask; \
        ymm s = get_ymm(c, r->rm); \
        if (is_256(r)) \
            __asm__(#name " %t1, %0" : "=r"(mask) : "x"(s)); \
        else \
            __asm__(#name " %x1, %0" : "=r"(mask) : "x"(s)); \
        R64(c, r->reg) = mask; \
        NEXT(); \
    } \
    HANDLER(name);
VEX_SIGNS(vmovmskps)
VEX_SIGNS(vmovmskpd)
VEX_SIGNS(vpmovmskb)

/* ---- VZEROUPPER, VZEROALL: of the registers that the mode has ---------------------------------------------- */

OP(op_vzero)
{
    for (unsigned i = 0; i < (c->key & KEY_CODE64 ? 16 : 8); i++)
        set_ymm(c, i, is_256(r) ? _mm256_setzero_si256() : wide(get_xmm(c, i)));
    NEXT();
}
HANDLER(vzero);

/* ---- Masked moves: VMASKMOVPS and its like ----------------------------------------------------------------- */

/* The bits of the elements whose top bit is set in the mask. What is not chosen is neither read nor written, and does not
 * fault (Intel SDM 2C VMASKMOV). The operand lies in a row: offsets of 16 bits do not begin again within it. */
ALWAYS_INLINE u32 chosen(const union vector *mask, unsigned bytes, unsigned count)
{
    u32 bits = 0;
    for (unsigned i = 0; i < count; i++)
        bits |= (u32)(mask->b[i * bytes + bytes - 1] >> 7) << i;
    return bits;
}
static u64 masked_linear(struct vcpu *c, const struct record *r, unsigned at, unsigned bytes, unsigned access)
{
    u64 mask = address_masks[r->prefix & PREFIX_ADDRESS] | 0xffffffff;
    return linear_of(c, r, r->seg, (offset_of(c, r) + at) & mask, bytes, access);
}
static NOINLINE void masked_load(struct vcpu *c, const struct record *r, unsigned bytes)
{
    u32 bits = chosen(&c->xmm[r->vvvv], bytes, vector_bytes(r) / bytes);
    u64 from[8];
    union vector value = {0};
    c->now = r;
    for (unsigned i = 0; bits >> i; i++) /* the segment is asked before pages */
        if (bits >> i & 1)
            from[i] = masked_linear(c, r, i * bytes, bytes, ACCESS_READ);
    for (unsigned i = 0; bits >> i; i++)
        if (bits >> i & 1) {
            u64 element = linear_load(c, from[i], bytes);
            memcpy(value.b + i * bytes, &element, bytes);
        }
    memcpy(&c->xmm[r->reg], &value, 32);
}
static NOINLINE void masked_store(struct vcpu *c, const struct record *r, unsigned bytes)
{
    u32 bits = chosen(&c->xmm[r->vvvv], bytes, vector_bytes(r) / bytes);
    u64 to[8];
    c->now = r;
    for (unsigned i = 0; bits >> i; i++)
        if (bits >> i & 1)
            to[i] = masked_linear(c, r, i * bytes, bytes, ACCESS_WRITE);
    for (unsigned i = 0; bits >> i; i++)
        if (bits >> i & 1 && !fast_linear_write(c, to[i], bytes))
            mmu_check_write(c, to[i], bytes, ACCESS_WRITE);
    for (unsigned i = 0; bits >> i; i++)
        if (bits >> i & 1)
            linear_store(c, to[i], bytes, bytes == 4 ? c->xmm[r->reg].d[i] : c->xmm[r->reg].q[i]);
}
#define VEX_MASKED(name, move, bytes) \
    OP(op_##name) \
    { \
        move(c, r, bytes); \
        NEXT(); \
    } \
    HANDLER(name);
VEX_MASKED(vmaskload_4, masked_load, 4)
VEX_MASKED(vmaskload_8, masked_load, 8)
VEX_MASKED(vmaskstore_4, masked_store, 4)
VEX_MASKED(vmaskstore_8, masked_store, 8)

/* ---- Gathers (Intel SDM 2C VGATHERDPS, VPGATHERDD) --------------------------------------------------------- */

/* An element that faults ends the instruction after those before it are done: their mask bits are clear, so that it goes on
 * with the others, and the mask's other elements are their top bits everywhere. So far this is the manual's; that the rest of
 * the destination is cleared by the first element that is done, and not before, is Intel's processors' way. What else leaves it (an exit for device memory) has done nothing, and begins anew. */
static u64 element_linear(struct vcpu *c, const struct record *r, u64 offset, unsigned bytes, unsigned access)
{
    return linear_of(c, r, r->seg, offset & address_masks[r->prefix & PREFIX_ADDRESS], bytes, access);
}
static enum escape try_load(struct vcpu *c, const struct record *r, u64 offset, unsigned bytes, u64 *value)
{
    if (c->key & KEY_CODE64) {
        u64 at = c->check[r->seg].base + (offset & address_masks[r->prefix & PREFIX_ADDRESS]);
        const u8 *p = fast_linear_read(c, at, bytes);
        if (likely(p)) {
            *value = peek(p, bytes);
            return 0;
        }
    }
    jmp_buf outer;
    memcpy(&outer, &c->escape, sizeof outer);
    enum escape how = (enum escape)setjmp(c->escape);
    if (!how)
        *value = linear_load(c, element_linear(c, r, offset, bytes, ACCESS_READ), bytes);
    memcpy(&c->escape, &outer, sizeof outer);
    return how;
}

/* False: it left. */
static NOINLINE bool gather(struct vcpu *c, const struct record *r, unsigned index_bytes, unsigned bytes)
{
    unsigned wider = bytes > index_bytes ? bytes : index_bytes, count = vector_bytes(r) / wider, i;
    union vector index = c->xmm[r->index], value = c->xmm[r->reg], mask = c->xmm[r->vvvv];
    unsigned elements = vector_bytes(r) / bytes; /* of the mask, which may be more */
    u32 bits = chosen(&mask, bytes, elements);
    u64 base = R64(c, r->base) + (u64)r->disp;
    enum escape how = 0;
    bool done = false;
    c->now = r;
    for (i = 0; i < sizeof mask; i++)
        mask.b[i] = bits >> i / bytes & 1 ? 0xff : 0;
    for (i = 0; i < count; i++)
        if (bits >> i & 1) {
            u64 number = index_bytes == 4 ? (u64)(i64)(i32)index.d[i] : index.q[i], element;
            how = try_load(c, r, base + (number << r->scale), bytes, &element);
            if (how)
                break;
            memcpy(value.b + i * bytes, &element, bytes);
            memset(mask.b + i * bytes, 0, bytes);
            done = true;
            if (!is_256(r))
                value.q[2] = value.q[3] = 0;
        }
    if (!how) {
        memset(value.b + count * bytes, 0, sizeof value - count * bytes);
        memset(&mask, 0, sizeof mask);
    }
    if (!how || how == ESCAPE_FAULT) {
        c->xmm[r->reg] = value;
        c->xmm[r->vvvv] = mask;
    }
    if (how == ESCAPE_FAULT && done && c->rflags & FLAG_TF) { /* the trap comes in place of the fault */
        pause_repetition(c, r);
        return false;
    }
    if (how)
        longjmp(c->escape, how);
    return true;
}
#define VEX_GATHER(name, index_bytes, bytes) \
    OP(op_##name) \
    { \
        if (likely(gather(c, r, index_bytes, bytes))) \
            NEXT(); \
    } \
    HANDLER(name);
VEX_GATHER(vgather_d4, 4, 4)
VEX_GATHER(vgather_d8, 4, 8)
VEX_GATHER(vgather_q4, 8, 4)
VEX_GATHER(vgather_q8, 8, 8)
