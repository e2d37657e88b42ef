"""`mem`: RAM. The server and the kernel read, write and map its memfd by themselves; here are its size and its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio

from vmfs.machine.files.handles import File, Handle, Kind
from vmfs.machine.files.waiting import value_of
from vmfs.memory.ram import check_size, size_to
from vmfs.words.errors import Busy


async def resize_memory(scope: Any, size: int) -> None:
    """Before the first run only. What it takes counts against the limits of the mount."""
    check_size(size)
    if scope.vm.state == "running":
        raise Busy("the machine is running")
    more = size - scope.vm.memory.size
    if more > 0:
        await trio.to_thread.run_sync(scope.door.reserve, "mem", more)
    try:
        scope.vm.resize_memory(size)
    except BaseException:
        if more > 0:
            await trio.to_thread.run_sync(scope.door.reserve, "mem", -more)
        raise
    if more < 0:
        await trio.to_thread.run_sync(scope.door.reserve, "mem", more)


@dataclass(frozen=True)
class Mem(Kind):
    """`mem`."""

    writable = True

    def size(self, scope: Any) -> int:
        return scope.vm.memory.end

    def blocks(self, scope: Any, size: int) -> int:
        return scope.vm.memory.blocks

    def truncate(self, scope: Any, size: int, opened: bool) -> Any:
        if size or opened:  # else it may be O_TRUNC, as in `cp image mem`
            return resize_memory(scope, size_to(size))
        return None

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _MemHandle(node, nonblocking)


class _MemHandle(Handle):
    """Of RAM that has no descriptor of its own any more: it is over a base."""

    async def read(self, offset: int, size: int) -> bytes:
        return self.scope.vm.memory.read_at(offset, size)

    async def write(self, offset: int, data: bytes) -> int:
        self.scope.memory.changes += 1
        return await value_of(self.scope.vm.write_memory(offset, data), self)
