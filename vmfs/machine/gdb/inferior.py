"""What a stub does to a machine: registers and memory, points, runs. The one part of the stub that knows `Vm`.

It blocks, and so do its users: a session has a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from vmfs.debug.paging import NO_EXECUTE, WRITABLE, Paging, mapped_ranges
from vmfs.debug.points import Points
from vmfs.engine.base import Vcpu
from vmfs.machine.gdb.target import Change, Register, States, set_ymm_highs
from vmfs.machine.machine import Vm
from vmfs.memory.ram import PAGE, Memory, MemoryView
from vmfs.words.errors import BadAddress, VmfsError
from vmfs.words.exits import Exit
from vmfs.words.modes import mode_of
from vmfs.words.registers import has_avx, write_registers

T = TypeVar("T")

OWNER = "gdb"  # of the points that a gdb has set
_MASK = (1 << 64) - 1
_YMM_HIGHS = {f"ymm{number}h": number for number in range(16)}

Stop = tuple[str, int, int, str]  # `break` or `watch`, address, length, what accesses


class Surroundings(Protocol):
    """What the files of a machine give. Called in a session's thread, and blocks it."""

    vm: Vm

    def change_memory(self, change: Callable[[], Future[None]]) -> None:
        """Begin a change of RAM, and wait for its end; the files have been told then."""

    def command(self, text: str) -> str:
        """Do a command of the files; what there is to say about it."""

    def complain(self, sentence: str) -> None:
        """Have it in the file `error`."""


class Inferior:
    """A machine, under gdb."""

    def __init__(self, surroundings: Surroundings) -> None:
        self.vm = surroundings.vm
        self.surroundings = surroundings
        self.physical = False  # addresses are guest-physical
        self.cpu = 0  # the one that is looked at
        self._states: tuple[object, int, States] | None = None
        self._paging: tuple[tuple[bytes, bytes], Paging] | None = None
        # The last page that was looked up: how, its address, the entries of tables on the way, where it is.
        self._way: tuple[Paging, int, list[tuple[int, bytes]], int] | None = None
        self._regions: list[tuple[int, int, str]] | None = None
        self._wanted: dict[Stop, set[int]] = {}  # the types that gdb asked for it by: Z0 and Z1 are one stop
        self._ids: dict[Stop, int] = {}  # what the machine has: at least all that is wanted

    def at_boundary(self, task: Callable[[Vcpu], T]) -> T:
        return self.vm.at_boundary(task, self.cpu).result()

    @property
    def cpu_count(self) -> int:
        return len(self.vm.cpus)

    # ---- registers

    def avx(self) -> bool:
        return self.at_boundary(has_avx)

    def modes(self) -> list[str]:
        """Of each CPU."""

        def look(_: Vcpu) -> list[str]:
            return [mode_of(cpu.vcpu.get_state("regs"), cpu.vcpu.get_state("sregs")) for cpu in self.vm.cpus]

        return self.at_boundary(look)

    def read_registers(self, rows: Iterable[Register]) -> list[bytes]:
        """In the byte order of the guest."""

        def read(cpu: Vcpu) -> list[bytes]:
            states = self._states_of(cpu)
            return [row.read(states) for row in rows]

        return self.at_boundary(read)

    def _states_of(self, cpu: Vcpu) -> States:
        """Each got once while the CPU is not used: gdb asks for one register after the other."""
        at = self.vm.still_in_task
        if at is None:
            return States(cpu)
        if self._states is None or (at, self.cpu) != self._states[:2]:
            self._states = at, self.cpu, States(cpu)
        return self._states[2]

    def write_registers(self, values: dict[Register, int]) -> None:
        """Those that differ from what they are, as one change. Busy while the machine runs."""

        def write(cpu: Vcpu) -> None:
            changes: dict[str, int] = {}
            for row, value in values.items():
                states = _Changed(cpu, changes)
                if row.get(states) != value:
                    changes |= row.put(states, value)
            _set(cpu, changes)

        self.vm.change(write, cpu=self.cpu)

    # ---- memory

    def _pieces(self, cpu: Vcpu, address: int, length: int) -> Iterable[tuple[int | None, int]]:
        """The physical ranges of a range of addresses; None where nothing is mapped."""
        paging = Paging() if self.physical else self._paging_of(cpu)
        while length > 0:
            part = min(length, PAGE - address % PAGE)
            yield self._translate(paging, address), part
            address = (address + part) & _MASK
            length -= part

    def _translate(self, paging: Paging, address: int) -> int | None:
        """gdb reads a few bytes of the same page again and again: the way there is not gone through anew while the
        entries are what they were."""
        offset = address % PAGE
        if self._way is not None:
            of, page, entries, physical = self._way
            read = self.vm.memory.read
            if of is paging and page == address - offset and all(read(at, len(raw)) == raw for at, raw in entries):
                return physical + offset
        walked = _Walked(self.vm.memory)
        found = paging.translate(walked, address - offset)
        if found is None:
            return None
        self._way = paging, address - offset, walked.entries, found.physical
        return found.physical + offset

    def _paging_of(self, cpu: Vcpu) -> Paging:
        """Looked up once while the registers that it depends on are the same."""
        states = self._states_of(cpu)
        blobs = states.blob("sregs"), states.blob("cpuid")
        if self._paging is None or blobs != self._paging[0]:
            self._paging = blobs, Paging.of(states)
        return self._paging[1]

    def read_memory(self, address: int, length: int) -> bytes:
        """Up to `length` bytes; BadAddress where there is none."""

        def read(cpu: Vcpu) -> bytes:
            parts = []
            for physical, part in self._pieces(cpu, address, length):
                data = b"" if physical is None else self.vm.read_physical(physical, part)
                parts.append(data)
                if len(data) < part:
                    break
            return b"".join(parts)

        data = self.at_boundary(read)
        if length and not data:
            raise BadAddress(f"{address:#x} is not mapped to memory")
        return data

    def write_memory(self, address: int, data: bytes) -> None:
        """All or nothing; the rights of the guest's pages are not asked for."""

        def write(cpu: Vcpu) -> None:
            memory = self.vm.memory
            pieces = list(self._pieces(cpu, address, len(data)))
            if any(physical is None or part > memory.room(physical) for physical, part in pieces):
                raise BadAddress(f"{len(data)} bytes at {address:#x} are not all mapped to RAM")
            done = 0
            for physical, part in pieces:
                assert physical is not None
                self.vm.memory.write(physical, data[done : done + part])
                done += part

        self.surroundings.change_memory(lambda: self.vm.at_boundary(write, self.cpu))

    def region(self, address: int) -> tuple[int, int, str]:
        """Where the range of memory around an address, or of what is not mapped, begins and ends, and `rwx` for what
        the guest's kernel may do there. Looked up once between two runs."""
        if self._regions is None:
            if self.physical:
                paging = Paging()
            else:
                paging = self.at_boundary(Paging.of)
            if paging.kind == "off":
                self._regions = [(one.address, one.end, "rwx") for one in self.vm.memory.regions]
            else:
                self._regions = _regions(self.vm.memory.view(), paging)
        begin = 0
        for start, end, rights in self._regions:
            if address < start:
                return begin, start, ""
            if address < end:
                return start, end, rights
            begin = end
        return begin, 1 << 64, ""

    # ---- points

    def insert(self, stop: Stop, kind: int) -> None:
        if self._ids.get(stop) not in self._in_force():
            self.vm.set_points(lambda points: self._add(points, stop)).result()
        self._wanted.setdefault(stop, set()).add(kind)

    def remove(self, stop: Stop, kind: int) -> None:
        """It goes at the next run: gdb takes all away when the machine stops, and sets them again before it runs."""
        kinds = self._wanted.get(stop, set())
        kinds.discard(kind)
        if not kinds:
            self._wanted.pop(stop, None)

    def settle(self, *, stepping: bool) -> None:
        """Before a run: have the machine watch for what is wanted, and for nothing else.

        A step begins after the breakpoint where it stands, so breakpoints that are not wanted for it may stay:
        gdb wants them again after it.
        """
        self._regions = None
        there = self._in_force()
        lost = [stop for stop in self._wanted if self._ids.get(stop) not in there]
        unwanted = [
            stop for stop in self._ids if stop not in self._wanted and not (stepping and stop[0] == "break")
        ]
        if lost or unwanted:

            def change(points: Points) -> None:
                for stop in unwanted:
                    if self._ids[stop] in there:
                        points.delete(self._ids[stop])
                for stop in lost:
                    self._add(points, stop)

            self.vm.set_points(change).result()
            for stop in unwanted:
                del self._ids[stop]

    def forget(self) -> None:
        """Delete all of them."""
        self._wanted.clear()
        self._ids.clear()
        if self.vm.points.of(OWNER):
            self.vm.set_points(lambda points: points.delete_of(OWNER)).result()

    def stop_of(self, id_: int | None) -> tuple[Stop, int] | None:
        """What gdb has set that has this id, and by which type."""
        for stop, number in self._ids.items():
            if number == id_ and stop in self._wanted:
                return stop, min(self._wanted[stop])
        return None

    def _in_force(self) -> set[int]:
        """Somebody may have deleted them, by the `debug` file."""
        return {point.id for point in self.vm.points.of(OWNER)}

    def _add(self, points: Points, stop: Stop) -> None:
        kind, address, length, access = stop
        if kind == "break":
            points.add_break(address, owner=OWNER)
        else:
            points.add_watch(
                address, length, "r" in access, "w" in access, physical=self.physical, owner=OWNER
            )
        self._ids[stop] = points.last_id

    # ---- the rest

    def pause(self) -> None:
        """Stop what runs; where nothing ever has, load what there is to boot, so that gdb sees it."""
        self.vm.pause().result()
        loading = self.vm.load()
        if loading is not None:
            loading.result()

    @property
    def is_at_begin(self) -> bool:
        """The last journey through the machine's past came to where that begins, and not where it was to go."""
        return self.vm.history is not None and self.vm.history.at_begin

    @property
    def last_exit(self) -> Exit | None:
        return self.vm.last_exit

    def command(self, text: str) -> str:
        return self.surroundings.command(text)


class _Walked:
    """RAM, and what was read of it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.entries: list[tuple[int, bytes]] = []

    def room(self, address: int) -> int:
        return self._memory.room(address)

    def read(self, offset: int, length: int) -> bytes:
        raw = self._memory.read(offset, length)
        self.entries.append((offset, raw))
        return raw


def _regions(ram: MemoryView, paging: Paging) -> list[tuple[int, int, str]]:
    """What is mapped, neighbours of the same rights together."""
    regions: list[tuple[int, int, str]] = []
    with ram:
        for one in mapped_ranges(ram, paging):
            rights = f"r{'w' * bool(one.flags & WRITABLE)}{'x' * (not one.flags & NO_EXECUTE)}"
            if regions and regions[-1][1] == one.start and regions[-1][2] == rights:
                regions[-1] = regions[-1][0], one.end, rights
            else:
                regions.append((one.start, one.end, rights))
    return regions


class _Changed(States):
    """A CPU as it is going to be: so that two parts of one register, set together, are both set."""

    def __init__(self, cpu: Vcpu, changes: Change) -> None:
        super().__init__(cpu)
        self._changes = changes

    def value(self, name: str) -> int:
        return self._changes[name] if name in self._changes else super().value(name)


def _set(cpu: Vcpu, changes: Change) -> None:
    """All or none."""
    highs = {_YMM_HIGHS[name]: value for name, value in changes.items() if name in _YMM_HIGHS}
    rows = {name: value for name, value in changes.items() if name not in _YMM_HIGHS}
    before = States(cpu)
    old = {name: before.value(name) for name in rows}
    if rows:
        write_registers(cpu, rows)
    if highs:
        try:
            cpu.set_state("xsave", set_ymm_highs(cpu.get_state("xsave"), highs))
        except VmfsError:
            write_registers(cpu, old)
            raise
