"""A guest to debug: firmware from the reset vector through real and protected to long mode, and a kernel after it.

The firmware (at F0000, with the reset vector in its last 16 bytes) maps the first GiB at 0 and at -2 GiB, and jumps
to the kernel, which somebody has put at 1 MiB.
"""

from __future__ import annotations

FIRMWARE_AT = 0xF0000
KERNEL_AT = 0xFFFF_FFFF_8010_0000
KERNEL_LOADED = 0x10_0000

FIRMWARE = """
.code16
.globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw $0x7000, %sp
    movl $0x12345678, %ebx
    lgdtl %cs:(gdt_pointer - 0xf0000)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $protected

.code32
protected:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $0x7000, %esp
    movl $0x1000, %edi
    movl $0x1000, %ecx
    xorl %eax, %eax
    rep stosl
    movl $0x2003, 0x1000
    movl $0x2003, 0x1ff8
    movl $0x3003, 0x2000
    movl $0x3003, 0x2ff0
    movl $0x83, %eax
    movl $0x3000, %edi
tables:
    movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    cmpl $0x4000, %edi
    jne tables
    movl $0x20, %eax
    movl %eax, %cr4
    movl $0x1000, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    ljmpl $0x18, $long_mode

.code64
long_mode:
    movq $0xffffffff80100000, %rax
    jmp *%rax

    .balign 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt
    .org 0xfff0
.code16
    ljmp $0xf000, $0
    .org 0x10000
"""

KERNEL = """
.code64
.globl _start, work, counter
_start:
    movq $0xffffffff80200000, %rsp
    xorl %ebx, %ebx
again:
    incq %rbx
    movq %rbx, %rdi
    call work
    cmpq $50, %rbx
    jne again
    hlt
forever:
    jmp forever

.type work, @function
work:
    .cfi_startproc
    pushq %rbp
    .cfi_def_cfa_offset 16
    .cfi_offset %rbp, -16
    movq %rsp, %rbp
    leaq (%rdi,%rdi), %rax
    movq %rax, counter(%rip)
    popq %rbp
    .cfi_def_cfa %rsp, 8
    ret
    .cfi_endproc
.size work, . - work

    .balign 8
.type counter, @object
counter:
    .quad 0
.size counter, 8
"""
