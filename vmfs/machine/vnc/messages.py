"""RFB: what a client says, as events, and what is said to it.

`Decoder` takes bytes as they come and keeps no more of them than a message has that it looks at; text of a clipboard is
passed over. What no client may say is an `Invalid`, which ends the connection.

Sources: RFC 6143, "The Remote Framebuffer Protocol"; the RFB community's protocol description (rfbproto.rst) for the
numbers and messages of Tight, QEMU and ExtendedDesktopSize.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass

from vmfs.words.errors import Invalid

VERSIONS = {b"RFB 003.003\n": (3, 3), b"RFB 003.007\n": (3, 7), b"RFB 003.008\n": (3, 8)}
VERSION_LENGTH = 12
NO_AUTHENTICATION, VNC_AUTHENTICATION = 1, 2
CHALLENGE = 16

RAW, COPY_RECT, TIGHT, ZRLE = 0, 1, 7, 16
CURSOR, DESKTOP_SIZE, LAST_RECT = -239, -223, -224
POINTER_MOTION, EXTENDED_KEY, LED_STATE = -257, -258, -261  # QEMU's
EXTENDED_DESKTOP_SIZE = -308
JPEG_QUALITY = range(-32, -22)  # of Tight: the client takes JPEG, so good
PROHIBITED = 1  # why a client's size is not taken

_ENCODINGS_MOST = 1024
_TEXT_MOST = 1 << 20
_SCREENS_MOST = 255


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """`size`: bytes. Colours of a map are as those of 8 bits, blue in the highest two (`MAP`)."""

    size: int
    big: bool
    most: tuple[int, int, int]
    shift: tuple[int, int, int]
    mapped: bool = False
    depth: int = 24

    def pack(self) -> bytes:
        return struct.pack(
            ">BBBBHHHBBB3x", 8 * self.size, self.depth, self.big, not self.mapped, *self.most, *self.shift
        )

    @property
    def words(self) -> tuple[int, ...]:
        """As `_pixels` takes it: of 32 bits, colours that are in three bytes are sent in three."""
        least, skip = self.size, 0
        used = 0
        for most, shift in zip(self.most, self.shift, strict=True):
            used |= most << shift
        if self.size == 4 and not self.mapped and self.depth <= 24:
            if used < 1 << 24:
                least, skip = 3, int(self.big)
            elif not used & 0xFF:
                least, skip = 3, int(not self.big)
        rgb = self.size == 4 and self.depth == 24 and self.most == (255, 255, 255) and not self.mapped
        return self.size, int(self.big), *self.most, *self.shift, least, skip, int(rgb)

    @property
    def takes_jpeg(self) -> bool:
        """The protocol has it for pixels of 16 bits and more alone."""
        return self.size > 1


FORMAT = PixelFormat(4, False, (255, 255, 255), (16, 8, 0))  # the server's own
_MAPPED = PixelFormat(1, False, (7, 7, 3), (0, 3, 6), mapped=True, depth=8)


@dataclass(frozen=True, slots=True)
class SetPixelFormat:
    format: PixelFormat


@dataclass(frozen=True, slots=True)
class SetEncodings:
    encodings: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    incremental: bool
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """`code`: QEMU's number of the key (0: the client has only said its symbol)."""

    down: bool
    symbol: int
    code: int = 0


@dataclass(frozen=True, slots=True)
class PointerEvent:
    buttons: int
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class SetDesktopSize:
    width: int
    height: int


Event = SetPixelFormat | SetEncodings | UpdateRequest | KeyEvent | PointerEvent | SetDesktopSize


class Decoder:
    """Of what comes after the handshake."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._passed = 0  # bytes that are still to be passed over

    def feed(self, data: bytes) -> Generator[Event, None, None]:
        """The events that are whole now. Invalid for what is no message."""
        passed = min(self._passed, len(data))
        self._passed -= passed
        self._held += data[passed:]
        while self._held:
            length = self._length()
            if length is None or len(self._held) < length:
                return
            message = bytes(self._held[:length])
            del self._held[:length]
            event = self._event(message)
            if event is not None:
                yield event
            passed = min(self._passed, len(self._held))
            del self._held[:passed]
            self._passed -= passed

    @property
    def held(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._held)

    def _length(self) -> int | None:
        """Of the message that begins, as far as it is looked at; None: more of it has to come first."""
        held, kind = self._held, self._held[0]
        if kind in _LENGTHS:
            return _LENGTHS[kind]
        if kind == 2:
            return 4 + 4 * self._at_most("encodings", 2, _ENCODINGS_MOST) if len(held) >= 4 else None
        if kind == 251:
            return 8 + 16 * self._at_most("screens", 6, _SCREENS_MOST, 1) if len(held) >= 8 else None
        if kind == 255:
            if len(held) >= 2 and held[1] != 0:
                raise Invalid(f"vnc: there is no message 255 of kind {held[1]}")
            return 12
        raise Invalid(f"vnc: there is no message {kind}")

    def _at_most(self, what: str, offset: int, most: int, size: int = 2) -> int:
        count = int.from_bytes(self._held[offset : offset + size], "big")
        if count > most:
            raise Invalid(f"vnc: {count} {what} are too many")
        return count

    def _event(self, message: bytes) -> Event | None:
        match message[0]:
            case 0:
                return SetPixelFormat(parse_format(message[4:]))
            case 2:
                return SetEncodings(struct.unpack(f">{len(message) // 4 - 1}i", message[4:]))
            case 3:
                incremental, *where = struct.unpack(">?HHHH", message[1:])
                return UpdateRequest(incremental, *where)
            case 4:
                down, symbol = struct.unpack(">?xxI", message[1:])
                return KeyEvent(down, symbol)
            case 5:
                return PointerEvent(*struct.unpack(">BHH", message[1:]))
            case 6:
                (length,) = struct.unpack(">I", message[4:])
                if length > _TEXT_MOST:
                    raise Invalid(f"vnc: a text of {length} bytes is too long")
                self._passed = length
                return None
            case 251:
                return SetDesktopSize(*struct.unpack(">HH", message[2:6]))
        down, symbol, code = struct.unpack(">HII", message[2:])
        return KeyEvent(bool(down), symbol, code & 0xFF)


# Message -> its length; those of other lengths are in `_length`.
_LENGTHS = {0: 20, 3: 10, 4: 8, 5: 6, 6: 8}


def parse_format(data: bytes) -> PixelFormat:
    """Of struct PIXEL_FORMAT; Invalid for one that cannot be."""
    bits, depth, big, true, *rest = struct.unpack(">BBBBHHHBBB3x", data)
    most, shift = (rest[0], rest[1], rest[2]), (rest[3], rest[4], rest[5])
    if bits not in (8, 16, 32):
        raise Invalid(f"vnc: there are no pixels of {bits} bits")
    if not true:
        if bits != 8:
            raise Invalid("vnc: a map of colours is for pixels of 8 bits")
        return _MAPPED
    for one, at in zip(most, shift, strict=True):
        if not one or one & one + 1 or one << at >= 1 << bits:
            raise Invalid(f"vnc: pixels of {bits} bits have no colour of {one} << {at}")
    return PixelFormat(bits // 8, bool(big), most, shift, depth=min(depth, bits))


# ---- what is said to a client


def server_init(width: int, height: int, name: str) -> bytes:
    title = name.encode()
    return struct.pack(">HH", width, height) + FORMAT.pack() + struct.pack(">I", len(title)) + title


def reason(sentence: str) -> bytes:
    text = sentence.encode()
    return struct.pack(">I", len(text)) + text


def update_header(count: int) -> bytes:
    return struct.pack(">BxH", 0, count)


def rectangle(x: int, y: int, width: int, height: int, encoding: int) -> bytes:
    return struct.pack(">HHHHi", x, y, width, height, encoding)


def extended_size(width: int, height: int, asked_by: int = 0, status: int = 0) -> bytes:
    """A rectangle that says the size, with the one screen that there is."""
    head = rectangle(asked_by, status, width, height, EXTENDED_DESKTOP_SIZE)
    return head + struct.pack(">BxxxIHHHHI", 1, 1, 0, 0, width, height, 0)


def colour_map() -> bytes:
    """The colours of `_MAPPED`."""
    colours = [(n & 7, n >> 3 & 7, n >> 6) for n in range(256)]
    words = [(r * 65535 // 7, g * 65535 // 7, b * 65535 // 3) for r, g, b in colours]
    return struct.pack(">BxHH", 1, 0, 256) + b"".join(struct.pack(">HHH", *one) for one in words)
