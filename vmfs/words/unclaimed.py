"""What a guest has used and nothing has claimed: ports, addresses, MSRs."""

from __future__ import annotations

from collections.abc import Hashable, ItemsView, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class Use:
    """How often something was read and written, and the rip of the last time, as exits have it."""

    reads: int = 0
    writes: int = 0
    rip: int = 0

    def __str__(self) -> str:
        return f"reads={self.reads} writes={self.writes} rip={self.rip:#x}"


class Unclaimed(Generic[Key]):
    """The uses of at most `most` things, the one last used at the end; the one used the longest time ago makes room."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._uses: dict[Key, Use] = {}
        self.forgotten = 0  # that had to make room

    def note(self, key: Key, rip: int, *, write: bool) -> None:
        use = self._uses.pop(key, None)
        if use is None:
            use = Use()
            if len(self._uses) >= self._most:
                del self._uses[next(iter(self._uses))]
                self.forgotten += 1
        self._uses[key] = use
        use.rip = rip
        if write:
            use.writes += 1
        else:
            use.reads += 1

    def put(self, uses: Iterable[tuple[Key, Use]]) -> None:
        """Have these, the one last used at the end."""
        self._uses = dict(uses)

    def items(self) -> ItemsView[Key, Use]:
        return self._uses.items()
