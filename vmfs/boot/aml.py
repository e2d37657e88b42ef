"""AML, the byte code of ACPI's tables: functions that each make the bytes of one term.

Only what `acpi.py` says. Source: ACPI Specification 6.4, chapter 20 (AML) and 6.4 (resource descriptors).
"""

from __future__ import annotations

import struct


def package_length(size: int) -> bytes:
    """PkgLength for `size` bytes that follow it: it counts itself (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for more in (1, 2, 3):
        total = size + 1 + more
        if total < 1 << 4 + 8 * more:
            return bytes([more << 6 | total & 0xF]) + (total >> 4).to_bytes(more, "little")
    raise ValueError(f"{size} bytes are more than a package can have")


def name_string(path: str) -> bytes:
    r"""`\_SB.PCI0` and the like; segments are padded with underscores (20.2.2)."""
    root, rest = (b"\\", path[1:]) if path.startswith("\\") else (b"", path)
    segments = [segment.ljust(4, "_").encode() for segment in rest.split(".") if segment]
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f"{path}: a segment of a name has at most 4 characters")
    if not segments:
        return root + b"\0"
    prefix = {1: b"", 2: b"\x2e"}.get(len(segments), b"\x2f" + bytes([len(segments)]))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit 64 bits")


def eisa_id(text: str) -> bytes:
    """PNP0A03 as the DWord that _HID has: three letters of 5 bits, four hexadecimal digits, big-endian (19.3.4)."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + struct.pack(">HH", letters, int(text[3:], 16))


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + name_string(path) + value


def _scoped(opcode: bytes, head: bytes, terms: tuple[bytes, ...]) -> bytes:
    body = head + b"".join(terms)
    return opcode + package_length(len(body)) + body


def scope(path: str, *terms: bytes) -> bytes:
    return _scoped(b"\x10", name_string(path), terms)


def device(path: str, *terms: bytes) -> bytes:
    return _scoped(b"\x5b\x82", name_string(path), terms)


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """`serialized`: one that makes names, of which there can be only one at a time."""
    return _scoped(b"\x14", name_string(path) + bytes([arguments | (8 if serialized else 0)]), terms)


def package(*elements: bytes) -> bytes:
    return _scoped(b"\x12", bytes([len(elements)]), elements)


def buffer(data: bytes) -> bytes:
    return _scoped(b"\x11", integer(len(data)), (data,))


def if_(condition: bytes, *terms: bytes) -> bytes:
    return _scoped(b"\xa0", condition, terms)


def else_(*terms: bytes) -> bytes:
    """Right after an `if_`."""
    return _scoped(b"\xa1", b"", terms)


def and_(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    return b"\x7b" + left + right + target


def or_(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    return b"\x7d" + left + right + target


def shift_left(value: bytes, count: bytes, target: bytes = b"\0") -> bytes:
    return b"\x79" + value + count + target


def find_set_right_bit(value: bytes, target: bytes) -> bytes:
    """Its number, from 1 on; 0 where there is none."""
    return b"\x82" + value + target


def decrement(target: bytes) -> bytes:
    return b"\x76" + target


def word_field(source: bytes, offset: int, path: str) -> bytes:
    """CreateWordField: a name for two bytes of a buffer."""
    return b"\x8b" + source + integer(offset) + name_string(path)


_PCI_CONFIG = 2  # of regions: the configuration space of the device in whose scope it is
_BYTE_ACCESS = 1


def config_registers(path: str, offset: int, *names: str) -> bytes:
    """Bytes of a PCI function's configuration space from `offset` on, and a name for each."""
    region = b"\x5b\x80" + name_string(path) + bytes([_PCI_CONFIG]) + integer(offset) + integer(len(names))
    bits = (name_string(one) + bytes([8]) for one in names)
    return region + _scoped(b"\x5b\x81", name_string(path) + bytes([_BYTE_ACCESS]), tuple(bits))


def return_(value: bytes) -> bytes:
    return b"\xa4" + value


def store(value: bytes, target: bytes) -> bytes:
    return b"\x70" + value + target


def notify(device: str, value: int) -> bytes:
    return b"\x86" + name_string(device) + integer(value)


ARG0, LOCAL0, LOCAL1 = b"\x68", b"\x60", b"\x61"


# ---- resource descriptors (6.4)


def resources(*descriptors: bytes) -> bytes:
    """A resource template: the descriptors and the end tag, whose checksum may be zero."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io(port: int, length: int) -> bytes:
    """Ports at a fixed address, all 16 bits decoded."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, length)


def irq(number: int) -> bytes:
    """An ISA interrupt: edge-triggered, active high, not shared."""
    return struct.pack("<BH", 0x22, 1 << number)


IRQS_AT = 1  # in a resource template of one such descriptor: a bit an IRQ


def irqs(*numbers: int) -> bytes:
    """Interrupts of PCI, one of them: level-triggered, active low, shared (6.4.2.1)."""
    return struct.pack("<BHB", 0x23, sum(1 << number for number in numbers), 0x18)


def memory_fixed(address: int, length: int) -> bytes:
    """32-bit memory, writable."""
    return struct.pack("<BHBII", 0x86, 9, 1, address, length)


_PRODUCER_FIXED = 0x0C  # general flags: minimum and maximum are fixed, positive decode, a producer


def bus_numbers(first: int, last: int) -> bytes:
    return _word_space(2, 0, first, last)


def io_space(first: int, last: int) -> bytes:
    """Ports that the bridge passes on; ISA and non-ISA ranges alike."""
    return _word_space(1, 3, first, last)


def _word_space(kind: int, flags: int, first: int, last: int) -> bytes:
    return struct.pack("<BHBBBHHHHH", 0x88, 13, kind, _PRODUCER_FIXED, flags, 0, first, last, 0, last - first + 1)


def memory_space(first: int, last: int) -> bytes:
    """Memory that the bridge passes on: writable, not cached."""
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, _PRODUCER_FIXED, 1, 0, first, last, 0, last - first + 1)
