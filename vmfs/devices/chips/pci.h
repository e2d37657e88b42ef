/* A function of PCI, as its device and the bridge have it. */
#ifndef VMFS_CHIPS_PCI_H
#define VMFS_CHIPS_PCI_H

#include "chips.h"

enum { CONFIG_BYTES = 256, EXTENDED_BYTES = 16, VECTORS = 64, NO_VECTOR = 0xffff };

struct function {
    struct chip chip;
    struct {
        u8 config[CONFIG_BYTES];
        u8 mask[CONFIG_BYTES];  /* bits that a guest can change */
        u8 by_python[CONFIG_BYTES]; /* 1: writes with an effect, 3: reads, too */
    } bytes;                    /* Python has them as a buffer */
    bool is_express;
    u8 extended[EXTENDED_BYTES]; /* of PCI Express: what is after the first 256 bytes; all else is 0 */
    bool pending;               /* INTx as the device drives it; the command register can hold it back */
    bool has_pin;
    unsigned gsi, pirq;         /* of INTA, where it has one: the line of an I/O APIC, and the router's input */
    unsigned msi_at;            /* the capability of MSI (PCI 3.0, 6.8.1), of 64 bits with masks; 0: none */
    /* MSI-X (6.8.2) */
    unsigned msix_at, vectors;  /* its capability; 0: none */
    struct { u64 address; u32 data, control; } table[VECTORS];
    u64 waiting;                /* a bit a vector: its pending bit */
};

/* All with the bus's lock held. */
void function_drive(struct function *f);
bool function_has_messages(const struct function *f); /* the driver has enabled MSI-X or MSI: there is no INTx then */
void function_signal(struct function *f, unsigned vector);
/* Of the table at 0, and the pending bits at MSIX_PENDING. */
u64 function_read_msix(const struct function *f, u64 offset, unsigned size);

enum { MSIX_PENDING = 0x800 };

#endif
