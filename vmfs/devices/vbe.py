"""VBE: the registers by which Bochs' and QEMU's display adapter sets modes with a linear framebuffer.

An index at port 1CE and data at port 1CF, both of 16 bits. Source: Bochs' document "VBE Display API"
(bochs/iodev/display/vbe.h names the registers), QEMU's docs/specs/standard-vga.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from vmfs.devices.device import U16, DeviceState
from vmfs.devices.vga import GraphicsMode
from vmfs.words.errors import Invalid

PORT = 0x1CE

ID, XRES, YRES, BPP, ENABLE, BANK, VIRT_WIDTH, VIRT_HEIGHT, X_OFFSET, Y_OFFSET, MEMORY_64K = range(11)
REGISTERS = 11
FIRST_ID, LAST_ID = 0xB0C0, 0xB0C5
ENABLED, GETCAPS, DAC_8BIT, LFB, NO_CLEAR = 0x01, 0x02, 0x20, 0x40, 0x80
MOST = {XRES: 8192, YRES: 8192, BPP: 32}
DEPTHS = (8, 15, 16, 24, 32)


class VbeState(DeviceState):
    index: U16
    registers: Annotated[tuple[U16, ...], msgspec.Meta(min_length=REGISTERS, max_length=REGISTERS)]


class Vbe:
    """`size` bytes of framebuffer; `changed(clear)` is called when a mode was set: with whether to clear so many
    bytes."""

    def __init__(self, size: int, changed: Callable[[int], None]) -> None:
        self.size = size
        self._changed = changed
        self.reset()

    def reset(self) -> None:
        self.index = 0
        self.registers = [0] * REGISTERS
        self.registers[ID] = LAST_ID
        self.registers[MEMORY_64K] = self.size >> 16

    @property
    def is_enabled(self) -> bool:
        return bool(self.registers[ENABLE] & ENABLED)

    @property
    def dac_8bit(self) -> bool:
        return bool(self.registers[ENABLE] & DAC_8BIT)

    @property
    def bank(self) -> int:
        return self.registers[BANK]

    def _pitch(self, width: int) -> int:
        return width * ((self.registers[BPP] + 7) // 8)

    def mode(self) -> GraphicsMode:
        """What is shown while it is enabled: all of it is in the framebuffer."""
        get = self.registers
        pitch = self._pitch(get[VIRT_WIDTH])
        start = get[Y_OFFSET] * pitch + self._pitch(get[X_OFFSET])
        return GraphicsMode(get[XRES], get[YRES], get[BPP], start, pitch)

    def read(self, index: int) -> int:
        if index >= REGISTERS:
            return 0
        if self.registers[ENABLE] & GETCAPS and index in MOST:
            return MOST[index]
        return self.registers[index]

    def write(self, index: int, value: int) -> None:
        """What cannot be is not taken; a guest reads back what is."""
        get = self.registers
        if index == ID:
            if FIRST_ID <= value <= LAST_ID:
                get[ID] = value
        elif index == ENABLE:
            self._enable(value)
        elif index in MOST:
            # They hold until the next mode: a mode that is shown does not change under way.
            if not self.is_enabled and self._can_be(index, value):
                get[index] = 8 if index == BPP and value == 4 else value
        elif index == BANK:
            get[BANK] = value & (self.size >> 16) - 1  # so many bits as there are banks
            self._changed(0)
        elif index == VIRT_WIDTH and self.is_enabled:
            if value >= get[XRES] and get[YRES] <= self._lines(value):
                get[VIRT_WIDTH], get[VIRT_HEIGHT] = value, self._lines(value)
                get[X_OFFSET] = min(get[X_OFFSET], value - get[XRES])
                get[Y_OFFSET] = min(get[Y_OFFSET], get[VIRT_HEIGHT] - get[YRES])
        elif index == X_OFFSET and self.is_enabled:
            if value + get[XRES] <= get[VIRT_WIDTH]:
                get[X_OFFSET] = value
        elif index == Y_OFFSET and self.is_enabled and value + get[YRES] <= get[VIRT_HEIGHT]:
            get[Y_OFFSET] = value

    @staticmethod
    def _can_be(index: int, value: int) -> bool:
        if index == BPP:
            return value in DEPTHS or value == 4
        return 0 < value <= MOST[index] and (index == YRES or value % 8 == 0)

    def _lines(self, width: int) -> int:
        """How many lines of `width` pixels the framebuffer has."""
        return min(self.size // self._pitch(width), 0xFFFF) if width else 0

    def _enable(self, value: int) -> None:
        get = self.registers
        was = self.is_enabled
        value &= ENABLED | GETCAPS | DAC_8BIT | LFB | NO_CLEAR
        clear = 0
        if value & ENABLED and not was:
            if not (get[XRES] and get[YRES] and get[BPP] and get[YRES] <= self._lines(get[XRES])):
                value &= ~ENABLED  # there is no such mode
            else:
                get[VIRT_WIDTH], get[VIRT_HEIGHT] = get[XRES], self._lines(get[XRES])
                get[X_OFFSET] = get[Y_OFFSET] = get[BANK] = 0
                clear = 0 if value & NO_CLEAR else self._pitch(get[XRES]) * get[YRES]
        get[ENABLE] = value
        self._changed(clear)

    def save(self) -> VbeState:
        return VbeState(index=self.index, registers=tuple(self.registers))

    def check(self, state: VbeState) -> None:
        """Invalid for a mode that cannot be."""
        other = Vbe(self.size, lambda clear: None)
        other.index, other.registers = state.index, list(state.registers)
        if not other._is_possible():
            raise Invalid("vbe: there is no such mode")

    def load(self, state: VbeState) -> None:
        self.index, self.registers = state.index, list(state.registers)

    def _is_possible(self) -> bool:
        get = self.registers
        if not FIRST_ID <= get[ID] <= LAST_ID or get[MEMORY_64K] != self.size >> 16 or get[BANK] >= self.size >> 16:
            return False
        if any(get[index] and not self._can_be(index, get[index]) for index in MOST) or get[BPP] == 4:
            return False
        if not self.is_enabled:
            return True
        return (
            0 < get[XRES] <= get[VIRT_WIDTH] - get[X_OFFSET]
            and 0 < get[BPP]
            and 0 < get[YRES] <= get[VIRT_HEIGHT] - get[Y_OFFSET]
            and get[VIRT_HEIGHT] == self._lines(get[VIRT_WIDTH])
        )
