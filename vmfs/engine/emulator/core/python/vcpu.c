/* Vcpu: a CPU of the core: its state, its stops, its trace, and runs of it alone. */
#include "module.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static void vcpu_dealloc(VcpuObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->owner) {
        if (self->owner->vcpus[self->index] == self)
            self->owner->vcpus[self->index] = NULL;
        if (self->owner->vm && self->vcpu)
            vcpu_destroy(self->vcpu);
        Py_DECREF(self->owner);
    }
    Py_XDECREF(self->sink);
    watching_free(self->watching);
    free(self->left);
    PyObject_Free(self);
    Py_DECREF(type);
}

int vcpu_alive(VcpuObject *self)
{
    if (self->vcpu && self->owner->vm)
        return 1;
    fail(-ENODEV);
    return 0;
}
int vcpu_idle(VcpuObject *self)
{
    if (!vcpu_alive(self))
        return 0;
    if (!self->running && !self->owner->all_run)
        return 1;
    fail(-EBUSY);
    return 0;
}

PyObject *exit_tuple(const struct vcpu_exit *e)
{
    return Py_BuildValue("(iKOIIKiIIz)", (int)e->reason, (unsigned long long)e->rip, e->write ? Py_True : Py_False, e->size,
                         e->count, (unsigned long long)e->address, (int)e->cause, e->id, e->vector, e->message);
}

/* Whether this thread is its process's first. It is looked up once for each thread: two system calls were a quarter of what a short run
 * costs. */
static __thread __attribute__((tls_model("initial-exec"))) enum { UNKNOWN, MAIN, ANOTHER } thread_is;

static void is_forked(void) { thread_is = MAIN; }
void watch_forks(void) { pthread_atfork(NULL, NULL, is_forked); }

bool is_main_thread(void)
{
    if (thread_is == UNKNOWN)
        thread_is = gettid() == getpid() ? MAIN : ANOTHER;
    return thread_is == MAIN;
}

/* Python calls signal handlers in its main thread only, between bytecodes: a run there has to let it. */
bool poll_signals(void *argument)
{
    VcpuObject *self = argument;
    PyGILState_STATE state = PyGILState_Ensure();
    self->signalled = PyErr_CheckSignals();
    PyGILState_Release(state);
    return self->signalled;
}

static PyObject *py_vcpu_run(VcpuObject *self, PyObject *args)
{
    long long budget = BUDGET_UNLIMITED;
    struct vcpu_exit exit;
    int goes_on = 0;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "|Lp", &budget, &goes_on))
        return NULL;
    Py_INCREF(self->owner);
    self->running = 1;
    self->owner->running++;
    self->signalled = 0;
    vcpu_set_poll(self->vcpu, is_main_thread() ? poll_signals : NULL, self);
    Py_BEGIN_ALLOW_THREADS
    (goes_on ? vcpu_go_on : vcpu_run)(self->vcpu, budget, &exit);
    Py_END_ALLOW_THREADS
    self->running = 0;
    self->owner->running--;
    Py_DECREF(self->owner);
    return self->signalled ? NULL : exit_tuple(&exit);
}

static PyObject *py_vcpu_kick(VcpuObject *self, PyObject *ignored)
{
    (void)ignored;
    if (!vcpu_alive(self))
        return NULL;
    vcpu_kick(self->vcpu);
    Py_RETURN_NONE;
}
static PyObject *py_vcpu_clear_kick(VcpuObject *self, PyObject *ignored)
{
    (void)ignored;
    if (!vcpu_alive(self))
        return NULL;
    vcpu_clear_kick(self->vcpu);
    Py_RETURN_NONE;
}

static PyObject *py_vcpu_get_state(VcpuObject *self, PyObject *args)
{
    const char *name;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "s", &name))
        return NULL;
    long size = vcpu_get_state(self->vcpu, name, NULL, 0);
    if (size < 0)
        return fail(size);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, size);
    if (bytes)
        vcpu_get_state(self->vcpu, name, PyBytes_AS_STRING(bytes), (size_t)size);
    return bytes;
}

static PyObject *py_vcpu_set_state(VcpuObject *self, PyObject *args)
{
    const char *name;
    Py_buffer data;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "sy*", &name, &data))
        return NULL;
    int error = vcpu_set_state(self->vcpu, name, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    if (error)
        return fail(error);
    Py_RETURN_NONE;
}

static long get_vcpu(void *owner, const char *name, void *data, size_t size) { return vcpu_get_state(owner, name, data, size); }
static int set_vcpu(void *owner, const char *name, const void *data, size_t size) { return vcpu_set_state(owner, name, data, size); }

static PyObject *py_vcpu_get_states(VcpuObject *self, PyObject *names)
{
    return vcpu_idle(self) ? get_states(self->vcpu, get_vcpu, names) : NULL;
}
static PyObject *py_vcpu_put_states(VcpuObject *self, PyObject *values)
{
    return vcpu_idle(self) ? put_states(self->vcpu, get_vcpu, set_vcpu, values) : NULL;
}

static PyObject *py_vcpu_get_msr(VcpuObject *self, PyObject *args)
{
    unsigned index;
    uint64_t value;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "I", &index))
        return NULL;
    int error = vcpu_get_msr(self->vcpu, index, &value);
    return error ? fail(error) : PyLong_FromUnsignedLongLong(value);
}

static PyObject *py_vcpu_set_msr(VcpuObject *self, PyObject *args)
{
    unsigned index;
    unsigned long long value;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "IK", &index, &value))
        return NULL;
    int error = vcpu_set_msr(self->vcpu, index, value);
    if (error)
        return fail(error);
    Py_RETURN_NONE;
}

static PyObject *py_vcpu_translate(VcpuObject *self, PyObject *args)
{
    unsigned long long linear;
    uint64_t physical;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "K", &linear))
        return NULL;
    if (vcpu_translate(self->vcpu, linear, &physical))
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(physical);
}

static PyObject *py_vcpu_interrupt(VcpuObject *self, PyObject *args)
{
    unsigned char vector;
    if (!vcpu_alive(self) || !PyArg_ParseTuple(args, "b", &vector))
        return NULL;
    int error = vcpu_interrupt(self->vcpu, vector);
    if (error)
        return fail(error);
    Py_RETURN_NONE;
}

static PyObject *py_vcpu_nmi(VcpuObject *self, PyObject *ignored)
{
    (void)ignored;
    if (!vcpu_alive(self))
        return NULL;
    vcpu_nmi(self->vcpu);
    Py_RETURN_NONE;
}

static PyObject *py_vcpu_set_debug(VcpuObject *self, PyObject *args)
{
    int step;
    PyObject *sequence;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "pO", &step, &sequence))
        return NULL;
    PyObject *fast = PySequence_Fast(sequence, "stops: a sequence of (kind, id, address, length, on_read, on_write)");
    if (!fast)
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
    struct vcpu_stop *stops = calloc((size_t)count + 1, sizeof *stops);
    PyObject *result = NULL;
    if (!stops) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        int kind, on_read, on_write;
        unsigned long long address;
        unsigned id, length;
        PyObject *item = PySequence_Fast_GET_ITEM(fast, i);
        if (!PyTuple_Check(item)) {
            PyErr_SetString(PyExc_TypeError, "a stop is a tuple (kind, id, address, length, on_read, on_write)");
            goto done;
        }
        if (!PyArg_ParseTuple(item, "iIKIpp", &kind, &id, &address, &length, &on_read, &on_write))
            goto done;
        if (kind < STOP_BREAKPOINT || kind >= STOP_KINDS) {
            fail(-EINVAL);
            goto done;
        }
        stops[i] = (struct vcpu_stop){(enum stop_kind)kind, id, address, length, on_read, on_write};
    }
    int error = vcpu_set_debug(self->vcpu, step, stops, (size_t)count);
    if (error)
        fail(error);
    else
        result = Py_NewRef(Py_None);
done:
    free(stops);
    Py_DECREF(fast);
    return result;
}

static PyObject *py_vcpu_also(VcpuObject *self, PyObject *ignored)
{
    const struct vcpu_exit *others;
    (void)ignored;
    if (!vcpu_idle(self))
        return NULL;
    size_t count = vcpu_also(self->vcpu, &others);
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list && i < count; i++) {
        PyObject *one = exit_tuple(&others[i]);
        if (!one)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, one);
    }
    return list;
}

/* In the thread of a run, without the GIL. */
static void deliver_trace(void *argument, const struct core_trace_record *records, size_t count, uint64_t events, bool ended)
{
    VcpuObject *self = argument;
    PyGILState_STATE state = PyGILState_Ensure();
    if (!self->signalled) {
        PyObject *result = PyObject_CallFunction(self->sink, "y#Ki", (const char *)records,
                                                 (Py_ssize_t)(count * sizeof *records), (unsigned long long)events,
                                                 (int)ended);
        if (result) {
            Py_DECREF(result);
        } else { /* the run fails with it */
            self->signalled = 1;
            vcpu_kick(self->vcpu);
        }
    }
    PyGILState_Release(state);
}

static PyObject *py_vcpu_set_trace(VcpuObject *self, PyObject *args)
{
    unsigned kinds, modes;
    unsigned long long first, last, data_first, data_last;
    PyObject *sink;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "IIKKKKO", &kinds, &modes, &first, &last, &data_first, &data_last, &sink))
        return NULL;
    struct core_trace want = {kinds, modes, first, last, data_first, data_last};
    int error = vcpu_set_trace(self->vcpu, &want, deliver_trace, self);
    if (error)
        return fail(error);
    Py_XSETREF(self->sink, Py_NewRef(sink));
    Py_RETURN_NONE;
}

static PyObject *py_vcpu_counters(VcpuObject *self, PyObject *ignored)
{
    struct vcpu_counters k;
    (void)ignored;
    if (!vcpu_alive(self))
        return NULL;
    vcpu_get_counters(self->vcpu, &k);
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsKsKsKsK}", "instructions", (unsigned long long)k.instructions, "blocks_decoded",
                         (unsigned long long)k.blocks_decoded, "blocks_killed", (unsigned long long)k.blocks_killed,
                         "tlb_misses", (unsigned long long)k.tlb_misses, "interrupts", (unsigned long long)k.interrupts,
                         "exceptions", (unsigned long long)k.exceptions, "unwritten_reads", (unsigned long long)k.unwritten_reads, "instructions_translated",
                         (unsigned long long)k.instructions_translated, "regions", (unsigned long long)k.regions,
                         "regions_killed", (unsigned long long)k.regions_killed, "code_bytes", (unsigned long long)k.code_bytes,
                         "translating_ns", (unsigned long long)k.translating_ns);
}

static PyObject *get_access_data(VcpuObject *self, void *closure)
{
    size_t size;
    (void)closure;
    if (!vcpu_idle(self))
        return NULL;
    const uint8_t *data = vcpu_exit_data(self->vcpu, &size);
    return PyBytes_FromStringAndSize((const char *)data, (Py_ssize_t)size);
}
static int set_access_data(VcpuObject *self, PyObject *value, void *closure)
{
    Py_buffer buffer;
    size_t size;
    (void)closure;
    if (!vcpu_idle(self))
        return -1;
    if (!value || PyObject_GetBuffer(value, &buffer, PyBUF_SIMPLE)) {
        if (!value)
            PyErr_SetString(PyExc_TypeError, "access_data cannot be deleted");
        return -1;
    }
    uint8_t *data = vcpu_exit_data(self->vcpu, &size);
    int wrong = (size_t)buffer.len != size;
    if (wrong)
        fail(-EINVAL);
    else
        memcpy(data, buffer.buf, size);
    PyBuffer_Release(&buffer);
    return wrong ? -1 : 0;
}
static PyObject *get_interrupts_queued(VcpuObject *self, void *closure)
{
    (void)closure;
    return vcpu_alive(self) ? PyLong_FromUnsignedLong(vcpu_interrupts_queued(self->vcpu)) : NULL;
}

static PyObject *get_instructions(VcpuObject *self, void *closure)
{
    (void)closure;
    if (!vcpu_alive(self))
        return NULL;
    struct vcpu_counters k;
    vcpu_get_counters(self->vcpu, &k);
    return PyLong_FromUnsignedLongLong(k.instructions);
}

static PyObject *get_queued_vectors(VcpuObject *self, void *closure)
{
    uint8_t vectors[INTERRUPT_QUEUE];
    (void)closure;
    if (!vcpu_alive(self))
        return NULL;
    unsigned count = vcpu_queued_vectors(self->vcpu, vectors);
    PyObject *tuple = PyTuple_New(count);
    for (unsigned i = 0; tuple && i < count; i++) {
        PyObject *vector = PyLong_FromLong(vectors[i]);
        if (!vector)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, vector);
    }
    return tuple;
}
static PyObject *get_unclaimed_msrs(VcpuObject *self, void *closure)
{
    const struct vcpu_unclaimed_msr *msrs;
    (void)closure;
    if (!vcpu_idle(self))
        return NULL;
    size_t count = vcpu_unclaimed_msrs(self->vcpu, &msrs);
    PyObject *tuple = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; tuple && i < count; i++) {
        PyObject *one = Py_BuildValue("IKKK", msrs[i].index, (unsigned long long)msrs[i].reads,
                                      (unsigned long long)msrs[i].writes, (unsigned long long)msrs[i].rip);
        if (!one)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, one);
    }
    return tuple;
}
static PyObject *get_faults(VcpuObject *self, void *closure)
{
    struct core_fault faults[CORE_FAULTS];
    (void)closure;
    if (!vcpu_idle(self))
        return NULL;
    size_t count = vcpu_faults(self->vcpu, faults);
    return PyBytes_FromStringAndSize((const char *)faults, (Py_ssize_t)(count * sizeof *faults));
}
static PyObject *py_vcpu_steps(VcpuObject *self, PyObject *room)
{
    size_t most = PyLong_AsSize_t(room);
    if (PyErr_Occurred() || !vcpu_idle(self))
        return NULL;
    struct core_step *steps = PyMem_Malloc(most * sizeof *steps + 1);
    if (!steps)
        return PyErr_NoMemory();
    size_t count = vcpu_steps(self->vcpu, steps, most);
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list && i < count; i++) {
        const struct core_step *s = &steps[count - 1 - i];
        PyObject *one = Py_BuildValue("KKBy#", (unsigned long long)s->linear, (unsigned long long)s->ip, s->bits,
                                      (const char *)s->code, (Py_ssize_t)s->length);
        if (!one)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, one);
    }
    PyMem_Free(steps);
    return list;
}
static PyObject *get_exits_waiting(VcpuObject *self, void *closure)
{
    (void)closure;
    return vcpu_idle(self) ? PyBool_FromLong(vcpu_exits_waiting(self->vcpu)) : NULL;
}
static PyObject *get_took_event(VcpuObject *self, void *closure)
{
    (void)closure;
    return vcpu_idle(self) ? PyBool_FromLong(vcpu_took_event(self->vcpu)) : NULL;
}
static PyObject *get_reading(VcpuObject *self, void *closure)
{
    (void)closure;
    return vcpu_idle(self) ? PyBool_FromLong(vcpu_reading(self->vcpu)) : NULL;
}

static PyObject *get_lane(VcpuObject *self, void *closure)
{
    (void)closure;
    if (!vcpu_alive(self))
        return NULL;
    if (!self->left && !(self->left = calloc(2, sizeof *self->left)))
        return PyErr_NoMemory();
    return PyCapsule_New(&self->lane, LANE_CPU, NULL);
}

static PyObject *py_vcpu_left(VcpuObject *self, PyObject *args)
{
    int counts;
    if (!PyArg_ParseTuple(args, "p", &counts))
        return NULL;
    if (!self->left)
        return fail(-EINVAL);
    struct left *left = &self->left[counts ? self->left_at : 1 - self->left_at];
    return Py_BuildValue("(Ny#)", exit_tuple(&left->exit), (const char *)left->data, (Py_ssize_t)left->size);
}

static PyObject *py_vcpu_close(VcpuObject *self, PyObject *ignored)
{
    (void)ignored;
    if (!self->vcpu || !self->owner->vm)
        Py_RETURN_NONE;
    if (!vcpu_idle(self))
        return NULL;
    vcpu_destroy(self->vcpu);
    self->vcpu = NULL;
    self->owner->vcpus[self->index] = NULL;
    Py_RETURN_NONE;
}

static PyMethodDef vcpu_methods[] = {
    {"close", (PyCFunction)py_vcpu_close, METH_NOARGS, "close(): free the CPU"},
    {"run", (PyCFunction)py_vcpu_run, METH_VARARGS, "run(budget=-1, goes_on=False) -> exit tuple; without the GIL"},
    {"left", (PyCFunction)py_vcpu_left, METH_VARARGS,
     "left(counts) -> (exit tuple, bytes of the access) of the last run by the capsule `lane`: of those that count, or of all"},
    {"steps", (PyCFunction)py_vcpu_steps, METH_O,
     "steps(most): (linear, ip, bits, bytes) of the last instructions that are certain, the last one at the end"},
    {"kick", (PyCFunction)py_vcpu_kick, METH_NOARGS, "kick(): end the run, from any thread"},
    {"clear_kick", (PyCFunction)py_vcpu_clear_kick, METH_NOARGS, "clear_kick()"},
    {"get_state", (PyCFunction)py_vcpu_get_state, METH_VARARGS, "get_state(name) -> bytes, a KVM UAPI struct"},
    {"set_state", (PyCFunction)py_vcpu_set_state, METH_VARARGS, "set_state(name, bytes)"},
    {"get_states", (PyCFunction)py_vcpu_get_states, METH_O, "get_states(names) -> dict of those that there are"},
    {"put_states", (PyCFunction)py_vcpu_put_states, METH_O, "put_states(dict): set those that are not so, in turn; memory may have changed"},
    {"get_msr", (PyCFunction)py_vcpu_get_msr, METH_VARARGS, "get_msr(index) -> int"},
    {"set_msr", (PyCFunction)py_vcpu_set_msr, METH_VARARGS, "set_msr(index, value)"},
    {"translate", (PyCFunction)py_vcpu_translate, METH_VARARGS, "translate(linear) -> guest-physical, or None"},
    {"interrupt", (PyCFunction)py_vcpu_interrupt, METH_VARARGS, "interrupt(vector): queue; EAGAIN when full"},
    {"nmi", (PyCFunction)py_vcpu_nmi, METH_NOARGS, "nmi()"},
    {"also", (PyCFunction)py_vcpu_also, METH_NOARGS,
     "also() -> exit tuples of the other stops that were reached with the debug exit of the last run"},
    {"set_debug", (PyCFunction)py_vcpu_set_debug, METH_VARARGS,
     "set_debug(step, stops): stops are (kind, id, address, length, on_read, on_write)"},
    {"set_trace", (PyCFunction)py_vcpu_set_trace, METH_VARARGS,
     "set_trace(kinds, modes, first, last, data_first, data_last, sink): kinds and modes are bits, ranges inclusive;\n"
     "sink(records, events, ended) is called in the run's thread; kinds 0: off"},
    {"get_register", (PyCFunction)py_vcpu_get_register, METH_O, "get_register(number) -> int: by its number in instructions; IP"},
    {"set_register", (PyCFunction)(void (*)(void))py_vcpu_set_register, METH_FASTCALL, "set_register(number, value)"},
    {"peek", (PyCFunction)py_vcpu_peek, METH_VARARGS, "peek(linear, size) -> bytes: fewer where nothing is mapped"},
    {"set_hooks", (PyCFunction)py_vcpu_set_hooks, METH_O,
     "set_hooks(list of (id, kind, call or None, stops, begin, end)): what run_hooked does at the stops of these ids"},
    {"hook_hits", (PyCFunction)py_vcpu_hook_hits, METH_NOARGS, "hook_hits() -> dict of id and how often it was reached"},
    {"leave_hooks", (PyCFunction)py_vcpu_leave_hooks, METH_NOARGS,
     "leave_hooks(): after the hook that calls this, run_hooked returns None: its hooks are to be set anew"},
    {"run_hooked", (PyCFunction)(void (*)(void))py_vcpu_run_hooked, METH_FASTCALL,
     "run_hooked(owner, budget, seconds, passes) -> exit tuple: calls hooks with the owner; memory is as it was but for what\n"
     "memory_written named. seconds below 0: any time. passes: a breakpoint at rip does not stop"},
    {"set_coverage", (PyCFunction)py_vcpu_set_coverage, METH_VARARGS,
     "set_coverage(map or None, modes, first, last): count edges in a buffer whose size is a power of 2; the next has no begin"},
    {"counters", (PyCFunction)py_vcpu_counters, METH_NOARGS, "counters() -> dict"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef vcpu_getset[] = {
    {"lane", (getter)get_lane, NULL, "a capsule by which C code runs it (vmfs/words/lane.h); the CPU is to live longer", NULL},
    {"access_data", (getter)get_access_data, (setter)set_access_data, "the bytes of the access that made the last exit", NULL},
    {"took_event", (getter)get_took_event, NULL, "whether an event was delivered since the last instruction that is done", NULL},
    {"reading", (getter)get_reading, NULL, "whether the last exit was a read, which the next run completes", NULL},
    {"instructions", (getter)get_instructions, NULL, "how many it has executed", NULL},
    {"queued_vectors", (getter)get_queued_vectors, NULL, "the vectors that wait, in order", NULL},
    {"unclaimed_msrs", (getter)get_unclaimed_msrs, NULL, "(index, reads, writes, rip) of MSRs that there are not", NULL},
    {"faults", (getter)get_faults, NULL, "the last faults, struct core_fault, the newest at the end", NULL},
    {"exits_waiting", (getter)get_exits_waiting, NULL, "whether exits of a done instruction are still to be returned", NULL},
    {"interrupts_queued", (getter)get_interrupts_queued, NULL, "vectors that wait", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot vcpu_slots[] = {
    {Py_tp_doc, "A CPU of the emulator core; made by Vm.create_vcpu."}, {Py_tp_dealloc, vcpu_dealloc},
    {Py_tp_methods, vcpu_methods}, {Py_tp_getset, vcpu_getset}, {0, NULL},
};
PyType_Spec vcpu_spec = {
    "vmfs.engine.emulator._core.Vcpu", sizeof(VcpuObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    vcpu_slots,
};
