"""Wires: what joins network cards of a mount's machines, by a name.

A wire belongs to the user who names it first, and is there as long as a card is on it. Only that user, and root, get
other cards onto it. Its frames go through a process of its own (`vmfs.host.hub`), which is that user: no
machine has a descriptor of another one, and the server reads no frame.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import trio

from vmfs.host import opener
from vmfs.host.credentials import Credentials, HostError
from vmfs.host.hub import GONE
from vmfs.host.zygote import Job
from vmfs.words.errors import LimitReached, WouldBlock
from vmfs.words.nets import check_wire

PORTS_MOST = 32  # of a wire
WIRES_MOST, WIRES_MOST_USER = 256, 16  # of a mount, and of a user
_BUFFER = 4 << 20  # bytes on their way to a machine, as far as net.core.wmem_max allows


class _Wire:
    def __init__(self, owner: int, control: socket.socket, job: Job) -> None:
        self.owner = owner
        self.control = control
        self.job = job
        self.ports = 0


class Wires:
    """Those of a mount. `start` begins a process that does some work as a user, with a socket."""

    def __init__(self, start: Callable[[Credentials, opener.Work, socket.socket], Job]) -> None:
        self._start = start
        self._wires: dict[str, _Wire] = {}

    def join(self, who: Credentials, name: str) -> socket.socket:
        """A new port of a wire, which is made where there is none. Invalid, HostError, LimitReached."""
        check_wire(name)
        wire = self._wires.get(name)
        if wire is None:
            wire = self._make(who, name)
        elif who.uid not in (0, wire.owner):
            raise HostError(errno.EACCES, f"the wire {name} is another user's")
        elif wire.ports >= PORTS_MOST:
            raise LimitReached(f"the wire {name} has {PORTS_MOST} cards on it, and takes no more")
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            for end in ours, its:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            try:
                socket.send_fds(wire.control, [b"+"], [its.fileno()])
            except BlockingIOError:
                ours.close()
                raise WouldBlock(f"the process of the wire {name} is slow") from None
            except OSError as error:  # it was killed
                ours.close()
                self._end(name, wire)
                raise HostError(error.errno or errno.EIO, f"the wire {name} has ended") from None
        wire.ports += 1
        return ours

    def _make(self, who: Credentials, name: str) -> _Wire:
        if len(self._wires) >= WIRES_MOST:
            raise LimitReached(f"the mount has {WIRES_MOST} wires already")
        if sum(wire.owner == who.uid for wire in self._wires.values()) >= WIRES_MOST_USER:
            raise LimitReached(f"a user has up to {WIRES_MOST_USER} wires")
        control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        with its:
            try:
                job = self._start(who, opener.StartHub(), its)
            except BaseException:
                control.close()
                raise
        wire = self._wires[name] = _Wire(who.uid, control, job)
        trio.lowlevel.spawn_system_task(self._watch, name, wire)
        return wire

    async def _watch(self, name: str, wire: _Wire) -> None:
        """Until the last card is gone, or the wire's process."""
        while True:
            await trio.lowlevel.wait_readable(wire.control)
            try:
                said = wire.control.recv(1)
            except BlockingIOError:
                continue
            except OSError:
                said = b""
            if said == GONE:
                wire.ports -= 1
            if said != GONE or not wire.ports:
                break
        self._end(name, wire)
        wire.control.close()
        await wire.job.ended.wait()

    def _end(self, name: str, wire: _Wire) -> None:
        if self._wires.get(name) is wire:
            del self._wires[name]
