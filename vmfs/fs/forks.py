"""`fork`: a line written to it makes a sibling of the machine, at the root of the mount, which is the writer's."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.fs.inodes import File, Handle, Kind
from vmfs.fs.kinds import call
from vmfs.host.credentials import Credentials, credentials_of, umask_of
from vmfs.host.machines import Host
from vmfs.host.process import Asker, MachineProcess
from vmfs.words import commands
from vmfs.words.errors import Invalid, LimitReached, NotPermitted, VmfsError

_LINE = re.compile(r"\s*(\S+)(?:\s+from\s+(\S+))?\s*")
TEXT_MOST = 1000

Fork = Callable[[str, str, "Writer"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Writer:
    """Whose a fork is."""

    who: Credentials
    pid: int
    umask: int


def parse(text: str) -> tuple[str, str]:
    """The name of the new machine, and that of the snapshot, "" for now. Invalid."""
    match = _LINE.fullmatch(text)
    if match is None or match[1] == "from" or len(text.strip().splitlines()) != 1:
        raise Invalid(f"fork: it is `NEW` or `NEW from SNAPSHOT`, not {text[:80]!r}")
    return match[1], match[2] or ""


@dataclass(frozen=True)
class ForkFile(Kind):
    readable = False
    writable = True
    walked = False

    async def open(self, node: File, pid: int, flags: int, uid: int, walking: bool) -> Handle:
        who = credentials_of(pid) if pid else None
        umask = umask_of(pid) if pid else None
        is_seen = who is not None and who.uid == uid and umask is not None
        return _ForkHandle(node, pid, Writer(who, pid, umask) if is_seen else None)


class _ForkHandle(Handle):
    tells_closing = True

    def __init__(self, node: File, pid: int, writer: Writer | None) -> None:
        super().__init__(node, pid)
        self._writer = writer
        self._text = b""

    async def write(self, offset: int, data: bytes) -> int:
        """Each line at once; what comes without a newline when it parses, or else with the next write."""
        self._text += data
        if len(self._text) > TEXT_MOST:
            self._text = b""
            raise Invalid("fork: it is `NEW` or `NEW from SNAPSHOT`")
        text, has_end = self._text.decode(errors="replace"), self._text.endswith(b"\n")
        try:
            new, snapshot = parse(text)
        except Invalid:
            if has_end:
                self._text = b""
                self.unsaved = self.waits = False
                raise
            self.unsaved = self.waits = True
            return len(data)
        self._text = b""
        self.unsaved = self.waits = False
        if self._writer is None:
            raise NotPermitted("fork: its writer is not to be seen from here, and a machine has to be somebody's")
        await self.scope.fork(new, snapshot, self._writer)
        return len(data)

    async def flush(self) -> None:
        if self._text:
            text, self._text = self._text, b""
            self.unsaved = self.waits = False
            parse(text.decode(errors="replace"))


async def fork(host: Host, parent: Any, snapshot: str, writer: Writer) -> MachineProcess:
    """A machine that is a copy of what the machine of the scope `parent` is now, or of that snapshot. It has a process
    already only where there are files of the host to be handed over."""
    machine: MachineProcess = parent.machine
    await machine.start()
    live = not snapshot and not parent.memory.leave_to_machine()
    asker = Asker(writer.who)
    asker.says(b"cow\n")  # new files for what is written to disks from now on

    async def ask(of: MachineProcess, make: Callable[[int], commands.Message], asker: Asker | None) -> Any:
        return await call(of, make, writer.pid, asker)

    copy, inheritance = await machine.copy(snapshot, live, asker, ask)
    try:
        own = Credentials(writer.who.uid, writer.who.gid, writer.who.groups, 0, file_size=writer.who.file_size)
        child = host.create(own, copy.size, host.known_engine(copy.engine), inheritance)
        if copy.files:
            try:
                await _hand_over(machine, child, copy.copy, asker, ask)
            except BaseException:
                host.forget(child)
                with trio.CancelScope(shield=True):
                    await child.remove()
                raise
        return child
    finally:
        machine.close_copy(copy)


async def _hand_over(machine: MachineProcess, child: MachineProcess, copy: int, asker: Asker, ask: Any) -> None:
    """Have the files go from the one process to the other. The server holds no end of the socket that the other end's
    holder may have sent to: what is in there would be the server's to close."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise LimitReached(f"the server has no descriptor left for it: {os.strerror(error.errno or 0)}") from None
    taken, failures = trio.Event(), []

    async def hand() -> None:
        await taken.wait()
        with theirs:
            try:
                await machine.call(lambda at: commands.Hand(at, copy), send=(theirs.fileno(),))
            except VmfsError as error:
                failures.append(error)

    trio.lowlevel.spawn_system_task(hand)
    try:
        await child.begin_with_files(ours, asker, taken)
    except VmfsError as error:
        raise failures[0] if failures else error from None
