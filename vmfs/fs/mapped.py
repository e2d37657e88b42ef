"""`mem`, `framebuffer` and `coverage`: memory as a file, in the best way that the kernel allows.

Passthrough: the kernel maps and reads the memfd itself, and both sides see each other's bytes at once. A
descriptor that may write is direct I/O as well: then only mmap passes through, and the server, which knows
the end of the memory, answers read(2) and write(2) (docs/decisions/0003).

Page cache, else, for `mem`: before a run what clients changed is written back and dropped; after it the pages that the
guest changed are dropped. The same around a change that the machine makes. Only while `mem` is open: a first
open finds an empty cache. So it is, too, once RAM is over a base (docs/decisions/0013): then the machine answers.

Source: Linux Documentation/filesystems/fuse/fuse-passthrough.rst, fuse-io.rst.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.fs.connection import Connection
from vmfs.fs.hooks import status
from vmfs.fs.inodes import File, Handle, Kind
from vmfs.fs.kinds import Served, ServedHandle, call
from vmfs.fs.passthrough import Backing
from vmfs.host.credentials import Credentials
from vmfs.host.process import MachineProcess
from vmfs.words import commands
from vmfs.words.commands import ANY_FLAGS, DATA_MOST
from vmfs.words.errors import PastEnd, ProcessFailed

log = logging.getLogger(__name__)


class MemoryServer:
    """How one machine's `mem` is served, settled by its first open."""

    def __init__(self, machine: MachineProcess, connection: Connection | None) -> None:
        self._machine = machine
        self._connection = connection
        self._backing: Backing | None = None
        self._way: bool | None = None
        self._opens = 0  # of those that go through the page cache
        self._writers = 0  # clients that have it, or other memory of the guest, open for writing
        self._passing = 0  # opens that the kernel serves
        self._inode = 0
        self.by_machine = False  # reads and writes are the machine's to answer, for RAM is no file any more

    def passes_through(self) -> bool:
        """In an open handler: whether its answer makes the kernel serve the file."""
        if self.by_machine:
            return False
        if self._backing is None:
            self._backing = Backing(self._machine.memory_fd)
        self._way = self._backing.answer_open()
        return self._way

    def leave_to_machine(self) -> bool:
        """Have the machine answer reads and writes from now on, because its RAM will be over a base. False where
        clients have the memfd itself, which has to stay what RAM is."""
        if self._passing:
            return False
        if not self.by_machine:
            self.by_machine, self._way = True, False
            self.close()
        return True

    def opened(self) -> None:
        """The kernel serves one more open file."""
        self._passing += 1

    def closed(self) -> None:
        self._passing -= 1

    @property
    def way(self) -> str:
        """How the file is served, or before its first open, how it is going to be."""
        passes = status().passthrough if self._way is None else self._way
        return "passthrough" if passes else "page-cache"

    def open_cached(self, inode: int) -> bool:
        """Count an open through the page cache. Returns whether the kernel may keep what it has cached."""
        self._opens += 1
        if self._opens > 1:
            return True
        self._inode = inode
        self._tell()
        return False

    def close_cached(self) -> None:
        self._opens -= 1
        if not self._opens:
            self._tell()

    def writer_comes(self) -> None:
        self._writers += 1
        if self._writers == 1:
            self._tell()

    def writer_goes(self) -> None:
        self._writers -= 1
        if not self._writers:
            self._tell(at_once=False)

    def _tell(self, at_once: bool = True) -> None:
        self._machine.tell(commands.Clients(self._opens > 0, self._writers > 0), at_once=at_once)

    async def invalidate(self, ranges: list[tuple[int, int]]) -> None:
        """Write back and drop pages; returns when the kernel has. Not on the loop, which answers those writes first."""
        if self._connection is not None and self._opens:
            await trio.to_thread.run_sync(self._invalidate, self._connection, ranges)

    def _invalidate(self, connection: Connection, ranges: list[tuple[int, int]]) -> None:
        try:
            for offset, length in ranges:
                connection.invalidate(self._inode, offset, length)
        except OSError as error:
            # ENOENT: the kernel has forgotten the file. The others: the mount is going.
            if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ENODEV):
                log.error("the cache of `mem` could not be dropped: %s", error)

    def close(self) -> None:
        if self._backing is not None:
            self._backing.close()


@dataclass(frozen=True)
class Mem(Kind):
    """`mem`."""

    writable = True
    sized = True
    dated = False  # it may be written unseen, at any time

    def local_size(self, node: File) -> tuple[int, int] | None:
        """That of the memfd, which the server has; of a machine that was only made it is known, too."""
        machine = node.scope.machine
        if node.scope.memory.by_machine:  # it may be another one, of another size
            return None
        if machine.memory_fd >= 0:
            there = os.fstat(machine.memory_fd)
            return there.st_size, there.st_blocks
        return (machine.memory_size, 0) if machine.is_blank else None

    async def open(self, node: File, pid: int, flags: int, uid: int, walking: bool) -> Handle:
        await node.scope.machine.start()
        return _MemHandle(node, pid, flags & os.O_ACCMODE != os.O_RDONLY)

    async def truncate(self, node: File, size: int, opened: bool) -> None:
        if size or opened:  # else it may be O_TRUNC, as in `cp image mem`
            await call(node.scope.machine, lambda at: commands.Truncate(at, node.path, size, opened), 0)


class _MemHandle(Handle):
    def __init__(self, node: File, pid: int, writing: bool) -> None:
        super().__init__(node, pid)
        self._machine: MachineProcess = self.scope.machine
        self._cached = self._passes = False
        self._opened: int | None = None  # its number in the machine's process, once that answers
        self._writing = self.direct_io = writing
        if writing:
            self.scope.memory.writer_comes()

    def prepare_answer(self) -> None:
        server: MemoryServer = self.scope.memory
        if not server.passes_through():
            self._cached = True
            self.direct_io = False
            self.keep_cache = server.open_cached(self.node.number)
        else:
            self._passes = True
            server.opened()

    async def read(self, offset: int, size: int) -> bytes:
        if not self.scope.memory.by_machine:
            return os.pread(self._memory(), size, offset)
        number, parts = await self._number(), []
        while size > 0:
            want = min(size, DATA_MOST)
            answer = await self._call(lambda at, to=offset, want=want: commands.Read(at, number, to, want, ANY_FLAGS))
            parts.append(answer.data[:want])
            offset, size = offset + len(parts[-1]), size - len(parts[-1])
            if len(parts[-1]) < want:
                break
        return b"".join(parts)

    async def write(self, offset: int, data: bytes) -> int:
        if not self.scope.memory.by_machine:
            return write_bounded(self._memory(), "mem", "RAM", offset, data)
        number, done = await self._number(), 0
        while done < len(data):
            piece = bytes(data[done : done + DATA_MOST])
            answer = await self._call(
                lambda at, to=offset + done, piece=piece: commands.Write(at, number, to, piece, ANY_FLAGS)
            )
            done += max(min(answer.number, len(piece)), 0)
            if answer.number < len(piece):
                break
        return done

    async def _number(self) -> int:
        """Of it in the machine's process."""
        if self._opened is None:
            path, writing = self.node.path, self._writing
            answer = await self._call(
                lambda at: commands.Open(at, path, writing, False, False, False, self._machine.owner.uid)
            )
            if self._opened is None:
                self._opened = answer.handle
            else:  # meanwhile
                self._machine.tell(commands.Close(answer.handle))
        return self._opened

    async def _call(self, make: Callable[[int], commands.Message]) -> Any:
        """What the kernel reads for its cache, and writes of it, has no caller."""
        return await call(self._machine, make, self.pid if self.direct_io else 0)

    def _memory(self) -> int:
        if self._machine.memory_fd < 0:
            raise ProcessFailed(self._machine.failure or "the machine's process is gone")
        return self._machine.memory_fd

    def close(self) -> None:
        if self._cached:
            self.scope.memory.close_cached()
        if self._passes:
            self.scope.memory.closed()
        if self._opened is not None:
            self._machine.tell(commands.Close(self._opened))
        if self._writing:
            self.scope.memory.writer_goes()


def write_bounded(fd: int, name: str, what: str, offset: int, data: bytes) -> int:
    """How many bytes were written: all that fit. PastEnd when none does."""
    size = os.fstat(fd).st_size
    room = size - offset
    if room <= 0 and data:
        raise PastEnd(f"{name}: {offset:#x} is past the end of {what}, {size:#x}")
    done = 0
    view = memoryview(data)[: max(room, 0)]
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done


# ---- the framebuffer, the map of coverage


@dataclass(frozen=True)
class Framebuffer(Served):
    """`framebuffer`: the machine says which memory it is, and what is wrong on one that has none."""

    writable: bool = True  # type: ignore[assignment]
    dated = False  # as `mem`

    def handle(self, node: File, pid: int, who: Credentials | None) -> ServedHandle:
        return _FramebufferHandle(node, pid, who)


@dataclass(frozen=True)
class Coverage(Served):
    """`coverage`: mappings and reads are of the memory, what is written is the machine's to answer."""

    writable: bool = True  # type: ignore[assignment]
    dated = False

    def handle(self, node: File, pid: int, who: Credentials | None) -> ServedHandle:
        return _SharedHandle(node, pid, who)


class _SharedHandle(ServedHandle):
    """Of memory that the machine hands over at the open, if it does."""

    _fd = -1
    _writing = False

    async def begin(self, flags: int, uid: int, walking: bool) -> None:
        await super().begin(flags, uid, walking)
        self._writing = flags & os.O_ACCMODE != os.O_RDONLY

    def opened(self, memory: int) -> None:
        self._fd = memory

    def prepare_answer(self) -> None:
        if self._fd >= 0 and self.scope.backing(self.node.name, self._fd).answer_open():
            self.direct_io = self._writing  # then only mappings pass through, and the end is the server's to answer

    async def read(self, offset: int, size: int) -> bytes:
        if self._fd < 0:
            return await super().read(offset, size)
        return os.pread(self._fd, size, offset)

    def close(self) -> None:
        super().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _FramebufferHandle(_SharedHandle):
    """It is memory of the guest's."""

    async def begin(self, flags: int, uid: int, walking: bool) -> None:
        await super().begin(flags, uid, walking)
        if self._writing:
            self.scope.memory.writer_comes()

    async def write(self, offset: int, data: bytes) -> int:
        if self._fd < 0:
            return await super().write(offset, data)
        return write_bounded(self._fd, "framebuffer", "it", offset, data)

    def close(self) -> None:
        super().close()
        if self._writing:
            self.scope.memory.writer_goes()
