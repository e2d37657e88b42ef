/*
 * The PC's interrupt controllers and timers: one local APIC per CPU, an I/O APIC, two 8259s and an 8254,
 * with the state structs of KVM_CREATE_IRQCHIP and KVM_CREATE_PIT2.
 *
 * Time.  Every `now` is in nanoseconds of one virtual clock that never runs backwards; an earlier `now` than
 * the last one counts as the last one.  Rates: the 8254 counts 1,193,182 Hz; the local APIC timer counts a
 * 1 GHz bus (KVM's KVM_CAP_X86_APIC_BUS_CYCLES_NS default of 1 ns) over its divider; the TSC runs at the rate
 * of irqchip_set_tsc.  Every due time is computed from the time the count was loaded, so nothing drifts.
 *
 * Calls.  There are no callbacks.  The core asks irqchip_pending (a load and a compare) between instructions,
 * bounds its instruction budget by irqchip_next_deadline, and calls irqchip_advance when that time has come.
 * Nothing here locks: the caller serialises all calls on one chip, but for irqchip_pending, irqchip_events and
 * irqchip_next_deadline.
 *
 * Departures from hardware, all as KVM has them:
 * - I/O APIC pin polarity is stored and ignored (a level of 1 is always "asserted"); its messages of mode
 *   ExtINT and remote read, and SMIs, are dropped; its version is 0x11, so there is no EOI register.
 * - Lowest priority delivery takes the (vector modulo n)-th of the n CPUs that match.
 * - The 8259's SNGL and LTIM bits are ignored: there are always two, and the ELCR chooses edge or level.
 * - The APIC ID is writable in xAPIC mode; arbitration priority and remote read are not there.
 */
#ifndef VMFS_IRQCHIP_H
#define VMFS_IRQCHIP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <linux/kvm.h>

#define IRQCHIP_NEVER UINT64_MAX
#define IRQCHIP_MAX_CPUS 255u
#define IRQCHIP_GSIS 24u
#define IRQCHIP_NO_PIN 0xffu

#define IRQCHIP_TSC_HZ_DEFAULT UINT64_C(1000000000)

/* What the local APIC tells the core beside vectors; irqchip_take_events hands them over. */
enum irqchip_event {
    IRQCHIP_EVENT_NMI = 1 << 0,
    IRQCHIP_EVENT_INIT = 1 << 1,
    IRQCHIP_EVENT_SIPI = 1 << 2, /* the vector is in lapic.sipi_vector; it is later than a pending INIT */
};

/* What drives a GSI line; the line is the OR of its drivers. */
enum irqchip_source { IRQCHIP_SOURCE_USER, IRQCHIP_SOURCE_PIT };

/* The inputs of a local APIC's vector table that something outside it can raise. */
enum irqchip_lvt { IRQCHIP_LVT_THERMAL, IRQCHIP_LVT_PERFORMANCE, IRQCHIP_LVT_LINT0, IRQCHIP_LVT_LINT1 };

struct lapic {
    uint32_t reg[KVM_APIC_REG_SIZE / 16]; /* the register at offset 16 * i of the APIC page */
    uint64_t base;                        /* IA32_APIC_BASE */
    uint32_t id;                          /* the CPU's number and initial APIC ID */
    uint32_t errors;                      /* found since the last write to ESR */
    uint64_t timer_due;                   /* ns, or IRQCHIP_NEVER */
    uint64_t tsc_deadline;                /* IA32_TSC_DEADLINE; 0 is disarmed */
    uint64_t tsc_hz;
    uint64_t tsc_offset;                  /* TSC = offset + time * hz, modulo 2^64 */
    int16_t deliverable;                  /* what irqchip_pending answers */
    uint8_t events;                       /* enum irqchip_event */
    uint8_t sipi_vector;
};

struct ioapic {
    struct kvm_ioapic_state state;
    uint32_t delivered; /* edges in state.irr that became messages */
};

struct pic {
    struct kvm_pic_state chip[2]; /* master, slave */
    bool output;                  /* the master's INT pin */
};

struct pit_channel {
    struct kvm_pit_channel_state state; /* count_load_time: since when, in ns; INT64_MAX: not counting */
    bool mode_bit2;                     /* the control word said mode 6 or 7, which are 2 and 3 */
    uint32_t next_count;                /* written while counting, in use from switch_time on; else 0 */
    int64_t next_load;
    int64_t switch_time;                /* when next_count takes over */
    uint64_t held;                      /* ticks counted when a low gate stopped the counter */
    uint64_t seen;                      /* ticks whose OUT edges were signalled (channel 0) */
};

struct pit {
    struct pit_channel channel[3];
    uint32_t flags; /* KVM_PIT_FLAGS_HPET_LEGACY */
    bool present;
    bool speaker_port; /* port 0x61 is here (KVM_PIT_SPEAKER_DUMMY) */
    bool speaker_data;
    uint64_t due; /* ns of channel 0's next rising edge, or IRQCHIP_NEVER */
};

struct irqchip_route {
    uint8_t pic;    /* 0-15, or IRQCHIP_NO_PIN */
    uint8_t ioapic; /* 0-23, or IRQCHIP_NO_PIN */
};

/* What the CPUs' CPUID promises, for the reserved bits of MSRs. */
struct irqchip_features {
    bool x2apic;
    bool tsc_deadline;
    uint8_t physical_bits; /* 32-52 */
};

struct irqchip {
    unsigned cpus;
    struct lapic *cpu;
    struct irqchip_features features;
    struct ioapic ioapic;
    struct pic pic;
    struct pit pit;
    uint64_t now;
    uint64_t next_due;
    uint8_t line[IRQCHIP_GSIS]; /* a bit a driver */
    struct irqchip_route route[IRQCHIP_GSIS];
};

/* --- State without a struct of KVM's --- */
/* What else decides what the chip does next. Times are counted from `now`; layouts are part of saved machines. */

#define IRQCHIP_NOT_COUNTING INT64_C(-1)

struct irqchip_pit_rest {
    uint32_t count, next_count; /* struct pit_channel */
    int64_t since;              /* ns that it has counted, or IRQCHIP_NOT_COUNTING */
    int64_t next_load, switch_time; /* after now; the latter INT64_MAX: at the next trigger */
    uint64_t held, seen;
};

struct irqchip_rest {
    uint8_t line[IRQCHIP_GSIS];
    uint32_t delivered;         /* struct ioapic */
    uint32_t reserved;
    struct irqchip_pit_rest channel[3];
};

struct irqchip_lapic_rest {
    uint64_t timer_left;        /* ns, or IRQCHIP_NEVER */
    uint32_t errors;
    uint8_t events, sipi_vector;
    uint16_t reserved;
};

/* --- Life --------------------------------------------------------------------------------------------- */

/* A chip for 1..IRQCHIP_MAX_CPUS CPUs in reset state with the 8254 present; NULL without memory or out
 * of range. */
struct irqchip *irqchip_create(unsigned cpus);
void irqchip_destroy(struct irqchip *chip);
/* Power-on reset of all parts, as KVM creates them; routing, features, TSC and `speaker_port` stay. */
void irqchip_reset(struct irqchip *chip, uint64_t now);
/* As KVM_CREATE_PIT2: `flags` of struct kvm_pit_config; without KVM_PIT_SPEAKER_DUMMY port 0x61 is not
 * claimed. */
void irqchip_create_pit(struct irqchip *chip, uint32_t flags, uint64_t now);
void irqchip_remove_pit(struct irqchip *chip);
void irqchip_set_features(struct irqchip *chip, struct irqchip_features features);
/* One GSI's pins.  The default is KVM's: GSI n to I/O APIC pin n, and to 8259 input n below 16.  A PC whose
 * MADT overrides IRQ 0 to GSI 2 wants (0, 0, 2) and (2, IRQCHIP_NO_PIN, IRQCHIP_NO_PIN).
 * 0, or -EINVAL for a number out of range or a pin that another GSI drives. */
int irqchip_set_route(struct irqchip *chip, unsigned gsi, unsigned pic, unsigned ioapic);

/* --- Time --------------------------------------------------------------------------------------------- */

static inline uint64_t irqchip_next_deadline(const struct irqchip *chip)
{
    return __atomic_load_n(&chip->next_due, __ATOMIC_RELAXED);
}

void irqchip_advance_slow(struct irqchip *chip, uint64_t now);

/* Let every timer event up to and including `now` happen. */
static inline void irqchip_advance(struct irqchip *chip, uint64_t now)
{
    if (now >= chip->next_due)
        irqchip_advance_slow(chip, now);
    else if (now > chip->now)
        chip->now = now;
}

/* A CPU's TSC: value = offset + time * hz / 1e9 rounded down.  hz is at least 1. */
void irqchip_set_tsc(struct irqchip *chip, unsigned cpu, uint64_t hz, uint64_t offset);
uint64_t irqchip_tsc(const struct irqchip *chip, unsigned cpu, uint64_t now);

/* --- Lines and messages ------------------------------------------------------------------------------- */

/* As KVM_IRQ_LINE.  0, or -EINVAL for a GSI of 24 or more. */
int irqchip_set_gsi(struct irqchip *chip, unsigned gsi, bool level);
/* As KVM_SIGNAL_MSI: the number of CPUs that took it. */
int irqchip_msi(struct irqchip *chip, uint64_t address, uint32_t data);
/* A local interrupt of one CPU (LINT1 is a PC's NMI line): delivered as that LVT entry says.  True if it
 * was. */
bool irqchip_local(struct irqchip *chip, unsigned cpu, enum irqchip_lvt input);

/* --- What a CPU asks ---------------------------------------------------------------------------------- */

/* The vector that irqchip_acknowledge would return, or -1: nothing to deliver. */
static inline int irqchip_pending(const struct irqchip *chip, unsigned cpu)
{
    return __atomic_load_n(&chip->cpu[cpu].deliverable, __ATOMIC_RELAXED); /* without a lock, too */
}

/* The INTA cycle: moves the vector into service and returns it; -1 if nothing is pending.
 * An 8259 at LINT0 (mode ExtINT, or an APIC disabled globally) goes first. */
int irqchip_acknowledge(struct irqchip *chip, unsigned cpu);

static inline uint8_t irqchip_events(const struct irqchip *chip, unsigned cpu)
{
    return __atomic_load_n(&chip->cpu[cpu].events, __ATOMIC_RELAXED);
}

/* Whether a pin or a local interrupt is set up to send an NMI or an INIT, which no EFLAGS.IF keeps back. */
bool irqchip_can_send_unmaskable(const struct irqchip *chip);

/* Hands over and clears the events named in `which`. */
uint8_t irqchip_take_events(struct irqchip *chip, unsigned cpu, uint8_t which);
/* The local APIC's part of an INIT (SDM 3A 11.4.7.3): registers as after reset, ID and IA32_APIC_BASE
 * kept. */
void irqchip_init_cpu(struct irqchip *chip, unsigned cpu);
uint64_t irqchip_get_cr8(const struct irqchip *chip, unsigned cpu);
void irqchip_set_cr8(struct irqchip *chip, unsigned cpu, uint64_t value); /* bits 3:0 are used */

/* --- Registers ---------------------------------------------------------------------------------------- */

/* Ports 0x20 0x21 0xa0 0xa1 0x4d0 0x4d1, and with a PIT 0x40-0x43 and, if configured, 0x61; single bytes.
 * False: the port is not this chip's. */
bool irqchip_owns_port(const struct irqchip *chip, uint16_t port);
bool irqchip_read_port(struct irqchip *chip, uint16_t port, uint8_t *value, uint64_t now);
bool irqchip_write_port(struct irqchip *chip, uint16_t port, uint8_t value, uint64_t now);

/* The page at IA32_APIC_BASE, if irqchip_lapic_mapped says that the CPU has one there (xAPIC mode).
 * Reads of 1, 2 or 4 bytes within a register's first four; writes of 4 aligned to 16.  Others read 0 and
 * are ignored. */
bool irqchip_lapic_mapped(const struct irqchip *chip, unsigned cpu, uint64_t *address);
uint32_t irqchip_lapic_read(struct irqchip *chip, unsigned cpu, uint32_t offset, unsigned size, uint64_t now);
void irqchip_lapic_write(struct irqchip *chip, unsigned cpu, uint32_t offset, unsigned size, uint32_t value,
                         uint64_t now);

/* IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0), x2APIC (0x800-0x8ff).  0, or -1: #GP(0). */
bool irqchip_owns_msr(uint32_t msr);
int irqchip_read_msr(struct irqchip *chip, unsigned cpu, uint32_t msr, uint64_t *value, uint64_t now);
int irqchip_write_msr(struct irqchip *chip, unsigned cpu, uint32_t msr, uint64_t value, uint64_t now);

/* The page at irqchip_ioapic_base (0xfec00000): index at 0x00, window at 0x10.  Sizes 1, 2, 4, 8. */
uint64_t irqchip_ioapic_base(const struct irqchip *chip);
uint64_t irqchip_ioapic_read(struct irqchip *chip, uint32_t offset, unsigned size);
void irqchip_ioapic_write(struct irqchip *chip, uint32_t offset, unsigned size, uint64_t value, uint64_t now);

/* --- State, in KVM's structs -------------------------------------------------------------------------- */
/* Setters return 0 or -EINVAL, and then nothing has changed. */

/* KVM_GET_LAPIC: APIC_TMCCT is the current count.  Not in the struct: errors not yet latched into ESR. */
void irqchip_get_lapic(struct irqchip *chip, unsigned cpu, struct kvm_lapic_state *state, uint64_t now);
/* KVM_SET_LAPIC; set IA32_APIC_BASE first.  -EINVAL in x2APIC mode if the ID is not the CPU's (bits
 * 31:24, as without KVM_CAP_X2APIC_API).  A one-shot timer with a current count of 0 has fired and does
 * not fire again. */
int irqchip_set_lapic(struct irqchip *chip, unsigned cpu, const struct kvm_lapic_state *state, uint64_t now);
/* As kvm_sregs.apic_base: no transition rules.  -EINVAL for reserved bits or x2APIC without enable. */
int irqchip_set_apic_base(struct irqchip *chip, unsigned cpu, uint64_t value, uint64_t now);

/* KVM_GET_IRQCHIP, KVM_SET_IRQCHIP; chip_id of the struct selects KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or
 * _IOAPIC. */
int irqchip_get_chip(struct irqchip *chip, struct kvm_irqchip *state);
int irqchip_set_chip(struct irqchip *chip, const struct kvm_irqchip *state);

/* KVM_GET_PIT2, KVM_SET_PIT2.  count_load_time is in this chip's `now`; INT64_MAX is "not counting yet".
 * With `restart` it is ignored and every counter starts afresh, as KVM_SET_PIT2 does: for another engine's
 * state.  Not in the struct: OUT of a mode 3 counter whose next count waits, and in modes 1 and 5 the count
 * under way where the next one waits for its trigger. */
void irqchip_get_pit(struct irqchip *chip, struct kvm_pit_state2 *state, uint64_t now);
int irqchip_set_pit(struct irqchip *chip, const struct kvm_pit_state2 *state, bool restart, uint64_t now);

/* The rest of the machine's chips: set it after KVM's structs, which it completes. -EINVAL, and nothing has changed. */
void irqchip_get_rest(struct irqchip *chip, struct irqchip_rest *rest, uint64_t now);
int irqchip_set_rest(struct irqchip *chip, const struct irqchip_rest *rest, uint64_t now);
/* The rest of a local APIC, after its struct and its MSRs. */
void irqchip_get_lapic_rest(struct irqchip *chip, unsigned cpu, struct irqchip_lapic_rest *rest, uint64_t now);
bool irqchip_lapic_rest_is_valid(const struct irqchip_lapic_rest *rest);
void irqchip_set_lapic_rest(struct irqchip *chip, unsigned cpu, const struct irqchip_lapic_rest *rest, uint64_t now);
/* The clock was set from `before`, when the chip may have been asked last long ago, to `now`: for the chip no time has passed. The
 * TSCs are the caller's. */
void irqchip_move_time(struct irqchip *chip, uint64_t before, uint64_t now);

#endif
