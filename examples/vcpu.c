/*
 * vcpu MOUNT: a directory is the machine, its files are what ioctls are elsewhere. The guest here is stepped,
 * uses ports and a device in memory, halts and is interrupted; the program is its devices.
 *
 *     cc -o vcpu -I../vmfs/include vcpu.c
 *     c++ -o vcpu -I../vmfs/include -x c++ vcpu.c      on an x86-64 host, for the guest is in here, too
 */
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <vmfs.h>

#define CONSOLE 0xe9
#define KEYBOARD 0x60
#define VECTOR 0x21
#define CODE 0x1000
#define IDT 0x2000

/* clang-format off */
__asm__(".pushsection .rodata\n"
        "guest:  mov $'>', %al\n"
        "        out %al, $0xe9\n"               /* io */
        "        mov $0xd0000000, %ebx\n"        /* where no RAM is */
        "        mov (%rbx), %eax\n"             /* mmio, a load: the answer is 41 */
        "        inc %eax\n"
        "        mov %eax, 4(%rbx)\n"            /* mmio, a store */
        "        xor %ecx, %ecx\n"
        "wait:   sti\n"
        "        hlt\n"                          /* hlt: the keyboard's interrupt ends it */
        "        test %ecx, %ecx\n"
        "        jz wait\n"
        "        mov %ecx, %eax\n"
        "        cli\n"
        "        hlt\n"                          /* the end */
        "handler:in $0x60, %al\n"                /* io */
        "        movzbl %al, %ecx\n"
        "        iretq\n"
        "guest_end:\n"
        ".popsection\n");
/* clang-format on */
extern const unsigned char guest[] __asm__("guest");
extern const unsigned char handler[] __asm__("handler");
extern const unsigned char guest_end[] __asm__("guest_end");

static char path[4096];

static void remove_machine(void)
{
    vmfs_destroy(path);
}

static void expect(int right, const char *what)
{
    if (!right)
        errx(1, "wrong: %s", what);
}

/* The guest in RAM, and an interrupt gate (Intel SDM 3A 6.14.1) to its handler. */
static void load(unsigned char *ram)
{
    const uint64_t address = CODE + (uint64_t)(handler - guest);
    const uint64_t gate[2] = {
        (address & 0xffff) | 8 << 16 | 0x8eULL << 40 | (address >> 16 & 0xffff) << 48,
        address >> 32,
    };

    memcpy(ram + CODE, guest, (size_t)(guest_end - guest));
    memcpy(ram + IDT + 16 * VECTOR, gate, sizeof gate);
}

int main(int argc, char **argv)
{
    struct vmfs_exit descriptor;
    struct kvm_interrupt interrupt_packet;
    struct kvm_dtable idt;
    char output[8] = "";
    size_t printed = 0, size;
    unsigned steps = 0, halts = 0;
    uint32_t answer = 41, stored = 0;
    uint64_t rax, rip = CODE;
    const uint8_t key = 'k';

    if (argc != 2)
        errx(2, "usage: %s MOUNT", argv[0]);
    snprintf(path, sizeof path, "%s/vcpu.%d", argv[1], (int)getpid());

    int ctx = kvm_create(path);
    if (ctx < 0)
        err(1, "%s", path);
    atexit(remove_machine);
    if (vmfs_write(ctx, "mode", "long") < 0)
        err(1, "mode");
    unsigned char *ram = (unsigned char *)vmfs_map(ctx, &size);
    int regs = openat(ctx, "regs", O_RDWR);
    int sregs = openat(ctx, "sregs", O_RDWR);
    int irq = openat(ctx, "irq", O_WRONLY);
    int dbg = openat(ctx, "debug", O_WRONLY);
    if (!ram || regs < 0 || sregs < 0 || irq < 0 || dbg < 0)
        err(1, "%s", path);

    load(ram);
    memset(&idt, 0, sizeof idt);
    idt.base = IDT;
    idt.limit = 16 * VECTOR + 15;
    expect(pwrite(sregs, &idt, sizeof idt, KVM_SREG_IDTR) == sizeof idt, "sregs");
    expect(pwrite(regs, &rip, sizeof rip, KVM_REG_RIP) == sizeof rip, "regs");
    expect(write(dbg, "1", 1) == 1, "debug");

    while (halts < 2) {
        switch (kvm_run(ctx, &descriptor)) {
        case VMFS_EXIT_DEBUG:
            printf("step   rip %#lx\n", (unsigned long)descriptor.rip);
            if (++steps == 3)
                expect(write(dbg, "0", 1) == 1, "debug");
            break;
        case VMFS_EXIT_IO:
            printf("io     %s", descriptor.io.direction == VMFS_IO_IN ? "in" : "out");
            printf(" port %#x\n", descriptor.io.port);
            if (descriptor.io.direction == VMFS_IO_OUT && descriptor.io.port == CONSOLE)
                output[printed++ % sizeof output] = (char)descriptor.io.data[0];
            else if (descriptor.io.port == KEYBOARD)
                expect(vmfs_answer(ctx, &key, sizeof key) == 0, "exit.data");
            break;
        case VMFS_EXIT_MMIO:
            printf("mmio   %s", descriptor.mmio.is_write ? "store" : "load");
            printf(" %#lx\n", (unsigned long)descriptor.mmio.addr);
            if (descriptor.mmio.is_write)
                memcpy(&stored, descriptor.mmio.data, sizeof stored);
            else
                expect(vmfs_answer(ctx, &answer, descriptor.mmio.len) == 0, "exit.data");
            break;
        case VMFS_EXIT_HLT:
            printf("hlt    rip %#lx\n", (unsigned long)descriptor.rip);
            if (++halts == 1) {
                interrupt_packet.irq = VECTOR; /* a key is pressed */
                expect(write(irq, &interrupt_packet, sizeof interrupt_packet) == 4, "irq");
            }
            break;
        case -1:
            if (errno != EINTR) /* a signal: nothing is lost, the next run goes on */
                err(1, "kvm_run");
            break;
        default:
            errx(1, "exit %u at %#lx", descriptor.reason, (unsigned long)descriptor.rip);
        }
    }
    expect(pread(regs, &rax, sizeof rax, KVM_REG_RAX) == sizeof rax, "regs");
    printf("it printed '%s', stored %u, and ended with rax %#lx\n", output, stored, (unsigned long)rax);
    expect(strcmp(output, ">") == 0 && stored == 42 && rax == 'k' && steps >= 3, "the guest");
    return 0;
}
