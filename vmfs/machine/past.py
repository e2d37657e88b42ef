"""Past: the snapshots of a machine. What one holds, and how it is taken and gone back to (docs/decisions/0013).

A snapshot is a value of the machine (`vmfs.machine.state`) and its memory: RAM as an image of layers that snapshots
share, and what else of memory there is, each as a file that nobody changes any more. RAM is copied while the guest
runs; while it stands still, only what it wrote since, and the state. Every method blocks, and is for a thread of its
own; one at a time is done.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from vmfs.devices.virtio.disk import Disk, Frozen, Overlay
from vmfs.engine.base import Engine, Machine, Vcpu
from vmfs.machine.images import Images, Kept
from vmfs.machine.record import Record
from vmfs.machine.state import Body, Opened, State, take_with
from vmfs.memory.layers import Image, Layer, bits, runs
from vmfs.memory.ram import PAGE, Memory
from vmfs.words.errors import AlreadyThere, LimitReached, NotThere, VmfsError

SNAPSHOTS_MOST = 256  # of a machine: each holds a descriptor or two
STILL_MOST = 256  # pages that are copied while the machine stands still, where fewer can be had
ROUNDS_MOST = 8  # in which a guest that runs may write less than that
_ROOM_STEP = 1 << 20
_COMPARED, _COPIED = 1 << 20, 16 << 20  # bytes at a time

Reserve = Callable[[int], None]  # asks for more bytes, or gives some back: below zero


@dataclass(frozen=True, slots=True)
class Rom:
    kept: Kept
    address: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`overlays`: by the name of the device, what its disk's overlay has; `instructions`: None where nobody counts.
    `record`: how the machine came here, where it has a history."""

    name: str
    state: State
    engine: Engine
    ram: Image
    rom: Rom | None
    images: dict[str, Kept]
    overlays: dict[str, Frozen]
    taken_ns: int
    instructions: int | None
    rw_disks: tuple[str, ...]  # that are rw: what their files hold is not in it
    memory_size: int
    encoded: bytes  # the state
    still_ns: int = 0  # that the machine stood still for it
    record: Record | None = None
    _opened: list[Opened] = field(default_factory=list)

    def opened(self, vm: Body) -> Opened:
        """The state, for the machine that it is of, whose parts are fixed while there is a snapshot."""
        if not self._opened:
            self._opened.append(Opened(vm, self.state))
        return self._opened[0]

    @property
    def put_on(self) -> Machine | None:
        """The engine's machine that was made this last."""
        return self._opened[0].put_on if self._opened else None

    def forget_opened(self) -> None:
        """It is another machine now."""
        self._opened.clear()

    def files(self) -> Iterator[Kept]:
        """What holds memory beside RAM."""
        yield from self.images.values()
        if self.rom is not None:
            yield self.rom.kept


class Whole(Body, Protocol):
    """What this needs of a machine (`vmfs.machine.machine.Vm`). The second group is for the holder of its lock."""

    memory: Memory
    images: Images
    engine: Engine
    history: Any

    def at_boundary(self, task: Callable[[Vcpu], Any], cpu: int = 0) -> Future[Any]: ...
    def take_pages(self) -> int: ...
    def note_pages(self, pages: int) -> None: ...
    def copy_pages(self) -> None: ...
    def go_back(self, snapshot: Snapshot, look: Callable[[], Callable[[], None]]) -> None: ...

    @property
    def rom(self) -> Rom | None: ...
    def disks(self) -> Iterator[tuple[str, Disk]]: ...
    def look_at_pages(self) -> int: ...
    def forget_pages(self) -> None: ...
    def have_written(self, pages: int) -> None: ...
    def count_instructions(self) -> int | None: ...


class _Longer(Exception):
    """To go back takes longer than the caller has time for."""


class Past:
    """Of one machine, which has to note each page of RAM that is written once there is a snapshot (`is_tracked`)."""

    def __init__(self, vm: Whole) -> None:
        self._vm = vm
        self._busy = threading.Lock()
        self._snapshots: dict[str, Snapshot] = {}
        self._reserve: Reserve = lambda more: None
        self._held = 0  # bytes
        self._parent: Image | None = None  # what RAM is but for the pages that are noted; None: it is not known
        self._news = 0  # of `unseen` when RAM was the parent
        self.is_tracked = False
        self._is_of_others = False  # the base is
        self.last: str | None = None  # the one that was gone back to, or taken, last

    # ---- what there is

    def names(self) -> list[str]:
        return list(self._snapshots)

    def get(self, name: str) -> Snapshot | None:
        return self._snapshots.get(name)

    def __getitem__(self, name: str) -> Snapshot:
        """NotThere where there is none of that name."""
        snapshot = self._snapshots.get(name)
        if snapshot is None:
            raise NotThere(f"there is no snapshot {name[:64]!r}")
        return snapshot

    def __bool__(self) -> bool:
        return bool(self._snapshots)

    def record(self) -> Record | None:
        """How the machine came to where it is, of the snapshot that it was last."""
        snapshot = self._snapshots.get(self.last or "")
        record = None if snapshot is None else snapshot.record
        return record if record is not None and record.end == self._vm.count_instructions() else None

    @property
    def knows_ram(self) -> bool:
        """Whether it is known what RAM is: an image, but for the pages that are noted. Only then can it be put back."""
        return self._parent is not None

    def sizes(self, snapshot: Snapshot) -> tuple[int, int]:
        """Bytes of memory and of overlays that it shares with other snapshots or with the machine, and that are its
        own."""
        others = [one for one in list(self._snapshots.values()) if one is not snapshot]
        base = self._vm.memory.base
        own = snapshot.ram.taken_beside([one.ram for one in others] + ([base] if base is not None else []))
        written = {part for disk in snapshot.overlays.values() for part in disk.files}
        theirs = {part for other in others for disk in other.overlays.values() for part in disk.files}
        theirs.update(part for disk in self._disks().values() for part in disk.lower)
        own += sum(part.taken for part in written - theirs)
        every = sum(layer.taken for layer in snapshot.ram.layers) + sum(part.taken for part in written)
        return max(every - own, 0), own

    # ---- taking one

    def take(
        self,
        name: str,
        *,
        is_live: bool = False,
        unseen: Callable[[], int] = lambda: 0,
        reserve: Reserve | None = None,
        go_on: Callable[[], None] = lambda: None,
        is_kept: bool = True,
    ) -> Snapshot:
        """Keep what the machine is now, running or not. LimitReached where there is no room, and then nothing is kept.
        Not `is_kept`: it is the caller's alone.

        `is_live`: clients have RAM's memfd itself open, so that it has to stay what RAM is, and RAM is copied. `unseen`
        is below zero while they may write it unseen, and else another number after they may have. `go_on` is called now
        and then, and raises what gives it up.
        """
        with self._busy:
            if is_kept and name in self._snapshots:
                raise AlreadyThere(f"there is a snapshot {name} already")
            if is_kept and len(self._snapshots) >= SNAPSHOTS_MOST:
                raise LimitReached(f"a machine has up to {SNAPSHOTS_MOST} snapshots")
            if reserve is not None:
                self._reserve = reserve
            taking = _Taking(self._vm, name, unseen, go_on)
            try:
                self._begin(is_live)
                snapshot = self._take(taking)
            except BaseException:
                self._settle()
                raise
            finally:
                taking.close()
            if is_kept:
                self._snapshots[name] = snapshot
                self.last = name
            self._settle()
        return snapshot

    def begin_over(self, base: Image, copied: int, is_of_others: bool) -> None:
        """RAM is over that image, which counts as somebody else's or not; `copied` are pages of its own."""
        self.is_tracked, self._parent, self._is_of_others = True, base, is_of_others
        self._vm.take_pages()
        self._vm.note_pages(copied)

    def track(self) -> Image:
        """Have all be noted that is written to RAM from now on, which is private then, also for the reader "history" of
        the machine. An image that RAM is but for what was noted for it. Nobody may have RAM's memfd."""
        with self._busy:
            self._begin(is_live=False)
            assert self._parent is not None
            self._vm.copy_pages()
            return self._parent

    def _begin(self, is_live: bool) -> None:
        """Have all be noted that is written from now on; and have RAM over a base, unless it has to stay what it is."""
        memory = self._vm.memory
        if not self.is_tracked:
            self.is_tracked = True
            self._parent = None
            self._vm.take_pages()
        if not is_live and memory.base is None:
            self._hold(self._held + memory.size)
            memory.become_private()
            self._parent = memory.base  # what was noted before is more than what is not so

    def _take(self, taking: _Taking) -> Snapshot:
        vm, memory, parent = self._vm, self._vm.memory, self._parent
        may_be_unseen = self._is_open_to_others(taking.unseen)
        taking.begin(parent, all_of_it=may_be_unseen)
        room = self._held
        for left in range(ROUNDS_MOST, -1, -1):
            taking.go_on()
            taking.open_overlays(self._disks())
            if left and not may_be_unseen:
                pages = taking.pending | vm.take_pages()
                taking.pending = pages
                if pages.bit_count() > STILL_MOST:
                    self._hold(room + (taking.copied | pages).bit_count() * PAGE)
                    taking.copy()
                    continue
            # What the guest writes until it stands still, too.
            whole = memory.size // PAGE
            most = min(taking.copied.bit_count() + 2 * STILL_MOST, whole) if left and not may_be_unseen else whole
            self._hold(room + most * PAGE)
            if vm.at_boundary(lambda _, most=most: taking.finish(most, self._disks())).result():
                break
        else:
            raise LimitReached("the machine writes more than can be copied meanwhile")
        assert taking.snapshot is not None
        self._parent, self._news = taking.snapshot.ram, taking.news
        taking.layer.seal()
        return taking.snapshot

    def adopt(self, snapshot: Snapshot) -> None:
        """Have one that was made elsewhere."""
        with self._busy:
            if snapshot.name in self._snapshots:
                raise AlreadyThere(f"there is a snapshot {snapshot.name} already")
            self._snapshots[snapshot.name] = snapshot
            self._settle()

    def rebuild(self, snapshot: Snapshot, build: Callable[[], None]) -> None:
        """Be what the machine was then, of other parts than it has: `build` has it be a new one of those, with RAM over
        that of the snapshot. Where it fails before that, nothing has changed. Busy while it runs."""
        with self._busy:
            build()
            for one in self._snapshots.values():
                one.forget_opened()
            self._vm.go_back(snapshot, lambda: lambda: None)
            self.last = snapshot.name
            self._settle(may_ask=False)

    # ---- back to one

    def restore(self, name: str, *, unseen: Callable[[], int] = lambda: 0) -> list[tuple[int, int]]:
        """Be what the machine was then, and paused. Busy while it runs. Returns what of RAM may have changed, as
        (address, length)."""
        with self._busy:
            return [(first * PAGE, count * PAGE) for first, count in runs(self._restore(self[name], unseen))]

    def _restore(self, snapshot: Snapshot, unseen: Callable[[], int], most: int | None = None) -> int:
        """The pages that may be others now. _Longer, and nothing is done, where they are more than `most`, or nobody
        knows which they are."""
        pages = 0

        def look() -> Callable[[], None]:
            nonlocal pages
            pages = self._find_pages(snapshot.ram, unseen, most)
            return lambda: self._put_ram(snapshot.ram, pages, unseen)

        before = self._parent
        self._vm.go_back(snapshot, look)
        self.last = snapshot.name
        if before is not None and before.layers != snapshot.ram.layers:
            self._settle(may_ask=False)
        return pages

    def is_at_hand(self, snapshot: Snapshot) -> bool:
        """Whether the machine, as its parts are now, was made that before, over a base that nobody else writes."""
        return self._vm.memory.base is not None and snapshot.put_on is self._vm.engine_machine

    def restore_now(self, name: str, most: int, *, unseen: Callable[[], int] = lambda: 0) -> bool:
        """`restore`, where nothing has to be waited for, and at most so many pages are to be put. False, and nothing
        done, where it may take longer."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            self._restore(self[name], unseen, most)
        except _Longer:
            return False
        finally:
            self._busy.release()
        return True

    def _is_open_to_others(self, unseen: Callable[[], int]) -> bool:
        """Whether RAM may have been written by somebody who did not tell."""
        return self._vm.memory.base is None and (unseen() < 0 or unseen() != self._news)

    def _find_pages(self, image: Image, unseen: Callable[[], int], most: int | None) -> int:
        """The pages that may be others in `image`; with the machine's lock."""
        vm, memory, parent = self._vm, self._vm.memory, self._parent
        assert parent is not None
        pages = vm.look_at_pages() | image.differs(parent)
        if self._is_open_to_others(unseen):
            if most is not None:
                raise _Longer
            for start, end in (*memory.extents(), *image.extents()):
                pages |= bits(start // PAGE, (end - start) // PAGE)
        if most is not None and pages.bit_count() > most:
            raise _Longer
        return pages

    def _put_ram(self, image: Image, pages: int, unseen: Callable[[], int]) -> None:
        """With the machine's lock."""
        self._vm.memory.put(pages, image)
        self._vm.have_written(pages)
        self._parent, self._news = image, unseen()

    # ---- forgetting

    def drop(self, name: str) -> None:
        with self._busy:
            self[name]
            del self._snapshots[name]
            if self.last == name:
                self.last = None
            self._find_parent()
            self._settle()

    def _find_parent(self) -> None:
        """Have RAM differ from an image that is there for another reason, too: the one that is nearest."""
        images, base = [one.ram for one in self._snapshots.values()], self._vm.memory.base
        if base is not None:
            images.append(base)
        if images and (parent := self._parent) is not None and all(parent is not one for one in images):
            nearest = min(images, key=lambda one: one.differs(parent).bit_count())
            self._vm.note_pages(nearest.differs(parent))
            self._parent = nearest

    def close(self) -> None:
        self._snapshots = {}
        self._parent = None

    # ---- room

    def _settle(self, *, may_ask: bool = True) -> None:
        """Hold what is there, after something has come or gone. A base counts as much as RAM: what is over it is RAM.
        """
        memory, snapshots = self._vm.memory, list(self._snapshots.values())
        under = set() if memory.base is None else set(memory.base.layers)
        images = [one.ram for one in snapshots] + [one.record.ram for one in snapshots if one.record is not None]
        layers = {layer for one in images for layer in one.layers}
        if self._parent is not None:
            layers.update(self._parent.layers)
        total = (memory.size if under and not self._is_of_others else 0) + sum(layer.taken for layer in layers - under)
        total += sum({kept: kept.size for one in snapshots for kept in one.files()}.values())
        total += sum(2 * len(one.encoded) for one in snapshots)
        if may_ask or total < self._held:
            with contextlib.suppress(VmfsError):  # it is there all the same; whoever asks next is told
                self._hold(total)

    def _hold(self, size: int) -> None:
        wanted = -(-size // _ROOM_STEP) * _ROOM_STEP
        if wanted != self._held:
            self._reserve(wanted - self._held)
            self._held = wanted

    def _disks(self) -> dict[str, Overlay]:
        """Those that are cow."""
        return {name: disk for name, disk in self._vm.disks() if isinstance(disk, Overlay)}


class _Taking:
    """A snapshot on its way: a layer of what differs from `parent`, and new files for what is written to disks."""

    def __init__(self, vm: Whole, name: str, unseen: Callable[[], int], go_on: Callable[[], None]) -> None:
        self.go_on = go_on
        self._vm = vm
        self._name = name
        self.unseen = unseen
        self.news = 0
        self.pending = self.copied = 0  # pages
        self.snapshot: Snapshot | None = None
        self._overlays: dict[str, int] = {}
        self._all_of_it = False

    def begin(self, parent: Image | None, *, all_of_it: bool) -> None:
        """`all_of_it`: nobody has noted all that was written; it has to be looked for."""
        end = self._vm.memory.end
        self._parent, self._all_of_it = parent, all_of_it
        fd = os.memfd_create("vmfs-snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.layer = Layer(fd, None if parent is None else 0)
        os.ftruncate(fd, end)
        if parent is None:
            self.pending = self._touched()

    def _touched(self) -> int:
        found = 0
        for start, end in self._vm.memory.extents():
            found |= bits(start // PAGE, (end - start) // PAGE)
        return found

    def open_overlays(self, disks: dict[str, Overlay]) -> None:
        for name, disk in disks.items():
            if disk.is_written and name not in self._overlays:
                self._overlays[name] = disk.new_file()

    def copy(self, still: bool = False) -> None:
        """What is pending. `still`: the machine stands still for it."""
        view = self._vm.memory.mapping.view
        for first, count in runs(self.pending):
            at, end = first * PAGE, (first + count) * PAGE
            while at < end:
                if not still:
                    self.go_on()
                at += os.pwrite(self.layer.fd, view[at : min(at + _COPIED, end)], at)
        self.copied |= self.pending
        self.pending = 0

    def finish(self, most: int, disks: dict[str, Overlay]) -> bool:
        """Between two instructions, with the machine's lock: what there is left to copy, and all else. False where it
        is more than there is room for."""
        vm, began = self._vm, time.perf_counter_ns()

        def rest() -> bool:
            if any(disk.is_written and name not in self._overlays for name, disk in disks.items()):
                return False
            self.pending |= vm.look_at_pages()
            if self._all_of_it:
                self.pending |= self._touched() if self._parent is None else self._different(self._parent)
            if (self.copied | self.pending).bit_count() > most:
                return False
            self.copy(still=True)
            for name, disk in disks.items():
                frozen[name] = disk.freeze(lambda name=name: self._overlays.pop(name))  # type: ignore[misc]
            return True

        frozen: dict[str, Frozen] = {}

        taken = take_with(vm, rest)
        if taken is None:
            return False
        if self.layer.pages is not None:
            self.layer.pages = self.copied
        if self._parent is None:
            ram = Image((self.layer,), vm.memory.end)
        else:
            ram = self._parent.over(self.layer) if self.copied else self._parent
        self.snapshot = Snapshot(
            name=self._name,
            state=taken,
            engine=vm.engine,
            ram=ram,
            rom=vm.rom,
            images=vm.images.keep(),
            overlays=frozen,
            taken_ns=time.time_ns(),
            instructions=vm.count_instructions(),
            memory_size=vm.memory.size,
            encoded=taken.encode(),
            still_ns=time.perf_counter_ns() - began,
            rw_disks=tuple(name for name, disk in vm.disks() if disk.mode == "rw"),
            record=vm.history.record() if vm.history is not None else None,
        )
        vm.forget_pages()
        self.news = self.unseen()
        return True

    def _different(self, parent: Image) -> int:
        """The pages that are not as they were, found by looking at all of them."""
        found, view = 0, self._vm.memory.mapping.view
        for start, end in self._vm.memory.extents():
            for at in range(start, end, _COMPARED):
                stop = min(at + _COMPARED, end)
                then = parent.read(at, stop - at)
                if view[at:stop] == then:
                    continue
                for page in range(at, stop, PAGE):
                    if view[page : page + PAGE] != then[page - at : page - at + PAGE]:
                        found |= 1 << page // PAGE
        return found

    def close(self) -> None:
        for fd in self._overlays.values():
            os.close(fd)
