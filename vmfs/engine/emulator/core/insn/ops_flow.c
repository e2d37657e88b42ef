/* Near jumps, calls and returns; HLT; #UD. Far transfers are in ops_system*.c. */
#include "cache.h"
#include "flags.h"
#include "memory.h"
#include "opcodes.h"

#define JCC(n) \
    OP(op_j##n) \
    { \
        if (condition(c, n)) \
            JUMP_LINK(c, r); \
        NEXT_OVER_LINK(); \
    } \
    HANDLER(j##n);
JCC(0) JCC(1) JCC(2) JCC(3) JCC(4) JCC(5) JCC(6) JCC(7) JCC(8) JCC(9) JCC(10) JCC(11) JCC(12) JCC(13) JCC(14) JCC(15)

OP(op_jmp) { JUMP_LINK(c, r); }
HANDLER(jmp);

/* LOOP and JCXZ count in rCX of the address size. */
ALWAYS_INLINE u64 count_of(struct vcpu *c, const struct record *r) { return c->gpr[RCX] & address_masks[r->prefix & PREFIX_ADDRESS]; }
ALWAYS_INLINE void set_count(struct vcpu *c, const struct record *r, u64 count)
{
    set_reg(c, RCX * 8, 8u << (r->prefix & PREFIX_ADDRESS), count);
}
#define LOOP_WHILE(name, also) \
    OP(op_##name) \
    { \
        u64 count = count_of(c, r) - 1; \
        bool taken = (count & address_masks[r->prefix & PREFIX_ADDRESS]) && (also); \
        if (taken) \
            check_target(c, r, relative_target(c, r)); \
        set_count(c, r, count); \
        if (taken) \
            JUMP_LINK(c, r); \
        NEXT_OVER_LINK(); \
    } \
    HANDLER(name);
LOOP_WHILE(loop, true)
LOOP_WHILE(loope, c->zf == 0)
LOOP_WHILE(loopne, c->zf != 0)

OP(op_jcxz)
{
    if (!count_of(c, r))
        JUMP_LINK(c, r);
    NEXT_OVER_LINK();
}
HANDLER(jcxz);

/* ---- Calls ---------------------------------------------------------------------------------------------------------------------- */

#define FAST_STACK(bits) \
    OP(call_##bits) \
    { \
        if (unlikely(!link_holds(c, LINK_OF(r)))) \
            check_target(c, r, relative_target(c, r)); \
        push(c, r, bits / 8, next_ip(c, r)); \
        JUMP_LINK(c, r); \
    } \
    OP(call_E_reg_##bits) \
    { \
        u64 target = get_reg(c, r->rm, bits); \
        check_target(c, r, target); \
        push(c, r, bits / 8, next_ip(c, r)); \
        JUMP_TO(c, r, target); \
    } \
    OP(call_E_mem_##bits) \
    { \
        u64 target = mem_load(c, r, bits / 8); \
        check_target(c, r, target); \
        push(c, r, bits / 8, next_ip(c, r)); \
        JUMP_TO(c, r, target); \
    } \
    OP(jmp_E_reg_##bits) \
    { \
        u64 target = get_reg(c, r->rm, bits); \
        check_target(c, r, target); \
        JUMP_TO(c, r, target); \
    } \
    OP(jmp_E_mem_##bits) \
    { \
        u64 target = mem_load(c, r, bits / 8); \
        check_target(c, r, target); \
        JUMP_TO(c, r, target); \
    } \
    OP(ret_##bits) \
    { \
        u64 target = stack_load(c, r, 0, bits / 8); \
        check_target(c, r, target); \
        set_sp(c, c->gpr[RSP] + bits / 8); \
        JUMP_TO(c, r, target); \
    } \
    OP(ret_I_##bits) \
    { \
        u64 target = stack_load(c, r, 0, bits / 8); \
        check_target(c, r, target); \
        set_sp(c, c->gpr[RSP] + bits / 8 + (u16)r->imm); \
        JUMP_TO(c, r, target); \
    }
FAST_STACK(16)
FAST_STACK(32)
FAST_STACK(64)

/* In 64-bit mode: the stack is flat, and an address in the jump cache or after a call is canonical. */
OP(call_fast)
{
    u64 sp = c->gpr[RSP] - 8;
    u8 *p = fast_linear_write(c, sp, 8);
    if (unlikely(!p || !link_holds(c, LINK_OF(r)))) {
        call_64(c, r);
        return;
    }
    poke(p, 8, c->gpr[GPR_IP] + r->at + r->length);
    c->gpr[RSP] = sp;
    ENTER_LINK(c, r);
}
OP(ret_fast)
{
    u64 sp = c->gpr[RSP];
    const u8 *p = fast_linear_read(c, sp, 8);
    if (unlikely(!p)) {
        ret_64(c, r);
        return;
    }
    u64 target = peek(p, 8);
    struct jump_entry *e = jump_entry(c, target);
    if (unlikely(!jump_holds(c, e, target))) {
        ret_64(c, r);
        return;
    }
    c->gpr[RSP] = sp + 8;
    ENTER(c, e->block);
}

#define SIZED(f) {NULL, f##_16, f##_32, f##_64}
const struct handlers H_call = {.reg = {NULL, call_16, call_32, call_fast}};
const struct handlers H_ret = {.reg = {NULL, ret_16, ret_32, ret_fast}};
const struct handlers H_ret_I = {.reg = SIZED(ret_I)};
const struct handlers H_call_E = {SIZED(call_E_reg), SIZED(call_E_mem), SIZED(call_E_mem)};
const struct handlers H_jmp_E = {SIZED(jmp_E_reg), SIZED(jmp_E_mem), SIZED(jmp_E_mem)};

/* ---- Stops ------------------------------------------------------------------------------------------------------------------------ */

OP(op_ud) { raise_fault(c, r, VECTOR_UD); }
HANDLER(ud);

OP(op_hlt)
{
    c->halted = true;
    leave(c, r);
}
HANDLER(hlt);
