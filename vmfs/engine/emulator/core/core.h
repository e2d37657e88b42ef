/* The emulator core: an x86-64 processor in C with the shape of KVM. This is all of its public interface.
 *
 * Objects: a `struct vm` has guest-physical memory and CPUs; a `struct vcpu` runs. State goes in and out as
 * the structs of the Linux KVM UAPI, byte for byte (linux/kvm.h, asm/kvm.h).
 *
 * Threads: vcpu_run of the CPUs of one VM may be called from different threads; one CPU of a VM executes at a
 * time (they take turns), or all do (vm_set_parallel). vcpu_kick may be called from a signal handler. vcpu_interrupt, vcpu_nmi,
 * vm_irq_line and vm_dirty_log may be called from any thread at any time. All else: while no CPU of the VM runs, or all stand (vm_stop).
 *
 * Functions that can fail return 0 or a negative errno.
 */
#ifndef VMFS_CORE_H
#define VMFS_CORE_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct vm;
struct vcpu;
struct fast_bus; /* bus.h */

/* ---- Machines and memory ------------------------------------------------------------------------------- */

enum { CORE_SLOTS = 512, CORE_VCPUS = 64 };
enum { SLOT_READ_ONLY = 1 };

struct vm *vm_create(void);            /* NULL: no memory */
void vm_destroy(struct vm *vm);        /* and its CPUs; none of them runs */

/* Back [address, address + size) with the host memory at `host`. Multiples of 4096; overlap: -EEXIST.
 * A slot that exists is replaced; size 0 removes it. A store into a read-only slot is an MMIO write exit. */
int vm_map(struct vm *vm, unsigned slot, uint64_t address, void *host, uint64_t size, unsigned flags);
/* What the memory of a slot is: from `offset` on of a file. Slots with the same bytes are aliases: code that is written
 * through one has changed in all at once; unknown to the core, at the next run. */
struct core_backing { uint64_t device, inode, offset; };
void vm_set_backing(struct vm *vm, unsigned slot, const struct core_backing *backing);
/* One bit a page, `bytes` = (pages + 7) / 8: what the guest wrote since the last call. Any thread. */
int vm_dirty_log(struct vm *vm, unsigned slot, uint8_t *bitmap, size_t bytes);
size_t vm_dirty_log_size(struct vm *vm, unsigned slot);

/* Somebody else than the guest has written memory that CPUs may have decoded: before the next instruction of a run, all that
 * they know of it is forgotten. Any thread. Between two runs nobody has to say it; in vcpu_go_on nothing else is noticed. */
void vm_memory_written(struct vm *vm, uint64_t address, uint64_t size);

int vm_create_irqchip(struct vm *vm);  /* before the first CPU */
void vm_irq_line(struct vm *vm, unsigned gsi, bool level);
/* A message as a device writes it (Intel SDM 3A 11.11). */
void vm_signal_msi(struct vm *vm, uint64_t address, uint32_t data);
/* Devices outside of the core, which are asked before an access is an exit; NULL: none. It outlives the machine, or the next call. */
void vm_set_bus(struct vm *vm, struct fast_bus *bus);
void vm_set_a20(struct vm *vm, bool enabled);
/* Tell of reads of RAM below `end` that nobody has written since now, when all of it has a pattern of 4096 bytes: in `unwritten_reads`, and
 * by STOP_UNWRITTEN. NULL: of none. Not while a CPU runs; CPUs then execute in turn. */
int vm_set_fresh(struct vm *vm, const uint8_t *pattern, uint64_t end);
void vm_set_timer_output(struct vm *vm, bool connected); /* whether channel 0 of the 8254 interrupts; the state pit has it */

/* CPUs whose runs overlap execute at the same time, and not in turn: with TIME_HOST, which is the same for all of them. Whether
 * they do now. */
bool vm_set_parallel(struct vm *vm, bool parallel);
/* With time by instructions: a CPU that sleeps does so for as long as the time takes on the host's clock, or until something comes for it;
 * else its time jumps to the next timer. What the guest can tell of it is only when things come. */
void vm_set_paced(struct vm *vm, bool paced);
/* Stops change nothing of what a run does: one that begins at a breakpoint does not hold interrupts back until the instruction there is
 * done, as else. */
void vm_set_repeatable(struct vm *vm, bool repeatable);
/* With time by instructions: so much time passes now, in which nothing is executed. Not while it runs. */
void vm_pass_time(struct vm *vm, uint64_t nanoseconds);
/* From any thread: all CPUs stand between two instructions, and those whose run begins wait, until vm_go. A thread that has
 * what a CPU may wait for in a run (the lock of a bus, Python's) must not call it. */
void vm_stop(struct vm *vm);
void vm_go(struct vm *vm);

/* Time: deterministic (default): the TSC and the timers follow the instructions retired, `tsc_khz` thousands
 * an instruction-millisecond: one instruction is one TSC cycle. Host: they follow CLOCK_MONOTONIC. */
enum core_time { TIME_DETERMINISTIC, TIME_HOST };
void vm_set_time(struct vm *vm, enum core_time mode);
/* Its time stands still while its state is got or set, and then is the host's again. */
void vm_stand(struct vm *vm, bool stands);

/* The host is to be asked when the clock of the state `clock` has come to `when`: the run of a CPU ends between two
 * instructions with EXIT_INTERRUPTED, once; a CPU that halts wakes up for it. It takes the place of the one before. Any thread. */
#define CORE_NEVER UINT64_MAX
void vm_set_deadline(struct vm *vm, uint64_t when);

/* The same at the next nanosecond, a time that the machine has not been at. So when vm_ended_soon says, once, that this has ended a
 * run, nothing has happened at this time yet: a deadline of this time, set before, ends a run at the same place. Any thread. */
void vm_end_soon(struct vm *vm);
bool vm_ended_soon(struct vm *vm);

/* State of a machine: a name of irqchip, pit, clock, time, chips. get returns the size and writes at most `size` bytes. */
long vm_get_state(struct vm *vm, const char *name, void *data, size_t size);
int vm_set_state(struct vm *vm, const char *name, const void *data, size_t size);

/* "time": where the machine's time stands. `clock` is a view of it. Set, time goes on from there, and every timer has as
 * long to go as before. Layouts here are those of saved machines, little-endian; `version` and `size` begin each. */
enum { CORE_TIME_VERSION = 1, CORE_TIME_HOST = 1 /* flag */ };
struct core_time_state {
    uint32_t version, size;
    uint32_t flags, reserved;
    uint64_t now;                /* in ns, which are TSC cycles */
    uint64_t clock;              /* the state `clock` at that time */
    uint64_t lag;                /* how much of the host's time is to be made up for (clock.c) */
    uint64_t deadline;           /* vm_set_deadline's */
};

/* "turns", of vm_run: whose it is, and how many instructions are left of it; and the CPU of the last exit, which passes a
 * breakpoint where it stands. Set back, it is {0, CORE_TURN, 0, 0}. */
struct core_turns { uint32_t cpu, left, stopped, reserved; };

/* "chips": what KVM's structs lack of the interrupt controllers and the 8254: levels of lines, edges that the I/O APIC has
 * delivered, where counters stand. Set it after irqchip and pit. */
enum { CORE_CHIPS_VERSION = 1, CORE_CHIPS_A20_OFF = 1 /* flag: address bit 20 is zero */ };

/* ---- CPUs ------------------------------------------------------------------------------------------------ */

struct vcpu *vcpu_create(struct vm *vm, unsigned index); /* in reset state; NULL: no memory, or index taken */
void vcpu_destroy(struct vcpu *c);

/* State of a CPU: regs, sregs, fpu, xsave, xcrs, msrs, debugregs, events, mp_state, cpuid, lapic, progress. get returns
 * the size of the whole state and writes at most `size` bytes, -ENOENT for a name unknown; set takes it whole:
 * -EINVAL for a length or contents that cannot be, and then nothing changed. */
long vcpu_get_state(struct vcpu *c, const char *name, void *data, size_t size);
int vcpu_set_state(struct vcpu *c, const char *name, const void *data, size_t size);
int vcpu_get_msr(struct vcpu *c, uint32_t index, uint64_t *value);   /* -EINVAL: no such MSR */
int vcpu_set_msr(struct vcpu *c, uint32_t index, uint64_t value);    /* -EINVAL: would be #GP */
/* A general register by its number in instructions, or CORE_IP. To set one ends what a CPU is in the middle of, as `regs` does. */
enum { CORE_IP = 17 };
uint64_t vcpu_get_register(const struct vcpu *c, unsigned number);
void vcpu_set_register(struct vcpu *c, unsigned number, uint64_t value);
uint64_t vcpu_code_address(const struct vcpu *c);    /* the linear address of the next instruction */
unsigned vcpu_alone_length(const struct vcpu *c);    /* bytes of the last instruction that ran alone, as one at a breakpoint does */
/* Memory at a linear address, by the page tables, without side effects. Returns how many bytes there were. */
size_t vcpu_peek(struct vcpu *c, uint64_t linear, void *data, size_t size);
/* The guest-physical address of a linear one by the page tables, without side effects; -EFAULT. */
int vcpu_translate(struct vcpu *c, uint64_t linear, uint64_t *physical);

/* "progress": what a CPU is in the middle of, and what it has done. The other states show the CPU between two instructions;
 * this is what the next run begins with. Set it after all others: setting one of them ends what was begun. A struct
 * core_progress, then `reads` struct core_read, `exits` struct core_waiting, each with its data, padded to 8 bytes, `msrs`
 * struct vcpu_unclaimed_msr, `vectors` bytes, `data` bytes. All zero but for version and size: nothing. */
enum { CORE_PROGRESS_VERSION = 1, CORE_WAITING_MOST = 4096, CORE_PROGRESS_DATA = 1 << 20 /* bytes of all waiting exits */ };
enum core_progress_flag {
    CORE_EXACT = 1,              /* what is marked E below is there; else the other states say it, as KVM has it */
    CORE_RESTART = 2,            /* the instruction at rip runs alone, and nothing comes before it */
    CORE_FED = 4,                /* the read that waits has its bytes: it is no exit any more */
    CORE_PASS = 8, CORE_RESUME = 16, /* a breakpoint at rip does not stop: in any run; in one that goes on */
    CORE_REPEATING = 32,         /* iterations of the string instruction at rip are done */
    CORE_CAUGHT = 64,            /* `caught` has the vectors that have stopped here */
    CORE_ASLEEP = 128,           /* it waits, for so long: `slept` */
    CORE_INJECTED = 256,         /* E: state events shows an injected exception, and no trap that comes next */
};
enum core_read_kind { CORE_READ_NONE, CORE_READ_PORT, CORE_READ_MEMORY };
struct core_progress {
    uint32_t version, size;
    uint64_t instructions, interrupts, exceptions; /* so far */
    uint64_t reserved64;
    uint32_t flags, kind;        /* enum core_progress_flag; of the read that waits, enum core_read_kind */
    uint64_t address;            /* of the read: a port, or guest-physical */
    uint32_t element, count;     /* bytes, how many: `data` bytes in all, as they are to be read */
    uint32_t reads, exits, msrs, vectors, data, reserved;
    uint64_t caught[4];          /* a bit a vector */
    uint64_t slept;              /* ns of the machine's time */
    uint64_t debug_hits;         /* E: guest's data breakpoints that the instruction at rip has hit, as bits of DR6 */
    uint64_t debug_pending, dr6; /* E: of a #DB trap that comes next; DR6 without it */
    uint64_t pdptr[4];           /* E: of PAE paging */
    uint64_t timer_left;         /* E: of the local APIC, ns; UINT64_MAX: it does not run */
    uint32_t apic_errors;        /* E */
    uint8_t apic_events, apic_sipi, sipi, reserved8; /* E */
    uint16_t fcs, fds;           /* E: selectors of the x87's pointers */
    uint32_t reserved32;
};
struct core_read { uint64_t address, value; uint32_t size, reserved; };  /* done by the instruction at rip; value: up to 8 bytes */
struct core_waiting {            /* an exit of an instruction that is done, which the next runs return */
    uint8_t reason;              /* enum exit_reason: io, mmio, debug, error, or one without more */
    uint8_t write, cause, also;  /* also: the stop was reached together with that of the record before */
    uint32_t size, count;
    uint32_t id, vector;
    uint32_t data;               /* bytes that follow: what was written; of an error, its sentence */
    uint64_t rip, address;
};

/* ---- Running --------------------------------------------------------------------------------------------- */

/* The words of exits.py, in its order: EXITS, DEBUG_CAUSES. */
#define CORE_EXITS(X) X(EXIT_IO) X(EXIT_MMIO) X(EXIT_HLT) X(EXIT_DEBUG) X(EXIT_SHUTDOWN) X(EXIT_INTERRUPTED) X(EXIT_LIMIT) X(EXIT_ERROR)
#define CORE_CAUSES(X) X(DEBUG_STEP) X(DEBUG_BREAKPOINT) X(DEBUG_WATCHPOINT) X(DEBUG_IO) X(DEBUG_EXCEPTION) X(DEBUG_MODE) \
    X(DEBUG_CR3) X(DEBUG_INTERRUPT) X(DEBUG_UNWRITTEN) X(DEBUG_UNCLAIMED)
#define CORE_ENUMERATOR(name) name,
enum exit_reason { EXIT_NONE, CORE_EXITS(CORE_ENUMERATOR) };
enum debug_cause { CORE_CAUSES(CORE_ENUMERATOR) };

enum { EXIT_DATA = 4096 };

/* Why a run ended. After a write (`out`, a store) rip is the next instruction; after a read (`in`, a load) it is
 * the instruction itself, and the next run completes it with the bytes of vcpu_exit_data (all ones at first).
 * For `hlt`, the instruction after it. */
struct vcpu_exit {
    enum exit_reason reason;
    uint64_t rip;
    bool write;              /* io, mmio */
    uint32_t size, count;    /* io: bytes an element, elements; mmio: bytes (1 to 8), 1 */
    uint64_t address;        /* io: port; mmio: guest-physical; debug: of the watched access, the port, or
                              * what a page fault was about */
    enum debug_cause cause;  /* debug */
    uint32_t id;             /* debug: of the stop that matched */
    uint32_t vector;         /* debug: exception, interrupt */
    uint64_t access;         /* debug, watchpoint: where the access begins, of `size` bytes; `write` */
    const char *message;     /* error: a sentence */
};

enum { BUDGET_UNLIMITED = -1 };

/* Run until the next exit; with a budget >= 0, EXIT_LIMIT after exactly so many instructions, or when the CPU has slept
 * through a second; the latter with vcpu_set_debug's step, too. */
void vcpu_run(struct vcpu *c, int64_t budget, struct vcpu_exit *exit);
/* The same as a part of the run before: where that did not stop at a breakpoint (or begin there and execute nothing), one
 * at its start stops. Decoded code stays as it is, but for what vm_memory_written names. */
void vcpu_go_on(struct vcpu *c, int64_t budget, struct vcpu_exit *exit);
/* As vcpu_run, and of memory it knows what vcpu_go_on knows. */
void vcpu_run_on(struct vcpu *c, int64_t budget, struct vcpu_exit *exit);
/* Run all CPUs, in turn, in the calling thread: each CORE_TURN instructions, in the order of their indices, without those that
 * halt or wait. A PAUSE ends a turn, and so does HLT. The machine's time goes on with every instruction of any CPU, so what one has
 * seen of it none sees go back. The budget counts the instructions of all. *which: whose exit it is; it has the rest
 * of its turn when it executes next, whatever ends the run, so that the turns do not depend on it. `goes_on`: as of vcpu_go_on,
 * which else it is of all CPUs but the one with the last exit. */
enum { CORE_TURN = 1 << 14 };
void vm_run(struct vm *vm, int64_t budget, bool goes_on, struct vcpu_exit *exit, unsigned *which);
/* End the run at an instruction boundary with EXIT_INTERRUPTED, or the next one at its start. Any thread, or a
 * signal handler. An exit that was on its way comes first; the kick then ends the run after it. */
void vcpu_kick(struct vcpu *c);
void vcpu_clear_kick(struct vcpu *c);
/* During runs, `poll(argument)` is called now and then, and when a signal woke a CPU that halts; true ends the run with
 * EXIT_INTERRUPTED. */
void vcpu_set_poll(struct vcpu *c, bool (*poll)(void *), void *argument);
/* The bytes of the access that made the last exit; *size = its size * count. Writable for reads. */
uint8_t *vcpu_exit_data(struct vcpu *c, size_t *size);
bool vcpu_exits_waiting(struct vcpu *c); /* of an instruction that is done: the next run returns the first */
bool vcpu_reading(struct vcpu *c);     /* the last exit was a read, which the next run completes */
/* An interrupt, exception or trap was delivered since the last instruction that is done. What set its progress has forgotten. */
bool vcpu_took_event(const struct vcpu *c);

enum { INTERRUPT_QUEUE = 64 };
int vcpu_interrupt(struct vcpu *c, uint8_t vector);   /* queue an external interrupt; -EAGAIN: queue full */
unsigned vcpu_interrupts_queued(struct vcpu *c);
unsigned vcpu_queued_vectors(struct vcpu *c, uint8_t vectors[INTERRUPT_QUEUE]); /* returns how many */
void vcpu_nmi(struct vcpu *c);

/* ---- Debugging: nothing of it is visible to the guest --------------------------------------------------------- */

#define CORE_STOPS(X) X(STOP_BREAKPOINT) X(STOP_WATCH) X(STOP_WATCH_PHYSICAL) X(STOP_IO) X(STOP_VECTOR) X(STOP_CR3) X(STOP_MODE) \
    X(STOP_UNWRITTEN) X(STOP_UNCLAIMED)
enum stop_kind { CORE_STOPS(CORE_ENUMERATOR) STOP_KINDS };
struct vcpu_stop {
    enum stop_kind kind;
    uint32_t id;
    uint64_t address;        /* linear, physical, port or vector; 0 for the others */
    uint32_t length;         /* watch: bytes; port: how many; breakpoint: bytes where an instruction may begin, 0 as 1; else 0 */
    bool on_read, on_write;  /* watch */
};
/* Replaces all stops. The array is copied. */
int vcpu_set_debug(struct vcpu *c, bool step, const struct vcpu_stop *stops, size_t count);
/* With EXIT_DEBUG: the other stops that were reached at the same time. Valid until the next run. */
size_t vcpu_also(const struct vcpu *c, const struct vcpu_exit **others);

/* ---- What the CPU did last: kept always ------------------------------------------------------------------------ */

enum { CORE_FAULTS = 16, CORE_SHUTDOWN = 255 };
enum core_within { CORE_NOT_WITHIN, CORE_WITHIN_EXCEPTION, CORE_WITHIN_INTERRUPT, CORE_WITHIN_SOFTWARE };
/* A fault that was raised. `becomes`: the vector that is delivered for it, #DF perhaps; CORE_SHUTDOWN: none. `within`: raised
 * by the delivery of `delivering`. Registers as it found them; cr2 is that of before it. */
struct core_fault {
    uint8_t vector, has_error, becomes, within, delivering, cpl;
    uint16_t cs, ss;
    uint32_t error;
    uint64_t address;        /* of a page fault */
    uint64_t linear, rip;    /* of the instruction */
    uint64_t rsp, cr2, cr3;
    uint64_t instructions;   /* done before it */
};
size_t vcpu_faults(const struct vcpu *c, struct core_fault faults[CORE_FAULTS]); /* the last ones, the newest at the end */
/* An instruction that was executed. Without `length` its bytes are where it says. */
struct core_step { uint64_t linear, ip; uint8_t bits, length, code[15]; };
/* The last instructions up to where the CPU stands, the newest first: at most `room`, and fewer where it is not certain which
 * came before. Not while it runs. */
size_t vcpu_steps(struct vcpu *c, struct core_step *steps, size_t room);

/* ---- Tracing ------------------------------------------------------------------------------------------------------ */

/* Kinds of records. INSN: a straight run of up to 16 instructions, or a repeated string instruction; AT: where what follows
 * happened, if no INSN says it; DROPPED: so many are missing. EXIT is never made here. */
enum core_trace_kind {
    CORE_TRACE_INSN = 1, CORE_TRACE_MEM, CORE_TRACE_EXCEPTION, CORE_TRACE_INTERRUPT, CORE_TRACE_EXIT, CORE_TRACE_AT,
    CORE_TRACE_DROPPED,
};
enum { /* flags */
    CORE_TRACE_WRITE = 1, CORE_TRACE_IMPLICIT = 2 /* by the CPU itself: tables, stack frames of events */,
    CORE_TRACE_MORE = 4 /* the access goes on in the next record */, CORE_TRACE_ERROR_CODE = 8, CORE_TRACE_NMI = 16,
    CORE_TRACE_SOFTWARE = 32 /* INT n */,
};
/* Of 32 bytes, little-endian: struct vmfs_trace of vmfs.h, where it is documented. */
struct core_trace_record {
    uint8_t kind, flags;
    uint16_t size;
    uint32_t code;
    union {
        struct { uint64_t number, address, lengths; } insn;
        struct { uint64_t address; uint8_t value[16]; } mem;
    };
};
enum { CORE_TRACE_USER = 1, CORE_TRACE_KERNEL = 2, CORE_TRACE_REAL = 4, CORE_TRACE_PROTECTED = 8, CORE_TRACE_LONG = 16 };
struct core_trace {
    uint32_t kinds;             /* 1 << CORE_TRACE_INSN, _MEM, _EXCEPTION, _INTERRUPT */
    uint32_t modes;             /* in which CPL and mode: CORE_TRACE_USER ... */
    uint64_t first, last;       /* linear addresses of the instructions that do it */
    uint64_t data_first, data_last; /* of memory accesses: linear addresses */
};
/* Called in the thread of vcpu_run, between two instructions: when the buffer is nearly full, at the end of the run, and at
 * times in between. It may take its time, and must not call functions of this CPU but vcpu_kick. `events`: how many
 * instructions, accesses, exceptions and interrupts the records are. `ended`: the run has. */
typedef void core_trace_deliver(void *argument, const struct core_trace_record *records, size_t count, uint64_t events,
                                bool ended);
/* What the CPU does from now on; NULL or no kinds: nothing. Not while it runs. Records not yet delivered are lost when it is
 * switched off (there are none after a run). -ENOMEM. */
int vcpu_set_trace(struct vcpu *c, const struct core_trace *want, core_trace_deliver *deliver, void *argument);

/* ---- Rest ------------------------------------------------------------------------------------------------------- */

/* The machine has not run for long: give back what only makes runs faster, decoded and translated code. Not while it runs.
 * A CPU that sleeps within a run does so by itself. */
void vm_rest(struct vm *vm);

/* With VMFS_JIT_DUMP=FOLDER in the environment, host code that is made from now on in this process is named for perf, in a new folder
 * there. A machine's first CPU does so, too; a process that may open no files later has to do it before. A negative errno: it
 * could not be made. */
int core_open_jitdump(void);

/* ---- Counters -------------------------------------------------------------------------------------------------- */

struct vcpu_counters {
    uint64_t instructions, blocks_decoded, blocks_killed, tlb_misses, interrupts, exceptions, unwritten_reads;
    uint64_t instructions_translated, regions, regions_killed, code_bytes, translating_ns; /* of the translator */
};
/* `code_bytes` is what there is of host code just now, the others count. */
void vcpu_get_counters(struct vcpu *c, struct vcpu_counters *counters);

/* MSRs that the guest has used and that there are not, the one last used at the end. Not while the CPU runs. */
enum { UNCLAIMED_MSRS = 64 };
struct vcpu_unclaimed_msr { uint32_t index; uint64_t reads, writes, rip; /* of the last time */ };
size_t vcpu_unclaimed_msrs(const struct vcpu *c, const struct vcpu_unclaimed_msr **msrs);

/* ---- The instruction table, for tests, tracing and documentation ------------------------------------------------- */

struct core_instruction {
    const char *name;        /* mnemonic */
    const char *map;         /* "", "0F", "0F38", "0F3A" */
    uint8_t opcode;
    const char *prefix;      /* "any", "none", "66", "F3", "F2", "no-rep" */
    const char *length, *w;  /* VEX: "L0", "L1", "LX" (both), "LIG"; "W0", "W1", "WX" (ignored, or the size). "": not VEX */
    int digit;               /* /digit, or -1 */
    const char *mod;         /* "rm", "reg", "mem", "reg0".."reg7": register form with exactly that rm field */
    const char *operands[4]; /* SDM letters: "Eb", "Gv", ...; "" after the last */
    const char *size;        /* B W D Q: fixed; V: 16/32/64; Y: 32/64; S: stack; N: near branch */
    const char *handler;     /* "": none; the row is refused */
    const char *feature;     /* CPUID feature it needs: "BASE", "CMOV", ... */
    uint32_t attributes;     /* enum attribute of opcodes.h */
    uint16_t flags_read, flags_written, flags_undefined;
};
/* Row `index`; false after the last. */
bool core_instruction(unsigned index, struct core_instruction *row);
const char *core_attribute_name(unsigned bit);        /* NULL after the last */

#endif
