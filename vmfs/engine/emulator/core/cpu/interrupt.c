/* Delivery of exceptions and interrupts (Intel SDM 3A chapter 6, 20.1.4 real mode, 20.3 virtual-8086). */
#include "recent.h"
#include "tracer.h"
#include "transfer.h"

void escape(struct vcpu *c, enum escape how) { longjmp(c->escape, how); }

void raise_fault(struct vcpu *c, const struct record *r, unsigned vector)
{
    c->now = r;
    c->fault = (struct fault){.vector = (u8)vector};
    escape(c, ESCAPE_FAULT);
}
void raise_error(struct vcpu *c, const struct record *r, unsigned vector, u32 error)
{
    c->now = r;
    c->fault = (struct fault){.vector = (u8)vector, .has_error = true, .error = error};
    escape(c, ESCAPE_FAULT);
}
void raise_page_fault(struct vcpu *c, const struct record *r, u64 linear, u32 error)
{
    c->now = r;
    c->fault = (struct fault){.vector = VECTOR_PF, .has_error = true, .error = error, .address = linear};
    escape(c, ESCAPE_FAULT);
}

void push_on(struct vcpu *c, struct stack *s, unsigned bytes, u64 value)
{
    u64 sp = (s->sp - bytes) & s->mask;
    if (sp < s->check.low || sp + bytes - 1 > s->check.high || (s->mask == ~0ull && (!canonical(c, sp) || !canonical(c, sp + bytes - 1))))
        raise_error(c, c->now, VECTOR_SS, s->fault_error);
    u64 linear = (s->check.base + sp) & s->linear_mask;
    mmu_write(c, linear, &value, bytes, s->access);
    s->sp = (s->sp & ~s->mask) | sp;
}

void commit_sp(struct vcpu *c, const struct stack *s)
{
    c->gpr[RSP] = s->mask == 0xffffffff ? (u32)s->sp : s->sp;
}

static void deliver_real(struct vcpu *c, unsigned vector, u64 return_ip)
{
    if (vector * 4u + 3 > c->idt.limit)
        raise_error(c, c->now, VECTOR_GP, 0);
    u32 entry = 0;
    mmu_read(c, (u32)(c->idt.base + vector * 4), &entry, 4, ACCESS_SUPERVISOR);
    struct stack s = current_stack(c, 0);
    push_on(c, &s, 2, get_rflags(c));
    push_on(c, &s, 2, c->seg[SEG_CS].selector);
    push_on(c, &s, 2, return_ip);
    commit_sp(c, &s);
    c->rflags &= ~(u64)(FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF);
    set_segment_real(c, SEG_CS, (u16)(entry >> 16));
    c->gpr[GPR_IP] = entry & 0xffff;
    mode_changed(c);
}

/* A stack pointer of the TSS: 32-bit or 16-bit TSS (7.2.1). */
static void tss_stack(struct vcpu *c, unsigned level, u32 ext, u16 *ss, u64 *sp)
{
    const struct segment *tr = &c->seg[SEG_TR];
    bool wide = tr->attributes & 8;
    u64 offset = wide ? 4 + 8 * level : 2 + 4 * level, bytes = wide ? 6 : 4;
    if (offset + bytes - 1 > tr->limit)
        raise_error(c, c->now, VECTOR_TS, (tr->selector & 0xfffc) | ext);
    u64 value = 0;
    mmu_read(c, (u32)(tr->base + offset), &value, (unsigned)bytes, ACCESS_SUPERVISOR);
    *sp = wide ? (u32)value : (u16)value;
    *ss = (u16)(value >> (wide ? 32 : 16));
}

u64 tss_stack64(struct vcpu *c, unsigned offset, u32 ext)
{
    const struct segment *tr = &c->seg[SEG_TR];
    if (offset + 7 > tr->limit)
        raise_error(c, c->now, VECTOR_TS, (tr->selector & 0xfffc) | ext);
    u64 value = 0;
    mmu_read(c, tr->base + offset, &value, 8, ACCESS_SUPERVISOR);
    return value;
}

struct stack current_stack(struct vcpu *c, u32 fault_error)
{
    return (struct stack){c->check[SEG_SS], c->gpr[RSP], c->stack_mask, c->linear_mask, fault_error,
                          c->cpl == 3 ? 0 : ACCESS_SUPERVISOR};
}

void inner_stack(struct vcpu *c, unsigned level, u32 ext, struct stack *s, struct segment *new_ss)
{
    u16 ss;
    u64 sp;
    struct descriptor d;
    tss_stack(c, level, ext, &ss, &sp);
    u32 error = (ss & 0xfffc) | ext;
    if (!(ss & 0xfffc))
        raise_error(c, c->now, VECTOR_TS, ext);
    if (!read_descriptor(c, ss, &d, 8))
        raise_error(c, c->now, VECTOR_TS, error);
    u32 a = descriptor_attributes(&d);
    if ((ss & 3) != level || attributes_dpl(a) != level || !(a & ATTR_S) || a & ATTR_CODE || !(a & ATTR_WRITABLE))
        raise_error(c, c->now, VECTOR_TS, error);
    if (!(a & ATTR_P))
        raise_error(c, c->now, VECTOR_SS, error);
    set_accessed(c, &d);
    descriptor_segment(&d, new_ss);
    bool down = a & ATTR_EXPAND_DOWN, big = a & ATTR_DB;
    *s = (struct stack){{new_ss->base, down ? (u64)new_ss->limit + 1 : 0,
                         down ? (big ? 0xffffffff : 0xffff) : new_ss->limit, 3},
                        sp, big ? 0xffffffff : 0xffff, 0xffffffff, error, ACCESS_SUPERVISOR};
}

static void deliver_protected(struct vcpu *c, unsigned vector, enum event kind, bool has_error, u32 error_code,
                              u64 return_ip)
{
    bool long_mode = c->efer & EFER_LMA, v86 = c->rflags & FLAG_VM;
    u32 ext = kind == EVENT_SOFTWARE ? 0 : 1;
    unsigned entry_bytes = long_mode ? 16 : 8;
    u32 idt_error = vector * 8 + 2 + ext;
    if (vector * entry_bytes + entry_bytes - 1 > c->idt.limit)
        raise_error(c, c->now, VECTOR_GP, idt_error);
    u64 gate[2] = {0, 0}, gate_at = c->idt.base + vector * entry_bytes;
    mmu_read(c, long_mode ? gate_at : (u32)gate_at, &gate[0], 8, ACCESS_SUPERVISOR);
    if (long_mode)
        mmu_read(c, gate_at + 8, &gate[1], 8, ACCESS_SUPERVISOR);
    unsigned type = gate[0] >> 40 & 31, dpl = gate[0] >> 45 & 3;
    bool task = type == 5 && !long_mode;
    if (!(type == 14 || type == 15 || (!long_mode && (type == 5 || type == 6 || type == 7))))
        raise_error(c, c->now, VECTOR_GP, idt_error);
    if (kind == EVENT_SOFTWARE && dpl < c->cpl)
        raise_error(c, c->now, VECTOR_GP, vector * 8 + 2);
    if (!(gate[0] >> 47 & 1))
        raise_error(c, c->now, VECTOR_NP, idt_error);
    u16 selector = (u16)(gate[0] >> 16);
    if (task) {
        task_switch(c, selector, TASK_EVENT, ext, return_ip, has_error, error_code);
        return;
    }
    u64 target = (gate[0] & 0xffff) | (gate[0] >> 32 & 0xffff0000) | (gate[1] & 0xffffffff) << 32;
    bool wide = type & 8, trap = type & 1;
    unsigned size = long_mode ? 8 : wide ? 4 : 2;
    if (!wide)
        target &= 0xffff;

    struct descriptor code;
    u32 code_error = (selector & 0xfffc) | ext;
    if (!(selector & 0xfffc))
        raise_error(c, c->now, VECTOR_GP, ext);
    if (!read_descriptor(c, selector, &code, 8))
        raise_error(c, c->now, VECTOR_GP, code_error);
    u32 a = descriptor_attributes(&code);
    unsigned code_dpl = a >> ATTR_DPL_SHIFT & 3;
    if (!(a & ATTR_S) || !(a & ATTR_CODE) || code_dpl > c->cpl || (long_mode && (!(a & ATTR_L) || a & ATTR_DB)))
        raise_error(c, c->now, VECTOR_GP, code_error);
    if (!(a & ATTR_P))
        raise_error(c, c->now, VECTOR_NP, code_error);
    unsigned cpl = a & ATTR_CONFORMING ? c->cpl : code_dpl;
    if (v86 && cpl != 0)
        raise_error(c, c->now, VECTOR_GP, code_error);

    struct stack s;
    struct segment new_ss = c->seg[SEG_SS];
    bool switches = cpl < c->cpl;
    u64 old_sp = c->gpr[RSP], ist = long_mode ? gate[0] >> 32 & 7 : 0;
    if (long_mode) { /* 6.14 */
        s = (struct stack){{0, 0, ~0ull, 3}, old_sp, ~0ull, ~0ull, ext, ACCESS_SUPERVISOR};
        if (ist)
            s.sp = tss_stack64(c, 36 + 8 * (unsigned)(ist - 1), ext);
        else if (switches)
            s.sp = tss_stack64(c, 4 + 8 * cpl, ext);
        s.sp &= ~15ull;
        if (switches)
            new_ss = (struct segment){0, 0, ATTR_UNUSABLE | cpl << ATTR_DPL_SHIFT, (u16)cpl};
        if (!canonical(c, target))
            raise_error(c, c->now, VECTOR_GP, ext);
    } else {
        if (switches)
            inner_stack(c, cpl, ext, &s, &new_ss);
        else
            s = current_stack(c, ext);
        if (target > descriptor_limit(&code))
            raise_error(c, c->now, VECTOR_GP, ext);
    }
    u64 flags = get_rflags(c);
    if (c->repeating || (kind == EVENT_EXCEPTION && vector != VECTOR_DB && vector != VECTOR_BP && vector != VECTOR_OF))
        flags |= FLAG_RF; /* 17.3.1.1: faults, and events between iterations, resume past an instruction breakpoint */
    if (v86) {
        static const u8 order[] = {SEG_GS, SEG_FS, SEG_DS, SEG_ES};
        for (unsigned i = 0; i < 4; i++)
            push_on(c, &s, size, c->seg[order[i]].selector);
    }
    if (long_mode || switches) {
        push_on(c, &s, size, c->seg[SEG_SS].selector);
        push_on(c, &s, size, old_sp);
    }
    push_on(c, &s, size, flags);
    push_on(c, &s, size, c->seg[SEG_CS].selector);
    push_on(c, &s, size, return_ip);
    if (has_error)
        push_on(c, &s, size, error_code);
    set_accessed(c, &code);

    /* Nothing below can fault. */
    commit_sp(c, &s);
    c->gpr[GPR_IP] = target;
    descriptor_segment(&code, &c->seg[SEG_CS]);
    c->seg[SEG_CS].selector = (u16)((selector & 0xfffc) | cpl);
    c->seg[SEG_SS] = new_ss;
    if (v86)
        for (unsigned i = SEG_ES; i <= SEG_GS; i++)
            if (i != SEG_CS && i != SEG_SS) {
                c->seg[i].selector = 0;
                c->seg[i].attributes = ATTR_UNUSABLE;
                c->seg[i].base = 0;
            }
    c->rflags &= ~(u64)(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM | (trap ? 0 : FLAG_IF));
    set_cpl(c, cpl);
    mode_changed(c);
}

/* B0 to B3 are what is met now, whatever they were; BD, BS and BT stay until software clears them (3B 17.2.3). */
void debug_status(struct vcpu *c, u64 bits) { c->dr6 = (c->dr6 & ~15ull) | bits; }

static void deliver_from(struct vcpu *c, unsigned vector, enum event kind, bool has_error, u32 error, u64 return_ip)
{
    u64 waiting = c->debug_pending; /* after a load of SS: INT n drops it, and not the trap of a task that it switches to */
    c->delivering = (int)vector;
    c->delivering_kind = kind;
    c->delivering_has_error = has_error;
    c->delivering_error = error;
    if (c->cr0 & CR0_PE)
        deliver_protected(c, vector, kind, has_error, error, return_ip);
    else
        deliver_real(c, vector, return_ip);
    c->delivering = -1;
    c->halted = false;
    c->shadow_sti = c->shadow_ss = c->repeating = false;
    if (kind == EVENT_SOFTWARE || kind == EVENT_INT1)
        c->debug_pending &= ~waiting;
    if (kind == EVENT_INT1)
        debug_status(c, 0);
    if (vector == VECTOR_DB && (kind == EVENT_EXCEPTION || kind == EVENT_INT1)) {
        /* 17.2.4, 17.4.3: the handler may use the debug registers, and is not stepped by branches */
        c->dr7 &= ~(u64)DR7_GD;
        c->msr.debugctl &= ~(u64)DEBUGCTL_BTF;
    }
}

void deliver(struct vcpu *c, unsigned vector, enum event kind, bool has_error, u32 error)
{
    c->now = NULL;
    if (c->tracer) {
        bool exception = kind == EVENT_EXCEPTION;
        tracer_event(c, exception ? TRACER_EXCEPTION : kind != EVENT_EXTERNAL ? TRACER_SOFTWARE :
                     vector == VECTOR_NMI && c->nmi_masked ? TRACER_NMI : TRACER_EXTERNAL,
                     vector, has_error, error, exception && vector == VECTOR_PF ? c->cr2 : 0);
    }
    deliver_from(c, vector, kind, has_error, error, c->gpr[GPR_IP]);
    c->event_at = instructions_done(c) + 1;
}

void deliver_software(struct vcpu *c, const struct record *r, unsigned vector, enum event kind)
{
    c->now = r;
    if (has_stops(c, STOP_VECTOR) && catches(c, vector, false, retired_at(c, r)))
        escape(c, ESCAPE_EXIT);
    if (c->tracer)
        tracer_event(c, TRACER_SOFTWARE, vector, false, 0, 0);
    note_last(c, r, true);
    deliver_from(c, vector, kind, false, 0, next_ip(c, r));
    if (c->now) /* else a task switch has been there */
        c->budget += r->left;
    c->now = NULL;
    c->trap_taken = true; /* TF is clear: no single-step trap after it */
}

void deliver_redirected(struct vcpu *c, const struct record *r, unsigned vector)
{
    u64 flags = get_rflags(c);
    bool virtual = (flags >> 12 & 3) < 3;
    u32 entry = 0;
    c->now = r;
    if (c->tracer)
        tracer_event(c, TRACER_SOFTWARE, vector, false, 0, 0);
    mmu_read(c, vector * 4, &entry, 4, 0);
    if (virtual)
        flags = (flags & ~(u64)FLAG_IF) | FLAG_IOPL | (flags & FLAG_VIF ? FLAG_IF : 0);
    struct stack s = current_stack(c, 0);
    push_on(c, &s, 2, flags);
    push_on(c, &s, 2, c->seg[SEG_CS].selector);
    push_on(c, &s, 2, next_ip(c, r));
    commit_sp(c, &s);
    c->rflags &= ~(u64)(FLAG_TF | (virtual ? FLAG_VIF : FLAG_IF));
    set_segment_real(c, SEG_CS, (u16)(entry >> 16));
    mode_changed(c);
    leave_to(c, r, entry & 0xffff);
    c->trap_taken = true;
    c->debug_pending = 0; /* as deliver_from has it */
}

static bool contributory(unsigned vector)
{
    return vector == VECTOR_DE || (vector >= VECTOR_TS && vector <= VECTOR_GP);
}

/* A fault that is never delivered: a double fault or a shutdown comes of it. */
static void trace_folded(struct vcpu *c)
{
    const struct fault *f = &c->fault;
    if (c->tracer)
        tracer_event(c, TRACER_EXCEPTION, f->vector, f->has_error && c->cr0 & CR0_PE, f->error, f->address);
}

/* What comes of c->fault, which may have been raised while another was being delivered (table 6-5). */
bool fault_to_deliver(const struct vcpu *c, struct fault *f)
{
    *f = c->fault;
    if (c->delivering >= 0 && c->delivering_kind == EVENT_EXCEPTION) {
        unsigned first = (unsigned)c->delivering;
        if (first == VECTOR_DF)
            return false;
        if ((contributory(first) && contributory(f->vector)) ||
            (first == VECTOR_PF && (contributory(f->vector) || f->vector == VECTOR_PF)))
            *f = (struct fault){.vector = VECTOR_DF, .has_error = true};
    }
    return true;
}

bool deliver_fault(struct vcpu *c)
{
    struct fault f;
    c->counters.exceptions++;
    bool delivered = fault_to_deliver(c, &f);
    note_fault(c, delivered, f.vector);
    if (!delivered || f.vector != c->fault.vector)
        trace_folded(c);
    if (!delivered)
        return false;
    if (f.vector == VECTOR_PF)
        c->cr2 = f.address;
    bool real = !(c->cr0 & CR0_PE);
    deliver(c, f.vector, EVENT_EXCEPTION, f.has_error && !real, f.error);
    return true;
}
