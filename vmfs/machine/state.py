"""STATE: the one table of what a machine is.

All that decides what a machine does next is a row of ROWS, whoever owns it: a CPU, the engine's machine, the board and
its devices, the machine as its user has set it up. `take` makes a value of it, `put` makes a machine what a value says.
Reset, the move to another engine and the trial of a change read the same table.

Not in it: RAM and the framebuffer's pixels (`vmfs.memory.ram` owns these; `state_hash` has them), points, traces
and symbols (they are the user's, who looks at the machine), and caches, which an engine may drop at any time: decoded
code, the TLB.

The order of ROWS is the order in which they are set. `after` says why: what has to be set before.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from vmfs.engine.base import Machine, Vcpu, has_state
from vmfs.engine.rest import as_new, given_up
from vmfs.words.errors import Invalid, Unsupported


class Owner(enum.StrEnum):
    """Whose a row is. Rows of a CPU are there once a CPU."""

    ENGINE = "engine"  # the engine's machine
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Row:
    """A part of a machine. `version` is that of its bytes. `is_reset`: a reset sets it back to what a new machine
    has."""

    name: str
    owner: Owner
    after: tuple[str, ...] = ()
    version: int = 1
    is_reset: bool = True
    with_chips: bool = False  # only a machine with interrupt controllers has it


ROWS: tuple[Row, ...] = (
    Row("time", Owner.ENGINE, is_reset=False),
    Row("irqchip", Owner.ENGINE, ("time",), with_chips=True),
    Row("pit", Owner.ENGINE, ("time", "irqchip"), with_chips=True),
    # It completes them. The lines are driven by devices, which reset them.
    Row("chips", Owner.ENGINE, ("irqchip", "pit"), is_reset=False),
    Row("cpuid", Owner.CPU, is_reset=False),
    Row("sregs", Owner.CPU, ("cpuid",)),  # EFER, CR0, CR4: what is valid in most others
    Row("xcrs", Owner.CPU, ("cpuid", "sregs")),
    Row("xsave", Owner.CPU, ("xcrs",)),
    # The I/O APIC sends its requests anew when it is set. IA32_APIC_BASE is in sregs.
    Row("lapic", Owner.CPU, ("irqchip", "sregs"), with_chips=True),
    Row("msrs", Owner.CPU, ("cpuid", "sregs", "lapic", "time")),  # IA32_TSC_DEADLINE holds in the timer's mode only
    Row("debugregs", Owner.CPU, ("sregs",)),
    Row("regs", Owner.CPU, ("sregs",)),  # RFLAGS.VM holds in protected mode only
    Row("events", Owner.CPU, ("regs", "debugregs")),
    Row("mp_state", Owner.CPU, ("events", "lapic")),
    Row("progress", Owner.CPU, ("regs", "sregs", "xsave", "lapic", "msrs", "debugregs", "events", "mp_state")),
)

Values = Mapping[str, bytes]  # by the name of the row


def rows_of(owner: Owner) -> tuple[Row, ...]:
    """In the order in which they are set."""
    return tuple(row for row in ROWS if row.owner is owner)


# ---- the engine's part


def take_engine(machine: Machine) -> dict[str, bytes]:
    """The rows of the engine's machine that there are."""
    return _take(machine, Owner.ENGINE)


def take_cpu(cpu: Vcpu) -> dict[str, bytes]:
    """The rows of a CPU that there are. What it is in the middle of stays so."""
    return _take(cpu, Owner.CPU)


def _take(source: Machine | Vcpu, owner: Owner) -> dict[str, bytes]:
    values = {}
    for row in rows_of(owner):
        try:
            values[row.name] = source.get_state(row.name)
        except Unsupported:
            if not row.with_chips:
                raise
    return values


def put_engine(machine: Machine, values: Values) -> None:
    """Set the rows that are in `values`. Before its CPUs' rows."""
    for row in rows_of(Owner.ENGINE):
        if row.name in values:
            machine.set_state(row.name, values[row.name])


def put_cpu(cpu: Vcpu, values: Values, reset_msrs: bytes | None = None) -> None:
    """Set the rows that are in `values`, after those of the machine.

    `reset_msrs`: the CPU that they are of had these when it was new, and is perhaps another engine's. Then only MSRs
    that both have are set, and one that is refused may be as it was at the reset, for it describes the engine.
    """
    cpu.set_state("progress", given_up(cpu.get_state("progress")))
    for row in rows_of(Owner.CPU):
        if row.name not in values:
            continue
        data = values[row.name]
        if row.name == "cpuid" and cpu.get_state("cpuid") == data:
            continue  # an engine may refuse even that, once the CPU has run
        if row.name == "msrs" and reset_msrs is not None:
            _put_common_msrs(cpu, entries(data), entries(reset_msrs))
            continue
        if row.name == "xsave":
            data = _resized(data, len(cpu.get_state("xsave")))
        if row.with_chips and not has_state(cpu, row.name):  # a machine that becomes bare
            continue
        try:
            cpu.set_state(row.name, data)
        except Invalid as error:
            if reset_msrs is None:
                raise
            raise Unsupported(f"{row.name} is in a state that the other engine cannot have: {error}") from error


def _resized(xsave: bytes, size: int) -> bytes:
    """Engines differ in the room for components; what is cut off must be unused."""
    if any(xsave[size:]):
        raise Unsupported(f"xsave has state beyond the {size} bytes that the other engine has for it")
    return xsave[:size].ljust(size, b"\0")


def _put_common_msrs(cpu: Vcpu, wanted: Mapping[int, int], reset: Mapping[int, int]) -> None:
    there = entries(cpu.get_state("msrs"))
    for index, value in wanted.items():
        if index not in there or there[index] == value:
            continue
        try:
            cpu.set_msr(index, value)
        except Invalid as error:
            if value != reset.get(index):
                raise Unsupported(f"MSR {index:#x} is {value:#x}, which the other engine refuses") from error


def entries(msrs: bytes) -> dict[int, int]:
    """`struct kvm_msrs` as values by index."""
    return {index: value for index, _, value in struct.iter_unpack("<IIQ", msrs[8:])}


# ---- reset


def reset_values(source: Machine | Vcpu, owner: Owner) -> dict[str, bytes]:
    """What a reset sets back, of a machine or a CPU that is new."""
    values = _take(source, owner)
    return {row.name: values[row.name] for row in rows_of(owner) if row.is_reset and row.name in values}


def reset_cpu(cpu: Vcpu, values: Values) -> None:
    """Set back a CPU that had `values` when it was new. What it has counted stays."""
    before = cpu.get_state("progress")
    put_cpu(cpu, {**values, "progress": as_new(before, values["progress"])})


# ---- trying


@contextmanager
def tried(cpu: Vcpu) -> Iterator[None]:
    """What is done to the CPU in this block is only tried: it is afterwards as before, in the middle of what it was
    in."""
    before = take_cpu(cpu)
    cpu.set_state("progress", given_up(before["progress"]))
    try:
        yield
    finally:
        put_cpu(cpu, before)


class Attempt:
    """A CPU for a task that gets and sets its states. Where the task fails, `undo` sets back what it has set."""

    def __init__(self, cpu: Vcpu) -> None:
        self._cpu = cpu
        self._before: dict[str, bytes] = {}

    def get_state(self, name: str) -> bytes:
        return self._cpu.get_state(name)

    def set_state(self, name: str, data: bytes) -> None:
        self._note(name)
        self._cpu.set_state(name, data)

    def get_msr(self, index: int) -> int:
        return self._cpu.get_msr(index)

    def set_msr(self, index: int, value: int) -> None:
        self._note("msrs")
        self._cpu.set_msr(index, value)

    def _note(self, name: str) -> None:
        """Before it is set for the first time. `regs`, which most tasks set, is a state by itself; others change
        several."""
        if name in self._before or len(self._before) > 1:
            return
        if name == "regs":
            self._before = {name: self._cpu.get_state(name)}
        else:
            self._before = {**take_cpu(self._cpu), **self._before}

    def undo(self) -> None:
        put_cpu(self._cpu, self._before)
