"""`trace` and `trace.bin`: the machine's trace as a stream, as lines or as records; switches are written to `trace`."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from vmfs.debug.trace import TraceText, dropped_record
from vmfs.debug.trace_buffer import RECORD, Chunk, Piece, TraceReader, count
from vmfs.machine.files.commands import parse_commands
from vmfs.machine.files.handles import POLL_IN, POLL_OUT, File, Handle, Kind
from vmfs.machine.files.lines import Do, LineHandle, Undo, same
from vmfs.machine.files.request import interruptible, is_nonblocking
from vmfs.words.errors import Invalid, WouldBlock

SENT_MOST = 128 << 10  # of what was read, for programs that read ahead and seek back: bash's `read`, head(1)
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


class _TraceHandle(LineHandle):
    """A reader from when it was opened, or, when it was opened for writing, too, from its first read. While tracing is
    off, a reader that has read all gets the end of the file."""

    whole = True

    def __init__(self, node: File, nonblocking: bool, binary: bool, *, reads: bool) -> None:
        super().__init__(node, nonblocking, writing=not reads)
        self._buffer = self.scope.vm.trace.buffer
        self._text = None if binary else TraceText(lambda: self.scope.vm.symbols)
        self._rest = b""  # of `_last`, what did not fit into the read
        self._last: Chunk | None = None
        self._position = 0  # how much was read
        self._sent = b""  # the end of that
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
        data = await self._next(size)
        self._position += len(data)
        self._sent = (self._sent + data)[-SENT_MOST:] if len(data) < SENT_MOST else data[-SENT_MOST:]
        return data

    def _again(self, offset: int, size: int) -> bytes:
        first = self._position - len(self._sent)
        if not first <= offset < self._position:
            raise Invalid(f"byte {offset}: {self._position} were read, and one can go back to {first}")
        return self._sent[offset - first : offset - first + size]

    async def _next(self, size: int) -> bytes:
        nonblocking = is_nonblocking(self.nonblocking)
        reader = self._begin()
        parts, room = [], size
        while room:
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
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fetch(self, reader: TraceReader, size: int) -> bool:
        before = reader.seen
        piece: Piece | None = self._buffer.take(reader, size if self._text is None else TEXT_AT_ONCE)
        if piece is None:
            return False
        if self._text is None:
            lost = dropped_record(piece.lost) if piece.lost else b""
            self._rest = lost + piece.data
        else:
            lost = b"dropped %d\n" % piece.lost if piece.lost else b""
            made = self._text.lines(piece.data)
            self._rest = lost + (made if piece.text is None else piece.text)
        self._last = Chunk(piece.data, before + piece.lost, None)
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
        """What did not fit into the last read is for the next reader."""
        self._unsubscribe()
        if self._reader is not None:
            self._buffer.close(self._reader, self._unread())

    def _unread(self) -> Chunk | None:
        last = self._last
        if not self._rest or last is None:
            return None
        if self._text is not None:
            return Chunk(last.data, last.before, self._rest)
        size = min(len(self._rest) // RECORD * RECORD, len(last.data))  # whole records only
        done = len(last.data) - size
        return Chunk(last.data[done:], last.before + count(last.data[:done])) if size else None
