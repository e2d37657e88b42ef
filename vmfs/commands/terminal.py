"""A terminal on a machine's console: keys go in as they are, output comes as it is, and an escape key leads out."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence

from vmfs.words.errors import Invalid

ESCAPE = 0x1D  # Ctrl-]
ESCAPED = 4
"""The exit code of a command that the escape key has ended: even, as the code of no debug exit is (2N + 1)."""
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
    """Every key of the terminal `fd` as it is typed; as before afterwards."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def attach(
    console: int,
    *,
    news: int | None = None,
    hear: Callable[[], bool] = lambda: True,
    escape: int = ESCAPE,
    outputs: Sequence[int] = (1,),
) -> bool:
    """Join stdin and `outputs` to the descriptor of a `console` file, until the escape key, or `hear` says so: it is
    called when `news` is readable and all output is there, and returns whether that is the end. Returns whether it was
    the escape key. At the end of stdin output goes on.

    Raises OSError where the console fails: ENODEV when the machine was removed.
    """
    keyboard = sys.stdin.fileno() if sys.stdin is not None else None  # None at its end, too
    is_terminal = keyboard is not None and os.isatty(keyboard)
    os.set_blocking(console, False)
    typed = b""  # what the machine has not taken yet
    with raw(keyboard) if is_terminal else contextlib.nullcontext():
        while True:
            # While the machine takes nothing, output and the escape key go on; a file waits.
            poll = select.poll()
            poll.register(console, select.POLLIN | (select.POLLOUT if typed else 0))
            if keyboard is not None and (is_terminal or not typed):
                poll.register(keyboard, select.POLLIN)
            if news is not None:
                poll.register(news, select.POLLIN)
            ready = dict(poll.poll())
            output = b""
            if ready.get(console, 0) & ~select.POLLOUT:
                with contextlib.suppress(BlockingIOError):
                    output = os.read(console, _CHUNK)
                    for screen in outputs:
                        _write_all(screen, output)
                    if not output and news is None:
                        return False  # the machine is shut down
            if keyboard in ready:
                keys = os.read(keyboard, _CHUNK)
                if is_terminal and escape in keys:
                    _type(console, typed + keys[: keys.index(escape)])
                    return True
                typed += keys
                if not keys:
                    keyboard = None
            typed = _type(console, typed)
            if news in ready and not output and hear():  # all of it first
                return False


def _type(console: int, keys: bytes) -> bytes:
    """Write what the machine takes now; the rest."""
    with contextlib.suppress(BlockingIOError):
        while keys:
            keys = keys[os.write(console, keys) :]
    return keys


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
