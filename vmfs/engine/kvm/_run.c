/* vmfs.engine.kvm._run: KVM_RUN, and what it ended with, for the lane (vmfs/words/lane.h): the part of vcpu.py that a loop of exits
 * needs, without Python.
 *
 * Runner(fd, page, index, finishes) is of one vCPU: its descriptor and its kvm_run mapping. It runs from a plain state to an
 * access or a halt. Whatever else ends KVM_RUN is vcpu.py's, which finds it in the mapping as after its own KVM_RUN.
 *
 * Wires(vm, lines, bus) are between a VM and the devices in C of its board (vmfs/words/bus.h): their lines, and the guest's time.
 * Runner.go(wires) is KVM_RUN, again and again while that bus answers what ends it.
 *
 * Source: Linux Documentation/virt/kvm/api.rst, "The kvm_run structure". */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>

#include "bus.h"
#include "lane.h"
#include "../../include/vmfs.h"

enum { ACCESS_MOST = 4096 };    /* a page of data of a string instruction */

struct left {
    int kind;                   /* LANE_EXIT_, or -1: what is in the mapping */
    int error;                  /* of KVM_RUN, with -1 */
    int more;                   /* with -1: `exit` came first, and its instruction has the one in the mapping, too */
    int completes;              /* KVM does the rest of the access at the next KVM_RUN */
    int reads;
    size_t offset, size;        /* the bytes of the access in the mapping */
    struct vmfs_exit exit;
    uint8_t data[ACCESS_MOST];  /* what was written */
};

enum { EXITS_KEPT = 32 };

typedef struct {
    PyObject_HEAD
    Py_buffer page;
    int fd;
    struct vmfs_exit last[EXITS_KEPT];  /* the last accesses and halts; the next goes to `noted` % EXITS_KEPT */
    uint64_t noted;
    unsigned index;
    int finishes;               /* rip is after an OUT only once KVM has finished it */
    pthread_t thread;           /* that is in KVM_RUN, */
    int runs;                   /* if it is one */
    struct left left[2];
    unsigned left_at;           /* the one that counts */
    struct lane_cpu lane;
} Runner;

static struct kvm_run *run_of(Runner *self) { return self->page.buf; }

static uint64_t rip_of(Runner *self) { return run_of(self)->s.regs.regs.rip; }

/* Whether `size` bytes at `offset` are in the mapping, and not too many. */
static int is_inside(Runner *self, uint64_t offset, uint64_t size)
{
    return size <= ACCESS_MOST && offset <= (uint64_t)self->page.len && size <= (uint64_t)self->page.len - offset;
}

static void clear_kick(void *cpu) { run_of(cpu)->immediate_exit = 0; }

/* Keep what KVM_RUN ended with. In the thread of the run; read while nothing runs. */
static void note(Runner *self)
{
    const struct kvm_run *run = run_of(self);
    struct vmfs_exit exit = {.cpu = self->index, .rip = rip_of(self)};
    if (run->exit_reason == KVM_EXIT_IO) {
        size_t size = (size_t)run->io.size * run->io.count;
        exit.reason = VMFS_EXIT_IO;
        exit.io.direction = run->io.direction == KVM_EXIT_IO_OUT ? VMFS_IO_OUT : VMFS_IO_IN;
        exit.io.size = run->io.size;
        exit.io.port = run->io.port;
        exit.io.count = run->io.count;
        if (is_inside(self, run->io.data_offset, size) && exit.io.direction == VMFS_IO_OUT)
            memcpy(exit.io.data, (const uint8_t *)run + run->io.data_offset, size < sizeof exit.io.data ? size : sizeof exit.io.data);
    } else if (run->exit_reason == KVM_EXIT_MMIO) {
        exit.reason = VMFS_EXIT_MMIO;
        exit.mmio.addr = run->mmio.phys_addr;
        exit.mmio.len = run->mmio.len;
        exit.mmio.is_write = run->mmio.is_write;
        if (run->mmio.is_write)
            memcpy(exit.mmio.data, run->mmio.data, sizeof run->mmio.data);
    } else if (run->exit_reason == KVM_EXIT_HLT) {
        exit.reason = VMFS_EXIT_HLT;
    } else {
        return;
    }
    self->last[self->noted++ % EXITS_KEPT] = exit;
}

/* An access to a port. */
static int take_io(Runner *self, struct left *left)
{
    struct kvm_run *run = run_of(self);
    struct vmfs_exit *exit = &left->exit;

    left->offset = run->io.data_offset;
    left->size = (size_t)run->io.size * run->io.count;
    if (!is_inside(self, run->io.data_offset, left->size))
        return -1;
    exit->reason = VMFS_EXIT_IO;
    exit->io.direction = run->io.direction == KVM_EXIT_IO_OUT ? VMFS_IO_OUT : VMFS_IO_IN;
    exit->io.size = run->io.size;
    exit->io.port = run->io.port;
    exit->io.count = run->io.count;
    uint8_t *data = (uint8_t *)run + left->offset;
    if (exit->io.direction == VMFS_IO_IN) {
        memset(data, 0xFF, left->size);         /* what an empty bus reads as */
        left->reads = left->completes = 1;
        return LANE_EXIT_IO;
    }
    memcpy(left->data, data, left->size);
    memcpy(exit->io.data, data, left->size < sizeof exit->io.data ? left->size : sizeof exit->io.data);
    if (self->finishes) {
        run->immediate_exit = 1;                /* the rest of the instruction, and nothing of the guest */
        int done = ioctl(self->fd, KVM_RUN, 0);
        left->error = done < 0 && errno != EINTR ? errno : 0;
        run->immediate_exit = 0;                /* a thread that kicked meanwhile has adopted this run, which ends */
        left->more = done == 0;
        if (left->more || left->error)
            return -1;
    }
    return LANE_EXIT_IO;
}

static int take_mmio(Runner *self, struct left *left)
{
    struct kvm_run *run = run_of(self);
    struct vmfs_exit *exit = &left->exit;

    left->offset = offsetof(struct kvm_run, mmio.data);
    left->size = run->mmio.len;
    if (left->size > sizeof run->mmio.data)
        return -1;
    left->completes = 1;
    left->reads = !run->mmio.is_write;
    exit->reason = VMFS_EXIT_MMIO;
    exit->mmio.addr = run->mmio.phys_addr;
    exit->mmio.len = run->mmio.len;
    exit->mmio.is_write = run->mmio.is_write;
    if (left->reads)
        memset(run->mmio.data, 0xFF, left->size);
    else {
        memcpy(exit->mmio.data, run->mmio.data, left->size);
        memcpy(left->data, run->mmio.data, left->size);
    }
    return LANE_EXIT_MMIO;
}

static int run(void *cpu, uint8_t exit[LANE_EXIT_SIZE])
{
    Runner *self = cpu;
    struct left *left = &self->left[1 - self->left_at];

    *left = (struct left){.kind = -1};          /* data of the one before may stay: `size` says how much counts */
    self->thread = pthread_self();
    __atomic_store_n(&self->runs, 1, __ATOMIC_SEQ_CST);
    int done = ioctl(self->fd, KVM_RUN, 0);
    left->error = done < 0 ? errno : 0;
    if (!done) {
        note(self);
        uint32_t reason = run_of(self)->exit_reason;
        if (reason == KVM_EXIT_IO)
            left->kind = take_io(self, left);
        else if (reason == KVM_EXIT_MMIO)
            left->kind = take_mmio(self, left);
        else if (reason == KVM_EXIT_HLT) {
            left->kind = LANE_EXIT_HLT;
            left->exit.reason = VMFS_EXIT_HLT;
        }
    }
    __atomic_store_n(&self->runs, 0, __ATOMIC_SEQ_CST);
    left->exit.cpu = self->index;
    left->exit.rip = rip_of(self);
    memcpy(exit, &left->exit, sizeof left->exit);
    return left->kind;
}

static void keep(void *cpu)
{
    Runner *self = cpu;
    self->left_at = 1 - self->left_at;
}

static unsigned state(void *cpu, uint8_t regs[LANE_REGS_SIZE], uint8_t sregs[LANE_SREGS_SIZE])
{
    (void)sregs;                /* another system call, for what is seldom read */
    memcpy(regs, &run_of(cpu)->s.regs.regs, LANE_REGS_SIZE);
    return LANE_VALID(LANE_REGS);
}

static size_t data(void *cpu, uint8_t to[LANE_DATA_MOST])
{
    Runner *self = cpu;
    struct left *left = &self->left[1 - self->left_at];         /* of the run that has just ended */
    memcpy(to, (uint8_t *)run_of(self) + left->offset, left->size < LANE_DATA_MOST ? left->size : LANE_DATA_MOST);
    return left->size;
}

/* ---- devices in C ---- */

typedef struct {
    PyObject_HEAD
    int vm;
    Py_buffer lines;            /* a byte a line: its level, as it was last driven */
    PyObject *capsule;
    struct fast_bus *bus;
} Wires;

static void drive_line(void *machine, unsigned gsi, bool level)
{
    Wires *self = machine;
    struct kvm_irq_level line = {.irq = gsi, .level = level};
    if (gsi < (size_t)self->lines.len && ioctl(self->vm, KVM_IRQ_LINE, &line) >= 0)
        ((uint8_t *)self->lines.buf)[gsi] = level;
}

static void signal_msi(void *machine, uint64_t address, uint32_t data)
{
    const Wires *self = machine;
    struct kvm_msi message = {.address_lo = (uint32_t)address, .address_hi = (uint32_t)(address >> 32), .data = data};
    ioctl(self->vm, KVM_SIGNAL_MSI, &message); /* an error is an address that names no local APIC */
}

static uint64_t guest_time(void *context)
{
    const Wires *self = context;
    struct kvm_clock_data clock = {0};
    ioctl(self->vm, KVM_GET_CLOCK, &clock);
    return clock.clock;
}

/* Whether the bus has answered what KVM_RUN ended with. */
static bool is_answered(Runner *self, Wires *wires)
{
    struct kvm_run *run = run_of(self);
    struct bus_access access = {.rip = rip_of(self), .now = guest_time, .context = wires};
    uint8_t *data;

    if (run->exit_reason == KVM_EXIT_IO) {
        if (run->io.count != 1 || run->io.size > 4 || !is_inside(self, run->io.data_offset, run->io.size))
            return false;
        access.write = run->io.direction == KVM_EXIT_IO_OUT;
        access.size = run->io.size;
        access.address = run->io.port;
        data = (uint8_t *)run + run->io.data_offset;
    } else if (run->exit_reason == KVM_EXIT_MMIO) {
        if (run->mmio.len != 1 && run->mmio.len != 2 && run->mmio.len != 4 && run->mmio.len != 8)
            return false;
        access.memory = true;
        access.write = run->mmio.is_write;
        access.size = (uint8_t)run->mmio.len;
        access.address = run->mmio.phys_addr;
        data = run->mmio.data;
    } else
        return false;
    if (access.write)
        memcpy(&access.value, data, access.size);
    if (!wires->bus->access(wires->bus, &access))
        return false;
    if (!access.write)
        memcpy(data, &access.value, access.size);
    return true;
}

/* 0: an exit that the bus does not answer; -1: something is due on the bus at another time; else the errno of KVM_RUN. An access that
 * was answered is complete then. */
static int go(Runner *self, Wires *wires)
{
    uint64_t due = atomic_load(&wires->bus->due);
    while (ioctl(self->fd, KVM_RUN, 0) >= 0) {
        note(self);
        if (!is_answered(self, wires))
            return 0;
        if (atomic_load(&wires->bus->due) != due) {
            run_of(self)->immediate_exit = 1;   /* the rest of the access, and nothing of the guest; who clears it looks for kicks */
            if (ioctl(self->fd, KVM_RUN, 0) >= 0)
                return note(self), 0;           /* another access of the same instruction: what is due, Python sees before the next */
            return errno == EINTR ? -1 : errno;
        }
    }
    return errno;
}

static PyObject *wires_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int vm;
    PyObject *lines, *capsule;
    if (!PyArg_ParseTuple(args, "iOO", &vm, &lines, &capsule))
        return NULL;
    struct fast_bus *bus = PyCapsule_GetPointer(capsule, FAST_BUS);
    Wires *self = bus ? (Wires *)type->tp_alloc(type, 0) : NULL;
    if (!self)
        return NULL;
    self->vm = vm;
    if (PyObject_GetBuffer(lines, &self->lines, PyBUF_WRITABLE)) {
        Py_DECREF(self);
        return NULL;
    }
    self->capsule = Py_NewRef(capsule);
    self->bus = bus;
    bus->attach(bus, &(struct bus_machine){self, drive_line, signal_msi, NULL});
    return (PyObject *)self;
}

static void detach(Wires *self)
{
    if (self->bus)
        self->bus->detach(self->bus, self);
    self->bus = NULL;
    Py_CLEAR(self->capsule);
    if (self->lines.obj)
        PyBuffer_Release(&self->lines);
}

static void wires_dealloc(Wires *self)
{
    PyTypeObject *type = Py_TYPE(self);
    detach(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *wires_close(Wires *self, PyObject *ignored)
{
    detach(self);
    Py_RETURN_NONE;
}

static PyObject *wires_can_send_unmaskable(Wires *self, PyObject *ignored)
{
    return PyBool_FromLong(self->bus && self->bus->can_send_unmaskable(self->bus));
}

static PyMethodDef wires_methods[] = {
    {"can_send_unmaskable", (PyCFunction)wires_can_send_unmaskable, METH_NOARGS,
     "can_send_unmaskable() -> bool: whether a device may send a message that is an NMI or an INIT"},
    {"close", (PyCFunction)wires_close, METH_NOARGS, "close()\n\nLines are not this VM's any more. Nothing runs."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot wires_slots[] = {
    {Py_tp_doc, "Wires(vm, lines, bus): between a VM and the devices of its board that are in C."},
    {Py_tp_new, wires_new}, {Py_tp_dealloc, wires_dealloc}, {Py_tp_methods, wires_methods}, {0, NULL},
};
static PyType_Spec wires_spec = {"vmfs.engine.kvm._run.Wires", sizeof(Wires), 0, Py_TPFLAGS_DEFAULT, wires_slots};

/* ---- for Python ---- */

static PyObject *runner_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int fd, finishes;
    unsigned index;
    PyObject *page;
    if (!PyArg_ParseTuple(args, "iOIp", &fd, &page, &index, &finishes))
        return NULL;
    Runner *self = (Runner *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->fd = fd;
    self->index = index;
    self->finishes = finishes;
    self->lane = (struct lane_cpu){.cpu = self, .clear_kick = clear_kick, .run = run, .keep = keep, .state = state, .data = data};
    if (PyObject_GetBuffer(page, &self->page, PyBUF_WRITABLE)) {
        Py_DECREF(self);
        return NULL;
    }
    if ((size_t)self->page.len < sizeof(struct kvm_run)) {
        PyErr_SetString(PyExc_ValueError, "that is no kvm_run mapping");
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void runner_dealloc(Runner *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->page.obj)
        PyBuffer_Release(&self->page);
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(close_doc,
    "close()\n\n"
    "Give the mapping back. Nothing runs any more.");
static PyObject *runner_close(Runner *self, PyObject *ignored)
{
    if (self->page.obj)
        PyBuffer_Release(&self->page);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(left_doc,
    "left(counts) -> (exit, data, offset, size, reads, completes, kind, error, more)\n\n"
    "The last run: of those that count, or of all. The exit as struct vmfs_exit and the bytes that were written; the access in\n"
    "the mapping; kind -1 for what vcpu.py has to look at there.");
static PyObject *runner_left(Runner *self, PyObject *args)
{
    int counts;
    if (!PyArg_ParseTuple(args, "p", &counts))
        return NULL;
    const struct left *left = &self->left[counts ? self->left_at : 1 - self->left_at];
    return Py_BuildValue("(y#y#nnOOiiO)", (const char *)&left->exit, (Py_ssize_t)sizeof left->exit, (const char *)left->data,
                         left->reads ? (Py_ssize_t)0 : (Py_ssize_t)left->size, (Py_ssize_t)left->offset, (Py_ssize_t)left->size,
                         left->reads ? Py_True : Py_False, left->completes ? Py_True : Py_False, left->kind, left->error,
                         left->more ? Py_True : Py_False);
}

PyDoc_STRVAR(note_doc,
    "note()\n\n"
    "The run was not this object's: keep what KVM_RUN ended with.");
static PyObject *runner_note(Runner *self, PyObject *ignored)
{
    (void)ignored;
    note(self);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(last_doc,
    "last() -> [(exit, data)]\n\n"
    "The last accesses and halts, each as struct vmfs_exit with the first bytes that were written, the newest at the end. While\n"
    "nothing runs.");
static PyObject *runner_last(Runner *self, PyObject *ignored)
{
    (void)ignored;
    uint64_t count = self->noted < EXITS_KEPT ? self->noted : EXITS_KEPT;
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (uint64_t i = 0; list && i < count; i++) {
        const struct vmfs_exit *exit = &self->last[(self->noted - count + i) % EXITS_KEPT];
        size_t written = 0;
        const uint8_t *data = exit->io.data;
        if (exit->reason == VMFS_EXIT_IO && exit->io.direction == VMFS_IO_OUT)
            written = (size_t)exit->io.size * exit->io.count;
        else if (exit->reason == VMFS_EXIT_MMIO && exit->mmio.is_write)
            written = exit->mmio.len, data = exit->mmio.data;
        if (written > sizeof exit->io.data)
            written = sizeof exit->io.data;
        PyObject *one = Py_BuildValue("(y#y#)", (const char *)exit, (Py_ssize_t)sizeof *exit, (const char *)data,
                                      (Py_ssize_t)written);
        if (one)
            PyList_SET_ITEM(list, (Py_ssize_t)i, one);
        else
            Py_CLEAR(list);
    }
    return list;
}

PyDoc_STRVAR(go_doc,
    "go(wires) -> int\n\n"
    "KVM_RUN, while the bus of the wires answers. 0: an exit. -1: something is due on the bus at another time than before. Else\n"
    "the errno of KVM_RUN.");
static PyObject *runner_go(Runner *self, PyObject *wires)
{
    int ended;
    if (strcmp(Py_TYPE(wires)->tp_name, wires_spec.name) || !((Wires *)wires)->bus) {
        PyErr_SetString(PyExc_TypeError, "wires to a bus");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    ended = go(self, (Wires *)wires);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(ended);
}

static PyObject *get_lane(Runner *self, void *closure)
{
    (void)closure;
    return PyCapsule_New(&self->lane, LANE_CPU, NULL);
}

static PyObject *get_thread(Runner *self, void *closure)
{
    (void)closure;
    if (!__atomic_load_n(&self->runs, __ATOMIC_SEQ_CST))
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLong((unsigned long)self->thread);
}

static PyMethodDef runner_methods[] = {
    {"close", (PyCFunction)runner_close, METH_NOARGS, close_doc},
    {"go", (PyCFunction)runner_go, METH_O, go_doc},
    {"last", (PyCFunction)runner_last, METH_NOARGS, last_doc},
    {"note", (PyCFunction)runner_note, METH_NOARGS, note_doc},
    {"left", (PyCFunction)runner_left, METH_VARARGS, left_doc},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef runner_getset[] = {
    {"lane", (getter)get_lane, NULL, "a capsule by which C code runs it (vmfs/words/lane.h); the runner is to live longer", NULL},
    {"thread", (getter)get_thread, NULL, "the thread that is in KVM_RUN by it, as threading.get_ident tells it, or None", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot runner_slots[] = {
    {Py_tp_doc, "Runner(fd, page, index, finishes): runs of a vCPU by C code."},
    {Py_tp_new, runner_new}, {Py_tp_dealloc, runner_dealloc}, {Py_tp_methods, runner_methods}, {Py_tp_getset, runner_getset},
    {0, NULL},
};
static PyType_Spec runner_spec = {"vmfs.engine.kvm._run.Runner", sizeof(Runner), 0, Py_TPFLAGS_DEFAULT, runner_slots};

static int module_exec(PyObject *module)
{
    _Static_assert(sizeof(struct kvm_regs) == LANE_REGS_SIZE && sizeof(struct vmfs_exit) == LANE_EXIT_SIZE, "KVM's UAPI");
    PyObject *type = PyType_FromModuleAndSpec(module, &runner_spec, NULL);
    PyObject *wires = PyType_FromModuleAndSpec(module, &wires_spec, NULL);
    int failed = !type || !wires || PyModule_AddType(module, (PyTypeObject *)type)
                 || PyModule_AddType(module, (PyTypeObject *)wires);
    Py_XDECREF(type);
    Py_XDECREF(wires);
    return failed ? -1 : 0;
}
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "vmfs.engine.kvm._run", "KVM_RUN for the lane.", 0, NULL, module_slots, NULL, NULL, NULL,
};
PyMODINIT_FUNC PyInit__run(void) { return PyModuleDef_Init(&module_def); }
