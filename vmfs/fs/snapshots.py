"""snap/: a directory a snapshot of the machine. mkdir takes one, rmdir drops it; what is in it is only read.

A program that copies a saved machine to snap/NAME makes the directory, and writes files into it. Some say at once that
it shall be the owner's alone, as cp and tar do, since the saved one is: that takes no snapshot. Of others a snapshot is
taken, as by mkdir(1), and with the first file that they write it is none any more, and the directory is what was
written. Only the process that has made the directory may do that, and its group, by a new file or one that is opened
for writing alone: a slip shall not cost a snapshot.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable, Iterable
from typing import Any

from vmfs.fs.files import SNAPSHOT_FILES, SNAPSHOT_FOLDERS, SNAPSHOT_HISTORY, Row, arriving_file, snapshot_file
from vmfs.fs.hooks import _fuse
from vmfs.fs.inodes import Directory, File, Node
from vmfs.fs.kinds import call
from vmfs.fs.scopes import MachineScope, PartScope, check_name, listed
from vmfs.host.credentials import credentials_of
from vmfs.host.process import Asker
from vmfs.words import commands
from vmfs.words.commands import FOUND_ARRIVING, FOUND_DIRECTORY, FOUND_FILE
from vmfs.words.errors import HostError, NotPermitted

MODE = 0o700  # as the owner's files are: what is in there is all that the machine's memory has

MakeFile = Callable[[Directory, Row, int, str], File]


class SnapshotsDirectory(Directory):
    """snap/."""

    scope: MachineScope
    asks = True

    def __init__(self, machine: Directory, umask: int, make_file: MakeFile) -> None:
        super().__init__(machine.inodes, machine.scope, "snap", MODE & ~umask, machine.uid, machine.gid)
        self._umask = umask
        self._make_file = make_file

    async def lookup(self, name: str) -> Node | None:
        await self._refresh()
        return await super().lookup(name)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        await self._refresh()
        return await super().entries()

    async def mkdir(self, name: str, mode: int, caller: Any) -> Node:
        check_name(name, "a snapshot")
        machine = self.scope.machine
        await machine.start()
        maker = group_of(caller.pid)
        is_arriving, mode = _is_for_owner(mode, caller.umask), mode & ~caller.umask
        if is_arriving:
            live = not self.scope.memory.leave_to_machine()
            await call(machine, lambda at: commands.Arrive(at, name, True, live), caller.pid)
            return self._add_new(name, mode, maker, is_arriving=True)
        live = not self.scope.memory.leave_to_machine()
        await call(machine, lambda at: commands.Take(at, name, live), caller.pid, asker_of(caller.pid))
        await self._refresh(mode, maker)
        node = self.children.get(name)
        if node is None:
            raise NotPermitted("it was removed at once")
        return node

    async def rmdir(self, name: str) -> None:
        await call(self.scope.machine, lambda at: commands.Remove(at, f"snap/{name}"), 0)
        await self._refresh()

    async def _refresh(self, mode: int = MODE, maker: int = 0) -> None:
        """Have the directories of the snapshots that there are. A machine without a process has none."""
        machine = self.scope.machine
        found = [] if machine.is_blank else await listed(machine, "snap")
        there = {name: what for name, what in found if what in (FOUND_DIRECTORY, FOUND_ARRIVING)}
        for name, node in list(self.children.items()):
            if isinstance(node, SnapshotDirectory) and name not in there:
                self.take(name)
                node.scope.remove()
                self.inodes.remove(node)
        for name in sorted(there.keys() - self.children.keys()):
            if name not in self.children:  # meanwhile
                is_arriving = there[name] == FOUND_ARRIVING
                await self._add_new(name, mode, maker, is_arriving=is_arriving).refresh()

    def _add_new(self, name: str, mode: int, maker: int, *, is_arriving: bool = False) -> SnapshotDirectory:
        node = SnapshotDirectory(self, name, mode & MODE, self._umask, self._make_file, maker, is_arriving)
        self.add(node)
        return node


class SnapshotDirectory(Directory):
    """snap/NAME/, with folders that are as it is. `maker`: the process group that may have a saved machine come in; 0:
    none may."""

    scope: PartScope
    attr_seconds = 0

    def __init__(
        self,
        parent: Directory,
        name: str,
        mode: int,
        umask: int,
        make_file: MakeFile,
        maker: int,
        is_arriving: bool,
    ) -> None:
        super().__init__(parent.inodes, PartScope(parent.scope), name, mode & ~umask, parent.uid, parent.gid)
        self.maker = maker
        self.is_arriving = is_arriving
        self.path = f"snap/{name}"
        self._umask = umask
        self._make_file = make_file
        self._folders = {one: _Folder(self, one) for one in (*SNAPSHOT_FOLDERS, SNAPSHOT_HISTORY)}
        if not is_arriving:
            self._be_whole()

    def _be_whole(self) -> None:
        """Have what every snapshot has."""
        for row in SNAPSHOT_FILES:
            node = self.children.get(row.name)
            if isinstance(node, File):
                node.kind = row.kind
            else:
                self._put(self, row)
        for name in SNAPSHOT_FOLDERS:
            if name not in self.children:
                self.add(self._folders[name])

    def _put(self, directory: Directory, row: Row) -> File:
        path = f"{self.path}/{row.name}" if directory is self else f"{self.path}/{directory.name}/{row.name}"
        node = self._make_file(directory, row, self._umask, path)
        node.becomes_writable = self.arrive
        node.takes_memfd = self.fill
        directory.add(node)
        return node

    async def refresh(self) -> None:
        """Have the files that there are."""
        machine = self.scope.machine
        if self.is_arriving and dict(await listed(machine, "snap")).get(self.name) == FOUND_DIRECTORY:
            self._be_there()
        for directory in (self, *self._folders.values()):
            folder = "" if directory is self else f"/{directory.name}"
            found = dict(await listed(machine, f"{self.path}{folder}"))
            if found and directory is not self and directory.name not in self.children:
                self.add(directory)
            always = {row.name for row in SNAPSHOT_FILES} if directory is self and not self.is_arriving else set()
            for name, node in list(directory.children.items()):
                if isinstance(node, File) and name not in found and name not in always:
                    directory.take(name)
            for name, what in found.items():
                if name not in directory.children:
                    self._put(directory, arriving_file(name) if what == FOUND_FILE else snapshot_file(name))

    async def lookup(self, name: str) -> Node | None:
        if self.is_arriving and name not in self.children:
            await self.refresh()
        return self.children.get(name)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        await self.refresh()
        return await super().entries()

    # ---- a saved machine that comes in

    async def arrive(self, pid: int) -> None:
        """Somebody is to write here."""
        if self.is_arriving:
            return
        if not self.maker or group_of(pid) != self.maker:
            raise HostError(errno.EACCES, "a snapshot is only read; `cp -r` to a new name in snap/ has one come in")
        await call(self.scope.machine, lambda at: commands.Arrive(at, self.name, False, False), pid)
        self.is_arriving = True
        for directory in (self, *self._folders.values()):
            for name, node in list(directory.children.items()):
                if isinstance(node, File):
                    node.kind = arriving_file(name).kind
                    node.attr_seconds = 0
                    if directory is not self:
                        directory.take(name)

    def _be_there(self) -> None:
        """It has come in, and is a snapshot."""
        self.is_arriving, self.maker = False, 0
        self._be_whole()

    async def make(self, directory: Directory, name: str, mode: int, caller: Any) -> Node:
        await self.arrive(caller.pid)
        path = self.path_of(directory, name)
        await call(self.scope.machine, lambda at: commands.Make(at, path), caller.pid, asker_of(caller.pid))
        node = self._put(directory, arriving_file(name))
        node.mode = mode & 0o700
        return node

    async def fill(self, node: File, source: str, pid: int) -> None:
        """Have a file of a saved machine that comes in be what the sealed memfd has that a path of the host names."""
        await self.arrive(pid)
        asker = Asker(who) if (who := credentials_of(pid)) else None
        if asker is not None:
            asker.says(f"memfd {shlex.quote(source)}\n".encode())
        await call(self.scope.machine, lambda at: commands.Fill(at, node.path, source), pid, asker)

    async def drop(self, directory: Directory, name: str, pid: int) -> None:
        if not self.is_arriving:
            raise NotPermitted("a snapshot is only read, and goes with its directory: rmdir")
        path = self.path_of(directory, name)
        await call(self.scope.machine, lambda at: commands.Remove(at, path), pid)
        directory.take(name)

    async def move(self, directory: Directory, name: str, new_directory: Directory, new: str) -> None:
        await self.arrive(0)
        path, to = self.path_of(directory, name), self.path_of(new_directory, new)
        await call(self.scope.machine, lambda at: commands.Rename(at, path, to), 0)
        node = directory.take(name)
        assert isinstance(node, File)
        if new in new_directory.children:
            new_directory.take(new)
        node.name, node.path = new, to  # the kernel knows it by its number
        new_directory.add(node)

    def path_of(self, directory: Directory, name: str) -> str:
        return f"{self.path}/{name}" if directory is self else f"{self.path}/{directory.name}/{name}"

    async def create(self, name: str, mode: int, caller: Any) -> Node:
        return await self.make(self, name, mode, caller)

    async def unlink(self, name: str, pid: int) -> None:
        await self.drop(self, name, pid)

    async def mkdir(self, name: str, mode: int, caller: Any) -> Node:
        folder = self._folders.get(name)
        if folder is None or name in self.children:
            raise NotPermitted(f"a saved machine has {', '.join(self._folders)}, and no other folder")
        await self.arrive(caller.pid)
        self.add(folder)
        return folder

    async def rename(self, name: str, parent: Directory, new_name: str, flags: int) -> None:
        await _rename(self, self, name, parent, new_name)


class _Folder(Directory):
    """disks/, images/ or history/."""

    attr_seconds = 0

    def __init__(self, of: SnapshotDirectory, name: str) -> None:
        super().__init__(of.inodes, of.scope, name, of.mode, of.uid, of.gid)
        self.of = of

    async def lookup(self, name: str) -> Node | None:
        if self.of.is_arriving and name not in self.children:
            await self.of.refresh()
        return self.children.get(name)

    async def entries(self) -> Iterable[tuple[str, Node]]:
        await self.of.refresh()
        return await super().entries()

    async def create(self, name: str, mode: int, caller: Any) -> Node:
        return await self.of.make(self, name, mode, caller)

    async def unlink(self, name: str, pid: int) -> None:
        await self.of.drop(self, name, pid)

    async def rename(self, name: str, parent: Directory, new_name: str, flags: int) -> None:
        await _rename(self.of, self, name, parent, new_name)


async def _rename(of: SnapshotDirectory, directory: Directory, name: str, parent: Directory, new: str) -> None:
    if _whole_of(parent) is not of or not isinstance(directory.children.get(name), File):
        raise NotPermitted("a file of a saved machine stays in its directory")
    await of.move(directory, name, parent, new)


def _whole_of(directory: Directory) -> Directory | None:
    return directory.of if isinstance(directory, _Folder) else directory


def _is_for_owner(mode: int, umask: int) -> bool:
    """Whether a directory of that mode was asked for as its owner's alone, as no mkdir(1) does by itself. Where the
    kernel has taken the umask from the mode, one that takes all from others does not tell."""
    return not mode & 0o077 and (_fuse.modes_are_whole() or umask & 0o077 != 0o077)


def asker_of(pid: int) -> Asker | None:
    """The process that asks for new files, for what is written to disks."""
    who = credentials_of(pid) if pid else None
    if who is None:
        return None
    asker = Asker(who)
    asker.says(b"cow\n")
    return asker


def group_of(pid: int) -> int:
    """The process group of a process or thread; 0 where it is not to be seen."""
    try:
        return os.getpgid(pid) if pid else 0
    except ProcessLookupError:
        try:
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
                return int(stat.read().rpartition(b")")[2].split()[2])
        except (OSError, ValueError, IndexError):
            return 0
