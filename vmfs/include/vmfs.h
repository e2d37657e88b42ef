/*
 * vmfs.h - a virtual machine that is a directory, from C and C++.
 *
 *     int ctx = kvm_create("/vmfs/demo");
 *     int mem = openat(ctx, "mem", O_RDWR);
 *     int regs = openat(ctx, "regs", O_RDWR);
 *     struct vmfs_exit e;
 *     for (;;)
 *         switch (kvm_run(ctx, &e)) {
 *         case VMFS_EXIT_IO:    ... e.io.port, e.io.data ...     break;
 *         case VMFS_EXIT_MMIO:  ... e.mmio.addr ...              break;
 *         case VMFS_EXIT_HLT:   pread(regs, &rax, sizeof rax, KVM_REG_RAX);
 *                               return 0;
 *         case -1:              err(1, "kvm_run");
 *         }
 *
 * Nothing to link. A machine's files are its interface (openat, pread, pwrite, mmap, poll; docs/files.md);
 * what is here saves typing. Functions answer -1 with errno set where they fail, and hold no state:
 * descriptors are the caller's to close.
 *
 * Needs C99 or C++11 with POSIX.1-2008: -std=gnu99 or later, or _POSIX_C_SOURCE=200809L before any header.
 * State files have the layouts of <linux/kvm.h>, which on an x86 host also has their structs.
 */
#ifndef VMFS_H
#define VMFS_H

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#if !defined(AT_FDCWD) || !defined(O_DIRECTORY)
#error "vmfs.h needs openat(): compile with -std=gnu99 or later, or -D_POSIX_C_SOURCE=200809L"
#endif

#ifdef __cplusplus
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wold-style-cast" /* this is C, too */
#pragma GCC diagnostic ignored "-Wshadow" /* function kvm_run, struct kvm_run of <linux/kvm.h> */
#endif

/* ---- Places in the state files ---------------------------------------------------------------------- */

/* Byte offsets into `regs`, struct kvm_regs. Each is 8 bytes wide. */
enum vmfs_reg {
    KVM_REG_RAX = 0,
    KVM_REG_RBX = 8,
    KVM_REG_RCX = 16,
    KVM_REG_RDX = 24,
    KVM_REG_RSI = 32,
    KVM_REG_RDI = 40,
    KVM_REG_RSP = 48,
    KVM_REG_RBP = 56,
    KVM_REG_R8 = 64,
    KVM_REG_R9 = 72,
    KVM_REG_R10 = 80,
    KVM_REG_R11 = 88,
    KVM_REG_R12 = 96,
    KVM_REG_R13 = 104,
    KVM_REG_R14 = 112,
    KVM_REG_R15 = 120,
    KVM_REG_RIP = 128,
    KVM_REG_RFLAGS = 136
};

/* Byte offsets into `sregs`, struct kvm_sregs: of a struct kvm_segment (24 bytes), */
enum vmfs_sreg {
    KVM_SREG_CS = 0,
    KVM_SREG_DS = 24,
    KVM_SREG_ES = 48,
    KVM_SREG_FS = 72,
    KVM_SREG_GS = 96,
    KVM_SREG_SS = 120,
    KVM_SREG_TR = 144,
    KVM_SREG_LDTR = 168,
    /* of a struct kvm_dtable (16 bytes), */
    KVM_SREG_GDTR = 192,
    KVM_SREG_IDTR = 208,
    /* and of 8 bytes. */
    KVM_SREG_CR0 = 224,
    KVM_SREG_CR2 = 232,
    KVM_SREG_CR3 = 240,
    KVM_SREG_CR4 = 248,
    KVM_SREG_CR8 = 256,
    KVM_SREG_EFER = 264,
    KVM_SREG_APIC_BASE = 272
};

/* ---- Exits ------------------------------------------------------------------------------------------ */

/* Why a run ended. KVM's KVM_EXIT_* numbers where KVM has the same exit. */
enum vmfs_exit_reason {
    VMFS_EXIT_IO = 2,           /* io: a port that no device claims */
    VMFS_EXIT_DEBUG = 4,        /* debug: a step, a break- or watchpoint */
    VMFS_EXIT_HLT = 5,          /* HLT, and nothing could wake the guest */
    VMFS_EXIT_MMIO = 6,         /* mmio: guest-physical memory that is neither RAM nor a device */
    VMFS_EXIT_SHUTDOWN = 8,     /* shutdown: off until `reset` is written to `state` */
    VMFS_EXIT_INTERRUPTED = 10, /* stopped from outside, between two instructions */
    VMFS_EXIT_ERROR = 17,       /* error: what the engine could not do */
    VMFS_EXIT_LIMIT = 0x100     /* the bound of the run was reached */
};

enum vmfs_io_direction { VMFS_IO_IN = 0, VMFS_IO_OUT = 1 };

enum vmfs_debug_cause {
    VMFS_DEBUG_STEP = 1,
    VMFS_DEBUG_BREAKPOINT = 2,
    VMFS_DEBUG_WATCHPOINT = 3,
    VMFS_DEBUG_IO = 4,
    VMFS_DEBUG_EXCEPTION = 5,
    VMFS_DEBUG_MODE = 6,
    VMFS_DEBUG_CR3 = 7,
    VMFS_DEBUG_INTERRUPT = 8,
    VMFS_DEBUG_UNWRITTEN = 9,
    VMFS_DEBUG_UNCLAIMED = 10
};

enum vmfs_shutdown_cause {
    VMFS_SHUTDOWN_TRIPLE_FAULT = 1,
    VMFS_SHUTDOWN_POWEROFF = 2,
    VMFS_SHUTDOWN_RESET = 3,
    VMFS_SHUTDOWN_DEBUG_EXIT = 4,
    VMFS_SHUTDOWN_SUSPEND = 5
};

struct vmfs_exit_io {
    uint8_t direction; /* VMFS_IO_IN or VMFS_IO_OUT */
    uint8_t size;      /* bytes an element: 1, 2 or 4 */
    uint16_t port;
    uint32_t count;    /* elements: 1, or more for `rep ins` and `rep outs` */
    uint8_t data[40];  /* out: the first 40 bytes of size * count; all of them are in the file exit.data */
};

struct vmfs_exit_mmio {
    uint64_t addr;    /* guest-physical */
    uint8_t data[8];  /* write: the bytes, little-endian */
    uint32_t len;     /* 1 to 8 */
    uint8_t is_write;
    uint8_t padding[3];
};

struct vmfs_exit_debug {
    uint32_t cause;  /* VMFS_DEBUG_ */
    uint32_t id;     /* of the point, as in the file `debug`; 0: none */
    uint64_t addr;   /* watchpoint: what was accessed; io: the port; #PF: the address */
    uint32_t vector; /* exception, interrupt: which */
    uint32_t padding;
};

struct vmfs_exit_shutdown {
    uint32_t cause; /* VMFS_SHUTDOWN_ */
    uint32_t code;  /* debug-exit: what the guest said */
};

struct vmfs_exit_error {
    char reason[48]; /* a sentence, NUL-terminated, cut where it is longer; the file `exit` has all of it */
};

/* What the files vm_run.bin and exit.bin hold: 64 bytes. */
struct vmfs_exit {
    uint32_t reason; /* VMFS_EXIT_ */
    uint32_t cpu;
    uint64_t rip;    /* as in `regs`; of out, stores, hlt: the next instruction; of in, loads: their own */
    __extension__ union {
        struct vmfs_exit_io io;
        struct vmfs_exit_mmio mmio;
        struct vmfs_exit_debug debug;
        struct vmfs_exit_shutdown shutdown;
        struct vmfs_exit_error error;
        uint8_t bytes[48];
    };
};

/* ---- Traces ----------------------------------------------------------------------------------------- */

enum vmfs_trace_kind {
    VMFS_TRACE_INSN = 1,      /* insn: instructions, one after the other */
    VMFS_TRACE_MEM = 2,       /* mem: an access to memory */
    VMFS_TRACE_EXCEPTION = 3, /* event: is delivered, or becomes a double fault or a shutdown */
    VMFS_TRACE_INTERRUPT = 4, /* event: an external interrupt, an NMI, INT n is delivered */
    VMFS_TRACE_EXIT = 5,      /* exit: the engine came out of the guest */
    VMFS_TRACE_AT = 6,        /* insn: where what follows happens */
    VMFS_TRACE_DROPPED = 7,   /* dropped: a gap */
    VMFS_TRACE_CPU = 8        /* code: whose the records that follow are; where there are several CPUs */
};

enum vmfs_trace_flag {
    VMFS_TRACE_WRITE = 1,      /* mem, exit: a store, an `out`; else a load, an `in` */
    VMFS_TRACE_IMPLICIT = 2,   /* mem: by the CPU itself: descriptors, task states, stack frames of events */
    VMFS_TRACE_MORE = 4,       /* mem: the next record is the same access, further on */
    VMFS_TRACE_ERROR_CODE = 8, /* event: `code` is one */
    VMFS_TRACE_NMI = 16,       /* event */
    VMFS_TRACE_SOFTWARE = 32   /* event: INT n, INT3, INTO */
};

/*
 * What the file trace.bin is made of: 32 bytes, little-endian. Addresses are linear. An instruction's number is how many
 * the CPU had executed before it. A MEM record is an access of the last instruction of the INSN record before it, or of
 * the AT record's, whichever is nearer; so is an EXIT record. Both are the same CPU's.
 */
struct vmfs_trace {
    uint8_t kind;  /* VMFS_TRACE_ */
    uint8_t flags;
    uint16_t size; /* insn: how many, 1 to 16; mem, exit: bytes (mem: 1 to 16); event: the vector */
    uint32_t code; /* insn: how many times, for a repeated string instruction; event: error; exit: VMFS_EXIT_; cpu: which */
    __extension__ union {
        struct {
            uint64_t number, address; /* of the first */
            uint64_t lengths;         /* bytes of each, in 4 bits, the first in the lowest; 0: not known */
        } insn;
        struct {
            uint64_t address;
            uint8_t value[16];
        } mem;
        struct {
            uint64_t number, address; /* of the instruction: faulting, INT n, or next */
            uint64_t cr2;             /* exception 14 */
        } event;
        struct {
            uint64_t address; /* the port or the guest-physical address */
            uint64_t value;   /* what was written; for shutdown, its code */
            uint64_t rip;     /* as in struct vmfs_exit */
        } exit;
        struct {
            uint64_t events; /* instructions, accesses and so on that are missing here */
        } dropped;
    };
};
typedef char vmfs_assert_trace_is_32_bytes[sizeof(struct vmfs_trace) == 32 ? 1 : -1];

/* An array of negative length does not compile; static_assert is C11's and C++11's under different names. */
typedef char vmfs_assert_exit_is_64_bytes[sizeof(struct vmfs_exit) == 64 ? 1 : -1];
typedef char vmfs_assert_packet_is_4_bytes[sizeof(struct kvm_interrupt) == 4 ? 1 : -1];
#if defined(__x86_64__) || defined(__i386__)
typedef char vmfs_assert_regs[offsetof(struct kvm_regs, rflags) == KVM_REG_RFLAGS ? 1 : -1];
typedef char vmfs_assert_sregs[offsetof(struct kvm_sregs, apic_base) == KVM_SREG_APIC_BASE ? 1 : -1];
#endif

/* ---- A machine -------------------------------------------------------------------------------------- */

/*
 * Makes a machine: mkdir(path), owned by the caller, modes as the umask says. Answers a descriptor of its
 * directory, for openat() and the functions below. EEXIST where there is one already; to use that,
 * open(path, O_RDONLY | O_DIRECTORY). Closing the descriptor leaves the machine; see vmfs_destroy.
 */
static inline int kvm_create(const char *path)
{
    int ctx, saved;

    if (mkdir(path, 0777) < 0)
        return -1;
    ctx = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (ctx < 0) {
        saved = errno;
        rmdir(path);
        errno = saved;
    }
    return ctx;
}

/* Removes a machine, running or not. Files of it that are still open answer ENODEV from then on. */
static inline int vmfs_destroy(const char *path)
{
    return rmdir(path);
}

/* ---- Its files -------------------------------------------------------------------------------------- */

/* At most `size` bytes of the file `name`, from its start. Answers how many. */
static inline ssize_t vmfs_read(int ctx, const char *name, void *data, size_t size)
{
    int fd = openat(ctx, name, O_RDONLY | O_CLOEXEC);
    int saved;
    ssize_t got;

    if (fd < 0)
        return -1;
    got = read(fd, data, size);
    saved = errno;
    close(fd);
    errno = saved;
    return got;
}

/* `size` bytes into the file `name`, from byte `offset`. Answers 0; a write that was cut short is EFBIG. */
static inline int vmfs_put(int ctx, const char *name, const void *data, size_t size, off_t offset)
{
    int fd = openat(ctx, name, O_WRONLY | O_CLOEXEC);
    int saved;
    ssize_t put;

    if (fd < 0)
        return -1;
    put = pwrite(fd, data, size, offset);
    saved = put >= 0 ? EFBIG : errno;
    close(fd);
    if (put >= 0 && (size_t)put == size)
        return 0;
    errno = saved;
    return -1;
}

/* Text into a file: vmfs_write(ctx, "mode", "long"). Why it failed is then what vmfs_error gives. */
static inline int vmfs_write(int ctx, const char *name, const char *text)
{
    return vmfs_put(ctx, name, text, strlen(text), 0);
}

/* The sentence about the last write that failed, in `text`, without its newline. */
static inline int vmfs_error(int ctx, char *text, size_t size)
{
    ssize_t got;

    if (size == 0) {
        errno = EINVAL;
        return -1;
    }
    got = vmfs_read(ctx, "error", text, size - 1);
    if (got < 0)
        return -1;
    if (got > 0 && text[got - 1] == '\n')
        got--;
    text[got] = '\0';
    return 0;
}

/* All RAM as shared memory, and its size in bytes; NULL where it fails. The caller's to munmap(). */
static inline void *vmfs_map(int ctx, size_t *size)
{
    struct stat status;
    void *ram;
    int saved;
    int fd = openat(ctx, "mem", O_RDWR | O_CLOEXEC);

    if (fd < 0)
        return NULL;
    ram = MAP_FAILED;
    if (fstat(fd, &status) == 0)
        ram = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    saved = errno;
    close(fd);
    if (ram == MAP_FAILED) {
        errno = saved;
        return NULL;
    }
    *size = (size_t)status.st_size;
    return ram;
}

/* One of the registers of struct kvm_regs: vmfs_get(ctx, KVM_REG_RAX, &rax). */
static inline int vmfs_get(int ctx, off_t reg, uint64_t *value)
{
    int fd = openat(ctx, "regs", O_RDONLY | O_CLOEXEC);
    int saved;
    ssize_t got;

    if (fd < 0)
        return -1;
    got = pread(fd, value, sizeof *value, reg);
    saved = got >= 0 ? EIO : errno;
    close(fd);
    if (got == (ssize_t)sizeof *value)
        return 0;
    errno = saved;
    return -1;
}

static inline int vmfs_set(int ctx, off_t reg, uint64_t value)
{
    return vmfs_put(ctx, "regs", &value, sizeof value, reg);
}

/* ---- Running it ------------------------------------------------------------------------------------- */

/*
 * Runs the guest until its next exit. `run` is a descriptor of the file vm_run.bin. Answers the reason, which
 * is in `*exit`, too; -1 with EINTR after a signal (nothing is lost, the next run goes on), EBUSY where
 * somebody else runs it, ENODEV once it is removed.
 */
static inline int vmfs_run(int run, struct vmfs_exit *exit)
{
    ssize_t got = pread(run, exit, sizeof *exit, 0);

    if (got == (ssize_t)sizeof *exit)
        return (int)exit->reason;
    if (got >= 0)
        errno = EIO;
    return -1;
}

/* The same, for the machine's directory. To keep vm_run.bin open, and call vmfs_run, is faster. */
static inline int kvm_run(int ctx, struct vmfs_exit *exit)
{
    int run = openat(ctx, "vm_run.bin", O_RDONLY | O_CLOEXEC);
    int saved, reason;

    if (run < 0)
        return -1;
    reason = vmfs_run(run, exit);
    saved = errno;
    close(run);
    errno = saved;
    return reason;
}

/* What the `in` or the load of the last exit returns: all of its bytes (io: size * count, mmio: len). */
static inline int vmfs_answer(int ctx, const void *data, size_t size)
{
    return vmfs_put(ctx, "exit.data", data, size, 0);
}

/* Queues an external interrupt, delivered when the guest can take it. EAGAIN where the queue is full. */
static inline int vmfs_irq(int ctx, unsigned vector)
{
    struct kvm_interrupt packet;

    packet.irq = vector;
    return vmfs_put(ctx, "irq", &packet, sizeof packet, 0);
}

#ifdef __cplusplus
#pragma GCC diagnostic pop
#endif

#endif
