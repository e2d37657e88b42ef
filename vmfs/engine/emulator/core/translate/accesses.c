/* Host code of accesses to guest memory: addresses, the TLB check, and accesses that share one. */
#include "emit.h"

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

static struct stub *slow_path(struct translation *t, const struct record *r, bool leaves, struct look look)
{
    struct stub *s = add_stub(t, leaves ? STUB_LEAVE : STUB_CALL, r);
    s->restore = t->writes & t->precise && !merges(t);
    s->look = look;
    return s;
}

enum { INDEX_SHIFT = 12 - 4, INDEX_MASK = (TLB_SIZE - 1) << 4 };
_Static_assert(sizeof(struct tlb_entry) == 16, "the shift of addresses to entries");

static i32 tlb_side(bool write) { return (i32)(write ? offsetof(struct tlb, write) : offsetof(struct tlb, read)); }
static i32 second_side(bool write)
{
    return (i32)(offsetof(struct tlb, second) + (write ? TLB_WRITE : TLB_READ) * TLB_SIZE * sizeof(struct tlb_entry));
}

/* A word of the TLB at the index in T0, or at the entry, `at` bytes from the begin of its table. */
static struct place in_tlb(const struct translation *t, i32 at)
{
    if (!(t->c->key & KEY_FIXED_TLB))
        return in_memory(T0, at);
    unsigned table = t->c->key & KEY_CPL0 ? TLB_SUPERVISOR : TLB_USER;
    return (struct place){.memory = true, .base = C, .index = T0, .disp = (i32)(offsetof(struct vcpu, tlbs) + table * sizeof(struct tlb)) + at};
}

/* How far it is into its page is in T1. `bytes` from there on are of one page, and begin at a multiple of `alignment`; else to s. */
static void compare_page(struct code *code, struct stub *s, unsigned bytes, unsigned alignment)
{
    if (alignment > 1) {
        put_modrm(code, I_W, M1, 0xf7, 0, in_register(T1));
        put32(code, ~(u64)(0x1000 - alignment));
        stub_jump(s, jump_if(code, CC_NE));
    }
    if (alignment == 1 || alignment < bytes) { /* else they end where the page does, at the latest */
        alu_constant(code, I_W, GROUP_CMP, in_register(T1), 0x1000 - (i32)bytes);
        stub_jump(s, jump_if(code, CC_A));
    }
}

/* The linear address is in T1: there comes how far it is into its page, and the place in the TLB to T0. What goes on where the page
 * is elsewhere, which is to be told where the check ends. */
static struct stub *check_page(struct translation *t, const struct record *r, unsigned bytes, unsigned alignment, bool write, bool leaves)
{
    struct code *code = &t->code;
    load32(code, T0, in_register(T1));
    put_modrm(code, 0, M1, 0xc1, 5, in_register(T0));
    put8(code, INDEX_SHIFT);
    alu_constant(code, 0, GROUP_AND, in_register(T0), INDEX_MASK);
    if (!(t->c->key & KEY_FIXED_TLB))
        put_modrm(code, I_W, M1, 0x03, T0, FIELD(tlb));
    put_modrm(code, I_W, M1, 0x2b, T1, in_tlb(t, tlb_side(write)));
    struct stub *s = slow_path(t, r, leaves, (struct look){.write = write, .bytes = (u16)bytes, .alignment = (u16)alignment});
    compare_page(code, s, bytes, alignment);
    return s;
}
static void add_page(struct translation *t, i32 side)
{
    put_modrm(&t->code, I_W, M1, 0x03, T1, in_tlb(t, side + (i32)offsetof(struct tlb_entry, host)));
}
/* The same of an element of a table, say: its address is made once more, and the load waits for the page's entry alone. */
static void add_distance(struct translation *t, const struct record *r, i32 more, bool write)
{
    emit_address(t, r, T1, NO_REGISTER, more);
    put_modrm(&t->code, I_W, M1, 0x03, T1, in_tlb(t, (i32)(offsetof(struct tlb, distances) + write * sizeof(struct tlb_distance) * TLB_SIZE)));
}
_Static_assert(sizeof(struct tlb_distance) == sizeof(struct tlb_entry), "one index");

/* What the register is at the most at r, by what its block did to it last: an index into a table of bytes, say. */
static u64 most_of(const struct translation *t, const struct record *r, unsigned offset)
{
    u64 most = ~0ull;
    unsigned i = 0;
    for (const struct record *q = t->in->block->records; q != r; q = record_after(q), i++) {
        const struct opcode *o = &opcodes[q->id];
        bool emitted = t->in->emitted >> i & 1;
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
    return most;
}

/* Where r accesses one page whatever the registers are: the first address that it may be, and with an index how many more; else false. */
static bool constant_page(const struct translation *t, const struct record *r, u64 *address)
{
    unsigned bytes = t->memory.bytes;
    bool aligned = t->memory.alignment > 1;
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

static bool is_constant_page(const struct translation *t, const struct record *r)
{
    u64 address;
    return constant_page(t, r, &address);
}

/* The host address that the first access of a stretch leaves for the others. */
static struct place stretch_place(const struct stretch *s)
{
    return in_memory(C, (i32)(offsetof(struct vcpu, stretches) + s->slot * sizeof(u64)));
}

/* What the access is of, where it is to share its check. */
static const struct stretch *stretch_of(const struct translation *t, const struct planned *p)
{
    return t->apart || p->stretch == NO_STRETCH ? NULL : &t->in->stretches[p->stretch];
}

static struct access all_of(const struct stretch *s, u8 base, i32 disp)
{
    return (struct access){.write = s->write, .bytes = (u16)(s->high - s->low), .alignment = s->alignment, .base = base, .disp = disp};
}

/* An access after the first of its stretch: no check. */
static void go_on(struct translation *t, const struct record *r, const struct stretch *s, i64 at)
{
    begin_flags(t, r);
    load64(&t->code, T1, stretch_place(s));
    t->at = (i32)(at - s->low);
}

/* The first: T1 is the host address of all that is accessed. */
static void begin_stretch(struct translation *t, const struct stretch *s, i64 at)
{
    store64(&t->code, stretch_place(s), T1);
    t->at = (i32)(at - s->low);
}

/* A constant that a comparison of 64 bits may have. */
static bool is_short(u64 page) { return (u64)(i64)(i32)page == page; }

/* The host address of a known page to T1, from the entry at `at` in the table; else to s. */
static void take_constant_page(struct translation *t, struct stub *s, u64 page, i32 at)
{
    struct place p = in_tlb(t, at);
    p.index = NO_REGISTER;
    if (is_short(page))
        alu_constant(&t->code, I_W, GROUP_CMP, p, (i32)page);
    else
        put_modrm(&t->code, I_W, M1, 0x3b, T1, p);
    stub_jump(s, jump_if(&t->code, CC_NE));
    p.disp += (i32)offsetof(struct tlb_entry, host);
    load64(&t->code, T1, p);
}

void emit_look(struct translation *t, const struct look *look)
{
    struct stub nowhere = {0};
    i32 side = second_side(look->write);
    alu_constant(&t->code, 0, GROUP_SUB, FIELD(looks), 1); /* below 0 it stays there until the handler has run: a copy looks again */
    stub_jump(&nowhere, jump_if(&t->code, CC_S));
    if (look->constant) {
        take_constant_page(t, &nowhere, look->page, side + (i32)(look->page >> INDEX_SHIFT & INDEX_MASK));
    } else {
        put_modrm(&t->code, I_W, M1, 0x03, T1, in_tlb(t, tlb_side(look->write))); /* the linear address again */
        put_modrm(&t->code, I_W, M1, 0x2b, T1, in_tlb(t, side));
        compare_page(&t->code, &nowhere, look->bytes, look->alignment);
        add_page(t, side);
    }
    land(jump(&t->code), look->found);
    for (unsigned i = 0; i < nowhere.jump_count; i++)
        land(nowhere.jumps[i], t->code.at);
}

void to_memory(struct translation *t, const struct record *r, bool leaves)
{
    struct code *code = &t->code;
    const struct planned *planned = &t->in->memory[t->index];
    const struct stretch *s = stretch_of(t, planned);
    t->at = 0;
    if (s && s->first != t->index) {
        go_on(t, r, s, planned->at);
        return;
    }
    struct access a = s ? all_of(s, 0, 0) : t->memory;
    i32 more = s ? (i32)(s->low - planned->at) : 0;
    flags_aside(t, r);
    struct stub *slow;
    u64 constant;
    if (!s && constant_page(t, r, &constant)) {
        i32 inside = constant & 0xfff;
        u64 page = constant & PAGE_MASK;
        if (!(t->c->key & KEY_FIXED_TLB))
            load64(code, T0, FIELD(tlb));
        if (!is_short(page))
            load_constant(code, T1, page);
        slow = slow_path(t, r, leaves, (struct look){.constant = true, .write = a.write, .page = page});
        take_constant_page(t, slow, page, tlb_side(a.write) + (i32)(page >> INDEX_SHIFT & INDEX_MASK));
        slow->look.found = code->at;
        if (r->index != GPR_ZERO * 8)
            lea64(code, T1, (struct place){.memory = true, .base = T1, .index = (u8)pinned(r->index), .scale = r->scale, .disp = inside});
        else
            t->at = inside;
    } else {
        emit_address(t, r, T1, T0, more);
        slow = check_page(t, r, a.bytes, a.alignment, a.write, leaves);
        if (r->index != GPR_ZERO * 8)
            add_distance(t, r, more, a.write);
        else
            add_page(t, tlb_side(a.write));
        slow->look.found = code->at;
        if (s)
            begin_stretch(t, s, planned->at);
    }
    flags_behind_check(t);
}

/* Off a pinned register; the first of its stretch, if it is of one. */
static void check_at(struct translation *t, const struct record *r, struct access a, const struct stretch *s, i64 at, bool leaves)
{
    if (s)
        a = all_of(s, a.base, a.disp + (i32)(s->low - at));
    put_modrm(&t->code, t->wide ? I_W : 0, M1, 0x8d, T1, in_memory(pinned(a.base * 8u), a.disp));
    struct stub *slow = check_page(t, r, a.bytes, a.alignment, a.write, leaves);
    add_page(t, tlb_side(a.write));
    slow->look.found = t->code.at;
    if (s)
        begin_stretch(t, s, at);
}

void to_stack(struct translation *t, const struct record *r, bool leaves)
{
    const struct planned *planned = &t->in->stack[t->index];
    const struct stretch *s = stretch_of(t, planned);
    t->at = 0;
    if (s && s->first != t->index) {
        go_on(t, r, s, planned->at);
        return;
    }
    flags_aside(t, r);
    check_at(t, r, t->stack, s, planned->at, leaves);
    flags_behind_check(t);
}

void will_access(struct translation *t, unsigned bytes, bool write, unsigned alignment)
{
    t->memory = (struct access){.is = true, .bytes = (u16)bytes, .write = write, .alignment = (u8)alignment};
}
void will_access_stack(struct translation *t, unsigned base, i32 disp, bool write)
{
    t->stack = (struct access){.is = true, .bytes = (u16)stack_width(t), .write = write, .alignment = 1, .base = (u8)base, .disp = disp};
}

void move_stack(struct translation *t, unsigned from, i32 by)
{
    put_modrm(&t->code, t->wide ? I_W : 0, M1, 0x8d, GUEST_RSP, in_memory(from, by));
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

/* Of an instruction that is emitted. */
static unsigned kind_in_run(const struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    bool stack = o->operation == &operation_PUSH || o->operation == &operation_POP;
    if (!(stack || o->operation == &operation_MOV))
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
static bool extend_run(const struct translation *t, struct run *run, const struct record *r)
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

static struct access access_of(const struct run *run)
{
    return (struct access){.write = run->writes, .bytes = (u16)(run->high - run->low), .alignment = 1, .base = (u8)(run->base >> 3), .disp = run->low};
}

static void emit_run(struct translation *t, const struct member *m, const struct run *run)
{
    struct code *code = &t->code;
    unsigned stubs = t->stub_count, last = t->index + run->count - 1;
    u32 written = run->written | (run->moved ? 1u << RSP : 0);
    const struct planned *planned = &m->stack[t->index];
    const struct stretch *s = stretch_of(t, planned);
    t->reads = t->writes = 0;
    t->live = m->after[last].live;
    t->precise = m->after[last].precise;
    t->merge = false;
    t->at = 0;
    if (s && s->first != t->index) {
        if (t->where == IN_RECIPE && recipe_uses(&t->recipe, written))
            flags_to_image(t);
        load64(code, T1, stretch_place(s));
        t->at = (i32)(planned->at - s->low);
    } else {
        flags_before(t, written);
        check_at(t, run->records[0], access_of(run), s, planned->at, false);
    }
    if (run->moved < 0)
        move_stack(t, GUEST_RSP, run->moved);
    for (unsigned i = 0; i < run->count; i++) {
        const struct record *r = run->records[i];
        unsigned kind = kind_in_run(t, r), offset = kind >= RUN_PUSH ? r->rm : r->reg, reg = pinned(offset);
        unsigned flags = (kind >= RUN_PUSH ? t->wide : r->size == 3) ? I_W : 0;
        bool store = kind == RUN_PUSH || kind == RUN_STORE;
        struct place p = in_memory(T1, t->at + run->at[i] - run->low);
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
    if (t->where == IN_HOST && recipe_uses(&t->recipe, written))
        t->recipe.kind = RECIPE_NONE;
}

/* Those that begin with r; how many: none, or two and more. */
static unsigned find_run(const struct translation *t, const struct member *m, const struct record *r, unsigned index, struct run *run)
{
    *run = (struct run){0};
    while (index + run->count < m->block->count && m->emitted >> (index + run->count) & 1 && extend_run(t, run, r))
        r = record_after(r);
    return run->count < 2 ? 0 : run->count;
}

unsigned try_run(struct translation *t, const struct member *m, const struct record *r)
{
    struct run run;
    if (!m->runs[t->index] || !find_run(t, m, r, t->index, &run))
        return 0;
    emit_run(t, m, &run);
    return run.count;
}

/* ---- Stretches: accesses off one value with one check ------------------------------------------------------------------------- */

/* What a register is, as far as a block shows: what some register was at some time, plus a constant. */
struct value { u16 of; i64 plus; };
enum { NOTHING = 0, REGISTERS = 16, STRETCH_BYTES = 256 };
static const struct value nothing;
/* Accesses that may be a stretch. */
struct candidate {
    struct stretch stretch;
    u16 base, index;          /* values */
    u8 scale, seg;
    u8 count, branches;       /* accesses; and how many conditional jumps are before the first */
    i64 aligned_at;
};
struct plan {
    struct value values[REGISTERS];
    struct candidate candidates[2 * BLOCK_INSTRUCTIONS];
    unsigned count, open;     /* candidates; those from `open` on may go on */
    u16 last_value;
    u8 branches;
};

static void forget(struct plan *p, unsigned reg) { p->values[reg] = (struct value){++p->last_value, 0}; }

/* The code of a handler is called: nothing of what was checked holds. */
static void forget_all(struct plan *p)
{
    p->open = p->count;
    for (unsigned reg = 0; reg < REGISTERS; reg++)
        forget(p, reg);
}

static struct value value_at(const struct translation *t, const struct plan *p, unsigned offset)
{
    if (offset == GPR_ZERO * 8 || offset == GPR_IP * 8)
        return (struct value){NOTHING, offset == GPR_IP * 8 ? (i64)t->in->block->ip : 0};
    return p->values[offset >> 3];
}

/* One more access goes into c; false: it does not fit. What is only true after a conditional jump is not checked before it. */
static bool extend(const struct plan *p, struct candidate *c, const struct access *a, i64 at)
{
    struct stretch *s = &c->stretch;
    i64 low = at < s->low ? at : s->low, high = at + a->bytes > s->high ? at + a->bytes : s->high;
    bool same_way = c->branches == p->branches;
    if (s->alignment > 1)
        low -= (low - c->aligned_at) & (s->alignment - 1);
    if (a->alignment > 1) {
        u8 less = s->alignment < a->alignment ? s->alignment : a->alignment;
        if ((s->alignment < a->alignment && !same_way) || (at - c->aligned_at) & (less - 1))
            return false;
        if (s->alignment < a->alignment)
            low -= (low - at) & (a->alignment - 1);
    }
    if (high - low > STRETCH_BYTES || (a->write && !s->write && !same_way))
        return false;
    if (a->alignment > s->alignment) {
        s->alignment = a->alignment;
        c->aligned_at = at;
    }
    s->low = low;
    s->high = high;
    s->write |= a->write;
    return true;
}

/* Of the instruction, or row, `index`, which ends before `end`. */
static void plan_access(struct plan *p, struct planned *planned, unsigned index, unsigned end, const struct access *a, struct value base,
                        struct value of_index, unsigned scale, unsigned seg, i64 disp)
{
    i64 at = base.plus + disp + (i64)((u64)of_index.plus << scale);
    planned->at = at;
    struct candidate *c = NULL;
    for (unsigned i = p->count; i-- > p->open;) {
        c = &p->candidates[i];
        if (c->base == base.of && c->index == of_index.of && c->scale == scale && c->seg == seg)
            break;
        c = NULL;
    }
    if (!c || !extend(p, c, a, at)) {
        c = &p->candidates[p->count++];
        *c = (struct candidate){.base = base.of, .index = of_index.of, .scale = (u8)scale, .seg = (u8)seg, .branches = p->branches,
                                .aligned_at = at};
        c->stretch = (struct stretch){.first = (u8)index, .low = at, .high = at + a->bytes, .write = a->write, .alignment = a->alignment};
    }
    c->count++;
    c->stretch.end = (u8)end;
    planned->stretch = (u8)(c - p->candidates);
}

static void plan_memory(const struct translation *t, struct member *m, struct plan *p, const struct record *r, unsigned index)
{
    bool full = (r->prefix & PREFIX_ADDRESS) == (t->wide ? 3 : 2);
    if (!full || r->disp < INT32_MIN + 2 * STRETCH_BYTES || r->disp > INT32_MAX || is_constant_page(t, r))
        return;
    bool indexed = r->index != GPR_ZERO * 8;
    plan_access(p, &m->memory[index], index, index + 1, &t->memory, value_at(t, p, r->base),
                indexed ? value_at(t, p, r->index) : nothing, indexed ? r->scale : 0, r->seg >= SEG_FS ? r->seg : 0, r->disp);
}

/* What registers are after r. */
static void plan_registers(const struct translation *t, struct plan *p, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    unsigned first = operand_types[o->operands[0]].kind, full = t->wide ? 3 : 2, traits = traits_of(r);
    i64 width = (i64)stack_width(t);
    u32 written = registers_written(r, traits);
    struct value *values = p->values, frame = values[RBP];
    bool constant = operand_types[o->operands[1]].kind == IMMEDIATE, stack = traits & (STACK_READ | STACK_WRITE);
    bool in_register = first == REGISTER || first == OPCODE || first == FIXED || (first == RM_OPERAND && r->prefix & PREFIX_REGISTER);
    unsigned to = (first == REGISTER ? r->reg : first == FIXED ? RAX * 8u : r->rm) >> 3;
    struct value value = {0};
    bool known = in_register && r->size == full && to < REGISTERS && !stack;
    if (known && (o->operation == &operation_ADD || o->operation == &operation_SUB) && constant) {
        value = values[to];
        value.plus += o->operation == &operation_ADD ? r->imm : -(i64)r->imm;
    } else if (known && (o->operation == &operation_INC || o->operation == &operation_DEC)) {
        value = values[to];
        value.plus += o->operation == &operation_INC ? 1 : -1;
    } else if (known && o->operation == &operation_LEA && r->index == GPR_ZERO * 8 && r->base < REGISTERS * 8 &&
               (r->prefix & PREFIX_ADDRESS) == full && r->disp == (i32)r->disp) {
        value = values[r->base >> 3];
        value.plus += r->disp;
    } else if (known && o->operation == &operation_MOV && r->prefix & PREFIX_REGISTER &&
               ((o->operands[0] == oGv && o->operands[1] == oEv) || (o->operands[0] == oEv && o->operands[1] == oGv))) {
        value = values[(first == REGISTER ? r->rm : r->reg) >> 3];
    } else {
        known = false;
    }
    struct value top = values[RSP];
    for (unsigned reg = 0; reg < REGISTERS; reg++)
        if (written >> reg & 1)
            forget(p, reg);
    if (known)
        values[to] = value;
    if (o->operation == &operation_PUSH)
        values[RSP] = (struct value){top.of, top.plus - width};
    else if (o->operation == &operation_POP && r->rm != RSP * 8)
        values[RSP] = (struct value){top.of, top.plus + width};
    else if (o->operation == &operation_LEAVE)
        values[RSP] = (struct value){frame.of, frame.plus + width};
}

/* Candidates of two accesses or more become stretches, while there is a slot. */
static void take_stretches(struct member *m, struct plan *p)
{
    u8 free_from[STRETCH_SLOTS] = {0}, number[2 * BLOCK_INSTRUCTIONS];
    m->stretch_count = 0;
    for (unsigned i = 0; i < p->count; i++) {
        struct stretch *s = &p->candidates[i].stretch;
        number[i] = NO_STRETCH;
        if (p->candidates[i].count < 2)
            continue;
        for (s->slot = 0; s->slot < STRETCH_SLOTS && free_from[s->slot] > s->first; s->slot++)
            ;
        if (s->slot == STRETCH_SLOTS)
            continue;
        free_from[s->slot] = s->end;
        number[i] = (u8)m->stretch_count;
        m->stretches[m->stretch_count++] = *s;
        m->covered |= (u32)((1ull << s->end) - (1ull << s->first));
    }
    for (unsigned i = 0; i < m->block->count; i++) {
        if (m->memory[i].stretch != NO_STRETCH)
            m->memory[i].stretch = number[m->memory[i].stretch];
        if (m->stack[i].stretch != NO_STRETCH)
            m->stack[i].stretch = number[m->stack[i].stretch];
    }
}

/* An access that is of a stretch, and not its first, cannot fault. */
static bool is_checked(const struct member *m, const struct planned *p, unsigned index)
{
    return p->stretch != NO_STRETCH && m->stretches[p->stretch].first != index;
}

void plan_accesses(struct translation *t, struct member *m)
{
    struct plan plan, *p = &plan;
    p->count = p->last_value = p->branches = 0;
    forget_all(p);
    m->emitted = m->covered = m->checked = 0;
    t->in = m;
    struct { struct access memory, stack; bool faults; } has[BLOCK_INSTRUCTIONS];
    const struct record *r = m->block->records;
    for (unsigned i = 0; i < m->block->count; i++, r = record_after(r)) {
        m->emitted |= (u32)ask(t, r) << i;
        has[i].memory = t->memory;
        has[i].stack = t->stack;
        has[i].faults = traits_of(r) & FAULTS;
    }
    r = m->block->records;
    for (unsigned i = 0, count; i < m->block->count; i += count) {
        struct run run;
        m->memory[i].stretch = m->stack[i].stretch = NO_STRETCH;
        m->runs[i] = (u8)find_run(t, m, r, i, &run);
        count = m->runs[i] ? m->runs[i] : 1;
        if (m->runs[i]) {
            struct access a = access_of(&run);
            has[i].memory.is = false;
            has[i].stack.is = true;
            plan_access(p, &m->stack[i], i, i + count, &a, p->values[a.base], nothing, 0, 0, a.disp);
            p->values[RSP].plus += run.moved;
            for (unsigned reg = 0; reg < REGISTERS; reg++)
                if (run.written >> reg & 1)
                    forget(p, reg);
            r = record_after(run.records[count - 1]);
            for (unsigned j = i + 1; j < i + count; j++)
                m->memory[j].stretch = m->stack[j].stretch = NO_STRETCH;
            continue;
        }
        if (!(m->emitted >> i & 1)) {
            forget_all(p);
        } else {
            const struct access *stack = &has[i].stack;
            t->memory = has[i].memory;
            if (t->memory.is)
                plan_memory(t, m, p, r, i);
            if (stack->is)
                plan_access(p, &m->stack[i], i, i + 1, stack, p->values[stack->base], nothing, 0, 0, stack->disp);
            plan_registers(t, p, r);
            p->branches += !!(traits_of(r) & FLOW_BRANCH);
        }
        r = record_after(r);
    }
    take_stretches(m, p);
    for (unsigned i = 0; i < m->block->count; i += m->runs[i] ? m->runs[i] : 1)
        if (m->emitted >> i & 1 && !has[i].faults && (has[i].memory.is || has[i].stack.is) &&
            (!has[i].memory.is || is_checked(m, &m->memory[i], i)) && (!has[i].stack.is || is_checked(m, &m->stack[i], i)))
            m->checked |= (u32)((1ull << (i + (m->runs[i] ? m->runs[i] : 1))) - (1ull << i));
}
