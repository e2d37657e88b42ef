"""Display: a VGA with Bochs' VBE on the PCI bus, 1234:1111, as QEMU's "std" VGA is, and what it shows.

BAR 0 is the framebuffer, memory of its own, whose first 256 KiB are the VGA's planes; BAR 2 registers: the VGA's ports
from 400 on, the VBE's from 500 on. Both are at their legacy ports, too. What the CPU has at A0000-BFFFF is RAM, the
VGA's planes, or a bank of the framebuffer. There is no EDID.

Source: QEMU's docs/specs/standard-vga.rst; Linux drivers/gpu/drm/tiny/bochs.c for what a driver expects.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from typing import ClassVar

from vmfs.devices.device import FIRST_SLOT, U32, WINDOW, WINDOW_HALF, DeviceState, Port, Window
from vmfs.devices.pci import Bar, PciDevice, PciState
from vmfs.devices.vbe import PORT, REGISTERS, Vbe, VbeState
from vmfs.devices.vga import PLANES, PORTS_END, PORTS_START, GraphicsMode, TextMode, Vga, VgaState, in_ram, of_chip
from vmfs.memory.hostfile import punch
from vmfs.words.errors import Gone, Invalid, VmfsError

FRAMEBUFFER_SIZE = 64 << 20  # 4K at 32 bits, once; a power of two
SLOT = FIRST_SLOT  # of the engine's memory
_PAGE = 4096
_ZEROS = bytes(_PAGE)

# Regions: BARs by their index, legacy ports, A0000-BFFFF (chips/vga.c has the numbers, too).
_FRAMEBUFFER, _REGISTERS, _VGA_PORTS, _VBE_PORTS, _WINDOW = 0, 2, 6, 7, 8
_VGA_AT, _VGA_END, _VBE_AT = 0x400, 0x420, 0x500


class DisplayState(DeviceState):
    """`framebuffer`: what was ever written of it, offsets and bytes."""

    VERSION: ClassVar[int] = 2

    pci: PciState
    vga: VgaState
    vbe: VbeState
    framebuffer: tuple[tuple[U32, bytes], ...]


class Display(PciDevice[DisplayState]):
    """It has a memfd of FRAMEBUFFER_SIZE bytes, which the guest has at BAR 0."""

    TYPE = "vga"
    memory_slot = SLOT
    STATE = DisplayState
    VENDOR, DEVICE, CLASS, REVISION = 0x1234, 0x1111, 0x030000, 2
    SUBSYSTEM = (0x1AF4, 0x1100)
    INTERRUPT = False
    BARS = {_FRAMEBUFFER: Bar("memory", FRAMEBUFFER_SIZE, prefetchable=True), _REGISTERS: Bar("memory", 4096)}

    def __init__(self, board: Port, name: str, slot: int) -> None:
        super().__init__(board, name, slot)
        self.vbe = Vbe(FRAMEBUFFER_SIZE, self._mode_set)
        self._memory = os.memfd_create("vmfs-framebuffer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._memory, FRAMEBUFFER_SIZE)
        # Clients that map it hold it; none of them can pull it away under the guest.
        fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._is_given = False  # clients may write it
        self._closing = threading.Lock()
        self._mapped: int | None = None
        self._planes = mmap.mmap(self._memory, PLANES)  # which has a descriptor of its own
        self.vga = Vga(board.bus, self.number, self._planes)
        self.chip = self.vga.chip

    def windows(self) -> tuple[Window, ...]:
        return (
            *super().windows(),
            Window("port", PORTS_START, PORTS_END - PORTS_START, _VGA_PORTS),
            Window("port", PORT, 2, _VBE_PORTS),
            Window("memory", WINDOW, 2 * WINDOW_HALF, _WINDOW),
        )

    def moved(self) -> None:
        address = self.bar(_FRAMEBUFFER)
        if address == self._mapped:
            return
        if self._mapped is not None:
            self.board.map_memory(SLOT, 0, 0, 0, 0)
        self._mapped = None
        if address is not None:
            try:
                self.board.map_memory(SLOT, address, self._memory, 0, FRAMEBUFFER_SIZE)
                self._mapped = address
            except VmfsError:  # a guest has put it over other memory, which stays
                self.counters["overlaps"] += 1

    # ---- accesses

    def read(self, region: int, offset: int, size: int) -> int:
        value = self.chip.read(region, offset, size)
        if value is not None:
            return value
        if region == _VBE_PORTS and size == 2:
            return self.vbe.index if offset == 0 else self.vbe.read(self.vbe.index)
        if region == _REGISTERS:
            is_vbe = _VBE_AT <= offset < _VBE_AT + 2 * REGISTERS and offset % 2 == 0 and size == 2
            return self.vbe.read((offset - _VBE_AT) // 2) if is_vbe else 0
        if region == _FRAMEBUFFER:
            return self._read_framebuffer(offset, size)
        return (1 << 8 * size) - 1

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if self.chip.write(region, offset, size, value):
            return
        if region == _VGA_PORTS:
            self._write_vga(PORTS_START + offset, size, value)
        elif region == _VBE_PORTS:
            if size == 2 and offset == 0:
                self.vbe.index = value
            elif size == 2:
                self.vbe.write(self.vbe.index, value)
        elif region == _REGISTERS:
            if _VGA_AT <= offset and offset + size <= _VGA_END:
                self._write_vga(0x3C0 + offset - _VGA_AT, size, value)
            elif _VBE_AT <= offset < _VBE_AT + 2 * REGISTERS and offset % 2 == 0 and size == 2:
                self.vbe.write((offset - _VBE_AT) // 2, value)
        elif region == _FRAMEBUFFER:
            os.pwrite(self._memory, value.to_bytes(size, "little")[: FRAMEBUFFER_SIZE - offset], offset)

    def _write_vga(self, port: int, size: int, value: int) -> None:
        """A write to the VGA that changes how the CPU sees its memory: what was in RAM goes into the planes, and what
        is to be there comes."""
        before = self.chip.layout
        self.chip.put(port, size, value)
        if self.vbe.is_enabled:
            return
        for layout, to_ram in ((before, False), (self.chip.layout, True)):
            seen = in_ram(layout)
            if seen is not None and self.board.has_window:
                self.chip.copy(self.board.ram[seen.address : seen.address + seen.size], seen.chained, to_ram)
                if to_ram:
                    self.board.wrote(seen.address, seen.size)
        self.show_memory()

    def show_memory(self) -> None:
        """Have the CPU see at A0000-BFFFF what it is to see there."""
        if self.vbe.is_enabled:
            self.board.show_window(0, (self._memory, self.vbe.bank << 16))
            self.board.show_window(1, "ram")
            return
        for half, is_chips in enumerate(of_chip(self.chip.layout)):
            self.board.show_window(half, "nothing" if is_chips else "ram")

    def _read_framebuffer(self, offset: int, size: int) -> int:
        """While it lies where the engine cannot have it."""
        return int.from_bytes(os.pread(self._memory, size, offset).ljust(size, b"\xff"), "little")

    def _mode_set(self, clear: int) -> None:
        self.chip.see(self.vbe.dac_8bit, self.vbe.is_enabled)
        self.show_memory()
        self.counters["modes"] += 1
        if clear:
            punch(self._memory, 0, clear)
            self.board.wrote_slot(SLOT)

    # ---- what is shown

    @property
    def changes_unseen(self) -> bool:
        return self._is_given

    @property
    def framebuffer(self) -> int:
        """The memfd, for a client that may write it: nobody knows what is there then. Below zero after the end."""
        self._is_given = True
        return self._memory

    @property
    def taken(self) -> int:
        """Blocks of 512 bytes."""
        return os.fstat(self._memory).st_blocks

    def open_framebuffer(self) -> int:
        """A descriptor to read, that is of the caller's own, which outlives the machine. Gone after that has ended.

        Does not take the board's lock, which a device may hold for long.
        """
        with self._closing:
            if self._memory < 0:
                raise Gone("the machine was removed")
            return os.dup(self._memory)

    def mode(self) -> TextMode | GraphicsMode:
        """What is shown now; from any thread."""
        with self.board.lock:
            return self.vbe.mode() if self.vbe.is_enabled else self.vga.mode()

    def size(self) -> tuple[int, int]:
        """How wide and high the screen is, in pixels."""
        mode = self.mode()
        return mode.width * (mode.columns if isinstance(mode, TextMode) else 1), mode.height

    def planes(self) -> bytes:
        """The VGA's memory, a byte of each plane after another. Gone after the machine has ended."""
        with self.board.lock:
            if self._memory < 0:
                raise Gone("the machine was removed")
            seen = None if self.vbe.is_enabled or not self.board.has_window else in_ram(self.chip.layout)
            ram = None if seen is None else self.board.ram[seen.address : seen.address + seen.size]
            return self.chip.seen(ram, bool(seen and seen.chained))

    def describe(self) -> dict[str, str]:
        lines = {**super().describe(), "mode": str(self.mode())}
        mode = self.mode()
        if isinstance(mode, GraphicsMode) and not mode.factor:
            lines["framebuffer"] = f"start={mode.start} pitch={mode.pitch} bits={mode.bits}"
        return lines

    # ---- life

    def reset(self) -> None:
        super().reset()
        self.chip.reset()
        self.vbe.reset()
        self.show_memory()

    def save(self) -> DisplayState:
        return DisplayState(
            pci=self.save_pci(),
            vga=self.vga.save(),
            vbe=self.vbe.save(),
            framebuffer=tuple(_parts(self._memory)),
        )

    def check(self, state: DisplayState) -> None:
        self.check_pci(state.pci)
        self.vbe.check(state.vbe)
        if any(offset + len(data) > FRAMEBUFFER_SIZE for offset, data in state.framebuffer):
            raise Invalid(f"{self.name}: the framebuffer has {FRAMEBUFFER_SIZE} bytes")

    def load(self, state: DisplayState) -> None:
        self.vbe.load(state.vbe)
        self.vga.load(state.vga)
        self.chip.see(state.vga.dac_8bit, self.vbe.is_enabled)
        self.show_memory()
        self.load_pci(state.pci)
        punch(self._memory, 0, FRAMEBUFFER_SIZE)
        for offset, data in state.framebuffer:
            os.pwrite(self._memory, data, offset)

    def close(self) -> None:
        with self._closing:
            fd, self._memory = self._memory, -1
        if fd >= 0:
            os.close(fd)
            self.chip.close()
            self._planes.close()


def _parts(fd: int) -> list[tuple[int, bytes]]:
    """The parts of a memfd that have other pages than zeros. Where somebody has only looked there are pages, too."""
    parts, at = [], 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no more
            return parts
        at = os.lseek(fd, start, os.SEEK_HOLE)
        data = os.pread(fd, at - start, start)
        first = end = 0  # of what is not zeros
        for page in range(0, len(data), _PAGE):
            if data[page : page + _PAGE] == _ZEROS:
                continue
            if end != page:
                if end > first:
                    parts.append((start + first, data[first:end]))
                first = page
            end = page + _PAGE
        if end > first:
            parts.append((start + first, data[first:end]))
