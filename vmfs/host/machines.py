"""Host: all machines of a mount, and the limits they share."""

from __future__ import annotations

import os
import sys
from collections import Counter
from socket import socket

from vmfs.engine.base import Engine
from vmfs.host import opener
from vmfs.host.credentials import Credentials
from vmfs.host.process import MachineProcess
from vmfs.host.zygote import Job, Zygote
from vmfs.machine.memory import DEFAULT_SIZE
from vmfs.words.errors import LimitReached, WouldBlock

# Calls of one user that wait at a time; the mount has room for five times as many (vmfs.fs.MAX_TASKS).
BLOCKED_MOST = 2000


class Host:
    """Makes and ends machines. `max_memory` (bytes) bounds the sum of their RAM, touched or not, and of what else is
    kept for them. `own_device` is the mount's st_dev, once it is there."""

    def __init__(self, zygote: Zygote, engine: Engine | str, *, max_vms: int, max_memory: int) -> None:
        self.engine = engine if isinstance(engine, str) else engine.name  # of new machines
        self.max_vms = max_vms
        self.max_memory = max_memory
        self.own_device = 0
        # (st_size, st_blocks) of each file of a machine that was only made, by its path: taken of the first that is
        # born.
        self.fresh_sizes: dict[str, tuple[int, int]] | None = None
        self.measured: tuple[str, ...] = ()  # the files that have sizes
        self._zygote = zygote
        self._machines: set[MachineProcess] = set()
        self._blocked: Counter[int] = Counter()

    @property
    def machines(self) -> frozenset[MachineProcess]:
        return frozenset(self._machines)

    @property
    def layers(self) -> dict[str, str]:
        """What of the sandbox holds here: each layer, and why it does not."""
        return self._zygote.layers

    def create(self, owner: Credentials, memory_size: int = DEFAULT_SIZE) -> MachineProcess:
        """A new machine of that user; LimitReached when the mount has no room for it."""
        if len(self._machines) >= self.max_vms:
            raise LimitReached(f"the mount's limit of {self.max_vms} machines is reached (--max-vms)")
        self._check_memory(memory_size)
        machine = MachineProcess(self, owner, self.engine, memory_size)
        self._machines.add(machine)
        return machine

    def reserve(self, machine: MachineProcess, what: str, size: int) -> None:
        """Count more (or, below zero, less) memory of a machine: `mem` is RAM, all else what is kept beside it."""
        self._check_memory(size)
        if what == "mem":
            machine.memory_size = max(machine.memory_size + size, 0)
        else:
            machine.reserved = max(machine.reserved + size, 0)

    def capacity(self) -> tuple[int, int, int, int]:
        """RAM and how much of it is unpromised, in bytes; machines and how many more (0, 0: any number)."""
        memory = min(self.max_memory, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        names = self.max_vms if self.max_vms < sys.maxsize else 0
        return memory, max(memory - self._used(), 0), names, max(names - len(self._machines), 0)

    def forget(self, machine: MachineProcess) -> None:
        """The machine no longer counts; `MachineProcess.remove` is the caller's to call."""
        self._machines.discard(machine)

    def _used(self) -> int:
        return sum(machine.memory_size + machine.reserved for machine in self._machines)

    def _check_memory(self, more: int) -> None:
        used = self._used()
        if more > 0 and used + more > self.max_memory:
            raise LimitReached(
                f"{more} bytes more than the {used} in use pass the mount's {self.max_memory} (--max-mem)"
            )

    # ---- calls that wait

    def begin_call(self, uid: int) -> None:
        """A call of that user waits now. WouldBlock where as many do as may: others shall be served, too."""
        if self._blocked[uid] >= BLOCKED_MOST:
            raise WouldBlock(f"{BLOCKED_MOST} calls of the user {uid} wait already")
        self._blocked[uid] += 1

    def end_call(self, uid: int) -> None:
        self._blocked[uid] -= 1
        if not self._blocked[uid]:
            del self._blocked[uid]

    # ---- for machines

    def spawn(self, machine: MachineProcess, channel: socket) -> Job:
        return self._zygote.machine(machine.owner, machine.engine, machine.memory_size, channel)

    def open(self, who: Credentials, work: opener.Work, answer: socket) -> Job:
        return self._zygote.opener(who, work, answer)

    def kill(self, job: Job) -> None:
        self._zygote.kill(job)

    async def is_born(self, machine: MachineProcess) -> None:
        """Its process is there, and it is as it was made."""
        if self.fresh_sizes is None and self.measured:
            self.fresh_sizes, _ = await machine.measure(self.measured)
