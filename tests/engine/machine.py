"""A machine for a test: RAM in a memfd, one CPU in a mode, a program at ORIGIN."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from engine.asm import ORIGIN, Program

from vmfs.engine.base import Engine, Machine, Vcpu
from vmfs.words.modes import USER_CODE64, USER_DATA, set_mode

RAM = 0x80000
MMIO = 0xA0000  # neither RAM nor a device, and in reach of real mode
MODES = ("real", "protected", "long", "user")

REGS = ("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags").split()
_SEGMENTS = "cs ds es fs gs ss".split()
_SEGMENT = struct.Struct("<QIHBBBBBBBBBx")
_IOPL3 = 3 << 12


class Ram:
    """The memory as the file `mem` will show it: another mapping of the same memfd."""

    def __init__(self, size: int = RAM) -> None:
        self.size = size
        self.fd = os.memfd_create("vmfs-test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._mapping = mmap.mmap(self.fd, size)

    def write(self, offset: int, data: bytes) -> None:
        self._mapping[offset : offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        return self._mapping[offset : offset + size]

    def close(self) -> None:
        self._mapping.close()
        os.close(self.fd)


class TestMachine:
    """One CPU and `RAM` bytes at 0."""

    __test__ = False

    def __init__(self, machine: Machine, vcpu: Vcpu, ram: Ram) -> None:
        self.machine = machine
        self.vcpu = vcpu
        self.ram = ram

    def regs(self) -> dict[str, int]:
        return dict(zip(REGS, struct.unpack("<18Q", self.vcpu.get_state("regs")), strict=True))

    def set_regs(self, **values: int) -> None:
        regs = self.regs() | values
        self.vcpu.set_state("regs", struct.pack("<18Q", *(regs[name] for name in REGS)))

    def load(self, program: Program, mode: str) -> None:
        """Put the program at ORIGIN and the CPU into the mode, at its beginning."""
        self.ram.write(ORIGIN, program.code)
        set_mode(self.vcpu, self.ram, RAM, "long" if mode == "user" else mode)
        if mode == "user":
            self._enter_user_mode()
        self.set_regs(rip=ORIGIN)

    def _enter_user_mode(self) -> None:
        """The segments that SYSRET would load, and I/O privilege."""
        sregs = bytearray(self.vcpu.get_state("sregs"))
        for number, name in enumerate(_SEGMENTS):
            fields = list(_SEGMENT.unpack_from(sregs, number * _SEGMENT.size))
            fields[2] = USER_CODE64 if name == "cs" else USER_DATA
            fields[5] = 3
            _SEGMENT.pack_into(sregs, number * _SEGMENT.size, *fields)
        self.vcpu.set_state("sregs", bytes(sregs))
        self.set_regs(rflags=_IOPL3 | 2)


@contextmanager
def machine_on(engine: Engine, *, irqchip: bool = False) -> Iterator[TestMachine]:
    machine = engine.create_machine()
    ram = Ram()
    try:
        machine.map_memory(0, 0, ram.fd, 0, RAM)
        if irqchip:
            machine.create_irqchip()
        yield TestMachine(machine, machine.create_vcpu(0), ram)
    finally:
        machine.close()
        ram.close()
