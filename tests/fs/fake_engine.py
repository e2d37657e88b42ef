"""An engine without a CPU, for tests of what is above engines. It keeps the contract of engine.base, and a
run ends with what a test has put into `script`, or goes on until it is kicked.

An item of the script is an Exit, or a function that gets the Vcpu, may `store` to RAM, and returns one.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable

from vmfs.engine.base import INTERRUPT_QUEUE, NO_DEBUG, Availability, Capability, DebugRequest, Engine, Machine, Vcpu
from vmfs.engine.rest import TURN, TURNS, Chips, Flag, Progress, Reading, Time
from vmfs.words import exits
from vmfs.words.errors import Invalid, Unsupported, WouldBlock
from vmfs.words.stops import Breakpoint

RIP = 128  # in struct kvm_regs
MSRS = {0x10: 0, 0x174: 0, 0xC0000080: 0}
NO_CONTROLLER = "the machine has no interrupt controller"


def _msrs(values: dict[int, int]) -> bytes:
    entries = b"".join(struct.pack("<IIQ", index, 0, value) for index, value in values.items())
    return struct.pack("<II", len(values), 0) + entries


class FakeEngine(Engine):
    name = "fake"

    def __init__(self) -> None:
        self.machines: list[FakeMachine] = []

    def probe(self) -> Availability:
        return Availability(True, 'it is "fake"')

    def create_machine(self) -> FakeMachine:
        self.machines.append(FakeMachine())
        return self.machines[-1]

    @property
    def cpu(self) -> FakeVcpu:
        """Of the newest machine."""
        return self.machines[-1].cpus[0]


class FakeMachine(Machine):
    capabilities = frozenset({Capability.GUEST_DEBUG})

    def __init__(self) -> None:
        self.cpus: dict[int, FakeVcpu] = {}
        self.memory: memoryview | None = None
        self.dirty: set[int] = set()
        self.clock = bytes(range(48))
        self.closed = 0
        self.kept = {"time": Time(0, 0).pack(), "chips": Chips().pack(), "turns": TURNS.pack(0, TURN, 0, 0)}
        self.lines: list[tuple[int, bool]] | None = None  # set by interrupts, where there is a controller

    def map_memory(self, slot, guest_address, memory, offset, size, *, read_only=False):
        self.memory = memory.view[offset : offset + size] if size else None

    def create_vcpu(self, index: int) -> FakeVcpu:
        self.cpus[index] = FakeVcpu(self, index)
        return self.cpus[index]

    def create_irqchip(self):
        raise Unsupported("the fake engine has no interrupt controllers")

    def irq_line(self, gsi, level):
        if self.lines is None:
            raise Unsupported(f"an interrupt line: {NO_CONTROLLER}")
        self.lines.append((gsi, level))

    def signal_msi(self, address, data):
        raise Unsupported(f"a message: {NO_CONTROLLER}")

    def store(self, address: int, data: bytes) -> None:
        """As the guest does it."""
        assert self.memory is not None
        self.memory[address : address + len(data)] = data
        self.dirty.update(range(address // 4096, (address + len(data) - 1) // 4096 + 1))

    def dirty_log(self, slot: int) -> bytes:
        assert self.memory is not None
        log = bytearray((len(self.memory) // 4096 + 7) // 8)
        for page in self.dirty:
            log[page // 8] |= 1 << page % 8
        self.dirty.clear()
        return bytes(log)

    def get_state(self, name: str) -> bytes:
        if name in self.kept:
            return self.kept[name]
        if name != "clock":
            raise Unsupported(f"{name}: {NO_CONTROLLER}")
        return self.clock

    def set_state(self, name: str, data: bytes) -> None:
        if len(data) != len(self.get_state(name)):
            raise Invalid(f"{name} has {len(self.clock)} bytes")
        if name in self.kept:
            self.kept[name] = data
        else:
            self.clock = data

    def close(self) -> None:
        self.closed += 1
        if self.memory is not None:
            self.memory.release()
            self.memory = None


class FakeVcpu(Vcpu):
    def __init__(self, machine: FakeMachine, index: int) -> None:
        self.machine = machine
        self.index = index
        self.script: deque[exits.Exit | Callable[[FakeVcpu], exits.Exit]] = deque()
        self.running = threading.Event()  # a run without a script has begun
        self.states = {
            "regs": bytes(RIP) + struct.pack("<QQ", 0xFFF0, 2),
            "sregs": bytes(312),
            "fpu": bytes(416),
            "xsave": bytes(4096),
            "xcrs": struct.pack("<IIIIQ", 1, 0, 0, 0, 1) + bytes(368),
            "debugregs": bytes(128),
            "events": bytes(64),
            "mp_state": bytes(4),
            "cpuid": struct.pack("<II", 1, 0) + bytes(40),
        }
        self.msrs = dict(MSRS)
        self.reads = 0  # of any state
        self.interrupts: list[int] = []
        self.nmis = 0
        self.debug = NO_DEBUG
        self._data = b""
        self._readable = False
        self._kick = threading.Event()

    def play(self, items: Iterable[exits.Exit | Callable[[FakeVcpu], exits.Exit]]) -> None:
        self.script.extend(items)

    @property
    def rip(self) -> int:
        return struct.unpack_from("<Q", self.states["regs"], RIP)[0]

    def run(self, budget: int | None = None, *, goes_on: bool = False) -> exits.Exit:
        self._data, self._readable = b"", False
        if self._kick.is_set():
            self._kick.clear()
            return exits.Interrupted(rip=self.rip)
        if self.debug.step:
            rip = self.rip + 1
            self.states["regs"] = self.states["regs"][:RIP] + struct.pack("<QQ", rip, 2)
            return exits.Debug(cause="step", rip=rip)
        if not self.script:
            self.running.set()
            self._kick.wait()
            self._kick.clear()
            self.running.clear()
            return exits.Interrupted(rip=self.rip)
        item = self.script.popleft()
        exit_ = item if isinstance(item, exits.Exit) else item(self)
        if isinstance(exit_, (exits.Io, exits.Mmio)):
            self._readable = exit_.direction in ("in", "read")
            size = exit_.size * getattr(exit_, "count", 1)
            self._data = b"\xff" * size if self._readable else exit_.data
        return exit_

    def kick(self) -> None:
        self._kick.set()

    def clear_kick(self) -> None:
        self._kick.clear()

    def complete(self) -> None:
        self._data, self._readable = b"", False

    @property
    def access_data(self) -> bytes:
        return self._data

    @access_data.setter
    def access_data(self, data: bytes) -> None:
        if not self._readable or len(data) != len(self._data):
            raise Invalid("no access waits for so many bytes")
        self._data = data

    def get_state(self, name: str) -> bytes:
        self.reads += 1
        if name == "lapic":
            raise Unsupported(f"lapic: {NO_CONTROLLER}")
        if name == "progress":
            return Progress(vectors=self.queued_vectors, **self._asked()).pack()
        return _msrs(self.msrs) if name == "msrs" else self.states[name]

    def set_state(self, name: str, data: bytes) -> None:
        if name == "lapic":
            raise Unsupported(f"lapic: {NO_CONTROLLER}")
        if name == "progress":
            self._set_progress(Progress.unpack(data))
            return
        if name == "msrs":
            for index, _, value in struct.iter_unpack("<IIQ", data[8:]):
                self.set_msr(index, value)
            return
        if name != "cpuid" and len(data) != len(self.states[name]):
            raise Invalid(f"{name} has {len(self.states[name])} bytes, not {len(data)}")
        self.states[name] = data

    def _asked(self):
        if not self._readable:
            return {}
        return {"reading": Reading.MEMORY, "element": len(self._data), "data": self._data, "flags": Flag.RESTART}

    def _set_progress(self, progress: Progress) -> None:
        self.interrupts = list(progress.vectors)
        self._readable, self._data = progress.reading is not Reading.NONE, progress.data

    def get_msr(self, index: int) -> int:
        if index not in self.msrs:
            raise Invalid(f"there is no MSR {index:#x}")
        return self.msrs[index]

    def set_msr(self, index: int, value: int) -> None:
        self.get_msr(index)
        self.msrs[index] = value

    def interrupt(self, vector: int) -> None:
        if len(self.interrupts) >= INTERRUPT_QUEUE:
            raise WouldBlock(f"{INTERRUPT_QUEUE} interrupts wait already")
        self.interrupts.append(vector)

    @property
    def queued_vectors(self) -> tuple[int, ...]:
        return tuple(self.interrupts)

    @property
    def exits_waiting(self) -> bool:
        return False

    def nmi(self) -> None:
        self.nmis += 1

    def set_debug(self, request: DebugRequest) -> None:
        if len(request.of(Breakpoint)) > 4:
            raise Unsupported("there are 4 hardware breakpoints")
        self.debug = request

    def translate(self, linear: int) -> int | None:
        return linear

    def counters(self) -> dict[str, int]:
        return {"reads": self.reads}

    def close(self) -> None:
        pass
