"""Streams: what comes goes to every reader, each from where it opened; nothing is lost without being told.

A `Stream` is a bounded buffer of bytes that any thread appends to. It keeps what its slowest reader has not seen, up
to a limit, and nothing while nobody reads. `StreamHandle` is an open file on one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import trio

from vmfs.machine.files.handles import POLL_IN, POLL_OUT, File, Handle
from vmfs.machine.files.request import interruptible, is_nonblocking
from vmfs.words.errors import WouldBlock


class Reader:
    """A place in a stream, `position` bytes from its beginning."""

    def __init__(self, position: int) -> None:
        self.position = position


SLACK = 256 << 10  # bytes that are kept before room for them is there: it comes while the guest goes on


class Stream:
    """Bytes with their numbers. `limit` is how many are kept for a reader that has not read them yet.

    `changed` is called after an append, from the appending thread. Where there is somebody to ask for room, more than
    `SLACK` are kept only as far as there is: `ask` is called, in any thread, when `room` ought to be another.
    """

    def __init__(
        self, limit: int, changed: Callable[[], None] = lambda: None, ask: Callable[[], None] | None = None
    ) -> None:
        self.limit = limit
        self.changed = changed
        self.room = 0 if ask is not None else limit
        self._ask = ask or (lambda: None)
        self._lock = threading.Lock()
        self._kept = bytearray()
        self._end = 0  # the number of the next byte
        self._readers: set[Reader] = set()
        self._waiting: set[tuple[trio.lowlevel.TrioToken, trio.Event]] = set()

    @property
    def end(self) -> int:
        return self._end

    def append(self, data: bytes) -> None:
        with self._lock:
            self._end += len(data)
            if self._readers:
                self._kept += data
                most = min(self.limit, self.room + SLACK)
                if len(self._kept) > most + most // 4:  # not each time: that copies
                    del self._kept[: len(self._kept) - most]
            short = len(self._kept) > self.room + SLACK // 2 and self.room < self.limit
        if short:
            self._ask()
        self.wake()
        self.changed()

    def wanted(self) -> int:
        """What `room` ought to be."""
        kept = len(self._kept)
        return min(kept + SLACK, self.limit) if kept > SLACK // 2 else 0

    def open(self) -> Reader:
        """A reader of all that comes from now on."""
        with self._lock:
            reader = Reader(self._end)
            self._readers.add(reader)
        return reader

    def close(self, reader: Reader) -> None:
        with self._lock:
            self._readers.discard(reader)
            self._trim()
        if self.room > 0:
            self._ask()

    def ready(self, reader: Reader) -> bool:
        return reader.position < self._end

    def take(self, reader: Reader, size: int) -> tuple[bytes, int]:
        """The next bytes, up to `size`, and how many were lost before them."""
        with self._lock:
            first = self._end - len(self._kept)
            lost = max(first - reader.position, 0)
            at = reader.position + lost - first
            data = bytes(self._kept[at : at + size])
            reader.position += lost + len(data)
            self._trim()
            idle = self.room > 0 and not self._kept
        if idle:
            self._ask()
        return data, lost

    def _trim(self) -> None:
        """Forget what all readers have seen; with the lock held."""
        if not self._readers:
            self._kept.clear()
            return
        seen = min(reader.position for reader in self._readers) - (self._end - len(self._kept))
        if seen == len(self._kept) or seen > 65536:  # a bytearray forgets its beginning cheaply
            del self._kept[:seen]

    def wake(self) -> None:
        """Have all waiters look again. From any thread."""
        if not self._waiting:
            return
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for token, event in waiting:
            try:
                token.run_sync_soon(event.set)
            except trio.RunFinishedError:
                pass

    def wait(self, event: trio.Event) -> None:
        """Set `event` at the next append or `wake`: the waiter looks after this call whether there is need to."""
        with self._lock:
            self._waiting.add((trio.lowlevel.current_trio_token(), event))

    def forget(self, event: trio.Event) -> None:
        with self._lock:
            self._waiting = {(token, one) for token, one in self._waiting if one is not event}


class StreamHandle(Handle):
    """Reads whatever comes, at any offset; waits for it unless O_NONBLOCK.

    `lost(count)` is what a reader gets in the place of bytes that were dropped, and `ended(scope)` says whether a
    reader that has all gets the end of the file instead of waiting.
    """

    def __init__(
        self,
        node: File,
        nonblocking: bool,
        stream: Stream,
        *,
        lost: Callable[[int], bytes],
        ended: Callable[[Any], bool] = lambda scope: False,
    ) -> None:
        super().__init__(node, nonblocking)
        self.stream = stream
        self._lost = lost
        self._ended = ended
        self._rest = b""  # the notice about what was lost, and what came after it, too long for one read
        self._reader = stream.open()

    async def read(self, offset: int, size: int) -> bytes:
        nonblocking = is_nonblocking(self.nonblocking)
        while True:
            data = self._next(size)
            if data or self._ended(self.scope):
                return data
            if nonblocking:
                raise WouldBlock("there is nothing to read yet")
            await self.wait_until(self._has_news)

    def _next(self, size: int) -> bytes:
        if not self._rest:
            data, lost = self.stream.take(self._reader, size)
            if not lost:
                return data
            self._rest = self._lost(lost) + data
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _has_news(self) -> bool:
        return self.stream.ready(self._reader) or self._ended(self.scope)

    async def wait_until(self, ready: Callable[[], object]) -> None:
        """Returns when `ready()`, or at the next append or `wake` of the stream: the caller looks again."""
        async with interruptible():
            with self.scope.waiting() as event:
                try:
                    self.scope.check()
                    self.stream.wait(event)
                    if not ready():
                        await event.wait()
                    self.scope.check()
                finally:
                    self.stream.forget(event)

    def poll(self) -> int:
        there = self._rest or self._has_news()
        return (POLL_IN if there else 0) | self.room()

    def room(self) -> int:
        """POLL_OUT where a write would not block."""
        return POLL_OUT if self.node.kind.writable else 0

    def close(self) -> None:
        self.stream.close(self._reader)
