"""ATTACHABLE: what a user attaches to a PC, a row a kind, by a line such as `blk /srv/disk.img rw`.

The words after the kind are the row's arguments; a path with spaces is quoted as in a shell. Every device goes into
a free slot of the PCI bus, before the first run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmfs.devices.machine import Pc
from vmfs.devices.pci import PciDevice
from vmfs.errors import Invalid

if TYPE_CHECKING:
    from vmfs.vm import Vm

Opener = Callable[[str, int], int]  # path, flags -> descriptor, with the rights of who asks


@dataclass(frozen=True, slots=True)
class Request:
    """A line, with what it takes to fulfil it: `open` opens paths as the writer, whose credentials are `who`."""

    board: Pc
    name: str
    slot: int
    words: list[str]
    open: Opener
    who: Any


@dataclass(frozen=True, slots=True)
class Row:
    """`usage` without the kind; `least` and `most` words; `make` gives the device, not plugged in."""

    usage: str
    least: int
    most: int
    make: Callable[[Request], PciDevice]


ATTACHABLE: Mapping[str, Row] = {}


def attach(vm: Vm, text: str, open_: Opener, who: Any) -> None:
    """Do what a line says. Busy after the first run; Invalid for what does not parse."""
    if len(text.splitlines()) != 1:
        raise Invalid("dev/add takes one line: " + usages())
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Invalid(f"dev/add: {error}") from None
    if not words or words[0] not in ATTACHABLE:
        raise Invalid(f"dev/add: there is no {(words or [''])[0][:40]!r}: " + usages())
    kind, arguments = words[0], words[1:]
    row = ATTACHABLE[kind]
    if not row.least <= len(arguments) <= row.most:
        raise Invalid(f"dev/add: it is `{kind} {row.usage}`")

    def make(board: Pc) -> PciDevice:
        number = 0
        while f"{kind}{number}" in board.devices:
            number += 1
        return row.make(Request(board, f"{kind}{number}", board.pci.free_slot(), arguments, open_, who))

    vm.attach(make)


def usages() -> str:
    return ", ".join(f"`{kind} {row.usage}`".replace(" `", "`") for kind, row in ATTACHABLE.items())


def close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass
