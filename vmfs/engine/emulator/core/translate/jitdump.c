/* VMFS_JIT_DUMP=FOLDER: names and bytes of host code for `perf inject --jit`, in FOLDER/vmfs-XXXXXX/jit-PID.dump.
 *
 * The format is that of Linux tools/perf/Documentation/jitdump-specification.txt, version 1. perf finds the file by its name in the
 * list of what the process has mapped to execute, so a page of it is mapped. */
#define _GNU_SOURCE
#include "jitdump.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

enum { MAGIC = 0x4a695444, VERSION = 1, MACHINE_X86_64 = 62, CODE_LOAD = 0 };
struct header { u32 magic, version, size, machine, reserved, pid; u64 time, flags; };
struct load { u32 id, size; u64 time; u32 pid, tid; u64 address, code, code_size, index; };
_Static_assert(sizeof(struct header) == 40 && sizeof(struct load) == 56, "perf's layouts");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for: */
static struct { int fd; pid_t of; u64 index; } dump = {.fd = -1};

static u64 now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

static int open_dump(const char *folder)
{
    char path[4096], name[4096];
    if (snprintf(path, sizeof path, "%s/vmfs-XXXXXX", folder) >= (int)sizeof path || !mkdtemp(path))
        return -errno;
    if (snprintf(name, sizeof name, "%s/jit-%d.dump", path, (int)getpid()) >= (int)sizeof name)
        return -ENAMETOOLONG;
    int fd = open(name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    struct header h = {.magic = MAGIC, .version = VERSION, .size = sizeof h, .machine = MACHINE_X86_64, .pid = (u32)getpid(), .time = now()};
    if (fd < 0 || write(fd, &h, sizeof h) != sizeof h ||
        mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) == MAP_FAILED) {
        int error = -errno;
        if (fd >= 0)
            close(fd);
        return error;
    }
    if (dump.fd >= 0)
        close(dump.fd);
    dump.fd = fd, dump.of = getpid(), dump.index = 0;
    return 0;
}

int core_open_jitdump(void)
{
    const char *folder = getenv("VMFS_JIT_DUMP");
    if (!folder || !*folder)
        return 0;
    pthread_mutex_lock(&lock);
    int error = dump.fd >= 0 && dump.of == getpid() ? 0 : open_dump(folder);
    pthread_mutex_unlock(&lock);
    return error;
}

bool jitdump_is_open(void) { return dump.fd >= 0; }

void jitdump_load(const u8 *code, u64 address, size_t size, u64 ip)
{
    char name[32];
    struct load l = {.id = CODE_LOAD, .pid = (u32)getpid(), .tid = (u32)syscall(SYS_gettid), .address = address, .code = address,
                     .code_size = size};
    size_t length = (size_t)snprintf(name, sizeof name, "guest_%llx", (unsigned long long)ip) + 1;
    l.size = (u32)(sizeof l + length + size);
    pthread_mutex_lock(&lock);
    l.time = now();
    l.index = dump.index++;
    struct iovec parts[] = {{&l, sizeof l}, {name, length}, {(void *)code, size}};
    if (dump.of != getpid() || writev(dump.fd, parts, 3) != (ssize_t)l.size) { /* what follows half a record is not understood */
        close(dump.fd);
        dump.fd = -1;
    }
    pthread_mutex_unlock(&lock);
}
