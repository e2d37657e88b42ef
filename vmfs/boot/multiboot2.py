"""Multiboot 2: as multiboot 1, with tags instead of flags.

Source: Multiboot2 Specification 2.0. Left out: EFI entries, boot services, ELF sections, drives, VBE, APM, network
and SMBIOS tags. A header that insists on what is left out is refused; a graphics mode is a wish, and gets
the text screen.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from vmfs.boot import elf, start
from vmfs.boot.multiboot import claim_addresses
from vmfs.boot.plan import Plan
from vmfs.boot.platform import EBDA, HIGH
from vmfs.boot.source import Source
from vmfs.boot.start import Entry, Request
from vmfs.words.errors import Invalid

_SEARCHED = 32768
_HEADER = struct.Struct("<IIII")  # magic, architecture, length, checksum
_TAG = struct.Struct("<HHI")  # type, flags, size
_MAGIC, _BOOTLOADER_MAGIC = 0xE85250D6, 0x36D76289
_I386 = 0
_OPTIONAL = 1
_FROM_FILE_START = 0xFFFF_FFFF  # a load address: all of the file

# Tags of the header (3.1.3 on). Those of EFI (7, 8, 9) are for machines that have EFI.
_END, _REQUEST, _ADDRESSES, _ENTRY, _CONSOLE, _FRAMEBUFFER, _ALIGN_MODULES, _RELOCATABLE = 0, 1, 2, 3, 4, 5, 6, 10
_IGNORED = {_CONSOLE, _FRAMEBUFFER, _ALIGN_MODULES, 7, 8, 9, _RELOCATABLE}

# Tags of the information (3.6).
_CMDLINE, _NAME, _MODULE, _MEMORY, _MAP, _SCREEN, _OLD_RSDP, _NEW_RSDP = 1, 2, 3, 4, 6, 8, 14, 15
_TEXT = 2  # a framebuffer's type
_ACPI1_ROOT = 20  # bytes of the RSDP as ACPI 1.0 has it


class Header(NamedTuple):
    """What the tags say: what information is asked for, the addresses (header, load, load end, bss end), the entry."""

    offset: int
    requested: frozenset[int]
    addresses: tuple[int, int, int, int] | None
    entry: int | None


def is_multiboot2(image: Source) -> bool:
    return _find(image) is not None


def _find(image: Source) -> tuple[int, bytes] | None:
    """Where the header is in the file, and its tags."""
    head = image.head(_SEARCHED)
    for at in range(0, len(head) - _HEADER.size + 1, 8):
        magic, architecture, length, checksum = _HEADER.unpack_from(head, at)
        if magic == _MAGIC and not magic + architecture + length + checksum & 0xFFFF_FFFF:
            if architecture == _I386 and _HEADER.size <= length <= len(head) - at:
                return at, head[at + _HEADER.size : at + length]
    return None


def read_header(image: Source) -> Header:
    """Invalid where a tag is not understood that has to be."""
    found = _find(image)
    assert found is not None  # is_multiboot2
    offset, tags = found
    requested: set[int] = set()
    addresses, entry, at = None, None, 0
    while at + _TAG.size <= len(tags):
        kind, flags, size = _TAG.unpack_from(tags, at)
        data = tags[at + _TAG.size : at + size]
        if size < _TAG.size or at + size > len(tags):
            raise Invalid(f"{image.name}: a tag of its multiboot2 header has {size} bytes")
        at += -(-size // 8) * 8
        if kind == _END:
            break
        if kind == _REQUEST:
            if not flags & _OPTIONAL:
                requested.update(struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))
        elif kind == _ADDRESSES and len(data) >= 16:
            addresses = struct.unpack_from("<4I", data)
        elif kind == _ENTRY and len(data) >= 4:
            (entry,) = struct.unpack_from("<I", data)
        elif kind not in _IGNORED and not flags & _OPTIONAL:
            raise Invalid(f"{image.name}: tag {kind} of its multiboot2 header is not known to this loader")
    return Header(offset, frozenset(requested), addresses, entry)


def load(plan: Plan, request: Request) -> Entry:
    image, initrd = request.image, request.initrd
    header = read_header(image)
    entry, end = _load_kernel(plan, image, header)
    module = None
    if initrd is not None:  # after the kernel: small ones map the first few MiB only
        address = plan.place("initrd", initrd.size, low=max(end, HIGH), high=plan.top)
        plan.write(address, initrd)
        module = address, address + initrd.size
    tags = dict(_information(request, module))
    if missing := header.requested - tags.keys() - {_MODULE}:
        wanted = ", ".join(map(str, sorted(missing)))
        raise Invalid(f"{image.name}: its multiboot2 header insists on information of type {wanted}")
    parts = [struct.pack("<II", kind, 8 + len(data)) + data + bytes(-len(data) % 8) for kind, data in tags.items()]
    body = b"".join(parts) + struct.pack("<II", _END, 8)
    data = struct.pack("<II", 8 + len(body), 0) + body
    address = plan.put("the multiboot information", data, low=start.LOW, high=start.LOW_END)
    registers = start.protected(plan, {"rip": entry, "rax": _BOOTLOADER_MAGIC, "rbx": address}, start.LOADER)
    return Entry(registers, f"multiboot2, entered at {entry:#x}")


def _load_kernel(plan: Plan, image: Source, header: Header) -> tuple[int, int]:
    """The entry, and where the kernel ends."""
    if header.addresses is not None:
        if header.entry is None:
            raise Invalid(f"{image.name}: its multiboot2 header has addresses, but no entry")
        at, load_at, load_end, bss_end = header.addresses
        if load_at == _FROM_FILE_START:
            load_at = at - header.offset
        return claim_addresses(plan, image, header.offset, (at, load_at, load_end, bss_end, header.entry))
    if not elf.is_elf(image):
        raise Invalid(f"{image.name}: a multiboot2 header without addresses in a file that is not ELF")
    found = elf.read(image)
    entry = found.entry if header.entry is None else header.entry
    elf.check_entry(image.name, found, entry)
    elf.claim(plan, image, found)
    return entry, found.end


def _information(request: Request, module: tuple[int, int] | None) -> Iterator[tuple[int, bytes]]:
    """The tags, without their headers."""
    platform = request.platform
    yield _CMDLINE, request.cmdline + b"\0"
    yield _NAME, b"vmfs\0"
    if module is not None:
        yield _MODULE, struct.pack("<II", *module) + b"initrd\0"
    yield _MEMORY, struct.pack("<II", EBDA >> 10, platform.extended >> 10)
    entries = (struct.pack("<QQII", one.address, one.size, one.type, 0) for one in platform.e820)
    yield _MAP, struct.pack("<II", 24, 0) + b"".join(entries)
    if platform.vga:
        yield _SCREEN, struct.pack("<QIIIBBH", 0xB8000, 160, 80, 25, 16, _TEXT, 0)
    if request.rsdp:
        yield _OLD_RSDP, request.root[:_ACPI1_ROOT]
        yield _NEW_RSDP, request.root
