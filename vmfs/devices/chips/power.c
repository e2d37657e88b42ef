/* ACPI's fixed hardware: PM1 event and control, the timer, and general-purpose events (ACPI 6.4, 4.8.3, 4.8.4). Sleeping is Python's. */
#include "module.h"

enum { FREQUENCY = 3579545 /* Hz */, HALF = 23 /* the bit of which a change is an event */ };
enum { TIMER = 1, POWER_BUTTON = 0x100, CLOCK = 0x400 /* its interrupt */, SLP_EN = 0x2000 };
enum { EVENT, CONTROL, PM_TIMER, GPE /* regions */ };

struct events {
    u16 status, enable;
};

struct power {
    struct chip chip;
    unsigned gsi;
    struct events pm1, gpe;
    unsigned gpe_half;          /* bytes of status, and of enable, that the block of GPE0 has; the first two are there */
    u16 control;
    u64 halves;                 /* of the timer's rounds, that TMR_STS was set for */
};

static u64 ticks(u64 now) { return (u64)((unsigned __int128)now * FREQUENCY / SECOND); }

static void drive(struct power *p)
{
    bool fixed = p->pm1.status & p->pm1.enable & (POWER_BUTTON | CLOCK | TIMER), general = p->gpe.status & p->gpe.enable;
    bus_set_line(p->chip.bus, p->chip.number, p->gsi, fixed || general);
}

/* TMR_STS is set when bit 23 of the timer changes (4.8.3.3); be called for that where it is an interrupt. */
static void update(struct power *p, u64 now)
{
    u64 halves = ticks(now) >> HALF;
    if (halves != p->halves) {
        p->halves = halves;
        p->pm1.status |= TIMER;
    }
    drive(p);
    u64 due = BUS_NEVER;
    if (p->pm1.enable & TIMER && !(p->pm1.status & TIMER))
        due = (u64)((((unsigned __int128)(halves + 1) << HALF) * SECOND + FREQUENCY - 1) / FREQUENCY);
    bus_set_due(&p->chip, due);
}

/* Status, of which a bit that is written as 1 is cleared, and enable above it. */
static u32 read_events(const struct events *e) { return e->status | (u32)e->enable << 16; }

static void write_events(struct events *e, u64 mask, u64 value)
{
    e->status &= (u16)~value;
    e->enable = (u16)((e->enable & ~(mask >> 16)) | (value >> 16 & 0xffff));
}

static u64 read_general(const struct power *p, u64 offset, unsigned size)
{
    u64 value = 0;
    for (unsigned i = 0; i < size; i++) {
        u64 at = (offset + i) % p->gpe_half, half = (offset + i) / p->gpe_half;
        u8 byte = at > 1 || half > 1 ? 0 : (u8)((half ? p->gpe.enable : p->gpe.status) >> 8 * at);
        value |= (u64)byte << 8 * i;
    }
    return value;
}

static void write_general(struct power *p, u64 offset, unsigned size, u64 value)
{
    for (unsigned i = 0; i < size; i++) {
        u64 at = (offset + i) % p->gpe_half, half = (offset + i) / p->gpe_half;
        u64 byte = value >> 8 * i & 0xff;
        if (at < 2 && half < 2)
            write_events(&p->gpe, 0xffull << (16 * half + 8 * at), byte << (16 * half + 8 * at));
    }
}

void power_clock_rang(struct chip *chip)
{
    struct power *p = (struct power *)chip;
    chip_touched(chip);
    p->pm1.status |= CLOCK;
    drive(p);
}

static bool power_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct power *p = (struct power *)chip;
    if (!a->write) {
        if (region == EVENT) {
            update(p, now_of(a));
            a->value = read_events(&p->pm1);
        } else if (region == GPE) {
            a->value = read_general(p, offset, a->size);
            return true;
        } else {
            a->value = region == CONTROL ? p->control : ticks(now_of(a)) & 0xffffff;
        }
        a->value = offset < 8 ? a->value >> 8 * offset : 0;
        return true;
    }
    if (region == GPE) {
        write_general(p, offset, a->size, a->value);
        drive(p);
        return true;
    }
    if (offset > 3)
        return true;
    u64 mask = (~0ull >> (64 - 8 * a->size)) << 8 * offset, value = a->value << 8 * offset & mask;
    if (region == EVENT) {
        update(p, now_of(a));
        write_events(&p->pm1, mask, value);
        update(p, now_of(a));
    } else if (region == CONTROL) {
        u16 control = (u16)((p->control & ~mask) | value);
        if (control & SLP_EN)
            return false;
        p->control = control;
    }
    return true;
}

static void power_advance(struct chip *chip, u64 now) { update((struct power *)chip, now); }
static const struct chip_kind power_kind = {power_access, power_advance, true};

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static PyObject *power_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned gsi;
    struct power *self = (struct power *)chip_new_on_line(type, &power_kind, args, &gsi);
    if (self)
        self->gsi = gsi, self->gpe_half = 2;
    return (PyObject *)self;
}

static PyObject *power_set_gpe(struct power *self, PyObject *argument)
{
    u64 half;
    if (!chip_numbers(&argument, 1, &half, 1))
        return NULL;
    if (half < 2 || half > 8)
        return PyErr_Format(PyExc_ValueError, "2 to 8 bytes");
    self->gpe_half = (unsigned)half;
    Py_RETURN_NONE;
}

/* From any thread, which may not know the guest's time. */
static PyObject *power_press(struct power *self, PyObject *ignored)
{
    chip_enter(&self->chip);
    self->pm1.status |= POWER_BUTTON;
    drive(self);
    return bus_done(self->chip.bus);
}

static PyObject *power_raise(struct power *self, PyObject *argument)
{
    u64 number;
    if (!chip_numbers(&argument, 1, &number, 1))
        return NULL;
    chip_enter(&self->chip);
    self->gpe.status |= (u16)(1u << (number & 15));
    drive(self);
    return bus_done(self->chip.bus);
}

static PyObject *power_seen(struct power *self, PyObject *argument)
{
    u64 now;
    if (!chip_numbers(&argument, 1, &now, 1))
        return NULL;
    chip_enter(&self->chip);
    self->halves = ticks(now) >> HALF;
    update(self, now);
    return bus_done(self->chip.bus);
}

static PyObject *power_state(struct power *self, PyObject *argument)
{
    u64 now;
    if (!chip_numbers(&argument, 1, &now, 1))
        return NULL;
    chip_enter(&self->chip);
    update(self, now);
    struct power p = *self;
    if (!bus_leave(self->chip.bus))
        return NULL;
    return Py_BuildValue("{sHsHsHsHsH}", "status", p.pm1.status, "enable", p.pm1.enable, "control", p.control, "gpe_status", p.gpe.status,
                         "gpe_enable", p.gpe.enable);
}

static PyObject *power_load(struct power *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"now", "status", "enable", "control", "gpe_status", "gpe_enable", NULL};
    unsigned long long now;
    unsigned status, enable, control, gpe_status, gpe_enable;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KIIIII", names, &now, &status, &enable, &control, &gpe_status, &gpe_enable))
        return NULL;
    chip_enter(&self->chip);
    self->pm1 = (struct events){(u16)status, (u16)enable};
    self->gpe = (struct events){(u16)gpe_status, (u16)gpe_enable};
    self->control = (u16)control;
    self->halves = ticks(now) >> HALF;
    update(self, now);
    return bus_done(self->chip.bus);
}

static PyMethodDef power_methods[] = {
    CHIP_METHODS,
    {"set_gpe", (PyCFunction)power_set_gpe, METH_O, "set_gpe(bytes): of status, and as many of enable, in the block of GPE0; the first two are there"},
    {"press", (PyCFunction)power_press, METH_NOARGS, "press(): the power button"},
    {"raise_event", (PyCFunction)power_raise, METH_O, "raise_event(number): a general-purpose event, 0 to 15"},
    {"seen", (PyCFunction)power_seen, METH_O, "seen(now): the timer's bit 23 did not change until now"},
    {"state", (PyCFunction)power_state, METH_O, "state(now) -> dict"},
    {"load", (PyCFunction)(void (*)(void))power_load, METH_VARARGS | METH_KEYWORDS, "load(now=, **state)"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot power_slots[] = {
    {Py_tp_doc, "Power(bus, device, gsi)"}, {Py_tp_new, power_new}, {Py_tp_dealloc, chip_dealloc}, {Py_tp_methods, power_methods},
    {0, NULL},
};
PyType_Spec power_spec = {"vmfs.devices._chips.Power", sizeof(struct power), 0, Py_TPFLAGS_DEFAULT, power_slots};
