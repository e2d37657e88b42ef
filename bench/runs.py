"""The cost of a run: mkdir to the first exit, and port exits against raw KVM ioctls."""

from __future__ import annotations

import fcntl
import os
import statistics
import time
from pathlib import Path

from bench.harness import Result, mounted
from vmfs.engine import by_name
from vmfs.engine.kvm import abi
from vmfs.memory import Memory
from vmfs.modes import set_mode

# again: out 0x80, al; jmp again
OUT_LOOP = b"\xe6\x80\xeb\xfc"
AT = 0x1000


def first_exit(mount: Path, number: int) -> float:
    """Milliseconds from before mkdir until `vm_run` has returned the line of a hlt."""
    vm = mount / f"first{number}"
    began = time.perf_counter()
    vm.mkdir()
    (vm / "mode").write_text("real")
    with open(vm / "mem", "r+b", buffering=0) as mem:
        mem.seek(AT)
        mem.write(b"\xf4")
    (vm / "reg" / "rip").write_text(hex(AT))
    line = (vm / "vm_run").read_text()
    took = (time.perf_counter() - began) * 1e3
    assert line.startswith("hlt "), line
    vm.rmdir()
    return took


def mount_exits(mount: Path, exits: int = 2000) -> float:
    """Microseconds an exit of a loop of `out`, each exit a read of `vm_run` through the mount."""
    vm = mount / "loop"
    vm.mkdir()
    (vm / "mode").write_text("real")
    with open(vm / "mem", "r+b", buffering=0) as mem:
        mem.seek(AT)
        mem.write(OUT_LOOP)
    (vm / "reg" / "rip").write_text(hex(AT))
    fd = os.open(vm / "vm_run", os.O_RDONLY)
    began = time.perf_counter()
    for _ in range(exits):
        line = os.pread(fd, 4096, 0)
    took = (time.perf_counter() - began) * 1e6 / exits
    assert line.startswith(b"io direction=out port=0x80 "), line
    os.close(fd)
    vm.rmdir()
    return took


def engine_exits(name: str, rounds: int = 15, exits: int = 2000) -> tuple[float, float]:
    """Microseconds an `out` exit: by `Vcpu.run`, and by ioctl(KVM_RUN) alone on the same CPU, in turn."""
    memory = Memory(16 << 20)
    machine = by_name(name).create_machine()
    machine.map_memory(0, 0, memory.fd, 0, memory.size)
    cpu = machine.create_vcpu(0)
    set_mode(cpu, memory, memory.size, "long")
    memory.write(AT, OUT_LOOP)
    regs = bytearray(cpu.get_state("regs"))
    regs[128:136] = AT.to_bytes(8, "little")
    cpu.set_state("regs", bytes(regs))

    ours, raw = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(exits):
            cpu.run()
        ours.append((time.perf_counter() - began) * 1e6 / exits)
        if name == "kvm":
            fd = cpu._fd
            began = time.perf_counter()
            for _ in range(exits):
                fcntl.ioctl(fd, int(abi.Ioctl.KVM_RUN), 0)
            raw.append((time.perf_counter() - began) * 1e6 / exits)
    machine.close()
    memory.close()
    return statistics.median(ours), statistics.median(raw) if raw else 0.0


def results() -> list[Result]:
    found = []
    with mounted("--engine", "kvm") as mount:
        first_exit(mount, 0)
        times = [first_exit(mount, number) for number in range(1, 16)]
        found.append(Result("mkdir to the first exit", "ms", statistics.median(times), "", mark="<= 5 ms"))
        found.append(Result("exit by vm_run, through the mount", "us", mount_exits(mount), ""))
    ours, raw = engine_exits("kvm")
    found.append(Result("port exit in the server", "us", ours, "raw ioctl(KVM_RUN)", raw, "<= +5 us"))
    return found
