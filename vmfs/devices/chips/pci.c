/* PCI: configuration mechanism 1 (PCI 3.0, 3.2.2.3), the functions' configuration spaces, INTx and MSI-X. And latches: registers whose
 * reads do nothing.
 *
 * What moves a BAR or switches decoding is Python's, and so are bytes that it has marked: a write of either is not answered. */
#include "pci.h"

#include <string.h>

#include "module.h"

enum { FUNCTIONS = 256 };
enum { COMMAND = 4, STATUS = 6, MASTER = 4, INTX_OFF_HIGH = 4, STATUS_INTERRUPT = 8 };
enum { MSIX_CONTROL_HIGH = 3, MSIX_ENABLED = 0x80, MSIX_MASKED = 0x40, VECTOR_MASKED = 1, ENTRY = 16 };
enum { ADDRESS, DATA /* regions */ };

/* ---- A function ------------------------------------------------------------------------------------------------------------------- */

static u8 msix_control(const struct function *f) { return f->msix_at ? f->bytes.config[f->msix_at + MSIX_CONTROL_HIGH] : 0; }

bool function_has_msix(const struct function *f) { return msix_control(f) & MSIX_ENABLED; }

/* Send what waits and may be sent. */
static void send_waiting(struct function *f)
{
    if ((msix_control(f) & (MSIX_ENABLED | MSIX_MASKED)) != MSIX_ENABLED || !(f->bytes.config[COMMAND] & MASTER))
        return;
    for (u64 left = f->waiting; left; left &= left - 1) {
        unsigned vector = (unsigned)__builtin_ctzll(left);
        if (f->table[vector].control & VECTOR_MASKED)
            continue;
        f->waiting &= ~(1ull << vector);
        bus_signal_msi(f->chip.bus, f->table[vector].address, f->table[vector].data);
    }
}

void function_signal(struct function *f, unsigned vector)
{
    if (vector >= f->vectors)
        return;
    f->waiting |= 1ull << vector;
    send_waiting(f);
}

void function_drive(struct function *f)
{
    u8 *status = &f->bytes.config[STATUS];
    *status = (u8)(f->pending ? *status | STATUS_INTERRUPT : *status & ~STATUS_INTERRUPT);
    bool level = f->pending && !(f->bytes.config[COMMAND + 1] & INTX_OFF_HIGH) && !function_has_msix(f);
    if (f->has_pin) {
        bus_set_line(f->chip.bus, f->chip.number, f->gsi, level);
        bus_set_pirq(f->chip.bus, f->chip.number, f->pirq, level);
    }
    if (f->waiting)
        send_waiting(f);
}

u64 function_read_msix(const struct function *f, u64 offset, unsigned size)
{
    u64 value = 0;
    const u8 *bytes = (const u8 *)f->table;
    if (offset >= MSIX_PENDING)
        offset -= MSIX_PENDING, bytes = (const u8 *)&f->waiting;
    u64 length = bytes == (const u8 *)f->table ? (u64)f->vectors * ENTRY : sizeof f->waiting;
    for (unsigned i = 0; i < size; i++)
        if (offset + i < length)
            value |= (u64)bytes[offset + i] << 8 * i;
    return value;
}

/* By 4 or 8 bytes (6.8.2); others do nothing. */
static void write_msix(struct function *f, u64 offset, unsigned size, u64 value)
{
    if ((size != 4 && size != 8) || offset % size || offset + size > (u64)f->vectors * ENTRY)
        return;
    memcpy((u8 *)f->table + offset, &value, size);
    unsigned vector = (unsigned)(offset / ENTRY);
    f->table[vector].address &= ~3ull;
    f->table[vector].control &= VECTOR_MASKED;
    send_waiting(f);
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
    PyObject *bus, *pin;
    unsigned number, gsi = 0, pirq = 0;
    if (!PyArg_ParseTuple(args, "OIO", &bus, &number, &pin) || (pin != Py_None && !PyArg_ParseTuple(pin, "II", &gsi, &pirq)))
        return NULL;
    if (gsi >= LINES || pirq >= PIRQS)
        return PyErr_Format(PyExc_ValueError, "a line of %d, and an input of %d", LINES, PIRQS);
    struct function *self = (struct function *)chip_new(type, &function_kind, bus, number);
    if (self)
        self->has_pin = pin != Py_None, self->gsi = gsi, self->pirq = pirq;
    return (PyObject *)self;
}

static PyObject *function_set_irq(struct function *self, PyObject *level)
{
    int pending = PyObject_IsTrue(level);
    if (pending < 0)
        return NULL;
    bus_enter(self->chip.bus);
    self->pending = pending;
    function_drive(self);
    return bus_done(self->chip.bus);
}

static PyObject *function_driven(struct function *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    function_drive(self);
    return bus_done(self->chip.bus);
}

static PyObject *function_set_msix(struct function *self, PyObject *args)
{
    unsigned at, vectors;
    if (!PyArg_ParseTuple(args, "II", &at, &vectors))
        return NULL;
    if (!at || at > CONFIG_BYTES - 12 || !vectors || vectors > VECTORS)
        return PyErr_Format(PyExc_ValueError, "a capability of up to %d vectors", VECTORS);
    self->msix_at = at, self->vectors = vectors;
    Py_RETURN_NONE;
}

static PyObject *function_msix_read(struct function *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    if (!chip_numbers(args, count, n, 2))
        return NULL;
    bus_enter(self->chip.bus);
    u64 value = function_read_msix(self, n[0], n[1] > 8 ? 8 : (unsigned)n[1]);
    pthread_mutex_unlock(&self->chip.bus->lock);
    return PyLong_FromUnsignedLongLong(value);
}

static PyObject *function_msix_write(struct function *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[3];
    if (!chip_numbers(args, count, n, 3))
        return NULL;
    bus_enter(self->chip.bus);
    write_msix(self, n[0], (unsigned)n[1], n[2]);
    return bus_done(self->chip.bus);
}

static PyObject *function_get_table(struct function *self, void *ignored)
{
    return PyBytes_FromStringAndSize((const char *)self->table, (Py_ssize_t)self->vectors * ENTRY);
}

static int function_set_table(struct function *self, PyObject *value, void *ignored)
{
    char *data;
    Py_ssize_t size;
    if (!value || PyBytes_AsStringAndSize(value, &data, &size))
        return -1;
    if (size != (Py_ssize_t)self->vectors * ENTRY) {
        PyErr_SetString(PyExc_ValueError, "16 bytes a vector");
        return -1;
    }
    bus_enter(self->chip.bus);
    memcpy(self->table, data, (size_t)size);
    pthread_mutex_unlock(&self->chip.bus->lock);
    return 0;
}

static PyObject *function_get_waiting(struct function *self, void *ignored) { return PyLong_FromUnsignedLongLong(self->waiting); }

static int function_set_waiting(struct function *self, PyObject *value, void *ignored)
{
    u64 waiting;
    if (!value || !chip_numbers(&value, 1, &waiting, 1))
        return -1;
    bus_enter(self->chip.bus);
    self->waiting = waiting;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return 0;
}

static int function_buffer(struct function *self, Py_buffer *view, int flags)
{
    return PyBuffer_FillInfo(view, (PyObject *)self, &self->bytes, sizeof self->bytes, 0, flags);
}

static PyObject *function_pending(struct function *self, void *ignored) { return PyBool_FromLong(self->pending); }

static PyMethodDef function_methods[] = {
    {"set_irq", (PyCFunction)function_set_irq, METH_O, "set_irq(level): drive INTA"},
    {"drive", (PyCFunction)function_driven, METH_NOARGS, "drive(): after the command register, or MSI-X's, has changed"},
    {"set_msix", (PyCFunction)function_set_msix, METH_VARARGS, "set_msix(offset of the capability, vectors)"},
    {"read_msix", (PyCFunction)(void (*)(void))function_msix_read, METH_FASTCALL,
     "read_msix(offset, size): of the table at 0 and the pending bits at MSIX_PENDING"},
    {"write_msix", (PyCFunction)(void (*)(void))function_msix_write, METH_FASTCALL, "write_msix(offset, size, value)"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef function_attributes[] = {
    {"pending", (getter)function_pending, NULL, "INTA as the device drives it", NULL},
    {"table", (getter)function_get_table, (setter)function_set_table, "of MSI-X: 16 bytes a vector", NULL},
    {"waiting", (getter)function_get_waiting, (setter)function_set_waiting, "of MSI-X: the pending bits", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot function_slots[] = {
    {Py_tp_doc, "Function(bus, device, (gsi, pirq) of INTA or None): a buffer of the configuration space, the masks of its writable bits, and what is\n"
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
