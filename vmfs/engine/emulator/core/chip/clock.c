/* Time, and the machine's interrupt controllers in it.
 *
 * Deterministic time belongs to the machine: the CPU that has the turn moves it forward, an instruction a nanosecond, which
 * is a TSC cycle; vcpu.skew is what a CPU's own count lacks. While all CPUs wait, it jumps to the next timer. The chip is
 * called only by the CPU that has the turn, or while none runs; lines that others set wait in a queue. */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "bus.h"
#include "irqchip.h"
#include "memory.h"
#include "opcodes.h"

u64 host_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

u64 vm_clock(const struct vm *vm)
{
    u64 still = atomic_load_explicit(&vm->still, memory_order_relaxed);
    return still ? still : host_clock();
}

void vm_stand(struct vm *vm, bool stands) { atomic_store(&vm->still, stands ? host_clock() : 0); }

/* The host's time as the machine has it. */
static u64 host_time(const struct vm *vm) { return vm_clock(vm) - vm->host_origin; }

u64 vm_time(struct vm *vm) { return vm->time == TIME_HOST ? host_time(vm) : vm->now; }

void clock_enter(struct vcpu *c)
{
    if (c->vm->time == TIME_DETERMINISTIC)
        c->skew += c->vm->now - core_now(c, NULL);
}

void clock_begin(struct vm *vm)
{
    if (vm->time == TIME_HOST)
        vm->run_began = vm->last_seen = host_time(vm);
}

void clock_leave(struct vcpu *c)
{
    if (!runs_parallel(c->vm))
        c->vm->now = core_now(c, NULL);
}
void clock_share(struct vm *vm)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            clock_enter(vm->vcpus[i]);
}

void set_tsc_offset(struct vcpu *c, u64 offset)
{
    c->tsc_offset = offset;
    if (!c->vm->irqchip)
        return;
    chips_lock(c->vm);
    irqchip_set_tsc(c->vm->irqchip, c->index, 1000000000, offset);
    chips_unlock(c->vm);
}

/* ---- The host's deadline --------------------------------------------------------------------------------------------------- */

/* A CPU that sleeps would sleep past it. */
static void wake_for_host(struct vm *vm)
{
    wake_keeper(vm, NULL);
    for (unsigned i = 0; !runs_parallel(vm) && i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            request_attention(vm->vcpus[i], ATTENTION_INTERRUPT);
}

void vm_set_deadline(struct vm *vm, uint64_t when)
{
    if (when < atomic_exchange(&vm->deadline, when))
        wake_for_host(vm);
}

void vm_end_soon(struct vm *vm)
{
    u64 never = CORE_NEVER;
    if (atomic_compare_exchange_strong(&vm->soon, &never, 0))
        wake_for_host(vm);
}

bool vm_ended_soon(struct vm *vm) { return atomic_exchange(&vm->ended_soon, false); }

/* The CPU that wakes up for timers that are no CPU's own, where they execute at the same time: the first one that runs. */
static struct vcpu *keeper(const struct vm *vm)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i] && atomic_load(&vm->vcpus[i]->in_run))
            return vm->vcpus[i];
    return NULL;
}

void wake_keeper(struct vm *vm, const struct vcpu *but)
{
    struct vcpu *c = runs_parallel(vm) ? keeper(vm) : NULL;
    if (c && c != but)
        request_attention(c, ATTENTION_INTERRUPT);
}

/* A time of the `clock` state as one of vm_time; CORE_NEVER stays. */
static u64 in_vm_time(const struct vm *vm, u64 clock)
{
    u64 due = clock - (u64)vm->clock_offset;
    return clock == CORE_NEVER ? CORE_NEVER : (i64)due < 0 ? 0 : due;
}

/* When a timer of the bus's devices is next due. */
static u64 bus_due(const struct vm *vm)
{
    return vm->bus ? in_vm_time(vm, atomic_load_explicit(&vm->bus->due, memory_order_relaxed)) : CORE_NEVER;
}

static u64 first_of(u64 a, u64 b) { return a < b ? a : b; }

static u64 host_due(const struct vm *vm)
{
    u64 soon = atomic_load_explicit(&vm->soon, memory_order_relaxed);
    return first_of(soon, in_vm_time(vm, atomic_load_explicit(&vm->deadline, memory_order_relaxed)));
}

/* When a timer is next due, of the interrupt chip, the bus or the host. */
static u64 next_due(const struct vm *vm)
{
    u64 chip = vm->irqchip ? irqchip_next_deadline(vm->irqchip) : CORE_NEVER;
    return first_of(chip, first_of(host_due(vm), bus_due(vm)));
}

/* ---- Time that is held back -------------------------------------------------------------------------------------------------- */

enum { LAG_MOST = 1000000000 }; /* nanoseconds */
enum { LATE = 2000 };           /* nanoseconds: later than this a timer is because of the host, and not of what was executed meanwhile */

static bool is_alone(const struct vcpu *c)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (c->vm->vcpus[i] && c->vm->vcpus[i] != c)
            return false;
    return true;
}

/* TIME_HOST: how much of the time from `at` until `now` can be taken back. Some only where no other CPU has seen the time since, with
 * one CPU or when all execute in one thread, and up to a second in all. */
static u64 can_hold(const struct vcpu *c, u64 at, u64 now)
{
    const struct vm *vm = c->vm;
    u64 late = now > at ? now - at : 0, room = LAG_MOST - vm->lag;
    if (!(vm->in_turn || is_alone(c)))
        return 0;
    return late < room ? late : room;
}

/* The host wakes a thread late, or lets another one execute, and a guest would lose ticks that a PC never loses. So the machine's
 * time stands still, at the timer that a CPU slept for, or where a CPU that executes last saw it, whatever the host's clock says by
 * then: the machine's time is late, and makes up for it while the CPU sleeps. */
static void hold_time(struct vcpu *c, u64 at)
{
    struct vm *vm = c->vm;
    u64 late = can_hold(c, at, host_time(vm));
    vm->lag += late;
    vm->host_origin += late;
    vm->last_seen = host_time(vm);
}

/* The time for a CPU that is about to see to timers. One that came due since the run began is not late. */
static u64 time_at_timer(struct vcpu *c)
{
    struct vm *vm = c->vm;
    if (vm->time != TIME_HOST)
        return core_now(c, NULL);
    if (runs_parallel(vm))
        return host_time(vm);
    u64 due = next_due(vm), now = host_time(vm);
    if (unlikely(now > due + LATE) && due >= vm->run_began)
        hold_time(c, vm->last_seen);
    else
        vm->last_seen = now;
    return vm->last_seen;
}

/* The time of a CPU that executes: it comes to no timer that nobody has seen to, and is never less than it was. */
u64 time_of_host(struct vcpu *c)
{
    struct vm *vm = c->vm;
    if (runs_parallel(vm)) /* it is the same for all, and whoever has seen one sees no earlier one in another's memory */
        return host_time(vm);
    u64 now = host_time(vm), due = next_due(vm);
    if (unlikely(now >= due) && due >= vm->run_began && atomic_load(&c->in_run)) {
        u64 held = now > due + LATE || due <= vm->last_seen ? vm->last_seen : due - 1;
        if (can_hold(c, held, now) == now - held)
            now = held;
    }
    return vm->last_seen = now;
}

bool deadline_came(struct vcpu *c)
{
    u64 when = atomic_load_explicit(&c->vm->deadline, memory_order_relaxed);
    if (likely(when == CORE_NEVER) || time_at_timer(c) < in_vm_time(c->vm, when))
        return false;
    return atomic_compare_exchange_strong(&c->vm->deadline, &when, CORE_NEVER); /* else it is another one by now */
}

bool soon_came(struct vcpu *c)
{
    struct vm *vm = c->vm;
    u64 when = atomic_load_explicit(&vm->soon, memory_order_relaxed), now;
    if (likely(when == CORE_NEVER))
        return false;
    now = time_at_timer(c);
    if (!when || when > now + 1) { /* it was asked for; or the time was set back */
        atomic_compare_exchange_strong(&vm->soon, &when, now + 1);
        return false;
    }
    if (now < when || !atomic_compare_exchange_strong(&vm->soon, &when, CORE_NEVER))
        return false;
    atomic_store(&vm->ended_soon, true);
    return true;
}

/* ---- The bus -------------------------------------------------------------------------------------------------------------------- */

static void bus_line(void *vm, unsigned gsi, bool level) { vm_irq_line(vm, gsi, level); }
static void bus_msi(void *vm, uint64_t address, uint32_t data) { vm_signal_msi(vm, address, data); }
static void bus_written(void *vm, uint64_t address, uint64_t size) { vm_memory_written(vm, address, size); }

void vm_set_bus(struct vm *vm, struct fast_bus *bus)
{
    if (vm->bus)
        vm->bus->detach(vm->bus, vm);
    vm->bus = bus;
    if (bus)
        bus->attach(bus, &(struct bus_machine){vm, bus_line, bus_msi, bus_written});
}

/* ---- Attention -------------------------------------------------------------------------------------------------------------- */

/* From any thread, or a signal handler. */
void request_attention(struct vcpu *c, u32 bits)
{
    atomic_fetch_or(&c->attention, bits);
    struct vcpu *sleeper = atomic_load(&c->vm->sleeper);
    if (sleeper && sleeper != c)
        request_attention(sleeper, ATTENTION_INTERRUPT);
    if (atomic_load(&c->sleeping))
        syscall(SYS_futex, &c->attention, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void sleep_until_attention(struct vcpu *c, u64 nanoseconds)
{
    struct timespec t = {(time_t)(nanoseconds / 1000000000), (long)(nanoseconds % 1000000000)};
    if (!atomic_load(&c->attention)) /* an early return is of no harm: the caller looks again */
        syscall(SYS_futex, &c->attention, FUTEX_WAIT_PRIVATE, 0, nanoseconds == IRQCHIP_NEVER ? NULL : &t, NULL, 0);
}

/* ---- Life of the chip ---------------------------------------------------------------------------------------------------------- */

int vm_create_irqchip(struct vm *vm)
{
    if (vm->irqchip)
        return -EEXIST;
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            return -EINVAL;
    vm->irqchip = irqchip_create(CORE_VCPUS);
    if (!vm->irqchip)
        return -ENOMEM;
    /* As on every PC: IRQ 0 is the I/O APIC's input 2, since IRQ 2 is the second 8259's. */
    irqchip_set_route(vm->irqchip, 2, IRQCHIP_NO_PIN, IRQCHIP_NO_PIN);
    irqchip_set_route(vm->irqchip, 0, 0, 2);
    vm->irqchip->cpus = 1; /* as many as there are: chip_features */
    return 0;
}

void chip_features(struct vcpu *c)
{
    struct irqchip *chip = c->vm->irqchip;
    if (!chip)
        return;
    if (chip->cpus <= c->index)
        chip->cpus = c->index + 1;
    irqchip_set_features(chip, (struct irqchip_features){has_feature(c, FEATURE_X2APIC), has_feature(c, FEATURE_TSC_DEADLINE),
                                                         c->physical_bits});
}

/* ---- Lines ------------------------------------------------------------------------------------------------------------------------ */

/* Have each CPU look around that has an interrupt or an event to take. */
static void notify(struct vm *vm, const struct vcpu *but)
{
    for (unsigned i = 0; i < vm->irqchip->cpus; i++)
        if (vm->vcpus[i] && vm->vcpus[i] != but && (irqchip_pending(vm->irqchip, i) >= 0 || irqchip_events(vm->irqchip, i)))
            request_attention(vm->vcpus[i], ATTENTION_INTERRUPT);
}

static void apply_line(struct vm *vm, const struct line_change *change)
{
    if (change->is_msi)
        irqchip_msi(vm->irqchip, change->address, change->gsi_or_data);
    else
        irqchip_set_gsi(vm->irqchip, change->gsi_or_data, change->level);
}

static void queue_line(struct vm *vm, struct line_change change)
{
    if (vm->parallel) { /* there is a lock */
        chips_lock(vm);
        if (vm->irqchip)
            apply_line(vm, &change);
        chips_unlock(vm);
        if (vm->irqchip)
            notify(vm, NULL);
        return;
    }
    pthread_mutex_lock(&vm->lines_lock);
    if (vm->line_count == vm->line_room) {
        size_t room = vm->line_room ? vm->line_room * 2 : 64;
        struct line_change *more = realloc(vm->line_queue, room * sizeof *more);
        if (!more)
            abort(); /* a few bytes; a lost edge would be a machine that hangs */
        vm->line_queue = more;
        vm->line_room = room;
    }
    vm->line_queue[vm->line_count++] = change;
    pthread_mutex_unlock(&vm->lines_lock);
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            request_attention(vm->vcpus[i], ATTENTION_LINES);
}

void vm_set_timer_output(struct vm *vm, bool connected)
{
    if (vm->irqchip)
        vm->irqchip->pit.flags = connected ? 0 : KVM_PIT_FLAGS_HPET_LEGACY;
}

void vm_irq_line(struct vm *vm, unsigned gsi, bool level)
{
    queue_line(vm, (struct line_change){.level = level, .gsi_or_data = gsi});
}

void vm_signal_msi(struct vm *vm, uint64_t address, uint32_t data)
{
    queue_line(vm, (struct line_change){.is_msi = true, .gsi_or_data = data, .address = address});
}

void chip_apply_lines(struct vm *vm)
{
    chips_lock(vm);
    pthread_mutex_lock(&vm->lines_lock);
    for (size_t i = 0; vm->irqchip && i < vm->line_count; i++)
        apply_line(vm, &vm->line_queue[i]);
    vm->line_count = 0;
    pthread_mutex_unlock(&vm->lines_lock);
    chips_unlock(vm);
}

/* ---- In a run ---------------------------------------------------------------------------------------------------------------------- */

void chip_notify(struct vcpu *c)
{
    notify(c->vm, c);
    for (unsigned i = 0; !atomic_load(&c->in_run) && i < c->vm->irqchip->cpus; i++) {
        struct vcpu *other = c->vm->vcpus[i];
        /* One that sleeps looks anew when a CPU stops running: it may be the last now, and time is its to move. */
        if (other && other != c && atomic_load(&other->sleeping))
            request_attention(other, ATTENTION_INTERRUPT);
    }
}

void vm_pass_time(struct vm *vm, uint64_t nanoseconds)
{
    if (vm->time != TIME_DETERMINISTIC)
        return;
    vm->now += nanoseconds;
    clock_share(vm);
    if (!vm->irqchip)
        return;
    chips_lock(vm); /* no timer is late when somebody looks at the machine */
    irqchip_advance(vm->irqchip, vm->now);
    chips_unlock(vm);
    if (vm->now >= bus_due(vm)) {
        vm->bus->advance(vm->bus, vm->now + (u64)vm->clock_offset);
        chip_apply_lines(vm);
    }
    notify(vm, NULL);
}

void chip_look(struct vcpu *c)
{
    struct irqchip *chip = c->vm->irqchip;
    u64 now = time_at_timer(c);
    if (unlikely(now >= irqchip_next_deadline(chip))) {
        chips_lock(c->vm);
        irqchip_advance(chip, now);
        chips_unlock(c->vm);
        chip_notify(c);
    }
    if (unlikely(now >= bus_due(c->vm))) {
        c->vm->bus->advance(c->vm->bus, now + (u64)c->vm->clock_offset);
        chip_apply_lines(c->vm); /* the interrupt comes before the next instruction */
        chip_notify(c);
    }
    if (likely(!irqchip_events(chip, c->index)) || c->restart)
        return;
    atomic_store(&c->deaf, false); /* before nobody sees the events any more */
    chips_lock(c->vm);
    u8 events = irqchip_take_events(chip, c->index, IRQCHIP_EVENT_NMI | IRQCHIP_EVENT_INIT | IRQCHIP_EVENT_SIPI);
    u8 sipi_vector = chip->cpu[c->index].sipi_vector;
    if (events & IRQCHIP_EVENT_INIT)
        irqchip_init_cpu(chip, c->index);
    chips_unlock(c->vm);
    if (events & IRQCHIP_EVENT_NMI)
        c->nmi_pending = true;
    if (events & IRQCHIP_EVENT_INIT) { /* 3A 8.4.2: the bootstrap processor starts over, others wait for a SIPI */
        vcpu_init(c);
        c->mp_state = c->index ? KVM_MP_STATE_INIT_RECEIVED : KVM_MP_STATE_RUNNABLE;
    }
    if (events & IRQCHIP_EVENT_SIPI && c->mp_state == KVM_MP_STATE_INIT_RECEIVED) {
        c->sipi_vector = sipi_vector;
        c->seg[SEG_CS].selector = (u16)(c->sipi_vector << 8);
        c->seg[SEG_CS].base = (u64)c->sipi_vector << 12;
        c->gpr[GPR_IP] = 0;
        c->mp_state = KVM_MP_STATE_RUNNABLE;
        mode_changed(c);
    }
}

enum { LEAST_ROOM = 256 }; /* instructions: a fraction of a microsecond */

i64 chip_room(struct vcpu *c, i64 most)
{
    u64 due = next_due(c->vm), now;
    if (due == CORE_NEVER)
        return most;
    now = core_now(c, NULL);
    /* By the host's clock it is a guess, of as many instructions as no CPU here executes in that time; then the rest of it. */
    i64 least = c->vm->time == TIME_HOST ? LEAST_ROOM : 1;
    i64 room = due <= now ? least : due - now < (u64)most ? (i64)(due - now) : most;
    return room < least ? (least < most ? least : most) : room;
}

static bool others_wait(const struct vcpu *c)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        struct vcpu *other = c->vm->vcpus[i];
        if (other && other != c && atomic_load(&other->in_run) &&
            !(atomic_load(&other->sleeping) && !atomic_load(&other->attention)))
            return false;
    }
    return true;
}

enum { SLEEP_MOST = 1000000000 }; /* nanoseconds: how long a run that is bounded by instructions waits for the next one */

/* Whether only an NMI, an INIT or a SIPI wakes it, and none of them is under way. */
static bool is_deaf(const struct vcpu *c)
{
    bool sleeps = c->mp_state != KVM_MP_STATE_RUNNABLE || (c->halted && !(c->rflags & FLAG_IF));
    return sleeps && !(c->nmi_pending && !c->nmi_masked) && !irqchip_events(c->vm->irqchip, c->index);
}

/* At the same time: another one says of itself whether it is deaf. A line or an event for it is seen here before it is there. */
static bool all_are_deaf(struct vcpu *c)
{
    bool deaf = is_deaf(c);
    atomic_store(&c->deaf, deaf);
    for (unsigned i = 0; deaf && i < CORE_VCPUS; i++) {
        const struct vcpu *other = c->vm->vcpus[i];
        deaf = !other || other == c ||
               (atomic_load(&other->deaf) && !irqchip_events(c->vm->irqchip, i) && !(atomic_load(&other->attention) & ATTENTION_NMI));
    }
    return deaf;
}

static bool can_be_sent_unmaskable(struct vm *vm)
{
    return irqchip_can_send_unmaskable(vm->irqchip) || (vm->bus && vm->bus->can_send_unmaskable(vm->bus));
}

bool chip_leaves_it_asleep(struct vcpu *c)
{
    if (runs_parallel(c->vm))
        return all_are_deaf(c) && !can_be_sent_unmaskable(c->vm);
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (c->vm->vcpus[i] && !is_deaf(c->vm->vcpus[i])) /* another one could wake it */
            return false;
    return !can_be_sent_unmaskable(c->vm);
}

/* What it, or all CPUs that execute in turn, need for runs alone; in how many nanoseconds to look again. */
static u64 rest(struct vcpu *c)
{
    if (!c->vm->in_turn)
        return cache_rest(c);
    u64 least = CORE_NEVER;
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (c->vm->vcpus[i]) {
            u64 next = cache_rest(c->vm->vcpus[i]);
            least = next < least ? next : least;
        }
    return least;
}

/* The same of CPUs that execute at the same time: each sleeps for itself, until its own timer; the keeper for the others. */
static void sleep_alone(struct vcpu *c, u64 now, u64 most)
{
    const struct irqchip *chip = c->vm->irqchip;
    u64 due = __atomic_load_n(&chip->cpu[c->index].timer_due, __ATOMIC_RELAXED);
    if (keeper(c->vm) == c)
        due = first_of(due, first_of(__atomic_load_n(&chip->pit.due, __ATOMIC_RELAXED), first_of(host_due(c->vm), bus_due(c->vm))));
    if (due <= now)
        return;
    u64 left = due == IRQCHIP_NEVER ? IRQCHIP_NEVER : due - now, again = rest(c);
    most = again < most ? again : most;
    atomic_store(&c->sleeping, true);
    world_leave(c);
    sleep_until_attention(c, left < most ? left : most);
    atomic_store(&c->sleeping, false);
    world_enter(c);
}

enum { PACED_LEAST = 1000 }; /* nanoseconds: a host sleeps no less, but for much longer */

/* Until a timer, for as long as that takes on the host, or until something comes: the machine's time is as much later. */
static void sleep_paced(struct vcpu *c, u64 left, u64 most)
{
    if (left < PACED_LEAST) {
        c->skew += left;
        return;
    }
    u64 began = host_clock();
    atomic_store(&c->sleeping, true);
    if (c->vm->in_turn)
        atomic_store(&c->vm->sleeper, c);
    if (!(c->vm->in_turn && others_execute(c))) {
        u64 again = rest(c);
        most = again < most ? again : most;
        clock_leave(c);
        vm_unlock(c->vm);
        sleep_until_attention(c, left < most ? left : most);
        vm_lock(c->vm);
        clock_enter(c);
    }
    atomic_store(&c->vm->sleeper, NULL);
    atomic_store(&c->sleeping, false);
    u64 slept = host_clock() - began;
    c->skew += slept < left ? slept : left;
}

bool chip_wait(struct vcpu *c)
{
    u64 now = time_at_timer(c), due = next_due(c->vm), most = IRQCHIP_NEVER;
    if (!c->asleep) {
        c->asleep = true;
        c->asleep_since = now;
        c->asleep_since_host = host_clock();
    }
    if (c->bounded || c->step) {
        u64 slept = host_clock() - c->asleep_since_host;
        if (slept >= SLEEP_MOST || now - c->asleep_since >= SLEEP_MOST)
            return false;
        most = SLEEP_MOST - slept;
    }
    if (runs_parallel(c->vm)) {
        sleep_alone(c, now, most);
        return true;
    }
    if (due != IRQCHIP_NEVER) {
        if (due <= now)
            return true; /* chip_look sees to it, or deadline_came */
        if (c->vm->time == TIME_HOST) {
            u64 left = due - now, gained = left < c->vm->lag ? left : c->vm->lag;
            c->vm->lag -= gained;
            c->vm->host_origin -= gained;
            if (gained == left)
                return true;
            if (left - gained < most)
                most = left - gained;
        } else if (others_wait(c)) {
            if (c->vm->paced)
                sleep_paced(c, due - now, most);
            else
                c->skew += due - now;
            return true;
        }
    } else {
        c->vm->host_origin -= c->vm->lag;
        c->vm->lag = 0;
    }
    atomic_store(&c->sleeping, true);
    if (c->vm->in_turn)
        atomic_store(&c->vm->sleeper, c);
    if (!(c->vm->in_turn && others_execute(c))) { /* what came for another one before it could see the sleeper */
        u64 again = rest(c);
        most = again < most ? again : most;
        clock_leave(c);
        vm_unlock(c->vm);
        sleep_until_attention(c, most);
        vm_lock(c->vm);
        clock_enter(c);
    }
    atomic_store(&c->vm->sleeper, NULL);
    atomic_store(&c->sleeping, false);
    if (c->vm->time == TIME_HOST)
        hold_time(c, due);
    return true;
}
