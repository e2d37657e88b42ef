"""What a port has sent: the end of it, kept for readers that come later."""

from __future__ import annotations

import threading

LOG_SIZE = 1 << 20


class Sent:
    """The last bytes that were appended: all of up to `size`, and of more between `size` and twice as many.

    When it would be longer, it is cut to `size`, all at once: somebody who reads on at its end sees it grow, and now
    and then become shorter, as a log file that is rotated. From any thread.
    """

    def __init__(self, size: int = LOG_SIZE) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes)

    def append(self, data: bytes) -> None:
        with self._lock:
            self._bytes += data
            if len(self._bytes) > 2 * self._size:
                del self._bytes[: -self._size]

    def save(self) -> bytes:
        with self._lock:
            return bytes(self._bytes)

    def load(self, data: bytes) -> None:
        """Have these in place of those that were appended."""
        with self._lock:
            self._bytes = bytearray(data)

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            return bytes(self._bytes[offset : offset + length])
