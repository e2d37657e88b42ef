"""A Debian that is taken and put into another machine during its boot boots as one that is left alone."""

from __future__ import annotations

import hashlib
import os
import random

import pytest
from pc.initramfs import VIRTIO, build
from pc.kernels import needs_kernels
from pc.repeated import MEMORY, debian

from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.machine.runloop import Bound
from vmfs.machine.state import State
from vmfs.memory.hostfile import punch

pytestmark = needs_kernels

SECONDS = 300
SLICE = 60_000_000  # instructions, at most
SCRIPT = """\
echo CPUs $(grep -c ^processor /proc/cpuinfo)
read answer
echo "$answer" | dd of=/dev/vda bs=512 seek=9 2>/dev/null
dd if=/dev/vda bs=4096 count=500 2>/dev/null | md5sum
for i in 1 2 3 4 5 6 7 8; do /bin/busybox true & done; wait
date; sync; poweroff -f
"""


@pytest.fixture
def make(tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(random.Random(1).randbytes(4 << 20))
    initrd = build(SCRIPT, modules=VIRTIO)
    made = []

    def one(cpus):
        vm = debian(image, initrd, cpus, "console=ttyS0 quiet")
        made.append(vm)
        return vm

    yield one
    for vm in made:
        vm.close()


def go_into(vm, other):
    """`other` becomes what `vm` is, with its memory, by way of bytes."""
    state = State.decode(vm.take().result(SECONDS).encode())
    other.memory.clear(0, MEMORY)
    for start, end in vm.memory.extents():
        other.memory.write(start, vm.memory.read(start, end - start))
    for (_, source), (_, target) in zip(vm.disks(), other.disks(), strict=True):
        punch(target.fd, 0, target.size)
        for start, end in source.extents():
            os.pwrite(target.fd, source.read_at(start, end - start), start)
    other.put(state)


@pytest.mark.parametrize("cpus", [1, 4])
def test_a_boot_that_moves_from_machine_to_machine(make, cpus):
    """And, with several CPUs, from engine to engine."""
    alone, first, second = make(cpus), make(cpus), make(cpus)
    go_into(alone, first)  # with the date of its birth
    dice, slices, typed = random.Random(3), 0, False
    while alone.state != "shutdown":
        bound = Bound(instructions=dice.randrange(1, SLICE))
        lines = [vm.start(bound).result(SECONDS).line() for vm in (alone, first)]
        assert lines[0] == lines[1]
        said = alone.board.devices["com1"].sent.read(0, 1 << 20)
        if not typed and slices > 12:
            for vm in (alone, first):
                vm.board.devices["com1"].receive(b"an answer\n")
            typed = True
        slices += 1
        if slices % 5 == 0 or alone.state == "shutdown":
            assert first.state_hash() == alone.state_hash(), (slices, said[-500:])
        if dice.random() < 0.4 and alone.state != "shutdown":
            go_into(first, second)
            first, second = second, first
        elif cpus > 1 and dice.random() < 0.3:
            first.move_to(EmulatorEngine())
        assert slices < 400, said[-2000:]
    disk = bytearray(random.Random(1).randbytes(4 << 20))
    disk[9 * 512 : 9 * 512 + 10] = b"an answer\n"
    assert hashlib.md5(disk[: 500 * 4096]).hexdigest().encode() in said and b"20" in said
    assert f"CPUs {cpus}\r\n".encode() in said
