/* The main loop: blocks, single instructions, events, exits. */
#include "cache.h"
#include "flags.h"
#include "memory.h"
#include "recent.h"
#include "sse.h"
#include "tracer.h"
#include "translate.h"
#include "x87.h"

#include <time.h>

/* Instructions between two looks at timers and waiting CPUs; the same where other CPUs execute at the same time, who may want
 * that this one stands; at the host. */
enum { SLICE = 1 << 16, SLICE_SHARED = 1 << 13, POLL = 1 << 20 };


void vcpu_kick(struct vcpu *c) { request_attention(c, ATTENTION_KICK); }
void vcpu_clear_kick(struct vcpu *c) { atomic_fetch_and(&c->attention, ~(u32)ATTENTION_KICK); }

int vcpu_interrupt(struct vcpu *c, uint8_t vector)
{
    u32 tail = atomic_load(&c->queue_tail);
    if (tail - atomic_load(&c->queue_head) >= INTERRUPT_QUEUE)
        return -11; /* EAGAIN */
    c->queue[tail % INTERRUPT_QUEUE] = vector;
    atomic_store(&c->queue_tail, tail + 1);
    request_attention(c, ATTENTION_INTERRUPT);
    return 0;
}
unsigned vcpu_interrupts_queued(struct vcpu *c) { return atomic_load(&c->queue_tail) - atomic_load(&c->queue_head); }

unsigned vcpu_queued_vectors(struct vcpu *c, uint8_t vectors[INTERRUPT_QUEUE])
{
    u32 head = atomic_load(&c->queue_head), tail = atomic_load(&c->queue_tail);
    for (u32 i = head; i != tail; i++)
        vectors[i - head] = c->queue[i % INTERRUPT_QUEUE];
    return tail - head;
}

void vcpu_nmi(struct vcpu *c) { request_attention(c, ATTENTION_NMI); }

uint8_t *vcpu_exit_data(struct vcpu *c, size_t *size)
{
    *size = c->data_size;
    return c->data;
}

bool vcpu_exits_waiting(struct vcpu *c)
{
    return c->waiting_at < c->waiting_size || c->held.reason || c->stores_reported < c->store_count;
}
bool vcpu_took_event(const struct vcpu *c) { return c->event_at == instructions_done(c) + 1; }
bool vcpu_reading(struct vcpu *c) { return c->reading && c->restart; }

void vcpu_set_poll(struct vcpu *c, bool (*poll)(void *), void *argument)
{
    c->poll = poll;
    c->poll_argument = argument;
}

void vcpu_get_counters(struct vcpu *c, struct vcpu_counters *counters)
{
    *counters = c->counters;
    counters->instructions = c->retired + (u64)(c->slice - c->budget);
}

/* ---- Time ------------------------------------------------------------------------------------------------------------------- */

/* In TSC cycles at 1 GHz, so in nanoseconds. */
u64 core_now(struct vcpu *c, const struct record *r)
{
    if (c->vm->time == TIME_HOST)
        return time_of_host(c);
    return (r ? retired_at(c, r) : c->retired + (u64)(c->slice - c->budget)) + c->skew;
}

/* ---- Slices: exact instruction counts --------------------------------------------------------------------------------------- */

static void end_slice(struct vcpu *c)
{
    i64 done = c->slice - c->budget;
    note_stand(c);
    c->retired += (u64)done;
    if (c->run_limited)
        c->run_budget -= done;
    c->slice = c->budget = 0;
}

static void begin_slice(struct vcpu *c)
{
    i64 slice = c->vm->parallel ? SLICE_SHARED : SLICE;
    if (c->run_limited && c->run_budget < slice)
        slice = c->run_budget;
    slice = chip_room(c, slice);
    c->slice = c->budget = slice;
}

/* After a handler escaped: the instruction was not executed. */
static void undo(struct vcpu *c)
{
    if (c->now) {
        c->gpr[GPR_IP] = ip_mask(c, c->gpr[GPR_IP] + c->now->at);
        c->budget += c->now->left + 1;
        c->now = NULL;
    }
}

static void end_alone(struct vcpu *c)
{
    if (!c->alone)
        return;
    c->alone = false;
    c->slice += c->saved_budget;
    c->budget += c->saved_budget;
    c->saved_budget = 0;
    c->reads = c->reads_used = 0;
    c->input_ready = false;
}

/* One instruction outside of the cache. With budget 0, no jump can enter a block. */
static void run_alone(struct vcpu *c)
{
    c->restart = false;
    c->alone = true;
    c->saved_budget = c->budget - 1;
    c->slice -= c->saved_budget;
    c->budget = 1;
    stops_forget(c);
    c->trap_taken = false;
    c->reads_used = 0;
    c->store_count = c->stores_reported = 0;
    decode_alone(c, c->single); /* may escape: budget 1 is the instruction that did not run */
    c->budget = 0;
    run_records(c, c->single[0].run, c->single);
    c->now = NULL;
    end_alone(c);
    if (unlikely(c->input_at < c->input_size && c->repeating))
        c->restart = c->input_ready = true; /* an INS: the next iteration has its bytes already */
    else
        c->input_at = c->input_size = 0;
}

/* ---- Exits ----------------------------------------------------------------------------------------------------------------------- */

static void debug_exit(struct vcpu *c, enum debug_cause cause)
{
    c->exit = (struct vcpu_exit){.reason = EXIT_DEBUG, .cause = cause};
}

/* Stores that are done and not yet reported, with rip as it was after their instruction. */
static bool report_store(struct vcpu *c)
{
    if (c->stores_reported >= c->store_count)
        return false;
    const struct mmio_access *a = &c->stores[c->stores_reported++];
    c->exit = (struct vcpu_exit){.reason = EXIT_MMIO, .write = true, .size = a->size, .count = 1, .address = a->address};
    c->exit.rip = c->stores_rip;
    memcpy(c->data, &a->data, a->size);
    c->data_size = a->size;
    return true;
}

/* The handlers of OUT and IN: the exit for an access that no device of the core claims. An OUT is done: leave after it.
 * An IN escapes and restarts, when c->input_ready says that c->data has its bytes. */
void leave_io_exit(struct vcpu *c, const struct record *r, bool write, u16 port, unsigned size, u32 count)
{
    c->exit = (struct vcpu_exit){.reason = EXIT_IO, .write = write, .size = size, .count = count, .address = port};
    c->data_size = (size_t)size * count;
    if (!write) {
        memset(c->data, 0xff, c->data_size);
        c->now = r;
        escape(c, ESCAPE_EXIT);
    }
}

/* ---- Events ------------------------------------------------------------------------------------------------------------------------- */

/* Between two instructions: any code of the host may run, which finds its own x87 and MXCSR, and may have to wait. */
static void leave_to_host(struct vcpu *c)
{
    x87_release(c);
    mxcsr_leave(c, MXCSR_RESET);
    if (atomic_load_explicit(&c->world, memory_order_relaxed) == WORLD_IN)
        world_leave(c);
}
static void come_from_host(struct vcpu *c)
{
    if (runs_parallel(c->vm))
        world_enter(c);
    mxcsr_enter(c);
}

/* Hand over the trace. */
static void deliver_trace(struct vcpu *c)
{
    if (!tracer_has(c))
        return;
    leave_to_host(c);
    tracer_deliver(c, false);
    come_from_host(c);
}

/* True if the run is to end. */
static bool look_around(struct vcpu *c)
{
    u32 bits = atomic_load(&c->attention);
    if (bits & ATTENTION_STAND) {
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_STAND);
        world_stand(c);
    }
    if (bits & ATTENTION_FLUSH) {
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_FLUSH);
        tlb_flush_writes(c, true); /* it may have written between the fetch of the log and now */
    }
    if (bits & ATTENTION_NMI) {
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_NMI);
        c->nmi_pending = true;
    }
    if (bits & ATTENTION_LINES) {
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_LINES);
        chip_apply_lines(c->vm);
        chip_notify(c);
    }
    if (bits & ATTENTION_WRITTEN) {
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_WRITTEN);
        cache_forget_written(c);
    }
    if (bits & ATTENTION_SHARE) {
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_SHARE);
        translator_share(c);
    }
    if (bits & ATTENTION_TRACE) {
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_TRACE);
        deliver_trace(c);
    }
    if (bits & ATTENTION_INTERRUPT)
        atomic_fetch_and(&c->attention, ~(u32)ATTENTION_INTERRUPT);
    return bits & ATTENTION_KICK && !c->completing; /* a pending read completes first */
}

/* Whether an event ends HLT (the shadows are over by then). */
bool can_wake(struct vcpu *c)
{
    return c->debug_pending || c->injected.exception || c->injected.interrupt || c->injected.nmi ||
           (c->nmi_pending && !c->nmi_masked) || (c->rflags & FLAG_IF && pending_vector(c) >= 0);
}

/* Whether it executes nothing and never will, whatever happens in the machine. */
static bool sleeps_for_good(struct vcpu *c)
{
    if (likely(!c->halted && c->mp_state == KVM_MP_STATE_RUNNABLE) || c->restart || (c->halted && can_wake(c))) {
        atomic_store_explicit(&c->deaf, false, memory_order_relaxed);
        return false;
    }
    return !c->vm->irqchip || chip_leaves_it_asleep(c);
}

/* What was being delivered when its state was taken from another machine. */
static bool take_injected(struct vcpu *c)
{
    if (c->injected.exception) {
        c->injected.exception = false;
        c->fault = (struct fault){c->injected.vector, c->injected.has_error, c->injected.error, c->cr2};
        deliver(c, c->injected.vector, EVENT_EXCEPTION, c->injected.has_error && c->cr0 & CR0_PE, c->injected.error);
    } else if (c->injected.interrupt) {
        c->injected.interrupt = false;
        deliver(c, c->injected.interrupt_vector, c->injected.soft ? EVENT_SOFTWARE : EVENT_EXTERNAL, false, 0);
    } else if (c->injected.nmi) {
        c->injected.nmi = false;
        c->nmi_masked = true;
        deliver(c, VECTOR_NMI, EVENT_EXTERNAL, false, 0);
    } else {
        return false;
    }
    return true;
}

/* True if an event was delivered, or caught. `held`: none that comes from outside. */
static bool take_event(struct vcpu *c, bool held)
{
    if (take_injected(c))
        return true;
    if (c->debug_pending && !c->shadow_ss) { /* traps of the instruction before: single step, data breakpoints (6.9 class 4) */
        if (catches(c, VECTOR_DB, false, instructions_done(c)))
            return true;
        debug_status(c, c->debug_pending);
        c->debug_pending = 0;
        c->fault = (struct fault){.vector = VECTOR_DB};
        deliver(c, VECTOR_DB, EVENT_EXCEPTION, false, 0);
        return true;
    }
    if (held)
        return false;
    if (c->nmi_pending && !c->nmi_masked && !c->shadow_ss) {
        if (catches(c, VECTOR_NMI, true, instructions_done(c)))
            return true;
        c->nmi_pending = false;
        c->nmi_masked = true;
        deliver(c, VECTOR_NMI, EVENT_EXTERNAL, false, 0);
        return true;
    }
    if (c->rflags & FLAG_IF && !c->shadow_sti && !c->shadow_ss) {
        int vector = pending_vector(c);
        if (vector >= 0) {
            if (catches(c, (unsigned)vector, true, instructions_done(c)))
                return true;
            vector = acknowledge(c);
            if (vector < 0) /* another CPU has taken the 8259's */
                return false;
            c->counters.interrupts++;
            deliver(c, (unsigned)vector, EVENT_EXTERNAL, false, 0);
            return true;
        }
    }
    return false;
}

static void shutdown(struct vcpu *c)
{
    c->delivering = -1;
    c->exit = (struct vcpu_exit){.reason = EXIT_SHUTDOWN};
}

/* Whether the fault that was raised is caught. One in the delivery of an event stops with the event not delivered: the next
 * run begins with it, and raises the fault again. */
static bool catches_fault(struct vcpu *c)
{
    struct fault f;
    if (!fault_to_deliver(c, &f) || !catches(c, f.vector, false, instructions_done(c)))
        return false;
    unsigned outer = (unsigned)c->delivering;
    if (c->delivering >= 0 && c->delivering_kind == EVENT_EXCEPTION) {
        c->injected.exception = true;
        c->injected.vector = (u8)outer;
        c->injected.has_error = c->delivering_has_error;
        c->injected.error = c->delivering_error;
    } else if (c->delivering >= 0 && c->delivering_kind == EVENT_EXTERNAL) {
        c->injected.nmi = outer == VECTOR_NMI;
        c->injected.interrupt = outer != VECTOR_NMI;
        c->injected.interrupt_vector = (u8)outer;
        c->injected.soft = false;
    }
    c->delivering = -1;
    return true;
}

/* The instruction is not done, and stands where it stood: after STI or a load of SS. */
static void begin_again(struct vcpu *c)
{
    c->shadow_sti |= c->began_sti;
    c->shadow_ss |= c->began_ss;
    c->began_sti = c->began_ss = false;
}

/* Whether the instruction at rip has a breakpoint, the host's or the guest's. */
static bool has_breakpoint(const struct vcpu *c)
{
    return (has_stops(c, STOP_BREAKPOINT) || c->dr7 & 0xff) && is_breakpoint(c, code_linear(c, c->gpr[GPR_IP]));
}

static void at_breakpoint(struct vcpu *c)
{
    u64 linear = code_linear(c, c->gpr[GPR_IP]);
    c->at_breakpoint = false;
    if (!c->resume_breakpoint && stops_reach_break(c, linear)) {
        c->resume_breakpoint = true;
        return;
    }
    if (!(c->rflags & FLAG_RF) && !c->shadow_ss) {
        u64 hits = 0;
        for (unsigned i = 0; i < 4; i++)
            if (c->dr7 >> (2 * i) & 3 && !(c->dr7 >> (16 + 4 * i) & 15) && c->dr[i] == linear)
                hits |= 1ull << i;
        if (hits) { /* a fault: before the instruction */
            debug_status(c, hits);
            c->fault = (struct fault){.vector = VECTOR_DB};
            escape(c, ESCAPE_FAULT);
        }
    }
    c->pass_breakpoint = true;
}

static void after_escape(struct vcpu *c, enum escape how)
{
    if (c->has_world)
        world_go(c);
    if (c->tracer)
        tracer_undo(c, how == ESCAPE_FAULT);
    if (c->now)
        note_last(c, c->now, false);
    undo(c);
    note_stand(c);
    if (c->translated)
        end_translated(c, instructions_done(c));
    bool fetching = c->fetching;
    c->fetching = false;
    switch (how) {
    case ESCAPE_FAULT:
        if (fetching && !c->alone && has_breakpoint(c)) { /* which comes before the faults of its fetch (3A table 6-2) */
            at_breakpoint(c);
            return;
        }
        end_alone(c);
        c->store_count = 0;
        c->debug_hits = 0;
        stops_forget(c);
        if (has_stops(c, STOP_VECTOR) && catches_fault(c)) {
            begin_again(c);
            return;
        }
        c->shadow_sti = c->shadow_ss = c->began_sti = c->began_ss = false;
        c->debug_pending = 0; /* a trap that waited after a load of SS: any fault drops it */
        if (!deliver_fault(c)) {
            shutdown(c);
            return;
        }
        stops_finish(c);
        if (c->step && c->exit.reason == EXIT_NONE)
            debug_exit(c, DEBUG_STEP);
        break;
    case ESCAPE_ALONE:
        stops_forget(c);
        c->delivering = -1; /* an INT n */
        c->restart = true;
        break;
    case ESCAPE_EXIT:
        if (c->exit.reason != EXIT_DEBUG)
            stops_forget(c);
        c->reading = c->exit.reason == EXIT_MMIO || c->exit.reason == EXIT_IO;
        if (c->alone) { /* what was read so far is kept for the restart */
            unsigned reads = c->reads;
            end_alone(c);
            c->reads = c->reading ? reads : 0;
        }
        c->delivering = -1;
        c->restart = c->reading;
        begin_again(c);
        break;
    case ESCAPE_FREEZE:
        end_alone(c);
        c->began_sti = c->began_ss = false;
        c->halted = true;
        break;
    }
}

/* After an instruction that ran alone. `tf`: EFLAGS.TF was set before it. */
static void after_alone(struct vcpu *c, bool tf)
{
    c->stores_rip = c->gpr[GPR_IP];
    if (c->debug_hits) {
        c->debug_pending |= c->debug_hits;
        c->debug_hits = 0;
    }
    if (tf && !c->trap_taken)
        c->debug_pending |= DR6_BS;
    if (c->exit.reason == EXIT_NONE)
        report_store(c);
    if (has_stops(c, STOP_MODE))
        stops_reach_mode(c);
    stops_finish(c);
}

/* Ask the host whether to go on (vcpu_set_poll). */
static bool host_polls(struct vcpu *c)
{
    c->polled_at = c->retired;
    if (!c->poll || c->completing)
        return false;
    leave_to_host(c);
    bool ends = c->poll(c->poll_argument);
    come_from_host(c);
    if (!ends)
        return false;
    c->exit = (struct vcpu_exit){.reason = EXIT_INTERRUPTED};
    return true;
}

/* Whether the instruction at `start`, which ran alone, jumped: IA32_DEBUGCTL.BTF traps only those (3B 17.4.3). */
static bool branched(const struct vcpu *c, u64 start)
{
    return !c->repeating && c->gpr[GPR_IP] != ip_mask(c, start + c->single[0].length);
}

/* One round of the main loop: an event, or a chain of blocks, or one instruction. */
static void turn(struct vcpu *c)
{
    if (report_store(c))
        return;
    bool kicked = false;
    if (c->vm->parallel) /* what serialises an instruction stream ends its block: its stores are seen before (3A 9.3) */
        atomic_thread_fence(memory_order_seq_cst);
    if (unlikely(atomic_load_explicit(&c->attention, memory_order_relaxed)))
        kicked = look_around(c);
    end_slice(c);
    if (sleeps_for_good(c)) {
        c->exit = (struct vcpu_exit){.reason = EXIT_HLT};
        return;
    }
    if (kicked) {
        vcpu_clear_kick(c);
        c->exit = (struct vcpu_exit){.reason = EXIT_INTERRUPTED};
        return;
    }
    if (unlikely(c->turn_over)) { /* a PAUSE of vm_run */
        c->exit = (struct vcpu_exit){.reason = EXIT_LIMIT};
        return;
    }
    if (c->retired - c->yielded_at >= SLICE) {
        c->yielded_at = c->retired;
        if (!runs_parallel(c->vm)) {
            clock_leave(c);
            vm_yield(c->vm);
            clock_enter(c);
        }
        deliver_trace(c);
        if (c->retired - c->polled_at >= POLL && host_polls(c))
            return;
    }
    if (c->run_limited && c->run_budget <= 0) {
        c->exit = (struct vcpu_exit){.reason = EXIT_LIMIT};
        return;
    }
    if (!c->completing && (deadline_came(c) || soon_came(c))) {
        c->exit = (struct vcpu_exit){.reason = EXIT_INTERRUPTED};
        return;
    }
    if (c->vm->irqchip)
        chip_look(c);
    if (!c->restart) { /* an instruction that is half done comes before any event */
        /* A run that begins at a breakpoint executes the instruction there, and an interrupt would come back to it. Where all is to be
         * done again without breakpoints, it comes all the same. */
        bool held = c->resume_breakpoint && !c->vm->repeatable && !c->halted && has_stops(c, STOP_BREAKPOINT) &&
                    stops_break(c, code_linear(c, c->gpr[GPR_IP]));
        if (c->mp_state == KVM_MP_STATE_RUNNABLE && take_event(c, held)) {
            c->resume_breakpoint = c->pass_breakpoint = false;
            if (c->exit.reason == EXIT_NONE)
                stops_finish(c);
            if (c->step && c->exit.reason == EXIT_NONE)
                debug_exit(c, DEBUG_STEP);
            return;
        }
        if (c->halted || c->mp_state != KVM_MP_STATE_RUNNABLE) { /* HLT, or waiting for INIT or SIPI */
            deliver_trace(c);
            c->turn_over = c->vm->in_turn && others_execute(c);
            if (!c->turn_over && chip_wait(c))
                host_polls(c);
            else
                c->exit = (struct vcpu_exit){.reason = EXIT_LIMIT};
            return;
        }
    }
    c->asleep = false;
    if (c->repeating) { /* to go on is not to arrive at a breakpoint */
        c->repeating = false;
        c->pass_breakpoint |= has_breakpoint(c);
    }
    begin_slice(c);
    bool tf = c->rflags & FLAG_TF;
    bool alone = tf || c->shadow_sti || c->shadow_ss || c->step || c->rflags & FLAG_RF;
    if ((alone || c->resume_breakpoint) && !c->restart && !c->pass_breakpoint && has_breakpoint(c)) {
        at_breakpoint(c); /* stops, or lets it pass */
        return;
    }
    struct block *t = NULL;
    if (!(alone || c->restart || c->pass_breakpoint || c->resume_breakpoint)) {
        t = cache_lookup(c);
        alone = t->count > c->budget;
    } else {
        alone = true;
    }
    if (alone) {
        c->pass_breakpoint = c->resume_breakpoint = c->reading = c->completing = false;
        c->began_sti = c->shadow_sti, c->began_ss = c->shadow_ss;
        c->shadow_sti = c->shadow_ss = false;
        c->rflags &= ~(u64)FLAG_RF; /* holds for one instruction (17.3.1.1); the instruction may set it anew */
        u64 start = c->gpr[GPR_IP];
        note_place(c, PLACE_ALONE, start, records_done(c));
        run_alone(c);
        if (c->began_ss) /* of loads in a row only the first holds events back for sure (3A 6.8.3), and on processors no other */
            c->shadow_ss = false;
        c->began_sti = c->began_ss = false;
        after_alone(c, tf && !c->shadow_ss && (!(c->msr.debugctl & DEBUGCTL_BTF) || branched(c, start)));
        if (c->step && c->exit.reason == EXIT_NONE && !(c->halted && !c->vm->irqchip)) /* HLT is an exit, or an event */
            debug_exit(c, DEBUG_STEP);
    } else {
        if (t->enter != block_count) /* which does it */
            note_block(c, t, records_done(c));
        c->budget -= t->count;
        run_records(c, t->enter, t->records);
        c->now = NULL;
        if (c->at_breakpoint && c->budget <= 0)
            c->at_breakpoint = false; /* the slice is over: its end and events come first */
        else if (c->at_breakpoint)
            at_breakpoint(c);
        else if (unlikely(c->reached_count || has_stops(c, STOP_MODE))) {
            stops_reach_mode(c);
            stops_finish(c);
        }
    }
}

void run_enter(struct vcpu *c)
{
    stops_know_mode(c);
    stops_forget(c);
}

/* Execute in the machine's time, which this CPU moves. */
void run_slices(struct vcpu *c, int64_t budget, struct vcpu_exit *exit)
{
    clock_enter(c);
    c->exit = (struct vcpu_exit){.reason = EXIT_NONE};
    c->run_limited = budget >= 0;
    c->run_budget = budget;
    c->completing = c->reading && c->restart;
    if (c->completing) { /* the bytes of the access are in c->data */
        if (c->reading_memory) {
            c->done_reads[c->reads] = c->asked;
            memcpy(&c->done_reads[c->reads++].data, c->data, c->data_size > 8 ? 8 : c->data_size);
        } else {
            c->input_ready = true;
            c->input_at = 0;
            c->input_size = (u32)c->data_size;
        }
    }
    u32 host_mxcsr = mxcsr_enter(c);
    int how = setjmp(c->escape);
    if (how)
        after_escape(c, (enum escape)how);
    while (c->exit.reason == EXIT_NONE)
        turn(c);
    end_slice(c);
    c->reading_memory = c->exit.reason == EXIT_MMIO;
    if (c->reading && c->restart)
        c->asked = (struct mmio_access){c->exit.address, c->exit.size, false, 0};
    if (c->exit.reason != EXIT_MMIO && c->exit.reason != EXIT_IO)
        c->data_size = 0;
    if (!(c->exit.reason == EXIT_MMIO && c->exit.write)) /* a store has the rip of when it was made */
        c->exit.rip = c->gpr[GPR_IP];
    if (!c->vm->irqchip || c->exit.reason == EXIT_HLT) /* HLT was an exit, or there is what wakes it */
        c->halted = false;
    *exit = c->exit;
    mxcsr_leave(c, host_mxcsr);
    x87_release(c);
    clock_leave(c);
}

static void run(struct vcpu *c, int64_t budget, bool goes_on, struct vcpu_exit *exit)
{
    if (take_waiting(c, exit))
        return;
    if (c->held.reason) {
        *exit = c->held;
        c->held.reason = EXIT_NONE;
        return;
    }
    if (!budget && c->reading && c->restart) { /* the read still waits for its data */
        *exit = (struct vcpu_exit){.reason = EXIT_LIMIT, .rip = c->gpr[GPR_IP]};
        return;
    }
    struct vm *vm = c->vm;
    bool parallel = vm->parallel;
    c->bounded = budget >= 0;
    atomic_store(&c->in_run, true);
    if (parallel)
        world_enter(c);
    else
        vm_lock(vm);
    if (!goes_on)
        cache_check_again(c);
    if (!parallel)
        clock_begin(vm);
    run_enter(c);
    run_slices(c, budget, exit);
    __atomic_store_n(&vm->stopped, c->index, __ATOMIC_RELAXED);
    if (vm->vcpu_count > 1 && !parallel)
        clock_share(vm);
    if (parallel)
        world_leave(c);
    if (tracer_has(c))
        tracer_deliver(c, true);
    atomic_store(&c->in_run, false);
    if (vm->irqchip && !parallel)
        chip_notify(c);
    if (!parallel)
        vm_unlock(vm);
}

void vcpu_run(struct vcpu *c, int64_t budget, struct vcpu_exit *exit)
{
    c->resume_breakpoint = true;
    c->asleep = false;
    run(c, budget, false, exit);
}

void vcpu_run_on(struct vcpu *c, int64_t budget, struct vcpu_exit *exit)
{
    c->resume_breakpoint = true;
    c->asleep = false;
    run(c, budget, true, exit);
}

void vcpu_go_on(struct vcpu *c, int64_t budget, struct vcpu_exit *exit) { run(c, budget, true, exit); }
