"""Plan: what goes where in RAM, decided and checked as a whole before a byte of it is written."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from vmfs.boot.platform import USABLE, Range
from vmfs.boot.source import Source
from vmfs.memory.ram import PAGE, Memory
from vmfs.words.errors import Invalid


class Claim(NamedTuple):
    """Addresses that are taken, and what by."""

    address: int
    end: int
    what: str


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes to be put at `address`: `data` itself, or all of a source."""

    address: int
    data: bytes | Source

    @property
    def size(self) -> int:
        return self.data.size if isinstance(self.data, Source) else len(self.data)


class Plan(ExitStack):
    """Claims of RAM that do not overlap, and what is to be written there. `commit` does it.

    As a context it also ends what was opened for it (`callback`).
    """

    def __init__(self, ranges: tuple[Range, ...]) -> None:
        super().__init__()
        self._usable = [one for one in ranges if one.type == USABLE]
        self._claims: list[Claim] = []
        self._writes: list[Write] = []
        self._zeros: list[tuple[int, int]] = []

    @property
    def top(self) -> int:
        """Where usable RAM ends that 32 bits reach: loaders place nothing above."""
        return max(one.end for one in self._usable if one.end <= 1 << 32)

    def reserve(self, what: str, address: int, end: int) -> None:
        """Keep everything else away."""
        self._claims.append(Claim(address, end, what))

    def claim(self, what: str, address: int, size: int) -> None:
        """Take RAM at a fixed address. Invalid where it is none, or taken."""
        end = address + size
        if not any(one.address <= address and end <= one.end for one in self._usable):
            why = f"RAM ends at {self.top:#x}" if end > self.top else "that is not all RAM"
            raise Invalid(f"{what} wants {address:#x} to {end:#x}, and {why}")
        for other in self._claims:
            if address < other.end and other.address < end:
                raise Invalid(f"{what}, {address:#x} to {end:#x}, overlaps {other.what}")
        self.reserve(what, address, end)

    def place(self, what: str, size: int, *, low: int, high: int, align: int = PAGE, last: bool = False) -> int:
        """Take RAM anywhere from `low` to `high` (exclusive): the first that is free, or the last. Its address."""
        # What fits the lowest begins where something ends, and what fits the highest ends where something begins.
        if last:
            edges = [high, *(one.end for one in self._usable), *(one.address for one in self._claims)]
            candidates = sorted({(edge - size) & -align for edge in edges}, reverse=True)
        else:
            edges = [low, *(one.address for one in self._usable), *(one.end for one in self._claims)]
            candidates = sorted({-(-edge // align) * align for edge in edges})
        for address in candidates:
            if self._is_free(address, size, low, high):
                self.reserve(what, address, address + size)
                return address
        raise Invalid(f"{what} ({size} bytes) finds no room from {low:#x} to {min(high, self.top):#x} in RAM")

    def _is_free(self, address: int, size: int, low: int, high: int) -> bool:
        end = address + size
        return (
            low <= address
            and end <= high
            and any(one.address <= address and end <= one.end for one in self._usable)
            and not any(address < other.end and other.address < end for other in self._claims)
        )

    def write(self, address: int, data: bytes | Source) -> None:
        self._writes.append(Write(address, data))

    def zero(self, address: int, size: int) -> None:
        if size:
            self._zeros.append((address, size))

    def put(self, what: str, data: bytes, *, low: int, high: int, align: int = PAGE) -> int:
        """`place` and `write`."""
        address = self.place(what, len(data), low=low, high=high, align=align)
        self.write(address, data)
        return address

    def commit(self, memory: Memory) -> tuple[tuple[int, int], ...]:
        """Write all of it. The (address, size) of what was written."""
        for address, size in self._zeros:
            memory.clear(address, size)
        for write in self._writes:
            if isinstance(write.data, Source):
                at = write.address
                for chunk in write.data.chunks(0, write.data.size):
                    memory.write(at, chunk)
                    at += len(chunk)
            else:
                memory.write(write.address, write.data)
        return (*self._zeros, *((write.address, write.size) for write in self._writes))
