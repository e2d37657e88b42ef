"""What a machine boots: the files `kernel`, `initrd`, `bios` and the text of `cmdline`."""

from __future__ import annotations

import os

from vmfs.words.errors import Gone, LimitReached

NAMES = ("kernel", "initrd", "bios")


class Image:
    """A file in memory, which costs nothing while it is empty. `limit` bytes at most."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.size = 0
        self._fd = -1
        self._closed = False

    @property
    def fd(self) -> int:
        """Of a memfd; made by the first use."""
        if self._closed:
            raise Gone("the machine was removed")
        if self._fd < 0:
            self._fd = os.memfd_create(f"vmfs-{self.name}", os.MFD_CLOEXEC)
        return self._fd

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset) if self.size else b""

    def write(self, offset: int, data: bytes) -> int:
        """LimitReached when it would be larger than it may be."""
        self.check(offset + len(data))
        done = os.pwrite(self.fd, data, offset)
        self.size = max(self.size, offset + done)
        return done

    def truncate(self, size: int) -> None:
        self.check(size)
        if size or self.size:
            os.ftruncate(self.fd, size)
        self.size = size

    def check(self, size: int) -> None:
        """LimitReached when it would be larger than it may be."""
        if size > self.limit:
            raise LimitReached(f"{self.name}: {size} bytes are more than the {self.limit} that it may have")

    def close(self) -> None:
        self._closed = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Images:
    """`cmdline` is the text as it was written, without the newline at its end."""

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

    @property
    def bootable(self) -> bool:
        """Whether there is anything to begin with."""
        return self.there("kernel") or self.there("bios")

    def close(self) -> None:
        for image in self._images.values():
            image.close()
