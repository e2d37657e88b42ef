"""VGA: what its registers at ports 3B0 to 3DF say of the screen, and how the CPU sees its memory.

Registers, the four planes and the picture are C's (chips/vga.c, chips/vga_draw.c). Where the CPU sees the planes as RAM
(text, CGA graphics, mode 13h) its accesses are to RAM at A0000-BFFFF, and cost nothing; where latches, masks or single
planes are between, they are the chip's. `layout` says which; when it changes bytes go from the one to the other.

Source: IBM VGA XGA Technical Reference Manual (1992), chapter 2; FreeVGA project, "VGA chipset reference".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U8, U32, DeviceState

PORTS_START, PORTS_END = 0x3B0, 0x3E0
PLANES = 256 << 10  # bytes
FRAME = 1_000_000_000 // 60  # ns; the retrace is a tenth of a frame
FONT_GLYPH = 32  # bytes from one glyph to the next in plane 2
FONT = 256 * FONT_GLYPH

# Layouts (chips/vga.h): text at B0000 and at B8000, four addresses for the four planes; and all else.
_IN_RAM = {4: (0xB_0000, 0x8000, False), 5: (0xB_8000, 0x8000, False), 6: (0xA_0000, 0x1_0000, True)}
# By graphics register 6: whether accesses to A0000-AFFFF, and to B0000-BFFFF, are the chip's.
_OF_CHIP = ((True, True), (True, False), (False, True), (False, True))


@dataclass(frozen=True, slots=True)
class InRam:
    """`size` bytes of RAM at `address` are what the CPU has of the planes: four, if `chained`, or the first two."""

    address: int
    size: int
    chained: bool


def in_ram(layout: int) -> InRam | None:
    return InRam(*_IN_RAM[layout]) if layout in _IN_RAM else None


def of_chip(layout: int) -> tuple[bool, bool]:
    return (False, False) if layout in _IN_RAM else _OF_CHIP[layout]


@dataclass(frozen=True, slots=True)
class TextMode:
    """A screen of characters, `width` dots each. The picture has one of `factor` scan lines, `height` in all."""

    columns: int
    rows: int
    width: int
    height: int
    factor: int

    def __str__(self) -> str:
        return f"text {self.columns}x{self.rows}"


@dataclass(frozen=True, slots=True)
class GraphicsMode:
    """A screen of pixels: in the framebuffer, from `start` on, `pitch` bytes a line; or, where `factor` is not 0, in
    the planes, of which a picture has one of so many scan lines."""

    width: int
    height: int
    bits: int
    start: int = 0
    pitch: int = 0
    factor: int = 0

    def __str__(self) -> str:
        return f"graphics {self.width}x{self.height}x{self.bits}"


def _below(limit: int) -> msgspec.Meta:
    return msgspec.Meta(ge=0, lt=limit)


def _length(count: int) -> msgspec.Meta:
    return msgspec.Meta(min_length=count, max_length=count)


class VgaState(DeviceState):
    """The registers by their names."""

    misc: U8
    feature: U8
    dac_mask: U8
    sequencer_index: Annotated[int, _below(8)]
    crtc_index: Annotated[int, _below(64)]
    graphics_index: Annotated[int, _below(16)]
    attribute_index: Annotated[int, _below(64)]
    dac_read: Annotated[int, _below(768)]
    dac_write: Annotated[int, _below(768)]
    attribute_data: bool
    dac_reading: bool
    dac_8bit: bool
    latch: U32
    sequencer: Annotated[bytes, _length(8)]
    crtc: Annotated[bytes, _length(25)]
    graphics: Annotated[bytes, _length(9)]
    attributes: Annotated[bytes, _length(21)]
    dac: Annotated[bytes, _length(768)]
    dac_latch: Annotated[bytes, _length(3)]


class Vga:
    """`chip` has the registers, and the planes in the first bytes of `memory`."""

    def __init__(self, bus: Any, number: int, memory: Any) -> None:
        self.chip = _chips.Vga(bus, number, memory)

    def registers(self) -> VgaState:
        """As they are now."""
        return VgaState(**self.chip.state())

    save = registers

    def load(self, state: VgaState) -> None:
        self.chip.load(**{name: getattr(state, name) for name in VgaState.__struct_fields__})

    def mode(self) -> TextMode | GraphicsMode:
        """What is shown."""
        v = self.registers()
        columns, line_height = v.crtc[1] + 1, (v.crtc[9] & 0x1F) + 1
        overflow = v.crtc[7]
        lines = (v.crtc[0x12] | (overflow & 2) << 7 | (overflow & 0x40) << 3) + 1
        doubled = 2 if v.crtc[9] & 0x80 else 1
        if v.graphics[6] & 1:
            # The lines of a row are the same, unless the row's counter is in the address.
            factor = doubled * (line_height if v.crtc[0x17] & 3 == 3 else 1)
            eight, two = v.graphics[5] & 0x40, v.graphics[5] & 0x20
            bits = 8 if eight else 2 if two else 1 if v.attributes[0x12] & 15 == 1 else 4
            return GraphicsMode(columns * (4 if eight else 8), max(lines // factor, 1), bits, factor=factor)
        rows = max(lines // (line_height * doubled), 1)
        width = 8 if v.sequencer[1] & 1 else 9
        return TextMode(columns, rows, width, max(lines // doubled, 1), doubled)

    def glyphs(self, planes: bytes) -> bool:
        """Whether the guest has loaded a font: the one that most characters use is not empty."""
        select = self.registers().sequencer[3]
        at = 4 * 0x2000 * ((select & 3) << 1 | select >> 4 & 1)
        return any(planes[at + 2 : at + 4 * FONT : 4])

    def colours(self) -> bytes:
        """Red, green, blue (0 to 255) of the 256 pixels that there are."""
        v = self.registers()
        if not v.dac_8bit:
            table = bytes((value << 2 | value >> 4) & 0xFF for value in range(256))
            dac = v.dac.translate(table)
        else:
            dac = v.dac
        if v.dac_mask == 0xFF:
            return dac
        return b"".join(dac[3 * (index & v.dac_mask) :][:3] for index in range(256))
