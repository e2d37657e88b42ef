/* The rings of virtqueues. */
#ifndef VMFS_CHIPS_RING_H
#define VMFS_CHIPS_RING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *ring_chain(PyObject *module, PyObject *args);

#endif
