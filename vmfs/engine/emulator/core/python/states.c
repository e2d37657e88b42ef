/* Several states of a machine or of a CPU in one call. */
#include "module.h"

#include <errno.h>

/* A dict of those of a tuple of names that there are. */
PyObject *get_states(void *owner, get_state *get, PyObject *names)
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
PyObject *put_states(void *owner, get_state *get, set_state *set, PyObject *values)
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
