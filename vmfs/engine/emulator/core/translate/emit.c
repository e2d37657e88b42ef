/* Host code of blocks: flags, memory, jumps, calls of handlers. What single instructions are is in emitters.c. */
#include "emit.h"

#include "flags.h"

static const u16 ALL = FLAGS_ARITHMETIC;

/* ---- What the table says ----------------------------------------------------------------------------------------------- */

unsigned traits_of(const struct record *r)
{
    const struct emitter *e = opcodes[r->id].emitter;
    return e ? e->traits : 0;
}

static bool names_memory(const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    if (r->prefix & PREFIX_REGISTER)
        return false;
    for (unsigned i = 0; i < OPERANDS_MAX; i++) {
        unsigned kind = operand_types[o->operands[i]].kind;
        if (kind == RM_OPERAND || kind == MEMORY || kind == VECTOR_RM || kind == OFFSET)
            return true;
    }
    return false;
}

/* Of an instruction that is emitted. */
bool may_fault(const struct record *r, unsigned traits)
{
    return traits & (STACK_READ | STACK_WRITE | FAULTS) || (names_memory(r) && !(traits & NO_ACCESS));
}

/* The flags, with what the decoded instruction says beyond its row: a shift by a constant. */
void flags_used(const struct record *r, unsigned traits, u16 *reads, u16 *writes)
{
    const struct opcode *o = &opcodes[r->id];
    *reads = o->flags_read;
    *writes = o->flags_written | o->flags_undefined;
    if (traits & KEEPS_UNDEFINED)
        *writes &= (u16)~o->flags_undefined;
    if (!(traits & SHIFT))
        return;
    for (unsigned i = 1; i < OPERANDS_MAX; i++)
        if (operand_types[o->operands[i]].kind == IMMEDIATE) {
            if (!(r->imm & (r->size == 3 ? 63 : 31)))
                *reads = *writes = 0;
            else if (traits & READS_CARRY)
                *reads = r->size < 2 ? fO | fC : fC; /* by the whole width, they keep OF */
            else
                *reads = 0;
            if (traits & ROTATES && !amd_flags && r->prefix & PREFIX_REGISTER && (r->imm & (r->size == 3 ? 63 : 31)) != 1)
                *writes &= (u16)~fO; /* kept */
        }
}

bool is_emitted(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    if (!o->emitter || r->run == op_raise || r->run == op_end || r->run == op_breakpoint)
        return false;
    if (names_memory(r)) {
        bool constant = r->base == GPR_IP * 8 || (r->base == GPR_ZERO * 8 && r->index == GPR_ZERO * 8);
        if (!constant && (i64)(i32)(r->disp + 64) != r->disp + 64)
            return false;
        if (!t->wide && ((r->prefix & PREFIX_ADDRESS) != 2 || r->seg == SEG_CS || r->seg >= SEG_FS)) /* they have limits */
            return false;
    }
    t->asking = true;
    t->row = o;
    t->traits = o->emitter->traits;
    if (t->traits & FLOAT && t->c->key & KEY_UNMASKED)
        return false;
    bool can = o->emitter->emit(t, r);
    t->asking = false;
    return can;
}

/* Guest registers that an emitted instruction writes, a bit each. */
static u32 registers_written(const struct record *r, unsigned traits)
{
    const struct opcode *o = &opcodes[r->id];
    u32 written = (traits & WRITES_RAX ? 1u << RAX : 0) | (traits & WRITES_RDX ? 1u << RDX : 0) |
                  (traits & (STACK_READ | STACK_WRITE) ? 1u << RSP : 0) | (traits & WRITES_RBP ? 1u << RBP : 0);
    for (unsigned i = 0; i < 2; i++) {
        if (!(traits & (i ? WRITES_SECOND : WRITES_FIRST)))
            continue;
        switch (operand_types[o->operands[i]].kind) {
        case REGISTER: written |= 1u << (r->reg >> 3); break;
        case VEX_V: written |= o->operands[i] == oBy ? 1u << r->vvvv : 0; break;
        case OPCODE: written |= 1u << (r->rm >> 3); break;
        case RM_OPERAND: written |= r->prefix & PREFIX_REGISTER ? 1u << (r->rm >> 3) : 0; break;
        case FIXED: written |= 1u << RAX; break;
        default: break;
        }
    }
    return written;
}

/* ---- Flags ---------------------------------------------------------------------------------------------------------------- */

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
/* From the image to those bytes. */
static void unfold(struct translation *t, u16 flags)
{
    for (u16 flag = fC; flag; flag = flag == fC ? fO : 0) {
        if (!(flags & flag))
            continue;
        put_modrm(&t->code, 0, M0F, 0xba, 4, FIELD(flags_image)); /* BT */
        put8(&t->code, image_bit(flag));
        put_modrm(&t->code, 0, M0F, 0x90 | CC_B, 0, flag == fC ? FIELD(carry_image) : FIELD(overflow_image));
    }
}
static void load_flags(struct translation *t, u16 needed)
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
/* The host register of a guest's whole register: its own, or `scratch`, loaded. */
static unsigned use(struct translation *t, unsigned offset, unsigned scratch)
{
    unsigned host = pinned(offset);
    if (host != NO_REGISTER)
        return host;
    load64(&t->code, scratch, guest_place(offset));
    return scratch;
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
        load_flags(t, ALL);
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

static bool recipe_uses(const struct recipe *p, u32 registers)
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
    if (!(left || o->operation == &operation_ROR) || t->reads || t->live || r->rm & 7 || !r->size)
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
static bool merges(const struct translation *t)
{
    return (t->writes == fC || t->writes == fO) && t->where == IN_IMAGE && needed(t) & ~t->writes;
}
static void merge(struct translation *t)
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

/* The recipe for the flags of an instruction that is done. */
static struct recipe recipe_of(const struct record *r)
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

/* ---- Vector registers ------------------------------------------------------------------------------------------------------ */

static struct place vector_place(unsigned n)
{
    return in_memory(C, (i32)(offsetof(struct vcpu, xmm) + n * sizeof(union vector)));
}
static void move_vectors(struct translation *t, u16 which, bool store)
{
    for (unsigned n = 0; n < 16; n++)
        if (!(which >> n & 1))
            continue;
        else if (t->ymm)
            put_vex(&t->code, M0F, 0, true, false, store ? 0x11 : 0x10, n, 0, vector_place(n)); /* VMOVUPS */
        else
            put_modrm(&t->code, 0, M0F, store ? 0x11 : 0x10, n, vector_place(n)); /* MOVUPS */
}
void use_vector(struct translation *t, unsigned n, bool reads, bool writes)
{
    if (reads && !(t->vectors >> n & 1))
        move_vectors(t, (u16)(1 << n), false);
    t->vectors |= (u16)(1 << n);
    t->dirty |= (u16)(writes << n);
}
void flush_vectors(struct translation *t)
{
    move_vectors(t, t->dirty, true);
    t->dirty = 0;
}

/* ---- Code out of line ------------------------------------------------------------------------------------------------------- */

struct stub *add_stub(struct translation *t, int kind, const struct record *r)
{
    struct stub *s = &t->stubs[t->stub_count++];
    *s = (struct stub){.kind = kind, .record = r, .count = 1, .block = t->in->block, .where = t->where, .split = t->split, .recipe = t->recipe,
                       .dirty = t->dirty};
    return s;
}
void stub_jump(struct stub *s, u8 *jump) { s->jumps[s->jump_count++] = jump; }

static void call_shared(struct translation *t, const u8 *target)
{
    put8(&t->code, 0xe8);
    put32(&t->code, 0);
    land(t->code.at - 4, target);
}

static void emit_leave(struct translation *t, const struct record *r, const struct block *b)
{
    load_constant(&t->code, T0, (u64)(uintptr_t)r);
    load_constant(&t->code, T1, b->ip);
    land(jump(&t->code), shared_code(t->translator)->leave);
}

void emit_stubs(struct translation *t)
{
    for (unsigned i = 0; i < t->stub_count; i++) { /* they may add more */
        struct stub s = t->stubs[i];
        for (unsigned j = 0; j < s.jump_count; j++)
            land(s.jumps[j], t->code.at);
        t->where = s.where;
        t->split = s.split;
        t->recipe = s.recipe;
        t->in = NULL;
        for (unsigned m = 0; m < t->member_count; m++)
            if (t->members[m].block == s.block)
                t->in = &t->members[m];
        switch (s.kind) {
        case STUB_CALL:
            move_vectors(t, s.dirty, true);
            flags_to_image(t);
            load_constant(&t->code, T0, (u64)(uintptr_t)add_site(t, s.record, s.count));
            call_shared(t, shared_code(t->translator)->call);
            move_vectors(t, s.reload, false);
            if (s.restore)
                load_flags(t, ALL);
            unfold(t, s.split_behind);
            if (s.held.at)
                load64(&t->code, s.held.host, guest_place(s.held.offset));
            land(jump(&t->code), s.back);
            break;
        case STUB_STOP: /* the block of `scratch` does not fit into the budget, whose part is in T1 */
            if (s.record->left)
                lea64(&t->code, T1, in_memory(T1, s.record->left));
            put_modrm(&t->code, I_W, M1, 0x01, T1, in_register(BUDGET));
            land(jump(&t->code), shared_code(t->translator)->stop);
            break;
        case STUB_LEAVE:
            if (s.budget)
                alu_constant(&t->code, I_W, GROUP_ADD, in_register(BUDGET), s.budget);
            if (s.stack)
                move_stack(t, GUEST_RSP, s.stack);
            move_vectors(t, s.dirty, true);
            flags_to_image(t);
            emit_leave(t, s.record, s.block);
            break;
        case STUB_WAY: /* first where the budget ends before the block that follows */
            s.way->stop = t->code.at;
            load_constant(&t->code, T0, (u64)(uintptr_t)s.way);
            put_modrm(&t->code, I_W, M1, 0x03, BUDGET, in_memory(T0, offsetof(struct way, taken)));
            land(s.jumps[0], t->code.at);
            s.way->leave = t->code.at;
            if (s.stack)
                move_stack(t, GUEST_RSP, s.stack);
            load_constant(&t->code, T0, (u64)(uintptr_t)s.way);
            land(jump(&t->code), shared_code(t->translator)->way);
            break;
        case STUB_EDGE:
            emit_jump(t, s.record);
            break;
        }
    }
}

/* ---- Memory -------------------------------------------------------------------------------------------------------------------- */

/* The linear address of the memory operand, plus `more`, to a register. With `other`, no flags are changed where there is no
 * FS or GS (LEA). Addresses of 32 bits wrap with `more`: then it is of another page than without, as if it did not. */
void emit_address(struct translation *t, const struct record *r, unsigned to, unsigned other, i32 more)
{
    struct code *code = &t->code;
    bool narrow = (r->prefix & PREFIX_ADDRESS) == 2;
    unsigned width = narrow ? 0 : I_W;
    if (r->base == GPR_IP * 8 || (r->base == GPR_ZERO * 8 && r->index == GPR_ZERO * 8)) {
        u64 address = (r->base == GPR_IP * 8 ? t->in->block->ip : 0) + (u64)r->disp + (u64)(i64)more;
        load_constant(code, to, narrow ? (u32)address : address);
    } else {
        i32 disp = (i32)((u32)r->disp + (u32)more);
        if (r->index == GPR_ZERO * 8) {
            put_modrm(code, width, M1, 0x8d, to, in_memory(use(t, r->base, to), disp));
        } else {
            struct place p = {.memory = true, .base = NO_REGISTER, .index = (u8)use(t, r->index, to), .scale = r->scale,
                              .disp = disp};
            bool add = false;
            if (r->base != GPR_ZERO * 8) {
                if (pinned(r->base) != NO_REGISTER || p.index != to)
                    p.base = (u8)use(t, r->base, to);
                else if (other != NO_REGISTER)
                    p.base = (u8)use(t, r->base, other);
                else
                    add = true;
            }
            put_modrm(code, width, M1, 0x8d, to, p);
            if (add)
                put_modrm(code, width, M1, 0x03, to, guest_place(r->base));
        }
    }
    if (r->seg >= SEG_FS)
        put_modrm(code, I_W, M1, 0x03, to, FIELD(check[r->seg].base));
}

/* Flags before host code that changes them and is no instruction of the guest. A fault shows them. */
static void flags_before(struct translation *t, u32 registers)
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

static void slow_path(struct translation *t, const struct record *r, u8 *from, bool leaves)
{
    struct stub *s = add_stub(t, leaves ? STUB_LEAVE : STUB_CALL, r);
    s->restore = t->writes & t->precise && !merges(t);
    stub_jump(s, from);
}
static void flags_behind_check(struct translation *t)
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

enum { INDEX_SHIFT = 12 - 4, INDEX_MASK = (TLB_SIZE - 1) << 4 };
_Static_assert(sizeof(struct tlb_entry) == 16, "the shift of addresses to entries");

static i32 tlb_side(bool write) { return (i32)(write ? offsetof(struct tlb, write) : offsetof(struct tlb, read)); }

/* A word of the TLB at the index in T0, or at the entry, `at` bytes from the begin of its table. */
static struct place in_tlb(const struct translation *t, i32 at)
{
    if (!(t->c->key & KEY_FIXED_TLB))
        return in_memory(T0, at);
    unsigned table = t->c->key & KEY_CPL0 ? TLB_SUPERVISOR : TLB_USER;
    return (struct place){.memory = true, .base = C, .index = T0, .disp = (i32)(offsetof(struct vcpu, tlbs) + table * sizeof(struct tlb)) + at};
}

/* The linear address is in T1: there comes how far it is into its page, and the place in the TLB to T0. `bytes` from there on
 * are of one page, and begin at a multiple of `alignment`. */
static void check_page(struct translation *t, const struct record *r, unsigned bytes, unsigned alignment, i32 side, bool leaves)
{
    struct code *code = &t->code;
    load32(code, T0, in_register(T1));
    put_modrm(code, 0, M1, 0xc1, 5, in_register(T0));
    put8(code, INDEX_SHIFT);
    alu_constant(code, 0, GROUP_AND, in_register(T0), INDEX_MASK);
    if (!(t->c->key & KEY_FIXED_TLB))
        put_modrm(code, I_W, M1, 0x03, T0, FIELD(tlb));
    put_modrm(code, I_W, M1, 0x2b, T1, in_tlb(t, side));
    if (alignment > 1) { /* then they end where the page does, at the latest */
        put_modrm(code, I_W, M1, 0xf7, 0, in_register(T1));
        put32(code, ~(u64)(0x1000 - alignment));
        slow_path(t, r, jump_if(code, CC_NE), leaves);
    } else {
        alu_constant(code, I_W, GROUP_CMP, in_register(T1), 0x1000 - (i32)bytes);
        slow_path(t, r, jump_if(code, CC_A), leaves);
    }
}
static void add_page(struct translation *t, i32 side)
{
    put_modrm(&t->code, I_W, M1, 0x03, T1, in_tlb(t, side + (i32)offsetof(struct tlb_entry, host)));
}
/* The same of an element of a table, say: its address is made once more, and the load waits for the page's entry alone. */
static void add_distance(struct translation *t, const struct record *r, bool write)
{
    emit_address(t, r, T1, NO_REGISTER, 0);
    put_modrm(&t->code, I_W, M1, 0x03, T1, in_tlb(t, (i32)(offsetof(struct tlb, distances) + write * sizeof(struct tlb_distance) * TLB_SIZE)));
}
_Static_assert(sizeof(struct tlb_distance) == sizeof(struct tlb_entry), "one index");

/* What the register is at the most at r, by what its block did to it last: an index into a table of bytes, say. */
static u64 most_of(struct translation *t, const struct record *r, unsigned offset)
{
    const struct opcode *row = t->row;
    unsigned traits = t->traits;
    u64 most = ~0ull;
    for (const struct record *q = t->in->block->records; q != r; q = record_after(q)) {
        const struct opcode *o = &opcodes[q->id];
        bool emitted = is_emitted(t, q);
        if (emitted && !(registers_written(q, traits_of(q)) >> (offset >> 3) & 1))
            continue;
        unsigned first = operand_types[o->operands[0]].kind == REGISTER ? q->reg : q->rm;
        most = ~0ull;
        if (!emitted || q->size < 2 || first != offset)
            continue;
        if (o->operation == &operation_MOVZX && o->operands[1] == oEb)
            most = 0xff;
        else if (o->operation == &operation_AND && operand_types[o->operands[1]].kind == IMMEDIATE && q->imm >= 0)
            most = (u64)q->imm;
        else if (o->operation == &operation_SHR && o->operands[1] == oIb)
            most = ~0ull >> (64 - (8 << q->size)) >> (q->imm & (q->size == 3 ? 63 : 31));
    }
    t->row = row;
    t->traits = traits;
    return most;
}

/* Where r accesses one page whatever the registers are: the first address that it may be, and with an index how many more; else false. */
static bool constant_page(struct translation *t, const struct record *r, unsigned bytes, bool aligned, u64 *address)
{
    unsigned size = r->prefix & PREFIX_ADDRESS;
    u64 more = 0;
    if (r->seg >= SEG_FS || size != (t->wide ? 3 : 2) || !(r->base == GPR_ZERO * 8 || (r->base == GPR_IP * 8 && r->index == GPR_ZERO * 8)))
        return false;
    *address = (r->base == GPR_IP * 8 ? t->in->block->ip : 0) + (u64)r->disp;
    if (!t->wide)
        *address = (u32)*address;
    if (r->index != GPR_ZERO * 8) {
        u64 most = aligned || pinned(r->index) == NO_REGISTER ? ~0ull : most_of(t, r, r->index);
        if (most > 0xfff)
            return false;
        more = most << r->scale;
    }
    return (*address & 0xfff) + more + bytes <= 0x1000 && !(aligned && *address & (bytes - 1));
}

void to_memory(struct translation *t, const struct record *r, unsigned bytes, bool write, bool aligned, bool leaves)
{
    struct code *code = &t->code;
    i32 side = tlb_side(write);
    flags_aside(t, r);
    u64 constant;
    if (constant_page(t, r, bytes, aligned, &constant)) {
        i32 entry = side + (i32)(constant >> INDEX_SHIFT & INDEX_MASK), inside = constant & 0xfff;
        struct place p = in_tlb(t, entry);
        p.index = NO_REGISTER;
        if (!(t->c->key & KEY_FIXED_TLB))
            load64(code, T0, FIELD(tlb));
        if ((u64)(i64)(i32)constant == constant) {
            alu_constant(code, I_W, GROUP_CMP, p, (i32)(constant & PAGE_MASK));
        } else {
            load_constant(code, T1, constant & PAGE_MASK);
            put_modrm(code, I_W, M1, 0x3b, T1, p);
        }
        slow_path(t, r, jump_if(code, CC_NE), leaves);
        p.disp += (i32)offsetof(struct tlb_entry, host);
        load64(code, T1, p);
        if (r->index != GPR_ZERO * 8)
            lea64(code, T1, (struct place){.memory = true, .base = T1, .index = (u8)pinned(r->index), .scale = r->scale, .disp = inside});
        else if (inside)
            alu_constant(code, I_W, GROUP_ADD, in_register(T1), inside);
    } else {
        emit_address(t, r, T1, T0, 0);
        check_page(t, r, bytes, aligned ? bytes : 1, side, leaves);
        if (r->index != GPR_ZERO * 8)
            add_distance(t, r, write);
        else
            add_page(t, side);
    }
    flags_behind_check(t);
}

/* An element of the stack at a pinned register + disp. */
void to_stack(struct translation *t, const struct record *r, unsigned guest_register, i32 disp, bool write, bool leaves)
{
    flags_aside(t, r);
    put_modrm(&t->code, t->wide ? I_W : 0, M1, 0x8d, T1, in_memory(pinned(guest_register * 8), disp));
    check_page(t, r, stack_width(t), 1, tlb_side(write), leaves);
    add_page(t, tlb_side(write));
    flags_behind_check(t);
}

void move_stack(struct translation *t, unsigned from, i32 by)
{
    put_modrm(&t->code, t->wide ? I_W : 0, M1, 0x8d, GUEST_RSP, in_memory(from, by));
}

/* ---- Jumps ----------------------------------------------------------------------------------------------------------------------- */

int member_at(const struct translation *t, const struct record *r)
{
    const struct block *b = t->in->block;
    u64 target = b->ip + r->at + r->length + (u64)(i64)r->imm;
    if (!t->wide)
        target = (u32)target;
    if (is_cut(t->translator, r))
        return -1;
    for (unsigned i = 0; i < t->member_count; i++)
        if (t->members[i].block->ip == target)
            return (int)i;
    return -1;
}

/* To another region. Flags are in the image. */
static void emit_way(struct translation *t, const struct record *r, i32 stack)
{
    struct stub *s = add_stub(t, STUB_WAY, r);
    s->stack = stack;
    s->way = add_way(t, r);
    s->way->code = t->code.at;
    stub_jump(s, jump(&t->code));
    t->code.at = s->way->code + WAY_ROOM;
}

/* A jump of the host goes to a block of the region, once that has code. */
static void land_at_member(struct translation *t, u8 *from, int target)
{
    if (t->members[target].code) {
        land(from, t->members[target].code);
    } else {
        t->edges[t->edge_count].jump = from;
        t->edges[t->edge_count++].member = target;
    }
}

/* A direct jump is taken, or the block ends. `stack`: what to add to rSP where the interpreter is to do it again. */
static void emit_jump_after(struct translation *t, const struct record *r, i32 stack)
{
    int target = member_at(t, r);
    if (target < 0) {
        flags_to_image(t);
        emit_way(t, r, stack);
        return;
    }
    const struct member *m = &t->members[target];
    i32 change = (i32)r->left - (i32)m->block->count;
    if (m->precise || (change && t->where == IN_HOST && t->recipe.kind == RECIPE_NONE))
        flags_to_image(t);
    if (change) {
        if (t->where == IN_HOST)
            t->where = IN_RECIPE;
        alu_constant(&t->code, I_W, change < 0 ? GROUP_SUB : GROUP_ADD, in_register(BUDGET), change < 0 ? -change : change);
    }
    if (change < 0) {
        struct stub *s = add_stub(t, STUB_LEAVE, r);
        s->budget = -change;
        s->stack = stack;
        land_at_member(t, jump_if(&t->code, CC_GE), target); /* fuses with SUB, as CC_NS does not */
        stub_jump(s, jump(&t->code));
    } else {
        land_at_member(t, jump(&t->code), target);
    }
}
void emit_jump(struct translation *t, const struct record *r) { emit_jump_after(t, r, 0); }
void emit_call(struct translation *t, const struct record *r) { emit_jump_after(t, r, (i32)stack_width(t)); }

void find_block(struct translation *t, const struct record *r)
{
    struct code *code = &t->code;
    _Static_assert(sizeof(struct jump_entry) == 32, "a shift");
    struct stub *s = add_stub(t, STUB_LEAVE, r);
    load32(code, T0, in_register(T1));
    put_modrm(code, 0, M1, 0xc1, 5, in_register(T0));
    put8(code, 12);
    put_modrm(code, 0, M1, 0x33, T0, in_register(T1));
    alu_constant(code, 0, GROUP_AND, in_register(T0), JUMP_CACHE - 1);
    put_modrm(code, 0, M1, 0xc1, 4, in_register(T0));
    put8(code, 5);
    lea64(code, T0, (struct place){.memory = true, .base = C, .index = T0, .disp = offsetof(struct vcpu, jumps)});
    put_modrm(code, I_W, M1, 0x3b, T1, in_memory(T0, offsetof(struct jump_entry, ip)));
    stub_jump(s, jump_if(code, CC_NE));
    load32(code, T1, in_memory(T0, offsetof(struct jump_entry, at)));
    load32(code, T1, (struct place){.memory = true, .base = C, .index = T1, .scale = 2, .disp = code_ids(t->c->key)});
    put_modrm(code, 0, M1, 0x3b, T1, in_memory(T0, offsetof(struct jump_entry, id)));
    stub_jump(s, jump_if(code, CC_NE));
    load64(code, T1, in_memory(T0, offsetof(struct jump_entry, block)));
    load64(code, T0, in_memory(T1, offsetof(struct block, code)));
    put_modrm(code, I_W, M1, 0x85, T0, in_register(T0));
    stub_jump(s, jump_if(code, CC_E));
}

void emit_enter(struct translation *t, const struct record *r)
{
    struct code *code = &t->code;
    struct stub *s = add_stub(t, STUB_STOP, r);
    store64(code, FIELD(scratch), T1);
    load32(code, T1, in_memory(T1, offsetof(struct block, count)));
    if (r->left)
        lea64(code, T1, in_memory(T1, -(i32)r->left));
    put_modrm(code, I_W, M1, 0x29, T1, in_register(BUDGET));
    stub_jump(s, jump_if(code, CC_L));
    put_modrm(code, 0, M1, 0xff, 4, in_register(T0));
}

/* ---- Records ------------------------------------------------------------------------------------------------------------------------ */

static void leave_at(struct translation *t, const struct record *r)
{
    flags_to_image(t);
    emit_leave(t, r, t->in->block);
}

/* One instruction; false: nothing of the block follows. */
static bool emit_record(struct translation *t, const struct member *m, const struct record *r, unsigned index)
{
    const struct opcode *o = &opcodes[r->id];
    if (r->run == op_raise || !is_emitted(t, r)) {
        flush_vectors(t);
        t->vectors = 0;
        if (r->run == op_raise || r->has_link || o->attributes & A_END) {
            leave_at(t, r);
            return false;
        }
        flags_to_image(t);
        load_constant(&t->code, T0, (u64)(uintptr_t)add_site(t, r, 1));
        call_shared(t, shared_code(t->translator)->call);
        return true;
    }
    flags_used(r, t->traits, &t->reads, &t->writes);
    t->live = m->after[index].live;
    t->precise = m->after[index].precise;
    unsigned stubs = t->stub_count;
    if (t->traits & (FLOW_BRANCH | FLOW_LEAVES))
        flush_vectors(t);
    t->merge = false;
    o->emitter->emit(t, r);
    if (t->merge)
        merge(t);
    for (unsigned i = stubs; i < t->stub_count; i++) {
        t->stubs[i].back = t->code.at;
        t->stubs[i].reload = t->vectors;
        t->stubs[i].split_behind = t->split;
        if (t->held.at == t->code.at)
            t->stubs[i].held = t->held;
    }
    if (t->writes && t->where == IN_HOST)
        t->recipe = t->precise & t->writes ? recipe_of(r) : (struct recipe){0};
    else if (t->where == IN_HOST && recipe_uses(&t->recipe, registers_written(r, t->traits)))
        t->recipe.kind = RECIPE_NONE;
    return !(t->traits & FLOW_LEAVES);
}

/* ---- Runs of accesses off one register ------------------------------------------------------------------------------------------- */

/* PUSH and POP of registers, and moves between them and memory at one register, in a row: one check for all. The slow path is
 * their handlers, one after the other. */
enum { RUN_MOST = 16, RUN_BYTES = 128 };
struct run {
    const struct record *records[RUN_MOST];
    i32 at[RUN_MOST];         /* from the value that the base had at first */
    unsigned count, base;     /* `base`: as an offset into gpr */
    i32 low, high, moved;     /* what is accessed; how far rSP goes */
    bool writes;
    u32 written;              /* registers */
};
enum { RUN_NONE, RUN_LOAD, RUN_STORE, RUN_PUSH, RUN_POP };

static unsigned kind_in_run(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    bool stack = o->operation == &operation_PUSH || o->operation == &operation_POP;
    if (!(stack || o->operation == &operation_MOV) || r->run == op_raise || !is_emitted(t, r))
        return RUN_NONE;
    if (stack)
        return (o->operands[0] == oZv || (o->operands[0] == oEv && r->prefix & PREFIX_REGISTER)) && r->rm != RSP * 8
                   ? o->operation == &operation_PUSH ? RUN_PUSH : RUN_POP : RUN_NONE;
    bool load = o->operands[0] == oGv && o->operands[1] == oEv, store = o->operands[0] == oEv && o->operands[1] == oGv;
    if (!(load || store) || r->prefix & PREFIX_REGISTER || r->size < 2 || r->reg == RSP * 8 || r->index != GPR_ZERO * 8 ||
        r->seg >= SEG_FS || (r->prefix & PREFIX_ADDRESS) != (t->wide ? 3 : 2) || pinned(r->base) == NO_REGISTER ||
        r->disp != (i32)r->disp)
        return RUN_NONE;
    return load ? RUN_LOAD : RUN_STORE;
}

/* Take r along; false: it is not of the run. */
static bool extend_run(struct translation *t, struct run *run, const struct record *r)
{
    unsigned kind = kind_in_run(t, r), base = kind >= RUN_PUSH ? RSP * 8 : r->base;
    i32 width = (i32)stack_width(t);
    if (kind == RUN_NONE || run->count == RUN_MOST || (run->count && base != run->base) || run->written >> (base >> 3) & 1)
        return false;
    i64 at = kind == RUN_PUSH ? run->moved - width : kind == RUN_POP ? run->moved : run->moved + r->disp;
    i64 end = at + (kind >= RUN_PUSH ? width : 1 << r->size);
    i64 low = run->count && run->low < at ? run->low : at, high = run->count && run->high > end ? run->high : end;
    if (high - low > RUN_BYTES || at != (i32)at || end != (i32)end)
        return false;
    run->base = base;
    run->low = (i32)low, run->high = (i32)high;
    run->moved += (kind == RUN_PUSH ? -width : kind == RUN_POP ? width : 0);
    run->writes |= kind == RUN_PUSH || kind == RUN_STORE;
    if (kind == RUN_POP || kind == RUN_LOAD)
        run->written |= 1u << ((kind == RUN_POP ? r->rm : r->reg) >> 3);
    run->records[run->count] = r;
    run->at[run->count++] = (i32)at;
    return true;
}

static void emit_run(struct translation *t, const struct member *m, const struct run *run, unsigned last)
{
    struct code *code = &t->code;
    unsigned stubs = t->stub_count, host = pinned(run->base);
    t->reads = t->writes = 0;
    t->live = m->after[last].live;
    t->precise = m->after[last].precise;
    t->merge = false;
    flags_before(t, run->written | (run->moved ? 1u << RSP : 0));
    put_modrm(code, t->wide ? I_W : 0, M1, 0x8d, T1, in_memory(host, run->low));
    check_page(t, run->records[0], (unsigned)(run->high - run->low), 1, tlb_side(run->writes), false);
    add_page(t, tlb_side(run->writes));
    if (run->moved < 0)
        move_stack(t, GUEST_RSP, run->moved);
    for (unsigned i = 0; i < run->count; i++) {
        const struct record *r = run->records[i];
        unsigned kind = kind_in_run(t, r), offset = kind >= RUN_PUSH ? r->rm : r->reg, reg = pinned(offset);
        unsigned flags = (kind >= RUN_PUSH ? t->wide : r->size == 3) ? I_W : 0;
        bool store = kind == RUN_PUSH || kind == RUN_STORE;
        struct place p = in_memory(T1, run->at[i] - run->low);
        if (store && reg == NO_REGISTER)
            load64(code, T0, guest_place(offset));
        put_modrm(code, flags, M1, store ? 0x89 : 0x8b, reg == NO_REGISTER ? T0 : reg, p);
        if (!store && reg == NO_REGISTER)
            store64(code, guest_place(offset), T0);
    }
    if (run->moved > 0)
        move_stack(t, GUEST_RSP, run->moved);
    for (unsigned i = stubs; i < t->stub_count; i++) {
        t->stubs[i].count = run->count;
        t->stubs[i].back = code->at;
        t->stubs[i].reload = t->vectors;
        t->stubs[i].split_behind = t->split;
    }
    if (t->where == IN_HOST && recipe_uses(&t->recipe, run->written | (run->moved ? 1u << RSP : 0)))
        t->recipe.kind = RECIPE_NONE;
}

/* Those that begin with the instruction `index`; how many. */
static unsigned try_run(struct translation *t, const struct member *m, const struct record *r, unsigned index)
{
    struct run run = {0};
    while (index + run.count < m->block->count && extend_run(t, &run, r))
        r = record_after(r);
    if (run.count < 2)
        return 0;
    emit_run(t, m, &run, index + run.count - 1);
    return run.count;
}

enum { ALIGN = 32 };
void emit_member(struct translation *t, struct member *m)
{
    const struct block *b = m->block;
    while ((uintptr_t)t->code.at & (ALIGN - 1))
        put8(&t->code, 0x90); /* never executed: what is before ends in a jump */
    m->code = t->code.at;
    t->in = m;
    t->where = m->precise ? IN_IMAGE : IN_HOST;
    t->split = 0;
    t->recipe.kind = RECIPE_NONE;
    t->vectors = t->dirty = 0;
    t->held.at = NULL;
    const struct record *r = b->records;
    for (unsigned i = 0, taken; i < b->count; i += taken ? taken : 1, r += taken ? taken : 1u + r->has_link) {
        taken = try_run(t, m, r, i);
        if (!taken && !emit_record(t, m, r, i))
            return;
    }
    flush_vectors(t);
    if (r->run == op_end)
        emit_jump(t, r);
    else
        leave_at(t, r);
}
