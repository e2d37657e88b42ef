/* Decoded blocks: lookup, links, invalidation.
 *
 * Blocks live in an arena that is emptied whole when it is full. A block is found by the physical address of its first byte,
 * its instruction pointer and the fetch key, lies on one page (or is a single instruction that crosses one), and is known
 * to its code pages, which find it when a store hits one of its 128-byte lines.
 *
 * A link or an entry of the jump cache holds while the code map has its number: so it may stay where it is over changes of the
 * address space. A block that dies takes those that go to it along.
 *
 * CPUs that execute at the same time have blocks of their own, and share `slot.lines` alone. A CPU that decodes notes the
 * lines, and then looks whether the bytes are still the same; a CPU that writes looks at the lines after its bytes are written
 * (cache_lines_written): so one of the two finds out. What kills blocks of others does so while they stand (world.c).
 *
 * Clients write guest memory unseen between runs: in each run, the blocks of a page are compared with it before the page is
 * first entered (the code maps start a run empty). */
#include "cache.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "memory.h"
#include "opcodes.h"
#include "recent.h"
#include "tracer.h"
#include "translate.h"
#include "zeros.h"

enum { ARENA_SIZE = 32 << 20, BUCKETS = 1 << 15, PAGES = 1 << 12, MAPPINGS = 1 << 13 };
/* A CPU that executes less than REST_INSTRUCTIONS in REST_MILLISECONDS (a kernel with nothing to do needs a tenth) gives back
 * what it has, if that is as much as REST_BYTES. */
enum { REST_MILLISECONDS = 30000, REST_INSTRUCTIONS = 100000000, REST_BYTES = 1 << 20 };

struct code_page {
    u64 page;                 /* guest-physical */
    struct block *blocks;
    struct code_page *next;
    u32 checked;              /* in which epoch its blocks were compared with it */
};
struct mapping { u64 linear, physical, key, base; u32 id; };
struct cache {
    struct block *buckets[BUCKETS];
    struct code_page *pages[PAGES];
    struct mapping mappings[MAPPINGS];
    u32 last_id;
    u32 flushes;
    u8 *arena;
    size_t used;
    u64 rest_nanoseconds;     /* VMFS_JIT_IDLE: after how long */
    u64 rest_began, rest_done; /* since when it has done next to nothing, by the host's clock; the instructions until then */
};

/* By the address, too: each process has a library's page at another one. */
static unsigned bucket_of(u64 physical, u64 ip, u64 key)
{
    return (unsigned)(((physical ^ ip << 20 ^ key * 7) * 0x9e3779b97f4a7c15) >> 49) & (BUCKETS - 1);
}

/* ---- Where code is ------------------------------------------------------------------------------------------------------- */

static void map_clear(struct code_map *m)
{
    memset(m->ids, 0xff, CODE_PAGES * sizeof *m->ids);
    m->local_count = 0;
}

void code_map_clear(struct vcpu *c)
{
    for (unsigned i = 0; i < 2; i++)
        map_clear(&c->code_maps[i]);
}

void code_map_clear_local(struct vcpu *c)
{
    for (unsigned i = 0; i < 2; i++) {
        struct code_map *m = &c->code_maps[i];
        if (m->local_count > LOCAL_PAGES)
            map_clear(m);
        while (m->local_count)
            m->ids[m->local[--m->local_count]] = NO_CODE;
    }
}

static u32 code_at(u64 linear) { return linear >> 12 & (CODE_PAGES - 1); }

void code_map_drop(struct vcpu *c, u64 linear)
{
    for (unsigned i = 0; i < 2; i++)
        c->code_maps[i].ids[code_at(linear)] = NO_CODE;
}

static u64 code_base(const struct vcpu *c) { return c->key & KEY_CODE64 ? 0 : c->seg[SEG_CS].base; }

void code_map_select(struct vcpu *c)
{
    struct code_map *m = &c->code_maps[c->cpl != 0];
    c->code_map = m;
    u64 base = code_base(c);
    if (m->key != c->key || m->base != base || m->cpl != c->cpl) { /* levels 1 and 2 may fetch what 3 may not */
        m->key = c->key;
        m->base = base;
        m->cpl = c->cpl;
        map_clear(m);
    }
}

/* The number of a mapping of a page. A page that lost its place gets another one: its links do not hold any more. */
static u32 mapping_id(struct vcpu *c, u64 linear, u64 physical)
{
    struct cache *cache = c->cache;
    u64 base = code_base(c), x = (linear >> 12 ^ physical >> 9 ^ c->key << 7 ^ base) * 0x9e3779b97f4a7c15;
    struct mapping *m = &cache->mappings[x >> 32 & (MAPPINGS - 1)];
    if (m->linear != linear || m->physical != physical || m->key != c->key || m->base != base || !m->id)
        *m = (struct mapping){linear, physical, c->key, base, ++cache->last_id};
    return m->id;
}

static void note_mapping(struct vcpu *c, u64 linear, u64 physical)
{
    struct code_map *m = c->code_map;
    u32 at = code_at(linear);
    m->ids[at] = mapping_id(c, linear & PAGE_MASK, physical & PAGE_MASK);
    if (tlb_is_global(c, linear))
        return;
    if (m->local_count < LOCAL_PAGES)
        m->local[m->local_count] = (u16)at;
    m->local_count += m->local_count <= LOCAL_PAGES;
}

void cache_check_again(struct vcpu *c)
{
    c->epoch++;
    code_map_clear(c);
}

/* ---- Links -------------------------------------------------------------------------------------------------------------- */

static void unlink_jump(struct link *l)
{
    if (!l->to)
        return;
    *l->before = l->next;
    if (l->next)
        l->next->before = l->before;
    memset(l, 0, sizeof *l);
}

static void link_jump(struct link *l, struct block *to, u32 at, u32 id)
{
    unlink_jump(l);
    *l = (struct link){to, to->links, &to->links, id, at};
    if (l->next)
        l->next->before = &l->next;
    to->links = l;
}

/* r, of a block that begins at `ip`, goes to `to`, for which the code map was just filled. */
static void link_record(struct vcpu *c, const struct record *r, u64 ip, struct block *to)
{
    u64 from = code_linear(c, ip), there = code_linear(c, to->ip), last = (from & 0xfff) + r->at + r->length;
    bool same = last <= 0x1000 && (from & PAGE_MASK) == (there & PAGE_MASK);
    if (to->physical[1] != ~0ull) { /* both pages must be where they are: of the first is the jump */
        if (!same)
            return;
        there += to->first_bytes;
        same = false;
    }
    u32 at = same ? SAME_PAGE : code_at(there);
    link_jump(LINK_OF(r), to, at, c->code_map->ids[at]);
}

int cache_create(struct vcpu *c)
{
    c->cache = zeros_create(sizeof *c->cache);
    if (!c->cache)
        return -1;
    c->cache->arena = mmap(NULL, ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (c->cache->arena == MAP_FAILED) {
        zeros_destroy(c->cache, sizeof *c->cache);
        c->cache = NULL;
        return -1;
    }
    for (unsigned i = 0; i < 2; i++)
        c->code_maps[i].ids[SAME_PAGE] = 1;
    c->cache->last_id = 1;
    c->code_map = &c->code_maps[0];
    code_map_clear(c);
    const char *milliseconds = getenv("VMFS_JIT_IDLE");
    c->cache->rest_nanoseconds = (milliseconds ? strtoull(milliseconds, NULL, 0) : REST_MILLISECONDS) * 1000000;
    c->translator = translator_create(c->vm);
    return 0;
}

void cache_destroy(struct vcpu *c)
{
    if (!c->cache)
        return;
    translator_destroy(c);
    munmap(c->cache->arena, ARENA_SIZE);
    zeros_destroy(c->cache, sizeof *c->cache);
    c->cache = NULL;
}

/* The lines of a page that the blocks of all CPUs of the VM cover. */
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
static u32 block_lines(const struct block *b, u64 page)
{
    u32 lines = 0;
    if ((b->physical[0] & PAGE_MASK) == page)
        lines |= lines_of(b->physical[0] & 0xfff, (b->physical[0] & 0xfff) + b->first_bytes - 1);
    if (b->physical[1] == page)
        lines |= lines_of(0, b->bytes - b->first_bytes - 1);
    return lines;
}
static unsigned page_side(const struct block *b, u64 page) { return (b->physical[0] & PAGE_MASK) != page; }

static u32 *lines_at(struct slot *slot, u64 page) { return &slot->lines[(page - slot->address) >> 12]; }

static u32 decoded_lines(struct vm *vm, u64 page)
{
    u32 lines = 0;
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        if (!vm->vcpus[i])
            continue;
        struct code_page *p = find_page(vm->vcpus[i]->cache, page);
        for (struct block *b = p ? p->blocks : NULL; b; b = b->page_next[page_side(b, page)])
            if (!b->dead)
                lines |= block_lines(b, page);
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
    __atomic_store_n(lines_at(slot, page), lines, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < alias_slots(vm); i++) {
        u64 there = alias_page(slot, page, vm->sorted[i]);
        if (there != NO_PAGE)
            __atomic_store_n(lines_at(vm->sorted[i], there), lines, __ATOMIC_RELAXED);
    }
}

void cache_forget(struct vcpu *c)
{
    struct cache *cache = c->cache;
    translator_flush(c);
    /* Tables in which there is nothing are not touched: they cost no memory then. */
    if (cache->used) {
        for (unsigned i = 0; i < PAGES; i++) {
            struct code_page *p = cache->pages[i];
            if (p)
                cache->pages[i] = NULL;
            while (p) {
                struct code_page *next = p->next;
                struct slot *slot = vm_slot(c->vm, p->page);
                if (slot)
                    recompute_lines(c->vm, slot, p->page);
                p = next;
            }
        }
        zeros_clear(cache->buckets, sizeof cache->buckets);
        zeros_clear(c->jumps, sizeof c->jumps);
        cache->used = 0;
    }
    cache->flushes++;
    recent_forget_places(c);
    if (cache->last_id != 1)
        zeros_clear(cache->mappings, sizeof cache->mappings);
    cache->last_id = 1;
    code_map_clear(c);
}

/* What is left of a page's lines is what others have there, who may execute, also where this one does not. */
void cache_flush(struct vcpu *c)
{
    bool executes = atomic_load(&c->world) != WORLD_OUT, stops = executes ? world_stop(c) : runs_parallel(c->vm);
    if (stops && !executes)
        vm_stop(c->vm);
    cache_forget(c);
    if (stops && executes)
        world_go(c);
    else if (stops)
        vm_go(c->vm);
}

static void give_back(struct vcpu *c)
{
    size_t used = c->cache->used;
    cache_flush(c);
    madvise(c->cache->arena, used, MADV_DONTNEED);
}

u64 cache_rest(struct vcpu *c)
{
    struct cache *cache = c->cache;
    u64 now = host_clock(), done = instructions_done(c);
    if (cache->used + c->counters.code_bytes < REST_BYTES)
        return CORE_NEVER;
    if (!cache->rest_began || done - cache->rest_done > REST_INSTRUCTIONS) {
        cache->rest_began = now;
        cache->rest_done = done;
    }
    u64 rested = now - cache->rest_began;
    if (rested < cache->rest_nanoseconds)
        return cache->rest_nanoseconds - rested;
    cache->rest_began = 0;
    give_back(c);
    return CORE_NEVER;
}

void vm_rest(struct vm *vm)
{
    vm_lock(vm);
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            give_back(vm->vcpus[i]);
    vm_unlock(vm);
}

static void unlink_block(struct vcpu *c, struct block *b)
{
    struct block **at = &c->cache->buckets[bucket_of(b->physical[0], b->ip, b->key)];
    while (*at && *at != b)
        at = &(*at)->bucket_next;
    if (*at)
        *at = b->bucket_next;
    b->dead = true;
    if (b->region)
        region_kill(c, b->region);
    while (b->links)
        unlink_jump(b->links);
    if (jump_entry(c, b->ip)->block == b)
        *jump_entry(c, b->ip) = (struct jump_entry){0};
    c->counters.blocks_killed++;
}

static void kill_lines(struct vm *vm, u64 page, u32 lines)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        struct vcpu *c = vm->vcpus[i];
        struct code_page *p = c ? find_page(c->cache, page) : NULL;
        if (!p)
            continue;
        for (struct block **at = &p->blocks; *at;) {
            struct block *b = *at;
            if (b->dead || block_lines(b, page) & lines) {
                if (!b->dead)
                    unlink_block(c, b);
                *at = b->page_next[page_side(b, page)];
            } else {
                at = &b->page_next[page_side(b, page)];
            }
        }
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

void cache_lines_written(struct vcpu *c, struct slot *slot, u64 physical, unsigned bytes)
{
    if (atomic_load_explicit(&c->world, memory_order_relaxed) == WORLD_OUT)
        return;
    atomic_thread_fence(memory_order_seq_cst);
    u32 lines = __atomic_load_n(lines_at(slot, physical & PAGE_MASK), __ATOMIC_RELAXED);
    if (likely(!(lines & lines_of(physical & 0xfff, (physical & 0xfff) + bytes - 1))))
        return;
    bool stops = world_stop(c);
    cache_kill(c->vm, slot, physical, bytes);
    if (stops)
        world_go(c);
}

/* ---- What others write ---------------------------------------------------------------------------------------------------- */

static bool has_code(struct vm *vm, u64 address, u64 size)
{
    for (u64 page = address & PAGE_MASK; page < address + size; page += 0x1000) {
        struct slot *slot = vm_slot(vm, page);
        if (slot && *(volatile u32 *)lines_at(slot, page)) /* a CPU may note some just now: of what is being written */
            return true;
    }
    return false;
}

void vm_memory_written(struct vm *vm, uint64_t address, uint64_t size)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (!has_code(vm, address, size))
        return;
    pthread_mutex_lock(&vm->lines_lock);
    if (vm->written_count < WRITTEN)
        vm->written[vm->written_count] = (struct range){address, size};
    vm->written_count += vm->written_count <= WRITTEN;
    pthread_mutex_unlock(&vm->lines_lock);
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            request_attention(vm->vcpus[i], ATTENTION_WRITTEN);
}

void cache_forget_written(struct vcpu *c)
{
    struct vm *vm = c->vm;
    struct range written[WRITTEN];
    pthread_mutex_lock(&vm->lines_lock);
    unsigned count = vm->written_count;
    pthread_mutex_unlock(&vm->lines_lock);
    if (!count)
        return;
    bool stops = world_stop(c); /* first: another one that finds nothing is not to go on before it is forgotten */
    pthread_mutex_lock(&vm->lines_lock);
    count = vm->written_count;
    memcpy(written, vm->written, sizeof written);
    vm->written_count = 0;
    pthread_mutex_unlock(&vm->lines_lock);
    for (unsigned i = 0; count > WRITTEN && i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            cache_check_again(vm->vcpus[i]);
    for (unsigned i = 0; count <= WRITTEN && i < count; i++) {
        u64 end = written[i].address + written[i].size;
        for (u64 at = written[i].address, next; at < end; at = next) {
            next = (at | 0xfff) + 1;
            struct slot *slot = vm_slot(vm, at);
            if (slot && *lines_at(slot, at & PAGE_MASK))
                cache_kill(vm, slot, at, (next < end ? next : end) - at);
        }
    }
    if (stops)
        world_go(c);
}

static void *arena_take(struct vcpu *c, size_t size)
{
    size = (size + 31) & ~(size_t)31;
    void *p = c->cache->arena + c->cache->used;
    c->cache->used += size;
    return p;
}

/* Stores into the page are to be seen from now on. */
static void drop_writes(struct vcpu *c, u64 page)
{
    struct vm *vm = c->vm;
    bool writes = !vm->parallel, stops = false;
    for (unsigned i = 0; !writes && i < CORE_VCPUS; i++)
        writes = vm->vcpus[i] && vm->vcpus[i] != c && tlb_may_write(vm->vcpus[i], page);
    if (writes)
        stops = world_stop(c);
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i] && (writes || vm->vcpus[i] == c))
            tlb_drop_writes_of(vm->vcpus[i], page);
    if (stops)
        world_go(c);
}

static void note_lines(struct vcpu *c, struct slot *slot, u64 page, u32 lines)
{
    if (!__atomic_fetch_or(lines_at(slot, page), lines, __ATOMIC_SEQ_CST))
        drop_writes(c, page);
}

static void note_page(struct vcpu *c, struct block *b, u64 page, unsigned side)
{
    struct code_page *p = find_page(c->cache, page);
    if (!p) {
        p = arena_take(c, sizeof *p);
        struct code_page **head = &c->cache->pages[page >> 12 & (PAGES - 1)];
        *p = (struct code_page){page, NULL, *head, c->epoch};
        *head = p;
    }
    b->page_next[side] = p->blocks;
    p->blocks = b;
    struct slot *slot = vm_slot(c->vm, page);
    note_lines(c, slot, page, block_lines(b, page));
    for (unsigned i = 0; i < alias_slots(c->vm); i++) {
        u64 there = alias_page(slot, page, c->vm->sorted[i]);
        if (there != NO_PAGE)
            note_lines(c, c->vm->sorted[i], there, block_lines(b, page));
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
    c->fetching = true;
    if (!target_valid(c, ip))
        raise_error(c, NULL, VECTOR_GP, 0);
    f->physical[0] = mmu_translate(c, linear, ACCESS_EXECUTE);
    c->fetching = false;
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
        return room ? (unsigned)room : 1;
    }
    *crosses = true;
    if (offset)
        return 0; /* of no use in the middle of a block */
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
        return room ? (unsigned)room : 1;
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
    memset(r + 1, 0, 2 * sizeof *r); /* a link that does not hold */
    struct record *end = r + 1 + r->has_link;
    end->run = op_end_alone;
    end->at = (u8)length;
}

static struct block *build(struct vcpu *c, u64 ip, struct fetch *f)
{
    if (c->cache->used + sizeof(struct block) + BLOCK_SLOTS * sizeof(struct record) + BLOCK_BYTES +
            2 * sizeof(struct code_page) + 256 > ARENA_SIZE)
        cache_flush(c);
    struct block *b = (struct block *)(c->cache->arena + c->cache->used);
    unsigned offset = 0, count = 0, used = 0;
    bool traced = c->key & KEY_TRACED;
    bool ends = false, crosses = false, stops = has_stops(c, STOP_BREAKPOINT) || c->dr7 & 0xff;
    while (!ends && !crosses && count < BLOCK_INSTRUCTIONS && offset + 15 <= BLOCK_BYTES && offset < f->first) {
        u64 here = ip_mask(c, ip + offset);
        if (offset && here < ip)
            break;
        if (stops && is_breakpoint(c, code_linear(c, here)))
            break;
        unsigned length = decode_at(c, f, here, offset, offset, &b->records[used + traced], &ends, &crosses);
        if (!length)
            break;
        if (traced) {
            tracer_prologue(&b->records[used + 1], &b->records[used]);
            b->records[used++].left = (u8)count;
        }
        struct record *r = &b->records[used++];
        r->left = (u8)count++;
        if (r->has_link)
            memset(&b->records[used++], 0, sizeof *r);
        offset += length;
    }
    struct record *last = &b->records[used];
    memset(last, 0, 2 * sizeof *last);
    last->run = count ? op_end : op_breakpoint;
    last->has_link = true;
    last->at = (u8)offset;
    last->size = c->key & KEY_CODE64 ? 3 : 2; /* as ip_mask: no branch of operand size 16 */
    for (struct record *r = b->records; r != last; r += 1 + r->has_link)
        r->left = (u8)(count - 1 - r->left);
    b->ip = ip;
    b->key = c->key;
    b->physical[0] = f->physical[0];
    b->physical[1] = f->physical[1];
    b->host[0] = f->host[0];
    b->host[1] = f->host[1];
    b->bytes = offset ? offset : 1;
    b->first_bytes = b->bytes < f->first ? b->bytes : f->first;
    if (b->bytes == b->first_bytes)
        b->physical[1] = ~0ull; /* it raised before it needed the second page */
    b->count = count;
    b->ending = used;
    b->dead = false;
    b->links = NULL;
    b->ways = NULL;
    b->enter = c->translator ? block_count : b->records[0].run;
    b->code = NULL;
    b->region = NULL;
    b->entries = 0;
    u8 *copy = (u8 *)(last + 2);
    memcpy(copy, b->host[0], b->first_bytes);
    if (b->physical[1] != ~0ull)
        memcpy(copy + b->first_bytes, b->host[1], b->bytes - b->first_bytes);
    arena_take(c, sizeof *b + (used + 2) * sizeof(struct record) + b->bytes);
    struct block **bucket = &c->cache->buckets[bucket_of(b->physical[0], b->ip, b->key)];
    b->bucket_next = *bucket;
    *bucket = b;
    note_page(c, b, b->physical[0] & PAGE_MASK, 0);
    if (b->physical[1] != ~0ull)
        note_page(c, b, b->physical[1], 1);
    c->counters.blocks_decoded++;
    return b;
}

size_t cache_blocks(const struct vcpu *c, const struct block **blocks, size_t room)
{
    size_t count = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        for (const struct block *b = c->cache->buckets[i]; b; b = b->bucket_next, count++)
            if (count < room)
                blocks[count] = b;
    return count;
}

static bool bytes_unchanged(const struct block *b)
{
    const u8 *copy = (const u8 *)&b->records[b->ending + 2];
    return !memcmp(copy, b->host[0], b->first_bytes) &&
           (b->physical[1] == ~0ull || !memcmp(copy + b->first_bytes, b->host[1], b->bytes - b->first_bytes));
}

/* In this epoch, the blocks of a page are as they were decoded, or dead. */
static void check_page(struct vcpu *c, u64 page)
{
    struct code_page *p = find_page(c->cache, page);
    if (!p || p->checked == c->epoch)
        return;
    p->checked = c->epoch;
    for (struct block **at = &p->blocks; *at;) {
        struct block *b = *at;
        if (!b->dead && !bytes_unchanged(b))
            unlink_block(c, b);
        if (b->dead)
            *at = b->page_next[page_side(b, page)];
        else
            at = &b->page_next[page_side(b, page)];
    }
}

struct block *cache_lookup(struct vcpu *c)
{
    u64 ip = c->gpr[GPR_IP], linear = code_linear(c, ip);
    struct fetch f;
    u32 epoch;
again:
    epoch = c->epoch;
    fetch_first(c, ip, &f);
    check_page(c, f.physical[0] & PAGE_MASK);
    struct block *b = c->cache->buckets[bucket_of(f.physical[0], ip, c->key)];
    while (b && (b->physical[0] != f.physical[0] || b->ip != ip || b->key != c->key))
        b = b->bucket_next;
    if (b && b->physical[1] != ~0ull &&
        mmu_translate(c, code_linear(c, ip + b->first_bytes), ACCESS_EXECUTE) != b->physical[1]) {
        unlink_block(c, b);
        b = NULL;
    }
    if (!b) {
        b = build(c, ip, &f);
        if (c->vm->parallel && !bytes_unchanged(b) && !b->dead) /* written while it was decoded */
            unlink_block(c, b);
        if (b->dead || epoch != c->epoch)
            goto again;
    }
    if (c->cache->last_id > 0xfffffff0) /* they come to an end: all links are of old ones */
        cache_flush(c), b = build(c, ip, &f);
    note_mapping(c, linear, b->physical[0]);
    struct jump_entry *e = jump_entry(c, ip);
    if (b->physical[1] == ~0ull)
        *e = (struct jump_entry){.ip = ip, .block = b, .id = c->code_map->ids[code_at(linear)], .at = code_at(linear)};
    else {
        check_page(c, b->physical[1]);
        note_mapping(c, code_linear(c, ip + b->first_bytes), b->physical[1]);
    }
    return b;
}

/* ---- The handlers that end blocks ------------------------------------------------------------------------------------- */

/* A direct jump whose link is not valid; also the end of a block. */
void jump_slow(struct vcpu *c, const struct record *r)
{
    u64 target = relative_target(c, r);
    if (r->length) /* a jump: its own fault; the end of a block goes on to where the fetch faults */
        check_target(c, r, target);
    c->budget += r->left;
    u64 ip = c->gpr[GPR_IP];
    note_last(c, r, r->length); /* for a fetch that faults */
    c->gpr[GPR_IP] = target;
    if (c->budget <= 0 || atomic_load_explicit(&c->attention, memory_order_relaxed)) { /* and before what the fetch raises */
        c->now = NULL;
        return;
    }
    u32 flushes = c->cache->flushes; /* r may lie in the arena that a lookup empties */
    struct block *b = cache_lookup(c);
    if (flushes == c->cache->flushes)
        link_record(c, r, ip, b);
    note_jump(c, b);
    ENTER(c, b);
}

void jump_indirect_slow(struct vcpu *c, const struct record *r)
{
    note_last(c, r, true);
    c->gpr[GPR_IP] = c->scratch;
    c->now = NULL;
    if (c->budget <= 0)
        return;
    struct block *b = cache_lookup(c);
    note_jump(c, b);
    ENTER(c, b);
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
    note_last(c, r, true);
    c->gpr[GPR_IP] = ip;
    c->budget += r->left;
    c->now = NULL;
}
