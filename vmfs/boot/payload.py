"""What a bzImage has inside: the compressed vmlinux, decompressed here into a file of its own.

A library does in a fraction of a second what the guest would emulate. It is an optimisation only: whatever is not
understood (a format without a library here, a size that is not the announced one, damage) is None, and the kernel's
own decompressor runs, which says what it does not like.

Source: Linux Documentation/arch/x86/boot.rst, payload_offset and payload_length. The formats but gzip have the size
of the vmlinux after them (4 bytes, little-endian); gzip ends with it (RFC 1952, ISIZE).
"""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterator

import lz4.block
import zstandard

from vmfs.boot.source import CHUNK, Source
from vmfs.words.errors import Invalid

_SIZE = 4  # bytes of the vmlinux's size
_LARGEST = 512 << 20  # bytes of a vmlinux; with every option of Linux it has a third of that
_MEMORY_LIMIT = 256 << 20  # what a dictionary may take; Linux's are of 128 MiB at the most


Decompressor = Callable[[Source], Iterator[bytes]]


class _Damaged(Exception):
    """The stream does not decompress."""


# How each library says so; bz2 by OSError. Invalid is a stream that ends within a block.
_DAMAGE = (_Damaged, Invalid, zlib.error, lzma.LZMAError, OSError, lz4.block.LZ4BlockError, zstandard.ZstdError)


def decompress(image: Source, offset: int, length: int, limit: int) -> Source | None:
    """The vmlinux of the payload, in a memfd that the caller closes; None where the kernel has to do it.

    `limit` bounds its size: what the kernel said it needs to run.
    """
    if length < 2 * _SIZE:
        return None
    decompressor = _format(image, offset)
    if decompressor is None:
        return None
    size = int.from_bytes(image.read(offset + length - _SIZE, _SIZE), "little")
    if not 0 < size <= min(limit, _LARGEST):
        return None
    stream = image.part(offset, length if decompressor is _gzip else length - _SIZE)
    fd = os.memfd_create("vmfs-vmlinux", os.MFD_CLOEXEC)
    try:
        done = 0
        for chunk in decompressor(stream):
            if done + len(chunk) > size:
                raise _Damaged
            done += os.pwrite(fd, chunk, done)
        if done == size:
            return Source(fd, size, image.name)
    except _DAMAGE:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def name_of(image: Source, offset: int) -> str:
    """The format of a payload, for people."""
    decompressor = _format(image, offset)
    return "unknown" if decompressor is None else decompressor.__name__[1:]


def _format(image: Source, offset: int) -> Decompressor | None:
    head = image.read(offset, 6)
    return next((found for magic, found in FORMATS.items() if head.startswith(magic)), None)


def _bounded(stream: Source, decompressor: object) -> Iterator[bytes]:
    """Through a decompressor of the standard library's shape (lzma, bz2), CHUNK of output at a time."""
    for data in stream.chunks(0, stream.size):
        while not decompressor.eof:  # type: ignore[attr-defined]
            yield decompressor.decompress(data, CHUNK)  # type: ignore[attr-defined]
            data = b""
            if decompressor.needs_input:  # type: ignore[attr-defined]
                break
    if not decompressor.eof:  # type: ignore[attr-defined]
        raise _Damaged


def _xz(stream: Source) -> Iterator[bytes]:
    return _bounded(stream, lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_LIMIT))


def _lzma(stream: Source) -> Iterator[bytes]:
    return _bounded(stream, lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY_LIMIT))


def _bzip2(stream: Source) -> Iterator[bytes]:
    return _bounded(stream, bz2.BZ2Decompressor())


def _gzip(stream: Source) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    for data in stream.chunks(0, stream.size):
        while data and not decompressor.eof:
            yield decompressor.decompress(data, CHUNK)
            data = decompressor.unconsumed_tail
    if not decompressor.eof:
        raise _Damaged


def _zstd(stream: Source) -> Iterator[bytes]:
    class Reader:
        """What zstandard reads from."""

        def __init__(self) -> None:
            self.at = 0

        def read(self, length: int) -> bytes:
            data = stream.read(self.at, min(length, stream.size - self.at))
            self.at += len(data)
            return data

    decompressor = zstandard.ZstdDecompressor(max_window_size=_MEMORY_LIMIT)
    with decompressor.stream_reader(Reader(), read_size=CHUNK) as reader:  # type: ignore[arg-type]
        while data := reader.read(CHUNK):
            yield data


def _lz4(stream: Source) -> Iterator[bytes]:
    """The legacy format: blocks of at most 8 MiB when decompressed, each after its length (lz4's
    doc/lz4_Frame_format.md, "Legacy frame")."""
    block = 8 << 20
    largest = block + block // 255 + 16  # LZ4_COMPRESSBOUND
    at = 4
    while at < stream.size:
        length = int.from_bytes(stream.read(at, 4), "little")
        if length > largest:
            raise _Damaged
        yield lz4.block.decompress(stream.read(at + 4, length), uncompressed_size=block)
        at += 4 + length


FORMATS: dict[bytes, Decompressor] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\x5d\x00\x00": _lzma,
    b"\xfd7zXZ\x00": _xz,
    b"\x02\x21\x4c\x18": _lz4,
    b"\x28\xb5\x2f\xfd": _zstd,
}
