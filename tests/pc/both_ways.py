"""What a stock kernel or a firmware does on the emulator, one way or another: for test_both_ways, in processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pc.initramfs import build
from pc.kernels import BUSYBOX, CLOUD, FOLDER, GENERIC, IPXE, MEMTEST, Kernel
from pc.repeated import BIRTH

from vmfs.devices import screen
from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound

K686 = Kernel("686", FOLDER.parent / "bench")  # scripts/fetch_bench.sh
SEABIOS = Path("/usr/share/seabios/bios.bin")
SECONDS = 900


@dataclass(frozen=True, slots=True)
class Guest:
    """Images by name, made when they are needed; what the serial port or the screen has at the end, which comes after
    `least` instructions and before `most`."""

    images: dict[str, Callable[[], bytes]]
    mark: str
    most: int
    least: int = 0
    memory: int = 128 << 20
    cmdline: str = ""
    needs: list[Path] = field(default_factory=list)
    skips: str = ""  # Enter is pressed when the screen says that: else it waits for seconds of its time


def _linux(kernel: Kernel, busybox: Path) -> Guest:
    def initrd() -> bytes:
        return build("echo mark end\npoweroff -f\n", kernel=kernel, busybox=busybox)

    images = {"kernel": kernel.image.read_bytes, "initrd": initrd}
    needs = [kernel.image, busybox]
    return Guest(images, "mark end", 6_000_000_000, memory=256 << 20, cmdline="console=ttyS0", needs=needs)


GUESTS = {
    "cloud": _linux(CLOUD, BUSYBOX),
    "generic": _linux(GENERIC, BUSYBOX),
    "686": _linux(K686, FOLDER.parent / "bench/busybox-i386"),
    "seabios": Guest({"bios": SEABIOS.read_bytes}, "No bootable device", 400_000_000, needs=[SEABIOS]),
    "memtest86+": Guest(
        {"kernel": MEMTEST.read_bytes},
        "Pattern: 0x",
        900_000_000,
        least=300_000_000,
        memory=64 << 20,
        needs=[MEMTEST],
        skips="Press <F1>",
    ),
    # Then it waits for minutes of its time; test_firmware.py goes on to its prompt, by the host's.
    "ipxe": Guest(
        {"kernel": IPXE.read_bytes, "bios": SEABIOS.read_bytes},
        "iPXE initialising devices",
        400_000_000,
        least=220_000_000,
        needs=[IPXE, SEABIOS],
    ),
}


@dataclass(frozen=True, slots=True)
class Life:
    """The hash of all state after each step, what was sent and shown, and what was executed by host code."""

    hashes: list[tuple[int, str]]
    sent: bytes
    screen: str
    translated: int
    regions: int


def live(name: str, way: dict[str, str], step: int) -> Life:
    """Until the mark is there. `way`: words of the environment for the core."""
    os.environ.update(way)
    guest = GUESTS[name]
    vm = Vm(EmulatorEngine(), memory_size=guest.memory)
    try:
        vm.set_machine("pc")
        vm.set_birth(BIRTH)
        vm.set_time_source("instructions")
        for image, make in guest.images.items():
            vm.images[image].write(0, make())
        vm.images.cmdline = guest.cmdline
        hashes: list[tuple[int, str]] = []
        sent, shown = b"", ""
        done = 0
        while done < guest.least or (guest.mark not in shown and guest.mark.encode() not in sent):
            assert done < guest.most and vm.state != "shutdown", f"{shown}\n{sent.decode(errors='replace')[-2000:]}"
            vm.start(Bound(instructions=step)).result(SECONDS)
            done = vm.counters()["instructions"]
            sent += vm.board.devices["com1"].sent.read(len(sent), 1 << 20)
            shown = screen.text(vm.board.display)
            if guest.skips and guest.skips in shown and not vm.board.keyboard.counters["typed"]:
                vm.board.keyboard.type([("enter",)])
            hashes.append((done, vm.state_hash().hex()))
        counters = vm.counters()
        return Life(hashes, sent, shown, counters["instructions_translated"], counters["regions"])
    finally:
        vm.close()
