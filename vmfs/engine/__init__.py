"""The engines, in order of preference, and the choice among them."""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import time
from dataclasses import dataclass

from vmfs.engine.base import Availability, Engine
from vmfs.words.errors import EngineFailed, Invalid, VmfsError
from vmfs.words.exits import Hlt
from vmfs.words.layouts import RBX, RCX, RIP, put_quad
from vmfs.words.modes import set_mode


@dataclass(frozen=True, slots=True)
class Row:
    """An engine by name. Its module is imported on demand, so that one that is not built is a reason."""

    name: str
    module: str
    attribute: str

    def load(self) -> Engine:
        try:
            return getattr(importlib.import_module(self.module), self.attribute)()
        except ImportError as error:
            raise EngineFailed(f"the engine {self.name} is not installed: {error}") from error


ENGINES: tuple[Row, ...] = (
    Row("kvm", "vmfs.engine.kvm.engine", "KvmEngine"),
    Row("emulator", "vmfs.engine.emulator.engine", "EmulatorEngine"),
)

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """A line of the file `engines`: `speed` is in MIPS and None where the engine does not run."""

    name: str
    available: bool
    preferred: bool
    speed: float | None
    reason: str


def by_name(name: str, rows: tuple[Row, ...] = ENGINES) -> Engine:
    """The engine of that name, whether it works here or not. `Invalid` names those there are."""
    for row in rows:
        if row.name == name:
            return row.load()
    raise Invalid(f"there is no engine {name}: {', '.join(row.name for row in rows)}")


def describe(rows: tuple[Row, ...] = ENGINES) -> tuple[EngineInfo, ...]:
    """Every engine, tried and timed, which takes a fraction of a second: keep the answer.

    The fastest that is available is preferred, of equals the first.
    """
    found: list[tuple[str, Availability, float | None]] = []
    for row in rows:
        try:
            engine = row.load()
            availability = engine.probe()
            speed = measure_speed(engine) if availability.available else None
        except VmfsError as error:
            availability, speed = Availability(False, str(error)), None
        found.append((row.name, availability, speed))
    best = max((speed for _, _, speed in found if speed is not None), default=None)
    infos = []
    for name, availability, speed in found:
        preferred = speed is not None and speed == best and not any(info.preferred for info in infos)
        infos.append(EngineInfo(name, availability.available, preferred, speed, availability.reason))
    return tuple(infos)


def choose(name: str, infos: tuple[EngineInfo, ...] | None = None, rows: tuple[Row, ...] = ENGINES) -> Engine:
    """The engine to use: the one of that name, or for "auto" the preferred one of `infos` (of `describe()`).

    A name never falls back on another engine: `EngineFailed` says why it does not work here.
    """
    if name != AUTO:
        engine = by_name(name, rows)
        availability = engine.probe()
        if not availability.available:
            raise EngineFailed(f"the engine {name} does not work here: {availability.reason}")
        return engine
    infos = describe(rows) if infos is None else infos
    for info in infos:
        if info.preferred:
            return by_name(info.name, rows)
    reasons = "; ".join(f"{info.name}: {info.reason}" for info in infos)
    raise EngineFailed(f"no engine works here: {reasons}")


# 64-bit kernel-mode code, five instructions a turn: arithmetic, a store, a load and a branch; then hlt.
#   1: mov [rbx], rax;  add rax, [rbx];  xor rax, rcx;  dec rcx;  jnz 1b;  hlt
_LOOP = bytes.fromhex("488903 480303 4831c8 48ffc9 75f2 f4")
_LOOP_INSTRUCTIONS = 5
_LOOP_MEMORY = 1 << 20
_LOOP_DATA = 0x1000


def measure_speed(engine: Engine, seconds: float = 0.02) -> float:
    """Millions of kernel-mode instructions a second that the engine executes, over at least `seconds`.

    Kernel mode, because KVM may run user mode natively and emulate the kernel (nested, or software-assisted).
    """
    with contextlib.ExitStack() as made:
        fd = os.memfd_create("vmfs-speed", os.MFD_CLOEXEC)
        made.callback(os.close, fd)
        machine = engine.create_machine()
        made.callback(machine.close)
        os.ftruncate(fd, _LOOP_MEMORY)
        machine.map_memory(0, 0, fd, 0, _LOOP_MEMORY)
        vcpu = machine.create_vcpu(0)
        with mmap.mmap(fd, _LOOP_MEMORY) as memory:
            memory[: len(_LOOP)] = _LOOP
            set_mode(vcpu, _Window(memory), _LOOP_MEMORY, "long")
        regs = vcpu.get_state("regs")
        turns = 2_000
        while True:
            _set_quads(regs := bytearray(regs), {RBX: _LOOP_DATA, RCX: turns, RIP: 0})
            vcpu.set_state("regs", bytes(regs))
            start = time.perf_counter()
            exit_ = vcpu.run()
            elapsed = time.perf_counter() - start
            if not isinstance(exit_, Hlt):
                raise EngineFailed(f"{engine.name} did not run a loop to its end: {exit_.line()}")
            if elapsed >= seconds:
                return turns * _LOOP_INSTRUCTIONS / elapsed / 1e6
            turns *= min(16, int(2 * seconds / max(elapsed, 1e-6)) + 1)


class _Window:
    """A mapping with the `write` that `set_mode` wants."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def write(self, offset: int, data: bytes) -> None:
        self._memory[offset : offset + len(data)] = data


def _set_quads(blob: bytearray, values: dict[int, int]) -> None:
    for offset, value in values.items():
        put_quad(blob, offset, value)
