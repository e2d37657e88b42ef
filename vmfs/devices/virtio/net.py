"""virtio-net: a network card, whose frames a backend carries.

Source: VIRTIO 1.2, section 5.1. No offloads: each frame is whole, with its checksums, as on a wire.

With several CPUs a driver may use several pairs of queues (5.1.6.5.5). What is received of a flow comes by the pair by
which the guest last sent of it; the rest by the first.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from typing import Annotated, Any, ClassVar

import msgspec

from vmfs.devices.device import Port
from vmfs.devices.network.backends import Backend
from vmfs.devices.network.card import Card
from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import Chain, DriverError, Virtqueue
from vmfs.words.errors import Invalid
from vmfs.words.nets import MAX_FRAME

F_MAC, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_MQ = 1 << 5, 1 << 15, 1 << 16, 1 << 17, 1 << 22
_STATUS_LINK_UP = 1

# struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
_HEADER = struct.Struct("<BBHHHHH")
MOST_PAIRS = 4
_PAIR = 2  # queues: of it the first one receives
_CONTROL = _PAIR * MOST_PAIRS  # the last of QUEUES; where it is for a driver, `_control` says
_CTRL_MQ, _PAIRS_SET = 4, 0
_OK, _ERR = b"\0", b"\1"
_FLOWS = 1024  # that are remembered


class NetState(VirtioState):
    """`frame` has arrived, and the guest has no buffer for it yet. What the backend has not given, or not taken, is on
    the wire, where frames may be lost. `pairs`: of queues, that the driver uses; by which a flow comes is forgotten."""

    VERSION: ClassVar[int] = 3

    mac: Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]
    pairs: Annotated[int, msgspec.Meta(ge=1, le=MOST_PAIRS)]
    frame: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME)] | None
    link_up: bool


class Net(Card[NetState], VirtioDevice[NetState]):
    TYPE = "virtio-net"
    STATE = NetState
    DEVICE = FIRST_DEVICE + 1
    CLASS = 0x020000
    QUEUES = (256,) * _CONTROL + (64,)

    def __init__(self, board: Port, name: str, slot: int, backend: Backend, mac: bytes) -> None:
        self.plug_in(backend, mac)
        self.pairs = 1  # that the driver uses
        self._flows: dict[bytes, int] = {}  # as the guest receives them -> their pair
        self._used: dict[Virtqueue, None] = {}  # by `deliver`, in order
        super().__init__(board, name, slot)

    def features(self) -> int:
        features = F_MAC | F_STATUS | F_MRG_RXBUF
        return features | F_CTRL_VQ | F_MQ if self._most_pairs > 1 else features

    @property
    def _most_pairs(self) -> int:
        return min(self.board.cpu_count, MOST_PAIRS)

    @property
    def _control(self) -> int:
        """The control queue's number (5.1.2); _CONTROL + 1: the driver has none."""
        if not self.has(F_CTRL_VQ):
            return _CONTROL + 1
        return _PAIR * self._most_pairs if self.has(F_MQ) else _PAIR

    def device_config(self) -> bytes:
        return struct.pack("<6sHH", self.mac, _STATUS_LINK_UP if self.link_up else 0, self._most_pairs)

    def started(self) -> None:
        self.begin_carrying()

    def stopped(self) -> None:
        self.pairs = 1
        self._flows.clear()
        self.forget_frames()

    def link_changed(self) -> None:
        self.config_changed()

    def guarded(self) -> AbstractContextManager[None]:
        return VirtioDevice.guarded(self)

    def notified(self, queue: Virtqueue) -> None:
        if queue.index == self._control:
            self.serve(queue, self._command)
        elif queue.index >= _PAIR * self.pairs:
            pass
        elif queue.index % _PAIR:
            if self._blocked:
                self.send_soon()  # it may have been held back meanwhile by more than the backend
            else:
                self._transmit(queue)
        else:
            self.buffers_came()

    def _command(self, chain: Chain) -> int:
        """Of the control queue (5.1.6.5): there is one."""
        command = chain.read(0, 5)
        if len(command) < 2 or not chain.writable_length:
            raise DriverError("a command without its class, or without room for an answer")
        answer = _ERR
        if command[:2] == bytes((_CTRL_MQ, _PAIRS_SET)) and len(command) == 4 and self.has(F_MQ):
            pairs = int.from_bytes(command[2:], "little")
            if 1 <= pairs <= self._most_pairs:
                self.pairs, answer = pairs, _OK
                self._starved = False
                self.send_soon()
        return chain.write(answer)

    # ---- what the guest sends

    @property
    def sends(self) -> bool:
        return self.is_live

    def send_on(self) -> None:
        for index in range(1, _PAIR * self.pairs, _PAIR):
            if self.queues[index].enabled:
                self._transmit(self.queues[index])
            if self._blocked:
                break

    def _transmit(self, queue: Virtqueue) -> None:
        """Send what waits, as far as the backend takes it."""
        while True:
            while not self._blocked and (chain := queue.pop()) is not None:
                length = chain.readable_length - _HEADER.size
                if length < 0:
                    raise DriverError("a frame without its header")
                frame = chain.read(_HEADER.size, MAX_FRAME + 1)
                if self.pairs > 1:
                    self._note_flow(frame, queue.index // _PAIR)
                if self._send_one(chain.read(0, _HEADER.size), frame):
                    queue.push(chain, 0)
                else:
                    queue.unpop()
            if self._blocked:
                break
            queue.want_notifications()
            if not queue.pending():
                break
        self.sent()
        self.tell(queue)

    def _send_one(self, header: bytes, frame: bytes) -> bool:
        if header[0] or header[1]:  # flags, or GSO: asks for what was not offered
            self.counters["tx_bad"] += 1
            return True
        return self.send(frame)

    def _note_flow(self, frame: bytes, pair: int) -> None:
        flow = _flow(frame, sent=True)
        if flow is None:
            return
        if len(self._flows) >= _FLOWS and flow not in self._flows:
            del self._flows[next(iter(self._flows))]
        self._flows[flow] = pair

    # ---- what the guest receives

    @property
    def listens(self) -> bool:
        return self.is_live and self.queues[0].enabled

    def deliver(self, frame: bytes) -> bool:
        queue = self._queue_for(frame)
        self._used[queue] = None
        return self._deliver(queue, frame)

    def delivered(self) -> None:
        used, self._used = self._used, {}
        for queue in used:
            self.tell(queue)

    def _queue_for(self, frame: bytes) -> Virtqueue:
        if self.pairs > 1 and not self._is_timed and (flow := _flow(frame, sent=False)) is not None:
            pair = self._flows.get(flow, 0)
            queue = self.queues[_PAIR * pair]
            if pair < self.pairs and queue.enabled:
                return queue
        return self.queues[0]

    def _deliver(self, queue: Virtqueue, frame: bytes) -> bool:
        """Give a frame to the guest. False when it has no buffers, and has been asked to notify when it has."""
        size = _HEADER.size + len(frame)
        chains = self._take(queue, size)
        while chains is None:
            waiting = queue.pending()
            queue.want_notifications()
            if queue.pending() == waiting:
                return False
            chains = self._take(queue, size)
        if sum(chain.writable_length for chain in chains) < size:
            for chain in chains:
                queue.push(chain, 0)
            self.counters["rx_dropped"] += 1  # longer than the buffers that the driver chose
            return True
        data = memoryview(_HEADER.pack(0, 0, 0, 0, 0, 0, len(chains)) + frame)
        for chain in chains:
            done = chain.write(data)
            data = data[done:]
            queue.push(chain, done)
        self.count_received(frame)
        return True

    def _take(self, queue: Virtqueue, size: int) -> list[Chain] | None:
        """The buffers for a frame: one, or, where they may be merged, as many as it takes. None: there are too few
        now."""
        chains: list[Chain] = []
        room = 0
        most = queue.size if self.has(F_MRG_RXBUF) else 1
        while room < size and len(chains) < most:
            chain = queue.pop()
            if chain is None:
                for _ in chains:
                    queue.unpop()
                return None
            if chain.writable_length < _HEADER.size:
                raise DriverError(f"a receive buffer of {chain.writable_length} bytes")
            chains.append(chain)
            room += chain.writable_length
        return chains

    # ---- life

    def save_own(self) -> dict[str, Any]:
        return {"mac": self.mac, "pairs": self.pairs, "frame": self._frame, "link_up": self.link_up}

    def check_own(self, state: NetState) -> None:
        self.check_card(state.mac)
        if state.pairs > self._most_pairs:
            raise Invalid(f"{self.name}: it has {self._most_pairs} pairs of queues")

    def load_own(self, state: NetState) -> None:
        self.pairs = state.pairs
        self.load_card(state.mac, state.frame, state.link_up)

    def load(self, state: NetState) -> None:
        super().load(state)
        if state.link_up != self.link_up:
            self.config_changed()


def _flow(frame: bytes, *, sent: bool) -> bytes | None:
    """What all frames of a flow of TCP or UDP have, as they are received; one that is sent has it the other way round.
    None for another frame, a fragment, or one with IP options."""
    kind = frame[12:14]
    if kind == b"\x08\0" and frame[14:15] == b"\x45" and not int.from_bytes(frame[20:22], "big") & 0x3FFF:
        protocol, addresses, length, ports = frame[23:24], 26, 4, 34
    elif kind == b"\x86\xdd":
        protocol, addresses, length, ports = frame[20:21], 22, 16, 54
    else:
        return None
    if protocol not in (b"\x06", b"\x11") or len(frame) < ports + 4:
        return None
    source, target = frame[addresses : addresses + length], frame[addresses + length : addresses + 2 * length]
    from_, to = frame[ports : ports + 2], frame[ports + 2 : ports + 4]
    if sent:
        source, target, from_, to = target, source, to, from_
    return protocol + source + target + from_ + to

