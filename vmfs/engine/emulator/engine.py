"""The emulator engine: the contract of `vmfs.engine.base` over the C core (core/core.h, by core/python/).

It runs everywhere, counts instructions, stops after exactly as many as it is told, and in its deterministic
time the same start and the same inputs give the same run. Break- and watchpoints are kept outside of guest
memory and are not limited in number. What the core does not implement is listed in docs/emulator.md.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, cast

from vmfs.engine.base import (
    MACHINE_REST,
    MACHINE_STATES,
    VCPU_REST,
    VCPU_STATES,
    Availability,
    Capability,
    DebugRequest,
    Engine,
    Fault,
    HostMemory,
    Machine,
    Runner,
    Step,
    TraceRequest,
    TraceSink,
    Vcpu,
    check_slot,
)
from vmfs.engine.emulator import _core
from vmfs.words import exits
from vmfs.words.errors import EngineFailed, Invalid, Unsupported, VmfsError, WouldBlock
from vmfs.words.exits import Exit
from vmfs.words.stops import (
    Breakpoint,
    Cr3Stop,
    ModeStop,
    PortStop,
    Stop,
    UnclaimedStop,
    UnwrittenStop,
    VectorStop,
    Watchpoint,
)

log = logging.getLogger(__name__)

_PAGE_FAULT = 14  # #PF
_NEVER = (1 << 64) - 1  # CORE_NEVER
IRQ_LINES = 24  # KVM's default routing: the IOAPIC's pins

_TRACE_MODES = {
    "user": _core.TRACE_USER,
    "kernel": _core.TRACE_KERNEL,
    "real": _core.TRACE_REAL,
    "protected": _core.TRACE_PROTECTED,
    "long": _core.TRACE_LONG,
}
_ERRORS: dict[int, type[VmfsError]] = {
    errno.EINVAL: Invalid,
    errno.EOPNOTSUPP: Unsupported,
    errno.EAGAIN: WouldBlock,
}


# Why the core refuses a state (core/cpu/state.c).
_REFUSED: Mapping[str, str] = {
    "sregs": "a reserved bit of a control register, EFER or the APIC base is set, or CR0, CR4, EFER and CS.L"
    " contradict each other",
    "fpu": "a reserved bit of MXCSR is set",
    "xsave": "a reserved bit of MXCSR is set, or XSTATE_BV names a component that the CPU does not have",
    "xcrs": "XCR0 has a bit that the CPU does not have, or lacks one that another needs; or nr_xcrs or flags is wrong",
    "msrs": "the CPU does not have one of these MSRs, or it does not take the value; or nmsrs is not their number",
    "debugregs": "the upper half of DR6 or DR7, or flags, is not zero",
    "events": "exception.nr is no exception, a flag is unknown, or it asks for SMM, which the CPU does not have",
    "mp_state": "RUNNABLE is the only one without interrupt controllers; of the others there are those up to HALTED",
    "cpuid": "nent is not the number of the entries, or there are too many",
    "lapic": "the ID is not the one that the APIC has in x2APIC mode",
    "irqchip": "a chip_id is wrong (PIC master, PIC slave, IOAPIC, in this order), or a chip cannot have such a state",
    "pit": "a channel cannot have such a state, or a flag is unknown",
    "progress": "its version, a length, a flag or an exit that waits cannot be; or it has vectors, and the machine"
    " interrupt controllers, which make them",
    "time": "its version, its length or a time cannot be",
    "turns": "its length, the CPU or the number of instructions cannot be",
    "chips": "its version, its length, a line or a counter cannot be; or there are no interrupt controllers",
}


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """The core's errno as an exception of ours; `what` begins the sentence."""
    try:
        yield
    except OSError as error:
        raise _failure(what, error) from error


def _failure(what: str, error: OSError) -> VmfsError:
    return _ERRORS.get(error.errno or 0, EngineFailed)(f"{what}: {os.strerror(error.errno or 0)}")


def _put_states(put: Callable[[dict[str, bytes]], None], values: dict[str, bytes]) -> None:
    try:
        put(values)
    except OSError as error:
        raise _refusal(error.filename or "states", error) from error


def _set_state(setter: Callable[[str, bytes], None], name: str, data: bytes) -> None:
    try:
        setter(name, data)
    except OSError as error:
        raise _refusal(name, error) from error


def _refusal(name: str, error: OSError) -> VmfsError:
    """What the core says of a state that was to be set."""
    if error.errno == errno.EINVAL and name in _REFUSED:
        return Invalid(f"{name}: {_REFUSED[name]}")
    return _ERRORS.get(error.errno or 0, EngineFailed)(f"{name}: {os.strerror(error.errno or 0)}")


class EmulatorEngine(Engine):
    """The bundled x86-64 emulator."""

    name = "emulator"

    def probe(self) -> Availability:
        return Availability(True, "an interpreter in C, on any host")

    def prepare_process(self) -> None:
        try:
            _core.open_jitdump()
        except OSError as error:
            log.warning("VMFS_JIT_DUMP=%s: %s", os.environ.get("VMFS_JIT_DUMP"), error.strerror)

    def create_machine(self) -> EmulatorMachine:
        return EmulatorMachine()


class _Moment:
    """A block in which the time of a machine stands, within others or not. No generator: that takes longer than the
    block."""

    def __init__(self, vm: _core.Vm) -> None:
        self._vm = vm
        self._depth = 0

    def __enter__(self) -> None:
        if not self._depth:
            self._vm.stand(True)
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._vm.stand(False)


class EmulatorMachine(Machine):
    """A `struct vm` of the core."""

    sees_due = True

    def __init__(self) -> None:
        self._vm = _core.Vm()
        self._has_irqchip = False
        self._moment = _Moment(self._vm)
        # guest address, size, and the memory, which is there for as long as the core has it
        self._slots: dict[int, tuple[int, int, int | HostMemory]] = {}
        self._vcpus: set[int] = set()
        self.capabilities = frozenset(
            {
                Capability.BUDGET,
                Capability.COUNTERS,
                Capability.GUEST_DEBUG,
                Capability.WATCHPOINTS,
                Capability.BREAKPOINTS_UNLIMITED,
                Capability.DETERMINISTIC,
                Capability.IRQCHIP,
                Capability.TRACE,
            }
        )

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
        others = ((number, *place) for number, (*place, _) in self._slots.items())
        check_slot(slot, guest_address, memory, offset, size, limit=_core.SLOTS, others=others)
        fd, host = (memory, 0) if isinstance(memory, int) else (-1, memory.address + offset)
        with _failures(f"memory slot {slot} at {guest_address:#x}"):
            self._vm.map(slot, guest_address if size else 0, fd, offset if size else 0, size, read_only, host)
        self._slots.pop(slot, None)
        if size:
            self._slots[slot] = guest_address, size, memory

    def create_vcpu(self, index: int) -> EmulatorVcpu:
        if index in self._vcpus:
            raise Invalid(f"there is a cpu {index} already")
        if not 0 <= index < _core.VCPUS:
            raise Invalid(f"{index} is no number of a CPU: 0 to {_core.VCPUS - 1}")
        with _failures(f"cpu {index}"):
            cpu = self._vm.create_vcpu(index)
        self._vcpus.add(index)
        return EmulatorVcpu(index, cpu, has_irqchip=self._has_irqchip)

    def create_irqchip(self) -> None:
        if self._has_irqchip:
            raise Invalid("the machine has its interrupt controllers already")
        if self._vcpus:
            raise Invalid("interrupt controllers come before the first CPU")
        with _failures("interrupt controllers"):
            self._vm.create_irqchip()
        self._has_irqchip = True

    def runners(self, cpus: Sequence[Vcpu]) -> Sequence[Runner]:
        is_parallel = self._vm.set_parallel(len(cpus) > 1)
        return cpus if is_parallel or len(cpus) == 1 else (self.in_turn(cpus),)

    def in_turn(self, cpus: Sequence[Vcpu]) -> Runner:
        return EmulatorTurns(self._vm, cast("Sequence[EmulatorVcpu]", cpus))

    def set_fresh(self, pattern: bytes, end: int) -> None:
        with _failures("memory that nobody has written"):
            self._vm.set_fresh(pattern, end)

    def set_a20(self, enabled: bool) -> None:
        self._vm.set_a20(enabled)

    def set_timer_output(self, connected: bool) -> None:
        self._vm.set_timer_output(connected)

    def irq_line(self, gsi: int, level: bool) -> None:
        if not self._has_irqchip:
            raise Unsupported("an interrupt line: the machine has no interrupt controller")
        if not 0 <= gsi < IRQ_LINES:
            raise Invalid(f"interrupt line {gsi}: there are lines 0 to {IRQ_LINES - 1}")
        with _failures(f"interrupt line {gsi}"):
            self._vm.irq_line(gsi, level)

    def signal_msi(self, address: int, data: int) -> None:
        if not self._has_irqchip:
            raise Unsupported("a message-signalled interrupt: the machine has no interrupt controller")
        self._vm.signal_msi(address, data)

    def set_deadline(self, when: int | None) -> None:
        self._vm.set_deadline(_NEVER if when is None else max(when, 0))

    def end_soon(self) -> None:
        self._vm.end_soon()

    def ended_soon(self) -> bool:
        return self._vm.ended_soon()

    def memory_written(self, address: int, size: int) -> None:
        self._vm.memory_written(address, size)

    def set_fast_bus(self, bus: object | None) -> bool:
        self._vm.set_bus(bus)
        return True

    def own(self) -> None:
        with _failures("the translator's memory"):
            self._vm.own()

    def set_time(self, source: str) -> None:
        if source not in ("host", "instructions"):
            raise Invalid(f"there is no time source {source}")
        self._vm.set_host_time(source == "host")

    def at_one_moment(self) -> AbstractContextManager[object]:
        return self._moment

    def dirty_log(self, slot: int) -> bytes:
        if slot not in self._slots:
            raise Invalid(f"there is no memory slot {slot}")
        try:  # and no _failures, which takes as long as the rest
            return self._vm.dirty_log(slot)
        except OSError as error:
            raise _failure(f"dirty log of slot {slot}", error) from error

    def set_paced(self, paced: bool) -> None:
        self._vm.set_paced(paced)

    def set_repeatable(self, repeatable: bool) -> None:
        self._vm.set_repeatable(repeatable)

    def pass_time(self, nanoseconds: int) -> None:
        self._vm.pass_time(nanoseconds)

    def get_state(self, name: str) -> bytes:
        self._check_state(name)
        try:  # and no _failures, which takes as long as the rest
            return self._vm.get_state(name)
        except OSError as error:
            raise _failure(name, error) from error

    def set_state(self, name: str, data: bytes) -> None:
        self._check_state(name)
        _set_state(self._vm.set_state, name, data)

    def get_states(self, names: tuple[str, ...]) -> dict[str, bytes]:
        with _failures("states"):
            return self._vm.get_states(names)

    def put_states(self, values: dict[str, bytes]) -> None:
        _put_states(self._vm.put_states, values)

    def _check_state(self, name: str) -> None:
        if name in MACHINE_REST:
            return
        if name not in MACHINE_STATES:
            raise Invalid(f"there is no state {name}")
        if name != "clock" and not self._has_irqchip:
            raise Unsupported(f"{name}: the machine has no interrupt controller")

    def rest(self) -> None:
        with _failures("rest"):
            self._vm.rest()

    def close(self) -> None:
        with _failures("close"):
            self._vm.close()
        self._slots.clear()


class EmulatorTurns:
    """All CPUs of a machine, which execute in turn in one thread."""

    def __init__(self, vm: _core.Vm, cpus: Sequence[EmulatorVcpu]) -> None:
        self._vm = vm
        self._cpus = cpus

    def run(self, budget: int | None = None, *, goes_on: bool = False) -> Exit:
        with _failures("run"):
            which, exit_ = self._vm.run(-1 if budget is None else budget, goes_on)
        return self._cpus[which].exit_of(exit_)

    def kick(self) -> None:
        for cpu in self._cpus:
            cpu.kick()

    def clear_kick(self) -> None:
        for cpu in self._cpus:
            cpu.clear_kick()

    @property
    def exits_waiting(self) -> bool:
        return any(cpu.exits_waiting for cpu in self._cpus)

    def counters(self) -> dict[str, int]:
        counted = [cpu.counters() for cpu in self._cpus]
        return {name: sum(one[name] for one in counted) for name in counted[0]}


class EmulatorVcpu(Vcpu):
    """A `struct vcpu` of the core. `makers`: of exits of the core's tuples, by their reason."""

    makers: ClassVar[Mapping[int, Callable[[EmulatorVcpu, tuple, bytes], Exit]]]

    def __init__(self, index: int, cpu: _core.Vcpu, *, has_irqchip: bool) -> None:
        self.index = index
        self._cpu = cpu
        self.core = cpu  # for vmfs.library: hooks, and registers one at a time
        self.lane = cpu.lane
        self._has_irqchip = has_irqchip
        self._closed = self._counts_coverage = False

    def run(self, budget: int | None = None, *, goes_on: bool = False) -> Exit:
        try:  # and no _failures, which takes as long as the rest of an exit
            exit_ = self._cpu.run(-1 if budget is None else budget, goes_on)
        except Exception:
            with _failures("run"):
                raise
        return _MAKERS[exit_[0]](self, exit_, self._cpu.access_data if exit_[2] else b"")

    def exit_of(self, exit_: tuple) -> Exit:
        """The exit that is the core's tuple, after a run of several CPUs."""
        return _MAKERS[exit_[0]](self, exit_, self._cpu.access_data if exit_[2] else b"")

    def left_exit(self) -> Exit:
        return self._left(counts=True)

    def ended_exit(self) -> Exit:
        return self._left(counts=False)

    def _left(self, counts: bool) -> Exit:
        exit_, data = self._cpu.left(counts)
        return _MAKERS[exit_[0]](self, exit_, data if exit_[2] else b"")

    # The exits: (reason, rip, write, size, count, address, cause, id, vector, message), and what was written

    def _io(self, exit_: tuple, data: bytes) -> Exit:
        _, rip, write, size, count, port, *_ = exit_
        direction = "out" if write else "in"
        return exits.Io(direction=direction, port=port, size=size, count=count, data=data, rip=rip, cpu=self.index)

    def _mmio(self, exit_: tuple, data: bytes) -> Exit:
        _, rip, write, size, _, address, *_ = exit_
        direction = "write" if write else "read"
        return exits.Mmio(direction=direction, addr=address, size=size, data=data, rip=rip, cpu=self.index)

    def _hlt(self, exit_: tuple, data: bytes) -> Exit:
        return exits.Hlt(rip=exit_[1], cpu=self.index)

    def _debug(self, exit_: tuple, data: bytes) -> Exit:
        stop = self._stop(exit_)
        if stop.cause != "step":
            stop.also = tuple(map(self._stop, self._cpu.also()))
        return stop

    def _stop(self, exit_: tuple) -> exits.Debug:
        _, rip, _, _, _, address, cause, id_, vector, _ = exit_
        name = exits.DEBUG_CAUSES[cause]
        is_event = name in ("exception", "interrupt")
        is_page_fault = name == "exception" and vector == _PAGE_FAULT
        return exits.Debug(
            cause=name,
            id=None if name == "step" else id_,
            addr=address if name in ("watchpoint", "io", "unwritten", "unclaimed") or is_page_fault else None,
            vector=vector if is_event else None,
            rip=rip,
            cpu=self.index,
        )

    def _shutdown(self, exit_: tuple, data: bytes) -> Exit:
        return exits.Shutdown(cause="triple-fault", rip=exit_[1], cpu=self.index)

    def _interrupted(self, exit_: tuple, data: bytes) -> Exit:
        return exits.Interrupted(rip=exit_[1], cpu=self.index)

    def _limit(self, exit_: tuple, data: bytes) -> Exit:
        return exits.Limit(rip=exit_[1], cpu=self.index)

    def _error(self, exit_: tuple, data: bytes) -> Exit:
        return exits.Error(reason=exit_[9] or "the core gave no reason", rip=exit_[1], cpu=self.index)

    def kick(self) -> None:
        if not self._closed:
            self._cpu.kick()

    def clear_kick(self) -> None:
        if not self._closed:
            self._cpu.clear_kick()

    @property
    def access_data(self) -> bytes:
        return b"" if self._closed else self._cpu.access_data

    @access_data.setter
    def access_data(self, data: bytes) -> None:
        if self._closed or not self._cpu.reading:
            raise Invalid("no read waits for data")
        size = len(self._cpu.access_data)
        if len(data) != size:
            raise Invalid(f"the pending read takes {size} bytes, not {len(data)}")
        self._cpu.access_data = data

    def get_state(self, name: str) -> bytes:
        self._check_state(name)
        try:  # and no _failures, which takes as long as the rest
            return self._cpu.get_state(name)
        except OSError as error:
            raise _failure(name, error) from error

    def set_state(self, name: str, data: bytes) -> None:
        self._check_state(name)
        _set_state(self._cpu.set_state, name, data)

    def get_states(self, names: tuple[str, ...]) -> dict[str, bytes]:
        with _failures("states"):
            return self._cpu.get_states(names)

    def put_states(self, values: dict[str, bytes]) -> None:
        _put_states(self._cpu.put_states, values)

    def _check_state(self, name: str) -> None:
        if name not in VCPU_STATES and name not in VCPU_REST:
            raise Invalid(f"there is no state {name}")
        if name == "lapic" and not self._has_irqchip:
            raise Unsupported("lapic: the machine has no interrupt controllers")

    def complete(self) -> None:
        with _failures("the pending access"):
            if self._cpu.reading:
                super().complete()

    def get_msr(self, index: int) -> int:
        with _failures(f"MSR {index:#x}"):
            return self._cpu.get_msr(index)

    def set_msr(self, index: int, value: int) -> None:
        self.complete()
        with _failures(f"MSR {index:#x}"):
            self._cpu.set_msr(index, value)

    def interrupt(self, vector: int) -> None:
        if self._has_irqchip:
            raise Unsupported("the machine has interrupt controllers, and they make the vectors: use a line")
        if not 0 <= vector <= 255:
            raise Invalid(f"{vector} is no vector: 0 to 255")
        with _failures(f"{self.interrupts_queued} interrupts wait"):
            self._cpu.interrupt(vector)

    @property
    def queued_vectors(self) -> tuple[int, ...]:
        return () if self._closed else self._cpu.queued_vectors

    @property
    def interrupts_queued(self) -> int:
        return 0 if self._closed else self._cpu.interrupts_queued

    @property
    def exits_waiting(self) -> bool:
        return not self._closed and self._cpu.exits_waiting

    @property
    def took_event(self) -> bool:
        return not self._closed and self._cpu.took_event

    def nmi(self) -> None:
        with _failures("nmi"):
            self._cpu.nmi()

    def set_debug(self, request: DebugRequest) -> None:
        stops = [(kind, stop.id, *rest) for stop in request.stops for kind, *rest in _core_stops(stop)]
        with _failures("debug"):
            self._cpu.set_debug(request.step, stops)

    def set_trace(self, request: TraceRequest, sink: TraceSink) -> None:
        kinds = sum(
            1 << kind
            for kind, on in (
                (_core.TRACE_INSN, request.instructions),
                (_core.TRACE_MEM, request.memory),
                (_core.TRACE_EXCEPTION, request.exceptions),
                (_core.TRACE_INTERRUPT, request.interrupts),
            )
            if on
        )
        modes = sum(_TRACE_MODES[name] for name in request.privileges | request.modes)
        with _failures("trace"):
            if request.coverage is not None or self._counts_coverage:
                self._cpu.set_coverage(request.coverage, modes, *request.place)
                self._counts_coverage = request.coverage is not None
            if not self._counts_coverage:
                self._cpu.set_trace(kinds, modes, *request.place, *request.data, sink)

    def translate(self, linear: int) -> int | None:
        with _failures("translate"):
            return self._cpu.translate(linear & (1 << 64) - 1)

    def unclaimed_msrs(self) -> tuple[tuple[int, int, int, int], ...]:
        with _failures("MSRs"):
            return self._cpu.unclaimed_msrs

    def last_faults(self) -> list[Fault]:
        with _failures("faults"):
            return [_fault(*one) for one in _FAULT.iter_unpack(self._cpu.faults)]

    def last_steps(self, most: int) -> list[Step]:
        with _failures("steps"):
            return [Step(*one) for one in self._cpu.steps(most)]

    def counters(self) -> dict[str, int]:
        with _failures("counters"):
            return self._cpu.counters()

    def close(self) -> None:
        with _failures("close"):
            self._cpu.close()
        self._closed = True


# struct core_fault
_FAULT = struct.Struct("<6B2H2xI7Q")
_SHUTDOWN = 255  # CORE_SHUTDOWN
_WITHIN = (None, "exception", "interrupt", "software")  # enum core_within


def _fault(vector: int, has_error: int, becomes: int, within: int, delivering: int, cpl: int, *more: int) -> Fault:
    cs, ss, error, address, linear, rip, rsp, cr2, cr3, instructions = more
    return Fault(
        vector=vector,
        error=error if has_error else None,
        address=address if vector == _PAGE_FAULT else None,
        becomes=None if becomes == _SHUTDOWN else becomes,
        within=_WITHIN[within],
        delivering=delivering if within else None,
        cpl=cpl,
        cs=cs,
        ss=ss,
        linear=linear,
        rip=rip,
        rsp=rsp,
        cr2=cr2,
        cr3=cr3,
        instructions=instructions,
    )


def _core_stops(stop: Stop) -> list[tuple[int, int, int, bool, bool]]:
    """`struct vcpu_stop` of a stop, without its id: kind, address, length, on_read, on_write."""
    match stop:
        case Breakpoint(address=address):
            _check_address(address)
            return [(_core.STOP_BREAKPOINT, address, 0, False, False)]
        case Watchpoint(address=address, length=length):
            _check_address(address)
            if not 1 <= length < 1 << 32:
                raise Invalid(f"a watchpoint watches 1 to {(1 << 32) - 1} bytes, not {length}")
            kind = _core.STOP_WATCH_PHYSICAL if stop.physical else _core.STOP_WATCH
            return [(kind, address, length, stop.on_read, stop.on_write)]
        case PortStop(first=first, last=last):
            return [(_core.STOP_IO, first, last - first + 1, False, False)]
        case VectorStop(vectors=vectors):
            return [(_core.STOP_VECTOR, vector, 0, False, False) for vector in vectors]
        case ModeStop():
            return [(_core.STOP_MODE, 0, 0, False, False)]
        case Cr3Stop():
            return [(_core.STOP_CR3, 0, 0, False, False)]
        case UnwrittenStop():
            return [(_core.STOP_UNWRITTEN, 0, 0, False, False)]
        case UnclaimedStop():
            return [(_core.STOP_UNCLAIMED, 0, 0, False, False)]
    raise Unsupported(f"{stop.text()}: the emulator does not watch for it")


def _check_address(address: int) -> None:
    if not 0 <= address < 1 << 64:
        raise Invalid(f"{address:#x} is not a 64-bit address")


_MAKERS: dict[int, Callable[[EmulatorVcpu, tuple, bytes], Exit]] = {
    _core.EXIT_IO: EmulatorVcpu._io,
    _core.EXIT_MMIO: EmulatorVcpu._mmio,
    _core.EXIT_HLT: EmulatorVcpu._hlt,
    _core.EXIT_DEBUG: EmulatorVcpu._debug,
    _core.EXIT_SHUTDOWN: EmulatorVcpu._shutdown,
    _core.EXIT_INTERRUPTED: EmulatorVcpu._interrupted,
    _core.EXIT_LIMIT: EmulatorVcpu._limit,
    _core.EXIT_ERROR: EmulatorVcpu._error,
}
EmulatorVcpu.makers = _MAKERS
