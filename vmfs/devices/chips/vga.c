/* VGA: the registers at ports 3B0 to 3DF, and the four planes of its memory as a CPU sees them through A0000-BFFFF.
 *
 * Planes lie byte by byte side by side: that of plane P at address A is byte 4 * A + P of the memory that is given. Where an access
 * would change how the CPU sees them (`layout`), it is Python's, which sets the engine's memory and then has it done (`put`).
 *
 * Source: IBM VGA XGA Technical Reference Manual (1992), chapter 2; FreeVGA project, "VGA chipset reference"; Inmos IMS G171 for the DAC. */
#include "vga.h"

static const u8 first_crtc[CRTC] = {0x5F, 0x4F, 0x50, 0x82, 0x55, 0x81, 0xBF, 0x1F, 0, 0x4F, 0x0D, 0x0E, 0, 0, 0, 0, 0x9C, 0x8E, 0x8F, 0x28, 0x1F, 0x96,
    0xB9, 0xA3, 0xFF};
static const u8 first_attributes[ATTRIBUTES] = {0, 1, 2, 3, 4, 5, 0x14, 7, 0x38, 0x39, 0x3A, 0x3B, 0x3C, 0x3D, 0x3E, 0x3F, 0x0C, 0, 0x0F, 8, 0};
enum { FRAME = SECOND / 60, RETRACE = FRAME / 10, STATUS_RETRACE = 8, STATUS_BLANK = 1 };
enum { REGION_PORTS = 6, REGION_REGISTERS = 2, REGION_MEMORY = 8, VGA_AT = 0x400, VGA_END = 0x420 };

/* ---- How the CPU sees the planes --------------------------------------------------------------------------------------------------- */

/* What of the registers says that: accesses to memory are as to RAM in two of them. */
unsigned vga_layout(const struct vga *v)
{
    const u8 *g = v->graphics, *s = v->sequencer;
    unsigned window = g[6] >> 2 & 3;
    bool plain = !(g[5] & 0x0B) && !(g[3] & 0x1F) && !(g[1] & 0x0F) && g[8] == 0xFF;
    if (s[4] & 8)
        return plain && (s[2] & 0x0F) == 0x0F && window < 2 ? LAYOUT_CHAINED : LAYOUT_PLANES | window;
    if (!(s[4] & 4) && g[5] & 0x10 && plain && (s[2] & 0x0F) == 3 && window >= 2)
        return window == 2 ? LAYOUT_TEXT_B0 : LAYOUT_TEXT_B8;
    return LAYOUT_PLANES | window;
}

static bool in_window(const struct vga *v, u64 *offset)
{
    static const struct { u32 start, size; } windows[] = {{0, 0x20000}, {0, 0x10000}, {0x10000, 0x8000}, {0x18000, 0x8000}};
    unsigned window = v->graphics[6] >> 2 & 3;
    *offset -= windows[window].start;
    return *offset < windows[window].size;
}

static u32 expand(unsigned bits) /* a byte a plane, of a bit each */
{
    return (bits & 1 ? 0xFF : 0) | (bits & 2 ? 0xFF00 : 0) | (bits & 4 ? 0xFF0000 : 0) | (bits & 8 ? 0xFF000000 : 0);
}

static u8 read_byte(struct vga *v, u64 offset)
{
    const u8 *g = v->graphics;
    unsigned plane = g[4] & 3;
    if (!in_window(v, &offset))
        return 0xFF;
    if (v->sequencer[4] & 8)
        plane = offset & 3, offset &= ~3ull;
    else if (g[5] & 0x10)
        plane = (plane & 2) | (offset & 1), offset &= ~1ull;
    memcpy(&v->latch, v->memory + 4 * (offset & 0xFFFF), 4);
    if (!(g[5] & 8))
        return v->latch >> 8 * plane;
    u32 other = (v->latch ^ expand(g[2])) & expand(g[7]);
    return ~(other | other >> 8 | other >> 16 | other >> 24);
}

static void write_byte(struct vga *v, u64 offset, u8 value)
{
    const u8 *g = v->graphics;
    unsigned planes = v->sequencer[2] & 0x0F, rotate = g[3] & 7;
    if (!in_window(v, &offset))
        return;
    if (v->sequencer[4] & 8)
        planes &= 1u << (offset & 3), offset &= ~3ull;
    else if (!(v->sequencer[4] & 4))
        planes &= offset & 1 ? 0x0A : 0x05, offset &= ~1ull;
    u32 *at = (u32 *)v->memory + (offset & 0xFFFF), data, bits = g[8], mask = expand(planes);
    u8 turned = value >> rotate | value << (8 - rotate);
    switch (g[5] & 3) {
    case 0:
        data = turned * 0x01010101u;
        data = (data & ~expand(g[1])) | (expand(g[0]) & expand(g[1]));
        break;
    case 1:
        *at = (*at & ~mask) | (v->latch & mask);
        return;
    case 2:
        data = expand(value);
        break;
    default:
        bits &= turned;
        data = expand(g[0]);
    }
    switch (g[3] >> 3 & 3) {
    case 1: data &= v->latch; break;
    case 2: data |= v->latch; break;
    case 3: data ^= v->latch; break;
    }
    bits *= 0x01010101u;
    data = (data & bits) | (v->latch & ~bits);
    *at = (*at & ~mask) | (data & mask);
}

static bool memory_access(struct vga *v, struct bus_access *a, u64 offset)
{
    if (!v->memory || v->is_linear)
        return false;
    u64 value = 0;
    for (unsigned i = 0; i < a->size; i++) {
        if (a->write)
            write_byte(v, offset + i, (u8)(a->value >> 8 * i));
        else
            value |= (u64)read_byte(v, offset + i) << 8 * i;
    }
    if (!a->write)
        a->value = value;
    return true;
}

/* ---- Registers --------------------------------------------------------------------------------------------------------------------- */

enum { AT_INDEX = 4, AT_DATA = 5, AT_STATUS = 10 };

/* 3B4, 3B5, 3BA or 3D4, 3D5, 3DA, whichever bit 0 of the miscellaneous output selects. */
static unsigned crtc_port(const struct vga *v, unsigned port)
{
    unsigned at = port - (v->misc & 1 ? 0x3D0 : 0x3B0);
    return at == AT_INDEX || at == AT_DATA || at == AT_STATUS ? at : 0;
}

static u8 read_port(struct vga *v, unsigned port, const struct bus_access *a)
{
    switch (crtc_port(v, port)) {
    case AT_INDEX: return v->crtc_index;
    case AT_DATA: return v->crtc_index < CRTC ? v->crtc[v->crtc_index] : 0;
    case AT_STATUS: /* nothing is drawn during a retrace */
        v->attribute_data = false;
        return now_of(a) % FRAME < RETRACE ? STATUS_RETRACE | STATUS_BLANK : 0;
    }
    switch (port) {
    case 0x3C0: return v->attribute_index;
    case 0x3C1: return (v->attribute_index & 0x1F) < ATTRIBUTES ? v->attributes[v->attribute_index & 0x1F] : 0;
    case 0x3C2: return 0x10; /* a colour monitor is sensed */
    case 0x3C4: return v->sequencer_index;
    case 0x3C5: return v->sequencer[v->sequencer_index];
    case 0x3C6: return v->dac_mask;
    case 0x3C7: return v->dac_reading ? 3 : 0;
    case 0x3C8: return v->dac_write / 3;
    case 0x3C9: {
        u8 value = v->dac[v->dac_read];
        v->dac_read = (v->dac_read + 1) % DAC;
        return value;
    }
    case 0x3CA: return v->feature;
    case 0x3CC: return v->misc;
    case 0x3CE: return v->graphics_index;
    case 0x3CF: return v->graphics_index < GRAPHICS ? v->graphics[v->graphics_index] : 0;
    }
    return 0xFF;
}

static void write_attribute(struct vga *v, u8 value)
{
    unsigned index = v->attribute_index & 0x1F;
    if (!v->attribute_data)
        v->attribute_index = value & 0x3F;
    else if (index < 16 && !(v->attribute_index & 0x20))
        v->attributes[index] = value & 0x3F; /* the palette takes values while the screen is off only */
    else if (index >= 16 && index < ATTRIBUTES)
        v->attributes[index] = value;
    v->attribute_data = !v->attribute_data;
}

static void write_crtc(struct vga *v, u8 value)
{
    unsigned index = v->crtc_index;
    if (index >= CRTC)
        return;
    if (index < 8 && v->crtc[0x11] & 0x80) { /* these are protected, */
        if (index == 7)                      /* but for bit 8 of the line compare */
            v->crtc[7] = (v->crtc[7] & ~0x10) | (value & 0x10);
        return;
    }
    v->crtc[index] = value;
}

static void write_port(struct vga *v, unsigned port, u8 value)
{
    switch (crtc_port(v, port)) {
    case AT_INDEX: v->crtc_index = value & 0x3F; return;
    case AT_DATA: write_crtc(v, value); return;
    case AT_STATUS: v->feature = value; return;
    }
    switch (port) {
    case 0x3C0: write_attribute(v, value); break;
    case 0x3C2: v->misc = value; break;
    case 0x3C4: v->sequencer_index = value & 7; break;
    case 0x3C5: v->sequencer[v->sequencer_index] = value; break;
    case 0x3C6: v->dac_mask = value; break;
    case 0x3C7: v->dac_read = 3 * value, v->dac_reading = true; break;
    case 0x3C8: v->dac_write = 3 * value, v->dac_reading = false; break;
    case 0x3C9: /* a colour is taken when its blue has come */
        v->dac_latch[v->dac_write % 3] = v->dac_8bit ? value : value & 0x3F;
        if (v->dac_write % 3 == 2)
            memcpy(v->dac + v->dac_write - 2, v->dac_latch, 3);
        v->dac_write = (v->dac_write + 1) % DAC;
        break;
    case 0x3CE: v->graphics_index = value & 0x0F; break;
    case 0x3CF:
        if (v->graphics_index < GRAPHICS)
            v->graphics[v->graphics_index] = value;
    }
}

static void write_ports(struct vga *v, unsigned port, const struct bus_access *a)
{
    for (unsigned i = 0; i < a->size; i++)
        write_port(v, port + i, (u8)(a->value >> 8 * i));
}

/* Writes to others do not change the layout. */
static bool may_change_layout(unsigned port, unsigned size)
{
    return port <= 0x3CF && port + size > 0x3C4 && (port + size > 0x3CF || port <= 0x3C5);
}

static bool ports_access(struct vga *v, struct bus_access *a, unsigned port)
{
    if (a->write) {
        if (may_change_layout(port, a->size)) {
            u8 sequencer_index = v->sequencer_index, graphics_index = v->graphics_index, sequencer[SEQUENCER], graphics[GRAPHICS];
            memcpy(sequencer, v->sequencer, SEQUENCER);
            memcpy(graphics, v->graphics, GRAPHICS);
            unsigned was = vga_layout(v);
            for (unsigned i = 0; i < a->size; i++)
                if (port + i >= 0x3C4 && port + i <= 0x3CF && (port + i <= 0x3C5 || port + i >= 0x3CE))
                    write_port(v, port + i, (u8)(a->value >> 8 * i));
            bool changes = vga_layout(v) != was;
            v->sequencer_index = sequencer_index, v->graphics_index = graphics_index;
            memcpy(v->sequencer, sequencer, SEQUENCER);
            memcpy(v->graphics, graphics, GRAPHICS);
            if (changes)
                return false;
        }
        write_ports(v, port, a);
        return true;
    }
    a->value = 0;
    for (unsigned i = 0; i < a->size; i++)
        a->value |= (u64)read_port(v, port + i, a) << 8 * i;
    return true;
}

static bool vga_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct vga *v = (struct vga *)chip;
    if (region == REGION_PORTS)
        return ports_access(v, a, 0x3B0 + (unsigned)offset);
    if (region == REGION_REGISTERS && offset >= VGA_AT && offset + a->size <= VGA_END)
        return ports_access(v, a, 0x3C0 + (unsigned)(offset - VGA_AT));
    return region == REGION_MEMORY && memory_access(v, a, offset);
}
static const struct chip_kind vga_kind = {.access = vga_access, .timed = true};

/* ---- For Python --------------------------------------------------------------------------------------------------------------------- */

static void reset(struct vga *v)
{
    static const u8 sequencer[SEQUENCER] = {3, 0, 3, 0, 2}, graphics[GRAPHICS] = {0, 0, 0, 0, 0, 0x10, 0x0E, 0, 0xFF};
    v->misc = 0x67;
    v->feature = v->sequencer_index = v->crtc_index = v->graphics_index = 0;
    v->attribute_index = 0x20; /* the screen is on */
    v->attribute_data = v->dac_reading = v->dac_8bit = false;
    v->dac_mask = 0xFF;
    v->dac_read = v->dac_write = 0;
    v->latch = 0;
    memcpy(v->sequencer, sequencer, SEQUENCER);
    memcpy(v->graphics, graphics, GRAPHICS);
    memcpy(v->crtc, first_crtc, CRTC);
    memcpy(v->attributes, first_attributes, ATTRIBUTES);
    memset(v->dac_latch, 0, sizeof v->dac_latch);
    memset(v->dac, 0, DAC);
    for (unsigned i = 0; i < 64; i++) /* the colours of the EGA, rgbRGB, which a BIOS puts there */
        for (unsigned c = 0; c < 3; c++)
            v->dac[3 * i + c] = 0x2A * (i >> (2 - c) & 1) + 0x15 * (i >> (5 - c) & 1);
}

static PyObject *vga_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *bus;
    unsigned number;
    Py_buffer memory;
    if (!PyArg_ParseTuple(args, "OIw*", &bus, &number, &memory))
        return NULL;
    struct vga *self = memory.len < PLANES ? NULL : (struct vga *)chip_new(type, &vga_kind, bus, number);
    if (!self) {
        PyBuffer_Release(&memory);
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "%d bytes of memory", PLANES);
    }
    self->buffer = memory;
    self->memory = memory.buf;
    reset(self);
    return (PyObject *)self;
}

static PyObject *vga_close(struct vga *self, PyObject *ignored)
{
    chip_enter(&self->chip);
    self->memory = NULL;
    pthread_mutex_unlock(&self->chip.bus->lock);
    PyBuffer_Release(&self->buffer);
    Py_RETURN_NONE;
}

static void vga_dealloc(struct vga *self)
{
    PyBuffer_Release(&self->buffer);
    chip_dealloc(&self->chip);
}

static PyObject *vga_reset(struct vga *self, PyObject *ignored)
{
    chip_enter(&self->chip);
    reset(self);
    self->is_linear = false;
    return bus_done(self->chip.bus);
}

static PyObject *vga_put(struct vga *self, PyObject *args)
{
    unsigned port, size;
    unsigned long long value;
    if (!PyArg_ParseTuple(args, "IIK", &port, &size, &value))
        return NULL;
    struct bus_access a = {.size = (u8)(size > 8 ? 8 : size), .value = value};
    chip_enter(&self->chip);
    write_ports(self, port, &a);
    return bus_done(self->chip.bus);
}

static PyObject *vga_see(struct vga *self, PyObject *args)
{
    int dac_8bit, is_linear;
    if (!PyArg_ParseTuple(args, "pp", &dac_8bit, &is_linear))
        return NULL;
    chip_enter(&self->chip);
    self->dac_8bit = dac_8bit, self->is_linear = is_linear;
    return bus_done(self->chip.bus);
}

static PyObject *vga_get_layout(struct vga *self, void *ignored) { return PyLong_FromUnsignedLong(vga_layout(self)); }

/* Between the planes and RAM: of text even addresses are plane 0 and odd ones plane 1, else four addresses are the four planes. */
static PyObject *vga_copy(struct vga *self, PyObject *args)
{
    Py_buffer ram;
    int chained, to_ram;
    if (!PyArg_ParseTuple(args, "w*pp", &ram, &chained, &to_ram))
        return NULL;
    if (ram.len > 0x10000 || !self->memory) {
        PyBuffer_Release(&ram);
        return PyErr_Format(PyExc_ValueError, self->memory ? "64 KiB at the most" : "it is closed");
    }
    unsigned mask = chained ? 3 : 1;
    chip_enter(&self->chip);
    for (unsigned at = 0; at < ram.len; at++) {
        u8 *one = (u8 *)ram.buf + at, *other = self->memory + 4 * (at & ~mask) + (at & mask);
        if (to_ram)
            *one = *other;
        else
            *other = *one;
    }
    bus_leave(self->chip.bus);
    PyBuffer_Release(&ram);
    Py_RETURN_NONE;
}

static PyObject *vga_state(struct vga *v, PyObject *ignored)
{
    bus_enter(v->chip.bus);
    PyObject *state = Py_BuildValue("{sI sI sI sI sI sI sI sI sI sO sO sO sI sy# sy# sy# sy# sy# sy#}",
        "misc", v->misc, "feature", v->feature, "dac_mask", v->dac_mask, "sequencer_index", v->sequencer_index, "crtc_index", v->crtc_index,
        "graphics_index", v->graphics_index, "attribute_index", v->attribute_index, "dac_read", v->dac_read, "dac_write", v->dac_write,
        "attribute_data", v->attribute_data ? Py_True : Py_False, "dac_reading", v->dac_reading ? Py_True : Py_False,
        "dac_8bit", v->dac_8bit ? Py_True : Py_False, "latch", v->latch,
        "sequencer", v->sequencer, (Py_ssize_t)SEQUENCER, "crtc", v->crtc, (Py_ssize_t)CRTC, "graphics", v->graphics, (Py_ssize_t)GRAPHICS,
        "attributes", v->attributes, (Py_ssize_t)ATTRIBUTES, "dac", v->dac, (Py_ssize_t)DAC, "dac_latch", v->dac_latch, (Py_ssize_t)3);
    pthread_mutex_unlock(&v->chip.bus->lock);
    return state;
}

static PyObject *vga_load(struct vga *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"misc", "feature", "dac_mask", "sequencer_index", "crtc_index", "graphics_index", "attribute_index", "dac_read",
        "dac_write", "attribute_data", "dac_reading", "dac_8bit", "latch", "sequencer", "crtc", "graphics", "attributes", "dac", "dac_latch", NULL};
    unsigned n[9], latch;
    int flag[3];
    const char *part[6];
    Py_ssize_t length[6];
    static const Py_ssize_t wanted[6] = {SEQUENCER, CRTC, GRAPHICS, ATTRIBUTES, DAC, 3};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$IIIIIIIIIpppIy#y#y#y#y#y#", names, &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6], &n[7],
            &n[8], &flag[0], &flag[1], &flag[2], &latch, &part[0], &length[0], &part[1], &length[1], &part[2], &length[2], &part[3], &length[3],
            &part[4], &length[4], &part[5], &length[5]))
        return NULL;
    bool good = n[3] < SEQUENCER && n[7] < DAC && n[8] < DAC;
    for (unsigned i = 0; i < 6; i++)
        good = good && length[i] == wanted[i];
    if (!good)
        return PyErr_Format(PyExc_ValueError, "that is no state of a VGA");
    u8 *const into[6] = {self->sequencer, self->crtc, self->graphics, self->attributes, self->dac, self->dac_latch};
    chip_enter(&self->chip);
    self->misc = n[0], self->feature = n[1], self->dac_mask = n[2], self->sequencer_index = n[3], self->crtc_index = n[4];
    self->graphics_index = n[5], self->attribute_index = n[6], self->dac_read = n[7], self->dac_write = n[8];
    self->attribute_data = flag[0], self->dac_reading = flag[1], self->dac_8bit = flag[2], self->latch = latch;
    for (unsigned i = 0; i < 6; i++)
        memcpy(into[i], part[i], wanted[i]);
    return bus_done(self->chip.bus);
}

static PyMethodDef vga_methods[] = {
    CHIP_METHODS,
    {"reset", (PyCFunction)vga_reset, METH_NOARGS, "reset(): as a BIOS leaves it in mode 3"},
    {"put", (PyCFunction)vga_put, METH_VARARGS, "put(port, size, value): have it done, whatever it changes"},
    {"see", (PyCFunction)vga_see, METH_VARARGS, "see(dac_8bit, is_linear): how the VBE has set it; linear: the planes are not accessed"},
    {"copy", (PyCFunction)vga_copy, METH_VARARGS, "copy(ram, chained, to_ram): of what the CPU sees as RAM, between there and the planes"},
    {"state", (PyCFunction)vga_state, METH_NOARGS, "state() -> the registers by their names"},
    {"close", (PyCFunction)vga_close, METH_NOARGS, "close(): it has no memory from now on, and `memory` is the caller's alone"},
    {"load", (PyCFunction)(void (*)(void))vga_load, METH_VARARGS | METH_KEYWORDS, "load(**state)"},
    {"seen", (PyCFunction)vga_seen, METH_VARARGS, "seen(ram, chained) -> the planes, with what is in RAM (None: nothing), as by `copy`"},
    {"draw", (PyCFunction)vga_draw, METH_VARARGS,
     "draw(planes, font, width, height, factor) -> a byte a pixel, of each `factor` scan lines the first. `font`: 256 glyphs, 32 bytes each,\n"
     "instead of those in plane 2, or None"},
    {"cells", (PyCFunction)vga_cells, METH_VARARGS, "cells(planes, columns, rows) -> the characters of a text screen"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef vga_attributes[] = {
    {"layout", (getter)vga_get_layout, NULL, "how the CPU sees the planes", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot vga_slots[] = {
    {Py_tp_doc, "Vga(bus, device, memory): registers, and planes in the first 256 KiB of `memory`."}, {Py_tp_new, vga_new},
    {Py_tp_dealloc, vga_dealloc}, {Py_tp_methods, vga_methods}, {Py_tp_getset, vga_attributes}, {0, NULL},
};
PyType_Spec vga_spec = {"vmfs.devices._chips.Vga", sizeof(struct vga), 0, Py_TPFLAGS_DEFAULT, vga_slots};
