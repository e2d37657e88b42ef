/* PCI: configuration mechanism 1 (PCI 3.0, 3.2.2.3), the functions' configuration spaces and INTx; the interrupt status of virtio
 * devices (VIRTIO 1.2, 4.1.4.5). And latches: registers whose reads do nothing.
 *
 * What moves a BAR or switches decoding is Python's, and so are bytes that it has marked: a write of either is not answered. */
#include "module.h"

enum { FUNCTIONS = 256, CONFIG_BYTES = 256 };
enum { COMMAND = 4, STATUS = 6, INTX_OFF_HIGH = 4, STATUS_INTERRUPT = 8 };
enum { ADDRESS, DATA /* regions */ };

/* ---- A function ------------------------------------------------------------------------------------------------------------------- */

struct function {
    struct chip chip;
    struct {
        u8 config[CONFIG_BYTES];
        u8 mask[CONFIG_BYTES];  /* bits that a guest can change */
        u8 by_python[CONFIG_BYTES]; /* 1: writes with an effect, 3: reads, too */
    } bytes;                    /* Python has them as a buffer */
    bool pending;               /* INTx as the device drives it; the command register can hold it back */
    unsigned line_count, lines[2];
};

static void drive(struct function *f)
{
    u8 *status = &f->bytes.config[STATUS];
    *status = (u8)(f->pending ? *status | STATUS_INTERRUPT : *status & ~STATUS_INTERRUPT);
    bool level = f->pending && !(f->bytes.config[COMMAND + 1] & INTX_OFF_HIGH);
    for (unsigned i = 0; i < f->line_count; i++)
        bus_set_line(f->chip.bus, f->chip.number, f->lines[i], level);
}

static bool function_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    return false; /* only by the bridge */
}
static const struct chip_kind function_kind = {function_access};

static bool config_read(const struct function *f, unsigned offset, unsigned size, u64 *value)
{
    *value = 0;
    for (unsigned i = 0; i < size; i++) {
        if (f->bytes.by_python[offset + i] & 2)
            return false;
        *value |= (u64)f->bytes.config[offset + i] << 8 * i;
    }
    return true;
}

static bool config_write(struct function *f, unsigned offset, unsigned size, u64 value)
{
    for (unsigned i = 0; i < size; i++)
        if (f->bytes.by_python[offset + i] && f->bytes.mask[offset + i])
            return false;
    for (unsigned i = 0; i < size; i++) {
        u8 mask = f->bytes.mask[offset + i];
        f->bytes.config[offset + i] = (u8)((f->bytes.config[offset + i] & ~mask) | (value >> 8 * i & mask));
    }
    return true;
}

static PyObject *function_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus, *lines;
    unsigned number;
    if (!PyArg_ParseTuple(args, "OIO!", &bus, &number, &PyTuple_Type, &lines))
        return NULL;
    unsigned of[2] = {0}, count = (unsigned)PyTuple_GET_SIZE(lines);
    for (unsigned i = 0; i < count; i++) {
        unsigned long gsi = count > 2 ? LINES : PyLong_AsUnsignedLong(PyTuple_GET_ITEM(lines, i));
        if (gsi >= LINES)
            return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "up to two lines, of %d", LINES);
        of[i] = (unsigned)gsi;
    }
    struct function *self = (struct function *)chip_new(type, &function_kind, bus, number);
    if (self) {
        self->line_count = count;
        memcpy(self->lines, of, sizeof of);
    }
    return (PyObject *)self;
}

static PyObject *function_set_irq(struct function *self, PyObject *level)
{
    int pending = PyObject_IsTrue(level);
    if (pending < 0)
        return NULL;
    bus_enter(self->chip.bus);
    self->pending = pending;
    drive(self);
    return bus_done(self->chip.bus);
}

static PyObject *function_drive(struct function *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    drive(self);
    return bus_done(self->chip.bus);
}

static int function_buffer(struct function *self, Py_buffer *view, int flags)
{
    return PyBuffer_FillInfo(view, (PyObject *)self, &self->bytes, sizeof self->bytes, 0, flags);
}

static PyObject *function_pending(struct function *self, void *ignored) { return PyBool_FromLong(self->pending); }

static PyMethodDef function_methods[] = {
    {"set_irq", (PyCFunction)function_set_irq, METH_O, "set_irq(level): drive INTA"},
    {"drive", (PyCFunction)function_drive, METH_NOARGS, "drive(): after the command register has changed"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef function_attributes[] = {
    {"pending", (getter)function_pending, NULL, "INTA as the device drives it", NULL}, {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot function_slots[] = {
    {Py_tp_doc, "Function(bus, device, lines): a buffer of the configuration space, the masks of its writable bits, and what is\n"
                "Python's of it (1: writes that change something; 3: reads, too)."},
    {Py_tp_new, function_new}, {Py_tp_dealloc, chip_dealloc}, {Py_tp_methods, function_methods},
    {Py_tp_getset, function_attributes}, {Py_bf_getbuffer, function_buffer}, {0, NULL},
};
PyType_Spec function_spec = {"vmfs.devices._chips.Function", sizeof(struct function), 0, Py_TPFLAGS_DEFAULT, function_slots};

/* ---- The bridge ------------------------------------------------------------------------------------------------------------------- */

struct bridge {
    struct chip chip;
    u32 address;
    struct function *functions[FUNCTIONS]; /* of bus 0; a reference each */
};

static bool bridge_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct bridge *b = (struct bridge *)chip;
    if (region == ADDRESS) {
        if (offset == 1 && a->size == 1)
            return false; /* CF9 */
        if (a->size == 4 && a->write)
            b->address = a->value & 0x80fffffc;
        else
            a->value = a->size == 4 ? b->address : ~0ull;
        return true;
    }
    unsigned at = (b->address & 0xfc) + (unsigned)offset, size = 4 - (unsigned)offset;
    size = a->size < size ? a->size : size;
    struct function *f = b->address >> 16 == 0x8000 ? b->functions[b->address >> 8 & 0xff] : NULL;
    if (f)
        return a->write ? config_write(f, at, size, a->value) : config_read(f, at, size, &a->value);
    a->value = ~0ull;
    return true;
}
static const struct chip_kind bridge_kind = {bridge_access};

static PyObject *bridge_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus;
    unsigned number;
    if (!PyArg_ParseTuple(args, "OI", &bus, &number))
        return NULL;
    return chip_new(type, &bridge_kind, bus, number);
}

static void bridge_dealloc(struct bridge *self)
{
    for (unsigned i = 0; i < FUNCTIONS; i++)
        Py_XDECREF((PyObject *)self->functions[i]);
    chip_dealloc(&self->chip);
}

static PyObject *bridge_set_function(struct bridge *self, PyObject *args)
{
    unsigned place;
    PyObject *function;
    const struct module_state *state = PyType_GetModuleState(Py_TYPE(self));
    if (!PyArg_ParseTuple(args, "IO", &place, &function))
        return NULL;
    if (place >= FUNCTIONS || (function != Py_None && Py_TYPE(function) != state->types[TYPE_FUNCTION])) {
        PyErr_SetString(PyExc_TypeError, "a place of bus 0, and a Function or None");
        return NULL;
    }
    bus_enter(self->chip.bus);
    struct function *old = self->functions[place];
    self->functions[place] = function == Py_None ? NULL : (struct function *)Py_NewRef(function);
    pthread_mutex_unlock(&self->chip.bus->lock);
    Py_XDECREF((PyObject *)old);
    Py_RETURN_NONE;
}

static PyObject *bridge_address(struct bridge *self, void *ignored) { return PyLong_FromUnsignedLong(self->address); }

static int bridge_set_address(struct bridge *self, PyObject *value, void *ignored)
{
    unsigned long address = value ? PyLong_AsUnsignedLong(value) : 0;
    if (PyErr_Occurred())
        return -1;
    bus_enter(self->chip.bus);
    self->address = address & 0x80fffffc;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return 0;
}

static PyMethodDef bridge_methods[] = {
    CHIP_METHODS,
    {"set_function", (PyCFunction)bridge_set_function, METH_VARARGS, "set_function(slot << 3 | function, Function or None)"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef bridge_attributes[] = {
    {"address", (getter)bridge_address, (setter)bridge_set_address, "port CF8", NULL}, {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot bridge_slots[] = {
    {Py_tp_doc, "Bridge(bus, device): region 0 is CF8, 1 is CFC."}, {Py_tp_new, bridge_new}, {Py_tp_dealloc, bridge_dealloc},
    {Py_tp_methods, bridge_methods}, {Py_tp_getset, bridge_attributes}, {0, NULL},
};
PyType_Spec bridge_spec = {"vmfs.devices._chips.Bridge", sizeof(struct bridge), 0, Py_TPFLAGS_DEFAULT, bridge_slots};

/* ---- Virtio ------------------------------------------------------------------------------------------------------------------------ */

struct virtio {
    struct chip chip;
    struct function *function;  /* a reference */
    u64 isr_at, notify_at;      /* in the BAR */
    unsigned queues;
    u8 isr;
    u64 kicks, awaited;         /* a bit a queue: was notified; a worker waits for it (else a notification is Python's) */
    u64 notifications;          /* that were answered */
};

static bool virtio_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct virtio *v = (struct virtio *)chip;
    if (region)
        return false;
    if (!a->write && offset == v->isr_at) {
        a->value = v->isr;
        v->isr = 0;             /* reading it takes the interrupt back */
        v->function->pending = false;
        drive(v->function);
        return true;
    }
    if (a->write && offset >= v->notify_at) {
        u64 queue = (offset - v->notify_at) / 4;
        if (queue >= v->queues)
            return true;
        if (!(v->awaited >> queue & 1))
            return false;
        v->kicks |= 1ull << queue;
        v->notifications++;
        bus_ring(chip->bus);
        return true;
    }
    return false;
}
static const struct chip_kind virtio_kind = {virtio_access};

static PyObject *virtio_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus, *function;
    unsigned number, queues;
    unsigned long long isr_at, notify_at;
    const struct module_state *state = PyType_GetModuleState(type);
    if (!PyArg_ParseTuple(args, "OIOKKI", &bus, &number, &function, &isr_at, &notify_at, &queues))
        return NULL;
    if (Py_TYPE(function) != state->types[TYPE_FUNCTION] || queues > 64) {
        PyErr_SetString(PyExc_TypeError, "a Function, and up to 64 queues");
        return NULL;
    }
    struct virtio *self = (struct virtio *)chip_new(type, &virtio_kind, bus, number);
    if (self) {
        self->function = (struct function *)Py_NewRef(function);
        self->isr_at = isr_at, self->notify_at = notify_at, self->queues = queues;
    }
    return (PyObject *)self;
}

static void virtio_dealloc(struct virtio *self)
{
    Py_XDECREF((PyObject *)self->function);
    chip_dealloc(&self->chip);
}

static PyObject *virtio_interrupt(struct virtio *self, PyObject *argument)
{
    unsigned long cause = PyLong_AsUnsignedLong(argument);
    if (cause == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    bus_enter(self->chip.bus);
    self->isr |= (u8)cause;
    self->function->pending = true;
    drive(self->function);
    return bus_done(self->chip.bus);
}

static PyObject *virtio_take(struct virtio *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    u64 kicks = self->kicks, count = self->notifications;
    self->kicks = self->notifications = 0;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return Py_BuildValue("(KK)", (unsigned long long)kicks, (unsigned long long)count);
}

static PyObject *virtio_get(struct virtio *self, void *ignored) { return PyLong_FromLong(self->isr); }

static int virtio_set(struct virtio *self, PyObject *value, void *ignored)
{
    unsigned long isr = value ? PyLong_AsUnsignedLong(value) : 0;
    if (PyErr_Occurred())
        return -1;
    bus_enter(self->chip.bus);
    self->isr = (u8)isr;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return 0;
}

static PyObject *virtio_get_awaited(struct virtio *self, void *ignored) { return PyLong_FromUnsignedLongLong(self->awaited); }

static int virtio_set_awaited(struct virtio *self, PyObject *value, void *ignored)
{
    unsigned long long awaited = value ? PyLong_AsUnsignedLongLong(value) : 0;
    if (PyErr_Occurred())
        return -1;
    bus_enter(self->chip.bus);
    self->awaited = awaited;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return 0;
}

static PyMethodDef virtio_methods[] = {
    CHIP_METHODS,
    {"interrupt", (PyCFunction)virtio_interrupt, METH_O, "interrupt(cause): into the ISR, and INTA"},
    {"take", (PyCFunction)virtio_take, METH_NOARGS,
     "take() -> (queues, count): those that were notified since the last time, a bit each, and how often"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef virtio_attributes[] = {
    {"isr", (getter)virtio_get, (setter)virtio_set, "the interrupt status, as it stands", NULL},
    {"awaited", (getter)virtio_get_awaited, (setter)virtio_set_awaited, "queues whose notifications are answered here", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot virtio_slots[] = {
    {Py_tp_doc, "Virtio(bus, device, function, isr_at, notify_at, queues): parts of the BAR of a virtio device."},
    {Py_tp_new, virtio_new}, {Py_tp_dealloc, virtio_dealloc}, {Py_tp_methods, virtio_methods},
    {Py_tp_getset, virtio_attributes}, {0, NULL},
};
PyType_Spec virtio_spec = {"vmfs.devices._chips.Virtio", sizeof(struct virtio), 0, Py_TPFLAGS_DEFAULT, virtio_slots};

/* ---- Latch ------------------------------------------------------------------------------------------------------------------------- */

enum { LATCHES = 8 };

struct latch {
    struct chip chip;
    u8 values[LATCHES];
    bool known[LATCHES];
};

static bool latch_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct latch *l = (struct latch *)chip;
    if (a->write || offset || region >= LATCHES || !l->known[region])
        return false;
    a->value = l->values[region];
    return true;
}
static const struct chip_kind latch_kind = {latch_access};

static PyObject *latch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus;
    unsigned number;
    if (!PyArg_ParseTuple(args, "OI", &bus, &number))
        return NULL;
    return chip_new(type, &latch_kind, bus, number);
}

static PyObject *latch_show(struct latch *self, PyObject *values)
{
    if (!PyTuple_Check(values) || PyTuple_GET_SIZE(values) > LATCHES)
        return PyErr_Format(PyExc_TypeError, "a tuple of up to %d numbers", LATCHES);
    u8 shown[LATCHES];
    bool known[LATCHES] = {false};
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values); i++) {
        PyObject *value = PyTuple_GET_ITEM(values, i);
        if (value == Py_None)
            continue;
        unsigned long number = PyLong_AsUnsignedLong(value);
        if (number == (unsigned long)-1 && PyErr_Occurred())
            return NULL;
        shown[i] = (u8)number;
        known[i] = true;
    }
    bus_enter(self->chip.bus);
    memcpy(self->values, shown, sizeof shown);
    memcpy(self->known, known, sizeof known);
    pthread_mutex_unlock(&self->chip.bus->lock);
    Py_RETURN_NONE;
}

static PyMethodDef latch_methods[] = {
    CHIP_METHODS,
    {"show", (PyCFunction)latch_show, METH_O,
     "show((byte or None, ...)): what reads of each region give from now on; None: Python is asked"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot latch_slots[] = {
    {Py_tp_doc, "Latch(bus, device): registers of which Python says what they read as."}, {Py_tp_new, latch_new},
    {Py_tp_dealloc, chip_dealloc}, {Py_tp_methods, latch_methods}, {0, NULL},
};
PyType_Spec latch_spec = {"vmfs.devices._chips.Latch", sizeof(struct latch), 0, Py_TPFLAGS_DEFAULT, latch_slots};
