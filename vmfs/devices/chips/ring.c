/* Split virtqueues (VIRTIO 1.2, 2.7), as Python's Virtqueue has them.
 *
 * What a driver has made is read here where it is right. For any other chain Python reads it again and says what is wrong with it: so each
 * rule's sentence stands in one place. Each field is read once, since another CPU may change it. */
#include "ring.h"

#include <stddef.h>
#include <structmember.h>

#include "module.h"

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, MAX_INDIRECT = 1024, NO_INTERRUPT = 1 };
static const u64 max_bytes = 1ull << 32;

struct descriptor { u64 address; u32 length; uint16_t flags, next; };

static bool add_span(struct chain *chain, const struct descriptor *d)
{
    unsigned at = chain->readable + chain->writable;
    if (at == CHAIN_MOST)
        return false;
    chain->spans[at] = (struct span){d->address, d->length};
    if (d->flags & WRITE)
        chain->writable++, chain->writable_bytes += d->length;
    else
        chain->readable++, chain->readable_bytes += d->length;
    return true;
}

static bool walk(const struct ram *ram, u64 table, u32 count, u32 head, bool indirect, struct chain *chain)
{
    u32 index = head, left = count;
    bool is_indirect = false;
    chain->head = (uint16_t)head;
    chain->readable = chain->writable = 0;
    chain->readable_bytes = chain->writable_bytes = 0;
    if (!ram_has(ram, table, 16ull * count))
        return false;
    for (;;) {
        if (index >= count || !left--)
            return false;
        struct descriptor d;
        memcpy(&d, ram->data + table + 16ull * index, sizeof d);
        if (d.flags & INDIRECT) {
            if (!indirect || is_indirect || d.flags & NEXT || d.length % 16 || !d.length || d.length > 16 * MAX_INDIRECT ||
                !ram_has(ram, d.address, d.length))
                return false;
            table = d.address, count = left = d.length / 16, index = 0, is_indirect = true;
            continue;
        }
        if (d.length && !ram_has(ram, d.address, d.length))
            return false;
        if (!(d.flags & WRITE) && chain->writable)
            return false;
        if (d.length && !add_span(chain, &d))
            return false;
        if (!(d.flags & NEXT))
            return chain->readable_bytes + chain->writable_bytes <= max_bytes;
        index = d.next;
    }
}

/* ---- A queue ----------------------------------------------------------------------------------------------------------------------- */

static uint16_t load(const struct ram *ram, u64 address)
{
    return __atomic_load_n((const uint16_t *)(ram->data + address), __ATOMIC_ACQUIRE);
}

static void store(struct ram *ram, u64 address, uint16_t value)
{
    __atomic_store_n((uint16_t *)(ram->data + address), value, __ATOMIC_RELEASE);
}

/* They were checked when the driver enabled the queue; RAM may be another since then. */
static bool is_there(const struct queue *q, const struct ram *ram)
{
    return q->size && !(q->driver & 1) && !(q->device & 3) && ram_has(ram, q->driver, 6 + 2ull * q->size) &&
           ram_has(ram, q->device, 6 + 8ull * q->size);
}

enum popped queue_pop(struct queue *q, const struct ram *ram, struct chain *chain)
{
    if (!is_there(q, ram))
        return QUEUE_WRONG;
    uint16_t count = (uint16_t)(load(ram, q->driver + 2) - q->taken);
    if (count > q->size)
        return QUEUE_WRONG;
    if (!count)
        return QUEUE_EMPTY;
    if (!walk(ram, q->descriptors, q->size, load(ram, q->driver + 4 + 2 * (q->taken % q->size)), q->indirect, chain))
        return QUEUE_WRONG;
    q->taken++;
    return QUEUE_POPPED;
}

void queue_push(struct queue *q, struct ram *ram, uint16_t head, u32 written)
{
    u32 used[2] = {head, written};
    struct span spans[2] = {{q->device + 4 + 8 * (q->used % q->size), 8}, {q->device + 2, 2}};
    memcpy(ram->data + spans[0].address, used, sizeof used);
    store(ram, spans[1].address, ++q->used); /* the entry is there before */
    ram_wrote(ram, spans, 2);
}

bool queue_rests(struct queue *q, struct ram *ram)
{
    if (q->event_index) {
        struct span event = {q->device + 4 + 8ull * q->size, 2};
        store(ram, event.address, q->taken);
        ram_wrote(ram, &event, 1);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }
    return load(ram, q->driver + 2) == q->taken;
}

bool queue_wants_interrupt(struct queue *q, const struct ram *ram)
{
    uint16_t told = q->told;
    q->told = q->used;
    if (told == q->used)
        return false;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!q->event_index)
        return !(load(ram, q->driver) & NO_INTERRUPT);
    uint16_t event = load(ram, q->driver + 4 + 2ull * q->size);
    return (uint16_t)(q->used - event - 1) < (uint16_t)(q->used - told);
}

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static PyObject *spans_list(const struct span *spans, unsigned count)
{
    PyObject *list = PyList_New(count);
    for (unsigned i = 0; list && i < count; i++) {
        PyObject *span = Py_BuildValue("(KI)", (unsigned long long)spans[i].address, spans[i].length);
        if (!span)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, span);
    }
    return list;
}

PyObject *chain_spans(const struct chain *chain)
{
    PyObject *readable = spans_list(chain->spans, chain->readable);
    PyObject *writable = readable ? spans_list(chain->spans + chain->readable, chain->writable) : NULL;
    if (!writable) {
        Py_XDECREF(readable);
        return NULL;
    }
    return Py_BuildValue("(NN)", readable, writable);
}

PyObject *ring_chain(PyObject *module, PyObject *args)
{
    const struct module_state *state = PyModule_GetState(module);
    struct ram *ram;
    unsigned long long table;
    unsigned count, head;
    int indirect;
    struct chain chain;
    if (!PyArg_ParseTuple(args, "O!KIIp", state->types[TYPE_RAM], &ram, &table, &count, &head, &indirect))
        return NULL;
    if (!walk(ram, table, count, head, indirect, &chain))
        Py_RETURN_NONE;
    return chain_spans(&chain);
}

static PyMemberDef queue_members[] = {
    {"size", T_USHORT, offsetof(struct queue, size), 0, "descriptors"},
    {"descriptors", T_ULONGLONG, offsetof(struct queue, descriptors), 0, "the three areas' addresses"},
    {"driver", T_ULONGLONG, offsetof(struct queue, driver), 0, NULL},
    {"device", T_ULONGLONG, offsetof(struct queue, device), 0, NULL},
    {"enabled", T_BOOL, offsetof(struct queue, enabled), 0, NULL},
    {"event_index", T_BOOL, offsetof(struct queue, event_index), 0, NULL},
    {"indirect", T_BOOL, offsetof(struct queue, indirect), 0, NULL},
    {"taken", T_USHORT, offsetof(struct queue, taken), 0, "index of the next available entry, modulo 2**16 as all indices"},
    {"used", T_USHORT, offsetof(struct queue, used), 0, NULL},
    {"told", T_USHORT, offsetof(struct queue, told), 0, "`used` when the driver was last asked whether it wants an interrupt"},
    {NULL, 0, 0, 0, NULL},
};

static void queue_dealloc(struct queue *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot queue_slots[] = {
    {Py_tp_doc, "Queue(): what a virtqueue is."}, {Py_tp_new, PyType_GenericNew}, {Py_tp_dealloc, queue_dealloc},
    {Py_tp_members, queue_members}, {0, NULL},
};
PyType_Spec queue_spec = {"vmfs.devices._chips.Queue", sizeof(struct queue), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, queue_slots};
