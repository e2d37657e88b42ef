"""BoardMemory: the memory of a machine as its devices see it: RAM, which they read and write, and memory of their own
that the guest sees (a ROM, a framebuffer, the window of a display).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from vmfs.devices import _chips
from vmfs.devices.device import WINDOW, WINDOW_HALF, WINDOW_SLOTS
from vmfs.engine.base import Machine
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid

_DIGITS = bytes.maketrans(b"\0\1", b"01")


class BoardMemory:
    """What `vmfs.devices.board.Board` has of memory."""

    def __init__(self, machine: Machine, memory: Memory, bus: _chips.Bus) -> None:
        self.machine = machine
        self.memory = memory
        self.ram_chip = _chips.Ram(bus)
        self._slots: dict[int, tuple[int, int, int, int, bool]] = {}  # slot -> arguments of map_memory
        self._window: list[str | tuple[int, int]] = ["ram" if self.has_window else "nothing"] * 2
        self._mapping: object | None = None  # of RAM, that `ram_chip` has

    def map_again(self) -> None:
        """RAM has another size."""
        if self._mapping is not None:
            assert self.ram is not None  # it is mapped anew
        self._window = ["ram" if self.has_window else "nothing"] * 2  # as a machine's RAM is mapped

    @property
    def ram_size(self) -> int:
        return self.memory.size

    def is_ram(self, address: int, length: int) -> bool:
        """Whether all of that is RAM."""
        return self.memory.is_ram(address, length)

    @property
    def ram(self) -> memoryview:
        """RAM by its addresses, to read. What is written must be told to `wrote`; `dma_write` does both."""
        mapping = self.memory.mapping
        if mapping is not self._mapping:
            self._mapping = mapping
            self.ram_chip.map(mapping.view, tuple((one.address, one.end) for one in self.memory.regions))
        return mapping.view

    def dma_read(self, address: int, length: int) -> bytes:
        """Invalid where that is not all RAM."""
        self._check_ram(address, length)
        return bytes(self.ram[address : address + length])

    def dma_write(self, address: int, data: bytes | memoryview) -> None:
        self._check_ram(address, len(data))
        self.ram[address : address + len(data)] = data
        self.wrote(address, len(data))

    def _check_ram(self, address: int, length: int) -> None:
        if not self.memory.is_ram(address, length):
            raise Invalid(f"{length} bytes at {address:#x} are not RAM")

    def wrote(self, address: int, length: int) -> None:
        """A device has written RAM: for the dirty log, as if the guest had."""
        self.wrote_all(((address, length),))

    def wrote_all(self, spans: Iterable[tuple[int, int]]) -> None:
        """`wrote`, of each (address, length)."""
        assert self.ram is not None  # it is mapped
        self.ram_chip.wrote(spans)

    @property
    def writes(self) -> int:
        """How often devices have written RAM."""
        return self.ram_chip.writes

    def wrote_slot(self, slot: int) -> None:
        """A device has written memory of its own that `map_memory` has put there."""
        if slot in self._slots:
            address, _, _, size, _ = self._slots[slot]
            self.machine.memory_written(address, size)

    def take_dirty(self) -> int:
        """The pages that devices have written since the last call, bit 0 for page 0."""
        parts = self.ram_chip.take_dirty()
        return sum(int(pages[::-1].translate(_DIGITS), 2) << first for first, pages in parts)

    def map_memory(
        self, slot: int, address: int, fd: int, offset: int, size: int, *, read_only: bool = False
    ) -> None:
        """Memory of a device in the guest's address space (a ROM, a framebuffer); size 0 takes it away.

        Slots from `device.FIRST_SLOT` on. In the CPU's thread, or while the machine does not run.
        """
        self.machine.map_memory(slot, address if size else 0, fd, offset, size, read_only=read_only)
        self._slots.pop(slot, None)
        if size:
            self._slots[slot] = address, fd, offset, size, read_only

    @property
    def has_window(self) -> bool:
        """Whether there is RAM at all of WINDOW; else what a display has there is its alone."""
        return self.memory.regions[0].size >= WINDOW + 2 * WINDOW_HALF

    def show_window(self, half: int, what: str | tuple[int, int]) -> None:
        """Have the CPU see in a half of WINDOW its RAM ("ram"), "nothing", so that each access is the display's, or the
        memory of a descriptor from an offset on. As `map_memory`."""
        if what == "ram" and not self.has_window:
            what = "nothing"
        if self._window[half] == what:
            return
        if self._window[half] == "ram":  # what the guest has written there is not forgotten with the slot
            address = WINDOW + half * WINDOW_HALF
            pages = int.from_bytes(self.machine.dirty_log(WINDOW_SLOTS[half]), "little")
            self.wrote_all((address + (page << 12), 1 << 12) for page in range(WINDOW_HALF >> 12) if pages >> page & 1)
        self._window[half] = what
        self._set_window(self.machine, half)

    def _set_window(self, machine: Machine, half: int) -> None:
        what, slot, address = self._window[half], WINDOW_SLOTS[half], WINDOW + half * WINDOW_HALF
        if what == "ram":
            machine.map_memory(slot, address, self.memory.mapping, address, WINDOW_HALF)
        elif isinstance(what, tuple):
            machine.map_memory(slot, address, *what, WINDOW_HALF)
        else:
            machine.map_memory(slot, 0, 0, 0, 0)

    def read_memory(self, address: int, length: int) -> bytes:
        """What `map_memory` has put there, for a debugger: up to `length` bytes of one slot; empty where there is
        none."""
        for start, fd, offset, size, _ in list(self._slots.values()):
            if start <= address < start + size:
                return os.pread(fd, min(length, start + size - address), offset + address - start)
        return b""
