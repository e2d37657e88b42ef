/* x87: executed by the host's own.
 *
 * While a guest uses it, the host's x87 holds the guest's stack, status, tags and control word, so that every
 * instruction of the guest is that very instruction on the host: results, C0 to C3, stack faults and
 * exceptions, masked or not, are the processor's. This works because no compiled code uses the x87 on x86-64
 * (but `long double`, which the core does not have), and because an unmasked exception only becomes #MF in
 * the next instruction that waits: the handlers look at ES before it, so that the host never takes one.
 *
 * The host's is loaded by the first instruction that needs it and given back at the end of a run. Pointers
 * and opcode of the last instruction are the guest's and always in struct vcpu; so is the control word. MMX
 * works on the registers in struct vcpu. */
#ifndef VMFS_X87_H
#define VMFS_X87_H

#ifndef __x86_64__
#error "x87 is executed by the host's x87 unit: this core builds for x86-64 hosts only"
#endif

#include "sse.h"


/* Where fsw, ftw and fpr are. */
enum x87_place {
    X87_MEMORY,               /* in struct vcpu */
    X87_MMX,                  /* there too, after an MMX instruction: TOP is 0, all valid, nothing pends */
    X87_HOST_UNMASKED,        /* in the host, and the control word unmasks an exception */
    X87_HOST,                 /* in the host, all exceptions masked: nothing pends */
};
enum {
    X87_EXCEPTIONS = 63, FSW_PE = 1 << 5, FSW_ES = 1 << 7, FSW_TOP_SHIFT = 11, FSW_TOP = 7 << 11,
    FSW_B = 1 << 15, FCW_INIT = 0x37f, FCW_WRITABLE = 0x1f3f, FCW_FIXED = 0x40,
};

/* Make fsw, ftw and fpr in struct vcpu valid; to be read. */
void x87_sync(struct vcpu *c);
/* ... and to be changed: the next x87 instruction loads them. */
void x87_unload(struct vcpu *c);
/* Give the host its own x87 back, with an empty stack: at the end of a run, or before code that needs one. */
void x87_release(struct vcpu *c);
/* Into the host, without a change of the place. */
void x87_restore(struct vcpu *c);
enum x87_place x87_host_place(const struct vcpu *c);
/* ES and B follow from the flags and the masks (Intel SDM 1 8.1.3.3). */
void x87_summarize(struct vcpu *c);
/* Before an instruction that waits: raise #MF if an unmasked exception pends. */
void x87_wait(struct vcpu *c, const struct record *r);
/* The same for one that computes, and then the guest's state is in the host. */
COLD void x87_prepare(struct vcpu *c, const struct record *r);

#define X87_START(c, r) \
    do { \
        if (unlikely((c)->x87_place != X87_HOST)) \
            x87_prepare(c, r); \
    } while (0)

/* The pointers of a non-control instruction (SDM 1 8.1.8), and of its memory operand. */
ALWAYS_INLINE void x87_remember(struct vcpu *c, const struct record *r)
{
    c->fip = c->gpr[GPR_IP] + r->at;
    c->fop = (u16)r->imm;
    c->fcs = c->seg[SEG_CS].selector;
}
ALWAYS_INLINE void x87_remember_data(struct vcpu *c, const struct record *r, u64 offset)
{
    c->fdp = offset;
    c->fds = c->seg[r->seg].selector;
}

#endif
