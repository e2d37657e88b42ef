"""ioctl(2) and mmap(2) with errors that name the call and the reason."""

import ctypes
import errno
import fcntl
import mmap
import os

from vmfs.engine.base import HostMemory
from vmfs.engine.kvm.abi import Ioctl
from vmfs.words.errors import EngineFailed, Invalid

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_NORESERVE = 0x4000  # Linux include/uapi/asm-generic/mman-common.h; the mmap module lacks it before 3.13


def ioctl(fd: int, request: Ioctl, argument: int | bytearray = 0) -> int:
    """What the ioctl returns; a bytearray is changed in place. Raises `EngineFailed`."""
    _check_open(fd, request)
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise EngineFailed(f"{request.name}: {os.strerror(error.errno)}") from error


def ioctl_set(fd: int, request: Ioctl, argument: int | bytes, hint: str = "") -> int:
    """An ioctl that sets what a user chose: EINVAL is `Invalid`, followed by a hint at what is wrong."""
    if not isinstance(argument, int):
        argument = bytearray(argument)  # fcntl.ioctl takes at most 1024 bytes that it cannot write to
    _check_open(fd, request)
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        sentence = f"{request.name}: {os.strerror(error.errno)}"
        if error.errno == errno.EINVAL:
            raise Invalid(f"{sentence}; {hint}" if hint else sentence) from error
        raise EngineFailed(sentence) from error


def _check_open(fd: int, request: Ioctl) -> None:
    if fd < 0:
        raise EngineFailed(f"{request.name}: the machine is closed")


def ioctl_long(fd: int, request: Ioctl, argument: int) -> None:
    """An ioctl with a number that fcntl.ioctl does not take, because it is above the greatest C int."""
    if _LIBC.ioctl(fd, request, argument) < 0:
        raise EngineFailed(f"{request.name}: {os.strerror(ctypes.get_errno())}")


class Mapping:
    """Pages of a file in this process, by their address alone; shared where they may be written (a file that is sealed
    has no other mapping before Linux 6.7).

    The mmap module would do, but wants a writable mapping to tell its address, and a second descriptor.
    """

    def __init__(self, fd: int, offset: int, size: int, *, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = (mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE) | _MAP_NORESERVE
        address = _LIBC.mmap(None, size, protection, flags, fd, offset)
        if address == _MAP_FAILED:
            raise EngineFailed(f"mmap of {size:#x} bytes of guest memory: {os.strerror(ctypes.get_errno())}")
        self.address: int = address
        self.size = size

    def close(self) -> None:
        if self.size:
            _LIBC.munmap(self.address, self.size)
            self.size = 0


class Borrowed:
    """The caller's memory, from an offset on; it is there for as long as this object is."""

    def __init__(self, memory: HostMemory, offset: int) -> None:
        self._memory = memory
        self.address = memory.address + offset

    def close(self) -> None:
        pass
