"""Programs inside a Debian on a disk, against QEMU TCG, in turn: the host's processor time for each.

OpenSSL counts what it does in some seconds by the guest's clock; the figure is that by the host's processor time.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.boot import FETCHED
from bench.guests import OFF, Guest, Told, on_tcg, on_vmfs, qemu_version
from bench.harness import Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD, DEBIAN  # noqa: E402

ROUNDS = 2
DATA_MB = 50
IMAGE_MB = 320
PYTHON = (
    "d={}\nfor i in range(400000):\n d[i%1000]=d.get(i%1000,0)+i*i\n"
    "s=sorted(str(i*7919%100003) for i in range(60000))\nprint(sum(d.values()),''.join(s)[:9])"
)


@dataclass(frozen=True, slots=True)
class Program:
    """`work`: what OpenSSL says that it has done, for the figure; else it is the time."""

    name: str
    command: str
    mark: float
    work: str = ""
    unit: str = "s"


_SPEED = "openssl speed -mr -seconds 2"
_BLOCKS = r"\+DT.*?\n\+R:(\d+):"
PROGRAMS = (
    Program(f"sha256sum of {DATA_MB} MB", "sha256sum /tmp/data", 1.0),
    Program(f"gzip -1 of {DATA_MB} MB", "gzip -1 </tmp/data >/dev/null", 1.0),
    Program("a shell loop", "sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'", 1.0),
    Program("300 fork and exec", "sh -c 'i=0; while [ $i -lt 300 ]; do /bin/true; i=$((i+1)); done'", 1.0),
    Program("openssl sha256", f"{_SPEED} -bytes 8192 sha256", 0.8, _BLOCKS, "us/block"),
    Program("openssl aes-128-gcm", f"{_SPEED} -bytes 8192 -evp aes-128-gcm", 0.8, _BLOCKS, "us/block"),
    Program("openssl rsa2048 sign", f"{_SPEED} rsa2048", 0.8, r"\+R1:(\d+):", "us/sign"),
    Program("a Python one-liner", f'python3.11 -S -c "{PYTHON}"', 0.8),
)


def script(programs: tuple[Program, ...]) -> str:
    lines = ["export PATH=/bin:/sbin:/usr/bin", "cat /data >/tmp/data"]
    for number, program in enumerate(programs):
        lines += [f"echo mark {number}.begin", f"{program.command} 2>&1", f"echo mark {number}.end"]
    return "\n".join(lines) + "\n"


# The tests' initramfs, to a root on a disk.
HANDOVER = """\
mount -t ext4 -o ro /dev/vda /mnt
mount -t proc proc /mnt/proc
mount -t devtmpfs dev /mnt/dev
mount -t tmpfs tmp /mnt/tmp
chroot /mnt /bin/bash /script
""" + OFF


@contextlib.contextmanager
def disk(programs: tuple[Program, ...]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as where:
        tree, image = Path(where) / "root", Path(where) / "image"
        for each in (DEBIAN, FETCHED / "programs"):
            shutil.copytree(each, tree, symlinks=True, dirs_exist_ok=True)
        for name in ("proc", "dev", "tmp"):
            (tree / name).mkdir(exist_ok=True)
        (tree / "script").write_text(script(programs))
        libraries = b"".join(path.read_bytes() for path in sorted((tree / "usr/lib").rglob("*.so*")) if path.is_file())
        size = DATA_MB * 1_000_000
        (tree / "data").write_bytes((libraries * (size // len(libraries) + 1))[:size])
        with open(image, "wb") as file:
            file.truncate(IMAGE_MB << 20)
        subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", tree, image], check=True)
        yield image


def figure(told: Told, number: int, program: Program) -> float:
    seconds = told.took(f"{number}.begin", f"{number}.end")
    if not program.work:
        return seconds
    said = told.said[told.said.index(f"mark {number}.begin") : told.said.index(f"mark {number}.end")]
    counts = re.findall(program.work, said.replace("\r", ""))
    if not counts:
        raise RuntimeError(f"{program.name} did not say what it has done:\n{said}")
    return seconds / int(counts[0]) * 1e6


def measure(mount: Path, programs: tuple[Program, ...], peer: str, rounds: int, cpu: str = "") -> list[Result]:
    with disk(programs) as image:
        initrd = build(HANDOVER, modules=("virtio_pci", "virtio_blk", "ext4"))
        guest = Guest(CLOUD.image, initrd, image, cpu=cpu)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(on_vmfs(mount, guest))
            if peer:
                theirs.append(on_tcg(guest))
    found = []
    for number, program in enumerate(programs):
        best = min(figure(told, number, program) for told in ours)
        other = min((figure(told, number, program) for told in theirs), default=None)
        found.append(Result(f"in Debian: {program.name}", program.unit, best, peer, other, f"<= {program.mark}x"))
    return found


def results() -> list[Result]:
    if not (FETCHED / "stamp").exists() or not DEBIAN.with_suffix(".stamp").exists():
        print("bench programs: scripts/fetch_bench.sh has not fetched the programs", file=sys.stderr)
        return []
    peer = qemu_version()
    if not peer:
        print("bench programs: qemu-system-x86_64 is not installed: no peer", file=sys.stderr)
    with mounted("--engine", "emulator") as mount:
        return measure(mount, PROGRAMS, peer, ROUNDS)
