"""Two busy CPUs against one: how much more a Linux guest of two CPUs does when both have work, against QEMU TCG with
a thread a CPU. By the clock, on a host with two idle processors; in processor time, which a busy host hardly changes,
it is what the guest does with the same time of two.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.guests import OFF, Guest, Told, on_tcg, on_vmfs, qemu_version
from bench.harness import HERE, Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD, FOLDER  # noqa: E402

ROUNDS = 3
WORK = 4000
SCRIPT = f"""
busy {WORK // 10} > /dev/null
echo mark begin
busy {WORK}; busy {WORK}
echo mark one
busy {WORK} & busy {WORK} & wait
echo mark two
{OFF}"""


def busy() -> bytes:
    """The program of guest/busy.c."""
    with tempfile.TemporaryDirectory() as where:
        program = Path(where) / "busy"
        subprocess.run(["gcc", "-O2", "-static", "-o", program, HERE / "guest" / "busy.c"], check=True)
        return program.read_bytes()


def _best(told: list[Told], times: Callable[[Told], dict[str, float]]) -> float:
    """So many times as much by two as by one: of the best rounds of each."""
    one = min(times(each)["one"] - times(each)["begin"] for each in told)
    return one / min(times(each)["two"] - times(each)["one"] for each in told)


def results() -> list[Result]:
    if not (FOLDER / "stamp").exists():
        print("bench smp: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return []
    peer = qemu_version()
    guest = Guest(CLOUD.image, build(SCRIPT, files={"bin/busy": busy()}), cpus=2)
    ours: list[Told] = []
    theirs: list[Told] = []
    with mounted("--engine", "emulator") as mount:
        for _ in range(ROUNDS):
            ours.append(on_vmfs(mount, guest))
            if peer:
                theirs.append(on_tcg(guest))
    rows = (("by the clock", lambda told: told.clock, 1.0), ("by processor time", lambda told: told.processor, 2.0))
    return [
        Result(
            f"two busy CPUs, {name}", "times one", by * _best(ours, times), f"{peer}, thread=multi",
            by * _best(theirs, times) if theirs else None, ">= 1.8",
        )
        for name, times, by in rows
    ]  # fmt: skip
