"""A machine's RAM: one memfd that the engine maps and the `mem` file is."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

from vmfs.memory.hostfile import punch
from vmfs.words.errors import Busy, EngineFailed, Gone, Invalid, PastEnd

PAGE = 4096
DEFAULT_SIZE = 128 << 20
# Below the flash, the APICs and the pages that KVM takes on Intel hosts, all of which live under 4 GiB.
# More RAM needs a hole there, which is a PC's memory map and not that of a bare machine.
MAXIMUM_SIZE = 0xE000_0000


def check_size(size: int) -> None:
    """Raises Invalid where a machine cannot have `size` bytes of RAM."""
    if size <= 0 or size % PAGE or size > MAXIMUM_SIZE:
        raise Invalid(f"RAM cannot have {size} bytes: a multiple of {PAGE} up to {MAXIMUM_SIZE}")


class Memory:
    """`size` bytes of guest-physical RAM from address 0 on; pages cost nothing until they are touched.

    `fd` is the memfd. Clients hold mappings of it that this object knows nothing of; it stays valid
    until `close`, which gives the pages back at once, whoever still maps them (they read zeros then).
    """

    def __init__(self, size: int = DEFAULT_SIZE) -> None:
        check_size(size)
        self.fd = os.memfd_create("vmfs-mem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = size
        self._sealed = False
        self._closed = False
        os.ftruncate(self.fd, size)

    def __len__(self) -> int:
        return self.size

    def resize(self, size: int) -> None:
        """Before `seal` only, else Busy. What is cut off is lost, what is added is zero."""
        self._check_open()
        if self._sealed and size != self.size:
            raise Busy("the machine has run: the size of its RAM is fixed")
        check_size(size)
        os.ftruncate(self.fd, size)
        self.size = size

    def seal(self) -> None:
        """Fix the size: from now on no holder of the descriptor can shrink RAM under the guest."""
        if not self._sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._sealed = True

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end, none past it."""
        self._check_open()
        return os.pread(self.fd, length, offset)

    def write(self, offset: int, data: bytes) -> int:
        """How many bytes were written: all that fit. PastEnd when none does."""
        self._check_open()
        room = self.size - offset
        if room <= 0 and data:
            raise PastEnd(f"mem: {offset:#x} is past the end of RAM, {self.size:#x}")
        done = 0
        view = memoryview(data)[:room]
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], offset + done)
        return done

    def clear(self, offset: int, length: int) -> None:
        """Set bytes to zero; whole pages are given back instead of written."""
        self._check_open()
        first, last = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
        if first < last:
            self.write(offset, bytes(first - offset))
            if punch(self.fd, first, last - first):
                raise EngineFailed(f"mem: fallocate does not clear {last - first} bytes at {first:#x}")
            self.write(last, bytes(offset + length - last))
        else:
            self.write(offset, bytes(length))

    def view(self) -> MemoryView:
        """For a thread that reads RAM for a while: it may outlive this object."""
        self._check_open()
        return MemoryView(os.dup(self.fd), self.size)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            punch(self.fd, 0, self.size)  # where it fails the last unmap frees them
            os.close(self.fd)

    def _check_open(self) -> None:
        if self._closed:
            raise Gone("the machine was removed")


class MemoryView:
    """RAM, to be read through a descriptor of its own: `with memory.view() as ram`. Zeros once it is closed."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    def __enter__(self) -> MemoryView:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end, none past it."""
        return os.pread(self.fd, length, offset) if offset < self.size else b""

    def extents(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of what was ever touched; between them are zeros that take no memory."""
        end = 0
        while end < self.size:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return
                raise
            end = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield start, end
