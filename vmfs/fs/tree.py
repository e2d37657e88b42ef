"""The directories: the root, a machine's, its cpuN/ and reg/, made from the tables of files.py."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterable

import trio

from vmfs.fs.devices import DevicesDirectory
from vmfs.fs.files import FILES, REGISTER_FILES, ROOT_FILES, Row, has_msr, listed_registers, register_file
from vmfs.fs.hooks import pyfuse3
from vmfs.fs.inodes import WALK_OF, Directory, File, Inodes, Node
from vmfs.fs.scopes import MachineScope, RootScope
from vmfs.fs.waiting import finished
from vmfs.machine.machine import Vm
from vmfs.words.errors import Invalid, NotPermitted, NotThere, VmfsError

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
CLOSE_SECONDS = 1.0  # how long rmdir waits for the guest to stop and its memory to be free


def check_name(name: str) -> None:
    """Invalid for what is no name for a machine."""
    if not _NAME.fullmatch(name):
        raise Invalid(f"{name[:80]!r} is no name for a machine: 1 to 64 of A-Z a-z 0-9 . _ -, no leading dot")


class RegisterDirectory(Directory):
    """reg/: a file a register. MSRs are found by name whether they are listed or not.

    `files` are shared by reg/ and cpu0/reg/: one inode in two directories.
    """

    scope: MachineScope

    def __init__(self, machine: Directory, files: dict[str, Node], umask: int) -> None:
        super().__init__(machine.inodes, machine.scope, "reg", machine.mode, machine.uid, machine.gid)
        self.children = files
        self._umask = umask
        self._complete = False

    async def lookup(self, name: str) -> Node | None:
        node = self.children.get(name)
        if node is None:
            row = REGISTER_FILES.get(name)
            if row is None:
                found = self.scope.vm.at_boundary(lambda cpu: has_msr(cpu, name))
                await finished(found, self.scope)
                if not found.result():
                    return None
                row = register_file(name)
            node = self._make(row)
        return node

    async def entries(self) -> Iterable[tuple[str, Node]]:
        if not self._complete:
            listed = self.scope.vm.at_boundary(listed_registers)
            await finished(listed, self.scope)
            for name in listed.result():
                if name not in self.children:
                    self._make(REGISTER_FILES.get(name) or register_file(name))
            self._complete = True
        return await super().entries()

    def no_such(self, name: str) -> VmfsError:
        return NotThere("there is no such register")

    def _make(self, row: Row) -> Node:
        node = _make_file(self, row, self._umask)
        node.group = self.name
        node.links = 2
        self.children[row.name] = node
        return node


def _follows() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Of each file the readable ones before it by name, at the top and in cpuN/."""
    follows: dict[str, tuple[tuple[str, ...], ...]] = {}
    for rows in (FILES, [row for row in FILES if row.per_cpu]):
        names = sorted(row.name for row in rows if row.kind.readable)
        for at, name in enumerate(names):
            follows[name] = (*follows.get(name, ()), tuple(names[max(at - WALK_OF, 0) : at]))
    return follows


_FOLLOWS = _follows()


class MachineDirectory(Directory):
    """A machine."""

    scope: MachineScope
    prefix = ""

    def __init__(
        self, inodes: Inodes, scope: MachineScope, name: str, mode: int, uid: int, gid: int, umask: int
    ) -> None:
        super().__init__(inodes, scope, name, mode, uid, gid)
        cpu = Directory(inodes, scope, "cpu0", mode, uid, gid)
        for row in FILES:
            node = _make_file(self, row, umask)
            node.follows = _FOLLOWS.get(row.name, ())
            self.add(node)
            if row.per_cpu:
                cpu.add(node)
                node.links = 2
        registers: dict[str, Node] = {}
        self.add(RegisterDirectory(self, registers, umask))
        self.add(DevicesDirectory(self, umask))
        cpu.add(RegisterDirectory(self, registers, umask))
        self.add(cpu)


def _make_file(directory: Directory, row: Row, umask: int) -> File:
    mode = row.mode & ~umask
    if row.kind.reading_acts:
        mode &= ~((umask & 0o222) << 1)
    return File(
        directory.inodes,
        directory.scope,
        row.name,
        mode,
        directory.uid,
        directory.gid,
        row.kind,
    )


class RootDirectory(Directory):
    """The mount: machines are made, renamed and removed here."""

    scope: RootScope
    prefix = ""

    def __init__(self, inodes: Inodes, scope: RootScope, mode: int, uid: int, gid: int) -> None:
        super().__init__(inodes, scope, "", mode, uid, gid)
        for row in ROOT_FILES:
            self.add(_make_file(self, row, 0o022))

    def no_such(self, name: str) -> VmfsError:
        return NotPermitted("at the root of the mount only machines are made, by mkdir")

    async def mkdir(self, name: str, mode: int, uid: int, gid: int, umask: int) -> Node:
        check_name(name)
        self._check_free(name)
        vm = self.scope.host.create()
        scope = MachineScope(vm, self.scope.host, self.scope.connection)
        machine = MachineDirectory(self.inodes, scope, name, mode, uid, gid, umask)
        self.add(machine)
        return machine

    async def rmdir(self, name: str) -> None:
        machine = self._machine(name)
        self.take(name)
        machine.scope.remove()
        self.inodes.remove(machine)
        self.scope.host.forget(machine.scope.vm)
        with trio.move_on_after(CLOSE_SECONDS):
            await _closing(machine.scope.vm)

    async def rename(self, name: str, parent: Directory, new_name: str, flags: int) -> None:
        machine = self._machine(name)
        if parent is not self:
            raise NotPermitted("a machine stays at the root of the mount")
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise Invalid("machines cannot be exchanged")
        check_name(new_name)
        if new_name in self.children:
            # As rename(2) has it: a directory that is not empty is not replaced.
            number = errno.EEXIST if flags & pyfuse3.RENAME_NOREPLACE else errno.ENOTEMPTY
            raise pyfuse3.FUSEError(number)
        self.take(name)
        machine.name = new_name
        self.add(machine)

    async def close(self) -> None:
        """Remove all machines; returns when their guests have stopped and their memory is free."""
        async with trio.open_nursery() as nursery:
            for child in list(self.children.values()):
                if isinstance(child, MachineDirectory):
                    self.take(child.name)
                    child.scope.remove()
                    nursery.start_soon(trio.to_thread.run_sync, child.scope.vm.close)

    def _check_free(self, name: str) -> None:
        if name in self.children:
            raise pyfuse3.FUSEError(errno.EEXIST)

    def _machine(self, name: str) -> MachineDirectory:
        child = self.children.get(name)
        if child is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if not isinstance(child, MachineDirectory):
            raise NotPermitted(f"{name} belongs to the mount")
        return child


async def _closing(vm: Vm) -> None:
    """Close it in a thread, which goes on when whoever waits for it does not."""
    done = trio.Event()

    async def close() -> None:
        try:
            await trio.to_thread.run_sync(vm.close)
        except Exception:
            log.exception("a machine could not be closed")
        finally:
            done.set()

    trio.lowlevel.spawn_system_task(close)
    await done.wait()
