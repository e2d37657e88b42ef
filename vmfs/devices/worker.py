"""Worker: a thread that does for a device what waits for the host, while the guest goes on.

A job has two halves: `work`, which touches the host and the guest's RAM and nothing else, and `then`, which is called
with the board's lock held and what `work` has returned. Whoever holds the board's lock may `hold` the worker: then
nothing is under way, and all that was done has had its `then`.

A device whose `board.has_workers` is false calls both at once.
"""

from __future__ import annotations

import abc
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from vmfs.devices.device import Port

Work = Callable[[], Any]
Then = Callable[[Any], None]


class Worker:
    def __init__(self, board: Port, name: str) -> None:
        self._board = board
        self._name = name
        self._changed = threading.Condition()
        self._jobs: deque[tuple[Work, Then]] = deque()
        self._done: deque[tuple[Then, Any]] = deque()
        self._is_working = False
        self._is_closed = False
        self._at_end: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None

    def submit(self, work: Work, then: Then) -> None:
        """With the board's lock held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=f"vmfs-{self._name}", daemon=True)
            self._thread.start()
        with self._changed:
            self._jobs.append((work, then))
            self._changed.notify_all()

    def hold(self) -> None:
        """Have nothing under way. With the board's lock held, for as long as nothing shall begin. Jobs that wait are
        done here: the thread may be waiting for that lock."""
        while self._work():
            pass
        self._deliver()

    def _work(self) -> bool:
        """Do a job, after that which is under way. False where there is none."""
        with self._changed:
            while self._is_working:
                self._changed.wait()
            if not self._jobs:
                return False
            work, then = self._jobs.popleft()
            self._is_working = True
        try:
            result = work()
        except Exception as error:  # of a machine that is closed meanwhile; `then` says what is wrong of others
            result = error
        with self._changed:
            self._is_working = False
            self._done.append((then, result))
            self._changed.notify_all()
        return True

    def _deliver(self) -> None:
        while self._done:
            then, result = self._done.popleft()
            then(result)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._is_closed:
                    self._changed.wait()
            has_worked = self._work()
            if self._is_closed:
                break
            if has_worked:
                with self._board.lock:
                    self._deliver()
        with self._changed:
            while self._is_working:  # a holder is
                self._changed.wait()
        for call in self._at_end:
            call()

    def close(self) -> bool:
        """End the thread, which begins nothing any more. Returns whether it is not working either."""
        with self._changed:
            self._jobs.clear()
            self._is_closed = True
            self._changed.notify_all()
            return not self._is_working

    def at_end(self, call: Callable[[], None]) -> None:
        """`close`, and call that once it is not working: at once, or by the thread, later."""
        with self._changed:
            is_idle = self.close()
            if not is_idle:
                self._at_end.append(call)
        if is_idle:
            call()


class Working(abc.ABC):
    """Of a device that has workers: nothing begins but while the machine runs and the device does not sleep."""

    works = True
    _is_asleep = False
    _is_running = True

    @abc.abstractmethod
    def all_workers(self) -> Iterable[Worker]: ...

    @abc.abstractmethod
    def go_on(self) -> None:
        """Begin what may have been waiting."""

    @property
    def is_held(self) -> bool:
        """Nothing is to begin."""
        return self._is_asleep or not self._is_running

    def settle_all(self) -> None:
        """Nothing is under way, and nothing begins meanwhile."""
        self.settle_workers(self.all_workers())

    def settle_workers(self, workers: Iterable[Worker]) -> None:
        was, self._is_asleep = self._is_asleep, True
        try:
            for worker in workers:
                worker.hold()
        finally:
            self._is_asleep = was

    def run_begins(self) -> None:
        self._is_running = True
        self.go_on()

    def run_ends(self) -> None:
        self._is_running = False
        self.settle_all()

    def sleep(self) -> None:
        self._is_asleep = True
        self.settle_all()

    def wake(self) -> None:
        self._is_asleep = False
        self.go_on()
