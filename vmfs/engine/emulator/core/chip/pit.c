/*
 * The 8254 programmable interval timer (Intel 8254 data sheet, order number 231164) and the PC's port 0x61,
 * with KVM's struct kvm_pit_state2.
 *
 * A counter is not stepped: everything is computed from the ticks since its count was loaded.  A count is
 * loaded at the moment it is written (on silicon: at the next clock, up to 838 ns later); ticks are counted
 * from there.  Channel 0 pulses GSI 0 at each rising edge of its OUT, as KVM does, instead of holding the
 * line; an edge that comes only from writing a control word makes no interrupt; ticks that an interrupted
 * guest missed are not made up for (KVM_REINJECT_CONTROL with 0).
 *
 * Unlike KVM, as the data sheet says: BCD; mode 2's OUT; odd counts in mode 3; gates and triggers; a new
 * count in modes 1, 2, 3 and 5 waits for its moment; the null count bit; a control word stops the counter
 * until its count comes.  In mode 2 and 3 a count of 1 is illegal: OUT stays high.
 */
#include <errno.h>
#include <string.h>

#include "irqchip_internal.h"

#define HZ 1193182u
#define NS UINT64_C(1000000000)
#define IDLE INT64_MAX        /* count_load_time: no count loaded, or waiting for the gate */
#define MODE_UNSET 0xff       /* before the first control word */
#define REFRESH_TICKS 18      /* port 0x61 bit 4 toggles with every refresh request of channel 1, 15 us */
#define FULL_COUNT 0x10000u

enum { ACCESS_LOW = 1, ACCESS_HIGH = 2, ACCESS_WORD0 = 3, ACCESS_WORD1 = 4 };
enum { PORT_COMMAND = 0x43, PORT_SPEAKER = 0x61 };
enum { SPEAKER_GATE = 0x01, SPEAKER_DATA = 0x02, SPEAKER_REFRESH = 0x10, SPEAKER_OUT = 0x20 };

/* --- Arithmetic --------------------------------------------------------------------------------------- */

static uint64_t ticks_between(int64_t load, uint64_t now)
{
    return scale_down(now - (uint64_t)load, HZ, NS);
}

static int64_t ticks_to_ns(uint64_t ticks)
{
    return (int64_t)scale_up(ticks, NS, HZ);
}

/* When the counter loaded at `load` has counted `ticks`. */
static uint64_t time_of(int64_t load, uint64_t ticks)
{
    __int128 when = (__int128)load + scale_up(ticks, NS, HZ);

    return when < 0 ? 0 : when > UINT64_MAX ? IRQCHIP_NEVER : (uint64_t)when;
}

/* A count register's value as a number: 1 to 65536, 1 to 10000 in BCD (a little more for digits above 9). */
static uint32_t number_of(uint32_t raw, bool bcd)
{
    if (!bcd)
        return raw;
    if (raw == FULL_COUNT)
        return 10000;
    return (raw >> 12) * 1000 + (raw >> 8 & 15) * 100 + (raw >> 4 & 15) * 10 + (raw & 15);
}

static uint16_t raw_of(uint32_t number, bool bcd)
{
    if (!bcd)
        return (uint16_t)number;
    number %= 10000;
    return (uint16_t)(number / 1000 << 12 | number / 100 % 10 << 8 | number / 10 % 10 << 4 | number % 10);
}

/* --- One counter -------------------------------------------------------------------------------------- */

static bool is_periodic(const struct pit_channel *c)
{
    return c->state.mode == 2 || c->state.mode == 3;
}

static bool is_triggered(const struct pit_channel *c)
{
    return c->state.mode == 1 || c->state.mode == 5;
}

static bool is_loaded(const struct pit_channel *c)
{
    return c->state.mode != MODE_UNSET && c->state.count_load_time != IDLE;
}

/* A low gate stops modes 0, 2, 3 and 4; in modes 1 and 5 only its rising edge counts. */
static bool is_held(const struct pit_channel *c)
{
    return !c->state.gate && !is_triggered(c);
}

static uint32_t divisor(const struct pit_channel *c)
{
    return number_of(c->state.count, c->state.bcd);
}

/* Ticks of a mode 3 period with OUT high. */
static uint32_t high_ticks(uint32_t count)
{
    return (count + 1) / 2;
}

static uint64_t elapsed(const struct pit_channel *c, uint64_t now)
{
    return is_held(c) ? c->held : ticks_between(c->state.count_load_time, now);
}

static void use_next_count(struct pit_channel *c)
{
    c->state.count = c->next_count;
    c->state.count_load_time = c->next_load;
    c->next_count = 0;
}

static void settle(struct pit_channel *c, uint64_t now)
{
    if (c->next_count && (int64_t)now >= c->switch_time)
        use_next_count(c);
}

static bool out(const struct pit_channel *c, uint64_t now)
{
    uint32_t n = divisor(c);
    uint64_t ticks;

    if (!is_loaded(c))
        return c->state.mode != 0 && c->state.mode != MODE_UNSET;
    ticks = elapsed(c, now);
    switch (c->state.mode) {
    case 0:
        return ticks >= n;
    case 1:
        return ticks >= n;
    case 2:
        return !c->state.gate || n < 2 || ticks % n != n - 1;
    case 3:
        return !c->state.gate || n < 2 || ticks % n < high_ticks(n);
    default:
        return ticks != n;
    }
}

/* Mode 3 counts down by two, from an even number, once for each half of the period. */
static uint32_t square_wave_value(uint32_t n, uint32_t position)
{
    uint32_t high = high_ticks(n);

    return (n & ~1u) - 2 * (position < high ? position : position - high);
}

/* The counting element, as a read or a latch command sees it. */
static uint16_t current_count(const struct pit_channel *c, uint64_t now)
{
    uint32_t n = divisor(c), modulo = c->state.bcd ? 10000 : FULL_COUNT, value;
    uint64_t ticks;

    if (!is_loaded(c))
        return raw_of(n, c->state.bcd);
    ticks = elapsed(c, now);
    if (c->state.mode == 2)
        value = n - (uint32_t)(ticks % n);
    else if (c->state.mode == 3)
        value = square_wave_value(n, (uint32_t)(ticks % n));
    else
        value = (n + modulo - (uint32_t)(ticks % modulo)) % modulo;
    return raw_of(value, c->state.bcd);
}

/* The next tick after c->seen at which OUT rises, or IRQCHIP_NEVER. */
static uint64_t next_rise(const struct pit_channel *c)
{
    uint64_t n = divisor(c), last = c->state.mode >= 4 ? n + 1 : n;

    if (!is_loaded(c) || is_held(c))
        return IRQCHIP_NEVER;
    if (is_periodic(c))
        return n < 2 ? IRQCHIP_NEVER : (c->seen / n + 1) * n;
    return c->seen < last ? last : IRQCHIP_NEVER;
}

static uint64_t next_rise_time(const struct pit_channel *c)
{
    uint64_t ticks = next_rise(c);

    return ticks == IRQCHIP_NEVER ? IRQCHIP_NEVER : time_of(c->state.count_load_time, ticks);
}

/* --- Channel 0's interrupt ---------------------------------------------------------------------------- */

static void reschedule(struct irqchip *chip)
{
    const struct pit_channel *c = &chip->pit.channel[0];
    uint64_t due = next_rise_time(c);

    if (c->next_count && (uint64_t)c->switch_time < due)
        due = (uint64_t)c->switch_time;
    chip->pit.due = chip->pit.present ? due : IRQCHIP_NEVER;
    irqchip_reschedule(chip);
}

/* Bring channel 0 up to chip->now; several missed edges are one pulse, as the 8259 latches one. */
void pit_advance(struct irqchip *chip)
{
    struct pit_channel *c = &chip->pit.channel[0];
    bool rose = false;

    while (chip->now >= chip->pit.due) {
        if (c->next_count && (int64_t)chip->now >= c->switch_time) {
            rose |= next_rise_time(c) <= (uint64_t)c->switch_time;
            use_next_count(c);
            c->seen = ticks_between(c->state.count_load_time, (uint64_t)c->switch_time);
        } else {
            rose = true;
            c->seen = elapsed(c, chip->now);
        }
        reschedule(chip);
    }
    if (rose && !(chip->pit.flags & KVM_PIT_FLAGS_HPET_LEGACY)) {
        irqchip_drive(chip, 0, IRQCHIP_SOURCE_PIT, true);
        irqchip_drive(chip, 0, IRQCHIP_SOURCE_PIT, false);
    }
}

/* --- Writing ------------------------------------------------------------------------------------------ */

static void begin(struct pit_channel *c, int64_t load)
{
    c->state.count_load_time = load;
    c->held = 0;
    c->seen = 0;
}

/* A new count for a running mode 2 or 3 counter waits for the end of the period, or of mode 3's half
 * period. */
static void queue_count(struct pit_channel *c, uint32_t raw, uint64_t now)
{
    uint32_t n = divisor(c), high = high_ticks(n), position;
    uint64_t ticks = elapsed(c, now), boundary;
    int64_t before = 0;

    position = (uint32_t)(ticks % n);
    boundary = ticks - position + n;
    if (c->state.mode == 3 && position < high) {
        boundary = ticks - position + high;
        before = ticks_to_ns(high_ticks(number_of(raw, c->state.bcd)));
    }
    c->next_count = raw;
    c->switch_time = (int64_t)time_of(c->state.count_load_time, boundary);
    c->next_load = c->switch_time - before;
}

static void load_count(struct pit_channel *c, uint16_t value, uint64_t now)
{
    uint32_t raw = value ? value : FULL_COUNT;

    if (is_periodic(c) && is_loaded(c) && !is_held(c) && divisor(c) >= 2) {
        queue_count(c, raw, now);
    } else if (is_triggered(c) && is_loaded(c)) {
        c->next_count = raw;
        c->switch_time = IDLE;
    } else {
        c->state.count = raw;
        if (!is_triggered(c))
            begin(c, (int64_t)now);
    }
}

static void write_counter(struct pit_channel *c, uint8_t value, uint64_t now)
{
    struct kvm_pit_channel_state *s = &c->state;

    switch (s->write_state) {
    case ACCESS_HIGH:
        load_count(c, (uint16_t)(value << 8), now);
        break;
    case ACCESS_WORD0:
        s->write_latch = value;
        s->write_state = ACCESS_WORD1;
        if (s->mode == 0) /* "writing the first byte disables counting; OUT is set low immediately" */
            begin(c, IDLE);
        break;
    case ACCESS_WORD1:
        s->write_state = ACCESS_WORD0;
        load_count(c, (uint16_t)(s->write_latch | value << 8), now);
        break;
    default:
        load_count(c, value, now);
        break;
    }
}

static void latch_count(struct pit_channel *c, uint64_t now)
{
    if (c->state.count_latched)
        return;
    c->state.latched_count = current_count(c, now);
    c->state.count_latched = c->state.rw_mode;
}

static void latch_status(struct pit_channel *c, uint64_t now)
{
    struct kvm_pit_channel_state *s = &c->state;
    bool null_count = !is_loaded(c) || c->next_count;

    if (s->status_latched)
        return;
    s->status = (uint8_t)(out(c, now) << 7 | null_count << 6 | s->rw_mode << 4 | (s->mode & 7) << 1 | s->bcd);
    if (c->mode_bit2)
        s->status |= 4 << 1;
    s->status_latched = 1;
}

static void set_mode(struct pit_channel *c, uint8_t command)
{
    struct kvm_pit_channel_state *s = &c->state;
    uint8_t mode = command >> 1 & 7, access = command >> 4 & 3;

    s->rw_mode = s->read_state = s->write_state = access;
    s->mode = mode > 5 ? mode - 4 : mode; /* bit 2 is a "don't care" of modes 2 and 3 ... */
    c->mode_bit2 = mode > 5;              /* ... which the status byte has as it was written */
    s->bcd = command & 1;
    s->count_latched = 0;
    s->status_latched = 0;
    c->next_count = 0;
    begin(c, IDLE);
}

static void write_command(struct pit *pit, uint8_t command, uint64_t now)
{
    unsigned select = command >> 6, i;

    if (select < 3) {
        if (command & 0x30)
            set_mode(&pit->channel[select], command);
        else
            latch_count(&pit->channel[select], now);
        return;
    }
    for (i = 0; i < 3; i++) { /* read-back: bits 5 and 4 are active low */
        if (!(command & 2u << i))
            continue;
        if (!(command & 0x20))
            latch_count(&pit->channel[i], now);
        if (!(command & 0x10))
            latch_status(&pit->channel[i], now);
    }
}

static void set_gate(struct pit_channel *c, bool gate, uint64_t now)
{
    bool rising = gate && !c->state.gate;

    if (gate == c->state.gate)
        return;
    if (!gate && is_loaded(c))
        c->held = ticks_between(c->state.count_load_time, now);
    c->state.gate = gate;
    if (!rising || c->state.mode == MODE_UNSET || (!is_loaded(c) && !is_triggered(c)))
        return;
    if (is_periodic(c) || is_triggered(c)) {
        if (c->next_count)
            use_next_count(c);
        begin(c, (int64_t)now);
    } else {
        c->state.count_load_time = (int64_t)now - ticks_to_ns(c->held);
    }
}

/* --- Reading ------------------------------------------------------------------------------------------ */

static uint8_t read_latched(struct kvm_pit_channel_state *s)
{
    switch (s->count_latched) {
    case ACCESS_HIGH:
        s->count_latched = 0;
        return s->latched_count >> 8;
    case ACCESS_WORD0:
        s->count_latched = ACCESS_HIGH;
        return (uint8_t)s->latched_count;
    default:
        s->count_latched = 0;
        return (uint8_t)s->latched_count;
    }
}

static uint8_t read_counter(struct pit_channel *c, uint64_t now)
{
    struct kvm_pit_channel_state *s = &c->state;
    uint16_t count;

    if (s->status_latched) {
        s->status_latched = 0;
        return s->status;
    }
    if (s->count_latched)
        return read_latched(s);
    count = current_count(c, now);
    switch (s->read_state) {
    case ACCESS_HIGH:
        return count >> 8;
    case ACCESS_WORD0:
        s->read_state = ACCESS_WORD1;
        return (uint8_t)count;
    case ACCESS_WORD1:
        s->read_state = ACCESS_WORD0;
        return count >> 8;
    default:
        return (uint8_t)count;
    }
}

static uint8_t read_speaker(const struct pit *pit, uint64_t now)
{
    const struct pit_channel *c = &pit->channel[2];
    uint8_t value = c->state.gate ? SPEAKER_GATE : 0;

    if (pit->speaker_data)
        value |= SPEAKER_DATA;
    if (scale_down(now, HZ, NS) / REFRESH_TICKS & 1)
        value |= SPEAKER_REFRESH;
    if (out(c, now))
        value |= SPEAKER_OUT;
    return value;
}

uint8_t pit_read_port(struct irqchip *chip, uint16_t port)
{
    struct pit *pit = &chip->pit;

    settle(&pit->channel[1], chip->now);
    settle(&pit->channel[2], chip->now);
    if (port == PORT_SPEAKER)
        return read_speaker(pit, chip->now);
    return port == PORT_COMMAND ? 0 : read_counter(&pit->channel[port & 3], chip->now);
}

void pit_write_port(struct irqchip *chip, uint16_t port, uint8_t value)
{
    struct pit *pit = &chip->pit;

    settle(&pit->channel[1], chip->now);
    settle(&pit->channel[2], chip->now);
    if (port == PORT_SPEAKER) {
        pit->speaker_data = value & SPEAKER_DATA;
        set_gate(&pit->channel[2], value & SPEAKER_GATE, chip->now);
    } else if (port == PORT_COMMAND) {
        write_command(pit, value, chip->now);
    } else {
        write_counter(&pit->channel[port & 3], value, chip->now);
    }
    reschedule(chip);
}

/* --- Reset and state ---------------------------------------------------------------------------------- */

void pit_reset(struct irqchip *chip)
{
    struct pit *pit = &chip->pit;
    unsigned i;

    memset(pit->channel, 0, sizeof pit->channel);
    pit->flags = 0;
    pit->speaker_data = false;
    for (i = 0; i < 3; i++) {
        pit->channel[i].state.count = FULL_COUNT;
        pit->channel[i].state.mode = MODE_UNSET;
        pit->channel[i].state.gate = i != 2;
        pit->channel[i].state.count_load_time = IDLE;
    }
    reschedule(chip);
}

/* The first reserved word has a bit a channel for mode_bit2, which KVM does not keep.
 *
 * A count that waits is reported as the counter's, with the (future) time it counts from; a held counter
 * with the time it would have been loaded at to stand where it stands. */
void irqchip_get_pit(struct irqchip *chip, struct kvm_pit_state2 *state, uint64_t now)
{
    unsigned i;

    irqchip_advance(chip, now);
    memset(state, 0, sizeof *state);
    for (i = 0; i < 3; i++) {
        struct pit_channel *c = &chip->pit.channel[i];
        struct kvm_pit_channel_state *s = &state->channels[i];

        settle(c, chip->now);
        *s = c->state;
        if (is_loaded(c) && is_held(c))
            s->count_load_time = (int64_t)chip->now - ticks_to_ns(c->held);
        if (c->next_count)
            s->count = c->next_count;
        if (c->next_count && is_periodic(c))
            s->count_load_time = c->next_load;
    }
    for (i = 0; i < 3; i++)
        state->reserved[0] |= (uint32_t)chip->pit.channel[i].mode_bit2 << i;
    state->flags = chip->pit.flags | (chip->pit.speaker_data ? KVM_PIT_FLAGS_SPEAKER_DATA_ON : 0);
}

static bool valid_channel(const struct kvm_pit_channel_state *s, bool restart, uint64_t now)
{
    if (s->count > FULL_COUNT || (s->mode > 5 && s->mode != MODE_UNSET) || s->rw_mode > ACCESS_WORD0 ||
        s->read_state > ACCESS_WORD1 || s->write_state > ACCESS_WORD1 || s->count_latched > ACCESS_WORD0 ||
        s->status_latched > 1 || s->bcd > 1 || s->gate > 1)
        return false;
    if (restart || s->count_load_time <= (int64_t)now || s->count_load_time == IDLE)
        return true;
    /* From a time to come: only a count that waits for the end of a period, and a period ends soon. */
    if ((s->mode != 2 && s->mode != 3) || !s->gate)
        return false;
    return s->count_load_time - (int64_t)now <= ticks_to_ns(FULL_COUNT);
}

/* A count that waits for `load`: until then the counter has one as long as the rest of the period. */
static void fill_period(struct pit_channel *c, int64_t load, uint64_t now)
{
    uint32_t left = (uint32_t)scale_up((uint64_t)load - now, HZ, NS) * (c->state.mode == 3 ? 2 : 1);
    uint32_t most = c->state.bcd ? 9999 : FULL_COUNT;

    c->next_count = c->state.count;
    c->next_load = c->switch_time = load;
    left = left < 2 ? 2 : left > most ? most : left;
    c->state.count = left == FULL_COUNT ? FULL_COUNT : raw_of(left, c->state.bcd);
    c->state.count_load_time = (int64_t)now;
}

static void set_channel(struct pit_channel *c, const struct kvm_pit_channel_state *s, bool restart,
                        uint64_t now)
{
    int64_t load = s->count_load_time;

    memset(c, 0, sizeof *c);
    c->state = *s;
    if (!c->state.count)
        c->state.count = FULL_COUNT;
    if (load == IDLE)
        return;
    if (restart) {
        begin(c, (int64_t)now);
    } else if (load > (int64_t)now) {
        fill_period(c, load, now);
    } else {
        c->held = ticks_between(load, now);
        c->seen = c->held;
    }
}

int irqchip_set_pit(struct irqchip *chip, const struct kvm_pit_state2 *state, bool restart, uint64_t now)
{
    struct pit *pit = &chip->pit;
    unsigned i;

    irqchip_advance(chip, now);
    if (state->flags & ~(KVM_PIT_FLAGS_HPET_LEGACY | KVM_PIT_FLAGS_SPEAKER_DATA_ON))
        return -EINVAL;
    for (i = 0; i < 3; i++)
        if (!valid_channel(&state->channels[i], restart, chip->now))
            return -EINVAL;
    for (i = 0; i < 3; i++)
        set_channel(&pit->channel[i], &state->channels[i], restart, chip->now);
    for (i = 0; i < 3; i++)
        pit->channel[i].mode_bit2 = is_periodic(&pit->channel[i]) && state->reserved[0] & 1u << i;
    pit->flags = state->flags & KVM_PIT_FLAGS_HPET_LEGACY;
    pit->speaker_data = state->flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    reschedule(chip);
    return 0;
}

/* --- What the struct lacks ---------------------------------------------------------------------------- */

void pit_get_rest(const struct irqchip *chip, struct irqchip_pit_rest rest[3])
{
    unsigned i;

    for (i = 0; i < 3; i++) {
        const struct pit_channel *c = &chip->pit.channel[i];
        bool waits_for_time = c->next_count && c->switch_time != IDLE;
        int64_t now = (int64_t)chip->now;

        rest[i] = (struct irqchip_pit_rest){
            .count = c->state.count,
            .next_count = c->next_count,
            .since = c->state.count_load_time == IDLE ? IRQCHIP_NOT_COUNTING : now - c->state.count_load_time,
            .next_load = waits_for_time ? c->next_load - now : 0,
            .switch_time = waits_for_time ? c->switch_time - now : c->next_count ? IDLE : 0,
            .held = c->held,
            .seen = c->seen,
        };
    }
}

/* No counter has counted for more than 36 years, and no period is longer than 55 ms. */
#define LONGEST (INT64_C(1) << 60)

bool pit_rest_is_valid(const struct irqchip_pit_rest rest[3])
{
    unsigned i;

    for (i = 0; i < 3; i++) {
        const struct irqchip_pit_rest *r = &rest[i];
        bool for_trigger = r->switch_time == IDLE;

        if (r->count < 1 || r->count > FULL_COUNT || r->next_count > FULL_COUNT || r->since < IRQCHIP_NOT_COUNTING ||
            r->since > LONGEST || r->held > LONGEST || r->seen > LONGEST)
            return false;
        if ((!r->next_count && (r->next_load || r->switch_time)) ||
            (!for_trigger && (r->switch_time < 0 || r->switch_time > (int64_t)NS)) || r->next_load < -(int64_t)NS ||
            r->next_load > r->switch_time)
            return false;
    }
    return true;
}

void pit_set_rest(struct irqchip *chip, const struct irqchip_pit_rest rest[3])
{
    unsigned i;

    for (i = 0; i < 3; i++) {
        const struct irqchip_pit_rest *r = &rest[i];
        struct pit_channel *c = &chip->pit.channel[i];
        int64_t now = (int64_t)chip->now;

        c->state.count = r->count;
        c->state.count_load_time = r->since == IRQCHIP_NOT_COUNTING ? IDLE : now - r->since;
        c->next_count = r->next_count;
        c->next_load = now + r->next_load;
        c->switch_time = r->switch_time == IDLE ? IDLE : now + r->switch_time;
        c->held = r->held;
        c->seen = r->seen;
    }
    reschedule(chip);
}

void pit_move_time(struct irqchip *chip, int64_t by)
{
    unsigned i;

    for (i = 0; i < 3; i++) {
        struct pit_channel *c = &chip->pit.channel[i];

        if (c->state.count_load_time != IDLE)
            c->state.count_load_time += by;
        if (c->next_count && c->switch_time != IDLE) {
            c->switch_time += by;
            c->next_load += by;
        }
    }
    reschedule(chip);
}
