"""Ports for authors of kernels: a console of one port (E9, 402), and one that ends the run (F4)."""

from __future__ import annotations

from collections.abc import Callable

from vmfs.devices import _chips
from vmfs.devices.device import Port, StatelessDevice, Window
from vmfs.devices.serial import Output

ANSWER = 0xE9


class DebugConsole(StatelessDevice):
    """Bytes written to `port` go to `output`; reading gives ANSWER, by which firmware knows that it is there.

    Bochs' port E9 answers E9; QEMU's isa-debugcon at 402, which SeaBIOS and OVMF write to, answers E9, too.
    """

    TYPE = "debug-console"

    def __init__(self, board: Port, name: str, port: int, output: Callable[[bytes], None] | None = None) -> None:
        super().__init__(board, name)
        self.port = port
        self.chip = _chips.Sender(board.bus, self.number, ANSWER)
        self._output = Output(board, self.chip)
        if output is not None:
            self._output.to = output

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", self.port, 1),)

    @property
    def output(self) -> Callable[[bytes], None]:
        return self._output.to

    @output.setter
    def output(self, output: Callable[[bytes], None]) -> None:
        self._output.to = output

    def count(self) -> None:
        if sent := self.chip.take_count():
            self._counters["sent"] += sent

    def drain(self) -> None:
        self._output.drain()

    def read(self, region: int, offset: int, size: int) -> int:
        return self.chip.read(region, offset, size)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if not self.chip.write(region, offset, size, value):  # it has no room for what it has sent
            self.drain()
            self.chip.write(region, offset, size, value)
        self.drain()


class DebugExit(StatelessDevice):
    """QEMU's isa-debug-exit: a write of N ends the run with `shutdown cause=debug-exit code=2N+1`."""

    TYPE = "debug-exit"

    def __init__(self, board: Port, name: str, port: int) -> None:
        super().__init__(board, name)
        self.port = port

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", self.port, 4),)

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        self.board.stop("debug-exit", (value << 1 | 1) & 0xFFFF_FFFF)
