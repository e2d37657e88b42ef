/* What devices of the core claim: ports, memory, interrupts. Everything else becomes an exit. */
#include "irqchip.h"
#include "memory.h"

/* What the access may have changed for other CPUs and for the next timer is looked at behind the instruction: IN and OUT end
 * their block, and a store to a device runs alone. */

/* ---- Ports, a byte each --------------------------------------------------------------------------------------------------- */

static bool owns_ports(const struct irqchip *chip, u16 port, unsigned size)
{
    for (unsigned i = 0; i < size; i++)
        if (!irqchip_owns_port(chip, (u16)(port + i)))
            return false;
    return true;
}

bool io_read(struct vcpu *c, u16 port, unsigned size, u32 *value)
{
    struct irqchip *chip = c->vm->irqchip;
    if (!chip || !owns_ports(chip, port, size))
        return false;
    u64 now = core_now(c, c->now);
    *value = 0;
    for (unsigned i = 0; i < size; i++) {
        u8 byte = 0;
        irqchip_read_port(chip, (u16)(port + i), &byte, now);
        *value |= (u32)byte << 8 * i;
    }
    return true;
}

bool io_write(struct vcpu *c, u16 port, unsigned size, u32 value)
{
    struct irqchip *chip = c->vm->irqchip;
    if (!chip || !owns_ports(chip, port, size))
        return false;
    u64 now = core_now(c, c->now);
    for (unsigned i = 0; i < size; i++)
        irqchip_write_port(chip, (u16)(port + i), (u8)(value >> 8 * i), now);
    chip_notify(c);
    return true;
}

/* ---- Memory -------------------------------------------------------------------------------------------------------------------- */

enum { DEVICE_NONE, DEVICE_LAPIC, DEVICE_IOAPIC, DEVICE_PAGE = 0x1000, IOAPIC_BYTES = 0x100 };

static unsigned find_device(struct vcpu *c, u64 physical, u32 *offset)
{
    struct irqchip *chip = c->vm->irqchip;
    u64 base;
    if (!chip)
        return DEVICE_NONE;
    if (irqchip_lapic_mapped(chip, c->index, &base) && physical - base < DEVICE_PAGE) {
        *offset = (u32)(physical - base);
        return DEVICE_LAPIC;
    }
    base = irqchip_ioapic_base(chip);
    if (physical - base < IOAPIC_BYTES) {
        *offset = (u32)(physical - base);
        return DEVICE_IOAPIC;
    }
    return DEVICE_NONE;
}

bool mmio_read(struct vcpu *c, u64 physical, unsigned size, u64 *value)
{
    u32 offset = 0;
    unsigned device = find_device(c, physical, &offset);
    if (device == DEVICE_NONE)
        return false;
    *value = device == DEVICE_LAPIC ? irqchip_lapic_read(c->vm->irqchip, c->index, offset, size, core_now(c, c->now))
                                    : irqchip_ioapic_read(c->vm->irqchip, offset, size);
    return true;
}

bool mmio_write(struct vcpu *c, u64 physical, unsigned size, u64 value)
{
    u32 offset = 0;
    unsigned device = find_device(c, physical, &offset);
    if (device == DEVICE_NONE)
        return false;
    u64 now = core_now(c, c->now);
    if (device == DEVICE_LAPIC)
        irqchip_lapic_write(c->vm->irqchip, c->index, offset, size, (u32)value, now);
    else
        irqchip_ioapic_write(c->vm->irqchip, offset, size, value, now);
    chip_notify(c);
    return true;
}

/* ---- Interrupts ------------------------------------------------------------------------------------------------------------------ */

int queued_vector(struct vcpu *c)
{
    u32 head = atomic_load(&c->queue_head);
    return head != atomic_load(&c->queue_tail) ? c->queue[head % INTERRUPT_QUEUE] : -1;
}

int pending_vector(struct vcpu *c)
{
    int vector = queued_vector(c);
    return vector < 0 && c->vm->irqchip ? irqchip_pending(c->vm->irqchip, c->index) : vector;
}

int acknowledge(struct vcpu *c)
{
    int vector = queued_vector(c);
    if (vector < 0)
        return irqchip_acknowledge(c->vm->irqchip, c->index);
    atomic_fetch_add(&c->queue_head, 1);
    return vector;
}
