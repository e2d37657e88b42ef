"""Saved machines on their way in: the files of their directories, and what they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio

from vmfs.devices.machine import Pc
from vmfs.devices.virtio.disk import Overlay
from vmfs.machine import attach
from vmfs.machine.arrivals import Arrival, ArrivingFile, Made
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.handles import File, Handle, Kind, Scope
from vmfs.machine.files.kinds import Text
from vmfs.machine.past import Snapshot
from vmfs.machine.state import Setup, setup_of
from vmfs.words.errors import AlreadyThere, Busy, Gone, Invalid, LimitReached, NotPermitted

ARRIVALS_MOST = 64
BEGUN = "mem", "state", "info"  # the files that the directory of a snapshot has


class ArrivalScope(Scope):
    """One that comes in."""

    def __init__(self, machine: Contents, arrival: Arrival) -> None:
        self.machine = machine
        self.arrival = arrival
        super().__init__()


@dataclass(frozen=True)
class Arriving(Kind):
    """A file of it."""

    path: str
    writable = True

    def _file(self, scope: ArrivalScope) -> ArrivingFile:
        return scope.arrival[self.path]

    def size(self, scope: ArrivalScope) -> int:
        return self._file(scope).size

    def blocks(self, scope: ArrivalScope, size: int) -> int:
        return self._file(scope).taken // 512

    async def truncate(self, scope: ArrivalScope, size: int, opened: bool) -> None:
        await trio.to_thread.run_sync(scope.arrival.truncate, self._file(scope), size)

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _ArrivingHandle(node, nonblocking, self._file(node.scope), writing)


class _ArrivingHandle(Handle):
    def __init__(self, node: File, nonblocking: bool, file: ArrivingFile, writing: bool) -> None:
        super().__init__(node, nonblocking)
        self._file = file
        self._writing = writing
        file.writers += writing

    async def read(self, offset: int, size: int) -> bytes:
        return self._file.read(offset, size)

    async def write(self, offset: int, data: bytes) -> int:
        arrival: Arrival = self.scope.arrival
        at = self._file.size if self.appending else offset
        return await trio.to_thread.run_sync(arrival.write, self._file, at, data)

    def close(self) -> None:
        self._file.writers -= self._writing


def _info(scope: ArrivalScope) -> str:
    problems = scope.arrival.problems()
    lines = [f"wrong {problem}" for problem in problems] or ["whole: write its name to restore"]
    return "".join(f"{line}\n" for line in ("arriving", *lines))


_INFO = Text(_info)


class ArrivingInfo(Arriving):
    """What is written is kept; read, it says what is missing."""

    def size(self, scope: ArrivalScope) -> int:
        return len(_info(scope).encode())

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return super().open(node, nonblocking, writing) if writing else _INFO.open(node, nonblocking, writing)


class Arrivals:
    """Of one machine."""

    def __init__(self, machine: Contents) -> None:
        self._machine = machine
        self._scopes: dict[str, ArrivalScope] = {}
        self.is_live = False  # clients had RAM's memfd itself, so that RAM cannot be another one

    def names(self) -> list[str]:
        return list(self._scopes)

    def listed(self, name: str, folder: str) -> list[str]:
        """The names in a folder of it; "" is its own."""
        scope = self._scopes.get(name)
        paths = scope.arrival.files if scope is not None else ()
        return sorted(path.rpartition("/")[2] for path in paths if path.rpartition("/")[0] == folder)

    def find(self, name: str, path: str) -> tuple[Kind, ArrivalScope] | None:
        scope = self._scopes.get(name)
        if scope is None:
            return None
        if path not in scope.arrival.files:
            return None
        return (ArrivingInfo(path) if path == "info" else Arriving(path)), scope

    async def begin(self, name: str, is_new: bool, is_live: bool) -> None:
        """In a new directory, or in the place of the snapshot of that name."""
        past = self._machine.vm.past
        if name in self._scopes or is_new and past.get(name) is not None:
            raise AlreadyThere(f"there is a snapshot {name} already")
        if len(self._scopes) >= ARRIVALS_MOST:
            raise LimitReached(f"{ARRIVALS_MOST} saved machines are coming in already")
        if not is_new:
            await trio.to_thread.run_sync(past.drop, name)
        self.is_live = is_live
        arrival = Arrival(name, self._machine.door)
        for path in () if is_new else BEGUN:
            arrival.make(path)
        self._scopes[name] = ArrivalScope(self._machine, arrival)

    def _arrival(self, name: str) -> Arrival:
        scope = self._scopes.get(name)
        if scope is None:
            raise Gone("it has come in already")
        return scope.arrival

    async def make(self, path: str) -> None:
        name, _, rest = path.partition("/")
        await trio.to_thread.run_sync(self._arrival(name).make, rest)

    async def fill(self, path: str, source: str) -> None:
        name, _, rest = path.partition("/")
        await trio.to_thread.run_sync(self._arrival(name).fill, rest, source)

    async def rename(self, path: str, new: str) -> None:
        (name, _, rest), (new_name, _, new_rest) = path.partition("/"), new.partition("/")
        if name != new_name:
            raise NotPermitted("it stays in its directory")
        await trio.to_thread.run_sync(self._arrival(name).rename, rest, new_rest)

    def remove(self, path: str) -> bool:
        """The whole of one, or a file. Whether it was one's."""
        name, _, rest = path.partition("/")
        scope = self._scopes.get(name)
        if scope is None:
            return False
        if rest:
            scope.arrival.remove(rest)
        else:
            del self._scopes[name]
            scope.remove()
            scope.arrival.close()
        return True

    async def come_in(self, name: str) -> None:
        """Have it be a snapshot, if it comes in. Invalid where it is not whole."""
        scope = self._scopes.get(name)
        if scope is None:
            return
        vm = self._machine.vm
        made: Made = await trio.to_thread.run_sync(
            scope.arrival.snapshot, vm.engine, self._machine.engine_named
        )
        if self._scopes.pop(name, None) is None:  # meanwhile
            return
        scope.remove()
        await trio.to_thread.run_sync(vm.past.adopt, made.snapshot)
        scope.arrival.close()


def fits(scope: Contents, snapshot: Snapshot) -> bool:
    """Whether the machine is one of the same parts."""
    return _parts(scope.vm.save_setup()) == _parts(setup_of(snapshot.state))


def _parts(setup: Setup) -> tuple[Any, ...]:
    return setup.machine, setup.memory, setup.cpus, setup.attached


def rebuild(scope: Contents, snapshot: Snapshot) -> None:
    """Be a machine of the parts that it is of, and that. For a thread."""
    vm, door, setup = scope.vm, scope.door, setup_of(snapshot.state)
    if vm.memory.base is None and scope.arrivals.is_live:
        raise Busy("others had `mem` open when it came in, and RAM would be another")
    resources: dict[str, Any] = {}
    more = setup.memory - vm.memory.size
    if more > 0:
        door.reserve("mem", more)
    try:
        for one in setup.attached:
            resources[one.name] = attach.row_of(one).acquire(door, list(one.words))

        def fill(board: Pc) -> None:
            for one in setup.attached:
                attach.remake(board, one, resources[one.name])
                del resources[one.name]
            for name, frozen in snapshot.overlays.items():
                check_overlay(name, getattr(board.devices[name], "disk", None), frozen)

        vm.past.rebuild(snapshot, lambda: vm.rebuild(setup, snapshot.engine, snapshot.ram, fill, is_of_others=False))
        scope.plug_consoles()
    except BaseException:
        if more > 0:
            door.reserve("mem", -more)
        raise
    finally:
        for resource in resources.values():
            attach.close_resource(resource)
    if more < 0:
        door.reserve("mem", more)


def check_overlay(name: str, disk: Any, frozen: Any) -> None:
    if not isinstance(disk, Overlay) or disk.size != frozen.size:
        raise Invalid(f"{name}: the saved overlay is one of a disk of {frozen.size} bytes")

