/* vmfs.engine.kvm._run: KVM_RUN, and what it ended with, for the lane (vmfs/words/lane.h): the part of vcpu.py that a loop of exits
 * needs, without Python.
 *
 * Runner(fd, page, index, finishes) is of one vCPU: its descriptor and its kvm_run mapping. It runs from a plain state to an
 * access or a halt. Whatever else ends KVM_RUN is vcpu.py's, which finds it in the mapping as after its own KVM_RUN.
 *
 * Source: Linux Documentation/virt/kvm/api.rst, "The kvm_run structure". */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <sys/ioctl.h>

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

typedef struct {
    PyObject_HEAD
    Py_buffer page;
    int fd;
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
    int failed = !type || PyModule_AddType(module, (PyTypeObject *)type);
    Py_XDECREF(type);
    return failed ? -1 : 0;
}
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "vmfs.engine.kvm._run", "KVM_RUN for the lane.", 0, NULL, module_slots, NULL, NULL, NULL,
};
PyMODINIT_FUNC PyInit__run(void) { return PyModuleDef_Init(&module_def); }
