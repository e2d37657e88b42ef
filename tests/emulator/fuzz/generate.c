#include "generate.h"
#include "core.h"
#include <stdlib.h>
#include <string.h>

enum { ROWS = 2048, NAMES = 4 };
enum flow { FLOW_NONE, FLOW_NEAR, FLOW_INDIRECT };
struct row {
    struct core_instruction i;
    u8 escape[2], escapes;
    bool modrm, vector, is_vex, vsib, lock, opreg, only64, no64, norexb, usable64, usable32;
    char prefix;               /* a any, n none, r no-rep, 6 f3 -> 3, f2 -> 2 */
    enum flow flow;
};
static struct row rows[ROWS];
static unsigned usable[2][ROWS], usable_count[2];
unsigned row_count;
u64 row_cases[ROWS];

/* ---- Random numbers -------------------------------------------------------------------------------------- */

u64 random64(struct random *r) /* splitmix64 */
{
    u64 z = r->state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

u64 random_value(struct random *r)
{
    static const u64 edges[] = {0, 1, 2, 3, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff,
                                0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff};
    u64 edge = edges[below(r, 16)];
    switch (below(r, 4)) {
    case 0: return edge;
    case 1: return edge + below(r, 5) - 2;
    case 2: return random64(r) >> (8 * below(r, 8));
    default: return random64(r);
    }
}

u64 random_floats(struct random *r)
{
    static const float singles[] = {0.0f, -0.0f, 1.0f, -1.5f, 2147483648.0f, 3e38f, 1e-45f, 1e-39f, 16777217.0f, 0.1f};
    static const double doubles[] = {0.0, -0.0, 1.0, -1.5, 2147483648.0, -9223372036854775808.0, 1e308, 5e-324, 1e-310, 0.1};
    u64 x, special = random64(r) & 0x8007ffff8007ffff;
    switch (below(r, 6)) {
    case 0: memcpy(&x, &doubles[below(r, 10)], 8); return x;
    case 1: memcpy(&x, &singles[below(r, 10)], 4); memcpy((u8 *)&x + 4, &singles[below(r, 10)], 4); return x;
    case 2: return special | (one_in(r, 2) ? 0x7ff0000000000000 : 0x7f8000007f800000); /* NaN, infinity */
    case 3: return (random64(r) & 0x807fffff807fffff) | (u64)(120 + below(r, 16)) << 55 | (120 + below(r, 16)) << 23;
    default: return random_value(r);
    }
}

/* ---- Segments ----------------------------------------------------------------------------------------------- */

enum { MIDDLE = 0x7f3 }; /* of the first page of code, and no border of anything */
const struct segment segments[SEGMENTS] = {
    {CODE, CODE_SIZE - 1, .code = true},
    {CODE, CODE_SIZE - 1, .code = true, .big = true},
    {CODE, CODE_SIZE - 1, .code = true, .less = true},
    /* These end where code is, */
    {CODE, PAGE + 7, .border = PAGE + 8, .code = true},
    {CODE, PAGE + 7, .border = PAGE + 8, .code = true, .big = true},
    {CODE + PAGE - 0x10000, 0xffff, .border = 0x10000, .code = true},
    {CODE + MIDDLE - 0x10000, 0xffff, .border = 0x10000, .code = true},
    /* or code runs over 10000h: at the border of two pages, within one, and then to an end, */
    {CODE + PAGE - 0x10000, 0x10000 + PAGE - 1, .border = 0x10000, .code = true},
    {CODE + MIDDLE - 0x10000, 0x10fff, .border = 0x10000, .code = true},
    {CODE + MIDDLE - 0x10000, 0x10013, .border = 0x10000, .code = true},
    /* where 66h makes branches of 16 bits, too. */
    {CODE + MIDDLE - 0x10000, 0x10fff, .border = 0x10000, .code = true, .big = true},
    {DATA, DATA_SIZE - 1, .big = false},
    {DATA, DATA_SIZE - 1, .big = true},
    {DATA, 0xffff, .big = false},
    {DATA + DATA_SIZE - 0x10000, 0xffff - DATA_SIZE, .down = true},
    {DATA + DATA_SIZE, 0xffffffff - DATA_SIZE, .pages = true, .big = true, .down = true}, /* base + offset wraps */
    {DATA + 0x800, 0x7ff, .less = true},
    {DATA + 0x1233, 0x4fe, .big = true},
    {0xfffff000, 0xffffffff, .pages = true, .big = true},
    {0, 0xffffffff, .pages = true, .big = true},
};

void generate_segments(struct random *r, struct mode *mode)
{
    *mode = (struct mode){.compat = true, .segmented = true};
    mode->use[IN_CS] = (u8)below(r, one_in(r, 2) ? WHOLE_CODE_SEGMENTS : CODE_SEGMENTS);
    for (unsigned i = IN_DS; i < USED; i++) {
        do
            mode->use[i] = (u8)(CODE_SEGMENTS + below(r, SEGMENTS - CODE_SEGMENTS));
        while (i == IN_SS && segments[mode->use[i]].less); /* SS can be written */
        if (i != IN_SS && one_in(r, 12))
            mode->use[i] = one_in(r, 2) ? NULL_SEGMENT : 0;
    }
}

/* The offset by which a segment has a linear address. */
static u32 offset_in(const struct mode *mode, unsigned use, u32 linear)
{
    u8 segment = mode->use[use];
    return mode->segmented && segment != NULL_SEGMENT ? linear - segments[segment].base : linear;
}

static bool is_16_bit(const struct mode *mode) { return mode->segmented && !segments[mode->use[IN_CS]].big; }

/* ---- The table -------------------------------------------------------------------------------------------- */

/* Without A_NO64: legacy-only rows that do not touch segment registers or leave the program. */
static const char *const legacy[] = {"AAA", "AAS", "AAM", "AAD", "DAA", "DAS", "SALC", "BOUND", "ARPL", "LAHF", "SAHF",
                                     "INC", "DEC", "PUSHA", "POPA", "ADD", "OR", "ADC", "SBB", "AND", "SUB", "XOR", "CMP", NULL};
/* With A_NOTEST, but good here: the SHA rows in register form only, since AMD does not ask for aligned memory there. */
static const char *const allowed[] = {"SHA1NEXTE", "SHA1MSG1", "SHA1MSG2", "SHA256MSG1", "SHA256MSG2",
                                      "SHA256RNDS2", "SHA1RNDS4", NULL};

static bool is_in(const char *name, const char *const *list)
{
    while (*list && strcmp(name, *list))
        list++;
    return *list;
}

static bool has_operand(const struct row *r, const char *name)
{
    for (int i = 0; i < 4; i++)
        if (!strcmp(r->i.operands[i], name))
            return true;
    return false;
}

static bool names_vvvv(const struct core_instruction *i)
{
    for (int n = 0; n < 4; n++)
        if (*i->operands[n] == 'H' || !strcmp(i->operands[n], "By"))
            return true;
    return false;
}

static bool from_modrm(const char *operand)
{
    static const char *const fixed[] = {"AL", "AX", "rAX", "CL", "DX", "One", "ST0", "STi", "XMM0", "Xb", "Xv", "Yb",
                                        "Yv", NULL};
    return *operand && strchr("EGMVWPQSCDNU", *operand) && !is_in(operand, fixed);
}

void generate_open(void)
{
    u32 a_lock = 0, a_opreg = 0, a_no64 = 0, a_only64 = 0, a_notest = 0, a_cpl0 = 0, a_norexb = 0;
    const char *name;
    for (unsigned bit = 0; (name = core_attribute_name(bit)); bit++) {
        struct { const char *name; u32 *mask; } known[] = {{"LOCK", &a_lock}, {"OPREG", &a_opreg}, {"NO64", &a_no64},
            {"ONLY64", &a_only64}, {"NOTEST", &a_notest}, {"CPL0", &a_cpl0}, {"NOREXB", &a_norexb}};
        for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
            if (!strcmp(name + (strncmp(name, "A_", 2) ? 0 : 2), known[i].name))
                *known[i].mask = 1u << bit;
    }
    for (row_count = 0; row_count < ROWS && core_instruction(row_count, &rows[row_count].i); row_count++) {
        struct row *r = &rows[row_count];
        const struct core_instruction *i = &r->i;
        r->escapes = (u8)(strlen(i->map) / 2);
        r->escape[0] = 0x0f;
        r->escape[1] = !strcmp(i->map, "0F38") ? 0x38 : 0x3a;
        r->modrm = i->digit >= 0 || strcmp(i->mod, "rm");
        for (int n = 0; n < 4; n++) {
            r->modrm |= from_modrm(i->operands[n]);
            r->vector |= *i->operands[n] && strchr("WVU", *i->operands[n]);
        }
        r->is_vex = *i->length;
        r->lock = i->attributes & a_lock;
        r->opreg = i->attributes & a_opreg;
        r->only64 = i->attributes & a_only64;
        r->no64 = i->attributes & a_no64;
        r->norexb = i->attributes & a_norexb;
        r->prefix = !strcmp(i->prefix, "any") ? 'a' : !strcmp(i->prefix, "none") ? 'n' : !strcmp(i->prefix, "no-rep") ? 'r' :
                    !strcmp(i->prefix, "66") ? '6' : !strcmp(i->prefix, "F3") ? '3' : '2';
        r->flow = has_operand(r, "Jb") || has_operand(r, "Jz") ? FLOW_NEAR :
                  !strcmp(i->name, "JMP") || !strcmp(i->name, "CALL") || !strcmp(i->name, "RET") ? FLOW_INDIRECT : FLOW_NONE;
        r->vsib = has_operand(r, "Mvs");
        bool testable = (!(i->attributes & (a_notest | a_cpl0)) || is_in(i->name, allowed)) && !(r->is_vex && !host_avx);
        r->usable64 = testable && !r->no64;
        r->usable32 = testable && !r->only64 && (!r->no64 || is_in(i->name, legacy));
        if (r->usable64)
            usable[0][usable_count[0]++] = row_count;
        if (r->usable32)
            usable[1][usable_count[1]++] = row_count;
    }
}

bool row_is_used(unsigned row, bool compat) { return compat ? rows[row].usable32 : rows[row].usable64; }

/* ---- One instruction ---------------------------------------------------------------------------------------- */

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
static const u8 pointers[] = {RBX, RSP, RBP, RSI, RDI, 12, 13, 14, 15}; /* these begin as addresses in the data area */
static const u8 indexes[] = {RDX, 8, 9};                              /* these as small numbers */
static const u8 scratch[] = {RAX, RCX, RDX, RAX, RCX, RDX, 8, 10, 11};

struct out { u8 *at; u8 *relative; }; /* where a RIP-relative displacement is */

static void put(struct out *o, u64 value, unsigned size)
{
    memcpy(o->at, &value, size);
    o->at += size;
}

static u32 data_address(struct random *r)
{
    if (one_in(r, 24))
        return DATA + PAGE - 1 - below(r, 15);
    if (one_in(r, 32))
        return one_in(r, 2) ? DATA - 1 - below(r, 16) : DATA + DATA_SIZE - 1 - below(r, 16);
    u32 offset = below(r, DATA_SIZE - 64);
    return DATA + (one_in(r, 3) ? offset : offset & ~15u);
}

static u8 pick(struct random *r, const u8 *list, unsigned count, bool high)
{
    u8 number;
    do
        number = list[below(r, count)];
    while (number > 7 && !high);
    return number;
}

/* ModRM and what follows, for a memory operand. *rex gets X and B. */
static void put_memory(struct random *r, struct out *o, u8 reg, const struct mode *mode, bool vector, bool extended, u8 *rex)
{
    bool compat = mode->compat;
    int displacement = one_in(r, 3) ? 0 : (int)below(r, one_in(r, 2) ? 256 : 2048) - 128;
    if (vector && !one_in(r, 8))
        displacement &= ~15;
    if (one_in(r, 6)) { /* an address without registers */
        u32 address = data_address(r);
        if (vector && !one_in(r, 8))
            address &= ~15u;
        put(o, (u64)(reg << 3 | (compat || one_in(r, 2) ? 5 : 4)), 1);
        if ((o->at[-1] & 7) == 4)
            put(o, 0x25, 1);
        else if (!compat)
            o->relative = o->at;
        put(o, offset_in(mode, IN_DS, address), 4);
        return;
    }
    u8 base = pick(r, pointers, sizeof pointers, extended);
    bool sib = (base & 7) == 4 || one_in(r, 3);
    u8 index = sib && !one_in(r, 4) ? pick(r, indexes, sizeof indexes, extended) : 4;
    bool fits = displacement >= -128 && displacement < 128;
    unsigned form = displacement == 0 && (base & 7) != 5 ? 0 : fits && !one_in(r, 4) ? 1 : 2;
    *rex |= (u8)(base >> 3 | (index >> 3) << 1);
    put(o, (u64)(form << 6 | reg << 3 | (sib ? 4 : base & 7)), 1);
    if (sib)
        put(o, (u64)(below(r, 4) << 6 | (index & 7) << 3 | (base & 7)), 1);
    put(o, (u64)(int64_t)displacement, form == 0 ? 0 : form == 1 ? 1 : 4);
}

/* The 16-bit form (Intel SDM 2A table 2-1). */
static void put_memory16(struct random *r, struct out *o, u8 reg, const struct mode *mode, bool vector)
{
    unsigned form = below(r, 3), rm = one_in(r, 2) ? 4 + below(r, 4) : below(r, 8);
    u64 displacement = one_in(r, 8) ? random_value(r) : below(r, 0x100) & (vector ? ~15u : ~0u);
    put(o, (u64)(form << 6 | reg << 3 | rm), 1);
    if (form == 0 && rm == 6)
        put(o, offset_in(mode, IN_DS, data_address(r)), 2);
    else
        put(o, displacement, form);
}

static bool is_name(const struct row *row, const char *name) { return !strcmp(row->i.name, name); }

/* Whether the opcode with one more prefix is in the table; if not, the host may have an instruction there that the core
 * has not (SSE4A). */
static bool leads_to_a_row(const struct row *row, u8 prefix)
{
    char wanted = prefix == 0x66 ? '6' : prefix == 0xf3 ? '3' : prefix == 0xf2 ? '2' : 0;
    if (!wanted || row->prefix == 'a' || (wanted == '6' && strchr("32", row->prefix)))
        return true;
    for (unsigned i = 0; i < row_count; i++)
        if (rows[i].prefix == wanted && rows[i].i.opcode == row->i.opcode && !strcmp(rows[i].i.map, row->i.map))
            return true;
    return false;
}

/* One instruction of the row into `code`, at guest address `ip`; its length. */
static unsigned emit(struct random *r, const struct row *row, const struct mode *mode, bool wild, u32 ip, u8 *code)
{
    bool compat = mode->compat, by16 = is_16_bit(mode), short_form = mode->segmented && one_in(r, 2);
    u8 prefixes[8], rex = 0, body[32];
    unsigned count = 0;
    struct out o = {body, NULL};
    bool allow66 = strchr("VS", *row->i.size) && strchr("ar32", row->prefix) && !row->is_vex, narrow = false;
    allow66 |= row->flow && mode->segmented; /* in 64-bit mode it differs between makers */
    bool extended = !compat && !one_in(r, 3);
    if (row->prefix == '6' || row->prefix == '3' || row->prefix == '2')
        prefixes[count++] = row->prefix == '6' ? 0x66 : row->prefix == '3' ? 0xf3 : 0xf2;
    if (row->is_vex)
        count = 0;
    if (allow66 && one_in(r, by16 ? 2 : 4) && !(wild && row->flow)) {
        prefixes[count++] = 0x66;
        narrow = true;
    }
    bool string = *row->i.operands[0] && strchr("XY", *row->i.operands[0]);
    if (row->prefix == 'a' && !row->is_vex && !row->flow && one_in(r, string ? 2 : 24))
        prefixes[count++] = one_in(r, 2) ? 0xf3 : 0xf2;
    if (one_in(r, compat ? mode->segmented ? 4 : 64 : 24))
        prefixes[count++] = 0x67;
    bool short_address = (count && prefixes[count - 1] == 0x67) != by16;
    if (mode->segmented && !row->flow && one_in(r, 3)) {
        static const u8 overrides[] = {0x26, 0x2e, 0x36, 0x3e};
        prefixes[count++] = overrides[below(r, 4)];
    }
    if (wild && !row->is_vex && one_in(r, 3)) {
        static const u8 any[] = {0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x26};
        prefixes[count] = any[below(r, sizeof any)];
        /* Prefixes of branches: 66 differs between makers, and F3 turns LOOPNE round on AMD. */
        bool good = row->flow ? prefixes[count] == 0x3e : leads_to_a_row(row, prefixes[count]);
        narrow |= good && prefixes[count] == 0x66;
        count += good;
    }
    narrow ^= by16;
    if (extended)
        rex = 0x40 | (one_in(r, 2) ? 8 : 0);
    unsigned reg = 0;
    bool memory = false;
    u8 modrm_at[16];
    struct out m = {modrm_at, NULL};
    if (row->modrm) {
        unsigned high = extended && one_in(r, 2) ? 8 : 0;
        reg = row->i.digit >= 0 ? (unsigned)row->i.digit : row->vector || one_in(r, 6) ? below(r, 8) | high :
              pick(r, scratch, sizeof scratch, extended);
        if (wild && row->i.digit < 0 && one_in(r, 4))
            reg = below(r, 8);
        rex |= reg & 8 ? 4 : 0;
        const char *mod = row->i.mod;
        bool sha = !strcmp(row->i.feature, "SHA");
        bool want_register = !strcmp(mod, "reg") || (!strcmp(mod, "rm") && (sha || one_in(r, 2)));
        if (strlen(mod) == 4) {
            put(&m, (u64)(0xc0 | (reg & 7) << 3 | (mod[3] - '0')), 1);
        } else if (want_register) {
            unsigned rm = row->vector || one_in(r, 3) ? below(r, 16) : pick(r, scratch, sizeof scratch, extended);
            if (!extended)
                rm &= 7;
            rex |= rm >> 3;
            put(&m, (u64)(0xc0 | (reg & 7) << 3 | (rm & 7)), 1);
        } else {
            memory = true;
            if (row->vsib) { /* a base, and any vector as its index */
                u8 base = pick(r, pointers, sizeof pointers, extended), index = (u8)below(r, extended ? 16 : 8);
                rex |= (u8)(base >> 3 | (index >> 3) << 1);
                put(&m, (u64)(0x44 | (reg & 7) << 3), 1);
                put(&m, (u64)(below(r, 4) << 6 | (index & 7) << 3 | (base & 7)), 1);
                put(&m, (u64)below(r, 128), 1);
            } else if (short_form)
                put_memory16(r, &m, reg & 7, mode, row->vector);
            else
                put_memory(r, &m, reg & 7, mode, row->vector, extended, &rex);
            if (row->lock && one_in(r, 6))
                prefixes[count++] = 0xf0;
        }
    }
    unsigned opcode = row->i.opcode;
    if (row->opreg) {
        unsigned number = one_in(r, 4) ? below(r, 8) : pick(r, scratch, sizeof scratch, false);
        if (is_name(row, "POP") || is_name(row, "MOV") || is_name(row, "XCHG"))
            number = pick(r, scratch, sizeof scratch, false);
        opcode += number;
        rex |= extended && one_in(r, 3) ? 1 : 0;
    }
    if (row->norexb)
        rex &= ~1;
    if (extended && rex == 0)
        rex = 0x40;
    if (row->is_vex) {
        unsigned v = names_vvvv(&row->i) ? below(r, 16) : 0;
        if (wild && one_in(r, 16))
            v = below(r, 16);
        u8 pp = row->prefix == '6' ? 1 : row->prefix == '3' ? 2 : row->prefix == '2' ? 3 : 0;
        if (compat) /* W is ignored there, but by AMD's processors in VPEXTRD and VPINSRD */
            rex = one_in(r, 4) && !is_name(row, "VPEXTRD") && !is_name(row, "VPINSRD") ? 8 : 0;
        if (row->i.w[1] != 'X')
            rex = (u8)((rex & ~8) | (row->i.w[1] == '1' ? 8 : 0));
        bool both = !strcmp(row->i.length, "LX") || !strcmp(row->i.length, "LIG");
        unsigned l = !strcmp(row->i.length, "L1") || (both && one_in(r, 2)) ? 4 : 0;
        put(&o, 0xc4, 1);
        put(&o, (u64)((~rex & 7) << 5 | (row->escapes == 1 ? 1 : row->escape[1] == 0x38 ? 2 : 3)), 1);
        put(&o, (u64)((rex & 8) << 4 | (~v & 15) << 3 | l | pp), 1);
    } else {
        if (extended)
            put(&o, rex, 1);
        put(&o, row->escape[0], row->escapes ? 1 : 0);
        put(&o, row->escape[1], row->escapes == 2 ? 1 : 0);
    }
    put(&o, opcode, 1);
    if (m.relative)
        o.relative = o.at + (m.relative - modrm_at);
    for (u8 *p = modrm_at; p < m.at; p++)
        put(&o, *p, 1);
    bool wide = rex & 8;
    unsigned size = *row->i.size == 'B' ? 1 : *row->i.size == 'W' ? 2 : *row->i.size == 'V' ? (wide ? 8 : narrow ? 2 : 4) :
                    *row->i.size == 'S' ? (narrow && !wide ? 2 : 8) : *row->i.size == 'N' && narrow ? 2 : 4;
    for (int i = 0; i < 4; i++) {
        const char *operand = row->i.operands[i];
        u64 value = random_value(r);
        if (!strcmp(operand, "Ib") || !strcmp(operand, "sIb") || !strcmp(operand, "Jb") || !strcmp(operand, "Lx"))
            put(&o, value, 1);
        else if (!strcmp(operand, "Iw"))
            put(&o, is_name(row, "RET") ? value & 0xf8 : value, 2);
        else if (!strcmp(operand, "IwIb"))
            put(&o, (value & 0x1ff) | (u64)below(r, 2) << 16, 3); /* deeper ones fault in no set order */
        else if (!strcmp(operand, "Iz") || !strcmp(operand, "Jz"))
            put(&o, value, size == 2 ? 2 : 4);
        else if (!strcmp(operand, "Iv"))
            put(&o, value, size);
        else if (!strcmp(operand, "Ob") || !strcmp(operand, "Ov"))
            put(&o, offset_in(mode, IN_DS, data_address(r)), compat ? (short_address ? 2 : 4) : short_address ? 4 : 8);
    }
    if (compat && memory) { /* 16-bit forms have another ModRM */
        for (unsigned i = 0; i < count; i++)
            if (prefixes[i] == 0x67)
                prefixes[i--] = prefixes[--count];
        if (short_form != by16)
            prefixes[count++] = 0x67;
    }
    for (unsigned i = 0; i < count; i++) { /* the order of prefixes does not matter, but for which REP is last */
        unsigned j = i + below(r, count - i);
        u8 swapped = prefixes[i];
        prefixes[i] = prefixes[j], prefixes[j] = swapped;
    }
    unsigned length = count + (unsigned)(o.at - body);
    memcpy(code, prefixes, count);
    memcpy(code + count, body, length - count);
    if (o.relative) {
        u8 *at = code + count + (o.relative - body);
        u32 target;
        memcpy(&target, at, 4);
        target -= ip + length;
        memcpy(at, &target, 4);
    }
    return length;
}

/* ---- Sequences --------------------------------------------------------------------------------------------------- */

bool undefined_flags(const struct sequence *s, u16 undefined[INSTRUCTIONS + 1])
{
    memset(undefined, 0, (INSTRUCTIONS + 1) * sizeof *undefined);
    for (unsigned i = 0; i < s->count; i++) {
        const struct instruction *n = &s->list[i];
        if (undefined[i] & n->read)
            return false;
        u16 out = (u16)((undefined[i] & ~n->written) | n->undefined);
        undefined[i + 1] |= out;
        if (n->target >= 0)
            undefined[n->target] |= out;
    }
    return true;
}

static bool acceptable(const struct row *row, bool indirect)
{
    if (row->flow == FLOW_INDIRECT || is_name(row, "CALL"))
        return indirect;
    if (indirect && row->i.flags_undefined)
        return false; /* nothing is known of what reads them */
    return true;
}

static bool has_prefix(const u8 *code, unsigned length, u8 prefix)
{
    for (unsigned i = 0; i < length && memchr("\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3", code[i], 11); i++)
        if (code[i] == prefix)
            return true;
    return false;
}
static bool has_66(const u8 *code, unsigned length) { return has_prefix(code, length, 0x66); }

/* 16-bit SHLD and SHRD by more than 16: result and flags are undefined (Intel SDM 2B). 90 with F3 and REX.B: PAUSE on
 * processors of Intel, XCHG of R8 on AMD's (SDM 2D table A-2 has both in one field). */
static bool maker_specific(const struct row *row, bool by16, const u8 *code, unsigned length)
{
    if (is_name(row, "XCHG") && row->opreg && code[length - 1] == 0x90 && has_prefix(code, length, 0xf3))
        return true;
    return (is_name(row, "SHLD") || is_name(row, "SHRD")) && has_66(code, length) != by16;
}

/* Bytes that must not run natively wherever a wild sequence may be misread. */
static bool dangerous(const u8 *code, unsigned length)
{
    for (unsigned i = 0; i < length; i++) {
        u8 a = code[i], b = i + 1 < length ? code[i + 1] : 0;
        /* FS, GS; MOV Sreg; INT, IRET, RETF; EVEX; XOP. SYSCALL, SYSENTER, POP FS, POP GS, LSS, LFS, LGS, groups 7, 15 */
        if (memchr("\x64\x65\x8e\xcd\xcf\xca\xcb\x62\x8f", a, 9))
            return true;
        if (a == 0x0f && memchr("\x05\x34\xa1\xa9\xb2\xb4\xb5\x01\xae", b, 9))
            return true;
        if (a == 0xff && ((b >> 3 & 7) == 3 || (b >> 3 & 7) == 5))
            return true; /* far */
    }
    return false;
}

static void add(struct sequence *s, const u8 *code, unsigned length, int row, u16 read, u16 written, u16 undefined)
{
    struct instruction *n = &s->list[s->count++];
    *n = (struct instruction){.at = (u16)s->length, .length = (u16)length, .read = read, .written = written,
                              .undefined = undefined, .row = row, .target = -1};
    memcpy(s->code + s->length, code, length);
    s->length += length;
}

void generate(struct random *r, const struct mode *mode, bool wild, struct sequence *s)
{
    bool compat = mode->compat, by16 = is_16_bit(mode);
    unsigned wanted = one_in(r, 3) ? 1 + below(r, 2) : 2 + below(r, 12);
    memset(s, 0, sizeof *s);
    s->mode = *mode;
    s->indirect = !wild && one_in(r, 6);
    u32 border = code_border(mode);
    s->ip = border ? code_base(mode) + border - 1 - below(r, 60) :
            one_in(r, 8) ? CODE + PAGE - 1 - below(r, 60) : CODE + 512 + below(r, 64);
    u16 undefined[INSTRUCTIONS + 1];
    memset(undefined, 0, sizeof undefined);
    u8 code[32];
    while (wanted-- && s->count + 3 < INSTRUCTIONS && s->length + 48 < CODE_MAX) {
        unsigned number = usable[compat][below(r, usable_count[compat])];
        const struct row *row = &rows[number];
        if (!acceptable(row, s->indirect))
            continue;
        u16 read = row->i.flags_read;
        if (wild || read & undefined[s->count]) { /* CMP defines all flags */
            u8 cmp[2] = {0x39, (u8)(0xc0 | below(r, 64))};
            if (undefined[s->count])
                add(s, cmp, 2, -1, 0, FLAGS_ARITHMETIC, 0);
            if (undefined[s->count]) /* a jump goes around it */
                continue;
        }
        u32 ip = s->ip + s->length;
        unsigned length = emit(r, row, mode, wild, ip, code);
        if (maker_specific(row, by16, code, length) || length > 15)
            continue;
        if (wild && dangerous(code, length))
            continue;
        u16 wrote = row->i.flags_written, loose = row->i.flags_undefined;
        if (wild && row->prefix != 'a') { /* an added prefix may have made another row of it */
            for (unsigned i = 0; i < row_count; i++)
                if (rows[i].i.opcode == row->i.opcode && !strcmp(rows[i].i.map, row->i.map))
                    loose |= rows[i].i.flags_undefined, wrote &= rows[i].i.flags_written;
        }
        unsigned index = s->count;
        add(s, code, length, (int)number, read, wrote, loose);
        u16 out = (u16)((undefined[index] & ~wrote) | loose);
        undefined[s->count] |= out;
        if (row->flow == FLOW_NEAR) {
            int target = (int)(s->count + below(r, 4));
            s->list[index].target = target < INSTRUCTIONS ? target : INSTRUCTIONS - 1;
            undefined[s->list[index].target] |= out;
        }
    }
    s->list[s->count] = (struct instruction){.at = (u16)s->length, .length = mode->segmented ? FAR_EXIT : 5, .row = -1, .target = -1};
    for (unsigned i = 0; i < s->count; i++) {
        struct instruction *n = &s->list[i];
        if (n->target < 0)
            continue;
        if (n->target > (int)s->count)
            n->target = (int)s->count;
        bool byte = false;
        for (int k = 0; k < 3; k++)
            byte |= !strcmp(rows[n->row].i.operands[k], "Jb");
        int relative = s->list[n->target].at - (n->at + n->length);
        if (byte && relative > 127) {
            n->target = (int)i + 1;
            relative = 0;
        }
        unsigned size = byte ? 1 : has_66(s->code + n->at, n->length) != by16 ? 2 : 4;
        memcpy(s->code + n->at + n->length - size, &relative, size);
    }
    if (mode->segmented) {
        static const u8 jump[] = {0xea, EXIT64 & 255, EXIT64 >> 8 & 255, EXIT64 >> 16 & 255, EXIT64 >> 24, 0x33, 0};
        s->code[s->length] = by16 ? 0x66 : 0x3e;
        memcpy(s->code + s->length + 1, jump, sizeof jump);
        s->length += FAR_EXIT;
        return;
    }
    u32 end = s->ip + s->length + 5, to = (compat ? EXIT32 : EXIT64) - end;
    s->code[s->length] = 0xe9;
    memcpy(s->code + s->length + 1, &to, 4);
    s->length += 5;
}

void generate_state(struct random *r, const struct sequence *s, struct state *state)
{
    memset(state, 0, sizeof *state);
    for (int i = 0; i < 16; i++)
        state->gpr[i] = random_value(r);
    for (unsigned i = 0; i < sizeof pointers; i++)
        if (!one_in(r, 6))
            state->gpr[pointers[i]] = DATA + ((512 + below(r, DATA_SIZE - 1024)) & (one_in(r, 6) ? ~0u : ~15u));
    for (unsigned i = 0; i < sizeof indexes; i++)
        if (!one_in(r, 6))
            state->gpr[indexes[i]] = one_in(r, 2) ? 16 * below(r, 8) : below(r, 128);
    if (one_in(r, 2))
        state->gpr[RCX] = below(r, 40);
    if (s->mode.segmented) { /* offsets; some at the ends of segments, and of 16 bits; pairs of registers for 16-bit forms */
        for (unsigned i = 0; i < 5; i++) {
            unsigned number = pointers[i], use = number == RSP || number == RBP ? IN_SS : number == RDI ? IN_ES : IN_DS;
            u8 segment = s->mode.use[use];
            if (state->gpr[number] - DATA < DATA_SIZE)
                state->gpr[number] = offset_in(&s->mode, use, (u32)state->gpr[number]);
            if (one_in(r, 12) && segment != NULL_SEGMENT)
                state->gpr[number] = (one_in(r, 2) ? segments[segment].limit : 0xffff) + 8 - below(r, 24);
            if ((number == RSI || number == RDI) && one_in(r, 4))
                state->gpr[number] = below(r, 256);
        }
    }
    if (s->indirect && !one_in(r, 3))
        state->gpr[one_in(r, 2) ? RAX : 11] = s->ip - code_base(&s->mode) + s->list[below(r, s->count + 1)].at;
    if (s->mode.compat) {
        for (int i = 0; i < 16; i++)
            state->gpr[i] = i < 8 ? (u32)state->gpr[i] : 0;
    }
    state->rip = s->ip;
    state->rflags = 0x202 | (random64(r) & (FLAGS_ARITHMETIC | (one_in(r, 4) ? 0x400 : 0)));
    u16 control[2] = {0x37f, (u16)(below(r, 8) << 11)};
    if (one_in(r, 4)) { /* rounding, precision, masks; flags only of what is masked, so that no exception waits */
        control[0] = (u16)(0x40 | below(r, 16) << 8 | (one_in(r, 2) ? 0x3f : below(r, 64)));
        control[1] |= (u16)((random64(r) & 0x4700) | (below(r, 64) & control[0]));
    }
    memcpy(state->fx, control, 4);
    state->fx[4] = one_in(r, 2) ? 0 : one_in(r, 2) ? 0xff : (u8)random64(r);
    u32 mxcsr = 0x1f80, mask = 0xffff;
    switch (below(r, 8)) {
    case 0: mxcsr |= below(r, 4) << 13; break;
    case 1: mxcsr |= one_in(r, 2) ? 0x8000 : 0x40; break;
    case 2: mxcsr = (u32)random64(r) & (one_in(r, 2) ? 0xffff : 0xe07f); mxcsr |= one_in(r, 2) ? 0x1f80 : 0; break;
    }
    memcpy(state->fx + 24, &mxcsr, 4);
    memcpy(state->fx + 28, &mask, 4);
    for (int i = 0; i < 8; i++) {
        u64 mantissa = random64(r) | 1ull << 63;
        u16 exponent = (u16)(one_in(r, 3) ? 0x3fff : one_in(r, 2) ? 0xbfff : 0x3fc0 + below(r, 128));
        if (one_in(r, 4)) { /* zero, denormal, infinity, NaN, and what has no name */
            mantissa = one_in(r, 2) ? random_value(r) : (u64)(2 + below(r, 2)) << 62;
            exponent = (u16)((one_in(r, 2) ? 0x7fff : one_in(r, 2) ? 0 : below(r, 0x8000)) | below(r, 2) << 15);
        }
        memcpy(state->fx + 32 + 16 * i, &mantissa, 8);
        memcpy(state->fx + 40 + 16 * i, &exponent, 2);
    }
    for (int i = 0; i < 32; i++) {
        u64 x = random_floats(r);
        memcpy(state->fx + 160 + 8 * i, &x, 8);
        x = random_floats(r);
        memcpy(state->ymm + 8 * i, &x, 8);
    }
    if (one_in(r, 4)) /* small numbers of elements, for gathers */
        for (unsigned i = 0; i < 4; i++)
            for (unsigned at = 0; at < 16; at += 8) {
                u64 numbers = below(r, 256) | (u64)(one_in(r, 2) ? below(r, 256) : 0) << 32;
                memcpy(state->fx + 160 + 16 * i + at, &numbers, 8);
                memcpy(state->ymm + 16 * i + at, &numbers, 8);
            }
}
