"""VGA: the registers at ports 3B0 to 3DF, and the text screen and palette that they make of RAM.

The display's memory at A0000-BFFFF is the guest's RAM: what it writes there is there, a byte at an address, and no
plane follows another. So text modes work, and mode 13h (320x200, 256 colours), whose memory is a byte a pixel.
Planar modes (12h, the EGA's) can be set, but what they show is lost. A font that is loaded into plane 2, in the way
that every BIOS and every console driver does it, lies in RAM at A0000, and `font` finds it there.

Source: IBM VGA XGA Technical Reference Manual (1992), chapter 2; FreeVGA project, "VGA chipset reference".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from vmfs.devices.device import U8, DeviceState

PORTS_START, PORTS_END = 0x3B0, 0x3E0
FRAME = 1_000_000_000 // 60  # ns; the retrace is a tenth of a frame
FONT_GLYPH = 32  # bytes from one glyph to the next in plane 2
GRAPHICS_WINDOW = 0xA_0000

# What a BIOS leaves: mode 3, 80x25 characters of 9x16 in 16 colours at B8000 (the manual's tables of modes).
_MISC = 0x67
_SEQUENCER = bytes.fromhex("0300030002")
_CRTC = bytes.fromhex("5f4f50825581bf1f004f0d0e00000000 9c8e8f281f96b9a3ff")
_GRAPHICS = bytes.fromhex("000000000010 0e00ff")
_ATTRIBUTES = bytes.fromhex("000102030405140738393a3b3c3d3e3f 0c000f0800")

_WINDOWS = ((0xA_0000, 0x2_0000), (0xA_0000, 0x1_0000), (0xB_0000, 0x8000), (0xB_8000, 0x8000))  # graphics register 6


def _ega_palette() -> bytearray:
    """The 64 colours of the EGA, which a BIOS puts into the first registers of the DAC: rgbRGB, 6 bits each."""
    palette = bytearray(768)
    for index in range(64):
        for channel, (high, low) in enumerate(((2, 5), (1, 4), (0, 3))):
            palette[3 * index + channel] = 0x2A * (index >> high & 1) + 0x15 * (index >> low & 1)
    return palette


@dataclass(frozen=True, slots=True)
class TextMode:
    """A screen of characters of `width` x `height` pixels, in RAM: two bytes each, the first `start` bytes into the
    `window_size` bytes at `window`, in which addresses wrap. `pitch` is from row to row, in bytes.

    `cursor` is the character that it is on, counted from the window's start; `cursor_lines` the first and the last of
    its lines, or None where it is off."""

    columns: int
    rows: int
    window: int
    window_size: int
    start: int
    pitch: int
    width: int
    height: int
    cursor: int
    cursor_lines: tuple[int, int] | None

    def __str__(self) -> str:
        return f"text {self.columns}x{self.rows}"


@dataclass(frozen=True, slots=True)
class GraphicsMode:
    """A screen of pixels. `memory` "framebuffer": `start` is an offset in it; "ram": an address; "planes": gone."""

    width: int
    height: int
    bits: int
    memory: str
    start: int
    pitch: int

    def __str__(self) -> str:
        return f"graphics {self.width}x{self.height}x{self.bits}"


def _below(limit: int) -> msgspec.Meta:
    return msgspec.Meta(ge=0, lt=limit)


def _length(count: int) -> msgspec.Meta:
    return msgspec.Meta(min_length=count, max_length=count)


class VgaState(DeviceState):
    """The attributes of Vga by their names."""

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
    font_loaded: bool
    sequencer: Annotated[bytes, _length(8)]
    crtc: Annotated[bytes, _length(len(_CRTC))]
    graphics: Annotated[bytes, _length(len(_GRAPHICS))]
    attributes: Annotated[bytes, _length(len(_ATTRIBUTES))]
    dac: Annotated[bytes, _length(768)]
    dac_latch: Annotated[bytes, _length(3)]


class Vga:
    """The registers. `now` is the guest's time in nanoseconds."""

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self.dac_8bit = False  # set by the VBE
        self.reset()

    def reset(self) -> None:
        self.misc = _MISC
        self.feature = 0
        self.sequencer_index = self.crtc_index = self.graphics_index = 0
        self.sequencer = bytearray(_SEQUENCER.ljust(8, b"\0"))
        self.crtc = bytearray(_CRTC)
        self.graphics = bytearray(_GRAPHICS)
        self.attribute_index = 0x20  # bit 5: the screen is on
        self.attribute_data = False  # the flip-flop: whether port 3C0 expects data
        self.attributes = bytearray(_ATTRIBUTES)
        self.dac = _ega_palette()
        self.dac_latch = bytearray(3)  # red and green of the colour that is being written
        self.dac_mask = 0xFF
        self.dac_read = self.dac_write = 0  # the colour, times 3, and the channel
        self.dac_reading = False
        self.font_loaded = False

    # ---- ports

    def read(self, port: int, size: int) -> int:
        return int.from_bytes(bytes(self._read(port + at) for at in range(size)), "little")

    def write(self, port: int, size: int, value: int) -> None:
        for at in range(size):
            self._write(port + at, value >> 8 * at & 0xFF)

    def _crtc_port(self, port: int) -> int | None:
        """3B4, 3B5, 3BA or 3D4, 3D5, 3DA, whichever bit 0 of the miscellaneous output selects: 4, 5, A."""
        base = 0x3D0 if self.misc & 1 else 0x3B0
        return port - base if port - base in (4, 5, 10) else None

    def _read(self, port: int) -> int:
        match self._crtc_port(port):
            case 4:
                return self.crtc_index
            case 5:
                return self.crtc[self.crtc_index] if self.crtc_index < len(self.crtc) else 0
            case 10:
                self.attribute_data = False
                return self._input_status()
        match port:
            case 0x3C0:
                return self.attribute_index
            case 0x3C1:
                index = self.attribute_index & 0x1F
                return self.attributes[index] if index < len(self.attributes) else 0
            case 0x3C2:
                return 0x10  # a colour monitor is sensed
            case 0x3C4:
                return self.sequencer_index
            case 0x3C5:
                return self.sequencer[self.sequencer_index]
            case 0x3C6:
                return self.dac_mask
            case 0x3C7:
                return 3 if self.dac_reading else 0
            case 0x3C8:
                return self.dac_write // 3
            case 0x3C9:
                value = self.dac[self.dac_read]
                self.dac_read = (self.dac_read + 1) % len(self.dac)
                return value
            case 0x3CA:
                return self.feature
            case 0x3CC:
                return self.misc
            case 0x3CE:
                return self.graphics_index
            case 0x3CF:
                return self.graphics[self.graphics_index] if self.graphics_index < len(self.graphics) else 0
        return 0xFF

    def _input_status(self) -> int:
        """Bit 3: vertical retrace; bit 0: no picture is being drawn, which is so during every retrace."""
        return 9 if self._now() % FRAME < FRAME // 10 else 0

    def _write(self, port: int, value: int) -> None:
        match self._crtc_port(port):
            case 4:
                self.crtc_index = value & 0x3F
                return
            case 5:
                self._write_crtc(self.crtc_index, value)
                return
            case 10:
                self.feature = value
                return
        match port:
            case 0x3C0:
                self._write_attribute(value)
            case 0x3C2:
                self.misc = value
            case 0x3C4:
                self.sequencer_index = value & 7
            case 0x3C5:
                self.sequencer[self.sequencer_index] = value
                self._note_font()
            case 0x3C6:
                self.dac_mask = value
            case 0x3C7:
                self.dac_read, self.dac_reading = 3 * value, True
            case 0x3C8:
                self.dac_write, self.dac_reading = 3 * value, False
            case 0x3C9:  # a colour is taken when its blue has come (Inmos IMS G171)
                channel = self.dac_write % 3
                self.dac_latch[channel] = value if self.dac_8bit else value & 0x3F
                if channel == 2:
                    self.dac[self.dac_write - 2 : self.dac_write + 1] = self.dac_latch
                self.dac_write = (self.dac_write + 1) % len(self.dac)
            case 0x3CE:
                self.graphics_index = value & 0xF
            case 0x3CF:
                if self.graphics_index < len(self.graphics):
                    self.graphics[self.graphics_index] = value
                    self._note_font()

    def _write_attribute(self, value: int) -> None:
        index = self.attribute_index & 0x1F
        if not self.attribute_data:
            self.attribute_index = value & 0x3F
        elif index < 16 and not self.attribute_index & 0x20:
            self.attributes[index] = value & 0x3F  # the palette takes values while the screen is off only
        elif 16 <= index < len(self.attributes):
            self.attributes[index] = value
            self._note_font()
        self.attribute_data = not self.attribute_data

    def _write_crtc(self, index: int, value: int) -> None:
        if index >= len(self.crtc):
            return
        if index < 8 and self.crtc[0x11] & 0x80:  # these are protected
            if index == 7:  # but for bit 8 of the line compare
                self.crtc[7] = self.crtc[7] & ~0x10 | value & 0x10
            return
        self.crtc[index] = value

    def _note_font(self) -> None:
        """A font is in RAM once plane 2 alone was written to in the window at A0000, until graphics come there."""
        if self.attributes[0x10] & 1:
            self.font_loaded = False
        elif self.sequencer[2] & 0xF == 4 and self.graphics[6] & 0xC in (0, 4):
            self.font_loaded = True

    # ---- what they say

    @property
    def lines(self) -> int:
        """Lines of the picture, as they are scanned."""
        overflow = self.crtc[7]
        return (self.crtc[0x12] | (overflow & 2) << 7 | (overflow & 0x40) << 3) + 1

    @property
    def is_graphics(self) -> bool:
        return bool(self.graphics[6] & 1)

    def mode(self) -> TextMode | GraphicsMode:
        """What is shown."""
        columns = self.crtc[1] + 1
        line_height = (self.crtc[9] & 0x1F) + 1
        doubled = 2 if self.crtc[9] & 0x80 else 1
        window, size = _WINDOWS[self.graphics[6] >> 2 & 3]
        start = self.crtc[0xC] << 8 | self.crtc[0xD]
        if self.is_graphics:
            height = max(self.lines // (line_height * doubled), 1)
            if self.graphics[5] & 0x40 and self.sequencer[4] & 8:  # 256 colours; chained planes
                return GraphicsMode(columns * 4, height, 8, "ram", window + 4 * start, self.crtc[0x13] * 8)
            bits = 8 if self.graphics[5] & 0x40 else 2 if self.graphics[5] & 0x20 else 4
            width = columns * (4 if bits == 8 else 8)
            return GraphicsMode(width, height, bits, "planes", start, self.crtc[0x13] * 2)
        first, last = self.crtc[0xA] & 0x1F, self.crtc[0xB] & 0x1F
        is_on = not self.crtc[0xA] & 0x20 and first <= last
        return TextMode(
            columns=columns,
            rows=max(self.lines // (line_height * doubled), 1),
            window=window,
            window_size=size,
            start=2 * start,
            pitch=self.crtc[0x13] * 4,
            width=8 if self.sequencer[1] & 1 else 9,
            height=line_height,
            cursor=self.crtc[0xE] << 8 | self.crtc[0xF],
            cursor_lines=(first, last) if is_on else None,
        )

    @property
    def font(self) -> int | None:
        """The address of the font that the guest has loaded: 256 glyphs, FONT_GLYPH bytes apart. None: it has not."""
        if not self.font_loaded:
            return None
        select = self.sequencer[3]  # map B, which characters without attribute bit 3 use
        number = select & 3 | select >> 2 & 4
        return GRAPHICS_WINDOW + (number & 3) * 0x4000 + (number >> 2) * 0x2000

    @property
    def blinks(self) -> bool:
        """Whether bit 7 of a character's attribute makes it blink, rather than the background bright."""
        return bool(self.attributes[0x10] & 8)

    @property
    def repeats_ninth(self) -> bool:
        """Whether the ninth column of line-drawing characters repeats the eighth."""
        return bool(self.attributes[0x10] & 4)

    def colour(self, index: int) -> tuple[int, int, int]:
        """Red, green, blue (0 to 255) of a register of the DAC."""
        values = self.dac[3 * index : 3 * index + 3]
        if self.dac_8bit:
            return values[0], values[1], values[2]
        red, green, blue = (value << 2 | value >> 4 for value in values)
        return red, green, blue

    def text_colours(self) -> list[tuple[int, int, int]]:
        """The 16 colours of characters, by way of the attribute controller."""
        select = self.attributes[0x14]
        colours = []
        for value in self.attributes[:16]:
            if self.attributes[0x10] & 0x80:
                value = value & 0xF | (select & 3) << 4
            colours.append(self.colour((value & 0x3F | (select & 0xC) << 4) & self.dac_mask))
        return colours

    def pixel_colours(self) -> list[tuple[int, int, int]]:
        """The 256 colours of pixels of 8 bits."""
        return [self.colour(index & self.dac_mask) for index in range(256)]

    # ---- state

    def save(self) -> VgaState:
        values = {name: getattr(self, name) for name in VgaState.__struct_fields__}
        return VgaState(**{name: bytes(v) if isinstance(v, bytearray) else v for name, v in values.items()})

    def load(self, state: VgaState) -> None:
        for name in VgaState.__struct_fields__:
            value = getattr(state, name)
            setattr(self, name, bytearray(value) if isinstance(value, bytes) else value)
