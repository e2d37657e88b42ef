"""What the viewers of a machine share: its picture, and who looks at it; while nobody waits for a change, nobody."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.devices import screen
from vmfs.devices.machine import Pc
from vmfs.devices.screen import Mapped, Picture, Shown
from vmfs.words.errors import Unsupported, VmfsError

FASTEST, SLOWEST = 1 / 33, 1 / 10  # seconds from look to look; the second where nothing has changed for a while
SHARE = 5  # of the time, no more than one part in so many goes into looking
QUIET_SECONDS = 2.0
_EMPTY = (640, 400)  # where there is no picture


@dataclass(frozen=True, slots=True)
class News:
    """Of one look: which tiles of the picture have changed (None: it is another one)."""

    picture: Picture
    changed: bytearray | None


class Screen:
    """`watchers` hear of each change; while `is_awaited()` says that somebody waits for one, `keep` looks for it.
    `hold` has so many bytes counted for the machine before they are there."""

    def __init__(self, scope: Any, hold: Callable[[int], Awaitable[None]], is_awaited: Callable[[], bool]) -> None:
        self._scope = scope
        self._hold = hold
        self._is_awaited = is_awaited
        self.watchers: set[Callable[[News], None]] = set()
        self._wanted = trio.Event()
        self._looking = trio.Lock()
        self.forget()

    def forget(self) -> None:
        """Nobody looks any more."""
        self.picture = Picture(*_EMPTY)
        self._mapped = Mapped()  # a look that goes on in a thread has the other one
        self.leds = 0

    @property
    def board(self) -> Pc:
        board = self._scope.vm.board
        if not isinstance(board, Pc):
            raise Unsupported("a bare machine has no screen: write pc to `machine`")
        return board

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.width, self.picture.height

    def want(self) -> None:
        """Somebody waits from now on."""
        self._wanted.set()

    async def look(self) -> None:
        """Have the picture be what is shown now, and tell the watchers what has changed."""
        async with self._looking:
            before, picture, leds = self.picture, self.picture, self.board.keyboard.leds
            while True:
                found = await trio.to_thread.run_sync(self._update, picture)
                if not isinstance(found, tuple):
                    break
                await self._hold(4 * found[0] * found[1])
                picture = Picture(*found)
            is_new, is_lit = picture is not before, leds != self.leds
            self.picture, self.leds = picture, leds
            if is_new or is_lit or found is not None:
                news = News(picture, None if is_new else found or bytearray())
                for watcher in list(self.watchers):
                    watcher(news)

    def _update(self, picture: Picture) -> bytearray | tuple[int, int] | None:
        """In a thread: what has changed of a picture, or the size that it is to have."""
        try:
            shown = screen.look(self.board.shown, self._mapped)
        except Unsupported:
            shown = Shown(*_EMPTY, 8, b"", 0, 0, bytes(768))
        if (shown.width, shown.height) != (picture.width, picture.height):
            return shown.width, shown.height
        return picture.update(shown)

    async def keep(self) -> None:
        """Look while somebody waits, until this is cancelled."""
        changed_at = time.monotonic()

        def note(_: News) -> None:
            nonlocal changed_at
            changed_at = time.monotonic()

        self.watchers.add(note)
        due = 0.0
        try:
            while True:
                await self._wanted.wait()
                began = time.monotonic()
                due = max(due, began - FASTEST)
                try:
                    await self.look()
                except VmfsError:  # it is another machine now, or has no room for the picture: the last one stays
                    pass
                if not self._is_awaited():
                    self._wanted = trio.Event()
                now = time.monotonic()
                took, slowest = now - began, SLOWEST if now - changed_at > QUIET_SECONDS else FASTEST
                # From the time at which this look was due: a loop that wakes up late does not look less often for it.
                due = max(due + slowest, began + took * SHARE)
                await trio.sleep(due - now)
        finally:
            self.watchers.discard(note)
