/* For a program that looks at every step from the same process (vmfs/library): registers one at a time, and runs that call
 * functions at stops, without an exit of Python's for each. A hook is what is done at the stops of an id (vcpu_set_debug):
 * called, counted, or the end of the run. Coverage is counted from a trace, without Python. */
#include "module.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct hook {
    uint32_t id;
    enum hook_kind kind;
    bool stops;
    uint64_t begin, end; /* linear addresses */
    PyObject *call;      /* or NULL */
    uint64_t hits;
};

struct watching {
    struct hook *hooks;
    size_t count;
    bool inside;         /* run_hooked runs */
    bool leave;
    uint64_t deadline;   /* CLOCK_MONOTONIC in ns; UINT64_MAX: none */
    Py_buffer map;       /* of the coverage; obj NULL: none */
    uint64_t end;        /* of the last straight run; 0: none */
    uint64_t stopped;    /* the instructions before a hook has ended a run: it is not called again where the next one begins */
};

static struct watching *watching_of(VcpuObject *self)
{
    if (!self->watching && !(self->watching = calloc(1, sizeof *self->watching)))
        PyErr_NoMemory();
    return self->watching;
}

static void drop_hooks(struct watching *w)
{
    struct hook *hooks = w->hooks;
    size_t count = w->count;
    w->hooks = NULL;
    w->count = 0;
    for (size_t i = 0; i < count; i++)
        Py_XDECREF(hooks[i].call);
    free(hooks);
}

void watching_free(struct watching *w)
{
    if (!w)
        return;
    drop_hooks(w);
    if (w->map.obj)
        PyBuffer_Release(&w->map);
    free(w);
}

/* ---- Registers, memory ------------------------------------------------------------------------------------------------------- */

static int register_number(PyObject *number)
{
    long n = PyLong_AsLong(number);
    if (n == -1 && PyErr_Occurred())
        return -1;
    if ((n >= 0 && n < 16) || n == CORE_IP)
        return (int)n;
    fail(-EINVAL);
    return -1;
}

PyObject *py_vcpu_get_register(VcpuObject *self, PyObject *number)
{
    int n = vcpu_idle(self) ? register_number(number) : -1;
    return n < 0 ? NULL : PyLong_FromUnsignedLongLong(vcpu_get_register(self->vcpu, (unsigned)n));
}

PyObject *py_vcpu_set_register(VcpuObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "set_register(number, value)");
        return NULL;
    }
    int n = vcpu_idle(self) ? register_number(args[0]) : -1;
    uint64_t value = n < 0 ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    vcpu_set_register(self->vcpu, (unsigned)n, value);
    Py_RETURN_NONE;
}

PyObject *py_vcpu_peek(VcpuObject *self, PyObject *args)
{
    unsigned long long linear;
    Py_ssize_t size;
    if (!vcpu_idle(self) || !PyArg_ParseTuple(args, "Kn", &linear, &size))
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, size);
    if (bytes)
        _PyBytes_Resize(&bytes, (Py_ssize_t)vcpu_peek(self->vcpu, linear, PyBytes_AS_STRING(bytes), (size_t)size));
    return bytes;
}

/* ---- Hooks ---------------------------------------------------------------------------------------------------------------------- */

PyObject *py_vcpu_set_hooks(VcpuObject *self, PyObject *list)
{
    struct watching *w = vcpu_idle(self) ? watching_of(self) : NULL;
    if (!w)
        return NULL;
    if (w->inside)
        return fail(-EBUSY);
    if (!PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "hooks: a list of (id, kind, call or None, stops, begin, end)");
        return NULL;
    }
    size_t count = (size_t)PyList_GET_SIZE(list);
    struct hook *hooks = calloc(count + 1, sizeof *hooks);
    if (!hooks)
        return PyErr_NoMemory();
    for (size_t i = 0; i < count; i++) {
        int kind, stops;
        unsigned long long begin, end;
        if (!PyTuple_Check(PyList_GET_ITEM(list, i)) ||
            !PyArg_ParseTuple(PyList_GET_ITEM(list, i), "IiOpKK", &hooks[i].id, &kind, &hooks[i].call, &stops, &begin, &end)) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, "a hook is (id, kind, call or None, stops, begin, end)");
            free(hooks);
            return NULL;
        }
        hooks[i].kind = (enum hook_kind)kind;
        hooks[i].stops = stops;
        hooks[i].begin = begin, hooks[i].end = end;
        if (hooks[i].call == Py_None)
            hooks[i].call = NULL;
        for (size_t j = 0; j < w->count; j++) /* one that stays goes on counting */
            if (w->hooks[j].id == hooks[i].id)
                hooks[i].hits = w->hooks[j].hits;
    }
    for (size_t i = 0; i < count; i++)
        Py_XINCREF(hooks[i].call);
    drop_hooks(w);
    w->hooks = hooks;
    w->count = count;
    Py_RETURN_NONE;
}

PyObject *py_vcpu_hook_hits(VcpuObject *self, PyObject *ignored)
{
    (void)ignored;
    PyObject *found = PyDict_New();
    for (size_t i = 0; found && self->watching && i < self->watching->count; i++) {
        const struct hook *hook = &self->watching->hooks[i];
        PyObject *id = PyLong_FromUnsignedLong(hook->id), *hits = PyLong_FromUnsignedLongLong(hook->hits);
        if (!id || !hits || PyDict_SetItem(found, id, hits))
            Py_CLEAR(found);
        Py_XDECREF(id);
        Py_XDECREF(hits);
    }
    return found;
}

PyObject *py_vcpu_leave_hooks(VcpuObject *self, PyObject *ignored)
{
    (void)ignored;
    if (self->watching)
        self->watching->leave = true;
    Py_RETURN_NONE;
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static bool poll_deadline(void *argument)
{
    VcpuObject *self = argument;
    if (now() >= self->watching->deadline)
        return true;
    return is_main_thread() && poll_signals(self);
}

/* A hook is called. 1: it ends the run, -1: an exception. */
static int call(VcpuObject *self, struct hook *hook, PyObject *owner, const struct vcpu_exit *e)
{
    PyObject *result;
    if (hook->kind == HOOK_MEMORY) {
        uint8_t bytes[64];
        size_t size = e->size < sizeof bytes ? e->size : sizeof bytes;
        size = vcpu_peek(self->vcpu, e->access, bytes, size);
        PyObject *value = _PyLong_FromByteArray(bytes, size, 1, 0);
        result = value ? PyObject_CallFunction(hook->call, "OOKIN", owner, e->write ? Py_True : Py_False,
                                               (unsigned long long)e->access, e->size, value) : NULL;
    } else {
        PyObject *at = PyLong_FromUnsignedLongLong(vcpu_code_address(self->vcpu));
        PyObject *args[] = {owner, at};
        result = at ? PyObject_Vectorcall(hook->call, args, 2, NULL) : NULL;
        Py_XDECREF(at);
    }
    if (!result)
        return -1;
    int stops = result == Py_None ? 0 : PyObject_IsTrue(result);
    Py_DECREF(result);
    return stops;
}

/* The run has come to a stop. 1: it ends there, -1: an exception. */
static int at_stop(VcpuObject *self, PyObject *owner, const struct vcpu_exit *e, bool is_new_block)
{
    struct watching *w = self->watching;
    for (size_t i = 0; i < w->count; i++) {
        struct hook *hook = &w->hooks[i];
        if (hook->id != e->id)
            continue;
        if (hook->kind == HOOK_BLOCK && !is_new_block)
            return 0;
        hook->hits++;
        if (hook->call) {
            int how = call(self, hook, owner, e);
            if (how)
                return how;
        }
        return hook->stops;
    }
    return 1; /* no hook's: a point of the caller's */
}

/* A breakpoint that is no hook's: the end of the run. */
static bool is_of_callers(const struct watching *w, const struct vcpu_exit *e)
{
    for (size_t i = 0; i < w->count; i++)
        if (w->hooks[i].id == e->id)
            return false;
    return e->cause == DEBUG_BREAKPOINT;
}

static uint64_t instructions(VcpuObject *self)
{
    struct vcpu_counters counters;
    vcpu_get_counters(self->vcpu, &counters);
    return counters.instructions;
}

/* Where a run begins, the hooks of its first instruction. As `call`. */
static int at_begin(VcpuObject *self, PyObject *owner, struct vcpu_exit *exit)
{
    struct watching *w = self->watching;
    uint64_t here = vcpu_code_address(self->vcpu);
    for (size_t i = 0; i < w->count; i++) {
        const struct hook *hook = &w->hooks[i];
        if (hook->kind == HOOK_MEMORY || here < hook->begin || here >= hook->end)
            continue;
        *exit = (struct vcpu_exit){.reason = EXIT_DEBUG, .cause = DEBUG_BREAKPOINT, .id = hook->id,
                                   .rip = vcpu_get_register(self->vcpu, CORE_IP)};
        int how = at_stop(self, owner, exit, true);
        if (how)
            return how;
    }
    return 0;
}

PyObject *py_vcpu_run_hooked(VcpuObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct watching *w = vcpu_idle(self) ? watching_of(self) : NULL;
    if (!w)
        return NULL;
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "run_hooked(owner, budget, seconds, passes)");
        return NULL;
    }
    long long budget = PyLong_AsLongLong(args[1]);
    double seconds = PyFloat_AsDouble(args[2]);
    bool passes = PyObject_IsTrue(args[3]) > 0;
    if (PyErr_Occurred())
        return NULL;
    if (w->inside)
        return fail(-EBUSY);
    struct vcpu_exit exit = {.reason = EXIT_NONE};
    PyObject *result = NULL;
    uint64_t began = instructions(self), at = began, place = 0, place_at = 0; /* the last one where a hook may be, and when */
    w->deadline = seconds < 0 || seconds > 1e9 ? UINT64_MAX : now() + (uint64_t)(seconds * 1e9);
    w->end = 0;
    w->inside = true;
    w->leave = false;
    Py_INCREF(self->owner);
    self->owner->running++;
    vcpu_set_poll(self->vcpu, w->deadline != UINT64_MAX || is_main_thread() ? poll_deadline : NULL, self);
    if (w->count && passes && budget && w->stopped != began + 1) {
        place = vcpu_code_address(self->vcpu), place_at = began;
        int how = at_begin(self, args[0], &exit);
        if (how || w->leave) {
            result = how < 0 ? NULL : how ? exit_tuple(&exit) : Py_NewRef(Py_None);
            goto done;
        }
    }
    for (unsigned turns = 1;; turns++) {
        self->running = 1;
        self->signalled = 0;
        int64_t left = budget < 0 ? BUDGET_UNLIMITED : budget - (int64_t)(at - began);
        Py_BEGIN_ALLOW_THREADS
        (passes ? vcpu_run_on : vcpu_go_on)(self->vcpu, left, &exit);
        Py_END_ALLOW_THREADS
        self->running = 0;
        passes = false;
        if (self->signalled)
            break;
        if (exit.reason == EXIT_INTERRUPTED && now() >= w->deadline)
            exit.reason = EXIT_LIMIT;
        if (exit.reason != EXIT_DEBUG || exit.cause == DEBUG_EXCEPTION || exit.cause == DEBUG_INTERRUPT) {
            result = exit_tuple(&exit);
            break;
        }
        at = instructions(self);
        bool is_new = false;
        if (exit.cause == DEBUG_BREAKPOINT) {
            uint64_t here = vcpu_code_address(self->vcpu);
            is_new = at - place_at != 1 || here != place + vcpu_alone_length(self->vcpu);
            place = here;
            place_at = at;
        }
        const struct vcpu_exit *others;
        size_t more = vcpu_also(self->vcpu, &others);
        struct vcpu_exit also[16];
        more = more < 16 ? more : 16;
        memcpy(also, others, more * sizeof *also); /* which a function that is called may change */
        if (!is_of_callers(w, &exit))
            for (size_t i = 0; i < more; i++)
                if (is_of_callers(w, &also[i])) {
                    struct vcpu_exit first = exit;
                    exit = also[i];
                    also[i] = first;
                    break;
                }
        bool ends = is_of_callers(w, &exit); /* before this instruction, which is not executed: its hooks are not called */
        int how = 0;
        for (size_t i = 0; !how && i < more; i++)
            if (!ends || also[i].cause != DEBUG_BREAKPOINT)
                how = at_stop(self, args[0], &also[i], is_new);
        if (!how)
            how = at_stop(self, args[0], &exit, is_new);
        if (how < 0)
            break;
        if (how) {
            result = exit_tuple(&exit);
            break;
        }
        if (w->leave) {
            result = Py_NewRef(Py_None);
            break;
        }
        if (turns % 1024 == 0 && ((is_main_thread() && PyErr_CheckSignals()) || now() >= w->deadline)) {
            if (!PyErr_Occurred()) {
                exit = (struct vcpu_exit){.reason = EXIT_LIMIT, .rip = vcpu_get_register(self->vcpu, CORE_IP)};
                result = exit_tuple(&exit);
            }
            break;
        }
    }
done:
    w->stopped = 0;
    for (size_t i = 0; i < w->count && result && exit.reason == EXIT_DEBUG && exit.cause == DEBUG_BREAKPOINT; i++)
        if (w->hooks[i].id == exit.id)
            w->stopped = instructions(self) + 1;
    w->inside = false;
    self->owner->running--;
    Py_DECREF(self->owner);
    return result;
}

/* ---- Coverage ------------------------------------------------------------------------------------------------------------------- */

static uint64_t mixed(uint64_t x)
{
    x ^= x >> 31;
    x *= 0x7fb5d329728ea185;
    return x ^ x >> 27;
}

/* In the thread of a run, without the GIL. An edge is where a straight run of instructions ended and where the next began, so
 * each jump that is taken is one; the byte of an edge counts, as AFL's map has it. */
static void count_edges(void *argument, const struct core_trace_record *records, size_t count, uint64_t events, bool ended)
{
    (void)events, (void)ended;
    struct watching *w = ((VcpuObject *)argument)->watching;
    uint8_t *map = w->map.buf;
    uint64_t mask = (uint64_t)w->map.len - 1, end = w->end;
    for (const struct core_trace_record *r = records; r < records + count; r++) {
        if (r->kind != CORE_TRACE_INSN)
            continue;
        if (r->insn.address != end)
            map[(mixed(end) >> 1 ^ mixed(r->insn.address)) & mask]++;
        end = r->insn.address;
        for (uint64_t lengths = r->insn.lengths; lengths; lengths >>= 4)
            end += lengths & 15;
    }
    w->end = end;
}

PyObject *py_vcpu_set_coverage(VcpuObject *self, PyObject *args)
{
    PyObject *buffer;
    unsigned modes;
    unsigned long long first, last;
    struct watching *w = vcpu_idle(self) ? watching_of(self) : NULL;
    if (!w || !PyArg_ParseTuple(args, "OIKK", &buffer, &modes, &first, &last))
        return NULL;
    if (w->inside)
        return fail(-EBUSY);
    Py_buffer map = {0};
    if (buffer != Py_None && PyObject_GetBuffer(buffer, &map, PyBUF_WRITABLE))
        return NULL;
    if (map.obj && (map.len < 256 || map.len & (map.len - 1))) {
        PyBuffer_Release(&map);
        return fail(-EINVAL);
    }
    struct core_trace want = {map.obj ? 1 << CORE_TRACE_INSN : 0, modes, first, last, 0, UINT64_MAX};
    int error = vcpu_set_trace(self->vcpu, &want, count_edges, self);
    if (error) {
        if (map.obj)
            PyBuffer_Release(&map);
        return fail(error);
    }
    if (w->map.obj)
        PyBuffer_Release(&w->map);
    w->map = map;
    w->end = 0;
    Py_RETURN_NONE;
}
