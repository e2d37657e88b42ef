/* fuzz --ways: host code against the interpreter, in what user mode of the host cannot show. The same machine four times: interpreted,
 * translated at once, in random regions, and after three entries. Sequences of the table's instructions in a loop over two pages, at
 * CPL 3, in 64-bit and compatibility mode; in runs of random lengths, with random breakpoints, watchpoints, caught vectors, steps and
 * traces; between runs interrupts, whose handlers change page tables, address spaces and code; registers point into the code, too.
 * After each run all is compared: exit, registers, flags, undefined ones too, counts, memory with the frames of events, traces. */
#include "generate.h"
#include "core.h"
#include "ways.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { WAYS = 4, RAM = 0x40000, STATES = 4, RUNS = 12, VECTORS = 10, VECTOR_0 = 0x40 };
/* Physical: page tables of two address spaces, the kernel's 16 pages, two pages of code and of data, and others in their place. */
enum { TABLES_A = 0x1000, TABLES_B = 0x5000, KERNEL_AT = 0x10000, CODE_AT = 0x20000, DATA_AT = 0x24000, DEVICE_AT = 0x80000 };
/* Linear, all in one page table: */
enum { KERNEL = 0x30000000, TSS = KERNEL + 0x800, IDT = KERNEL + 0x1000, HANDLERS = KERNEL + 0xa000, TABLE_A = KERNEL + 0x3000,
       TABLE_B = KERNEL + 0x4000, STACK = KERNEL + 0x7000, COUNTS = KERNEL + 0x8000, PAGE_FAULT = KERNEL + 0x9000 };
enum { HANDLER_SIZE = 128, CODE_INDEX = CODE >> 12 & 511, DATA_INDEX = DATA >> 12 & 511, PF = 14 };

static const char *const names[WAYS] = {"interpreter", "translator", "random regions", "threshold 3"};
static struct way {
    struct vm *vm;
    struct vcpu *c;
    u8 *ram;
    u64 traced;               /* a sum over the records of traces */
} ways[WAYS];

/* What a run left, but for memory. */
struct outcome {
    u64 regs[18];
    struct kvm_sregs sregs;
    u8 xsave[4096];
    struct core_progress progress;
    struct { u64 reason, rip, write, size, count, address, cause, id, vector; } exits[4];
    u64 exit_count, traced, instructions;
};

/* ---- The kernel --------------------------------------------------------------------------------------------------- */

static u8 *place(u8 *ram, u32 linear) { return ram + KERNEL_AT + (linear - KERNEL); }

struct writer { u8 *at; };
static void bytes(struct writer *a, const char *hex)
{
    for (; *hex; hex += 2) {
        while (*hex == ' ')
            hex++;
        sscanf(hex, "%2hhx", a->at++);
    }
}
static void word(struct writer *a, u32 value) { memcpy(a->at, &value, 4), a->at += 4; }
/* An instruction with an absolute address, and a constant of 0, 1 or 4 bytes. */
static void at_address(struct writer *a, const char *opcode, u32 address, unsigned size, u32 constant)
{
    bytes(a, opcode), word(a, address);
    memcpy(a->at, &constant, size), a->at += size;
}
static void flush(struct writer *a, u32 linear) { at_address(a, "0f013c25", linear, 0, 0); } /* INVLPG */
static void change_entry(struct writer *a, u32 table, unsigned index, u32 by) { at_address(a, "813425", table + 8 * index, 4, by); }

/* What an interrupt does, by its vector. */
static void write_handler(struct writer *a, unsigned n, struct random *r, const struct sequence *code)
{
    bytes(a, "50"); /* push rax */
    at_address(a, "ff0425", COUNTS + 4 * n, 0, 0);
    switch (n) {
    case 1: change_entry(a, TABLE_A, DATA_INDEX, 1), flush(a, DATA); break; /* the page comes and goes */
    case 2: change_entry(a, TABLE_A, DATA_INDEX + 1, 2), flush(a, DATA + PAGE); break; /* or is read-only */
    case 3: change_entry(a, TABLE_A, CODE_INDEX, 0x2000), flush(a, CODE); break; /* other code in its place */
    case 4: bytes(a, "0f20d8 35"), word(a, TABLES_A ^ TABLES_B), bytes(a, "0f22d8"); break; /* the other address space */
    case 5: at_address(a, "803425", code->ip + below(r, code->length), 1, 1u << below(r, 8)); break; /* a bit of the code */
    case 6: bytes(a, "0f20d8 0f22d8"); break;
    case 7: change_entry(a, TABLE_A, DATA_INDEX + 1, CODE_AT ^ (DATA_AT + PAGE)), flush(a, DATA + PAGE); break; /* code as data */
    case 8: change_entry(a, TABLE_A, DATA_INDEX, DEVICE_AT ^ DATA_AT), flush(a, DATA); break;
    case 9: change_entry(a, TABLE_B, CODE_INDEX + 1, 0x2000), flush(a, CODE + PAGE); break;
    }
    bytes(a, "58 48cf"); /* pop rax; iretq */
}

/* An exception begins the loop anew; but a page fault for the data, which it brings back. */
static void write_exception(struct writer *a, unsigned vector, u32 start)
{
    bool error = vector == 8 || (vector >= 10 && vector <= 14) || vector == 17;
    if (vector == PF) {
        bytes(a, "50 0f20d0 2d"), word(a, DATA); /* push rax; mov rax, cr2; sub eax, ... */
        bytes(a, "3d"), word(a, DATA_SIZE);
        bytes(a, "73 00");
        u8 *wild = a->at;
        for (u32 table = TABLE_A; table <= TABLE_B; table += TABLE_B - TABLE_A)
            for (u32 i = 0; i < 2; i++)
                at_address(a, "c70425", table + 8 * (DATA_INDEX + i), 4, (DATA_AT + i * PAGE) | 7);
        flush(a, DATA), flush(a, DATA + PAGE);
        bytes(a, "58 4883c408 48cf");
        wild[-1] = (u8)(a->at - wild);
        bytes(a, "58");
    }
    if (error)
        bytes(a, "4883c408");
    bytes(a, "48c70424"), word(a, start), bytes(a, "48cf"); /* mov qword [rsp], ...; iretq */
}

static void write_kernel(u8 *ram, struct random r, const struct sequence *code)
{
    static const u64 descriptors[7] = {[2] = 0x00af9b000000ffff, [4] = 0x00cffb000000ffff, [5] = 0x00cff3000000ffff,
                                       [6] = 0x00affb000000ffff};
    memset(ram, 0, CODE_AT);
    for (u32 top = TABLES_A; top <= TABLES_B; top += TABLES_B - TABLES_A) {
        u64 *entries = (u64 *)(ram + top);
        entries[0] = (top + 0x1000) | 7;
        entries[512 + (CODE >> 30 & 511)] = (top + 0x2000) | 7;
        entries[1024 + (CODE >> 21 & 511)] = (top + 0x3000) | 7;
        u64 *pages = entries + 1536;
        for (unsigned i = 0; i < 16; i++)
            pages[(KERNEL >> 12 & 511) + i] = (KERNEL_AT + i * PAGE) | 3;
        pages[TABLE_A >> 12 & 511] = (TABLES_A + 0x3000) | 3;
        pages[TABLE_B >> 12 & 511] = (TABLES_B + 0x3000) | 3;
        for (unsigned i = 0; i < 2; i++) {
            bool other = top == TABLES_B && i;
            pages[CODE_INDEX + i] = (CODE_AT + (other ? i + 2 : i) * PAGE) | 7;
            pages[DATA_INDEX + i] = (DATA_AT + (top == TABLES_B ? 1 - i : i) * PAGE) | 7 | 1ull << 63;
        }
    }
    memcpy(place(ram, KERNEL), descriptors, sizeof descriptors);
    u64 stack = STACK;
    memcpy(place(ram, TSS) + 0x24, &stack, 8); /* IST1 */
    for (unsigned vector = 0; vector < VECTOR_0 + VECTORS; vector++) {
        if (vector >= 32 && vector < VECTOR_0)
            continue;
        u32 handler = vector == PF ? PAGE_FAULT : HANDLERS + HANDLER_SIZE * (vector < 32 ? vector : 32 + vector - VECTOR_0);
        struct writer a = {place(ram, handler)};
        if (vector < 32)
            write_exception(&a, vector, code->ip);
        else
            write_handler(&a, vector - VECTOR_0, &r, code);
        struct { u16 low, selector, flags, middle; u32 high, reserved; } gate = {(u16)handler, 0x10, 0x8e01, (u16)(handler >> 16), 0, 0};
        memcpy(place(ram, IDT) + 16 * vector, &gate, 16);
    }
}

static void make_way(unsigned n, u64 seed)
{
    char text[32];
    struct way *w = &ways[n];
    snprintf(text, sizeof text, "%lu", (long)(n == 2 ? seed * 2 + 1 : 0));
    unsetenv("VMFS_NO_JIT");
    if (n == 0)
        setenv("VMFS_NO_JIT", "1", 1);
    setenv("VMFS_JIT_THRESHOLD", n == 3 ? "3" : "0", 1);
    setenv("VMFS_JIT_SEED", text, 1);
    w->vm = vm_create();
    w->ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!w->vm || w->ram == MAP_FAILED || vm_map(w->vm, 0, 0, w->ram, RAM, 0) || !(w->c = vcpu_create(w->vm, 0)))
        abort();
}

/* ---- A run --------------------------------------------------------------------------------------------------------- */

static void load(struct vcpu *c, const struct state *s, bool compat)
{
    static const u8 kvm_order[16] = {0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15};
    struct kvm_segment data = {.limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1};
    struct kvm_segment code = data;
    code.selector = compat ? 0x23 : 0x33, code.type = 11, code.l = !compat, code.db = compat;
    struct kvm_sregs sregs = {
        .cs = code, .ds = data, .es = data, .fs = data, .gs = data, .ss = data,
        .tr = {.base = TSS, .limit = 0x67, .selector = 0x40, .type = 11, .present = 1}, .ldt = {.unusable = 1},
        .gdt = {.base = KERNEL, .limit = 0x37}, .idt = {.base = IDT, .limit = 0xfff},
        .cr0 = 0x80050033, .cr3 = TABLES_A, .cr4 = 0x40620, .efer = 0xd01, .apic_base = 0xfee00900,
    };
    sregs.fs.base = 64, sregs.gs.base = 128;
    struct kvm_xcrs xcrs = {.nr_xcrs = 1, .xcrs[0].value = 7};
    static const struct kvm_vcpu_events none;
    static u8 area[4096];
    u64 regs[18];
    for (int i = 0; i < 16; i++)
        regs[i] = s->gpr[kvm_order[i]];
    regs[16] = s->rip, regs[17] = s->rflags;
    memcpy(area, s->fx, 512);
    area[512] = 7;
    memcpy(area + 576, s->ymm, sizeof s->ymm);
    if (vcpu_set_state(c, "sregs", &sregs, sizeof sregs) || vcpu_set_state(c, "xcrs", &xcrs, sizeof xcrs) ||
        vcpu_set_state(c, "events", &none, sizeof none) || vcpu_set_state(c, "regs", regs, sizeof regs) ||
        vcpu_set_state(c, "xsave", area, sizeof area))
        abort();
}

static void traced(void *argument, const struct core_trace_record *records, size_t count, u64 events, bool ended)
{
    struct way *w = argument;
    (void)ended;
    w->traced = w->traced * 31 + events;
    for (size_t i = 0; i < count; i++)
        for (unsigned b = 0; b < sizeof *records; b += 8) {
            u64 x;
            memcpy(&x, (const u8 *)&records[i] + b, 8);
            w->traced = (w->traced ^ x) * 0x9e3779b97f4a7c15;
        }
}

static void put_exit(struct outcome *o, const struct vcpu_exit *e)
{
    if (o->exit_count < 4)
        memcpy(&o->exits[o->exit_count], (u64[]){e->reason, e->rip, e->write, e->size, e->count, e->address, e->cause, e->id, e->vector},
               sizeof o->exits[0]);
    o->exit_count++;
}

struct plan { i64 budget; bool goes_on; int interrupt; };

static void run(struct way *w, const struct plan *p, struct outcome *o)
{
    struct vcpu_exit e = {0};
    const struct vcpu_exit *others;
    memset(o, 0, sizeof *o);
    if (p->interrupt >= 0)
        vcpu_interrupt(w->c, (u8)(VECTOR_0 + p->interrupt));
    (p->goes_on ? vcpu_go_on : vcpu_run)(w->c, p->budget, &e);
    put_exit(o, &e);
    if (e.reason == EXIT_DEBUG)
        for (size_t i = 0, n = vcpu_also(w->c, &others); i < n; i++)
            put_exit(o, &others[i]);
    if (e.reason == EXIT_MMIO && !e.write) {
        size_t size;
        u8 *data = vcpu_exit_data(w->c, &size);
        for (size_t i = 0; i < size; i++)
            data[i] = (u8)((e.address + i) * 37);
    }
    vcpu_get_state(w->c, "regs", o->regs, sizeof o->regs);
    vcpu_get_state(w->c, "sregs", &o->sregs, sizeof o->sregs);
    vcpu_get_state(w->c, "xsave", o->xsave, sizeof o->xsave);
    vcpu_get_state(w->c, "progress", &o->progress, sizeof o->progress);
    o->traced = w->traced;
    o->instructions = o->progress.instructions;
}

/* Where two outcomes differ, as a word; NULL: nowhere. */
static const char *differ(const struct outcome *a, const struct outcome *b, const u8 *ram_a, const u8 *ram_b, char *text, size_t size)
{
    static const char *const registers[18] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11",
                                              "r12", "r13", "r14", "r15", "rip", "flags"};
    if (a->exit_count != b->exit_count || memcmp(a->exits, b->exits, sizeof a->exits)) {
        snprintf(text, size, "exit: %lu at %#lx, vector %lu, address %#lx; %lu at %#lx, vector %lu, address %#lx", (long)a->exits[0].reason,
                 (long)a->exits[0].rip, (long)a->exits[0].vector, (long)a->exits[0].address, (long)b->exits[0].reason,
                 (long)b->exits[0].rip, (long)b->exits[0].vector, (long)b->exits[0].address);
        return text;
    }
    for (unsigned i = 18; i--;)
        if (a->regs[i] != b->regs[i]) {
            snprintf(text, size, "%s: %#lx, %#lx", registers[i], (long)a->regs[i], (long)b->regs[i]);
            return text;
        }
    if (a->instructions != b->instructions)
        return "instructions";
    if (memcmp(&a->sregs, &b->sregs, sizeof a->sregs))
        return "sregs";
    for (unsigned i = 0; i < sizeof a->xsave; i++)
        if (a->xsave[i] != b->xsave[i]) {
            snprintf(text, size, "xsave at %u: %02x, %02x", i, a->xsave[i], b->xsave[i]);
            return text;
        }
    if (memcmp(&a->progress, &b->progress, sizeof a->progress))
        return "progress";
    if (a->traced != b->traced)
        return "trace";
    if (memcmp(ram_a, ram_b, RAM)) {
        unsigned at = 0;
        while (ram_a[at] == ram_b[at])
            at++;
        snprintf(text, size, "memory at %#x: %02x, %02x", at, ram_a[at], ram_b[at]);
        return text;
    }
    return NULL;
}

/* ---- Points at which to stop ------------------------------------------------------------------------------------------ */

static void set_points(struct random *r, const struct sequence *code, u64 counts[POINT_KINDS])
{
    struct vcpu_stop stops[64];
    unsigned n = 0;
    bool step = one_in(r, 12);
    if (one_in(r, 3))
        for (unsigned i = 1 + below(r, 3); i--;)
            stops[n++] = (struct vcpu_stop){.kind = STOP_BREAKPOINT, .id = n, .address = code->ip + code->list[below(r, code->count + 1)].at};
    if (one_in(r, 4))
        for (unsigned i = 1 + below(r, 3); i--;)
            stops[n++] = (struct vcpu_stop){.kind = one_in(r, 3) ? STOP_WATCH_PHYSICAL : STOP_WATCH, .id = n,
                                            .address = below(r, 2 * PAGE), .length = 1u << below(r, 4), .on_read = one_in(r, 2), .on_write = true};
    for (unsigned i = 0; i < n; i++)
        if (stops[i].kind == STOP_WATCH || stops[i].kind == STOP_WATCH_PHYSICAL)
            stops[i].address += stops[i].kind == STOP_WATCH ? DATA : DATA_AT;
    bool vectors = one_in(r, 4), interrupts = one_in(r, 8);
    for (unsigned i = 0; vectors && i < 20; i++)
        stops[n++] = (struct vcpu_stop){.kind = STOP_VECTOR, .id = n, .address = i};
    for (unsigned i = 0; interrupts && i < VECTORS; i++)
        stops[n++] = (struct vcpu_stop){.kind = STOP_VECTOR, .id = n, .address = VECTOR_0 + i};
    if (one_in(r, 8))
        stops[n++] = (struct vcpu_stop){.kind = STOP_CR3, .id = n};
    bool trace = one_in(r, 8);
    struct core_trace what = {.kinds = 0x1e, .modes = 31, .last = ~0ull, .data_last = ~0ull};
    if (one_in(r, 2))
        what.modes = CORE_TRACE_USER;
    counts[POINT_STEP] += step, counts[POINT_TRACE] += trace, counts[POINT_STOPS] += n > 0;
    for (unsigned i = 0; i < WAYS; i++)
        if (vcpu_set_debug(ways[i].c, step, stops, n) || vcpu_set_trace(ways[i].c, trace ? &what : NULL, traced, &ways[i]))
            abort();
}

/* ---- The loop ------------------------------------------------------------------------------------------------------------ */

/* The jump to the exit becomes one to `to`. */
static void end_with(struct sequence *s, u32 to)
{
    u32 relative = to - (s->ip + s->length);
    memcpy(s->code + s->length - 4, &relative, 4);
}

static void print_find(const struct sequence *code, const struct sequence *second, const struct state *s, unsigned way, const char *why, u64 round,
                       unsigned number)
{
    printf("find in round %lu, run %u, %s: %s\n", (long)round, number, names[way], why);
    for (unsigned k = 0; k < 2; k++) {
        const struct sequence *c = k ? second : code;
        printf("  %s code at %#x:", c->mode.compat ? "32-bit" : "64-bit", c->ip);
        for (unsigned i = 0; i <= c->count; i++) {
            struct core_instruction row = {.name = ""};
            if (c->list[i].row >= 0)
                core_instruction((unsigned)c->list[i].row, &row);
            printf(" %x:", c->ip + c->list[i].at);
            for (unsigned b = 0; b < c->list[i].length; b++)
                printf("%02x", c->code[c->list[i].at + b]);
            printf(" %s", row.name);
        }
        printf("\n");
    }
    printf("  begins with flags %lx", (long)s->rflags);
    for (unsigned i = 0; i < 16; i++)
        printf(" r%u:%lx", i, (long)s->gpr[i]);
    printf("\n");
    fflush(stdout);
}

unsigned run_ways(u64 seed, u64 first_round, bool (*is_time)(u64 done), unsigned most)
{
    static struct sequence code, second, other;
    static struct outcome outcomes[WAYS];
    u64 cases = 0, faults = 0, interrupts = 0, exits[16] = {0}, points[POINT_KINDS] = {0};
    unsigned finds = 0;
    host_avx = __builtin_cpu_supports("avx");
    for (unsigned i = 0; i < WAYS; i++)
        make_way(i, seed);
    for (u64 round = first_round; finds < most && !is_time(cases); round++) {
        struct random r = {(seed << 32) + round};
        struct mode mode = {.compat = one_in(&r, 4)};
        bool wild = one_in(&r, 6);
        generate(&r, &mode, wild, &code);
        generate(&r, &mode, wild, &second);
        generate(&r, &mode, wild, &other); /* in the place of the first */
        second.ip = CODE + PAGE + 0x300 + below(&r, 64);
        other.ip = code.ip;
        end_with(&code, second.ip), end_with(&second, code.ip), end_with(&other, second.ip);
        struct random kernel = r;
        static u8 image[RAM];
        write_kernel(image, kernel, &code);
        memset(image + CODE_AT, 0xcc, RAM - CODE_AT);
        memcpy(image + CODE_AT + (code.ip - CODE), code.code, code.length);
        memcpy(image + CODE_AT + (second.ip - CODE), second.code, second.length);
        memcpy(image + CODE_AT + 2 * PAGE + (other.ip - CODE), other.code, other.length);
        memcpy(image + CODE_AT + 2 * PAGE + (second.ip - CODE), other.code, other.length);
        for (unsigned at = 0; at < 4 * PAGE; at += 8) {
            u64 x = random_floats(&r);
            memcpy(image + DATA_AT + at, &x, 8);
        }
        bool found = false;
        for (unsigned n = 0; n < STATES && !found; n++) {
            static struct state s;
            generate_state(&r, &code, &s);
            if (one_in(&r, 3)) { /* the code changes itself */
                static const u8 registers[] = {3, 4, 5, 6, 7};
                s.gpr[registers[below(&r, 5)]] = code.ip + below(&r, code.length);
            }
            for (unsigned i = 0; i < WAYS; i++) {
                memcpy(ways[i].ram, image, RAM);
                load(ways[i].c, &s, mode.compat);
            }
            set_points(&r, &code, points);
            for (unsigned k = 0; k < RUNS && !found; k++) {
                struct plan p = {.budget = one_in(&r, 3) ? 1 + below(&r, 4) : one_in(&r, 2) ? 1 + below(&r, 60) : 1 + below(&r, 1000),
                                 .goes_on = k && one_in(&r, 2), .interrupt = one_in(&r, 2) ? (int)below(&r, VECTORS) : -1};
                if (vcpu_interrupts_queued(ways[0].c))
                    p.interrupt = -1;
                interrupts += p.interrupt >= 0;
                if (one_in(&r, 6))
                    set_points(&r, &code, points);
                for (unsigned i = 0; i < WAYS; i++) {
                    run(&ways[i], &p, &outcomes[i]);
                    char text[256];
                    const char *why = i ? differ(&outcomes[0], &outcomes[i], ways[0].ram, ways[i].ram, text, sizeof text) : NULL;
                    cases += i > 0;
                    if (why && !found) {
                        found = true;
                        finds++;
                        print_find(&code, &second, &s, i, why, round, n * RUNS + k);
                    }
                }
                exits[outcomes[0].exits[0].reason & 15]++;
                if (outcomes[0].exits[0].reason == EXIT_SHUTDOWN || outcomes[0].exits[0].reason == EXIT_ERROR)
                    break;
            }
            faults += outcomes[0].progress.exceptions;
        }
    }
    struct vcpu_counters counters;
    vcpu_get_counters(ways[1].c, &counters);
    printf("ways: %lu cases, %lu interrupts, %lu runs with points, %lu in steps, %lu traced; exits: %lu limit, %lu debug, %lu mmio, %lu shutdown\n",
           (long)cases, (long)interrupts, (long)points[POINT_STOPS], (long)points[POINT_STEP], (long)points[POINT_TRACE],
           (long)exits[EXIT_LIMIT], (long)exits[EXIT_DEBUG], (long)exits[EXIT_MMIO], (long)exits[EXIT_SHUTDOWN]);
    printf("translated: %lu of %lu instructions, %lu regions, %lu killed, %lu exceptions\n", (long)counters.instructions_translated,
           (long)counters.instructions, (long)counters.regions, (long)counters.regions_killed, (long)counters.exceptions);
    fflush(stdout);
    return finds;
}
