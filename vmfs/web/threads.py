"""Calls that may block, in threads: so many at a time for one key, which is a machine, that one that does not answer
takes none from the others."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

MOST = 64
MOST_OF_ONE = 6


class Refused(Exception):
    """So many calls wait already."""


class Threads:
    """Daemon threads, made as they are needed: a call that never returns keeps no process from its end."""

    def __init__(self, most: int = MOST, most_of_one: int = MOST_OF_ONE) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: Counter[Hashable] = Counter()
        self._threads = 0

    async def call(self, key: Hashable, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns or raises. Refused, at once, where that key has its share of calls, or all threads
        are taken. Where the caller is cancelled the call goes on, and counts until its end."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            result: Any = None
            failure: BaseException | None = None
            try:
                result = function(*arguments)
            except BaseException as caught:  # it is the caller's
                failure = caught
            with self._lock:
                self._waiting[key] -= 1
                if not self._waiting[key]:
                    del self._waiting[key]
            try:
                loop.call_soon_threadsafe(_settle, future, result, failure)
            except RuntimeError:  # the loop has ended
                pass

        with self._lock:
            if self._waiting[key] >= self._most_of_one:
                raise Refused(f"{self._most_of_one} calls of it wait already")
            if self._waiting.total() >= self._most:
                raise Refused(f"{self._most} calls wait already")
            self._waiting[key] += 1
            if self._waiting.total() > self._threads:
                self._threads += 1
                threading.Thread(target=self._work, name=f"vmfs-web-{self._threads}", daemon=True).start()
        self._jobs.put(job)
        return await future

    @staticmethod
    def later(function: Callable[[], object]) -> None:
        """Call it in a thread of its own, and wait for nothing: closing a file of a mount asks its server."""
        threading.Thread(target=function, name="vmfs-web-later", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()


def _settle(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.cancelled():
        return
    if failure is None:
        future.set_result(result)
    elif isinstance(failure, StopIteration):  # a future cannot raise that
        future.set_exception(RuntimeError(str(failure)))
    else:
        future.set_exception(failure)
