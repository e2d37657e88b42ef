/* vmfs.machine._ring: a machine's end of the memory by which its server answers the reads of a stream (vmfs/words/ring.h). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>
#include <sys/mman.h>

#include "ring.h"

typedef struct {
    PyObject_HEAD
    struct ring_page *page;
    uint64_t put;
} Ring;

static uint64_t taken(const Ring *self) { return __atomic_load_n(&self->page->taken, __ATOMIC_ACQUIRE); }

static void copy_in(Ring *self, uint64_t at, const uint8_t *data, size_t size)
{
    uint8_t *bytes = (uint8_t *)self->page + RING_HEAD;
    size_t place = at % RING_ROOM, to_end = RING_ROOM - place, first = size < to_end ? size : to_end;
    memcpy(bytes + place, data, first);
    memcpy(bytes, data + first, size - first);
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int fd;
    unsigned long long position;
    Py_buffer sent;
    if (!PyArg_ParseTuple(args, "iKy*", &fd, &position, &sent))
        return NULL;
    Ring *self = (Ring *)type->tp_alloc(type, 0);
    void *page = self ? mmap(NULL, RING_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (page == MAP_FAILED) {
        if (self)
            PyErr_SetFromErrno(PyExc_OSError);
        Py_CLEAR(self);
    } else {
        size_t size = (size_t)sent.len;
        size = size < RING_AGAIN ? size : RING_AGAIN;
        self->page = page;
        self->put = position;
        self->page->first = position - size;
        copy_in(self, position - size, (const uint8_t *)sent.buf + sent.len - size, size);
        __atomic_store_n(&self->page->taken, position, __ATOMIC_RELEASE);
        __atomic_store_n(&self->page->put, position, __ATOMIC_RELEASE);
    }
    PyBuffer_Release(&sent);
    return (PyObject *)self;
}

static void ring_dealloc(Ring *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->page)
        munmap(self->page, RING_SIZE);
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(put_doc,
    "put(data) -> how much of it there was room for\n\n"
    "Hand on what comes next. On one thread.");
static PyObject *ring_put(Ring *self, PyObject *argument)
{
    Py_buffer data;
    if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE))
        return NULL;
    uint64_t room = RING_AHEAD - (self->put - taken(self));
    size_t size = (uint64_t)data.len < room ? (size_t)data.len : (size_t)room;
    Py_BEGIN_ALLOW_THREADS
    copy_in(self, self->put, data.buf, size);
    Py_END_ALLOW_THREADS
    self->put += size;
    __atomic_store_n(&self->page->put, self->put, __ATOMIC_RELEASE);
    PyBuffer_Release(&data);
    return PyLong_FromSize_t(size);
}

static PyObject *ring_get_put(Ring *self, void *closure) { return PyLong_FromUnsignedLongLong(self->put); }
static PyObject *ring_get_taken(Ring *self, void *closure) { return PyLong_FromUnsignedLongLong(taken(self)); }
static PyObject *ring_get_first(Ring *self, void *closure)
{
    uint64_t first = self->page->first, end = taken(self);
    return PyLong_FromUnsignedLongLong(end - first > RING_AGAIN ? end - RING_AGAIN : first);
}

static PyMethodDef ring_methods[] = {
    {"put", (PyCFunction)ring_put, METH_O, put_doc},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef ring_members[] = {
    {"end", (getter)ring_get_put, NULL, "Up to here there are bytes.", NULL},
    {"taken", (getter)ring_get_taken, NULL, "Up to here they were read.", NULL},
    {"first", (getter)ring_get_first, NULL, "From here on they can be read again.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "Ring(fd, position, sent): the memory of that descriptor, from `position` of the stream on; `sent` came before."},
    {Py_tp_new, ring_new}, {Py_tp_dealloc, ring_dealloc}, {Py_tp_methods, ring_methods}, {Py_tp_getset, ring_members},
    {0, NULL},
};
static PyType_Spec ring_spec = {"vmfs.machine._ring.Ring", sizeof(Ring), 0, Py_TPFLAGS_DEFAULT, ring_slots};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &ring_spec, NULL);
    int failed = !type || PyModule_AddType(module, (PyTypeObject *)type);
    Py_XDECREF(type);
    failed = failed || PyModule_AddIntConstant(module, "AHEAD", RING_AHEAD) || PyModule_AddIntConstant(module, "AGAIN", RING_AGAIN);
    return failed ? -1 : 0;
}
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "vmfs.machine._ring", "A machine's end of a stream that its server reads.", 0, NULL, module_slots,
    NULL, NULL, NULL,
};
PyMODINIT_FUNC PyInit__ring(void) { return PyModuleDef_Init(&module_def); }
