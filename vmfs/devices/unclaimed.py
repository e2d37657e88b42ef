"""Unclaimed: the ports and addresses that a guest has used and no device has."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 256  # rows; the one that was used the longest time ago makes room


@dataclass(slots=True)
class Use:
    """How often something was read and written, and the rip of the last time, as exits have it."""

    reads: int = 0
    writes: int = 0
    rip: int = 0

    def __str__(self) -> str:
        return f"reads={self.reads} writes={self.writes} rip={self.rip:#x}"


class Unclaimed:
    """Rows by space ("port", "memory") and address, the one last used at the end."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], Use] = {}
        self.forgotten = 0  # rows that had to make room

    def note(self, space: str, address: int, rip: int, *, write: bool) -> None:
        row = self._rows.pop((space, address), None)
        if row is None:
            row = Use()
            if len(self._rows) >= MOST:
                del self._rows[next(iter(self._rows))]
                self.forgotten += 1
        self._rows[space, address] = row
        row.rip = rip
        if write:
            row.writes += 1
        else:
            row.reads += 1

    def lines(self) -> list[str]:
        return [f"{space}={address:#x} {row}" for (space, address), row in self._rows.items()]
