"""The data port of an IDE channel is answered in C, many elements of a string at once: a guest reads and writes the
same by it and by exits, wherever a run stops."""

from __future__ import annotations

import os
import random

import pytest
from engine.test_chips import exits, make  # noqa: F401
from engine.test_pc import load, register, run

from vmfs.devices.ide.ata import AtaDisk
from vmfs.devices.virtio.disk import open_disk
from vmfs.engine.base import Capability

BUFFER = 0x5000
CONTENT = random.Random(9).randbytes(64 * 512)
UNITS = [("insw", "outsw", 256), ("insd", "outsd", 128)]


def program(assembler, read, write, units, buffer=BUFFER, direction="cld"):
    """Sectors 3 and 4 are read; what was read goes into 8 and 9."""
    lines = ["xor ax, ax", "mov ds, ax", "mov es, ax", "mov ss, ax", "mov sp, 0x7000", direction]

    def command(value, lba):
        for port, byte in ((0x1F6, 0xE0), (0x1F2, 2), (0x1F3, lba), (0x1F4, 0), (0x1F5, 0), (0x1F7, value)):
            lines.extend((f"mov dx, {port}", f"mov al, {byte}", "out dx, al"))

    def blocks(string, register):
        lines.append(f"mov {register}, {buffer}")
        for number in range(2):
            lines.extend((
                f"wait_{string}_{number}: mov dx, 0x1f7", "in al, dx", "test al, 8", f"jz wait_{string}_{number}",
                "mov dx, 0x1f0", f"mov cx, {units}", f"rep {string}",
            ))  # fmt: skip

    command(0x20, 3)
    blocks(read, "di")
    command(0x30, 8)
    blocks(write, "si")
    return assembler("\n".join([*lines, "mov dx, 0x1f7", "in al, dx", "mov dx, 0xf4", "out dx, al"]), "real")


@pytest.fixture
def with_disk(make, tmp_path):  # noqa: F811
    """(a machine with that program, its disk's image)"""

    def machine(code, fast):
        image = tmp_path / f"image-{fast}"
        image.write_bytes(CONTENT)
        vm = make(fast=fast)
        disk = open_disk(os.open(image, os.O_RDWR), "rw")
        vm.attach(lambda board: AtaDisk(board, "hda", disk))
        load(vm, code)
        return vm, image

    return machine


@pytest.mark.parametrize(("read", "write", "units"), UNITS)
def test_two_sectors_each_way(with_disk, exits, assembler, read, write, units):  # noqa: F811
    code = program(assembler, read, write, units)
    for fast in (True, False):
        vm, image = with_disk(code, fast)
        exits.clear()
        assert run(vm).line().startswith("shutdown cause=debug-exit code=161")  # status 50
        assert bytes(vm.memory.read(BUFFER, 1024)) == CONTENT[3 * 512 : 5 * 512]
        assert image.read_bytes() == CONTENT[: 8 * 512] + CONTENT[3 * 512 : 5 * 512] + CONTENT[10 * 512 :]
        if vm.engine.name == "emulator":
            assert len(exits) < 40 if fast else len(exits) > 2 * units


@pytest.mark.parametrize(("buffer", "direction"), [(BUFFER, "cld"), (BUFFER + 0xE01, "cld"), (BUFFER + 0x1200, "std")])
def test_a_run_stops_between_elements(with_disk, assembler, buffer, direction):
    """Each element is an instruction: where a run ends, and what has moved until then, are the same in both ways;
    over the end of a page, too, and downwards."""
    code = program(assembler, *UNITS[0], buffer, direction)
    machines = [with_disk(code, fast)[0] for fast in (True, False)]
    if Capability.DETERMINISTIC not in machines[0].capabilities:
        pytest.skip("the engine counts no instructions")
    dice, stops = random.Random(buffer), 0
    while True:
        count = dice.choice((1, 2, 17, 100))
        lines = {run(vm, instructions=count).line() for vm in machines}
        assert len({tuple(register(vm, name) for name in ("rip", "rcx", "rsi", "rdi", "rax")) for vm in machines}) == 1
        assert len({bytes(vm.memory.read(BUFFER, 0x2000)) for vm in machines}) == 1
        (line,) = lines
        if line.startswith("shutdown"):
            break
        stops += 1
    assert stops > 20
