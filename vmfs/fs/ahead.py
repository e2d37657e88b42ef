"""What a machine reads ahead of the reads of a stream: in memory that it shares with its server, so that the channel
carries a number where it carried the bytes."""

from __future__ import annotations

import os

from vmfs.words.commands import AHEAD_MOST
from vmfs.words.errors import ProcessFailed


class ReadAhead:
    """What a machine reads ahead for an open file: up to AHEAD_MOST bytes of it, from `start` on, in memory that the
    machine may change or take away at any time. Offsets in it are this side's alone, and sizes are checked once."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._start = self._end = self._read_to = 0

    def placed(self, offset: int, size: int) -> None:
        if not 0 <= size <= AHEAD_MOST:
            raise ProcessFailed("the machine's process says that it has read ahead what cannot be")
        self._start, self._end, self._read_to = offset, offset + size, offset

    def read(self, offset: int, size: int) -> bytes | None:
        """The bytes there. None: none of them were read ahead, and the caller asks the machine."""
        if not self._start <= offset < self._end:
            return None
        size = min(size, self._end - offset)
        data = os.pread(self._memory, size, offset - self._start)
        if len(data) < size:
            raise ProcessFailed("the machine's process has taken away what it had read ahead")
        self._read_to = max(self._read_to, offset + size)
        return data

    def begin(self) -> None:
        """The machine may write there from now on, and has what was read of it."""
        self._start = self._end = self._read_to = 0

    def was_passed(self, offset: int) -> None:
        """What comes after all of it was read: nobody wants the rest of it."""
        if offset >= self._end:
            self._read_to = self._end

    @property
    def unread(self) -> int:
        return self._end - self._read_to

    def close(self) -> None:
        os.close(self._memory)
