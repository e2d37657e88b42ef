"""The HPET's interrupts on every engine: in the 8254's place, and IRQ 0 as the IOAPIC's input 2."""

from __future__ import annotations

import pytest
from engine.test_pc import load, pc, register, run  # noqa: F401

# rdi is the HPET, rsi the IOAPIC, rbx the LAPIC. Vector 0x40 counts in [0x600].
BEGIN = """
    mov esp, 0x1000
    mov al, 0xff; out 0x21, al
    mov edi, 0xfed00000
    mov esi, 0xfec00000
    mov ebx, 0xfee00000
    lea rax, [rip + handler]
    mov word ptr [gate], ax
    mov word ptr [gate + 2], cs
    lidt [table]
    mov dword ptr [rbx + 0xf0], 0x1ff
    mov dword ptr [rsi], 0x10 + 2 * {pin}
    mov dword ptr [rsi + 0x10], 0x40
    mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al  # the 8254: each millisecond
"""
END = """
    mov dx, 0xf4
    out dx, al
handler:
    inc dword ptr [0x600]
    mov dword ptr [rbx + 0xb0], 0
    iretq
table: .word 0x40 * 16 + 15; .quad gate - 0x40 * 16
    .balign 16
gate: .word 0, 0, 0x8e00, 0; .quad 0
"""
PASS = """  # until the counter has gone on by rcx
    mov rdx, [rdi + 0xf0]
    add rcx, rdx
1:  cmp [rdi + 0xf0], rcx
    jb 1b
"""


def went(pc, assembler, body: str, pin: int) -> list[int]:  # noqa: F811
    load(pc, assembler(BEGIN.format(pin=pin) + body + END, "long"), "long")
    assert run(pc).line().startswith("shutdown cause=debug-exit")
    return [register(pc, name) for name in ("r8", "r9", "r10")]


def test_irq_0_is_input_2_and_the_hpets(pc, assembler):  # noqa: F811
    """The 8254's interrupts come until the HPET replaces them, and come again afterwards."""
    body = f"""
        sti
    2:  cmp dword ptr [0x600], 2
        jb 2b
        mov dword ptr [rdi + 0x10], 3  # it replaces, and none of its comparators interrupts
        mov ecx, 100000
        {PASS}
        mov dword ptr [0x600], 0
        mov ecx, 2000000
        {PASS}
        mov r8d, [0x600]
        mov dword ptr [rdi + 0x100], 0x4c  # comparator 0: periodic, from where the counter is
        mov rax, [rdi + 0xf0]
        add rax, 200000
        mov [rdi + 0x108], rax
        mov qword ptr [rdi + 0x108], 100000
    3:  cmp dword ptr [0x600], 3
        jb 3b
        mov rcx, [rdi + 0xf0]
        sub rcx, rax
        mov r9, rcx
        mov dword ptr [rdi + 0x10], 0
        mov dword ptr [0x600], 0
    4:  cmp dword ptr [0x600], 2
        jb 4b
        mov r10d, 1
    """
    silent, three, again = went(pc, assembler, body, pin=2)
    assert silent == 0 and again == 1
    assert three >= 200_000, "two periods lie between three interrupts"


@pytest.mark.parametrize("pin, is_it", [(0, False), (21, True)])
def test_a_comparator_has_a_line_of_its_own(pc, assembler, pin, is_it):  # noqa: F811
    """Nothing drives the IOAPIC's input 0."""
    body = f"""
        sti
        mov qword ptr [rdi + 0x128], 100000
        mov dword ptr [rdi + 0x120], {21 << 9 | 4}
        mov dword ptr [rdi + 0x10], 1
        mov ecx, 1000000
        {PASS}
        mov r8d, [0x600]
    """
    assert went(pc, assembler, body, pin)[0] == is_it
