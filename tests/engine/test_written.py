"""Memory that a device writes in the middle of a run, where the guest has code."""

from __future__ import annotations

import threading
import time

import pytest
from engine.test_pc import load, run

from vmfs.devices.device import StatelessDevice, Window
from vmfs.machine.machine import Vm

CODE, COUNT = 0x5000, 3000
PORT = 0x5F0
FUNCTION = bytes.fromhex("b001c3")  # mov al, 1; ret


class Poke(StatelessDevice):
    """A write of N has the function at CODE return N from then on."""

    TYPE = "poke"

    def windows(self):
        return (Window("port", PORT, 1),)

    def write(self, region, offset, size, value):
        self.board.dma_write(CODE + 1, bytes((value,)))


@pytest.fixture
def pc(engine):
    vm = Vm(engine, memory_size=2 << 20)
    vm.set_machine("pc")
    vm.board.add(Poke(vm.board, "poke"))
    yield vm
    vm.close()


def test_code_that_a_device_writes(pc, assembler):
    """It runs until it is hot, is written, and runs: what it returns is what was written, each time."""
    source = f"""
        xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000
        xor ebx, ebx; xor esi, esi
        mov bp, {CODE}
    next:
        mov ecx, 100
    hot: call bp; dec ecx; jnz hot
        cmp al, bl; je right; inc esi
    right:
        inc ebx; and ebx, 255
        mov al, bl; mov dx, {PORT}; out dx, al
        inc edi; cmp edi, {COUNT // 10}; jb next
        mov [0x600], esi; mov dx, 0xf4; out dx, al
    """
    load(pc, assembler(source, "real"))
    pc.memory.write(CODE, FUNCTION)
    pc.memory.write(CODE + 1, b"\0")
    assert run(pc).line().startswith("shutdown cause=debug-exit")
    assert pc.memory.read(0x600, 4) == bytes(4)


def test_code_that_a_thread_writes(pc, assembler):
    """The function is written from outside of the CPU's thread; the guest, which never leaves its run, comes to it."""
    source = f"""
        xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000
        mov bp, {CODE}
    l:  call bp; cmp al, 7; jne l
        mov dx, 0xf4; out dx, al
    """
    load(pc, assembler(source, "real"))
    pc.memory.write(CODE, FUNCTION)
    under_way = pc.start()
    time.sleep(0.05)

    def write():
        with pc.board.lock:
            pc.board.dma_write(CODE + 1, b"\7")

    threading.Thread(target=write).start()
    assert under_way.result(60).line().startswith("shutdown cause=debug-exit")
