/* CPUID: what it tells, and the features that follow from it (Intel SDM 2A CPUID). */
#include "irqchip.h"
#include "sse.h"

/* Only what the core does: a feature bit here is a promise. Leaves: function, index, significant index. */
static const struct kvm_cpuid_entry2 defaults[] = {
    {.function = 0, .eax = 0x16, .ebx = 0x756e6547, .ecx = 0x6c65746e, .edx = 0x49656e69}, /* GenuineIntel */
    {.function = 1, .eax = 0x000006f1, .ebx = 0x00010800,
     .ecx = 1u << 0 | 1u << 1 | 1u << 9 | 1u << 12 | 1u << 13 | 1u << 17 | 1u << 19 | 1u << 20 | 1u << 21 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25 | 1u << 26 |
            1u << 28 | 1u << 29 | 1u << 30 | 1u << 31 /* hypervisor */,
     .edx = 0x0f8bfbff /* no HTT: one CPU */},
    {.function = 6, .eax = 1u << 2}, /* the APIC timer never stops */
    {.function = 7, .index = 0, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .ebx = 1u << 0 | 1u << 1 | 1u << 3 | 1u << 5 | 1u << 7 | 1u << 8 |
     1u << 9 | 1u << 10 | 1u << 18 | 1u << 19 | 1u << 20 | 1u << 23 | 1u << 24 | 1u << 29, .ecx = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 9 | 1u << 10 | 1u << 16 | 1u << 22, .edx = 1u << 29},
    /* Topology: one package with one CPU, ids for CORE_VCPUS. EDX follows the CPU. A machine of more sets its own. */
    {.function = 0xb, .index = 0, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .ebx = 1, .ecx = 0x100},
    {.function = 0xb, .index = 1, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 6, .ebx = 1, .ecx = 0x201},
    /* XSAVE: x87, SSE, AVX, PKRU; offsets as in ops_sse_state.c. EBX of the first two follows XCR0. */
    {.function = 0xd, .index = 0, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 0x207, .ecx = 2696},
    {.function = 0xd, .index = 1, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 1u << 0 | 1u << 1 | 1u << 2 | 1u << 3},
    {.function = 0xd, .index = 2, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 256, .ebx = 576},
    {.function = 0xd, .index = 9, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 8, .ebx = 2688},
    {.function = 0x15, .eax = 1, .ebx = 1, .ecx = 1000000000}, /* the crystal, so the APIC timer, and the TSC: 1 GHz */
    {.function = 0x16, .eax = 1000, .ebx = 1000, .ecx = 100},
    {.function = 0x40000000, .eax = 0x40000010, .ebx = 0x73666d76, .ecx = 0x73666d76, .edx = 0x73666d76}, /* "vmfs" */
    {.function = 0x40000010, .eax = 1000000, .ebx = 1000000}, /* kHz: TSC, APIC timer */
    {.function = 0x80000000, .eax = 0x80000008},
    {.function = 0x80000001, .ecx = 1u << 0 | 1u << 5, .edx = 1u << 11 | 1u << 20 | 1u << 26 | 1u << 27 | 1u << 29},
    {.function = 0x80000002, .eax = 0x73666d76}, /* the brand string: "vmfs" */
    {.function = 0x80000003},
    {.function = 0x80000004},
    {.function = 0x80000007, .edx = 1u << 8}, /* the TSC never changes its rate */
    {.function = 0x80000008, .eax = 0x3928}, /* 40 physical, 57 linear address bits */
};

/* Where CPUID has a feature: 0DH in its second leaf. */
static const struct feature_bit { u32 leaf; u8 reg, bit; } feature_bits[] = {
#define X(name, leaf, reg, bit) {leaf, reg, bit},
    FEATURES(X)
#undef X
};

/* Instructions that the host executes: without them on the host, not in the guest either. `avx`: all that the files compiled
 * for AVX take for granted (avx.h); processors with it and without AES are few and old. */
static bool host_has(enum feature f)
{
    bool avx = __builtin_cpu_supports("avx") && __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
    switch (f) {
    case FEATURE_SSE3: return __builtin_cpu_supports("sse3");
    case FEATURE_SSSE3: return __builtin_cpu_supports("ssse3");
    case FEATURE_SSE41: return __builtin_cpu_supports("sse4.1");
    case FEATURE_SSE42: return __builtin_cpu_supports("sse4.2");
    case FEATURE_AVX: return avx;
    case FEATURE_AVX2: return avx && __builtin_cpu_supports("avx2");
    case FEATURE_F16C: return avx && __builtin_cpu_supports("f16c");
    case FEATURE_FMA: return avx && __builtin_cpu_supports("fma");
    case FEATURE_VAES: return avx && __builtin_cpu_supports("vaes");
    case FEATURE_VPCLMUL: return avx && __builtin_cpu_supports("vpclmulqdq");
    case FEATURE_GFNI: return avx && __builtin_cpu_supports("gfni");
    default: return true;
    }
}

bool amd_flags;
/* Of what a shift leaves in AF: processors of AMD, and those made after them, set it. */
__attribute__((constructor)) static void look_at_flags(void)
{
    u32 eax, shifted = 1;
    __asm__("shll $2, %1\n\tlahf" : "=a"(eax), "+r"(shifted) : : "cc");
    amd_flags = eax >> 8 & FLAG_AF;
}

static struct kvm_cpuid_entry2 *find(struct vcpu *c, u32 leaf, u32 subleaf)
{
    for (unsigned i = 0; i < c->cpuid.count; i++) {
        struct kvm_cpuid_entry2 *e = &c->cpuid.entries[i];
        if (e->function == leaf && (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == subleaf))
            return e;
    }
    return NULL;
}

static u32 *register_of(struct kvm_cpuid_entry2 *e, unsigned reg)
{
    return reg == 0 ? &e->eax : reg == 1 ? &e->ebx : reg == 2 ? &e->ecx : &e->edx;
}
static struct kvm_cpuid_entry2 *entry_of(struct vcpu *c, enum feature f)
{
    return find(c, feature_bits[f].leaf, feature_bits[f].leaf == 0xd);
}

void cpuid_defaults(struct vcpu *c)
{
    c->cpuid.count = sizeof defaults / sizeof *defaults;
    memcpy(c->cpuid.entries, defaults, sizeof defaults);
    for (enum feature f = FEATURE_BASE + 1; f < FEATURE_COUNT; f++)
        if (!host_has(f))
            *register_of(entry_of(c, f), feature_bits[f].reg) &= ~(1u << feature_bits[f].bit);
    if (!host_has(FEATURE_AVX)) { /* nor its state */
        find(c, 0xd, 0)->eax &= ~(u32)STATE_AVX;
        find(c, 0xd, 2)->eax = find(c, 0xd, 2)->ebx = 0;
    }
    c->cpuid.entries[1].ebx |= c->index << 24; /* the APIC id */
    if (!c->vm->irqchip) { /* no APIC, and what only an APIC has */
        c->cpuid.entries[1].ecx &= ~(1u << 21 | 1u << 24);
        c->cpuid.entries[1].edx &= ~(1u << 9);
    }
    cpuid_changed(c);
}

void cpuid_changed(struct vcpu *c)
{
    memset(c->features, 0, sizeof c->features);
    c->features[0] |= 1ull << FEATURE_BASE;
    for (enum feature f = FEATURE_BASE + 1; f < FEATURE_COUNT; f++) {
        struct kvm_cpuid_entry2 *e = entry_of(c, f);
        if (e && *register_of(e, feature_bits[f].reg) >> feature_bits[f].bit & 1 && host_has(f))
            c->features[f >> 6] |= 1ull << (f & 63);
    }
    const struct kvm_cpuid_entry2 *sizes = find(c, 0x80000008, 0);
    unsigned bits = sizes ? sizes->eax & 0xff : 36;
    c->physical_bits = (u8)(bits < 32 ? 32 : bits > 52 ? 52 : bits);
    chip_features(c);
    if (c->cache)
        cache_flush(c);
}

/* With the bits that follow from state: OSXSAVE, OSPKE, APIC, the APIC id. Beyond the last basic leaf: that one's data. */
void cpuid(struct vcpu *c, u32 leaf, u32 subleaf, u32 out[4])
{
    const struct kvm_cpuid_entry2 *e = find(c, leaf, subleaf), *base = find(c, leaf & 0x80000000, 0);
    if (!e && base && leaf > base->eax) {
        const struct kvm_cpuid_entry2 *basic = find(c, 0, 0);
        e = basic ? find(c, basic->eax, subleaf) : NULL;
    }
    memset(out, 0, 16);
    if (!e) {
        if ((leaf == 0xb || leaf == 0x1f) && find(c, leaf, 0)) { /* levels that there are not */
            out[2] = subleaf & 0xff;
            out[3] = c->index;
        }
        return;
    }
    out[0] = e->eax, out[1] = e->ebx, out[2] = e->ecx, out[3] = e->edx;
    if (e->function == 0xb || e->function == 0x1f) {
        out[3] = c->index;
    } else if (!e->function) {
        if (cpuid_is_limited(c) && out[0] > 2) /* SDM 4 table 2-2 */
            out[0] = 2;
    } else if (e->function == 0x80000001) {
        if (!has_nx(c))
            out[3] &= ~(1u << 20);
    } else if (e->function == 1) {
        out[1] = (out[1] & 0x00ffffff) | c->index << 24;
        out[2] = (out[2] & ~(1u << 27)) | (c->cr4 & CR4_OSXSAVE ? 1u << 27 : 0);
        if (c->vm->irqchip && !(c->vm->irqchip->cpu[c->index].base >> 11 & 1)) /* disabled in IA32_APIC_BASE (3A 11.4.3) */
            out[3] &= ~(1u << 9);
    } else if (e->function == 7 && e->index == 0) {
        out[2] = (out[2] & ~(1u << 4)) | (c->cr4 & CR4_PKE ? 1u << 4 : 0);
    } else if (e->function == 0xd && e->index < 2 && (e->eax || e->edx)) {
        out[1] = xsave_size(c->xcr0, e->index == 1);
    }
}

/* Intel SDM 1 13.3: x87 always, AVX not without SSE, and no component that CPUID.(0DH,0) does not have. */
bool xcr0_is_valid(struct vcpu *c, u64 value)
{
    const struct kvm_cpuid_entry2 *e = find(c, 0xd, 0);
    u64 offered = e ? e->eax | (u64)e->edx << 32 : 0;
    u64 known = STATE_X87 | (offered & (STATE_SSE | STATE_AVX | STATE_PKRU));
    return value & STATE_X87 && !(value & ~known) && (!(value & STATE_AVX) || value & STATE_SSE);
}
