"""Signals: what comes to a machine's CPUs from whoever drives it: the data of the access that one of them waits with,
interrupts; and what the guest has used that nobody claims.
"""

from __future__ import annotations

from concurrent.futures import Future

from vmfs.engine.base import Vcpu
from vmfs.machine.cpu import Cpu
from vmfs.machine.pins import LINES, Pins
from vmfs.machine.value import Value
from vmfs.words.unclaimed import Use


class Signals(Value):
    _pins: Pins

    def _changed(self) -> None:
        """Somebody outside has changed the machine, and not by an input."""
        if self.history is not None:
            self.history.changed = True

    @property
    def access_data(self) -> bytes:
        with self._lock:
            self._check_open()
            if self._run is not None:
                return b""
            # What a CPU that came from elsewhere has not: the bytes of a write that is done.
            return self._exit_cpu.vcpu.access_data or getattr(self._last_exit, "data", b"")

    def set_access_data(self, data: bytes) -> None:
        with self._lock:
            self._check_idle()
            self._exit_cpu.vcpu.access_data = data
            self._changed()
            self._moved()

    @property
    def _exit_cpu(self) -> Cpu:
        """The one with the last exit."""
        return self.cpus[0 if self._last_exit is None else self._last_exit.cpu]

    def unclaimed(self) -> Future[str]:
        """What the guest has used and nothing has claimed, a line each: ports and addresses (of a machine with
        devices), MSRs."""

        def lines(cpu: Vcpu) -> str:
            found = [] if self.board is None else self.board.unclaimed()
            for one in self.cpus:
                which = f" cpu={one.index}" if len(self.cpus) > 1 else ""
                for index, reads, writes, rip in one.vcpu.unclaimed_msrs():
                    found.append(f"msr={index:#x} {Use(reads, writes, rip)}{which}")
            return "".join(f"{line}\n" for line in found)

        return self.at_boundary(lines)

    # ---- interrupts

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt. WouldBlock when the queue is full."""
        with self._lock:
            self._check_open()
            self.cpu.vcpu.interrupt(vector)
            self._changed()
            self._notice()

    def nmi(self) -> None:
        with self._lock:
            self._check_open()
            if self.board is not None and self.board.inputs.have_times:
                self.board.inputs.enter(self._pins, "nmi", b"")
            else:
                self.cpu.vcpu.nmi()
                self._changed()
                self._notice()

    def irq_line(self, gsi: int, level: bool) -> None:
        with self._lock:
            self._check_open()
            if self.board is not None and self.board.inputs.have_times and 0 <= gsi < LINES:
                self.board.inputs.enter(self._pins, "line", bytes((gsi, level)))
            else:
                self._machine.irq_line(gsi, level)

    @property
    def interrupts_queued(self) -> int:
        with self._lock:
            self._check_open()
            return self.cpu.vcpu.interrupts_queued
