"""EDID: what a monitor says of itself. Source: VESA E-EDID standard, release A.2 (EDID 1.4)."""

from __future__ import annotations

import struct

_NAME = b"vmfs"
_H_FRONT, _H_SYNC, _H_BLANK = 48, 32, 160  # of CVT's reduced blanking
_V_FRONT, _V_SYNC, _V_BLANK_LEAST = 3, 6, 21
_HERTZ = 60
MOST = 4095  # pixels, both ways, that a timing can say
_SRGB = bytes.fromhex("ee91a3544c99260f5054")
# 1920x1080, 1280x720, 1280x1024, 1600x1200 at 60 Hz, and no more.
_STANDARD = bytes.fromhex("d1c0" "81c0" "8180" "a940" "0101" "0101" "0101" "0101")


def edid(width: int, height: int) -> bytes:
    """The base block of one that has so many pixels."""
    maker = sum((letter - 64) << shift for letter, shift in zip(b"VMF", (10, 5, 0), strict=True))
    block = bytearray(struct.pack(">QH", 0x00FF_FFFF_FFFF_FF00, maker) + struct.pack("<HIBBBB", 1, 1, 1, 36, 1, 4))
    wide, high = (pixels * 254 // 1000 for pixels in (width, height))  # millimetres at 100 pixels an inch
    block += bytes((0xA5, min(wide // 10, 255), min(high // 10, 255), 120, 0x06)) + _SRGB
    block += bytes((0x21, 0x08, 0)) + _STANDARD  # 640x480, 800x600, 1024x768 at 60 Hz
    block += _timing(width, height, wide, high)
    block += bytes((0, 0, 0, 0xFC, 0)) + (_NAME + b"\n").ljust(13)
    block += bytes((0, 0, 0, 0x10, 0)).ljust(18, b"\0") * 2
    block.append(0)
    block.append(-sum(block) & 0xFF)
    return bytes(block)


def _timing(width: int, height: int, wide: int, high: int) -> bytes:
    blank = max(height * 3 // 100, _V_BLANK_LEAST)
    clock = (width + _H_BLANK) * (height + blank) * _HERTZ // 10_000
    return struct.pack(
        "<H16B", min(clock, 0xFFFF), width & 0xFF, _H_BLANK, width >> 8 << 4, height & 0xFF, blank & 0xFF,
        height >> 8 << 4 | blank >> 8, _H_FRONT, _H_SYNC, _V_FRONT << 4 | _V_SYNC, 0, wide & 0xFF, high & 0xFF,
        wide >> 8 << 4 | high >> 8, 0, 0, 0x1A,
    )  # fmt: skip
