/*
 * Two 8259A interrupt controllers, cascaded as in a PC (Intel 8259A data sheet, order number 231468), with
 * the PIIX's edge/level control registers (ELCR, ports 0x4d0 and 0x4d1).  State is KVM's struct
 * kvm_pic_state.
 *
 * As KVM has it: an edge request stays latched when its line falls before the INTA; the slave's output
 * pulses the master's input 2; ICW3, SNGL, LTIM, the 8080 modes and buffered mode are ignored.  Unlike KVM,
 * special mask mode and poll mode work as the data sheet says: KVM 6.18 ignores the first, and its poll
 * sets no bit 7 and no in-service bit.
 */
#include <errno.h>
#include <string.h>

#include "irqchip_internal.h"

#define MASTER 0
#define SLAVE 1
#define CASCADE 2    /* the master's input that the slave drives */
#define SPURIOUS 7   /* what an INTA without a request gives: data sheet, "edge and level triggered modes" */
#define NO_PRIORITY 8

static const uint8_t elcr_masks[2] = {0xf8, 0xde}; /* IRQ 0, 1, 2, 8 and 13 are edge only */

enum { READY, WAIT_ICW2, WAIT_ICW3, WAIT_ICW4 }; /* init_state */

/* Where the best of `requests` stands, 0 the highest; NO_PRIORITY if there is none. */
static unsigned best_priority(const struct kvm_pic_state *s, uint8_t requests)
{
    unsigned priority;

    for (priority = 0; priority < 8; priority++)
        if (requests & 1 << ((priority + s->priority_add) & 7))
            return priority;
    return NO_PRIORITY;
}

static unsigned input_at(const struct kvm_pic_state *s, unsigned priority)
{
    return (priority + s->priority_add) & 7;
}

/* The input to serve next, or -1. */
static int next_input(const struct pic *pic, unsigned which)
{
    const struct kvm_pic_state *s = &pic->chip[which];
    uint8_t in_service = s->isr;
    unsigned request = best_priority(s, s->irr & ~s->imr);

    if (request == NO_PRIORITY)
        return -1;
    /* Special mask mode: a masked input in service holds nobody back.  It "enables interrupts from all other
     * levels (lower as well as higher) that are not masked", so its own level cannot come again. */
    if (s->special_mask)
        in_service &= ~s->imr;
    /* Special fully nested mode: the slave may interrupt again while one of its own is in service. */
    if (which == MASTER && s->special_fully_nested_mode)
        in_service &= ~(1 << CASCADE);
    return request < best_priority(s, in_service) ? (int)input_at(s, request) : -1;
}

static void set_input(struct kvm_pic_state *s, unsigned input, bool level)
{
    uint8_t bit = 1 << input;

    if (s->elcr & bit) {
        s->irr = level ? s->irr | bit : s->irr & ~bit;
    } else if (level && !(s->last_irr & bit)) {
        s->irr |= bit;
    }
    s->last_irr = level ? s->last_irr | bit : s->last_irr & ~bit;
}

/* The master's output to the CPUs. */
static void update_output(struct irqchip *chip)
{
    struct pic *pic = &chip->pic;
    bool before = pic->output;
    unsigned cpu;

    pic->output = next_input(pic, MASTER) >= 0;
    if (!before && !pic->output)
        return;
    for (cpu = 0; cpu < chip->cpus; cpu++)
        apic_refresh(chip, cpu);
    if (!before)
        apic_lint0_edge(chip);
}

/* After any change: the slave's request to the master, and on. */
static void update(struct irqchip *chip)
{
    if (next_input(&chip->pic, SLAVE) >= 0) {
        set_input(&chip->pic.chip[MASTER], CASCADE, true);
        set_input(&chip->pic.chip[MASTER], CASCADE, false);
    }
    update_output(chip);
}

static void take(struct kvm_pic_state *s, unsigned input)
{
    uint8_t bit = 1 << input;

    if (!(s->elcr & bit))
        s->irr &= ~bit;
    s->isr = s->auto_eoi ? s->isr & ~bit : s->isr | bit;
    if (s->auto_eoi && s->rotate_on_auto_eoi)
        s->priority_add = (input + 1) & 7;
}

/* The vector an INTA would return now, or -1 without a request. */
int pic_peek(const struct pic *pic)
{
    int input = next_input(pic, MASTER), from_slave;

    if (input < 0)
        return -1;
    if (input != CASCADE)
        return (uint8_t)(pic->chip[MASTER].irq_base + input);
    from_slave = next_input(pic, SLAVE);
    return (uint8_t)(pic->chip[SLAVE].irq_base + (from_slave < 0 ? SPURIOUS : from_slave));
}

int pic_acknowledge(struct irqchip *chip)
{
    struct pic *pic = &chip->pic;
    int input = next_input(pic, MASTER), from_slave = -1, vector;

    if (input < 0) {
        vector = (uint8_t)(pic->chip[MASTER].irq_base + SPURIOUS);
    } else {
        vector = pic_peek(pic);
        if (input == CASCADE)
            from_slave = next_input(pic, SLAVE);
        take(&pic->chip[MASTER], input);
        if (from_slave >= 0)
            take(&pic->chip[SLAVE], from_slave);
    }
    update(chip);
    return vector;
}

void pic_set_pin(struct irqchip *chip, unsigned pin, bool level)
{
    set_input(&chip->pic.chip[pin >> 3], pin & 7, level);
    update(chip);
}

static void write_icw1(struct kvm_pic_state *s, uint8_t value)
{
    s->init4 = value & 1;
    s->last_irr = 0;
    s->isr &= ~(s->irr & ~s->elcr); /* KVM's; the data sheet says nothing of ISR here */
    s->irr &= s->elcr;
    s->imr = 0;
    s->priority_add = 0;
    s->special_mask = 0;
    s->read_reg_select = 0;
    if (!s->init4) {
        s->special_fully_nested_mode = 0;
        s->auto_eoi = 0;
    }
    s->init_state = WAIT_ICW2;
}

static void write_ocw3(struct kvm_pic_state *s, uint8_t value)
{
    if (value & 0x04)
        s->poll = 1;
    if (value & 0x02)
        s->read_reg_select = value & 1;
    if (value & 0x40)
        s->special_mask = value >> 5 & 1;
}

/* End the best input in service; in special mask mode the masked ones are left ("a nonspecific EOI will not
 * clear an IS bit that is masked").  The input that ended, or -1. */
static int end_best(struct kvm_pic_state *s)
{
    uint8_t in_service = s->special_mask ? s->isr & ~s->imr : s->isr;
    unsigned priority = best_priority(s, in_service);
    unsigned input = input_at(s, priority);

    if (priority == NO_PRIORITY)
        return -1;
    s->isr &= ~(1 << input);
    return (int)input;
}

/* OCW2, bits 7:5: rotate, specific, EOI.  True if it can change who is served, as for the two below. */
static bool write_ocw2(struct kvm_pic_state *s, uint8_t value)
{
    bool rotate = value & 0x80, specific = value & 0x40, eoi = value & 0x20;
    int input = value & 7;

    if (!specific && !eoi) {
        s->rotate_on_auto_eoi = rotate;
        return false;
    }
    if (eoi && specific)
        s->isr &= ~(1 << input);
    else if (eoi)
        input = end_best(s);
    if (rotate && input >= 0)
        s->priority_add = (input + 1) & 7;
    return input >= 0;
}

static bool write_command(struct kvm_pic_state *s, uint8_t value)
{
    if (!(value & 0x18))
        return write_ocw2(s, value);
    if (value & 0x10)
        write_icw1(s, value);
    else
        write_ocw3(s, value);
    return false;
}

static bool write_data(struct kvm_pic_state *s, uint8_t value)
{
    switch (s->init_state) {
    case READY:
        s->imr = value;
        return true;
    case WAIT_ICW2:
        s->irq_base = value & 0xf8;
        s->init_state = WAIT_ICW3;
        break;
    case WAIT_ICW3:
        s->init_state = s->init4 ? WAIT_ICW4 : READY;
        break;
    case WAIT_ICW4:
        s->special_fully_nested_mode = value >> 4 & 1;
        s->auto_eoi = value >> 1 & 1;
        s->init_state = READY;
        break;
    }
    return false;
}

/* The read after a poll command is an INTA that answers the input's number instead of a vector. */
static uint8_t poll(struct irqchip *chip, unsigned which)
{
    int input = next_input(&chip->pic, which);

    if (input < 0)
        return SPURIOUS;
    take(&chip->pic.chip[which], input);
    update(chip);
    return 0x80 | input;
}

uint8_t pic_read_port(struct irqchip *chip, uint16_t port)
{
    bool elcr = port >= 0x4d0;
    unsigned which = elcr ? port & 1 : port >> 7 & 1;
    struct kvm_pic_state *s = &chip->pic.chip[which];

    if (elcr)
        return s->elcr;
    if (s->poll) {
        s->poll = 0;
        return poll(chip, which);
    }
    if (port & 1)
        return s->imr;
    return s->read_reg_select ? s->isr : s->irr;
}

void pic_write_port(struct irqchip *chip, uint16_t port, uint8_t value)
{
    bool elcr = port >= 0x4d0, served = false;
    struct kvm_pic_state *s = &chip->pic.chip[elcr ? port & 1 : port >> 7 & 1];

    if (elcr)
        s->elcr = value & s->elcr_mask;
    else
        served = port & 1 ? write_data(s, value) : write_command(s, value);
    /* Only where somebody else may be served does the slave make a new edge to the master. */
    if (served)
        update(chip);
    else
        update_output(chip);
}

void pic_reset(struct irqchip *chip)
{
    unsigned which;

    memset(&chip->pic, 0, sizeof chip->pic);
    for (which = MASTER; which <= SLAVE; which++)
        chip->pic.chip[which].elcr_mask = elcr_masks[which];
    for (which = 0; which < chip->cpus; which++)
        apic_refresh(chip, which);
}

/* -EINVAL for a field that no register write can make. */
int pic_set(struct irqchip *chip, unsigned which, const struct kvm_pic_state *state)
{
    if (state->priority_add > 7 || state->init_state > WAIT_ICW4 || state->read_reg_select > 1 ||
        state->poll > 1 || state->special_mask > 1 || state->auto_eoi > 1 || state->rotate_on_auto_eoi > 1 ||
        state->special_fully_nested_mode > 1 || state->init4 > 1)
        return -EINVAL;
    chip->pic.chip[which] = *state;
    update_output(chip); /* the edge from the slave is in the master's state; KVM, which makes a new one, adds it */
    return 0;
}
