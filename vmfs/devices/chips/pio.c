/* The data port of an IDE channel, and the registers that are polled. A block that a drive has for the host, or waits for, goes
 * by here without Python, but for the access that ends it: that is Python's, which calls `take` or `put` for the rest. */
#include "module.h"

enum { CHANNELS = 2, BLOCK_MOST = 1 << 16, STATUS = 7 };
enum { COMMAND_0, CONTROL_0, COMMAND_1, CONTROL_1 /* regions */ };

struct block { u8 *data; u32 at, end; bool to_host, open; u8 status; bool quiet; /* to read the status does nothing */ };
struct pio { struct chip chip; struct block blocks[CHANNELS]; };

static bool pio_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct pio *p = (struct pio *)chip;
    if (region > CONTROL_1)
        return false;
    struct block *b = &p->blocks[region / 2];
    if (region & 1 || offset == STATUS) {
        if (a->write || !b->quiet)
            return false;
        a->value = b->status;
        return true;
    }
    if (offset || !b->open || a->write == b->to_host || b->end - b->at <= a->size)
        return false;
    if (a->write) {
        for (unsigned i = 0; i < a->size; i++)
            b->data[b->at++] = (u8)(a->value >> 8 * i);
    } else {
        a->value = 0;
        for (unsigned i = 0; i < a->size; i++)
            a->value |= (u64)b->data[b->at++] << 8 * i;
    }
    return true;
}
static const struct chip_kind pio_kind = {pio_access, NULL, false};

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static PyObject *pio_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus;
    unsigned number;
    if (!PyArg_ParseTuple(args, "OI", &bus, &number))
        return NULL;
    struct pio *self = (struct pio *)chip_new(type, &pio_kind, bus, number);
    for (unsigned i = 0; self && i < CHANNELS; i++)
        if (!(self->blocks[i].data = calloc(1, BLOCK_MOST))) {
            Py_CLEAR(self);
            PyErr_NoMemory();
        }
    return (PyObject *)self;
}

static void pio_dealloc(struct pio *self)
{
    for (unsigned i = 0; i < CHANNELS; i++)
        free(self->blocks[i].data);
    chip_dealloc(&self->chip);
}

static PyObject *pio_open(struct pio *self, PyObject *args)
{
    unsigned channel;
    int to_host;
    Py_ssize_t at;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "Ipy*n", &channel, &to_host, &data, &at))
        return NULL;
    if (channel >= CHANNELS || data.len > BLOCK_MOST || at < 0 || at > data.len) {
        PyBuffer_Release(&data);
        PyErr_SetString(PyExc_ValueError, "a block of up to 64 KiB of a channel");
        return NULL;
    }
    chip_enter(&self->chip);
    struct block *b = &self->blocks[channel];
    memcpy(b->data, data.buf, (size_t)data.len);
    b->at = (u32)at, b->end = (u32)data.len, b->to_host = to_host, b->open = true;
    bus_leave(self->chip.bus);
    PyBuffer_Release(&data);
    Py_RETURN_NONE;
}

static struct block *block_of(struct pio *self, PyObject *argument)
{
    unsigned long channel = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred())
        return NULL;
    if (channel < CHANNELS)
        return &self->blocks[channel];
    PyErr_SetString(PyExc_ValueError, "no such channel");
    return NULL;
}

static PyObject *pio_close(struct pio *self, PyObject *argument)
{
    struct block *b = block_of(self, argument);
    if (!b)
        return NULL;
    chip_enter(&self->chip);
    b->open = false, b->at = b->end = 0;
    return bus_done(self->chip.bus);
}

static PyObject *pio_state(struct pio *self, PyObject *argument)
{
    struct block *b = block_of(self, argument);
    if (!b)
        return NULL;
    if (!b->open)
        Py_RETURN_NONE;
    return Py_BuildValue("(Oy#I)", b->to_host ? Py_True : Py_False, b->data, (Py_ssize_t)b->end, b->at);
}

/* The last access of a block, of up to `size` bytes: those that are left. */
static PyObject *pio_last(struct pio *self, PyObject *args)
{
    unsigned channel, size;
    unsigned long long value;
    int write;
    if (!PyArg_ParseTuple(args, "IpIK", &channel, &write, &size, &value) || channel >= CHANNELS)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no such channel");
    struct block *b = &self->blocks[channel];
    u64 read = 0;
    chip_enter(&self->chip);
    if (b->open && b->to_host != (bool)write)
        for (unsigned i = 0; i < size && i < 8 && b->at < b->end; i++, b->at++) {
            if (write)
                b->data[b->at] = (u8)(value >> 8 * i);
            else
                read |= (u64)b->data[b->at] << 8 * i;
        }
    bool done = b->open && b->at == b->end;
    bus_leave(self->chip.bus);
    return Py_BuildValue("(KO)", (unsigned long long)read, done ? Py_True : Py_False);
}

static PyObject *pio_show(struct pio *self, PyObject *args)
{
    unsigned channel;
    PyObject *status;
    if (!PyArg_ParseTuple(args, "IO", &channel, &status) || channel >= CHANNELS)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no such channel");
    unsigned long value = status == Py_None ? 0 : PyLong_AsUnsignedLong(status);
    if (PyErr_Occurred())
        return NULL;
    chip_enter(&self->chip);
    self->blocks[channel].quiet = status != Py_None, self->blocks[channel].status = (u8)value;
    return bus_done(self->chip.bus);
}

static PyMethodDef pio_methods[] = {
    CHIP_METHODS,
    {"open", (PyCFunction)pio_open, METH_VARARGS,
     "open(channel, to_host, data, at): a block to be read, or written; `at` bytes of it have been"},
    {"close", (PyCFunction)pio_close, METH_O, "close(channel): there is no block"},
    {"state", (PyCFunction)pio_state, METH_O, "state(channel) -> (to_host, data, at), or None"},
    {"last", (PyCFunction)pio_last, METH_VARARGS, "last(channel, write, size, value) -> (value, whether the block is done)"},
    {"show", (PyCFunction)pio_show, METH_VARARGS, "show(channel, status): what it reads as while that does nothing; None: Python's"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot pio_slots[] = {
    {Py_tp_doc, "Pio(bus, device): the data ports of two IDE channels."}, {Py_tp_new, pio_new}, {Py_tp_dealloc, pio_dealloc},
    {Py_tp_methods, pio_methods}, {0, NULL},
};
PyType_Spec pio_spec = {"vmfs.devices._chips.Pio", sizeof(struct pio), 0, Py_TPFLAGS_DEFAULT, pio_slots};
