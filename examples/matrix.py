"""matrix.py KERNEL BUSYBOX [SCHEDULER]: does a Linux kernel come up with each of 8 command lines on each of 4 models of
a CPU? 32 machines on a fleet; without the address of a scheduler on this host alone.

KERNEL is a bzImage, BUSYBOX a static one: Debian has them in linux-image-cloud-amd64 and busybox-static. All machines
are forks of one that has the kernel and a root in it and has not begun. The guest's /init says what it found, and
powers off (or halts, without ACPI); what went otherwise is in the table, with the end of what the guest said.
"""

from __future__ import annotations

import contextlib
import io
import struct
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

LINES = (
    "", "nokaslr", "mitigations=off", "pti=on", "acpi=off", "nox2apic noapic", "nosmp tsc=unstable", "init_on_alloc=1"
)  # fmt: skip

# What a model lacks, by the leaf and subleaf of CPUID: bits of EBX, ECX and EDX (Intel SDM, CPUID)
_V3 = {(1, 0): (0, 1 << 12 | 1 << 22 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29, 0), (7, 0): (0xFFFF_FF28, ~0, ~0)}
_V2 = {(1, 0): (0, 1 << 0 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23, 0)}  # SSE3, SSSE3, CX16, SSE4, POPCNT
_LATE = {(1, 0): (0, 1 << 17 | 1 << 21, 0), (0x8000_0001, 0): (0, 0, 1 << 26 | 1 << 27), (0x8000_0007, 0): (0, 0, ~0)}
MODELS = {"all": (), "x86-64-v2": (_V3,), "x86-64": (_V3, _V2), "early": (_V3, _V2, _LATE)}
ENDS = {"acpi=off": "hlt"}  # without ACPI there is no register that powers off; elsewhere it is a shutdown
FLAGS = {"all": "sse4_2", "x86-64-v2": "sse4_2", "x86-64": "", "early": ""}  # of FLAG in /proc/cpuinfo
_ENTRY = "<7I12x"  # struct kvm_cpuid_entry2

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
cd /sys/devices/system
read -r clock < clocksource/clocksource0/current_clocksource
read -r meltdown < cpu/vulnerabilities/meltdown
set -- `/bin/busybox grep -m1 -ow -e sse4_2 /proc/cpuinfo`
echo "matrix: $clock|$meltdown|$1"
/bin/busybox poweroff -f
"""


def without(cpuid: bytes, model: str) -> bytes:
    """The file `cpuid` of a machine, less what a model lacks."""
    entries = [list(each) for each in struct.iter_unpack(_ENTRY, cpuid[8:])]
    for lacks, entry in product(MODELS[model], entries):
        for at, bits in enumerate(lacks.get((entry[0], entry[1]), ()), 4):
            entry[at] &= ~bits & 0xFFFF_FFFF
    return cpuid[:8] + b"".join(struct.pack(_ENTRY, *entry) for entry in entries)


def boots(vm: Any, case: tuple[str, str]) -> list[str]:
    """A case: what the guest has found."""
    line, model = case
    vm.write("cmdline", f"console=ttyS0 quiet {line}\n")
    vm.write("cpuid", without(vm.read("cpuid"), model))
    vm.start()
    found = vm.console.expect(r"matrix: (.*?)\r?\n", timeout=900)[1].split("|")
    vm.wait(timeout=100)
    return found


def root(busybox: bytes) -> bytes:
    """An initramfs: a cpio archive, format newc."""
    out = io.BytesIO()
    files = (("bin", 0o40755, b""), ("dev", 0o40755, b""), ("proc", 0o40755, b""), ("sys", 0o40755, b""),
             ("bin/busybox", 0o100755, busybox), ("init", 0o100755, INIT.encode()), ("TRAILER!!!", 0, b""))  # fmt: skip
    for number, (name, mode, data) in enumerate(files, 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        for part in (b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0", data):
            out.write(part + bytes(-len(part) % 4))
    return out.getvalue()


@contextlib.contextmanager
def clients(scheduler: str | None) -> Iterator[Any]:
    from distributed import Client

    from vmfs.fleet import local_cluster

    if scheduler:
        with Client(scheduler) as client:
            yield client
    else:
        with local_cluster(threads_per_worker=1) as cluster, Client(cluster) as client:
            yield client


def main(kernel: str, busybox: str, scheduler: str | None = None) -> int:
    from vmfs.client import Vm, private_mount
    from vmfs.fleet import Fleet

    with clients(scheduler) as client, Fleet(client, mount_options=("--engine", "emulator")) as fleet:
        with (
            private_mount(("--engine", "emulator")) as mount,
            Vm.create(mount / "one", mem_size="256M", engine="emulator") as vm,
        ):
            vm.boot(kernel, initrd=root(Path(busybox).read_bytes()), start=False)
            template = fleet.template(vm)
        print(f"{'command line':22} {'model':10} {'clock':12} {'meltdown':18} seconds", flush=True)
        cases = list(product(LINES, MODELS))
        came_up = sum(told(result) for result in fleet.map(boots, cases, template=template, timeout=1200))
    print(f"{came_up} of {len(cases)} came up")
    return came_up < len(cases)


def told(result: Any) -> bool:
    """A line of the table; whether it came up."""
    line, model = result.input
    ended = result.exit.startswith(ENDS.get(line, "shutdown cause=poweroff"))
    if result.kind or not ended or result.value[2] != FLAGS[model]:
        print(f"{line:22} {model:10} FAILED: {result.kind} {result.exit} {result.value} {result.error[-300:]}")
        print(f"    it said: {result.console[-500:]!r}", flush=True)
        return False
    print(f"{line:22} {model:10} {result.value[0]:12} {result.value[1]:18} {result.seconds:7.1f}", flush=True)
    return True


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
