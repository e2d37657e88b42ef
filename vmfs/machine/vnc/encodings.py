"""What parts of a picture are on the wire, and how they are compressed, which goes on from part to part."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from vmfs.devices import _pixels
from vmfs.devices.screen import TILE, Picture
from vmfs.machine.vnc.messages import FORMAT, JPEG_QUALITY, RAW, TIGHT, ZRLE, PixelFormat

_PICTURE_FORMAT = PixelFormat(4, False, (255, 255, 255), (0, 8, 16)).words

Rectangle = tuple[int, int, int, int]  # x, y, width, height

LEVEL = 1  # of zlib: what a screen has is compressed as well by the first
KNOWN = (TIGHT, ZRLE, RAW)  # those that a client is sent, in the order in which they are taken where it does not care

_PIXELS_MOST = 1 << 16  # of one part, so that no message of it is long
_TIGHT_WIDTH = 2048
_SHORTEST = 12  # bytes that Tight compresses
_JPEG_LEAST = 1 << 10  # pixels of a part for which JPEG is worth its header
ROUGH_PIXELS_MOST = 1 << 20  # of a part that may be JPEG


def parts_of(picture: Picture, dirty: bytearray, within: Rectangle, most: int = _PIXELS_MOST) -> list[Rectangle]:
    """The rectangles that tiles which are not 0 make, as few and as large as `most` pixels let, inside `within`."""
    first, last = dirty.find(1), dirty.rfind(1)
    if first < 0:
        return []
    found: list[Rectangle] = []
    left, top, right, bottom = within[0], within[1], within[0] + within[2], within[1] + within[3]
    open_parts: dict[tuple[int, int], tuple[int, int]] = {}  # first and last column -> first and last row
    before, runs = None, frozenset()
    for row in range(first // picture.across, last // picture.across + 2):  # none in the row after the last one
        line = dirty[row * picture.across : (row + 1) * picture.across]
        if line != before:
            before, runs = line, frozenset(_runs(line))
        for run, rows in list(open_parts.items()):
            if run not in runs or (rows[1] + 2 - rows[0]) * (run[1] - run[0]) * TILE * TILE > most:
                x, y = max(run[0] * TILE, left), max(rows[0] * TILE, top)
                width, height = min(run[1] * TILE, right) - x, min((rows[1] + 1) * TILE, bottom) - y
                if width > 0 and height > 0:
                    found.append((x, y, width, height))
                del open_parts[run]
        for run in runs:
            open_parts[run] = open_parts.get(run, (row, row))[0], row
    return found


def _runs(line: bytearray) -> Iterator[tuple[int, int]]:
    """First and last of tiles that are not 0, one after another, no wider than a part may be."""
    at, widest = line.find(1), _TIGHT_WIDTH // TILE
    while at >= 0:
        end = line.find(0, at)
        end = min(len(line) if end < 0 else end, at + widest)
        yield at, end
        at = line.find(1, end)


def bands_of(part: Rectangle) -> list[Rectangle]:
    """A larger part, in such as are not."""
    x, y, width, height = part
    rows = max(_PIXELS_MOST // width, 1)
    return [(x, y + at, width, min(rows, height - at)) for at in range(0, height, rows)]


def jpeg_quality(encodings: tuple[int, ...]) -> int | None:
    """In percent, of the JPEG that a client takes (0 to 9 in what it says); None: it takes none."""
    levels = [one - JPEG_QUALITY.start for one in encodings if one in JPEG_QUALITY]
    return 30 + 7 * levels[0] if levels else None


def is_photograph(picture: Picture, part: Rectangle) -> bool:
    """Whether it has more colours than a palette, and is worth a JPEG's header."""
    enough = part[2] * part[3] >= _JPEG_LEAST
    return enough and _pixels.many(picture.pixels, picture.width, *part, FORMAT.words)


def as_jpeg(picture: Picture, part: Rectangle, quality: int) -> bytes:
    """What follows the rectangle's header, in Tight."""
    from PIL import Image  # loaded only by a process whose screen moves

    _, y, width, height = part
    if width == picture.width:  # as it is: libjpeg looks at each line once
        pixels = memoryview(picture.pixels)[4 * width * y : 4 * width * (y + height)]
    else:
        pixels = _pixels.raw(picture.pixels, picture.width, *part, _PICTURE_FORMAT)
    image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return b"\x90" + _compact(file.tell()) + file.getvalue()


class Encoder:
    """Of one client."""

    def __init__(self) -> None:
        self._zrle = zlib.compressobj(LEVEL)
        self._tight = [zlib.compressobj(LEVEL) for _ in range(3)]

    def encode(self, encoding: int, picture: Picture, part: Rectangle, format: PixelFormat) -> bytes:
        """What follows the rectangle's header."""
        args = picture.pixels, picture.width, *part, format.words
        if encoding == TIGHT:
            return self._as_tight(*_pixels.tight(*args))
        if encoding == ZRLE:
            data = self._zrle.compress(_pixels.zrle(*args)) + self._zrle.flush(zlib.Z_SYNC_FLUSH)
            return struct.pack(">I", len(data)) + data
        return _pixels.raw(*args)

    def _as_tight(self, count: int, palette: bytes, data: bytes) -> bytes:
        if count == 1:
            return b"\x80" + data
        stream = 0 if count == 0 else 1 if count == 2 else 2
        head = bytes((stream << 4,)) if count == 0 else bytes((stream << 4 | 0x40, 1, count - 1)) + palette
        if len(data) < _SHORTEST:
            return head + data
        compress = self._tight[stream]
        data = compress.compress(data) + compress.flush(zlib.Z_SYNC_FLUSH)
        return head + _compact(len(data)) + data


def _compact(length: int) -> bytes:
    """Seven bits a byte, the lowest first, eight in the third."""
    if length < 1 << 7:
        return bytes((length,))
    if length < 1 << 14:
        return bytes((length & 0x7F | 0x80, length >> 7))
    return bytes((length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14))
