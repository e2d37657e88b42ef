/* Control transfers through descriptors and gates: what interrupt.c, task.c and ops_far.c share. */
#ifndef VMFS_TRANSFER_H
#define VMFS_TRANSFER_H

#include "flags.h"
#include "memory.h"

/* Where pushes go: a stack that is not yet the CPU's. Moves only the copy; memory is written as it goes, which is allowed
 * to stay if a later push faults (nothing else has changed). */
struct stack {
    struct segment_check check;
    u64 sp, mask, linear_mask;
    u32 fault_error;          /* of the #SS: the selector of a new stack */
    unsigned access;          /* ACCESS_SUPERVISOR while the CPL is not yet the new one */
};

/* interrupt.c. All raise at c->now. */
void push_on(struct vcpu *c, struct stack *s, unsigned bytes, u64 value);
void commit_sp(struct vcpu *c, const struct stack *s);
struct stack current_stack(struct vcpu *c, u32 fault_error);
/* The stack that the TSS has for a privilege level (Intel SDM 3A 5.8.5); `ext`: bit 0 of error codes. */
void inner_stack(struct vcpu *c, unsigned level, u32 ext, struct stack *s, struct segment *ss);
u64 tss_stack64(struct vcpu *c, unsigned offset, u32 ext);
/* After an INT n, INT3, INTO or INT1 at r; nothing of it has been done. */
void deliver_software(struct vcpu *c, const struct record *r, unsigned vector, enum event kind);
/* To the real-mode style handler of a virtual-8086 task, by CR4.VME's redirection (3A 20.3.3). */
void deliver_redirected(struct vcpu *c, const struct record *r, unsigned vector);

/* task.c */
enum task_source { TASK_JUMP, TASK_CALL, TASK_RETURN, TASK_EVENT };
/* Switch to the task of a TSS selector (chapter 7). Before the switch faults are raised at c->now; after it, in the new
 * task. The old task continues at return_ip. `d` is the TSS descriptor where the caller has read it. */
void task_switch(struct vcpu *c, u16 selector, enum task_source source, u32 ext, u64 return_ip, bool has_error, u32 error);

/* The attributes' DPL. */
ALWAYS_INLINE unsigned attributes_dpl(u32 attributes) { return attributes >> ATTR_DPL_SHIFT & 3; }
/* May an instruction pointer be in this code segment? */
ALWAYS_INLINE bool target_fits(const struct vcpu *c, const struct descriptor *code, u64 ip)
{
    return c->efer & EFER_LMA && descriptor_attributes(code) & ATTR_L ? canonical(c, ip) : (u32)ip <= descriptor_limit(code);
}
/* The register becomes unusable by a null selector. */
ALWAYS_INLINE void set_null(struct vcpu *c, unsigned seg, u16 selector)
{
    c->seg[seg] = (struct segment){.selector = selector, .attributes = ATTR_UNUSABLE};
}
/* RFLAGS with the bits of `mask` from `value`. The caller sees to flags_changed. */
ALWAYS_INLINE void change_flags(struct vcpu *c, u64 value, u64 mask)
{
    set_rflags(c, (get_rflags(c) & ~mask) | (value & mask));
}

#endif
