/* Frames between a card's rings, a list of bytes, and a socket. */
#ifndef VMFS_CHIPS_FRAMES_H
#define VMFS_CHIPS_FRAMES_H

#include "chips.h"

PyObject *frames_take(PyObject *module, PyObject *args);
PyObject *frames_put(PyObject *module, PyObject *args);
PyObject *frames_split(PyObject *module, PyObject *args);
PyObject *frames_send(PyObject *module, PyObject *args);
PyObject *e1000_put(PyObject *module, PyObject *args);
PyObject *e1000_take(PyObject *module, PyObject *args);
PyObject *rtl8139_put(PyObject *module, PyObject *args);
PyObject *rtl8139_take(PyObject *module, PyObject *args);

/* IEEE 802.3's, of what is before it. */
u32 frame_crc(const u8 *data, size_t length);

#endif
