/* vmfs.debug._trace: records of a trace (struct vmfs_trace of vmfs.h) as lines of text, tens of times faster than Python.
 *
 * Text(label): `label(address)` gives the symbol of an address, or "". text(records) -> bytes. It remembers from one call
 * to the next where the CPU is, since accesses and exits do not say it. count(records) -> how many events they are. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stdint.h>
#include <string.h>

enum { INSN = 1, MEM, EXCEPTION, INTERRUPT, EXIT, AT, DROPPED, CPU };
enum { WRITE = 1, IMPLICIT = 2, ERROR_CODE = 8, NMI = 16, SOFTWARE = 32 };
struct entry { /* of 32 bytes, unaligned */
    uint8_t kind, flags;
    uint16_t size;
    uint32_t code;
    uint64_t word[3];
};
enum { LABELS_MOST = 1 << 18, LINE_MOST = 256 };

typedef struct {
    PyObject_HEAD
    PyObject *label, *labels; /* of addresses: bytes, " name+0x10" or "" */
    uint64_t at;
    int64_t cpu; /* whose they are, or -1: of the only one */
    char *out;
    size_t used, room;
} TextObject;

/* ---- The buffer ----------------------------------------------------------------------------------------------------------- */

static int reserve(TextObject *t, size_t more)
{
    if (t->used + more <= t->room)
        return 0;
    size_t room = (t->used + more) * 2;
    char *out = PyMem_Realloc(t->out, room);
    if (!out) {
        PyErr_NoMemory();
        return -1;
    }
    t->out = out;
    t->room = room;
    return 0;
}
static void put(TextObject *t, const char *text)
{
    size_t length = strlen(text);
    memcpy(t->out + t->used, text, length);
    t->used += length;
}
static void put_hex_digits(TextObject *t, uint64_t value, unsigned digits)
{
    for (unsigned i = digits; i--;)
        t->out[t->used++] = "0123456789abcdef"[value >> 4 * i & 15];
}
static void put_hex(TextObject *t, uint64_t value)
{
    put(t, "0x");
    put_hex_digits(t, value, value ? (67 - (unsigned)__builtin_clzll(value)) / 4 : 1);
}
static void put_decimal(TextObject *t, uint64_t value)
{
    char digits[20];
    unsigned n = sizeof digits;
    do
        digits[--n] = (char)('0' + value % 10);
    while (value /= 10);
    memcpy(t->out + t->used, digits + n, sizeof digits - n);
    t->used += sizeof digits - n;
}
/* The symbol of an address, with a space before it. */
static int put_label(TextObject *t, uint64_t address)
{
    if (t->label == Py_None)
        return 0;
    PyObject *key = PyLong_FromUnsignedLongLong(address);
    if (!key)
        return -1;
    PyObject *label = PyDict_GetItemWithError(t->labels, key), *made = NULL;
    if (!label && !PyErr_Occurred()) {
        if (PyDict_GET_SIZE(t->labels) >= LABELS_MOST)
            PyDict_Clear(t->labels);
        label = made = PyObject_CallOneArg(t->label, key);
        if (label && !PyBytes_Check(label)) {
            PyErr_SetString(PyExc_TypeError, "a label is bytes");
            label = NULL;
        }
        if (label && PyDict_SetItem(t->labels, key, label))
            label = NULL;
    }
    Py_DECREF(key);
    int failed = !label || reserve(t, (size_t)PyBytes_GET_SIZE(label) + LINE_MOST);
    if (!failed && PyBytes_GET_SIZE(label)) {
        t->out[t->used++] = ' ';
        memcpy(t->out + t->used, PyBytes_AS_STRING(label), (size_t)PyBytes_GET_SIZE(label));
        t->used += (size_t)PyBytes_GET_SIZE(label);
    }
    Py_XDECREF(made);
    return failed ? -1 : 0;
}
static int end_line(TextObject *t, uint64_t address)
{
    if (t->cpu >= 0) {
        put(t, " cpu=");
        put_decimal(t, (uint64_t)t->cpu);
    }
    if (put_label(t, address))
        return -1;
    t->out[t->used++] = '\n';
    return 0;
}

/* ---- Records ---------------------------------------------------------------------------------------------------------------- */

static int put_instructions(TextObject *t, const struct entry *e)
{
    uint64_t at = e->word[1];
    unsigned count = e->size > 16 ? 16 : e->size;
    for (unsigned i = 0; i < count; i++) {
        if (reserve(t, LINE_MOST))
            return -1;
        t->at = at;
        put(t, "insn ");
        put_hex(t, at);
        if (e->code > 1) {
            put(t, " times=");
            put_decimal(t, e->code);
        }
        if (end_line(t, at))
            return -1;
        at += e->word[2] >> 4 * i & 15;
    }
    return 0;
}

static int put_access(TextObject *t, const struct entry *e)
{
    put(t, e->flags & WRITE ? "write " : "read ");
    put_hex(t, e->word[0]);
    put(t, " size=");
    put_decimal(t, e->size);
    put(t, " value=");
    if (e->word[2]) {
        put_hex(t, e->word[2]);
        put_hex_digits(t, e->word[1], 16);
    } else {
        put_hex(t, e->word[1]);
    }
    put(t, " at=");
    put_hex(t, t->at);
    if (e->flags & IMPLICIT)
        put(t, " by=cpu");
    return end_line(t, t->at);
}

static int put_event(TextObject *t, const struct entry *e)
{
    put(t, e->kind == EXCEPTION ? "exception vector=" : "interrupt vector=");
    put_hex(t, e->size);
    if (e->kind == INTERRUPT)
        put(t, e->flags & NMI ? " kind=nmi" : e->flags & SOFTWARE ? " kind=software" : " kind=external");
    if (e->flags & ERROR_CODE) {
        put(t, " error=");
        put_hex(t, e->code);
    }
    if (e->kind == EXCEPTION && e->size == 14) { /* #PF */
        put(t, " addr=");
        put_hex(t, e->word[2]);
    }
    put(t, " at=");
    put_hex(t, e->word[1]);
    return end_line(t, e->word[1]);
}

static int put_record(TextObject *t, const struct entry *e)
{
    if (reserve(t, LINE_MOST))
        return -1;
    switch (e->kind) {
    case INSN: return put_instructions(t, e);
    case MEM: return put_access(t, e);
    case EXCEPTION: case INTERRUPT: return put_event(t, e);
    case AT: t->at = e->word[1]; return 0;
    case CPU: t->cpu = e->code; return 0;
    case DROPPED:
        put(t, "dropped ");
        put_decimal(t, e->word[0]);
        put(t, "\n");
        return 0;
    default: return 0; /* EXIT: its line comes from elsewhere */
    }
}

static PyObject *text_text(TextObject *t, PyObject *argument)
{
    Py_buffer records;
    if (PyObject_GetBuffer(argument, &records, PyBUF_SIMPLE))
        return NULL;
    t->used = 0;
    PyObject *text = NULL;
    const char *at = records.buf;
    Py_ssize_t left = records.len;
    for (struct entry e; left >= (Py_ssize_t)sizeof e; left -= sizeof e, at += sizeof e) {
        memcpy(&e, at, sizeof e);
        if (put_record(t, &e))
            goto done;
    }
    text = PyBytes_FromStringAndSize(t->out, (Py_ssize_t)t->used);
done:
    PyBuffer_Release(&records);
    return text;
}

static PyObject *py_count(PyObject *module, PyObject *argument)
{
    Py_buffer records;
    (void)module;
    if (PyObject_GetBuffer(argument, &records, PyBUF_SIMPLE))
        return NULL;
    uint64_t events = 0;
    const char *at = records.buf;
    Py_ssize_t left = records.len;
    for (struct entry e; left >= (Py_ssize_t)sizeof e; left -= sizeof e, at += sizeof e) {
        memcpy(&e, at, sizeof e);
        events += e.kind == INSN ? (uint64_t)e.size + e.code - 1 : e.kind != AT && e.kind != DROPPED && e.kind != CPU;
    }
    PyBuffer_Release(&records);
    return PyLong_FromUnsignedLongLong(events);
}

static PyObject *py_cpu_after(PyObject *module, PyObject *args)
{
    Py_buffer records;
    PyObject *cpu;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*O:cpu_after", &records, &cpu))
        return NULL;
    int64_t found = -1;
    const char *at = records.buf;
    Py_ssize_t left = records.len;
    for (struct entry e; left >= (Py_ssize_t)sizeof e; left -= sizeof e, at += sizeof e) {
        memcpy(&e, at, sizeof e);
        if (e.kind == CPU)
            found = e.code;
    }
    PyBuffer_Release(&records);
    return found < 0 ? Py_NewRef(cpu) : PyLong_FromLongLong(found);
}

/* ---- The type and the module ------------------------------------------------------------------------------------------------- */

static int text_init(TextObject *t, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"label", NULL};
    PyObject *label;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Text", names, &label))
        return -1;
    PyObject *labels = PyDict_New();
    if (!labels)
        return -1;
    Py_XSETREF(t->label, Py_NewRef(label));
    Py_XSETREF(t->labels, labels);
    t->cpu = -1;
    return 0;
}
static int text_traverse(TextObject *t, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(t));
    Py_VISIT(t->label);
    Py_VISIT(t->labels);
    return 0;
}
static int text_clear(TextObject *t)
{
    Py_CLEAR(t->label);
    Py_CLEAR(t->labels);
    return 0;
}
static void text_dealloc(TextObject *t)
{
    PyTypeObject *type = Py_TYPE(t);
    PyObject_GC_UnTrack(t);
    text_clear(t);
    PyMem_Free(t->out);
    type->tp_free(t);
    Py_DECREF(type);
}
static PyObject *text_of(TextObject *t, PyObject *argument)
{
    if (!t->label) {
        PyErr_SetString(PyExc_TypeError, "Text was not initialized");
        return NULL;
    }
    return text_text(t, argument);
}

static PyMethodDef text_methods[] = {
    {"text", (PyCFunction)text_of, METH_O, "text(records) -> bytes, a line an event"},
    {NULL, NULL, 0, NULL},
};
static PyMemberDef text_members[] = {
    {"at", T_ULONGLONG, offsetof(TextObject, at), 0, "the linear address of the instruction that the last record was about",},
    {"cpu", T_LONGLONG, offsetof(TextObject, cpu), 0, "whose the records are; -1: of the only CPU",},
    {NULL, 0, 0, 0, NULL},
};
static PyType_Slot text_slots[] = {
    {Py_tp_doc, "Text(label): `label(address)` -> bytes, or None."}, {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, text_init}, {Py_tp_dealloc, text_dealloc}, {Py_tp_traverse, text_traverse}, {Py_tp_clear, text_clear},
    {Py_tp_methods, text_methods}, {Py_tp_members, text_members}, {0, NULL},
};
static PyType_Spec text_spec = {
    "vmfs.debug._trace.Text", sizeof(TextObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, text_slots,
};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &text_spec, NULL);
    if (!type)
        return -1;
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}
static PyMethodDef module_methods[] = {
    {"count", py_count, METH_O, "count(records) -> how many instructions, accesses and so on they are"},
    {"cpu_after", py_cpu_after, METH_VARARGS, "cpu_after(records, cpu): whose the record after these is, which begin with `cpu`'s"},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "vmfs.debug._trace", "Records of a trace as text.", 0, module_methods, module_slots, NULL, NULL,
    NULL,
};
PyMODINIT_FUNC PyInit__trace(void) { return PyModuleDef_Init(&module_def); }
