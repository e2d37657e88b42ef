"""How fast disks on IDE, AHCI and NVMe are in a Debian, against QEMU TCG with the same controller; as `bench.disk`."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.guests import OFF, Guest, on_tcg, on_vmfs
from bench.harness import Result, mounted
from bench.rates import Row, compare, image, peer_or_none

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import FOLDER, GENERIC  # noqa: E402

ROUNDS = 3
IMAGE_MIB = 128
PASSES = 2  # over the image
SMALL = 4000  # reads of 4 KiB, one after the other
DRIVES = {  # the drive in Linux, and the modules of its driver
    "ide": ("sda", ("ata_piix", "sd_mod")),
    "ahci": ("sda", ("ahci", "sd_mod")),
    "nvme": ("nvme0n1", ("nvme",)),
}
ROWS = (
    Row("read", "MiB/s", "sequential reads of 1 MiB", IMAGE_MIB * PASSES, ">= 0.8x"),
    Row("write", "MiB/s", "sequential writes of 1 MiB", IMAGE_MIB),
    Row("small", "k/s", "reads of 4 KiB in turn", SMALL / 1000, ">= 0.8x"),
)


def script(drive: str) -> str:
    return f"""
echo mark read.begin
n=0; while [ $n -lt {PASSES} ]; do
    dd if=/dev/{drive} of=/dev/null iflag=direct bs=1M count={IMAGE_MIB} 2>/dev/null; n=$((n+1))
done
echo mark read.end
echo mark write.begin
dd if=/dev/zero of=/dev/{drive} oflag=direct bs=1M count={IMAGE_MIB} 2>/dev/null
echo mark write.end
echo mark small.begin
dd if=/dev/{drive} of=/dev/null iflag=direct bs=4k count={SMALL} 2>/dev/null
echo mark small.end
""" + OFF


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench drives: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    peer, found = peer_or_none("drives"), []
    with mounted("--engine", "emulator") as mount, image(IMAGE_MIB) as disk:
        for bus, (drive, modules) in DRIVES.items():
            guest = Guest(GENERIC.image, build(script(drive), modules=modules, kernel=GENERIC), disk, bus)
            found += compare(
                "drives", bus, ROWS, ROUNDS, lambda guest=guest: on_vmfs(mount, guest),
                lambda guest=guest: on_tcg(guest), peer,
            )  # fmt: skip
    return found
