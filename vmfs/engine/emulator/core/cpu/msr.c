/* Model-specific registers (Intel SDM 4 chapter 2): a row each. What has no row is #GP(0). They are those that KVM emulates, less
 * the paravirtual ones and those of features that are not there; a test compares them with KVM's. */
#include "irqchip.h"
#include "memory.h"
#include "opcodes.h"

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

/* Bits of IA32_MISC_ENABLE (table 2-2). No row of the core needs the others: there is no EIST, no thermal control. */
enum { FAST_STRINGS = 1 << 0, NO_BTS = 1 << 11, NO_PEBS = 1 << 12, MONITOR_FSM = 1 << 18, LIMIT_CPUID = 1 << 22, NO_XTPR = 1 << 23 };
#define NO_XD (1ull << 34)
enum { DEBUGCTL_LBR = 1 << 0 };
/* AMD's HWCR: McStatusWrEn and TscFreqSel; what is dropped are the flush filter, the TLB cache, IGNNE#. */
enum { HWCR_KEPT = 1 << 18 | 1 << 24, HWCR_IGNORED = 1 << 3 | 1 << 6 | 1 << 8 };

struct msr_row {
    u32 index;
    u16 offset;               /* in struct msr_state */
    u64 writable;             /* bits that may change; others: #GP */
    u64 ignored;              /* ... but these: a guest may write them, and they stay as they are */
    bool (*valid)(const struct vcpu *, u64); /* what else it may be; NULL: anything */
    enum feature feature;
};
#define FIELD_BUT(index, field, writable, ignored, valid, feature) \
    {index, offsetof(struct msr_state, field), writable, ignored, valid, FEATURE_##feature}
#define FIELD(index, field, writable, valid, feature) FIELD_BUT(index, field, writable, 0, valid, feature)
#define MTRR(n) \
    FIELD(0x200 + 2 * n, mtrr_base[n], 0xfffffffffffff0ff, is_mtrr_base, MTRR), \
    FIELD(0x201 + 2 * n, mtrr_mask[n], 0xfffffffffffff800, is_mtrr_mask, MTRR)
#define FIXED_MTRR(index, n) FIELD(index, mtrr_fixed[n], ~0ull, is_mtrr, MTRR)
static const struct msr_row rows[] = { /* in the order of their indices */
    FIELD(0x17, platform_id, 0, read_only, BASE),
    FIELD(0x1b, apic_base, 0, NULL, APIC),
    FIELD(0x8b, microcode, 0, NULL, BASE),
    FIELD(0xce, platform_info, 0, read_only, BASE),
    FIELD(0xfe, mtrr_cap, 0, read_only, MTRR),
    FIELD(0x10a, arch_capabilities, 0, read_only, ARCH_CAPABILITIES),
    FIELD(0x140, misc_features, 0, NULL, BASE),
    FIELD(0x174, sysenter_cs, 0xffffffff, NULL, SEP),
    FIELD(0x175, sysenter_esp, ~0ull, canonical_base, SEP),
    FIELD(0x176, sysenter_eip, ~0ull, canonical_base, SEP),
    FIELD(0x179, mcg_cap, 0, read_only, MCA),
    FIELD(0x17a, mcg_status, ~0ull, NULL, MCA),
    FIELD(0x1a0, misc_enable, FAST_STRINGS | MONITOR_FSM | LIMIT_CPUID | NO_XTPR | NO_XD, NULL, BASE),
    FIELD_BUT(0x1d9, debugctl, DEBUGCTL_BTF, DEBUGCTL_LBR, NULL, BASE), /* no last branches: as KVM without them */
    FIELD(0x1fc, power_control, ~0ull, NULL, BASE),
    MTRR(0), MTRR(1), MTRR(2), MTRR(3), MTRR(4), MTRR(5), MTRR(6), MTRR(7),
    FIXED_MTRR(0x250, 0), FIXED_MTRR(0x258, 1), FIXED_MTRR(0x259, 2), FIXED_MTRR(0x268, 3), FIXED_MTRR(0x269, 4),
    FIXED_MTRR(0x26a, 5), FIXED_MTRR(0x26b, 6), FIXED_MTRR(0x26c, 7), FIXED_MTRR(0x26d, 8), FIXED_MTRR(0x26e, 9),
    FIXED_MTRR(0x26f, 10),
    FIELD(0x277, pat, ~0ull, is_pat, PAT),
    FIELD(0x2ff, mtrr_def_type, 0xcff, is_mtrr_type, MTRR),
    FIELD(0xda0, xss, 0, NULL, XSAVES),
    FIELD(0xc0000081, star, ~0ull, NULL, SYSCALL),
    FIELD(0xc0000082, lstar, ~0ull, canonical_base, SYSCALL),
    FIELD(0xc0000083, cstar, ~0ull, canonical_base, SYSCALL),
    FIELD(0xc0000084, fmask, 0xffffffff, NULL, SYSCALL),
    FIELD(0xc0000102, kernel_gs_base, ~0ull, canonical_base, LM),
    FIELD(0xc0000103, tsc_aux, 0xffffffff, NULL, RDTSCP),
    FIELD_BUT(0xc0010015, hardware_configuration, HWCR_KEPT, HWCR_IGNORED, NULL, BASE),
};
enum { ROWS = sizeof rows / sizeof *rows };
enum {
    MSR_TSC = 0x10, MSR_APIC_BASE = 0x1b, MSR_TSC_ADJUST = 0x3b, MSR_UPDATE_TRIGGER = 0x79, MSR_MICROCODE = 0x8b,
    MSR_MISC_ENABLE = 0x1a0, MSR_MC0_CTL = 0x400, MSR_TSC_DEADLINE = 0x6e0, MSR_PATCH_LOADER = 0xc0010020,
    MSR_EFER = 0xc0000080, MSR_FS_BASE = 0xc0000100, MSR_GS_BASE = 0xc0000101,
};
static const struct { u32 index; enum feature feature; } special[] = {
    {MSR_TSC, FEATURE_TSC}, {MSR_TSC_ADJUST, FEATURE_TSC_ADJUST}, {MSR_EFER, FEATURE_BASE}, {MSR_FS_BASE, FEATURE_LM},
    {MSR_GS_BASE, FEATURE_LM}, {MSR_TSC_DEADLINE, FEATURE_TSC_DEADLINE},
};
enum { SPECIAL = sizeof special / sizeof *special };

/* What software looks at on some processors and nothing here has: always the value. */
enum writes { REFUSED, IGNORED, SAME_VALUE /* others are refused */ };
static const struct { u32 first, last; u64 value; enum writes writes; enum feature feature; } constants[] = {
    {0x0, 0x1, 0, REFUSED, FEATURE_MCE},                     /* P5_MC_ADDR, P5_MC_TYPE */
    {0x2a, 0x2a, 0, REFUSED, FEATURE_BASE},                  /* EBL_CR_POWERON */
    {0x2c, 0x2c, 1 << 24, REFUSED, FEATURE_BASE},            /* EBC_FREQUENCY_ID: a bus of 100 MHz */
    {0x34, 0x34, 0, REFUSED, FEATURE_BASE},                  /* SMI_COUNT */
    {0xc1, 0xc2, 0, IGNORED, FEATURE_BASE},                  /* PERFCTR */
    {0xcd, 0xcd, 3, REFUSED, FEATURE_BASE},                  /* FSB_FREQ */
    {0x11e, 0x11e, 0xbe702111, IGNORED, FEATURE_BASE},       /* BBL_CR_CTL3: the L2 cache is there and on */
    {0x186, 0x187, 0, IGNORED, FEATURE_BASE},                /* PERFEVTSEL */
    {0x198, 0x198, 4ull << 40 | 1000, REFUSED, FEATURE_BASE}, /* PERF_STATUS */
    {0x199, 0x199, 0, REFUSED, FEATURE_BASE},                /* PERF_CTL */
    {0x1db, 0x1de, 0, REFUSED, FEATURE_BASE},                /* the last branch, the last interrupt */
    {0x606, 0x606, 0, REFUSED, FEATURE_BASE},                /* RAPL: its unit, and what was used */
    {0x611, 0x611, 0, REFUSED, FEATURE_BASE}, {0x619, 0x619, 0, REFUSED, FEATURE_BASE},
    {0x639, 0x639, 0, REFUSED, FEATURE_BASE}, {0x641, 0x641, 0, REFUSED, FEATURE_BASE},
    {0xc0010000, 0xc0010007, 0, IGNORED, FEATURE_BASE},      /* AMD: counters */
    {0xc0010010, 0xc0010010, 0, REFUSED, FEATURE_BASE},      /* SYSCFG */
    {0xc001001b, 0xc001001b, 1 << 29, IGNORED, FEATURE_BASE}, /* CLK_CTL */
    {0xc001001f, 0xc001001f, 0, IGNORED, FEATURE_BASE},      /* NB_CFG */
    {0xc0010055, 0xc0010055, 0, REFUSED, FEATURE_BASE},      /* INT_PENDING */
    {0xc0010058, 0xc0010058, 0, SAME_VALUE, FEATURE_BASE},   /* MMIO_CONF_BASE: none */
    {0xc0010112, 0xc0010113, 0, REFUSED, FEATURE_BASE},      /* TSEG */
    {0xc0010117, 0xc0010117, 0, IGNORED, FEATURE_BASE},      /* VM_HSAVE_PA */
    {0xc0011022, 0xc0011023, 0, IGNORED, FEATURE_BASE},      /* DC_CFG, BU_CFG */
    {0xc001102a, 0xc001102a, 0, IGNORED, FEATURE_BASE}, {0xc001102c, 0xc001102c, 0, IGNORED, FEATURE_BASE},
};
enum { CONSTANTS = sizeof constants / sizeof *constants };
static bool is_constant(const struct vcpu *c, u32 index, u64 *value, enum writes *writes)
{
    for (unsigned i = 0; i < CONSTANTS; i++)
        if (index >= constants[i].first && index <= constants[i].last && has_feature(c, constants[i].feature)) {
            *value = constants[i].value;
            *writes = constants[i].writes;
            return true;
        }
    return false;
}

u64 read_tsc(struct vcpu *c, const struct record *r) { return core_now(c, r) + c->tsc_offset; }

static u64 *field(struct vcpu *c, const struct msr_row *row) { return (u64 *)((u8 *)&c->msr + row->offset); }

static const struct msr_row *find(const struct vcpu *c, u32 index)
{
    unsigned first = 0, end = ROWS;
    while (first < end) {
        unsigned middle = (first + end) / 2;
        if (rows[middle].index < index)
            first = middle + 1;
        else
            end = middle;
    }
    return first < ROWS && rows[first].index == index && has_feature(c, rows[first].feature) ? &rows[first] : NULL;
}

static bool is_special(const struct vcpu *c, u32 index)
{
    for (unsigned i = 0; i < SPECIAL; i++)
        if (special[i].index == index)
            return has_feature(c, special[i].feature) && (index != MSR_TSC_DEADLINE || c->vm->irqchip);
    return false;
}

static bool chip_owns(const struct vcpu *c, u32 index) { return c->vm->irqchip && irqchip_owns_msr(index); }

/* The banks that machine checks would be told in (3B 15.3.2). There is nothing that could fail, so they hold what is written. */
enum { MC_CTL, MC_STATUS };
static u64 *mc_bank(struct vcpu *c, u32 index)
{
    u32 n = index - MSR_MC0_CTL;
    return n < 4 * MC_BANKS && has_feature(c, FEATURE_MCA) ? &c->msr.mc_bank[n / 4][n % 4] : NULL;
}

/* CTL: all or nothing, but for two bits that are errata of AMD's. STATUS: software clears it. */
static bool write_mc_bank(struct vcpu *c, u32 index, u64 value, bool host)
{
    unsigned which = index % 4;
    if (which == MC_CTL && value && (value | 1 << 10 | 1) != ~0ull)
        return false;
    if (which == MC_STATUS && value && !host)
        return false;
    *mc_bank(c, index) = value;
    return true;
}

/* The features that IA32_MISC_ENABLE switches. */
bool has_nx(const struct vcpu *c) { return has_feature(c, FEATURE_NX) && !(c->msr.misc_enable & NO_XD); }
bool cpuid_is_limited(const struct vcpu *c) { return c->msr.misc_enable & LIMIT_CPUID; }

bool msr_read(struct vcpu *c, u32 index, u64 *value, bool host)
{
    (void)host;
    enum writes writes;
    if (chip_owns(c, index)) {
        u64 now = core_now(c, c->now);
        chips_lock(c->vm);
        bool done = !irqchip_read_msr(c->vm->irqchip, c->index, index, value, now);
        chips_unlock(c->vm);
        return done;
    }
    if (is_special(c, index)) {
        *value = index == MSR_TSC          ? read_tsc(c, c->now)
                 : index == MSR_TSC_ADJUST ? c->msr.tsc_adjust
                 : index == MSR_EFER       ? c->efer
                 : index == MSR_FS_BASE    ? c->seg[SEG_FS].base
                                           : c->seg[SEG_GS].base;
        return true;
    }
    const u64 *at = mc_bank(c, index);
    const struct msr_row *row = at ? NULL : find(c, index);
    if (row)
        at = field(c, row);
    if (at)
        *value = *at;
    return at || is_constant(c, index, value, &writes);
}

static bool write_efer(struct vcpu *c, u64 value, bool host)
{
    u64 valid = EFER_LMA | (has_feature(c, FEATURE_SYSCALL) ? EFER_SCE : 0) | (has_feature(c, FEATURE_LM) ? EFER_LME : 0) |
                (has_nx(c) ? EFER_NXE : 0);
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
        if (!canonical_base(c, value))
            return false;
        c->seg[index == MSR_FS_BASE ? SEG_FS : SEG_GS].base = value;
        segment_changed(c, index == MSR_FS_BASE ? SEG_FS : SEG_GS);
        return true;
    }
}

bool msr_takes_anything(u32 index)
{
    return index == MSR_TSC_DEADLINE;
}

bool msr_write(struct vcpu *c, u32 index, u64 value, bool host)
{
    if (chip_owns(c, index)) {
        u64 now = core_now(c, c->now);
        chips_lock(c->vm);
        bool done = host && index == MSR_APIC_BASE ? !irqchip_set_apic_base(c->vm->irqchip, c->index, value, now)
                                                   : !irqchip_write_msr(c->vm->irqchip, c->index, index, value, now);
        chips_unlock(c->vm);
        if (done && !host)
            chip_notify(c);
        return done;
    }
    if (is_special(c, index))
        return write_special(c, index, value, host);
    if ((index == MSR_UPDATE_TRIGGER || index == MSR_PATCH_LOADER) && !host)
        return true; /* an update that the processor has already */
    if (mc_bank(c, index))
        return write_mc_bank(c, index, value, host);
    const struct msr_row *row = find(c, index);
    u64 is;
    enum writes writes;
    if (!row)
        return is_constant(c, index, &is, &writes) && (writes == IGNORED || (value == is && (host || writes == SAME_VALUE)));
    is = *field(c, row);
    if (index == MSR_MICROCODE && !host)
        return true; /* 3A 9.11.7.1: software writes 0 before it asks with CPUID */
    if (host && value == is)
        return true;
    if (!host)
        value = (value & ~row->ignored) | (is & row->ignored);
    u64 writable = row->writable | (host && index == MSR_MISC_ENABLE ? NO_BTS | NO_PEBS : 0); /* other engines may have them */
    if ((value ^ is) & ~writable || (row->valid && !row->valid(c, value)))
        return false;
    *field(c, row) = value;
    return true;
}

static size_t add(struct vcpu *c, struct kvm_msr_entry *entries, size_t n, size_t room, u32 index, const u64 *at)
{
    u64 value = at ? *at : 0;
    if (n < room) {
        if (!at)
            msr_read(c, index, &value, true);
        entries[n] = (struct kvm_msr_entry){.index = index, .data = value};
    }
    return n + 1;
}

/* All that there are, with their values; at most `room` of them. Returns how many there are. */
size_t msr_values(struct vcpu *c, struct kvm_msr_entry *entries, size_t room)
{
    size_t n = 0;
    c->now = NULL;
    if (room)
        clock_enter(c);
    for (unsigned i = 0; i < SPECIAL; i++)
        if (is_special(c, special[i].index))
            n = add(c, entries, n, room, special[i].index, NULL);
    for (unsigned i = 0; i < ROWS; i++)
        if (has_feature(c, rows[i].feature))
            n = add(c, entries, n, room, rows[i].index, chip_owns(c, rows[i].index) ? NULL : field(c, &rows[i]));
    for (unsigned i = 0; i < 4 * MC_BANKS && has_feature(c, FEATURE_MCA); i++)
        n = add(c, entries, n, room, MSR_MC0_CTL + i, mc_bank(c, MSR_MC0_CTL + i));
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

/* ---- What there is not --------------------------------------------------------------------------------------------------------- */

/* The one used the longest time ago makes room. */
void msr_note_unclaimed(struct vcpu *c, const struct record *r, u32 index, bool write)
{
    struct vcpu_unclaimed_msr use = {.index = index}, *all = c->unclaimed_msrs;
    unsigned at = 0;
    while (at < c->unclaimed_msr_count && all[at].index != index)
        at++;
    if (at < c->unclaimed_msr_count)
        use = all[at];
    else if (at == UNCLAIMED_MSRS)
        at = 0;
    else
        c->unclaimed_msr_count++;
    memmove(all + at, all + at + 1, (c->unclaimed_msr_count - 1 - at) * sizeof *all);
    if (write)
        use.writes++;
    else
        use.reads++;
    use.rip = ip_mask(c, c->gpr[GPR_IP] + r->at);
    all[c->unclaimed_msr_count - 1] = use;
}

size_t vcpu_unclaimed_msrs(const struct vcpu *c, const struct vcpu_unclaimed_msr **msrs)
{
    *msrs = c->unclaimed_msrs;
    return c->unclaimed_msr_count;
}
