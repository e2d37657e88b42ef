/*
 * A guest that runs a script of register accesses, 32-bit flat at CPL 0 with interrupts off.
 * Script at 0x10000: {op, address, value, high} in 32-bit words; results at 0x40000: two words an op.
 * It leaves through port 0xf4, and 0xf5 where it goes on.  The host writes the IDT at 0x8000: vector n to
 * 0x2000 + 16 * n.
 */
    .intel_syntax noprefix
    .code32
    .globl _start
    .text
_start:
    mov esp, 0x7000
    mov esi, 0x10000
    mov edi, 0x40000
next:
    mov dword ptr [edi], 0
    mov dword ptr [edi + 4], 0
    mov ecx, [esi]
    mov edx, [esi + 4]
    mov eax, [esi + 8]
    cmp ecx, 1
    je op_out
    cmp ecx, 2
    je op_in
    cmp ecx, 3
    je op_store
    cmp ecx, 4
    je op_load
    cmp ecx, 5
    je op_rdmsr
    cmp ecx, 6
    je op_wrmsr
    cmp ecx, 7
    je op_window
    mov dx, 0xf4
    out dx, al
    jmp _start
op_out:
    out dx, al
    jmp done
op_in:
    xor eax, eax
    in al, dx
    mov [edi], eax
    jmp done
op_store:
    mov [edx], eax
    jmp done
op_load:
    mov eax, [edx]
    mov [edi], eax
    jmp done
op_rdmsr:
    mov ecx, edx
    xor eax, eax
    xor edx, edx
    rdmsr
    mov [edi], eax
    mov [edi + 4], edx
    jmp done
op_wrmsr:
    mov ecx, edx
    mov edx, [esi + 12]
    wrmsr
    jmp done
op_window:
    mov dx, 0xf5    /* an exit to the host, where KVM looks for interrupts at the latest */
    sti
    nop
    out dx, al
    nop
    nop
    cli
done:
    add esi, 16
    add edi, 8
    jmp next

    /* Vectors go into the op's result, the last one lowest; word two counts them, and the window opens again,
     * up to 4.  #GP: word two is 0xdead and the op is over.  No IRET: KVM's emulator has it in real mode only. */
common:
    pop eax
    mov esp, 0x7000
    cmp eax, 13
    je general_protection
    shl dword ptr [edi], 8
    or [edi], al
    inc dword ptr [edi + 4]
    cmp dword ptr [edi + 4], 4
    jb op_window
    jmp done
general_protection:
    mov dword ptr [edi + 4], 0xdead
    jmp done

    .org 0x1000
    .set vector, 0
    .rept 256
    .p2align 4
    .byte 0x68
    .long vector
    jmp common
    .set vector, vector + 1
    .endr
