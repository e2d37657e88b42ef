/* What a CPU did last: its last faults, and its last instructions.
 *
 * Noted is each place where the main loop begins and ends to execute, and each entry of a block that is new: one of those that
 * the translator still counts (block_count). Settled code, translated or not, goes from block to block without a note. For that
 * the way is worked out when somebody asks, backwards from where the CPU stands: an instruction before another one in a block is
 * certain; before the first one of a block came one of the blocks that can go there, and that can be reached, by direct jumps,
 * returns and indirect jumps, from the block of the note before, in exactly so many instructions. All ways that fit are followed
 * at once, as long as they agree: what is told is certain, and ends where they part. */
#include "recent.h"

#include <stdlib.h>

#include "cache.h"
#include "opcodes.h"
#include "translate.h"

enum {
    STATES = 64,              /* ways that are followed at once */
    BLOCKS_MOST = 1 << 16,    /* of a CPU; with more, settled code is not looked at */
    LOOKS_MOST = 1 << 14,     /* steps of all looks ahead: a guest may have made its blocks so that they take long */
    EDGES_MOST = 4096,        /* that are looked at for one step */
    AHEAD = 40,               /* instructions that it looks ahead */
};

void recent_forget_places(struct vcpu *c)
{
    c->recent.count = 0;
    c->recent.last_how = LAST_UNKNOWN;
}

void note_stand(struct vcpu *c)
{
    u64 done = records_done(c);
    const struct place_note *before = &c->recent.places[(c->recent.count - 1) % RECENT_PLACES];
    if (c->recent.count && before->done == done && before->kind == PLACE_STAND)
        return;
    struct place_note *n = note_place(c, PLACE_STAND, c->gpr[GPR_IP], done);
    n->how = c->recent.last_how;
    n->last_ip = c->recent.last_ip;
    n->last_at = c->recent.last_at;
    c->recent.last_how = LAST_UNKNOWN;
}

void note_jump(struct vcpu *c, const struct block *b)
{
    note_stand(c);
    if (b->enter != block_count) /* which does it */
        note_block(c, b, records_done(c));
}

void note_fault(struct vcpu *c, bool delivered, unsigned becomes)
{
    bool within = c->delivering >= 0;
    c->recent.faults[c->recent.fault_count++ % CORE_FAULTS] = (struct core_fault){
        .vector = c->fault.vector,
        .has_error = c->fault.has_error && c->cr0 & CR0_PE,
        .becomes = delivered ? (u8)becomes : CORE_SHUTDOWN,
        .within = !within ? CORE_NOT_WITHIN : c->delivering_kind == EVENT_EXCEPTION ? CORE_WITHIN_EXCEPTION :
                  c->delivering_kind == EVENT_EXTERNAL ? CORE_WITHIN_INTERRUPT : CORE_WITHIN_SOFTWARE,
        .delivering = within ? (u8)c->delivering : 0,
        .cpl = c->cpl,
        .cs = c->seg[SEG_CS].selector,
        .ss = c->seg[SEG_SS].selector,
        .error = c->fault.has_error ? c->fault.error : 0,
        .address = c->fault.vector == VECTOR_PF ? c->fault.address : 0,
        .linear = code_linear(c, c->gpr[GPR_IP]),
        .rip = c->gpr[GPR_IP],
        .rsp = c->gpr[RSP],
        .cr2 = c->cr2,
        .cr3 = c->cr3,
        .instructions = instructions_done(c),
    };
}

size_t vcpu_faults(const struct vcpu *c, struct core_fault faults[CORE_FAULTS])
{
    u64 count = c->recent.fault_count, kept = count < CORE_FAULTS ? count : CORE_FAULTS;
    for (u64 i = 0; i < kept; i++)
        faults[i] = c->recent.faults[(count - kept + i) % CORE_FAULTS];
    return kept;
}

/* ---- The graph of blocks ---------------------------------------------------------------------------------------------------- */

enum flow { FLOW_ON, FLOW_TO /* and on */, FLOW_ONLY_TO, FLOW_CALLS, FLOW_RETURNS, FLOW_ANYWHERE, FLOW_ENDS /* in the main loop */ };

static enum flow flow_of(const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    if (r->run == op_raise)
        return FLOW_ENDS;
    switch (o->map == M1 ? o->opcode : 0) {
    case 0xe8: return FLOW_CALLS;
    case 0xe9: case 0xeb: return FLOW_ONLY_TO;
    case 0xc2: case 0xc3: return FLOW_RETURNS;
    case 0xe4: case 0xe5: case 0xe6: case 0xe7: case 0xec: case 0xed: case 0xee: case 0xef: return FLOW_ON; /* IN, OUT: GO_ON */
    case 0xff:
        if (o->digit == 2 || o->digit == 4)
            return FLOW_ANYWHERE;
    }
    return r->has_link ? FLOW_TO : o->attributes & A_END ? FLOW_ENDS : FLOW_ON;
}

static u64 target_of(const struct block *b, const struct record *r)
{
    u64 target = truncate_to(b->ip + r->at + r->length + (u64)(i64)r->imm, 8u << r->size);
    return b->key & KEY_CODE64 ? target : (u32)target;
}
static u64 end_of(const struct block *b)
{
    u64 end = b->ip + b->records[b->ending].at;
    return b->key & KEY_CODE64 ? end : (u32)end;
}

/* The records of a block that are instructions: a tracer's prologue stands before one, with the same `at`. */
static unsigned instructions_of(const struct block *b, const struct record *found[BLOCK_INSTRUCTIONS])
{
    unsigned count = 0;
    bool traced = b->key & KEY_TRACED;
    for (const struct record *r = b->records; r < &b->records[b->ending] && count < BLOCK_INSTRUCTIONS; r = record_after(r)) {
        if (traced)
            r++;
        found[count++] = r;
    }
    return count;
}

static const struct record *instruction_of(const struct block *b, unsigned index)
{
    const struct record *r = b->records + !!(b->key & KEY_TRACED);
    while (index--)
        r = record_after(r) + !!(b->key & KEY_TRACED);
    return r;
}

/* A return that is a jump: to what was just pushed, or stored where it looks (a retpoline). */
static bool returns_anywhere(const struct record *const *records, unsigned count)
{
    for (unsigned i = 0; i + 1 < count; i++) {
        const struct record *r = records[i];
        if (r->base == RSP * 8 && r->index == GPR_ZERO * 8 && !r->disp && !(r->prefix & PREFIX_REGISTER) &&
                opcodes[r->id].operands[0] && opcodes[r->id].map == M1 && opcodes[r->id].opcode < 0x90)
            return true;
    }
    const struct opcode *o = count > 1 ? &opcodes[records[count - 2]->id] : NULL;
    return o && o->name[0] == 'P' && o->name[1] == 'U' && o->name[2] == 'S' && o->name[3] == 'H';
}

struct edge { u64 to; const struct block *from; unsigned taken; }; /* after so many of its instructions */
struct graph {
    const struct vcpu *c;
    const struct block **blocks; /* by ip */
    size_t block_count;
    bool *reached;            /* each of `blocks`, from the note before */
    struct edge *edges;       /* direct ones, by `to` */
    size_t edge_count;
    u64 *sites;               /* of blocks that follow a call, in order */
    size_t site_count;
    const struct block **ends; /* those reached that end with a return, or a jump to anywhere */
    size_t end_count;
    unsigned looks;
};

static int by_ip(const void *a, const void *b)
{
    u64 x = (*(const struct block *const *)a)->ip, y = (*(const struct block *const *)b)->ip;
    return x < y ? -1 : x > y;
}
static int by_target(const void *a, const void *b)
{
    u64 x = ((const struct edge *)a)->to, y = ((const struct edge *)b)->to;
    return x < y ? -1 : x > y;
}
static int by_value(const void *a, const void *b)
{
    u64 x = *(const u64 *)a, y = *(const u64 *)b;
    return x < y ? -1 : x > y;
}

static size_t first_block(const struct graph *g, u64 ip)
{
    size_t low = 0, high = g->block_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (g->blocks[middle]->ip < ip)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}
static size_t first_edge(const struct graph *g, u64 to)
{
    size_t low = 0, high = g->edge_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (g->edges[middle].to < to)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}
static bool is_site(const struct graph *g, u64 ip)
{
    return g->site_count && bsearch(&ip, g->sites, g->site_count, sizeof ip, by_value);
}

static void graph_free(struct graph *g)
{
    free(g->blocks);
    free(g->reached);
    free(g->edges);
    free(g->sites);
    free(g->ends);
    *g = (struct graph){0};
}

/* Where a block goes by itself: its direct jumps, and its end. `edges` NULL: only how many. */
static unsigned edges_of(const struct block *b, struct edge *edges)
{
    const struct record *records[BLOCK_INSTRUCTIONS];
    unsigned count = instructions_of(b, records), found = 0;
    enum flow flow = FLOW_ENDS;
    for (unsigned j = 0; j < count; j++) {
        flow = flow_of(records[j]);
        if (flow != FLOW_TO && flow != FLOW_ONLY_TO && flow != FLOW_CALLS)
            continue;
        if (edges)
            edges[found] = (struct edge){target_of(b, records[j]), b, j + 1};
        found++;
    }
    if (flow == FLOW_ON || flow == FLOW_TO) {
        if (edges)
            edges[found] = (struct edge){end_of(b), b, count};
        found++;
    }
    return found;
}

/* Whether a return may go there: its bytes stand after a CALL, which need not be in a block any more (E8, FF /2). */
static bool follows_call(const struct block *b)
{
    unsigned room = b->physical[0] & 0xfff;
    const u8 *at = b->host[0];
    if (room < 7 || at[-5] == 0xe8 || at[-3] == 0xe8)
        return true;
    for (unsigned length = 2; length <= 7; length++)
        if (at[-(int)length] == 0xff && (at[1 - (int)length] >> 3 & 7) == 2)
            return true;
    return false;
}

/* All blocks, and how they go to each other. False: there is no memory, or there are too many. */
static bool graph_make(struct graph *g, const struct vcpu *c)
{
    g->c = c;
    g->block_count = cache_blocks(c, NULL, 0);
    if (!g->block_count || g->block_count > BLOCKS_MOST)
        return false;
    g->blocks = malloc(g->block_count * sizeof *g->blocks);
    g->ends = malloc(g->block_count * sizeof *g->ends);
    g->reached = calloc(g->block_count, 1);
    g->sites = malloc(g->block_count * sizeof *g->sites);
    if (!g->blocks || !g->ends || !g->reached || !g->sites)
        return false;
    cache_blocks(c, g->blocks, g->block_count);
    qsort(g->blocks, g->block_count, sizeof *g->blocks, by_ip);
    size_t room = 0;
    for (size_t i = 0; i < g->block_count; i++)
        room += edges_of(g->blocks[i], NULL);
    g->edges = malloc((room + 1) * sizeof *g->edges);
    if (!g->edges)
        return false;
    for (size_t i = 0; i < g->block_count; i++) {
        g->edge_count += edges_of(g->blocks[i], &g->edges[g->edge_count]);
        if (follows_call(g->blocks[i]))
            g->sites[g->site_count++] = g->blocks[i]->ip;
    }
    qsort(g->edges, g->edge_count, sizeof *g->edges, by_target);
    qsort(g->sites, g->site_count, sizeof *g->sites, by_value);
    return true;
}

/* How a block ends: whether by a return, or by a jump that may go anywhere. */
static enum flow end_flow(const struct block *b, unsigned *count)
{
    const struct record *records[BLOCK_INSTRUCTIONS];
    *count = instructions_of(b, records);
    enum flow flow = *count ? flow_of(records[*count - 1]) : FLOW_ON;
    return flow == FLOW_RETURNS && returns_anywhere(records, *count) ? FLOW_ANYWHERE : flow;
}

static void reach(struct graph *g, u64 ip, size_t *queue, size_t *tail)
{
    for (size_t i = first_block(g, ip); i < g->block_count && g->blocks[i]->ip == ip; i++)
        if (!g->reached[i]) {
            g->reached[i] = true;
            queue[(*tail)++] = i;
        }
}

/* Mark what can be reached from block `from` without the main loop. */
static void graph_reach(struct graph *g, const struct block *from)
{
    size_t *queue = malloc(g->block_count * sizeof *queue), head = 0, tail = 0;
    struct edge edges[BLOCK_INSTRUCTIONS + 1];
    bool returned = false, all = !queue;
    unsigned count;
    memset(g->reached, 0, g->block_count);
    if (queue)
        reach(g, from->ip, queue, &tail);
    while (!all && head < tail) {
        const struct block *b = g->blocks[queue[head++]];
        for (unsigned i = edges_of(b, edges); i--;)
            reach(g, edges[i].to, queue, &tail);
        enum flow flow = end_flow(b, &count);
        for (size_t i = 0; flow == FLOW_RETURNS && !returned && i < g->site_count; i++)
            reach(g, g->sites[i], queue, &tail);
        returned |= flow == FLOW_RETURNS;
        all = flow == FLOW_ANYWHERE;
    }
    free(queue);
    g->end_count = 0;
    for (size_t i = 0; i < g->block_count; i++) {
        g->reached[i] |= all;
        enum flow flow = g->reached[i] && g->blocks[i]->key == from->key ? end_flow(g->blocks[i], &count) : FLOW_ON;
        if (flow == FLOW_RETURNS || flow == FLOW_ANYWHERE)
            g->ends[g->end_count++] = g->blocks[i];
    }
}

/* ---- The way back ------------------------------------------------------------------------------------------------------------ */

/* `at` instructions of the block are done; `left` more are, since the note before. */
struct state { const struct block *block; unsigned at; u64 left; };
struct states { struct state all[STATES]; unsigned count; bool too_many; };

static void add_state(struct states *s, const struct block *b, unsigned at, u64 left)
{
    for (unsigned i = 0; i < s->count; i++)
        if (s->all[i].block == b && s->all[i].at == at && s->all[i].left == left)
            return;
    if (s->count == STATES)
        s->too_many = true;
    else
        s->all[s->count++] = (struct state){b, at, left};
}

static bool is_reached(const struct graph *g, const struct block *b)
{
    for (size_t i = first_block(g, b->ip); i < g->block_count && g->blocks[i]->ip == b->ip; i++)
        if (g->blocks[i] == b)
            return g->reached[i];
    return false;
}

/* The blocks that may have gone to `ip`. */
static void add_before(const struct graph *g, struct states *s, u64 ip, u64 key, u64 left)
{
    size_t first = first_edge(g, ip);
    for (size_t i = first; i < g->edge_count && g->edges[i].to == ip && !s->too_many; i++) {
        const struct edge *e = &g->edges[i];
        if (e->from->key == key && e->taken <= left && is_reached(g, e->from))
            add_state(s, e->from, e->taken, left);
        s->too_many |= i - first > EDGES_MOST;
    }
    bool site = is_site(g, ip);
    for (size_t i = 0; i < g->end_count && !s->too_many; i++) {
        unsigned count;
        enum flow flow = end_flow(g->ends[i], &count);
        if (count <= left && (site || flow == FLOW_ANYWHERE))
            add_state(s, g->ends[i], count, left);
        s->too_many |= i > EDGES_MOST;
    }
}

/* What comes before the state, of the way from `from`: itself where it is in the middle of a block. */
static void expand(const struct graph *g, struct states *s, const struct state *one, const struct block *from)
{
    if (one->at)
        add_state(s, one->block, one->at, one->left);
    else if (!one->left) { /* it is the note before, or a way that is none */
        if (one->block == from)
            add_state(s, from, 0, 0);
    } else if (g)
        add_before(g, s, one->block->ip, one->block->key, one->left);
    else
        s->too_many = true;
}

/* Whether a way from `from` leads to the state, as far as can be seen with some effort. */
static bool leads_there(struct graph *g, const struct state *one, const struct block *from, unsigned depth)
{
    if (depth > AHEAD || !g || ++g->looks > LOOKS_MOST)
        return true;
    if (one->at > one->left)
        return false;
    struct state begin = {one->block, 0, one->left - one->at};
    if (!begin.left)
        return begin.block == from;
    struct states before = {.count = 0};
    expand(g, &before, &begin, from);
    for (unsigned i = 0; i < before.count; i++)
        if (leads_there(g, &before.all[i], from, depth + before.all[i].at))
            return true;
    return before.too_many;
}

struct told { struct core_step *steps; size_t count, room; u64 base; };

static struct core_step *tell_place(struct told *told, u64 ip, u64 key)
{
    bool wide = key & KEY_CODE64;
    struct core_step *step = &told->steps[told->count++];
    u64 linear = wide ? ip : (u32)(told->base + ip);
    *step = (struct core_step){.linear = linear, .ip = wide ? ip : (u32)ip, .bits = wide ? 64 : key & KEY_CODE32 ? 32 : 16};
    return step;
}

static void tell(struct told *told, const struct block *b, unsigned index)
{
    const struct record *r = instruction_of(b, index);
    struct core_step *step = tell_place(told, b->ip + r->at, b->key);
    const u8 *copy = (const u8 *)&b->records[b->ending + 2];
    step->length = r->at + r->length <= b->bytes ? r->length : 0;
    memcpy(step->code, copy + r->at, step->length);
}

static u64 ip_at(const struct block *b, unsigned index) { return b->ip + instruction_of(b, index)->at; }

/* Tell the instructions between a note and the one before, the last one first. False: not all of them are known. */
static bool tell_way(struct told *told, struct graph *g, struct states *now, const struct block *from)
{
    while (told->count < told->room) {
        struct states before = {.count = 0};
        for (unsigned i = 0; i < now->count; i++)
            expand(g, &before, &now->all[i], from);
        before.too_many |= now->too_many;
        if (before.too_many || !before.count)
            return false;
        unsigned kept = 0;
        bool ended = false, goes_on = false;
        for (unsigned i = 0; i < before.count; i++) {
            struct state *one = &before.all[i];
            bool ends = !one->at && !one->left;
            if (!ends && (one->at > one->left || !leads_there(g, one, from, 0)))
                continue;
            ended |= ends;
            goes_on |= !ends;
            before.all[kept++] = *one;
        }
        before.count = kept;
        if (!kept || (ended && goes_on))
            return false;
        if (ended)
            return true;
        u64 ip = ip_at(before.all[0].block, before.all[0].at - 1);
        for (unsigned i = 1; i < kept; i++)
            if (ip_at(before.all[i].block, before.all[i].at - 1) != ip)
                return false;
        tell(told, before.all[0].block, before.all[0].at - 1);
        now->count = 0;
        now->too_many = false;
        for (unsigned i = 0; i < kept; i++)
            add_state(now, before.all[i].block, before.all[i].at - 1, before.all[i].left - 1);
    }
    return true;
}

/* How many of its instructions come before the record at `at`, which may be the one that leaves. */
static bool index_at(const struct block *b, unsigned at, unsigned *index)
{
    const struct record *records[BLOCK_INSTRUCTIONS];
    unsigned count = instructions_of(b, records);
    for (*index = 0; *index < count && records[*index]->at != at;)
        ++*index;
    return *index < count || b->records[b->ending].at == at;
}

/* The block that begins at `ip` and has a record at `at`. */
static const struct block *block_with(const struct graph *g, u64 ip, u64 key, unsigned at, unsigned *index)
{
    for (size_t i = first_block(g, ip); i < g->block_count && g->blocks[i]->ip == ip; i++)
        if (g->blocks[i]->key == key && index_at(g->blocks[i], at, index))
            return g->blocks[i];
    return NULL;
}

size_t vcpu_steps(struct vcpu *c, struct core_step *steps, size_t room)
{
    struct told told = {steps, 0, room};
    u64 newest = c->recent.count, oldest = newest > RECENT_PLACES ? newest - RECENT_PLACES : 0;
    struct graph g = {0};
    bool has_graph = newest > 1 && graph_make(&g, c);
    for (u64 i = newest; i-- > oldest + 1 && told.count < told.room;) {
        const struct place_note *n = &c->recent.places[i % RECENT_PLACES], *before = &c->recent.places[(i - 1) % RECENT_PLACES];
        u64 left = n->done - before->done;
        told.base = before->base;
        if (n->kind != PLACE_STAND && before->kind == PLACE_STAND) { /* the main loop has nothing done in between */
            if (left)
                break;
            continue;
        }
        if (before->kind == PLACE_ALONE) {
            if (left > 1)
                break;
            if (left)
                tell_place(&told, before->ip, before->key);
            continue;
        }
        if (before->kind == PLACE_STAND)
            break;
        const struct block *from = before->block;
        bool same_code = n->killed == before->killed;
        if (has_graph && same_code)
            graph_reach(&g, from);
        struct states now = {.count = 0};
        unsigned index;
        const struct block *last = NULL;
        if (n->how != LAST_UNKNOWN) {
            if (n->last_ip == from->ip && index_at(from, n->last_at, &index))
                last = from;
            else if (has_graph)
                last = block_with(&g, n->last_ip, before->key, n->last_at, &index);
            if (last)
                add_state(&now, last, index + (n->how == LAST_DONE), left);
        } else if (has_graph && same_code) {
            add_before(&g, &now, n->ip, before->key, left);
        } else {
            break;
        }
        if (!tell_way(&told, has_graph && same_code ? &g : NULL, &now, from))
            break;
    }
    graph_free(&g);
    return told.count;
}
