"""The data port of an IDE channel is answered in C: a guest reads and writes the same by it and by exits."""

from __future__ import annotations

import os
import random

import pytest
from engine.test_chips import exits, make  # noqa: F401
from engine.test_pc import load, run

from vmfs.devices.ide.ata import AtaDisk
from vmfs.devices.virtio.disk import open_disk

BUFFER = 0x5000


@pytest.mark.parametrize(("read", "write", "units"), [("insw", "outsw", 256), ("insd", "outsd", 128)])
def test_two_sectors_each_way(make, exits, assembler, tmp_path, read, write, units):  # noqa: F811
    lines = ["xor ax, ax", "mov ds, ax", "mov es, ax", "mov ss, ax", "mov sp, 0x7000", "cld"]

    def command(value, lba):
        for port, byte in ((0x1F6, 0xE0), (0x1F2, 2), (0x1F3, lba), (0x1F4, 0), (0x1F5, 0), (0x1F7, value)):
            lines.extend((f"mov dx, {port}", f"mov al, {byte}", "out dx, al"))

    def blocks(string, register):
        lines.append(f"mov {register}, {BUFFER}")
        for number in range(2):
            lines.extend((
                f"wait_{string}_{number}: mov dx, 0x1f7", "in al, dx", "test al, 8", f"jz wait_{string}_{number}",
                "mov dx, 0x1f0", f"mov cx, {units}", f"rep {string}",
            ))  # fmt: skip

    command(0x20, 3)
    blocks(read, "di")
    command(0x30, 8)
    blocks(write, "si")
    code = assembler("\n".join([*lines, "mov dx, 0x1f7", "in al, dx", "mov dx, 0xf4", "out dx, al"]), "real")
    content = random.Random(9).randbytes(64 * 512)
    for fast in (True, False):
        image = tmp_path / f"image-{fast}"
        image.write_bytes(content)
        vm = make(fast=fast)
        disk = open_disk(os.open(image, os.O_RDWR), "rw")
        vm.attach(lambda board, disk=disk: AtaDisk(board, "hda", disk))
        load(vm, code)
        exits.clear()
        assert run(vm).line().startswith("shutdown cause=debug-exit code=161")  # status 50
        assert bytes(vm.memory.read(BUFFER, 1024)) == content[3 * 512 : 5 * 512]
        assert image.read_bytes() == content[: 8 * 512] + content[3 * 512 : 5 * 512] + content[10 * 512 :]
        if vm.engine.name == "emulator":
            assert len(exits) < 40 if fast else len(exits) > 2 * units
