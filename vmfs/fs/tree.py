"""The directories: the root, a machine's, its cpuN/, reg/ and dev/, made from the tables of files.py."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from vmfs.fs.files import (
    BOTH,
    CPU_FILES,
    DEV_FILES,
    DEVICE_FILES,
    FILES,
    OWN_FILES,
    REGISTER_ROWS,
    ROOT_FILES,
    Row,
    register_row,
)
from vmfs.fs.forks import Writer, fork
from vmfs.fs.hooks import pyfuse3
from vmfs.fs.inodes import WALK_OF, Directory, File, Inodes, Node
from vmfs.fs.kinds import call
from vmfs.fs.lane import keep_attributes
from vmfs.fs.scopes import MachineScope, PartScope, RootScope, check_name, listed
from vmfs.fs.sizes import ANSWER_SECONDS
from vmfs.fs.snapshots import SnapshotsDirectory
from vmfs.host.credentials import Credentials, limits_of
from vmfs.host.process import MachineProcess
from vmfs.words import commands
from vmfs.words.commands import FOUND_NOTHING, FOUND_READ_ONLY
from vmfs.words.errors import AlreadyThere, Invalid, NotPermitted, NotThere, VmfsError
from vmfs.words.registers import parse_msr

log = logging.getLogger(__name__)

_CPU = re.compile(r"cpu[1-9][0-9]?", re.ASCII)
CLOSE_SECONDS = 2.0  # how long rmdir waits for the machine's process to be gone


class RegisterDirectory(Directory):
    """reg/: a file a register. MSRs are found by name whether they are listed or not.

    `files` are shared by reg/ and cpu0/reg/: one inode in two directories. `path`: what the machine calls it.
    """

    scope: MachineScope
    asks = True

    def __init__(self, machine: Directory, files: dict[str, Node], umask: int, path: str = "reg") -> None:
        super().__init__(machine.inodes, machine.scope, "reg", machine.mode, machine.uid, machine.gid)
        self.children = files
        self._umask = umask
        self._path = path
        self._complete = False

    def known(self, name: str) -> Node | None:
        node, row = self.children.get(name), REGISTER_ROWS.get(name)
        return self._make(row) if node is None and row is not None else node

    async def lookup(self, name: str) -> Node | None:
        """Of an MSR."""
        if parse_msr(name) is None:
            return None
        answer = await call(self.scope.machine, lambda at: commands.Find(at, f"{self._path}/{name}"), 0)
        if answer.number == FOUND_NOTHING:
            return None
        row = register_row(name, writable=answer.number != FOUND_READ_ONLY)
        return self.children.get(name) or self._make(row)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        if not self._complete:
            for name, found in await listed(self.scope.machine, self._path):
                if name not in self.children:
                    self._make(REGISTER_ROWS.get(name) or register_row(name, writable=found != FOUND_READ_ONLY))
            self._complete = True
        return await super().entries()

    def no_such(self, name: str) -> VmfsError:
        return NotThere("there is no such register")

    def _make(self, row: Row) -> Node:
        node = _make_file(self, row, self._umask, f"{self._path}/{row.name}")
        node.group = self.name
        node.links = 2 if self._path == self.name else 1
        self.children[row.name] = node
        return node


class DevicesDirectory(Directory):
    """dev/: a directory a device, `add`, by which disks, networks and shares are attached, and `unclaimed`.

    A device is detached by rmdir, before the first run.
    """

    scope: MachineScope
    asks = True

    def __init__(self, machine: Directory, umask: int) -> None:
        super().__init__(machine.inodes, machine.scope, "dev", machine.mode, machine.uid, machine.gid)
        self._umask = umask
        for row in DEV_FILES:
            self.add(_make_file(self, row, umask, f"dev/{row.name}"))

    def known(self, name: str) -> Node | None:
        return None

    async def lookup(self, name: str) -> Node | None:
        await self._refresh()
        return self.children.get(name)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        await self._refresh()
        return await super().entries()

    async def rmdir(self, name: str) -> None:
        await self._refresh()
        if not isinstance(self.children.get(name), _DeviceDirectory):
            raise NotPermitted(f"{name} is no device")
        await call(self.scope.machine, lambda at: commands.Remove(at, f"dev/{name}"), 0)
        await self._refresh()

    async def _refresh(self) -> None:
        """Have the directories of the devices that there are. A machine without a process has none."""
        machine = self.scope.machine
        names = [] if machine.is_blank else await listed(machine, "dev")
        there = {name: found for name, found in names if found in OWN_FILES}
        for name, node in list(self.children.items()):
            if isinstance(node, _DeviceDirectory) and name not in there:
                self.take(name)
                node.scope.remove()
                self.inodes.remove(node)
        for name in sorted(there.keys() - self.children.keys()):
            rows = (*DEVICE_FILES, *OWN_FILES[there[name]])
            self.add(_DeviceDirectory(self, PartScope(self.scope), name, self._umask, rows))


_PER_CPU = (*(row for row in FILES if row.per_cpu), *CPU_FILES)


class _CpuDirectory(Directory):
    """cpuN/ of another CPU than the first."""

    scope: PartScope
    attr_seconds = 0

    def __init__(self, parent: Directory, scope: PartScope, name: str, umask: int) -> None:
        super().__init__(parent.inodes, scope, name, parent.mode, parent.uid, parent.gid)
        for row in _PER_CPU:
            cold = replace(row, kind=BOTH) if getattr(row.kind, "hot", False) else row
            node = _make_file(self, cold, umask, f"{name}/{row.name}")
            node.follows = _CPU_FOLLOWS[row.name]
            self.add(node)
        self.add(RegisterDirectory(self, {}, umask, f"{name}/reg"))


class _DeviceDirectory(Directory):
    scope: PartScope
    attr_seconds = 0

    def __init__(self, parent: Directory, scope: PartScope, name: str, umask: int, rows: tuple[Row, ...]) -> None:
        super().__init__(parent.inodes, scope, name, parent.mode, parent.uid, parent.gid)
        follows = _follows(rows)
        for row in rows:
            node = _make_file(self, row, umask, f"dev/{name}/{row.name}")
            node.follows = follows.get(row.name, ())
            self.add(node)


def _follows(*folders: Iterable[Row]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Of each file the readable ones before it by name, in each of the folders that it is in."""
    follows: dict[str, tuple[tuple[str, ...], ...]] = {}
    for rows in folders:
        names = sorted(row.name for row in rows if row.kind.readable)
        for at, name in enumerate(names):
            follows[name] = (*follows.get(name, ()), tuple(names[max(at - WALK_OF, 0) : at]))
    return follows


_FOLLOWS = _follows(FILES, _PER_CPU)  # at the top, and in cpu0/
_CPU_FOLLOWS = _follows(_PER_CPU)


_ROWS = {row.name: row for row in FILES}
_OF_CPU = tuple(row.name for row in FILES if row.per_cpu)


class MachineDirectory(Directory):
    """A machine. Its files have nodes once somebody looks for them: most of most machines are never looked at."""

    scope: MachineScope
    prefix = ""
    asks = True

    def __init__(
        self, inodes: Inodes, scope: MachineScope, name: str, mode: int, uid: int, gid: int, umask: int
    ) -> None:
        super().__init__(inodes, scope, name, mode, uid, gid)
        self._made = uid, gid, self.ctime_ns  # what its files are made with, whatever becomes of it
        self._umask = umask
        registers: dict[str, Node] = {}
        self.add(RegisterDirectory(self, registers, umask))
        self.add(DevicesDirectory(self, umask))
        self.add(SnapshotsDirectory(self, umask, _make_file))
        self._cpu = _FirstCpuDirectory(self)
        self._cpu.add(RegisterDirectory(self, registers, umask))
        for row in CPU_FILES:
            node = _make_file(self, row, umask, f"cpu0/{row.name}")
            node.follows = _CPU_FOLLOWS[row.name]
            self._cpu.add(node)
        self.add(self._cpu)

    def file(self, name: str) -> Node | None:
        """A child, made if it was not yet."""
        node, row = self.children.get(name), _ROWS.get(name)
        if node is None and row is not None:
            node = _make_file(self, row, self._umask, name)
            node.follows = _FOLLOWS.get(name, ())
            node.uid, node.gid, made_ns = self._made
            node.atime_ns = node.mtime_ns = node.ctime_ns = made_ns
            self.add(node)
            if row.per_cpu:
                self._cpu.add(node)
                node.links = 2
        return node

    def known(self, name: str) -> Node | None:
        return None if _CPU.fullmatch(name) else self.file(name)

    async def lookup(self, name: str) -> Node | None:
        if _CPU.fullmatch(name):
            await self._find_cpus()
        return self.children.get(name)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        for name in _ROWS:
            self.file(name)
        await self._find_cpus()
        return await super().entries()

    async def _find_cpus(self) -> None:
        """Have the directories of the CPUs that there are. A machine without a process has one."""
        machine = self.scope.machine
        found: list[tuple[str, int]] = []
        if not machine.is_blank:
            try:
                with trio.fail_after(ANSWER_SECONDS):
                    found = await listed(machine, "cpus")
            except (VmfsError, trio.TooSlowError):  # as many as there were
                return
        there = {name for name, _ in found if _CPU.fullmatch(name)}
        for name, node in list(self.children.items()):
            if isinstance(node, _CpuDirectory) and name not in there:
                self.take(name)
                node.scope.remove()
                self.inodes.remove(node)
        for name in sorted(there - self.children.keys(), key=lambda name: int(name[3:])):
            self.add(_CpuDirectory(self, PartScope(self.scope), name, self._umask))


class _FirstCpuDirectory(Directory):
    """cpu0/: what is the machine's at the top, too, is the same inode."""

    def __init__(self, machine: MachineDirectory) -> None:
        super().__init__(machine.inodes, machine.scope, "cpu0", machine.mode, machine.uid, machine.gid)
        self._machine = machine

    def known(self, name: str) -> Node | None:
        return self._machine.file(name) if name in _OF_CPU else self.children.get(name)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        for name in _OF_CPU:
            self._machine.file(name)
        return await super().entries()


def _make_file(directory: Directory, row: Row, umask: int, path: str) -> File:
    mode = row.mode & ~umask
    if row.kind.reading_acts:
        mode &= ~((umask & 0o222) << 1)
    return File(directory.inodes, directory.scope, path, mode, directory.uid, directory.gid, row.kind)


# What a machine of this table has of sizes that it must be asked for.
MEASURED = tuple(row.name for row in FILES if row.kind.sized and row.name != "error")


class RootDirectory(Directory):
    """The mount: machines are made, renamed and removed here."""

    scope: RootScope
    prefix = ""

    def __init__(self, inodes: Inodes, scope: RootScope, mode: int, uid: int, gid: int) -> None:
        super().__init__(inodes, scope, "", mode, uid, gid)
        self._coming: set[str] = set()  # names of forks on their way
        for row in ROOT_FILES:
            self.add(_make_file(self, row, 0o022, row.name))
        scope.host.measured = MEASURED
        scope.listing = self._listing

    def _listing(self) -> str:
        """What the server knows of its machines without asking one."""
        machines = sorted(
            (name, node.uid, node.scope.machine.pid)
            for name, node in self.children.items()
            if isinstance(node, MachineDirectory)
        )
        return "".join(f"{name} uid={uid} pid={pid}\n" for name, uid, pid in machines)

    def add(self, node: Node) -> None:
        super().add(node)
        keep_attributes(self.number, None)

    def take(self, name: str) -> Node:
        keep_attributes(self.number, None)
        return super().take(name)

    def no_such(self, name: str) -> VmfsError:
        return NotPermitted("at the root of the mount only machines are made, by mkdir")

    async def mkdir(self, name: str, mode: int, caller: Any) -> Node:
        check_name(name)
        self._check_free(name)
        machine = self.scope.host.create(_owner(caller))
        return self._add(name, machine, mode & ~caller.umask, caller.uid, caller.gid, caller.umask)

    def _add(self, name: str, machine: MachineProcess, mode: int, uid: int, gid: int, umask: int) -> MachineDirectory:
        scope = MachineScope(machine, self.scope.connection)
        scope.fork = partial(self._fork, scope)
        directory = MachineDirectory(self.inodes, scope, name, mode, uid, gid, umask)
        self.add(directory)
        return directory

    async def _fork(self, parent: MachineScope, name: str, snapshot: str, writer: Writer) -> None:
        """Have a sibling of that machine, which is the writer's."""
        check_name(name)
        if snapshot:
            check_name(snapshot, "a snapshot")
        self._check_free(name)
        self._coming.add(name)
        try:
            machine = await fork(self.scope.host, parent, snapshot, writer)
            who = writer.who
            made = self._add(name, machine, 0o777 & ~writer.umask, who.uid, who.gid, writer.umask)
            made.scope.memory.leave_to_machine()
        finally:
            self._coming.discard(name)

    async def rmdir(self, name: str) -> None:
        directory = self._machine(name)
        self.take(name)
        directory.scope.remove()
        self.inodes.remove(directory)
        self.scope.host.forget(directory.scope.machine)
        done = trio.Event()
        trio.lowlevel.spawn_system_task(_remove, directory.scope.machine, done)
        with trio.move_on_after(CLOSE_SECONDS):
            await done.wait()

    async def rename(self, name: str, parent: Directory, new_name: str, flags: int) -> None:
        machine = self._machine(name)
        if parent is not self:
            raise NotPermitted("a machine stays at the root of the mount")
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise Invalid("machines cannot be exchanged")
        check_name(new_name)
        if new_name in self.children or new_name in self._coming:
            # As rename(2) has it: a directory that is not empty is not replaced.
            number = errno.EEXIST if flags & pyfuse3.RENAME_NOREPLACE else errno.ENOTEMPTY
            raise pyfuse3.FUSEError(number)
        self.take(name)
        machine.name = new_name
        self.add(machine)

    async def close(self) -> None:
        """Remove all machines; returns when their processes are gone."""
        async with trio.open_nursery() as nursery:
            for child in list(self.children.values()):
                if isinstance(child, MachineDirectory):
                    self.take(child.name)
                    child.scope.remove()
                    nursery.start_soon(_remove, child.scope.machine, trio.Event())

    def _check_free(self, name: str) -> None:
        if name in self.children or name in self._coming:
            raise AlreadyThere(f"there is a {name} already")

    def _machine(self, name: str) -> MachineDirectory:
        child = self.children.get(name)
        if child is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if not isinstance(child, MachineDirectory):
            raise NotPermitted(f"{name} belongs to the mount")
        return child


def _owner(caller: Any) -> Credentials:
    """Whose a new machine is: the caller, as it is known while it waits."""
    found = limits_of(caller.pid) if caller.pid else None
    if found is None or found.uid != caller.uid:
        return Credentials(caller.uid, caller.gid, (), 0)
    return Credentials(caller.uid, caller.gid, found.groups, 0, file_size=found.file_size)


async def _remove(machine: MachineProcess, done: trio.Event) -> None:
    """End it, in a task that goes on when its waiter gives up."""
    try:
        await machine.remove()
    except Exception:
        log.exception("a machine could not be ended")
    finally:
        done.set()
