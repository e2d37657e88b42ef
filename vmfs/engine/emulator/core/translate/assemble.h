/* Host instructions: x86-64 encodings (Intel SDM 2A chapter 2), as bytes. */
#ifndef VMFS_ASSEMBLE_H
#define VMFS_ASSEMBLE_H

#include "opcodes.h"

enum { NO_REGISTER = 0xff };
/* A ModRM operand of the host: a register, or [base + (index << scale) + disp]. */
struct place { bool memory; u8 base /* or the register */, index, scale; i32 disp; };

ALWAYS_INLINE struct place in_register(unsigned reg) { return (struct place){.base = (u8)reg}; }
ALWAYS_INLINE struct place in_memory(unsigned base, i32 disp)
{
    return (struct place){.memory = true, .base = (u8)base, .index = NO_REGISTER, .disp = disp};
}

enum { /* of an instruction */
    I_W = 1, I_66 = 2, I_F3 = 4, I_F2 = 8, I_BYTE = 16 /* registers 4 to 7 are SPL to DIL: they need a REX */,
    I_HIGH = 32 /* a register is AH to BH: none may need a REX */,
};

struct code { u8 *at; };

ALWAYS_INLINE void put8(struct code *code, u64 value) { *code->at++ = (u8)value; }
ALWAYS_INLINE void put32(struct code *code, u64 value) { u32 v = (u32)value; memcpy(code->at, &v, 4); code->at += 4; }
ALWAYS_INLINE void put64(struct code *code, u64 value) { memcpy(code->at, &value, 8); code->at += 8; }
ALWAYS_INLINE void put_bytes(struct code *code, u64 value, unsigned bytes) { memcpy(code->at, &value, 8); code->at += bytes; }

static inline void put_opcode(struct code *code, unsigned flags, unsigned rex, bool needs_rex, enum map map, unsigned opcode)
{
    if (flags & I_66)
        put8(code, 0x66);
    if (flags & (I_F3 | I_F2))
        put8(code, flags & I_F3 ? 0xf3 : 0xf2);
    rex |= flags & I_W ? 8 : 0;
    if (rex || needs_rex)
        put8(code, 0x40 | rex);
    if (map != M1)
        put8(code, 0x0f);
    if (map == M38 || map == M3A)
        put8(code, map == M38 ? 0x38 : 0x3a);
    put8(code, opcode);
}

/* ModRM, SIB and displacement. */
static inline void put_operands(struct code *code, unsigned reg, struct place p)
{
    bool has_index = p.memory && p.index != NO_REGISTER;
    reg = (reg & 7) << 3;
    if (!p.memory) {
        put8(code, 0xc0 | reg | (p.base & 7));
        return;
    }
    bool none = p.base == NO_REGISTER;
    unsigned mod = none ? 0 : !p.disp && (p.base & 7) != RBP ? 0 : p.disp == (int8_t)p.disp ? 1 : 2;
    if (none || has_index || (p.base & 7) == RSP) {
        put8(code, mod << 6 | reg | 4);
        put8(code, p.scale << 6 | (has_index ? p.index & 7 : 4) << 3 | (none ? 5 : p.base & 7));
    } else {
        put8(code, mod << 6 | reg | (p.base & 7));
    }
    if (mod == 1)
        put8(code, (u64)p.disp);
    else if (mod == 2 || none)
        put32(code, (u64)(i64)p.disp);
}

/* With a ModRM byte; `reg` is a register or a digit. An immediate is the caller's. */
static inline void put_modrm(struct code *code, unsigned flags, enum map map, unsigned opcode, unsigned reg, struct place p)
{
    bool has_index = p.memory && p.index != NO_REGISTER;
    unsigned rex = (reg >> 3) << 2 | (has_index ? (unsigned)p.index >> 3 << 1 : 0) | (p.base != NO_REGISTER ? p.base >> 3 : 0);
    bool byte = flags & I_BYTE && ((reg >= 4 && reg < 8) || (!p.memory && p.base >= 4 && p.base < 8));
    put_opcode(code, flags, rex, byte && !(flags & I_HIGH), map, opcode);
    put_operands(code, reg, p);
}

/* The same with VEX (SDM 2A 2.3). pp: 0, or 1 for 66, 2 for F3, 3 for F2. */
static inline void put_vex(struct code *code, enum map map, unsigned pp, bool l, bool w, unsigned opcode, unsigned reg, unsigned vvvv,
                           struct place p)
{
    bool x = p.memory && p.index != NO_REGISTER && p.index >> 3, b = p.base != NO_REGISTER && p.base >> 3;
    unsigned last = (~vvvv & 15) << 3 | (unsigned)l << 2 | pp;
    if (!x && !b && !w && map == M0F) {
        put8(code, 0xc5);
        put8(code, (reg >> 3 ? 0 : 0x80) | last);
    } else {
        put8(code, 0xc4);
        put8(code, (reg >> 3 ? 0 : 0x80) | (x ? 0 : 0x40) | (b ? 0 : 0x20) | (map == M0F ? 1 : map == M38 ? 2 : 3));
        put8(code, (w ? 0x80 : 0) | last);
    }
    put8(code, opcode);
    put_operands(code, reg, p);
}

/* ---- By name -------------------------------------------------------------------------------------------------------- */

ALWAYS_INLINE void load64(struct code *code, unsigned reg, struct place p) { put_modrm(code, I_W, M1, 0x8b, reg, p); }
ALWAYS_INLINE void load32(struct code *code, unsigned reg, struct place p) { put_modrm(code, 0, M1, 0x8b, reg, p); }
ALWAYS_INLINE void store64(struct code *code, struct place p, unsigned reg) { put_modrm(code, I_W, M1, 0x89, reg, p); }
ALWAYS_INLINE void lea64(struct code *code, unsigned reg, struct place p) { put_modrm(code, I_W, M1, 0x8d, reg, p); }
static inline void load_constant(struct code *code, unsigned reg, u64 value)
{
    if (value == (u32)value) {
        put_opcode(code, 0, reg >> 3, false, M1, 0xb8 + (reg & 7));
        put32(code, value);
    } else if (value == (u64)(i64)(i32)value) {
        put_modrm(code, I_W, M1, 0xc7, 0, in_register(reg));
        put32(code, value);
    } else {
        put_opcode(code, I_W, reg >> 3, false, M1, 0xb8 + (reg & 7));
        put64(code, value);
    }
}
/* digit of the group of 81: 0 ADD, 1 OR, 4 AND, 5 SUB, 6 XOR, 7 CMP */
enum { GROUP_ADD, GROUP_OR, GROUP_ADC, GROUP_SBB, GROUP_AND, GROUP_SUB, GROUP_XOR, GROUP_CMP };
static inline void alu_constant(struct code *code, unsigned flags, unsigned digit, struct place p, i32 value)
{
    if (value == (int8_t)value) {
        put_modrm(code, flags, M1, 0x83, digit, p);
        put8(code, (u64)value);
    } else {
        put_modrm(code, flags, M1, 0x81, digit, p);
        put32(code, (u64)(i64)value);
    }
}
/* Jumps forward, of four bytes: where to write the distance. */
static inline u8 *jump_if(struct code *code, unsigned condition)
{
    put8(code, 0x0f);
    put8(code, 0x80 | condition);
    put32(code, 0);
    return code->at - 4;
}
static inline u8 *jump(struct code *code)
{
    put8(code, 0xe9);
    put32(code, 0);
    return code->at - 4;
}
ALWAYS_INLINE void land(u8 *jump, const u8 *target)
{
    i32 distance = (i32)(target - (jump + 4));
    memcpy(jump, &distance, 4);
}
enum { CC_O, CC_NO, CC_B, CC_AE, CC_E, CC_NE, CC_BE, CC_A, CC_S, CC_NS, CC_P, CC_NP, CC_L, CC_GE, CC_LE, CC_G };

#endif
