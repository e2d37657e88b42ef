"""Coverage: which jumps a guest has taken, as counts in a map of the size and layout that AFL's has."""

from __future__ import annotations

import fcntl
import mmap
import os

SIZE = 1 << 16


class CoverageMap:
    """A machine's, as memory with a descriptor: a byte is how often, modulo 256, jumps that fall on it were taken."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("vmfs-coverage", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, SIZE)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.view = mmap.mmap(self.fd, SIZE)

    def __del__(self) -> None:
        os.close(self.fd)

    def clear(self) -> None:
        self.view[:] = bytes(SIZE)
