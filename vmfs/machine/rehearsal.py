"""Trying a change of registers on a CPU that is not the guest's."""

from __future__ import annotations

from vmfs.engine.base import Engine, Machine, Vcpu
from vmfs.machine.state import RESET_STATES


class Rehearsal:
    """A CPU for a task that changes registers, which only finds out whether the engine takes them.

    An engine tells only when something is set, and to set something completes the access that waits. So it is
    set on a CPU of another machine, made when the first state but `regs` (never refused) is set.
    """

    def __init__(self, engine: Engine, cpu: Vcpu) -> None:
        self._engine = engine
        self._cpu = cpu
        self._machine: Machine | None = None
        self._spare: Vcpu | None = None
        self._regs: bytes | None = None

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._machine is not None:
            self._machine.close()

    def get_state(self, name: str) -> bytes:
        if name == "regs" and self._regs is not None:
            return self._regs
        return (self._spare or self._cpu).get_state(name)

    def set_state(self, name: str, data: bytes) -> None:
        if name == "regs" and len(data) == len(self.get_state(name)):
            self._regs = data
        elif name == "cpuid":
            self._other().set_state(name, data)
            self._cpu.set_state(name, data)  # here, whether it has run decides
        else:
            self._other().set_state(name, data)

    def get_msr(self, index: int) -> int:
        return (self._spare or self._cpu).get_msr(index)

    def set_msr(self, index: int, value: int) -> None:
        self._other().set_msr(index, value)

    def _other(self) -> Vcpu:
        if self._spare is None:
            self._machine = self._engine.create_machine()
            spare = self._machine.create_vcpu(0)
            for name in ("cpuid", *RESET_STATES):
                spare.set_state(name, self._cpu.get_state(name))
            self._spare = spare
        return self._spare
