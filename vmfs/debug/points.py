"""The break- and watchpoints of a machine: ids, hits, and what the engine is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmfs.engine.base import Breakpoint, DebugRequest
from vmfs.errors import Invalid, LimitReached

MOST = 1000  # of a machine: every change and hit costs a pass over all


@dataclass(frozen=True, slots=True)
class Point:
    """A breakpoint at linear `address`."""

    id: int
    address: int
    hits: int = 0

    def line(self) -> str:
        return f"{self.id} break {self.address:#x} hits={self.hits}"


@dataclass(frozen=True, slots=True)
class Points:
    """A value: every change gives a new one, so that several lines of a write take effect together or not at all.

    `stepping`: every run executes one instruction (`1` in the debug file). Ids are never used twice.
    """

    stepping: bool = False
    points: tuple[Point, ...] = ()
    next_id: int = 1

    def with_stepping(self, on: bool) -> Points:
        return replace(self, stepping=on)

    def with_break(self, address: int) -> Points:
        if any(point.address == address for point in self.points):
            raise Invalid(f"break: there is a breakpoint at {address:#x} already")
        if len(self.points) >= MOST:
            raise LimitReached(f"break: a machine has at most {MOST} break- and watchpoints")
        return replace(
            self, points=(*self.points, Point(self.next_id, address)), next_id=self.next_id + 1
        )

    def without(self, id_: int) -> Points:
        if not any(point.id == id_ for point in self.points):
            raise Invalid(f"delete: there is no point {id_}")
        return replace(self, points=tuple(point for point in self.points if point.id != id_))

    def without_all(self) -> Points:
        return replace(self, points=())

    def with_hit(self, id_: int) -> Points:
        return replace(
            self,
            points=tuple(
                replace(point, hits=point.hits + 1) if point.id == id_ else point for point in self.points
            ),
        )

    def request(self) -> DebugRequest:
        """What the engine shall stop for."""
        return DebugRequest(
            step=self.stepping,
            breakpoints=tuple(Breakpoint(point.id, point.address) for point in self.points),
        )

    def text(self) -> str:
        """The `debug` file: whether it steps, then a line a point."""
        return "".join(f"{line}\n" for line in (str(int(self.stepping)), *(p.line() for p in self.points)))
