"""`screen.txt`, `screen.png`, `framebuffer`, `keyboard`, `mouse`: what a PC shows, and what is typed and done on it.

What takes the board's lock is done in a thread: the CPU's thread holds that lock while a device works for the guest,
and a disk may be a file that this very server has to answer for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from vmfs.devices import keys, moves, screen
from vmfs.devices.display import FRAMEBUFFER_SIZE, Display
from vmfs.devices.machine import Pc
from vmfs.devices.virtio.gpu import Gpu
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.handles import File, Handle, Kind
from vmfs.machine.files.lines import Do
from vmfs.words.errors import Invalid, Unsupported

T = TypeVar("T")


def _pc(scope: Contents, what: str) -> Pc:
    board = scope.vm.board
    if not isinstance(board, Pc):
        raise Unsupported(f"a bare machine has no {what}: write pc to `machine`")
    return board


async def screen_text(scope: Contents) -> str:
    return await _shown(scope, screen.text)


async def screen_picture(scope: Contents) -> bytes:
    return await _shown(scope, screen.picture)


async def _shown(scope: Contents, show: Callable[[Display | Gpu], T]) -> T:
    return await trio.to_thread.run_sync(show, _pc(scope, "screen").shown, abandon_on_cancel=True)


def put_keys(scope: Contents, text: str) -> Do:
    chords = keys.parse(text)

    async def do() -> None:
        await trio.to_thread.run_sync(_pc(scope, "keyboard").keyboard.type, chords)

    return do


def put_moves(scope: Contents, text: str) -> Do:
    parsed = moves.parse(text)

    async def do() -> None:
        await trio.to_thread.run_sync(_pc(scope, "mouse").keyboard.move, parsed)

    return do


# ---- the framebuffer


@dataclass(frozen=True)
class Framebuffer(Kind):
    """`framebuffer`: the server and the kernel serve the display's memory. On a machine that is bare it opens, and
    reads and writes are refused with a sentence."""

    writable = True

    def size(self, scope: Any) -> int:
        return FRAMEBUFFER_SIZE if isinstance(scope.vm.board, Pc) else 0

    def blocks(self, scope: Any, size: int) -> int:
        return scope.vm.board.display.taken if size else 0

    def truncate(self, scope: Any, size: int, opened: bool) -> None:
        if (size or opened) and size != self.size(scope):  # else it may be O_TRUNC, as in `cp picture framebuffer`
            raise Invalid(f"framebuffer: its {self.size(scope)} bytes are fixed")

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _FramebufferHandle(node, nonblocking)


class _FramebufferHandle(Handle):
    def __init__(self, node: File, nonblocking: bool) -> None:
        super().__init__(node, nonblocking)
        board = self.scope.vm.board
        if isinstance(board, Pc):
            self.memory = board.display.framebuffer

    async def read(self, offset: int, size: int) -> bytes:
        _pc(self.scope, "framebuffer")
        raise Unsupported("framebuffer: the machine was bare when it was opened; open it again")

    async def write(self, offset: int, data: bytes) -> int:
        return len(await self.read(0, 0))
