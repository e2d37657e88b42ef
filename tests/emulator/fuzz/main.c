/* fuzz [--seconds N] [--cases N] [--seed N] [--round N] [--finds N] [--plant NAME] [--no-host] [--ways] [--replay FILE]
 *
 * Each code runs from several states (so that decoded code is used again), in one piece or instruction by instruction on the
 * core, and natively; registers, defined flags, x87 and vector state and memory are compared. A difference is shrunk and
 * printed as a line `case ...`, which --replay takes again. Exit code 1: there were differences. */
#include "core.h"
#include "freedoms.h"
#include "ways.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { STATES = 4, TABLES = 0x10000 };

static struct vcpu *cpus[3];      /* 64-bit mode, compatibility mode, that with segments */
static struct kvm_sregs segmented; /* of the third */
u8 *core_code, *core_data;
u8 data[DATA_SIZE];
static bool use_host = true;
static const char *planted;       /* --plant NAME: the core gets that instruction wrong */

struct counts { u64 cases, endless, faults; } counts[6]; /* table and wild, 64-bit and compatibility; segments; with a border */

static void die(const char *what, int error)
{
    fprintf(stderr, "fuzz: %s: %s\n", what, strerror(error));
    exit(2);
}

/* ---- The core ------------------------------------------------------------------------------------------------- */

static struct vcpu *make_cpu(bool compat)
{
    struct vm *vm = vm_create();
    u8 *tables = mmap(NULL, TABLES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!vm || tables == MAP_FAILED || vm_map(vm, 0, 0, tables, TABLES, 0) || vm_map(vm, 1, CODE, core_code, CODE_SIZE, 0) ||
        vm_map(vm, 2, DATA, core_data, DATA_SIZE, 0))
        die("memory of the machine", ENOMEM);
    u64 *entries = (u64 *)tables;
    entries[0x1000 / 8] = 0x2007; /* the first 512 GiB */
    entries[0x2000 / 8 + (DATA >> 30 & 511)] = 0x3007;
    entries[0x3000 / 8 + (DATA >> 21 & 511)] = 0x4007;
    for (u32 at = 0; at < CODE_SIZE; at += PAGE)
        entries[0x4000 / 8 + ((CODE + at) >> 12 & 511)] = (CODE + at) | 5; /* user, not writable */
    for (u32 at = 0; at < DATA_SIZE; at += PAGE)
        entries[0x4000 / 8 + ((DATA + at) >> 12 & 511)] = (DATA + at) | 7 | 1ull << 63; /* not executable */
    struct vcpu *c = vcpu_create(vm, 0);
    if (!c)
        die("CPU", ENOMEM);
    struct kvm_segment data_segment = {.limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3,
                                       .db = 1, .s = 1, .g = 1};
    struct kvm_segment code = data_segment;
    code.selector = compat ? 0x23 : 0x33, code.type = 11, code.l = !compat, code.db = compat;
    struct kvm_sregs s = {
        .cs = code, .ds = data_segment, .es = data_segment, .fs = data_segment, .gs = data_segment, .ss = data_segment,
        .tr = {.limit = 0x3f, /* without I/O permissions */ .selector = 0x40, .type = 11, .present = 1},
        .ldt = {.unusable = 1},
        .cr0 = 0x80050033, .cr3 = 0x1000, .cr4 = 0x40620, .efer = 0xd01, .apic_base = 0xfee00900,
    };
    struct kvm_xcrs xcrs = {.nr_xcrs = 1, .xcrs[0].value = host_avx ? 7 : 3};
    int error = vcpu_set_state(c, "sregs", &s, sizeof s);
    if (!error)
        error = vcpu_set_state(c, "xcrs", &xcrs, sizeof xcrs);
    segmented = s;
    struct vcpu_stop stops[32];
    for (unsigned i = 0; i < 32; i++)
        stops[i] = (struct vcpu_stop){.kind = STOP_VECTOR, .id = i, .address = i};
    if (error || (error = vcpu_set_debug(c, false, stops, 32)))
        die("state of the CPU", -error);
    return c;
}

static const u8 kvm_order[16] = {0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15}; /* struct kvm_regs */

static struct kvm_segment core_segment(u8 number)
{
    if (number == NULL_SEGMENT)
        return (struct kvm_segment){.unusable = 1};
    const struct segment *s = &segments[number];
    return (struct kvm_segment){
        .base = s->base, .limit = s->limit, .selector = selector_of(number), .present = 1, .dpl = 3, .s = 1, .db = s->big,
        .g = s->pages, .type = (u8)(1 | (s->less ? 0 : 2) | (s->down ? 4 : 0) | (s->code ? 8 : 0)),
    };
}

/* Whether the far jump at the end lies in the segment, and so is what the core refused. */
static bool has_exit(const struct mode *mode, u64 ip) 
{
    return ip - code_base(mode) + FAR_EXIT - 1 <= segments[mode->use[IN_CS]].limit;
}

struct vcpu *core_load(const struct state *s, const struct mode *mode)
{
    struct vcpu *c = cpus[mode->compat + mode->segmented];
    u32 base = code_base(mode);
    u64 regs[18];
    if (mode->segmented) {
        segmented.cs = core_segment(mode->use[IN_CS]), segmented.ds = core_segment(mode->use[IN_DS]);
        segmented.es = core_segment(mode->use[IN_ES]), segmented.ss = core_segment(mode->use[IN_SS]);
        if (vcpu_set_state(c, "sregs", &segmented, sizeof segmented))
            die("segments of the core", EINVAL);
    }
    for (int i = 0; i < 16; i++)
        regs[i] = s->gpr[kvm_order[i]];
    regs[16] = s->rip - base, regs[17] = s->rflags;
    static u8 area[4096]; /* struct kvm_xsave */
    memcpy(area, s->fx, 512);
    area[512] = 7;
    memcpy(area + 576, s->ymm, sizeof s->ymm);
    static const struct kvm_vcpu_events none;
    int error = vcpu_set_state(c, "events", &none, sizeof none); /* a trap that was caught waits to be delivered */
    if (!error)
        error = vcpu_set_state(c, "regs", regs, sizeof regs);
    if (error || (error = vcpu_set_state(c, "xsave", area, sizeof area)))
        die("state of the core", -error);
    return c;
}

void core_store(struct vcpu *c, const struct vcpu_exit *e, const struct sequence *code, struct state *s)
{
    const struct mode *mode = &code->mode;
    u32 base = code_base(mode);
    u64 regs[18];
    static u8 area[4096];
    vcpu_get_state(c, "regs", regs, sizeof regs);
    vcpu_get_state(c, "xsave", area, sizeof area);
    for (int i = 0; i < 16; i++)
        s->gpr[kvm_order[i]] = regs[i];
    s->rip = base ? (u32)(regs[16] + base) : regs[16], s->rflags = regs[17];
    memcpy(s->fx, area, 28);
    for (int i = 0; i < 8; i++)
        memcpy(s->fx + 32 + 16 * i, area + 32 + 16 * i, 10);
    memcpy(s->fx + 160, area + 160, 256);
    memcpy(s->ymm, area + 576, sizeof s->ymm);
    s->vector = e->reason == EXIT_LIMIT ? VECTOR_ENDLESS : e->reason == EXIT_DEBUG ? (int)e->vector : 1000 + (int)e->reason;
    s->address = e->reason == EXIT_DEBUG ? e->address : 0;
    if (e->reason == EXIT_SHUTDOWN)
        s->vector = 1; /* a vector stop does not catch traps of TF, and there is no IDT */
    if (mode->segmented && s->vector == 13 && s->rip == code->ip + code->length - FAR_EXIT && has_exit(mode, s->rip))
        s->vector = VECTOR_NONE, s->rip = EXIT32;
    if (s->vector == 14 && s->rip == (mode->compat ? EXIT32 : EXIT64))
        s->vector = VECTOR_NONE;
}

void core_run(struct state *s, const struct sequence *code, bool stepped)
{
    struct vcpu *c = core_load(s, &code->mode);
    struct vcpu_exit e = {0};
    if (!stepped)
        vcpu_run(c, BUDGET, &e);
    for (int i = 0; stepped && i < BUDGET && (i == 0 || e.reason == EXIT_LIMIT); i++)
        vcpu_run(c, 1, &e);
    core_store(c, &e, code, s);
}

/* ---- One case on both --------------------------------------------------------------------------------------------- */

void put_code(const struct sequence *s, bool present)
{
    u32 at = s->ip - CODE;
    if (present)
        memcpy(core_code + at, s->code, s->length);
    else
        memset(core_code + at, 0xcc, s->length);
    if (core_code != host_code && use_host) {
        memcpy(host_code + at, core_code + at, s->length);
    }
}

static u16 flags_to_skip(const struct sequence *s, const struct state *end)
{
    u16 undefined[INSTRUCTIONS + 1], all = 0;
    undefined_flags(s, undefined);
    if (end->rip == (s->mode.compat ? EXIT32 : EXIT64))
        return undefined[s->count];
    for (unsigned i = 0; i <= s->count; i++) {
        if (end->rip == s->ip + s->list[i].at)
            return undefined[i];
        all |= undefined[i] | s->list[i].undefined;
    }
    return all;
}

/* What differs, or NULL. `text` takes a sentence. */
static const char *compare(const struct test *t, const struct state *host, const struct state *core, char *text, size_t size)
{
    static const char *const names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                          "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};
    if (host->vector != core->vector || host->rip != core->rip) {
        snprintf(text, size, "vector: host %d at %#lx, core %d at %#lx", host->vector, (long)host->rip, core->vector,
                 (long)core->rip);
        return text;
    }
    for (int i = 0; i < (t->code.mode.compat ? 8 : 16); i++)
        if (t->code.mode.compat ? (u32)host->gpr[i] != (u32)core->gpr[i] : host->gpr[i] != core->gpr[i]) {
            snprintf(text, size, "%s: host %#lx, core %#lx", names[i], (long)host->gpr[i], (long)core->gpr[i]);
            return text;
        }
    u32 flags = FLAGS_COMPARED & ~(u32)flags_to_skip(&t->code, host);
    if ((host->rflags ^ core->rflags) & flags) {
        snprintf(text, size, "flags: host %#lx, core %#lx, compared %#x", (long)host->rflags, (long)core->rflags, flags);
        return text;
    }
    static const u16 fields[][2] = {{0, 5}, {24, 28}, {32, 42}, {48, 58}, {64, 74}, {80, 90}, {96, 106},
                                  {112, 122}, {128, 138}, {144, 154}}; /* not: opcode and pointers of the x87 */
    for (unsigned i = 0; i < sizeof fields / sizeof *fields + 16; i++) {
        unsigned at = i < 10 ? fields[i][0] : 160 + 16 * (i - 10), end = i < 10 ? fields[i][1] : at + 16;
        if (at >= 160 + 128 && t->code.mode.compat)
            break;
        if (memcmp(host->fx + at, core->fx + at, end - at)) {
            int n = at < 32 ? snprintf(text, size, "FXSAVE image at %u: host ", at) :
                    snprintf(text, size, "%s%u: host ", at < 160 ? "st" : "xmm", (at - (at < 160 ? 32 : 160)) / 16);
            for (unsigned side = 0; side < 2; side++) {
                for (unsigned b = end; b-- > at;)
                    n += snprintf(text + n, size - (size_t)n, "%02x", (side ? core : host)->fx[b]);
                n += snprintf(text + n, size - (size_t)n, side ? "" : ", core ");
            }
            return text;
        }
    }
    for (unsigned i = 0; i < (t->code.mode.compat ? 8 : 16); i++)
        if (memcmp(host->ymm + 16 * i, core->ymm + 16 * i, 16)) {
            int n = snprintf(text, size, "ymm%u, upper half: host ", i);
            for (unsigned side = 0; side < 2; side++) {
                for (unsigned b = 16 * i + 16; b-- > 16 * i;)
                    n += snprintf(text + n, size - (size_t)n, "%02x", (side ? core : host)->ymm[b]);
                n += snprintf(text + n, size - (size_t)n, side ? "" : ", core ");
            }
            return text;
        }
    if (memcmp(host_data, core_data, DATA_SIZE)) {
        unsigned at = 0;
        while (host_data[at] == core_data[at])
            at++;
        snprintf(text, size, "memory at %#x: host %02x, core %02x", DATA + at, host_data[at], core_data[at]);
        return text;
    }
    return NULL;
}

/* Run it; NULL if both agree or it cannot be told. The code is in place. */
static const char *run(const struct test *t, char *text, size_t size, struct counts *count)
{
    struct state core = t->start, host = t->start;
    memcpy(core_data, data, DATA_SIZE);
    core_run(&core, &t->code, t->stepped);
    count->cases++;
    if (core.vector >= 1000) {
        snprintf(text, size, "the core made exit %d at %#lx", core.vector - 1000, (long)core.rip);
        return text;
    }
    if (core.vector == VECTOR_ENDLESS) {
        count->endless++;
        return NULL;
    }
    count->faults += core.vector >= 0;
    for (unsigned i = 0; planted && i < t->code.count; i++) {
        struct core_instruction row;
        if (t->code.list[i].row >= 0 && core_instruction((unsigned)t->code.list[i].row, &row) && !strcmp(row.name, planted))
            core.gpr[3] ^= 16;
    }
    if (!use_host)
        return NULL;
    memcpy(host_data, data, DATA_SIZE);
    host_run(&host, &t->code.mode);
    if (!compare(t, &host, &core, text, size))
        return NULL;
    return is_open(t, &host, &core) ? NULL : compare(t, &host, &core, text, size);
}

/* ---- A find: made smaller, printed, read again ------------------------------------------------------- */

static bool differs(const struct test *t)
{
    char text[256];
    struct counts ignored;
    u16 undefined[INSTRUCTIONS + 1];
    if (!undefined_flags(&t->code, undefined))
        return false;
    put_code(&t->code, true);
    bool found = run(t, text, sizeof text, &ignored);
    put_code(&t->code, false);
    return found;
}

static void shrink(struct test *t)
{
    for (int pass = 0; pass < 2; pass++) {
        for (unsigned i = 0; i < t->code.count; i++) { /* instructions, to NOPs */
            struct test smaller = *t;
            struct instruction *n = &smaller.code.list[i];
            memset(smaller.code.code + n->at, 0x90, n->length);
            n->read = n->written = n->undefined = 0, n->row = -1, n->target = -1;
            if (differs(&smaller))
                *t = smaller;
        }
        if (t->stepped) {
            struct test smaller = *t;
            smaller.stepped = false;
            if (differs(&smaller))
                *t = smaller;
        }
        for (int i = 0; i < 16; i++)
            for (int kind = 0; kind < 3; kind++) {
                struct test smaller = *t;
                smaller.start.gpr[i] = kind == 0 ? 0 : kind == 1 ? DATA : (u32)t->start.gpr[i];
                if (differs(&smaller)) {
                    *t = smaller;
                    break;
                }
            }
        struct test smaller = *t;
        smaller.start.rflags = 0x202;
        if (differs(&smaller))
            *t = smaller;
        for (unsigned at = 0; at < 416; at += at < 32 ? 32 : 16) {
            smaller = *t;
            memset(smaller.start.fx + at, 0, at < 32 ? 32 : 16);
            if (at == 0)
                memcpy(smaller.start.fx, "\x7f\x03", 2), memcpy(smaller.start.fx + 24, "\x80\x1f", 2);
            if (memcmp(&smaller, t, sizeof smaller) && differs(&smaller))
                *t = smaller;
        }
        for (unsigned at = 0; at < sizeof t->start.ymm; at += 16) {
            smaller = *t;
            memset(smaller.start.ymm + at, 0, 16);
            if (memcmp(&smaller, t, sizeof smaller) && differs(&smaller))
                *t = smaller;
        }
        for (unsigned block = DATA_SIZE; block >= 8; block /= 4)
            for (unsigned at = 0; at < DATA_SIZE; at += block) {
                u8 kept[DATA_SIZE];
                memcpy(kept, data + at, block);
                memset(data + at, 0, block);
                if (!differs(t))
                    memcpy(data + at, kept, block);
            }
    }
}

static void print_hex(const u8 *bytes, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        printf("%02x", bytes[i]);
}

/* The mode as a number: 0, 1, or 2 and the segments above. */
static unsigned mode_number(const struct mode *m)
{
    return !m->segmented ? m->compat : 2u | m->use[IN_CS] << 4 | m->use[IN_DS] << 9 | m->use[IN_ES] << 14 | m->use[IN_SS] << 19;
}
static bool mode_of(unsigned number, struct mode *m)
{
    *m = (struct mode){.compat = number & 3, .segmented = number & 2};
    for (unsigned i = 0; m->segmented && i < USED; i++) {
        m->use[i] = number >> (4 + 5 * i) & 31;
        if (m->use[i] > NULL_SEGMENT)
            return false;
    }
    return true;
}

/* case mode stepped ip code(hex) undefined-flags rflags gpr=N:HEX... f(x)OFFSET:HEX... y(mm)OFFSET:HEX... d(ata)OFFSET:HEX... # why */
static void print_case(const struct test *t, const char *why)
{
    u16 undefined[INSTRUCTIONS + 1], all = 0;
    undefined_flags(&t->code, undefined);
    for (unsigned i = 0; i <= t->code.count; i++)
        all |= undefined[i] | t->code.list[i].undefined;
    unsigned skip = 0;
    while (skip < t->code.count && t->code.list[skip].row < 0 && t->code.code[t->code.list[skip].at] == 0x90)
        skip++;
    unsigned from = t->code.list[skip].at;
    bool whole = t->code.indirect || code_border(&t->code.mode);
    if (whole)
        from = 0;
    printf("case %u %d %x ", mode_number(&t->code.mode), t->stepped, t->code.ip + from);
    print_hex(t->code.code + from, t->code.length - from);
    printf(" %x %lx", all, (long)t->start.rflags);
    for (int i = 0; i < 16; i++)
        if (t->start.gpr[i])
            printf(" r%d:%lx", i, (long)t->start.gpr[i]);
    for (unsigned at = 0; at < 416; at += 8)
        if (memcmp(t->start.fx + at, "\0\0\0\0\0\0\0", 8)) {
            printf(" f%u:", at);
            print_hex(t->start.fx + at, 8);
        }
    for (unsigned at = 0; at < sizeof t->start.ymm; at += 8)
        if (memcmp(t->start.ymm + at, "\0\0\0\0\0\0\0", 8)) {
            printf(" y%u:", at);
            print_hex(t->start.ymm + at, 8);
        }
    for (unsigned at = 0; at < DATA_SIZE; at += 8)
        if (memcmp(data + at, "\0\0\0\0\0\0\0", 8)) {
            printf(" d%u:", at);
            print_hex(data + at, 8);
        }
    printf(" #");
    for (unsigned i = 0; i < t->code.count; i++) {
        struct core_instruction row;
        if (t->code.list[i].row >= 0 && core_instruction((unsigned)t->code.list[i].row, &row))
            printf(" %s", row.name);
    }
    printf("; %s\n", why);
    fflush(stdout);
}

static unsigned read_hex(const char *text, u8 *out, unsigned max)
{
    unsigned n = 0, byte;
    while (n < max && sscanf(text + 2 * n, "%2x", &byte) == 1)
        out[n++] = (u8)byte;
    return n;
}

/* The lines of a file that begin with "case"; the number of those that differ. */
static int replay(const char *name)
{
    FILE *file = fopen(name, "r");
    if (!file)
        die(name, errno);
    static char line[1 << 20];
    int number = 0, wrong = 0, cases = 0;
    while (fgets(line, sizeof line, file)) {
        number++;
        if (strncmp(line, "case ", 5))
            continue;
        line[strcspn(line, "#\n")] = 0;
        static struct test t;
        memset(&t, 0, sizeof t);
        memset(data, 0, sizeof data);
        int stepped, used = 0;
        unsigned mode, ip, undefined;
        unsigned long flags;
        static char hex[2 * CODE_MAX + 1];
        if (sscanf(line, "case %u %d %x %1280[0-9a-f] %x %lx%n", &mode, &stepped, &ip, hex, &undefined, &flags,
                   &used) < 6 || !mode_of(mode, &t.code.mode)) {
            fprintf(stderr, "fuzz: %s:%d: not a case\n", name, number);
            exit(2);
        }
        t.code.length = read_hex(hex, t.code.code, CODE_MAX);
        t.stepped = stepped, t.code.ip = ip;
        t.code.count = 1;
        t.code.list[0] = (struct instruction){.undefined = (u16)undefined, .row = -1, .target = 1};
        t.code.list[1].row = -1;
        t.start.rip = ip, t.start.rflags = flags;
        for (char *word = strtok(line + used, " "); word; word = strtok(NULL, " ")) {
            unsigned at = (unsigned)atoi(word + 1);
            const char *value = strchr(word, ':');
            if (!value || at >= (*word == 'r' ? 16u : *word == 'f' ? 504u : *word == 'y' ? 249u : DATA_SIZE - 7u)) {
                fprintf(stderr, "fuzz: %s:%d: %s\n", name, number, word);
                exit(2);
            }
            if (*word == 'r')
                t.start.gpr[at] = strtoul(value + 1, NULL, 16);
            else
                read_hex(value + 1, (*word == 'f' ? t.start.fx : *word == 'y' ? t.start.ymm : data) + at, 8);
        }
        char text[256];
        put_code(&t.code, true);
        const char *why = run(&t, text, sizeof text, &counts[0]);
        put_code(&t.code, false);
        cases++;
        if (why) {
            printf("%s:%d: %s\n", name, number, why);
            wrong++;
        }
    }
    fclose(file);
    printf("replayed %d cases, %d differ\n", cases, wrong);
    return wrong;
}

/* ---- The loop ------------------------------------------------------------------------------------------------ */

static void print_counts(void)
{
    static const char *const names[6] = {"table, 64-bit mode", "table, compatibility mode", "wild bytes, 64-bit mode",
                                         "wild bytes, compatibility mode", "segments and 16-bit code",
                                         "code over the end of a segment or 10000h"};
    u64 all = 0;
    for (int i = 0; i < 6; i++) {
        printf("count %s: %lu cases, %lu ended in a fault, %lu did not end\n", names[i], (long)counts[i].cases,
               (long)counts[i].faults, (long)counts[i].endless);
        all += counts[i].cases;
    }
    for (unsigned i = 0; i < row_count; i++) {
        struct core_instruction row;
        core_instruction(i, &row);
        if (row_is_used(i, false) || row_is_used(i, true))
            printf("row %u %s %s %lu\n", i, row.feature, row.name, (long)row_cases[i]);
    }
    printf("total %lu\n", (long)all);
    fflush(stdout);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double time_is_over;
static u64 limit = ~0ull;
static bool is_time(u64 done) { return done >= limit || now() >= time_is_over; }

int main(int argc, char **argv)
{
    double seconds = 10;
    u64 seed = 0, round = 0;
    bool ways = false;
    unsigned finds = 0, most = 10;
    const char *file = NULL;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--no-host")) { use_host = false; continue; }
        if (!strcmp(argv[i], "--ways")) { ways = true; continue; }
        if (!strcmp(argv[i], "--seconds")) seconds = atof(value);
        else if (!strcmp(argv[i], "--cases")) limit = strtoul(value, NULL, 10), seconds = 1e9;
        else if (!strcmp(argv[i], "--seed")) seed = strtoul(value, NULL, 10);
        else if (!strcmp(argv[i], "--finds")) most = (unsigned)atoi(value);
        else if (!strcmp(argv[i], "--round")) round = strtoul(value, NULL, 10);
        else if (!strcmp(argv[i], "--plant")) planted = value;
        else if (!strcmp(argv[i], "--replay")) file = value;
        else { fprintf(stderr, "fuzz: unknown option %s\n", argv[i]); return 2; }
        i++;
    }
    time_is_over = now() + seconds;
    if (ways) {
        generate_open();
        return run_ways(seed, round, is_time, most) ? 1 : 0;
    }
    core_data = mmap(NULL, DATA_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (use_host) {
        int error = host_open();
        if (error)
            die("the host as the oracle", -error);
        host_begin();
        core_code = host_code;
    } else {
        core_code = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        memset(core_code, 0xcc, CODE_SIZE);
    }
    cpus[0] = make_cpu(false);
    cpus[1] = make_cpu(true);
    cpus[2] = make_cpu(true);
    generate_open();
    freedoms_open();
    if (file)
        return replay(file) ? 1 : 0;
    u64 done = 0;
    for (; finds < most && !is_time(done); round++) {
        struct random r = {(seed << 32) + round}; /* no multiple of what random64 adds: seeds would share numbers */
        for (unsigned at = 0; at < DATA_SIZE; at += 8) {
            u64 x = random_floats(&r);
            memcpy(data + at, &x, 8);
        }
        for (int codes = 0; codes < 64 && done < limit && finds < most; codes++) {
            static struct test t;
            bool wild = one_in(&r, 4);
            struct mode mode = {.compat = one_in(&r, 4)};
            if (!wild && one_in(&r, 4))
                generate_segments(&r, &mode);
            generate(&r, &mode, wild, &t.code);
            put_code(&t.code, true);
            for (unsigned i = 0; i < t.code.count; i++)
                if (t.code.list[i].row >= 0)
                    row_cases[t.code.list[i].row] += STATES;
            bool found = false;
            char text[256];
            for (int i = 0; i < STATES && !found; i++) {
                generate_state(&r, &t.code, &t.start);
                t.stepped = one_in(&r, 8);
                found = run(&t, text, sizeof text, &counts[mode.segmented ? 4 + !!code_border(&mode) : wild * 2 + mode.compat]);
                done++;
            }
            put_code(&t.code, false);
            if (found) {
                if (pointers_are_stored(&t) && !differs(&t))
                    continue;
                u8 kept[DATA_SIZE];
                memcpy(kept, data, DATA_SIZE);
                printf("find in round %lu: %s\n", (long)round, text);
                if (differs(&t))
                    shrink(&t);
                else
                    printf("it does not come again\n");
                put_code(&t.code, true);
                const char *why = run(&t, text, sizeof text, &counts[0]);
                put_code(&t.code, false);
                print_case(&t, why ? why : "not found again");
                memcpy(data, kept, DATA_SIZE);
                finds++;
            }
        }
    }
    print_counts();
    return finds ? 1 : 0;
}
