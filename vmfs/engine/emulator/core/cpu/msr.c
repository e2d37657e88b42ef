/* Model-specific registers (Intel SDM 4 chapter 2): a row each. What has no row is #GP(0). */
#include "irqchip.h"
#include "memory.h"
#include "opcodes.h"

static bool is_canonical(const struct vcpu *c, u64 v) { return canonical(c, v); }
/* Memory types: UC 0, WC 1, WT 4, WP 5, WB 6, and in the PAT UC- 7 (3A 11.11.2.1, 11.12.2). */
static bool memory_types(u64 value, u32 valid)
{
    for (unsigned i = 0; i < 64; i += 8)
        if ((value >> i & 0xff) > 7 || !(valid >> (value >> i & 7) & 1))
            return false;
    return true;
}
enum { MTRR_TYPES = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6, PAT_TYPES = MTRR_TYPES | 1 << 7 };
static bool is_pat(const struct vcpu *c, u64 v) { return memory_types(v, PAT_TYPES); }
static bool is_mtrr(const struct vcpu *c, u64 v) { return memory_types(v, MTRR_TYPES); }
static bool is_mtrr_type(const struct vcpu *c, u64 v) { (void)c; return memory_types(v & 0xff, MTRR_TYPES); }
static bool is_mtrr_base(const struct vcpu *c, u64 v) { return !(v >> c->physical_bits) && memory_types(v & 0xff, MTRR_TYPES); }
static bool is_mtrr_mask(const struct vcpu *c, u64 v) { return !(v >> c->physical_bits); }

static bool read_only(const struct vcpu *c, u64 v) { (void)c, (void)v; return false; }

struct msr_row {
    u32 index;
    u16 offset;               /* in struct msr_state */
    u64 writable;             /* bits that may change; others: #GP */
    bool (*valid)(const struct vcpu *, u64); /* what else it may be; NULL: anything */
    enum feature feature;
};
#define FIELD(index, field, writable, valid, feature) \
    {index, offsetof(struct msr_state, field), writable, valid, FEATURE_##feature}
#define MTRR(n) \
    FIELD(0x200 + 2 * n, mtrr_base[n], 0xfffffffffffff0ff, is_mtrr_base, MTRR), \
    FIELD(0x201 + 2 * n, mtrr_mask[n], 0xfffffffffffff800, is_mtrr_mask, MTRR)
#define FIXED_MTRR(index, n) FIELD(index, mtrr_fixed[n], ~0ull, is_mtrr, MTRR)
static const struct msr_row rows[] = {
    FIELD(0x17, platform_id, 0, read_only, BASE),
    FIELD(0x1b, apic_base, 0, NULL, APIC),
    FIELD(0x8b, microcode, 0, NULL, BASE),
    FIELD(0xce, platform_info, 0, read_only, BASE),
    FIELD(0xfe, mtrr_cap, 0, read_only, MTRR),
    FIELD(0x10a, arch_capabilities, 0, read_only, ARCH_CAPABILITIES),
    FIELD(0x174, sysenter_cs, 0xffffffff, NULL, SEP),
    FIELD(0x175, sysenter_esp, ~0ull, is_canonical, SEP),
    FIELD(0x176, sysenter_eip, ~0ull, is_canonical, SEP),
    FIELD(0x1a0, misc_enable, 1, NULL, BASE),
    FIELD(0x1d9, debugctl, DEBUGCTL_BTF, NULL, BASE),
    MTRR(0), MTRR(1), MTRR(2), MTRR(3), MTRR(4), MTRR(5), MTRR(6), MTRR(7),
    FIXED_MTRR(0x250, 0), FIXED_MTRR(0x258, 1), FIXED_MTRR(0x259, 2), FIXED_MTRR(0x268, 3), FIXED_MTRR(0x269, 4),
    FIXED_MTRR(0x26a, 5), FIXED_MTRR(0x26b, 6), FIXED_MTRR(0x26c, 7), FIXED_MTRR(0x26d, 8), FIXED_MTRR(0x26e, 9),
    FIXED_MTRR(0x26f, 10),
    FIELD(0x277, pat, ~0ull, is_pat, PAT),
    FIELD(0x2ff, mtrr_def_type, 0xcff, is_mtrr_type, MTRR),
    FIELD(0xda0, xss, 0, NULL, XSAVES),
    FIELD(0xc0000081, star, ~0ull, NULL, SYSCALL),
    FIELD(0xc0000082, lstar, ~0ull, is_canonical, SYSCALL),
    FIELD(0xc0000083, cstar, ~0ull, is_canonical, SYSCALL),
    FIELD(0xc0000084, fmask, 0xffffffff, NULL, SYSCALL),
    FIELD(0xc0000102, kernel_gs_base, ~0ull, is_canonical, LM),
    FIELD(0xc0000103, tsc_aux, 0xffffffff, NULL, RDTSCP),
};
enum { ROWS = sizeof rows / sizeof *rows };
enum {
    MSR_TSC = 0x10, MSR_APIC_BASE = 0x1b, MSR_TSC_ADJUST = 0x3b, MSR_MICROCODE = 0x8b, MSR_TSC_DEADLINE = 0x6e0,
    MSR_EFER = 0xc0000080, MSR_FS_BASE = 0xc0000100, MSR_GS_BASE = 0xc0000101,
};
static const struct { u32 index; enum feature feature; } special[] = {
    {MSR_TSC, FEATURE_TSC}, {MSR_TSC_ADJUST, FEATURE_TSC_ADJUST}, {MSR_EFER, FEATURE_BASE}, {MSR_FS_BASE, FEATURE_LM},
    {MSR_GS_BASE, FEATURE_LM}, {MSR_TSC_DEADLINE, FEATURE_TSC_DEADLINE},
};
enum { SPECIAL = sizeof special / sizeof *special };

u64 read_tsc(struct vcpu *c, const struct record *r) { return core_now(c, r) + c->tsc_offset; }

static u64 *field(struct vcpu *c, const struct msr_row *row) { return (u64 *)((u8 *)&c->msr + row->offset); }

static const struct msr_row *find(const struct vcpu *c, u32 index)
{
    for (unsigned i = 0; i < ROWS; i++)
        if (rows[i].index == index)
            return has_feature(c, rows[i].feature) ? &rows[i] : NULL;
    return NULL;
}

static bool is_special(const struct vcpu *c, u32 index)
{
    for (unsigned i = 0; i < SPECIAL; i++)
        if (special[i].index == index)
            return has_feature(c, special[i].feature) && (index != MSR_TSC_DEADLINE || c->vm->irqchip);
    return false;
}

static bool chip_owns(const struct vcpu *c, u32 index) { return c->vm->irqchip && irqchip_owns_msr(index); }

bool msr_read(struct vcpu *c, u32 index, u64 *value, bool host)
{
    (void)host;
    if (chip_owns(c, index))
        return !irqchip_read_msr(c->vm->irqchip, c->index, index, value, core_now(c, c->now));
    if (is_special(c, index)) {
        *value = index == MSR_TSC          ? read_tsc(c, c->now)
                 : index == MSR_TSC_ADJUST ? c->msr.tsc_adjust
                 : index == MSR_EFER       ? c->efer
                 : index == MSR_FS_BASE    ? c->seg[SEG_FS].base
                                           : c->seg[SEG_GS].base;
        return true;
    }
    const struct msr_row *row = find(c, index);
    if (row)
        *value = *field(c, row);
    return row;
}

static bool write_efer(struct vcpu *c, u64 value, bool host)
{
    u64 valid = EFER_LMA | (has_feature(c, FEATURE_SYSCALL) ? EFER_SCE : 0) | (has_feature(c, FEATURE_LM) ? EFER_LME : 0) |
                (has_feature(c, FEATURE_NX) ? EFER_NXE : 0);
    if (value & ~valid || (!host && (value ^ c->efer) & EFER_LME && c->cr0 & CR0_PG))
        return false;
    c->efer = host ? value : (value & ~(u64)EFER_LMA) | (c->efer & EFER_LMA);
    mode_changed(c);
    tlb_flush(c);
    return true;
}

static bool write_special(struct vcpu *c, u32 index, u64 value, bool host)
{
    u64 delta;
    switch (index) {
    case MSR_TSC: /* 3B 17.17.3: what it adds is added to IA32_TSC_ADJUST, and the other way round */
        delta = value - read_tsc(c, c->now);
        c->msr.tsc_adjust += host ? 0 : delta;
        set_tsc_offset(c, c->tsc_offset + delta);
        return true;
    case MSR_TSC_ADJUST:
        delta = value - c->msr.tsc_adjust;
        c->msr.tsc_adjust = value;
        if (!host)
            set_tsc_offset(c, c->tsc_offset + delta);
        return true;
    case MSR_EFER:
        return write_efer(c, value, host);
    default:
        if (!canonical(c, value))
            return false;
        c->seg[index == MSR_FS_BASE ? SEG_FS : SEG_GS].base = value;
        segment_changed(c, index == MSR_FS_BASE ? SEG_FS : SEG_GS);
        return true;
    }
}

bool msr_write(struct vcpu *c, u32 index, u64 value, bool host)
{
    if (chip_owns(c, index)) {
        u64 now = core_now(c, c->now);
        bool done = host && index == MSR_APIC_BASE ? !irqchip_set_apic_base(c->vm->irqchip, c->index, value, now)
                                                   : !irqchip_write_msr(c->vm->irqchip, c->index, index, value, now);
        if (done && !host)
            chip_notify(c);
        return done;
    }
    if (is_special(c, index))
        return write_special(c, index, value, host);
    const struct msr_row *row = find(c, index);
    if (!row)
        return false;
    if (index == MSR_MICROCODE && !host)
        return true; /* 3A 9.11.7.1: software writes 0 before it asks with CPUID */
    if (host && value == *field(c, row))
        return true;
    if ((value ^ *field(c, row)) & ~row->writable || (row->valid && !row->valid(c, value)))
        return false;
    *field(c, row) = value;
    return true;
}

size_t msr_list(struct vcpu *c, u32 *indices, size_t room)
{
    size_t n = 0;
    for (unsigned i = 0; i < SPECIAL && n < room; i++)
        if (is_special(c, special[i].index))
            indices[n++] = special[i].index;
    for (unsigned i = 0; i < ROWS && n < room; i++)
        if (find(c, rows[i].index))
            indices[n++] = rows[i].index;
    return n;
}

int vcpu_get_msr(struct vcpu *c, uint32_t index, uint64_t *value)
{
    c->now = NULL;
    clock_enter(c);
    return msr_read(c, index, value, true) ? 0 : -22;
}
int vcpu_set_msr(struct vcpu *c, uint32_t index, uint64_t value)
{
    c->now = NULL;
    clock_enter(c);
    return msr_write(c, index, value, true) ? 0 : -22;
}
