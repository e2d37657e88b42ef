"""The contract that every engine keeps. It has the shape of KVM: if you know KVM's ioctls, you know it.

Three classes, `Engine` -> `Machine` -> `Vcpu`, as /dev/kvm, a VM descriptor and a vCPU descriptor are.
State is `bytes` in the layout of the KVM UAPI structs (Linux include/uapi/linux/kvm.h and
arch/x86/include/uapi/asm/kvm.h), whatever the engine: a machine's state taken from one loads in another,
and one test suite (tests/engine) runs on all.

An engine may lack a capability: it is then not in `capabilities`, its methods
raise `errors.Unsupported` with the reason, and the file answers EOPNOTSUPP.

Failures are `vmfs.words.errors`: `Invalid` for bytes that the engine refuses, `Unsupported`, `EngineFailed` naming
the ioctl and its errno. A failed call has changed nothing.

Threads: `Vcpu.run` is called by one thread at a time and drops the GIL while the guest runs. `Vcpu.kick`,
`Vcpu.interrupt`, `Vcpu.nmi`, `Machine.irq_line`, `Machine.signal_msi` and `Machine.dirty_log` may be called from any
thread at any time. Everything else is for a machine that does not run, from any one thread.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from vmfs.words import layouts
from vmfs.words.errors import Invalid, Unsupported
from vmfs.words.exits import Exit
from vmfs.words.stops import Stop


class Capability(enum.StrEnum):
    """What an engine may or may not have."""

    IRQCHIP = "irqchip"  # in-engine interrupt controllers and PIT; irq_line, states irqchip, pit, lapic
    BUDGET = "budget"  # run(budget=N) stops exactly after N instructions, at no cost
    COUNTERS = "counters"  # counters() has "instructions"
    BREAKPOINTS_UNLIMITED = "breakpoints-unlimited"
    WATCHPOINTS = "watchpoints"
    GUEST_DEBUG = "guest-debug"  # set_debug works at all
    TRACE = "trace"  # set_trace works
    DETERMINISTIC = "deterministic"  # time may follow the instructions retired


@dataclass(frozen=True, slots=True)
class StateRow:
    """A state: the KVM struct whose bytes it is, and how many, or None for a list of entries. `still`: it changes only
    when the CPU runs or is set, not with time. `hot`: programs read and set it in loops, so the lane has it
    (vmfs/words/lane.h)."""

    struct: str
    size: int | None
    still: bool = False
    hot: bool = False


# The states by name. The same names are files.
VCPU_STATES: Mapping[str, StateRow] = {
    "regs": StateRow("struct kvm_regs", layouts.REGS_SIZE, still=True, hot=True),
    "sregs": StateRow("struct kvm_sregs", layouts.SREGS_SIZE, still=True, hot=True),
    "fpu": StateRow("struct kvm_fpu", layouts.FPU.size, still=True),
    "xsave": StateRow("struct kvm_xsave", 4096, still=True),
    "xcrs": StateRow("struct kvm_xcrs", 392, still=True),
    "msrs": StateRow("struct kvm_msrs with its entries, of the MSRs that the engine saves", None),
    "debugregs": StateRow("struct kvm_debugregs", 128, still=True),
    "events": StateRow("struct kvm_vcpu_events", 64),
    "mp_state": StateRow("struct kvm_mp_state", 4),
    "cpuid": StateRow("struct kvm_cpuid2 with its entries", None, still=True),
    "lapic": StateRow("struct kvm_lapic_state (with an interrupt controller)", 1024),
}
MACHINE_STATES: Mapping[str, StateRow] = {
    "irqchip": StateRow("three struct kvm_irqchip: PIC master, PIC slave, IOAPIC", 3 * layouts.IRQCHIP.size),
    "pit": StateRow("struct kvm_pit_state2", 112),
    "clock": StateRow("struct kvm_clock_data", 48),
}
SIZES = {name: row.size for table in (VCPU_STATES, MACHINE_STATES) for name, row in table.items() if row.size}
# States that decide what comes next, and that no struct of KVM's has; they are no files. The layouts are in core.h of
# the emulator, and `vmfs.engine.rest` has them for Python. An engine that cannot keep a part of one drops it, and says
# so in its module.
VCPU_REST = {
    "progress": "struct core_progress: half-done instructions, what waits, counts; set after all others",
}
MACHINE_REST = {
    "time": "struct core_time_state: where the clocks stand; set before all others. Timers keep what they have left",
    "turns": "struct core_turns: where CPUs execute in turn, whose turn it is, what is left of it, who stopped last",
    "chips": "levels of lines, delivered edges, counters of the 8254; set after irqchip and pit",
}

PAGE_SIZE = 4096
SLEEP_MOST = 1.0  # seconds that a step or a budget waits for a CPU that sleeps
UNCLAIMED_MSRS = 64  # that a Vcpu remembers
INTERRUPT_QUEUE = 64  # vectors that wait in a Vcpu; one more is errors.WouldBlock


S = TypeVar("S", bound=Stop)


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether an engine can be used here, and a sentence that says why (not)."""

    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class DebugRequest:
    """All that a run shall stop for. A new request replaces the one before.

    Several stops may be of one place: all that were reached are in the exit (`exits.Debug.also`).
    """

    step: bool = False  # stop after one instruction
    stops: tuple[Stop, ...] = ()

    def of(self, kind: type[S]) -> tuple[S, ...]:
        """The stops of one kind, in their order."""
        return tuple(stop for stop in self.stops if isinstance(stop, kind))


NO_DEBUG = DebugRequest()

TRACE_ALL = 0, (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What a CPU tells of itself while it runs. Ranges are linear addresses, the last one included: `place` of the
    instructions, `data` of what they access. Where CPL or mode is not among those named, nothing is traced.

    `coverage`: the jumps that it takes are counted in that buffer, and nothing else is traced. Its size is a power of
    2, from 256 on; a jump adds 1 to a byte, by where it is and where it leads to."""

    instructions: bool = False
    memory: bool = False
    exceptions: bool = False
    interrupts: bool = False
    place: tuple[int, int] = TRACE_ALL
    data: tuple[int, int] = TRACE_ALL
    privileges: frozenset[str] = frozenset({"user", "kernel"})
    modes: frozenset[str] = frozenset({"real", "protected", "long"})
    coverage: Any = None


NO_TRACE = TraceRequest()


# Where a trace goes: `sink(records, events, ended)` is called in the thread of `Vcpu.run`. The records, each a struct
# vmfs_trace of vmfs.h, are so many events. Unless the run has ended, it may wait; a kick of the CPU ends that.
TraceSink = Callable[[bytes, int, bool], None]


class HostMemory(Protocol):
    """Memory of this process (`vmfs.memory.mapping.Mapping`), as an engine is given it by its address."""

    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...


def check_slot(
    slot: int,
    guest_address: int,
    memory: int | HostMemory,
    offset: int,
    size: int,
    *,
    limit: int,
    others: Iterable[tuple[int, int, int]],
) -> None:
    """Invalid for what `Machine.map_memory` refuses. `limit` is how many slots there are; `others` have the number,
    guest address and size of those in use."""
    if not 0 <= slot < limit:
        raise Invalid(f"memory slot {slot}: there are {limit}")
    if not size:
        return
    if min(guest_address, offset, size) < 0 or (guest_address | offset | size) % PAGE_SIZE:
        raise Invalid(f"memory slot {slot}: address, offset and size are multiples of {PAGE_SIZE}")
    end = guest_address + size
    if end > 1 << 52:  # the most that a page table entry can address, Intel SDM 3A 4.1.4
        raise Invalid(f"memory slot {slot}: {end:#x} is beyond the physical address space")
    if offset + size > (os.fstat(memory).st_size if isinstance(memory, int) else memory.size):
        raise Invalid(f"memory slot {slot}: the memory ends before offset {offset + size:#x}")
    for number, address, length in others:
        if number != slot and guest_address < address + length and address < end:
            raise Invalid(f"memory slot {slot}: {guest_address:#x} overlaps slot {number}")


def has_state(cpu: Vcpu, name: str) -> bool:
    """Whether the CPU has a state of VCPU_STATES."""
    try:
        cpu.get_state(name)
    except Unsupported:
        return False
    return True


_DO_MORE = frozenset({"lapic", "msrs", "progress"})  # than they say: a timer begins anew, the last exit ends


def _get_states(source: Machine | Vcpu, names: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    for name in names:
        with contextlib.suppress(Unsupported):
            found[name] = source.get_state(name)
    return found


def _put_states(target: Machine | Vcpu, values: dict[str, bytes]) -> None:
    for name, data in values.items():
        if name in _DO_MORE or target.get_state(name) != data:
            target.set_state(name, data)


class Engine(abc.ABC):
    """A way to run machines: a row of `vmfs.engine.ENGINES`."""

    name: str

    @abc.abstractmethod
    def probe(self) -> Availability:
        """Whether the engine works here, found out by trying; never raises."""

    def prepare(self) -> None:  # noqa: B027
        """Get what machines need of the host, while this process may: they are made by a child that may not.

        What is missing is said by `create_machine`.
        """

    def prepare_process(self) -> None:  # noqa: B027
        """The same in the child, before it may open no more files."""

    @abc.abstractmethod
    def create_machine(self) -> Machine:
        """A machine without memory and CPUs."""


class Machine(abc.ABC):
    """A virtual machine: KVM_CREATE_VM."""

    sees_due = False  # it looks at what is due on a fast bus by itself

    capabilities: frozenset[Capability]

    @abc.abstractmethod
    def map_memory(
        self,
        slot: int,
        guest_address: int,
        memory: int | HostMemory,
        offset: int,
        size: int,
        *,
        read_only: bool = False,
    ) -> None:
        """Back `size` bytes of guest-physical memory at `guest_address` with `memory` from `offset` on: with the file
        of a descriptor, shared; or with memory of this process, whatever that is now or later. The engine has it until
        the slot goes.

        All are multiples of 4096. A slot that exists is replaced; size 0 removes it. Writes by the guest are
        logged in the slot's dirty log from now on.
        """

    @abc.abstractmethod
    def create_vcpu(self, index: int) -> Vcpu:
        """CPU `index` in the x86 reset state (Intel SDM 3A 9.1.1), with the CPUID of the engine."""

    def runners(self, cpus: Sequence[Vcpu]) -> Sequence[Runner]:
        """What runs these, which are all of its CPUs in order: each in a thread of its own, all at the same time. Asked
        at the begin of each run."""
        return cpus

    def in_turn(self, cpus: Sequence[Vcpu]) -> Runner | None:
        """What runs them in turn, and counts the instructions of all, where the engine can do that."""
        return None

    @abc.abstractmethod
    def create_irqchip(self) -> None:
        """LAPICs, IOAPIC, two 8259 and an 8254 in the engine; before the first CPU."""

    def own(self) -> None:
        """In a process that was forked, of a machine that has not run: have for itself what it would share with the
        other process. Unsupported where a machine is of the process that made it."""
        raise Unsupported("a machine of this engine is of the process that made it")

    @abc.abstractmethod
    def irq_line(self, gsi: int, level: bool) -> None:
        """Set an input line of the interrupt controllers (KVM's default routing)."""

    @abc.abstractmethod
    def signal_msi(self, address: int, data: int) -> None:
        """A message-signalled interrupt, as a device writes it (Intel SDM 3A 11.11, KVM_SIGNAL_MSI): an edge. One that
        names no local APIC goes nowhere."""

    def set_deadline(self, when: int | None) -> None:
        """End a run with `exits.Interrupted`, between two instructions, once the state `clock` has come to `when` (in
        nanoseconds), whether the CPU executes or halts then; and forget it. None: never. It takes the place of the one
        before. Where the time has come already, the next run may end as it begins, or nothing happens: the caller
        looks. With capability IRQCHIP."""
        raise Unsupported("a deadline: machines without interrupt controllers have no devices, and need none")

    def end_soon(self) -> None:
        """The same at the next nanosecond of its time, at which it has not been yet. From any thread. With capability
        DETERMINISTIC, as `ended_soon`."""
        raise Unsupported("an end at the next nanosecond: time does not follow the instructions with this engine")

    def ended_soon(self) -> bool:
        """Whether `end_soon` has ended the last run; once. Then nothing has happened at this time before, so a deadline
        of this time would have ended the run at the same place."""
        return False

    def memory_written(self, address: int, size: int) -> None:  # noqa: B027
        """Others than CPUs have written guest-physical memory: code there is not what it was. From any thread, before
        the guest can know that it is written. What devices write comes by the fast bus. What others write (clients, a
        loader) is seen by the next run that does not go on.
        """

    def set_fast_bus(self, bus: object | None) -> bool:
        """Have C code of the board's devices answer accesses before they are exits: a capsule of vmfs/words/bus.h,
        which drives this machine's lines until it closes or gets another one. While the machine does not run.
        False where the engine does not: then all accesses are exits, and it need not know what devices write.
        Where it is not `sees_due`, `set_deadline` has what is due on the bus, too."""
        return False

    def set_fresh(self, pattern: bytes, end: int) -> None:
        """Tell of reads of RAM below `end` that nobody has written since it had a pattern, of a page, everywhere: in
        the counter `unwritten_reads` and by `UnwrittenStop`, of each byte once. Not during a run."""
        raise Unsupported("a strict machine: this engine does not see reads of memory that nobody has written")

    def set_a20(self, enabled: bool) -> None:
        """Whether address bit 20 reaches memory, as in a new machine, or is zero, as with the PC's A20 gate closed.
        No state has it."""
        raise Unsupported("the A20 gate: address bit 20 is always on with this engine")

    def set_timer_output(self, connected: bool) -> None:
        """Whether channel 0 of the 8254 interrupts. The state `pit` has it."""
        raise Unsupported("the 8254's interrupt: this engine cannot disconnect it")

    def set_time(self, source: str) -> None:
        """Where the TSC and the timers have their time from (capability DETERMINISTIC): `instructions`, those retired,
        which is what a new machine has; or `host`, the host's monotonic clock. Time goes on from where it is."""
        raise Unsupported("time follows the host's clock on this engine")

    def set_paced(self, paced: bool) -> None:
        """With `instructions` as the source of time: CPUs that sleep do so for as long as that takes on the host's
        clock, or until something comes for them; else their time jumps to the next timer."""
        raise Unsupported("time follows the host's clock on this engine")

    def set_repeatable(self, repeatable: bool) -> None:
        """Stops change nothing of what the guest does: a run that begins at a breakpoint delivers interrupts before the
        instruction there, and stops again after them; else it executes that instruction first."""
        raise Unsupported("a run does not repeat on this engine")

    def pass_time(self, nanoseconds: int) -> None:
        """With `instructions` as the source of time: so much passes now, in which nothing is executed. Between two
        slices of a run."""
        raise Unsupported("time follows the host's clock on this engine")

    def at_one_moment(self) -> AbstractContextManager[object]:
        """In this block, in which no CPU executes, the machine's time stands still: what is got or set of the CPUs'
        clocks is of one moment. Blocks may be in each other."""
        return nullcontext()

    @abc.abstractmethod
    def dirty_log(self, slot: int) -> bytes:
        """A bit a 4 KiB page of the slot, bit 0 of byte 0 first: what the guest wrote since the last call."""

    @abc.abstractmethod
    def get_state(self, name: str) -> bytes:
        """A state of MACHINE_STATES or MACHINE_REST."""

    @abc.abstractmethod
    def set_state(self, name: str, data: bytes) -> None:
        """Set a state of MACHINE_STATES or MACHINE_REST, whole. `Invalid` for what cannot be; nothing has changed."""

    def get_states(self, names: tuple[str, ...]) -> dict[str, bytes]:
        """Those of these states that there are."""
        return _get_states(self, names)

    def put_states(self, values: dict[str, bytes]) -> None:
        """Set them in turn, but for those that are so already when their turn comes. The exception of the first one
        that is refused; those before it are set."""
        _put_states(self, values)

    def rest(self) -> None:  # noqa: B027 - an engine may have nothing to give back
        """Give back memory that only makes runs faster: there was none for long. None of the CPUs runs."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free everything, CPUs too. None of them runs. May be called twice."""


class Runner(Protocol):
    """A CPU, or several that an engine runs in one thread. The exit says which CPU's it is (`Exit.cpu`)."""

    def run(self, budget: int | None = None, *, goes_on: bool = False) -> Exit:
        """As `Vcpu.run`; a budget is for all of them together."""
        ...

    def kick(self) -> None:
        """As `Vcpu.kick`."""
        ...

    def clear_kick(self) -> None:
        """As `Vcpu.clear_kick`."""
        ...

    @property
    def exits_waiting(self) -> bool:
        """As `Vcpu.exits_waiting`."""
        ...

    def counters(self) -> dict[str, int]:
        """As `Vcpu.counters`, the sums."""
        ...


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception that was raised, and what the CPU was when it was."""

    vector: int
    error: int | None  # the error code; None: there is none
    address: int | None  # of a page fault
    becomes: int | None  # the vector that was delivered for it: #DF, perhaps. None: the CPU shut down
    within: str | None  # raised by the delivery of an `exception`, an `interrupt` or a `software` interrupt
    delivering: int | None  # ... of that vector
    cpl: int
    cs: int
    ss: int
    linear: int  # of the instruction
    rip: int
    rsp: int
    cr2: int  # before it
    cr3: int
    instructions: int  # done before it


class Step(NamedTuple):
    """An instruction that was executed."""

    linear: int
    ip: int
    bits: int  # 16, 32 or 64
    code: bytes  # empty: it is what is in memory there


class Vcpu(abc.ABC):
    """A virtual CPU: KVM_CREATE_VCPU."""

    index: int
    # A capsule by which C code runs it in the thread of its own, without Python (vmfs/words/lane.h).
    lane: object | None = None

    def left_exit(self) -> Exit:
        """The exit of the last run by `lane` that counts, from any thread."""
        raise NotImplementedError

    def ended_exit(self) -> Exit | None:
        """The exit of the run by `lane` that Python is to end; None where it has to go on to one. In its thread."""
        raise NotImplementedError

    @abc.abstractmethod
    def run(self, budget: int | None = None, *, goes_on: bool = False) -> Exit:
        """Run the guest until its next exit, in the calling thread, without the GIL.

        `kick()` ends it with `exits.Interrupted`. A budget (capability BUDGET) ends it with `exits.Limit`
        after exactly so many instructions. One with a budget or in steps also ends with it once the CPU has slept
        for SLEEP_MOST seconds, waiting for an interrupt: it still sleeps.

        What the guest does wrong is an exit; what the engine cannot do is
        `exits.Error`; an exception is a fault of the host or of this program.

        A run that starts at a breakpoint executes the instruction there. One that `goes_on` does that only
        where the run before it stopped for the breakpoint, or began there and executed nothing: a run in
        several slices stops wherever one in one piece would. Of memory that was written meanwhile it knows only what
        `memory_written` has named. A single step ends with
        Debug(cause="step"), or with the exit that the instruction makes; completing an `in` or a load
        ends a step, too.

        Pending accesses: an `out` or a store is done when the exit is returned. An `in` or a load completes
        at the next run with the bytes of `access_data` (all ones until they are set). Reading state before
        that shows the CPU before the instruction. Setting state before that completes the instruction first,
        with the bytes as they stand, and then sets.
        """

    @abc.abstractmethod
    def kick(self) -> None:
        """End the current `run` between two instructions with `exits.Interrupted`, or the next at its start.

        From any thread, any number of times; one Interrupted answers all kicks before it. An exit that was on
        its way is returned instead, and the kick then ends the next run: callers use `clear_kick`.
        """

    @abc.abstractmethod
    def clear_kick(self) -> None:
        """Forget a kick that no run has answered yet."""

    @property
    @abc.abstractmethod
    def access_data(self) -> bytes:
        """The bytes of the last exit's access: what was written, or what a read will get; or empty."""

    @access_data.setter
    @abc.abstractmethod
    def access_data(self, data: bytes) -> None:
        """Set the bytes that the pending `in` or load returns: exactly as many, else `Invalid`."""

    @abc.abstractmethod
    def get_state(self, name: str) -> bytes:
        """A state of VCPU_STATES or VCPU_REST."""

    @abc.abstractmethod
    def set_state(self, name: str, data: bytes) -> None:
        """Set a state of VCPU_STATES or VCPU_REST, whole. `Invalid` for a length or content that the engine refuses.

        "progress" takes the place of what the CPU is in the middle of, which is given up. Every other state ends that:
        a read that waits completes, with the bytes as they stand.
        """

    def has_cpuid(self, data: bytes) -> bool:
        """Whether `cpuid` is that, or was and has not been set since."""
        return self.get_state("cpuid") == data

    def get_states(self, names: tuple[str, ...]) -> dict[str, bytes]:
        """Those of these states that there are."""
        return _get_states(self, names)

    def put_states(self, values: dict[str, bytes]) -> None:
        """Set them in turn, but for those that are so already when their turn comes. The exception of the first one
        that is refused; those before it are set. Memory may have changed with them, page tables as well: what the CPU
        has kept of those it forgets."""
        _put_states(self, values)

    def complete(self) -> None:
        """Complete the pending `in` or load now, with the bytes as they stand.

        What changes a part of a state calls this first: a state that was got before the access completed has
        the old rip in it, and setting that would execute the instruction again.
        """
        self.set_state("mp_state", self.get_state("mp_state"))  # setting any state completes

    @abc.abstractmethod
    def get_msr(self, index: int) -> int:
        """One MSR; `Invalid` where the CPU has none of that number."""

    @abc.abstractmethod
    def set_msr(self, index: int, value: int) -> None:
        """Set one MSR; `Invalid` where the CPU would raise #GP."""

    @abc.abstractmethod
    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt: delivered in order, each when the guest can take it (IF, shadows).

        `WouldBlock` when INTERRUPT_QUEUE vectors wait. The guest must be kicked to notice it while it runs.
        """

    @property
    @abc.abstractmethod
    def queued_vectors(self) -> tuple[int, ...]:
        """The vectors that wait, the first to be delivered first. For a CPU that does not run."""

    @property
    def interrupts_queued(self) -> int:
        """How many vectors wait; from any thread."""
        return len(self.queued_vectors)

    @property
    @abc.abstractmethod
    def exits_waiting(self) -> bool:
        """Whether runs still have exits of a completed instruction to return: state does not have them."""

    @abc.abstractmethod
    def nmi(self) -> None:
        """Make a non-maskable interrupt pending."""

    @abc.abstractmethod
    def set_debug(self, request: DebugRequest) -> None:
        """What runs stop for from now on. `Unsupported` names what cannot be watched, and nothing changes."""

    def way_of(self, id_: int) -> str:
        """How a stop of the last request is watched for: `engine` (it costs nothing), `hardware` (the CPU's
        debug registers), `stepping` (an instruction at a time), `protection` (of its page)."""
        return "engine"

    @property
    def took_event(self) -> bool:
        """Whether an interrupt or an exception was delivered since the last instruction that is done: it is counted as
        none. Of an engine that counts (COUNTERS); one that was set does not know of those before."""
        return False

    def unclaimed_msrs(self) -> tuple[tuple[int, int, int, int], ...]:
        """MSRs that the guest has used and the CPU has not (so it got #GP): number, reads, writes, and the rip of the
        last time; the one last used at the end. The last UNCLAIMED_MSRS of them; none where the engine cannot tell."""
        return ()

    def set_trace(self, request: TraceRequest, sink: TraceSink) -> None:
        """What runs tell `sink` from now on (capability TRACE), until the next request."""
        raise Unsupported("this engine does not trace")

    def last_faults(self) -> list[Fault] | None:
        """The last exceptions that it raised, the newest at the end; None where the engine does not tell."""
        return None

    def last_steps(self, most: int) -> list[Step] | None:
        """The last instructions up to where it stands, the newest at the end: as many as are certain, and `most` at
        most. None where the engine does not tell."""
        return None

    def last_exits(self) -> list[Exit] | None:
        """The last accesses and halts that its runs ended with, the newest at the end, also those that the bus in C
        has answered: of an engine that does not tell the last instructions. Else None."""
        return None

    @abc.abstractmethod
    def translate(self, linear: int) -> int | None:
        """The guest-physical address of a linear one by the CPU's page tables, or None (KVM_TRANSLATE)."""

    @abc.abstractmethod
    def counters(self) -> dict[str, int]:
        """What the engine counts (capability COUNTERS: "instructions"); may be empty."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the CPU. It does not run. May be called twice."""
