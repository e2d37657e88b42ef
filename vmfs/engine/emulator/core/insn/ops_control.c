/* Control and debug registers, MSRs, time, the TLB, CPUID (Intel SDM 2, by instruction; 3A 2.5, 4.10, 17.2). */
#include "irqchip.h"
#include "opcodes.h"
#include "transfer.h"

/* Checked by the handler and not by the row where #UD comes before #GP. */
static void need_cpl0(struct vcpu *c, const struct record *r)
{
    if (c->cpl)
        raise_error(c, r, VECTOR_GP, 0);
}

/* ---- CR0 ------------------------------------------------------------------------------------------------------------------------ */

enum { CR0_VALID = CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD };
#define CR0_ALL (CR0_VALID | (u64)CR0_PG)

static void set_cr0(struct vcpu *c, const struct record *r, u64 value)
{
    c->now = r;
    if (value >> 32)
        raise_gp(c, 0);
    value = (value & CR0_ALL) | CR0_ET;
    u64 changed = value ^ c->cr0;
    bool paging = value & CR0_PG;
    if ((paging && !(value & CR0_PE)) || (value & CR0_NW && !(value & CR0_CD)))
        raise_gp(c, 0);
    u64 efer = c->efer;
    if (changed & CR0_PG) {
        if (paging && efer & EFER_LME) {
            if (!(c->cr4 & CR4_PAE) || c->seg[SEG_CS].attributes & ATTR_L || !(c->seg[SEG_TR].attributes & 8))
                raise_gp(c, 0);
            efer |= EFER_LMA;
        } else if (!paging) {
            if (c->key & KEY_CODE64 || c->cr4 & CR4_PCIDE)
                raise_gp(c, 0);
            efer &= ~(u64)EFER_LMA;
        }
    }
    if (paging && c->cr4 & CR4_PAE && !(efer & EFER_LMA) && changed & (CR0_PG | CR0_CD | CR0_NW) &&
        !load_pdptrs(c, c->cr3))
        raise_gp(c, 0);
    c->cr0 = value;
    c->efer = efer;
    if (changed & CR0_PE && !(value & CR0_PE))
        set_cpl(c, 0);
    mode_changed(c);
    if (changed & (CR0_PG | CR0_PE | CR0_WP))
        tlb_flush(c);
}

OP(op_lmsw)
{
    c->now = r;
    u64 value = r->prefix & PREFIX_REGISTER ? R16(c, r->rm) : mem_load(c, r, 2);
    set_cr0(c, r, (c->cr0 & ~(u64)(CR0_MP | CR0_EM | CR0_TS)) | (value & 15)); /* sets PE, never clears it */
    leave(c, r);
}
HANDLER(lmsw);

OP(op_clts)
{
    c->cr0 &= ~(u64)CR0_TS;
    mode_changed(c);
    leave(c, r);
}
HANDLER(clts);

/* ---- CR3, CR4, CR8 ------------------------------------------------------------------------------------------------------------------ */

static void set_cr3(struct vcpu *c, const struct record *r, u64 value)
{
    c->now = r;
    if (c->efer & EFER_LMA) {
        if (c->cr4 & CR4_PCIDE)
            value &= ~(1ull << 63); /* "keep what is cached": it need not be kept (4.10.4.1) */
        if (value >> c->physical_bits)
            raise_gp(c, 0);
    } else if (c->cr0 & CR0_PG && c->cr4 & CR4_PAE && !load_pdptrs(c, value)) {
        raise_gp(c, 0);
    }
    if (c->cr3 != value)
        stops_reach_cr3(c);
    c->cr3 = value;
    tlb_flush_local(c);
}

/* The bits that may be set: the features that CPUID shows. */
u64 cr4_valid(const struct vcpu *c)
{
    static const struct { u64 bits; enum feature feature; } features[] = {
        {CR4_MCE, FEATURE_MCE}, {CR4_OSFXSR, FEATURE_FXSR}, {CR4_OSXMMEXCPT, FEATURE_SSE}, {CR4_UMIP, FEATURE_UMIP},
        {CR4_LA57, FEATURE_LA57},
        {CR4_FSGSBASE, FEATURE_FSGSBASE}, {CR4_PCIDE, FEATURE_PCID}, {CR4_OSXSAVE, FEATURE_XSAVE},
        {CR4_SMEP, FEATURE_SMEP}, {CR4_SMAP, FEATURE_SMAP}, {CR4_PKE, FEATURE_PKU},
    };
    u64 valid = CR4_VME | CR4_PVI | CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCE;
    for (unsigned i = 0; i < sizeof features / sizeof *features; i++)
        if (has_feature(c, features[i].feature))
            valid |= features[i].bits;
    return valid;
}

static void set_cr4(struct vcpu *c, const struct record *r, u64 value)
{
    enum { PAGING = CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_LA57 | CR4_PCIDE };
    c->now = r;
    u64 changed = value ^ c->cr4;
    bool long_mode = c->efer & EFER_LMA;
    if (value & ~cr4_valid(c) || (long_mode && changed & (CR4_PAE | CR4_LA57)))
        raise_gp(c, 0);
    if (changed & value & CR4_PCIDE && (!long_mode || c->cr3 & 0xfff))
        raise_gp(c, 0);
    if (c->cr0 & CR0_PG && value & CR4_PAE && !long_mode && changed & (CR4_PGE | CR4_PSE | CR4_PAE | CR4_SMEP) &&
        !load_pdptrs(c, c->cr3)) /* 4.4.1 */
        raise_gp(c, 0);
    c->cr4 = value;
    mode_changed(c);
    if (changed & PAGING)
        tlb_flush(c);
}

static void set_cr8(struct vcpu *c, const struct record *r, u64 value)
{
    if (value > 15)
        raise_error(c, r, VECTOR_GP, 0);
    c->cr8 = value;
    if (!c->vm->irqchip)
        return;
    chips_lock(c->vm);
    irqchip_set_cr8(c->vm->irqchip, c->index, value);
    chips_unlock(c->vm);
}
static u64 get_cr8(const struct vcpu *c)
{
    return c->vm->irqchip ? irqchip_get_cr8(c->vm->irqchip, c->index) : c->cr8;
}

static unsigned register_width(const struct vcpu *c) { return c->key & KEY_CODE64 ? 64 : 32; }

OP(op_mov_R_C)
{
    u64 value;
    switch (r->reg) {
    case 0: value = c->cr0; break;
    case 2: value = c->cr2; break;
    case 3: value = c->cr3; break;
    case 4: value = c->cr4; break;
    case 8: value = get_cr8(c); break;
    default: raise_fault(c, r, VECTOR_UD);
    }
    need_cpl0(c, r);
    set_reg(c, r->rm, register_width(c), value);
    NEXT();
}
HANDLER(mov_R_C);

OP(op_mov_C_R)
{
    u64 value = get_reg(c, r->rm, register_width(c));
    if (r->reg != 8 && (r->reg > 4 || r->reg == 1))
        raise_fault(c, r, VECTOR_UD);
    need_cpl0(c, r);
    switch (r->reg) {
    case 0: set_cr0(c, r, value); break;
    case 2: c->cr2 = value; break;
    case 3: set_cr3(c, r, value); break;
    case 4: set_cr4(c, r, value); break;
    default: set_cr8(c, r, value); break;
    }
    leave(c, r);
}
HANDLER(mov_C_R);

/* ---- Debug registers (3B 17.2) ------------------------------------------------------------------------------------------------ */

/* The number that an encoding has; what MOV DR checks, in its order. */
static unsigned debug_register(struct vcpu *c, const struct record *r)
{
    unsigned n = r->reg;
    if (n > 7 || ((n == 4 || n == 5) && c->cr4 & CR4_DE))
        raise_fault(c, r, VECTOR_UD);
    need_cpl0(c, r);
    if (c->dr7 & DR7_GD) {
        debug_status(c, DR6_BD);
        raise_fault(c, r, VECTOR_DB);
    }
    return n == 4 || n == 5 ? n + 2 : n;
}

OP(op_mov_R_D)
{
    unsigned n = debug_register(c, r);
    set_reg(c, r->rm, register_width(c), n == 6 ? c->dr6 : n == 7 ? c->dr7 : c->dr[n]);
    NEXT();
}
HANDLER(mov_R_D);

OP(op_mov_D_R)
{
    unsigned n = debug_register(c, r);
    u64 value = get_reg(c, r->rm, register_width(c));
    if (n >= 6 && value >> 32)
        raise_error(c, r, VECTOR_GP, 0);
    leave(c, r);
    if (n == 6) {
        c->dr6 = (value & 0xe00f) | 0xffff0ff0;
        return;
    }
    bool was = c->dr7 & 0xff;
    if (n == 7)
        c->dr7 = (value & 0xffff23ff) | 0x400;
    else
        c->dr[n] = value;
    if (was || c->dr7 & 0xff) { /* blocks end at breakpoints; the TLB keeps watched pages off the fast path */
        cache_flush(c);
        tlb_flush(c);
    }
}
HANDLER(mov_D_R);

/* ---- The TLB ---------------------------------------------------------------------------------------------------------------------- */

OP(op_invlpg)
{
    u64 linear = (c->check[r->seg].base + offset_of(c, r)) & c->linear_mask;
    tlb_flush_page(c, linear);
    leave(c, r);
}
HANDLER(invlpg);

OP(op_invpcid)
{
    enum { ADDRESS, SINGLE, ALL_GLOBAL, ALL };
    u64 type = get_reg(c, r->reg, register_width(c)), at = mem_linear(c, r, 16, ACCESS_READ);
    u64 pcid = linear_load(c, at, 8), linear = linear_load(c, (at + 8) & c->linear_mask, 8);
    if (type > ALL || pcid >> 12)
        raise_gp(c, 0);
    if ((type == ADDRESS || type == SINGLE) && pcid && !(c->cr4 & CR4_PCIDE))
        raise_gp(c, 0);
    if (type == ADDRESS && !canonical_base(c, linear))
        raise_gp(c, 0);
    if (type == ADDRESS)
        tlb_flush_page(c, linear); /* the TLB holds the current PCID only */
    else if (type == ALL_GLOBAL)
        tlb_flush(c);
    else
        tlb_flush_local(c);
    leave(c, r);
}
HANDLER(invpcid);

OP(op_nothing) { NEXT(); } /* INVD, WBINVD: memory is always coherent */
HANDLER(nothing);

/* ---- MSRs, time, CPUID ------------------------------------------------------------------------------------------------------------ */

static void set_edx_eax(struct vcpu *c, u64 value)
{
    c->gpr[RAX] = (u32)value;
    c->gpr[RDX] = value >> 32;
}

OP(op_rdmsr)
{
    u64 value;
    c->now = r;
    if (!msr_read(c, (u32)c->gpr[RCX], &value, false)) {
        msr_note_unclaimed(c, r, (u32)c->gpr[RCX], false);
        raise_gp(c, 0);
    }
    set_edx_eax(c, value);
    leave(c, r);
}
HANDLER(rdmsr);

OP(op_wrmsr)
{
    c->now = r;
    if (!msr_write(c, (u32)c->gpr[RCX], c->gpr[RDX] << 32 | (u32)c->gpr[RAX], false)) {
        u64 value;
        if (!msr_read(c, (u32)c->gpr[RCX], &value, false)) /* else it is there, and does not take the value */
            msr_note_unclaimed(c, r, (u32)c->gpr[RCX], true);
        raise_gp(c, 0);
    }
    leave(c, r);
}
HANDLER(wrmsr);

static void check_time(struct vcpu *c, const struct record *r)
{
    c->now = r;
    if (c->cr4 & CR4_TSD && c->cpl)
        raise_gp(c, 0);
}
OP(op_rdtsc)
{
    check_time(c, r);
    set_edx_eax(c, read_tsc(c, r));
    NEXT();
}
HANDLER(rdtsc);
OP(op_rdtscp)
{
    check_time(c, r);
    set_edx_eax(c, read_tsc(c, r));
    c->gpr[RCX] = (u32)c->msr.tsc_aux;
    NEXT();
}
HANDLER(rdtscp);
OP(op_rdpid)
{
    set_reg(c, r->rm, register_width(c), c->msr.tsc_aux);
    NEXT();
}
HANDLER(rdpid);

/* No performance counters: no index is valid. */
OP(op_rdpmc) { raise_error(c, r, VECTOR_GP, 0); }
HANDLER(rdpmc);

OP(op_cpuid)
{
    u32 out[4];
    cpuid(c, (u32)c->gpr[RAX], (u32)c->gpr[RCX], out);
    c->gpr[RAX] = out[0];
    c->gpr[RBX] = out[1];
    c->gpr[RCX] = out[2];
    c->gpr[RDX] = out[3];
    leave(c, r);
}
HANDLER(cpuid);

/* ---- Rights of pages ---------------------------------------------------------------------------------------------------------------- */

static void set_ac(struct vcpu *c, const struct record *r, bool ac)
{
    if (c->cpl || c->key & KEY_V86)
        raise_fault(c, r, VECTOR_UD);
    c->rflags = ac ? c->rflags | FLAG_AC : c->rflags & ~(u64)FLAG_AC;
    flags_changed(c);
}
OP(op_clac)
{
    set_ac(c, r, false);
    NEXT();
}
HANDLER(clac);
OP(op_stac)
{
    set_ac(c, r, true);
    NEXT();
}
HANDLER(stac);

static void check_pkru(struct vcpu *c, const struct record *r)
{
    if (!(c->cr4 & CR4_PKE))
        raise_fault(c, r, VECTOR_UD);
    if ((u32)c->gpr[RCX])
        raise_error(c, r, VECTOR_GP, 0);
}
OP(op_rdpkru)
{
    check_pkru(c, r);
    set_edx_eax(c, c->pkru);
    NEXT();
}
HANDLER(rdpkru);
OP(op_wrpkru)
{
    check_pkru(c, r);
    if ((u32)c->gpr[RDX])
        raise_error(c, r, VECTOR_GP, 0);
    c->pkru = (u32)c->gpr[RAX];
    tlb_flush(c); /* the TLB holds rights */
    leave(c, r);
}
HANDLER(wrpkru);
