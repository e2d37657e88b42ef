"""Device: what every device of a machine is, and what it may ask of its board.

A device is registers behind ports and memory (`windows`), lines to the interrupt controllers, perhaps access
to RAM. It knows no engine and no file. The bus calls `read` and `write` with an offset into a window, never
an address; values are integers, little-endian on the wire.

Time: `board.now()` is the guest's, `board.date()` the date, `board.schedule(when, callback)` has the device called. No
device has a timer, a clock or a thread of the host's for that.

Threads: the board calls devices with its lock held, so a device has none of its own. What comes from
elsewhere (a key, a packet) takes the lock first: `with device.board.lock`.

State: `save` gives what a guest could tell apart, as numbers, bytes, strings, lists and dicts of them; `load`
of another device of the same type with the same windows makes it the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmfs.devices.board import Board


@dataclass(frozen=True, slots=True)
class Window:
    """`length` ports (`space` "port") or bytes of guest-physical memory ("memory") from `start` on.

    `region` is what the device calls it: the first argument of its `read` and `write`.
    """

    space: str
    start: int
    length: int
    region: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length

    def __str__(self) -> str:
        return f"{self.space} {self.start:#x}-{self.end - 1:#x}"


class Device:
    """A device with the name that it has under dev/. Subclasses set TYPE and what they need of the rest.

    `irq` is the interrupt line (GSI) or None; `counters` what its `counters` file shows.
    """

    TYPE: str
    irq: int | None = None

    def __init__(self, board: Board, name: str) -> None:
        self.board = board
        self.name = name
        self.counters: Counter[str] = Counter()

    def windows(self) -> tuple[Window, ...]:
        """Where it is now. PCI devices change it by their BARs: `board.rewire(self)` afterwards."""
        return ()

    def read(self, region: int, offset: int, size: int) -> int:
        """The guest reads `size` bytes (1, 2, 4; memory: 8, too) at `offset` of a window."""
        return (1 << 8 * size) - 1

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """The guest writes `size` bytes."""

    def reset(self) -> None:
        """As at power-on; lines are low. What the host attached stays."""

    def machine_changed(self) -> None:
        """The board goes on with another engine's machine: what an engine keeps and no state has is to be set."""

    def time_shifted(self, by: int) -> None:
        """The guest's time was set, to what it was and `by`: times that the device keeps are to move along."""

    def save(self) -> dict[str, Any]:
        """All that a guest could tell apart."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Be as the device was that `save` was called of. Invalid for what no device can be."""

    def describe(self) -> dict[str, str]:
        """More lines for its `info` file: a disk's path, a backend."""
        return {}

    def close(self) -> None:
        """Give back what is the host's."""

    def set_irq(self, level: bool) -> None:
        """Drive the device's line."""
        if self.irq is not None:
            self.board.set_irq(self, self.irq, level)
