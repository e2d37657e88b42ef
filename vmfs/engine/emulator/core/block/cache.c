/* Decoded traces: lookup, links, invalidation.
 *
 * Traces live in an arena that is emptied whole when it is full; links and jump cache entries are guarded by the CPU's
 * generation, so that breaking all of them is one increment. A trace is found by the physical address of its first byte,
 * its instruction pointer and the fetch key, lies on one page (or is a single instruction that crosses one), and is known
 * to its code pages, which find it when a store hits one of its 128-byte lines.
 *
 * Clients write guest memory behind our back between runs: in each run, a trace's bytes are compared before its first
 * execution (links and the jump cache start a run empty). */
#include "cache.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "memory.h"
#include "opcodes.h"
#include "tracer.h"

enum { ARENA_SIZE = 32 << 20, BUCKETS = 1 << 15, PAGES = 1 << 12 };

struct code_page {
    u64 page;                 /* guest-physical */
    struct trace *traces;
    struct code_page *next;
};
struct cache {
    struct trace *buckets[BUCKETS];
    struct code_page *pages[PAGES];
    u8 *arena;
    size_t used;
};

static unsigned bucket_of(u64 physical, u64 key) { return (physical ^ physical >> 15 ^ key * 7 ^ key >> 32) & (BUCKETS - 1); }

int cache_create(struct vcpu *c)
{
    c->cache = calloc(1, sizeof *c->cache);
    if (!c->cache)
        return -1;
    c->cache->arena = mmap(NULL, ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (c->cache->arena == MAP_FAILED) {
        free(c->cache);
        c->cache = NULL;
        return -1;
    }
    c->generation = 1;
    return 0;
}

void break_links(struct vcpu *c)
{
    if (++c->generation == 0) { /* wrapped: old generations would look new */
        memset(c->jumps, 0, sizeof c->jumps);
        memset(c->cache->buckets, 0, sizeof c->cache->buckets);
        c->generation = 1;
        cache_flush(c);
    }
}

void cache_destroy(struct vcpu *c)
{
    if (!c->cache)
        return;
    munmap(c->cache->arena, ARENA_SIZE);
    free(c->cache);
    c->cache = NULL;
}

/* The lines of a page that the traces of all CPUs of the VM cover. */
static struct code_page *find_page(struct cache *cache, u64 page)
{
    struct code_page *p = cache->pages[page >> 12 & (PAGES - 1)];
    while (p && p->page != page)
        p = p->next;
    return p;
}
static u32 lines_of(u64 first, u64 last) /* offsets in a page, inclusive */
{
    return (u32)((2ull << (last >> 7)) - (1ull << (first >> 7)));
}
static u32 trace_lines(const struct trace *t, u64 page)
{
    u32 lines = 0;
    if ((t->physical[0] & PAGE_MASK) == page)
        lines |= lines_of(t->physical[0] & 0xfff, (t->physical[0] & 0xfff) + t->first_bytes - 1);
    if (t->physical[1] == page)
        lines |= lines_of(0, t->bytes - t->first_bytes - 1);
    return lines;
}
static unsigned page_side(const struct trace *t, u64 page) { return (t->physical[0] & PAGE_MASK) != page; }

static u32 *lines_at(struct slot *slot, u64 page) { return &slot->lines[(page - slot->address) >> 12]; }

static u32 decoded_lines(struct vm *vm, u64 page)
{
    u32 lines = 0;
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        if (!vm->vcpus[i])
            continue;
        struct code_page *p = find_page(vm->vcpus[i]->cache, page);
        for (struct trace *t = p ? p->traces : NULL; t; t = t->page_next[page_side(t, page)])
            if (!t->dead)
                lines |= trace_lines(t, page);
    }
    return lines;
}

/* How many of vm->sorted to look at for pages that are the same memory (alias_page). */
static unsigned alias_slots(const struct vm *vm) { return vm->aliased ? vm->slot_count : 0; }

static void recompute_lines(struct vm *vm, struct slot *slot, u64 page)
{
    u32 lines = decoded_lines(vm, page);
    for (unsigned i = 0; i < alias_slots(vm); i++) {
        u64 there = alias_page(slot, page, vm->sorted[i]);
        lines |= there == NO_PAGE ? 0 : decoded_lines(vm, there);
    }
    *lines_at(slot, page) = lines;
    for (unsigned i = 0; i < alias_slots(vm); i++) {
        u64 there = alias_page(slot, page, vm->sorted[i]);
        if (there != NO_PAGE)
            *lines_at(vm->sorted[i], there) = lines;
    }
}

void cache_flush(struct vcpu *c)
{
    struct cache *cache = c->cache;
    for (unsigned i = 0; i < PAGES; i++) {
        struct code_page *p = cache->pages[i];
        cache->pages[i] = NULL;
        while (p) {
            struct code_page *next = p->next;
            struct slot *slot = vm_slot(c->vm, p->page);
            if (slot)
                recompute_lines(c->vm, slot, p->page);
            p = next;
        }
    }
    memset(cache->buckets, 0, sizeof cache->buckets);
    cache->used = 0;
    break_links(c);
}

static void unlink_trace(struct vcpu *c, struct trace *t)
{
    struct trace **at = &c->cache->buckets[bucket_of(t->physical[0], t->key)];
    while (*at && *at != t)
        at = &(*at)->bucket_next;
    if (*at)
        *at = t->bucket_next;
    t->dead = true;
    c->counters.traces_killed++;
}

static void kill_lines(struct vm *vm, u64 page, u32 lines)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        struct vcpu *c = vm->vcpus[i];
        struct code_page *p = c ? find_page(c->cache, page) : NULL;
        if (!p)
            continue;
        bool killed = false;
        for (struct trace **at = &p->traces; *at;) {
            struct trace *t = *at;
            if (t->dead || trace_lines(t, page) & lines) {
                if (!t->dead)
                    unlink_trace(c, t);
                killed = true;
                *at = t->page_next[page_side(t, page)];
            } else {
                at = &t->page_next[page_side(t, page)];
            }
        }
        if (killed)
            break_links(c);
    }
}

/* Kill what overlaps [physical, physical + size), which lies on one page. */
void cache_kill(struct vm *vm, struct slot *slot, u64 physical, u64 size)
{
    u64 page = physical & PAGE_MASK;
    u32 lines = lines_of(physical & 0xfff, (physical & 0xfff) + size - 1);
    kill_lines(vm, page, lines);
    for (unsigned i = 0; i < alias_slots(vm); i++) {
        u64 there = alias_page(slot, page, vm->sorted[i]);
        if (there != NO_PAGE)
            kill_lines(vm, there, lines);
    }
    recompute_lines(vm, slot, page);
}

static void *arena_take(struct vcpu *c, size_t size)
{
    size = (size + 31) & ~(size_t)31;
    void *p = c->cache->arena + c->cache->used;
    c->cache->used += size;
    return p;
}

static void note_lines(struct vm *vm, struct slot *slot, u64 page, u32 lines)
{
    u32 *noted = lines_at(slot, page);
    if (!*noted) /* stores into the page must be seen from now on */
        for (unsigned i = 0; i < CORE_VCPUS; i++)
            if (vm->vcpus[i])
                tlb_drop_writes_of(vm->vcpus[i], page);
    *noted |= lines;
}

static void note_page(struct vcpu *c, struct trace *t, u64 page, unsigned side)
{
    struct code_page *p = find_page(c->cache, page);
    if (!p) {
        p = arena_take(c, sizeof *p);
        struct code_page **head = &c->cache->pages[page >> 12 & (PAGES - 1)];
        *p = (struct code_page){page, NULL, *head};
        *head = p;
    }
    t->page_next[side] = p->traces;
    p->traces = t;
    struct slot *slot = vm_slot(c->vm, page);
    note_lines(c->vm, slot, page, trace_lines(t, page));
    for (unsigned i = 0; i < alias_slots(c->vm); i++) {
        u64 there = alias_page(slot, page, c->vm->sorted[i]);
        if (there != NO_PAGE)
            note_lines(c->vm, c->vm->sorted[i], there, trace_lines(t, page));
    }
}

static const u8 *code_page_host(struct vcpu *c, u64 physical)
{
    struct slot *slot = vm_slot(c->vm, physical);
    if (!slot) {
        c->exit.reason = EXIT_ERROR;
        c->exit.message = "instruction fetch from guest-physical memory that is not RAM";
        escape(c, ESCAPE_EXIT);
    }
    return slot->host + (physical - slot->address);
}

bool is_breakpoint(const struct vcpu *c, u64 linear)
{
    if (stops_break(c, linear))
        return true;
    for (unsigned i = 0; i < 4; i++) /* R/W field 0: execution (Intel SDM 3B 17.2.4) */
        if (c->dr7 >> (2 * i) & 3 && !(c->dr7 >> (16 + 4 * i) & 15) && c->dr[i] == linear)
            return true;
    return false;
}

/* Fetch and decode one instruction at ip; bytes on the second page go through `joined`. */
struct fetch {
    u64 physical[2];
    const u8 *host[2];
    unsigned first;           /* bytes up to the page's end, or the limit of CS */
};

static void fetch_first(struct vcpu *c, u64 ip, struct fetch *f)
{
    u64 linear = code_linear(c, ip);
    c->now = NULL;
    if (!target_valid(c, ip))
        raise_error(c, NULL, VECTOR_GP, 0);
    f->physical[0] = mmu_translate(c, linear, ACCESS_EXECUTE);
    f->physical[1] = ~0ull;
    f->host[0] = code_page_host(c, f->physical[0]);
    f->host[1] = NULL;
    f->first = 0x1000 - (unsigned)(linear & 0xfff);
}

/* Bytes that the limit of CS leaves from ip on. */
static u64 limit_room(const struct vcpu *c, u64 ip)
{
    return c->key & KEY_CODE64 ? 16 : ip <= c->seg[SEG_CS].limit ? c->seg[SEG_CS].limit - ip + 1 : 0;
}

static unsigned decode_at(struct vcpu *c, struct fetch *f, u64 ip, unsigned offset, unsigned at, struct record *r, bool *ends,
                          bool *crosses)
{
    unsigned here = f->first - offset;
    u64 room = limit_room(c, ip);
    *crosses = false;
    unsigned length = decode(c, f->host[0] + offset, here < room ? here : (unsigned)room, ip, at, r, ends);
    if (length)
        return length;
    if (here >= room) { /* the limit cuts it off */
        *ends = true;
        memset(r, 0, sizeof *r);
        r->run = op_raise;
        r->imm = VECTOR_GP;
        r->at = (u8)at;
        r->length = (u8)(room ? room : 1);
        return r->length;
    }
    *crosses = true;
    if (offset)
        return 0; /* of no use in the middle of a trace */
    u8 joined[16];
    f->physical[1] = mmu_translate(c, code_linear(c, ip + here), ACCESS_EXECUTE);
    f->host[1] = code_page_host(c, f->physical[1]);
    memcpy(joined, f->host[0], here);
    memcpy(joined + here, f->host[1], 16 - here);
    length = decode(c, joined, room < 16 ? (unsigned)room : 16, ip, at, r, ends);
    if (!length) {
        *ends = true;
        r->run = op_raise;
        r->imm = VECTOR_GP;
        r->length = (u8)room; /* all that was looked at: other bytes there may be an instruction that fits */
        return r->length;
    }
    return length;
}

void decode_alone(struct vcpu *c, struct record *r)
{
    struct fetch f;
    bool ends, crosses;
    u64 ip = c->gpr[GPR_IP];
    fetch_first(c, ip, &f);
    struct record *instruction = c->key & KEY_TRACED ? r + 1 : r;
    unsigned length = decode_at(c, &f, ip, 0, 0, instruction, &ends, &crosses);
    instruction->left = 0;
    if (instruction != r) {
        tracer_prologue(instruction, r);
        r = instruction;
    }
    memset(r + 1, 0, sizeof *r);
    r[1].run = op_end_alone;
    r[1].at = (u8)length;
}

static struct trace *build(struct vcpu *c, u64 ip, struct fetch *f)
{
    if (c->cache->used + sizeof(struct trace) + (2 * TRACE_RECORDS + 1) * sizeof(struct record) + TRACE_BYTES +
            2 * sizeof(struct code_page) + 256 > ARENA_SIZE)
        cache_flush(c);
    struct trace *t = (struct trace *)(c->cache->arena + c->cache->used);
    unsigned offset = 0, count = 0, used = 0;
    bool traced = c->key & KEY_TRACED;
    bool ends = false, crosses = false, stops = has_stops(c, STOP_BREAKPOINT) || c->dr7 & 0xff;
    while (!ends && !crosses && count < TRACE_RECORDS && offset + 15 <= TRACE_BYTES && offset < f->first) {
        u64 here = ip_mask(c, ip + offset);
        if (offset && here < ip)
            break;
        if (stops && is_breakpoint(c, code_linear(c, here)))
            break;
        unsigned length = decode_at(c, f, here, offset, offset, &t->records[used + traced], &ends, &crosses);
        if (!length)
            break;
        if (traced) {
            tracer_prologue(&t->records[used + 1], &t->records[used]);
            used++;
        }
        used++;
        offset += length;
        count++;
    }
    struct record *last = &t->records[used];
    memset(last, 0, sizeof *last);
    last->run = count ? op_end : op_breakpoint;
    last->at = (u8)offset;
    last->size = c->key & KEY_CODE64 ? 3 : 2; /* as ip_mask: no branch of operand size 16 */
    for (unsigned i = 0; i < used; i++)
        t->records[i].left = (u8)(count - 1 - (traced ? i / 2 : i));
    t->ip = ip;
    t->key = c->key;
    t->physical[0] = f->physical[0];
    t->physical[1] = f->physical[1];
    t->host[0] = f->host[0];
    t->host[1] = f->host[1];
    t->bytes = offset ? offset : 1;
    t->first_bytes = t->bytes < f->first ? t->bytes : f->first;
    if (t->bytes == t->first_bytes)
        t->physical[1] = ~0ull; /* it raised before it needed the second page */
    t->count = count;
    t->ending = used;
    t->checked = c->run_count;
    t->dead = false;
    u8 *copy = (u8 *)(last + 1);
    memcpy(copy, t->host[0], t->first_bytes);
    if (t->physical[1] != ~0ull)
        memcpy(copy + t->first_bytes, t->host[1], t->bytes - t->first_bytes);
    arena_take(c, sizeof *t + (used + 1) * sizeof(struct record) + t->bytes);
    struct trace **bucket = &c->cache->buckets[bucket_of(t->physical[0], t->key)];
    t->bucket_next = *bucket;
    *bucket = t;
    note_page(c, t, t->physical[0] & PAGE_MASK, 0);
    if (t->physical[1] != ~0ull)
        note_page(c, t, t->physical[1], 1);
    c->counters.traces_decoded++;
    return t;
}

static bool bytes_unchanged(const struct trace *t)
{
    const u8 *copy = (const u8 *)&t->records[t->ending + 1];
    return !memcmp(copy, t->host[0], t->first_bytes) &&
           (t->physical[1] == ~0ull || !memcmp(copy + t->first_bytes, t->host[1], t->bytes - t->first_bytes));
}

struct trace *cache_lookup(struct vcpu *c)
{
    u64 ip = c->gpr[GPR_IP];
    struct fetch f;
    fetch_first(c, ip, &f);
    struct trace *t = c->cache->buckets[bucket_of(f.physical[0], c->key)];
    while (t && (t->physical[0] != f.physical[0] || t->ip != ip || t->key != c->key))
        t = t->bucket_next;
    if (t && t->physical[1] != ~0ull &&
        mmu_translate(c, code_linear(c, ip + t->first_bytes), ACCESS_EXECUTE) != t->physical[1]) {
        unlink_trace(c, t);
        t = NULL;
    }
    if (t && t->checked != c->run_count) {
        t->checked = c->run_count;
        if (!bytes_unchanged(t)) {
            unlink_trace(c, t);
            break_links(c);
            t = NULL;
        }
    }
    if (!t)
        t = build(c, ip, &f);
    struct jump_entry *e = jump_entry(c, ip);
    *e = (struct jump_entry){ip, c->key, t, c->generation};
    return t;
}

/* ---- The handlers that end traces ------------------------------------------------------------------------------------- */

/* A direct jump whose link is not valid; also the end of a trace. */
void jump_slow(struct vcpu *c, const struct record *r)
{
    u64 target = relative_target(c, r);
    if (r->length) /* a jump: its own fault; the end of a trace just goes on to where the fetch faults */
        check_target(c, r, target);
    c->budget += r->left;
    c->gpr[GPR_IP] = target;
    if (c->alone || atomic_load_explicit(&c->attention, memory_order_relaxed)) {
        c->now = NULL;
        return;
    }
    u32 generation = c->generation; /* r may lie in the arena that a lookup empties */
    struct trace *t = cache_lookup(c);
    if (generation == c->generation) {
        struct record *self = (struct record *)r;
        self->link = t;
        self->link_generation = generation;
    }
    ENTER(c, t);
}

void jump_indirect_slow(struct vcpu *c, const struct record *r)
{
    (void)r;
    c->now = NULL;
    if (c->alone)
        return;
    struct trace *t = cache_lookup(c);
    ENTER(c, t);
}

void op_end(struct vcpu *c, const struct record *r) { JUMP_LINK(c, r); }

void op_end_alone(struct vcpu *c, const struct record *r)
{
    c->gpr[GPR_IP] = ip_mask(c, c->gpr[GPR_IP] + r->at);
    c->now = NULL;
}

void op_breakpoint(struct vcpu *c, const struct record *r)
{
    (void)r;
    c->at_breakpoint = true;
}

void op_raise(struct vcpu *c, const struct record *r)
{
    if (r->imm == VECTOR_GP)
        raise_error(c, r, VECTOR_GP, 0);
    raise_fault(c, r, (unsigned)r->imm);
}

u64 next_ip(const struct vcpu *c, const struct record *r) { return ip_mask(c, c->gpr[GPR_IP] + r->at + r->length); }

void leave(struct vcpu *c, const struct record *r) { leave_to(c, r, next_ip(c, r)); }

void leave_to(struct vcpu *c, const struct record *r, u64 ip)
{
    c->gpr[GPR_IP] = ip;
    c->budget += r->left;
    c->now = NULL;
}
