"""What Python has no call for: fallocate(2) with flags."""

from __future__ import annotations

import ctypes
import os

# Linux include/uapi/linux/falloc.h
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). OSError with its errno."""
    while _LIBC.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != 4:  # EINTR
            raise OSError(code, os.strerror(code))


def can_punch(fd: int) -> bool:
    """Whether holes can be punched into a regular file: tried past its end, where nothing is."""
    try:
        end = os.fstat(fd).st_size
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, -(-end // 4096) * 4096, 4096)
    except OSError:
        return False
    return True


def punch(fd: int, offset: int, size: int) -> int:
    """Free the pages: they read as zeros. 0, or -1."""
    try:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, size)
    except OSError:
        return -1
    return 0
