"""A machine's memory in this process: one range of addresses, for as long as anybody has a view of it.

The engine, the devices and this program use the same range. So it comes over another file, or becomes private, piece by
piece, also while the guest runs: mmap(2) with MAP_FIXED puts one piece in another's place at once.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from vmfs.words.errors import EngineFailed

PAGE = 4096
_PROT_NONE = 0
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux include/uapi/asm-generic/mman-common.h
_MADV_DONTNEED = 4
_FAILED = ctypes.c_void_p(-1).value

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC_HELD = ctypes.PyDLL(None, use_errno=True)  # calls of it keep the GIL: to get it back takes longer than they do
_SHORT = 1 << 20  # bytes
for _one in _LIBC, _LIBC_HELD:
    _one.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    found = _LIBC.mmap(address, size, protection, flags | _MAP_NORESERVE, fd, offset)
    if found == _FAILED:
        raise EngineFailed(f"mmap of {size:#x} bytes of guest memory: {os.strerror(ctypes.get_errno())}")
    return int(found)


class _Range:
    """Addresses, between two pages that nobody may touch: an access beside them ends the process at once."""

    def __init__(self, size: int) -> None:
        self._size = size + 2 * PAGE
        self._start = 0
        self._start = _mmap(None, self._size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.address = self._start + PAGE

    def __del__(self, munmap: object = _LIBC.munmap) -> None:
        if self._start:
            munmap(self._start, self._size)  # type: ignore[operator]


class Mapping:
    """`size` bytes of the file of a descriptor, shared, or private. Unmapped with the last of this object and its
    views."""

    def __init__(self, fd: int, size: int, *, private: bool = False) -> None:
        self.size = size
        self._range = _Range(size)
        self.address = self._range.address
        (self.own if private else self.share)(fd, 0, size)
        room = (ctypes.c_ubyte * size).from_address(self.address)
        room.range = self._range  # type: ignore[attr-defined]  # a view outlives this object
        self.view = memoryview(room).cast("B")

    def share(self, fd: int, offset: int, size: int) -> None:
        """Have those pages of the file here, shared."""
        self._put(mmap.MAP_SHARED, fd, offset, size)

    def own(self, fd: int, offset: int, size: int) -> None:
        """Have those pages of the file here, private: what is written is this mapping's alone."""
        self._put(mmap.MAP_PRIVATE, fd, offset, size)

    def _put(self, flags: int, fd: int, offset: int, size: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        _mmap(self.address + offset, size, protection, flags | _MAP_FIXED, fd, offset)

    def drop(self, offset: int, size: int) -> None:
        """Private pages are the file's again."""
        libc = _LIBC_HELD if size <= _SHORT else _LIBC
        if libc.madvise(self.address + offset, size, _MADV_DONTNEED):
            raise EngineFailed(f"madvise of {size:#x} bytes of guest memory: {os.strerror(ctypes.get_errno())}")
