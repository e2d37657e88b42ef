/* ACPI's fixed hardware: PM1 event and control, and the timer (ACPI 6.4, 4.8.3). Sleeping is Python's. */
#include "module.h"

enum { FREQUENCY = 3579545 /* Hz */, HALF = 23 /* the bit of which a change is an event */ };
enum { TIMER = 1, POWER_BUTTON = 0x100, SLP_EN = 0x2000 };
enum { EVENT, CONTROL, PM_TIMER /* regions */ };

struct power {
    struct chip chip;
    unsigned gsi;
    u16 status, enable, control;
    u64 halves;                 /* of the timer's rounds, that TMR_STS was set for */
};

static u64 ticks(u64 now) { return (u64)((unsigned __int128)now * FREQUENCY / SECOND); }

static void drive(struct power *p)
{
    bus_set_line(p->chip.bus, p->chip.number, p->gsi, p->status & p->enable & (POWER_BUTTON | TIMER));
}

/* TMR_STS is set when bit 23 of the timer changes (4.8.3.3); be called for that where it is an interrupt. */
static void update(struct power *p, u64 now)
{
    u64 halves = ticks(now) >> HALF;
    if (halves != p->halves) {
        p->halves = halves;
        p->status |= TIMER;
    }
    drive(p);
    u64 due = BUS_NEVER;
    if (p->enable & TIMER && !(p->status & TIMER))
        due = (u64)((((unsigned __int128)(halves + 1) << HALF) * SECOND + FREQUENCY - 1) / FREQUENCY);
    bus_set_due(&p->chip, due);
}

static bool power_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct power *p = (struct power *)chip;
    if (!a->write) {
        if (region == EVENT) {
            update(p, now_of(a));
            a->value = p->status | (u32)p->enable << 16;
        } else {
            a->value = region == CONTROL ? p->control : ticks(now_of(a)) & 0xffffff;
        }
        a->value = offset < 8 ? a->value >> 8 * offset : 0;
        return true;
    }
    if (offset > 3)
        return true;
    u64 mask = (~0ull >> (64 - 8 * a->size)) << 8 * offset, value = a->value << 8 * offset & mask;
    if (region == EVENT) {
        update(p, now_of(a));
        p->status &= (u16)~value;
        p->enable = (u16)((p->enable & ~(mask >> 16)) | (value >> 16 & 0xffff));
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
        self->gsi = gsi;
    return (PyObject *)self;
}

/* From any thread, which may not know the guest's time. */
static PyObject *power_press(struct power *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    self->status |= POWER_BUTTON;
    drive(self);
    return bus_done(self->chip.bus);
}

static PyObject *power_seen(struct power *self, PyObject *argument)
{
    u64 now;
    if (!chip_numbers(&argument, 1, &now, 1))
        return NULL;
    bus_enter(self->chip.bus);
    self->halves = ticks(now) >> HALF;
    update(self, now);
    return bus_done(self->chip.bus);
}

static PyObject *power_state(struct power *self, PyObject *argument)
{
    u64 now;
    if (!chip_numbers(&argument, 1, &now, 1))
        return NULL;
    bus_enter(self->chip.bus);
    update(self, now);
    struct power p = *self;
    if (!bus_leave(self->chip.bus))
        return NULL;
    return Py_BuildValue("{sHsHsH}", "status", p.status, "enable", p.enable, "control", p.control);
}

static PyObject *power_load(struct power *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"now", "status", "enable", "control", NULL};
    unsigned long long now;
    unsigned status, enable, control;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KIII", names, &now, &status, &enable, &control))
        return NULL;
    bus_enter(self->chip.bus);
    self->status = (u16)status, self->enable = (u16)enable, self->control = (u16)control;
    self->halves = ticks(now) >> HALF;
    update(self, now);
    return bus_done(self->chip.bus);
}

static PyMethodDef power_methods[] = {
    CHIP_METHODS,
    {"press", (PyCFunction)power_press, METH_NOARGS, "press(): the power button"},
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
