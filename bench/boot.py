"""Stock kernels: their processor time to a mark in their initramfs, against QEMU TCG.

The same kernel and initramfs on both, one after the other in turns.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.guests import OFF, Guest, Told, on_tcg, on_vmfs, qemu_version
from bench.harness import Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import BUSYBOX, CLOUD, FOLDER, GENERIC, Kernel  # noqa: E402

BOOTS = 3
FETCHED = FOLDER.parent / "bench"  # scripts/fetch_bench.sh
K686 = Kernel("686", FETCHED)
KERNELS = ((CLOUD, BUSYBOX, 0.6), (GENERIC, BUSYBOX, 0.8), (K686, FETCHED / "busybox-i386", 0.8))


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
    with mounted("--engine", "emulator") as mount:
        for kernel, busybox, mark in KERNELS:
            if not kernel.image.exists():
                print(f"bench boot: no {kernel.name} kernel: scripts/fetch_bench.sh", file=sys.stderr)
                continue
            ours, theirs = _boots(mount, kernel, busybox, peer)
            name = f"{kernel.name} kernel to a mark in its initramfs, CPU time"
            found.append(Result(name, "s", ours, peer, theirs, f"<= {mark}x"))
    return found
