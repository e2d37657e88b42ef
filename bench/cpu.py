"""The CPU's speed: MIPS of the emulator on nine kernels, against QEMU's TCG and Unicorn in the same run.

One image (bench/guest) runs on all three, in 64-bit mode. Its instructions are counted by the emulator, which
counts exactly, and hold for the others. Each kernel is timed with few and with many repetitions, in turn on
each engine, and the difference divided, so that starting QEMU and translating code once cancel out. Timed is the
processor's time: that of other programs on the host is in none of it.
"""

from __future__ import annotations

import importlib.util
import math
import resource
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.harness import HERE, Result
from vmfs.engine import by_name
from vmfs.memory.ram import Memory
from vmfs.words.exits import Hlt
from vmfs.words.modes import set_mode
from vmfs.words.registers import write_registers

GUEST = HERE / "guest"
IMAGE_AT = 0x100000
ENTER64 = IMAGE_AT + 0x40
RAM = 32 << 20
STACK = 0x1000000
ROUNDS = 3
# -O2 as people compile kernels; no vector extensions beyond the SSE2 of every x86-64.
FLAGS = (
    "-O2 -ftree-vectorize -ffreestanding -fno-pic -no-pie -nostdlib -static -mno-red-zone "
    "-fno-stack-protector -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns "
    "-fcf-protection=none -Wl,--build-id=none"
).split()


@dataclass(frozen=True, slots=True)
class Kernel:
    """`few` and `many` repetitions: the difference is some hundred million instructions."""

    name: str
    few: int
    many: int


KERNELS = (
    Kernel("alu", 1, 150),
    Kernel("mem", 1, 60),
    Kernel("sort", 1, 60),
    Kernel("sha256", 10, 500),
    Kernel("crc", 10, 300),
    Kernel("calls", 10, 1500),
    Kernel("bytecode", 10, 2000),
    Kernel("x87", 10, 500),
    Kernel("sse", 10, 2500),
)


def build() -> bytes:
    """The guest as a flat image."""
    with tempfile.TemporaryDirectory() as where:
        linked, flat = Path(where) / "guest.elf", Path(where) / "guest.bin"
        sources = [GUEST / "start.S", GUEST / "kernels.c"]
        subprocess.run(["gcc", *FLAGS, "-T", GUEST / "guest.ld", "-o", linked, *sources], check=True)
        subprocess.run(["objcopy", "-O", "binary", linked, flat], check=True)
        return flat.read_bytes()


class Emulator:
    """The image on an engine of ours."""

    def __init__(self, image: bytes) -> None:
        self._image = image

    def run(self, number: int, times: int) -> tuple[int, int]:
        """The kernel's result, and how many instructions it took."""
        memory = Memory(RAM)
        machine = by_name("emulator").create_machine()
        try:
            machine.map_memory(0, 0, memory.fd, 0, RAM)
            cpu = machine.create_vcpu(0)
            set_mode(cpu, memory, RAM, "long")
            memory.write(IMAGE_AT, self._image)
            write_registers(cpu, {"rip": ENTER64, "rsp": STACK, "rdi": number, "rsi": times})
            exit_ = cpu.run()
            assert isinstance(exit_, Hlt), exit_.line()
            return int.from_bytes(cpu.get_state("regs")[:8], "little"), cpu.counters()["instructions"]
        finally:
            machine.close()
            memory.close()


class Unicorn:
    """The image on Unicorn without hooks."""

    def __init__(self, image: bytes) -> None:
        self._image = image

    def run(self, number: int, times: int) -> int:
        import unicorn
        from unicorn import x86_const as x86

        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.mem_map(0, RAM)
        uc.mem_write(IMAGE_AT, self._image)
        for register, value in (
            (x86.UC_X86_REG_RSP, STACK),
            (x86.UC_X86_REG_RDI, number),
            (x86.UC_X86_REG_RSI, times),
        ):
            uc.reg_write(register, value)
        uc.emu_start(ENTER64, ENTER64 + 5)  # until the hlt after the call
        return uc.reg_read(x86.UC_X86_REG_RAX)


class Qemu:
    """The image on `qemu-system-x86_64 -accel tcg`, one process a run."""

    def __init__(self, image: bytes) -> None:
        self._file = tempfile.NamedTemporaryFile(suffix=".bin")
        self._file.write(image)
        self._file.flush()

    def run(self, number: int, times: int) -> None:
        command = (
            "qemu-system-x86_64 -accel tcg -m 64 -nodefaults -display none -no-reboot "
            "-device isa-debug-exit,iobase=0xf4,iosize=1 -kernel"
        ).split()
        done = subprocess.run([*command, self._file.name, "-append", f"{number} {times}"], timeout=120)
        # isa-debug-exit ends with an odd code, failures with 0 or signals
        assert done.returncode & 1, done.returncode


# Seconds. A QEMU takes some 0.2 to start, give or take 0.03: of 0.1 s that would be a third.
SHORT = 0.5


def _processor_time() -> float:
    """Of this process, and of its children that have ended."""
    both = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in both)


def _timed(run: Callable[[int, int], object], number: int, kernel: Kernel) -> float:
    """Seconds of the repetitions between few and many; where that is too short to be timed, a part of many more."""
    more = 1
    while True:
        began = _processor_time()
        run(number, kernel.few)
        middle = _processor_time()
        run(number, kernel.few + more * (kernel.many - kernel.few))
        seconds = (_processor_time() - middle) - (middle - began)
        if seconds > SHORT or more > 100:
            return seconds / more
        more *= 4


def results() -> list[Result]:
    image = build()
    ours = Emulator(image)
    peers: dict[str, Unicorn | Qemu] = {}
    if shutil.which("qemu-system-x86_64"):
        peers["QEMU TCG"] = Qemu(image)
    if importlib.util.find_spec("unicorn"):
        peers["Unicorn, no hooks"] = Unicorn(image)

    found, speeds = [], []
    for number, kernel in enumerate(KERNELS):
        result, few = ours.run(number, kernel.few)
        _, many = ours.run(number, kernel.many)
        instructions = (many - few) / 1e6
        if "Unicorn, no hooks" in peers:
            assert peers["Unicorn, no hooks"].run(number, kernel.few) == result, kernel.name
        times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        for _ in range(ROUNDS):
            times["ours"].append(_timed(ours.run, number, kernel))
            for name, peer in peers.items():
                times[name].append(_timed(peer.run, number, kernel))
        mips = {name: instructions / statistics.median(seconds) for name, seconds in times.items()}
        speeds.append(mips["ours"])
        for name in peers or [""]:
            found.append(Result(f"emulator: {kernel.name}", "MIPS", mips["ours"], name, mips.get(name), ">= 150 MIPS"))
    mean = math.exp(statistics.mean(map(math.log, speeds)))
    found.append(Result("emulator: geometric mean", "MIPS", mean, "", mark=">= 300 MIPS"))
    return found
