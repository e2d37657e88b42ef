"""The kinds of files, as names: what their machine answers, and the few that the server answers by itself.

(`mapped.py` has those that the kernel serves.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.fs.hooks import _fuse
from vmfs.fs.inodes import POLL_ERR, POLL_HUP, POLL_IN, POLL_PRI, File, Handle, Kind
from vmfs.fs.interrupts import interruptible
from vmfs.fs.lane import STILL, keep_closing
from vmfs.fs.ring import Ring
from vmfs.host.credentials import Credentials, credentials_of
from vmfs.host.process import Asker, CallFailed, MachineProcess
from vmfs.words import commands
from vmfs.words.commands import ANY_FLAGS, DATA_MOST, Message
from vmfs.words.errors import Busy, Gone, Interrupted, Invalid, LimitReached, ProcessFailed

log = logging.getLogger(__name__)

# How long a machine may take to answer a call whose caller was signalled: its guest has to stop first.
INTERRUPT_SECONDS = 2.0
_SPARSE = 1 << 20  # bytes of a file of which programs may ask where it has data
_LARGE = 64 << 10  # bytes: what programs read that want all of a stream


async def call(
    machine: MachineProcess, make: Callable[[int], Message], pid: int, asker: Asker | None = None
) -> Any:
    """`MachineProcess.call`, for a caller of the mount: a signal to it ends the call, and no user may have too many."""
    with counted(machine), trio.CancelScope() as limit:
        number = 0

        def stop() -> None:
            limit.deadline = trio.current_time() + INTERRUPT_SECONDS
            if number:
                machine.interrupt(number)

        def began(at: int) -> None:
            nonlocal number
            number = at
            if caller.interrupted:
                machine.interrupt(number)

        async with interruptible(pid, stop=stop) as caller:
            return await machine.call(make, asker=asker, began=began)
    raise Interrupted("a signal came for the caller, and the machine does not answer")


@contextlib.contextmanager
def counted(machine: MachineProcess) -> Iterator[None]:
    """While a caller of the mount waits for the machine: WouldBlock where its user has as many that wait as may."""
    request = _fuse.current_request()
    uid = request.uid if request is not None else machine.owner.uid
    machine.host.begin_call(uid)
    try:
        yield
    finally:
        machine.host.end_call(uid)


@dataclass(frozen=True)
class Served(Kind):
    """The machine's process answers. `acts`: a read changes the machine. `asks_host`: what is written may name what of
    the host is opened for the opener of the file. `when_failed`: what a read gets of a machine whose process has
    failed."""

    readable: bool = True  # type: ignore[assignment]
    writable: bool = False  # type: ignore[assignment]
    sized: bool = True  # type: ignore[assignment]
    acts: bool = False
    walked: bool = True  # type: ignore[assignment]
    asks_host: bool = False
    when_failed: str = ""
    only_shows: bool = False  # type: ignore[assignment]
    hot: bool = False  # programs read it in loops: the lane answers it where it can
    ahead: bool = False  # a stream that is read by offsets, and much of it: its machine hands it on by a ring

    @property
    def reading_acts(self) -> bool:  # type: ignore[override]
        return self.acts

    def stands_since(self, node: File) -> object | None:
        return node.scope.lane.still() if self.hot and node.path in STILL else None

    async def open(self, node: File, pid: int, flags: int, uid: int, walking: bool) -> Handle:
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        who = credentials_of(pid) if self.asks_host and writing else None
        handle = self.handle(node, pid, who)
        await handle.begin(flags, uid, walking)
        return handle

    def handle(self, node: File, pid: int, who: Credentials | None) -> ServedHandle:
        return ServedHandle(node, pid, who)

    async def truncate(self, node: File, size: int, opened: bool) -> None:
        machine: MachineProcess = node.scope.machine
        await call(machine, lambda at: commands.Truncate(at, node.path, size, opened), 0)


class ServedHandle(Handle):
    """An open file of the machine's process, by its number there."""

    def __init__(self, node: File, pid: int, who: Credentials | None) -> None:
        super().__init__(node, pid)
        self._machine: MachineProcess = node.scope.machine
        self._asker = Asker(who) if who is not None else None
        self._hot = 0  # the same, where the lane answers it; 0: it does not
        self._may_be_hot = False
        self._is_written = False
        self._number = 0  # of the file in the machine's process; 0: there is none (yet), or `when_failed` is shown
        self._open: Callable[[int], Message] | None = None  # what is asked for that there is one; None: no more
        self._opening = trio.Lock()
        self._flushes = False  # a close has something to do there
        self._end = 0  # where what was read ends; 0: not known
        self._ring: Ring | None = None
        self._may_have_ring = node.kind.ahead
        self._file = 0  # its number in the mount

    async def begin(self, flags: int, uid: int, walking: bool) -> None:
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if self._machine.failure and self.node.kind.when_failed and not writing:
            return
        self._is_written = writing
        nonblocking, appending = bool(flags & os.O_NONBLOCK), bool(flags & os.O_APPEND)
        self._open = lambda at: commands.Open(at, self.node.path, writing, nonblocking, appending, walking, uid)
        is_hot = self.node.kind.hot and not walking
        # What the lane reads the machine need not hear of, until something is to be read that the lane does not have.
        if not (is_hot and not writing and self.node.path in STILL and self.scope.lane.is_ready):
            await self._be_open()
        if is_hot:
            self.scope.lane.used()
        elif self._may_have_ring and not walking:
            self.scope.lane.prepare()

    async def _be_open(self) -> None:
        """Be an open file of the machine's process."""
        if self._open is None:
            return
        async with self._opening:
            if self._open is None:  # meanwhile
                return
            try:
                answer = await call(self._machine, self._open, self.pid, self._asker)
            except ProcessFailed:
                if self.node.kind.when_failed and not self._is_written:
                    self._open = None
                    return
                raise
            self._number, self.tells_closing, self._open = answer.handle, answer.tells_closing, None
        if answer.memory >= 0:
            try:
                self.opened(self._machine.open_memory(answer.memory))
            except BaseException:
                self.close()
                raise

    def opened(self, memory: int) -> None:
        """It is a file whose memory that is, a descriptor that is the handle's now."""
        os.close(memory)

    def numbered(self, number: int) -> None:
        self._file = number
        self._tell_closing(not self._flushes)
        self._may_be_hot = self.node.kind.hot and not self.walking and (self._number or self._open is not None)
        self._be_hot()

    def _tell_closing(self, nothing: bool) -> None:
        """Say whether a close has nothing to do."""
        if self.tells_closing and self._file:
            keep_closing(self._file, nothing)

    def _be_hot(self) -> None:
        """Have the lane answer it, where it can."""
        number = self._file
        may = self._may_be_hot and not self._hot
        if may and self.scope.lane.add(number, self.node.path, self._number, self._is_written):
            self._hot = number

    async def read(self, offset: int, size: int) -> bytes:
        if self._failed():
            return self.node.kind.when_failed.encode()[offset : offset + size]
        if offset >= self._end > 0:
            return b""
        if self._ring is not None and (data := self._ring.read(offset, size)):
            return data
        flags = _file_flags()
        try:
            await self._be_open()
            if size >= _LARGE and self._may_have_ring and not self.walking:
                self._share()
            answer = await call(
                self._machine,
                lambda at: commands.Read(at, self._number, offset, min(size, DATA_MOST), flags),
                self.pid,
                self._asker,
            )
        except ProcessFailed:
            if self._failed():  # meanwhile
                return self.node.kind.when_failed.encode()[offset : offset + size]
            raise
        if isinstance(answer, commands.Placed):
            return self._placed(offset, size)
        self._used()
        data = answer.data[:size]
        self._end = offset + len(data) if answer.number else 0
        return data

    def _used(self) -> None:
        if self._may_be_hot and not self._hot:
            self.scope.lane.used()
            self._be_hot()

    def _share(self) -> None:
        """Have what comes next in a ring, where there can be one."""
        self._may_have_ring = False
        try:
            ring = Ring(self._machine)
        except LimitReached as error:  # then it is read as ever
            log.debug("%s is not read ahead: %s", self.node.name, error)
            return
        if ring.share(self._number):
            self._ring = ring
        else:
            ring.close()
            self._may_have_ring = True

    def _placed(self, offset: int, size: int) -> bytes:
        """What is asked for is in the ring."""
        if self._ring is None:
            raise ProcessFailed("the machine's process hands on what it was not asked for")
        if not self._ring.has_begun:
            self._ring.begin()
            if self.scope.lane.add_stream(self._file, self.node.path, self._ring):
                self._hot = self._file
        if not (data := self._ring.read(offset, size)):
            raise Invalid(f"byte {offset}: another read has taken what was there")
        return data

    async def write(self, offset: int, data: bytes) -> int:
        """In pieces, as a message has room for: one write of a text is never so long."""
        flags = _file_flags()
        done = 0
        self._tell_closing(False)
        while True:
            piece = bytes(data[done : done + DATA_MOST])
            if self._asker is not None:
                self._asker.says(piece)
            at_offset = offset + done
            try:
                answer = await call(
                    self._machine,
                    lambda at, data=piece, to=at_offset: commands.Write(at, self._number, to, data, flags),
                    self.pid,
                    self._asker,
                )
            except CallFailed as error:
                self.unsaved, self.waits, self._flushes = error.unsaved, False, True
                raise
            self.unsaved, self.waits = answer.unsaved, answer.waits
            self._flushes = answer.unsaved or answer.waits
            done += max(min(answer.number, len(piece)), 0)
            if done >= len(data) or answer.number < len(piece):
                self._used()
                self._tell_closing(not self._flushes)
                return done

    async def flush(self) -> None:
        if not self._flushes or not self._number or self._machine.failure or self.scope.removed:
            return
        self._flushes = False
        self.unsaved = self.waits = False
        await call(self._machine, lambda at: commands.Flush(at, self._number), self.pid, self._asker)

    async def poll(self, waker: Any) -> int:
        try:
            await self._be_open()
        except (Gone, ProcessFailed):
            return POLL_ERR | POLL_HUP | POLL_IN
        if waker is not None:  # before asking, so that a change in between is not lost
            self.scope.watch(self._number, waker)
        if self._failed():
            return POLL_IN | POLL_PRI
        if self._machine.failure or not self._number:
            return POLL_ERR | POLL_HUP | POLL_IN
        seen = self.scope.lane.seen(self._hot) if self._hot else 0
        try:
            answer = await call(
                self._machine, lambda at: commands.Poll(at, self._number, waker is not None, seen), self.pid
            )
        except Gone:
            return POLL_ERR | POLL_HUP | POLL_IN
        return answer.number & 0xFFFF

    def close(self) -> None:
        self._tell_closing(False)
        if self._hot:
            self.scope.lane.forget(self._hot)
        if self._ring is not None:
            self._ring.close()
        if self._number:
            self.scope.unwatch(self._number)
            self._machine.tell(commands.Close(self._number), at_once=False)

    def _failed(self) -> bool:
        return bool(self._machine.failure and self.node.kind.when_failed)


def _file_flags() -> int:
    request = _fuse.current_request()
    return ANY_FLAGS if request is None else request.file_flags


@dataclass(frozen=True)
class Sparse(Served):
    """Programs may ask where it has data."""

    def handle(self, node: File, pid: int, who: Credentials | None) -> ServedHandle:
        return _SparseHandle(node, pid, who)


class _SparseHandle(ServedHandle):
    _extents = b""  # its size, and where it has data

    async def begin(self, flags: int, uid: int, walking: bool) -> None:
        await super().begin(flags, uid, walking)
        size, _ = self.node.size
        if size >= _SPARSE and self._number:
            found = await call(self._machine, lambda at: commands.Extents(at, self._number), self.pid)
            self._extents = size.to_bytes(8, sys.byteorder) + found.data

    def numbered(self, number: int) -> None:
        super().numbered(number)
        if self._extents:
            _fuse.set_extents(number, self._extents)

    def close(self) -> None:
        if self._extents:
            _fuse.set_extents(self._file, None)
        super().close()


@dataclass(frozen=True)
class Kept(Served):
    """What nobody changes any more: the kernel may keep what it has read, and map it."""

    dated: bool = False  # type: ignore[assignment]
    lasting: bool = True  # type: ignore[assignment]

    def handle(self, node: File, pid: int, who: Credentials | None) -> ServedHandle:
        return _KeptHandle(node, pid, who)


class _KeptHandle(_SparseHandle):
    direct_io, keep_cache = False, True

    async def read(self, offset: int, size: int) -> bytes:
        """All of it: the kernel's cache takes less for the end of the file."""
        data = b""
        while len(data) < size and (more := await super().read(offset + len(data), size - len(data))):
            data += more
        return data


@dataclass(frozen=True)
class History(Served):
    """`history`: what is switched on by it needs RAM to be the machine's alone."""

    writable: bool = True  # type: ignore[assignment]

    def handle(self, node: File, pid: int, who: Credentials | None) -> ServedHandle:
        return _HistoryHandle(node, pid, who)


class _HistoryHandle(ServedHandle):
    async def write(self, offset: int, data: bytes) -> int:
        if data.split()[:1] != [b"off"] and not self.scope.memory.leave_to_machine():
            raise Busy("history: a program has `mem` open or mapped, and would write it unseen: close it first")
        return await super().write(offset, data)


# ---- what the server knows


@dataclass(frozen=True)
class Stat(Served):
    """`stat`: what the machine counts, and how the server serves it."""

    def handle(self, node: File, pid: int, who: Credentials | None) -> ServedHandle:
        return _StatHandle(node, pid, who)

    def added_size(self, node: File) -> int:
        return len(_facts(node.scope))


def _facts(scope: Any) -> bytes:
    return "".join(f"{key} {value}\n" for key, value in scope.facts().items()).encode()


class _StatHandle(ServedHandle):
    _snapshot = b""

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0 or not self._snapshot:
            self._snapshot = await super().read(0, DATA_MOST) + _facts(self.scope)
        return self._snapshot[offset : offset + size]


@dataclass(frozen=True)
class LocalText(Kind):
    """A text of the server's own."""

    get: Callable[[Any], str]
    sized = True

    async def open(self, node: File, pid: int, flags: int, uid: int, walking: bool) -> Handle:
        return _LocalTextHandle(node, pid)

    def local_size(self, node: File) -> tuple[int, int]:
        return len(self.get(node.scope).encode()), 0


class _LocalTextHandle(Handle):
    """A read from offset 0 takes a snapshot, others go on in it."""

    _snapshot: bytes | None = None

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0 or self._snapshot is None:
            self._snapshot = self.node.kind.get(self.scope).encode()
        return self._snapshot[offset : offset + size]
