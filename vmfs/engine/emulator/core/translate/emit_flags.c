/* The guest's arithmetic flags in host code: where they are, and how they get to where they are needed. */
#include "emit.h"

#include "flags.h"

/* By LAHF and SETO, and back by ADD and SAHF: PUSHF and POPF take three times and ten times as long. RAX is aside in T0. */
static void save_flags(struct translation *t)
{
    struct code *code = &t->code;
    put_modrm(code, I_W, M1, 0x8b, T0, in_register(RAX));
    put8(code, 0x9f);
    put_modrm(code, 0, M0F, 0x90 | CC_O, 0, in_register(RAX));
    put_modrm(code, 0, M1, 0x89, RAX, FIELD(flags_image));
    put_modrm(code, I_W, M1, 0x8b, RAX, in_register(T0));
}
static void restore_flags(struct translation *t, bool overflow)
{
    struct code *code = &t->code;
    put_modrm(code, I_W, M1, 0x8b, T0, in_register(RAX));
    load32(code, RAX, FIELD(flags_image));
    if (overflow) {
        put8(code, 0x04); /* ADD AL, 7F */
        put8(code, 0x7f);
    }
    put8(code, 0x9e);
    put_modrm(code, I_W, M1, 0x8b, RAX, in_register(T0));
}
/* Where a flag is in the image. */
static unsigned image_bit(u16 flag) { return flag == fO ? 0 : 8 + (unsigned)__builtin_ctz(flag); }
/* CF and OF that are in bytes of their own, to the image. */
static void fold(struct translation *t)
{
    struct code *code = &t->code;
    for (u16 flag = fC; flag; flag = flag == fC ? fO : 0) {
        if (!(t->split & flag))
            continue;
        put_modrm(code, 0, M0F, 0xb6, T0, flag == fC ? FIELD(carry_image) : FIELD(overflow_image)); /* MOVZX */
        if (image_bit(flag)) {
            put_modrm(code, 0, M1, 0xc1, 4, in_register(T0));
            put8(code, image_bit(flag));
        }
        alu_constant(code, 0, GROUP_AND, FIELD(flags_image), ~(1 << image_bit(flag))); /* whole, as it is loaded */
        put_modrm(code, 0, M1, 0x09, T0, FIELD(flags_image));
    }
    t->split = 0;
}
void unfold(struct translation *t, u16 flags)
{
    for (u16 flag = fC; flag; flag = flag == fC ? fO : 0) {
        if (!(flags & flag))
            continue;
        put_modrm(&t->code, 0, M0F, 0xba, 4, FIELD(flags_image)); /* BT */
        put8(&t->code, image_bit(flag));
        put_modrm(&t->code, 0, M0F, 0x90 | CC_B, 0, flag == fC ? FIELD(carry_image) : FIELD(overflow_image));
    }
}
void load_flags(struct translation *t, u16 needed)
{
    if (!needed)
        return;
    if (needed == fC) { /* BT, which is much faster than POPF; of memory it loads 4 bytes, which would wait for a store of one */
        if (t->split & fC)
            put_modrm(&t->code, 0, M0F, 0xb6, T0, FIELD(carry_image));
        put_modrm(&t->code, 0, M0F, 0xba, 4, t->split & fC ? in_register(T0) : FIELD(flags_image));
        put8(&t->code, t->split & fC ? 0 : image_bit(fC));
        return;
    }
    if (needed == fO) { /* of ADD to a byte */
        put_modrm(&t->code, 0, M0F, 0xb6, T0, t->split & fO ? FIELD(overflow_image) : FIELD(flags_image));
        put_modrm(&t->code, I_BYTE, M1, 0x80, GROUP_ADD, in_register(T0));
        put8(&t->code, 0x7f);
        return;
    }
    fold(t);
    if (needed == fZ) { /* of BT */
        load32(&t->code, T0, FIELD(flags_image));
        put_modrm(&t->code, 0, M1, 0xf7, 2, in_register(T0));
        put_modrm(&t->code, 0, M1, 0xf7, 0, in_register(T0));
        put32(&t->code, 1 << image_bit(fZ));
    } else {
        restore_flags(t, needed & fO);
    }
}

static unsigned size_flags(unsigned size)
{
    return size == 0 ? I_BYTE : size == 1 ? I_66 : size == 3 ? I_W : 0;
}
static void alu(struct translation *t, unsigned size, unsigned digit, unsigned a, const struct recipe *p, unsigned b)
{
    unsigned flags = size_flags(size);
    if (!p->constant) {
        put_modrm(&t->code, flags, M1, digit * 8 + !!size, b, in_register(a));
    } else if (size == 0) {
        put_modrm(&t->code, flags, M1, 0x80, digit, in_register(a));
        put8(&t->code, (u64)p->value);
    } else if (size == 1) {
        put_modrm(&t->code, flags, M1, 0x81, digit, in_register(a));
        put_bytes(&t->code, (u64)p->value, 2);
    } else {
        alu_constant(&t->code, flags, digit, in_register(a), p->value);
    }
}

/* Into the host's flags. T0 and T1 are free. */
static void make_recipe(struct translation *t, const struct recipe *p)
{
    bool one = p->constant || p->kind >= RECIPE_LOGIC;
    unsigned a = use(t, p->a, p->kind >= RECIPE_LEFT ? T1 : T0), b = one ? 0 : use(t, p->b, T1); /* T0 is load_flags' */
    unsigned flags = size_flags(p->size);
    switch (p->kind) {
    case RECIPE_COMPARE: alu(t, p->size, GROUP_CMP, a, p, b); break;
    case RECIPE_TEST:
        if (p->constant) {
            put_modrm(&t->code, flags, M1, p->size ? 0xf7 : 0xf6, 0, in_register(a));
            put_bytes(&t->code, (u64)(i64)p->value, p->size == 0 ? 1 : p->size == 1 ? 2 : 4);
        } else {
            put_modrm(&t->code, flags, M1, p->size ? 0x85 : 0x84, b, in_register(a));
        }
        break;
    case RECIPE_ADD: case RECIPE_SUB: /* undone, and done again */
        if (a != T0)
            put_modrm(&t->code, I_W, M1, 0x8b, T0, in_register(a));
        alu(t, p->size, p->kind == RECIPE_ADD ? GROUP_SUB : GROUP_ADD, T0, p, b);
        alu(t, p->size, p->kind == RECIPE_ADD ? GROUP_ADD : GROUP_SUB, T0, p, b);
        break;
    case RECIPE_LEFT: case RECIPE_RIGHT: /* undone, and done again with the other flags */
        if (a != T1)
            put_modrm(&t->code, I_W, M1, 0x8b, T1, in_register(a));
        put_modrm(&t->code, flags, M1, 0xc1, p->kind == RECIPE_LEFT, in_register(T1));
        put8(&t->code, (u64)p->value);
        load_flags(t, FLAGS_ARITHMETIC);
        put_modrm(&t->code, flags, M1, 0xc1, p->kind == RECIPE_RIGHT, in_register(T1));
        put8(&t->code, (u64)p->value);
        break;
    default: put_modrm(&t->code, flags, M1, p->size ? 0x85 : 0x84, a, in_register(a)); break;
    }
}

void flags_to_image(struct translation *t)
{
    fold(t);
    if (t->where == IN_RECIPE)
        make_recipe(t, &t->recipe);
    if (t->where != IN_IMAGE)
        save_flags(t);
    t->where = IN_IMAGE;
    t->recipe.kind = RECIPE_NONE;
}

bool recipe_uses(const struct recipe *p, u32 registers)
{
    return p->kind != RECIPE_NONE && ((registers >> (p->a >> 3) & 1) || (!p->constant && p->kind < RECIPE_LOGIC && registers >> (p->b >> 3) & 1));
}

/* What an instruction that writes flags needs in the host's: what it reads, and what it leaves to the next ones. */
static u16 needed(const struct translation *t)
{
    return t->writes && t->precise & t->writes ? t->reads | (t->precise & ~t->writes) : t->reads;
}

/* A rotation by a constant, in a register, of flags that only a fault will show: the image keeps the others, so that they
 * need not be loaded. */
static bool begin_rotation(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    bool left = o->operation == &operation_ROL;
    if (!(r->prefix & PREFIX_REGISTER) || !(left || o->operation == &operation_ROR) || t->reads || t->live || r->rm & 7 || !r->size)
        return false;
    if (!(t->where == IN_RECIPE && t->recipe.kind >= RECIPE_LEFT))
        flags_to_image(t);
    t->where = IN_RECIPE;
    t->recipe = (struct recipe){.kind = left ? RECIPE_LEFT : RECIPE_RIGHT, .size = r->size, .a = r->rm,
                                .value = o->operands[1] == oIb ? r->imm & (r->size == 3 ? 63 : 31) : 1};
    return true;
}

/* CF alone is written, or OF alone, and the others are in the image: it gets a byte of its own, which is faster than to load
 * them. */
bool merges(const struct translation *t)
{
    return (t->writes == fC || t->writes == fO) && t->where == IN_IMAGE && needed(t) & ~t->writes;
}
void merge(struct translation *t)
{
    bool carry = t->writes == fC;
    put_modrm(&t->code, 0, M0F, 0x90 | (carry ? CC_B : CC_O), 0, carry ? FIELD(carry_image) : FIELD(overflow_image));
    t->split |= t->writes;
}

void begin_flags(struct translation *t, const struct record *r)
{
    t->merge = false;
    if (!t->writes) {
        if (t->where == IN_RECIPE && recipe_uses(&t->recipe, registers_written(r, t->traits)))
            flags_to_image(t);
        return;
    }
    if (!(t->precise & t->writes)) { /* its flags are never seen */
        if (t->precise & ~t->writes) {
            if (t->where == IN_RECIPE || t->where == IN_HOST)
                flags_to_image(t);
        }
        if (t->where == IN_IMAGE)
            load_flags(t, t->reads);
        else if (t->where == IN_RECIPE && t->reads)
            make_recipe(t, &t->recipe);
        return;
    }
    if (t->where != IN_HOST && needed(t) & ~fC && begin_rotation(t, r))
        return;
    if (t->where == IN_RECIPE && (t->writes == fC || t->writes == fO) && needed(t) & ~t->writes)
        flags_to_image(t);
    if (merges(t)) {
        load_flags(t, t->reads);
        t->merge = true;
        return;
    }
    if (t->where == IN_IMAGE)
        load_flags(t, needed(t));
    else if (t->where == IN_RECIPE && needed(t))
        make_recipe(t, &t->recipe);
    t->where = IN_HOST;
    t->split = 0;
    t->recipe.kind = RECIPE_NONE;
}

/* Flags before host code that changes them and is no instruction of the guest. A fault shows them. */
void flags_before(struct translation *t, u32 registers)
{
    u16 after = t->reads | (t->writes ? t->precise & ~t->writes : t->live);
    bool lost = recipe_uses(&t->recipe, registers) && t->precise & ~t->writes;
    if (t->where == IN_HOST && (after || lost || t->recipe.kind == RECIPE_NONE))
        flags_to_image(t);
    else if (t->where == IN_HOST)
        t->where = IN_RECIPE;
    else if (t->where == IN_RECIPE && (after || lost))
        flags_to_image(t);
}

void flags_aside(struct translation *t, const struct record *r) { flags_before(t, registers_written(r, t->traits)); }

void flags_behind_check(struct translation *t)
{
    t->merge = t->writes & t->precise && merges(t);
    if (t->merge) {
        load_flags(t, t->reads);
        return;
    }
    if (t->where == IN_IMAGE && t->writes)
        load_flags(t, needed(t));
    if (t->writes & t->precise) {
        t->where = IN_HOST;
        t->split = 0;
        t->recipe.kind = RECIPE_NONE;
    }
}

/* The condition in the host's flags, where it is what this returns. Flags in the image stay there. */
unsigned emit_condition(struct translation *t, unsigned condition)
{
    static const u8 masks[6] = {0, fC, fZ, fZ | fC, fS, fP};
    if (t->where == IN_RECIPE) {
        make_recipe(t, &t->recipe);
        t->where = IN_HOST;
    }
    if (t->where == IN_HOST)
        return condition;
    unsigned kind = condition >> 1;
    if ((kind == 0 && t->split & fO) || (kind == 1 && t->split & fC)) {
        put_modrm(&t->code, 0, M1, 0xf6, 0, kind ? FIELD(carry_image) : FIELD(overflow_image));
        put8(&t->code, 1);
        return CC_NE ^ (condition & 1);
    }
    fold(t);
    if (kind >= 6) { /* of SF and OF */
        restore_flags(t, true);
        return condition;
    }
    struct place p = FIELD(flags_image);
    p.disp += kind != 0;
    put_modrm(&t->code, 0, M1, 0xf6, 0, p); /* TEST of a byte */
    put8(&t->code, kind ? masks[kind] : 1);
    return CC_NE ^ (condition & 1); /* not zero: true */
}

/* Of an instruction that is done. */
struct recipe recipe_of(const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    struct recipe p = {.size = r->size};
    unsigned first = operand_types[o->operands[0]].kind, second = operand_types[o->operands[1]].kind;
    if (!(first == REGISTER || first == OPCODE || first == FIXED || (first == RM_OPERAND && r->prefix & PREFIX_REGISTER)))
        return p;
    p.a = first == REGISTER ? r->reg : r->rm;
    if (second == IMMEDIATE) {
        p.constant = true;
        p.value = r->imm;
    } else if (second == REGISTER || (second == RM_OPERAND && r->prefix & PREFIX_REGISTER)) {
        p.b = second == REGISTER ? r->reg : r->rm;
    } else if (o->operation == &operation_CMP || o->operation == &operation_TEST) {
        return p; /* with memory */
    }
    if ((p.a | p.b) & 7)
        return p; /* AH */
    bool same = !p.constant && p.a == p.b, memory = second == RM_OPERAND && !(r->prefix & PREFIX_REGISTER);
    if (o->operation == &operation_CMP)
        p.kind = RECIPE_COMPARE;
    else if (o->operation == &operation_TEST)
        p.kind = RECIPE_TEST;
    else if (o->operation == &operation_AND || o->operation == &operation_OR || o->operation == &operation_XOR)
        p.kind = RECIPE_LOGIC;
    else if (o->operation == &operation_ADD && !same && !memory)
        p.kind = RECIPE_ADD;
    else if (o->operation == &operation_SUB && !memory)
        p.kind = same ? RECIPE_LOGIC : RECIPE_SUB;
    return p;
}
