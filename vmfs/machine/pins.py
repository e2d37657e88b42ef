"""Inputs (`vmfs.devices.inputs`) of a PC that come to no device: interrupt lines and NMI, which a user drives by the
file `irq`; and time that passes."""

from __future__ import annotations

from collections.abc import Callable

from vmfs.devices.inputs import PASSING, Taker
from vmfs.words.errors import Invalid

LINES = 24  # of the I/O APIC


class Pins(Taker):
    """`line(gsi, level)` and `nmi()` do it."""

    name = "irq"

    def __init__(self, line: Callable[[int, bool], None], nmi: Callable[[], None]) -> None:
        self._line = line
        self._nmi = nmi

    def check_input(self, kind: str, data: bytes) -> None:
        if kind == "line" and len(data) == 2 and data[0] < LINES and data[1] < 2:
            return
        if kind == "nmi" and not data:
            return
        raise Invalid(f"irq: it has lines 0 to {LINES - 1} and an NMI, and no {kind[:40]!r} {data[:8].hex()}")

    def input(self, kind: str, data: bytes) -> None:
        if kind == "line":
            self._line(data[0], bool(data[1]))
        else:
            self._nmi()


class Passing(Taker):
    """Time that passes on the host while the guest executes: `by(nanoseconds)` makes it pass for the guest."""

    name = PASSING

    def __init__(self, by: Callable[[int], None]) -> None:
        self._by = by

    def check_input(self, kind: str, data: bytes) -> None:
        if kind != "time" or len(data) != 8 or data[7] >> 6:
            raise Invalid(f"time: it passes by nanoseconds, and not by {kind[:40]!r} {data[:8].hex()}")

    def input(self, kind: str, data: bytes) -> None:
        self._by(int.from_bytes(data, "little"))
