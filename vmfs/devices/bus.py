"""Bus: which device answers for a port or an address."""

from __future__ import annotations

import bisect

from vmfs.devices.device import Device, Window
from vmfs.words.errors import Invalid

PORTS = 0x10000


class Bus:
    """Windows of devices in one space, which never overlap. A lookup is a bisection."""

    def __init__(self, space: str) -> None:
        self.space = space
        self._starts: list[int] = []
        self._rows: list[tuple[Window, Device]] = []

    def add(self, window: Window, device: Device) -> None:
        """Invalid where another device is."""
        if window.length <= 0 or window.start < 0 or (self.space == "port" and window.end > PORTS):
            raise Invalid(f"{device.name}: there is no {window}")
        at = bisect.bisect(self._starts, window.start)
        for other, owner in self._rows[max(at - 1, 0) : at + 1]:
            if window.start < other.end and other.start < window.end:
                raise Invalid(f"{device.name}: {window} overlaps {owner.name}, {other}")
        self._starts.insert(at, window.start)
        self._rows.insert(at, (window, device))

    def remove(self, device: Device) -> None:
        """All windows of a device."""
        self._rows = [row for row in self._rows if row[1] is not device]
        self._starts = [window.start for window, _ in self._rows]

    def find(self, address: int) -> tuple[Window, Device] | None:
        at = bisect.bisect(self._starts, address) - 1
        if at < 0:
            return None
        row = self._rows[at]
        return row if address < row[0].end else None

    def windows(self) -> tuple[tuple[Window, Device], ...]:
        return tuple(self._rows)
