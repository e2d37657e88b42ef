"""What a trace keeps until it is read: records in chunks, for several readers, bounded, with a count of what is lost.

Records are the 32 bytes of `struct vmfs_trace` (vmfs.h). An event is an instruction, an access, an exception, an
interrupt or an exit; what is lost is counted in events.

A reader begins with the oldest that is kept. What all open readers have read is not kept; while nobody reads, the last
`limit` bytes are. When readers are behind by `limit`, then either the guest waits for them (`waits`), or the oldest
records are dropped, and readers that had not read them are told how many.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vmfs.debug._trace import count, cpu_after
from vmfs.words.tracing import CPU, RECORD

_CHUNK_COST = 200  # bytes that a chunk takes besides its records
_SLACK = 2  # so many times `limit` may be kept when the guest waits, but was told to stop waiting


@dataclass(frozen=True, slots=True)
class Chunk:
    """`before`: events of the stream that came before it. `text`: its lines, where they are not made of the records.
    `cpu`: whose its first record is; None where there is one CPU."""

    data: bytes
    before: int
    text: bytes | None = None
    cpu: int | None = None

    @property
    def cost(self) -> int:
        return len(self.data) + len(self.text or b"") + _CHUNK_COST


@dataclass(slots=True, eq=False)
class TraceReader:
    """A place in the stream: `seen` events come before it, `offset` bytes of the chunk `index`. `cpu`: whose the
    record before it is, as the reader was told."""

    index: int
    seen: int
    offset: int = 0
    cpu: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some records, after `lost` events that were dropped. `text` as in Chunk, or None. `cpu`: whose the first one is.
    Where that is news for the reader, a record before it says so."""

    lost: int
    data: bytes
    text: bytes | None
    cpu: int | None = None


class TraceBuffer:
    """Appended to by the CPU's thread, read by any."""

    def __init__(self, limit: int) -> None:
        self._condition = threading.Condition()
        self._limit = limit
        self._waits = True
        self._flowing = False
        self._interrupted = False
        self._chunks: deque[Chunk] = deque()
        self._first = 0  # the index of the oldest chunk
        self._bytes = 0
        self._events = 0  # of all chunks that were ever appended
        self._read = 0  # ... up to here readers have read them, and they were not dropped
        self._dropped = 0
        self._readers: set[TraceReader] = set()
        self._listeners: tuple[Callable[[], None], ...] = ()

    # ---- the writing end

    def configure(self, *, limit: int, waits: bool, flowing: bool) -> None:
        with self._condition:
            self._limit, self._waits, self._flowing = limit, waits, flowing
            self._drop()
            self._condition.notify_all()
        self._tell()

    def append(self, data: bytes, events: int, text: bytes | None = None, *, cpu: int | None = None) -> None:
        with self._condition:
            chunk = Chunk(data, self._events, text, cpu)
            self._events += events
            self._chunks.append(chunk)
            self._bytes += chunk.cost
            self._drop()
        self._tell()

    def wait_for_room(self) -> None:
        """Return when readers have caught up, or at once where nobody reads or waits; `interrupt` ends it, too."""
        with self._condition:
            while self._waits and self._readers and self._bytes >= self._limit and not self._interrupted:
                self._condition.wait()
            self._interrupted = False

    def interrupt(self) -> None:
        """End the present wait, or else the next one. From any thread."""
        with self._condition:
            self._interrupted = True
            self._condition.notify_all()

    def clear(self) -> None:
        """Forget what is kept; readers go on with what comes."""
        with self._condition:
            self._first += len(self._chunks)
            self._chunks.clear()
            self._bytes = 0
            self._read = self._events
            for reader in self._readers:
                reader.index, reader.offset, reader.seen = self._first, 0, self._events
            self._condition.notify_all()

    def _drop(self) -> None:
        """With the lock held: keep to the limit."""
        limit = self._limit * (_SLACK if self._waits and self._readers else 1)
        while self._bytes > limit and len(self._chunks) > 1:
            chunk = self._chunks.popleft()
            self._first += 1
            self._bytes -= chunk.cost
            self._dropped += count(chunk.data)

    # ---- the reading end

    @property
    def events(self) -> int:
        """Events that came, read or not."""
        return self._events

    @property
    def dropped(self) -> int:
        """Events that were dropped before any reader had them."""
        return self._dropped

    @property
    def flowing(self) -> bool:
        """Whether more may come."""
        return self._flowing

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called, in any thread, when there is more to read. Returns what ends that."""
        with self._condition:
            self._listeners = (*self._listeners, callback)

        def unsubscribe() -> None:
            with self._condition:
                self._listeners = tuple(one for one in self._listeners if one is not callback)

        return unsubscribe

    def _tell(self) -> None:
        for callback in self._listeners:
            callback()

    def open(self) -> TraceReader:
        with self._condition:
            reader = TraceReader(self._first, self._read)
            self._readers.add(reader)
        return reader

    def close(self, reader: TraceReader, unread: Chunk | None = None) -> None:
        """The last reader leaves for the next what it has not read; `unread`: also what it took last."""
        with self._condition:
            self._readers.discard(reader)
            if not self._readers:
                if reader.offset and reader.index == self._first and self._chunks:
                    self._begin_at(reader)
                if unread is not None:
                    self._chunks.appendleft(unread)
                    self._first -= 1
                    self._bytes += unread.cost
                    self._read = min(self._read, unread.before)
                self._drop()
            else:
                self._trim()
            self._condition.notify_all()

    def _begin_at(self, reader: TraceReader) -> None:
        """Forget of the first chunk what the reader has read."""
        chunk = self._chunks[0]
        rest = Chunk(chunk.data[reader.offset :], reader.seen, chunk.text, reader.cpu)
        self._chunks[0] = rest
        self._bytes += rest.cost - chunk.cost
        self._read = reader.seen

    def ready(self, reader: TraceReader) -> bool:
        return reader.index < self._first + len(self._chunks)

    def take(self, reader: TraceReader, most: int) -> Piece | None:
        """The next records, up to `most` bytes (at least one), of one chunk; None where there are none yet."""
        with self._condition:
            if reader.index < self._first:  # dropped under it
                reader.index, reader.offset = self._first, 0
            if not self.ready(reader):
                return None
            chunk = self._chunks[reader.index - self._first]
            lost, cpu, whose = 0, reader.cpu, b""
            if not reader.offset:
                lost = max(chunk.before - reader.seen, 0)
                reader.seen, cpu = chunk.before, chunk.cpu
                if cpu is not None and cpu != reader.cpu:
                    whose = RECORD.pack(CPU, 0, 0, cpu, 0, 0, 0)
            if chunk.text is None:
                data = chunk.data[reader.offset : reader.offset + max(most // RECORD.size, 1) * RECORD.size]
            else:
                data = chunk.data
            reader.offset += len(data)
            reader.seen += count(data)
            reader.cpu = cpu_after(data, cpu)
            if reader.offset >= len(chunk.data):
                reader.index, reader.offset = reader.index + 1, 0
                self._trim()
        return Piece(lost, whose + data, chunk.text, cpu)

    def _trim(self) -> None:
        """With the lock held: forget what all readers have read."""
        seen = min((reader.index for reader in self._readers), default=self._first)
        while self._first < seen and self._chunks:
            chunk = self._chunks.popleft()
            self._first += 1
            self._bytes -= chunk.cost
            self._read = chunk.before + count(chunk.data)
        if self._bytes < self._limit:
            self._condition.notify_all()
