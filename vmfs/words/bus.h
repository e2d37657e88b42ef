/* What an engine and the devices of a board are to each other without Python. A board gives its engine a capsule named
 * FAST_BUS (`Machine.set_fast_bus`). The engine asks the bus first, in the CPU's thread and without the GIL; what the bus does
 * not answer is an exit, and Python's. Neither side knows more of the other than this.
 *
 * Threads: all functions may be called from any thread; a bus has its own lock, and calls the machine's with it held. */
#ifndef VMFS_BUS_H
#define VMFS_BUS_H

#include <stdbool.h>
#include <stdint.h>

#define FAST_BUS "vmfs.fast_bus"
#define BUS_NEVER UINT64_MAX

struct bus_access {
    bool memory, write;             /* a port where it is not memory */
    uint8_t size;                   /* bytes: 1, 2, 4; of memory 8, too */
    uint64_t address;
    uint64_t value;                 /* written; of a read that was answered: what was read, with no bit beyond `size` */
    bool unclaimed;                 /* answered, and by no device: it may be a mistake of the guest's */
    uint64_t rip;                   /* as the exit would have it */
    uint64_t (*now)(void *context); /* the guest's time, as in the state `clock`: nanoseconds */
    void *context;
};

/* What a bus asks of an engine's machine. */
struct bus_machine {
    void *machine;
    void (*irq_line)(void *machine, unsigned gsi, bool level);
    void (*signal_msi)(void *machine, uint64_t address, uint32_t data);
    /* Devices have written RAM; NULL: an engine that need not know. */
    void (*memory_written)(void *machine, uint64_t address, uint64_t size);
};

struct fast_bus {
    /* False: nothing has happened, and Python is to answer. One of a port may raise a line or make something due sooner, and the
     * engine looks before the next instruction. One of memory makes nothing due sooner; an interrupt that it raises comes as if
     * another thread had raised it at that time, and where time follows the instructions none does. */
    bool (*access)(struct fast_bus *bus, struct bus_access *access);
    /* As that many accesses of `size` bytes to a port, one after the other, of `data`: as many as make nothing happen but that the bytes
     * move, at most `count`; returns how many. 0: `access` tells. */
    uint32_t (*string)(struct fast_bus *bus, bool write, uint16_t port, unsigned size, uint32_t count, uint8_t *data);
    /* When `advance` is to be called, in the guest's time; BUS_NEVER. It changes by accesses, by `advance`, and while the
     * machine does not run. */
    _Atomic uint64_t due;
    void (*advance)(struct fast_bus *bus, uint64_t now);
    /* Whether a device may send a message that is an NMI or an INIT, which wakes a CPU whatever it has masked. */
    bool (*can_send_unmaskable)(struct fast_bus *bus);
    /* Lines are this machine's from now on; until it is detached, where it is still the one. */
    void (*attach)(struct fast_bus *bus, const struct bus_machine *machine);
    void (*detach)(struct fast_bus *bus, const void *machine);
};

#endif
