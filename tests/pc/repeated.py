"""A Debian's life as a function of how it is born: for test_repeats, in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

from pc.initramfs import VIRTIO, build
from pc.kernels import CLOUD

from vmfs.devices import keys
from vmfs.devices.virtio.block import Block
from vmfs.devices.virtio.disk import open_disk
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.machine.born import Birth
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound

SECONDS = 600
SLICE = 10_000_000  # instructions; a guest that waits takes minutes of its time for so many
MOST = 4_000_000_000
BIRTH = Birth(1_767_225_599_500_000_000, bytes(range(16)))  # half a second before 2026
SCRIPT = """\
exec 2>&1
echo ready
read answer < /dev/tty1
echo "typed: $answer"
dd if=/dev/vda bs=4096 count=500 2>/dev/null | md5sum
echo "$answer" | dd of=/dev/vda bs=512 seek=9 2>/dev/null
for i in 1 2 3 4 5 6 7 8; do /bin/busybox true & done; wait
head -c 16 /dev/urandom | md5sum
cat /sys/class/net/*/address
date; nproc; sync; poweroff -f
"""


def life(image: Path, cpus: int, step: int) -> tuple[list[tuple[int, str]], bytes]:
    """A whole life: the hash after each `step` instructions, a multiple of SLICE, and what the guest has sent."""
    vm = Vm(EmulatorEngine(), memory_size=128 << 20)
    try:
        vm.set_machine("pc")
        vm.set_birth(BIRTH)
        vm.set_time_source("instructions")
        vm.set_cpu_count(cpus)
        vm.images["kernel"].write(0, CLOUD.image.read_bytes())
        vm.images["initrd"].write(0, build(SCRIPT, modules=VIRTIO))
        vm.images.cmdline = "console=tty0 console=ttyS0 quiet"
        disk = open_disk(os.open(image, os.O_RDONLY), "cow")
        vm.attach(lambda board: Block(board, "blk0", board.pci.free_slot(), disk))
        hashes, said, slices = [], b"", 0
        typed = False
        while vm.state != "shutdown":
            vm.start(Bound(instructions=SLICE)).result(SECONDS)
            said += vm.board.devices["com1"].sent.read(len(said), 1 << 20)
            slices += 1
            if slices * SLICE % step == 0 or vm.state == "shutdown":
                hashes.append((vm.counters()["instructions"], vm.state_hash().hex()))
            if b"ready" in said and not typed:
                vm.board.keyboard.type(keys.parse('"an answer\\n"'))
                typed = True
            assert slices * SLICE < MOST, said[-2000:]
        return hashes, said
    finally:
        vm.close()
