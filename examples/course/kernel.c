/* A kernel to learn on: it says hello on the serial port, catches exceptions, turns paging on, has an allocator, and a
 * shell of three commands. Built as 32-bit ELF with a multiboot header: see conftest.py. */
#include <stddef.h>
#include <stdint.h>

/* ---- Ports and the serial line (16550, polled) -------------------------------------------------------------------------- */

static inline void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
enum { COM1 = 0x3f8, LSR = COM1 + 5, LSR_DATA = 1, LSR_EMPTY = 0x20 };

static void put(char c)
{
    while (!(inb(LSR) & LSR_EMPTY))
        ;
    outb(COM1, (uint8_t)c);
}
void print(const char *text)
{
    for (; *text; text++) {
        if (*text == '\n')
            put('\r');
        put(*text);
    }
}
void print_hex(uint32_t value)
{
    print("0x");
    for (int shift = 28; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

/* ---- Exceptions --------------------------------------------------------------------------------------------------------- */

struct frame {
    uint32_t edi, esi, ebp, esp, ebx, edx, ecx, eax; /* PUSHA */
    uint32_t number, error, eip, cs, eflags;
};
struct gate {
    uint16_t low, selector;
    uint8_t zero, type;
    uint16_t high;
} __attribute__((packed));

extern void exception_0(void), exception_14(void);
static struct gate idt[32];
static uint64_t gdt[] = {0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF}; /* flat code and data */
uint32_t exceptions_seen;

static void load_tables(void)
{
    struct {
        uint16_t limit;
        void *base;
    } __attribute__((packed)) gdtr = {sizeof gdt - 1, gdt}, idtr = {sizeof idt - 1, idt};
    __asm__ volatile("lgdt %0\n ljmp $8, $1f\n1: mov %1, %%ds\n mov %1, %%es\n mov %1, %%ss" ::"m"(gdtr), "r"(16));
    __asm__ volatile("lidt %0" ::"m"(idtr));
}
static void set_gate(int number, void (*handler)(void))
{
    uint32_t address = (uint32_t)handler;
    idt[number] = (struct gate){(uint16_t)address, 8, 0, 0x8E, (uint16_t)(address >> 16)};
}
void on_exception(struct frame *frame)
{
    exceptions_seen++;
    print("exception ");
    print_hex(frame->number);
    print(" at ");
    print_hex(frame->eip);
    if (frame->number == 14) {
        uint32_t address;
        __asm__ volatile("mov %%cr2, %0" : "=r"(address));
        print(" address ");
        print_hex(address);
    }
    print("\n");
    frame->eip += 2; /* the faulting instructions of this kernel are 2 bytes long */
}

/* ---- Memory: the first 8 MiB map to themselves, the page of address 0 does not -------------------------------------------- */

enum { PRESENT = 1, WRITABLE = 2, PAGE = 4096, HEAP = 0x400000, HEAP_END = 0x500000 };
static uint32_t directory[1024] __attribute__((aligned(PAGE))), tables[2][1024] __attribute__((aligned(PAGE)));

void paging_on(void)
{
    for (uint32_t page = 1; page < 2048; page++)
        tables[page / 1024][page % 1024] = page * PAGE | PRESENT | WRITABLE;
    for (int table = 0; table < 2; table++)
        directory[table] = (uint32_t)tables[table] | PRESENT | WRITABLE;
    uint32_t cr0;
    __asm__ volatile("mov %0, %%cr3" ::"r"(directory));
    __asm__ volatile("mov %%cr0, %0" : "=r"(cr0));
    __asm__ volatile("mov %0, %%cr0" ::"r"(cr0 | 0x80000000));
}

/* Blocks one after the other, each with its size before it; the lowest bit says that it is in use. */
static void heap_init(void)
{
    *(uint32_t *)HEAP = HEAP_END - HEAP;
}
void *kmalloc(uint32_t size)
{
    if (size > HEAP_END - HEAP)
        return NULL;
    uint32_t need = (size + 4 + 7) & ~7u;
    for (uint32_t at = HEAP, length; at < HEAP_END; at += length) {
        length = *(uint32_t *)at & ~1u;
        if (*(uint32_t *)at & 1)
            continue;
        while (at + length < HEAP_END && !(*(uint32_t *)(at + length) & 1)) /* one with the free ones after it */
            length += *(uint32_t *)(at + length);
        *(uint32_t *)at = length;
        if (length < need)
            continue;
        if (length > need)
            *(uint32_t *)(at + need) = length - need;
        *(uint32_t *)at = need | 1;
        return (void *)(at + 4);
    }
    return NULL;
}
void kfree(void *block)
{
    *((uint32_t *)block - 1) &= ~1u;
}

/* ---- A shell ------------------------------------------------------------------------------------------------------------ */

static int equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}
void run_command(const char *line)
{
    if (equal(line, "hello"))
        print("hello to you\n");
    else if (equal(line, "divide"))
        __asm__ volatile("div %0" ::"r"(0), "a"(1), "d"(0));
    else if (equal(line, "null"))
        __asm__ volatile("movb (%0), %%al" ::"r"(0) : "eax");
    else if (equal(line, "crash")) { /* no IDT: the breakpoint becomes a triple fault */
        struct {
            uint16_t limit;
            void *base;
        } __attribute__((packed)) none = {0, NULL};
        __asm__ volatile("lidt %0; int3" ::"m"(none));
    } else
        print("what?\n");
}
void kernel_main(void)
{
    load_tables();
    set_gate(0, exception_0);
    set_gate(14, exception_14);
    print("hello from the kernel\n");
    paging_on();
    heap_init();
    char line[64];
    for (;;) {
        size_t length = 0;
        print("> ");
        for (;;) {
            while (!(inb(LSR) & LSR_DATA))
                ;
            char c = (char)inb(COM1);
            if (c == '\r' || c == '\n')
                break;
            if (length < sizeof line - 1)
                put(line[length++] = c);
        }
        line[length] = 0;
        print("\n");
        run_command(line);
    }
}
