/* Model-specific registers (Intel SDM 4): a row each. */
#include "memory.h"

struct msr_row {
    u32 index;
    u16 offset;               /* in struct msr_state */
    u64 writable;             /* bits that may be set; others: #GP */
};
#define ROW(index, field, writable) {index, offsetof(struct msr_state, field), writable}
static const struct msr_row rows[] = {
    ROW(0xc0000081, star, ~0ull), ROW(0xc0000082, lstar, ~0ull), ROW(0xc0000083, cstar, ~0ull),
    ROW(0xc0000084, fmask, 0xffffffff), ROW(0xc0000102, kernel_gs_base, ~0ull), ROW(0xc0000103, tsc_aux, 0xffffffff),
    ROW(0x174, sysenter_cs, 0xffffffff), ROW(0x175, sysenter_esp, ~0ull), ROW(0x176, sysenter_eip, ~0ull),
    ROW(0x1b, apic_base, 0xffffffff00ull), ROW(0x277, pat, 0x0707070707070707), ROW(0x1a0, misc_enable, ~0ull),
};
enum { ROWS = sizeof rows / sizeof *rows };
enum { MSR_TSC = 0x10, MSR_EFER = 0xc0000080, MSR_FS_BASE = 0xc0000100, MSR_GS_BASE = 0xc0000101 };

u64 read_tsc(struct vcpu *c, const struct record *r) { return core_now(c, r) + c->tsc_offset; }

static u64 *field(struct vcpu *c, const struct msr_row *row) { return (u64 *)((u8 *)&c->msr + row->offset); }

bool msr_read(struct vcpu *c, u32 index, u64 *value, bool host)
{
    (void)host;
    switch (index) {
    case MSR_TSC: *value = read_tsc(c, c->now); return true;
    case MSR_EFER: *value = c->efer; return true;
    case MSR_FS_BASE: *value = c->seg[SEG_FS].base; return true;
    case MSR_GS_BASE: *value = c->seg[SEG_GS].base; return true;
    }
    for (unsigned i = 0; i < ROWS; i++)
        if (rows[i].index == index) {
            *value = *field(c, &rows[i]);
            return true;
        }
    return false;
}

bool msr_write(struct vcpu *c, u32 index, u64 value, bool host)
{
    switch (index) {
    case MSR_TSC: c->tsc_offset = value - core_now(c, c->now); return true;
    case MSR_EFER:
        if (value & ~(u64)(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE))
            return false;
        if (!host && ((value ^ c->efer) & EFER_LME) && c->cr0 & CR0_PG)
            return false;
        c->efer = host ? value : (value & ~(u64)EFER_LMA) | (c->efer & EFER_LMA);
        mode_changed(c);
        tlb_flush(c);
        return true;
    case MSR_FS_BASE: case MSR_GS_BASE:
        if ((u64)((i64)(value << 16) >> 16) != value && !(c->cr4 & CR4_LA57))
            return false;
        c->seg[index == MSR_FS_BASE ? SEG_FS : SEG_GS].base = value;
        segment_changed(c, index == MSR_FS_BASE ? SEG_FS : SEG_GS);
        return true;
    }
    for (unsigned i = 0; i < ROWS; i++)
        if (rows[i].index == index) {
            if (value & ~rows[i].writable)
                return false;
            *field(c, &rows[i]) = value;
            return true;
        }
    return false;
}

size_t msr_list(struct vcpu *c, u32 *indices, size_t room)
{
    static const u32 special[] = {MSR_TSC, MSR_EFER, MSR_FS_BASE, MSR_GS_BASE};
    size_t n = 0;
    (void)c;
    for (unsigned i = 0; i < 4 && n < room; i++)
        indices[n++] = special[i];
    for (unsigned i = 0; i < ROWS && n < room; i++)
        indices[n++] = rows[i].index;
    return n;
}

int vcpu_get_msr(struct vcpu *c, uint32_t index, uint64_t *value)
{
    c->now = NULL;
    return msr_read(c, index, value, true) ? 0 : -22;
}
int vcpu_set_msr(struct vcpu *c, uint32_t index, uint64_t value)
{
    c->now = NULL;
    return msr_write(c, index, value, true) ? 0 : -22;
}
