/* The Python objects of the core's module, and what the files of this folder ask of each other. */
#ifndef VMFS_MODULE_H
#define VMFS_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "core.h"
#include "lane.h"

typedef struct {
    PyObject_HEAD
    struct vm *vm;
    struct { void *host; size_t size; } maps[CORE_SLOTS];
    unsigned running;         /* CPUs in a run */
    PyObject *bus;            /* the capsule of vm_set_bus, or NULL */
    bool all_run;             /* in a run of all */
    bool parallel;            /* CPUs may run at the same time */
    struct VcpuObject *vcpus[CORE_VCPUS]; /* not owned */
} VmObject;

typedef struct VcpuObject {
    PyObject_HEAD
    VmObject *owner;
    struct vcpu *vcpu;
    int running;
    int signalled;            /* a Python signal handler raised, in poll_signals; or the sink of the trace did */
    PyObject *sink;           /* of the trace, or NULL */
    unsigned index;
    struct lane_cpu lane;     /* how others run it, without Python */
    /* The last exits of such runs, in turn: while the next one runs, that of the one before can be looked at. */
    struct left { struct vcpu_exit exit; size_t size; uint8_t data[EXIT_DATA]; } *left;
    unsigned left_at;
    struct watching *watching; /* hooks of the library's (module_hooks.c), or NULL */
} VcpuObject;

typedef struct {
    PyTypeObject *vm_type, *vcpu_type;
} ModuleState;

PyObject *fail(long error); /* OSError of an errno below 0; NULL */

/* vm.c, vcpu.c */
extern PyType_Spec vm_spec, vcpu_spec;
int vcpu_alive(VcpuObject *self); /* else an exception is set */
int vcpu_idle(VcpuObject *self);
PyObject *exit_tuple(const struct vcpu_exit *e);
bool is_main_thread(void);
bool poll_signals(void *argument);
void watch_forks(void);

/* states.c */
typedef long get_state(void *owner, const char *name, void *data, size_t size);
typedef int set_state(void *owner, const char *name, const void *data, size_t size);
PyObject *get_states(void *owner, get_state *get, PyObject *names);
PyObject *put_states(void *owner, get_state *get, set_state *set, PyObject *values);

/* lane.c */
struct lane_cpu lane_of(VcpuObject *cpu);

/* hooks.c: for a program that watches every step */
enum hook_kind { HOOK_CODE, HOOK_BLOCK, HOOK_MEMORY };
PyObject *py_vcpu_get_register(VcpuObject *self, PyObject *number);
PyObject *py_vcpu_set_register(VcpuObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_vcpu_peek(VcpuObject *self, PyObject *args);
PyObject *py_vcpu_set_hooks(VcpuObject *self, PyObject *list);
PyObject *py_vcpu_hook_hits(VcpuObject *self, PyObject *ignored);
PyObject *py_vcpu_leave_hooks(VcpuObject *self, PyObject *ignored);
PyObject *py_vcpu_run_hooked(VcpuObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_vcpu_set_coverage(VcpuObject *self, PyObject *args);
void watching_free(struct watching *watching);

#endif
