/* Runs of a CPU by other C code, without Python: vmfs/words/lane.h. */
#include "module.h"

#include "../../../../include/vmfs.h"

static void lane_clear_kick(void *cpu) { vcpu_clear_kick(((VcpuObject *)cpu)->vcpu); }

static int pack_exit(unsigned cpu, const struct vcpu_exit *e, const uint8_t *data, size_t size, uint8_t packed[LANE_EXIT_SIZE])
{
    static const struct { enum exit_reason reason; int index; uint32_t code; } rows[] = {
        {EXIT_IO, LANE_EXIT_IO, VMFS_EXIT_IO}, {EXIT_MMIO, LANE_EXIT_MMIO, VMFS_EXIT_MMIO}, {EXIT_HLT, LANE_EXIT_HLT, VMFS_EXIT_HLT},
    };
    struct vmfs_exit exit = {.cpu = cpu, .rip = e->rip};
    _Static_assert(sizeof exit == LANE_EXIT_SIZE, "struct vmfs_exit");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].reason != e->reason)
            continue;
        exit.reason = rows[i].code;
        if (e->reason == EXIT_IO) {
            exit.io.direction = e->write ? VMFS_IO_OUT : VMFS_IO_IN;
            exit.io.size = (uint8_t)e->size;
            exit.io.port = (uint16_t)e->address;
            exit.io.count = e->count;
            if (e->write)
                memcpy(exit.io.data, data, size < sizeof exit.io.data ? size : sizeof exit.io.data);
        } else if (e->reason == EXIT_MMIO) {
            exit.mmio.addr = e->address;
            exit.mmio.len = e->size;
            exit.mmio.is_write = e->write;
            if (e->write)
                memcpy(exit.mmio.data, data, size < sizeof exit.mmio.data ? size : sizeof exit.mmio.data);
        }
        memcpy(packed, &exit, sizeof exit);
        return rows[i].index;
    }
    return -1;
}

static int lane_run(void *cpu, uint8_t packed[LANE_EXIT_SIZE])
{
    VcpuObject *self = cpu;
    struct left *left = &self->left[1 - self->left_at];

    vcpu_set_poll(self->vcpu, NULL, self);
    vcpu_run(self->vcpu, BUDGET_UNLIMITED, &left->exit);
    const uint8_t *data = vcpu_exit_data(self->vcpu, &left->size);
    memcpy(left->data, data, left->size);
    return pack_exit(self->index, &left->exit, left->data, left->size, packed);
}

static void lane_keep(void *cpu)
{
    VcpuObject *self = cpu;
    self->left_at = 1 - self->left_at;
}

static unsigned lane_state(void *cpu, uint8_t regs[LANE_REGS_SIZE], uint8_t sregs[LANE_SREGS_SIZE])
{
    _Static_assert(sizeof(struct kvm_regs) == LANE_REGS_SIZE && sizeof(struct kvm_sregs) == LANE_SREGS_SIZE, "KVM's UAPI");
    VcpuObject *self = cpu;
    vcpu_get_state(self->vcpu, "regs", regs, LANE_REGS_SIZE);
    vcpu_get_state(self->vcpu, "sregs", sregs, LANE_SREGS_SIZE);
    return LANE_VALID(LANE_REGS) | LANE_VALID(LANE_SREGS);
}

static size_t lane_data(void *cpu, uint8_t data[LANE_DATA_MOST])
{
    VcpuObject *self = cpu;
    size_t size;
    const uint8_t *from = vcpu_exit_data(self->vcpu, &size);
    memcpy(data, from, size < LANE_DATA_MOST ? size : LANE_DATA_MOST);
    return size;
}

static int lane_set(void *cpu, unsigned file, const uint8_t *data, size_t size)
{
    VcpuObject *self = cpu;
    size_t has;
    if ((file == LANE_DATA) != vcpu_reading(self->vcpu))
        return -EBUSY;                  /* a state that is set completes the read */
    if (file != LANE_DATA)
        return vcpu_set_state(self->vcpu, file == LANE_REGS ? "regs" : "sregs", data, size);
    uint8_t *to = vcpu_exit_data(self->vcpu, &has);
    if (has != size)
        return -EINVAL;
    memcpy(to, data, size);
    return 0;
}

static int lane_interrupt(void *cpu, unsigned vector) { return vcpu_interrupt(((VcpuObject *)cpu)->vcpu, (uint8_t)vector); }

struct lane_cpu lane_of(VcpuObject *cpu)
{
    return (struct lane_cpu){cpu, lane_clear_kick, lane_run, lane_keep, lane_state, lane_data, lane_set, lane_interrupt};
}
