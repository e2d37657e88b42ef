/* The requests of a virtio disk (VIRTIO 1.2, 5.2.6): reads and writes of files, without Python.
 *
 * Three ways to a request. Small reads of what the host has in memory are done at the notification, in the CPU's thread. All else is done
 * by workers: threads of Python, which wait and work here without the GIL, and complete a request by an interrupt while the guest goes on.
 * And `serve` does all of a queue at once, where time follows the instructions and a request takes none.
 *
 * What is seldom (flushes, discards, writes into an overlay), what the host fails at, and all that no driver may do is Python's: the
 * request is handed out, and `finish` gives it back.
 *
 * `lock` guards the queues and what is under way; it is taken before the bus's, and nobody waits for the host or the GIL with it. Who sets
 * up or resets queues has seen to it that nothing is under way (`set_live`, `hold`). */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "clusters.h"
#include "module.h"
#include "ring.h"
#include "virtio.h"

enum { SECTOR = 512, HEADER = 16, IN = 0, OUT = 1, OK = 0 };
enum { VECTORS_MOST = 1024 /* IOV_MAX */ };
enum { AT_ONCE_BYTES = 64 << 10, AT_ONCE = 16 /* requests a notification */ };
enum result { DONE, LATER /* the host would have to wait */, FOR_PYTHON };

struct disk {
    PyObject_HEAD
    struct virtio *virtio;      /* references, as all of Python's here */
    struct ram *ram;
    PyObject *queue_list;
    struct queue *queues[QUEUES];
    unsigned queue_count;
    struct files *files;
    u64 size, data_most;        /* bytes: of the disk, of a request */
    bool writes;                /* plain ones, into the only file, are done here */

    pthread_mutex_t lock;
    pthread_cond_t work, idle;
    u64 kicked;                 /* a bit a queue: there may be requests */
    unsigned next;              /* the queue whose turn it is */
    unsigned under_way, waiting, holds;
    bool live, at_once, closed;
    u64 reads, read_bytes, written, written_bytes, interrupts;
};

struct job { unsigned queue; struct chain chain; };

/* ---- A request, without the lock --------------------------------------------------------------------------------------------------- */

struct pieces { const struct span *span; u64 skipped, left; }; /* of a chain's memory */

static void advance(struct pieces *p, u64 bytes)
{
    p->left -= bytes;
    for (p->skipped += bytes; p->left && p->skipped >= p->span->length; p->span++)
        p->skipped -= p->span->length;
}

static unsigned vectors_of(const struct disk *d, const struct pieces *p, u64 most, struct iovec *vectors)
{
    const struct span *span = p->span;
    u64 skipped = p->skipped, left = p->left < most ? p->left : most;
    unsigned count = 0;
    for (; left && count < VECTORS_MOST; span++, skipped = 0) {
        u64 length = span->length - skipped < left ? span->length - skipped : left;
        if (!length)
            continue;
        vectors[count++] = (struct iovec){d->ram->data + span->address + skipped, length};
        left -= length;
    }
    return count;
}

static enum result transfer(struct disk *d, int fd, u64 offset, struct pieces *p, u64 bytes, bool write, int flags)
{
    struct iovec vectors[VECTORS_MOST];
    while (bytes) {
        unsigned count = vectors_of(d, p, bytes, vectors);
        ssize_t done = write ? pwritev2(fd, vectors, (int)count, (off_t)offset, flags)
                             : preadv2(fd, vectors, (int)count, (off_t)offset, flags);
        if (done < 0 && errno == EINTR)
            continue;
        if (flags & RWF_NOWAIT && (done < 0 || (u64)done < bytes))
            return LATER;
        if (done <= 0)
            return FOR_PYTHON; /* which tries it again, and says what it is */
        advance(p, (u64)done);
        offset += (u64)done;
        bytes -= (u64)done;
    }
    return DONE;
}

static enum result read_disk(struct disk *d, u64 offset, struct pieces *p, int flags)
{
    const struct files *files = d->files;
    while (p->left) {
        u64 length = p->left;
        bool has = false;
        int fd = files->base;
        for (unsigned i = 0; i < files->count && !has; i++) {
            u64 first = offset / CLUSTER, end = (offset + length + CLUSTER - 1) / CLUSTER;
            u64 run = (first + clusters_alike(files->layers[i].clusters, first, end, &has)) * CLUSTER - offset;
            length = run < length ? run : length;
            fd = has ? files->layers[i].fd : fd;
        }
        if (!has && offset + length > files->base_bytes)
            return FOR_PYTHON; /* a last sector that is cut */
        enum result result = transfer(d, fd, offset, p, length, false, flags);
        if (result != DONE)
            return result;
        offset += length;
    }
    return DONE;
}

/* What it asks for; false: Python's to look at. The header is read once. */
static bool understand(const struct disk *d, const struct chain *chain, u32 *kind, u64 *sector, u64 *bytes)
{
    u8 header[HEADER];
    if (chain->readable_bytes < HEADER || !chain->writable_bytes)
        return false;
    for (unsigned i = 0, at = 0; at < HEADER; i++) {
        unsigned length = chain->spans[i].length < HEADER - at ? chain->spans[i].length : HEADER - at;
        memcpy(header + at, d->ram->data + chain->spans[i].address, length);
        at += length;
    }
    memcpy(kind, header, sizeof *kind);
    memcpy(sector, header + 8, sizeof *sector);
    *bytes = *kind == IN ? chain->writable_bytes - 1 : chain->readable_bytes - HEADER;
    return (*kind == IN || (*kind == OUT && d->writes)) && *bytes && *bytes % SECTOR == 0 && *bytes <= d->data_most &&
           *sector <= d->size / SECTOR && *bytes <= d->size - *sector * SECTOR;
}

/* `bytes_most` at the most, and with NOWAIT only what the host has in memory. */
static enum result do_request(struct disk *d, const struct chain *chain, u64 bytes_most, int flags, u32 *kind, u64 *bytes)
{
    u64 sector;
    if (!understand(d, chain, kind, &sector, bytes))
        return FOR_PYTHON;
    if (*bytes > bytes_most || (*kind == OUT && flags))
        return LATER;
    struct pieces p = {.span = chain->spans + (*kind == IN ? chain->readable : 0), .left = *bytes};
    if (*kind == OUT) {
        p.left += HEADER;
        advance(&p, HEADER);
        return transfer(d, d->files->base, sector * SECTOR, &p, *bytes, true, 0);
    }
    return read_disk(d, sector * SECTOR, &p, flags);
}

/* ---- With the lock ------------------------------------------------------------------------------------------------------------------ */

static void tell(struct disk *d, unsigned queue)
{
    if (queue_wants_interrupt(d->queues[queue], d->ram)) {
        d->interrupts++;
        virtio_interrupt(d->virtio, queue);
    }
}

/* It is done, and was right. What it has written, the status and all, is told before the driver may know. */
static void give_back(struct disk *d, unsigned queue, struct chain *chain, u32 kind, u64 bytes)
{
    const struct span *last = &chain->spans[chain->readable + chain->writable - 1];
    d->ram->data[last->address + last->length - 1] = OK;
    ram_wrote(d->ram, chain->spans + chain->readable, chain->writable);
    if (kind == IN)
        d->reads++, d->read_bytes += bytes;
    else
        d->written++, d->written_bytes += bytes;
    /* 2.7.8.2: only what was written from the first byte on counts; the status is the last. */
    u64 before_status = kind == IN ? bytes : 0;
    queue_push(d->queues[queue], d->ram, chain->head, (u32)(chain->writable_bytes == before_status + 1 ? chain->writable_bytes : before_status));
}

static void ended(struct disk *d)
{
    if (!--d->under_way)
        pthread_cond_broadcast(&d->idle);
}

/* The next request of the queues of `which`, in turn. A queue is looked at no more once it is empty, or wrong. */
static enum popped take(struct disk *d, u64 which, struct job *job)
{
    while (d->kicked & which) {
        u64 some = d->kicked & which, later = some & ~0ull << d->next;
        job->queue = (unsigned)__builtin_ctzll(later ? later : some);
        struct queue *q = d->queues[job->queue];
        enum popped popped = q->enabled ? queue_pop(q, d->ram, &job->chain) : QUEUE_EMPTY;
        if (popped == QUEUE_POPPED) {
            d->next = (job->queue + 1) % QUEUES;
            d->under_way++;
            return popped;
        }
        if (popped == QUEUE_EMPTY && q->enabled && !queue_rests(q, d->ram))
            continue;
        d->kicked &= ~(1ull << job->queue);
        if (popped == QUEUE_WRONG)
            return popped;
    }
    return QUEUE_EMPTY;
}

static void wake_another(struct disk *d)
{
    if (d->kicked && d->waiting)
        pthread_cond_signal(&d->work);
}

/* Small reads of what the host has in memory. */
static void do_at_once(struct disk *d, unsigned queue)
{
    struct job job;
    u32 kind;
    u64 bytes;
    for (unsigned i = 0; i < AT_ONCE; i++) {
        enum popped popped = take(d, 1ull << queue, &job);
        if (popped == QUEUE_WRONG)
            d->kicked |= 1ull << queue; /* a worker's to find */
        if (popped != QUEUE_POPPED)
            break;
        bool is_done = do_request(d, &job.chain, AT_ONCE_BYTES, RWF_NOWAIT, &kind, &bytes) == DONE;
        if (is_done)
            give_back(d, queue, &job.chain, kind, bytes);
        else
            d->queues[queue]->taken--; /* nobody has taken another one meanwhile */
        ended(d);
        if (!is_done)
            break;
    }
    if (d->queues[queue]->enabled)
        tell(d, queue);
}

void disk_notified(struct disk *d, unsigned queue)
{
    pthread_mutex_lock(&d->lock);
    if (d->live && queue < d->queue_count) {
        d->kicked |= 1ull << queue;
        if (d->at_once && !d->holds)
            do_at_once(d, queue);
        wake_another(d);
    }
    pthread_mutex_unlock(&d->lock);
}

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static PyObject *handed_out(const struct job *job)
{
    PyObject *spans = chain_spans(&job->chain);
    return spans ? Py_BuildValue("(IIN)", job->queue, job->chain.head, spans) : NULL;
}

static PyObject *wrong(const struct job *job) { return Py_BuildValue("(IOO)", job->queue, Py_None, Py_None); }

/* With the GIL: lines that no engine in C has been told of. */
static bool tell_lines(struct disk *d)
{
    bus_enter(d->virtio->chip.bus);
    return bus_leave(d->virtio->chip.bus);
}

static enum result work_once(struct disk *d, struct job *job)
{
    u32 kind;
    u64 bytes;
    enum result result = do_request(d, &job->chain, UINT64_MAX, RWF_NOWAIT, &kind, &bytes);
    if (result != DONE) { /* it takes its time */
        pthread_mutex_lock(&d->lock);
        wake_another(d);
        pthread_mutex_unlock(&d->lock);
    }
    if (result == LATER)
        result = do_request(d, &job->chain, UINT64_MAX, 0, &kind, &bytes);
    if (result == DONE) {
        pthread_mutex_lock(&d->lock);
        give_back(d, job->queue, &job->chain, kind, bytes);
        tell(d, job->queue);
        ended(d);
        pthread_mutex_unlock(&d->lock);
    }
    return result;
}

static PyObject *disk_work(struct disk *self, PyObject *ignored)
{
    struct job *job = PyMem_RawMalloc(sizeof *job);
    PyObject *found = NULL;
    if (!job)
        return PyErr_NoMemory();
    while (!found) {
        enum popped popped = QUEUE_EMPTY;
        enum result result = DONE;
        bool closed;
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&self->lock);
        do {
            while (!(closed = self->closed) &&
                   (!self->live || self->holds || (popped = take(self, ~0ull, job)) == QUEUE_EMPTY)) {
                self->waiting++;
                pthread_cond_wait(&self->work, &self->lock);
                self->waiting--;
            }
            if (closed || popped == QUEUE_WRONG)
                break;
            pthread_mutex_unlock(&self->lock);
            result = work_once(self, job);
            pthread_mutex_lock(&self->lock);
        } while (result == DONE && !self->virtio->chip.bus->change_count);
        pthread_mutex_unlock(&self->lock);
        Py_END_ALLOW_THREADS
        if (!tell_lines(self))
            break;
        if (closed)
            found = Py_NewRef(Py_None);
        else if (popped == QUEUE_WRONG)
            found = wrong(job);
        else if (result != DONE)
            found = handed_out(job);
    }
    PyMem_RawFree(job);
    return found;
}

static PyObject *disk_serve(struct disk *self, PyObject *argument)
{
    u64 queue;
    struct job *job;
    enum popped popped;
    enum result result = DONE;
    u32 kind;
    u64 bytes;
    if (!chip_numbers(&argument, 1, &queue, 1))
        return NULL;
    if (queue >= self->queue_count)
        return PyErr_Format(PyExc_ValueError, "there are %u queues", self->queue_count);
    if (!(job = PyMem_RawMalloc(sizeof *job)))
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&self->lock);
    self->kicked |= 1ull << queue;
    while ((popped = take(self, 1ull << queue, job)) == QUEUE_POPPED) {
        pthread_mutex_unlock(&self->lock);
        result = do_request(self, &job->chain, UINT64_MAX, 0, &kind, &bytes);
        pthread_mutex_lock(&self->lock);
        if (result != DONE)
            break;
        give_back(self, job->queue, &job->chain, kind, bytes);
        ended(self);
    }
    if (popped == QUEUE_EMPTY && self->queues[queue]->enabled)
        tell(self, (unsigned)queue);
    pthread_mutex_unlock(&self->lock);
    Py_END_ALLOW_THREADS
    PyObject *found = NULL;
    if (tell_lines(self))
        found = popped == QUEUE_POPPED ? handed_out(job) : popped == QUEUE_WRONG ? wrong(job) : Py_NewRef(Py_None);
    PyMem_RawFree(job);
    return found;
}

static PyObject *disk_finish(struct disk *self, PyObject *args)
{
    unsigned queue, head, written;
    int tells;
    if (!PyArg_ParseTuple(args, "IIIp", &queue, &head, &written, &tells))
        return NULL;
    if (queue >= self->queue_count)
        return PyErr_Format(PyExc_ValueError, "there are %u queues", self->queue_count);
    pthread_mutex_lock(&self->lock);
    queue_push(self->queues[queue], self->ram, (uint16_t)head, written);
    if (tells)
        tell(self, queue);
    ended(self);
    pthread_mutex_unlock(&self->lock);
    return tell_lines(self) ? Py_NewRef(Py_None) : NULL;
}

static PyObject *disk_drop(struct disk *self, PyObject *ignored)
{
    pthread_mutex_lock(&self->lock);
    ended(self);
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *disk_kick(struct disk *self, PyObject *argument)
{
    u64 queue;
    if (!chip_numbers(&argument, 1, &queue, 1))
        return NULL;
    disk_notified(self, (unsigned)queue);
    return tell_lines(self) ? Py_NewRef(Py_None) : NULL;
}

static void wait_idle(struct disk *d)
{
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&d->lock);
    while (d->under_way)
        pthread_cond_wait(&d->idle, &d->lock);
    pthread_mutex_unlock(&d->lock);
    Py_END_ALLOW_THREADS
}

static void set_told(struct disk *d, bool told)
{
    bus_enter(d->virtio->chip.bus);
    d->virtio->disk = told ? d : NULL;
    pthread_mutex_unlock(&d->virtio->chip.bus->lock);
}

static PyObject *disk_set_live(struct disk *self, PyObject *args)
{
    int live, has_workers, waits;
    if (!PyArg_ParseTuple(args, "ppp", &live, &has_workers, &waits))
        return NULL;
    set_told(self, live && has_workers);
    pthread_mutex_lock(&self->lock);
    self->live = live;
    self->at_once = has_workers;
    if (!live)
        self->kicked = 0;
    pthread_mutex_unlock(&self->lock);
    if (waits)
        wait_idle(self);
    Py_RETURN_NONE;
}

static PyObject *disk_hold(struct disk *self, PyObject *ignored)
{
    pthread_mutex_lock(&self->lock);
    self->holds++;
    bool waits = self->under_way;
    pthread_mutex_unlock(&self->lock);
    if (waits)
        wait_idle(self);
    Py_RETURN_NONE;
}

static PyObject *disk_release(struct disk *self, PyObject *ignored)
{
    pthread_mutex_lock(&self->lock);
    if (self->holds && !--self->holds && self->kicked)
        pthread_cond_broadcast(&self->work);
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *disk_close(struct disk *self, PyObject *ignored)
{
    set_told(self, false);
    pthread_mutex_lock(&self->lock);
    self->closed = true;
    self->live = false;
    bool idle = !self->under_way;
    pthread_cond_broadcast(&self->work);
    pthread_mutex_unlock(&self->lock);
    return PyBool_FromLong(idle);
}

static PyObject *disk_take_counts(struct disk *self, PyObject *ignored)
{
    pthread_mutex_lock(&self->lock);
    u64 n[] = {self->reads, self->read_bytes, self->written, self->written_bytes, self->interrupts};
    self->reads = self->read_bytes = self->written = self->written_bytes = self->interrupts = 0;
    pthread_mutex_unlock(&self->lock);
    return Py_BuildValue("(KKKKK)", n[0], n[1], n[2], n[3], n[4]);
}

static PyObject *disk_get_kicked(struct disk *self, void *ignored)
{
    pthread_mutex_lock(&self->lock);
    u64 kicked = self->kicked;
    pthread_mutex_unlock(&self->lock);
    return PyLong_FromUnsignedLongLong(kicked);
}

static int disk_set_kicked(struct disk *self, PyObject *value, void *ignored)
{
    u64 kicked;
    if (!value || !chip_numbers(&value, 1, &kicked, 1))
        return -1;
    pthread_mutex_lock(&self->lock);
    self->kicked = self->queue_count < 64 ? kicked & ~(~0ull << self->queue_count) : kicked;
    wake_another(self);
    pthread_mutex_unlock(&self->lock);
    return 0;
}

static PyObject *disk_get_writes(struct disk *self, void *ignored) { return PyBool_FromLong(self->writes); }

static int disk_set_writes(struct disk *self, PyObject *value, void *ignored)
{
    int writes = value ? PyObject_IsTrue(value) : -1;
    if (writes < 0)
        return -1;
    self->writes = writes;
    return 0;
}

static PyObject *disk_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    const struct module_state *state = PyType_GetModuleState(type);
    PyObject *virtio, *ram, *queues, *files;
    unsigned long long size, data_most;
    if (!PyArg_ParseTuple(args, "O!O!O!O!KK", state->types[TYPE_VIRTIO], &virtio, state->types[TYPE_RAM], &ram, &PyTuple_Type, &queues,
                          state->types[TYPE_FILES], &files, &size, &data_most))
        return NULL;
    for (unsigned i = 0; i < ((struct files *)files)->count; i++)
        if (((struct files *)files)->layers[i].clusters->count < (size + CLUSTER - 1) / CLUSTER)
            return PyErr_Format(PyExc_ValueError, "a map of fewer clusters than the disk has");
    Py_ssize_t count = PyTuple_GET_SIZE(queues);
    for (Py_ssize_t i = 0; i < count; i++)
        if (count > QUEUES || !PyObject_TypeCheck(PyTuple_GET_ITEM(queues, i), state->types[TYPE_QUEUE]))
            return PyErr_Format(PyExc_TypeError, "up to %d Queues", QUEUES);
    struct disk *self = (struct disk *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->virtio = (struct virtio *)Py_NewRef(virtio);
    self->ram = (struct ram *)Py_NewRef(ram);
    self->queue_list = Py_NewRef(queues);
    self->files = (struct files *)Py_NewRef(files);
    for (Py_ssize_t i = 0; i < count; i++)
        self->queues[i] = (struct queue *)PyTuple_GET_ITEM(queues, i);
    self->queue_count = (unsigned)count;
    self->size = size, self->data_most = data_most;
    self->holds = 1;            /* until a run begins */
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->work, NULL);
    pthread_cond_init(&self->idle, NULL);
    return (PyObject *)self;
}

static void disk_dealloc(struct disk *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->virtio) {
        set_told(self, false);
        pthread_mutex_destroy(&self->lock);
        pthread_cond_destroy(&self->work);
        pthread_cond_destroy(&self->idle);
    }
    Py_XDECREF((PyObject *)self->virtio);
    Py_XDECREF((PyObject *)self->ram);
    Py_XDECREF(self->queue_list);
    Py_XDECREF((PyObject *)self->files);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef disk_methods[] = {
    {"work", (PyCFunction)disk_work, METH_NOARGS,
     "work() -> (queue, head, (readable, writable)): does requests until there is one for Python; None instead of head and spans: the\n"
     "queue is wrong; None: closed"},
    {"serve", (PyCFunction)disk_serve, METH_O, "serve(queue) -> as `work`, of all requests of a queue at once; None: that is all"},
    {"finish", (PyCFunction)disk_finish, METH_VARARGS, "finish(queue, head, written, tells): a request that was handed out is done"},
    {"drop", (PyCFunction)disk_drop, METH_NOARGS, "drop(): a request that was handed out was wrong"},
    {"kick", (PyCFunction)disk_kick, METH_O, "kick(queue): there may be requests"},
    {"set_live", (PyCFunction)disk_set_live, METH_VARARGS,
     "set_live(live, has_workers, waits): whether queues may be used, and who does that; not, and `waits`: nothing is under way any more"},
    {"hold", (PyCFunction)disk_hold, METH_NOARGS, "hold(): nothing is under way, nor begun, until as many `release`"},
    {"release", (PyCFunction)disk_release, METH_NOARGS, "release()"},
    {"close", (PyCFunction)disk_close, METH_NOARGS, "close() -> whether nothing is under way: workers end"},
    {"take_counts", (PyCFunction)disk_take_counts, METH_NOARGS,
     "take_counts() -> reads, their bytes, writes, their bytes, and interrupts since the last time"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef disk_attributes[] = {
    {"kicked", (getter)disk_get_kicked, (setter)disk_set_kicked, "queues that may have requests, a bit each", NULL},
    {"writes", (getter)disk_get_writes, (setter)disk_set_writes, "whether writes are plain ones, and done here", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot disk_slots[] = {
    {Py_tp_doc, "Disk(virtio, ram, queues, files, size, data_most): the requests of a disk of `size` bytes."},
    {Py_tp_new, disk_new}, {Py_tp_dealloc, disk_dealloc}, {Py_tp_methods, disk_methods}, {Py_tp_getset, disk_attributes}, {0, NULL},
};
PyType_Spec disk_spec = {"vmfs.devices._chips.Disk", sizeof(struct disk), 0, Py_TPFLAGS_DEFAULT, disk_slots};
