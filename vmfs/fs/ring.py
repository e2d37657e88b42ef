"""Memory by which a machine hands on the stream of one open file, so that its server, and mostly the lane, answers the
reads (ring.c, vmfs/words/ring.h)."""

from __future__ import annotations

import fcntl
import os

from vmfs.fs.hooks import _fuse
from vmfs.host.process import MachineProcess
from vmfs.words import commands
from vmfs.words.errors import LimitReached, ProcessFailed

SIZE = 4096 + (2 << 20)  # RING_SIZE of vmfs/words/ring.h
COUNTED = 2 * SIZE  # with what the machine keeps of it until it was read
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # else an access of ours could be a SIGBUS


def sealed_memory(name: str, size: int) -> int:
    """A memfd that keeps its size."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Ring:
    """Counts against the limits of its machine, until it is closed. LimitReached where they do not let it."""

    def __init__(self, machine: MachineProcess) -> None:
        self._machine = machine
        self._memory = -1
        self.has_begun = False
        machine.host.share(machine, COUNTED)
        try:
            self._memory = sealed_memory("vmfs-ring", SIZE)
            self.opaque = _fuse.ring_map(self._memory)
        except OSError as error:
            self.close()
            raise LimitReached(f"there is no memory to read ahead into: {error.strerror}") from error

    def share(self, handle: int) -> bool:
        """Have the machine hand on what that file of its gives. False: that cannot be said now."""
        return self._machine.hand(commands.Share(handle), (self._memory,))

    def begin(self) -> None:
        """The machine says that there is something."""
        try:
            _fuse.ring_begin(self.opaque)
        except OSError:
            raise ProcessFailed("the machine's process hands on what cannot be") from None
        self.has_begun = True

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on, as many as there are, up to `size`."""
        return _fuse.ring_read(self.opaque, offset, size)

    def close(self) -> None:
        self.opaque = None
        if self._memory >= 0:
            os.close(self._memory)
        self._machine.host.share(self._machine, -COUNTED)
