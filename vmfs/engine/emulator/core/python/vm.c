/* Vm: a machine of the core, its memory, its timers and what it tells its CPUs; runs of all CPUs in turn. */
#include "module.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bus.h"
#include "translate.h"

enum { PAGE = 4096 };

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

static long get_vm(void *owner, const char *name, void *data, size_t size) { return vm_get_state(owner, name, data, size); }
static int set_vm(void *owner, const char *name, const void *data, size_t size) { return vm_set_state(owner, name, data, size); }

static PyObject *py_vm_get_states(VmObject *self, PyObject *names)
{
    return vm_idle(self) ? get_states(self->vm, get_vm, names) : NULL;
}
static PyObject *py_vm_put_states(VmObject *self, PyObject *values)
{
    return vm_idle(self) ? put_states(self->vm, get_vm, set_vm, values) : NULL;
}

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
PyType_Spec vm_spec = {"vmfs.engine.emulator._core.Vm", sizeof(VmObject), 0, Py_TPFLAGS_DEFAULT, vm_slots};
