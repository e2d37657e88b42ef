/* Lists of RAM that drivers give disks, as methods of Ram. */
#ifndef VMFS_CHIPS_LISTS_H
#define VMFS_CHIPS_LISTS_H

#include "ram.h"

enum list_error { LIST_RIGHT, LIST_CROOKED /* an address that is not aligned, a table without an end */, LIST_NOT_RAM };

PyObject *ram_prps(struct ram *self, PyObject *const *args, Py_ssize_t count);
PyObject *ram_prdt(struct ram *self, PyObject *const *args, Py_ssize_t count);
PyObject *ram_prds(struct ram *self, PyObject *const *args, Py_ssize_t count);

#endif
