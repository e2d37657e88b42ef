/* Hardware task switches (Intel SDM 3A chapter 7). */
#include "transfer.h"

enum { TSS_BUSY = 2, TSS_WIDE = 8, TSS16_LIMIT = 43, TSS32_LIMIT = 103 };

/* A task state segment, 16-bit or 32-bit, as bytes; offsets of 7.2.1 and 7.6. */
struct tss { u8 bytes[104]; bool wide; };
static unsigned tss_offset(bool wide, unsigned index) /* of the registers: index 0 is IP, 1 FLAGS, 2.. the eight, 10.. ES on */
{
    return wide ? 32 + 4 * index : 14 + 2 * index;
}
static u32 tss_get(const struct tss *t, unsigned at) { return (u32)peek(t->bytes + at, t->wide ? 4 : 2); }
static void tss_put(struct tss *t, unsigned at, u64 value) { poke(t->bytes + at, t->wide ? 4 : 2, value); }

static void tss_transfer(struct vcpu *c, u64 base, void *data, unsigned from, unsigned bytes, bool write)
{
    for (unsigned done = 0, n; done < bytes; done += n) {
        n = bytes - done < 32 ? bytes - done : 32;
        if (write)
            mmu_write(c, (u32)(base + from + done), (u8 *)data + done, n, ACCESS_SUPERVISOR);
        else
            mmu_read(c, (u32)(base + from + done), (u8 *)data + done, n, ACCESS_SUPERVISOR);
    }
}

static void set_busy(struct vcpu *c, u64 descriptor_address, bool busy)
{
    mmu_change_byte(c, (u32)(descriptor_address + 5), busy ? 0 : TSS_BUSY, busy ? TSS_BUSY : 0);
}

/* A segment register of the new task; errors are #TS, #NP, #SS (table 7-1). */
static void load_task_segment(struct vcpu *c, unsigned seg, u16 selector, u32 ext)
{
    struct descriptor d;
    u32 error = (selector & 0xfffc) | ext;
    set_null(c, seg, selector);
    if (!(selector & 0xfffc)) {
        if (seg == SEG_CS || seg == SEG_SS)
            raise_error(c, NULL, VECTOR_TS, error);
        return;
    }
    if (!read_descriptor(c, selector, &d, 8))
        raise_error(c, NULL, VECTOR_TS, error);
    u32 a = descriptor_attributes(&d);
    unsigned rpl = selector & 3, dpl = attributes_dpl(a);
    bool conforming = a & ATTR_CODE && a & ATTR_CONFORMING, valid;
    if (seg == SEG_CS)
        valid = a & ATTR_CODE && (conforming ? dpl <= rpl : dpl == rpl);
    else if (seg == SEG_SS)
        valid = !(a & ATTR_CODE) && a & ATTR_WRITABLE && dpl == c->cpl && rpl == c->cpl;
    else
        valid = (!(a & ATTR_CODE) || a & ATTR_READABLE) && (conforming || (dpl >= c->cpl && dpl >= rpl));
    if (!(a & ATTR_S) || !valid)
        raise_error(c, NULL, VECTOR_TS, error);
    if (!(a & ATTR_P))
        raise_error(c, NULL, seg == SEG_SS ? VECTOR_SS : VECTOR_NP, error);
    set_accessed(c, &d);
    descriptor_segment(&d, &c->seg[seg]);
}

static void load_task_ldt(struct vcpu *c, u16 selector, u32 ext)
{
    struct descriptor d;
    set_null(c, SEG_LDTR, selector);
    if (!(selector & 0xfffc))
        return;
    u32 error = (selector & 0xfffc) | ext;
    if (selector & 4 || !read_descriptor(c, selector, &d, 8))
        raise_error(c, NULL, VECTOR_TS, error);
    u32 a = descriptor_attributes(&d);
    if (a & ATTR_S || (a & ATTR_TYPE) != 2 || !(a & ATTR_P))
        raise_error(c, NULL, VECTOR_TS, error);
    descriptor_segment(&d, &c->seg[SEG_LDTR]);
}

/* The order in a TSS. */
static const u8 tss_segments[] = {SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS};

void task_switch(struct vcpu *c, u16 selector, enum task_source source, u32 ext, u64 return_ip, bool has_error, u32 error_code)
{
    struct descriptor d;
    unsigned bad = source == TASK_RETURN ? VECTOR_TS : VECTOR_GP;
    u32 error = (selector & 0xfffc) | ext;
    if (!(selector & 0xfffc) || selector & 4 || !read_descriptor(c, selector, &d, 8))
        raise_error(c, c->now, bad, error);
    u32 a = descriptor_attributes(&d);
    bool busy = a & TSS_BUSY, nested = source == TASK_CALL || source == TASK_EVENT;
    if (a & ATTR_S || (a & (ATTR_TYPE & ~(TSS_WIDE | TSS_BUSY))) != 1 || busy != (source == TASK_RETURN))
        raise_error(c, c->now, bad, error);
    if (!(a & ATTR_P))
        raise_error(c, c->now, VECTOR_NP, error);
    struct segment tr;
    descriptor_segment(&d, &tr);
    struct tss new = {.wide = a & TSS_WIDE}, old = {.wide = c->seg[SEG_TR].attributes & TSS_WIDE};
    if (tr.limit < (new.wide ? TSS32_LIMIT : TSS16_LIMIT))
        raise_error(c, c->now, VECTOR_TS, error);

    /* Every page that the switch touches, before it changes anything. */
    u64 old_base = c->seg[SEG_TR].base, gdt_old = c->gdt.base + (c->seg[SEG_TR].selector & 0xfff8);
    unsigned save_from = tss_offset(old.wide, 0), save_bytes = old.wide ? 16 * 4 : 14 * 2;
    tss_transfer(c, tr.base, new.bytes, 0, new.wide ? 104 : 44, false);
    for (unsigned at = 0; at < save_bytes; at += 4)
        mmu_check_write(c, (u32)(old_base + save_from + at), 4, ACCESS_SUPERVISOR);
    if (source != TASK_RETURN) /* which task is busy is written only where it changes (7.2.2) */
        mmu_check_write(c, (u32)(d.address + 5), 1, ACCESS_SUPERVISOR);
    if (!nested)
        mmu_check_write(c, (u32)(gdt_old + 5), 1, ACCESS_SUPERVISOR);
    if (nested)
        mmu_check_write(c, (u32)tr.base, 2, ACCESS_SUPERVISOR);

    /* The old task. */
    u64 flags = get_rflags(c);
    if (source == TASK_JUMP || source == TASK_RETURN)
        set_busy(c, gdt_old, false);
    if (source == TASK_RETURN)
        flags &= ~(u64)FLAG_NT;
    if (source == TASK_EVENT && c->delivering_kind == EVENT_EXCEPTION && c->delivering != VECTOR_DB &&
        c->delivering != VECTOR_BP && c->delivering != VECTOR_OF)
        flags |= FLAG_RF; /* 17.3.1.1: a fault */
    tss_transfer(c, old_base, old.bytes + save_from, save_from, save_bytes, false); /* high halves of selectors stay */
    tss_put(&old, tss_offset(old.wide, 0), return_ip);
    tss_put(&old, tss_offset(old.wide, 1), flags);
    for (unsigned i = 0; i < 8; i++)
        tss_put(&old, tss_offset(old.wide, 2 + i), c->gpr[i]);
    for (unsigned i = 0; i < (old.wide ? 6u : 4u); i++)
        poke(old.bytes + tss_offset(old.wide, 10 + i), 2, c->seg[tss_segments[i]].selector);
    tss_transfer(c, old_base, old.bytes + save_from, save_from, save_bytes, true);
    if (nested) {
        u16 link = c->seg[SEG_TR].selector;
        mmu_write(c, (u32)tr.base, &link, 2, ACCESS_SUPERVISOR);
    }
    if (source != TASK_RETURN)
        set_busy(c, d.address, true);

    /* The new one. What faults from here on does so in it, before its first instruction (7.3). */
    tr.attributes |= TSS_BUSY;
    c->seg[SEG_TR] = tr;
    c->cr0 |= CR0_TS;
    if (c->now) {
        c->budget += c->now->left;
        c->now = NULL;
    }
    c->trap_taken = true;
    u64 new_flags = tss_get(&new, tss_offset(new.wide, 1)) & 0x3f7fd7;
    if (!new.wide)
        new_flags &= 0xffff;
    set_rflags(c, new_flags | (nested ? FLAG_NT : 0));
    c->gpr[GPR_IP] = tss_get(&new, tss_offset(new.wide, 0));
    for (unsigned i = 0; i < 8; i++) /* a 16-bit TSS: the upper halves become ones, since the 386 */
        c->gpr[i] = tss_get(&new, tss_offset(new.wide, 2 + i)) | (new.wide ? 0 : 0xffff0000);
    c->dr7 &= ~(u64)0x155; /* 17.2.4: the local enables */
    u16 selectors[6] = {0}, ldt = (u16)tss_get(&new, new.wide ? 96 : 42);
    for (unsigned i = 0; i < (new.wide ? 6u : 4u); i++)
        selectors[i] = (u16)tss_get(&new, tss_offset(new.wide, 10 + i));
    bool v86 = new_flags & FLAG_VM, trap = new.wide && new.bytes[100] & 1;
    for (unsigned i = 0; i < 6; i++)
        set_null(c, tss_segments[i], selectors[i]);
    set_cpl(c, v86 ? 3 : selectors[1] & 3);
    if (new.wide && c->cr0 & CR0_PG) {
        u64 cr3 = tss_get(&new, 28);
        if (c->cr4 & CR4_PAE && !load_pdptrs(c, cr3))
            raise_error(c, NULL, VECTOR_TS, error);
        if (c->cr3 != cr3)
            stops_reach_cr3(c);
        c->cr3 = cr3;
    }
    mode_changed(c);
    tlb_flush_local(c);
    load_task_ldt(c, ldt, ext);
    if (v86) {
        for (unsigned i = 0; i < 6; i++)
            set_segment_real(c, tss_segments[i], selectors[i]);
    } else {
        load_task_segment(c, SEG_CS, selectors[1], ext);
        mode_changed(c);
        load_task_segment(c, SEG_SS, selectors[2], ext);
        mode_changed(c);
        for (unsigned i = 0; i < 6; i++)
            if (i != 1 && i != 2)
                load_task_segment(c, tss_segments[i], selectors[i], ext);
    }
    mode_changed(c);
    if (c->gpr[GPR_IP] > c->seg[SEG_CS].limit)
        raise_error(c, NULL, VECTOR_GP, ext);
    if (has_error) {
        struct stack s = current_stack(c, ext);
        push_on(c, &s, new.wide ? 4 : 2, error_code);
        commit_sp(c, &s);
    }
    if (trap)
        c->debug_pending |= DR6_BT;
}
