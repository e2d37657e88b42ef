/* Machines: memory slots, CPUs, the turn to execute. */
#include <errno.h>
#include <stdlib.h>

#include "code.h"
#include "flags.h"
#include "irqchip.h"
#include "memory.h"
#include "recent.h"
#include "zeros.h"


/* ---- The turn: one CPU of a VM executes at a time, in the order they asked ----------------------------------------- */

void vm_lock(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    u64 mine = vm->ticket++;
    atomic_fetch_add(&vm->waiting, 1);
    while (vm->serving != mine)
        pthread_cond_wait(&vm->turn, &vm->lock);
    atomic_fetch_sub(&vm->waiting, 1);
    pthread_mutex_unlock(&vm->lock);
}
void vm_unlock(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->serving++;
    pthread_cond_broadcast(&vm->turn);
    pthread_mutex_unlock(&vm->lock);
}
void vm_yield(struct vm *vm)
{
    if (atomic_load_explicit(&vm->waiting, memory_order_relaxed)) {
        vm_unlock(vm);
        vm_lock(vm);
    }
}

struct vm *vm_create(void)
{
    struct vm *vm = zeros_create(sizeof *vm);
    if (!vm)
        return NULL;
    decode_init();
    pthread_mutex_init(&vm->lock, NULL);
    pthread_mutex_init(&vm->lines_lock, NULL);
    pthread_mutex_init(&vm->chips, NULL);
    pthread_cond_init(&vm->turn, NULL);
    vm->a20_mask = ~0ull;
    atomic_store(&vm->deadline, CORE_NEVER);
    atomic_store(&vm->soon, CORE_NEVER);
    vm->turn_left = CORE_TURN;
    return vm;
}

static size_t dirty_size(u64 size) { return ((size >> 12) + 63) / 64 * sizeof(u64); }
static size_t lines_size(u64 size) { return (size >> 12) * sizeof(u32); }

static void free_slot(struct slot *slot)
{
    zeros_destroy(slot->dirty, dirty_size(slot->size));
    zeros_destroy(slot->lines, lines_size(slot->size));
    *slot = (struct slot){0};
}

void vm_destroy(struct vm *vm)
{
    if (!vm)
        return;
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            vcpu_destroy(vm->vcpus[i]);
    for (unsigned i = 0; i < vm->slot_end; i++)
        free_slot(&vm->slots[i]);
    code_memory_destroy(vm->code);
    free(vm->line_queue);
    irqchip_destroy(vm->irqchip);
    fresh_destroy(vm);
    pthread_mutex_destroy(&vm->lock);
    pthread_mutex_destroy(&vm->lines_lock);
    pthread_mutex_destroy(&vm->chips);
    pthread_cond_destroy(&vm->turn);
    zeros_destroy(vm, sizeof *vm);
}

/* ---- Memory -------------------------------------------------------------------------------------------------------------- */

struct slot *vm_find_slot(struct vm *vm, u64 physical)
{
    unsigned low = 0, high = vm->slot_count;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        struct slot *slot = vm->sorted[middle];
        if (physical < slot->address)
            high = middle;
        else if (physical - slot->address >= slot->size)
            low = middle + 1;
        else {
            __atomic_store_n(&vm->last_slot, slot, __ATOMIC_RELAXED);
            return slot;
        }
    }
    return NULL;
}

static void flush_everything(struct vm *vm)
{
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i]) {
            tlb_flush(vm->vcpus[i]);
            cache_forget(vm->vcpus[i]);
        }
}

#define ADDRESSES (1ull << 52) /* the most that a page table entry can address (Intel SDM 3A 4.1.4) */

u64 alias_page(const struct slot *of, u64 page, const struct slot *in)
{
    u64 at = of->backing.offset + (page - of->address) - in->backing.offset;
    if (of == in || !of->backed || !in->backed || of->backing.device != in->backing.device ||
        of->backing.inode != in->backing.inode || at >= in->size)
        return NO_PAGE;
    return in->address + at;
}

static bool are_aliases(const struct slot *a, const struct slot *b)
{
    return alias_page(a, a->address, b) != NO_PAGE || alias_page(b, b->address, a) != NO_PAGE;
}

static void find_aliases(struct vm *vm)
{
    vm->aliased = false;
    for (unsigned i = 0; i < vm->slot_count; i++)
        for (unsigned k = 0; k < i && !vm->aliased; k++)
            vm->aliased = are_aliases(vm->sorted[i], vm->sorted[k]);
}

void vm_set_backing(struct vm *vm, unsigned number, const struct core_backing *backing)
{
    vm->slots[number].backed = true;
    vm->slots[number].backing = *backing;
    flush_everything(vm); /* what is decoded is noted in all aliases */
    find_aliases(vm);
}

int vm_map(struct vm *vm, unsigned number, uint64_t address, void *host, uint64_t size, unsigned flags)
{
    if (number >= CORE_SLOTS || (address | size) & 0xfff || (size && !host) || size > ADDRESSES || address > ADDRESSES - size ||
        flags & ~(unsigned)SLOT_READ_ONLY)
        return -EINVAL;
    struct slot *slot = &vm->slots[number];
    for (unsigned i = 0; i < vm->slot_end; i++)
        if (size && &vm->slots[i] != slot && vm->slots[i].size && address < vm->slots[i].address + vm->slots[i].size &&
            vm->slots[i].address < address + size)
            return -EEXIST;
    struct slot fresh = {.address = address, .size = size, .host = host, .flags = flags};
    if (size) {
        fresh.dirty = zeros_create(dirty_size(size));
        fresh.lines = zeros_create(lines_size(size));
        if (!fresh.dirty || !fresh.lines) {
            free_slot(&fresh);
            return -ENOMEM;
        }
    }
    flush_everything(vm);
    free_slot(slot);
    *slot = fresh;
    vm->slot_count = 0;
    vm->last_slot = NULL;
    vm->slot_end = vm->slot_end > number ? vm->slot_end : number + 1;
    for (unsigned i = 0; i < vm->slot_end; i++)
        if (vm->slots[i].size)
            vm->sorted[vm->slot_count++] = &vm->slots[i];
    for (unsigned i = 1; i < vm->slot_count; i++)
        for (unsigned k = i; k && vm->sorted[k]->address < vm->sorted[k - 1]->address; k--) {
            struct slot *other = vm->sorted[k];
            vm->sorted[k] = vm->sorted[k - 1];
            vm->sorted[k - 1] = other;
        }
    find_aliases(vm);
    return 0;
}

size_t vm_dirty_log_size(struct vm *vm, unsigned number)
{
    return number < CORE_SLOTS ? ((vm->slots[number].size >> 12) + 7) / 8 : 0;
}

int vm_dirty_log(struct vm *vm, unsigned number, uint8_t *bitmap, size_t bytes)
{
    if (number >= CORE_SLOTS || !vm->slots[number].size)
        return -ENOENT;
    if (bytes != vm_dirty_log_size(vm, number))
        return -EINVAL;
    struct slot *slot = &vm->slots[number];
    pthread_mutex_lock(&vm->lock);
    bool in_turn = vm->serving != vm->ticket; /* no: nobody gets a turn before the lock is free, */
    atomic_fetch_add(&vm->stops, 1);          /* and nobody begins to execute */
    bool written = false;
    for (size_t i = 0; i * 8 < bytes; i++) {
        u64 word = atomic_load_explicit(&slot->dirty[i], memory_order_relaxed) ? atomic_exchange(&slot->dirty[i], 0) : 0;
        written |= word;
        memcpy(bitmap + i * 8, &word, bytes - i * 8 < 8 ? bytes - i * 8 : 8);
    }
    for (unsigned i = 0; written && i < CORE_VCPUS; i++) { /* writable TLB entries, which only pages have that are in the log, would not be logged */
        struct vcpu *c = vm->vcpus[i];
        if (c && (in_turn || atomic_load(&c->world) != WORLD_OUT))
            request_attention(c, ATTENTION_FLUSH);
        else if (c)
            tlb_flush_writes(c, false);
    }
    atomic_fetch_sub(&vm->stops, 1);
    pthread_cond_broadcast(&vm->turn);
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

void vm_set_a20(struct vm *vm, bool enabled)
{
    u64 mask = enabled ? ~0ull : ~(u64)(1 << 20);
    if (mask == vm->a20_mask)
        return;
    vm->a20_mask = mask;
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            tlb_flush(vm->vcpus[i]);
}

bool vm_set_parallel(struct vm *vm, bool parallel)
{
    bool was = vm->parallel;
    chip_apply_lines(vm);
    vm->parallel = parallel && vm->time == TIME_HOST && !vm->fresh;
    for (unsigned i = 0; was != vm->parallel && i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            mode_changed(vm->vcpus[i]); /* other code: KEY_SHARED */
    return vm->parallel;
}

void vm_set_paced(struct vm *vm, bool paced) { vm->paced = paced; }
void vm_set_repeatable(struct vm *vm, bool repeatable) { vm->repeatable = repeatable; }

void vm_set_time(struct vm *vm, enum core_time mode)
{
    u64 now = vm_time(vm); /* it goes on from here */
    vm->time = mode;
    vm->now = now;
    vm->host_origin = vm_clock(vm) - now;
    vm->lag = 0;
}

/* ---- CPUs ---------------------------------------------------------------------------------------------------------------- */

/* IA32_ARCH_CAPABILITIES (SDM 4 table 2-2): what speculation could leak. Nothing is speculated here: the _NO bits of Meltdown,
 * L1TF, SSB, MDS, MCE on page sizes, TAA, stale MMIO data (three), BHI, GDS, RFDS. */
#define NOT_VULNERABLE \
    (1ull << 0 | 1ull << 3 | 1ull << 4 | 1ull << 5 | 1ull << 6 | 1ull << 8 | 7ull << 13 | 1ull << 20 | 1ull << 26 | 1ull << 27)

/* Intel SDM 3A table 9-1. */
void vcpu_reset(struct vcpu *c)
{
    recent_forget_places(c);
    memset(c->gpr, 0, sizeof c->gpr);
    c->gpr[RDX] = 0x600;
    c->gpr[GPR_IP] = 0xfff0;
    set_rflags(c, 2);
    c->cr0 = CR0_CD | CR0_NW | CR0_ET;
    c->cr2 = c->cr3 = c->cr4 = c->cr8 = c->efer = 0;
    c->xcr0 = 1;
    c->pkru = 0;
    for (unsigned i = 0; i < 6; i++)
        c->seg[i] = (struct segment){0, 0xffff, 3 | ATTR_S | ATTR_P, 0};
    c->seg[SEG_CS] = (struct segment){0xffff0000, 0xffff, 11 | ATTR_S | ATTR_P, 0xf000};
    c->seg[SEG_LDTR] = (struct segment){0, 0xffff, 2 | ATTR_P, 0};
    c->seg[SEG_TR] = (struct segment){0, 0xffff, 11 | ATTR_P, 0};
    c->gdt = c->idt = (struct table_register){0, 0xffff};
    memset(c->dr, 0, sizeof c->dr);
    c->dr6 = 0xffff0ff0;
    c->dr7 = 0x400;
    memset(c->xmm, 0, sizeof c->xmm);
    c->mxcsr = 0x1f80;
    memset(c->fpr, 0, sizeof c->fpr);
    c->fcw = 0x37f; /* as after FNINIT, as KVM has it; at power-up (SDM 3A table 9-1) all would be unmasked */
    c->fsw = c->ftw = 0;
    c->fop = c->fcs = c->fds = 0;
    c->fip = c->fdp = 0;
    c->msr = (struct msr_state){
        .pat = 0x0007040600070406, .apic_base = 0xfee00000 | 1 << 11 | (c->index ? 0 : 1 << 8), .misc_enable = 1 | 1 << 11 | 1 << 12 /* no BTS, no PEBS */,
        .platform_info = 10 << 8 /* times 100 MHz */, .mtrr_cap = 8 | 1 << 8 | 1 << 10, .arch_capabilities = NOT_VULNERABLE,
        .mcg_cap = MC_BANKS,
    };
    c->cpl = 0;
    c->alone = c->shadow_sti = c->shadow_ss = c->began_sti = c->began_ss = c->nmi_pending = c->nmi_masked = c->halted = false;
    c->delivering = -1;
    /* Without a LAPIC nobody could send it an INIT. */
    c->mp_state = c->index && c->vm->irqchip ? KVM_MP_STATE_UNINITIALIZED : KVM_MP_STATE_RUNNABLE;
    c->fault = (struct fault){0};
    c->debug_hits = c->debug_pending = 0;
    c->reading = c->restart = c->input_ready = c->completing = false;
    c->held.reason = EXIT_NONE;
    c->waiting_at = c->waiting_size;
    c->input_at = c->input_size = 0;
    memset(&c->injected, 0, sizeof c->injected);
    c->reads = c->reads_used = c->store_count = c->stores_reported = 0;
    mode_changed(c);
    tlb_flush(c);
}

/* Intel SDM 3A table 9-1, the column INIT: the FPU, XMM, MSRs and the caching bits stay. */
void vcpu_init(struct vcpu *c)
{
    struct x87_register fpr[8];
    union vector xmm[16];
    struct msr_state msr = c->msr;
    u32 mxcsr = c->mxcsr, pkru = c->pkru;
    u16 fcw = c->fcw, fsw = c->fsw, ftw = c->ftw, fop = c->fop, fcs = c->fcs, fds = c->fds;
    u64 fip = c->fip, fdp = c->fdp, xcr0 = c->xcr0, caching = c->cr0 & (CR0_CD | CR0_NW);
    memcpy(fpr, c->fpr, sizeof fpr);
    memcpy(xmm, c->xmm, sizeof xmm);
    vcpu_reset(c);
    memcpy(c->fpr, fpr, sizeof fpr);
    memcpy(c->xmm, xmm, sizeof xmm);
    c->msr = msr;
    c->mxcsr = mxcsr, c->pkru = pkru;
    c->fcw = fcw, c->fsw = fsw, c->ftw = ftw, c->fop = fop, c->fcs = fcs, c->fds = fds;
    c->fip = fip, c->fdp = fdp, c->xcr0 = xcr0;
    c->cr0 = (c->cr0 & ~(u64)(CR0_CD | CR0_NW)) | caching;
    mode_changed(c);
}

enum { VCPU_ROOM = HOST_STACK + sizeof(struct vcpu) };

struct vcpu *vcpu_create(struct vm *vm, unsigned index)
{
    if (index >= CORE_VCPUS || vm->vcpus[index])
        return NULL;
    u8 *room = zeros_create(VCPU_ROOM);
    if (!room)
        return NULL;
    struct vcpu *c = (struct vcpu *)(room + HOST_STACK);
    c->vm = vm;
    c->index = index;
    if (cache_create(c)) {
        zeros_destroy(room, VCPU_ROOM);
        return NULL;
    }
    cpuid_defaults(c);
    vm->vcpus[index] = c;
    vm->vcpu_count++;
    vcpu_reset(c);
    return c;
}

void vcpu_destroy(struct vcpu *c)
{
    if (!c)
        return;
    c->vm->vcpus[c->index] = NULL;
    c->vm->vcpu_count--;
    cache_destroy(c);
    stops_free(c);
    free(c->tracer);
    free(c->waiting);
    zeros_destroy((u8 *)c - HOST_STACK, VCPU_ROOM);
}

size_t vcpu_peek(struct vcpu *c, uint64_t linear, void *data, size_t size)
{
    size_t done = 0;
    while (done < size) {
        u64 physical;
        size_t here = 0x1000 - (linear & 0xfff);
        struct slot *slot = vcpu_translate(c, linear, &physical) ? NULL : vm_slot(c->vm, physical);
        if (!slot)
            break;
        here = here < size - done ? here : size - done;
        memcpy((u8 *)data + done, slot->host + (physical - slot->address), here);
        done += here;
        linear += here;
    }
    return done;
}

int vcpu_translate(struct vcpu *c, uint64_t linear, uint64_t *physical)
{
    return mmu_probe(c, linear, physical) ? 0 : -EFAULT;
}
