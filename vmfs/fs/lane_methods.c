/* What Python calls of the lane (lane.c) and of the streams (ring.c): functions of vmfs.fs._fuse. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>

#include "lane.h"
#include "lane_methods.h"

#define MACHINE "vmfs.fs._fuse.lane_machine"
#define RING "vmfs.fs._fuse.ring"

/* ---- opaque objects: memory that is shared with a machine ---- */

struct shared {
    const char *name;
    void *(*map)(int fd);       /* NULL: errno */
    void (*drop)(void *mapped);
};

static void *map_machine(int fd) { return lane_map(fd); }
static void drop_machine(void *mapped) { lane_release(mapped); }
static const struct shared MACHINES = {MACHINE, map_machine, drop_machine};

static void *map_ring(int fd) { return ring_map(fd); }
static void drop_ring(void *mapped) { ring_drop(mapped); }
static const struct shared RINGS = {RING, map_ring, drop_ring};

static void drop_opaque(PyObject *capsule)
{
    const struct shared *kind = PyCapsule_GetContext(capsule);
    kind->drop(PyCapsule_GetPointer(capsule, kind->name));
}

static PyObject *opaque(const struct shared *kind, PyObject *args)
{
    int fd;
    if (!PyArg_ParseTuple(args, "i", &fd))
        return NULL;
    void *mapped = kind->map(fd);
    if (!mapped)
        return PyErr_SetFromErrno(PyExc_OSError);
    PyObject *capsule = PyCapsule_New(mapped, kind->name, NULL);
    if (!capsule || PyCapsule_SetContext(capsule, (void *)kind) || PyCapsule_SetDestructor(capsule, drop_opaque)) {
        Py_XDECREF(capsule);
        kind->drop(mapped);
        return NULL;
    }
    return capsule;
}

/* ---- the lane ---- */

PyDoc_STRVAR(lane_serves_doc,
    "lane_serves()\n\n"
    "Whether the mount has the lane.");

static PyObject *py_lane_serves(PyObject *module, PyObject *args)
{
    return PyBool_FromLong(lane_serves());
}

PyDoc_STRVAR(lane_stop_doc,
    "lane_stop()\n\n"
    "Ends the lane's threads. Before the mount is given up: they hold its device open.");

static PyObject *py_lane_stop(PyObject *module, PyObject *args)
{
    Py_BEGIN_ALLOW_THREADS
    lane_stop();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(lane_map_doc,
    "lane_map(fd)\n\n"
    "The page of a machine (vmfs/words/lane.h), a memfd of LANE_SIZE that cannot shrink: an opaque object.");

static PyObject *py_lane_map(PyObject *module, PyObject *args)
{
    return opaque(&MACHINES, args);
}

PyDoc_STRVAR(lane_close_doc,
    "lane_close(machine)\n\n"
    "Nothing is answered from its page any more.");

static PyObject *py_lane_close(PyObject *module, PyObject *capsule)
{
    struct lane_machine *machine = PyCapsule_GetPointer(capsule, MACHINE);
    if (!machine)
        return NULL;
    lane_close(machine);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(lane_add_doc,
    "lane_add(fh, machine, file, handle, written) -> whether it is the lane's now\n\n"
    "The open file fh is hot: file, one of LANE_FILES, of the machine, where it has the number handle; it is open to be written.");

static PyObject *py_lane_add(PyObject *module, PyObject *args)
{
    unsigned long long fh, handle;
    unsigned file;
    int written;
    PyObject *capsule;
    if (!PyArg_ParseTuple(args, "KOIKp", &fh, &capsule, &file, &handle, &written))
        return NULL;
    struct lane_machine *machine = PyCapsule_GetPointer(capsule, MACHINE);
    if (!machine)
        return NULL;
    return PyBool_FromLong(!lane_add(fh, machine, file, handle, written));
}

PyDoc_STRVAR(lane_forget_doc,
    "lane_forget(fh)\n\n"
    "The open file fh is hot no more.");

static PyObject *py_lane_forget(PyObject *module, PyObject *arg)
{
    unsigned long long fh = PyLong_AsUnsignedLongLong(arg);
    if (fh == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    lane_forget(fh);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(lane_keep_doc,
    "lane_keep(opcode, of, answer)\n\n"
    "What FUSE_GETATTR of an inode, or FUSE_FLUSH of an open file, is answered from now on, without Python. None: Python answers.");

static PyObject *py_lane_keep(PyObject *module, PyObject *args)
{
    unsigned opcode;
    unsigned long long of;
    Py_buffer answer;
    if (!PyArg_ParseTuple(args, "IKz*", &opcode, &of, &answer))
        return NULL;
    if (answer.buf)
        lane_keep(opcode, of, answer.buf, (size_t)answer.len);
    else
        lane_drop(opcode, of);
    PyBuffer_Release(&answer);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(lane_seen_doc,
    "lane_seen(fh)\n\n"
    "The news that a read of the open file by the lane has seen; 0 where there was none.");

static PyObject *py_lane_seen(PyObject *module, PyObject *arg)
{
    unsigned long long fh = PyLong_AsUnsignedLongLong(arg);
    if (fh == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(lane_seen(fh));
}

PyDoc_STRVAR(lane_still_doc,
    "lane_still(machine)\n\n"
    "A number that is the same while the CPU stands still, or None.");

static PyObject *py_lane_still(PyObject *module, PyObject *capsule)
{
    struct lane_machine *machine = PyCapsule_GetPointer(capsule, MACHINE);
    if (!machine)
        return NULL;
    int64_t still = lane_still(machine);
    return still < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(still);
}

PyDoc_STRVAR(lane_leave_doc,
    "lane_leave(machine, reads, writes)\n\n"
    "Leave reads and writes of these files, a bit each, to Python until the next call.");

static PyObject *py_lane_leave(PyObject *module, PyObject *args)
{
    PyObject *capsule;
    unsigned reads, writes;
    if (!PyArg_ParseTuple(args, "OII", &capsule, &reads, &writes))
        return NULL;
    struct lane_machine *machine = PyCapsule_GetPointer(capsule, MACHINE);
    if (!machine)
        return NULL;
    lane_leave(machine, reads, writes);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(lane_counts_doc,
    "lane_counts(machine) -> (reads, runs, writes, left, written_ns)\n\n"
    "Reads that were answered from its page, runs, writes, and runs and writes that were left to Python; when the last write was.");

static PyObject *py_lane_counts(PyObject *module, PyObject *capsule)
{
    struct lane_machine *machine = PyCapsule_GetPointer(capsule, MACHINE);
    if (!machine)
        return NULL;
    struct lane_counts counts = lane_counts(machine);
    return Py_BuildValue("KKKKK", (unsigned long long)counts.reads, (unsigned long long)counts.runs,
                         (unsigned long long)counts.writes, (unsigned long long)counts.left,
                         (unsigned long long)counts.written_ns);
}

/* ---- streams ---- */

PyDoc_STRVAR(ring_map_doc,
    "ring_map(fd)\n\n"
    "The memory by which a machine hands on a stream (vmfs/words/ring.h), a memfd of RING_SIZE that cannot shrink: an opaque\n"
    "object.");

static PyObject *py_ring_map(PyObject *module, PyObject *args)
{
    return opaque(&RINGS, args);
}

PyDoc_STRVAR(ring_begin_doc,
    "ring_begin(ring)\n\n"
    "Its machine has it now. OSError where what that says there cannot be.");

static PyObject *py_ring_begin(PyObject *module, PyObject *capsule)
{
    struct ring *ring = PyCapsule_GetPointer(capsule, RING);
    if (!ring)
        return NULL;
    int error = ring_begin(ring);
    if (error) {
        errno = -error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(ring_read_doc,
    "ring_read(ring, offset, size) -> bytes\n\n"
    "The bytes from offset on, as many as there are, up to size; they were read then.");

static PyObject *py_ring_read(PyObject *module, PyObject *args)
{
    PyObject *capsule;
    unsigned long long offset;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "OKn", &capsule, &offset, &size))
        return NULL;
    struct ring *ring = PyCapsule_GetPointer(capsule, RING);
    if (!ring)
        return NULL;
    PyObject *data = PyBytes_FromStringAndSize(NULL, size);
    if (!data)
        return NULL;
    void *to = PyBytes_AS_STRING(data);
    size_t found;
    Py_BEGIN_ALLOW_THREADS              /* a read by the lane may be under way */
    found = ring_read(ring, offset, to, (size_t)size);
    Py_END_ALLOW_THREADS
    return _PyBytes_Resize(&data, (Py_ssize_t)found) ? NULL : data;
}

PyDoc_STRVAR(lane_add_stream_doc,
    "lane_add_stream(fh, machine, file, ring) -> whether it is the lane's now\n\n"
    "The open file fh is a stream, file of enum lane_file, of the machine.");

static PyObject *py_lane_add_stream(PyObject *module, PyObject *args)
{
    unsigned long long fh;
    unsigned file;
    PyObject *machine_capsule, *ring_capsule;
    if (!PyArg_ParseTuple(args, "KOIO", &fh, &machine_capsule, &file, &ring_capsule))
        return NULL;
    struct lane_machine *machine = PyCapsule_GetPointer(machine_capsule, MACHINE);
    struct ring *ring = machine ? PyCapsule_GetPointer(ring_capsule, RING) : NULL;
    if (!ring)
        return NULL;
    return PyBool_FromLong(!lane_add_stream(fh, machine, file, ring));
}

PyMethodDef lane_methods[] = {
    {"lane_serves", py_lane_serves, METH_NOARGS, lane_serves_doc},
    {"lane_stop", py_lane_stop, METH_NOARGS, lane_stop_doc},
    {"lane_map", py_lane_map, METH_VARARGS, lane_map_doc},
    {"lane_close", py_lane_close, METH_O, lane_close_doc},
    {"lane_add", py_lane_add, METH_VARARGS, lane_add_doc},
    {"lane_forget", py_lane_forget, METH_O, lane_forget_doc},
    {"lane_keep", py_lane_keep, METH_VARARGS, lane_keep_doc},
    {"lane_seen", py_lane_seen, METH_O, lane_seen_doc},
    {"lane_still", py_lane_still, METH_O, lane_still_doc},
    {"lane_leave", py_lane_leave, METH_VARARGS, lane_leave_doc},
    {"lane_counts", py_lane_counts, METH_O, lane_counts_doc},
    {"lane_add_stream", py_lane_add_stream, METH_VARARGS, lane_add_stream_doc},
    {"ring_map", py_ring_map, METH_VARARGS, ring_map_doc},
    {"ring_begin", py_ring_begin, METH_O, ring_begin_doc},
    {"ring_read", py_ring_read, METH_VARARGS, ring_read_doc},
    {NULL},
};
