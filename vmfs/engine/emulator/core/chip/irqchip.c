/* The interrupt chip as a whole: its life, its clock, the wiring of lines, messages and ports to its
 * parts. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "irqchip_internal.h"

#define PIC_PINS 16u

/* --- Life --------------------------------------------------------------------------------------------- */

struct irqchip *irqchip_create(unsigned cpus)
{
    struct irqchip *chip;
    unsigned i;

    if (cpus < 1 || cpus > IRQCHIP_MAX_CPUS)
        return NULL;
    chip = calloc(1, sizeof *chip);
    if (!chip)
        return NULL;
    chip->cpu = calloc(cpus, sizeof *chip->cpu);
    if (!chip->cpu) {
        free(chip);
        return NULL;
    }
    chip->cpus = cpus;
    chip->features = (struct irqchip_features){.x2apic = true, .tsc_deadline = true, .physical_bits = 46};
    chip->pit.present = true;
    chip->pit.speaker_port = true;
    for (i = 0; i < IRQCHIP_GSIS; i++)
        chip->route[i] = (struct irqchip_route){.pic = i < PIC_PINS ? i : IRQCHIP_NO_PIN, .ioapic = i};
    for (i = 0; i < cpus; i++)
        chip->cpu[i].tsc_hz = IRQCHIP_TSC_HZ_DEFAULT;
    irqchip_reset(chip, 0);
    return chip;
}

void irqchip_destroy(struct irqchip *chip)
{
    if (chip)
        free(chip->cpu);
    free(chip);
}

void irqchip_reset(struct irqchip *chip, uint64_t now)
{
    unsigned cpu;

    if (now > chip->now)
        chip->now = now;
    memset(chip->line, 0, sizeof chip->line);
    for (cpu = 0; cpu < chip->cpus; cpu++)
        apic_reset(chip, cpu);
    ioapic_reset(&chip->ioapic);
    pic_reset(chip);
    pit_reset(chip);
}

void irqchip_create_pit(struct irqchip *chip, uint32_t flags, uint64_t now)
{
    irqchip_advance(chip, now);
    chip->pit.present = true;
    chip->pit.speaker_port = flags & KVM_PIT_SPEAKER_DUMMY;
    pit_reset(chip);
}

void irqchip_remove_pit(struct irqchip *chip)
{
    chip->pit.present = false;
    pit_reset(chip);
}

void irqchip_set_features(struct irqchip *chip, struct irqchip_features features)
{
    chip->features = features;
}

/* --- Time --------------------------------------------------------------------------------------------- */

void irqchip_reschedule(struct irqchip *chip)
{
    uint64_t due = chip->pit.due;
    unsigned cpu;

    for (cpu = 0; cpu < chip->cpus; cpu++)
        if (chip->cpu[cpu].timer_due < due)
            due = chip->cpu[cpu].timer_due;
    __atomic_store_n(&chip->next_due, due, __ATOMIC_RELAXED);
}

void irqchip_advance_slow(struct irqchip *chip, uint64_t now)
{
    unsigned cpu;

    if (now > chip->now)
        chip->now = now;
    pit_advance(chip);
    for (cpu = 0; cpu < chip->cpus; cpu++)
        apic_advance(chip, cpu);
    irqchip_reschedule(chip);
}

/* --- Ways to a CPU with interrupts off ---------------------------------------------------------------- */

bool irqchip_can_send_unmaskable(const struct irqchip *chip)
{
    unsigned cpu;

    for (cpu = 0; cpu < chip->cpus; cpu++)
        if (apic_can_send_unmaskable(&chip->cpu[cpu]))
            return true;
    return ioapic_can_send_unmaskable(&chip->ioapic);
}

/* --- Lines and messages ------------------------------------------------------------------------------- */

int irqchip_set_route(struct irqchip *chip, unsigned gsi, unsigned pic, unsigned ioapic)
{
    unsigned i;

    if (gsi >= IRQCHIP_GSIS || (pic >= PIC_PINS && pic != IRQCHIP_NO_PIN) ||
        (ioapic >= KVM_IOAPIC_NUM_PINS && ioapic != IRQCHIP_NO_PIN))
        return -EINVAL;
    for (i = 0; i < IRQCHIP_GSIS; i++) {
        if (i == gsi)
            continue;
        if ((pic != IRQCHIP_NO_PIN && chip->route[i].pic == pic) ||
            (ioapic != IRQCHIP_NO_PIN && chip->route[i].ioapic == ioapic))
            return -EINVAL;
    }
    chip->route[gsi] = (struct irqchip_route){.pic = (uint8_t)pic, .ioapic = (uint8_t)ioapic};
    return 0;
}

void irqchip_drive(struct irqchip *chip, unsigned gsi, enum irqchip_source source, bool level)
{
    uint8_t bit = (uint8_t)(1u << source);
    bool high;

    chip->line[gsi] = level ? chip->line[gsi] | bit : chip->line[gsi] & ~bit;
    high = chip->line[gsi];
    if (chip->route[gsi].pic != IRQCHIP_NO_PIN)
        pic_set_pin(chip, chip->route[gsi].pic, high);
    if (chip->route[gsi].ioapic != IRQCHIP_NO_PIN)
        ioapic_set_pin(chip, chip->route[gsi].ioapic, high);
}

int irqchip_set_gsi(struct irqchip *chip, unsigned gsi, bool level)
{
    if (gsi >= IRQCHIP_GSIS)
        return -EINVAL;
    irqchip_drive(chip, gsi, IRQCHIP_SOURCE_USER, level);
    return 0;
}

/* SDM 3A 11.11: message address and data. */
int irqchip_msi(struct irqchip *chip, uint64_t address, uint32_t data)
{
    struct apic_message message = {
        .destination = address >> 12 & 0xff,
        .vector = (uint8_t)data,
        .mode = data >> 8 & 7,
        .logical = address & 4,
        .lowest = address & 8,
        .level_triggered = data & 1u << 15,
        .assert = true,
    };

    return apic_send(chip, APIC_FROM_DEVICE, &message);
}

/* --- Ports -------------------------------------------------------------------------------------------- */

typedef uint8_t port_reader(struct irqchip *chip, uint16_t port);
typedef void port_writer(struct irqchip *chip, uint16_t port, uint8_t value);

static const struct port_range {
    uint16_t first, last;
    bool needs_pit, needs_speaker;
    port_reader *read;
    port_writer *write;
} ports[] = {
    {0x20, 0x21, false, false, pic_read_port, pic_write_port},
    {0xa0, 0xa1, false, false, pic_read_port, pic_write_port},
    {0x4d0, 0x4d1, false, false, pic_read_port, pic_write_port},
    {0x40, 0x43, true, false, pit_read_port, pit_write_port},
    {0x61, 0x61, true, true, pit_read_port, pit_write_port},
};

static const struct port_range *find_port(const struct irqchip *chip, uint16_t port)
{
    size_t i;

    for (i = 0; i < sizeof ports / sizeof *ports; i++) {
        if (port < ports[i].first || port > ports[i].last)
            continue;
        if ((ports[i].needs_pit && !chip->pit.present) || (ports[i].needs_speaker && !chip->pit.speaker_port))
            return NULL;
        return &ports[i];
    }
    return NULL;
}

bool irqchip_owns_port(const struct irqchip *chip, uint16_t port)
{
    return find_port(chip, port);
}

bool irqchip_read_port(struct irqchip *chip, uint16_t port, uint8_t *value, uint64_t now)
{
    const struct port_range *range = find_port(chip, port);

    if (!range)
        return false;
    irqchip_advance(chip, now);
    *value = range->read(chip, port);
    return true;
}

bool irqchip_write_port(struct irqchip *chip, uint16_t port, uint8_t value, uint64_t now)
{
    const struct port_range *range = find_port(chip, port);

    if (!range)
        return false;
    irqchip_advance(chip, now);
    range->write(chip, port, value);
    return true;
}

/* --- State -------------------------------------------------------------------------------------------- */

int irqchip_get_chip(struct irqchip *chip, struct kvm_irqchip *state)
{
    memset(&state->chip, 0, sizeof state->chip);
    switch (state->chip_id) {
    case KVM_IRQCHIP_PIC_MASTER:
    case KVM_IRQCHIP_PIC_SLAVE:
        state->chip.pic = chip->pic.chip[state->chip_id];
        return 0;
    case KVM_IRQCHIP_IOAPIC:
        ioapic_get(&chip->ioapic, &state->chip.ioapic);
        return 0;
    }
    return -EINVAL;
}

int irqchip_set_chip(struct irqchip *chip, const struct kvm_irqchip *state)
{
    switch (state->chip_id) {
    case KVM_IRQCHIP_PIC_MASTER:
    case KVM_IRQCHIP_PIC_SLAVE:
        return pic_set(chip, state->chip_id, &state->chip.pic);
    case KVM_IRQCHIP_IOAPIC:
        return ioapic_set(chip, &state->chip.ioapic);
    }
    return -EINVAL;
}

/* --- What the structs lack ---------------------------------------------------------------------------- */

void irqchip_get_rest(struct irqchip *chip, struct irqchip_rest *rest, uint64_t now)
{
    irqchip_advance(chip, now);
    memset(rest, 0, sizeof *rest);
    memcpy(rest->line, chip->line, sizeof rest->line);
    rest->delivered = chip->ioapic.delivered;
    pit_get_rest(chip, rest->channel);
}

int irqchip_set_rest(struct irqchip *chip, const struct irqchip_rest *rest, uint64_t now)
{
    const uint8_t drivers = 1u << IRQCHIP_SOURCE_USER | 1u << IRQCHIP_SOURCE_PIT;
    unsigned i;

    for (i = 0; i < IRQCHIP_GSIS; i++)
        if (rest->line[i] & ~drivers)
            return -EINVAL;
    if (rest->delivered >> IRQCHIP_GSIS || rest->reserved || !pit_rest_is_valid(rest->channel))
        return -EINVAL;
    irqchip_advance(chip, now);
    memcpy(chip->line, rest->line, sizeof chip->line);
    chip->ioapic.delivered = rest->delivered;
    chip->ioapic.state.irr |= rest->delivered;
    pit_set_rest(chip, rest->channel);
    return 0;
}

void irqchip_move_time(struct irqchip *chip, uint64_t before, uint64_t now)
{
    int64_t by = (int64_t)(now - before);
    unsigned cpu;

    chip->now = now; /* not what it was and `by`: a machine that stood still has not asked it since, and that may be before 0 */
    for (cpu = 0; cpu < chip->cpus; cpu++)
        apic_move_time(&chip->cpu[cpu], by);
    pit_move_time(chip, by);
}
