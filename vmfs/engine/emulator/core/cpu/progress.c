/* The states that KVM has no struct for: progress of a CPU, time and chips of a machine (core.h has their layout). Each is
 * checked whole before anything is set. */
#include <errno.h>
#include <stdlib.h>

#include "irqchip.h"
#include "memory.h"
#include "recent.h"

#define LONG_TIME (1ull << 62) /* ns: 146 years */

static size_t padded(size_t bytes) { return (bytes + 7) & ~(size_t)7; }

/* ---- Exits that wait ------------------------------------------------------------------------------------------------------- */

static void pack_exit(const struct vcpu_exit *e, bool also, size_t data, struct core_waiting *w)
{
    bool debug = e->reason == EXIT_DEBUG; /* its count is the core's own, and its access is told at once or never */
    *w = (struct core_waiting){
        .reason = (u8)e->reason, .write = !debug && e->write, .cause = (u8)e->cause, .also = also, .size = debug ? 0 : e->size,
        .count = debug ? 0 : e->count, .id = e->id, .vector = e->vector, .data = (u32)data, .rip = e->rip,
        .address = e->address,
    };
}

/* The length of the first record of `size` bytes at `at` and its data; 0: it cannot be. */
static size_t check_waiting(const u8 *at, size_t size, bool after_stop)
{
    struct core_waiting w;
    if (size < sizeof w)
        return 0;
    memcpy(&w, at, sizeof w);
    size_t length = sizeof w + padded(w.data), want = 0;
    if (length > size || w.write > 1 || w.also > 1 || (w.also && (w.reason != EXIT_DEBUG || !after_stop)))
        return 0;
    switch (w.reason) {
    case EXIT_IO:
        if (!w.write || (w.size != 1 && w.size != 2 && w.size != 4) || !w.count || w.count > EXIT_DATA || w.address > 0xffff)
            return 0;
        want = (size_t)w.size * w.count;
        break;
    case EXIT_MMIO:
        if (!w.write || !w.size || w.size > 8 || w.count != 1)
            return 0;
        want = w.size;
        break;
    case EXIT_DEBUG:
        if (w.cause > DEBUG_INTERRUPT || w.vector > 255)
            return 0;
        break;
    case EXIT_ERROR:
        if (w.data >= sizeof ((struct vcpu *)0)->waiting_message)
            return 0;
        for (const u8 *byte = at + sizeof w; byte < at + sizeof w + w.data; byte++)
            if (*byte < ' ' || *byte > '~') /* of a sentence there are no others */
                return 0;
        want = w.data;
        break;
    case EXIT_HLT: case EXIT_SHUTDOWN: case EXIT_INTERRUPTED: case EXIT_LIMIT:
        break;
    default:
        return 0;
    }
    return w.data == want && want <= EXIT_DATA ? length : 0;
}

static void forget_waiting(struct vcpu *c)
{
    free(c->waiting);
    c->waiting = NULL;
    c->waiting_at = c->waiting_size = 0;
}

bool take_waiting(struct vcpu *c, struct vcpu_exit *exit)
{
    if (likely(c->waiting_at == c->waiting_size))
        return false;
    struct vcpu_exit stops[64];
    size_t count = 0;
    stops_forget(c);
    c->reading = false;
    do {
        struct core_waiting w;
        memcpy(&w, c->waiting + c->waiting_at, sizeof w);
        const u8 *data = c->waiting + c->waiting_at + sizeof w;
        struct vcpu_exit e = {
            .reason = w.reason, .rip = w.rip, .write = w.write, .size = w.size, .count = w.count, .address = w.address,
            .cause = w.cause, .id = w.id, .vector = w.vector,
        };
        if (count && !w.also)
            break;
        if (e.reason == EXIT_ERROR) {
            memcpy(c->waiting_message, data, w.data);
            c->waiting_message[w.data] = 0;
            e.message = c->waiting_message;
        } else {
            memcpy(c->data, data, w.data);
            c->data_size = w.data;
        }
        if (!count)
            *exit = e;
        if (count < sizeof stops / sizeof *stops)
            stops[count++] = e;
        c->waiting_at += sizeof w + padded(w.data);
    } while (exit->reason == EXIT_DEBUG && c->waiting_at < c->waiting_size);
    if (exit->reason == EXIT_DEBUG)
        stops_hold(c, stops, count);
    if (c->waiting_at == c->waiting_size)
        forget_waiting(c);
    return true;
}

int add_waiting(struct vcpu *c, const struct vcpu_exit *exit)
{
    size_t data = exit->write ? c->data_size : 0, length = sizeof(struct core_waiting) + padded(data);
    u8 *more = realloc(c->waiting, c->waiting_size + length);
    struct core_waiting w;
    if (!more)
        return -ENOMEM;
    pack_exit(exit, false, data, &w);
    memset(more + c->waiting_size, 0, length);
    memcpy(more + c->waiting_size, &w, sizeof w);
    memcpy(more + c->waiting_size + sizeof w, c->data, data);
    c->waiting = more;
    c->waiting_size += length;
    return 0;
}

/* ---- Getting --------------------------------------------------------------------------------------------------------------- */

struct writer { u8 *at; size_t size; unsigned count; }; /* at: NULL, only counted */

static void put(struct writer *w, const void *data, size_t bytes, size_t room)
{
    if (w->at) {
        memset(w->at + w->size, 0, room);
        if (bytes) /* where there are none, there may be no address either: C wants one */
            memcpy(w->at + w->size, data, bytes);
    }
    w->size += room;
}

static void put_exit(struct writer *w, const struct vcpu_exit *e, bool also, const void *data, size_t bytes)
{
    struct core_waiting record;
    pack_exit(e, also, bytes, &record);
    put(w, &record, sizeof record, sizeof record);
    put(w, data, bytes, padded(bytes));
    w->count++;
}

static void put_exits(struct vcpu *c, struct writer *w)
{
    for (size_t at = c->waiting_at; at < c->waiting_size;) {
        size_t length = check_waiting(c->waiting + at, c->waiting_size - at, true);
        put(w, c->waiting + at, length, length);
        w->count++;
        at += length;
    }
    if (c->held.reason) {
        const char *message = c->held.message ? c->held.message : "";
        size_t length = strlen(message), most = sizeof c->waiting_message - 1;
        put_exit(w, &c->held, false, message, length < most ? length : most);
        for (size_t i = 1; c->held.reason == EXIT_DEBUG && i < c->reached_count; i++)
            put_exit(w, &c->reached[i], true, NULL, 0);
    }
    for (unsigned i = c->stores_reported; i < c->store_count; i++) {
        const struct mmio_access *a = &c->stores[i];
        struct vcpu_exit e = {.reason = EXIT_MMIO, .write = true, .size = a->size, .count = 1, .address = a->address,
                              .rip = c->stores_rip};
        put_exit(w, &e, false, &a->data, a->size);
    }
}

static void describe(struct vcpu *c, struct core_progress *p)
{
    u64 done = instructions_done(c);
    bool half_done = c->restart && (c->reading || c->input_ready);
    *p = (struct core_progress){
        .version = CORE_PROGRESS_VERSION,
        .instructions = done, .interrupts = c->counters.interrupts, .exceptions = c->counters.exceptions,
        .flags = CORE_EXACT | (c->restart ? CORE_RESTART : 0) | (c->pass_breakpoint ? CORE_PASS : 0) |
                 (c->resume_breakpoint ? CORE_RESUME : 0) | (c->repeating ? CORE_REPEATING : 0) |
                 (c->asleep ? CORE_ASLEEP : 0) | (c->injected.exception ? CORE_INJECTED : 0),
        .debug_hits = c->debug_hits, .debug_pending = c->debug_pending, .dr6 = c->dr6,
        .timer_left = IRQCHIP_NEVER, .sipi = c->sipi_vector, .fcs = c->fcs, .fds = c->fds,
    };
    memcpy(p->pdptr, c->pdptr, sizeof p->pdptr);
    if (half_done) {
        p->kind = c->reading && c->reading_memory ? CORE_READ_MEMORY : CORE_READ_PORT;
        p->flags |= c->reading ? 0 : CORE_FED;
        p->address = c->asked.address;
        p->element = c->asked.size;
        p->data = c->reading ? (u32)c->data_size : c->input_size - c->input_at;
        p->count = p->data / p->element;
        p->reads = c->reads;
    }
    if (c->caught_at == done + 1) {
        p->flags |= CORE_CAUGHT;
        memcpy(p->caught, c->caught, sizeof p->caught);
    }
    if (c->asleep)
        p->slept = vm_time(c->vm) - c->asleep_since;
    if (c->vm->irqchip) {
        struct irqchip_lapic_rest rest;
        irqchip_get_lapic_rest(c->vm->irqchip, c->index, &rest, vm_time(c->vm));
        p->timer_left = rest.timer_left, p->apic_errors = rest.errors, p->apic_events = rest.events;
        p->apic_sipi = rest.sipi_vector;
    }
    p->msrs = c->unclaimed_msr_count;
    p->vectors = vcpu_interrupts_queued(c);
}

long get_progress(struct vcpu *c, void *data, size_t size)
{
    struct core_progress p;
    u8 vectors[INTERRUPT_QUEUE];
    describe(c, &p);
    struct writer w = {NULL, 0, 0};
    put_exits(c, &w);
    p.exits = w.count;
    p.size = (u32)(sizeof p + p.reads * sizeof(struct core_read) + w.size + p.msrs * sizeof(struct vcpu_unclaimed_msr) + p.vectors +
                   p.data);
    if (size < p.size)
        return p.size;
    w = (struct writer){data, 0, 0};
    put(&w, &p, sizeof p, sizeof p);
    for (unsigned i = 0; i < p.reads; i++) {
        struct core_read r = {c->done_reads[i].address, c->done_reads[i].data, c->done_reads[i].size, 0};
        put(&w, &r, sizeof r, sizeof r);
    }
    put_exits(c, &w);
    for (unsigned i = 0; i < p.msrs; i++) {
        struct vcpu_unclaimed_msr m; /* without what is between its fields */
        memset(&m, 0, sizeof m);
        m.index = c->unclaimed_msrs[i].index, m.reads = c->unclaimed_msrs[i].reads;
        m.writes = c->unclaimed_msrs[i].writes, m.rip = c->unclaimed_msrs[i].rip;
        put(&w, &m, sizeof m, sizeof m);
    }
    vcpu_queued_vectors(c, vectors);
    put(&w, vectors, p.vectors, p.vectors);
    put(&w, c->data + (p.flags & CORE_FED ? c->input_at : 0), p.data, p.data);
    return p.size;
}

/* ---- Setting --------------------------------------------------------------------------------------------------------------- */

struct parts { const u8 *reads, *exits, *msrs, *vectors, *data; size_t exits_size; };

static bool header_is_valid(const struct vcpu *c, const struct core_progress *p)
{
    const u32 known = CORE_EXACT | CORE_RESTART | CORE_FED | CORE_PASS | CORE_RESUME | CORE_REPEATING | CORE_CAUGHT | CORE_ASLEEP |
                      CORE_INJECTED;
    const struct irqchip_lapic_rest rest = {p->timer_left, p->apic_errors, p->apic_events, p->apic_sipi, 0};
    if (p->flags & ~known || p->reserved || p->reserved64 || p->reserved8 || p->reserved32 || p->kind > CORE_READ_MEMORY ||
        p->reads > MMIO_PIECES || p->exits > CORE_WAITING_MOST || p->msrs > UNCLAIMED_MSRS || p->vectors > INTERRUPT_QUEUE ||
        p->data > EXIT_DATA || p->slept > LONG_TIME || (p->vectors && c->vm->irqchip))
        return false;
    if (p->debug_hits & ~15ull || p->debug_pending & ~(u64)(15 | DR6_BS | DR6_BT) || p->dr6 >> 32 || !irqchip_lapic_rest_is_valid(&rest))
        return false;
    for (unsigned i = 0; i < 4; i++)
        if (p->pdptr[i] & 1 && p->pdptr[i] >> c->physical_bits)
            return false;
    switch (p->kind) {
    case CORE_READ_NONE:
        return !(p->address || p->element || p->count || p->data || p->reads || p->flags & CORE_FED);
    case CORE_READ_PORT:
        if ((p->element != 1 && p->element != 2 && p->element != 4) || p->address > 0xffff)
            return false;
        break;
    default:
        if (!p->element || p->element > 8 || p->count != 1 || p->flags & CORE_FED)
            return false;
    }
    return p->flags & CORE_RESTART && p->count && p->count <= EXIT_DATA && (u64)p->element * p->count == p->data;
}

static bool find_parts(const struct core_progress *p, const u8 *data, size_t size, struct parts *parts)
{
    size_t at = sizeof *p + (size_t)p->reads * sizeof(struct core_read);
    size_t after = (size_t)p->msrs * sizeof(struct vcpu_unclaimed_msr) + p->vectors + p->data;
    if (at > size)
        return false;
    parts->reads = data + sizeof *p;
    parts->exits = data + at;
    for (u32 i = 0; i < p->reads; i++) {
        struct core_read r;
        memcpy(&r, parts->reads + i * sizeof r, sizeof r);
        if (!r.size || r.size > 8 || r.reserved || (r.size < 8 && r.value >> 8 * r.size))
            return false;
    }
    bool after_stop = false;
    for (u32 i = 0; i < p->exits; i++) {
        size_t length = check_waiting(data + at, size - at, after_stop);
        if (!length)
            return false;
        after_stop = data[at] == EXIT_DEBUG;
        at += length;
    }
    parts->exits_size = (size_t)(data + at - parts->exits);
    if (size - at != after || parts->exits_size > CORE_PROGRESS_DATA)
        return false;
    parts->msrs = data + at;
    parts->vectors = parts->msrs + (size_t)p->msrs * sizeof(struct vcpu_unclaimed_msr);
    parts->data = parts->vectors + p->vectors;
    return true;
}

static void set_exact(struct vcpu *c, const struct core_progress *p)
{
    c->debug_hits = p->debug_hits;
    c->debug_pending = p->debug_pending;
    c->dr6 = p->dr6;
    c->injected.exception = p->flags & CORE_INJECTED;
    memcpy(c->pdptr, p->pdptr, sizeof c->pdptr);
    c->sipi_vector = p->sipi;
    c->fcs = p->fcs, c->fds = p->fds;
    if (c->vm->irqchip)
        irqchip_set_lapic_rest(c->vm->irqchip, c->index,
                               &(struct irqchip_lapic_rest){p->timer_left, p->apic_errors, p->apic_events, p->apic_sipi, 0},
                               vm_time(c->vm));
    tlb_flush(c);
}

int set_progress(struct vcpu *c, const void *data, size_t size)
{
    struct core_progress p;
    struct parts parts;
    if (size < sizeof p)
        return -EINVAL;
    memcpy(&p, data, sizeof p);
    if (p.version != CORE_PROGRESS_VERSION || p.size != size || !header_is_valid(c, &p) || !find_parts(&p, data, size, &parts))
        return -EINVAL;
    u8 *waiting = parts.exits_size ? malloc(parts.exits_size) : NULL;
    if (parts.exits_size && !waiting)
        return -ENOMEM;
    forget_waiting(c);
    if (waiting)
        memcpy(waiting, parts.exits, parts.exits_size);
    c->waiting = waiting;
    c->waiting_size = parts.exits_size;
    c->held.reason = EXIT_NONE;
    c->store_count = c->stores_reported = 0;
    stops_forget(c);
    c->reads_used = 0;
    c->reads = p.reads;
    for (u32 i = 0; i < p.reads; i++) {
        struct core_read r;
        memcpy(&r, parts.reads + i * sizeof r, sizeof r);
        c->done_reads[i] = (struct mmio_access){r.address, r.size, false, r.value};
    }
    memcpy(c->unclaimed_msrs, parts.msrs, p.msrs * sizeof *c->unclaimed_msrs);
    c->unclaimed_msr_count = p.msrs;
    memcpy(c->queue, parts.vectors, p.vectors);
    atomic_store(&c->queue_head, 0);
    atomic_store(&c->queue_tail, p.vectors);
    memcpy(c->data, parts.data, p.data);
    c->restart = p.flags & CORE_RESTART;
    c->reading = p.kind && !(p.flags & CORE_FED);
    c->reading_memory = p.kind == CORE_READ_MEMORY;
    c->data_size = c->reading ? p.data : 0;
    c->asked = (struct mmio_access){p.address, p.element, false, 0};
    c->input_ready = p.flags & CORE_FED;
    c->input_at = 0;
    c->input_size = c->input_ready ? p.data : 0;
    c->pass_breakpoint = p.flags & CORE_PASS;
    c->resume_breakpoint = p.flags & CORE_RESUME;
    c->repeating = p.flags & CORE_REPEATING;
    c->completing = false;
    recent_forget_places(c);
    c->retired = p.instructions;
    c->slice = c->budget = c->saved_budget = 0;
    c->skew = vm_time(c->vm) - c->retired;
    c->yielded_at = c->polled_at = c->retired;
    c->counters.interrupts = p.interrupts;
    c->counters.exceptions = p.exceptions;
    c->event_at = 0;
    c->caught_at = p.flags & CORE_CAUGHT ? c->retired + 1 : 0;
    memcpy(c->caught, p.caught, sizeof c->caught);
    c->asleep = p.flags & CORE_ASLEEP;
    c->asleep_since = vm_time(c->vm) - p.slept;
    c->asleep_since_host = host_clock();
    if (p.flags & CORE_EXACT)
        set_exact(c, &p);
    return 0;
}

/* ---- Of a machine ------------------------------------------------------------------------------------------------------------ */

long get_time(struct vm *vm, void *data, size_t size)
{
    struct core_time_state t = {CORE_TIME_VERSION, sizeof t, 0, 0, vm_time(vm), 0, vm->lag, atomic_load(&vm->deadline)};
    t.flags = vm->time == TIME_HOST ? CORE_TIME_HOST : 0;
    t.clock = t.now + (u64)vm->clock_offset;
    if (size >= sizeof t)
        memcpy(data, &t, sizeof t);
    return sizeof t;
}

int set_time(struct vm *vm, const void *data, size_t size)
{
    struct core_time_state t;
    if (size != sizeof t)
        return -EINVAL;
    memcpy(&t, data, sizeof t);
    if (t.version != CORE_TIME_VERSION || t.size != sizeof t || t.flags & ~(u32)CORE_TIME_HOST || t.reserved ||
        t.now > LONG_TIME || t.clock > LONG_TIME || t.lag > LONG_TIME)
        return -EINVAL;
    u64 before = vm_time(vm);
    vm->time = t.flags & CORE_TIME_HOST ? TIME_HOST : TIME_DETERMINISTIC;
    vm->now = t.now;
    vm->host_origin = vm_clock(vm) - t.now;
    vm->lag = t.lag;
    vm->clock_offset = (i64)(t.clock - t.now);
    atomic_store(&vm->deadline, t.deadline);
    if (vm->irqchip)
        irqchip_move_time(vm->irqchip, before, t.now);
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i]) {
            struct vcpu *c = vm->vcpus[i];
            c->skew = t.now - instructions_done(c);
            c->asleep_since += t.now - before;
            set_tsc_offset(c, c->tsc_offset - (t.now - before));
        }
    return 0;
}

struct chips_state { u32 version, size, flags, reserved; struct irqchip_rest rest; };

long get_chips(struct vm *vm, void *data, size_t size)
{
    struct chips_state s = {.version = CORE_CHIPS_VERSION, .size = sizeof s, .flags = vm->a20_mask == ~0ull ? 0 : CORE_CHIPS_A20_OFF};
    if (vm->irqchip) {
        chip_apply_lines(vm);
        irqchip_get_rest(vm->irqchip, &s.rest, vm_time(vm));
    }
    if (size >= sizeof s)
        memcpy(data, &s, sizeof s);
    return sizeof s;
}

int set_chips_rest(struct vm *vm, const void *data, size_t size)
{
    static const struct irqchip_rest nothing;
    struct chips_state s;
    if (size != sizeof s)
        return -EINVAL;
    memcpy(&s, data, sizeof s);
    if (s.version != CORE_CHIPS_VERSION || s.size != sizeof s || s.flags & ~(u32)CORE_CHIPS_A20_OFF || s.reserved)
        return -EINVAL;
    if (!vm->irqchip && memcmp(&s.rest, &nothing, sizeof nothing))
        return -EINVAL;
    if (vm->irqchip) {
        chip_apply_lines(vm);
        int error = irqchip_set_rest(vm->irqchip, &s.rest, vm_time(vm));
        if (error)
            return error;
    }
    vm_set_a20(vm, !(s.flags & CORE_CHIPS_A20_OFF));
    return 0;
}
