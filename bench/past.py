"""What snapshots and forks of a machine cost, of whose 512 MiB 80 have been touched: time, and memory of their own."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from bench.harness import Result, mounted, one_core
from bench.house import private_memory, server_of
from bench.runs import AT, HLT, write

SIZE, TOUCHED = 512 << 20, range(20, 100)  # MiB
ROUNDS, MADE = 20, 1000
PAUSE_SECONDS = 0.2  # between forks that are run: as a user makes them, and not a loop


def machine(mount: Path) -> Path:
    vm = mount / "parent"
    vm.mkdir()
    write(f"{vm}/mem_size", b"%d" % SIZE)
    write(f"{vm}/mode", b"real")
    fd = os.open(vm / "mem", os.O_WRONLY)
    os.pwrite(fd, HLT, AT)
    for at in TOUCHED:
        os.pwrite(fd, os.urandom(1 << 20), at << 20)
    os.close(fd)
    write(f"{vm}/reg/rip", b"%d" % AT)
    return vm


def timed(call: Callable[[], None]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def results() -> list[Result]:
    with one_core(), mounted("--engine", "emulator") as mount:
        vm = machine(mount)
        first = timed((vm / "snap" / "ready").mkdir)
        later = statistics.median([timed((vm / "snap" / f"later{number}").mkdir) for number in range(ROUNDS)])

        def fork(name: str) -> None:
            write(f"{vm}/fork", f"{name} from ready\n".encode())

        def fork_and_run(name: str) -> None:
            fork(name)
            assert (mount / name / "vm_run").read_text().startswith("hlt ")

        runs = []
        for number in range(ROUNDS):
            time.sleep(PAUSE_SECONDS)
            runs.append(timed(lambda name=f"run{number}": fork_and_run(name)))
        facts = dict(line.split(" ", 1) for line in (mount / "run1" / "stat").read_text().splitlines())
        own = private_memory(int(facts["pid"]))
        server = server_of(mount)
        before = private_memory(server)
        made = statistics.median([timed(lambda name=f"made{number}": fork(name)) for number in range(MADE)])
        each = (private_memory(server) - before) / MADE
    return [
        Result("snapshot: mkdir, the first, 80 MiB of 512 touched", "ms", first, "-"),
        Result("snapshot: mkdir, a later one", "ms", later, "-"),
        Result("fork: made", "ms", made, "-"),
        Result("fork: to its first exit, median", "ms", statistics.median(runs), "-", mark="<= 3"),
        Result("fork: to its first exit, best", "ms", min(runs), "-", mark="<= 3"),
        Result("1,000 forks that were made: memory of the server, each", "KiB", each, "-", mark="<= 1536"),
        Result("a fork that has run: memory of its own", "KiB", own, "-", mark="<= 1536"),
    ]
