"""History: the past of a machine, kept while it runs: checkpoints, and the inputs between them (docs/decisions/0015).

A *checkpoint* is the machine between two instructions: its state as a value, RAM as an image of layers, the overlays of
its disks. A *stretch* is a part of the past in which all that came from outside is a recorded input
(`vmfs.devices.inputs`): from a checkpoint on, the machine does again what it did. Whatever else is changed from outside
(registers, memory, an answer to an access) ends a stretch; the next run begins another one, with a checkpoint.

Places are counts of instructions, the sum of those of all CPUs. The place N is the first moment at which N are done,
before any interrupt that is delivered then.

The machine is *in the past* once it was put back to an earlier place (`vmfs.machine.travel`). A run there does again
what was done, and gives nothing to the host that it has had; where the record ends it goes on live. When something
new comes from outside, the machine's future is forgotten.

Locks: what is here is done with the machine's lock, between two instructions, unless it says otherwise.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vmfs.devices.inputs import Mark
from vmfs.devices.virtio.disk import Frozen, Overlay, merge
from vmfs.engine.base import Capability, Runner
from vmfs.engine.rest import passed_no_stop
from vmfs.machine.cpu import Cpu
from vmfs.machine.record import Record
from vmfs.machine.state import Opened, Parts
from vmfs.memory.layers import Image, Layer, runs
from vmfs.memory.ram import PAGE
from vmfs.words import exits
from vmfs.words.errors import Busy, Invalid, Unsupported, VmfsError

MEMORY = 512 << 20  # bytes of checkpoints, where nobody says how many
MEMORY_LEAST = 16 << 20
EVERY = 0.05  # seconds of running between two checkpoints, where nobody says how many
EVERY_LEAST, EVERY_MOST = 0.002, 60.0
CHECKPOINTS_MOST = 192
_SHARE = 0.07  # of the time of a run, that checkpoints may take
_PLACES_MOST = 64  # that are told of
_INPUTS_NEAR = 48, 16  # that are told of, before now and after it
_INPUT_SHOWN = 16  # bytes of one
_EXITS_MOST = 1024  # of a stretch, that are kept
_NEW = 8  # checkpoints that are kept however near they are
_DENSITY = 8  # checkpoints that are `d` ago are at least d / 8 apart
_PACE = 0.01  # seconds after which a machine whose time is the host's is told how much has passed
_AHEAD = 50_000_000  # nanoseconds by which it may be early


@dataclass(eq=False)
class Stretch:
    """`cpu`: the only one that executes in it, of several. `end`: the place where it ends; None while it goes on.
    `exits`: by their place, those that came with no instruction done: reads that wait for data, faults that shut down.
    All others come by themselves when what led to them is done again. `before`: the exit that the machine stood at when
    somebody made it another one."""

    cpu: int | None
    end: int | None = None
    before: exits.Exit | None = None
    exits: dict[int, tuple[exits.Exit, ...]] = field(default_factory=dict)


@dataclass(eq=False)
class Checkpoint:
    """`mark`: how much of what is recorded had come. `after_event`: it is not the first moment of its place: an
    interrupt or an exception was delivered there. `is_first`: of its stretch, which cannot be repeated without it."""

    place: int
    of_cpus: tuple[int, ...]  # the instructions of each
    after_event: bool
    stretch: Stretch
    is_first: bool
    parts: Parts
    ram: Image
    overlays: dict[str, Frozen]
    mark: Mark
    size: int  # bytes of the state


class History:
    """Of one machine, a `vmfs.machine.recorded.Recorded`, from `start` to `stop`."""

    def __init__(self, vm: Any, memory: int = MEMORY, every: float = EVERY) -> None:
        self.check(memory, every)
        self._vm = vm
        self.memory, self.every = memory, every
        self.checkpoints: list[Checkpoint] = []
        self.in_past = False
        self.changed = True  # by somebody outside, since the present stretch: the next run begins another
        self.said = ""  # what became of the record last, in a sentence
        self.at_begin = False  # the last journey came to the begin, and not where it was to go
        self.is_travelling = False
        self.is_executing = False  # tasks are done between two instructions of a run
        self._stretch = Stretch(None, end=0)
        self._came_to: tuple[Stretch, int] | None = None  # the stretch and place of one of its exits, where it stands
        self._parent: Image | None = None  # what RAM is but for the pages that are noted
        self._follows_host = False
        self._host_origin = 0  # the host's clock less the guest's time, while it runs
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._cost, self._taken_at = 0.0, 0.0
        self.released: Callable[[], None] = lambda: None  # called at the end

    @staticmethod
    def check(memory: int, every: float) -> None:
        """Invalid for what none can have."""
        if memory < MEMORY_LEAST:
            raise Invalid(f"history: {MEMORY_LEAST >> 20}M of memory are the least")
        if not EVERY_LEAST <= every <= EVERY_MOST:
            raise Invalid(f"history: checkpoints are {EVERY_LEAST * 1000:g} ms to {EVERY_MOST:g} s apart")

    def text(self) -> str:
        """The file `history`."""
        now = self.count()
        lines = [
            f"on memory={self.memory} every={self.every * 1000:g}ms",
            f"from {self.begin}",
            f"to {self.end}",
            f"now {now}",
            f"checkpoints {len(self.checkpoints)}",
            f"bytes {self.bytes()}",
            f"past {'yes' if self.in_past else 'no'}",
            " ".join(["places", *map(str, self._places())]),
            *self._inputs(),
            *([f"note {self.said}"] if self.said else []),
        ]
        return "".join(f"{line}\n" for line in lines)

    def _inputs(self) -> list[str]:
        """A line each of what came from outside just before now, and comes next."""
        if self._vm.board is None:
            return []
        near = self._vm.board.inputs.near(*_INPUTS_NEAR)
        return [
            f"input {'-' if place is None else place} {one.taker} {one.kind} {_shown(one.data)}".rstrip()
            for place, one in near
        ]

    def _places(self) -> list[int]:
        """Where checkpoints are: all, or so many of them that a line has."""
        places = [one.place for one in self.checkpoints]
        return places[:: -(-len(places) // _PLACES_MOST) or 1]

    # ---- on and off

    def start(self, record: Record | None = None) -> None:
        """Unsupported with a sentence where the machine cannot be recorded, and nothing has changed. `record`: its past
        up to here, but for what somebody has changed since; Invalid where it cannot be that. Without the lock, while it
        stands."""
        vm = self._vm
        with vm.idle():
            self._check()
            begun = self._checkpoint_of(record) if record is not None else None
        self._parent = vm.past.track()
        with vm.idle():
            if vm.history is not None:
                raise Busy("history: it is on already")
            self._follows_host = vm.time_source == "host"
            vm.begin_repeating(from_host=self._follows_host)
            if vm.board is not None:
                try:
                    with vm.board.lock:
                        vm.board.inputs.record(record.inputs if record is not None else ())
                        vm.board.inputs.before_new, vm.board.inputs.place = self._before_new, self.count
                except BaseException:
                    vm.end_repeating(to_host=self._follows_host)
                    raise
            vm.history = self
            if begun is not None:
                self.checkpoints, self._stretch = [begun], begun.stretch
        self._thread = threading.Thread(target=self._keep, name="vmfs-history", daemon=True)
        self._thread.start()

    def _checkpoint_of(self, record: Record) -> Checkpoint:
        vm = self._vm
        if record.end != self.count():
            raise Invalid(f"history: the machine is at {self.count()}, and its record ends at {record.end}")
        parts = Opened(vm, record.state).parts
        if vm.board is not None:
            vm.board.inputs.check_recorded(record.inputs)
        elif record.inputs:
            raise Invalid("history: a bare machine has no inputs")
        if record.overlays.keys() != {name for name, _ in self._disks()}:
            raise Invalid("history: the record is of a machine with other disks")
        for name, disk in self._disks():
            if record.overlays[name].size != disk.size:
                raise Invalid(f"history: {name} is a disk of another size")
        return Checkpoint(
            place=record.place,
            of_cpus=record.of_cpus,
            after_event=record.after_event,
            stretch=Stretch(record.cpu, record.end, exits=dict(record.exits)),
            is_first=True,
            parts=parts,
            ram=record.ram,
            overlays=record.overlays,
            mark=Mark(),
            size=parts.size,
        )

    def record(self) -> Record | None:
        """What led to what the machine is now, but for what was changed since; None where that is not known. Between
        two instructions."""
        kept = [one for one in self.checkpoints if one.stretch is self._stretch]
        if not kept:
            return None
        first, board = kept[0], self._vm.board
        inputs = () if board is None else board.inputs.since(first.mark)
        if inputs is None:  # what a folder has answered comes from no file
            return None
        return Record(
            cpu=self._stretch.cpu,
            of_cpus=first.of_cpus,
            after_event=first.after_event,
            end=self.count(),
            state=first.parts.state(),
            ram=first.ram,
            overlays={name: Frozen(one.files, one.size) for name, one in first.overlays.items()},
            inputs=inputs,
            exits={at: there for at, there in self._stretch.exits.items() if at <= self.count()},
        )

    def _check(self) -> None:
        vm = self._vm
        if Capability.DETERMINISTIC not in vm.capabilities:
            raise Unsupported(
                f"history: {vm.engine.name} does not repeat what it has done: `echo emulator > engine` carries the"
                " machine over to one that does"
            )
        for name, disk in vm.disks():
            if disk.mode == "rw":
                raise Unsupported(f"history: what the file of disk {name} holds cannot be taken back: attach it cow")

    def stop(self) -> None:
        """The machine goes on from where it is. Without the lock, while it stands."""
        vm = self._vm
        with vm.idle():
            if vm.history is not self:
                return
            self._end()
        self._join()

    def close(self) -> None:
        """The machine is gone. Without its lock."""
        self._ended.set()
        self._join()
        self.checkpoints = []

    def _end(self) -> None:
        vm = self._vm
        self._become_live()
        if vm.board is not None:
            with vm.board.lock:
                vm.board.inputs.stop()
                vm.board.inputs.before_new, vm.board.inputs.place = lambda: None, lambda: 0
        vm.end_repeating(to_host=self._follows_host)
        vm.history = None
        self.checkpoints, self._parent = [], None
        self._ended.set()
        self.released()

    def _join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def follows_host(self) -> bool:
        """The machine's time is the host's for a caller that looks at it."""
        return self._follows_host

    # ---- where it is

    def count(self) -> int:
        """The place where the machine is."""
        return sum(self.counts())

    def counts(self) -> tuple[int, ...]:
        return tuple(vcpu.counters()["instructions"] for vcpu in self._vm.vcpus)

    def took_event(self) -> bool:
        """Whether it is not at the first moment of its place."""
        return any(vcpu.took_event for vcpu in self._vm.vcpus)

    @property
    def begin(self) -> int:
        return self.checkpoints[0].place if self.checkpoints else self.count()

    @property
    def end(self) -> int:
        """Where the record ends: the present, or where it was before the machine went back."""
        stretch = self.checkpoints[-1].stretch if self.checkpoints else self._stretch
        return stretch.end if self.in_past and stretch.end is not None else self.count()

    def index(self) -> int:
        """Of the last checkpoint before where it is."""
        place, found, is_there = self.count(), 0, False
        for number, one in enumerate(self.checkpoints):
            is_its = one.stretch is self._stretch
            if (is_there and not is_its) or (is_its and one.place > place):
                break
            found, is_there = number, is_its
        return found

    def bytes(self) -> int:
        layers = {layer for one in self.checkpoints for layer in one.ram.layers}
        if self._vm.memory.base is not None:
            layers -= set(self._vm.memory.base.layers)
        return sum(layer.taken for layer in layers) + sum(one.size for one in self.checkpoints) + self._inputs_size()

    def _inputs_size(self) -> int:
        return 0 if self._vm.board is None else self._vm.board.inputs.size

    # ---- runs

    def begin_run(self, cpu: int | None) -> None:
        """In the CPU's thread, before the guest first runs in a run of that CPU alone, or of all. Without the lock."""
        vm = self._vm
        cpu = cpu if len(vm.cpus) > 1 else None
        with vm.lock:
            if self.changed or self._stretch.cpu != cpu or not self.checkpoints:
                self.forget_future()
                self.begin_stretch(cpu)
            self._set_pace()
            self.is_executing = True

    def end_run(self) -> None:
        """The guest last ran in a run."""
        self.is_executing = False

    def _set_pace(self) -> None:
        """The host's clock and the guest's time begin to go together here."""
        vm = self._vm
        vm.set_paced(self._follows_host and not self.in_past)
        self._host_origin = time.monotonic_ns() - self._guest_time()

    def _guest_time(self) -> int:
        return 0 if self._vm.board is None else self._vm.board.now()

    def begin_stretch(self, cpu: int | None) -> None:
        """The machine is as somebody has made it: what comes is recorded from here on."""
        if self.checkpoints:
            self._stretch.end = self.count()
        self._stretch = Stretch(cpu, before=self._vm.noted_exit)
        self.take(is_first=True)
        self.changed = False

    def after_tasks(self, cpu: int | None) -> None:
        """Tasks were done in the middle of a run."""
        if self.changed and self.checkpoints and not self.is_travelling:
            self.forget_future()
            self.begin_stretch(cpu if len(self._vm.cpus) > 1 else None)

    def left(self) -> int | None:
        """How many instructions there are to the end of the stretch, which the machine does again; None: it does new
        ones. In the CPU's thread."""
        if not self.in_past:
            return None
        assert self._stretch.end is not None
        return max(self._stretch.end - self.count(), 0)

    def pass_end(self, cpu: int | None) -> bool:
        """The machine has done again all of a stretch: the next one, or live. False: it is to come to an exit before
        that, with no instruction done. In the CPU's thread, without the lock."""
        with self._vm.lock:
            here = self._stretch, self.count()
            if here[1] in self._stretch.exits and self._came_to != here:
                return False
            following = self._after(self._stretch)
            if following is None:
                self._become_live()
                self._set_pace()
            elif following.stretch.cpu != (cpu if len(self._vm.cpus) > 1 else None):
                self.forget_future()
                self._set_pace()
            else:
                self.go_to(following)
        return True

    def arrive(self) -> None:
        """A run has ended: at the end of the record the machine is live."""
        if self.is_at_end():
            self._become_live()
            self._set_pace()

    def is_at_end(self) -> bool:
        """It is in the past, and has done again all that there is."""
        return self.in_past and self._stretch is self.checkpoints[-1].stretch and self.left() == 0

    def note_exit(self, exit_: exits.Exit) -> None:
        """A run has come to that."""
        place, kept = self.count(), self._stretch.exits
        before = kept.get(place, ())
        is_known = any(is_same(exit_, one) for one in before)
        reads = isinstance(exit_, exits.Io | exits.Mmio) and exit_.direction in ("in", "read")
        is_new = not self.in_past and exit_ is not self._stretch.before and not is_known
        if is_new and (reads or isinstance(exit_, exits.Shutdown)):
            kept[place], is_known = (*before, exit_), True
            if len(kept) > _EXITS_MOST:
                del kept[next(iter(kept))]
        self._came_to = (self._stretch, place) if is_known else None

    def _after(self, stretch: Stretch) -> Checkpoint | None:
        is_there = False
        for one in self.checkpoints:
            if is_there and one.stretch is not stretch:
                return one
            is_there = is_there or one.stretch is stretch
        return None

    def _become_live(self) -> None:
        if not self.in_past:
            return
        board = self._vm.board
        if board is not None:
            board.drain()
            board.is_silent = False
        self.in_past = False
        self._stretch.end = None

    def forget_future(self) -> None:
        """What was recorded after this is no more; the machine goes on live."""
        if not self.in_past:
            return
        end, last = self.end, self.index()
        del self.checkpoints[last + 1 :]
        kept = self._stretch.exits
        self._stretch.exits = {place: kept[place] for place in kept if place <= self.count()}
        self._become_live()
        if self._vm.board is not None:
            with self._vm.board.lock:
                self._vm.board.inputs.forget_coming()
        self.said = f"the future from {self.count()} to {end} was forgotten: something new came from outside"
        self._compact()

    def _before_new(self) -> None:
        """An input is about to get its time. In the CPU's thread, with the board's lock and without the machine's."""
        if self.in_past and not self.is_travelling:
            self.forget_future()
            self._set_pace()

    def enter_past(self) -> None:
        """The machine is about to be put elsewhere."""
        if self.in_past:
            return
        self._stretch.end = self.count()
        self.in_past = True
        board = self._vm.board
        if board is not None:
            board.drain()
            board.is_silent = True
        self._vm.set_paced(False)

    # ---- checkpoints

    def take(self, *, is_first: bool = False) -> Checkpoint:
        """Keep what the machine is."""
        vm = self._vm
        began = time.thread_time()
        pages = vm.written_since("history")
        layer = Layer(os.memfd_create("vmfs-history", os.MFD_CLOEXEC), pages)
        overlays: dict[str, Frozen] = {}

        def rest() -> None:
            os.ftruncate(layer.fd, vm.memory.end)
            view = vm.memory.mapping.view
            for first, count in runs(pages):
                at, end = first * PAGE, (first + count) * PAGE
                while at < end:
                    at += os.pwrite(layer.fd, view[at:end], at)
            for name, disk in self._disks():
                overlays[name] = disk.freeze(lambda: os.memfd_create("vmfs-history", os.MFD_CLOEXEC))

        parts = Parts.of(vm, rest)
        assert self._parent is not None
        ram = self._parent.over(layer) if pages else self._parent
        vm.forget_written("history")
        self._parent = ram
        for values in parts.cpus:  # a stop that a run was to pass is no matter of the past
            values["progress"] = passed_no_stop(values["progress"])
        counts = self.counts()
        one = Checkpoint(
            place=sum(counts),
            of_cpus=counts,
            after_event=self.took_event(),
            stretch=self._stretch,
            is_first=is_first,
            parts=parts,
            ram=ram,
            overlays=overlays,
            mark=Mark() if vm.board is None else vm.board.inputs.mark,
            size=parts.size,
        )
        at = self.index() + 1 if self.in_past and not is_first else len(self.checkpoints)
        self.checkpoints.insert(at, one)
        self._taken_at = time.thread_time()
        self._thin()
        self._cost = time.thread_time() - began
        return one

    def go_to(self, checkpoint: Checkpoint) -> None:
        """Be what the machine was then. In the past: `enter_past` was called."""
        vm = self._vm
        assert self._parent is not None
        pages = vm.written_since("history") | checkpoint.ram.differs(self._parent)

        def put_memory() -> None:
            vm.memory.put(pages, checkpoint.ram)
            for name, disk in self._disks():
                disk.go_back(checkpoint.overlays[name])

        vm.put_in_past(checkpoint.parts, put_memory)
        vm.put_back(pages)
        self._parent = checkpoint.ram
        self._stretch = checkpoint.stretch
        self.changed = False
        if vm.board is not None:
            with vm.board.lock:
                vm.board.inputs.rewind(checkpoint.mark)
                vm.board.look_soon()

    def restart(self, ram: Image) -> None:
        """The machine is another one than what was recorded led to, and RAM is that: begin anew with the next run."""
        was_past, board = self.in_past, self._vm.board
        self._become_live()
        if board is not None:
            with board.lock:
                if was_past:
                    board.inputs.forget_coming()
                board.inputs.forget_first(board.inputs.mark)  # no checkpoint is left to go on from
        self._vm.forget_written("history")
        self.checkpoints, self._parent, self.changed = [], ram, True

    def _disks(self) -> Iterable[tuple[str, Overlay]]:
        return ((name, disk) for name, disk in self._vm.disks() if isinstance(disk, Overlay))

    # ---- which are kept

    def _thin(self) -> None:
        """Those long ago are further apart; where memory or number are too much, the oldest go."""
        kept = self.checkpoints
        now = self.count()
        number = len(kept) - _NEW - 1
        dropped = False
        while number > 0:
            before, one, after = kept[number - 1 : number + 2]
            if not one.is_first and (after.place - before.place) * _DENSITY < now - one.place:
                del kept[number]
                dropped = True
            number -= 1
        if dropped:
            self._compact()
        while self._inputs_size() > self.memory // 2 and len(kept) > 2 and self._drop_first():
            self._compact()
        while len(kept) > 2 and (len(kept) > CHECKPOINTS_MOST or self.bytes() > self.memory):
            if not self._drop_one():
                break
            self._compact()

    def _drop_one(self) -> bool:
        """The one that is missed least; the oldest one where none can be left out between others."""
        kept = self.checkpoints
        here = self.index()
        free = [at for at in range(1, len(kept) - 1) if not kept[at].is_first and at != here]
        if len(free) > _NEW:
            now = self.count()

            def loss(at: int) -> float:
                return (kept[at + 1].place - kept[at - 1].place) / (abs(now - kept[at].place) + 1)

            del kept[min(free, key=loss)]
            return True
        return self._drop_first()

    def _drop_first(self) -> bool:
        """The oldest one, with what was recorded before the next."""
        kept = self.checkpoints
        if self.index() == 0:
            return False
        del kept[0]
        if self._vm.board is not None:
            first = kept[0].mark
            with self._vm.board.lock:
                self._vm.board.inputs.forget_first(first)
            for one in kept:
                one.mark = Mark(one.mark.inputs - first.inputs, one.mark.answers - first.answers)
        return True

    def _compact(self) -> None:
        """Have a layer that nobody needs apart be one with the layer over it."""
        images = [one.ram for one in self.checkpoints]
        if self._parent is not None:
            images.append(self._parent)
        above: dict[Layer, set[Layer | None]] = {}
        for image in images:
            for layer, over in zip(image.layers, (*image.layers[1:], None), strict=True):
                above.setdefault(layer, set()).add(over)
        mine = {layer for layer in above if layer.pages is not None and not layer.is_sealed}
        gone: set[Layer] = set()
        for layer in [layer for image in images for layer in image.layers]:
            if layer in gone or layer not in mine or len(above[layer]) != 1:
                continue
            (over,) = above[layer]
            if over is not None and over in mine and over not in gone:
                over.absorb(layer)
                gone.add(layer)
        self._compact_disks()
        if gone:
            changed: dict[Image, Image] = {}
            for image in images:
                changed[image] = Image((layer for layer in image.layers if layer not in gone), image.end)
            for one in self.checkpoints:
                one.ram = changed[one.ram]
            if self._parent is not None:
                self._parent = changed[self._parent]

    def _compact_disks(self) -> None:
        for name, disk in self._disks():
            merge([one.overlays[name] for one in self.checkpoints], disk)

    # ---- the thread that keeps it

    def _keep(self) -> None:
        vm = self._vm
        while not self._ended.wait(min(_PACE, self.every) if self._follows_host else self.every):
            if not vm.is_in_run or self.in_past or self.is_travelling:
                continue
            try:
                vm.at_boundary(lambda _: self._tick()).result()
            except VmfsError:
                continue  # the next run says what is wrong

    def _spacing(self) -> float:
        return max(self.every, self._cost / _SHARE)

    def _tick(self) -> None:
        """In the CPU's thread."""
        vm = self._vm
        if vm.history is not self or self.in_past or self.changed or self.is_travelling or not vm.is_in_run:
            return
        if self._follows_host and vm.board is not None:
            with vm.board.lock:
                late = time.monotonic_ns() - self._host_origin - vm.board.now()
                if late > 0:
                    vm.board.inputs.note_passing(late)
                elif late < -_AHEAD:
                    self._host_origin += late + _AHEAD
        if not 0 <= time.thread_time() - self._taken_at < self._spacing():  # another thread has taken it, or long ago
            self.take()

    # ---- who runs it

    def runner(self, stretch: Stretch) -> tuple[Runner, tuple[Cpu, ...]]:
        vm = self._vm
        if stretch.cpu is not None:
            cpu = vm.cpus[stretch.cpu]
            return cpu.vcpu, (cpu,)
        return vm.in_turn(), tuple(vm.cpus)

    @property
    def stretch(self) -> Stretch:
        return self._stretch


def _shown(data: bytes) -> str:
    """In hexadecimal; of many, the first, and how many there are."""
    return data.hex() if len(data) <= _INPUT_SHOWN else f"{data[:_INPUT_SHOWN].hex()}... {len(data)}"


def is_same(one: exits.Exit, other: exits.Exit | None) -> bool:
    """Of one place."""
    return type(one) is type(other) and all(
        getattr(one, name, None) == getattr(other, name, None) for name in ("rip", "cpu", "direction", "cause")
    )
