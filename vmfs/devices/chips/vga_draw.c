/* VGA: the picture that the CRT controller, the character generator and the attribute controller make of the planes, scan line by scan line.
 *
 * Source: as vga.c. */
#include "vga.h"

enum { DOTS_MOST = 256 * 9, LINES_MOST = 2048, GLYPH = 32 };

struct scan {
    const struct vga *v;
    const u8 *planes, *font;
    u8 colours[16];         /* of the attribute controller: registers of the DAC */
    u16 glyphs[2];          /* where the two fonts are in plane 2, by bit 3 of the attribute, in units of a font */
};

/* Address A of the planes for a count of the CRT controller's. */
static unsigned address_of(const struct vga *v, unsigned count, unsigned row)
{
    count &= 0xFFFF;
    unsigned at = count, mode = v->crtc[0x17];
    if (v->crtc[0x14] & 0x40)
        at = count << 2 | (count >> 14 & 3);
    else if (!(mode & 0x40))
        at = count << 1 | (mode & 0x20 ? count >> 15 & 1 : count >> 13 & 1);
    if (!(mode & 1))
        at = (at & ~0x2000u) | (row & 1) << 13;
    if (!(mode & 2))
        at = (at & ~0x4000u) | (row >> 1 & 1) << 14;
    return at & 0xFFFF;
}

static void set_colours(struct scan *s)
{
    const u8 *a = s->v->attributes;
    for (unsigned i = 0; i < 16; i++) {
        unsigned colour = a[i & a[0x12] & 15] & 0x3F;
        if (a[0x10] & 0x80)
            colour = (colour & 15) | (a[0x14] & 3) << 4;
        s->colours[i] = colour | (a[0x14] & 0x0C) << 4;
    }
    unsigned map = s->v->sequencer[3];
    s->glyphs[0] = (map & 3) << 1 | (map >> 4 & 1);
    s->glyphs[1] = (map >> 2 & 3) << 1 | (map >> 5 & 1);
}

static u8 *draw_text(const struct scan *s, u8 *to, unsigned count, unsigned columns, unsigned row)
{
    const struct vga *v = s->v;
    unsigned cursor = v->crtc[0x0E] << 8 | v->crtc[0x0F], first = v->crtc[0x0A] & 0x1F, last = v->crtc[0x0B] & 0x1F;
    bool nine = !(v->sequencer[1] & 1), repeats = v->attributes[0x10] & 4, mono = v->attributes[0x10] & 2;
    bool blinks = v->attributes[0x10] & 8, here = !(v->crtc[0x0A] & 0x20) && row >= first && row <= last;
    for (unsigned x = 0; x < columns; x++, count++) {
        const u8 *cell = s->planes + 4 * address_of(v, count, row);
        unsigned character = cell[0], attribute = cell[1];
        const u8 *font = s->font ? s->font + character * GLYPH : s->planes + 2 + 4 * (s->glyphs[attribute >> 3 & 1] * 0x2000 + character * GLYPH);
        unsigned bits = (s->font ? font[row & 31] : font[4 * (row & 31)]) << 1;
        if (repeats && character >= 0xC0 && character < 0xE0)
            bits |= bits >> 1 & 1;
        if (mono && (attribute & 7) == 1 && row == (v->crtc[0x14] & 0x1Fu))
            bits = 0x1FF;
        if (here && (count & 0xFFFF) == cursor)
            bits = 0x1FF;
        u8 on = s->colours[attribute & 15], off = s->colours[attribute >> 4 & (blinks ? 7 : 15)];
        for (unsigned dot = 0; dot < (nine ? 9u : 8u); dot++)
            *to++ = bits >> (8 - dot) & 1 ? on : off;
    }
    return to;
}

static u8 *draw_graphics(const struct scan *s, u8 *to, unsigned count, unsigned columns, unsigned row)
{
    unsigned shift = s->v->graphics[5] >> 5 & 3;
    for (unsigned x = 0; x < columns; x++, count++) {
        const u8 *four = s->planes + 4 * address_of(s->v, count, row);
        if (shift & 2) { /* a byte is a pixel */
            memcpy(to, four, 4);
            to += 4;
        } else if (shift) { /* two bits of one plane and two of another are a pixel */
            for (unsigned plane = 0; plane < 2; plane++)
                for (int at = 6; at >= 0; at -= 2)
                    *to++ = s->colours[(four[plane] >> at & 3) | (four[plane + 2] >> at & 3) << 2];
        } else { /* a bit of each plane */
            for (int at = 7; at >= 0; at--)
                *to++ = s->colours[(four[0] >> at & 1) | (four[1] >> at & 1) << 1 | (four[2] >> at & 1) << 2 | (four[3] >> at & 1) << 3];
        }
    }
    return to;
}

/* How far the picture is shifted to the left. */
static unsigned panning(const struct vga *v, bool text)
{
    unsigned pan = v->attributes[0x13] & 15;
    if (text && !(v->sequencer[1] & 1))
        return pan >= 8 ? 0 : pan + 1;
    return v->graphics[5] & 0x40 && !text ? (pan & 7) / 2 : pan & 7;
}

/* The counters of the CRT controller, from scan line to scan line. */
struct beam { unsigned scan, start, row, pan; };

static struct beam first_line(const struct vga *v, bool text)
{
    return (struct beam){0, (v->crtc[0x0C] << 8 | v->crtc[0x0D]) + (v->crtc[8] >> 5 & 3), v->crtc[8] & 0x1F, panning(v, text)};
}

static void next_line(const struct vga *v, struct beam *b)
{
    unsigned split = v->crtc[0x18] | (v->crtc[7] & 0x10) << 4 | (v->crtc[9] & 0x40) << 3;
    if (b->scan == split) { /* from the next line on it is the memory's begin */
        b->start = b->row = 0;
        b->pan = v->attributes[0x10] & 0x20 ? 0 : b->pan;
    } else if (!(v->crtc[9] & 0x80) || b->scan & 1) {
        if (b->row == (v->crtc[9] & 0x1Fu))
            b->row = 0, b->start += 2 * v->crtc[0x13];
        else
            b->row = (b->row + 1) & 0x1F;
    }
    b->scan++;
}

/* As they are at this moment. */
static struct vga copy_of(struct vga *self)
{
    bus_enter(self->chip.bus);
    struct vga copy = *self;
    pthread_mutex_unlock(&self->chip.bus->lock);
    return copy;
}

PyObject *vga_draw(struct vga *self, PyObject *args)
{
    Py_buffer planes, font;
    unsigned width, height, factor;
    if (!PyArg_ParseTuple(args, "y*z*III", &planes, &font, &width, &height, &factor))
        return NULL;
    PyObject *result = NULL;
    if (planes.len < PLANES || (font.buf && font.len < 256 * GLYPH) || !width || width > DOTS_MOST || !height || height > LINES_MOST || !factor
        || factor > 64)
        PyErr_SetString(PyExc_ValueError, "draw: there is no such picture");
    else
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)width * height);
    if (result) {
        u8 *out = (u8 *)PyBytes_AS_STRING(result), line[DOTS_MOST + 32];
        struct vga v = copy_of(self);
        Py_BEGIN_ALLOW_THREADS
        struct scan s = {.v = &v, .planes = planes.buf, .font = font.buf};
        bool text = !(v.graphics[6] & 1);
        struct beam b = first_line(&v, text);
        set_colours(&s);
        for (; b.scan < height * factor; next_line(&v, &b))
            if (b.scan % factor == 0) {
                memset(line, 0, sizeof line);
                (text ? draw_text : draw_graphics)(&s, line, b.start, v.crtc[1] + 2u, b.row);
                memcpy(out + (size_t)(b.scan / factor) * width, line + b.pan, width);
            }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&planes);
    if (font.obj)
        PyBuffer_Release(&font);
    return result;
}

PyObject *vga_cells(struct vga *self, PyObject *args)
{
    Py_buffer planes;
    unsigned columns, rows;
    if (!PyArg_ParseTuple(args, "y*II", &planes, &columns, &rows))
        return NULL;
    PyObject *result = planes.len >= PLANES && columns <= 256 && rows <= LINES_MOST ? PyBytes_FromStringAndSize(NULL, (Py_ssize_t)columns * rows) : NULL;
    if (result) {
        u8 *to = (u8 *)PyBytes_AS_STRING(result);
        struct vga v = copy_of(self);
        unsigned done = 0;
        memset(to, 0, (size_t)columns * rows);
        for (struct beam b = first_line(&v, true); done < rows && b.scan < 4 * LINES_MOST; next_line(&v, &b))
            if (!b.scan || (!b.row && (!(v.crtc[9] & 0x80) || !(b.scan & 1)))) {
                for (unsigned x = 0; x < columns; x++)
                    to[done * columns + x] = ((const u8 *)planes.buf)[4 * address_of(&v, b.start + x, b.row)];
                done++;
            }
    } else {
        PyErr_SetString(PyExc_ValueError, "cells: there is no such screen");
    }
    PyBuffer_Release(&planes);
    return result;
}

PyObject *vga_seen(struct vga *self, PyObject *args)
{
    Py_buffer ram;
    int chained;
    if (!PyArg_ParseTuple(args, "z*p", &ram, &chained))
        return NULL;
    bool good = ram.len <= 0x10000 && self->memory;
    PyObject *result = !good ? NULL : PyBytes_FromStringAndSize((const char *)self->memory, PLANES);
    if (result) {
        u8 *to = (u8 *)PyBytes_AS_STRING(result);
        unsigned mask = chained ? 3 : 1;
        for (unsigned at = 0; ram.buf && at < ram.len; at++)
            to[4 * (at & ~mask) + (at & mask)] = ((const u8 *)ram.buf)[at];
    } else if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, self->memory ? "64 KiB at the most" : "it is closed");
    }
    if (ram.obj)
        PyBuffer_Release(&ram);
    return result;
}
