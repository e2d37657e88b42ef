/* MOVS, CMPS, SCAS, LODS, STOS with and without REP (Intel SDM 2). Elements that lie in RAM, up to the next page, go at once.
 * What counts as an instruction, and where a repetition may pause: repeat.h. */
#include "atomic.h"
#include "repeat.h"

/* A handler for each size: one element (`name_one`, by the general path, whose first try is inline), or as many as rCX says
 * (`name_some`: many at once where they lie in RAM). */
#define STRING_SIZE(name, bits, go_on) \
    static __attribute__((noinline)) u64 name##_some_##bits(struct vcpu *c, const struct record *r, u64 most) \
    { \
        return name##_some(c, r, bits / 8, most); \
    } \
    static __attribute__((noinline)) void name##_rep_##bits(struct vcpu *c, const struct record *r) \
    { \
        REPEAT(name##_some_##bits, go_on); \
    } \
    OP(name##_##bits) \
    { \
        if (repeats(r)) { \
            name##_rep_##bits(c, r); \
            return; \
        } \
        name##_one(c, r, bits / 8); \
        NEXT(); \
    }
#define STRING(name, go_on) \
    STRING_SIZE(name, 8, go_on) STRING_SIZE(name, 16, go_on) STRING_SIZE(name, 32, go_on) STRING_SIZE(name, 64, go_on) \
    const struct handlers H_##name = {.reg = {name##_8, name##_16, name##_32, name##_64}};

ALWAYS_INLINE u64 source_offset(const struct vcpu *c, const struct record *r) { return c->gpr[RSI] & address_mask(r); }
ALWAYS_INLINE u64 target_offset(const struct vcpu *c, const struct record *r) { return c->gpr[RDI] & address_mask(r); }
ALWAYS_INLINE void move_source(struct vcpu *c, const struct record *r, u64 bytes)
{
    set_address_register(c, r, RSI, c->gpr[RSI] + bytes);
}
ALWAYS_INLINE void move_target(struct vcpu *c, const struct record *r, u64 bytes)
{
    set_address_register(c, r, RDI, c->gpr[RDI] + bytes);
}

/* ---- MOVS -------------------------------------------------------------------------------------------------------------------- */

/* Element after element, upwards or downwards: where the target overlaps what is still to be read, that is not memmove. */
static void copy_elements(struct vcpu *c, u8 *to, const u8 *from, u64 count, unsigned bytes)
{
    u64 size = count * bytes;
    bool down = c->rflags & FLAG_DF;
    if (c->key & KEY_SHARED && !down) {
        copy_elements_in(to, from, count, bytes);
        return;
    }
    if (down) {
        to -= size - bytes;
        from -= size - bytes;
    }
    u64 ahead = down ? (u64)(from - to) : (u64)(to - from);
    if (!(c->key & KEY_SHARED) && (ahead == 0 || ahead >= size)) {
        memmove(to, from, size);
        return;
    }
    for (u64 i = 0; i < count; i++) {
        u64 at = (down ? count - 1 - i : i) * bytes;
        poke(to + at, bytes, peek(from + at, bytes));
        __asm__ volatile("" : : : "memory"); /* they stay single accesses */
    }
}

ALWAYS_INLINE void movs_one(struct vcpu *c, const struct record *r, unsigned bytes)
{
    u64 step = string_step(c, bytes);
    string_store(c, r, target_offset(c, r), bytes, string_load(c, r, r->seg, source_offset(c, r), bytes));
    move_source(c, r, step);
    move_target(c, r, step);
}
ALWAYS_INLINE u64 movs_some(struct vcpu *c, const struct record *r, unsigned bytes, u64 most)
{
    u64 step = string_step(c, bytes), source = source_offset(c, r), target = target_offset(c, r), n;
    u8 *from, *to;
    n = string_window(c, r, r->seg, source, bytes, most, ACCESS_READ, &from);
    if (likely(n))
        n = string_window(c, r, SEG_ES, target, bytes, n, ACCESS_WRITE, &to);
    if (unlikely(!n)) {
        movs_one(c, r, bytes);
        return 1;
    }
    copy_elements(c, to, from, n, bytes);
    move_source(c, r, n * step);
    move_target(c, r, n * step);
    return n;
}
STRING(movs, true)

/* ---- STOS, LODS ---------------------------------------------------------------------------------------------------------------- */

static void fill(struct vcpu *c, u8 *to, u64 count, unsigned bytes, u64 value)
{
    if (c->key & KEY_SHARED)
        fill_elements_in(to, count, bytes, value);
    else if (bytes == 1 || truncate_to(value, bytes * 8) == 0)
        memset(to, (u8)value, count * bytes);
    else if (bytes == 2)
        for (u64 i = 0; i < count; i++)
            ((unaligned_u16 *)to)[i] = (u16)value;
    else if (bytes == 4)
        for (u64 i = 0; i < count; i++)
            ((unaligned_u32 *)to)[i] = (u32)value;
    else
        for (u64 i = 0; i < count; i++)
            ((unaligned_u64 *)to)[i] = value;
}

ALWAYS_INLINE void stos_one(struct vcpu *c, const struct record *r, unsigned bytes)
{
    string_store(c, r, target_offset(c, r), bytes, c->gpr[RAX]);
    move_target(c, r, string_step(c, bytes));
}
ALWAYS_INLINE u64 stos_some(struct vcpu *c, const struct record *r, unsigned bytes, u64 most)
{
    u64 step = string_step(c, bytes), target = target_offset(c, r), n;
    u8 *to;
    n = string_window(c, r, SEG_ES, target, bytes, most, ACCESS_WRITE, &to);
    if (unlikely(!n)) {
        stos_one(c, r, bytes);
        return 1;
    }
    fill(c, c->rflags & FLAG_DF ? to - (n - 1) * bytes : to, n, bytes, c->gpr[RAX]);
    move_target(c, r, n * step);
    return n;
}
STRING(stos, true)

ALWAYS_INLINE void lods_one(struct vcpu *c, const struct record *r, unsigned bytes)
{
    set_reg(c, RAX * 8, bytes * 8, string_load(c, r, r->seg, source_offset(c, r), bytes));
    move_source(c, r, string_step(c, bytes));
}
ALWAYS_INLINE u64 lods_some(struct vcpu *c, const struct record *r, unsigned bytes, u64 most)
{
    u64 step = string_step(c, bytes), source = source_offset(c, r), n;
    u8 *from;
    n = string_window(c, r, r->seg, source, bytes, most, ACCESS_READ, &from);
    if (unlikely(!n)) {
        lods_one(c, r, bytes);
        return 1;
    }
    set_reg(c, RAX * 8, bytes * 8, peek(from + (n - 1) * step, bytes)); /* the last one stays */
    move_source(c, r, n * step);
    return n;
}
STRING(lods, true)

/* ---- CMPS, SCAS ------------------------------------------------------------------------------------------------------------------ */

/* REPE goes on while equal, REPNE while not. */
#define GOES_ON(c, r) (((c)->zf == 0) == !((r)->prefix & PREFIX_REPNE))

ALWAYS_INLINE void cmps_one(struct vcpu *c, const struct record *r, unsigned bytes)
{
    u64 step = string_step(c, bytes);
    u64 b = string_load(c, r, SEG_ES, target_offset(c, r), bytes); /* its fault comes first, processors say */
    u64 a = string_load(c, r, r->seg, source_offset(c, r), bytes);
    flags_sub(c, a, b, truncate_to(a - b, bytes * 8), bytes * 8);
    move_source(c, r, step);
    move_target(c, r, step);
}
ALWAYS_INLINE u64 cmps_some(struct vcpu *c, const struct record *r, unsigned bytes, u64 most)
{
    u64 step = string_step(c, bytes), source = source_offset(c, r), target = target_offset(c, r), n, a, b;
    bool while_equal = !(r->prefix & PREFIX_REPNE);
    u8 *first, *second;
    n = string_window(c, r, r->seg, source, bytes, most, ACCESS_READ, &first);
    if (likely(n))
        n = string_window(c, r, SEG_ES, target, bytes, n, ACCESS_READ, &second);
    if (unlikely(!n)) {
        cmps_one(c, r, bytes);
        return 1;
    }
    u64 i = 0;
    do {
        a = peek(first + i * step, bytes);
        b = peek(second + i * step, bytes);
        i++;
    } while (i < n && (a == b) == while_equal);
    flags_sub(c, a, b, truncate_to(a - b, bytes * 8), bytes * 8);
    move_source(c, r, i * step);
    move_target(c, r, i * step);
    return i;
}
STRING(cmps, GOES_ON(c, r))

ALWAYS_INLINE void scas_one(struct vcpu *c, const struct record *r, unsigned bytes)
{
    u64 a = truncate_to(c->gpr[RAX], bytes * 8), b = string_load(c, r, SEG_ES, target_offset(c, r), bytes);
    flags_sub(c, a, b, truncate_to(a - b, bytes * 8), bytes * 8);
    move_target(c, r, string_step(c, bytes));
}
ALWAYS_INLINE u64 scas_some(struct vcpu *c, const struct record *r, unsigned bytes, u64 most)
{
    u64 step = string_step(c, bytes), target = target_offset(c, r), n, a = truncate_to(c->gpr[RAX], bytes * 8), b;
    bool while_equal = !(r->prefix & PREFIX_REPNE);
    u8 *second;
    n = string_window(c, r, SEG_ES, target, bytes, most, ACCESS_READ, &second);
    if (unlikely(!n)) {
        scas_one(c, r, bytes);
        return 1;
    }
    u64 i = 0;
    do {
        b = peek(second + i * step, bytes);
        i++;
    } while (i < n && (a == b) == while_equal);
    flags_sub(c, a, b, truncate_to(a - b, bytes * 8), bytes * 8);
    move_target(c, r, i * step);
    return i;
}
STRING(scas, GOES_ON(c, r))

/* ---- XLAT -------------------------------------------------------------------------------------------------------------------------- */

OP(op_xlat)
{
    u64 offset = (c->gpr[RBX] + (u8)c->gpr[RAX]) & address_mask(r);
    set_reg(c, RAX * 8, 8, string_load(c, r, r->seg, offset, 1));
    NEXT();
}
HANDLER(xlat);
