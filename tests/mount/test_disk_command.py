"""`vmfs disk`: images, and the disks of machines, copied out and committed."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import os
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from vmfs import cli

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(MIB) + bytes(5 * MIB) + random.Random(4).randbytes(MIB)
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="package qemu-utils is not there")


def disk(*words) -> tuple[int, str]:
    with io.StringIO() as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return cli.main(["disk", *map(str, words)]), said.getvalue()


def made(*words) -> str:
    code, said = disk(*words)
    assert not code, said
    return said


def refused(*words) -> str:
    code, said = disk(*words)
    assert code == 1 and said.count("\n") == 1, said
    return said


@pytest.fixture
def raw(tmp_path) -> Path:
    path = tmp_path / "raw"
    with open(path, "wb") as file:  # with a hole
        file.write(CONTENT[:MIB])
        file.seek(6 * MIB)
        file.write(CONTENT[6 * MIB :])
    return path


def test_an_image_is_made_and_looked_at(tmp_path, raw):
    new = tmp_path / "new"
    assert made("create", new, "8M") == ""
    assert new.read_bytes() == bytes(8 * MIB) and not new.stat().st_blocks
    assert made("info", new).split("\n")[:2] == ["format raw", f"size {8 * MIB}"]
    assert "is there already" in refused("create", new, "1M")
    assert "SIZE, or --from" in refused("create", tmp_path / "x")
    assert "multiple of 512" in refused("create", tmp_path / "x", "1000")
    assert "No such file" in refused("create", tmp_path / "x", "--from", tmp_path / "none")
    assert "more than 1048576" in refused("create", tmp_path / "x", "1M", "--from", raw)
    assert "No such file" in refused("info", tmp_path / "none")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["new", "raw"]
    copy = tmp_path / "copy"
    made("create", copy, "16M", "--from", raw)
    assert copy.read_bytes() == CONTENT.ljust(16 * MIB, b"\0")
    assert copy.stat().st_blocks * 512 <= 2 * MIB + (64 << 10)


@needs_qemu_img
@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vhdx", "vdi"])
def test_of_an_image_of_another_format(tmp_path, raw, kind):
    image, copy = tmp_path / "image", tmp_path / "copy"
    subprocess.run(["qemu-img", "convert", "-O", kind, raw, image], check=True)
    assert made("info", image).split("\n")[:2] == [f"format {kind}", f"size {len(CONTENT)}"]
    made("create", copy, "--from", image)
    assert copy.read_bytes() == CONTENT


@needs_qemu_img
def test_backing_files_are_opened_where_that_is_asked_for(tmp_path, raw):
    image, copy = tmp_path / "image", tmp_path / "copy"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", image], check=True)
    assert f"backing {raw}\n" in made("info", image)
    assert "format=qcow2" in refused("create", copy, "--from", image)
    made("create", copy, "--from", image, "--format", "qcow2")
    assert copy.read_bytes() == CONTENT


def test_hostile_images_are_a_sentence(tmp_path):
    """Headers of each format, and bytes that no image has."""
    image, dice = tmp_path / "image", random.Random(9)
    heads = b"QFI\xfb\0\0\0\3", b"KDMV\1\0\0\0", b"vhdxfile", bytes(64) + b"\x7f\x10\xda\xbe"
    for number, head in enumerate(heads):
        image.write_bytes(head + dice.randbytes(200_000))
        for words in (("info", image), ("create", tmp_path / f"copy{number}", "--from", image)):
            code, said = disk(*words)
            assert "Traceback" not in said
            assert (code, said.count("\n")) == (1, 1) or (words[0] == "info" and not code), said
    assert [one.name for one in tmp_path.iterdir()] == ["image"]


# ---- of machines


def writing(vm, line: str, lba: int, data: bytes) -> None:
    """A machine with that disk, whose guest writes 512 bytes to a sector by PIO, and stands then."""
    vm.write("machine", "pc")
    vm.write("dev/add", line)
    vm.write("mode", "protected")
    code = b""
    for port, value in ((0x1F6, 0xE0), (0x1F2, 1), (0x1F3, lba & 255), (0x1F4, lba >> 8), (0x1F5, 0), (0x1F7, 0x30)):
        code += b"\x66\xba" + struct.pack("<H", port) + b"\xb0" + bytes((value,)) + b"\xee"
    code += bytes.fromhex("fc 66baf701 ec a808 74fb be00000200 66baf001 b980000000 f36f 66baf400 b001 ee")
    with open(vm / "mem", "r+b", buffering=0) as memory:
        memory.seek(0x2_0000)
        memory.write(data)
        memory.seek(0x1_0000)
        memory.write(code)
    vm.write("reg/rip", "0x10000")
    assert vm.read("vm_run").startswith("shutdown cause=debug-exit")


WRITTEN = bytes(range(256)) * 2
AFTER = CONTENT[: 3 << 20] + WRITTEN + CONTENT[(3 << 20) + 512 :]


def test_a_machines_disk_is_copied_out_and_committed(vm, tmp_path, raw):
    writing(vm, f"ide {raw} cow", 3 << 11, WRITTEN)
    image = vm / "dev/hda/image"
    assert image.read_bytes() == AFTER
    with open(image, "rb") as file:
        assert file.seek(0, os.SEEK_HOLE) < file.seek(2 << 20, os.SEEK_DATA) <= 3 << 20
        file.seek((3 << 20) - 3)
        assert file.read(7) == bytes(3) + WRITTEN[:4]
    assert made("info", vm.path) == f"hda cow {len(CONTENT)} {raw}\n"
    copy = tmp_path / "copy"
    made("export", vm.path, "hda", copy)
    assert copy.read_bytes() == AFTER and copy.stat().st_blocks * 512 < 3 << 20
    assert "is there already" in refused("export", vm.path, "hda", copy)
    assert "has no disk 'hdb'; it has hda: did you mean hda?" in refused("export", vm.path, "hdb", tmp_path / "x")
    raw.chmod(0o640)
    with open(raw, "rb") as held:
        made("commit", vm.path, "hda")
        assert held.read() == CONTENT  # who has the old file keeps it
    assert raw.read_bytes() == AFTER and raw.stat().st_mode & 0o777 == 0o640
    assert image.read_bytes() == AFTER
    with open(raw, "rb") as other:  # as a machine that has the new file rw
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "writes to it (flock)" in refused("commit", vm.path, "hda")


def test_what_cannot_be_committed(vm, tmp_path, raw):
    writing(vm, f"ide {raw} rw", 9, WRITTEN)
    before = raw.read_bytes()
    assert "no cow disk" in refused("commit", vm.path, "hda")
    assert "has no disk" in refused("commit", vm.path, "com1")
    assert raw.read_bytes() == before


def test_not_of_a_machine_that_runs(vm, tmp_path, raw):
    vm.write("machine", "pc")
    vm.write("dev/add", f"blk {raw} cow")
    vm.load("ebfe")
    vm.write("mode", "long")
    vm.write("reg/rip", "0x1000")
    vm.write("state", "run")
    assert "it runs" in refused("export", vm.path, "blk0", tmp_path / "copy")
    assert "it runs" in refused("commit", vm.path, "blk0")
    vm.write("state", "pause")
    assert not (tmp_path / "copy").exists() and raw.read_bytes() == CONTENT


def test_an_image_of_another_format_is_exported_and_not_committed(vm, tmp_path):
    image, copy = tmp_path / "image.gz", tmp_path / "copy"
    image.write_bytes(gzip.compress(CONTENT, 1))
    writing(vm, f"ide {image} cow", 3 << 11, WRITTEN)
    assert "it is gz, which is not written" in refused("commit", vm.path, "hda")
    made("export", vm.path, "hda", copy)
    assert zlib.crc32(copy.read_bytes()) == zlib.crc32(AFTER)
