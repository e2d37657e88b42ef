"""How fast a disk is inside a Debian, against QEMU TCG with the same kernel, initramfs and image: rounds that are long
enough to be steady (`bench.rates`)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bench.guests import OFF, Guest, on_tcg, on_vmfs
from bench.harness import HERE, Result, mounted
from bench.rates import Row, compare, image, peer_or_none

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
    Row("read", "MiB/s", "sequential reads of 1 MiB", IMAGE_MIB * PASSES, ">= 0.8x"),
    Row("write", "MiB/s", "sequential writes of 1 MiB", IMAGE_MIB * WRITES),
    Row("random", "k/s", "random reads of 4 KiB", READS / 1000, ">= 1.0x"),
)


def randread() -> bytes:
    """The program of guest/randread.c."""
    with tempfile.TemporaryDirectory() as where:
        program = Path(where) / "randread"
        subprocess.run(["gcc", "-O2", "-static", "-o", program, HERE / "guest" / "randread.c"], check=True)
        return program.read_bytes()


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench disk: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    peer = peer_or_none("disk")
    with mounted("--engine", "emulator") as mount, image(IMAGE_MIB) as disk:
        initrd = build(SCRIPT, modules=("virtio_pci", "virtio_blk"), files={"randread": randread()})
        guest = Guest(CLOUD.image, initrd, disk)
        return compare("disk", "disk", ROWS, ROUNDS, lambda: on_vmfs(mount, guest), lambda: on_tcg(guest), peer)
