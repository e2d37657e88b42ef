/* PUSH, POP, PUSHA, POPA, ENTER, LEAVE, PUSHF, POPF (Intel SDM 2B). */
#include "flags.h"
#include "memory.h"
#include "opcodes.h"

#define STACK_SIZE(bits) \
    OP(push_E_reg_##bits) { push(c, r, bits / 8, get_reg(c, r->rm, bits)); NEXT(); } \
    OP(push_E_mem_##bits) { push(c, r, bits / 8, mem_load(c, r, bits / 8)); NEXT(); } \
    OP(push_I_##bits) { push(c, r, bits / 8, (u64)(i64)r->imm); NEXT(); } \
    OP(pop_E_reg_##bits) \
    { \
        u64 value = stack_load(c, r, 0, bits / 8); \
        set_sp(c, c->gpr[RSP] + bits / 8); \
        set_reg(c, r->rm, bits, value); \
        NEXT(); \
    } \
    /* An address that uses rSP uses it after the increment; a fault leaves it as it was. */ \
    OP(pop_E_mem_##bits) \
    { \
        u64 value = stack_load(c, r, 0, bits / 8), sp = c->gpr[RSP]; \
        set_sp(c, sp + bits / 8); \
        u64 offset = offset_of(c, r), after = c->gpr[RSP]; \
        c->gpr[RSP] = sp; \
        linear_store(c, linear_of(c, r, r->seg, offset, bits / 8, ACCESS_WRITE), bits / 8, value); \
        c->gpr[RSP] = after; \
        NEXT(); \
    } \
    OP(leave_##bits) \
    { \
        u64 frame = c->gpr[RBP] & c->stack_mask; \
        u64 value = linear_load(c, stack_linear(c, r, frame, bits / 8, ACCESS_READ), bits / 8); \
        set_sp(c, frame + bits / 8); \
        set_reg(c, RBP * 8, bits, value); \
        NEXT(); \
    } \
    OP(enter_##bits) \
    { \
        unsigned allocate = (u16)r->imm, level = r->imm >> 16 & 31, n = bits / 8; \
        u64 sp = c->gpr[RSP], frame = (sp & ~c->stack_mask) | ((sp - n) & c->stack_mask), bp = c->gpr[RBP]; \
        mmu_check_write(c, stack_linear(c, r, sp - n, n, ACCESS_WRITE), n, 0); \
        for (unsigned i = 1; i <= level; i++) \
            mmu_check_write(c, stack_linear(c, r, sp - n * (i + 1), n, ACCESS_WRITE), n, 0); \
        u64 end = frame - n * level - allocate; \
        mmu_check_write(c, stack_linear(c, r, end, n, ACCESS_WRITE), n, 0); /* 2A ENTER: checks the final stack */ \
        linear_store(c, stack_linear(c, r, frame, n, ACCESS_WRITE), n, bp); \
        for (unsigned i = 1; i < level; i++) \
            linear_store(c, stack_linear(c, r, frame - n * i, n, ACCESS_WRITE), n, \
                         linear_load(c, stack_linear(c, r, bp - n * i, n, ACCESS_READ), n)); \
        if (level) \
            linear_store(c, stack_linear(c, r, frame - n * level, n, ACCESS_WRITE), n, frame); \
        set_reg(c, RBP * 8, bits, frame); \
        set_sp(c, end); \
        NEXT(); \
    }
STACK_SIZE(16)
STACK_SIZE(32)
STACK_SIZE(64)

#define STACK_ALL(bits) \
    OP(pusha_##bits) \
    { \
        c->now = r; \
        u64 sp = c->gpr[RSP]; \
        for (unsigned i = 0; i < 8; i++) /* all checks before the first store */ \
            mmu_check_write(c, stack_linear(c, r, sp - (i + 1) * (bits / 8), bits / 8, ACCESS_WRITE), bits / 8, 0); \
        for (unsigned i = 0; i < 8; i++) \
            linear_store(c, stack_linear(c, r, sp - (i + 1) * (bits / 8), bits / 8, ACCESS_WRITE), bits / 8, \
                         c->gpr[i]); \
        set_sp(c, sp - bits); \
        NEXT(); \
    } \
    OP(popa_##bits) \
    { \
        u64 values[8]; \
        for (unsigned i = 0; i < 8; i++) \
            values[7 - i] = stack_load(c, r, i * (bits / 8), bits / 8); \
        for (unsigned i = 0; i < 8; i++) \
            if (i != RSP) \
                set_reg(c, i * 8, bits, values[i]); \
        set_sp(c, c->gpr[RSP] + bits); \
        NEXT(); \
    }
STACK_ALL(16)
STACK_ALL(32)

/* 64-bit mode, within a page that may be written. */
OP(push_fast)
{
    u64 sp = c->gpr[RSP] - 8;
    u8 *p = fast_linear_write(c, sp, 8);
    if (unlikely(!p)) {
        push_E_reg_64(c, r);
        return;
    }
    poke(p, 8, R64(c, r->rm));
    c->gpr[RSP] = sp;
    NEXT();
}
OP(pop_fast)
{
    u64 sp = c->gpr[RSP];
    const u8 *p = fast_linear_read(c, sp, 8);
    if (unlikely(!p)) {
        pop_E_reg_64(c, r);
        return;
    }
    c->gpr[RSP] = sp + 8;
    R64(c, r->rm) = peek(p, 8);
    NEXT();
}

#define SIZED(f) {NULL, f##_16, f##_32, f##_64}
const struct handlers H_push_E = {{NULL, push_E_reg_16, push_E_reg_32, push_fast}, SIZED(push_E_mem), SIZED(push_E_mem)};
const struct handlers H_pop_E = {{NULL, pop_E_reg_16, pop_E_reg_32, pop_fast}, SIZED(pop_E_mem), SIZED(pop_E_mem)};
const struct handlers H_push_I = {.reg = SIZED(push_I)};
const struct handlers H_pusha = {.reg = {NULL, pusha_16, pusha_32}};
const struct handlers H_popa = {.reg = {NULL, popa_16, popa_32}};
const struct handlers H_leave = {.reg = SIZED(leave)};
const struct handlers H_enter = {.reg = SIZED(enter)};

/* ---- Flags ------------------------------------------------------------------------------------------------------------------------ */

static unsigned iopl(const struct vcpu *c) { return c->rflags >> 12 & 3; }

OP(op_pushf)
{
    if (c->key & KEY_V86 && iopl(c) < 3) { /* CR4.VME: 2B PUSHF, 20.3 */
        if (!(c->cr4 & CR4_VME) || r->size != 1)
            raise_error(c, r, VECTOR_GP, 0);
        u64 flags = get_rflags(c) | FLAG_IOPL;
        flags = (flags & ~(u64)FLAG_IF) | (c->rflags & FLAG_VIF ? FLAG_IF : 0);
        push(c, r, 2, flags);
    } else {
        push(c, r, 1u << r->size, get_rflags(c) & ~(u64)(FLAG_VM | FLAG_RF));
    }
    NEXT();
}
HANDLER(pushf);

OP(op_popf)
{
    u64 value = stack_load(c, r, 0, 1u << r->size);
    u64 change = FLAGS_ARITHMETIC | FLAG_TF | FLAG_DF | FLAG_NT;
    if (r->size > 1)
        change |= FLAG_AC | FLAG_ID;
    if (c->key & KEY_V86 && iopl(c) < 3) {
        if (!(c->cr4 & CR4_VME) || r->size != 1 || value & FLAG_TF || (value & FLAG_IF && c->rflags & FLAG_VIP))
            raise_error(c, r, VECTOR_GP, 0);
        c->rflags = (c->rflags & ~(u64)FLAG_VIF) | (value & FLAG_IF ? FLAG_VIF : 0);
    } else {
        if (c->cpl <= iopl(c))
            change |= FLAG_IF;
        if (!c->cpl)
            change |= FLAG_IOPL;
    }
    set_sp(c, c->gpr[RSP] + (1u << r->size));
    u64 old = get_rflags(c);
    set_rflags(c, (old & ~change) | (value & change));
    if (r->size > 1)
        c->rflags &= ~(u64)FLAG_RF;
    flags_changed(c);
    leave(c, r);
}
HANDLER(popf);
