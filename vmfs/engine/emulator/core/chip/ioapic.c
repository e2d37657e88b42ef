/*
 * The I/O APIC: 24 pins (Intel 82093AA data sheet, order number 290566), with KVM's struct
 * kvm_ioapic_state.
 *
 * As KVM has it: version 0x11; polarity is stored and ignored; an edge that comes while its pin is masked
 * is lost; messages of mode ExtINT and remote read go nowhere (see apic.c); a level pin that nobody took
 * keeps no remote IRR; making a pin edge triggered clears its remote IRR.  KVM's delay of an interrupt that
 * was taken 10,000 times in a row is left out.
 */
#include <errno.h>
#include <string.h>

#include "irqchip_internal.h"

#define BASE UINT64_C(0xfec00000)
#define VERSION (0x11u | (KVM_IOAPIC_NUM_PINS - 1) << 16)
#define PINS_MASK ((1u << KVM_IOAPIC_NUM_PINS) - 1)

enum { REG_SELECT = 0x00, REG_WINDOW = 0x10 };                           /* offsets in the page */
enum { INDEX_ID = 0, INDEX_VERSION = 1, INDEX_ARBITRATION = 2, INDEX_REDIRECTION = 0x10 };

/* A redirection entry (data sheet 3.2.4). */
#define ENTRY_MODE(entry) ((entry) >> 8 & 7)
#define ENTRY_LOGICAL (UINT64_C(1) << 11)
#define ENTRY_STATUS (UINT64_C(1) << 12)
#define ENTRY_REMOTE_IRR (UINT64_C(1) << 14)
#define ENTRY_LEVEL (UINT64_C(1) << 15)
#define ENTRY_MASKED (UINT64_C(1) << 16)
#define ENTRY_READ_ONLY (ENTRY_STATUS | ENTRY_REMOTE_IRR)

/* Send the pin's message unless it may not. */
static void service(struct irqchip *chip, unsigned pin)
{
    struct ioapic *ioapic = &chip->ioapic;
    __u64 *entry = &ioapic->state.redirtbl[pin].bits;
    struct apic_message message = {
        .destination = *entry >> 56,
        .vector = (uint8_t)*entry,
        .mode = ENTRY_MODE(*entry),
        .logical = *entry & ENTRY_LOGICAL,
        .level_triggered = *entry & ENTRY_LEVEL,
        .assert = true,
    };

    if (*entry & ENTRY_MASKED)
        return;
    if (!message.level_triggered) {
        ioapic->delivered |= 1u << pin;
        apic_send(chip, APIC_FROM_DEVICE, &message);
    } else if (!(*entry & ENTRY_REMOTE_IRR)) {
        if (apic_send(chip, APIC_FROM_DEVICE, &message))
            *entry |= ENTRY_REMOTE_IRR;
    }
}

void ioapic_set_pin(struct irqchip *chip, unsigned pin, bool level)
{
    struct ioapic *ioapic = &chip->ioapic;
    uint32_t bit = 1u << pin;
    bool was = ioapic->state.irr & bit;

    if (!level) {
        ioapic->state.irr &= ~bit;
        ioapic->delivered &= ~bit;
        return;
    }
    ioapic->state.irr |= bit;
    if (!(ioapic->state.redirtbl[pin].bits & ENTRY_LEVEL)) {
        ioapic->delivered &= ~bit;
        if (was)
            return;
    }
    service(chip, pin);
}

/* A level interrupt ended at some local APIC: pins still asserted send again (data sheet 3.2.4, Remote
 * IRR). */
void ioapic_end_of_interrupt(struct irqchip *chip, uint8_t vector)
{
    struct kvm_ioapic_state *s = &chip->ioapic.state;
    unsigned pin;

    for (pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++) {
        __u64 *entry = &s->redirtbl[pin].bits;

        if ((uint8_t)*entry != vector || !(*entry & ENTRY_LEVEL))
            continue;
        *entry &= ~ENTRY_REMOTE_IRR;
        if (s->irr & 1u << pin)
            service(chip, pin);
    }
}

bool ioapic_can_send_unmaskable(const struct ioapic *ioapic)
{
    unsigned pin;

    for (pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++) {
        uint64_t entry = ioapic->state.redirtbl[pin].bits;

        if (!(entry & ENTRY_MASKED) && is_unmaskable(ENTRY_MODE(entry)))
            return true;
    }
    return false;
}

static void write_entry(struct irqchip *chip, unsigned pin, bool high, uint32_t value)
{
    struct kvm_ioapic_state *s = &chip->ioapic.state;
    uint64_t old = s->redirtbl[pin].bits, new;

    if (high) {
        new = (uint32_t)old | (uint64_t)value << 32;
    } else {
        new = (old & ~(uint64_t)UINT32_MAX) | value;
        new = (new & ~ENTRY_READ_ONLY) | (old & ENTRY_READ_ONLY);
    }
    /* Linux and Xen clear a stuck remote IRR by making the pin edge triggered for a moment. */
    if (!(new & ENTRY_LEVEL))
        new &= ~ENTRY_REMOTE_IRR;
    s->redirtbl[pin].bits = new;
    if (new & ENTRY_LEVEL && s->irr & 1u << pin)
        service(chip, pin);
}

static uint32_t read_window(const struct kvm_ioapic_state *s)
{
    unsigned pin = (s->ioregsel - INDEX_REDIRECTION) >> 1;

    switch (s->ioregsel) {
    case INDEX_ID:
    case INDEX_ARBITRATION:
        return (s->id & 15) << 24;
    case INDEX_VERSION:
        return VERSION;
    }
    if (pin >= KVM_IOAPIC_NUM_PINS) /* the reserved indices below 0x10 too */
        return UINT32_MAX;
    return (uint32_t)(s->redirtbl[pin].bits >> (s->ioregsel & 1 ? 32 : 0));
}

static void write_window(struct irqchip *chip, uint32_t value)
{
    struct kvm_ioapic_state *s = &chip->ioapic.state;
    unsigned pin = (s->ioregsel - INDEX_REDIRECTION) >> 1;

    if (s->ioregsel == INDEX_ID)
        s->id = value >> 24 & 15;
    else if (s->ioregsel >= INDEX_REDIRECTION && pin < KVM_IOAPIC_NUM_PINS)
        write_entry(chip, pin, s->ioregsel & 1, value);
}

uint64_t irqchip_ioapic_base(const struct irqchip *chip)
{
    return chip->ioapic.state.base_address;
}

uint64_t irqchip_ioapic_read(struct irqchip *chip, uint32_t offset, unsigned size)
{
    uint32_t value = 0;

    switch (offset & 0xff) {
    case REG_SELECT:
        value = chip->ioapic.state.ioregsel;
        break;
    case REG_WINDOW:
        value = read_window(&chip->ioapic.state);
        break;
    }
    return size >= 4 ? value : value & ((1u << 8 * size) - 1);
}

void irqchip_ioapic_write(struct irqchip *chip, uint32_t offset, unsigned size, uint64_t value, uint64_t now)
{
    uint32_t data = size >= 4 ? (uint32_t)value : (uint32_t)value & ((1u << 8 * size) - 1);

    irqchip_advance(chip, now);
    switch (offset & 0xff) {
    case REG_SELECT:
        chip->ioapic.state.ioregsel = data & 0xff;
        break;
    case REG_WINDOW:
        write_window(chip, data);
        break;
    }
}

void ioapic_reset(struct ioapic *ioapic)
{
    unsigned pin;

    memset(ioapic, 0, sizeof *ioapic);
    ioapic->state.base_address = BASE;
    for (pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++)
        ioapic->state.redirtbl[pin].bits = ENTRY_MASKED;
}

/* As KVM_GET_IRQCHIP: an edge that became a message is no longer a request. */
void ioapic_get(const struct ioapic *ioapic, struct kvm_ioapic_state *state)
{
    *state = ioapic->state;
    state->irr &= ~ioapic->delivered;
}

/* As KVM_SET_IRQCHIP: the requests in `irr` are raised again, and what is unmasked is sent. */
int ioapic_set(struct irqchip *chip, const struct kvm_ioapic_state *state)
{
    struct ioapic *ioapic = &chip->ioapic;
    unsigned pin;

    if (state->base_address != BASE || state->ioregsel > 0xff || state->id > 15 || state->irr & ~PINS_MASK)
        return -EINVAL;
    ioapic->state = *state;
    ioapic->state.irr = 0;
    ioapic->delivered = 0;
    for (pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++)
        if (state->irr & 1u << pin)
            ioapic_set_pin(chip, pin, true);
    return 0;
}
