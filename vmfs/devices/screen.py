"""Screen: what the display shows, as text and as a picture."""

from __future__ import annotations

import functools
import io
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmfs.devices import _pixels
from vmfs.devices.display import Display
from vmfs.devices.vga import FONT_GLYPH, GraphicsMode, TextMode
from vmfs.devices.virtio.gpu import Gpu
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


def vga_bios() -> bytes:
    """The host's VGA BIOS; empty where it has none. Read once: a machine in its sandbox opens no file."""
    return _first_of(VGA_BIOSES)


@functools.cache
def _first_of(paths: tuple[Path, ...]) -> bytes:
    path = next((path for path in paths if path.is_file()), None)
    return b"" if path is None else path.read_bytes()


def text(display: Display | Gpu) -> str:
    """The characters of the screen, a line a row, trailing blanks cut; a graphics mode's name and size."""
    mode = display.mode()
    if isinstance(mode, GraphicsMode) or isinstance(display, Gpu):
        return f"{mode}\n"
    cells = display.chip.cells(display.planes(), mode.columns, mode.rows)
    rows = (cells[at : at + mode.columns] for at in range(0, len(cells), mode.columns))
    return "".join("".join(CP437[one] for one in row).replace("\xa0", " ").rstrip() + "\n" for row in rows)


@dataclass(frozen=True, slots=True)
class Shown:
    """What is on the screen: `height` lines of `width` pixels of `bits`, the first at `start` of `data`, `pitch` bytes
    from one line to the next. `colours`: those of pixels of 8 bits, red, green, blue. What is beyond the end of `data`
    is black."""

    width: int
    height: int
    bits: int
    data: Any
    start: int
    pitch: int
    colours: bytes = b""

    def copy(self) -> bytes:
        """All lines from the first pixel on."""
        size = self.pitch * self.height
        return bytes(self.data[self.start : self.start + size]).ljust(size, b"\0")


class Mapped:
    """What was mapped of a framebuffer, for the next look at it: to map it anew costs nearly as much as to copy it."""

    def __init__(self) -> None:
        self._is: tuple[int, ...] = ()
        self._memory: mmap.mmap | None = None

    def part(self, fd: int, first: int, length: int) -> mmap.mmap:
        info = os.fstat(fd)
        wanted = info.st_dev, info.st_ino, first, length
        if self._memory is None or self._is != wanted:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all of it is read
            self._memory = mmap.mmap(fd, length, flags, mmap.PROT_READ, offset=first)
            self._is = wanted
        return self._memory


def look(display: Display | Gpu, mapped: Mapped | None = None) -> Shown:
    """What is shown now. Unsupported where there is no font.

    Characters have the guest's font where it has loaded one, else that of a VGA BIOS of the host. Nothing blinks: a
    character that does is shown, and so is the cursor.
    """
    if isinstance(display, Gpu):
        width, height, pixels = display.pixels()
        return Shown(width, height, 32, pixels, 0, 4 * width)
    mode = display.mode()
    if isinstance(mode, GraphicsMode) and not mode.factor:
        fd = display.open_framebuffer()
        try:
            size = os.fstat(fd).st_size
            first = min(mode.start, size - 1) // mmap.PAGESIZE * mmap.PAGESIZE
            length = min(mode.start + mode.pitch * mode.height, size) - first
            memory = (mapped or Mapped()).part(fd, first, length)
        finally:
            os.close(fd)
        colours = display.vga.colours() if mode.bits == 8 else b""
        return Shown(mode.width, mode.height, mode.bits, memory, mode.start - first, mode.pitch, colours)
    planes, font, width = display.planes(), None, mode.width
    if isinstance(mode, TextMode):
        width *= mode.columns
        if not display.vga.glyphs(planes):
            font = host_font()
    pixels = display.chip.draw(planes, font, width, mode.height, mode.factor)
    return Shown(width, mode.height, 8, pixels, 0, width, display.vga.colours())


_LAYOUTS = {15: "BGR;15", 16: "BGR;16", 24: "BGR", 32: "BGRX"}


def picture(display: Display | Gpu) -> bytes:
    """The screen as a PNG file; as `look`."""
    from PIL import Image  # loaded only by a process that makes pictures

    shown = look(display)
    data, size = shown.copy(), (shown.width, shown.height)
    if shown.bits == 8:
        image = Image.frombuffer("P", size, data, "raw", "P", shown.pitch, 1)
        image.putpalette(shown.colours)
    else:
        image = Image.frombuffer("RGB", size, data, "raw", _LAYOUTS[shown.bits], shown.pitch, 1)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Picture:
    """What a screen has shown, 32 bits a pixel (red, green, blue, 0) in `pixels`."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.pixels = bytearray(4 * width * height)
        self.across, self.down = -(-width // TILE), -(-height // TILE)  # tiles

    def update(self, shown: Shown) -> bytearray | None:
        """Be what is shown, of the same size. A byte a tile, 1 where a pixel has changed; None: none has."""
        colours = bytearray(1024)
        for channel in range(3):
            colours[channel : 4 * len(shown.colours) // 3 : 4] = shown.colours[channel::3]
        changed = bytearray(self.across * self.down)
        of = shown.data, shown.start, shown.pitch, shown.bits, colours
        count = _pixels.update(self.pixels, self.width, self.height, *of, TILE, changed)
        return changed if count else None


def host_font() -> bytes:
    """256 glyphs of 8x16, FONT_GLYPH bytes each. Unsupported where the host has none."""
    return _glyphs_in(vga_bios())


@functools.cache
def _glyphs_in(data: bytes) -> bytes:
    at = data.find(_FONT_BEGINS)
    if at < 0 or at + 256 * _FONT_HEIGHT > len(data):
        raise Unsupported("screen.png: the guest has loaded no font, and there is no VGA BIOS here (package seabios)")
    glyphs = (data[at + _FONT_HEIGHT * one :][:_FONT_HEIGHT] for one in range(256))
    return b"".join(glyph.ljust(FONT_GLYPH, b"\0") for glyph in glyphs)
