/* Tracing for a client: what the CPU executes, reads, writes and delivers, as records (core.h).
 *
 * It costs nothing while it is off. Instructions: in a mode that is traced, the fetch key has KEY_TRACED, and before each
 * record of a decoded instruction stands a copy of it with the handler `op_trace`. Memory: the inline paths look into a TLB
 * that is always empty, so that every access comes to mmu_read and mmu_write, which translate by the real one (`c->map`).
 *
 * A record stands for what was done. A handler that escapes has done nothing, and what was written of it is taken back
 * (tracer_undo). Where it escapes with a fault, stores that were done stay (ENTER, an INT n that could not be delivered). */
#ifndef VMFS_TRACER_H
#define VMFS_TRACER_H

#include "state.h"

/* TRACER_RESERVE: what may come until the main loop is reached, where records are delivered: a block of 32 instructions,
 * each with at most some 200 records (XSAVE: 2700 bytes in pieces of 16). */
enum { TRACER_RECORDS = 32768, TRACER_RESERVE = 8192 };

struct tracer {
    struct core_trace want;
    core_trace_deliver *deliver;
    void *argument;
    struct core_trace_record *at;      /* the next one */
    struct core_trace_record *current; /* holds the instruction that runs, as its last one; or NULL */
    u64 next;                 /* the linear address after that */
    u64 place_number, place;  /* of the last AT record; place_number ~0: none */
    u64 undo_number;          /* the instruction that wrote what begins at undo_at; ~0: none */
    struct core_trace_record *undo_at;
    u64 dropped;
    bool memory;              /* accesses are traced in the present mode */
    struct core_trace_record records[TRACER_RECORDS];
};

/* Decoding: the record that goes before `r`. */
void tracer_prologue(const struct record *r, struct record *prologue);
/* mode_changed: sets `memory`; whether instructions are traced now. */
bool tracer_mode(struct vcpu *c);
/* An access is done. */
void tracer_memory(struct vcpu *c, u64 linear, const void *data, unsigned bytes, bool write, bool implicit);
/* An exception or interrupt is about to be delivered, with the instruction pointer in gpr[GPR_IP] or, where c->now is set,
 * that of an INT n. */
enum tracer_event { TRACER_EXCEPTION, TRACER_EXTERNAL, TRACER_NMI, TRACER_SOFTWARE };
COLD void tracer_event(struct vcpu *c, enum tracer_event event, unsigned vector, bool has_error, u32 error, u64 address);
/* The instruction at c->now escaped. */
COLD void tracer_undo(struct vcpu *c, bool fault);
/* Repeated string instructions: another iteration begins; `n` more iterations were done at once. */
void tracer_iteration(struct vcpu *c, const struct record *r);
void tracer_more(struct vcpu *c, u64 n);
/* Hand over what there is; at an instruction boundary, with the host's floating-point state (x87_release, mxcsr_leave). */
void tracer_deliver(struct vcpu *c, bool ended);
ALWAYS_INLINE bool tracer_has(const struct vcpu *c)
{
    return c->tracer && (c->tracer->at != c->tracer->records || c->tracer->dropped);
}

#endif
