"""A template: a process that is a fork of some snapshot, as any other, and is never run, but multiplies.

To make one process a copied machine takes some milliseconds, and some MiB that are its own. So where a snapshot is
forked again and again, one process has become that machine for all of them, and forks: the next machine is there before
it is asked for, and has in pages of its own what it has written since. A template is of one user, whose the forks are.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections import deque
from typing import Any, Protocol

import msgspec
import trio

from vmfs.host.credentials import Credentials
from vmfs.host.inheritance import Inheritance
from vmfs.host.zygote import Job
from vmfs.words import commands
from vmfs.words.commands import Channel, ChannelBroken, ToServer
from vmfs.words.errors import ProcessFailed, VmfsError

log = logging.getLogger(__name__)

AFTER_FORKS = 2  # of one snapshot, by one user: then more are to come
BEGIN_SECONDS = 0.02  # until one is made, and until there is the next fork: what was born is to have the CPU
BIRTH_SECONDS = 20.0
IDLE_SECONDS = 30.0  # that it is kept without being asked
READY = 2  # forks that are kept ready
_CREDENTIALS = struct.Struct("3i")  # struct ucred: unix(7)
_PACKET = 4096
_REHEARSAL = (
    commands.Open(1, "vm_run", False, False, True, False, 0),
    commands.Write(2, 1, 0, b"insns 1000\n", 0),
    commands.Flush(3, 1),
    commands.Close(1),
    commands.Open(4, "exit", False, False, False, False, 0),
    commands.Read(5, 2, 0, _PACKET, 0),
    commands.Close(2),
    commands.Begin(6),
)
_TRIO_ENDS = trio.TooSlowError, trio.ClosedResourceError

_encode = msgspec.msgpack.Encoder().encode
_decode_answer = msgspec.msgpack.Decoder(commands.Answer).decode
_decode = msgspec.msgpack.Decoder(commands.Born).decode


class Maker(Protocol):
    """What this needs of `vmfs.host.machines.Host`."""

    def spawn_template(self, owner: Credentials, engine: str) -> tuple[Job, Channel[ToServer]]: ...
    def adopt(self, pid: int) -> Job: ...
    def kill(self, job: Job) -> None: ...
    def forget_template(self, template: Template) -> None: ...


class Template:
    """Of one Inheritance, for one user. On the loop only."""

    def __init__(self, host: Maker, owner: Credentials, engine: str, inheritance: Inheritance) -> None:
        self.inheritance = inheritance
        self._host = host
        self._owner = owner
        self._engine = engine
        self._forks = 0  # that were asked for before there is a process
        self._ready: deque[tuple[int, socket.socket]] = deque()
        self._channel: Channel[ToServer] | None = None
        self._asked = trio.Event()  # since it was last looked at
        self._is_over = False

    def take(self) -> tuple[Job, socket.socket] | None:
        """A fork that is ready, and our end of its channel. None: it has to be made in the usual way."""
        self._asked.set()
        if self._channel is None and not self._is_over:
            self._forks += 1
            if self._forks == AFTER_FORKS:
                trio.lowlevel.spawn_system_task(self._serve)
        while self._ready:
            pid, line = self._ready.popleft()
            if _is_there(line):
                return self._host.adopt(pid), line
            line.close()
        return None

    def end(self) -> None:
        """Those that are ready end as well."""
        self._is_over = True
        while self._ready:
            self._ready.pop()[1].close()
        if self._channel is not None:
            self._channel.close()
        self._asked.set()
        self._host.forget_template(self)

    async def _serve(self) -> None:
        job: Job | None = None
        try:
            await trio.sleep(BEGIN_SECONDS)
            if self._is_over:
                return
            job, self._channel = self._host.spawn_template(self._owner, self._engine)
            with trio.fail_after(BIRTH_SECONDS):
                await self._become_it(self._channel)
            while not self._is_over:
                while len(self._ready) < READY:
                    await self._multiply(self._channel)
                self._asked = trio.Event()
                with trio.move_on_after(IDLE_SECONDS) as limit:
                    await self._asked.wait()
                if limit.cancelled_caught:
                    return
                await trio.sleep(BEGIN_SECONDS)
        except (ChannelBroken, VmfsError, OSError, msgspec.MsgspecError, *_TRIO_ENDS) as error:
            if not self._is_over:
                log.debug("a template of a machine: %s", error)
        finally:
            self.end()
            if job is not None:
                self._host.kill(job)

    async def _become_it(self, channel: Channel[ToServer]) -> None:
        born, _ = await channel.receive()
        if not isinstance(born, commands.Born):
            raise ProcessFailed("the process did not begin")
        await channel.send(commands.Inherit(1, False), tuple(self.inheritance.fds))
        answer, _ = await channel.receive()
        if not isinstance(answer, commands.Done):
            raise ProcessFailed(getattr(answer, "sentence", "it said something else"))

    async def _multiply(self, channel: Channel[ToServer]) -> None:
        """One more that is ready."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with its:
                await channel.send(commands.Multiply(), (its.fileno(),))
            with trio.fail_after(BIRTH_SECONDS):
                await trio.lowlevel.wait_readable(ours)
                pid = _pid_of_born(*ours.recvmsg(_PACKET, socket.CMSG_SPACE(_CREDENTIALS.size))[:2])
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
                await _rehearse(ours)
            if self._is_over:
                raise ProcessFailed("nobody wants it any more")
        except BaseException:
            ours.close()
            raise
        self._ready.append((pid, ours))


def _pid_of_born(packet: bytes, ancillary: list[tuple[int, int, Any]]) -> int:
    """Of the process that said so, which the kernel says."""
    try:
        born = _decode(packet)
    except msgspec.MsgspecError:
        raise ProcessFailed("the process did not begin") from None
    pids = [
        _CREDENTIALS.unpack(data)[0]
        for level, kind, data in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(data) == _CREDENTIALS.size
    ]
    if born.version != commands.VERSION or len(pids) != 1 or pids[0] <= 0:
        raise ProcessFailed("the process did not begin")
    return int(pids[0])


async def _rehearse(line: socket.socket) -> None:
    """Have it answer what most are asked first, so that what it touches for that is its own before a user waits; and
    begin then."""
    for message in _REHEARSAL:
        line.send(_encode(message), socket.MSG_NOSIGNAL)
        if isinstance(message, commands.Close):
            continue
        await trio.lowlevel.wait_readable(line)
        answer = _decode_answer(line.recv(_PACKET))
        if answer.call != message.call or isinstance(answer, commands.Failed):
            raise ProcessFailed("it does not answer")


def _is_there(line: socket.socket) -> bool:
    """Whether the process at its other end is, which says nothing by itself."""
    with contextlib.suppress(BlockingIOError):
        try:
            return bool(line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except ConnectionResetError:
            return False
    return True
