/* The data ports of two IDE channels, and the registers that drivers use for each command: those of the command block, the status, and the
 * bus master's. A block that a drive has for the host, or waits for, goes by here without Python, but for the access that ends it: that is
 * Python's, which calls `last` for the rest.
 *
 * What a driver writes into the command block, and that it has read the status, is kept in a log, which Python takes (`take`) before it does
 * anything with the channel. Then nothing is answered here, until `show` says again how the channel is. */
#include <string.h>

#include "module.h"

enum { CHANNELS = 2, BLOCK_MOST = 1 << 16, LOG = 32 };
enum { COMMAND_0, CONTROL_0, COMMAND_1, CONTROL_1, BUS_MASTER /* regions */ };
enum { DATA, FIRST = 1, DEVICE = 6, STATUS = 7, DEV = 0x10 };
enum { BM_COMMAND = 0, BM_STATUS = 2, BM_TABLE = 4, BM_BYTES = 8 };
enum { START = 1, TO_RAM = 8, ACTIVE = 1, ERROR = 2, INTERRUPT = 4, CAPABLE = 0x60 };

struct channel {
    u8 *data;                   /* the block */
    u32 at, end;
    bool to_host, open;
    unsigned gsi;
    bool shown;                 /* what follows is how it is, with what is in the log */
    u8 status, unit;            /* of the drive that is selected */
    bool pending;               /* its INTRQ, */
    bool level;                 /* and the line */
    bool takes;                 /* the drives take registers */
    u8 bus_command, bus_status;
    u32 bus_table;
    unsigned logged;
    struct { u8 offset, value; } log[LOG]; /* a write of a register; STATUS: it was read */
};
struct pio { struct chip chip; struct channel channels[CHANNELS]; };

static void drive_line(struct pio *p, struct channel *c, bool level)
{
    if (level && !c->level)
        c->bus_status |= INTERRUPT;
    c->level = level;
    bus_set_line(p->chip.bus, p->chip.number, c->gsi, level);
}

static bool bus_master(struct channel *c, struct bus_access *a, u64 offset)
{
    if (!a->write) {
        u8 bytes[BM_BYTES + 8] = {c->bus_command, 0, c->bus_status, 0};
        memcpy(bytes + BM_TABLE, &c->bus_table, sizeof c->bus_table);
        memcpy(&a->value, bytes + offset, sizeof a->value);
        return true;
    }
    if (offset == BM_TABLE && a->size == 4) {
        c->bus_table = (u32)a->value & ~3u;
        return true;
    }
    if (a->size != 1)
        return false;
    u8 value = (u8)a->value;
    if (offset == BM_STATUS) {
        c->bus_status = (u8)((c->bus_status & ~(value & (ERROR | INTERRUPT)) & ~CAPABLE) | (value & CAPABLE));
        return true;
    }
    if (offset != BM_COMMAND || (value & START && !(c->bus_command & START)) || (c->bus_status & ACTIVE))
        return false;           /* it begins something, or may end it */
    c->bus_command = value & (START | TO_RAM);
    return true;
}

static bool command_block(struct pio *p, struct channel *c, struct bus_access *a, u64 offset)
{
    if (offset == STATUS && !a->write) {
        a->value = c->status;
        if (!c->pending)
            return true;
        if (c->logged == LOG)
            return false;
        c->pending = false;
        drive_line(p, c, false);
    } else if (!a->write || !c->takes || a->size != 1 || c->logged == LOG || offset < FIRST || offset > DEVICE ||
               (offset == DEVICE && !(a->value & DEV) != !c->unit)) {
        return false;
    }
    c->log[c->logged].offset = (u8)offset, c->log[c->logged++].value = (u8)a->value;
    return true;
}

static bool pio_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct pio *p = (struct pio *)chip;
    if (region > BUS_MASTER)
        return false;
    struct channel *c = &p->channels[region == BUS_MASTER ? offset / BM_BYTES % CHANNELS : region / 2];
    if (region == BUS_MASTER)
        return bus_master(c, a, offset % BM_BYTES);
    if (region & 1) {
        a->value = c->status;
        return !a->write && c->shown;
    }
    if (offset)
        return c->shown && command_block(p, c, a, offset);
    if (!c->open || a->write == c->to_host || c->end - c->at <= a->size)
        return false;
    if (a->write) {
        for (unsigned i = 0; i < a->size; i++)
            c->data[c->at++] = (u8)(a->value >> 8 * i);
    } else {
        a->value = 0;
        for (unsigned i = 0; i < a->size; i++)
            a->value |= (u64)c->data[c->at++] << 8 * i;
    }
    return true;
}

/* All but the access that ends the block. */
static u32 pio_string(struct chip *chip, bool write, unsigned region, u64 offset, unsigned size, u32 count, u8 *data)
{
    struct pio *p = (struct pio *)chip;
    if (offset || (region != COMMAND_0 && region != COMMAND_1))
        return 0;
    struct channel *c = &p->channels[region / 2];
    if (!c->open || write == c->to_host || c->at == c->end)
        return 0;
    u32 most = (c->end - c->at - 1) / size;
    count = count < most ? count : most;
    if (write)
        memcpy(c->data + c->at, data, (size_t)count * size);
    else
        memcpy(data, c->data + c->at, (size_t)count * size);
    c->at += count * size;
    return count;
}
static const struct chip_kind pio_kind = {.access = pio_access, .string = pio_string};

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static PyObject *pio_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus;
    unsigned number, gsis[CHANNELS];
    if (!PyArg_ParseTuple(args, "OI(II)", &bus, &number, &gsis[0], &gsis[1]))
        return NULL;
    if (gsis[0] >= LINES || gsis[1] >= LINES)
        return PyErr_Format(PyExc_ValueError, "there are %d lines", LINES);
    struct pio *self = (struct pio *)chip_new(type, &pio_kind, bus, number);
    for (unsigned i = 0; self && i < CHANNELS; i++) {
        self->channels[i].gsi = gsis[i];
        if (!(self->channels[i].data = calloc(1, BLOCK_MOST))) {
            Py_CLEAR(self);
            PyErr_NoMemory();
        }
    }
    return (PyObject *)self;
}

static void pio_dealloc(struct pio *self)
{
    for (unsigned i = 0; i < CHANNELS; i++)
        free(self->channels[i].data);
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
    struct channel *c = &self->channels[channel];
    memcpy(c->data, data.buf, (size_t)data.len);
    c->at = (u32)at, c->end = (u32)data.len, c->to_host = to_host, c->open = true;
    bus_leave(self->chip.bus);
    PyBuffer_Release(&data);
    Py_RETURN_NONE;
}

static struct channel *channel_of(struct pio *self, PyObject *argument)
{
    unsigned long channel = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred())
        return NULL;
    if (channel < CHANNELS)
        return &self->channels[channel];
    PyErr_SetString(PyExc_ValueError, "no such channel");
    return NULL;
}

static PyObject *pio_close(struct pio *self, PyObject *argument)
{
    struct channel *c = channel_of(self, argument);
    if (!c)
        return NULL;
    chip_enter(&self->chip);
    c->open = false, c->at = c->end = 0;
    return bus_done(self->chip.bus);
}

static PyObject *pio_state(struct pio *self, PyObject *argument)
{
    struct channel *c = channel_of(self, argument);
    if (!c)
        return NULL;
    if (!c->open)
        Py_RETURN_NONE;
    return Py_BuildValue("(Oy#I)", c->to_host ? Py_True : Py_False, c->data, (Py_ssize_t)c->end, c->at);
}

/* The last access of a block, of up to `size` bytes: those that are left. */
static PyObject *pio_last(struct pio *self, PyObject *args)
{
    unsigned channel, size;
    unsigned long long value;
    int write;
    if (!PyArg_ParseTuple(args, "IpIK", &channel, &write, &size, &value) || channel >= CHANNELS)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no such channel");
    struct channel *c = &self->channels[channel];
    u64 read = 0;
    chip_enter(&self->chip);
    if (c->open && c->to_host != (bool)write)
        for (unsigned i = 0; i < size && i < 8 && c->at < c->end; i++, c->at++) {
            if (write)
                c->data[c->at] = (u8)(value >> 8 * i);
            else
                read |= (u64)c->data[c->at] << 8 * i;
        }
    bool done = c->open && c->at == c->end;
    bus_leave(self->chip.bus);
    return Py_BuildValue("(KO)", (unsigned long long)read, done ? Py_True : Py_False);
}

static PyObject *pio_take(struct pio *self, PyObject *argument)
{
    struct channel *c = channel_of(self, argument);
    if (!c)
        return NULL;
    u8 bytes[2 * LOG];
    Py_ssize_t count = 0;
    chip_enter(&self->chip);
    for (unsigned i = 0; i < c->logged; i++)
        bytes[count++] = c->log[i].offset, bytes[count++] = c->log[i].value;
    c->logged = 0;
    c->shown = false;
    return bus_leave(self->chip.bus) ? PyBytes_FromStringAndSize((const char *)bytes, count) : NULL;
}

static PyObject *pio_show(struct pio *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[6];
    if (!chip_numbers(args, count, n, 6) || n[0] >= CHANNELS)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no such channel");
    struct channel *c = &self->channels[n[0]];
    chip_enter(&self->chip);
    c->status = (u8)n[1], c->unit = (u8)n[2], c->pending = n[3], c->takes = n[5];
    c->shown = true;
    drive_line(self, c, n[4]);
    return bus_done(self->chip.bus);
}

static PyObject *pio_bus(struct pio *self, PyObject *argument)
{
    struct channel *c = channel_of(self, argument);
    return c ? Py_BuildValue("(iiI)", c->bus_command, c->bus_status, c->bus_table) : NULL;
}

static PyObject *pio_set_bus(struct pio *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[4];
    if (!chip_numbers(args, count, n, 4) || n[0] >= CHANNELS)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no such channel");
    struct channel *c = &self->channels[n[0]];
    chip_enter(&self->chip);
    c->bus_command = n[1] & (START | TO_RAM), c->bus_status = n[2] & (ACTIVE | ERROR | INTERRUPT | CAPABLE), c->bus_table = (u32)n[3] & ~3u;
    return bus_done(self->chip.bus);
}

static PyObject *pio_mark_bus(struct pio *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[3];
    if (!chip_numbers(args, count, n, 3) || n[0] >= CHANNELS)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no such channel");
    struct channel *c = &self->channels[n[0]];
    chip_enter(&self->chip);
    c->bus_status = (u8)((c->bus_status & ~n[1]) | n[2]);
    return bus_done(self->chip.bus);
}

static PyMethodDef pio_methods[] = {
    CHIP_METHODS,
    {"open", (PyCFunction)pio_open, METH_VARARGS,
     "open(channel, to_host, data, at): a block to be read, or written; `at` bytes of it have been"},
    {"close", (PyCFunction)pio_close, METH_O, "close(channel): there is no block"},
    {"state", (PyCFunction)pio_state, METH_O, "state(channel) -> (to_host, data, at), or None"},
    {"last", (PyCFunction)pio_last, METH_VARARGS, "last(channel, write, size, value) -> (value, whether the block is done)"},
    {"take", (PyCFunction)pio_take, METH_O,
     "take(channel) -> bytes: the log, two a time: a register's offset and what was written; 7: the status was read. Nothing is answered then"},
    {"show", (PyCFunction)(void (*)(void))pio_show, METH_FASTCALL,
     "show(channel, status, unit, pending, level, takes): how it is, and is answered here"},
    {"bus", (PyCFunction)pio_bus, METH_O, "bus(channel) -> (command, status, table): the bus master's registers"},
    {"set_bus", (PyCFunction)(void (*)(void))pio_set_bus, METH_FASTCALL, "set_bus(channel, command, status, table)"},
    {"mark_bus", (PyCFunction)(void (*)(void))pio_mark_bus, METH_FASTCALL,
     "mark_bus(channel, clear, set): bits of its status, whatever the CPU does to others meanwhile"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot pio_slots[] = {
    {Py_tp_doc, "Pio(bus, device, (line, line)): two IDE channels."}, {Py_tp_new, pio_new}, {Py_tp_dealloc, pio_dealloc},
    {Py_tp_methods, pio_methods}, {0, NULL},
};
PyType_Spec pio_spec = {"vmfs.devices._chips.Pio", sizeof(struct pio), 0, Py_TPFLAGS_DEFAULT, pio_slots};
