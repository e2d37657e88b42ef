"""Pages: which pages of a machine's RAM were written, by anyone, and what is mapped of it.

The engine notes what CPUs write, the board what devices do, `Memory` what this process does; here that comes together,
for each reader by itself. A bit is a page, bit 0 that at address 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from vmfs.devices.device import WINDOW, WINDOW_HALF, WINDOW_SLOTS
from vmfs.engine.base import Machine
from vmfs.machine.recorded import Recorded
from vmfs.memory.layers import pages_of, runs
from vmfs.memory.ram import PAGE, Memory
from vmfs.words.errors import Invalid

# Below and above 4 GiB; of a PC that below is in four parts, for the display's window has slots of its own.
RAM_SLOTS = (0, 2, *WINDOW_SLOTS, 18)


class Pages(Recorded):
    def __init__(self) -> None:
        super().__init__()
        # By the reader that takes it; "base": since RAM is over one, and never taken.
        self._dirty = {"file": 0, "cache": 0, "past": 0, "history": 0, "base": 0}
        self._own_writes: deque[tuple[int, int]] = deque()  # by this process and no device, for `past`

    # ---- what is written

    def _changed(self) -> None:
        raise NotImplementedError

    def memory_written(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Address and size of what others than the CPUs have written to RAM: the one door for all that do. `Memory`
        comes by it, and the board tells the engine itself. From any thread. Clients of `mem` do not: what they write is
        seen by the next run that begins.
        """
        for address, size in ranges:
            self._machine.memory_written(address, size)

    def _wrote(self, address: int, size: int) -> None:
        """`Memory` has. From any thread."""
        self.memory_written(((address, size),))
        self._changed()
        if self.past.is_tracked:
            self._own_writes.append((address, size))

    # ---- its readers

    def take_dirty(self, reader: str) -> bytes:
        """The pages the guest wrote since `reader` ("file" or "cache") last took them: a bit a 4 KiB page."""
        with self._lock:
            size = self._gather_dirty()
            taken, self._dirty[reader] = self._dirty[reader], 0
        return taken.to_bytes(size, "little")

    def peek_dirty(self, reader: str) -> bytes:
        """What `take_dirty` would give."""
        with self._lock:
            size = self._gather_dirty()
            return self._dirty[reader].to_bytes(size, "little")

    def _gather_dirty(self) -> int:
        """Note what was written since; how many bytes a log has."""
        self._check_open()
        news = self._engine_dirty()
        if self.board is not None:
            news |= self.board.take_dirty()
        self._note_written(news)
        while self._own_writes:
            pages = pages_of(*self._own_writes.popleft())
            self._dirty["past"] |= pages
            self._dirty["history"] |= pages
            self._dirty["base"] |= pages
        return (self.memory.end // PAGE + 7) // 8

    def _engine_dirty(self) -> int:
        """What the guest wrote since this was last asked: a bit a page, by its address."""
        found = 0
        for slot, address, _ in self._ram_parts:
            try:
                log = self._machine.dirty_log(slot)
            except Invalid:  # a display has taken the slot: what was written there is noted
                continue
            found |= int.from_bytes(log, "little") << address // PAGE
        return found

    def _note_written(self, pages: int) -> None:
        """RAM was written: a bit a page, for every reader of the dirty log; with the lock held."""
        if pages:
            self._dirty = {name: bits | pages for name, bits in self._dirty.items()}

    # ---- snapshots and history

    def take_pages(self) -> int:
        """A bit a page of RAM that anybody of this process has written since the last time."""
        with self._lock:
            pages = self.look_at_pages()
            self.forget_pages()
        return pages

    def look_at_pages(self) -> int:
        """What `take_pages` would give, with the lock held."""
        self._gather_dirty()
        return self._dirty["past"]

    def forget_pages(self) -> None:
        """With the lock held."""
        self._dirty["past"] = 0

    def note_pages(self, pages: int) -> None:
        """For `take_pages`; without the lock."""
        with self._lock:
            self._dirty["past"] |= pages

    def copy_pages(self) -> None:
        """Have them in the log of the reader "history", too; without the lock."""
        with self._lock:
            self._dirty["history"] = self.look_at_pages()

    def written_since(self, reader: str) -> int:
        """A bit a page of RAM that was written since `reader` forgot; with the lock held."""
        self._gather_dirty()
        return self._dirty[reader]

    def forget_written(self, reader: str) -> None:
        """With the lock held."""
        self._dirty[reader] = 0

    def put_back(self, pages: int) -> None:
        """RAM is another there, which `history` has put: for all others; with the lock held."""
        self.memory_written((first * PAGE, count * PAGE) for first, count in runs(pages))
        self._note_written(pages)
        self._dirty["history"] = 0

    def have_written(self, pages: int) -> None:
        """RAM is another there: for the engine and all that ask for it but snapshots; with the lock held."""
        self.memory_written((first * PAGE, count * PAGE) for first, count in runs(pages))
        self._note_written(pages)
        self.forget_pages()

    # ---- the engine's memory

    def _map_ram(self, machine: Machine, *, has_window: bool) -> None:
        for slot in RAM_SLOTS:
            machine.map_memory(slot, 0, 0, 0, 0)
        self._ram_parts = _ram_parts(self.memory, has_window=has_window)
        for slot, address, size in self._ram_parts:
            machine.map_memory(slot, address, self.memory.mapping, address, size)


def _ram_parts(memory: Memory, *, has_window: bool) -> list[tuple[int, int, int]]:
    """Slot, address and size of what is mapped of RAM, with the window of a display or in one piece."""
    low, *high = memory.regions
    parts = [(RAM_SLOTS[1], one.address, one.size) for one in high]
    if not has_window:
        return [(RAM_SLOTS[0], 0, low.size), *parts]
    end = WINDOW + 2 * WINDOW_HALF
    parts.append((RAM_SLOTS[0], 0, min(low.size, WINDOW)))
    if low.size >= end:
        parts += [(slot, WINDOW + half * WINDOW_HALF, WINDOW_HALF) for half, slot in enumerate(WINDOW_SLOTS)]
    if low.size > end:
        parts.append((RAM_SLOTS[-1], end, low.size - end))
    return parts
