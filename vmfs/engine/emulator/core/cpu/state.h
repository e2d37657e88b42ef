/* The state of a CPU, and what every part of the core shares: records, blocks, escapes. */
#ifndef VMFS_STATE_H
#define VMFS_STATE_H

#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <string.h>

#include "core.h"


#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#ifdef VMFS_NO_INLINE                   /* compiled in a third of the time, for a guest that runs for seconds: make demo */
#define ALWAYS_INLINE static __attribute__((unused))
#else
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#endif
#define COLD __attribute__((noinline, cold))

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;
typedef int32_t i32;

/* ---- Registers by number --------------------------------------------------------------------------------- */

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
/* After the sixteen: a slot that is always zero, for addresses without base or index, and the instruction
 * pointer at the start of the running block, for RIP-relative addresses. */
enum { GPR_ZERO = 16, GPR_IP = 17, GPR_COUNT = 18 };

enum { SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS, SEG_LDTR, SEG_TR, SEG_COUNT };

enum {
    FLAG_CF = 1 << 0, FLAG_PF = 1 << 2, FLAG_AF = 1 << 4, FLAG_ZF = 1 << 6, FLAG_SF = 1 << 7, FLAG_TF = 1 << 8,
    FLAG_IF = 1 << 9, FLAG_DF = 1 << 10, FLAG_OF = 1 << 11, FLAG_IOPL = 3 << 12, FLAG_NT = 1 << 14,
    FLAG_RF = 1 << 16, FLAG_VM = 1 << 17, FLAG_AC = 1 << 18, FLAG_VIF = 1 << 19, FLAG_VIP = 1 << 20,
    FLAG_ID = 1 << 21,
    FLAGS_ARITHMETIC = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF,
};
enum {
    CR0_PE = 1 << 0, CR0_MP = 1 << 1, CR0_EM = 1 << 2, CR0_TS = 1 << 3, CR0_ET = 1 << 4, CR0_NE = 1 << 5,
    CR0_WP = 1 << 16, CR0_AM = 1 << 18, CR0_NW = 1 << 29, CR0_CD = 1 << 30,
};
#define CR0_PG (1u << 31)
enum {
    CR4_VME = 1 << 0, CR4_PVI = 1 << 1, CR4_TSD = 1 << 2, CR4_DE = 1 << 3, CR4_PSE = 1 << 4, CR4_PAE = 1 << 5,
    CR4_MCE = 1 << 6, CR4_PGE = 1 << 7, CR4_PCE = 1 << 8, CR4_OSFXSR = 1 << 9, CR4_OSXMMEXCPT = 1 << 10,
    CR4_UMIP = 1 << 11, CR4_LA57 = 1 << 12, CR4_FSGSBASE = 1 << 16, CR4_PCIDE = 1 << 17, CR4_OSXSAVE = 1 << 18,
    CR4_SMEP = 1 << 20, CR4_SMAP = 1 << 21, CR4_PKE = 1 << 22,
};
enum { DEBUGCTL_BTF = 1 << 1 };
enum { DR6_BD = 1 << 13, DR6_BS = 1 << 14, DR6_BT = 1 << 15, DR7_GD = 1 << 13 };
enum { EFER_SCE = 1 << 0, EFER_LME = 1 << 8, EFER_LMA = 1 << 10, EFER_NXE = 1 << 11 };

enum {
    VECTOR_DE, VECTOR_DB, VECTOR_NMI, VECTOR_BP, VECTOR_OF, VECTOR_BR, VECTOR_UD, VECTOR_NM, VECTOR_DF,
    VECTOR_TS = 10, VECTOR_NP, VECTOR_SS, VECTOR_GP, VECTOR_PF, VECTOR_MF = 16, VECTOR_AC, VECTOR_MC, VECTOR_XM,
};

/* Attributes of a segment, as in the high half of its descriptor from bit 8 on (Intel SDM 3A 3.4.5). */
enum {
    ATTR_TYPE = 15, ATTR_ACCESSED = 1, ATTR_WRITABLE = 2, /* data */ ATTR_READABLE = 2, /* code */
    ATTR_EXPAND_DOWN = 4, /* data */ ATTR_CONFORMING = 4, /* code */ ATTR_CODE = 8, ATTR_S = 1 << 4,
    ATTR_DPL_SHIFT = 5, ATTR_P = 1 << 7, ATTR_AVL = 1 << 12, ATTR_L = 1 << 13, ATTR_DB = 1 << 14, ATTR_G = 1 << 15,
    ATTR_UNUSABLE = 1 << 16,
};
struct segment {
    u64 base;
    u32 limit;      /* bytes, granularity applied */
    u32 attributes;
    u16 selector;
};
struct table_register { u64 base; u16 limit; };

/* What an access through a segment checks, derived from the segment and the mode (segment_changed). */
struct segment_check {
    u64 base;        /* 0 for ES CS SS DS in 64-bit mode */
    u64 low, high;   /* the first and last valid offset */
    u32 access;      /* ACCESS_READ, ACCESS_WRITE */
};
enum { ACCESS_READ = 1, ACCESS_WRITE = 2, ACCESS_EXECUTE = 4, ACCESS_SUPERVISOR = 8 /* implicit, e.g. a GDT read */ };

/* ---- Decoded instructions ---------------------------------------------------------------------------------- */

struct record;
typedef void handler(struct vcpu *c, const struct record *r);

/* A decoded instruction; 32 bytes, which nothing changes after the decoder. General registers are byte offsets into
 * `gpr`: 8 times the number, plus 1 for AH, CH, DH, BH; other registers (segment, control, x87, MMX, XMM) are numbers. */
struct record {
    handler *run;
    i64 disp;                 /* of the memory operand (RIP-relative: from the start of the block), or a 64-bit
                                 immediate, or the offset of a far pointer */
    i32 imm;                  /* immediate, sign-extended; selector of a far pointer; a branch's displacement */
    u8 reg;                   /* ModRM.reg or the register in the opcode */
    union { u8 rm, base; };   /* ModRM.rm as a register; base of the address */
    u8 index, scale;
    u8 seg : 3;               /* of the memory operand */
    u8 has_link : 1;          /* a direct jump: a struct link follows */
    u8 vector : 4;            /* log2 of the vector length in bytes: 4, or 5 with VEX.L */
    u8 length : 4;            /* bytes */
    u8 vvvv : 4;              /* VEX: the register in vvvv, as a number */
    u8 at;                    /* offset in the block */
    u8 left;                  /* instructions after it in the block */
    u8 size;                  /* operand size: log2 of bytes */
    u8 prefix;                /* PREFIX_* */
    u16 id;                   /* row in the instruction table */
};
_Static_assert(sizeof(struct record) == 32, "two records a cache line");

/* What the cache knows of a direct jump: it lies in the place of a record, after that of the jump. It holds while the code
 * map (below) has `id` at `at`. */
struct link {
    struct block *to;         /* where it goes, or NULL */
    struct link *next, **before; /* of those that go there */
    u32 id;                   /* 0: it does not hold */
    u32 at;
};
#define LINK_OF(r) ((struct link *)((struct record *)(r) + 1))
_Static_assert(sizeof(struct link) == 32, "a link takes the place of a record");

enum {
    PREFIX_ADDRESS = 3,       /* log2 of the address size in bytes: 1, 2, 3 */
    PREFIX_REP = 4, PREFIX_REPNE = 8, PREFIX_LOCK = 16, PREFIX_66 = 32, PREFIX_REX_W = 64,
    PREFIX_REGISTER = 128,    /* the ModRM names a register, not memory */
};

ALWAYS_INLINE const struct record *record_after(const struct record *r) { return r + 1 + r->has_link; }

/* BLOCK_SLOTS: room for its records, each with a prologue of the tracer and a link, and for the one that leaves. */
enum { BLOCK_INSTRUCTIONS = 32, BLOCK_SLOTS = 3 * BLOCK_INSTRUCTIONS + 2, BLOCK_BYTES = 240 };

struct region;
struct way;

/* A straight run of instructions; conditional jumps that are not taken stay in it. */
struct block {
    /* What a jump to it looks at, in one cache line. */
    u64 ip;                   /* of its first instruction */
    handler *enter;           /* what it begins with: that of its first record, or the translator's */
    u8 *code;                 /* host code for it, or NULL */
    u32 count;                /* instructions */
    u16 ending;               /* the record that leaves, after all others; then comes its link */
    u8 bytes, first_bytes;    /* all; those on the first page */

    u64 key;                  /* fetch mode (see fetch_key) */
    u64 physical[2];          /* of its first byte; of its second page, if it crosses (else ~0) */
    struct block *bucket_next;
    const u8 *host[2];        /* where its bytes are */
    struct region *region;    /* the code is of */
    struct link *links;       /* that go to it */
    struct way *ways;         /* jumps of host code that go to its */
    u32 entries;              /* that were counted */
    bool dead;
    struct block *page_next[2];
    struct record records[];  /* up to the one that leaves and its link; then a copy of the bytes */
};
_Static_assert(sizeof(struct block) % 32 == 0, "records do not cross cache lines");

/* Bits of the fetch key: everything that decides how bytes decode, so that handlers need not check it. */
enum {
    KEY_CODE32 = 1, KEY_CODE64 = 2, KEY_STACK32 = 4, KEY_PROTECTED = 8 /* CR0.PE and not VM */, KEY_CPL0 = 16,
    KEY_EM = 32, KEY_TS = 64, KEY_MP = 128, KEY_OSFXSR = 256, KEY_OSXSAVE = 512, KEY_V86 = 1024,
    KEY_AVX = 2048 /* XCR0 enables it */,
    KEY_TRACED = 4096 /* instructions have a record of op_trace before them (tracer.h) */,
    KEY_UNMASKED = 8192       /* an exception of MXCSR is (mxcsr.c): host code looks at none */,
    KEY_FLAT = 16384          /* 32-bit protected mode, and CS SS DS ES are all of the address space, and writable data */,
    KEY_SHARED = 32768,       /* other CPUs execute at the same time: what LOCK and fences say is the host's to do */
    KEY_FIXED_TLB = 65536,    /* the TLB's table follows from CPL, and EFLAGS.AC has no part in it */
    KEY_LIMIT_SHIFT = 32,     /* the limit of CS above, 0 in 64-bit mode */
};

/* ---- TLB ------------------------------------------------------------------------------------------------------ */

enum { TLB_SIZE = 1024, TLB_FILLED = 1024, TLB_LOOKS = 64 };
#define PAGE_MASK (~(u64)0xfff)
/* The address of a page that is never at that place of a table, and neither is the page before it: page 0, but at the first place
 * and at the last one. So a table that is all zeros is empty but for those, and is given memory as it is filled. */
#define TLB_INVALID(at) ((u64)((((at) + 1) & (TLB_SIZE - 2)) ? 0 : TLB_SIZE / 2) << 12)
/* Each place has a second: two pages of one index that a loop needs stay. It is looked at out of line, after the first (mmu_translate,
 * translate/accesses.c), and then the two change. Which of them another page displaces does not follow from where they are, but from when
 * they were filled, so that what the TLB holds is the same however the code is executed. */
struct tlb_entry {
    u64 page;                 /* the linear page address where the fast path may, TLB_INVALID where not */
    u64 host;                 /* where the page is */
};
/* Reads, writes and fetches have entries of their own, so that a copy between pages of one index does not thrash. */
enum tlb_kind { TLB_READ, TLB_WRITE, TLB_EXECUTE, TLB_KINDS };
/* Host address - linear address: a longer way for host code, but a shorter one to wait for. */
struct tlb_distance { u64 distance, unused; };
struct tlb {
    struct tlb_entry read[TLB_SIZE], write[TLB_SIZE], execute[TLB_SIZE];
    struct tlb_distance distances[2][TLB_SIZE]; /* of reads, of writes */
    u64 physical[TLB_KINDS][TLB_SIZE]; /* guest-physical pages, and TLB_GLOBAL */
    struct tlb_entry second[TLB_KINDS][TLB_SIZE];
    u64 second_physical[TLB_KINDS][TLB_SIZE];
    u8 second_newer[TLB_KINDS + 1 /* for the size */][TLB_SIZE]; /* the second was filled after the first */
};
_Static_assert(sizeof(struct tlb) % 4096 == 0, "entries of two tables lie alike in their pages");
enum { STRETCH_SLOTS = 8 };
enum { TLB_GLOBAL = 1 };      /* MOV to CR3 leaves it (Intel SDM 3A 4.10.2.4) */
/* Entries that were filled since they were last dropped: (table * TLB_KINDS + kind) << 10 | index. */
struct filled { u16 at[TLB_FILLED]; unsigned count; /* more than TLB_FILLED: look at all */ };

/* Which table the CPU uses: SUPERVISOR_AC is CPL < 3 with EFLAGS.AC set while CR4.SMAP is. NONE is never filled:
 * every access takes the slow path (alignment checks). */
enum { TLB_USER, TLB_SUPERVISOR, TLB_SUPERVISOR_AC, TLB_NONE, TLB_TABLES };

/* Where code is just now: a number for each page that was fetched from since its translation was dropped. Another number means
 * another physical page, another key or another base of CS; the same mapping gets the same number again. So links survive a
 * change of the address space, and one comparison tells whether one holds. Kernel and users have maps of their own. */
enum { CODE_PAGES = 1024, SAME_PAGE = CODE_PAGES /* where `ids` has 1 for good: a jump within a page */ };
#define NO_CODE (~0u)         /* no page; a link that does not hold has 0 */
enum { LOCAL_PAGES = 64 };
struct code_map {
    u32 ids[CODE_PAGES + 1];
    u16 local[LOCAL_PAGES];   /* where pages are that are not global */
    unsigned local_count;     /* more than LOCAL_PAGES: it may be any */
    u64 key, base;            /* ids are of this mode and base */
    u8 cpl;
};

/* Where an indirect jump went. It holds as a link does. */
struct jump_entry { u64 ip; struct block *block; u32 id, at; u64 unused; };
enum { JUMP_CACHE = 8192 };

/* ---- The CPU ------------------------------------------------------------------------------------------------------- */

union vector { u8 b[32]; u16 w[16]; u32 d[8]; u64 q[4]; float f[8]; double e[4]; };

/* x87 and MMX: physical registers in 80-bit form (Intel SDM 1 8.1). mm[n] is the mantissa of physical register n. */
struct x87_register { u64 mantissa; u16 exponent; u16 pad[3]; };

enum attention { /* reasons to leave the blocks; bits of vcpu.attention, set by any thread */
    ATTENTION_KICK = 1, ATTENTION_INTERRUPT = 2, ATTENTION_NMI = 4, ATTENTION_FLUSH = 8, ATTENTION_LINES = 16,
    ATTENTION_TRACE = 32, ATTENTION_WRITTEN = 64, ATTENTION_SHARE = 128 /* of the memory of host code */, ATTENTION_STAND = 256,
};
enum escape { /* how a handler is left without finishing; argument of longjmp */
    ESCAPE_FAULT = 1, /* c->fault is to be delivered */
    ESCAPE_ALONE,     /* execute this instruction again, alone (a store with consequences) */
    ESCAPE_EXIT,      /* c->exit is ready; the instruction is not done and restarts at the next run */
    ESCAPE_FREEZE,    /* wait for an interrupt before the instruction, as HLT does after it */
};

struct mmio_access { u64 address; u32 size; bool write; u64 data; };
enum { MMIO_PIECES = 128 };

/* Where a CPU is, of several that execute at the same time: somewhere else, or between two instructions; executing; in an
 * instruction, waiting for the others to stand. In turn all are OUT. */
enum world_place { WORLD_OUT, WORLD_IN, WORLD_WAITS };

enum event { EVENT_EXTERNAL, EVENT_EXCEPTION, EVENT_SOFTWARE /* INT n, INT3, INTO */, EVENT_INT1 };
struct fault { u8 vector; bool has_error; u32 error; u64 address; };

enum { MC_BANKS = 32 }; /* as many as KVM has */
struct msr_state {
    u64 star, lstar, cstar, fmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip, pat, tsc_aux, apic_base,
        misc_enable, mtrr_def_type, mtrr_fixed[11], mtrr_base[8], mtrr_mask[8], tsc_deadline, tsc_adjust, xss,
        debugctl, platform_id, microcode, platform_info, mtrr_cap, arch_capabilities, misc_features, power_control,
        hardware_configuration, mcg_cap, mcg_status, mc_bank[MC_BANKS][4] /* CTL, STATUS, ADDR, MISC */;
};

/* The room before struct vcpu: the stack of host code, for the frames of signals (with AVX-512 and AMX, 11 KB). */
enum { HOST_STACK = 1 << 16 };

/* What a CPU did last: see recent.c. */
enum { RECENT_PLACES = 64 };
enum place_kind { PLACE_BLOCK, PLACE_ALONE, PLACE_STAND };
enum last_how { LAST_UNKNOWN, LAST_DONE, LAST_NOT_DONE }; /* what a record has to do with it */
struct place_note {
    u64 ip, base, key;        /* where it is; linear: base + ip */
    u64 done;                 /* records_done */
    u64 killed;               /* blocks, until then */
    const struct block *block; /* PLACE_BLOCK: that is entered */
    u64 last_ip;              /* PLACE_STAND: the block of the last record, and where that is in it */
    u8 kind, how, last_at;
};
struct recent {
    u64 iterations;           /* of repeated instructions, but the first of each */
    u64 count, fault_count;   /* so far */
    u64 last_ip;              /* for the next PLACE_STAND */
    u8 last_how, last_at;
    struct place_note places[RECENT_PLACES];
    struct core_fault faults[CORE_FAULTS];
};

struct vcpu {
    /* What every handler touches. */
    u64 gpr[GPR_COUNT];       /* gpr[GPR_IP]: instruction pointer (not linear) at the start of the running block;
                                 exact between blocks */
    u64 zf, sf, carries;      /* the arithmetic flags: see flags.h */
    i64 budget;               /* instructions left in this slice; a block's are subtracted at its entry */
    struct tlb *tlb;          /* where the inline paths look: `map`, or an empty one while accesses are traced */
    struct tlb *map;          /* one of tlbs */
    _Atomic u32 attention;
    struct code_map *code_map; /* one of code_maps */
    u64 key;                  /* fetch mode */
    u64 rflags;               /* all but the arithmetic flags */
    u32 flags_image;          /* host code: the arithmetic flags but OF in the second byte, as RFLAGS has them; OF in bit 0 */
    u8 carry_image, overflow_image; /* host code: CF and OF where they are newer than those there: 0, 1 */
    u64 scratch;
    u64 host_stack;           /* the thread's stack pointer, while host code runs */
    bool continues;           /* the handler that host code called did not leave */
    bool translated;          /* host code runs, */
    u64 translated_from;      /* ... since so many instructions were retired */
    const struct record *now; /* the record that is executing, where it may fault; NULL: gpr[GPR_IP] is exact */
#ifdef VMFS_TRAMPOLINE
    const struct record *next; /* where `run_records` goes on; NULL: back to the main loop */
    handler *next_run;        /* ... by what */
#endif
    u64 linear_mask;          /* of linear addresses: 32 bits outside of long mode */
    u64 stack_mask;           /* of rSP: 16, 32 or 64 bits */
    struct segment_check check[6];
    union vector xmm[16] __attribute__((aligned(64))); /* the whole YMM registers */
    u32 mxcsr;
    u8 cpl, physical_bits;    /* physical_bits: MAXPHYADDR, from CPUID */
    bool alone;               /* one instruction is executing outside of a block */
    bool shadow_sti, shadow_ss; /* the instruction before was STI / a load of SS */
    bool began_sti, began_ss; /* ... when the instruction began that is executing alone */

    /* x87 */
    struct x87_register fpr[8]; /* physical, not relative to TOP */
    u16 fcw, fsw, ftw;        /* ftw: full tag word is derived; here a bit a physical register, 1 = not empty */
    u16 fop, fcs, fds;
    u64 fip, fdp;
    u8 x87_place;             /* where fsw, ftw and fpr are just now: enum x87_place in x87.h */
    bool x87_borrowed;        /* the host's x87 has something of this CPU's */
    u16 x87_host_control;     /* the host's own control word meanwhile */
    u8 x87_scratch[16];

    struct segment seg[SEG_COUNT];
    struct table_register gdt, idt;
    u64 cr0, cr2, cr3, cr4, cr8, efer, xcr0;
    u32 pkru;
    u64 dr[4], dr6, dr7;
    u64 pdptr[4];             /* PAE page directory pointers, loaded with CR3 (Intel SDM 3A 4.4.1) */
    struct msr_state msr;

    /* Events */
    struct fault fault;       /* being raised */
    bool nmi_pending, nmi_masked, halted;
    u32 mp_state;             /* KVM_MP_STATE_* */
    struct vcpu_unclaimed_msr unclaimed_msrs[UNCLAIMED_MSRS];
    unsigned unclaimed_msr_count;
    bool asleep;              /* it waits in chip_wait, since: */
    u64 asleep_since, asleep_since_host; /* in the machine's time, in the host's */
    u8 sipi_vector;
    u8 queue[INTERRUPT_QUEUE];
    _Atomic u32 queue_head, queue_tail;
    u64 debug_hits;           /* DR6 bits of data breakpoints hit by the running instruction */

    /* Exits */
    jmp_buf escape;
    struct vcpu_exit exit;    /* ready when exit.reason is set */
    u8 data[EXIT_DATA + 8];   /* of the last access */
    size_t data_size;
    bool reading;             /* the last exit was a read, whose data completes it */
    struct mmio_access asked;                 /* the read of the last exit */
    struct mmio_access done_reads[MMIO_PIECES]; /* of the running instruction: what its reads got so far */
    struct mmio_access stores[MMIO_PIECES];   /* done, to be reported as exits when it has ended */
    unsigned reads, reads_used, store_count, stores_reported;
    u64 stores_rip;           /* after the instruction that made them */
    bool completing;          /* a run began with the bytes of a read; its instruction is not done yet */
    struct vcpu_exit held;    /* a stop that came with another exit; the next run returns it */
    /* Exits of an instruction that is done, struct core_waiting with their data: from another machine, or those that came
     * while state was set. The next runs return them, before all others. */
    u8 *waiting;
    size_t waiting_at, waiting_size;
    char waiting_message[128]; /* of an error that was one of them */
    bool (*poll)(void *);     /* vcpu_set_poll */
    void *poll_argument;
    u64 polled_at;
    /* Events that state brought half delivered (struct kvm_vcpu_events): they go first. */
    struct { bool exception, has_error, interrupt, soft, nmi; u8 vector, interrupt_vector; u32 error; } injected;
    bool restart;             /* the instruction at rip is to run alone: a read completes, or a store has consequences */
    bool input_ready;         /* an IN (or INS) that exited finds its bytes in `data`, */
    u32 input_at, input_size; /* ... from here on, up to here: those of one exit may be for several iterations */
    bool reading_memory;      /* ... it was a memory-mapped load, not a port */
    bool at_breakpoint;       /* op_breakpoint ran */
    bool fetching;            /* the instruction at rip is being fetched */
    bool pass_breakpoint;     /* the instruction at rip runs, breakpoint or not */
    bool repeating;           /* the repeated string instruction at rip has done some of its iterations */
    u64 caught_at;            /* instructions retired when events were caught, plus 1 */
    u64 event_at;             /* the same of when an event was delivered last */
    u64 caught[4];            /* ... a bit a vector */
    u64 debug_pending;        /* DR6 bits of a #DB trap to be delivered; it waits while shadow_ss is set */
    bool trap_taken;          /* the running instruction cleared TF and takes no single-step trap (INT n, SYSCALL) */
    u64 yielded_at;

    /* Debugging by the host */
    bool step;
    struct stops {
        struct vcpu_stop *all; /* by kind, then address */
        size_t first[STOP_KINDS + 1]; /* of each kind in `all` */
        u32 longest[STOP_KINDS]; /* the greatest length */
        bool *reached;        /* whether each of `all` is in `reached` below */
    } stops;
    struct vcpu_exit *reached; /* by the running instruction or event, then the exit; `count` is the index in stops.all */
    size_t reached_count;
    bool resume_breakpoint;   /* the next instruction does not stop: it is where a run begins */

    /* Time */
    u64 retired;              /* instructions before this slice */
    i64 slice;                /* budget at the start of the slice */
    i64 saved_budget;         /* of the slice, while an instruction runs alone */
    i64 run_budget;           /* instructions left in this run */
    bool run_limited;
    int delivering;           /* the vector being delivered, or -1 */
    enum event delivering_kind;
    bool delivering_has_error;
    u32 delivering_error;
    u64 tsc_offset;

    u64 skew;                 /* deterministic time of the machine - instructions retired */
    unsigned known_mode;      /* at the last look: real, protected, long */
    _Atomic bool in_run, sleeping; /* in vcpu_run; waiting there for `attention` */
    bool bounded;             /* the run is, by instructions */
    bool entered;             /* vm_run: it has executed in this run */
    bool turn_over;           /* vm_run: it gives the rest of its turn away */
    _Atomic u8 world;         /* enum world_place */
    bool has_world;           /* all others stand for it */
    _Atomic bool deaf;        /* it sleeps, and only an NMI, an INIT or a SIPI wakes it: for others to see */
    u32 pauses;

    struct tracer *tracer;    /* NULL: nothing is traced */

    /* Caches */
    u64 large_low, large_high; /* the linear addresses of large pages that the TLB has parts of lie between them */
    struct tlb tlbs[TLB_TABLES];
    unsigned tables;          /* those of them that were used (tlb_select) */
    struct { u64 page, physical; const struct tlb *map; } watched[TLB_KINDS]; /* the last page with a watched byte */
    struct filled filled[2];  /* by whether they are global */
    struct jump_entry jumps[JUMP_CACHE];
    struct code_map code_maps[2]; /* of CPL 0, of the others */
    struct cache *cache;
    struct translator *translator; /* NULL: all is interpreted */
    struct record single[4];  /* an instruction that runs alone: with a prologue of the tracer, a link, and its end */
    u32 epoch;                /* pages of code are compared with what was decoded, once in each */
    struct vcpu_counters counters;

    struct cpuid_state {
        struct kvm_cpuid_entry2 entries[256]; /* as many as KVM takes */
        unsigned count;
    } cpuid;
    u64 features[4];          /* bits by enum feature, from cpuid */
    struct lapic *lapic;

    struct recent recent;

    struct vm *vm;
    unsigned index;
    _Atomic u32 moves;        /* of entries between their places, begun and done: odd while one is in none */
    u32 looks;                /* host code: how many more times it may find a page in its second place (mmu_translate) */
    u64 stretches[STRETCH_SLOTS]; /* host code: where accesses with one check go (translate/emit.h) */
};

struct slot {
    u64 address, size;
    u8 *host;
    unsigned flags;
    _Atomic u64 *dirty;       /* a bit a page */
    u32 *lines;               /* a bit for each 128 bytes of a page that hold decoded code, also through an alias */
    bool backed;
    struct core_backing backing;
};

enum { WRITTEN = 32 };

struct vm {
    struct slot slots[CORE_SLOTS];
    struct slot *sorted[CORE_SLOTS];
    struct slot *last_slot;   /* that vm_find_slot found last, or NULL */
    unsigned slot_count;
    unsigned slot_end;        /* no slot from here on was ever used: they are not touched, so that they cost no memory */
    bool aliased;             /* two slots have bytes in common */
    struct vcpu *vcpus[CORE_VCPUS];
    unsigned vcpu_count;
    u64 a20_mask;
    struct fresh *fresh;      /* RAM that nobody has written; NULL: nobody is told. fresh.c */
    enum core_time time;
    u64 now;                  /* when the last run ended, in TSC cycles: nanoseconds */
    bool repeatable;          /* breakpoints change nothing of what is done (vm_set_repeatable) */
    bool paced;               /* TIME_DETERMINISTIC: CPUs sleep for as long as the host's clock takes (vm_set_paced) */
    u64 host_origin;          /* TIME_HOST: CLOCK_MONOTONIC when `now` was 0 */
    _Atomic u64 still;        /* CLOCK_MONOTONIC as it was when the machine's time was made to stand; 0: it goes on */
    u64 lag;                  /* TIME_HOST: by how much host_origin is too late; clock.c */
    u64 run_began, last_seen; /* TIME_HOST: when the run began; what a CPU last saw of the time */
    i64 clock_offset;         /* of the `clock` state to `now` */
    _Atomic u64 deadline;     /* vm_set_deadline, of the `clock` state */
    _Atomic u64 soon;         /* vm_end_soon: the time at which a run ends; 0: it was asked for; CORE_NEVER: it was not */
    _Atomic bool ended_soon;  /* vm_ended_soon */
    pthread_mutex_t lock;
    pthread_cond_t turn;      /* CPUs execute in turn: by ticket */
    u64 ticket, serving;
    _Atomic u32 waiting;
    bool parallel;            /* vm_set_parallel: vcpu_run of several CPUs at the same time; else one waits for the other's turn */
    _Atomic u32 stops;        /* how many want that CPUs stand: world.c */
    _Atomic bool stopped_for_one; /* one of them has it */
    pthread_mutex_t chips;    /* of `irqchip`, while CPUs execute at the same time */
    bool in_turn;             /* in vm_run, of which this is the CPU whose turn it is: */
    unsigned turn_of;
    i64 turn_left;            /* instructions */
    unsigned stopped;         /* the CPU of the last exit */
    _Atomic(struct vcpu *) sleeper; /* in vm_run: it sleeps for all */
    struct irqchip *irqchip;  /* NULL: none */
    struct fast_bus *bus;     /* NULL: none */
    struct code_memory *code; /* of the translators; NULL: none */
    pthread_mutex_t lines_lock;
    struct line_change { bool is_msi, level; u32 gsi_or_data; u64 address; } *line_queue; /* for the CPU that runs to apply */
    size_t line_count, line_room;
    struct range { u64 address, size; } written[WRITTEN]; /* by others, where code may be; under lines_lock, too */
    unsigned written_count;   /* more than WRITTEN: anywhere */
};

/* ---- Register access, for handlers ------------------------------------------------------------------------------ */

#define GPR_AT(c, offset) ((u8 *)(c)->gpr + (offset))
#define R8(c, offset) (*(u8 *)GPR_AT(c, offset))
#define R16(c, offset) (*(u16 *)GPR_AT(c, offset))
#define R32(c, offset) (*(u32 *)GPR_AT(c, offset)) /* reading only: a write clears the high half, use set_reg */
#define R64(c, offset) (*(u64 *)GPR_AT(c, offset))

ALWAYS_INLINE u64 get_reg(const struct vcpu *c, unsigned offset, unsigned bits)
{
    return bits == 8 ? R8(c, offset) : bits == 16 ? R16(c, offset) : bits == 32 ? R32(c, offset) : R64(c, offset);
}

/* A 32-bit write clears the high half, narrower ones keep it (Intel SDM 1 3.4.1.1). */
ALWAYS_INLINE void set_reg(struct vcpu *c, unsigned offset, unsigned bits, u64 value)
{
    if (bits == 8)
        R8(c, offset) = (u8)value;
    else if (bits == 16)
        R16(c, offset) = (u16)value;
    else if (bits == 32)
        R64(c, offset) = (u32)value;
    else
        R64(c, offset) = value;
}

ALWAYS_INLINE u64 truncate_to(u64 value, unsigned bits) { return bits == 64 ? value : value & ((1ull << bits) - 1); }
ALWAYS_INLINE i64 sign_extend(u64 value, unsigned bits) { return (i64)(value << (64 - bits)) >> (64 - bits); }

/* ---- Leaving a handler --------------------------------------------------------------------------------------------- */

#define OP(name) static void name(struct vcpu *c, const struct record *r)
/* The end of a handler: on to the record `to`. This is a jump, because the call is the last thing that the handler does. With
 * sanitizers it would be a call, and a long run would fill the stack: they put code of their own after it. Then a handler
 * hands the record back to `run_records`, which has a loop (setup.py defines VMFS_TRAMPOLINE). */
#ifdef VMFS_TRAMPOLINE
#define CONTINUE_BY(c, handler, to) do { (c)->next_run = (handler); (c)->next = (to); return; } while (0)
#else
#define CONTINUE_BY(c, handler, to) do { (handler)((c), (to)); return; } while (0)
#endif
#define CONTINUE(c, to) do { const struct record *to_ = (to); CONTINUE_BY(c, to_->run, to_); } while (0)
#define NEXT() CONTINUE(c, r + 1)
/* The end of a direct jump that is not taken: over its link. */
#define NEXT_OVER_LINK() CONTINUE(c, r + 2)

/* Run from `r` on, which begins with `run`, until a handler goes back to the main loop. */
ALWAYS_INLINE void run_records(struct vcpu *c, handler *run, const struct record *r)
{
#ifdef VMFS_TRAMPOLINE
    do {
        c->next = NULL;
        run(c, r);
        r = c->next;
        run = c->next_run;
    } while (r);
#else
    run(c, r);
#endif
}

/* Raise an exception at instruction r. Nothing of it may have been committed. Does not return. */
_Noreturn COLD void raise_fault(struct vcpu *c, const struct record *r, unsigned vector);
_Noreturn COLD void raise_error(struct vcpu *c, const struct record *r, unsigned vector, u32 error);
_Noreturn COLD void raise_page_fault(struct vcpu *c, const struct record *r, u64 linear, u32 error);
/* The same for code deep in helpers, where c->now is set. */
#define raise_gp(c, error) raise_error(c, (c)->now, VECTOR_GP, error)
_Noreturn COLD void escape(struct vcpu *c, enum escape how);

/* The instruction pointer of r, and of the instruction after it. */
ALWAYS_INLINE u64 ip_of(const struct vcpu *c, const struct record *r) { return c->gpr[GPR_IP] + r->at; }
/* An instruction pointer that went on by itself: EIP has 32 bits in 16-bit code, too, and only branches and returns of
 * operand size 16 cut it (Intel SDM 2A, JMP; relative_target). */
ALWAYS_INLINE u64 ip_mask(const struct vcpu *c, u64 ip) { return c->key & KEY_CODE64 ? ip : (u32)ip; }
/* The linear address of code: 64-bit mode takes no base (3A 3.2.4). */
ALWAYS_INLINE u64 code_linear(const struct vcpu *c, u64 ip)
{
    return c->key & KEY_CODE64 ? ip : (u32)(c->seg[SEG_CS].base + ip);
}
u64 next_ip(const struct vcpu *c, const struct record *r);

/* End the block after r, which is done, and go back to the main loop, which looks at everything again (interrupts,
 * mode, exits). Use as the end of a handler: `leave(c, r); return;` */
void leave(struct vcpu *c, const struct record *r);
/* The same with another instruction pointer. */
void leave_to(struct vcpu *c, const struct record *r, u64 ip);

/* Instructions retired before r, for time. */
ALWAYS_INLINE u64 retired_at(const struct vcpu *c, const struct record *r)
{
    return c->retired + (u64)(c->slice - c->budget) - r->left - 1;
}
u64 core_now(struct vcpu *c, const struct record *r); /* the time in TSC cycles, before the guest's offset */

/* ---- Between the files ----------------------------------------------------------------------------------------------- */

/* run.c */
bool take_waiting(struct vcpu *c, struct vcpu_exit *exit); /* an exit of what is done */
void run_enter(struct vcpu *c);                      /* a run begins */
void run_slices(struct vcpu *c, int64_t budget, struct vcpu_exit *exit);
bool can_wake(struct vcpu *c);                       /* an event ends HLT */
/* turns.c */
long get_turns(struct vm *vm, void *data, size_t size);
int set_turns(struct vm *vm, const void *data, size_t size);
bool others_execute(const struct vcpu *c);           /* in vm_run: one has something to do */
ALWAYS_INLINE u64 instructions_done(const struct vcpu *c) { return c->retired + (u64)(c->slice - c->budget); }
/* Host code is left, with so many instructions retired. */
ALWAYS_INLINE void end_translated(struct vcpu *c, u64 done)
{
    c->counters.instructions_translated += done - c->translated_from;
    c->translated = false;
}
void leave_io_exit(struct vcpu *c, const struct record *r, bool write, u16 port, unsigned size, u32 count);
void request_attention(struct vcpu *c, u32 bits);
/* stops.c */
ALWAYS_INLINE bool has_stops(const struct vcpu *c, enum stop_kind kind)
{
    return c->stops.first[kind] != c->stops.first[kind + 1];
}
bool stops_break(const struct vcpu *c, u64 linear);       /* is there a breakpoint? */
bool stops_reach_break(struct vcpu *c, u64 linear);       /* there is: c->exit is ready */
/* fresh.c, where there is `vm->fresh`. `tells`: it is told of, and not again */
bool fresh_page(struct vm *vm, u64 physical);
void fresh_written(struct vm *vm, u64 physical, unsigned bytes);
bool fresh_read(struct vm *vm, u64 physical, unsigned bytes, bool tells);
void fresh_destroy(struct vm *vm);
void stops_reach_unwritten(struct vcpu *c, u64 linear);
void stops_reach_unclaimed(struct vcpu *c, u64 address); /* a port, or a physical address */
bool stops_watch_page(const struct vcpu *c, u64 linear, u64 physical);
bool stops_watch(const struct vcpu *c, u64 linear, u64 physical, unsigned bytes, bool write);
void stops_reach_watch(struct vcpu *c, u64 linear, u64 physical, unsigned bytes, bool write);
void stops_reach_port(struct vcpu *c, u16 port, unsigned bytes);
void stops_reach_cr3(struct vcpu *c);
void stops_reach_mode(struct vcpu *c);                     /* if it is not the known one */
void stops_know_mode(struct vcpu *c);
bool catches(struct vcpu *c, unsigned vector, bool external, u64 done); /* c->exit is ready */
void stops_finish(struct vcpu *c);                         /* after an instruction or event */
void stops_forget(struct vcpu *c);                         /* nothing is reached */
void stops_free(struct vcpu *c);
void stops_hold(struct vcpu *c, const struct vcpu_exit *stops, size_t count); /* the last exit is the first of them */
/* progress.c */
long get_progress(struct vcpu *c, void *data, size_t size);
int set_progress(struct vcpu *c, const void *data, size_t size);
long get_time(struct vm *vm, void *data, size_t size);
int set_time(struct vm *vm, const void *data, size_t size);
long get_chips(struct vm *vm, void *data, size_t size);
int set_chips_rest(struct vm *vm, const void *data, size_t size);
bool take_waiting(struct vcpu *c, struct vcpu_exit *exit); /* the first of `waiting`, and its bytes in c->data */
int add_waiting(struct vcpu *c, const struct vcpu_exit *exit);
/* cache.c */
int cache_create(struct vcpu *c);
void cache_destroy(struct vcpu *c);
void cache_flush(struct vcpu *c);                /* forget all blocks */
void cache_forget(struct vcpu *c);               /* the same while nobody executes */
/* The CPU executes nothing just now. Where it has done next to nothing for long, all that is decoded and translated is given back.
 * In how many nanoseconds to ask again; CORE_NEVER: there is nothing to give back. */
u64 cache_rest(struct vcpu *c);
void cache_kill(struct vm *vm, struct slot *slot, u64 physical, u64 size); /* those that overlap, on all CPUs */
size_t cache_blocks(const struct vcpu *c, const struct block **blocks, size_t room); /* all; how many there are */
struct block *cache_lookup(struct vcpu *c);      /* the block at gpr[GPR_IP]; may escape with a fault */
/* Instruction fetches: their translations were dropped, all or of a page; the key, CPL or base of CS changed. */
void code_map_clear(struct vcpu *c);
void code_map_clear_local(struct vcpu *c);       /* those of pages that are not global */
void code_map_drop(struct vcpu *c, u64 linear);
void code_map_select(struct vcpu *c);
void cache_check_again(struct vcpu *c);          /* others may have written code */
void cache_forget_written(struct vcpu *c);       /* what vm_memory_written was told */
void cache_lines_written(struct vcpu *c, struct slot *slot, u64 physical, unsigned bytes); /* where code may have come meanwhile */
handler op_end, op_end_alone, op_raise, op_breakpoint, jump_slow, jump_indirect_slow;
void decode_alone(struct vcpu *c, struct record *r); /* the instruction at gpr[GPR_IP], uncached, and its end */
bool is_breakpoint(const struct vcpu *c, u64 linear);
void tlb_drop_writes_of(struct vcpu *c, u64 page);   /* mmu.c: the guest-physical page got code */
bool tlb_may_write(const struct vcpu *c, u64 page);  /* from any thread: perhaps it has an entry for writes there */
/* decode.c */
void decode_init(void);
/* One instruction at `ip`, of which `available` bytes are at `bytes`. Returns its length; 0: needs more bytes
 * than there are. r->at, r->left are the caller's. *ends: the block must end after it. */
unsigned decode(struct vcpu *c, const u8 *bytes, unsigned available, u64 ip, unsigned at, struct record *r, bool *ends);
/* segment.c */
void segment_changed(struct vcpu *c, unsigned seg);  /* derive the checks and KEY_FLAT after seg[] was set */
bool canonical_base(const struct vcpu *c, u64 linear); /* may a register hold that address? */
u64 cr4_valid(const struct vcpu *c);                 /* ops_control.c: the bits that may be set */
void mode_changed(struct vcpu *c);                   /* derive key, masks, TLB table, checks after CR0, EFER, CPL, CS.. */
void flags_changed(struct vcpu *c);                  /* after AC or VM in rflags changed */
void set_segment_real(struct vcpu *c, unsigned seg, u16 selector);
/* Load a data segment register or SS by a selector, with all checks; c->now is set. */
void load_segment(struct vcpu *c, unsigned seg, u16 selector);
struct descriptor { u64 low, high; u64 address; u16 selector; };
bool read_descriptor(struct vcpu *c, u16 selector, struct descriptor *d, unsigned bytes); /* false: beyond the table */
void descriptor_segment(const struct descriptor *d, struct segment *s);
u32 descriptor_attributes(const struct descriptor *d);
u64 descriptor_base(const struct descriptor *d);
u32 descriptor_limit(const struct descriptor *d);
void set_accessed(struct vcpu *c, struct descriptor *d);
/* interrupt.c */
/* Deliver with rip as it is to be pushed in gpr[GPR_IP] and c->now NULL. May escape with a fault, changing nothing. */
void deliver(struct vcpu *c, unsigned vector, enum event kind, bool has_error, u32 error);
bool fault_to_deliver(const struct vcpu *c, struct fault *f); /* c->fault, or a double fault; false: triple fault */
/* Deliver a fault and what follows from it (double fault); false: triple fault. For the main loop. */
bool deliver_fault(struct vcpu *c);
void debug_status(struct vcpu *c, u64 bits);         /* of a #DB, in DR6 */
void set_cpl(struct vcpu *c, unsigned cpl);
/* cpuid.c msr.c */
void cpuid_defaults(struct vcpu *c);
void cpuid_changed(struct vcpu *c);
void cpuid(struct vcpu *c, u32 leaf, u32 subleaf, u32 out[4]);
bool xcr0_is_valid(struct vcpu *c, u64 value); /* XCR0, with what CPUID has and the core knows */
bool msr_read(struct vcpu *c, u32 index, u64 *value, bool host);
bool msr_write(struct vcpu *c, u32 index, u64 value, bool host);
/* To try it would not be without effect: a deadline that has passed is an interrupt at once. */
bool msr_takes_anything(u32 index);
void msr_note_unclaimed(struct vcpu *c, const struct record *r, u32 index, bool write);
size_t msr_values(struct vcpu *c, struct kvm_msr_entry *entries, size_t room);
bool has_nx(const struct vcpu *c);
bool cpuid_is_limited(const struct vcpu *c);
u64 read_tsc(struct vcpu *c, const struct record *r);
/* vm.c */
struct slot *vm_find_slot(struct vm *vm, u64 physical);
/* The slot of that byte, or NULL. It is mostly the one of the byte before. */
static inline struct slot *vm_slot(struct vm *vm, u64 physical)
{
    struct slot *slot = __atomic_load_n(&vm->last_slot, __ATOMIC_RELAXED);
    return likely(slot && physical - slot->address < slot->size) ? slot : vm_find_slot(vm, physical);
}
#define NO_PAGE (~0ull)
u64 alias_page(const struct slot *of, u64 page, const struct slot *in); /* where `in` has that page of `of`, or NO_PAGE */
void vcpu_reset(struct vcpu *c);
void vcpu_init(struct vcpu *c);                      /* an INIT message */
void vm_lock(struct vm *vm);
void vm_unlock(struct vm *vm);
void vm_yield(struct vm *vm);
/* world.c: CPUs that execute at the same time, and stand still together */
void world_enter(struct vcpu *c);                    /* it executes from now on; waits while they stand */
void world_leave(struct vcpu *c);                    /* between two instructions: it executes no more */
void world_stand(struct vcpu *c);                    /* between two instructions: as long as somebody wants it */
bool world_stop(struct vcpu *c);                     /* in an instruction: all others stand; false: they do already, or take turns */
void world_go(struct vcpu *c);
/* io.c: ports and memory of the devices in the core, and of those on the bus; c->now is set */
enum answer {
    ANSWER_NONE,              /* nobody's: an exit */
    ANSWER_PLAIN,             /* done, and nothing is to be looked at */
    ANSWER_LOOK,              /* done: the main loop comes before the next instruction */
};
enum answer io_read(struct vcpu *c, u16 port, unsigned size, u32 *value);
enum answer io_write(struct vcpu *c, u16 port, unsigned size, u32 value);
/* So many accesses, of `count`, were done at once, which nobody but the device sees. */
u64 io_string(struct vcpu *c, bool write, u16 port, unsigned size, u64 count, u8 *data);
bool mmio_read(struct vcpu *c, u64 physical, unsigned size, u64 *value);
bool mmio_write(struct vcpu *c, u64 physical, unsigned size, u64 value);
/* Memory of devices on the bus alone. */
bool bus_memory(struct vcpu *c, u64 physical, unsigned size, bool write, u64 *value);
int queued_vector(struct vcpu *c);                   /* the first that vcpu_interrupt queued, or -1 */
int pending_vector(struct vcpu *c);                  /* the interrupt to take next, or -1; does not acknowledge */
int acknowledge(struct vcpu *c);                     /* take it */
/* The chips have a lock where CPUs execute at the same time. Nothing is called with it held that waits for anybody. */
ALWAYS_INLINE void chips_lock(struct vm *vm)
{
    if (vm->parallel)
        pthread_mutex_lock(&vm->chips);
}
ALWAYS_INLINE void chips_unlock(struct vm *vm)
{
    if (vm->parallel)
        pthread_mutex_unlock(&vm->chips);
}
/* Whether CPUs execute at the same time just now. */
ALWAYS_INLINE bool runs_parallel(const struct vm *vm) { return vm->parallel && !vm->in_turn; }
/* clock.c: time, and the machine's interrupt controllers in it */
void clock_begin(struct vm *vm);                     /* a run begins */
u64 time_of_host(struct vcpu *c);                    /* core_now by the host's clock */
void clock_enter(struct vcpu *c);                    /* the CPU got its turn */
void clock_leave(struct vcpu *c);                    /* and gives it up */
void clock_share(struct vm *vm);                     /* no CPU runs: all are at the machine's time */
u64 host_clock(void);
u64 vm_clock(const struct vm *vm);                   /* host_clock, or where it stands */
u64 vm_time(struct vm *vm);                          /* while no CPU runs */
void set_tsc_offset(struct vcpu *c, u64 offset);
void chip_apply_lines(struct vm *vm);
void chip_look(struct vcpu *c);                      /* timers and INIT, SIPI, NMI messages, before the next instruction */
void chip_notify(struct vcpu *c);                    /* tell the other CPUs that something is for them */
void wake_keeper(struct vm *vm, const struct vcpu *but); /* a timer that is no CPU's own is due sooner than it was */
bool deadline_came(struct vcpu *c);                  /* vm_set_deadline's, which is over then */
bool soon_came(struct vcpu *c);                      /* vm_end_soon's */
i64 chip_room(struct vcpu *c, i64 most);             /* how many instructions until the next timer */
bool chip_leaves_it_asleep(struct vcpu *c);    /* nothing in the machine can wake it, for all time */
/* A CPU that executes nothing: until something happens. False where the run is bounded by instructions, which do not come,
 * and it has slept for a second: of the machine's time, or of the host's. */
bool chip_wait(struct vcpu *c);
void chip_features(struct vcpu *c);                  /* after cpuid */

#endif
