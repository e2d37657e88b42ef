"""What snapshots and forks of a machine cost, of whose 512 MiB 80 have been touched: time, and memory of their own."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.guests import CMDLINE, qemu_version
from bench.harness import Result, mounted, one_core
from bench.house import private_memory, server_of
from bench.runs import AT, write
from vmfs.engine import by_name
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import UNBOUND, Bound
from vmfs.words.registers import write_registers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD, FOLDER  # noqa: E402

# mov cx, 10; mov bx, 0x2000; again: mov [bx], ax; add bx, 0x1000; loop again; hlt
TEN_PAGES = bytes.fromhex("b90a00 bb0020 8907 81c30010 e2f8 f4")
CROWD = 12  # forks of a Debian
SIZE, TOUCHED = 512 << 20, range(20, 100)  # MiB
ROUNDS, MADE = 20, 1000
PAUSE_SECONDS = 0.2  # between forks that are run: as a user makes them, and not a loop


def machine(mount: Path) -> Path:
    vm = mount / "parent"
    vm.mkdir()
    write(f"{vm}/mem_size", b"%d" % SIZE)
    write(f"{vm}/mode", b"real")
    fd = os.open(vm / "mem", os.O_WRONLY)
    os.pwrite(fd, TEN_PAGES, AT)
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


def restores(vm: Path) -> float:
    """Microseconds of a write to `restore` after the guest has written ten pages: the median."""
    times = []
    for _ in range(5 * ROUNDS):
        assert (vm / "vm_run").read_text().startswith("hlt ")
        fd = os.open(vm / "restore", os.O_WRONLY)
        times.append(timed(lambda to=fd: os.write(to, b"ready\n")) * 1e3)
        os.close(fd)
    return statistics.median(times)


def restores_in_process(engine: str, kind: str) -> float:
    """Microseconds, of a machine of 64 MiB whose guest has written ten pages: the median."""
    vm = Vm(by_name(engine), memory_size=64 << 20)
    try:
        if kind != "bare":
            vm.set_machine(kind)
        vm.set_mode("real")
        vm.memory.write(AT, TEN_PAGES)
        vm.change(lambda cpu: write_registers(cpu, {"rip": AT}))
        vm.past.take("ready")
        times = []
        for _ in range(20 * ROUNDS):
            vm.start(Bound(instructions=60) if engine == "emulator" else UNBOUND).result()
            times.append(timed(lambda: vm.past.restore_now("ready", 4096)) * 1e3)
        return statistics.median(times)
    finally:
        vm.close()


def debian(mount: Path) -> Path:
    """One of 512 MiB that has booted, and goes on with work."""
    vm = mount / "debian"
    vm.mkdir()
    for name, text in (("mem_size", "512M"), ("machine", "pc"), ("cmdline", CMDLINE)):
        (vm / name).write_text(text)
    (vm / "kernel").write_bytes(CLOUD.image.read_bytes())
    (vm / "initrd").write_bytes(build("echo mark end\nwhile :; do x=$(cat /proc/uptime); done\n"))
    (vm / "state").write_text("run")
    while "mark end" not in (vm / "console.log").read_text():
        time.sleep(0.1)
    return vm


def of_debian() -> list[Result]:
    with mounted("--engine", "emulator") as mount:
        vm = debian(mount)
        first = timed((vm / "snap" / "s0").mkdir)
        later = []
        for number in range(1, ROUNDS):
            time.sleep(0.05)  # in which it writes
            later.append(timed((vm / "snap" / f"s{number}").mkdir))
        infos = [(vm / "snap" / f"s{number}" / "info").read_text() for number in range(ROUNDS)]
        still = [int(dict(line.split(" ", 1) for line in one.splitlines())["standstill_us"]) / 1e3 for one in infos]
        restored = []
        for number in range(ROUNDS):
            (vm / "state").write_text("pause")
            restored.append(timed(lambda to=number: write(f"{vm}/restore", b"s%d\n" % to)))
            (vm / "state").write_text("run")
            time.sleep(0.05)
        own, births = [], []
        for number in range(CROWD):
            time.sleep(PAUSE_SECONDS / 4)
            births.append(timed(lambda name=f"d{number}": fork_to_exit(vm, name)))
        for number in range(2, CROWD):
            facts = dict(line.split(" ", 1) for line in (mount / f"d{number}" / "stat").read_text().splitlines())
            own.append(private_memory(int(facts["pid"])))
    theirs = by_qemu() if shutil.which("qemu-system-x86_64") else None
    peer = qemu_version() if theirs else ""
    saved, loaded = theirs or (None, None)
    return [
        Result("a Debian of 512 MiB at work: standstill, median", "ms", statistics.median(still), "", None, "<= 2"),
        Result("... the longest", "ms", max(still), "", None, "<= 2"),
        Result("... mkdir, the first", "ms", first, f"{peer}, savevm", saved),
        Result("... mkdir, a later one", "ms", statistics.median(later), f"{peer}, savevm", saved),
        Result("... restore", "ms", statistics.median(restored), f"{peer}, loadvm", loaded),
        Result("... fork to an exit after 1,000 instructions", "ms", statistics.median(births), ""),
        Result("... a fork's own memory, once it has run", "KiB", statistics.median(own), "", None, "<= 1536"),
    ]


def fork_to_exit(vm: Path, name: str) -> None:
    write(f"{vm}/fork", f"{name} from s0\n".encode())
    write(f"{vm.parent / name}/vm_run", b"insns 1000\n")


def by_qemu() -> tuple[float, float] | None:
    """Milliseconds of savevm and loadvm, with the same guest, and a qcow2 that they go to. None where it comes to no
    mark: on a busy host its timers may not work."""
    with tempfile.TemporaryDirectory() as folder:
        disk, initrd, line = (Path(folder) / name for name in ("disk", "initrd", "monitor"))
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "4G"], check=True)
        initrd.write_bytes(build("echo mark end\nwhile :; do x=$(cat /proc/uptime); done\n"))
        command = [
            *"qemu-system-x86_64 -accel tcg -nodefaults -display none -no-reboot -serial stdio -m 512".split(),
            *("-kernel", str(CLOUD.image), "-initrd", str(initrd), "-append", CMDLINE),
            *("-drive", f"file={disk},if=none,id=d,format=qcow2", "-monitor", f"unix:{line},server=on,wait=off"),
        ]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as process:
            try:
                assert process.stdout
                said = b""
                while b"mark end" not in said:
                    said += os.read(process.stdout.fileno(), 4096) or b"mark end"
                with socket.socket(socket.AF_UNIX) as monitor:
                    monitor.connect(os.fspath(line))

                    def say(what: str) -> float:
                        def done() -> None:
                            monitor.sendall(f"{what}\n".encode())
                            heard = b""
                            while not heard.rstrip().endswith(b"(qemu)"):
                                heard += monitor.recv(4096)

                        return timed(done)

                    monitor.recv(4096)
                    saves = [say(f"savevm s{number}") for number in range(5)]
                    return min(saves), min(say(f"loadvm s{number}") for number in range(5))
            except (RuntimeError, KeyError, OSError):
                return None
            finally:
                process.kill()


def results() -> list[Result]:
    found = in_small()
    for engine in ("emulator", "kvm"):
        if not by_name(engine).probe().available:
            continue
        for kind in ("bare", "pc") if engine == "emulator" else ("bare",):
            name = f"restore of 10 pages in the process, {engine}, {kind}"
            with one_core():
                found.append(Result(name, "us", restores_in_process(engine, kind), "", None, "<= 50"))
    if not (FOLDER / "stamp").exists():
        print("bench past: scripts/fetch_kernels.sh has not fetched the kernels", file=sys.stderr)
        return found
    return found + of_debian()


def in_small() -> list[Result]:
    with one_core(), mounted("--engine", "emulator") as mount:
        vm = machine(mount)
        first = timed((vm / "snap" / "ready").mkdir)
        later = statistics.median([timed((vm / "snap" / f"later{number}").mkdir) for number in range(ROUNDS)])

        def fork(name: str) -> None:
            write(f"{vm}/fork", f"{name} from ready\n".encode())

        def fork_and_run(name: str) -> None:
            fork(name)
            assert (mount / name / "vm_run").read_text().startswith("hlt ")

        restored = restores(vm)
        runs = []
        for number in range(ROUNDS):
            time.sleep(PAUSE_SECONDS)
            runs.append(timed(lambda name=f"run{number}": fork_and_run(name)))
        facts = dict(line.split(" ", 1) for line in (mount / f"run{ROUNDS - 1}" / "stat").read_text().splitlines())
        own = private_memory(int(facts["pid"]))
        server = server_of(mount)
        before = private_memory(server)
        made = statistics.median([timed(lambda name=f"made{number}": fork(name)) for number in range(MADE)])
        each = (private_memory(server) - before) / MADE
    return [
        Result("snapshot: mkdir, the first, 80 MiB of 512 touched", "ms", first, "-"),
        Result("snapshot: mkdir, a later one", "ms", later, "-"),
        Result("restore of 10 pages, through the mount", "us", restored, "-", mark="<= 200"),
        Result("fork: made", "ms", made, "-"),
        Result("fork: to its first exit, median", "ms", statistics.median(runs), "-", mark="<= 3"),
        Result("fork: to its first exit, best", "ms", min(runs), "-", mark="<= 3"),
        Result("1,000 forks that were made: memory of the server, each", "KiB", each, "-", mark="<= 1536"),
        Result("a fork that has run: memory of its own", "KiB", own, "-", mark="<= 1536"),
    ]
