"""What `vmfs boot FILE` takes a file for."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs import cli
from vmfs.boot import media
from vmfs.boot.media import BIOS, CD, DISK, FLOPPY, KERNEL, tell
from vmfs.boot.source import Source
from vmfs.commands import boot
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


ESP = struct.pack("<16s", bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")).ljust(128, b"\0")


def catalog(*rows: bytes) -> bytes:
    """A CD whose boot catalog has these rows."""
    record = TORITO.ljust(0x47, b"\0") + struct.pack("<I", 20)
    return iso(VOLUME, record, END).ljust(20 * 2048, b"\0") + b"".join(row.ljust(32, b"\0") for row in rows)


def validation(platform: int) -> bytes:
    return bytes((1, platform)).ljust(30, b"\0") + b"\x55\xaa"


def gpt(first: bytes, *rows: bytes, size: int = 128, at: int = 2) -> bytes:
    head = b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", at, len(rows), size)
    return first.ljust(512, b"\0") + head.ljust(512, b"\0") + b"".join(row.ljust(size, b"\0") for row in rows)


PROTECTIVE = sector((0, 0xEE, 1, 0xFFFFFFFF))


def pe(at: int = 0x40) -> bytes:
    """A program for UEFI, whose PE header is there."""
    head = struct.pack("<4sH18xH66xH", b"PE\0\0", 0x8664, 0x20B, 10)
    return b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", at) + bytes(at - 0x40) + head


def test_a_program_for_uefi():
    for data, is_one in ((pe(), True), (pe(0x1000), True), (pe()[:-1], False), (b"MZ", False), (BZIMAGE, False)):
        fd = os.memfd_create("image")
        os.write(fd, data)
        assert media.is_efi(Source.of(fd, "image")) == is_one
        os.close(fd)


# Bytes of headers, tables and catalogs, and others.
PLACES = st.one_of(*map(st.integers, (0, 16 * 2048, 20 * 2048, 0), (0x600, 18 * 2048, 20 * 2048 + 256, 50_000)))


@given(
    st.lists(st.tuples(PLACES, st.binary(min_size=1, max_size=40)), max_size=6),
    st.sampled_from((
        iso(VOLUME, TORITO, END), sector((0x80, 0x83, 1, 9)), ELF, BZIMAGE, MULTIBOOT, gpt(PROTECTIVE, bytes(128), ESP),
        catalog(validation(0xEF), b"\x88"), catalog(validation(0), b"\0", b"\x91\xef\1", b"\x88"), pe(), pe(0x1000),
    )),  # fmt: skip
    st.integers(1, 70_000),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_something_or_a_sentence(patches, data, size):
    blob = bytearray(data.ljust(size, b"\0")[:size])
    for at, patch in patches:
        blob[at : at + len(patch)] = patch
    fd = os.memfd_create("image")
    os.write(fd, blob)
    assert media.needs_uefi(Source.of(fd, "image")) in (True, False)
    assert media.is_efi(Source.of(fd, "image")) in (True, False)
    os.close(fd)
    try:
        assert told(bytes(blob)) in (KERNEL, CD, FLOPPY, DISK, BIOS)
    except Invalid as error:
        assert str(error).startswith("image: ")


# ---- what only UEFI boots


@pytest.mark.parametrize(
    ("data", "is_so"),
    [
        (catalog(validation(0xEF), b"\x88"), True),
        (catalog(validation(0), b"\x88", b"\x91\xef\1", b"\x88"), False),  # both
        (catalog(validation(0), b"\0", b"\x91\xef\1", b"\x88"), True),  # what is for a BIOS is not bootable
        (catalog(validation(0), b"\x88"), False),
        (catalog(validation(0)[:-1], b"\x88"), False),  # no catalog
        (catalog(), False),
        (iso(VOLUME, TORITO.ljust(0x47, b"\0") + b"\xff" * 4, END), False),  # a catalog that is past the end
        (gpt(PROTECTIVE, bytes(128), ESP), True),
        (gpt(sector((0, 0xEE, 1, 9), code=b"\xeb\xfe"), ESP), False),  # a boot loader in the MBR
        (gpt(PROTECTIVE, bytes(128)), False),
        (gpt(PROTECTIVE, ESP, size=8), False),
        (gpt(PROTECTIVE, ESP, at=1 << 60), False),
        (PROTECTIVE, False),
        (b"", False),
    ],
)
def test_what_only_uefi_boots(data, is_so):
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        assert media.needs_uefi(Source.of(fd, "image")) == is_so
    finally:
        os.close(fd)


def test_boot_takes_uefi_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(boot, "ovmf", lambda choices: ("/code", "/variables"))
    image = tmp_path / "image"
    image.write_bytes(catalog(validation(0xEF), b"\x88"))

    def lines(*words: str) -> list[str]:
        plan = boot.plan_of(cli.make_parser(["boot"]).parse_args(["boot", str(image), *words]))
        return [line for line, _ in plan.lines]

    cd = f"cdrom {image}"
    assert lines() == ["pflash /code ro", "pflash /variables cow", cd]
    assert "nothing that a BIOS boots: by UEFI firmware" in capsys.readouterr().err
    assert lines("--bios", "/bios") == [cd]
    image.write_bytes(catalog(validation(0), b"\x88"))
    monkeypatch.setattr(boot, "seabios", lambda: "/bios")
    assert lines() == [cd] and not capsys.readouterr().err


def test_floppy_sizes():
    assert media.FLOPPY_SIZES[6] == 1_474_560
