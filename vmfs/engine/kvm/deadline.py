"""Deadline: a thread that kicks a machine's CPUs when the guest's clock has come to a time.

KVM has no timer that ends KVM_RUN, and a CPU that halts does so in the kernel. A machine has at most one such thread,
begun by the first deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Deadline:
    """`clock` is the guest's time in nanoseconds, which passes as the host's does; `kick` is called in the thread."""

    def __init__(self, clock: Callable[[], int], kick: Callable[[], None]) -> None:
        self._clock = clock
        self._kick = kick
        self._changed = threading.Condition()
        self._when: int | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def set(self, when: int | None) -> None:
        """Kick at `when`, once, and at no other time."""
        with self._changed:
            sooner = when is not None and (self._when is None or when < self._when)
            self._when = when
            if self._thread is None and when is not None and not self._closed:
                self._thread = threading.Thread(target=self._wait, name="vmfs-deadline", daemon=True)
                self._thread.start()
            elif sooner:  # else the thread looks by itself when it wakes up
                self._changed.notify()

    @property
    def when(self) -> int | None:
        return self._when

    def close(self) -> None:
        """The thread has ended when this returns."""
        with self._changed:
            self._closed = True
            self._when = None
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _wait(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._when is None else (self._when - self._clock()) / 1e9
                if left is not None and left <= 0:
                    self._when = None
                    self._kick()
                else:
                    self._changed.wait(left)
