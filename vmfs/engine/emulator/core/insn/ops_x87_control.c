/* x87 control: words, environment, state; FWAIT. */
#include "x87.h"

/* FNSTCW, FNSTSW, FNSTENV, FNSAVE, FNINIT, FNCLEX do not wait: with FWAIT before them they are FSTCW and so
 * on. */

OP(op_fwait)
{
    x87_wait(c, r);
    NEXT();
}
HANDLER(fwait);

/* FNENI, FNDISI, FNSETPM of older processors: nothing, and they do not wait. */
OP(op_x87_nothing) { NEXT(); }
HANDLER(x87_nothing);

/* ---- Words --------------------------------------------------------------------------------------------- */

static u16 status_word(const struct vcpu *c)
{
    u16 status;
    if (c->x87_place < X87_HOST_UNMASKED)
        return c->fsw;
    __asm__ volatile("fnstsw %0" : "=a"(status));
    return status;
}

OP(op_fnstsw_AX)
{
    R16(c, RAX * 8) = status_word(c);
    NEXT();
}
HANDLER(fnstsw_AX);

OP(op_fnstsw)
{
    mem_store(c, r, 2, status_word(c));
    NEXT();
}
HANDLER(fnstsw);

OP(op_fnstcw)
{
    mem_store(c, r, 2, c->fcw);
    NEXT();
}
HANDLER(fnstcw);

static NOINLINE void fldcw(struct vcpu *c, const struct record *r)
{
    X87_START(c, r);
    c->fcw = (u16)mem_load(c, r, 2);
    __asm__ volatile("fldcw %0\n\tfnstcw %0" : "+m"(c->fcw)); /* its fixed bits are the host's */
    c->x87_place = x87_host_place(c);
}
OP(op_fldcw)
{
    fldcw(c, r);
    NEXT();
}
HANDLER(fldcw);

OP(op_fnclex)
{
    if (c->x87_place >= X87_HOST_UNMASKED)
        __asm__ volatile("fnclex");
    else
        c->fsw &= 0x7f00;
    NEXT();
}
HANDLER(fnclex);

/* The registers keep what they have; the tags say empty. */
static void initialize(struct vcpu *c)
{
    x87_unload(c);
    c->fcw = FCW_INIT;
    c->fsw = c->ftw = 0;
    c->fop = c->fcs = c->fds = 0;
    c->fip = c->fdp = 0;
}
OP(op_fninit)
{
    initialize(c);
    NEXT();
}
HANDLER(fninit);

/* ---- Environment and state (Intel SDM 1 8.1.10, figures 8-9 to 8-12) ----------------------------------- */

enum { IMAGE_BYTES = 108 };
struct image { u8 bytes[IMAGE_BYTES]; };

static unsigned environment_bytes(const struct record *r) { return r->size == 1 ? 14 : 28; }

/* The full tag: 0 valid, 1 zero, 2 special, 3 empty. */
static unsigned tag_of(const struct vcpu *c, unsigned n)
{
    const struct x87_register *f = &c->fpr[n];
    unsigned exponent = f->exponent & 0x7fff;
    if (!(c->ftw >> n & 1))
        return 3;
    if (exponent == 0 && f->mantissa == 0)
        return 1;
    return exponent == 0 || exponent == 0x7fff || !(f->mantissa >> 63) ? 2 : 0;
}

/* In words of 2 or 4 bytes. What is reserved in the 32-bit form is ones. */
static void put_environment(const struct vcpu *c, const struct record *r, struct image *image)
{
    unsigned tags = 0;
    for (unsigned i = 0; i < 8; i++)
        tags |= tag_of(c, i) << 2 * i;
    bool narrow = r->size == 1;
    u32 fop = c->fop & 0x7ff, high = narrow ? 0 : 0xffff0000;
    u32 words[7] = {c->fcw | high, c->fsw | high, tags | high};
    if (c->key & KEY_PROTECTED) {
        words[3] = (u32)c->fip;
        words[4] = c->fcs | fop << 16;
        words[5] = (u32)c->fdp;
        words[6] = c->fds | high;
    } else { /* real and virtual-8086 mode: linear addresses */
        u32 ip = (u32)c->fip + ((u32)c->fcs << 4), dp = (u32)c->fdp + ((u32)c->fds << 4);
        words[3] = (ip & 0xffff) | high;
        words[4] = (ip >> 16 << 12 | fop);
        words[5] = (dp & 0xffff) | high;
        words[6] = dp >> 16 << 12;
    }
    for (unsigned i = 0; i < 7; i++)
        poke(image->bytes + (narrow ? 2 : 4) * i, narrow ? 2 : 4, words[i]);
}

static void take_environment(struct vcpu *c, const struct record *r, const struct image *image)
{
    bool narrow = r->size == 1;
    u32 words[7];
    for (unsigned i = 0; i < 7; i++)
        words[i] = (u32)peek(image->bytes + (narrow ? 2 : 4) * i, narrow ? 2 : 4);
    c->fcw = (words[0] & FCW_WRITABLE) | FCW_FIXED;
    c->fsw = (u16)words[1];
    c->ftw = 0;
    for (unsigned i = 0; i < 8; i++)
        c->ftw |= (u16)((words[2] >> 2 * i & 3) != 3) << i;
    if (c->key & KEY_PROTECTED) {
        c->fip = words[3];
        c->fcs = (u16)words[4];
        c->fop = words[4] >> 16 & 0x7ff; /* the 16-bit form has none */
        c->fdp = words[5];
        c->fds = (u16)words[6];
    } else {
        c->fip = (u16)words[3] | (words[4] >> 12 & 0xffff) << 16;
        c->fop = words[4] & 0x7ff;
        c->fdp = (u16)words[5] | (words[6] >> 12 & 0xffff) << 16;
        c->fcs = c->fds = 0;
    }
    x87_summarize(c);
}

/* ST(i) in 10 bytes each after the environment. */
static void put_registers(const struct vcpu *c, u8 *to)
{
    for (unsigned i = 0; i < 8; i++, to += 10) {
        const struct x87_register *f = &c->fpr[((c->fsw >> FSW_TOP_SHIFT) + i) & 7];
        poke(to, 8, f->mantissa);
        poke(to + 8, 2, f->exponent);
    }
}
static void take_registers(struct vcpu *c, const u8 *from)
{
    for (unsigned i = 0; i < 8; i++, from += 10) {
        struct x87_register *f = &c->fpr[((c->fsw >> FSW_TOP_SHIFT) + i) & 7];
        f->mantissa = peek(from, 8);
        f->exponent = (u16)peek(from + 8, 2);
    }
}

/* The image in memory, in pieces that the MMU takes. All is checked before anything is written. */
enum { PIECE = 64 };
static unsigned piece_of(unsigned done, unsigned bytes)
{
    return bytes - done < PIECE ? bytes - done : PIECE;
}

/* Where it begins: with EFLAGS.AC at a multiple of its words, 2 or 4 bytes (Intel SDM 3A table 6-7). */
static u64 image_at(struct vcpu *c, const struct record *r, unsigned bytes, unsigned access)
{
    u64 at = mem_linear(c, r, bytes, access);
    bool is_canonical = !(c->key & KEY_CODE64) || canonical(c, at);
    if (unlikely(c->map == &c->tlbs[TLB_NONE] && at & (r->size == 1 ? 1 : 3) && is_canonical))
        raise_error(c, r, VECTOR_AC, 0);
    return at;
}

static void read_image(struct vcpu *c, const struct record *r, struct image *image, unsigned bytes)
{
    u64 at = image_at(c, r, bytes, ACCESS_READ);
    for (unsigned done = 0; done < bytes; done += PIECE)
        mmu_read(c, (at + done) & c->linear_mask, image->bytes + done, piece_of(done, bytes), ACCESS_READ);
}
static void write_image(struct vcpu *c, const struct record *r, const struct image *image, unsigned bytes)
{
    u64 at = image_at(c, r, bytes, ACCESS_WRITE);
    for (unsigned done = 0; done < bytes; done += PIECE)
        mmu_check_write(c, (at + done) & c->linear_mask, piece_of(done, bytes), ACCESS_WRITE);
    for (unsigned done = 0; done < bytes; done += PIECE)
        mmu_write(c, (at + done) & c->linear_mask, image->bytes + done, piece_of(done, bytes), ACCESS_WRITE);
}

static NOINLINE void fnstenv(struct vcpu *c, const struct record *r)
{
    struct image image;
    x87_sync(c);
    put_environment(c, r, &image);
    write_image(c, r, &image, environment_bytes(r));
    if (~c->fcw & X87_EXCEPTIONS) { /* masks all exceptions */
        x87_unload(c);
        c->fcw |= X87_EXCEPTIONS;
        x87_summarize(c);
    }
}
OP(op_fnstenv)
{
    fnstenv(c, r);
    NEXT();
}
HANDLER(fnstenv);

static NOINLINE void fnsave(struct vcpu *c, const struct record *r)
{
    struct image image;
    x87_sync(c);
    put_environment(c, r, &image);
    put_registers(c, image.bytes + environment_bytes(r));
    write_image(c, r, &image, environment_bytes(r) + 80);
    initialize(c);
}
OP(op_fnsave)
{
    fnsave(c, r);
    NEXT();
}
HANDLER(fnsave);

static NOINLINE void fldenv(struct vcpu *c, const struct record *r)
{
    struct image image;
    x87_wait(c, r);
    read_image(c, r, &image, environment_bytes(r));
    x87_unload(c);
    take_environment(c, r, &image);
}
OP(op_fldenv)
{
    fldenv(c, r);
    NEXT();
}
HANDLER(fldenv);

static NOINLINE void frstor(struct vcpu *c, const struct record *r)
{
    struct image image;
    x87_wait(c, r);
    read_image(c, r, &image, environment_bytes(r) + 80);
    x87_unload(c);
    take_environment(c, r, &image);
    take_registers(c, image.bytes + environment_bytes(r));
}
OP(op_frstor)
{
    frstor(c, r);
    NEXT();
}
HANDLER(frstor);
