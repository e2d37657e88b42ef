"""What a file is that somebody wants to boot: a kernel, or a medium that a BIOS boots: a CD, a floppy, a disk.

It goes by what is in the file, never by its name. A medium is told before what is found by a magic number somewhere in
its first KiB: GRUB in front of a disk's first partition has a multiboot header.

Source: ECMA-119 8.1 (ISO 9660), El Torito 1.0 (section 2), UEFI 2.10 5.2 (MBR), 5.3 (GPT) and 13.3.2 (El Torito).
"""

from __future__ import annotations

import struct
import uuid

from vmfs.boot import IMAGES
from vmfs.boot.source import Source
from vmfs.words.errors import Invalid

SECTOR = 512
_ISO_SECTOR = 2048
_DESCRIPTORS = 16  # the sector where they begin; a set has an end, and this many are looked at
_DESCRIPTORS_MOST = 64
_BOOT_RECORD, _SET_END = 0, 255
_EL_TORITO = b"EL TORITO SPECIFICATION"
_CATALOG = 0x47  # of a boot record: the sector of the catalog
_ROW = 32  # bytes, of an entry of it; so many are looked at
_ROWS_MOST = 64
_VALIDATION, _SECTION, _LAST_SECTION, _BOOTABLE = 0x01, 0x90, 0x91, 0x88
_X86, _EFI = 0x00, 0xEF  # platforms
_SIGNATURE = b"\x55\xaa"
_PE = struct.Struct("<4sH18xH66xH")  # signature, machine, magic number of the optional header, subsystem
_TABLE, _ENTRY = 446, struct.Struct("<B3sB3sII")
_BOOT_CODE = 440  # bytes, of an MBR
_GPT = b"EFI PART"
_GPT_ROWS_MOST = 128
_ESP = uuid.UUID("C12A7328-F81F-11D2-BA4B-00A0C93EC93B").bytes_le
FLOPPY_SIZES = tuple(size << 10 for size in (160, 180, 320, 360, 720, 1200, 1440, 1680, 1722, 2880))
_BEFORE_MEDIA = ("bzImage-16", "bzImage", "elf-pvh", "elf")  # whose magic numbers are where no medium has them
_AFTER_MEDIA = ("multiboot1", "multiboot2")

KERNEL, CD, FLOPPY, DISK, BIOS = "kernel", "cd", "floppy", "disk", "bios"


def tell(image: Source) -> str:
    """KERNEL, CD, FLOPPY, DISK or BIOS. Invalid, with the choices, for what is none."""
    if not image.size:
        raise Invalid(f"{image.name}: it is empty")
    if _is_one_of(image, _BEFORE_MEDIA):
        return KERNEL
    if is_iso(image):
        if has_el_torito(image):
            return CD
        if not _has_signature(image):
            raise Invalid(
                f"{image.name}: a CD (ISO 9660) without a boot record (El Torito), so nothing boots from it; "
                "--cdrom attaches it to a machine that boots from something else"
            )
        return DISK
    if image.size in FLOPPY_SIZES and _has_signature(image):
        return FLOPPY
    if has_partitions(image):
        return DISK
    if _is_one_of(image, _AFTER_MEDIA):
        return KERNEL
    if _has_signature(image):
        return DISK
    if _is_one_of(image, ("bios",)):
        return BIOS
    raise Invalid(
        f"{image.name}: nothing in it says what it is: neither a kernel (Linux bzImage, ELF, multiboot), nor a CD (ISO "
        "9660 with El Torito), a floppy or a disk (a boot sector with 55 AA, MBR or GPT), nor a BIOS. `--cdrom`, "
        "`--floppy` and `--disk FILE` attach it whatever it is; a flat binary goes into `mem` (docs/boot.md)"
    )


def is_efi(image: Source) -> bool:
    """A program for UEFI on x86-64, such as a Linux kernel with its stub: PE32+, of subsystem 10 (UEFI 2.10 2.1.1)."""
    if _head(image, 0, 2) != b"MZ":
        return False
    at = int.from_bytes(_head(image, 0x3C, 4), "little")
    head = _head(image, at, _PE.size)
    if len(head) < _PE.size:
        return False
    signature, machine, magic, subsystem = _PE.unpack(head)
    return (signature, machine, magic, subsystem) == (b"PE\0\0", 0x8664, 0x20B, 10)


def _is_one_of(image: Source, names: tuple[str, ...]) -> bool:
    return any(row.is_one(image) for row in IMAGES if row.name in names)


def _head(image: Source, offset: int, length: int) -> bytes:
    """What there is of it."""
    return image.read(offset, max(min(length, image.size - offset), 0)) if offset < image.size else b""


def is_iso(image: Source) -> bool:
    return _head(image, _DESCRIPTORS * _ISO_SECTOR + 1, 5) == b"CD001"


def has_el_torito(image: Source) -> bool:
    return bool(_boot_record(image))


def _boot_record(image: Source) -> bytes:
    """Its beginning; empty where there is none."""
    for number in range(_DESCRIPTORS, _DESCRIPTORS + _DESCRIPTORS_MOST):
        descriptor = _head(image, number * _ISO_SECTOR, _CATALOG + 4)
        if descriptor[1:6] != b"CD001" or descriptor[0] == _SET_END:
            break
        if descriptor[0] == _BOOT_RECORD and descriptor[7:].startswith(_EL_TORITO):
            return descriptor
    return b""


def needs_uefi(image: Source) -> bool:
    """Whether it is a CD or a disk of which UEFI boots something, and a BIOS finds nothing to execute."""
    if is_iso(image) and (record := _boot_record(image)):
        platforms = _platforms(image, int.from_bytes(record[_CATALOG : _CATALOG + 4], "little"))
        return _EFI in platforms and _X86 not in platforms
    return not any(_head(image, 0, _BOOT_CODE)) and _has_esp(image)


def _platforms(image: Source, catalog: int) -> set[int]:
    """For which there is something to boot. A BIOS looks at the first entry only."""
    data = _head(image, catalog * _ISO_SECTOR, _ROW * _ROWS_MOST)
    rows = [data[at : at + _ROW] for at in range(0, len(data) - _ROW + 1, _ROW)]
    if len(rows) < 2 or rows[0][0] != _VALIDATION or rows[0][30:] != _SIGNATURE:
        return set()
    found = {rows[0][1]} if rows[1][0] == _BOOTABLE else set()
    found |= {_EFI for row in rows[2:] if row[0] in (_SECTION, _LAST_SECTION) and row[1] == _EFI}
    return found


def _has_esp(image: Source) -> bool:
    """An EFI system partition, in a GPT."""
    header = _head(image, SECTOR, 92)
    if not header.startswith(_GPT) or len(header) < 92:
        return False
    at, count, size = struct.unpack_from("<QII", header, 72)
    if size < len(_ESP) or size > SECTOR:
        return False
    table = _head(image, at * SECTOR, min(count, _GPT_ROWS_MOST) * size)
    return any(table[row : row + len(_ESP)] == _ESP for row in range(0, len(table), size))


def _has_signature(image: Source) -> bool:
    return _head(image, SECTOR - 2, 2) == _SIGNATURE


def has_partitions(image: Source) -> bool:
    """A GPT, or an MBR with a table that could be one."""
    if _head(image, SECTOR, len(_GPT)) == _GPT or _head(image, 4096, len(_GPT)) == _GPT:
        return True
    if not _has_signature(image):
        return False
    entries = list(_ENTRY.iter_unpack(image.read(_TABLE, 4 * _ENTRY.size)))
    used = [entry for entry in entries if entry[2]]
    return bool(used) and all(
        status in (0, 0x80) and bool(kind) == bool(start and sectors)
        for status, _, kind, _, start, sectors in entries
    )
