/* Segmentation: what follows from the segment registers and the mode, and loading data segments (Intel SDM 3A
 * chapters 3 and 5). Far transfers and task switches are in ops_system*.c. */
#include "memory.h"
#include "opcodes.h"
#include "tracer.h"

static bool code64(const struct vcpu *c) { return c->efer & EFER_LMA && c->seg[SEG_CS].attributes & ATTR_L; }

static void derive_check(struct vcpu *c, unsigned seg)
{
    const struct segment *s = &c->seg[seg];
    if (seg >= 6)
        return;
    struct segment_check *k = &c->check[seg];
    if (code64(c)) { /* 3.2.4: no limits; only FS and GS have a base */
        *k = (struct segment_check){seg >= SEG_FS ? s->base : 0, 0, ~0ull, ACCESS_READ | ACCESS_WRITE};
        return;
    }
    *k = (struct segment_check){s->base, 0, s->limit, ACCESS_READ | ACCESS_WRITE};
    bool real = !(c->cr0 & CR0_PE) || c->rflags & FLAG_VM;
    if (s->attributes & ATTR_UNUSABLE) {
        k->access = 0;
    } else if (s->attributes & ATTR_CODE) {
        k->access = s->attributes & ATTR_READABLE || real ? ACCESS_READ : 0;
        if (real)
            k->access |= ACCESS_WRITE;
    } else {
        if (!(s->attributes & ATTR_WRITABLE) && !real)
            k->access = ACCESS_READ;
        if (s->attributes & ATTR_EXPAND_DOWN) {
            k->low = (u64)s->limit + 1;
            k->high = s->attributes & ATTR_DB ? 0xffffffff : 0xffff;
        }
    }
}

/* In the key, so that host code looks at no limits. An instruction that loads a data segment leaves its
 * block when that changes the key. */
static void note_flat(struct vcpu *c)
{
    enum { WANTED = KEY_CODE32 | KEY_STACK32 | KEY_PROTECTED };
    bool flat = (c->key & (WANTED | KEY_CODE64)) == WANTED && !c->seg[SEG_CS].base;
    static const u8 data[] = {SEG_ES, SEG_SS, SEG_DS};
    for (unsigned i = 0; i < sizeof data; i++) {
        const struct segment_check *k = &c->check[data[i]];
        flat &= !k->base && !k->low && k->high == 0xffffffff && k->access == (ACCESS_READ | ACCESS_WRITE);
    }
    c->key = (c->key & ~(u64)KEY_FLAT) | (flat ? KEY_FLAT : 0);
}

void segment_changed(struct vcpu *c, unsigned seg)
{
    derive_check(c, seg);
    note_flat(c);
    code_map_select(c);
}

void flags_changed(struct vcpu *c)
{
    tlb_select(c);
    code_map_select(c);
}

/* WRMSR, LGDT, LIDT, LLDT, LTR and INVPCID take every address that a mode of the CPU has: what counts is whether CPUID has 5-level
 * paging, not whether CR4.LA57 is set. KVM does so, too. */
bool canonical_base(const struct vcpu *c, u64 linear)
{
    unsigned shift = has_feature(c, FEATURE_LA57) ? 7 : 16;
    return (u64)((i64)(linear << shift) >> shift) == linear;
}

void mode_changed(struct vcpu *c)
{
    bool v86 = c->rflags & FLAG_VM, is64 = code64(c);
    const struct segment *cs = &c->seg[SEG_CS], *ss = &c->seg[SEG_SS];
    u64 key = 0;
    if (is64)
        key |= KEY_CODE64 | KEY_CODE32;
    else if (cs->attributes & ATTR_DB)
        key |= KEY_CODE32;
    if (ss->attributes & ATTR_DB)
        key |= KEY_STACK32;
    if (c->cr0 & CR0_PE && !v86)
        key |= KEY_PROTECTED;
    if (v86)
        key |= KEY_V86;
    if (!c->cpl)
        key |= KEY_CPL0;
    key |= (c->cr0 & CR0_EM ? KEY_EM : 0) | (c->cr0 & CR0_TS ? KEY_TS : 0) | (c->cr0 & CR0_MP ? KEY_MP : 0) |
           (c->cr4 & CR4_OSFXSR ? KEY_OSFXSR : 0) | (c->cr4 & CR4_OSXSAVE ? KEY_OSXSAVE : 0) |
           ((c->xcr0 & 6) == 6 ? KEY_AVX : 0);
    if (!is64)
        key |= (u64)cs->limit << KEY_LIMIT_SHIFT;
    key |= c->key & KEY_UNMASKED;
    if (c->vm->parallel)
        key |= KEY_SHARED;
    if (c->tracer && tracer_mode(c))
        key |= KEY_TRACED;
    c->key = key;
    c->linear_mask = is64 ? ~0ull : 0xffffffff;
    c->stack_mask = is64 ? ~0ull : ss->attributes & ATTR_DB ? 0xffffffff : 0xffff;
    for (unsigned i = 0; i < 6; i++)
        derive_check(c, i);
    note_flat(c);
    tlb_select(c);
    code_map_select(c);
}

/* CPL changes only with CS and SS: the caller ends with mode_changed. */
void set_cpl(struct vcpu *c, unsigned cpl) { c->cpl = (u8)cpl; }

/* Real and virtual-8086 mode: base = selector * 16. In real mode limit and attributes stay (16.1.1, "unreal"). */
void set_segment_real(struct vcpu *c, unsigned seg, u16 selector)
{
    struct segment *s = &c->seg[seg];
    s->selector = selector;
    s->base = (u64)selector << 4;
    if (c->rflags & FLAG_VM && c->cr0 & CR0_PE) {
        s->limit = 0xffff;
        s->attributes = 3 | ATTR_S | ATTR_P | 3 << ATTR_DPL_SHIFT;
    } else {
        s->attributes &= ~(u32)ATTR_UNUSABLE;
    }
    segment_changed(c, seg);
}

COLD void segment_fault(struct vcpu *c, const struct record *r, unsigned seg)
{
    raise_error(c, r, seg == SEG_SS ? VECTOR_SS : VECTOR_GP, 0);
}

/* ---- Descriptors ------------------------------------------------------------------------------------------------------------- */

/* The descriptor of a selector, from the GDT or LDT. False: beyond the limit, or no LDT. Page faults are raised. */
bool read_descriptor(struct vcpu *c, u16 selector, struct descriptor *d, unsigned bytes)
{
    u64 base = c->gdt.base, limit = c->gdt.limit;
    if (selector & 4) {
        if (c->seg[SEG_LDTR].attributes & ATTR_UNUSABLE)
            return false;
        base = c->seg[SEG_LDTR].base;
        limit = c->seg[SEG_LDTR].limit;
    }
    u64 offset = selector & 0xfff8;
    if (offset + bytes - 1 > limit)
        return false;
    *d = (struct descriptor){.address = (base + offset) & (c->efer & EFER_LMA ? ~0ull : 0xffffffff), .selector = selector};
    mmu_read(c, d->address, &d->low, 8, ACCESS_SUPERVISOR);
    if (bytes == 16)
        mmu_read(c, d->address + 8, &d->high, 8, ACCESS_SUPERVISOR);
    return true;
}

u32 descriptor_attributes(const struct descriptor *d) { return (u32)(d->low >> 40 & 0xf0ff); }
u64 descriptor_base(const struct descriptor *d)
{
    return (d->low >> 16 & 0xffffff) | (d->low >> 56 & 0xff) << 24 | (d->high & 0xffffffff) << 32;
}
u32 descriptor_limit(const struct descriptor *d)
{
    u32 limit = (u32)((d->low & 0xffff) | (d->low >> 32 & 0xf0000));
    return descriptor_attributes(d) & ATTR_G ? limit << 12 | 0xfff : limit;
}
void descriptor_segment(const struct descriptor *d, struct segment *s)
{
    *s = (struct segment){descriptor_base(d), descriptor_limit(d), descriptor_attributes(d), d->selector};
}
void set_accessed(struct vcpu *c, struct descriptor *d)
{
    if (d->low >> 40 & ATTR_ACCESSED)
        return;
    d->low |= (u64)ATTR_ACCESSED << 40;
    mmu_change_byte(c, d->address + 5, 0, ATTR_ACCESSED);
}

/* MOV, POP, LDS.. to ES SS DS FS GS (Intel SDM 2B MOV). The register changes last. */
void load_segment(struct vcpu *c, unsigned seg, u16 selector)
{
    if (!(c->cr0 & CR0_PE) || c->rflags & FLAG_VM) {
        set_segment_real(c, seg, selector);
        if (seg == SEG_SS)
            mode_changed(c);
        return;
    }
    unsigned rpl = selector & 3, cpl = c->cpl;
    struct segment s;
    if (!(selector & 0xfffc)) {
        if (seg == SEG_SS && (!code64(c) || cpl == 3 || rpl != cpl))
            raise_gp(c, 0);
        s = c->seg[seg];
        s.selector = selector;
        s.attributes |= ATTR_UNUSABLE;
        s.attributes &= ~(u32)ATTR_P;
        s.base = seg >= SEG_FS ? 0 : s.base;
        if (seg == SEG_SS)
            s.attributes = ATTR_UNUSABLE | cpl << ATTR_DPL_SHIFT;
    } else {
        struct descriptor d;
        u32 error = selector & 0xfffc;
        if (!read_descriptor(c, selector, &d, 8))
            raise_gp(c, error);
        u32 a = descriptor_attributes(&d);
        unsigned dpl = a >> ATTR_DPL_SHIFT & 3;
        if (seg == SEG_SS) {
            if (rpl != cpl || !(a & ATTR_S) || a & ATTR_CODE || !(a & ATTR_WRITABLE) || dpl != cpl)
                raise_gp(c, error);
            if (!(a & ATTR_P))
                raise_error(c, c->now, VECTOR_SS, error);
        } else {
            if (!(a & ATTR_S) || (a & ATTR_CODE && !(a & ATTR_READABLE)))
                raise_gp(c, error);
            if (!(a & ATTR_CODE && a & ATTR_CONFORMING) && (rpl > dpl || cpl > dpl))
                raise_gp(c, error);
            if (!(a & ATTR_P))
                raise_error(c, c->now, VECTOR_NP, error);
        }
        set_accessed(c, &d);
        descriptor_segment(&d, &s);
    }
    c->seg[seg] = s;
    segment_changed(c, seg);
    if (seg == SEG_SS)
        mode_changed(c);
}
