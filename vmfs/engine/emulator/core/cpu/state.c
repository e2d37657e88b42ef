/* State in and out, as the structs of the Linux KVM UAPI (asm/kvm.h). */
#include <errno.h>

#include "flags.h"
#include "irqchip.h"
#include "memory.h"

/* ---- regs ---------------------------------------------------------------------------------------------------------------- */

/* struct kvm_regs has rbx before rcx, rsi and rdi before rsp. */
static const u8 regs_order[16] = {RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, 8, 9, 10, 11, 12, 13, 14, 15};

static void get_regs(struct vcpu *c, void *data)
{
    u64 *out = data;
    for (unsigned i = 0; i < 16; i++)
        out[i] = c->gpr[regs_order[i]];
    out[16] = c->gpr[GPR_IP];
    out[17] = get_rflags(c);
}

static void derive_cpl(struct vcpu *c)
{
    c->cpl = !(c->cr0 & CR0_PE) ? 0 : c->rflags & FLAG_VM ? 3 : c->seg[SEG_SS].attributes >> ATTR_DPL_SHIFT & 3;
}

/* VM is a mode of protected mode outside of IA-32e (Intel SDM 3A 20.2): elsewhere no CPU can have it set. */
static void drop_impossible_vm(struct vcpu *c)
{
    if (!(c->cr0 & CR0_PE) || c->efer & EFER_LMA)
        c->rflags &= ~(u64)FLAG_VM;
}

static int set_regs(struct vcpu *c, const void *data, size_t size)
{
    const u64 *in = data;
    (void)size;
    for (unsigned i = 0; i < 16; i++)
        c->gpr[regs_order[i]] = in[i];
    if (c->gpr[GPR_IP] != in[16])
        c->debug_pending = 0; /* a trap of an instruction after which this state no longer is */
    c->gpr[GPR_IP] = in[16];
    set_rflags(c, in[17] & 0x3f7fd7);
    drop_impossible_vm(c);
    c->caught_at = 0; /* with other registers, an exception is another one */
    c->repeating = false;
    derive_cpl(c);
    mode_changed(c);
    return 0;
}

/* ---- sregs --------------------------------------------------------------------------------------------------------------- */

static void get_segment(const struct segment *s, struct kvm_segment *k)
{
    u32 a = s->attributes;
    *k = (struct kvm_segment){
        .base = s->base, .limit = s->limit, .selector = s->selector, .type = a & ATTR_TYPE, .s = a >> 4 & 1,
        .dpl = a >> ATTR_DPL_SHIFT & 3, .present = a >> 7 & 1, .avl = a >> 12 & 1, .l = a >> 13 & 1, .db = a >> 14 & 1,
        .g = a >> 15 & 1, .unusable = a >> 16 & 1,
    };
}
static struct segment set_segment(const struct kvm_segment *k)
{
    return (struct segment){
        k->base, k->limit,
        (u32)((k->type & 15) | (k->s & 1) << 4 | (k->dpl & 3) << ATTR_DPL_SHIFT | (k->present & 1) << 7 | (k->avl & 1) << 12 |
              (k->l & 1) << 13 | (k->db & 1) << 14 | (k->g & 1) << 15 | (u32)(k->unusable || !k->present) << 16),
        k->selector};
}

static void get_sregs(struct vcpu *c, void *data)
{
    struct kvm_sregs *s = data;
    memset(s, 0, sizeof *s);
    get_segment(&c->seg[SEG_CS], &s->cs);
    get_segment(&c->seg[SEG_DS], &s->ds);
    get_segment(&c->seg[SEG_ES], &s->es);
    get_segment(&c->seg[SEG_FS], &s->fs);
    get_segment(&c->seg[SEG_GS], &s->gs);
    get_segment(&c->seg[SEG_SS], &s->ss);
    get_segment(&c->seg[SEG_TR], &s->tr);
    get_segment(&c->seg[SEG_LDTR], &s->ldt);
    s->gdt.base = c->gdt.base;
    s->gdt.limit = c->gdt.limit;
    s->idt.base = c->idt.base;
    s->idt.limit = c->idt.limit;
    s->cr0 = c->cr0, s->cr2 = c->cr2, s->cr3 = c->cr3, s->cr4 = c->cr4, s->cr8 = c->cr8;
    s->efer = c->efer;
    s->apic_base = c->msr.apic_base;
    if (c->vm->irqchip) {
        s->cr8 = irqchip_get_cr8(c->vm->irqchip, c->index);
        s->apic_base = c->vm->irqchip->cpu[c->index].base;
    }
    u8 vector = c->injected.interrupt_vector; /* what is half delivered; the queue is not in KVM's state */
    if (c->injected.interrupt)
        s->interrupt_bitmap[vector >> 6] |= 1ull << (vector & 63);
}

static int set_sregs(struct vcpu *c, const void *data, size_t size)
{
    const struct kvm_sregs *s = data;
    (void)size;
    u64 efer_all = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    if (s->efer & ~efer_all || s->cr4 & ~cr4_valid(c) || s->cr8 > 15)
        return -EINVAL;
    if (s->cr0 >> 32 || (s->cr0 & CR0_PG && !(s->cr0 & CR0_PE)) || (s->cr0 & CR0_NW && !(s->cr0 & CR0_CD)))
        return -EINVAL;
    bool long_mode = s->efer & EFER_LME && s->cr0 & CR0_PG; /* 3A 4.1.1, 9.8.5 */
    if (long_mode != !!(s->efer & EFER_LMA) || (long_mode && (!(s->cr4 & CR4_PAE) || s->cr3 >> c->physical_bits)) ||
        (!long_mode && (s->cs.l || s->cr4 & CR4_PCIDE)))
        return -EINVAL;
    if (c->vm->irqchip) {
        if (irqchip_set_apic_base(c->vm->irqchip, c->index, s->apic_base, vm_time(c->vm)))
            return -EINVAL;
        irqchip_set_cr8(c->vm->irqchip, c->index, s->cr8);
    }
    c->seg[SEG_CS] = set_segment(&s->cs);
    c->seg[SEG_DS] = set_segment(&s->ds);
    c->seg[SEG_ES] = set_segment(&s->es);
    c->seg[SEG_FS] = set_segment(&s->fs);
    c->seg[SEG_GS] = set_segment(&s->gs);
    c->seg[SEG_SS] = set_segment(&s->ss);
    c->seg[SEG_TR] = set_segment(&s->tr);
    c->seg[SEG_LDTR] = set_segment(&s->ldt);
    c->gdt = (struct table_register){s->gdt.base, s->gdt.limit};
    c->idt = (struct table_register){s->idt.base, s->idt.limit};
    c->cr0 = s->cr0 | CR0_ET, c->cr2 = s->cr2, c->cr3 = s->cr3, c->cr4 = s->cr4, c->cr8 = s->cr8;
    c->efer = s->efer;
    c->msr.apic_base = s->apic_base;
    drop_impossible_vm(c);
    for (unsigned vector = 0; vector < 256 && !c->vm->irqchip; vector++) /* as KVM: the first; none is no change */
        if (s->interrupt_bitmap[vector >> 6] >> (vector & 63) & 1) {
            c->injected.interrupt = true;
            c->injected.soft = false;
            c->injected.interrupt_vector = (u8)vector;
            break;
        }
    if (c->cr0 & CR0_PG && c->cr4 & CR4_PAE && !(c->efer & EFER_LMA))
        load_pdptrs(c, c->cr3);
    derive_cpl(c);
    tlb_flush(c);
    mode_changed(c);
    return 0;
}

/* ---- fpu, xsave, xcrs ------------------------------------------------------------------------------------------------------- */

static unsigned top_of(const struct vcpu *c) { return c->fsw >> 11 & 7; }

static void get_st(const struct vcpu *c, unsigned i, u8 *out)
{
    const struct x87_register *r = &c->fpr[(top_of(c) + i) & 7];
    memset(out, 0, 16);
    memcpy(out, &r->mantissa, 8);
    memcpy(out + 8, &r->exponent, 2);
}
static void set_st(struct vcpu *c, unsigned i, const u8 *in)
{
    struct x87_register *r = &c->fpr[(top_of(c) + i) & 7];
    memcpy(&r->mantissa, in, 8);
    memcpy(&r->exponent, in + 8, 2);
}

static void get_fpu(struct vcpu *c, void *data)
{
    struct kvm_fpu *f = data;
    memset(f, 0, sizeof *f);
    for (unsigned i = 0; i < 8; i++)
        get_st(c, i, f->fpr[i]);
    f->fcw = c->fcw, f->fsw = c->fsw, f->ftwx = (u8)c->ftw, f->last_opcode = c->fop, f->last_ip = c->fip, f->last_dp = c->fdp;
    for (unsigned i = 0; i < 16; i++)
        memcpy(f->xmm[i], &c->xmm[i], 16);
    f->mxcsr = c->mxcsr;
}
static int set_fpu(struct vcpu *c, const void *data, size_t size)
{
    const struct kvm_fpu *f = data;
    (void)size;
    if (f->mxcsr >> 16)
        return -EINVAL;
    c->fcw = f->fcw, c->fsw = f->fsw, c->ftw = f->ftwx, c->fop = f->last_opcode, c->fip = f->last_ip, c->fdp = f->last_dp;
    c->fcs = c->fds = 0; /* not in it: 64-bit pointers */
    for (unsigned i = 0; i < 8; i++)
        set_st(c, i, f->fpr[i]);
    for (unsigned i = 0; i < 16; i++)
        memcpy(&c->xmm[i], f->xmm[i], 16);
    c->mxcsr = f->mxcsr;
    return 0;
}

/* Intel SDM 1 13.4: legacy region, header at 512, AVX at 576, PKRU at 2688 as the CPUID of current processors. */
enum { XSAVE_HEADER = 512, XSAVE_AVX = 576, XSAVE_PKRU = 2688 };

static void get_xsave(struct vcpu *c, void *data)
{
    u8 *x = data;
    memset(x, 0, 4096);
    memcpy(x, &c->fcw, 2);
    memcpy(x + 2, &c->fsw, 2);
    x[4] = (u8)c->ftw;
    memcpy(x + 6, &c->fop, 2);
    memcpy(x + 8, &c->fip, 8);
    memcpy(x + 16, &c->fdp, 8);
    memcpy(x + 24, &c->mxcsr, 4);
    u32 mask = 0xffff;
    memcpy(x + 28, &mask, 4);
    for (unsigned i = 0; i < 8; i++)
        get_st(c, i, x + 32 + 16 * i);
    for (unsigned i = 0; i < 16; i++) {
        memcpy(x + 160 + 16 * i, &c->xmm[i], 16);
        memcpy(x + XSAVE_AVX + 16 * i, c->xmm[i].b + 16, 16);
    }
    memcpy(x + XSAVE_PKRU, &c->pkru, 4);
    u64 present = 3; /* and what is not as XRSTOR would initialize it (13.6): other hosts may lack the component */
    for (unsigned i = 0; i < 16; i++)
        if (c->xmm[i].q[2] | c->xmm[i].q[3])
            present |= 4;
    if (c->pkru)
        present |= 1 << 9;
    memcpy(x + XSAVE_HEADER, &present, 8);
}
static int set_xsave(struct vcpu *c, const void *data, size_t size)
{
    const u8 *x = data;
    (void)size;
    u64 present;
    u32 mxcsr;
    memcpy(&present, x + XSAVE_HEADER, 8);
    memcpy(&mxcsr, x + 24, 4);
    if (present & ~(u64)(7 | 1 << 9) || mxcsr >> 16)
        return -EINVAL;
    static const u8 zero[16];
    if (present & 1) {
        memcpy(&c->fcw, x, 2);
        memcpy(&c->fsw, x + 2, 2);
        c->ftw = x[4];
        memcpy(&c->fop, x + 6, 2);
        memcpy(&c->fip, x + 8, 8);
        memcpy(&c->fdp, x + 16, 8);
        c->fcs = c->fds = 0;
        for (unsigned i = 0; i < 8; i++)
            set_st(c, i, x + 32 + 16 * i);
    } else {
        c->fcw = 0x37f, c->fsw = 0, c->ftw = 0, c->fop = c->fcs = c->fds = 0, c->fip = c->fdp = 0;
        memset(c->fpr, 0, sizeof c->fpr);
    }
    c->mxcsr = mxcsr;
    for (unsigned i = 0; i < 16; i++) {
        memcpy(&c->xmm[i], present & 2 ? x + 160 + 16 * i : zero, 16);
        memcpy(c->xmm[i].b + 16, present & 4 ? x + XSAVE_AVX + 16 * i : zero, 16);
    }
    u32 pkru = 0;
    if (present & 1 << 9)
        memcpy(&pkru, x + XSAVE_PKRU, 4);
    if (pkru != c->pkru) {
        c->pkru = pkru;
        tlb_flush(c);
    }
    return 0;
}

static void get_xcrs(struct vcpu *c, void *data)
{
    struct kvm_xcrs *x = data;
    memset(x, 0, sizeof *x);
    x->nr_xcrs = 1;
    x->xcrs[0].value = c->xcr0;
}
static int set_xcrs(struct vcpu *c, const void *data, size_t size)
{
    const struct kvm_xcrs *x = data;
    (void)size;
    if (x->nr_xcrs > KVM_MAX_XCRS || x->flags)
        return -EINVAL;
    for (unsigned i = 0; i < x->nr_xcrs; i++)
        if (x->xcrs[i].xcr == 0) {
            u64 v = x->xcrs[i].value;
            if (!xcr0_is_valid(c, v))
                return -EINVAL;
            c->xcr0 = v;
        }
    mode_changed(c);
    return 0;
}

/* ---- debugregs, events, mp_state ----------------------------------------------------------------------------------------------- */

static void get_debugregs(struct vcpu *c, void *data)
{
    struct kvm_debugregs *d = data;
    memset(d, 0, sizeof *d);
    memcpy(d->db, c->dr, sizeof d->db);
    d->dr6 = c->dr6, d->dr7 = c->dr7;
    if (c->debug_pending && !c->shadow_ss) /* a #DB that comes next has its bits shown already */
        d->dr6 = (c->dr6 & ~15ull) | c->debug_pending;
}
static int set_debugregs(struct vcpu *c, const void *data, size_t size)
{
    const struct kvm_debugregs *d = data;
    (void)size;
    if (d->flags || d->dr6 >> 32 || d->dr7 >> 32)
        return -EINVAL;
    memcpy(c->dr, d->db, sizeof d->db);
    c->dr6 = d->dr6, c->dr7 = d->dr7;
    tlb_flush(c);
    cache_flush(c);
    return 0;
}

static void get_events(struct vcpu *c, void *data)
{
    struct kvm_vcpu_events *e = data;
    memset(e, 0, sizeof *e);
    e->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM; /* as KVM has them */
    e->interrupt.shadow = (c->shadow_sti ? KVM_X86_SHADOW_INT_STI : 0) | (c->shadow_ss ? KVM_X86_SHADOW_INT_MOV_SS : 0);
    e->nmi.pending = c->nmi_pending || atomic_load(&c->attention) & ATTENTION_NMI;
    e->nmi.masked = c->nmi_masked;
    e->nmi.injected = c->injected.nmi;
    e->sipi_vector = c->sipi_vector;
    if (c->injected.interrupt) {
        e->interrupt.injected = 1;
        e->interrupt.nr = c->injected.interrupt_vector;
        e->interrupt.soft = c->injected.soft;
    }
    if (c->injected.exception) {
        e->exception.injected = 1;
        e->exception.nr = c->injected.vector;
        e->exception.has_error_code = c->injected.has_error;
        e->exception.error_code = c->injected.error;
    } else if (c->debug_pending && c->shadow_ss) { /* it waits. KVM has no place for that, and no look at a payload without its flag */
        e->exception.pending = e->exception_has_payload = 1;
        e->exception.nr = VECTOR_DB;
        e->exception_payload = c->debug_pending;
    } else if (c->debug_pending) { /* a trap; KVM shows one that comes next as injected too */
        e->exception.injected = e->exception.pending = 1;
        e->exception.nr = VECTOR_DB;
    }
}
static int set_events(struct vcpu *c, const void *data, size_t size)
{
    const struct kvm_vcpu_events *e = data;
    (void)size;
    const u32 known = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW |
                      KVM_VCPUEVENT_VALID_SMM;
    if (e->flags & ~known || (e->flags & KVM_VCPUEVENT_VALID_SMM && (e->smi.smm || e->smi.pending)) || /* there is no SMM */
        (e->exception.injected && (e->exception.nr > 31 || e->exception.nr == VECTOR_NMI)))
        return -EINVAL;
    c->injected.exception = e->exception.injected;
    c->injected.vector = e->exception.nr;
    c->injected.has_error = e->exception.has_error_code;
    c->injected.error = e->exception.error_code;
    c->injected.interrupt = e->interrupt.injected;
    c->injected.interrupt_vector = e->interrupt.nr;
    c->injected.soft = e->interrupt.soft;
    c->injected.nmi = e->nmi.injected;
    if (e->exception.injected && e->exception.nr == VECTOR_DB && c->debug_pending)
        debug_status(c, c->debug_pending);
    bool waits = !e->exception.injected && e->exception.pending && e->exception.nr == VECTOR_DB && e->exception_has_payload &&
                 e->flags & KVM_VCPUEVENT_VALID_SHADOW && e->interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS;
    c->debug_pending = waits ? e->exception_payload & (15 | DR6_BS) : 0;
    if (e->flags & KVM_VCPUEVENT_VALID_NMI_PENDING) {
        c->nmi_pending = e->nmi.pending;
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_NMI);
    }
    c->nmi_masked = e->nmi.masked;
    if (e->flags & KVM_VCPUEVENT_VALID_SHADOW) {
        c->shadow_sti = e->interrupt.shadow & KVM_X86_SHADOW_INT_STI;
        c->shadow_ss = e->interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS;
    }
    if (e->flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR)
        c->sipi_vector = (u8)e->sipi_vector;
    return 0;
}

static void get_mp_state(struct vcpu *c, void *data) { *(u32 *)data = c->halted ? KVM_MP_STATE_HALTED : c->mp_state; }
static int set_mp_state(struct vcpu *c, const void *data, size_t size)
{
    u32 state;
    (void)size;
    memcpy(&state, data, sizeof state);
    /* Without a LAPIC nobody could wake it; and SIPI_RECEIVED lasts for no time at all. */
    if (state > KVM_MP_STATE_HALTED || (state != KVM_MP_STATE_RUNNABLE && !c->vm->irqchip))
        return -EINVAL;
    c->halted = state == KVM_MP_STATE_HALTED;
    c->mp_state = c->halted ? KVM_MP_STATE_RUNNABLE : state;
    return 0;
}

/* ---- Lists: msrs, cpuid ------------------------------------------------------------------------------------------------------------ */

static long get_msrs(struct vcpu *c, void *data, size_t size)
{
    struct kvm_msrs *m = data;
    size_t room = size > sizeof *m ? (size - sizeof *m) / sizeof *m->entries : 0, count = msr_values(c, room ? m->entries : NULL, room);
    if (count <= room) {
        m->nmsrs = (u32)count;
        m->pad = 0;
    }
    return (long)(sizeof *m + count * sizeof *m->entries);
}
static int set_msrs(struct vcpu *c, const void *data, size_t size)
{
    const struct kvm_msrs *m = data;
    if (size < sizeof *m || size != sizeof *m + (size_t)m->nmsrs * sizeof(struct kvm_msr_entry))
        return -EINVAL;
    struct kvm_msr_entry now[256];
    size_t count = msr_values(c, now, sizeof now / sizeof *now);
    /* What is so already stays so: to set some costs all translations and decoded code. */
#define STAYS(i) ((i) < count && (i) < sizeof now / sizeof *now && now[i].index == m->entries[i].index && \
                  now[i].data == m->entries[i].data && !msr_takes_anything(now[i].index))
    for (u32 i = 0; i < m->nmsrs; i++) { /* all or nothing */
        u64 old;
        if (STAYS(i))
            continue;
        if (vcpu_get_msr(c, m->entries[i].index, &old))
            return -EINVAL;
        if (msr_takes_anything(m->entries[i].index))
            continue;
        if (vcpu_set_msr(c, m->entries[i].index, m->entries[i].data))
            return -EINVAL;
        vcpu_set_msr(c, m->entries[i].index, old);
    }
    for (u32 i = 0; i < m->nmsrs; i++)
        if (!STAYS(i))
            vcpu_set_msr(c, m->entries[i].index, m->entries[i].data);
#undef STAYS
    return 0;
}

static long get_cpuid(struct vcpu *c, void *data, size_t size)
{
    size_t bytes = c->cpuid.count * sizeof *c->cpuid.entries, need = sizeof(struct kvm_cpuid2) + bytes;
    if (size >= need) {
        struct kvm_cpuid2 *k = data;
        k->nent = c->cpuid.count;
        k->padding = 0;
        memcpy(k->entries, c->cpuid.entries, bytes);
    }
    return (long)need;
}
static int set_cpuid(struct vcpu *c, const void *data, size_t size)
{
    const struct kvm_cpuid2 *k = data;
    size_t room = sizeof c->cpuid.entries / sizeof *c->cpuid.entries;
    if (size < sizeof *k || k->nent > room || size != sizeof *k + k->nent * sizeof *c->cpuid.entries)
        return -EINVAL;
    c->cpuid.count = k->nent;
    memcpy(c->cpuid.entries, k->entries, k->nent * sizeof *c->cpuid.entries);
    cpuid_changed(c);
    return 0;
}

/* ---- lapic ------------------------------------------------------------------------------------------------------------------------- */

static long get_lapic(struct vcpu *c, void *data, size_t size)
{
    if (!c->vm->irqchip)
        return -EOPNOTSUPP;
    chip_apply_lines(c->vm);
    if (size >= sizeof(struct kvm_lapic_state))
        irqchip_get_lapic(c->vm->irqchip, c->index, data, vm_time(c->vm));
    return sizeof(struct kvm_lapic_state);
}
static int set_lapic(struct vcpu *c, const void *data, size_t size)
{
    if (!c->vm->irqchip)
        return -EOPNOTSUPP;
    if (size != sizeof(struct kvm_lapic_state))
        return -EINVAL;
    return irqchip_set_lapic(c->vm->irqchip, c->index, data, vm_time(c->vm));
}

/* ---- By name ----------------------------------------------------------------------------------------------------------------------- */

static const struct state {
    const char *name;
    size_t size;              /* 0: varies */
    void (*get)(struct vcpu *, void *);
    long (*get_list)(struct vcpu *, void *, size_t);
    int (*set)(struct vcpu *, const void *, size_t);
} states[] = {
    {"regs", sizeof(struct kvm_regs), get_regs, NULL, set_regs},
    {"sregs", sizeof(struct kvm_sregs), get_sregs, NULL, set_sregs},
    {"fpu", sizeof(struct kvm_fpu), get_fpu, NULL, set_fpu},
    {"xsave", 4096, get_xsave, NULL, set_xsave},
    {"xcrs", sizeof(struct kvm_xcrs), get_xcrs, NULL, set_xcrs},
    {"debugregs", sizeof(struct kvm_debugregs), get_debugregs, NULL, set_debugregs},
    {"events", sizeof(struct kvm_vcpu_events), get_events, NULL, set_events},
    {"mp_state", sizeof(struct kvm_mp_state), get_mp_state, NULL, set_mp_state},
    {"msrs", 0, NULL, get_msrs, set_msrs},
    {"cpuid", 0, NULL, get_cpuid, set_cpuid},
    {"lapic", 0, NULL, get_lapic, set_lapic},
    {"progress", 0, NULL, get_progress, set_progress},
};

static const struct state *find(const char *name)
{
    for (size_t i = 0; i < sizeof states / sizeof *states; i++)
        if (!strcmp(states[i].name, name))
            return &states[i];
    return NULL;
}

/* Whether an instruction that has begun has its reads before it. */
static bool is_half_done(const struct vcpu *c) { return c->restart && (c->reading || c->input_ready); }

/* A read that waits for its data completes before state is set, with the bytes as they stand (engine/base.py). */
static void complete_read(struct vcpu *c)
{
    bool step = c->step, kicked = atomic_load(&c->attention) & ATTENTION_KICK;
    struct vcpu_exit exit = {EXIT_NONE};
    c->step = false;
    vcpu_clear_kick(c);
    for (unsigned i = 0; i < MMIO_PIECES + EXIT_DATA && is_half_done(c); i++)
        vcpu_run(c, 1, &exit);
    if (exit.reason == EXIT_MMIO && exit.write)
        c->stores_reported--; /* the next run tells */
    else if (exit.reason == EXIT_IO && exit.write)
        add_waiting(c, &exit);
    else if (exit.reason != EXIT_LIMIT)
        c->held = exit;
    c->data_size = 0;
    c->step = step;
    if (kicked)
        vcpu_kick(c);
}


long vcpu_get_state(struct vcpu *c, const char *name, void *data, size_t size)
{
    const struct state *s = find(name);
    if (!s)
        return -ENOENT;
    if (s->get_list)
        return s->get_list(c, data, size);
    if (size >= s->size)
        s->get(c, data);
    return (long)s->size;
}

int vcpu_set_state(struct vcpu *c, const char *name, const void *data, size_t size)
{
    const struct state *s = find(name);
    if (!s)
        return -ENOENT;
    if (s->size && size != s->size)
        return -EINVAL;
    if (s->set == set_progress) /* which says what of the present one is left: nothing */
        return s->set(c, data, size);
    if (is_half_done(c))
        complete_read(c);
    c->restart = c->reading = c->input_ready = false;
    c->reads = 0;
    c->caught_at = 0; /* it may fault for another reason now */
    return s->set(c, data, size);
}

/* ---- One at a time ------------------------------------------------------------------------------------------------------------ */

uint64_t vcpu_get_register(const struct vcpu *c, unsigned number) { return c->gpr[number]; }

uint64_t vcpu_code_address(const struct vcpu *c) { return code_linear(c, c->gpr[GPR_IP]); }
unsigned vcpu_alone_length(const struct vcpu *c) { return c->single[0].length; }

void vcpu_set_register(struct vcpu *c, unsigned number, uint64_t value)
{
    if (is_half_done(c))
        complete_read(c);
    c->restart = c->reading = c->input_ready = false;
    c->reads = 0;
    c->caught_at = 0;
    c->repeating = false;
    if (number == GPR_IP && c->gpr[GPR_IP] != value)
        c->debug_pending = 0;
    c->gpr[number] = value;
}

/* ---- Of a machine ------------------------------------------------------------------------------------------------------------------ */

enum { CHIPS = 3 }; /* of `irqchip`: 8259 master, slave, I/O APIC */

static int set_chips(struct irqchip *chip, const struct kvm_irqchip *in)
{
    struct kvm_irqchip old[CHIPS];
    for (unsigned i = 0; i < CHIPS; i++)
        if (in[i].chip_id != i)
            return -EINVAL;
    for (unsigned i = 0; i < CHIPS; i++) {
        old[i].chip_id = i;
        irqchip_get_chip(chip, &old[i]);
        int error = irqchip_set_chip(chip, &in[i]);
        if (error) { /* all or nothing */
            while (i-- > 0)
                irqchip_set_chip(chip, &old[i]);
            return error;
        }
    }
    return 0;
}

long vm_get_state(struct vm *vm, const char *name, void *data, size_t size)
{
    if (!strcmp(name, "clock")) {
        if (size >= sizeof(struct kvm_clock_data))
            *(struct kvm_clock_data *)data = (struct kvm_clock_data){.clock = vm_time(vm) + (u64)vm->clock_offset};
        return sizeof(struct kvm_clock_data);
    }
    if (!strcmp(name, "time"))
        return get_time(vm, data, size);
    if (!strcmp(name, "turns"))
        return get_turns(vm, data, size);
    if (!strcmp(name, "chips"))
        return get_chips(vm, data, size);
    if (strcmp(name, "irqchip") && strcmp(name, "pit"))
        return -ENOENT;
    if (!vm->irqchip)
        return -EOPNOTSUPP;
    chip_apply_lines(vm);
    if (!strcmp(name, "pit")) {
        if (size >= sizeof(struct kvm_pit_state2))
            irqchip_get_pit(vm->irqchip, data, vm_time(vm));
        return sizeof(struct kvm_pit_state2);
    }
    struct kvm_irqchip *out = data;
    for (unsigned i = 0; size >= CHIPS * sizeof *out && i < CHIPS; i++) {
        out[i] = (struct kvm_irqchip){.chip_id = i};
        irqchip_get_chip(vm->irqchip, &out[i]);
    }
    return CHIPS * sizeof *out;
}

int vm_set_state(struct vm *vm, const char *name, const void *data, size_t size)
{
    if (!strcmp(name, "clock")) {
        if (size != sizeof(struct kvm_clock_data))
            return -EINVAL;
        vm->clock_offset = (i64)(((const struct kvm_clock_data *)data)->clock - vm_time(vm));
        return 0;
    }
    if (!strcmp(name, "time"))
        return set_time(vm, data, size);
    if (!strcmp(name, "turns"))
        return set_turns(vm, data, size);
    if (!strcmp(name, "chips"))
        return set_chips_rest(vm, data, size);
    if (strcmp(name, "irqchip") && strcmp(name, "pit"))
        return -ENOENT;
    if (!vm->irqchip)
        return -EOPNOTSUPP;
    chip_apply_lines(vm);
    if (!strcmp(name, "pit")) /* its times are another clock's: the counters start afresh, as KVM_SET_PIT2 does */
        return size == sizeof(struct kvm_pit_state2) ? irqchip_set_pit(vm->irqchip, data, true, vm_time(vm)) : -EINVAL;
    return size == CHIPS * sizeof(struct kvm_irqchip) ? set_chips(vm->irqchip, data) : -EINVAL;
}
