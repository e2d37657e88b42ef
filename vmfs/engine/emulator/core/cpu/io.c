/* What devices of the core claim, and those of the bus: ports, memory, interrupts. Everything else becomes an exit. */
#include "bus.h"
#include "irqchip.h"
#include "memory.h"

/* What the access may have changed for other CPUs and for the next timer is looked at after the instruction: IN and OUT end
 * their block, and a store to a device of the core runs alone. */

/* ---- The bus -------------------------------------------------------------------------------------------------------------------- */

static u64 bus_now(void *context)
{
    struct vcpu *c = context;
    return core_now(c, c->now) + (u64)c->vm->clock_offset;
}

static bool ask_bus(struct vcpu *c, struct bus_access *a)
{
    struct fast_bus *bus = c->vm->bus;
    if (!bus)
        return false;
    a->rip = ip_of(c, c->now) + (a->write ? c->now->length : 0);
    a->now = bus_now;
    a->context = c;
    if (!bus->access(bus, a))
        return false;
    if (unlikely(a->unclaimed))
        stops_reach_unclaimed(c, a->address);
    return true;
}

/* A line that it raises asks for attention, which the next block sees; of timers only the main loop knows. */
static enum answer ask_bus_port(struct vcpu *c, struct bus_access *a)
{
    struct fast_bus *bus = c->vm->bus;
    u64 due = bus ? atomic_load_explicit(&bus->due, memory_order_relaxed) : 0;
    if (!ask_bus(c, a))
        return ANSWER_NONE;
    if (atomic_load_explicit(&bus->due, memory_order_relaxed) == due)
        return ANSWER_PLAIN;
    wake_keeper(c->vm, c);
    return ANSWER_LOOK;
}

static bool ask_bus_memory(struct vcpu *c, u64 physical, unsigned size, bool write, u64 *value)
{
    struct bus_access a = {.memory = true, .write = write, .size = (u8)size, .address = physical, .value = write ? *value : 0};
    if (size & (size - 1) || !ask_bus(c, &a))
        return false;
    if (!write)
        *value = a.value;
    return true;
}

/* ---- Ports, a byte each --------------------------------------------------------------------------------------------------- */

static bool owns_ports(const struct irqchip *chip, u16 port, unsigned size)
{
    for (unsigned i = 0; i < size; i++)
        if (!irqchip_owns_port(chip, (u16)(port + i)))
            return false;
    return true;
}

enum answer io_read(struct vcpu *c, u16 port, unsigned size, u32 *value)
{
    struct irqchip *chip = c->vm->irqchip;
    if (!chip || !owns_ports(chip, port, size)) {
        struct bus_access a = {.size = (u8)size, .address = port};
        enum answer answer = ask_bus_port(c, &a);
        *value = (u32)a.value;
        return answer;
    }
    u64 now = core_now(c, c->now);
    *value = 0;
    chips_lock(c->vm);
    for (unsigned i = 0; i < size; i++) {
        u8 byte = 0;
        irqchip_read_port(chip, (u16)(port + i), &byte, now);
        *value |= (u32)byte << 8 * i;
    }
    chips_unlock(c->vm);
    return ANSWER_LOOK;
}

enum answer io_write(struct vcpu *c, u16 port, unsigned size, u32 value)
{
    struct irqchip *chip = c->vm->irqchip;
    if (!chip || !owns_ports(chip, port, size))
        return ask_bus_port(c, &(struct bus_access){.write = true, .size = (u8)size, .address = port, .value = value});
    u64 now = core_now(c, c->now);
    chips_lock(c->vm);
    u64 due = chip->pit.due;
    for (unsigned i = 0; i < size; i++)
        irqchip_write_port(chip, (u16)(port + i), (u8)(value >> 8 * i), now);
    bool sooner = chip->pit.due < due;
    chips_unlock(c->vm);
    chip_notify(c);
    if (sooner)
        wake_keeper(c->vm, c);
    return ANSWER_LOOK;
}

u64 io_string(struct vcpu *c, bool write, u16 port, unsigned size, u64 count, u8 *data)
{
    struct fast_bus *bus = c->vm->bus;
    if (!bus || (c->vm->irqchip && owns_ports(c->vm->irqchip, port, size)))
        return 0;
    return bus->string(bus, write, port, size, (u32)count, data);
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

bool bus_memory(struct vcpu *c, u64 physical, unsigned size, bool write, u64 *value)
{
    u32 offset;
    return c->vm->bus && find_device(c, physical, &offset) == DEVICE_NONE && ask_bus_memory(c, physical, size, write, value);
}

bool mmio_read(struct vcpu *c, u64 physical, unsigned size, u64 *value)
{
    u32 offset = 0;
    unsigned device = find_device(c, physical, &offset);
    if (device == DEVICE_NONE)
        return ask_bus_memory(c, physical, size, false, value);
    u64 now = core_now(c, c->now);
    chips_lock(c->vm);
    *value = device == DEVICE_LAPIC ? irqchip_lapic_read(c->vm->irqchip, c->index, offset, size, now)
                                    : irqchip_ioapic_read(c->vm->irqchip, offset, size);
    chips_unlock(c->vm);
    return true;
}

bool mmio_write(struct vcpu *c, u64 physical, unsigned size, u64 value)
{
    u32 offset = 0;
    unsigned device = find_device(c, physical, &offset);
    if (device == DEVICE_NONE)
        return ask_bus_memory(c, physical, size, true, &value);
    u64 now = core_now(c, c->now);
    chips_lock(c->vm);
    if (device == DEVICE_LAPIC)
        irqchip_lapic_write(c->vm->irqchip, c->index, offset, size, (u32)value, now);
    else
        irqchip_ioapic_write(c->vm->irqchip, offset, size, value, now);
    chips_unlock(c->vm);
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
    if (vector < 0) {
        chips_lock(c->vm);
        vector = irqchip_acknowledge(c->vm->irqchip, c->index);
        chips_unlock(c->vm);
        return vector;
    }
    atomic_fetch_add(&c->queue_head, 1);
    return vector;
}
