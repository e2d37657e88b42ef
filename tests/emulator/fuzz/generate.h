/* Random instruction sequences, from the core's table. */
#ifndef GENERATE_H
#define GENERATE_H

#include "fuzz.h"

enum { INSTRUCTIONS = 40, CODE_MAX = 640 };

struct instruction {
    u16 at, length;            /* in the code */
    u16 read, written, undefined; /* arithmetic flags */
    int row;                   /* of the table; -1: none */
    int target;                /* of a jump: number of an instruction; -1: no jump to a known place */
};
struct sequence {
    u8 code[CODE_MAX];
    unsigned count, length;    /* of instructions; of bytes, with the jump to the exit at the end */
    struct instruction list[INSTRUCTIONS + 1]; /* the last: that jump */
    u32 ip;                    /* where it begins */
    struct mode mode;
    bool indirect;             /* has jumps to places that are not known */
};

struct random { u64 state; };
u64 random64(struct random *r);
static inline u32 below(struct random *r, u32 n) { return (u32)((random64(r) >> 32) * n >> 32); }
static inline bool one_in(struct random *r, u32 n) { return below(r, n) == 0; }
u64 random_value(struct random *r);   /* an edge, near one, small, or anything */
u64 random_floats(struct random *r);  /* eight bytes: two floats, a double, or integers */

void generate_open(void);
/* A sequence; `wild`: with random bytes where the table has fixed ones. */
void generate(struct random *r, const struct mode *mode, bool wild, struct sequence *s);
void generate_segments(struct random *r, struct mode *mode);
/* The end of the code in segments: a far jump out of them, which the core refuses. */
enum { FAR_EXIT = 8 };
/* The flags that are undefined before each instruction; false: one reads such a flag. */
bool undefined_flags(const struct sequence *s, u16 undefined[INSTRUCTIONS + 1]);
void generate_state(struct random *r, const struct sequence *s, struct state *state);

extern u64 row_cases[];               /* how many cases had the row */
extern unsigned row_count;
bool row_is_used(unsigned row, bool compat);

#endif
