/* The only reader of instruction encodings (Intel SDM 2A chapter 2): bytes to records. */
#include <stdlib.h>

#include "flags.h"
#include "opcodes.h"

/* Rows by map and opcode byte: rows[start[map][opcode]] up to the next, in table order. */
static struct {
    u16 *rows;
    u16 start[MAPS * 256 + 1];
    bool modrm[MAPS * 256];
} index_of;
static pthread_once_t index_once = PTHREAD_ONCE_INIT;

static bool needs_modrm(const struct opcode *o)
{
    if (o->digit != NO || o->mod != RM)
        return true;
    for (unsigned i = 0; i < OPERANDS_MAX; i++) {
        u8 kind = operand_types[o->operands[i]].kind;
        if (kind != FIXED && kind != OPCODE && kind != IMMEDIATE && kind != RELATIVE && kind != OFFSET && kind != FAR &&
            kind != VEX_V && kind != IS4)
            return true;
    }
    return false;
}

static bool row_has_opcode(const struct opcode *o, unsigned map, unsigned byte)
{
    return o->map == map && (o->attributes & A_OPREG ? byte >> 3 == o->opcode >> 3 : byte == o->opcode);
}

static void build_index(void)
{
    unsigned total = 0;
    for (unsigned i = 0; i < opcode_count; i++)
        total += opcodes[i].attributes & A_OPREG ? 8 : 1;
    index_of.rows = malloc(total * sizeof *index_of.rows);
    if (!index_of.rows)
        abort(); /* a few KiB, once a process */
    unsigned n = 0;
    for (unsigned key = 0; key < MAPS * 256; key++) {
        index_of.start[key] = (u16)n;
        for (unsigned i = 0; i < opcode_count; i++)
            if (row_has_opcode(&opcodes[i], key >> 8, key & 255)) {
                index_of.rows[n++] = (u16)i;
                index_of.modrm[key] |= needs_modrm(&opcodes[i]);
            }
    }
    index_of.start[MAPS * 256] = (u16)n;
}

void decode_init(void) { pthread_once(&index_once, build_index); }

/* What was read so far. */
struct bytes {
    const u8 *at;
    unsigned available, used;
    bool more;                /* ran out */
    bool too_long;            /* over 15 bytes (Intel SDM 2A 2.3.11) */
};

static u64 take(struct bytes *b, unsigned count)
{
    if (b->used + count > 15) {
        b->too_long = true;
        return 0;
    }
    if (b->used + count > b->available) {
        b->more = true;
        return 0;
    }
    u64 value = 0;
    memcpy(&value, b->at + b->used, count);
    b->used += count;
    return value;
}

struct prefixes {
    u8 rex;
    bool operand_size, address_size, lock;
    u8 rep;                   /* 0, 0xf2, 0xf3: the last one */
    u8 segment;               /* SEG_COUNT: none */
    bool vex, vex_l;          /* then rex, rep and operand_size are what VEX says */
    u8 vex_v;                 /* VEX.vvvv; a register has only its low three bits outside of 64-bit mode */
};

static void decode_memory(const struct prefixes *p, struct bytes *b, u8 modrm, bool code64, unsigned address_size,
                          struct record *r, bool *rip_relative)
{
    unsigned mod = modrm >> 6, rm = modrm & 7;
    r->base = r->index = GPR_ZERO * 8;
    r->scale = 0;
    r->disp = 0;
    r->seg = SEG_DS;
    if (address_size == 1) { /* Intel SDM 2A table 2-1 */
        static const u8 bases[8] = {RBX, RBX, RBP, RBP, RSI, RDI, RBP, RBX};
        static const u8 indexes[4] = {RSI, RDI, RSI, RDI};
        if (mod == 0 && rm == 6) {
            r->disp = (int16_t)take(b, 2);
        } else {
            r->base = bases[rm] * 8;
            if (rm < 4)
                r->index = indexes[rm] * 8;
            if (bases[rm] == RBP)
                r->seg = SEG_SS;
            r->disp = mod == 1 ? (int8_t)take(b, 1) : mod == 2 ? (int16_t)take(b, 2) : 0;
        }
    } else {
        unsigned base = rm;
        if (rm == 4) { /* SIB: table 2-3 */
            u8 sib = (u8)take(b, 1);
            unsigned index = (sib >> 3 & 7) | (p->rex & 2) << 2;
            base = sib & 7;
            if (index != 4)
                r->index = (u8)(index * 8);
            r->scale = sib >> 6;
        }
        if (base == 5 && mod == 0) {
            r->disp = (i32)take(b, 4);
            *rip_relative = rm == 5 && code64;
            if (*rip_relative)
                r->base = GPR_IP * 8;
        } else {
            if (base == RSP || base == RBP)
                r->seg = p->rex & 1 ? SEG_DS : SEG_SS;
            r->base = (u8)((base | (p->rex & 1) << 3) * 8);
            r->disp = mod == 1 ? (int8_t)take(b, 1) : mod == 2 ? (i32)take(b, 4) : 0;
        }
    }
}

static u8 gpr_offset(unsigned number, unsigned width, u8 rex)
{
    return (u8)(width == 1 && !rex && number >= 4 ? (number - 4) * 8 + 1 : number * 8);
}

static unsigned operand_size(const struct opcode *o, const struct prefixes *p, u64 key)
{
    bool code64 = key & KEY_CODE64, wide = p->rex & 8, narrow = p->operand_size && o->prefix != P66;
    switch (o->size) {
    case B: return 0;
    case W: return 1;
    case D: return 2;
    case Q: return 3;
    case Y: return code64 && wide ? 3 : 2;
    case S: if (code64) return narrow && !wide ? 1 : 3; break;
    case N: if (code64) return 3; break;
    default: if (code64) return wide ? 3 : narrow ? 1 : 2; break;
    }
    return !(key & KEY_CODE32) == narrow ? 2 : 1;
}

static bool prefix_matches(const struct opcode *o, const struct prefixes *p)
{
    switch (o->prefix) {
    case NP: return !p->rep && !p->operand_size;
    case P66: return !p->rep && p->operand_size;
    case PF3: return p->rep == 0xf3;
    case PF2: return p->rep == 0xf2;
    case NOREP: return !p->rep;
    default: return true;
    }
}

static bool vex_matches(const struct opcode *o, const struct prefixes *p)
{
    bool w = p->rex & 8;
    return !(o->length == L0 && p->vex_l) && !(o->length == L1 && !p->vex_l) && !(o->w == W0 && w) && !(o->w == W1 && !w);
}

static const struct opcode *find_row(struct vcpu *c, const struct prefixes *p, unsigned key, u8 modrm)
{
    bool code64 = c->key & KEY_CODE64;
    for (unsigned i = index_of.start[key]; i < index_of.start[key + 1]; i++) {
        const struct opcode *o = &opcodes[index_of.rows[i]];
        if (!prefix_matches(o, p) || (o->digit != NO && o->digit != (modrm >> 3 & 7)))
            continue;
        if (o->mod == MEM ? modrm >= 0xc0 : o->mod != RM && modrm < 0xc0)
            continue;
        if (o->mod >= REG0 && o->mod - REG0 != (modrm & 7))
            continue;
        if (p->vex != (o->length != LNONE) || !vex_matches(o, p))
            continue;
        if (o->attributes & (code64 ? A_NO64 : A_ONLY64) || ((o->attributes & A_NOREXB) && p->rex & 1))
            continue;
        if (!o->handlers || !has_feature(c, o->feature) || (o->attributes & A_AVX && !has_feature(c, FEATURE_AVX)))
            continue;
        return o;
    }
    return NULL;
}

/* The vector that the row's checks raise in this mode, or -1. Order: Intel SDM 3A table 6-2. */
static int check_row(const struct opcode *o, u64 key)
{
    u32 a = o->attributes;
    if ((a & A_PROTECTED && !(key & KEY_PROTECTED)) || (a & (A_SSE | A_MMX) && key & KEY_EM) ||
        (a & A_SSE && !(key & KEY_OSFXSR)) || (a & A_AVX && (key & (KEY_OSXSAVE | KEY_AVX)) != (KEY_OSXSAVE | KEY_AVX)))
        return VECTOR_UD;
    if ((a & (A_SSE | A_MMX | A_AVX) && key & KEY_TS) || (a & A_X87 && key & (KEY_TS | KEY_EM)) ||
        (a & A_FWAIT && (key & (KEY_TS | KEY_MP)) == (KEY_TS | KEY_MP)))
        return VECTOR_NM;
    if (a & A_CPL0 && !(key & KEY_CPL0))
        return VECTOR_GP;
    return -1;
}

static unsigned finish_raise(struct record *r, unsigned vector, unsigned length, bool *ends)
{
    r->run = op_raise;
    r->imm = (i32)vector;
    r->length = length > 15 ? 15 : length & 15;
    *ends = true;
    return r->length;
}

/* One operand of the row; false: #UD. */
static bool decode_operand(const struct opcode *o, unsigned operand, const struct prefixes *p, struct bytes *b, u64 key,
                           u8 opcode, u8 modrm, struct record *r)
{
    unsigned width = operand_types[operand].width, reg = (modrm >> 3 & 7) | (p->rex & 4) << 1;
    unsigned z = r->size == 1 ? 2 : 4, vvvv = p->vex_v & (key & KEY_CODE64 ? 15 : 7);
    bool is_register = r->prefix & PREFIX_REGISTER;
    switch (operand_types[operand].kind) {
    case REGISTER: r->reg = gpr_offset(reg, width, p->rex); break;
    case RM_OPERAND:
        if (is_register)
            r->rm = gpr_offset((modrm & 7) | (p->rex & 1) << 3, width, p->rex);
        break;
    case OPCODE: r->rm = gpr_offset((opcode & 7) | (p->rex & 1) << 3, width, p->rex); break;
    case MEMORY: return !is_register;
    case VSIB: { /* always with a SIB byte, whose index 4 is a register like any (2A 2.3.12) */
        r->index = r->index == GPR_ZERO * 8 ? 4 : r->index / 8;
        return !is_register && (modrm & 7) == 4 && r->prefix & 2 && r->index != reg && r->index != vvvv && reg != vvvv;
    }
    case SEGMENT: r->reg = modrm >> 3 & 7; return r->reg <= SEG_GS;
    case CONTROL: case DEBUGREG: case VECTOR: r->reg = (u8)reg; break;
    case MMXREG: r->reg = modrm >> 3 & 7; break;
    case VECTOR_RM: if (is_register) r->rm = (modrm & 7) | (p->rex & 1) << 3; break;
    case MMX_RM: if (is_register) r->rm = modrm & 7; break;
    case IMMEDIATE:
        if (width == 1)
            r->imm = (int8_t)take(b, 1);
        else if (width == 2)
            r->imm = (i32)take(b, 2);
        else if (width == 3)
            r->imm = (i32)take(b, 3);
        else if (width == WIDTH_Z)
            r->imm = z == 2 ? (int16_t)take(b, 2) : (i32)take(b, 4);
        else
            r->disp = (i64)take(b, 1u << r->size);
        break;
    case RELATIVE:
        r->imm = width == 1 ? (int8_t)take(b, 1) : z == 2 ? (int16_t)take(b, 2) : (i32)take(b, 4);
        break;
    case OFFSET:
        r->base = r->index = GPR_ZERO * 8;
        r->disp = (i64)take(b, 1u << (r->prefix & PREFIX_ADDRESS));
        r->seg = p->segment < SEG_COUNT && (!(key & KEY_CODE64) || p->segment >= SEG_FS) ? p->segment : SEG_DS;
        break;
    case VEX_V:
        r->vvvv = vvvv & 15;
        break;
    case IS4: /* a byte at the end; in code of 32 bits its top bit is ignored (2A 2.3.8). Bits 3:0 may hold an immediate */
        r->imm = (u8)take(b, 1);
        if (!(key & KEY_CODE64))
            r->imm &= 0x7f;
        break;
    case FAR:
        r->disp = (i64)take(b, z);
        r->imm = (i32)take(b, 2);
        break;
    default: break;
    }
    (void)o;
    return true;
}

/* VEX (Intel SDM 2A 2.3.5) after C4 or C5; the opcode byte. *map: MAPS for one that does not exist. */
extern struct operation operation_XCHG;

static u8 decode_vex(struct prefixes *p, struct bytes *b, bool three, bool code64, unsigned *map)
{
    u8 first = (u8)take(b, 1), last = three ? (u8)take(b, 1) : first;
    u8 inverted = three ? ~first >> 5 & 7 : ~first >> 5 & 4; /* R X B, as in REX */
    p->vex = true;
    p->rex = 0x40 | inverted | (three && last & 0x80 ? 8 : 0);
    p->vex_v = ~last >> 3 & 15;
    p->vex_l = last & 4;
    if (!code64) /* eight registers */
        p->rex &= 0x48;
    p->operand_size = (last & 3) == 1;
    p->rep = (last & 3) == 2 ? 0xf3 : (last & 3) == 3 ? 0xf2 : 0;
    unsigned number = three ? first & 31 : 1;
    *map = number >= 1 && number <= 3 ? M1 + number : MAPS;
    return (u8)take(b, 1);
}

unsigned decode(struct vcpu *c, const u8 *bytes, unsigned available, u64 ip, unsigned at, struct record *r, bool *ends)
{
    u64 key = c->key;
    bool code64 = key & KEY_CODE64;
    struct bytes b = {bytes, available, 0, false, false};
    struct prefixes p = {.segment = SEG_COUNT};
    (void)ip;
    memset(r, 0, sizeof *r);
    r->at = (u8)at;
    r->seg = SEG_DS;
    *ends = false;

    u8 byte;
    for (;;) {
        byte = (u8)take(&b, 1);
        if (b.more)
            return 0;
        if (b.too_long)
            return finish_raise(r, VECTOR_GP, 15, ends);
        if (code64 && (byte & 0xf0) == 0x40) {
            p.rex = byte;
            continue;
        }
        switch (byte) {
        case 0x66: p.operand_size = true; break;
        case 0x67: p.address_size = true; break;
        case 0xf0: p.lock = true; break;
        case 0xf2: case 0xf3: p.rep = byte; break;
        case 0x26: case 0x2e: case 0x36: case 0x3e: /* ignored in 64-bit mode, and there they do not undo FS or GS */
            if (!code64)
                p.segment = byte >> 3 & 3;
            break;
        case 0x64: p.segment = SEG_FS; break;
        case 0x65: p.segment = SEG_GS; break;
        default: goto opcode;
        }
        p.rex = 0; /* REX counts only directly before the opcode */
    }
opcode:;
    unsigned map = M1;
    if (byte == 0x0f) {
        map = M0F;
        byte = (u8)take(&b, 1);
        if (byte == 0x38 || byte == 0x3a) {
            map = byte == 0x38 ? M38 : M3A;
            byte = (u8)take(&b, 1);
        }
    } else if ((byte & 0xfe) == 0xc4) { /* VEX, unless it is LES or LDS: register form in protected mode */
        u8 next = b.used < available ? bytes[b.used] : 0xff;
        if (b.used >= available && b.used < 15)
            return 0;
        if (code64 || next >= 0xc0) {
            if (!(key & KEY_PROTECTED) || p.rex || p.lock || p.rep || p.operand_size)
                return finish_raise(r, VECTOR_UD, b.used + 1, ends); /* it is of `next`, too */
            byte = decode_vex(&p, &b, byte == 0xc4, code64, &map);
            if (map == MAPS)
                return finish_raise(r, VECTOR_UD, b.used, ends);
        }
    }
    unsigned entry = map << 8 | byte;
    u8 modrm = 0;
    if (index_of.modrm[entry])
        modrm = (u8)take(&b, 1);
    if (b.too_long)
        return finish_raise(r, VECTOR_GP, 15, ends);
    if (b.more)
        return 0;
    const struct opcode *o = find_row(c, &p, entry, modrm);
    if (!o)
        return finish_raise(r, VECTOR_UD, b.used, ends);

    unsigned address_size = code64 ? (p.address_size ? 2 : 3) : !(key & KEY_CODE32) == p.address_size ? 2 : 1;
    bool to_control = operand_types[o->operands[0]].kind == CONTROL || operand_types[o->operands[1]].kind == CONTROL ||
                      operand_types[o->operands[0]].kind == DEBUGREG || operand_types[o->operands[1]].kind == DEBUGREG;
    bool has_modrm = needs_modrm(o);
    bool is_register = !has_modrm || modrm >= 0xc0 || to_control; /* MOV CR, DR ignore mod */
    bool is_offset = operand_types[o->operands[0]].kind == OFFSET || operand_types[o->operands[1]].kind == OFFSET;
    bool rip_relative = false;
    r->id = (u16)(o - opcodes);
    r->size = (u8)operand_size(o, &p, key);
    r->vector = p.vex_l && o->length != LIG ? 5 : 4;
    r->prefix = (u8)(address_size | (p.rep == 0xf3 ? PREFIX_REP : p.rep == 0xf2 ? PREFIX_REPNE : 0) |
                     (p.lock ? PREFIX_LOCK : 0) | (p.operand_size ? PREFIX_66 : 0) | (code64 && p.rex & 8 ? PREFIX_REX_W : 0) |
                     (is_register && has_modrm ? PREFIX_REGISTER : 0));
    if (o->attributes & A_X87)
        r->imm = (byte & 7) << 8 | modrm; /* as FOP has it (Intel SDM 1 8.1.9) */
    if (!is_register)
        decode_memory(&p, &b, modrm, code64, address_size, r, &rip_relative);
    if (p.segment < SEG_COUNT && !(code64 && p.segment < SEG_FS))
        r->seg = p.segment;
    bool valid = true;
    for (unsigned i = 0; i < OPERANDS_MAX; i++)
        valid &= decode_operand(o, o->operands[i], &p, &b, key, byte, modrm, r);
    if (b.too_long)
        return finish_raise(r, VECTOR_GP, 15, ends);
    if (b.more)
        return 0;

    if (p.vex) { /* vvvv that names nothing is 1111 */
        bool uses_v = false;
        for (unsigned i = 0; i < OPERANDS_MAX; i++)
            uses_v |= operand_types[o->operands[i]].kind == VEX_V;
        valid &= uses_v || !p.vex_v;
    }

    int vector = check_row(o, key);
    if (!valid || (p.lock && !(o->attributes & A_LOCK && !is_register)))
        vector = VECTOR_UD;
    if (vector >= 0)
        return finish_raise(r, (unsigned)vector, b.used, ends);
    bool memory = !is_register || is_offset;
    bool fast = code64 && address_size == 3 && r->seg < SEG_FS;
    const struct handlers *h = amd_flags && o->handlers->amd ? o->handlers->amd : o->handlers;
    bool locks = key & KEY_SHARED && memory && (p.lock || o->operation == &operation_XCHG);
    r->run = !memory ? h->reg[r->size] : locks ? h->lock[r->size] : fast ? h->fast[r->size] : h->mem[r->size];
    if (!r->run)
        return finish_raise(r, VECTOR_UD, b.used, ends);
    r->length = b.used & 15;
    if (rip_relative)
        r->disp += at + b.used;
    r->has_link = operand_types[o->operands[0]].kind == RELATIVE;
    *ends = o->attributes & A_END;
    return b.used;
}
