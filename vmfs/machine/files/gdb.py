"""`gdb`, by which a gdb may connect to a socket, and `gdb.stream`, over which it speaks without one."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shlex
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from vmfs.machine.files.handles import POLL_IN, POLL_OUT, File, Handle, Kind, Scope
from vmfs.machine.files.listening import ListeningFile, Place, Where, parse_address
from vmfs.machine.files.request import current, interruptible, is_nonblocking
from vmfs.machine.files.waiting import finished
from vmfs.machine.gdb import handover
from vmfs.machine.gdb.packets import Decoder, Packet, frame
from vmfs.machine.gdb.server import Gdb, Words
from vmfs.machine.gdb.stub import parse_layout
from vmfs.machine.machine import Vm
from vmfs.words.errors import Busy, Gone, Invalid, VmfsError, WouldBlock

log = logging.getLogger(__name__)

T = TypeVar("T")

_USAGE = "`off`, or HOST:PORT or a socket's path, and then a layout (x86-64, i386, i8086) or `linear`"
_OFFER_SECONDS = 10.0  # that a program has to hand its socket over
_SECRET_SECONDS = 1.0  # and a connection to say that it is the one


class GdbPort:
    """A machine's gdb, and where it is listened for. What a stub needs of the files."""

    def __init__(self, scope: Any, monitor: Callable[[Any, str], Awaitable[str]]) -> None:
        self.vm: Vm = scope.vm
        self.gdb = Gdb(self)
        self._scope = scope
        self._monitor = monitor
        self._place = Place(scope, "gdb", self.gdb.serve)
        self._changing = trio.Lock()

    # What a session asks for, in its thread; a machine that is removed ends it with a cancellation.

    def change_memory(self, change: Callable[[], Future[None]]) -> None:
        trio.from_thread.run(self._change_memory, change)

    async def _change_memory(self, change: Callable[[], Future[None]]) -> None:
        async with self._scope.memory.change():
            future = change()
            await finished(future, self._scope)
            future.result()

    def command(self, text: str) -> str:
        return trio.from_thread.run(self._monitor, self._scope, text)

    def complain(self, sentence: str) -> None:
        trio.from_thread.run_sync(self._scope.complain, sentence)

    # ---- where it is listened for

    @property
    def scope(self) -> Scope:
        return self._scope

    def text(self) -> str:
        """The `gdb` file."""
        if self._place.address is None:
            return "off\n"
        name, linear = self.gdb.words
        words = [self._place.address, *([name] if name else []), *(["linear"] if linear else [])]
        return " ".join(words) + "\n"

    async def set(self, asked: Asked) -> None:
        """What was written to it. When it fails, what was before stays."""
        async with self._changing:
            if asked.where is None:
                await self._place.leave()
            else:
                await self._place.listen(asked.where)
                self.gdb.words = asked.words


@dataclass(frozen=True, slots=True)
class Asked:
    """What the `gdb` file is told: where to listen (None: nowhere), and for which layout."""

    where: Where | None
    words: Words = ("", False)


def parse_gdb(text: str) -> Asked:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Invalid(f"gdb: {error}") from None
    if not words:
        raise Invalid(f"gdb: it is {_USAGE}")
    address, *rest = words
    if address == "off":
        if rest:
            raise Invalid("gdb: nothing follows `off`")
        return Asked(None)
    return Asked(parse_address(address, "gdb", _USAGE), parse_layout(rest))


def _no_socket(what: str, error: OSError) -> VmfsError:
    failure = VmfsError(f"gdb: {what}: {os.strerror(error.errno or 5)}")
    failure.errno = error.errno or 5
    return failure


# ---- gdb


def gdb_file() -> ListeningFile:
    """`gdb`."""
    return ListeningFile("gdb", parse_gdb)


# ---- gdb.stream


@dataclass(frozen=True)
class GdbStream(Kind):
    """`gdb.stream`: opened for reading and writing, it is a connection of gdb's."""

    writable = True
    reading_acts = True
    walked = False

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _StreamHandle(node, nonblocking, writing)


class _StreamHandle(Handle):
    """The session begins with the first write, and ends with the close or when the stub ends it: then reads return
    the end of the file. A first write that is vmfs's own packet asks for the way to hand over a socket instead."""

    def __init__(self, node: File, nonblocking: bool, writing: bool) -> None:
        super().__init__(node, nonblocking)
        request = current()
        self._uid = None if request is None else request.uid  # of the process that opened it
        self._writing = writing
        self._line: socket.socket | None = None  # to the session
        self._answer = b""  # to what was asked instead

    async def write(self, offset: int, data: bytes) -> int:
        if self._line is None:
            if not await self.scope.gdb.gdb.is_free():
                raise Busy("another gdb is connected to this machine")
            words = _asked(data)
            if words is not None:
                await self._offer(words)
                return len(data)
            self._begin()
        assert self._line is not None
        line = self._line
        try:
            return await self._done(lambda: line.send(data), trio.lowlevel.wait_writable)
        except trio.WouldBlock:
            raise WouldBlock("what was sent before is not answered yet") from None
        except OSError:
            raise Gone("the session has ended") from None

    async def read(self, offset: int, size: int) -> bytes:
        if not self._writing:
            raise Invalid("gdb.stream is opened for reading and writing")
        if self._line is None:
            if not self._answer:
                raise Invalid("gdb.stream: a gdb writes first")
            data, self._answer = self._answer[:size], self._answer[size:]
            return data
        line = self._line
        try:
            return await self._done(lambda: line.recv(size), trio.lowlevel.wait_readable)
        except trio.WouldBlock:
            raise WouldBlock("there is no answer yet") from None
        except OSError:
            return b""

    async def _done(self, act: Callable[[], T], wait: Callable[[socket.socket], Awaitable[None]]) -> T:
        assert self._line is not None
        while True:
            try:
                return act()
            except BlockingIOError:
                if is_nonblocking(self.nonblocking):
                    raise trio.WouldBlock from None
            async with interruptible():
                await wait(self._line)

    def poll(self) -> int:
        if self._line is None:
            return POLL_OUT | (POLL_IN if self._answer else 0)
        asking = select.poll()
        asking.register(self._line, select.POLLIN | select.POLLOUT)
        found = sum(events for _, events in asking.poll(0))
        return (POLL_IN if found & ~select.POLLOUT else 0) | (POLL_OUT if found & select.POLLOUT else 0)

    def close(self) -> None:
        if self._line is not None:
            trio.lowlevel.notify_closing(self._line)
            self._line.close()

    def _begin(self) -> None:
        try:
            self._line, its = socket.socketpair()
        except OSError as error:
            raise _no_socket("a socket for the session", error) from None
        self._line.setblocking(False)
        token = trio.lowlevel.current_trio_token()

        def moved() -> None:
            if self.scope.watched(self):
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(self.scope.wake, idempotent=True)

        async def serve() -> None:
            try:
                await self.scope.gdb.gdb.serve(its, moved=moved)
            finally:
                its.close()
                moved()

        trio.lowlevel.spawn_system_task(self._guarded, serve)

    async def _offer(self, words: Words) -> None:
        offer = await trio.to_thread.run_sync(handover.Offer, self.scope.door.listen)
        self._answer = frame(offer.text)
        trio.lowlevel.spawn_system_task(self._guarded, lambda: self._take(offer, words))

    async def _take(self, offer: handover.Offer, words: Words) -> None:
        """A session over the socket that is handed over; it ends with its program, too."""
        taken = None
        with offer.listening, trio.move_on_after(_OFFER_SECONDS):
            taken = await self._handed_over(offer)
        if taken is None:
            return
        connection, line = taken
        with connection, line:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_readable, connection, nursery.cancel_scope)
                await self.scope.gdb.gdb.serve(line, words)
                nursery.cancel_scope.cancel()

    async def _handed_over(self, offer: handover.Offer) -> tuple[socket.socket, socket.socket] | None:
        while True:
            await trio.lowlevel.wait_readable(offer.listening)
            try:
                connection, _ = offer.listening.accept()
            except OSError:  # no descriptors
                return None
            line = None
            try:
                if self._uid is None or handover.peer_of(connection) in (self._uid, 0):
                    with trio.move_on_after(_SECRET_SECONDS):
                        await trio.lowlevel.wait_readable(connection)
                    line = offer.take(connection)
            finally:
                if line is None:
                    connection.close()
            if line is not None:
                return connection, line

    async def _guarded(self, serve: Callable[[], Awaitable[None]]) -> None:
        """To its end, or the machine's."""
        try:
            with self.scope.waiting() as event:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_at, event, nursery.cancel_scope)
                    if not self.scope.removed:
                        await serve()
                    nursery.cancel_scope.cancel()
        except Exception:
            log.exception("gdb.stream failed")


def _asked(data: bytes) -> Words | None:
    """Of the packet that asks for the way to hand over a socket: how registers shall be described. Invalid for
    what is no layout."""
    first = next(Decoder().feed(data), None) if data.startswith(b"$") else None
    if not isinstance(first, Packet):
        return None
    name, _, words = first.payload.partition(b":")
    if name != handover.QUERY:
        return None
    return parse_layout([word for word in words.decode("ascii", "replace").split(",") if word])


async def _cancel_at(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _cancel_when_readable(connection: socket.socket, scope: trio.CancelScope) -> None:
    """Nothing is said over it: it has ended then."""
    await trio.lowlevel.wait_readable(connection)
    scope.cancel()
