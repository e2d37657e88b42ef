/* The types of the module, for functions that take one as an argument. */
#ifndef VMFS_CHIPS_MODULE_H
#define VMFS_CHIPS_MODULE_H

#include "chips.h"

enum type { TYPE_BUS, TYPE_UART, TYPE_SENDER, TYPE_RTC, TYPE_POWER, TYPE_LATCH, TYPE_BRIDGE, TYPE_FUNCTION, TYPE_VIRTIO, TYPE_PIO, TYPE_VGA, TYPE_COUNTER,
    TYPE_AHCI, TYPE_REMOTE,
    /* no chips */ TYPE_RAM, TYPE_QUEUE, TYPE_CLUSTERS, TYPE_FILES, TYPE_DISK, TYPES };
struct module_state { PyTypeObject *types[TYPES]; };

bool is_chip(const struct module_state *state, PyObject *object);

#endif
