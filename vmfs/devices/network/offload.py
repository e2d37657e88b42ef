"""Offload: what cards do to frames for their drivers, beside what is in C (chips/offload.c): VLAN tags (IEEE 802.1Q),
filters.
"""

from __future__ import annotations

import struct

from vmfs.devices import _chips

VLAN = 0x8100
_SYN, _ACK = 0x02, 0x10
_END, _NOTHING, _SCALE = 0, 1, 3  # options of TCP
_ADDRESSES = 12
_FIRST_MOST = 14 + 40 + 60  # bytes of a TCP connection's first frame, which has no data
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


def connection_begun(frame: bytes) -> bytes | None:
    """Of a TCP connection's first frame what only its repetitions have, too: addresses, ports, and where its sequence
    begins. None for any other frame."""
    if len(frame) > _FIRST_MOST:
        return None
    kind = frame[12:14]
    if kind == b"\x08\0" and frame[14:15] == b"\x45" and frame[23:24] == b"\x06":
        addresses, tcp = frame[26:34], 34
    elif kind == b"\x86\xdd" and frame[20:21] == b"\x06":
        addresses, tcp = frame[22:54], 54
    else:
        return None
    if len(frame) < tcp + 20 or frame[tcp + 13] & (_SYN | _ACK) != _SYN:
        return None
    return addresses + frame[tcp : tcp + 8]


def without_scale(frame: bytes) -> bytes:
    """A TCP connection's first frame without its window scale option (RFC 7323), so that neither side has one, and no
    window has more than 64 KiB. Any other frame is left alone."""
    kind, tcp = frame[12:14], 34
    if kind == b"\x86\xdd":
        protocol, addresses, tcp = frame[20:21], frame[22:54], 54
        end = tcp + int.from_bytes(frame[18:20], "big")
    elif kind == b"\x08\0" and frame[14:15] == b"\x45" and not int.from_bytes(frame[20:22], "big") & 0x3FFF:
        protocol, addresses = frame[23:24], frame[26:34]
        end = 14 + int.from_bytes(frame[16:18], "big")
    else:
        return frame
    if protocol != b"\x06" or not tcp + 20 <= end <= len(frame) or frame[tcp + 13] & (_SYN | _ACK) != _SYN:
        return frame
    changed, at, last = bytearray(frame), tcp + 20, min(tcp + (frame[tcp + 12] >> 4) * 4, end)
    while at + 1 < last and changed[at] != _END:
        length = 1 if changed[at] == _NOTHING else max(changed[at + 1], 2)
        if changed[at] == _SCALE and length == 3 and at + 3 <= last:
            changed[at : at + 3] = bytes((_NOTHING,)) * 3
        at += length
    words = struct.unpack(f">{len(addresses) // 2}H", addresses)
    struct.pack_into(">H", changed, tcp + 16, (sum(words) + 6 + end - tcp) % 0xFFFF)
    _chips.insert_sum(changed, tcp, tcp + 16, end - 1)
    return bytes(changed)
