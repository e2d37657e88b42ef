"""`trace` and `trace.bin`: the machine's trace as a stream, as lines or as records; switches are written to `trace`."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import dataclass

import trio

from vmfs.debug.trace import TraceText, dropped_record
from vmfs.debug.trace_buffer import Chunk, Piece, TraceReader, count, cpu_after
from vmfs.machine._ring import AGAIN, Ring
from vmfs.machine.files.commands import parse_commands
from vmfs.machine.files.handles import POLL_IN, POLL_OUT, File, Handle, Kind
from vmfs.machine.files.lines import Do, LineHandle, Undo, same
from vmfs.machine.files.request import interruptible, is_nonblocking
from vmfs.machine.files.waiting import value_of
from vmfs.words.errors import Invalid, WouldBlock
from vmfs.words.tracing import RECORD

log = logging.getLogger(__name__)

SENT_MOST = AGAIN  # of what was read, for programs that read ahead and seek back: bash's `read`, head(1)
_CHUNK = 1 << 20  # bytes: more than a chunk has
_PARTS_MOST = 1000  # that are held of what was made and not read
_PIECES_MOST = 16  # that are made at once for a ring, before others have their turn
TEXT_AT_ONCE = 16 << 10  # bytes of records that are made lines at once: a few milliseconds


@dataclass(frozen=True)
class TraceFile(Kind):
    """`binary`: records, and no switches."""

    binary: bool = False
    walked = False

    @property
    def writable(self) -> bool:  # type: ignore[override]
        return not self.binary

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _TraceHandle(node, nonblocking, self.binary, reads=not writing)


@dataclass(frozen=True, slots=True)
class _Made:
    """What was made of a piece for its reader."""

    records: bytes  # with one that says what was lost before it
    before: int  # events of the stream
    made: bytes
    cpu: int | None  # whose the first one is


class _TraceHandle(LineHandle):
    """A reader from when it was opened, or, when it was opened for writing, too, from its first read. While tracing is
    off, a reader that has read all gets the end of the file."""

    whole = True

    def __init__(self, node: File, nonblocking: bool, binary: bool, *, reads: bool) -> None:
        super().__init__(node, nonblocking, writing=not reads)
        self._buffer = self.scope.vm.trace.buffer
        self._text = None if binary else TraceText(lambda: self.scope.vm.symbols)
        self._rest = memoryview(b"")  # of the last piece, what was not read or handed on
        self._last: deque[_Made] = deque()  # what was made and not read, all of it, and perhaps more before that
        self._last_size = 0
        self._position = 0  # how much was read
        self._sent: deque[bytes] = deque()  # the end of that
        self._sent_size = 0
        self._ring: Ring | None = None  # then it has what was read, and what comes next
        self._token = trio.lowlevel.current_trio_token()
        self._failure: Exception | None = None  # of what was to be read ahead
        self._reader: TraceReader | None = None
        self._unsubscribe = lambda: None
        if reads:
            self._begin()

    def _begin(self) -> TraceReader:
        if self._reader is None:
            self._reader = self._buffer.open()
            self._unsubscribe = self._buffer.subscribe(self._has_come)
        return self._reader

    def _has_come(self) -> None:
        """There is more to read, or the end. From any thread."""
        self.scope.changed()
        if self._ring is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._read_ahead, idempotent=True)

    async def read(self, offset: int, size: int) -> bytes | None:
        nonblocking = is_nonblocking(self.nonblocking)
        reader = self._begin()
        while True:
            if self._ring is not None:
                if self._is_handed_on(self._ring, offset):
                    return None
            elif offset != self._position:
                return self._again(offset, size)
            elif data := self._next(reader, size):
                return data
            if not self._buffer.flowing:
                return b""
            if nonblocking:
                raise WouldBlock("nothing was traced yet")
            await self._wait(reader)

    # ---- with a ring

    def share(self, memory: int) -> None:
        if self._ring is None:
            self._ring = Ring(memory, self._position, b"".join(self._sent))
            self._sent.clear()

    def _is_handed_on(self, ring: Ring, offset: int) -> bool:
        if not ring.first <= offset <= ring.taken:
            raise Invalid(f"byte {offset}: {ring.taken} were read, and one can go back to {ring.first}")
        if self._failure is not None:
            raise self._failure
        self._hand_on(ring)
        return offset < ring.end

    def _hand_on(self, ring: Ring) -> None:
        """Some of what comes next, as far as there is room."""
        self._forget(ring.end - ring.taken)
        for _ in range(_PIECES_MOST):
            if not self._rest and (len(self._last) >= _PARTS_MOST or not self._fetch(self._begin(), _CHUNK)):
                return
            self._rest = self._rest[ring.put(self._rest) :]
            if self._rest:
                return
        self._token.run_sync_soon(self._read_ahead, idempotent=True)

    def _read_ahead(self) -> None:
        if self._ring is None or self._failure is not None:
            return
        try:
            self._hand_on(self._ring)
        except Exception as error:  # the next read fails with it
            log.debug("a trace is not read ahead", exc_info=error)
            self._failure = error

    # ---- without

    def _again(self, offset: int, size: int) -> bytes:
        first = self._position - self._sent_size
        if not first <= offset < self._position:
            raise Invalid(f"byte {offset}: {self._position} were read, and one can go back to {first}")
        parts = []
        for part in self._sent:
            if first + len(part) > offset and size:
                parts.append(part[max(offset - first, 0) :][:size])
                size -= len(parts[-1])
            first += len(part)
        return b"".join(parts)

    def _next(self, reader: TraceReader, size: int) -> bytes:
        """What comes next: as much as there is, up to `size` bytes."""
        self._forget(0)
        parts: list[memoryview] = []
        while size and len(parts) < _PARTS_MOST and (self._rest or self._fetch(reader, size)):
            parts.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(parts[-1])
        data = b"".join(parts)
        self._position += len(data)
        self._sent_size += len(data)
        self._sent.append(data)
        while self._sent and self._sent_size - len(self._sent[0]) >= SENT_MOST:
            self._sent_size -= len(self._sent.popleft())
        return data

    # ---- both

    def _forget(self, unread: int) -> None:
        """What was made and read: all but the last `unread` bytes, and the rest."""
        kept = unread + len(self._rest)
        while self._last and self._last_size - len(self._last[0].made) >= kept:
            self._last_size -= len(self._last.popleft().made)

    def _fetch(self, reader: TraceReader, size: int) -> bool:
        before = reader.seen
        piece: Piece | None = self._buffer.take(reader, size if self._text is None else TEXT_AT_ONCE)
        if piece is None:
            return False
        records = dropped_record(piece.lost) + piece.data if piece.lost else piece.data
        made = records
        if self._text is not None:
            lost = b"dropped %d\n" % piece.lost if piece.lost else b""
            lines = self._text.lines(piece.data)  # in any case: it says whose the next ones are
            made = lost + (lines if piece.text is None else piece.text)
        self._rest = memoryview(made)
        self._last.append(_Made(records, before + piece.lost, made, piece.cpu))
        self._last_size += len(made)
        return True

    async def _wait(self, reader: TraceReader) -> None:
        token = trio.lowlevel.current_trio_token()

        async with interruptible():
            with self.scope.waiting() as event:

                def wake() -> None:
                    try:
                        token.run_sync_soon(event.set)
                    except trio.RunFinishedError:
                        pass

                unsubscribe = self._buffer.subscribe(wake)
                try:
                    self.scope.check()
                    if not self._buffer.ready(reader) and self._buffer.flowing:
                        await event.wait()
                    self.scope.check()
                finally:
                    unsubscribe()

    async def prepare(self, text: str) -> None:
        await value_of(self.scope.learn_lines(text), self)

    def parse(self, text: str) -> Do:
        vm = self.scope.vm
        change = parse_commands("trace", text, vm.symbols.address_of)

        async def do() -> Undo:
            before = vm.trace.settings
            await self.scope.set_trace(change)
            return Undo(before, lambda old: vm.set_trace(lambda _: old), lambda: same(lambda: vm.trace.settings))

        return do

    def poll(self) -> int:
        reader = self._begin()
        there = self._unread or self._buffer.ready(reader) or not self._buffer.flowing
        return (POLL_IN if there else 0) | (POLL_OUT if self.node.kind.writable else 0)

    @property
    def _unread(self) -> int:
        """Bytes that were made, and that nobody has read."""
        return len(self._rest) + (self._ring.end - self._ring.taken if self._ring is not None else 0)

    def close(self) -> None:
        """What was not read is for the next reader: what did not fit into the last read, or was handed on."""
        self._unsubscribe()
        if self._reader is not None:
            self._buffer.close(self._reader, self._left(self._unread))
        self._ring = None

    def _left(self, size: int) -> Chunk | None:
        """The last `size` bytes of what was made, as a chunk again."""
        there = 0
        pieces: deque[_Made] = deque()
        for piece in reversed(self._last):
            if there >= size:
                break
            pieces.appendleft(piece)
            there += len(piece.made)
        if not pieces or not size:
            return None
        made = b"".join(piece.made for piece in pieces)[-size:]
        records = b"".join(piece.records for piece in pieces)
        if self._text is not None:
            return Chunk(records, pieces[0].before, made, pieces[0].cpu)
        kept = made[len(made) % RECORD.size :]  # whole records only
        if not kept:
            return None
        cpu = cpu_after(records[: -len(kept)], pieces[0].cpu)
        assert self._reader is not None
        return Chunk(kept, self._reader.seen - count(kept), None, cpu)
