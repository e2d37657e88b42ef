/* The frames that an e1000 receives in plain descriptors (317453, 3.2.3), and those that it sends (3.3 to 3.5). What is rare is Python's. */
#include <string.h>

#include "frames.h"
#include "module.h"
#include "offload.h"
#include "ram.h"

enum { DESCRIPTOR = 16, ON_WIRE_LEAST = 60, CRC = 4, STANDARD_MOST = 1518, SPANS = 64, SIZES = 6 };
enum { STRIPS_CRC = 1, CHECKS_IP = 2, CHECKS_TRANSPORT = 4 };
enum { EOP_BIT = 1 << 24, IC_OR_TSE = 1 << 26, RS = 1 << 27, DEXT = 1 << 29, VLE = 1 << 30 };
enum { KIND = 0xF00000, IXSM_ASKED = 0x100, TXSM_ASKED = 0x200, IS_TCP = 1 << 24, SEGMENT_LEAST = 64, SENT_MOST = 16288 };
enum { PADS = 1, TAGS = 2 }; /* of e1000_take */
enum { DD = 1, EOP = 2, IXSM = 4, TCPCS = 0x20, IPCS = 0x40, TCPE = 0x20, IPE = 0x40 };

/* IEEE 802.3's, four bytes at a time; the tables are made at the first use, with the GIL. */
static u32 tables[4][256];

u32 frame_crc(const u8 *data, size_t length)
{
    if (!tables[0][1])
        for (u32 byte = 0; byte < 256; byte++) {
            u32 crc = byte;
            for (unsigned bit = 0; bit < 32; bit++) {
                crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
                if (bit % 8 == 7)
                    tables[bit / 8][byte] = crc;
            }
        }
    u32 crc = ~0u;
    for (; length >= 4; data += 4, length -= 4) {
        u32 word;
        memcpy(&word, data, 4);
        crc ^= word;
        crc = tables[3][crc & 0xFF] ^ tables[2][crc >> 8 & 0xFF] ^ tables[1][crc >> 16 & 0xFF] ^ tables[0][crc >> 24];
    }
    for (; length; data++, length--)
        crc = crc >> 8 ^ tables[0][(crc ^ *data) & 0xFF];
    return ~crc;
}

/* Status and errors, by what sums say (3.2.9). */
static unsigned judge(const u8 *frame, size_t length, unsigned flags)
{
    int ip = -1, transport = -1;
    if (flags & CHECKS_IP)
        offload_check(frame, length, &ip, &transport);
    if (ip < 0)
        return DD | EOP | IXSM;
    unsigned status = DD | EOP | IPCS, errors = ip ? 0 : IPE;
    if (transport >= 0 && flags & CHECKS_TRANSPORT)
        status |= TCPCS, errors |= transport ? 0 : TCPE;
    return status | errors << 8;
}

struct counts { unsigned long long octets; unsigned sizes[SIZES], broadcasts, groups; };

static void count_size(struct counts *c, size_t size)
{
    static const unsigned most_of[SIZES] = {64, 127, 255, 511, 1023, 1522};
    unsigned step = 0;
    while (step < SIZES - 1 && size > most_of[step])
        step++;
    c->sizes[step]++;
    c->octets += size;
}

PyObject *e1000_put(PyObject *module, PyObject *args)
{
    const struct module_state *state = PyModule_GetState(module);
    struct ram *ram;
    unsigned long long start;
    unsigned count, head, tail, room, flags, vlan;
    struct counts c = {0};
    Py_buffer address;
    PyObject *frames;
    if (!PyArg_ParseTuple(args, "O!KIIIIIIy*O!", state->types[TYPE_RAM], &ram, &start, &count, &head, &tail, &room, &flags, &vlan, &address,
                          &PyList_Type, &frames))
        return NULL;
    struct span spans[2 * SPANS];
    unsigned span_count = 0;
    Py_ssize_t at = 0;
    bool good = address.len == 6 && head < count && tail < count && ram_has(ram, start, (u64)count * DESCRIPTOR);
    for (; good && at < PyList_GET_SIZE(frames) && head != tail; at++) {
        PyObject *object = PyList_GET_ITEM(frames, at);
        if (!PyBytes_CheckExact(object))
            break;
        const u8 *frame = (const u8 *)PyBytes_AS_STRING(object);
        size_t length = (size_t)PyBytes_GET_SIZE(object), whole = length < ON_WIRE_LEAST ? ON_WIRE_LEAST : length;
        if (length < FRAME_LEAST || whole + CRC > STANDARD_MOST || whole + CRC > room || get16(frame + 12) == vlan || memcmp(frame, address.buf, 6))
            break;              /* those are Python's */
        u8 padded[ON_WIRE_LEAST] = {0};
        if (length < whole)
            frame = memcpy(padded, frame, length);
        size_t size = flags & STRIPS_CRC ? whole : whole + CRC;
        u64 descriptor = start + (u64)head * DESCRIPTOR, buffer;
        memcpy(&buffer, ram->data + descriptor, sizeof buffer);
        if (!ram_has(ram, buffer, size))
            break;
        memcpy(ram->data + buffer, frame, whole);
        if (size > whole) {
            u32 crc = frame_crc(frame, whole);
            memcpy(ram->data + buffer + whole, &crc, CRC);
        }
        u64 row = size | (u64)judge(frame, whole, flags) << 32;
        __atomic_store_n((u64 *)(ram->data + descriptor + 8), row, __ATOMIC_RELEASE); /* the ring is aligned to 16 bytes */
        spans[span_count++] = (struct span){buffer, (u32)size};
        spans[span_count++] = (struct span){descriptor + 8, 8};
        if (span_count == 2 * SPANS) {
            ram_wrote(ram, spans, span_count);
            span_count = 0;
        }
        head = head + 1 < count ? head + 1 : 0;
        count_size(&c, whole + CRC);
    }
    ram_wrote(ram, spans, span_count);
    PyBuffer_Release(&address);
    return Py_BuildValue("(nIK(IIIIII))", at, head, c.octets, c.sizes[0], c.sizes[1], c.sizes[2], c.sizes[3], c.sizes[4], c.sizes[5]);
}

/* ---- What the guest sends ----------------------------------------------------------------------------------------------------------- */

struct sent { u64 address; u32 low, high; };
struct context { u32 ip, transport, size, more; };

static PyObject *pad(const u8 *frame, size_t length, unsigned flags)
{
    size_t whole = flags & PADS && length < ON_WIRE_LEAST ? ON_WIRE_LEAST : length;
    PyObject *one = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)whole);
    if (one) {
        u8 *data = (u8 *)PyBytes_AS_STRING(one);
        memcpy(data, frame, length);
        memset(data + length, 0, whole - length);
    }
    return one;
}

/* A packet as frames: 1; 0: it is Python's, and nothing has happened; -1: an exception. `first` has the commands and options, `last` more. */
static int send_packet(PyObject *frames, u8 *data, size_t length, const struct sent *first, const struct sent *last, const struct context *contexts,
                       unsigned flags)
{
    bool is_cut = first->low & DEXT && first->low & IC_OR_TSE;
    if (last->low & VLE && flags & TAGS)
        return 0;
    if (!is_cut && (length < FRAME_LEAST || length > SENT_MOST))
        return 0;
    const struct context *c = &contexts[is_cut];
    struct sums sums = {c->ip >> 8 & 0xFF, c->ip >> 16, c->transport >> 8 & 0xFF, c->transport >> 16};
    if (is_cut) {
        unsigned header = c->more >> 8 & 0xFF, most = c->more >> 16, ip = c->ip & 0xFF, tcp = c->transport & 0xFF;
        bool whole = ip + 20 <= header && tcp + 20 <= header && header <= length;
        if (!whole || most < SEGMENT_LEAST || header + most > SENT_MOST || !(c->size & IS_TCP))
            return 0;
        if (!offload_cut(frames, data, length, header, most, ip, tcp, sums))
            return -1;
        PyObject *end = PyList_GET_ITEM(frames, PyList_GET_SIZE(frames) - 1);
        if (!(flags & PADS) || PyBytes_GET_SIZE(end) >= ON_WIRE_LEAST)
            return 1;
        PyObject *padded = pad((const u8 *)PyBytes_AS_STRING(end), (size_t)PyBytes_GET_SIZE(end), flags);
        return padded && !PyList_SetItem(frames, PyList_GET_SIZE(frames) - 1, padded) ? 1 : -1;
    }
    if (!(first->low & DEXT)) {
        if (last->low & IC_OR_TSE)
            sum_insert(data, length, last->high >> 8 & 0xFF, last->low >> 16 & 0xFF, 0);
    } else {
        if (first->high & IXSM_ASKED)
            sum_insert(data, length, c->ip & 0xFF, sums.ip_at, sums.ip_end);
        if (first->high & TXSM_ASKED)
            sum_insert(data, length, c->transport & 0xFF, sums.tcp_at, sums.tcp_end);
    }
    PyObject *one = pad(data, length, flags);
    int failed = !one || PyList_Append(frames, one);
    Py_XDECREF(one);
    return failed ? -1 : 1;
}

static void count_sent(PyObject *frames, struct counts *c)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(frames); i++) {
        PyObject *frame = PyList_GET_ITEM(frames, i);
        const u8 *data = (const u8 *)PyBytes_AS_STRING(frame);
        count_size(c, (size_t)PyBytes_GET_SIZE(frame) + CRC);
        bool to_all = !memcmp(data, "\xff\xff\xff\xff\xff\xff", 6);
        c->broadcasts += to_all, c->groups += data[0] & 1 && !to_all;
    }
}

PyObject *e1000_take(PyObject *module, PyObject *args)
{
    const struct module_state *state = PyModule_GetState(module);
    struct ram *ram;
    unsigned long long start;
    unsigned count, head, tail, most, most_frames, flags, taken = 0, cut = 0;
    Py_buffer contexts;
    if (!PyArg_ParseTuple(args, "O!KIIIIIIw*", state->types[TYPE_RAM], &ram, &start, &count, &head, &tail, &most, &most_frames, &flags, &contexts))
        return NULL;
    PyObject *frames = PyList_New(0);
    bool good = contexts.len == 2 * sizeof(struct context) && head < count && tail < count && ram_has(ram, start, (u64)count * DESCRIPTOR);
    bool told = false;
    int outcome = 1;
    while (frames && good && outcome > 0 && taken < most && PyList_GET_SIZE(frames) < (Py_ssize_t)most_frames) {
        u8 data[FRAME_MOST];
        size_t length = 0;
        struct sent first = {0}, one = {0};
        unsigned end = head, used = 0, pieces = 0;
        bool is_whole = false;
        for (; end != tail && !is_whole; end = end + 1 < count ? end + 1 : 0, used++) {
            memcpy(&one, ram->data + start + (u64)end * DESCRIPTOR, sizeof one);
            if (one.low & DEXT && !(one.low & KIND)) { /* a context */
                if (pieces)
                    break;
                is_whole = true;
                continue;
            }
            if (!pieces++)
                first = one;
            u32 part = one.low & (one.low & DEXT ? 0xFFFFF : 0xFFFF);
            if (part && (length + part > sizeof data || !ram_has(ram, one.address, part)))
                break;
            if (part)
                memcpy(data + length, ram->data + one.address, part);
            length += part;
            is_whole = one.low & EOP_BIT;
        }
        if (!is_whole)
            break;
        if (!pieces)
            memcpy((u8 *)contexts.buf + (one.low & IC_OR_TSE ? sizeof(struct context) : 0), &one, sizeof one);
        else {
            struct context both[2];
            memcpy(both, contexts.buf, sizeof both);
            outcome = send_packet(frames, data, length, &first, &one, both, flags);
            if (outcome <= 0)
                break;
            cut += first.low & DEXT && first.low & IC_OR_TSE;
        }
        for (; used; used--, taken++, head = head + 1 < count ? head + 1 : 0) {
            u8 *at = ram->data + start + (u64)head * DESCRIPTOR;
            if (!(at[11] & RS >> 24))
                continue;
            at[12] = (at[12] & 0xF0) | DD;
            ram_wrote(ram, &(struct span){start + (u64)head * DESCRIPTOR + 12, 1}, 1);
            told = true;
        }
    }
    PyBuffer_Release(&contexts);
    if (!frames || outcome < 0) {
        Py_XDECREF(frames);
        return NULL;
    }
    struct counts c = {0};
    count_sent(frames, &c);
    return Py_BuildValue("(NIIOIK(IIIIII)II)", frames, head, taken, told ? Py_True : Py_False, cut, c.octets, c.sizes[0], c.sizes[1], c.sizes[2],
                         c.sizes[3], c.sizes[4], c.sizes[5], c.broadcasts, c.groups);
}
