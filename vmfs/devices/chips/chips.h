/* Devices in C: registers at ports and in memory that a guest uses often. A chip is the registers; the class around it in
 * vmfs/devices has the name, the state that goes along, and all that is rare.
 *
 * A chip's `access` is called with the bus's lock held, by the CPU's thread (without the GIL) or from Python (with it). So
 * no holder of the lock waits for the GIL: it tells Python of lines that changed after it has given the lock back.
 * No chip knows an engine, or a file. */
#ifndef VMFS_CHIPS_H
#define VMFS_CHIPS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <stdatomic.h>

#include "bus.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;

#define SECOND 1000000000u

struct chip;

/* A part of a device's window was accessed; false: it is Python's to answer, and nothing has happened. */
typedef bool chip_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset);

struct chip_kind {
    chip_access *access;
    void (*advance)(struct chip *chip, u64 now); /* `due` has come; NULL: it never is */
    bool timed;                                  /* `access` asks for the time */
    bool (*can_send_unmaskable)(const struct chip *chip); /* as the bus's; NULL: it sends no messages */
    /* As the bus's, at a part of the device's window; NULL: none are at once. */
    u32 (*string)(struct chip *chip, bool write, unsigned region, u64 offset, unsigned size, u32 count, u8 *data);
    /* After an access of the engine's that was answered, without the lock: what takes longer than a register. NULL: nothing */
    void (*after)(struct chip *chip, const struct bus_access *a, unsigned region, u64 offset);
};

struct chip {
    PyObject_HEAD
    struct bus *bus;            /* a reference */
    const struct chip_kind *kind;
    unsigned number;            /* of its device, as a holder of lines */
    u64 due;                    /* BUS_NEVER */
    struct chip *next;          /* of all that are timed, */
    struct chip *next_sender;   /* and of all that send messages */
};

enum { LINES = 24, DEVICES = 64, CHANGES = 64, PIRQS = 8, NO_LINE = 0 };
enum { PORTS = 1 << 16, PLACES = 256, PLACE_NOBODY = 0, PLACE_PYTHON = 1, PLACE_FIRST = 2 };
enum { UNCLAIMED_MOST = 256 };

struct place { u64 start, length; struct chip *chip; unsigned region; };
struct unclaimed { u64 address, reads, writes, rip, used; bool memory; };

struct bus {
    PyObject_HEAD
    struct fast_bus face;       /* what an engine has */
    pthread_mutex_t lock;
    struct bus_machine machine; /* irq_line is NULL while lines are told to Python */
    PyObject *irq_line, *signal_msi, *now; /* Python's: irq_line(gsi, level), signal_msi(address, data), now() */
    u64 holders[LINES];         /* of each line, a bit a device that holds it high */
    u64 pirq_holders[PIRQS];    /* the same of each input of the PCI router, */
    u8 pirq_line[PIRQS];        /* and the line that it drives; NO_LINE: none */
    struct change { bool is_msi, level; u32 gsi_or_data; u64 address; } changes[CHANGES]; /* to be told to Python */
    unsigned change_count;
    struct chip *timed, *senders;
    struct place *places;       /* by their numbers */
    unsigned memory_count;
    u8 memory_places[PLACES];   /* of memory, in no order */
    u8 *ports;                  /* the place of each */
    struct unclaimed *unclaimed;
    unsigned unclaimed_count, unclaimed_last;
    u64 unclaimed_uses, uses_told, forgotten;
    u64 touched;                /* a bit a device: its chips may be others than they were when this was last forgotten; */
    bool lines_touched;         /* and so may the lines, and what nobody has claimed */
    _Atomic u32 rung;           /* there is something that Python is to fetch */
    _Atomic u32 sleeps;         /* the thread that fetches it sleeps */
    bool closed;
};

/* With the lock held. */
void bus_set_line(struct bus *bus, unsigned device, unsigned gsi, bool level);
void bus_set_pirq(struct bus *bus, unsigned device, unsigned pirq, bool level);
void bus_signal_msi(struct bus *bus, u64 address, u32 data);
void bus_set_due(struct chip *chip, u64 due);
void bus_ring(struct bus *bus);

static inline u64 now_of(const struct bus_access *a) { return a->now(a->context); }

/* Of a power chip: the clock has raised its interrupt. */
void power_clock_rang(struct chip *power);

/* A restore leaves alone what nobody has touched since the last one. So whoever may change a chip says so, with the lock held: an access
 * of the engine's, a time that has come, and each function that is called from Python, which begins with `chip_enter`. */
static inline void chip_touched(struct chip *chip) { chip->bus->touched |= 1ull << chip->number; }
/* `bus_enter`, by what may change the chip. */
void chip_enter(struct chip *chip);

/* For what is called from Python: `bus_leave` tells Python of lines, and is false where that raised. */
void bus_enter(struct bus *bus);
bool bus_leave(struct bus *bus);
/* `bus_leave`, and None or NULL. */
PyObject *bus_done(struct bus *bus);
/* As many unsigned numbers as `count`; false with an exception where there are not. */
bool chip_numbers(PyObject *const *args, Py_ssize_t given, u64 *into, Py_ssize_t count);

/* The base of a chip's type: `new` of it fills in what is common. */
PyObject *chip_new(PyTypeObject *type, const struct chip_kind *kind, PyObject *bus, unsigned number);
/* The same of a chip whose arguments are (bus, device, gsi). */
PyObject *chip_new_on_line(PyTypeObject *type, const struct chip_kind *kind, PyObject *args, unsigned *gsi);
void chip_dealloc(struct chip *chip);
/* read(region, offset, size) -> value or None; write(region, offset, size, value) -> whether it was answered. */
PyObject *chip_read(struct chip *chip, PyObject *const *args, Py_ssize_t count);
PyObject *chip_write(struct chip *chip, PyObject *const *args, Py_ssize_t count);
#define CHIP_METHODS \
    {"read", (PyCFunction)(void (*)(void))chip_read, METH_FASTCALL, "read(region, offset, size) -> value, or None: Python's"}, \
    {"write", (PyCFunction)(void (*)(void))chip_write, METH_FASTCALL, \
     "write(region, offset, size, value) -> bool: False: Python's"}

/* A growing ring of bytes, for what waits. */
struct bytes { u8 *data; size_t head, count, room; };
bool bytes_reserve(struct bytes *b, size_t more);
void bytes_push(struct bytes *b, u8 byte);       /* room was reserved */
void bytes_push_front(struct bytes *b, u8 byte); /* lost where the host has no memory */
u8 bytes_pop(struct bytes *b);
u8 bytes_at(const struct bytes *b, size_t at);
void bytes_copy(const struct bytes *b, u8 *to);
void bytes_free(struct bytes *b);

extern PyType_Spec bus_spec, uart_spec, sender_spec, rtc_spec, power_spec, latch_spec, bridge_spec, function_spec, virtio_spec, ram_spec,
    queue_spec, clusters_spec, files_spec, disk_spec, pio_spec, vga_spec, counter_spec, ahci_spec, remote_spec;

#endif
