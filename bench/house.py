"""What a machine costs the host: its birth, its memory while it is only made and once it has run, a directory of a
thousand of them, and eight that boot at once.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.boot import CLOUD, FOLDER, build
from bench.guests import CMDLINE, OFF, listen
from bench.harness import Result, mounted, one_core
from bench.runs import AT, HLT, first_exit, raw_first_exit, write

BIRTHS = 30
PAUSE_SECONDS = 0.2  # between births: as a user makes them, and not a loop
MADE = 1000
LISTINGS = 5
CROWD, CORES = 8, 2


def server_of(mount: Path) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                name = (entry / "comm").read_text().strip()
            except OSError:
                continue
            if os.fsencode(mount) in words and b"mount" in words and not name.startswith("vmfs-"):
                return int(entry.name)
    raise RuntimeError(f"there is no server of {mount}")


def private_memory(pid: int) -> int:
    """KiB that no other process has (proc_pid_smaps(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    facts = dict(line.split(":", 1) for line in lines)
    return sum(int(facts[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))


def processes_of(server: int) -> int:
    found, todo = 0, [server]
    while todo:
        pid = todo.pop()
        for task in Path(f"/proc/{pid}/task").iterdir():
            some = (task / "children").read_text().split()
            found += len(some)
            todo += map(int, some)
    return found


def births(engine: str) -> float:
    with one_core(), mounted("--engine", engine) as mount:
        first_exit(mount, 0)
        times = []
        for number in range(1, BIRTHS):
            time.sleep(PAUSE_SECONDS)
            times.append(first_exit(mount, number))
        return statistics.median(times)


def memory_of_one(mount: Path) -> int:
    """KiB of its process only, when it has run a small guest."""
    vm = mount / "small"
    vm.mkdir()
    write(f"{vm}/mode", b"real")
    write(f"{vm}/mem", HLT, AT)
    write(f"{vm}/reg/rip", b"%d" % AT)
    assert (vm / "vm_run").read_text().startswith("hlt ")
    facts = dict(line.split(" ", 1) for line in (vm / "stat").read_text().splitlines())
    size = private_memory(int(facts["pid"]))
    vm.rmdir()
    return size


def thousand(mount: Path) -> tuple[float, float, float, int]:
    """KiB of the server's a machine; milliseconds of the first `ls -l`, and of later ones; processes more."""
    server = server_of(mount)
    before, processes = private_memory(server), processes_of(server)
    for number in range(MADE):
        (mount / f"made{number}").mkdir()
    each = (private_memory(server) - before) / MADE
    times = []
    for _ in range(LISTINGS):
        began = time.perf_counter()
        subprocess.run(["ls", "-l", mount], check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - began) * 1e3)
    more = processes_of(server) - processes
    for number in range(MADE):
        (mount / f"made{number}").rmdir()
    return each, times[0], statistics.median(times[1:]), more


def boots(mount: Path, initrd: bytes, count: int) -> float:
    """Seconds until all of so many that begin at once have come to their mark."""
    machines = [mount / f"boot{number}" for number in range(count)]
    for vm in machines:
        vm.mkdir()
        (vm / "mem_size").write_text("256M")
        (vm / "machine").write_text("pc")
        (vm / "kernel").write_bytes(CLOUD.image.read_bytes())
        (vm / "initrd").write_bytes(initrd)
        (vm / "cmdline").write_text(CMDLINE)
    seconds = [0.0] * count
    began = time.perf_counter()

    def boot(at: int) -> None:
        vm = machines[at]
        with open(vm / "console", "rb", buffering=0) as console:
            run = threading.Thread(target=(vm / "vm_run").read_text)
            run.start()
            late = time.perf_counter() - began
            seconds[at] = late + listen(lambda: console.read(4096) or b"", (), None).clock["end"]
            run.join()

    threads = [threading.Thread(target=boot, args=(at,)) for at in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for vm in machines:
        vm.rmdir()
    return max(seconds)


def results() -> list[Result]:
    found = []
    for engine in ("emulator", "kvm"):
        try:
            ours = births(engine)
        except subprocess.CalledProcessError:  # it is not here
            continue
        raw = statistics.median(raw_first_exit() for _ in range(10)) if engine == "kvm" else None
        name = f"mkdir to the first exit, {engine}, a process made"
        found.append(Result(name, "ms", ours, "raw ioctls" if raw else "", raw, "<= 5 ms"))
    with mounted("--engine", "emulator") as mount:
        first_exit(mount, 0)
        time.sleep(1)
        memory = memory_of_one(mount)
        found.append(Result("memory of a machine's own, once it has run", "MiB", memory / 1024, "", None, "<= 6 MiB"))
        time.sleep(1)  # there is a spare again
        each, first, later, more = thousand(mount)
        found.append(Result("memory of a machine that was only made", "KiB", each, "", None, "<= 64 KiB"))
        found.append(Result("processes of a thousand that were only made", "", more, "", None, "0"))
        found.append(Result("first ls -l of a thousand machines", "ms", first, "", None, "<= 50 ms"))
        found.append(Result("ls -l of a thousand machines, again", "ms", later, "", None, "<= 50 ms"))
        if not (FOLDER / "stamp").exists():
            print("bench house: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
            return found
        initrd = build(f"echo mark end\n{OFF}")
        boots(mount, initrd, 1)
        one = [boots(mount, initrd, 1)]
        eight = boots(mount, initrd, CROWD)
        one.append(boots(mount, initrd, 1))
        ideal = statistics.mean(one) * CROWD / CORES
        peer = f"one boot, {CROWD} / {CORES} times"
        found.append(Result(f"{CROWD} boots at once", "s", eight, peer, ideal, "<= 1.15"))
    return found
