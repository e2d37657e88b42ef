"""A Debian in this process, and its life as a function of how it is born: for test_repeats, in a process of its own."""

from __future__ import annotations

import shlex
from pathlib import Path

from engine.saving import Door
from pc.initramfs import VIRTIO, build
from pc.kernels import CLOUD

from vmfs.devices import keys
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.machine.attach import attach, parse_attachment
from vmfs.machine.born import Birth
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound

SECONDS = 600
MEMORY = 128 << 20
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


def debian(image: Path, initrd: bytes, cpus: int, cmdline: str, birth: Birth | None = None) -> Vm:
    """A PC with a cloud kernel and a disk, whose time follows the instructions."""
    vm = Vm(EmulatorEngine(), memory_size=MEMORY)
    try:
        vm.set_machine("pc")
        if birth is not None:
            vm.set_birth(birth)
        vm.set_time_source("instructions")
        vm.set_cpu_count(cpus)
        vm.images["kernel"].write(0, CLOUD.image.read_bytes())
        vm.images["initrd"].write(0, initrd)
        vm.images.cmdline = cmdline
        attach(vm, parse_attachment(f"blk {shlex.quote(str(image))} cow"), Door())
    except BaseException:
        vm.close()
        raise
    return vm


def life(image: Path, cpus: int, step: int) -> tuple[list[tuple[int, str]], bytes]:
    """A whole life: the hash after each `step` instructions, a multiple of SLICE, and what the guest has sent."""
    initrd = build(SCRIPT, modules=VIRTIO)
    vm = debian(image, initrd, cpus, "console=tty0 console=ttyS0 quiet", BIRTH)
    try:
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
