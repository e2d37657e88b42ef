"""virtio-console with one port.

Source: VIRTIO 1.2, section 5.3. What the guest sends goes to `output`; what it gets comes by `receive` and waits until
the guest has given buffers for it. The early console of F_EMERG_WRITE (5.3.4) is there, too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from vmfs.devices.device import Port
from vmfs.devices.sent import LOG_SIZE, Sent
from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import Chain, Virtqueue

F_EMERG_WRITE = 1 << 2
_EMERG_WRITE = 8  # offset of the field in the configuration
_RECEIVE, _TRANSMIT = 0, 1
_MOST = 1 << 20  # bytes of a request that are sent; no console writes as many at once


class ConsoleState(VirtioState):
    waiting: bytes
    sent: Annotated[bytes, msgspec.Meta(max_length=2 * LOG_SIZE)]


class Console(VirtioDevice[ConsoleState]):
    """`output(data)` is called with the board's lock held. `took` is called when `waiting` got shorter, as a
    serial port's."""

    TYPE = "virtio-console"
    INPUTS = ("bytes",)
    STATE = ConsoleState
    DEVICE = FIRST_DEVICE + 3
    CLASS = 0x078000
    QUEUES = (64, 64)

    def __init__(self, board: Port, name: str, slot: int, output: Callable[[bytes], None] | None = None) -> None:
        self.output = output or (lambda data: None)
        self.sent = Sent()
        self.waiting = bytearray()
        self.took: Callable[[], None] = lambda: None
        super().__init__(board, name, slot)

    def features(self) -> int:
        return F_EMERG_WRITE

    def device_config(self) -> bytes:
        return struct.pack("<HHII", 0, 0, 1, 0)  # no size of a screen; one port

    def write_device_config(self, offset: int, data: bytes) -> None:
        if offset == _EMERG_WRITE and data:
            self._send(data[:1])

    def notified(self, queue: Virtqueue) -> None:
        if queue.index == _TRANSMIT:
            self.serve(queue, self._transmit)
        else:
            self._deliver()

    def _transmit(self, chain: Chain) -> int:
        self._send(chain.read(0, _MOST))
        return 0

    def _send(self, data: bytes) -> None:
        self.counters["sent"] += len(data)
        self.sent.append(data)
        if not self.board.is_silent:
            self.output(data)

    def receive(self, data: bytes) -> None:
        """Bytes come in. From any thread."""
        self.board.inputs.enter(self, "bytes", data)

    def input(self, kind: str, data: bytes) -> None:
        self.counters["received"] += len(data)
        self.waiting += data
        if self.queues[_RECEIVE].enabled and self.is_live:
            with self.guarded():
                self._deliver()

    def _deliver(self) -> None:
        queue = self.queues[_RECEIVE]
        count = 0
        while True:
            while self.waiting and (chain := queue.pop()) is not None:
                done = chain.write(bytes(self.waiting[: chain.writable_length]))
                del self.waiting[:done]
                count += done
                queue.push(chain, done)
            queue.want_notifications()
            if not self.waiting or not queue.pending():
                break
        self.tell(queue)
        if count:
            self.took()

    def save_own(self) -> dict[str, Any]:
        return {"waiting": bytes(self.waiting), "sent": self.sent.save()}

    def load_own(self, state: ConsoleState) -> None:
        self.waiting = bytearray(state.waiting)
        self.sent.load(state.sent)
