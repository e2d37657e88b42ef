"""Compressed kernels in a bzImage: every format is decompressed, and what is doubtful is left to the kernel."""

import bz2
import gc
import gzip
import lzma
import os
import struct

import lz4.block
import pytest
import zstandard
from booting import MIB, bzimage, elf, loaded, source
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.boot import payload

CODE = bytes(range(256)) * 40
VMLINUX = elf([(MIB, CODE, 3 * MIB)], entry=MIB + 0x100, virtual=0xFFFF_FFFF_8000_0000)
LARGE = VMLINUX + os.urandom(1 << 20) + bytes(8 << 20)  # more than a chunk, more than a block of lz4


def lz4_legacy(data):
    blocks = (lz4.block.compress(data[at : at + (8 << 20)], store_size=False) for at in range(0, len(data), 8 << 20))
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def sized(compress):
    """Linux puts the size after what has none of its own (scripts/Makefile.lib, size_append)."""
    return lambda data: compress(data) + struct.pack("<I", len(data))


_BCJ = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 25},
]  # as scripts/xz_wrap.sh has it
COMPRESSORS = {
    "gzip": lambda data: gzip.compress(data, 9),
    "bzip2": sized(bz2.compress),
    "lzma": sized(lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0)),
    "xz": sized(lambda data: lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=_BCJ)),
    "lz4": sized(lz4_legacy),
    "zstd": sized(zstandard.ZstdCompressor(level=3).compress),
}


def test_every_format_is_tested():
    assert [found.__name__[1:] for found in payload.FORMATS.values()] == list(COMPRESSORS)


def decompressed(data, limit=64 * MIB):
    """The bytes, or None."""
    with source(b"before" + data + b"after") as image:
        made = payload.decompress(image, 6, len(data), limit)
        if made is None:
            return None
        try:
            return made.read(0, made.size)
        finally:
            os.close(made.fd)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("data", [VMLINUX, LARGE], ids=["small", "large"])
def test_round_trip(name, data):
    assert decompressed(COMPRESSORS[name](data)) == data


@pytest.mark.parametrize("name", COMPRESSORS)
def test_damage_is_left_to_the_kernel(name):
    good = COMPRESSORS[name](VMLINUX)
    assert decompressed(good, limit=len(VMLINUX) - 1) is None
    assert decompressed(good[:-4] + struct.pack("<I", len(VMLINUX) + 1)) is None
    assert decompressed(good[:-4] + struct.pack("<I", len(VMLINUX) - 1)) is None
    assert decompressed(good[:-40] + good[-4:]) is None


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_bomb_is_not_unpacked(name):
    data = COMPRESSORS[name](bytes(16 * MIB))
    gc.collect()  # what other tests have left is not to be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    assert decompressed(data[:-4] + struct.pack("<I", 1000)) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_kernel_takes_the_hosts_memory():
    bomb = COMPRESSORS["zstd"](bytes(16 * MIB))[:-4] + struct.pack("<I", (512 << 20) + 1)
    assert decompressed(bomb, limit=3 << 30) is None


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(COMPRESSORS)), st.data())
def test_hostile_streams(name, data):
    good = bytearray(COMPRESSORS[name](VMLINUX))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(4, len(good) - 5))] = data.draw(st.integers(0, 255))
    made = decompressed(bytes(good))
    assert made is None or len(made) == len(VMLINUX)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(payload.FORMATS)), st.binary(max_size=300))
def test_any_stream(magic, data):
    made = decompressed(magic + data + struct.pack("<I", 5000))
    assert made is None or len(made) == 5000


# ---- in a bzImage


@pytest.mark.parametrize("name", COMPRESSORS)
def test_vmlinux_is_entered_at_once(name):
    with loaded(bzimage(CODE, payload=COMPRESSORS[name](VMLINUX)), cmdline=b"quiet") as (start, memory):
        assert start.registers["rip"] == MIB + 0x100
        assert memory.read(MIB, len(CODE) + 5) == CODE + bytes(5)
        assert memory.read(start.registers["rsi"] + 0x202, 4) == b"HdrS"
        assert start.how == f"bzImage, {name} decompressed on the host, vmlinux entered at 0x100100"


def test_the_kernels_own_decompressor_can_be_asked_for():
    image = bzimage(CODE, payload=COMPRESSORS["lz4"](VMLINUX))
    for options in ({"decompress": False}, {"cmdline": b"quiet kaslr"}):
        with loaded(image, **options) as (start, _):
            assert start.registers["rip"] == MIB + 0x200
    with loaded(image, cmdline=b"nokaslr x=kaslr") as (start, _):
        assert start.registers["rip"] == MIB + 0x100


@pytest.mark.parametrize(
    "vmlinux",
    [
        b"not an ELF file" * 10,
        VMLINUX[:-1],
        elf([(2 * MIB, CODE, MIB)], entry=2 * MIB),  # not where the header says
        elf([(MIB, CODE, 5 * MIB)], entry=MIB),  # larger than init_size
        elf([(MIB, CODE, MIB)], entry=4 * MIB),  # entry in no segment
        elf([(MIB, CODE, MIB), (MIB + 100, CODE, MIB)], entry=MIB),  # overlap
        elf([(MIB, CODE, MIB)], entry=MIB, bits=32, machine=3),
        elf([(MIB, CODE, MIB)], entry=MIB, kind=3),  # to be relocated
    ],
)
def test_doubt_runs_the_kernels_own_decompressor(vmlinux):
    image = bzimage(CODE, payload=COMPRESSORS["gzip"](vmlinux))
    with loaded(image) as (start, memory):
        assert start.registers["rip"] == MIB + 0x200
        assert memory.read(MIB, len(image) - 2560) == image[2560:]


def test_a_32_bit_kernel():
    vmlinux = elf([(MIB, CODE, 3 * MIB)], entry=MIB + 0x40, bits=32, machine=3, virtual=0xC000_0000)
    with loaded(bzimage(CODE, xloadflags=0, payload=COMPRESSORS["gzip"](vmlinux))) as (start, memory):
        assert (start.registers["rip"], start.registers["cs.db"]) == (MIB + 0x40, 1)
        assert memory.read(start.registers["rsi"] + 0x202, 4) == b"HdrS"
    with loaded(bzimage(CODE, xloadflags=0, payload=COMPRESSORS["gzip"](VMLINUX))) as (start, _):
        assert start.registers["rip"] == MIB  # a kernel of 64 bits is not one that this entry is for


def test_a_payload_beyond_the_image_is_none():
    image = bzimage(CODE, payload=COMPRESSORS["gzip"](VMLINUX), length=(0x24C, "<I", 0xFFFF_FFF0))
    with loaded(image) as (start, _):
        assert start.registers["rip"] == MIB + 0x200
