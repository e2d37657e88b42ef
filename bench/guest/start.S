/*
 * The entry of the CPU benchmarks' guest, a flat image at 1 MiB. Two ways in:
 *
 * - image + 0x40 (`enter64`), in 64-bit mode with RAM mapped to itself, RSP set, RDI the kernel's number, RSI its
 *   repetitions: runs it and halts with the result in RAX. vmfs and Unicorn enter here.
 * - by Multiboot (QEMU -kernel), in 32-bit mode with the command line "NUMBER REPETITIONS": goes to 64-bit mode,
 *   runs it, and ends QEMU by its isa-debug-exit at port 0xf4.
 *
 * Multiboot 0.6.96, section 3.1: with flag 16 the header itself says where a flat image is loaded.
 */
        .set MAGIC, 0x1BADB002
        .set FLAGS, 1 << 16
        .set TABLES, 0x600000

        .section .start, "ax"
        .code64
image:
        .long MAGIC, FLAGS, -(MAGIC + FLAGS)
        .long image, image, image_end, bss_end, enter32
        .org 0x40
        .globl enter64
enter64:
        call run_kernel
        hlt
        jmp . - 1

        .code32
enter32:
        mov $stack_top, %esp
        push %ebx                       /* Multiboot information, for later */
        mov $TABLES, %edi               /* PML4, PDPT, page directory: 1 GiB in pages of 2 MiB */
        xor %eax, %eax
        mov $3 * 1024, %ecx
        rep stosl
        movl $TABLES + 0x1000 + 3, TABLES
        movl $TABLES + 0x2000 + 3, TABLES + 0x1000
        mov $TABLES + 0x2000, %edi
        mov $0x83, %eax
1:      mov %eax, (%edi)
        add $8, %edi
        add $0x200000, %eax
        cmp $0x40000083, %eax
        jb 1b
        mov $TABLES, %eax
        mov %eax, %cr3
        mov $0x620, %eax                /* CR4: PAE, OSFXSR, OSXMMEXCPT */
        mov %eax, %cr4
        mov $0xC0000080, %ecx           /* EFER.LME */
        rdmsr
        bts $8, %eax
        wrmsr
        mov $0x80000033, %eax           /* CR0: PG, NE, ET, MP, PE */
        mov %eax, %cr0
        lgdt gdt_pointer
        ljmp $8, $long_mode
        .code64
long_mode:
        mov $16, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        fninit
        mov (%rsp), %ebx
        mov $stack_top, %esp
        mov 16(%rbx), %edi              /* the command line */
        call run_command_line
        mov $0xf4, %edx
        out %al, %dx
1:      hlt
        jmp 1b

        .balign 8
gdt:    .quad 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF
gdt_pointer:
        .word . - gdt - 1
        .long gdt

        .bss
        .balign 16
        .space 65536
stack_top:

        .section .note.GNU-stack, "", @progbits
