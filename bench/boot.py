"""Stock kernels: their processor time to a mark in their initramfs, and how fast a disk is, against QEMU TCG.

The same kernel, initramfs and disk on both, one after the other in turns. Disk figures are the guest's own time, by its
clock, which is the host's on both.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.guests import OFF, Guest, Told, on_tcg, on_vmfs, qemu_version
from bench.harness import HERE, Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import BUSYBOX, CLOUD, FOLDER, GENERIC, Kernel  # noqa: E402

BOOTS = 3
DISK_MIB = 64
FETCHED = FOLDER.parent / "bench"  # scripts/fetch_bench.sh
K686 = Kernel("686", FETCHED)
KERNELS = ((CLOUD, BUSYBOX, 0.6), (GENERIC, BUSYBOX, 0.8), (K686, FETCHED / "busybox-i386", 0.8))
_READS = 4096
DISK_SCRIPT = f"""
now() {{ cut -d' ' -f1 /proc/uptime; }}
a=$(now); dd if=/dev/vda of=/dev/null bs=1M count={DISK_MIB} iflag=direct 2>/dev/null; b=$(now)
echo "disk read $a $b"
a=$(now); dd if=/dev/zero of=/dev/vda bs=1M count={DISK_MIB} oflag=direct 2>/dev/null; b=$(now)
echo "disk write $a $b"
echo "disk random 0 $(/randread /dev/vda {_READS})"
echo mark end
""" + OFF


def randread() -> bytes:
    """The program of guest/randread.c."""
    with tempfile.TemporaryDirectory() as where:
        program = Path(where) / "randread"
        subprocess.run(["gcc", "-O2", "-static", "-o", program, HERE / "guest" / "randread.c"], check=True)
        return program.read_bytes()


def disk_rates(said: str) -> dict[str, float]:
    """MiB a second, and for 4 KiB reads thousands of reads a second."""
    found = {name: float(end) - float(start) for name, start, end in re.findall(r"disk (\S+) (\S+) (\S+)", said)}
    amount = {"read": DISK_MIB, "write": DISK_MIB, "random": _READS / 1000}
    return {name: amount[name] / max(seconds, 0.01) for name, seconds in found.items()}


def _boots(mount: Path, kernel: Kernel, busybox: Path, peer: str) -> tuple[float, float | None]:
    """The least of some boots, ours and the peer's."""
    guest = Guest(kernel.image, build(f"echo mark end\n{OFF}", kernel=kernel, busybox=busybox))
    ours: list[Told] = []
    theirs: list[Told] = []
    for _ in range(BOOTS):
        ours.append(on_vmfs(mount, guest))
        if peer:
            theirs.append(on_tcg(guest))
    return min(t.processor["end"] for t in ours), min((t.processor["end"] for t in theirs), default=None)


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench boot: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    peer = qemu_version()
    if not peer:
        print("bench boot: qemu-system-x86_64 is not installed: no peer", file=sys.stderr)
    found = []
    with mounted("--engine", "emulator") as mount, tempfile.NamedTemporaryFile(dir="/var/tmp") as image:
        for kernel, busybox, mark in KERNELS:
            if not kernel.image.exists():
                print(f"bench boot: no {kernel.name} kernel: scripts/fetch_bench.sh", file=sys.stderr)
                continue
            ours, theirs = _boots(mount, kernel, busybox, peer)
            name = f"{kernel.name} kernel to a mark in its initramfs, CPU time"
            found.append(Result(name, "s", ours, peer, theirs, f"<= {mark}x"))
        image.truncate(DISK_MIB << 20)
        image.flush()
        files = {"randread": randread()}
        initrd = build(DISK_SCRIPT, modules=("virtio_pci", "virtio_blk"), files=files)
        guest = Guest(CLOUD.image, initrd, Path(image.name))
        our_disk = disk_rates(on_vmfs(mount, guest).said)
        tcg_disk = disk_rates(on_tcg(guest).said) if peer else {}
    for name, unit, what in (
        ("read", "MiB/s", "disk: sequential read, 1 MiB"),
        ("write", "MiB/s", "disk: sequential write, 1 MiB"),
        ("random", "k/s", "disk: random reads of 4 KiB"),
    ):
        found.append(Result(what, unit, our_disk[name], peer, tcg_disk.get(name)))
    return found
