"""What a machine boots: the files `kernel`, `initrd`, `bios` and the text of `cmdline`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping

from vmfs.memory.layers import SEALS, extents, is_sealed
from vmfs.words.errors import Gone, LimitReached

_STEP = 1 << 20  # bytes that are copied at a time
NAMES = ("kernel", "initrd", "bios")


class Kept:
    """A file in memory that nobody can change any more, shared by those that keep it."""

    def __init__(self, fd: int, size: int) -> None:
        """`fd` is this object's now, a memfd, which is sealed."""
        self.fd = fd
        self.size = size
        if not is_sealed(fd):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)

    def extents(self) -> Iterator[tuple[int, int]]:
        return extents(self.fd, 0, self.size)

    def read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)


class Image:
    """A file in memory, which costs nothing while it is empty. `limit` bytes at most."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.size = 0
        self._fd = -1
        self._kept: Kept | None = None  # what it is, and others have
        self._closed = False

    @property
    def fd(self) -> int:
        """Of a memfd; made by the first use."""
        if self._closed:
            raise Gone("the machine was removed")
        if self._fd < 0:
            self._fd = os.memfd_create(f"vmfs-{self.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return self._fd

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset) if self.size else b""

    def write(self, offset: int, data: bytes) -> int:
        """LimitReached when it would be larger than it may be."""
        self.check(offset + len(data))
        self._be_own()
        done = os.pwrite(self.fd, data, offset)
        self.size = max(self.size, offset + done)
        return done

    def truncate(self, size: int) -> None:
        self.check(size)
        if size or self.size:
            self._be_own()
            os.ftruncate(self.fd, size)
        self.size = size

    def keep(self) -> Kept:
        """What it is now. It is copied when it is written next."""
        if self._kept is None:
            self._kept = Kept(os.dup(self.fd), self.size)
        return self._kept

    def put(self, kept: Kept | None) -> None:
        """Be that; None is nothing."""
        if kept is self._kept and kept is not None:
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._kept, self.size = kept, 0
        if kept is not None:
            self._fd, self.size = os.dup(kept.fd), kept.size

    def _be_own(self) -> None:
        if self._kept is not None:
            kept = self._kept
            self.put(None)
            for at in range(0, kept.size, _STEP):
                os.pwrite(self.fd, os.pread(kept.fd, _STEP, at), at)
            self.size = kept.size

    def check(self, size: int) -> None:
        """LimitReached when it would be larger than it may be."""
        if size > self.limit:
            raise LimitReached(f"{self.name}: {size} bytes are more than the {self.limit} that it may have")

    def close(self) -> None:
        self._closed = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._kept = None


class Images:
    """`cmdline` is the text as it was written, without the newline at its end."""

    names = NAMES

    def __init__(self, limit: int = 1 << 31) -> None:
        self._images = {name: Image(name, limit) for name in NAMES}
        self.cmdline = ""

    def __getitem__(self, name: str) -> Image:
        return self._images[name]

    def there(self, name: str) -> bool:
        return self._images[name].size > 0

    def sizes(self) -> dict[str, int]:
        """Of those that are there."""
        return {name: image.size for name, image in self._images.items() if image.size}

    def keep(self) -> dict[str, Kept]:
        """Those that are there, as they are."""
        return {name: self._images[name].keep() for name in self.sizes()}

    def put(self, kept: Mapping[str, Kept]) -> None:
        for name, image in self._images.items():
            image.put(kept.get(name))

    @property
    def bootable(self) -> bool:
        """Whether there is anything to begin with."""
        return self.there("kernel") or self.there("bios")

    def close(self) -> None:
        for image in self._images.values():
            image.close()
