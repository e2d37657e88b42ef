"""`screen.txt`, `screen.png`, `framebuffer`, `keyboard`: what a PC shows, and what is typed on it.

What takes the board's lock is done in a thread: the CPU's thread holds that lock while a device works for the guest,
and a disk may be a file that this very server has to answer for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from vmfs.devices import keys, screen
from vmfs.devices.display import FRAMEBUFFER_SIZE, Display
from vmfs.devices.machine import Pc
from vmfs.fs.inodes import File, Handle, Kind
from vmfs.fs.lines import Do
from vmfs.fs.passthrough import Backing
from vmfs.machine.memory import MemoryView
from vmfs.words.errors import Invalid, PastEnd, Unsupported

if TYPE_CHECKING:
    from vmfs.fs.scopes import MachineScope

T = TypeVar("T")


def _pc(scope: MachineScope, what: str) -> Pc:
    board = scope.vm.board
    if not isinstance(board, Pc):
        raise Unsupported(f"a bare machine has no {what}: write pc to `machine`")
    return board


async def screen_text(scope: MachineScope) -> str:
    return await _shown(scope, screen.text)


async def screen_picture(scope: MachineScope) -> bytes:
    return await _shown(scope, screen.picture)


async def _shown(scope: MachineScope, show: Callable[[Display, MemoryView], T]) -> T:
    display = _pc(scope, "screen").display
    memory = scope.vm.memory

    def work() -> T:
        with memory.view() as ram:
            return show(display, ram)

    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def put_keys(scope: MachineScope, text: str) -> Do:
    chords = keys.parse(text)

    async def do() -> None:
        await trio.to_thread.run_sync(_pc(scope, "keyboard").keyboard.type, chords)

    return do


# ---- the framebuffer


class FramebufferServer:
    """How one display's memory is served: by the kernel, where it can, and then it can be mapped."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.backing = Backing(display.framebuffer)

    def close(self) -> None:
        self.backing.close()


@dataclass(frozen=True)
class Framebuffer(Kind):
    """`framebuffer`."""

    writable = True
    dated = False  # as `mem`

    def size(self, scope: Any) -> int:
        return FRAMEBUFFER_SIZE if isinstance(scope.vm.board, Pc) else 0

    def blocks(self, scope: Any, size: int) -> int:
        return os.fstat(scope.vm.board.display.framebuffer).st_blocks if size else 0

    def truncate(self, scope: Any, size: int, opened: bool) -> None:
        if (size or opened) and size != self.size(scope):  # else it may be O_TRUNC, as in `cp picture framebuffer`
            raise Invalid(f"framebuffer: its {self.size(scope)} bytes are fixed")

    def open(self, node: File, pid: int, nonblocking: bool, writing: bool) -> Handle:
        return _FramebufferHandle(node, pid, nonblocking, writing)


class _FramebufferHandle(Handle):
    """On a machine that is bare it opens, and reads and writes are refused with a sentence."""

    def __init__(self, node: File, pid: int, nonblocking: bool, writing: bool) -> None:
        super().__init__(node, pid, nonblocking)
        self._writing = writing
        board = self.scope.vm.board
        self._display = board.display if isinstance(board, Pc) else None
        self._fd = self._display.open_framebuffer() if self._display is not None else -1
        if writing:
            self.scope.memory.writer_comes()

    def prepare_answer(self) -> None:
        if self._display is not None and self.scope.framebuffer(self._display).backing.answer_open():
            self.direct_io = self._writing  # then only mappings pass through, and the end is ours to answer

    async def read(self, offset: int, size: int) -> bytes:
        self._check()
        return os.pread(self._fd, size, offset) if offset < FRAMEBUFFER_SIZE else b""

    async def write(self, offset: int, data: bytes) -> int:
        self._check()
        room = FRAMEBUFFER_SIZE - offset
        if room <= 0 and data:
            raise PastEnd(f"framebuffer: {offset:#x} is past its end, {FRAMEBUFFER_SIZE:#x}")
        return os.pwrite(self._fd, memoryview(data)[:room], offset)

    def _check(self) -> None:
        if self._fd < 0:
            _pc(self.scope, "framebuffer")
            raise Unsupported("framebuffer: the machine was bare when it was opened; open it again")

    def close(self) -> None:
        if self._writing:
            self.scope.memory.writer_goes()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
