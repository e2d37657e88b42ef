"""Consoles and screens: a WebSocket each, joined to a stream of the machine's.

A reader is a thread that waits in poll(2), takes at most CHUNK, and takes more when the page has that: what a slow page
has not taken waits in the machine, which drops the oldest beyond 16 MiB of it (docs/files.md, `console`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
from pathlib import Path

from starlette.websockets import WebSocket, WebSocketDisconnect

from vmfs.web.gate import PROTOCOL
from vmfs.web.live import sentence
from vmfs.web.place import Place
from vmfs.web.threads import Refused, Threads

PORTS = ("console", "hvc")
CHUNK = 1 << 16
LOG_MOST = 256 << 10  # of what the console has said before
STREAMS_MOST = 64
_AGAIN = 0.03  # seconds until what a guest did not take is tried again


class Streams:
    """All of a server's."""

    def __init__(self, place: Place, threads: Threads) -> None:
        self._place, self._threads = place, threads
        self._open = 0

    async def console(self, socket: WebSocket, machine: str, port: str) -> None:
        """The bytes of a console both ways: first what it has said, then what it says."""
        if port not in PORTS or self._open >= STREAMS_MOST:
            await socket.close(1008, f"there are {STREAMS_MOST} streams already" if port in PORTS else "no such port")
            return
        await socket.accept(PROTOCOL)
        self._open += 1
        try:
            path = self._place.machine(machine)
            fd, said = await self._threads.call(machine, _open_console, path, port)
        except (OSError, Refused) as failure:
            self._open -= 1
            await _close(socket, sentence(failure))
            return
        stream = _Stream(fd, socket)
        try:
            try:
                if said:
                    await socket.send_bytes(said)
            finally:
                stream.start()
            await self._type(socket, machine, stream)
        except (WebSocketDisconnect, RuntimeError):
            pass
        except (OSError, Refused) as failure:
            await _close(socket, sentence(failure))
        finally:
            stream.end()
            self._open -= 1

    async def _type(self, socket: WebSocket, machine: str, stream: _Stream) -> None:
        """What the page sends is typed, as fast as the guest takes it."""
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes") or (message.get("text") or "").encode()
            while data:
                data = data[await self._threads.call(machine, stream.write, data) :]
                if data:
                    await asyncio.sleep(_AGAIN)


class _Stream(threading.Thread):
    """An open stream, which this thread reads for a page and closes at the end."""

    def __init__(self, fd: int, socket: WebSocket) -> None:
        super().__init__(name="vmfs-web-stream", daemon=True)
        self._fd, self._socket = fd, socket
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
                asyncio.run_coroutine_threadsafe(self._socket.send_bytes(data), self._loop).result()
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
                    asyncio.run_coroutine_threadsafe(_close(self._socket, reason), self._loop)


async def _close(socket: WebSocket, reason: str) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        await socket.close(1000, reason.encode()[:120].decode(errors="ignore"))


def _open_console(machine: Path, port: str) -> tuple[int, bytes]:
    """The open stream, and what was said before it was opened."""
    log = machine / f"{port}.log"
    before = log.stat().st_size
    fd = os.open(machine / port, os.O_RDWR | os.O_NONBLOCK)
    try:
        said = log.read_bytes()
        # What came between the two is in both.
        with contextlib.suppress(BlockingIOError):
            first = os.read(fd, CHUNK)
            between = said[before:] if len(said) >= before else b""
            twice = next((size for size in range(min(len(first), len(between)), 0, -1)
                          if between.endswith(first[:size])), 0)  # fmt: skip
            return fd, said[-LOG_MOST:] + first[twice:]
        return fd, said[-LOG_MOST:]
    except BaseException:
        os.close(fd)
        raise

