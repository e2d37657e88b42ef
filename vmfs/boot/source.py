"""Source: an image on the host, read in pieces. A kernel or an initrd may have hundreds of MiB."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from vmfs.words.errors import EngineFailed, Invalid

CHUNK = 1 << 20  # bytes that are moved at a time


@dataclass(frozen=True, slots=True)
class Source:
    """`size` bytes of the file `fd` from byte `start` on; `name` is what errors call it ("kernel", "initrd").

    It does not own the descriptor. A file that has become shorter since is Invalid when it is read.
    """

    fd: int
    size: int
    name: str = "kernel"
    start: int = 0

    @classmethod
    def of(cls, fd: int, name: str = "kernel") -> Source:
        """The whole file."""
        return cls(fd, os.fstat(fd).st_size, name)

    def part(self, offset: int, size: int) -> Source:
        """`size` bytes of it from `offset` on."""
        self._check(offset, size)
        return Source(self.fd, size, self.name, self.start + offset)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. For headers and tables."""
        self._check(offset, length)
        parts = []
        while length:
            data = self._pread(offset, length)
            parts.append(data)
            offset, length = offset + len(data), length - len(data)
        return b"".join(parts)

    def head(self, length: int) -> bytes:
        """The first `length` bytes, or all there are."""
        return self.read(0, min(length, self.size))

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """`length` bytes in pieces of CHUNK at the most."""
        self._check(offset, length)
        while length:
            data = self._pread(offset, min(length, CHUNK))
            yield data
            offset, length = offset + len(data), length - len(data)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Invalid(f"{self.name}: truncated: {length} bytes at {offset:#x} are not all in its {self.size} bytes")

    def _pread(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.fd, length, self.start + offset)
        except OSError as error:
            raise EngineFailed(f"{self.name}: {error.strerror}") from error
        if not data:
            raise Invalid(f"{self.name}: it became shorter while it was read")
        return data
