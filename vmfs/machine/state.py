"""STATE: the one table of what a machine is.

All that decides what a machine does next is a row of ROWS, whatever owns it: a CPU, the engine's machine, the board and
its devices, memory, the machine as its user has set it up. `take` makes a value of it, `put` makes a machine what a
value says. Reset, the move to another engine and the trial of a change read the same table.

Rows of MEMORY are in the table and not in a value: they are large, and a keeper of them shares their pages.
`state_hash` has them. Not in the table are points, traces and symbols, which stay with the user who looks at the
machine, and what is a cache, which an engine may drop at any time: decoded code, the TLB (Intel SDM 3A 4.10.2.2 lets a
processor do that).

The order of ROWS is the order in which they are set. `after` says why: what has to be set before.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Protocol

import msgspec

from vmfs.devices.board import Board, BoardState
from vmfs.devices.device import U64, DeviceState, unpack
from vmfs.engine.base import Machine, Vcpu, has_state
from vmfs.engine.rest import NEVER, Time, as_new, given_up
from vmfs.words.errors import Invalid, Unsupported
from vmfs.words.layouts import unpack_msrs

FORMAT = 1  # of a State


# ---- the machine as its user has set it up


class Attached(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A device that a user has attached: what it is called, its place on the PCI bus, if it has one, and the words of
    its line."""

    name: Annotated[str, msgspec.Meta(max_length=64)]
    slot: Annotated[int, msgspec.Meta(ge=0, le=31)] | None
    kind: Annotated[str, msgspec.Meta(max_length=64)]
    words: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=4096)], ...], msgspec.Meta(max_length=64)]


class Setup(DeviceState):
    """What a machine is made of, and where it is in its life. `images` are the sizes of what is to boot; `rom`: address
    and size. `new_msrs`: the MSRs that its CPUs had when they were new, by which another engine knows which of them
    describe the engine. `held`: the exits, as lines, that CPUs came to when another one had ended the run; the next
    runs return them. `sleeps`: what is due is no boot: it is suspended to RAM, and the next run wakes it."""

    VERSION: ClassVar[int] = 3

    machine: str
    engine: str
    time_source: Literal["host", "instructions"]
    memory: int
    cpus: Annotated[int, msgspec.Meta(ge=1, le=64)]
    has_run: bool
    boot_due: bool
    is_shut_down: bool
    is_halted: bool
    cmdline: bytes
    images: dict[str, Annotated[int, msgspec.Meta(ge=0)]]
    rom: tuple[U64, U64] | None
    attached: Annotated[tuple[Attached, ...], msgspec.Meta(max_length=64)]
    new_msrs: bytes
    held: tuple[str, ...]
    sleeps: bool = False


class Seen(DeviceState):
    """What a user has seen of the machine: the last exit as a line, and that of each CPU; how many there were, and of
    each reason."""

    VERSION: ClassVar[int] = 2

    last_exit: str | None
    cpu_exits: tuple[str | None, ...]
    exit_number: Annotated[int, msgspec.Meta(ge=0)]
    counts: dict[str, Annotated[int, msgspec.Meta(ge=0)]]


# ---- the table


class Owner(enum.StrEnum):
    """Whose a row is. Rows of a CPU are there once a CPU, that of a device once a device."""

    MEMORY = "memory"
    MACHINE = "machine"  # as its user has set it up
    ENGINE = "engine"  # the engine's machine
    BOARD = "board"
    DEVICE = "device"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Row:
    """A part of a machine. `version` is that of its bytes; a device's is in its STATE. `is_reset`: a reset sets it back
    to what a new machine has. `of_run`: it says how the machine came here, and not what it does next."""

    name: str
    owner: Owner
    after: tuple[str, ...] = ()
    version: int = 1
    is_reset: bool = True
    with_chips: bool = False  # only a machine with interrupt controllers has it
    of_run: bool = False


ROWS: tuple[Row, ...] = (
    Row("ram", Owner.MEMORY, is_reset=False),
    Row("rom", Owner.MEMORY, is_reset=False),
    Row("images", Owner.MEMORY, is_reset=False),  # kernel, initrd, bios
    Row("overlays", Owner.MEMORY, is_reset=False),  # of disks that are cow; their maps are of the devices
    Row("setup", Owner.MACHINE, version=Setup.VERSION, is_reset=False),
    Row("time", Owner.ENGINE, ("setup",), is_reset=False),
    Row("irqchip", Owner.ENGINE, ("time",), with_chips=True),
    Row("pit", Owner.ENGINE, ("time", "irqchip"), with_chips=True),
    Row("turns", Owner.ENGINE, version=2),
    # It completes them. The lines are driven by devices, which reset them.
    Row("chips", Owner.ENGINE, ("irqchip", "pit"), is_reset=False),
    Row("board", Owner.BOARD, ("time", "chips"), version=BoardState.VERSION, is_reset=False),
    Row("device", Owner.DEVICE, ("board", "ram", "overlays")),  # a virtqueue is in RAM
    Row("cpuid", Owner.CPU, is_reset=False),
    Row("sregs", Owner.CPU, ("cpuid",)),  # EFER, CR0, CR4: what is valid in most others
    Row("xcrs", Owner.CPU, ("cpuid", "sregs")),
    Row("xsave", Owner.CPU, ("xcrs",)),
    # The I/O APIC sends its requests anew when it is set. IA32_APIC_BASE is in sregs.
    Row("lapic", Owner.CPU, ("irqchip", "sregs"), with_chips=True),
    Row("msrs", Owner.CPU, ("cpuid", "sregs", "lapic", "time")),  # IA32_TSC_DEADLINE holds in the timer's mode only
    Row("debugregs", Owner.CPU, ("sregs",)),
    Row("regs", Owner.CPU, ("sregs",)),  # RFLAGS.VM holds in protected mode only
    Row("events", Owner.CPU, ("regs", "debugregs")),
    Row("mp_state", Owner.CPU, ("events", "lapic")),
    Row("progress", Owner.CPU, ("regs", "sregs", "xsave", "lapic", "msrs", "debugregs", "events", "mp_state")),
    Row("seen", Owner.MACHINE, ("progress",), version=Seen.VERSION, is_reset=False, of_run=True),
)

Values = Mapping[str, bytes]  # by the name of the row
_OF: dict[Owner, tuple[Row, ...]] = {owner: tuple(row for row in ROWS if row.owner is owner) for owner in Owner}
_NAMES = {owner: tuple(row.name for row in rows) for owner, rows in _OF.items()}


def rows_of(owner: Owner) -> tuple[Row, ...]:
    """In the order in which they are set."""
    return _OF[owner]


# ---- the engine's part


def take_engine(machine: Machine) -> dict[str, bytes]:
    """The rows of the engine's machine that there are."""
    return _take(machine, Owner.ENGINE)


def take_cpu(cpu: Vcpu) -> dict[str, bytes]:
    """The rows of a CPU that there are. What it is in the middle of stays so."""
    return _take(cpu, Owner.CPU)


def _take(source: Machine | Vcpu, owner: Owner) -> dict[str, bytes]:
    return source.get_states(_NAMES[owner])


def put_engine(machine: Machine, values: Values) -> None:
    """Set the rows that are in `values`. Before its CPUs' rows."""
    machine.put_states({name: values[name] for name in _NAMES[Owner.ENGINE] if name in values})


def put_cpu(cpu: Vcpu, values: Values, reset_msrs: bytes | None = None) -> None:
    """Set the rows that are in `values`, after those of the machine.

    `reset_msrs`: the CPU that they are of had these when it was new, and is perhaps another engine's. Then only MSRs
    that both have are set, and one that is refused may be as it was at the reset, for it describes the engine.
    """
    _give_up(cpu)
    if reset_msrs is None:
        cpu.put_states({name: values[name] for name in _NAMES[Owner.CPU] if name in values})
        return
    for row in rows_of(Owner.CPU):
        if row.name not in values:
            continue
        data = values[row.name]
        if row.name == "cpuid" and cpu.get_state("cpuid") == data:
            continue  # an engine may refuse even that, once the CPU has run
        if row.name == "msrs":
            _put_common_msrs(cpu, dict(unpack_msrs(data)), dict(unpack_msrs(reset_msrs)))
            continue
        if row.name == "xsave":
            data = _resized(data, len(cpu.get_state("xsave")))
        if row.with_chips and not has_state(cpu, row.name):  # a machine that becomes bare
            continue
        try:
            cpu.set_state(row.name, data)
        except Invalid as error:
            raise Unsupported(f"{row.name} is in a state that the other engine cannot have: {error}") from error


def _resized(xsave: bytes, size: int) -> bytes:
    """Engines differ in the room for components; what is cut off must be unused."""
    if any(xsave[size:]):
        raise Unsupported(f"xsave has state beyond the {size} bytes that the other engine has for it")
    return xsave[:size].ljust(size, b"\0")


def _put_common_msrs(cpu: Vcpu, wanted: Mapping[int, int], reset: Mapping[int, int]) -> None:
    there = dict(unpack_msrs(cpu.get_state("msrs")))
    for index, value in wanted.items():
        if index not in there or there[index] == value:
            continue
        try:
            cpu.set_msr(index, value)
        except Invalid as error:
            if value != reset.get(index):
                raise Unsupported(f"MSR {index:#x} is {value:#x}, which the other engine refuses") from error


def _give_up(cpu: Vcpu) -> None:
    """What the CPU is in the middle of."""
    progress = cpu.get_state("progress")
    if (kept := given_up(progress)) is not progress:
        cpu.set_state("progress", kept)


# ---- reset


def reset_values(source: Machine | Vcpu, owner: Owner) -> dict[str, bytes]:
    """What a reset sets back, of a machine or a CPU that is new."""
    values = _take(source, owner)
    return {row.name: values[row.name] for row in rows_of(owner) if row.is_reset and row.name in values}


def reset_cpu(cpu: Vcpu, values: Values) -> None:
    """Set back a CPU that had `values` when it was new. What it has counted stays. Its CPUID may be another engine's by
    now, and with it the MSRs that there are, and what they take."""
    before = cpu.get_state("progress")
    put_cpu(cpu, {**values, "progress": as_new(before, values["progress"])}, values["msrs"])


# ---- trying


@contextmanager
def tried(cpu: Vcpu) -> Iterator[None]:
    """What is done to the CPU in this block is only tried: it is afterwards as before, in the middle of what it was
    in."""
    before = take_cpu(cpu)
    cpu.set_state("progress", given_up(before["progress"]))
    try:
        yield
    finally:
        put_cpu(cpu, before)


class Attempt:
    """A CPU for a task that gets and sets its states. Where the task fails, `undo` sets back what it has set."""

    def __init__(self, cpu: Vcpu) -> None:
        self._cpu = cpu
        self._before: dict[str, bytes] = {}

    def get_state(self, name: str) -> bytes:
        return self._cpu.get_state(name)

    def set_state(self, name: str, data: bytes) -> None:
        self._note(name)
        self._cpu.set_state(name, data)

    def get_msr(self, index: int) -> int:
        return self._cpu.get_msr(index)

    def set_msr(self, index: int, value: int) -> None:
        self._note("msrs")
        self._cpu.set_msr(index, value)

    def _note(self, name: str) -> None:
        """Before it is set for the first time. `regs`, which most tasks set, is a state by itself; others change
        several."""
        if name in self._before or len(self._before) > 1:
            return
        if name == "regs":
            self._before = {name: self._cpu.get_state(name)}
        else:
            self._before = {**take_cpu(self._cpu), **self._before}

    def undo(self) -> None:
        put_cpu(self._cpu, self._before)


class Body(Protocol):
    """What `take` and `put` need of a machine, which does not run and is locked."""

    board: Board | None

    @property
    def engine_machine(self) -> Machine: ...

    @property
    def vcpus(self) -> tuple[Vcpu, ...]: ...

    def save_setup(self) -> Setup: ...

    def check_kind(self, setup: Setup) -> None:
        """Invalid where it is a machine of another kind, size or number of CPUs, or boots something else."""
        ...

    def check_setup(self, setup: Setup) -> None:
        """Invalid where it is another machine than this one can become."""
        ...

    def load_setup(self, setup: Setup) -> None: ...

    def save_seen(self) -> Seen: ...

    def check_seen(self, seen: Seen) -> None: ...

    def load_seen(self, seen: Seen) -> None: ...

    def memories(self) -> Iterator[tuple[str, int, Source]]:
        """The rows of MEMORY: a name, how many bytes there are, and what they are."""
        ...


# ---- the value


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    data: bytes


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine as a value, without its memory. Parts are by owner and name: `engine/time`, `cpu0/regs`,
    `device/com1`."""

    format: int
    parts: dict[str, Part]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> State:
        """Invalid for bytes that are none, or of a format that is not known here."""
        try:
            state = msgspec.msgpack.decode(data, type=State)
        except msgspec.MsgspecError as error:
            raise Invalid(f"that is no state of a machine: {error}") from None
        if state.format != FORMAT:
            raise Invalid(f"a machine's state of format {state.format}, where {FORMAT} is known")
        return state


def setup_of(state: State) -> Setup:
    """What a machine of that state is made of. Invalid where it does not say so."""
    part = state.parts.get(f"{Owner.MACHINE}/setup")
    if part is None:
        raise Invalid("the state has no setup")
    return unpack(Setup, part.version, part.data, "setup")


def take(body: Body) -> State:
    """What the machine is, between two instructions. What it is in the middle of stays so."""
    return Parts.of(body).state()


def take_with(body: Body, rest: Callable[[], bool]) -> State | None:
    """`take`, and `rest()` while no device does anything, which keeps the memory. None where that gives False."""
    done = False

    def tell() -> None:
        nonlocal done
        done = rest()

    parts = Parts.of(body, tell)
    return parts.state() if done else None


def _asleep(body: Body) -> AbstractContextManager[object]:
    return nullcontext() if body.board is None else body.board.asleep()


@dataclass(frozen=True, slots=True)
class Parts:
    """A State taken apart. `devices`: version and bytes of each one's; the board and they are None where the machine
    has none."""

    setup: Setup
    seen: Seen
    engine: dict[str, bytes]
    cpus: tuple[dict[str, bytes], ...]
    board: BoardState | None
    devices: Mapping[str, tuple[int, bytes]]

    @staticmethod
    def of(body: Body, rest: Callable[[], None] = lambda: None) -> Parts:
        """Those of a machine as it is; `rest()` is done while no device does anything."""
        setup, seen = body.save_setup(), body.save_seen()
        board, devices = None, {}
        with body.engine_machine.at_one_moment():
            engine, cpus = take_engine(body.engine_machine), tuple(map(take_cpu, body.vcpus))
            with _asleep(body):
                if body.board is not None:
                    board, devices = body.board.save(), body.board.pack_devices()
                rest()
        return Parts(setup, seen, engine, cpus, board, devices)

    @property
    def size(self) -> int:
        """Bytes, of what may be large."""
        states = [*self.engine.values(), *(data for cpu in self.cpus for data in cpu.values())]
        return sum(map(len, states)) + sum(len(data) for _, data in self.devices.values())

    def state(self) -> State:
        parts: dict[str, Part] = {}

        def add(owner: str, values: Mapping[str, bytes], rows: tuple[Row, ...]) -> None:
            for row in rows:
                if row.name in values:
                    parts[f"{owner}/{row.name}"] = Part(row.version, values[row.name])

        own = {"setup": msgspec.msgpack.encode(self.setup), "seen": msgspec.msgpack.encode(self.seen)}
        add(Owner.MACHINE, own, rows_of(Owner.MACHINE))
        add(Owner.ENGINE, self.engine, rows_of(Owner.ENGINE))
        for number, values in enumerate(self.cpus):
            add(f"{Owner.CPU}{number}", values, rows_of(Owner.CPU))
        if self.board is not None:
            add(Owner.BOARD, {"board": msgspec.msgpack.encode(self.board)}, rows_of(Owner.BOARD))
            parts.update({f"{Owner.DEVICE}/{name}": Part(*state) for name, state in self.devices.items()})
        return State(FORMAT, parts)


class Opened:
    """A state that a machine can be, checked as far as that works without setting anything: Invalid for what it cannot
    be. It may be put any number of times, as long as the machine has the same parts. `put_on`: that of the engine which
    was made this last, and so can be it."""

    put_on: Machine | None = None

    def __init__(self, body: Body, state: State) -> None:
        self._body = body
        self._left = dict(state.parts)
        setup = unpack(Setup, *self._own("setup"), "setup")
        seen = unpack(Seen, *self._own("seen"), "seen")
        body.check_setup(setup)
        body.check_seen(seen)
        engine = self._values(Owner.ENGINE, Owner.ENGINE)
        cpus = tuple(self._values(Owner.CPU, f"{Owner.CPU}{number}") for number in range(len(body.vcpus)))
        board, devices = None, {}
        if body.board is not None:
            board = unpack(BoardState, *self._part(f"{Owner.BOARD}/board"), "board")
            body.board.check(board)
            prefix = f"{Owner.DEVICE}/"
            names = [name for name in self._left if name.startswith(prefix)]
            states = {name.removeprefix(prefix): self._left.pop(name) for name in names}
            body.board.check_names(states.keys())
            devices = {name: (one.version, one.data) for name, one in states.items()}
            body.board.unpack_devices(devices)
        if self._left:
            raise Invalid(f"the state has a part that this machine has not: {min(self._left)[:60]!r}")
        self.parts = Parts(setup, seen, engine, cpus, board, devices)

    def _own(self, name: str) -> tuple[int, bytes]:
        return self._part(f"{Owner.MACHINE}/{name}")

    def _part(self, name: str) -> tuple[int, bytes]:
        part = self._left.pop(name, None)
        if part is None:
            raise Invalid(f"the state has no {name}")
        return part.version, part.data

    def _values(self, owner: Owner, name: str) -> dict[str, bytes]:
        values = {}
        for row in rows_of(owner):
            if row.with_chips and self._body.board is None:
                continue
            version, values[row.name] = self._part(f"{name}/{row.name}")
            if version != row.version:
                raise Invalid(f"{name}/{row.name}: of version {version}, where {row.version} is known")
        return values


def put(
    body: Body,
    state: State | Opened | Parts,
    put_memory: Callable[[], None] = lambda: None,
    before: Parts | None = None,
) -> None:
    """Make the machine what `state` says; its memory is that of the state already, or is once `put_memory` was called.
    It is whole or not at all: Invalid, Unsupported, and nothing has changed, where the machine cannot be so. Of that,
    memory is no part: where the engine refuses a state when it is set, memory is as it was put. What is so already is
    left alone. `before`: what the machine is, where the caller has looked; Parts are of this machine."""
    if isinstance(state, State):
        state = Opened(body, state)
    wanted = state.parts if isinstance(state, Opened) else state
    body.check_kind(wanted.setup)
    before = before or Parts.of(body)
    with body.engine_machine.at_one_moment():
        try:
            _put(body, wanted, before.setup.engine, put_memory, before)
        except BaseException:
            _put(body, before, before.setup.engine, lambda: None)
            raise


def put_again(body: Body, opened: Opened, put_memory: Callable[[], None]) -> None:
    """`put`, of what this same machine was made once: nothing of it is refused, so that nobody looks what there is
    before."""
    parts = opened.parts
    with body.engine_machine.at_one_moment():
        try:
            _put(body, parts, parts.setup.engine, put_memory)
        except BaseException:  # memory could not be put
            _put(body, parts, parts.setup.engine, lambda: None)
            raise


def _put(
    body: Body, wanted: Parts, engine: str, put_memory: Callable[[], None], present: Parts | None = None
) -> None:
    """`engine`: the one that the machine is of, or was before this was tried. `present`: what it is, where that is
    known."""
    setup, board = wanted.setup, body.board
    is_same = setup.engine == engine
    body.load_setup(setup)
    put_engine(body.engine_machine, wanted.engine)
    with _asleep(body):
        put_memory()
        if board is not None and wanted.board is not None:
            known = present is not None and present.board is not None
            board.put(wanted.board, wanted.devices, (present.board, present.devices) if known else None)
    for vcpu, values in zip(body.vcpus, wanted.cpus, strict=True):
        put_cpu(vcpu, values, None if is_same else setup.new_msrs)
    body.load_seen(wanted.seen)


def state_hash(body: Body) -> bytes:
    """A number of 32 bytes for all that decides what the machine does next, its memory included."""
    digest = hashlib.blake2b(digest_size=32)
    of_run = {f"{row.owner}/{row.name}" for row in ROWS if row.of_run}
    for name, part in sorted(take(body).parts.items()):
        if name == "engine/time":  # when devices, or inputs, are due is theirs to say
            part = Part(part.version, replace(Time.unpack(part.data), deadline=NEVER).pack())
        if name not in of_run:
            digest.update(b"%s %d %d " % (name.encode(), part.version, len(part.data)) + part.data)
    for name, size, memory in body.memories():
        digest.update(b"%s %d " % (name.encode(), size))
        for at, page in _pages(memory):
            digest.update(at.to_bytes(8, "little") + page)
    return digest.digest()


class Source(Protocol):
    """Memory, as something can be read of."""

    def extents(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of what may be other than zeros."""
        ...

    def read_at(self, offset: int, length: int) -> bytes: ...


_PAGE = 4096
_NO_PAGE = bytes(_PAGE)


def _pages(memory: Source) -> Iterator[tuple[int, bytes]]:
    """The pages that are not zeros, whether they were ever touched or not."""
    for start, end in memory.extents():
        for at in range(start, end, 1 << 20):
            data = memory.read_at(at, min(1 << 20, end - at))
            if any(data):
                for offset in range(0, len(data), _PAGE):
                    if (page := data[offset : offset + _PAGE]) != _NO_PAGE[: len(page)]:
                        yield at + offset, page
