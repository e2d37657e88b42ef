/* Arithmetic, logic, moves (Intel SDM 2). Each operation is two functions: the result, and the flags from operands and
 * result, so that a store that faults comes between them and changes nothing. */
#include <sched.h>

#include "atomic.h"
#include "forms.h"

/* ---- The operations: operands zero-extended, results truncated by the caller --------------------------------------------- */

#define OPERATION(name, expression, flags_expression) \
    ALWAYS_INLINE u64 name##_result(struct vcpu *c, u64 a, u64 b) { (void)c, (void)a, (void)b; return expression; } \
    ALWAYS_INLINE void name##_flags(struct vcpu *c, u64 a, u64 b, u64 r, unsigned bits) \
    { (void)c, (void)a, (void)b, (void)r, (void)bits; flags_expression; }

OPERATION(add, a + b, flags_add(c, a, b, r, bits))
OPERATION(or, a | b, flags_logic(c, r, bits))
OPERATION(adc, a + b + flag_cf(c), flags_add(c, a, b, r, bits))
OPERATION(sbb, a - b - flag_cf(c), flags_sub(c, a, b, r, bits))
OPERATION(and, a & b, flags_logic(c, r, bits))
OPERATION(sub, a - b, flags_sub(c, a, b, r, bits))
OPERATION(xor, a ^ b, flags_logic(c, r, bits))
OPERATION(mov, b, )
OPERATION(not, ~a, )
OPERATION(neg, 0 - a, flags_sub(c, 0, a, r, bits))
OPERATION(inc, a + 1, (flags_keep_cf(c, spread_carries(carry_out(a, 1, r), bits)), set_result(c, r, bits)))
OPERATION(dec, a - 1, (flags_keep_cf(c, spread_carries(carry_out(r, 1, a), bits)), set_result(c, r, bits)))

/* ---- Forms: for each size, register, fast memory, memory --------------------------------------------------------------------- */

#define SIZES(X, name) X(name, 8) X(name, 16) X(name, 32) X(name, 64)
#define WIDE_SIZES(X, name) X(name, 16) X(name, 32) X(name, 64)
/* E op= source */
#define MODIFY(op, form, source, bits) \
    OP(op##_##form##_reg_##bits) \
    { \
        u64 a = get_reg(c, r->rm, bits), b = source; \
        u64 result = truncate_to(op##_result(c, a, b), bits); \
        set_reg(c, r->rm, bits, result); \
        op##_flags(c, a, b, result, bits); \
        NEXT(); \
    } \
    OP(op##_##form##_mem_##bits) \
    { \
        u64 at, a = rmw_load(c, r, bits / 8, &at), b = source; \
        u64 result = truncate_to(op##_result(c, a, b), bits); \
        linear_store(c, at, bits / 8, result); \
        op##_flags(c, a, b, result, bits); \
        NEXT(); \
    } \
    OP(op##_##form##_fast_##bits) \
    { \
        u8 *p = fast_write(c, r, bits / 8); \
        if (unlikely(!p)) { \
            op##_##form##_mem_##bits(c, r); \
            return; \
        } \
        u64 a = peek(p, bits / 8), b = source; \
        u64 result = truncate_to(op##_result(c, a, b), bits); \
        poke(p, bits / 8, result); \
        op##_flags(c, a, b, result, bits); \
        NEXT(); \
    } \
    OP(op##_##form##_lock_##bits) \
    { \
        struct locked l = lock_operand(c, r, bits / 8); \
        u64 a, b = source, result; \
        do { \
            a = locked_load(c, &l, bits / 8); \
            result = truncate_to(op##_result(c, a, b), bits); \
        } while (!locked_store(c, &l, bits / 8, a, result)); \
        unlock_operand(c, &l); \
        op##_flags(c, a, b, result, bits); \
        NEXT(); \
    }

/* G op= E */
#define MODIFY_G(op, bits) \
    OP(op##_G_E_reg_##bits) \
    { \
        u64 a = get_reg(c, r->reg, bits), b = get_reg(c, r->rm, bits); \
        u64 result = truncate_to(op##_result(c, a, b), bits); \
        set_reg(c, r->reg, bits, result); \
        op##_flags(c, a, b, result, bits); \
        NEXT(); \
    } \
    OP(op##_G_E_mem_##bits) \
    { \
        u64 b = mem_load(c, r, bits / 8), a = get_reg(c, r->reg, bits); \
        u64 result = truncate_to(op##_result(c, a, b), bits); \
        set_reg(c, r->reg, bits, result); \
        op##_flags(c, a, b, result, bits); \
        NEXT(); \
    } \
    OP(op##_G_E_fast_##bits) \
    { \
        const u8 *p = fast_read(c, r, bits / 8); \
        if (unlikely(!p)) { \
            op##_G_E_mem_##bits(c, r); \
            return; \
        } \
        u64 a = get_reg(c, r->reg, bits), b = peek(p, bits / 8); \
        u64 result = truncate_to(op##_result(c, a, b), bits); \
        set_reg(c, r->reg, bits, result); \
        op##_flags(c, a, b, result, bits); \
        NEXT(); \
    }

/* Flags of first op second only: CMP, TEST. `name` is the table's, `op` the operation's. */
#define COMPARE(name, op, first, second, bits) \
    OP(name##_reg_##bits) \
    { \
        u64 e = get_reg(c, r->rm, bits), o = COMPARE_OTHER_##second(bits); \
        u64 a = COMPARE_##first, b = COMPARE_NOT_##first; \
        op##_flags(c, a, b, truncate_to(op##_result(c, a, b), bits), bits); \
        NEXT(); \
    } \
    OP(name##_mem_##bits) \
    { \
        u64 e = mem_load(c, r, bits / 8), o = COMPARE_OTHER_##second(bits); \
        u64 a = COMPARE_##first, b = COMPARE_NOT_##first; \
        op##_flags(c, a, b, truncate_to(op##_result(c, a, b), bits), bits); \
        NEXT(); \
    } \
    OP(name##_fast_##bits) \
    { \
        const u8 *p = fast_read(c, r, bits / 8); \
        if (unlikely(!p)) { \
            name##_mem_##bits(c, r); \
            return; \
        } \
        u64 e = peek(p, bits / 8), o = COMPARE_OTHER_##second(bits); \
        u64 a = COMPARE_##first, b = COMPARE_NOT_##first; \
        op##_flags(c, a, b, truncate_to(op##_result(c, a, b), bits), bits); \
        NEXT(); \
    }
#define COMPARE_E_FIRST e
#define COMPARE_NOT_E_FIRST o
#define COMPARE_E_SECOND o
#define COMPARE_NOT_E_SECOND e
#define COMPARE_OTHER_REG(bits) get_reg(c, r->reg, bits)
#define COMPARE_OTHER_IMM(bits) truncate_to((u64)(i64)r->imm, bits)

#define ALU_SIZE(op, bits) \
    MODIFY(op, E_G, get_reg(c, r->reg, bits), bits) \
    MODIFY(op, E_I, truncate_to((u64)(i64)r->imm, bits), bits) \
    MODIFY_G(op, bits)
#define ALU(op) SIZES(ALU_SIZE, op) FORM_TABLE_LOCK(op##_E_G); FORM_TABLE_LOCK(op##_E_I); FORM_TABLE(op##_G_E);

ALU(add)
ALU(or)
ALU(adc)
ALU(sbb)
ALU(and)
ALU(sub)
ALU(xor)

#define CMP_SIZE(name, bits) \
    COMPARE(cmp_E_G, sub, E_FIRST, REG, bits) \
    COMPARE(cmp_G_E, sub, E_SECOND, REG, bits) \
    COMPARE(cmp_E_I, sub, E_FIRST, IMM, bits) \
    COMPARE(test_E_G, and, E_FIRST, REG, bits) \
    COMPARE(test_E_I, and, E_FIRST, IMM, bits)
SIZES(CMP_SIZE, cmp)
FORM_TABLE(cmp_E_G); FORM_TABLE(cmp_G_E); FORM_TABLE(cmp_E_I); FORM_TABLE(test_E_G); FORM_TABLE(test_E_I);

#define UNARY_SIZE(op, bits) MODIFY(op, E, 0, bits)
#define UNARY(op) SIZES(UNARY_SIZE, op) FORM_TABLE_LOCK(op##_E);
UNARY(not)
UNARY(neg)
UNARY(inc)
UNARY(dec)

/* ---- Moves ------------------------------------------------------------------------------------------------------------------------ */

/* E = source: as MODIFY without reading E */
#define STORE(name, source, bits) \
    OP(name##_reg_##bits) \
    { \
        set_reg(c, r->rm, bits, source); \
        NEXT(); \
    } \
    OP(name##_mem_##bits) \
    { \
        mem_store(c, r, bits / 8, source); \
        NEXT(); \
    } \
    OP(name##_fast_##bits) \
    { \
        u8 *p = fast_write(c, r, bits / 8); \
        if (unlikely(!p)) { \
            name##_mem_##bits(c, r); \
            return; \
        } \
        poke(p, bits / 8, source); \
        NEXT(); \
    }
/* G = value of E, of `from` bits, as `bits` bits */
#define LOAD(name, from, expression, bits) \
    OP(name##_reg_##bits) \
    { \
        u64 e = get_reg(c, r->rm, from); \
        set_reg(c, r->reg, bits, (u64)(expression)); \
        NEXT(); \
    } \
    OP(name##_mem_##bits) \
    { \
        u64 e = mem_load(c, r, (from) / 8); \
        set_reg(c, r->reg, bits, (u64)(expression)); \
        NEXT(); \
    } \
    OP(name##_fast_##bits) \
    { \
        const u8 *p = fast_read(c, r, (from) / 8); \
        if (unlikely(!p)) { \
            name##_mem_##bits(c, r); \
            return; \
        } \
        u64 e = peek(p, (from) / 8); \
        set_reg(c, r->reg, bits, (u64)(expression)); \
        NEXT(); \
    }

#define MOV_SIZE(name, bits) \
    STORE(mov_E_G, get_reg(c, r->reg, bits), bits) \
    STORE(mov_E_I, (u64)(i64)r->imm, bits) \
    LOAD(mov_G_E, bits, e, bits)
SIZES(MOV_SIZE, mov)
FORM_TABLE(mov_E_G); FORM_TABLE(mov_E_I); FORM_TABLE(mov_G_E);

/* MOVSXD r16, r/m16: with operand size 16 it reads 16 bits (SDM 2B MOVSX), on AMD's processors 32. */
#define MOVSXD_BITS(bits) ((bits) < 32 ? (bits) : 32)
#define EXTEND_SIZE(name, bits) \
    LOAD(movzx8, 8, e, bits) LOAD(movzx16, 16, e, bits) \
    LOAD(movsx8, 8, sign_extend(e, 8), bits) LOAD(movsx16, 16, sign_extend(e, 16), bits) \
    LOAD(movsxd, MOVSXD_BITS(bits), sign_extend(e, MOVSXD_BITS(bits)), bits)
WIDE_SIZES(EXTEND_SIZE, movx)
FORM_TABLE_V(movzx8); FORM_TABLE_V(movzx16); FORM_TABLE_V(movsx8); FORM_TABLE_V(movsx16); FORM_TABLE_V(movsxd);

#define MOV_Z_SIZE(name, bits) \
    OP(mov_Z_Iv_##bits) { set_reg(c, r->rm, bits, (u64)r->disp); NEXT(); }
WIDE_SIZES(MOV_Z_SIZE, mov)
const struct handlers H_mov_Z_Iv = {.reg = {NULL, mov_Z_Iv_16, mov_Z_Iv_32, mov_Z_Iv_64}};

/* The offset, without the segment's base and without checks. */
#define LEA_SIZE(name, bits) \
    OP(lea_mem_##bits) { set_reg(c, r->reg, bits, offset_of(c, r)); NEXT(); } \
    OP(lea_fast_##bits) { set_reg(c, r->reg, bits, fast_address(c, r)); NEXT(); }
WIDE_SIZES(LEA_SIZE, lea)
const struct handlers H_lea = {.fast = {NULL, lea_fast_16, lea_fast_32, lea_fast_64},
                               .mem = {NULL, lea_mem_16, lea_mem_32, lea_mem_64}};

OP(op_nop) { NEXT(); }
HANDLER(nop);

/* It says that the guest spins and waits for another CPU, which in turn cannot execute before this one gives its turn away. At the
 * same time it may be one for which the host has no processor just now. */
enum { PAUSES = 64 };
OP(op_pause)
{
    if (c->vm->in_turn) {
        c->turn_over = true;
        leave(c, r);
        return;
    }
    if (c->key & KEY_SHARED && ++c->pauses % PAUSES == 0) {
        sched_yield();
        leave(c, r);
        return;
    }
    NEXT();
}
HANDLER(pause);

/* ---- Exchanges -------------------------------------------------------------------------------------------------------------------- */

#define XCHG_SIZE(name, bits) \
    OP(xchg_reg_##bits) \
    { \
        u64 a = get_reg(c, r->rm, bits); \
        set_reg(c, r->rm, bits, get_reg(c, r->reg, bits)); \
        set_reg(c, r->reg, bits, a); \
        NEXT(); \
    } \
    OP(xchg_mem_##bits) \
    { \
        u64 at, a = rmw_load(c, r, bits / 8, &at); \
        linear_store(c, at, bits / 8, get_reg(c, r->reg, bits)); \
        set_reg(c, r->reg, bits, a); \
        NEXT(); \
    } \
    OP(xchg_lock_##bits) \
    { \
        struct locked l = lock_operand(c, r, bits / 8); \
        u64 a; \
        do \
            a = locked_load(c, &l, bits / 8); \
        while (!locked_store(c, &l, bits / 8, a, get_reg(c, r->reg, bits))); \
        unlock_operand(c, &l); \
        set_reg(c, r->reg, bits, a); \
        NEXT(); \
    } \
    OP(xadd_reg_##bits) \
    { \
        u64 a = get_reg(c, r->rm, bits), b = get_reg(c, r->reg, bits), sum = truncate_to(a + b, bits); \
        set_reg(c, r->reg, bits, a); \
        set_reg(c, r->rm, bits, sum); \
        flags_add(c, a, b, sum, bits); \
        NEXT(); \
    } \
    OP(xadd_mem_##bits) \
    { \
        u64 at, a = rmw_load(c, r, bits / 8, &at), b = get_reg(c, r->reg, bits), sum = truncate_to(a + b, bits); \
        linear_store(c, at, bits / 8, sum); \
        set_reg(c, r->reg, bits, a); \
        flags_add(c, a, b, sum, bits); \
        NEXT(); \
    } \
    OP(xadd_lock_##bits) \
    { \
        struct locked l = lock_operand(c, r, bits / 8); \
        u64 a, b = get_reg(c, r->reg, bits), sum; \
        do { \
            a = locked_load(c, &l, bits / 8); \
            sum = truncate_to(a + b, bits); \
        } while (!locked_store(c, &l, bits / 8, a, sum)); \
        unlock_operand(c, &l); \
        set_reg(c, r->reg, bits, a); \
        flags_add(c, a, b, sum, bits); \
        NEXT(); \
    } \
    /* rAX is written only when the comparison fails; a 32-bit destination is written in any case. */ \
    OP(cmpxchg_reg_##bits) \
    { \
        u64 a = get_reg(c, RAX * 8, bits), e = get_reg(c, r->rm, bits); \
        if (a == e) \
            set_reg(c, r->rm, bits, get_reg(c, r->reg, bits)); \
        else \
            set_reg(c, RAX * 8, bits, e); \
        flags_sub(c, a, e, truncate_to(a - e, bits), bits); \
        NEXT(); \
    } \
    OP(cmpxchg_mem_##bits) \
    { \
        u64 at, e = rmw_load(c, r, bits / 8, &at), a = get_reg(c, RAX * 8, bits); \
        linear_store(c, at, bits / 8, a == e ? get_reg(c, r->reg, bits) : e); \
        if (a != e) \
            set_reg(c, RAX * 8, bits, e); \
        flags_sub(c, a, e, truncate_to(a - e, bits), bits); \
        NEXT(); \
    } \
    OP(cmpxchg_lock_##bits) \
    { \
        struct locked l = lock_operand(c, r, bits / 8); \
        u64 a = get_reg(c, RAX * 8, bits), e; \
        do \
            e = locked_load(c, &l, bits / 8); \
        while (!locked_store(c, &l, bits / 8, e, a == e ? get_reg(c, r->reg, bits) : e)); \
        unlock_operand(c, &l); \
        if (a != e) \
            set_reg(c, RAX * 8, bits, e); \
        flags_sub(c, a, e, truncate_to(a - e, bits), bits); \
        NEXT(); \
    }
SIZES(XCHG_SIZE, xchg)
#define SLOW_TABLE(name) \
    const struct handlers H_##name = { \
        {name##_reg_8, name##_reg_16, name##_reg_32, name##_reg_64}, \
        {name##_mem_8, name##_mem_16, name##_mem_32, name##_mem_64}, \
        {name##_mem_8, name##_mem_16, name##_mem_32, name##_mem_64}, LOCK_TABLE(name)}
SLOW_TABLE(xchg);
SLOW_TABLE(xadd);
SLOW_TABLE(cmpxchg);

/* ---- By condition ------------------------------------------------------------------------------------------------------------------- */

/* The load is done in any case, and a 32-bit destination clears its high half in any case. */
#define CMOV_SIZE(name, bits) LOAD(name, bits, condition(c, CONDITION_OF_##name) ? e : get_reg(c, r->reg, bits), bits)
#define CONDITIONAL(n) \
    enum { CONDITION_OF_cmov##n = n }; \
    WIDE_SIZES(CMOV_SIZE, cmov##n) \
    FORM_TABLE_V(cmov##n); \
    STORE(set##n, condition(c, n), 8) \
    const struct handlers H_set##n = {{set##n##_reg_8}, {set##n##_fast_8}, {set##n##_mem_8}};
CONDITIONAL(0) CONDITIONAL(1) CONDITIONAL(2) CONDITIONAL(3) CONDITIONAL(4) CONDITIONAL(5) CONDITIONAL(6) CONDITIONAL(7)
CONDITIONAL(8) CONDITIONAL(9) CONDITIONAL(10) CONDITIONAL(11) CONDITIONAL(12) CONDITIONAL(13) CONDITIONAL(14)
CONDITIONAL(15)
