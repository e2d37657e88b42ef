/* The emitters: E_NAME for the rows of a name. Most instructions are their own host code, with other registers and with the
 * host's address of the memory operand: `copy` makes that from the row's encoding and operands. */
#include "flags.h"
#include "operands.h"

/* ---- Copies ------------------------------------------------------------------------------------------------------------- */

/* Whether a register operand of ModRM may be its place in struct vcpu. Not what writes a part of it, because a load of all of it
 * would wait for that store. XCHG would lock, a bit of memory by a register may lie anywhere, and OF of a rotation is kept in the one
 * form, and computed in the other. */
static bool may_be_memory(const struct record *r, const struct use *u, unsigned bytes, unsigned traits)
{
    const struct opcode *o = &opcodes[r->id];
    return u->is && u->scratch != NO_REGISTER && o->mod == RM && !(u->writes && bytes != 8) && !(traits & WRITES_SECOND) &&
           !u->high && !(traits & (ROTATES | READS_CARRY)) && !(traits & KEEPS_UNDEFINED && operand_types[o->operands[1]].kind == REGISTER);
}
/* Of two registers, ModRM.rm is to be the one in struct vcpu: ADD to CMP, and MOV, have both directions. */
static bool exchange(const struct record *r, struct use *reg, struct use *rm, unsigned *opcode)
{
    const struct opcode *o = &opcodes[r->id];
    bool has_both = o->map == M1 && (*opcode < 0x40 || (*opcode >= 0x88 && *opcode < 0x8c));
    if (!has_both || !reg->is || !rm->is || reg->scratch == NO_REGISTER || rm->scratch != NO_REGISTER || reg->high || rm->high)
        return false;
    struct use other = *reg;
    *reg = *rm;
    *rm = other;
    if (rm->host == T0)
        rm->host = rm->scratch = T1;
    *opcode ^= 2;
    return true;
}

/* What the host's instruction keeps of undefined flags: PF is set, the others are clear, as the handlers have it. RSP's low byte is 0. */
static void clear_kept(struct translation *t)
{
    if (t->traits & CLEARS_UNDEFINED && amd_flags && t->precise & t->row->flags_undefined)
        put_modrm(&t->code, I_W, M1, 0x85, RSP, in_register(RSP)); /* TEST */
}

/* The prefix of an instruction whose memory operand other CPUs may access at the same time. */
static void put_lock(struct translation *t, const struct record *r)
{
    if (r->prefix & PREFIX_LOCK && t->c->key & KEY_SHARED)
        put8(&t->code, 0xf0);
}

/* XCHG of AL and AH, or of another one's, which is the operand then. */
static void swap_halves(struct code *code, struct use *u)
{
    u->host ^= 4;
    u->high = !u->high;
    put_modrm(code, I_HIGH, M1, 0x86, u->host & 3, in_register((u->host & 3) + 4));
}

static bool copy_as(struct translation *t, const struct record *r, unsigned traits, unsigned opcode, bool by_condition)
{
    const struct opcode *o = &opcodes[r->id];
    struct use reg = {0}, rm = {0};
    if (o->attributes & A_NO64) {
        if (opcode != 0x82)
            return false;
        opcode = 0x80;
    }
    bool memory = false, modrm = o->digit != NO, opcode_register = false;
    unsigned immediate = 0, bytes = 0, vector = NO_REGISTER, vector_rm = NO_REGISTER;
    if (!host_has(t->translator, o->feature))
        return false;
    for (unsigned i = 0; i < OPERANDS_MAX; i++) {
        unsigned width = bytes_of(r, o->operands[i]);
        bool reads = i || traits & READS_FIRST, writes = traits & (i == 0 ? WRITES_FIRST : i == 1 ? WRITES_SECOND : 0);
        switch (operand_types[o->operands[i]].kind) {
        case FIXED: break;
        case REGISTER: reg = use_of(r->reg, width, T0, reads, writes); modrm = true; break;
        case OPCODE: rm = use_of(r->rm, width, T1, reads, writes); opcode_register = true; break;
        case VECTOR: vector = r->reg; modrm = true; break;
        case VECTOR_RM:
            modrm = true;
            bytes = width;
            if (r->prefix & PREFIX_REGISTER)
                vector_rm = r->rm;
            else
                memory = true;
            break;
        case RM_OPERAND: case MEMORY:
            modrm = true;
            bytes = width;
            if (r->prefix & PREFIX_REGISTER)
                rm = use_of(r->rm, width, T1, reads, writes);
            else
                memory = true;
            break;
        case IMMEDIATE:
            immediate = width == WIDTH_Z ? (r->size == 1 ? 2 : 4) : width;
            if (immediate > 4)
                return false;
            break;
        default: return false;
        }
    }
    bool high = reg.high || rm.high;
    bool swaps = high && memory && !(traits & WRITES_RAX); /* T1 needs a REX, with which there is no AH */
    if (high && !swaps && (memory || (reg.is && reg.host > 7) || (rm.is && rm.host > 7) || r->size == 3))
        return false;
    if (memory)
        will_access(t, bytes, traits & WRITES_FIRST && operand_types[o->operands[0]].kind != REGISTER && operand_types[o->operands[0]].kind != VECTOR,
                    bytes == 16 && !(traits & UNALIGNED) ? 16 : 1);
    if (t->asking)
        return true;

    exchange(r, &reg, &rm, &opcode);
    bool in_vcpu = !opcode_register && may_be_memory(r, &rm, bytes, traits);
    if (reg.is && rm.is && reg.offset == rm.offset && rm.scratch != NO_REGISTER && r->size >= 2 && o->operation == &operation_XOR) {
        reg = (struct use){.is = true, .host = T1, .scratch = NO_REGISTER}; /* zero, whatever it was */
        rm.reads = in_vcpu = false;
        if (o->operands[0] == oGv)
            rm.writes = true;
    }
    unsigned first_kind = operand_types[o->operands[0]].kind;
    if (memory)
        to_memory(t, r, false);
    else
        begin_flags(t, r);
    struct code *code = &t->code;
    bool vector_first = first_kind == VECTOR;
    if (vector_rm != NO_REGISTER)
        use_vector(t, vector_rm, first_kind != VECTOR_RM || traits & READS_FIRST || vector == vector_rm || t->ymm,
                   first_kind == VECTOR_RM && traits & WRITES_FIRST);
    if (vector != NO_REGISTER) /* its upper half is kept */
        use_vector(t, vector, !vector_first || traits & READS_FIRST || t->ymm, vector_first && traits & WRITES_FIRST);
    if (by_condition)
        opcode = (opcode & 0xf0) | emit_condition(t, opcode & 15);
    in_vcpu &= !take_held(t, &reg, &rm);
    load_use(t, &reg);
    if (!in_vcpu)
        load_use(t, &rm);
    unsigned flags = o->prefix == PF3 ? I_F3 : o->prefix == PF2 ? I_F2 : 0;
    if (o->size != B)
        flags |= r->size == 1 ? I_66 : r->size == 3 ? I_W : 0;
    if (o->prefix == P66)
        flags |= I_66;
    if (swaps) {
        swap_halves(code, &reg);
        high = false;
    }
    /* registers of a byte need a REX, but for AH to BH; the other operand of MOVZX is not one */
    bool byte = (reg.byte && !reg.high) || (rm.byte && !rm.high);
    clear_kept(t);
    if (memory)
        put_lock(t, r);
    flags |= high ? I_HIGH : byte ? I_BYTE : 0;
    unsigned in_reg = o->digit != NO ? (unsigned)o->digit : vector != NO_REGISTER ? vector : reg.host;
    if (modrm)
        put_modrm(code, flags, o->map, opcode, in_reg,
                  memory ? accessed(t) : in_vcpu ? guest_place(rm.offset) : in_register(vector_rm != NO_REGISTER ? vector_rm : rm.host));
    else if (rm.is)
        put_opcode(code, flags, rm.host >> 3, rm.byte && !rm.high && rm.host > 3, o->map, (opcode & 0xf8) | (rm.host & 7));
    else
        put_opcode(code, flags, 0, false, o->map, opcode);
    if (immediate)
        put_bytes(code, (u64)(i64)r->imm, immediate);
    if (swaps)
        swap_halves(code, &reg);
    store_use(t, &reg);
    if (!in_vcpu)
        store_use(t, &rm);
    return true;
}

static bool copy(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    return copy_as(t, r, o->emitter->traits, o->opcode, false);
}
static bool copy_by_condition(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    return copy_as(t, r, o->emitter->traits, o->opcode, true);
}
#define COPY(name, traits) const struct emitter E_##name = {copy, traits}

COPY(ADD, CHANGES); COPY(OR, CHANGES); COPY(ADC, CHANGES); COPY(SBB, CHANGES); COPY(AND, CHANGES); COPY(SUB, CHANGES);
COPY(XOR, CHANGES); COPY(CMP, READS_FIRST); COPY(TEST, READS_FIRST); COPY(NOT, CHANGES); COPY(NEG, CHANGES);
COPY(MOVZX, WRITES_FIRST); COPY(MOVSX, WRITES_FIRST); COPY(MOVSXD, WRITES_FIRST);
COPY(XCHG, CHANGES | WRITES_SECOND); COPY(XADD, CHANGES | WRITES_SECOND); COPY(CMPXCHG, CHANGES | WRITES_RAX);
COPY(ROL, CHANGES | SHIFT | ROTATES); COPY(ROR, CHANGES | SHIFT | ROTATES); COPY(RCL, CHANGES | SHIFT | READS_CARRY);
COPY(RCR, CHANGES | SHIFT | READS_CARRY); COPY(SHL, CHANGES | SHIFT); COPY(SHR, CHANGES | SHIFT); COPY(SAR, CHANGES | SHIFT);
COPY(MUL, READS_FIRST | WRITES_RAX | WRITES_RDX | CLEARS_UNDEFINED);
COPY(CBW, WRITES_RAX); COPY(CWD, WRITES_RDX);
COPY(POPCNT, WRITES_FIRST); COPY(TZCNT, WRITES_FIRST | CLEARS_UNDEFINED); COPY(LZCNT, WRITES_FIRST | CLEARS_UNDEFINED);
COPY(BSF, CHANGES); COPY(BSR, CHANGES); /* of zero, they keep the register */
COPY(CLC, 0); COPY(STC, 0); COPY(CMC, 0);
COPY(ADCX, CHANGES); COPY(ADOX, CHANGES);

#define BY(name) const struct emitter E_##name = {copy_by_condition, CONDITION_TRAITS}
#define CONDITION_TRAITS CHANGES
BY(CMOVO); BY(CMOVNO); BY(CMOVB); BY(CMOVAE); BY(CMOVE); BY(CMOVNE); BY(CMOVBE); BY(CMOVA); BY(CMOVS); BY(CMOVNS); BY(CMOVP);
BY(CMOVNP); BY(CMOVL); BY(CMOVGE); BY(CMOVLE); BY(CMOVG);
#undef CONDITION_TRAITS
#define CONDITION_TRAITS WRITES_FIRST
BY(SETO); BY(SETNO); BY(SETB); BY(SETAE); BY(SETE); BY(SETNE); BY(SETBE); BY(SETA); BY(SETS); BY(SETNS); BY(SETP); BY(SETNP);
BY(SETL); BY(SETGE); BY(SETLE); BY(SETG);

/* SHLD, SHRD of 16 bits by more than 16 are what the interpreter says. */
static bool double_shift(struct translation *t, const struct record *r) { return r->size > 1 && copy(t, r); }
const struct emitter E_SHLD = {double_shift, CHANGES | SHIFT}, E_SHRD = {double_shift, CHANGES | SHIFT};

static bool swap_bytes(struct translation *t, const struct record *r) { return r->size > 1 && copy(t, r); } /* 16: undefined */
const struct emitter E_BSWAP = {swap_bytes, CHANGES};

/* INC, DEC: 40 to 4F are prefixes in the host's mode. */
static bool step(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    if (!(o->attributes & A_NO64))
        return copy(t, r);
    if (t->asking)
        return true;
    begin_flags(t, r);
    unsigned host = pinned(r->rm);
    if (host == NO_REGISTER)
        return true; /* there are eight registers */
    put_modrm(&t->code, r->size == 1 ? I_66 : 0, M1, 0xff, o->operation == &operation_DEC, in_register(host));
    return true;
}
const struct emitter E_INC = {step, CHANGES}, E_DEC = {step, CHANGES};

/* DIV, IDIV: a quotient that does not fit is the handler's, whose #DE it is. Of IDIV so is what is not a sign extension, by 0 or by
 * -1. Flags stay as they are: they are undefined, and Intel's processors keep them. */
static bool divide(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    if (r->size < 2)
        return false;
    if (!(r->prefix & PREFIX_REGISTER))
        will_access(t, 1u << r->size, false, 1);
    if (t->asking)
        return true;
    struct code *code = &t->code;
    unsigned width = r->size == 3 ? I_W : 0;
    struct place divisor;
    flags_aside(t, r);
    if (r->prefix & PREFIX_REGISTER) {
        divisor = pinned(r->rm) == NO_REGISTER ? guest_place(r->rm) : in_register(pinned(r->rm));
    } else {
        to_memory(t, r, false);
        divisor = accessed(t);
    }
    struct stub *s = add_stub(t, STUB_CALL, r);
    if (o->digit == 6) {
        put_modrm(code, width, M1, 0x3b, RDX, divisor);
        stub_jump(s, jump_if(code, CC_AE));
    } else {
        put_modrm(code, width, M1, 0x8b, T0, in_register(RAX));
        put_modrm(code, width, M1, 0xc1, 7, in_register(T0)); /* SAR */
        put8(code, r->size == 3 ? 63 : 31);
        put_modrm(code, width, M1, 0x3b, T0, in_register(RDX));
        stub_jump(s, jump_if(code, CC_NE));
        put_modrm(code, width, M1, 0x8b, T0, divisor);
        alu_constant(code, width, GROUP_ADD, in_register(T0), 1);
        alu_constant(code, width, GROUP_CMP, in_register(T0), 1);
        stub_jump(s, jump_if(code, CC_BE));
    }
    put_modrm(code, width, M1, 0xf7, (unsigned)o->digit, divisor);
    return true;
}
#define DIVIDE(name) const struct emitter E_##name = {divide, READS_FIRST | WRITES_RAX | WRITES_RDX | KEEPS_UNDEFINED | FAULTS}
DIVIDE(DIV); DIVIDE(IDIV);

/* CMPXCHG8B, CMPXCHG16B, which wants its operand aligned. */
static bool compare_two(struct translation *t, const struct record *r)
{
    will_access(t, 2u << r->size, true, r->size == 3 ? 16 : 1);
    if (t->asking)
        return true;
    to_memory(t, r, false);
    put_lock(t, r);
    put_modrm(&t->code, r->size == 3 ? I_W : 0, M0F, 0xc7, 1, accessed(t));
    return true;
}
const struct emitter E_CMPXCHG8B = {compare_two, CHANGES | WRITES_RAX | WRITES_RDX};

/* At CPL 0 nothing of CLI is checked. */
static bool clear_interrupts(struct translation *t, const struct record *r)
{
    if (!(t->c->key & KEY_CPL0) || !(t->c->key & KEY_PROTECTED) || t->c->key & KEY_V86)
        return false;
    if (t->asking)
        return true;
    flags_aside(t, r);
    alu_constant(&t->code, I_W, GROUP_AND, FIELD(rflags), ~FLAG_IF);
    return true;
}
const struct emitter E_CLI = {clear_interrupts, 0};

COPY(CRC32, CHANGES); COPY(MOVBE, WRITES_FIRST);

/* With one operand it is rDX:rAX that is written. */
static bool multiply(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    return copy_as(t, r, o->operands[1] == o__ ? READS_FIRST : o->operands[2] == o__ ? CHANGES : WRITES_FIRST, o->opcode, false);
}
const struct emitter E_IMUL = {multiply, CHANGES | WRITES_RAX | WRITES_RDX | CLEARS_UNDEFINED};

/* A bit of memory by a register may lie anywhere. */
static bool bit(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    return (r->prefix & PREFIX_REGISTER || o->operands[1] == oIb) && copy(t, r);
}
const struct emitter E_BT = {bit, READS_FIRST | KEEPS_UNDEFINED}, E_BTS = {bit, CHANGES | KEEPS_UNDEFINED},
    E_BTR = {bit, CHANGES | KEEPS_UNDEFINED}, E_BTC = {bit, CHANGES | KEEPS_UNDEFINED};

/* ---- Moves ---------------------------------------------------------------------------------------------------------------- */

static bool mov(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    bool load = operand_types[o->operands[1]].kind == OFFSET, store = operand_types[o->operands[0]].kind == OFFSET;
    if (load || store) { /* rAX and an address */
        will_access(t, 1u << r->size, store, 1);
        if (t->asking)
            return true;
        unsigned flags = o->size == B ? 0 : r->size == 1 ? I_66 : r->size == 3 ? I_W : 0;
        to_memory(t, r, false);
        put_modrm(&t->code, flags, M1, (load ? 0x8a : 0x88) + (o->size != B), RAX, accessed(t));
        return true;
    }
    if (o->operands[1] != oIv)
        return copy(t, r);
    unsigned host = pinned(r->rm);
    if (r->size == 1)
        return false;
    if (t->asking)
        return true;
    begin_flags(t, r);
    load_constant(&t->code, host == NO_REGISTER ? T0 : host, r->size == 2 ? (u32)r->disp : (u64)r->disp);
    if (host == NO_REGISTER)
        store64(&t->code, guest_place(r->rm), T0);
    return true;
}
const struct emitter E_MOV = {mov, WRITES_FIRST};

static bool lea(struct translation *t, const struct record *r)
{
    if (r->size == 1 || r->seg >= SEG_FS)
        return false;
    if (t->asking)
        return true;
    begin_flags(t, r);
    unsigned host = pinned(r->reg);
    struct code *code = &t->code;
    bool plain = r->base != GPR_IP * 8 && host != NO_REGISTER && pinned(r->base) != NO_REGISTER &&
                 r->base != GPR_ZERO * 8 && (r->index == GPR_ZERO * 8 || pinned(r->index) != NO_REGISTER) &&
                 (r->prefix & PREFIX_ADDRESS) >= r->size;
    if (plain) {
        struct place p = in_memory(pinned(r->base), (i32)r->disp);
        if (r->index != GPR_ZERO * 8) {
            p.index = (u8)pinned(r->index);
            p.scale = r->scale;
        }
        put_modrm(code, r->size == 3 ? I_W : 0, M1, 0x8d, host, p);
        return true;
    }
    /* What is loaded for the address goes to the destination: it must be no other part of it. */
    bool apart = r->index == GPR_ZERO * 8 ||
                 (pinned(r->index) != host && (pinned(r->index) != NO_REGISTER || pinned(r->base) != host));
    if (host != NO_REGISTER && r->size == 3 && apart) {
        emit_address(t, r, host, T0, 0);
        return true;
    }
    emit_address(t, r, T1, T0, 0);
    if (r->size < 3 || host != NO_REGISTER)
        put_modrm(code, r->size == 3 ? I_W : 0, M1, 0x8b, host == NO_REGISTER ? T1 : host, in_register(T1));
    if (host == NO_REGISTER)
        store64(code, guest_place(r->reg), T1);
    return true;
}
const struct emitter E_LEA = {lea, WRITES_FIRST | NO_ACCESS};

static bool nop(struct translation *t, const struct record *r)
{
    (void)t, (void)r;
    return true;
}
const struct emitter E_NOP = {nop, NO_ACCESS};

/* ---- Vectors ---------------------------------------------------------------------------------------------------------------- */

/* A load from memory writes all of the register, a move between registers a part. */
static bool move_part(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    return copy_as(t, r, (r->prefix & PREFIX_REGISTER ? CHANGES : WRITES_FIRST) | UNALIGNED, o->opcode, false);
}
const struct emitter E_MOVSS = {move_part, CHANGES | UNALIGNED}, E_MOVSD = {move_part, CHANGES | UNALIGNED};

#define MOVE(name) COPY(name, WRITES_FIRST)
#define MOVE_U(name) COPY(name, WRITES_FIRST | UNALIGNED)
MOVE(MOVAPS); MOVE(MOVAPD); MOVE(MOVDQA); MOVE(MOVNTPS); MOVE(MOVNTPD); MOVE(MOVNTDQ); MOVE(MOVNTDQA); MOVE_U(MOVUPS);
MOVE_U(MOVUPD); MOVE_U(MOVDQU); MOVE_U(LDDQU); MOVE(MOVD); MOVE(MOVQ); MOVE(MOVSHDUP); MOVE(MOVSLDUP); MOVE(MOVDDUP);
COPY(MOVHLPS, CHANGES); COPY(MOVLHPS, CHANGES); COPY(MOVLPS, CHANGES); COPY(MOVLPD, CHANGES); COPY(MOVHPS, CHANGES);
COPY(MOVHPD, CHANGES); MOVE(MOVMSKPS); MOVE(MOVMSKPD); MOVE(PMOVMSKB); COPY(PINSRW, CHANGES); MOVE(PEXTRW);
MOVE(PSHUFD); MOVE(PSHUFHW); MOVE(PSHUFLW); MOVE(MOVNTI);

#define INTEGER(name) COPY(name, CHANGES)
INTEGER(ANDPS); INTEGER(ANDPD); INTEGER(ANDNPS); INTEGER(ANDNPD); INTEGER(ORPS); INTEGER(ORPD); INTEGER(XORPS); INTEGER(XORPD);
INTEGER(UNPCKLPS); INTEGER(UNPCKLPD); INTEGER(UNPCKHPS); INTEGER(UNPCKHPD); INTEGER(SHUFPS); INTEGER(SHUFPD);
INTEGER(PUNPCKLBW); INTEGER(PUNPCKLWD); INTEGER(PUNPCKLDQ); INTEGER(PUNPCKLQDQ); INTEGER(PUNPCKHBW); INTEGER(PUNPCKHWD);
INTEGER(PUNPCKHDQ); INTEGER(PUNPCKHQDQ); INTEGER(PACKSSWB); INTEGER(PACKSSDW); INTEGER(PACKUSWB); INTEGER(PACKUSDW);
INTEGER(PCMPGTB); INTEGER(PCMPGTW); INTEGER(PCMPGTD); INTEGER(PCMPGTQ); INTEGER(PCMPEQB); INTEGER(PCMPEQW); INTEGER(PCMPEQD);
INTEGER(PCMPEQQ); INTEGER(PSRLW); INTEGER(PSRLD); INTEGER(PSRLQ); INTEGER(PSRLDQ); INTEGER(PSRAW); INTEGER(PSRAD);
INTEGER(PSLLW); INTEGER(PSLLD); INTEGER(PSLLQ); INTEGER(PSLLDQ); INTEGER(PADDB); INTEGER(PADDW); INTEGER(PADDD);
INTEGER(PADDQ); INTEGER(PADDSB); INTEGER(PADDSW); INTEGER(PADDUSB); INTEGER(PADDUSW); INTEGER(PSUBB); INTEGER(PSUBW);
INTEGER(PSUBD); INTEGER(PSUBQ); INTEGER(PSUBSB); INTEGER(PSUBSW); INTEGER(PSUBUSB); INTEGER(PSUBUSW); INTEGER(PMULLW);
INTEGER(PMULHW); INTEGER(PMULHUW); INTEGER(PMULUDQ); INTEGER(PMULLD); INTEGER(PMULDQ); INTEGER(PMADDWD); INTEGER(PSADBW);
INTEGER(PMINUB); INTEGER(PMINSW); INTEGER(PMAXUB); INTEGER(PMAXSW); INTEGER(PMINSB); INTEGER(PMINSD); INTEGER(PMINUW);
INTEGER(PMINUD); INTEGER(PMAXSB); INTEGER(PMAXSD); INTEGER(PMAXUW); INTEGER(PMAXUD); INTEGER(PAND); INTEGER(PANDN);
INTEGER(POR); INTEGER(PXOR); INTEGER(PAVGB); INTEGER(PAVGW); INTEGER(PSHUFB); INTEGER(PALIGNR); INTEGER(PHADDW);
INTEGER(PHADDD); INTEGER(PHADDSW); INTEGER(PHSUBW); INTEGER(PHSUBD); INTEGER(PHSUBSW); INTEGER(PMADDUBSW); INTEGER(PSIGNB);
INTEGER(PSIGNW); INTEGER(PSIGND); INTEGER(PMULHRSW); MOVE(PABSB); MOVE(PABSW); MOVE(PABSD); MOVE(PMOVSXBW); MOVE(PMOVSXBD);
MOVE(PMOVSXBQ); MOVE(PMOVSXWD); MOVE(PMOVSXWQ); MOVE(PMOVSXDQ); MOVE(PMOVZXBW); MOVE(PMOVZXBD); MOVE(PMOVZXBQ);
MOVE(PMOVZXWD); MOVE(PMOVZXWQ); MOVE(PMOVZXDQ); MOVE(PHMINPOSUW); INTEGER(PBLENDW); INTEGER(BLENDPS); INTEGER(BLENDPD);
INTEGER(MPSADBW); MOVE(AESIMC); INTEGER(AESENC); INTEGER(AESENCLAST); INTEGER(AESDEC); INTEGER(AESDECLAST);
MOVE(AESKEYGENASSIST); INTEGER(PCLMULQDQ); INTEGER(SHA1NEXTE); INTEGER(SHA1MSG1); INTEGER(SHA1MSG2); INTEGER(SHA256MSG1);
INTEGER(SHA256MSG2); INTEGER(SHA1RNDS4); INTEGER(PINSRB); INTEGER(PINSRD); MOVE(PEXTRB); MOVE(PEXTRD);
COPY(PTEST, READS_FIRST);

#define NUMBER(name) COPY(name, CHANGES | FLOAT)
NUMBER(ADDPS); NUMBER(ADDPD); NUMBER(ADDSS); NUMBER(ADDSD); NUMBER(SUBPS); NUMBER(SUBPD); NUMBER(SUBSS); NUMBER(SUBSD);
NUMBER(MULPS); NUMBER(MULPD); NUMBER(MULSS); NUMBER(MULSD); NUMBER(DIVPS); NUMBER(DIVPD); NUMBER(DIVSS); NUMBER(DIVSD);
NUMBER(MINPS); NUMBER(MINPD); NUMBER(MINSS); NUMBER(MINSD); NUMBER(MAXPS); NUMBER(MAXPD); NUMBER(MAXSS); NUMBER(MAXSD);
NUMBER(SQRTPS); NUMBER(SQRTPD); NUMBER(SQRTSS); NUMBER(SQRTSD); NUMBER(CMPPS); NUMBER(CMPPD); NUMBER(CMPSS); NUMBER(CMPSD);
NUMBER(HADDPS); NUMBER(HADDPD); NUMBER(HSUBPS); NUMBER(HSUBPD); NUMBER(ADDSUBPS); NUMBER(ADDSUBPD); NUMBER(CVTSI2SS);
NUMBER(CVTSI2SD); NUMBER(CVTSS2SD); NUMBER(CVTSD2SS); NUMBER(CVTPS2PD); NUMBER(CVTPD2PS); NUMBER(CVTDQ2PS);
NUMBER(CVTPS2DQ); NUMBER(CVTTPS2DQ); NUMBER(CVTTPD2DQ); NUMBER(CVTDQ2PD); NUMBER(CVTPD2DQ);
NUMBER(ROUNDPS); NUMBER(ROUNDPD); NUMBER(ROUNDSS); NUMBER(ROUNDSD);
#define TO_INTEGER(name) COPY(name, WRITES_FIRST | FLOAT)
TO_INTEGER(CVTTSS2SI); TO_INTEGER(CVTTSD2SI); TO_INTEGER(CVTSS2SI); TO_INTEGER(CVTSD2SI);
#define COMPARE(name) COPY(name, READS_FIRST | FLOAT)
COMPARE(UCOMISS); COMPARE(UCOMISD); COMPARE(COMISS); COMPARE(COMISD);

/* Where CPUs take turns, there is nothing to be done. */
static bool fence(struct translation *t, const struct record *r)
{
    if (t->asking || !(t->c->key & KEY_SHARED))
        return true;
    put_modrm(&t->code, 0, M0F, 0xae, (unsigned)opcodes[r->id].digit, in_register(0));
    return true;
}
const struct emitter E_LFENCE = {fence, NO_ACCESS}, E_MFENCE = {fence, NO_ACCESS}, E_SFENCE = {fence, NO_ACCESS};

/* ---- The stack ----------------------------------------------------------------------------------------------------------------- */

static void store_stack(struct translation *t, unsigned host)
{
    put_modrm(&t->code, t->wide ? I_W : 0, M1, 0x89, host, accessed(t));
}
static void load_stack(struct translation *t, unsigned host)
{
    put_modrm(&t->code, t->wide ? I_W : 0, M1, 0x8b, host, accessed(t));
}

static bool push(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    bool constant = operand_types[o->operands[0]].kind == IMMEDIATE;
    bool memory = o->operands[0] == oEv && !(r->prefix & PREFIX_REGISTER);
    i32 width = (i32)stack_width(t);
    if (!stack_sized(t, r))
        return false;
    if (memory)
        will_access(t, stack_width(t), false, 1);
    will_access_stack(t, RSP, -width, true);
    if (t->asking)
        return true;
    struct code *code = &t->code;
    if (memory) {
        to_memory(t, r, false);
        load_stack(t, T1);
        store64(code, FIELD(scratch), T1);
    }
    to_stack(t, r, false);
    if (constant) {
        put_modrm(code, t->wide ? I_W : 0, M1, 0xc7, 0, accessed(t));
        put32(code, (u64)(i64)r->imm);
    } else if (memory) {
        load64(code, T0, FIELD(scratch));
        store_stack(t, T0);
    } else {
        unsigned host = pinned(r->rm);
        if (host == NO_REGISTER)
            load64(code, host = T0, guest_place(r->rm));
        store_stack(t, host);
    }
    move_stack(t, GUEST_RSP, -width);
    return true;
}
const struct emitter E_PUSH = {push, STACK_WRITE};

static bool pop(struct translation *t, const struct record *r)
{
    if (!stack_sized(t, r) || !(opcodes[r->id].operands[0] == oZv || r->prefix & PREFIX_REGISTER))
        return false;
    will_access_stack(t, RSP, 0, false);
    if (t->asking)
        return true;
    unsigned host = pinned(r->rm);
    to_stack(t, r, false);
    move_stack(t, GUEST_RSP, (i32)stack_width(t)); /* POP rSP writes it after that */
    load_stack(t, host == NO_REGISTER ? T0 : host);
    if (host == NO_REGISTER)
        store64(&t->code, guest_place(r->rm), T0);
    return true;
}
const struct emitter E_POP = {pop, STACK_READ | WRITES_FIRST};

static bool leave_frame(struct translation *t, const struct record *r)
{
    if (!stack_sized(t, r))
        return false;
    will_access_stack(t, RBP, 0, false);
    if (t->asking)
        return true;
    to_stack(t, r, false);
    move_stack(t, RBP, (i32)stack_width(t));
    load_stack(t, RBP);
    return true;
}
const struct emitter E_LEAVE = {leave_frame, STACK_READ | WRITES_RBP};

/* ---- Jumps --------------------------------------------------------------------------------------------------------------------- */

static bool is_direct(const struct record *r) { return r->has_link; }

static bool branch(struct translation *t, const struct record *r)
{
    if (!stack_sized(t, r))
        return false;
    if (t->asking)
        return true;
    unsigned condition = emit_condition(t, opcodes[r->id].opcode & 15);
    if (member_at(t, r) < 0) { /* out of line */
        stub_jump(add_stub(t, STUB_EDGE, r), jump_if(&t->code, condition));
        return true;
    }
    u8 *over = jump_if(&t->code, condition ^ 1);
    enum where where = t->where;
    u16 split = t->split;
    struct recipe recipe = t->recipe;
    emit_jump(t, r);
    t->where = where;
    t->split = split;
    t->recipe = recipe;
    land(over, t->code.at);
    return true;
}
#define BRANCH(name) const struct emitter E_##name = {branch, FLOW_BRANCH}
BRANCH(JO); BRANCH(JNO); BRANCH(JB); BRANCH(JAE); BRANCH(JE); BRANCH(JNE); BRANCH(JBE); BRANCH(JA); BRANCH(JS); BRANCH(JNS);
BRANCH(JP); BRANCH(JNP); BRANCH(JL); BRANCH(JGE); BRANCH(JLE); BRANCH(JG);

/* It asks and changes no flags. The host's own distance is of a byte, so it jumps over a jump. */
static bool jump_if_zero(struct translation *t, const struct record *r)
{
    unsigned address = r->prefix & PREFIX_ADDRESS;
    struct code *code = &t->code;
    if (!stack_sized(t, r) || address < 2 || (!t->wide && address != 2))
        return false;
    if (t->asking)
        return true;
    if (address == 2)
        put8(code, 0x67);
    put8(code, 0xe3);
    put8(code, 5);
    u8 *over = jump(code);
    stub_jump(add_stub(t, STUB_EDGE, r), jump(code));
    land(over, code->at);
    return true;
}
const struct emitter E_JCXZ = {jump_if_zero, FLOW_BRANCH};

/* The target of an indirect jump or call to T1. */
static void will_load_target(struct translation *t, const struct record *r)
{
    if (!is_direct(r) && !(r->prefix & PREFIX_REGISTER))
        will_access(t, stack_width(t), false, 1);
}
static void load_target(struct translation *t, const struct record *r)
{
    if (!(r->prefix & PREFIX_REGISTER)) {
        to_memory(t, r, true);
        load_stack(t, T1);
    } else {
        unsigned host = pinned(r->rm);
        put_modrm(&t->code, t->wide ? I_W : 0, M1, 0x8b, T1, host == NO_REGISTER ? guest_place(r->rm) : in_register(host));
    }
}

static bool jmp(struct translation *t, const struct record *r)
{
    if (!stack_sized(t, r))
        return false;
    will_load_target(t, r);
    if (t->asking)
        return true;
    if (is_direct(r)) {
        emit_jump(t, r);
        return true;
    }
    flags_to_image(t);
    load_target(t, r);
    find_block(t, r);
    emit_enter(t, r);
    return true;
}
const struct emitter E_JMP = {jmp, FLOW_JUMP | FLOW_LEAVES};

static bool call(struct translation *t, const struct record *r)
{
    i32 width = (i32)stack_width(t);
    if (!stack_sized(t, r))
        return false;
    will_load_target(t, r);
    will_access_stack(t, RSP, -width, true);
    if (t->asking)
        return true;
    struct code *code = &t->code;
    flags_to_image(t);
    if (!is_direct(r)) {
        load_target(t, r); /* before the push, which may write there */
        find_block(t, r);
        store64(code, FIELD(scratch), T1);
    }
    to_stack(t, r, true);
    load_constant(code, T0, t->in->block->ip + r->at + r->length);
    store_stack(t, T0);
    move_stack(t, GUEST_RSP, -width);
    if (is_direct(r)) {
        emit_call(t, r);
        return true;
    }
    load64(code, T1, FIELD(scratch));
    load64(code, T0, in_memory(T1, offsetof(struct block, code)));
    emit_enter(t, r);
    return true;
}
const struct emitter E_CALL = {call, STACK_WRITE | FLOW_JUMP | FLOW_LEAVES};

static bool ret(struct translation *t, const struct record *r)
{
    i32 more = opcodes[r->id].operands[0] == oIw ? (u16)r->imm : 0;
    if (!stack_sized(t, r))
        return false;
    will_access_stack(t, RSP, 0, false);
    if (t->asking)
        return true;
    flags_to_image(t);
    to_stack(t, r, true);
    load_stack(t, T1);
    find_block(t, r);
    move_stack(t, GUEST_RSP, (i32)stack_width(t) + more);
    emit_enter(t, r);
    return true;
}
const struct emitter E_RET = {ret, STACK_READ | FLOW_LEAVES};
