"""Images of other programs, and compressed ones, as disks of a machine."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard
from mounting import failing

MIB = 1 << 20
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="package qemu-utils is not there")
CONTENT = random.Random(8).randbytes(MIB) + bytes(MIB) + random.Random(9).randbytes(MIB // 2) + bytes(MIB // 2)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "raw"
    path.write_bytes(CONTENT)
    return path


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def attach(vm, line: str) -> None:
    vm.write("machine", "pc")
    vm.write("dev/add", line)


def disk_of(vm, path: Path, words: str = "cow") -> bytes:
    """What a guest reads of it: sectors by PIO, from a program of a few instructions."""
    attach(vm, f"ide {path} {words}")
    size = int(dict(line.split(" ", 1) for line in vm.read("dev/hda/info").splitlines())["size"])
    code = bytearray.fromhex("fc bf00000020")  # cld; mov edi, 20000000h
    vm.write("mem_size", "768M")
    vm.write("mode", "protected")
    for lba in range(0, size // 512, 128):
        for port, value in ((0x1F6, 0xE0), (0x1F2, 128), (0x1F3, lba & 255), (0x1F4, lba >> 8 & 255), (0x1F7, 0x20)):
            code += b"\x66\xba" + struct.pack("<H", port) + b"\xb0" + bytes((value,)) + b"\xee"
        # 128 times: wait for DRQ, rep insd
        code += bytes.fromhex("bb80000000 66baf701 ec a808 74fb 66baf001 b980000000 f36d 4b 75e9")
    code += bytes.fromhex("66baf400 b001 ee")
    with open(vm / "mem", "r+b", buffering=0) as memory:
        memory.seek(1 << 20)
        memory.write(code)
        vm.write("reg/rip", "0x100000")
        assert vm.read("vm_run").startswith("shutdown cause=debug-exit"), vm.read("why")
        memory.seek(0x20000000)
        return memory.read(size)


@pytest.fixture
def emulated(vm):
    if vm.read("engine").strip() != "emulator":
        vm.write("engine", "emulator")
    return vm


@needs_qemu_img
@pytest.mark.parametrize(
    "options",
    ["-O qcow2", "-O qcow2 -c", "-O qcow2 -o cluster_size=4k,compat=0.10", "-O vmdk",
     "-O vmdk -o subformat=streamOptimized", "-O vhdx", "-O vdi"],
)  # fmt: skip
def test_a_format(emulated, raw, tmp_path, options):
    image = tmp_path / "image"
    qemu_img("convert", *options.split(), raw, image)
    before = image.read_bytes()
    assert disk_of(emulated, image) == CONTENT
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", ["gz", "xz", "zst", "members"])
def test_a_compressed_image(emulated, raw, tmp_path, kind):
    image = tmp_path / "image"
    half = len(CONTENT) // 2
    image.write_bytes({
        "gz": lambda: gzip.compress(CONTENT, 1),
        "xz": lambda: lzma.compress(CONTENT, preset=0),
        "zst": lambda: zstandard.compress(CONTENT[:half]) + zstandard.compress(CONTENT[half:]),
        "members": lambda: gzip.compress(CONTENT[:half], 1) + gzip.compress(CONTENT[half:], 1),
    }[kind]())  # fmt: skip
    assert disk_of(emulated, image, "ro") == CONTENT


@needs_qemu_img
def test_subclusters_are_refused(vm, raw, tmp_path):
    qemu_img("convert", "-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k", raw, tmp_path / "image")
    vm.write("machine", "pc")
    assert failing(vm.write, "dev/add", f"ide {tmp_path}/image cow") == errno.EINVAL
    assert "subclusters (extended_l2) is not read" in vm.read("error")


@needs_qemu_img
def test_a_compressed_qcow2(emulated, raw, tmp_path):
    qemu_img("convert", "-O", "qcow2", raw, tmp_path / "q")
    (tmp_path / "image").write_bytes(gzip.compress((tmp_path / "q").read_bytes(), 1))
    assert disk_of(emulated, tmp_path / "image") == CONTENT


@needs_qemu_img
def test_backing_files_are_opened_where_the_line_says_so(emulated, raw, tmp_path):
    shutil.copy(raw, tmp_path / "base.raw")
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "middle")
    qemu_img("create", "-f", "qcow2", "-b", "middle", "-F", "qcow2", tmp_path / "top")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 0x77 1M 64k", tmp_path / "top"], check=True, capture_output=True
    )
    emulated.write("machine", "pc")
    assert failing(emulated.write, "dev/add", f"ide {tmp_path}/top cow") == errno.EINVAL
    assert "'middle', which is opened only where the line says format=qcow2" in emulated.read("error")
    got = disk_of(emulated, tmp_path / "top", "cow format=qcow2")
    assert got == CONTENT[:MIB] + b"\x77" * 65536 + CONTENT[MIB + 65536 :]


def header(*, backing=b"", size=1 << 20, l1_size=1, l1_at=0x10000, bits=16) -> bytes:
    """Of a qcow2."""
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72 if backing else 0, len(backing), bits, size, 0, l1_size,
                       l1_at, 0x20000, 1, 0, 0)  # fmt: skip
    return (head + backing).ljust(0x30000, b"\0")


@pytest.mark.parametrize(
    ("data", "words", "error", "sentence"),
    [
        (header(), "rw", errno.EINVAL, "it is qcow2, which is read and not written"),
        (header(backing=b"/etc/passwd"), "cow", errno.EINVAL, "opened only where the line says"),
        (header(backing=b"none"), "cow format=qcow2", errno.ENOENT, "none"),
        (header(backing=b"image"), "cow format=qcow2", errno.EINVAL, "more than 8 files"),
        (header(size=1 << 62), "ro", errno.EINVAL, "up to 256 GiB"),
        (header(l1_size=0xFFFFFFFF), "ro", errno.EINVAL, "table"),
        (header(l1_at=1 << 62), "ro", errno.EINVAL, "damaged"),
        (header(bits=60), "ro", errno.EINVAL, "damaged"),
        (header()[:80], "ro", errno.EINVAL, "damaged"),
        (b"KDMV" + b"\xff" * 1000, "ro", errno.EINVAL, ""),
        (b"vhdxfile" + bytes(1 << 20), "ro", errno.EINVAL, "damaged"),
        (bytes(64) + b"\x7f\x10\xda\xbe" + b"\xff" * 1000, "ro", errno.EINVAL, ""),
        (gzip.compress(b"x" * 10_000, mtime=0)[:-20], "ro", errno.EINVAL, "ends too early"),
        (b"\x1f\x8b\xff", "ro", errno.EINVAL, "ends too early"),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 50, "ro", errno.EINVAL, "damaged"),
        (b"raw", "ro format=qcow2", errno.EINVAL, "damaged"),
        (b"raw", "ro format=tar", errno.EINVAL, "a disk's format is raw, qcow2"),
    ],
)
def test_what_is_no_image_is_a_sentence(vm, tmp_path, data, words, error, sentence):
    (tmp_path / "image").write_bytes(data)
    vm.write("machine", "pc")
    before = set(os.listdir(vm / "dev"))
    assert failing(vm.write, "dev/add", f"blk {tmp_path}/image {words}") == error
    said = vm.read("error")
    assert sentence in said and "Traceback" not in said, said
    assert set(os.listdir(vm / "dev")) == before


def test_format_raw_takes_any_bytes(vm, tmp_path):
    (tmp_path / "image").write_bytes(header(backing=b"/etc/passwd"))
    attach(vm, f"blk {tmp_path}/image rw format=raw")
    assert f"size {0x30000}" in vm.read("dev/blk0/info")


def test_room_for_what_is_unpacked_counts(own_server, tmp_path):
    (tmp_path / "image").write_bytes(gzip.compress(os.urandom(MIB) * 200, 1))
    vm = own_server(max_memory=256 * MIB).make()
    vm.write("machine", "pc")
    assert failing(vm.write, "dev/add", f"blk {tmp_path}/image ro") == errno.ENOSPC
