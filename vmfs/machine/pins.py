"""The pins of a PC that a user drives by the file `irq`: interrupt lines and NMI, as inputs (`vmfs.devices.inputs`)."""

from __future__ import annotations

from collections.abc import Callable

from vmfs.words.errors import Invalid

LINES = 24  # of the I/O APIC


class Pins:
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
