/* The x87's state: between struct vcpu and the host's unit. */
#include "x87.h"
#include "irqchip.h"

#include <xmmintrin.h>

struct fxsave {
    u16 fcw, fsw;
    u8 ftw, reserved;
    u16 fop;
    u64 fip, fdp;
    u32 mxcsr, mxcsr_mask;
    struct x87_register st[8];
    u8 xmm[16][16], rest[96];
} __attribute__((aligned(16)));
_Static_assert(sizeof(struct fxsave) == 512, "FXSAVE's image (Intel SDM 1 table 10-2)");

enum x87_place x87_host_place(const struct vcpu *c)
{
    return ~c->fcw & X87_EXCEPTIONS ? X87_HOST_UNMASKED : X87_HOST;
}

void x87_summarize(struct vcpu *c)
{
    c->fsw = c->fsw & ~c->fcw & X87_EXCEPTIONS ? c->fsw | FSW_ES | FSW_B : c->fsw & ~(FSW_ES | FSW_B);
}

void x87_sync(struct vcpu *c)
{
    struct fxsave image;
    if (c->x87_place < X87_HOST_UNMASKED)
        return;
    __asm__ volatile("fxsave64 %0" : "=m"(image));
    c->fcw = image.fcw;
    c->fsw = image.fsw;
    c->ftw = image.ftw;
    unsigned top = image.fsw >> FSW_TOP_SHIFT & 7;
    for (unsigned i = 0; i < 8; i++) {
        struct x87_register *to = &c->fpr[(top + i) & 7];
        to->mantissa = image.st[i].mantissa;
        to->exponent = image.st[i].exponent;
    }
}

void x87_unload(struct vcpu *c)
{
    x87_sync(c);
    c->x87_place = X87_MEMORY;
}

void x87_restore(struct vcpu *c)
{
    struct fxsave image;
    if (!c->x87_borrowed)
        __asm__ volatile("fnstcw %0" : "=m"(c->x87_host_control));
    c->x87_borrowed = true;
    x87_summarize(c);
    memset(&image, 0, sizeof image);
    image.fcw = c->fcw;
    image.fsw = c->fsw;
    image.ftw = (u8)c->ftw;
    image.mxcsr = _mm_getcsr();
    unsigned top = c->fsw >> FSW_TOP_SHIFT & 7;
    for (unsigned i = 0; i < 8; i++)
        image.st[i] = c->fpr[(top + i) & 7];
    __asm__ volatile("fxrstor64 %0" : : "m"(image)
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                       "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    __asm__ volatile("fnstcw %0" : "=m"(c->fcw)); /* bits that are fixed in the host's */
}

void x87_release(struct vcpu *c)
{
    x87_unload(c);
    if (!c->x87_borrowed)
        return;
    __asm__ volatile("fninit\n\tfldcw %0" : : "m"(c->x87_host_control));
    c->x87_borrowed = false;
}

/* CR0.NE chooses between #MF and the PC's way (SDM 1 8.7.2): FERR# raises IRQ 13, and the CPU freezes before
 * the instruction until an interrupt comes, whose handler clears the exception or writes port F0. IGNNE#,
 * which that write asserts, is not there: a handler that lets the exception pend freezes at its own next
 * waiting instruction. Without interrupt controllers in the core there is no IRQ 13, and #MF comes in either
 * case, as under KVM. */
static _Noreturn void raise_pending(struct vcpu *c, const struct record *r)
{
    enum { FERR_IRQ = 13 };
    struct irqchip *chip = c->vm->irqchip;
    if (c->cr0 & CR0_NE || !chip)
        raise_fault(c, r, VECTOR_MF);
    chips_lock(c->vm);
    irqchip_set_gsi(chip, FERR_IRQ, true); /* an edge for the 8259 */
    irqchip_set_gsi(chip, FERR_IRQ, false);
    chips_unlock(c->vm);
    chip_notify(c);
    c->now = r;
    escape(c, ESCAPE_FREEZE);
}

void x87_wait(struct vcpu *c, const struct record *r)
{
    u16 status = 0;
    if (c->x87_place == X87_HOST_UNMASKED)
        __asm__ volatile("fnstsw %0" : "=a"(status));
    else if (c->x87_place == X87_MEMORY && c->fsw & ~c->fcw & X87_EXCEPTIONS)
        status = FSW_ES;
    if (unlikely(status & FSW_ES))
        raise_pending(c, r);
}

void x87_prepare(struct vcpu *c, const struct record *r)
{
    x87_wait(c, r);
    if (c->x87_place < X87_HOST_UNMASKED) {
        x87_restore(c);
        c->x87_place = x87_host_place(c);
    }
}
