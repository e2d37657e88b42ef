"""What ends a run, beside the exits that all machines have (`vmfs.words.exits`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vmfs.words.exits import Exit


@dataclass(slots=True, kw_only=True)
class Syscall(Exit):
    """A SYSCALL that no hook answers. `rip` is the instruction after it, `number` is rax."""

    REASON: ClassVar[str] = "syscall"
    CODE: ClassVar[int] = 0

    number: int

    def _details(self) -> Iterator[tuple[str, str]]:
        yield "number", str(self.number)


@dataclass(slots=True, kw_only=True)
class Interrupt(Exit):
    """An INT n, INT3 or INTO that no hook answers. `rip` is the instruction itself; the next run goes on after it."""

    REASON: ClassVar[str] = "interrupt"
    CODE: ClassVar[int] = 0

    vector: int

    def _details(self) -> Iterator[tuple[str, str]]:
        yield "vector", f"{self.vector:#x}"
