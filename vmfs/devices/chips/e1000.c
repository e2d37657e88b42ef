/* The frames that an e1000 receives in plain descriptors (317453, 3.2.3). */
#include <string.h>

#include "frames.h"
#include "module.h"
#include "offload.h"
#include "ram.h"

enum { DESCRIPTOR = 16, ON_WIRE_LEAST = 60, CRC = 4, STANDARD_MOST = 1518, SPANS = 64, SIZES = 6 };
enum { STRIPS_CRC = 1, CHECKS_IP = 2, CHECKS_TRANSPORT = 4 };
enum { DD = 1, EOP = 2, IXSM = 4, TCPCS = 0x20, IPCS = 0x40, TCPE = 0x20, IPE = 0x40 };

/* IEEE 802.3's, four bytes at a time; the tables are made at the first use, with the GIL. */
static u32 tables[4][256];

static u32 frame_crc(const u8 *data, size_t length)
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

PyObject *e1000_put(PyObject *module, PyObject *args)
{
    static const unsigned most_of[SIZES] = {64, 127, 255, 511, 1023, 1522};
    const struct module_state *state = PyModule_GetState(module);
    struct ram *ram;
    unsigned long long start, octets = 0;
    unsigned count, head, tail, room, flags, vlan, sizes[SIZES] = {0};
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
        octets += whole + CRC;
        unsigned step = 0;
        while (step < SIZES - 1 && whole + CRC > most_of[step])
            step++;
        sizes[step]++;
    }
    ram_wrote(ram, spans, span_count);
    PyBuffer_Release(&address);
    return Py_BuildValue("(nIK(IIIIII))", at, head, octets, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]);
}
