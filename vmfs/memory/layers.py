"""What RAM was at some moment: layers of pages that nobody can change any more, and that snapshots share.

A layer is a memfd sealed against writing, in which each page is at its guest-physical address. An image is some of
them, one over the other: a page is that of the last one that has it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator

from vmfs.memory.mapping import PAGE
from vmfs.words.errors import EngineFailed

_COPIED = 1 << 20  # bytes at a time
_PART = 512  # bytes of a bitmap that are looked at together
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def runs(pages: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits of a bitmap of pages, each as its first page and how many there are."""
    data = pages.to_bytes((pages.bit_length() + 7) // 8, "little")
    first = count = 0
    for at in range(0, len(data), _PART):
        bits, page = int.from_bytes(data[at : at + _PART], "little"), 8 * at
        while bits:
            skip = (bits & -bits).bit_length() - 1
            bits >>= skip
            page += skip
            length = (~bits & (bits + 1)).bit_length() - 1
            bits >>= length
            if first + count == page:
                count += length
            else:
                if count:
                    yield first, count
                first, count = page, length
            page += length
    if count:
        yield first, count


def bits(first: int, count: int) -> int:
    """The bitmap of a run of pages."""
    return ((1 << count) - 1) << first


def pages_of(offset: int, length: int) -> int:
    """The bitmap of the pages that these bytes are in."""
    first = offset // PAGE
    return bits(first, (offset + length - 1) // PAGE + 1 - first) if length else 0


def extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of what a file has of its bytes from `start` to `end`; between them are holes: zeros."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        if start >= end:
            return
        hole = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start, hole
        start = hole


def is_sealed(fd: int) -> bool:
    """Whether it is of a memfd that nobody can change any more."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        return False


class Layer:
    """A memfd that is this object's, and the pages it has; `pages` None: all, holes as well. Its memory is free when
    nobody has it any more."""

    is_sealed = False

    def __init__(self, fd: int, pages: int | None) -> None:
        self.fd = fd
        self.pages = pages

    def seal(self) -> None:
        """Nobody can write it from now on. EngineFailed where somebody has it mapped for writing."""
        try:
            if not is_sealed(self.fd):
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            raise EngineFailed(f"the memory of a snapshot is not sealed: {os.strerror(error.errno or 0)}") from error
        self.is_sealed = True

    def absorb(self, below: Layer) -> None:
        """Have what it has not of `below`, too: an image in which that is the next one below stays the same. Neither is
        sealed."""
        assert self.pages is not None and below.pages is not None
        for first, count in runs(below.pages & ~self.pages):
            at, end = first * PAGE, (first + count) * PAGE
            while at < end:
                at += os.pwrite(self.fd, os.pread(below.fd, min(end - at, _COPIED), at), at)
        self.pages |= below.pages

    @property
    def taken(self) -> int:
        """Bytes of memory."""
        return os.fstat(self.fd).st_blocks * 512

    def has(self, pages: int) -> int:
        """Which of these it has."""
        return pages if self.pages is None else pages & self.pages

    def __del__(self, close: object = os.close) -> None:
        close(self.fd)  # type: ignore[operator]


class Image:
    """RAM as it was, up to the address `end`."""

    def __init__(self, layers: Iterable[Layer], end: int) -> None:
        self.layers = tuple(layers)
        self.end = end

    def over(self, layer: Layer) -> Image:
        """This one with what `layer` has. Layers of which nothing is left to be seen are not in it."""
        kept, hidden = [layer], layer.pages
        for one in reversed(self.layers):
            if hidden is None:
                break
            if one.pages is None or one.pages & ~hidden:
                kept.append(one)
            if one.pages is None:
                break
            hidden |= one.pages
        return Image(reversed(kept), self.end)

    def parts(self, pages: int) -> Iterator[tuple[Layer, int]]:
        """Which layer has which of these pages."""
        for layer in reversed(self.layers):
            if here := layer.has(pages):
                yield layer, here
                pages &= ~here
            if not pages:
                return

    def differs(self, other: Image) -> int:
        """The pages that may be others there."""
        if self.layers == other.layers:
            return 0
        common = 0
        for one, its in zip(self.layers, other.layers, strict=False):
            if one is not its:
                break
            common += 1
        every, found = bits(0, self.end // PAGE), 0
        for layer in (*self.layers[common:], *other.layers[common:]):
            found |= every if layer.pages is None else layer.pages
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes at the end."""
        length = max(min(length, self.end - offset), 0)
        data = bytearray(length)
        view = memoryview(data)
        for layer, here in self.parts(pages_of(offset, length)):
            for first, count in runs(here):
                start, end = max(first * PAGE, offset), min((first + count) * PAGE, offset + length)
                os.preadv(layer.fd, [view[start - offset : end - offset]], start)
        return bytes(data)

    def extents(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of what takes memory; between them are zeros."""
        return joined(extents(layer.fd, 0, self.end) for layer in self.layers)

    def taken_beside(self, others: Iterable[Image]) -> int:
        """Bytes of memory of the layers that none of these has."""
        shared = {layer for other in others for layer in other.layers}
        return sum(layer.taken for layer in self.layers if layer not in shared)


def joined(lists: Iterable[Iterable[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """The ranges that lists of (start, end) have together, in order."""
    start = end = -1
    for one, its_end in sorted(pair for ranges in lists for pair in ranges):
        if one > end:
            if end > start >= 0:
                yield start, end
            start = one
        end = max(end, its_end)
    if end > start >= 0:
        yield start, end
