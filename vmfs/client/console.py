"""A machine's console: what the guest says, and what is typed."""

from __future__ import annotations

import codecs
import errno
import os
import re
import select
import time
from collections.abc import Callable

DEFAULT_TIMEOUT = 60.0
_CHUNK = 1 << 16


class Console:
    """A stream of the guest's, as expect(1) has one. `said` is all that has come since it was opened.

    What the guest sends is taken as UTF-8; other bytes become U+FFFD. Not for several threads at the same time.
    """

    def __init__(self, open_file: Callable[[int], int]) -> None:
        """`open_file(flags)` opens the stream; its owner closes the descriptor."""
        self._fd = open_file(os.O_RDWR | os.O_NONBLOCK)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.said = ""
        self._expected = 0  # so much of it was expected, or read

    def send(self, text: str | bytes, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Type. TimeoutError where the guest does not take it in time; what it has taken stays typed."""
        view = memoryview(text.encode() if isinstance(text, str) else text)
        end = time.monotonic() + timeout
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                if not self._ready(select.POLLOUT, end - time.monotonic()):
                    raise TimeoutError(f"the guest has not taken {len(view)} of the bytes typed") from None

    def send_line(self, line: str = "", *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Type a line and enter."""
        self.send(line + "\n", timeout=timeout)

    def expect(self, pattern: str | re.Pattern[str], timeout: float = DEFAULT_TIMEOUT) -> re.Match[str]:
        """Wait until the guest says what `pattern` matches, after what was expected before; the match.

        TimeoutError when it does not come within `timeout` seconds, EOFError when the machine is off before; both say
        what came last.
        """
        compiled = re.compile(pattern)
        end = time.monotonic() + timeout
        while (match := compiled.search(self.said, self._expected)) is None:
            if not self._take(end - time.monotonic()):
                raise TimeoutError(f"{compiled.pattern!r} did not come within {timeout:g} s after:\n{self.tail()}")
        self._expected = match.end()
        return match

    def read(self, timeout: float = 0) -> str:
        """What has come since the last `expect` or `read`, after waiting for some of it; '' when nothing has come."""
        if self._expected == len(self.said):
            self._take_all(timeout)
        text, self._expected = self.said[self._expected :], len(self.said)
        return text

    def command(self, line: str, prompt: str | re.Pattern[str] = r"[#$] \Z", timeout: float = DEFAULT_TIMEOUT) -> str:
        """Type a line at a shell; what it prints until the prompt comes again. No echo, and lines end in \\n."""
        began = len(self.said)
        self._expected = began
        self.send_line(line, timeout=timeout)
        self.expect(re.escape(line) + r"\r?\n", timeout)
        start = self._expected
        match = self.expect(prompt, timeout)
        printed = self.said[start : match.start()].replace("\r\n", "\n")
        return printed[: printed.rfind("\n") + 1]

    def tail(self, lines: int = 20) -> str:
        """The last lines of what has come."""
        self._take_all(0)
        return "\n".join(self.said.replace("\r\n", "\n").splitlines()[-lines:])

    def fileno(self) -> int:
        """For poll()."""
        return self._fd

    def _take_all(self, timeout: float) -> None:
        try:
            while self._take(timeout):
                timeout = 0
        except EOFError:
            pass

    def _take(self, timeout: float) -> bool:
        """Wait for more of it; whether some came. EOFError when the machine is off and all was read."""
        if not self._ready(select.POLLIN, timeout):
            return False
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return True
        except OSError as failure:
            if failure.errno != errno.ENODEV:
                raise
            data = b""
        if not data:
            raise EOFError(f"the machine is off; it said at last:\n{self._last_lines()}")
        self.said += self._decoder.decode(data)
        return True

    def _last_lines(self) -> str:
        return "\n".join(self.said.replace("\r\n", "\n").splitlines()[-20:])

    def _ready(self, what: int, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, what)
        return bool(poll.poll(max(timeout, 0) * 1000))
