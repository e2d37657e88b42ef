/* An HPET's main counter, which kernels read some 200,000 times while they boot. The rest of its registers is Python's. */
#include "module.h"

enum { COUNTER = 0xf0, WIDTH = 8 };

struct counter { struct chip chip; u64 value, seen /* when it was that */, tick /* ns; 0: it stands */; bool known; };

static bool counter_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct counter *c = (struct counter *)chip;
    u64 at = offset - COUNTER;
    if (a->write || !c->known || at >= WIDTH || at + a->size > WIDTH)
        return false;
    u64 value = c->value;
    if (c->tick) {
        u64 now = now_of(a);
        value += now > c->seen ? (now - c->seen) / c->tick : 0;
    }
    a->value = value >> 8 * at;
    return true;
}
static const struct chip_kind counter_kind = {counter_access, NULL, true};

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static PyObject *counter_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus;
    unsigned number;
    if (!PyArg_ParseTuple(args, "OI", &bus, &number))
        return NULL;
    return chip_new(type, &counter_kind, bus, number);
}

static PyObject *counter_show(struct counter *self, PyObject *args)
{
    unsigned long long value, tick;
    long long seen;
    if (!PyArg_ParseTuple(args, "KLK", &value, &seen, &tick))
        return NULL;
    chip_enter(&self->chip);
    self->known = seen >= 0; /* a time before the machine's first is Python's */
    self->value = value, self->seen = (u64)seen, self->tick = tick;
    pthread_mutex_unlock(&self->chip.bus->lock);
    Py_RETURN_NONE;
}

static PyMethodDef counter_methods[] = {
    CHIP_METHODS,
    {"show", (PyCFunction)counter_show, METH_VARARGS, "show(value, seen, tick): what it was at that time, and the nanoseconds of a tick; 0: it stands"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot counter_slots[] = {
    {Py_tp_doc, "Counter(bus, device): reads of an HPET's main counter."}, {Py_tp_new, counter_new}, {Py_tp_dealloc, chip_dealloc},
    {Py_tp_methods, counter_methods}, {0, NULL},
};
PyType_Spec counter_spec = {"vmfs.devices._chips.Counter", sizeof(struct counter), 0, Py_TPFLAGS_DEFAULT, counter_slots};
