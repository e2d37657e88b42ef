"""What stands in snap/: a directory a snapshot, which is only read; and `restore`, which goes back to one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.machine._lane import Lane
from vmfs.machine.arrivals import images_of
from vmfs.machine.files.arrivals import Arrivals, check_overlay, fits, rebuild
from vmfs.machine.files.contents import Contents
from vmfs.machine.files.handles import File, Handle, Kind, Scope
from vmfs.machine.files.kinds import Text
from vmfs.machine.files.lines import Do
from vmfs.machine.files.request import Request, begin, current
from vmfs.machine.files.waiting import settled
from vmfs.machine.past import Snapshot
from vmfs.machine.record import FOLDER, Record
from vmfs.memory.layers import Image
from vmfs.words.commands import ANY_FLAGS
from vmfs.words.errors import AlreadyThere, Busy, Interrupted, Invalid, NotThere, VmfsError

RESTORES_MOST = 20  # times that a machine is stopped for one, while others start it again
EXTENTS_MOST = 8000  # of a file, that are told of
_GAP = 8192
_SOON = 1024  # pages that are put back on the spot; a thread is for more


class SnapshotScope(Scope):
    """One snapshot of a machine, with which it goes."""

    def __init__(self, machine: Contents, snapshot: Snapshot) -> None:
        self.machine = machine
        self.snapshot = snapshot
        super().__init__()


def _info(scope: SnapshotScope) -> str:
    snapshot, past = scope.snapshot, scope.machine.vm.past
    shared, own = past.sizes(snapshot)
    taken = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(snapshot.taken_ns // 1_000_000_000))
    lines = [
        f"taken {taken}.{snapshot.taken_ns // 1000 % 1_000_000:06}Z",
        f"instructions {'-' if snapshot.instructions is None else snapshot.instructions}",
        f"engine {snapshot.engine.name}",
        f"memory {snapshot.memory_size}",
        f"shared {shared}",
        f"own {own}",
        *([f"standstill_us {snapshot.still_ns // 1000}"] if snapshot.still_ns else []),
        *(f"disk {name} cow" for name in sorted(snapshot.overlays)),
        *(f"disk {name} rw: what its file holds is not in the snapshot" for name in sorted(snapshot.rw_disks)),
    ]
    return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True)
class Bytes(Kind):
    """What is read by offsets: `read(scope, offset, size)`; `measure` gives its size, and the blocks that it takes."""

    get: Callable[[Any, int, int], bytes]
    length: Callable[[Any], int]
    extents: Callable[[Any], Any] | None = None

    def size(self, scope: Any) -> int:
        return self.length(scope)

    def blocks(self, scope: Any, size: int) -> int:
        if self.extents is None:
            return super().blocks(scope, size)
        return sum(end - start for start, end in self.extents(scope)) // 512

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _BytesHandle(node, nonblocking, self)


def few(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """As many as can be told of: small holes are data then."""
    found, gap = list(extents), _GAP
    while len(found) > EXTENTS_MOST:
        found, gap = list(_closed(found, gap)), 2 * gap
    return found


def _closed(extents: list[tuple[int, int]], gap: int) -> Iterator[tuple[int, int]]:
    """With no hole that is smaller than `gap`."""
    start, end = extents[0]
    for one, its_end in extents[1:]:
        if one - end >= gap:
            yield start, end
            start = one
        end = its_end
    yield start, end


class _BytesHandle(Handle):
    def __init__(self, node: File, nonblocking: bool, kind: Bytes) -> None:
        super().__init__(node, nonblocking)
        self._kind = kind

    async def read(self, offset: int, size: int) -> bytes:
        return self._kind.get(self.scope, offset, size)

    def extents(self) -> list[tuple[int, int]]:
        if self._kind.extents is None:
            return [(0, self._kind.length(self.scope))]
        return few(self._kind.extents(self.scope))


def _ram(scope: SnapshotScope) -> Image:
    return scope.snapshot.ram


SNAPSHOT_KINDS: Mapping[str, Kind] = {
    "mem": Bytes(
        lambda scope, offset, size: _ram(scope).read(offset, size),
        lambda scope: _ram(scope).end,
        lambda scope: _ram(scope).extents(),
    ),
    "state": Bytes(
        lambda scope, offset, size: scope.snapshot.encoded[offset : offset + size],
        lambda scope: len(scope.snapshot.encoded),
    ),
    "info": Text(_info),
}


def disk_kind(name: str) -> Kind:
    """What has been written to a `cow` disk, at its place."""
    return Bytes(
        lambda scope, offset, size: scope.snapshot.overlays[name].read_at(offset, size),
        lambda scope: scope.snapshot.overlays[name].size,
        lambda scope: scope.snapshot.overlays[name].extents(),
    )


def image_kind(name: str) -> Kind:
    """What is to boot, and the ROM."""
    return Bytes(
        lambda scope, offset, size: images_of(scope.snapshot)[name].read_at(offset, size),
        lambda scope: images_of(scope.snapshot)[name].size,
        lambda scope: images_of(scope.snapshot)[name].extents(),
    )


def record_kind(name: str) -> Kind:
    """How the machine came there."""

    def file(scope: SnapshotScope) -> Any:
        return recorded(scope).file(name, _ram(scope))

    return Bytes(
        lambda scope, offset, size: file(scope).read_at(offset, size),
        lambda scope: file(scope).size,
        lambda scope: file(scope).extents(),
    )


def recorded(scope: SnapshotScope) -> Record:
    assert scope.snapshot.record is not None
    return scope.snapshot.record


class Snapshots:
    """The snapshots of a machine, each with the scope of its files."""

    def __init__(self, machine: Contents) -> None:
        self._machine = machine
        self._scopes: dict[str, SnapshotScope] = {}
        self.arrivals = machine.arrivals = Arrivals(machine)

    def names(self) -> list[str]:
        self._refresh()
        return list(self._scopes)

    def listed(self, path: str) -> list[str]:
        """The names in NAME, NAME/disks, NAME/images, NAME/history."""
        name, _, folder = path.partition("/")
        scope = self.scope(name)
        if scope is None:
            return self.arrivals.listed(name, folder)
        record = scope.snapshot.record
        of = {
            "disks": scope.snapshot.overlays,
            "images": images_of(scope.snapshot),
            FOLDER: () if record is None else record.names(),
        }
        return sorted(of.get(folder, ()))

    def scope(self, name: str) -> SnapshotScope | None:
        self._refresh()
        return self._scopes.get(name)

    def find(self, path: str) -> tuple[Kind, Scope] | None:
        """What is at NAME/..."""
        name, _, rest = path.partition("/")
        scope = self.scope(name)
        if scope is None:
            return self.arrivals.find(name, rest)
        if rest.startswith("images/"):
            image = rest.removeprefix("images/")
            return (image_kind(image), scope) if image in images_of(scope.snapshot) else None
        if rest.startswith("disks/"):
            disk = rest.removeprefix("disks/")
            return (disk_kind(disk), scope) if disk in scope.snapshot.overlays else None
        if rest.startswith(f"{FOLDER}/"):
            name, record = rest.removeprefix(f"{FOLDER}/"), scope.snapshot.record
            return (record_kind(name), scope) if record is not None and name in record.names() else None
        return (SNAPSHOT_KINDS[rest], scope) if rest in SNAPSHOT_KINDS else None

    async def take(self, name: str, is_live: bool) -> None:
        """Keep what the machine is now. `is_live`: clients have its memfd."""
        contents = self._machine
        if name in self.arrivals.names():
            raise AlreadyThere(f"there is a snapshot {name} already")
        await contents.memory.settle()
        taking = Taking(contents)
        await trio.to_thread.run_sync(lambda: taking.take(name, is_live=is_live))
        contents.touch()

    async def remove(self, name: str) -> None:
        if not self.arrivals.remove(name):
            await trio.to_thread.run_sync(self._machine.vm.past.drop, name)
        self._refresh()

    def _refresh(self) -> None:
        past = self._machine.vm.past
        there = {name: past.get(name) for name in past.names()}
        for name, scope in list(self._scopes.items()):
            if there.get(name) is not scope.snapshot:
                del self._scopes[name]
                scope.remove()
        for name, snapshot in there.items():
            if snapshot is not None and name not in self._scopes:
                self._scopes[name] = SnapshotScope(self._machine, snapshot)


class Taking:
    """How a snapshot is taken for the call under way, which a signal ends."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._asked = current()

    def take(self, name: str, *, is_live: bool, is_kept: bool = True) -> Snapshot:
        """For a thread."""
        contents = self._contents
        return contents.vm.past.take(
            name,
            is_live=is_live,
            unseen=lambda: _unseen(contents),
            reserve=self._reserve,
            go_on=self._go_on,
            is_kept=is_kept,
        )

    def _go_on(self) -> None:
        if self._asked is not None and self._asked.interrupted:
            raise Interrupted("a signal came for the caller")

    def _reserve(self, more: int) -> None:
        door = self._contents.door
        if more > 0:
            door.reserve("beside", more)
        else:
            door.release("beside", -more)


def _unseen(contents: Contents) -> int:
    """As `Past` has it: below zero while clients may write RAM unseen."""
    return -1 if contents.memory.is_writable else contents.memory.changes


# ---- restore


def _put_restore(scope: Contents, text: str) -> Do:
    name = text.strip()
    if not name or len(name.split()) != 1 or "/" in name:
        raise Invalid(f"restore: {text[:80]!r} is no name of a snapshot")
    return lambda: restore(scope, name)


async def restore(scope: Contents, name: str) -> None:
    """Go back to a snapshot. A run under way ends; the machine is paused then."""
    vm = scope.vm
    await scope.arrivals.come_in(name)
    if (snapshot := vm.past.get(name)) is None:
        raise NotThere(f"restore: there is no snapshot {name[:64]!r}")
    engine = vm.engine
    is_same = vm.past.knows_ram and fits(scope, snapshot)
    if is_same:
        disks_now = dict(vm.disks())
        for disk, frozen in snapshot.overlays.items():
            check_overlay(disk, disks_now.get(disk), frozen)
    # What is to boot counts where it comes back, before it does.
    images = {vm.images[image]: kept.size for image, kept in snapshot.images.items()}
    for image, size in images.items():
        await scope.budget.hold(image, max(size, image.size))
    async with scope.memory.change():
        for _ in range(RESTORES_MOST):
            if vm.state == "running":
                await settled(vm.pause(), scope)
            try:
                if not is_same:
                    await trio.to_thread.run_sync(rebuild, scope, snapshot)
                elif not vm.past.restore_now(name, _SOON, unseen=lambda: _unseen(scope)):
                    await trio.to_thread.run_sync(lambda: vm.past.restore(name, unseen=lambda: _unseen(scope)))
                break
            except Busy:  # somebody has started it again
                continue
        else:
            raise Busy("restore: others start the machine whenever it is stopped for it")
    for image in map(vm.images.__getitem__, vm.images.names):
        await scope.budget.hold(image, image.size)
    if vm.engine is not engine or not is_same:
        scope.forget_sizes()
    if snapshot.rw_disks:
        disks = " ".join(snapshot.rw_disks)
        scope.complain(f"restore: what the files of disks that are rw hold stays as it is now: {disks}")


def take_restore(scope: Contents, trio_token: trio.lowlevel.TrioToken, lane: Lane, number: int, line: bytes) -> None:
    """What was written to `restore`, by the lane. From the CPU's thread, which does it where it has to wait for nobody:
    to wake the loop takes longer than to go back."""
    if _restore_at_once(scope, line):
        lane.end_line(number, True)
        return
    with contextlib.suppress(trio.RunFinishedError):  # else nobody waits for it any more
        trio_token.run_sync_soon(trio.lowlevel.spawn_system_task, _restore_by_lane, scope, lane, number, line)


def _restore_at_once(scope: Contents, line: bytes) -> bool:
    """Whether that was done: else nothing has changed. From any thread; for a machine without devices, which was made
    that snapshot before, and whose RAM nobody can write unseen. Nothing of it counts against other limits then."""
    vm, name = scope.vm, line[:-1].decode("latin-1")
    snapshot = vm.past.get(name) if line.endswith(b"\n") else None
    if snapshot is None or snapshot.images or not vm.past.is_at_hand(snapshot):
        return False
    if vm.board is not None or vm.images.sizes() or scope.memory.is_cached or name in scope.arrivals.names():
        return False
    try:
        return vm.past.restore_now(name, _SOON)
    except VmfsError:  # the loop finds it, too, and says it
        return False


async def _restore_by_lane(scope: Contents, lane: Lane, number: int, line: bytes) -> None:
    """Only what needs nobody else: all other lines are left to the usual way, which says what is wrong with them."""
    is_done = False
    begin(Request(0, ANY_FLAGS))
    try:
        name = line.decode("ascii").removesuffix("\n")
        snapshot = scope.vm.past.get(name)
        if snapshot is not None and not snapshot.rw_disks and line.endswith(b"\n"):
            await restore(scope, name)
            is_done = True
    except (VmfsError, UnicodeDecodeError):
        pass
    finally:
        lane.end_line(number, is_done)


RESTORE = Text(lambda scope: f"{scope.vm.past.last or ''}\n", _put_restore, acts=True)
