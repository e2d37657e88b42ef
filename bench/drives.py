"""How fast disks on IDE, AHCI and NVMe are in a Debian, against QEMU TCG with the same controller; as `bench.disk`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bench.guests import OFF, Guest, on_tcg, on_vmfs, qemu_version
from bench.harness import Result, mounted

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
    ("read", "MiB/s", "sequential reads of 1 MiB", IMAGE_MIB * PASSES, ">= 0.8x"),
    ("write", "MiB/s", "sequential writes of 1 MiB", IMAGE_MIB, ""),
    ("small", "k/s", "reads of 4 KiB in turn", SMALL / 1000, ">= 0.8x"),
)
AMOUNTS = {name: amount for name, _, _, amount, _ in ROWS}


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
    peer = qemu_version()
    if not peer:
        print("bench drives: qemu-system-x86_64 is not installed: no peer", file=sys.stderr)
    found = []
    with mounted("--engine", "emulator") as mount, tempfile.NamedTemporaryFile(dir="/var/tmp") as image:
        for _ in range(IMAGE_MIB):
            image.write(b"\x5a" * (1 << 20))
        image.flush()
        for bus, (drive, modules) in DRIVES.items():
            initrd = build(script(drive), modules=modules, kernel=GENERIC)
            guest = Guest(GENERIC.image, initrd, Path(image.name), bus)
            ours, theirs = [], []
            for _ in range(ROUNDS):
                ours.append(on_vmfs(mount, guest).rates(AMOUNTS))
                if peer:
                    theirs.append(on_tcg(guest).rates(AMOUNTS))
                    line = (f"{name} {ours[-1][name][0]:.4g}/{theirs[-1][name][0]:.4g}" for name, *_ in ROWS)
                    print(f"bench drives: {bus}", *line, file=sys.stderr)
            for way, (by, per) in enumerate((("", ""), (", by processor time", " CPU"))):
                for name, unit, what, _, mark in ROWS:
                    best = max(one[name][way] for one in ours)
                    other = max((one[name][way] for one in theirs), default=None)
                    found.append(Result(f"{bus}: {what}{by}", unit + per, best, peer, other, "" if way else mark))
    return found
