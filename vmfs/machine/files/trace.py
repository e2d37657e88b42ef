"""`trace` and `trace.bin`: the machine's trace as a stream, as lines or as records; switches are written to `trace`."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

import trio

from vmfs.debug.trace import TraceText, dropped_record
from vmfs.debug.trace_buffer import RECORD, Chunk, Piece, TraceReader, count
from vmfs.machine.files.commands import parse_commands
from vmfs.machine.files.handles import POLL_IN, POLL_OUT, File, Handle, Kind
from vmfs.machine.files.lines import Do, LineHandle, Undo, same
from vmfs.machine.files.request import interruptible, is_nonblocking
from vmfs.words.commands import AHEAD_MOST
from vmfs.words.errors import EngineFailed, Invalid, WouldBlock

SENT_MOST = 128 << 10  # of what was read, for programs that read ahead and seek back: bash's `read`, head(1)
_PARTS_MOST = 1000  # of a read: what one pwritev(2) takes (IOV_MAX is 1024)
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


class _TraceHandle(LineHandle):
    """A reader from when it was opened, or, when it was opened for writing, too, from its first read. While tracing is
    off, a reader that has read all gets the end of the file."""

    whole = True

    def __init__(self, node: File, nonblocking: bool, binary: bool, *, reads: bool) -> None:
        super().__init__(node, nonblocking, writing=not reads)
        self._buffer = self.scope.vm.trace.buffer
        self._text = None if binary else TraceText(lambda: self.scope.vm.symbols)
        self._rest = b""  # of the last piece, what did not fit into the read
        self._last: deque[_Made] = deque()  # what the last read is made of, and `_rest`
        self._position = 0  # how much was read
        self._sent: deque[bytes] = deque()  # the end of that
        self._sent_size = 0
        self._shared = -1  # memory, for reads ahead
        self._reader: TraceReader | None = None
        self._unsubscribe = lambda: None
        if reads:
            self._begin()

    def _begin(self) -> TraceReader:
        if self._reader is None:
            self._reader = self._buffer.open()
            self._unsubscribe = self._buffer.subscribe(self.scope.changed)
        return self._reader

    async def read(self, offset: int, size: int) -> bytes:
        if offset != self._position:
            return self._again(offset, size)
        parts = await self._next(size)
        self._was_read(parts)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def share(self) -> int:
        if self._shared < 0:
            await self.scope.budget.hold(self, 2 * AHEAD_MOST)  # and what may be read again
            self._shared = os.memfd_create("vmfs-ahead", os.MFD_CLOEXEC)
            os.ftruncate(self._shared, AHEAD_MOST)
        return self._shared

    async def read_ahead(self, offset: int) -> int | None:
        if offset != self._position or self._shared < 0:
            return None
        parts = await self._next(AHEAD_MOST)
        done = sum(map(len, parts))
        if os.pwritev(self._shared, parts, 0) != done:
            raise EngineFailed("the memory for what is read ahead is gone")
        self._was_read(parts)
        return done

    def _was_read(self, parts: list[bytes]) -> None:
        for part in parts:
            self._position += len(part)
            self._sent_size += len(part)
            self._sent.append(part)
        most = SENT_MOST if self._shared < 0 else SENT_MOST + AHEAD_MOST
        while self._sent and self._sent_size - len(self._sent[0]) >= most:
            self._sent_size -= len(self._sent.popleft())

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

    async def _next(self, size: int) -> list[bytes]:
        """What comes next, in parts: as much as there is, up to `size` bytes; none at the end."""
        nonblocking = is_nonblocking(self.nonblocking)
        reader = self._begin()
        while len(self._last) > bool(self._rest):
            self._last.popleft()
        parts: list[bytes] = []
        room = size
        while room and len(parts) < _PARTS_MOST:
            if not self._rest and not self._fetch(reader, room):
                if parts or not self._buffer.flowing:
                    break
                if nonblocking:
                    raise WouldBlock("nothing was traced yet")
                await self._wait(reader)
                continue
            parts.append(self._rest[:room])
            self._rest = self._rest[room:]
            room -= len(parts[-1])
        return parts

    def _fetch(self, reader: TraceReader, size: int) -> bool:
        before = reader.seen
        piece: Piece | None = self._buffer.take(reader, size if self._text is None else TEXT_AT_ONCE)
        if piece is None:
            return False
        records = dropped_record(piece.lost) + piece.data if piece.lost else piece.data
        if self._text is None:
            self._rest = records
        else:
            lost = b"dropped %d\n" % piece.lost if piece.lost else b""
            made = self._text.lines(piece.data) if piece.text is None else piece.text
            self._rest = lost + made
        self._last.append(_Made(records, before + piece.lost, self._rest))
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
        there = self._rest or self._buffer.ready(reader) or not self._buffer.flowing
        return (POLL_IN if there else 0) | (POLL_OUT if self.node.kind.writable else 0)

    def close(self) -> None:
        """What was not read is for the next reader: what did not fit into the last read, or was read ahead."""
        self._unsubscribe()
        if self._reader is not None:
            self._buffer.close(self._reader, self._left(self.unread + len(self._rest)))
        if self._shared >= 0:
            os.close(self._shared)
            self.scope.budget.drop(self)

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
            return Chunk(records, pieces[0].before, made)
        kept = made[len(made) % RECORD :]  # whole records only
        return Chunk(kept, pieces[0].before + count(records) - count(kept)) if kept else None
