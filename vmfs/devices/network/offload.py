"""Offload: what cards do to frames for their drivers: checksums, segments of TCP, VLAN tags.

Source: RFC 1071 (the checksum), RFC 791, 8200, 9293 (headers); IEEE 802.1Q (tags).

A sum of 16-bit words in one's complement is a number modulo FFFFh, so Python's long division finds it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

IPV4, IPV6, VLAN = 0x0800, 0x86DD, 0x8100
TCP, UDP = 6, 17
_ADDRESSES = 12
LEAST_ON_WIRE = 60  # without the CRC


def total(data: bytes | bytearray | memoryview) -> int:
    """The sum of its words, big-endian, modulo FFFFh; of an odd number of bytes as if a zero came after them."""
    value = int.from_bytes(data, "big")
    return (value << 8 if len(data) & 1 else value) % 0xFFFF


def complement(value: int) -> int:
    """What is put into a frame for a sum; never 0, which for UDP means that there is none."""
    return 0xFFFF - value % 0xFFFF


def insert(frame: bytearray, start: int, at: int, end: int) -> None:
    """The sum of the bytes from `start` to `end` (0: to the last one) into the two at `at`, where that is in the
    frame."""
    if at + 2 <= len(frame) and start < len(frame):
        stop = min(end + 1, len(frame)) if end else len(frame)
        struct.pack_into(">H", frame, at, complement(total(memoryview(frame)[start:stop])))


def add_tag(frame: bytes, kind: int, tag: int) -> bytes:
    return frame[:_ADDRESSES] + struct.pack(">HH", kind, tag) + frame[_ADDRESSES:]


def segments(
    frame: bytes, header: int, most: int, ip: int, tcp: int, sums: tuple[int, int, int, int]
) -> Iterator[bytes]:
    """A frame of TCP as several, each with its first `header` bytes and up to `most` of those after them. `ip` and
    `tcp` are where its headers begin. `sums`: where the checksums of IP (and the last byte that it is of) and of TCP
    are; that of TCP is the pseudo header's without a length, which is added."""
    head, payload = frame[:header], memoryview(frame)[header:]
    ip_at, ip_end, tcp_at, tcp_end = sums
    is_v4 = head[ip] >> 4 == 4
    (identification,) = struct.unpack_from(">H", head, ip + 4)
    (sequence,) = struct.unpack_from(">I", head, tcp + 4)
    flags = head[tcp + 13]
    for number, at in enumerate(range(0, len(payload) or 1, most)):
        part = payload[at : at + most]
        one = bytearray(head)
        one += part
        if is_v4:
            struct.pack_into(">HH", one, ip + 2, len(one) - ip, identification + number & 0xFFFF)
            insert(one, ip, ip_at, ip_end)
        else:
            struct.pack_into(">H", one, ip + 4, len(one) - ip - 40 & 0xFFFF)
        struct.pack_into(">I", one, tcp + 4, sequence + at & 0xFFFF_FFFF)
        if at + most < len(payload):
            one[tcp + 13] = flags & ~0x09  # FIN and PSH are the last one's
        if tcp_at + 2 <= len(one):
            (pseudo,) = struct.unpack_from(">H", one, tcp_at)
            struct.pack_into(">H", one, tcp_at, (pseudo + len(one) - tcp) % 0xFFFF)
            insert(one, tcp, tcp_at, tcp_end)
        yield bytes(one)


def sums_found(frame: bytes) -> tuple[bool | None, bool | None]:
    """Whether the checksums of the IPv4 header, and of TCP or UDP in it, are right. None: there is none, or it is not
    looked at, as of fragments and of headers with options."""
    if frame[12:15] != b"\x08\0\x45" or len(frame) < 34:
        return None, None
    good = not total(frame[14:34])
    length, fragment, protocol = int.from_bytes(frame[16:18], "big"), int.from_bytes(frame[20:22], "big"), frame[23]
    end = 14 + length
    if fragment & 0x3FFF or protocol not in (TCP, UDP) or not 42 <= end <= len(frame):
        return good, None
    if protocol == UDP and frame[40:42] == b"\0\0":
        return good, None
    return good, not (total(frame[26:34]) + protocol + length - 20 + total(frame[34:end])) % 0xFFFF


def group_bit(frame: bytes) -> int:
    """Which of the 64 bits of a filter a group's address has: the first six bits of its CRC, as most cards have it."""
    crc = 0xFFFF_FFFF
    for byte in frame[:6]:
        for bit in range(8):
            carry = crc >> 31 ^ byte >> bit & 1
            crc = crc << 1 & 0xFFFF_FFFF ^ (0x04C1_1DB7 if carry else 0)
    return crc >> 26
