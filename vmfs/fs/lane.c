/* The lane: a thread that reads the mount's /dev/fuse. Reads of open files that are registered as hot it answers from
 * the page that their machine shares (vmfs/words/lane.h), writes of them it has the machine do; every other message, and every
 * one that the page has no answer for, waits in a queue for pyfuse3, as if it had read it from the device.
 *
 * It never waits for a machine: a machine that has files open by which it is run or written has a thread here, which answers the
 * orders that the first has given. One thread reads, so that messages keep their order (an interrupt comes after its request). A run
 * may take as long as it likes, until its caller is signalled, or its machine wants to end it in Python.
 *
 * What an exit costs are four wake-ups, so each is a futex, and has no timeout, which would have a timer programmed. Nobody
 * spins: on two busy CPUs all waiting was cheaper asleep, since a thread that is woken takes the CPU of the one that wakes it and
 * then sleeps.
 *
 * Source: linux/fuse.h; Linux fs/fuse/dev.c; futex(2). */

#define _GNU_SOURCE
#include "lane.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#include <linux/fuse.h>

#include "../words/lane.h"

#define WAKE_SIGNAL (SIGRTMIN + 7)      /* ends a read(2) of the reader, and means nothing */

enum {
    /* What the kernel asks a reader to have room for: 256 pages of data and a page of headers (FUSE_MAX_MAX_PAGES). */
    MESSAGE_MOST = 257 * 4096,
    SMALL = 64 << 10,           /* a longer message is passed on in the buffer that it was read into */
    BUCKETS = 1024,
    STACK = 64 << 10,           /* of a machine's thread */
    IDLE_MOST = 1000,           /* so often a machine may wake its thread for nothing */
};

/* A message that is an order, and waits. */
struct asked {
    struct fuse_in_header header;
    union {
        struct fuse_read_in read;
        struct fuse_write_in write;
    };
    uint8_t input[LANE_SREGS_SIZE];     /* of a write */
};

struct lane_machine {
    struct lane_page *page;
    unsigned references;        /* with the lock: the maker's, and an open file each */
    int closed;
    uint32_t pythons_reads, pythons_writes;     /* LANE_VALID of files that are Python's for now */
    uint32_t number;            /* of its last order */
    int waits;                  /* its order is under way, for `asked` */
    struct asked asked;
    unsigned idle;              /* how often its thread was woken for nothing since */
    struct lane_counts counts;

    /* of its thread */
    unsigned users;             /* open files that need it */
    struct lane_machine *next;  /* of lane.machines */
    pthread_t thread;
    int ends;
};

struct hot {
    struct hot *next;
    uint64_t fh, handle;
    struct lane_machine *machine;
    unsigned file;
    struct ring *ring;          /* of a stream */
    int gives_orders;
    int cold;                   /* never again: it was used in ways that only Python serves */
    int has_line;               /* `line` is what the last read from offset 0 got, */
    uint64_t seen;              /* and these news */
    uint32_t line_size;
    uint8_t line[LANE_LINE_MOST];
};

static int is_run(unsigned file) { return file == LANE_RUN || file == LANE_RUN_LINE; }

struct message {
    struct message *next;
    size_t size;
    void *bytes;
};

/* An answer that stays the same (lane_keep). */
struct kept {
    struct kept *next;
    uint32_t opcode;
    uint64_t of;
    size_t size;
    uint8_t bytes[LANE_KEPT_MOST];
};

static struct {
    pthread_mutex_t lock;       /* of the hot files, the machines and what is kept */
    struct hot *hot[BUCKETS];
    struct kept *kept[BUCKETS];

    pthread_mutex_t queue_lock;
    struct message *first, **last;
    int ended;                  /* the thread does not read any more */

    int started, ending;
    int device, readable;       /* /dev/fuse; an eventfd */
    pthread_t reader;
    struct lane_machine *machines;  /* with `lock`: those that have a thread */
} lane = {.lock = PTHREAD_MUTEX_INITIALIZER, .queue_lock = PTHREAD_MUTEX_INITIALIZER, .device = -1, .readable = -1};

enum served { NOT_SERVED, SERVED };

/* ---- machines and hot files ---- */

struct lane_machine *lane_map(int fd)
{
    struct lane_machine *machine = calloc(1, sizeof *machine);
    if (!machine)
        return NULL;
    machine->page = mmap(NULL, LANE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (machine->page == MAP_FAILED) {
        int error = errno;
        free(machine);
        errno = error;
        return NULL;
    }
    machine->references = 1;
    return machine;
}

static void release(struct lane_machine *machine)       /* with the lock */
{
    if (--machine->references)
        return;
    munmap(machine->page, LANE_SIZE);
    free(machine);
}

void lane_release(struct lane_machine *machine)
{
    pthread_mutex_lock(&lane.lock);
    machine->closed = 1;
    release(machine);
    pthread_mutex_unlock(&lane.lock);
}

static struct hot **find(uint64_t fh)
{
    struct hot **each = &lane.hot[fh % BUCKETS];
    while (*each && (*each)->fh != fh)
        each = &(*each)->next;
    return each;
}

static int begin_thread(struct lane_machine *machine);
static void end_thread(struct lane_machine *machine);

static void add(struct hot *one)
{
    struct lane_machine *machine = one->machine;
    pthread_mutex_lock(&lane.lock);
    machine->users += (unsigned)one->gives_orders;
    machine->references++;
    one->next = lane.hot[one->fh % BUCKETS];
    lane.hot[one->fh % BUCKETS] = one;
    pthread_mutex_unlock(&lane.lock);
}

int lane_add(uint64_t fh, struct lane_machine *machine, unsigned file, uint64_t handle, int written)
{
    int gives_orders = is_run(file) || written;
    struct hot *one = calloc(1, sizeof *one);
    if (!one)
        return -ENOMEM;
    if (gives_orders && !machine->users && begin_thread(machine)) {
        free(one);
        return -EAGAIN;
    }
    *one = (struct hot){.fh = fh, .machine = machine, .file = file, .handle = handle, .gives_orders = gives_orders};
    add(one);
    return 0;
}

int lane_add_stream(uint64_t fh, struct lane_machine *machine, unsigned file, struct ring *ring)
{
    struct hot *one = calloc(1, sizeof *one);
    if (!one)
        return -ENOMEM;
    ring_hold(ring);
    *one = (struct hot){.fh = fh, .machine = machine, .file = file, .ring = ring};
    add(one);
    return 0;
}

void lane_forget(uint64_t fh)
{
    pthread_mutex_lock(&lane.lock);
    struct hot **place = find(fh), *one = *place;
    if (one)
        *place = one->next;
    int was_last = one && one->gives_orders && !--one->machine->users;
    pthread_mutex_unlock(&lane.lock);
    if (!one)
        return;
    if (was_last)
        end_thread(one->machine);
    pthread_mutex_lock(&lane.lock);
    release(one->machine);
    pthread_mutex_unlock(&lane.lock);
    if (one->ring)
        ring_drop(one->ring);
    free(one);
}

/* ---- answers ---- */

static void answer(uint64_t unique, const void *data, size_t size)
{
    struct fuse_out_header header = {.len = (uint32_t)(sizeof header + size), .unique = unique};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)data, size}};
    while (writev(lane.device, parts, 2) < 0 && errno == EINTR)
        ;                       /* any other error: the caller has gone */
}

static void answer_part(const struct fuse_in_header *header, const struct fuse_read_in *read, const uint8_t *data, size_t size)
{
    size_t offset = read->offset < size ? (size_t)read->offset : size;
    size_t length = size - offset < read->size ? size - offset : read->size;
    answer(header->unique, data + offset, length);
}

/* What stands still of a file, whole: its size, or -1 where the page does not have it. */
static long copy_still(const struct lane_page *page, unsigned file, uint8_t *to, uint64_t *news)
{
    for (int tries = 0; tries < 4; tries++) {
        uint32_t before = __atomic_load_n(&page->sequence, __ATOMIC_ACQUIRE);
        if (before & 1)
            continue;
        if (!(__atomic_load_n(&page->valid, __ATOMIC_ACQUIRE) & LANE_VALID(file)))
            return -1;
        size_t size = __atomic_load_n(&page->sizes[file], __ATOMIC_RELAXED);
        if (size > lane_places[file].most)
            return -1;
        memcpy(to, (const uint8_t *)page + lane_places[file].at, size);
        *news = LANE_SNAPSHOTS & LANE_VALID(file) ? page->news[file - LANE_EXIT] : 0;
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&page->sequence, __ATOMIC_RELAXED) == before)
            return (long)size;
    }
    return -1;
}

/* ---- answers that are kept ---- */

static struct kept **find_kept(uint32_t opcode, uint64_t of)
{
    struct kept **each = &lane.kept[of % BUCKETS];
    while (*each && ((*each)->of != of || (*each)->opcode != opcode))
        each = &(*each)->next;
    return each;
}

void lane_drop(uint32_t opcode, uint64_t of)
{
    pthread_mutex_lock(&lane.lock);
    struct kept **place = find_kept(opcode, of), *one = *place;
    if (one)
        *place = one->next;
    pthread_mutex_unlock(&lane.lock);
    free(one);
}

void lane_keep(uint32_t opcode, uint64_t of, const void *answer, size_t size)
{
    struct kept *one = size <= LANE_KEPT_MOST && lane.started ? malloc(sizeof *one) : NULL;
    lane_drop(opcode, of);
    if (!one)
        return;
    *one = (struct kept){.opcode = opcode, .of = of, .size = size};
    memcpy(one->bytes, answer, size);
    pthread_mutex_lock(&lane.lock);
    one->next = lane.kept[of % BUCKETS];
    lane.kept[of % BUCKETS] = one;
    pthread_mutex_unlock(&lane.lock);
}

static enum served serve_kept(const struct fuse_in_header *header, uint64_t of)
{
    uint8_t bytes[LANE_KEPT_MOST];
    pthread_mutex_lock(&lane.lock);
    const struct kept *one = *find_kept(header->opcode, of);
    size_t size = one ? one->size : 0;
    if (one)
        memcpy(bytes, one->bytes, size);
    pthread_mutex_unlock(&lane.lock);
    if (!one)
        return NOT_SERVED;
    answer(header->unique, bytes, size);
    return SERVED;
}

/* ---- what Python is to serve ---- */

static void refuse(uint64_t unique, int error)
{
    struct fuse_out_header header = {.len = sizeof header, .error = -error, .unique = unique};
    while (write(lane.device, &header, sizeof header) < 0 && errno == EINTR)
        ;
}

static void pass(void *bytes, size_t size)
{
    struct message *one = malloc(sizeof *one);
    if (!one) {
        refuse(((struct fuse_in_header *)bytes)->unique, ENOMEM);
        free(bytes);
        return;
    }
    *one = (struct message){NULL, size, bytes};
    pthread_mutex_lock(&lane.queue_lock);
    int was_empty = !lane.first;
    *lane.last = one;
    lane.last = &one->next;
    if (was_empty)
        eventfd_write(lane.readable, 1);
    pthread_mutex_unlock(&lane.queue_lock);
}

static void pass_asked(const struct asked *asked)
{
    int is_write = asked->header.opcode == FUSE_WRITE;
    size_t head = sizeof asked->header, more = is_write ? sizeof asked->write : sizeof asked->read;
    size_t size = head + more + (is_write ? asked->write.size : 0);
    uint8_t *bytes = malloc(size);
    if (!bytes) {
        refuse(asked->header.unique, ENOMEM);
        return;
    }
    memcpy(bytes, &asked->header, head);
    memcpy(bytes + head, &asked->write, more);
    memcpy(bytes + head + more, asked->input, size - head - more);
    pass(bytes, size);
}

long lane_receive(void **message)
{
    long size = 0;
    pthread_mutex_lock(&lane.queue_lock);
    struct message *one = lane.first;
    if (one) {
        lane.first = one->next;
        if (!lane.first)
            lane.last = &lane.first;
        *message = one->bytes;
        size = (long)one->size;
        free(one);
    } else if (lane.ended)
        size = -1;
    if (!lane.first && !lane.ended) {
        eventfd_t count;
        eventfd_read(lane.readable, &count);
    }
    pthread_mutex_unlock(&lane.queue_lock);
    return size;
}

/* ---- orders ---- */

enum ends { ANSWERED, FOR_PYTHON, IS_INTERRUPTED };

/* What becomes of a message that is an order. */
struct outcome {
    struct asked asked;
    enum ends end;
    uint32_t line_size;         /* of a read that is answered */
    uint8_t line[LANE_LINE_MOST];
};

static int is_at(const struct lane_machine *machine, enum lane_step step)
{
    return __atomic_load_n(&machine->page->order, __ATOMIC_SEQ_CST) == (machine->number << LANE_STEP_BITS | step);
}

/* With the lock: the order that waits is over: answered, where the machine has done it, else left to Python. */
static void end_order(struct lane_machine *machine, struct outcome *outcome)
{
    struct lane_page *page = machine->page;
    int is_write = machine->asked.header.opcode == FUSE_WRITE;

    machine->waits = 0;
    machine->idle = 0;
    outcome->asked = machine->asked;
    outcome->end = FOR_PYTHON;
    if (lane_step_on(&page->order, machine->number, LANE_POSTED, LANE_NONE))
        ;
    else if (lane_step_on(&page->order, machine->number, LANE_TAKEN, LANE_LEFT)) {
        if (is_write)
            outcome->end = IS_INTERRUPTED;          /* it may have been done: an interrupt is not to come twice */
    } else if (is_at(machine, LANE_DONE))           /* Python would do it again */
        outcome->end = ANSWERED;
    if (outcome->end != ANSWERED) {
        machine->counts.left++;
        return;
    }
    if (is_write) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME_COARSE, &now);
        machine->counts.writes++;
        machine->counts.written_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
        return;
    }
    machine->counts.runs++;
    uint32_t size = page->output_size;
    outcome->line_size = size <= LANE_LINE_MOST ? size : 0;
    memcpy(outcome->line, page->output, outcome->line_size);
    struct hot *file = *find(machine->asked.read.fh);
    if (file) {
        file->has_line = 1;
        file->line_size = outcome->line_size;
        memcpy(file->line, outcome->line, outcome->line_size);
    }
}

/* Without the lock. */
static void finish(const struct outcome *outcome)
{
    const struct asked *asked = &outcome->asked;
    if (outcome->end == FOR_PYTHON)
        pass_asked(asked);
    else if (outcome->end == IS_INTERRUPTED)
        refuse(asked->header.unique, EINTR);
    else if (asked->header.opcode == FUSE_WRITE) {
        struct fuse_write_out written = {.size = asked->write.size};
        answer(asked->header.unique, &written, sizeof written);
    } else
        answer_part(&asked->header, &asked->read, outcome->line, outcome->line_size);
}

/* With the lock. Whether the order was given. */
static int give_order(struct hot *file, const struct asked *asked)
{
    struct lane_machine *machine = file->machine;
    struct lane_page *page = machine->page;

    if (machine->waits || !__atomic_load_n(&page->is_open, __ATOMIC_ACQUIRE))
        return 0;
    machine->waits = 1;
    machine->number = (machine->number + 1) & (UINT32_MAX >> LANE_STEP_BITS);
    machine->asked = *asked;
    page->handle = file->handle;
    page->file = file->file;
    if (asked->header.opcode == FUSE_WRITE) {
        page->offset = (uint32_t)asked->write.offset;
        page->size = asked->write.size;
        memcpy(page->input, asked->input, asked->write.size);
    }
    __atomic_store_n(&page->order, machine->number << LANE_STEP_BITS | LANE_POSTED, __ATOMIC_SEQ_CST);
    lane_signal(&page->bell, &page->sleeps);
    return 1;
}

void lane_close(struct lane_machine *machine)
{
    struct outcome outcome;
    pthread_mutex_lock(&lane.lock);
    machine->closed = 1;
    int waits = machine->waits;
    if (waits)
        end_order(machine, &outcome);
    pthread_mutex_unlock(&lane.lock);
    if (waits)
        finish(&outcome);
}

/* The thread of a machine: answers its orders as they end. */
static void *answer_orders(void *argument)
{
    struct lane_machine *machine = argument;
    struct lane_page *page = machine->page;
    struct outcome outcome;

    prctl(PR_SET_NAME, "vmfs-lane-runs", 0, 0, 0);
    while (!__atomic_load_n(&machine->ends, __ATOMIC_SEQ_CST)) {
        uint32_t ended = __atomic_load_n(&page->ended, __ATOMIC_SEQ_CST);
        pthread_mutex_lock(&lane.lock);
        int is_over = machine->waits && !is_at(machine, LANE_POSTED) && !is_at(machine, LANE_TAKEN);
        if (is_over)
            end_order(machine, &outcome);
        else if (++machine->idle > IDLE_MOST)
            machine->closed = machine->ends = 1;        /* it wants to keep this thread busy */
        pthread_mutex_unlock(&lane.lock);
        if (is_over)
            finish(&outcome);
        lane_sleep(&page->ended, &page->server_sleeps, ended);
    }
    return NULL;
}

/* ---- messages ---- */

static enum served serve_read(const struct fuse_in_header *header, const struct fuse_read_in *read)
{
    uint8_t data[LANE_LINE_MOST];
    enum served done = NOT_SERVED;
    long size = -1;
    uint64_t news;

    pthread_mutex_lock(&lane.lock);
    struct hot *file = *find(read->fh);
    if (!file || file->machine->closed || file->cold || file->machine->pythons_reads & LANE_VALID(file->file))
        ;
    else if (file->ring) {              /* many bytes, so without the lock */
        struct lane_machine *machine = file->machine;
        struct ring *ring = file->ring;
        machine->references++;
        ring_hold(ring);
        pthread_mutex_unlock(&lane.lock);
        done = ring_answer(ring, lane.device, header->unique, read->offset, read->size) ? SERVED : NOT_SERVED;
        ring_drop(ring);
        pthread_mutex_lock(&lane.lock);
        machine->counts.reads += done == SERVED;
        release(machine);
        pthread_mutex_unlock(&lane.lock);
        return done;
    } else if (file->file < LANE_EXIT)
        size = copy_still(file->machine->page, file->file, data, &news);
    else if (is_run(file->file) && read->flags & O_NONBLOCK)
        file->cold = 1;                 /* its handle has a run of its own to tell of, from now on */
    else if (read->offset) {
        if (file->has_line) {
            size = file->line_size;
            memcpy(data, file->line, file->line_size);
        }
    } else if (is_run(file->file)) {
        file->has_line = 0;
        struct asked asked = {.header = *header, .read = *read};
        if (give_order(file, &asked))
            done = SERVED;
    } else if (file->file < LANE_FILES_STILL) {
        size = copy_still(file->machine->page, file->file, data, &news);
        file->has_line = size >= 0;
        if (file->has_line) {
            file->seen = news;
            file->line_size = (uint32_t)size;
            memcpy(file->line, data, (size_t)size);
        }
    }
    if (size >= 0)
        file->machine->counts.reads++;
    else if (file && !read->offset)
        file->has_line = 0;             /* Python has what others go on in */
    pthread_mutex_unlock(&lane.lock);
    if (size >= 0) {
        answer_part(header, read, data, (size_t)size);
        return SERVED;
    }
    return done;
}

static enum served serve_write(const struct fuse_in_header *header, const struct fuse_write_in *write, const uint8_t *data)
{
    enum served done = NOT_SERVED;

    pthread_mutex_lock(&lane.lock);
    struct hot *file = *find(write->fh);
    if (file && file->gives_orders && !is_run(file->file) && !file->machine->closed
        && !(file->machine->pythons_writes & LANE_VALID(file->file))
        && (file->file == LANE_IRQ ? write->size == 4 && !data[1] && !data[2] && !data[3]    /* struct kvm_interrupt */
            : file->file == LANE_RESTORE ? write->size && write->size <= sizeof((struct asked *)0)->input
            : file->file <= LANE_DATA && write->size && write->size <= sizeof((struct asked *)0)->input
              && write->offset < LANE_SREGS_SIZE)) {
        struct asked asked = {.header = *header, .write = *write};
        memcpy(asked.input, data, write->size);
        if (give_order(file, &asked))
            done = SERVED;
    }
    pthread_mutex_unlock(&lane.lock);
    return done;
}

/* Only that there are news: readers that wait for them are Python's. */
static enum served serve_poll(const struct fuse_in_header *header, const struct fuse_poll_in *poll)
{
    uint8_t data[LANE_LINE_MOST];
    struct fuse_poll_out found = {0};
    uint64_t news;

    pthread_mutex_lock(&lane.lock);
    struct hot *file = *find(poll->fh);
    if (file && !file->machine->closed && LANE_SNAPSHOTS & LANE_VALID(file->file) && file->has_line
        && copy_still(file->machine->page, file->file, data, &news) >= 0 && news != file->seen) {
        found.revents = POLLIN | POLLPRI | (file->file == LANE_STATE ? POLLOUT : 0);
        file->machine->counts.reads++;
    }
    pthread_mutex_unlock(&lane.lock);
    if (!found.revents)
        return NOT_SERVED;
    answer(header->unique, &found, sizeof found);
    return SERVED;
}

/* What a machine shall have heard before the message: an interrupted caller waits in Python, and a file of runs that is written
 * or polled is not the lane's. */
static void before_passing(const struct fuse_in_header *header, const uint8_t *argument, size_t size)
{
    uint64_t key;
    if (size < sizeof key)
        return;
    memcpy(&key, argument, sizeof key);         /* fuse_interrupt_in's unique; the fh of the others */
    if (header->opcode == FUSE_INTERRUPT) {
        struct outcome outcome;
        int is_found = 0;
        pthread_mutex_lock(&lane.lock);
        for (struct lane_machine *each = lane.machines; each && !is_found; each = each->next)
            if (each->waits && each->asked.header.unique == key) {
                is_found = 1;
                end_order(each, &outcome);
            }
        pthread_mutex_unlock(&lane.lock);
        if (is_found)
            finish(&outcome);
    } else if (header->opcode == FUSE_WRITE || header->opcode == FUSE_POLL) {
        pthread_mutex_lock(&lane.lock);
        struct hot *file = *find(key);
        if (file && is_run(file->file))
            file->cold = 1;
        pthread_mutex_unlock(&lane.lock);
    }
}

static enum served serve_request(const struct fuse_in_header *header, const uint8_t *argument, size_t size)
{
    union {
        struct fuse_read_in read;
        struct fuse_write_in write;
        struct fuse_poll_in poll;
        struct fuse_flush_in flush;
    } in;

    memcpy(&in, argument, size < sizeof in ? size : sizeof in);
    if (header->opcode == FUSE_READ && size >= sizeof in.read)
        return serve_read(header, &in.read);
    if (header->opcode == FUSE_WRITE && size >= sizeof in.write && size - sizeof in.write >= in.write.size
        && serve_write(header, &in.write, argument + sizeof in.write) == SERVED)
        return SERVED;
    if (header->opcode == FUSE_POLL && size >= sizeof in.poll && serve_poll(header, &in.poll) == SERVED)
        return SERVED;
    if (header->opcode == FUSE_GETATTR && serve_kept(header, header->nodeid) == SERVED)
        return SERVED;
    if (header->opcode == FUSE_FLUSH && size >= sizeof in.flush && serve_kept(header, in.flush.fh) == SERVED)
        return SERVED;
    before_passing(header, argument, size);
    return NOT_SERVED;
}

static enum served serve_message(uint8_t **buffer, size_t size)
{
    struct fuse_in_header header;

    if (size < sizeof header)
        return NOT_SERVED;
    memcpy(&header, *buffer, sizeof header);
    if (serve_request(&header, *buffer + sizeof header, size - sizeof header) == SERVED)
        return SERVED;
    if (size <= SMALL) {
        uint8_t *copy = malloc(size);
        if (copy) {
            memcpy(copy, *buffer, size);
            pass(copy, size);
            return NOT_SERVED;
        }
    }
    uint8_t *other = malloc(MESSAGE_MOST);
    if (!other) {
        refuse(header.unique, ENOMEM);
        return NOT_SERVED;
    }
    pass(*buffer, size);
    *buffer = other;
    return NOT_SERVED;
}

static void *read_messages(void *argument)
{
    uint8_t *buffer = argument;

    prctl(PR_SET_NAME, "vmfs-lane", 0, 0, 0);
    while (!__atomic_load_n(&lane.ending, __ATOMIC_SEQ_CST)) {
        ssize_t size = read(lane.device, buffer, MESSAGE_MOST);
        if (size > 0)
            serve_message(&buffer, (size_t)size);
        else if (size == 0 || (errno != EINTR && errno != ENOENT && errno != EAGAIN))
            break;                      /* ENOENT: the request was aborted meanwhile */
    }
    free(buffer);
    pthread_mutex_lock(&lane.queue_lock);
    lane.ended = 1;
    eventfd_write(lane.readable, 1);    /* stays readable: the receiver is to see the end */
    pthread_mutex_unlock(&lane.queue_lock);
    return NULL;
}

/* ---- threads ---- */

static void wake_up(int ignored) { (void)ignored; }

/* Python's signals go to its main thread; the one that wakes a thread of the lane goes to that. */
static int begin(pthread_t *thread, void *(*body)(void *), void *argument, size_t stack)
{
    sigset_t blocked, before;
    pthread_attr_t attributes;

    sigfillset(&blocked);
    sigdelset(&blocked, WAKE_SIGNAL);
    pthread_attr_init(&attributes);
    if (stack)
        pthread_attr_setstacksize(&attributes, stack);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int error = pthread_create(thread, &attributes, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

/* Wake a thread that is to end, again and again: a signal may come right before the sleep that it is to end. */
static void end(pthread_t thread)
{
    struct timespec until;
    do {
        pthread_kill(thread, WAKE_SIGNAL);
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 2000000;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
    } while (pthread_timedjoin_np(thread, NULL, &until));
}

static int begin_thread(struct lane_machine *machine)
{
    machine->ends = 0;
    int error = begin(&machine->thread, answer_orders, machine, STACK);
    if (error)
        return error;
    pthread_mutex_lock(&lane.lock);
    machine->next = lane.machines;
    lane.machines = machine;
    pthread_mutex_unlock(&lane.lock);
    return 0;
}

/* Of a machine that has one, unless the lane has ended. */
static void end_thread(struct lane_machine *machine)
{
    struct outcome outcome;
    pthread_mutex_lock(&lane.lock);
    struct lane_machine **place = &lane.machines;
    while (*place && *place != machine)
        place = &(*place)->next;
    int has_thread = *place == machine;
    if (has_thread)
        *place = machine->next;
    int waits = has_thread && machine->waits;
    if (waits)
        end_order(machine, &outcome);
    __atomic_store_n(&machine->ends, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&lane.lock);
    if (waits)
        finish(&outcome);
    if (has_thread)
        end(machine->thread);
}

static void close_one(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void close_all(void)
{
    close_one(&lane.device);
    close_one(&lane.readable);
}

static int start_reader(void)
{
    struct sigaction action = {.sa_handler = wake_up};      /* no SA_RESTART: it ends a read */
    uint8_t *buffer = malloc(MESSAGE_MOST);
    if (!buffer)
        return ENOMEM;
    sigaction(WAKE_SIGNAL, &action, NULL);
    int error = begin(&lane.reader, read_messages, buffer, 0);
    if (error)
        free(buffer);
    return error;
}

int lane_start(int device)
{
    if (lane.started)
        return -EBUSY;
    lane.last = &lane.first;
    lane.ended = lane.ending = 0;
    lane.device = fcntl(device, F_DUPFD_CLOEXEC, 0);
    lane.readable = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int error = lane.device < 0 || lane.readable < 0 ? errno : start_reader();
    if (error) {
        close_all();
        return -error;
    }
    lane.started = 1;
    return lane.readable;
}

void lane_stop(void)
{
    if (!lane.started)
        return;
    __atomic_store_n(&lane.ending, 1, __ATOMIC_SEQ_CST);
    end(lane.reader);
    while (lane.machines)
        end_thread(lane.machines);
    for (struct kept **each = lane.kept; each < lane.kept + BUCKETS; each++)
        while (*each)
            lane_drop((*each)->opcode, (*each)->of);
    lane.started = 0;
    close_all();
}

uint64_t lane_seen(uint64_t fh)
{
    pthread_mutex_lock(&lane.lock);
    const struct hot *file = *find(fh);
    uint64_t seen = file ? file->seen : 0;
    pthread_mutex_unlock(&lane.lock);
    return seen;
}

int64_t lane_still(struct lane_machine *machine)
{
    const struct lane_page *page = machine->page;
    uint32_t sequence = __atomic_load_n(&page->sequence, __ATOMIC_SEQ_CST);
    int is_still = !(sequence & 1) && __atomic_load_n(&page->valid, __ATOMIC_SEQ_CST) & LANE_VALID(LANE_REGS);
    pthread_mutex_lock(&lane.lock);
    is_still = is_still && !machine->waits && !machine->closed;
    pthread_mutex_unlock(&lane.lock);
    return is_still ? (int64_t)sequence : -1;
}

void lane_leave(struct lane_machine *machine, uint32_t reads, uint32_t writes)
{
    pthread_mutex_lock(&lane.lock);
    machine->pythons_reads = reads;
    machine->pythons_writes = writes;
    pthread_mutex_unlock(&lane.lock);
}

struct lane_counts lane_counts(struct lane_machine *machine)
{
    pthread_mutex_lock(&lane.lock);
    struct lane_counts counts = machine->counts;
    pthread_mutex_unlock(&lane.lock);
    return counts;
}

int lane_serves(void) { return lane.started; }
