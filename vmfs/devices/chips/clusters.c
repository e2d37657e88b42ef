/* The map of an overlay. It only grows, but for `load`, which nothing reads beside. */
#include "clusters.h"

#include <string.h>

#include "module.h"

enum { CHUNK = 512 /* clusters: what `save` tells of at a time */, CHUNK_BYTES = CHUNK / 8, CHUNK_WORDS = CHUNK / 64 };

static u64 word_of(const struct clusters *c, u64 cluster)
{
    _Atomic u64 *block = atomic_load_explicit(&c->block[cluster / BLOCK_CLUSTERS], memory_order_acquire);
    return block ? atomic_load_explicit(&block[cluster % BLOCK_CLUSTERS / 64], memory_order_relaxed) : 0;
}

u64 clusters_alike(const struct clusters *c, u64 first, u64 end, bool *has)
{
    *has = word_of(c, first) >> first % 64 & 1;
    u64 at = first;
    while (at < end) {
        u64 word = word_of(c, at), others = (*has ? ~word : word) >> at % 64;
        u64 alike = others ? (u64)__builtin_ctzll(others) : 64 - at % 64;
        at += alike < 64 - at % 64 ? alike : 64 - at % 64;
        if (others)
            break;
    }
    return (at < end ? at : end) - first;
}

static _Atomic u64 *block_of(struct clusters *c, u64 cluster)
{
    _Atomic u64 *block = atomic_load(&c->block[cluster / BLOCK_CLUSTERS]);
    if (!block && (block = PyMem_RawCalloc(BLOCK_WORDS, sizeof *block)))
        atomic_store_explicit(&c->block[cluster / BLOCK_CLUSTERS], block, memory_order_release);
    return block;
}

static PyObject *clusters_mark(struct clusters *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    if (!chip_numbers(args, count, n, 2))
        return NULL;
    if (n[1] > self->count)
        return PyErr_Format(PyExc_ValueError, "there are %llu clusters", (unsigned long long)self->count);
    for (u64 at = n[0]; at < n[1];) {
        _Atomic u64 *block = block_of(self, at);
        if (!block)
            return PyErr_NoMemory();
        u64 here = 64 - at % 64 < n[1] - at ? 64 - at % 64 : n[1] - at;
        atomic_fetch_or(&block[at % BLOCK_CLUSTERS / 64], (~0ull >> (64 - here)) << at % 64);
        at += here;
    }
    Py_RETURN_NONE;
}

static PyObject *clusters_run(struct clusters *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    bool has;
    if (!chip_numbers(args, count, n, 2))
        return NULL;
    if (n[0] >= n[1] || n[1] > self->count)
        return PyErr_Format(PyExc_ValueError, "there are %llu clusters", (unsigned long long)self->count);
    u64 alike = clusters_alike(self, n[0], n[1], &has);
    return Py_BuildValue("(OK)", has ? Py_True : Py_False, (unsigned long long)alike);
}

static PyObject *clusters_save(struct clusters *self, PyObject *ignored)
{
    PyObject *chunks = PyDict_New();
    for (u64 i = 0; chunks && i < self->blocks; i++) {
        _Atomic u64 *block = atomic_load(&self->block[i]);
        for (unsigned at = 0; chunks && block && at < BLOCK_WORDS; at += CHUNK_WORDS) {
            u64 words[CHUNK_WORDS], any = 0;
            for (unsigned w = 0; w < CHUNK_WORDS; w++)
                any |= words[w] = atomic_load(&block[at + w]);
            if (!any)
                continue;
            PyObject *key = PyLong_FromUnsignedLongLong(i * BLOCK_WORDS / CHUNK_WORDS + at / CHUNK_WORDS);
            PyObject *bits = PyBytes_FromStringAndSize((const char *)words, CHUNK_BYTES);
            if (!key || !bits || PyDict_SetItem(chunks, key, bits))
                Py_CLEAR(chunks);
            Py_XDECREF(key);
            Py_XDECREF(bits);
        }
    }
    return chunks;
}

static PyObject *clusters_load(struct clusters *self, PyObject *chunks)
{
    PyObject *key, *bits;
    Py_ssize_t at = 0;
    if (!PyDict_Check(chunks))
        return PyErr_Format(PyExc_TypeError, "a dict of chunks");
    for (u64 i = 0; i < self->blocks; i++)
        if (self->block[i])
            memset((void *)self->block[i], 0, BLOCK_WORDS * sizeof(u64));
    while (PyDict_Next(chunks, &at, &key, &bits)) {
        u64 chunk;
        char *data;
        Py_ssize_t size;
        if (!chip_numbers(&key, 1, &chunk, 1) || PyBytes_AsStringAndSize(bits, &data, &size))
            return NULL;
        if (size != CHUNK_BYTES || chunk >= (self->count + CHUNK - 1) / CHUNK)
            return PyErr_Format(PyExc_ValueError, "%d bytes of a chunk that is there", CHUNK_BYTES);
        _Atomic u64 *block = block_of(self, chunk * CHUNK);
        if (!block)
            return PyErr_NoMemory();
        memcpy((u8 *)block + chunk * CHUNK_BYTES % (BLOCK_WORDS * sizeof(u64)), data, CHUNK_BYTES);
    }
    Py_RETURN_NONE;
}

static PyObject *clusters_add(struct clusters *self, PyObject *argument)
{
    struct clusters *other = (struct clusters *)argument;
    if (Py_TYPE(argument) != Py_TYPE(self) || other->count != self->count)
        return PyErr_Format(PyExc_TypeError, "Clusters of a disk of the same size");
    for (u64 i = 0; i < self->blocks; i++) {
        _Atomic u64 *from = atomic_load(&other->block[i]), *to = from ? block_of(self, i * BLOCK_CLUSTERS) : NULL;
        if (from && !to)
            return PyErr_NoMemory();
        for (unsigned at = 0; from && at < BLOCK_WORDS; at++)
            atomic_fetch_or(&to[at], atomic_load(&from[at]));
    }
    Py_RETURN_NONE;
}

static PyObject *clusters_any(struct clusters *self, void *ignored)
{
    for (u64 i = 0; i < self->blocks; i++) {
        _Atomic u64 *block = atomic_load(&self->block[i]);
        for (unsigned at = 0; block && at < BLOCK_WORDS; at++)
            if (atomic_load(&block[at]))
                Py_RETURN_TRUE;
    }
    Py_RETURN_FALSE;
}

static PyObject *clusters_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned long long count;
    if (!PyArg_ParseTuple(args, "K", &count))
        return NULL;
    struct clusters *self = (struct clusters *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->count = count;
    self->blocks = (count + BLOCK_CLUSTERS - 1) / BLOCK_CLUSTERS;
    self->block = PyMem_RawCalloc(self->blocks, sizeof *self->block);
    if (!self->block) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void clusters_dealloc(struct clusters *self)
{
    PyTypeObject *type = Py_TYPE(self);
    for (u64 i = 0; self->block && i < self->blocks; i++)
        PyMem_RawFree((void *)self->block[i]);
    PyMem_RawFree(self->block);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef clusters_methods[] = {
    {"mark", (PyCFunction)(void (*)(void))clusters_mark, METH_FASTCALL, "mark(first, end): the overlay has them"},
    {"run", (PyCFunction)(void (*)(void))clusters_run, METH_FASTCALL,
     "run(first, end) -> (whether it has the first, how many from there on are alike)"},
    {"save", (PyCFunction)clusters_save, METH_NOARGS, "save() -> {chunk: 64 bytes}: a bit a cluster, by their 512, where there are any"},
    {"load", (PyCFunction)clusters_load, METH_O, "load(chunks): as `save` gives them"},
    {"add", (PyCFunction)clusters_add, METH_O, "add(clusters): it has those, too"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef clusters_attributes[] = {
    {"any", (getter)clusters_any, NULL, "whether it has any", NULL}, {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot clusters_slots[] = {
    {Py_tp_doc, "Clusters(count): which of a disk's an overlay has."}, {Py_tp_new, clusters_new}, {Py_tp_dealloc, clusters_dealloc},
    {Py_tp_methods, clusters_methods}, {Py_tp_getset, clusters_attributes}, {0, NULL},
};
PyType_Spec clusters_spec = {"vmfs.devices._chips.Clusters", sizeof(struct clusters), 0, Py_TPFLAGS_DEFAULT, clusters_slots};

/* ---- Files -------------------------------------------------------------------------------------------------------------------------- */

static void forget_layers(struct files *f)
{
    for (unsigned i = 0; i < f->count; i++)
        Py_DECREF((PyObject *)f->layers[i].clusters);
    PyMem_RawFree(f->layers);
    f->layers = NULL;
    f->count = 0;
}

static PyObject *files_set(struct files *self, PyObject *rows)
{
    const struct module_state *state = PyType_GetModuleState(Py_TYPE(self));
    if (!PyTuple_Check(rows))
        return PyErr_Format(PyExc_TypeError, "a tuple of (fd, Clusters)");
    unsigned count = (unsigned)PyTuple_GET_SIZE(rows);
    struct layer *layers = PyMem_RawCalloc(count, sizeof *layers);
    if (!layers)
        return PyErr_NoMemory();
    for (unsigned i = 0; i < count; i++)
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(rows, i), "iO!", &layers[i].fd, state->types[TYPE_CLUSTERS], &layers[i].clusters)) {
            PyMem_RawFree(layers);
            return NULL;
        }
    for (unsigned i = 0; i < count; i++)
        Py_INCREF((PyObject *)layers[i].clusters);
    forget_layers(self);
    self->layers = layers, self->count = count;
    Py_RETURN_NONE;
}

static PyObject *files_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int base;
    unsigned long long bytes;
    if (!PyArg_ParseTuple(args, "iK", &base, &bytes))
        return NULL;
    struct files *self = (struct files *)type->tp_alloc(type, 0);
    if (self)
        self->base = base, self->base_bytes = bytes;
    return (PyObject *)self;
}

static void files_dealloc(struct files *self)
{
    PyTypeObject *type = Py_TYPE(self);
    forget_layers(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef files_methods[] = {
    {"set", (PyCFunction)files_set, METH_O, "set(((fd, Clusters), ...)): what lies over the base, the upper ones first. Nobody reads it then"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot files_slots[] = {
    {Py_tp_doc, "Files(base, bytes): of a disk: a file of so many bytes, and what lies over it."}, {Py_tp_new, files_new},
    {Py_tp_dealloc, files_dealloc}, {Py_tp_methods, files_methods}, {0, NULL},
};
PyType_Spec files_spec = {"vmfs.devices._chips.Files", sizeof(struct files), 0, Py_TPFLAGS_DEFAULT, files_slots};
