"""What `vmfs boot FILE` takes a file for."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.boot import media
from vmfs.boot.media import BIOS, CD, DISK, FLOPPY, KERNEL, tell
from vmfs.boot.source import Source
from vmfs.words.errors import Invalid


def told(data: bytes, size: int | None = None) -> str:
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        os.ftruncate(fd, size or len(data))
        return tell(Source.of(fd, "image"))
    finally:
        os.close(fd)


def sector(*entries: tuple[int, int, int, int], code: bytes = b"") -> bytes:
    table = b"".join(struct.pack("<B3xB3xII", *entry) for entry in entries)
    return code.ljust(446, b"\0") + table.ljust(64, b"\0") + b"\x55\xaa"


def iso(*descriptors: bytes, first: bytes = b"") -> bytes:
    return first.ljust(16 * 2048, b"\0") + b"".join(one.ljust(2048, b"\0") for one in descriptors)


VOLUME, END = b"\x01CD001\x01", b"\xffCD001\x01"
TORITO = b"\0CD001\x01EL TORITO SPECIFICATION"
MULTIBOOT = struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
ELF = (
    b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x10_0000, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x10_0000, 0x10_0000, 512, 512, 4096)
)
BZIMAGE = (
    bytes(0x1F1) + b"\x01" + bytes(0x1FE - 0x1F2) + b"\x55\xaa" + b"\xeb\x6a" + b"HdrS" + struct.pack("<H9xB", 0x20F, 1)
).ljust(4096, b"\0")


@pytest.mark.parametrize(
    ("data", "size", "kind"),
    [
        (iso(VOLUME, TORITO, END), None, CD),
        (iso(VOLUME, TORITO, END, first=sector((0x80, 0x17, 0, 100))), None, CD),  # hybrid
        (iso(VOLUME, END, first=sector((0x80, 0x83, 1, 100))), None, DISK),
        (sector((0x80, 0x83, 2048, 4096)), 4 << 20, DISK),
        (sector((0, 0xEE, 1, 0xFFFFFFFF)) + b"EFI PART", 4 << 20, DISK),
        (bytes(512) + b"EFI PART", 4 << 20, DISK),
        (sector((0x80, 0x83, 1, 9)) + MULTIBOOT, 1 << 20, DISK),  # GRUB in front of a partition
        (sector() + MULTIBOOT, 1440 << 10, FLOPPY),
        (sector(), 360 << 10, FLOPPY),
        (sector(), None, DISK),  # a boot sector
        (sector(code=b"\xeb\xfe"), 5000, DISK),
        (MULTIBOOT.ljust(512, b"\0"), None, KERNEL),
        (bytes(64) + MULTIBOOT + bytes(4096), None, KERNEL),
        (ELF.ljust(512, b"\0"), None, KERNEL),
        (bytes((64 << 10) - 16) + b"\xea\x5b\xe0\x00\xf0".ljust(16, b"\0"), None, BIOS),
    ],
)
def test_a_file_is_told_by_what_is_in_it(data, size, kind):
    assert told(data, size) == kind


def test_a_bzimage_is_no_disk():
    assert told(BZIMAGE) == KERNEL


@pytest.mark.parametrize(
    ("data", "size", "words"),
    [
        (b"\0", None, "`--cdrom`, `--floppy` and `--disk FILE`"),
        (b"text\n" * 1000, None, "nothing in it says what it is"),
        (b"", 1440 << 10, "nothing in it says"),
        (iso(VOLUME, END), None, "without a boot record"),
        (iso(*[VOLUME] * 70), None, "without a boot record"),
    ],
)
def test_what_it_cannot_tell_is_a_sentence(data, size, words):
    with pytest.raises(Invalid, match=words):
        told(data, size)


def test_an_empty_file():
    with pytest.raises(Invalid, match="empty"):
        told(b"", 0)


@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.binary(min_size=1, max_size=40)), max_size=6),
    st.sampled_from((iso(VOLUME, TORITO, END), sector((0x80, 0x83, 1, 9)), ELF, BZIMAGE, MULTIBOOT)),
    st.integers(1, 70_000),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_something_or_a_sentence(patches, data, size):
    blob = bytearray(data.ljust(size, b"\0")[:size])
    for at, patch in patches:
        blob[at : at + len(patch)] = patch
    try:
        assert told(bytes(blob)) in (KERNEL, CD, FLOPPY, DISK, BIOS)
    except Invalid as error:
        assert str(error).startswith("image: ")


def test_floppy_sizes():
    assert media.FLOPPY_SIZES[6] == 1_474_560
