"""Debian's kernels, decompressed here and in the guest: it comes to the same."""

from __future__ import annotations

import os

import pytest
from booting import MIB, text_at
from pc.kernels import CLOUD, GENERIC, IPXE, MEMTEST, needs_kernels

from vmfs import boot
from vmfs.boot import elf, linux, payload
from vmfs.boot.source import Source
from vmfs.engine.base import DebugRequest
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.memory.ram import Memory
from vmfs.words import exits
from vmfs.words.stops import Breakpoint

pytestmark = needs_kernels
SIZE = 128 * MIB
MARK = 0x11  # RAM before


@pytest.fixture
def opened():
    files = []

    def make(path):
        files.append(os.open(path, os.O_RDONLY))
        return Source.of(files[-1])

    yield make
    for fd in files:
        os.close(fd)


def dirty_memory():
    memory = Memory(SIZE)
    for at in range(0, SIZE, MIB):
        memory.write(at, bytes([MARK]) * MIB)
    return memory


def test_host_and_guest_decompress_to_the_same_kernel(opened):
    image = opened(CLOUD.image)
    here, there = dirty_memory(), dirty_memory()
    machine = EmulatorEngine().create_machine()
    try:
        options = {"platform": boot.Platform(SIZE), "cmdline": b"nokaslr"}
        direct = boot.load(image, memory=here, **options)
        own = boot.load(image, memory=there, decompress=False, **options)
        entry = direct.registers["rip"]
        assert own.registers["rip"] != entry

        machine.create_irqchip()
        machine.map_memory(0, 0, there.fd, 0, SIZE)
        cpu = machine.create_vcpu(0)
        own.apply(cpu)
        cpu.set_debug(DebugRequest(stops=(Breakpoint(1, entry),)))
        exit_ = cpu.run(400_000_000)  # it takes 100 million
        while isinstance(exit_, exits.Io):  # it writes its progress to a screen and looks for a serial port
            exit_ = cpu.run(400_000_000)
        assert isinstance(exit_, exits.Debug) and exit_.rip == entry

        header = linux.read_header(image)
        vmlinux = payload.decompress(image, *header.payload, header.init_size)
        assert vmlinux is not None
        found = elf.read(vmlinux)
        os.close(vmlinux.fd)
        assert found.pvh is not None and len(found.segments) == 4
        for segment in found.segments:
            assert here.read(segment.physical, segment.filled) == there.read(segment.physical, segment.filled)
    finally:
        machine.close()
        here.close()
        there.close()


@pytest.mark.parametrize(
    ("path", "size", "how"),
    [
        (CLOUD.image, 64 * MIB + 8 * MIB, "bzImage, lz4 decompressed on the host, vmlinux entered at 0x1000000"),
        (GENERIC.image, 96 * MIB, "bzImage, xz decompressed on the host, vmlinux entered at 0x1000000"),
        (MEMTEST, 4 * MIB, "bzImage, 64-bit entry at 0x100200"),
        (IPXE, 4 * MIB, "bzImage, 16-bit entry at 0x1020:0 from an option ROM"),
    ],
    ids=["cloud", "generic", "memtest", "ipxe"],
)
def test_what_is_done_with_each(opened, path, size, how):
    memory = Memory(size)
    try:
        start = boot.load(opened(path), memory=memory, platform=boot.Platform(size), cmdline=b"some words")
        assert start.how == how
        if start.registers:
            page = start.registers["rsi"]
            command = int.from_bytes(memory.read(page + 0x228, 4), "little")
            assert text_at(memory, command) == b"some words"
    finally:
        memory.close()
