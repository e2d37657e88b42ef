"""Display: a VGA with Bochs' VBE on the PCI bus, 1234:1111, as QEMU's "std" VGA is, and what it shows.

BAR 0 is the framebuffer, memory of its own; BAR 2 registers: the VGA's ports from 400 on, the VBE's from 500 on. Both
are at their legacy ports, too. There is no banked window at A0000 into the framebuffer, and no EDID.

Source: QEMU's docs/specs/standard-vga.rst; Linux drivers/gpu/drm/tiny/bochs.c for what a driver expects.
"""

from __future__ import annotations

import fcntl
import os
import threading

from vmfs.devices.device import FIRST_SLOT, U32, DeviceState, Port, Window
from vmfs.devices.pci import Bar, PciDevice, PciState
from vmfs.devices.vbe import PORT, REGISTERS, Vbe, VbeState
from vmfs.devices.vga import PORTS_END, PORTS_START, GraphicsMode, TextMode, Vga, VgaState
from vmfs.memory.hostfile import punch
from vmfs.words.errors import Gone, Invalid, VmfsError

FRAMEBUFFER_SIZE = 16 << 20
SLOT = FIRST_SLOT  # of the engine's memory

_FRAMEBUFFER, _REGISTERS, _VGA_PORTS, _VBE_PORTS = 0, 2, 6, 7  # regions: BARs by their index, legacy ports
_VGA_AT, _VGA_END, _VBE_AT = 0x400, 0x420, 0x500


class DisplayState(DeviceState):
    """`framebuffer`: what was ever written of it, offsets and bytes."""

    pci: PciState
    vga: VgaState
    vbe: VbeState
    framebuffer: tuple[tuple[U32, bytes], ...]


class Display(PciDevice[DisplayState]):
    """`framebuffer` is a memfd of FRAMEBUFFER_SIZE bytes, which the guest has at BAR 0."""

    TYPE = "vga"
    STATE = DisplayState
    VENDOR, DEVICE, CLASS, REVISION = 0x1234, 0x1111, 0x030000, 2
    SUBSYSTEM = (0x1AF4, 0x1100)
    INTERRUPT = False
    BARS = {_FRAMEBUFFER: Bar("memory", FRAMEBUFFER_SIZE, prefetchable=True), _REGISTERS: Bar("memory", 4096)}

    def __init__(self, board: Port, name: str, slot: int) -> None:
        super().__init__(board, name, slot)
        self.vga = Vga(board.now)
        self.vbe = Vbe(FRAMEBUFFER_SIZE, self._mode_set)
        self.framebuffer = os.memfd_create("vmfs-framebuffer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.framebuffer, FRAMEBUFFER_SIZE)
        # Clients that map it hold it; none of them can pull it away under the guest.
        fcntl.fcntl(self.framebuffer, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._closing = threading.Lock()
        self._mapped: int | None = None

    def windows(self) -> tuple[Window, ...]:
        return (
            *super().windows(),
            Window("port", PORTS_START, PORTS_END - PORTS_START, _VGA_PORTS),
            Window("port", PORT, 2, _VBE_PORTS),
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
                self.board.map_memory(SLOT, address, self.framebuffer, 0, FRAMEBUFFER_SIZE)
                self._mapped = address
            except VmfsError:  # a guest has put it over other memory, which stays
                self.counters["overlaps"] += 1

    # ---- accesses

    def read(self, region: int, offset: int, size: int) -> int:
        if region == _VGA_PORTS:
            return self.vga.read(PORTS_START + offset, size)
        if region == _VBE_PORTS:
            if size != 2:
                return (1 << 8 * size) - 1
            return self.vbe.index if offset == 0 else self.vbe.read(self.vbe.index)
        if region == _REGISTERS:
            return self._read_register(offset, size)
        return self._read_framebuffer(offset, size)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if region == _VGA_PORTS:
            self.vga.write(PORTS_START + offset, size, value)
        elif region == _VBE_PORTS:
            if size == 2 and offset == 0:
                self.vbe.index = value
            elif size == 2:
                self.vbe.write(self.vbe.index, value)
        elif region == _REGISTERS:
            self._write_register(offset, size, value)
        else:
            os.pwrite(self.framebuffer, value.to_bytes(size, "little")[: FRAMEBUFFER_SIZE - offset], offset)

    def _read_register(self, offset: int, size: int) -> int:
        if _VGA_AT <= offset and offset + size <= _VGA_END:
            return self.vga.read(0x3C0 + offset - _VGA_AT, size)
        if _VBE_AT <= offset < _VBE_AT + 2 * REGISTERS and offset % 2 == 0 and size == 2:
            return self.vbe.read((offset - _VBE_AT) // 2)
        return 0

    def _write_register(self, offset: int, size: int, value: int) -> None:
        if _VGA_AT <= offset and offset + size <= _VGA_END:
            self.vga.write(0x3C0 + offset - _VGA_AT, size, value)
        elif _VBE_AT <= offset < _VBE_AT + 2 * REGISTERS and offset % 2 == 0 and size == 2:
            self.vbe.write((offset - _VBE_AT) // 2, value)

    def _read_framebuffer(self, offset: int, size: int) -> int:
        """While it lies where the engine cannot have it."""
        return int.from_bytes(os.pread(self.framebuffer, size, offset).ljust(size, b"\xff"), "little")

    def _mode_set(self, clear: int) -> None:
        self.vga.dac_8bit = self.vbe.dac_8bit
        self.counters["modes"] += 1
        if clear:
            punch(self.framebuffer, 0, clear)
            self.board.wrote_slot(SLOT)

    # ---- what is shown

    def open_framebuffer(self) -> int:
        """A descriptor of the caller's own, which outlives the machine. Gone after that has ended.

        Does not take the board's lock, which a device may hold for long.
        """
        with self._closing:
            if self.framebuffer < 0:
                raise Gone("the machine was removed")
            return os.dup(self.framebuffer)

    def mode(self) -> TextMode | GraphicsMode:
        """What is shown now; from any thread."""
        with self.board.lock:
            return self.vbe.mode() if self.vbe.is_enabled else self.vga.mode()

    def describe(self) -> dict[str, str]:
        lines = {**super().describe(), "mode": str(self.mode())}
        mode = self.mode()
        if isinstance(mode, GraphicsMode) and mode.memory == "framebuffer":
            lines["framebuffer"] = f"start={mode.start} pitch={mode.pitch} bits={mode.bits}"
        return lines

    # ---- life

    def reset(self) -> None:
        super().reset()
        self.vga.reset()
        self.vbe.reset()
        self.vga.dac_8bit = False

    def save(self) -> DisplayState:
        return DisplayState(
            pci=self.save_pci(),
            vga=self.vga.save(),
            vbe=self.vbe.save(),
            framebuffer=tuple(_parts(self.framebuffer)),
        )

    def check(self, state: DisplayState) -> None:
        self.check_pci(state.pci)
        self.vbe.check(state.vbe)
        if any(offset + len(data) > FRAMEBUFFER_SIZE for offset, data in state.framebuffer):
            raise Invalid(f"{self.name}: the framebuffer has {FRAMEBUFFER_SIZE} bytes")

    def load(self, state: DisplayState) -> None:
        self.vbe.load(state.vbe)
        self.vga.load(state.vga)
        self.load_pci(state.pci)
        punch(self.framebuffer, 0, FRAMEBUFFER_SIZE)
        for offset, data in state.framebuffer:
            os.pwrite(self.framebuffer, data, offset)

    def close(self) -> None:
        with self._closing:
            fd, self.framebuffer = self.framebuffer, -1
        if fd >= 0:
            os.close(fd)


def _parts(fd: int) -> list[tuple[int, bytes]]:
    """The parts of a memfd that are no holes."""
    parts, at = [], 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no more
            return parts
        at = os.lseek(fd, start, os.SEEK_HOLE)
        parts.append((start, os.pread(fd, at - start, start)))
