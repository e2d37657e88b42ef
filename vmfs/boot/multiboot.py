"""Multiboot 1: an image with a magic number in its first 8 KiB, entered in 32-bit protected mode.

Source: Multiboot Specification 0.6.96. The information has the memory map, the command line, the modules (the
initrd is the only one), the loader's name, and the text screen where there is one. Left out: drives, the APM table,
VBE (a wish for a graphics mode gets the text screen, as 3.1.4 allows), symbols.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmfs.boot import elf, start
from vmfs.boot.plan import Plan
from vmfs.boot.platform import EBDA, HIGH
from vmfs.boot.source import Source
from vmfs.boot.start import Entry, Request
from vmfs.words.errors import Invalid

_SEARCHED = 8192
_HEADER = struct.Struct("<III")
_MAGIC, _BOOTLOADER_MAGIC = 0x1BADB002, 0x2BADB002
_ADDRESSES = 1 << 16  # flag: the header has the addresses (3.1.3)
_UNDERSTOOD = 0x7  # of the flags that must be understood, bits 0 to 15: align, memory, video

_INFO_SIZE = 116
_HAS_MEMORY, _HAS_CMDLINE, _HAS_MODULES, _HAS_MAP, _HAS_NAME, _HAS_SCREEN = (1 << bit for bit in (0, 2, 3, 6, 9, 12))
_MAP_ENTRY = struct.Struct("<IQQI")
_MODULE = struct.Struct("<IIII")
_TEXT = 2  # framebuffer_type: EGA text


class Header(NamedTuple):
    """`offset` of the header in the file; the rest of 3.1.3, or None."""

    offset: int
    flags: int
    addresses: tuple[int, int, int, int, int] | None  # header, load, load end, bss end, entry


def find(image: Source) -> Header | None:
    """The header: the first with a right checksum that is whole in the first 8 KiB."""
    head = image.head(_SEARCHED)
    for at in range(0, len(head) - _HEADER.size + 1, 4):
        magic, flags, checksum = _HEADER.unpack_from(head, at)
        if magic != _MAGIC or magic + flags + checksum & 0xFFFF_FFFF:
            continue
        if not flags & _ADDRESSES:
            return Header(at, flags, None)
        if at + 32 <= len(head):
            return Header(at, flags, struct.unpack_from("<5I", head, at + 12))
    return None


def is_multiboot(image: Source) -> bool:
    return find(image) is not None


def load(plan: Plan, request: Request) -> Entry:
    image, initrd, platform = request.image, request.initrd, request.platform
    header = find(image)
    assert header is not None  # is_multiboot
    name = image.name
    if header.flags & 0xFFFF & ~_UNDERSTOOD:
        raise Invalid(f"{name}: multiboot flags {header.flags:#x} ask for what this loader does not know")
    if header.addresses is not None:
        entry, end = claim_addresses(plan, image, header.offset, header.addresses)
    else:
        if not elf.is_elf(image):
            raise Invalid(f"{name}: a multiboot header without addresses in a file that is not ELF")
        found = elf.read(image)
        elf.check_entry(name, found, found.entry)
        elf.claim(plan, image, found)
        entry, end = found.entry, found.end
    low, high = start.LOW, start.LOW_END
    info = bytearray(_INFO_SIZE)
    flags = _HAS_MEMORY | _HAS_CMDLINE | _HAS_MAP | _HAS_NAME
    # After the kernel: small ones map the first few MiB only.
    modules = b""
    if initrd is not None:
        address = plan.place("initrd", initrd.size, low=max(end, HIGH), high=plan.top)
        plan.write(address, initrd)
        title = plan.put("the module's name", initrd.name.encode() + b"\0", low=low, high=high, align=16)
        modules = _MODULE.pack(address, address + initrd.size, title, 0)
        flags |= _HAS_MODULES
    table = plan.put("the module table", modules, low=low, high=high, align=16) if modules else 0
    command = plan.put("the command line", request.cmdline + b"\0", low=low, high=high, align=16)
    loader = plan.put("the loader's name", b"vmfs\0", low=low, high=high, align=16)
    ranges = b"".join(_MAP_ENTRY.pack(_MAP_ENTRY.size - 4, *one) for one in platform.e820)
    memory_map = plan.put("the memory map", ranges, low=low, high=high, align=16)
    above = platform.extended >> 10
    struct.pack_into("<III", info, 4, EBDA >> 10, above, 0)
    struct.pack_into("<III", info, 16, command, 1 if modules else 0, table)
    struct.pack_into("<II", info, 44, len(ranges), memory_map)
    struct.pack_into("<I", info, 64, loader)
    if platform.vga:
        flags |= _HAS_SCREEN
        struct.pack_into("<QIIIBB", info, 88, 0xB8000, 160, 80, 25, 16, _TEXT)
    struct.pack_into("<I", info, 0, flags)
    address = plan.put("the multiboot information", bytes(info), low=low, high=high, align=16)
    registers = start.protected(plan, {"rip": entry, "rax": _BOOTLOADER_MAGIC, "rbx": address}, start.LOADER)
    return Entry(registers, f"multiboot, entered at {entry:#x}")


def claim_addresses(
    plan: Plan, image: Source, offset: int, addresses: tuple[int, int, int, int, int]
) -> tuple[int, int]:
    """Put the image where a header at `offset` in the file has it (3.1.3). The entry, and where the kernel ends."""
    name = image.name
    header, load_at, load_end, bss_end, entry = addresses
    begin = offset - (header - load_at)
    if header < load_at or begin < 0:
        raise Invalid(f"{name}: its multiboot load address {load_at:#x} is no place in the file")
    size = load_end - load_at if load_end else image.size - begin
    if size <= 0:
        raise Invalid(f"{name}: its multiboot load addresses end before they begin")
    end = max(load_at + size, bss_end)
    if not load_at <= entry < end:
        raise Invalid(f"{name}: its multiboot entry {entry:#x} is outside of the kernel")
    plan.claim(f"{name}: the kernel", load_at, end - load_at)
    plan.write(load_at, image.part(begin, size))
    plan.zero(load_at + size, end - load_at - size)
    return entry, end
