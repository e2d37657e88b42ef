"""Ports for those who write kernels: a console of one port (E9, 402), and one that ends the run (F4)."""

from __future__ import annotations

from collections.abc import Callable

from vmfs.devices.device import Port, StatelessDevice, Window


class DebugConsole(StatelessDevice):
    """Bytes written to `port` go to `output`; reading gives `answer`, by which firmware knows that it is there.

    Bochs' port E9 answers E9; QEMU's isa-debugcon at 402, which SeaBIOS and OVMF write to, answers E9, too.
    """

    TYPE = "debug-console"

    def __init__(self, board: Port, name: str, port: int, output: Callable[[bytes], None] | None = None) -> None:
        super().__init__(board, name)
        self.port = port
        self.output = output or (lambda data: None)

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", self.port, 1),)

    def read(self, region: int, offset: int, size: int) -> int:
        return 0xE9

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        self.counters["sent"] += 1
        self.output(bytes((value & 0xFF,)))


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
