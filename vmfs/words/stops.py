"""STOPS: what a run can be asked to stop for, a class a kind. Points (`vmfs.debug.points`) are stops with options."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

# Intel SDM 3A table 6-1.
EXCEPTIONS: Mapping[str, int] = {
    "#DE": 0,
    "#DB": 1,
    "NMI": 2,
    "#BP": 3,
    "#OF": 4,
    "#BR": 5,
    "#UD": 6,
    "#NM": 7,
    "#DF": 8,
    "#TS": 10,
    "#NP": 11,
    "#SS": 12,
    "#GP": 13,
    "#PF": 14,
    "#MF": 16,
    "#AC": 17,
    "#MC": 18,
    "#XM": 19,
    "#VE": 20,
    "#CP": 21,
}
_VECTOR_NAMES = {vector: name for name, vector in EXCEPTIONS.items()}


@dataclass(frozen=True, slots=True)
class Stop(abc.ABC):
    """`id` comes back in the exit, with CAUSE, which is one of DEBUG_CAUSES (`vmfs.words.exits`)."""

    CAUSE: ClassVar[str]
    COMES_AFTER: ClassVar[bool] = False  # the instruction that it is about; others come before it

    id: int

    @abc.abstractmethod
    def text(self) -> str:
        """As it is written in the file `debug`: the verb and its arguments."""


@dataclass(frozen=True, slots=True)
class Breakpoint(Stop):
    """Stop before the instruction at linear address `address` runs."""

    CAUSE: ClassVar[str] = "breakpoint"

    address: int

    def text(self) -> str:
        return f"break {self.address:#x}"


@dataclass(frozen=True, slots=True)
class Watchpoint(Stop):
    """Stop after an access to `length` bytes at linear `address` (guest-physical if `physical`)."""

    CAUSE: ClassVar[str] = "watchpoint"
    COMES_AFTER: ClassVar[bool] = True

    address: int
    length: int
    on_read: bool
    on_write: bool
    physical: bool = False

    def text(self) -> str:
        access = "r" * self.on_read + "w" * self.on_write
        return f"watch {'phys:' * self.physical}{self.address:#x} {self.length} {access}"


@dataclass(frozen=True, slots=True)
class PortStop(Stop):
    """Stop after an access that touches a port from `first` to `last`, whether a device answers it or not.

    An access that is an exit by itself is that exit first; the stop is what the next run returns.
    """

    CAUSE: ClassVar[str] = "io"
    COMES_AFTER: ClassVar[bool] = True

    first: int
    last: int

    def text(self) -> str:
        last = f"-{self.last:#x}" if self.last != self.first else ""
        return f"iobreak {self.first:#x}{last}"


@dataclass(frozen=True, slots=True)
class VectorStop(Stop):
    """Stop before an exception, an INT n or an interrupt of one of `vectors` is delivered, which the next run
    does. rip is where it came: for INT n, INT3 and INTO, the instruction itself."""

    CAUSE: ClassVar[str] = "exception"

    vectors: tuple[int, ...]

    def text(self) -> str:
        return "catch " + ",".join(_vector_texts(self.vectors))


@dataclass(frozen=True, slots=True)
class ChangeStop(Stop):
    """Stop after an instruction that changed what CAUSE names."""

    COMES_AFTER: ClassVar[bool] = True

    def text(self) -> str:
        return f"on {self.CAUSE}"


@dataclass(frozen=True, slots=True)
class ModeStop(ChangeStop):
    """Stop after an instruction that switched between real, protected and long mode."""

    CAUSE: ClassVar[str] = "mode"


@dataclass(frozen=True, slots=True)
class Cr3Stop(ChangeStop):
    """Stop after an instruction that changed CR3."""

    CAUSE: ClassVar[str] = "cr3"


@dataclass(frozen=True, slots=True)
class UnwrittenStop(ChangeStop):
    """Stop after an instruction that read RAM which nobody has written; of a machine that is strict."""

    CAUSE: ClassVar[str] = "unwritten"


@dataclass(frozen=True, slots=True)
class UnclaimedStop(ChangeStop):
    """Stop after an instruction that accessed a port or an address which no device claims."""

    CAUSE: ClassVar[str] = "unclaimed"


STOPS: tuple[type[Stop], ...] = (
    Breakpoint, Watchpoint, PortStop, VectorStop, ModeStop, Cr3Stop, UnwrittenStop, UnclaimedStop,
)  # fmt: skip


def _vector_texts(vectors: tuple[int, ...]) -> Iterable[str]:
    begin = previous = vectors[0]
    for vector in (*vectors[1:], None):
        if vector == previous + 1:
            previous = vector
            continue
        if previous - begin > 1:
            yield f"{begin:#x}-{previous:#x}"
        else:
            yield from (_VECTOR_NAMES.get(one, f"{one:#x}") for one in range(begin, previous + 1))
        if vector is not None:
            begin = previous = vector
