/* Segment registers and descriptor tables (Intel SDM 2, by instruction; 3A chapters 3, 5). */
#include "opcodes.h"
#include "transfer.h"

/* ---- Loading and storing segment registers ------------------------------------------------------------------------------- */

/* The end of an instruction that loaded a segment register. SS: the stack's size may have changed. `key` is what it was before. */
#define LOADED(seg) do { \
        if ((seg) == SEG_SS || c->key != key) { \
            leave(c, r); \
            return; \
        } \
        NEXT(); \
    } while (0)

static u16 selector_operand(struct vcpu *c, const struct record *r)
{
    c->now = r;
    return r->prefix & PREFIX_REGISTER ? R16(c, r->rm) : (u16)mem_load(c, r, 2);
}
/* SLDT, STR, SMSW, MOV: 16 bits in memory, zero-extended in a register. */
static void store_word(struct vcpu *c, const struct record *r, u64 value)
{
    if (r->prefix & PREFIX_REGISTER)
        set_reg(c, r->rm, 8u << r->size, value);
    else
        mem_store(c, r, 2, (u16)value);
}

OP(op_mov_S_E)
{
    unsigned seg = r->reg;
    if (seg == SEG_CS)
        raise_fault(c, r, VECTOR_UD);
    u64 key = c->key;
    load_segment(c, seg, selector_operand(c, r));
    if (seg == SEG_SS)
        c->shadow_ss = true; /* 3A 6.8.3 */
    LOADED(seg);
}
HANDLER(mov_S_E);
OP(op_mov_E_S)
{
    store_word(c, r, c->seg[r->reg].selector);
    NEXT();
}
HANDLER(mov_E_S);

/* With a 32-bit operand the high half of the stack's element stays (2B PUSH: recent processors). */
static void push_segment(struct vcpu *c, const struct record *r, unsigned seg)
{
    unsigned n = 1u << r->size, written = n == 8 ? 8 : 2;
    u64 sp = c->gpr[RSP] - n;
    linear_store(c, stack_linear(c, r, sp, written, ACCESS_WRITE), written, c->seg[seg].selector);
    set_sp(c, sp);
}
static void pop_segment(struct vcpu *c, const struct record *r, unsigned seg)
{
    u64 selector = stack_load(c, r, 0, 1u << r->size), before = c->gpr[RSP], after;
    set_sp(c, before + (1u << r->size)); /* by the size of the old stack */
    after = c->gpr[RSP];
    c->gpr[RSP] = before;
    load_segment(c, seg, (u16)selector);
    c->gpr[RSP] = after;
    if (seg == SEG_SS)
        c->shadow_ss = true;
}
static void load_pointer(struct vcpu *c, const struct record *r, unsigned seg)
{
    unsigned n = 1u << r->size;
    u64 at = mem_linear(c, r, n + 2, ACCESS_READ), offset = linear_load(c, at, n);
    load_segment(c, seg, (u16)linear_load(c, (at + n) & c->linear_mask, 2));
    set_reg(c, r->reg, 8 * n, offset);
}
#define PUSH_SEGMENT(name, seg) \
    OP(op_push_##name) \
    { \
        push_segment(c, r, seg); \
        NEXT(); \
    } \
    HANDLER(push_##name);
#define SEGMENT(name, seg) \
    OP(op_pop_##name) \
    { \
        u64 key = c->key; \
        pop_segment(c, r, seg); \
        LOADED(seg); \
    } \
    HANDLER(pop_##name); \
    OP(op_l##name) \
    { \
        u64 key = c->key; \
        load_pointer(c, r, seg); \
        LOADED(seg); \
    } \
    HANDLER(l##name); \
    PUSH_SEGMENT(name, seg)
SEGMENT(es, SEG_ES)
SEGMENT(ss, SEG_SS)
SEGMENT(ds, SEG_DS)
SEGMENT(fs, SEG_FS)
SEGMENT(gs, SEG_GS)
PUSH_SEGMENT(cs, SEG_CS)

/* ---- FS and GS bases -------------------------------------------------------------------------------------------------------- */

static void need_fsgsbase(struct vcpu *c, const struct record *r)
{
    if (!(c->cr4 & CR4_FSGSBASE))
        raise_fault(c, r, VECTOR_UD);
}
static void write_base(struct vcpu *c, const struct record *r, unsigned seg)
{
    need_fsgsbase(c, r);
    u64 value = get_reg(c, r->rm, 8u << r->size);
    if (!canonical(c, value)) /* by CR4.LA57, unlike WRMSR: a Xeon does so */
        raise_error(c, r, VECTOR_GP, 0);
    c->seg[seg].base = value;
    segment_changed(c, seg);
}
#define BASE(name, number) \
    OP(op_rd##name##base) \
    { \
        need_fsgsbase(c, r); \
        set_reg(c, r->rm, 8u << r->size, c->seg[number].base); \
        NEXT(); \
    } \
    HANDLER(rd##name##base); \
    OP(op_wr##name##base) \
    { \
        write_base(c, r, number); \
        NEXT(); \
    } \
    HANDLER(wr##name##base);
BASE(fs, SEG_FS)
BASE(gs, SEG_GS)

OP(op_swapgs)
{
    u64 base = c->seg[SEG_GS].base;
    c->seg[SEG_GS].base = c->msr.kernel_gs_base;
    c->msr.kernel_gs_base = base;
    segment_changed(c, SEG_GS);
    NEXT();
}
HANDLER(swapgs);

/* ---- Descriptor tables -------------------------------------------------------------------------------------------------------- */

/* CR4.UMIP keeps SGDT, SIDT, SLDT, STR, SMSW to CPL 0 (3A 2.5). */
static void check_umip(struct vcpu *c, const struct record *r)
{
    if (c->cr4 & CR4_UMIP && c->cpl)
        raise_error(c, r, VECTOR_GP, 0);
}

static void store_table(struct vcpu *c, const struct record *r, const struct table_register *t)
{
    check_umip(c, r);
    unsigned n = c->key & KEY_CODE64 ? 8 : 4;
    u64 at = mem_linear(c, r, n + 2, ACCESS_WRITE);
    mmu_check_write(c, (at + 2) & c->linear_mask, n, 0);
    linear_store(c, at, 2, t->limit);
    linear_store(c, (at + 2) & c->linear_mask, n, t->base);
}
static void load_table(struct vcpu *c, const struct record *r, struct table_register *t)
{
    unsigned n = c->key & KEY_CODE64 ? 8 : 4;
    u64 at = mem_linear(c, r, n + 2, ACCESS_READ), limit = linear_load(c, at, 2);
    u64 base = linear_load(c, (at + 2) & c->linear_mask, n);
    if (n == 8 && !canonical_base(c, base))
        raise_error(c, r, VECTOR_GP, 0);
    if (n == 4 && r->size == 1)
        base &= 0xffffff;
    *t = (struct table_register){base, (u16)limit};
}
#define TABLE(name, field) \
    OP(op_s##name) \
    { \
        store_table(c, r, &c->field); \
        NEXT(); \
    } \
    HANDLER(s##name); \
    OP(op_l##name) \
    { \
        load_table(c, r, &c->field); \
        NEXT(); \
    } \
    HANDLER(l##name);
TABLE(gdt, gdt)
TABLE(idt, idt)

OP(op_sldt)
{
    check_umip(c, r);
    store_word(c, r, c->seg[SEG_LDTR].selector);
    NEXT();
}
HANDLER(sldt);
OP(op_str)
{
    check_umip(c, r);
    store_word(c, r, c->seg[SEG_TR].selector);
    NEXT();
}
HANDLER(str);
OP(op_smsw)
{
    check_umip(c, r);
    store_word(c, r, c->cr0);
    NEXT();
}
HANDLER(smsw);

/* A handler with a local variable that has an address cannot end in a jump: it leaves the block. */

/* The descriptor for LLDT and LTR: in the GDT, 16 bytes in long mode, of one of the types (a bit each). */
static void read_system(struct vcpu *c, u16 selector, u32 types, struct descriptor *d)
{
    u32 error = selector & 0xfffc;
    unsigned bytes = c->efer & EFER_LMA ? 16 : 8;
    if (selector & 4 || !read_descriptor(c, selector, d, bytes))
        raise_gp(c, error);
    u32 a = descriptor_attributes(d);
    if (a & ATTR_S || !(types >> (a & ATTR_TYPE) & 1) || d->high >> 40 & 31)
        raise_gp(c, error);
    if (!(a & ATTR_P))
        raise_error(c, c->now, VECTOR_NP, error);
    if (!canonical_base(c, descriptor_base(d)))
        raise_gp(c, error);
}

OP(op_lldt)
{
    u16 selector = selector_operand(c, r);
    if (!(selector & 0xfffc)) {
        set_null(c, SEG_LDTR, selector);
        leave(c, r);
        return;
    }
    struct descriptor d;
    read_system(c, selector, 1 << 2, &d);
    descriptor_segment(&d, &c->seg[SEG_LDTR]);
    leave(c, r);
}
HANDLER(lldt);

OP(op_ltr)
{
    enum { BUSY = 2 };
    u16 selector = selector_operand(c, r);
    if (!(selector & 0xfffc))
        raise_gp(c, 0);
    struct descriptor d;
    read_system(c, selector, c->efer & EFER_LMA ? 1 << 9 : 1 << 9 | 1 << 1, &d);
    if (mmu_change_byte(c, d.address + 5, 0, BUSY) & BUSY) /* another CPU was first */
        raise_gp(c, selector & 0xfffc);
    descriptor_segment(&d, &c->seg[SEG_TR]);
    c->seg[SEG_TR].attributes |= BUSY;
    leave(c, r);
}
HANDLER(ltr);

/* ---- Looking at descriptors -------------------------------------------------------------------------------------------------- */

static void set_zf(struct vcpu *c, bool zf) { c->zf = !zf; }

/* May it be seen from here? `types`: the system types that count, a bit each. */
static bool visible(struct vcpu *c, u16 selector, u32 types, struct descriptor *d)
{
    if (!(selector & 0xfffc) || !read_descriptor(c, selector, d, 8))
        return false;
    u32 a = descriptor_attributes(d);
    if (!(a & ATTR_S) && !(types >> (a & ATTR_TYPE) & 1))
        return false;
    if (a & ATTR_S && a & ATTR_CODE && a & ATTR_CONFORMING)
        return true;
    unsigned dpl = attributes_dpl(a);
    return dpl >= c->cpl && dpl >= (selector & 3u);
}

OP(op_lar)
{
    static const u32 legacy = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 11 | 1 << 12;
    static const u32 long_mode = 1 << 2 | 1 << 9 | 1 << 11 | 1 << 12;
    struct descriptor d;
    bool ok = visible(c, selector_operand(c, r), c->efer & EFER_LMA ? long_mode : legacy, &d);
    if (ok)
        set_reg(c, r->reg, 8u << r->size, d.low >> 32 & (r->size == 1 ? 0xff00 : 0xf0ff00));
    set_zf(c, ok);
    leave(c, r);
}
HANDLER(lar);

OP(op_lsl)
{
    static const u32 legacy = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 9 | 1 << 11;
    static const u32 long_mode = 1 << 2 | 1 << 9 | 1 << 11;
    struct descriptor d;
    bool ok = visible(c, selector_operand(c, r), c->efer & EFER_LMA ? long_mode : legacy, &d);
    if (ok)
        set_reg(c, r->reg, 8u << r->size, descriptor_limit(&d));
    set_zf(c, ok);
    leave(c, r);
}
HANDLER(lsl);

OP(op_verr)
{
    struct descriptor d;
    bool ok = visible(c, selector_operand(c, r), 0, &d);
    u32 a = ok ? descriptor_attributes(&d) : 0;
    set_zf(c, ok && (!(a & ATTR_CODE) || a & ATTR_READABLE));
    leave(c, r);
}
HANDLER(verr);

OP(op_verw)
{
    struct descriptor d;
    bool ok = visible(c, selector_operand(c, r), 0, &d);
    u32 a = ok ? descriptor_attributes(&d) : 0;
    set_zf(c, ok && !(a & ATTR_CODE) && a & ATTR_WRITABLE);
    leave(c, r);
}
HANDLER(verw);

/* What does not change is not written, and need not be writable. */
OP(op_arpl)
{
    unsigned wanted = R16(c, r->reg) & 3;
    u16 selector = selector_operand(c, r);
    bool raised = (selector & 3u) < wanted;
    if (raised) {
        selector = (u16)((selector & ~3u) | wanted);
        if (r->prefix & PREFIX_REGISTER)
            set_reg(c, r->rm, 16, selector);
        else
            mem_store(c, r, 2, selector);
    }
    set_zf(c, raised);
    NEXT();
}
HANDLER(arpl);
