/* Pixels: a screen's bytes become 32 bits a pixel (red, green, blue, 0: JPEG is made of it as it is), those that changed are found, and parts
 * of the picture become what the encodings of RFB are made of. All functions work on buffers of their callers, and without the GIL.
 *
 * Sources: RFC 6143, "The Remote Framebuffer Protocol", 7.7.6 (ZRLE); the RFB community's protocol description (rfbproto.rst), "Tight
 * Encoding". */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define MOST 16384          /* pixels of a line, and lines */
#define ZRLE_TILE 64
#define TIGHT_COLOURS 256

/* ---- the picture */

/* Red and blue change places, and the fourth byte becomes 0. */
typedef uint32_t eight __attribute__((vector_size(32), aligned(1), may_alias));
static void swap_line(uint8_t *to, const uint8_t *from, unsigned count)
{
    unsigned x = 0;
    for (; x + 8 <= count; x += 8) {
        eight v = *(const eight *)(from + 4ul * x);
        *(eight *)(to + 4ul * x) = (v & 0xFF00) | (v >> 16 & 0xFF) | (v & 0xFF) << 16;
    }
    for (; x < count; x++) {
        uint32_t v;
        memcpy(&v, from + 4ul * x, 4);
        v = (v & 0xFF00) | (v >> 16 & 0xFF) | (v & 0xFF) << 16;
        memcpy(to + 4ul * x, &v, 4);
    }
}

static void convert(uint32_t *to, const uint8_t *from, unsigned count, unsigned bits, const uint32_t *palette)
{
    switch (bits) {
    case 8:
        for (unsigned x = 0; x < count; x++)
            to[x] = palette[from[x]];
        break;
    case 15:
        for (unsigned x = 0; x < count; x++) {
            unsigned v = from[2 * x] | from[2 * x + 1] << 8, r = v >> 10 & 31, g = v >> 5 & 31, b = v & 31;
            to[x] = (b << 3 | b >> 2) << 16 | (g << 3 | g >> 2) << 8 | (r << 3 | r >> 2);
        }
        break;
    case 16:
        for (unsigned x = 0; x < count; x++) {
            unsigned v = from[2 * x] | from[2 * x + 1] << 8, r = v >> 11, g = v >> 5 & 63, b = v & 31;
            to[x] = (b << 3 | b >> 2) << 16 | (g << 2 | g >> 4) << 8 | (r << 3 | r >> 2);
        }
        break;
    case 24:
        for (unsigned x = 0; x < count; x++)
            to[x] = (uint32_t)from[3 * x] << 16 | from[3 * x + 1] << 8 | from[3 * x + 2];
        break;
    default:
        swap_line((uint8_t *)to, from, count);
    }
}

/* update(picture, width, height, source, start, pitch, bits, palette, tile, changed) -> count
 *
 * `picture` becomes what `source` has; the byte of `changed` of each tile in which a pixel is another becomes 1. What is beyond the end of
 * `source` is black. */
static PyObject *update(PyObject *module, PyObject *args)
{
    Py_buffer picture, source, palette, changed;
    unsigned width, height, bits, tile;
    unsigned long long start, pitch;
    if (!PyArg_ParseTuple(args, "w*IIy*KKIy*Iw*", &picture, &width, &height, &source, &start, &pitch, &bits, &palette, &tile, &changed))
        return NULL;
    unsigned across = tile ? (width + tile - 1) / tile : 0, down = tile ? (height + tile - 1) / tile : 0;
    Py_ssize_t count = -1;
    if (width <= MOST && height <= MOST && across && down && pitch <= 1u << 28 && picture.len >= (Py_ssize_t)width * height * 4
        && palette.len >= 1024 && changed.len >= (Py_ssize_t)across * down) {
        Py_BEGIN_ALLOW_THREADS
        static const uint8_t black[4];
        uint32_t line[MOST], colours[256];
        unsigned size = (bits + 7) / 8;
        memcpy(colours, palette.buf, sizeof colours);
        count = 0;
        for (unsigned y = 0; y < height; y++) {
            uint64_t at = start + y * pitch, end = source.len;
            unsigned there = at >= end ? 0 : (end - at) / size < width ? (unsigned)((end - at) / size) : width;
            uint32_t *row = (uint32_t *)picture.buf + (size_t)y * width;
            uint8_t *marks = (uint8_t *)changed.buf + (size_t)(y / tile) * across;
            convert(line, there ? (const uint8_t *)source.buf + at : black, there, bits, colours);
            memset(line + there, 0, (width - there) * 4ul);
            for (unsigned n = 0, x = 0; n < across; n++, x += tile) {
                unsigned length = width - x < tile ? width - x : tile;
                if (memcmp(row + x, line + x, length * 4ul)) {
                    memcpy(row + x, line + x, length * 4ul);
                    count += !marks[n];
                    marks[n] = 1;
                }
            }
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&picture);
    PyBuffer_Release(&source);
    PyBuffer_Release(&palette);
    PyBuffer_Release(&changed);
    if (count < 0) {
        PyErr_SetString(PyExc_ValueError, "update: the buffers are too small for that size");
        return NULL;
    }
    return PyLong_FromSsize_t(count);
}

/* ---- what a client sees */

/* How a client has its pixels: `size` bytes each (1, 2, 4), the most of each colour, where it is. `least` bytes of a pixel are enough in ZRLE
 * (CPIXEL), from byte `skip` on; in Tight (TPIXEL) `rgb` says that it is three bytes, red first. */
struct format {
    unsigned size, big, most[3], shift[3], least, skip, rgb;
};

static bool parse_format(PyObject *tuple, struct format *f)
{
    if (!PyArg_ParseTuple(tuple, "IIIIIIIIIII", &f->size, &f->big, &f->most[0], &f->most[1], &f->most[2], &f->shift[0], &f->shift[1],
                          &f->shift[2], &f->least, &f->skip, &f->rgb))
        return false;
    if ((f->size != 1 && f->size != 2 && f->size != 4) || f->least > f->size || f->skip + f->least > f->size || f->shift[0] > 31
        || f->shift[1] > 31 || f->shift[2] > 31 || f->most[0] > 0xFFFF || f->most[1] > 0xFFFF || f->most[2] > 0xFFFF) {
        PyErr_SetString(PyExc_ValueError, "there is no such format");
        return false;
    }
    return true;
}

/* Whether it is four bytes with a colour each, blue (red) first. */
static bool is_bytes(const struct format *f, unsigned red, unsigned blue)
{
    return f->size == 4 && !f->big && f->most[0] == 255 && f->most[1] == 255 && f->most[2] == 255 && f->shift[0] == red && f->shift[1] == 8
        && f->shift[2] == blue;
}

/* Of a whole pixel. */
static inline uint32_t colour_of(const struct format *f, uint32_t pixel)
{
    unsigned r = pixel & 255, g = pixel >> 8 & 255, b = pixel >> 16 & 255;
    return (r * f->most[0] + 127) / 255 << f->shift[0] | (g * f->most[1] + 127) / 255 << f->shift[1]
        | (b * f->most[2] + 127) / 255 << f->shift[2];
}

static inline uint8_t *put_bytes(const struct format *f, uint8_t *to, uint32_t value, unsigned first, unsigned count)
{
    for (unsigned n = first; n < first + count; n++)
        *to++ = value >> 8 * (f->big ? f->size - 1 - n : n);
    return to;
}

static inline uint8_t *put_pixel(const struct format *f, uint8_t *to, uint32_t pixel)
{
    if (is_bytes(f, 0, 16)) {
        memcpy(to, &pixel, 4); /* as it is */
        return to + 4;
    }
    return put_bytes(f, to, colour_of(f, pixel), 0, f->size);
}

static inline uint8_t *put_cpixel(const struct format *f, uint8_t *to, uint32_t pixel)
{
    return put_bytes(f, to, colour_of(f, pixel), f->skip, f->least);
}

static inline uint8_t *put_tpixel(const struct format *f, uint8_t *to, uint32_t pixel)
{
    if (!f->rgb)
        return put_pixel(f, to, pixel);
    *to++ = pixel;
    *to++ = pixel >> 8;
    *to++ = pixel >> 16;
    return to;
}

/* A part of a picture: `lines[y * pitch + x]`. */
struct part {
    Py_buffer buffer;
    const uint32_t *lines;
    unsigned pitch, width, height;
    struct format format;
};

static bool parse_part(PyObject *args, struct part *part)
{
    unsigned x, y;
    PyObject *format;
    if (!PyArg_ParseTuple(args, "y*IIIIIO!", &part->buffer, &part->pitch, &x, &y, &part->width, &part->height, &PyTuple_Type, &format))
        return false;
    if (!part->width || !part->height || part->pitch > MOST || x + part->width > part->pitch || part->width > MOST || x > MOST || y > MOST
        || part->height > MOST || ((Py_ssize_t)y + part->height) * part->pitch * 4 > part->buffer.len) {
        PyErr_SetString(PyExc_ValueError, "the part is not in the picture");
    } else if (parse_format(format, &part->format)) {
        part->lines = (const uint32_t *)part->buffer.buf + (size_t)y * part->pitch + x;
        return true;
    }
    PyBuffer_Release(&part->buffer);
    return false;
}

/* Pixels are written by other threads meanwhile: what is looked at twice is a copy. */
static void copy_lines(const struct part *part, unsigned x, unsigned y, unsigned width, unsigned height, uint32_t *to)
{
    for (unsigned n = 0; n < height; n++)
        memcpy(to + (size_t)n * width, part->lines + (size_t)(y + n) * part->pitch + x, width * 4ul);
}

/* raw(picture, pitch, x, y, width, height, format) -> bytes */
static PyObject *raw(PyObject *module, PyObject *args)
{
    struct part part;
    if (!parse_part(args, &part))
        return NULL;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)part.width * part.height * part.format.size);
    if (result) {
        uint8_t *to = (uint8_t *)PyBytes_AS_STRING(result);
        Py_BEGIN_ALLOW_THREADS
        bool as_is = is_bytes(&part.format, 0, 16), swapped = is_bytes(&part.format, 16, 0);
        for (unsigned y = 0; y < part.height; y++) {
            const uint32_t *line = part.lines + (size_t)y * part.pitch;
            if (as_is)
                memcpy(to, line, part.width * 4ul);
            else if (swapped)
                swap_line(to, (const uint8_t *)line, part.width);
            else
                for (unsigned x = 0; x < part.width; x++)
                    put_pixel(&part.format, to + (size_t)x * part.format.size, line[x]);
            to += (size_t)part.width * part.format.size;
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&part.buffer);
    return result;
}

/* Colours of a part, by the order in which they come, up to `most`. */
struct colours {
    unsigned count, most;
    uint32_t colour[TIGHT_COLOURS];
    uint16_t slot[1024]; /* 1 + the number of one */
};

static int find_colour(struct colours *c, uint32_t pixel)
{
    unsigned at = pixel * 2654435761u >> 22;
    for (;; at = (at + 1) & 1023) {
        if (!c->slot[at]) {
            if (c->count == c->most)
                return -1;
            c->colour[c->count] = pixel;
            c->slot[at] = ++c->count;
            return c->count - 1;
        }
        if (c->colour[c->slot[at] - 1] == pixel)
            return c->slot[at] - 1;
    }
}

static uint8_t *put_run(uint8_t *to, unsigned length)
{
    for (length--; length >= 255; length -= 255)
        *to++ = 255;
    *to++ = length;
    return to;
}

/* One tile of ZRLE in the shortest of its ways; at most 1 + 5 * count bytes. */
static uint8_t *put_tile(const struct format *f, uint8_t *to, const uint32_t *pixels, unsigned width, unsigned height)
{
    unsigned count = width * height, runs = 0, singles = 0, longer = 0, least = f->least;
    struct colours c = {.most = 127};
    bool few = true;
    for (unsigned n = 0, length; n < count; n += length) {
        for (length = 1; n + length < count && pixels[n + length] == pixels[n]; length++)
            ;
        runs++;
        singles += length == 1;
        longer += (length - 1) / 255;
        few = few && find_colour(&c, pixels[n]) >= 0;
    }
    if (few && c.count == 1) {
        *to++ = 1;
        return put_cpixel(f, to, pixels[0]);
    }
    unsigned depth = c.count <= 2 ? 1 : c.count <= 4 ? 2 : 4;
    size_t best = (size_t)count * least, packed = SIZE_MAX, indexed = SIZE_MAX, plain = (size_t)runs * (least + 1) + longer;
    if (few && c.count <= 16)
        packed = c.count * least + (width * depth + 7) / 8 * height;
    if (few)
        indexed = c.count * least + singles + 2ul * (runs - singles) + longer;
    best = packed < best ? packed : best;
    best = indexed < best ? indexed : best;
    best = plain < best ? plain : best;
    if (best == packed) {
        *to++ = c.count;
        for (unsigned n = 0; n < c.count; n++)
            to = put_cpixel(f, to, c.colour[n]);
        for (unsigned y = 0; y < height; y++) {
            unsigned byte = 0, have = 0;
            for (unsigned x = 0; x < width; x++) {
                byte = byte << depth | find_colour(&c, pixels[y * width + x]);
                if ((have += depth) == 8) {
                    *to++ = byte;
                    byte = have = 0;
                }
            }
            if (have)
                *to++ = byte << (8 - have);
        }
    } else if (best == indexed || best == plain) {
        *to++ = best == indexed ? 128 + c.count : 128;
        for (unsigned n = 0; best == indexed && n < c.count; n++)
            to = put_cpixel(f, to, c.colour[n]);
        for (unsigned n = 0, length; n < count; n += length) {
            for (length = 1; n + length < count && pixels[n + length] == pixels[n]; length++)
                ;
            if (best == plain) {
                to = put_run(put_cpixel(f, to, pixels[n]), length);
            } else if (length == 1) {
                *to++ = find_colour(&c, pixels[n]);
            } else {
                *to++ = 128 | find_colour(&c, pixels[n]);
                to = put_run(to, length);
            }
        }
    } else {
        *to++ = 0;
        for (unsigned n = 0; n < count; n++)
            to = put_cpixel(f, to, pixels[n]);
    }
    return to;
}

/* zrle(picture, pitch, x, y, width, height, format) -> bytes that are to be compressed */
static PyObject *zrle(PyObject *module, PyObject *args)
{
    struct part part;
    if (!parse_part(args, &part))
        return NULL;
    unsigned across = (part.width + ZRLE_TILE - 1) / ZRLE_TILE, down = (part.height + ZRLE_TILE - 1) / ZRLE_TILE;
    Py_ssize_t most = (Py_ssize_t)across * down + 5 * (Py_ssize_t)part.width * part.height;
    PyObject *result = PyBytes_FromStringAndSize(NULL, most);
    if (result) {
        uint8_t *begin = (uint8_t *)PyBytes_AS_STRING(result), *to = begin;
        Py_BEGIN_ALLOW_THREADS
        uint32_t pixels[ZRLE_TILE * ZRLE_TILE];
        for (unsigned y = 0; y < part.height; y += ZRLE_TILE)
            for (unsigned x = 0; x < part.width; x += ZRLE_TILE) {
                unsigned width = part.width - x < ZRLE_TILE ? part.width - x : ZRLE_TILE;
                unsigned height = part.height - y < ZRLE_TILE ? part.height - y : ZRLE_TILE;
                copy_lines(&part, x, y, width, height, pixels);
                to = put_tile(&part.format, to, pixels, width, height);
            }
        Py_END_ALLOW_THREADS
        _PyBytes_Resize(&result, to - begin);
    }
    PyBuffer_Release(&part.buffer);
    return result;
}

/* tight(picture, pitch, x, y, width, height, format) -> (count, palette, data): `data` are pixels where `count` is 0, a colour that all have
 * where it is 1, a bit a pixel where it is 2, else a byte a pixel. */
static PyObject *tight(PyObject *module, PyObject *args)
{
    struct part part;
    if (!parse_part(args, &part))
        return NULL;
    size_t count = (size_t)part.width * part.height;
    uint32_t *pixels = PyMem_Malloc(count * 4);
    uint8_t *data = PyMem_Malloc(count * 4 + part.height), palette[TIGHT_COLOURS * 4], *to = data, *end = palette;
    struct colours c = {.most = TIGHT_COLOURS};
    if (!pixels || !data) {
        PyMem_Free(pixels);
        PyMem_Free(data);
        PyBuffer_Release(&part.buffer);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    const struct format *f = &part.format;
    bool few = true;
    copy_lines(&part, 0, 0, part.width, part.height, pixels);
    for (size_t n = 0; n < count && few; n++)
        few = (n && pixels[n] == pixels[n - 1]) || find_colour(&c, pixels[n]) >= 0;
    if (!few || (size_t)c.count * 2 > count) /* a palette would be longer than what it saves */
        c.count = c.count == 1 ? 1 : 0;
    for (unsigned n = 0; n < c.count; n++)
        end = put_tpixel(f, end, c.colour[n]);
    if (c.count == 1) {
        to = put_tpixel(f, to, pixels[0]);
    } else if (c.count == 2) {
        for (unsigned y = 0; y < part.height; y++)
            for (unsigned x = 0; x < part.width; x += 8) {
                unsigned byte = 0;
                for (unsigned n = x; n < x + 8; n++)
                    byte = byte << 1 | (n < part.width && pixels[(size_t)y * part.width + n] == c.colour[1]);
                *to++ = byte;
            }
    } else if (c.count) {
        for (size_t n = 0; n < count; n++)
            to[n] = n && pixels[n] == pixels[n - 1] ? to[n - 1] : find_colour(&c, pixels[n]);
        to += count;
    } else {
        for (size_t n = 0; n < count; n++)
            to = put_tpixel(f, to, pixels[n]);
    }
    Py_END_ALLOW_THREADS
    PyObject *result = Py_BuildValue("(Iy#y#)", c.count, palette, (Py_ssize_t)(end - palette), data, (Py_ssize_t)(to - data));
    PyMem_Free(pixels);
    PyMem_Free(data);
    PyBuffer_Release(&part.buffer);
    return result;
}

/* many(picture, pitch, x, y, width, height, format) -> whether a part has more colours than a palette of Tight's */
static PyObject *many(PyObject *module, PyObject *args)
{
    struct part part;
    if (!parse_part(args, &part))
        return NULL;
    struct colours c = {.most = TIGHT_COLOURS};
    bool few = true;
    for (unsigned y = 0; y < part.height && few; y++)
        for (unsigned x = 0; x < part.width && few; x++)
            few = find_colour(&c, part.lines[(size_t)y * part.pitch + x]) >= 0;
    PyBuffer_Release(&part.buffer);
    return PyBool_FromLong(!few);
}

static PyMethodDef methods[] = {
    {"update", update, METH_VARARGS, "update(picture, width, height, source, start, pitch, bits, palette, tile, changed) -> count"},
    {"raw", raw, METH_VARARGS, "raw(picture, pitch, x, y, width, height, format) -> bytes"},
    {"zrle", zrle, METH_VARARGS, "zrle(picture, pitch, x, y, width, height, format) -> bytes"},
    {"tight", tight, METH_VARARGS, "tight(picture, pitch, x, y, width, height, format) -> (count, palette, data)"},
    {"many", many, METH_VARARGS, "many(picture, pitch, x, y, width, height, format) -> whether there are more than 256 colours"},
    {NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_pixels", "A screen's pixels.", 0, methods};

PyMODINIT_FUNC PyInit__pixels(void)
{
    return PyModule_Create(&definition);
}
