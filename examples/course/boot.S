# The first instructions, and what the CPU calls for exceptions. 32-bit, GNU as, AT&T syntax.

        .section .multiboot, "a"        # a loader looks for this in the first 8 KiB (Multiboot Specification 0.6.96, 3.1)
        .long   0x1BADB002, 0, -0x1BADB002

        .text
        .globl  _start
_start: mov     $stack_top, %esp
        call    kernel_main
1:      cli
        hlt
        jmp     1b

# An exception: the CPU has pushed an error code for some of them only, so the others push 0 in its place.
        .macro  exception number, has_code
        .globl  exception_\number
exception_\number:
        .if     \has_code == 0
        push    $0
        .endif
        push    $\number
        jmp     exception_common
        .endm

        exception 0, 0                  # #DE
        exception 14, 1                 # #PF

exception_common:                       # on the stack: number, error code, eip, cs, eflags
        pusha
        mov     %esp, %eax
        push    %eax
        call    on_exception
        add     $4, %esp
        popa
        add     $8, %esp
        iret

        .bss
        .align  16
        .skip   16384
stack_top:
