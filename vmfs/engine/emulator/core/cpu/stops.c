/* What a run stops for: breakpoints, watchpoints, ports, vectors, CR3, the mode. Nothing of it is in the guest.
 *
 * The stops are sorted by kind, then by address, so that what looks for one among thousands finds it by halving. All that
 * one instruction or event comes to are collected in `reached`; after it they are the exit. */
#include "memory.h"

#include <errno.h>
#include <stdlib.h>

enum { NO_STOP = 0xffffffff };

static int by_kind_and_address(const void *left, const void *right)
{
    const struct vcpu_stop *a = left, *b = right;
    if (a->kind != b->kind)
        return a->kind < b->kind ? -1 : 1;
    if (a->address != b->address)
        return a->address < b->address ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

int vcpu_set_debug(struct vcpu *c, bool step, const struct vcpu_stop *stops, size_t count)
{
    struct vcpu_stop *copy = NULL;
    bool *marks = NULL;
    for (size_t i = 0; i < count; i++)
        if (stops[i].kind >= STOP_KINDS || (stops[i].kind <= STOP_IO && stops[i].kind != STOP_BREAKPOINT &&
             (!stops[i].length || stops[i].address + (stops[i].length - 1) < stops[i].address)))
            return -EINVAL;
    if (count) {
        copy = malloc(count * sizeof *copy);
        marks = calloc(count, sizeof *marks);
        /* What is held for the next run may have others with it, which are of the stops before. */
        struct vcpu_exit *reached = realloc(c->reached, (count + c->reached_count) * sizeof *reached);
        if (reached)
            c->reached = reached;
        if (!copy || !marks || !reached) {
            free(copy);
            free(marks);
            return -ENOMEM;
        }
        memcpy(copy, stops, count * sizeof *copy);
        qsort(copy, count, sizeof *copy, by_kind_and_address);
    }
    free(c->stops.all);
    free(c->stops.reached);
    c->stops = (struct stops){.all = copy, .reached = marks};
    for (size_t i = 0; i < c->reached_count; i++)
        c->reached[i].count = NO_STOP;
    size_t i = 0;
    for (unsigned kind = 0; kind < STOP_KINDS; kind++) {
        c->stops.first[kind] = i;
        for (; i < count && copy[i].kind == kind; i++)
            if (copy[i].length > c->stops.longest[kind])
                c->stops.longest[kind] = copy[i].length;
    }
    c->stops.first[STOP_KINDS] = i;
    c->step = step;
    cache_flush(c);
    tlb_flush(c);
    return 0;
}

/* The first stop of a kind at `address` or after it; `end` if there is none. */
static const struct vcpu_stop *from(const struct vcpu *c, enum stop_kind kind, u64 address, const struct vcpu_stop **end)
{
    size_t low = c->stops.first[kind], high = c->stops.first[kind + 1];
    *end = c->stops.all + high;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (c->stops.all[middle].address < address)
            low = middle + 1;
        else
            high = middle;
    }
    return c->stops.all + low;
}

/* The first stop that may have a byte in common with what begins at `address`. */
static const struct vcpu_stop *near(const struct vcpu *c, enum stop_kind kind, u64 address, const struct vcpu_stop **end)
{
    u64 longest = c->stops.longest[kind];
    return from(c, kind, address > longest ? address - longest : 0, end);
}

/* ---- What was reached -------------------------------------------------------------------------------------------------------- */

static void reach(struct vcpu *c, enum debug_cause cause, const struct vcpu_stop *s, u64 address, unsigned vector)
{
    size_t index = (size_t)(s - c->stops.all);
    if (c->stops.reached[index])
        return; /* an instruction may come to one several times */
    c->stops.reached[index] = true;
    c->reached[c->reached_count++] = (struct vcpu_exit){.reason = EXIT_DEBUG, .cause = cause, .id = s->id,
        .count = (u32)index, .address = address, .vector = vector};
}

void stops_forget(struct vcpu *c)
{
    for (size_t i = 0; i < c->reached_count; i++)
        if (c->reached[i].count != NO_STOP)
            c->stops.reached[c->reached[i].count] = false;
    c->reached_count = 0;
}

void stops_hold(struct vcpu *c, const struct vcpu_exit *stops, size_t count)
{
    struct vcpu_exit *reached = realloc(c->reached, (c->stops.first[STOP_KINDS] + count) * sizeof *reached);
    if (!reached)
        return; /* the others are not told */
    c->reached = reached;
    c->reached_count = count;
    memcpy(reached, stops, count * sizeof *stops);
    for (size_t i = 0; i < count; i++)
        reached[i].count = NO_STOP;
}

void stops_free(struct vcpu *c)
{
    free(c->stops.all);
    free(c->stops.reached);
    free(c->reached);
}

/* They are the exit, or the next one if there is one already. */
void stops_finish(struct vcpu *c)
{
    if (likely(!c->reached_count))
        return;
    for (size_t i = 0; i < c->reached_count; i++)
        c->reached[i].rip = c->gpr[GPR_IP];
    if (c->exit.reason == EXIT_NONE)
        c->exit = c->reached[0];
    else
        c->held = c->reached[0];
}

size_t vcpu_also(const struct vcpu *c, const struct vcpu_exit **others)
{
    *others = c->reached + 1;
    return c->reached_count ? c->reached_count - 1 : 0;
}

/* ---- Each kind --------------------------------------------------------------------------------------------------------------- */

/* The first breakpoint from `s` on that an instruction at `linear` begins in; `end` if there is none. */
static const struct vcpu_stop *breaks(const struct vcpu_stop *s, const struct vcpu_stop *end, u64 linear)
{
    for (; s < end && s->address <= linear; s++)
        if (linear - s->address < (s->length ? s->length : 1))
            return s;
    return end;
}

bool stops_break(const struct vcpu *c, u64 linear)
{
    const struct vcpu_stop *end, *s = near(c, STOP_BREAKPOINT, linear, &end);
    return breaks(s, end, linear) < end;
}

bool stops_reach_break(struct vcpu *c, u64 linear)
{
    const struct vcpu_stop *end, *s = near(c, STOP_BREAKPOINT, linear, &end);
    bool any = false;
    for (; (s = breaks(s, end, linear)) < end; s++, any = true)
        reach(c, DEBUG_BREAKPOINT, s, 0, 0);
    if (any)
        stops_finish(c);
    return any;
}

static bool meets(const struct vcpu_stop *s, u64 address, u64 bytes)
{
    return s->address - address < bytes || address - s->address < s->length;
}

bool stops_watch_page(const struct vcpu *c, u64 linear, u64 physical)
{
    for (unsigned kind = STOP_WATCH; kind <= STOP_WATCH_PHYSICAL; kind++) {
        u64 page = (kind == STOP_WATCH ? linear : physical) & PAGE_MASK;
        const struct vcpu_stop *end;
        for (const struct vcpu_stop *s = near(c, kind, page, &end); s < end && s->address <= page + 0xfff; s++)
            if (meets(s, page, 0x1000))
                return true;
    }
    return false;
}

/* Where a watchpoint was hit by an access at `at`: the start of its piece, as the CPU's own debug registers would tell it
 * (Intel SDM 3B 17.2.5: naturally aligned, 1, 2, 4 or 8 bytes). */
static u64 watched_piece(const struct vcpu_stop *s, u64 at)
{
    u64 byte = at > s->address ? at : s->address, piece = byte & ~7ull, end = s->address + s->length;
    if (piece < s->address)
        piece = s->address;
    for (u64 size = 8; ; size = 8) {
        while (size > end - piece || piece & (size - 1))
            size >>= 1;
        if (byte - piece < size)
            return piece;
        piece += size;
    }
}

static bool watches(const struct vcpu_stop *s, u64 at, unsigned bytes, bool write)
{
    return (write ? s->on_write : s->on_read) && meets(s, at, bytes);
}

/* Whether an access is watched. */
bool stops_watch(const struct vcpu *c, u64 linear, u64 physical, unsigned bytes, bool write)
{
    for (unsigned kind = STOP_WATCH; kind <= STOP_WATCH_PHYSICAL; kind++) {
        u64 at = kind == STOP_WATCH ? linear : physical;
        const struct vcpu_stop *end;
        for (const struct vcpu_stop *s = near(c, kind, at, &end); s < end && s->address <= at + (bytes - 1); s++)
            if (watches(s, at, bytes, write))
                return true;
    }
    return false;
}

void stops_reach_watch(struct vcpu *c, u64 linear, u64 physical, unsigned bytes, bool write)
{
    for (unsigned kind = STOP_WATCH; kind <= STOP_WATCH_PHYSICAL; kind++) {
        u64 at = kind == STOP_WATCH ? linear : physical;
        const struct vcpu_stop *end;
        for (const struct vcpu_stop *s = near(c, kind, at, &end); s < end && s->address <= at + (bytes - 1); s++)
            if (watches(s, at, bytes, write)) {
                size_t before = c->reached_count;
                reach(c, DEBUG_WATCHPOINT, s, watched_piece(s, at), 0);
                if (c->reached_count > before) {
                    struct vcpu_exit *e = &c->reached[before];
                    e->access = linear, e->size = bytes, e->write = write;
                }
            }
    }
}

void stops_reach_port(struct vcpu *c, u16 port, unsigned bytes)
{
    const struct vcpu_stop *end;
    for (const struct vcpu_stop *s = near(c, STOP_IO, port, &end); s < end && s->address <= port + (bytes - 1); s++)
        if (meets(s, port, bytes))
            reach(c, DEBUG_IO, s, port, 0);
}

/* Whether an event is to end the run instead of being delivered; not the same one again when it runs again. `done`: the
 * instructions before it. */
bool catches(struct vcpu *c, unsigned vector, bool external, u64 done)
{
    const struct vcpu_stop *end, *s = from(c, STOP_VECTOR, vector, &end);
    if (likely(s == end || s->address != vector))
        return false;
    if (c->caught_at != done + 1)
        memset(c->caught, 0, sizeof c->caught);
    c->caught_at = done + 1;
    u64 *word = &c->caught[vector >> 6], bit = 1ull << (vector & 63);
    if (*word & bit)
        return false;
    *word |= bit;
    u64 address = vector == VECTOR_PF && !external ? c->fault.address : 0;
    for (; s < end && s->address == vector; s++)
        reach(c, external ? DEBUG_INTERRUPT : DEBUG_EXCEPTION, s, address, vector);
    stops_finish(c);
    return true;
}

void stops_reach_cr3(struct vcpu *c)
{
    const struct vcpu_stop *end;
    for (const struct vcpu_stop *s = from(c, STOP_CR3, 0, &end); s < end; s++)
        reach(c, DEBUG_CR3, s, 0, 0);
}

void stops_reach_unwritten(struct vcpu *c, u64 linear)
{
    const struct vcpu_stop *end;
    for (const struct vcpu_stop *s = from(c, STOP_UNWRITTEN, 0, &end); s < end; s++)
        reach(c, DEBUG_UNWRITTEN, s, linear, 0);
}

void stops_reach_unclaimed(struct vcpu *c, u64 address)
{
    const struct vcpu_stop *end;
    for (const struct vcpu_stop *s = from(c, STOP_UNCLAIMED, 0, &end); s < end; s++)
        reach(c, DEBUG_UNCLAIMED, s, address, 0);
}

/* Real, protected or long mode. */
static unsigned cpu_mode(const struct vcpu *c) { return c->efer & EFER_LMA ? 2 : c->cr0 & CR0_PE ? 1 : 0; }

void stops_know_mode(struct vcpu *c) { c->known_mode = cpu_mode(c); }

void stops_reach_mode(struct vcpu *c)
{
    unsigned mode = cpu_mode(c), before = c->known_mode;
    c->known_mode = mode;
    const struct vcpu_stop *end;
    for (const struct vcpu_stop *s = from(c, STOP_MODE, 0, &end); s < end && mode != before; s++)
        reach(c, DEBUG_MODE, s, 0, 0);
}
