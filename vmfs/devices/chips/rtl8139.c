/* The rings of descriptors of an RTL8139C+ (data sheet 1.6, chapter 9). A ring has up to 64; the one with EOR is its last. */
#include <string.h>

#include "frames.h"
#include "module.h"
#include "offload.h"
#include "ram.h"

enum { DESCRIPTOR = 16, RING_MOST = 64, ON_WIRE_LEAST = 60, CRC = 4, TAG = 4, ADDRESSES = 12, VLAN = 0x8100, SEGMENT_LEAST = 64 };
enum { V4 = 20, PROTOCOL_AT = 9, IP_CSUM = 10, TCP_CSUM = 16, UDP_CSUM = 6, TCP_LEAST = 20 };
enum { DETAGS = 1, CHECKS = 2 }; /* of rtl8139_put */
#define OWN (1u << 31)
#define EOR (1u << 30)
#define FS (1u << 29)
#define LS (1u << 28)
#define LGSEN (1u << 27)        /* of what is sent: cut it; */
#define IPCS (1u << 18)
#define UDPCS (1u << 17)
#define TCPCS (1u << 16)
#define TES (1u << 23)
#define TAGC (1u << 17)         /* of the second word: put a tag in */
#define RES (1u << 20)          /* of what has come */
#define TAVA (1u << 16)
enum { RX_SIZE = 0x1FFF, TCP_IS = 1 << 16, UDP_IS = 2 << 16, IP_IS = 3 << 16, IPF = 1 << 15, UDPF = 1 << 14, TCPF = 1 << 13 };

struct descriptor { u32 command, tag; u64 buffer; };

static struct descriptor descriptor_at(const struct ram *ram, u64 at)
{
    struct descriptor d;
    memcpy(&d, ram->data + at, sizeof d);
    return d;
}

/* Give one back to the driver: `status` without OWN, with EOR as it was. The ring is aligned to 256 bytes. */
static void give_back(struct ram *ram, u64 at, u32 status)
{
    __atomic_store_n((u32 *)(ram->data + at), status, __ATOMIC_RELEASE);
    ram_wrote(ram, &(struct span){at, 8}, 1);
}

static unsigned next(unsigned at, u32 command) { return command & EOR || at + 1 == RING_MOST ? 0 : at + 1; }

/* ---- What the guest sends ----------------------------------------------------------------------------------------------------------- */

/* Checksums are put in anew, where there is what they are of; false: an exception. */
static bool put_sums_or_cut(PyObject *frames, u8 *frame, size_t length, u32 command, unsigned *count)
{
    unsigned ip = FRAME_LEAST, size = length >= FRAME_LEAST + V4 ? (frame[ip] & 15) * 4u : 0, transport = ip + size;
    bool is_v4 = size >= V4 && get16(frame + 12) == 0x0800 && frame[ip] >> 4 == 4 && transport <= length;
    unsigned protocol = is_v4 ? frame[ip + PROTOCOL_AT] : 0;
    if (command & LGSEN) {
        unsigned most = command >> 16 & 0x7FF, header = transport;
        if (protocol == PROTOCOL_TCP && transport + TCP_LEAST <= length)
            header += (frame[transport + 12] >> 4) * 4u;
        if (header < transport + TCP_LEAST || header > length || most < SEGMENT_LEAST) {
            *count = 0;         /* nothing that could be cut */
            return true;
        }
        put16(frame + ip + IP_CSUM, 0);
        put16(frame + transport + TCP_CSUM, sum_add(sum_of(frame + ip + 12, 8), PROTOCOL_TCP));
        struct sums sums = {ip + IP_CSUM, transport - 1, transport + TCP_CSUM, 0};
        Py_ssize_t before = PyList_GET_SIZE(frames);
        bool done = offload_cut(frames, frame, length, header, most, ip, transport, sums);
        *count = (unsigned)(PyList_GET_SIZE(frames) - before);
        return done;
    }
    if (is_v4 && command & IPCS) {
        put16(frame + ip + IP_CSUM, 0);
        sum_insert(frame, length, ip, ip + IP_CSUM, transport - 1);
    }
    unsigned end = is_v4 ? ip + get16(frame + ip + 2) : 0, at = 0;
    if (protocol == PROTOCOL_TCP && command & TCPCS && transport + TCP_LEAST <= end)
        at = transport + TCP_CSUM;
    if (protocol == PROTOCOL_UDP && command & UDPCS && transport + 8 <= end)
        at = transport + UDP_CSUM;
    if (at && end <= length) {
        put16(frame + at, sum_add(sum_add(sum_of(frame + ip + 12, 8), protocol), end - transport));
        sum_insert(frame, length, transport, at, end - 1);
    }
    PyObject *one = PyBytes_FromStringAndSize((char *)frame, (Py_ssize_t)length);
    bool done = one && !PyList_Append(frames, one);
    Py_XDECREF(one);
    *count = 1;
    return done;
}

/* The tag of the last frames of the list, whose number is `count`; false: an exception. */
static bool put_tags(PyObject *frames, unsigned count, unsigned tag)
{
    for (Py_ssize_t at = PyList_GET_SIZE(frames) - (Py_ssize_t)count; at < PyList_GET_SIZE(frames); at++) {
        PyObject *frame = PyList_GET_ITEM(frames, at), *one = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(frame) + TAG);
        if (!one)
            return false;
        u8 *data = (u8 *)PyBytes_AS_STRING(one);
        const u8 *from = (const u8 *)PyBytes_AS_STRING(frame);
        memcpy(data, from, ADDRESSES);
        put16(data + ADDRESSES, VLAN);
        memcpy(data + ADDRESSES + 2, &(u16){(u16)tag}, 2); /* its bytes are in the frame's order */
        memcpy(data + ADDRESSES + TAG, from + ADDRESSES, (size_t)PyBytes_GET_SIZE(frame) - ADDRESSES);
        if (PyList_SetItem(frames, at, one))
            return false;
    }
    return true;
}

PyObject *rtl8139_take(PyObject *module, PyObject *args)
{
    const struct module_state *state = PyModule_GetState(module);
    struct ram *ram;
    unsigned long long start;
    unsigned at, most, sent = 0, bad = 0;
    if (!PyArg_ParseTuple(args, "O!KII", state->types[TYPE_RAM], &ram, &start, &at, &most))
        return NULL;
    PyObject *frames = PyList_New(0);
    bool there = at < RING_MOST && !(start & 0xFF) && ram_has(ram, start, RING_MOST * DESCRIPTOR), waits = there;
    for (unsigned turn = 0; frames && there && turn < RING_MOST && PyList_GET_SIZE(frames) < (Py_ssize_t)most; turn++) {
        u8 frame[FRAME_MOST];
        size_t length = 0;
        unsigned count = 0, end = at;
        bool is_whole = false, is_good = true;
        struct descriptor first = descriptor_at(ram, start + (u64)at * DESCRIPTOR), d = first;
        for (; count < RING_MOST && !is_whole; count++) { /* a packet whose last descriptor is the driver's yet is none */
            d = count ? descriptor_at(ram, start + (u64)end * DESCRIPTOR) : first;
            if (!(d.command & OWN))
                break;
            u32 part = d.command & 0xFFFF;
            is_good = is_good && !(d.command & FS) == !!count && length + part <= sizeof frame && (!part || ram_has(ram, d.buffer, part));
            if (is_good && part)
                memcpy(frame + length, ram->data + d.buffer, part);
            length += part;
            is_whole = d.command & LS;
            end = next(end, d.command);
        }
        if (!(d.command & OWN)) {
            waits = false;
            break;
        }
        unsigned made = 0;
        is_good = is_good && is_whole && length >= FRAME_LEAST;
        if (is_good && !put_sums_or_cut(frames, frame, length, first.command, &made))
            Py_CLEAR(frames);
        else if (is_good && made && first.tag & TAGC && !put_tags(frames, made, first.tag & 0xFFFF))
            Py_CLEAR(frames);
        sent += made > 0, bad += !made;
        for (unsigned i = 0; i < count; i++) {
            u64 place = start + (u64)at * DESCRIPTOR;
            u32 command = descriptor_at(ram, place).command;
            give_back(ram, place, (command & (EOR | FS | LS)) | (made ? 0 : TES));
            at = next(at, command);
        }
        at = end;
    }
    return frames ? Py_BuildValue("(NIIIO)", frames, at, sent, bad, waits ? Py_True : Py_False) : NULL;
}

/* ---- What the guest receives -------------------------------------------------------------------------------------------------------- */

static u32 found_in(const u8 *frame, size_t length)
{
    int ip, transport;
    offload_check(frame, length, &ip, &transport);
    if (ip < 0)
        return 0;
    u32 fails = ip ? 0 : IPF;
    if (transport < 0)
        return IP_IS | fails;
    bool is_tcp = frame[FRAME_LEAST + PROTOCOL_AT] == PROTOCOL_TCP;
    return (is_tcp ? TCP_IS : UDP_IS) | fails | (transport ? 0 : is_tcp ? TCPF : UDPF);
}

PyObject *rtl8139_put(PyObject *module, PyObject *args)
{
    const struct module_state *state = PyModule_GetState(module);
    struct ram *ram;
    unsigned long long start;
    unsigned at, status, flags, bad = 0;
    Py_buffer address;
    PyObject *frames;
    if (!PyArg_ParseTuple(args, "O!KIy*IIO!", state->types[TYPE_RAM], &ram, &start, &at, &address, &status, &flags, &PyList_Type, &frames))
        return NULL;
    bool there = address.len == 6 && at < RING_MOST && !(start & 0xFF) && ram_has(ram, start, RING_MOST * DESCRIPTOR), full = !there;
    Py_ssize_t done = 0;
    for (; there && !full && done < PyList_GET_SIZE(frames); done++) {
        PyObject *object = PyList_GET_ITEM(frames, done);
        if (!PyBytes_CheckExact(object) || PyBytes_GET_SIZE(object) < FRAME_LEAST || memcmp(PyBytes_AS_STRING(object), address.buf, 6))
            break;
        const u8 *frame = (const u8 *)PyBytes_AS_STRING(object);
        size_t length = (size_t)PyBytes_GET_SIZE(object);
        if (length > RX_SIZE - CRC) { /* longer than the buffers of any driver */
            bad++;
            continue;
        }
        u8 data[RX_SIZE] = {0};
        u32 second = 0;
        if (flags & DETAGS && length >= FRAME_LEAST + TAG && get16(frame + ADDRESSES) == VLAN) {
            u16 tag;
            memcpy(&tag, frame + ADDRESSES + 2, 2);
            second = TAVA | tag;
            memcpy(data, frame, ADDRESSES);
            memcpy(data + ADDRESSES, frame + ADDRESSES + TAG, length - ADDRESSES - TAG);
            length -= TAG;
        } else
            memcpy(data, frame, length);
        length = length < ON_WIRE_LEAST ? ON_WIRE_LEAST : length;
        u32 crc = frame_crc(data, length), kind = flags & CHECKS ? found_in(data, length) : 0;
        memcpy(data + length, &crc, CRC);
        length += CRC;
        /* As many descriptors as it takes, if the driver has given them all. */
        unsigned count = 0, end = at;
        for (size_t room = 0; room < length && count < RING_MOST; count++) {
            struct descriptor d = descriptor_at(ram, start + (u64)end * DESCRIPTOR);
            if (!(d.command & OWN)) {
                full = true;
                break;
            }
            room += d.command & RX_SIZE;
            end = next(end, d.command);
        }
        if (full)
            break;
        bool is_bad = false;
        size_t part = 0;
        for (unsigned i = 0; i < count; i++) {
            u64 place = start + (u64)at * DESCRIPTOR;
            struct descriptor d = descriptor_at(ram, place);
            size_t size = d.command & RX_SIZE;
            size = size < length - part ? size : length - part;
            if (size && ram_has(ram, d.buffer, size)) {
                memcpy(ram->data + d.buffer, data + part, size);
                ram_wrote(ram, &(struct span){d.buffer, (u32)size}, 1);
            } else
                is_bad = true;
            part += size;
            bool is_last = i + 1 == count;
            is_bad = is_bad || (is_last && part < length);
            memcpy(ram->data + place + 4, &(u32){is_last ? second : 0}, 4);
            u32 row = (d.command & EOR) | (i ? 0 : FS) | (is_last ? LS | status | kind | (u32)length : 0);
            give_back(ram, place, is_last && is_bad ? row | RES : row);
            at = next(at, d.command);
        }
        bad += is_bad;
    }
    PyBuffer_Release(&address);
    return Py_BuildValue("(nIIO)", done, at, bad, full ? Py_True : Py_False);
}
