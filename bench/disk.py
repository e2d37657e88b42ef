"""How fast a disk is inside a Debian, against QEMU TCG: several rounds in turn, each long enough to be steady.

The same kernel, initramfs and image on both; all of the image is in the host's page cache. Figures are by the host's
clock, between marks that the guest says, and the best of the rounds. A busy host slows both down, so the rounds
alternate, and the same is said by the host's processor time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bench.guests import OFF, Guest, on_tcg, on_vmfs, qemu_version
from bench.harness import HERE, Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD, FOLDER  # noqa: E402

ROUNDS = 4
IMAGE_MIB = 256
PASSES = 4  # over the image: 1 GiB read
WRITES = 2
READS = 20_000
SCRIPT = f"""
each() {{
    n=0; echo mark $1.begin
    while [ $n -lt $2 ]; do dd $3 bs=1M count={IMAGE_MIB} 2>/dev/null; n=$((n+1)); done
    echo mark $1.end
}}
each read {PASSES} "if=/dev/vda of=/dev/null iflag=direct"
each write {WRITES} "if=/dev/zero of=/dev/vda oflag=direct"
echo mark random.begin
/randread /dev/vda {READS}
echo mark random.end
""" + OFF
ROWS = (
    ("read", "MiB/s", "disk: sequential reads of 1 MiB", IMAGE_MIB * PASSES, ">= 0.8x"),
    ("write", "MiB/s", "disk: sequential writes of 1 MiB", IMAGE_MIB * WRITES, ""),
    ("random", "k/s", "disk: random reads of 4 KiB", READS / 1000, ">= 1.0x"),
)
AMOUNTS = {name: amount for name, _, _, amount, _ in ROWS}


def randread() -> bytes:
    """The program of guest/randread.c."""
    with tempfile.TemporaryDirectory() as where:
        program = Path(where) / "randread"
        subprocess.run(["gcc", "-O2", "-static", "-o", program, HERE / "guest" / "randread.c"], check=True)
        return program.read_bytes()


Rates = list[dict[str, tuple[float, float]]]


def measure(mount: Path, peer: str, rounds: int) -> tuple[Rates, Rates]:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as image:
        for _ in range(IMAGE_MIB):
            image.write(b"\x5a" * (1 << 20))
        image.flush()
        initrd = build(SCRIPT, modules=("virtio_pci", "virtio_blk"), files={"randread": randread()})
        guest = Guest(CLOUD.image, initrd, Path(image.name))
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(on_vmfs(mount, guest).rates(AMOUNTS))
            if peer:
                theirs.append(on_tcg(guest).rates(AMOUNTS))
    return ours, theirs


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench disk: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    peer = qemu_version()
    if not peer:
        print("bench disk: qemu-system-x86_64 is not installed: no peer", file=sys.stderr)
    with mounted("--engine", "emulator") as mount:
        ours, theirs = measure(mount, peer, ROUNDS)
    for one, other in zip(ours, theirs, strict=False):
        print("bench disk:", *(f"{name} {one[name][0]:.4g}/{other[name][0]:.4g}" for name, *_ in ROWS), file=sys.stderr)
    found = []
    for way, (by, per) in enumerate((("", ""), (", by processor time", " CPU"))):
        for name, unit, what, _, mark in ROWS:
            theirs_best = max((one[name][way] for one in theirs), default=None)
            best = max(one[name][way] for one in ours)
            found.append(Result(what + by, unit + per, best, peer, theirs_best, "" if way else mark))
    return found
