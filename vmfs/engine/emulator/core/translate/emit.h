/* Inside of the translator: what emitters are given, and what a row's emitter is. */
#ifndef VMFS_EMIT_H
#define VMFS_EMIT_H

#include "assemble.h"
#include "code.h"
#include "translate.h"

/* Host registers. Guest registers have their own numbers but for RSP, which is R12, and R12 to R15, which stay in struct
 * vcpu: so AH to BH, and implied RAX, RCX, RDX are themselves. */
enum { C = RSP /* struct vcpu: host code's stack ends where that begins */, GUEST_RSP = 12, T0 = 13, T1 = 14, BUDGET = 15 };
#define FIELD(name) in_memory(C, (i32)offsetof(struct vcpu, name))

enum {
    READS_FIRST = 1, WRITES_FIRST = 2, WRITES_SECOND = 4, /* operands */
    NO_ACCESS = 8,            /* a memory operand is an address only */
    STACK_READ = 16, STACK_WRITE = 32,
    SHIFT = 64,               /* the second or third operand is a count: zero keeps all flags */
    WRITES_RAX = 128, WRITES_RDX = 256,
    CLEARS_UNDEFINED = 512,   /* flags that the table calls undefined: Intel's processors write them, AMD's keep them, so they are cleared before */
    BY_CONDITION = 1024,      /* of the opcode's low four bits */
    FLOW_BRANCH = 2048, FLOW_JUMP = 4096, /* a direct jump, conditional or not */
    FLOW_LEAVES = 8192,       /* nothing follows it in the block */
    READS_CARRY = 16384,      /* a SHIFT through CF */
    WRITES_RBP = 32768,
    UNALIGNED = 65536,        /* 16 bytes of memory may lie anywhere */
    FLOAT = 131072,           /* it looks at MXCSR */
    KEEPS_UNDEFINED = 262144, /* flags that the table calls undefined: Intel's processors keep them */
    ROTATES = 524288,         /* a SHIFT that keeps OF, with a constant that is not 1 */
    FAULTS = 2097152,         /* without memory, too */
    ALIGNED = 1048576,        /* VEX: its memory operand lies at a multiple of its size */
};
struct translation;
struct emitter {
    /* Make host code of r; false: it cannot be, and the handler is called. With t->asking: only say which. */
    bool (*emit)(struct translation *t, const struct record *r);
    unsigned traits;
};

enum { REGION_BLOCKS = 32, REGION_INSTRUCTIONS = 400, STUBS = 5 * REGION_INSTRUCTIONS, EDGES = 4 * REGION_INSTRUCTIONS,
       COPIES = (REGION_INSTRUCTIONS + REGION_BLOCKS) / 2 };

/* Where the guest's arithmetic flags are. */
enum where { IN_HOST, IN_IMAGE /* c->flags_image */, IN_RECIPE /* nowhere, but can be made again */ };
/* How to make the flags again from registers that have not changed since. */
struct recipe {
    enum recipe_kind { RECIPE_NONE, RECIPE_COMPARE, RECIPE_TEST, RECIPE_ADD, RECIPE_SUB, RECIPE_LOGIC,
                       RECIPE_LEFT, RECIPE_RIGHT /* CF and OF of a rotation, the others in the image */ } kind;
    u8 size, a, b;            /* registers: offsets into gpr */
    bool constant;            /* b is `value` */
    i32 value;
};

/* What an instruction accesses, as its emitter says: its memory operand; an element of the stack, off `base` + disp. */
struct access { bool is, write; u16 bytes; u8 alignment, base; i32 disp; };

/* A stretch: accesses of a block that lie near each other, and whose addresses differ by constants. The first checks that the TLB has
 * the page of all of them, and leaves its host address in c->stretches[slot]. Where it has not, or where another instruction in
 * between has to call its handler, a copy of the code goes on that has a check for each (struct copy): so host code that
 * goes by the first check calls nothing before the last, and nothing that was checked can change. */
enum { NO_STRETCH = 0xff };
struct stretch {
    u8 slot, first, end;      /* indices in the block; `end` is behind the last */
    u8 alignment;
    bool write;
    i64 low, high;            /* what is accessed, from some value on */
};
struct planned { u8 stretch; i64 at; }; /* an access: of m->stretches, and where */

struct member {               /* a block of the region */
    struct block *block;
    u8 *code;                 /* where it begins, once emitted */
    u16 live, precise;        /* at its entry: flags that may be read; that may be seen, by faults, too */
    struct { u16 live, precise; } after[BLOCK_INSTRUCTIONS]; /* each instruction */
    u32 emitted;              /* instructions that become host code; the others call their handlers */
    u32 covered;              /* instructions of stretches, and between them */
    u32 checked;              /* those that another one's check is for */
    unsigned stretch_count;
    struct stretch stretches[BLOCK_INSTRUCTIONS];
    struct planned memory[BLOCK_INSTRUCTIONS], stack[BLOCK_INSTRUCTIONS]; /* of each instruction; a run's is the first's `stack` */
    u8 runs[BLOCK_INSTRUCTIONS]; /* how many are a run that begins here */
};

/* A scratch register has the value of a guest register that is in struct vcpu, for host code at `at`. */
struct held { const u8 *at; unsigned host, offset; };

/* Where a check of the TLB's first place fails, code out of line looks at the second. */
struct look {
    bool write, constant;     /* constant: of a known page, which is in T1 where it is no constant of 32 bits */
    u16 bytes, alignment;
    u64 page;
    u8 *found;                /* where it goes on with the host address; NULL: there is nothing to look for */
};

/* Code out of line. */
struct stub {
    enum { STUB_CALL, STUB_APART, STUB_LEAVE, STUB_EDGE, STUB_STOP, STUB_WAY } kind;
    const struct record *record;
    const struct member *in;
    u8 *jumps[4];             /* that come here */
    u8 *back;                 /* STUB_CALL: where it goes on */
    enum where where;
    u16 split, split_behind;
    struct recipe recipe;
    bool restore;             /* STUB_CALL: flags are in the host's after it */
    bool give_back;           /* STUB_LEAVE: T1 to the budget */
    i32 budget, stack;        /* STUB_LEAVE, STUB_WAY: to add to the budget, and to rSP */
    struct way *way;          /* STUB_WAY */
    unsigned count;           /* STUB_CALL: of records */
    u8 index;                 /* STUB_APART: of the instruction at which its copy goes on */
    unsigned jump_count;
    struct held held;         /* STUB_CALL: to load before it goes on */
    u16 dirty, reload;        /* vector registers to store before, to load after */
    struct look look;         /* STUB_CALL, STUB_APART, STUB_LEAVE: comes first */
};

/* Instructions that are covered by stretches, with a check for each access, for where those of the stretches fail. It is entered with all
 * flags in the image, and no vectors in host registers; at its end it makes that of the stretches' code, and goes on there. */
struct copy {
    struct member *member;
    u8 first, end;
    u32 entries;              /* instructions */
    unsigned first_stub, end_stub; /* of its stretches' code */
    u8 *back;                 /* where that goes on */
    enum where where;
    u16 split, vectors;
    struct held held;
};

struct translation {
    struct code code;
    struct vcpu *c;
    struct translator *translator;
    struct region *region;
    struct member members[REGION_BLOCKS];
    unsigned member_count, instructions;
    struct stub stubs[STUBS];
    unsigned stub_count;
    struct { u8 *jump; int member; } edges[EDGES]; /* jumps to blocks that are not emitted yet */
    unsigned edge_count;
    struct copy copies[COPIES];
    unsigned copy_count;
    bool apart;               /* copies are emitted */

    /* Of the instruction that is emitted */
    bool asking;
    unsigned index;           /* in its block */
    struct access memory, stack;
    i32 at;                   /* of what it accesses, from T1 on */
    bool merge;               /* the flag that it writes goes to a byte of its own */
    bool wide;                /* 64-bit mode; else flat 32-bit */
    bool ymm;                 /* the region has VEX-encoded vectors: 32 bytes of each register are loaded and stored */
    const struct member *in;
    const struct record *after_record; /* the next one */
    const struct opcode *row;
    unsigned traits;
    u16 reads, writes, live, precise; /* flags; the last two after it */
    enum where where;
    u16 split;                /* IN_IMAGE: fC, fO, where they are in carry_image and overflow_image */
    struct recipe recipe;
    struct held held;
    u16 vectors, dirty;       /* in host registers of their own number; and not yet in struct vcpu */
};

/* A guest register's host register, or NO_REGISTER: in struct vcpu. */
ALWAYS_INLINE unsigned pinned(unsigned offset)
{
    static const u8 hosts[18] = {RAX, RCX, RDX, RBX, GUEST_RSP, RBP, RSI, RDI, 8, 9, 10, 11,
                                 NO_REGISTER, NO_REGISTER, NO_REGISTER, NO_REGISTER, NO_REGISTER, NO_REGISTER};
    return hosts[offset >> 3];
}
ALWAYS_INLINE struct place guest_place(unsigned offset)
{
    return in_memory(C, (i32)(offsetof(struct vcpu, gpr) + (offset & ~7u)));
}

/* The host register of a guest's whole register: its own, or `scratch`, loaded. */
static inline unsigned use(struct translation *t, unsigned offset, unsigned scratch)
{
    unsigned host = pinned(offset);
    if (host != NO_REGISTER)
        return host;
    load64(&t->code, scratch, guest_place(offset));
    return scratch;
}

/* emit.c */
bool ask(struct translation *t, const struct record *r);
unsigned traits_of(const struct record *r);
bool may_fault(const struct record *r, unsigned traits);
void flags_used(const struct record *r, unsigned traits, u16 *reads, u16 *writes);
void emit_member(struct translation *t, struct member *m);
void emit_stubs(struct translation *t);
u32 registers_written(const struct record *r, unsigned traits); /* a bit each */
int member_at(const struct translation *t, const struct record *r); /* where a direct jump goes, or -1 */

/* emit_flags.c */
void load_flags(struct translation *t, u16 needed);      /* from the image to the host's */
void unfold(struct translation *t, u16 flags);           /* CF and OF from the image to bytes of their own */
void merge(struct translation *t);                       /* from the host's to that byte (t->merge) */
struct recipe recipe_of(const struct record *r);
bool recipe_uses(const struct recipe *p, u32 registers);
bool merges(const struct translation *t);
void flags_before(struct translation *t, u32 registers); /* flags_aside of what writes those registers, and no flags */
void flags_behind_check(struct translation *t);

/* For emitters. They say what is accessed before they return where they are asked. Later, after to_memory and to_stack `accessed` is
 * the memory operand in the host, off T1, or the element of the stack, and the host's flags are what the instruction reads and keeps.
 * `leaves`: the slow path is to leave at r. */
void will_access(struct translation *t, unsigned bytes, bool write, unsigned alignment);
void will_access_stack(struct translation *t, unsigned base, i32 disp, bool write);
void to_memory(struct translation *t, const struct record *r, bool leaves);
void to_stack(struct translation *t, const struct record *r, bool leaves);
ALWAYS_INLINE struct place accessed(const struct translation *t) { return in_memory(T1, t->at); }
void move_stack(struct translation *t, unsigned from, i32 by); /* rSP = a pinned register + by */
ALWAYS_INLINE unsigned stack_width(const struct translation *t) { return t->wide ? 8 : 4; }
ALWAYS_INLINE bool stack_sized(const struct translation *t, const struct record *r) { return r->size == (t->wide ? 3 : 2); }
void use_vector(struct translation *t, unsigned n, bool reads, bool writes);
void flush_vectors(struct translation *t);               /* to struct vcpu */
void begin_flags(struct translation *t, const struct record *r); /* of an instruction without memory */
void flags_to_image(struct translation *t);
void flags_aside(struct translation *t, const struct record *r); /* before host code that changes them, not as r does */
void emit_address(struct translation *t, const struct record *r, unsigned to, unsigned other, i32 more);
unsigned emit_condition(struct translation *t, unsigned condition); /* what to ask the host's flags */
/* The direct jump r is taken; that of a call, whose return address is pushed. To an address: look for its block (or leave at
 * r), and enter it. All but the first want the flags in the image. */
void emit_jump(struct translation *t, const struct record *r);
void emit_call(struct translation *t, const struct record *r);
void find_block(struct translation *t, const struct record *r);  /* of the address in T1: the block to T1, its code to T0 */
void emit_enter(struct translation *t, const struct record *r);  /* the block in T1, with its code in T0 */
struct stub *add_stub(struct translation *t, int kind, const struct record *r);
void stub_jump(struct stub *s, u8 *jump);

extern struct operation operation_MOV, operation_PUSH, operation_POP, operation_ADD, operation_AND, operation_CMP, operation_DEC,
    operation_IMUL, operation_INC, operation_LEA, operation_LEAVE, operation_MOVZX, operation_OR, operation_ROL, operation_ROR,
    operation_SHR, operation_SUB, operation_TEST, operation_XOR;

/* accesses.c: which accesses share a check. PUSH, POP and moves in a row: how many of them were emitted, from r on. */
void plan_accesses(struct translation *t, struct member *m);
unsigned try_run(struct translation *t, const struct member *m, const struct record *r);
void emit_look(struct translation *t, const struct look *look);

/* region.c */
bool find_flags(struct translation *t, struct member *m); /* of each instruction; true: those of its entry are others now */
bool is_cut(const struct translator *t, const void *where); /* by VMFS_JIT_SEED: the region goes no further here */
/* Where the code map of a key has its numbers, from struct vcpu on. */
ALWAYS_INLINE i32 code_ids(u64 key)
{
    return (i32)(offsetof(struct vcpu, code_maps) + (key & KEY_CPL0 ? 0 : sizeof(struct code_map)) + offsetof(struct code_map, ids));
}
bool host_has(const struct translator *t, enum feature f);
const struct shared *shared_code(const struct translator *t);
struct site *add_site(struct translation *t, const struct record *r, unsigned count);

/* A direct jump out of a region. It leaves, until its link was followed; from then on it is a jump to host code. */
enum { WAY_ROOM = 40 };
struct way {
    const struct record *record;
    u64 ip;                   /* of the block */
    u8 *code, *leave, *stop;  /* the jump, WAY_ROOM bytes; where it goes to leave; where the budget ends */
    struct block *to;
    struct way *next, **before; /* of those that go there */
    struct way *sibling;      /* of the same region */
    i64 taken;                /* from the budget, when it jumps */
    u32 id;                   /* of the link that it was opened for */
};
struct way *add_way(struct translation *t, const struct record *r);

/* A call of handlers from host code: copies of records, then one that returns. */
struct site {
    u64 ip;                   /* of the block */
    struct region *region;
    unsigned count;           /* of records; then comes one that returns */
    struct record records[];
};

#endif
