"""Images to boot, made field by field, and what a loader left in RAM."""

from __future__ import annotations

import os
import struct
from contextlib import contextmanager

from vmfs import boot
from vmfs.boot.source import Source
from vmfs.memory.ram import Memory

MIB = 1 << 20


@contextmanager
def source(data: bytes, name: str = "kernel"):
    """The bytes as a file."""
    fd = os.memfd_create(name)
    try:
        os.write(fd, data)
        yield Source.of(fd, name)
    finally:
        os.close(fd)


@contextmanager
def loaded(image: bytes, *, initrd: bytes | None = None, size: int = 64 * MIB, **options):
    """The Start and the memory of an image that was loaded."""
    memory = Memory(size)
    try:
        with source(image) as kernel, source(initrd or b"", "initrd") as disk:
            platform = boot.Platform(size, **options.pop("platform", {}))
            yield (
                boot.load(
                    kernel, initrd=disk if initrd is not None else None, memory=memory, platform=platform, **options
                ),
                memory,
            )
    finally:
        memory.close()


def bzimage(
    code: bytes = b"\x90" * 1024,
    *,
    version: int = 0x20F,
    xloadflags: int = 1,
    address: int = MIB,
    init_size: int = 4 * MIB,
    payload: bytes = b"",
    **changes: tuple[int, str],
) -> bytes:
    """A bzImage with a setup of 4 sectors; `changes` are name=(offset, format, value)."""
    setup = bytearray(5 * 512)
    code = code.ljust(-(-len(code) // 16) * 16, b"\0")
    payload_at = len(code)
    code += payload
    code = code.ljust(-(-len(code) // 16) * 16, b"\0")
    fields = {
        0x1F1: ("<B", 4),
        0x1F4: ("<I", len(code) // 16),
        0x1FE: ("<H", 0xAA55),
        0x200: ("<BB", 0xEB, 0x268 - 0x202),
        0x202: ("<4s", b"HdrS"),
        0x206: ("<H", version),
        0x211: ("<B", 1),
        0x22C: ("<I", 0x7FFF_FFFF),
        0x230: ("<I", 0x1000),
        0x234: ("<B", 1),
        0x236: ("<H", xloadflags),
        0x238: ("<I", 255),
        0x248: ("<II", payload_at if payload else 0, len(payload)),
        0x258: ("<QI", address, init_size),
    }
    for offset, (layout, *values) in fields.items():
        struct.pack_into(layout, setup, offset, *values)
    for offset, layout, value in changes.values():
        struct.pack_into(layout, setup, offset, value)
    return bytes(setup) + code


def elf(
    segments: list[tuple[int, bytes, int]],
    *,
    entry: int,
    bits: int = 64,
    machine: int = 62,
    kind: int = 2,
    virtual: int = 0,
    notes: bytes = b"",
) -> bytes:
    """An ELF executable of (physical address, contents, bytes of memory) segments, linked `virtual` above that."""
    wide = bits == 64
    header = struct.Struct("<16sHHIQQQIHHHHHH" if wide else "<16sHHIIIIIHHHHHH")
    program = struct.Struct("<IIQQQQQQ" if wide else "<IIIIIIII")
    count = len(segments) + bool(notes)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1])
    at = header.size + program.size * count
    sizes = (header.size, program.size, count, 0, 0, 0)
    parts = [header.pack(ident, kind, machine, 1, entry, header.size, 0, 0, *sizes)]
    contents = b""
    for address, data, size in segments:
        offset = at + len(contents)
        row = (1, 7, offset, address + virtual, address, len(data), size, 4096)
        if not wide:
            row = (1, offset, address + virtual, address, len(data), size, 7, 4096)
        parts.append(program.pack(*row))
        contents += data
    if notes:
        offset = at + len(contents)
        row = (4, 4, offset, 0, 0, len(notes), len(notes), 4)
        if not wide:
            row = (4, offset, 0, 0, len(notes), len(notes), 4, 4)
        parts.append(program.pack(*row))
        contents += notes
    return b"".join(parts) + contents


def note(name: bytes, kind: int, data: bytes) -> bytes:
    def padded(part: bytes) -> bytes:
        return part.ljust(-(-len(part) // 4) * 4, b"\0")

    return struct.pack("<III", len(name), len(data), kind) + padded(name) + padded(data)


def pvh_note(entry: int) -> bytes:
    return note(b"Linux\0", 6, b"abc") + note(b"Xen\0", 18, struct.pack("<I", entry))


def multiboot_header(flags: int = 0, addresses: tuple[int, ...] = ()) -> bytes:
    magic = 0x1BADB002
    return struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFF_FFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def multiboot2_header(*tags: tuple[int, int, bytes]) -> bytes:
    """Of (type, flags, data) tags; the end tag is added."""
    magic = 0xE85250D6
    body = b""
    for kind, flags, data in (*tags, (0, 0, b"")):
        body += struct.pack("<HHI", kind, flags, 8 + len(data)) + data
        body += bytes(-len(body) % 8)
    length = 16 + len(body)
    return struct.pack("<IIII", magic, 0, length, -(magic + length) & 0xFFFF_FFFF) + body


def e820_of(memory: Memory, zero_page: int) -> list[tuple[int, int, int]]:
    page = memory.read(zero_page, 4096)
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * number) for number in range(page[0x1E8])]


def text_at(memory: Memory, address: int) -> bytes:
    return memory.read(address, 4096).partition(b"\0")[0]
