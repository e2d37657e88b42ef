/* Emitters of VEX-encoded instructions: AVX, AVX2, FMA, F16C, BMI. The host's own, with other general registers and with the host's
 * address of the memory operand; vector registers are themselves. */
#include "operands.h"

/* Of the row's operands at most three are general registers: two scratch ones are enough, because what is read goes before
 * what is written. MULX writes two, of which the second, the low half, is T1. */
static bool copy_vex(struct translation *t, const struct record *r)
{
    const struct opcode *o = &opcodes[r->id];
    unsigned traits = o->emitter->traits;
    struct use reg = {0}, rm = {0}, third = {0};
    bool memory = false, immediate = false;
    unsigned bytes = 0, vector = NO_REGISTER, vector_rm = NO_REGISTER, vector_v = NO_REGISTER, vector_4 = NO_REGISTER;
    bool vectors = o->attributes & A_AVX;
    if (!host_has(t->translator, o->feature))
        return false;
    for (unsigned i = 0; i < OPERANDS_MAX; i++) {
        unsigned width = bytes_of(r, o->operands[i]), kind = operand_types[o->operands[i]].kind;
        bool reads = i || traits & READS_FIRST, writes = traits & (i == 0 ? WRITES_FIRST : i == 1 ? WRITES_SECOND : 0);
        switch (kind) {
        case FIXED: break;
        case REGISTER: reg = use_of(r->reg, width, T0, reads, writes); break;
        case VECTOR: vector = r->reg; break;
        case VEX_V:
            if (o->operands[i] == oBy)
                third = use_of(r->vvvv * 8, width, writes && i ? T1 : T0, reads && !writes, writes);
            else
                vector_v = r->vvvv;
            break;
        case IS4: vector_4 = (u8)r->imm >> 4; immediate = true; break;
        case IMMEDIATE: immediate = true; break;
        case VECTOR_RM: case RM_OPERAND: case MEMORY:
            if (!(r->prefix & PREFIX_REGISTER)) {
                memory = true;
                bytes = width == 16 ? 1u << r->vector : width; /* or less: then the handler does what lies near a page's end */
            } else if (kind == VECTOR_RM) {
                vector_rm = r->rm;
            } else {
                rm = use_of(r->rm, width, T1, reads, writes);
            }
            break;
        default: return false;
        }
    }
    unsigned first = operand_types[o->operands[0]].kind;
    if (memory)
        will_access(t, bytes, traits & WRITES_FIRST && first != REGISTER && first != VECTOR && first != VEX_V, traits & ALIGNED ? bytes : 1);
    if (t->asking)
        return true;

    if (memory)
        to_memory(t, r, false);
    else
        begin_flags(t, r);
    if (vectors) { /* sources before the destination, which may be one of them */
        bool keeps = traits & READS_FIRST, writes = traits & WRITES_FIRST;
        if (vector_4 != NO_REGISTER)
            use_vector(t, vector_4, true, false);
        if (vector_v != NO_REGISTER && first != VEX_V)
            use_vector(t, vector_v, true, false);
        if (vector_rm != NO_REGISTER && first != VECTOR_RM)
            use_vector(t, vector_rm, true, false);
        if (vector != NO_REGISTER && first != VECTOR)
            use_vector(t, vector, true, false);
        unsigned to = first == VECTOR ? vector : first == VEX_V ? vector_v : first == VECTOR_RM ? vector_rm : NO_REGISTER;
        if (to != NO_REGISTER)
            use_vector(t, to, keeps, writes);
    }
    load_use(t, &reg);
    load_use(t, &third);
    load_use(t, &rm);
    static const u8 prefixes[] = {[P66] = 1, [PF3] = 2, [PF2] = 3};
    bool w = o->w == W1 || (o->size == Y && r->size == 3);
    unsigned in_reg = o->digit != NO ? (unsigned)o->digit : vector != NO_REGISTER ? vector : reg.host;
    unsigned in_third = vector_v != NO_REGISTER ? vector_v : third.is ? third.host : 0;
    struct place place = memory ? accessed(t) : in_register(vector_rm != NO_REGISTER ? vector_rm : rm.host);
    put_vex(&t->code, o->map, prefixes[o->prefix], vectors && r->vector == 5, w, o->opcode, in_reg, in_third, place);
    if (immediate)
        put8(&t->code, (u8)r->imm);
    store_use(t, &rm);
    store_use(t, &third);
    store_use(t, &reg); /* last: what MULX leaves where both are one */
    return true;
}

#define COPY(name, traits) const struct emitter E_##name = {copy_vex, traits}
#define MOVE(name) COPY(name, WRITES_FIRST)
#define ALIGNED_MOVE(name) COPY(name, WRITES_FIRST | ALIGNED)
#define NUMBER(name) COPY(name, WRITES_FIRST | FLOAT)
#define NUMBER_3(name) COPY(name, CHANGES | FLOAT)
#define COMPARE(name) COPY(name, READS_FIRST | FLOAT)
#define TEST(name) COPY(name, READS_FIRST)

ALIGNED_MOVE(VMOVAPS); ALIGNED_MOVE(VMOVAPD); ALIGNED_MOVE(VMOVNTPS); ALIGNED_MOVE(VMOVNTPD); ALIGNED_MOVE(VMOVNTDQ);
ALIGNED_MOVE(VMOVNTDQA); ALIGNED_MOVE(VMOVDQA);

MOVE(VMOVUPS); MOVE(VMOVUPD); MOVE(VMOVSS); MOVE(VMOVSD); MOVE(VMOVHLPS); MOVE(VMOVLPS); MOVE(VMOVLPD); MOVE(VMOVLHPS);
MOVE(VMOVHPS); MOVE(VMOVHPD); MOVE(VMOVSLDUP); MOVE(VMOVSHDUP); MOVE(VMOVDDUP); MOVE(VMOVDQU); MOVE(VLDDQU); MOVE(VMOVD);
MOVE(VMOVQ); MOVE(VMOVMSKPS); MOVE(VMOVMSKPD); MOVE(VPMOVMSKB); MOVE(VPINSRW); MOVE(VPINSRB); MOVE(VPINSRD); MOVE(VINSERTPS);
MOVE(VPEXTRW); MOVE(VPEXTRB); MOVE(VPEXTRD); MOVE(VEXTRACTPS); MOVE(VINSERTF128); MOVE(VINSERTI128); MOVE(VEXTRACTF128);
MOVE(VEXTRACTI128); MOVE(VBROADCASTSS); MOVE(VBROADCASTSD); MOVE(VBROADCASTF128); MOVE(VBROADCASTI128); MOVE(VPBROADCASTB);
MOVE(VPBROADCASTW); MOVE(VPBROADCASTD); MOVE(VPBROADCASTQ); MOVE(VANDPS); MOVE(VANDPD); MOVE(VANDNPS); MOVE(VANDNPD);
MOVE(VORPS); MOVE(VORPD); MOVE(VXORPS); MOVE(VXORPD); MOVE(VUNPCKLPS); MOVE(VUNPCKLPD); MOVE(VUNPCKHPS); MOVE(VUNPCKHPD);
MOVE(VSHUFPS); MOVE(VSHUFPD); MOVE(VPERMILPS); MOVE(VPERMILPD); MOVE(VPERM2F128); MOVE(VPERM2I128); MOVE(VPERMQ); MOVE(VPERMPD);
MOVE(VPERMD); MOVE(VPERMPS); MOVE(VBLENDPS); MOVE(VBLENDPD); MOVE(VPBLENDD); MOVE(VBLENDVPS); MOVE(VBLENDVPD); MOVE(VPBLENDVB);
MOVE(VPBLENDW); MOVE(VPAND); MOVE(VPANDN); MOVE(VPOR); MOVE(VPXOR); MOVE(VPUNPCKLBW); MOVE(VPUNPCKLWD); MOVE(VPUNPCKLDQ);
MOVE(VPACKSSWB); MOVE(VPCMPGTB); MOVE(VPCMPGTW); MOVE(VPCMPGTD); MOVE(VPACKUSWB); MOVE(VPUNPCKHBW); MOVE(VPUNPCKHWD);
MOVE(VPUNPCKHDQ); MOVE(VPACKSSDW); MOVE(VPUNPCKLQDQ); MOVE(VPUNPCKHQDQ); MOVE(VPCMPEQB); MOVE(VPCMPEQW); MOVE(VPCMPEQD);
MOVE(VPADDQ); MOVE(VPMULLW); MOVE(VPSUBUSB); MOVE(VPSUBUSW); MOVE(VPMINUB); MOVE(VPADDUSB); MOVE(VPADDUSW); MOVE(VPMAXUB);
MOVE(VPAVGB); MOVE(VPAVGW); MOVE(VPMULHUW); MOVE(VPMULHW); MOVE(VPSUBSB); MOVE(VPSUBSW); MOVE(VPMINSW); MOVE(VPADDSB);
MOVE(VPADDSW); MOVE(VPMAXSW); MOVE(VPMULUDQ); MOVE(VPMADDWD); MOVE(VPSADBW); MOVE(VPSUBB); MOVE(VPSUBW); MOVE(VPSUBD);
MOVE(VPSUBQ); MOVE(VPADDB); MOVE(VPADDW); MOVE(VPADDD); MOVE(VPSHUFB); MOVE(VPHADDW); MOVE(VPHADDD); MOVE(VPHADDSW);
MOVE(VPMADDUBSW); MOVE(VPHSUBW); MOVE(VPHSUBD); MOVE(VPHSUBSW); MOVE(VPSIGNB); MOVE(VPSIGNW); MOVE(VPSIGND); MOVE(VPMULHRSW);
MOVE(VPMULDQ); MOVE(VPCMPEQQ); MOVE(VPACKUSDW); MOVE(VPCMPGTQ); MOVE(VPMINSB); MOVE(VPMINSD); MOVE(VPMINUW); MOVE(VPMINUD);
MOVE(VPMAXSB); MOVE(VPMAXSD); MOVE(VPMAXUW); MOVE(VPMAXUD); MOVE(VPMULLD); MOVE(VPABSB); MOVE(VPABSW); MOVE(VPABSD);
MOVE(VPMOVSXBW); MOVE(VPMOVSXBD); MOVE(VPMOVSXBQ); MOVE(VPMOVSXWD); MOVE(VPMOVSXWQ); MOVE(VPMOVSXDQ); MOVE(VPMOVZXBW);
MOVE(VPMOVZXBD); MOVE(VPMOVZXBQ); MOVE(VPMOVZXWD); MOVE(VPMOVZXWQ); MOVE(VPMOVZXDQ); MOVE(VPSHUFD); MOVE(VPSHUFHW);
MOVE(VPSHUFLW); MOVE(VPALIGNR); MOVE(VMPSADBW); MOVE(VPSRLW); MOVE(VPSRLD); MOVE(VPSRLQ); MOVE(VPSRAW); MOVE(VPSRAD);
MOVE(VPSLLW); MOVE(VPSLLD); MOVE(VPSLLQ); MOVE(VPSRLDQ); MOVE(VPSLLDQ); MOVE(VPSRLVD); MOVE(VPSRLVQ); MOVE(VPSRAVD);
MOVE(VPSLLVD); MOVE(VPSLLVQ); MOVE(VPHMINPOSUW); MOVE(VAESENC); MOVE(VAESENCLAST); MOVE(VAESDEC); MOVE(VAESDECLAST);
MOVE(VAESIMC); MOVE(VAESKEYGENASSIST); MOVE(VPCLMULQDQ); MOVE(VGF2P8MULB); MOVE(VGF2P8AFFINEQB); MOVE(VGF2P8AFFINEINVQB);
MOVE(ANDN); MOVE(BLSR); MOVE(BLSMSK); MOVE(BLSI); MOVE(BEXTR); MOVE(BZHI); MOVE(PEXT); MOVE(PDEP); MOVE(SHLX); MOVE(SARX);
MOVE(SHRX); MOVE(RORX);

NUMBER(VSQRTPS); NUMBER(VSQRTPD); NUMBER(VSQRTSS); NUMBER(VSQRTSD); NUMBER(VRSQRTPS); NUMBER(VRSQRTSS); NUMBER(VRCPPS);
NUMBER(VRCPSS); NUMBER(VADDPS); NUMBER(VADDPD); NUMBER(VADDSS); NUMBER(VADDSD); NUMBER(VMULPS); NUMBER(VMULPD); NUMBER(VMULSS);
NUMBER(VMULSD); NUMBER(VSUBPS); NUMBER(VSUBPD); NUMBER(VSUBSS); NUMBER(VSUBSD); NUMBER(VMINPS); NUMBER(VMINPD); NUMBER(VMINSS);
NUMBER(VMINSD); NUMBER(VDIVPS); NUMBER(VDIVPD); NUMBER(VDIVSS); NUMBER(VDIVSD); NUMBER(VMAXPS); NUMBER(VMAXPD); NUMBER(VMAXSS);
NUMBER(VMAXSD); NUMBER(VCMPPS); NUMBER(VCMPPD); NUMBER(VCMPSS); NUMBER(VCMPSD); NUMBER(VHADDPD); NUMBER(VHADDPS);
NUMBER(VHSUBPD); NUMBER(VHSUBPS); NUMBER(VADDSUBPD); NUMBER(VADDSUBPS); NUMBER(VROUNDPS); NUMBER(VROUNDPD); NUMBER(VROUNDSS);
NUMBER(VROUNDSD); NUMBER(VDPPS); NUMBER(VDPPD); NUMBER(VCVTSI2SS); NUMBER(VCVTTSS2SI); NUMBER(VCVTSS2SI); NUMBER(VCVTSI2SD);
NUMBER(VCVTTSD2SI); NUMBER(VCVTSD2SI); NUMBER(VCVTPS2PD); NUMBER(VCVTPD2PS); NUMBER(VCVTSS2SD); NUMBER(VCVTSD2SS);
NUMBER(VCVTDQ2PS); NUMBER(VCVTPS2DQ); NUMBER(VCVTTPS2DQ); NUMBER(VCVTTPD2DQ); NUMBER(VCVTDQ2PD); NUMBER(VCVTPD2DQ);
NUMBER(VCVTPH2PS); NUMBER(VCVTPS2PH);

NUMBER_3(VFMADDSUB132PS); NUMBER_3(VFMADDSUB132PD); NUMBER_3(VFMSUBADD132PS); NUMBER_3(VFMSUBADD132PD); NUMBER_3(VFMADD132PS);
NUMBER_3(VFMADD132PD); NUMBER_3(VFMADD132SS); NUMBER_3(VFMADD132SD); NUMBER_3(VFMSUB132PS); NUMBER_3(VFMSUB132PD);
NUMBER_3(VFMSUB132SS); NUMBER_3(VFMSUB132SD); NUMBER_3(VFNMADD132PS); NUMBER_3(VFNMADD132PD); NUMBER_3(VFNMADD132SS);
NUMBER_3(VFNMADD132SD); NUMBER_3(VFNMSUB132PS); NUMBER_3(VFNMSUB132PD); NUMBER_3(VFNMSUB132SS); NUMBER_3(VFNMSUB132SD);
NUMBER_3(VFMADDSUB213PS); NUMBER_3(VFMADDSUB213PD); NUMBER_3(VFMSUBADD213PS); NUMBER_3(VFMSUBADD213PD); NUMBER_3(VFMADD213PS);
NUMBER_3(VFMADD213PD); NUMBER_3(VFMADD213SS); NUMBER_3(VFMADD213SD); NUMBER_3(VFMSUB213PS); NUMBER_3(VFMSUB213PD);
NUMBER_3(VFMSUB213SS); NUMBER_3(VFMSUB213SD); NUMBER_3(VFNMADD213PS); NUMBER_3(VFNMADD213PD); NUMBER_3(VFNMADD213SS);
NUMBER_3(VFNMADD213SD); NUMBER_3(VFNMSUB213PS); NUMBER_3(VFNMSUB213PD); NUMBER_3(VFNMSUB213SS); NUMBER_3(VFNMSUB213SD);
NUMBER_3(VFMADDSUB231PS); NUMBER_3(VFMADDSUB231PD); NUMBER_3(VFMSUBADD231PS); NUMBER_3(VFMSUBADD231PD); NUMBER_3(VFMADD231PS);
NUMBER_3(VFMADD231PD); NUMBER_3(VFMADD231SS); NUMBER_3(VFMADD231SD); NUMBER_3(VFMSUB231PS); NUMBER_3(VFMSUB231PD);
NUMBER_3(VFMSUB231SS); NUMBER_3(VFMSUB231SD); NUMBER_3(VFNMADD231PS); NUMBER_3(VFNMADD231PD); NUMBER_3(VFNMADD231SS);
NUMBER_3(VFNMADD231SD); NUMBER_3(VFNMSUB231PS); NUMBER_3(VFNMSUB231PD); NUMBER_3(VFNMSUB231SS); NUMBER_3(VFNMSUB231SD);

COMPARE(VUCOMISS); COMPARE(VUCOMISD); COMPARE(VCOMISS); COMPARE(VCOMISD);

TEST(VTESTPS); TEST(VTESTPD); TEST(VPTEST);

COPY(MULX, WRITES_FIRST | WRITES_SECOND);

/* The upper halves are cleared: of registers that are in the host's by the host, of the others in struct vcpu. Outside of 64-bit
 * mode there are eight. */
static bool zero_upper(struct translation *t, const struct record *r)
{
    if (r->vector != 4)
        return false;
    if (t->asking)
        return true;
    begin_flags(t, r);
    struct code *code = &t->code;
    put_vex(code, M0F, 0, false, false, 0x77, 0, 0, in_register(0));
    code->at--; /* VZEROUPPER has no ModRM */
    unsigned zero = NO_REGISTER;
    for (unsigned n = 0; n < 16 && zero == NO_REGISTER; n++)
        if (!(t->vectors >> n & 1))
            zero = n;
    if (zero != NO_REGISTER)
        put_vex(code, M0F, 0, false, false, 0x57, zero, zero, in_register(zero)); /* VXORPS */
    for (unsigned n = 0; n < (t->wide ? 16 : 8); n++)
        if (!(t->vectors >> n & 1))
            put_vex(code, M0F, 0, false, false, 0x11, zero, 0,
                    in_memory(C, (i32)(offsetof(struct vcpu, xmm) + n * sizeof(union vector) + 16))); /* VMOVUPS */
    t->dirty = t->vectors;
    return true;
}
const struct emitter E_VZEROUPPER = {zero_upper, 0};
