"""Rows of machines, for `vmfs ls` and `vmfs top`."""

from __future__ import annotations

import functools
import pwd
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vmfs.commands import machines


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


def facts(path: Path) -> dict[str, str]:
    """The lines of `stat`, which has `state`, `engine`, `machine` and `cpus` as well: one file is read of a machine. Of
    one that has failed there is its state; nothing where it may not be read, or is gone."""
    try:
        lines = (path / "stat").read_text().splitlines()
    except PermissionError:
        return {}
    except OSError:
        return _failed(path)
    return dict(line.split(" ", 1) for line in lines)


def _failed(path: Path) -> dict[str, str]:
    try:
        return {"state": (path / "state").read_text().strip()}
    except OSError:
        return {}


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
