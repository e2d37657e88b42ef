"""What a machine has its host keep beside RAM: counted against the limits of the mount before it is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio

from vmfs.words.door import Door
from vmfs.words.errors import VmfsError

STEP = 1 << 20  # bytes that are asked for at a time: a file that grows asks once a MiB


class Budget:
    """So many bytes for each purpose. On the loop."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._held: dict[object, int] = {}
        self._changing = trio.Lock()

    def has(self, purpose: object, size: int) -> bool:
        """Whether so much is held for it already."""
        return self._held.get(purpose, 0) >= size

    async def hold(self, purpose: object, size: int) -> None:
        """Hold `size` bytes for it from now on, more or fewer than before. LimitReached or the like, with nothing
        changed, where the limits do not let it."""
        wanted = -(-size // STEP) * STEP
        async with self._changing:
            more = wanted - self._held.get(purpose, 0)
            if more:
                await trio.to_thread.run_sync(self._door.reserve, "beside", more)
            if wanted:
                self._held[purpose] = wanted
            else:
                self._held.pop(purpose, None)

    def follower(
        self, purpose: object, wanted: Callable[[], int], has: Callable[[int], None]
    ) -> Callable[[], None]:
        """What has `wanted()` bytes held for it soon, and `has` called with how many are. From any thread; where there
        are fewer than are wanted, it is asked for again at the next call."""
        token = trio.lowlevel.current_trio_token()
        asked = False

        async def follow() -> None:
            nonlocal asked
            asked = False
            try:
                await self.hold(purpose, wanted())
            except VmfsError:  # there is no room
                pass
            has(self._held.get(purpose, 0))

        def ask() -> None:
            nonlocal asked
            if not asked:
                asked = True
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(trio.lowlevel.spawn_system_task, follow)

        return ask

    def drop(self, purpose: object) -> None:
        """Hold nothing for it, soon."""
        if purpose in self._held:
            trio.lowlevel.spawn_system_task(self._drop, purpose)

    async def _drop(self, purpose: object) -> None:
        try:
            await self.hold(purpose, 0)
        except VmfsError:  # the machine is removed
            pass

    async def around(self, purpose: object, size: int, change: Callable[[], None]) -> None:
        """`change()`, with `size` bytes for it, which were enough before or are afterwards."""
        if not self.has(purpose, size):
            await self.hold(purpose, size)
        change()
        await self.hold(purpose, size)
