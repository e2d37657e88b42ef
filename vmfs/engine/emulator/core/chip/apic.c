/*
 * The local APICs (Intel SDM volume 3A, chapter 11 "Advanced Programmable Interrupt Controller", its
 * numbering of 2023), in xAPIC and x2APIC mode, and the delivery of interrupt messages between them.  State
 * is KVM's struct kvm_lapic_state.
 *
 * As KVM has it: version 0x14 with 6 LVT entries, no CMCI, no suppression of EOI broadcasts; LINT0 of CPU 0
 * is in mode ExtINT after reset; the ID is writable in xAPIC mode; lowest priority goes to the (vector
 * modulo n)-th match; a logical destination of all ones is a broadcast.  Unlike KVM, as the manual says:
 * ESR and the error LVT work, vectors below 16 are refused, read-only bits of the LVT stay, x2APIC reserved
 * bits are #GP, LINT0 in mode fixed or NMI follows the 8259's output, disabling in IA32_APIC_BASE resets
 * the registers.
 *
 * Left out: the cluster hierarchy of the old APIC bus, arbitration, remote read, SMI, LVT
 * level triggering (an LVT interrupt is delivered once a rising edge).
 */
#include <errno.h>
#include <string.h>

#include "irqchip_internal.h"

#define MSR_APIC_BASE 0x1bu
#define MSR_TSC_DEADLINE 0x6e0u
#define MSR_X2APIC 0x800u

#define BASE_ADDRESS UINT64_C(0xfee00000)
#define BASE_BSP (UINT64_C(1) << 8)
#define BASE_X2APIC (UINT64_C(1) << 10)
#define BASE_ENABLE (UINT64_C(1) << 11)
#define BASE_MODE (BASE_X2APIC | BASE_ENABLE)

/* Register numbers: offset / 16 in the page, MSR - 0x800 (SDM table 11-1, table 11-6). */
enum {
    ID = 0x02, VERSION = 0x03, TPR = 0x08, APR = 0x09, PPR = 0x0a, EOI = 0x0b, LDR = 0x0d, DFR = 0x0e,
    SPIV = 0x0f, ISR = 0x10, TMR = 0x18, IRR = 0x20, ESR = 0x28, ICR = 0x30, ICR2 = 0x31, LVT_TIMER = 0x32,
    LVT_THERMAL = 0x33, LVT_PERFORMANCE = 0x34, LVT_LINT0 = 0x35, LVT_LINT1 = 0x36, LVT_ERROR = 0x37,
    TIMER_INITIAL = 0x38, TIMER_CURRENT = 0x39, TIMER_DIVIDE = 0x3e, SELF_IPI = 0x3f, REGISTERS = 0x40,
};

#define VERSION_VALUE 0x00050014u
#define SPIV_ENABLE (1u << 8)
#define LVT_MASKED (1u << 16)
#define LVT_READ_ONLY 0x5000u /* delivery status, remote IRR */
#define LVT_MODE(entry) ((entry) >> 8 & 7)
#define TIMER_MODE(entry) ((entry) >> 17 & 3)
#define ICR_BUSY (1u << 12)
#define CLUSTER_FORMAT 0x0fffffffu /* DFR: bits 31:28 are 1111 flat, 0000 cluster */

enum { ONE_SHOT = 0, PERIODIC = 1, TSC_DEADLINE = 2 };
enum { ERROR_SEND_VECTOR = 1 << 5, ERROR_RECEIVE_VECTOR = 1 << 6, ERROR_REGISTER = 1 << 7 };
enum { FIRST_LEGAL_VECTOR = 16 };

/* --- Bits --------------------------------------------------------------------------------------------- */

static int highest(const uint32_t *words)
{
    int i;

    for (i = 7; i >= 0; i--)
        if (words[i])
            return i * 32 + 31 - __builtin_clz(words[i]);
    return -1;
}

static void set_bit(uint32_t *words, uint8_t vector, bool on)
{
    uint32_t bit = 1u << (vector & 31);

    words[vector >> 5] = on ? words[vector >> 5] | bit : words[vector >> 5] & ~bit;
}

static bool get_bit(const uint32_t *words, uint8_t vector)
{
    return words[vector >> 5] >> (vector & 31) & 1;
}

static bool is_enabled(const struct lapic *a)
{
    return a->base & BASE_ENABLE;
}

static bool is_x2apic(const struct lapic *a)
{
    return (a->base & BASE_MODE) == BASE_MODE;
}

static bool is_software_enabled(const struct lapic *a)
{
    return a->reg[SPIV] & SPIV_ENABLE;
}

static bool takes_fixed(const struct lapic *a)
{
    return is_enabled(a) && is_software_enabled(a);
}

/* --- Priorities and pending vectors ------------------------------------------------------------------- */

/* Does the 8259's INTR reach this CPU?  With the APIC disabled globally LINT0 is the INTR pin (SDM
 * 11.4.3). */
bool apic_takes_pic(const struct lapic *a)
{
    uint32_t lint0 = a->reg[LVT_LINT0];

    return !is_enabled(a) || (!(lint0 & LVT_MASKED) && LVT_MODE(lint0) == DELIVER_EXTINT);
}

/* SDM 11.8.3.1: PPR is TPR, or the class in service where that is higher. */
static void update_ppr(struct lapic *a)
{
    uint32_t tpr = a->reg[TPR] & 0xff;
    int serving = highest(a->reg + ISR);
    uint32_t class = serving < 0 ? 0 : serving & 0xf0;

    a->reg[PPR] = (tpr & 0xf0) >= class ? tpr : class;
}

/* Recompute what irqchip_pending answers, after any change to this APIC or to the 8259's output. */
void apic_refresh(struct irqchip *chip, unsigned cpu)
{
    struct lapic *a = &chip->cpu[cpu];
    int vector = -1, requested;

    update_ppr(a);
    if (chip->pic.output && apic_takes_pic(a)) {
        vector = pic_peek(&chip->pic);
    } else if (is_enabled(a)) {
        requested = highest(a->reg + IRR);
        if (requested >= 0 && (uint32_t)requested >> 4 > a->reg[PPR] >> 4)
            vector = requested;
    }
    __atomic_store_n(&a->deliverable, (int16_t)vector, __ATOMIC_RELAXED);
}

int irqchip_acknowledge(struct irqchip *chip, unsigned cpu)
{
    struct lapic *a = &chip->cpu[cpu];
    int vector = a->deliverable;

    if (vector < 0)
        return -1;
    if (chip->pic.output && apic_takes_pic(a))
        return pic_acknowledge(chip);
    set_bit(a->reg + IRR, vector, false);
    set_bit(a->reg + ISR, vector, true);
    apic_refresh(chip, cpu);
    return vector;
}

/* --- Delivery ----------------------------------------------------------------------------------------- */

static bool deliver_lvt(struct irqchip *chip, unsigned cpu, unsigned entry);

static void report_error(struct irqchip *chip, unsigned cpu, uint32_t error)
{
    chip->cpu[cpu].errors |= error;
    /* A bad vector in the error LVT itself must not report itself. */
    if ((chip->cpu[cpu].reg[LVT_ERROR] & 0xff) >= FIRST_LEGAL_VECTOR)
        deliver_lvt(chip, cpu, LVT_ERROR);
}

/* Under the chip's lock; irqchip_events reads them without it. */
static void set_events(struct lapic *a, unsigned events) { __atomic_store_n(&a->events, (uint8_t)events, __ATOMIC_RELAXED); }
static void add_events(struct lapic *a, unsigned events) { set_events(a, a->events | events); }

/* Put a message into one local APIC; true if it was taken (SDM 11.8.4). */
static bool accept(struct irqchip *chip, unsigned cpu, enum delivery_mode mode, uint8_t vector, bool level,
                   bool asserted)
{
    struct lapic *a = &chip->cpu[cpu];

    switch (mode) {
    case DELIVER_FIXED:
    case DELIVER_LOWEST:
        if (!takes_fixed(a) || (level && !asserted))
            return false;
        if (vector < FIRST_LEGAL_VECTOR) {
            report_error(chip, cpu, ERROR_RECEIVE_VECTOR);
            return false;
        }
        set_bit(a->reg + IRR, vector, true);
        set_bit(a->reg + TMR, vector, level);
        apic_refresh(chip, cpu);
        return true;
    case DELIVER_NMI:
        add_events(a, IRQCHIP_EVENT_NMI);
        return true;
    case DELIVER_INIT:
        if (level && !asserted) /* INIT level de-assert: not on any processor since the Pentium 4 */
            return false;
        set_events(a, (a->events & ~IRQCHIP_EVENT_SIPI) | IRQCHIP_EVENT_INIT);
        return true;
    case DELIVER_STARTUP:
        add_events(a, IRQCHIP_EVENT_SIPI);
        a->sipi_vector = vector;
        return true;
    case DELIVER_SMI:
    case DELIVER_REMOTE_READ:
    case DELIVER_EXTINT:
        break;
    }
    return false;
}

/* SDM 11.6.2.2 (xAPIC: flat, cluster), 11.12.10.2 (x2APIC: cluster of 16). */
static bool matches_logical(const struct lapic *a, uint32_t destination)
{
    uint32_t ldr = a->reg[LDR];

    if (is_x2apic(a))
        return ldr >> 16 == destination >> 16 && (ldr & destination & 0xffff);
    ldr >>= 24;
    if (a->reg[DFR] >> 28 == 15)
        return ldr & destination;
    return ldr >> 4 == destination >> 4 && (ldr & destination & 15);
}

static bool matches(const struct lapic *a, int sender, const struct apic_message *m)
{
    uint32_t destination = m->destination;

    if (m->shorthand == TO_ALL || m->shorthand == TO_OTHERS)
        return m->shorthand == TO_ALL || (int)a->id != sender;
    if (destination == UINT32_MAX || (destination == 0xff && (sender < 0 || !is_x2apic(a))))
        return true;
    if (m->logical)
        return matches_logical(a, destination);
    return destination == (is_x2apic(a) ? a->reg[ID] : a->reg[ID] >> 24);
}

/* Lowest priority: among the matches that are enabled, the (vector modulo n)-th, as KVM's vector hashing. */
static int send_lowest(struct irqchip *chip, int sender, const struct apic_message *m)
{
    unsigned cpu, found = 0, wanted;

    for (cpu = 0; cpu < chip->cpus; cpu++)
        found += takes_fixed(&chip->cpu[cpu]) && matches(&chip->cpu[cpu], sender, m);
    if (!found)
        return 0;
    wanted = m->vector % found;
    for (cpu = 0; cpu < chip->cpus; cpu++)
        if (takes_fixed(&chip->cpu[cpu]) && matches(&chip->cpu[cpu], sender, m) && wanted-- == 0)
            break;
    return accept(chip, cpu, m->mode, m->vector, m->level_triggered, m->assert);
}

/* The number of CPUs that took the message. */
int apic_send(struct irqchip *chip, int sender, const struct apic_message *m)
{
    int taken = 0;
    unsigned cpu;

    if (m->shorthand == TO_SELF)
        return accept(chip, sender, m->mode, m->vector, m->level_triggered, m->assert);
    if (m->mode == DELIVER_LOWEST || m->lowest)
        return send_lowest(chip, sender, m);
    for (cpu = 0; cpu < chip->cpus; cpu++)
        if (is_enabled(&chip->cpu[cpu]) && matches(&chip->cpu[cpu], sender, m))
            taken += accept(chip, cpu, m->mode, m->vector, m->level_triggered, m->assert);
    return taken;
}

/* SDM 11.6.1: the interrupt command register. */
static void send_ipi(struct irqchip *chip, unsigned cpu, uint32_t command, uint32_t destination)
{
    struct apic_message message = {
        .destination = destination,
        .vector = (uint8_t)command,
        .mode = command >> 8 & 7,
        .shorthand = command >> 18 & 3,
        .logical = command & 1u << 11,
        .level_triggered = command & 1u << 15,
        .assert = command & 1u << 14,
    };

    if (message.mode <= DELIVER_LOWEST && message.vector < FIRST_LEGAL_VECTOR)
        report_error(chip, cpu, ERROR_SEND_VECTOR);
    else
        apic_send(chip, cpu, &message);
}

/* An LVT entry fires (SDM 11.5.1).  True if somebody was told. */
static bool deliver_lvt(struct irqchip *chip, unsigned cpu, unsigned entry)
{
    uint32_t lvt = chip->cpu[cpu].reg[entry];
    bool has_mode = entry != LVT_TIMER && entry != LVT_ERROR;
    enum delivery_mode mode = has_mode ? LVT_MODE(lvt) : DELIVER_FIXED;

    if (!is_enabled(&chip->cpu[cpu]) || lvt & LVT_MASKED)
        return false;
    /* Lowest priority and start-up are reserved here; ExtINT is apic_takes_pic's. */
    if (mode == DELIVER_LOWEST || mode == DELIVER_STARTUP)
        return false;
    return accept(chip, cpu, mode, (uint8_t)lvt, false, true);
}

bool irqchip_local(struct irqchip *chip, unsigned cpu, enum irqchip_lvt input)
{
    static const uint8_t entries[] = {
        [IRQCHIP_LVT_THERMAL] = LVT_THERMAL, [IRQCHIP_LVT_PERFORMANCE] = LVT_PERFORMANCE,
        [IRQCHIP_LVT_LINT0] = LVT_LINT0, [IRQCHIP_LVT_LINT1] = LVT_LINT1,
    };
    struct lapic *a = &chip->cpu[cpu];
    bool delivered;

    if (input == IRQCHIP_LVT_LINT1 && !is_enabled(a)) { /* the pin is NMI then (SDM 11.4.3) */
        add_events(a, IRQCHIP_EVENT_NMI);
        return true;
    }
    delivered = deliver_lvt(chip, cpu, entries[input]);
    /* SDM 11.5.1: delivering a performance counter interrupt masks its entry. */
    if (input == IRQCHIP_LVT_PERFORMANCE && delivered)
        a->reg[LVT_PERFORMANCE] |= LVT_MASKED;
    return delivered;
}

/* The 8259's output rose: LINT0 entries of another mode than ExtINT see an edge (an NMI watchdog's way). */
void apic_lint0_edge(struct irqchip *chip)
{
    unsigned cpu;

    for (cpu = 0; cpu < chip->cpus; cpu++)
        if (LVT_MODE(chip->cpu[cpu].reg[LVT_LINT0]) != DELIVER_EXTINT)
            deliver_lvt(chip, cpu, LVT_LINT0);
}

/* LINT0 is the only local entry of a free mode that something drives: the 8259. */
bool apic_can_send_unmaskable(const struct lapic *a)
{
    uint32_t lint0 = a->reg[LVT_LINT0];

    return is_enabled(a) && !(lint0 & LVT_MASKED) && is_unmaskable(LVT_MODE(lint0));
}

uint8_t irqchip_take_events(struct irqchip *chip, unsigned cpu, uint8_t which)
{
    struct lapic *a = &chip->cpu[cpu];
    uint8_t taken = a->events & which;

    set_events(a, a->events & ~which);
    return taken;
}

/* --- Timer (SDM 11.5.4) ------------------------------------------------------------------------------- */

/* Bus ticks, of 1 ns each, a count: the divider's bits 3, 1 and 0 are the power of two less one, modulo 8. */
static uint64_t timer_tick(const struct lapic *a)
{
    uint32_t divide = a->reg[TIMER_DIVIDE];

    return 1u << (((divide & 3) + (divide >> 1 & 4) + 1) & 7);
}

static unsigned timer_mode(const struct lapic *a)
{
    return TIMER_MODE(a->reg[LVT_TIMER]);
}

static uint32_t timer_count(const struct lapic *a, uint64_t now)
{
    uint64_t tick = timer_tick(a);

    if (timer_mode(a) == TSC_DEADLINE || a->timer_due == IRQCHIP_NEVER)
        return 0;
    return (uint32_t)((a->timer_due - now + tick - 1) / tick);
}

static void start_timer(struct irqchip *chip, struct lapic *a, uint64_t due)
{
    a->timer_due = due;
    irqchip_reschedule(chip);
}

static void load_timer(struct irqchip *chip, struct lapic *a, uint32_t count)
{
    uint64_t due = IRQCHIP_NEVER;

    if (a->reg[TIMER_INITIAL] && count && timer_mode(a) != TSC_DEADLINE)
        due = add_saturating(chip->now, count * timer_tick(a));
    start_timer(chip, a, due);
}

/* The first ns at which the TSC has reached the deadline; a deadline that is past is due now. */
static void arm_deadline(struct irqchip *chip, struct lapic *a)
{
    uint64_t ticks = a->tsc_deadline - a->tsc_offset, due = IRQCHIP_NEVER;

    if (a->tsc_deadline && timer_mode(a) == TSC_DEADLINE) {
        if (irqchip_tsc(chip, a->id, chip->now) >= a->tsc_deadline)
            due = chip->now;
        else
            due = scale_up(ticks, UINT64_C(1000000000), a->tsc_hz);
    }
    start_timer(chip, a, due);
}

uint64_t irqchip_tsc(const struct irqchip *chip, unsigned cpu, uint64_t now)
{
    const struct lapic *a = &chip->cpu[cpu];

    return a->tsc_offset + (uint64_t)((unsigned __int128)now * a->tsc_hz / 1000000000u);
}

void irqchip_set_tsc(struct irqchip *chip, unsigned cpu, uint64_t hz, uint64_t offset)
{
    struct lapic *a = &chip->cpu[cpu];

    a->tsc_hz = hz ? hz : 1;
    a->tsc_offset = offset;
    if (timer_mode(a) == TSC_DEADLINE)
        arm_deadline(chip, a);
}

/* One CPU's timer, if it is due at chip->now.  Several missed periods are one interrupt, as IRR holds one. */
void apic_advance(struct irqchip *chip, unsigned cpu)
{
    struct lapic *a = &chip->cpu[cpu];
    uint64_t period, late;

    if (chip->now < a->timer_due || a->timer_due == IRQCHIP_NEVER)
        return;
    if (timer_mode(a) == PERIODIC && a->reg[TIMER_INITIAL]) {
        period = a->reg[TIMER_INITIAL] * timer_tick(a);
        late = chip->now - a->timer_due;
        a->timer_due = add_saturating(a->timer_due, (late / period + 1) * period);
    } else {
        a->timer_due = IRQCHIP_NEVER;
        a->tsc_deadline = 0;
    }
    deliver_lvt(chip, cpu, LVT_TIMER);
}

/* --- Register writes ---------------------------------------------------------------------------------- */

static void write_plain(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    chip->cpu[cpu].reg[number] = value;
}

static void write_dfr(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    chip->cpu[cpu].reg[number] = value | CLUSTER_FORMAT;
}

/* SDM 11.8.5.  A level interrupt's end goes to the I/O APIC too. */
static void write_eoi(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    struct lapic *a = &chip->cpu[cpu];
    int vector = highest(a->reg + ISR);

    (void)number;
    (void)value;
    if (vector < 0)
        return;
    set_bit(a->reg + ISR, vector, false);
    if (get_bit(a->reg + TMR, vector))
        ioapic_end_of_interrupt(chip, vector);
}

/* SDM 11.4.7.2: software disable masks every LVT entry. */
static void write_spiv(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    struct lapic *a = &chip->cpu[cpu];
    unsigned entry;

    a->reg[number] = value;
    if (value & SPIV_ENABLE)
        return;
    for (entry = LVT_TIMER; entry <= LVT_ERROR; entry++)
        a->reg[entry] |= LVT_MASKED;
}

/* SDM 11.5.3: a write latches what was found since the last one. */
static void write_esr(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    struct lapic *a = &chip->cpu[cpu];

    (void)value;
    a->reg[number] = a->errors;
    a->errors = 0;
}

static void write_icr(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    struct lapic *a = &chip->cpu[cpu];

    a->reg[number] = value & ~ICR_BUSY; /* always idle: a message is delivered at once */
    send_ipi(chip, cpu, value, is_x2apic(a) ? a->reg[ICR2] : a->reg[ICR2] >> 24);
}

static void write_self_ipi(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    (void)number;
    send_ipi(chip, cpu, (uint32_t)TO_SELF << 18 | 1u << 14 | (value & 0xff), 0);
}

static void write_lvt(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    struct lapic *a = &chip->cpu[cpu];

    if (!is_software_enabled(a))
        value |= LVT_MASKED;
    a->reg[number] = (value & ~LVT_READ_ONLY) | (a->reg[number] & LVT_READ_ONLY);
}

/* SDM 11.5.4.1: a change to or from TSC-deadline mode disarms the timer. */
static void write_lvt_timer(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    struct lapic *a = &chip->cpu[cpu];
    bool was_deadline = timer_mode(a) == TSC_DEADLINE;

    if (!chip->features.tsc_deadline)
        value &= ~(1u << 18);
    write_lvt(chip, cpu, number, value);
    if (was_deadline == (timer_mode(a) == TSC_DEADLINE))
        return;
    a->tsc_deadline = 0;
    a->reg[TIMER_INITIAL] = 0;
    start_timer(chip, a, IRQCHIP_NEVER);
}

static void write_timer_initial(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    struct lapic *a = &chip->cpu[cpu];

    if (timer_mode(a) == TSC_DEADLINE)
        return;
    a->reg[number] = value;
    load_timer(chip, a, value);
}

/* The count goes on from where it is at the new rate. */
static void write_timer_divide(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    struct lapic *a = &chip->cpu[cpu];
    uint64_t old_tick = timer_tick(a), left = a->timer_due - chip->now;

    a->reg[number] = value;
    if (a->timer_due != IRQCHIP_NEVER && timer_mode(a) != TSC_DEADLINE && timer_tick(a) != old_tick)
        start_timer(chip, a, add_saturating(chip->now, scale_up(left, timer_tick(a), old_tick)));
}

/* --- The register table ------------------------------------------------------------------------------- */

enum { R = 1, W = 2, X2R = 4, X2W = 8, XAPIC = R | W, BOTH = R | W | X2R | X2W, READ_ONLY = R | X2R };

struct apic_register {
    uint8_t access;
    uint32_t writable; /* others are dropped in xAPIC mode, #GP in x2APIC mode */
    void (*write)(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value);
};

#define LVT_BITS(mode_bits) (0x110ffu | (mode_bits))

static const struct apic_register registers[REGISTERS] = {
    [ID] = {R | W | X2R, 0xff000000u, write_plain},
    [VERSION] = {READ_ONLY, 0, NULL},
    [TPR] = {BOTH, 0xff, write_plain},
    [APR] = {R, 0, NULL},
    [PPR] = {READ_ONLY, 0, NULL},
    [EOI] = {W | X2W, 0, write_eoi},
    [LDR] = {R | W | X2R, 0xff000000u, write_plain},
    [DFR] = {XAPIC, 0xf0000000u, write_dfr},
    [SPIV] = {BOTH, 0x3ff, write_spiv},
    [ISR ... ISR + 7] = {READ_ONLY, 0, NULL},
    [TMR ... TMR + 7] = {READ_ONLY, 0, NULL},
    [IRR ... IRR + 7] = {READ_ONLY, 0, NULL},
    [ESR] = {BOTH, 0, write_esr},
    [ICR] = {BOTH, 0xcdfff, write_icr},
    [ICR2] = {XAPIC, 0xff000000u, write_plain},
    [LVT_TIMER] = {BOTH, LVT_BITS(3u << 17), write_lvt_timer},
    [LVT_THERMAL] = {BOTH, LVT_BITS(0x700), write_lvt},
    [LVT_PERFORMANCE] = {BOTH, LVT_BITS(0x700), write_lvt},
    [LVT_LINT0] = {BOTH, LVT_BITS(0xe700), write_lvt},
    [LVT_LINT1] = {BOTH, LVT_BITS(0xe700), write_lvt},
    [LVT_ERROR] = {BOTH, LVT_BITS(0), write_lvt},
    [TIMER_INITIAL] = {BOTH, UINT32_MAX, write_timer_initial},
    [TIMER_CURRENT] = {READ_ONLY, 0, NULL},
    [TIMER_DIVIDE] = {BOTH, 0xb, write_timer_divide},
    [SELF_IPI] = {X2W, 0xff, write_self_ipi},
};

static uint32_t read_register(const struct irqchip *chip, unsigned cpu, unsigned number)
{
    const struct lapic *a = &chip->cpu[cpu];

    return number == TIMER_CURRENT ? timer_count(a, chip->now) : a->reg[number];
}

static void write_register(struct irqchip *chip, unsigned cpu, unsigned number, uint32_t value)
{
    registers[number].write(chip, cpu, number, value & registers[number].writable);
    apic_refresh(chip, cpu);
}

bool irqchip_lapic_mapped(const struct irqchip *chip, unsigned cpu, uint64_t *address)
{
    const struct lapic *a = &chip->cpu[cpu];

    *address = a->base & ~UINT64_C(0xfff);
    return is_enabled(a) && !is_x2apic(a);
}

uint32_t irqchip_lapic_read(struct irqchip *chip, unsigned cpu, uint32_t offset, unsigned size, uint64_t now)
{
    unsigned number = offset >> 4, byte = offset & 15;
    uint32_t value;

    irqchip_advance(chip, now);
    if (byte + size > 4)
        return 0;
    if (number >= REGISTERS || !(registers[number].access & R)) {
        report_error(chip, cpu, ERROR_REGISTER);
        return 0;
    }
    value = read_register(chip, cpu, number) >> 8 * byte;
    return size == 4 ? value : value & ((1u << 8 * size) - 1);
}

void irqchip_lapic_write(struct irqchip *chip, unsigned cpu, uint32_t offset, unsigned size, uint32_t value,
                         uint64_t now)
{
    unsigned number = offset >> 4;

    irqchip_advance(chip, now);
    if (size != 4 || offset & 15)
        return;
    if (number >= REGISTERS || !(registers[number].access & (R | W)))
        report_error(chip, cpu, ERROR_REGISTER);
    else if (registers[number].access & W)
        write_register(chip, cpu, number, value);
}

uint64_t irqchip_get_cr8(const struct irqchip *chip, unsigned cpu)
{
    return chip->cpu[cpu].reg[TPR] >> 4 & 15;
}

void irqchip_set_cr8(struct irqchip *chip, unsigned cpu, uint64_t value)
{
    write_register(chip, cpu, TPR, (uint32_t)(value & 15) << 4);
}

/* --- MSRs --------------------------------------------------------------------------------------------- */

/* SDM 11.12.5.1: the logical ID follows from the ID. */
static void set_x2apic_id(struct lapic *a)
{
    a->reg[ID] = a->id;
    a->reg[LDR] = a->id >> 4 << 16 | 1u << (a->id & 15);
}

static bool valid_base(const struct irqchip *chip, uint64_t value)
{
    uint64_t reserved = ~(((UINT64_C(1) << chip->features.physical_bits) - 1)) | 0x2ff;

    if (!chip->features.x2apic)
        reserved |= BASE_X2APIC;
    return !(value & reserved) && (value & BASE_MODE) != BASE_X2APIC;
}

static void reset_registers(struct irqchip *chip, struct lapic *a)
{
    unsigned entry;

    memset(a->reg, 0, sizeof a->reg);
    a->errors = 0;
    a->tsc_deadline = 0;
    a->reg[VERSION] = VERSION_VALUE;
    a->reg[DFR] = UINT32_MAX;
    a->reg[SPIV] = 0xff;
    for (entry = LVT_TIMER; entry <= LVT_ERROR; entry++)
        a->reg[entry] = LVT_MASKED;
    if (a->id == 0)
        a->reg[LVT_LINT0] = DELIVER_EXTINT << 8;
    if (is_x2apic(a))
        set_x2apic_id(a);
    else
        a->reg[ID] = a->id << 24;
    start_timer(chip, a, IRQCHIP_NEVER);
}

static void change_base(struct irqchip *chip, unsigned cpu, uint64_t value)
{
    struct lapic *a = &chip->cpu[cpu];
    bool was_enabled = is_enabled(a), was_x2apic = is_x2apic(a);

    a->base = value;
    if (was_enabled && !is_enabled(a))
        reset_registers(chip, a);
    else if (!was_enabled && is_enabled(a) && !is_x2apic(a))
        a->reg[ID] = a->id << 24;
    if (!was_x2apic && is_x2apic(a))
        set_x2apic_id(a);
    apic_refresh(chip, cpu);
}

/* SDM figure 11-27: x2APIC is entered from xAPIC and left to disabled only. */
static int write_base(struct irqchip *chip, unsigned cpu, uint64_t value)
{
    uint64_t from = chip->cpu[cpu].base & BASE_MODE, to = value & BASE_MODE;

    if ((from == BASE_MODE && to == BASE_ENABLE) || (from == 0 && to == BASE_MODE))
        return -1;
    if (!valid_base(chip, value))
        return -1;
    change_base(chip, cpu, value);
    return 0;
}

int irqchip_set_apic_base(struct irqchip *chip, unsigned cpu, uint64_t value, uint64_t now)
{
    if (!valid_base(chip, value))
        return -EINVAL;
    irqchip_advance(chip, now);
    change_base(chip, cpu, value);
    return 0;
}

static int read_x2apic(const struct irqchip *chip, unsigned cpu, unsigned number, uint64_t *value)
{
    const struct lapic *a = &chip->cpu[cpu];

    if (!is_x2apic(a) || number >= REGISTERS || !(registers[number].access & X2R))
        return -1;
    *value = read_register(chip, cpu, number);
    if (number == ICR)
        *value |= (uint64_t)a->reg[ICR2] << 32;
    return 0;
}

static int write_x2apic(struct irqchip *chip, unsigned cpu, unsigned number, uint64_t value)
{
    struct lapic *a = &chip->cpu[cpu];

    if (!is_x2apic(a) || number >= REGISTERS || !(registers[number].access & X2W))
        return -1;
    if ((uint32_t)value & ~registers[number].writable || (number != ICR && value >> 32))
        return -1;
    if (number == LVT_TIMER && TIMER_MODE(value) >= TSC_DEADLINE && !chip->features.tsc_deadline)
        return -1;
    if (number == ICR)
        a->reg[ICR2] = (uint32_t)(value >> 32);
    write_register(chip, cpu, number, (uint32_t)value);
    return 0;
}

/* SDM 11.5.4.1: outside TSC-deadline mode the MSR reads 0 and ignores writes. */
static void write_deadline(struct irqchip *chip, unsigned cpu, uint64_t value)
{
    struct lapic *a = &chip->cpu[cpu];

    if (timer_mode(a) != TSC_DEADLINE || !is_enabled(a))
        return;
    a->tsc_deadline = value;
    arm_deadline(chip, a);
    irqchip_advance(chip, chip->now);
}

bool irqchip_owns_msr(uint32_t msr)
{
    return msr == MSR_APIC_BASE || msr == MSR_TSC_DEADLINE || (msr >= MSR_X2APIC && msr <= MSR_X2APIC + 0xff);
}

int irqchip_read_msr(struct irqchip *chip, unsigned cpu, uint32_t msr, uint64_t *value, uint64_t now)
{
    const struct lapic *a = &chip->cpu[cpu];

    irqchip_advance(chip, now);
    if (msr == MSR_APIC_BASE)
        *value = a->base;
    else if (msr == MSR_TSC_DEADLINE && chip->features.tsc_deadline)
        *value = timer_mode(a) == TSC_DEADLINE ? a->tsc_deadline : 0;
    else
        return read_x2apic(chip, cpu, msr - MSR_X2APIC, value);
    return 0;
}

int irqchip_write_msr(struct irqchip *chip, unsigned cpu, uint32_t msr, uint64_t value, uint64_t now)
{
    irqchip_advance(chip, now);
    if (msr == MSR_APIC_BASE)
        return write_base(chip, cpu, value);
    if (msr != MSR_TSC_DEADLINE)
        return write_x2apic(chip, cpu, msr - MSR_X2APIC, value);
    if (!chip->features.tsc_deadline)
        return -1;
    write_deadline(chip, cpu, value);
    return 0;
}

/* --- Reset and state ---------------------------------------------------------------------------------- */

void apic_reset(struct irqchip *chip, unsigned cpu)
{
    struct lapic *a = &chip->cpu[cpu];

    a->id = cpu;
    a->base = BASE_ADDRESS | BASE_ENABLE | (cpu == 0 ? BASE_BSP : 0);
    set_events(a, 0);
    a->sipi_vector = 0;
    reset_registers(chip, a);
    apic_refresh(chip, cpu);
}

void irqchip_init_cpu(struct irqchip *chip, unsigned cpu)
{
    struct lapic *a = &chip->cpu[cpu];
    uint32_t id = a->reg[ID];

    reset_registers(chip, a);
    if (!is_x2apic(a))
        a->reg[ID] = id;
    apic_refresh(chip, cpu);
}

/* Without KVM_CAP_X2APIC_API the struct has an x2APIC's ID in bits 31:24, as an xAPIC's. */
void irqchip_get_lapic(struct irqchip *chip, unsigned cpu, struct kvm_lapic_state *state, uint64_t now)
{
    const struct lapic *a = &chip->cpu[cpu];
    unsigned number;
    uint32_t value;

    irqchip_advance(chip, now);
    memset(state, 0, sizeof *state);
    for (number = 0; number < REGISTERS; number++) {
        value = read_register(chip, cpu, number);
        if (number == ID && is_x2apic(a))
            value <<= 24;
        memcpy(state->regs + 16 * number, &value, sizeof value);
    }
}

int irqchip_set_lapic(struct irqchip *chip, unsigned cpu, const struct kvm_lapic_state *state, uint64_t now)
{
    struct lapic *a = &chip->cpu[cpu];
    uint32_t reg[REGISTERS];
    unsigned number;

    for (number = 0; number < REGISTERS; number++)
        memcpy(&reg[number], state->regs + 16 * number, sizeof reg[number]);
    if (is_x2apic(a) && reg[ID] != a->id << 24)
        return -EINVAL;
    irqchip_advance(chip, now);
    memcpy(a->reg, reg, sizeof reg);
    a->reg[VERSION] = VERSION_VALUE;
    a->errors = 0;
    a->tsc_deadline = 0;
    if (is_x2apic(a))
        set_x2apic_id(a);
    if (timer_mode(a) == PERIODIC && !reg[TIMER_CURRENT])
        load_timer(chip, a, reg[TIMER_INITIAL]);
    else
        load_timer(chip, a, reg[TIMER_CURRENT]);
    a->reg[TIMER_CURRENT] = 0;
    apic_refresh(chip, cpu);
    return 0;
}

/* --- What the struct lacks ---------------------------------------------------------------------------- */

void irqchip_get_lapic_rest(struct irqchip *chip, unsigned cpu, struct irqchip_lapic_rest *rest, uint64_t now)
{
    const struct lapic *a = &chip->cpu[cpu];

    irqchip_advance(chip, now);
    *rest = (struct irqchip_lapic_rest){
        .timer_left = a->timer_due == IRQCHIP_NEVER ? IRQCHIP_NEVER : a->timer_due - chip->now,
        .errors = a->errors,
        .events = a->events,
        .sipi_vector = a->sipi_vector,
    };
}

bool irqchip_lapic_rest_is_valid(const struct irqchip_lapic_rest *rest)
{
    const unsigned events = IRQCHIP_EVENT_NMI | IRQCHIP_EVENT_INIT | IRQCHIP_EVENT_SIPI;
    const uint32_t errors = ERROR_SEND_VECTOR | ERROR_RECEIVE_VECTOR | ERROR_REGISTER;

    return !(rest->events & ~events) && !(rest->errors & ~errors) && !rest->reserved;
}

void irqchip_set_lapic_rest(struct irqchip *chip, unsigned cpu, const struct irqchip_lapic_rest *rest, uint64_t now)
{
    struct lapic *a = &chip->cpu[cpu];

    irqchip_advance(chip, now);
    a->errors = rest->errors;
    set_events(a, rest->events);
    a->sipi_vector = rest->sipi_vector;
    start_timer(chip, a, rest->timer_left == IRQCHIP_NEVER ? IRQCHIP_NEVER : add_saturating(chip->now, rest->timer_left));
}

void apic_move_time(struct lapic *a, int64_t by)
{
    if (a->timer_due != IRQCHIP_NEVER)
        a->timer_due += (uint64_t)by;
}
