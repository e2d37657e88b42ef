"""A stock kernel: how long it takes to a mark in its initramfs, and how fast its disk is, against QEMU TCG.

The same kernel, initramfs and disk on both, one after the other in turns. Disk figures are the guest's own time, by its
clock, which is the host's on both.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench.harness import HERE, Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD, FOLDER  # noqa: E402

BOOTS = 3
DISK_MIB = 64
MARK = "the-mark"
CMDLINE = "console=ttyS0 quiet panic=-1"
_OFF = "poweroff -f\n"
_READS = 4096
DISK_SCRIPT = f"""
now() {{ cut -d' ' -f1 /proc/uptime; }}
a=$(now); dd if=/dev/vda of=/dev/null bs=1M count={DISK_MIB} iflag=direct 2>/dev/null; b=$(now)
echo "disk read $a $b"
a=$(now); dd if=/dev/zero of=/dev/vda bs=1M count={DISK_MIB} oflag=direct 2>/dev/null; b=$(now)
echo "disk write $a $b"
echo "disk random 0 $(/randread /dev/vda {_READS})"
echo {MARK}
""" + _OFF


def vmfs_run(mount: Path, initrd: bytes, disk: Path | None) -> tuple[float, str]:
    """Seconds from the run's start to the mark, and all that the guest said."""
    vm = mount / "bench"
    vm.mkdir()
    try:
        (vm / "mem_size").write_text("512M")
        (vm / "machine").write_text("pc")
        if disk:
            (vm / "dev/add").write_text(f"blk {disk} rw")
        (vm / "kernel").write_bytes(CLOUD.image.read_bytes())
        (vm / "initrd").write_bytes(initrd)
        (vm / "cmdline").write_text(CMDLINE)
        with open(vm / "console", "rb", buffering=0) as console:
            run = threading.Thread(target=(vm / "vm_run").read_text)
            began = time.perf_counter()
            run.start()
            seconds, said = until_mark(lambda: console.read(4096) or b"", began)
            run.join()
        return seconds, said
    finally:
        vm.rmdir()


def tcg_run(initrd: bytes, disk: Path | None) -> tuple[float, str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(initrd)
        file.flush()
        drive = ["-drive", f"file={disk},format=raw,if=virtio,cache=writeback"] if disk else []
        command = [
            "qemu-system-x86_64", "-accel", "tcg", "-m", "512", "-nodefaults", "-display", "none", "-no-reboot",
            "-serial", "stdio", *drive,
            "-kernel", str(CLOUD.image), "-initrd", file.name, "-append", CMDLINE,
        ]  # fmt: skip
        began = time.perf_counter()
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout
            fd = process.stdout.fileno()
            return until_mark(lambda: os.read(fd, 4096), began)


def until_mark(read: Callable[[], bytes], began: float) -> tuple[float, str]:
    said, seconds = "", 0.0
    while data := read():
        said += data.decode(errors="replace")
        if not seconds and MARK in said:
            seconds = time.perf_counter() - began
    if not seconds:
        raise RuntimeError(f"the guest did not come to its mark:\n{said[-2000:]}")
    return seconds, said


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


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench boot: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    has_tcg = bool(shutil.which("qemu-system-x86_64"))
    if not has_tcg:
        print("bench boot: qemu-system-x86_64 is not installed: no peer", file=sys.stderr)
    plain = build(f"echo {MARK}\n{_OFF}")
    with_disk = build(DISK_SCRIPT, modules=("virtio_pci", "virtio_blk"), files={"randread": randread()})
    ours, theirs = [], []
    with mounted("--engine", "emulator") as mount, tempfile.NamedTemporaryFile(dir="/var/tmp") as image:
        for _ in range(BOOTS):
            ours.append(vmfs_run(mount, plain, None)[0])
            if has_tcg:
                theirs.append(tcg_run(plain, None)[0])
        image.truncate(DISK_MIB << 20)
        image.flush()
        our_disk = disk_rates(vmfs_run(mount, with_disk, Path(image.name))[1])
        tcg_disk = disk_rates(tcg_run(with_disk, Path(image.name))[1]) if has_tcg else {}
    peer = statistics.median(theirs) if theirs else None
    rows = [Result("cloud kernel to a mark in its initramfs", "s", statistics.median(ours), "QEMU TCG", peer, "<= 3x")]
    for name, unit, what in (
        ("read", "MiB/s", "disk: sequential read, 1 MiB"),
        ("write", "MiB/s", "disk: sequential write, 1 MiB"),
        ("random", "k/s", "disk: random reads of 4 KiB"),
    ):
        rows.append(Result(what, unit, our_disk[name], "QEMU TCG", tcg_disk.get(name)))
    return rows
