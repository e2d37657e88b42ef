/* IN, OUT, INS, OUTS; CLI, STI (Intel SDM 1 chapter 19, 2A, 2B; 3A 20.3 for CR4.VME and CR4.PVI).
 *
 * A port of a device in the core or on the bus is read or written at once. Any other access is an exit, of one element. */
#include "cache.h"
#include "repeat.h"

static unsigned iopl(const struct vcpu *c) { return c->rflags >> 12 & 3; }

static unsigned io_bytes(const struct record *r) { return r->size == 3 ? 4 : 1u << r->size; } /* REX.W does nothing */

/* ---- Permission, break points ------------------------------------------------------------------------------------------------- */

/* The bits of the TSS's permission map must all be clear (1 19.5.2). The map is read two bytes at a time. */
static void check_permission(struct vcpu *c, const struct record *r, u16 port, unsigned bytes)
{
    c->now = r;
    if (!(c->cr0 & CR0_PE) || (!(c->rflags & FLAG_VM) && c->cpl <= iopl(c)))
        return;
    const struct segment *tr = &c->seg[SEG_TR];
    u16 map = 0, bits = 0;
    if (tr->attributes & ATTR_UNUSABLE || !(tr->attributes & 8) || tr->limit < 103)
        raise_gp(c, 0);
    mmu_read(c, tr->base + 102, &map, 2, ACCESS_SUPERVISOR);
    u32 at = map + port / 8u;
    if (at + 1 > tr->limit)
        raise_gp(c, 0);
    mmu_read(c, tr->base + at, &bits, 2, ACCESS_SUPERVISOR);
    if (bits >> (port & 7) & ((1u << bytes) - 1))
        raise_gp(c, 0);
}

/* The guest's I/O breakpoints (3B 17.2.4: R/W field 2, with CR4.DE), traps; the host's stops. */
static void check_stops(struct vcpu *c, u16 port, unsigned bytes)
{
    static const u8 lengths[4] = {1, 2, 8, 4};
    for (unsigned i = 0; c->cr4 & CR4_DE && c->dr7 & 0xff && i < 4; i++) {
        unsigned control = c->dr7 >> (16 + 4 * i) & 15, length = lengths[control >> 2];
        u64 first = c->dr[i] & ~(u64)(length - 1);
        if (c->dr7 >> (2 * i) & 3 && (control & 3) == 2 && first < port + bytes && port < first + length)
            c->debug_pending |= 1ull << i;
    }
    if (has_stops(c, STOP_IO))
        stops_reach_port(c, port, bytes);
}

/* ---- One element ---------------------------------------------------------------------------------------------------------------- */

/* May escape with an exit; the instruction then runs again with the bytes. */
static u32 input(struct vcpu *c, const struct record *r, u16 port, unsigned bytes, enum answer *answer)
{
    u32 value = 0;
    *answer = ANSWER_LOOK;
    if (c->input_ready) {
        c->input_ready = false;
        memcpy(&value, c->data + c->input_at, bytes);
        c->input_at += bytes;
    } else if (!(*answer = io_read(c, port, bytes, &value))) {
        leave_io_exit(c, r, false, port, bytes, 1);
    }
    check_stops(c, port, bytes);
    return value;
}

static enum answer output(struct vcpu *c, const struct record *r, u16 port, unsigned bytes, u32 value)
{
    enum answer answer = io_write(c, port, bytes, value);
    if (!answer) {
        leave_io_exit(c, r, true, port, bytes, 1);
        memcpy(c->data, &value, bytes);
    }
    check_stops(c, port, bytes);
    return answer;
}

/* The end of an instruction that may go on to the next block: not where something was reached that ends the run. */
#define GO_ON(c, r, answer) do { \
        if (unlikely((answer) != ANSWER_PLAIN || (c)->alone || (c)->reached_count || (c)->debug_pending)) { \
            leave((c), (r)); \
            return; \
        } \
        u64 next_ = next_ip((c), (r)); \
        (c)->budget += (r)->left; \
        (c)->now = NULL; \
        JUMP_TO((c), (r), next_); \
    } while (0)

ALWAYS_INLINE void in(struct vcpu *c, const struct record *r, u16 port)
{
    unsigned bytes = io_bytes(r);
    enum answer answer;
    check_permission(c, r, port, bytes);
    set_reg(c, RAX * 8, 8 * bytes, input(c, r, port, bytes, &answer));
    GO_ON(c, r, answer);
}
ALWAYS_INLINE void out(struct vcpu *c, const struct record *r, u16 port)
{
    unsigned bytes = io_bytes(r);
    check_permission(c, r, port, bytes);
    enum answer answer = output(c, r, port, bytes, (u32)get_reg(c, RAX * 8, 8 * bytes));
    GO_ON(c, r, answer);
}
OP(op_in_I) { in(c, r, (u8)r->imm); }
HANDLER(in_I);
OP(op_in_DX) { in(c, r, (u16)c->gpr[RDX]); }
HANDLER(in_DX);
OP(op_out_I) { out(c, r, (u8)r->imm); }
HANDLER(out_I);
OP(op_out_DX) { out(c, r, (u16)c->gpr[RDX]); }
HANDLER(out_DX);

/* ---- Strings -------------------------------------------------------------------------------------------------------------------- */

/* After an iteration: the next one is a new instruction. */
static void end_string(struct vcpu *c, const struct record *r)
{
    if (repeats(r)) {
        u64 count = repeat_count(c, r) - 1;
        set_address_register(c, r, RCX, count);
        if (count) {
            pause_repetition(c, r);
            return;
        }
    }
    leave(c, r);
}

/* Iterations that a device takes at once, of elements that lie in RAM; false: none. `number` is rSI or rDI. */
static bool move_some(struct vcpu *c, const struct record *r, bool write, unsigned seg, unsigned number, u16 port, unsigned bytes)
{
    u64 count = repeat_count(c, r), paid = (u64)c->budget + 1, n;
    u8 *host;
    if (!repeats(r) || c->alone || c->rflags & FLAG_DF || (c->cr4 & CR4_DE && c->dr7 & 0xff) || has_stops(c, STOP_IO))
        return false;
    n = string_window(c, r, seg, c->gpr[number] & address_mask(r), bytes, count < paid ? count : paid,
                      write ? ACCESS_READ : ACCESS_WRITE, &host);
    if (!n || !(n = io_string(c, write, port, bytes, n, host)))
        return false;
    c->budget -= (i64)n - 1;
    c->recent.iterations += n - 1;
    if (unlikely(c->key & KEY_TRACED) && n > 1)
        tracer_more(c, n - 1);
    set_address_register(c, r, number, c->gpr[number] + n * bytes);
    set_address_register(c, r, RCX, count - n);
    if (count > n)
        pause_repetition(c, r);
    else
        leave(c, r);
    return true;
}

OP(op_ins)
{
    unsigned bytes = io_bytes(r);
    u16 port = (u16)c->gpr[RDX];
    if (repeats(r) && !repeat_count(c, r)) {
        leave(c, r);
        return;
    }
    check_permission(c, r, port, bytes);
    if (move_some(c, r, false, SEG_ES, RDI, port, bytes))
        return;
    u64 offset = c->gpr[RDI] & address_mask(r), linear = linear_of(c, r, SEG_ES, offset, bytes, ACCESS_WRITE);
    mmu_check_write(c, linear, bytes, ACCESS_WRITE);
    if (!c->alone) /* a device is read once: what the store may do to the block, it does now */
        escape(c, ESCAPE_ALONE);
    enum answer answer;
    u32 value = input(c, r, port, bytes, &answer);
    linear_store(c, linear, bytes, value);
    set_address_register(c, r, RDI, c->gpr[RDI] + string_step(c, bytes));
    end_string(c, r);
}
HANDLER(ins);

OP(op_outs)
{
    unsigned bytes = io_bytes(r);
    u16 port = (u16)c->gpr[RDX];
    if (repeats(r) && !repeat_count(c, r)) {
        leave(c, r);
        return;
    }
    check_permission(c, r, port, bytes);
    if (move_some(c, r, true, r->seg, RSI, port, bytes))
        return;
    output(c, r, port, bytes, (u32)string_load(c, r, r->seg, c->gpr[RSI] & address_mask(r), bytes));
    set_address_register(c, r, RSI, c->gpr[RSI] + string_step(c, bytes));
    end_string(c, r);
}
HANDLER(outs);

/* ---- The interrupt flag --------------------------------------------------------------------------------------------------------- */

/* Whether CLI and STI mean VIF here; #GP(0) where they mean nothing. */
static bool is_virtual(struct vcpu *c, const struct record *r)
{
    if (c->cpl <= iopl(c) && !(c->key & KEY_V86 && iopl(c) < 3))
        return false;
    if (!(c->key & KEY_V86 ? c->cr4 & CR4_VME : c->cpl == 3 && c->cr4 & CR4_PVI))
        raise_error(c, r, VECTOR_GP, 0);
    return true;
}
OP(op_cli)
{
    c->rflags &= ~(u64)(is_virtual(c, r) ? FLAG_VIF : FLAG_IF);
    NEXT();
}
HANDLER(cli);
OP(op_sti)
{
    if (is_virtual(c, r)) {
        if (c->rflags & FLAG_VIP)
            raise_error(c, r, VECTOR_GP, 0);
        c->rflags |= FLAG_VIF;
    } else {
        c->shadow_sti = !(c->rflags & FLAG_IF); /* 3A 6.8.1 */
        c->rflags |= FLAG_IF;
    }
    leave(c, r);
}
HANDLER(sti);
