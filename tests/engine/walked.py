"""Machines with a history, and how tests go through it."""

from __future__ import annotations

from vmfs.machine.history import History
from vmfs.machine.journey import Journey
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.words import exits

SECONDS = 60


def started(vm: Vm, **settings) -> History:
    history = History(vm, **settings)
    history.start()
    return history


def run(vm: Vm, **bound) -> exits.Exit:
    return vm.start(Bound(**bound)).result(SECONDS)


def go(vm: Vm, **journey) -> exits.Exit:
    return run(vm, journey=Journey(**journey))


def count(vm: Vm) -> int:
    return vm.counters()["instructions"]


# Writes all over a MiB, changes its own code, and counts in rbx.
WALKER = """
l:  inc rbx; imul eax, ebx, 0x9e3779b1; and eax, 0xff; shl eax, 12; mov [rax + 0x100000], rbx; mov [rax + 0x100ff8], rcx
    mov byte ptr [rip + change + 1], bl; change: mov eax, 0; add rcx, rax
    rdtsc; lea rdi, [0x9000]; mov ecx, ebx; and ecx, 0x3f; mov esi, 0x8000; rep movsb
    test ebx, 31; jne l; mov [0x7000], ebx
round: out 0x80, al; in al, 0x81; add [0x7008], al; jmp l
"""
