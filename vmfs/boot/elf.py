"""ELF files: the program headers and the note that says how to enter a kernel.

Only what a loader needs is read, with a bound on each count, because the file is hostile; a parser of whole files
(sections, symbols) is what `vmfs.debug.symbols` has.

Sources: System V ABI, chapters 4 and 5; Xen's public/elfnote.h.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmfs.boot.plan import Plan
from vmfs.boot.source import Source
from vmfs.words.errors import Invalid

MAGIC = b"\x7fELF"
EXECUTABLE, SHARED = 2, 3
I386, X86_64 = 3, 62
_LOAD, _NOTE = 1, 4
_HEADERS = 128  # program headers that a kernel may have
_NOTES = 64 << 10  # bytes of notes that are looked at

# ld puts the file's headers into the page before the first section. Where that begins at 1 MiB they are then in the
# ROM of a BIOS, where a boot loader's writes are lost.
_ROM = range(0xC0000, 0x100000)
_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY


class Segment(NamedTuple):
    """A PT_LOAD: `size` bytes of memory at `physical`, of which the first `filled` are in the file at `offset`."""

    offset: int
    virtual: int
    physical: int
    filled: int
    size: int


class Elf(NamedTuple):
    """`bits` is 32 or 64; `entry` physical; `pvh` the 32-bit entry of the note, or None."""

    bits: int
    type: int
    machine: int
    entry: int
    segments: tuple[Segment, ...]
    pvh: int | None

    @property
    def start(self) -> int:
        return min(segment.physical for segment in self.segments)

    @property
    def end(self) -> int:
        return max(segment.physical + segment.size for segment in self.segments)


def is_elf(image: Source) -> bool:
    return image.head(4) == MAGIC


def read(image: Source) -> Elf:
    """Invalid where it is not an executable for x86 whose segments are in the file."""
    name = image.name
    ident = image.read(0, 16)
    if ident[:4] != MAGIC or ident[4] not in (1, 2) or ident[5] != 1:
        raise Invalid(f"{name}: not a little-endian ELF file of 32 or 64 bits")
    wide = ident[4] == 2
    header = struct.Struct("<HHIQQQIHHH" if wide else "<HHIIIIIHHH")
    kind, machine, _, entry, table, _, _, _, entry_size, count = header.unpack(image.read(16, header.size))
    if machine not in (I386, X86_64) or kind not in (EXECUTABLE, SHARED):
        raise Invalid(f"{name}: an ELF file, but not an executable for x86 (type {kind}, machine {machine})")
    program = struct.Struct("<IIQQQQQQ" if wide else "<IIIIIIII")
    if not 0 < count <= _HEADERS or entry_size < program.size:
        raise Invalid(f"{name}: an ELF file with {count} program headers of {entry_size} bytes")
    rows = image.read(table, entry_size * count)
    segments, pvh = [], None
    for at in range(0, entry_size * count, entry_size):
        if wide:
            type_, _, offset, virtual, physical, filled, size, align = program.unpack_from(rows, at)
        else:
            type_, offset, virtual, physical, filled, size, _, align = program.unpack_from(rows, at)
        if type_ == _LOAD and size:
            if filled > size:
                raise Invalid(f"{name}: an ELF segment has {filled} bytes in the file and {size} in memory")
            image.part(offset, filled)
            has_headers_alone = not offset and filled == size <= table + entry_size * count
            if not (has_headers_alone and physical < _ROM.stop and physical + size > _ROM.start):
                segments.append(Segment(offset, virtual, physical, filled, size))
        elif type_ == _NOTE and pvh is None:
            pvh = _find_pvh(image.read(offset, min(filled, _NOTES)), 8 if align == 8 else 4)
    if not segments:
        raise Invalid(f"{name}: an ELF file without a segment to load")
    return Elf(64 if wide else 32, kind, machine, _physical(entry, segments), tuple(segments), pvh)


def _physical(entry: int, segments: list[Segment]) -> int:
    """The entry's physical address: kernels give either that or a virtual one of a segment."""
    if not any(one.physical <= entry < one.physical + one.size for one in segments):
        for one in segments:
            if one.virtual <= entry < one.virtual + one.size:
                return entry - one.virtual + one.physical
    return entry


def _find_pvh(notes: bytes, align: int) -> int | None:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        at = name_at + -(-name_size // align) * align
        if notes[name_at : name_at + name_size] == b"Xen\0" and kind == _PHYS32_ENTRY and size in (4, 8):
            value = notes[at : at + size]
            return int.from_bytes(value, "little") if len(value) == size else None
        at += -(-size // align) * align
    return None


def claim(plan: Plan, image: Source, elf: Elf) -> None:
    """Put the segments where they want to be."""
    for number, segment in enumerate(elf.segments):
        plan.claim(f"{image.name}: its ELF segment {number}", segment.physical, segment.size)
    write(plan, image, elf)


def write(plan: Plan, image: Source, elf: Elf) -> None:
    """The segments, in memory that is claimed."""
    for segment in elf.segments:
        plan.write(segment.physical, image.part(segment.offset, segment.filled))
        plan.zero(segment.physical + segment.filled, segment.size - segment.filled)


def check_entry(name: str, elf: Elf, entry: int) -> None:
    if not any(one.physical <= entry < one.physical + one.size for one in elf.segments):
        raise Invalid(f"{name}: the ELF entry {entry:#x} is in none of the segments")
