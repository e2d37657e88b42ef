"""Debugging through the mount: steps a second, and traced instructions and accesses a second, all read by another
process, against Unicorn with hooks in Python, which is where such scripts run.

Both execute the kernels of bench/guest. Ours is timed from before the run until the reader has the last record.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import time
from pathlib import Path

from bench.cpu import ENTER64, IMAGE_AT, KERNELS, RAM, STACK, build
from bench.harness import Result, mounted

ROUNDS = 3
SINGLE_STEPS = 2000
STEPS = {"emulator": 20_000_000, "kvm": 20_000}
NAMES = ("alu", "sort", "calls", "bytecode")
_INSTRUCTIONS = 12_000_000  # of ours; hooks get a fraction of them
_HOOKED = 400_000


def _machine(mount: Path, engine: str, image: bytes, number: int, times: int) -> Path:
    vm = mount / "debug"
    vm.mkdir()
    (vm / "engine").write_text(engine)
    (vm / "mem_size").write_text(str(RAM))
    (vm / "mode").write_text("long")
    with open(vm / "mem", "r+b", buffering=0) as mem:
        mem.seek(IMAGE_AT)
        mem.write(image)
    (vm / "registers").write_text(f"rip {ENTER64:#x}\nrsp {STACK:#x}\nrdi {number}\nrsi {times}\n")
    return vm


def _steps(mount: Path, engine: str, image: bytes) -> float:
    """Instructions a second by `step N`."""
    vm = _machine(mount, engine, image, 1, 1 << 30)
    speeds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        (vm / "vm_run").write_text(f"step {STEPS[engine]}")
        speeds.append(STEPS[engine] / (time.perf_counter() - began))
    vm.rmdir()
    return statistics.median(speeds)


def _single_steps(mount: Path, engine: str, image: bytes) -> float:
    """`step`s a second, each one write."""
    vm = _machine(mount, engine, image, 1, 1 << 30)
    with open(vm / "vm_run", "wb", buffering=0) as run:
        began = time.perf_counter()
        for _ in range(SINGLE_STEPS):
            run.write(b"step")
        took = time.perf_counter() - began
    vm.rmdir()
    return SINGLE_STEPS / took


def _traced(mount: Path, image: bytes, number: int, switch: str, file: str, bound: int) -> tuple[int, float]:
    """How many events, and the seconds until a `cat` of the file has them all."""
    vm = _machine(mount, "emulator", image, number, 1 << 30)
    (vm / "trace").write_text(f"{switch} on")
    with open("/dev/null", "wb") as null:
        reader = subprocess.Popen(["cat", vm / file], stdout=null)
        began = time.perf_counter()
        (vm / "vm_run").write_text(f"insns {bound}")
        (vm / "trace").write_text("off")
        reader.wait()
        took = time.perf_counter() - began
    stat = dict(line.split(maxsplit=1) for line in (vm / "stat").read_text().splitlines())
    assert reader.returncode == 0 and stat["trace_dropped"] == "0"
    events = int(stat["trace_events"])
    vm.rmdir()
    return events, took


def _unicorn(image: bytes, number: int, memory: bool) -> float:
    """Hook calls a second, of a hook that keeps what it is told."""
    import unicorn
    from unicorn import x86_const as x86

    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0, RAM)
    uc.mem_write(IMAGE_AT, image)
    for register, value in (
        (x86.UC_X86_REG_RSP, STACK),
        (x86.UC_X86_REG_RDI, number),
        (x86.UC_X86_REG_RSI, 1 << 30),
    ):
        uc.reg_write(register, value)
    seen: list[tuple[int, int]] = []

    def on_code(uc: object, address: int, size: int, data: object) -> None:
        seen.append((address, size))

    def on_memory(uc: object, access: int, address: int, size: int, value: int, data: object) -> None:
        seen.append((address, value))

    if memory:
        uc.hook_add(unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE, on_memory)
    else:
        uc.hook_add(unicorn.UC_HOOK_CODE, on_code)
    uc.emu_start(ENTER64, 0, count=10_000)  # what is translated once
    seen.clear()
    began = time.perf_counter()
    uc.emu_start(uc.reg_read(x86.UC_X86_REG_RIP), 0, count=_HOOKED)
    return len(seen) / (time.perf_counter() - began)


def _against_unicorn(mount: Path, image: bytes, memory: bool, file: str, events: int) -> tuple[float, float | None]:
    """Geometric means over the kernels, in millions a second: ours and Unicorn's."""
    ours, peers = [], []
    has_peer = importlib.util.find_spec("unicorn") is not None
    for number, kernel in enumerate(KERNELS):
        if kernel.name not in NAMES or (memory and kernel.name == "alu"):  # alu accesses next to nothing
            continue
        rounds = []
        for _ in range(ROUNDS):
            count, took = _traced(mount, image, number, "mem" if memory else "insn", file, events)
            rounds.append((count / took, _unicorn(image, number, memory) if has_peer else 0.0))
        ours.append(statistics.median(one for one, _ in rounds))
        peers.append(statistics.median(one for _, one in rounds))
    mean = statistics.geometric_mean(ours) / 1e6
    return mean, statistics.geometric_mean(peers) / 1e6 if has_peer else None


def results() -> list[Result]:
    image = build()
    found = []
    with mounted() as mount:
        for engine in ("emulator", "kvm"):
            if f"{engine} available=yes" not in (mount / "engines").read_text():
                continue
            speed = _steps(mount, engine, image)
            found.append(Result(f"debug: instructions by step N, {engine}", "M/s", speed / 1e6, ""))
            speed = _single_steps(mount, engine, image)
            found.append(Result(f"debug: writes of step, {engine}", "/s", speed, ""))
        for name, memory, file, events, mark in (
            ("instructions, trace.bin", False, "trace.bin", _INSTRUCTIONS, ">= 10"),
            ("instructions, trace", False, "trace", _INSTRUCTIONS // 4, ""),
            ("accesses, trace.bin", True, "trace.bin", _INSTRUCTIONS // 2, ""),
        ):
            ours, peer = _against_unicorn(mount, image, memory, file, events)
            peer_name = "Unicorn, Python hook" if peer is not None else ""
            found.append(Result(f"debug: traced {name}", "M/s", ours, peer_name, peer, mark))
    return found
