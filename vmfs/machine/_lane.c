/* vmfs.machine._lane: a machine's end of the page that it shares with its server (vmfs/words/lane.h).
 *
 * Lane(page) has the gate between the machine's two ways to run. Python, with the machine's lock held, calls enter() first and
 * leave() last; in between the CPU is Python's. leave(cpu) opens the gate: the CPU's thread, which is in serve() while it has
 * nothing else to do, may then run the CPU for the server, without the GIL. enter() takes the CPU back, or finds a
 * run under way, and makes it Python's: serve() returns at its end.
 *
 * The gate, a word of this process alone:
 *   CLOSED   Python has the CPU                              -> OPEN     leave(cpu)
 *   OPEN     a run may begin                                 -> CLOSED   enter();   -> BUSY   serve()
 *   RUNNING  one is under way, and Python does not know      -> ADOPTED  enter();   -> BUSY   serve()
 *   BUSY     serve() writes things down: some hundred ns     -> OPEN, RUNNING, ADOPTED   serve(); enter() waits for it
 *   ADOPTED  one is under way, or over, that is Python's     -> CLOSED   settle() */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <sched.h>
#include <sys/mman.h>

#include "lane.h"

enum gate { CLOSED, OPEN, RUNNING, BUSY, ADOPTED };

struct facts {
    uint64_t runs, exits[LANE_EXITS], ns;
};

typedef struct {
    PyObject_HEAD
    struct lane_page *page;
    uint32_t gate;
    uint32_t called;            /* serve() shall return */
    const struct lane_cpu *cpu; /* of the open gate */
    struct facts facts;         /* of the runs that Python has not heard of; serve()'s while the gate is BUSY */
    uint64_t began;             /* the run under way, CLOCK_MONOTONIC */
    uint64_t handle;            /* whose it is */
} Lane;

static uint32_t load(uint32_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }
static void store(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_SEQ_CST); }
static int swap(uint32_t *word, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(word, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* ---- what stands still: written by whom the gate says has the CPU ---- */

static void begin_writing(struct lane_page *page)
{
    __atomic_store_n(&page->sequence, page->sequence + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static void end_writing(struct lane_page *page)
{
    __atomic_store_n(&page->sequence, page->sequence + 1, __ATOMIC_RELEASE);
}

static void invalidate(struct lane_page *page)
{
    if (!page->valid)
        return;
    begin_writing(page);
    page->valid = 0;
    end_writing(page);
}

/* ---- runs for the server ---- */

/* The order has ended. */
static void tell(Lane *self) { lane_signal(&self->page->ended, &self->page->server_sleeps); }

enum taken { SETTLED, FOR_PYTHON };

static enum taken take_order(Lane *self, uint32_t order)
{
    struct lane_page *page = self->page;
    uint32_t number = order >> LANE_STEP_BITS;
    uint8_t exit[LANE_EXIT_SIZE];

    if (!swap(&self->gate, OPEN, BUSY)) {
        lane_step_on(&page->order, number, LANE_POSTED, LANE_NONE);
        tell(self);
        return SETTLED;
    }
    if (!lane_step_on(&page->order, number, LANE_POSTED, LANE_TAKEN)) {
        store(&self->gate, OPEN);
        return SETTLED;
    }
    const struct lane_cpu *cpu = self->cpu;
    uint64_t began = lane_now();
    self->began = began;
    self->handle = __atomic_load_n(&page->handle, __ATOMIC_RELAXED);
    cpu->clear_kick(cpu->cpu);          /* of runs that are over: who kicks this one has adopted it */
    invalidate(page);
    store(&self->gate, RUNNING);

    int kind = cpu->run(cpu->cpu, exit);

    if (!swap(&self->gate, RUNNING, BUSY)) {
        lane_step_on(&page->order, number, LANE_TAKEN, LANE_LEFT);
        tell(self);
        return FOR_PYTHON;
    }
    if (kind >= 0) {
        memcpy(page->exit, exit, sizeof exit);
        begin_writing(page);
        cpu->state(cpu->cpu, page->regs, page->sregs);
        size_t size = cpu->data(cpu->cpu, page->data);
        page->data_size = (uint32_t)size;
        page->valid = LANE_VALID(LANE_REGS) | LANE_VALID(LANE_SREGS) | (size <= LANE_DATA_MOST ? LANE_VALID(LANE_DATA) : 0);
        end_writing(page);
        if (lane_step_on(&page->order, number, LANE_TAKEN, LANE_DONE)) {
            self->facts.runs++;
            self->facts.exits[kind]++;
            self->facts.ns += lane_now() - began;
            store(&self->gate, OPEN);
            tell(self);
            return SETTLED;
        }
        invalidate(page);
    } else
        lane_step_on(&page->order, number, LANE_TAKEN, LANE_LEFT);
    store(&self->gate, ADOPTED);
    tell(self);
    return FOR_PYTHON;
}

static int posted(struct lane_page *page) { return (load(&page->order) & LANE_STEP_MASK) == LANE_POSTED; }

/* Until serve() is called away, 0; or until a run is Python's to end, 1. Without the GIL. */
static int serve(Lane *self)
{
    struct lane_page *page = self->page;

    for (;;) {
        uint32_t bell = load(&page->bell);
        if (__atomic_exchange_n(&self->called, 0, __ATOMIC_SEQ_CST))
            return 0;
        if (posted(page)) {
            if (take_order(self, load(&page->order)) == FOR_PYTHON)
                return 1;
            continue;
        }
        lane_sleep(&page->bell, &page->sleeps, bell);
    }
}

/* ---- for Python, with the machine's lock ---- */

static PyObject *lane_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int fd;
    if (!PyArg_ParseTuple(args, "i", &fd))
        return NULL;
    Lane *self = (Lane *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    void *page = mmap(NULL, LANE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED)
        self->page = page;
    if (!self->page) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void lane_dealloc(Lane *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->page)
        munmap(self->page, LANE_SIZE);
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(enter_doc,
    "enter()\n\n"
    "Take the CPU. 0: nothing has happened. 1: there may be runs to take(). 2: a run is under way, or over, which is to be\n"
    "settled.");
static PyObject *lane_enter(Lane *self, PyObject *ignored)
{
    for (;;) {
        uint32_t gate = load(&self->gate);
        if (gate == CLOSED)
            return PyLong_FromLong(0);
        if (gate == ADOPTED)
            return PyLong_FromLong(2);
        if (gate == BUSY)
            sched_yield();
        else if (swap(&self->gate, gate, gate == OPEN ? CLOSED : ADOPTED)) {
            store(&self->page->is_open, 0);
            return PyLong_FromLong(gate == OPEN ? 1 : 2);
        }
    }
}

PyDoc_STRVAR(leave_doc,
    "leave(cpu)\n\n"
    "Runs may begin of the CPU with that capsule (vmfs/words/lane.h).");
static PyObject *lane_leave(Lane *self, PyObject *capsule)
{
    const struct lane_cpu *cpu = PyCapsule_GetPointer(capsule, LANE_CPU);
    if (!cpu)
        return NULL;
    if (load(&self->gate) == CLOSED) {
        self->cpu = cpu;
        store(&self->gate, OPEN);
        store(&self->page->is_open, 1);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(settle_doc,
    "settle()\n\n"
    "The run that was Python's to end has ended.");
static PyObject *lane_settle(Lane *self, PyObject *ignored)
{
    swap(&self->gate, ADOPTED, CLOSED);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(take_doc,
    "take() -> (runs, io, mmio, hlt, seconds)\n\n"
    "What was run since it was last asked; once entered.");
static PyObject *lane_take(Lane *self, PyObject *ignored)
{
    struct facts f = self->facts;
    self->facts = (struct facts){0};
    return Py_BuildValue("(KKKKd)", (unsigned long long)f.runs, (unsigned long long)f.exits[LANE_EXIT_IO],
                         (unsigned long long)f.exits[LANE_EXIT_MMIO], (unsigned long long)f.exits[LANE_EXIT_HLT],
                         (double)f.ns / 1e9);
}

PyDoc_STRVAR(under_way_doc,
    "under_way() -> (handle, began)\n\n"
    "Whose the adopted run is, and when it began (time.perf_counter).");
static PyObject *lane_under_way(Lane *self, PyObject *ignored)
{
    return Py_BuildValue("(Kd)", (unsigned long long)self->handle, (double)self->began / 1e9);
}

PyDoc_STRVAR(publish_doc,
    "publish(file, data)\n\n"
    "What stands still of regs (0), sregs (1) or the pending access (2); once entered, and without a run.");
static PyObject *lane_publish(Lane *self, PyObject *args)
{
    unsigned file;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "Iy*", &file, &data))
        return NULL;
    struct lane_page *page = self->page;
    size_t size = (size_t)data.len;
    uint8_t *to = file == LANE_REGS ? page->regs : file == LANE_SREGS ? page->sregs : page->data;
    int fits = file == LANE_REGS ? size == LANE_REGS_SIZE : file == LANE_SREGS ? size == LANE_SREGS_SIZE
               : file == LANE_DATA && size <= LANE_DATA_MOST;
    if (fits) {
        begin_writing(page);
        memcpy(to, data.buf, size);
        if (file == LANE_DATA)
            page->data_size = (uint32_t)size;
        page->valid |= LANE_VALID(file);
        end_writing(page);
    }
    PyBuffer_Release(&data);
    return PyBool_FromLong(fits);
}

PyDoc_STRVAR(invalidate_doc,
    "invalidate()\n\n"
    "Nothing of what was published holds; once entered.");
static PyObject *lane_invalidate(Lane *self, PyObject *ignored)
{
    invalidate(self->page);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(call_doc,
    "call()\n\n"
    "Have serve() return. From any thread.");
static PyObject *lane_call(Lane *self, PyObject *ignored)
{
    store(&self->called, 1);
    lane_signal(&self->page->bell, &self->page->sleeps);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(serve_doc,
    "serve() -> whether a run is Python's to end\n\n"
    "In the CPU's thread: run for the server, until it is called away or a run is Python's to end.");
static PyObject *lane_serve(Lane *self, PyObject *ignored)
{
    int left;
    Py_BEGIN_ALLOW_THREADS
    left = serve(self);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(left);
}

static PyMethodDef lane_methods[] = {
    {"enter", (PyCFunction)lane_enter, METH_NOARGS, enter_doc},
    {"leave", (PyCFunction)lane_leave, METH_O, leave_doc},
    {"settle", (PyCFunction)lane_settle, METH_NOARGS, settle_doc},
    {"take", (PyCFunction)lane_take, METH_NOARGS, take_doc},
    {"under_way", (PyCFunction)lane_under_way, METH_NOARGS, under_way_doc},
    {"publish", (PyCFunction)lane_publish, METH_VARARGS, publish_doc},
    {"invalidate", (PyCFunction)lane_invalidate, METH_NOARGS, invalidate_doc},
    {"call", (PyCFunction)lane_call, METH_NOARGS, call_doc},
    {"serve", (PyCFunction)lane_serve, METH_NOARGS, serve_doc},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot lane_slots[] = {
    {Py_tp_doc, "Lane(page): a machine's end of the page that it shares with its server."},
    {Py_tp_new, lane_new}, {Py_tp_dealloc, lane_dealloc}, {Py_tp_methods, lane_methods}, {0, NULL},
};
static PyType_Spec lane_spec = {"vmfs.machine._lane.Lane", sizeof(Lane), 0, Py_TPFLAGS_DEFAULT, lane_slots};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &lane_spec, NULL);
    int failed = !type || PyModule_AddType(module, (PyTypeObject *)type);
    Py_XDECREF(type);
    return failed ? -1 : PyModule_AddIntConstant(module, "SIZE", LANE_SIZE);
}
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "vmfs.machine._lane", "A machine's end of the lane.", 0, NULL, module_slots, NULL, NULL, NULL,
};
PyMODINIT_FUNC PyInit__lane(void) { return PyModuleDef_Init(&module_def); }
