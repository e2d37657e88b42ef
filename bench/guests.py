"""A Linux guest on a machine of ours and under QEMU TCG: the same kernel, initramfs, disk and command line, and when it
came to its marks, by the clock and in processor time of the host.

A guest says a mark as a line `mark NAME`. Processor time counts what the host does for the guest, in each of its
threads and, with us, in the server that passes the console on. On a busy host that is what can be compared.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CMDLINE = "console=ttyS0 quiet panic=-1"
OFF = "poweroff -f\n"
_MARK = re.compile(r"^mark (\S+)\r\n", re.MULTILINE)


# Of a disk: the words of `dev/add`, with {} for the image, and QEMU's words for the drive and its controller.
BUSES = {
    "virtio": ("blk {} rw", "if=virtio", ()),
    "ide": ("ide {} rw", "if=ide", ()),
    "cdrom": ("cdrom {}", "if=ide,index=2,media=cdrom", ()),
    "ahci": ("ahci {} rw", "if=none,id=d", ("-device", "ich9-ahci,id=a", "-device", "ide-hd,bus=a.0,drive=d")),
    "nvme": ("nvme {} rw", "if=none,id=d", ("-device", "nvme,serial=d,drive=d")),
}


@dataclass(frozen=True, slots=True)
class Guest:
    """`bios`: what begins where there is no `kernel`."""

    kernel: Path | None
    initrd: bytes
    disk: Path | None = None
    bus: str = "virtio"  # of the disk: a name of BUSES
    memory: int = 512  # MiB
    cpu: str = ""  # QEMU's word for another than its own default
    cpus: int = 1
    bios: Path | None = None


@dataclass(slots=True)
class Told:
    """What a guest said, and when it came to its marks: seconds by the clock, and of processor time, from the start."""

    said: str = ""
    clock: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)

    def took(self, first: str, last: str) -> float:
        """Processor time between two marks."""
        return self.processor[last] - self.processor[first]

    def rates(self, amounts: dict[str, float]) -> dict[str, tuple[float, float]]:
        """Of what is done between NAME.begin and NAME.end, by its amount: by the clock, and by processor time."""
        return {
            name: (
                amount / (self.clock[f"{name}.end"] - self.clock[f"{name}.begin"]),
                amount / self.took(f"{name}.begin", f"{name}.end"),
            )
            for name, amount in amounts.items()
        }


def processor_time(pid: int) -> float:
    """Of all threads of a process (clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def on_vmfs(mount: Path, guest: Guest, prepare: Callable[[Path], tuple[int, ...] | None] = lambda vm: None) -> Told:
    """`prepare(vm)` is done before the run, and may return processes that work for the machine, too."""
    vm = mount / "bench"
    vm.mkdir()
    try:
        (vm / "mem_size").write_text(f"{guest.memory}M")
        (vm / "machine").write_text("pc")
        (vm / "cpus").write_text(str(guest.cpus))
        if guest.disk:
            (vm / "dev/add").write_text(BUSES[guest.bus][0].format(guest.disk))
        if guest.kernel:
            (vm / "kernel").write_bytes(guest.kernel.read_bytes())
            (vm / "initrd").write_bytes(guest.initrd)
            (vm / "cmdline").write_text(CMDLINE)
        if guest.bios:
            (vm / "bios").write_bytes(guest.bios.read_bytes())
        more = prepare(vm) or ()
        machine = int(dict(line.split() for line in (vm / "stat").read_text().splitlines())["pid"])
        processes = (machine, parent(machine), parent(parent(machine)), *more)  # the zygote, the server
        with open(vm / "console", "rb", buffering=0) as console:
            run = threading.Thread(target=(vm / "vm_run").read_text)

            def read() -> bytes:
                while run.is_alive():
                    if select.select([console], [], [], 1)[0]:
                        return console.read(4096) or b""
                return b""

            told = listen(read, processes, run.start)
            run.join()
        return told
    finally:
        vm.rmdir()


def on_tcg(guest: Guest, *more: str) -> Told:
    """`more`: arguments of QEMU's."""
    _, drive, controller = BUSES[guest.bus]
    with tempfile.NamedTemporaryFile() as file:
        file.write(guest.initrd)
        file.flush()
        command = [
            *("qemu-system-x86_64 -accel tcg,thread=multi -nodefaults -display none -no-reboot -serial stdio").split(),
            *("-m", str(guest.memory), "-smp", str(guest.cpus)),
            *(("-cpu", guest.cpu) if guest.cpu else ()),
            *(("-drive", f"file={guest.disk},format=raw,{drive},cache=writeback", *controller) if guest.disk else ()),
            *(("-kernel", str(guest.kernel), "-initrd", file.name, "-append", CMDLINE) if guest.kernel else ()),
            *(("-bios", str(guest.bios)) if guest.bios else ()),
            *more,
        ]
        # A session of its own, as a mount has: where the kernel groups by sessions, each group has the same share.
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        ) as process:
            assert process.stdout
            fd = process.stdout.fileno()
            return listen(lambda: os.read(fd, 4096), (process.pid,), None)


def listen(read: Callable[[], bytes], processes: tuple[int, ...], start: Callable[[], object] | None) -> Told:
    """Until the guest is off. Without `start` it has begun already: all that its processes used counts."""

    def used() -> float:
        return sum(map(processor_time, processes))

    told = Told()
    before, began = used() if start else 0.0, time.perf_counter()
    if start:
        start()
    seen = 0
    while data := read():
        told.said += data.decode(errors="replace")
        for match in _MARK.finditer(told.said, seen):
            told.clock[match[1]] = time.perf_counter() - began
            told.processor[match[1]] = used() - before
            seen = match.end()
    if not told.clock:
        raise RuntimeError(f"the guest came to no mark:\n{told.said[-2000:]}")
    return told


def qemu_version() -> str:
    """`QEMU TCG 7.2.22`, or nothing where it is missing."""
    try:
        said = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return ""
    found = re.search(r"version (\S+)", said)
    return f"QEMU TCG {found[1] if found else '?'}"
