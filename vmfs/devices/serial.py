"""16550A UART. What it sends goes to `output`; what it gets comes by `receive`, and waits while its FIFO is full.

Source: National Semiconductor PC16550D data sheet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U8, U16, DeviceState, Port, QuietDevice, Window
from vmfs.devices.sent import LOG_SIZE, Sent

FIFO = 16


class Output:
    """What a chip has sent, on its way to `output`."""

    def __init__(self, board: Port, chip: Any) -> None:
        self._board = board
        self._chip = chip
        self._lock = threading.Lock()  # what is sent stays in order
        self.sent = Sent()
        self.to: Callable[[bytes], None] = lambda data: None

    def drain(self) -> None:
        with self._lock:
            data = self._chip.take()
            if data:
                self.sent.append(data)
                if not self._board.is_silent:
                    self.to(data)


class SerialState(DeviceState):
    """`waiting`: bytes that have come and did not fit into the FIFO; `sent`: the end of what was sent."""

    ier: U8
    lcr: U8
    mcr: U8
    scr: U8
    fcr: U8
    divisor: U16
    overrun: bool
    thre: bool
    delta: U8
    looks: U8
    rbr: U8
    fifo: Annotated[bytes, msgspec.Meta(max_length=FIFO)]
    waiting: bytes
    sent: Annotated[bytes, msgspec.Meta(max_length=2 * LOG_SIZE)]


class Serial(QuietDevice[SerialState]):
    """A UART at `port`. `output(data)` is called with what is sent, soon after it was, and before a run's exit is seen.

    The line has no speed: a byte is sent when it is written. So the transmitter is always empty, and bytes that
    come are in the FIFO as soon as it has room; the host's own queue (`waiting`) has no limit that it enforces.

    There is flow control at the other end, so that what is typed before a driver is ready is not lost: Linux empties
    the FIFO and the receiver several times as it finds and opens a port. What a guest clears out of the FIFO has not
    been sent yet, and is sent again when the guest listens: it raises RTS, enables the interrupt of the receiver, or
    has looked for data a few times.

    The registers are in C (chips/uart.c).
    """

    TYPE = "16550"
    STATE = SerialState
    INPUTS = ("bytes",)

    def __init__(
        self, board: Port, name: str, port: int, irq: int, output: Callable[[bytes], None] | None = None
    ) -> None:
        super().__init__(board, name)
        self.port = port
        self.irq = irq
        self.chip = _chips.Uart(board.bus, self.number, irq)
        self._output = Output(board, self.chip)
        if output is not None:
            self._output.to = output
        self.took: Callable[[], None] = lambda: None  # called when `waiting` got shorter

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", self.port, 8),)

    @property
    def output(self) -> Callable[[bytes], None]:
        return self._output.to

    @output.setter
    def output(self, output: Callable[[bytes], None]) -> None:
        self._output.to = output

    @property
    def sent(self) -> Sent:
        return self._output.sent

    @property
    def waiting(self) -> bytes:
        """What did not fit into the FIFO yet."""
        return self.chip.waiting

    def count(self) -> None:
        for name, count in zip(("sent", "received"), self.chip.take_counts(), strict=True):
            if count:
                self._counters[name] += count

    # ---- the other end

    def receive(self, data: bytes) -> None:
        """Bytes come in. From any thread."""
        self.board.inputs.enter(self, "bytes", data)

    def input(self, kind: str, data: bytes) -> None:
        self.chip.receive(data)
        self._tell()

    def drain(self) -> None:
        self._output.drain()
        self._tell()

    def _tell(self) -> None:
        if self.chip.took():
            self.took()

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        value = self.chip.read(region, offset, size)
        self._tell()
        return value

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if not self.chip.write(region, offset, size, value):  # it has no room for what it has sent
            self.drain()
            self.chip.write(region, offset, size, value)
        self.drain()

    # ---- life

    def reset(self) -> None:
        self.chip.reset()
        self._tell()

    def save(self) -> SerialState:
        self.drain()
        return SerialState(**self.chip.state(), waiting=self.chip.waiting, sent=self.sent.save())

    def load(self, state: SerialState) -> None:
        self.drain()
        fields = {name: getattr(state, name) for name in SerialState.__struct_fields__ if name != "sent"}
        self.chip.load(**fields)
        self.sent.load(state.sent)
