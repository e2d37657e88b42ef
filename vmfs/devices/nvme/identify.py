"""What an NVMe controller says of itself and of its namespace, as it is in memory.

Source: NVM Express 1.4, 5.15 (Identify), 5.14.1 (log pages).
"""

from __future__ import annotations

import struct
import uuid

PAGE = 4096
VERSION = 0x0001_0400
LBA_SHIFT = 9
MDTS = 9  # a transfer has up to 2**9 pages
EVENTS_MOST = 4
ABORTS_MOST = 4
NSID = 1
SMART_LENGTH = 512
_UUID_DESCRIPTOR = 3
_SPACE = 100  # percent
_KELVIN = 300


def _identity(serial: str) -> uuid.UUID:
    """The same for a disk of that name in each machine: a guest that goes on in a copy finds its namespace again."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"vmfs {serial}")


def _text(text: str, length: int) -> bytes:
    return text.encode("ascii", "replace")[:length].ljust(length)


def controller(vendor: int, serial: str, *, writable: bool, discards: bool) -> bytes:
    data = bytearray(PAGE)

    def put(at: int, layout: str, *values: int | bytes) -> None:
        struct.pack_into(f"<{layout}", data, at, *values)

    put(0, "HH20s40s8s", vendor, vendor, _text(serial, 20), _text("vmfs disk", 40), _text("1.0", 8))
    put(77, "BHI", MDTS, 1, VERSION)
    put(258, "BBB", ABORTS_MOST - 1, EVENTS_MOST - 1, 0x03)  # one slot of firmware, which is only read
    put(266, "HH", _KELVIN + 60, _KELVIN + 70)
    put(512, "BB", 0x66, 0x44)  # entries of queues have 64 and 16 bytes
    put(516, "IH", NSID, (0x08 if writable else 0) | (0x04 if discards else 0))
    put(525, "B", 1 if writable else 0)  # a volatile write cache
    put(768, "256s", f"nqn.2014-08.org.nvmexpress:uuid:{_identity(serial)}".encode())
    put(2048, "H", 2500)  # a power state of 25 W
    return bytes(data)


def namespace(blocks: int, *, writable: bool, discards: bool) -> bytes:
    data = bytearray(PAGE)
    struct.pack_into("<QQQ", data, 0, blocks, blocks, blocks)
    data[33] = 0x09 if discards else 0  # what is deallocated reads as zeros; Write Zeroes may deallocate
    data[99] = 0 if writable else 1
    struct.pack_into("<HBB", data, 128, 0, LBA_SHIFT, 0)
    return bytes(data)


def namespaces(above: int) -> bytes:
    """The list of those whose number is higher."""
    return struct.pack("<I", NSID if above < NSID else 0).ljust(PAGE, b"\0")


def descriptors(serial: str) -> bytes:
    return struct.pack("<BBH16s", _UUID_DESCRIPTOR, 16, 0, _identity(serial).bytes).ljust(PAGE, b"\0")


def smart() -> bytes:
    """SMART and health: nothing is counted."""
    return struct.pack("<BHBBB", 0, _KELVIN, _SPACE, 10, 0).ljust(SMART_LENGTH, b"\0")


def log_page(number: int) -> bytes | None:
    """Errors, health, firmware; None where there is none."""
    if number == 0x01:
        return bytes(64)
    if number == 0x02:
        return smart()
    if number == 0x03:
        return (b"\1" + bytes(7) + _text("1.0", 8)).ljust(512, b"\0")
    return None
