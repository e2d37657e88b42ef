"""`mem`: RAM as a file, in the best way that the kernel allows.

Passthrough: the kernel maps and reads the memfd itself, and both sides see each other's bytes at once. A
descriptor that may write is direct I/O as well: then only mmap passes through, and the server, which knows
the end of RAM, answers read(2) and write(2) (docs/decisions/0003).

Page cache, else: before a run what clients changed is written back and dropped; after it the pages that the
guest changed are dropped. The same around a change that the server makes. Only while `mem` is open: a first
open finds an empty cache.

Source: Linux Documentation/filesystems/fuse/fuse-passthrough.rst, fuse-io.rst.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.fs.connection import Connection
from vmfs.fs.hooks import status
from vmfs.fs.inodes import File, Handle, Kind
from vmfs.fs.passthrough import Backing
from vmfs.machine.machine import MemoryHooks, Vm
from vmfs.machine.memory import PAGE

log = logging.getLogger(__name__)

MOST_RANGES = 64  # more messages than that cost more than dropping the whole cache


class MemoryServer:
    """How one machine's `mem` is served, settled by its first open."""

    def __init__(self, vm: Vm, connection: Connection | None) -> None:
        self._vm = vm
        self._connection = connection
        self._backing = Backing(vm.memory.fd)
        self._way: bool | None = None
        self._opens = 0  # of those that go through the page cache
        self.writers = 0  # who has it, or what else of the guest is memory, open for writing, and may write unseen
        self.changes = 0  # grows when it was written, or may have been
        self._inode = 0

    def passes_through(self) -> bool:
        """In an open handler: whether its answer makes the kernel serve the file."""
        self._way = self._backing.answer_open()
        return self._way

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
        self._vm.hooks = MemoryHooks(before=self._drop, after=self._drop_changed)
        return False

    def close_cached(self) -> None:
        self._opens -= 1
        if not self._opens:
            self._vm.hooks = MemoryHooks()

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Around a change of RAM by the server."""
        self.changes += 1
        if self._opens:
            await trio.to_thread.run_sync(self._drop)
        try:
            yield
        finally:
            if self._opens:
                await trio.to_thread.run_sync(self._drop)

    def writer_comes(self) -> None:
        self.writers += 1

    def writer_goes(self) -> None:
        self.writers -= 1
        self.changes += 1

    async def settle(self) -> None:
        """Before the server looks at RAM: what clients wrote into mappings is there then."""
        if self._opens:
            await trio.to_thread.run_sync(self._drop)

    def close(self) -> None:
        self._backing.close()

    # Not on the trio loop: the kernel first has the server answer the writes of dirty pages.

    def _drop(self) -> None:
        self._invalidate(((0, 0),))

    def _drop_changed(self, dirty: bytes) -> None:
        ranges = []
        for one in dirty_ranges(dirty):
            ranges.append(one)
            if len(ranges) > MOST_RANGES:
                ranges = [(0, 0)]
                break
        self._invalidate(ranges)

    def _invalidate(self, ranges: Any) -> None:
        if self._connection is None:
            return
        try:
            for offset, length in ranges:
                self._connection.invalidate(self._inode, offset, length)
        except OSError as error:
            # ENOENT: the kernel has forgotten the file. The others: the mount is going.
            if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ENODEV):
                log.error("the cache of `mem` could not be dropped: %s", error)


def dirty_ranges(dirty: bytes) -> Iterator[tuple[int, int]]:
    """The runs of set bits of a dirty log, as (offset, length) in bytes."""
    bits = int.from_bytes(dirty, "little")
    page = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        page += skip
        length = (~bits & (bits + 1)).bit_length() - 1
        bits >>= length
        yield page * PAGE, length * PAGE
        page += length


@dataclass(frozen=True)
class Mem(Kind):
    """`mem`."""

    writable = True
    dated = False  # the kernel would drop what it has cached of it


    def size(self, scope: Any) -> int:
        return scope.vm.memory.size

    def blocks(self, scope: Any, size: int) -> int:
        return os.fstat(scope.vm.memory.fd).st_blocks

    def truncate(self, scope: Any, size: int, opened: bool) -> None:
        if size or opened:  # else it may be O_TRUNC, as in `cp image mem`
            scope.host.resize_memory(scope.vm, size)

    def open(self, node: File, pid: int, nonblocking: bool, writing: bool) -> Handle:
        return _MemHandle(node, pid, nonblocking, writing)


class _MemHandle(Handle):
    direct_io = False

    def __init__(self, node: File, pid: int, nonblocking: bool, writing: bool) -> None:
        super().__init__(node, pid, nonblocking)
        self._memory = self.scope.vm.memory
        self._cached = False
        self._writing = writing
        self.direct_io = writing
        if writing:
            self.scope.memory.writer_comes()

    def prepare_answer(self) -> None:
        server: MemoryServer = self.scope.memory
        if not server.passes_through():
            self._cached = True
            self.direct_io = False
            self.keep_cache = server.open_cached(self.node.number)

    async def read(self, offset: int, size: int) -> bytes:
        return self._memory.read(offset, size)

    async def write(self, offset: int, data: bytes) -> int:
        return self._memory.write(offset, data)

    def close(self) -> None:
        if self._writing:
            self.scope.memory.writer_goes()
        if self._cached:
            self.scope.memory.close_cached()
