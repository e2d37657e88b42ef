/* The inline functions of irqchip.h under names that ctypes can load. */
#include "irqchip.h"

uint64_t shim_next_deadline(const struct irqchip *chip)
{
    return irqchip_next_deadline(chip);
}

void shim_advance(struct irqchip *chip, uint64_t now)
{
    irqchip_advance(chip, now);
}

int shim_pending(const struct irqchip *chip, unsigned cpu)
{
    return irqchip_pending(chip, cpu);
}

uint8_t shim_events(const struct irqchip *chip, unsigned cpu)
{
    return irqchip_events(chip, cpu);
}

uint8_t shim_sipi_vector(const struct irqchip *chip, unsigned cpu)
{
    return chip->cpu[cpu].sipi_vector;
}

uint64_t shim_now(const struct irqchip *chip)
{
    return chip->now;
}

void shim_set_features(struct irqchip *chip, bool x2apic, bool tsc_deadline, uint8_t physical_bits)
{
    irqchip_set_features(chip, (struct irqchip_features){x2apic, tsc_deadline, physical_bits});
}
