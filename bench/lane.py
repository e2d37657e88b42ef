"""What the lane gives: exits and interrupts against a bare C file, two guests against one, an idle machine
beside busy ones."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from bench.harness import Result, bare_c_file, mounted, one_core, pairs
from bench.runs import AT, OUT_LOOP, write

FOREVER = b"\xeb\xfe"
BUSY = 50
# sti; again: hlt; jmp again; and where vector 0x20 leads to: iret
WAIT_LOOP, HANDLER, HANDLER_AT = b"\xfb\xf4\xeb\xfd", b"\xcf", 0x2000


def machine(mount: Path, name: str, code: bytes) -> Path:
    """One in real mode, with code at its rip."""
    vm = mount / name
    vm.mkdir()
    (vm / "mode").write_text("real")
    write(f"{vm}/mem", code, AT)
    (vm / "registers").write_text(f"rip {AT}\nrsp 0x8000\n")
    return vm


def port_bound(mount: Path, name: str) -> Path:
    vm = machine(mount, name, OUT_LOOP)
    (vm / "vm_run").read_text()
    return vm


def exits(engine: str) -> Result:
    """An exit of a loop of `out`, each a read of `vm_run.bin`."""
    with one_core(), mounted("--engine", engine) as mount, bare_c_file() as least:
        vm = port_bound(mount, "one")
        ours, bare = pairs("pread", 64, 2000, vm / "vm_run.bin", least)
        vm.rmdir()
    mark = "<= 4" if engine == "emulator" else ""
    return Result(f"{engine}: exit by vm_run.bin", "ns", ours, "pread of a bare C file", bare, mark)


def interrupts() -> Result:
    """A packet to `irq`, of a guest that waits for it."""
    with one_core(), mounted("--engine", "emulator") as mount, bare_c_file() as least:
        vm = machine(mount, "one", WAIT_LOOP)
        write(f"{vm}/mem", HANDLER_AT.to_bytes(4, "little"), 0x20 * 4)
        write(f"{vm}/mem", HANDLER, HANDLER_AT)
        (vm / "vm_run").read_text()
        ours, bare = pairs("irq", 64, 2000, vm, least)
        vm.rmdir()
    return Result("emulator: a packet to irq", "ns", ours, "pread of a bare C file", bare)


def two_guests(engine: str) -> Result:
    """Exits a second of two port-bound guests at once, each one's caller on a core of its own, against one alone."""
    with mounted("--engine", engine) as mount:
        vms = [port_bound(mount, name) for name in ("one", "two")]
        alone, both = pairs("both", 64, 5000, *(vm / "vm_run.bin" for vm in vms))
        for vm in vms:
            vm.rmdir()
    return Result(f"{engine}: two port-bound guests", "exits/s", 1e9 / both, "one alone", 1e9 / alone, ">= 1.8")


def beside_busy(reads: int = 1000) -> Result:
    """Milliseconds that 99 of 100 `cat regs` of an idle machine take at most, beside busy ones."""
    times = []
    with mounted("--engine", "emulator") as mount:
        vms = [machine(mount, f"busy{number}", FOREVER) for number in range(BUSY)]
        idle = port_bound(mount, "idle")
        for vm in vms:
            (vm / "state").write_text("run")
        for _ in range(reads):
            began = time.perf_counter()
            (idle / "regs").read_bytes()
            times.append((time.perf_counter() - began) * 1e3)
        for vm in vms:
            (vm / "state").write_text("pause")
        for vm in (*vms, idle):
            vm.rmdir()
    p99 = statistics.quantiles(times, n=100)[98]
    return Result(f"cat regs of an idle machine beside {BUSY} busy ones, p99", "ms", p99, "", mark="<= 20 ms")


def results() -> list[Result]:
    return [exits("emulator"), exits("kvm"), interrupts(), two_guests("emulator"), two_guests("kvm"), beside_busy()]
