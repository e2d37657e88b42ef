"""Capture: frames, as they pass a card, in a pcap file.

Source: draft-ietf-opsawg-pcap (the format, with nanoseconds), LINKTYPE_ETHERNET.
"""

from __future__ import annotations

import os
import struct

from vmfs.words.errors import Invalid

_HEAD = struct.pack("<IHHiIII", 0xA1B2_3C4D, 2, 4, 0, 0, 1 << 18, 1)
_RECORD = struct.Struct("<IIII")
_SECOND = 1_000_000_000


class Capture:
    """In the file of descriptor `fd`, which is closed with it; `path` is what it is called. A file that the host writes
    no more to (it is full) gets nothing from then on, and ends with a whole frame."""

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd
        self._size = 0  # of what is whole
        self._last = 0  # date, before which nothing passes: two threads see a time that is some ms apart
        self.failure = ""
        if not self._write(_HEAD):
            os.close(fd)
            raise Invalid(f"{path}: no pcap file can be there: {self.failure}")

    def note(self, date: int, frame: bytes) -> bool:
        """A frame passes at `date`, in nanoseconds since 1970. False where it is not kept."""
        if self.failure:
            return False
        self._last = max(date, self._last)
        seconds, rest = divmod(self._last, _SECOND)
        return self._write(_RECORD.pack(seconds & 0xFFFF_FFFF, rest, len(frame), len(frame)) + frame)

    def _write(self, data: bytes) -> bool:
        try:
            done = os.pwrite(self._fd, data, self._size)
            if done == len(data):
                self._size += done
                return True
            self.failure = "no room for a whole frame"
        except OSError as error:
            self.failure = os.strerror(error.errno or 5)
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            pass
        return False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
