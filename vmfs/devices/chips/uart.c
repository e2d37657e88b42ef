/* 16550A UART (National Semiconductor PC16550D data sheet), and a port that only sends. vmfs/devices/serial.py says what there is
 * of a line's speed and of flow control.
 *
 * What is sent waits in a ring until Python fetches it, which the bell of the bus tells it to. Where the ring is full, the write
 * is Python's: it fetches, and writes again. */
#include "module.h"

enum { FIFO = 16, LOOKS = 16, SENT_ROOM = 1 << 14, ROOM = 4096 /* that wait; a writer waits for less */ };
enum { RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR, THR = RBR, FCR = IIR };
enum { IER_RX = 1, IER_THRE = 2, IER_LINE = 4, IER_MODEM = 8 };
enum { LSR_DR = 1, LSR_OE = 2, LSR_THRE = 0x20, LSR_TEMT = 0x40 };
enum { MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 16 };
enum { MSR_READY = 0xb0 /* CTS, DSR, DCD: somebody is at the other end */ };
enum { DLAB = 0x80 };

/* ---- What was sent -------------------------------------------------------------------------------------------------------------- */

struct sent { u8 *data; u32 head, count; u64 total; };

static bool sent_new(struct sent *s)
{
    s->data = malloc(SENT_ROOM);
    return s->data || PyErr_NoMemory();
}

static bool send_byte(struct bus *bus, struct sent *s, u8 byte)
{
    if (s->count == SENT_ROOM)
        return false;
    s->data[(s->head + s->count++) % SENT_ROOM] = byte;
    s->total++;
    bus_ring(bus);
    return true;
}

static PyObject *take_sent(struct chip *chip, struct sent *s)
{
    u8 copy[SENT_ROOM];
    bus_enter(chip->bus);
    if (s->count)
        chip_touched(chip);
    u32 count = s->count, first = SENT_ROOM - s->head < count ? SENT_ROOM - s->head : count;
    memcpy(copy, s->data + s->head, first);
    memcpy(copy + first, s->data, count - first);
    s->head = (s->head + count) % SENT_ROOM;
    s->count = 0;
    pthread_mutex_unlock(&chip->bus->lock);
    return PyBytes_FromStringAndSize((const char *)copy, count);
}

/* ---- Sender: what is written is sent, and reads give a byte ---------------------------------------------------------------------- */

struct sender {
    struct chip chip;
    struct sent sent;
    u8 answer;
};

static bool sender_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct sender *s = (struct sender *)chip;
    if (a->write)
        return send_byte(chip->bus, &s->sent, (u8)a->value);
    a->value = s->answer;
    return true;
}
static const struct chip_kind sender_kind = {sender_access};

static PyObject *sender_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus;
    unsigned number;
    u8 answer;
    if (!PyArg_ParseTuple(args, "OIb", &bus, &number, &answer))
        return NULL;
    struct sender *self = (struct sender *)chip_new(type, &sender_kind, bus, number);
    if (!self)
        return NULL;
    self->answer = answer;
    if (!sent_new(&self->sent))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void sender_dealloc(struct sender *self)
{
    free(self->sent.data);
    chip_dealloc(&self->chip);
}

static PyObject *sender_take(struct sender *self, PyObject *ignored) { return take_sent(&self->chip, &self->sent); }

static PyObject *sender_take_count(struct sender *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    u64 total = self->sent.total;
    self->sent.total = 0;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return PyLong_FromUnsignedLongLong(total);
}

static PyMethodDef sender_methods[] = {
    CHIP_METHODS,
    {"take", (PyCFunction)sender_take, METH_NOARGS, "take() -> bytes: what was sent since the last time"},
    {"take_count", (PyCFunction)sender_take_count, METH_NOARGS, "take_count() -> how many they were since this was last asked"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot sender_slots[] = {
    {Py_tp_doc, "Sender(bus, device, answer): a port of a debug console."}, {Py_tp_new, sender_new},
    {Py_tp_dealloc, sender_dealloc}, {Py_tp_methods, sender_methods}, {0, NULL},
};
PyType_Spec sender_spec = {"vmfs.devices._chips.Sender", sizeof(struct sender), 0, Py_TPFLAGS_DEFAULT, sender_slots};

/* ---- UART ------------------------------------------------------------------------------------------------------------------------ */

struct uart {
    struct chip chip;
    unsigned gsi;
    u8 ier, lcr, mcr, scr, fcr;
    u16 divisor;
    u8 rbr;                     /* the byte that was read last: without a FIFO it stays in the register */
    bool overrun;
    bool thre;                  /* the transmitter became empty, which the guest has not seen yet */
    u8 delta;                   /* changes of the modem lines, in loopback */
    u8 looks;                   /* of the guest for data, since it has cleared the FIFO */
    u8 fifo[FIFO];
    unsigned fifo_count;
    struct bytes waiting;       /* with room for what is in the FIFO */
    struct sent sent;
    u64 received;
    bool took;                  /* `waiting` got shorter, and Python does not know */
};

static bool has_fifo(const struct uart *u) { return u->fcr & 1; }
static unsigned capacity(const struct uart *u) { return has_fifo(u) ? FIFO : 1; }

static u8 fifo_pop(struct uart *u)
{
    u8 byte = u->fifo[0];
    memmove(u->fifo, u->fifo + 1, --u->fifo_count);
    return byte;
}

/* IIR's identification, by priority; 1 for none. */
static u8 cause(const struct uart *u)
{
    static const u8 triggers[4] = {1, 4, 8, 14};
    if (u->ier & IER_LINE && u->overrun)
        return 6;
    if (u->ier & IER_RX && u->fifo_count) /* below the trigger a real one waits four characters' time: at no speed, none */
        return u->fifo_count >= (has_fifo(u) ? triggers[u->fcr >> 6] : 1) ? 4 : 12;
    if (u->ier & IER_THRE && u->thre)
        return 2;
    if (u->ier & IER_MODEM && u->delta)
        return 0;
    return 1;
}

static void update(struct uart *u)
{
    /* OUT2 gates the interrupt on a PC's board. */
    bool level = u->mcr & MCR_OUT2 && !(u->mcr & MCR_LOOP) && cause(u) != 1;
    bus_set_line(u->chip.bus, u->chip.number, u->gsi, level);
}

static bool listens(const struct uart *u) { return u->looks >= LOOKS || u->mcr & MCR_RTS || u->ier & IER_RX; }

static void refill(struct uart *u)
{
    if (u->mcr & MCR_LOOP || !listens(u))
        return;
    size_t before = u->waiting.count;
    while (u->waiting.count && u->fifo_count < capacity(u))
        u->fifo[u->fifo_count++] = bytes_pop(&u->waiting);
    if (u->waiting.count == before)
        return;
    u->took = true;
    if (before >= ROOM && u->waiting.count < ROOM)
        bus_ring(u->chip.bus);
    update(u);
}

/* What is in the FIFO has not been sent yet. */
static void give_back(struct uart *u)
{
    while (u->fifo_count)
        bytes_push_front(&u->waiting, u->fifo[--u->fifo_count]);
}

/* Empty the FIFO; what was in it is still to come, except for what the guest has sent to itself. */
static void clear_fifo(struct uart *u)
{
    if (!(u->mcr & MCR_LOOP)) {
        give_back(u);
        u->looks = 0;
    }
    u->fifo_count = 0;
}

static void look(struct uart *u)
{
    if (u->looks < LOOKS && !u->fifo_count) {
        u->looks++;
        refill(u);
    }
}

static u8 modem(const struct uart *u)
{
    if (!(u->mcr & MCR_LOOP))
        return MSR_READY;
    return (u8)((u->mcr & MCR_RTS) << 3 | (u->mcr & MCR_DTR) << 5 | (u->mcr & MCR_OUT1) << 4 | (u->mcr & MCR_OUT2) << 4);
}

static u8 read_register(struct uart *u, unsigned offset)
{
    u8 value;
    switch (offset) {
    case RBR:
        if (u->lcr & DLAB)
            return (u8)u->divisor;
        if (u->fifo_count) {
            value = u->rbr = fifo_pop(u);
        } else {
            look(u);
            value = has_fifo(u) ? 0 : u->rbr;
        }
        refill(u);
        update(u);
        return value;
    case IER: return u->lcr & DLAB ? u->divisor >> 8 : u->ier;
    case IIR:
        value = cause(u);
        if (value == 2) {
            u->thre = false;
            update(u);
        }
        return value | (has_fifo(u) ? 0xc0 : 0);
    case LCR: return u->lcr;
    case MCR: return u->mcr;
    case LSR:
        value = LSR_THRE | LSR_TEMT | (u->fifo_count ? LSR_DR : 0) | (u->overrun ? LSR_OE : 0);
        u->overrun = false;
        look(u);
        update(u);
        return value;
    case MSR:
        value = modem(u) | u->delta;
        u->delta = 0;
        update(u);
        return value;
    default: return u->scr;
    }
}

static bool transmit(struct uart *u, u8 byte)
{
    if (!(u->mcr & MCR_LOOP)) {
        if (!send_byte(u->chip.bus, &u->sent, byte))
            return false;
    } else { /* "Overrun error": without FIFOs the newest byte takes the place of the one before, with them it is lost */
        if (u->fifo_count >= capacity(u)) {
            u->overrun = true;
            if (!has_fifo(u))
                u->fifo_count = 0;
        }
        if (u->fifo_count < FIFO)
            u->fifo[u->fifo_count++] = byte;
    }
    u->thre = true;
    return true;
}

static bool write_register(struct uart *u, unsigned offset, u8 value)
{
    u8 before;
    switch (offset) {
    case THR:
        if (u->lcr & DLAB) {
            u->divisor = (u16)((u->divisor & 0xff00) | value);
            return true;
        }
        if (!transmit(u, value))
            return false;
        break;
    case IER:
        if (u->lcr & DLAB) {
            u->divisor = (u16)((u->divisor & 0xff) | value << 8);
            return true;
        }
        if (value & IER_THRE && !(u->ier & IER_THRE))
            u->thre = true; /* enabling it with an empty transmitter makes the interrupt */
        u->ier = value & 15;
        refill(u);
        break;
    case FCR:
        if (value & 2 || (value ^ u->fcr) & 1)
            clear_fifo(u);
        u->fcr = value & 0xc9;
        refill(u);
        break;
    case LCR: u->lcr = value; break;
    case MCR:
        before = modem(u);
        u->mcr = value & 31;
        if (u->mcr & MCR_LOOP) {
            bool ring_fell = before & 0x40 && !(modem(u) & 0x40);
            u->delta |= ((before ^ modem(u)) >> 4 & 0xb) | (ring_fell ? 4 : 0);
        }
        refill(u);
        break;
    case SCR: u->scr = value; break;
    default: break;
    }
    update(u);
    return true;
}

static bool uart_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct uart *u = (struct uart *)chip;
    u64 value = 0;
    if (a->write && u->sent.count + a->size > SENT_ROOM) /* before any of its bytes, of which the bus of a PC makes one each */
        return false;
    for (unsigned i = 0; i < a->size; i++) {
        unsigned at = (unsigned)(offset + i) & 7;
        if (a->write)
            write_register(u, at, (u8)(a->value >> 8 * i));
        else
            value |= (u64)read_register(u, at) << 8 * i;
    }
    if (!a->write)
        a->value = value;
    return true;
}
static const struct chip_kind uart_kind = {uart_access};

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static void uart_clear(struct uart *u)
{
    u->ier = u->lcr = u->mcr = u->scr = u->fcr = u->rbr = u->delta = 0;
    u->divisor = 12; /* 9600 baud */
    u->overrun = u->thre = false;
    u->looks = LOOKS;
}

static PyObject *uart_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned gsi;
    struct uart *self = (struct uart *)chip_new_on_line(type, &uart_kind, args, &gsi);
    if (!self)
        return NULL;
    self->gsi = gsi;
    uart_clear(self);
    if (!sent_new(&self->sent))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void uart_dealloc(struct uart *self)
{
    free(self->sent.data);
    bytes_free(&self->waiting);
    chip_dealloc(&self->chip);
}

static PyObject *uart_reset(struct uart *self, PyObject *ignored)
{
    chip_enter(&self->chip);
    give_back(self);
    uart_clear(self);
    update(self);
    refill(self);
    return bus_done(self->chip.bus);
}

static PyObject *uart_receive(struct uart *self, PyObject *argument)
{
    Py_buffer data;
    if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE))
        return NULL;
    chip_enter(&self->chip);
    bool has_room = bytes_reserve(&self->waiting, (size_t)data.len + FIFO);
    for (Py_ssize_t i = 0; has_room && i < data.len; i++)
        bytes_push(&self->waiting, ((const u8 *)data.buf)[i]);
    if (has_room) {
        self->received += (u64)data.len;
        refill(self);
    }
    PyObject *done = bus_done(self->chip.bus);
    PyBuffer_Release(&data);
    if (!has_room) {
        Py_XDECREF(done);
        return PyErr_NoMemory();
    }
    return done;
}

static PyObject *uart_take(struct uart *self, PyObject *ignored) { return take_sent(&self->chip, &self->sent); }

static PyObject *uart_took(struct uart *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    bool took = self->took;
    self->took = false;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return PyBool_FromLong(took);
}

/* With the GIL alone a copy could be made of a moving ring. */
static PyObject *uart_waiting(struct uart *self, void *ignored)
{
    for (;;) {
        bus_enter(self->chip.bus);
        size_t count = self->waiting.count;
        pthread_mutex_unlock(&self->chip.bus->lock);
        PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)count);
        if (!bytes)
            return NULL;
        bus_enter(self->chip.bus);
        bool same = self->waiting.count == count;
        if (same)
            bytes_copy(&self->waiting, (u8 *)PyBytes_AS_STRING(bytes));
        pthread_mutex_unlock(&self->chip.bus->lock);
        if (same)
            return bytes;
        Py_DECREF(bytes);
    }
}

static PyObject *uart_state(struct uart *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    struct uart u = *self;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return Py_BuildValue("{sBsBsBsBsBsHsOsOsBsBsBsy#}", "ier", u.ier, "lcr", u.lcr, "mcr", u.mcr, "scr", u.scr, "fcr", u.fcr,
                         "divisor", u.divisor, "overrun", u.overrun ? Py_True : Py_False, "thre",
                         u.thre ? Py_True : Py_False, "delta", u.delta, "looks", u.looks,
                         "rbr", u.rbr, "fifo", u.fifo, (Py_ssize_t)u.fifo_count);
}

static PyObject *uart_load(struct uart *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ier", "lcr", "mcr", "scr", "fcr", "divisor", "overrun", "thre", "delta", "looks", "rbr", "fifo",
                            "waiting", NULL};
    struct uart u = {0};
    int divisor, overrun, thre;
    Py_buffer fifo, waiting;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "bbbbbippbbby*y*", names, &u.ier, &u.lcr, &u.mcr, &u.scr, &u.fcr, &divisor,
                                     &overrun, &thre, &u.delta, &u.looks, &u.rbr, &fifo, &waiting))
        return NULL;
    struct bytes more = {0};
    bool fits = fifo.len <= FIFO && divisor >= 0 && divisor <= 0xffff && bytes_reserve(&more, (size_t)waiting.len + FIFO);
    if (fits) {
        for (Py_ssize_t i = 0; i < waiting.len; i++)
            bytes_push(&more, ((const u8 *)waiting.buf)[i]);
        chip_enter(&self->chip);
        self->ier = u.ier & 15, self->lcr = u.lcr, self->mcr = u.mcr & 31, self->scr = u.scr, self->fcr = u.fcr & 0xc9;
        self->divisor = (u16)divisor, self->overrun = overrun, self->thre = thre, self->delta = u.delta & 15;
        self->looks = u.looks > LOOKS ? LOOKS : u.looks, self->rbr = u.rbr;
        memcpy(self->fifo, fifo.buf, (size_t)fifo.len);
        self->fifo_count = (unsigned)fifo.len;
        struct bytes old = self->waiting;
        self->waiting = more;
        update(self);
        if (!bus_leave(self->chip.bus))
            fits = false;
        bytes_free(&old);
    } else {
        PyErr_SetString(PyExc_ValueError, "a FIFO has 16 bytes, and a divisor 16 bits");
    }
    PyBuffer_Release(&fifo);
    PyBuffer_Release(&waiting);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyObject *uart_take_counts(struct uart *self, PyObject *ignored)
{
    bus_enter(self->chip.bus);
    u64 sent = self->sent.total, received = self->received;
    self->sent.total = self->received = 0;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return Py_BuildValue("(KK)", (unsigned long long)sent, (unsigned long long)received);
}

static PyMethodDef uart_methods[] = {
    CHIP_METHODS,
    {"reset", (PyCFunction)uart_reset, METH_NOARGS, "reset(): what was in the FIFO waits again"},
    {"receive", (PyCFunction)uart_receive, METH_O, "receive(bytes): they come in"},
    {"take", (PyCFunction)uart_take, METH_NOARGS, "take() -> bytes: what was sent since the last time"},
    {"take_counts", (PyCFunction)uart_take_counts, METH_NOARGS,
     "take_counts() -> (sent, received): how many bytes since this was last asked"},
    {"took", (PyCFunction)uart_took, METH_NOARGS, "took() -> bool: whether `waiting` got shorter since the last time"},
    {"state", (PyCFunction)uart_state, METH_NOARGS, "state() -> dict, without what waits"},
    {"load", (PyCFunction)(void (*)(void))uart_load, METH_VARARGS | METH_KEYWORDS, "load(**state, waiting=bytes)"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef uart_attributes[] = {
    {"waiting", (getter)uart_waiting, NULL, "the bytes that did not fit into the FIFO yet", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot uart_slots[] = {
    {Py_tp_doc, "Uart(bus, device, gsi)"}, {Py_tp_new, uart_new}, {Py_tp_dealloc, uart_dealloc}, {Py_tp_methods, uart_methods},
    {Py_tp_getset, uart_attributes}, {0, NULL},
};
PyType_Spec uart_spec = {"vmfs.devices._chips.Uart", sizeof(struct uart), 0, Py_TPFLAGS_DEFAULT, uart_slots};
