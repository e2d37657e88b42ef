/* Several CPUs in one thread, in turn (vm_run).
 *
 * Whose turn it is, and how much is left of it, is state of the machine: exits, kicks and budgets end a run and change nothing of
 * it. So with deterministic time two runs of a machine are the same to the instruction, however often each was stopped. */
#include <errno.h>

#include "irqchip.h"
#include "memory.h"
#include "tracer.h"

/* Whether it has anything to do: an instruction or an event. A kick is none, so that it moves no turn. */
static bool executes(struct vcpu *c)
{
    if (c->restart || atomic_load(&c->attention) & ATTENTION_NMI)
        return true;
    if (c->vm->irqchip && irqchip_events(c->vm->irqchip, c->index))
        return true;
    return c->mp_state == KVM_MP_STATE_RUNNABLE && (!c->halted || can_wake(c));
}

bool others_execute(const struct vcpu *c)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        struct vcpu *other = c->vm->vcpus[i];
        if (other && other != c && executes(other))
            return true;
    }
    return false;
}

/* The next one that executes after `from`; that one itself where none does. */
static unsigned next_turn(const struct vm *vm, unsigned from)
{
    for (unsigned i = 1; i < CORE_VCPUS; i++) {
        struct vcpu *c = vm->vcpus[(from + i) % CORE_VCPUS];
        if (c && executes(c))
            return c->index;
    }
    return from;
}

/* There is one; the state may name a CPU that there is not. */
static struct vcpu *whose(struct vm *vm)
{
    while (!vm->vcpus[vm->turn_of])
        vm->turn_of = (vm->turn_of + 1) % CORE_VCPUS;
    return vm->vcpus[vm->turn_of];
}

static struct vcpu *whose_turn(struct vm *vm)
{
    struct vcpu *c = whose(vm);
    if (vm->turn_left <= 0 || (!executes(c) && others_execute(c))) {
        vm->turn_of = next_turn(vm, vm->turn_of);
        vm->turn_left = CORE_TURN;
        c = vm->vcpus[vm->turn_of];
        c->asleep = false; /* if it sleeps, since now */
    }
    return c;
}

long get_turns(struct vm *vm, void *data, size_t size)
{
    if (size >= sizeof(struct core_turns))
        *(struct core_turns *)data = (struct core_turns){vm->turn_of, (uint32_t)vm->turn_left, vm->stopped, 0};
    return sizeof(struct core_turns);
}

int set_turns(struct vm *vm, const void *data, size_t size)
{
    const struct core_turns *turns = data;
    if (size != sizeof *turns || turns->cpu >= CORE_VCPUS || turns->left > CORE_TURN || turns->stopped >= CORE_VCPUS ||
        turns->reserved)
        return -EINVAL;
    vm->turn_of = turns->cpu;
    vm->turn_left = turns->left;
    vm->stopped = turns->stopped;
    return 0;
}

/* What other threads ask of any CPU, before one begins to execute. True: to stop. */
static bool asked_to_stop(struct vm *vm)
{
    u32 asked = 0;
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            asked |= atomic_load(&vm->vcpus[i]->attention);
    if (asked & ATTENTION_LINES)
        chip_apply_lines(vm);
    const struct vcpu *c = whose(vm);
    return asked & ATTENTION_KICK && !c->restart; /* a read that waits completes first */
}

static void end_run(struct vm *vm, const struct vcpu_exit *exit)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        struct vcpu *c = vm->vcpus[i];
        if (!c)
            continue;
        c->entered = c->turn_over = false;
        if (exit->reason == EXIT_INTERRUPTED)
            vcpu_clear_kick(c); /* a kick of the machine is one of each CPU, and answered now */
        if (tracer_has(c))
            tracer_deliver(c, true);
    }
}

void vm_run(struct vm *vm, int64_t budget, bool goes_on, struct vcpu_exit *exit, unsigned *which)
{
    vm_lock(vm);
    vm->in_turn = true;
    if (!goes_on) { /* where the last exit was, a breakpoint is passed */
        struct vcpu *c = vm->vcpus[vm->stopped];
        if (c)
            c->resume_breakpoint = true;
        for (unsigned i = 0; i < CORE_VCPUS; i++)
            if (vm->vcpus[i]) {
                vm->vcpus[i]->asleep = false;
                cache_check_again(vm->vcpus[i]);
            }
    }
    clock_begin(vm);
    for (;;) {
        if (asked_to_stop(vm)) {
            *which = whose(vm)->index;
            *exit = (struct vcpu_exit){.reason = EXIT_INTERRUPTED, .rip = whose(vm)->gpr[GPR_IP]};
            break;
        }
        struct vcpu *c = whose_turn(vm);
        *which = c->index;
        if (take_waiting(c, exit))
            break;
        if (c->held.reason) {
            *exit = c->held;
            c->held.reason = EXIT_NONE;
            break;
        }
        if (!budget && c->reading && c->restart) { /* the read still waits for its data */
            *exit = (struct vcpu_exit){.reason = EXIT_LIMIT, .rip = c->gpr[GPR_IP]};
            break;
        }
        if (!c->entered) {
            run_enter(c);
            c->entered = true;
        }
        c->bounded = budget >= 0;
        c->turn_over = false;
        u64 before = instructions_done(c);
        bool whole = budget < 0 || vm->turn_left <= budget;
        atomic_store(&c->in_run, true);
        run_slices(c, whole ? vm->turn_left : budget, exit);
        atomic_store(&c->in_run, false);
        i64 done = (i64)(instructions_done(c) - before);
        vm->turn_left -= done;
        if (budget >= 0)
            budget -= done;
        bool over = exit->reason == EXIT_LIMIT && (c->turn_over || vm->turn_left <= 0);
        if (c->turn_over)
            vm->turn_left = 0;
        if (exit->reason != EXIT_LIMIT || !over || !budget)
            break;
        if (tracer_has(c))
            tracer_deliver(c, false);
    }
    vm->stopped = *which;
    clock_share(vm);
    end_run(vm, exit);
    vm->in_turn = false;
    vm_unlock(vm);
}
