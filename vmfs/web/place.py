"""A mount, and the machines in it by their names, which come from a browser."""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from vmfs.client import Vm
from vmfs.commands import table
from vmfs.commands.top import Looks

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # what mkdir takes in a mount: docs/files.md


def checked(name: Any) -> str:
    """A name as machines and snapshots have it, so no path. OSError (EINVAL) for anything else."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise OSError(errno.EINVAL, "a name is 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-', and no dot first")
    return name


class Listing:
    """Whose turn it is to choose what `disasm` shows, and to read it."""

    def __init__(self) -> None:
        self.turn = threading.Lock()


class SeenVm(Vm):
    """A machine, as several pages look at it at the same time. `listing` is the same for all."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.listing = Listing()


class Place:
    """The mount at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._listings: WeakValueDictionary[str, Listing] = WeakValueDictionary()

    def machine(self, name: Any) -> Path:
        """Its directory. OSError (ENOENT) where there is none."""
        path = self.path / checked(name)
        if not path.is_dir():
            raise OSError(errno.ENOENT, f"there is no machine {name}")
        return path

    def open(self, name: Any) -> SeenVm:
        vm = SeenVm(self.machine(name))
        with self._lock:
            vm.listing = self._listings.setdefault(name, vm.listing)
        return vm


def peek(machine: str | Path, file: str, address: int, size: int) -> list[int | None]:
    """Bytes of `mem` or `virt`, None for those that are not there. The file is closed again: a machine whose `mem` is
    open can record no history, and its snapshots take long."""
    found: list[int | None] = []
    fd = os.open(os.path.join(machine, file), os.O_RDONLY)
    try:
        while len(found) < size:
            at = address + len(found)
            left = min(size - len(found), 4096 - at % 4096)
            try:
                data = os.pread(fd, left, offset(file, at))
            except OSError as failure:
                if failure.errno not in (errno.EFAULT, errno.EINVAL, errno.EOVERFLOW):
                    raise
                data = b""
            found += data or [None] * left
    finally:
        os.close(fd)
    return found[:size]


def poke(machine: str | Path, file: str, address: int, data: bytes) -> None:
    fd = os.open(os.path.join(machine, file), os.O_WRONLY)
    try:
        done = os.pwrite(fd, data, offset(file, address))
    finally:
        os.close(fd)
    if done != len(data):
        raise OSError(errno.EFAULT, f"{done} of {len(data)} bytes were stored: there is no memory after them")


def offset(file: str, address: int) -> int:
    """Of an address in `virt`, which has bit 63 cleared, or in `mem`."""
    return address & ~(1 << 63) if file == "virt" else min(address, (1 << 63) - 1)


def told(machine: Path, failure: OSError) -> OSError:
    """The failure, with the machine's own sentence where it has one."""
    try:
        reason = (machine / "error").read_text().strip()
    except OSError:
        reason = ""
    return OSError(failure.errno, reason or failure.strerror)


class Overview:
    """All machines, a row each, as `vmfs top` looks at them: one at rest costs nothing, and one that was never used is
    not asked."""

    def __init__(self, place: Place) -> None:
        self._looks = Looks(place.path)
        self.close = self._looks.close

    def look(self) -> list[dict[str, Any]]:
        found, new = self._looks.machines()
        rows = [
            {
                "name": one.name, "maker": table.user_name(one.uid), "state": one.asked.get("state", "-"),
                "engine": one.asked.get("engine"), "kind": one.asked.get("machine"), "cpus": one.asked.get("cpus"),
                "memory": table.number(one.asked, "memory_bytes"), "resident": one.resident, "cpu": round(one.cpu),
                "mips": round(one.mips, 1), "exits": round(one.exits),
            }
            for one in found
        ]  # fmt: skip
        rows += [{"name": one.name, "maker": table.user_name(one.uid), "state": "new"} for one in new]
        return sorted(rows, key=lambda row: row["name"])
