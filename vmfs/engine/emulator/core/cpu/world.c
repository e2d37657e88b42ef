/* Several CPUs at the same time, each in a thread of its own (vm_set_parallel, vcpu_run).
 *
 * What all of them use is guarded by atomic accesses (atomic.h) and the lock of the chips. What each has for itself, its TLB and its
 * decoded code, another one changes only while its owner stands. Then all others stand: so whoever has the machine may do
 * anything to it. That is done seldom: for a store where there is code, for a first block on a page that another CPU writes to, for
 * a locked access to two pages, for other memory.
 *
 * One that has to do it in the middle of an instruction (world_stop) is itself as good as still, except for what would
 * take host addresses from under it: that waits until all are between two instructions (vm_stop). So these go first. A CPU that
 * executes sees the request where it leaves its blocks, as any attention. */
#include "state.h"

static bool all_stand(const struct vm *vm, const struct vcpu *but, bool between)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        const struct vcpu *c = vm->vcpus[i];
        u8 place = c && c != but ? atomic_load(&c->world) : WORLD_OUT;
        if (place == WORLD_IN || (between && place == WORLD_WAITS))
            return false;
    }
    return !atomic_load(&vm->stopped_for_one);
}

/* Some ten microseconds, which a wait takes where every CPU has a processor of the host. */
enum { SPINS = 500 };

/* Have all others stand, and keep them so. */
static void stop(struct vm *vm, struct vcpu *c)
{
    pthread_mutex_lock(&vm->lock);
    atomic_fetch_add(&vm->stops, 1);
    if (c) {
        atomic_store(&c->world, WORLD_WAITS);
        pthread_cond_broadcast(&vm->turn);
    }
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i] && vm->vcpus[i] != c && atomic_load(&vm->vcpus[i]->world) == WORLD_IN)
            request_attention(vm->vcpus[i], ATTENTION_STAND);
    pthread_mutex_unlock(&vm->lock);
    for (unsigned i = 0; i < SPINS && !all_stand(vm, c, !c); i++)
        __builtin_ia32_pause();
    pthread_mutex_lock(&vm->lock);
    while (!all_stand(vm, c, !c))
        pthread_cond_wait(&vm->turn, &vm->lock);
    atomic_store(&vm->stopped_for_one, true);
    pthread_mutex_unlock(&vm->lock);
}

/* With the lock. */
static void go(struct vm *vm)
{
    atomic_store(&vm->stopped_for_one, false);
    atomic_fetch_sub(&vm->stops, 1);
    pthread_cond_broadcast(&vm->turn);
}

void vm_stop(struct vm *vm)
{
    stop(vm, NULL);
}

void vm_go(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    go(vm);
    pthread_mutex_unlock(&vm->lock);
}

bool world_stop(struct vcpu *c)
{
    if (c->has_world || atomic_load_explicit(&c->world, memory_order_relaxed) == WORLD_OUT)
        return false;
    stop(c->vm, c);
    return c->has_world = true;
}

void world_go(struct vcpu *c)
{
    pthread_mutex_lock(&c->vm->lock);
    c->has_world = false;
    atomic_store(&c->world, WORLD_IN);
    go(c->vm);
    if (atomic_load(&c->vm->stops)) /* somebody else's turn */
        request_attention(c, ATTENTION_STAND);
    pthread_mutex_unlock(&c->vm->lock);
}

void world_enter(struct vcpu *c)
{
    for (;;) {
        atomic_store(&c->world, WORLD_IN); /* whoever wants that it stands sees this, or is seen below */
        if (likely(!atomic_load(&c->vm->stops)))
            return;
        world_leave(c);
        for (unsigned i = 0; i < SPINS && atomic_load(&c->vm->stops); i++)
            __builtin_ia32_pause();
        pthread_mutex_lock(&c->vm->lock);
        while (atomic_load(&c->vm->stops))
            pthread_cond_wait(&c->vm->turn, &c->vm->lock);
        pthread_mutex_unlock(&c->vm->lock);
    }
}

void world_leave(struct vcpu *c)
{
    atomic_store(&c->world, WORLD_OUT);
    if (likely(!atomic_load(&c->vm->stops)))
        return;
    pthread_mutex_lock(&c->vm->lock); /* else the broadcast could come before the wait */
    pthread_cond_broadcast(&c->vm->turn);
    pthread_mutex_unlock(&c->vm->lock);
}

void world_stand(struct vcpu *c)
{
    if (atomic_load(&c->world) == WORLD_OUT)
        return;
    world_leave(c);
    world_enter(c);
}
