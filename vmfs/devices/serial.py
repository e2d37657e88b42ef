"""16550A UART. What it sends goes to `output`; what it gets comes by `receive`, and waits while its FIFO is full.

Source: National Semiconductor PC16550D data sheet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Annotated

import msgspec

from vmfs.devices.device import U8, U16, DeviceState, Port, QuietDevice, Window
from vmfs.devices.sent import LOG_SIZE, Sent

FIFO = 16
# Offsets; RBR, THR, IER are DLL, DLM while LCR.DLAB is set.
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

_IER_RX, _IER_THRE, _IER_LINE, _IER_MODEM = 1, 2, 4, 8
_LSR_DR, _LSR_OE, _LSR_THRE, _LSR_TEMT = 1, 2, 0x20, 0x40
_MCR_DTR, _MCR_RTS, _MCR_OUT1, _MCR_OUT2, _MCR_LOOP = 1, 2, 4, 8, 0x10
_LOOKS = 16  # by which a guest that neither has interrupts nor raises RTS is known to listen
_MSR_READY = 0xB0  # CTS, DSR, DCD: somebody is at the other end


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


_NUMBERS = tuple(name for name in SerialState.__struct_fields__ if name not in ("fifo", "waiting", "sent"))


class Serial(QuietDevice[SerialState]):
    """A UART at `port`. `output(data)` is called, with the board's lock held, for each byte that is sent.

    The line has no speed: a byte is sent when it is written. So the transmitter is always empty, and bytes that
    come are in the FIFO as soon as it has room; the host's own queue (`waiting`) has no limit that it enforces.

    There is flow control at the other end, so that what is typed before a driver is ready is not lost: Linux empties
    the FIFO and the receiver several times as it finds and opens a port. What a guest clears out of the FIFO has not
    been sent yet, and is sent again when the guest listens: it raises RTS, enables the interrupt of the receiver, or
    has looked for data a few times.
    """

    TYPE = "16550"
    STATE = SerialState

    def __init__(
        self, board: Port, name: str, port: int, irq: int, output: Callable[[bytes], None] | None = None
    ) -> None:
        super().__init__(board, name)
        self.port = port
        self.irq = irq
        self.output = output or (lambda data: None)
        self.sent = Sent()
        self.waiting: deque[int] = deque()  # bytes that did not fit into the FIFO yet
        self.fifo: deque[int] = deque()
        self.took: Callable[[], None] = lambda: None  # called when `waiting` got shorter
        self.reset()

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", self.port, 8),)

    def reset(self) -> None:
        self.ier = self.lcr = self.mcr = self.scr = 0
        self.fcr = 0
        self.divisor = 12  # 9600 baud
        self.rbr = 0  # the byte that was read last: without a FIFO it stays in the register
        self.overrun = False
        self.thre = False  # the transmitter became empty, which the guest has not seen yet
        self.delta = 0  # changes of the modem lines, in loopback
        self.waiting.extendleft(reversed(self.fifo))
        self.fifo.clear()
        self.looks = _LOOKS  # of the guest for data, since it has cleared the FIFO
        self._update()
        self._refill()

    # ---- the other end

    def receive(self, data: bytes) -> None:
        """Bytes come in. From any thread."""
        with self.board.lock:
            self.counters["received"] += len(data)
            self.waiting.extend(data)
            self._refill()

    def _clear(self) -> None:
        """Empty the FIFO; what was in it is still to come, except for what the guest has sent to itself."""
        if not self.mcr & _MCR_LOOP:
            self.waiting.extendleft(reversed(self.fifo))
            self.looks = 0
        self.fifo.clear()

    def _listens(self) -> bool:
        return self.looks >= _LOOKS or bool(self.mcr & _MCR_RTS or self.ier & _IER_RX)

    def _refill(self) -> None:
        if self.mcr & _MCR_LOOP or not self._listens():
            return
        room = (FIFO if self.fcr & 1 else 1) - len(self.fifo)
        moved = min(room, len(self.waiting))
        for _ in range(moved):
            self.fifo.append(self.waiting.popleft())
        if moved > 0:
            self._update()
            self.took()

    # ---- interrupts

    def _cause(self) -> int:
        """IIR's identification, by priority; 1 for none."""
        if self.ier & _IER_LINE and self.overrun:
            return 6
        if self.ier & _IER_RX and self.fifo:
            # Below the trigger level a real UART waits four characters' time: at no speed, none.
            trigger = (1, 4, 8, 14)[self.fcr >> 6] if self.fcr & 1 else 1
            return 4 if len(self.fifo) >= trigger else 12
        if self.ier & _IER_THRE and self.thre:
            return 2
        if self.ier & _IER_MODEM and self.delta:
            return 0
        return 1

    def _update(self) -> None:
        # OUT2 gates the interrupt on a PC's board.
        self.set_irq(self._cause() != 1 and bool(self.mcr & _MCR_OUT2) and not self.mcr & _MCR_LOOP)

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if size > 1:  # the bus of a PC makes bytes of it
            return sum(self.read(region, (offset + i) & 7, 1) << 8 * i for i in range(size))
        dlab = self.lcr & 0x80
        if offset == RBR:
            if dlab:
                return self.divisor & 0xFF
            if self.fifo:
                value = self.rbr = self.fifo.popleft()
            else:
                self._look()
                value = 0 if self.fcr & 1 else self.rbr
            self._refill()
            self._update()
            return value
        if offset == IER:
            return self.divisor >> 8 if dlab else self.ier
        if offset == IIR:
            cause = self._cause()
            if cause == 2:
                self.thre = False
                self._update()
            return cause | (0xC0 if self.fcr & 1 else 0)
        if offset == LCR:
            return self.lcr
        if offset == MCR:
            return self.mcr
        if offset == LSR:
            value = _LSR_THRE | _LSR_TEMT | (_LSR_DR if self.fifo else 0) | (_LSR_OE if self.overrun else 0)
            self.overrun = False
            self._look()
            self._update()
            return value
        if offset == MSR:
            value, self.delta = self._modem() | self.delta, 0
            self._update()
            return value
        return self.scr

    def _look(self) -> None:
        """The guest looks for data."""
        if self.looks < _LOOKS and not self.fifo:
            self.looks += 1
            self._refill()

    def _modem(self) -> int:
        if not self.mcr & _MCR_LOOP:
            return _MSR_READY
        mcr = self.mcr
        return (mcr & _MCR_RTS) << 3 | (mcr & _MCR_DTR) << 5 | (mcr & _MCR_OUT1) << 4 | (mcr & _MCR_OUT2) << 4

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if size > 1:
            for i in range(size):
                self.write(region, (offset + i) & 7, 1, value >> 8 * i & 0xFF)
            return
        dlab = self.lcr & 0x80
        if offset == THR:
            if dlab:
                self.divisor = self.divisor & 0xFF00 | value
                return
            self._send(value)
        elif offset == IER:
            if dlab:
                self.divisor = self.divisor & 0xFF | value << 8
                return
            if value & _IER_THRE and not self.ier & _IER_THRE:
                self.thre = True  # enabling it with an empty transmitter makes the interrupt
            self.ier = value & 0x0F
            self._refill()
        elif offset == FCR:
            if value & 2 or (value ^ self.fcr) & 1:
                self._clear()
            self.fcr = value & 0xC9
            self._refill()
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            before = self._modem()
            self.mcr = value & 0x1F
            changed = before ^ self._modem()
            ring_fell = before & 0x40 and not self._modem() & 0x40
            if self.mcr & _MCR_LOOP:
                self.delta |= changed >> 4 & 0xB | (4 if ring_fell else 0)
            self._refill()
        elif offset == SCR:
            self.scr = value
        self._update()

    def _send(self, byte: int) -> None:
        self.thre = True
        if self.mcr & _MCR_LOOP:
            # "Overrun error": without FIFOs the newest byte takes the place of the one before, with them it is lost.
            if len(self.fifo) >= (FIFO if self.fcr & 1 else 1):
                self.overrun = True
                if not self.fcr & 1:
                    self.fifo.clear()
            if len(self.fifo) < FIFO:
                self.fifo.append(byte)
        else:
            self.counters["sent"] += 1
            data = bytes((byte,))
            self.sent.append(data)
            self.output(data)

    # ---- state

    def save(self) -> SerialState:
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return SerialState(fifo=bytes(self.fifo), waiting=bytes(self.waiting), sent=self.sent.save(), **numbers)

    def load(self, state: SerialState) -> None:
        for name in _NUMBERS:
            setattr(self, name, getattr(state, name))
        self.fifo = deque(state.fifo)
        self.waiting = deque(state.waiting)
        self.sent.load(state.sent)
        self._update()
