/* The guest's RAM: where it is, and what devices have written of it. */
#include "ram.h"

#include <string.h>

#include "lists.h"
#include "module.h"

bool ram_has(const struct ram *ram, u64 address, u64 length)
{
    for (unsigned i = 0; i < ram->count; i++)
        if (address >= ram->regions[i].start && address < ram->regions[i].end)
            return length <= ram->regions[i].end - address && ram->regions[i].end <= ram->size;
    return false;
}

static void mark(struct ram *ram, u64 first, u64 last)
{
    while (first <= last && first / PART < ram->part_count) {
        u8 **part = &ram->parts[first / PART];
        u64 at = first % PART, count = last - first + 1 < PART - at ? last - first + 1 : PART - at;
        if (!*part && !(*part = calloc(1, PART)))
            abort(); /* 32 KiB; a page that is missing in the log would be one that its readers never see */
        memset(*part + at, 1, count);
        first += count;
    }
}

void ram_wrote(struct ram *ram, const struct span *spans, unsigned count)
{
    struct bus *bus = ram->bus;
    for (unsigned i = 0, next; i < count; i = next) {
        u64 start = spans[i].address, end = start + spans[i].length;
        for (next = i + 1; next < count && spans[next].address == end; next++)
            end += spans[next].length;
        if (start == end)
            continue;
        pthread_mutex_lock(&ram->lock);
        mark(ram, start / PAGE, (end - 1) / PAGE);
        ram->writes++;
        pthread_mutex_unlock(&ram->lock);
        pthread_mutex_lock(&bus->lock);
        if (bus->machine.memory_written)
            bus->machine.memory_written(bus->machine.machine, start, end - start);
        pthread_mutex_unlock(&bus->lock);
    }
}

static void unmap(struct ram *ram)
{
    if (ram->view.obj)
        PyBuffer_Release(&ram->view);
    ram->data = NULL;
    ram->size = ram->count = 0;
}

static PyObject *ram_map(struct ram *self, PyObject *args)
{
    PyObject *buffer, *regions;
    struct ram next = {0};
    if (!PyArg_ParseTuple(args, "OO!", &buffer, &PyTuple_Type, &regions))
        return NULL;
    if (PyTuple_GET_SIZE(regions) > REGIONS)
        return PyErr_Format(PyExc_ValueError, "up to %d regions", REGIONS);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(regions); i++) {
        unsigned long long start, end;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(regions, i), "KK", &start, &end))
            return NULL;
        next.regions[i].start = start, next.regions[i].end = end;
    }
    if (buffer != Py_None && PyObject_GetBuffer(buffer, &next.view, PyBUF_WRITABLE))
        return NULL;
    u64 size = (u64)next.view.len, parts = (size / PAGE + PART) / PART;
    u8 **more = parts > self->part_count ? PyMem_RawRealloc(self->parts, parts * sizeof *more) : self->parts;
    if (parts && !more) {
        PyBuffer_Release(&next.view);
        return PyErr_NoMemory();
    }
    pthread_mutex_lock(&self->lock);
    self->parts = more;
    for (; self->part_count < parts; self->part_count++)
        more[self->part_count] = NULL;
    pthread_mutex_unlock(&self->lock);
    unmap(self);
    self->view = next.view;
    self->data = next.view.buf;
    self->size = size;
    self->count = (unsigned)PyTuple_GET_SIZE(regions);
    memcpy(self->regions, next.regions, sizeof next.regions);
    Py_RETURN_NONE;
}

static PyObject *ram_wrote_spans(struct ram *self, PyObject *spans)
{
    PyObject *rows = PySequence_Fast(spans, "a sequence of (address, length)");
    if (!rows)
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(rows), at = 0;
    struct span some[64];
    while (at < count) {
        unsigned n = 0;
        for (; n < 64 && at < count; at++) {
            unsigned long long address, length;
            if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(rows, at), "KK", &address, &length)) {
                Py_DECREF(rows);
                return NULL;
            }
            if (length > UINT32_MAX || address >= self->part_count * PART * PAGE || length > self->part_count * PART * PAGE - address) {
                Py_DECREF(rows);
                return PyErr_Format(PyExc_ValueError, "%llu bytes at %llu are not RAM", length, address);
            }
            if (length)
                some[n++] = (struct span){address, (u32)length};
        }
        ram_wrote(self, some, n);
    }
    Py_DECREF(rows);
    Py_RETURN_NONE;
}

static PyObject *ram_take_dirty(struct ram *self, PyObject *ignored)
{
    PyObject *list = PyList_New(0);
    for (u64 i = 0; list && i < self->part_count; i++) {
        pthread_mutex_lock(&self->lock);
        u8 *part = self->parts[i];
        self->parts[i] = NULL;
        pthread_mutex_unlock(&self->lock);
        if (!part)
            continue;
        PyObject *row = Py_BuildValue("(Ky#)", (unsigned long long)i * PART, (const char *)part, (Py_ssize_t)PART);
        free(part);
        if (!row || PyList_Append(list, row))
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *ram_writes(struct ram *self, void *ignored)
{
    pthread_mutex_lock(&self->lock);
    u64 writes = self->writes;
    pthread_mutex_unlock(&self->lock);
    return PyLong_FromUnsignedLongLong(writes);
}

static PyObject *ram_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus;
    const struct module_state *state = PyType_GetModuleState(type);
    if (!PyArg_ParseTuple(args, "O!", state->types[TYPE_BUS], &bus))
        return NULL;
    struct ram *self = (struct ram *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->bus = (struct bus *)Py_NewRef(bus);
    pthread_mutex_init(&self->lock, NULL);
    return (PyObject *)self;
}

static void ram_dealloc(struct ram *self)
{
    PyTypeObject *type = Py_TYPE(self);
    unmap(self);
    for (u64 i = 0; i < self->part_count; i++)
        free(self->parts[i]);
    PyMem_RawFree(self->parts);
    pthread_mutex_destroy(&self->lock);
    Py_XDECREF((PyObject *)self->bus);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef ram_methods[] = {
    {"map", (PyCFunction)ram_map, METH_VARARGS,
     "map(buffer or None, ((start, end), ...)): where RAM is, by its addresses, and which of them are RAM. Nothing uses it then"},
    {"wrote", (PyCFunction)ram_wrote_spans, METH_O, "wrote([(address, length)]): devices have written that"},
    {"prps", (PyCFunction)(void (*)(void))ram_prps, METH_FASTCALL,
     "prps(prp1, prp2, length) -> [(address, length)]: the data of a command of NVMe; 1: an address is not aligned, 2: it is not RAM"},
    {"prdt", (PyCFunction)(void (*)(void))ram_prdt, METH_FASTCALL,
     "prdt(table, rows, skip, length) -> ([(address, length)] or a number as of `prps`, whether a row wants an interrupt): of AHCI's, the\n"
     "bytes after `skip`, as many as there is room for"},
    {"prds", (PyCFunction)(void (*)(void))ram_prds, METH_FASTCALL,
     "prds(table, length) -> ([(address, length)] or a number as of `prps`, whether that is all of the table): of an IDE bus master"},
    {"take_dirty", (PyCFunction)ram_take_dirty, METH_NOARGS,
     "take_dirty() -> [(first page, bytes)]: a byte a page from there on, 1 where devices have written since the last call"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef ram_attributes[] = {
    {"writes", (getter)ram_writes, NULL, "how often devices have written", NULL}, {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot ram_slots[] = {
    {Py_tp_doc, "Ram(bus): the guest's, and what devices have written of it."}, {Py_tp_new, ram_new}, {Py_tp_dealloc, ram_dealloc},
    {Py_tp_methods, ram_methods}, {Py_tp_getset, ram_attributes}, {0, NULL},
};
PyType_Spec ram_spec = {"vmfs.devices._chips.Ram", sizeof(struct ram), 0, Py_TPFLAGS_DEFAULT, ram_slots};
