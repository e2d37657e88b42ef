"""A machine's RAM: one memfd that the engine maps and the `mem` file is."""

from __future__ import annotations

import fcntl
import os

from vmfs.errors import Busy, Gone, Invalid, PastEnd

PAGE = 4096
DEFAULT_SIZE = 128 << 20
# Below the flash, the APICs and the pages that KVM takes on Intel hosts, all of which live under 4 GiB.
# More RAM needs a hole there, which is a PC's memory map and not that of a bare machine.
MAXIMUM_SIZE = 0xE000_0000

# Linux include/uapi/linux/falloc.h: give the pages back, keep the size.
_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01


def check_size(size: int) -> None:
    """Raises Invalid where a machine cannot have `size` bytes of RAM."""
    if size <= 0 or size % PAGE or size > MAXIMUM_SIZE:
        raise Invalid(f"mem_size: {size} is not a multiple of {PAGE} from {PAGE} to {MAXIMUM_SIZE}")


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
            raise Busy("mem_size: the machine has run; its size is fixed")
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

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            _punch(self.fd, self.size)
            os.close(self.fd)

    def _check_open(self) -> None:
        if self._closed:
            raise Gone("the machine was removed")


def _punch(fd: int, size: int) -> None:
    """Free the pages. Python has no fallocate with flags."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, 0, size)  # where it fails the last unmap frees them
