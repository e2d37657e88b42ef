"""Parallel port: an SPP with a printer at its other end, which is on line and takes each byte at once. What it was
given goes to `output`.

Left out: what a PC/AT's port has not, input by the data lines (PS/2), EPP and ECP. Their bits read as ones, by which
drivers know.

Source: IBM PC AT Technical Reference, "Printer adapter"; IEEE 1284-2000, compatibility mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from vmfs.devices.device import U8, DeviceState, Port, QuietDevice, Window
from vmfs.devices.sent import LOG_SIZE, Sent

_DATA, _STATUS, _CONTROL = range(3)
_STROBE, _AUTOFEED, _RUNS, _SELECT, _INTERRUPTS = 1, 2, 4, 8, 0x10  # of the control register; _RUNS is /INIT
_WRITABLE = _STROBE | _AUTOFEED | _RUNS | _SELECT | _INTERRUPTS
_NOT_BUSY, _NOT_ACK, _SELECTED, _NOT_ERROR, _UNUSED = 0x80, 0x40, 0x10, 8, 7  # of the status; 20h: out of paper


class ParallelState(DeviceState):
    """`sent`: the end of what was printed."""

    data: U8
    control: Annotated[int, msgspec.Meta(ge=0, le=_WRITABLE)]
    sent: Annotated[bytes, msgspec.Meta(max_length=2 * LOG_SIZE)]


class ParallelPort(QuietDevice[ParallelState]):
    """`output(data)` is called with the board's lock held. Nothing is ever `waiting` for the guest, as nothing is sent
    to it."""

    TYPE = "parallel"
    STATE = ParallelState
    IS_LATE = True
    waiting = b""

    def __init__(
        self, board: Port, name: str, port: int, irq: int, output: Callable[[bytes], None] = lambda data: None
    ) -> None:
        super().__init__(board, name)
        self.port = port
        self.irq = irq
        self.output = output
        self.took: Callable[[], None] = lambda: None
        self.sent = Sent()
        self._data = self._control = 0

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", self.port, 3),)

    def read(self, region: int, offset: int, size: int) -> int:
        registers = self._data, self._status, self._control | 0xFF & ~_WRITABLE
        return int.from_bytes(bytes(registers[offset : offset + size]), "little")

    @property
    def _status(self) -> int:
        """Busy while it gets a byte, and while it is held in reset."""
        is_busy = self._control & _STROBE or not self._control & _RUNS
        return _NOT_ACK | _SELECTED | _NOT_ERROR | _UNUSED | (0 if is_busy else _NOT_BUSY)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            if at == _DATA:
                self._data = byte
            elif at == _CONTROL:
                self._set_control(byte & _WRITABLE)

    def _set_control(self, value: int) -> None:
        before, self._control = self._control, value
        if not value & _RUNS:
            return
        if value & ~before & _STROBE:
            self._print(bytes((self._data,)))
        elif before & ~value & _STROBE and value & _INTERRUPTS:  # the end of /ACK's pulse
            self.set_irq(True)
            self.set_irq(False)

    def _print(self, data: bytes) -> None:
        self.counters["sent"] += len(data)
        self.sent.append(data)
        if not self.board.is_silent:
            self.output(data)

    def reset(self) -> None:
        """What was printed stays so."""
        self._data = self._control = 0

    def save(self) -> ParallelState:
        return ParallelState(data=self._data, control=self._control, sent=self.sent.save())

    def load(self, state: ParallelState) -> None:
        self._data, self._control = state.data, state.control
        self.sent.load(state.sent)
