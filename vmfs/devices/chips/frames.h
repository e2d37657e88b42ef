/* Frames between a virtqueue, a list of bytes, and a socket. */
#ifndef VMFS_CHIPS_FRAMES_H
#define VMFS_CHIPS_FRAMES_H

#include "chips.h"

PyObject *frames_take(PyObject *module, PyObject *args);
PyObject *frames_put(PyObject *module, PyObject *args);
PyObject *frames_split(PyObject *module, PyObject *args);
PyObject *frames_send(PyObject *module, PyObject *args);
PyObject *e1000_put(PyObject *module, PyObject *args);

#endif
