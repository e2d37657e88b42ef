#include "offload.h"

#include <string.h>

enum { ETHER = 14, V4 = 20, V6 = 40, FIN = 1, PSH = 8, ACK = 16 };

unsigned sum_of(const u8 *data, size_t length)
{
    u64 sum = 0;
    for (; length >= 4; data += 4, length -= 4) {
        u32 word;
        memcpy(&word, data, 4);
        sum += word; /* of 2**18 words at the most */
    }
    u8 rest[4] = {0};
    u32 word;
    memcpy(rest, data, length);
    memcpy(&word, rest, 4);
    sum += word;
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return __builtin_bswap16((uint16_t)sum); /* a sum of words in the other order is the sum in the other order */
}

void sum_insert(u8 *frame, size_t length, size_t start, size_t at, size_t end)
{
    if (at + 2 > length || start >= length)
        return;
    size_t stop = end && end + 1 < length ? end + 1 : length;
    put16(frame + at, sum_complement(stop > start ? sum_of(frame + start, stop - start) : 0));
}

bool offload_cut(PyObject *list, const u8 *frame, size_t length, unsigned header, unsigned most, unsigned ip, unsigned tcp, struct sums sums)
{
    size_t payload = length - header;
    bool is_v4 = frame[ip] >> 4 == 4;
    unsigned identification = get16(frame + ip + 4);
    u32 sequence = get32(frame + tcp + 4);
    for (size_t at = 0, number = 0; at < payload || !number; at += most, number++) {
        size_t part = payload - at < most ? payload - at : most, size = header + part;
        PyObject *one = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
        if (!one)
            return false;
        u8 *data = (u8 *)PyBytes_AS_STRING(one);
        memcpy(data, frame, header);
        memcpy(data + header, frame + header + at, part);
        if (is_v4) {
            put16(data + ip + 2, (unsigned)(size - ip));
            put16(data + ip + 4, (unsigned)(identification + number));
            sum_insert(data, size, ip, sums.ip_at, sums.ip_end);
        } else
            put16(data + ip + 4, (unsigned)(size - ip - V6));
        put32(data + tcp + 4, sequence + (u32)at);
        if (at + most < payload)
            data[tcp + 13] &= (u8)~(FIN | PSH); /* which are the last one's */
        if (sums.tcp_at + 2 <= size) {
            put16(data + sums.tcp_at, sum_add(get16(data + sums.tcp_at), (unsigned)(size - tcp) & 0xFFFF));
            sum_insert(data, size, tcp, sums.tcp_at, sums.tcp_end);
        }
        int failed = PyList_Append(list, one);
        Py_DECREF(one);
        if (failed)
            return false;
    }
    return true;
}

/* ---- Segments that are one again ---------------------------------------------------------------------------------------------------- */

static unsigned pseudo(const u8 *frame, unsigned ip, bool is_v4, unsigned length, unsigned protocol)
{
    unsigned addresses = is_v4 ? sum_of(frame + ip + 12, 8) : sum_of(frame + ip + 8, 32);
    return sum_add(sum_add(addresses, protocol), length);
}

bool offload_look(const u8 *frame, size_t length, struct segment *s)
{
    if (length < ETHER + V4 + 20 || length > FRAME_MOST)
        return false;
    unsigned kind = get16(frame + 12);
    const u8 *ip = frame + ETHER;
    s->is_v4 = kind == 0x0800;
    if (s->is_v4) {
        if (ip[0] != 0x45 || get16(ip + 2) != length - ETHER || get16(ip + 6) & 0x3FFF || ip[9] != PROTOCOL_TCP || sum_of(ip, V4) != 0xFFFF)
            return false;
        s->tcp = ETHER + V4;
    } else {
        if (kind != 0x86DD || length < ETHER + V6 + 20 || ip[0] >> 4 != 6 || get16(ip + 4) != length - ETHER - V6 || ip[6] != PROTOCOL_TCP)
            return false;
        s->tcp = ETHER + V6;
    }
    const u8 *tcp = frame + s->tcp;
    unsigned size = (unsigned)length - s->tcp, head = (tcp[12] >> 4) * 4u;
    if (head < 20 || head >= size || (tcp[13] & ~PSH) != ACK)
        return false;
    if (sum_add(pseudo(frame, ETHER, s->is_v4, size, PROTOCOL_TCP), sum_of(tcp, size)) != 0xFFFF)
        return false;
    s->frame = frame;
    s->length = (unsigned)length;
    s->header = s->tcp + head;
    s->sequence = get32(tcp + 4);
    s->is_last = tcp[13] & PSH;
    return true;
}

bool offload_goes_on(const struct segment *first, u32 payload, const struct segment *next)
{
    const u8 *a = first->frame, *b = next->frame, *ip_a = a + ETHER, *ip_b = b + ETHER, *tcp_a = a + first->tcp, *tcp_b = b + next->tcp;
    if (first->is_v4 != next->is_v4 || first->header != next->header || next->sequence != first->sequence + payload || memcmp(a, b, ETHER))
        return false;
    if (first->is_v4 ? ip_a[1] != ip_b[1] || get16(ip_a + 6) != get16(ip_b + 6) || ip_a[8] != ip_b[8] || memcmp(ip_a + 12, ip_b + 12, 8)
                     : memcmp(ip_a, ip_b, 4) || memcmp(ip_a + 7, ip_b + 7, 33))
        return false;
    /* Ports; what it acknowledges; window and urgent pointer; options. */
    return !memcmp(tcp_a, tcp_b, 4) && !memcmp(tcp_a + 8, tcp_b + 8, 4) && !memcmp(tcp_a + 14, tcp_b + 14, 2) && tcp_a[12] == tcp_b[12] &&
           !memcmp(tcp_a + 18, tcp_b + 18, first->header - first->tcp - 18);
}

/* ---- For cards that only say whether sums are right ---------------------------------------------------------------------------------- */

void offload_check(const u8 *frame, size_t length, int *ip_is, int *transport_is)
{
    const u8 *ip = frame + ETHER;
    *ip_is = *transport_is = -1;
    if (length < ETHER + V4 || get16(frame + 12) != 0x0800 || ip[0] != 0x45)
        return;
    *ip_is = sum_of(ip, V4) == 0xFFFF;
    unsigned size = get16(ip + 2), protocol = ip[9];
    if (get16(ip + 6) & 0x3FFF || (protocol != PROTOCOL_TCP && protocol != PROTOCOL_UDP) || size < V4 + 8 || ETHER + size > length)
        return;
    if (protocol == PROTOCOL_UDP && !get16(ip + V4 + 6))
        return;
    size -= V4;
    *transport_is = sum_add(pseudo(frame, ETHER, true, size, protocol), sum_of(ip + V4, size)) == 0xFFFF;
}

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

PyObject *offload_segments(PyObject *module, PyObject *args)
{
    Py_buffer frame;
    unsigned header, most, ip, tcp;
    struct sums s;
    if (!PyArg_ParseTuple(args, "y*IIII(IIII)", &frame, &header, &most, &ip, &tcp, &s.ip_at, &s.ip_end, &s.tcp_at, &s.tcp_end))
        return NULL;
    PyObject *list = NULL;
    size_t length = (size_t)frame.len;
    if (!most || header > length || ip > header || tcp > header || header - ip < V4 || header - tcp < 20)
        PyErr_SetString(PyExc_ValueError, "headers that are not in the frame");
    else if ((list = PyList_New(0)) && !offload_cut(list, frame.buf, length, header, most, ip, tcp, s))
        Py_CLEAR(list);
    PyBuffer_Release(&frame);
    return list;
}

PyObject *offload_insert(PyObject *module, PyObject *args)
{
    Py_buffer frame;
    unsigned start, at, end;
    if (!PyArg_ParseTuple(args, "w*III", &frame, &start, &at, &end))
        return NULL;
    sum_insert(frame.buf, (size_t)frame.len, start, at, end);
    PyBuffer_Release(&frame);
    Py_RETURN_NONE;
}

PyObject *offload_found(PyObject *module, PyObject *object)
{
    Py_buffer frame;
    int ip, transport;
    if (PyObject_GetBuffer(object, &frame, PyBUF_SIMPLE))
        return NULL;
    offload_check(frame.buf, (size_t)frame.len, &ip, &transport);
    PyBuffer_Release(&frame);
    PyObject *words[] = {Py_None, Py_False, Py_True};
    return Py_BuildValue("(OO)", words[ip + 1], words[transport + 1]);
}
