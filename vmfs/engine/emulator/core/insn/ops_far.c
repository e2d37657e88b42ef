/* Far jumps, calls and returns; IRET; INT n; SYSCALL, SYSENTER and their returns (Intel SDM 2, by instruction; 3A 5.8). */
#include "opcodes.h"
#include "transfer.h"

static bool segmented(const struct vcpu *c) { return !(c->key & KEY_PROTECTED); } /* real or virtual-8086 mode */

/* The far pointer of the memory operand. */
static u64 load_far(struct vcpu *c, const struct record *r, u16 *selector)
{
    unsigned n = 1u << r->size;
    u64 at = mem_linear(c, r, n + 2, ACCESS_READ), ip = linear_load(c, at, n);
    *selector = (u16)linear_load(c, (at + n) & c->linear_mask, 2);
    return ip;
}

/* ---- Into a code segment -------------------------------------------------------------------------------------------------- */

/* Nothing can fault after this, except what it does first. */
static void enter_code(struct vcpu *c, const struct record *r, struct descriptor *code, unsigned cpl, u64 ip)
{
    descriptor_segment(code, &c->seg[SEG_CS]);
    c->seg[SEG_CS].selector = (u16)((code->selector & 0xfffc) | cpl);
    set_cpl(c, cpl);
    mode_changed(c);
    leave_to(c, r, ip);
}

static void enter_real(struct vcpu *c, const struct record *r, u16 selector, u64 ip)
{
    set_segment_real(c, SEG_CS, selector);
    mode_changed(c);
    leave_to(c, r, ip);
}

static void read_target(struct vcpu *c, u16 selector, struct descriptor *d)
{
    if (!(selector & 0xfffc))
        raise_gp(c, 0);
    if (!read_descriptor(c, selector, d, 8))
        raise_gp(c, selector & 0xfffc);
}

/* JMP and CALL straight to a code segment: same privilege, or conforming. */
static void check_direct(struct vcpu *c, const struct descriptor *d, u64 ip)
{
    u32 a = descriptor_attributes(d), error = d->selector & 0xfffc;
    unsigned dpl = attributes_dpl(a), rpl = d->selector & 3;
    if (c->efer & EFER_LMA && a & ATTR_L && a & ATTR_DB)
        raise_gp(c, error);
    if (a & ATTR_CONFORMING ? dpl > c->cpl : rpl > c->cpl || dpl != c->cpl)
        raise_gp(c, error);
    if (!(a & ATTR_P))
        raise_error(c, c->now, VECTOR_NP, error);
    if (!target_fits(c, d, ip))
        raise_gp(c, 0);
}

/* What a call gate or a TSS descriptor leads to. */
static void through_system_descriptor(struct vcpu *c, const struct record *r, struct descriptor *d, bool call)
{
    u32 a = descriptor_attributes(d), error = d->selector & 0xfffc;
    unsigned type = a & ATTR_TYPE, dpl = attributes_dpl(a);
    bool long_mode = c->efer & EFER_LMA;
    enum { GATE16 = 4, TASK_GATE = 5, GATE = 12, TSS16 = 1, TSS32 = 9 };
    if (long_mode ? type != GATE : type != GATE16 && type != TASK_GATE && type != GATE && type != TSS16 && type != TSS32)
        raise_gp(c, error);
    if (dpl < c->cpl || dpl < (d->selector & 3u))
        raise_gp(c, error);
    if (type == TASK_GATE || type == TSS16 || type == TSS32) {
        u16 tss = d->selector;
        if (type == TASK_GATE) {
            if (!(a & ATTR_P))
                raise_error(c, c->now, VECTOR_NP, error);
            tss = (u16)(d->low >> 16);
        }
        task_switch(c, tss, call ? TASK_CALL : TASK_JUMP, 0, next_ip(c, r), false, 0);
        return;
    }
    if (long_mode && (!read_descriptor(c, d->selector, d, 16) || d->high >> 40 & 31))
        raise_gp(c, error);
    if (!(a & ATTR_P))
        raise_error(c, c->now, VECTOR_NP, error);

    unsigned n = long_mode ? 8 : type == GATE ? 4 : 2;
    u64 ip = (d->low & 0xffff) | (n > 2 ? d->low >> 32 & 0xffff0000 : 0) | (n > 4 ? d->high << 32 : 0);
    unsigned parameters = long_mode ? 0 : d->low >> 32 & 31;
    u16 selector = (u16)(d->low >> 16);
    struct descriptor code;
    read_target(c, selector, &code);
    a = descriptor_attributes(&code);
    error = selector & 0xfffc;
    dpl = attributes_dpl(a);
    if (!(a & ATTR_S) || !(a & ATTR_CODE))
        raise_gp(c, error);
    if (call || a & ATTR_CONFORMING ? dpl > c->cpl : dpl != c->cpl)
        raise_gp(c, error);
    if (long_mode && (!(a & ATTR_L) || a & ATTR_DB))
        raise_gp(c, error);
    if (!(a & ATTR_P))
        raise_error(c, c->now, VECTOR_NP, error);
    if (!target_fits(c, &code, ip))
        raise_gp(c, 0);
    if (!call) {
        set_accessed(c, &code);
        enter_code(c, r, &code, c->cpl, ip);
        return;
    }

    bool inner = !(a & ATTR_CONFORMING) && dpl < c->cpl;
    struct stack s;
    struct segment ss = c->seg[SEG_SS];
    if (long_mode) {
        s = (struct stack){{0, 0, ~0ull, 3}, c->gpr[RSP], ~0ull, ~0ull, 0, inner ? ACCESS_SUPERVISOR : 0};
        if (inner) {
            s.sp = tss_stack64(c, 4 + 8 * dpl, 0);
            ss = (struct segment){0, 0, ATTR_UNUSABLE | dpl << ATTR_DPL_SHIFT, (u16)dpl};
        }
    } else if (inner) {
        inner_stack(c, dpl, 0, &s, &ss);
    } else {
        s = current_stack(c, 0);
    }
    if (inner) {
        push_on(c, &s, n, c->seg[SEG_SS].selector);
        push_on(c, &s, n, c->gpr[RSP]);
        for (unsigned i = parameters; i-- > 0;)
            push_on(c, &s, n, stack_load(c, r, i * n, n));
    }
    push_on(c, &s, n, c->seg[SEG_CS].selector);
    push_on(c, &s, n, next_ip(c, r));
    set_accessed(c, &code);
    commit_sp(c, &s);
    c->seg[SEG_SS] = ss;
    enter_code(c, r, &code, inner ? dpl : c->cpl, ip);
}

static void far_jump(struct vcpu *c, const struct record *r, u16 selector, u64 ip)
{
    c->now = r;
    if (segmented(c)) {
        if (ip > c->seg[SEG_CS].limit)
            raise_gp(c, 0);
        enter_real(c, r, selector, ip);
        return;
    }
    struct descriptor d;
    read_target(c, selector, &d);
    if (!(descriptor_attributes(&d) & ATTR_S)) {
        through_system_descriptor(c, r, &d, false);
        return;
    }
    if (!(descriptor_attributes(&d) & ATTR_CODE))
        raise_gp(c, selector & 0xfffc);
    check_direct(c, &d, ip);
    set_accessed(c, &d);
    enter_code(c, r, &d, c->cpl, ip);
}

static void far_call(struct vcpu *c, const struct record *r, u16 selector, u64 ip)
{
    unsigned n = 1u << r->size;
    struct descriptor d;
    c->now = r;
    if (!segmented(c)) {
        read_target(c, selector, &d);
        if (!(descriptor_attributes(&d) & ATTR_S)) {
            through_system_descriptor(c, r, &d, true);
            return;
        }
        if (!(descriptor_attributes(&d) & ATTR_CODE))
            raise_gp(c, selector & 0xfffc);
        check_direct(c, &d, ip);
    } else if (ip > c->seg[SEG_CS].limit) {
        raise_gp(c, 0);
    }
    struct stack s = current_stack(c, 0);
    s.access = 0;
    push_on(c, &s, n, c->seg[SEG_CS].selector);
    push_on(c, &s, n, next_ip(c, r));
    if (segmented(c)) {
        commit_sp(c, &s);
        enter_real(c, r, selector, ip);
        return;
    }
    set_accessed(c, &d);
    commit_sp(c, &s);
    enter_code(c, r, &d, c->cpl, ip);
}

OP(op_jmp_far) { far_jump(c, r, (u16)r->imm, truncate_to((u64)r->disp, 8u << r->size)); }
HANDLER(jmp_far);
OP(op_call_far) { far_call(c, r, (u16)r->imm, truncate_to((u64)r->disp, 8u << r->size)); }
HANDLER(call_far);
OP(op_jmp_far_M)
{
    u16 selector;
    u64 ip = load_far(c, r, &selector);
    far_jump(c, r, selector, ip);
}
HANDLER(jmp_far_M);
OP(op_call_far_M)
{
    u16 selector;
    u64 ip = load_far(c, r, &selector);
    far_call(c, r, selector, ip);
}
HANDLER(call_far_M);

/* ---- Returns ------------------------------------------------------------------------------------------------------------------ */

/* At a return to an outer level: a segment register that it must not have becomes null, and a null one loses its RPL. What is
 * hidden stays, so FS and GS keep their bases (2A IRET, RETURN-TO-OUTER-PRIVILEGE-LEVEL). */
static void drop_inner_segments(struct vcpu *c)
{
    static const u8 data[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    for (unsigned i = 0; i < 4; i++) {
        struct segment *s = &c->seg[data[i]];
        u32 a = s->attributes;
        bool conforming = a & ATTR_CODE && a & ATTR_CONFORMING;
        if (a & ATTR_UNUSABLE || (!conforming && attributes_dpl(a) < c->cpl)) {
            s->selector = 0;
            s->attributes = (a | ATTR_UNUSABLE) & ~(u32)ATTR_P;
        }
    }
}

/* RET and IRET in protected mode. On the stack: ip, cs (flags); `skip` bytes from rSP on, SP and SS, if they are wanted. */
static void far_return(struct vcpu *c, const struct record *r, u64 skip, bool iret, unsigned release)
{
    unsigned n = 1u << r->size, cpl = c->cpl;
    u64 ip = stack_load(c, r, 0, n), sp = 0, flags = iret ? stack_load(c, r, 2 * n, n) : 0;
    u16 selector = (u16)stack_load(c, r, n, n), ss = 0;
    u32 error = selector & 0xfffc;
    struct descriptor code, stack;
    bool stack_null = false;

    read_target(c, selector, &code);
    u32 a = descriptor_attributes(&code);
    unsigned rpl = selector & 3, dpl = attributes_dpl(a);
    bool is64 = c->efer & EFER_LMA && a & ATTR_L;
    if (!(a & ATTR_S) || !(a & ATTR_CODE) || rpl < cpl || (a & ATTR_CONFORMING ? dpl > rpl : dpl != rpl) ||
        (is64 && a & ATTR_DB))
        raise_gp(c, error);
    if (!(a & ATTR_P))
        raise_error(c, c->now, VECTOR_NP, error);
    bool outer = rpl > cpl, pops_stack = outer || (iret && c->key & KEY_CODE64);
    if (pops_stack) {
        sp = stack_load(c, r, skip, n);
        ss = (u16)stack_load(c, r, skip + n, n);
        stack_null = !(ss & 0xfffc);
        if (stack_null) {
            if (!is64 || rpl == 3)
                raise_gp(c, 0);
        } else {
            u32 stack_error = ss & 0xfffc;
            if (!read_descriptor(c, ss, &stack, 8))
                raise_gp(c, stack_error);
            u32 sa = descriptor_attributes(&stack);
            if ((ss & 3u) != rpl || !(sa & ATTR_S) || sa & ATTR_CODE || !(sa & ATTR_WRITABLE) || attributes_dpl(sa) != rpl)
                raise_gp(c, stack_error);
            if (!(sa & ATTR_P))
                raise_error(c, c->now, VECTOR_SS, stack_error);
        }
    }
    if (!target_fits(c, &code, ip))
        raise_gp(c, 0);
    if (pops_stack && !stack_null)
        set_accessed(c, &stack);
    set_accessed(c, &code);

    if (iret) { /* 2A IRET: by the old CPL and IOPL */
        u64 mask = FLAGS_ARITHMETIC | FLAG_TF | FLAG_DF | FLAG_NT;
        if (n > 2)
            mask |= FLAG_RF | FLAG_AC | FLAG_ID;
        if (cpl <= (c->rflags >> 12 & 3))
            mask |= FLAG_IF;
        if (!cpl)
            mask |= FLAG_IOPL | (n > 2 ? FLAG_VIF | FLAG_VIP : 0);
        change_flags(c, flags, mask);
    }
    if (!pops_stack) {
        set_sp(c, c->gpr[RSP] + skip);
    } else {
        if (stack_null)
            c->seg[SEG_SS] = (struct segment){0, 0, ATTR_UNUSABLE | rpl << ATTR_DPL_SHIFT, ss};
        else
            descriptor_segment(&stack, &c->seg[SEG_SS]);
        u64 mask = is64 ? ~0ull : c->seg[SEG_SS].attributes & ATTR_DB ? 0xffffffff : 0xffff;
        sp += release;
        c->gpr[RSP] = mask == 0xffff ? (c->gpr[RSP] & ~mask) | (sp & mask) : sp & mask;
    }
    set_cpl(c, rpl);
    if (outer)
        drop_inner_segments(c);
    enter_code(c, r, &code, rpl, ip);
}

static void return_far(struct vcpu *c, const struct record *r, unsigned release)
{
    unsigned n = 1u << r->size;
    c->now = r;
    if (!segmented(c)) {
        far_return(c, r, 2 * n + release, false, release);
        return;
    }
    u64 ip = stack_load(c, r, 0, n), selector = stack_load(c, r, n, n);
    if (ip > c->seg[SEG_CS].limit)
        raise_gp(c, 0);
    set_sp(c, c->gpr[RSP] + 2 * n + release);
    enter_real(c, r, (u16)selector, ip);
}
OP(op_ret_far) { return_far(c, r, 0); }
HANDLER(ret_far);
OP(op_ret_far_I) { return_far(c, r, (u16)r->imm); }
HANDLER(ret_far_I);

/* Real and virtual-8086 mode. */
static void iret_real(struct vcpu *c, const struct record *r)
{
    unsigned n = 1u << r->size;
    bool v86 = c->rflags & FLAG_VM && c->cr0 & CR0_PE, virtual = v86 && (c->rflags >> 12 & 3) < 3;
    if (virtual && (!(c->cr4 & CR4_VME) || n > 2))
        raise_gp(c, 0);
    u64 ip = stack_load(c, r, 0, n), selector = stack_load(c, r, n, n), flags = stack_load(c, r, 2 * n, n);
    if (ip > c->seg[SEG_CS].limit)
        raise_gp(c, 0);
    if (virtual && (flags & FLAG_TF || (flags & FLAG_IF && c->rflags & FLAG_VIP))) /* 20.3.3 */
        raise_gp(c, 0);
    u64 mask = FLAGS_ARITHMETIC | FLAG_TF | FLAG_DF | FLAG_NT;
    if (n > 2)
        mask |= FLAG_RF | FLAG_AC | FLAG_ID;
    if (!v86)
        mask |= FLAG_IF | FLAG_IOPL;
    else if (!virtual)
        mask |= FLAG_IF;
    else
        c->rflags = (c->rflags & ~(u64)FLAG_VIF) | (flags & FLAG_IF ? FLAG_VIF : 0);
    change_flags(c, flags, mask);
    set_sp(c, c->gpr[RSP] + 3 * n);
    enter_real(c, r, (u16)selector, ip);
}

static void iret_to_v86(struct vcpu *c, const struct record *r, u64 ip, u64 flags)
{
    u32 values[9];
    static const u8 order[] = {SEG_SS, SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    for (unsigned i = 1; i < 9; i++)
        values[i] = (u32)stack_load(c, r, i * 4, 4);
    if (ip > 0xffff)
        raise_gp(c, 0);
    set_rflags(c, flags & 0x3f7fd7);
    set_segment_real(c, SEG_CS, (u16)values[1]);
    for (unsigned i = 0; i < 5; i++)
        set_segment_real(c, order[i], (u16)values[4 + i]);
    c->gpr[RSP] = values[3];
    set_cpl(c, 3);
    mode_changed(c);
    leave_to(c, r, ip);
}

OP(op_iret)
{
    unsigned n = 1u << r->size;
    c->now = r;
    c->nmi_masked = false; /* even if it faults (3A 6.7.1) */
    if (segmented(c)) {
        iret_real(c, r);
        return;
    }
    if (c->rflags & FLAG_NT) {
        if (c->efer & EFER_LMA)
            raise_gp(c, 0);
        u16 link = 0;
        mmu_read(c, (u32)c->seg[SEG_TR].base, &link, 2, ACCESS_SUPERVISOR);
        task_switch(c, link, TASK_RETURN, 0, next_ip(c, r), false, 0);
        return;
    }
    if (n == 4 && !c->cpl && !(c->efer & EFER_LMA)) {
        u64 flags = stack_load(c, r, 8, 4);
        if (flags & FLAG_VM) {
            iret_to_v86(c, r, stack_load(c, r, 0, 4), flags);
            return;
        }
    }
    far_return(c, r, 3 * n, true, 0);
}
HANDLER(iret);

/* ---- Software interrupts ---------------------------------------------------------------------------------------------------- */

/* CR4.VME: the bit of the TSS's redirection map, the 32 bytes below the I/O permission map (20.3.3). */
static bool redirected(struct vcpu *c, unsigned vector)
{
    const struct segment *tr = &c->seg[SEG_TR];
    u16 map = 0;
    u8 bits = 0;
    if (!(c->cr4 & CR4_VME) || !(tr->attributes & 8) || tr->limit < 103)
        return false;
    mmu_read(c, (u32)(tr->base + 102), &map, 2, ACCESS_SUPERVISOR);
    u32 at = map - 32u + vector / 8;
    if (map < 32 || at > tr->limit)
        return false;
    mmu_read(c, (u32)(tr->base + at), &bits, 1, ACCESS_SUPERVISOR);
    return !(bits >> (vector & 7) & 1);
}

OP(op_int)
{
    unsigned vector = (u8)r->imm;
    c->now = r;
    if (c->key & KEY_V86) {
        if (redirected(c, vector)) {
            deliver_redirected(c, r, vector);
            return;
        }
        if ((c->rflags >> 12 & 3) < 3)
            raise_gp(c, 0);
    }
    deliver_software(c, r, vector, EVENT_SOFTWARE);
}
HANDLER(int);
OP(op_int3) { deliver_software(c, r, VECTOR_BP, EVENT_SOFTWARE); }
HANDLER(int3);
OP(op_int1) { deliver_software(c, r, VECTOR_DB, EVENT_INT1); }
HANDLER(int1);
OP(op_into)
{
    if (!flag_of(c))
        NEXT();
    deliver_software(c, r, VECTOR_OF, EVENT_SOFTWARE);
}
HANDLER(into);

/* ---- Fast system calls ---------------------------------------------------------------------------------------------------------- */

/* Flat segments that nothing in memory describes. */
static void set_flat(struct vcpu *c, u16 code, u16 stack, unsigned cpl, bool is64)
{
    u32 common = ATTR_S | ATTR_P | ATTR_G | ATTR_ACCESSED | cpl << ATTR_DPL_SHIFT;
    c->seg[SEG_CS] = (struct segment){0, 0xffffffff, common | ATTR_CODE | ATTR_READABLE | (is64 ? ATTR_L : ATTR_DB), code};
    c->seg[SEG_SS] = (struct segment){0, 0xffffffff, common | ATTR_WRITABLE | ATTR_DB, stack};
    set_cpl(c, cpl);
}

OP(op_syscall)
{
    if (!(c->efer & EFER_SCE))
        raise_fault(c, r, VECTOR_UD);
    c->gpr[RCX] = next_ip(c, r);
    c->gpr[11] = get_rflags(c) & ~(u64)FLAG_RF;
    set_rflags(c, get_rflags(c) & ~(c->msr.fmask | FLAG_RF));
    u16 code = (u16)(c->msr.star >> 32) & 0xfffc;
    set_flat(c, code, (u16)(code + 8), 0, true);
    mode_changed(c);
    c->trap_taken = !(c->rflags & FLAG_TF);
    leave_to(c, r, c->msr.lstar);
}
HANDLER(syscall);

OP(op_sysret)
{
    if (!(c->efer & EFER_SCE))
        raise_fault(c, r, VECTOR_UD);
    bool is64 = r->size == 3;
    u64 ip = c->gpr[RCX];
    if (c->cpl || (is64 && !canonical(c, ip)))
        raise_error(c, r, VECTOR_GP, 0);
    set_rflags(c, (c->gpr[11] & 0x3c7fd7) | 2);
    u16 base = (u16)(c->msr.star >> 48);
    set_flat(c, (u16)((base + (is64 ? 16 : 0)) | 3), (u16)((base + 8) | 3), 3, is64);
    mode_changed(c);
    leave_to(c, r, is64 ? ip : (u32)ip);
}
HANDLER(sysret);

OP(op_sysenter)
{
    u16 code = (u16)c->msr.sysenter_cs & 0xfffc;
    if (!(c->cr0 & CR0_PE) || !code)
        raise_error(c, r, VECTOR_GP, 0);
    bool is64 = c->efer & EFER_LMA;
    c->rflags &= ~(u64)(FLAG_VM | FLAG_IF | FLAG_RF);
    c->gpr[RSP] = is64 ? c->msr.sysenter_esp : (u32)c->msr.sysenter_esp;
    set_flat(c, code, (u16)(code + 8), 0, is64);
    mode_changed(c);
    leave_to(c, r, is64 ? c->msr.sysenter_eip : (u32)c->msr.sysenter_eip);
}
HANDLER(sysenter);

OP(op_sysexit)
{
    u16 base = (u16)c->msr.sysenter_cs & 0xfffc;
    bool is64 = r->size == 3;
    if (!(c->cr0 & CR0_PE) || c->cpl || !base ||
        (is64 && (!canonical(c, c->gpr[RDX]) || !canonical(c, c->gpr[RCX]))))
        raise_error(c, r, VECTOR_GP, 0);
    u64 ip = is64 ? c->gpr[RDX] : (u32)c->gpr[RDX];
    c->gpr[RSP] = is64 ? c->gpr[RCX] : (u32)c->gpr[RCX];
    set_flat(c, (u16)((base + (is64 ? 32 : 16)) | 3), (u16)((base + (is64 ? 40 : 24)) | 3), 3, is64);
    mode_changed(c);
    leave_to(c, r, ip);
}
HANDLER(sysexit);
