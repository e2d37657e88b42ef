/* What devices of the core claim: ports, memory, interrupts. Everything else becomes an exit. */
#include <errno.h>
#include <stdlib.h>

#include "memory.h"

bool io_read(struct vcpu *c, u16 port, unsigned size, u32 *value)
{
    (void)c, (void)port, (void)size, (void)value;
    return false;
}
bool io_write(struct vcpu *c, u16 port, unsigned size, u32 value)
{
    (void)c, (void)port, (void)size, (void)value;
    return false;
}
bool mmio_read(struct vcpu *c, u64 physical, unsigned size, u64 *value)
{
    (void)c, (void)physical, (void)size, (void)value;
    return false;
}
bool mmio_write(struct vcpu *c, u64 physical, unsigned size, u64 value)
{
    (void)c, (void)physical, (void)size, (void)value;
    return false;
}

int pending_vector(struct vcpu *c)
{
    u32 head = atomic_load(&c->queue_head);
    return head != atomic_load(&c->queue_tail) ? c->queue[head % INTERRUPT_QUEUE] : -1;
}
void acknowledge(struct vcpu *c, int vector)
{
    (void)vector;
    atomic_fetch_add(&c->queue_head, 1);
}

int vm_create_irqchip(struct vm *vm) { (void)vm; return -EOPNOTSUPP; }
void vm_irq_line(struct vm *vm, unsigned gsi, bool level) { (void)vm, (void)gsi, (void)level; }
