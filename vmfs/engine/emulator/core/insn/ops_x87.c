/* x87 instructions on the stack and with one memory operand: the same bytes, executed by the host (x87.h). */
#include "x87.h"

/* ---- Register forms: a handler for each pair of bytes -------------------------------------------------
 *
 * The rows name the handler of the first byte, which jumps to that of the pair, by the second in r->imm. The
 * rows decide which pairs exist. */

#define PAIRS_8_LOW(X, first, high) \
    X(first, high##0) X(first, high##1) X(first, high##2) X(first, high##3) \
    X(first, high##4) X(first, high##5) X(first, high##6) X(first, high##7)
#define PAIRS_8_HIGH(X, first, high) \
    X(first, high##8) X(first, high##9) X(first, high##a) X(first, high##b) \
    X(first, high##c) X(first, high##d) X(first, high##e) X(first, high##f)
#define PAIRS_16(X, first, high) PAIRS_8_LOW(X, first, high) PAIRS_8_HIGH(X, first, high)

#define PAIR(first, second) \
    OP(op_x87_##first##_##second) \
    { \
        X87_START(c, r); \
        __asm__ volatile(".byte 0x" #first ", 0x" #second); \
        x87_remember(c, r); \
        NEXT(); \
    }
#define PAIR_ENTRY(first, second) [0x##second & 63] = op_x87_##first##_##second,
#define PAIRS(first, ...) \
    static handler *const pairs_##first[64] = {__VA_ARGS__}; \
    OP(op_x87_##first) { pairs_##first[r->imm & 63](c, r); } \
    HANDLER(x87_##first);

#define PAIRS_64(first) \
    PAIRS_16(PAIR, first, c) PAIRS_16(PAIR, first, d) PAIRS_16(PAIR, first, e) PAIRS_16(PAIR, first, f) \
    PAIRS(first, PAIRS_16(PAIR_ENTRY, first, c) PAIRS_16(PAIR_ENTRY, first, d) \
                 PAIRS_16(PAIR_ENTRY, first, e) PAIRS_16(PAIR_ENTRY, first, f))
PAIRS_64(d8) /* FADD FMUL FCOM FCOMP FSUB FSUBR FDIV FDIVR */
PAIRS_64(d9) /* FLD FXCH FNOP; FCHS .. FCOS */
PAIRS_64(dc) /* D8 with the destination ST(i) */
PAIRS_64(dd) /* FFREE FXCH FST FSTP FUCOM FUCOMP */
PAIRS_64(de) /* DC with a pop; FCOMPP */
PAIR(da, e9) /* FUCOMPP */
PAIRS(da, PAIR_ENTRY(da, e9))
PAIRS_16(PAIR, df, c) PAIRS_16(PAIR, df, d) /* FFREEP FXCH FSTP FSTP */
PAIRS(df, PAIRS_16(PAIR_ENTRY, df, c) PAIRS_16(PAIR_ENTRY, df, d))

/* FCMOVcc as the host's FCMOVB, whose condition CF is the guest's: stack faults are found in either case. */
#define MOVE(first, second) \
    OP(op_x87_move_##second) \
    { \
        X87_START(c, r); \
        __asm__ volatile("stc\n\t.byte 0xda, 0x" #second : : : "cc"); \
        x87_remember(c, r); \
        NEXT(); \
    } \
    OP(op_x87_stay_##second) \
    { \
        X87_START(c, r); \
        __asm__ volatile("clc\n\t.byte 0xda, 0x" #second : : : "cc"); \
        x87_remember(c, r); \
        NEXT(); \
    }
PAIRS_8_LOW(MOVE, da, c)
#define MOVE_ENTRY(first, second) [0x##second & 7] = {op_x87_stay_##second, op_x87_move_##second},
static handler *const moves[8][2] = {PAIRS_8_LOW(MOVE_ENTRY, da, c)};
#define CONDITIONAL(name, number) \
    OP(op_##name) { moves[r->imm & 7][condition(c, number)](c, r); } \
    HANDLER(name);
CONDITIONAL(fcmovb, 2)
CONDITIONAL(fcmovnb, 3)
CONDITIONAL(fcmove, 4)
CONDITIONAL(fcmovne, 5)
CONDITIONAL(fcmovbe, 6)
CONDITIONAL(fcmovnbe, 7)
CONDITIONAL(fcmovu, 10)
CONDITIONAL(fcmovnu, 11)

/* FCOMI and its like set ZF, PF, CF and clear the others, unless an unmasked exception stops them: so they
 * find the guest's flags. */
#define COMPARE(first, second) \
    OP(op_x87_##first##_##second) \
    { \
        bool zero, parity, carry; \
        X87_START(c, r); \
        if (unlikely(c->x87_place == X87_HOST_UNMASKED)) { \
            u64 flags = get_arithmetic_flags(c); \
            __asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushq %0\n\tpopfq\n\t" /* not in the red zone */ \
                             ".byte 0x" #first ", 0x" #second "\n\t" \
                             "pushfq\n\tpopq %0\n\tlea 128(%%rsp), %%rsp" : "+r"(flags) : : "cc", "memory"); \
            set_arithmetic_flags(c, flags); \
        } else { \
            __asm__ volatile(".byte 0x" #first ", 0x" #second \
                             : "=@ccz"(zero), "=@ccp"(parity), "=@ccc"(carry)); \
            c->zf = !zero; \
            c->sf = !parity; \
            set_carries(c, carry, 0, 0); \
        } \
        x87_remember(c, r); \
        NEXT(); \
    }
PAIRS_8_HIGH(COMPARE, db, e) PAIRS_8_LOW(COMPARE, db, f)
PAIRS_8_HIGH(COMPARE, df, e) PAIRS_8_LOW(COMPARE, df, f)
#define COMPARISONS(first) \
    static handler *const comparisons_##first[64] = { \
        PAIRS_8_HIGH(PAIR_ENTRY, first, e) PAIRS_8_LOW(PAIR_ENTRY, first, f)}; \
    OP(op_x87_compare_##first) { comparisons_##first[r->imm & 63](c, r); } \
    HANDLER(x87_compare_##first);
COMPARISONS(db)
COMPARISONS(df)

/* ---- Memory forms: the same two bytes, with the operand at RAX ----------------------------------------- */

#define EXECUTE(first, digit) \
    ALWAYS_INLINE void execute_##first##_##digit(void *p) \
    { \
        __asm__ volatile(".byte 0x" #first ", " #digit " << 3" : : "a"(p) : "memory"); \
    }

/* In the scratch where the memory is not at hand. */
static NOINLINE const u8 *load_slow(struct vcpu *c, u64 at, unsigned bytes)
{
    mmu_read(c, at, c->x87_scratch, bytes, ACCESS_READ);
    return c->x87_scratch;
}

#define LOAD(first, digit, bytes) \
    EXECUTE(first, digit) \
    GENERAL_OP(op_x87_##first##_##digit##_mem) \
    { \
        X87_START(c, r); \
        u64 at = mem_linear(c, r, bytes, ACCESS_READ); \
        const u8 *p = fast_linear_read(c, at, bytes); \
        if (unlikely(!p)) \
            p = load_slow(c, at, bytes); \
        execute_##first##_##digit((void *)p); \
        x87_remember(c, r); \
        x87_remember_data(c, r, offset_of(c, r)); \
        NEXT(); \
    } \
    OP(op_x87_##first##_##digit##_fast) \
    { \
        u64 at = fast_address(c, r); \
        const u8 *p = fast_linear_read(c, at, bytes); \
        if (unlikely(!p || c->x87_place != X87_HOST)) { \
            op_x87_##first##_##digit##_mem(c, r); \
            return; \
        } \
        execute_##first##_##digit((void *)p); \
        x87_remember(c, r); \
        x87_remember_data(c, r, at); \
        NEXT(); \
    } \
    MEMORY_FORMS(first, digit)
#define MEMORY_FORMS(first, digit) \
    const struct handlers H_x87_##first##_##digit = { \
        .fast = SAME4(op_x87_##first##_##digit##_fast), .mem = SAME4(op_x87_##first##_##digit##_mem)};
#define LOADS_8(first, bytes) \
    LOAD(first, 0, bytes) LOAD(first, 1, bytes) LOAD(first, 2, bytes) LOAD(first, 3, bytes) \
    LOAD(first, 4, bytes) LOAD(first, 5, bytes) LOAD(first, 6, bytes) LOAD(first, 7, bytes)
LOADS_8(d8, 4) /* FADD FMUL FCOM FCOMP FSUB FSUBR FDIV FDIVR, single */
LOADS_8(da, 4) /* the same, 32-bit integer */
LOADS_8(dc, 8) /* double */
LOADS_8(de, 2) /* 16-bit integer */
LOAD(d9, 0, 4) /* FLD */
LOAD(db, 0, 4) /* FILD */
LOAD(db, 5, 10) /* FLD, extended */
LOAD(dd, 0, 8) /* FLD */
LOAD(df, 0, 2) /* FILD */
LOAD(df, 4, 10) /* FBLD */
LOAD(df, 5, 8) /* FILD */

/* A store where the memory is not at hand: the host stores to the scratch, and the guest's state is still
 * that in struct vcpu if the memory refuses. An unmasked exception but precision leaves the memory alone. */
static NOINLINE void store_slow(struct vcpu *c, u64 at, unsigned bytes, void (*execute)(void *))
{
    u16 status;
    mmu_check_write(c, at, bytes, ACCESS_WRITE);
    x87_unload(c);
    x87_restore(c);
    execute(c->x87_scratch);
    __asm__ volatile("fnstsw %0" : "=m"(status));
    if (!(status & ~c->fcw & X87_EXCEPTIONS & ~FSW_PE))
        mmu_write(c, at, c->x87_scratch, bytes, ACCESS_WRITE);
    c->x87_place = x87_host_place(c);
}

#define STORE(first, digit, bytes) \
    EXECUTE(first, digit) \
    static void execute_##first##_##digit##_slow(void *p) { execute_##first##_##digit(p); } \
    GENERAL_OP(op_x87_##first##_##digit##_mem) \
    { \
        X87_START(c, r); \
        u64 at = mem_linear(c, r, bytes, ACCESS_WRITE); \
        u8 *p = fast_linear_write(c, at, bytes); \
        if (likely(p)) \
            execute_##first##_##digit(p); \
        else \
            store_slow(c, at, bytes, execute_##first##_##digit##_slow); \
        x87_remember(c, r); \
        x87_remember_data(c, r, offset_of(c, r)); \
        NEXT(); \
    } \
    OP(op_x87_##first##_##digit##_fast) \
    { \
        u64 at = fast_address(c, r); \
        u8 *p = fast_linear_write(c, at, bytes); \
        if (unlikely(!p || c->x87_place != X87_HOST)) { \
            op_x87_##first##_##digit##_mem(c, r); \
            return; \
        } \
        execute_##first##_##digit(p); \
        x87_remember(c, r); \
        x87_remember_data(c, r, at); \
        NEXT(); \
    } \
    MEMORY_FORMS(first, digit)
STORE(d9, 2, 4) /* FST */
STORE(d9, 3, 4) /* FSTP */
STORE(db, 1, 4) /* FISTTP */
STORE(db, 2, 4) /* FIST */
STORE(db, 3, 4) /* FISTP */
STORE(db, 7, 10) /* FSTP, extended */
STORE(dd, 1, 8) /* FISTTP */
STORE(dd, 2, 8) /* FST */
STORE(dd, 3, 8) /* FSTP */
STORE(df, 1, 2) /* FISTTP */
STORE(df, 2, 2) /* FIST */
STORE(df, 3, 2) /* FISTP */
STORE(df, 6, 10) /* FBSTP */
STORE(df, 7, 8) /* FISTP */
