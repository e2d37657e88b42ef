"""virtio-net: a network card, whose frames a backend carries.

Source: VIRTIO 1.2, section 5.1. A driver may leave checksums and the cutting of TCP into segments to the device, and
have segments that come given as one (5.1.6.2, 5.1.6.4): chips/frames.c does it, so backends see frames as on a wire.

With several CPUs a driver may use several pairs of queues (5.1.6.5.5). What is received of a flow comes by the pair by
which the guest last sent of it; the rest by the first.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from typing import Annotated, Any, ClassVar

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import Port
from vmfs.devices.network.backends import Backend
from vmfs.devices.network.card import Card
from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import Chain, DriverError, Virtqueue
from vmfs.words.errors import Invalid
from vmfs.words.nets import MAX_FRAME

F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6 = 1, 1 << 1, 1 << 7, 1 << 8, 1 << 11, 1 << 12
_GUEST_TSO, _HOST_TSO = F_GUEST_TSO4 | F_GUEST_TSO6, F_HOST_TSO4 | F_HOST_TSO6
F_MAC, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_MQ = 1 << 5, 1 << 15, 1 << 16, 1 << 17, 1 << 22
_STATUS_LINK_UP = 1

_HEADER_SIZE = 12  # struct virtio_net_hdr
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
        features = F_MAC | F_STATUS | F_MRG_RXBUF | F_CSUM | F_GUEST_CSUM | _GUEST_TSO | _HOST_TSO
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
        """Send what waits, while the backend takes it."""
        ram, checks, cuts = self.mapped_ram(), self.has(F_CSUM), self.has(_HOST_TSO)
        while True:
            while not self._blocked:
                frames, count, bad, is_wrong = _chips.take_frames(queue, ram, checks, cuts)
                if bad:
                    self.counters["tx_bad"] += bad
                if self.pairs > 1:
                    for frame in frames:
                        self._note_flow(frame, queue.index // _PAIR)
                if frames:
                    self.send_all(frames)
                if is_wrong:
                    self._blame(queue, "a frame without its header", "readable_length")
                if not count:
                    break
            if self._blocked:
                break
            queue.want_notifications()
            if not queue.pending():
                break
        self.sent()
        self.tell(queue)

    def _blame(self, queue: Virtqueue, what: str, length: str) -> None:
        """The next request is none that a driver may make: it is read again, which says why."""
        chain = queue.pop()
        if chain is not None and getattr(chain, length) < _HEADER_SIZE:
            raise DriverError(f"queue {queue.index}: {what}")
        raise DriverError(f"queue {queue.index}: a request that was changed while it was read")

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
        return self.deliver_all([frame]) == 1

    def deliver_all(self, frames: list[bytes]) -> int:
        done = 0
        while done < len(frames):
            queue, end = self._queue_for(frames[done]), len(frames)
            if self.pairs > 1:
                end = next((at for at in range(done, end) if self._queue_for(frames[at]) is not queue), end)
            self._used[queue] = None
            count = self._deliver(queue, frames[done:end])
            done += count
            if done < end:
                break
        return done

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

    def _deliver(self, queue: Virtqueue, frames: list[bytes]) -> int:
        """Give frames to the guest. Returns how many; where it has no more buffers, it has been asked to notify when it
        has."""
        ram = self.mapped_ram()
        merges, checks, joins = self.has(F_MRG_RXBUF), self.has(F_GUEST_CSUM), self.has(_GUEST_TSO)
        done = 0
        while done < len(frames):
            count, is_dropped, is_wrong = _chips.put_frames(queue, ram, frames[done:], merges, checks, joins)
            self.count_received(frames[done : done + count])
            done += count
            if is_dropped:
                self.counters["rx_dropped"] += 1  # longer than the buffers that the driver chose
                done += 1
            elif is_wrong:
                self._blame(queue, "a receive buffer of less than a header", "writable_length")
            elif done < len(frames):
                waiting = queue.pending()
                queue.want_notifications()
                if queue.pending() == waiting:
                    break
        return done

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

