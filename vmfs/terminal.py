"""A terminal on a machine's console: keys go in as they are, output comes as it is, and an escape key leads out."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator

from vmfs.errors import Invalid

ESCAPE = 0x1D  # Ctrl-]
_CHUNK = 4096


def parse_escape(text: str) -> int:
    """`^]` or one character, as the byte that a terminal sends."""
    if len(text) == 2 and text[0] == "^" and "?" <= text[1].upper() <= "_":
        return ord(text[1].upper()) ^ 0x40
    if len(text.encode()) == 1:
        return ord(text)
    raise Invalid(f"{text[:20]!r} is not a key: `^]` or one character")


def escape_name(byte: int) -> str:
    return f"Ctrl-{chr(byte ^ 0x40)}" if byte < 0x20 else chr(byte)


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """Every key as it is typed, where `fd` is a terminal; as before afterwards."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def attach(console: int, *, done: int | None = None, escape: int = ESCAPE) -> bool:
    """Join stdin and stdout to the descriptor of a `console` file, until the escape key, or `done` is readable and all
    output is there. Returns whether it was the escape key. At the end of stdin output goes on.

    Raises OSError where the console fails: ENODEV when the machine was removed.
    """
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    os.set_blocking(console, False)
    poll = select.poll()
    poll.register(console, select.POLLIN)
    poll.register(keyboard, select.POLLIN)
    if done is not None:
        poll.register(done, select.POLLIN)
    with raw(keyboard):
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if console in ready:
                with contextlib.suppress(BlockingIOError):
                    output = os.read(console, _CHUNK)
                    _write_all(screen, output)
                    if output:
                        continue  # all of it before anything else
                    if done is None:
                        return False  # the machine is shut down
            if keyboard in ready:
                keys = os.read(keyboard, _CHUNK)
                if not keys:
                    poll.unregister(keyboard)
                elif os.isatty(keyboard) and escape in keys:
                    _type(console, keys[: keys.index(escape)])
                    return True
                else:
                    _type(console, keys)
            if done is not None and done in ready:
                return False


def _type(console: int, keys: bytes) -> None:
    """Write all, and wait where the machine takes no more."""
    while keys:
        try:
            keys = keys[os.write(console, keys) :]
        except BlockingIOError:
            select.select([], [console], [])


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
