/* The registers of an AHCI controller that a driver uses for each command (AHCI 1.3.1, 3.1 and 3.3): interrupt status and enables, of the
 * controller and of its ports, and what reads tell of the commands that are under way.
 *
 * What is under way is Python's: while it changes that of a port it `hide`s it, and accesses to it are Python's, until it `show`s it. */
#include "module.h"
#include "pci.h"

enum { AHCI_PORTS = 6, FIRST_PORT = 0x100, PORT_BYTES = 0x80, ABAR = 5 };
enum { GHC = 0x04, IS = 0x08, GHC_IE = 1 << 1 };
#define GHC_AE (1u << 31)
enum { PORT_IS = 0x10, PORT_IE = 0x14, PORT_SACT = 0x34, PORT_CI = 0x38 };
#define CLEARED 0xfdc000afu     /* by a write of ones to PxIS: not UFS and PCS, which follow PxSERR */
#define ENABLES 0xfdc000ffu
#define PCS (1u << 6)

struct ahci_port { u32 status, enable, issued, active; bool exchanged, shown; };
struct ahci { struct chip chip; struct function *function; u32 interrupts; bool enabled; struct ahci_port ports[AHCI_PORTS]; };

static u32 status_of(const struct ahci_port *p) { return p->status | (p->exchanged ? PCS : 0); }

static u32 raised_by(const struct ahci *h)
{
    u32 raised = 0;
    for (unsigned i = 0; i < AHCI_PORTS; i++)
        raised |= (u32)!!(status_of(&h->ports[i]) & h->ports[i].enable) << i;
    return raised;
}

/* Whether there is a new interrupt. */
static bool drive(struct ahci *h)
{
    u32 raised = raised_by(h);
    bool is_new = raised & ~h->interrupts;
    h->interrupts |= raised;
    bool level = h->enabled && h->interrupts, sends = level && is_new;
    if (sends && function_has_messages(h->function))
        function_signal(h->function, 0);
    h->function->pending = level;
    function_drive(h->function);
    return sends;
}

/* A write that raises an interrupt is Python's: where time follows the instructions none may come by this way. */
static bool ahci_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct ahci *h = (struct ahci *)chip;
    if (region != ABAR || a->size != 4 || offset % 4)
        return false;
    if (offset < FIRST_PORT) {
        if (offset != IS && (offset != GHC || a->write))
            return false;
        if (!a->write) {
            a->value = offset == IS ? h->interrupts : GHC_AE | (h->enabled ? GHC_IE : 0);
            return true;
        }
        if (raised_by(h) & (u32)a->value)
            return false;
        h->interrupts &= ~(u32)a->value;
        drive(h);
        return true;
    }
    u64 number = (offset - FIRST_PORT) / PORT_BYTES;
    if (number >= AHCI_PORTS)
        return false;
    struct ahci_port *p = &h->ports[number];
    u64 at = (offset - FIRST_PORT) % PORT_BYTES;
    if (at == PORT_IS && a->write)
        p->status &= ~((u32)a->value & CLEARED);
    else if (at == PORT_IE && a->write && !(status_of(p) & (u32)a->value & ENABLES))
        p->enable = (u32)a->value & ENABLES;
    else if (at == PORT_IS)
        a->value = status_of(p);
    else if (at == PORT_IE && !a->write)
        a->value = p->enable;
    else if ((at == PORT_CI || at == PORT_SACT) && !a->write && p->shown)
        a->value = at == PORT_CI ? p->issued : p->active;
    else
        return false;
    if (a->write)
        drive(h);
    return true;
}
static const struct chip_kind ahci_kind = {.access = ahci_access};

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static PyObject *ahci_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus, *function;
    unsigned number;
    const struct module_state *state = PyType_GetModuleState(type);
    if (!PyArg_ParseTuple(args, "OIO!", &bus, &number, state->types[TYPE_FUNCTION], &function))
        return NULL;
    struct ahci *self = (struct ahci *)chip_new(type, &ahci_kind, bus, number);
    if (self)
        self->function = (struct function *)Py_NewRef(function);
    return (PyObject *)self;
}

static void ahci_dealloc(struct ahci *self)
{
    Py_XDECREF((PyObject *)self->function);
    chip_dealloc(&self->chip);
}

/* Numbers of which the first is a port's; NULL with an exception. */
static struct ahci_port *numbers(struct ahci *self, PyObject *const *args, Py_ssize_t given, u64 *into, Py_ssize_t count)
{
    if (!chip_numbers(args, given, into, count))
        return NULL;
    if (into[0] < AHCI_PORTS)
        return &self->ports[into[0]];
    PyErr_Format(PyExc_ValueError, "there are %d ports", AHCI_PORTS);
    return NULL;
}

static PyObject *ahci_show(struct ahci *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[3];
    struct ahci_port *p = numbers(self, args, count, n, 3);
    if (!p)
        return NULL;
    chip_enter(&self->chip);
    p->issued = (u32)n[1], p->active = (u32)n[2], p->shown = true;
    return bus_done(self->chip.bus);
}

static PyObject *ahci_hide(struct ahci *self, PyObject *argument)
{
    u64 n[1];
    struct ahci_port *p = numbers(self, &argument, 1, n, 1);
    if (!p)
        return NULL;
    chip_enter(&self->chip);
    p->shown = false;
    return bus_done(self->chip.bus);
}

static PyObject *driven(struct ahci *self)
{
    bool is_new = drive(self);
    return bus_leave(self->chip.bus) ? PyBool_FromLong(is_new) : NULL;
}

static PyObject *ahci_raise(struct ahci *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    struct ahci_port *p = numbers(self, args, count, n, 2);
    if (!p)
        return NULL;
    chip_enter(&self->chip);
    p->status |= (u32)n[1];
    return driven(self);
}

static PyObject *ahci_set_exchanged(struct ahci *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    struct ahci_port *p = numbers(self, args, count, n, 2);
    if (!p)
        return NULL;
    chip_enter(&self->chip);
    p->exchanged = n[1];
    return driven(self);
}

static PyObject *ahci_enable(struct ahci *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    struct ahci_port *p = numbers(self, args, count, n, 2);
    if (!p)
        return NULL;
    chip_enter(&self->chip);
    p->enable = (u32)n[1] & ENABLES;
    return driven(self);
}

static PyObject *ahci_enable_all(struct ahci *self, PyObject *argument)
{
    int enabled = PyObject_IsTrue(argument);
    if (enabled < 0)
        return NULL;
    chip_enter(&self->chip);
    self->enabled = enabled;
    return driven(self);
}

static PyObject *ahci_clear(struct ahci *self, PyObject *argument)
{
    u64 bits;
    if (!chip_numbers(&argument, 1, &bits, 1))
        return NULL;
    chip_enter(&self->chip);
    self->interrupts &= ~(u32)bits;
    return driven(self);
}

static PyObject *ahci_port(struct ahci *self, PyObject *argument)
{
    u64 n[1];
    const struct ahci_port *p = numbers(self, &argument, 1, n, 1);
    return p ? Py_BuildValue("(II)", p->status, p->enable) : NULL;
}

static PyObject *ahci_set_port(struct ahci *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[4];
    struct ahci_port *p = numbers(self, args, count, n, 4);
    if (!p)
        return NULL;
    chip_enter(&self->chip);
    p->status = (u32)n[1] & CLEARED, p->enable = (u32)n[2] & ENABLES, p->exchanged = n[3];
    return bus_done(self->chip.bus);
}

static PyObject *ahci_all(struct ahci *self, PyObject *ignored)
{
    return Py_BuildValue("(IO)", self->interrupts, self->enabled ? Py_True : Py_False);
}

static PyObject *ahci_set_all(struct ahci *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    if (!chip_numbers(args, count, n, 2))
        return NULL;
    chip_enter(&self->chip);
    self->interrupts = (u32)n[0], self->enabled = n[1];
    return bus_done(self->chip.bus);
}

#define FAST(name) (PyCFunction)(void (*)(void))name, METH_FASTCALL
static PyMethodDef ahci_methods[] = {
    CHIP_METHODS,
    {"show", FAST(ahci_show), "show(port, issued, active): PxCI and PxSACT, which are answered here"},
    {"hide", (PyCFunction)ahci_hide, METH_O, "hide(port): what it has under way is about to change"},
    {"interrupt", FAST(ahci_raise), "interrupt(port, bits) -> bool: set bits of PxIS; whether that is a new interrupt, as of all that follow"},
    {"set_exchanged", FAST(ahci_set_exchanged), "set_exchanged(port, whether) -> bool: PxSERR.DIAG.X"},
    {"enable", FAST(ahci_enable), "enable(port, bits) -> bool: PxIE"},
    {"enable_all", (PyCFunction)ahci_enable_all, METH_O, "enable_all(whether) -> bool: GHC.IE"},
    {"clear", (PyCFunction)ahci_clear, METH_O, "clear(bits) -> bool: of IS"},
    {"port", (PyCFunction)ahci_port, METH_O, "port(port) -> (PxIS, PxIE)"},
    {"set_port", FAST(ahci_set_port), "set_port(port, PxIS, PxIE, exchanged): without an interrupt"},
    {"all", (PyCFunction)ahci_all, METH_NOARGS, "all() -> (IS, GHC.IE)"},
    {"set_all", FAST(ahci_set_all), "set_all(IS, GHC.IE): without an interrupt"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot ahci_slots[] = {
    {Py_tp_doc, "Ahci(bus, device, function): interrupts of an AHCI controller, and what its ports have under way."},
    {Py_tp_new, ahci_new}, {Py_tp_dealloc, ahci_dealloc}, {Py_tp_methods, ahci_methods}, {0, NULL},
};
PyType_Spec ahci_spec = {"vmfs.devices._chips.Ahci", sizeof(struct ahci), 0, Py_TPFLAGS_DEFAULT, ahci_slots};
