"""TimerQueue: what the devices of a board are to do at some time of the guest's.

All of them are in one queue, and the engine is told the first one's time only (`Machine.set_deadline`). When that has
come, the run is left between two instructions and the board calls what is due, in the CPU's thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timer:
    """A call that is due at `when`, in nanoseconds of the guest's time, unless it is cancelled."""

    __slots__ = ("callback", "is_first", "is_pending", "when")

    def __init__(self, when: int, callback: Callable[[], None], is_first: bool = False) -> None:
        self.when = when
        self.callback = callback
        self.is_first = is_first
        self.is_pending = True

    def cancel(self) -> None:
        """With the board's lock held. One that was called, or is cancelled, stays so."""
        self.is_pending = False


class TimerQueue:
    """Timers by their time; those of the same time in the order in which they were added."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, bool, int, Timer]] = []
        self._added = 0

    def add(self, when: int, callback: Callable[[], None], *, first: bool = False) -> Timer:
        """`first`: before all others of that time that are not."""
        timer = Timer(when, callback, first)
        self._push(timer)
        return timer

    def _push(self, timer: Timer) -> None:
        heapq.heappush(self._heap, (timer.when, not timer.is_first, self._added, timer))
        self._added += 1

    def first(self) -> int | None:
        """When the next one is due."""
        while self._heap and not self._heap[0][-1].is_pending:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_due(self, now: int) -> Timer | None:
        """The next one that is due by `now`, which is not in the queue any more."""
        first = self.first()
        if first is None or first > now:
            return None
        timer = heapq.heappop(self._heap)[-1]
        timer.is_pending = False
        return timer

    def shift(self, by: int) -> None:
        """The guest's time was set to what it was and `by`."""
        timers = [entry[-1] for entry in sorted(self._heap)]
        self._heap.clear()
        for timer in timers:
            timer.when += by
            self._push(timer)

    def clear(self) -> None:
        for entry in self._heap:
            entry[-1].is_pending = False
        self._heap.clear()
