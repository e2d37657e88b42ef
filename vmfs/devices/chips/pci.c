/* PCI: configuration mechanism 1 (PCI 3.0, 3.2.2.3) and the memory of PCI Express's (ECAM, PCI Express 3.0, 7.2.2), the functions' configuration spaces, INTx, MSI and MSI-X. And latches: registers whose
 * reads do nothing.
 *
 * What moves a BAR or switches decoding is Python's, and so are bytes that it has marked: a write of either is not answered. */
#include "pci.h"

#include <string.h>

#include "module.h"

enum { FUNCTIONS = 256 };
enum { COMMAND = 4, STATUS = 6, MASTER = 4, INTX_OFF_HIGH = 4, STATUS_INTERRUPT = 8 };
enum { MSIX_CONTROL_HIGH = 3, MSIX_ENABLED = 0x80, MSIX_MASKED = 0x40, VECTOR_MASKED = 1, ENTRY = 16 };
enum { MSI_CONTROL = 2, MSI_ADDRESS = 4, MSI_DATA = 0xc, MSI_MASK = 0x10, MSI_PENDING = 0x14, MSI_BYTES = 0x18, MSI_ENABLED = 1 };
enum { ADDRESS, DATA, ECAM /* regions */ };

/* ---- A function ------------------------------------------------------------------------------------------------------------------- */

static u32 config_long(const struct function *f, unsigned at)
{
    u32 value;
    memcpy(&value, f->bytes.config + at, sizeof value);
    return value;
}

static bool msi_enabled(const struct function *f) { return f->msi_at && f->bytes.config[f->msi_at + MSI_CONTROL] & MSI_ENABLED; }

/* How many messages the driver has allowed; a reserved number, or one that is too large, is all that there are. */
static unsigned msi_messages(const struct function *f)
{
    u8 control = f->bytes.config[f->msi_at + MSI_CONTROL];
    unsigned allowed = control >> 4 & 7, capable = control >> 1 & 7;
    return 1u << (allowed < capable ? allowed : capable);
}

static void add_msi_pending(struct function *f, u32 bits)
{
    u32 pending = config_long(f, f->msi_at + MSI_PENDING) | bits;
    memcpy(f->bytes.config + f->msi_at + MSI_PENDING, &pending, sizeof pending);
}

static void send_waiting_msi(struct function *f)
{
    u32 pending = config_long(f, f->msi_at + MSI_PENDING), sent = pending & ~config_long(f, f->msi_at + MSI_MASK);
    u32 data = config_long(f, f->msi_at + MSI_DATA) & 0xffff;
    u64 address = (config_long(f, f->msi_at + MSI_ADDRESS) & ~3u) | (u64)config_long(f, f->msi_at + MSI_ADDRESS + 4) << 32;
    if (!(f->bytes.config[COMMAND] & MASTER))
        return;
    pending &= ~sent;
    memcpy(f->bytes.config + f->msi_at + MSI_PENDING, &pending, sizeof pending);
    for (; sent; sent &= sent - 1) /* the low bits of the data are the message's number (6.8.1.6) */
        bus_signal_msi(f->chip.bus, address, (data & ~(msi_messages(f) - 1)) | (u32)__builtin_ctz(sent));
}

static u8 msix_control(const struct function *f) { return f->msix_at ? f->bytes.config[f->msix_at + MSIX_CONTROL_HIGH] : 0; }

bool function_has_messages(const struct function *f) { return msix_control(f) & MSIX_ENABLED || msi_enabled(f); }

static void send_waiting_msix(struct function *f)
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

/* Send what waits and may be sent. */
static void send_waiting(struct function *f)
{
    if (msi_enabled(f))
        send_waiting_msi(f);
    else
        send_waiting_msix(f);
}

void function_signal(struct function *f, unsigned vector)
{
    if (msi_enabled(f))
        add_msi_pending(f, 1u << (vector & (msi_messages(f) - 1)));
    else if (vector < f->vectors)
        f->waiting |= 1ull << vector;
    send_waiting(f);
}

void function_drive(struct function *f)
{
    u8 *status = &f->bytes.config[STATUS];
    *status = (u8)(f->pending ? *status | STATUS_INTERRUPT : *status & ~STATUS_INTERRUPT);
    bool level = f->pending && !(f->bytes.config[COMMAND + 1] & INTX_OFF_HIGH) && !function_has_messages(f);
    if (f->has_pin) {
        bus_set_line(f->chip.bus, f->chip.number, f->gsi, level);
        bus_set_pirq(f->chip.bus, f->chip.number, f->pirq, level);
    }
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

enum { DELIVERY_MODE = 8, NMI = 4, INIT = 5 };

static bool is_unmaskable(u32 data) { return (data >> DELIVERY_MODE & 7) == NMI || (data >> DELIVERY_MODE & 7) == INIT; }

/* What is masked stays so: only a CPU takes a mask away. */
static bool function_can_send_unmaskable(const struct chip *chip)
{
    const struct function *f = (const struct function *)chip;
    if (!(f->bytes.config[COMMAND] & MASTER))
        return false;
    if (msi_enabled(f)) {
        u64 messages = (1ull << msi_messages(f)) - 1;
        return messages & ~(u64)config_long(f, f->msi_at + MSI_MASK) && is_unmaskable(config_long(f, f->msi_at + MSI_DATA));
    }
    if ((msix_control(f) & (MSIX_ENABLED | MSIX_MASKED)) != MSIX_ENABLED)
        return false;
    for (unsigned i = 0; i < f->vectors; i++)
        if (!(f->table[i].control & VECTOR_MASKED) && is_unmaskable(f->table[i].data))
            return true;
    return false;
}

static bool function_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    return false; /* only by the bridge */
}
static const struct chip_kind function_kind = {.access = function_access, .can_send_unmaskable = function_can_send_unmaskable};

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

static u64 extended_read(const struct function *f, unsigned offset, unsigned size)
{
    u64 value = 0;
    for (unsigned i = 0; i < size; i++) {
        unsigned at = offset - CONFIG_BYTES + i;
        u8 byte = !f->is_express ? 0xff : at < EXTENDED_BYTES ? f->extended[at] : 0;
        value |= (u64)byte << 8 * i;
    }
    return value;
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
    chip_enter(&self->chip);
    self->pending = pending;
    function_drive(self);
    return bus_done(self->chip.bus);
}

static PyObject *function_driven(struct function *self, PyObject *ignored)
{
    chip_enter(&self->chip);
    function_drive(self);
    return bus_done(self->chip.bus);
}

static PyObject *function_send(struct function *self, PyObject *argument)
{
    u64 vector;
    if (!chip_numbers(&argument, 1, &vector, 1))
        return NULL;
    chip_enter(&self->chip);
    bool messages = function_has_messages(self);
    if (messages)
        function_signal(self, vector > VECTORS ? VECTORS : (unsigned)vector);
    return bus_leave(self->chip.bus) ? PyBool_FromLong(messages) : NULL;
}

static PyObject *function_set_extended(struct function *self, PyObject *value)
{
    char *data;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(value, &data, &size))
        return NULL;
    if (size != EXTENDED_BYTES)
        return PyErr_Format(PyExc_ValueError, "%d bytes", EXTENDED_BYTES);
    memcpy(self->extended, data, EXTENDED_BYTES);
    self->is_express = true;
    Py_RETURN_NONE;
}

static PyObject *function_set_msi(struct function *self, PyObject *argument)
{
    u64 at;
    if (!chip_numbers(&argument, 1, &at, 1))
        return NULL;
    if (!at || at > CONFIG_BYTES - MSI_BYTES)
        return PyErr_Format(PyExc_ValueError, "a capability of %d bytes", MSI_BYTES);
    self->msi_at = (unsigned)at;
    Py_RETURN_NONE;
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
    chip_enter(&self->chip);
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
    chip_enter(&self->chip);
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
    chip_enter(&self->chip);
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
    {"signal", (PyCFunction)function_send, METH_O, "signal(vector) -> bool: send a message; False: the driver has enabled none"},
    {"set_extended", (PyCFunction)function_set_extended, METH_O, "set_extended(16 bytes): it is of PCI Express, and these are from offset 256 on"},
    {"set_msi", (PyCFunction)function_set_msi, METH_O, "set_msi(offset of the capability)"},
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

/* An access has up to 4 bytes of one dword; Python makes such ones of others. */
static bool ecam_access(struct bridge *b, struct bus_access *a, u64 offset)
{
    unsigned at = offset & 0xfff;
    if ((offset & 3) + a->size > 4)
        return false;
    struct function *f = offset >> 12 < FUNCTIONS ? b->functions[offset >> 12] : NULL;
    if (!f) {
        a->value = ~0ull;
    } else if (at >= CONFIG_BYTES) {
        if (!a->write)
            a->value = extended_read(f, at, a->size);
    } else if (a->write) {
        chip_touched(&f->chip);
        return config_write(f, at, a->size, a->value);
    } else {
        return config_read(f, at, a->size, &a->value);
    }
    return true;
}

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
    if (region == ECAM)
        return ecam_access(b, a, offset);
    unsigned at = (b->address & 0xfc) + (unsigned)offset, size = 4 - (unsigned)offset;
    size = a->size < size ? a->size : size;
    struct function *f = b->address >> 16 == 0x8000 ? b->functions[b->address >> 8 & 0xff] : NULL;
    if (f && a->write)
        chip_touched(&f->chip);
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
    chip_enter(&self->chip);
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
    chip_enter(&self->chip);
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
    {Py_tp_doc, "Bridge(bus, device): region 0 is CF8, 1 is CFC, 2 is PCI Express's configuration space in memory (ECAM)."}, {Py_tp_new, bridge_new}, {Py_tp_dealloc, bridge_dealloc},
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
    chip_enter(&self->chip);
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
