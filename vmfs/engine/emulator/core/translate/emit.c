/* Host code of blocks: jumps, calls of handlers, code out of line. Flags are in emit_flags.c, memory is in accesses.c. What single instructions are is in emitters.c. */
#include "emit.h"

#include "flags.h"

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

/* Whether it becomes host code, and what it accesses then: t->memory, t->stack. */
bool ask(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    t->memory.is = t->stack.is = false;
    if (!o->emitter || r->run == op_raise || r->run == op_end || r->run == op_breakpoint)
        return false;
    if (names_memory(r)) {
        bool constant = r->base == GPR_IP * 8 || (r->base == GPR_ZERO * 8 && r->index == GPR_ZERO * 8);
        if (!constant && (i64)(i32)(r->disp + 64) != r->disp + 64)
            return false;
        if (!t->wide && ((r->prefix & PREFIX_ADDRESS) != 2 || r->seg == SEG_CS || r->seg >= SEG_FS)) /* they have limits */
            return false;
    }
    if (o->emitter->traits & FLOAT && t->c->key & KEY_UNMASKED)
        return false;
    t->asking = true;
    bool can = o->emitter->emit(t, r);
    t->asking = false;
    return can;
}

/* Guest registers that an emitted instruction writes, a bit each. */
u32 registers_written(const struct record *r, unsigned traits)
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
    *s = (struct stub){.kind = kind, .record = r, .count = 1, .in = t->in, .where = t->where, .split = t->split, .recipe = t->recipe,
                       .dirty = t->dirty};
    if (kind == STUB_CALL && !t->apart && t->in->covered >> t->index & 1) {
        s->kind = STUB_APART;
        s->index = (u8)t->index;
        t->copies[t->copy_count - 1].entries |= 1u << t->index;
    }
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

static void emit_stubs_from(struct translation *t, unsigned first)
{
    for (unsigned i = first; i < t->stub_count; i++) { /* they may add more */
        struct stub s = t->stubs[i];
        for (unsigned j = 0; j < s.jump_count; j++)
            land(s.jumps[j], t->code.at);
        t->where = s.where;
        t->split = s.split;
        t->recipe = s.recipe;
        t->in = s.in;
        if (s.look.found)
            emit_look(t, &s.look);
        switch (s.kind) {
        case STUB_CALL:
            move_vectors(t, s.dirty, true);
            flags_to_image(t);
            load_constant(&t->code, T0, (u64)(uintptr_t)add_site(t, s.record, s.count));
            call_shared(t, shared_code(t->translator)->call);
            move_vectors(t, s.reload, false);
            if (s.restore)
                load_flags(t, FLAGS_ARITHMETIC);
            unfold(t, s.split_behind);
            if (s.held.at)
                load64(&t->code, s.held.host, guest_place(s.held.offset));
            land(jump(&t->code), s.back);
            break;
        case STUB_APART:
            move_vectors(t, s.dirty, true);
            flags_to_image(t);
            t->stubs[i].back = jump(&t->code);
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
            emit_leave(t, s.record, s.in->block);
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

static const struct record *emit_next(struct translation *t, const struct member *m, const struct record *r);

static void begin_code(struct translation *t, enum where flags)
{
    t->where = flags;
    t->split = 0;
    t->recipe.kind = RECIPE_NONE;
    t->vectors = t->dirty = 0;
    t->held.at = NULL;
}

/* Here the code of its stretches ends. */
static void end_copy(const struct translation *t, struct copy *copy)
{
    copy->end = (u8)t->index;
    copy->end_stub = t->stub_count;
    copy->back = t->code.at;
    copy->where = t->where;
    copy->split = t->split;
    copy->vectors = t->vectors;
    if (t->held.at == t->code.at)
        copy->held = t->held;
}

static void emit_copy(struct translation *t, const struct copy *copy)
{
    struct member *m = copy->member;
    const struct record *r = m->block->records;
    const u8 *entries[BLOCK_INSTRUCTIONS];
    bool begun = false;
    for (unsigned i = 0; i < copy->first; i++)
        r = record_after(r);
    t->in = m;
    for (t->index = copy->first; t->index < copy->end && r;) {
        unsigned at = t->index;
        if (copy->entries >> at & 1) {
            if (begun) {
                flush_vectors(t);
                flags_to_image(t);
            }
            begin_code(t, IN_IMAGE);
            entries[at] = t->code.at;
            begun = true;
        }
        if (begun) {
            r = emit_next(t, m, r);
        } else {
            r = record_after(r);
            t->index++;
        }
    }
    for (unsigned i = copy->first_stub; i < copy->end_stub; i++)
        if (t->stubs[i].kind == STUB_APART)
            land(t->stubs[i].back, entries[t->stubs[i].index]);
    if (!r) /* nothing follows, in the stretches' code either */
        return;
    flush_vectors(t);
    flags_to_image(t);
    move_vectors(t, copy->vectors, false);
    if (copy->where == IN_HOST)
        load_flags(t, FLAGS_ARITHMETIC);
    unfold(t, copy->split);
    if (copy->held.at)
        load64(&t->code, copy->held.host, guest_place(copy->held.offset));
    land(jump(&t->code), copy->back);
}

void emit_stubs(struct translation *t)
{
    const struct member *found = NULL;
    emit_stubs_from(t, 0);
    unsigned first = t->stub_count;
    t->apart = true;
    for (unsigned i = 0; i < t->copy_count; i++) {
        const struct copy *copy = &t->copies[i];
        if (!copy->entries)
            continue;
        struct member *m = copy->member;
        if (m != found) {
            u16 live = m->live, precise = m->precise;
            find_flags(t, m);
            m->live = live;
            m->precise = precise;
            found = m;
        }
        emit_copy(t, copy);
    }
    emit_stubs_from(t, first);
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
    if (!(m->emitted >> index & 1)) {
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
    t->row = o;
    t->traits = o->emitter->traits;
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

/* The next instructions; NULL: nothing follows in the block. */
static const struct record *emit_next(struct translation *t, const struct member *m, const struct record *r)
{
    unsigned count = try_run(t, m, r);
    if (!count && !emit_record(t, m, r, t->index))
        r = NULL;
    count += !count;
    t->index += count;
    while (r && count--)
        r = record_after(r);
    return r;
}

enum { ALIGN = 32 };
void emit_member(struct translation *t, struct member *m)
{
    const struct block *b = m->block;
    while ((uintptr_t)t->code.at & (ALIGN - 1))
        put8(&t->code, 0x90); /* never executed: what is before ends in a jump */
    m->code = t->code.at;
    t->in = m;
    begin_code(t, m->precise ? IN_IMAGE : IN_HOST);
    struct copy *copy = NULL;
    const struct record *r = b->records;
    for (t->index = 0; r && t->index < b->count;) {
        bool covered = m->covered >> t->index & 1;
        if (covered && !copy) {
            copy = &t->copies[t->copy_count++];
            *copy = (struct copy){.member = m, .first = (u8)t->index, .first_stub = t->stub_count};
        } else if (!covered && copy) {
            end_copy(t, copy);
            copy = NULL;
        }
        r = emit_next(t, m, r);
    }
    if (copy)
        end_copy(t, copy);
    if (!r)
        return;
    flush_vectors(t);
    if (r->run == op_end)
        emit_jump(t, r);
    else
        leave_at(t, r);
}
