"""What a fork is made of, until it has a process, and as long as it is there: memfds of the machine that was forked.

The server opens them anew by their numbers in that machine's process, and gives them to the fork's process, which looks
whether anybody can still change them. Forks of one snapshot share one Inheritance. Files of the host the server never
has: they go from process to process, by a socket whose ends it gives away (`MachineProcess.fork_from`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vmfs.host.theirs import open_memory
from vmfs.words.errors import ProcessFailed

MEMORY_MOST = 24  # memfds: of a description, of layers, a ROM and images


class Inheritance:
    """`fds` are this object's. `takes`: bytes of memory, by what the kernel knows each memfd by."""

    def __init__(self, pid: int, numbers: Sequence[int]) -> None:
        if not 2 <= len(numbers) <= MEMORY_MOST:
            raise ProcessFailed(f"the machine's process says that a fork has {len(numbers)} pieces of memory")
        self.fds: list[int] = []
        try:
            for number in numbers:
                self.fds.append(open_memory(pid, number))
        except BaseException:
            self._close()
            raise
        self.takes: dict[int, int] = {}
        for fd in self.fds:
            there = os.fstat(fd)
            self.takes[there.st_ino] = there.st_blocks * 512

    def _close(self, close: Callable[[int], None] = os.close) -> None:
        while self.fds:
            close(self.fds.pop())

    def __del__(self) -> None:
        self._close()
