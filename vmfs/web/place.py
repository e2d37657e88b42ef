"""A mount, and the machines in it by their names, which come from a browser."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path
from typing import Any

from vmfs.client import Vm
from vmfs.commands import table

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # what mkdir takes in a mount: docs/files.md
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ASK_NEW = 50  # machines that are asked for the first time in one look


def checked(name: Any) -> str:
    """A name as machines and snapshots have it, so no path. OSError (EINVAL) for anything else."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise OSError(errno.EINVAL, "a name is 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-', and no dot first")
    return name


class Place:
    """The mount at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def machine(self, name: Any) -> Path:
        """Its directory. OSError (ENOENT) where there is none."""
        path = self.path / checked(name)
        if not path.is_dir():
            raise OSError(errno.ENOENT, f"there is no machine {name}")
        return path

    def open(self, name: Any) -> Vm:
        return Vm(self.machine(name))


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


class Overview:
    """All machines, a row each. A machine is asked when its process has used processor time since the last look: one at
    rest costs nothing, and one that was never used stays so."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._seen: dict[tuple[str, int], dict[str, Any]] = {}

    def look(self) -> list[dict[str, Any]]:
        before, self._seen = self._seen, {}
        rows, room = [], _ASK_NEW
        for entry in table.listing(self._place.path):
            key = entry.name, entry.pid
            seen = before.get(key) or {"ticks": -1, "row": {"state": "-" if entry.pid else "new"}}
            self._seen[key] = seen
            if entry.pid:
                room -= seen["ticks"] < 0
                if seen["ticks"] >= 0 or room >= 0:
                    self._update(entry, seen)
            rows.append({"name": entry.name, "maker": table.user_name(entry.uid), **seen["row"]})
        return rows

    def _update(self, entry: table.Entry, seen: dict[str, Any]) -> None:
        ticks, resident = _used(entry.pid)
        now, row = time.monotonic(), seen["row"]
        if ticks == seen["ticks"]:
            row.update(cpu=0, mips=0, exits=0, resident=resident)
            seen["at"] = now
            return
        path = self._place.path / entry.name
        if not os.access(path / "stat", os.R_OK):  # another user's
            seen["ticks"] = ticks
            return
        facts = table.facts(path)
        row.update(
            state=table.word(path, "state"), engine=table.word(path, "engine"), kind=table.word(path, "machine"),
            cpus=table.word(path, "cpus"), memory=facts.get("memory_bytes", 0), resident=resident,
            cpu=0, mips=0, exits=0,
        )  # fmt: skip
        if seen["ticks"] >= 0:
            past, old = max(now - seen["at"], 1e-9), seen["facts"]
            row["cpu"] = round((ticks - seen["ticks"]) / _TICK / past * 100)
            done = facts.get("instructions", 0) - old.get("instructions", 0)
            row["mips"] = round(max(done, 0) / past / 1e6, 1)
            row["exits"] = round(max(exits_of(facts) - exits_of(old), 0) / past)
        # What it has used to answer is no reason to ask it again.
        seen.update(ticks=_used(entry.pid)[0], facts=facts, at=now)


def exits_of(facts: dict[str, int]) -> int:
    return sum(value for key, value in facts.items() if key.startswith("exits."))


def _used(pid: int) -> tuple[int, int]:
    """Ticks of processor time, and bytes of resident memory, of a process; none of one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0
    return int(fields[11]) + int(fields[12]), int(fields[21]) * _PAGE  # utime, stime, rss: proc_pid_stat(5)
