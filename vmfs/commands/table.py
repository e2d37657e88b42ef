"""Rows of machines, for `vmfs ls` and `vmfs top`."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vmfs.commands import machines

_STAT_MOST = 1 << 16  # bytes


class Entry(NamedTuple):
    """A line of the mount's `machines`."""

    name: str
    uid: int
    pid: int  # of its process, 0: it has none


def listing(directory: Path) -> list[Entry]:
    found = []
    for line in machines.read(directory, "machines").splitlines():
        name, *words = line.split()
        values = dict(word.split("=", 1) for word in words)
        found.append(Entry(name, int(values["uid"]), int(values["pid"])))
    return sorted(found)


class Facts:
    """The lines of `stat`, which has `state`, `engine`, `machine` and `cpus` as well: one file is read of a machine.
    `keep` its descriptor for the next time: to open it and ask for its size costs several times what a read does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def read(self, *, keep: bool = False) -> dict[str, str]:
        """Of a machine that has failed there is its state; nothing where it may not be read, or is gone."""
        try:
            if self._fd < 0:
                self._fd = os.open(self.path / "stat", os.O_RDONLY)
            text = os.pread(self._fd, _STAT_MOST, 0).decode()
        except PermissionError:
            return {}
        except OSError:
            self.close()
            return self._failed()
        finally:
            if not keep:
                self.close()
        return dict(line.split(" ", 1) for line in text.splitlines())

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # ENODEV of a machine that is gone: it is closed all the same
                os.close(fd)

    def _failed(self) -> dict[str, str]:
        try:
            return {"state": (self.path / "state").read_text().strip()}
        except OSError:
            return {}


def facts(path: Path) -> dict[str, str]:
    """`Facts`, once."""
    return Facts(path).read()


def number(facts: Mapping[str, str], key: str) -> int:
    return int(facts.get(key, 0))


@functools.cache
def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def size(count: int) -> str:
    """512M"""
    for letter, unit in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)


def lines_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as what is in them."""
    whole = [head, *rows]
    widths = [max(len(row[column]) for row in whole) for column in range(len(head))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in whole]


def show(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("\n".join(lines_of(head, rows)))
