"""Offload: what cards do to frames for their drivers, beside what is in C (chips/offload.c): VLAN tags (IEEE 802.1Q),
filters.
"""

from __future__ import annotations

import struct

VLAN = 0x8100
_ADDRESSES = 12
LEAST_ON_WIRE = 60  # without the CRC


def add_tag(frame: bytes, kind: int, tag: int) -> bytes:
    return frame[:_ADDRESSES] + struct.pack(">HH", kind, tag) + frame[_ADDRESSES:]


def group_bit(frame: bytes) -> int:
    """Which of the 64 bits of a filter a group's address has: the first six bits of its CRC, as most cards have it."""
    crc = 0xFFFF_FFFF
    for byte in frame[:6]:
        for bit in range(8):
            carry = crc >> 31 ^ byte >> bit & 1
            crc = crc << 1 & 0xFFFF_FFFF ^ (0x04C1_1DB7 if carry else 0)
    return crc >> 26
