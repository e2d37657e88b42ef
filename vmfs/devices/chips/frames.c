/* Frames between a virtqueue and a list of bytes, many at a time (VIRTIO 1.2, 5.1.6), and between such a list and a socket. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "module.h"
#include "offload.h"
#include "ring.h"

/* struct virtio_net_hdr (5.1.6), little-endian. */
struct head { u8 flags, gso_type; uint16_t length, gso_size, csum_start, csum_offset, buffers; };
enum { NEEDS_CSUM = 1, DATA_VALID = 2, GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, BUFFERS_AT = 10 };
enum { TAKES = 64, FRAMES_MOST = 4096, SEGMENT_LEAST = 16, TCP_CSUM = 16, IP_CSUM = 10, SOCKET_FRAMES = 256, LENGTH = 4 };

/* ---- What the guest sends ----------------------------------------------------------------------------------------------------------- */

static void copy_out(const struct ram *ram, const struct chain *chain, u64 skip, u8 *to, u64 count)
{
    for (unsigned i = 0; i < chain->readable && count; i++) {
        const struct span *span = &chain->spans[i];
        if (skip >= span->length) {
            skip -= span->length;
            continue;
        }
        u64 part = span->length - skip < count ? span->length - skip : count;
        memcpy(to, ram->data + span->address + skip, part);
        to += part, count -= part, skip = 0;
    }
}

/* The places of IP, TCP and the payload in a packet that is to be cut. False: it has none of them. */
static bool find_headers(const u8 *frame, size_t length, const struct head *h, unsigned *ip, unsigned *header)
{
    unsigned kind = get16(frame + 12), tcp = h->csum_start, least = h->gso_type == GSO_TCPV4 ? 20 : 40;
    *ip = FRAME_LEAST;
    if (kind == 0x8100 && length >= FRAME_LEAST + 4)
        kind = get16(frame + 16), *ip += 4;
    if (kind != (h->gso_type == GSO_TCPV4 ? 0x0800 : 0x86DD) || tcp < *ip + least || tcp + 20u > length)
        return false;
    *header = tcp + (frame[tcp + 12] >> 4) * 4u;
    return *header >= tcp + 20 && *header <= length && frame[*ip] >> 4 == (h->gso_type == GSO_TCPV4 ? 4 : 6);
}

/* A frame as the driver wants it sent, as one or several at the end of the list: 1; 0: it is none that may be sent; -1: an exception. */
static int send_offloaded(PyObject *frames, u8 *frame, size_t length, const struct head *h)
{
    if (!(h->flags & NEEDS_CSUM) || h->csum_start + (size_t)h->csum_offset + 2 > length)
        return 0;
    if (h->gso_type == GSO_NONE)
        sum_insert(frame, length, h->csum_start, (size_t)h->csum_start + h->csum_offset, 0);
    else {
        unsigned ip, header, tcp = h->csum_start;
        if (h->csum_offset != TCP_CSUM || h->gso_size < SEGMENT_LEAST || !find_headers(frame, length, h, &ip, &header))
            return 0;
        bool is_v4 = h->gso_type == GSO_TCPV4;
        unsigned addresses = is_v4 ? sum_of(frame + ip + 12, 8) : sum_of(frame + ip + 8, 32);
        put16(frame + tcp + TCP_CSUM, sum_add(addresses, PROTOCOL_TCP));
        if (is_v4)
            put16(frame + ip + IP_CSUM, 0);
        struct sums sums = {ip + IP_CSUM, tcp - 1, tcp + TCP_CSUM, 0};
        return offload_cut(frames, frame, length, header, h->gso_size, ip, tcp, sums) ? 1 : -1;
    }
    PyObject *one = PyBytes_FromStringAndSize((char *)frame, (Py_ssize_t)length);
    int failed = !one || PyList_Append(frames, one);
    Py_XDECREF(one);
    return failed ? -1 : 1;
}

static int take_one(PyObject *frames, const struct ram *ram, const struct chain *chain, bool checks, bool cuts)
{
    u64 length = chain->readable_bytes - sizeof(struct head);
    struct head h;
    copy_out(ram, chain, 0, (u8 *)&h, sizeof h);
    if (length < FRAME_LEAST || length > FRAME_MOST)
        return 0;
    if (h.flags || h.gso_type) {
        bool known = h.gso_type == GSO_NONE || (cuts && (h.gso_type == GSO_TCPV4 || h.gso_type == GSO_TCPV6));
        if (!checks || !known)  /* it asks for what was not offered */
            return 0;
        u8 buffer[FRAME_MOST];
        copy_out(ram, chain, sizeof h, buffer, length);
        return send_offloaded(frames, buffer, length, &h);
    }
    PyObject *one = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (!one)
        return -1;
    copy_out(ram, chain, sizeof h, (u8 *)PyBytes_AS_STRING(one), length);
    int failed = PyList_Append(frames, one);
    Py_DECREF(one);
    return failed ? -1 : 1;
}

static void push_all(struct queue *q, struct ram *ram, const u32 (*used)[2], unsigned count)
{
    struct span spans[2] = {{q->device + 4 + 8ull * (q->used % q->size), 0}, {q->device + 2, 2}};
    for (unsigned i = 0; i < count; i++) {
        u64 at = q->device + 4 + 8ull * (q->used++ % q->size);
        memcpy(ram->data + at, used[i], sizeof used[i]);
        if (at == spans[0].address + spans[0].length)
            spans[0].length += 8;
        else {
            ram_wrote(ram, spans, 1);
            spans[0] = (struct span){at, 8};
        }
    }
    __atomic_store_n((uint16_t *)(ram->data + q->device + 2), q->used, __ATOMIC_RELEASE); /* the entries are there before */
    ram_wrote(ram, spans, 2);
}

PyObject *frames_take(PyObject *module, PyObject *args)
{
    const struct module_state *state = PyModule_GetState(module);
    struct queue *q;
    struct ram *ram;
    PyObject *frames;
    int checks, cuts, outcome = 1;
    if (!PyArg_ParseTuple(args, "O!O!pp", state->types[TYPE_QUEUE], &q, state->types[TYPE_RAM], &ram, &checks, &cuts))
        return NULL;
    if (!(frames = PyList_New(0)))
        return NULL;
    u32 used[TAKES][2];
    unsigned count = 0, bad = 0;
    bool wrong = false;
    struct chain chain;
    while (count < TAKES && PyList_GET_SIZE(frames) < FRAMES_MOST && outcome >= 0) {
        enum popped popped = queue_pop(q, ram, &chain);
        wrong = popped == QUEUE_WRONG;
        if (popped != QUEUE_POPPED)
            break;
        if (chain.readable_bytes < sizeof(struct head)) {
            q->taken--;
            wrong = true;
            break;
        }
        outcome = take_one(frames, ram, &chain, checks, cuts);
        bad += outcome == 0;
        used[count][0] = chain.head, used[count++][1] = 0;
    }
    if (count)
        push_all(q, ram, used, count);
    if (outcome < 0) {
        Py_DECREF(frames);
        return NULL;
    }
    return Py_BuildValue("(NIIO)", frames, count, bad, wrong ? Py_True : Py_False);
}

/* ---- What the guest receives -------------------------------------------------------------------------------------------------------- */

/* What goes into buffers: the head, perhaps other headers than the first frame's, and parts of frames. */
struct packet { struct head head; u8 headers[FRAME_LEAST + 40 + 60]; unsigned header, count; u64 length; };

/* So many frames from `at` on as are one packet of TCP; 1: only itself. */
static void gather(PyObject *frames, Py_ssize_t at, bool checks, bool joins, struct packet *p)
{
    const u8 *frame = (const u8 *)PyBytes_AS_STRING(PyList_GET_ITEM(frames, at));
    size_t length = (size_t)PyBytes_GET_SIZE(PyList_GET_ITEM(frames, at));
    struct segment first, next;
    *p = (struct packet){.count = 1, .length = length};
    if (!checks || !offload_look(frame, length, &first))
        return;
    p->head.flags = DATA_VALID;
    unsigned most = (unsigned)length - first.header;
    u32 payload = most;
    bool ends = !joins || first.is_last, is_last = first.is_last;
    while (!ends && at + p->count < PyList_GET_SIZE(frames)) {
        PyObject *other = PyList_GET_ITEM(frames, at + p->count);
        if (!offload_look((const u8 *)PyBytes_AS_STRING(other), (size_t)PyBytes_GET_SIZE(other), &next) || !offload_goes_on(&first, payload, &next))
            break;
        unsigned part = next.length - next.header;
        if (part > most || first.header - FRAME_LEAST + payload + part > 65535)
            break;
        payload += part;
        p->count++;
        is_last = next.is_last;
        ends = is_last || part < most;
    }
    if (p->count == 1)
        return;
    p->header = first.header;
    p->length = first.header + payload;
    u8 *h = p->headers, *ip = h + FRAME_LEAST, *tcp = h + first.tcp;
    memcpy(h, frame, first.header);
    u32 size = (u32)p->length - first.tcp;
    if (first.is_v4) {
        put16(ip + 2, (unsigned)p->length - FRAME_LEAST);
        put16(ip + IP_CSUM, 0);
        sum_insert(h, first.tcp, FRAME_LEAST, FRAME_LEAST + IP_CSUM, 0);
    } else
        put16(ip + 4, size);
    tcp[13] |= is_last ? 8 : 0;
    unsigned addresses = first.is_v4 ? sum_of(ip + 12, 8) : sum_of(ip + 8, 32);
    put16(tcp + TCP_CSUM, sum_add(sum_add(addresses, PROTOCOL_TCP), size & 0xFFFF));
    p->head = (struct head){NEEDS_CSUM, first.is_v4 ? GSO_TCPV4 : GSO_TCPV6, (uint16_t)first.header, (uint16_t)most, (uint16_t)first.tcp, TCP_CSUM, 0};
}

/* The bytes of a packet, one after the other. */
struct source { const struct packet *p; PyObject *frames; Py_ssize_t at; unsigned piece; size_t offset; };

static size_t source_next(struct source *s, const u8 **data)
{
    for (;; s->piece++, s->offset = 0) {
        size_t length, skip = 0;
        if (s->piece == 0)
            *data = (const u8 *)&s->p->head, length = sizeof s->p->head;
        else if (s->piece == 1)
            *data = s->p->headers, length = s->p->header;
        else {
            PyObject *frame = PyList_GET_ITEM(s->frames, s->at + s->piece - 2);
            *data = (const u8 *)PyBytes_AS_STRING(frame), length = (size_t)PyBytes_GET_SIZE(frame), skip = s->p->header;
        }
        if (length > skip + s->offset) {
            *data += skip + s->offset;
            return length - skip - s->offset;
        }
    }
}

/* Write into the parts of a chain that the device may write. Returns how many bytes that were. */
static u32 fill(struct ram *ram, const struct chain *chain, struct source *source, u64 *left)
{
    u32 done = 0;
    const struct span *spans = chain->spans + chain->readable;
    for (unsigned i = 0; i < chain->writable && *left; i++)
        for (u32 at = 0; at < spans[i].length && *left;) {
            const u8 *data;
            size_t part = source_next(source, &data);
            part = part < spans[i].length - at ? part : spans[i].length - at;
            memcpy(ram->data + spans[i].address + at, data, part);
            source->offset += part, at += (u32)part, done += (u32)part, *left -= part;
        }
    ram_wrote(ram, spans, chain->writable);
    return done;
}

enum put { PUT_WRONG = -1, PUT_NO_BUFFERS, PUT_DROPPED, PUT_DONE };

static enum put put_packet(struct queue *q, struct ram *ram, PyObject *frames, Py_ssize_t at, const struct packet *p, unsigned most, u32 (*used)[2])
{
    struct source source = {p, frames, at, 0, 0};
    struct chain chain;
    struct span buffers[2] = {{0}};     /* where the head has their number, which may be in two spans */
    u64 left = sizeof p->head + p->length;
    unsigned count = 0, where = 0;
    while (left && count < most) {
        enum popped popped = queue_pop(q, ram, &chain);
        if (popped != QUEUE_POPPED || chain.writable_bytes < sizeof p->head) {
            q->taken -= (uint16_t)(count + (popped == QUEUE_POPPED));
            return popped == QUEUE_EMPTY ? PUT_NO_BUFFERS : PUT_WRONG;
        }
        if (!count)
            for (u32 i = chain.readable, skip = BUFFERS_AT; where < 2; i++) {
                for (; where < 2 && skip < chain.spans[i].length; skip++)
                    buffers[where++] = (struct span){chain.spans[i].address + skip, 1};
                skip -= skip < chain.spans[i].length ? 0 : chain.spans[i].length;
            }
        used[count][0] = chain.head;
        used[count++][1] = fill(ram, &chain, &source, &left);
    }
    if (left && p->count > 1) {
        q->taken -= (uint16_t)count;
        return PUT_NO_BUFFERS;
    }
    if (left)
        for (unsigned i = 0; i < count; i++)
            used[i][1] = 0;     /* longer than the buffers that the driver chose */
    else
        for (unsigned i = 0; i < 2; i++)
            ram->data[buffers[i].address] = (u8)(count >> 8 * i);
    ram_wrote(ram, buffers, 2);
    push_all(q, ram, (const u32 (*)[2])used, count);
    return left ? PUT_DROPPED : PUT_DONE;
}

PyObject *frames_put(PyObject *module, PyObject *args)
{
    const struct module_state *state = PyModule_GetState(module);
    struct queue *q;
    struct ram *ram;
    PyObject *frames;
    int merges, checks, joins;
    if (!PyArg_ParseTuple(args, "O!O!O!ppp", state->types[TYPE_QUEUE], &q, state->types[TYPE_RAM], &ram, &PyList_Type, &frames, &merges, &checks, &joins))
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(frames); i++)
        if (!PyBytes_CheckExact(PyList_GET_ITEM(frames, i)))
            return PyErr_Format(PyExc_TypeError, "a list of bytes");
    unsigned most = merges ? q->size : 1;
    u32 (*used)[2] = PyMem_Malloc((most ? most : 1) * sizeof *used);
    if (!used)
        return PyErr_NoMemory();
    Py_ssize_t at = 0;
    enum put put = PUT_DONE;
    struct packet packet;
    while (put == PUT_DONE && at < PyList_GET_SIZE(frames)) {
        gather(frames, at, checks, joins, &packet);
        put = put_packet(q, ram, frames, at, &packet, most, used);
        if (put == PUT_NO_BUFFERS && packet.count > 1) {
            gather(frames, at, checks, false, &packet); /* there may be room for one of them */
            put = put_packet(q, ram, frames, at, &packet, most, used);
        }
        at += put == PUT_DONE ? packet.count : 0;
    }
    PyMem_Free(used);
    return Py_BuildValue("(nOO)", at, put == PUT_DROPPED ? Py_True : Py_False, put == PUT_WRONG ? Py_True : Py_False);
}

/* ---- Sockets ------------------------------------------------------------------------------------------------------------------------- */

PyObject *frames_split(PyObject *module, PyObject *args)
{
    Py_buffer buffer;
    Py_ssize_t filled, at = 0;
    if (!PyArg_ParseTuple(args, "w*n", &buffer, &filled))
        return NULL;
    u8 *data = buffer.buf;
    PyObject *frames = filled >= 0 && filled <= buffer.len ? PyList_New(0) : NULL;
    if (!frames && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "more than the buffer has");
    long long nonsense = -1;
    while (frames && filled - at >= LENGTH) {
        u32 length = get32(data + at);
        if (!length || length > FRAME_MOST) {
            nonsense = length;
            break;
        }
        if (filled - at < LENGTH + (Py_ssize_t)length)
            break;
        PyObject *one = PyBytes_FromStringAndSize((char *)data + at + LENGTH, (Py_ssize_t)length);
        if (!one || PyList_Append(frames, one))
            Py_CLEAR(frames);
        Py_XDECREF(one);
        at += LENGTH + (Py_ssize_t)length;
    }
    if (frames)
        memmove(data, data + at, (size_t)(filled - at));
    PyBuffer_Release(&buffer);
    return frames ? Py_BuildValue("(NnL)", frames, filled - at, nonsense) : NULL;
}

PyObject *frames_send(PyObject *module, PyObject *args)
{
    int fd, unpads;
    PyObject *frames;
    if (!PyArg_ParseTuple(args, "iO!p", &fd, &PyList_Type, &frames, &unpads))
        return NULL;
    struct iovec parts[2 * SOCKET_FRAMES];
    u8 lengths[SOCKET_FRAMES][LENGTH];
    Py_ssize_t count = PyList_GET_SIZE(frames) < SOCKET_FRAMES ? PyList_GET_SIZE(frames) : SOCKET_FRAMES, i;
    for (i = 0; i < count; i++) {
        PyObject *frame = PyList_GET_ITEM(frames, i);
        if (!PyBytes_CheckExact(frame))
            return PyErr_Format(PyExc_TypeError, "a list of bytes");
        u8 *data = (u8 *)PyBytes_AS_STRING(frame);
        size_t length = (size_t)PyBytes_GET_SIZE(frame), end;
        if (unpads && length == 60 && get16(data + 12) == 0x0800 && (end = 14u + get16(data + 16)) >= 34 && end < length)
            length = end;
        put32(lengths[i], (u32)length);
        parts[2 * i] = (struct iovec){lengths[i], LENGTH};
        parts[2 * i + 1] = (struct iovec){data, length};
    }
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2 * (size_t)count};
    ssize_t sent = count ? sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
    if (sent < 0) {
        if (errno != EAGAIN && errno != EINTR)
            return PyErr_SetFromErrno(PyExc_OSError);
        sent = 0;
    }
    size_t left = (size_t)sent;
    for (i = 0; i < count && left >= LENGTH + parts[2 * i + 1].iov_len; i++)
        left -= LENGTH + parts[2 * i + 1].iov_len;
    if (!left)
        return Py_BuildValue("(ny#)", i, "", (Py_ssize_t)0);
    /* A part of that one has gone: the rest of it is the caller's to send. */
    size_t whole = LENGTH + parts[2 * i + 1].iov_len;
    PyObject *rest = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(whole - left));
    if (!rest)
        return NULL;
    for (size_t at = left; at < whole; at++)
        PyBytes_AS_STRING(rest)[at - left] = (char)(at < LENGTH ? lengths[i][at] : ((u8 *)parts[2 * i + 1].iov_base)[at - LENGTH]);
    return Py_BuildValue("(nN)", i + 1, rest);
}
