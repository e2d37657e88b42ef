"""`console`, `hvc`, and `stream` of a device: serial ports, virtio consoles and the parallel port as streams. What is
written is typed; what the guest sends goes to every reader. `console.log`, `hvc.log` and `log` have the end of what was
sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import trio

from vmfs.devices.parallel import ParallelPort
from vmfs.devices.serial import Serial
from vmfs.devices.virtio.console import Console as VirtioConsole
from vmfs.machine.files.budget import Budget
from vmfs.machine.files.handles import POLL_OUT, File, Handle, Kind
from vmfs.machine.files.request import interruptible, is_nonblocking
from vmfs.machine.files.streams import Stream, StreamHandle
from vmfs.words.errors import Unsupported, WouldBlock

Talker = Serial | VirtioConsole | ParallelPort
TALKERS = Serial, VirtioConsole, ParallelPort
LIMIT = 16 << 20  # bytes that are kept for a reader that does not read
ROOM = 4096  # bytes that wait for the guest; more make a writer wait


class ConsolePort:
    """A port of the board, and the stream of what it has sent."""

    def __init__(self, serial: Talker, changed: Any, budget: Budget) -> None:
        self._typist = trio.CapacityLimiter(1)  # what is typed stays in order
        self.stream = Stream(LIMIT, changed, budget.follower(self, self._room_wanted, self._has_room))
        self.plug(serial)

    def plug(self, serial: Talker) -> None:
        """Be that of this one: the machine was made anew, and readers go on."""
        self.serial = serial
        serial.output = self.stream.append
        serial.took = self._took

    def _took(self) -> None:
        """The guest has read: writers that wait look again. In the CPU's thread."""
        if len(self.serial.waiting) < ROOM:
            self.stream.wake()
            self.stream.changed()

    def _room_wanted(self) -> int:
        return self.stream.wanted()

    def _has_room(self, size: int) -> None:
        self.stream.room = size

    async def type(self, data: bytes) -> None:
        """In a thread: the board's lock may be held for as long as a disk takes. A caller that is interrupted there
        has typed all the same."""
        assert not isinstance(self.serial, ParallelPort)  # whose stream is not writable
        await trio.to_thread.run_sync(
            self.serial.receive, data, abandon_on_cancel=True, limiter=self._typist
        )

    def room(self) -> int:
        return max(ROOM - len(self.serial.waiting), 0)


@dataclass(frozen=True)
class Console(Kind):
    """A port, by the name of its device; empty: that which the file is of. `takes`: what is written is typed."""

    device: str
    takes: bool = True
    reading_acts = True
    walked = False

    @property
    def writable(self) -> bool:  # type: ignore[override]
        return self.takes

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        port = node.scope.console_port(self.device)
        if not self.device:  # the machine's scope hears of news
            node = replace(node, scope=node.scope.machine)
        if port is None:
            return _NoConsole(node, nonblocking)
        return _ConsoleHandle(node, nonblocking, port)


def _no_port() -> Unsupported:
    return Unsupported("there is no such port: write pc to `machine` for a console, and hvc to `dev/add` for an hvc")


class _NoConsole(Handle):
    """Of a port that was not there at the open."""

    async def read(self, offset: int, size: int) -> bytes:
        raise _no_port()

    async def write(self, offset: int, data: bytes) -> int:
        return len(await self.read(0, 0))


class _ConsoleHandle(StreamHandle):
    """What is read ends while the machine is shut down: nothing more comes."""

    def __init__(self, node: File, nonblocking: bool, port: ConsolePort) -> None:
        super().__init__(
            node,
            nonblocking,
            port.stream,
            lost=lambda count: f"\r\n[vmfs: {count} bytes were lost here]\r\n".encode(),
            ended=lambda scope: scope.vm.state == "shutdown",
        )
        self._port = port

    async def write(self, offset: int, data: bytes) -> int:
        nonblocking = is_nonblocking(self.nonblocking)
        done = 0
        while done < len(data):
            room = self._port.room()
            if room:
                part = data[done : done + room]
                async with interruptible():
                    await self._port.type(part)
                done += len(part)
            elif nonblocking:
                break
            else:
                await self.wait_until(self._port.room)
                await trio.lowlevel.checkpoint()
        if not done and data:
            raise WouldBlock("the guest has not read what was typed before")
        return done

    def room(self) -> int:
        return POLL_OUT if self.node.kind.writable and self._port.room() else 0


# ---- what was sent


@dataclass(frozen=True)
class Log(Kind):
    """The end of what a port has sent, by the name of its device, as of `Console`."""

    device: str

    def size(self, scope: Any) -> int:
        port = scope.port_device(self.device)
        return 0 if port is None else len(port.sent)

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _LogHandle(node, nonblocking, self.device)


class _LogHandle(Handle):
    def __init__(self, node: File, nonblocking: bool, device: str) -> None:
        super().__init__(node, nonblocking)
        self._device = device

    async def read(self, offset: int, size: int) -> bytes:
        port = self.scope.port_device(self._device)
        if port is None:
            raise _no_port()
        return port.sent.read(offset, size)
