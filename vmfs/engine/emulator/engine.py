"""The emulator engine: the contract of `vmfs.engine.base` over the C core (`core/core.h`, through `core/module.c`).

It runs everywhere, counts instructions, stops after exactly as many as it is told, and in its deterministic time the same
start and the same inputs give the same run. Break- and watchpoints are kept outside of guest memory and are not limited
in number. What the core does not implement yet is listed in docs/emulator.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

from vmfs import exits
from vmfs.engine.base import (
    MACHINE_STATES,
    VCPU_STATES,
    Availability,
    Capability,
    DebugRequest,
    Engine,
    Machine,
    Vcpu,
)
from vmfs.engine.emulator import _core
from vmfs.errors import EngineFailed, Invalid, Unsupported, VmfsError, WouldBlock
from vmfs.exits import Exit

PAGE_SIZE = 4096

_DEBUG_CAUSES = {
    _core.DEBUG_STEP: "step",
    _core.DEBUG_BREAKPOINT: "breakpoint",
    _core.DEBUG_WATCHPOINT: "watchpoint",
    _core.DEBUG_IO: "io",
    _core.DEBUG_EXCEPTION: "exception",
    _core.DEBUG_MODE: "mode",
    _core.DEBUG_CR3: "cr3",
}
_ERRORS: dict[int, type[VmfsError]] = {
    errno.EINVAL: Invalid,
    errno.EEXIST: Invalid,
    errno.ENOENT: Unsupported,
    errno.EOPNOTSUPP: Unsupported,
    errno.EAGAIN: WouldBlock,
}


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """The core's errno as an exception of ours; `what` begins the sentence."""
    try:
        yield
    except OSError as error:
        raise _ERRORS.get(error.errno, EngineFailed)(f"{what}: {os.strerror(error.errno)}") from error


class EmulatorEngine(Engine):
    """The bundled x86-64 emulator."""

    name = "emulator"

    def probe(self) -> Availability:
        return Availability(True, "an interpreter in C, on any host")

    def create_machine(self) -> EmulatorMachine:
        return EmulatorMachine()


class EmulatorMachine(Machine):
    """A `struct vm` of the core."""

    def __init__(self) -> None:
        self._vm = _core.Vm()
        self._has_irqchip = False
        self.capabilities = frozenset(
            {
                Capability.BUDGET,
                Capability.COUNTERS,
                Capability.GUEST_DEBUG,
                Capability.WATCHPOINTS,
                Capability.BREAKPOINTS_UNLIMITED,
                Capability.DETERMINISTIC,
            }
        )

    def map_memory(
        self, slot: int, guest_address: int, fd: int, offset: int, size: int, *, read_only: bool = False
    ) -> None:
        with _failures(f"memory slot {slot} at {guest_address:#x}"):
            self._vm.map(slot, guest_address, fd, offset, size, read_only)

    def create_vcpu(self, index: int) -> EmulatorVcpu:
        with _failures(f"CPU {index}"):
            return EmulatorVcpu(index, self._vm.create_vcpu(index), has_irqchip=self._has_irqchip)

    def create_irqchip(self) -> None:
        with _failures("interrupt controllers"):
            self._vm.create_irqchip()
        self._has_irqchip = True
        self.capabilities |= {Capability.IRQCHIP}

    def irq_line(self, gsi: int, level: bool) -> None:
        if not self._has_irqchip:
            raise Unsupported("the machine has no interrupt controllers, and so no interrupt lines")
        self._vm.irq_line(gsi, level)

    def dirty_log(self, slot: int) -> bytes:
        with _failures(f"dirty log of slot {slot}"):
            return self._vm.dirty_log(slot)

    def get_state(self, name: str) -> bytes:
        self._check_state(name)
        with _failures(name):
            return self._vm.get_state(name)

    def set_state(self, name: str, data: bytes) -> None:
        self._check_state(name)
        with _failures(name):
            self._vm.set_state(name, data)

    def _check_state(self, name: str) -> None:
        if name not in MACHINE_STATES:
            raise Invalid(f"there is no state {name}")
        if name != "clock" and not self._has_irqchip:
            raise Unsupported(f"{name}: the machine has no interrupt controllers")

    def close(self) -> None:
        self._vm.close()


class EmulatorVcpu(Vcpu):
    """A `struct vcpu` of the core."""

    def __init__(self, index: int, cpu: _core.Vcpu, *, has_irqchip: bool) -> None:
        self.index = index
        self._cpu = cpu
        self._has_irqchip = has_irqchip
        self._reads = False  # the last exit was a read, which its data completes

    def run(self, budget: int | None = None) -> Exit:
        exit_ = self._cpu.run(-1 if budget is None else budget)
        self._reads = False
        return _MAKERS[exit_[0]](self, exit_)

    # The exits: (reason, rip, write, size, count, address, cause, id, vector, message)

    def _io(self, exit_: tuple) -> Exit:
        _, rip, write, size, count, port, *_ = exit_
        self._reads = not write
        data = self._cpu.access_data if write else b""
        direction = "out" if write else "in"
        return exits.Io(
            direction=direction, port=port, size=size, count=count, data=data, rip=rip, cpu=self.index
        )

    def _mmio(self, exit_: tuple) -> Exit:
        _, rip, write, size, _, address, *_ = exit_
        self._reads = not write
        data = self._cpu.access_data if write else b""
        direction = "write" if write else "read"
        return exits.Mmio(direction=direction, addr=address, size=size, data=data, rip=rip, cpu=self.index)

    def _hlt(self, exit_: tuple) -> Exit:
        return exits.Hlt(rip=exit_[1], cpu=self.index)

    def _debug(self, exit_: tuple) -> Exit:
        _, rip, _, _, _, address, cause, id_, vector, _ = exit_
        name = _DEBUG_CAUSES[cause]
        return exits.Debug(
            cause=name,
            id=None if name == "step" else id_,
            addr=address if name in ("watchpoint", "io") else None,
            vector=vector if name == "exception" else None,
            rip=rip,
            cpu=self.index,
        )

    def _shutdown(self, exit_: tuple) -> Exit:
        return exits.Shutdown(cause="triple-fault", rip=exit_[1], cpu=self.index)

    def _interrupted(self, exit_: tuple) -> Exit:
        return exits.Interrupted(rip=exit_[1], cpu=self.index)

    def _limit(self, exit_: tuple) -> Exit:
        return exits.Limit(rip=exit_[1], cpu=self.index)

    def _error(self, exit_: tuple) -> Exit:
        return exits.Error(reason=exit_[9] or "the core gave no reason", rip=exit_[1], cpu=self.index)

    def kick(self) -> None:
        self._cpu.kick()

    def clear_kick(self) -> None:
        self._cpu.clear_kick()

    @property
    def access_data(self) -> bytes:
        return self._cpu.access_data

    @access_data.setter
    def access_data(self, data: bytes) -> None:
        if not self._reads:
            raise Invalid("no read waits for data")
        size = len(self._cpu.access_data)
        if len(data) != size:
            raise Invalid(f"the pending read takes {size} bytes, not {len(data)}")
        self._cpu.access_data = data

    def get_state(self, name: str) -> bytes:
        self._check_state(name)
        with _failures(name):
            return self._cpu.get_state(name)

    def set_state(self, name: str, data: bytes) -> None:
        self._check_state(name)
        with _failures(name):
            self._cpu.set_state(name, data)
        self._reads = False

    def _check_state(self, name: str) -> None:
        if name not in VCPU_STATES:
            raise Invalid(f"there is no state {name}")
        if name == "lapic" and not self._has_irqchip:
            raise Unsupported("lapic: the machine has no interrupt controllers")

    def get_msr(self, index: int) -> int:
        with _failures(f"MSR {index:#x}"):
            return self._cpu.get_msr(index)

    def set_msr(self, index: int, value: int) -> None:
        with _failures(f"MSR {index:#x}"):
            self._cpu.set_msr(index, value)
        self._reads = False

    def interrupt(self, vector: int) -> None:
        if self._has_irqchip:
            raise Unsupported("the machine has interrupt controllers, and they make the vectors: use a line")
        if not 0 <= vector <= 255:
            raise Invalid(f"{vector} is no vector: 0 to 255")
        try:
            self._cpu.interrupt(vector)
        except BlockingIOError:
            raise WouldBlock(f"{_core.INTERRUPT_QUEUE} interrupts wait already") from None

    @property
    def interrupts_queued(self) -> int:
        return self._cpu.interrupts_queued

    def nmi(self) -> None:
        self._cpu.nmi()

    def set_debug(self, request: DebugRequest) -> None:
        stops = [(_core.STOP_BREAKPOINT, one.id, one.address, 1, False, False) for one in request.breakpoints]
        for one in request.watchpoints:
            kind = _core.STOP_WATCH_PHYSICAL if one.physical else _core.STOP_WATCH
            stops.append((kind, one.id, one.address, one.length, one.on_read, one.on_write))
        with _failures("debug"):
            self._cpu.set_debug(request.step, stops)

    def translate(self, linear: int) -> int | None:
        return self._cpu.translate(linear & (1 << 64) - 1)

    def counters(self) -> dict[str, int]:
        return self._cpu.counters()

    def close(self) -> None:
        """Nothing: the CPU goes with its machine."""


_MAKERS: dict[int, Callable[[EmulatorVcpu, tuple], Exit]] = {
    _core.EXIT_IO: EmulatorVcpu._io,
    _core.EXIT_MMIO: EmulatorVcpu._mmio,
    _core.EXIT_HLT: EmulatorVcpu._hlt,
    _core.EXIT_DEBUG: EmulatorVcpu._debug,
    _core.EXIT_SHUTDOWN: EmulatorVcpu._shutdown,
    _core.EXIT_INTERRUPTED: EmulatorVcpu._interrupted,
    _core.EXIT_LIMIT: EmulatorVcpu._limit,
    _core.EXIT_ERROR: EmulatorVcpu._error,
}
