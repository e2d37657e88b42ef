"""Screen: what the display shows, as text and as a picture."""

from __future__ import annotations

import functools
import io
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmfs.devices import _pixels
from vmfs.devices.display import Display
from vmfs.devices.vga import FONT_GLYPH, GraphicsMode, TextMode
from vmfs.memory.ram import MemoryView
from vmfs.words.errors import Unsupported

# Code page 437, as the character generator of every VGA has it: those below 32 and 127 are shown, too.
_LOW = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
CP437 = _LOW + bytes(range(32, 127)).decode("ascii") + "⌂" + bytes(range(128, 256)).decode("cp437")

# A VGA BIOS of the host; its font of 8x16 stands in for one that no guest has loaded, and is found by its first glyphs.
VGA_BIOSES = tuple(
    Path(directory) / "vgabios-stdvga.bin"
    for directory in ("/usr/share/seabios", "/usr/share/seavgabios", "/usr/share/qemu", "/usr/share/vgabios")
)
_FONT_BEGINS = bytes(16) + bytes.fromhex("00007e81a58181bd9981817e00000000")  # a blank and a face
_FONT_HEIGHT = 16
TILE = 32  # pixels, both ways: what a picture knows the changes of
_LINES_DRAWN = range(0xC0, 0xE0)  # characters whose ninth column repeats the eighth


def vga_bios() -> bytes:
    """The host's VGA BIOS; empty where it has none. Read once: a machine in its sandbox opens no file."""
    return _first_of(VGA_BIOSES)


@functools.cache
def _first_of(paths: tuple[Path, ...]) -> bytes:
    path = next((path for path in paths if path.is_file()), None)
    return b"" if path is None else path.read_bytes()


class Cells:
    """The characters of a text screen: `characters` and `attributes` row by row, CP437 and VGA."""

    def __init__(self, mode: TextMode, memory: MemoryView) -> None:
        window = memory.read(mode.window, mode.window_size).ljust(mode.window_size, b"\0")
        self.rows = []
        for row in range(mode.rows):
            start = (mode.start + row * mode.pitch) % mode.window_size
            line = window[start : start + 2 * mode.columns]
            line += window[: 2 * mode.columns - len(line)]
            self.rows.append((line[::2], line[1::2]))


def text(display: Display, memory: MemoryView) -> str:
    """The characters of the screen, a line a row, trailing blanks cut; a graphics mode's name and size."""
    mode = display.mode()
    if isinstance(mode, GraphicsMode):
        return f"{mode}\n"
    return "".join(
        "".join(CP437[character] for character in characters).replace("\xa0", " ").rstrip() + "\n"
        for characters, _ in Cells(mode, memory).rows
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """What is on the screen: `height` lines of `width` pixels of `bits`, the first at `start` of `data`, `pitch` bytes
    from one line to the next. `colours`: those of pixels of 8 bits, red, green, blue. What is beyond the end of `data`
    is black. `close` gives back what holds `data`."""

    width: int
    height: int
    bits: int
    data: Any
    start: int
    pitch: int
    colours: bytes = b""
    close: Callable[[], None] = lambda: None

    def copy(self) -> bytes:
        """All lines from the first pixel on."""
        size = self.pitch * self.height
        return bytes(self.data[self.start : self.start + size]).ljust(size, b"\0")


def look(display: Display, memory: MemoryView) -> Shown:
    """What is shown now. Unsupported for planar modes, whose planes are not kept, and where there is no font.

    Characters have the guest's font where it has loaded one, else that of a VGA BIOS of the host. Nothing blinks: a
    character that does is shown, and so is the cursor.
    """
    mode = display.mode()
    if isinstance(mode, TextMode):
        width, height, pixels = _draw(display, mode, memory)
        return Shown(width, height, 8, pixels, 0, width, _bytes_of(display.vga.text_colours()))
    if mode.memory == "planes":
        raise Unsupported(f"screen.png: {mode} is a planar mode; what the guest draws there is not kept")
    colours = _bytes_of(display.vga.pixel_colours()) if mode.bits == 8 else b""
    if mode.memory == "ram":
        data = memory.read(mode.start, mode.pitch * mode.height)
        return Shown(mode.width, mode.height, mode.bits, data, 0, mode.pitch, colours)
    fd = display.open_framebuffer()
    try:
        mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    return Shown(mode.width, mode.height, mode.bits, mapped, mode.start, mode.pitch, colours, mapped.close)


def _bytes_of(colours: list[tuple[int, int, int]]) -> bytes:
    return b"".join(map(bytes, colours))


_LAYOUTS = {15: "BGR;15", 16: "BGR;16", 24: "BGR", 32: "BGRX"}


def picture(display: Display, memory: MemoryView) -> bytes:
    """The screen as a PNG file; as `look`."""
    from PIL import Image  # loaded only by a process that makes pictures

    shown = look(display, memory)
    try:
        data, size = shown.copy(), (shown.width, shown.height)
    finally:
        shown.close()
    if shown.bits == 8:
        image = Image.frombuffer("P", size, data, "raw", "P", shown.pitch, 1)
        image.putpalette(shown.colours)
    else:
        image = Image.frombuffer("RGB", size, data, "raw", _LAYOUTS[shown.bits], shown.pitch, 1)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Picture:
    """What a screen has shown, 32 bits a pixel (blue, green, red, 0) in `pixels`."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.pixels = bytearray(4 * width * height)
        self.across, self.down = -(-width // TILE), -(-height // TILE)  # tiles

    def update(self, shown: Shown) -> bytearray | None:
        """Be what is shown, of the same size. A byte a tile, 1 where a pixel has changed; None: none has."""
        colours = bytearray(1024)
        for channel in range(3):
            colours[channel : 4 * len(shown.colours) // 3 : 4] = shown.colours[2 - channel :: 3]
        changed = bytearray(self.across * self.down)
        of = shown.data, shown.start, shown.pitch, shown.bits, colours
        count = _pixels.update(self.pixels, self.width, self.height, *of, TILE, changed)
        return changed if count else None


def _font(display: Display, mode: TextMode, memory: MemoryView) -> Callable[[int, int], int]:
    """What gives line Y of the glyph of a character."""
    address, glyph = display.vga.font, FONT_GLYPH
    if address is not None:
        data = memory.read(address, 256 * FONT_GLYPH).ljust(256 * FONT_GLYPH, b"\0")
        height = mode.height
    else:
        data, glyph, height = host_font(), _FONT_HEIGHT, _FONT_HEIGHT
    # Of a font that is as high as the characters every line is taken; another is stretched.
    return lambda character, y: data[character * glyph + min(y * height // mode.height, glyph - 1)]


def host_font() -> bytes:
    """256 glyphs of 8x16, 16 bytes each. Unsupported where the host has none."""
    data = vga_bios()
    at = data.find(_FONT_BEGINS)
    if at < 0 or at + 256 * _FONT_HEIGHT > len(data):
        raise Unsupported("screen.png: the guest has loaded no font, and there is no VGA BIOS here (package seabios)")
    return data[at : at + 256 * _FONT_HEIGHT]


def _draw(display: Display, mode: TextMode, memory: MemoryView) -> tuple[int, int, bytes]:
    """Width, height and pixels, each the number of its colour."""
    vga = display.vga
    line_of = _font(display, mode, memory)
    background_mask = 7 if vga.blinks else 15
    shapes: dict[tuple[int, int, bool], bytes] = {}

    def cell(bits: int, attribute: int, repeats: bool) -> bytes:
        key = bits, attribute, repeats
        if key not in shapes:
            bits <<= 1
            if repeats and bits & 2:
                bits |= 1
            colours = attribute >> 4 & background_mask, attribute & 15
            shapes[key] = bytes(colours[bits >> 8 - x & 1] for x in range(mode.width))
        return shapes[key]

    repeated = _LINES_DRAWN if mode.width == 9 and vga.repeats_ninth else range(0)
    at = 2 * mode.cursor - mode.start
    cursor_row, cursor_column = divmod(at, mode.pitch) if at >= 0 and mode.pitch else (-1, 0)
    cursor_column //= 2
    lines = []
    for number, (characters, attributes) in enumerate(Cells(mode, memory).rows):
        for y in range(mode.height):
            line = [
                cell(line_of(character, y), attribute, character in repeated)
                for character, attribute in zip(characters, attributes, strict=True)
            ]
            if number == cursor_row and cursor_column < mode.columns and mode.cursor_lines is not None:
                first, last = mode.cursor_lines
                if first <= y <= last:
                    line[cursor_column] = cell(0xFF, attributes[cursor_column], True)
            lines.append(b"".join(line))
    return mode.columns * mode.width, mode.rows * mode.height, b"".join(lines)
