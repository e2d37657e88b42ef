"""Consoles and screens: a WebSocket each, joined to a stream of the machine's.

A reader is a thread that waits in poll(2), takes at most CHUNK, and takes more when the page has that: what a slow page
has not taken waits in the machine, which drops the oldest beyond 16 MiB of it (docs/files.md, `console`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import select
import shlex
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from vmfs.commands.machines import write
from vmfs.web.gate import PROTOCOL
from vmfs.web.live import sentence
from vmfs.web.place import Place, told
from vmfs.web.threads import Refused, Threads
from vmfs.words.errors import VmfsError

PORTS = ("console", "hvc")
CHUNK = 1 << 16
LOG_MOST = 256 << 10  # of what the console has said before
STREAMS_MOST = 64
RFB_CHUNK = 1 << 18
CONNECT_SECONDS = 5.0
_AGAIN = 0.03  # seconds until what a guest did not take is tried again


class Streams:
    """All of a server's."""

    def __init__(self, place: Place, threads: Threads, sockets: Path) -> None:
        """`sockets`: a directory of this user's alone, for the sockets of screens."""
        self._place, self._threads, self._sockets = place, threads, sockets
        self._open = 0
        self._viewers: Counter[str] = Counter()

    async def console(self, page: WebSocket, machine: str, port: str) -> None:
        """The bytes of a console both ways: first what it has said, then what it says."""
        if port not in PORTS or self._open >= STREAMS_MOST:
            await page.close(1008, f"there are {STREAMS_MOST} streams already" if port in PORTS else "no such port")
            return
        await page.accept(PROTOCOL)
        self._open += 1
        try:
            fd, said = await self._threads.call(machine, lambda: _open_console(self._place.machine(machine), port))
        except (OSError, Refused) as failure:
            self._open -= 1
            await _close(page, sentence(failure))
            return
        stream = _Stream(fd, page)
        try:
            try:
                await page.send_bytes(said)  # always: what follows it is new
            finally:
                stream.start()
            await self._type(page, machine, stream)
        except (WebSocketDisconnect, RuntimeError):
            pass
        except (OSError, Refused) as failure:
            await _close(page, sentence(failure))
        finally:
            stream.end()
            self._open -= 1

    async def screen(self, page: WebSocket, machine: str) -> None:
        """RFB both ways, with the socket that the machine listens at."""
        if self._open >= STREAMS_MOST:
            await page.close(1008, f"there are {STREAMS_MOST} streams already")
            return
        await page.accept(PROTOCOL)
        self._open += 1
        self._viewers[machine] += 1
        try:
            try:
                line = await self._threads.call(machine, self._connect, machine)
            except (OSError, VmfsError, Refused) as failure:
                await _close(page, sentence(failure))
                return
            reader, writer = await asyncio.open_connection(sock=line, limit=RFB_CHUNK)
            try:
                await _carry(page, reader, writer)
            finally:
                writer.close()
        finally:
            self._open -= 1
            self._viewers[machine] -= 1
            if not self._viewers[machine]:
                del self._viewers[machine]
                with contextlib.suppress(OSError, VmfsError, Refused):  # it is gone
                    await self._threads.call(machine, self._stop_listening, machine)

    def _connect(self, machine: str) -> socket.socket:
        """To where it listens; where it does not, or nobody is there, at a socket of this server's."""
        path = self._place.machine(machine)
        where = (path / "vnc").read_text().split()[0]
        if where != "off":
            try:
                return _connected(where)
            except OSError:
                if not where.startswith("/"):
                    raise
        ours = self._socket_of(machine)
        write(path, "vnc", f"{shlex.quote(str(ours))} nopassword")
        return _connected(str(ours))

    def _socket_of(self, machine: str) -> Path:
        """A path that a socket can have."""
        return self._sockets / hashlib.blake2b(machine.encode(), digest_size=8).hexdigest()

    def _stop_listening(self, machine: str) -> None:
        """Where this server had it listen, and nobody else looks."""
        path = self._place.machine(machine)
        words = shlex.split((path / "vnc").read_text())
        if machine not in self._viewers and words[0] == str(self._socket_of(machine)) and "clients=0" in words:
            write(path, "vnc", "off")

    async def _type(self, page: WebSocket, machine: str, stream: _Stream) -> None:
        """What the page sends is typed, as fast as the guest takes it."""
        while True:
            message = await page.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes") or (message.get("text") or "").encode()
            while data:
                data = data[await self._threads.call(machine, stream.write, data) :]
                if data:
                    await asyncio.sleep(_AGAIN)


class _Stream(threading.Thread):
    """An open stream, which this thread reads for a page and closes at the end."""

    def __init__(self, fd: int, page: WebSocket) -> None:
        super().__init__(name="vmfs-web-stream", daemon=True)
        self._fd, self._page = fd, page
        self._loop = asyncio.get_running_loop()
        self._wake, self._tell = os.pipe()
        self._using = threading.Lock()
        self._ended = False

    def end(self) -> None:
        self._ended = True
        os.close(self._tell)

    def write(self, data: bytes) -> int:
        """How much of it was taken; all, once it is closed."""
        with self._using:
            if self._fd < 0:
                return len(data)
            try:
                return os.write(self._fd, data)
            except BlockingIOError:
                return 0

    def run(self) -> None:
        reason = "the machine is off"
        try:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            while not self._ended:
                if any(fd == self._wake for fd, _ in poll.poll()):
                    return
                try:
                    data = os.read(self._fd, CHUNK)
                except BlockingIOError:
                    continue
                if not data:
                    break
                asyncio.run_coroutine_threadsafe(self._page.send_bytes(data), self._loop).result()
        except OSError as failure:
            reason = sentence(failure)
        except Exception:  # the page is gone, or the loop is
            return
        finally:
            with self._using:
                fd, self._fd = self._fd, -1
            for each in (fd, self._wake):
                with contextlib.suppress(OSError):  # ENODEV of a machine that is gone: it is closed all the same
                    os.close(each)
            if not self._ended:
                with contextlib.suppress(RuntimeError):
                    asyncio.run_coroutine_threadsafe(_close(self._page, reason), self._loop)


async def _carry(page: WebSocket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes both ways, until one of the two ends. What one does not take, the other is not asked for."""

    async def up() -> None:
        while data := await reader.read(RFB_CHUNK):
            await page.send_bytes(data)
        await _close(page, "the machine has closed its screen")

    async def down() -> None:
        while (message := await page.receive())["type"] != "websocket.disconnect":
            writer.write(message.get("bytes") or b"")
            await writer.drain()

    tasks = [asyncio.create_task(up()), asyncio.create_task(down())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _connected(where: str) -> socket.socket:
    """A socket that does not block, connected to a path or HOST:PORT."""
    if where.startswith("/"):
        line = socket.socket(socket.AF_UNIX)
        to: Any = where
    else:
        host, _, port = where.rpartition(":")
        line = socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET)
        to = host.strip("[]"), int(port)
    try:
        line.settimeout(CONNECT_SECONDS)
        line.connect(to)
        line.setblocking(False)
    except BaseException:
        line.close()
        raise
    return line


async def _close(page: WebSocket, reason: str) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        await page.close(1000, reason.encode()[:120].decode(errors="ignore"))


def _open_console(machine: Path, port: str) -> tuple[int, bytes]:
    """The open stream, and what was said before it was opened."""
    log = machine / f"{port}.log"
    before = log.stat().st_size
    opened = -1
    try:
        opened = os.open(machine / port, os.O_RDWR | os.O_NONBLOCK)
        said = log.read_bytes()
        first = b""
        with contextlib.suppress(BlockingIOError):
            first = os.read(opened, CHUNK)
    except OSError as failure:
        if opened >= 0:
            os.close(opened)
        raise told(machine, failure) from None
    # What came between the opening and the reading of the log is in both.
    between = said[before:] if len(said) >= before else b""
    most = min(len(first), len(between))
    twice = next((size for size in range(most, 0, -1) if between.endswith(first[:size])), 0)
    return opened, said[-LOG_MOST:] + first[twice:]
