"""Forks: copies of a machine for other processes, and a machine that is one."""

from __future__ import annotations

import itertools
import socket

import trio

from vmfs.machine import copies
from vmfs.machine.copies import Copy
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.handles import EmptyHandle, File, Kind
from vmfs.machine.files.snapshots import Taking
from vmfs.machine.past import Snapshot
from vmfs.words import commands
from vmfs.words.errors import EngineFailed, Invalid, LimitReached

HAND_SECONDS = 20.0  # that the other machine's process has for each descriptor


class CopyHandle(EmptyHandle):
    """A copy that the server makes a machine of."""

    def __init__(self, scope: Contents, copy: Copy) -> None:
        super().__init__(File("fork", Kind(), scope), False)
        self.copy: Copy | None = copy

    def close(self) -> None:
        self.copy = None


class Forks:
    """Of one machine."""

    def __init__(self, machine: Contents) -> None:
        self._machine = machine
        self._numbers = itertools.count(1)
        self._last: tuple[Snapshot, Copy] | None = None  # of a snapshot that is there
        self._origin: Snapshot | None = None  # of this machine, if it is a template

    async def copy(self, name: str, is_live: bool) -> tuple[CopyHandle, Copy]:
        """Of now, where `name` is empty."""
        vm = self._machine.vm
        if name:
            await self._machine.arrivals.come_in(name)
            snapshot = vm.past[name]
            if self._last is not None and self._last[0] is not snapshot:
                self._last = None
            if self._last is None:
                self._last = snapshot, await self._make(snapshot)
            copy = self._last[1]
        else:
            await self._machine.memory.settle()
            taking = Taking(self._machine)
            copy = await self._make(
                await trio.to_thread.run_sync(lambda: taking.take("", is_live=is_live, is_kept=False))
            )
        return CopyHandle(self._machine, copy), copy

    async def _make(self, snapshot: Snapshot) -> Copy:
        number = next(self._numbers)
        return await trio.to_thread.run_sync(copies.copy_of, self._machine.vm, snapshot, number)

    def forget(self, name: str) -> None:
        """A snapshot was dropped."""
        if self._last is not None and self._last[0].name == name:
            self._last = None

    async def hand(self, copy: Copy, fds: list[int] | None) -> None:
        """Send its files."""
        if fds is None or len(fds) != 1:
            commands.close_all(fds)
            raise LimitReached("the machine's process has no file descriptor left (ulimit -n)")

        def send() -> None:
            with socket.socket(fileno=fds[0]) as line:
                line.settimeout(HAND_SECONDS)
                try:
                    for fd in copy.files:
                        socket.send_fds(line, [b"f"], [fd], socket.MSG_NOSIGNAL)
                except OSError as error:
                    raise EngineFailed(f"the fork does not take its files: {error.strerror}") from error

        await trio.to_thread.run_sync(send)

    async def inherit(self, has_files: bool, fds: list[int] | None, *, multiplies: bool = False) -> None:
        """Be a copy. `multiplies`: this process goes on in others, and has no other thread."""
        if not fds:
            raise LimitReached("the machine's process has no file descriptor left (ulimit -n)")
        contents = self._machine
        memory, files = fds, []
        line: socket.socket | None = None

        def work() -> None:
            description = copies.read_description(memory)
            if line is not None:
                files.extend(_receive(line, copies.files_of(description)))
            origin = copies.become(contents.vm, description, memory, files, contents.engine_named, contents.door)
            if multiplies:
                contents.vm.engine_machine.own()  # Unsupported where its forks could not
                self._origin = origin

        try:
            if has_files:
                line = _socket_of(memory)
            if multiplies:
                work()
            else:
                await trio.to_thread.run_sync(work)
        finally:
            if line is not None:
                line.close()
            commands.close_all(memory)
            commands.close_all(files)
        contents.forget_sizes()
        contents.touch()

    def part(self) -> None:
        """This process is a fork of the one that has become that copy. Until it begins, no run of it does anything."""
        vm = self._machine.vm
        vm.engine_machine.own()
        vm.rehearses = True

    def begin(self) -> None:
        """Be the copy, after a rehearsal in which the guest did nothing."""
        contents = self._machine
        origin, self._origin = self._origin, None
        if origin is None:
            raise Invalid("this process was not made by a template, or has begun")
        contents.vm.rehearses = False
        contents.vm.go_back(origin, lambda: lambda: None)
        contents.forget_sizes()
        contents.touch()


def _socket_of(fds: list[int]) -> socket.socket:
    """The last one, which is taken from them."""
    try:
        line = socket.socket(fileno=fds[-1])
    except OSError as error:
        raise EngineFailed(f"what the files of a fork come by is no socket: {error.strerror}") from error
    fds.pop()
    return line


def _receive(line: socket.socket, count: int) -> list[int]:
    line.settimeout(HAND_SECONDS)
    found: list[int] = []
    try:
        for _ in range(count):
            packet, fds, flags, _ = socket.recv_fds(line, 1, 1, socket.MSG_CMSG_CLOEXEC)
            found += fds
            if flags & socket.MSG_CTRUNC:
                raise LimitReached("the machine's process has no file descriptor left (ulimit -n)")
            if not packet or not fds:
                raise EngineFailed("the machine that is forked has not handed on its files")
    except BaseException as error:
        commands.close_all(found)
        if isinstance(error, OSError):
            raise EngineFailed(f"the machine that is forked has not handed on its files: {error.strerror}") from error
        raise
    return found
