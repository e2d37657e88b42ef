"""A conformance case as data: a program, and in order what is done to it and what has to come of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from engine.asm import assemble
from engine.machine import TestMachine

from vmfs.engine.base import NO_DEBUG, DebugRequest
from vmfs.words.errors import Unsupported
from vmfs.words.stops import Breakpoint, Cr3Stop, ModeStop, PortStop, VectorStop, Watchpoint

_LABEL = re.compile(r"\{(\w+)\}")


class Step:
    """Something to do or to expect; `labels` are the program's."""

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Run(Step):
    """Run to the next exit, whose line this is; `{label}` is the address of a label."""

    line: str
    times: int = 1

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        wanted = _LABEL.sub(lambda match: f"{labels[match[1]]:#x}", self.line)
        for _ in range(self.times):
            exit_ = machine.vcpu.run()
            assert exit_.line() == wanted
            assert exit_.rip == machine.regs()["rip"], "the exit's rip is not the one in regs"


@dataclass(frozen=True)
class GoOn(Step):
    """`Run` as a part of the run before; the other stops that came at once by id."""

    line: str
    also: tuple[int, ...] = ()

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        exit_ = machine.vcpu.run(goes_on=True)
        assert exit_.line() == _LABEL.sub(lambda match: f"{labels[match[1]]:#x}", self.line)
        assert exit_.rip == machine.regs()["rip"], "the exit's rip is not the one in regs"
        assert tuple(stop.id for stop in getattr(exit_, "also", ())) == self.also


@dataclass(frozen=True)
class RunLine(Step):
    """`Run` for an exit that was made before registers were set: its rip is not the one in regs."""

    line: str

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        wanted = _LABEL.sub(lambda match: f"{labels[match[1]]:#x}", self.line)
        assert machine.vcpu.run().line() == wanted


@dataclass(frozen=True)
class Feed(Step):
    """Answer the exits of a string `in` until all data is taken; how much one exit takes is the engine's."""

    port: int
    size: int
    data: bytes
    at: str

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        left = self.data
        while left:
            exit_ = machine.vcpu.run()
            count = len(machine.vcpu.access_data) // self.size
            assert exit_.line() == (
                f"io direction=in port={self.port:#x} size={self.size} count={count} rip={labels[self.at]:#x}"
            )
            assert machine.regs()["rip"] == labels[self.at]
            taken, left = left[: count * self.size], left[count * self.size :]
            machine.vcpu.access_data = taken


@dataclass(frozen=True)
class Complete(Step):
    """Complete the pending access, as what changes a part of a state does."""

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        machine.vcpu.complete()


@dataclass(frozen=True)
class RunError(Step):
    """Run to an `error` exit whose reason has these words, at a label."""

    words: str
    at: str

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        exit_ = machine.vcpu.run()
        assert exit_.REASON == "error", exit_.line()
        assert self.words in exit_.reason
        assert exit_.rip == labels[self.at] == machine.regs()["rip"]


@dataclass(frozen=True)
class Answer(Step):
    """Give the pending read its bytes."""

    data: bytes

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        machine.vcpu.access_data = self.data
        assert machine.vcpu.access_data == self.data


@dataclass(frozen=True)
class Data(Step):
    """The bytes of the last access."""

    data: bytes

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        assert machine.vcpu.access_data == self.data


@dataclass(frozen=True)
class Regs(Step):
    """Expect registers: numbers, or names of labels."""

    values: dict[str, int | str]

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        regs = machine.regs()
        wanted = _resolve(self.values, labels)
        assert {name: hex(regs[name]) for name in wanted} == {
            name: hex(value) for name, value in wanted.items()
        }


@dataclass(frozen=True)
class Flags(Step):
    """Expect bits of rflags: of `mask`, those of `value` and no others."""

    mask: int
    value: int

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        assert hex(machine.regs()["rflags"] & self.mask) == hex(self.value)


@dataclass(frozen=True)
class SetRegs(Step):
    values: dict[str, int | str]

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        machine.set_regs(**_resolve(self.values, labels))


@dataclass(frozen=True)
class Memory(Step):
    """Expect bytes in RAM."""

    address: int
    data: bytes

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        assert machine.ram.read(self.address, len(self.data)) == self.data


@dataclass(frozen=True)
class Sregs(Step):
    """Expect 8 bytes of kvm_sregs at an offset."""

    offset: int
    value: int

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        sregs = machine.vcpu.get_state("sregs")
        assert hex(int.from_bytes(sregs[self.offset : self.offset + 8], "little")) == hex(self.value)


@dataclass(frozen=True)
class Interrupt(Step):
    vector: int

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        machine.vcpu.interrupt(self.vector)


@dataclass(frozen=True)
class Queued(Step):
    count: int

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        assert machine.vcpu.interrupts_queued == self.count


@dataclass(frozen=True)
class Nmi(Step):
    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        machine.vcpu.nmi()


@dataclass(frozen=True)
class Kick(Step):
    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        machine.vcpu.kick()


@dataclass(frozen=True)
class ClearKick(Step):
    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        machine.vcpu.clear_kick()


@dataclass(frozen=True)
class Watch:
    """A watchpoint at a label or an address."""

    id: int
    address: int | str
    length: int
    access: str = "w"
    physical: bool = False


@dataclass(frozen=True)
class Debug(Step):
    """Set what to stop for: breakpoints as id and label or address."""

    step: bool = False
    breakpoints: dict[int, int | str] = field(default_factory=dict)
    watchpoints: tuple[Watch, ...] = ()
    ports: tuple[tuple[int, int, int], ...] = ()  # id, first, last
    vectors: dict[int, tuple[int, ...]] = field(default_factory=dict)
    modes: tuple[int, ...] = ()
    cr3s: tuple[int, ...] = ()

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        stops = (
            *(Breakpoint(number, address) for number, address in _resolve(self.breakpoints, labels).items()),
            *(
                Watchpoint(
                    watch.id,
                    _address(watch.address, labels),
                    watch.length,
                    on_read="r" in watch.access,
                    on_write="w" in watch.access,
                    physical=watch.physical,
                )
                for watch in self.watchpoints
            ),
            *(PortStop(*ports) for ports in self.ports),
            *(VectorStop(number, vectors) for number, vectors in self.vectors.items()),
            *map(ModeStop, self.modes),
            *map(Cr3Stop, self.cr3s),
        )
        request = DebugRequest(self.step, stops)
        machine.vcpu.set_debug(request)


@dataclass(frozen=True)
class Refused(Step):
    """A step that the engine answers with `Unsupported`, in these words, and changes nothing."""

    step: Step
    words: str

    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        try:
            self.step.apply(machine, labels)
        except Unsupported as error:
            assert self.words in str(error)
        else:
            raise AssertionError("it was not refused")


@dataclass(frozen=True)
class NoDebug(Step):
    def apply(self, machine: TestMachine, labels: dict[str, int]) -> None:
        machine.vcpu.set_debug(NO_DEBUG)


@dataclass(frozen=True)
class Case:
    """`instead` has other steps for a divergence of tests/engine/divergences.py, by its name."""

    name: str
    mode: str
    code: str
    steps: tuple[Step, ...]
    regs: dict[str, int | str] = field(default_factory=dict)
    memory: dict[int, bytes] = field(default_factory=dict)
    instead: dict[str, tuple[Step, ...]] = field(default_factory=dict)

    def play(self, machine: TestMachine, divergences: frozenset[str]) -> None:
        program = assemble(self.code, self.mode)
        machine.load(program, self.mode)
        for address, data in self.memory.items():
            machine.ram.write(address, data)
        machine.set_regs(**_resolve(self.regs, program.labels))
        applying = [steps for name, steps in self.instead.items() if name in divergences]
        assert len(applying) <= 1, "two divergences apply to one case"
        for number, step in enumerate(applying[0] if applying else self.steps):
            try:
                step.apply(machine, program.labels)
            except AssertionError as error:
                raise AssertionError(f"step {number}, {step}: {error}") from error


def _address(value: int | str, labels: dict[str, int]) -> int:
    return labels[value] if isinstance(value, str) else value


def _resolve(values: dict, labels: dict[str, int]) -> dict:
    return {name: _address(value, labels) for name, value in values.items()}
