"""Meeting: where the threads of CPUs that run at the same time wait for each other between two instructions."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmfs.words import exits


class Meeting:
    """The threads of a run of several: they meet where something waits for a boundary of all, and end together.

    `action` is done once by the last of them to come, while the others wait.
    """

    def __init__(self, count: int, action: Callable[[], None]) -> None:
        self._changed = threading.Condition()
        self._action = action
        self._running = count
        self._waiting = 0
        self._number = 0  # of the meeting that comes
        self.came: list[exits.Exit | BaseException] = []  # what each of those that have ended came to, in this order

    def meet(self) -> None:
        with self._changed:
            number = self._number
            self._waiting += 1
            self._look()
            while number == self._number:
                self._changed.wait()

    def end(self, came_to: exits.Exit | BaseException) -> None:
        with self._changed:
            self.came.append(came_to)
            self._running -= 1
            self._look()
            self._changed.notify_all()

    def wait_for_all(self) -> None:
        with self._changed:
            while self._running:
                self._changed.wait()

    def _look(self) -> None:
        if self._waiting and self._waiting == self._running:
            self._action()
            self._waiting = 0
            self._number += 1
            self._changed.notify_all()
