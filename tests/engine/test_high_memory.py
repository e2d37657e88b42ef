"""RAM above 4 GiB: it is there from 4 GiB on, sparse, and everything that reads or writes RAM finds it."""

from __future__ import annotations

import os
import struct

import pytest
from engine.asm import ORIGIN

from vmfs.boot.platform import Platform
from vmfs.debug.corefile import PHYSICAL_WINDOW, RAM_OFFSET, core_header, core_size
from vmfs.debug.corefile import CpuState as CoreCpu
from vmfs.machine.machine import Vm
from vmfs.memory.ram import HIGH_START, LOW_MOST, PAGE
from vmfs.words.errors import Invalid, PastEnd
from vmfs.words.registers import write_registers

SECONDS = 60
GIB = 1 << 30
SIZES = (4 * GIB, 6 * GIB, 64 * GIB)


@pytest.fixture(params=SIZES, ids=[f"{size // GIB} GiB" for size in SIZES])
def vm(engine, request):
    vm = Vm(engine, memory_size=request.param)
    yield vm
    vm.close()


def test_stores_and_loads_at_both_ends(vm, other, assembler):
    last = vm.memory.end - 8
    assert vm.memory.end == HIGH_START + vm.memory.size - LOW_MOST
    program = assembler(
        f"""
        mov rax, 0x1122334455667788; mov rbx, {HIGH_START:#x}; mov [rbx], rax; mov rcx, {last:#x}; mov [rcx], rax
        mov edx, {LOW_MOST - 8:#x}; mov [rdx], rax; hlt
        mov rsi, [rbx]; cmp rsi, [rcx]; jne wrong; out 0x80, al; mov edx, {LOW_MOST:#x}; mov al, [rdx]; wrong: hlt
        """,
        "long",
    )
    vm.set_mode("long")
    vm.memory.write(ORIGIN, program.code)
    vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))
    vm.take_dirty("file")
    assert vm.start().result(SECONDS).REASON == "hlt"
    value = struct.pack("<Q", 0x1122334455667788)
    for at in (HIGH_START, last, LOW_MOST - 8):
        assert vm.memory.read(at, 8) == value and os.pread(vm.memory.fd, 8, at) == value
    log = vm.take_dirty("file")
    assert len(log) == (vm.memory.end // PAGE + 7) // 8
    for at in (HIGH_START, last, LOW_MOST - 8):
        assert log[at // PAGE // 8] >> at // PAGE % 8 & 1
    assert log.count(0) > len(log) - 12
    vm.move_to(other)
    assert vm.start().result(SECONDS).line().startswith("io direction=out ")
    assert vm.start().result(SECONDS).line().startswith(f"mmio direction=read addr={LOW_MOST:#x} size=1 ")
    assert os.fstat(vm.memory.fd).st_blocks * 512 < 64 << 20  # page tables, and what was touched


def test_between_the_regions_is_no_ram(vm):
    for at in (LOW_MOST, HIGH_START - 1):
        assert vm.memory.read(at, 8) == b"" and not vm.memory.is_ram(at, 1)
        with pytest.raises(PastEnd, match="between the parts"):
            vm.memory.write(at, b"x")
    assert vm.memory.read(LOW_MOST - 4, 8) == bytes(4) and vm.memory.write(LOW_MOST - 4, bytes(8)) == 4
    assert vm.memory.is_ram(LOW_MOST - 4, 4) and not vm.memory.is_ram(LOW_MOST - 4, 5)
    assert vm.memory.is_ram(HIGH_START, vm.memory.end - HIGH_START)
    assert vm.memory.read_at(LOW_MOST, 4) == bytes(4)
    assert vm.read_physical(LOW_MOST, 4) == b"" and vm.read_physical(HIGH_START, 4) == bytes(4)


def test_devices_reach_it(engine):
    vm = Vm(engine, memory_size=6 * GIB)
    try:
        vm.set_machine("pc")
        board = vm.board
        board.dma_write(5 * GIB - 3, b"across")
        assert board.dma_read(5 * GIB - 3, 6) == b"across" == vm.memory.read(5 * GIB - 3, 6)
        for at, length in ((LOW_MOST - 1, 2), (LOW_MOST, 1), (HIGH_START - 1, 2), (vm.memory.end - 1, 2)):
            with pytest.raises(Invalid):
                board.dma_write(at, bytes(length))
        log = vm.take_dirty("file")
        assert [at * 8 + bit for at, byte in enumerate(log) if byte for bit in range(8) if byte >> bit & 1] == [
            (5 * GIB - 3) // PAGE,
            5 * GIB // PAGE,
        ]
        rtc = board.devices["rtc"].save().cmos
        assert int.from_bytes(rtc[0x5B:0x5E], "little") == (6 * GIB - LOW_MOST) >> 16
        assert int.from_bytes(rtc[0x34:0x36], "little") == (LOW_MOST >> 16) - 256
    finally:
        vm.close()


def test_what_kernels_and_debuggers_are_told(engine):
    ranges = Platform(6 * GIB).e820
    assert (HIGH_START, 6 * GIB - LOW_MOST, 1) in ranges and all(one.end <= LOW_MOST for one in ranges[:-1])
    assert Platform(6 * GIB).extended == LOW_MOST - (1 << 20) and Platform(1 << 20).extended == 0
    vm = Vm(engine, memory_size=6 * GIB)
    try:
        vm.set_mode("long")
        cpu = vm.at_boundary(CoreCpu.of).result(SECONDS)
        with vm.memory.view() as ram:
            header = core_header(ram, [cpu])
        count = struct.unpack_from("<H", header, 56)[0]
        loads = [struct.unpack_from("<IIQQQQQQ", header, 64 + 56 * number) for number in range(count)]
        windows = [row for row in loads if row[3] >= PHYSICAL_WINDOW]
        physical = {(address - PHYSICAL_WINDOW, at - RAM_OFFSET, size) for _, _, at, address, _, size, _, _ in windows}
        assert physical == {(0, 0, LOW_MOST), (HIGH_START, HIGH_START, 6 * GIB - LOW_MOST)}
        assert core_size(vm.memory.end) == RAM_OFFSET + vm.memory.end
    finally:
        vm.close()
