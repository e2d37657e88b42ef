/*
 * vmfs.fs._fuse: what pyfuse3 does not surface.
 *
 * pyfuse3 calls libfuse through dynamic symbols, and the dynamic linker looks for those first in what was
 * loaded with RTLD_GLOBAL. This extension defines four of them, so that pyfuse3, loaded after it
 * (vmfs/fs/hooks.py does that), calls these, and these call libfuse's:
 *
 *   fuse_session_process_buf   sees every request before libfuse does. It notes whose request is dispatched
 *                              (pyfuse3 gives read and write no context), acts on FUSE_INTERRUPT (pyfuse3
 *                              drops it), and at FUSE_INIT adds to the answer what libfuse before 3.17 and pyfuse3
 *                              cannot negotiate: passthrough, and modes that no umask was taken from.
 *   fuse_reply_open            answers an open with a backing id where the handler asked for one, and spares
 *                              the kernel the FUSE_FLUSH at each close where it did not ask for that.
 *   fuse_session_fd            begins the lane (lane.c), which reads /dev/fuse in pyfuse3's place, and gives pyfuse3 a
 *   fuse_session_receive_buf   descriptor to wait on and the messages that the lane leaves to it.
 *
 * A request is a `Request`, held by a context variable: pyfuse3 serves each of its requests in one task from
 * dispatch to reply, so a handler finds its own request at any time, as do the tasks and threads that it
 * starts. A request goes away with the last reference to it, at the latest when its task serves the next one.
 *
 * No private structure of libfuse or pyfuse3 is touched. What is relied on: the messages of linux/fuse.h (a
 * stable ABI, checked below against the installed header), the public functions of fuse_lowlevel.h, and that
 * the linker prefers this definition, which interposed() tells. Whatever fails, the mount works on without.
 *
 * The symbols belong to the process, so the state they use does, too: one mount a process, as with pyfuse3.
 * Everything runs under the GIL, but for the lane; a call without it goes straight to libfuse.
 *
 * Facts: linux/fuse.h; Documentation/filesystems/fuse/fuse.rst ("Interrupting filesystem operations"),
 * fuse-passthrough.rst.
 */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <linux/fuse.h>

#define FUSE_USE_VERSION 32     /* pyfuse3's minimum: what is used here has not changed since */
#include <fuse_lowlevel.h>

#include "lane.h"
#include "lane_methods.h"

#define EXPORT __attribute__((visibility("default")))

/* ---- the wire, where the installed linux/fuse.h may be older than the running kernel ---- */

#ifndef FUSE_INIT_EXT
#define FUSE_INIT_EXT (1u << 30)                            /* since 7.36: flags2 counts */
#endif
#define INIT_PASSTHROUGH_FLAGS2 (1u << (37 - 32))           /* FUSE_PASSTHROUGH is bit 37, since 7.40 */

#ifndef FOPEN_NOFLUSH
#define FOPEN_NOFLUSH (1 << 5)
#endif
#ifndef FOPEN_PASSTHROUGH
#define FOPEN_PASSTHROUGH (1 << 7)
#endif

struct init_request {                       /* struct fuse_init_in as of 7.36; before, the first four */
    uint32_t major, minor, max_readahead, flags, flags2;
};

struct init_answer {                        /* struct fuse_init_out as of 7.40 */
    uint32_t major, minor, max_readahead, flags;
    uint16_t max_background, congestion_threshold;
    uint32_t max_write, time_gran;
    uint16_t max_pages, map_alignment;
    uint32_t flags2, max_stack_depth, unused[6];
};

struct open_answer {                        /* struct fuse_open_out as of 7.40: backing_id was padding */
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

struct backing_map {                        /* struct fuse_backing_map, since 7.40 */
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};

#define DEV_IOC_BACKING_OPEN _IOW(229, 1, struct backing_map)       /* FUSE_DEV_IOC_MAGIC is 229 */
#define DEV_IOC_BACKING_CLOSE _IOW(229, 2, uint32_t)

_Static_assert(sizeof(struct fuse_in_header) == 40, "the header of a request");
_Static_assert(offsetof(struct fuse_in_header, unique) == 8 && offsetof(struct fuse_in_header, uid) == 24
               && offsetof(struct fuse_in_header, pid) == 32, "the header of a request");
_Static_assert(sizeof(struct fuse_out_header) == 16, "the header of an answer");
_Static_assert(sizeof(struct init_answer) == sizeof(struct fuse_init_out), "FUSE_INIT's answer");
_Static_assert(offsetof(struct init_answer, map_alignment) == offsetof(struct fuse_init_out, map_alignment),
               "FUSE_INIT's answer");
_Static_assert(offsetof(struct init_request, flags) == offsetof(struct fuse_init_in, flags), "FUSE_INIT");
_Static_assert(sizeof(struct open_answer) == sizeof(struct fuse_open_out), "FUSE_OPEN's answer");
_Static_assert(sizeof(struct backing_map) == 16, "FUSE_DEV_IOC_BACKING_OPEN's argument");
#if FUSE_KERNEL_MINOR_VERSION >= 36
_Static_assert(offsetof(struct init_request, flags2) == offsetof(struct fuse_init_in, flags2), "FUSE_INIT");
_Static_assert(offsetof(struct init_answer, flags2) == offsetof(struct fuse_init_out, flags2),
               "FUSE_INIT's answer");
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 40
_Static_assert(offsetof(struct init_answer, max_stack_depth)
               == offsetof(struct fuse_init_out, max_stack_depth), "FUSE_INIT's answer");
_Static_assert(offsetof(struct open_answer, backing_id) == offsetof(struct fuse_open_out, backing_id),
               "FUSE_OPEN's answer");
_Static_assert(FUSE_PASSTHROUGH >> 32 == INIT_PASSTHROUGH_FLAGS2, "FUSE_INIT's flags");
_Static_assert(DEV_IOC_BACKING_OPEN == FUSE_DEV_IOC_BACKING_OPEN, "the ioctls of /dev/fuse");
_Static_assert(DEV_IOC_BACKING_CLOSE == FUSE_DEV_IOC_BACKING_CLOSE, "the ioctls of /dev/fuse");
#endif

/* ---- state ---- */

typedef struct Request {
    PyObject_HEAD
    uint64_t unique;            /* 0: retired, answers for nothing */
    uint32_t opcode;
    uint32_t uid, gid;
    int32_t pid;                /* of the calling thread; 0 from a pid namespace out of our sight */
    int32_t backing_id;         /* what the answer to open carries; 0 is none (the kernel's ids start at 1) */
    int32_t file_flags;         /* f_flags of the file that is read or written; -1: not known */
    char interrupted;
    char tell_closing;          /* of an open: its file's close(2)s are to be told, as FUSE_FLUSH */
    PyObject *on_interrupt;
    struct Request *next;       /* in its bucket of hooks.in_flight */
} Request;

#define BUCKETS 256             /* uniques go up by 2 */
#define BUCKET(unique) (((unique) >> 1) % BUCKETS)

static struct {
    /* libfuse's own */
    void (*process_buf)(struct fuse_session *, const struct fuse_buf *);
    int (*reply_open)(fuse_req_t, const struct fuse_file_info *);
    void (*reply_none)(fuse_req_t);
    int (*session_fd)(struct fuse_session *);
    int (*receive_buf)(struct fuse_session *, struct fuse_buf *);

    PyTypeObject *request_type; /* NULL: the module is not loaded, nothing is noted */
    PyObject *current;          /* the context variable */
    Request *in_flight[BUCKETS];
    int tee[2];                 /* a pipe to peek at a request that libfuse left in one; -1: none yet */

    int device;                 /* /dev/fuse of the mount; -1 before FUSE_INIT */
    int seen;                   /* pyfuse3 has called process_buf */
    int passthrough_wanted;
    int passthrough;
    char passthrough_reason[160];
    int whole_modes;            /* modes come as they were asked for, without the umask taken from them */
    int lane_wanted;
    PyObject *extents;          /* of open files that are sparse: a dict of bytes by their fh */
} hooks;

static void explain(const char *sentence, int error)
{
    if (error)
        snprintf(hooks.passthrough_reason, sizeof hooks.passthrough_reason, "%s: %s", sentence,
                 strerror(error));
    else
        snprintf(hooks.passthrough_reason, sizeof hooks.passthrough_reason, "%s", sentence);
}

static void close_kept_errno(int fd)
{
    int kept = errno;
    if (fd >= 0)
        close(fd);
    errno = kept;
}

/* ---- requests ---- */

static Request *request_find(uint64_t unique)
{
    if (!unique)
        return NULL;
    Request *each = hooks.in_flight[BUCKET(unique)];
    while (each && each->unique != unique)
        each = each->next;
    return each;
}

static void request_unlink(Request *self)
{
    for (Request **each = &hooks.in_flight[BUCKET(self->unique)]; *each; each = &(*each)->next)
        if (*each == self) {
            *each = self->next;
            break;
        }
    self->next = NULL;
}

/* The request of the task that runs, or NULL: borrowed, which the context keeps alive. */
static Request *request_current(void)
{
    PyObject *value = NULL;

    if (!hooks.current)
        return NULL;
    if (PyContextVar_Get(hooks.current, NULL, &value) < 0) {
        PyErr_Clear();
        return NULL;
    }
    Py_XDECREF(value);
    if (!value || !Py_IS_TYPE(value, hooks.request_type))
        return NULL;
    return ((Request *)value)->unique ? (Request *)value : NULL;
}

/* Makes the request current in the task that dispatches it. */
static void request_begin(const struct fuse_in_header *header, int32_t file_flags)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);

    Request *previous = request_current();
    if (previous) {                 /* answered, even if something still holds it: its task serves the next one */
        request_unlink(previous);
        previous->unique = 0;
        Py_CLEAR(previous->on_interrupt);
    }
    if (!header)
        goto done;

    Request *self = (Request *)hooks.request_type->tp_alloc(hooks.request_type, 0);
    if (!self)
        goto failed;
    self->unique = header->unique;
    self->opcode = header->opcode;
    self->uid = header->uid;
    self->gid = header->gid;
    self->pid = (int32_t)header->pid;
    self->file_flags = file_flags;

    PyObject *token = PyContextVar_Set(hooks.current, (PyObject *)self);
    if (!token) {
        Py_DECREF(self);
        goto failed;
    }
    self->next = hooks.in_flight[BUCKET(self->unique)];
    hooks.in_flight[BUCKET(self->unique)] = self;
    Py_DECREF(token);
    Py_DECREF(self);
    goto done;

failed:                             /* out of memory: the request is served without */
    PyErr_Clear();
done:
    PyErr_Restore(type, value, traceback);
}

static void request_interrupt(uint64_t unique)
{
    Request *self = request_find(unique);
    if (!self || self->interrupted)
        return;
    self->interrupted = 1;
    PyObject *call = self->on_interrupt;
    if (!call || call == Py_None)
        return;

    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_INCREF(call);
    PyObject *result = PyObject_CallNoArgs(call);
    if (!result)
        PyErr_WriteUnraisable(call);
    Py_XDECREF(result);
    Py_DECREF(call);
    PyErr_Restore(type, value, traceback);
}

static int request_traverse(Request *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->on_interrupt);
    return 0;
}

static int request_clear(Request *self)
{
    Py_CLEAR(self->on_interrupt);
    return 0;
}

static void request_dealloc(Request *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_GC_UnTrack(self);
    if (self->unique)
        request_unlink(self);
    Py_CLEAR(self->on_interrupt);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *request_repr(Request *self)
{
    return PyUnicode_FromFormat("<Request %llu opcode=%u pid=%d uid=%u gid=%u%s>",
                                (unsigned long long)self->unique, self->opcode, self->pid, self->uid,
                                self->gid, self->interrupted ? " interrupted" : "");
}

static PyMemberDef request_members[] = {
    {"unique", T_ULONGLONG, offsetof(Request, unique), READONLY,
     "int: the kernel's number of the request; 0 once the next one is served in its place"},
    {"opcode", T_UINT, offsetof(Request, opcode), READONLY, "int: enum fuse_opcode of linux/fuse.h"},
    {"pid", T_INT, offsetof(Request, pid), READONLY,
     "int: the calling thread's id (not the process's); 0 from a pid namespace out of sight"},
    {"uid", T_UINT, offsetof(Request, uid), READONLY, "int: the caller's file system uid"},
    {"gid", T_UINT, offsetof(Request, gid), READONLY, "int: the caller's file system gid"},
    {"file_flags", T_INT, offsetof(Request, file_flags), READONLY,
     "int: of a read or a write, the file's flags (O_NONBLOCK) as they are now; -1 where not known"},
    {"interrupted", T_BOOL, offsetof(Request, interrupted), READONLY, "bool: a signal came for the caller"},
    {"tell_closing", T_BOOL, offsetof(Request, tell_closing), 0,
     "bool: in an open handler, set it to have flush() called at each close(2) of the file"},
    {"on_interrupt", T_OBJECT, offsetof(Request, on_interrupt), 0,
     "callable or None: called once, in the thread that serves FUSE, when a signal comes for the caller"},
    {NULL},
};

static PyType_Slot request_slots[] = {
    {Py_tp_doc, (void *)"A FUSE request between its dispatch and its answer."},
    {Py_tp_dealloc, request_dealloc},
    {Py_tp_traverse, request_traverse},
    {Py_tp_clear, request_clear},
    {Py_tp_repr, request_repr},
    {Py_tp_members, request_members},
    {0, NULL},
};

static PyType_Spec request_spec = {
    .name = "vmfs.fs._fuse.Request",
    .basicsize = sizeof(Request),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = request_slots,
};

/* ---- FUSE_INIT ---- */

/* Puts `with` in the place of the descriptor `fd`, close-on-exec or not as `fd` was. */
static int replace_descriptor(int fd, int with, int descriptor_flags)
{
    int done;
    do
        done = dup3(with, fd, descriptor_flags & FD_CLOEXEC ? O_CLOEXEC : 0);
    while (done < 0 && (errno == EINTR || errno == EBUSY));
    return done < 0 ? -1 : 0;
}

/* Whether the kernel takes a memfd as a backing file: 0, or an errno. Asked once, since the answer is a right
   (CAP_SYS_ADMIN), which no flag tells. */
static int try_backing(int device)
{
    int error = 0;
    int fd = memfd_create("vmfs-probe", MFD_CLOEXEC);
    if (fd < 0)
        return errno;
    struct backing_map map = {.fd = fd};
    int id = ioctl(device, DEV_IOC_BACKING_OPEN, &map);
    if (id <= 0)
        error = id < 0 ? errno : EPROTO;
    else {
        uint32_t close_id = (uint32_t)id;
        ioctl(device, DEV_IOC_BACKING_CLOSE, &close_id);
    }
    close_kept_errno(fd);
    return error;
}

/* Adds what the kernel is to do to libfuse's answer. Returns whether passthrough is among it. */
static int amend(struct init_answer *init, int passes, int whole_modes)
{
    if (whole_modes)
        init->flags |= FUSE_DONT_MASK;
    if (!passes)
        return 0;
    if (init->flags & FUSE_WRITEBACK_CACHE) {
        explain("the kernel has no passthrough together with the writeback cache", 0);
        return 0;
    }
    init->flags |= FUSE_INIT_EXT;
    init->flags2 |= INIT_PASSTHROUGH_FLAGS2;
    init->max_stack_depth = 1;              /* the backing file is on no stacked file system itself */
    return 1;
}

/* libfuse before 3.17 cannot ask for FUSE_PASSTHROUGH, pyfuse3 not for FUSE_DONT_MASK (the mode of a new file or
   directory comes as it was asked for, and the umask beside it), and libfuse writes its answer to the device itself. For
   this one request it gets a socket in the device's place (a packet socket keeps the answer whole); what it
   writes there is amended and handed on. Nobody else uses the descriptor meanwhile: nothing is served before
   FUSE_INIT. */
static void process_init(struct fuse_session *session, const struct fuse_buf *buf,
                         const struct init_request *asked)
{
    int pair[2], device = hooks.session_fd(session), kept = -1;
    int passes = hooks.passthrough_wanted, whole_modes = (asked->flags & FUSE_DONT_MASK) != 0;
    struct {
        struct fuse_out_header header;
        struct init_answer init;
        char rest[4096];
    } answer;

    hooks.device = device;
    hooks.passthrough = hooks.whole_modes = 0;
    if (passes && (!(asked->flags & FUSE_INIT_EXT) || !(asked->flags2 & INIT_PASSTHROUGH_FLAGS2))) {
        explain("this kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)", 0);
        passes = 0;
    }
    int descriptor_flags = fcntl(device, F_GETFD);
    if (descriptor_flags < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        if (passes)
            explain("no socket pair to negotiate passthrough through", errno);
        goto without;
    }
    kept = fcntl(device, F_DUPFD_CLOEXEC, 0);
    if (kept < 0 || replace_descriptor(device, pair[0], descriptor_flags) < 0) {
        if (passes)
            explain("no descriptor to negotiate passthrough through", errno);
        close_kept_errno(kept);
        close_kept_errno(pair[0]);
        close_kept_errno(pair[1]);
        goto without;
    }

    hooks.process_buf(session, buf);

    int restored = replace_descriptor(device, kept, descriptor_flags);
    ssize_t size = recv(pair[1], &answer, sizeof answer, MSG_DONTWAIT);
    close_kept_errno(pair[0]);
    close_kept_errno(pair[1]);

    if (size >= (ssize_t)(sizeof answer.header + sizeof answer.init) && !answer.header.error) {
        hooks.passthrough = amend(&answer.init, passes, whole_modes);
        hooks.whole_modes = whole_modes;
    } else if (passes)
        explain("libfuse's answer to FUSE_INIT has no room for passthrough", 0);
    if (size > 0 && write(kept, &answer, (size_t)size) != size) {
        if (passes)
            explain("the kernel refused the answer to FUSE_INIT", errno);
        hooks.passthrough = hooks.whole_modes = 0;
    }
    if (hooks.passthrough) {
        int error = try_backing(kept);
        if (error) {
            hooks.passthrough = 0;
            explain(error == EPERM ? "the kernel lets only a process with CAP_SYS_ADMIN pass memory through"
                                   : "the kernel takes no backing file", error == EPERM ? 0 : error);
        } else
            explain("the kernel reads, writes and maps memory itself", 0);
    }
    if (restored == 0)                      /* else it is lost, and the mount's next read says so */
        close_kept_errno(kept);
    return;

without:
    hooks.process_buf(session, buf);
}

/* Hides from libfuse that the kernel offers to hand O_TRUNC to open, which libfuse would take. The kernel then
   takes the file to be empty at once: it drops what its cache holds of the file, and a process that has it mapped gets a
   SIGBUS. As it is, the open comes without O_TRUNC, and a setattr of the size after it. */
static void drop_o_trunc(const struct fuse_buf *buf)
{
    if (!(buf->flags & FUSE_BUF_IS_FD)
        && buf->size >= sizeof(struct fuse_in_header) + offsetof(struct init_request, flags2)) {
        char *flags = (char *)buf->mem + sizeof(struct fuse_in_header) + offsetof(struct init_request, flags);
        uint32_t offered;
        memcpy(&offered, flags, sizeof offered);
        offered &= ~(uint32_t)FUSE_ATOMIC_O_TRUNC;
        memcpy(flags, &offered, sizeof offered);
    }
}

/* ---- the functions in front of libfuse's ---- */

/* The header of a request. libfuse may leave a large write in a pipe (splice): then a copy of its first bytes
   is taken through a pipe of our own. Returns 0, or -1 where there is none to be had. */
static int read_header(const struct fuse_buf *buf, struct fuse_in_header *header)
{
    if (buf->size < sizeof *header)
        return -1;
    if (!(buf->flags & FUSE_BUF_IS_FD)) {
        memcpy(header, buf->mem, sizeof *header);
        return 0;
    }
    if (hooks.tee[0] < 0 && pipe2(hooks.tee, O_CLOEXEC | O_NONBLOCK) < 0) {
        hooks.tee[0] = hooks.tee[1] = -1;
        return -1;
    }
    if (tee(buf->fd, hooks.tee[1], sizeof *header, SPLICE_F_NONBLOCK) == (ssize_t)sizeof *header
        && read(hooks.tee[0], header, sizeof *header) == (ssize_t)sizeof *header)
        return 0;
    close_kept_errno(hooks.tee[0]);     /* it may hold a part of a header: the next call makes a new one */
    close_kept_errno(hooks.tee[1]);
    hooks.tee[0] = hooks.tee[1] = -1;
    return -1;
}

static const void *argument(const struct fuse_buf *buf, size_t size)
{
    size_t header = sizeof(struct fuse_in_header);
    return buf->flags & FUSE_BUF_IS_FD || buf->size < header + size ? NULL : (const char *)buf->mem + header;
}

/* The flags of the open file that a read or a write is on, which fcntl(F_SETFL) may have changed since it was
   opened, and which pyfuse3 does not hand on. -1 for other requests, and for what is left in a pipe. */
static int32_t file_flags(const struct fuse_buf *buf, uint32_t opcode)
{
    _Static_assert(offsetof(struct fuse_read_in, flags) == offsetof(struct fuse_write_in, flags)
                   && sizeof(struct fuse_read_in) == sizeof(struct fuse_write_in), "reads and writes");
    const void *given = argument(buf, sizeof(struct fuse_read_in));
    int32_t flags;

    if (!given || (opcode != FUSE_READ && opcode != FUSE_WRITE))
        return -1;
    memcpy(&flags, (const char *)given + offsetof(struct fuse_read_in, flags), sizeof flags);
    return flags;
}

/* FUSE_LSEEK, which pyfuse3 does not hand on (SEEK_DATA and SEEK_HOLE alone come here): by the extents that a handler
   has told of the open file. libfuse's ENOSYS would have the kernel ask for no file any more; EINVAL has a program read
   the file as it is. */
static void answer_lseek(const struct fuse_in_header *header, const struct fuse_lseek_in *asked)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    struct fuse_lseek_out found = {.offset = asked->offset};
    int error = EINVAL;
    PyObject *key = PyLong_FromUnsignedLongLong(asked->fh);
    PyObject *bytes = key && hooks.extents ? PyDict_GetItemWithError(hooks.extents, key) : NULL;

    if (bytes) {                        /* the size, then start and end of each extent, in order */
        const uint64_t *numbers = (const uint64_t *)(const void *)PyBytes_AS_STRING(bytes);
        size_t count = (size_t)PyBytes_GET_SIZE(bytes) / sizeof *numbers, at = 1;
        while (at + 1 < count && numbers[at + 1] <= asked->offset)
            at += 2;
        bool in_data = at + 1 < count && numbers[at] <= asked->offset;
        error = ENXIO;
        if (count && asked->offset < numbers[0]) {
            if (asked->whence == SEEK_DATA && at + 1 < count) {
                found.offset = in_data ? asked->offset : numbers[at];
                error = 0;
            } else if (asked->whence == SEEK_HOLE) {
                found.offset = in_data ? numbers[at + 1] : asked->offset;
                error = 0;
            }
        }
    }
    Py_XDECREF(key);
    PyErr_Restore(type, value, traceback);
    struct fuse_out_header answer = {
        .len = sizeof answer + (error ? 0 : sizeof found), .error = -error, .unique = header->unique,
    };
    struct iovec parts[] = {{&answer, sizeof answer}, {&found, sizeof found}};
    (void)!writev(hooks.device, parts, error ? 1 : 2);     /* ENOENT: the caller is gone */
}

EXPORT void fuse_session_process_buf(struct fuse_session *session, const struct fuse_buf *buf)
{
    struct fuse_in_header header;

    if (!hooks.request_type || !PyGILState_Check()) {
        if (hooks.process_buf)
            hooks.process_buf(session, buf);
        return;
    }
    hooks.seen = 1;
    if (read_header(buf, &header) < 0) {
        request_begin(NULL, -1);
        hooks.process_buf(session, buf);
    } else if (header.opcode == FUSE_INTERRUPT) {
        struct fuse_interrupt_in interrupt = {0};
        const void *given = argument(buf, sizeof interrupt);
        if (given)
            memcpy(&interrupt, given, sizeof interrupt);
        /* libfuse first: it answers the message if it does not know the request (EAGAIN: send it again). */
        hooks.process_buf(session, buf);
        request_interrupt(interrupt.unique);
    } else if (header.opcode == FUSE_INIT) {
        struct init_request asked = {0};
        size_t shortest = offsetof(struct init_request, flags2);
        const void *given = argument(buf, shortest);
        if (given)
            memcpy(&asked, given, argument(buf, sizeof asked) ? sizeof asked : shortest);
        drop_o_trunc(buf);
        process_init(session, buf, &asked);
    } else if (header.opcode == FUSE_LSEEK && argument(buf, sizeof(struct fuse_lseek_in))) {
        struct fuse_lseek_in asked;
        memcpy(&asked, argument(buf, sizeof asked), sizeof asked);
        answer_lseek(&header, &asked);
    } else {
        request_begin(&header, file_flags(buf, header.opcode));
        hooks.process_buf(session, buf);
    }
}

EXPORT int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
    Request *request = hooks.request_type && PyGILState_Check() ? request_current() : NULL;

    struct fuse_file_info answer = *fi;

    /* Only few files' handlers want to know of closes, and pyfuse3 cannot say so (FOPEN_NOFLUSH, Linux 5.18). */
    if (request && request->opcode == FUSE_OPEN && !request->tell_closing)
        answer.noflush = 1;
    fi = &answer;
    if (!request || request->opcode != FUSE_OPEN || !request->backing_id)
        return hooks.reply_open ? hooks.reply_open(req, fi) : -EIO;

    /* The kernel fails an open that passes through with EIO if other flags are set than these and
       FOPEN_DIRECT_IO, with which only mmap would pass through (fuse_file_io_open, fs/fuse/iomode.c). */
    struct open_answer open = {
        .fh = fi->fh,
        .open_flags = FOPEN_PASSTHROUGH | (fi->noflush ? FOPEN_NOFLUSH : 0)
                      | (fi->direct_io ? FOPEN_DIRECT_IO : 0),
        .backing_id = request->backing_id,
    };
    struct fuse_out_header header = {.len = sizeof header + sizeof open, .unique = request->unique};
    struct iovec parts[] = {{&header, sizeof header}, {&open, sizeof open}};

    request->backing_id = 0;
    int result = writev(hooks.device, parts, 2) < 0 ? -errno : 0;
    hooks.reply_none(req);              /* frees the request and sends nothing */
    return result;
}

/* pyfuse3 asks once, when it has mounted, and waits on what it gets. */
EXPORT int fuse_session_fd(struct fuse_session *session)
{
    if (!hooks.session_fd)
        return -1;
    int device = hooks.session_fd(session);
    if (!hooks.request_type || !hooks.lane_wanted || device < 0)
        return device;
    int readable = lane_start(device);
    return readable < 0 ? device : readable;
}

EXPORT int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
    if (lane_serves()) {
        void *message = NULL;
        long size = lane_receive(&message);
        if (size == 0)
            return -EINTR;              /* pyfuse3 waits again */
        if (size > 0) {
            free(buf->mem);             /* of the message before, which was served */
            buf->mem = message;
            buf->size = (size_t)size;
            buf->flags = 0;
            return (int)size;
        }
    }
    return hooks.receive_buf ? hooks.receive_buf(session, buf) : -EIO;
}

/* ---- the lane ---- */

PyDoc_STRVAR(want_lane_doc,
    "want_lane(wanted)\n\n"
    "Whether the next mount has the lane.");

static PyObject *py_want_lane(PyObject *module, PyObject *args)
{
    if (!PyArg_ParseTuple(args, "p", &hooks.lane_wanted))
        return NULL;
    Py_RETURN_NONE;
}

/* ---- the module ---- */

PyDoc_STRVAR(bind_doc,
    "bind(path)\n\n"
    "Takes libfuse's functions from the library that pyfuse3's extension, loaded from path, uses. OSError\n"
    "where there is none.");

static PyObject *py_bind(PyObject *module, PyObject *args)
{
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&", PyUnicode_FSConverter, &path))
        return NULL;
    void *library = dlopen(PyBytes_AS_STRING(path), RTLD_LAZY | RTLD_NOLOAD);
    Py_DECREF(path);
    if (!library) {
        const char *reason = dlerror();
        return PyErr_Format(PyExc_OSError, "pyfuse3 is not loaded: %s", reason ? reason : "no such library");
    }
    /* dlsym with a handle searches that library and what it was linked with, in that order, and not the
       global scope: libfuse's function, whichever version of libfuse it is. */
    void *process_buf = dlsym(library, "fuse_session_process_buf");
    void *reply_open = dlsym(library, "fuse_reply_open");
    void *reply_none = dlsym(library, "fuse_reply_none");
    void *session_fd = dlsym(library, "fuse_session_fd");
    void *receive_buf = dlsym(library, "fuse_session_receive_buf");
    dlclose(library);                   /* pyfuse3 keeps it loaded */
    if (!process_buf || !reply_open || !reply_none || !session_fd || !receive_buf
        || process_buf == (void *)fuse_session_process_buf || reply_open == (void *)fuse_reply_open
        || session_fd == (void *)fuse_session_fd || receive_buf == (void *)fuse_session_receive_buf)
        return PyErr_Format(PyExc_OSError, "pyfuse3 was linked with no libfuse3 of 3.2 or later");

    hooks.process_buf = (void (*)(struct fuse_session *, const struct fuse_buf *))process_buf;
    hooks.reply_open = (int (*)(fuse_req_t, const struct fuse_file_info *))reply_open;
    hooks.reply_none = (void (*)(fuse_req_t))reply_none;
    hooks.session_fd = (int (*)(struct fuse_session *))session_fd;
    hooks.receive_buf = (int (*)(struct fuse_session *, struct fuse_buf *))receive_buf;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(interposed_doc,
    "interposed()\n\n"
    "Whether a library loaded from now on calls these functions for libfuse's.");

static PyObject *py_interposed(PyObject *module, PyObject *args)
{
    return PyBool_FromLong(dlsym(RTLD_DEFAULT, "fuse_session_process_buf") == (void *)fuse_session_process_buf
                           && dlsym(RTLD_DEFAULT, "fuse_reply_open") == (void *)fuse_reply_open
                           && dlsym(RTLD_DEFAULT, "fuse_session_fd") == (void *)fuse_session_fd
                           && dlsym(RTLD_DEFAULT, "fuse_session_receive_buf") == (void *)fuse_session_receive_buf);
}

PyDoc_STRVAR(seen_doc,
    "seen()\n\n"
    "Whether a request has come through these functions.");

static PyObject *py_seen(PyObject *module, PyObject *args)
{
    return PyBool_FromLong(hooks.seen);
}

PyDoc_STRVAR(current_request_doc,
    "current_request()\n\n"
    "The Request that this task serves, or None: before the first, in a task that serves none, or where\n"
    "the hooks did not take.");

static PyObject *py_current_request(PyObject *module, PyObject *args)
{
    Request *request = request_current();
    return Py_NewRef(request ? (PyObject *)request : Py_None);
}

PyDoc_STRVAR(request_doc,
    "request(unique)\n\n"
    "The Request of that number, or None where it is none that is served.");

static PyObject *py_request(PyObject *module, PyObject *arg)
{
    unsigned long long unique = PyLong_AsUnsignedLongLong(arg);
    if (unique == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    Request *request = request_find(unique);
    return Py_NewRef(request ? (PyObject *)request : Py_None);
}

PyDoc_STRVAR(current_unique_doc,
    "current_unique()\n\n"
    "The number of the request that this task serves, or 0.");

static PyObject *py_current_unique(PyObject *module, PyObject *args)
{
    Request *request = request_current();
    return PyLong_FromUnsignedLongLong(request ? request->unique : 0);
}

PyDoc_STRVAR(want_passthrough_doc,
    "want_passthrough(wanted, reason)\n\n"
    "Whether to ask the kernel for passthrough at the next FUSE_INIT (it does by default), and the reason\n"
    "that passthrough_reason() gives until then.");

static PyObject *py_want_passthrough(PyObject *module, PyObject *args)
{
    int wanted;
    const char *reason;
    if (!PyArg_ParseTuple(args, "ps", &wanted, &reason))
        return NULL;
    hooks.passthrough_wanted = wanted;
    explain(reason, 0);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(modes_are_whole_doc,
    "modes_are_whole()\n\n"
    "Whether the mode of a new file or directory comes as it was asked for; else the kernel has taken the umask from it.");

static PyObject *py_modes_are_whole(PyObject *module, PyObject *args)
{
    return PyBool_FromLong(hooks.whole_modes);
}

PyDoc_STRVAR(passthrough_available_doc,
    "passthrough_available()\n\n"
    "Whether the mount has passthrough; False before it is initialized.");

static PyObject *py_passthrough_available(PyObject *module, PyObject *args)
{
    return PyBool_FromLong(hooks.passthrough);
}

PyDoc_STRVAR(passthrough_reason_doc,
    "passthrough_reason()\n\n"
    "Why the mount has passthrough, or has not: a sentence.");

static PyObject *py_passthrough_reason(PyObject *module, PyObject *args)
{
    return PyUnicode_DecodeLocale(hooks.passthrough_reason, "surrogateescape");
}

static PyObject *no_passthrough(void)
{
    PyObject *reason = Py_BuildValue("(is)", EOPNOTSUPP, hooks.passthrough_reason);
    if (reason)
        PyErr_SetObject(PyExc_OSError, reason);
    Py_XDECREF(reason);
    return NULL;
}

PyDoc_STRVAR(backing_open_doc,
    "backing_open(fd)\n\n"
    "Gives the kernel the open file of fd (a regular file) to pass through to, and returns its id, an\n"
    "int from 1. The kernel holds the file until backing_close(id) and until every file opened with the\n"
    "id is closed; fd itself may be closed. OSError: EOPNOTSUPP without passthrough, else what\n"
    "FUSE_DEV_IOC_BACKING_OPEN answers.");

static PyObject *py_backing_open(PyObject *module, PyObject *args)
{
    struct backing_map map = {0};
    int id;
    if (!PyArg_ParseTuple(args, "i", &map.fd))
        return NULL;
    if (!hooks.passthrough)
        return no_passthrough();
    Py_BEGIN_ALLOW_THREADS
    id = ioctl(hooks.device, DEV_IOC_BACKING_OPEN, &map);
    Py_END_ALLOW_THREADS
    return id < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(id);
}

PyDoc_STRVAR(backing_close_doc,
    "backing_close(id)\n\n"
    "Drops an id. Files that are open with it stay open. OSError: ENOENT for an id that is none,\n"
    "EOPNOTSUPP without passthrough.");

static PyObject *py_backing_close(PyObject *module, PyObject *args)
{
    unsigned int id;
    int done;
    if (!PyArg_ParseTuple(args, "I", &id))
        return NULL;
    if (!hooks.passthrough)
        return no_passthrough();
    Py_BEGIN_ALLOW_THREADS
    done = ioctl(hooks.device, DEV_IOC_BACKING_CLOSE, &id);
    Py_END_ALLOW_THREADS
    if (done < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *answer_open_with(Request *request, int backing_id)
{
    if (!hooks.passthrough)
        return no_passthrough();
    if (!request || request->opcode != FUSE_OPEN)
        return PyErr_Format(PyExc_ValueError, "no open request is served here");
    if (backing_id < 0)
        return PyErr_Format(PyExc_ValueError, "%d is no backing id", backing_id);
    request->backing_id = backing_id;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(passthrough_next_open_doc,
    "passthrough_next_open(backing_id)\n\n"
    "In an open handler: its answer will carry the id, and read, write and mmap of that open file pass\n"
    "through (with direct_io set in the FileInfo, only mmap does; keep_cache and nonseekable do not\n"
    "apply). 0 takes it back. If the handler fails, the id goes unused. ValueError outside of an open,\n"
    "OSError EOPNOTSUPP without passthrough.");

static PyObject *py_passthrough_next_open(PyObject *module, PyObject *args)
{
    int backing_id;
    if (!PyArg_ParseTuple(args, "i", &backing_id))
        return NULL;
    return answer_open_with(request_current(), backing_id);
}

PyDoc_STRVAR(passthrough_open_doc,
    "passthrough_open(unique, backing_id)\n\n"
    "The same for the open request of that number, from any task or thread.");

static PyObject *py_passthrough_open(PyObject *module, PyObject *args)
{
    unsigned long long unique;
    int backing_id;
    if (!PyArg_ParseTuple(args, "Ki", &unique, &backing_id))
        return NULL;
    return answer_open_with(request_find(unique), backing_id);
}

PyDoc_STRVAR(set_extents_doc,
    "set_extents(fh, extents)\n\n"
    "What lseek(2) finds in the open file with that number: its size, then where each piece of data starts and\n"
    "ends, in order, as native 64-bit numbers. None: it is closed.");

static PyObject *py_set_extents(PyObject *module, PyObject *args)
{
    PyObject *fh, *extents;
    if (!PyArg_ParseTuple(args, "O!O", &PyLong_Type, &fh, &extents))
        return NULL;
    if (extents != Py_None && !PyBytes_Check(extents)) {
        PyErr_SetString(PyExc_TypeError, "extents are bytes");
        return NULL;
    }
    if (!hooks.extents && !(hooks.extents = PyDict_New()))
        return NULL;
    if (extents != Py_None) {
        if (PyDict_SetItem(hooks.extents, fh, extents) < 0)
            return NULL;
    } else if (PyDict_DelItem(hooks.extents, fh) < 0)
        PyErr_Clear();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"bind", py_bind, METH_VARARGS, bind_doc},
    {"interposed", py_interposed, METH_NOARGS, interposed_doc},
    {"seen", py_seen, METH_NOARGS, seen_doc},
    {"current_request", py_current_request, METH_NOARGS, current_request_doc},
    {"current_unique", py_current_unique, METH_NOARGS, current_unique_doc},
    {"request", py_request, METH_O, request_doc},
    {"want_passthrough", py_want_passthrough, METH_VARARGS, want_passthrough_doc},
    {"modes_are_whole", py_modes_are_whole, METH_NOARGS, modes_are_whole_doc},
    {"passthrough_available", py_passthrough_available, METH_NOARGS, passthrough_available_doc},
    {"passthrough_reason", py_passthrough_reason, METH_NOARGS, passthrough_reason_doc},
    {"backing_open", py_backing_open, METH_VARARGS, backing_open_doc},
    {"backing_close", py_backing_close, METH_VARARGS, backing_close_doc},
    {"passthrough_next_open", py_passthrough_next_open, METH_VARARGS, passthrough_next_open_doc},
    {"passthrough_open", py_passthrough_open, METH_VARARGS, passthrough_open_doc},
    {"set_extents", py_set_extents, METH_VARARGS, set_extents_doc},
    {"want_lane", py_want_lane, METH_VARARGS, want_lane_doc},
    {NULL},
};

/* The module's own state: whether the static state above is this module's, and goes when it goes. */
typedef struct {
    int owner;
} State;

static int module_exec(PyObject *module)
{
    if (hooks.request_type) {
        PyErr_SetString(PyExc_ImportError, "vmfs.fs._fuse stands in front of libfuse once in a process");
        return -1;
    }
    PyObject *type = PyType_FromModuleAndSpec(module, &request_spec, NULL);
    PyObject *current = PyContextVar_New("vmfs.fs._fuse.request", NULL);
    if (!type || !current || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
        Py_XDECREF(type);
        Py_XDECREF(current);
        return -1;
    }
    hooks.tee[0] = hooks.tee[1] = -1;
    hooks.device = -1;
    hooks.passthrough_wanted = 1;
    hooks.lane_wanted = 1;
    explain("nothing is mounted yet", 0);
    hooks.current = current;
    hooks.request_type = (PyTypeObject *)type;
    if (PyModule_AddFunctions(module, lane_methods) < 0)
        return -1;
    ((State *)PyModule_GetState(module))->owner = 1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    if (state && state->owner) {
        Py_VISIT(hooks.request_type);
        Py_VISIT(hooks.current);
    }
    return 0;
}

static int module_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    if (state && state->owner) {
        state->owner = 0;
        Py_CLEAR(hooks.request_type);
        Py_CLEAR(hooks.current);
    }
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "vmfs.fs._fuse",
    .m_doc = "What pyfuse3 does not surface: requests, interrupts, passthrough. See vmfs.fs.hooks.",
    .m_size = sizeof(State),
    .m_methods = methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__fuse(void)
{
    return PyModuleDef_Init(&definition);
}
