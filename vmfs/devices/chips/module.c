/* vmfs.devices._chips: the bus and the chips, and what their types have in common. */
#include "frames.h"
#include "module.h"
#include "offload.h"
#include "ring.h"
#include "virtio.h"

bool is_chip(const struct module_state *state, PyObject *object)
{
    for (unsigned i = TYPE_BUS + 1; i < TYPE_RAM; i++)
        if (Py_TYPE(object) == state->types[i])
            return true;
    return false;
}

PyObject *chip_new(PyTypeObject *type, const struct chip_kind *kind, PyObject *bus, unsigned number)
{
    const struct module_state *state = PyType_GetModuleState(type);
    if (Py_TYPE(bus) != state->types[TYPE_BUS] || number >= DEVICES) {
        PyErr_SetString(PyExc_TypeError, "a Bus, and the number of a device");
        return NULL;
    }
    struct chip *chip = (struct chip *)type->tp_alloc(type, 0);
    if (!chip)
        return NULL;
    chip->bus = (struct bus *)Py_NewRef(bus);
    chip->kind = kind;
    chip->number = number;
    chip->due = BUS_NEVER;
    if (kind->advance) {
        bus_enter(chip->bus);
        chip->next = chip->bus->timed;
        chip->bus->timed = chip;
        bus_leave(chip->bus);
    }
    if (kind->can_send_unmaskable) {
        bus_enter(chip->bus);
        chip->next_sender = chip->bus->senders;
        chip->bus->senders = chip;
        bus_leave(chip->bus);
    }
    return (PyObject *)chip;
}

PyObject *chip_new_on_line(PyTypeObject *type, const struct chip_kind *kind, PyObject *args, unsigned *gsi)
{
    PyObject *bus;
    unsigned number;
    if (!PyArg_ParseTuple(args, "OII", &bus, &number, gsi))
        return NULL;
    if (*gsi >= LINES)
        return PyErr_Format(PyExc_ValueError, "there is no line %u", *gsi);
    return chip_new(type, kind, bus, number);
}

void chip_dealloc(struct chip *chip)
{
    PyTypeObject *type = Py_TYPE(chip);
    if (chip->kind && chip->kind->advance) {
        bus_enter(chip->bus);
        bus_set_due(chip, BUS_NEVER);
        struct chip **at = &chip->bus->timed;
        while (*at != chip)
            at = &(*at)->next;
        *at = chip->next;
        pthread_mutex_unlock(&chip->bus->lock);
    }
    if (chip->kind && chip->kind->can_send_unmaskable) {
        bus_enter(chip->bus);
        struct chip **at = &chip->bus->senders;
        while (*at != chip)
            at = &(*at)->next_sender;
        *at = chip->next_sender;
        pthread_mutex_unlock(&chip->bus->lock);
    }
    Py_XDECREF((PyObject *)chip->bus);
    type->tp_free(chip);
    Py_DECREF(type);
}

/* ---- Bytes ----------------------------------------------------------------------------------------------------------------------- */

bool bytes_reserve(struct bytes *b, size_t more)
{
    if (b->room - b->count >= more)
        return true;
    size_t room = b->room ? b->room : 64;
    while (room - b->count < more)
        room *= 2;
    u8 *data = malloc(room);
    if (!data)
        return false;
    for (size_t i = 0; i < b->count; i++)
        data[i] = bytes_at(b, i);
    free(b->data);
    *b = (struct bytes){data, 0, b->count, room};
    return true;
}

void bytes_push(struct bytes *b, u8 byte) { b->data[(b->head + b->count++) & (b->room - 1)] = byte; }

void bytes_push_front(struct bytes *b, u8 byte)
{
    if (!bytes_reserve(b, 1))
        return;
    b->head = (b->head - 1) & (b->room - 1);
    b->count++;
    b->data[b->head] = byte;
}

u8 bytes_pop(struct bytes *b)
{
    u8 byte = b->data[b->head];
    b->head = (b->head + 1) & (b->room - 1);
    b->count--;
    return byte;
}

u8 bytes_at(const struct bytes *b, size_t at) { return b->data[(b->head + at) & (b->room - 1)]; }

void bytes_copy(const struct bytes *b, u8 *to)
{
    for (size_t i = 0; i < b->count; i++)
        to[i] = bytes_at(b, i);
}

void bytes_free(struct bytes *b)
{
    free(b->data);
    *b = (struct bytes){0};
}

/* ---- The module -------------------------------------------------------------------------------------------------------------------- */

static PyType_Spec *const specs[TYPES] = {
    [TYPE_BUS] = &bus_spec, [TYPE_UART] = &uart_spec, [TYPE_SENDER] = &sender_spec, [TYPE_RTC] = &rtc_spec,
    [TYPE_POWER] = &power_spec, [TYPE_LATCH] = &latch_spec, [TYPE_BRIDGE] = &bridge_spec, [TYPE_FUNCTION] = &function_spec,
    [TYPE_VIRTIO] = &virtio_spec, [TYPE_PIO] = &pio_spec, [TYPE_VGA] = &vga_spec, [TYPE_COUNTER] = &counter_spec, [TYPE_AHCI] = &ahci_spec,
    [TYPE_REMOTE] = &remote_spec,
    [TYPE_RAM] = &ram_spec, [TYPE_QUEUE] = &queue_spec,
    [TYPE_CLUSTERS] = &clusters_spec, [TYPE_FILES] = &files_spec, [TYPE_DISK] = &disk_spec,
};

static int module_exec(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    for (unsigned i = 0; i < TYPES; i++) {
        state->types[i] = (PyTypeObject *)PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (!state->types[i] || PyModule_AddType(module, state->types[i]))
            return -1;
    }
    return PyModule_AddIntConstant(module, "LINES", LINES) || PyModule_AddIntConstant(module, "PIRQS", PIRQS) || PyModule_AddIntConstant(module, "UNCLAIMED_MOST", UNCLAIMED_MOST) ||
           PyModule_AddIntConstant(module, "VECTORS", VECTORS) || PyModule_AddIntConstant(module, "MSIX_PENDING", MSIX_PENDING) ||
           PyModule_AddIntConstant(module, "CONFIG", VECTOR_OF_CONFIG);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    const struct module_state *state = PyModule_GetState(module);
    for (unsigned i = 0; i < TYPES; i++)
        Py_VISIT(state->types[i]);
    return 0;
}

static int module_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    for (unsigned i = 0; i < TYPES; i++)
        Py_CLEAR(state->types[i]);
    return 0;
}

static PyMethodDef module_methods[] = {
    {"chain", ring_chain, METH_VARARGS,
     "chain(ram, table, count, head, indirect) -> the (address, length) of what may be read, and of what may be written; None\n"
     "where it is no chain that a driver may make"},
    {"take_frames", frames_take, METH_VARARGS,
     "take_frames(queue, ram, checksums, segments) -> (frames, requests, bad, wrong): what a driver of virtio-net sends, given back. bad: of the\n"
     "requests, were no frames; wrong: the next one is none that a driver may make, as Queue says"},
    {"put_frames", frames_put, METH_VARARGS,
     "put_frames(queue, ram, frames, merges, checksums, joins) -> (count, dropped, wrong): so many of them were given to a driver of virtio-net;\n"
     "dropped: the next one is longer than the driver's buffers, and was let go; wrong: as of take_frames"},
    {"split", frames_split, METH_VARARGS,
     "split(buffer, filled) -> (frames, filled, nonsense): frames that each follow their length, taken from the buffer's beginning; and a length\n"
     "that none has, or -1"},
    {"send", frames_send, METH_VARARGS,
     "send(fd, frames, unpads) -> (count, rest): so many have gone, each after its length, but for the last one's rest. unpads: IPv4 without\n"
     "what comes after it in 60 bytes"},
    {"e1000_put", e1000_put, METH_VARARGS,
     "e1000_put(ram, start, count, head, tail, room, flags, vlan, address, frames) -> (done, head, octets, sizes): so many frames, which are all to\n"
     "the address and nothing else, are in the receive ring. flags: 1 without a CRC, 2, 4 with sums of IP, of TCP and UDP"},
    {"e1000_take", e1000_take, METH_VARARGS,
     "e1000_take(ram, start, count, head, tail, descriptors, frames, flags, contexts) -> (frames, head, descriptors, told, cut, octets, sizes,\n"
     "broadcasts, groups): what a driver sends, from whole packets, up to the first that is Python's. contexts: of sums and of segments, which\n"
     "it may change; flags: 1 pads, 2 tags; told: a status was written"},
    {"rtl8139_take", rtl8139_take, METH_VARARGS,
     "rtl8139_take(ram, start, at, frames) -> (frames, at, sent, bad, more): what a driver sends by descriptors of C+ mode, given back"},
    {"rtl8139_put", rtl8139_put, METH_VARARGS,
     "rtl8139_put(ram, start, at, address, status, flags, frames) -> (done, at, bad, full): so many frames, the first that are to the address, are\n"
     "in the descriptors of C+ mode. flags: 1 without tags, 2 with sums; full: the next one is the driver's yet"},
    {"segments", offload_segments, METH_VARARGS,
     "segments(frame, header, most, ip, tcp, (ip_at, ip_end, tcp_at, tcp_end)) -> frames: one of TCP as several (see offload.h)"},
    {"insert_sum", offload_insert, METH_VARARGS,
     "insert_sum(frame, start, at, end): the sum of the bytes from start to end (0: to the last one) into the two at `at`, if that is in the frame"},
    {"sums_found", offload_found, METH_O,
     "sums_found(frame) -> whether the sums of IPv4 and of TCP or UDP in it are right; None: there is none, or it is not looked at"},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "vmfs.devices._chips", "Devices that a guest uses often, in C.", sizeof(struct module_state), module_methods,
    module_slots, module_traverse, module_clear, NULL,
};
PyMODINIT_FUNC PyInit__chips(void) { return PyModuleDef_Init(&module_def); }
