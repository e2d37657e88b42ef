"""The few kinds of behaviour that files have: text, binary state, bytes of an access, runs, interrupts.

A kind is a value in CONTENTS (table.py). It gets its machine as `scope`.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.engine.base import INTERRUPT_QUEUE, MACHINE_STATES, Vcpu
from vmfs.machine.files.commands import parse_bound, parse_command
from vmfs.machine.files.handles import POLL_IN, POLL_OUT, POLL_PRI, File, Handle, Kind
from vmfs.machine.files.lines import Do, LineHandle
from vmfs.machine.files.request import interruptible, is_nonblocking
from vmfs.machine.files.waiting import finished, settled, value_of
from vmfs.machine.runloop import UNBOUND, Bound, Run
from vmfs.words import exits, layouts
from vmfs.words.errors import Busy, Gone, Interrupted, Invalid, LimitReached, PastEnd, VmfsError, WouldBlock, known

STOP_SECONDS = 1.0  # how long a caller that was signalled is kept while its guest stops
QUEUE_LOOK_SECONDS = 0.02
# A run to the next port access takes some 20 us, and sleeping in trio until its end 150. So one that is
# expected to be short is waited for on the spot for a moment, as an ioctl is.
SHORT_SECONDS = 200e-6
LONG_SECONDS = 1e-3  # what takes so long does not make one expect a short run


# ---- text


@dataclass(frozen=True)
class Text(Kind):
    """`get(scope)` gives the text (or bytes); it may be or return a Future or a coroutine. `put(scope, text)` parses
    one, changes nothing, and returns what does it (`vmfs.machine.files.lines.Do`). `news(scope)` is a number that
    changes when a poll should return: without it the file is always ready.

    The size is that of what `get` gives, unless `room(scope)` knows it, or it is always `width`. `of_cpu`: `get` asks
    a CPU, which would have to stop for it. `slow`: the size is kept while nothing happens to the machine. `peek` is
    `get` for a reader of whole directories, where `get` takes something away.
    """

    get: Callable[[Any], Any] | None = None
    put: Callable[[Any, str], Do] | None = None
    news: Callable[[Any], int] | None = None
    room: Callable[[Any], int] | None = None
    width: int | None = None
    peek: Callable[[Any], Any] | None = None
    of_cpu: bool = False
    slow: bool = False
    whole: bool = False  # as of LineHandle, and so the next two
    acts: bool = False
    continues: bool = False
    symbolic: bool = False  # addresses may stand in it, as FILE:LINE

    @property
    def reading_acts(self) -> bool:  # type: ignore[override]
        return self.peek is not None

    @property
    def readable(self) -> bool:  # type: ignore[override]
        return self.get is not None

    @property
    def writable(self) -> bool:  # type: ignore[override]
        return self.put is not None

    def size(self, scope: Any) -> int | None:
        if self.get is None:
            return 0
        return self.room(scope) if self.room else self.width

    async def measure(self, scope: Any) -> int:
        if (self.of_cpu or self.slow) and scope.vm.state == "running":
            return 0
        if self.slow:
            return await scope.kept_size(self, self._length)
        return await self._length(scope)

    async def _length(self, scope: Any) -> int:
        assert self.get
        try:
            return len(_encoded(await settled(self.get(scope), scope)))
        except Gone:
            raise
        except VmfsError as error:  # reading fails, too
            if isinstance(known(error), LimitReached):
                raise
            return 0

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _TextHandle(node, nonblocking, writing, self)


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class _TextHandle(LineHandle):
    """A read from offset 0 takes a snapshot, others go on in it. What is written is parsed, at any offset."""

    def __init__(self, node: File, nonblocking: bool, writing: bool, kind: Text) -> None:
        super().__init__(node, nonblocking, writing)
        self._kind = kind
        self.whole, self.acts, self.continues = kind.whole, kind.acts, kind.continues
        self._snapshot: bytes | None = None
        self._seen = 0

    async def read(self, offset: int, size: int) -> bytes:
        assert self._kind.get
        if offset == 0 or self._snapshot is None:
            still = self.scope.vm.still if self._kind.news else None
            news = self._kind.news(self.scope) if self._kind.news else 0  # what comes later is news again
            get = self._kind.peek if self.walking and self._kind.peek else self._kind.get
            self._snapshot = _encoded(await value_of(get(self.scope), self))
            self._seen = news
            if still is not None:
                self.scope.vm.publish(self.node.name, self._snapshot, still, news)
        return self._snapshot[offset : offset + size]

    def ends(self, offset: int) -> bool:
        return self._snapshot is not None and offset >= len(self._snapshot)

    async def prepare(self, text: str) -> None:
        if self._kind.symbolic:
            await value_of(self.scope.learn_lines(text), self)

    def parse(self, text: str) -> Do:
        assert self._kind.put
        return self._kind.put(self.scope, text)

    def sees(self, news: int) -> None:
        self._seen = max(self._seen, news)

    def poll(self) -> int:
        out = POLL_OUT if self._kind.put else 0
        if self._kind.news is None:
            return POLL_IN | out
        if self._kind.news(self.scope) == self._seen:
            return out
        self.scope.vm.unpublish()  # so that a read now sees these news
        return out | POLL_IN | POLL_PRI


# ---- state


@dataclass(frozen=True)
class State(Kind):
    """A state of the CPU or the machine, as the bytes of its KVM UAPI struct.

    A struct that is a list (`layouts.ENTRIES`) may be written whole with another count. `still`: it changes only when
    the CPU runs or is set, not with time.
    """

    name: str
    still: bool = False
    writable = True

    def size(self, scope: Any) -> int:
        return scope.state_size(self.name)

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _StateHandle(node, nonblocking, self)

    def is_whole(self, data: bytes) -> bool:
        """Whether `data` is such a list with its entries."""
        return self.name in layouts.ENTRIES and layouts.is_whole_list(self.name, data)


class _StateHandle(Handle):
    """Every read samples the state anew; a write changes just its bytes."""

    def __init__(self, node: File, nonblocking: bool, kind: State) -> None:
        super().__init__(node, nonblocking)
        self._kind = kind
        self._of_machine = kind.name in MACHINE_STATES
        self._blob = b""
        self._at: object | None = None  # the `Vm.still` of the blob

    async def read(self, offset: int, size: int) -> bytes:
        at = self.scope.vm.still
        if at is None or at is not self._at:
            self._blob = await value_of(self.scope.sample(self._kind.name), self)
            self._at = at if self._kind.still else None
            self.scope.vm.publish(self._kind.name, self._blob, self._at)
        return self._blob[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> int:
        vm, name, end = self.scope.vm, self._kind.name, offset + len(data)
        if vm.state != "running":  # then it is Busy
            # Before `change`, which completes a pending access, and so would not leave all as it was.
            size = len(self.scope.sample(name).result())
            if end > size and not self._is_whole(offset, data):
                raise PastEnd(f"{name}: byte {end} is past its {size}")
        if self._of_machine:
            vm.change_machine_state(self._kind.name, lambda old: self._new(old, offset, data))
        else:
            vm.change(lambda cpu: self._set(cpu, offset, data))
        return len(data)

    def _set(self, cpu: Vcpu, offset: int, data: bytes) -> None:
        name = self._kind.name
        cpu.set_state(name, self._new(lambda: cpu.get_state(name), offset, data))

    def _is_whole(self, offset: int, data: bytes) -> bool:
        return offset == 0 and self._kind.is_whole(data)

    def _new(self, old: Callable[[], bytes], offset: int, data: bytes) -> bytes:
        """The state with `data` at `offset`."""
        if self._is_whole(offset, data):
            self.scope.forget_size(self._kind.name)
            return data
        blob = old()
        return blob[:offset] + data + blob[offset + len(data) :]


# ---- the pending access


@dataclass(frozen=True)
class AccessData(Kind):
    """The bytes of the pending access."""

    writable = True

    def size(self, scope: Any) -> int:
        return len(scope.vm.access_data)

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _AccessDataHandle(node, nonblocking)


class _AccessDataHandle(Handle):
    async def read(self, offset: int, size: int) -> bytes:
        vm = self.scope.vm
        at, data = vm.still, vm.access_data
        vm.publish("exit.data", data, at)
        return data[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> int:
        vm = self.scope.vm
        if vm.state == "running":
            raise Busy("the machine is running")
        blob = vm.access_data
        if not blob:
            raise Invalid("no access is pending")
        if offset + len(data) > len(blob):
            raise PastEnd(f"the pending access has {len(blob)} bytes; byte {offset + len(data)} is past them")
        vm.set_access_data(blob[:offset] + data + blob[offset + len(data) :])
        return len(data)


# ---- what is booted


@dataclass(frozen=True)
class ImageFile(Kind):
    """An image of `Vm.images`: bytes of any length, kept until they are replaced. Busy while the machine runs."""

    name: str
    writable = True

    def size(self, scope: Any) -> int:
        return scope.vm.images[self.name].size

    def truncate(self, scope: Any, size: int, opened: bool) -> Any:
        _check_stopped(scope)
        image = scope.vm.images[self.name]
        image.check(size)
        return scope.budget.around(image, size, lambda: image.truncate(size))

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _ImageHandle(node, nonblocking, self.name)


class _ImageHandle(Handle):
    def __init__(self, node: File, nonblocking: bool, name: str) -> None:
        super().__init__(node, nonblocking)
        self._image = self.scope.vm.images[name]

    async def read(self, offset: int, size: int) -> bytes:
        return self._image.read(offset, size)

    async def write(self, offset: int, data: bytes) -> int:
        _check_stopped(self.scope)
        size = max(self._image.size, offset + len(data))
        self._image.check(size)
        if not self.scope.budget.has(self._image, size):
            await self.scope.budget.hold(self._image, size)
            _check_stopped(self.scope)
        return self._image.write(offset, data)


def _check_stopped(scope: Any) -> None:
    if scope.vm.state == "running":
        raise Busy("the machine is running")


# ---- runs


@dataclass(frozen=True)
class VmRun(Kind):
    """`vm_run`, `vm_run.bin`: what is read is the exit as `show` gives it."""

    show: Callable[[exits.Exit], bytes]
    writable = True
    reading_acts = True
    walked = False

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _VmRunHandle(node, nonblocking, writing, self.show)


class _VmRunHandle(LineHandle):
    """A read from offset 0 is a run, others go on in its line. Without blocking, a run that ends leaves its
    line to be read once from offset 0."""

    acts = True

    def __init__(
        self, node: File, nonblocking: bool, writing: bool, show: Callable[[exits.Exit], bytes]
    ) -> None:
        super().__init__(node, nonblocking, writing)
        self._show = show
        self._ends_soon = True  # as the run before
        self._line = b""
        self._run: Run | None = None  # begun without blocking, its line not read yet

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0:
            if is_nonblocking(self.nonblocking):
                self._line = self._next_line()
            else:
                begun, self._run = self._run, None  # without blocking; fcntl has cleared O_NONBLOCK since
                begun = begun or self.scope.vm.take_left(self.number)
                self._line = self._show(await self._to_exit(begun or self.scope.vm.start(UNBOUND)))
        return self._line[offset : offset + size]

    def ends(self, offset: int) -> bool:
        return offset >= len(self._line)

    async def prepare(self, text: str) -> None:
        await value_of(self.scope.learn_lines(text), self)

    def parse(self, text: str) -> Do:
        bound = parse_bound(text, self.scope.vm.symbols.address_of)
        return lambda: self._begin(bound) if is_nonblocking(self.nonblocking) else self._run_to_exit(bound)

    async def _run_to_exit(self, bound: Bound) -> None:
        await self._to_exit(self.scope.vm.start(bound))

    def poll(self) -> int:
        if self._run is not None:
            return POLL_IN if self._run.done() else 0
        return POLL_OUT if self.scope.vm.state != "running" else 0

    def close(self) -> None:
        """A run that nobody is left to hear of is stopped."""
        for run in (self._run, self.scope.vm.take_left(self.number)):
            if run is not None and not run.done():
                self.scope.vm.stop(run)

    def _next_line(self) -> bytes:
        if self._run is None:
            self._begin(UNBOUND)
        run = self._run
        assert run is not None
        if not run.done():
            raise WouldBlock("the machine is running")
        self._run = None
        return self._show(run.result())

    def _begin(self, bound: Bound) -> None:
        if self._run is not None and not self._run.done():
            raise Busy("the machine is running")
        self._run = self.scope.vm.start(bound)
        # After the Vm's own news, which come before a run is done.
        self._run.add_done_callback(lambda _: self.scope.changed())

    async def _to_exit(self, run: Run) -> exits.Exit:
        vm = self.scope.vm
        began = time.perf_counter()
        if self._ends_soon:
            with contextlib.suppress(TimeoutError):
                run.exception(SHORT_SECONDS)
        try:
            if not run.done():
                async with interruptible():
                    await finished(run, self.scope)
            self._ends_soon = time.perf_counter() - began < LONG_SECONDS
        except Interrupted:
            vm.stop(run)
            with trio.move_on_after(STOP_SECONDS, shield=True):
                await finished(run, self.scope)
            # An exit that came before the guest stopped is the caller's all the same.
            if not run.done() or isinstance(run.result(), exits.Interrupted):
                raise
        return run.result()


# ---- interrupts


@dataclass(frozen=True)
class Irq(Kind):
    """`irq`: a packet (struct kvm_interrupt) or a command."""

    readable = False
    writable = True

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _IrqHandle(node, nonblocking, writing)


class _IrqHandle(LineHandle):
    acts = True
    _looking = False

    async def write(self, offset: int, data: bytes) -> int:
        # Of a packet with a vector, three bytes are zero, and no text has a zero byte.
        if len(data) == 4 and b"\0" in data:
            (vector,) = struct.unpack("<I", data)
            self.parse(str(vector))()
            return len(data)
        return await super().write(offset, data)

    def parse(self, text: str) -> Do:
        command = parse_command("irq", text)
        return lambda: command(self.scope.vm)

    def poll(self) -> int:
        if self.scope.vm.interrupts_queued < INTERRUPT_QUEUE:
            return POLL_OUT
        if not self._looking:  # no engine tells when it takes a vector
            self._looking = True
            trio.lowlevel.spawn_system_task(self._look_for_room)
        return 0

    async def _look_for_room(self) -> None:
        try:
            while self.scope.watched(self) and self.scope.vm.interrupts_queued >= INTERRUPT_QUEUE:
                await trio.sleep(QUEUE_LOOK_SECONDS)
        except Gone:
            pass
        finally:
            self._looking = False
        self.scope.wake()
