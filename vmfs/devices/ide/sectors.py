"""A sector of a CD-ROM in mode 1 as it is on the disc: sync, header, user data, EDC, ECC.

Source: ECMA-130, clauses 14 (sectors), 14.3 (EDC), annex A (the codes of P and Q parity).
"""

from __future__ import annotations

import functools

USER = 2048
RAW = 2352
_SYNC = b"\0" + b"\xff" * 10 + b"\0"
_POLYNOMIAL = 0xD801_8001  # of EDC, reversed
FRAMES_A_SECOND, LEAD_IN = 75, 150  # frames before the first sector
# Of the parts of a sector in the order in which they are: the bit of READ CD's byte 9, first byte, length.
PARTS = (0x80, 0, 12), (0x20, 12, 4), (0x10, 16, USER), (0x08, 16 + USER, 288)


def msf(address: int) -> tuple[int, int, int]:
    """Minute, second, frame of a sector."""
    seconds, frame = divmod(address + LEAD_IN, FRAMES_A_SECOND)
    return seconds // 60 & 0xFF, seconds % 60, frame


def sector_of(minute: int, second: int, frame: int) -> int:
    return (minute * 60 + second) * FRAMES_A_SECOND + frame - LEAD_IN


def raw_sector(address: int, data: bytes | memoryview) -> bytes:
    """2352 bytes of 2048."""
    sector = bytearray(RAW)
    sector[:12] = _SYNC
    sector[12:15] = bytes(_bcd(part) for part in msf(address))
    sector[15] = 1  # the mode
    sector[16 : 16 + USER] = data
    sector[2064:2068] = _edc(sector[:2064]).to_bytes(4, "little")
    _add_parity(sector)
    return bytes(sector)


def parts(flags: int) -> list[tuple[int, int]]:
    """Where what READ CD's byte 9 asks for is in a raw sector, (first, length) in order."""
    return [(at, length) for bit, at, length in PARTS if flags & bit]


def _bcd(value: int) -> int:
    return (value // 10 % 10) << 4 | value % 10


@functools.cache
def _edc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _edc(data: bytes | bytearray) -> int:
    table, edc = _edc_table(), 0
    for byte in data:
        edc = edc >> 8 ^ table[(edc ^ byte) & 0xFF]
    return edc


@functools.cache
def _doubles() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each byte its double in GF(2^8), of the polynomial 11Dh; and of each value of 3 x the x."""
    double = tuple((value << 1) ^ (0x11D if value & 0x80 else 0) for value in range(256))
    third = [0] * 256
    for value in range(256):
        third[value ^ double[value]] = value
    return double, tuple(third)


def _add_parity(sector: bytearray) -> None:
    """P, of 86 columns of 24 bytes, and Q, of 52 diagonals of 43, which has P in it."""
    for at, count, length, step, stride in ((2076, 86, 24, 2, 86), (2248, 52, 43, 86, 88)):
        double, third = _doubles()
        size = count * length
        for major in range(count):
            index = (major >> 1) * step + (major & 1)
            first = second = 0
            for _ in range(length):
                byte = sector[12 + index]
                index += stride
                if index >= size:
                    index -= size
                first = double[first ^ byte]
                second ^= byte
            value = third[double[first] ^ second]
            sector[at + major] = value
            sector[at + count + major] = value ^ second
