/* What the parts of the interrupt chip say to each other; nothing outside includes this. */
#ifndef VMFS_IRQCHIP_INTERNAL_H
#define VMFS_IRQCHIP_INTERNAL_H

#include "irqchip.h"

/* Delivery modes, in bits 10:8 of an LVT, an ICR, a redirection entry and MSI data (SDM 3A 11.6.1). */
enum delivery_mode {
    DELIVER_FIXED = 0,
    DELIVER_LOWEST = 1,
    DELIVER_SMI = 2,
    DELIVER_REMOTE_READ = 3,
    DELIVER_NMI = 4,
    DELIVER_INIT = 5,
    DELIVER_STARTUP = 6,
    DELIVER_EXTINT = 7,
};

static inline bool is_unmaskable(enum delivery_mode mode)
{
    return mode == DELIVER_NMI || mode == DELIVER_INIT;
}

enum shorthand { TO_DESTINATION, TO_SELF, TO_ALL, TO_OTHERS };

struct apic_message {
    uint32_t destination;
    uint8_t vector;
    uint8_t mode; /* enum delivery_mode */
    uint8_t shorthand;
    bool logical;
    bool level_triggered;
    bool assert;
    bool lowest; /* MSI's redirection hint */
};

/* apic.c */
#define APIC_FROM_DEVICE (-1)
int apic_send(struct irqchip *chip, int sender, const struct apic_message *message);
void apic_reset(struct irqchip *chip, unsigned cpu);
void apic_refresh(struct irqchip *chip, unsigned cpu);
void apic_lint0_edge(struct irqchip *chip);
void apic_advance(struct irqchip *chip, unsigned cpu);
bool apic_takes_pic(const struct lapic *lapic);
void apic_move_time(struct lapic *lapic, int64_t by);
bool apic_can_send_unmaskable(const struct lapic *lapic);

/* ioapic.c */
void ioapic_reset(struct ioapic *ioapic);
void ioapic_set_pin(struct irqchip *chip, unsigned pin, bool level);
void ioapic_end_of_interrupt(struct irqchip *chip, uint8_t vector);
bool ioapic_can_send_unmaskable(const struct ioapic *ioapic);
void ioapic_get(const struct ioapic *ioapic, struct kvm_ioapic_state *state);
int ioapic_set(struct irqchip *chip, const struct kvm_ioapic_state *state);

/* pic.c */
void pic_reset(struct irqchip *chip);
void pic_set_pin(struct irqchip *chip, unsigned pin, bool level);
int pic_peek(const struct pic *pic);
int pic_acknowledge(struct irqchip *chip);
uint8_t pic_read_port(struct irqchip *chip, uint16_t port);
void pic_write_port(struct irqchip *chip, uint16_t port, uint8_t value);
int pic_set(struct irqchip *chip, unsigned which, const struct kvm_pic_state *state);

/* pit.c */
void pit_reset(struct irqchip *chip);
void pit_advance(struct irqchip *chip);
void pit_get_rest(const struct irqchip *chip, struct irqchip_pit_rest rest[3]);
bool pit_rest_is_valid(const struct irqchip_pit_rest rest[3]);
void pit_set_rest(struct irqchip *chip, const struct irqchip_pit_rest rest[3]);
void pit_move_time(struct irqchip *chip, int64_t by);
uint8_t pit_read_port(struct irqchip *chip, uint16_t port);
void pit_write_port(struct irqchip *chip, uint16_t port, uint8_t value);

/* irqchip.c */
void irqchip_drive(struct irqchip *chip, unsigned gsi, enum irqchip_source source, bool level);
void irqchip_reschedule(struct irqchip *chip);

/* value * multiplier / divisor without overflow in between, rounded down or up; saturates at
 * IRQCHIP_NEVER. */
static inline uint64_t scale_down(uint64_t value, uint64_t multiplier, uint64_t divisor)
{
    unsigned __int128 scaled = (unsigned __int128)value * multiplier / divisor;

    return scaled > UINT64_MAX ? UINT64_MAX : (uint64_t)scaled;
}

static inline uint64_t scale_up(uint64_t value, uint64_t multiplier, uint64_t divisor)
{
    unsigned __int128 scaled = ((unsigned __int128)value * multiplier + divisor - 1) / divisor;

    return scaled > UINT64_MAX ? UINT64_MAX : (uint64_t)scaled;
}

static inline uint64_t add_saturating(uint64_t a, uint64_t b)
{
    return a > UINT64_MAX - b ? UINT64_MAX : a + b;
}

#endif
