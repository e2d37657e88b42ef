/* Which bytes of RAM nobody has written yet, of a machine that is to be told of reads of them (vm_set_fresh).
 *
 * Such RAM begins with a pattern, a page that repeats. A byte that the CPU has written has a bit. What others write, clients and
 * devices, is not seen when it happens: a line in which a byte without a bit differs from the pattern was written by one of them, as a
 * whole. A page of which all was written is WHOLE, and its accesses are not looked at any more (mmu.c, page_watched). */
#include "memory.h"

#include <errno.h>
#include <stdlib.h>

enum { BYTES = 4096, LINE = 64, LINES = BYTES / LINE };
#define WHOLE ((u64 *)1)

struct fresh { u64 count; u64 **pages; u8 pattern[BYTES]; }; /* of each page: a bit a byte; NULL: it was not looked at yet */

static void forget(struct fresh *f)
{
    for (u64 i = 0; f && i < f->count; i++)
        if (f->pages[i] != WHOLE)
            free(f->pages[i]);
    if (f)
        free(f->pages);
    free(f);
}

void fresh_destroy(struct vm *vm) { forget(vm->fresh); }

int vm_set_fresh(struct vm *vm, const uint8_t *pattern, uint64_t end)
{
    struct fresh *f = NULL;
    if (pattern) {
        if (!(f = calloc(1, sizeof *f)) || !(f->pages = calloc(end / BYTES, sizeof *f->pages))) {
            free(f);
            return -ENOMEM;
        }
        f->count = end / BYTES;
        memcpy(f->pattern, pattern, BYTES);
    }
    forget(vm->fresh);
    vm->fresh = f;
    for (unsigned i = 0; i < CORE_VCPUS; i++)
        if (vm->vcpus[i])
            tlb_flush(vm->vcpus[i]);
    return 0;
}

static u64 bits_of(unsigned count) { return count < 64 ? (1ull << count) - 1 : ~0ull; }

/* Lines that somebody else has written get their bits. Whether the page is whole. */
static bool examine(struct fresh *f, u64 page, const u8 *host)
{
    u64 *bits = f->pages[page];
    bool whole = true;
    for (unsigned line = 0; line < LINES; line++) {
        for (unsigned i = 0; i < LINE && bits[line] != ~0ull; i++)
            if (!(bits[line] >> i & 1) && host[line * LINE + i] != f->pattern[line * LINE + i])
                bits[line] = ~0ull;
        whole &= bits[line] == ~0ull;
    }
    if (whole) {
        free(bits);
        f->pages[page] = WHOLE;
    }
    return whole;
}

/* Its bits; NULL where it is whole, or no RAM. */
static u64 *page_bits(struct vm *vm, u64 physical, const u8 **host)
{
    struct fresh *f = vm->fresh;
    u64 page = physical / BYTES;
    struct slot *slot = page < f->count && f->pages[page] != WHOLE ? vm_slot(vm, physical) : NULL;
    if (!slot || slot->flags & SLOT_READ_ONLY)
        return NULL;
    *host = slot->host + ((physical & ~(u64)(BYTES - 1)) - slot->address);
    if (!f->pages[page] && (!(f->pages[page] = calloc(LINES, sizeof *f->pages[page])) || examine(f, page, *host)))
        return NULL; /* without memory for it nothing of it is told */
    return f->pages[page];
}

bool fresh_page(struct vm *vm, u64 physical)
{
    const u8 *host;
    return page_bits(vm, physical, &host);
}

void fresh_written(struct vm *vm, u64 physical, unsigned bytes)
{
    const u8 *host;
    u64 *bits = page_bits(vm, physical, &host);
    for (unsigned at = physical % BYTES, left = bytes; bits && left;) {
        unsigned here = LINE - at % LINE < left ? LINE - at % LINE : left;
        bits[at / LINE] |= bits_of(here) << at % LINE;
        at += here, left -= here;
    }
    if (bits)
        examine(vm->fresh, physical / BYTES, host);
}

bool fresh_read(struct vm *vm, u64 physical, unsigned bytes, bool tells)
{
    const u8 *host;
    u64 *bits = page_bits(vm, physical, &host);
    if (!bits || examine(vm->fresh, physical / BYTES, host))
        return false;
    bool found = false;
    for (unsigned at = physical % BYTES, left = bytes; left;) {
        unsigned here = LINE - at % LINE < left ? LINE - at % LINE : left;
        u64 wanted = bits_of(here) << at % LINE;
        found |= wanted & ~bits[at / LINE];
        if (tells) /* once */
            bits[at / LINE] |= wanted;
        at += here, left -= here;
    }
    return found;
}
