"""Tracing: what a machine executes, accesses and is interrupted by, as a stream that never loses anything silently.

`TraceSettings` is what is traced, as the lines written to the file `trace` say it; it is never changed. `Trace` is a
machine's: its settings, and the buffer between the CPU's thread and its readers.

Binary records are `struct vmfs_trace` of vmfs.h; the emulator's core writes the same. Whose they are, where there are
several CPUs, the buffer says. Numbers of instructions count
from the machine's start on the emulator, and those that were traced on an engine that steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from vmfs.debug._trace import Text
from vmfs.debug.conditions import Resolve, no_symbols, parse_address
from vmfs.debug.coverage import CoverageMap
from vmfs.debug.symbols import SymbolTable
from vmfs.debug.trace_buffer import TraceBuffer
from vmfs.engine.base import TRACE_ALL, Capability, Runner, TraceRequest, TraceSink, Vcpu
from vmfs.words import exits
from vmfs.words.errors import Invalid, Unsupported
from vmfs.words.modes import CodeMode
from vmfs.words.tracing import AT, DROPPED, EXIT, INSN, RECORD, WRITE

KINDS = ("insn", "mem", "exceptions", "interrupts", "exits", "coverage")
PRIVILEGES = ("user", "kernel")
MODES = ("real", "protected", "long")
Span = tuple[int, int]

SMALLEST, LARGEST = 1 << 20, 1 << 30  # bytes of the buffer; the core delivers up to 1 MiB at once
DEFAULT_SIZE = 16 << 20


def parse_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise Invalid(f"{text[:40]!r} is neither on nor off")
    return text == "on"


def parse_span(text: str, resolve: Resolve = no_symbols) -> Span:
    """`FIRST-LAST`, both included, or `all`."""
    if text == "all":
        return TRACE_ALL
    first, dash, last = text.partition("-")
    if not dash:
        raise Invalid(f"range: {text[:60]!r} is not FIRST-LAST or all")
    span = parse_address(first, resolve, what="FIRST"), parse_address(last, resolve, what="LAST")
    if span[0] > span[1]:
        raise Invalid(f"range: {first} is after {last}")
    return span


def parse_modes(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """`user,long` and the like: privileges and modes. A group of which none is named is whole."""
    if text == "all":
        return frozenset(PRIVILEGES), frozenset(MODES)
    words = text.split(",")
    for word in words:
        if word not in (*PRIVILEGES, *MODES):
            raise Invalid(f"mode: {word[:40]!r} is none of {', '.join((*PRIVILEGES, *MODES))}, all")
    privileges, modes = frozenset(words) & frozenset(PRIVILEGES), frozenset(words) & frozenset(MODES)
    return privileges or frozenset(PRIVILEGES), modes or frozenset(MODES)


def parse_full(text: str) -> bool:
    if text not in ("wait", "drop"):
        raise Invalid(f"full: {text[:40]!r} is neither wait nor drop")
    return text == "wait"


def check_size(size: int) -> int:
    if not SMALLEST <= size <= LARGEST:
        raise Invalid(f"buffer: {size} is not between {SMALLEST} and {LARGEST} bytes")
    return size


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """`place`: linear addresses of instructions, `data`: of what they access. `waits`: the guest does, when readers are
    slow, else records are dropped."""

    kinds: frozenset[str] = frozenset()
    place: Span = TRACE_ALL
    data: Span = TRACE_ALL
    privileges: frozenset[str] = frozenset(PRIVILEGES)
    modes: frozenset[str] = frozenset(MODES)
    waits: bool = True
    size: int = DEFAULT_SIZE

    def switch(self, kind: str, on: bool) -> TraceSettings:
        return replace(self, kinds=self.kinds | {kind} if on else self.kinds - {kind})

    def only_at(self, span: Span) -> TraceSettings:
        return replace(self, place=span)

    def only_data(self, span: Span) -> TraceSettings:
        return replace(self, data=span)

    def only_in(self, modes: tuple[frozenset[str], frozenset[str]]) -> TraceSettings:
        return replace(self, privileges=modes[0], modes=modes[1])

    def when_full(self, waits: bool) -> TraceSettings:
        return replace(self, waits=waits)

    def keep(self, size: int) -> TraceSettings:
        return replace(self, size=size)

    def off(self) -> TraceSettings:
        return replace(self, kinds=frozenset())

    @property
    def counts(self) -> bool:
        """It is coverage."""
        return "coverage" in self.kinds

    @property
    def flows(self) -> bool:
        """There is something for readers."""
        return bool(self.kinds) and not self.counts

    def check(self) -> None:
        """Invalid for what no engine does."""
        if self.counts and len(self.kinds) > 1:
            others = ", ".join(kind for kind in KINDS if kind in self.kinds and kind != "coverage")
            raise Invalid(f"coverage is counted while nothing else is traced, and there is {others}: `off` ends it")

    def line(self) -> str:
        """All of it in one word, for `stat`."""
        words = [kind for kind in KINDS if kind in self.kinds] or ["off"]
        for name, span in (("range", self.place), ("data", self.data)):
            if span != TRACE_ALL:
                words.append(f"{name}={span[0]:#x}-{span[1]:#x}")
        if len(self.privileges) + len(self.modes) < len(PRIVILEGES) + len(MODES):
            named = self.privileges | self.modes
            words.append("mode=" + "+".join(word for word in (*PRIVILEGES, *MODES) if word in named))
        words.append(f"full={'wait' if self.waits else 'drop'}")
        words.append(f"buffer={self.size}")
        return ",".join(words)

    def request(self, coverage: CoverageMap | None) -> TraceRequest:
        """What an engine is asked for; with the map, where jumps are counted."""
        return TraceRequest(
            instructions="insn" in self.kinds,
            memory="mem" in self.kinds,
            exceptions="exceptions" in self.kinds,
            interrupts="interrupts" in self.kinds,
            place=self.place,
            data=self.data,
            privileges=self.privileges,
            modes=self.modes,
            coverage=None if coverage is None else coverage.view,
        )

    def check_steps(self, engine: str) -> None:
        """Unsupported for what an engine that can only step does not show."""
        for kind, what in (
            ("mem", "memory accesses"),
            ("exceptions", "exceptions"),
            ("interrupts", "interrupts"),
            ("coverage", "jumps"),
        ):
            if kind in self.kinds:
                raise Unsupported(f"{engine} steps, and does not show {what}: write emulator to `engine`")
        if len(self.privileges) + len(self.modes) < len(PRIVILEGES) + len(MODES):
            raise Unsupported(f"{engine} steps in every mode: write emulator to `engine`")


class Trace:
    """A machine's trace."""

    def __init__(self) -> None:
        self.settings = TraceSettings()
        self.buffer = TraceBuffer(DEFAULT_SIZE)
        self.stepped = 0  # instructions that were traced by steps

    @cached_property
    def coverage(self) -> CoverageMap:
        return CoverageMap()

    @property
    def on(self) -> bool:
        return bool(self.settings.kinds)

    def apply(self, settings: TraceSettings) -> None:
        self.settings = settings
        self.buffer.configure(limit=settings.size, waits=settings.waits, flowing=settings.flows)

    def sink(self, cpu: int | None) -> TraceSink:
        """Where a CPU's records go; None: it is the only one."""

        def deliver(records: bytes, events: int, ended: bool) -> None:
            self.buffer.append(records, events, cpu=cpu)
            if not ended:
                self.buffer.wait_for_room()

        return deliver

    def interrupt(self) -> None:
        self.buffer.interrupt()

    def steps(self, capabilities: frozenset[Capability]) -> bool:
        """Whether an engine has to step for it."""
        return "insn" in self.settings.kinds and Capability.TRACE not in capabilities

    def run(
        self,
        runner: Runner,
        cpus: Sequence[Vcpu],
        capabilities: frozenset[Capability],
        budget: int | None,
        goes_on: bool,
    ) -> exits.Exit:
        """`runner.run`, with what the engine does not tell by itself: exits, and instructions where it steps."""
        steps = self.steps(capabilities)  # then a runner is a CPU
        before = linear_rip(cast(Vcpu, runner)) if steps else 0
        self.buffer.wait_for_room()
        exit_ = runner.run(budget=budget, goes_on=goes_on)
        if steps and _is_executed(exit_):
            first, last = self.settings.place
            if first <= before <= last:
                record = RECORD.pack(INSN, 0, 1, 1, self.stepped, before, 0)
                self.buffer.append(record, 1, cpu=_whose(exit_, cpus))
            self.stepped += 1
        if not isinstance(exit_, exits.Interrupted | exits.Limit | exits.Debug):  # those are the client's doing
            self.exit(exit_, cpus)
        return exit_

    def exit(self, exit_: exits.Exit, cpus: Sequence[Vcpu]) -> None:
        """An exit that is the guest's doing. The trace has its line as it is, the record its most important words."""
        if "exits" not in self.settings.kinds:
            return
        size, flags, what, value = _exit_words(exit_)
        cpu = cpus[exit_.cpu]
        number = cpu.counters().get("instructions", self.stepped)
        at = RECORD.pack(AT, 0, 0, 0, number, linear_rip(cpu), 0)
        record = RECORD.pack(EXIT, flags, size, exit_.CODE, what, value, exit_.rip)
        self.buffer.append(at + record, 1, f"exit {exit_.line()}\n".encode(), cpu=_whose(exit_, cpus))


def _whose(exit_: exits.Exit, cpus: Sequence[Vcpu]) -> int | None:
    """As `TraceBuffer.append` wants it: None where there is one CPU."""
    return exit_.cpu if len(cpus) > 1 else None


def linear_rip(cpu: Vcpu) -> int:
    """The linear address of the instruction at rip."""
    return CodeMode.of(cpu.get_state("regs"), cpu.get_state("sregs")).address


def _is_executed(exit_: exits.Exit) -> bool:
    """Whether the step that ended with it has executed its instruction."""
    if isinstance(exit_, exits.Debug):
        return exit_.cause == "step" or exit_.cause in exits.STOPS_AFTER
    if isinstance(exit_, exits.Io | exits.Mmio):
        return exit_.direction in ("out", "write")
    return isinstance(exit_, exits.Hlt)


def _exit_words(exit_: exits.Exit) -> tuple[int, int, int, int]:
    """size, flags, address or port, value: of struct vmfs_trace's exit."""
    if isinstance(exit_, exits.Io):
        flags = WRITE if exit_.direction == "out" else 0
        return exit_.size, flags, exit_.port, int.from_bytes(exit_.data[: exit_.size], "little")
    if isinstance(exit_, exits.Mmio):
        flags = WRITE if exit_.direction == "write" else 0
        return exit_.size, flags, exit_.addr, int.from_bytes(exit_.data, "little")
    if isinstance(exit_, exits.Shutdown):
        return exits.SHUTDOWN_CAUSES.index(exit_.cause) + 1, 0, 0, exit_.code or 0
    return 0, 0, 0, 0


def dropped_record(events: int) -> bytes:
    return RECORD.pack(DROPPED, 0, 0, 0, events, 0, 0)


class TraceText:
    """Records as lines, for one reader."""

    def __init__(self, symbols: Callable[[], SymbolTable]) -> None:
        self._symbols = symbols
        self._known = symbols()
        self._text = self._renderer()

    def _renderer(self) -> Text:
        table = self._known
        return Text((lambda address: table.label(address).encode()) if len(table) else None)

    def lines(self, records: bytes) -> bytes:
        if self._symbols() is not self._known:
            at, cpu = self._text.at, self._text.cpu
            self._known = self._symbols()
            self._text = self._renderer()
            self._text.at, self._text.cpu = at, cpu
        return self._text.text(records)
