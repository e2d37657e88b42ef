/* Regions: which blocks they are of, the memory of their code, and going in and out of it. */
#define _GNU_SOURCE
#include "emit.h"

#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cache.h"
#include "flags.h"
#include "jitdump.h"
#include "recent.h"
#include "zeros.h"

enum { THRESHOLD = 40 };
/* The most that a block takes for itself, and each of its instructions: two calls out of line that store and load all vector
 * registers, their sites, and its own code. */
enum { MEMBER_ROOM = 1024, INSTRUCTION_ROOM = 1536, COPY_ROOM = 960 /* ... that is copied (struct copy) */ };
_Static_assert(REGION_BLOCKS * MEMBER_ROOM + REGION_INSTRUCTIONS * (INSTRUCTION_ROOM + COPY_ROOM) < PART_SIZE, "a region fits into a part");

struct region {
    struct region *next;      /* in its part */
    u64 key;
    bool dead;
    struct way *ways;         /* out of it */
    unsigned count;
    struct block *blocks[];
};
struct translator {
    struct code_memory *memory;
    struct part parts[CODE_PARTS]; /* of the memory; `queue` names those of this CPU */
    u8 queue[CODE_PARTS];     /* a ring from `oldest` on; the last is the one in use */
    unsigned oldest, has;
    u32 threshold;
    u64 seed;
    u64 host_features[4];
    struct profile { u64 calls, leaves; } *profile; /* by row; NULL: nothing is counted */
    struct translation work;
};

const struct shared *shared_code(const struct translator *t) { return &t->memory->shared; }
bool host_has(const struct translator *t, enum feature f) { return t->host_features[f >> 6] >> (f & 63) & 1; }

bool is_cut(const struct translator *t, const void *where)
{
    u64 x = ((u64)(uintptr_t)where ^ t->seed) * 0x9e3779b97f4a7c15;
    return t->seed && !(x >> 61);
}

/* ---- What all regions share ------------------------------------------------------------------------------------------- */

static const u8 saved[] = {RBX, RBP, 12, 13, 14, 15};

static void put_push(struct code *code, unsigned reg) { put_opcode(code, 0, reg >> 3, false, M1, 0x50 + (reg & 7)); }
static void put_pop(struct code *code, unsigned reg) { put_opcode(code, 0, reg >> 3, false, M1, 0x58 + (reg & 7)); }

static void spill(struct code *code)
{
    store64(code, FIELD(budget), BUDGET);
    for (unsigned i = 0; i < 16; i++)
        if (pinned(i * 8) != NO_REGISTER)
            store64(code, guest_place(i * 8), pinned(i * 8));
}
static void reload(struct code *code)
{
    load64(code, BUDGET, FIELD(budget));
    for (unsigned i = 0; i < 16; i++)
        if (pinned(i * 8) != NO_REGISTER)
            load64(code, pinned(i * 8), guest_place(i * 8));
}
/* From host code's stack to the thread's, and out of `enter`. */
static void restore_host(struct code *code)
{
    for (unsigned i = sizeof saved; i--;)
        put_pop(code, saved[i]);
}
static void jump_to(struct code *code, void (*function)(void))
{
    load_constant(code, RAX, (u64)(uintptr_t)function);
    put_modrm(code, 0, M1, 0xff, 4, in_register(RAX));
}

static void image_of_flags(struct vcpu *c)
{
    u64 flags = get_arithmetic_flags(c);
    c->flags_image = (u32)((flags & 0xff) << 8 | !!(flags & FLAG_OF));
}
static void flags_of_image(struct vcpu *c)
{
    set_arithmetic_flags(c, (c->flags_image >> 8 & 0xff) | (c->flags_image & 1 ? FLAG_OF : 0));
}

OP(op_continue)
{
    (void)r;
    c->continues = true;
}

/* From a region: the instruction of a site, by its handler. False: the handler left. */
static bool translated_call(struct vcpu *c, const struct site *s)
{
    flags_of_image(c);
    c->gpr[GPR_IP] = s->ip;
    c->continues = false;
    if (unlikely(c->translator->profile != NULL))
        c->translator->profile[s->records[0].id].calls++;
    run_records(c, s->records[0].run, s->records);
    if (!c->continues) {
        end_translated(c, instructions_done(c));
        return false;
    }
    if (unlikely(s->region->dead || s->region->key != c->key)) { /* it changed code of the region, or a mode */
        leave(c, &s->records[s->count - 1]);
        end_translated(c, instructions_done(c));
        return false;
    }
    image_of_flags(c);
    return true;
}

/* From a region: on with r, in the interpreter. */
static void translated_leave(struct vcpu *c, const struct record *r)
{
    flags_of_image(c);
    if (unlikely(c->translator->profile != NULL) && r->run != op_end)
        c->translator->profile[r->id].leaves++;
    end_translated(c, instructions_done(c) - r->left - (r->run != op_end));
    CONTINUE(c, r);
}

void block_translated(struct vcpu *c, const struct record *r)
{
    const struct block *b = (const struct block *)((const u8 *)r - offsetof(struct block, records));
    image_of_flags(c);
    c->translated = true;
    c->translated_from = instructions_done(c) - b->count;
    c->translator->memory->shared.enter(c, b->code);
}

/* From a region: the block of `scratch` is next, but the budget ends before. */
static void translated_stop(struct vcpu *c)
{
    flags_of_image(c);
    c->gpr[GPR_IP] = ((const struct block *)(uintptr_t)c->scratch)->ip;
    c->now = NULL;
    end_translated(c, instructions_done(c));
}

static void translated_way(struct vcpu *c, struct way *w);

static u8 *executable(const struct translator *t, u8 *written) { return written + t->memory->to_executable; }

/* Host code's stack is the room below struct vcpu (HOST_STACK), so that RSP is also the register for that. There its calls leave
 * a return address, and signals their frames; C code runs on the thread's stack. */
static void write_shared(struct code_memory *m)
{
    struct code code = {m->writable};
    struct shared *shared = &m->shared;
    u8 *enter = code.at; /* (c, code) */
    for (unsigned i = 0; i < sizeof saved; i++)
        put_push(&code, saved[i]);
    store64(&code, in_memory(RDI, offsetof(struct vcpu, host_stack)), RSP);
    load64(&code, C, in_register(RDI));
    load64(&code, T0, in_register(RSI));
    reload(&code);
    put_modrm(&code, 0, M1, 0xff, 4, in_register(T0));

    shared->leave = code.at; /* T0: the record, T1: the instruction pointer of its block */
    store64(&code, FIELD(gpr[GPR_IP]), T1);
    spill(&code);
    load64(&code, RDI, in_register(C));
    load64(&code, RSI, in_register(T0));
    load64(&code, RSP, FIELD(host_stack));
    restore_host(&code);
    jump_to(&code, (void (*)(void))translated_leave);

    shared->stop = code.at;
    spill(&code);
    load64(&code, RDI, in_register(C));
    load64(&code, RSP, FIELD(host_stack));
    restore_host(&code);
    jump_to(&code, (void (*)(void))translated_stop);

    shared->way = code.at; /* T0: the way */
    spill(&code);
    load64(&code, RDI, in_register(C));
    load64(&code, RSI, in_register(T0));
    load64(&code, RSP, FIELD(host_stack));
    restore_host(&code);
    jump_to(&code, (void (*)(void))translated_way);

    shared->call = code.at; /* T0: the site */
    put_pop(&code, T1);
    spill(&code);
    load64(&code, RBX, in_register(C));
    load64(&code, RBP, in_register(T1));
    load64(&code, RDI, in_register(C));
    load64(&code, RSI, in_register(T0));
    load64(&code, RSP, FIELD(host_stack));
    lea64(&code, RSP, in_memory(RSP, -8)); /* aligned to 16 */
    load_constant(&code, RAX, (u64)(uintptr_t)translated_call);
    put_modrm(&code, 0, M1, 0xff, 2, in_register(RAX));
    put_modrm(&code, 0, M1, 0x84, RAX, in_register(RAX));
    u8 *left = jump_if(&code, CC_E);
    load64(&code, C, in_register(RBX));
    load64(&code, T1, in_register(RBP));
    reload(&code);
    put_push(&code, T1);
    put8(&code, 0xc3);
    land(left, code.at);
    lea64(&code, RSP, in_memory(RSP, 8));
    restore_host(&code);
    put8(&code, 0xc3);
    enter += m->to_executable;
    memcpy(&shared->enter, &enter, sizeof enter);
}

/* ---- Memory ---------------------------------------------------------------------------------------------------------------- */

static u64 number_of(const char *name, u64 otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

/* LAHF and SAHF in 64-bit mode: the first processors of AMD64 and Intel 64 did not have them. */
static bool has_lahf(void)
{
    u32 out[4] = {0};
    return __get_cpuid(0x80000001, &out[0], &out[1], &out[2], &out[3]) && out[2] & 1;
}

/* What the host's processor has. To ask it takes 25 us a leaf in a virtual machine, whose host has to answer. */
static struct { bool lahf; u64 features[4]; } host;

static void look_at_host(void)
{
    static const struct { u32 leaf; u8 reg, bit; } places[] = {
#define X(name, leaf, reg, bit) {leaf, reg, bit},
        FEATURES(X)
#undef X
    };
    u32 out[4] = {0}, leaf = ~0u;
    for (unsigned f = 0; f < FEATURE_COUNT; f++) {
        if (places[f].leaf != leaf) {
            memset(out, 0, sizeof out);
            leaf = places[f].leaf;
            __get_cpuid_count(leaf, 0, &out[0], &out[1], &out[2], &out[3]);
        }
        if (f == FEATURE_BASE || out[places[f].reg] >> places[f].bit & 1)
            host.features[f >> 6] |= 1ull << (f & 63);
    }
    host.lahf = has_lahf();
}

int translators_own(const struct vm *vm)
{
    return vm->code && vm->code->writable ? -EBUSY : 0; /* it is mapped once code is kept in it */
}

struct translator *translator_create(struct vm *vm)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, look_at_host);
    if (number_of("VMFS_NO_JIT", 0) || !host.lahf)
        return NULL;
    if (!vm->code) {
        vm->code = code_memory_create(write_shared);
        if (!vm->code)
            return NULL;
    }
    struct translator *t = zeros_create(sizeof *t);
    if (!t)
        return NULL;
    t->memory = vm->code;
    code_memory_join(t->memory);
    t->threshold = (u32)number_of("VMFS_JIT_THRESHOLD", THRESHOLD);
    t->seed = number_of("VMFS_JIT_SEED", 0);
    if (getenv("VMFS_JIT_PROFILE"))
        t->profile = calloc(opcode_count, sizeof *t->profile);
    memcpy(t->host_features, host.features, sizeof t->host_features);
    core_open_jitdump();
    return t;
}

static void close_way(struct way *w)
{
    if (!w->to)
        return;
    *w->before = w->next;
    if (w->next)
        w->next->before = w->before;
    w->to = NULL;
    struct code code = {w->code};
    land(jump(&code), w->leave);
}

/* Jumps of host code to the block leave, from now on. */
static void close_ways(struct block *b)
{
    while (b->ways)
        close_way(b->ways);
}

static void free_regions(struct part *p)
{
    for (struct region *r = p->regions, *next; r; r = next) {
        next = r->next;
        for (struct way *w = r->ways; w; w = w->sibling)
            close_way(w);
        free(r);
    }
    p->regions = NULL;
}

/* Nothing of the oldest part is used any more: to the host with it. */
static void give_oldest(struct vcpu *c)
{
    struct translator *t = c->translator;
    unsigned number = t->queue[t->oldest];
    struct part *p = &t->parts[number];
    free_regions(p);
    c->counters.code_bytes -= PART_SIZE - (u64)(p->top - p->at);
    part_give(t->memory, number, t->has--);
    t->oldest = (t->oldest + 1) % CODE_PARTS;
}

/* VMFS_JIT_PROFILE=FILE: by row, how often host code called the handler, or left for it. */
static void write_profile(const struct translator *t)
{
    FILE *file = fopen(getenv("VMFS_JIT_PROFILE"), "a");
    for (unsigned i = 0; file && i < opcode_count; i++)
        if (t->profile[i].calls | t->profile[i].leaves)
            fprintf(file, "%llu %llu %s %s\n", (unsigned long long)t->profile[i].calls,
                    (unsigned long long)t->profile[i].leaves, opcodes[i].name, opcodes[i].handler_name);
    if (file)
        fclose(file);
}

void translator_destroy(struct vcpu *c)
{
    struct translator *t = c->translator;
    if (!t)
        return;
    if (t->profile)
        write_profile(t);
    free(t->profile);
    translator_flush(c);
    code_memory_leave(t->memory);
    zeros_destroy(t, sizeof *t);
    c->translator = NULL;
}

void translator_flush(struct vcpu *c)
{
    while (c->translator && c->translator->has)
        give_oldest(c);
}

void region_kill(struct vcpu *c, struct region *region)
{
    if (region->dead)
        return;
    region->dead = true;
    c->counters.regions_killed++;
    for (unsigned i = 0; i < region->count; i++) {
        struct block *b = region->blocks[i];
        close_ways(b);
        b->code = NULL;
        b->region = NULL;
        b->entries = 0;
        b->enter = block_count;
    }
}

static void drop_oldest(struct vcpu *c)
{
    struct translator *t = c->translator;
    for (struct region *r = t->parts[t->queue[t->oldest]].regions; r; r = r->next)
        region_kill(c, r);
    give_oldest(c);
}

void translator_share(struct vcpu *c)
{
    if (c->translator && c->translator->has > part_share(c->translator->memory))
        drop_oldest(c);
}

/* There is no part left. One that has more than its share drops one, in the end: at once where the CPUs execute in turn. */
static void ask_for_part(struct vcpu *c)
{
    struct vcpu *most = NULL;
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        struct vcpu *other = c->vm->vcpus[i];
        if (other && other != c && other->translator && (!most || other->translator->has > most->translator->has))
            most = other;
    }
    if (!most || c->translator->has >= part_share(c->translator->memory))
        return;
    if (c->vm->in_turn)
        translator_share(most);
    else
        request_attention(most, ATTENTION_SHARE);
}

static struct part *part_in_use(struct translator *t) { return &t->parts[t->queue[(t->oldest + t->has - 1) % CODE_PARTS]]; }

/* A part with so much room, or NULL: the others have them all just now. */
static struct part *room(struct vcpu *c, size_t bytes)
{
    struct translator *t = c->translator;
    struct part *p = t->has ? part_in_use(t) : NULL;
    if (p && (size_t)(p->top - p->at) >= bytes)
        return p;
    int number = part_take(t->memory, t->has);
    if (number < 0) {
        ask_for_part(c);
        number = part_take(t->memory, t->has);
    }
    if (number < 0 && t->has) {
        drop_oldest(c);
        number = part_take(t->memory, t->has);
    }
    if (number < 0)
        return NULL;
    p = &t->parts[number];
    p->at = t->memory->writable + SHARED_SIZE + (size_t)number * PART_SIZE;
    p->top = p->at + PART_SIZE;
    t->queue[(t->oldest + t->has++) % CODE_PARTS] = (u8)number;
    return p;
}

static void *take_top(struct translation *t, size_t size)
{
    struct part *p = part_in_use(t->translator);
    u8 *top = (u8 *)((uintptr_t)(p->top - size) & ~(uintptr_t)31);
    t->c->counters.code_bytes += (u64)(p->top - top);
    return p->top = top;
}

struct site *add_site(struct translation *t, const struct record *r, unsigned count)
{
    struct site *s = take_top(t, sizeof *s + (count + 1) * sizeof *r);
    *s = (struct site){.ip = t->in->block->ip, .region = t->region, .count = count};
    memcpy(s->records, r, count * sizeof *r); /* none of them has a link */
    const struct record *last = &s->records[count - 1];
    s->records[count] = (struct record){.run = op_continue, .at = (u8)(last->at + last->length)};
    return s;
}

/* ---- Ways out ----------------------------------------------------------------------------------------------------------------- */

struct way *add_way(struct translation *t, const struct record *r)
{
    struct way *w = take_top(t, sizeof *w);
    *w = (struct way){.record = r, .ip = t->in->block->ip, .sibling = t->region->ways};
    t->region->ways = w;
    return w;
}

/* From now on straight to `to`, which has code, while the link holds. */
static void open_way(const struct translator *t, const struct vcpu *c, struct way *w, struct block *to, const struct link *l)
{
    struct code code = {w->code};
    if (l->at != SAME_PAGE) {
        alu_constant(&code, 0, GROUP_CMP, in_memory(C, code_ids(c->key) + 4 * (i32)l->at), (i32)l->id);
        land(jump_if(&code, CC_NE), w->leave);
    }
    w->taken = (i64)to->count - w->record->left;
    if (w->taken)
        alu_constant(&code, I_W, w->taken < 0 ? GROUP_ADD : GROUP_SUB, in_register(BUDGET), (i32)(w->taken < 0 ? -w->taken : w->taken));
    if (w->taken > 0)
        land(jump_if(&code, CC_L), w->stop);
    land(jump(&code), to->code - t->memory->to_executable);
    w->to = to;
    w->id = l->id;
    w->before = &to->ways;
    w->next = to->ways;
    if (w->next)
        w->next->before = &w->next;
    to->ways = w;
}

/* From a region: a direct jump whose way is closed, or whose link does not hold, or for which the budget is too small. */
static void translated_way(struct vcpu *c, struct way *w)
{
    const struct record *r = w->record;
    const struct link *l = LINK_OF(r);
    c->gpr[GPR_IP] = w->ip;
    if (w->to && (w->to != l->to || w->id != l->id)) /* where the link does not hold just now, it may soon again */
        close_way(w);
    if (!w->to && l->to && link_holds(c, l) && l->to->code)
        open_way(c->translator, c, w, l->to, l);
    translated_leave(c, r);
}

/* ---- Which blocks --------------------------------------------------------------------------------------------------------------- */

static bool may_join(const struct block *first, const struct block *b)
{
    return !b->dead && !b->region && b->count && b->key == first->key && b->physical[1] == ~0ull &&
           (b->physical[0] & PAGE_MASK) == (first->physical[0] & PAGE_MASK) && (b->ip & PAGE_MASK) == (first->ip & PAGE_MASK);
}

static void add_member(struct translation *t, struct block *b)
{
    for (unsigned i = 0; i < t->member_count; i++)
        if (t->members[i].block == b || t->members[i].block->ip == b->ip)
            return;
    if (t->member_count == REGION_BLOCKS || t->instructions + b->count > REGION_INSTRUCTIONS)
        return;
    t->instructions += b->count;
    struct member *m = &t->members[t->member_count++];
    m->block = b;
    m->code = NULL;
    m->live = m->precise = 0;
}

/* What the block was seen to jump to. */
static void add_followers(struct translation *t, const struct block *b)
{
    const struct record *r = b->records, *end = &b->records[b->ending];
    for (;; r = record_after(r)) {
        if (r->has_link) {
            const struct link *l = LINK_OF(r);
            if (l->to && may_join(t->members[0].block, l->to) && !is_cut(t->translator, r))
                add_member(t, l->to);
        }
        if (r == end)
            return;
    }
}

/* ---- Which flags matter ---------------------------------------------------------------------------------------------------------- */

bool find_flags(struct translation *t, struct member *m)
{
    const struct block *b = m->block;
    const struct record *records[BLOCK_INSTRUCTIONS + 1];
    const struct record *r = b->records;
    for (unsigned i = 0; i <= b->count; i++, r = record_after(r))
        records[i] = r;
    t->in = m;
    u16 live, precise = FLAGS_ARITHMETIC; /* a jump may leave: the budget ends */
    int next = records[b->count]->run == op_end ? member_at(t, records[b->count]) : -1;
    live = next < 0 ? FLAGS_ARITHMETIC : t->members[next].live;
    for (unsigned i = b->count; i--;) {
        r = records[i];
        m->after[i].live = live;
        m->after[i].precise = precise;
        if (!(m->emitted >> i & 1)) {
            live = precise = FLAGS_ARITHMETIC;
            continue;
        }
        unsigned traits = traits_of(r);
        u16 reads, writes;
        flags_used(r, traits, &reads, &writes);
        if (traits & (FLOW_BRANCH | FLOW_JUMP)) {
            int target = r->has_link ? member_at(t, r) : -1;
            u16 there = target < 0 ? FLAGS_ARITHMETIC : t->members[target].live;
            live = reads | there | (traits & FLOW_LEAVES ? 0 : live);
            precise = FLAGS_ARITHMETIC;
        } else if (traits & FLOW_LEAVES) {
            live = precise = FLAGS_ARITHMETIC;
        } else {
            live = reads | (live & ~writes);
            bool faults = may_fault(r, traits) && (t->apart || !(m->checked >> i & 1));
            precise = faults ? FLAGS_ARITHMETIC : reads | (precise & ~writes);
        }
    }
    bool changed = m->live != live || m->precise != precise;
    m->live = live;
    m->precise = precise;
    return changed;
}

/* ---- Translating --------------------------------------------------------------------------------------------------------------------- */

/* Whether host code of it has VEX-encoded vectors. */
static bool uses_ymm(const struct member *m)
{
    const struct record *r = m->block->records;
    for (unsigned i = 0; i < m->block->count; i++, r = record_after(r))
        if (opcodes[r->id].attributes & A_AVX && m->emitted >> i & 1)
            return true;
    return false;
}

static bool worth_it(struct translation *t, const struct block *b)
{
    const struct record *r = b->records;
    unsigned calls = 0;
    for (unsigned i = 0; i < b->count; i++, r = record_after(r))
        if (!ask(t, r)) {
            if (r->has_link || r->run == op_raise || opcodes[r->id].attributes & A_END)
                return i > 0 && calls * 4 <= i;
            calls++;
        }
    return calls * 4 <= b->count;
}

static void translate(struct vcpu *c, struct block *first)
{
    struct translator *t = c->translator;
    struct translation *w = &t->work;
    struct timespec began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    w->c = c;
    w->translator = t;
    w->wide = c->key & KEY_CODE64;
    w->member_count = w->instructions = w->stub_count = w->edge_count = w->copy_count = 0;
    w->apart = false;
    add_member(w, first);
    for (unsigned i = 0; i < w->member_count; i++)
        add_followers(w, w->members[i].block);
    unsigned copied = 0;
    for (unsigned i = 0; i < w->member_count; i++) {
        plan_accesses(w, &w->members[i]);
        copied += (unsigned)__builtin_popcount(w->members[i].covered);
    }
    struct part *p = room(c, MEMBER_ROOM * w->member_count + INSTRUCTION_ROOM * w->instructions + COPY_ROOM * copied);
    struct region *region = p ? malloc(sizeof *region + w->member_count * sizeof *region->blocks) : NULL;
    if (!region) { /* no room just now */
        first->entries = 0;
        return;
    }
    w->code.at = p->at;
    *region = (struct region){.count = w->member_count, .next = p->regions, .key = c->key};
    p->regions = region;
    w->region = region;
    for (unsigned i = 0; i < w->member_count; i++)
        region->blocks[i] = w->members[i].block;
    w->ymm = false;
    for (unsigned i = 0; i < w->member_count; i++)
        w->ymm |= uses_ymm(&w->members[i]);
    for (bool changed = true; changed;) {
        changed = false;
        for (unsigned i = w->member_count; i--;)
            changed |= find_flags(w, &w->members[i]);
    }
    for (unsigned i = 0; i < w->member_count; i++)
        emit_member(w, &w->members[i]);
    emit_stubs(w);
    for (unsigned i = 0; i < w->edge_count; i++)
        land(w->edges[i].jump, w->members[w->edges[i].member].code);
    for (unsigned i = 0; i < w->member_count; i++) {
        struct block *b = w->members[i].block;
        b->region = region;
        b->code = executable(t, w->members[i].code);
        b->enter = block_translated;
    }
    if (unlikely(jitdump_is_open()))
        jitdump_load(p->at, (u64)(uintptr_t)executable(t, p->at), (size_t)(w->code.at - p->at), first->ip);
    c->counters.regions++;
    c->counters.code_bytes += (u64)(w->code.at - p->at);
    p->at = w->code.at;
    if (p->at > p->top)
        abort(); /* code and sites overlap: more than INSTRUCTION_ROOM */
    clock_gettime(CLOCK_MONOTONIC, &ended);
    c->counters.translating_ns += (u64)(ended.tv_sec - began.tv_sec) * 1000000000 + (u64)(ended.tv_nsec - began.tv_nsec);
}

void block_count(struct vcpu *c, const struct record *r)
{
    struct block *b = (struct block *)((u8 *)r - offsetof(struct block, records));
    struct translator *t = c->translator;
    note_block(c, b, records_done(c) - b->count);
    if (++b->entries > t->threshold) {
        t->work.translator = t;
        t->work.c = c;
        t->work.wide = b->key & KEY_CODE64;
        if (!(b->key & (KEY_CODE64 | KEY_FLAT)) || b->key & KEY_TRACED || !b->count || b->physical[1] != ~0ull ||
            (t->threshold && !worth_it(&t->work, b)))
            b->enter = r->run; /* for good */
        else
            translate(c, b);
    }
    CONTINUE_BY(c, b->enter == block_translated ? block_translated : r->run, r);
}
