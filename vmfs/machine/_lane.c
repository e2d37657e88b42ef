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
#include <stdio.h>
#include <sys/mman.h>

#include "lane.h"
#include "../include/vmfs.h"

enum gate { CLOSED, OPEN, RUNNING, BUSY, ADOPTED };

struct facts {
    uint64_t runs, exits[LANE_EXITS], ns;
    uint64_t writes;
};

typedef struct {
    PyObject_HEAD
    struct lane_page *page;
    uint32_t gate;
    uint32_t called;            /* serve() shall return */
    const struct lane_cpu *cpu; /* of the open gate */
    int is_halted;              /* once it is open */
    struct facts facts;         /* of what Python has not heard of; serve()'s while the gate is BUSY */
    uint64_t began;             /* the run under way, CLOCK_MONOTONIC */
    uint64_t handle;            /* whose it is */
    uint32_t number;            /* of its order */
    uint32_t line_number;       /* of the order that is a line, for Python */
    size_t line_size;
    uint8_t line[LANE_SREGS_SIZE];
} Lane;

static uint32_t load(uint32_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }
static void store(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_SEQ_CST); }
static int swap(uint32_t *word, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(word, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* ---- what stands still: written by the side that has the CPU, as the gate says ---- */

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

/* ---- orders of the server ---- */

/* The order has ended. */
static void tell(Lane *self) { lane_signal(&self->page->ended, &self->page->server_sleeps); }

static uint64_t number_at(const uint8_t *data, unsigned size)
{
    uint64_t number = 0;
    memcpy(&number, data, size <= sizeof number ? size : sizeof number);
    return number;
}

/* The line of an exit (Exit.line of vmfs.words.exits); its size, or 0 where it is too long. `data`: all that was written. */
static size_t write_line(int kind, const uint8_t *packed, const uint8_t *data, size_t data_size, char *line)
{
    struct vmfs_exit exit;
    size_t at = 0;

    memcpy(&exit, packed, sizeof exit);
#define SAY(...) (at += (size_t)snprintf(line + at, at < LANE_LINE_MOST ? LANE_LINE_MOST - at : 0, __VA_ARGS__), \
                  at = at < LANE_LINE_MOST ? at : LANE_LINE_MOST)
    if (kind == LANE_EXIT_IO) {
        SAY("io direction=%s port=0x%x size=%u count=%u", exit.io.direction ? "out" : "in", exit.io.port, exit.io.size, exit.io.count);
        unsigned size = exit.io.size ? exit.io.size : 1;
        if (exit.io.direction)
            for (size_t of = 0; of + size <= data_size; of += size)
                SAY("%s0x%llx", of ? "," : " data=", (unsigned long long)number_at(data + of, size));
    } else if (kind == LANE_EXIT_MMIO) {
        SAY("mmio direction=%s addr=0x%llx size=%u", exit.mmio.is_write ? "write" : "read", (unsigned long long)exit.mmio.addr,
            exit.mmio.len);
        if (exit.mmio.is_write)
            SAY(" data=0x%llx", (unsigned long long)number_at(exit.mmio.data, exit.mmio.len));
    } else
        SAY("hlt");
    SAY(" rip=0x%llx", (unsigned long long)exit.rip);
    if (exit.cpu)
        SAY(" cpu=%u", exit.cpu);
    SAY("\n");
#undef SAY
    return at < LANE_LINE_MOST ? at : 0;
}

/* A run has come to `packed`: what can be read of it now. `had`: of which of LANE_SNAPSHOTS the `news` are known. Whether there is
 * an answer to the order. */
static int show_run(Lane *self, int kind, const uint8_t packed[LANE_EXIT_SIZE], uint32_t had)
{
    static const char *const states[] = {"paused\n", "halted\n"};
    struct lane_page *page = self->page;
    const struct lane_cpu *cpu = self->cpu;

    begin_writing(page);
    page->valid = had | cpu->state(cpu->cpu, page->regs, page->sregs);
    size_t size = cpu->data(cpu->cpu, page->data);
    page->sizes[LANE_REGS] = LANE_REGS_SIZE;
    page->sizes[LANE_SREGS] = LANE_SREGS_SIZE;
    if (size <= LANE_DATA_MOST) {
        page->sizes[LANE_DATA] = (uint32_t)size;
        page->valid |= LANE_VALID(LANE_DATA);
    }
    memcpy(page->exit, packed, LANE_EXIT_SIZE);
    page->sizes[LANE_EXIT] = LANE_EXIT_SIZE;
    page->news[0]++;
    self->is_halted = kind == LANE_EXIT_HLT;
    memcpy(page->state, states[self->is_halted], strlen(states[0]));
    page->sizes[LANE_STATE] = (uint32_t)strlen(states[0]);
    page->news[1] += 1 + !self->facts.runs;         /* Contents.changes: each run, and that Python hears of them */
    end_writing(page);

    if (page->file == LANE_RUN_LINE)
        page->output_size = size <= LANE_DATA_MOST
            ? (uint32_t)write_line(kind, packed, page->data, size, (char *)page->output) : 0;
    else {
        memcpy(page->output, packed, LANE_EXIT_SIZE);
        page->output_size = LANE_EXIT_SIZE;
    }
    return page->output_size != 0;
}

enum taken { SETTLED, FOR_PYTHON, A_LINE };

/* The gate is BUSY, the order TAKEN. */
static enum taken take_run(Lane *self, uint32_t number)
{
    struct lane_page *page = self->page;
    const struct lane_cpu *cpu = self->cpu;
    uint8_t exit[LANE_EXIT_SIZE];
    uint64_t began = lane_now();

    self->began = began;
    self->number = number;
    self->handle = page->handle;
    cpu->clear_kick(cpu->cpu);          /* of runs that are over: a thread that kicks this one has adopted it */
    uint32_t had = page->valid & LANE_SNAPSHOTS;
    invalidate(page);
    store(&self->gate, RUNNING);

    int kind = cpu->run(cpu->cpu, exit);

    if (!swap(&self->gate, RUNNING, BUSY)) {
        lane_step_on(&page->order, number, LANE_TAKEN, LANE_LEFT);
        tell(self);
        return FOR_PYTHON;
    }
    if (kind >= 0 && show_run(self, kind, exit, had)) {
        if (lane_step_on(&page->order, number, LANE_TAKEN, LANE_DONE)) {
            cpu->keep(cpu->cpu);
            self->facts.runs++;
            self->facts.exits[kind]++;
            self->facts.ns += lane_now() - began;
            store(&self->gate, OPEN);
            tell(self);
            return SETTLED;
        }
    } else
        lane_step_on(&page->order, number, LANE_TAKEN, LANE_LEFT);
    invalidate(page);
    store(&self->gate, ADOPTED);
    tell(self);
    return FOR_PYTHON;
}

/* Set bytes of a file; whether that was done, else nothing has changed. */
static int set_part(Lane *self, unsigned file, uint32_t offset, uint32_t size, const uint8_t *input)
{
    struct lane_page *page = self->page;
    const struct lane_cpu *cpu = self->cpu;
    uint8_t regs[LANE_REGS_SIZE], sregs[LANE_SREGS_SIZE], data[LANE_DATA_MOST];
    uint8_t *whole = file == LANE_REGS ? regs : file == LANE_SREGS ? sregs : data;
    size_t most = lane_places[file].most;

    if (!cpu->set || size > most || offset > most - size)
        return 0;
    if (file == LANE_DATA) {
        most = cpu->data(cpu->cpu, data);
        if (most > LANE_DATA_MOST || offset + size > most)
            return 0;
    } else if (self->is_halted || !(cpu->state(cpu->cpu, regs, sregs) & LANE_VALID(file)))
        return 0;                       /* a CPU that is set is halted no more, which others are told */
    memcpy(whole + offset, input, size);
    if (cpu->set(cpu->cpu, file, whole, most))
        return 0;
    begin_writing(page);
    uint32_t still = page->valid & LANE_SNAPSHOTS;
    page->valid = still | cpu->state(cpu->cpu, page->regs, page->sregs);
    page->sizes[LANE_REGS] = LANE_REGS_SIZE;
    page->sizes[LANE_SREGS] = LANE_SREGS_SIZE;
    most = cpu->data(cpu->cpu, page->data);
    if (most <= LANE_DATA_MOST) {
        page->sizes[LANE_DATA] = (uint32_t)most;
        page->valid |= LANE_VALID(LANE_DATA);
    }
    end_writing(page);
    return 1;
}

static enum taken take_write(Lane *self, uint32_t number)
{
    struct lane_page *page = self->page;
    const struct lane_cpu *cpu = self->cpu;
    int is_done = 0;

    if (page->file == LANE_IRQ)
        is_done = cpu->interrupt && !cpu->interrupt(cpu->cpu, page->input[0]);
    else if (page->file <= LANE_DATA)
        is_done = set_part(self, page->file, page->offset, page->size, page->input);
    self->facts.writes += (uint64_t)is_done;
    lane_step_on(&page->order, number, LANE_TAKEN, is_done ? LANE_DONE : LANE_LEFT);
    store(&self->gate, OPEN);
    tell(self);
    return SETTLED;
}

static enum taken take_order(Lane *self, uint32_t order)
{
    struct lane_page *page = self->page;
    uint32_t number = order >> LANE_STEP_BITS;

    if (!swap(&self->gate, OPEN, BUSY)) {
        lane_step_on(&page->order, number, LANE_POSTED, LANE_NONE);
        tell(self);
        return SETTLED;
    }
    if (!lane_step_on(&page->order, number, LANE_POSTED, LANE_TAKEN)) {
        store(&self->gate, OPEN);
        return SETTLED;
    }
    if (page->file == LANE_RESTORE) { /* it has the CPU, as others of Python have, when it takes the machine's lock */
        self->line_number = number;
        self->line_size = page->size <= sizeof self->line ? page->size : 0;
        memcpy(self->line, page->input, self->line_size);
        store(&self->gate, OPEN);
        return A_LINE;
    }
    return page->file == LANE_RUN || page->file == LANE_RUN_LINE ? take_run(self, number) : take_write(self, number);
}

static int posted(struct lane_page *page) { return (load(&page->order) & LANE_STEP_MASK) == LANE_POSTED; }

/* Until serve() is called away, SETTLED; or until there is something for Python. Without the GIL. */
static enum taken serve(Lane *self)
{
    struct lane_page *page = self->page;

    for (;;) {
        uint32_t bell = load(&page->bell);
        if (__atomic_exchange_n(&self->called, 0, __ATOMIC_SEQ_CST))
            return SETTLED;
        if (posted(page)) {
            enum taken taken = take_order(self, load(&page->order));
            if (taken != SETTLED)
                return taken;
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
    "leave(cpu, is_halted)\n\n"
    "Orders may be taken for the CPU with that capsule (vmfs/words/lane.h).");
static PyObject *lane_leave(Lane *self, PyObject *args)
{
    PyObject *capsule;
    int is_halted;
    if (!PyArg_ParseTuple(args, "Op", &capsule, &is_halted))
        return NULL;
    const struct lane_cpu *cpu = PyCapsule_GetPointer(capsule, LANE_CPU);
    if (!cpu)
        return NULL;
    if (load(&self->gate) == CLOSED) {
        self->cpu = cpu;
        self->is_halted = is_halted;
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
    "take() -> (runs, io, mmio, hlt, seconds, writes)\n\n"
    "What was done since it was last asked; once entered.");
static PyObject *lane_take(Lane *self, PyObject *ignored)
{
    struct facts f = self->facts;
    self->facts = (struct facts){0};
    return Py_BuildValue("(KKKKdK)", (unsigned long long)f.runs, (unsigned long long)f.exits[LANE_EXIT_IO],
                         (unsigned long long)f.exits[LANE_EXIT_MMIO], (unsigned long long)f.exits[LANE_EXIT_HLT],
                         (double)f.ns / 1e9, (unsigned long long)f.writes);
}

PyDoc_STRVAR(under_way_doc,
    "under_way() -> (handle, began)\n\n"
    "Whose the adopted run is, and when it began (time.perf_counter).");
static PyObject *lane_under_way(Lane *self, PyObject *ignored)
{
    return Py_BuildValue("(Kd)", (unsigned long long)self->handle, (double)self->began / 1e9);
}

PyDoc_STRVAR(is_left_doc,
    "is_left() -> bool\n\n"
    "Whether the server asks for the adopted run in the usual way: its order is no order any more.");
static PyObject *lane_is_left(Lane *self, PyObject *ignored)
{
    return PyBool_FromLong(load(&self->page->order) != (self->number << LANE_STEP_BITS | LANE_TAKEN));
}

PyDoc_STRVAR(publish_doc,
    "publish(file, data, news)\n\n"
    "What stands still of a file (enum lane_file), and what polls of it have seen who have read that; once entered, and without\n"
    "a run.");
static PyObject *lane_publish(Lane *self, PyObject *args)
{
    unsigned file;
    Py_buffer data;
    unsigned long long news;
    if (!PyArg_ParseTuple(args, "Iy*K", &file, &data, &news))
        return NULL;
    struct lane_page *page = self->page;
    int fits = file < LANE_FILES_STILL && (size_t)data.len <= lane_places[file].most;
    if (fits) {
        begin_writing(page);
        memcpy((uint8_t *)page + lane_places[file].at, data.buf, (size_t)data.len);
        page->sizes[file] = (uint32_t)data.len;
        if (LANE_SNAPSHOTS & LANE_VALID(file))
            page->news[file - LANE_EXIT] = news;
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
    "serve() -> SETTLED, A_RUN or A_LINE\n\n"
    "In the CPU's thread: run for the server, until it is called away, a run is Python's to end, or there is a line for it.");
static PyObject *lane_serve(Lane *self, PyObject *ignored)
{
    enum taken taken;
    Py_BEGIN_ALLOW_THREADS
    taken = serve(self);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(taken);
}

PyDoc_STRVAR(line_doc,
    "line() -> (number, bytes)\n\n"
    "The line for Python, in the CPU's thread; `end_line` is to follow.");
static PyObject *lane_line(Lane *self, PyObject *ignored)
{
    return Py_BuildValue("(Iy#)", self->line_number, self->line, (Py_ssize_t)self->line_size);
}

PyDoc_STRVAR(end_line_doc,
    "end_line(number, is_done)\n\n"
    "It is done; or nothing has changed, and the server asks in the usual way. From any thread.");
static PyObject *lane_end_line(Lane *self, PyObject *args)
{
    unsigned number;
    int is_done;
    if (!PyArg_ParseTuple(args, "Ip", &number, &is_done))
        return NULL;
    lane_step_on(&self->page->order, number, LANE_TAKEN, is_done ? LANE_DONE : LANE_LEFT);
    tell(self);
    Py_RETURN_NONE;
}

static PyMethodDef lane_methods[] = {
    {"enter", (PyCFunction)lane_enter, METH_NOARGS, enter_doc},
    {"leave", (PyCFunction)lane_leave, METH_VARARGS, leave_doc},
    {"settle", (PyCFunction)lane_settle, METH_NOARGS, settle_doc},
    {"take", (PyCFunction)lane_take, METH_NOARGS, take_doc},
    {"under_way", (PyCFunction)lane_under_way, METH_NOARGS, under_way_doc},
    {"is_left", (PyCFunction)lane_is_left, METH_NOARGS, is_left_doc},
    {"publish", (PyCFunction)lane_publish, METH_VARARGS, publish_doc},
    {"invalidate", (PyCFunction)lane_invalidate, METH_NOARGS, invalidate_doc},
    {"call", (PyCFunction)lane_call, METH_NOARGS, call_doc},
    {"serve", (PyCFunction)lane_serve, METH_NOARGS, serve_doc},
    {"line", (PyCFunction)lane_line, METH_NOARGS, line_doc},
    {"end_line", (PyCFunction)lane_end_line, METH_VARARGS, end_line_doc},
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
    failed = failed || PyModule_AddIntConstant(module, "SIZE", LANE_SIZE)
             || PyModule_AddIntConstant(module, "SETTLED", SETTLED) || PyModule_AddIntConstant(module, "A_RUN", FOR_PYTHON)
             || PyModule_AddIntConstant(module, "A_LINE", A_LINE)
             || PyModule_AddIntConstant(module, "ORDER", offsetof(struct lane_page, order))
             || PyModule_AddIntConstant(module, "ENDED", offsetof(struct lane_page, ended));
    return failed ? -1 : 0;
}
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "vmfs.machine._lane", "A machine's end of the lane.", 0, NULL, module_slots, NULL, NULL, NULL,
};
PyMODINIT_FUNC PyInit__lane(void) { return PyModuleDef_Init(&module_def); }
