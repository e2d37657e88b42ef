"""A PC that is typed into: its guest notes when bytes and keys come, sleeps, and is interrupted 1000 times a second."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator

from vmfs.devices import keys
from vmfs.machine.born import Birth
from vmfs.machine.machine import Vm
from vmfs.words.registers import write_registers

BIRTH = Birth(1_700_000_000_000_000_000, bytes(16))

# Notes at 0x8000 how often it had gone round when each byte came, on COM1 (polled) and from the keyboard (IRQ 1), while
# the timer ticks 1000 times a second. It sleeps every few thousand rounds. `q` ends it.
GUEST = """
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7000
    mov word ptr [0x80], offset tick
    mov word ptr [0x82], 0
    mov word ptr [0x84], offset key
    mov word ptr [0x86], 0
    mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
    mov al, 0xfc; out 0x21, al
    mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 4; out 0x40, al
    mov al, 0x60; out 0x64, al; mov al, 0x01; out 0x60, al
    mov edi, 0x8000
    xor ebx, ebx
    sti
l:  inc ebx
    test bx, 0x3fff
    jnz 2f
    hlt
2:  mov dx, 0x3fd
    in al, dx
    test al, 1
    jz l
    mov dx, 0x3f8
    in al, dx
    call note
    cmp al, 0x71
    jne l
    mov al, 1
    out 0xf4, al
note:
    pushf
    cli
    mov [edi], ebx
    mov [edi + 4], al
    mov ecx, [0x7f00]
    mov [edi + 8], ecx
    add edi, 12
    popf
    ret
tick:
    push ax
    inc dword ptr [0x7f00]
    mov al, 0x20
    out 0x20, al
    pop ax
    iret
key:
    push ax
    in al, 0x60
    call note
    mov al, 0x20
    out 0x20, al
    pop ax
    iret
"""


def typed_into(vm: Vm, assembler, cpus: int = 1) -> Vm:
    """`vm`, which is new, as such a PC, before its first instruction."""
    vm.set_machine("pc")
    vm.set_cpu_count(cpus)
    vm.set_birth(BIRTH)
    vm.set_time_source("instructions")
    vm.memory.write(0x1000, assembler(GUEST, "real").code)
    vm.change(lambda cpu: write_registers(cpu, {"cs": 0, "cs.base": 0, "rip": 0x1000}))
    return vm


@contextlib.contextmanager
def typing(vm: Vm, dice: random.Random) -> Iterator[None]:
    """Meanwhile a thread types on both, at times that it throws dice for."""
    is_over = threading.Event()

    def type_on() -> None:
        while not is_over.is_set():
            vm.board.devices["com1"].receive(bytes([dice.randrange(97, 110)]))
            if not dice.randrange(4):
                vm.board.keyboard.type(keys.parse('"xy"'))
            time.sleep(dice.random() / 500)

    typist = threading.Thread(target=type_on)
    typist.start()
    try:
        yield
    finally:
        is_over.set()
        typist.join()
