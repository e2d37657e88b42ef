/* How a process that is a machine's copy becomes many: fork(2), with what CPython, trio and glibc need of it and nothing else.
 *
 * os.fork touches some hundred pages in the child, and whatever the parent does afterwards parts a page from all of its
 * children. So the parent stays in C, and the child goes on in Python as if nothing had happened: it has the same single thread,
 * whose locks and garbage collector are as they were. What it may not share with its siblings is replaced under the numbers that
 * it has: the channel, trio's epoll, and the sockets by which threads wake trio. It is a child of the zygote, as all machines are.
 *
 * Source: clone(2) (CLONE_PARENT), epoll_create(2), unix(7), glibc sysdeps/unix/sysv/linux/arch-fork.h and nptl/descr.h (tid). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* vmfs/host/sandbox.py allows a template these. */
enum { FLAGS = CLONE_PARENT | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD };
enum { DESCRIPTOR_MOST = 0x900 / sizeof(pid_t) }; /* of struct pthread, where the thread's number is looked for */

struct own {
    int channel, epoll;
    int wakeups[2][2]; /* of other threads, and of a program that trio is a guest of */
};

/* Where glibc has the number of this thread, which it does not ask the kernel for again. NULL: it is not to be found. */
static pid_t *find_tid(void)
{
    pid_t *self = (pid_t *)pthread_self(), *found = NULL, tid = (pid_t)syscall(SYS_gettid);
    for (unsigned i = 0; i < DESCRIPTOR_MOST; i++)
        if (self[i] == tid) {
            if (found)
                return NULL;
            found = &self[i];
        }
    return found;
}

static int move(int from, int to)
{
    if (from < 0 || dup3(from, to, O_CLOEXEC) < 0)
        return -1;
    return close(from);
}

/* A pair in the place of those, the first of which trio waits for. */
static int own_pair(int epoll, const int ends[2], unsigned events)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) || move(pair[0], ends[0]) || move(pair[1], ends[1]))
        return -1;
    struct epoll_event event = {.events = events, .data.fd = ends[0]};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &event);
}

/* In the child: have what trio waits with for itself. Of its tasks none waits for a descriptor. */
static int own_all(const struct own *own, int channel)
{
    if (fcntl(channel, F_SETFL, O_NONBLOCK) || move(channel, own->channel) || move(epoll_create1(EPOLL_CLOEXEC), own->epoll))
        return -1;
    return own_pair(own->epoll, own->wakeups[0], EPOLLIN | EPOLLONESHOT) || own_pair(own->epoll, own->wakeups[1], EPOLLIN);
}

/* The next child's end of its channel, or -1 when the server wants no more. */
static int receive(int channel)
{
    char byte, control[CMSG_SPACE(sizeof(int))];
    struct iovec text = {&byte, 1};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t size;
    do
        size = recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
    while (size < 0 && errno == EINTR);
    struct cmsghdr *head = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (!head || head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS || head->cmsg_len != CMSG_LEN(sizeof(int)))
        return -1;
    int fd;
    memcpy(&fd, CMSG_DATA(head), sizeof fd);
    return fd;
}

static PyObject *multiply(PyObject *self, PyObject *args)
{
    struct own own;
    int next;
    if (!PyArg_ParseTuple(args, "iii(ii)(ii)", &next, &own.channel, &own.epoll, &own.wakeups[0][0], &own.wakeups[0][1],
                          &own.wakeups[1][0], &own.wakeups[1][1]))
        return NULL;
    pid_t *tid = find_tid();
    if (!tid || fcntl(own.channel, F_SETFL, 0)) /* from here on it waits for orders in receive() */
        return PyErr_SetFromErrno(PyExc_OSError);
    for (; next >= 0; next = receive(own.channel)) {
        long pid = syscall(SYS_clone, (long)FLAGS, NULL, NULL, tid, NULL);
        if (!pid) {
            if (own_all(&own, next))
                _exit(1);
            Py_RETURN_NONE;
        }
        close(next); /* where there is no child, that is how the server hears of it */
    }
    _exit(0);
}

static PyMethodDef methods[] = {
    {"multiply", multiply, METH_VARARGS,
     "multiply(first, channel, epoll, wakeup, force): returns in each child, and never in this process. `first` is the\n"
     "first child's end of its channel, the others' come by `channel`; each child has its end as `channel`. The rest is trio's."},
    {0},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "vmfs.host._multiply", NULL, 0, methods};

PyMODINIT_FUNC PyInit__multiply(void) { return PyModuleDef_Init(&module); }
