"""Where a machine listens for connections: an address or a socket's path, which a line in a file of its has named."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.machine.files.handles import File, Handle, Kind
from vmfs.machine.files.lines import Do, LineHandle
from vmfs.words.door import Door
from vmfs.words.errors import Invalid, VmfsError, known

log = logging.getLogger(__name__)

Where = str | tuple[str, int]  # a socket's path, or a numerical host and a port

_TCP = re.compile(r"(?:(?P<host>\[[0-9A-Fa-f:.]+\]|[0-9.]+|localhost)?:)?(?P<port>[0-9]{1,5})")
_LOOPBACK = "127.0.0.1"
_PATH_MOST = 107  # bytes of struct sockaddr_un's path, without its NUL
_ACCEPT_AGAIN_SECONDS = 0.1


def parse_address(text: str, what: str, usage: str) -> Where:
    """`/a/path`, `127.0.0.1:1234`, `[::1]:1234`, `:1234` and `1234`, which are on this host only. `what`: the file."""
    if text.startswith("/"):
        if len(os.fsencode(text)) > _PATH_MOST:
            raise Invalid(f"{what}: the path of a socket has at most {_PATH_MOST} bytes")
        return text
    found = _TCP.fullmatch(text)
    if not found or int(found["port"]) > 0xFFFF:
        raise Invalid(f"{what}: {text[:60]!r} is no address: it is {usage}")
    host = found["host"] or _LOOPBACK
    host = _LOOPBACK if host == "localhost" else host.strip("[]")
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        raise Invalid(f"{what}: {host!r} is no numerical address") from None
    return host, int(found["port"])


def is_loopback(where: Where) -> bool:
    """Whether only this host reaches it."""
    return isinstance(where, str) or where[0].startswith("127.") or where[0] == "::1"


class Place:
    """Where it listens, if anywhere. `serve(connection)` is called for each, as a task of its own, and is cancelled
    when it listens there no more; the connection is closed afterwards."""

    def __init__(self, scope: Any, what: str, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._scope = scope
        self._what = what
        self._serve_one = serve
        self._listener: _Listener | None = None

    @property
    def address(self) -> str | None:
        return None if self._listener is None else self._listener.address

    async def listen(self, where: Where) -> None:
        """There, and no more where it was before. When it fails, what was before stays."""
        if self._listener is not None and self._listener.where == where:
            await self.leave()  # the same place again
        listener = await trio.to_thread.run_sync(_Listener, self._scope.door, where, self._what)
        await self.leave()
        if self._scope.removed:
            await trio.to_thread.run_sync(listener.close)
        self._scope.check()
        self._listener = listener
        trio.lowlevel.spawn_system_task(self._serve, listener)

    async def leave(self) -> None:
        """Listen nowhere: all connections have ended when this returns."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.ended.set()
            await listener.gone.wait()

    async def _serve(self, listener: _Listener) -> None:
        try:
            with self._scope.waiting() as event:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_when, listener.ended, event)
                    nursery.start_soon(self._accept, listener, nursery)
                    if not self._scope.removed:
                        await event.wait()
                    nursery.cancel_scope.cancel()
        except Exception:
            log.exception("%s: the listener failed", self._what)
        finally:
            if self._listener is listener:
                self._listener = None
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(listener.close)
            listener.gone.set()

    async def _accept(self, listener: _Listener, nursery: trio.Nursery) -> None:
        """Connections, until this is cancelled. One for which there is no descriptor waits."""
        while True:
            await listener.wait()
            try:
                nursery.start_soon(self._connected, listener.accept())
            except (BlockingIOError, ConnectionAbortedError):  # it has gone again
                continue
            except OSError as error:
                if (failure := known(error)) is error:
                    raise
                log.warning("%s: a connection has to wait: %s", self._what, failure)
                await trio.sleep(_ACCEPT_AGAIN_SECONDS)

    async def _connected(self, line: socket.socket) -> None:
        with line:
            await self._serve_one(line)


async def _when(one: trio.Event, other: trio.Event) -> None:
    await one.wait()
    other.set()


class _Listener:
    """A socket that listens, got through the door. Blocks when it is made and closed."""

    def __init__(self, door: Door, where: Where, what: str) -> None:
        self.ended = trio.Event()
        self.gone = trio.Event()
        self._door = door
        try:
            there = door.listen(where)
        except VmfsError as error:
            failure = VmfsError(f"{what}: {error}")
            failure.errno = error.errno
            raise failure from None
        self._socket = socket.socket(fileno=there.fd)
        self._socket.setblocking(False)
        self.where = where if isinstance(where, str) else (where[0], there.port)  # with the port that it has

    @property
    def address(self) -> str:
        """As it is written."""
        if isinstance(self.where, str):
            return shlex.quote(self.where)
        host, port = self.where
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def wait(self) -> None:
        """Until a connection may wait to be accepted."""
        await trio.lowlevel.wait_readable(self._socket)

    def accept(self) -> socket.socket:
        """BlockingIOError where there is none."""
        return self._socket.accept()[0]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()
        if isinstance(self.where, str):
            with contextlib.suppress(VmfsError):
                self._door.unlink(self.where)


@dataclass(frozen=True)
class ListeningFile(Kind):
    """A file whose line says where the scope's attribute `name` is to listen. `parse` makes of a line what its `set`
    takes; `text()` of it is what the file says."""

    name: str
    parse: Callable[[str], Any]
    writable = True

    def size(self, scope: Any) -> int:
        return len(getattr(scope, self.name).text().encode())

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _Handle(node, nonblocking, writing, self)


class _Handle(LineHandle):
    def __init__(self, node: File, nonblocking: bool, writing: bool, kind: ListeningFile) -> None:
        super().__init__(node, nonblocking, writing)
        self._listens, self._parse = getattr(self.scope, kind.name), kind.parse
        self._snapshot = b""

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0:
            self._snapshot = self._listens.text().encode()
        return self._snapshot[offset : offset + size]

    def parse(self, text: str) -> Do:
        asked = self._parse(text)
        return lambda: self._listens.set(asked)
