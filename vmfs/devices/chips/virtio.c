/* Virtio over PCI: interrupt status, notifications, and the vectors of MSI-X (VIRTIO 1.2, 4.1.4.4, 4.1.4.5, 4.1.5.1). */
#include "virtio.h"

#include "disk.h"
#include "module.h"

enum { BAR_REGISTERS, BAR_MSIX };
enum { ISR_QUEUE = 1, ISR_CONFIG = 2 };

static bool virtio_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct virtio *v = (struct virtio *)chip;
    if (region == BAR_MSIX) {
        if (!a->write)
            a->value = function_read_msix(v->function, offset, a->size);
        return !a->write;
    }
    if (!a->write && offset == v->isr_at) {
        a->value = v->isr;
        v->isr = 0;             /* reading it takes the interrupt back */
        v->function->pending = false;
        function_drive(v->function);
        return true;
    }
    if (a->write && offset >= v->notify_at) {
        if ((offset - v->notify_at) / 4 >= v->queues)
            return true;
        v->notifications += v->disk != NULL;
        return v->disk;
    }
    return false;
}

static void virtio_after(struct chip *chip, const struct bus_access *a, unsigned region, u64 offset)
{
    struct virtio *v = (struct virtio *)chip;
    if (region == BAR_REGISTERS && a->write && offset >= v->notify_at && v->disk)
        disk_notified(v->disk, (unsigned)((offset - v->notify_at) / 4));
}
static const struct chip_kind virtio_kind = {.access = virtio_access, .after = virtio_after};

void virtio_interrupt(struct virtio *v, unsigned of)
{
    chip_enter(&v->chip);
    if (function_has_messages(v->function))
        function_signal(v->function, v->vectors[of]);
    else {
        v->isr |= of == VECTOR_OF_CONFIG ? ISR_CONFIG : ISR_QUEUE;
        v->function->pending = true;
        function_drive(v->function);
    }
    pthread_mutex_unlock(&v->chip.bus->lock); /* Python is told of lines by whoever has the GIL next */
}

static PyObject *virtio_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus, *function;
    unsigned number, queues;
    unsigned long long isr_at, notify_at;
    const struct module_state *state = PyType_GetModuleState(type);
    if (!PyArg_ParseTuple(args, "OIOKKI", &bus, &number, &function, &isr_at, &notify_at, &queues))
        return NULL;
    if (Py_TYPE(function) != state->types[TYPE_FUNCTION] || queues > QUEUES) {
        PyErr_Format(PyExc_TypeError, "a Function, and up to %d queues", QUEUES);
        return NULL;
    }
    struct virtio *self = (struct virtio *)chip_new(type, &virtio_kind, bus, number);
    if (self) {
        self->function = (struct function *)Py_NewRef(function);
        self->isr_at = isr_at, self->notify_at = notify_at, self->queues = queues;
        for (unsigned i = 0; i <= QUEUES; i++)
            self->vectors[i] = NO_VECTOR;
    }
    return (PyObject *)self;
}

static void virtio_dealloc(struct virtio *self)
{
    Py_XDECREF((PyObject *)self->function);
    chip_dealloc(&self->chip);
}

static bool one_of(struct virtio *self, u64 number)
{
    if (number < self->queues || number == VECTOR_OF_CONFIG)
        return true;
    PyErr_SetString(PyExc_ValueError, "a queue, or CONFIG");
    return false;
}

static PyObject *virtio_tell(struct virtio *self, PyObject *argument)
{
    u64 of;
    if (!chip_numbers(&argument, 1, &of, 1) || !one_of(self, of))
        return NULL;
    virtio_interrupt(self, (unsigned)of);
    bus_enter(self->chip.bus);
    return bus_done(self->chip.bus);
}

static PyObject *virtio_vector(struct virtio *self, PyObject *argument)
{
    u64 of;
    if (!chip_numbers(&argument, 1, &of, 1) || !one_of(self, of))
        return NULL;
    return PyLong_FromLong(self->vectors[of]);
}

static PyObject *virtio_set_vector(struct virtio *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    if (!chip_numbers(args, count, n, 2) || !one_of(self, n[0]))
        return NULL;
    chip_enter(&self->chip);
    self->vectors[n[0]] = n[1] < self->function->vectors ? (uint16_t)n[1] : NO_VECTOR; /* 4.1.5.1.2.1: which the driver reads back */
    pthread_mutex_unlock(&self->chip.bus->lock);
    Py_RETURN_NONE;
}

static PyObject *virtio_take(struct virtio *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    u64 count = self->notifications;
    self->notifications = 0;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return PyLong_FromUnsignedLongLong(count);
}

static PyObject *virtio_get(struct virtio *self, void *ignored) { return PyLong_FromLong(self->isr); }

static int virtio_set(struct virtio *self, PyObject *value, void *ignored)
{
    u64 isr;
    if (!value || !chip_numbers(&value, 1, &isr, 1))
        return -1;
    chip_enter(&self->chip);
    self->isr = (u8)isr;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return 0;
}

static PyMethodDef virtio_methods[] = {
    CHIP_METHODS,
    {"interrupt", (PyCFunction)virtio_tell, METH_O, "interrupt(queue or CONFIG): by its vector, or into the ISR and INTA"},
    {"vector", (PyCFunction)virtio_vector, METH_O, "vector(queue or CONFIG)"},
    {"set_vector", (PyCFunction)(void (*)(void))virtio_set_vector, METH_FASTCALL,
     "set_vector(queue or CONFIG, vector): none, where the table has no such one"},
    {"take", (PyCFunction)virtio_take, METH_NOARGS, "take() -> how many notifications were answered since the last time"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef virtio_attributes[] = {
    {"isr", (getter)virtio_get, (setter)virtio_set, "the interrupt status, as it stands", NULL}, {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot virtio_slots[] = {
    {Py_tp_doc, "Virtio(bus, device, function, isr_at, notify_at, queues): parts of BAR 0 of a virtio device, and BAR 1, MSI-X's."},
    {Py_tp_new, virtio_new}, {Py_tp_dealloc, virtio_dealloc}, {Py_tp_methods, virtio_methods},
    {Py_tp_getset, virtio_attributes}, {0, NULL},
};
PyType_Spec virtio_spec = {"vmfs.devices._chips.Virtio", sizeof(struct virtio), 0, Py_TPFLAGS_DEFAULT, virtio_slots};
