/* Paging, the TLB, and the slow path of every access (Intel SDM 3A chapter 4). */
#include "atomic.h"
#include "opcodes.h"
#include "tracer.h"

enum { PTE_P = 1, PTE_W = 2, PTE_U = 4, PTE_A = 0x20, PTE_D = 0x40, PTE_PS = 0x80, PTE_G = 0x100 };
#define PTE_NX (1ull << 63)
enum { PF_PRESENT = 1, PF_WRITE = 2, PF_USER = 4, PF_RESERVED = 8, PF_FETCH = 16, PF_KEY = 32 };

/* ---- Guest-physical memory --------------------------------------------------------------------------------------------- */

static void mark_dirty(struct slot *slot, u64 physical)
{
    u64 page = (physical - slot->address) >> 12, bit = 1ull << (page & 63);
    if (!(atomic_load_explicit(&slot->dirty[page >> 6], memory_order_relaxed) & bit))
        atomic_fetch_or_explicit(&slot->dirty[page >> 6], bit, memory_order_relaxed);
}

u64 physical_read(struct vcpu *c, u64 physical, unsigned bytes)
{
    u64 value = ~0ull;
    struct slot *slot = vm_slot(c->vm, physical & c->vm->a20_mask);
    if (slot) /* a table's entry, at a multiple of its size */
        value = peek(slot->host + ((physical & c->vm->a20_mask) - slot->address), bytes);
    return value;
}

static u32 lines_of_page(const struct slot *slot, u64 physical)
{
    return __atomic_load_n(&slot->lines[(physical - slot->address) >> 12], __ATOMIC_RELAXED);
}
/* Whether there is code in the lines of those bytes, which are on one page. */
static bool hits_code(const struct slot *slot, u64 physical, unsigned bytes)
{
    u64 at = physical & 0xfff;
    u32 lines = lines_of_page(slot, physical);
    return unlikely(lines) && lines & (u32)((2ull << ((at + bytes - 1) >> 7)) - (1ull << (at >> 7)));
}

/* An entry of a table becomes `value`, unless it is not what it was any more. */
static bool swap_entry(struct vcpu *c, u64 physical, unsigned bytes, u64 was, u64 value)
{
    physical &= c->vm->a20_mask;
    struct slot *slot = vm_slot(c->vm, physical);
    if (!slot || slot->flags & SLOT_READ_ONLY)
        return true;
    bool kills = hits_code(slot, physical, bytes), stops = kills && world_stop(c);
    if (kills)
        cache_kill(c->vm, slot, physical, bytes);
    bool swapped = compare_and_swap(slot->host + (physical - slot->address), bytes, was, value);
    if (swapped)
        mark_dirty(slot, physical);
    if (stops)
        world_go(c);
    else if (unlikely(lines_of_page(slot, physical)))
        cache_lines_written(c, slot, physical, bytes);
    return swapped;
}

/* ---- Walking the tables -------------------------------------------------------------------------------------------------- */

struct walk {
    u64 physical;
    bool paged, user, write, nx, dirty, global;
    unsigned key;             /* protection key of a user page */
    u64 large;                /* the offset bits of a large page; 0: 4 KiB */
    unsigned levels;
    u64 entry_address[5], entry[5];
    unsigned entry_bytes;
};

static u64 physical_limit(const struct vcpu *c) { return ~0ull << c->physical_bits; }

/* Find the page. Returns 0, or the error code's P and RSVD bits with bit 31 set. */
static u32 walk_tables(struct vcpu *c, u64 linear, struct walk *w)
{
    enum { FAILED = 1u << 31 };
    *w = (struct walk){.user = true, .write = true, .physical = linear};
    if (!(c->cr0 & CR0_PG)) {
        w->physical = (u32)linear;
        w->dirty = true;
        return 0;
    }
    w->paged = true;
    bool nxe = c->efer & EFER_NXE;
    if (!(c->cr4 & CR4_PAE)) { /* 32-bit paging, 4.3 */
        u64 table = c->cr3 & 0xfffff000;
        w->entry_bytes = 4;
        for (unsigned shift = 22;; shift = 12) {
            unsigned n = w->levels++;
            w->entry_address[n] = table + (linear >> shift & 0x3ff) * 4;
            u64 e = w->entry[n] = (u32)physical_read(c, w->entry_address[n], 4);
            if (!(e & PTE_P))
                return (u32)FAILED;
            w->user &= !!(e & PTE_U);
            w->write &= !!(e & PTE_W);
            if (shift == 22 && e & PTE_PS && c->cr4 & CR4_PSE) { /* PSE-36: bits 20:13 are address bits 39:32 */
                if (e & 1 << 21)
                    return (u32)FAILED | PF_PRESENT | PF_RESERVED;
                w->physical = (e & 0xffc00000) | (e >> 13 & 0xff) << 32 | (linear & 0x3fffff);
                w->large = 0x3fffff;
                w->dirty = e & PTE_D;
                w->global = e & PTE_G && c->cr4 & CR4_PGE;
                return 0;
            }
            table = e & 0xfffff000;
            if (shift == 12) {
                w->physical = table | (linear & 0xfff);
                w->dirty = e & PTE_D;
                w->global = e & PTE_G && c->cr4 & CR4_PGE;
                return 0;
            }
        }
    }
    bool long_mode = c->efer & EFER_LMA;
    u64 reserved = (physical_limit(c) & 0x000fffffffffffff) | (nxe ? 0 : PTE_NX);
    u64 address_bits = 0x000ffffffffff000;
    u64 table;
    unsigned shift;
    w->entry_bytes = 8;
    if (long_mode) { /* 4.5 */
        table = c->cr3 & address_bits;
        shift = c->cr4 & CR4_LA57 ? 48 : 39;
    } else { /* PAE, 4.4: the four top entries are registers */
        u64 e = c->pdptr[linear >> 30 & 3];
        if (!(e & PTE_P))
            return (u32)FAILED;
        reserved |= 0x7ff0000000000000;
        table = e & address_bits;
        shift = 21;
    }
    for (;; shift -= 9) {
        unsigned n = w->levels++;
        w->entry_address[n] = table + (linear >> shift & 0x1ff) * 8;
        u64 e = w->entry[n] = physical_read(c, w->entry_address[n], 8);
        if (!(e & PTE_P))
            return (u32)FAILED;
        bool leaf = shift == 12 || (e & PTE_PS && shift <= 30);
        if (e & reserved || (e & PTE_PS && (shift > 30 || (shift == 30 && !has_feature(c, FEATURE_PAGE1GB)))))
            return (u32)FAILED | PF_PRESENT | PF_RESERVED;
        w->user &= !!(e & PTE_U);
        w->write &= !!(e & PTE_W);
        w->nx |= e >> 63;
        if (leaf) {
            u64 inside = (1ull << shift) - 1;
            if (e & inside & address_bits & ~(shift > 12 ? 0x1000ull /* PAT */ : 0))
                return (u32)FAILED | PF_PRESENT | PF_RESERVED;
            w->physical = (e & address_bits & ~inside) | (linear & inside);
            w->large = shift > 12 ? inside : 0;
            w->dirty = e & PTE_D;
            w->global = e & PTE_G && c->cr4 & CR4_PGE;
            w->key = e >> 59 & 15;
            return 0;
        }
        table = e & address_bits;
    }
}

/* 4.6: may the access go there? Returns 0, or the error code. */
static u32 check_rights(const struct vcpu *c, const struct walk *w, unsigned access, bool user_mode, bool ac)
{
    if (!w->paged)
        return 0;
    u32 error = PF_PRESENT;
    bool wp = c->cr0 & CR0_WP, by_key = false;
    if (access & ACCESS_EXECUTE) {
        if ((w->nx && c->efer & EFER_NXE) || (user_mode ? !w->user : w->user && c->cr4 & CR4_SMEP))
            return error;
        return 0;
    }
    if (w->user && c->cr4 & CR4_PKE && c->efer & EFER_LMA) { /* 4.6.2 */
        u32 rights = c->pkru >> (2 * w->key) & 3;
        by_key = rights & 1 || (access & ACCESS_WRITE && rights & 2 && (user_mode || wp));
        error |= by_key ? PF_KEY : 0; /* 4.7: whatever else is wrong */
    }
    if (user_mode ? !w->user : w->user && c->cr4 & CR4_SMAP && !ac)
        return error;
    if (access & ACCESS_WRITE && !w->write && (user_mode || wp))
        return error;
    return by_key ? error : 0;
}

/* False: an entry has changed since it was walked. */
static bool set_accessed_dirty(struct vcpu *c, struct walk *w, bool write)
{
    for (unsigned i = 0; i < w->levels; i++) {
        u64 want = w->entry[i] | PTE_A | (write && i == w->levels - 1 ? PTE_D : 0);
        if (want == w->entry[i])
            continue;
        if (!swap_entry(c, w->entry_address[i], w->entry_bytes, w->entry[i], want))
            return false;
        w->entry[i] = want;
    }
    w->dirty |= write;
    return true;
}

/* ---- TLB ---------------------------------------------------------------------------------------------------------------------- */

static struct tlb_entry *entries(struct tlb *t, unsigned kind) { return kind == TLB_READ ? t->read : kind == TLB_WRITE ? t->write : t->execute; }

static void invalidate(struct tlb *t, unsigned kind, unsigned at)
{
    __atomic_store_n(&entries(t, kind)[at].page, TLB_INVALID(at), __ATOMIC_RELAXED);
}
static void invalidate_second(struct tlb *t, unsigned kind, unsigned at)
{
    __atomic_store_n(&t->second[kind][at].page, TLB_INVALID(at), __ATOMIC_RELAXED);
}
/* Both places, or those of them that are not global. */
static void forget_place(struct tlb *t, unsigned kind, unsigned at, bool local)
{
    if (!(local && t->physical[kind][at] & TLB_GLOBAL))
        invalidate(t, kind, at);
    if (!(local && t->second_physical[kind][at] & TLB_GLOBAL))
        invalidate_second(t, kind, at);
}

static void forget_watched(struct vcpu *c)
{
    for (unsigned kind = 0; kind < TLB_KINDS; kind++)
        c->watched[kind].page = ~0ull;
}

static void forget_kind(struct tlb *t, unsigned kind, bool local)
{
    for (unsigned i = 0; i < TLB_SIZE; i++)
        forget_place(t, kind, i, local);
}

void tlb_clear(struct vcpu *c)
{
    forget_watched(c);
    for (unsigned table = 0; table < TLB_TABLES; table++)
        for (unsigned kind = 0; kind < TLB_KINDS; kind++)
            forget_kind(&c->tlbs[table], kind, false);
    code_map_clear(c);
    c->filled[0].count = c->filled[1].count = 0;
    c->large_low = ~0ull;
    c->large_high = 0;
}

static void drop_filled(struct vcpu *c, struct filled *f, bool local)
{
    for (unsigned i = 0; i < f->count; i++) {
        unsigned which = f->at[i] >> 10;
        forget_place(&c->tlbs[which / TLB_KINDS], which % TLB_KINDS, f->at[i] & (TLB_SIZE - 1), local);
    }
    f->count = 0;
}

void tlb_flush(struct vcpu *c)
{
    if (c->filled[0].count > TLB_FILLED || c->filled[1].count > TLB_FILLED) {
        tlb_clear(c);
        return;
    }
    forget_watched(c);
    drop_filled(c, &c->filled[0], false);
    drop_filled(c, &c->filled[1], false);
    c->large_low = ~0ull;
    c->large_high = 0;
    code_map_clear(c);
}

void tlb_flush_local(struct vcpu *c)
{
    forget_watched(c);
    code_map_clear_local(c);
    if (c->filled[0].count <= TLB_FILLED) {
        drop_filled(c, &c->filled[0], true);
        return;
    }
    c->filled[0].count = 0;
    for (unsigned table = 0; table < TLB_NONE; table++)
        for (unsigned kind = 0; kind < TLB_KINDS; kind++)
            forget_kind(&c->tlbs[table], kind, true);
}

void tlb_flush_page(struct vcpu *c, u64 linear)
{
    if (linear >= c->large_low && linear <= c->large_high) { /* all of a large page goes (4.10.4.1) */
        tlb_flush(c);
        return;
    }
    forget_watched(c);
    for (unsigned table = 0; table < TLB_NONE; table++)
        for (unsigned kind = 0; kind < TLB_KINDS; kind++)
            forget_place(&c->tlbs[table], kind, linear >> 12 & (TLB_SIZE - 1), false);
    code_map_drop(c, linear);
}

/* An entry for writes is dropped; the log has its page once more. */
static void drop_write(struct vcpu *c, u64 *page, u64 invalid, u64 physical, bool mark)
{
    if (*page == invalid)
        return;
    *page = invalid;
    struct slot *slot = mark ? vm_slot(c->vm, physical & PAGE_MASK) : NULL;
    if (slot)
        mark_dirty(slot, physical & PAGE_MASK);
}

void tlb_flush_writes(struct vcpu *c, bool mark)
{
    forget_watched(c);
    for (unsigned table = 0; table < TLB_NONE; table++) {
        struct tlb *t = &c->tlbs[table];
        if (!(c->tables >> table & 1))
            continue;
        for (unsigned i = 0; i < TLB_SIZE; i++) {
            drop_write(c, &t->write[i].page, TLB_INVALID(i), t->physical[TLB_WRITE][i], mark);
            drop_write(c, &t->second[TLB_WRITE][i].page, TLB_INVALID(i), t->second_physical[TLB_WRITE][i], mark);
        }
    }
}

/* The second places come last: an entry goes there before another takes its first (enter). */
static bool may_write_by(const struct tlb *t, u64 page)
{
    for (unsigned i = 0; i < TLB_SIZE; i++)
        if ((__atomic_load_n(&t->physical[TLB_WRITE][i], __ATOMIC_ACQUIRE) & PAGE_MASK) == page &&
            __atomic_load_n(&t->write[i].page, __ATOMIC_ACQUIRE) != TLB_INVALID(i))
            return true;
    for (unsigned i = 0; i < TLB_SIZE; i++)
        if ((__atomic_load_n(&t->second_physical[TLB_WRITE][i], __ATOMIC_ACQUIRE) & PAGE_MASK) == page &&
            __atomic_load_n(&t->second[TLB_WRITE][i].page, __ATOMIC_ACQUIRE) != TLB_INVALID(i))
            return true;
    return false;
}

bool tlb_may_write(const struct vcpu *c, u64 page)
{
    u32 moves = atomic_load_explicit(&c->moves, memory_order_acquire);
    for (unsigned table = 0; table < TLB_NONE; table++)
        if (may_write_by(&c->tlbs[table], page))
            return true;
    return moves & 1 || atomic_load_explicit(&c->moves, memory_order_acquire) != moves;
}

void tlb_drop_writes_of(struct vcpu *c, u64 page)
{
    for (unsigned table = 0; table < TLB_NONE; table++) {
        struct tlb *t = &c->tlbs[table];
        for (unsigned i = 0; c->tables >> table & 1 && i < TLB_SIZE; i++) {
            if ((t->physical[TLB_WRITE][i] & PAGE_MASK) == page)
                invalidate(t, TLB_WRITE, i);
            if ((t->second_physical[TLB_WRITE][i] & PAGE_MASK) == page)
                invalidate_second(t, TLB_WRITE, i);
        }
    }
}

/* A table that is used for the first time is of zeros. */
static struct tlb *table_of(struct vcpu *c, unsigned table)
{
    if (unlikely(!(c->tables >> table & 1))) {
        c->tables |= 1u << table;
        for (unsigned kind = 0; kind < TLB_KINDS; kind++) {
            invalidate(&c->tlbs[table], kind, 0);
            invalidate(&c->tlbs[table], kind, TLB_SIZE - 1);
            invalidate_second(&c->tlbs[table], kind, 0);
            invalidate_second(&c->tlbs[table], kind, TLB_SIZE - 1);
        }
    }
    return &c->tlbs[table];
}

/* After CPL, AC, CR0, CR4 changed. */
void tlb_select(struct vcpu *c)
{
    bool ac = c->rflags & FLAG_AC;
    unsigned table = c->cpl == 3 ? TLB_USER : c->cr4 & CR4_SMAP && ac ? TLB_SUPERVISOR_AC : TLB_SUPERVISOR;
    if (c->cpl == 3 && ac && c->cr0 & CR0_AM)
        table = TLB_NONE;
    c->map = table_of(c, table);
    c->tlb = c->tracer && c->tracer->memory ? table_of(c, TLB_NONE) : c->map;
    bool fixed = c->tlb == &c->tlbs[TLB_USER] || (c->tlb == &c->tlbs[TLB_SUPERVISOR] && !c->cpl && !(c->cr4 & CR4_SMAP));
    c->key = (c->key & ~(u64)KEY_FIXED_TLB) | (fixed ? KEY_FIXED_TLB : 0);
}

static bool page_watched(const struct vcpu *c, u64 linear, u64 physical)
{
    u64 page = linear & PAGE_MASK;
    if (unlikely(c->vm->fresh) && fresh_page(c->vm, physical))
        return true;
    if ((has_stops(c, STOP_WATCH) || has_stops(c, STOP_WATCH_PHYSICAL)) && stops_watch_page(c, linear, physical))
        return true;
    if (c->dr7 & 0xff)
        for (unsigned i = 0; i < 4; i++)
            if (c->dr7 >> (2 * i) & 3 && c->dr7 >> (16 + 4 * i) & 1 && (c->dr[i] & PAGE_MASK) == page)
                return true;
    return false;
}

static void put_first(struct tlb *t, enum tlb_kind kind, unsigned at, const struct tlb_entry *from, u64 of_page)
{
    struct tlb_entry *e = &entries(t, kind)[at];
    __atomic_store_n(&t->physical[kind][at], of_page, __ATOMIC_RELEASE); /* tlb_may_write reads both in other threads */
    e->host = from->host;
    __atomic_store_n(&e->page, from->page, __ATOMIC_RELEASE);
    if (kind != TLB_EXECUTE)
        t->distances[kind == TLB_WRITE][at].distance = from->host - from->page;
}
static void put_second(struct tlb *t, enum tlb_kind kind, unsigned at, const struct tlb_entry *from, u64 of_page)
{
    __atomic_store_n(&t->second_physical[kind][at], of_page, __ATOMIC_RELEASE);
    t->second[kind][at].host = from->host;
    __atomic_store_n(&t->second[kind][at].page, from->page, __ATOMIC_RELEASE);
}

/* The entry in the second place changes with that in the first. */
static void change_places(struct vcpu *c, enum tlb_kind kind, unsigned at)
{
    struct tlb *t = c->map;
    struct tlb_entry first = entries(t, kind)[at], second = t->second[kind][at];
    u64 of_first = t->physical[kind][at], of_second = t->second_physical[kind][at];
    atomic_fetch_add_explicit(&c->moves, 1, memory_order_acq_rel);
    put_first(t, kind, at, &second, of_second);
    put_second(t, kind, at, &first, of_first);
    atomic_fetch_add_explicit(&c->moves, 1, memory_order_release);
    t->second_newer[kind][at] ^= 1;
}

/* Of the entries of that place, the one that was filled last stays, in the second. */
static void keep_newer(struct tlb *t, enum tlb_kind kind, unsigned at)
{
    const struct tlb_entry *first = &entries(t, kind)[at];
    bool has_second = t->second[kind][at].page != TLB_INVALID(at);
    if (first->page != TLB_INVALID(at) && !(has_second && t->second_newer[kind][at]))
        put_second(t, kind, at, first, t->physical[kind][at]);
    t->second_newer[kind][at] = 0;
}

static void enter(struct vcpu *c, unsigned table, enum tlb_kind kind, u64 linear, u64 physical, u64 host, const struct walk *w)
{
    unsigned at = linear >> 12 & (TLB_SIZE - 1);
    struct filled *f = &c->filled[w->global];
    if (f->count < TLB_FILLED)
        f->at[f->count] = (u16)((table * TLB_KINDS + kind) << 10 | at);
    f->count += f->count <= TLB_FILLED;
    if (w->large) {
        u64 first = linear & ~w->large, last = linear | w->large;
        c->large_low = first < c->large_low ? first : c->large_low;
        c->large_high = last > c->large_high ? last : c->large_high;
    }
    keep_newer(&c->tlbs[table], kind, at);
    const struct tlb_entry entry = {linear & PAGE_MASK, host};
    put_first(&c->tlbs[table], kind, at, &entry, (physical & PAGE_MASK) | (w->global ? TLB_GLOBAL : 0));
}

/* After a walk for `access`, which is allowed. */
static void tlb_fill(struct vcpu *c, u64 linear, const struct walk *w, unsigned access)
{
    unsigned table = (unsigned)(c->map - c->tlbs);
    if (table == TLB_NONE)
        return;
    u64 physical = w->physical & c->vm->a20_mask;
    struct slot *slot = vm_slot(c->vm, physical);
    u64 host = slot ? (u64)(uintptr_t)slot->host + ((physical & PAGE_MASK) - slot->address) : 0;
    if (access & ACCESS_EXECUTE) {
        enter(c, table, TLB_EXECUTE, linear, physical, host, w);
        return;
    }
    if (!slot)
        return; /* the slow path, always */
    if (page_watched(c, linear, physical)) { /* the slow path, too; it need not walk the tables each time */
        enum tlb_kind kind = access & ACCESS_WRITE ? TLB_WRITE : TLB_READ;
        c->watched[kind].page = linear & PAGE_MASK;
        c->watched[kind].physical = physical & PAGE_MASK;
        c->watched[kind].map = &c->tlbs[table];
        return;
    }
    if (access & ACCESS_WRITE) { /* D is set and the log has it */
        if (lines_of_page(slot, physical) || slot->flags & SLOT_READ_ONLY)
            return;
        enter(c, table, TLB_WRITE, linear, physical, host, w);
        if (c->vm->parallel) { /* one that decodes there notes it, and then looks for such entries (note_lines) */
            atomic_thread_fence(memory_order_seq_cst);
            if (lines_of_page(slot, physical))
                invalidate(&c->tlbs[table], TLB_WRITE, linear >> 12 & (TLB_SIZE - 1));
        }
    } else {
        enter(c, table, TLB_READ, linear, physical, host, w);
    }
}

/* Translate with rights; fill the TLB. */
static u64 translate(struct vcpu *c, u64 linear, unsigned access)
{
    struct walk w;
    bool supervisor = access & ACCESS_SUPERVISOR, user = c->cpl == 3 && !supervisor;
    c->counters.tlb_misses++;
    u32 error;
again:
    error = walk_tables(c, linear, &w);
    if (error)
        error &= 0x7fffffff;
    else if (!(error = check_rights(c, &w, access, user, c->rflags & FLAG_AC && !supervisor)))
        goto allowed;
    if (access & ACCESS_WRITE)
        error |= PF_WRITE;
    if (user)
        error |= PF_USER;
    if (access & ACCESS_EXECUTE && ((c->efer & EFER_NXE && c->cr4 & CR4_PAE) || c->cr4 & CR4_SMEP))
        error |= PF_FETCH;
    raise_page_fault(c, c->now, linear, error);
allowed:
    if (w.paged && !set_accessed_dirty(c, &w, access & ACCESS_WRITE))
        goto again;
    if (access & ACCESS_WRITE) {
        u64 physical = w.physical & c->vm->a20_mask;
        struct slot *slot = vm_slot(c->vm, physical);
        if (slot && !(slot->flags & SLOT_READ_ONLY))
            mark_dirty(slot, physical); /* the instruction may still be put off, but it will write */
    }
    if (!supervisor)
        tlb_fill(c, linear, &w, access);
    return w.physical & c->vm->a20_mask;
}

u64 mmu_translate(struct vcpu *c, u64 linear, unsigned access)
{
    unsigned at = linear >> 12 & (TLB_SIZE - 1);
    enum tlb_kind kind = access & ACCESS_EXECUTE ? TLB_EXECUTE : access & ACCESS_WRITE ? TLB_WRITE : TLB_READ;
    if (likely(entries(c->map, kind)[at].page == (linear & PAGE_MASK) && !(access & ACCESS_SUPERVISOR)))
        return (c->map->physical[kind][at] & PAGE_MASK) | (linear & 0xfff);
    c->looks = TLB_LOOKS; /* host code leaves one of so many to here, so that what is needed most has the first place, mostly */
    if (c->map->second[kind][at].page == (linear & PAGE_MASK) && !(access & ACCESS_SUPERVISOR)) {
        change_places(c, kind, at);
        return (c->map->physical[kind][at] & PAGE_MASK) | (linear & 0xfff);
    }
    if (c->watched[kind].page == (linear & PAGE_MASK) && c->watched[kind].map == c->map && !(access & ACCESS_SUPERVISOR))
        return c->watched[kind].physical | (linear & 0xfff);
    return translate(c, linear, access);
}

bool mmu_probe(struct vcpu *c, u64 linear, u64 *physical)
{
    struct walk w;
    if ((c->efer & EFER_LMA ? !canonical(c, linear) : linear >> 32) || walk_tables(c, linear, &w))
        return false;
    *physical = w.physical & c->vm->a20_mask;
    return true;
}

/* MOV to CR3 with PAE paging (4.4.1). */
bool load_pdptrs(struct vcpu *c, u64 cr3)
{
    u64 entries[4];
    for (unsigned i = 0; i < 4; i++) {
        entries[i] = physical_read(c, (cr3 & 0xffffffe0) + 8 * i, 8);
        if (entries[i] & PTE_P && entries[i] & (physical_limit(c) | 0x1e6))
            return false;
    }
    memcpy(c->pdptr, entries, sizeof entries);
    return true;
}

/* ---- Slow accesses ---------------------------------------------------------------------------------------------------------- */

/* What is wanted, page by page. */
struct piece { u64 linear, physical; unsigned bytes; };

static unsigned split(struct vcpu *c, u64 linear, unsigned bytes, unsigned access, struct piece p[2])
{
    unsigned here = 0x1000 - (unsigned)(linear & 0xfff);
    if (here > bytes)
        here = bytes;
    if (unlikely(c->efer & EFER_LMA && (!canonical(c, linear) || !canonical(c, linear + bytes - 1)))) {
        /* the segment decides between #SS and #GP */
        raise_error(c, c->now, c->now && c->now->seg == SEG_SS ? VECTOR_SS : VECTOR_GP, 0);
    }
    /* Intel SDM 3A table 6-7: the 10 bytes of the x87 to 8. 16 bytes: MOVUPS and its kind need not raise it. */
    unsigned alignment = bytes == 10 ? 8 : bytes <= 8 ? bytes : 1;
    if (unlikely(c->map == &c->tlbs[TLB_NONE] && !(access & ACCESS_SUPERVISOR) && linear & (alignment - 1)) &&
        !(opcodes[c->now->id].attributes & A_UNALIGNED))
        raise_error(c, c->now, VECTOR_AC, 0);
    p[0] = (struct piece){linear, mmu_translate(c, linear, access), here};
    if (here == bytes)
        return 1;
    u64 second = (linear + here) & c->linear_mask;
    p[1] = (struct piece){second, mmu_translate(c, second, access), bytes - here};
    return 2;
}

static bool ranges_meet(u64 a, u64 length_a, u64 b, u64 length_b)
{
    return a - b < length_b || b - a < length_a;
}

/* Break- and watchpoints on data. The instruction runs alone, so that it stops right after it. What the CPU accesses by
 * itself (`implicit`: descriptors, task states, the stack of an event) only the host watches; an event is not begun anew. */
static void check_watch(struct vcpu *c, u64 linear, u64 physical, unsigned bytes, bool write, bool implicit)
{
    if (likely(!page_watched(c, linear, physical)))
        return;
    bool unwritten = c->vm->fresh && !write && fresh_read(c->vm, physical, bytes, false);
    bool hit = stops_watch(c, linear, physical, bytes, write);
    u64 guest = 0;
    for (unsigned i = 0; i < 4 && !implicit; i++) { /* Intel SDM 3B 17.2.4, 17.2.5: 1 writes, 3 reads and writes */
        static const u8 lengths[4] = {1, 2, 8, 4};
        unsigned control = c->dr7 >> (16 + 4 * i) & 15, length = lengths[control >> 2];
        if (c->dr7 >> (2 * i) & 3 && ((control & 3) == 3 || ((control & 3) == 1 && write)) &&
            ranges_meet(c->dr[i] & ~(u64)(length - 1), length, linear, bytes))
            guest |= 1ull << i;
    }
    if (c->vm->fresh && write) {
        fresh_written(c->vm, physical, bytes);
        forget_watched(c); /* it may be whole now, and of the TLB's */
    }
    if ((hit || guest || (unwritten && has_stops(c, STOP_UNWRITTEN))) && !c->alone && c->delivering < 0)
        escape(c, ESCAPE_ALONE);
    if (unwritten) {
        fresh_read(c->vm, physical, bytes, true);
        c->counters.unwritten_reads++;
        stops_reach_unwritten(c, linear);
    }
    if (hit)
        stops_reach_watch(c, linear, physical, bytes, write);
    c->debug_hits |= guest;
}

/* Whether the instruction has read it before it began again; it is the next of `done_reads` then. Another engine may have
 * read in another order. */
static bool was_read(struct vcpu *c, u64 physical, unsigned bytes)
{
    for (unsigned i = c->reads_used; i < c->reads; i++) {
        struct mmio_access found = c->done_reads[i];
        if (found.address == physical && found.size == bytes) {
            c->done_reads[i] = c->done_reads[c->reads_used];
            c->done_reads[c->reads_used] = found;
            return true;
        }
    }
    return false;
}

/* Whether the running instruction is a move between a general register and memory, all of it in `bytes` here: nothing comes
 * after such an access that could make it begin anew, and the bus may answer at once. What else the access changes (vm.c,
 * io.c: devices of the core) is looked at after the instruction, which then runs alone. */
static bool is_move(const struct vcpu *c, unsigned bytes)
{
    const struct opcode *o = c->now ? &opcodes[c->now->id] : NULL;
    return o && o->map == M1 && o->opcode >= 0x88 && o->opcode <= 0x8b && bytes == 1u << c->now->size;
}

static void read_device(struct vcpu *c, u64 physical, u8 *data, unsigned bytes)
{
    if (c->delivering >= 0) { /* tables and stacks outside of RAM: as physical_read */
        memset(data, 0xff, bytes);
        return;
    }
    if (!c->alone) { /* `done_reads` are of one instruction */
        u64 value = 0;
        if (is_move(c, bytes) && !has_stops(c, STOP_UNCLAIMED) && bus_memory(c, physical, bytes, false, &value)) {
            memcpy(data, &value, bytes);
            return;
        }
        escape(c, ESCAPE_ALONE);
    }
    while (bytes) {
        unsigned n = bytes > 8 ? 8 : bytes;
        u64 value = 0;
        if (was_read(c, physical, n)) {
            value = c->done_reads[c->reads_used++].data;
        } else if (c->reads == MMIO_PIECES) {
            c->exit.reason = EXIT_ERROR;
            c->exit.message = "an instruction reads more memory-mapped data than the core can hold";
            escape(c, ESCAPE_EXIT);
        } else if (!mmio_read(c, physical, n, &value)) {
            c->exit = (struct vcpu_exit){.reason = EXIT_MMIO, .size = n, .count = 1, .address = physical};
            memset(c->data, 0xff, 8);
            c->data_size = n;
            escape(c, ESCAPE_EXIT);
        } else { /* a device of the core answers once, even if the instruction restarts */
            c->done_reads[c->reads++] = (struct mmio_access){physical, n, false, value};
            c->reads_used++;
        }
        memcpy(data, &value, n);
        data += n;
        physical += n;
        bytes -= n;
    }
}

static void write_device(struct vcpu *c, u64 physical, const u8 *data, unsigned bytes)
{
    if (!c->alone)
        escape(c, ESCAPE_ALONE);
    while (bytes) {
        unsigned n = bytes > 8 ? 8 : bytes;
        u64 value = 0;
        memcpy(&value, data, n);
        if (!mmio_write(c, physical, n, value)) {
            if (c->store_count == MMIO_PIECES) {
                c->exit.reason = EXIT_ERROR;
                c->exit.message = "an instruction stores more memory-mapped data than the core can hold";
                escape(c, ESCAPE_EXIT);
            }
            c->stores[c->store_count++] = (struct mmio_access){physical, n, true, value};
        }
        data += n;
        physical += n;
        bytes -= n;
    }
}

void mmu_read(struct vcpu *c, u64 linear, void *data, unsigned bytes, unsigned access)
{
    struct piece p[2];
    unsigned count = split(c, linear, bytes, access | ACCESS_READ, p);
    u8 *out = data;
    for (unsigned i = 0; i < count; i++) {
        check_watch(c, p[i].linear, p[i].physical, p[i].bytes, false, access & ACCESS_SUPERVISOR);
        struct slot *slot = vm_slot(c->vm, p[i].physical);
        if (slot)
            copy_in(out, slot->host + (p[i].physical - slot->address), p[i].bytes);
        else
            read_device(c, p[i].physical, out, p[i].bytes);
        out += p[i].bytes;
    }
    if (unlikely(c->tracer && c->tracer->memory))
        tracer_memory(c, linear, data, bytes, false, access & ACCESS_SUPERVISOR || c->delivering >= 0);
}

/* On one page. Nobody executes what was there after the instruction is done. */
static void write_ram(struct vcpu *c, struct slot *slot, u64 physical, const u8 *data, unsigned bytes)
{
    bool kills = hits_code(slot, physical, bytes), stops = kills && world_stop(c);
    if (kills)
        cache_kill(c->vm, slot, physical, bytes);
    copy_in(slot->host + (physical - slot->address), data, bytes);
    mark_dirty(slot, physical);
    if (stops)
        world_go(c);
    else if (unlikely(lines_of_page(slot, physical)))
        cache_lines_written(c, slot, physical, bytes);
}

void mmu_write(struct vcpu *c, u64 linear, const void *data, unsigned bytes, unsigned access)
{
    struct piece p[2];
    unsigned count = split(c, linear, bytes, access | ACCESS_WRITE, p);
    struct slot *slots[2];
    for (unsigned i = 0; i < count; i++) { /* all that may escape, before the first byte */
        check_watch(c, p[i].linear, p[i].physical, p[i].bytes, true, access & ACCESS_SUPERVISOR);
        slots[i] = vm_slot(c->vm, p[i].physical);
        if (slots[i] && !(slots[i]->flags & SLOT_READ_ONLY)) {
            if (hits_code(slots[i], p[i].physical, p[i].bytes) && !c->alone && !(access & ACCESS_SUPERVISOR))
                escape(c, ESCAPE_ALONE); /* it may be the running block that changes */
        } else if (!c->alone && !(access & ACCESS_SUPERVISOR)) {
            u64 value = 0;
            if (!slots[i] && is_move(c, p[i].bytes) && count == 1) {
                memcpy(&value, data, bytes);
                if (bus_memory(c, p[i].physical, bytes, true, &value))
                    goto stored;
            }
            escape(c, ESCAPE_ALONE);
        }
    }
    const u8 *in = data;
    for (unsigned i = 0; i < count; i++) {
        if (slots[i] && !(slots[i]->flags & SLOT_READ_ONLY)) {
            write_ram(c, slots[i], p[i].physical, in, p[i].bytes);
        } else if (!(access & ACCESS_SUPERVISOR)) { /* an event's stack frame or an accessed bit outside of RAM is lost */
            write_device(c, p[i].physical, in, p[i].bytes);
        }
        in += p[i].bytes;
    }
stored:
    if (unlikely(c->tracer && c->tracer->memory))
        tracer_memory(c, linear, data, bytes, true, access & ACCESS_SUPERVISOR || c->delivering >= 0);
}

COLD u64 mmu_load(struct vcpu *c, u64 linear, unsigned bytes)
{
    u64 value = 0;
    mmu_read(c, linear, &value, bytes, ACCESS_READ);
    return value;
}

COLD void mmu_store(struct vcpu *c, u64 linear, unsigned bytes, u64 value)
{
    mmu_write(c, linear, &value, bytes, ACCESS_WRITE);
}

COLD void mmu_check_write(struct vcpu *c, u64 linear, unsigned bytes, unsigned access)
{
    struct piece p[2];
    split(c, linear, bytes, access | ACCESS_WRITE, p);
}

/* ---- Locked accesses --------------------------------------------------------------------------------------------------------- */

static bool is_writable(const struct slot *slot) { return slot && !(slot->flags & SLOT_READ_ONLY); }

COLD void mmu_lock(struct vcpu *c, struct locked *l, unsigned bytes)
{
    struct piece p[2];
    unsigned count = split(c, l->at, bytes, ACCESS_READ | ACCESS_WRITE, p);
    l->p = fast_linear_write(c, l->at, bytes); /* it was the TLB alone */
    if (l->p || atomic_load_explicit(&c->world, memory_order_relaxed) == WORLD_OUT)
        return;
    struct slot *slot = vm_slot(c->vm, p[0].physical), *second = vm_slot(c->vm, p[count - 1].physical);
    if (!is_writable(slot) && !is_writable(second))
        return; /* a device */
    if (count == 2 || !is_writable(slot)) {
        world_stop(c);
        l->stood = true;
        return;
    }
    check_watch(c, l->at, p[0].physical, bytes, false, false);
    check_watch(c, l->at, p[0].physical, bytes, true, false);
    if (c->tracer && c->tracer->memory) { /* which sees it on the general path */
        world_stop(c);
        l->stood = true;
        return;
    }
    if (hits_code(slot, p[0].physical, bytes)) {
        if (!c->alone)
            escape(c, ESCAPE_ALONE);
        world_stop(c);
        cache_kill(c->vm, slot, p[0].physical, bytes);
    }
    mark_dirty(slot, p[0].physical);
    *l = (struct locked){l->at, slot->host + (p[0].physical - slot->address), true, slot, p[0].physical, bytes};
}

COLD void mmu_unlock(struct vcpu *c, struct locked *l)
{
    if (c->has_world)
        world_go(c);
    else if (l->slot)
        cache_lines_written(c, l->slot, l->physical, l->bytes);
}

u8 mmu_change_byte(struct vcpu *c, u64 linear, u8 clear, u8 set)
{
    u64 physical = mmu_translate(c, linear, ACCESS_WRITE | ACCESS_SUPERVISOR);
    struct slot *slot = vm_slot(c->vm, physical);
    u8 was = 0, value;
    if (!is_writable(slot) || (c->tracer && c->tracer->memory) || page_watched(c, linear, physical)) {
        mmu_read(c, linear, &was, 1, ACCESS_SUPERVISOR);
        value = (was & ~clear) | set;
        mmu_write(c, linear, &value, 1, ACCESS_SUPERVISOR);
        return was;
    }
    u8 *p = slot->host + (physical - slot->address);
    bool kills = hits_code(slot, physical, 1), stops = kills && world_stop(c);
    if (kills)
        cache_kill(c->vm, slot, physical, 1);
    do {
        was = *(volatile u8 *)p;
        value = (was & ~clear) | set;
    } while (!compare_and_swap(p, 1, was, value));
    mark_dirty(slot, physical);
    if (stops)
        world_go(c);
    else if (unlikely(lines_of_page(slot, physical)))
        cache_lines_written(c, slot, physical, 1);
    return was;
}
