/* A chain of descriptors of a split virtqueue (VIRTIO 1.2, 2.7.5), read as Python's Virtqueue reads it.
 *
 * It answers chains that are right. For any other it answers None, and Python reads the chain again and says what is wrong with it:
 * so each rule's sentence stands in one place. Each field is read once, since another CPU may change it. */
#include "module.h"
#include "ring.h"

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, MAX_INDIRECT = 1024, REGIONS = 8 };
static const u64 max_bytes = 1ull << 32;

struct descriptor { u64 address; u32 length; uint16_t flags, next; };

struct space {
    const u8 *ram;
    u64 size;
    unsigned count;
    struct { u64 start, end; } regions[REGIONS];
};

static bool is_ram(const struct space *s, u64 address, u64 length)
{
    for (unsigned i = 0; i < s->count; i++)
        if (address >= s->regions[i].start && address < s->regions[i].end)
            return length <= s->regions[i].end - address && s->regions[i].end <= s->size;
    return false;
}

static bool add_span(PyObject *list, u64 address, u32 length)
{
    PyObject *span = Py_BuildValue("(KI)", (unsigned long long)address, length);
    bool added = span && !PyList_Append(list, span);
    Py_XDECREF(span);
    return added;
}

/* False: it is none, or, with an exception, there is no memory. */
static bool walk(const struct space *s, u64 table, u32 count, u32 head, bool indirect, PyObject *readable, PyObject *writable)
{
    u32 index = head, left = count;
    bool is_indirect = false;
    u64 total = 0;
    if (!is_ram(s, table, 16ull * count))
        return false;
    for (;;) {
        if (index >= count || !left--)
            return false;
        struct descriptor d;
        memcpy(&d, s->ram + table + 16ull * index, sizeof d);
        if (d.flags & INDIRECT) {
            if (!indirect || is_indirect || d.flags & NEXT || d.length % 16 || !d.length || d.length > 16 * MAX_INDIRECT ||
                !is_ram(s, d.address, d.length))
                return false;
            table = d.address, count = left = d.length / 16, index = 0, is_indirect = true;
            continue;
        }
        if (d.length && !is_ram(s, d.address, d.length))
            return false;
        total += d.length;
        if (!(d.flags & WRITE) && PyList_GET_SIZE(writable))
            return false;
        if (d.length && !add_span(d.flags & WRITE ? writable : readable, d.address, d.length))
            return false;
        if (!(d.flags & NEXT))
            return total <= max_bytes;
        index = d.next;
    }
}

PyObject *ring_chain(PyObject *module, PyObject *args)
{
    Py_buffer ram;
    PyObject *regions;
    unsigned long long table;
    unsigned count, head;
    int indirect;
    if (!PyArg_ParseTuple(args, "y*O!KIIp", &ram, &PyTuple_Type, &regions, &table, &count, &head, &indirect))
        return NULL;
    struct space space = {.ram = ram.buf, .size = (u64)ram.len};
    PyObject *readable = PyList_New(0), *writable = PyList_New(0), *result = NULL;
    bool known = readable && writable;
    for (Py_ssize_t i = 0; known && i < PyTuple_GET_SIZE(regions); i++) {
        unsigned long long start, end;
        if (i == REGIONS || !PyTuple_Check(PyTuple_GET_ITEM(regions, i)))
            PyErr_Format(PyExc_TypeError, "up to %d regions (start, end)", REGIONS);
        else if (PyArg_ParseTuple(PyTuple_GET_ITEM(regions, i), "KK", &start, &end))
            space.regions[space.count].start = start, space.regions[space.count++].end = end;
        known = !PyErr_Occurred();
    }
    if (known && walk(&space, table, count, head, indirect, readable, writable))
        result = PyTuple_Pack(2, readable, writable);
    else if (!PyErr_Occurred())
        result = Py_NewRef(Py_None);
    Py_XDECREF(readable);
    Py_XDECREF(writable);
    PyBuffer_Release(&ram);
    return result;
}
