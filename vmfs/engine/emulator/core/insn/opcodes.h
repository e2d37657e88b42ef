/* The instruction table. An instruction is a row here and a handler in an ops_*.c file, nothing else: the decode
 * tables, the checks, the names and the generated tests all follow from the row.
 *
 *   INSN(name, map, opcode, prefix, digit, mod, operand, operand, operand, size, handler, feature, attributes,
 *        flags read, flags written, flags undefined)
 *   VEX(name, map, opcode, prefix, length, w, digit, mod, operand, operand, operand, operand, size, handler, feature,
 *        attributes, flags read, flags written, flags undefined)
 *
 * name      mnemonic, for traces and tests; it is also the row's operation: rows of one name do the same to different
 *           operands, and `operation_NAME` is what they have in common. EMITTER(NAME) makes host code of them
 * map       M1 (one byte), M0F, M38 (0F 38), M3A (0F 3A)
 * opcode    last opcode byte; with attribute OPREG the row stands for opcode .. opcode + 7
 * prefix    ANY: 66 is the operand size, F2/F3 are REP or ignored; NP: none of 66 F2 F3; P66, PF3, PF2: mandatory;
 *           NOREP: no F2/F3, 66 is the operand size. Rows of an opcode are tried from the top.
 * digit     /0 .. /7 in ModRM.reg, or NO
 * mod       RM: any ModRM (or none); REG, MEM: only that form; REG0 .. REG7: register form with exactly that rm
 * length    of VEX: L0 (128 bits), L1 (256), LX (both: r->vector says which), LIG (ignored: 128)
 * w         of VEX: W0, W1, WX (ignored, or it is the operand size: Y)
 * operands  in SDM letters (Intel SDM 2D A.2), a list below; __ for none. They say what the decoder reads.
 * size      of `r->size`: B W D Q fixed; V 16/32/64 by prefix, REX.W and mode; Y 32/64; S as V, but 64 in place of 32 in
 *           64-bit mode (stack); N as S, and 66 is ignored in 64-bit mode (near branches)
 * handler   H_handler is a `struct handlers`, see below
 * feature   CPUID feature: without it #UD
 * attributes checks and behaviour, A_*, below
 * flags     arithmetic flags as letters OSZAPC together, or NONE. `undefined`: not compared by the tests. */
#ifndef VMFS_OPCODES_H
#define VMFS_OPCODES_H

#include "state.h"

/* What a row names: by form of the ModRM operand and log2 of the operand size. NULL where no encoding leads. */
struct handlers {
    handler *reg[4];   /* the r/m operand is a register, or there is none */
    handler *fast[4];  /* memory, and the fast form of the address applies (memory.h) */
    handler *mem[4];   /* memory, any */
    handler *lock[4];  /* memory, any, by a locked access: LOCK, and XCHG, where other CPUs execute at the same time */
    const struct handlers *amd; /* the same for hosts of AMD (`amd_flags`), where undefined flags differ */
};

#define SAME4(f) {f, f, f, f}
/* One function for all forms and sizes (it looks at r->size and PREFIX_REGISTER itself). */
#define HANDLER(name) const struct handlers H_##name = {SAME4(op_##name), SAME4(op_##name), SAME4(op_##name)}
/* op_NAME_reg and op_NAME_mem, all sizes. */
#define HANDLER_REG_MEM(name) \
    const struct handlers H_##name = {SAME4(op_##name##_reg), SAME4(op_##name##_mem), SAME4(op_##name##_mem)}

enum map { M1, M0F, M38, M3A, MAPS };
enum prefix { ANY, NP, P66, PF3, PF2, NOREP };
enum { NO = -1 };
enum length { LNONE /* not VEX */, L0, L1, LX, LIG };
enum w { WX, W0, W1 };
enum mod { RM, REG, MEM, REG0, REG1, REG2, REG3, REG4, REG5, REG6, REG7 };
enum size { B, W, D, Q, V, Y, S, N };

#define ATTRIBUTES(X) \
    X(A_LOCK)      /* LOCK is allowed with a memory destination (else #UD) */ \
    X(A_OPREG)     /* the register is in the opcode's low three bits */ \
    X(A_END)       /* the block ends after it */ \
    X(A_NO64)      /* #UD in 64-bit mode */ \
    X(A_ONLY64)    /* #UD elsewhere */ \
    X(A_PROTECTED) /* #UD in real and virtual-8086 mode */ \
    X(A_CPL0)      /* #GP(0) unless CPL 0 */ \
    X(A_X87)       /* #NM if CR0.EM or CR0.TS; r->imm is the opcode as in FOP */ \
    X(A_MMX)       /* #UD if CR0.EM, #NM if CR0.TS */ \
    X(A_SSE)       /* #UD if CR0.EM or not CR4.OSFXSR, #NM if CR0.TS */ \
    X(A_FWAIT)     /* #NM if CR0.MP and CR0.TS */ \
    X(A_AVX)       /* of VEX-encoded vectors: #UD unless CPUID has AVX, too, and CR4.OSXSAVE and XCR0 allow, #NM if CR0.TS */ \
    X(A_UNALIGNED) /* no #AC, whatever EFLAGS.AC says */ \
    X(A_REPORT)    /* F2/F3 is REP: kept in r->prefix for the handler (it always is); for tests */ \
    X(A_NOTEST)    /* the native comparison cannot run it (privileged, far, time, ports, ...) */ \
    X(A_NOREXB)    /* not with REX.B: 90 is NOP, 41 90 is XCHG */
enum attribute_bit {
#define X(name) name##_BIT,
    ATTRIBUTES(X)
#undef X
    ATTRIBUTE_COUNT
};
enum attribute {
    A_NONE = 0,
#define X(name) name = 1 << name##_BIT,
    ATTRIBUTES(X)
#undef X
};

/* CPUID features that rows need, each with its leaf, register (EAX 0 .. EDX 3) and bit. cpuid.c fills vcpu.features. */
#define FEATURES(X) \
    X(BASE, 0, 0, 0) \
    X(FPU, 1, 3, 0) X(TSC, 1, 3, 4) X(MSR, 1, 3, 5) X(MCE, 1, 3, 7) X(CX8, 1, 3, 8) X(SEP, 1, 3, 11) X(MCA, 1, 3, 14) \
    X(CMOV, 1, 3, 15) \
    X(CLFSH, 1, 3, 19) X(MMX, 1, 3, 23) X(FXSR, 1, 3, 24) X(SSE, 1, 3, 25) X(SSE2, 1, 3, 26) \
    X(SSE3, 1, 2, 0) X(PCLMUL, 1, 2, 1) X(MONITOR, 1, 2, 3) X(SSSE3, 1, 2, 9) X(FMA, 1, 2, 12) X(CX16, 1, 2, 13) \
    X(PCID, 1, 2, 17) X(SSE41, 1, 2, 19) X(SSE42, 1, 2, 20) X(X2APIC, 1, 2, 21) X(MOVBE, 1, 2, 22) X(POPCNT, 1, 2, 23) \
    X(TSC_DEADLINE, 1, 2, 24) X(APIC, 1, 3, 9) X(MTRR, 1, 3, 12) X(PAT, 1, 3, 16) X(TSC_ADJUST, 7, 1, 1) \
    X(ARCH_CAPABILITIES, 7, 3, 29) \
    X(AES, 1, 2, 25) X(XSAVE, 1, 2, 26) X(AVX, 1, 2, 28) X(F16C, 1, 2, 29) X(RDRAND, 1, 2, 30) \
    X(FSGSBASE, 7, 1, 0) X(BMI1, 7, 1, 3) X(AVX2, 7, 1, 5) X(SMEP, 7, 1, 7) X(BMI2, 7, 1, 8) X(INVPCID, 7, 1, 10) \
    X(RDSEED, 7, 1, 18) X(ADX, 7, 1, 19) X(SMAP, 7, 1, 20) X(CLFLUSHOPT, 7, 1, 23) X(CLWB, 7, 1, 24) X(SHA, 7, 1, 29) \
    X(UMIP, 7, 2, 2) X(PKU, 7, 2, 3) X(LA57, 7, 2, 16) X(GFNI, 7, 2, 8) X(VAES, 7, 2, 9) X(VPCLMUL, 7, 2, 10) \
    X(RDPID, 7, 2, 22) X(XSAVEOPT, 0xd, 0, 0) X(XSAVEC, 0xd, 0, 1) X(XGETBV1, 0xd, 0, 2) X(XSAVES, 0xd, 0, 3) \
    X(SYSCALL, 0x80000001, 3, 11) X(NX, 0x80000001, 3, 20) X(PAGE1GB, 0x80000001, 3, 26) X(RDTSCP, 0x80000001, 3, 27) \
    X(LM, 0x80000001, 3, 29) X(LAHF, 0x80000001, 2, 0) X(LZCNT, 0x80000001, 2, 5) X(PREFETCHW, 0x80000001, 2, 8)
enum feature {
#define X(name, leaf, reg, bit) FEATURE_##name,
    FEATURES(X)
#undef X
    FEATURE_COUNT
};
ALWAYS_INLINE bool has_feature(const struct vcpu *c, enum feature f) { return c->features[f >> 6] >> (f & 63) & 1; }

/* Operands: name, where the decoder finds it, width (of the register form, and of the memory operand).
 * Kinds: RM general register or memory; REGISTER in ModRM.reg; OPCODE in the opcode; MEMORY; IMMEDIATE; RELATIVE; OFFSET
 * (moffs); SEGMENT, CONTROL, DEBUGREG, VECTOR, MMXREG in ModRM.reg; VECTOR_RM, MMX_RM; FAR (immediate pointer); VEX_V, a
 * general register or vector in r->vvvv; IS4, a vector in bits 7:4 of the immediate byte; VSIB, memory whose index (a number in
 * r->index) is a vector, and no two of the row's vectors may be one; FIXED (implied; nothing is read).
 * Widths in bytes; v z y as in SDM; WIDTH_X the vector length; 0 not a number of bytes that matters. */
#define OPERANDS(X) \
    X(__, FIXED, 0) \
    X(Eb, RM_OPERAND, 1) X(Ew, RM_OPERAND, 2) X(Ed, RM_OPERAND, 4) X(Eq, RM_OPERAND, 8) X(Ev, RM_OPERAND, WIDTH_V) \
    X(Ey, RM_OPERAND, WIDTH_Y) \
    X(Gb, REGISTER, 1) X(Gw, REGISTER, 2) X(Gd, REGISTER, 4) X(Gq, REGISTER, 8) X(Gv, REGISTER, WIDTH_V) \
    X(Gy, REGISTER, WIDTH_Y) \
    X(Zb, OPCODE, 1) X(Zv, OPCODE, WIDTH_V) \
    X(M, MEMORY, 0) X(Mb, MEMORY, 1) X(Mw, MEMORY, 2) X(Md, MEMORY, 4) X(Mq, MEMORY, 8) X(Mt, MEMORY, 10) \
    X(Mdq, MEMORY, 16) X(Mx, MEMORY, WIDTH_X) X(Mvs, VSIB, 0) X(Mv, MEMORY, WIDTH_V) X(My, MEMORY, WIDTH_Y) X(Ma, MEMORY, 0) X(Mp, MEMORY, 0) X(Ms, MEMORY, 0) \
    X(Ib, IMMEDIATE, 1) X(sIb, IMMEDIATE, 1) X(Iw, IMMEDIATE, 2) X(Iz, IMMEDIATE, WIDTH_Z) X(Iv, IMMEDIATE, WIDTH_V) \
    X(IwIb, IMMEDIATE, 3) \
    X(Jb, RELATIVE, 1) X(Jz, RELATIVE, WIDTH_Z) X(Ap, FAR, 0) \
    X(Ob, OFFSET, 1) X(Ov, OFFSET, WIDTH_V) \
    X(Sw, SEGMENT, 2) X(Cd, CONTROL, 8) X(Dd, DEBUGREG, 8) \
    X(Vx, VECTOR, 16) X(Vd, VECTOR, 4) X(Vq, VECTOR, 8) \
    X(Wx, VECTOR_RM, 16) X(Wd, VECTOR_RM, 4) X(Wq, VECTOR_RM, 8) X(Ww, VECTOR_RM, 2) X(Wb, VECTOR_RM, 1) \
    X(Ux, VECTOR_RM, 16) X(Pq, MMXREG, 8) X(Qq, MMX_RM, 8) X(Qd, MMX_RM, 4) X(Nq, MMX_RM, 8) \
    X(By, VEX_V, WIDTH_Y) X(Hx, VEX_V, 16) X(Hd, VEX_V, 4) X(Hq, VEX_V, 8) X(Lx, IS4, 16) \
    X(Xb, FIXED, 1) X(Xv, FIXED, WIDTH_V) X(Yb, FIXED, 1) X(Yv, FIXED, WIDTH_V) \
    X(AL, FIXED, 1) X(AX, FIXED, 2) X(rAX, FIXED, WIDTH_V) X(CL, FIXED, 1) X(DX, FIXED, 2) X(One, FIXED, 0) \
    X(ST0, FIXED, 0) X(STi, FIXED, 0) X(XMM0, FIXED, 16)
enum operand_kind {
    FIXED, RM_OPERAND, REGISTER, OPCODE, MEMORY, IMMEDIATE, RELATIVE, OFFSET, SEGMENT, CONTROL, DEBUGREG, VECTOR, MMXREG,
    VECTOR_RM, MMX_RM, FAR, VEX_V, IS4, VSIB,
};
enum { WIDTH_V = 128, WIDTH_Y, WIDTH_Z, WIDTH_X };
struct operand_type { u8 kind, width; };
extern const struct operand_type operand_types[];
enum operand {
#define X(name, kind, width) o##name,
    OPERANDS(X)
#undef X
    OPERAND_COUNT
};

/* Every set of arithmetic flags, so that a row can spell it. */
enum {
    fNONE = 0, fO = FLAG_OF, fS = FLAG_SF, fZ = FLAG_ZF, fA = FLAG_AF, fP = FLAG_PF, fC = FLAG_CF,
    fOS = fO | fS, fOZ = fO | fZ, fOA = fO | fA, fOP = fO | fP, fOC = fO | fC, fSZ = fS | fZ, fSA = fS | fA,
    fSP = fS | fP, fSC = fS | fC, fZA = fZ | fA, fZP = fZ | fP, fZC = fZ | fC, fAP = fA | fP, fAC = fA | fC,
    fPC = fP | fC, fOSZ = fO | fS | fZ, fOSA = fO | fS | fA, fOSP = fO | fS | fP, fOSC = fO | fS | fC,
    fOZA = fO | fZ | fA, fOZP = fO | fZ | fP, fOZC = fO | fZ | fC, fOAP = fO | fA | fP, fOAC = fO | fA | fC,
    fOPC = fO | fP | fC, fSZA = fS | fZ | fA, fSZP = fS | fZ | fP, fSZC = fS | fZ | fC, fSAP = fS | fA | fP,
    fSAC = fS | fA | fC, fSPC = fS | fP | fC, fZAP = fZ | fA | fP, fZAC = fZ | fA | fC, fZPC = fZ | fP | fC,
    fAPC = fA | fP | fC, fOSZA = fO | fS | fZ | fA, fOSZP = fO | fS | fZ | fP, fOSZC = fO | fS | fZ | fC,
    fOSAP = fO | fS | fA | fP, fOSAC = fO | fS | fA | fC, fOSPC = fO | fS | fP | fC,
    fOZAP = fO | fZ | fA | fP, fOZAC = fO | fZ | fA | fC, fOZPC = fO | fZ | fP | fC,
    fOAPC = fO | fA | fP | fC, fSZAP = fS | fZ | fA | fP, fSZAC = fS | fZ | fA | fC,
    fSZPC = fS | fZ | fP | fC, fSAPC = fS | fA | fP | fC, fZAPC = fZ | fA | fP | fC,
    fOSZAP = fO | fS | fZ | fA | fP, fOSZAC = fO | fS | fZ | fA | fC, fOSZPC = fO | fS | fZ | fP | fC,
    fOSAPC = fO | fS | fA | fP | fC, fOZAPC = fO | fZ | fA | fP | fC, fSZAPC = fS | fZ | fA | fP | fC,
    fOSZAPC = fO | fS | fZ | fA | fP | fC,
};

/* What rows of one name have in common: compare `row->operation == &operation_NAME`. */
struct operation { char unused; }; /* an address of its own */
enum { OPERANDS_MAX = 4 };

struct opcode {
    const char *name, *handler_name, *feature_name;
    struct operation *operation;
    const struct handlers *handlers;
    const struct emitter *emitter; /* NULL: translated code calls the handler */
    u8 map, opcode, prefix, mod, size, feature, length, w;
    int8_t digit;
    u8 operands[OPERANDS_MAX];    /* enum operand: operand_types[] says kind and width */
    u32 attributes;
    u16 flags_read, flags_written, flags_undefined;
};
extern const struct opcode opcodes[];
extern const unsigned opcode_count;

#endif

/* The rows. A family is a file; a file may be empty of rows, but must be listed here. opcodes.c includes this part with
 * ROW defined. */
#ifdef ROW
#define INSN(name, map, opcode, prefix, digit, mod, o1, o2, o3, size, handler, feature, attributes, fr, fw, fu) \
    ROW(name, map, opcode, prefix, LNONE, WX, digit, mod, o1, o2, o3, __, size, handler, feature, attributes, fr, fw, fu)
#define VEX ROW
/* The same of both lengths, where 256 bits came later: the features are those of L0 and L1. */
#define VEX_BOTH(name, map, opcode, prefix, w, digit, mod, o1, o2, o3, o4, handler, feature, feature256) \
    VEX(name, map, opcode, prefix, L0, w, digit, mod, o1, o2, o3, o4, D, handler, feature, A_AVX, NONE, NONE, NONE) \
    VEX(name, map, opcode, prefix, L1, w, digit, mod, o1, o2, o3, o4, D, handler, feature256, A_AVX, NONE, NONE, NONE)
#include "opcodes_alu.h"      /* ADD .. CMP, TEST, INC, NOT, MOV, LEA, MOVZX, XCHG, CMPXCHG, XADD, SETcc, CMOVcc */
#include "opcodes_flow.h"     /* Jcc, JMP, CALL, RET, LOOP; PUSH, POP, ENTER, LEAVE; NOP, UD2, HLT */
#include "opcodes_integer.h"  /* shifts, multiplication, division, bits, BCD, strings, flags, misc */
#include "opcodes_system.h"   /* segments, far transfers, descriptor tables, CRn, DRn, MSRs, I/O, CPUID, ... */
#include "opcodes_x87.h"
#include "opcodes_mmx.h"
#include "opcodes_sse.h"      /* SSE, SSE2, SSE3, FXSAVE, XSAVE */
#include "opcodes_sse4.h"     /* SSSE3, SSE4.1, SSE4.2, AES, PCLMUL, SHA */
#include "opcodes_avx.h"      /* AVX, AVX2, F16C, FMA, VAES, VPCLMULQDQ, GFNI */
#undef INSN
#undef VEX
#undef VEX_BOTH
#endif
