/* vmfs.engine.emulator._core: the core for Python. The files of this folder are the only ones of the core that include Python.h.
 *
 * Vm() and Vm.create_vcpu(index) -> Vcpu. Errors of the core are OSError with its errno. Exits are tuples:
 * (reason, rip, write, size, count, address, cause, id, vector, message), reason and cause as the constants. */
#include "module.h"

#include <errno.h>
#include <pthread.h>

PyObject *fail(long error)
{
    errno = (int)-error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

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
