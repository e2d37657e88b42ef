/* The bus: what answers for a port or an address, the lines that devices share, and what is next due. */
#include "chips.h"

#include <errno.h>
#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "module.h"

static struct bus *bus_of(struct fast_bus *face) { return (struct bus *)((char *)face - offsetof(struct bus, face)); }

/* ---- Lines ---------------------------------------------------------------------------------------------------------------------- */

void bus_set_line(struct bus *bus, unsigned device, unsigned gsi, bool level)
{
    u64 bit = 1ull << device, was = bus->holders[gsi];
    bus->lines_touched |= level != !!(was & bit);
    bus->holders[gsi] = level ? was | bit : was & ~bit;
    if (!was == !bus->holders[gsi])
        return;
    if (bus->machine.irq_line)
        bus->machine.irq_line(bus->machine.machine, gsi, level);
    else if (bus->change_count < CHANGES) /* as many as no access makes */
        bus->changes[bus->change_count++] = (struct change){.level = level, .gsi_or_data = gsi};
}

void bus_set_pirq(struct bus *bus, unsigned device, unsigned pirq, bool level)
{
    u64 bit = 1ull << device;
    bus->lines_touched |= level != !!(bus->pirq_holders[pirq] & bit);
    bus->pirq_holders[pirq] = level ? bus->pirq_holders[pirq] | bit : bus->pirq_holders[pirq] & ~bit;
    if (bus->pirq_line[pirq] != NO_LINE)
        bus_set_line(bus, device, bus->pirq_line[pirq], level);
}

/* Who holds the input goes over to the other line; high there before it is low here, so that a line of both never falls. */
static void route_pirq(struct bus *bus, unsigned pirq, unsigned line)
{
    unsigned was = bus->pirq_line[pirq];
    bus->pirq_line[pirq] = (u8)line;
    if (was == line)
        return;
    bus->lines_touched = true;
    for (u64 left = bus->pirq_holders[pirq]; left; left &= left - 1) {
        unsigned device = (unsigned)__builtin_ctzll(left);
        if (line != NO_LINE)
            bus_set_line(bus, device, line, true);
        if (was != NO_LINE)
            bus_set_line(bus, device, was, false);
    }
}

void bus_signal_msi(struct bus *bus, u64 address, u32 data)
{
    if (bus->machine.signal_msi)
        bus->machine.signal_msi(bus->machine.machine, address, data);
    else if (bus->change_count < CHANGES)
        bus->changes[bus->change_count++] = (struct change){.is_msi = true, .gsi_or_data = data, .address = address};
}

static void attach(struct fast_bus *face, const struct bus_machine *machine)
{
    struct bus *bus = bus_of(face);
    pthread_mutex_lock(&bus->lock);
    bus->machine = *machine;
    pthread_mutex_unlock(&bus->lock);
}

static void detach(struct fast_bus *face, const void *machine)
{
    struct bus *bus = bus_of(face);
    pthread_mutex_lock(&bus->lock);
    if (bus->machine.machine == machine)
        bus->machine = (struct bus_machine){0};
    pthread_mutex_unlock(&bus->lock);
}

/* ---- Time ------------------------------------------------------------------------------------------------------------------------ */

void bus_set_due(struct chip *chip, u64 due)
{
    struct bus *bus = chip->bus;
    u64 first = BUS_NEVER;
    chip->due = due;
    for (const struct chip *each = bus->timed; each; each = each->next)
        first = each->due < first ? each->due : first;
    atomic_store_explicit(&bus->face.due, first, memory_order_relaxed);
}

static void advance(struct fast_bus *face, u64 now)
{
    struct bus *bus = bus_of(face);
    pthread_mutex_lock(&bus->lock);
    for (struct chip *each = bus->timed; each; each = each->next)
        if (each->due <= now) {
            chip_touched(each);
            each->kind->advance(each, now);
        }
    pthread_mutex_unlock(&bus->lock);
}

static bool can_send_unmaskable(struct fast_bus *face)
{
    struct bus *bus = bus_of(face);
    bool can = false;
    pthread_mutex_lock(&bus->lock);
    for (const struct chip *each = bus->senders; each && !can; each = each->next_sender)
        can = each->kind->can_send_unmaskable(each);
    pthread_mutex_unlock(&bus->lock);
    return can;
}

/* ---- What nobody claims -------------------------------------------------------------------------------------------------------- */

static void note_unclaimed(struct bus *bus, bool memory, u64 address, u64 rip, bool write)
{
    struct unclaimed *row = NULL, *oldest = bus->unclaimed;
    struct unclaimed *last = &bus->unclaimed[bus->unclaimed_last];
    if (bus->unclaimed_count && last->address == address && last->memory == memory)
        row = last;
    for (unsigned i = 0; !row && i < bus->unclaimed_count; i++) {
        struct unclaimed *each = &bus->unclaimed[i];
        if (each->address == address && each->memory == memory)
            row = each;
        else if (each->used < oldest->used)
            oldest = each;
    }
    if (!row) {
        row = oldest;
        if (bus->unclaimed_count < UNCLAIMED_MOST)
            row = &bus->unclaimed[bus->unclaimed_count++];
        else
            bus->forgotten++;
        *row = (struct unclaimed){.address = address, .memory = memory};
    }
    bus->lines_touched = true;
    bus->unclaimed_last = (unsigned)(row - bus->unclaimed);
    row->rip = rip;
    row->used = ++bus->unclaimed_uses;
    *(write ? &row->writes : &row->reads) += 1;
}

/* ---- Accesses -------------------------------------------------------------------------------------------------------------------- */

enum { POST_CODES = 0x80 }; /* which every PC takes, and nobody has to */

static u64 ones(unsigned size) { return ~0ull >> (64 - 8 * size); }

static const struct place *find_memory(const struct bus *bus, u64 address)
{
    for (unsigned i = 0; i < bus->memory_count; i++) {
        const struct place *place = &bus->places[bus->memory_places[i]];
        if (address - place->start < place->length)
            return place;
    }
    return NULL;
}

/* `after`: what answered, where it is not done with it. */
static bool access_place(struct bus *bus, struct bus_access *a, struct place *after)
{
    const struct place *place = a->memory ? find_memory(bus, a->address) : &bus->places[bus->ports[a->address & (PORTS - 1)]];
    if (!place || place == &bus->places[PLACE_NOBODY]) {
        note_unclaimed(bus, a->memory, a->address, a->rip, a->write);
        a->value = ones(a->size);
        a->unclaimed = a->memory || a->address != POST_CODES;
        return true;
    }
    if (!place->chip)
        return false;
    chip_touched(place->chip);
    if (!place->chip->kind->access(place->chip, a, place->region, a->address - place->start))
        return false;
    a->value &= ones(a->size);
    if (place->chip->kind->after)
        *after = *place;
    return true;
}

static bool access_bus(struct fast_bus *face, struct bus_access *a)
{
    struct bus *bus = bus_of(face);
    struct place after = {0};
    pthread_mutex_lock(&bus->lock);
    bool done = !bus->closed && access_place(bus, a, &after);
    pthread_mutex_unlock(&bus->lock);
    if (after.chip)
        after.chip->kind->after(after.chip, a, after.region, a->address - after.start);
    return done;
}

static u32 string_bus(struct fast_bus *face, bool write, u16 port, unsigned size, u32 count, u8 *data)
{
    struct bus *bus = bus_of(face);
    u32 done = 0;
    pthread_mutex_lock(&bus->lock);
    const struct place *place = &bus->places[bus->ports[port]];
    if (!bus->closed && place->chip && place->chip->kind->string) {
        chip_touched(place->chip);
        done = place->chip->kind->string(place->chip, write, place->region, port - place->start, size, count, data);
    }
    pthread_mutex_unlock(&bus->lock);
    return done;
}

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

void bus_enter(struct bus *bus) { pthread_mutex_lock(&bus->lock); }

void chip_enter(struct chip *chip)
{
    bus_enter(chip->bus);
    chip_touched(chip);
}

bool bus_leave(struct bus *bus)
{
    unsigned count = bus->change_count;
    struct change changes[CHANGES];
    memcpy(changes, bus->changes, count * sizeof *changes);
    bus->change_count = 0;
    pthread_mutex_unlock(&bus->lock);
    for (unsigned i = 0; i < count; i++) {
        const struct change *c = &changes[i];
        PyObject *tell = Py_XNewRef(c->is_msi ? bus->signal_msi : bus->irq_line); /* while it runs, `close` may come */
        if (!tell)
            continue;
        PyObject *done = c->is_msi ? PyObject_CallFunction(tell, "KI", (unsigned long long)c->address, c->gsi_or_data)
                                   : PyObject_CallFunction(tell, "IO", c->gsi_or_data, c->level ? Py_True : Py_False);
        Py_DECREF(tell);
        if (!done)
            return false;
        Py_DECREF(done);
    }
    return true;
}

static u64 given_now(void *context) { return *(u64 *)context; }

/* In nanoseconds, as Python has it, 0 on a closed bus; false where that raised. */
static bool ask_now(struct chip *chip, u64 *now)
{
    *now = 0;
    PyObject *ask = chip->kind->timed ? Py_XNewRef(chip->bus->now) : NULL;
    if (!ask)
        return true;
    PyObject *asked = PyObject_CallNoArgs(ask);
    Py_DECREF(ask);
    if (!asked)
        return false;
    *now = PyLong_AsUnsignedLongLong(asked);
    Py_DECREF(asked);
    return !(*now == (u64)-1 && PyErr_Occurred());
}

bool chip_numbers(PyObject *const *args, Py_ssize_t given, u64 *into, Py_ssize_t count)
{
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "%zd numbers", count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        into[i] = PyLong_AsUnsignedLongLong(args[i]);
        if (into[i] == (u64)-1 && PyErr_Occurred())
            return false;
    }
    return true;
}

PyObject *bus_done(struct bus *bus)
{
    return bus_leave(bus) ? Py_NewRef(Py_None) : NULL;
}

static bool good_size(u64 size)
{
    if (size >= 1 && size <= 8)
        return true;
    PyErr_SetString(PyExc_ValueError, "an access of 1 to 8 bytes");
    return false;
}

PyObject *chip_read(struct chip *chip, PyObject *const *args, Py_ssize_t count)
{
    u64 n[3], now;
    if (!chip_numbers(args, count, n, 3) || !good_size(n[2]) || !ask_now(chip, &now))
        return NULL;
    struct bus_access a = {.size = (u8)n[2], .now = given_now, .context = &now};
    chip_enter(chip);
    bool done = chip->kind->access(chip, &a, (unsigned)n[0], n[1]);
    if (!bus_leave(chip->bus))
        return NULL;
    if (!done)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(a.value & ones(a.size));
}

PyObject *chip_write(struct chip *chip, PyObject *const *args, Py_ssize_t count)
{
    u64 n[4], now;
    if (!chip_numbers(args, count, n, 4) || !good_size(n[2]) || !ask_now(chip, &now))
        return NULL;
    struct bus_access a = {.write = true, .size = (u8)n[2], .value = n[3], .now = given_now, .context = &now};
    chip_enter(chip);
    bool done = chip->kind->access(chip, &a, (unsigned)n[0], n[1]);
    if (!bus_leave(chip->bus))
        return NULL;
    return PyBool_FromLong(done);
}

static PyObject *bus_line(struct bus *self, PyObject *args)
{
    unsigned device, gsi;
    int level;
    if (!PyArg_ParseTuple(args, "IIp", &device, &gsi, &level))
        return NULL;
    if (device >= DEVICES || gsi >= LINES) {
        PyErr_Format(PyExc_ValueError, "device %u or line %u is none", device, gsi);
        return NULL;
    }
    bus_enter(self);
    bus_set_line(self, device, gsi, level);
    return bus_done(self);
}

static PyObject *bus_drop_lines(struct bus *self, PyObject *args)
{
    unsigned device;
    if (!PyArg_ParseTuple(args, "I", &device))
        return NULL;
    if (device >= DEVICES)
        return PyErr_Format(PyExc_ValueError, "device %u is none", device);
    bus_enter(self);
    for (unsigned gsi = 0; gsi < LINES; gsi++)
        bus_set_line(self, device, gsi, false);
    for (unsigned pirq = 0; pirq < PIRQS; pirq++)
        self->pirq_holders[pirq] &= ~(1ull << device);
    self->lines_touched = true;
    return bus_done(self);
}

static PyObject *bus_route(struct bus *self, PyObject *args)
{
    unsigned pirq, line;
    if (!PyArg_ParseTuple(args, "II", &pirq, &line))
        return NULL;
    if (pirq >= PIRQS || line >= LINES)
        return PyErr_Format(PyExc_ValueError, "PIRQ %u or line %u is none", pirq, line);
    bus_enter(self);
    route_pirq(self, pirq, line);
    return bus_done(self);
}

static void forget_map(struct bus *bus)
{
    for (unsigned i = PLACE_FIRST; i < PLACES && bus->places[i].length; i++) {
        struct place *place = &bus->places[i];
        if (place->start < PORTS && bus->ports[place->start] == i)
            memset(bus->ports + place->start, PLACE_NOBODY, place->length);
        Py_XDECREF((PyObject *)place->chip);
        *place = (struct place){0};
    }
    bus->memory_count = 0;
}

static PyObject *bus_set_map(struct bus *self, PyObject *windows)
{
    struct place places[PLACES];
    bool memory[PLACES];
    unsigned count = 0;
    const struct module_state *state = PyType_GetModuleState(Py_TYPE(self));
    PyObject *rows = PySequence_Tuple(windows);
    if (!rows)
        return NULL;
    if (PyTuple_GET_SIZE(rows) > PLACES - PLACE_FIRST) {
        PyErr_Format(PyExc_ValueError, "%zd windows are too many", PyTuple_GET_SIZE(rows));
        goto failed;
    }
    for (; count < PyTuple_GET_SIZE(rows); count++) {
        struct place *place = &places[count];
        PyObject *chip;
        int is_memory;
        unsigned long long start, length;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(rows, count), "pKKOI", &is_memory, &start, &length, &chip, &place->region))
            goto failed;
        if (!length || (!is_memory && (start >= PORTS || length > PORTS - start))) {
            PyErr_Format(PyExc_ValueError, "there is no window of %llu at %llu", length, start);
            goto failed;
        }
        if (chip != Py_None && !is_chip(state, chip)) {
            PyErr_SetString(PyExc_TypeError, "a chip, or None");
            goto failed;
        }
        place->start = start, place->length = length, memory[count] = is_memory;
        place->chip = chip == Py_None ? NULL : (struct chip *)chip;
    }
    bus_enter(self);
    forget_map(self);
    for (unsigned i = 0; i < count; i++) {
        unsigned number = i + PLACE_FIRST;
        self->places[number] = places[i];
        Py_XINCREF((PyObject *)places[i].chip);
        if (memory[i])
            self->memory_places[self->memory_count++] = (u8)number;
        else
            memset(self->ports + places[i].start, (int)number, places[i].length);
    }
    Py_DECREF(rows);
    return bus_done(self);
failed:
    Py_DECREF(rows);
    return NULL;
}

static PyObject *bus_advance_to(struct bus *self, PyObject *argument)
{
    u64 now;
    if (!chip_numbers(&argument, 1, &now, 1))
        return NULL;
    advance(&self->face, now);
    bus_enter(self);
    return bus_done(self);
}

static PyObject *bus_due(struct bus *self, void *ignored)
{
    u64 due = atomic_load(&self->face.due);
    if (due == BUS_NEVER)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(due);
}

static PyObject *bus_note_unclaimed(struct bus *self, PyObject *args)
{
    int memory, write;
    unsigned long long address, rip;
    if (!PyArg_ParseTuple(args, "pKKp", &memory, &address, &rip, &write))
        return NULL;
    bus_enter(self);
    note_unclaimed(self, memory, address, rip, write);
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static int by_use(const void *a, const void *b)
{
    u64 x = ((const struct unclaimed *)a)->used, y = ((const struct unclaimed *)b)->used;
    return (x > y) - (x < y);
}

static PyObject *bus_list_unclaimed(struct bus *self, PyObject *ignored)
{
    struct unclaimed rows[UNCLAIMED_MOST];
    bus_enter(self);
    unsigned count = self->unclaimed_count;
    u64 forgotten = self->forgotten;
    memcpy(rows, self->unclaimed, count * sizeof *rows);
    pthread_mutex_unlock(&self->lock);
    qsort(rows, count, sizeof *rows, by_use);
    PyObject *list = PyList_New(0);
    for (unsigned i = 0; list && i < count; i++) {
        PyObject *row = Py_BuildValue("(OKKKK)", rows[i].memory ? Py_True : Py_False, (unsigned long long)rows[i].address,
                                      (unsigned long long)rows[i].reads, (unsigned long long)rows[i].writes,
                                      (unsigned long long)rows[i].rip);
        if (!row || PyList_Append(list, row))
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list ? Py_BuildValue("(NK)", list, (unsigned long long)forgotten) : NULL;
}

static PyObject *bus_load_unclaimed(struct bus *self, PyObject *args)
{
    struct unclaimed loaded[UNCLAIMED_MOST];
    PyObject *rows;
    unsigned long long forgotten;
    if (!PyArg_ParseTuple(args, "O!K", &PyTuple_Type, &rows, &forgotten))
        return NULL;
    if (PyTuple_GET_SIZE(rows) > UNCLAIMED_MOST)
        return PyErr_Format(PyExc_ValueError, "up to %d rows", UNCLAIMED_MOST);
    unsigned count = (unsigned)PyTuple_GET_SIZE(rows);
    for (unsigned i = 0; i < count; i++) {
        int memory;
        unsigned long long address, reads, writes, rip;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(rows, i), "pKKKK", &memory, &address, &reads, &writes, &rip))
            return NULL;
        loaded[i] = (struct unclaimed){address, reads, writes, rip, 0, memory};
    }
    bus_enter(self);
    for (unsigned i = 0; i < count; i++) {
        loaded[i].used = ++self->unclaimed_uses;
        self->unclaimed[i] = loaded[i];
    }
    self->unclaimed_count = count;
    self->unclaimed_last = 0;
    self->forgotten = forgotten;
    self->uses_told = self->unclaimed_uses;
    self->lines_touched = true;
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *bus_take_uses(struct bus *self, PyObject *ignored)
{
    bus_enter(self);
    u64 uses = self->unclaimed_uses - self->uses_told;
    self->uses_told = self->unclaimed_uses;
    pthread_mutex_unlock(&self->lock);
    return PyLong_FromUnsignedLongLong(uses);
}

static PyObject *bus_holders(struct bus *self, PyObject *ignored)
{
    PyObject *list = PyList_New(LINES);
    for (unsigned i = 0; list && i < LINES; i++) {
        PyObject *bits = PyLong_FromUnsignedLongLong(self->holders[i]);
        if (!bits)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, bits);
    }
    return list;
}

static PyObject *bus_pirqs(struct bus *self, PyObject *ignored)
{
    PyObject *list = PyList_New(0);
    for (unsigned i = 0; list && i < PIRQS; i++) {
        PyObject *row = Py_BuildValue("(KI)", (unsigned long long)self->pirq_holders[i], self->pirq_line[i]);
        if (!row || PyList_Append(list, row))
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *bus_hold(struct bus *self, PyObject *args)
{
    u64 holders[LINES];
    unsigned long long pirq_holders[PIRQS];
    unsigned line[PIRQS];
    PyObject *list, *pirqs;
    if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &list, &PyList_Type, &pirqs) ||
        !chip_numbers(((PyListObject *)list)->ob_item, PyList_GET_SIZE(list), holders, LINES))
        return NULL;
    for (Py_ssize_t i = 0; i < PIRQS; i++) {
        PyObject *row = i < PyList_GET_SIZE(pirqs) ? PyList_GET_ITEM(pirqs, i) : Py_None;
        if (!PyTuple_Check(row) || !PyArg_ParseTuple(row, "KI", &pirq_holders[i], &line[i]) || line[i] >= LINES)
            return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "who holds each of %d inputs, and a line", PIRQS);
    }
    bus_enter(self);
    for (unsigned i = 0; i < PIRQS; i++)
        self->pirq_holders[i] = pirq_holders[i], self->pirq_line[i] = (u8)line[i];
    memcpy(self->holders, holders, sizeof holders);
    self->lines_touched = true;
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

/* ---- What may have changed ------------------------------------------------------------------------------------------------------ */

static PyObject *bus_touch(struct bus *self, PyObject *argument)
{
    u64 device;
    if (!chip_numbers(&argument, 1, &device, 1))
        return NULL;
    if (device >= DEVICES)
        return PyErr_Format(PyExc_ValueError, "device %llu is none", (unsigned long long)device);
    bus_enter(self);
    self->touched |= 1ull << device;
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *bus_get_touched(struct bus *self, PyObject *ignored)
{
    bus_enter(self);
    u64 touched = self->touched;
    bool lines = self->lines_touched;
    pthread_mutex_unlock(&self->lock);
    return Py_BuildValue("(KO)", (unsigned long long)touched, lines ? Py_True : Py_False);
}

static PyObject *bus_forget_touched(struct bus *self, PyObject *ignored)
{
    bus_enter(self);
    self->touched = 0, self->lines_touched = false;
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

/* ---- What Python is to fetch ------------------------------------------------------------------------------------------------------ */

static void futex(_Atomic u32 *word, int how, u32 value)
{
    syscall(SYS_futex, word, how | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

void bus_ring(struct bus *bus)
{
    if (atomic_exchange(&bus->rung, 1) == 0 && atomic_load(&bus->sleeps))
        futex(&bus->rung, FUTEX_WAKE, 1);
}

static PyObject *bus_wait(struct bus *self, PyObject *args)
{
    double nap;
    if (!PyArg_ParseTuple(args, "d", &nap))
        return NULL;
    struct timespec t = {0, (long)((nap < 0 ? 0 : nap > 0.9 ? 0.9 : nap) * SECOND)};
    Py_BEGIN_ALLOW_THREADS
    if (t.tv_nsec)
        nanosleep(&t, NULL); /* what comes in a row is fetched at once */
    while (!atomic_exchange(&self->rung, 0)) {
        atomic_store(&self->sleeps, 1);
        if (!atomic_load(&self->rung))
            futex(&self->rung, FUTEX_WAIT, 0);
        atomic_store(&self->sleeps, 0);
    }
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(!self->closed);
}

static void forget_board(struct bus *bus)
{
    Py_CLEAR(bus->irq_line);
    Py_CLEAR(bus->signal_msi);
    Py_CLEAR(bus->now);
}

/* Its chips have it, and no garbage collector sees that: a bus that kept its board would keep it for ever. */
static PyObject *bus_close(struct bus *self, PyObject *ignored)
{
    forget_board(self);
    bus_enter(self);
    self->closed = true;
    self->change_count = 0;
    pthread_mutex_unlock(&self->lock);
    bus_ring(self);
    Py_RETURN_NONE;
}

/* ---- The type ------------------------------------------------------------------------------------------------------------------------ */

static void release_capsule(PyObject *capsule) { Py_XDECREF((PyObject *)PyCapsule_GetContext(capsule)); }

static PyObject *bus_capsule(struct bus *self, void *ignored)
{
    PyObject *capsule = PyCapsule_New(&self->face, FAST_BUS, release_capsule);
    if (capsule && PyCapsule_SetContext(capsule, self) == 0)
        Py_INCREF(self);
    return capsule;
}

static PyObject *bus_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *irq_line, *signal_msi, *now;
    if (!PyArg_ParseTuple(args, "OOO", &irq_line, &signal_msi, &now))
        return NULL;
    struct bus *self = (struct bus *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->face.access = access_bus;
    self->face.string = string_bus;
    self->face.due = BUS_NEVER;
    self->face.advance = advance;
    self->face.can_send_unmaskable = can_send_unmaskable;
    self->face.attach = attach;
    self->face.detach = detach;
    pthread_mutex_init(&self->lock, NULL);
    self->irq_line = Py_NewRef(irq_line);
    self->signal_msi = Py_NewRef(signal_msi);
    self->now = Py_NewRef(now);
    self->places = calloc(PLACES, sizeof *self->places);
    self->ports = calloc(PORTS, 1);
    self->unclaimed = calloc(UNCLAIMED_MOST, sizeof *self->unclaimed);
    if (!self->places || !self->ports || !self->unclaimed) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static int bus_traverse(struct bus *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->irq_line);
    Py_VISIT(self->signal_msi);
    Py_VISIT(self->now);
    for (unsigned i = 0; self->places && i < PLACES; i++)
        Py_VISIT((PyObject *)self->places[i].chip);
    return 0;
}

static int bus_clear(struct bus *self)
{
    forget_board(self);
    if (self->places)
        forget_map(self);
    return 0;
}

static void bus_dealloc(struct bus *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    bus_clear(self);
    free(self->places);
    free(self->ports);
    free(self->unclaimed);
    pthread_mutex_destroy(&self->lock);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef bus_methods[] = {
    {"set_line", (PyCFunction)bus_line, METH_VARARGS, "set_line(device, gsi, level): a line is high while any device holds it high"},
    {"drop_lines", (PyCFunction)bus_drop_lines, METH_VARARGS, "drop_lines(device): it holds none"},
    {"route_pirq", (PyCFunction)bus_route, METH_VARARGS, "route_pirq(input, line): where that of the PCI router goes; 0: nowhere"},
    {"set_map", (PyCFunction)bus_set_map, METH_O,
     "set_map([(is_memory, start, length, chip or None, region)]): what answers where; None: Python. Nothing, elsewhere"},
    {"advance", (PyCFunction)bus_advance_to, METH_O, "advance(now): do what is due"},
    {"note_unclaimed", (PyCFunction)bus_note_unclaimed, METH_VARARGS, "note_unclaimed(is_memory, address, rip, is_write)"},
    {"unclaimed", (PyCFunction)bus_list_unclaimed, METH_NOARGS,
     "unclaimed() -> ([(is_memory, address, reads, writes, rip)], forgotten): the one last used at the end"},
    {"load_unclaimed", (PyCFunction)bus_load_unclaimed, METH_VARARGS, "load_unclaimed(rows, forgotten): as `unclaimed` gives them"},
    {"take_uses", (PyCFunction)bus_take_uses, METH_NOARGS,
     "take_uses() -> how many accesses nobody has claimed since this was last asked"},
    {"holders", (PyCFunction)bus_holders, METH_NOARGS, "holders() -> of each line the devices that hold it high, a bit each"},
    {"pirqs", (PyCFunction)bus_pirqs, METH_NOARGS, "pirqs() -> [(holders, line)]: the inputs of the PCI router"},
    {"hold", (PyCFunction)bus_hold, METH_VARARGS, "hold(holders, pirqs): they hold the lines, as the engine knows already"},
    {"touch", (PyCFunction)bus_touch, METH_O, "touch(device): it may be another than it was"},
    {"touched", (PyCFunction)bus_get_touched, METH_NOARGS,
     "touched() -> (a bit a device that may be another than it was when this was last forgotten, whether the lines, or what nobody\n"
     "has claimed, may be)"},
    {"forget_touched", (PyCFunction)bus_forget_touched, METH_NOARGS, "forget_touched(): nothing is touched"},
    {"wait", (PyCFunction)bus_wait, METH_VARARGS,
     "wait(nap) -> bool: after `nap` seconds, until there is something to fetch; False: closed. One thread at a time"},
    {"close", (PyCFunction)bus_close, METH_NOARGS, "close(): nothing is answered, and nobody waits, from now on"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef bus_attributes[] = {
    {"due", (getter)bus_due, NULL, "when `advance` is to be called, or None", NULL},
    {"capsule", (getter)bus_capsule, NULL, "for an engine (vmfs/words/bus.h)", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot bus_slots[] = {
    {Py_tp_doc, "Bus(irq_line, signal_msi, now): a board's, for its chips and its engine. `irq_line(gsi, level)` and\n"
                "`signal_msi(address, data)` are called while no engine is attached; `now()` is the guest's time."},
    {Py_tp_new, bus_new}, {Py_tp_dealloc, bus_dealloc}, {Py_tp_traverse, bus_traverse}, {Py_tp_clear, bus_clear},
    {Py_tp_methods, bus_methods}, {Py_tp_getset, bus_attributes}, {0, NULL},
};
PyType_Spec bus_spec = {"vmfs.devices._chips.Bus", sizeof(struct bus), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, bus_slots};
