"""What a past costs a boot, and what it gives: one step back, and a search through all of it, against going forward.
QEMU's record/replay beside it: what recording costs its boot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.guests import CMDLINE, OFF, Guest, listen, on_tcg, on_vmfs, qemu_version
from bench.harness import Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD, FOLDER  # noqa: E402

ROUNDS = 3
STEPS = 15
NOWHERE = 0x1234567  # no instruction is there


def _on(vm: Path) -> None:
    (vm / "history").write_text("on\n")


def _recorded_by_qemu(guest: Guest) -> float:
    """Processor time to the mark while it records."""
    with tempfile.TemporaryDirectory() as folder:
        initrd = Path(folder) / "initrd"
        initrd.write_bytes(guest.initrd)
        command = [
            *"qemu-system-x86_64 -accel tcg -nodefaults -display none -no-reboot -serial stdio".split(),
            *("-icount", f"shift=1,rr=record,rrfile={folder}/record", "-m", str(guest.memory)),
            *("-kernel", str(guest.kernel), "-initrd", str(initrd), "-append", CMDLINE),
        ]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout
            fd = process.stdout.fileno()
            return listen(lambda: os.read(fd, 4096), (process.pid,), None).processor["end"]


def _least(measure: Callable[[], float]) -> float | None:
    """Of some times; None where QEMU's guest came to no mark in any: on a busy host its timers may not work."""
    found = []
    for _ in range(ROUNDS):
        with contextlib.suppress(RuntimeError, KeyError):
            found.append(measure())
    return min(found, default=None)


def _timed(vm: Path, line: str) -> float:
    began = time.perf_counter()
    (vm / "vm_run").write_text(line)
    return time.perf_counter() - began


def _back(mount: Path, kernel: Path) -> tuple[float, float, float]:
    """Seconds of a step back, of a search through all of a boot, and of the same forward; in a booted Debian."""
    vm = mount / "back"
    vm.mkdir()
    try:
        for name, text in (("mem_size", "512M"), ("machine", "pc"), ("time", "instructions"), ("cmdline", CMDLINE)):
            (vm / name).write_text(text)
        (vm / "kernel").write_bytes(kernel.read_bytes())
        (vm / "initrd").write_bytes(build("echo mark end\nread x\n"))
        _on(vm)
        (vm / "state").write_text("run")
        while "mark end" not in (vm / "console.log").read_text():
            time.sleep(0.1)
        (vm / "state").write_text("pause")
        steps = [_timed(vm, "back 1") for _ in range(STEPS)]
        past = dict(line.split(" ", 1) for line in (vm / "history").read_text().splitlines())
        search = _timed(vm, f"back until {NOWHERE:#x}")
        forward = _timed(vm, f"insns {int(past['to']) - int(past['from'])}")  # it is at the begin
        return statistics.median(steps), search, forward
    finally:
        vm.rmdir()


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench history: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    guest = Guest(CLOUD.image, build(f"echo mark end\n{OFF}", kernel=CLOUD))
    plain, recorded, steps = [], [], []
    with mounted("--engine", "emulator") as mount:
        for _ in range(ROUNDS):
            plain.append(on_vmfs(mount, guest).processor["end"])
            recorded.append(on_vmfs(mount, guest, _on).processor["end"])
            steps.append(_back(mount, CLOUD.image))
    back, search, forward = (min(column) for column in zip(*steps, strict=True))
    found = [
        Result("history on: cloud kernel to a mark, CPU time", "s", min(recorded), "off", min(plain), "<= 1.25x"),
        Result("back 1 in a booted Debian", "ms", back * 1000, "", None, "< 100"),
        Result("back until nowhere, through a boot", "s", search, "forward", forward, "< 2x"),
    ]
    if shutil.which("qemu-system-x86_64") is not None:
        theirs = _least(lambda: on_tcg(guest).processor["end"])
        theirs_recorded = _least(lambda: _recorded_by_qemu(guest))
        if theirs_recorded is not None:
            found.append(Result("(QEMU) rr=record, the same", "s", theirs_recorded, f"{qemu_version()}, off", theirs))
    return found
