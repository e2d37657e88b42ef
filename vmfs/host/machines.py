"""Host: all machines of a mount, and the limits they share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from socket import socket

import trio

from vmfs.engine.base import Engine
from vmfs.host import opener
from vmfs.host.credentials import Credentials
from vmfs.host.inheritance import Inheritance
from vmfs.host.process import MachineProcess
from vmfs.host.settings import NO_LIMIT, MountSettings
from vmfs.host.template import Template
from vmfs.host.wires import Wires
from vmfs.host.zygote import Job, Zygote
from vmfs.memory.ram import DEFAULT_SIZE
from vmfs.words.commands import Become, Channel, ChannelBroken, ToServer
from vmfs.words.errors import Busy, LimitReached, ProcessFailed, WouldBlock

# Calls that wait at a time, of all users. The mount has room for more (vmfs.fs.MAX_TASKS), so that interrupts are heard
# and an unmount is.
WAITING_MOST = 8000
LIMITS = ("max_vms", "max_memory", "max_vms_user", "max_memory_user", "max_waiting_user")  # 0: there is none


class Host:
    """Makes and ends machines, within the limits of `settings`. Of memory, RAM counts, touched or not, and what else is
    kept for a machine. `own_device` is the mount's st_dev, once it is there."""

    def __init__(
        self, zygote: Zygote, engine: Engine | str, settings: MountSettings, engines: tuple[str, ...] = ()
    ) -> None:
        self.engines = engines  # their names
        self.engine = engine if isinstance(engine, str) else engine.name  # of new machines
        self._settings = dataclasses.replace(settings, **{name: getattr(settings, name) or NO_LIMIT for name in LIMITS})
        self.own_device = 0
        # (st_size, st_blocks) of each file of a machine that was only made, by its path: taken of the first that is
        # born.
        self.fresh_sizes: dict[str, tuple[int, int]] | None = None
        self.measured: tuple[str, ...] = ()  # the files that have sizes
        self._learning = trio.Lock()
        self._zygote = zygote
        self._machines: set[MachineProcess] = set()
        self.wires = Wires(self.open)
        self._blocked: Counter[int] = Counter()
        self._templates: dict[tuple[Inheritance, Credentials], Template] = {}

    @property
    def machines(self) -> frozenset[MachineProcess]:
        return frozenset(self._machines)

    @property
    def layers(self) -> dict[str, str]:
        """What of the sandbox holds here: each layer, and why it does not."""
        return self._zygote.layers

    def create(
        self,
        owner: Credentials,
        memory_size: int = DEFAULT_SIZE,
        engine: str = "",
        inheritance: Inheritance | None = None,
    ) -> MachineProcess:
        """A new machine of that user, perhaps a fork; LimitReached when the mount has no room for it."""
        limits = self._settings
        if len(self._machines) >= limits.max_vms:
            raise LimitReached(f"the mount's limit of {limits.max_vms} machines is reached (--max-vms)")
        if sum(machine.owner.uid == owner.uid for machine in self._machines) >= limits.max_vms_user:
            raise LimitReached(f"the limit of {limits.max_vms_user} machines a user is reached (--max-vms-user)")
        self._check_memory(owner.uid, memory_size, inheritance)
        machine = MachineProcess(self, owner, engine or self.engine, memory_size, inheritance)
        self._machines.add(machine)
        return machine

    def known_engine(self, name: str) -> str:
        """ProcessFailed for what is none: a machine has said so."""
        if name not in self.engines:
            raise ProcessFailed("the machine's process names an engine that there is not")
        return name

    def reserve(self, machine: MachineProcess, what: str, size: int) -> None:
        """Count more (or, below zero, less) memory of a machine: `mem` is RAM, all else what is kept beside it."""
        if what == "mem" and machine.inheritance is not None:
            raise Busy("the size of a fork's RAM is fixed")
        self._check_memory(machine.owner.uid, size)
        if what == "mem":  # never less than there is
            there = os.fstat(machine.memory_fd).st_size if machine.memory_fd >= 0 else 0
            machine.memory_size = max(machine.memory_size + size, there)
        else:
            machine.reserved = max(machine.reserved + size, 0)

    def share(self, machine: MachineProcess, size: int) -> None:
        """Count more (or, below zero, less) memory that the server itself makes for a machine."""
        self._check_memory(machine.owner.uid, size)
        machine.shared += size

    def capacity(self) -> tuple[int, int, int, int]:
        """RAM and how much of it is unpromised, in bytes; machines and how many more (0, 0: any number). None more,
        where the process that makes them is gone."""
        memory = min(self._settings.max_memory, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        names = self._settings.max_vms if self._settings.max_vms < NO_LIMIT else 0
        if self._zygote.is_gone:
            names = max(len(self._machines), 1)
            return memory, 0, names, 0
        return memory, max(memory - self._used(), 0), names, max(names - len(self._machines), 0)

    def forget(self, machine: MachineProcess) -> None:
        """The machine no longer counts; `MachineProcess.remove` is the caller's to call."""
        self._machines.discard(machine)
        self._zygote.tell_taken()  # that its process is its, whose end is waited for

    def _used(self, uid: int | None = None, inheritance: Inheritance | None = None) -> int:
        """What is inherited counts once for each user who has forks of it, however many. `inheritance`: with that."""
        size, inherited = 0, {} if inheritance is None else dict(inheritance.takes)
        for machine in self._machines:
            if uid is None or machine.owner.uid == uid:
                size += machine.memory_size + machine.reserved + machine.shared
                if machine.inheritance is not None:
                    inherited.update(machine.inheritance.takes)
        return size + sum(inherited.values())

    def _check_memory(self, uid: int, more: int, inheritance: Inheritance | None = None) -> None:
        if more <= 0:
            return
        limits = self._settings
        for used, most, whose in (
            (self._used(None, inheritance), limits.max_memory, "the mount's {} (--max-mem)"),
            (self._used(uid, inheritance), limits.max_memory_user, "a user's {} (--max-mem-user)"),
        ):
            if used + more > most:
                raise LimitReached(f"{more} bytes more than the {used} in use pass {whose.format(most)}")

    # ---- calls that wait

    def begin_call(self, uid: int) -> None:
        """A call of that user waits now. WouldBlock where as many do as may: others shall be served, too."""
        if self._blocked[uid] >= self._settings.max_waiting_user:
            raise WouldBlock(f"{self._blocked[uid]} calls of the user {uid} wait already")
        if self._blocked.total() >= WAITING_MOST:
            raise WouldBlock(f"{WAITING_MOST} calls wait already")
        self._blocked[uid] += 1

    def end_call(self, uid: int) -> None:
        self._blocked[uid] -= 1
        if not self._blocked[uid]:
            del self._blocked[uid]

    # ---- for machines

    def spawn(self, machine: MachineProcess, *, fresh: bool = False) -> tuple[Job, Channel[ToServer]]:
        """A process that is that machine's user from now on, and our end of its channel. `fresh`: not a spare.
        OSError where there is no descriptor for it."""
        size = machine.memory_size if machine.inheritance is None else DEFAULT_SIZE  # it gets other RAM
        job, sock = self._zygote.machine(machine.engine, size, fresh=fresh)
        return job, self._channel_of(machine.owner, sock)

    def _channel_of(self, who: Credentials, sock: socket, *, multiplies: bool = False) -> Channel[ToServer]:
        """To a process that is told whose it is."""
        most = min(self._settings.max_memory, self._settings.max_memory_user)
        most = most if most < NO_LIMIT else 0
        channel = Channel[ToServer](sock, ToServer, takes_fds=False)
        with contextlib.suppress(ChannelBroken):  # who listens hears so
            channel.post(Become(who.uid, who.gid, list(who.groups), who.file_size, most, multiplies))
        return channel

    # ---- templates

    def spawn_ready(self, machine: MachineProcess) -> tuple[Job, Channel[ToServer]] | None:
        """A process that is that fork already, where there is one."""
        inheritance = machine.inheritance
        if inheritance is None:
            return None
        key = inheritance, machine.owner
        if key not in self._templates:
            self._templates[key] = Template(self, machine.owner, machine.engine, inheritance)
        found = self._templates[key].take()
        return found and (found[0], Channel[ToServer](found[1], ToServer, takes_fds=False))

    def spawn_template(self, owner: Credentials, engine: str) -> tuple[Job, Channel[ToServer]]:
        job, sock = self._zygote.template(engine, DEFAULT_SIZE)
        return job, self._channel_of(owner, sock, multiplies=True)

    def adopt(self, pid: int) -> Job:
        return self._zygote.adopt(pid)

    def end_templates(self, inheritances: Iterable[Inheritance]) -> None:
        """What they are of is gone."""
        gone = set(inheritances)
        for (inheritance, _), template in list(self._templates.items()):
            if inheritance in gone:
                template.end()

    def forget_template(self, template: Template) -> None:
        self._templates = {key: one for key, one in self._templates.items() if one is not template}

    def open(self, who: Credentials, work: opener.Work, answer: socket) -> Job:
        return self._zygote.opener(who, work, answer)

    def kill(self, job: Job) -> None:
        self._zygote.kill(job)

    async def learn_sizes(self, machine: MachineProcess) -> None:
        """Have `fresh_sizes` of the first machine of the mount, of which nothing else has been asked yet."""
        async with self._learning:
            if self.fresh_sizes is None:
                self.fresh_sizes = await machine.first_sizes(self.measured)
