/* Tracing: records of what the CPU does, in a buffer of its own that the CPU's thread delivers when it is full, when the run
 * ends, and now and then. See tracer.h. */
#include "atomic.h"
#include "tracer.h"

#include <stdlib.h>

/* The number of the instruction that runs (c->now), or that is next. */
static u64 number_now(const struct vcpu *c)
{
    return c->now ? retired_at(c, c->now) : c->retired + (u64)(c->slice - c->budget);
}
static u64 place_now(const struct vcpu *c)
{
    return code_linear(c, c->now ? ip_of(c, c->now) : c->gpr[GPR_IP]);
}

static bool in_range(const struct tracer *t, u64 linear) { return linear - t->want.first <= t->want.last - t->want.first; }

static unsigned mode_bits(const struct vcpu *c)
{
    return (c->cpl == 3 ? CORE_TRACE_USER : CORE_TRACE_KERNEL) |
           (c->efer & EFER_LMA ? CORE_TRACE_LONG : c->cr0 & CR0_PE ? CORE_TRACE_PROTECTED : CORE_TRACE_REAL);
}
static bool in_mode(const struct vcpu *c)
{
    unsigned bits = mode_bits(c);
    return (c->tracer->want.modes & bits) == bits;
}

/* The next record continues nothing. */
static void forget(struct tracer *t)
{
    t->current = NULL;
    t->place_number = t->undo_number = ~0ull;
}

/* The next record, or NULL: the buffer is full to the last one, which its reserve is there to prevent. */
static struct core_trace_record *take(struct vcpu *c)
{
    struct tracer *t = c->tracer;
    if (t->at >= t->records + TRACER_RECORDS - TRACER_RESERVE) {
        if (t->at == t->records + TRACER_RECORDS) {
            t->dropped++;
            return NULL;
        }
        atomic_fetch_or(&c->attention, ATTENTION_TRACE);
    }
    if (c->now && t->undo_number != retired_at(c, c->now)) {
        t->undo_number = retired_at(c, c->now);
        t->undo_at = t->at;
    }
    return t->at++;
}

/* ---- Instructions ----------------------------------------------------------------------------------------------------------- */

/* Of an INSN record: the number of its last instruction. */
static u64 last_number(const struct core_trace_record *r) { return r->insn.number + r->size - 1 + (r->code - 1); }

static void __attribute__((noinline)) begin(struct vcpu *c, const struct record *r, u64 at)
{
    struct tracer *t = c->tracer;
    t->current = NULL;
    if (!in_range(t, at))
        return;
    struct core_trace_record *new = take(c);
    if (!new)
        return;
    *new = (struct core_trace_record){.kind = CORE_TRACE_INSN, .size = 1, .code = 1};
    new->insn.number = retired_at(c, r);
    new->insn.address = at;
    new->insn.lengths = r->length;
    t->current = new;
}

/* In front of each instruction. A straight run of them is one record. */
OP(op_trace)
{
    struct tracer *t = c->tracer;
    u64 at = code_linear(c, ip_of(c, r));
    struct core_trace_record *last = t->current;
    if (likely(last && last + 1 == t->at && t->next == at && last->size < 16 &&
               last->insn.number + last->size == retired_at(c, r) && in_range(t, at))) {
        last->insn.lengths |= (u64)r->length << 4 * last->size;
        last->size++;
    } else {
        begin(c, r, at);
    }
    t->next = at + r->length;
    NEXT();
}

/* ... that may be repeated: a record of its own. */
OP(op_trace_repeated)
{
    tracer_iteration(c, r);
    NEXT();
}

void tracer_iteration(struct vcpu *c, const struct record *r)
{
    struct tracer *t = c->tracer;
    u64 at = code_linear(c, ip_of(c, r));
    struct core_trace_record *last = t->current;
    if (last && last + 1 == t->at && last->size == 1 && last->insn.address == at && last->code < ~0u &&
        last->insn.number + last->code == retired_at(c, r))
        last->code++;
    else
        begin(c, r, at);
    t->next = ~0ull; /* no straight run begins with it */
}

void tracer_more(struct vcpu *c, u64 n)
{
    struct core_trace_record *last = c->tracer->current;
    if (last) /* a window has less than 2^32 elements, and a pause comes after each */
        last->code += (u32)n;
}

void tracer_prologue(const struct record *r, struct record *prologue)
{
    *prologue = *r;
    prologue->has_link = false;
    prologue->run = r->prefix & (PREFIX_REP | PREFIX_REPNE) ? op_trace_repeated : op_trace;
}

/* Of the records from `first` on, keep the stores, at the instruction that runs. */
static void keep_stores(struct vcpu *c, struct core_trace_record *first)
{
    struct tracer *t = c->tracer;
    size_t kept = 0;
    for (const struct core_trace_record *r = first; r != t->at; r++)
        if (r->kind == CORE_TRACE_MEM && r->flags & CORE_TRACE_WRITE)
            first[kept++] = *r;
    t->at = first;
    if (!kept)
        return;
    memmove(first + 1, first, kept * sizeof *first); /* where the AT record or that of the instruction was, if not a load */
    *first = (struct core_trace_record){.kind = CORE_TRACE_AT};
    first->insn.number = number_now(c);
    first->insn.address = place_now(c);
    t->at = first + 1 + kept;
}

void tracer_undo(struct vcpu *c, bool fault)
{
    struct tracer *t = c->tracer;
    if (!c->now)
        return;
    u64 number = number_now(c);
    struct core_trace_record *r = t->current, *first = t->at;
    if (r && last_number(r) == number) {
        first = r + 1;
        if (r->code > 1) {
            r->code--;
        } else if (r->size > 1) {
            r->size--;
            r->insn.lengths &= ~(15ull << 4 * r->size);
        } else {
            first = r;
        }
    } else if (t->undo_number == number) {
        first = t->undo_at;
    }
    if (fault && t->at != t->records + TRACER_RECORDS)
        keep_stores(c, first);
    else
        t->at = first;
    forget(t);
}

/* ---- Memory, events ----------------------------------------------------------------------------------------------------------- */

/* What follows happens at the present instruction: unless the record before says so, one that does. */
static bool mark_place(struct vcpu *c, u64 place)
{
    struct tracer *t = c->tracer;
    u64 number = number_now(c);
    if ((t->current && c->now && last_number(t->current) == number) || (t->place_number == number && t->place == place))
        return true;
    struct core_trace_record *r = take(c);
    if (!r)
        return false;
    *r = (struct core_trace_record){.kind = CORE_TRACE_AT};
    r->insn.number = number;
    r->insn.address = place;
    t->place_number = number;
    t->place = place;
    t->current = NULL;
    return true;
}

void tracer_memory(struct vcpu *c, u64 linear, const void *data, unsigned bytes, bool write, bool implicit)
{
    struct tracer *t = c->tracer;
    u64 place = place_now(c);
    if (!in_range(t, place) || linear > t->want.data_last || linear + (bytes - 1) < t->want.data_first)
        return;
    const u8 *from = data;
    if (!mark_place(c, place))
        return;
    for (unsigned n; bytes; bytes -= n, from += n, linear += n) {
        n = bytes < 16 ? bytes : 16;
        struct core_trace_record *r = take(c);
        if (!r)
            return;
        *r = (struct core_trace_record){.kind = CORE_TRACE_MEM, .size = (u16)n};
        r->flags = (u8)((write ? CORE_TRACE_WRITE : 0) | (implicit ? CORE_TRACE_IMPLICIT : 0) |
                        (bytes > n ? CORE_TRACE_MORE : 0));
        r->mem.address = linear;
        copy_in(r->mem.value, from, n);
    }
}

void tracer_event(struct vcpu *c, enum tracer_event event, unsigned vector, bool has_error, u32 error, u64 address)
{
    struct tracer *t = c->tracer;
    bool exception = event == TRACER_EXCEPTION;
    u64 place = place_now(c);
    if (!(t->want.kinds >> (exception ? CORE_TRACE_EXCEPTION : CORE_TRACE_INTERRUPT) & 1) || !in_mode(c) ||
        !in_range(t, place))
        return;
    struct core_trace_record *r = take(c);
    if (!r)
        return;
    static const u8 flags[] = {0, 0, CORE_TRACE_NMI, CORE_TRACE_SOFTWARE};
    *r = (struct core_trace_record){.kind = exception ? CORE_TRACE_EXCEPTION : CORE_TRACE_INTERRUPT};
    r->flags = (u8)(flags[event] | (has_error ? CORE_TRACE_ERROR_CODE : 0));
    r->size = (u16)vector;
    r->code = error;
    r->insn.number = number_now(c);
    r->insn.address = place;
    r->insn.lengths = address;
    if (!c->now)
        t->current = NULL;
}

bool tracer_mode(struct vcpu *c)
{
    struct tracer *t = c->tracer;
    bool on = in_mode(c);
    t->memory = on && t->want.kinds >> CORE_TRACE_MEM & 1;
    return on && t->want.kinds >> CORE_TRACE_INSN & 1;
}

/* ---- Delivery -------------------------------------------------------------------------------------------------------------------- */

void tracer_deliver(struct vcpu *c, bool ended)
{
    struct tracer *t = c->tracer;
    if (t->dropped && t->at != t->records + TRACER_RECORDS) {
        *t->at = (struct core_trace_record){.kind = CORE_TRACE_DROPPED};
        t->at++->insn.number = t->dropped;
        t->dropped = 0;
    }
    u64 events = 0;
    for (const struct core_trace_record *r = t->records; r != t->at; r++)
        events += r->kind == CORE_TRACE_INSN ? r->size + (r->code - 1) : r->kind != CORE_TRACE_AT &&
                  r->kind != CORE_TRACE_DROPPED;
    size_t count = (size_t)(t->at - t->records);
    t->at = t->records;
    forget(t);
    t->deliver(t->argument, t->records, count, events, ended);
}

int vcpu_set_trace(struct vcpu *c, const struct core_trace *want, core_trace_deliver *deliver, void *argument)
{
    if (want && want->kinds) {
        struct tracer *t = c->tracer;
        if (!t) {
            t = malloc(sizeof *t);
            if (!t)
                return -12; /* ENOMEM */
            t->at = t->records;
            t->dropped = 0;
        }
        t->want = *want;
        t->deliver = deliver;
        t->argument = argument;
        forget(t);
        c->tracer = t;
    } else {
        free(c->tracer);
        c->tracer = NULL;
    }
    mode_changed(c);
    return 0;
}
