/* The differential fuzzer: one process without Python, whose low 4 GiB hold nothing but what is here, so that a wild
 * address of a test faults instead of hitting the program. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;

/* The same addresses on the host and in the guest. Nothing is mapped beside them. */
enum { PAGE = 4096, CODE_SIZE = 2 * PAGE, DATA_SIZE = 2 * PAGE };
#define CODE 0x30010000u  /* readable and executable */
#define DATA 0x30020000u  /* readable and writable */
#define EXIT64 0x3a5c7000u /* native only: where the code ends; in the guest, a page fault */
#define EXIT32 0x3a5c7040u /* the same for 32-bit code */

enum { FLAGS_ARITHMETIC = 0x8d5, FLAGS_COMPARED = 0x8d5 | 0x400 | 0x4000 | 0x40000 | 0x200000 };
enum { VECTOR_NONE = -1, VECTOR_ENDLESS = -2, VECTOR_SYSCALL = -3 };

/* All that an instruction sequence starts from and leaves. Registers in encoding order: rax rcx rdx rbx rsp ... */
struct state {
    u64 gpr[16];
    u64 rip, rflags;
    u8 fx[512] __attribute__((aligned(64))); /* FXSAVE image, the begin of an XSAVE area; */
    u8 header[64];                           /* ... its header, which is host.c's; */
    u8 ymm[256];                             /* ... the upper halves of YMM registers */
    int vector;                              /* after: VECTOR_NONE at the exit, or the exception */
    u64 address;                             /* after: what a page fault was about */
};

/* Segments of the third mode, entries of an LDT: those for code, then those for data. `border`: an offset that code is to run
 * over, the segment's end or that of 16 bits; 0: code lies well within. */
struct segment { u32 base, limit, border; bool pages, big, code, down, less /* read-only, execute-only */; };
enum { WHOLE_CODE_SEGMENTS = 3, CODE_SEGMENTS = 11, SEGMENTS = 20, NULL_SEGMENT = SEGMENTS };
enum { IN_CS, IN_DS, IN_ES, IN_SS, USED };
extern const struct segment segments[SEGMENTS];
static inline u16 selector_of(u8 segment) { return segment == NULL_SEGMENT ? 0 : (u16)(segment << 3 | 7); }

/* How a code runs. */
struct mode {
    bool compat;            /* not 64-bit mode */
    bool segmented;         /* with `use` of `segments`, not flat ones; rip of a state is linear all the same */
    u8 use[USED];
};

/* What is to be added to an instruction pointer. */
static inline u32 code_base(const struct mode *mode) { return mode->segmented ? segments[mode->use[IN_CS]].base : 0; }
static inline u32 code_border(const struct mode *mode) { return mode->segmented ? segments[mode->use[IN_CS]].border : 0; }

/* host.c: before and after a batch; and one run in `s`, with the data area as the caller filled it. */
extern u8 *host_code, *host_data;
extern bool host_avx;                  /* else `ymm` is nothing, and no instruction with VEX is tried */
int host_open(void);                   /* 0, or a negative errno */
void host_begin(void);
void host_end(void);
void host_run(struct state *s, const struct mode *mode);

#endif
