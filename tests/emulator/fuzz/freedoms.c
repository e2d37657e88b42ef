/* What processors may do as they like, a row each at the end of this file; tests/emulator/freedoms.py is the same for the
 * comparisons of single instructions. A row says why, and is as narrow as can be told. */
#include "freedoms.h"
#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

enum { DB = 1, BP = 3, BR = 5, UD = 6, SS = 12, GP = 13, PF = 14, AC = 17 };

/* CPUID.7.EBX of the host; and what no bit tells: whether it keeps the opcode of x87 instructions without an exception only,
 * and whether REP with a count of zero in ECX clears the high half of RCX. */
static struct { bool fdp_of_exceptions, no_selectors, fop_of_exceptions, extends_counts; } host_way;

void freedoms_open(void)
{
    u32 a, b, c, d;
    struct { u32 control, status, tags, ip, cs_fop, dp, ds; } image;
    float one = 1;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        host_way.fdp_of_exceptions = b >> 6 & 1; /* FDP_EXCPTN_ONLY */
        host_way.no_selectors = b >> 13 & 1;     /* deprecates FCS and FDS */
    }
    __asm__ volatile("fninit\n\tflds %1\n\tfnstenv %0\n\tfninit" : "=m"(image) : "m"(one));
    host_way.fop_of_exceptions = !(image.cs_fop >> 16);
    u64 count = 1ull << 32, to = 0;
    __asm__ volatile("rep stosb %%al, %%es:(%%edi)" : "+c"(count), "+D"(to) : "a"(0) : "memory");
    host_way.extends_counts = !count;
}

/* ---- The instruction at an address ------------------------------------------------------------------------------- */

/* The row; false: none is known there. */
static bool row_at(const struct test *t, u64 ip, struct core_instruction *row)
{
    *row = (struct core_instruction){.name = "", .operands = {"", "", ""}};
    for (unsigned i = 0; i < t->code.count; i++)
        if (ip == t->code.ip + t->code.list[i].at && t->code.list[i].row >= 0)
            return core_instruction((unsigned)t->code.list[i].row, row);
    return false;
}

static bool has_operand_of(const struct core_instruction *row, const char *operand)
{
    for (unsigned i = 0; i < 4; i++)
        if (row->operands[i] && !strcmp(row->operands[i], operand))
            return true;
    return false;
}

/* Its bytes, which count where prefixes made it of another row and where a find is replayed. */
struct encoding {
    bool by66, by67, repeats, short_operand, short_address; /* short: 16 bits outside of 64-bit mode */
    u8 opcode[2];  /* [0] is 0f: the second counts, too */
    u8 mod, reg, rm;
    unsigned length; /* with ModRM and what of an address follows it, without immediates */
};

static struct encoding encoding_at(const struct test *t, u64 ip)
{
    struct encoding e = {0};
    u8 code[32] = {0};
    const struct mode *m = &t->code.mode;
    bool by16 = m->segmented && !segments[m->use[IN_CS]].big;
    if (ip < t->code.ip || ip >= t->code.ip + t->code.length)
        return e;
    unsigned left = (unsigned)(t->code.ip + t->code.length - ip), at = 0;
    memcpy(code, t->code.code + (ip - t->code.ip), left < 24 ? left : 24);
    for (; at < 15; at++) {
        if (code[at] == 0x66)
            e.by66 = true;
        else if (code[at] == 0x67)
            e.by67 = true;
        else if (code[at] == 0xf2 || code[at] == 0xf3)
            e.repeats = true;
        else if (!memchr("\x26\x2e\x36\x3e\x64\x65\xf0", code[at], 7) && (m->compat || code[at] >> 4 != 4))
            break;
    }
    e.short_operand = e.by66 != by16, e.short_address = e.by67 != by16 && m->compat;
    e.opcode[0] = code[at++];
    if (e.opcode[0] == 0x0f)
        e.opcode[1] = code[at++];
    u8 modrm = code[at++];
    e.mod = modrm >> 6, e.reg = modrm >> 3 & 7, e.rm = modrm & 7;
    if (e.mod != 3 && e.short_address) {
        at += e.mod == 0 && e.rm == 6 ? 2 : e.mod;
    } else if (e.mod != 3) {
        u8 base = e.rm == 4 ? code[at++] & 7 : e.rm;
        at += e.mod == 1 ? 1 : e.mod == 2 || base == 5 ? 4 : 0;
    }
    e.length = at;
    return e;
}

static bool is_x87_store(const struct encoding *e)
{
    u8 digits = e->opcode[0] == 0xd9 ? 0x0c : e->opcode[0] == 0xdb ? 0x8e : e->opcode[0] == 0xdd ? 0x0e :
                e->opcode[0] == 0xdf ? 0xce : 0; /* FST, FSTP, FIST, FISTP, FISTTP, FBSTP */
    return e->mod != 3 && digits >> e->reg & 1;
}
static bool is_environment_store(const struct encoding *e) /* FNSTENV, FNSAVE */
{
    return e->mod != 3 && e->reg == 6 && (e->opcode[0] == 0xd9 || e->opcode[0] == 0xdd);
}
/* VEX at an address: its three bytes, the opcode, ModRM; false: another instruction. */
static bool vex_at(const struct test *t, u64 ip, u8 vex[5])
{
    if (ip < t->code.ip || ip >= t->code.ip + t->code.length)
        return false;
    unsigned at = (unsigned)(ip - t->code.ip);
    while (at + 5 < t->code.length && memchr("\x26\x2e\x36\x3e\x64\x65\x67", t->code.code[at], 7))
        at++;
    if (at + 5 > t->code.length || t->code.code[at] != 0xc4)
        return false;
    memcpy(vex, t->code.code + at, 5);
    return true;
}
static bool is_memory_fault(int vector) { return vector == SS || vector == GP || vector == PF || vector == AC; }
static bool in_data(u64 address, unsigned bytes) { return address >= DATA && address + bytes <= DATA + DATA_SIZE; }
/* Where the data differ, in [*first, *last); false: nowhere. */
static bool data_differ(unsigned *first, unsigned *last)
{
    for (*first = 0; *first < DATA_SIZE && host_data[*first] == core_data[*first];)
        ++*first;
    for (*last = DATA_SIZE; *last > *first && host_data[*last - 1] == core_data[*last - 1];)
        --*last;
    return *first < *last;
}

/* ---- The freedoms: true if all that is left is open ----------------------------------------------------------- */

static bool no_page(const struct test *t, struct state *host, struct state *core)
{
    (void)t, (void)host;
    return core->vector == PF && core->address - EXIT64 < PAGE;
}

/* MOVUPS, MOVUPD, MOVDQU, LDDQU, PCMPxSTRx by their bytes. */
static bool is_unaligned(const struct test *t, u64 ip)
{
    struct encoding e = encoding_at(t, ip);
    return e.opcode[0] == 0x0f && (memchr("\x10\x11\x6f\x7f\xf0", e.opcode[1], 5) ||
                                   (e.opcode[1] == 0x3a && ((e.mod << 6 | e.reg << 3 | e.rm) >> 4) == 6));
}
static bool unaligned_vector(const struct test *t, struct state *host, struct state *core)
{
    struct core_instruction row;
    (void)core;
    u8 vex[5];
    if (vex_at(t, host->rip, vex)) /* of more than what scalar ones take */
        return host->vector == AC;
    row_at(t, host->rip, &row);
    return host->vector == AC && (has_operand_of(&row, "Wx") || has_operand_of(&row, "Mdq") || is_unaligned(t, host->rip));
}

static bool undefined_modrm(const struct test *t, struct state *host, struct state *core)
{
    struct core_instruction row;
    return host->rip == core->rip && host->vector == UD && row_at(t, host->rip, &row) && !strncmp(row.name, "UD", 2);
}

static bool alignment_first(const struct test *t, struct state *host, struct state *core)
{
    (void)t;
    return host->rip == core->rip && host->vector == AC && core->vector == PF;
}

static bool breakpoint(const struct test *t, struct state *host, struct state *core)
{
    (void)t;
    return host->rip == core->rip && host->vector == BP && core->vector == GP;
}

/* Whether an address is near where the offsets of a segment of 4 GiB wrap. */
static bool at_the_wrap(const struct mode *m, u64 address)
{
    enum { NEAR = 512 };
    if (!m->segmented)
        return (u32)(address + NEAR) < 2 * NEAR;
    for (unsigned i = IN_DS; i < USED; i++) {
        const struct segment *s = &segments[m->use[i] == NULL_SEGMENT ? 0 : m->use[i]];
        if ((s->down ? s->big : s->limit == 0xffffffff) && (u32)((u32)address - s->base + NEAR) < 2 * NEAR)
            return true;
    }
    return false;
}
static bool wrapped_access(const struct test *t, struct state *host, struct state *core)
{
    struct core_instruction row;
    if (host->rip != core->rip || !t->code.mode.compat)
        return false;
    struct encoding e = encoding_at(t, host->rip);
    row_at(t, host->rip, &row);
    bool parts = has_operand_of(&row, "Mt") || !strcmp(row.name, "BOUND") || !strcmp(row.name, "FLDENV") ||
                 !strcmp(row.name, "FRSTOR") || is_environment_store(&e);
    if (host->vector == PF && (core->vector == SS || core->vector == GP))
        return parts || at_the_wrap(&t->code.mode, host->address);
    if (host->vector == AC && (core->vector == SS || core->vector == GP)) /* no exception of the limit, so the next one */
        return !t->code.mode.segmented;
    return (host->vector == GP && core->vector == SS) || (host->vector == PF && parts);
}

static bool wrapped_part(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, host->rip);
    u8 digits = e.opcode[0] == 0xdb ? 0xa0 : e.opcode[0] == 0xd9 || e.opcode[0] == 0xdd || e.opcode[0] == 0xdf ? 0x50 : 0;
    bool parts = e.mod != 3 && (digits >> e.reg & 1 || e.opcode[0] == 0x62); /* 80 bits, environments and states, bounds */
    if (!t->code.mode.segmented || !e.short_address || !parts || host->vector != PF || core->rip == host->rip)
        return false;
    for (unsigned i = IN_CS; i < USED; i++)
        if (t->code.mode.use[i] != NULL_SEGMENT && (u32)((u32)host->address - segments[t->code.mode.use[i]].base) < 108)
            return true;
    return false;
}

static bool movsxd_reads_more(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, host->rip);
    return e.opcode[0] == 0x63 && e.by66 && e.mod != 3 && !t->code.mode.compat && host->rip != core->rip &&
           (host->vector == PF || host->vector == AC);
}

static bool call_order(const struct test *t, struct state *host, struct state *core)
{
    return host->rip == core->rip && t->code.indirect && (host->vector == SS || host->vector == PF) && core->vector == GP;
}

static bool call_pushed(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, core->rip);
    const struct mode *m = &t->code.mode;
    bool call = e.opcode[0] == 0xe8 || (e.opcode[0] == 0xff && e.reg == 2);
    if (!call || host->rip != core->rip || host->vector != GP || core->vector != GP)
        return false;
    unsigned size = !m->compat ? 8 : e.short_operand ? 2 : 4, first, last;
    u64 sp = core->gpr[4] - size, pushed = 0;
    if (m->segmented)
        sp = (u32)((segments[m->use[IN_SS]].big ? (u32)sp : (u16)sp) + segments[m->use[IN_SS]].base);
    else if (m->compat)
        sp = (u32)sp;
    if (!in_data(sp, size) || !data_differ(&first, &last) || first < sp - DATA || last > sp - DATA + size)
        return false;
    memcpy(&pushed, host_data + (sp - DATA), size);
    u64 mask = size == 8 ? ~0ull : (1ull << 8 * size) - 1, length = (pushed - (core->rip - code_base(m))) & mask;
    if (length >= 2 && length <= 15)
        memcpy(host_data + (sp - DATA), core_data + (sp - DATA), size);
    return false;
}

static bool popped_in_part(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, host->rip);
    if (t->code.mode.compat && host->vector >= 0 && host->rip == core->rip && e.opcode[0] == 0x61)
        memcpy(host->gpr, core->gpr, sizeof host->gpr);
    return false;
}

static bool stored_in_part(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, host->rip);
    unsigned first, last;
    if (host->vector < 0 || host->rip != core->rip || !data_differ(&first, &last))
        return false;
    bool pushes = t->code.mode.compat && e.opcode[0] == 0x60; /* PUSHA */
    bool eighty = e.mod != 3 && ((e.opcode[0] == 0xdb && e.reg == 7) || (e.opcode[0] == 0xdf && e.reg == 6));
    unsigned most = e.opcode[0] == 0xc8 ? 8 * 32 : pushes ? 32 : is_environment_store(&e) ? 108 : eighty ? 10 : 0;
    if (last - first <= most)
        memcpy(host_data + first, core_data + first, last - first);
    return false;
}

static bool bound_first(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, core->rip);
    unsigned size = e.short_operand ? 2 : 4;
    if (host->rip != core->rip || host->vector != BR || e.opcode[0] != 0x62)
        return false;
    if (core->vector == SS || core->vector == GP) /* the upper bound is beyond the limit */
        return true;
    if (core->vector != PF || core->address != DATA + DATA_SIZE)
        return false;
    for (unsigned at = DATA_SIZE - 2 * size + 1; at <= DATA_SIZE - size; at++) {
        int32_t lower = 0, index = (int32_t)core->gpr[e.reg];
        memcpy(&lower, core_data + at, size);
        if (size == 2 ? (int16_t)index < (int16_t)lower : index < lower)
            return true;
    }
    return false;
}

static bool mmx_top(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, core->rip);
    bool store = e.opcode[0] == 0x0f && !e.by66 && !e.repeats && memchr("\x7e\x7f\xe7\xf7", e.opcode[1], 4);
    u16 status, top;
    memcpy(&status, host->fx + 2, 2), memcpy(&top, core->fx + 2, 2);
    if (host->rip != core->rip || host->vector != core->vector || !is_memory_fault(core->vector) || !store || status & 0x3800)
        return false;
    u8 registers[128];
    memcpy(registers, host->fx + 32, 128);
    for (unsigned i = 0; i < 8; i++)
        memcpy(host->fx + 32 + 16 * i, registers + 16 * (((top >> 11) + i) & 7), 16);
    status |= top & 0x3800;
    memcpy(host->fx + 2, &status, 2);
    return false;
}

/* REP with 32-bit addresses in 64-bit mode that does no iteration, on a host that extends its registers all the same. */
static bool extends(const struct test *t, u64 ip, u64 regs[18])
{
    enum { ALL_RCX = 2, ALL_RSI = 4, ALL_RDI = 5 }; /* in struct kvm_regs */
    struct encoding e = encoding_at(t, ip);
    u8 op = e.opcode[0];
    if (t->code.mode.compat || !e.repeats || !e.by67 || op < 0xa4 || op > 0xaf || op >> 1 == 0x54)
        return false;
    regs[ALL_RCX] = (u32)regs[ALL_RCX];
    if (op >> 1 == 0x52)
        regs[ALL_RSI] = (u32)regs[ALL_RSI];
    if (op >> 1 == 0x52 || op >> 1 == 0x55)
        regs[ALL_RDI] = (u32)regs[ALL_RDI];
    return true;
}

static bool repeat_flags(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, core->rip);
    bool amid = is_memory_fault(core->vector) || core->vector == DB; /* a trap of TF between iterations */
    if (host->rip == core->rip && host->vector == core->vector && amid && e.repeats &&
        (e.opcode[0] >> 1 == 0x53 || e.opcode[0] >> 1 == 0x57))
        host->rflags = (host->rflags & ~(u64)FLAGS_ARITHMETIC) | (core->rflags & FLAGS_ARITHMETIC);
    return false;
}

static bool enter_wraps(const struct test *t, struct state *host, struct state *core)
{
    const struct mode *m = &t->code.mode;
    if (m->segmented && !segments[m->use[IN_SS]].big && memchr(t->code.code, 0xc8, t->code.length) &&
        (u16)core->gpr[5] >= 0xfffc && (u32)host->gpr[5] == (u32)core->gpr[5] - 0x10000) {
        u32 stored;
        unsigned first, last;
        if (host->vector != core->vector || host->rip != core->rip) /* an address was made of it */
            return true;
        host->gpr[5] = core->gpr[5];
        if (data_differ(&first, &last) && first >= 2 && last <= first + 2) { /* the frame pointer, deeper than 0 */
            memcpy(&stored, core_data + first - 2, 4);
            stored -= 0x10000;
            if ((u16)stored >= 0xfffc && !memcmp(host_data + first - 2, &stored, 4))
                memcpy(host_data + first, core_data + first, 2);
        }
    }
    return false;
}

/* If the store of the x87 at which the core faulted meets an unmasked exception with good memory: the state after it. */
static bool go_past_refused_store(const struct test *t, struct state *core)
{
    enum { PROBE = 0x30011fc0, ES = 0x80, TRAP = 0x100 };
    struct encoding e = encoding_at(t, core->rip);
    if (!is_memory_fault(core->vector) || !is_x87_store(&e))
        return false;
    static struct test probe;
    probe = (struct test){.code = {.length = 7, .ip = PROBE}, .start = *core};
    u32 exit = EXIT64 - (PROBE + 7);
    memcpy(probe.code.code, (u8[]){e.opcode[0], (u8)(e.reg << 3 | 3), 0xe9}, 3); /* [rbx] */
    memcpy(probe.code.code + 3, &exit, 4);
    probe.start.rip = PROBE, probe.start.rflags = 0x202, probe.start.gpr[3] = DATA;
    u8 kept[16];
    memcpy(kept, core_data, 16);
    put_code(&probe.code, true);
    core_run(&probe.start, &probe.code, false);
    put_code(&probe.code, false);
    memcpy(core_data, kept, 16);
    if (probe.start.vector != VECTOR_NONE || !(probe.start.fx[2] & ES))
        return false;
    memcpy(core->fx, probe.start.fx, 160);
    u64 ip = core->rip - code_base(&t->code.mode);
    memcpy(core->fx + FX_IP, &ip, 8);
    core->rip += e.length;
    core->vector = core->rflags & TRAP ? DB : VECTOR_NONE;
    return true;
}
static bool refused_store(const struct test *t, struct state *host, struct state *core)
{
    while (host->rip != core->rip && go_past_refused_store(t, core))
        if (core->vector == VECTOR_NONE)
            core_run(core, &t->code, t->stepped);
    return false;
}

/* Pointers of the x87 that this host keeps otherwise, in images that the case stored: the core runs once more, in steps and
 * traced, which says where they are. */
static struct {
    bool open[DATA_SIZE], read, astray;
    u64 lowest;
    unsigned written;
} images;
static u64 host_stop; /* where the host ended: no store that it refused */

static void accessed(void *argument, const struct core_trace_record *records, size_t count, u64 events, bool ended)
{
    (void)argument, (void)events, (void)ended;
    for (size_t i = 0; i < count; i++) {
        const struct core_trace_record *r = &records[i];
        if (r->kind != CORE_TRACE_MEM)
            continue;
        bool write = r->flags & CORE_TRACE_WRITE;
        if (write && (!images.written || r->mem.address < images.lowest))
            images.lowest = r->mem.address;
        images.written += write ? r->size : 0;
        for (unsigned b = 0; b < r->size; b++)
            if (in_data(r->mem.address + b, 1)) {
                bool *open = &images.open[r->mem.address + b - DATA];
                images.read |= !write && *open;
                *open &= !write;
            }
    }
}

static void open_bytes(unsigned at, unsigned size)
{
    for (unsigned i = 0; i < size; i++)
        if (in_data(images.lowest + at + i, 1))
            images.open[images.lowest + at + i - DATA] = true;
}

static bool is_boundary(const struct test *t, u64 ip)
{
    for (unsigned i = 0; i <= t->code.count; i++)
        if (ip == t->code.ip + t->code.list[i].at)
            return true;
    return false;
}

static void open_image(void)
{
    bool narrow = images.written == 14 || images.written == 94;
    if (host_way.fop_of_exceptions && !narrow)
        open_bytes(18, 2);
    if (host_way.fdp_of_exceptions)
        open_bytes(narrow ? 10 : 20, narrow ? 2 : 4);
    if (host_way.no_selectors)
        open_bytes(narrow ? 8 : 16, 2), open_bytes(narrow ? 12 : 24, 2);
}

/* The core once more from the start, in steps, traced by `accessed` into `images`, `extended` with registers of REP as the host's,
 * and past stores that the host refused. */
static void run_in_steps(const struct test *t, bool extended, struct state *s)
{
    static const struct core_trace all = {.kinds = 1u << CORE_TRACE_MEM, .modes = 31, .last = ~0ull, .data_last = ~0ull};
    const struct mode *m = &t->code.mode;
    *s = t->start;
    memset(&images, 0, sizeof images);
    memcpy(core_data, data, DATA_SIZE);
    struct vcpu *c = NULL;
    for (unsigned i = 0; i < BUDGET; i++) {
        u64 regs[18];
        struct vcpu_exit exit = {0};
        if (!c && vcpu_set_trace(c = core_load(s, m), &all, accessed, NULL))
            abort();
        vcpu_get_state(c, "regs", regs, sizeof regs);
        u64 ip = m->segmented ? (u32)(regs[16] + code_base(m)) : regs[16];
        struct encoding e = encoding_at(t, ip);
        images.written = 0;
        images.astray |= !is_boundary(t, ip);
        vcpu_run(c, 1, &exit);
        bool faulted = exit.reason != EXIT_LIMIT;
        if (extended && (faulted || !(u32)regs[2])) {
            vcpu_get_state(c, "regs", regs, sizeof regs);
            if (extends(t, ip, regs) && vcpu_set_state(c, "regs", regs, sizeof regs))
                abort();
        }
        if (is_environment_store(&e) && images.written)
            open_image();
        if (!faulted)
            continue;
        core_store(c, &exit, &t->code, s);
        vcpu_set_trace(c, NULL, NULL, NULL);
        if (s->rip == host_stop || !go_past_refused_store(t, s) || s->vector != VECTOR_NONE)
            return;
        c = NULL;
    }
    s->vector = VECTOR_ENDLESS;
    vcpu_set_trace(c, NULL, NULL, NULL);
}

static bool is_same(const struct state *a, const struct state *b)
{
    return a->vector == b->vector && a->rip == b->rip && !memcmp(a->gpr, b->gpr, sizeof a->gpr) &&
           !((a->rflags ^ b->rflags) & FLAGS_COMPARED) && !memcmp(a->fx, b->fx, 5) && !memcmp(a->fx + 24, b->fx + 24, 392) &&
           !memcmp(a->ymm, b->ymm, sizeof a->ymm);
}

static bool in_the_hosts_way(const struct test *t, struct state *host, struct state *core)
{
    bool stores = false, repeats = false;
    u64 unused[18];
    for (unsigned i = 0; i + 1 < t->code.length; i++) {
        struct encoding e = encoding_at(t, t->code.ip + i);
        stores |= is_environment_store(&e);
        repeats |= extends(t, t->code.ip + i, unused);
    }
    stores &= host_way.fop_of_exceptions || host_way.fdp_of_exceptions || host_way.no_selectors;
    if (!stores && !(repeats && host_way.extends_counts))
        return false;
    struct state again;
    u8 kept[DATA_SIZE];
    host_stop = host->rip;
    memcpy(kept, core_data, DATA_SIZE);
    run_in_steps(t, false, &again);
    if (!is_same(&again, core) || memcmp(kept, core_data, DATA_SIZE)) { /* steps are to make no difference */
        memcpy(core_data, kept, DATA_SIZE);
        return false;
    }
    if (repeats && host_way.extends_counts)
        run_in_steps(t, true, core);
    for (unsigned i = 0; i < DATA_SIZE; i++)
        if (images.open[i])
            host_data[i] = core_data[i];
    return images.read;
}

static bool undefined_flags_inside(const struct test *t, struct state *host, struct state *core)
{
    struct state again;
    if (!t->code.indirect || !((host->rflags ^ core->rflags) & FLAGS_ARITHMETIC))
        return false;
    host_stop = host->rip;
    u8 kept[DATA_SIZE];
    memcpy(kept, core_data, DATA_SIZE);
    run_in_steps(t, false, &again);
    memcpy(core_data, kept, DATA_SIZE);
    if (images.astray)
        host->rflags = (host->rflags & ~(u64)FLAGS_ARITHMETIC) | (core->rflags & FLAGS_ARITHMETIC);
    return false;
}

static bool faulted_gather(const struct test *t, struct state *host, struct state *core)
{
    static const u8 clear[16];
    u8 vex[5];
    bool amid = is_memory_fault(core->vector) || core->vector == DB; /* a trap of TF in place of the fault */
    if (host->rip != core->rip || host->vector != core->vector || !amid || !vex_at(t, core->rip, vex))
        return false;
    if ((vex[1] & 31) != 2 || vex[3] >> 2 != 0x90 >> 2)
        return false;
    unsigned numbers = t->code.mode.compat ? 7 : 15, bytes = vex[2] & 0x80 ? 8 : 4;
    unsigned mask = (~vex[2] >> 3) & numbers, to = ((vex[1] & 0x80 ? 0 : 8) | (vex[4] >> 3 & 7)) & numbers;
    for (unsigned at = 0; at < 32; at += bytes) {
        u8 *theirs = at < 16 ? host->fx + 160 + 16 * mask + at : host->ymm + 16 * mask + at - 16;
        const u8 *ours = at < 16 ? core->fx + 160 + 16 * mask + at : core->ymm + 16 * mask + at - 16;
        u64 extended = theirs[bytes - 1] & 0x80 ? ~0ull : 0;
        if (!memcmp(ours, &extended, bytes))
            memcpy(theirs, ours, bytes);
    }
    for (unsigned i = 0; !(vex[2] & 4) && i < 2; i++) {
        unsigned at = 16 * (i ? to : mask);
        if (!memcmp(core->ymm + at, clear, 16))
            memcpy(host->ymm + at, clear, 16);
    }
    return false;
}

static bool half_floats_refused(const struct test *t, struct state *host, struct state *core)
{
    enum { XM = 19, FLAGS = 0x3f };
    u8 vex[5];
    if (host->rip != core->rip || !is_memory_fault(host->vector) || !vex_at(t, core->rip, vex))
        return false;
    if ((vex[1] & 31) != 3 || vex[3] != 0x1d || (core->vector != host->vector && core->vector != XM))
        return false;
    u32 theirs, ours;
    memcpy(&theirs, host->fx + 24, 4), memcpy(&ours, core->fx + 24, 4);
    if (!((theirs ^ ours) & ~FLAGS) && !(theirs & ~ours))
        memcpy(host->fx + 24, core->fx + 24, 4);
    host->vector = core->vector, host->address = core->address;
    return false;
}

static bool precision_of_denormals(const struct test *t, struct state *host, struct state *core)
{
    enum { PE = 0x20, UM = 0x800 };
    u8 vex[5];
    u32 theirs, ours;
    bool converts = false;
    memcpy(&theirs, host->fx + 24, 4), memcpy(&ours, core->fx + 24, 4);
    for (unsigned i = 0; i < t->code.length; i++)
        converts |= vex_at(t, t->code.ip + i, vex) && (vex[1] & 31) == 3 && vex[3] == 0x1d;
    if (converts && ours == (theirs | PE) && !(ours & UM))
        memcpy(host->fx + 24, core->fx + 24, 4);
    return false;
}

static bool masked_elements(const struct test *t, struct state *host, struct state *core)
{
    u8 vex[5];
    if ((core->vector != GP && core->vector != SS) || !vex_at(t, core->rip, vex) || (vex[1] & 31) != 2)
        return false;
    if (vex[3] >> 2 != 0x2c >> 2 && (vex[3] | 2) != 0x8e)
        return false;
    return (host->rip == core->rip && host->vector == PF) || encoding_at(t, core->rip).short_address;
}

static bool compares_two(const struct test *t, struct state *host, struct state *core)
{
    struct encoding e = encoding_at(t, core->rip);
    return host->rip == core->rip && is_memory_fault(host->vector) && is_memory_fault(core->vector) && e.opcode[0] >> 1 == 0xa6 >> 1;
}

static bool misaligned_mask(const struct test *t, struct state *host, struct state *core)
{
    u8 vex[5];
    u32 mask; /* that the host stores beside MXCSR, which it may have loaded once more since */
    memcpy(&mask, host->fx + 28, 4);
    return core->vector == GP && host->rip != core->rip && mask & 1u << 17 && vex_at(t, core->rip, vex) && vex[3] == 0xae;
}

static const struct freedom {
    const char *name, *why;
    bool (*use)(const struct test *t, struct state *host, struct state *core);
} freedoms[] = { /* the first two go on with the core, or undo what stays in memory, for the others */
    {"an unmasked x87 exception or a fault of a store", "SDM 1 8.5.1, 8.5.4: nothing is stored then, so no address is looked at; "
     "AMD looks first", refused_store},
    {"x87 pointers, and registers of REP with 32-bit addresses", "CPUID.7.EBX: FDP_EXCPTN_ONLY, deprecated FCS and FDS; SDM 1 "
     "8.1.9: the opcode, too, may be that of the last unmasked exception. SDM 1 3.4.1.1 extends results of 32 bits, and "
     "without an iteration there is none; Intel's extend (Linux arch/x86/kvm/emulate.c, string_registers_quirk)",
     in_the_hosts_way},
    {"a wild address", "only the host has the page of the exit", no_page},
    {"alignment of 16 bytes", "SDM 2A MOVUPS: with AC set #AC may or may not be generated; AMD does", unaligned_vector},
    {"ModRM of UD0 and UD1", "SDM 2B UD: some processors do not read it, and it may lie on no page", undefined_modrm},
    {"alignment or page", "SDM 3A table 6-2 has both in one class; AMD checks alignment first", alignment_first},
    {"INT3", "it is no vector stop of the core, which has no IDT here", breakpoint},
    {"over the end of 4 GiB", "SDM 3A 5.3: where the effective limit is FFFFFFFF, an access over the end may or may not "
     "cause the exception; this is implementation-specific", wrapped_access},
    {"over FFFF with 16-bit addresses", "SDM 1 3.3.5 has no word on operands of several parts; Intel's cut each part's offset",
     wrapped_part},
    {"MOVSXD of 16 bits", "SDM 2B MOVSX: it reads 16 bits; AMD: 32", movsxd_reads_more},
    {"CALL with two faults", "SDM 2A CALL: the target first; AMD: the push", call_order},
    {"CALL that pushed", "the same; what lies below rSP is nobody's", call_pushed},
    {"POPA in part", "the manuals do not say that it loads all or nothing", popped_in_part},
    {"long stores in part", "SDM 3A 8.1.1: of the accesses of one instruction some may complete when another faults",
     stored_in_part},
    {"BOUND reads one bound", "SDM 2A BOUND: below the lower or above the upper; nothing says that both are read", bound_first},
    {"TOP after a faulting MMX store", "Intel's errata: Faulting MMX Instruction May Incorrectly Update x87 FPU Tag Word",
     mmx_top},
    {"flags of a repeated comparison that faults", "SDM 2B REP: as before the instruction; AMD: of the last iteration",
     repeat_flags},
    {"flags where a jump went into an instruction", "nobody knows which are undefined there", undefined_flags_inside},
    {"a gather that faults", "SDM 2C VGATHERDPS: each element of the mask becomes its top bit first; AMD's processors do that only to "
     "those that are done, and clear upper halves when all are", faulted_gather},
    {"VCVTPS2PH that faults", "SDM 3A table 6-2 has its exception of floats and the fault of its store in one class, and no manual says "
     "whether MXCSR has its flags then; AMD's fault first, without flags", half_floats_refused},
    {"VCVTPS2PH of denormals", "SDM 2C has no word on the precision exception of a tiny result while underflow is unmasked; AMD's raise none",
     precision_of_denormals},
    {"elements of a masked move", "SDM 2C VMASKMOV: which of two faults comes is not said, Intel's look at the segment first for all "
     "elements. Over FFFF with 16-bit addresses: as for operands of several parts, AMD's cut each element's offset", masked_elements},
    {"CMPS with two faults", "no manual says which operand is read first", compares_two},
    {"MXCSR.MM", "APM 1 4.2.2: bit 17 of MXCSR, where MXCSR_MASK has it; not Intel's", misaligned_mask},
    {"ENTER on a 16-bit stack that wraps", "SDM 2A ENTER has EBP from ESP after the push; Intel's take ESP - 4", enter_wraps},
};

bool is_open(const struct test *t, struct state *host, struct state *core)
{
    for (unsigned i = 0; i < sizeof freedoms / sizeof *freedoms; i++)
        if (freedoms[i].use(t, host, core))
            return true;
    return core->vector == VECTOR_ENDLESS;
}

/* AMD's x87 loses its instruction and data pointers when the host's kernel switches tasks (FXRSTOR and XRSTOR leave them
 * out while no exception is pending), so that what FNSAVE and FNSTENV store of them differs now and then. */
bool pointers_are_stored(const struct test *t)
{
    struct core_instruction row;
    for (unsigned i = 0; i < t->code.count; i++)
        if (t->code.list[i].row >= 0 && core_instruction((unsigned)t->code.list[i].row, &row) &&
            (!strcmp(row.name, "FNSAVE") || !strcmp(row.name, "FNSTENV")))
            return true;
    return false;
}

