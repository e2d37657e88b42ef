"""snap/: a directory a snapshot of the machine. mkdir takes one, rmdir drops it; what is in it is only read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vmfs.fs.files import SNAPSHOT_FILES, Row, snapshot_disk
from vmfs.fs.inodes import Directory, File, Node
from vmfs.fs.kinds import call
from vmfs.fs.scopes import MachineScope, PartScope, check_name, listed
from vmfs.host.credentials import credentials_of
from vmfs.host.process import Asker
from vmfs.words import commands
from vmfs.words.commands import FOUND_DIRECTORY
from vmfs.words.errors import NotPermitted

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
        who = credentials_of(caller.pid) if caller.pid else None
        asker = None
        if who is not None:
            asker = Asker(who)
            asker.says(b"cow\n")  # new files for what the guest writes to disks from now on
        machine = self.scope.machine
        await machine.start()
        live = not self.scope.memory.leave_to_machine()
        await call(machine, lambda at: commands.Take(at, name, live), caller.pid, asker)
        await self._refresh(mode)
        node = self.children.get(name)
        if node is None:
            raise NotPermitted("it was removed at once")
        return node

    async def rmdir(self, name: str) -> None:
        await call(self.scope.machine, lambda at: commands.Remove(at, f"snap/{name}"), 0)
        await self._refresh()

    async def _refresh(self, mode: int = MODE) -> None:
        """Have the directories of the snapshots that there are. A machine without a process has none."""
        machine = self.scope.machine
        found = [] if machine.is_blank else await listed(machine, "snap")
        there = {name for name, what in found if what == FOUND_DIRECTORY}
        for name, node in list(self.children.items()):
            if isinstance(node, _SnapshotDirectory) and name not in there:
                self.take(name)
                node.scope.remove()
                self.inodes.remove(node)
        for name in sorted(there - self.children.keys()):
            disks = [disk for disk, _ in await listed(machine, f"snap/{name}/disks")]
            if name not in self.children:  # meanwhile
                self.add(_SnapshotDirectory(self, name, mode & MODE, self._umask, disks, self._make_file))


class _SnapshotDirectory(Directory):
    scope: PartScope

    def __init__(
        self, parent: SnapshotsDirectory, name: str, mode: int, umask: int, disks: list[str], make_file: MakeFile
    ) -> None:
        super().__init__(parent.inodes, PartScope(parent.scope), name, mode & ~umask, parent.uid, parent.gid)
        for row in SNAPSHOT_FILES:
            self.add(make_file(self, row, umask, f"snap/{name}/{row.name}"))
        folder = Directory(self.inodes, self.scope, "disks", self.mode, self.uid, self.gid)
        for disk in disks:
            folder.add(make_file(folder, snapshot_disk(disk), umask, f"snap/{name}/disks/{disk}"))
        self.add(folder)
