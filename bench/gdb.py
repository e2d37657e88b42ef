"""What gdb gets of a machine: `stepi` a second, over a socket and over the pipe, against QEMU's stub where there is a
QEMU; instructions a second of a `next` that goes through a loop; and how often a second a condition is looked at, gdb's
and the machine's own.
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
from collections.abc import Iterator
from pathlib import Path

from bench.harness import Result, mounted

STEPS = 300
SESSIONS = 15  # with each stub
ROUNDS = 3
RANGE = {"emulator": 100_000, "kvm": 2_000}  # rounds of the loop
CONDITIONS = 300
CODE_AT = 0x1000
# xor eax, eax; inc rax; cmp rax, r8; jne -8; nop; jmp to the begin
CODE = bytes.fromhex("31c0" "48ffc0" "4c39c0" "75f8" "90" "ebf3")
LOOP, AFTER = CODE_AT + 2, CODE_AT + 10

SCRIPT = """
set pagination off
set confirm off
set width 0
target remote {target}
python
import time
def timed(what, count, command):
    began = time.perf_counter()
    gdb.execute(command, to_string=True)
    print("timed", what, count / (time.perf_counter() - began))
timed("stepi", {steps}, "stepi {steps}")
{more}
end
detach
"""
MORE = """
gdb.execute("set var $rip = {code}")
gdb.execute("set var $r8 = {conditions}")
gdb.execute("break *{after_loop} if $rax == {conditions} - 1", to_string=True)
timed("condition", {conditions} - 1, "continue")
"""


def _machine(mount: Path, engine: str, rounds: int) -> Path:
    vm = mount / "gdb"
    vm.mkdir()
    (vm / "engine").write_text(engine)
    (vm / "mem_size").write_text("16M")
    (vm / "mode").write_text("long")
    with open(vm / "mem", "r+b", buffering=0) as mem:
        mem.seek(CODE_AT)
        mem.write(CODE)
    (vm / "registers").write_text(f"rip {CODE_AT}\nr8 {rounds}\n")
    return vm


def _gdb(target: str, more: str = "") -> dict[str, float]:
    """What one session has timed, a second."""
    with tempfile.NamedTemporaryFile("w", suffix=".gdb") as script:
        script.write(SCRIPT.format(target=target, steps=STEPS, more=more))
        script.flush()
        done = subprocess.run(
            ["gdb", "-nx", "-q", "-batch", "-x", script.name], capture_output=True, text=True, check=True
        )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("timed ")]
    return {what: float(speed) for _, what, speed in lines}


def _bests(targets: dict[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Of rounds in which each is timed once. The best, since three programs take turns in each step, and what else
    the host does comes between them, each time: it only makes them slower, and the median is that of its load."""
    rounds = [{name: _gdb(*target) for name, target in targets.items()} for _ in range(SESSIONS)]
    return {name: {what: max(one[name][what] for one in rounds) for what in rounds[0][name]} for name in targets}


def _exchange(stream: int, payload: bytes) -> bytes:
    os.pwrite(stream, b"$%b#%02x" % (payload, sum(payload) & 0xFF), 0)
    reply = b""
    while b"#" not in reply[:-2]:
        reply += os.pread(stream, 65536, 0)
    os.pwrite(stream, b"+", 0)
    return reply


def _range(vm: Path, engine: str) -> float:
    """Instructions a second of a range step: what `next` does with a line that has a loop."""
    stream = os.open(vm / "gdb.stream", os.O_RDWR)
    try:
        _exchange(stream, b"?")
        (vm / "registers").write_text(f"rip {CODE_AT}\nrax 0\nr8 {RANGE[engine]}\n")
        began = time.perf_counter()
        _exchange(stream, b"vCont;r%x,%x:1" % (CODE_AT, AFTER))
        took = time.perf_counter() - began
    finally:
        os.close(stream)
    assert int((vm / "reg/rip").read_text(), 0) == AFTER
    return 3 * RANGE[engine] / took


def _own_condition(vm: Path, rounds: int) -> float:
    """How often a second the machine's own condition is looked at."""
    (vm / "registers").write_text(f"rip {CODE_AT}\nrax 0\nr8 {rounds}\n")
    (vm / "debug").write_text(f"delete all\nbreak {AFTER - 2:#x} if rax=={rounds - 1}\n")
    began = time.perf_counter()
    line = (vm / "vm_run").read_text()
    took = time.perf_counter() - began
    assert "cause=breakpoint" in line, line
    (vm / "debug").write_text("delete all")
    return (rounds - 1) / took


@contextlib.contextmanager
def _qemu(folder: str) -> Iterator[str | None]:
    """The path of a QEMU's stub, at the reset vector; None where there is no QEMU."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        yield None
        return
    path = Path(folder) / "qemu.sock"
    options = ["-S", "-display", "none", "-accel", "tcg", "-gdb", f"unix:{path},server=on,wait=off", "-nic", "none"]
    process = subprocess.Popen([qemu, *options], stdout=subprocess.DEVNULL)
    try:
        while not path.exists() and process.poll() is None:
            time.sleep(0.05)
        yield str(path) if path.exists() else None
    finally:
        process.kill()
        process.wait()


def results() -> list[Result]:
    if shutil.which("gdb") is None:
        return []
    found = []
    with mounted() as mount, tempfile.TemporaryDirectory() as folder:
        with _qemu(folder) as path:
            for engine in ("emulator", "kvm"):
                if f"{engine} available=yes" in (mount / "engines").read_text():
                    found += _results(mount, engine, folder, path)
    return found


def _results(mount: Path, engine: str, folder: str, qemu: str | None) -> Iterator[Result]:
    vm = _machine(mount, engine, 1 << 40)
    (vm / "gdb").write_text(f"{folder}/{engine}.sock")
    more = MORE.format(code=CODE_AT, after_loop=AFTER - 2, conditions=CONDITIONS)
    targets = {"socket": (f"{folder}/{engine}.sock", more), "pipe": (f"| {sys.executable} -m vmfs.cli gdb {vm}", "")}
    if qemu:
        targets["qemu"] = qemu, ""
    timed = _bests(targets)
    name, peer = ("QEMU's stub", timed["qemu"]["stepi"]) if qemu else ("", None)
    yield Result(f"gdb: stepi, socket, {engine}", "/s", timed["socket"]["stepi"], name, peer)
    yield Result(f"gdb: stepi, vmfs gdb, {engine}", "/s", timed["pipe"]["stepi"], name, peer)
    speed = statistics.median(_range(vm, engine) for _ in range(ROUNDS))
    yield Result(f"gdb: instructions of a next, {engine}", "/s", speed, "stepi", timed["socket"]["stepi"])
    own = statistics.median(_own_condition(vm, 20_000 if engine == "emulator" else 500) for _ in range(ROUNDS))
    conditions = timed["socket"]["condition"]
    yield Result(f"gdb: the machine's conditions, {engine}", "/s", own, "gdb's conditions", conditions)
    vm.rmdir()
