/* The usual forms of an integer handler: register, fast memory, memory, in every operand size. An operation is an inline
 * function; these macros make its handlers and their table. */
#ifndef VMFS_FORMS_H
#define VMFS_FORMS_H

#include "flags.h"
#include "memory.h"
#include "opcodes.h"

/* After the name may come `.amd = &H_NAME`: the forms for hosts of AMD. */
#define FORM_TABLE(name, ...) \
    const struct handlers H_##name = { \
        {name##_reg_8, name##_reg_16, name##_reg_32, name##_reg_64}, \
        {name##_fast_8, name##_fast_16, name##_fast_32, name##_fast_64}, \
        {name##_mem_8, name##_mem_16, name##_mem_32, name##_mem_64}, ##__VA_ARGS__}
#define LOCK_TABLE(name) {name##_lock_8, name##_lock_16, name##_lock_32, name##_lock_64}
/* Of a row that allows LOCK. */
#define FORM_TABLE_LOCK(name) \
    const struct handlers H_##name = { \
        {name##_reg_8, name##_reg_16, name##_reg_32, name##_reg_64}, \
        {name##_fast_8, name##_fast_16, name##_fast_32, name##_fast_64}, \
        {name##_mem_8, name##_mem_16, name##_mem_32, name##_mem_64}, LOCK_TABLE(name)}
#define FORM_TABLE_V(name, ...) \
    const struct handlers H_##name = { \
        {NULL, name##_reg_16, name##_reg_32, name##_reg_64}, {NULL, name##_fast_16, name##_fast_32, name##_fast_64}, \
        {NULL, name##_mem_16, name##_mem_32, name##_mem_64}, ##__VA_ARGS__}
#define FORM_TABLE_Y(name, ...) \
    const struct handlers H_##name = { \
        {NULL, NULL, name##_reg_32, name##_reg_64}, {NULL, NULL, name##_fast_32, name##_fast_64}, \
        {NULL, NULL, name##_mem_32, name##_mem_64}, ##__VA_ARGS__}

/* The operation reads E: name(c, r, e, bits), e zero-extended. It may raise, before it changes anything. */
#define READ_SIZE(name, bits) \
    OP(name##_reg_##bits) { name(c, r, get_reg(c, r->rm, bits), bits); NEXT(); } \
    OP(name##_mem_##bits) { name(c, r, mem_load(c, r, bits / 8), bits); NEXT(); } \
    OP(name##_fast_##bits) \
    { \
        const u8 *p = fast_read(c, r, bits / 8); \
        if (unlikely(!p)) { \
            name##_mem_##bits(c, r); \
            return; \
        } \
        name(c, r, peek(p, bits / 8), bits); \
        NEXT(); \
    }
#define READ_FORMS(name, ...) \
    READ_SIZE(name, 8) READ_SIZE(name, 16) READ_SIZE(name, 32) READ_SIZE(name, 64) FORM_TABLE(name, ##__VA_ARGS__);
#define READ_FORMS_V(name, ...) READ_SIZE(name, 16) READ_SIZE(name, 32) READ_SIZE(name, 64) FORM_TABLE_V(name, ##__VA_ARGS__);
#define READ_FORMS_Y(name, ...) READ_SIZE(name, 32) READ_SIZE(name, 64) FORM_TABLE_Y(name, ##__VA_ARGS__);

/* Undefined flags are those of the host's maker: name##_for(c, r, e, bits, amd) is an operation for each. */
#define READ_BY_MAKER(FORMS, name) \
    ALWAYS_INLINE void name##_amd(struct vcpu *c, const struct record *r, u64 e, unsigned bits) { name##_for(c, r, e, bits, true); } \
    ALWAYS_INLINE void name(struct vcpu *c, const struct record *r, u64 e, unsigned bits) { name##_for(c, r, e, bits, false); } \
    FORMS(name##_amd) \
    FORMS(name, .amd = &H_##name##_amd)

/* The operation changes E: u64 name(c, r, a, bits, &state) gives the new value, truncated, and changes nothing;
 * name##_done(c, &state, value, bits) sets the flags when the value is stored. `name##_state` is what it passes on. */
#define CHANGE_SIZE(name, bits) \
    OP(name##_reg_##bits) \
    { \
        struct name##_state state; \
        u64 value = name(c, r, get_reg(c, r->rm, bits), bits, &state); \
        set_reg(c, r->rm, bits, value); \
        name##_done(c, &state, value, bits); \
        NEXT(); \
    } \
    OP(name##_mem_##bits) \
    { \
        struct name##_state state; \
        u64 at, value = name(c, r, rmw_load(c, r, bits / 8, &at), bits, &state); \
        linear_store(c, at, bits / 8, value); \
        name##_done(c, &state, value, bits); \
        NEXT(); \
    } \
    OP(name##_fast_##bits) \
    { \
        u8 *p = fast_write(c, r, bits / 8); \
        if (unlikely(!p)) { \
            name##_mem_##bits(c, r); \
            return; \
        } \
        struct name##_state state; \
        u64 value = name(c, r, peek(p, bits / 8), bits, &state); \
        poke(p, bits / 8, value); \
        name##_done(c, &state, value, bits); \
        NEXT(); \
    }
#define CHANGE_FORMS(name, ...) \
    CHANGE_SIZE(name, 8) CHANGE_SIZE(name, 16) CHANGE_SIZE(name, 32) CHANGE_SIZE(name, 64) FORM_TABLE(name, ##__VA_ARGS__);
#define CHANGE_FORMS_V(name, ...) CHANGE_SIZE(name, 16) CHANGE_SIZE(name, 32) CHANGE_SIZE(name, 64) FORM_TABLE_V(name, ##__VA_ARGS__);

/* CF alone; OF alone: the other flags stay. */
ALWAYS_INLINE void set_cf(struct vcpu *c, u64 cf)
{
    u64 change = (c->carries >> 63 ^ cf) & 1;
    c->carries ^= change << 63 | change << 62;
}
ALWAYS_INLINE void set_of(struct vcpu *c, u64 of) { c->carries ^= (flag_of(c) ^ of) << 62; }

#endif
