/* vmfs.engine.emulator._core: the core for Python. This and module_hooks.c are the only files that include Python.h.
 *
 * Vm() and Vm.create_vcpu(index) -> Vcpu. Errors of the core are OSError with its errno. Exits are tuples:
 * (reason, rip, write, size, count, address, cause, id, vector, message), reason and cause as the constants. */
#include "module.h"
#include "translate.h"

#include <structmember.h>

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bus.h"
#include "../../../include/vmfs.h"

enum { PAGE = 4096 };

static PyObject *fail(long error)
{
    errno = (int)-error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* ---- Vm -------------------------------------------------------------------------------------------------------------------- */

static PyObject *vm_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Vm", names))
        return NULL;
    VmObject *self = (VmObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->vm = vm_create();
    if (!self->vm) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

/* Guest memory between two pages that nobody may touch: an access beside it ends the process at once. */
static void *map_guarded(size_t size, int protection, int fd, off_t offset)
{
    uint8_t *guard = mmap(NULL, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (guard == MAP_FAILED)
        return NULL;
    /* A file that is sealed has no shared mapping before Linux 6.7. */
    int kind = protection & PROT_WRITE ? MAP_SHARED : MAP_PRIVATE;
    if (mmap(guard + PAGE, size, protection, kind | MAP_NORESERVE | MAP_FIXED, fd, offset) == MAP_FAILED) {
        int error = errno;
        munmap(guard, size + 2 * PAGE);
        errno = error;
        return NULL;
    }
    return guard + PAGE;
}
static void unmap_guarded(void *host, size_t size)
{
    if (host)
        munmap((uint8_t *)host - PAGE, size + 2 * PAGE);
}

static void vm_release(VmObject *self)
{
    if (!self->vm)
        return;
    vm_set_bus(self->vm, NULL);
    vm_destroy(self->vm);
    self->vm = NULL;
    Py_CLEAR(self->bus);
    for (unsigned i = 0; i < CORE_SLOTS; i++)
        unmap_guarded(self->maps[i].host, self->maps[i].size);
}

static void vm_dealloc(VmObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    vm_release(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static int vm_alive(VmObject *self)
{
    if (self->vm)
        return 1;
    fail(-ENODEV);
    return 0;
}
/* What changes a machine is refused while one of its CPUs runs, which would find it gone. */
static int vm_idle(VmObject *self)
{
    if (!vm_alive(self))
        return 0;
    if (!self->running)
        return 1;
    fail(-EBUSY);
    return 0;
}

/* Before what a board changes in the middle of a run: where CPUs run at the same time, all of them stand, until `let_go`. */
enum { REFUSED, IDLE, STANDING };
static int hold_still(VmObject *self)
{
    if (!self->parallel || self->all_run)
        return vm_idle(self) ? IDLE : REFUSED;
    if (!vm_alive(self))
        return REFUSED;
    Py_BEGIN_ALLOW_THREADS /* a CPU may wait for it, in a poll or with what it has traced */
    vm_stop(self->vm);
    Py_END_ALLOW_THREADS
    return STANDING;
}
static void let_go(VmObject *self, int how)
{
    if (how == STANDING)
        vm_go(self->vm);
}

static PyObject *map_slot(VmObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "address", "fd", "offset", "size", "read_only", "host", NULL};
    unsigned slot;
    unsigned long long address, size, given = 0; /* memory of the caller's, in the place of a file */
    long long offset;
    int fd, read_only = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IKiLK|pK", names, &slot, &address, &fd, &offset, &size, &read_only, &given))
        return NULL;
    if (slot >= CORE_SLOTS || (address | size | (unsigned long long)offset) & 4095)
        return fail(-EINVAL);
    void *host = NULL;
    if (size && !given) {
        host = map_guarded(size, PROT_READ | (read_only ? 0 : PROT_WRITE), fd, offset);
        if (!host)
            return PyErr_SetFromErrno(PyExc_OSError);
    }
    struct core_backing backing = {UINT64_MAX, 0, given};
    struct stat file = {0};
    if (host && fstat(fd, &file)) {
        PyErr_SetFromErrno(PyExc_OSError);
        unmap_guarded(host, size);
        return NULL;
    }
    if (host)
        backing = (struct core_backing){file.st_dev, file.st_ino, (uint64_t)offset};
    int error = vm_map(self->vm, slot, address, given ? (void *)(uintptr_t)given : host, size, read_only ? SLOT_READ_ONLY : 0);
    if (error) {
        unmap_guarded(host, size);
        return fail(error);
    }
    if (size)
        vm_set_backing(self->vm, slot, &backing);
    unmap_guarded(self->maps[slot].host, self->maps[slot].size);
    self->maps[slot].host = host;
    self->maps[slot].size = size;
    Py_RETURN_NONE;
}

static PyObject *py_vm_map(VmObject *self, PyObject *args, PyObject *kwargs)
{
    int how = hold_still(self);
    PyObject *result = how ? map_slot(self, args, kwargs) : NULL;
    let_go(self, how);
    return result;
}

static PyObject *py_vm_dirty_log(VmObject *self, PyObject *args)
{
    unsigned slot;
    if (!vm_alive(self) || !PyArg_ParseTuple(args, "I", &slot))
        return NULL;
    size_t size = vm_dirty_log_size(self->vm, slot);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (!bytes)
        return NULL;
    int error = vm_dirty_log(self->vm, slot, (uint8_t *)PyBytes_AS_STRING(bytes), size);
    if (error) {
        Py_DECREF(bytes);
        return fail(error);
    }
    return bytes;
}

static PyObject *py_vm_create_irqchip(VmObject *self, PyObject *ignored)
{
    (void)ignored;
    if (!vm_idle(self))
        return NULL;
    int error = vm_create_irqchip(self->vm);
    if (error)
        return fail(error);
    Py_RETURN_NONE;
}

static PyObject *py_vm_own(VmObject *self, PyObject *ignored)
{
    (void)ignored;
    if (!vm_idle(self))
        return NULL;
    int error = translators_own(self->vm);
    if (error)
        return fail(error);
    Py_RETURN_NONE;
}

static PyObject *py_vm_irq_line(VmObject *self, PyObject *args)
{
    unsigned gsi;
    int level;
    if (!vm_alive(self) || !PyArg_ParseTuple(args, "Ip", &gsi, &level))
        return NULL;
    vm_irq_line(self->vm, gsi, level);
    Py_RETURN_NONE;
}

static PyObject *py_vm_signal_msi(VmObject *self, PyObject *args)
{
    unsigned long long address;
    unsigned data;
    if (!vm_alive(self) || !PyArg_ParseTuple(args, "KI", &address, &data))
        return NULL;
    vm_signal_msi(self->vm, address, data);
    Py_RETURN_NONE;
}

static PyObject *py_vm_set_a20(VmObject *self, PyObject *args)
{
    int enabled, how;
    if (!PyArg_ParseTuple(args, "p", &enabled) || !(how = hold_still(self)))
        return NULL;
    vm_set_a20(self->vm, enabled);
    let_go(self, how);
    Py_RETURN_NONE;
}

static PyObject *py_vm_set_fresh(VmObject *self, PyObject *args)
{
    Py_buffer pattern;
    unsigned long long end;
    int how;
    if (!PyArg_ParseTuple(args, "z*K", &pattern, &end))
        return NULL;
    if (pattern.buf && pattern.len != 4096) {
        PyBuffer_Release(&pattern);
        PyErr_SetString(PyExc_ValueError, "a pattern of 4096 bytes");
        return NULL;
    }
    if (!(how = hold_still(self))) {
        PyBuffer_Release(&pattern);
        return NULL;
    }
    int error = vm_set_fresh(self->vm, pattern.buf, end);
    let_go(self, how);
    PyBuffer_Release(&pattern);
    if (error)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_vm_set_timer_output(VmObject *self, PyObject *args)
{
    int connected, how;
    if (!PyArg_ParseTuple(args, "p", &connected) || !(how = hold_still(self)))
        return NULL;
    vm_set_timer_output(self->vm, connected);
    let_go(self, how);
    Py_RETURN_NONE;
}

static PyObject *py_vm_memory_written(VmObject *self, PyObject *args)
{
    unsigned long long address, size;
    if (!vm_alive(self) || !PyArg_ParseTuple(args, "KK", &address, &size))
        return NULL;
    if (size && address + size > address)
        vm_memory_written(self->vm, address, size);
    Py_RETURN_NONE;
}

static PyObject *py_vm_set_bus(VmObject *self, PyObject *capsule)
{
    if (!vm_idle(self))
        return NULL;
    struct fast_bus *bus = capsule == Py_None ? NULL : PyCapsule_GetPointer(capsule, FAST_BUS);
    if (!bus && capsule != Py_None)
        return NULL;
    vm_set_bus(self->vm, bus);
    Py_XSETREF(self->bus, bus ? Py_NewRef(capsule) : NULL);
    Py_RETURN_NONE;
}

static PyObject *py_vm_set_deadline(VmObject *self, PyObject *args)
{
    unsigned long long when;
    if (!vm_alive(self) || !PyArg_ParseTuple(args, "K", &when))
        return NULL;
    vm_set_deadline(self->vm, when);
    Py_RETURN_NONE;
}

static PyObject *py_vm_end_soon(VmObject *self, PyObject *none)
{
    (void)none;
    if (!vm_alive(self))
        return NULL;
    vm_end_soon(self->vm);
    Py_RETURN_NONE;
}

static PyObject *py_vm_ended_soon(VmObject *self, PyObject *none)
{
    (void)none;
    if (!vm_alive(self))
        return NULL;
    return PyBool_FromLong(vm_ended_soon(self->vm));
}

static PyObject *py_vm_set_host_time(VmObject *self, PyObject *args)
{
    int host;
    if (!vm_idle(self) || !PyArg_ParseTuple(args, "p", &host))
        return NULL;
    vm_set_time(self->vm, host ? TIME_HOST : TIME_DETERMINISTIC);
    Py_RETURN_NONE;
}

static PyObject *py_vm_set_paced(VmObject *self, PyObject *args)
{
    int paced;
    if (!vm_idle(self) || !PyArg_ParseTuple(args, "p", &paced))
        return NULL;
    vm_set_paced(self->vm, paced);
    Py_RETURN_NONE;
}

static PyObject *py_vm_set_repeatable(VmObject *self, PyObject *args)
{
    int repeatable;
    if (!vm_idle(self) || !PyArg_ParseTuple(args, "p", &repeatable))
        return NULL;
    vm_set_repeatable(self->vm, repeatable);
    Py_RETURN_NONE;
}

static PyObject *py_vm_pass_time(VmObject *self, PyObject *args)
{
    unsigned long long nanoseconds;
    if (!vm_idle(self) || !PyArg_ParseTuple(args, "K", &nanoseconds))
        return NULL;
    vm_pass_time(self->vm, nanoseconds);
    Py_RETURN_NONE;
}

static PyObject *py_vm_stand(VmObject *self, PyObject *args)
{
    int stands;
    if (!vm_alive(self) || !PyArg_ParseTuple(args, "p", &stands))
        return NULL;
    vm_stand(self->vm, stands);
    Py_RETURN_NONE;
}

static PyObject *py_vm_rest(VmObject *self, PyObject *ignored)
{
    (void)ignored;
    if (!vm_idle(self))
        return NULL;
    vm_rest(self->vm);
    Py_RETURN_NONE;
}

static PyObject *py_vm_set_parallel(VmObject *self, PyObject *args)
{
    int parallel;
    if (!vm_idle(self) || !PyArg_ParseTuple(args, "p", &parallel))
        return NULL;
    self->parallel = vm_set_parallel(self->vm, parallel);
    return PyBool_FromLong(self->parallel);
}

static PyObject *py_vm_get_state(VmObject *self, PyObject *args)
{
    const char *name;
    if (!vm_alive(self) || !PyArg_ParseTuple(args, "s", &name))
        return NULL;
    bool any_time = self->parallel && !self->all_run && !strcmp(name, "clock"); /* the host's */
    if (!any_time && !vm_idle(self))
        return NULL;
    long size = vm_get_state(self->vm, name, NULL, 0);
    if (size < 0)
        return fail(size);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, size);
    if (bytes)
        vm_get_state(self->vm, name, PyBytes_AS_STRING(bytes), (size_t)size);
    return bytes;
}

static PyObject *py_vm_set_state(VmObject *self, PyObject *args)
{
    const char *name;
    Py_buffer data;
    if (!vm_idle(self) || !PyArg_ParseTuple(args, "sy*", &name, &data))
        return NULL;
    int error = vm_set_state(self->vm, name, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    if (error)
        return fail(error);
    Py_RETURN_NONE;
}

/* ---- several states at once ---- */

typedef long get_state(void *owner, const char *name, void *data, size_t size);
typedef int set_state(void *owner, const char *name, const void *data, size_t size);
static long get_vm(void *owner, const char *name, void *data, size_t size) { return vm_get_state(owner, name, data, size); }
static int set_vm(void *owner, const char *name, const void *data, size_t size) { return vm_set_state(owner, name, data, size); }
static long get_vcpu(void *owner, const char *name, void *data, size_t size) { return vcpu_get_state(owner, name, data, size); }
static int set_vcpu(void *owner, const char *name, const void *data, size_t size) { return vcpu_set_state(owner, name, data, size); }

/* A dict of those of a tuple of names that there are. */
static PyObject *get_states(void *owner, get_state *get, PyObject *names)
{
    if (!PyTuple_Check(names)) {
        PyErr_SetString(PyExc_TypeError, "a tuple of names");
        return NULL;
    }
    uint8_t room[4096];
    PyObject *found = PyDict_New();
    for (Py_ssize_t i = 0; found && i < PyTuple_GET_SIZE(names); i++) {
        PyObject *key = PyTuple_GET_ITEM(names, i);
        const char *name = PyUnicode_AsUTF8(key);
        if (!name) {
            Py_CLEAR(found);
            break;
        }
        long size = get(owner, name, room, sizeof room);
        if (size < 0)
            continue;
        PyObject *bytes = PyBytes_FromStringAndSize((size_t)size <= sizeof room ? (const char *)room : NULL, size);
        if (bytes && (size_t)size > sizeof room)
            get(owner, name, PyBytes_AS_STRING(bytes), (size_t)size);
        if (!bytes || PyDict_SetItem(found, key, bytes))
            Py_CLEAR(found);
        Py_XDECREF(bytes);
    }
    return found;
}

/* Set those of a dict, in turn, that are not so already. An OSError has the name as its filename. */
static PyObject *put_states(void *owner, get_state *get, set_state *set, PyObject *values)
{
    if (!PyDict_Check(values)) {
        PyErr_SetString(PyExc_TypeError, "a dict of names and bytes");
        return NULL;
    }
    PyObject *key, *value;
    uint8_t room[8192];
    for (Py_ssize_t at = 0; PyDict_Next(values, &at, &key, &value);) {
        const char *name = PyUnicode_AsUTF8(key);
        char *data;
        Py_ssize_t size;
        if (!name || PyBytes_AsStringAndSize(value, &data, &size))
            return NULL;
        /* They do more than they say: a timer begins anew, the last exit ends, the TLB is empty. */
        bool always = !strcmp(name, "lapic") || !strcmp(name, "msrs") || !strcmp(name, "progress");
        if (!always && get(owner, name, room, sizeof room) == size && (size_t)size <= sizeof room &&
            !memcmp(room, data, (size_t)size))
            continue;
        int error = set(owner, name, data, (size_t)size);
        if (error) {
            errno = -error;
            return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, key);
        }
    }
    Py_RETURN_NONE;
}

static PyObject *py_vm_get_states(VmObject *self, PyObject *names)
{
    return vm_idle(self) ? get_states(self->vm, get_vm, names) : NULL;
}
static PyObject *py_vm_put_states(VmObject *self, PyObject *values)
{
    return vm_idle(self) ? put_states(self->vm, get_vm, set_vm, values) : NULL;
}

static struct lane_cpu lane_of(VcpuObject *cpu);

static PyObject *py_vm_create_vcpu(VmObject *self, PyTypeObject *defining, PyObject *const *args, Py_ssize_t count,
                                   PyObject *names)
{
    if (!vm_idle(self))
        return NULL;
    if (count != 1 || (names && PyTuple_GET_SIZE(names))) {
        PyErr_SetString(PyExc_TypeError, "create_vcpu(index)");
        return NULL;
    }
    unsigned long index = PyLong_AsUnsignedLong(args[0]);
    if (PyErr_Occurred())
        return NULL;
    if (index >= CORE_VCPUS)
        return fail(-EINVAL);
    ModuleState *state = PyType_GetModuleState(defining);
    VcpuObject *vcpu = PyObject_New(VcpuObject, state->vcpu_type);
    if (!vcpu)
        return NULL;
    vcpu->owner = NULL;
    vcpu->running = vcpu->signalled = 0;
    vcpu->sink = NULL;
    vcpu->left = NULL;
    vcpu->left_at = 0;
    vcpu->watching = NULL;
    vcpu->index = (unsigned)index;
    vcpu->lane = lane_of(vcpu);
    vcpu->vcpu = vcpu_create(self->vm, (unsigned)index);
    if (!vcpu->vcpu) {
        Py_DECREF(vcpu);
        return fail(-EEXIST);
    }
    Py_INCREF(self);
    vcpu->owner = self;
    self->vcpus[index] = vcpu;
    return (PyObject *)vcpu;
}

static PyObject *py_vm_close(VmObject *self, PyObject *ignored)
{
    (void)ignored;
    if (self->vm && !vm_idle(self))
        return NULL;
    vm_release(self); /* the CPUs notice: vcpu_alive asks the owner */
    Py_RETURN_NONE;
}

static PyObject *py_vm_run(VmObject *self, PyObject *args)
{
    long long budget = BUDGET_UNLIMITED;
    struct vcpu_exit exit;
    int goes_on = 0, signalled = 0, any = 0;
    unsigned which = 0;
    if (!vm_idle(self) || !PyArg_ParseTuple(args, "|Lp", &budget, &goes_on))
        return NULL;
    for (unsigned i = 0; i < CORE_VCPUS; i++) {
        VcpuObject *cpu = self->vcpus[i];
        if (!cpu)
            continue;
        any = 1;
        cpu->signalled = 0;
        vcpu_set_poll(cpu->vcpu, is_main_thread() ? poll_signals : NULL, cpu);
    }
    if (!any)
        return fail(-EINVAL);
    Py_INCREF(self);
    self->running++;
    self->all_run = true;
    Py_BEGIN_ALLOW_THREADS
    vm_run(self->vm, budget, goes_on, &exit, &which);
    Py_END_ALLOW_THREADS
    self->running--;
    self->all_run = false;
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        signalled |= self->vcpus[i] && self->vcpus[i]->signalled;
    Py_DECREF(self);
    return signalled ? NULL : Py_BuildValue("(IN)", which, exit_tuple(&exit));
}

static PyMethodDef vm_methods[] = {
    {"run", (PyCFunction)py_vm_run, METH_VARARGS,
     "run(budget=-1, goes_on=False) -> (index of the CPU, exit tuple): all CPUs in turn, without the GIL"},
    {"map", (PyCFunction)(void (*)(void))py_vm_map, METH_VARARGS | METH_KEYWORDS,
     "map(slot, address, fd, offset, size, read_only=False): back guest-physical memory, shared; size 0 removes the slot"},
    {"dirty_log", (PyCFunction)py_vm_dirty_log, METH_VARARGS,
     "dirty_log(slot) -> bytes: a bit a page written since the last call"},
    {"own", (PyCFunction)py_vm_own, METH_NOARGS,
     "own(): in a process that was forked: OSError (EBUSY) for a VM that has run, whose host code both processes would share"},
    {"create_irqchip", (PyCFunction)py_vm_create_irqchip, METH_NOARGS, "create_irqchip(): before the first CPU"},
    {"irq_line", (PyCFunction)py_vm_irq_line, METH_VARARGS, "irq_line(gsi, level)"},
    {"signal_msi", (PyCFunction)py_vm_signal_msi, METH_VARARGS, "signal_msi(address, data)"},
    {"set_fresh", (PyCFunction)py_vm_set_fresh, METH_VARARGS, "set_fresh(pattern or None, end): tell of reads of RAM that nobody has written"},
    {"set_a20", (PyCFunction)py_vm_set_a20, METH_VARARGS, "set_a20(enabled)"},
    {"set_timer_output", (PyCFunction)py_vm_set_timer_output, METH_VARARGS,
     "set_timer_output(connected): whether channel 0 of the 8254 interrupts"},
    {"memory_written", (PyCFunction)py_vm_memory_written, METH_VARARGS,
     "memory_written(address, size): by somebody else than the guest, in the middle of a run"},
    {"set_bus", (PyCFunction)py_vm_set_bus, METH_O,
     "set_bus(capsule or None): devices that are asked before an access is an exit (vmfs/words/bus.h)"},
    {"set_deadline", (PyCFunction)py_vm_set_deadline, METH_VARARGS,
     "set_deadline(clock): a run ends when the state clock has come to it; NEVER"},
    {"end_soon", (PyCFunction)py_vm_end_soon, METH_NOARGS,
     "end_soon(): a run ends at the next nanosecond"},
    {"ended_soon", (PyCFunction)py_vm_ended_soon, METH_NOARGS,
     "ended_soon(): whether that has ended the last run; once"},
    {"rest", (PyCFunction)py_vm_rest, METH_NOARGS, "rest(): give back decoded and translated code"},
    {"set_host_time", (PyCFunction)py_vm_set_host_time, METH_VARARGS,
     "set_host_time(yes): time follows the host's clock, not the instructions retired"},
    {"set_paced", (PyCFunction)py_vm_set_paced, METH_VARARGS,
     "set_paced(yes): with time by instructions, CPUs sleep for as long as that takes on the host's clock"},
    {"set_repeatable", (PyCFunction)py_vm_set_repeatable, METH_VARARGS,
     "set_repeatable(yes): breakpoints change nothing of what runs do"},
    {"pass_time", (PyCFunction)py_vm_pass_time, METH_VARARGS,
     "pass_time(nanoseconds): with time by instructions, so much passes now"},
    {"stand", (PyCFunction)py_vm_stand, METH_VARARGS, "stand(bool): its time stands still, or is the host's again"},
    {"set_parallel", (PyCFunction)py_vm_set_parallel, METH_VARARGS,
     "set_parallel(yes) -> whether CPUs that run in threads of their own execute at the same time: with the host's time alone"},
    {"get_state", (PyCFunction)py_vm_get_state, METH_VARARGS, "get_state(name) -> bytes: irqchip, pit, clock"},
    {"set_state", (PyCFunction)py_vm_set_state, METH_VARARGS, "set_state(name, bytes)"},
    {"get_states", (PyCFunction)py_vm_get_states, METH_O, "get_states(names) -> dict of those that there are"},
    {"put_states", (PyCFunction)py_vm_put_states, METH_O, "put_states(dict): set those that are not so, in turn"},
    {"create_vcpu", (PyCFunction)(void (*)(void))py_vm_create_vcpu, METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
     "create_vcpu(index) -> Vcpu in reset state"},
    {"close", (PyCFunction)py_vm_close, METH_NOARGS, "close(): free all; no CPU runs"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot vm_slots[] = {
    {Py_tp_doc, "A machine of the emulator core."}, {Py_tp_new, vm_new}, {Py_tp_dealloc, vm_dealloc},
    {Py_tp_methods, vm_methods}, {0, NULL},
};
static PyType_Spec vm_spec = {"vmfs.engine.emulator._core.Vm", sizeof(VmObject), 0, Py_TPFLAGS_DEFAULT, vm_slots};

/* ---- Vcpu -------------------------------------------------------------------------------------------------------------------- */

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

static int vcpu_alive(VcpuObject *self)
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
static void watch_forks(void) { pthread_atfork(NULL, NULL, is_forked); }

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

/* ---- runs by other C code: vmfs/words/lane.h ---- */

static void lane_clear_kick(void *cpu) { vcpu_clear_kick(((VcpuObject *)cpu)->vcpu); }

static int pack_exit(unsigned cpu, const struct vcpu_exit *e, const uint8_t *data, size_t size, uint8_t packed[LANE_EXIT_SIZE])
{
    static const struct { enum exit_reason reason; int index; uint32_t code; } rows[] = {
        {EXIT_IO, LANE_EXIT_IO, VMFS_EXIT_IO}, {EXIT_MMIO, LANE_EXIT_MMIO, VMFS_EXIT_MMIO}, {EXIT_HLT, LANE_EXIT_HLT, VMFS_EXIT_HLT},
    };
    struct vmfs_exit exit = {.cpu = cpu, .rip = e->rip};
    _Static_assert(sizeof exit == LANE_EXIT_SIZE, "struct vmfs_exit");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].reason != e->reason)
            continue;
        exit.reason = rows[i].code;
        if (e->reason == EXIT_IO) {
            exit.io.direction = e->write ? VMFS_IO_OUT : VMFS_IO_IN;
            exit.io.size = (uint8_t)e->size;
            exit.io.port = (uint16_t)e->address;
            exit.io.count = e->count;
            if (e->write)
                memcpy(exit.io.data, data, size < sizeof exit.io.data ? size : sizeof exit.io.data);
        } else if (e->reason == EXIT_MMIO) {
            exit.mmio.addr = e->address;
            exit.mmio.len = e->size;
            exit.mmio.is_write = e->write;
            if (e->write)
                memcpy(exit.mmio.data, data, size < sizeof exit.mmio.data ? size : sizeof exit.mmio.data);
        }
        memcpy(packed, &exit, sizeof exit);
        return rows[i].index;
    }
    return -1;
}

static int lane_run(void *cpu, uint8_t packed[LANE_EXIT_SIZE])
{
    VcpuObject *self = cpu;
    struct left *left = &self->left[1 - self->left_at];

    vcpu_set_poll(self->vcpu, NULL, self);
    vcpu_run(self->vcpu, BUDGET_UNLIMITED, &left->exit);
    const uint8_t *data = vcpu_exit_data(self->vcpu, &left->size);
    memcpy(left->data, data, left->size);
    return pack_exit(self->index, &left->exit, left->data, left->size, packed);
}

static void lane_keep(void *cpu)
{
    VcpuObject *self = cpu;
    self->left_at = 1 - self->left_at;
}

static unsigned lane_state(void *cpu, uint8_t regs[LANE_REGS_SIZE], uint8_t sregs[LANE_SREGS_SIZE])
{
    _Static_assert(sizeof(struct kvm_regs) == LANE_REGS_SIZE && sizeof(struct kvm_sregs) == LANE_SREGS_SIZE, "KVM's UAPI");
    VcpuObject *self = cpu;
    vcpu_get_state(self->vcpu, "regs", regs, LANE_REGS_SIZE);
    vcpu_get_state(self->vcpu, "sregs", sregs, LANE_SREGS_SIZE);
    return LANE_VALID(LANE_REGS) | LANE_VALID(LANE_SREGS);
}

static size_t lane_data(void *cpu, uint8_t data[LANE_DATA_MOST])
{
    VcpuObject *self = cpu;
    size_t size;
    const uint8_t *from = vcpu_exit_data(self->vcpu, &size);
    memcpy(data, from, size < LANE_DATA_MOST ? size : LANE_DATA_MOST);
    return size;
}

static int lane_set(void *cpu, unsigned file, const uint8_t *data, size_t size)
{
    VcpuObject *self = cpu;
    size_t has;
    if ((file == LANE_DATA) != vcpu_reading(self->vcpu))
        return -EBUSY;                  /* a state that is set completes the read */
    if (file != LANE_DATA)
        return vcpu_set_state(self->vcpu, file == LANE_REGS ? "regs" : "sregs", data, size);
    uint8_t *to = vcpu_exit_data(self->vcpu, &has);
    if (has != size)
        return -EINVAL;
    memcpy(to, data, size);
    return 0;
}

static int lane_interrupt(void *cpu, unsigned vector) { return vcpu_interrupt(((VcpuObject *)cpu)->vcpu, (uint8_t)vector); }

static struct lane_cpu lane_of(VcpuObject *cpu)
{
    return (struct lane_cpu){cpu, lane_clear_kick, lane_run, lane_keep, lane_state, lane_data, lane_set, lane_interrupt};
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
static PyType_Spec vcpu_spec = {
    "vmfs.engine.emulator._core.Vcpu", sizeof(VcpuObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    vcpu_slots,
};

/* ---- The module ---------------------------------------------------------------------------------------------------------------- */

static PyObject *py_instructions(PyObject *module, PyObject *ignored)
{
    (void)module, (void)ignored;
    PyObject *list = PyList_New(0);
    struct core_instruction i;
    for (unsigned n = 0; list && core_instruction(n, &i); n++) {
        PyObject *attributes = PyList_New(0);
        const char *name;
        for (unsigned bit = 0; attributes && (name = core_attribute_name(bit)); bit++)
            if (i.attributes >> bit & 1) {
                PyObject *text = PyUnicode_FromString(name);
                if (!text || PyList_Append(attributes, text))
                    Py_CLEAR(attributes);
                Py_XDECREF(text);
            }
        PyObject *row = attributes ? Py_BuildValue(
            "{ss ss sB ss ss ss si ss s(ssss) ss ss ss sN sH sH sH}", "name", i.name, "map", i.map, "opcode", i.opcode, "prefix",
            i.prefix, "length", i.length, "w", i.w, "digit", i.digit, "mod", i.mod, "operands", i.operands[0], i.operands[1], i.operands[2], i.operands[3], "size",
            i.size, "handler", i.handler, "feature", i.feature, "attributes", attributes, "flags_read", i.flags_read,
            "flags_written", i.flags_written, "flags_undefined", i.flags_undefined) : NULL;
        if (!row || PyList_Append(list, row))
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static int module_exec(PyObject *module)
{
    static const struct { const char *name; long value; } constants[] = {
#define CONSTANT(name) {#name, name},
        CORE_EXITS(CONSTANT) CORE_CAUSES(CONSTANT) CORE_STOPS(CONSTANT)
#undef CONSTANT
        {"TRACE_INSN", CORE_TRACE_INSN}, {"TRACE_MEM", CORE_TRACE_MEM}, {"TRACE_EXCEPTION", CORE_TRACE_EXCEPTION},
        {"TRACE_INTERRUPT", CORE_TRACE_INTERRUPT}, {"TRACE_USER", CORE_TRACE_USER}, {"TRACE_KERNEL", CORE_TRACE_KERNEL},
        {"TRACE_REAL", CORE_TRACE_REAL}, {"TRACE_PROTECTED", CORE_TRACE_PROTECTED}, {"TRACE_LONG", CORE_TRACE_LONG},
        {"HOOK_CODE", HOOK_CODE}, {"HOOK_BLOCK", HOOK_BLOCK}, {"HOOK_MEMORY", HOOK_MEMORY}, {"IP", CORE_IP},
        {"INTERRUPT_QUEUE", INTERRUPT_QUEUE}, {"SLOTS", CORE_SLOTS}, {"VCPUS", CORE_VCPUS},
    };
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    ModuleState *state = PyModule_GetState(module);
    state->vm_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &vm_spec, NULL);
    state->vcpu_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &vcpu_spec, NULL);
    if (!state->vm_type || !state->vcpu_type || PyModule_AddType(module, state->vm_type) ||
        PyModule_AddType(module, state->vcpu_type))
        return -1;
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value))
            return -1;
    return 0;
}
static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    ModuleState *state = PyModule_GetState(module);
    Py_VISIT(state->vm_type);
    Py_VISIT(state->vcpu_type);
    return 0;
}
static int module_clear(PyObject *module)
{
    ModuleState *state = PyModule_GetState(module);
    Py_CLEAR(state->vm_type);
    Py_CLEAR(state->vcpu_type);
    return 0;
}
static PyObject *py_open_jitdump(PyObject *module, PyObject *args)
{
    (void)module, (void)args;
    errno = -core_open_jitdump();
    return errno ? PyErr_SetFromErrno(PyExc_OSError) : Py_NewRef(Py_None);
}
static PyMethodDef module_methods[] = {
    {"open_jitdump", py_open_jitdump, METH_NOARGS, "open_jitdump() -> None: the file that VMFS_JIT_DUMP asks for"},
    {"instructions", py_instructions, METH_NOARGS, "instructions() -> list of dicts: the instruction table"},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "vmfs.engine.emulator._core", "The emulator core.", sizeof(ModuleState), module_methods,
    module_slots, module_traverse, module_clear, NULL,
};
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module_def); }
