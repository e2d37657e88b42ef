"""The break- and watchpoints of a machine: ids, hits, and what the engine is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmfs.engine.base import Breakpoint, DebugRequest
from vmfs.errors import Invalid, LimitReached

MOST = 1 << 16  # of a machine: they live in the server's memory, and every change is told to the engine whole


@dataclass(slots=True)
class Point:
    """A breakpoint at linear `address`."""

    id: int
    address: int
    hits: int = 0

    def line(self) -> str:
        return f"{self.id} break {self.address:#x} hits={self.hits}"


class Points:
    """What a machine stops for. `stepping`: every run executes one instruction (`1` in the debug file).

    Changes are made to a `copy`, which takes the place of the original when all of them worked: so the lines
    of one write take effect together or not at all. Methods that change return the object, so that they can
    be chained. Ids are never used twice.
    """

    def __init__(self) -> None:
        self.stepping = False
        self._by_id: dict[int, Point] = {}
        self._by_address: dict[int, Point] = {}
        self._next_id = 1
        self._request: DebugRequest | None = None  # of the points as they are, once it was asked for

    def copy(self) -> Points:
        other = Points()
        other.stepping = self.stepping
        other._by_id = {point.id: replace(point) for point in self._by_id.values()}
        other._by_address = {point.address: point for point in other._by_id.values()}
        other._next_id = self._next_id
        return other

    def __len__(self) -> int:
        return len(self._by_id)

    def set_stepping(self, on: bool) -> Points:
        self.stepping, self._request = on, None
        return self

    def add_break(self, address: int) -> Points:
        if address in self._by_address:
            raise Invalid(f"break: there is a breakpoint at {address:#x} already")
        if len(self) >= MOST:
            raise LimitReached(f"break: a machine has at most {MOST} break- and watchpoints")
        point = Point(self._next_id, address)
        self._by_id[point.id] = self._by_address[address] = point
        self._next_id += 1
        self._request = None
        return self

    def delete(self, id_: int) -> Points:
        point = self._by_id.pop(id_, None)
        if point is None:
            raise Invalid(f"delete: there is no point {id_}")
        del self._by_address[point.address]
        self._request = None
        return self

    def delete_all(self) -> Points:
        self._by_id, self._by_address, self._request = {}, {}, None
        return self

    def hit(self, id_: int) -> None:
        """Count a stop at a point, which may have been deleted meanwhile."""
        point = self._by_id.get(id_)
        if point is not None:
            point.hits += 1

    def breaks_at(self, address: int) -> bool:
        return address in self._by_address

    def request(self) -> DebugRequest:
        """What the engine shall stop for: the same object until something changes."""
        if self._request is None:
            points = tuple(Breakpoint(point.id, point.address) for point in self._by_id.values())
            self._request = DebugRequest(step=self.stepping, breakpoints=points)
        return self._request

    def text(self) -> str:
        """The `debug` file: whether it steps, then a line a point."""
        lines = (str(int(self.stepping)), *(point.line() for point in self._by_id.values()))
        return "".join(f"{line}\n" for line in lines)
