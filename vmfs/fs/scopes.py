"""What files belong to: a machine, a device of one, or the mount."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

from vmfs.engine import EngineInfo
from vmfs.fs.connection import Connection
from vmfs.fs.forks import Fork, Writer
from vmfs.fs.hooks import status
from vmfs.fs.inodes import Scope
from vmfs.fs.kinds import call
from vmfs.fs.lane import MachineLane
from vmfs.fs.mapped import MemoryServer
from vmfs.fs.passthrough import Backing
from vmfs.host.machines import Host
from vmfs.host.process import MachineProcess, Watcher
from vmfs.words import commands
from vmfs.words.errors import Invalid, NotPermitted

# What a machine and a snapshot may be called, and what a machine may call a register or a device.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
NAMES_MOST = 4096  # in a directory that a machine fills


class RootScope(Scope):
    """The mount."""

    def __init__(
        self, host: Host, engines: tuple[EngineInfo, ...], connection: Connection | None = None
    ) -> None:
        super().__init__()
        self.host = host
        self.engines = engines
        self.connection = connection
        self.listing: Callable[[], str] = str  # of all machines, a line each


class MachineScope(Scope, Watcher):
    """One machine, and what the server keeps of it."""

    def __init__(self, machine: MachineProcess, connection: Connection | None) -> None:
        self.lane = MachineLane(machine)
        super().__init__()
        self.machine = machine
        self.modified_ns = time.time_ns()
        self.memory = MemoryServer(machine, connection)
        self._backings: dict[str, tuple[tuple[int, int], Backing, int]] = {}  # by the file's name
        self.fork: Fork = _no_fork
        machine.watcher = self

    def backing(self, name: str, fd: int) -> Backing:
        """How the file of that name is served. `fd` is its memory."""
        there = os.fstat(fd)
        identity = there.st_dev, there.st_ino
        if name not in self._backings or self._backings[name][0] != identity:
            self._close_backing(name)  # of a machine that it was before
            kept = os.dup(fd)
            self._backings[name] = identity, Backing(kept), kept
        return self._backings[name][1]

    def _close_backing(self, name: str) -> None:
        if name in self._backings:
            _, backing, fd = self._backings.pop(name)
            backing.close()
            os.close(fd)

    def facts(self) -> dict[str, object]:
        """What `stat` shows of the server's."""
        layers = self.machine.host.layers
        return {
            "memory_served_by": self.memory.way,
            "signals_noticed_by": "interrupt-message" if status().interrupts else "watch",
            **self.lane.facts(),
            "pid": self.machine.pid,
            "sandbox": ",".join(name for name, why in layers.items() if not why) or "none",
        }

    @property
    def modified_ns(self) -> int:  # type: ignore[override]
        return max(self._modified_ns, self.lane.written_ns)

    @modified_ns.setter
    def modified_ns(self, value: int) -> None:
        self._modified_ns = value

    def complain(self, sentence: str, about: object) -> None:
        super().complain(sentence, about)
        self.lane.leave(about)

    def succeeded(self, about: object) -> None:
        super().succeeded(about)
        if not self.complaint:
            self.lane.leave(None)

    def remove(self) -> None:
        super().remove()
        self.lane.close()
        self.memory.close()
        for name in list(self._backings):
            self._close_backing(name)

    # ---- what the machine says

    def woken(self, handle: int) -> None:
        self.wake(handle)

    def touch(self) -> None:
        self.modified_ns = time.time_ns()

    def complained(self, sentence: str) -> None:
        self.complain(sentence, "machine")

    def ending(self) -> None:
        self.lane.close()

    def ended(self) -> None:
        self.wake_all()

    async def invalidate(self, ranges: list[tuple[int, int]]) -> None:
        await self.memory.invalidate(ranges)


async def _no_fork(new: str, snapshot: str, writer: Writer) -> None:
    raise NotPermitted("fork: this machine is in no mount")


class PartScope(Scope):
    """A device or a CPU of a machine, with which it goes."""

    def __init__(self, machine: MachineScope) -> None:
        self._of = machine
        self.machine = machine.machine
        super().__init__()

    @property
    def removed(self) -> bool:  # type: ignore[override]
        return self._removed or self._of.removed

    @removed.setter
    def removed(self, value: bool) -> None:
        self._removed = value

    @property
    def modified_ns(self) -> int:  # type: ignore[override]
        return self._of.modified_ns

    @modified_ns.setter
    def modified_ns(self, value: int) -> None:
        if value:
            self._of.modified_ns = value

    def touch(self) -> None:
        self._of.touch()

    def complain(self, sentence: str, about: object) -> None:
        self._of.complain(sentence, about)

    def succeeded(self, about: object) -> None:
        self._of.succeeded(about)


def check_name(name: str, what: str = "a machine") -> None:
    """Invalid for what is no name for a machine or a snapshot."""
    if not _NAME.fullmatch(name):
        raise Invalid(f"{name[:80]!r} is no name for {what}: 1 to 64 of A-Z a-z 0-9 . _ -, no leading dot")


async def listed(machine: MachineProcess, directory: str) -> list[tuple[str, int]]:
    """What the machine says that there is, as far as it can be."""
    answer = await call(machine, lambda at: commands.List(at, directory), 0)
    return [(name, found) for name, found in answer.names[:NAMES_MOST] if _NAME.fullmatch(name)]
