"""Rows of machines, for `vmfs ls` and `vmfs top`."""

from __future__ import annotations

import pwd
from collections.abc import Iterable, Sequence
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


def word(path: Path, name: str) -> str:
    """A file of one word; `-` where it cannot be read, or the machine is gone."""
    try:
        return (path / name).read_text().strip() or "-"
    except OSError:
        return "-"


def facts(path: Path) -> dict[str, int]:
    """The numbers of `stat`; none where the machine is gone."""
    try:
        lines = (path / "stat").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


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
