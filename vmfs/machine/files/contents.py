"""Contents: what the files of a machine see of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, cast

import trio

from vmfs.debug.symbols import SymbolTable
from vmfs.debug.trace import TraceSettings
from vmfs.engine import by_name
from vmfs.engine.base import MACHINE_STATES, VCPU_STATES, Engine
from vmfs.machine.control import MemoryHooks
from vmfs.machine.cpu import CpuView
from vmfs.machine.files.budget import Budget
from vmfs.machine.files.console import TALKERS, ConsolePort, Talker
from vmfs.machine.files.gdb import GdbPort
from vmfs.machine.files.handles import Kind, Scope
from vmfs.machine.files.vnc import VncPort
from vmfs.machine.files.waiting import settled
from vmfs.machine.machine import Vm
from vmfs.memory.ram import PAGE
from vmfs.words.door import Door
from vmfs.words.errors import Busy, Gone, Unsupported

MOST_RANGES = 64  # more messages than that cost more than dropping the whole cache


class CachedMemory:
    """RAM that clients may have in the kernel's page cache, which is dropped around runs and changes then.

    Before a run what clients changed is written back and dropped; after it the pages that the guest changed are
    dropped. Where the kernel shares RAM itself (passthrough) `is_cached` stays False, and nothing needs to be done.
    """

    def __init__(self, vm: Vm, door: Door) -> None:
        self._vm = vm
        self._door = door
        self.is_cached = False
        self.is_writable = False  # clients have it, or what else of the guest is memory, open, and may write unseen
        self.changes = 0  # grows when it was written, or may have been

    def set_clients(self, cached: bool, writing: bool) -> None:
        """Whether clients have `mem` open through the page cache, and whether any memory for writing."""
        self.changes += self.is_writable
        self.is_cached, self.is_writable = cached, writing
        self._vm.hooks = MemoryHooks(before=self._drop, after=self._drop_changed) if cached else MemoryHooks()

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Around a change of RAM by this process."""
        self.changes += 1
        await self.settle()
        try:
            yield
        finally:
            await self.settle()

    async def settle(self) -> None:
        """Before this process looks at RAM: what clients wrote into mappings is there then."""
        if self.is_cached:
            await trio.to_thread.run_sync(self._drop)

    def _drop(self) -> None:
        self._door.invalidate([(0, 0)])

    def _drop_changed(self, dirty: bytes) -> None:
        ranges = list(itertools.islice(dirty_ranges(dirty), MOST_RANGES + 1))
        self._door.invalidate([(0, 0)] if len(ranges) > MOST_RANGES else ranges)


def dirty_ranges(dirty: bytes) -> Iterator[tuple[int, int]]:
    """The runs of set bits of a dirty log, as (offset, length) in bytes."""
    bits = int.from_bytes(dirty, "little")
    page = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        page += skip
        length = (~bits & (bits + 1)).bit_length() - 1
        bits >>= length
        yield page * PAGE, length * PAGE
        page += length


class Contents(Scope):
    """One machine. `changes` grows whenever its state may have changed. `complaint` is what `error` shows. `monitor` is
    what gdb's monitor commands do (vmfs.machine.files.monitor)."""

    def __init__(
        self,
        vm: Vm,
        door: Door,
        complain: Callable[[str], None],
        monitor: Callable[[Contents, str], Awaitable[str]],
        engine_named: Callable[[str], Engine] = by_name,
    ) -> None:
        super().__init__()
        self.vm = vm
        self.door = door
        self.complaint = ""  # the last failure in a sentence
        self._tell = complain
        self.engine_named = engine_named  # of those that it may be moved to
        self.budget = Budget(door)
        self.arrivals: Any = None  # vmfs.machine.files.arrivals.Arrivals, of a machine that has them
        self.memory = CachedMemory(vm, door)
        self.gdb = GdbPort(self, monitor)
        self.vnc = VncPort(self)
        self.symbol_file: tuple[SymbolTable, bytes] | None = None  # with the table that it is made of
        self.symbol_file_size: tuple[SymbolTable, int] | None = None
        self.symbols_text: tuple[SymbolTable | None, int] = None, 0  # the size of the text of a table
        self._kept_sizes: dict[Kind, tuple[object, int]] = {}
        self._modified_ns = time.time_ns()
        self._changes = 1
        self._consoles: dict[str, ConsolePort] = {}
        self._count = itertools.count(2)
        self._of_cpus: dict[int, CpuContents] = {}
        self._sizes = {name: len(blob) for name, blob in vm.cpu.reset_states.items()}
        for name in (*VCPU_STATES, *MACHINE_STATES):
            self.state_size(name)  # now, because a CPU that runs has to be stopped for it
        vm.subscribe(self.changed)
        vm.is_watched = lambda: bool(self._pollers)

    async def set_trace(self, change: Callable[[TraceSettings], TraceSettings]) -> None:
        """`Vm.set_trace`, with room for what is kept."""
        settings = change(self.vm.trace.settings)
        if settings.flows or self.budget.has("trace", 1):
            if not self.budget.has("trace", settings.size):
                await self.budget.hold("trace", settings.size)
        try:
            await settled(self.vm.set_trace(change), self)
        finally:
            if self.budget.has("trace", 1):
                await self.budget.hold("trace", self.vm.trace.settings.size)

    async def learn_lines(self, text: str) -> None:
        """What FILE:LINE in `text` need is decoded, in a thread, before the text is parsed on the loop."""
        lines = self.vm.symbols.lines
        if lines.unknown(text):
            await trio.to_thread.run_sync(lines.learn, text, trio.from_thread.check_cancelled, abandon_on_cancel=True)

    def complain(self, sentence: str) -> None:
        """It went wrong, and no call fails with it."""
        self.complaint = sentence
        self._tell(sentence)

    def modified_ns(self) -> int:
        """When files that show its state last changed."""
        return time.time_ns() if self.vm.state == "running" else self._modified_ns

    def touch(self) -> None:
        """Something was written."""
        self._modified_ns = time.time_ns()

    def _same_as(self) -> object | None:
        """While this is the same, and not None, the CPU, RAM and all else that is shown of a guest are as they were."""
        vm = self.vm
        if vm.still is None or self.memory.is_writable:
            return None
        board = vm.board
        return vm.still, self.memory.changes, board, board and board.writes, vm.symbols, vm.listing

    async def kept_size(self, kind: Kind, measure: Callable[[Contents], Awaitable[int]]) -> int:
        """`measure(self)`, or what it was when nothing has happened since."""
        same_as = self._same_as()
        known, size = self._kept_sizes.get(kind, (None, 0))
        if same_as is None or known != same_as:
            size = await measure(self)
            self._kept_sizes[kind] = same_as, size
        return size

    @property
    def changes(self) -> int:
        self.vm.settle()
        return self._changes + self.vm.lane_runs

    def changed(self) -> None:
        self._changes = next(self._count)
        self.touch()
        for port in self._consoles.values():
            port.stream.wake()  # at the end of a machine its readers have the end of the file
        super().changed()

    def port_device(self, device: str) -> Talker | None:
        board = self.vm.board
        serial = None if board is None else board.devices.get(device)
        return serial if isinstance(serial, TALKERS) else None

    def console_port(self, device: str) -> ConsolePort | None:
        """The stream of a port; None where there is none."""
        serial = self.port_device(device)
        if serial is None:
            return None
        port = self._consoles.get(device)
        if port is None:
            port = self._consoles[device] = ConsolePort(serial, super().changed, self.budget)
        elif port.serial is not serial:
            port.plug(serial)
        return port

    def plug_consoles(self) -> None:
        """The machine has a new board: a user that has a console open hears its."""
        for device in list(self._consoles):
            self.console_port(device)

    def of_cpu(self, cpu: int | None) -> Contents:
        """The same, where what is a CPU's is of that one; None is the first, as at the top."""
        if cpu is None:
            return self
        if cpu >= len(self.vm.cpus):
            raise Gone(f"there is no cpu{cpu} any more")
        view = self._of_cpus.get(cpu)
        if view is None:
            view = self._of_cpus[cpu] = CpuContents(self, cpu)
        return cast(Contents, view)

    def sample(self, name: str) -> Future[bytes]:
        """A state of the CPU or the machine, between two instructions."""
        if name in MACHINE_STATES:
            return self.vm.get_machine_state(name)
        return self.vm.at_boundary(lambda cpu: cpu.get_state(name))

    def state_size(self, name: str) -> int:
        """Bytes of a state; 0 where the machine has none. Looked up once, when the machine does not run."""
        if name not in self._sizes:
            if self.vm.state == "running":
                return 0
            try:
                size = len(self.sample(name).result(0))
            except Unsupported:
                size = 0
            except (Busy, TimeoutError):
                return 0
            self._sizes[name] = size
        return self._sizes[name]

    def forget_sizes(self) -> None:
        """Every state may have another length: it is another engine's."""
        self._sizes.clear()
        for name in (*VCPU_STATES, *MACHINE_STATES):
            self.state_size(name)

    def forget_size(self, name: str) -> None:
        """The state was set to one of another length."""
        self._sizes.pop(name, None)


class CpuContents:
    """The contents as the files in cpuN/ see them: `vm` is the machine with that CPU in the place of the first."""

    def __init__(self, contents: Contents, cpu: int) -> None:
        self._contents = contents
        self.vm = CpuView(contents.vm, cpu)
        self._kept_sizes: dict[Kind, tuple[object, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._contents, name)

    _same_as = Contents._same_as
    kept_size = Contents.kept_size
    sample = Contents.sample
