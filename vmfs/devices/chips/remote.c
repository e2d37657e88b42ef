/* The remote DMA of a DP8390 on an NE2000: what goes by its data port into or out of the card's memory. The first and the last access,
 * those at the ring's end and those elsewhere than in the memory are Python's. */
#include "module.h"

enum { DATA_PORT = 0x10, MEMORY = 0x4000, MEMORY_SIZE = 0x4000 };
enum { READS = 1, WRITES = 2, WORDS = 4 }; /* bits of `mode` */

struct remote { struct chip chip; Py_buffer memory; u32 at, left, stop, mode; };

static bool remote_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct remote *r = (struct remote *)chip;
    bool words = a->size == 2 || a->size == 4;
    if (region || offset != DATA_PORT || !(r->mode & (a->write ? WRITES : READS)) || (r->mode & WORDS ? !words : a->size != 1))
        return false;
    u32 end = r->at + a->size;
    if (r->left <= a->size || r->at < MEMORY || end > MEMORY + MEMORY_SIZE || (r->at < r->stop && end >= r->stop))
        return false;
    u8 *data = (u8 *)r->memory.buf + (r->at - MEMORY);
    if (a->write)
        for (unsigned i = 0; i < a->size; i++)
            data[i] = (u8)(a->value >> 8 * i);
    else {
        a->value = 0;
        for (unsigned i = 0; i < a->size; i++)
            a->value |= (u64)data[i] << 8 * i;
    }
    r->at = end, r->left -= a->size;
    return true;
}
static const struct chip_kind remote_kind = {.access = remote_access};

static PyObject *remote_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus, *memory;
    unsigned number;
    if (!PyArg_ParseTuple(args, "OIO", &bus, &number, &memory))
        return NULL;
    struct remote *self = (struct remote *)chip_new(type, &remote_kind, bus, number);
    if (self && PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE))
        Py_CLEAR(self);
    if (self && self->memory.len != MEMORY_SIZE) {
        PyErr_SetString(PyExc_ValueError, "the card's memory has 16 KiB");
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void remote_dealloc(struct remote *self)
{
    if (self->memory.obj)
        PyBuffer_Release(&self->memory);
    chip_dealloc(&self->chip);
}

static PyObject *remote_set(struct remote *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[4];
    if (!chip_numbers(args, count, n, 4))
        return NULL;
    chip_enter(&self->chip);
    self->at = (u32)n[0] & 0xFFFF, self->left = (u32)n[1] & 0xFFFF, self->mode = (u32)n[2], self->stop = (u32)n[3];
    return bus_done(self->chip.bus);
}

static PyObject *remote_place(struct remote *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    u32 at = self->at, left = self->left;
    bus_leave(self->chip.bus);
    return Py_BuildValue("(II)", at, left);
}

static PyMethodDef remote_methods[] = {
    CHIP_METHODS,
    {"set", (PyCFunction)(void (*)(void))remote_set, METH_FASTCALL,
     "set(at, left, mode, stop): so much is left, from there on; mode: 1 is read, 2 is written, and 4, by words; stop: the ring's end"},
    {"place", (PyCFunction)remote_place, METH_NOARGS, "place() -> (at, left)"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot remote_slots[] = {
    {Py_tp_doc, "Remote(bus, device, memory): the data port of an NE2000, whose memory that is."}, {Py_tp_new, remote_new},
    {Py_tp_dealloc, remote_dealloc}, {Py_tp_methods, remote_methods}, {0, NULL},
};
PyType_Spec remote_spec = {"vmfs.devices._chips.Remote", sizeof(struct remote), 0, Py_TPFLAGS_DEFAULT, remote_slots};
